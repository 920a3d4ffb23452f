"""The residual block before HRVMamba's first transition, and what joins its maps for the classifier, as in HRNet.

H. Zhang et al. 2024, arXiv 2410.03174; Wang et al., arXiv 1908.07919. Names of parameters are those of the checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """1 × 1, 3 × 3, 1 × 1 convolutions with batch norms around a residual, projected where the channels change.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        width: of the 3 × 3; unset is a quarter of ``out_channels``.

    Shape:
        (N, in_channels, H, W) → (N, out_channels, H, W).

    Reference: He et al., arXiv 1512.03385.
    """

    def __init__(self, in_channels: int, out_channels: int, width: int | None = None, **options: Any) -> None:
        super().__init__()
        width = out_channels // 4 if width is None else width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False, **options)
        self.bn1 = nn.BatchNorm2d(width, **options)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False, **options)
        self.bn2 = nn.BatchNorm2d(width, **options)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False, **options)
        self.bn3 = nn.BatchNorm2d(out_channels, **options)
        self.downsample = (
            None
            if in_channels == out_channels
            else nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, bias=False, **options),
                nn.BatchNorm2d(out_channels, **options),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``x``."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x)))


class _ConvBN(nn.Module):
    """Convolution, batch norm, ReLU; names ``conv`` and ``bn`` as in the authors' neck."""

    def __init__(self, source: int, target: int, kernel: int, stride: int, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(source, target, kernel, stride, kernel // 2, bias=False, **options)
        self.bn = nn.BatchNorm2d(target, **options)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class FuseScales(nn.Module):
    """All resolutions as one map: each widened by a bottleneck, the finest added downwards by strided convolutions.

    Args:
        channels: of the resolutions, the finest first.
        out_channels: of the result.

    Shape:
        a list of (N, channels[i], H_i, W_i), each side half of the one before, rounded up → (N, out_channels, H', W')
        of the last one's size.

    Reference: Wang et al., arXiv 1908.07919, classification head.
    """

    def __init__(self, channels: Sequence[int], out_channels: int = 2048, **options: Any) -> None:
        super().__init__()
        widths = [128 * 2**i for i in range(len(channels))]
        self.increase_layers = nn.ModuleList(
            nn.Sequential(Bottleneck(c, w, **options)) for c, w in zip(channels, widths, strict=True)
        )
        self.downsample_layers = nn.ModuleList(_ConvBN(w, 2 * w, 3, 2, **options) for w in widths[:-1])
        self.final_layer = _ConvBN(widths[-1], out_channels, 1, 1, **options)

    def forward(self, xs: Sequence[Tensor]) -> Tensor:
        """Join ``xs``."""
        maps = [layer(x) for layer, x in zip(self.increase_layers, xs, strict=True)]
        total = maps[0]
        for down, y in zip(self.downsample_layers, maps[1:], strict=True):
            total = down(total) + y
        joined: Tensor = self.final_layer(total)
        return joined
