"""What two networks represent, compared layer by layer: CKA, RSA, distribution tests, and how stable they are.

A. Shah and V. Tripathi, "Purrturbed but Stable: Human-Cat Invariant Representations Across CNNs, ViTs and
Self-Supervised ViTs", arXiv 2511.02404. Frozen encoders are shown paired stimuli; similarities of stimuli within one
network are compared with those in the other, which needs no alignment of units:

    CKA = HSIC(K, L) / √(HSIC(K, K) · HSIC(L, L)),    K_ij = k(x_i, x_j), L_ij = k(y_i, y_j)

Cost: for L₁ and L₂ layers, batches of n stimuli and p features, (L₁ + L₂) n² p for the similarities, made once, and one
product (L₁ × n²)(n² × L₂) for the whole table; memory (L₁ + L₂) n², whatever the number of stimuli.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchconv._common import check, check_choice, require
from torchconv.analysis._cka_canonical import procrustes_distance, pwcca_distance, svcca_distance
from torchconv.analysis._cka_features import Reduction, blocks, chosen, features, place, recording
from torchconv.analysis._cka_kernels import (
    ESTIMATORS,
    KERNELS,
    MinibatchCKA,
    angular_distance,
    centre,
    cka,
    gram,
    hsic,
    ratio,
    rbf_bandwidth,
)
from torchconv.analysis._cka_protocol import PairedReport, compare_folders, compare_images, perturbation
from torchconv.analysis._cka_resample import MEASURES, Interval, Stability, compare_features, interval, stability
from torchconv.analysis._cka_samples import (
    energy_distance,
    energy_per_feature,
    mmd2,
    pooled_bandwidth,
    sliced_wasserstein1,
    two_sample_test,
    wasserstein1,
)
from torchconv.analysis.section import Picture, Section
from torchconv.catalog.parts import part

__all__ = [
    "MEASURES",
    "Interval",
    "MinibatchCKA",
    "PairedReport",
    "Reduction",
    "SimilarityTable",
    "Stability",
    "angular_distance",
    "blocks",
    "cka",
    "compare_features",
    "compare_folders",
    "compare_images",
    "compare_layers",
    "energy_distance",
    "energy_per_feature",
    "features",
    "gram",
    "hsic",
    "interval",
    "mmd2",
    "perturbation",
    "pooled_bandwidth",
    "procrustes_distance",
    "pwcca_distance",
    "rbf_bandwidth",
    "section",
    "sliced_wasserstein1",
    "stability",
    "svcca_distance",
    "two_sample_test",
    "wasserstein1",
]

HIGH, LOW = 0.8, 0.3


@dataclass(frozen=True)
class SimilarityTable:
    """Similarity of every layer of one network with every layer of another.

    Attributes:
        rows, columns: names of the layers of the two networks.
        values: (rows, columns), float64, NaN for layers without variance.
        images: stimuli that entered, ``left_over``: those of the last, smaller batch, which did not.
        settings: kernel, estimator, batch size, how features were reduced.
    """

    rows: list[str]
    columns: list[str]
    values: Tensor
    images: int
    left_over: int
    settings: dict[str, Any]

    def best(self) -> list[tuple[str, str, float]]:
        """For each row its most similar column, and how similar."""
        known = self.values.nan_to_num(nan=-2)
        return [
            (row, self.columns[int(line.argmax())], float(line.max()))
            for row, line in zip(self.rows, known, strict=True)
        ]


@part(
    "layer-similarity",
    paper="cka",
    kind="analysis",
    dims=(1, 2, 3),
    keywords="CKA heat map layers of two networks compare models representation similarity minibatch",
)
def compare_layers(
    model: nn.Module,
    against: nn.Module,
    images: Tensor,
    layers: Sequence[str] | None = None,
    against_layers: Sequence[str] | None = None,
    *,
    partners: Tensor | None = None,
    kernel: str = "linear",
    estimator: str = "unbiased",
    reduction: Reduction | None = None,
    batch_size: int = 128,
) -> SimilarityTable:
    """CKA of all layers of two networks in one pass over the images, with memory for one batch.

    HSIC is averaged over full batches before the ratio is taken, which is unbiased for the unbiased estimator. Images
    that do not fill the last batch are left out, unless there is no other.

    Args:
        model: first network; left as it was.
        against: second network, or the first one again.
        images: (N, …), normalised as both expect them.
        layers: modules of the first network; :func:`blocks` by default.
        against_layers: of the second one; the same names when it is the same network, else its blocks.
        partners: other images of the same things for the second network; ``images`` by default.
        kernel: "linear" or "rbf" (median bandwidth of each batch).
        estimator: "unbiased" or "biased".
        reduction: of maps and tokens to rows; the mean over positions by default. "samples" is refused for layers of
            different sizes.
        batch_size: stimuli at once, at least 4; more make the estimate better.

    Returns:
        The table, with the settings it was made with.

    Raises:
        ValueError: unknown layers, fewer than four images, layers with different counts of rows.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        >>> table = compare_layers(net, net, torch.randn(16, 3, 9, 9))
        >>> table.rows, table.values.diagonal().round(decimals=6).tolist()
        (['0', '2'], [1.0, 1.0])
    """
    check_choice("kernel", kernel, KERNELS)
    check_choice("estimator", estimator, ESTIMATORS)
    check(batch_size >= 4, "batch_size", batch_size, "HSIC needs at least 4 stimuli a batch")
    check(len(images) >= 4, "images", len(images), "at least four images are needed")
    if partners is not None:
        check(len(partners) == len(images), "partners", len(partners), f"must be paired with the {len(images)} images")
    reduction = reduction or Reduction()
    size = min(batch_size, len(images))
    used = len(images) // size * size
    names = chosen(model, layers)
    others = chosen(against, names if against_layers is None and against is model else against_layers)
    table = _Table(kernel, estimator)
    for start in range(0, used, size):
        here = images[start : start + size]
        there = here if partners is None else partners[start : start + size]
        first = _centred(model, here, names, reduction, kernel, estimator)
        same = against is model and others == names and partners is None
        second = first if same else _centred(against, there, others, reduction, kernel, estimator)
        table.add(first, second)
    settings = {"kernel": kernel, "estimator": estimator, "batch_size": size, "reduction": asdict(reduction)}
    return SimilarityTable(table.rows, table.columns, table.values(), used, len(images) - used, settings)


class _Table:
    """Sums of HSIC over batches: of all pairs of layers, and of each layer with itself."""

    def __init__(self, kernel: str, estimator: str) -> None:
        self.rows: list[str] = []
        self.columns: list[str] = []
        self.sums: tuple[Tensor, Tensor, Tensor] | None = None

    def add(self, first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
        names = (list(first), list(second))
        check(self.sums is None or names == (self.rows, self.columns), "layers", names, "ran differently in a batch")
        self.rows, self.columns = names
        sizes = {len(v) for side in (first, second) for v in side.values()}
        check(len(sizes) == 1, "reduction", "samples", "layers have different counts of positions; reduce otherwise")
        a, b = (torch.stack([v.flatten() for v in side.values()]) for side in (first, second))
        found = (a @ b.T, a.square().sum(1), b.square().sum(1))
        self.sums = found if self.sums is None else tuple(s + f for s, f in zip(self.sums, found, strict=True))  # type: ignore[assignment]

    def values(self) -> Tensor:
        assert self.sums is not None
        cross, first, second = self.sums
        return ratio(cross, first[:, None].expand_as(cross), second[None].expand_as(cross))


def _centred(
    model: nn.Module, images: Tensor, names: list[str], reduction: Reduction, kernel: str, estimator: str
) -> dict[str, Tensor]:
    """Layer → its centred similarities of one batch."""
    with recording(model, names, reduction) as found:
        model(place(model, images))
    made = {}
    for name, rows in found.items():
        rows = rows - rows.mean(0)
        if kernel == "rbf" and not bool((rows != 0).any()):
            kernel_matrix = rows.new_ones(len(rows), len(rows))  # constant features have no bandwidth
        else:
            kernel_matrix = gram(rows, kernel)
        made[name] = centre(kernel_matrix, estimator)
    check(bool(made), "layers", names, "none of them ran")
    return made


def section(model: nn.Module, against: nn.Module, images: Tensor) -> Section:
    """Where two networks represent the same, as a section of an inspection.

    Args:
        model: first network.
        against: second network.
        images: (N, C, H, W), normalised as both expect them; a hundred or more make a good estimate.

    Returns:
        Heat map of CKA of all layers, the most similar layer of each.
    """
    check(len(images) >= 8, "images", len(images), "give at least 8 images to compare networks")
    series = images.dim() == 3 and any(isinstance(m, nn.Conv1d) for m in model.modules())
    table = compare_layers(model, against, images, reduction=Reduction(layout="first" if series else "auto"))
    best = [(a, b, v) for a, b, v in table.best() if v >= -1]
    check(bool(best), "images", tuple(images.shape), "no layer varies over these images")
    pairs = [{"layer": a, "most similar layer of the other": b, "CKA": round(v, 4)} for a, b, v in best]
    top = max(best, key=lambda found: found[2])
    mean = sum(v for _, _, v in best) / len(best)
    last = float(table.values[-1, -1])
    word = "much alike" if mean >= HIGH else "hardly alike" if mean < LOW else "partly alike"
    few = f" Only {table.images} images: take the numbers as rough." if table.images < 64 else ""
    return Section(
        key="similarity",
        title="Against the other network",
        verdict=f"The layers of the two networks are {word}: mean CKA {mean:.2f} with the best partner, most at "
        f"{top[0]} ({top[2]:.2f}), {last:.2f} between the last layers.{few}",
        reading="Bright cells are pairs of layers that order images alike (unbiased linear CKA, features averaged over "
        "positions; 1: equal up to a rotation and a scale, 0: unrelated). A bright diagonal means the same computation "
        "at the same depth; a bright square in one network's corner means layers that change little and could be "
        "removed; a dark last row, that the networks decide differently (arXiv 1905.00414, 2511.02404).",
        level="note",
        tables={"most-similar": pairs},
        pictures=[_picture(table)],
        data={
            "rows": table.rows,
            "columns": table.columns,
            "cka": table.values,
            "images": table.images,
            "left_out": table.left_over,
            "settings": table.settings,
        },
    )


def _picture(table: SimilarityTable) -> Picture:
    require("matplotlib", "compare")
    from matplotlib.figure import Figure

    height, width = table.values.shape
    figure = Figure(figsize=(2.6 + min(6.0, 0.22 * width), 1.8 + min(6.0, 0.22 * height)), layout="constrained")
    axes: Any = figure.subplots()
    image = axes.imshow(table.values.cpu().numpy(), cmap="magma", vmin=0, vmax=1, origin="lower")
    for axis, names in ((axes.xaxis, table.columns), (axes.yaxis, table.rows)):
        step = -(-len(names) // 28)
        axis.set_ticks(range(0, len(names), step), labels=names[::step], fontsize=7)
    axes.tick_params(axis="x", rotation=90)
    axes.set(xlabel="layers of the other network", ylabel="layers of this network")
    figure.colorbar(image, ax=axes, label="CKA, linear, unbiased")
    return Picture(
        "layer-by-layer",
        figure,
        "Each row is a layer of this network, each column one of the other, inputs at the lower left.",
        "Heat map of the similarity of every layer of one network with every layer of the other",
    )
