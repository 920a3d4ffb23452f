"""The figures of the comparison report, as SVG that takes its colours from the page.

Every figure is drawn about 360 user units wide and shown at about that many pixels, so its text stays readable on a
telephone, where figures stack. A figure whose numbers are missing is None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

from torchconv.compare import _format as fmt
from torchconv.compare._format import dig, number
from torchconv.compare._svg import (
    Box,
    Scale,
    Svg,
    axes,
    el,
    figure,
    num,
    padded,
    place_labels,
    shorten,
    spread,
    text_width,
)

COLOURS = 8  # accents in the style sheet; more candidates than that reuse them with another marker

_SHAPES = (
    "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0",
    "M-3.6,-3.6h7.2v7.2h-7.2z",
    "M0,-4.8L4.6,3.4H-4.6z",
    "M0,-5L5,0L0,5L-5,0z",
    "M0,4.8L4.6,-3.4H-4.6z",
    "M-1.6,-4.8h3.2v3.2h3.2v3.2h-3.2v3.2h-3.2v-3.2h-3.2v-3.2h3.2z",
    "M0,-4.8L4.6,-1.5L2.8,3.9H-2.8L-4.6,-1.5z",
)


Band = list[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """One candidate with the look it keeps in every figure: neutral for the baseline, else an accent of its own."""

    index: int
    label: str
    data: dict[str, Any]
    baseline: bool = False
    accent: int = 0

    @property
    def cls(self) -> str:
        return "sb" if self.baseline else f"s{self.accent % COLOURS}"

    def accuracy(self) -> float | None:
        return number(dig(self.data, "accuracy", "mean"))

    def interval(self, key: str = "accuracy") -> tuple[float, float] | None:
        low, high = number(dig(self.data, key, "low")), number(dig(self.data, key, "high"))
        return None if low is None or high is None else (low, high)

    def marker(self, x: float, y: float, hollow: bool = False) -> Svg:
        shape = 0 if self.baseline else 1 + self.accent % (len(_SHAPES) - 1)
        return el("path", d=_SHAPES[shape], transform=f"translate({num(x)} {num(y)})", cls="dot o" if hollow else "dot")

    def group(self, *children: object, title: str = "") -> Svg:
        return el("g", el("title", title) if title else None, *children, cls=f"mark {self.cls}", data_c=self.index)


Curve = tuple[Series, list[float], list[float], Band]  # x, y and, where there are several seeds, (low, high)


def swatch(series: Series) -> Svg:
    """The marker of a candidate, for tables and text."""
    return el("svg", series.marker(7, 7), viewBox="0 0 14 14", cls=f"swatch {series.cls}", aria_hidden="true")


def _share(value: float) -> str:
    return f"{fmt.short(value * 100)}{fmt.NARROW}%"


def _sentence(parts: Sequence[str]) -> str:
    return "; ".join(parts) + "."


def pareto(
    all_series: Sequence[Series], key: str, title: str, cost_of: dict[int, Any], front: set[int], decimals: int = 1
) -> Svg | None:
    """Accuracy with its interval against a cost; the front is a step line and its members are filled."""
    shown = [
        (s, v, a) for s in all_series if (v := number(cost_of[s.index])) is not None and (a := s.accuracy()) is not None
    ]
    if not shown:
        return None
    text = fmt.short_milliseconds if key == "latency" else fmt.short_count
    width, height = 360.0, 292.0
    costs = [v for _, v, _ in shown]
    log = min(costs) > 0 and max(costs) / min(costs) > 6
    if log:
        margin = (max(costs) / min(costs)) ** 0.08
        x = Scale(min(costs) / margin, max(costs) * margin, 48, width - 16, log=True)
    else:
        x = Scale(*padded(costs, 0.1, floor=0.2 * max(map(abs, costs))), 48, width - 16)
    heights = [e for s, _, a in shown for e in (a, *(s.interval() or ()))]
    y = Scale(*padded(heights, 0.1, floor=0.01), height - 42, 14)
    frame: Box = (x.start, y.end - 6, width, y.start - 3)

    places, sizes, obstacles, marks = [], [], [], []
    for series, cost, accuracy in shown:
        px, py = x(cost), y(accuracy)
        interval = series.interval()
        places.append((px, py))
        sizes.append((text_width(shorten(series.label, 20)), 12.0))
        obstacles.append((px - 6, py - 6, px + 6, py + 6))
        bar = None
        if interval:
            bar = el("line", cls="whisker", x1=px, x2=px, y1=y(interval[0]), y2=y(interval[1]))
            obstacles.append((px - 2, y(interval[1]), px + 2, y(interval[0])))
        hint = f"{series.label}: {fmt.percent(accuracy, decimals)} at {text(cost)}"
        hint += ", on the front" if series.index in front else ""
        marks.append(series.group(bar, series.marker(px, py, hollow=series.index not in front), title=hint))

    on_front = sorted((x(c), y(a)) for s, c, a in shown if s.index in front)
    line = None
    if on_front:
        path = f"M{num(on_front[0][0])},{num(y.start)}V{num(on_front[0][1])}"
        path += "".join(f"H{num(px)}V{num(py)}" for px, py in on_front[1:]) + f"H{num(x.end)}"
        line = el("path", d=path, cls="front")
        corners = [*on_front, (x.end, on_front[-1][1])]
        obstacles += [(a[0], a[1] - 1, b[0], a[1] + 1) for a, b in pairwise(corners)]
        obstacles += [(b[0] - 1, min(a[1], b[1]), b[0] + 1, max(a[1], b[1])) for a, b in pairwise(corners)]

    labels = []
    boxes = place_labels(places, sizes, frame, obstacles)
    for (series, _, _), (px, py), box in zip(shown, places, boxes, strict=True):
        near_x, near_y = min(max(px, box[0]), box[2]), min(max(py, box[1]), box[3])
        distance = ((near_x - px) ** 2 + (near_y - py) ** 2) ** 0.5
        leader = None
        if distance > 13:
            leader = el("line", cls="leader", x1=px, y1=py, x2=near_x, y2=near_y)
        name = el("text", shorten(series.label, 20), x=(box[0] + box[2]) / 2, y=box[3] - 2.8, text_anchor="middle")
        labels.append(series.group(leader, name))
    what = _sentence([f"{s.label} {fmt.percent(a, decimals)} at {text(c)}" for s, c, a in shown])
    return figure(
        f"pareto-{key}", f"Accuracy against {title}", what, (width, height),
        axes(x, y, text, _share, title + (" (log scale)" if log else "")),
        line, *labels, *marks,
    )  # fmt: skip


def lines(
    name: str, title: str, x_label: str, curves: Sequence[Curve],
    y_text: Callable[[float], str], log: bool = False, dots: bool = False,
) -> Svg | None:  # fmt: skip
    """Lines with an optional band each (a list of (low, high)), named at their right end."""
    curves = [c for c in curves if c[1]]
    if not curves:
        return None
    labels = [shorten(c[0].label, 13) for c in curves]
    width, height = 360.0, 270.0
    right = width - 12 - max(map(text_width, labels))
    every = [v for c in curves for v in c[2]] + [e for c in curves for b in c[3] for e in b]
    log = log and min(every) > 0 and max(every) / min(every) > 8
    if log:
        y = Scale(min(every) / 1.15, max(every) * 1.1, height - 42, 10, log=True)
    else:
        y = Scale(*padded(every, 0.05, floor=0.005), height - 42, 10)
    x_values = [v for c in curves for v in c[1]]
    low, high = min(x_values), max(x_values)
    x = Scale(low, high, 48, right) if high > low else Scale(low - 0.5, low + 0.5, 48, right)
    whole = all(float(v).is_integer() for v in x_values)
    marks: list[Svg] = []
    ends = spread([y(c[2][-1]) for c in curves], 12.0, 10, height - 44)
    for (series, xs, ys, band), label, end in zip(curves, labels, ends, strict=True):
        path = "M" + "L".join(f"{num(x(a))},{num(y(b))}" for a, b in zip(xs, ys, strict=True))
        area = None
        if band:
            top = [f"{num(x(a))},{num(y(b[1]))}" for a, b in zip(xs, band, strict=True)]
            bottom = [f"{num(x(a))},{num(y(b[0]))}" for a, b in zip(xs, band, strict=True)]
            area = el("path", d="M" + "L".join(top + bottom[::-1]) + "z", cls="band")
        last_x, last_y = x(xs[-1]), y(ys[-1])
        leader = el("path", d=f"M{num(last_x + 3)},{num(last_y)}L{num(right + 7)},{num(end)}", cls="leader")
        points = [series.marker(x(a), y(b)) for a, b in zip(xs, ys, strict=True)] if dots or len(xs) == 1 else []
        text = el("text", label, x=right + 9, y=end + 3.5)
        hint = f"{series.label}: {y_text(ys[-1])} at {fmt.short(xs[-1])}"
        marks.append(series.group(area, el("path", d=path, cls="line"), *points, leader, text, title=hint))

    def x_text(value: float) -> str:
        return "" if whole and not float(value).is_integer() else fmt.short(value)

    what = _sentence([f"{c[0].label} from {y_text(c[2][0])} to {y_text(c[2][-1])}" for c in curves])
    axis = axes(x, y, x_text, y_text, x_label + (", loss on a log scale" if log else ""))
    return figure(name, title, what, (width, height), axis, *marks)


def learning(all_series: Sequence[Series], field: str, last_half: bool = False) -> Svg | None:
    """Mean over seeds of ``train_loss`` or ``val_accuracy`` per epoch, with the range over seeds as a band."""
    curves: list[Curve] = []
    for series in all_series:
        by_epoch: dict[float, list[float]] = {}
        for run in series.data.get("curves") or []:
            for epoch, value in zip(run.get("epochs") or [], run.get(field) or [], strict=False):
                if number(epoch) is not None and (known := number(value)) is not None:
                    by_epoch.setdefault(float(epoch), []).append(known)
        epochs = sorted(by_epoch)
        if last_half:
            epochs = [e for e in epochs if e >= epochs[-1] / 2] if len(epochs) >= 8 else []
        seeds = max(map(len, by_epoch.values()), default=0)
        band = [(min(by_epoch[e]), max(by_epoch[e])) for e in epochs] if seeds > 1 else []
        curves.append((series, epochs, [fmean(by_epoch[e]) for e in epochs], band))
    share = field != "train_loss"
    title = ("Validation accuracy" if share else "Training loss") + (", second half" if last_half else "")
    text = _share if share else fmt.short
    return lines(f"curve-{field}{'-late' if last_half else ''}", title, "epoch", curves, text, log=not share)


def robustness(all_series: Sequence[Series], kind: str, x_label: str) -> Svg | None:
    """Test accuracy against the strength of a corruption."""
    curves: list[Curve] = []
    for series in all_series:
        levels = dig(series.data, "robustness", kind, "levels") or []
        values = dig(series.data, "robustness", kind, "accuracy") or []
        pairs = [(a, b) for a, b in zip(map(number, levels), map(number, values), strict=False) if None not in (a, b)]
        curves.append((series, [float(a or 0) for a, _ in pairs], [float(b or 0) for _, b in pairs], []))
    return lines(f"robust-{kind}", f"Test accuracy under {kind}", x_label, curves, _share, dots=True)


def forest(all_series: Sequence[Series], baseline: str, decimals: int = 1) -> Svg | None:
    """Each candidate's difference to the baseline with its interval; filled where it is larger than the noise."""
    shown = [(s, d) for s in all_series if (d := number(dig(s.data, "difference", "mean"))) is not None]
    if not shown:
        return None
    shown.sort(key=lambda item: -item[1])
    row, width = 25.0, 380.0
    left = 12 + max(text_width(shorten(s.label, 18)) for s, _ in shown)
    ends = [e for s, d in shown for e in (d, *(s.interval("difference") or ()))]
    x = Scale(*padded([*ends, 0.0], 0.06, floor=0.004), left, width - 46)
    bottom = 8 + row * len(shown)
    marks = [el("line", cls="zero", x1=x(0), x2=x(0), y1=2, y2=bottom)]
    for value in x.ticks(4):
        marks.append(el("line", cls="axis", x1=x(value), x2=x(value), y1=bottom, y2=bottom + 4))
        shown_text = f"{value * 100:+g}".replace("-", "−") if abs(value) > 1e-9 else "0"
        marks.append(el("text", shown_text, x=x(value), y=bottom + 15, text_anchor="middle"))
    marks.append(el("line", cls="axis", x1=x.start, x2=x.end, y1=bottom, y2=bottom))
    caption = f"percentage points to {shorten(baseline, 24)}"
    marks.append(el("text", caption, x=(x.start + x.end) / 2, y=bottom + 31, text_anchor="middle", cls="name"))
    words = []
    for i, (series, mean) in enumerate(shown):
        y = 6 + row * (i + 0.5)
        interval, real = series.interval("difference"), bool(dig(series.data, "difference", "significant"))
        bar = el("line", cls="whisker", x1=x(interval[0]), x2=x(interval[1]), y1=y, y2=y) if interval else None
        hint = f"{series.label}: {fmt.points(mean, decimals)} points"
        hint += f", {fmt.points(interval[0], decimals)} to {fmt.points(interval[1], decimals)}" if interval else ""
        p_value = fmt.probability(dig(series.data, "difference", "p_adjusted"))
        hint += f", adjusted {p_value}" if p_value else ""
        words.append(hint)
        name = el("text", shorten(series.label, 18), x=left - 10, y=y + 3.7, text_anchor="end")
        strong = "strong" if real else None
        value_text = el("text", fmt.points(mean, decimals), x=width, y=y + 3.7, text_anchor="end", cls=strong)
        marks.append(series.group(name, bar, series.marker(x(mean), y, hollow=not real), value_text, title=hint))
    return figure("forest", "Difference to the baseline", _sentence(words), (width, bottom + 36), *marks)


def interval_bar(series: Series, domain: tuple[float, float] | None, reference: float | None) -> Svg | None:
    """The accuracy and its interval on the scale that all rows share; a tick where the baseline is."""
    mean, interval = series.accuracy(), series.interval()
    if mean is None or domain is None:
        return None
    x = Scale(*domain, 5, 91)
    base = el("line", cls="zero", x1=x(reference), x2=x(reference), y1=0, y2=16) if reference is not None else None
    bar = el("line", cls="whisker", x1=x(interval[0]), x2=x(interval[1]), y1=8, y2=8) if interval else None
    group = el("g", bar, series.marker(x(mean), 8), cls=series.cls)
    return el("svg", base, group, viewBox="0 0 96 16", cls="bar", aria_hidden="true")


KINDS = ("convolution", "matmul", "fft", "elementwise")


def count_bar(series: Series, largest: float) -> Svg | None:
    """Operations by kind, as one stacked bar; all bars share a scale."""
    values = [number(dig(series.data, "counts", kind)) or 0.0 for kind in KINDS]
    if not sum(values) or not largest:
        return None
    parts, left = [], 0.0
    for kind, value in zip(KINDS, values, strict=True):
        width = 160 * value / largest
        if width > 0:
            hint = el("title", f"{kind}: {fmt.count(value)}")
            parts.append(el("rect", hint, x=left, y=2, width=max(width, 0.5), height=10, cls=f"kind-{kind}"))
        left += width
    return el("svg", *parts, viewBox="0 0 161 14", cls="countbar", aria_hidden="true")
