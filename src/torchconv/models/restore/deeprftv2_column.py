"""The columns of DeepRFTv2: encoders and decoders of a U-Net whose states are updated invertibly.

arXiv 2511.21132, section 3; the update is that of :mod:`torchconv.ops.deeprftv2_reversible`. An encoder's states are
the skip connections, which the decoder then changes in its turn, and the next stage's encoder finds them so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchconv.ops.deeprftv2_kernel import NAFBlock
from torchconv.ops.deeprftv2_reversible import keep_away_from_zero, reversible_column

LEVELS = 3


class Halve(nn.Module):
    """Convolution 2 × 2 with stride 2, under the name ``body.0``."""

    def __init__(self, in_channels: int, out_channels: int, **options: Any) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(in_channels, out_channels, 2, 2, bias=False, **options))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C', H/2, W/2)."""
        y: Tensor = self.body(x)
        return y


class Double(nn.Module):
    """Convolution 1 × 1 and a pixel shuffle by 2, under the name ``body.0``."""

    def __init__(self, in_channels: int, out_channels: int, **options: Any) -> None:
        super().__init__()
        conv = nn.Conv2d(in_channels, 4 * out_channels, 1, bias=False, **options)
        self.body = nn.Sequential(conv, nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C', 2H, 2W)."""
        y: Tensor = self.body(x)
        return y


class EncoderLevel(nn.Module):
    """Halve the map below, join it with another scale's map where there is one, then blocks."""

    def __init__(self, below: int, channels: int, blocks: int, halves: bool, joins: bool, **options: Any) -> None:
        super().__init__()
        self.fusion = nn.ModuleDict()
        if halves:
            self.fusion["down"] = nn.Sequential(Halve(below, channels, **options))
        if joins:
            self.fusion["concat_conv"] = nn.Sequential(nn.Conv2d(2 * channels, channels, 1, **options))
        self.blocks = nn.Sequential(*(NAFBlock(channels, **options) for _ in range(blocks)))

    def forward(self, x: Tensor, second: Tensor | None = None) -> Tensor:
        """``second`` is the other scale's map."""
        if "down" in self.fusion:
            x = self.fusion["down"](x)
        if "concat_conv" in self.fusion:
            assert second is not None
            x = self.fusion["concat_conv"](torch.cat([x, second], 1))
        y: Tensor = self.blocks(x)
        return y


class DecoderLevel(nn.Module):
    """Blocks, then twice the size where the level leads to a larger map."""

    def __init__(self, channels: int, above: int, blocks: int, doubles: bool, **options: Any) -> None:
        super().__init__()
        self.fusion = nn.ModuleDict()
        if doubles:
            self.fusion["up"] = nn.Sequential(Double(channels, above, **options))
        self.blocks = nn.Sequential(*(NAFBlock(channels, **options) for _ in range(blocks)))

    def forward(self, x: Tensor, second: Tensor | None = None) -> Tensor:
        """``second``, the next level's old state, is not looked at."""
        y: Tensor = self.blocks(x)
        return self.fusion["up"](y) if "up" in self.fusion else y


class Column(nn.Module):
    """Three levels with states c_i ← α_i c_i + L_i(c_{i−1}, second_i); see :func:`encoder` and :func:`decoder`.

    Args:
        levels: L_i.
        widths: channels of the states.
        memory: see :func:`torchconv.ops.deeprftv2_reversible.reversible_column`.
    """

    def __init__(self, levels: Sequence[nn.Module], widths: Sequence[int], memory: str, **options: Any) -> None:
        super().__init__()
        self.memory = memory
        for i, (level, width) in enumerate(zip(levels, widths, strict=True)):
            self.register_parameter(f"alpha{i}", nn.Parameter(torch.full((1, width, 1, 1), 0.5, **options)))
            self.add_module(f"level{i}", level)

    def forward(self, x: Tensor, states: Sequence[Tensor], seconds: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The new states, the first level's first."""
        levels = [self.get_submodule(f"level{i}") for i in range(LEVELS)]
        alphas = [keep_away_from_zero(self.get_parameter(f"alpha{i}")) for i in range(LEVELS)]
        return reversible_column(levels, alphas, x, states, seconds, self.memory)


def encoder(width: int, blocks: Sequence[int], joins: bool, memory: str, **options: Any) -> Column:
    """Widths d, 2d, 4d at 1, 1/2 and 1/4 of the size; ``joins``: every level takes a map of another scale."""
    widths = [width << i for i in range(LEVELS)]
    levels = [
        EncoderLevel(widths[max(i - 1, 0)], widths[i], count, i > 0, joins, **options) for i, count in enumerate(blocks)
    ]
    return Column(levels, widths, memory, **options)


def decoder(width: int, blocks: Sequence[int], memory: str, **options: Any) -> Column:
    """From 4d to states of 2d, d and d at 1/2, 1 and 1 of the size."""
    widths, last = [4 * width, 2 * width, width], LEVELS - 1
    outs = [*widths[1:], width]
    levels = [DecoderLevel(widths[i], outs[i], count, i < last, **options) for i, count in enumerate(blocks)]
    return Column(levels, outs, memory, **options)
