"""Poset filters: the largest partial sum of a window that a partial order on its points allows.

Dolores-Cuenca, Guzmán-Sáenz, Kim, López-Moreno, Mendoza-Cortes 2024, "Order Theory in the Context of Machine Learning",
arXiv 2412.06097.

With P a poset on the points of a window,

    y = max over up-sets U of P of Σ_{i∈U} x_i,   the empty set giving 0:

a maxout over fixed filters of zeros and ones, without parameters. As published it is a pooling of 2 × 2 blocks that
stands in place of an activation and a pooling; after a ReLU every poset gives the plain sum of the block, so put it on
signed maps. The maximum is computed by a formula read off the order (:class:`torchconv.theory.posets.Formula`) from
shifted slices, n additions and n maxima for n points where the poset is series–parallel; the list of up-sets, up to
2^n, is never made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check
from torchconv.catalog import part
from torchconv.ops._common import Padding, Size, check_depthwise, check_input, check_padding, ntuple, resolve_padding
from torchconv.theory.posets import Formula, Poset, points

PosetLike = Poset | int | str | Sequence[Sequence[int]]


def as_poset(poset: PosetLike, taps: int) -> Poset:
    """A poset on the ``taps`` points of a window, counted row by row.

    Args:
        poset: a :class:`~torchconv.theory.posets.Poset`; the paper's number 0 to 15 of one on four points; "chain" or
            "antichain"; or relations (i, j) for i < j.
        taps: points of the window.

    Raises:
        ValueError: it is none of these, or on another number of points.

    Example:
        >>> as_poset("chain", 3)
        Poset(3, a<b b<c)
    """
    families = {"chain": Poset.chain, "antichain": Poset.antichain}
    known = isinstance(poset, Poset | int | Iterable) and (not isinstance(poset, str) or poset in families)
    check(known, "poset", poset, "must be 'chain', 'antichain', a number 0 to 15, relations or a Poset")
    if isinstance(poset, str):
        return families[poset](taps)
    if isinstance(poset, int):
        check(0 <= poset <= 15, "poset", poset, "the posets on four points are numbered 0 to 15")
        poset = Poset.named(poset)
    if not isinstance(poset, Poset):
        poset = Poset(taps, poset)
    check(poset.n == taps, "poset", poset, f"has {poset.n} points, the window has {taps}")
    return poset


def _first_max(first: Tensor, second: Tensor) -> Tensor:
    """The larger; where both are equal all gradient goes to ``first``, which ``torch.maximum`` would halve."""
    return torch.where(second <= first, first, second) if torch.is_grad_enabled() else torch.maximum(first, second)


def largest_upset_sum(values: Sequence[Tensor], formula: Formula) -> Tensor:
    """max over up-sets U of Σ_{i∈U} values[i], point by point.

    The gradient is 1 for the members of the smallest maximising up-set and 0 for the others.

    Args:
        values: one tensor for each point of the poset, all of one shape.
        formula: ``poset.formula``.

    Raises:
        ValueError: there is another number of values.

    Example:
        >>> largest_upset_sum([torch.tensor([3.0]), torch.tensor([-1.0])], Poset.chain(2).formula)
        tensor([2.])

    Reference: arXiv 2412.06097, section on poset filters.
    """
    count = formula.root.bit_length()
    check(len(values) == count, "values", len(values), f"must be {count} tensors, one for each point of the poset")
    found: dict[int, Tensor] = {}

    def total(mask: int, start: Tensor | None) -> Tensor:
        for i in points(mask):
            start = values[i] if start is None else start + values[i]
        assert start is not None
        return start

    for mask in formula.order:
        kind, *rest = formula.steps[mask]
        if kind == "point":
            y = F.relu(values[rest[0]])
        elif kind == "sum":
            first, *others = rest[0]
            y = found[first]
            for other in others:
                y = y + found[other]
        elif kind == "stack":
            first, *others = rest[0]
            y = found[first]
            for other in others:
                y = total(other, y)
                y = F.relu(y) if other.bit_count() == 1 else _first_max(found[other], y)
        else:
            without, forced, within = rest
            y = total(forced, found.get(within))
            y = _first_max(found[without], y) if without else F.relu(y)
        found[mask] = y
    return found[formula.root]


def poset_filter(
    x: Tensor,
    poset: PosetLike = 12,
    kernel_size: Size = 2,
    stride: Size | None = None,
    padding: Padding = "ceil",
    dilation: Size = 1,
) -> Tensor:
    """Slide a poset filter over every channel; by default the paper's pooling of 2 × 2 blocks.

    Args:
        x: the map.
        poset: see :func:`as_poset`; the points of a window are counted row by row: a = (0, 0), b = (0, 1), c = (1, 0),
            d = (1, 1).
        kernel_size: of the window.
        stride: unset is ``kernel_size``.
        padding: "ceil" puts zeros behind each axis until the last window that starts inside is full (the published
            rule for odd sizes); else as in ``nn.ConvNd``, "same" included.
        dilation: between the window's points.

    Shape:
        (N, C, \\*spatial) → (N, C, \\*spatial'). Channels-last inputs give channels-last results.

    Raises:
        ValueError: an argument is out of range, or the window is larger than the padded map.

    Example:
        >>> poset_filter(torch.tensor([[[[1.0, -2.0], [3.0, -0.5]]]]), poset=13)
        tensor([[[[2.5000]]]])

    Reference: arXiv 2412.06097.
    """
    ndim = x.dim() - 2
    sizes, dilations = ntuple("kernel_size", kernel_size, ndim), ntuple("dilation", dilation, ndim)
    strides = sizes if stride is None else ntuple("stride", stride, ndim)
    return _slide(x, as_poset(poset, math.prod(sizes)).formula, sizes, strides, padding, dilations)


def _slide(
    x: Tensor,
    formula: Formula,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    padding: Padding,
    dilations: tuple[int, ...],
) -> Tensor:
    ndim = len(sizes)
    extents = [d * (k - 1) + 1 for k, d in zip(sizes, dilations, strict=True)]
    lengths, pads = [], []
    given = ((0, 0),) * ndim if padding == "ceil" else resolve_padding(padding, sizes, dilations)
    for length, extent, s, (before, after) in zip(x.shape[2:], extents, strides, given, strict=True):
        free = before + length + after - extent
        if length == 0 if padding == "ceil" else free < 0:
            raise ValueError(f"x of shape {tuple(x.shape)}: smaller than the window of {extents}; pad it")
        # Windows further apart than they are long: the last one must still start inside.
        windows = min(max(-(-free // s), 0) + 1, -(-length // s)) if padding == "ceil" else free // s + 1
        lengths.append(windows)
        # Only what the last window reaches; often nothing, which saves a copy of the map.
        pads.append((before, max(0, (lengths[-1] - 1) * s + extent - before - length)))
    if any(p for pair in pads for p in pair):
        x = F.pad(x, [p for pair in reversed(pads) for p in pair])
    values = []
    for number in range(math.prod(sizes)):
        spans: list[slice] = []
        for k, d, s, length in reversed(list(zip(sizes, dilations, strides, lengths, strict=True))):
            number, t = divmod(number, k)
            spans.append(slice(t * d, t * d + s * (length - 1) + 1, s))
        values.append(x[(..., *reversed(spans))])
    return largest_upset_sum(values, formula)


class _Window:
    """What filter and pooling share: the poset on the window."""

    poset: Poset
    kernel_size: tuple[int, ...]

    def _set_poset(self, poset: PosetLike, permutation: Sequence[int] | None) -> None:
        self.poset = as_poset(poset, math.prod(self.kernel_size))
        if permutation is not None:
            fits = isinstance(permutation, Sequence) and sorted(permutation) == list(range(self.poset.n))
            check(fits, "permutation", permutation, f"must be a permutation of 0 to {self.poset.n - 1}")
            self.poset = self.poset.relabel(permutation)
        self.formula = self.poset.formula


@part(
    "poset",
    paper="posetfilters",
    kind="operator",
    dims=(1, 2, 3),
    mixes="space",
    supports=("stride", "dilation", "even", "padding"),
    mixer={"kernel_size": 2},
    keywords="poset filter order polytope tropical maxout pooling ReLU parameter-free nonlinear",
)
class PosetFilter(_Window, nn.Module):
    """Poset filter on every channel, in the place of a depthwise convolution: fixed weights, a learned bias.

    y_c = scale · max over up-sets U of Σ_{i∈U} x_c[window point i] + bias_c. At stride 2, window 2 and "same" padding
    it is the paper's pooling. Give it signed maps: of non-negative ones it takes the plain sum of the window.

    Args:
        in_channels: C.
        out_channels: unset or C.
        kernel_size: of the window, odd or even.
        stride, padding, dilation: as in ``nn.ConvNd``; "same" gives ceil(L / stride).
        groups: unset or C.
        bias: a learned number added to each channel, the only parameter.
        poset: see :func:`as_poset`; "chain" fits any window.
        permutation: window point ``permutation[i]`` plays the poset's point i: another filter for another order.
        scale: constant factor; 1/points keeps the size of the values.

    Shape:
        (N, C, \\*spatial) → (N, C, \\*spatial').

    Raises:
        ValueError: an argument is out of range or not supported; the message names it.

    Example:
        >>> PosetFilter2d(8, kernel_size=2, poset=7)(torch.zeros(1, 8, 5, 4)).shape
        torch.Size([1, 8, 5, 4])

    Reference: arXiv 2412.06097.
    """

    ndim: ClassVar[int] = 0

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_size: Size = 2,
        stride: Size = 1,
        padding: Padding = "same",
        dilation: Size = 1,
        groups: int | None = None,
        bias: bool = True,
        *,
        poset: PosetLike = "chain",
        permutation: Sequence[int] | None = None,
        scale: float = 1.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_depthwise(in_channels, out_channels, groups, "a poset filter")
        check_padding(padding, self.ndim)
        self.in_channels = self.out_channels = in_channels
        self.kernel_size = ntuple("kernel_size", kernel_size, self.ndim)
        self.stride = ntuple("stride", stride, self.ndim)
        self.dilation = ntuple("dilation", dilation, self.ndim)
        self.padding, self.scale = padding, float(scale)
        self._set_poset(poset, permutation)
        self.bias = nn.Parameter(torch.zeros(in_channels, device=device, dtype=dtype)) if bias else None

    def reset_parameters(self) -> None:
        """The bias is 0."""
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Filter ``x``."""
        check_input(x, self.in_channels, self.ndim)
        y = _slide(x, self.formula, self.kernel_size, self.stride, self.padding, self.dilation)
        if self.scale != 1:
            y = y * self.scale
        return y if self.bias is None else y + self.bias.reshape(-1, *[1] * self.ndim)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return (
            f"{self.in_channels}, kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding!r}, "
            f"dilation={self.dilation}, bias={self.bias is not None}, poset={self.poset}, scale={self.scale:g}"
        )


class PosetFilter1d(PosetFilter):
    """Poset filter over (N, C, L)."""

    ndim = 1


class PosetFilter2d(PosetFilter):
    """Poset filter over (N, C, H, W)."""

    ndim = 2


class PosetFilter3d(PosetFilter):
    """Poset filter over (N, C, D, H, W)."""

    ndim = 3


@part(
    "poset-pool",
    paper="posetfilters",
    kind="layer",
    dims=(1, 2, 3),
    mixes="space",
    probe={"build": {}, "inputs": [[2, 3, 5, 6]]},
    keywords="poset pooling max average downsampling parameter-free",
)
class PosetPool(_Window, nn.Module):
    """Poset pooling: a poset filter over blocks, in the place of an activation and a max or average pooling.

    Axes that the block does not divide are filled with zeros behind. No parameters. Of non-negative maps (after a
    ReLU) every poset takes the sum of the block.

    Args:
        poset: see :func:`as_poset`; a number needs blocks of four points.
        kernel_size: of the block; one integer is a square in the plane, give a tuple for (k,) or (k, k, k).
        stride: unset is ``kernel_size``.
        permutation: window point ``permutation[i]`` plays the poset's point i.
        scale: constant factor; 1/4 turns the sums of four into the size of an average.

    Shape:
        (N, C, \\*spatial) → (N, C, \\*spatial'), as many blocks an axis as cover it: ⌈spatial / stride⌉ where the
        stride is the kernel's size, else ⌈(spatial − kernel_size) / stride⌉ + 1, at least one, each starting inside.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> PosetPool(poset=7)(torch.zeros(1, 8, 5, 4)).shape
        torch.Size([1, 8, 3, 2])

    Reference: arXiv 2412.06097.
    """

    def __init__(
        self,
        poset: PosetLike = 12,
        kernel_size: Size = 2,
        stride: Size | None = None,
        permutation: Sequence[int] | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        sized = isinstance(kernel_size, int | Sequence)
        check(sized, "kernel_size", kernel_size, "must be an integer or one integer for each of one to three axes")
        ndim = 2 if isinstance(kernel_size, int) else len(kernel_size)
        check(1 <= ndim <= 3, "kernel_size", kernel_size, "must have one to three axes")
        self.kernel_size = ntuple("kernel_size", kernel_size, ndim)
        self.stride = self.kernel_size if stride is None else ntuple("stride", stride, ndim)
        self.scale = float(scale)
        self._set_poset(poset, permutation)

    def forward(self, x: Tensor) -> Tensor:
        """Pool ``x``."""
        ndim = len(self.kernel_size)
        if x.dim() != ndim + 2:
            raise ValueError(f"x of shape {tuple(x.shape)}: expected (N, C) and {ndim} spatial axes")
        y = _slide(x, self.formula, self.kernel_size, self.stride, "ceil", (1,) * ndim)
        return y if self.scale == 1 else y * self.scale

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"{self.poset}, kernel_size={self.kernel_size}, stride={self.stride}, scale={self.scale:g}"
