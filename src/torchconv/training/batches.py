"""A training split on its device, cut into augmented, normalised batches without waiting for the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from torchconv._common import check
from torchconv.data import Dataset
from torchconv.training.augment import Mix, flip, mix, plan_epoch, shift
from torchconv.training.config import FitConfig
from torchconv.training.inputs import Inputs, resident
from torchconv.training.policy import PolicyLoader


@dataclass(frozen=True)
class Batch:
    """What one process sees of one batch; ``total`` counts the items over all processes."""

    x: Tensor
    y: Tensor
    mix: Mix | None
    total: int


class Batches:
    """The batches of ``data.train``, epoch by epoch.

    Args:
        data: supplies the training split and its statistics.
        config: batch size, augmentation, seed.
        inputs: normalises, and says where the batches are wanted.
        rank, processes: which slice of each batch is this process's.
    """

    def __init__(self, data: Dataset, config: FitConfig, inputs: Inputs, rank: int = 0, processes: int = 1) -> None:
        images = data.kind == "image"
        if config.augment not in ("none", "shift"):
            remedy = f"is for images, and {data.name} is of kind {data.kind!r}: use 'none' or 'shift'"
            check(images, "augment", config.augment, remedy)
        items = len(data.train.y)
        check(items >= processes, "data", data.name, f"has {items} training items for {processes} processes")
        device = inputs.device
        self.config, self.inputs, self.device, self.rank, self.processes = config, inputs, device, rank, processes
        self.items, self.size = items, tuple(data.train.x.shape[2:])
        self.fill = images  # a series has no natural background: there the border is repeated
        self.y = data.train.y.to(device)
        self.policy = None
        if config.policy:
            self.policy = PolicyLoader(data.train.x.cpu(), config.policy, data.mean, config.seed)
        self.x = data.train.x if self.policy else resident(data.train.x, device)
        self.count = len(plan_epoch(config, items, self.size, 0, processes).bounds)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of epoch ``epoch`` (from 0)."""
        plan = plan_epoch(self.config, self.items, self.size, epoch, self.processes)
        mine = [self._slice(*bounds) for bounds in plan.bounds]
        ready = self.policy.epoch(epoch, [plan.order[a:b].tolist() for a, b in mine]) if self.policy else None
        order = plan.order.to(self.x.device)
        plan = plan.to(self.device)
        for (first, last), (a, b), how in zip(plan.bounds, mine, plan.mixes, strict=True):
            x = next(ready) if ready else self.x.index_select(0, order[a:b])
            x = x.to(self.device, non_blocking=True)
            if plan.shifts is not None:
                x = shift(x, plan.shifts[a:b], fill=self.fill)
            if plan.flips is not None:
                x = flip(x, plan.flips[a:b])
            x = self.inputs(x)
            yield Batch(mix(x, how) if how else x, self.y.index_select(0, plan.order[a:b]), how, last - first)

    def _slice(self, first: int, last: int) -> tuple[int, int]:
        """This process's part of the positions ``first`` to ``last``."""
        length = last - first
        return first + length * self.rank // self.processes, first + length * (self.rank + 1) // self.processes
