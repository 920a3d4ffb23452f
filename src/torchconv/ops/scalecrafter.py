"""Convolutions that see further than they were trained to: re-dilation (ScaleCrafter).

Y. He, S. Yang et al. 2023, "ScaleCrafter: Tuning-free Higher-Resolution Visual Generation with Diffusion Models",
arXiv 2310.07702.

A network trained at one resolution and run at φ times as many pixels a side looks at φ times too small a part of the
picture. Re-dilation spreads the taps of a trained kernel φ apart; a fractional φ dilates by the next integer and
resizes the map around the convolution:

    d = ⌈φ⌉,  s = d/φ,     y = resize_{L/stride}( conv_{dilation d}( resize_{round(sL)}(x), W ) )

The paper's other way, a larger kernel made from the small one, is in :mod:`torchconv.ops.scalecrafter_dispersed`;
:func:`torchconv.surgery.redilate` does both to a whole network, by the steps of sampling.

No parameters of its own. Integer φ: the multiply-adds of the plain convolution; fractional φ: (d/φ)^n times as many and
two resizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive
from torchconv.catalog import part
from torchconv.ops._common import (
    CONV,
    Padding,
    Size,
    check_channels,
    check_input,
    check_odd,
    check_same,
    conv_nd,
    make_conv,
    ntuple,
)

ROUNDING = ("ceil", "floor")
_MODES: dict[str, tuple[str, ...]] = {
    "linear": ("", "linear", "bilinear", "trilinear"),
    "nearest": ("", "nearest", "nearest", "nearest"),
    "cubic": ("", "", "bicubic", ""),
}


def _resize(x: Tensor, size: Sequence[int], mode: str) -> Tensor:
    """Resize to ``size``, half-pixel centres and no low-pass; the identity where the size is right."""
    if list(x.shape[2:]) == list(size):
        return x
    word = _MODES[mode][x.dim() - 2]
    check(bool(word), "mode", mode, f"works in two dimensions only; use 'linear' or 'nearest' in {x.dim() - 2}")
    return F.interpolate(x, size=list(size), mode=word, align_corners=None if mode == "nearest" else False)


def check_factor(factor: float) -> None:
    """Refuse what is not a number of at least 1."""
    number = isinstance(factor, int | float) and not isinstance(factor, bool)
    check(number and 1 <= factor < math.inf, "factor", factor, "must be a number >= 1; 1 is the plain convolution")


def redilate_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    factor: float = 2.0,
    stride: Size = 1,
    dilation: Size = 1,
    groups: int = 1,
    mode: str = "linear",
    rounding: str = "ceil",
) -> Tensor:
    """Apply a convolution as if its receptive field were ``factor`` times as wide.

    d = ⌈φ⌉; the map is resized to round(L·d/φ), convolved with d times the dilation and the padding d·δ·⌊(k−1)/2⌋, and
    resized to L / stride. An integer φ resizes nothing, and is the dilated convolution, bit for bit.

    Args:
        x: the map.
        weight: (out, in/groups, \\*kernel), of odd sizes (even ones lose a row, which the last resize stretches away).
        bias: (out,) or None.
        factor: φ ≥ 1.
        stride, dilation, groups: of the original convolution.
        mode: of the two resizes, "linear" (published), "nearest" or "cubic" (2-D only).
        rounding: of L / stride: "ceil" is the size that the original convolution gives, "floor" the published rule,
            which at an odd size with stride 2 gives one row fewer.

    Shape:
        (N, in, L, …) → (N, out, L / stride, …).

    Raises:
        ValueError: φ < 1 or an unknown word.

    Example:
        >>> y = redilate_conv(torch.arange(6.0).reshape(1, 1, 6), torch.tensor([[[1.0, 0.0, 1.0]]]), factor=2)
        >>> y[0, 0].tolist()
        [2.0, 3.0, 4.0, 6.0, 2.0, 3.0]

    Reference: arXiv 2310.07702, section 3.2.
    """
    check_factor(factor)
    check_choice("mode", mode, _MODES)
    check_choice("rounding", rounding, ROUNDING)
    if x.dim() != weight.dim():
        raise ValueError(f"x of shape {tuple(x.shape)}: expected as many axes as the kernel {tuple(weight.shape)} has")
    ndim = x.dim() - 2
    strides, dilations = ntuple("stride", stride, ndim), ntuple("dilation", dilation, ndim)
    spread = math.ceil(factor)
    scale = float(spread / factor)
    lengths = list(x.shape[2:])
    up = rounding == "ceil"
    size = [-(-n // s) if up else n // s for n, s in zip(lengths, strides, strict=True)]
    check(
        0 not in size, "stride", stride, f"leaves nothing of a map of size {tuple(lengths)} with rounding={rounding!r}"
    )
    taps = [spread * d for d in dilations]
    pads = [d * ((k - 1) // 2) for d, k in zip(taps, weight.shape[2:], strict=True)]
    if scale != 1:
        x = _resize(x, [round(n * scale) for n in lengths], mode)
    return _resize(conv_nd(x, weight, bias, strides, pads, taps, groups), size, mode)


def step_factor(factor: float, step: int, tau: int, progressive: bool = False, dispersed: bool = False) -> float | None:
    """The factor at one step of sampling: φ for the first τ steps, then none.

    Args:
        factor: φ of the layer.
        step: 0 for the first, noisiest step.
        tau: number of steps with re-dilation.
        progressive: fall with the steps, max(⌈φ·(τ − step)/τ⌉, 2); published at 2048² and above.
        dispersed: the layer's kernel is dispersed at this step, which halves φ.

    Returns:
        The factor, or None where the original convolution is used.

    Example:
        >>> [step_factor(4, i, 35, progressive=True) for i in (0, 8, 9, 17, 18, 34, 35)]
        [4, 4, 3, 3, 2, 2, None]

    Reference: arXiv 2310.07702, section 3.2 and its supplement.
    """
    check_positive("step", step, zero=True)
    check_positive("tau", tau, zero=True)
    if step >= tau:
        return None
    if progressive:
        factor = max(math.ceil(factor * ((tau - step) / tau)), 2)
    return factor / 2 if dispersed else factor


def check_same_conv(conv: Any) -> None:
    """Refuse a convolution that neither re-dilation nor dispersion can stand for."""
    check(conv.padding_mode == "zeros", "padding_mode", conv.padding_mode, "re-dilation pads with zeros")
    check_odd(conv.kernel_size, "re-dilation")
    check_same(conv.padding, conv.kernel_size, "re-dilation", conv.dilation)


def as_same_conv(conv: nn.Module) -> tuple[Any, int]:
    """``conv`` as a plain convolution that can be re-dilated, and its dimensions."""
    if type(conv) not in CONV[1:]:
        raise ValueError(f"conv={type(conv).__name__}: expected nn.Conv1d, nn.Conv2d or nn.Conv3d")
    check_same_conv(conv)
    return conv, CONV.index(type(conv))


class SameConv(nn.Module):
    """Parameters and checks of both operators: a plain convolution with odd sizes and "same" padding."""

    ndim: ClassVar[int] = 0

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None,
        kernel_size: Size,
        stride: Size,
        padding: Padding,
        dilation: Size,
        groups: int,
        bias: bool,
        device: Any,
        dtype: Any,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        check_channels(in_channels, out_channels, groups)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = ntuple("kernel_size", kernel_size, self.ndim)
        self.stride = ntuple("stride", stride, self.ndim)
        self.dilation = ntuple("dilation", dilation, self.ndim)
        check_odd(self.kernel_size, type(self).__name__)
        check_same(padding, self.kernel_size, type(self).__name__, self.dilation)
        self.padding = "same"
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

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}"
        )


@part(
    "redilated",
    paper="scalecrafter",
    kind="operator",
    dims=(1, 2, 3),
    mixes="space+channels",
    supports=("stride", "channels", "groups", "dilation"),
    merges="conv",
    mixer={"kernel_size": 3, "groups": "channels"},
    keywords="re-dilation ScaleCrafter higher resolution generation diffusion U-Net fractional dilation tuning-free",
)
class ReDilatedConv(SameConv):
    """A convolution whose receptive field is ``factor`` times as wide, any factor ≥ 1.

    Args:
        in_channels: channels, divisible by ``groups``.
        out_channels: None is ``in_channels``.
        kernel_size: odd.
        stride, dilation, groups, bias: as in ``nn.ConvNd``; ``factor`` multiplies the dilation.
        padding: "same".
        factor: φ ≥ 1, may be set at any time. An integer is a dilated convolution; between them the map is resized.
        mode, rounding: see :func:`redilate_conv`.

    Shape:
        (N, in_channels, L, …) → (N, out_channels, ⌈L / stride⌉, …).

    Raises:
        ValueError: an argument is out of range or not supported; the message names it.

    Example:
        >>> conv = nn.Conv2d(3, 8, 3, padding=1)
        >>> ReDilatedConv2d.from_conv(conv, factor=2.5)(torch.zeros(1, 3, 40, 30)).shape
        torch.Size([1, 8, 40, 30])

    Reference: He et al., arXiv 2310.07702.
    """

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
        factor: float = 2.0,
        mode: str = "linear",
        rounding: str = "ceil",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device, dtype)
        check_factor(factor)
        check_choice("mode", mode, _MODES)
        check_choice("rounding", rounding, ROUNDING)
        self.factor, self.mode, self.rounding = factor, mode, rounding

    @classmethod
    def from_conv(cls, conv: nn.Module, factor: float, mode: str = "linear", rounding: str = "ceil") -> ReDilatedConv:
        """Wrap an ``nn.ConvNd`` with odd sizes and "same" padding; the parameters are shared, not copied."""
        original, ndim = as_same_conv(conv)
        check(ndim == cls.ndim, "conv", type(conv).__name__, f"use ReDilatedConv{ndim}d")
        wrapped = cls(
            original.in_channels,
            original.out_channels,
            original.kernel_size,
            original.stride,
            "same",
            original.dilation,
            original.groups,
            original.bias is not None,
            factor=factor,
            mode=mode,
            rounding=rounding,
            device="meta",
        )
        wrapped.weight, wrapped.bias = original.weight, original.bias
        return wrapped.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x``."""
        check_input(x, self.in_channels, self.ndim)
        return redilate_conv(
            x,
            self.weight,
            self.bias,
            self.factor,
            self.stride,
            self.dilation,
            self.groups,
            self.mode,
            self.rounding,
        )

    def merge(self) -> nn.Module:
        """The same map as a dilated ``nn.ConvNd``; exact, hence for integer factors only."""
        whole = float(self.factor).is_integer() and self.rounding == "ceil"
        name, value = ("factor", self.factor) if self.rounding == "ceil" else ("rounding", self.rounding)
        check(whole, name, value, "only integer factors with rounding='ceil' are one convolution")
        dilation = [int(self.factor) * d for d in self.dilation]
        return make_conv(self.weight, self.bias, self.stride, "same", dilation, self.groups)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"{super().extra_repr()}, factor={self.factor}"


class ReDilatedConv1d(ReDilatedConv):
    """Re-dilated convolution over (N, C, L)."""

    ndim = 1


class ReDilatedConv2d(ReDilatedConv):
    """Re-dilated convolution over (N, C, H, W)."""

    ndim = 2


class ReDilatedConv3d(ReDilatedConv):
    """Re-dilated convolution over (N, C, D, H, W)."""

    ndim = 3
