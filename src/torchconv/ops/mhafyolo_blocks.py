"""MHAF-YOLO's blocks of large depthwise kernels: RepHMS, and RepHDW of the first MAF-YOLO (arXiv 2502.04656).

    B(x)   = 1×1(σ(Rep(1×1(σ(Rep(1×1 x))))))            inverted bottleneck, no residual; 1×1 with batch norm and SiLU
    RepHMS: split a 1 × 1 convolution in w chunks; chunk i is B(chunk i + output i − 1); concatenate all, 1 × 1
    RepHDW: two halves; bottlenecks with one Rep follow each other on the second; concatenate all, 1 × 1

Cost of B with m inner channels, a position: 2·c·m + m² + 2·K²·m multiply-adds folded; while training Σ_b k_b² more.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_positive
from torchconv.catalog import part
from torchconv.ops._common import Padding, Size, check_input
from torchconv.ops.mhafyolo import (
    ConvBN,
    MultiKernelReparamConv1d,
    MultiKernelReparamConv2d,
    MultiKernelReparamConv3d,
    check_sizes,
    merged_copy,
)


class _Bottleneck(nn.Module):
    """1 × 1 → Rep → SiLU → 1 × 1 → Rep → SiLU → 1 × 1, or with ``twice`` False 1 × 1 → Rep → SiLU → 1 × 1."""

    def __init__(self, channels: int, inner: int, kernel_size: int, twice: bool, ndim: int, **options: Any) -> None:
        super().__init__()
        rep = _REP[ndim]
        self.conv1 = ConvBN(channels, inner, ndim=ndim, **options)
        self.conv2 = rep(inner, kernel_size=kernel_size, **options)
        self.one_conv = ConvBN(inner, inner if twice else channels, ndim=ndim, **options)
        self.conv3 = rep(inner, kernel_size=kernel_size, **options) if twice else None
        self.one_conv2 = ConvBN(inner, channels, ndim=ndim, **options) if twice else None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.one_conv(F.silu(self.conv2(self.conv1(x))))
        if self.conv3 is not None and self.one_conv2 is not None:
            y = self.one_conv2(F.silu(self.conv3(y)))
        return y


_REP: tuple[Any, ...] = (
    nn.Module,
    MultiKernelReparamConv1d,
    MultiKernelReparamConv2d,
    MultiKernelReparamConv3d,
)


class _Block(nn.Module):
    """Checks and merging of both blocks."""

    ndim: ClassVar[int] = 0

    def _prepare(
        self,
        in_channels: int,
        out_channels: int | None,
        kernel_size: Size,
        stride: Size,
        padding: Padding,
        dilation: Size,
        groups: int,
    ) -> int:
        name = type(self).__name__
        out_channels = in_channels if out_channels is None else out_channels
        check_positive("in_channels", in_channels)
        check_positive("out_channels", out_channels)
        check(out_channels >= 2, "out_channels", out_channels, "must be at least 2, half of which go through the block")
        sizes = check_sizes(name, self.ndim, kernel_size, stride, padding, dilation)
        check(groups == 1, "groups", groups, f"{name}'s 1×1 convolutions mix all channels; leave groups at 1")
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, sizes
        return out_channels

    def merge(self) -> nn.Module:
        """The same map with every branch and batch norm folded into its convolution."""
        return merged_copy(self)


@part(
    "rephms",
    paper="mhafyolo",
    kind="operator",
    dims=(1, 2, 3),
    mixes="space+channels",
    supports=("channels",),
    merges="self",
    mixer={"kernel_size": 7},
    keywords="RepHMS heterogeneous multi-scale block ELAN large kernel YOLO detection MAF-YOLO re-parameterisation",
)
class RepHMS(_Block):
    """Reparameterised heterogeneous multi-scale block: chunks go through inverted bottlenecks one after another.

    A 1 × 1 convolution makes ``width`` chunks of c = out_channels // 2. Chunk 1 gets chunk 0 added, each later one the
    output of the one before; all go through ``depth`` bottlenecks of their own, and everything is joined by 1 × 1.

    Args:
        in_channels: channels of the input.
        out_channels: ≥ 2; unset is ``in_channels``.
        kernel_size: of the depthwise kernels, see :class:`MultiKernelReparamConv`.
        stride, dilation, groups: 1.
        padding: "same".
        bias: no effect, since batch norms follow.
        width: chunks w ≥ 2.
        depth: bottlenecks a chunk, ≥ 1; at most 2 where ``width`` exceeds 3 (no released model is deeper than 1).
        expansion: inner channels over c.
        eps, momentum: of the batch norms.

    Shape:
        (N, in_channels, \\*spatial) → (N, out_channels, \\*spatial).

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> RepHMS2d(8, 16, 7)(torch.randn(2, 8, 6, 5)).shape
        torch.Size([2, 16, 6, 5])

    Reference: arXiv 2502.04656, section 3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_size: Size = 7,
        stride: Size = 1,
        padding: Padding = "same",
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        width: int = 3,
        depth: int = 1,
        expansion: float = 3,
        eps: float = 1e-3,
        momentum: float = 0.03,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        out_channels = self._prepare(in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        check_positive("depth", depth)
        check(isinstance(width, int) and width >= 2, "width", width, "must be an integer >= 2")
        check(depth < 3 or width < 4, "depth", depth, "the cascade is defined up to depth 2 where width exceeds 3")
        half, self.width, self.depth = out_channels // 2, width, depth
        inner = int(half * expansion)
        check(inner >= 1, "expansion", expansion, "leaves no channel in the bottleneck")
        options: dict[str, Any] = {"eps": eps, "momentum": momentum, "device": device, "dtype": dtype}
        size = self.kernel_size[0]
        self.conv1 = ConvBN(in_channels, width * half, ndim=self.ndim, **options)
        self.RepElanMSBlock = nn.ModuleList(
            nn.ModuleList(_Bottleneck(half, inner, size, True, self.ndim, **options) for _ in range(depth))
            for _ in range(width - 1)
        )
        self.conv2 = ConvBN(half * (1 + (width - 1) * depth), out_channels, ndim=self.ndim, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``x``."""
        check_input(x, self.in_channels, self.ndim)
        chunks = self.conv1(x).chunk(self.width, 1)
        outputs = [chunks[0]]
        cascade: list[Tensor] = []
        for i, stack in enumerate(self.RepElanMSBlock):
            y = chunks[i + 1] + chunks[0] if i == 0 else chunks[i + 1]
            blocks: Any = stack
            for j, block in enumerate(blocks):
                if i > 0:
                    y = y + cascade[j]
                    if j == self.depth - 1:
                        # As published: for depth > 1 the last entry stays and stands first for the next chunk.
                        cascade = cascade[-1:] if self.depth > 1 else []
                y = block(y)
                outputs.append(y)
                if i < self.width - 2:
                    cascade.append(y)
        z: Tensor = self.conv2(torch.cat(outputs, 1))
        return z


class RepHMS1d(RepHMS):
    """Heterogeneous multi-scale block over (N, C, L)."""

    ndim = 1


class RepHMS2d(RepHMS):
    """Heterogeneous multi-scale block over (N, C, H, W)."""

    ndim = 2


class RepHMS3d(RepHMS):
    """Heterogeneous multi-scale block over (N, C, D, H, W)."""

    ndim = 3


@part(
    "rephdw",
    paper="mhafyolo",
    kind="operator",
    dims=(1, 2, 3),
    mixes="space+channels",
    supports=("channels",),
    merges="self",
    mixer={"kernel_size": 7},
    keywords="RepHDW heterogeneous depthwise block ELAN CSP large kernel MAF-YOLO detection re-parameterisation",
)
class RepHDW(_Block):
    """Reparameterised heterogeneous depthwise block (the first MAF-YOLO): a chain of bottlenecks, all outputs joined.

    A 1 × 1 convolution makes two halves of c = int(out_channels · expansion); ``depth`` bottlenecks follow each other
    on the second, and the halves and all outputs are joined by 1 × 1: (depth + 2)·c → out_channels.

    Args:
        in_channels: channels of the input.
        out_channels: ≥ 2; unset is ``in_channels``.
        kernel_size: of the depthwise kernels, see :class:`MultiKernelReparamConv`.
        stride, dilation, groups: 1.
        padding: "same".
        bias: no effect, since batch norms follow.
        depth: bottlenecks, ≥ 1.
        expansion: c over out_channels.
        depth_expansion: inner channels of a bottleneck over c.
        eps, momentum: of the batch norms.

    Shape:
        (N, in_channels, \\*spatial) → (N, out_channels, \\*spatial).

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> RepHDW2d(8, 16, 5, depth=2)(torch.randn(2, 8, 6, 5)).shape
        torch.Size([2, 16, 6, 5])

    Reference: arXiv 2502.04656, section 3, after MAF-YOLO.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_size: Size = 7,
        stride: Size = 1,
        padding: Padding = "same",
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        depth: int = 1,
        expansion: float = 0.5,
        depth_expansion: float = 3,
        eps: float = 1e-3,
        momentum: float = 0.03,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        out_channels = self._prepare(in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        check_positive("depth", depth)
        half = int(out_channels * expansion)
        check(half >= 1, "expansion", expansion, "leaves no channel in the block")
        inner = int(half * depth_expansion)
        check(inner >= 1, "depth_expansion", depth_expansion, "leaves no channel in the bottleneck")
        options: dict[str, Any] = {"eps": eps, "momentum": momentum, "device": device, "dtype": dtype}
        size = self.kernel_size[0]
        self.conv1 = ConvBN(in_channels, 2 * half, ndim=self.ndim, **options)
        self.m = nn.ModuleList(_Bottleneck(half, inner, size, False, self.ndim, **options) for _ in range(depth))
        self.conv2 = ConvBN((depth + 2) * half, out_channels, ndim=self.ndim, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``x``."""
        check_input(x, self.in_channels, self.ndim)
        outputs = list(self.conv1(x).chunk(2, 1))
        for block in self.m:
            outputs.append(block(outputs[-1]))
        y: Tensor = self.conv2(torch.cat(outputs, 1))
        return y


class RepHDW1d(RepHDW):
    """Heterogeneous depthwise block over (N, C, L)."""

    ndim = 1


class RepHDW2d(RepHDW):
    """Heterogeneous depthwise block over (N, C, H, W)."""

    ndim = 2


class RepHDW3d(RepHDW):
    """Heterogeneous depthwise block over (N, C, D, H, W)."""

    ndim = 3
