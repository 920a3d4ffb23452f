"""Densities of the weighted convolution: profiles, their products, and the search for good values.

See :mod:`torchconv.ops.weightedconv` for the method and its layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchconv._common import check, check_choice, check_positive, require
from torchconv.ops._common import check_odd

Density = Sequence[float] | Sequence[Sequence[float] | None]

# Starting points found by the authors, outermost tap first.
_PLANE = {3: (0.7,), 5: (0.2, 0.8), 7: (0.25, 0.15, 0.55)}
_VOLUME = {3: (0.8,), 5: (0.1, 0.7)}


def suggested_density(kernel_size: int, ndim: int = 2) -> tuple[float, ...]:
    """The authors' starting density for a kernel size; beyond 7 their profile for 7, stretched.

    Example:
        >>> suggested_density(5), suggested_density(1)
        ((0.2, 0.8), ())
    """
    check_odd((kernel_size,), "a density")
    half = kernel_size // 2
    if half == 0:
        return ()
    table = {**_PLANE, **_VOLUME} if ndim == 3 else _PLANE
    if kernel_size in table:
        return table[kernel_size]
    knots = (1.0, *reversed(_PLANE[7]))  # at distances 0, 1/3, 2/3 and 1 of the radius
    density = []
    for step in range(half, 0, -1):
        place = 3 * step / half
        low = min(int(place), 2)
        density.append(knots[low] + (place - low) * (knots[low + 1] - knots[low]))
    return tuple(density)


def density_profile(density: Tensor) -> Tensor:
    """The symmetric profile (d_1, …, d_h, 1, d_h, …, d_1) of the h values ``density``, outermost first.

    Example:
        >>> density_profile(torch.tensor([0.25, 0.5]))
        tensor([0.2500, 0.5000, 1.0000, 0.5000, 0.2500])
    """
    return torch.cat([density, density.new_ones(1), density.flip(0)])


def density_kernel(density: Tensor | Sequence[Tensor], ndim: int | None = None) -> Tensor:
    """Φ, the product of the axes' profiles.

    Args:
        density: one tensor (h,) for all ``ndim`` axes, or one tensor an axis.
        ndim: number of axes, needed with one tensor.

    Returns:
        (2h_1 + 1, …, 2h_n + 1).

    Raises:
        ValueError: ``ndim`` is missing, or the axes are not tensors.
    """
    if isinstance(density, Tensor):
        if ndim is None:
            raise ValueError("ndim=None: give the number of axes, or one density an axis")
        density = [density] * ndim
    tensors = len(density) > 0 and all(isinstance(d, Tensor) for d in density)
    check(tensors, "density", density, "give one tensor, or one tensor an axis")
    phi = density_profile(density[0])
    for axis in density[1:]:
        phi = phi.unsqueeze(-1) * density_profile(axis)
    return phi


def per_axis(density: Density, kernel_size: tuple[int, ...], argument: str) -> list[tuple[float, ...]]:
    """One tuple of numbers an axis; a flat list serves all axes of an isotropic kernel."""
    halves = [k // 2 for k in kernel_size]
    given = _plain(density)
    numbers = [isinstance(d, int | float) for d in given] if isinstance(given, list) else [False]
    right = isinstance(given, list) and (all(numbers) or not any(numbers))
    check(right, argument, density, "a list of numbers, or one list (or None) an axis")
    if all(numbers):
        one = f"the kernel {kernel_size} is not isotropic: give one list an axis"
        check(len(set(halves)) == 1, argument, density, one)
        given = [given] * len(kernel_size)
    check(len(given) == len(kernel_size), argument, density, f"give one list for each of {len(kernel_size)} axes")
    needed = f"needs (k − 1)/2 numbers an axis, {halves} for the kernel {kernel_size}"
    axes = []
    for axis, half in zip(given, halves, strict=True):
        values = [1.0] * half if axis is None else axis
        real = isinstance(values, list) and all(isinstance(v, int | float) and math.isfinite(v) for v in values)
        check(real and len(values) == half, argument, density, needed)
        axes.append(tuple(float(v) for v in values))
    return axes


def _plain(value: Any) -> Any:
    """Lists of numbers for sequences, tensors and arrays."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class DensitySearch:
    """The best density found, its objective, and everything that was evaluated, in order."""

    density: tuple[float, ...]
    value: float
    evaluations: tuple[tuple[tuple[float, ...], float], ...]


class _SpentError(Exception):
    """The budget of evaluations is used up."""


class _Evaluator:
    """Counts evaluations, answers known points from memory, and stops the search when the budget is used up."""

    def __init__(self, train_eval: Callable[[tuple[float, ...]], float], budget: int) -> None:
        self.train_eval, self.budget = train_eval, budget
        self.known: dict[tuple[float, ...], float] = {}

    def __call__(self, point: Sequence[float]) -> float:
        key = tuple(float(v) for v in point)
        if key not in self.known:
            if len(self.known) >= self.budget:
                raise _SpentError
            value = float(self.train_eval(key))
            self.known[key] = value if math.isfinite(value) else math.inf
        return self.known[key]


def _probe(evaluate: _Evaluator, bounds: Sequence[tuple[float, float]], start: Sequence[float]) -> None:
    point = tuple(start)
    best, moved = evaluate(point), True
    while moved:
        moved = False
        for axis, (low, high) in enumerate(bounds):
            for factor in (0.9, 1.1):
                while True:
                    stepped = min(max(point[axis] * factor, low), high)
                    trial = (*point[:axis], stepped, *point[axis + 1 :])
                    if trial == point or (value := evaluate(trial)) >= best:
                        break
                    point, best, moved = trial, value, True


def search_density(
    train_eval: Callable[[tuple[float, ...]], float],
    bounds: Sequence[tuple[float, float]],
    method: str = "direct",
    budget: int = 25,
    start: Sequence[float] | None = None,
) -> DensitySearch:
    """Look for the density with the least validation loss, without derivatives.

    Args:
        train_eval: trains (briefly) with a density and returns the validation loss. It must use the same initial
            weights, data order and noise every time, or the search follows chance. A value that is not finite
            counts as the worst.
        bounds: (low, high) of every number, outermost tap first. The authors search [0.5, 1.5] for k = 3,
            [0.05, 1] × [0.5, 1.5] for 5 and [0.05, 0.5] × [0.15, 1] × [0.25, 1.5] for 7.
        method: "direct", the locally biased DIRECT algorithm over the box (needs scipy); "probe", a walk that changes
            one number at a time by a factor of 0.9 or 1.1 as long as that helps.
        budget: the most evaluations, ≥ 1.
        start: where "probe" begins; the middle of the box by default.

    Raises:
        ValueError: an argument is out of range.
        ImportError: "direct" without scipy.

    Example:
        >>> found = search_density(lambda d: (d[0] - 0.6) ** 2, [(0.5, 1.5)], "probe", 30, start=[1.0])
        >>> len(found.evaluations), round(found.density[0], 2)
        (8, 0.59)

    Reference: arXiv 2505.24527; DIRECT-L: Gablonsky & Kelley 2001.
    """
    check_choice("method", method, ("direct", "probe"))
    check_positive("budget", budget)
    ordered = len(bounds) > 0 and all(len(b) == 2 and math.isfinite(b[0]) and b[0] < b[1] < math.inf for b in bounds)
    check(ordered, "bounds", bounds, "one (low, high) with low < high for every number of the density")
    evaluate = _Evaluator(train_eval, budget)
    try:
        if method == "direct":
            check(start is None, "start", start, "only for method='probe'")
            optimize = require("scipy.optimize", "compare")
            optimize.direct(evaluate, list(bounds), locally_biased=True, maxfun=10 * budget, vol_tol=0.0)
        else:
            middle = [(low + high) / 2 for low, high in bounds] if start is None else list(start)
            inside = len(middle) == len(bounds) and all(a <= v <= b for v, (a, b) in zip(middle, bounds, strict=True))
            check(inside, "start", start, "one number within every pair of bounds")
            _probe(evaluate, bounds, middle)
    except _SpentError:
        pass
    density = min(evaluate.known, key=lambda point: evaluate.known[point])
    return DensitySearch(density, evaluate.known[density], tuple(evaluate.known.items()))
