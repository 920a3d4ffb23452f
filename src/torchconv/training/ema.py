"""An exponential moving average of a model's weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

_KINDS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Ema:
    """A frozen copy of ``model`` whose weights follow it: m ← d·m + (1 − d)·w, d = min(decay, (1+t)/(10+t)).

    The warm-up of d keeps the first steps from weighing as much as the initial weights would have them weigh.
    Floating-point buffers that are finite and saved (batch-norm statistics) are averaged too, all others copied.

    Args:
        model: the model that is trained, on its device.
        decay: above 0, below 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._pairs: list[tuple[list[Tensor], list[Tensor]]] = []
        self._copies: list[tuple[Tensor, Tensor]] = []
        saved = set(model.state_dict())
        averaged: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        mine = [*self.model.named_parameters(), *self.model.named_buffers()]
        theirs = [*model.named_parameters(), *model.named_buffers()]
        for (name, target), (_, source) in zip(mine, theirs, strict=True):
            follows = isinstance(source, nn.Parameter) or (name in saved and bool(source.isfinite().all()))
            if follows and source.is_floating_point() and source.dtype in _KINDS:
                lists = averaged.setdefault(source.dtype, ([], []))
                lists[0].append(target)
                lists[1].append(source)
            else:
                self._copies.append((target, source))
        self._pairs = list(averaged.values())

    @torch.no_grad()
    def update(self) -> None:
        """Follow the model by one step."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        for targets, sources in self._pairs:
            torch._foreach_lerp_(targets, sources, 1 - decay)
        for target, source in self._copies:
            target.copy_(source)
