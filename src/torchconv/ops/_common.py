"""What several operators need: sizes per axis, padding, one N-d convolution, batch-norm folding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import Padding, Size, check, check_positive, ntuple, resolve_padding
from torchconv.kernels import depthwise_conv1d, depthwise_conv2d, depthwise_conv3d

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d

CONV: tuple[Any, ...] = (nn.Module, nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORM: tuple[Any, ...] = (nn.Module, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CONVOLVE = (None, F.conv1d, F.conv2d, F.conv3d)
_DEPTHWISE: tuple[Any, ...] = (None, depthwise_conv1d, depthwise_conv2d, depthwise_conv3d)


def check_padding(padding: Padding, ndim: int) -> None:
    """Refuse a ``padding`` that :func:`resolve_padding` would refuse."""
    resolve_padding(padding, (1,) * ndim, (1,) * ndim)


def check_channels(in_channels: int, out_channels: int, groups: int) -> None:
    """Channels are positive and divisible by ``groups``."""
    check_positive("in_channels", in_channels)
    check_positive("out_channels", out_channels)
    check_positive("groups", groups)
    check(in_channels % groups == 0, "groups", groups, f"must divide in_channels={in_channels}")
    check(out_channels % groups == 0, "groups", groups, f"must divide out_channels={out_channels}")


def check_depthwise(in_channels: int, out_channels: int | None, groups: int | None, name: str) -> None:
    """An operator on single channels: as many outputs as inputs, ``groups`` unset or equal to the channels."""
    check_positive("in_channels", in_channels)
    remedy = f"{name} keeps the number of channels ({in_channels}); follow it with a 1×1 convolution to change it"
    check(out_channels in (None, in_channels), "out_channels", out_channels, remedy)
    remedy = f"{name} is depthwise: leave groups unset or give in_channels={in_channels}"
    check(groups in (None, in_channels), "groups", groups, remedy)


def check_unit(argument: str, value: Size, ndim: int, name: str, remedy: str) -> None:
    """Refuse a stride or dilation other than 1."""
    check(set(ntuple(argument, value, ndim)) == {1}, argument, value, f"{name} works at {argument} 1; {remedy}")


def check_same(padding: Padding, kernel_size: Sequence[int], name: str, dilation: Sequence[int] | None = None) -> None:
    """Refuse a padding other than "same" (as a word or as the equal integers)."""
    dilation = dilation or (1,) * len(kernel_size)
    same = resolve_padding("same", kernel_size, dilation)
    ok = padding == "same" or (padding != "valid" and resolve_padding(padding, kernel_size, dilation) == same)
    check(ok, "padding", padding, f"{name} keeps the size of the map: use padding='same'")


def check_odd(kernel_size: Sequence[int], name: str) -> None:
    """Refuse an even kernel size."""
    odd = all(k % 2 for k in kernel_size)
    check(odd, "kernel_size", tuple(kernel_size), f"{name} needs odd sizes, which have a centre; use the next odd size")


def check_input(x: Tensor, channels: int, ndim: int) -> None:
    """The input has a batch axis, the module's channels and ``ndim`` spatial axes."""
    if x.dim() != ndim + 2 or x.shape[1] != channels:
        axes = ", ".join(("N", f"{channels}", *("D", "H", "W")[3 - ndim :]))
        raise ValueError(f"x of shape {tuple(x.shape)}: expected ({axes})")


def conv_nd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Tensor:
    """N-d cross-correlation, N from the weight's shape; ``padding`` as in :func:`resolve_padding`."""
    ndim = weight.dim() - 2
    dilations = ntuple("dilation", dilation, ndim)
    pads = resolve_padding(padding, weight.shape[2:], dilations)
    mode = "constant" if padding_mode == "zeros" else padding_mode
    if mode != "constant" or any(a != b for a, b in pads):
        x = F.pad(x, [p for pair in reversed(pads) for p in pair], mode=mode)
        pads = ((0, 0),) * ndim
    strides = ntuple("stride", stride, ndim)
    if groups > 1 and groups == weight.shape[0] and weight.shape[1] == 1:
        return _DEPTHWISE[ndim](x, weight, bias, strides, tuple(a for a, _ in pads), dilations)
    convolve: Any = _CONVOLVE[ndim]
    return convolve(x, weight, bias, strides, tuple(a for a, _ in pads), dilations, groups)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of every position of a map (N, C, H, W); arguments as of ``nn.LayerNorm``."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x``."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def apply_conv(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """What ``conv(x)`` gives, computed by :func:`conv_nd`, which has faster depthwise gradients on a CPU."""
    if isinstance(conv.padding, str) or type(conv) not in CONV:  # replaced by something else: let it do its own
        y: Tensor = conv(x)
        return y
    return conv_nd(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)


def make_conv(
    weight: Tensor,
    bias: Tensor | None,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> nn.Module:
    """A plain ``nn.ConvNd`` that owns copies of ``weight`` (out, in/groups, \\*kernel) and ``bias``.

    Where ``nn.ConvNd`` cannot say the padding (uneven "same" with a stride), the kernel is widened by one zero tap in
    front on that axis, which makes the padding even.
    """
    ndim = weight.dim() - 2
    dilations, strides = ntuple("dilation", dilation, ndim), ntuple("stride", stride, ndim)
    pads = resolve_padding(padding, weight.shape[2:], dilations)
    weight = weight.detach()
    word: Any = tuple(a for a, _ in pads)
    uneven = [a != b for a, b in pads]
    if any(uneven) and set(strides) == {1}:
        word = "same"
    elif any(uneven):
        weight, dilations = dilate_kernel(weight, dilations), (1,) * ndim
        weight = F.pad(weight, [p for u in reversed(uneven) for p in (int(u), 0)])
        word = tuple(after if u else before for (before, after), u in zip(pads, uneven, strict=True))
    conv: nn.Module = CONV[ndim](
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),
        stride=strides,
        padding=word,
        dilation=dilations,
        groups=groups,
        bias=bias is not None,
        padding_mode=padding_mode,
        device=weight.device,
        dtype=weight.dtype,
    )
    state = {"weight": weight} if bias is None else {"weight": weight, "bias": bias.detach()}
    conv.load_state_dict(state)
    return conv.eval()


def dilate_kernel(weight: Tensor, dilation: Size) -> Tensor:
    """The dense kernel of extent d·(k−1)+1 that equals ``weight`` at ``dilation``: zeros between the taps."""
    ndim = weight.dim() - 2
    dilations = ntuple("dilation", dilation, ndim)
    if set(dilations) == {1}:
        return weight
    extents = [d * (k - 1) + 1 for k, d in zip(weight.shape[2:], dilations, strict=True)]
    dense = weight.new_zeros(*weight.shape[:2], *extents)
    steps: tuple[Any, ...] = tuple(slice(None, None, d) for d in dilations)
    dense[(slice(None), slice(None), *steps)] = weight
    return dense


def fold_bn(weight: Tensor, bias: Tensor | None, bn: BatchNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution with the batch norm after it folded in (running statistics).

    W' = W·γ/√(σ²+ε), b' = β + (b − μ)·γ/√(σ²+ε), over the output channels.
    """
    running_mean, running_var = bn.running_mean, bn.running_var
    if running_mean is None or running_var is None:
        raise ValueError(f"bn={bn}: has no running statistics, so it cannot be folded")
    eps = bn.eps
    scale = torch.rsqrt(running_var + eps)
    if bn.weight is not None:
        scale = scale * bn.weight
    shift = -running_mean * scale if bias is None else (bias - running_mean) * scale
    if bn.bias is not None:
        shift = shift + bn.bias
    return (weight * scale.reshape(-1, *[1] * (weight.dim() - 1))).detach(), shift.detach()
