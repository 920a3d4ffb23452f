"""SegNet's pooling that remembers where the maxima were, and the unpooling that puts values back there.

Badrinarayanan, Kendall, Cipolla 2015, "SegNet: A Deep Convolutional Encoder-Decoder Architecture for Image
Segmentation", arXiv 1511.00561.

    p[w] = max over window w of x, o[w] = place of the first maximum inside the window
    u[place(w, o[w])] = v[w], zero elsewhere; u has the size of x, odd sizes included

Windows that stand out over the edge are clipped (ceil((n − k)/s) + 1 of them an axis). The decoder needs the places
only: a byte for each window here, where indices into the plane take eight, twice what the values take. No parameters,
no multiplications; one pass over the map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check
from torchconv.catalog import part
from torchconv.kernels._layout import channels_last_format, is_channels_last, keep_layout
from torchconv.ops._common import Size, ntuple

_POOL: tuple[Any, ...] = (None, F.max_pool1d, F.max_pool2d, F.max_pool3d)


def plane_indices(offsets: Tensor, size: Sequence[int], kernel_size: Size = 2, stride: Size | None = None) -> Tensor:
    """Places of maxima in the whole map, row-major in its spatial axes: what PyTorch's unpooling takes.

    Args:
        offsets: (N, C, \\*windows) of places inside their windows, row-major, from :func:`index_pool`.
        size: spatial size of the map that was pooled.
        kernel_size, stride: of the pooling.

    Returns:
        int64 of the shape of ``offsets``.

    Example:
        >>> plane_indices(torch.tensor([[[[3, 0]]]], dtype=torch.uint8), (3, 4))
        tensor([[[[5, 2]]]])
    """
    kernels, strides = _geometry(offsets.dim() - 2, kernel_size, stride)
    windows = offsets.shape[2:]
    # Looking up the distance from the window's corner is several times faster than dividing place by place.
    distances = _flat([range(k) for k in kernels], size, offsets.device).flatten()
    turned = is_channels_last(offsets)
    ordered = offsets.movedim(1, -1) if turned else offsets
    found = distances.index_select(0, ordered.flatten().int()).reshape(ordered.shape)
    corners = [range(0, w * s, s) for w, s in zip(windows, strides, strict=True)]
    return (found.movedim(-1, 1) if turned else found).add_(_flat(corners, size, offsets.device))


def _flat(places: Sequence[range], size: Sequence[int], device: torch.device) -> Tensor:
    """Row-major positions in a map of ``size`` for a grid of places along its axes."""
    total: Tensor | None = None
    for axis, span in enumerate(places):
        scale = math.prod(size[axis + 1 :])
        line = torch.arange(span.start * scale, span.stop * scale, span.step * scale, device=device)
        total = line if total is None else total.unsqueeze(-1) + line
    assert total is not None
    return total


def _geometry(ndim: int, kernel_size: Size, stride: Size | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    kernels = ntuple("kernel_size", kernel_size, ndim)
    return kernels, kernels if stride is None else ntuple("stride", stride, ndim)


def _read(x: Tensor, offsets: Tensor, kernels: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """Values at the places."""
    places, values = plane_indices(offsets, x.shape[2:], kernels, strides).flatten(2), x.flatten(2)
    if is_channels_last(x):
        found = values.transpose(1, 2).gather(1, places.transpose(1, 2)).transpose(1, 2)
    else:
        found = values.gather(2, places)
    return keep_layout(found.reshape(offsets.shape), x)


def _write(
    v: Tensor,
    offsets: Tensor,
    kernels: tuple[int, ...],
    strides: tuple[int, ...],
    size: tuple[int, ...],
    add: bool,
) -> Tensor:
    """Values to the places of a map of zeros: added up where windows share one, or one of them kept."""
    index = plane_indices(offsets, size, kernels, strides).flatten(2)
    count, channels = v.shape[:2]
    if is_channels_last(v):
        y = v.new_zeros(count, math.prod(size), channels).transpose(1, 2)
    else:
        y = v.new_zeros(count, channels, math.prod(size))
    y = y.scatter_add_(2, index, v.flatten(2)) if add else y.scatter_(2, index, v.flatten(2))
    return keep_layout(y.reshape(*v.shape[:2], *size), v)


class _Pool(torch.autograd.Function):
    """Maxima and their places; keeps the places only."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kernels: tuple[int, ...], strides: tuple[int, ...], ceil_mode: bool
    ) -> tuple[Tensor, Tensor]:
        pooled, offsets = _maxima(x, kernels, strides, ceil_mode)
        ctx.mark_non_differentiable(offsets)
        ctx.save_for_backward(offsets)
        ctx.geometry = kernels, strides, tuple(x.shape[2:])
        return pooled, offsets

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (offsets,) = ctx.saved_tensors
        kernels, strides, size = ctx.geometry
        return _Write.apply(grads[0], offsets, kernels, strides, size, True), None, None, None


class _Read(torch.autograd.Function):
    """See :func:`_read`; keeps the places only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, offsets: Tensor, kernels: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(offsets)
        ctx.geometry = kernels, strides, tuple(x.shape[2:])
        return _read(x, offsets, kernels, strides)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (offsets,) = ctx.saved_tensors
        kernels, strides, size = ctx.geometry
        return _Write.apply(grads[0], offsets, kernels, strides, size, True), None, None, None


class _Write(torch.autograd.Function):
    """See :func:`_write`; keeps the places only."""

    @staticmethod
    def forward(
        ctx: Any,
        v: Tensor,
        offsets: Tensor,
        kernels: tuple[int, ...],
        strides: tuple[int, ...],
        size: tuple[int, ...],
        add: bool,
    ) -> Tensor:
        ctx.save_for_backward(offsets)
        ctx.geometry = kernels, strides
        return _write(v, offsets, kernels, strides, size, add)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (offsets,) = ctx.saved_tensors
        kernels, strides = ctx.geometry
        return _Read.apply(grads[0], offsets, kernels, strides), None, None, None, None, None


def _pool(x: Tensor, kernels: tuple[int, ...], strides: tuple[int, ...], ceil_mode: bool) -> tuple[Tensor, Tensor]:
    """PyTorch's maxima, and their places in the map; in any memory format."""
    if x.device.type == "cpu" and x.shape[1] >= 8 and not is_channels_last(x):
        # Several times faster on a CPU where channels vary fastest, which pays for copies of the map and its maxima.
        if len(kernels) == 1:
            found = _pool(x.unsqueeze(2), (1, *kernels), (1, *strides), ceil_mode)
            return found[0].squeeze(2), found[1].squeeze(2)
        x = x.contiguous(memory_format=channels_last_format(len(kernels)))
    pool: Any = _POOL[len(kernels)]
    pooled, index = pool(x, kernels, strides, ceil_mode=ceil_mode, return_indices=True)
    return pooled, index


def _maxima(x: Tensor, kernels: tuple[int, ...], strides: tuple[int, ...], ceil_mode: bool) -> tuple[Tensor, Tensor]:
    """Maxima, and their places in the windows from their places in the map."""
    small = math.prod(kernels) <= 256
    if x.shape[0] == 0:  # refused by PyTorch
        shape = _pool(x.new_zeros(1, 1, *x.shape[2:]), kernels, strides, ceil_mode)[0].shape[2:]
        pooled = x.new_zeros(0, x.shape[1], *shape)
        return pooled, pooled.to(torch.uint8 if small else torch.int32)
    pooled, index = _pool(x, kernels, strides, ceil_mode)
    corners = [range(0, w * s, s) for w, s in zip(index.shape[2:], strides, strict=True)]
    # Distances from the window's corner are small, so that places in the map may overflow.
    offsets = index.int() - _flat(corners, x.shape[2:], x.device).int()
    if len(kernels) == 3:  # with channels last, PyTorch says the map's first place where a window holds -inf only
        offsets = offsets.clamp(min=0)
    beyond, scale = offsets, 1
    for axis in reversed(range(1, len(kernels))):
        size = x.shape[2 + axis]
        # A comparison is several times faster than a division.
        beyond = (beyond >= size).int() if axis == 1 and kernels[0] == 2 else beyond.div(size, rounding_mode="floor")
        offsets = offsets - scale * (size - kernels[axis]) * beyond
        scale *= kernels[axis]
    return keep_layout(pooled, x), keep_layout(offsets.to(torch.uint8) if small else offsets, x)


@part(
    "index-pool",
    paper="segnet",
    kind="kernel",
    dims=(1, 2, 3),
    keywords="max pooling indices switches ceil mode odd sizes memory uint8",
)
def index_pool(
    x: Tensor, kernel_size: Size = 2, stride: Size | None = None, ceil_mode: bool = True
) -> tuple[Tensor, Tensor]:
    """Maxima of windows and their places inside the windows; the first of equals in row-major order.

    Args:
        x: (N, C, \\*spatial), one to three spatial axes.
        kernel_size: k ≥ 1, int or one per axis.
        stride: ≥ 1; unset is ``kernel_size``.
        ceil_mode: keep the windows that stand out over the edge, clipped; otherwise leave them out.

    Returns:
        The maxima (N, C, \\*windows), and the places: row-major inside the window, of type uint8 for up to 256 taps,
        int32 beyond. :func:`plane_indices` turns them into places in the map.

    Raises:
        ValueError: a size below 1, no window on the map, or a map of another rank.

    Example:
        >>> pooled, offsets = index_pool(torch.tensor([[[1.0, 5.0, 2.0, 0.0, 3.0]]]))
        >>> pooled, offsets
        (tensor([[[5., 2., 3.]]]), tensor([[[1, 0, 0]]], dtype=torch.uint8))

    Reference: arXiv 1511.00561, section 3.
    """
    if not 3 <= x.dim() <= 5 or 0 in x.shape[1:]:
        raise ValueError(f"x of shape {tuple(x.shape)}: expected (N, C, L), (N, C, H, W) or (N, C, D, H, W), not empty")
    kernels, strides = _geometry(x.dim() - 2, kernel_size, stride)
    spare = [n - k + (s - 1 if ceil_mode else 0) for n, k, s in zip(x.shape[2:], kernels, strides, strict=True)]
    check(min(spare) >= 0, "kernel_size", kernel_size, f"leaves no window on a map of size {tuple(x.shape[2:])}")
    found: tuple[Tensor, Tensor] = _Pool.apply(x, kernels, strides, ceil_mode)
    return found


@part(
    "index-unpool",
    paper="segnet",
    kind="kernel",
    dims=(1, 2, 3),
    keywords="max unpooling indices switches upsampling decoder",
)
def index_unpool(
    v: Tensor, offsets: Tensor, size: Sequence[int], kernel_size: Size = 2, stride: Size | None = None
) -> Tensor:
    """Values at the remembered places of a map of zeros.

    Args:
        v: (N, C, \\*windows).
        offsets: of :func:`index_pool`, in the same shape.
        size: spatial size of the map that was pooled.
        kernel_size, stride: of the pooling.

    Shape:
        (N, C, \\*windows) → (N, C, \\*size). Where overlapping windows share a maximum, one of their values stays; the
        gradient of each value is that at its place.

    Raises:
        ValueError: shapes differ, places that are not of :func:`index_pool`, or a map that cannot have been pooled so.

    Example:
        >>> offsets = torch.tensor([[[1, 0, 0]]], dtype=torch.uint8)
        >>> index_unpool(torch.tensor([[[5.0, 2.0, 3.0]]]), offsets, (5,))
        tensor([[[0., 5., 2., 0., 3.]]])

    Reference: arXiv 1511.00561, section 3.
    """
    if v.shape != offsets.shape:
        raise ValueError(f"offsets of shape {tuple(offsets.shape)}: expected that of v, {tuple(v.shape)}")
    known = offsets.dtype in (torch.uint8, torch.int32)
    check(known, "offsets.dtype", offsets.dtype, "give the places inside the windows, as index_pool does")
    kernels, strides = _geometry(v.dim() - 2, kernel_size, stride)
    check(len(size) == v.dim() - 2, "size", tuple(size), f"needs {v.dim() - 2} spatial axes")
    geometry = zip(v.shape[2:], size, kernels, strides, strict=True)
    ok = all((w - 1) * s < n < w * s + k for w, n, k, s in geometry)
    check(ok, "size", tuple(size), f"a map of this size has not {tuple(v.shape[2:])} windows of {kernels} at {strides}")
    y: Tensor = _Write.apply(v, offsets, kernels, strides, tuple(size), False)
    return y


class IndexPool(nn.Module):
    """:func:`index_pool` as a module: maxima, places and size of a map.

    Args:
        kernel_size, stride, ceil_mode: as there.

    Example:
        >>> pool, unpool = IndexPool(2), IndexUnpool(2)
        >>> x = torch.rand(1, 3, 7, 9)
        >>> pooled, offsets, size = pool(x)
        >>> pooled.shape, unpool(pooled, offsets, size).shape
        (torch.Size([1, 3, 4, 5]), torch.Size([1, 3, 7, 9]))
    """

    def __init__(self, kernel_size: Size = 2, stride: Size | None = None, ceil_mode: bool = True) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.ceil_mode = kernel_size, stride, ceil_mode

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, torch.Size]:
        """Pool ``x``."""
        return (*index_pool(x, self.kernel_size, self.stride, self.ceil_mode), x.shape[2:])

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"kernel_size={self.kernel_size}, stride={self.stride}, ceil_mode={self.ceil_mode}"


class IndexUnpool(nn.Module):
    """:func:`index_unpool` as a module, with the pooling's sizes."""

    def __init__(self, kernel_size: Size = 2, stride: Size | None = None) -> None:
        super().__init__()
        self.kernel_size, self.stride = kernel_size, stride

    def forward(self, v: Tensor, offsets: Tensor, size: Sequence[int]) -> Tensor:
        """Put ``v`` back into a map of spatial size ``size``."""
        return index_unpool(v, offsets, size, self.kernel_size, self.stride)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"kernel_size={self.kernel_size}, stride={self.stride}"
