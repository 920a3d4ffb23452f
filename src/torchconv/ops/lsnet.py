"""Large-small convolution: a wide, cheap look predicts a small kernel for every position.

Wang, Chen, Lin, Han, Ding 2025, "LSNet: See Large, Focus Small", arXiv 2503.23135 (CVPR 2025).

    w = GroupNorm(cv4(ReLU(cv3(cv2(ReLU(cv1(x)))))))           large-kernel perception: cv2 is depthwise, 7 × 7
    a[c, i] = Σ_t w[c mod G, t, i] · x[c, i + t − p]           small-kernel aggregation, G = C / share
    y = BN(a) + x

cv1: 1 × 1, C → C/2; cv2: l × l depthwise; cv3: 1 × 1; each with a batch norm. cv4: 1 × 1 to G·k² taps, and every group
of the norm is the k² taps of one kernel. The taps are not soft-maxed. The norm's statistics are those of the whole map,
so that the operator is not strictly local.

For l = 7, k = 3, share 8: C²·(1/2 + 1/4 + 9/16) + 24.5·C weights and as many multiply-adds a position, and 9·C for the
aggregation. Channels influence each other through the kernels alone: each output channel is a weighted sum of its own
input channel.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check_positive
from torchconv.catalog import part
from torchconv.kernels.adaptive import adaptive_conv
from torchconv.ops._common import (
    BATCH_NORM,
    CONV,
    Padding,
    Size,
    apply_conv,
    check_depthwise,
    check_input,
    check_odd,
    check_same,
    check_unit,
    fold_bn,
    make_conv,
    ntuple,
)


class ConvBN(nn.Module):
    """A convolution without bias and its batch norm, under the authors' names ``c`` and ``bn``.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, groups: as in ``nn.ConvNd``.
        bn_weight: initial scale of the batch norm (0 at the end of a residual branch).
        ndim: spatial axes.

    Shape:
        (N, in_channels, \\*spatial) → (N, out_channels, \\*spatial').
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size = 1,
        stride: Size = 1,
        padding: Size = 0,
        groups: int = 1,
        bn_weight: float = 1.0,
        *,
        ndim: int = 2,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        options = {"device": device, "dtype": dtype}
        self.c = CONV[ndim](
            in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False, **options
        )
        self.bn = BATCH_NORM[ndim](out_channels, **options)
        self.bn_weight = bn_weight
        nn.init.constant_(self.bn.weight, bn_weight)

    def reset_parameters(self) -> None:
        """PyTorch's defaults, and ``bn_weight`` as the batch norm's scale."""
        self.c.reset_parameters()
        self.bn.reset_parameters()
        nn.init.constant_(self.bn.weight, self.bn_weight)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve and normalise."""
        y: Tensor = self.bn(apply_conv(self.c, x))
        return y

    def merge(self) -> nn.Module:
        """One convolution with bias, exact for the running statistics."""
        weight, bias = self.folded()
        c = self.c
        return make_conv(weight, bias, c.stride, c.padding, c.dilation, c.groups)

    def folded(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Kernel and bias of the merged convolution, computed in float64."""
        weight, bias = fold_bn(self.c.weight.double(), None, copy.deepcopy(self.bn).double())
        dtype = dtype or self.c.weight.dtype
        return weight.to(dtype), bias.to(dtype)


class LKP(nn.Module):
    """Large-kernel perception: predicts ``small_kernel_size`` taps for every position and kernel.

    Args:
        channels: C ≥ 1. C/2 inner channels and C/share kernels, rounded down, at least one of each.
        large_kernel_size: l, odd.
        small_kernel_size: k, odd.
        share: channels that use one kernel (the authors call it ``groups``).
        bias: whether the last 1 × 1 convolution has one (the authors': yes).
        ndim: spatial axes.

    Shape:
        (N, C, \\*spatial) → (N, max(1, C // share), taps, \\*spatial).

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> LKP(16)(torch.zeros(2, 16, 5, 4)).shape
        torch.Size([2, 2, 9, 5, 4])

    Reference: arXiv 2503.23135, section 3.
    """

    def __init__(
        self,
        channels: int,
        large_kernel_size: Size = 7,
        small_kernel_size: Size = 3,
        share: int = 8,
        bias: bool = True,
        *,
        ndim: int = 2,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_positive("channels", channels)
        check_positive("share", share)
        self.large_kernel_size = ntuple("large_kernel_size", large_kernel_size, ndim)
        self.small_kernel_size = ntuple("small_kernel_size", small_kernel_size, ndim)
        for name, sizes in (("large", self.large_kernel_size), ("small", self.small_kernel_size)):
            if any(k % 2 == 0 for k in sizes):
                raise ValueError(f"{name}_kernel_size={sizes}: sizes must be odd, so that they have a centre")
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.kernels, self.taps = max(1, channels // share), torch.Size(self.small_kernel_size).numel()
        half = max(1, channels // 2)
        padding = tuple((k - 1) // 2 for k in self.large_kernel_size)
        self.cv1 = ConvBN(channels, half, ndim=ndim, **options)
        self.cv2 = ConvBN(half, half, self.large_kernel_size, padding=padding, groups=half, ndim=ndim, **options)
        self.cv3 = ConvBN(half, half, ndim=ndim, **options)
        self.cv4 = CONV[ndim](half, self.kernels * self.taps, 1, bias=bias, **options)
        self.norm = nn.GroupNorm(self.kernels, self.kernels * self.taps, **options)

    def reset_parameters(self) -> None:
        """PyTorch's defaults in every layer."""
        for layer in (self.cv1, self.cv2, self.cv3, self.cv4, self.norm):
            layer.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """The kernels for ``x``."""
        h = F.relu(self.cv1(x))
        h = F.relu(self.cv3(self.cv2(h)))
        return self.norm(self.cv4(h)).unflatten(1, (self.kernels, self.taps))

    def merge(self) -> LKP:
        """A copy in eval mode whose batch norms are folded into their convolutions."""
        merged = copy.deepcopy(self).eval()
        for name in ("cv1", "cv2", "cv3"):
            layer = getattr(self, name)
            if isinstance(layer, ConvBN):
                setattr(merged, name, layer.merge())
        for parameter in merged.parameters():
            parameter.grad = None
        return merged


@part(
    "lsnet",
    paper="lsnet",
    kind="operator",
    dims=(1, 2, 3),
    # Other channels bear on an output channel through its kernel only; its terms are of its own input channel, so that
    # it does not replace a convolution that mixes channels.
    mixes="space",
    supports=(),
    merges="self",
    mixer={"kernel_size": 3},
    keywords="LSNet large small convolution dynamic kernel per position lightweight LKP SKA involution",
)
class LSConv(nn.Module):
    """Large-small convolution: a wide look predicts a small kernel for each position, y = BN(aggregate(x)) + x.

    Args:
        in_channels: C ≥ 1, any number: C/2 inner channels and C/share kernels are rounded down, at least one of each.
        out_channels: unset or C.
        kernel_size: k, the predicted kernel's size per axis, odd.
        stride, dilation: 1.
        padding: "same".
        groups: unset or C (the aggregation is per channel); see ``share`` for the sharing of kernels.
        bias: whether the last layer of the kernel prediction has a bias. The output's own shift is the batch norm's.
        large_kernel_size: l, size of the look, odd.
        share: channels that use one kernel, ≥ 1.

    Shape:
        (N, C, \\*spatial) → the same.

    Raises:
        ValueError: an argument is out of range or not supported; the message names it.

    Example:
        >>> LSConv2d(16)(torch.zeros(2, 16, 6, 5)).shape
        torch.Size([2, 16, 6, 5])

    Reference: Wang et al., arXiv 2503.23135, section 3.
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
        groups: int | None = None,
        bias: bool = True,
        *,
        large_kernel_size: Size = 7,
        share: int = 8,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        name, ndim = "LSConv", self.ndim
        check_depthwise(in_channels, out_channels, groups, name)
        self.kernel_size = ntuple("kernel_size", kernel_size, ndim)
        check_odd(self.kernel_size, name)
        check_unit("stride", stride, ndim, name, "follow it with a strided 1×1 convolution")
        check_unit("dilation", dilation, ndim, name, "raise large_kernel_size to see further")
        check_same(padding, self.kernel_size, name)
        self.in_channels = self.out_channels = in_channels
        self.share = share
        options = {"device": device, "dtype": dtype}
        self.lkp = LKP(in_channels, large_kernel_size, self.kernel_size, share, bias, ndim=ndim, **options)
        self.bn = BATCH_NORM[ndim](in_channels, **options)

    def reset_parameters(self) -> None:
        """PyTorch's defaults in every layer."""
        self.lkp.reset_parameters()
        self.bn.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Aggregate ``x`` with its own kernels."""
        check_input(x, self.in_channels, self.ndim)
        y: Tensor = self.bn(adaptive_conv(x, self.lkp(x), self.kernel_size)) + x
        return y

    def merge(self) -> nn.Module:
        """The inference form: batch norms of the look folded into its convolutions, the outer one into scale and shift.

        The group norm stays: its statistics are those of each input.
        """
        return MergedLSConv(self)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        look = self.lkp.large_kernel_size
        return f"{self.in_channels}, kernel_size={self.kernel_size}, large_kernel_size={look}, share={self.share}"


class MergedLSConv(nn.Module):
    """Inference form of :class:`LSConv`: y = scale · aggregate(x) + shift + x."""

    def __init__(self, layer: LSConv) -> None:
        super().__init__()
        self.in_channels, self.ndim, self.kernel_size = layer.in_channels, layer.ndim, layer.kernel_size
        self.lkp = layer.lkp.merge()
        one = torch.ones(self.in_channels, dtype=torch.float64, device=layer.bn.running_mean.device)
        scale, shift = fold_bn(one, None, copy.deepcopy(layer.bn).double())
        dtype = layer.bn.running_mean.dtype
        self.scale, self.shift = nn.Parameter(scale.to(dtype)), nn.Parameter(shift.to(dtype))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Aggregate ``x`` with its own kernels."""
        check_input(x, self.in_channels, self.ndim)
        shape = (-1, *[1] * self.ndim)
        a = adaptive_conv(x, self.lkp(x), self.kernel_size)
        return torch.addcmul(x + self.shift.reshape(shape), self.scale.reshape(shape), a)


class LSConv1d(LSConv):
    """Large-small convolution over (N, C, L)."""

    ndim = 1


class LSConv2d(LSConv):
    """Large-small convolution over (N, C, H, W)."""

    ndim = 2


class LSConv3d(LSConv):
    """Large-small convolution over (N, C, D, H, W)."""

    ndim = 3
