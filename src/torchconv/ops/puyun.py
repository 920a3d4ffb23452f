"""Large kernel attention: a large depthwise kernel in three cheap pieces, used as a gate.

Zhu, Chen, Yu et al. 2024, "PuYun: Medium-Range Global Weather Forecasting Using Large Kernel Attention Convolutional
Networks", arXiv 2409.02123; the operator is from Guo et al. 2022, "Visual Attention Network", arXiv 2202.09741.

A K × … × K kernel becomes a local depthwise one of 2d − 1, a depthwise one of ⌈K/d⌉ with dilation d, and a pointwise
one; the result multiplies the input:

    LKA(x) = x ⊙ pw(dw_d(dw(x)))                       K = 21, d = 3: 5 × 5, 7 × 7 three apart, 1 × 1; extent 23
    Attention(x) = x + P_2 · LKA(GELU(P_1 · x))        P_1, P_2 pointwise

C·((2d−1)^n + ⌈K/d⌉^n + C + 3) parameters with biases, C·((2d−1)^n + ⌈K/d⌉^n + C) multiply-adds a position: linear in
the number of positions, while the gate depends on the content.
"""

from __future__ import annotations

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
    check_input,
    check_same,
    check_unit,
    conv_nd,
    ntuple,
    resolve_padding,
)

PADDING_MODES = ("zeros", "longitude", "sphere")


def pad_sphere(x: Tensor, rows: tuple[int, int], columns: tuple[int, int], pole_rows: bool = False) -> Tensor:
    """Continue a latitude × longitude map around the globe.

    Columns repeat periodically. Beyond a pole lies the other side of it: rows in reverse order, half a turn away.

    Args:
        x: (N, C, H, W), rows from pole to pole, W columns once around, W even.
        rows, columns: elements to add (before, after).
        pole_rows: the first and last row are the poles themselves, and are not repeated.

    Shape:
        (N, C, H, W) → (N, C, H + Σ rows, W + Σ columns). Components of a vector field (winds) change their sign beyond
        a pole; that is left to the caller, who knows which channels they are.

    Raises:
        ValueError: more rows than the map has, an odd W, or no map.

    Example:
        >>> pad_sphere(torch.arange(8.0).reshape(1, 1, 2, 4), (1, 0), (1, 0))
        tensor([[[[1., 2., 3., 0., 1.],
                  [3., 0., 1., 2., 3.],
                  [7., 4., 5., 6., 7.]]]])
    """
    check(x.dim() == 4, "x", tuple(x.shape), "expected (N, C, H, W), rows from pole to pole")
    check(min(rows) >= 0, "rows", rows, "must be 0 or more")
    height, width = x.shape[2:]
    check(width % 2 == 0, "x", tuple(x.shape), "half a turn around the pole needs an even number of columns")
    skip = int(pole_rows)
    check(max(rows) <= height - skip, "rows", rows, f"beyond a pole lie no more than the map's {height - skip} rows")
    far = x.roll(width // 2, 3)
    north = far[:, :, skip : rows[0] + skip].flip(2)
    south = far[:, :, height - rows[1] - skip : height - skip].flip(2)
    return pad_circular(torch.cat((north, x, south), 2), columns)


def pad_circular(x: Tensor, columns: tuple[int, int]) -> Tensor:
    """Repeat the last axis periodically, any number of elements (before, after).

    Example:
        >>> pad_circular(torch.tensor([[[1, 2, 3]]]), (1, 4))
        tensor([[[3, 1, 2, 3, 1, 2, 3, 1]]])
    """
    length = x.shape[-1]
    check(length > 0, "x", tuple(x.shape), "there is nothing to repeat")
    return x.index_select(-1, torch.arange(-columns[0], length + columns[1], device=x.device) % length)


def depthwise_same(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: tuple[int, ...], mode: str) -> Tensor:
    """Depthwise convolution that keeps the map's size, continued beyond its edges as ``mode`` says."""
    if mode == "zeros":
        return conv_nd(x, weight, bias, padding="same", dilation=dilation, groups=weight.shape[0])
    *others, columns = resolve_padding("same", weight.shape[2:], dilation)
    if mode == "sphere":
        x = pad_sphere(x, others[0], columns)
    else:
        x = F.pad(pad_circular(x, columns), [0, 0, *(p for pair in reversed(others) for p in pair)])
    return conv_nd(x, weight, bias, dilation=dilation, groups=weight.shape[0])


def large_kernel_attention(
    x: Tensor,
    local: Tensor,
    spread: Tensor,
    pointwise: Tensor,
    biases: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
    spread_dilation: Size = 3,
    dilation: Size = 1,
    padding_mode: str = "zeros",
) -> Tensor:
    """y = x ⊙ pointwise(spread(local(x))): the large kernel as a gate on the input.

    Args:
        x: (N, C, \\*spatial).
        local: depthwise kernels (C, 1, \\*k) of any sizes.
        spread: depthwise kernels (C, 1, \\*k'), taps ``spread_dilation`` apart.
        pointwise: (C, C, 1, …).
        biases: of the three, each (C,) or None.
        spread_dilation: int or one per axis.
        dilation: widens both depthwise kernels.
        padding_mode: beyond the edges of the map: "zeros"; "longitude", periodic on the last axis and zero on the
            others; "sphere", also continued over the poles (two dimensions). Applied before each convolution.

    Shape:
        (N, C, \\*spatial) → the same.

    Raises:
        ValueError: an unknown padding mode, or "sphere" on anything but two dimensions.

    Reference: arXiv 2202.09741, equation (2).
    """
    ndim = x.dim() - 2
    _check_mode(padding_mode, ndim)
    wide = ntuple("dilation", dilation, ndim)
    spaced = tuple(a * b for a, b in zip(wide, ntuple("spread_dilation", spread_dilation, ndim), strict=True))
    gate = depthwise_same(x, local, biases[0], wide, padding_mode)
    gate = depthwise_same(gate, spread, biases[1], spaced, padding_mode)
    return x * conv_nd(gate, pointwise, biases[2])


def _check_mode(mode: str, ndim: int) -> None:
    check_choice("padding_mode", mode, PADDING_MODES)
    check(mode != "sphere" or ndim == 2, "padding_mode", mode, "poles exist in two dimensions; use 'longitude'")


class _Gate(nn.Module):
    """Arguments shared by the operator and the attention around it."""

    ndim: ClassVar[int] = 0
    label: ClassVar[str]

    def _accept(
        self,
        in_channels: int,
        out_channels: int | None,
        kernel_size: Size,
        stride: Size,
        padding: Padding,
        dilation: Size,
        groups: int,
    ) -> None:
        check_positive("in_channels", in_channels)
        remedy = f"{self.label} gates its input: as many channels as it gets ({in_channels}); add a 1×1 convolution"
        check(out_channels in (None, in_channels), "out_channels", out_channels, remedy)
        check_unit("stride", stride, self.ndim, self.label, "subsample with a strided convolution after it")
        check(groups == 1, "groups", groups, f"the pointwise part of {self.label} mixes all channels; use groups=1")
        self.in_channels = self.out_channels = in_channels
        self.kernel_size = ntuple("kernel_size", kernel_size, self.ndim)
        self.dilation = ntuple("dilation", dilation, self.ndim)
        check_same(padding, self.kernel_size, self.label, self.dilation)
        self.stride, self.padding, self.groups = (1,) * self.ndim, "same", 1


def init_fan_out(conv: Any) -> None:
    """Variance 2 / fan-out, zero bias."""
    fan_out = conv.weight[0, 0].numel() * conv.out_channels // conv.groups
    nn.init.normal_(conv.weight, 0.0, (2 / fan_out) ** 0.5)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


@part(
    "lka",
    paper="puyun",
    kind="operator",
    dims=(1, 2, 3),
    mixes="space+channels",
    supports=("dilation", "even"),
    mixer={"kernel_size": 21},
    conv={"kernel_size": 21},
    keywords="large kernel attention VAN visual attention network gate depthwise dilated decomposition longitude",
)
class LKA(_Gate):
    """Large kernel attention: x ⊙ pointwise(dilated depthwise(depthwise(x))).

    Args:
        in_channels: C ≥ 1; ``out_channels`` is None or C.
        kernel_size: K ≥ 1, the extent that the two depthwise kernels stand for; int or one per axis.
        stride: 1 only, the gate multiplies the input.
        padding: "same" only.
        dilation: widens both depthwise kernels.
        groups: 1 only.
        bias: learn an additive bias in all three.
        decomposition: d ≥ 1, kernels of 2d − 1 and ⌈K/d⌉, the second with dilation d; int or one per axis.
        padding_mode: "zeros", "longitude" or "sphere", see :func:`large_kernel_attention`.

    Shape:
        (N, C, \\*spatial) → the same.

    Raises:
        ValueError: an argument is out of range or not supported; the message names it.

    Example:
        >>> layer = LKA2d(8)
        >>> layer.conv0.kernel_size, layer.conv_spatial.kernel_size, layer.conv_spatial.dilation
        ((5, 5), (7, 7), (3, 3))

    Reference: arXiv 2202.09741; used by PuYun, arXiv 2409.02123.
    """

    label = "large kernel attention"

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_size: Size = 21,
        stride: Size = 1,
        padding: Padding = "same",
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        decomposition: Size = 3,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self._accept(in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        _check_mode(padding_mode, self.ndim)
        self.padding_mode = padding_mode
        self.decomposition = ntuple("decomposition", decomposition, self.ndim)
        spread = tuple(-(-k // d) for k, d in zip(self.kernel_size, self.decomposition, strict=True))
        spaced = tuple(a * d for a, d in zip(self.dilation, self.decomposition, strict=True))
        options: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        depthwise = {"groups": in_channels, "padding": "same", **options}
        conv, local = CONV[self.ndim], tuple(2 * d - 1 for d in self.decomposition)
        self.conv0 = conv(in_channels, in_channels, local, dilation=self.dilation, **depthwise)
        self.conv_spatial = conv(in_channels, in_channels, spread, dilation=spaced, **depthwise)
        self.conv1 = conv(in_channels, in_channels, 1, **options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of variance 2 / fan-out, zero biases."""
        for layer in (self.conv0, self.conv_spatial, self.conv1):
            init_fan_out(layer)

    def forward(self, x: Tensor) -> Tensor:
        """Gate ``x``."""
        check_input(x, self.in_channels, self.ndim)
        local, spread, point = self.conv0, self.conv_spatial, self.conv1
        return large_kernel_attention(
            x,
            local.weight,
            spread.weight,
            point.weight,
            (local.bias, spread.bias, point.bias),
            self.decomposition,
            self.dilation,
            self.padding_mode,
        )

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"kernel_size={self.kernel_size}, padding_mode={self.padding_mode!r}"


class LKA1d(LKA):
    """Large kernel attention over (N, C, L)."""

    ndim = 1


class LKA2d(LKA):
    """Large kernel attention over (N, C, H, W)."""

    ndim = 2


class LKA3d(LKA):
    """Large kernel attention over (N, C, D, H, W)."""

    ndim = 3


_LKA: tuple[Any, ...] = (nn.Module, LKA1d, LKA2d, LKA3d)


@part(
    "lka-attention",
    paper="puyun",
    kind="operator",
    dims=(1, 2, 3),
    mixes="space+channels",
    supports=("dilation", "even"),
    mixer={"kernel_size": 21},
    conv={"kernel_size": 21},
    keywords="large kernel attention VAN visual attention network projections",
)
class LKAttention(_Gate):
    """Large kernel attention between two pointwise convolutions, added to its input: x + P₂·LKA(GELU(P₁·x)).

    Arguments as :class:`LKA`. C·((2d−1)^n + ⌈K/d⌉^n + 3C + 5) parameters with biases.

    Example:
        >>> sum(p.numel() for p in LKAttention2d(8).parameters()) == 8 * (25 + 49 + 24 + 5)
        True

    Reference: arXiv 2202.09741, section 3.2.
    """

    label = "large kernel attention"

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_size: Size = 21,
        stride: Size = 1,
        padding: Padding = "same",
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        decomposition: Size = 3,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self._accept(in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        options: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        own: dict[str, Any] = {"decomposition": decomposition, "padding_mode": padding_mode}
        self.proj_1 = CONV[self.ndim](in_channels, in_channels, 1, **options)
        self.spatial_gating_unit = _LKA[self.ndim](
            in_channels, kernel_size=kernel_size, dilation=dilation, **own, **options
        )
        self.proj_2 = CONV[self.ndim](in_channels, in_channels, 1, **options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of variance 2 / fan-out, zero biases."""
        init_fan_out(self.proj_1)
        self.spatial_gating_unit.reset_parameters()
        init_fan_out(self.proj_2)

    def forward(self, x: Tensor) -> Tensor:
        """Attend and add."""
        check_input(x, self.in_channels, self.ndim)
        return x + self.proj_2(self.spatial_gating_unit(F.gelu(self.proj_1(x))))


class LKAttention1d(LKAttention):
    """Large kernel attention with projections over (N, C, L)."""

    ndim = 1


class LKAttention2d(LKAttention):
    """Large kernel attention with projections over (N, C, H, W)."""

    ndim = 2


class LKAttention3d(LKAttention):
    """Large kernel attention with projections over (N, C, D, H, W)."""

    ndim = 3
