"""SpaRTAN's mixers and block (Pay et al. 2025, arXiv 2507.10999).

    SMixer:  x ← W x;  x ← x + γ (x − mean x);  y = V [SE(conv₃ₓ₃ x), SE(conv_d₂(conv_d₂ x))]
    CMixer:  j = argmax_c x;  f = w θ + w_j θ_j;  f ← z f (complex, pairs of channels);  y = V SE(conv₃ₓ₃ f)

The spatial mixer sees 3 × 3 and 9 × 9, each weighed by squeeze-excitation. The channel mixer adds the strongest channel
of each pixel to all and rotates pairs of channels by free complex numbers, here in real arithmetic, which exports.
With h = C/2 and m = eC a pixel costs 3·9·h²/groups + Ch + C² and 3Cm + 9m·(inner width) multiplications.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_positive
from torchconv.catalog import part
from torchconv.kernels._layout import is_channels_last
from torchconv.ops._common import check_input, fold_bn, make_conv


class ConvNormAct(nn.Module):
    """A convolution without bias, batch norm (eps 1e-6) and an activation; ``norm`` or ``act`` may be left out."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        norm: bool = True,
        act: nn.Module | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=False, **options
        )
        self.norm = nn.BatchNorm2d(out_channels, eps=1e-6, **options) if norm else nn.Identity()
        self.act = nn.Identity() if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, normalise, activate."""
        y: Tensor = self.act(self.norm(self.conv(x)))
        return y

    def merge(self) -> ConvNormAct:
        """The exact inference form: the batch norm folded into the convolution."""
        merged: Any = copy.deepcopy(self).eval()
        if isinstance(self.norm, nn.BatchNorm2d):
            conv, norm = merged.conv, merged.norm.double()
            weight, bias = fold_bn(conv.weight.double(), None, norm)
            merged.conv = _like(conv, weight, bias)
            merged.norm = nn.Identity()
        folded: ConvNormAct = merged
        return folded


def _like(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """The convolution with another weight and bias, given in double precision."""
    dtype = conv.weight.dtype
    shift = None if bias is None else bias.to(dtype)
    padding: Any = conv.padding
    return make_conv(weight.to(dtype), shift, conv.stride, padding, conv.dilation, conv.groups)


class SqueezeExcitation(nn.Module):
    """Channels weighed by a gate of their means: 1 × 1, ReLU, 1 × 1, sigmoid."""

    def __init__(self, channels: int, hidden: int, **options: Any) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, hidden, 1, **options)
        self.expand = nn.Conv2d(hidden, channels, 1, **options)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` times its gate."""
        gate: Tensor = self.expand(F.relu(self.squeeze(x.mean((2, 3), keepdim=True))))
        return x * gate.sigmoid()


def rotate_pairs(x: Tensor, z: Tensor) -> Tensor:
    """Multiply pairs of channels, (x₂ᵢ, x₂ᵢ₊₁) as x₂ᵢ + i x₂ᵢ₊₁, by complex numbers; at least in float32.

    Args:
        x: (N, 2P, H, W).
        z: (…, P, 2), real and imaginary parts.

    Example:
        >>> rotate_pairs(torch.tensor([1.0, 2.0]).reshape(1, 2, 1, 1), torch.tensor([[0.0, 1.0]])).flatten()
        tensor([-2.,  1.])
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    last = is_channels_last(x)
    axis = 3 if last else 1
    a, b = (x.movedim(1, 3) if last else x).to(dtype).unflatten(axis, (-1, 2)).unbind(axis + 1)
    real, imaginary = (v if last else v.reshape(-1, 1, 1) for v in z.to(dtype).reshape(-1, 2).unbind(1))
    turned = torch.addcmul(a * real, b, imaginary, value=-1), torch.addcmul(a * imaginary, b, real)
    y = torch.stack(turned, axis + 1).flatten(axis, axis + 1).to(x.dtype)
    return y.movedim(3, 1) if last else y


@part(
    "smixer",
    paper="spartan",
    kind="layer",
    dims=(2,),
    merges="self",
    probe={"build": {"channels": 8}, "inputs": [[2, 8, 6, 5]]},
    keywords="SpaRTAN spatial mixer multi-order receptive fields dilated squeeze excitation",
)
class SMixer(nn.Module):
    """Spatial mixer: two branches with receptive fields 3 × 3 and 9 × 9, each with squeeze-excitation.

    Args:
        channels: C, a multiple of 8.
        groups: of the three 3 × 3 convolutions on C/2 channels; 1 is dense, C/2 depthwise.

    Shape:
        (N, C, H, W) → the same.

    Raises:
        ValueError: channels or groups do not divide.

    Reference: arXiv 2507.10999, section 3.
    """

    def __init__(self, channels: int, groups: int = 1, **options: Any) -> None:
        super().__init__()
        check_positive("channels", channels)
        check(channels % 8 == 0, "channels", channels, "must be a multiple of 8")
        half = channels // 2
        check_positive("groups", groups)
        check(half % groups == 0, "groups", groups, f"must divide half of the channels ({half})")
        wide: dict[str, Any] = {"padding": 2, "dilation": 2, "groups": groups, **options}
        self.proj_in = nn.Conv2d(channels, half, 1, **options)
        self.gamma = nn.Parameter(torch.full((1, half, 1, 1), 1e-5, **options))
        self.h_conv = ConvNormAct(half, half, 3, padding=1, groups=groups, act=nn.GELU(), **options)
        self.l_conv = nn.Sequential(
            ConvNormAct(half, half, 3, norm=False, **wide), ConvNormAct(half, half, 3, act=nn.GELU(), **wide)
        )
        self.h_attn = SqueezeExcitation(half, half // 4, **options)
        self.l_attn = SqueezeExcitation(half, half // 4, **options)
        self.proj_out = nn.Conv2d(channels, channels, 1, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Mix positions of ``x``."""
        check_input(x, self.proj_in.in_channels, 2)
        x = self.proj_in(x)
        x = x + self.gamma * (x - x.mean((2, 3), keepdim=True))
        y: Tensor = self.proj_out(torch.cat([self.h_attn(self.h_conv(x)), self.l_attn(self.l_conv(x))], 1))
        return y

    def merge(self, scale: Tensor | None = None) -> Self:
        """The exact inference form: batch norms folded, and ``scale`` (C values) of the result into ``proj_out``."""
        merged: Any = copy.deepcopy(self).eval()
        merged.h_conv = self.h_conv.merge()
        merged.l_conv = nn.Sequential(*(layer.merge() for layer in self.l_conv))  # type: ignore[operator]
        merged.proj_out = _scaled(merged.proj_out, scale)
        folded: Self = merged
        return folded


def _scaled(conv: nn.Conv2d, scale: Tensor | None) -> nn.Module:
    """A convolution whose output is multiplied by a number for each channel."""
    if scale is None or conv.bias is None:
        return conv
    factor = scale.detach().double().flatten()
    return _like(conv, conv.weight.double() * factor.reshape(-1, 1, 1, 1), conv.bias.double() * factor)


@part(
    "cmixer",
    paper="spartan",
    kind="layer",
    dims=(2,),
    merges="self",
    probe={"build": {"channels": 8, "groups": 8}, "inputs": [[2, 8, 6, 5]]},
    keywords="SpaRTAN channel mixer wave complex rotation strongest channel aggregation",
)
class CMixer(nn.Module):
    """Channel mixer: modulation by the strongest channel of each pixel and complex products of channel pairs.

    Args:
        channels: C, at least 4.
        expand_ratio: hidden channels over C, at least 2.
        groups: 1 makes the inner convolution depthwise; anything larger gives it C groups.

    Shape:
        (N, C, H, W) → the same.

    Raises:
        ValueError: an argument is too small.

    Reference: arXiv 2507.10999, section 3. The index comes from the input, so only the first C hidden channels can win.
    """

    def __init__(self, channels: int, expand_ratio: int = 4, groups: int = 1, **options: Any) -> None:
        super().__init__()
        check_positive("channels", channels)
        check(channels >= 4, "channels", channels, "must be at least 4")
        check(expand_ratio > 1, "expand_ratio", expand_ratio, "must be above 1")
        check_positive("groups", groups)
        hidden = int(channels * expand_ratio)
        check(hidden % 2 == 0, "expand_ratio", expand_ratio, "times channels must be even: channels rotate in pairs")
        self.theta = nn.Conv2d(channels, hidden, 1, **options)
        self.proj = nn.Conv2d(channels, hidden, 1, **options)
        self.complex: nn.Parameter | None = nn.Parameter(torch.randn(1, 1, 1, hidden // 2, 2, **options))
        inner = channels if groups > 1 else hidden
        self.conv = ConvNormAct(hidden, hidden, 3, padding=1, groups=inner, act=nn.GELU(), **options)
        self.attn = SqueezeExcitation(hidden, channels // 4, **options)
        self.proj_out = nn.Conv2d(hidden, channels, 1, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Mix channels of ``x``."""
        check_input(x, self.theta.in_channels, 2)
        strongest = x.max(1, keepdim=True).indices  # the first one, as argmax, which takes three times as long
        f = self.proj(x) * F.gelu(self.theta(x))
        f = f + f.gather(1, strongest)
        f = f if self.complex is None else rotate_pairs(f, self.complex)
        y: Tensor = self.proj_out(self.attn(self.conv(f)))
        return y

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """``to(memory_format=torch.channels_last)`` takes no 5-D tensors: it gets the pairs as a table."""
        done: Self = super()._apply(lambda t: fn(t.flatten(0, 3)).reshape(t.shape) if t.dim() == 5 else fn(t), recurse)
        return done

    def merge(self, scale: Tensor | None = None) -> Self:
        """The exact inference form: batch norm folded, and ``scale`` (C values) of the result into ``proj_out``.

        Where no pair of channels is split between groups of the inner convolution, the rotation goes into its weight,
        which has as many numbers as before. A depthwise one would need twice as many: there the rotation stays.
        """
        merged: Any = copy.deepcopy(self).eval()
        merged.conv = self.conv.merge()
        merged.proj_out = _scaled(merged.proj_out, scale)
        width = self.conv.conv.weight.shape[1]
        if self.complex is not None and width % 2 == 0:
            conv = merged.conv.conv
            # The conjugate is the transposed map; rows of the weight take the input's place.
            z = self.complex.detach().double().reshape(-1, 2) * torch.tensor([1.0, -1.0]).to(self.complex.device)
            rows = conv.weight.double().unflatten(0, (conv.groups, -1)).movedim(1, 0).flatten(1, 2)
            rows = rotate_pairs(rows, z).unflatten(1, (conv.groups, width)).movedim(0, 1).flatten(0, 1)
            merged.conv.conv = _like(conv, rows, conv.bias.double())
            merged.complex = None
        folded: Self = merged
        return folded
