"""A level of SegNet: convolutions around a pooling and the unpooling at its maxima.

Badrinarayanan, Kendall, Cipolla 2015, arXiv 1511.00561. y = decode(unpool(inner(pool(encode(x))))); with k^n taps, C
channels outside and W inside, one convolution on each side costs 2·k^n·C·W multiply-adds a position; three quarters of
what the decoder reads are zeros.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check_positive
from torchconv.catalog import part
from torchconv.ops._common import BATCH_NORM, CONV, Size, check_input, conv_nd, fold_bn, make_conv, ntuple
from torchconv.ops.segnet import index_pool, index_unpool


class ConvNorm(nn.Module):
    """Convolution of any kernel with "same" padding, batch norm, and a ReLU if asked for."""

    def __init__(self, ndim: int, channels: tuple[int, int], kernel_size: Size, relu: bool, **options: Any) -> None:
        super().__init__()
        self.conv = CONV[ndim](*channels, kernel_size, padding="same", **options)
        self.bn = BATCH_NORM[ndim](channels[1], **options)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, \\*spatial) → (N, C', \\*spatial)."""
        x = self.bn(conv_nd(x, self.conv.weight, self.conv.bias, padding="same"))
        return F.relu(x) if self.relu else x

    def merge(self) -> nn.Module:
        """The convolution with the batch norm folded in."""
        weight, bias = fold_bn(self.conv.weight, self.conv.bias, self.bn)
        conv = make_conv(weight, bias, padding="same")
        return nn.Sequential(conv, nn.ReLU()) if self.relu else conv


class SegNetLevel(nn.Module):
    """One level of SegNet: encode and pool, what is inside, unpool at the remembered maxima and decode.

    y = decode(unpool(inner(pool(encode(x))))). Encoder and decoder have ``depth`` convolutions with batch norm each; a
    SegNet is levels inside each other.

    Args:
        in_channels: of the input.
        out_channels: of the result; unset is ``in_channels``.
        width: channels of the pooled map; unset is ``in_channels``.
        inner: module on the pooled map that keeps its shape, another level for example; unset is nothing.
        kernel_size: of the convolutions (7 in SegNet-Basic, 3 in SegNet).
        depth: convolutions on each side.
        decoder_relu: ReLU after the decoder's convolutions too (SegNet; not in SegNet-Basic).

    Shape:
        (N, in_channels, \\*spatial) → (N, out_channels, \\*spatial), odd sizes included.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> level = SegNetLevel2d(3, 5, width=16, inner=SegNetLevel2d(16))
        >>> level(torch.zeros(1, 3, 11, 13)).shape
        torch.Size([1, 5, 11, 13])

    Reference: arXiv 1511.00561, section 3.
    """

    ndim: ClassVar[int] = 0

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        width: int | None = None,
        inner: nn.Module | None = None,
        kernel_size: Size = 7,
        depth: int = 1,
        decoder_relu: bool = False,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        width = in_channels if width is None else width
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("width", width)):
            check_positive(name, value)
        check_positive("depth", depth)
        kernel = ntuple("kernel_size", kernel_size, self.ndim)
        self.in_channels, self.out_channels, self.width = in_channels, out_channels, width
        options = {"device": device, "dtype": dtype}
        ways = [(in_channels if i == 0 else width, width) for i in range(depth)]
        self.encoder = nn.Sequential(*(ConvNorm(self.ndim, way, kernel, True, **options) for way in ways))
        self.inner = nn.Identity() if inner is None else inner
        ways = [(width, width if i < depth - 1 else out_channels) for i in range(depth)]
        self.decoder = nn.Sequential(*(ConvNorm(self.ndim, way, kernel, decoder_relu, **options) for way in ways))

    def forward(self, x: Tensor) -> Tensor:
        """Go down, through and up again."""
        check_input(x, self.in_channels, self.ndim)
        x = self.encoder(x)
        pooled, offsets = index_pool(x)
        y: Tensor = self.decoder(index_unpool(self.inner(pooled), offsets, x.shape[2:]))
        return y

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """The level with its batch norms folded into the convolutions, levels inside included."""
        merged = copy.deepcopy(self).eval()
        for side in (merged.encoder, merged.decoder):
            for number, block in enumerate(side):
                side[number] = block.merge() if isinstance(block, ConvNorm) else block
        if isinstance(merged.inner, SegNetLevel):
            merged.inner = merged.inner.merge()
        return merged


class SegNetLevel1d(SegNetLevel):
    """A level over (N, C, L)."""

    ndim = 1


@part(
    "segnet-level",
    paper="segnet",
    kind="layer",
    dims=(1, 2, 3),
    merges="self",
    probe={"build": {"in_channels": 4, "out_channels": 3, "kernel_size": 3}, "inputs": [[2, 4, 7, 9]]},
    keywords="SegNet encoder decoder unpooling hourglass segmentation",
)
class SegNetLevel2d(SegNetLevel):
    """One level of SegNet over (N, C, H, W): encode and pool, what is inside, unpool at the maxima and decode.

    Arguments as :class:`SegNetLevel`.
    """

    ndim = 2


class SegNetLevel3d(SegNetLevel):
    """A level over (N, C, D, H, W)."""

    ndim = 3
