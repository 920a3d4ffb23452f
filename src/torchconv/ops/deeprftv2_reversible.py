"""Reversible columns: states that are updated invertibly, so that activations need not be stored for the gradient.

Cai et al. 2023, "Reversible Column Networks" (RevCol), arXiv 2212.11696; AdaRevD (arXiv 2406.09135) and DeepRFTv2
(arXiv 2511.21132) connect U-Nets with it. Level i of a column changes its state by

    c_i ← α_i ⊙ c_i + L_i(c_{i−1}, second_i),       c_{−1} = the column's input, second_i = the old c_{i+1} by default

which is undone from the last level to the first by c_i_old = (c_i − L_i(…)) / α_i. Backward, old states are computed
from new ones, and only one level's activations exist at a time: of a column only its states are kept, however deep its
levels are, for about a third more computation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchconv._common import check, check_choice

LEAST = 1e-3
MEMORIES = ("invert", "store")


def keep_away_from_zero(alpha: Tensor, least: float = LEAST) -> Tensor:
    """α with |α| ≥ ``least``, the sign kept (0 stays 0); the gradient passes as if nothing were done.

    Example:
        >>> keep_away_from_zero(torch.tensor([-1e-5, 0.5])).tolist()
        [-0.0010000000474974513, 0.5]
    """
    limited = alpha.sign() * alpha.abs().clamp(min=least)
    return alpha + (limited - alpha).detach()


def _column(
    levels: Sequence[Callable[..., Tensor]],
    alphas: Sequence[Tensor],
    x: Tensor,
    states: Sequence[Tensor],
    seconds: Sequence[Tensor | None],
) -> list[Tensor]:
    found, below = [], x
    for level, alpha, state, second in zip(levels, alphas, states, seconds, strict=True):
        below = alpha * state + level(below, second)
        found.append(below)
    return found


def _next_states(states: Sequence[Tensor]) -> list[Tensor | None]:
    return [*states[1:], None]


def invert_column(
    levels: Sequence[Callable[..., Tensor]],
    alphas: Sequence[Tensor],
    x: Tensor,
    states: Sequence[Tensor],
    seconds: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """The states before :func:`reversible_column`, from those after it.

    Args:
        levels, alphas, x: of the column; α as used, not 0.
        states: after.
        seconds: what was given to the column.

    Reference: arXiv 2212.11696, section 3.
    """
    old: list[Tensor] = []
    later: Tensor | None = None
    for i in reversed(range(len(levels))):
        second = later if seconds is None else seconds[i]
        below = states[i - 1] if i else x
        later = (states[i] - levels[i](below, second)) / alphas[i]
        old.insert(0, later)
    return old


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Any, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        levels, count, given = plan
        alphas, states = tensors[:count], tensors[count : 2 * count]
        seconds: list[Tensor | None] = list(tensors[2 * count : 2 * count + given]) or _next_states(states)
        found = _column(levels, alphas, x, states, seconds)
        ctx.plan = plan
        kind = x.device.type
        ctx.autocast = (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        ctx.save_for_backward(x, *alphas, *tensors[2 * count : 2 * count + given], *found)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        levels, count, given = ctx.plan
        x, *kept = ctx.saved_tensors
        alphas, seconds, new = kept[:count], kept[count : count + given], kept[count + given :]
        kind, enabled, dtype = ctx.autocast
        by_new, by_alphas = list(grads), [torch.zeros_like(a) for a in alphas]
        by_states: list[Tensor] = [torch.zeros_like(c) for c in new]
        by_seconds: list[Any] = [None] * given
        by_parameters: list[list[Any]] = [[] for _ in levels]
        by_x: Tensor | None = None
        old: Tensor | None = None
        for i in reversed(range(count)):
            below = (new[i - 1] if i else x).detach().requires_grad_()
            second = (seconds[i] if given else old) if given or old is not None else None
            if second is not None:
                second = second.detach().requires_grad_()
            parameters = [p for p in levels[i].parameters() if p.requires_grad]
            with torch.enable_grad(), torch.autocast(kind, dtype=dtype, enabled=enabled):
                y = levels[i](below, second)
            sources = [below, *([] if second is None else [second]), *parameters]
            found: list[Any] = list(torch.autograd.grad(y, sources, by_new[i].to(y.dtype), allow_unused=True))
            with torch.no_grad():
                later, old = old, ((new[i] - y) / alphas[i]).to(new[i].dtype)
                by_alphas[i] = (by_new[i] * old).sum_to_size(alphas[i].shape)
                by_states[i] = by_states[i] + by_new[i] * alphas[i]
                by_below = found.pop(0)
                if second is not None:
                    by_second = found.pop(0)
                    if given:
                        by_seconds[i] = by_second
                    elif later is not None and by_second is not None:
                        by_states[i + 1] = by_states[i + 1] + by_second
                by_parameters[i] = found
                if i and by_below is not None:
                    by_new[i - 1] = by_new[i - 1] + by_below
                elif not i:
                    by_x = by_below
        return None, by_x, *by_alphas, *by_states, *by_seconds, *(g for level in by_parameters for g in level)


def reversible_column(
    levels: Sequence[nn.Module],
    alphas: Sequence[Tensor],
    x: Tensor,
    states: Sequence[Tensor],
    seconds: Sequence[Tensor] | None = None,
    memory: str = "invert",
) -> list[Tensor]:
    """Update the states of a column, level by level.

    Args:
        levels: L_i, called as ``level(below, second)``, deterministic: L_i runs again for the gradient.
        alphas: α_i, broadcast against the states; keep them away from 0 (:func:`keep_away_from_zero`).
        x: the column's input.
        states: c_i before.
        seconds: the second argument of every level; None takes the old state of the next level, and None for the last.
        memory: "invert" stores only the new states and computes the old ones backward, with gradients returned to
            autograd as usual (no gradients of gradients); "store" leaves it to autograd. Compilers and exporters get
            "store".

    Returns:
        The new states.

    Raises:
        ValueError: numbers of levels, factors and states differ.

    Example:
        >>> level = lambda below, second: below if second is None else below + second
        >>> half, x = torch.full((2,), 0.5), torch.ones(2)
        >>> new = reversible_column([level, level], [half, half], x, [x, 2 * x], memory="store")
        >>> [c[0].item() for c in new]
        [3.5, 4.5]
        >>> [c[0].item() for c in invert_column([level, level], [half, half], x, new)]
        [1.0, 2.0]

    Reference: arXiv 2212.11696, section 3; arXiv 2511.21132, section 3.
    """
    count = len(levels)
    check_choice("memory", memory, MEMORIES)
    check(len(alphas) == count, "alphas", len(alphas), f"give one for each of {count} levels")
    check(len(states) == count, "states", len(states), f"give one for each of {count} levels")
    check(seconds is None or len(seconds) == count, "seconds", seconds and len(seconds), f"give {count} of them")
    seen_through = torch.compiler.is_compiling() or torch.jit.is_tracing() or not torch.is_grad_enabled()
    if memory == "store" or seen_through:
        return _column(levels, alphas, x, states, _next_states(states) if seconds is None else seconds)
    parameters = [p for level in levels for p in level.parameters() if p.requires_grad]
    plan = (levels, count, 0 if seconds is None else count)
    tensors = (*alphas, *states, *(seconds or ()), *parameters)
    return list(_Reversible.apply(plan, x, *tensors))
