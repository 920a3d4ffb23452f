"""SVG written by hand: elements, scales, ticks, labels that do not collide, and tiny PNGs for heat maps.

Colours are never written here: marks carry a class, and the page's CSS variables give it a colour in light and dark.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

FONT = 10.5  # user units of every text in a figure

Box = tuple[float, float, float, float]  # x0, y0, x1, y1


class Svg(str):
    """Markup that is already escaped; templates take it as it is (``__html__``)."""

    def __html__(self) -> str:
        return self


def num(value: float) -> str:
    """A coordinate with at most two decimals."""
    return f"{round(value, 2) + 0.0:g}"


def el(tag: str, *children: object, **attributes: object) -> Svg:
    """One element. Text and attribute values are escaped; ``cls`` is ``class``, and ``_`` in a name becomes ``-``."""
    parts = []
    for key, value in attributes.items():
        if value is None:
            continue
        name = "class" if key == "cls" else key.rstrip("_").replace("_", "-")
        text = num(round(value, 2)) if isinstance(value, float) else str(value)
        parts.append(f' {name}="{escape(text)}"')
    body = "".join(child if isinstance(child, Svg) else escape(str(child)) for child in children if child is not None)
    return Svg(f"<{tag}{''.join(parts)}>{body}</{tag}>" if body else f"<{tag}{''.join(parts)}/>")


def figure(name: str, title: str, description: str, size: tuple[float, float], *children: object) -> Svg:
    """An ``<svg>`` that scales with its container and reads itself out (title and description)."""
    return el(
        "svg",
        el("title", title, id=f"{name}-title"),
        el("desc", description, id=f"{name}-desc"),
        *children,
        viewBox=f"0 0 {num(size[0])} {num(size[1])}",
        role="img",
        aria_labelledby=f"{name}-title {name}-desc",
        id=name,
        cls="figure",
    )


@dataclass(frozen=True)
class Scale:
    """Data [low, high] to pixels [start, end], linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            part = math.log(max(value, 1e-300) / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return self.start + part * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values inside the range: 1, 2, 5 × a power of ten."""
        if self.log:
            for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
                exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
                marks = [s * 10.0**e for e in exponents for s in steps if self.low <= s * 10.0**e <= self.high]
                if len(marks) >= min(count, 3):
                    return marks[:: math.ceil(len(marks) / (count + 2))]
        raw = (self.high - self.low) / max(count, 1)
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= raw * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]


def padded(values: Iterable[float], share: float = 0.08, floor: float = 0.0) -> tuple[float, float]:
    """The range of ``values`` with a margin, never narrower than ``floor``."""
    known = list(values)
    low, high = min(known), max(known)
    if high - low < floor:
        middle = (low + high) / 2
        low, high = middle - floor / 2, middle + floor / 2
    margin = (high - low) * share or abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def axes(x: Scale, y: Scale, x_text: Callable[[float], str], y_text: Callable[[float], str], x_label: str) -> Svg:
    """Horizontal grid lines, tick labels and the name of the x axis; y is named by the figure's caption."""
    marks: list[Svg] = []
    for value in y.ticks():
        marks.append(el("line", cls="grid", x1=x.start, x2=x.end, y1=y(value), y2=y(value)))
        marks.append(el("text", y_text(value), x=x.start - 6, y=y(value) + 3.5, text_anchor="end"))
    marks.append(el("line", cls="axis", x1=x.start, x2=x.end, y1=y.start, y2=y.start))
    for value in x.ticks():
        marks.append(el("line", cls="axis", x1=x(value), x2=x(value), y1=y.start, y2=y.start + 4))
        marks.append(el("text", x_text(value), x=x(value), y=y.start + 15, text_anchor="middle"))
    marks.append(el("text", x_label, x=(x.start + x.end) / 2, y=y.start + 31, text_anchor="middle", cls="name"))
    return el("g", *marks, cls="axes")


def text_width(text: str, size: float = FONT) -> float:
    """Width of a sans-serif text, over-estimated a little so that labels keep their distance."""
    total = 0.0
    for char in text:
        if char in "iljtfI.,:;'|!()[] ":
            total += 0.36
        elif char in "mwMW@%":
            total += 0.95
        elif ord(char) > 0x2E80:
            total += 1.05
        else:
            total += 0.72 if char.isupper() else 0.6
    return total * size


def shorten(text: str, limit: int) -> str:
    """``text`` cut to ``limit`` characters in its middle: both an operator's name and its last option tell."""
    tail = limit // 3
    return text if len(text) <= limit else text[: limit - 1 - tail].rstrip() + "…" + text[-tail:].lstrip()


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near ``wanted``, at least ``gap`` apart and inside [low, high] (tighter when they cannot all fit).

    Neighbours that are too near are joined into a block around their mean, until no two blocks touch.
    """
    count = len(wanted)
    if count > 1:
        gap = min(gap, (high - low) / (count - 1))
    order = sorted(range(count), key=lambda i: wanted[i])
    blocks: list[list[float]] = []  # [sum of (wanted − offset), members]
    start: Callable[[list[float]], float] = lambda b: min(max(b[0] / b[1], low), high - gap * (b[1] - 1))  # noqa: E731
    for i in order:
        blocks.append([wanted[i], 1.0])
        while len(blocks) > 1 and start(blocks[-2]) + gap * blocks[-2][1] > start(blocks[-1]):
            total, members = blocks.pop()
            blocks[-1][0] += total - members * gap * blocks[-1][1]
            blocks[-1][1] += members
    places = [start(block) + gap * k for block in blocks for k in range(round(block[1]))]
    result = [0.0] * count
    for i, place in zip(order, places, strict=True):
        result[i] = place
    return result


def _overlap(a: Box, b: Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def _distance(point: tuple[float, float], box: Box) -> float:
    return math.hypot(max(box[0] - point[0], 0, point[0] - box[2]), max(box[1] - point[1], 0, point[1] - box[3]))


def place_labels(
    points: Sequence[tuple[float, float]], sizes: Sequence[tuple[float, float]], frame: Box, obstacles: Sequence[Box]
) -> list[Box]:
    """A box for each point's label, near its point, away from the other labels, the ``obstacles`` and the border.

    Every label tries places around its point at growing distances; a few rounds of choosing the cheapest place given
    the others are enough for the tens of points a report has.
    """
    options: list[list[tuple[float, Box]]] = []
    for (px, py), (width, height) in zip(points, sizes, strict=True):
        rivals = [point for point in points if point != (px, py)]
        places = []
        for radius in (7, 14, 24, 36, 50, 66, 84, 104):
            for angle in range(0, 360, 30 if radius > 10 else 45):
                cos, sin = math.cos(math.radians(angle)), -math.sin(math.radians(angle))
                left = px + cos * radius + (cos - 1) / 2 * width
                top = py + sin * radius + (sin - 1) / 2 * height
                box = (left, top, left + width, top + height)
                outside = width * height - _overlap(box, frame)
                hidden = sum(_overlap(box, thing) for thing in obstacles)
                own = _distance((px, py), box)
                # A label nearer to another's mark would be read as its name.
                mistaken = sum(max(own + 4 - _distance(rival, box), 0.0) for rival in rivals)
                places.append((radius + abs(sin) * 1.5 + 60 * outside + 3 * hidden + 4 * mistaken, box))
        options.append(places)
    chosen = [min(places)[1] for places in options]
    for _ in range(6):
        before = list(chosen)
        for i, places in enumerate(options):
            others = [(b[0] - 2, b[1] - 1, b[2] + 2, b[3] + 1) for j, b in enumerate(chosen) if j != i]
            chosen[i] = min((cost + 20 * sum(_overlap(box, b) for b in others), box) for cost, box in places)[1]
        if chosen == before:
            break
    return chosen


def png(pixels: np.ndarray) -> str:
    """A ``data:`` URI of an (H, W, 4) uint8 picture."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in np.ascontiguousarray(pixels, dtype=np.uint8))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")
