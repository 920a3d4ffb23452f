"""Kernels of infinitely wide hierarchical convolutional networks, their spectra, and what can be learnt with them.

Cagnetta, Favero, Wyart 2022, "What Can Be Learnt With Wide Convolutional Neural Networks?", arXiv 2208.01003; one-layer
local and convolutional kernels: the same authors 2021, arXiv 2106.08619. Filters of sizes s_1, …, s_L tile the input
without overlap, so that the network is a tree. With κ₀(t) = (π − arccos t)/π, κ₁(t) = (t(π − arccos t) + √(1 − t²))/π
and t_i the product of the i-th patches of x and y, both of norm 1:

    R¹_i = κ₁(t_i),                  R^l = κ₁(mean R^{l−1}),               K_RFK = mean R^L
    N¹_i = κ₁(t_i) + t_i·κ₀(t_i),    N^l = R^l + (mean N^{l−1})·κ₀(mean R^{l−1}),    K_NTK = mean N^L

means over the s_l children of a node, the last one over the nodes that remain. A target that depends on few adjacent
variables is learnt at a rate set by these alone. No parameters; d/s_1·(1 + 1/s_2 + …) arc cosines for a pair of inputs,
in blocks, depth first: beyond the result, depth + 2 blocks are held.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchconv._common import check, check_choice, check_positive
from torchconv.catalog import part
from torchconv.theory._widecnn_local import convolutional_kernel, laplacian_kernel, local_kernel
from torchconv.theory._widecnn_spectrum import (
    capacity,
    degeneracy,
    effective_dimension,
    funk_hecke,
    learning_exponent,
    sector_exponent,
    torus_spectrum,
)

__all__ = [
    "Kernels",
    "LearningCurve",
    "capacity",
    "convolutional_kernel",
    "degeneracy",
    "effective_dimension",
    "funk_hecke",
    "hierarchical_kernels",
    "laplacian_kernel",
    "learning_curve",
    "learning_exponent",
    "local_kernel",
    "ridge_regression",
    "sector_exponent",
    "sphere_patches",
    "torus_spectrum",
]

FilterSizes = Sequence[int | Sequence[int]]
_BLOCK = 256  # rows and columns at a time: a few blocks fit into the cache


@dataclass(frozen=True)
class Kernels:
    """Both kernels of a hierarchical network, (n, m), or (positions, n, m) without the last mean.

    Attributes:
        rfk: covariance of the random network's output (random features, NNGP).
        ntk: tangent kernel, all layers trained.
    """

    rfk: Tensor
    ntk: Tensor


@part(
    "hierarchical-kernels",
    paper="widecnn",
    kind="theory",
    dims=(1, 2, 3),
    keywords="infinite width NTK NNGP random features hierarchical convolutional kernel tree locality Gram matrix",
)
def hierarchical_kernels(
    x: Tensor,
    y: Tensor | None,
    filter_sizes: FilterSizes,
    *,
    normalise: bool = True,
    reduce: bool = True,
) -> Kernels:
    """Gram matrices of the random feature and the tangent kernel.

    Args:
        x: inputs: vectors (n, d), or maps (n, C, \\*spatial), whose first patches hold all channels.
        y: other inputs, of the same sizes; None is ``x``, of which half of the blocks are computed, with an exact
            diagonal.
        filter_sizes: s_1, …, s_L, an integer or one for each axis; their product divides the input's size. The
            positions that remain are averaged.
        normalise: scale every patch of the first layer to norm 1, as the paper assumes. Without it the kernels of
            the network on the inputs as they are: √(aa')·κ₁(R/√(aa')) with the variances a, a' of a node.
        reduce: average over the remaining positions; without, one matrix for each of them, in row-major order.

    Shape:
        (n, m) or (positions, n, m) each, in the type of the inputs; float64 is what Gram algebra wants.

    Raises:
        ValueError: sizes do not divide the input or a patch is zero where it should be normalised.

    Example:
        >>> x = sphere_patches(3, 8, 3, generator=torch.Generator().manual_seed(0))
        >>> k = hierarchical_kernels(x, None, (3, 2, 2))
        >>> k.rfk.diagonal().tolist(), k.ntk.diagonal().tolist()
        ([1.0, 1.0, 1.0], [4.0, 4.0, 4.0])

    Reference: Cagnetta et al., arXiv 2208.01003.
    """
    left, groups, count = _tree(x, filter_sizes, "x")
    same = y is None
    right = left if y is None else _tree(y, filter_sizes, "y")[0]
    check(
        left.shape[1:] == right.shape[1:], "y.shape", tuple(right.shape), f"must be like x's patches {left.shape[1:]}"
    )
    a, b = (p.square().sum(-1).T for p in (left, right))
    if normalise:
        for name, squares in (("x", a), ("y", b)):
            check(bool((squares > 0).all()), name, "zero patch", "has no direction; give normalise=False")
        left, right = (p / s.T.sqrt().unsqueeze(-1) for p, s in ((left, a), (right, b)))
    norms = None if normalise else (a, b)
    shape = (count, len(left), len(right)) if not reduce else (len(left), len(right))
    rfk, ntk = left.new_zeros(shape), left.new_zeros(shape)
    for i in range(0, len(left), _BLOCK):
        for j in range(i if same else 0, len(right), _BLOCK):
            rows, columns = slice(i, i + _BLOCK), slice(j, j + _BLOCK)
            pair = _Pair(
                left[rows].transpose(0, 1),
                right[columns].transpose(0, 1),
                None if norms is None else (norms[0][:, rows], norms[1][:, columns]),
                groups,
                same and i == j,
            )
            for position in range(count):
                r, n, _ = pair.node(len(groups), position)
                place = (rows, columns) if reduce else (position, rows, columns)
                rfk[place] += r / count if reduce else r
                ntk[place] += n / count if reduce else n
            if same and i != j:
                for kernel in (rfk, ntk):
                    kernel[..., columns, rows] = kernel[..., rows, columns].mT
    return Kernels(rfk, ntk)


Variances = tuple[Tensor, Tensor]


@dataclass
class _Pair:
    """A block of rows of x and one of y: patches (patches, rows, entries), squared norms (patches, rows)."""

    left: Tensor
    right: Tensor
    norms: Variances | None
    groups: tuple[int, ...]
    diagonal: bool

    def node(self, level: int, index: int) -> tuple[Tensor, Tensor, Variances | None]:
        """R, N and the variances of a node; level 0 are the patches of the first layer."""
        if level == 0:
            t = self.left[index] @ self.right[index].T
            n = t
            variances = None if self.norms is None else (self.norms[0][index], self.norms[1][index])
        else:
            size = self.groups[level - 1]
            t, n, variances = self.node(level - 1, index * size)
            for child in range(index * size + 1, (index + 1) * size):
                t2, n2, v2 = self.node(level - 1, child)
                t, n = t.add_(t2), n.add_(n2)
                if variances is not None and v2 is not None:
                    variances = variances[0] + v2[0], variances[1] + v2[1]
            t, n = t.mul_(1 / size), n.mul_(1 / size)
            variances = None if variances is None else (variances[0] / size, variances[1] / size)
        scale = None if variances is None else (variances[0][:, None] * variances[1]).sqrt()
        if scale is not None:
            t = torch.where(scale > 0, t / scale, 0.0)
        if self.diagonal:
            t = t.fill_diagonal_(1.0)
        t = t.clamp_(-1, 1)
        # κ₁ and κ₀ share the angle; few passes over the block are what counts beside the arc cosine.
        rest = math.pi - t.acos()
        r = torch.addcmul((1 - t * t).sqrt_(), t, rest).mul_(1 / math.pi)
        r = r if scale is None else r * scale
        return r, torch.addcmul(r, n, rest, value=1 / math.pi), variances


def _tree(x: Tensor, filter_sizes: FilterSizes, name: str) -> tuple[Tensor, tuple[int, ...], int]:
    """Patches (n, patches, entries) with the children of a node side by side, s_2 … s_L, and remaining positions."""
    check(x.is_floating_point(), f"{name}.dtype", x.dtype, "must be a real floating type; float64 is best")
    check(x.dim() >= 2, f"{name}.shape", tuple(x.shape), "must be (n, d) or (n, C, *spatial)")
    check(len(filter_sizes) > 0, "filter_sizes", filter_sizes, "needs at least one layer")
    maps = x.unsqueeze(1) if x.dim() == 2 else x
    spatial = tuple(maps.shape[2:])
    sizes = [(s,) * len(spatial) if isinstance(s, int) else tuple(s) for s in filter_sizes]
    for size in sizes:
        fits = len(size) == len(spatial) and all(isinstance(s, int) and s >= 1 for s in size)
        check(fits, "filter_sizes", size, f"must be an integer >= 1 or {len(spatial)} of them")
    products = [math.prod(axis) for axis in zip(*sizes, strict=True)]
    divides = all(n and n % p == 0 for n, p in zip(spatial, products, strict=True))
    check(divides, "filter_sizes", tuple(filter_sizes), f"their product {tuple(products)} must divide {spatial}")
    # Every axis as (positions, s_L, …, s_1); then level by level over all axes, channels with the first layer.
    levels = len(sizes)
    split = [
        n for axis, total in enumerate(spatial) for n in (total // products[axis], *(s[axis] for s in sizes[::-1]))
    ]
    axes = [2 + axis * (levels + 1) + level for level in range(levels) for axis in range(len(spatial))]
    last = [2 + axis * (levels + 1) + levels for axis in range(len(spatial))]
    patches = maps.reshape(*maps.shape[:2], *split).permute(0, *axes, 1, *last)
    groups = tuple(math.prod(s) for s in sizes[1:])
    count = math.prod(spatial) // math.prod(products)
    entries = maps.shape[1] * math.prod(sizes[0])
    return patches.reshape(len(x), count * math.prod(groups), entries), groups, count


def sphere_patches(
    n: int,
    patches: int,
    size: int,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Inputs with patches drawn uniformly from a sphere, those of the paper's theory.

    Shape:
        (n, patches · size).

    Example:
        >>> sphere_patches(2, 3, 4).view(2, 3, 4).norm(dim=-1).allclose(torch.ones(2, 3, dtype=torch.float64))
        True
    """
    for name, value in (("n", n), ("patches", patches), ("size", size)):
        check_positive(name, value)
    x = torch.randn(n, patches, size, generator=generator, dtype=dtype)
    return (x / x.norm(dim=-1, keepdim=True)).flatten(1)


def ridge_regression(k_train: Tensor, y_train: Tensor, k_test: Tensor, ridge: float = 0.0) -> Tensor:
    """Predictions k_test · (k_train + ridge·I)⁻¹ · y_train.

    Args:
        k_train: (n, n), symmetric.
        y_train: (n,) or (n, targets).
        k_test: (m, n), test inputs against training inputs.
        ridge: ≥ 0, not multiplied by n.

    Shape:
        (m,) or (m, targets).

    Raises:
        ValueError: a negative ridge, or shapes do not fit.

    Example:
        >>> ridge_regression(torch.eye(2), torch.tensor([1.0, 2.0]), torch.eye(2), ridge=1.0)
        tensor([0.5000, 1.0000])
    """
    check(ridge >= 0, "ridge", ridge, "must be at least 0")
    n = len(y_train)
    check(tuple(k_train.shape) == (n, n), "k_train.shape", tuple(k_train.shape), f"must be ({n}, {n})")
    check(k_test.dim() == 2 and k_test.shape[1] == n, "k_test.shape", tuple(k_test.shape), f"must be (m, {n})")
    regular = k_train + ridge * torch.eye(n, dtype=k_train.dtype, device=k_train.device)
    targets = y_train if y_train.dim() == 2 else y_train.unsqueeze(1)
    factor, failed = torch.linalg.cholesky_ex(regular)
    # Numerically of low rank, the matrix can lose its sign to round-off.
    weights = torch.linalg.solve(regular, targets) if int(failed) else torch.cholesky_solve(targets, factor)
    prediction = k_test @ weights
    return prediction if y_train.dim() == 2 else prediction.squeeze(1)


@dataclass(frozen=True)
class LearningCurve:
    """Test errors of kernel regression.

    Attributes:
        sizes: of the training sets; ``errors``: (draws, sizes), relative to the targets' variance.
        exponent: β of ε(n) ~ n^−β, fitted to the mean over draws.
    """

    sizes: tuple[int, ...]
    errors: Tensor
    exponent: float


@part(
    "wide-learning-curve",
    paper="widecnn",
    kind="theory",
    keywords="teacher student kernel regression learning curve exponent Gaussian random field NTK curse of dimension",
)
def learning_curve(
    student: Sequence[int],
    teacher: Sequence[int],
    inputs: Tensor,
    sizes: Sequence[int],
    *,
    teacher_inputs: Tensor | None = None,
    kernel: str = "ntk",
    teacher_kernel: str = "ntk",
    draws: int = 4,
    tests: int = 256,
    ridge: float = 1e-9,
    fit_from: int = 0,
    generator: torch.Generator | None = None,
) -> LearningCurve:
    """Kernel regression with one hierarchical kernel on Gaussian fields with another one's covariance.

    Args:
        student, teacher: filter sizes of the two kernels.
        inputs: (n, d) with n ≥ max(sizes) + tests; training inputs are the first ones, test inputs the last ``tests``.
        sizes: of the training sets.
        teacher_inputs: (n, d'), what the targets depend on, for instance the first patches of ``inputs``; unset is all.
        kernel, teacher_kernel: "rfk" or "ntk".
        draws: targets, each another draw of the field.
        ridge: of the regression.
        fit_from: smallest training set that enters the exponent.
        generator: of the targets.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> x = sphere_patches(192, 2, 2, generator=torch.Generator().manual_seed(0))
        >>> curve = learning_curve((2, 2), (2,), x, (16, 32, 64), teacher_inputs=x[:, :2], tests=128)
        >>> curve.errors.shape, curve.exponent > 0
        (torch.Size([4, 3]), True)

    Reference: arXiv 2208.01003, section on numerical experiments.
    """
    check_choice("kernel", kernel, ("rfk", "ntk"))
    check_choice("teacher_kernel", teacher_kernel, ("rfk", "ntk"))
    check_positive("draws", draws)
    check_positive("tests", tests)
    wanted = tuple(sizes)
    fits = bool(wanted) and min(wanted) >= 1 and max(wanted) + tests <= len(inputs)
    check(fits, "sizes", wanted, f"with tests={tests} at most {len(inputs) - tests}, as there are {len(inputs)} inputs")
    fitted = [i for i, n in enumerate(wanted) if n >= fit_from]
    check(len(fitted) >= 2, "fit_from", fit_from, "must leave two training sets for a slope")
    covariance = getattr(
        hierarchical_kernels(inputs if teacher_inputs is None else teacher_inputs, None, teacher), teacher_kernel
    )
    jitter = 1e-9 * torch.eye(len(inputs), dtype=covariance.dtype, device=covariance.device)
    noise = torch.randn(len(inputs), draws, generator=generator, dtype=covariance.dtype).to(covariance.device)
    y = torch.linalg.cholesky(covariance + jitter) @ noise
    gram = getattr(hierarchical_kernels(inputs, None, student), kernel)
    errors = []
    for n in wanted:
        prediction = ridge_regression(gram[:n, :n], y[:n], gram[-tests:, :n], ridge)
        errors.append((prediction - y[-tests:]).square().mean(0) / y[-tests:].var(0))
    found = torch.stack(errors, 1)
    mean = found.mean(0)[fitted].log()
    place = torch.tensor([wanted[i] for i in fitted], dtype=mean.dtype, device=mean.device).log()
    centred = place - place.mean()
    slope = float((centred * mean).sum() / centred.square().sum())
    return LearningCurve(wanted, found, -slope)
