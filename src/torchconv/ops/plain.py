"""The plain convolutions that every other operator is measured against.

- ``conv``: dense cross-correlation, y[o] = b[o] + Σ_{c,t} W[o,c,t] · x[c, i + t].
  k^n · C_in/g · C_out parameters, as many multiply-adds per output position.
- ``depthwise``: one kernel a channel (groups = channels), k^n · C parameters. Space only.
- ``separable``: depthwise k × k, then 1 × 1 over channels (Sifre 2014; Chollet 2017, arXiv 1610.02357), without a
  nonlinearity between: k^n · C_in + C_in · C_out parameters.
- ``dilated``: taps ``dilation`` apart (à trous; Yu & Koltun 2016, arXiv 1511.07122), extent d(k−1)+1.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchconv.catalog import part
from torchconv.ops._common import (
    Padding,
    Size,
    check_channels,
    check_depthwise,
    check_input,
    check_padding,
    conv_nd,
    make_conv,
    ntuple,
)


@part(
    "conv",
    paper=None,
    kind="operator",
    dims=(1, 2, 3),
    mixes="space+channels",
    supports=("stride", "channels", "groups", "dilation", "even", "padding"),
    merges="conv",
    mixer={"kernel_size": 3},
    keywords="plain standard dense convolution baseline",
)
class PlainConv(nn.Module):
    """Plain convolution with ``nn.ConvNd``'s arguments, and "same" padding at any stride.

    Args:
        in_channels, out_channels: channels, both divisible by ``groups``.
        kernel_size: taps per axis, ≥ 1, odd or even.
        stride, dilation: ≥ 1, int or one per axis.
        padding: int or one per axis, "valid", or "same" (output length ceil(L / stride)).
        groups: blocks of channels that do not see each other.
        bias: learn an additive bias.

    Shape:
        (N, in_channels, \\*spatial) → (N, out_channels, \\*spatial').

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> PlainConv2d(3, 8, 3, stride=2, padding="same")(torch.zeros(1, 3, 7, 8)).shape
        torch.Size([1, 8, 4, 4])
    """

    ndim: ClassVar[int] = 0

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size = 3,
        stride: Size = 1,
        padding: Padding = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_channels(in_channels, out_channels, groups)
        check_padding(padding, self.ndim)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = ntuple("kernel_size", kernel_size, self.ndim)
        self.stride = ntuple("stride", stride, self.ndim)
        self.dilation = ntuple("dilation", dilation, self.ndim)
        self.padding = padding
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """PyTorch's convolution defaults: weight and bias uniform in ±1/√fan_in."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x``."""
        check_input(x, self.in_channels, self.ndim)
        return conv_nd(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def merge(self) -> nn.Module:
        """The same map as an ``nn.ConvNd``."""
        return make_conv(self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding!r}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}"
        )


class PlainConv1d(PlainConv):
    """Plain convolution over (N, C, L)."""

    ndim = 1


class PlainConv2d(PlainConv):
    """Plain convolution over (N, C, H, W)."""

    ndim = 2


class PlainConv3d(PlainConv):
    """Plain convolution over (N, C, D, H, W)."""

    ndim = 3


@part(
    "depthwise",
    paper=None,
    kind="operator",
    dims=(1, 2, 3),
    mixes="space",
    supports=("stride", "dilation", "even", "padding"),
    merges="conv",
    mixer={"kernel_size": 7},
    keywords="channelwise baseline ConvNeXt mixer",
)
class DepthwiseConv(PlainConv):
    """Depthwise convolution: one kernel a channel, channels do not mix.

    Arguments as :class:`PlainConv`; ``out_channels`` equals ``in_channels``, ``groups`` is left unset.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_size: Size = 3,
        stride: Size = 1,
        padding: Padding = 0,
        dilation: Size = 1,
        groups: int | None = None,
        bias: bool = True,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        check_depthwise(in_channels, out_channels, groups, "depthwise convolution")
        super().__init__(
            in_channels,
            in_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            in_channels,
            bias,
            device=device,
            dtype=dtype,
        )


class DepthwiseConv1d(DepthwiseConv):
    """Depthwise convolution over (N, C, L)."""

    ndim = 1


class DepthwiseConv2d(DepthwiseConv):
    """Depthwise convolution over (N, C, H, W)."""

    ndim = 2


class DepthwiseConv3d(DepthwiseConv):
    """Depthwise convolution over (N, C, D, H, W)."""

    ndim = 3


@part(
    "dilated",
    paper=None,
    kind="operator",
    dims=(1, 2, 3),
    mixes="space+channels",
    supports=("stride", "channels", "groups", "dilation", "even", "padding"),
    merges="conv",
    mixer={"kernel_size": 3, "groups": "channels"},
    keywords="atrous à trous dilation baseline long range receptive field",
)
class DilatedConv(PlainConv):
    """Dilated (atrous) convolution: a plain convolution whose taps stand ``dilation`` apart, 2 by default.

    Arguments as :class:`PlainConv`; the kernel's extent is dilation · (kernel_size − 1) + 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size = 3,
        stride: Size = 1,
        padding: Padding = 0,
        dilation: Size = 2,
        groups: int = 1,
        bias: bool = True,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            device=device,
            dtype=dtype,
        )


class DilatedConv1d(DilatedConv):
    """Dilated convolution over (N, C, L)."""

    ndim = 1


class DilatedConv2d(DilatedConv):
    """Dilated convolution over (N, C, H, W)."""

    ndim = 2


class DilatedConv3d(DilatedConv):
    """Dilated convolution over (N, C, D, H, W)."""

    ndim = 3


@part(
    "separable",
    paper=None,
    kind="operator",
    dims=(1, 2, 3),
    mixes="space+channels",
    supports=("stride", "channels", "dilation", "even", "padding"),
    merges="conv",
    mixer={"kernel_size": 7},
    keywords="depthwise separable pointwise MobileNet Xception baseline",
)
class SeparableConv(nn.Module):
    """Depthwise separable convolution: a depthwise kernel a channel, then a 1 × 1 convolution over channels.

    Arguments as :class:`PlainConv`, without groups. :meth:`merge` gives the single dense convolution that equals it
    exactly, W[o,c,t] = P[o,c] · D[c,t]; for k > 1 that one costs more, so keep the factored form for speed.
    """

    ndim: ClassVar[int] = 0

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size = 3,
        stride: Size = 1,
        padding: Padding = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if groups != 1:
            raise ValueError(f"groups={groups}: a separable convolution mixes all channels; use groups=1")
        check_channels(in_channels, out_channels, 1)
        options = {"device": device, "dtype": dtype}
        depthwise, pointwise = _FACTORS[self.ndim]
        self.depthwise = depthwise(
            in_channels, None, kernel_size, stride, padding, dilation, None, False, device=device, dtype=dtype
        )
        self.pointwise = pointwise(in_channels, out_channels, 1, bias=bias, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x`` (N, in_channels, \\*spatial)."""
        y: Tensor = self.pointwise(self.depthwise(x))
        return y

    def merge(self) -> nn.Module:
        """One dense ``nn.ConvNd`` with the product kernel."""
        d = self.depthwise
        weight = self.pointwise.weight * d.weight.transpose(0, 1)
        return make_conv(weight, self.pointwise.bias, d.stride, d.padding, d.dilation)


_FACTORS: tuple[Any, ...] = (
    None,
    (DepthwiseConv1d, PlainConv1d),
    (DepthwiseConv2d, PlainConv2d),
    (DepthwiseConv3d, PlainConv3d),
)


class SeparableConv1d(SeparableConv):
    """Depthwise separable convolution over (N, C, L)."""

    ndim = 1


class SeparableConv2d(SeparableConv):
    """Depthwise separable convolution over (N, C, H, W)."""

    ndim = 2


class SeparableConv3d(SeparableConv):
    """Depthwise separable convolution over (N, C, D, H, W)."""

    ndim = 3
