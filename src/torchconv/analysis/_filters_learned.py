"""Filters learned from patches without labels: whitening, PCA, k-means in three forms, sparse codes, maps of Kohonen.

Patches are rows, features channel-major as in ``unfold``. Filters learned on whitened patches return to pixels by D·W.

Sources: Coates, Lee and Ng 2011; Coates and Ng 2012; Dundar et al. 2015 (arXiv 1511.06241); Chan et al. 2015
(arXiv 1404.3606); Beck and Teboulle 2009; Kohonen 1990; the survey is arXiv 2410.21644.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from torchconv._common import check, ntuple

ROWS = 65536  # patches in one product


def patches(images: Tensor, kernel_size: int | Sequence[int], stride: int | Sequence[int] = 1) -> Tensor:
    """All patches of images without padding, one in a row.

    Shape: (N, C, *spatial) → (N · positions, C · taps), positions row-major, features channel-major.

    Raises:
        ValueError: a patch larger than the images.

    Example:
        >>> patches(torch.arange(4.0).reshape(1, 1, 4), 2)
        tensor([[0., 1.],
                [1., 2.],
                [2., 3.]])
    """
    ndim = images.dim() - 2
    sizes = ntuple("kernel_size", kernel_size, ndim)
    strides = ntuple("stride", stride, ndim)
    fits = all(k <= n for k, n in zip(sizes, images.shape[2:], strict=True))
    check(fits, "kernel_size", kernel_size, f"must fit images of {tuple(images.shape[2:])}")
    for axis, (k, s) in enumerate(zip(sizes, strides, strict=True), start=2):
        images = images.unfold(axis, k, s)
    order = (0, *range(2, 2 + ndim), 1, *range(2 + ndim, 2 + 2 * ndim))
    return images.permute(order).reshape(-1, images.shape[1] * math.prod(sizes))


def contrast_normalise(x: Tensor, c: float = 0.01) -> Tensor:
    """Every patch less its mean, divided by √(variance + c); c = 10 for values to 255, 0.01 for values to 1.

    Example:
        >>> contrast_normalise(torch.tensor([[0.0, 2.0]]), c=0.0)
        tensor([[-1.,  1.]])
    """
    x = x - x.mean(1, keepdim=True)
    return x / (x.square().mean(1, keepdim=True) + c).sqrt()


class Whitening(NamedTuple):
    """What :func:`zca` finds: ``matrix`` W is symmetric; ``(x − mean) @ matrix`` whitens rows."""

    mean: Tensor
    covariance: Tensor
    matrix: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Whitened rows."""
        return (x - self.mean) @ self.matrix

    def fold(self, filters: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and biases that give on plain patches what ``filters`` (rows) give on whitened ones."""
        weight = filters @ self.matrix
        return weight, -weight @ self.mean


def zca(x: Tensor, eps: float = 0.1) -> Whitening:
    """ZCA whitening W = V diag((λ + eps)^{-1/2}) Vᵀ of the population covariance of rows.

    Args:
        x: (N, q) patches.
        eps: the noise that is not amplified; it decides the result more than anything else here.

    Example:
        >>> w = zca(torch.randn(200, 3).double(), eps=0.0)
        >>> w.matrix.shape
        torch.Size([3, 3])

    Reference: Coates, Lee and Ng 2011, section 3.
    """
    check(x.dim() == 2 and x.shape[0] > 0, "x", tuple(x.shape), "give at least one patch, as rows")
    mean = x.mean(0)
    covariance = x.new_zeros(x.shape[1], x.shape[1])
    for rows in x.split(ROWS):
        centred = rows - mean
        covariance += centred.T @ centred
    covariance /= x.shape[0]
    values, vectors = torch.linalg.eigh(covariance)
    return Whitening(mean, covariance, (vectors * (values.clamp_min(0) + eps).rsqrt()) @ vectors.T)


def principal_filters(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Leading eigenvectors of XᵀX as rows, the entry of largest magnitude positive, and all eigenvalues, descending.

    Raises:
        ValueError: more filters than features.

    Example:
        >>> principal_filters(torch.tensor([[0.0, -3.0], [1.0, 0.0]]), 1)[0]
        tensor([[0., 1.]])

    Reference: arXiv 1404.3606.
    """
    check(1 <= count <= x.shape[1], "count", count, f"patches have {x.shape[1]} features")
    scatter = x.new_zeros(x.shape[1], x.shape[1])
    for rows in x.split(ROWS):
        scatter += rows.T @ rows
    values, vectors = torch.linalg.eigh(scatter)
    filters = vectors.flip(1)[:, :count].T
    largest = filters.gather(1, filters.abs().argmax(1, keepdim=True))
    return filters * torch.where(largest < 0, -1.0, 1.0).to(x.dtype), values.flip(0)


def unit(x: Tensor) -> Tensor:
    """Rows of norm 1; zero rows stay."""
    return x / x.norm(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def spherical_kmeans(
    x: Tensor, initial: Tensor, iterations: int = 10, *, reseed: Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Spherical k-means: every sample goes, with its response, to the atom of largest |response|.

    S = X Dᵀ, A keeps the largest |S| of each row, D ← normalised AᵀX + D; the old D damps the step.

    Args:
        x: (N, q), best whitened: k-means finds little in correlated patches.
        initial: (K, q); normalised first.
        iterations: passes.
        reseed: give a generator to replace atoms that won no sample by samples of the data.

    Returns:
        D (K, q) and the atom of each sample in the last pass, before its update.

    Example:
        >>> d, who = spherical_kmeans(torch.eye(2), torch.tensor([[2.0, 1.0], [0.0, 1.0]]), 1)
        >>> who.tolist()
        [0, 1]

    Reference: Coates and Ng 2012, section 2.
    """
    d = unit(initial)
    assignment = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
    for _ in range(iterations):
        update, found = torch.zeros_like(d), []
        for rows in x.split(ROWS):
            s = rows @ d.T
            best = s.abs().argmax(1)
            update.index_add_(0, best, rows * s.gather(1, best[:, None]))
            found.append(best)
        assignment = torch.cat(found)
        d = update + d
        if reseed is not None:
            dead = (torch.bincount(assignment, minlength=len(d)) == 0).nonzero()[:, 0]
            chosen = torch.randint(len(x), (len(dead),), generator=reseed, device=reseed.device)
            d[dead] = x[chosen.to(x.device)]
        d = unit(d)
    return d, assignment


def triangle_code(x: Tensor, centroids: Tensor) -> Tensor:
    """f_k = max(0, mean_j z_j − z_k), z the distances to the centroids: half of the entries are zero or so.

    Example:
        >>> triangle_code(torch.tensor([[0.0]]), torch.tensor([[1.0], [3.0]]))
        tensor([[1., 0.]])

    Reference: Coates, Lee and Ng 2011, equation 2.
    """
    z = torch.cdist(x, centroids, compute_mode="donot_use_mm_for_euclid_dist")
    return (z.mean(1, keepdim=True) - z).clamp_min(0)


class ConvolutionalStep(NamedTuple):
    """One step of convolutional k-means: new centroids, and of each window the winner and where it won."""

    centroids: Tensor
    assignment: Tensor
    corner: tuple[Tensor, ...]


def convolutional_kmeans_step(windows: Tensor, centroids: Tensor) -> ConvolutionalStep:
    """Slide the centroids over each window; the patch that responds best (signed) joins its centroid.

    Windows of twice the filter's side let a pattern be found wherever it lies, so that no filter need be a shifted copy
    of another. The update is the normalised sum of patches and the old centroid.

    Shape: windows (N, C, *window), centroids (K, C, *filter); corner: one (N,) for each axis.

    Raises:
        ValueError: windows smaller than the filters or with other channels.

    Example:
        >>> step = convolutional_kmeans_step(torch.tensor([[[0.0, 3.0, 4.0, 0.0]]]), torch.tensor([[[0.6, 0.8]]]))
        >>> step.corner[0].tolist()
        [1]

    Reference: arXiv 1511.06241, section 3.
    """
    sizes = tuple(centroids.shape[2:])
    same = windows.dim() == centroids.dim() and windows.shape[1] == centroids.shape[1]
    check(same, "windows", tuple(windows.shape), f"must have the channels and axes of centroids {centroids.shape}")
    positions = [n - k + 1 for n, k in zip(windows.shape[2:], sizes, strict=True)]
    flat = centroids.flatten(1)
    update, who, where = flat.clone(), [], []
    step = max(1, ROWS // math.prod(positions))
    for some in windows.split(step):
        rows = patches(some, sizes).reshape(len(some), math.prod(positions), -1)
        best = (rows @ flat.T).transpose(1, 2).flatten(1).argmax(1)
        atom, place = best // rows.shape[1], best % rows.shape[1]
        update.index_add_(0, atom, rows[torch.arange(len(rows), device=rows.device), place])
        who.append(atom)
        where.append(place)
    corner = torch.unravel_index(torch.cat(where), tuple(positions))
    return ConvolutionalStep(unit(update).reshape(centroids.shape), torch.cat(who), tuple(corner))


def sparse_code(
    x: Tensor, dictionary: Tensor, penalty: float, *, tolerance: float | None = None, max_iter: int = 20000
) -> Tensor:
    """The minimum over s of ½‖x − s D‖² + penalty·‖s‖₁ for every row of x, by FISTA that restarts when it overshoots.

    Args:
        x: (N, q).
        dictionary: (K, q), atoms as rows.
        penalty: λ; from max|D x| on the code is zero.
        tolerance: stop when no entry moves by more than this share of the largest; 1e-13 in float64, 1e-7 in float32.
        max_iter: stop then at the latest.

    Example:
        >>> sparse_code(torch.tensor([[3.0, 0.5]]), torch.eye(2), 1.0)
        tensor([[2., 0.]])

    Reference: Beck and Teboulle 2009; O'Donoghue and Candès 2015 for the restart.
    """
    check(penalty >= 0, "penalty", penalty, "must not be negative")
    tolerance = tolerance or (1e-13 if x.dtype == torch.float64 else 1e-7)
    gram, target = dictionary @ dictionary.T, x @ dictionary.T
    step = 1 / torch.linalg.matrix_norm(gram, 2).clamp_min(torch.finfo(x.dtype).tiny)
    code = torch.zeros_like(target)
    ahead = code
    t = torch.ones(len(x), 1, dtype=x.dtype, device=x.device)
    for _ in range(max_iter):
        new = F.softshrink(ahead - step * (ahead @ gram - target), float(step) * penalty)
        restart = ((ahead - new) * (new - code)).sum(1, keepdim=True) > 0
        t = torch.where(restart, 1.0, t)
        following = (1 + (1 + 4 * t.square()).sqrt()) / 2
        ahead = new + torch.where(restart, 0.0, (t - 1) / following) * (new - code)
        moved, code, t = (new - code).abs().max(), new, following
        if moved <= tolerance * code.abs().max():
            break
    return code


def dictionary(x: Tensor, initial: Tensor, penalty: float = 1.0, iterations: int = 10) -> Tensor:
    """Atoms for sparse codes: codes, then atoms by least squares, brought to norm 1, in turns.

    Args:
        x: (N, q).
        initial: (K, q); normalised first. Atoms that no code uses stay as they are.
        penalty: of the codes, as in :func:`sparse_code`.
        iterations: turns.

    Example:
        >>> dictionary(torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([[3.0, 1.0], [0.0, 1.0]])).shape
        torch.Size([2, 2])

    Reference: Olshausen and Field 1996; Engan et al. 1999 for the step by least squares.
    """
    atoms = unit(initial)
    for _ in range(iterations):
        code = sparse_code(x, atoms, penalty, tolerance=1e-4, max_iter=200)
        gram = code.T @ code
        ridge = 1e-6 * gram.diagonal().amax() * torch.eye(len(atoms), dtype=x.dtype, device=x.device)
        used = gram.diagonal() > 0
        if not used.any():
            break
        solved = torch.linalg.solve(gram + ridge, code.T @ x)
        atoms = torch.where(used[:, None], unit(solved), atoms)
    return atoms


def self_organising_map(
    x: Tensor, units: Tensor, lr: float = 0.5, sigma: float = 1.5, horizon: float | None = None, epochs: int = 1
) -> Tensor:
    """Kohonen's map: the unit nearest to a sample and its neighbours on the grid move towards it, one sample at a time.

    m_j += lr(t) · exp(−‖pos_j − pos_b‖² / 2σ(t)²) · (x − m_j), lr and σ decaying as exp(−t/T).

    Args:
        x: (N, q), taken in this order.
        units: (*grid, q), the initial map.
        lr, sigma: at t = 0.
        horizon: T; the number of steps by default.
        epochs: passes over x, t running on.

    Example:
        >>> self_organising_map(torch.tensor([[1.0]]), torch.tensor([[0.0], [-9.0]]), lr=0.5, sigma=1e-3)
        tensor([[ 0.5000],
                [-9.0000]])

    Reference: Kohonen 1990.
    """
    grid = units.shape[:-1]
    m = units.reshape(-1, units.shape[-1]).clone()
    axes = [torch.arange(n, dtype=x.dtype, device=x.device) for n in grid]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(grid))
    between = (places[:, None] - places).square().sum(-1)
    horizon = horizon or max(1, len(x) * epochs)
    for t in range(len(x) * epochs):
        towards = x[t % len(x)] - m
        best = towards.square().sum(1).argmin()
        decay = math.exp(-t / horizon)
        m += lr * decay * torch.exp(-between[best] / (2 * (sigma * decay) ** 2))[:, None] * towards
    return m.reshape(units.shape)
