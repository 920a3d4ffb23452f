"""Depthwise convolution with a kernel size of its own for each group of channels (HRVMamba).

H. Zhang et al. 2024, "HRVMamba: High-Resolution Visual State Space Model for Dense Prediction", arXiv 2410.03174.

A state space model lacks the bias to the neighbourhood that convolutions have. Channels are split into groups, each
with another kernel size, so that one layer sees several scales; a channel shuffle spreads the scales over channels.

    y[c] = W_c ⋆ x[c] + b_c,    kernel 3 × 3 for the first quarter of the channels, 5, 7 and 9 for the others

Cost a position: Σ_k k^n · C / 4 multiply-adds; with 3, 5, 7, 9 in the plane 41·C, half of a 9 × 9 kernel's.
The scan is in :mod:`torchconv.ops.hrvmamba_scan`, the sampling before it in :mod:`torchconv.ops.hrvmamba_dcn`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_positive
from torchconv.catalog import part
from torchconv.kernels import inception_conv
from torchconv.ops._common import (
    CONV,
    Padding,
    Size,
    check_depthwise,
    check_input,
    check_odd,
    check_same,
    conv_nd,
    make_conv,
    ntuple,
)


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Channel i of group g becomes channel i·groups + g.

    Shape:
        (N, C, \\*spatial) → the same, C divisible by ``groups``.

    Raises:
        ValueError: it is not.

    Example:
        >>> channel_shuffle(torch.arange(6).reshape(1, 6, 1), 2).flatten().tolist()
        [0, 3, 1, 4, 2, 5]

    Reference: Zhang et al., arXiv 1707.01083.
    """
    check_positive("groups", groups)
    check(x.shape[1] % groups == 0, "groups", groups, f"must divide the {x.shape[1]} channels")
    return x.unflatten(1, (groups, x.shape[1] // groups)).transpose(1, 2).flatten(1, 2)


@part(
    "multikernel-dw",
    paper="hrvmamba",
    kind="operator",
    dims=(1, 2, 3),
    mixes="space",
    supports=("stride", "dilation"),
    merges="conv",
    mixer={"kernel_size": 9},
    keywords="multi-scale depthwise mixed kernel sizes MixConv HRVMamba DVSS inductive bias",
)
class MultiKernelDWConv(nn.Module):
    """Depthwise convolution whose groups of channels have kernels of 3, 5, … up to ``kernel_size``.

    Of C channels and g sizes each group has C // g, the first one also what is left over.

    Args:
        in_channels: C, at least the number of sizes.
        out_channels: None or C.
        kernel_size: the largest, odd, the same on every axis; 9 stands for 3, 5, 7, 9 (published), 1 for 1 alone.
        stride, dilation: as in ``nn.ConvNd``.
        padding: "same".
        groups: None or C.
        bias: learn an additive bias.

    Shape:
        (N, C, L, …) → (N, C, ⌈L / stride⌉, …).

    Raises:
        ValueError: an argument is out of range or not supported; the message names it.

    Example:
        >>> layer = MultiKernelDWConv2d(10, kernel_size=9)
        >>> [tuple(conv.weight.shape[::2]) for conv in layer.children()]
        [(4, 3), (2, 5), (2, 7), (2, 9)]

    Reference: arXiv 2410.03174, section 3 (multi-scale depthwise convolution).
    """

    ndim: ClassVar[int] = 0

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_size: Size = 9,
        stride: Size = 1,
        padding: Padding = "same",
        dilation: Size = 1,
        groups: int | None = None,
        bias: bool = True,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_depthwise(in_channels, out_channels, groups, name)
        sizes = ntuple("kernel_size", kernel_size, self.ndim)
        check_odd(sizes, name)
        check(len(set(sizes)) == 1, "kernel_size", kernel_size, f"{name} needs the same size on every axis")
        self.stride = ntuple("stride", stride, self.ndim)
        self.dilation = ntuple("dilation", dilation, self.ndim)
        check_same(padding, sizes, name, self.dilation)
        kernels = tuple(range(3, sizes[0] + 1, 2)) or (1,)
        remedy = f"{len(kernels)} kernel sizes need as many channels; use a smaller kernel_size"
        check(in_channels >= len(kernels), "in_channels", in_channels, remedy)
        self.in_channels = self.out_channels = in_channels
        self.kernel_size, self.padding, self.kernels = sizes, "same", kernels
        rest = in_channels % len(kernels)
        for i, k in enumerate(kernels):
            width = in_channels // len(kernels) + (rest if i == 0 else 0)
            # Names "0", "1", … are those of the authors' checkpoints; only the parameters are used.
            self.add_module(
                str(i), CONV[self.ndim](width, width, k, groups=width, bias=bias, device=device, dtype=dtype)
            )

    def reset_parameters(self) -> None:
        """PyTorch's convolution defaults."""
        for conv in self.children():
            reset: Any = conv.reset_parameters
            reset()

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x``."""
        check_input(x, self.in_channels, self.ndim)
        convs: list[Any] = list(self.children())
        if set(self.stride) == {1}:
            return inception_conv(x, [c.weight for c in convs], [c.bias for c in convs], self.dilation)
        pieces = torch.split(x, [c.weight.shape[0] for c in convs], 1)
        return torch.cat(
            [
                conv_nd(piece, c.weight, c.bias, self.stride, "same", self.dilation, c.weight.shape[0])
                for piece, c in zip(pieces, convs, strict=True)
            ],
            1,
        )

    def merge(self) -> nn.Module:
        """The same map as one depthwise ``nn.ConvNd`` of the largest size; it costs up to twice as much."""
        convs: list[Any] = list(self.children())
        largest = self.kernel_size[0]
        weight = torch.cat([F.pad(c.weight, [(largest - c.weight.shape[2]) // 2] * (2 * self.ndim)) for c in convs])
        bias = None if convs[0].bias is None else torch.cat([c.bias for c in convs])
        return make_conv(weight, bias, self.stride, "same", self.dilation, self.in_channels)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"{self.in_channels}, kernels={self.kernels}, stride={self.stride}, dilation={self.dilation}"


class MultiKernelDWConv1d(MultiKernelDWConv):
    """Depthwise convolution with several kernel sizes over (N, C, L)."""

    ndim = 1


class MultiKernelDWConv2d(MultiKernelDWConv):
    """Depthwise convolution with several kernel sizes over (N, C, H, W)."""

    ndim = 2


class MultiKernelDWConv3d(MultiKernelDWConv):
    """Depthwise convolution with several kernel sizes over (N, C, D, H, W)."""

    ndim = 3
