"""Filters as samples of a distribution, in one pass and constant memory: scaling, common basis, histograms, shift.

Filters come as rows, in arrays, tensors, HDF5 data sets or lists of those, and are read in chunks. A chunk is turned on
its side, one contiguous row a tap, so that maxima, products and bins run over long vectors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchconv._common import check, check_positive

Array = NDArray[Any]
CHUNK = 1 << 14  # filters: a chunk of nine float64 rows and its products stay in the cache
FLOOR = 2.0**-23  # density of an empty bin


def chunks(filters: Any, rows: int = CHUNK) -> Iterator[Array]:
    """Filters as (n, taps) arrays of at most ``rows``; whatever has ``shape`` is sliced, anything else iterated."""
    if not hasattr(filters, "shape"):
        check(
            isinstance(filters, Iterable) and not isinstance(filters, Iterator),
            "filters",
            type(filters).__name__,
            "must be an array, a tensor or a list of them: they are read more than once, which an iterator cannot be",
        )
        for part in filters:
            yield from chunks(part, rows)
        return
    check(len(filters.shape) >= 2, "filters", tuple(filters.shape), "must have one filter a row: (n, taps)")
    for start in range(0, filters.shape[0], rows):
        piece = filters[start : start + rows]
        piece = piece.detach().cpu().double().numpy() if hasattr(piece, "detach") else np.asarray(piece)
        yield piece.reshape(len(piece), -1)


def _scaled_columns(rows: Array, keep_zeros: bool = True) -> tuple[Array, int]:
    """(taps, n), every filter divided by its largest magnitude, all-zero ones left or left out; how many of those."""
    columns = np.ascontiguousarray(rows.T, dtype=np.float64)
    peak = np.maximum.reduce(np.abs(columns), axis=0)
    if not np.isfinite(peak).all():
        raise ValueError("filters: hold values that are not finite; leave those layers out")
    zeros = len(peak) - int(np.count_nonzero(peak))
    if zeros and keep_zeros:
        peak[peak == 0] = 1.0
    elif zeros:
        columns, peak = np.ascontiguousarray(columns[:, peak > 0]), peak[peak > 0]
    columns /= peak
    return columns, zeros


def scale(filters: Any) -> Array:
    """Every filter divided by its largest magnitude; all-zero filters stay zero.

    Args:
        filters: (n, taps), or (n, kh, kw).

    Shape:
        (n, taps), float64.

    Example:
        >>> scale(np.array([[1.0, -4.0], [0.0, 0.0]]))
        array([[ 0.25, -1.  ],
               [ 0.  ,  0.  ]])
    """
    return np.concatenate([np.ascontiguousarray(_scaled_columns(c)[0].T) for c in chunks(filters)])


@dataclass(frozen=True)
class Basis:
    """Common coordinates of scaled filters.

    Attributes:
        mean: (taps,) of the scaled filters.
        components: (taps, taps), a row a component, the entry of largest magnitude positive.
        ratio: (taps,) explained-variance ratios, descending.
        count: how many filters it was fitted to.
    """

    mean: Array
    components: Array
    ratio: Array
    count: int

    def coefficients(self, filters: Any) -> Array:
        """(n, taps) coordinates of filters, which are scaled first."""
        return np.concatenate([self._columns(_scaled_columns(c)[0]).T for c in chunks(filters)])

    def _columns(self, scaled: Array) -> Array:
        return self.components @ scaled - (self.components @ self.mean)[:, None]


class Moments:
    """Count, mean and covariance of scaled filters, added up in float64.

    Args:
        keep_zeros: whether all-zero filters count, as published; pruned networks put a spike at the origin.

    Example:
        >>> moments = Moments()
        >>> for _ in range(3):
        ...     moments.update(np.random.default_rng(0).normal(size=(100, 9)))
        >>> moments.count, moments.basis().components.shape
        (300, (9, 9))
    """

    def __init__(self, keep_zeros: bool = True) -> None:
        self.keep_zeros = keep_zeros
        self.count = self.zeros = 0
        self._sum: Array | None = None
        self._outer: Array | None = None

    def update(self, filters: Any) -> None:
        """Add filters."""
        for rows in chunks(filters):
            columns, zeros = _scaled_columns(rows, self.keep_zeros)
            if self._sum is None or self._outer is None:
                self._sum, self._outer = np.zeros(len(columns)), np.zeros((len(columns),) * 2)
            check(len(self._sum) == len(columns), "filters", rows.shape, f"must have {len(self._sum)} taps as before")
            self._sum += columns.sum(1)
            self._outer += columns @ columns.T
            self.count += columns.shape[1]
            self.zeros += zeros

    def merge(self, other: Moments) -> None:
        """Add what another accumulator has seen, of another process say."""
        if other._sum is None or other._outer is None:
            return
        if self._sum is None or self._outer is None:
            self._sum, self._outer = np.zeros_like(other._sum), np.zeros_like(other._outer)
        check(len(self._sum) == len(other._sum), "other", len(other._sum), f"must have {len(self._sum)} taps")
        self._sum += other._sum
        self._outer += other._outer
        self.count += other.count
        self.zeros += other.zeros

    def covariance(self) -> tuple[Array, Array]:
        """Mean and unbiased covariance."""
        if self._sum is None or self._outer is None or self.count < 2:
            raise ValueError(f"filters: {self.count} seen; a basis needs at least 2")
        mean = self._sum / self.count
        return mean, (self._outer - self.count * np.outer(mean, mean)) / (self.count - 1)

    def basis(self) -> Basis:
        """Principal components of what was seen."""
        mean, covariance = self.covariance()
        variance, vectors = np.linalg.eigh(covariance)
        variance = np.maximum(variance[::-1], 0.0)
        components = np.ascontiguousarray(vectors[:, ::-1].T)
        largest = np.abs(components).argmax(1)
        components *= np.sign(components[np.arange(len(components)), largest])[:, None]
        total = variance.sum()
        ratio = variance / total if total > 0 else np.zeros_like(variance)
        return Basis(mean, components, ratio, self.count)


class Extremes:
    """Smallest and largest coefficient of all components."""

    def __init__(self, basis: Basis, keep_zeros: bool = True) -> None:
        self.basis, self.keep_zeros = basis, keep_zeros
        self.low, self.high = np.inf, -np.inf

    def update(self, filters: Any) -> None:
        """Add filters."""
        for rows in chunks(filters):
            found = self.basis._columns(_scaled_columns(rows, self.keep_zeros)[0])
            if found.size:
                self.low, self.high = min(self.low, float(found.min())), max(self.high, float(found.max()))


class Histogram:
    """Counts of every coefficient in equal bins on one range; the last bin is closed, values outside are dropped.

    Args:
        basis: coordinates.
        x_range: smallest and largest value counted, the same for all components.
        bins: how many.
        keep_zeros: whether all-zero filters count.
    """

    def __init__(self, basis: Basis, x_range: tuple[float, float], bins: int = 70, keep_zeros: bool = True) -> None:
        check_positive("bins", bins)
        low, high = float(x_range[0]), float(x_range[1])
        check(bool(np.isfinite([low, high]).all()) and low < high, "x_range", x_range, "must be finite and ascending")
        self.basis, self.x_range, self.bins, self.keep_zeros = basis, (low, high), bins, keep_zeros
        self.counts = np.zeros((len(basis.components), bins), dtype=np.int64)
        self.count = 0

    def update(self, filters: Any) -> None:
        """Add filters."""
        low, high = self.x_range
        for rows in chunks(filters):
            found = self.basis._columns(_scaled_columns(rows, self.keep_zeros)[0])
            self.count += found.shape[1]
            found -= low
            found /= high - low
            found *= self.bins
            # Truncation takes (−1, 0) for bin 0, so that bins are shifted by one; both ends keep what is outside.
            np.clip(found, -1.0, self.bins + 1.0, out=found)
            inside = np.floor(found).astype(np.int64)
            inside += 1
            for k, one in enumerate(inside):
                counted = np.bincount(one, minlength=self.bins + 3)
                counted[self.bins] += np.count_nonzero(found[k] == self.bins)
                self.counts[k] += counted[1 : self.bins + 1]

    def merge(self, other: Histogram) -> None:
        """Add another's counts, of the same basis, range and bins."""
        same = self.x_range == other.x_range and self.counts.shape == other.counts.shape
        same = same and np.array_equal(self.basis.components, other.basis.components)
        check(same, "other", (other.x_range, other.bins), "must have the same basis, range and bins")
        self.counts += other.counts
        self.count += other.count

    def probabilities(self) -> Array:
        """(taps, bins): as density, empty bins set to 2⁻²³, then divided by the sum."""
        return probabilities(self.counts, self.x_range)


def probabilities(counts: Array, x_range: tuple[float, float]) -> Array:
    """Counts in bins (…, bins) as probabilities: density first, empty bins at 2⁻²³, then divided by the sum."""
    counts = np.asarray(counts, dtype=np.float64)
    total = counts.sum(-1, keepdims=True)
    if (total == 0).any():
        raise ValueError(f"x_range={x_range!r}: no coefficient of some component lies inside; widen it")
    density = counts / total / ((x_range[1] - x_range[0]) / counts.shape[-1])
    density[density == 0] = FLOOR
    return np.asarray(density / density.sum(-1, keepdims=True))


def shift(p: Array, q: Array, weights: Array) -> float:
    """Σ_k a_k (KL(p_k, q_k) + KL(q_k, p_k)) of two stacks of marginals (taps, bins), natural logarithm.

    Example:
        >>> p, q = np.array([[0.5, 0.5]]), np.array([[0.9, 0.1]])
        >>> round(shift(p, q, np.array([1.0])), 4), shift(p, p, np.array([1.0]))
        (0.8789, 0.0)
    """
    return float((((p - q) * (np.log(p) - np.log(q))).sum(-1) * weights).sum())
