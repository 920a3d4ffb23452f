"""Depthwise over-parameterised convolution: a kernel that is a product of two factors, folded for use.

Cao et al. 2020, "DO-Conv: Depthwise Over-parameterized Convolutional Layer", arXiv 2006.12030. DeepRFT
(arXiv 2111.11745) trains all of its convolutions so.

With T taps, W of shape (out, in/groups, T) and, for every input channel, D of shape (T, T):

    kernel[o, i] = (D_i + 1) W[o, i]

D starts at zero, so that the layer starts as the plain convolution; the products change how it is trained, not what it
can compute. in·T² more parameters while training, T²·in·out/groups multiply-adds a step for the fold; folded, a plain
convolution. A 1 × 1 kernel has no D.
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
    check_input,
    check_padding,
    conv_nd,
    make_conv,
    ntuple,
)


def fold_depthwise(weight: Tensor, factors: Tensor, kernel_size: tuple[int, ...]) -> Tensor:
    """The kernel of W and the factors D (with the identity added): kernel[o, i] = D_i W[o, i].

    With groups, output channel o uses the factors of the input channels (o mod groups)·in/groups + j, as the authors'
    checkpoints have it.

    Args:
        weight: W.
        factors: D_i + 1 for every input channel.
        kernel_size: sizes with T as their product.

    Shape:
        W (out, in/groups, T), factors (in, T, T) → (out, in/groups, \\*kernel_size).

    Example:
        >>> fold_depthwise(torch.ones(1, 1, 3), 2 * torch.eye(3)[None], (3,))
        tensor([[[2., 2., 2.]]])

    Reference: arXiv 2006.12030, equation 3.
    """
    fits = factors.dim() == 3 and weight.shape[2:] == factors.shape[1:2] == factors.shape[2:]
    if not fits or math.prod(kernel_size) != factors.shape[1] or weight.shape[:2].numel() % factors.shape[0]:
        shapes = f"{tuple(weight.shape)}, {tuple(factors.shape)} for kernel_size={kernel_size}"
        raise ValueError(f"weight, factors of shapes {shapes}: expected (out, in/groups, T), (in, T, T), T its product")
    out, inputs = weight.shape[:2]
    rows = weight.reshape(out * inputs // factors.shape[0], *factors.shape[::2])
    return torch.einsum("ims,ois->oim", factors, rows).reshape(out, inputs, *kernel_size)


@part(
    "doconv",
    paper="deeprftv2",
    kind="operator",
    dims=(1, 2, 3),
    mixes="space+channels",
    supports=("stride", "channels", "groups", "dilation", "even", "padding"),
    merges="conv",
    mixer={"kernel_size": 3},
    keywords="DO-Conv depthwise over-parameterized convolution over-parameterisation training folding DeepRFT",
)
class DOConv(nn.Module):
    """Convolution with an over-parameterised kernel, a plain convolution after training.

    Args:
        in_channels, out_channels: channels, both divisible by ``groups``.
        kernel_size: odd or even, ≥ 1.
        stride, padding, dilation, groups, bias: as in ``nn.ConvNd``, and "same" at any stride.

    Shape:
        (N, in_channels, \\*spatial) → (N, out_channels, \\*spatial').

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> layer = DOConv2d(3, 8)
        >>> torch.equal(layer.merge().weight.flatten(2), layer.W)  # at the start
        True

    Reference: arXiv 2006.12030.
    """

    ndim: ClassVar[int] = 0
    D_diag: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size = 3,
        stride: Size = 1,
        padding: Padding = "same",
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
        taps = math.prod(self.kernel_size)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.W = nn.Parameter(torch.empty(out_channels, in_channels // groups, taps, **options))
        self.D = nn.Parameter(torch.empty(in_channels, taps, taps, **options)) if taps > 1 else None
        if taps > 1:
            self.register_buffer("D_diag", torch.eye(taps, **options).repeat(in_channels, 1, 1))
        self.bias = nn.Parameter(torch.empty(out_channels, **options)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """PyTorch's convolution defaults for W, zeros for D."""
        nn.init.kaiming_uniform_(self.W, a=math.sqrt(5))
        if self.D is not None:
            nn.init.zeros_(self.D)
        if self.bias is not None:
            bound = 1 / math.sqrt(self.W[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def folded_weight(self) -> Tensor:
        """The kernel (out, in/groups, \\*kernel_size); differentiable."""
        if self.D is None:
            return self.W.reshape(*self.W.shape[:2], *self.kernel_size)
        return fold_depthwise(self.W, self.D + self.D_diag, self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x``."""
        check_input(x, self.in_channels, self.ndim)
        return conv_nd(x, self.folded_weight(), self.bias, self.stride, self.padding, self.dilation, self.groups)

    def merge(self) -> nn.Module:
        """The same map as an ``nn.ConvNd``."""
        return make_conv(self.folded_weight(), self.bias, self.stride, self.padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding!r}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}"
        )


class DOConv1d(DOConv):
    """Over-parameterised convolution over (N, C, L)."""

    ndim = 1


class DOConv2d(DOConv):
    """Over-parameterised convolution over (N, C, H, W)."""

    ndim = 2


class DOConv3d(DOConv):
    """Over-parameterised convolution over (N, C, D, H, W)."""

    ndim = 3
