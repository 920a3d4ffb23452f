"""Kernels and receptive fields as small pictures: PNGs of a few hundred bytes, drawn pixel by pixel."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from torchconv.compare import _format as fmt
from torchconv.compare._format import dig, number
from torchconv.compare._svg import Svg, el, figure, png
from torchconv.compare.plots import Series

LAYERS = 4  # layers shown per operator
KERNELS = 16  # kernels shown per layer

# Magnitude becomes opacity, so that zero is the page itself, in light and dark.
_POSITIVE = ((0, (232, 137, 47)), (1, (196, 74, 10)))
_NEGATIVE = ((0, (86, 160, 222)), (1, (22, 98, 178)))
_HEAT = np.array(
    [(13, 12, 34), (44, 28, 92), (104, 36, 124), (170, 50, 112), (225, 88, 82), (247, 148, 74), (252, 226, 150)], float
)


@dataclass(frozen=True)
class Layer:
    """Kernels of one layer: data URIs and the size in CSS pixels to show them at."""

    name: str
    shape: str
    width: int
    height: int
    images: list[str]


@dataclass(frozen=True)
class Gallery:
    """Kernels of one operator on one colour scale of ±``scale``."""

    series: Series
    scale: str
    layers: list[Layer]
    hidden: int
    slices: bool


def _array(value: Any) -> np.ndarray | None:
    try:
        array = np.asarray(value, dtype=float)
    except (TypeError, ValueError):
        return None
    return array if array.ndim and array.size and np.isfinite(array).all() else None


def _as_kernels(array: np.ndarray) -> np.ndarray:
    """(count, rows, columns): a single kernel, or rows of 1-D ones, is one picture; 3-D kernels show a middle slice."""
    if array.ndim > 4:
        array = array.reshape(-1, *array.shape[-3:])
    if array.ndim == 4:
        return array[:, array.shape[1] // 2]
    return array if array.ndim == 3 else np.atleast_2d(array)[None]


def diverging(values: np.ndarray, scale: float) -> np.ndarray:
    """RGBA of values in [−scale, scale]: blue below zero, transparent at zero, orange above."""
    part = np.clip(values / (scale or 1.0), -1, 1)
    size = np.abs(part)[..., None]
    pixels = np.empty((*part.shape, 4))
    for mask, (low, high) in ((part >= 0, _POSITIVE), (part < 0, _NEGATIVE)):
        colour = np.array(low[1]) * (1 - size) + np.array(high[1]) * size
        pixels[mask, :3] = colour[mask]
    pixels[..., 3] = 255 * size[..., 0] ** 0.8
    return pixels.round().astype(np.uint8)


def heat(values: np.ndarray) -> np.ndarray:
    """RGBA of values in [0, 1], dark to bright."""
    position = np.clip(values, 0, 1) * (len(_HEAT) - 1)
    index = np.minimum(position.astype(int), len(_HEAT) - 2)
    part = (position - index)[..., None]
    colour = _HEAT[index] * (1 - part) + _HEAT[index + 1] * part
    return np.concatenate([colour, np.full((*values.shape, 1), 255.0)], axis=-1).round().astype(np.uint8)


def gallery(series: Series) -> Gallery | None:
    """The learned kernels of a candidate, or None when there are none."""
    # An entry holds a layer's kernels, or one kernel called LAYER[i].
    by_layer: dict[str, list[np.ndarray]] = {}
    slices = False
    for entry in series.data.get("kernels") or []:
        array = _array(dig(entry, "data"))
        if array is not None:
            slices = slices or array.ndim >= 4
            name = re.sub(r"\[\d+\]$", "", str(entry.get("name") or "kernels"))
            by_layer.setdefault(name, []).extend(_as_kernels(array))
    if not by_layer:
        return None
    found = list(by_layer.items())
    last = len(found) - 1
    shown = found if last < LAYERS else [found[round(i * last / (LAYERS - 1))] for i in range(LAYERS)]
    scale = max(float(np.abs(kernel).max()) for _, kernels in shown for kernel in kernels[:KERNELS])
    layers = []
    for name, kernels in shown:
        rows, columns = kernels[0].shape
        zoom = max(1, 2 * (max(rows, columns) < 32), round((37 if len(kernels) > 1 else 120) / max(rows, columns)))
        images = [png(diverging(kernel, scale)) for kernel in kernels[:KERNELS]]
        layers.append(Layer(name, f"{rows} × {columns}", columns * zoom, max(rows * zoom, 12), images))
    return Gallery(series, fmt.digits(scale, 2), layers, len(found) - len(shown), slices)


_MARKED = {0.5: "half", 0.99: "most"}


def receptive_field(series: Series) -> Svg | None:
    """The effective receptive field (log scale) with the centred squares that hold given shares of it."""
    array = _array(dig(series.data, "erf", "map"))
    if array is None or array.ndim > 2:
        return None
    array = np.atleast_2d(array)
    size = dig(series.data, "erf", "size")
    rows, columns = array.shape
    if isinstance(size, list | tuple) and size and all(number(v) for v in size):
        high, wide = (float(size[-2]) if len(size) > 1 else 1.0), float(size[-1])
    else:
        high, wide = float(rows), float(columns)
    width = 200.0
    height = max(36.0, min(width * high / wide, 400.0))
    unit = width / wide
    picture = el(
        "image", href=png(heat(array)), width=width, height=height, preserveAspectRatio="none", cls="pixels"
    )  # fmt: skip
    marks, words = [], []
    for share, side in _sides(series):
        if side is None:
            continue
        words.append(f"{share:.0%} of the brightness within a side of {fmt.short(side)} pixels")
        w, h = min(side * unit, width), height if rows == 1 else min(side * unit, height)
        if share not in _MARKED:
            continue
        look = f"side {_MARKED[share]}"
        # The centre is pixel size // 2: of an even size, half a pixel behind the middle.
        x, y = (min((n // 2 + 0.5) * unit - s / 2, n * unit - s) for n, s in ((wide, w), (high, h)))
        place = {"x": max(x, 0.0), "y": 0.0 if rows == 1 else max(y, 0.0), "width": w, "height": h}
        marks.append(el("rect", **place, cls=look + " under"))
        marks.append(el("rect", **place, cls=look))
    what = "; ".join(words) or "Brightness is the log of the influence on the centre"
    title = f"Effective receptive field of {series.label}"
    return figure(f"erf-{series.index}", title, what + ".", (width, height), picture, *marks)


def _sides(series: Series) -> list[tuple[float, float | None]]:
    pairs = []
    for share, side in (dig(series.data, "erf", "sides") or {}).items():
        try:
            known = float(share)
        except ValueError:
            continue
        if math.isfinite(known):
            pairs.append((known, number(side)))
    return sorted(pairs)


def side_table(series: Series) -> list[tuple[str, str, str]]:
    """(share of the influence, side, part of the input's width) in words."""
    size = dig(series.data, "erf", "size")
    wide = number(size[-1]) if isinstance(size, list | tuple) and size else None
    table = []
    for share, side in _sides(series):
        known = side is not None and wide
        table.append((
            fmt.percent(share, 0),
            "> input" if side is None else f"{fmt.short(side)}{fmt.NARROW}px",
            fmt.percent((side or 0) / wide, 0) if known and wide else "",
        ))  # fmt: skip
    return table
