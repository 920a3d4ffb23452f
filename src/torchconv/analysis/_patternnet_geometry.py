"""Where in the image a position of a map looks: stride, receptive field, boxes (PatternNet, arXiv 1703.06339).

A unit u of a map sees the pixels start + jump·u … end + jump·u of every axis. A convolution or pooling of kernel k,
stride s, padding p, dilation d turns (start, end, jump) into

    start − p·jump,    end + ((k − 1)·d − p)·jump,    jump·s

and branches that join see the union. Centre, receptive field and stride follow: (start + end)/2, end − start + 1, jump.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from torchconv._common import check
from torchconv.analysis._cka_features import chosen, place, quiet

Number = float | Sequence[float]


@dataclass(frozen=True)
class Geometry:
    """Position (u, v) of a map looks at a box of the image; numbers for all axes, or one an axis (rows first).

    Attributes:
        stride: pixels between neighbouring positions.
        receptive_field: side of the box, pixels.
        offset: pixel under the centre of position 0.

    Example:
        >>> Geometry(16, 163, 17).boxes(torch.tensor([0, 5, -1]), (4, 4)).tolist()
        [[-64.0, -64.0, 98.0, 98.0], [-48.0, -48.0, 114.0, 114.0], [-1.0, -1.0, -1.0, -1.0]]
    """

    stride: Number = 1.0
    receptive_field: Number = 1.0
    offset: Number = 0.0

    def boxes(self, positions: Tensor, size: Sequence[int]) -> Tensor:
        """Boxes (…, 2·axes) of flat positions: low corner, high corner, x before y; not clipped; -1 where absent.

        Args:
            positions: flat, v·W + u on a map of two axes; -1 for absent.
            size: of the map.
        """
        centres = self.centres(positions, size)
        half = (self._axes(self.receptive_field, len(size)).to(centres.device).flip(0) - 1) / 2
        boxes = torch.cat([centres - half, centres + half], -1)
        return boxes.masked_fill(positions[..., None] < 0, -1)

    def centres(self, positions: Tensor, size: Sequence[int]) -> Tensor:
        """Pixels (…, axes) under the centres of flat positions, x before y."""
        cells = torch.stack(torch.unravel_index(positions.clamp_min(0), tuple(size)), -1).double()
        stride, offset = (self._axes(v, len(size)).to(cells.device) for v in (self.stride, self.offset))
        return (offset + stride * cells).flip(-1)

    def shrunk(self, alpha: float = 0.5) -> Geometry:
        """The same with a part of the receptive field: what is seen in effect is far smaller than what could be."""
        check(0 < alpha <= 1, "alpha", alpha, "must be a share of the receptive field, above 0 and at most 1")
        side = self.receptive_field
        small = alpha * side if isinstance(side, int | float) else tuple(alpha * s for s in side)
        return replace(self, receptive_field=small)

    @staticmethod
    def _axes(value: Number, count: int) -> Tensor:
        values = [float(value)] * count if isinstance(value, int | float) else [float(v) for v in value]
        check(len(values) == count, "geometry", value, f"give one number, or one for each of {count} axes")
        return torch.tensor(values, dtype=torch.float64)


def aligned(image: Sequence[int], size: Sequence[int], side: float) -> Geometry:
    """The geometry of a map laid evenly over the image, for networks whose arithmetic is not known."""
    strides = [i / s for i, s in zip(image, size, strict=True)]
    return Geometry(strides, side, [(s - 1) / 2 for s in strides])


# -- the arithmetic, followed through a network ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Span:
    """What unit 0 of every axis sees, and the step to the next unit."""

    start: tuple[float, ...]
    end: tuple[float, ...]
    jump: tuple[float, ...]

    def windowed(self, k: Sequence[int], s: Sequence[int], p: Sequence[int], d: Sequence[int]) -> _Span:
        axes = range(len(self.jump))
        return _Span(
            tuple(self.start[i] - p[i] * self.jump[i] for i in axes),
            tuple(self.end[i] + ((k[i] - 1) * d[i] - p[i]) * self.jump[i] for i in axes),
            tuple(self.jump[i] * s[i] for i in axes),
        )

    def joined(self, other: _Span) -> _Span:
        check(self.jump == other.jump, "model", self.jump, f"branches of strides {self.jump} and {other.jump} join")
        pairs = list(zip(self.start, other.start, strict=True)), list(zip(self.end, other.end, strict=True))
        return _Span(tuple(map(min, pairs[0])), tuple(map(max, pairs[1])), self.jump)


_SAME = (
    "native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "miopen_batch_norm", "cat",
    "native_group_norm", "native_dropout", "clone", "_to_copy", "detach", "alias", "copy_",
    "hardswish_", "hardsigmoid_",
)  # fmt: skip
_POOLS = {"max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool2d", "avg_pool3d", "max_pool2d"}
_PADS = ("constant_pad_nd", "reflection_pad2d", "replication_pad2d")


class _Trace(TorchDispatchMode):
    """Follows spans from the image through every operation; None stands for a tensor whose span is not known."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self.ndim = image.dim() - 2
        zeros, ones = (0.0,) * self.ndim, (1.0,) * self.ndim
        self.known: dict[int, tuple[Tensor, _Span | None]] = {id(image): (image, _Span(zeros, zeros, ones))}
        self.lost = ""

    def span(self, tensor: Tensor) -> _Span | None:
        return self.known.get(id(tensor), (tensor, None))[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        inputs = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor) and id(t) in self.known]
        result = next((t for t in tree_iter(output) if isinstance(t, Tensor)), None)
        if inputs and result is not None:
            name = func.overloadpacket.__name__
            span = self._rule(name, func, args, inputs, result) if result.dim() == self.ndim + 2 else None
            if span is None and any(self.span(t) for t in inputs) and result.dim() > 1:
                self.lost = name
            self.known[id(result)] = (result, span)
        return output

    def _rule(self, name: str, func: Any, args: Any, inputs: list[Tensor], result: Tensor) -> _Span | None:
        first = self.span(inputs[0])
        if name == "convolution" and first and not args[6]:
            k = args[1].shape[2:]
            return first.windowed(k, *(self._each(args[i]) for i in (3, 4, 5)))
        if name in _POOLS and first:
            k = self._each(args[1])
            s = self._each(args[2]) if len(args) > 2 and args[2] else k
            p = self._each(args[3]) if len(args) > 3 else self._each(0)
            d = self._each(args[4]) if len(args) > 4 and name.startswith("max") else self._each(1)
            return first.windowed(k, s, p, d)
        if name in _PADS and first:
            before = [0] * self.ndim
            for i in range(min(self.ndim, len(args[1]) // 2)):
                before[self.ndim - 1 - i] = args[1][2 * i]
            return first.windowed(self._each(1), self._each(1), before, self._each(1))
        if name == "slice" and first:
            axis, start = (args[1] if len(args) > 1 else 0) % inputs[0].dim() - 2, args[2] if len(args) > 2 else 0
            step = args[4] if len(args) > 4 else 1
            if axis < 0:
                return first
            start = max(0, (start or 0) + (inputs[0].shape[axis + 2] if (start or 0) < 0 else 0))
            at = [int(i == axis) for i in range(self.ndim)]
            return first.windowed(
                self._each(1), [step if a else 1 for a in at], [-start * a for a in at], self._each(1)
            )
        if torch.Tag.pointwise in func.tags or name in _SAME:
            # What was pooled to one position gates the map; it does not say where a response came from.
            wide = [t for t in inputs if t.shape[2:] == result.shape[2:]]
            spans = [self.span(t) for t in wide]
            if not spans or any(s is None for s in spans):
                return None
            joined = spans[0]
            for span in spans[1:]:
                joined = joined.joined(span) if joined and span else None
            return joined
        return None

    def _each(self, value: Any) -> list[int]:
        values = [value] if isinstance(value, int) else list(value)
        return values * self.ndim if len(values) == 1 else values


@contextmanager
def tap(model: nn.Module, layer: str, keep: Callable[[Tensor], None]) -> Iterator[None]:
    """While open, the layer's output ("" for the model's) is passed to ``keep`` as soon as it is there."""
    if layer:
        chosen(model, [layer])

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        found = [t for t in tree_iter(output) if isinstance(t, Tensor) and t.dim() >= 3]
        check(bool(found), "layer", layer, "gives no map (N, C, spatial axes); name one that does")
        keep(found[-1])

    handle = model.get_submodule(layer).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def receptive_field(model: nn.Module, image: Tensor, layer: str = "") -> Geometry:
    """Stride, receptive field and offset of a layer by arithmetic, through branches, shortcuts and paddings.

    Gates from pooled features (squeeze and excitation) are passed by: they scale a response wherever it is from.

    Args:
        model: convolutions, pooling, padding, slicing, and whatever works position by position.
        image: (1, C, \\*spatial), as the model takes it.
        layer: whose output; the model's own by default.

    Raises:
        ValueError: no such layer, or an operation whose reach is not known (attention, resizing, reshaping).

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2))
        >>> receptive_field(net, torch.rand(1, 3, 64, 64))
        Geometry(stride=8.0, receptive_field=19.0, offset=7.0)
    """
    image = place(model, image[:1]).detach().clone()
    trace = _Trace(image)
    reached: list[tuple[_Span | None, str]] = []
    with quiet(model), tap(model, layer, lambda t: reached.append((trace.span(t), trace.lost))), trace:
        model(image)
    check(bool(reached), "layer", layer, "did not run")
    span, lost = reached[-1]
    if span is None:
        remedy = f"its reach through {lost or 'an operation'} is not known by arithmetic; give a Geometry"
        raise ValueError(f"layer={layer!r}: {remedy}")
    return Geometry(*(_one(v) for v in (span.jump, _field(span), _centre(span))))


def _field(span: _Span) -> tuple[float, ...]:
    return tuple(e - s + 1 for s, e in zip(span.start, span.end, strict=True))


def _centre(span: _Span) -> tuple[float, ...]:
    return tuple((e + s) / 2 for s, e in zip(span.start, span.end, strict=True))


def _one(values: tuple[float, ...]) -> Number:
    return values[0] if len(set(values)) == 1 else values
