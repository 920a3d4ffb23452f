"""The linear map from a small kernel to a larger one that does the same on an enlarged map (arXiv 2310.07702)."""

from __future__ import annotations

import itertools
from functools import cache, reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchconv._common import check, check_positive


@cache
def _solve_dispersion(small: int, large: int, size: int, scale: float, eta: float, ndim: int) -> Any:
    """R in float64 (NumPy, so that it does not depend on PyTorch's current default device)."""
    enlarged = round(scale * (size - 1) + 1)
    positions = np.linspace(0, size - 1, enlarged)
    up = np.maximum(0, 1 - np.abs(positions[:, None] - np.arange(size)))  # linear, corners aligned

    def reads(kernel: int, length: int) -> list[Any]:
        """For each tap, the matrix that takes a zero-padded map to what the tap sees."""
        return [np.eye(length, k=t - (kernel - 1) // 2) for t in range(kernel)]

    def columns(factors: list[Any]) -> Any:
        """One column for each tap in n dimensions: every coefficient of every input in every output."""
        taps = itertools.product(factors, repeat=ndim)
        return np.stack([reduce(np.kron, axes).ravel() for axes in taps], 1)

    large_on_up, large_on_map = [s @ up for s in reads(large, enlarged)], reads(large, size)
    small_then_up, small_on_map = [up @ s for s in reads(small, size)], reads(small, size)
    a = np.concatenate([columns(large_on_up), eta * columns(large_on_map)])
    b = np.concatenate([columns(small_then_up), eta * columns(small_on_map)])
    return np.linalg.lstsq(a, b, rcond=None)[0]


def dispersion_matrix(
    small: int = 3,
    large: int = 5,
    size: int = 3,
    scale: float = 2,
    eta: float = 0.05,
    ndim: int = 2,
    preserve_sum: bool = False,
) -> Tensor:
    """The matrix R that turns a small kernel into a large one, w' = R·vec(w) in row-major order.

    R minimises over all maps X of ``size`` points a side, zero padding around both,

        ‖ conv(up X, w') − up conv(X, w) ‖²  +  η² ‖ conv(X, w') − conv(X, w) ‖²

    coefficient by coefficient in X: the large kernel on the enlarged map does what the small one does on the original,
    and hardly differs from it on the original. ``up`` is linear with aligned corners, to scale·(size − 1) + 1 points.

    Args:
        small, large: odd kernel sizes.
        size: points a side of the maps. 3, the published value, is mostly border, so that an all-ones kernel gains
            8.4 %; 7 leaves 1.6 %.
        scale: of the enlargement.
        eta: weight of the second term. η → ∞ pads the kernel with zeros.
        ndim: 1, 2 or 3 dimensions.
        preserve_sum: move R by the least amount that makes every column sum to 1: flat regions keep their level.

    Shape:
        → (large^ndim, small^ndim) in float64.

    Raises:
        ValueError: an even or negative size, or large < small.

    Example:
        >>> dispersion_matrix().sum(0)[:5].round(decimals=3).tolist()
        [1.127, 1.061, 1.127, 1.061, 1.0]

    Reference: arXiv 2310.07702, section 3.3 and its supplement.
    """
    for name, value in (("small", small), ("large", large), ("size", size)):
        check_positive(name, value)
    check(small % 2 == 1, "small", small, "must be odd, so that the kernel has a centre")
    check(large % 2 == 1 and large >= small, "large", large, f"must be odd and at least small={small}")
    check(scale > 0, "scale", scale, "must be positive")
    check(eta >= 0, "eta", eta, "must not be negative")
    check(ndim in (1, 2, 3), "ndim", ndim, "must be 1, 2 or 3")
    matrix = torch.from_numpy(_solve_dispersion(small, large, size, float(scale), float(eta), ndim).copy())
    if preserve_sum:
        matrix = matrix + (1 - matrix.sum(0)) / len(matrix)
    return matrix


def disperse_kernel(weight: Tensor, matrix: Tensor) -> Tensor:
    """The large kernel R·vec(w) of every pair of channels; differentiable.

    Args:
        weight: (out, in/groups, k, …), the same size on every axis.
        matrix: (k'^n, k^n), see :func:`dispersion_matrix`.

    Shape:
        → (out, in/groups, k', …), in the weight's type.

    Raises:
        ValueError: no kernel, or a matrix that does not fit it.

    Example:
        >>> centre = torch.eye(9)[4].reshape(1, 1, 3, 3)
        >>> disperse_kernel(centre, dispersion_matrix())[0, 0, 2].abs().round(decimals=4).tolist()
        [0.0, 0.0, 1.0, 0.0, 0.0]

    Reference: arXiv 2310.07702, section 3.3.
    """
    if weight.dim() < 3:
        raise ValueError(f"weight of shape {tuple(weight.shape)}: expected (out, in/groups, k, …)")
    ndim = weight.dim() - 2
    side = round(matrix.shape[0] ** (1 / ndim))
    if matrix.dim() != 2 or side**ndim != matrix.shape[0] or matrix.shape[1] != weight[0, 0].numel():
        expected = f"(k'^{ndim}, {weight[0, 0].numel()}) for a kernel {tuple(weight.shape[2:])}"
        raise ValueError(f"matrix of shape {tuple(matrix.shape)}: expected {expected}")
    flat = weight.flatten(2) @ matrix.to(device=weight.device, dtype=weight.dtype).T
    return flat.unflatten(2, (side,) * ndim)
