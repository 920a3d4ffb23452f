"""Kernels between stimuli, the independence criterion HSIC and the alignments made of them (arXiv 2511.02404).

Rows of a feature matrix are stimuli. Everything is differentiable, and keeps the type of its inputs; the differences of
large numbers want float64.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from torchconv._common import check, check_choice
from torchconv.catalog.parts import part

KERNELS = ("linear", "rbf")
ESTIMATORS = ("unbiased", "biased")


def check_pair(x: Tensor, y: Tensor, least: int = 2) -> None:
    """Two matrices of features with as many rows."""
    for name, value in (("x", x), ("y", y)):
        check(value.dim() == 2, name, tuple(value.shape), "give a matrix (stimuli, features); reduce maps first")
        check(value.is_floating_point(), name, value.dtype, "give floating-point features")
    check(len(x) == len(y), "y", tuple(y.shape), f"x has {len(x)} rows; give the same stimuli to both")
    check(len(x) >= least, "x", tuple(x.shape), f"at least {least} stimuli are needed")


def squared_distances(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Squared Euclidean distances between rows, by one product of matrices; rounding counts as zero.

    Args:
        x: (n, p).
        y: (m, p); x by default.

    Shape:
        (n, m), never negative; identical rows are exactly 0 apart.
    """
    middle = x.detach().mean(0)
    a = x - middle
    b = a if y is None else y - middle
    size = a.square().sum(1)[:, None] + b.square().sum(1)[None]
    distances = size - 2 * a @ b.T
    rounding = 8 * torch.finfo(x.dtype).eps * size.detach()
    return torch.where(distances > rounding, distances, distances.new_zeros(()))


def median(values: Tensor) -> Tensor:
    """The median, the mean of the middle two for an even count; differentiable."""
    ordered = values.flatten().sort().values
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def rbf_bandwidth(x: Tensor, scale: float | None = None) -> Tensor:
    """σ of the Gaussian kernel: σ² is the median of the squared distances that are not zero.

    Args:
        x: (n, p).
        scale: c; with it σ = c · median of the distances that are not zero (Kornblith et al. 2019).

    Example:
        >>> float(rbf_bandwidth(torch.tensor([[0.0], [1.0], [3.0]])))
        2.0
    """
    return _bandwidth(squared_distances(x), scale)


def _bandwidth(distances: Tensor, scale: float | None) -> Tensor:
    apart = distances[distances > 0]
    if not len(apart):
        raise ValueError(f"x of {len(distances)} stimuli: all are identical, so there is no bandwidth; give sigma=")
    return median(apart).sqrt() if scale is None else scale * median(apart.sqrt())


def gram(x: Tensor, kernel: str = "linear", sigma: float | Tensor | None = None, scale: float | None = None) -> Tensor:
    """Similarities of all stimuli: K = X Xᵀ or exp(−‖x_i − x_j‖²/(2σ²)).

    Args:
        x: (n, p).
        kernel: "linear" or "rbf".
        sigma: σ of "rbf"; by default :func:`rbf_bandwidth`.
        scale: σ as a multiple of the median distance instead.

    Shape:
        (n, n).

    Raises:
        ValueError: unknown kernel, a bandwidth for the linear one, or both bandwidths.
    """
    check_choice("kernel", kernel, KERNELS)
    check(sigma is None or scale is None, "scale", scale, "give sigma or scale, not both")
    if kernel == "linear":
        check(sigma is None and scale is None, "sigma", sigma or scale, "the linear kernel has no bandwidth")
        return x @ x.T
    for name, value in (("sigma", sigma), ("scale", scale)):
        check(value is None or float(value) > 0, name, value, "must be positive")
    distances = squared_distances(x)
    width = _bandwidth(distances, scale) if sigma is None else sigma
    return torch.exp(distances / (-2 * width**2))


def centre(k: Tensor, estimator: str = "biased") -> Tensor:
    """H K H with H = I − 11ᵀ/n, or for "unbiased" its counterpart without the diagonal (U-centring).

    HSIC is the sum of products of two matrices so centred: one matrix product makes the table of many layers.
    """
    check_choice("estimator", estimator, ESTIMATORS)
    n = k.shape[-1]
    if estimator == "biased":
        k = k - k.mean(-1, keepdim=True)
        return k - k.mean(-2, keepdim=True)
    diagonal = torch.eye(n, dtype=torch.bool, device=k.device)
    k = k.masked_fill(diagonal, 0)
    rows = k.sum(-1, keepdim=True) / (n - 2)
    columns = k.sum(-2, keepdim=True) / (n - 2)
    total = k.sum((-1, -2), keepdim=True) / ((n - 1) * (n - 2))
    return (k - rows - columns + total).masked_fill(diagonal, 0)


def hsic(k: Tensor, l: Tensor, estimator: str = "unbiased") -> Tensor:  # noqa: E741 (K and L are the literature's)
    """Dependence between two similarity matrices.

    Args:
        k, l: (…, n, n).
        estimator: "biased": tr(KHLH)/(n − 1)²; "unbiased" (Song et al. 2012), which needs four stimuli.

    Shape:
        (…).

    Raises:
        ValueError: shapes that differ, or too few stimuli.

    Example:
        >>> x = torch.eye(5, dtype=torch.float64)
        >>> round(float(hsic(x, x, "biased")), 6)
        0.25
    """
    n = k.shape[-1]
    check(k.shape[-2:] == (n, n) and l.shape[-2:] == (n, n), "l", tuple(l.shape), "give square matrices of one size")
    least = 4 if estimator == "unbiased" else 2
    check(n >= least, "k", tuple(k.shape), f"the {estimator} estimator needs at least {least} stimuli")
    scale = n * (n - 3) if estimator == "unbiased" else (n - 1) ** 2
    return (centre(k, estimator) * centre(l, estimator)).sum((-1, -2)) / scale


def ratio(cross: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """cross/√(first · second), NaN where a self-HSIC is not positive, with a warning."""
    good = (first > 0) & (second > 0)
    if not bool(good.all()):
        warnings.warn("HSIC of features with themselves is not positive: too few or constant stimuli", stacklevel=3)
    product = torch.where(good, first, 1).sqrt() * torch.where(good, second, 1).sqrt()
    return torch.where(good, cross / product, math.nan)


@part(
    "cka",
    paper="cka",
    kind="analysis",
    keywords="centred kernel alignment centered CKA HSIC similarity of representations layers linear RBF unbiased",
)
def cka(
    x: Tensor,
    y: Tensor,
    kernel: str = "linear",
    estimator: str = "unbiased",
    *,
    sigma: float | None = None,
    scale: float | None = None,
) -> Tensor:
    """Centred kernel alignment: HSIC(K, L)/√(HSIC(K, K) · HSIC(L, L)).

    1 for features equal up to rotation, shift and one scale. The biased estimate lies in [0, 1], and is near 1 for
    anything with more features than stimuli; the unbiased one has mean 0 for independent features, may be negative.
    1 − cka serves as a loss. The linear kernel takes the cheaper of two forms: n²(p + q) with similarities of stimuli,
    n(p + q)² with those of features.

    Args:
        x: (n, p), n stimuli.
        y: (n, q), the same stimuli.
        kernel: "linear" or "rbf".
        estimator: "unbiased" or "biased".
        sigma: bandwidth of "rbf" for both sides; by default the median rule for each side.
        scale: bandwidth as a multiple of the median distance instead.

    Shape:
        Scalar.

    Raises:
        ValueError: unknown choices, shapes that do not fit, fewer than four stimuli (two when biased).

    Example:
        >>> x = torch.randn(20, 8, dtype=torch.float64)
        >>> round(float(cka(x, 3 * x.flip(1) + 1)), 6)
        1.0

    Reference:
        Kornblith et al., arXiv 1905.00414; Song et al. 2012; used in arXiv 2511.02404.
    """
    check_choice("kernel", kernel, KERNELS)
    check_choice("estimator", estimator, ESTIMATORS)
    check_pair(x, y, 4 if estimator == "unbiased" else 2)
    n, p, q = len(x), x.shape[1], y.shape[1]
    if estimator == "biased" and kernel == "linear" and n <= max(p, q):
        warnings.warn(f"biased CKA of {n} stimuli and {max(p, q)} features is near 1 for anything", stacklevel=2)
    if kernel == "linear":
        check(sigma is None and scale is None, "sigma", sigma or scale, "the linear kernel has no bandwidth")
        x, y = x - x.mean(0), y - y.mean(0)
        if p * p + q * q + p * q < n * (p + q):
            pairs = ((x, y), (x, x), (y, y))
            return ratio(*(_feature_form(a, b, estimator) for a, b in pairs))
    k, l = (centre(gram(v, kernel, sigma, scale), estimator) for v in (x, y))  # noqa: E741
    return ratio((k * l).sum(), k.square().sum(), l.square().sum())


def _feature_form(x: Tensor, y: Tensor, estimator: str) -> Tensor:
    """HSIC of linear kernels up to a common factor, from centred features."""
    cross = (y.T @ x).square().sum()
    if estimator == "biased":
        return cross
    n = len(x)
    a, b = x.square().sum(1), y.square().sum(1)
    return cross - n / (n - 2) * (a * b).sum() + a.sum() * b.sum() / ((n - 1) * (n - 2))


def angular_distance(x: Tensor, y: Tensor) -> Tensor:
    """arccos of the biased linear CKA, in radians: a metric (Williams et al. 2021)."""
    check_pair(x, y)
    k, l = (centre(v @ v.T) for v in (x - x.mean(0), y - y.mean(0)))  # noqa: E741
    return torch.arccos(ratio((k * l).sum(), k.square().sum(), l.square().sum()).clamp(-1, 1))


class MinibatchCKA:
    """CKA of more stimuli than fit at once: unbiased HSICs averaged over batches, then their ratio (arXiv 2010.15327).

    Holds three sums. The mean of the batches' ratios, which is not this, is biased. With "rbf" each batch has its own
    median bandwidth unless ``sigma`` is given.

    Args:
        kernel, sigma, scale: as of :func:`cka`.

    Example:
        >>> state = MinibatchCKA()
        >>> for _ in range(3):
        ...     x = torch.randn(16, 4, dtype=torch.float64)
        ...     state.update(x, -2 * x)
        >>> round(float(state.value()), 6)
        1.0
    """

    def __init__(self, kernel: str = "linear", *, sigma: float | None = None, scale: float | None = None) -> None:
        check_choice("kernel", kernel, KERNELS)
        self.kernel, self.sigma, self.scale = kernel, sigma, scale
        self.batches = 0
        self.sums: Tensor | None = None

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add a batch: (n, p) and (n, q) with n ≥ 4; batches ought to have one size."""
        check_pair(x, y, 4)
        x, y = x.detach().double(), y.detach().double()
        if self.kernel == "linear":
            x, y = x - x.mean(0), y - y.mean(0)
        k, l = (centre(gram(v, self.kernel, self.sigma, self.scale), "unbiased") for v in (x, y))  # noqa: E741
        found = torch.stack([(k * l).sum(), k.square().sum(), l.square().sum()]) / (len(x) * (len(x) - 3))
        self.sums = found if self.sums is None else self.sums + found
        self.batches += 1

    @property
    def hsic(self) -> Tensor:
        """Means over batches of HSIC(K, L), HSIC(K, K), HSIC(L, L)."""
        if self.sums is None:
            raise ValueError("no batch yet: call update(x, y) first")
        return self.sums / self.batches

    def value(self) -> Tensor:
        """The alignment so far."""
        return ratio(*self.hsic.unbind())
