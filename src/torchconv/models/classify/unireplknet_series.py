"""Time series, audio and video as images for UniRepLKNet: only the embedding changes, the backbone stays.

X. Ding, Y. Zhang et al., arXiv 2311.15599, section 3.3; the time-series embedding is Corrformer's (H. Wu et al., Nature
Machine Intelligence 2023).

- Stations: every node's (L, D) series becomes (L, d_model) numbers by value + time + place embeddings, which are viewed
  as a one-channel square image; the last feature map is read back as tokens.
- Audio: a log-mel spectrogram is a one-channel image (frequency × time).
- Video: T frames are viewed as one image √T times as high and wide. It is a view of the memory, not a mosaic: √T
  consecutive image rows of one frame lie side by side in one long row.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive

# Columns of the calendar and the rows of their tables: month 1..12, day 1..31, weekday 0..6, hour 0..23, quarter 0..3.
CALENDAR = {"month": 13, "day": 32, "weekday": 7, "hour": 24, "minute": 4}
# Numbers of real-valued time features by sampling frequency.
TIME_FEATURES = {"h": 4, "t": 5, "s": 6, "m": 1, "a": 1, "w": 2, "d": 3, "b": 3}
SPEECH_COMMANDS = (-6.845978, 5.5654526)


def sinusoids(rows: int, width: int) -> Tensor:
    """Table (rows, width) of sin(p·w_i), cos(p·w_i) in turn, w_i = 10000^(−2i/width)."""
    angles = (
        torch.arange(rows).float()[:, None] * (torch.arange(0, width, 2).float() * -(math.log(10000.0) / width)).exp()
    )
    table = torch.empty(rows, width)
    table[:, 0::2] = angles.sin()
    table[:, 1::2] = angles.cos()[:, : width // 2]
    return table


class FixedEmbedding(nn.Module):
    """A frozen table of sinusoids, looked up by integers."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.emb = nn.Embedding.from_pretrained(sinusoids(rows, width), freeze=True)

    def forward(self, index: Tensor) -> Tensor:
        """Rows of the table."""
        y: Tensor = self.emb(index)
        return y


class TemporalEmbedding(nn.Module):
    """Sum of the embeddings of month, day, weekday and hour, and of the quarter of the hour at ``freq`` "t".

    Args:
        d_model: width.
        embed_type: "fixed" (frozen sinusoids) or "learned".
        freq: sampling frequency; only "t" has the minute column.

    Shape:
        integers (N, L, 4), or (N, L, 5) at "t", in the order above → (N, L, d_model).
    """

    def __init__(self, d_model: int, embed_type: str = "fixed", freq: str = "h") -> None:
        super().__init__()
        self.columns = [c for c in CALENDAR if c != "minute" or freq == "t"]
        for column in self.columns:
            rows = CALENDAR[column]
            table = FixedEmbedding(rows, d_model) if embed_type == "fixed" else nn.Embedding(rows, d_model)
            self.add_module(f"{column}_embed", table)

    def forward(self, mark: Tensor) -> Tensor:
        """Embed the calendar columns of ``mark``."""
        width = len(self.columns)
        if mark.shape[-1] < width:
            raise ValueError(f"x_mark of shape {tuple(mark.shape)}: expected {width} columns {self.columns}")
        mark = mark.long()
        return torch.stack([getattr(self, f"{c}_embed")(mark[..., i]) for i, c in enumerate(self.columns)]).sum(0)


class TimeFeatureEmbedding(nn.Module):
    """Bias-free linear map of real-valued time features, (N, L, features of ``freq``) → (N, L, d_model)."""

    def __init__(self, d_model: int, freq: str = "h") -> None:
        super().__init__()
        self.embed = nn.Linear(TIME_FEATURES[freq], d_model, bias=False)

    def forward(self, mark: Tensor) -> Tensor:
        """Embed the features of ``mark``."""
        width = self.embed.in_features
        if mark.shape[-1] != width:
            raise ValueError(f"x_mark of shape {tuple(mark.shape)}: expected {width} features on the last axis")
        y: Tensor = self.embed(mark.to(self.embed.weight.dtype))
        return y


class TokenEmbedding(nn.Module):
    """Circular convolution of three steps over time, (N, L, c_in) → (N, L, d_model)."""

    def __init__(self, c_in: int, d_model: int) -> None:
        super().__init__()
        self.tokenConv = nn.Conv1d(c_in, d_model, 3, padding=1, padding_mode="circular", bias=False)
        nn.init.kaiming_normal_(self.tokenConv.weight, mode="fan_in", nonlinearity="leaky_relu")

    def forward(self, x: Tensor) -> Tensor:
        """Embed the values of ``x``."""
        y: Tensor = self.tokenConv(x.transpose(1, 2))
        return y.transpose(1, 2)


class PlaceEmbedding(nn.Module):
    """Linear map of a node's standardised coordinates, (nodes, 3·stations a node) → (nodes, d_model)."""

    def __init__(self, features: int, d_model: int) -> None:
        super().__init__()
        self.location_embedding = nn.Linear(features, d_model)

    def forward(self, place: Tensor) -> Tensor:
        """Embed the places."""
        y: Tensor = self.location_embedding(place)
        return y


def standardise(table: Tensor) -> Tensor:
    """Every column minus its mean over its population standard deviation, in float64; constant columns become 0."""
    table = table.double()
    deviation = table.std(0, unbiased=False)
    constant = deviation <= 10 * torch.finfo(torch.float64).eps * table.abs().amax(0)
    return (table - table.mean(0)) / deviation.masked_fill(constant, 1.0)


class StationEmbedding(nn.Module):
    """Value + time + place embedding of the series of many stations.

    y[n, l] = circular_conv(x)[n, l] + time(x_mark[n, l]) + linear(place of node n mod node_num), then dropout.

    Args:
        c_in: variables of a node's series.
        d_model: width.
        stations: table (node_num·m, 3) of latitude, longitude, altitude, m stations a node; standardised here.
        node_num: nodes; the rows of a batch are ordered batch first, then node.
        embed_type: "fixed" (frozen sinusoids), "learned" (tables) or "timeF" (linear in real-valued features).
        freq: sampling frequency, one of h, t, s, m, a, w, d, b.
        dropout: probability in [0, 1).

    Shape:
        x (B·node_num, L, c_in), x_mark (B·node_num, L, columns) → (B·node_num, L, d_model).

    Raises:
        ValueError: an argument is out of range; the message names it.

    Reference: arXiv 2311.15599, section 3.3.
    """

    national_pos: Tensor

    def __init__(
        self,
        c_in: int,
        d_model: int,
        stations: Tensor,
        node_num: int,
        embed_type: str = "fixed",
        freq: str = "h",
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        for argument, value in (("c_in", c_in), ("d_model", d_model), ("node_num", node_num)):
            check_positive(argument, value)
        check_choice("embed_type", embed_type, ("fixed", "learned", "timeF"))
        check_choice("freq", freq, TIME_FEATURES)
        shape = tuple(stations.shape)
        check(len(shape) == 2 and shape[1] == 3, "stations", shape, "must be a table of three columns")
        check(shape[0] > 0 and shape[0] % node_num == 0, "node_num", node_num, f"must divide the {shape[0]} stations")
        self.node_num = node_num
        place = standardise(stations).float().reshape(node_num, -1)
        self.register_buffer("national_pos", place, persistent=False)
        self.national_embedding = PlaceEmbedding(place.shape[1], d_model)
        self.value_embedding = TokenEmbedding(c_in, d_model)
        self.temporal_embedding: nn.Module
        if embed_type == "timeF":
            self.temporal_embedding = TimeFeatureEmbedding(d_model, freq)
        else:
            self.temporal_embedding = TemporalEmbedding(d_model, embed_type, freq)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, x_mark: Tensor) -> Tensor:
        """Embed the series ``x`` with their times ``x_mark``."""
        channels = self.value_embedding.tokenConv.in_channels
        if x.dim() != 3 or x.shape[1] == 0 or x.shape[2] != channels:
            raise ValueError(f"x of shape {tuple(x.shape)}: expected (B·{self.node_num}, L ≥ 1, {channels})")
        if x_mark.dim() != 3 or x_mark.shape[:2] != x.shape[:2]:
            raise ValueError(f"x_mark of shape {tuple(x_mark.shape)}: expected {tuple(x.shape[:2])} times its columns")
        rows = x.shape[0]
        if rows % self.node_num:
            raise ValueError(f"x of shape {tuple(x.shape)}: the first axis must be a multiple of {self.node_num} nodes")
        place = self.national_embedding(self.national_pos).repeat(rows // self.node_num, 1)
        y: Tensor = self.dropout(self.value_embedding(x) + self.temporal_embedding(x_mark) + place[:, None])
        return y


def decompose_series(x: Tensor, kernel_size: int = 25) -> tuple[Tensor, Tensor]:
    """Split a series into what a moving average leaves and the average: seasonal = x − trend.

    The series is continued by (kernel_size − 1) / 2 copies of its first and last step.

    Args:
        x: (N, L, D) with L ≥ 1.
        kernel_size: window, odd.

    Returns:
        (seasonal, trend), each (N, L, D).

    Example:
        >>> seasonal, trend = decompose_series(torch.ones(1, 6, 1), 3)
        >>> seasonal.abs().max().item()
        0.0
    """
    check_positive("kernel_size", kernel_size)
    check(kernel_size % 2 == 1, "kernel_size", kernel_size, "must be odd, an even window has no centre")
    check(x.dim() == 3 and x.shape[1] > 0, "x", tuple(x.shape), "must have three axes (N, L, D), L at least 1")
    half = kernel_size // 2
    padded = F.pad(x.transpose(1, 2), (half, half), mode="replicate") if half else x.transpose(1, 2)
    trend = F.avg_pool1d(padded, kernel_size, stride=1).transpose(1, 2)
    return x - trend, trend


def series_to_image(tokens: Tensor) -> Tensor:
    """The L·d numbers of every row of (N, L, d), read in order, as a square image (N, 1, √(Ld), √(Ld))."""
    check(tokens.dim() == 3, "tokens", tuple(tokens.shape), "must have three axes (N, L, d)")
    numbers = tokens.shape[1] * tokens.shape[2]
    side = math.isqrt(numbers)
    check(side * side == numbers, "tokens", tuple(tokens.shape), "length times width must be a square number")
    return tokens.reshape(-1, 1, side, side)


def map_to_tokens(features: Tensor) -> Tensor:
    """A feature map (N, C, H, W) as H·W tokens (N, H·W, C)."""
    check(features.dim() == 4, "features", tuple(features.shape), "must have four axes (N, C, H, W)")
    return features.flatten(2).transpose(1, 2)


def spectrogram_to_image(
    spectrogram: Tensor, frames: int, mean: float = SPEECH_COMMANDS[0], std: float = SPEECH_COMMANDS[1]
) -> Tensor:
    """A log-mel spectrogram as a one-channel image: cut or zero-padded in time, then (f − mean) / (2·std).

    Args:
        spectrogram: (N, T, F), natural logarithm of the mel energies (10 ms apart, 128 bands in the paper).
        frames: length in time, ≥ 1: 128 for one-second clips, 1024 for ten-second ones.
        mean, std: statistics of the training set; the defaults are those of Speech Commands.

    Shape:
        (N, T, F) → (N, 1, F, frames).
    """
    check_positive("frames", frames)
    check(std > 0, "std", std, "must be positive")
    check(spectrogram.dim() == 3, "spectrogram", tuple(spectrogram.shape), "must have three axes (N, T, F)")
    x = spectrogram[:, :frames]
    x = F.pad(x, (0, 0, 0, frames - x.shape[1]))
    return ((x - mean) / (2 * std)).transpose(1, 2)[:, None]


def video_to_image(x: Tensor) -> Tensor:
    """T frames (N, C, T, H, W), T a square number, as one image (N, C, √T·H, √T·W): a view of the memory.

    Element (t, h, w) lands at row (t·H·W + h·W + w) // (√T·W), column modulo it.

    Example:
        >>> video_to_image(torch.zeros(2, 3, 16, 8, 6)).shape
        torch.Size([2, 3, 32, 24])
    """
    check(x.dim() == 5, "x", tuple(x.shape), "must have five axes (N, C, T, H, W)")
    side = math.isqrt(x.shape[2])
    check(side * side == x.shape[2], "x", tuple(x.shape), "the number of frames must be a square number (16)")
    shape: Any = (*x.shape[:2], side * x.shape[3], side * x.shape[4])
    return x.reshape(shape)
