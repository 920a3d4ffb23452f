"""One-layer local and convolutional kernels of a Laplacian, arXiv 2106.08619."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from torchconv._common import check, check_positive


def laplacian_kernel(x: Tensor, y: Tensor, sigma: float = 1.0) -> Tensor:
    """exp(−‖x − y‖ / σ) for all pairs of rows: (n, d), (m, d) → (n, m).

    Example:
        >>> laplacian_kernel(torch.zeros(1, 2), torch.tensor([[0.0, 0.0], [3.0, 4.0]]), 5.0)
        tensor([[1.0000, 0.3679]])
    """
    check(sigma > 0, "sigma", sigma, "must be positive")
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").div(-sigma).exp()


def windows(x: Tensor, size: int, stride: int, periodic: bool, name: str) -> Tensor:
    """Windows of ``size`` entries, (n, windows, size); periodic ones go on at the front."""
    check_positive("size", size)
    check_positive("stride", stride)
    check(x.dim() == 2, f"{name}.shape", tuple(x.shape), "must be (n, d)")
    check(size <= x.shape[1], "size", size, f"must not exceed the {x.shape[1]} entries of {name}")
    if periodic:
        x = F.pad(x.unsqueeze(1), (0, size - 1), mode="circular").squeeze(1)
    return x.unfold(1, size, stride)


def local_kernel(
    x: Tensor, y: Tensor, size: int, sigma: float = 1.0, *, stride: int = 1, periodic: bool = False
) -> Tensor:
    """Mean over places of the Laplacian kernel of the windows at the same place.

    Args:
        x, y: (n, d), (m, d).
        size: entries of a window.
        sigma: width of the Laplacian.
        stride: between windows.
        periodic: windows may go on at the front; one at every ``stride``-th entry then.

    Shape:
        (n, m).

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> x = torch.tensor([[0.0, 1.0, 0.0]])
        >>> local_kernel(x, x, 2)
        tensor([[1.]])

    Reference: Favero et al., arXiv 2106.08619.
    """
    left, right = windows(x, size, stride, periodic, "x"), windows(y, size, stride, periodic, "y")
    _check_same(x, y)
    total = x.new_zeros(len(x), len(y))
    for a, b in zip(left.unbind(1), right.unbind(1), strict=True):
        total = total + laplacian_kernel(a, b, sigma)
    return total / left.shape[1]


def convolutional_kernel(
    x: Tensor, y: Tensor, size: int, sigma: float = 1.0, *, stride: int = 1, periodic: bool = False
) -> Tensor:
    """Mean over all pairs of places of the Laplacian kernel of the windows; arguments as of :func:`local_kernel`.

    Example:
        >>> convolutional_kernel(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]]), 1)
        tensor([[0.6839]])
    """
    left, right = windows(x, size, stride, periodic, "x"), windows(y, size, stride, periodic, "y")
    _check_same(x, y)
    flat = right.reshape(-1, size)
    total = x.new_zeros(len(x), len(y))
    for a in left.unbind(1):
        total = total + laplacian_kernel(a, flat, sigma).view(len(x), len(y), -1).mean(-1)
    return total / left.shape[1]


def _check_same(x: Tensor, y: Tensor) -> None:
    check(x.shape[1] == y.shape[1], "y.shape", tuple(y.shape), f"must have the {x.shape[1]} entries of x")
