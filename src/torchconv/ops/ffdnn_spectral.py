"""The global path of fast Fourier convolution: a 1 × 1 convolution, batch norm and ReLU on the spectrum.

Chi, Jiang, Mu 2020, "Fast Fourier Convolution", NeurIPS; used for crop-stress series by Shi, Han et al. 2023,
arXiv 2306.17207. A Fourier unit has 4·C·C' + 4·C' parameters whatever the size of the map, 2·C·C' multiply-adds a
position and two FFTs, and sees the whole map.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_positive
from torchconv.catalog import part
from torchconv.kernels._layout import keep_layout
from torchconv.kernels.precision import widen
from torchconv.ops._common import (
    BATCH_NORM,
    CONV,
    BatchNorm,
    Size,
    check_channels,
    check_input,
    fold_bn,
    make_conv,
    ntuple,
)

_AVG_POOL: tuple[Any, ...] = (None, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)


def on_spectrum(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a map to the spectrum over all positions, written as real channels.

    Args:
        x: a map.
        change: gets the orthonormal half spectrum as (N, 2C, \\*bins), channels re₀, im₀, re₁, im₁, …, and returns
            (N, 2C', \\*bins).

    Shape:
        (N, C, \\*spatial) → (N, C', \\*spatial). Half precision is transformed in float32.

    Example:
        >>> x = torch.tensor([[[1.0, 2.0, 4.0]]])
        >>> on_spectrum(x, lambda s: 2 * s).round(decimals=3)
        tensor([[[2., 4., 8.]]])

    Reference: Chi et al. 2020, section 3.
    """
    axes, sizes = tuple(range(2, x.dim())), x.shape[2:]
    if x.shape[0] == 0:  # not every FFT library takes an empty batch
        outputs = change(x.new_zeros(0, 2 * x.shape[1], *sizes[:-1], sizes[-1] // 2 + 1)).shape[1] // 2
        return x.new_zeros(0, outputs, *sizes)
    wide = widen(x)
    spectrum = torch.view_as_real(torch.fft.rfftn(wide, dim=axes, norm="ortho"))
    y = change(spectrum.movedim(-1, 2).flatten(1, 2).to(x.dtype))
    pairs = y.unflatten(1, (-1, 2)).movedim(2, -1)
    real, imaginary = widen(pairs).unbind(-1)
    back = torch.fft.irfftn(torch.complex(real, imaginary), s=sizes, dim=axes, norm="ortho")
    return keep_layout(back.to(y.dtype), x)


def quarters(x: Tensor) -> Tensor:
    """The half-size crops of a map, stacked as channels: top left, bottom left, top right, bottom right.

    Args:
        x: a map with an even number of positions along each axis.

    Shape:
        (N, C, \\*spatial) → (N, 2^n · C, \\*spatial / 2), n spatial axes.

    Raises:
        ValueError: an odd size.

    Example:
        >>> quarters(torch.arange(4.0).reshape(1, 1, 2, 2)).flatten()
        tensor([0., 2., 1., 3.])
    """
    odd = [int(n) for n in x.shape[2:] if n % 2]
    if odd:
        raise ValueError(f"x of shape {tuple(x.shape)}: the local Fourier unit halves the map; pad it to even sizes")
    for axis in range(2, x.dim()):
        x = torch.cat(x.chunk(2, axis), 1)
    return x


@part(
    "fourier-unit",
    paper="ffdnn",
    kind="layer",
    dims=(1, 2, 3),
    merges="self",
    probe={"build": {"in_channels": 4, "out_channels": 6, "ndim": 2}, "inputs": [[2, 4, 6, 7]]},
    keywords="FFC Fourier unit spectrum global receptive field FFT",
)
class FourierUnit(nn.Module):
    """1 × 1 convolution, batch norm and ReLU on the spectrum.

    Args:
        in_channels, out_channels: channels, both divisible by ``groups`` when doubled.
        groups: of the convolution on the doubled channels.
        ndim: spatial axes: 1, 2 or 3.

    Shape:
        (N, in_channels, \\*spatial) → (N, out_channels, \\*spatial).

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> FourierUnit(4, 6)(torch.zeros(1, 4, 5, 8)).shape
        torch.Size([1, 6, 5, 8])

    Reference: Chi et al. 2020, section 3; arXiv 2306.17207.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        groups: int = 1,
        ndim: int = 2,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_positive("in_channels", in_channels)
        check_positive("out_channels", out_channels)
        check(ndim in (1, 2, 3), "ndim", ndim, "must be 1, 2 or 3")
        check_channels(2 * in_channels, 2 * out_channels, groups)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_channels, self.out_channels, self.ndim = in_channels, out_channels, ndim
        self.conv_layer = CONV[ndim](2 * in_channels, 2 * out_channels, 1, groups=groups, bias=False, **options)
        self.bn = BATCH_NORM[ndim](2 * out_channels, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Transform, convolve, transform back."""
        check_input(x, self.in_channels, self.ndim)
        return on_spectrum(x, lambda s: F.relu(self.bn(self.conv_layer(s))))

    def merge(self) -> FourierUnit:
        """The same unit with its batch norm folded into its convolution, for inference."""
        twin = copy.deepcopy(self).eval()
        twin.conv_layer, twin.bn = _folded(self.conv_layer, self.bn)
        return twin


def _folded(conv: Any, norm: nn.Module) -> tuple[nn.Module, nn.Module]:
    if isinstance(norm, nn.Identity):  # folded before
        return conv, norm
    assert isinstance(norm, BatchNorm)
    return make_conv(*fold_bn(conv.weight, conv.bias, norm), groups=conv.groups), nn.Identity()


@part(
    "spectral-transform",
    paper="ffdnn",
    kind="layer",
    dims=(1, 2, 3),
    merges="self",
    probe={
        "build": {"in_channels": 6, "out_channels": 8, "enable_lfu": True},
        "inputs": [[2, 6, 8, 6]],
    },
    keywords="FFC spectral transform local Fourier unit",
)
class SpectralTransform(nn.Module):
    """The global path of a fast Fourier convolution: P · (h + unit(h) + local_unit(h)), h = relu(bn(Q · x)).

    Args:
        in_channels, out_channels: channels; h has half of ``out_channels``.
        stride: the map is averaged over stride^n blocks first.
        groups: of all convolutions.
        enable_lfu: add the local Fourier unit: the first 1/2^n of h's channels, cut into half-size crops that are
            stacked as channels, through a Fourier unit, tiled back. Needs even maps.
        ndim: spatial axes n: 1, 2 or 3.
        ceil_mode: where ``stride`` does not divide the map, average the smaller block at the end too; the authors leave
            it out.

    Shape:
        (N, in_channels, \\*spatial) → (N, out_channels, \\*⌊spatial/stride⌋), ⌈spatial/stride⌉ with ``ceil_mode``.

    Raises:
        ValueError: an argument is out of range, or an odd map with the local unit.

    Example:
        >>> SpectralTransform(4, 8, stride=2)(torch.zeros(1, 4, 8, 8)).shape
        torch.Size([1, 8, 4, 4])

    Reference: Chi et al. 2020, figure 2.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: Size = 1,
        groups: int = 1,
        enable_lfu: bool = True,
        ndim: int = 2,
        *,
        ceil_mode: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_channels(in_channels, out_channels, groups)
        check(ndim in (1, 2, 3), "ndim", ndim, "must be 1, 2 or 3")
        hidden = max(out_channels // 2, 1)
        check(hidden % groups == 0, "groups", groups, f"must divide the {hidden} channels between the convolutions")
        if enable_lfu:
            pieces = 2**ndim
            remedy = f"cuts the {hidden} channels between the convolutions in {pieces}; take a multiple or leave it out"
            check(hidden % pieces == 0, "enable_lfu", enable_lfu, remedy)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_channels, self.ndim, self.enable_lfu, self.ceil_mode = in_channels, ndim, enable_lfu, ceil_mode
        self.stride = ntuple("stride", stride, ndim)
        self.conv1 = nn.Sequential(
            CONV[ndim](in_channels, hidden, 1, groups=groups, bias=False, **options),
            BATCH_NORM[ndim](hidden, **options),
            nn.ReLU(),
        )
        self.fu = FourierUnit(hidden, hidden, groups, ndim, **options)
        if enable_lfu:
            self.lfu = FourierUnit(hidden, hidden, groups, ndim, **options)
        self.conv2 = CONV[ndim](hidden, out_channels, 1, groups=groups, bias=False, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the transform."""
        check_input(x, self.in_channels, self.ndim)
        if set(self.stride) != {1}:
            fits = self.ceil_mode or all(n >= s for n, s in zip(x.shape[2:], self.stride, strict=True))
            check(fits, "stride", self.stride, f"larger than the map of x, {tuple(x.shape)}; use ceil_mode=True")
            x = _AVG_POOL[self.ndim](x, self.stride, self.stride, ceil_mode=self.ceil_mode)
        h = self.conv1(x)
        y = h + self.fu(h)
        if self.enable_lfu:
            crops = quarters(h[:, : h.shape[1] // 2**self.ndim])
            y = y + self.lfu(crops).repeat(1, 1, *[2] * self.ndim)
        z: Tensor = self.conv2(y)
        return z

    def merge(self) -> SpectralTransform:
        """The same transform with its batch norms folded into its convolutions, for inference."""
        twin = copy.deepcopy(self).eval()
        twin.conv1[0], twin.conv1[1] = _folded(self.conv1[0], self.conv1[1])
        twin.fu = self.fu.merge()
        if self.enable_lfu:
            twin.lfu = self.lfu.merge()
        return twin
