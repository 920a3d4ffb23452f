"""SNNK in the place of a convolution and its activation (Sehanobish et al. 2023, arXiv 2310.13225).

A convolution with an activation is a feed-forward layer on every patch, so its kernel form is

    y = Ψ(W, b) Φ(patch),     Φ(patch) = m^{-1/2} max(G ⋆ x + c, 0):

a fixed random convolution with m outputs, the ReLU, and a trained 1 × 1 convolution. For 1 × 1 kernels it is the
paper's layer at each position; larger kernels are its plain extension, not in the paper. No patches are stored.

Trained parameters out·m/g; multiply-adds a position m·(C_in/g·k^n + out/g), against out·C_in/g·k^n of the convolution.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchconv._common import check, check_positive
from torchconv.catalog import part
from torchconv.ops._common import (
    CONV,
    Padding,
    Size,
    check_channels,
    check_input,
    check_padding,
    conv_nd,
    ntuple,
)
from torchconv.ops._snnk_features import check_rectifier, gaussian_rows, rectify, relu_features, share_scale


@part(
    "snnk",
    paper="snnk",
    kind="operator",
    dims=(1, 2, 3),
    mixes="space+channels",
    supports=("stride", "channels", "groups", "dilation", "even", "padding"),
    mixer={"kernel_size": 3},
    keywords="random features kernel arc-cosine fixed random convolution scalable neural network kernels",
)
class SNNKConv(nn.Module):
    """Convolution with activation as random ReLU features of each patch, times trained features of its weights.

    Args:
        in_channels, out_channels: channels, both divisible by ``groups``; ``out_channels`` unset is ``in_channels``.
        kernel_size, stride, padding, dilation: of the random convolution that sees the patches.
        groups: blocks of channels with features of their own.
        bias: append a constant 1 to each patch, so that weights start as the features of (W, b). There is no additive
            bias.
        num_features: m in all, divisible by ``groups``; unset takes out_channels, and at least 8 a group.
        order, floor: m^{-1/2} max(·, floor)^order, see :func:`~torchconv.ops.snnk.relu_features`.
        orthogonal: random kernels orthogonal in blocks, within a group.

    Shape:
        (N, in_channels, \\*spatial) → (N, out_channels, \\*spatial').

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> layer = SNNKConv2d(6, 9, 3, stride=2, num_features=12)
        >>> layer(torch.zeros(2, 6, 5, 4)).shape, sum(p.numel() for p in layer.parameters())
        (torch.Size([2, 9, 3, 2]), 108)

    Reference: Sehanobish et al., arXiv 2310.13225.
    """

    ndim: ClassVar[int] = 0

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_size: Size = 1,
        stride: Size = 1,
        padding: Padding = "same",
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        num_features: int | None = None,
        order: int = 1,
        floor: float = 0.0,
        orthogonal: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        check_channels(in_channels, out_channels, groups)
        check_padding(padding, self.ndim)
        check_rectifier(order, floor)
        if num_features is None:
            num_features = max(out_channels, 8 * groups)
        check_positive("num_features", num_features)
        check(num_features % groups == 0, "num_features", num_features, f"must be divisible by groups={groups}")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = ntuple("kernel_size", kernel_size, self.ndim)
        self.stride = ntuple("stride", stride, self.ndim)
        self.dilation = ntuple("dilation", dilation, self.ndim)
        self.padding, self.bias, self.num_features = padding, bias, num_features
        self.order, self.floor, self.orthogonal = order, floor, orthogonal
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        values = in_channels // groups * math.prod(self.kernel_size)
        rows = torch.cat(
            [gaussian_rows(num_features // groups, values + bias, orthogonal, **options) for _ in range(groups)]
        )
        kernel = rows[:, :values].reshape(num_features, in_channels // groups, *self.kernel_size)
        self.projection_matrix: Tensor
        self.projection_offset: Tensor | None
        self.register_buffer("projection_matrix", kernel.contiguous())
        self.register_buffer("projection_offset", rows[:, values].contiguous() if bias else None)
        self.weights = nn.Parameter(torch.empty(out_channels, num_features // groups, **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Features of weights (and biases) drawn as ``nn.ConvNd`` draws them."""
        weight = self.weights
        conv = CONV[self.ndim](
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            groups=self.groups,
            bias=self.bias,
            device=weight.device,
            dtype=weight.dtype,
        )
        self.set_from(conv)

    @torch.no_grad()
    def set_from(self, conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        """Set the weights to the features of a convolution's kernels and biases, of the same shape and groups."""
        shape = (self.out_channels, *self.projection_matrix.shape[1:])
        check(conv.weight.shape == shape, "conv", tuple(conv.weight.shape), f"its weight must have shape {shape}")
        for group in range(self.groups):
            outputs, rows = (
                slice(group * n // self.groups, (group + 1) * n // self.groups)
                for n in (self.out_channels, self.num_features)
            )
            offset = None
            if self.projection_offset is not None:
                bias = conv.weight.new_zeros(self.out_channels) if conv.bias is None else conv.bias
                offset = bias[outputs, None] * self.projection_offset[rows]
            kernels = conv.weight[outputs].flatten(1)
            features = relu_features(kernels, self.projection_matrix[rows].flatten(1), offset, self.order, self.floor)
            self.weights[outputs] = features

    @classmethod
    def from_conv(cls, conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, num_features: int | None = None) -> SNNKConv:
        """The kernel form of a convolution and the ReLU after it; it estimates the arc-cosine kernel, so fine-tune it.

        Raises:
            ValueError: ``conv`` is no ``nn.ConvNd`` of this dimension, or pads with other values than zeros.
        """
        if not isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d) or conv.weight.dim() != cls.ndim + 2:
            raise ValueError(f"conv={type(conv).__name__}: expected an nn.{CONV[cls.ndim].__name__}")
        check(conv.padding_mode == "zeros", "padding_mode", conv.padding_mode, "only zeros are padded here")
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            conv.bias is not None,
            num_features=num_features,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        layer.set_from(conv)
        return layer.train(conv.training)

    def features(self, x: Tensor) -> Tensor:
        """The features (N, num_features, \\*spatial') of the patches of ``x``, scaled by the features of a group."""
        rows = (self.projection_matrix, self.projection_offset, self.order, self.floor)
        kernel, offset, floor, rest = share_scale(*rows, self.weights.shape[1])
        z = conv_nd(x, kernel, offset, self.stride, self.padding, self.dilation, self.groups)
        return rectify(z, self.order, floor, rest)

    def forward(self, x: Tensor) -> Tensor:
        """Weights times the features of ``x``."""
        check_input(x, self.in_channels, self.ndim)
        kernel = self.weights.reshape(*self.weights.shape, *[1] * self.ndim)
        return conv_nd(self.features(x), kernel, groups=self.groups)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding!r}, dilation={self.dilation}, groups={self.groups}, bias={self.bias}, "
            f"num_features={self.num_features}"
        )


class SNNKConv1d(SNNKConv):
    """SNNK over (N, C, L)."""

    ndim = 1


class SNNKConv2d(SNNKConv):
    """SNNK over (N, C, H, W)."""

    ndim = 2


class SNNKConv3d(SNNKConv):
    """SNNK over (N, C, D, H, W)."""

    ndim = 3
