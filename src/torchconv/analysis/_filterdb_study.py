"""A study: groups of filters in one basis, and how far their distributions are from each other."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from torchconv._common import check
from torchconv.analysis._filterdb_stream import Array, Basis, Extremes, Histogram, Moments, shift

ENOUGH = 3000  # filters a group; samples of one law differ by 0.06 at that size, by 1.1 at 300


@dataclass(frozen=True)
class Study:
    """What was found; G groups, K taps.

    Attributes:
        names: of the groups.
        sizes: filters of each group that were counted.
        zeros: all-zero filters among those offered.
        basis: common coordinates.
        x_range: range of all histograms.
        weights: (K,) what each component counts in the shift.
        counts: (G, K, bins) filters.
        histograms: (G, K, bins) probabilities.
        matrix: (G, G) shift D, symmetric with zero diagonal.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    zeros: int
    basis: Basis
    x_range: tuple[float, float]
    weights: Array
    counts: Array
    histograms: Array
    matrix: Array

    @property
    def rank(self) -> Array:
        """Groups in ascending order of their mean shift to all."""
        return np.argsort(self.matrix.mean(0), kind="stable")

    @property
    def small(self) -> tuple[str, ...]:
        """Groups of fewer than 3,000 filters, whose shift is mostly that of a small sample."""
        return tuple(n for n, size in zip(self.names, self.sizes, strict=True) if size < ENOUGH)

    def between(self, a: str, b: str) -> float:
        """D of two groups by name."""
        for name in (a, b):
            check(name in self.names, "name", name, f"must be one of {', '.join(self.names)}")
        return float(self.matrix[self.names.index(a), self.names.index(b)])


def study(
    groups: Mapping[str, Any],
    *,
    basis: Basis | None = None,
    x_range: tuple[float, float] | None = None,
    weights: Sequence[float] | None = None,
    bins: int = 70,
    keep_zeros: bool = True,
    warn: bool = True,
) -> Study:
    """Scale all filters, find the common basis, count coefficients in bins and compare the groups.

    Filters are read in chunks, two or three times, and never held: memory does not depend on how many there are.

    Args:
        groups: name → filters (n, taps): array, tensor, HDF5 data set, or a list of those; from a network through
            ``Database.groups`` or ``layers``.
        basis: of an earlier study, so that results can be compared with it; that of all groups by default.
        x_range: of the histograms; smallest and largest coefficient by default, which makes the result depend on
            which groups take part. (-3, 3) holds all coefficients of 3 × 3 filters but those far out.
        weights: of the components; the explained-variance ratios by default. [1/9] * 9 is the medical study's.
        bins: of the histograms.
        keep_zeros: whether all-zero filters count, as published; those of pruned networks dominate the shift.
        warn: warn about groups of fewer than 3,000 filters.

    Raises:
        ValueError: no group, an empty one, filters of different sizes, or values that are not finite.

    Example:
        >>> draw = np.random.default_rng(0).normal
        >>> found = study({"a": draw(size=(4000, 9)), "b": draw(size=(4000, 9)).cumsum(1)})
        >>> found.between("a", "b") > 0.1, found.between("a", "a")
        (True, 0.0)
    """
    check(len(groups) > 0, "groups", dict(groups), "must name at least one group of filters")
    zeros, own = 0, []
    for name, filters in groups.items():
        moments = Moments(keep_zeros)
        moments.update(filters)
        if moments.count == 0:
            raise ValueError(f"groups: {name!r} holds no filters" + ("" if keep_zeros else " that are not zero"))
        zeros += moments.zeros
        own.append(moments)
    if basis is None:
        whole = Moments(keep_zeros)
        for moments in own:
            whole.merge(moments)
        basis = whole.basis()
    if x_range is None:
        extremes = Extremes(basis, keep_zeros)
        for filters in groups.values():
            extremes.update(filters)
        x_range = (extremes.low, extremes.high)
        check(extremes.low < extremes.high, "x_range", x_range, "all coefficients are equal; give a range")
    taps = len(basis.components)
    a = basis.ratio if weights is None else np.asarray(list(weights), dtype=np.float64)
    check(a.shape == (taps,) and bool((a >= 0).all()), "weights", weights, f"must be {taps} numbers >= 0")
    found = []
    for filters in groups.values():
        histogram = Histogram(basis, x_range, bins, keep_zeros)
        histogram.update(filters)
        found.append(histogram)
    result = Study(
        names=tuple(groups),
        sizes=tuple(h.count for h in found),
        zeros=zeros,
        basis=basis,
        x_range=found[0].x_range,
        weights=a,
        counts=np.stack([h.counts for h in found]),
        histograms=(h := np.stack([f.probabilities() for f in found])),
        matrix=shift_matrix(h, a),
    )
    if warn and result.small:
        names = ", ".join(result.small)
        warnings.warn(f"fewer than {ENOUGH} filters in {names}: much of their shift is sampling noise", stacklevel=2)
    return result


def shift_matrix(histograms: Array | Iterable[Array], weights: Array) -> Array:
    """(G, G) shift between stacks of marginals (G, taps, bins)."""
    stacks = list(histograms)
    matrix = np.zeros((len(stacks), len(stacks)))
    for i, p in enumerate(stacks):
        for j in range(i):
            matrix[i, j] = matrix[j, i] = shift(p, stacks[j], weights)
    return matrix
