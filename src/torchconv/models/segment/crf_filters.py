"""The pairwise kernels of a fully connected conditional random field, as filters of label maps.

A kernel joins every pair of pixels; applied to L maps it is a product with an N × N matrix. Three ways to do without
that matrix: a Gaussian of positions alone is one small matrix for each axis (exact, O(N·(H + W)·L)); pairs may be
visited in chunks of rows (exact, O(N²·(L + d))); the permutohedral lattice is another filter, of nearly the same shape
(O(N·d·L)).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchconv._common import check
from torchconv.models.segment.crf_lattice import Lattice

Filter = Callable[[Tensor], Tensor]  # (B, N, L) → (B, N, L)
Width = float | Sequence[float]
_CACHED = 2**20  # pairs whose distances stay in a processor's cache


@dataclass(frozen=True)
class GaussianKernel:
    """weight · exp(−|Δposition|² / 2 spatial_std² − |Δcolour|² / 2 colour_std²).

    Args:
        weight: of the kernel; what it gives to pixels of the same label.
        spatial_std: in pixels, a number or one for each axis of the image in the order of its axes.
        colour_std: on the scale 0 … 255, a number or one for each channel; None for a kernel of positions only.

    Raises:
        ValueError: a width that is not positive.
    """

    weight: float
    spatial_std: Width
    colour_std: Width | None = None

    def __post_init__(self) -> None:
        for name, width in (("spatial_std", self.spatial_std), ("colour_std", self.colour_std)):
            values = width if isinstance(width, Sequence) else [1.0 if width is None else width]
            ok = len(values) > 0 and all(isinstance(v, int | float) and 0 < v < math.inf for v in values)
            check(ok, name, width, "give a number above 0, or one for each axis or channel")

    def features(self, image: Tensor) -> Tensor:
        """(B, C, *spatial) → (B, N, d), every feature divided by its width; the last axis' position comes first."""
        axes = [torch.arange(n, device=image.device, dtype=image.dtype) for n in image.shape[2:]]
        found = [grid / std for grid, std in zip(_grid(axes), self.widths(image.dim() - 2), strict=True)]
        positions = torch.stack(list(reversed(found)), -1).flatten(0, -2).expand(image.shape[0], -1, -1)
        if self.colour_std is None:
            return positions
        std = torch.tensor(each("colour_std", self.colour_std, image.shape[1]), device=image.device, dtype=image.dtype)
        return torch.cat([positions, image.flatten(2).transpose(1, 2) / std], -1).contiguous()

    def widths(self, ndim: int) -> list[float]:
        """The spatial widths of an image of ``ndim`` axes."""
        return each("spatial_std", self.spatial_std, ndim)


def _grid(axes: list[Tensor]) -> Sequence[Tensor]:
    return torch.meshgrid(*axes, indexing="ij")


def each(name: str, width: Width, count: int) -> list[float]:
    """``count`` widths from one or as many."""
    values = [float(v) for v in width] if isinstance(width, Sequence) else [float(width)] * count
    check(len(values) == count, name, width, f"give one number, or {count} for this image")
    return values


PRESETS: dict[str, tuple[GaussianKernel, ...]] = {
    "vgg": (GaussianKernel(3.0, 3.0), GaussianKernel(4.0, 49.0, 5.0)),
    "resnet101": (GaussianKernel(3.0, 1.0), GaussianKernel(4.0, 67.0, 3.0)),
    "default": (GaussianKernel(3.0, 3.0), GaussianKernel(10.0, 60.0, 20.0)),
}


def make_filter(image: Tensor, kernel: GaussianKernel, method: str, max_pairs: int) -> Filter:
    """The kernel's matrix, diagonal included, as a filter of (B, N, L)."""
    if method == "lattice":
        return lattice_filter(kernel.features(image))
    if kernel.colour_std is None:
        return separable_filter(image, kernel.widths(image.dim() - 2))
    return pairs_filter(kernel.features(image), max_pairs)


def lattice_filter(features: Tensor) -> Filter:
    """By the permutohedral lattice; no gradient for the features."""
    remedy = "its sizes depend on the image, which a graph cannot hold; export with method='exact'"
    check(not torch.compiler.is_exporting(), "method", "lattice", remedy)
    lattice = Lattice.build(features.detach())
    return lambda v: lattice.filter(v.flatten(0, 1)).view_as(v)


def separable_filter(image: Tensor, widths: Sequence[float]) -> Filter:
    """A Gaussian of positions, exactly: one matrix for each axis."""
    matrices = []
    for n, std in zip(image.shape[2:], widths, strict=True):
        steps = torch.arange(n, device=image.device, dtype=image.dtype) / std
        matrices.append((steps[:, None] - steps).square().mul(-0.5).clamp(min=-80).exp())

    def apply(v: Tensor) -> Tensor:
        shape = v.shape
        for axis, matrix in enumerate(matrices):
            before = math.prod(image.shape[2 : 2 + axis])
            v = matrix @ v.reshape(image.shape[0] * before, len(matrix), -1)
        return v.reshape(shape)

    return apply


def pairs_filter(features: Tensor, max_pairs: int) -> Filter:
    """All pairs, exactly. The matrix is kept if it has at most ``max_pairs`` entries, else made again in chunks."""
    count = features.shape[1]
    if count * count <= max_pairs:
        matrix = gaussian(features, features)
        return lambda v: matrix @ v
    rows = max(1, min(max_pairs, _CACHED) // count)
    return lambda v: _Pairs.apply(features, v, rows)


def gaussian(a: Tensor, b: Tensor) -> Tensor:
    """exp(−|aᵢ − bⱼ|² / 2), from differences: features may be far from 0, where |a|² + |b|² − 2ab loses its digits."""
    distance = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    # Far pairs count for 10⁻³⁵ instead of 0: numbers below the normal ones would take many times as long.
    return distance.square().mul(-0.5).clamp(min=-80).exp()


class _Pairs(torch.autograd.Function):
    """K(features)·values without K: rows of it are made, used and dropped, and made again for the gradient."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, values: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(features, values)
        ctx.rows = rows
        return torch.cat([gaussian(part, features) @ values for part in features.split(rows, 1)], 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
        features, values = ctx.saved_tensors
        to_features, to_values = [], []
        parts = zip(*(t.split(ctx.rows, 1) for t in (features, values, grad)), strict=True)
        for feature, value, given in parts:
            kernel = gaussian(feature, features)
            to_values.append(kernel @ grad)
            if ctx.needs_input_grad[0]:
                kernel = kernel * (given @ values.transpose(1, 2) + value @ grad.transpose(1, 2))
                to_features.append(kernel @ features - kernel.sum(2, keepdim=True) * feature)
        return torch.cat(to_features, 1) if to_features else None, torch.cat(to_values, 1), None


def normalised(kernel: Filter, like: Tensor, normalization: str, include_self: bool) -> Filter:
    """The filter with its matrix normalised by the sums n of its rows, and without its diagonal unless wanted.

    ``like`` is any (B, N, L). The sums hold the diagonal in any case, as in the authors' library.
    """
    n = kernel(torch.ones_like(like[..., :1])).clamp_min(1e-20)
    if normalization == "none":
        left, right = n.shape[1] / n.sum(1, keepdim=True), None
    elif normalization == "after":
        left, right = 1 / n, None
    elif normalization == "before":
        left, right = None, 1 / n
    else:
        left = right = n.rsqrt()
    both = [side for side in (left, right) if side is not None]
    own = math.prod(both[1:], start=both[0])

    def apply(v: Tensor) -> Tensor:
        y = kernel(v if right is None else v * right)
        y = y if left is None else y * left
        return y if include_self else y - own * v

    return apply
