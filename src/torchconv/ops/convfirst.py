"""ConvFirst and the blocks beside it (Lavin 2024, arXiv 2404.03617).

    ConvFirst:  y = x + P act(E conv_g x)        MBConv:  y = x + P act(conv_g act(E x))

A batch norm follows every convolution. A pixel of ConvFirst costs c·g·k² + 2ec² multiplications (g: group width), one
of MBConv 2ec² + e·c·g·k². Names of parameters are those of the author's code.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from torchconv._common import check, check_positive


class _Residual(nn.Module):
    layers: nn.Sequential
    residual: bool

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``x``."""
        y: Tensor = self.layers(x)
        return x + y if self.residual else y


def _conv(before: int, after: int, kernel: int = 1, stride: int = 1, width: int | None = None) -> list[nn.Module]:
    if width is not None:
        check_positive("group_width", width)
        check(before % width == 0, "group_width", width, f"must divide the {before} channels of the convolution")
    groups = before // width if width else 1
    conv = nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(after)]


class ConvFirst(_Residual):
    """Grouped convolution, expansion, activation, projection; residual where the shape stays.

    Args:
        in_channels, out_channels: channels.
        kernel_size, stride: of the grouped convolution.
        group_width: channels of a group.
        expansion_ratio: hidden over input channels.
        act_cls: makes the activation.

    Shape:
        (N, in_channels, H, W) → (N, out_channels, H′, W′).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        group_width: int = 8,
        expansion_ratio: int = 4,
        act_cls: Callable[[], nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__()
        hidden = in_channels * expansion_ratio
        conv = _conv(in_channels, in_channels, kernel_size, stride, group_width)
        self.layers = nn.Sequential(*conv, *_conv(in_channels, hidden), act_cls(), *_conv(hidden, out_channels))
        self.residual = in_channels == out_channels and stride == 1


class MBConv(_Residual):
    """Expansion, grouped convolution, projection; arguments as of :class:`ConvFirst`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        group_width: int = 8,
        expansion_ratio: int = 4,
        act_cls: Callable[[], nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__()
        hidden = in_channels * expansion_ratio
        conv = _conv(hidden, hidden, kernel_size, stride, group_width)
        expand, project = _conv(in_channels, hidden), _conv(hidden, out_channels)
        self.layers = nn.Sequential(*expand, act_cls(), *conv, act_cls(), *project)
        self.residual = in_channels == out_channels and stride == 1


class MLP(_Residual):
    """Expansion, activation, projection; residual where the channels stay."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        expansion_ratio: int = 4,
        act_cls: Callable[[], nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__()
        hidden = in_channels * expansion_ratio
        self.layers = nn.Sequential(*_conv(in_channels, hidden), act_cls(), *_conv(hidden, out_channels))
        self.residual = in_channels == out_channels
