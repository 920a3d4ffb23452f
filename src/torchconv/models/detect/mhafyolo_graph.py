"""MHAF-YOLO's networks as rows, and rows as modules (arXiv 2502.04656, section 3).

A row is ``[from, repeats, type, arguments]``, its number the index of its module; ``from`` is one row or several,
negative numbers count back from the row itself, and the image stands before row 0. The last row is the head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from torchconv._common import check, check_positive, did_you_mean
from torchconv.ops.mhafyolo import ConvBN
from torchconv.ops.mhafyolo_blocks import RepHDW2d, RepHMS2d
from torchconv.ops.mhafyolo_parts import PSA, SPPF, SCDown, shrink

Row = Sequence[Any]
HEADS = ("v10Detect",)
_ATTENTION = 128  # channels that one head of the attention needs


class Concat(nn.Module):
    """Joins the channels of several maps."""

    def forward(self, *maps: Tensor) -> Tensor:
        """(N, Cᵢ, H, W) each → (N, ΣCᵢ, H, W)."""
        return torch.cat(maps, 1)


class Shrink(nn.Module):
    """:func:`torchconv.ops.mhafyolo_parts.shrink` as a module."""

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        check_positive("factor", factor)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, ⌊H / factor⌋, ⌊W / factor⌋)."""
        return shrink(x, self.factor)


# Each takes the input's channels, the row's arguments and the options of batch norms, and gives the module, its
# channels, and its stride as a fraction.
_Made = tuple[nn.Module, int, Fraction]


def _conv(channels: int, options: dict[str, Any], out: int, kernel: int = 1, stride: int = 1) -> _Made:
    return ConvBN(channels, out, kernel, stride, **options), out, Fraction(stride)


def _scdown(channels: int, options: dict[str, Any], out: int, kernel: int = 3, stride: int = 2) -> _Made:
    return SCDown(channels, out, kernel, stride, **options), out, Fraction(stride)


def _rephms(
    channels: int,
    options: dict[str, Any],
    out: int,
    width: int = 3,
    depth: int = 1,
    expansion: float = 3,
    kernel: int = 5,
) -> _Made:
    block = RepHMS2d(channels, out, kernel, width=width, depth=depth, expansion=expansion, **options)
    return block, out, Fraction(1)


def _rephdw(
    channels: int,
    options: dict[str, Any],
    out: int,
    depth: int = 1,
    expansion: float = 0.5,
    kernel: int = 5,
    depth_expansion: float = 3,
) -> _Made:
    block = RepHDW2d(
        channels, out, kernel, depth=depth, expansion=expansion, depth_expansion=depth_expansion, **options
    )
    return block, out, Fraction(1)


def _sppf(channels: int, options: dict[str, Any], out: int, kernel: int = 5) -> _Made:
    return SPPF(channels, out, kernel, **options), out, Fraction(1)


def _psa(channels: int, options: dict[str, Any], out: int | None = None, expansion: float = 0.5) -> _Made:
    check(out in (None, channels), "out", out, f"attention keeps the {channels} channels of its input")
    return PSA(channels, expansion, **options), channels, Fraction(1)


def _avg(channels: int, options: dict[str, Any], factor: int = 2) -> _Made:
    return Shrink(factor), channels, Fraction(factor)


def _upsample(
    channels: int, options: dict[str, Any], size: Any = None, factor: int = 2, mode: str = "nearest"
) -> _Made:
    check(size in (None, "None"), "size", size, "give the factor instead")
    return nn.Upsample(scale_factor=factor, mode=mode), channels, 1 / Fraction(factor)


_TYPES: dict[str, Callable[..., _Made]] = {
    "Conv": _conv,
    "SCDown": _scdown,
    "RepHMS": _rephms,
    "RepHDW": _rephdw,
    "SPPF": _sppf,
    "PSA": _psa,
    "AVG": _avg,
    "nn.Upsample": _upsample,
}
_WITH_CHANNELS = ("Conv", "SCDown", "RepHMS", "RepHDW", "SPPF", "PSA")


@dataclass(frozen=True)
class Graph:
    """Modules of all rows but the head, and how they are wired.

    Attributes:
        modules: in the order of the rows.
        sources: of every row, −1 is the image.
        outputs: rows that the head gets.
        channels, strides: of those.
        multiple: what height and width of the image are multiples of.
    """

    modules: list[nn.Module]
    sources: list[tuple[int, ...]]
    outputs: tuple[int, ...]
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    multiple: int


def scale_rows(
    rows: Sequence[Row], depth: float = 1, width: float = 1, max_channels: float = float("inf"), divisor: int = 8
) -> list[Row]:
    """Rows of another size: channels above ``max_channels`` cut, times ``width``, up to the next multiple of 8.

    Args:
        rows: see the head of this file.
        depth: factor of repeats above 1.
        width: factor of channels.
        max_channels: before the factor.
        divisor: of all channels.

    Example:
        >>> scale_rows([[-1, 6, "Conv", [64, 3, 2]], [-1, 1, "AVG", []]], depth=0.5, width=0.3)
        [[-1, 3, 'Conv', [24, 3, 2]], [-1, 1, 'AVG', []]]
    """
    scaled: list[Row] = []
    for source, repeats, kind, arguments in rows:
        if kind in _WITH_CHANNELS and arguments:
            channels = -(-(min(arguments[0], max_channels) * width) // divisor) * divisor
            arguments = [int(channels), *arguments[1:]]
        repeats = max(round(repeats * depth), 1) if repeats > 1 else repeats
        scaled.append([source, repeats, kind, arguments])
    return scaled


def build_graph(rows: Sequence[Row], in_chans: int, **options: Any) -> Graph:
    """Modules of rows; ``options`` are those of their batch norms, device and dtype.

    Raises:
        ValueError: a row that cannot be built; the message has its number.
    """
    check_positive("in_chans", in_chans)
    ok = bool(rows) and rows[-1][2] in HEADS
    check(ok, "rows", len(rows), f"the last one must be the head, {' or '.join(HEADS)}")
    modules: list[nn.Module] = []
    sources: list[tuple[int, ...]] = []
    channels, strides = {-1: in_chans}, {-1: Fraction(1)}
    for number, row in enumerate(rows):
        where = f"rows[{number}]"
        check(isinstance(row, Sequence) and len(row) == 4, where, row, "needs [from, repeats, type, arguments]")
        source, repeats, kind, arguments = row
        inputs = _sources(where, source, number)
        sources.append(inputs)
        if number == len(rows) - 1:
            break
        if kind == "Concat":
            apart = {strides[s] for s in inputs}
            check(len(apart) == 1, where, row, f"its maps have strides {', '.join(map(str, sorted(apart)))}")
            modules.append(Concat())
            channels[number], strides[number] = sum(channels[s] for s in inputs), apart.pop()
            continue
        check(kind in _TYPES, where, row, did_you_mean(str(kind), [*_TYPES, "Concat"]))
        check(len(inputs) == 1, where, row, f"{kind} takes one map; join several by a Concat before it")
        check_positive("repeats", repeats)
        chain: list[nn.Module] = []
        width, stride = channels[inputs[0]], strides[inputs[0]]
        for _ in range(repeats):
            try:
                module, width, factor = _TYPES[kind](width, options, *arguments)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{where}={list(row)!r}: {error}") from None
            chain.append(module)
            stride *= factor
        modules.append(chain[0] if repeats == 1 else nn.Sequential(*chain))
        channels[number], strides[number] = width, stride
    outputs = sources[-1]
    whole = all(strides[o].denominator == 1 for o in outputs)
    check(whole, "rows", [str(strides[o]) for o in outputs], "the head's maps are finer than the image")
    return Graph(
        modules,
        sources,
        outputs,
        tuple(channels[o] for o in outputs),
        tuple(int(strides[o]) for o in outputs),
        int(max(strides.values())),
    )


def _sources(where: str, source: Any, number: int) -> tuple[int, ...]:
    """Row numbers that ``from`` means; −1 is the image."""
    found = []
    for item in [source] if isinstance(source, int) else source:
        absolute = number + item if item < 0 else item
        check(-1 <= absolute < number, where, source, "comes from a row that is not there yet")
        found.append(absolute)
    return tuple(found)


@dataclass(frozen=True)
class Plan:
    """Sizes of a network; channels are before the factor ``width``.

    Attributes:
        stem: channels of the two strided convolutions in front.
        stages: channels at strides 4, 8, 16, 32.
        chunks, expansions: of the stages' blocks.
        neck: channels at strides 32, 16, 8.
        neck_chunks, neck_expansions: of the neck's blocks.
        down: channels of the strided convolutions between the neck's outputs.
        context: channels of pooling and attention behind the last stage; None is as many as that has.
        lite: leave out the backbone's coarser maps in the first pass of the neck.
    """

    width: float
    stages: tuple[int, int, int, int]
    chunks: tuple[int, int, int, int]
    stem: tuple[int, int] = (64, 128)
    expansions: tuple[float, float, float, float] = (3, 3, 3, 3)
    neck: tuple[int, int, int] = (512, 384, 384)
    neck_chunks: int = 2
    neck_expansions: tuple[float, float, float] = (3, 3, 3)
    down: int = 384
    context: int | None = None
    lite: bool = False


PLANS = {
    "lite_n": Plan(
        0.25, (128, 256, 512, 768), (2, 2, 2, 2), expansions=(3, 3, 3, 2.5), neck=(384, 384, 256), lite=True
    ),
    "n": Plan(0.25, (128, 256, 512, 1024), (2, 3, 3, 2)),
    "s": Plan(0.5, (128, 256, 512, 768), (2, 3, 3, 2), context=1024),
    "m": Plan(
        1.0,
        (96, 192, 384, 512),
        (3, 4, 4, 3),
        stem=(48, 96),
        expansions=(3, 2.5, 2.5, 2),
        neck=(384, 256, 256),
        neck_chunks=3,
        neck_expansions=(2, 2.5, 3),
        down=256,
    ),
}


def plan_rows(plan: Plan) -> list[Row]:
    """The rows of a network, channels final.

    The neck's first pass joins each level of the backbone with the finer one averaged and the coarser ones enlarged
    (SAF), its second pass the neck's own neighbouring levels (AAF); kernels are 3, 5, 7, 9 from fine to coarse. Where
    the coarsest map has fewer channels than attention needs, a 1 × 1 convolution stands in its place.

    Example:
        >>> rows = plan_rows(PLANS["n"])
        >>> len(rows), rows[13], rows[36][0]
        (37, [-1, 1, 'RepHMS', [128, 2, 1, 3, 9]], [26, 31, 35])
    """

    def blocks(channels: tuple[int, ...], chunks: tuple[int, ...], expansions: tuple[float, ...]) -> list[list[Any]]:
        sizes = zip(channels, chunks, expansions, (3, 5, 7, 9)[-len(channels) :], strict=True)
        return [["RepHMS", [c, w, 1, e, k]] for c, w, e, k in sizes]

    stages = blocks(plan.stages, plan.chunks, plan.expansions)
    # the neck is given from coarse to fine
    fine, middle, coarse = blocks(plan.neck[::-1], (plan.neck_chunks,) * 3, plan.neck_expansions[::-1])
    _, b, c, d = plan.stages
    context = d if plan.context is None else plan.context
    up: list[Any] = ["nn.Upsample", [None, 2, "nearest"]]
    attends = scale_rows([[-1, 1, "PSA", [context]]], width=plan.width)[0][3][0] >= _ATTENTION
    rows: list[Row] = [
        [-1, 1, "Conv", [plan.stem[0], 3, 2]],
        [-1, 1, "Conv", [plan.stem[1], 3, 2]],
        [-1, 1, *stages[0]],
        [-1, 1, "Conv", [b, 3, 2]],
        [-1, 1, *stages[1]],
        [-1, 1, "SCDown", [c, 3, 2]],
        [-1, 1, *stages[2]],
        [-1, 1, "SCDown", [d, 3, 2]],
        [-1, 1, *stages[3]],
        [-1, 1, "SPPF", [context, 5]],
        [-1, 1, "PSA", [context]] if attends else [-1, 1, "Conv", [context, 1, 1]],
    ]

    def add(source: int | list[int], kind: str, arguments: list[Any]) -> int:
        rows.append([source, 1, kind, arguments])
        return len(rows) - 1

    def first_pass(level: int, coarser: int, block: list[Any]) -> int:
        """A level of the backbone with the finer one, the coarser one's neck and, unless lite, itself coarser."""
        enlarged = [add(coarser, *up)]
        if not plan.lite:
            enlarged.insert(0, add(10 if level == 6 else level + 2, *up))
        finer = add(level - 2, "AVG", [])
        add([finer, level, *enlarged], "Concat", [1])
        return add(-1, *block)

    add(6, "AVG", [])
    add([-1, 10], "Concat", [1])
    p5 = add(-1, *coarse)
    p4 = first_pass(6, p5, middle)
    p3 = first_pass(4, p4, fine)
    enlarged = add(p4, *up)
    add([p3, enlarged] if plan.lite else [enlarged, p3], "Concat", [1])
    out3 = add(-1, *fine)
    down = add(-1, "Conv", [plan.down, 3, 2])
    averaged, enlarged = add(p3, "AVG", []), add(p5, *up)
    add([down, averaged, p4, enlarged] if plan.lite else [averaged, enlarged, p4, down], "Concat", [1])
    out4 = add(-1, *middle)
    down = add(-1, "Conv", [plan.down, 3, 2])
    averaged = add(p4, "AVG", [])
    add([down, averaged, p5], "Concat", [1])
    out5 = add(-1, *coarse)
    add([out3, out4, out5], "v10Detect", ["nc"])
    return scale_rows(rows, width=plan.width)
