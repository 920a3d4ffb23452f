"""timm's auto-augment policies, image by image on the CPU."""

from __future__ import annotations

import multiprocessing
import os
import random
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from torchconv._common import check, require


class _Images(Dataset[Tensor]):
    """Images with a policy applied; the key (epoch, item) also seeds it, so the number of workers changes nothing."""

    def __init__(self, x: Tensor, transform: Any, seed: int) -> None:
        self.x, self.transform, self.seed = x, transform, seed

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        from PIL import Image

        epoch, item = key
        image = self.x[item]
        whole = image if image.dtype == torch.uint8 else (image * 255).round().to(torch.uint8)
        pixels = whole.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
        python, numpy = random.getstate(), np.random.get_state()
        first, second = np.random.SeedSequence([self.seed, epoch, item]).generate_state(2)
        random.seed(int(first))
        np.random.seed(int(second))
        try:
            changed = np.array(self.transform(Image.fromarray(pixels)))
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
        out = torch.from_numpy(changed).permute(2, 0, 1)
        if len(image) == 1:
            out = out.float().mean(0, keepdim=True).round().to(torch.uint8)
        return out.contiguous() if image.dtype == torch.uint8 else out.to(image.dtype) / 255


class _Batches(Sampler[list[tuple[int, int]]]):
    """The batches of the epoch at hand; replaced between epochs while the workers stay."""

    def __init__(self) -> None:
        self.keys: list[list[tuple[int, int]]] = []

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


class PolicyLoader:
    """Batches of ``x`` with timm's policy ``spec`` applied, prepared by worker processes.

    Args:
        x: (N, C, H, W) on the CPU, C 1 or 3, uint8 or floats from 0 to 1.
        spec: timm's notation, for instance "rand-m9-mstd0.5-inc1".
        mean: per channel, the colour of what moves in from outside.
        seed: of the policy's choices.
    """

    def __init__(self, x: Tensor, spec: str, mean: Sequence[float], seed: int) -> None:
        if x.is_floating_point():
            low, high = x.min().item(), x.max().item()
            check(low >= 0 and high <= 1, "augment", spec, f"needs uint8 or 0 to 1, x runs from {low:g} to {high:g}")
        self._batches = _Batches()
        workers = 0 if multiprocessing.current_process().daemon else min(4, max(1, (os.cpu_count() or 1) // 2))
        self._loader: DataLoader[Tensor] = DataLoader(
            _Images(x, make_policy(spec, mean, min(x.shape[2:])), seed),
            batch_sampler=self._batches,
            num_workers=workers,
            collate_fn=torch.stack,
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # otherwise it would draw from the global one
        )

    def epoch(self, epoch: int, batches: list[list[int]]) -> Iterator[Tensor]:
        """The batches of one epoch, given as lists of items."""
        self._batches.keys = [[(epoch, item) for item in batch] for batch in batches]
        return iter(self._loader)


def make_policy(spec: str, mean: Sequence[float], size: int) -> Any:
    """timm's transform for ``spec``; a spec that timm does not understand is a ``ValueError``."""
    timm = require("timm.data.auto_augment", "models")
    colour = [min(255, max(0, round(255 * m))) for m in mean]
    options = {"translate_const": int(size * 0.45), "img_mean": tuple(colour * 3 if len(colour) == 1 else colour)}
    try:
        if spec.startswith("rand"):
            policy = timm.rand_augment_transform(spec, options)
        elif spec.startswith("augmix"):
            policy = timm.augment_and_mix_transform(spec, {**options, "translate_pct": 0.3})
        else:
            policy = timm.auto_augment_transform(spec, options)
    except (AssertionError, ValueError, KeyError, TypeError) as error:
        remedy = "timm does not understand this policy; an example is 'rand-m9-mstd0.5-inc1'"
        raise ValueError(f"augment={spec!r}: {remedy}") from error
    found = policy.policy if hasattr(policy, "policy") else [policy.ops]
    for op in (op for ops in found for op in ops):
        if op.name.startswith("Posterize"):
            op.level_fn = partial(_posterize_level, op.level_fn)
    return policy


def _posterize_level(level_fn: Any, level: float, hparams: dict[str, Any]) -> tuple[int]:
    """At least one bit: timm's strongest level is none, which Pillow refuses."""
    return (max(1, level_fn(level, hparams)[0]),)
