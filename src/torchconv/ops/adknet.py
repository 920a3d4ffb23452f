"""ADK-Net's operator: every output pixel and colour gets a resampling kernel of its own, predicted from the content.

Pise, Ghosh 2025, "Learned Adaptive Kernels for High-Fidelity Image Downscaling", arXiv 2511.01620; the fractional form
is that of CAR (Sun, Chen 2020, "Learned Image Downscaling for Upscaling using Content Adaptive Resampler", arXiv
1907.12904).

    K = softmax over the taps of (base + generator(features(x)))            k^d taps a pixel and colour
    y[n, c, p] = Σ_t K[n, c, t, p] · x[n, c, s·p + ⌊(s − k)/2⌋ + t]         mirrored at the border

Kernels that sum to one keep a constant map constant; the base, at first a Gaussian, is what training starts from.
Cost an output pixel, T = k^d taps, W = width of the generator: C·T multiply-adds to apply the kernels, and
(3s)^d·C·W + 3^d·W² + W·C·T to predict them, which are also the parameters (plus 2W biases and C·T of the base).
"""

from __future__ import annotations

import itertools
import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check_choice, check_positive
from torchconv.catalog import part
from torchconv.kernels import adaptive_downscale
from torchconv.kernels.resample import LEAST_WEIGHT, NORMALISATIONS, mirror_pad, normalise_kernels
from torchconv.ops._adknet_fractional import fractional_downscale
from torchconv.ops._common import (
    CONV,
    Padding,
    Size,
    check_depthwise,
    check_input,
    check_padding,
    check_same,
    check_unit,
    ntuple,
)

__all__ = [
    "ADKConv",
    "ADKConv1d",
    "ADKConv2d",
    "ADKConv3d",
    "CARDownscale2d",
    "adaptive_downscale",
    "fractional_downscale",
    "normalise_kernels",
]


def _classic(
    kernel_size: tuple[int, ...], scale: tuple[int, ...], normalisation: str, centre: tuple[float, ...]
) -> Tensor:
    """A Gaussian of s/2 elements around tap ``centre``, as what comes before the normalisation."""
    squares = []
    for k, s, c in zip(kernel_size, scale, centre, strict=True):
        squares.append([((t - c) / (s / 2)) ** 2 for t in range(k)])
    logits = torch.tensor([-0.5 * sum(tap) for tap in itertools.product(*squares)])
    if normalisation == "softmax":
        return logits
    kernel = torch.softmax(logits, 0)
    return kernel if normalisation == "none" else kernel.clamp(min=2 * LEAST_WEIGHT)


class _Features(nn.Module):
    """What the content says about an output pixel: a strided convolution and a 3 × 3 one, mirrored borders.

    A convolution with kernel 3s and stride s is a space-to-depth by s with a convolution of 3 after it.
    """

    def __init__(self, channels: int, width: int, scale: tuple[int, ...], bias: bool, options: dict[str, Any]) -> None:
        super().__init__()
        conv, self.scale = CONV[len(scale)], scale
        self.reduce = conv(channels, width, tuple(3 * s for s in scale), stride=scale, bias=bias, **options)
        self.trunk = conv(width, width, 3, bias=bias, **options)
        for layer in (self.reduce, self.trunk):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def forward(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Features of the ``grid`` of output pixels."""
        x = mirror_pad(x, [(-s, s * (n + 1)) for s, n in zip(self.scale, grid, strict=True)])
        x = F.relu(self.reduce(x))
        return F.relu(self.trunk(mirror_pad(x, [(-1, n + 1) for n in grid])))


@part(
    "adknet",
    paper="adknet",
    kind="operator",
    dims=(1, 2, 3),
    mixes="space",
    supports=("stride", "even"),
    mixer={"kernel_size": 3},
    keywords="adaptive kernels image downscaling resampling per pixel per channel kernel prediction network KPN",
)
class ADKConv(nn.Module):
    """Adaptive-kernel convolution: a small generator predicts one kernel per output pixel and channel and applies it.

    With a stride it is the paper's downscaler, at stride 1 a content-adaptive filter.

    Args:
        in_channels: C ≥ 1.
        out_channels: C or unset.
        kernel_size: k; 3·stride when unset, which centres the windows, as any k with the parity of the stride does.
        stride: the scale s.
        padding: "same"; borders are mirrored.
        dilation: 1.
        groups: C or unset.
        bias: biases in the generator.
        width: channels of the generator.
        normalisation: of the kernels: "softmax", "sum" or "none" (signed kernels that can sharpen).

    Shape:
        (N, C, \\*spatial) → (N, C, \\*⌈spatial/s⌉).

    Raises:
        ValueError: an argument is out of range or not supported; the message names it.

    Example:
        >>> ADKConv2d(3, stride=2)(torch.zeros(1, 3, 12, 8)).shape
        torch.Size([1, 3, 6, 4])

    Reference: Pise, Ghosh, arXiv 2511.01620.
    """

    ndim: ClassVar[int] = 0

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_size: Size | None = None,
        stride: Size = 1,
        padding: Padding = "same",
        dilation: Size = 1,
        groups: int | None = None,
        bias: bool = True,
        *,
        width: int = 16,
        normalisation: str = "softmax",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_depthwise(in_channels, out_channels, groups, "ADKConv")
        self.stride = ntuple("stride", stride, self.ndim)
        default = tuple(3 * s for s in self.stride)
        self.kernel_size = ntuple("kernel_size", default if kernel_size is None else kernel_size, self.ndim)
        check_padding(padding, self.ndim)
        check_same(padding, self.kernel_size, "ADKConv")
        check_unit("dilation", dilation, self.ndim, "ADKConv", "take a larger kernel_size")
        check_positive("width", width)
        check_choice("normalisation", normalisation, NORMALISATIONS)
        self.in_channels, self.out_channels = in_channels, in_channels
        self.width, self.normalisation = width, normalisation
        taps = torch.Size(self.kernel_size).numel()
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.features = _Features(in_channels, width, self.stride, bias, options)
        self.generator = CONV[self.ndim](width, in_channels * taps, 1, bias=False, **options)
        self.base = nn.Parameter(torch.empty(in_channels, taps, **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start from one Gaussian for all pixels and channels."""
        nn.init.zeros_(self.generator.weight)
        # The tap on the output pixel's centre, or the place between two taps.
        centre = tuple((s - 1) / 2 - (s - k) // 2 for s, k in zip(self.stride, self.kernel_size, strict=True))
        with torch.no_grad():
            self.base.copy_(_classic(self.kernel_size, self.stride, self.normalisation, centre))

    def param_options(self) -> dict[str, dict[str, float]]:
        """The base is not decayed."""
        return {"base": {"weight_decay": 0.0}}

    def kernels(self, x: Tensor, normalised: bool = True) -> Tensor:
        """The kernels (N, C, taps, \\*out) for ``x``, after the normalisation or before it."""
        grid = tuple(-(-n // s) for n, s in zip(x.shape[2:], self.stride, strict=True))
        predicted = self.generator(self.features(x, grid)).unflatten(1, (self.in_channels, -1))
        kernels = predicted + self.base.reshape(*self.base.shape, *[1] * self.ndim)
        return normalise_kernels(kernels, self.normalisation) if normalised else kernels

    def forward(self, x: Tensor) -> Tensor:
        """Predict the kernels and apply them."""
        check_input(x, self.in_channels, self.ndim)
        kernels = self.kernels(x, normalised=False)
        return adaptive_downscale(x, kernels, self.stride, self.kernel_size, self.normalisation).to(kernels.dtype)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return (
            f"{self.in_channels}, kernel_size={self.kernel_size}, stride={self.stride}, width={self.width}, "
            f"normalisation={self.normalisation!r}"
        )


class ADKConv1d(ADKConv):
    """Adaptive-kernel convolution over (N, C, L)."""

    ndim = 1


class ADKConv2d(ADKConv):
    """Adaptive-kernel convolution over (N, C, H, W)."""

    ndim = 2


class ADKConv3d(ADKConv):
    """Adaptive-kernel convolution over (N, C, D, H, W)."""

    ndim = 3


@part(
    "car-downscale",
    paper="adknet",
    kind="layer",
    dims=(2,),
    probe={"build": {"in_channels": 3, "scale": 2}, "inputs": [[2, 3, 12, 9]]},
    keywords="content adaptive resampler CAR downscaling fractional offsets deformable kernel per pixel",
)
class CARDownscale2d(nn.Module):
    """Content-adaptive resampler: per output pixel one kernel for all channels and an offset for each of its taps.

    Args:
        in_channels: C ≥ 1.
        scale: s.
        kernel_size: k; 3·scale + 1 when unset, as published.
        offset_unit: pixels that an offset of 1 means; the scale when unset.
        width: channels of the generator.
        normalisation: of the kernels: "sum" as published, "softmax" or "none".
        bias: biases in the generator.

    Shape:
        (N, C, H, W) → (N, C, H // s, W // s).

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> CARDownscale2d(3, scale=2)(torch.zeros(1, 3, 12, 8)).shape
        torch.Size([1, 3, 6, 4])

    Reference: Sun, Chen, arXiv 1907.12904.
    """

    def __init__(
        self,
        in_channels: int,
        scale: int = 2,
        kernel_size: int | None = None,
        offset_unit: float | None = None,
        *,
        width: int = 16,
        normalisation: str = "sum",
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("scale", scale), ("width", width)):
            check_positive(name, value)
        self.kernel_size = 3 * scale + 1 if kernel_size is None else kernel_size
        check_positive("kernel_size", self.kernel_size)
        check_choice("normalisation", normalisation, NORMALISATIONS)
        self.in_channels, self.scale, self.width, self.normalisation = in_channels, scale, width, normalisation
        self.offset_unit = float(scale if offset_unit is None else offset_unit)
        taps = self.kernel_size**2
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.features = _Features(in_channels, width, (scale, scale), bias, options)
        self.kernel_head = nn.Conv2d(width, taps, 1, bias=False, **options)
        self.offset_head = nn.Conv2d(width, 2 * taps, 1, bias=bias, **options)
        self.base = nn.Parameter(torch.empty(taps, **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start from one Gaussian on the regular grid, nearly: an offset of exactly 0 may be on a kink."""
        nn.init.zeros_(self.kernel_head.weight)
        nn.init.normal_(self.offset_head.weight, std=0.01 / math.sqrt(self.width))
        if self.offset_head.bias is not None:
            nn.init.zeros_(self.offset_head.bias)
        sizes, centre = ((self.kernel_size,) * 2, (self.scale,) * 2), (self.kernel_size // 2,) * 2
        with torch.no_grad():
            self.base.copy_(_classic(*sizes, self.normalisation, centre))

    def param_options(self) -> dict[str, dict[str, float]]:
        """The base is not decayed."""
        return {"base": {"weight_decay": 0.0}}

    def forward(self, x: Tensor) -> Tensor:
        """Predict kernels and offsets and sample."""
        check_input(x, self.in_channels, 2)
        grid = (max(1, x.shape[2] // self.scale), max(1, x.shape[3] // self.scale))
        features = self.features(x, grid)
        kernels = (self.kernel_head(features) + self.base[:, None, None]).unsqueeze(1)
        kernels = normalise_kernels(kernels, self.normalisation).squeeze(1)
        offsets_v, offsets_h = torch.tanh(self.offset_head(features)).chunk(2, 1)
        y = fractional_downscale(x, kernels, offsets_v, offsets_h, self.scale, self.kernel_size, self.offset_unit)
        return y.to(features.dtype)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return (
            f"{self.in_channels}, scale={self.scale}, kernel_size={self.kernel_size}, "
            f"offset_unit={self.offset_unit:g}, width={self.width}, normalisation={self.normalisation!r}"
        )
