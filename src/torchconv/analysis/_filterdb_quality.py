"""Quality of one layer's filters: sparsity, entropy of the variance, orthogonality, norms, and what they say."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from torchconv._common import check

_BLOCK = 1024  # output filters whose products are held at once


def rows(weight: Tensor) -> Tensor:
    """(O, I, *kernel) as filters, one a row: (O·I, taps), O outermost."""
    check(weight.dim() >= 3, "weight", tuple(weight.shape), "must be a convolution's: (out, in, *kernel)")
    check(weight.is_floating_point(), "weight", weight.dtype, "must be floating point")
    return weight.reshape(weight.shape[0] * weight.shape[1], -1)


def sparse_mask(weight: Tensor, eps: float = 0.01, *, inclusive: bool = False) -> Tensor:
    """(O·I,) bool: filters whose largest magnitude is below ``eps`` times the layer's; all of an all-zero layer.

    Args:
        weight: (O, I, *kernel).
        eps: share of the layer's largest magnitude.
        inclusive: "at most" instead of "below", as the study of robust networks has it.
    """
    check(eps >= 0, "eps", eps, "must be >= 0")
    peaks = rows(weight.detach()).abs().amax(1)
    largest = peaks.max() if peaks.numel() else peaks.sum()
    threshold = eps * torch.where(largest > 0, largest, torch.ones_like(largest))
    return peaks <= threshold if inclusive else (peaks < threshold) | (largest == 0)


def sparsity(weight: Tensor, eps: float = 0.01, *, inclusive: bool = False) -> float:
    """Share of sparse filters, 0 to 1.

    Example:
        >>> weight = torch.ones(2, 3, 3, 3)
        >>> weight[0] = 0
        >>> sparsity(weight)
        0.5
    """
    return float(sparse_mask(weight, eps, inclusive=inclusive).double().mean())


def variance_ratio(filters: Tensor) -> Tensor:
    """Shares of variance along the principal directions of unscaled filters, descending; differentiable.

    Args:
        filters: (n, taps); a layer's weight through ``weight.reshape(-1, taps)``.

    Shape:
        (min(n, taps),) float64, sum 1; zeros when all filters are alike.
    """
    check(filters.dim() == 2, "filters", tuple(filters.shape), "must be (n, taps)")
    filters = filters.double()
    centred = filters - filters.mean(0)
    # Squares of the singular values are the eigenvalues of the smaller product: 9 × 9 however many filters.
    product = centred.T @ centred if centred.shape[0] >= centred.shape[1] else centred @ centred.T
    spectrum = torch.linalg.eigvalsh(product).flip(0).clamp(min=0)
    total = spectrum.sum()
    # Alike filters leave the rounding of their mean, which is no variance.
    if float(total.detach()) <= filters.numel() * (2.0**-52 * float(filters.detach().abs().max())) ** 2:
        return spectrum * 0.0
    return spectrum / total


def variance_entropy(filters: Tensor) -> Tensor:
    """−Σ v log10 v of the shares of variance: 0 for one repeated pattern, log10(taps) for noise; differentiable.

    Example:
        >>> noise = torch.randn(20000, 9, generator=torch.Generator().manual_seed(0))
        >>> round(float(variance_entropy(noise)), 2), float(variance_entropy(torch.ones(10, 9)))
        (0.95, 0.0)
    """
    ratio = variance_ratio(filters)
    present = ratio[ratio > 0]  # 0 log 0 = 0, without its infinite slope
    return torch.special.entr(present).sum() / math.log(10)


def entropy_threshold(n: int) -> float:
    """T_H(n): the lowest entropy expected of n random 3 × 3 filters, a fitted sigmoid; negative below n = 3.

    Example:
        >>> round(entropy_threshold(8192), 4)
        0.9512
    """
    if n < 1:
        return float("nan")
    return 1.2618047 / (1 + math.exp(-0.88767525 * (math.log2(n) - 2.30436435))) - 0.31050834


@lru_cache(maxsize=256)
def random_entropy(n: int, taps: int) -> float:
    """The lowest entropy of 16 random normal layers of n filters: what T_H(n) is for 3 × 3, for any size.

    Beyond 4,096 filters the value of 4,096 is returned, which is within about a hundredth of the limit log10(taps).
    """
    generator = torch.Generator().manual_seed(0)
    n = min(n, 4096)
    draws = (torch.randn(n, taps, generator=generator, dtype=torch.float64) for _ in range(16))
    return min(float(variance_entropy(d)) for d in draws)


def orthogonality(weight: Tensor) -> float:
    """1 − mean |u_o · u_p − δ_op| of the normalised output filters: 1 orthogonal, 0 all parallel; NaN for one filter.

    The products are taken in blocks, so that memory does not grow with the square of the outputs. A zero filter
    counts through its diagonal entry, as published.

    Args:
        weight: (O, I, *kernel).
    """
    flat = weight.detach().reshape(weight.shape[0], -1)
    flat = flat if flat.dtype == torch.float64 else flat.float()
    count = len(flat)
    if count < 2:
        return float("nan")
    # norms are in float64, since products of rows of many entries are what the metric is made of
    length = torch.linalg.vector_norm(flat, dim=1, keepdim=True, dtype=torch.float64)
    unit = (flat / torch.where(length > 0, length, torch.ones_like(length))).to(flat.dtype)
    total = 0.0
    for start in range(0, count, _BLOCK):
        block = unit[start : start + _BLOCK]
        here = block @ block.T
        here.diagonal().sub_(1.0)
        total += float(here.abs().sum(dtype=torch.float64))
        for other in range(start + _BLOCK, count, _BLOCK):  # symmetric: the other half is the same
            total += 2 * float((block @ unit[other : other + _BLOCK].T).abs().sum(dtype=torch.float64))
    return 1.0 - total / (count * (count - 1))


@dataclass(frozen=True)
class LayerQuality:
    """Metrics of a layer, under the names of the authors' package.

    Attributes:
        n: number of filters, O · I.
        taps: numbers in a filter.
        sparsity: share of filters below ``eps`` of the layer's largest magnitude.
        variance_entropy: H of all filters, unscaled.
        variance_entropy_norm: H / T_H(n).
        variance_entropy_clean: H of the filters that are not sparse; NaN when all are.
        variance_entropy_clean_norm: that over T_H of their number.
        orthogonality: of the output filters; NaN for a single one.
        norm_l2: of all weights; ``norm_l1`` likewise.
        norm_l2_norm: after subtracting the mean and dividing by the deviation; ``norm_l1_norm`` likewise.
    """

    n: int
    taps: int
    sparsity: float
    variance_entropy: float
    variance_entropy_norm: float
    variance_entropy_clean: float
    variance_entropy_clean_norm: float
    orthogonality: float
    norm_l2: float
    norm_l1: float
    norm_l2_norm: float
    norm_l1_norm: float


def _over_threshold(entropy: float, n: int, min_filters: int) -> float:
    return entropy / entropy_threshold(n) if n >= min_filters else float("nan")


def quality(weight: Tensor, eps: float = 0.01, min_filters: int = 9) -> LayerQuality:
    """All metrics of a layer.

    Args:
        weight: (O, I, *kernel), of any kernel size; depthwise layers have I = 1.
        eps: of the sparsity and of the clean entropies.
        min_filters: below so many filters the entropies over T_H are NaN: T_H means nothing there. 1 gives the
            published numbers.

    Raises:
        ValueError: not a convolution's weight, or values that are not finite.

    Example:
        >>> found = quality(torch.randn(64, 64, 3, 3, generator=torch.Generator().manual_seed(0)))
        >>> found.n, found.sparsity, found.variance_entropy_norm > 0.999
        (4096, 0.0, True)
    """
    with torch.no_grad():
        filters = rows(weight.detach())
        check(filters.numel() > 0, "weight", tuple(weight.shape), "must not be empty")
        if not torch.isfinite(filters).all():
            raise ValueError("weight: holds values that are not finite; leave this layer out")
        if filters.dtype in (torch.float16, torch.bfloat16):
            filters, weight = filters.float(), weight.float()
        sparse = sparse_mask(weight, eps)
        entropy = float(variance_entropy(filters))
        clean = filters[~sparse]
        clean_entropy = entropy  # the same filters, where none is sparse
        if len(clean) < len(filters):
            clean_entropy = float(variance_entropy(clean)) if len(clean) else float("nan")
        values = filters.double().flatten()
        normal = (values - values.mean()) / values.std() if values.numel() > 1 else values * float("nan")
        return LayerQuality(
            n=len(filters),
            taps=filters.shape[1],
            sparsity=float(sparse.double().mean()),
            variance_entropy=entropy,
            variance_entropy_norm=_over_threshold(entropy, len(filters), min_filters),
            variance_entropy_clean=clean_entropy,
            variance_entropy_clean_norm=_over_threshold(clean_entropy, len(clean), max(min_filters, 1)),
            orthogonality=orthogonality(weight),
            norm_l2=float(values.norm()),
            norm_l1=float(values.abs().sum()),
            norm_l2_norm=float(normal.norm()),
            norm_l1_norm=float(normal.abs().sum()),
        )


@dataclass(frozen=True)
class Thresholds:
    """Where a layer is called degenerate. The paper has the metrics and T_H but no further cut-offs: these are ours.

    Attributes:
        sparse: a layer with more sparse filters than this share is "sparse".
        low: entropy below this share of the random level is "low diversity".
        random: entropy at or above this share of it is "random".
        min_filters: with fewer filters only sparsity is judged.
    """

    sparse: float = 0.5
    low: float = 0.5
    random: float = 1.0
    min_filters: int = 9


DEGENERATE = ("sparse", "random", "low diversity")


def verdict(found: LayerQuality, thresholds: Thresholds | None = None) -> str:
    """ "sparse", "random", "low diversity", "ok", or "too few filters" to say.

    The random level is T_H(n) for nine taps, the lowest entropy of 16 simulated layers for other sizes.
    """
    limits = thresholds or Thresholds()
    if found.sparsity > limits.sparse:
        return "sparse"
    # Filters that vary in fewer directions than they have taps are few, not degenerate.
    if found.n < max(limits.min_filters, found.taps):
        return "too few filters"
    level = entropy_threshold(found.n) if found.taps == 9 else random_entropy(found.n, found.taps)
    share = found.variance_entropy / level
    if share >= limits.random:
        return "random"
    return "low diversity" if share < limits.low else "ok"
