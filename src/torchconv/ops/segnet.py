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

import copy
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_positive
from torchconv.catalog import part
from torchconv.ops._common import BATCH_NORM, CONV, Size, check_input, conv_nd, fold_bn, make_conv, ntuple

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
    rest, index = offsets.long(), torch.zeros((), dtype=torch.long, device=offsets.device)
    scale = 1
    for axis in reversed(range(len(kernels))):
        shape = [-1 if a == axis else 1 for a in range(len(kernels))]
        corner = torch.arange(offsets.shape[2 + axis], device=offsets.device).reshape(shape) * strides[axis]
        index = index + scale * (corner + rest % kernels[axis])
        rest = rest // kernels[axis]
        scale *= size[axis]
    return index


def _geometry(ndim: int, kernel_size: Size, stride: Size | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    kernels = ntuple("kernel_size", kernel_size, ndim)
    return kernels, kernels if stride is None else ntuple("stride", stride, ndim)


class _Read(torch.autograd.Function):
    """Values at the places; keeps the places only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, offsets: Tensor, kernels: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(offsets)
        ctx.geometry = kernels, strides, tuple(x.shape[2:])
        index = plane_indices(offsets, x.shape[2:], kernels, strides)
        return x.flatten(2).gather(2, index.flatten(2)).reshape(offsets.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (offsets,) = ctx.saved_tensors
        kernels, strides, size = ctx.geometry
        return _Write.apply(grads[0], offsets, kernels, strides, size, True), None, None, None


class _Write(torch.autograd.Function):
    """Values to the places: added up where windows share one (the adjoint of reading), or the same one kept."""

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
        index = plane_indices(offsets, size, kernels, strides).flatten(2)
        flat = v.new_zeros(*v.shape[:2], math.prod(size))
        values = v.flatten(2)
        flat = flat.scatter_add(2, index, values) if add else flat.scatter(2, index, values)
        return flat.reshape(*v.shape[:2], *size)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (offsets,) = ctx.saved_tensors
        kernels, strides = ctx.geometry
        return _Read.apply(grads[0], offsets, kernels, strides), None, None, None, None, None


def _keep_layout(y: Tensor, like: Tensor) -> Tensor:
    if like.dim() in (4, 5) and not like.is_contiguous():
        layout = torch.channels_last if like.dim() == 4 else torch.channels_last_3d
        return y.contiguous(memory_format=layout) if like.is_contiguous(memory_format=layout) else y
    return y


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
        ValueError: a size below 1.

    Example:
        >>> pooled, offsets = index_pool(torch.tensor([[[1.0, 5.0, 2.0, 0.0, 3.0]]]))
        >>> pooled, offsets
        (tensor([[[5., 2., 3.]]]), tensor([[[1, 0, 0]]], dtype=torch.uint8))

    Reference: arXiv 1511.00561, section 3.
    """
    ndim = x.dim() - 2
    kernels, strides = _geometry(ndim, kernel_size, stride)
    size = tuple(x.shape[2:])
    with torch.no_grad():
        if x.numel() == 0:
            shape = _POOL[ndim](x.new_zeros(1, 1, *size), kernels, strides, ceil_mode=ceil_mode).shape[2:]
            index = torch.zeros(*x.shape[:2], *shape, dtype=torch.long, device=x.device)
        else:
            _, index = _POOL[ndim](x.detach(), kernels, strides, ceil_mode=ceil_mode, return_indices=True)
        offsets, scale = torch.zeros_like(index), 1
        for axis in reversed(range(ndim)):
            shape = [-1 if a == axis else 1 for a in range(ndim)]
            corner = torch.arange(index.shape[2 + axis], device=x.device).reshape(shape) * strides[axis]
            offsets += scale * (index % size[axis] - corner)
            index = index // size[axis]
            scale *= kernels[axis]
        offsets = offsets.to(torch.uint8 if scale <= 256 else torch.int32)
    pooled: Tensor = _Read.apply(x, offsets, kernels, strides)
    return _keep_layout(pooled, x), offsets


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
        ValueError: shapes differ, or the map has other than as many axes as ``v``.

    Example:
        >>> offsets = torch.tensor([[[1, 0, 0]]], dtype=torch.uint8)
        >>> index_unpool(torch.tensor([[[5.0, 2.0, 3.0]]]), offsets, (5,))
        tensor([[[0., 5., 2., 0., 3.]]])

    Reference: arXiv 1511.00561, section 3.
    """
    if v.shape != offsets.shape:
        raise ValueError(f"offsets of shape {tuple(offsets.shape)}: expected that of v, {tuple(v.shape)}")
    kernels, strides = _geometry(v.dim() - 2, kernel_size, stride)
    check(len(size) == v.dim() - 2, "size", tuple(size), f"needs {v.dim() - 2} spatial axes")
    y: Tensor = _Write.apply(v, offsets, kernels, strides, tuple(size), False)
    return _keep_layout(y, v)


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


class ConvNorm(nn.Module):
    """Convolution of any kernel with "same" padding, batch norm, and a ReLU if asked for."""

    def __init__(self, ndim: int, channels: tuple[int, int], kernel_size: Size, relu: bool, **options: Any) -> None:
        super().__init__()
        self.conv = CONV[ndim](*channels, kernel_size, padding="same", **options)
        self.bn = BATCH_NORM[ndim](channels[1], **options)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, \\*spatial) → (N, C', \\*spatial)."""
        x = self.bn(conv_nd(x, self.conv.weight, self.conv.bias, padding="same"))
        return F.relu(x) if self.relu else x

    def merge(self) -> nn.Module:
        """The convolution with the batch norm folded in."""
        weight, bias = fold_bn(self.conv.weight, self.conv.bias, self.bn)
        conv = make_conv(weight, bias, padding="same")
        return nn.Sequential(conv, nn.ReLU()) if self.relu else conv


class SegNetLevel(nn.Module):
    """One level of SegNet: encode and pool, what is inside, unpool at the remembered maxima and decode.

    y = decode(unpool(inner(pool(encode(x))))). Encoder and decoder have ``depth`` convolutions with batch norm each; a
    SegNet is levels inside each other.

    Args:
        in_channels: of the input.
        out_channels: of the result; unset is ``in_channels``.
        width: channels of the pooled map; unset is ``in_channels``.
        inner: module on the pooled map that keeps its shape, another level for example; unset is nothing.
        kernel_size: of the convolutions (7 in SegNet-Basic, 3 in SegNet).
        depth: convolutions on each side.
        decoder_relu: ReLU after the decoder's convolutions too (SegNet; not in SegNet-Basic).

    Shape:
        (N, in_channels, \\*spatial) → (N, out_channels, \\*spatial), odd sizes included.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> level = SegNetLevel2d(3, 5, width=16, inner=SegNetLevel2d(16))
        >>> level(torch.zeros(1, 3, 11, 13)).shape
        torch.Size([1, 5, 11, 13])

    Reference: arXiv 1511.00561, section 3.
    """

    ndim: ClassVar[int] = 0

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        width: int | None = None,
        inner: nn.Module | None = None,
        kernel_size: Size = 7,
        depth: int = 1,
        decoder_relu: bool = False,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        width = in_channels if width is None else width
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("width", width)):
            check_positive(name, value)
        check_positive("depth", depth)
        kernel = ntuple("kernel_size", kernel_size, self.ndim)
        self.in_channels, self.out_channels, self.width = in_channels, out_channels, width
        options = {"device": device, "dtype": dtype}
        ways = [(in_channels if i == 0 else width, width) for i in range(depth)]
        self.encoder = nn.Sequential(*(ConvNorm(self.ndim, way, kernel, True, **options) for way in ways))
        self.inner = nn.Identity() if inner is None else inner
        ways = [(width, width if i < depth - 1 else out_channels) for i in range(depth)]
        self.decoder = nn.Sequential(*(ConvNorm(self.ndim, way, kernel, decoder_relu, **options) for way in ways))

    def forward(self, x: Tensor) -> Tensor:
        """Go down, through and up again."""
        check_input(x, self.in_channels, self.ndim)
        x = self.encoder(x)
        pooled, offsets = index_pool(x)
        y: Tensor = self.decoder(index_unpool(self.inner(pooled), offsets, x.shape[2:]))
        return y

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """The level with its batch norms folded into the convolutions, levels inside included."""
        merged = copy.deepcopy(self).eval()
        for side in (merged.encoder, merged.decoder):
            for number, block in enumerate(side):
                side[number] = block.merge() if isinstance(block, ConvNorm) else block
        if isinstance(merged.inner, SegNetLevel):
            merged.inner = merged.inner.merge()
        return merged


class SegNetLevel1d(SegNetLevel):
    """A level over (N, C, L)."""

    ndim = 1


@part(
    "segnet-level",
    paper="segnet",
    kind="layer",
    dims=(1, 2, 3),
    merges="self",
    probe={"build": {"in_channels": 4, "out_channels": 3, "kernel_size": 3}, "inputs": [[2, 4, 7, 9]]},
    keywords="SegNet encoder decoder unpooling hourglass segmentation",
)
class SegNetLevel2d(SegNetLevel):
    """One level of SegNet over (N, C, H, W): encode and pool, what is inside, unpool at the maxima and decode.

    Arguments as :class:`SegNetLevel`.
    """

    ndim = 2


class SegNetLevel3d(SegNetLevel):
    """A level over (N, C, D, H, W)."""

    ndim = 3
