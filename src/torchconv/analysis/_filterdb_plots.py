"""Pictures of filters, as matplotlib figures made without pyplot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from torchconv._common import check, require
from torchconv.analysis._filterdb_quality import LayerQuality
from torchconv.analysis._filterdb_stream import Array, Basis, chunks
from torchconv.analysis._filterdb_study import Study

_COLOURS = ("#3366aa", "#cc6633", "#44995e", "#8855a8", "#b8912a", "#4aa3b5")


def _figure(width: float, height: float) -> Any:
    return require("matplotlib.figure", "inspect").Figure(figsize=(width, height), layout="constrained")


def density(counts: Array, x_range: tuple[float, float], points: int = 256) -> tuple[Array, Array]:
    """Gaussian kernel density of binned values with Silverman's bandwidth: places and density."""
    counts = np.asarray(counts, dtype=np.float64)
    width = (x_range[1] - x_range[0]) / len(counts)
    centres = x_range[0] + width * (np.arange(len(counts)) + 0.5)
    total = counts.sum()
    mean = (counts * centres).sum() / total
    deviation = math.sqrt(max((counts * (centres - mean) ** 2).sum() / total, 0.0))
    bandwidth = max(deviation * (0.75 * total) ** -0.2, width / 2)  # bins say nothing finer than themselves
    places = np.linspace(*x_range, points)
    bells = np.exp(-0.5 * ((places[:, None] - centres) / bandwidth) ** 2) / (bandwidth * math.sqrt(2 * math.pi))
    return places, bells @ (counts / total)


def ridge(study: Study) -> Any:
    """Densities of all coefficients: a row a group, a column a component, rows overlapping."""
    groups, taps = study.counts.shape[:2]
    figure = _figure(1.3 * taps + 1.5, 0.45 * groups + 1.2)
    axes = figure.subplots(1, taps, squeeze=False)[0]
    for k, axis in enumerate(axes):
        for g in range(groups):
            places, height = density(study.counts[g, k], study.x_range)
            base = groups - 1 - g
            height = base + 1.5 * height / height.max()
            colour = _COLOURS[g % len(_COLOURS)]
            axis.fill_between(places, base, height, color=colour, alpha=0.75, zorder=g, linewidth=0)
            axis.plot(places, height, color="white", linewidth=0.8, zorder=g)
        axis.set_title(f"c{k}\n{100 * study.basis.ratio[k]:.1f} %", fontsize=9)
        axis.set_xlim(study.x_range)
        axis.set_ylim(-0.1, groups + 0.6)
        axis.spines[["left", "right", "top"]].set_visible(False)
        axis.set_yticks(range(groups - 1, -1, -1) if k == 0 else [], study.names if k == 0 else [])
        axis.tick_params(left=False, labelsize=8)
    return figure


def heatmap(study: Study) -> Any:
    """Shift between groups, ordered by their mean shift to all."""
    order = study.rank
    matrix = study.matrix[np.ix_(order, order)]
    side = 0.55 * len(order) + 2
    figure = _figure(side + 0.8, side)
    axis = figure.subplots()
    image = axis.imshow(matrix, cmap="viridis", vmin=0)
    names = [f"{study.names[i]} ({study.sizes[i]:,})" for i in order]
    axis.set_xticks(range(len(order)), [study.names[i] for i in order], rotation=60, ha="right", fontsize=8)
    axis.set_yticks(range(len(order)), names, fontsize=8)
    if len(order) <= 15:
        middle = matrix.max() / 2
        for (i, j), value in np.ndenumerate(matrix):
            colour = "white" if value <= middle else "black"
            axis.text(j, i, f"{value:.2g}", ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, label="symmetric KL divergence D")
    return figure


def shift_boxes(studies: Mapping[str, Study]) -> Any:
    """The spread of the shift between groups, for several groupings of filters."""
    check(len(studies) > 0, "studies", dict(studies), "must name at least one study")
    figure = _figure(1.2 * len(studies) + 1.5, 3.5)
    axis = figure.subplots()
    upper = [s.matrix[np.triu_indices(len(s.names), 1)] for s in studies.values()]
    axis.boxplot(upper, tick_labels=list(studies))
    axis.set_ylabel("symmetric KL divergence D")
    return figure


def scatter(basis: Basis, filters: Any, components: tuple[int, int] = (0, 1), limit: float = 3.3) -> Any:
    """Density of two coefficients, 512 × 512, divided by its maximum, logarithmic colours: sun, spikes, symbols, point.

    Args:
        basis: of the study.
        filters: as for ``study``.
        components: which two coefficients.
        limit: half the side of the picture.
    """
    i, j = components
    found = np.zeros((512, 512))
    edges = np.linspace(-limit, limit, 513)
    for rows in chunks(filters):
        c = basis.coefficients(rows)
        found += np.histogram2d(c[:, i], c[:, j], bins=(edges, edges))[0]
    figure = _figure(4, 3.6)
    axis = figure.subplots()
    colours = require("matplotlib", "inspect").colormaps["magma"]
    axis.set_facecolor(colours(0.0))
    scaled = found.T / max(found.max(), 1.0)
    norm = require("matplotlib.colors", "inspect").LogNorm(1e-5, 1)
    shown = np.ma.masked_equal(scaled, 0.0)
    image = axis.imshow(shown, origin="lower", extent=(-limit, limit) * 2, cmap=colours, norm=norm)
    axis.set_xlabel(f"c{i}")
    axis.set_ylabel(f"c{j}")
    figure.colorbar(image, label="share of the densest cell")
    return figure


def basis_images(basis: Basis, kernel_size: tuple[int, int] | None = None) -> Any:
    """Components as kernels, with their share of the variance."""
    taps = len(basis.components)
    side = math.isqrt(taps)
    shape = kernel_size or (side, side)
    check(shape[0] * shape[1] == taps, "kernel_size", kernel_size, f"must have {taps} taps")
    columns = min(taps, 9)
    lines = -(-taps // columns)
    figure = _figure(1.1 * columns, 1.35 * lines)
    limit = float(np.abs(basis.components).max())
    for k, axis in enumerate(figure.subplots(lines, columns, squeeze=False).flat):
        axis.axis("off")
        if k < taps:
            axis.imshow(basis.components[k].reshape(shape), cmap="RdBu_r", vmin=-limit, vmax=limit)
            axis.set_title(f"v{k}", fontsize=8)
            axis.text(0.5, -0.02, f"{100 * basis.ratio[k]:.1f} %", transform=axis.transAxes, ha="center", va="top")
    return figure


def explained(bases: Mapping[str, Basis]) -> Any:
    """Cumulative explained variance."""
    figure = _figure(4.5, 3)
    axis = figure.subplots()
    for name, basis in bases.items():
        axis.plot(range(1, len(basis.ratio) + 1), np.cumsum(basis.ratio), marker="o", markersize=3, label=name)
    axis.set_xlabel("components")
    axis.set_ylabel("share of the variance")
    axis.set_ylim(0, 1.03)
    axis.legend(fontsize=8)
    return figure


def by_depth(depths: Sequence[float], qualities: Sequence[LayerQuality]) -> Any:
    """Sparsity, entropy over its random level and orthogonality of the layers of one network along its depth."""
    figure = _figure(7, 3)
    axis = figure.subplots()
    order = np.argsort(np.asarray(depths), kind="stable")
    places = np.asarray(depths)[order]
    curves = {
        "sparsity": [q.sparsity for q in qualities],
        "entropy H / log10(taps)": [q.variance_entropy / math.log10(q.taps) for q in qualities],
        "orthogonality": [q.orthogonality for q in qualities],
    }
    for (name, values), colour in zip(curves.items(), _COLOURS, strict=False):
        axis.plot(places, np.asarray(values)[order], marker="o", markersize=3, label=name, color=colour)
    axis.set_xlabel("normalised depth")
    axis.set_ylim(-0.03, 1.05)
    axis.legend(fontsize=8)
    return figure


def depth_boxes(depths: Sequence[float], qualities: Sequence[LayerQuality], metric: str = "variance_entropy") -> Any:
    """Weighted box plots of a metric over tenths of the depth of many networks, first layers apart.

    Args:
        depths: normalised, 0 for first layers.
        qualities: one a layer; each counts as many times as it has filters.
        metric: an attribute of ``LayerQuality``.
    """
    figure = _figure(7, 3)
    axis = figure.subplots()
    boxes: dict[str, list[tuple[float, int]]] = {}
    for depth, found in zip(depths, qualities, strict=True):
        tenth = max(math.ceil(round(depth * 10, 9)), 1)
        value = float(getattr(found, metric))
        if math.isfinite(value):
            name = "first" if depth == 0 else f"≤ {tenth / 10:.1f}"
            boxes.setdefault(name, []).append((value, found.n))
    stats = []
    for name in sorted(boxes, key=lambda n: (n != "first", n)):
        values, weights = np.array([v for v, _ in boxes[name]]), np.array([w for _, w in boxes[name]])
        low, q1, middle, q3, high = weighted_quantiles(values, weights, (0.05, 0.25, 0.5, 0.75, 0.95))
        stats.append({"label": name, "whislo": low, "q1": q1, "med": middle, "q3": q3, "whishi": high, "fliers": []})
    axis.bxp(stats, showfliers=False)
    axis.set_xlabel("normalised depth")
    axis.set_ylabel(metric.replace("_", " "))
    return figure


def weighted_quantiles(values: Array, weights: Array, shares: Sequence[float]) -> list[float]:
    """Smallest values below which lies at least each share of the weight."""
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weights[order]) / weights.sum()
    places = np.searchsorted(reached, np.asarray(shares) - 1e-12)
    return [float(values[order][min(p, len(values) - 1)]) for p in places]


def filter_sheet(weight: Tensor, most: int = 32, rgb: bool = False) -> Any:
    """Kernels of a layer in a grid: outputs along x, inputs along y, symmetric limits.

    Args:
        weight: (O, I, kh, kw).
        most: outputs and inputs shown at most.
        rgb: I = 3: each output as one colour picture, 0.5 + 0.5 w / max |w|.
    """
    check(weight.dim() == 4, "weight", tuple(weight.shape), "must be (out, in, kh, kw)")
    check(not rgb or weight.shape[1] == 3, "rgb", rgb, f"needs 3 input channels, not {weight.shape[1]}")
    full = weight.detach().float().cpu()
    limit = max(float(full.abs().max()), 1e-30)
    shown = full[:most, :most]
    outputs, inputs, height, width = shown.shape
    if rgb:
        tiles = (0.5 + 0.5 * shown / limit).permute(0, 2, 3, 1).numpy()[:, None]
    else:
        tiles = (shown / limit).numpy()[..., None]
    lines = tiles.shape[1]
    sheet = np.full((lines * (height + 1) - 1, outputs * (width + 1) - 1, tiles.shape[-1]), 1.0 if rgb else np.nan)
    for o in range(outputs):
        for i in range(lines):
            y, x = i * (height + 1), o * (width + 1)
            sheet[y : y + height, x : x + width] = tiles[o, i]
    scale = min(9.0 / sheet.shape[1], 9.0 / sheet.shape[0], 0.12)
    figure = _figure(max(scale * sheet.shape[1], 2.5) + 0.5, max(scale * sheet.shape[0], 1.0) + 0.7)
    axis = figure.subplots()
    axis.imshow(sheet if rgb else sheet[..., 0], cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_xlabel(f"outputs ({outputs} of {full.shape[0]})", fontsize=8)
    axis.set_ylabel("" if rgb else f"inputs ({inputs} of {full.shape[1]})", fontsize=8)
    return figure
