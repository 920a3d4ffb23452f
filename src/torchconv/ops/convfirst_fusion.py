"""Block fusion: a residual block in inference, evaluated tile by tile so that the expanded map never exists.

Lavin 2024, arXiv 2404.03617. A tile of the output needs a tile of the input and, around it, the halo of the spatial
convolution. ConvFirst convolves before it expands: its halo costs reads only,

    ρ = (T_h + k − 1)(T_w + k − 1) / (T_h T_w)

times as many. MBConv convolves after the expansion, which is therefore computed ρ times. The expanded channels are
taken in chunks, and each chunk is projected and added up at once. Memory for T positions: T (C + chunk + C_out) numbers
instead of e C for every position of the map.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import Size, check, check_positive, ntuple
from torchconv.kernels._layout import is_channels_last
from torchconv.ops._common import apply_conv, check_input, conv_nd

BUDGET = 1 << 22  # bytes: a core's share of the last-level cache; smaller tiles pay more for starting kernels


@dataclass(frozen=True)
class Tile:
    """What is computed at a time: ``samples`` × ``height`` × ``width`` outputs, ``chunk`` of the hidden channels."""

    samples: int
    height: int
    width: int
    chunk: int


def plan_tile(
    size: tuple[int, int],
    channels: int,
    hidden: int,
    out_channels: int,
    *,
    budget: int,
    unit: int = 4,
    multiple: int = 1,
) -> Tile:
    """The largest tile whose numbers fit into ``budget`` bytes; strips of full width, which have no halo at the sides.

    T (channels + chunk + out_channels) · unit ≤ budget. As many hidden channels at once as leave room for one row; a
    row is cut only where the smallest chunk does not leave room for it.

    Args:
        size: (H, W) of the output.
        channels, hidden, out_channels: of the block.
        budget: bytes of fast memory.
        unit: bytes of a number.
        multiple: of which the chunk must be one: the group width of a convolution on the hidden channels.

    Example:
        >>> plan_tile((56, 56), 64, 256, 64, budget=1 << 20)
        Tile(samples=1, height=12, width=56, chunk=256)
    """
    check_positive("budget", budget)
    height, width = size
    chunk = hidden
    while True:
        positions = budget // (unit * (channels + chunk + out_channels))
        if positions >= width or chunk // 2 < multiple:
            break
        chunk = -(-chunk // (2 * multiple)) * multiple
    if positions < width:
        return Tile(1, 1, max(1, positions), chunk)
    rows = min(height, positions // width)
    rows = -(-height // -(-height // rows))  # strips of about the same height
    return Tile(max(1, positions // (height * width)) if rows == height else 1, rows, width, chunk)


class FusedBlock(nn.Module):
    """A residual block in its inference form: convolutions with their norms folded in, run whole or by tiles.

        x → [first, norm] → for every chunk: expand → act [→ middle → act] → project → Σ → + x

    Blocks make it by their ``merge()`` (whole) and ``fuse()`` (by tiles); both forms give the same numbers.

    Args:
        expand, project: convolutions C → e·C → C_out; all but the spatial one are 1 × 1.
        act: element-wise activation.
        first: spatial convolution on the C channels before the expansion.
        norm: what follows ``first``, on the channels of each position.
        middle: grouped spatial convolution on the expanded channels.
        residual: whether the input is added.
        tile: fixed tile; None chooses one for the size of the map that fits ``budget``.
        budget: bytes of fast memory for a tile; None runs the layers one after the other on the whole map.

    Shape:
        (N, C, H, W) → (N, C_out, H′, W′).

    Raises:
        ValueError: the activation has parameters, or the chunk splits a group.
    """

    def __init__(
        self,
        expand: nn.Conv2d,
        project: nn.Conv2d,
        act: nn.Module,
        *,
        first: nn.Conv2d | None = None,
        norm: nn.Module | None = None,
        middle: nn.Conv2d | None = None,
        residual: bool = False,
        tile: Tile | None = None,
        budget: int | None = None,
    ) -> None:
        super().__init__()
        self.first, self.norm = first, norm or nn.Identity()
        self.expand, self.middle, self.project = expand, middle, project
        activation: Any = copy.deepcopy(act)
        if hasattr(activation, "inplace"):  # what it gets is a convolution's output that nothing else reads
            activation.inplace = True
        self.act: nn.Module = activation
        self.residual = residual
        self.tile, self.budget = tile, budget
        tiled = tile is not None or budget is not None
        learned = any(True for _ in act.parameters())
        check(not (tiled and learned), "act_cls", type(act).__name__, "has parameters: use merge() instead of fuse()")
        if tile is not None:
            for name in ("samples", "height", "width", "chunk"):
                check_positive(name, getattr(tile, name))
            width = self.group_width
            check(tile.chunk % width == 0, "chunk", tile.chunk, f"must be a multiple of the group width {width}")

    @property
    def spatial(self) -> nn.Conv2d:
        """The convolution that looks around."""
        return self.first or self.middle or self.expand

    @property
    def group_width(self) -> int:
        """Channels of a group on the expanded channels; 1 where nothing there is grouped."""
        return 1 if self.middle is None else self.middle.weight.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``x``."""
        check_input(x, (self.first or self.expand).in_channels, 2)
        if self.tile is None and self.budget is None:
            y = self._hidden(self._before(x, None), None, None)
            return x + y if self.residual else y
        return self._by_tiles(x)

    def halo(self, height: int, width: int) -> float:
        """ρ: inputs of the spatial convolution over outputs, for a tile inside the map."""
        extents = zip((height, width), self.spatial.kernel_size, self.spatial.stride, strict=True)
        (rows, columns) = (((n - 1) * s + k) for n, k, s in extents)
        return rows * columns / (height * width)

    def tile_for(self, x: Tensor) -> Tile:
        """The tile that ``forward(x)`` uses."""
        if self.tile is not None:
            return self.tile
        hidden, channels = self.expand.weight.shape[:2]
        size = self._out_size(x)
        out = self.project.weight.shape[0]
        budget = self.budget or BUDGET
        return plan_tile(size, channels, hidden, out, budget=budget, unit=x.element_size(), multiple=self.group_width)

    def _out_size(self, x: Tensor) -> tuple[int, int]:
        conv: Any = self.spatial
        rows, columns = (
            (n + 2 * p - k) // s + 1
            for n, p, k, s in zip(x.shape[2:], conv.padding, conv.kernel_size, conv.stride, strict=True)
        )
        return rows, columns

    def _by_tiles(self, x: Tensor) -> Tensor:
        height, width = self._out_size(x)
        check(min(height, width) > 0, "x", tuple(x.shape), "leaves no outputs: the map is too small")
        tile = self.tile_for(x)
        layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
        y: Tensor | None = None
        for n in range(0, x.shape[0], tile.samples):
            for top, bottom, rows, above, below in self._spans(0, height, tile.height, x.shape[2]):
                for left, right, columns, before, after in self._spans(1, width, tile.width, x.shape[3]):
                    source = x[n : n + tile.samples]
                    pads = (before, after, above, below)
                    h = self._before(source[:, :, rows, columns], pads)
                    out = self._hidden(h, tile.chunk, pads)
                    if self.residual:
                        out = out + source[:, :, top:bottom, left:right]
                    if y is None:
                        shape = (x.shape[0], out.shape[1], height, width)
                        y = torch.empty(shape, dtype=out.dtype, device=out.device, memory_format=layout)
                    y[n : n + tile.samples, :, top:bottom, left:right] = out
        return self._hidden(self._before(x, None), None, None) if y is None else y

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"residual={self.residual}, tile={self.tile}, budget={self.budget}"

    def _spans(self, axis: int, outputs: int, step: int, inputs: int) -> Iterator[tuple[int, int, slice, int, int]]:
        """Along an axis: outputs [start, stop), the inputs there are, and the zeros that the border adds."""
        conv: Any = self.spatial
        kernel, stride, padding = conv.kernel_size[axis], conv.stride[axis], conv.padding[axis]
        for start in range(0, outputs, step):
            stop = min(outputs, start + step)
            low, high = start * stride - padding, (stop - 1) * stride - padding + kernel
            inside = slice(max(low, 0), min(high, inputs))
            yield start, stop, inside, inside.start - low, high - inside.stop

    def _before(self, x: Tensor, pads: tuple[int, int, int, int] | None) -> Tensor:
        if self.first is None:
            return x
        y: Tensor = self.norm(_convolve(self.first, x, pads))
        return y

    def _hidden(self, x: Tensor, chunk: int | None, pads: tuple[int, int, int, int] | None) -> Tensor:
        """Expansion, activation and projection, ``chunk`` channels at a time."""
        hidden = self.expand.weight.shape[0]
        spatial = self.first is None and self.middle is None
        y: Tensor | None = None
        for start in range(0, hidden, chunk or hidden):
            part = None if chunk is None or chunk >= hidden else slice(start, start + chunk)
            z = self.act(_convolve(self.expand, x, pads if spatial else None, part))
            if self.middle is not None:
                # The border's zeros come after the activation, as in the whole map.
                z = self.act(_convolve(self.middle, z, pads, part))
            term = _convolve(self.project, z, None, inputs=part, bias=y is None)
            y = term if y is None else y + term
        assert y is not None
        return y


def _convolve(
    conv: nn.Conv2d,
    x: Tensor,
    pads: tuple[int, int, int, int] | None,
    outputs: slice | None = None,
    inputs: slice | None = None,
    bias: bool = True,
) -> Tensor:
    """``conv(x)``, or with only some of its channels, or with given zeros around ``x`` instead of its own padding."""
    if pads is None and outputs is None and inputs is None and bias:
        return apply_conv(conv, x)
    weight, shift, groups = conv.weight, conv.bias if bias else None, conv.groups
    if outputs is not None:
        weight, shift = weight[outputs], None if shift is None else shift[outputs]
        groups = weight.shape[0] * groups // conv.out_channels if groups > 1 else 1
    if inputs is not None:
        weight = weight[:, inputs]
    padding: Any = conv.padding
    if pads is not None:
        x = F.pad(x, pads) if any(pads) else x
        padding = 0
    return conv_nd(x, weight, shift, conv.stride, padding, 1, groups)


def tiled(block: FusedBlock, tile: Size | None, chunk: int | None, samples: int, budget: int) -> FusedBlock:
    """``block`` with a tile: the given (height, width) and chunk, or one that fits ``budget`` bytes."""
    check_positive("budget", budget)
    check(tile is not None or chunk is None, "chunk", chunk, "give the tile's size too, or leave both to the budget")
    fixed = None
    if tile is not None:
        height, width = ntuple("tile", tile, 2)
        fixed = Tile(samples, height, width, block.expand.weight.shape[0] if chunk is None else chunk)
    return FusedBlock(
        block.expand,
        block.project,
        block.act,
        first=block.first,
        norm=block.norm,
        middle=block.middle,
        residual=block.residual,
        tile=fixed,
        budget=None if fixed else budget,
    ).eval()
