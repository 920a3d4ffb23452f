"""The permutohedral lattice: Gaussian filtering of points in several dimensions in linear time.

Adams, Baek, Davis 2010, "Fast High-Dimensional Filtering Using the Permutohedral Lattice", in the variant that the
conditional random field of DeepLab uses (Krähenbühl, Koltun 2011, arXiv 1210.5644):

    splat: every point gives its value to the d + 1 corners of its simplex, by barycentric weights
    blur:  along each of the d + 1 axes in turn, v + (v₋ + v₊) / 2 with the neighbours that exist
    slice: every point gathers from its corners with the same weights, times 1 / (1 + 2^−d)

O(N·d²) to build and O(N·d·L) to filter L channels. Corners are numbered by integers of 64 bits and found by sorting, so
that everything is a sort, a gather or a sum of tensors, and sums run in the same order every time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchconv._common import check


@dataclass(frozen=True)
class Lattice:
    """The corners around a set of points; :meth:`build` makes it, :meth:`filter` uses it.

    Attributes:
        corners: (P, d + 1), of each of P points.
        weights: (P, d + 1), barycentric, of sum 1.
        points: (P·(d + 1),), the points of all entries of ``corners``, sorted by corner.
        shares: the weights in that order, times 1 / (1 + 2^−d).
        starts: (M + 1,), where the entries of each corner start; the last has none, it stands for "no neighbour".
        taps: (d + 1, M + 1, 3), along each axis the corner itself and its two neighbours.
    """

    corners: Tensor
    weights: Tensor
    points: Tensor
    shares: Tensor
    starts: Tensor
    taps: Tensor

    @classmethod
    @torch.no_grad()
    def build(cls, features: Tensor) -> Lattice:
        """Find the simplex of every point and connect its corners.

        Args:
            features: (B, N, d), each divided by the width of the Gaussian; the B sets do not see each other.

        Raises:
            ValueError: no points, features that are not finite, or that span more cells than 64 bits can number.
        """
        check(features.numel() > 0, "features", tuple(features.shape), "at least one point and one feature are needed")
        points = features.flatten(0, 1).T.contiguous()  # (d, P)
        axes = len(points) + 1
        check(bool(points.isfinite().all()), "features", "not finite", "give finite images and positive widths")
        elevated = _elevate(points)
        # The nearest point of remainder 0, and the order of the residuals, which says in which simplex around it.
        cell = (elevated * (1 / axes)).round()
        offset = elevated - cell * axes
        rank = _ranks(offset) + cell.sum(0).to(torch.int64)
        wrap = (rank < 0).to(torch.int64) - (rank >= axes).to(torch.int64)
        rank, cell = rank + axes * wrap, cell + wrap
        weights = _barycentric((elevated - cell * axes) * (1 / axes), rank)
        codes, steps = _codes(cell[:-1].to(torch.int64), rank, features.shape[0])
        ordered, order = codes.flatten().sort()
        first = torch.ones_like(ordered, dtype=torch.bool)
        torch.ne(ordered[1:], ordered[:-1], out=first[1:])
        corners = torch.empty_like(ordered)
        corners[order] = first.cumsum(0) - 1
        starts = F.pad(first.nonzero()[:, 0], (0, 1), value=len(order))
        taps = _connect(ordered[first], steps)
        shares = weights.flatten()[order] * (1 / (1 + 2.0 ** (1 - axes)))
        return cls(corners.view(-1, axes), weights, order // axes, shares, starts, taps)

    def filter(self, values: Tensor) -> Tensor:
        """Filter values at the points; the gradient is the same filter with its axes in reverse.

        Args:
            values: (P, L) of the dtype of the features.

        Returns:
            (P, L), not normalised.
        """
        filtered: Tensor = _Filter.apply(values, self, False)
        return filtered

    def _apply(self, values: Tensor, reverse: bool) -> Tensor:
        found = _bags(self.points, values, self.shares, self.starts)
        blur = values.new_tensor([1.0, 0.5, 0.5]).expand(len(found), 3).contiguous()
        for taps in self.taps.flip(0) if reverse else self.taps:
            found = _bags(taps, found, blur)
        return _bags(self.corners, found, self.weights)


def _bags(rows: Tensor, table: Tensor, weights: Tensor, starts: Tensor | None = None) -> Tensor:
    """Weighted sums of rows of a table, which no gathered copy is made of."""
    return F.embedding_bag(rows, table, starts, mode="sum", per_sample_weights=weights)


class _Filter(torch.autograd.Function):
    """The lattice's filter and its transpose, as each other's gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, lattice: Lattice, reverse: bool) -> Tensor:
        ctx.lattice, ctx.reverse = lattice, reverse
        return lattice._apply(values, reverse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        back: Tensor = _Filter.apply(grad, ctx.lattice, not ctx.reverse)
        return back, None, None


def _elevate(points: Tensor) -> Tensor:
    """(d, P) → (d + 1, P), on the plane of sum zero, scaled so that the three steps have unit variance."""
    d = len(points)
    # Rounded as the authors' library rounds it: on grids of pixels many residuals are equal, and an error in the last
    # place would put their points into other simplices.
    width = torch.tensor(math.sqrt(2 / 3) * (d + 1), dtype=points.dtype).item()
    total = torch.zeros_like(points[0])
    rows: list[Tensor] = []
    for i in range(d, 0, -1):
        scaled = points[i - 1] * (width / math.sqrt(i * (i + 1)))
        rows.append(total - i * scaled)
        total = total + scaled
    return torch.stack([total, *reversed(rows)])


def _ranks(offset: Tensor) -> Tensor:
    """The place of each row's entry in descending order, the earlier row first among equals."""
    rank = torch.zeros_like(offset, dtype=torch.int64)
    for i in range(len(offset)):
        for j in range(i + 1, len(offset)):
            less = offset[i] < offset[j]
            rank[i] += less
            rank[j] += ~less
    return rank


def _barycentric(residual: Tensor, rank: Tensor) -> Tensor:
    """(P, d + 1): weights of the corners of remainder 0 … d, differences of the sorted residuals."""
    d = len(rank) - 1
    found = residual.new_zeros(d + 2, residual.shape[1])
    found.scatter_add_(0, d - rank, residual)
    found.scatter_add_(0, d + 1 - rank, -residual)
    found[0] += 1 + found[d + 1]
    return found[:-1].T.contiguous()


def _codes(cell: Tensor, rank: Tensor, sets: int) -> tuple[Tensor, Tensor]:
    """(P, d + 1) numbers of the corners, and (d + 1, d + 1) steps to the neighbour by axis and remainder.

    A corner of remainder r has coordinates (d + 1)·q + r, its number is r + (d + 1)·(q in mixed radix).
    """
    d, count = cell.shape
    low, high = cell.amin(1), cell.amax(1)
    sizes = (high - low + 4).tolist()  # corners and their neighbours reach two cells out
    radix, total = [], d + 1
    for size in sizes:
        radix.append(total)
        total *= size
    remedy = "their image spans more lattice cells than 64-bit numbers count; use larger widths"
    check(total * sets < 2**63, "widths", f"too small for {sizes} cells", remedy)
    unit = torch.tensor(radix, device=cell.device)[:, None]
    number = ((cell - low[:, None] + 2) * unit).sum(0)
    if sets > 1:
        number = number + torch.arange(sets, device=cell.device).repeat_interleave(count // sets) * total
    corners = [number + r - (unit * (rank[:-1] > d - r)).sum(0) for r in range(d + 1)]
    # One step adds 1 to every coordinate and takes d + 1 from that of the axis.
    along = torch.tensor([*radix, 0])[:, None]
    steps = torch.where(torch.arange(d + 1) < d, 1 - along, sum(radix) - d - along)
    return torch.stack(corners, 1), steps.to(cell.device)


def _connect(codes: Tensor, steps: Tensor) -> Tensor:
    """(d + 1, M + 1, 3): for sorted numbers of M corners, the places of each and of its neighbours; M where none is."""
    count, axes = len(codes), len(steps)
    remainder, here = codes % axes, torch.arange(count, device=codes.device)
    taps = torch.full((axes, count + 1, 3), count, device=codes.device)
    for step, found in zip(steps, taps, strict=True):
        wanted = codes + step[remainder]
        place = torch.searchsorted(codes, wanted).clamp_(max=count - 1)
        hit = codes[place] == wanted
        found[:-1, 0] = here
        found[here[hit], 1] = place[hit]
        found[place[hit], 2] = here[hit]
    return taps
