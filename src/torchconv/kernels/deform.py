"""Weighted sums of a map sampled at given positions: what every deformable convolution computes in the end.

    y[n, c, o] = Σ_k mask[n, g(c), k, o] · bilinear(x[n, c], position[n, g(c), k, o])

Zeros outside of the map; channels of a group share positions and masks. 8 operations for each of K taps, channels and
positions. Of a table whose rows are pixels, the channels of a group side by side, each output is a weighted sum of 4·K
rows, which is what an embedding bag computes in one pass. With g the gradient of y and q the products ⟨g, row⟩:

- masks and positions: bilinear in a tap's four q, and the slopes of that;
- x: the transpose, for each pixel the sum of the places around it, sorted by pixel, hence in one order.

The sampled maps, K times the output, are never made. With few channels in a group or few taps the table does not pay,
and the map is sampled tap by tap. Where a position lies on a pixel, its slope is the one towards the next pixel, as in
the operators of DCNv4 (arXiv 2401.06197) and torchvision; tap by tap, rounding decides that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchconv._common import check
from torchconv.catalog import part
from torchconv.kernels import _custom
from torchconv.kernels.precision import HALF, widen

_PLACES = 1 << 17  # positions of a block
_GATHERED = 1 << 18  # numbers read at a time for the products
_DEPTH, _TAPS = 8, 4  # channels of a group and taps from which a table pays


def _fitted(t: Tensor, x: Tensor) -> Tensor:
    """In the type in which x is computed, or in half precision that will be."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return t if t.dtype == wide or (wide == torch.float32 and t.dtype in HALF) else t.to(wide)


def _axis(places: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The pixel before each place, the fraction beyond it, and whether the place reaches the map.

    What does not reach it (NaN too) is put on pixel −1, which is zero.
    """
    inside = (places > -1) & (places < size)
    places = torch.where(inside, places, -1.0)
    before = places.detach().floor()
    return before, places - before, inside


def _scale(x: Tensor, like: Tensor) -> Tensor:
    """From pixels to ``grid_sample``'s coordinates, in which −1 and 1 are the outer borders of the map."""
    return torch.tensor([2 / x.shape[3], 2 / x.shape[2]], dtype=like.dtype, device=like.device)


def _sample(maps: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _grid_sampled(x: Tensor, positions: Tensor, masks: Tensor) -> Tensor:
    """The sum tap by tap: for exporters, and for a few channels or taps."""
    maps = widen(x).unflatten(1, (positions.shape[1], -1)).flatten(0, 1)
    places, weights = widen(positions).flatten(0, 1), widen(masks).flatten(0, 1).unsqueeze(1)
    scale, total = _scale(x, places), None
    for tap in range(positions.shape[2]):
        found = _sample(maps, (places[:, tap] + 0.5) * scale - 1) * weights[:, :, tap]
        total = found if total is None else total + found
    assert total is not None
    return total.unflatten(0, positions.shape[:2]).flatten(1, 2).to(x.dtype)


def _grid_backward(
    grad: Tensor, x: Tensor, positions: Tensor, masks: Tensor, by: tuple[Tensor, Tensor, Tensor], needs: Sequence[bool]
) -> None:
    """Gradients tap by tap, written to ``by``."""
    ends = positions.shape[:2]
    maps, g = (widen(t).unflatten(1, (ends[1], -1)).flatten(0, 1) for t in (x, grad))
    places, weights, by_maps = widen(positions).flatten(0, 1), widen(masks), torch.zeros_like(maps)
    scale = _scale(x, places)
    for tap in range(positions.shape[2]):
        grid = (places[:, tap] + 0.5) * scale - 1
        if needs[2]:
            by[2][:, :, tap] = (g * _sample(maps, grid)).sum(1).unflatten(0, ends)
        weighted = g * weights[:, :, tap].flatten(0, 1).unsqueeze(1)
        by_map, by_grid = torch.ops.aten.grid_sampler_2d_backward(weighted, maps, grid, 0, 0, False, (True, True))
        by_maps += by_map
        if needs[1]:
            by[1][:, :, tap] = (by_grid * scale).unflatten(0, ends)
    if needs[0]:
        by[0].copy_(by_maps.unflatten(0, ends).flatten(1, 2))


def _pays(x: Tensor, positions: Tensor) -> bool:
    """Whether what is read from a table is worth making it."""
    return x.shape[1] >= _DEPTH * positions.shape[1] and positions.shape[2] >= _TAPS


class _Block(NamedTuple):
    """A part of the output, as bags (item, group, row, column) of K places."""

    corner: Tensor  # (bags, K), the upper left one of four pixels among the rows of the block's items
    fractions: tuple[Tensor, Tensor]  # of columns and rows
    inside: tuple[Tensor, Tensor]
    masks: Tensor

    def weights(self) -> Tensor:
        """(bags, 4, K): the shares of the four pixels, times the masks."""
        columns, rows = self.fractions
        right = self.masks * columns
        left = self.masks - right
        weights = right.new_empty(len(right), 4, right.shape[1])
        for side, share in enumerate((left, right)):
            torch.mul(share, rows, out=weights[:, 2 + side])
            torch.sub(share, weights[:, 2 + side], out=weights[:, side])
        return weights


class _Sampler:
    """The map as rows of a table, one for each pixel of each group, framed by zeros.

    A sum of weighted rows is what ``F.embedding_bag`` computes: one pass, nothing in between.
    """

    def __init__(self, x: Tensor, positions: Tensor, masks: Tensor) -> None:
        self.positions, self.masks = positions.movedim(2, 4), masks.movedim(2, 4)
        groups, self.height, self.width = positions.shape[1], *x.shape[2:]
        self.depth, self.step = x.shape[1] // groups, self.width + 2
        self.item = groups * (self.height + 2) * self.step  # rows of an item
        self.table = x.new_zeros(len(x) * self.item, self.depth, dtype=widen(x).dtype)
        self.map(self.table).copy_(x.unflatten(1, (groups, self.depth)))

    def map(self, table: Tensor) -> Tensor:
        """A table without its frame, as (N, groups, C / groups, H, W)."""
        table = table.view(-1, self.masks.shape[1], self.height + 2, self.step, self.depth)
        return table[:, :, 1:-1, 1:-1].movedim(4, 2)

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Items and rows of the output, a bounded number of places at a time."""
        batch, _, size = self.masks.shape[:3]
        row = self.masks[:1, :, :1].numel()
        many, tall = max(1, _PLACES // (row * size)), max(1, min(size, _PLACES // row))
        for item in range(0, batch, many):
            for top in range(0, size, tall):
                yield slice(item, min(item + many, batch)), slice(top, min(top + tall, size))

    def block(self, items: slice, rows: slice) -> _Block:
        """Where a part of the output reads."""
        places, masks = widen(self.positions[items, :, rows]), widen(self.masks[items, :, rows])
        column, right, inside_columns = _axis(places[..., 0].contiguous(), self.width)
        row, down, inside_rows = _axis(places[..., 1].contiguous(), self.height)
        kind = torch.int32 if len(masks) * self.item < 2**31 else torch.int64
        index = (row.to(kind) * self.step).add_(column.to(kind))
        maps = torch.arange(masks.shape[0] * masks.shape[1], device=index.device, dtype=kind)
        index += maps.view(-1, masks.shape[1], 1, 1, 1) * ((self.height + 2) * self.step) + (self.step + 1)
        flat = [t.reshape(-1, masks.shape[4]) for t in (index, right, down, inside_columns, inside_rows, masks)]
        return _Block(flat[0], (flat[1], flat[2]), (flat[3], flat[4]), flat[5])

    def part(self, table: Tensor, items: slice) -> Tensor:
        """The rows of some items."""
        return table[items.start * self.item : items.stop * self.item]


def _forward(x: Tensor, positions: Tensor, masks: Tensor) -> Tensor:
    out = x.new_zeros(*x.shape[:2], *positions.shape[3:5])
    if x.numel() == 0 or out.numel() == 0:
        return out
    if not _pays(x, positions):
        return _grid_sampled(x, positions, masks).contiguous()
    sampler = _Sampler(x, positions, masks)
    by_group = out.unflatten(1, (positions.shape[1], -1)).movedim(2, 4)
    for items, rows in sampler.blocks():
        block = sampler.block(items, rows)
        index = block.corner.new_empty(len(block.corner), 4, block.corner.shape[1])
        for number, shift in enumerate((0, 1, sampler.step, sampler.step + 1)):
            torch.add(block.corner, shift, out=index[:, number])
        table = sampler.part(sampler.table, items)
        found = F.embedding_bag(index.flatten(1), table, mode="sum", per_sample_weights=block.weights().flatten(1))
        target = by_group[items, :, rows]
        target.copy_(found.view(target.shape))
    return out


def _products(sampler: _Sampler, items: slice, block: _Block, g: Tensor) -> Tensor:
    """⟨g, row⟩ for the four rows of each place: (upper, lower) × (left, right) × (bags, K)."""
    table, depth = sampler.part(sampler.table, items), sampler.depth
    pairs = table.as_strided((len(table) - 1, 2 * depth), (depth, 1))  # a row and its neighbour
    found = g.new_empty(2, 2, *block.corner.shape)
    taps, ones = block.corner.shape[1], g.new_ones(depth)
    some = max(1, _GATHERED // (2 * taps * depth))
    for bags in range(0, len(g), some):
        index, slopes = block.corner[bags : bags + some], g[bags : bags + some, None]
        for line in range(2):
            read = pairs.index_select(0, (index + line * sampler.step).flatten()).view(len(index), -1, depth)
            products = (read.mul_(slopes).flatten(0, 1) @ ones).view(len(index), taps, 2)
            found[line, :, bags : bags + some] = products.movedim(2, 0)
    return found


def _spread(sampler: _Sampler, by_rows: Tensor, block: _Block, g: Tensor) -> None:
    """Add to every pixel what the places around it give: places sorted by pixel, hence summed in one order."""
    where, order = torch.sort(block.corner.flatten(), stable=True)
    starts = torch.searchsorted(where, torch.arange(len(by_rows), device=where.device, dtype=where.dtype))
    bags = order // block.corner.shape[1]
    for number, shares in enumerate(block.weights().unbind(1)):
        shift = number // 2 * sampler.step + number % 2
        shares = shares.flatten().index_select(0, order)
        found = F.embedding_bag(bags, g, starts, mode="sum", per_sample_weights=shares)
        by_rows[shift:] += found[: len(found) - shift]


def _backward(
    grad: Tensor, x: Tensor, positions: Tensor, masks: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    by_x, by_positions, by_masks = (
        torch.zeros_like(t, memory_format=torch.contiguous_format) if need else t.new_empty(0)
        for t, need in zip((x, positions, masks), needs, strict=True)
    )
    if x.numel() == 0 or grad.numel() == 0:
        return by_x, by_positions, by_masks
    if not _pays(x, positions):
        _grid_backward(grad, x, positions, masks, (by_x, by_positions, by_masks), needs)
        return by_x, by_positions, by_masks
    sampler = _Sampler(x, positions, masks)
    by_table = torch.zeros_like(sampler.table) if needs[0] else sampler.table
    by_group = grad.unflatten(1, (positions.shape[1], -1)).movedim(2, 4)
    for items, rows in sampler.blocks():
        block = sampler.block(items, rows)
        g = widen(by_group[items, :, rows]).reshape(-1, sampler.depth).contiguous()
        if needs[0]:
            _spread(sampler, sampler.part(by_table, items), block, g)
        if not (needs[1] or needs[2]):
            continue
        (one, two), (three, four) = _products(sampler, items, block, g)
        (columns, lines), (inside_columns, inside_lines) = block.fractions, block.inside
        upper, lower = torch.lerp(one, two, columns), torch.lerp(three, four, columns)
        if needs[1]:
            target = by_positions.movedim(2, 4)[items, :, rows]
            across = torch.lerp(two - one, four - three, lines) * block.masks * inside_columns
            target[..., 0] = across.view(target.shape[:-1])
            target[..., 1] = ((lower - upper) * block.masks * inside_lines).view(target.shape[:-1])
        if needs[2]:
            target = by_masks.movedim(2, 4)[items, :, rows]
            target.copy_(torch.lerp(upper, lower, lines).view(target.shape))
    if needs[0]:
        by_x.unflatten(1, (positions.shape[1], -1)).copy_(sampler.map(by_table))
    return by_x, by_positions, by_masks


def _composite(x: Tensor, positions: Tensor, masks: Tensor) -> Tensor:
    """The sum in ordinary operators, for transforms and gradients of gradients."""
    (batch, channels, height, width), groups = x.shape, positions.shape[1]
    table = F.pad(widen(x), (1, 1, 1, 1)).unflatten(1, (groups, channels // groups)).permute(0, 1, 3, 4, 2)
    table = table.reshape(-1, channels // groups)
    first = torch.arange(batch * groups, device=x.device).view(batch, groups, 1, 1) * (height + 2) * (width + 2)
    places, weights, total = widen(positions), widen(masks), None
    for tap in range(positions.shape[2]):
        before, right, _ = _axis(places[:, :, tap, :, :, 0], width)
        above, down, _ = _axis(places[:, :, tap, :, :, 1], height)
        index = first + (above.long() + 1) * (width + 2) + before.long() + 1
        for row, by_row in enumerate((1 - down, down)):
            for column, by_column in enumerate((1 - right, right)):
                share = by_row * by_column * weights[:, :, tap]
                term = table[index + row * (width + 2) + column] * share.unsqueeze(-1)
                total = term if total is None else total + term
    assert total is not None
    return total.movedim(-1, 2).flatten(1, 2).to(x.dtype)


def _fake(x: Tensor, positions: Tensor, masks: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], *positions.shape[3:5])


def _fake_backward(
    grad: Tensor, x: Tensor, positions: Tensor, masks: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape if need else 0) for t, need in zip((x, positions, masks), needs, strict=True))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors, needs = ctx.saved_tensors, list(ctx.needs_input_grad)
    if torch.is_grad_enabled():  # someone will differentiate again
        wanted = [t for t, need in zip(tensors, needs, strict=True) if need]
        found = iter(torch.autograd.grad(_composite(*tensors), wanted, grad, create_graph=True))
        return tuple(next(found) if need else None for need in needs)
    by = _BACKWARD(grad, *tensors, needs)
    return tuple(g if need else None for g, need in zip(by, needs, strict=True))


_BACKWARD = _custom.define(
    "deformable_sum_backward",
    "(Tensor grad, Tensor x, Tensor positions, Tensor masks, bool[] needs) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
_SUM = _custom.define(
    "deformable_sum", "(Tensor x, Tensor positions, Tensor masks) -> Tensor", _forward, _fake, _autograd, _keep
)


@part(
    "deformable-sum",
    paper="hrvmamba",
    kind="kernel",
    dims=(2,),
    keywords="deformable convolution DCN DCNv2 DCNv3 DCNv4 bilinear sampling offsets masks grid",
)
def deformable_sum(x: Tensor, positions: Tensor, masks: Tensor) -> Tensor:
    """Sum over taps of the map at given positions, times masks.

    y[n, c, o] = Σ_k masks[n, g, k, o] · bilinear(x[n, c], positions[n, g, k, o]), zero outside.

    Args:
        x: the map. Half precision is computed in float32; the result has the type of x.
        positions: (column, row) in pixels, 0 the centre of the first.
        masks: any weights.

    Shape:
        x (N, C, H, W), positions (N, G, K, H', W', 2), masks (N, G, K, H', W'), G a divisor of C → (N, C, H', W').

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> x = torch.tensor([[[[1.0, 3.0]]]])
        >>> deformable_sum(x, torch.tensor([0.5, 0.0]).reshape(1, 1, 1, 1, 1, 2), torch.ones(1, 1, 1, 1, 1))
        tensor([[[[2.]]]])

    Reference: Zhu et al., arXiv 1811.11168 (modulated deformable convolution).
    """
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x of shape {tuple(x.shape)}, {x.dtype}: expected real (N, C, H, W)")
    if positions.dim() != 6 or positions.shape[0] != x.shape[0] or positions.shape[5] != 2:
        raise ValueError(f"positions of shape {tuple(positions.shape)}: expected ({x.shape[0]}, G, K, H', W', 2)")
    if masks.shape != positions.shape[:5]:
        raise ValueError(f"masks of shape {tuple(masks.shape)}: expected {tuple(positions.shape[:5])}")
    groups = positions.shape[1]
    check(groups >= 1 and x.shape[1] % groups == 0, "groups", groups, f"must divide the {x.shape[1]} channels")
    check(positions.shape[2] >= 1, "taps", positions.shape[2], "give at least one")
    _custom.check_devices(x, positions=positions, masks=masks)
    positions, masks = _fitted(positions, x), _fitted(masks, x)
    y: Tensor
    if _custom.in_ordinary_operators():
        y = (_grid_sampled if torch.compiler.is_exporting() or torch.jit.is_tracing() else _composite)(
            x, positions, masks
        )
    else:
        y = (_SUM if _custom.recorded(x, positions, masks) else _forward)(x, positions, masks)
    return y
