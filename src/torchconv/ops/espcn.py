"""Sub-pixel convolution: upscaling computed at low resolution.

Shi, Caballero, Huszár, Totz, Aitken, Bishop, Rueckert, Wang 2016, "Real-Time Single Image and Video Super-Resolution
Using an Efficient Sub-Pixel Convolutional Neural Network", arXiv 1609.05158; the equality with a transposed convolution
is shown in arXiv 1609.07009, ICNR is Aitken et al. 2017, arXiv 1707.02937.

A convolution makes r^n channels for each output channel, one for each position inside an output pixel's r × … × r
block, and a shuffle interleaves them:

    z = W ∗ x + b                                  (N, C_out·r^n, L, …)
    y[c, r·i + u] = z[c·r^n + u, i]                u over the r^n positions of a block, row-major

k^n·C_in·C_out·r^n/g parameters without bias, as many multiply-adds an input position: those of the transposed
convolution with k·r taps an axis to which it is equal. Layers before it cost r^n times less than after upscaling.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check
from torchconv.catalog import part
from torchconv.ops._common import (
    Padding,
    Size,
    check_channels,
    check_input,
    check_padding,
    conv_nd,
    dilate_kernel,
    ntuple,
    resolve_padding,
)

_TRANSPOSED: tuple[Any, ...] = (nn.Module, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _factors(upscale_factor: Size, ndim: int) -> tuple[int, ...]:
    return ntuple("upscale_factor", upscale_factor, ndim)


def _axes(name: str, x: Tensor) -> int:
    """Number of spatial axes, at least one."""
    if x.dim() < 3:
        raise ValueError(f"{name} of shape {tuple(x.shape)}: expected (N, C, L), (N, C, H, W) or (N, C, D, H, W)")
    return x.dim() - 2


def pixel_shuffle(z: Tensor, upscale_factor: Size) -> Tensor:
    """Channels into positions: y[c, r·i + u] = z[c·r^n + u, i], in one to three dimensions.

    Args:
        z: (N, C·Π r, \\*spatial).
        upscale_factor: r ≥ 1, int or one per axis.

    Shape:
        (N, C·Π r, L, …) → (N, C, r·L, …).

    Raises:
        ValueError: Π r does not divide the channels.

    Example:
        >>> pixel_shuffle(torch.tensor([[[1.0, 2.0], [10.0, 20.0]]]), 2)
        tensor([[[ 1., 10.,  2., 20.]]])
    """
    ndim = _axes("z", z)
    factors = _factors(upscale_factor, ndim)
    check(z.shape[1] % math.prod(factors) == 0, "upscale_factor", upscale_factor, f"must divide {z.shape[1]} channels")
    if ndim == 2 and factors[0] == factors[1]:
        return F.pixel_shuffle(z, factors[0])
    # (N, C, r…, L…) → (N, C, L, r, …): each block's position goes behind its pixel.
    blocks = z.unflatten(1, (-1, *factors))
    order = [0, 1] + [a for i in range(ndim) for a in (2 + ndim + i, 2 + i)]
    return blocks.permute(order).reshape(z.shape[0], -1, *(n * r for n, r in zip(z.shape[2:], factors, strict=True)))


def pixel_unshuffle(y: Tensor, downscale_factor: Size) -> Tensor:
    """Positions into channels, the inverse of :func:`pixel_shuffle`; r divides the sizes.

    Example:
        >>> pixel_unshuffle(torch.tensor([[[1.0, 10.0, 2.0, 20.0]]]), 2)
        tensor([[[ 1.,  2.],
                 [10., 20.]]])
    """
    ndim = _axes("y", y)
    factors = ntuple("downscale_factor", downscale_factor, ndim)
    sizes = tuple(y.shape[2:])
    fits = all(n % r == 0 for n, r in zip(sizes, factors, strict=True))
    check(fits, "downscale_factor", downscale_factor, f"must divide the sizes {sizes}")
    split = [s for n, r in zip(sizes, factors, strict=True) for s in (n // r, r)]
    order = [0, 1, *(3 + 2 * i for i in range(ndim)), *(2 + 2 * i for i in range(ndim))]
    return y.reshape(*y.shape[:2], *split).permute(order).flatten(1, 1 + ndim)


def subpixel_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    upscale_factor: Size = 2,
    padding: Padding = "same",
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """Convolution and shuffle: y = pixel_shuffle(weight ∗ x + bias, r).

    Args:
        x: (N, C_in, \\*spatial).
        weight: (C_out·Π r, C_in / groups, \\*kernel); output channel c owns the Π r kernels from c·Π r on.
        bias: (C_out·Π r,) or None.
        upscale_factor: r ≥ 1, int or one per axis.
        padding, dilation, groups: of the convolution.

    Shape:
        (N, C_in, L, …) → (N, C_out, r·L, …) with "same" padding.

    Raises:
        ValueError: Π r does not divide the output channels.

    Reference: arXiv 1609.05158, section 2.2.
    """
    return pixel_shuffle(conv_nd(x, weight, bias, 1, padding, dilation, groups), upscale_factor)


def subpixel_to_transposed(weight: Tensor, upscale_factor: Size) -> Tensor:
    """The kernel of the transposed convolution (stride r) that equals a sub-pixel convolution without groups.

    W'[c, o, r·(k−1−t) + u] = W[o·Π r + u, c, t] on every axis: a permutation of the weights. With a sub-pixel
    convolution padded by p on both sides, the transposed one is padded by r·(k − 1 − p).

    Args:
        weight: (C_out·Π r, C_in, \\*k).
        upscale_factor: r ≥ 1, int or one per axis.

    Shape:
        (C_out·Π r, C_in, \\*k) → (C_in, C_out, \\*(k·r)).

    Example:
        >>> subpixel_to_transposed(torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]]), 2)
        tensor([[[2., 4., 1., 3.]]])

    Reference: arXiv 1609.07009.
    """
    axes = tuple(range(2, weight.dim()))
    # A kernel, flipped, is a map of C_out·Π r channels: shuffling it puts u behind the tap.
    return pixel_shuffle(weight.flip(axes).transpose(0, 1), upscale_factor)


def transposed_to_subpixel(weight: Tensor, upscale_factor: Size) -> Tensor:
    """The inverse of :func:`subpixel_to_transposed`; the stride r divides the kernel's sizes.

    Example:
        >>> transposed_to_subpixel(torch.tensor([[[2.0, 4.0, 1.0, 3.0]]]), 2)
        tensor([[[1., 2.]],
        <BLANKLINE>
                [[3., 4.]]])
    """
    return pixel_unshuffle(weight, upscale_factor).transpose(0, 1).flip(tuple(range(2, weight.dim())))


def channels_from_depth_to_space(weight: Tensor, upscale_factor: Size) -> Tensor:
    """Weights or biases of a convolution before TensorFlow's ``depth_to_space``, reordered for :func:`pixel_shuffle`.

    There the block's position comes first, u·C + c; here the channel does, c·Π r + u. Axis 0 is reordered; for one
    channel nothing changes.

    Example:
        >>> channels_from_depth_to_space(torch.arange(8), (2, 2))
        tensor([0, 2, 4, 6, 1, 3, 5, 7])
    """
    block = _block(weight, upscale_factor)
    return weight.unflatten(0, (block, -1)).transpose(0, 1).flatten(0, 1)


def channels_to_depth_to_space(weight: Tensor, upscale_factor: Size) -> Tensor:
    """The inverse of :func:`channels_from_depth_to_space`.

    Example:
        >>> channels_to_depth_to_space(torch.tensor([0, 2, 4, 6, 1, 3, 5, 7]), (2, 2))
        tensor([0, 1, 2, 3, 4, 5, 6, 7])
    """
    return weight.unflatten(0, (-1, _block(weight, upscale_factor))).transpose(0, 1).flatten(0, 1)


def _block(weight: Tensor, upscale_factor: Size) -> int:
    """Channels of a block; an int stands for as many axes as the kernel has (two for a bias)."""
    axes = weight.dim() - 2 if weight.dim() > 2 else 2
    factors = _factors(upscale_factor, axes if isinstance(upscale_factor, int) else len(upscale_factor))
    rows = weight.shape[0]
    check(rows % math.prod(factors) == 0, "upscale_factor", upscale_factor, f"must divide {rows} output channels")
    return math.prod(factors)


@torch.no_grad()
def icnr_(tensor: Tensor, upscale_factor: Size, init: Callable[[Tensor], Any]) -> Tensor:
    """Start a sub-pixel convolution as a convolution followed by nearest-neighbour upscaling, without checkerboards.

    One kernel (or bias) is drawn for each output channel and copied to its Π r positions.

    Args:
        tensor: weight (C_out·Π r, …) or bias (C_out·Π r,), overwritten.
        upscale_factor: r ≥ 1 for each axis; an int stands for as many axes as a kernel has (two for a bias).
        init: fills a tensor in place.

    Returns:
        ``tensor``.

    Example:
        >>> weight = icnr_(torch.empty(8, 3, 3, 3), (2, 2), nn.init.kaiming_normal_)
        >>> bool((weight[0] == weight[3]).all()), bool((weight[3] == weight[4]).all())
        (True, False)

    Reference: arXiv 1707.02937.
    """
    block = _block(tensor, upscale_factor)
    base = torch.empty_like(tensor[::block])
    init(base)
    return tensor.copy_(base.repeat_interleave(block, 0))


class PositionBias(nn.Module):
    """Adds bias[c, u] to the positions r·i + u of channel c: what a transposed convolution's bias cannot say."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias.detach().clone())

    def forward(self, y: Tensor) -> Tensor:
        """(N, C, r·L, …) → the same."""
        factors = self.bias.shape[1:]
        repeats = (1, *(n // r for n, r in zip(y.shape[2:], factors, strict=True)))
        return y + self.bias.repeat(repeats)


class Blur(nn.Module):
    """Mean over two positions an axis, the map's size kept by repeating its first."""

    def forward(self, y: Tensor) -> Tensor:
        """(N, C, \\*spatial) → the same."""
        for axis in range(2, y.dim()):
            first, rest = y.narrow(axis, 0, 1), y.narrow(axis, 0, y.shape[axis] - 1)
            y = y.lerp(torch.cat([first, rest], axis), 0.5)
        return y


class SubpixelConv(nn.Module):
    """Convolution that enlarges the map r times: Π r kernels for each output channel, interleaved.

    Args:
        in_channels, out_channels: both divisible by ``groups``; ``out_channels`` is that of the result.
        kernel_size: ≥ 1, odd or even, at low resolution.
        upscale_factor: r ≥ 1, int or one per axis.
        padding: "same" (the result is exactly r times as large), "valid" or integers.
        dilation: ≥ 1.
        groups: blocks of channels that do not see each other.
        bias: learn an additive bias for each position of each channel.
        icnr: start as nearest-neighbour upscaling of one convolution; else every position for itself.
        blur: average each output with the ones before it on every axis (edges repeated), which removes what is left of
            a checkerboard.

    Shape:
        (N, in_channels, L, …) → (N, out_channels, r·L, …).

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> up = SubpixelConv2d(8, 3, upscale_factor=3)
        >>> up(torch.zeros(1, 8, 5, 7)).shape
        torch.Size([1, 3, 15, 21])
        >>> up.merge()
        ConvTranspose2d(8, 3, kernel_size=(9, 9), stride=(3, 3), padding=(3, 3))

    Reference: arXiv 1609.05158; ICNR: arXiv 1707.02937.
    """

    ndim: ClassVar[int] = 0

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size = 3,
        upscale_factor: Size = 2,
        padding: Padding = "same",
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        icnr: bool = True,
        blur: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_channels(in_channels, out_channels, groups)
        check_padding(padding, self.ndim)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = ntuple("kernel_size", kernel_size, self.ndim)
        self.upscale_factor = _factors(upscale_factor, self.ndim)
        self.dilation = ntuple("dilation", dilation, self.ndim)
        self.padding, self.icnr = padding, icnr
        rows = out_channels * math.prod(self.upscale_factor)
        shape = (rows, in_channels // groups, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(rows, device=device, dtype=dtype)) if bias else None
        self.blur = Blur() if blur else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """PyTorch's convolution defaults, drawn once for each output channel with ``icnr``."""
        bound = 1 / math.sqrt(self.weight[0].numel())
        factors = self.upscale_factor if self.icnr else (1,)
        for tensor in (self.weight, self.bias):
            if tensor is not None:
                icnr_(tensor, factors, lambda t: nn.init.uniform_(t, -bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x`` and interleave."""
        check_input(x, self.in_channels, self.ndim)
        y = subpixel_conv(x, self.weight, self.bias, self.upscale_factor, self.padding, self.dilation, self.groups)
        return y if self.blur is None else self.blur(y)

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """The equal ``nn.ConvTransposeNd`` with stride r, for tools that know no shuffle; as many multiply-adds.

        Where the biases of a channel's positions differ, :class:`PositionBias` follows it; where there is a blur, that.

        Raises:
            ValueError: more padding than the kernel is long, which no transposed convolution has.
        """
        pads = resolve_padding(self.padding, self.kernel_size, self.dilation)
        weight = dilate_kernel(self.weight, self.dilation)
        # A zero tap in front makes uneven padding even.
        uneven = [int(a != b) for a, b in pads]
        weight = F.pad(weight, [p for u in reversed(uneven) for p in (u, 0)])
        before = [a + u for (a, _), u in zip(pads, uneven, strict=True)]
        reach = [k - 1 - p for k, p in zip(weight.shape[2:], before, strict=True)]
        check(min(reach) >= 0, "padding", self.padding, "merging needs padding below the kernel's extent; use 'same'")
        factors = self.upscale_factor
        kernel = torch.cat([subpixel_to_transposed(w, factors) for w in weight.chunk(self.groups)])
        table = None if self.bias is None else self.bias.unflatten(0, (-1, *factors))
        first = None if table is None else table.flatten(1)[:, 0]
        plain = table is None or bool((table.flatten(1) == table.flatten(1)[:, :1]).all())
        conv: nn.Module = _TRANSPOSED[self.ndim](
            self.in_channels,
            self.out_channels,
            tuple(kernel.shape[2:]),
            stride=factors,
            padding=tuple(r * m for r, m in zip(factors, reach, strict=True)),
            groups=self.groups,
            bias=table is not None and plain,
            device=weight.device,
            dtype=weight.dtype,
        )
        state = {"weight": kernel} if first is None or not plain else {"weight": kernel, "bias": first}
        conv.load_state_dict(state)
        rest: list[nn.Module] = [] if plain or table is None else [PositionBias(table)]
        rest += [] if self.blur is None else [Blur()]
        return nn.Sequential(conv, *rest).eval() if rest else conv.eval()

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"upscale_factor={self.upscale_factor}, padding={self.padding!r}, dilation={self.dilation}, "
            f"groups={self.groups}, bias={self.bias is not None}"
        )


class SubpixelConv1d(SubpixelConv):
    """Sub-pixel convolution over (N, C, L)."""

    ndim = 1


@part(
    "subpixel",
    paper="espcn",
    kind="layer",
    dims=(1, 2, 3),
    merges="self",
    probe={"build": {"in_channels": 4, "out_channels": 3, "upscale_factor": 2}, "inputs": [[2, 4, 5, 6]]},
    keywords="sub-pixel convolution pixel shuffle upsampling super resolution ICNR transposed convolution checkerboard",
)
class SubpixelConv2d(SubpixelConv):
    """Sub-pixel convolution over (N, C, H, W): r² kernels for each output channel, interleaved into r times the size.

    Arguments as :class:`SubpixelConv`.
    """

    ndim = 2


class SubpixelConv3d(SubpixelConv):
    """Sub-pixel convolution over (N, C, D, H, W)."""

    ndim = 3
