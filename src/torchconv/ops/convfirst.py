"""ConvFirst and the blocks beside it (Lavin 2024, arXiv 2404.03617).

    ConvFirst:  y = x + P act(E conv_g x)        MBConv:  y = x + P act(conv_g act(E x))

Convolving first, on the few channels, makes the spatial convolution e times cheaper than in MBConv and lets the whole
block run as one kernel without recomputing anything (``fuse()``). A batch norm follows every convolution.
Multiplications of a pixel with C channels, kernel k, group width g, expansion e:

    ConvFirst C·g·k² + 2eC²    MBConv 2eC² + eC·g·k²    ConvNeXt C·k² + 2eC²    FusedMBConv eC²·k² + eC²

Names of parameters are those of the author's code. ConvNeXt and stacks of blocks are in ``convfirst_stack``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn

from torchconv._common import Size, check, check_positive, ntuple
from torchconv.catalog import part
from torchconv.ops._common import check_input, fold_bn, make_conv
from torchconv.ops.convfirst_fusion import BUDGET, FusedBlock, tiled

Activation = Callable[[], nn.Module]


class Block(nn.Module):
    """A residual block; see the classes below.

    Attributes:
        in_channels: channels of the input.
        residual: whether the input is added: where the shape stays.
        drop: applied to the branch before the addition, for stochastic depth.
    """

    in_channels: int
    residual: bool
    drop: nn.Module

    def branch(self, x: Tensor) -> Tensor:
        """What is added to ``x``."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``x``."""
        check_input(x, self.in_channels, 2)
        y = self.branch(x)
        return x + self.drop(y) if self.residual else y

    def merge(self) -> FusedBlock:
        """The exact inference form: norms folded into convolutions with bias, layers run one after the other."""
        raise NotImplementedError

    def fuse(
        self, tile: Size | None = None, chunk: int | None = None, samples: int = 1, budget: int = BUDGET
    ) -> FusedBlock:
        """The inference form that runs tile by tile and never holds the expanded map.

        Args:
            tile: height and width of the output computed at a time; None chooses the largest that fits ``budget``.
            chunk: expanded channels at a time, with ``tile``; None takes all.
            samples: images at a time, with ``tile``.
            budget: bytes of fast memory (a core's cache, a GPU's shared memory) that a tile may use.

        Raises:
            ValueError: the chunk splits a group, or the activation has parameters.
        """
        return tiled(self.merge(), tile, chunk, samples, budget)


class _Layers(Block):
    layers: nn.Sequential

    def _start(self, layers: list[nn.Module], residual: bool, options: dict[str, Any]) -> None:
        self.layers = nn.Sequential(*layers)
        self.in_channels = cast(nn.Conv2d, layers[0]).in_channels
        self.residual = residual
        self.drop = nn.Identity()
        if options:
            self.to(**options)

    def branch(self, x: Tensor) -> Tensor:
        """The layers in a row."""
        y: Tensor = self.layers(x)
        return y

    def _folded(self, index: int) -> nn.Conv2d:
        """Convolution ``index`` with the norm after it."""
        conv, norm = cast(nn.Conv2d, self.layers[index]), cast(nn.BatchNorm2d, self.layers[index + 1])
        weight, bias = fold_bn(conv.weight, conv.bias, norm)
        padding: Any = conv.padding
        return cast(nn.Conv2d, make_conv(weight, bias, conv.stride, padding, groups=conv.groups))


def grouped_conv(
    before: int, after: int, kernel: Size = 1, stride: Size = 1, width: int | None = None, bias: bool = False
) -> nn.Conv2d:
    """A convolution padded by half its kernel, with groups of ``width`` input channels (None: one group)."""
    check_positive("in_channels", before)
    check_positive("out_channels", after)
    sizes: Any = ntuple("kernel_size", kernel, 2)
    strides: Any = ntuple("stride", stride, 2)
    if width is not None:
        check_positive("group_width", width)
        check(before % width == 0, "group_width", width, f"must divide the {before} channels of the convolution")
    groups = before // width if width else 1
    padding: Any = tuple(k // 2 for k in sizes)
    return nn.Conv2d(before, after, sizes, strides, padding, groups=groups, bias=bias)


def _conv(before: int, after: int, kernel: Size = 1, stride: Size = 1, width: int | None = None) -> list[nn.Module]:
    return [grouped_conv(before, after, kernel, stride, width), nn.BatchNorm2d(after)]


def hidden_channels(channels: int, ratio: float) -> int:
    """Channels of the expanded map."""
    check_positive("in_channels", channels)
    check(channels * ratio >= 1, "expansion_ratio", ratio, "leaves no hidden channels")
    return int(channels * ratio)


def keeps_shape(in_channels: int, out_channels: int, stride: Size, kernel_size: Size = 1) -> bool:
    """Whether the residual is added; an even kernel would change the size of the map by one."""
    unit = set(ntuple("stride", stride, 2)) == {1}
    if unit and in_channels == out_channels:
        odd = all(k % 2 for k in ntuple("kernel_size", kernel_size, 2))
        check(odd, "kernel_size", kernel_size, "the residual needs odd sizes, which keep the size of the map")
    return unit and in_channels == out_channels


@part(
    "convfirst",
    paper="convfirst",
    kind="layer",
    dims=(2,),
    mixes="space+channels",
    merges="self",
    probe={"build": {"in_channels": 8, "out_channels": 8, "group_width": 4}, "inputs": [[2, 8, 7, 6]]},
    keywords="ConvFirst residual block grouped convolution group width block fusion inverted bottleneck efficient",
)
class ConvFirst(_Layers):
    """Grouped convolution, expansion, activation, projection; residual where the shape stays.

    Args:
        in_channels, out_channels: channels.
        kernel_size, stride: of the grouped convolution, padded by half the kernel.
        group_width: channels of a group; must divide ``in_channels``.
        expansion_ratio: hidden over input channels.
        act_cls: makes the activation.
        options: ``device`` and ``dtype``.

    Shape:
        (N, in_channels, H, W) → (N, out_channels, H′, W′), H′ = ⌊(H + 2⌊k/2⌋ − k) / stride⌋ + 1.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> import torch
        >>> block = ConvFirst(16, 16).eval()
        >>> x = torch.randn(1, 16, 14, 14)
        >>> torch.allclose(block.fuse(tile=5, chunk=16)(x), block(x), atol=1e-5)
        True

    Reference: arXiv 2404.03617.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size = 3,
        stride: Size = 1,
        group_width: int = 8,
        expansion_ratio: float = 4,
        act_cls: Activation = nn.SiLU,
        **options: Any,
    ) -> None:
        super().__init__()
        hidden = hidden_channels(in_channels, expansion_ratio)
        conv = _conv(in_channels, in_channels, kernel_size, stride, group_width)
        layers = [*conv, *_conv(in_channels, hidden), act_cls(), *_conv(hidden, out_channels)]
        self._start(layers, keeps_shape(in_channels, out_channels, stride, kernel_size), options)

    def merge(self) -> FusedBlock:
        """The exact inference form: norms folded into convolutions with bias, layers run one after the other."""
        first, expand, project = self._folded(0), self._folded(2), self._folded(5)
        return FusedBlock(expand, project, self.layers[4], first=first, residual=self.residual).eval()


@part(
    "mbconv",
    paper="convfirst",
    kind="layer",
    dims=(2,),
    mixes="space+channels",
    merges="self",
    probe={"build": {"in_channels": 4, "out_channels": 4, "group_width": 4}, "inputs": [[2, 4, 7, 6]]},
    keywords="MBConv inverted bottleneck mobile grouped convolution group width MobileNet EfficientNet",
)
class MBConv(_Layers):
    """Expansion, activation, grouped convolution, activation, projection; residual where the shape stays.

    Arguments and shapes are those of :class:`ConvFirst`.

    Raises:
        ValueError: an argument is out of range; ``group_width`` must divide the hidden channels.

    Example:
        >>> import torch
        >>> MBConv(8, 16, stride=2)(torch.randn(2, 8, 9, 9)).shape
        torch.Size([2, 16, 5, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size = 3,
        stride: Size = 1,
        group_width: int = 8,
        expansion_ratio: float = 4,
        act_cls: Activation = nn.SiLU,
        **options: Any,
    ) -> None:
        super().__init__()
        hidden = hidden_channels(in_channels, expansion_ratio)
        conv = _conv(hidden, hidden, kernel_size, stride, group_width)
        layers = [*_conv(in_channels, hidden), act_cls(), *conv, act_cls(), *_conv(hidden, out_channels)]
        self._start(layers, keeps_shape(in_channels, out_channels, stride, kernel_size), options)

    def merge(self) -> FusedBlock:
        """The exact inference form: norms folded into convolutions with bias, layers run one after the other."""
        expand, middle, project = self._folded(0), self._folded(3), self._folded(6)
        return FusedBlock(expand, project, self.layers[2], middle=middle, residual=self.residual).eval()


@part(
    "fused-mbconv",
    paper="convfirst",
    kind="layer",
    dims=(2,),
    mixes="space+channels",
    merges="self",
    probe={"build": {"in_channels": 4, "out_channels": 4}, "inputs": [[2, 4, 7, 6]]},
    keywords="FusedMBConv dense convolution expansion EfficientNetV2",
)
class FusedMBConv(_Layers):
    """Dense k × k convolution that expands, activation, projection; residual where the shape stays.

    Arguments and shapes are those of :class:`ConvFirst`, without groups.

    Example:
        >>> import torch
        >>> FusedMBConv(8, 8)(torch.randn(2, 8, 9, 9)).shape
        torch.Size([2, 8, 9, 9])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size = 3,
        stride: Size = 1,
        expansion_ratio: float = 4,
        act_cls: Activation = nn.SiLU,
        **options: Any,
    ) -> None:
        super().__init__()
        hidden = hidden_channels(in_channels, expansion_ratio)
        layers = [*_conv(in_channels, hidden, kernel_size, stride), act_cls(), *_conv(hidden, out_channels)]
        self._start(layers, keeps_shape(in_channels, out_channels, stride, kernel_size), options)

    def merge(self) -> FusedBlock:
        """The exact inference form: norms folded into convolutions with bias, layers run one after the other."""
        return FusedBlock(self._folded(0), self._folded(3), self.layers[2], residual=self.residual).eval()


@part(
    "convfirst-mlp",
    paper="convfirst",
    kind="layer",
    dims=(2,),
    mixes="channels",
    merges="self",
    probe={"build": {"in_channels": 4, "out_channels": 4}, "inputs": [[2, 4, 5, 6]]},
    keywords="MLP pointwise expansion projection",
)
class MLP(_Layers):
    """Expansion, activation, projection; residual where the channels stay.

    Args:
        in_channels, out_channels: channels.
        expansion_ratio: hidden over input channels.
        act_cls: makes the activation.
        options: ``device`` and ``dtype``.

    Shape:
        (N, in_channels, H, W) → (N, out_channels, H, W).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        expansion_ratio: float = 4,
        act_cls: Activation = nn.SiLU,
        **options: Any,
    ) -> None:
        super().__init__()
        hidden = hidden_channels(in_channels, expansion_ratio)
        layers = [*_conv(in_channels, hidden), act_cls(), *_conv(hidden, out_channels)]
        self._start(layers, in_channels == out_channels, options)

    def merge(self) -> FusedBlock:
        """The exact inference form: norms folded into convolutions with bias, layers run one after the other."""
        return FusedBlock(self._folded(0), self._folded(3), self.layers[2], residual=self.residual).eval()
