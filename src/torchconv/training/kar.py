"""Kar: sign updates from the gradient and its running averages, Terminator's optimiser (arXiv 2401.17948).

    p ← p − lr · (sign(g) + Σ_i sign(m_i)),   then  m_i ← β_i·m_i + (1 − β_i)·g

Two averages are the authors' Kar3, one is Kar2. A parameter moves by its averages even where its gradient is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from torchconv._common import check


class Kar(torch.optim.Optimizer):
    """Sign updates from a gradient and its running averages.

    Args:
        params: parameters or groups of them.
        lr: step of a single sign; published 0.001215 for CIFAR-10.
        betas: decay of each average; published (0.5, 0.95), Kar3; one number is Kar2.

    Raises:
        ValueError: ``lr`` negative or a decay outside of [0, 1).

    Example:
        >>> p = torch.nn.Parameter(torch.ones(1))
        >>> p.grad = torch.full((1,), 0.3)
        >>> Kar([p], lr=0.25).step()
        >>> p.data
        tensor([0.7500])

    There is no weight decay; a group's ``weight_decay`` is ignored.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.215e-3,
        betas: float | Sequence[float] = (0.5, 0.95),
    ) -> None:
        decays = (betas,) if isinstance(betas, int | float) else tuple(betas)
        check(lr >= 0, "lr", lr, "must not be negative")
        check(len(decays) > 0 and all(0 <= b < 1 for b in decays), "betas", betas, "must be at least 0 and below 1")
        super().__init__(params, {"lr": lr, "betas": decays})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                for index in range(len(group["betas"])):
                    state.setdefault(f"average_{index}", torch.zeros_like(p))
                averages: list[Tensor] = [state[f"average_{i}"] for i in range(len(group["betas"]))]
                step = p.grad.sign()
                for average in averages:
                    step += average.sign()
                p.add_(step, alpha=-group["lr"])
                for average, beta in zip(averages, group["betas"], strict=True):
                    average.lerp_(p.grad, 1 - beta)
        return loss
