"""Fast Fourier convolution: local channels by convolutions, global ones also through the spectrum of the whole map.

Shi, Han et al. 2023, "A Fast Fourier Convolutional Deep Neural Network For Accurate and Explainable Discrimination Of
Wheat Yellow Rust And Nitrogen Deficiency From Sentinel-2 Time-Series Data", arXiv 2306.17207. The building block is
FFC: Chi, Jiang, Mu 2020, "Fast Fourier Convolution", NeurIPS.

    y_local  = conv(x_local) + conv(x_global)
    y_global = conv(x_local) + spectral(x_global)
    spectral(x) = P · (h + unit(h) + local_unit(h)),   h = relu(bn(Q · x)) with half of the output channels
    unit(h) = irfft(relu(bn(W · rfft(h)))),   real and imaginary parts as 2C channels

With shares of one half: 3/4 of the convolution's parameters and multiply-adds, and 1 × 1 ones and two FFTs of a quarter
of the channels for the rest. It is not equivariant to shifts: a shift turns the phases, and the ReLU acts on real and
imaginary parts. Parts for time series are in ``ops.ffdnn_series`` (Fourier kernels, indices) and
``ops.ffdnn_capsules``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchconv._common import check
from torchconv.catalog import part
from torchconv.kernels._layout import keep_layout
from torchconv.ops._common import (
    BATCH_NORM,
    Padding,
    Size,
    check_channels,
    check_input,
    check_padding,
    check_same,
    ntuple,
)
from torchconv.ops.ffdnn_spectral import SpectralTransform
from torchconv.ops.plain import PlainConv1d, PlainConv2d, PlainConv3d

PLAIN: tuple[Any, ...] = (None, PlainConv1d, PlainConv2d, PlainConv3d)


def split_channels(channels: int, ratio: float) -> tuple[int, int]:
    """(local, global) channels: the global part is ⌊channels · ratio⌋, the last ones."""
    other = int(channels * ratio)
    return channels - other, other


@part(
    "ffc",
    paper="ffdnn",
    kind="operator",
    dims=(1, 2, 3),
    mixes="space+channels",
    supports=("stride", "channels", "groups", "dilation", "even"),
    merges="self",
    mixer={"kernel_size": 3},
    keywords="fast Fourier convolution FFC global receptive field spectral inpainting LaMa FFT",
)
class FFC(nn.Module):
    """Fast Fourier convolution: local channels by convolutions, global ones also through the spectrum.

    Args:
        in_channels, out_channels: channels; unset ``out_channels`` is ``in_channels``.
        kernel_size, stride, dilation: of the three convolutions; the global path averages over stride^n blocks.
        padding: "same", or the integers that are it; any where there is no global path.
        groups: of the convolutions; the global path has half as many (at least 1).
        bias: biases of the convolutions; the global path has none.
        ratio_gin, ratio_gout: shares of the input and output channels that are global: the last ones.
        enable_lfu: local Fourier unit, see :class:`SpectralTransform`.

    Shape:
        (N, in_channels, \\*spatial) → (N, out_channels, \\*⌈spatial/stride⌉).

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> FFC2d(6, 8, stride=2)(torch.zeros(1, 6, 9, 10)).shape
        torch.Size([1, 8, 5, 5])

    Reference: Chi et al. 2020; arXiv 2306.17207.
    """

    ndim: ClassVar[int] = 0

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_size: Size = 3,
        stride: Size = 1,
        padding: Padding = "same",
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        ratio_gin: float = 0.5,
        ratio_gout: float = 0.5,
        enable_lfu: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        check_channels(in_channels, out_channels, groups)
        for name, ratio in (("ratio_gin", ratio_gin), ("ratio_gout", ratio_gout)):
            check(0 <= ratio <= 1, name, ratio, "must lie between 0 and 1")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size = ntuple("kernel_size", kernel_size, self.ndim)
        self.stride = ntuple("stride", stride, self.ndim)
        dilations = ntuple("dilation", dilation, self.ndim)
        self.in_local, self.in_global = split_channels(in_channels, ratio_gin)
        self.out_local, self.out_global = split_channels(out_channels, ratio_gout)
        parts = (self.in_local, self.in_global, self.out_local, self.out_global)
        remedy = f"must divide the local and global channels {parts}"
        check(all(c % groups == 0 for c in parts), "groups", groups, remedy)
        check_padding(padding, self.ndim)
        spectral = bool(self.in_global and self.out_global)
        if spectral:
            check_same(padding, self.kernel_size, "the global path of FFC", dilations)
        options: dict[str, Any] = {"device": device, "dtype": dtype}

        def conv(before: int, after: int) -> nn.Module | None:
            if not before or not after:
                return None
            size = (self.kernel_size, self.stride, padding, dilations, groups, bias)
            module: nn.Module = PLAIN[self.ndim](before, after, *size, **options)
            return module

        self.convl2l = conv(self.in_local, self.out_local)
        self.convl2g = conv(self.in_local, self.out_global)
        self.convg2l = conv(self.in_global, self.out_local)
        self.convg2g: SpectralTransform | None = None
        if spectral:
            sizes = (self.in_global, self.out_global, self.stride, max(groups // 2, 1), enable_lfu, self.ndim)
            self.convg2g = SpectralTransform(*sizes, ceil_mode=True, **options)

    def local_global(self, x_local: Tensor | None, x_global: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The two parts of the output from the two parts of the input; a part without channels is None."""
        for name, part_, channels in (("x_local", x_local, self.in_local), ("x_global", x_global, self.in_global)):
            if (part_ is None) != (channels == 0):
                given = None if part_ is None else tuple(part_.shape)
                raise ValueError(f"{name}={given}: this layer has {channels} such channels; give them, or None for 0")
        y_local = _sum(_apply(self.convl2l, x_local), _apply(self.convg2l, x_global))
        y_global = _sum(_apply(self.convl2g, x_local), _apply(self.convg2g, x_global))
        return y_local, y_global

    def forward(self, x: Tensor) -> Tensor:
        """Both parts in one tensor, the local channels first."""
        check_input(x, self.in_channels, self.ndim)
        x_local, x_global = x.split([self.in_local, self.in_global], 1)
        found = self.local_global(x_local if self.in_local else None, x_global if self.in_global else None)
        kept = [y for y in found if y is not None]
        return keep_layout(torch.cat(kept, 1) if len(kept) > 1 else kept[0], x)

    def merge(self) -> FFC:
        """The same layer with the batch norms of the global path folded in, for inference."""
        twin = copy.deepcopy(self).eval()
        if self.convg2g is not None:
            twin.convg2g = self.convg2g.merge()
        return twin


def _apply(module: nn.Module | None, x: Tensor | None) -> Tensor | None:
    return None if module is None or x is None else module(x)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


class FFC1d(FFC):
    """Fast Fourier convolution over (N, C, L)."""

    ndim = 1


class FFC2d(FFC):
    """Fast Fourier convolution over (N, C, H, W)."""

    ndim = 2


class FFC3d(FFC):
    """Fast Fourier convolution over (N, C, D, H, W)."""

    ndim = 3


_FFC: tuple[Any, ...] = (None, FFC1d, FFC2d, FFC3d)


@part(
    "ffc-block",
    paper="ffdnn",
    kind="layer",
    dims=(1, 2, 3),
    merges="self",
    probe={
        "build": {"in_channels": 8, "out_channels": 6, "ratio_gout": 0.34},
        "inputs": [[2, 4, 6, 7], [2, 4, 6, 7]],
    },
    keywords="FFC block batch norm activation local global",
)
class FFCBlock(nn.Module):
    """Fast Fourier convolution with a batch norm and an activation on each part, local and global kept apart.

    Args:
        in_channels, out_channels: channels of both parts together.
        kernel_size, stride, padding, dilation, groups, bias: as in :class:`FFC`; published without biases.
        ratio_gin, ratio_gout: shares of the channels that are global.
        enable_lfu: local Fourier unit.
        activation: a module class, called without arguments.
        ndim: spatial axes: 1, 2 or 3.

    Shape:
        x_local, x_global → y_local, y_global; a part without channels is None on both sides.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> block = FFCBlock(8, 8)
        >>> [y.shape for y in block(torch.zeros(1, 4, 6, 6), torch.zeros(1, 4, 6, 6))]
        [torch.Size([1, 4, 6, 6]), torch.Size([1, 4, 6, 6])]

    Reference: Chi et al. 2020.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size = 3,
        stride: Size = 1,
        padding: Padding = "same",
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = False,
        *,
        ratio_gin: float = 0.5,
        ratio_gout: float = 0.5,
        enable_lfu: bool = False,
        activation: Callable[[], nn.Module] = nn.ReLU,
        ndim: int = 2,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check(ndim in (1, 2, 3), "ndim", ndim, "must be 1, 2 or 3")
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.ffc: FFC = _FFC[ndim](
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            ratio_gin=ratio_gin,
            ratio_gout=ratio_gout,
            enable_lfu=enable_lfu,
            **options,
        )
        norm = BATCH_NORM[ndim]
        self.bn_l = norm(self.ffc.out_local, **options) if self.ffc.out_local else nn.Identity()
        self.bn_g = norm(self.ffc.out_global, **options) if self.ffc.out_global else nn.Identity()
        self.act_l, self.act_g = activation(), activation()

    def forward(self, x_local: Tensor | None, x_global: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """Apply the block."""
        y_local, y_global = self.ffc.local_global(x_local, x_global)
        return (
            None if y_local is None else self.act_l(self.bn_l(y_local)),
            None if y_global is None else self.act_g(self.bn_g(y_global)),
        )

    def merge(self) -> FFCBlock:
        """The same block with the batch norms of the global path folded in, for inference.

        Those after the sums of two paths stay.
        """
        twin = copy.deepcopy(self).eval()
        twin.ffc = self.ffc.merge()
        return twin
