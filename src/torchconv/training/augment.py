"""Augmentation of whole batches as tensor operations, from random numbers drawn once an epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torchconv.training.config import FitConfig


@dataclass(frozen=True)
class Mix:
    """How one batch is mixed with its own mirror image: ``share`` of the first label, ``box`` of cutmix or ``None``."""

    share: float
    box: tuple[slice, ...] | None


@dataclass(frozen=True)
class EpochPlan:
    """All random choices of one epoch, a pure function of seed and epoch, the same on every device and process.

    Args:
        order: permutation of the items, int64 (n,).
        bounds: first and one-past-last position of each batch.
        shifts: int64 (n, axes), by position in ``order``; ``None`` is off.
        flips: bool (n,), likewise.
        mixes: one a batch, ``None`` for an unmixed one.
    """

    order: Tensor
    bounds: list[tuple[int, int]]
    shifts: Tensor | None
    flips: Tensor | None
    mixes: list[Mix | None]

    def to(self, device: torch.device) -> EpochPlan:
        """The plan with its tensors on ``device``."""
        shifts = None if self.shifts is None else self.shifts.to(device)
        flips = None if self.flips is None else self.flips.to(device)
        return EpochPlan(self.order.to(device), self.bounds, shifts, flips, self.mixes)


def batch_bounds(items: int, batch_size: int, least: int = 2) -> list[tuple[int, int]]:
    """Consecutive batches over ``items``; a last one of fewer than ``least`` joins the one before.

    A batch of one has no variance for a batch norm to divide by; joining loses no item.

    Example:
        >>> batch_bounds(9, 4)
        [(0, 4), (4, 9)]
    """
    starts = list(range(0, items, batch_size))
    if len(starts) > 1 and items - starts[-1] < least:
        starts.pop()
    return list(zip(starts, [*starts[1:], items], strict=True))


def plan_epoch(config: FitConfig, items: int, size: Sequence[int], epoch: int, processes: int = 1) -> EpochPlan:
    """Draw epoch ``epoch`` (from 0) of ``items`` items with spatial extent ``size``."""
    draw = np.random.default_rng([config.seed, epoch])
    generator = torch.Generator().manual_seed(int(draw.integers(2**62)))
    bounds = batch_bounds(items, config.batch_size, 2 * processes)
    order = torch.randperm(items, generator=generator)
    shifts = flips = None
    if config.augment != "none":
        reach = [max(1, length // 8) for length in size]
        columns = [torch.randint(-r, r + 1, (items,), generator=generator) for r in reach]
        shifts = torch.stack(columns, dim=1)
    if config.augment not in ("none", "shift"):
        flips = torch.rand(items, generator=generator) < 0.5
    return EpochPlan(order, bounds, shifts, flips, [_draw_mix(config, size, draw) for _ in bounds])


def _draw_mix(config: FitConfig, size: Sequence[int], draw: np.random.Generator) -> Mix | None:
    """One batch's share from Beta(alpha, alpha), as mixup or as a cutmix box of that volume."""
    choices = [(name, alpha) for name, alpha in (("mixup", config.mixup), ("cutmix", config.cutmix)) if alpha > 0]
    if not choices:
        return None
    name, alpha = choices[int(draw.integers(len(choices)))]
    share = float(draw.beta(alpha, alpha))
    if name == "mixup":
        return Mix(share, None)
    side = (1 - share) ** (1 / len(size))
    box = []
    for length in size:
        centre, half = int(draw.integers(length)), side * length / 2
        box.append(slice(max(0, round(centre - half)), min(length, round(centre + half))))
    # The box is clipped at the border, so the label's share is counted from what was really replaced.
    replaced = math.prod(s.stop - s.start for s in box) / math.prod(size)
    return Mix(1 - replaced, tuple(box))


def shift(x: Tensor, offsets: Tensor, *, fill: bool = True) -> Tensor:
    """Crop each item of ``x`` after padding it: item i is read from ``offsets[i]`` on.

    Args:
        x: (N, C, \\*spatial), any dtype.
        offsets: int64 (N, axes), within ± the extent.
        fill: pad with zeros; otherwise the border is repeated.
    """
    for axis, column in enumerate(offsets.unbind(1), start=2):
        length = x.shape[axis]
        source = torch.arange(length, device=x.device) + column[:, None]
        nearest = source.clamp(0, length - 1)
        shape = [len(x), *(length if d == axis else 1 for d in range(1, x.dim()))]
        x = x.gather(axis, nearest.view(shape).expand(x.shape))
        if fill:
            x = x * (source == nearest).view(shape)
    return x


def flip(x: Tensor, chosen: Tensor) -> Tensor:
    """Mirror the items of ``x`` (N, C, H, W) where ``chosen`` (N,) is true, left to right."""
    return torch.where(chosen.view(-1, *[1] * (x.dim() - 1)), x.flip(-1), x)


def mix(x: Tensor, how: Mix) -> Tensor:
    """Blend each item with the one at the mirrored place of the batch, or paste that one's box into it."""
    other = x.flip(0)
    if how.box is None:
        return torch.lerp(other, x, how.share)
    index = (slice(None), slice(None), *how.box)
    x = x.clone()
    x[index] = other[index]
    return x
