"""Whether two sets of features come from one distribution: MMD, energy distance, 1-Wasserstein, with permutations."""

from __future__ import annotations

import torch
from torch import Tensor

from torchconv._common import check, check_choice
from torchconv.analysis._cka_kernels import median, squared_distances
from torchconv.analysis.rsa import Permuted, draw_permutations, upper


def _check(x: Tensor, y: Tensor, least: int = 1) -> None:
    for name, value in (("x", x), ("y", y)):
        check(value.dim() == 2, name, tuple(value.shape), "give a matrix (samples, features)")
        check(len(value) >= least, name, tuple(value.shape), f"at least {least} samples are needed")
    check(x.shape[1] == y.shape[1], "y", tuple(y.shape), f"x has {x.shape[1]} features; both need the same")


def pooled_bandwidth(x: Tensor, y: Tensor) -> Tensor:
    """σ²: median squared distance over all pairs of the pooled samples."""
    _check(x, y)
    return median(upper(squared_distances(torch.cat([x, y]))))


def _pooled(x: Tensor, y: Tensor, statistic: str, sigma2: float | Tensor | None) -> Tensor:
    """Similarities of the pooled samples: a Gaussian kernel, or minus the distance."""
    distances = squared_distances(torch.cat([x, y]))
    if statistic == "energy":
        return -torch.where(distances > 0, distances.clamp(min=torch.finfo(x.dtype).tiny).sqrt(), 0)
    width = median(upper(distances)) if sigma2 is None else torch.as_tensor(sigma2)
    check(bool(width > 0), "sigma2", float(width), "must be positive; more than half of the samples may be identical")
    return torch.exp(distances / (-2 * width))


def _gap(similarities: Tensor, members: Tensor, unbiased: bool) -> Tensor:
    """Mean within x + mean within y − 2 · mean between, for every row of membership (B, n + m)."""
    a, b = members, 1 - members
    n, m = int(a[0].sum()), int(b[0].sum())
    ka = a @ similarities
    xx, xy = (ka * a).sum(1), (ka * b).sum(1)
    yy = ((b @ similarities) * b).sum(1)
    if not unbiased:
        return xx / n**2 + yy / m**2 - 2 * xy / (n * m)
    diagonal = similarities.diagonal()
    return (xx - a @ diagonal) / (n * (n - 1)) + (yy - b @ diagonal) / (m * (m - 1)) - 2 * xy / (n * m)


def _members(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([x.new_ones(len(x)), x.new_zeros(len(y))])[None]


def mmd2(x: Tensor, y: Tensor, *, sigma2: float | None = None, unbiased: bool = False) -> Tensor:
    """Squared maximum mean discrepancy with a Gaussian kernel (Gretton et al. 2012).

    Args:
        x: (n, p).
        y: (m, p).
        sigma2: σ² of the kernel; the median over pooled pairs by default.
        unbiased: leave the diagonals out; may then be negative.

    Shape:
        Scalar.

    Example:
        >>> x = torch.randn(9, 2, dtype=torch.float64)
        >>> abs(round(float(mmd2(x, x)), 9))
        0.0
    """
    _check(x, y, 2 if unbiased else 1)
    return _gap(_pooled(x, y, "mmd", sigma2), _members(x, y), unbiased)[0]


def energy_distance(x: Tensor, y: Tensor, *, unbiased: bool = False) -> Tensor:
    """2 E‖x − y‖ − E‖x − x'‖ − E‖y − y'‖ (Székely); scipy's for one feature is the square root.

    Args:
        x: (n, p).
        y: (m, p).
        unbiased: leave pairs of a sample with itself out.

    Shape:
        Scalar.
    """
    _check(x, y, 2 if unbiased else 1)
    return _gap(_pooled(x, y, "energy", None), _members(x, y), unbiased)[0]


def _cumulative(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """For every feature: the gap of the two distribution functions on each interval, and the intervals' lengths."""
    values, order = torch.cat([x, y]).sort(0)
    steps = torch.cat([x.new_full((len(x), 1), 1 / len(x)), x.new_full((len(y), 1), -1 / len(y))])
    return steps[:, 0][order].cumsum(0)[:-1], values.diff(dim=0)


def wasserstein1(x: Tensor, y: Tensor) -> Tensor:
    """1-Wasserstein distance of every feature by itself.

    Args:
        x: (n, p).
        y: (m, p).

    Shape:
        (p,).

    Example:
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> wasserstein1(x, x + 3)
        tensor([3.])
    """
    _check(x, y)
    gap, length = _cumulative(x, y)
    return (gap.abs() * length).sum(0)


def sliced_wasserstein1(x: Tensor, y: Tensor, directions: int = 128, seed: int = 0) -> Tensor:
    """Mean 1-Wasserstein distance over random directions."""
    _check(x, y)
    check(directions > 0, "directions", directions, "must be positive")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(x.shape[1], directions, generator=generator, dtype=torch.float64).to(x)
    drawn = drawn / drawn.norm(dim=0)
    return wasserstein1(x @ drawn, y @ drawn).mean()


def energy_per_feature(x: Tensor, y: Tensor) -> Tensor:
    """Energy distance of every feature by itself in its square-root form, (p,)."""
    _check(x, y)
    gap, length = _cumulative(x, y)
    return (2 * (gap.square() * length).sum(0)).sqrt()


def two_sample_test(
    x: Tensor,
    y: Tensor,
    statistic: str = "mmd",
    permutations: int | Tensor = 999,
    *,
    seed: int = 0,
    sigma2: float | None = None,
    unbiased: bool = False,
) -> Permuted:
    """Whether the samples differ in distribution: the statistic against that of shuffled memberships.

    All permutations together are one product of matrices, B × (n + m) by (n + m) × (n + m).

    Args:
        x: (n, p).
        y: (m, p).
        statistic: "mmd" or "energy".
        permutations: how many, or (B, n + m) indices into x followed by y, of which the first n count as x.
        seed: of the drawn permutations.
        sigma2: of "mmd".
        unbiased: leave the diagonals out.

    Returns:
        The statistic, its null values and p.
    """
    check_choice("statistic", statistic, ("mmd", "energy"))
    _check(x, y, 2 if unbiased else 1)
    total = len(x) + len(y)
    drawn = draw_permutations(permutations, total, seed) if isinstance(permutations, int) else permutations
    check(drawn.dim() == 2 and drawn.shape[1] == total, "permutations", tuple(drawn.shape), f"must be (B, {total})")
    similarities = _pooled(x, y, statistic, sigma2)
    members = x.new_zeros(len(drawn), total).scatter_(1, drawn[:, : len(x)].to(x.device), 1)
    return Permuted(_gap(similarities, _members(x, y), unbiased)[0], _gap(similarities, members, unbiased))
