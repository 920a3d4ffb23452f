"""CNN Filter DB: statistics, shift and degeneration of trained convolution kernels.

P. Gavrikov, J. Keuper, "CNN Filter DB: An Empirical Investigation of Trained Convolutional Filters", CVPR 2022,
arXiv 2203.15331. The k × k kernels of many networks are samples of a distribution: how does it move with task, data,
architecture and depth, and which layers are wasted?

A filter f is one input channel of one output channel. Scaled s(f) = f / max |f|, in the common principal basis
c = V (s − μ); h_k, the histogram of coefficient k in 70 bins. The shift of two groups P and Q is

    D(P, Q) = Σ_k a_k [KL(h_k(P), h_k(Q)) + KL(h_k(Q), h_k(P))],     a = explained-variance ratios.

Of a layer's unscaled filters: S, the share whose largest magnitude is below 0.01 of the layer's; H = −Σ v log10 v of
the shares of variance v, and T_H(n), the H of n random filters; O, the orthogonality of the output filters. A layer is
degenerate when its filters are sparse, nearly one pattern (H low) or as random as at the start (H ≥ T_H).

Cost: two or three passes over the filters in chunks, taps² multiply-adds a filter for the covariance and again for the
coefficients; memory does not depend on their number. Orthogonality alone grows with the square of the outputs.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from torchconv.analysis import _filterdb_plots as plots
from torchconv.analysis._filterdb_layers import Layer, Source, layers
from torchconv.analysis._filterdb_quality import (
    DEGENERATE,
    LayerQuality,
    Thresholds,
    entropy_threshold,
    orthogonality,
    quality,
    random_entropy,
    sparse_mask,
    sparsity,
    variance_entropy,
    variance_ratio,
    verdict,
)
from torchconv.analysis._filterdb_store import Database
from torchconv.analysis._filterdb_stream import Basis, Extremes, Histogram, Moments, probabilities, scale, shift
from torchconv.analysis._filterdb_study import Study, shift_matrix, study
from torchconv.analysis.section import Picture, Section
from torchconv.catalog import part

__all__ = [
    "Basis",
    "Database",
    "Extremes",
    "FilterReport",
    "Histogram",
    "Layer",
    "LayerQuality",
    "LayerReport",
    "Moments",
    "Study",
    "Thresholds",
    "entropy_threshold",
    "inspect_filters",
    "layers",
    "orthogonality",
    "plots",
    "probabilities",
    "quality",
    "random_entropy",
    "scale",
    "section",
    "shift",
    "shift_matrix",
    "sparse_mask",
    "sparsity",
    "study",
    "variance_entropy",
    "variance_ratio",
    "verdict",
]

_BAD = 0.25  # share of degenerate layers from which a network is called bad

READING = (
    "Every kernel of a layer is a sample. Sparsity is the share of kernels below 1 % of the layer's largest weight: "
    "above a half, most of the layer is idle. Entropy says how many patterns the kernels are made of: 0 is one pattern "
    "repeated, the level of random numbers means that the layer has learned no pattern; in between is good. "
    "Orthogonality is 1 when output filters share nothing. Degenerate layers are candidates for pruning, for fewer "
    "channels or for longer training. After P. Gavrikov and J. Keuper, CNN Filter DB, CVPR 2022; the cut-offs are "
    "torchconv's."
)


@dataclass(frozen=True)
class LayerReport:
    """One layer: what it is, its metrics, and "sparse", "random", "low diversity", "ok" or "too few filters"."""

    layer: Layer
    quality: LayerQuality
    verdict: str

    def row(self) -> dict[str, Any]:
        """As plain data; numbers that do not exist are None."""
        numbers = {k: _number(v) for k, v in dataclasses.asdict(self.quality).items()}
        shape = " × ".join(map(str, self.layer.weight.shape))
        where = {"layer": self.layer.name, "shape": shape, "depth": round(self.layer.depth_norm, 4)}
        return {**where, "verdict": self.verdict, **numbers}


@dataclass(frozen=True)
class FilterReport:
    """All layers of a network that have kernels of the asked size."""

    layers: tuple[LayerReport, ...]

    @property
    def degenerate(self) -> tuple[LayerReport, ...]:
        """Layers that are sparse, random or of low diversity."""
        return tuple(r for r in self.layers if r.verdict in DEGENERATE)

    def mean(self, metric: str = "variance_entropy") -> float:
        """Mean of a metric weighted by the number of filters, leaving out layers where it does not exist."""
        pairs = [(float(getattr(r.quality, metric)), r.quality.n) for r in self.layers]
        pairs = [(v, n) for v, n in pairs if math.isfinite(v)]
        return sum(v * n for v, n in pairs) / sum(n for _, n in pairs) if pairs else float("nan")

    def sentence(self) -> str:
        """ "3 of 19 layers are degenerate: 2 sparse, 1 random"."""
        if not self.layers:
            return "No layer has kernels of this size."
        found = Counter(r.verdict for r in self.degenerate)
        detail = ", ".join(f"{found[k]} {k}" for k in DEGENERATE if found[k])
        count, of = len(self.degenerate), len(self.layers)
        words = f"{count} of {of} layers {'is' if count == 1 else 'are'} degenerate" if of > 1 else "The only layer is "
        if of == 1:
            return words + (f"degenerate: {detail}." if count else "not degenerate.")
        return words + (f": {detail}." if count else ".")


@part(
    "filterdb",
    paper="filterdb",
    kind="analysis",
    dims=(2,),
    keywords="filter kernel statistics distribution shift KL divergence sparsity variance entropy orthogonality "
    "degeneration pruning PCA trained weights over-parametrised",
)
def inspect_filters(
    source: Source,
    kernel_size: int | tuple[int, int] | None = 3,
    *,
    eps: float = 0.01,
    thresholds: Thresholds | None = None,
    fold_bn: bool = False,
    depth: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> FilterReport:
    """Quality and verdict of every layer's filters.

    Args:
        source: a module or a state dict.
        kernel_size: 3 as in the paper, another size, or None for all above 1 × 1.
        eps: share of a layer's largest weight below which a filter is sparse.
        thresholds: where a layer is called degenerate.
        fold_bn: multiply by the scale of batch norms first, as exported networks have it.
        depth: how deep layers lie, see ``layers``.
        progress: called with layers done and layers in all.

    Raises:
        ValueError: bad arguments, or weights that are not finite.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3))
        >>> _ = net[2].weight.data.mul_((torch.rand(16, 16, 1, 1) > 0.7))
        >>> inspect_filters(net).layers[1].verdict
        'sparse'

    Reference:
        arXiv 2203.15331, sections 3 and 5.
    """
    found = layers(source, kernel_size, depth=depth, fold_bn=fold_bn)
    reports = []
    for k, layer in enumerate(found):
        try:
            metrics = quality(layer.weight, eps)
        except ValueError as error:
            raise ValueError(f"source: layer {layer.name}: {error}") from None
        reports.append(LayerReport(layer, metrics, verdict(metrics, thresholds)))
        if progress is not None:
            progress(k + 1, len(found))
    return FilterReport(tuple(reports))


def section(model: Source, *, kernel_size: int | tuple[int, int] | None = None, pictures: bool = True) -> Section:
    """The section of ``torchconv inspect``: how many layers are degenerate, which, and pictures of them.

    Args:
        model: a module or a state dict.
        kernel_size: None for all above 1 × 1.
        pictures: draw figures, which takes matplotlib.
    """
    report = inspect_filters(model, kernel_size)
    rows = [r.row() for r in report.layers]
    count = len(report.degenerate)
    level = "note" if not rows or 0 < count < _BAD * len(rows) else "bad" if count else "good"
    means = {m: _number(report.mean(m)) for m in ("sparsity", "variance_entropy", "orthogonality")}
    return Section(
        key="filters",
        title="Filters",
        verdict=_said(report, model),
        reading=READING,
        level=level,
        tables={"layers": rows} if rows else {},
        pictures=_pictures(report.layers) if pictures and rows else (),
        data={"layers": rows, "degenerate": count, "weighted_means": means},
    )


def _said(report: FilterReport, model: Source) -> str:
    """The sentence of a report, with what was not judged."""
    if not report.layers:
        return "There is no 2-D convolution above 1 × 1 whose filters could be judged."
    words = report.sentence().removesuffix(".").replace("The only layer", "The only 2-D convolution above 1 × 1")
    few = sum(r.verdict == "too few filters" for r in report.layers)
    words += f"; {few} {'has' if few == 1 else 'have'} too few filters to say" if few else ""
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)] if isinstance(model, nn.Module) else []
    points = sum(m.kernel_size == (1, 1) for m in convolutions)
    words += f"; {points} convolution{'s' * (points > 1)} of 1 × 1 not judged" if points else ""
    return f"{words}."


def _pictures(reports: Sequence[LayerReport]) -> list[Picture]:
    depths = [r.layer.depth_norm for r in reports]
    found = [
        Picture(
            "filters-by-depth",
            plots.by_depth(depths, [r.quality for r in reports]),
            "A point is a layer, the input on the left. Sparsity should be low; entropy near 1 is random, near 0 a "
            "single pattern; orthogonality near 1 means that outputs share nothing.",
            "Sparsity, entropy and orthogonality of the layers along the depth",
        )
    ]
    shown = min(reports, key=lambda r: (r.verdict not in DEGENERATE, r.quality.variance_entropy))
    among = " among the degenerate ones" if shown.verdict in DEGENERATE else ""
    found.append(
        Picture(
            "filters-of-a-layer",
            plots.filter_sheet(shown.layer.weight, most=20),
            f"Kernels of {shown.layer.name} ({shown.verdict}), the layer of least diversity{among}: outputs along x, "
            "inputs along y, red positive, blue negative, white near zero.",
            f"Kernels of layer {shown.layer.name}",
        )
    )
    size = Counter(tuple(r.layer.weight.shape[2:]) for r in reports).most_common(1)[0][0]
    groups = _thirds([r for r in reports if tuple(r.layer.weight.shape[2:]) == size])
    if len(groups) > 1:
        # The same law on both sides gives a shift of its own that falls with the number of filters.
        compared = study(groups, keep_zeros=False, warn=False)
        found.append(
            Picture(
                "filters-shift",
                plots.ridge(compared),
                f"Distribution of the {size[0]} × {size[1]} kernels in common coordinates, by depth: a column a "
                "principal component, with its share of the variance. Rows of the same shape mean that depth does not "
                "matter; a spike at zero means kernels that do not use the component.",
                "Densities of the kernels' principal coefficients by depth",
            )
        )
    return found


def _thirds(reports: Sequence[LayerReport]) -> dict[str, list[Any]]:
    """Filters of the first, middle and last third of the depth, of layers that hold any."""
    groups: dict[str, list[Any]] = {}
    for name, low, high in (("first third", -1.0, 1 / 3), ("middle", 1 / 3, 2 / 3), ("last third", 2 / 3, 1.0)):
        within = [r.layer.filters for r in reports if low < r.layer.depth_norm <= high and r.layer.weight.any()]
        if within:
            groups[name] = within
    return groups


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
