"""The section of ``torchconv inspect`` on filter design: the first filters beside designed ones, and their number."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import torch
from torch import Generator, Tensor, nn

from torchconv._common import check, require
from torchconv.analysis._filters_layers import has_taps
from torchconv.analysis._filters_learned import unit
from torchconv.analysis._filters_random import dct_bank, gabor_bank
from torchconv.analysis._filters_size import PRESETS, Advice, _correlation_length, advise, components, filter_report
from torchconv.analysis.section import Picture, Section

DRAWS, CHANCE = 1000, 0.95
SHOWN = 24
READING = (
    "Networks trained on images tend to find oriented, localised filters in their first layer, as designed ones are. "
    "Each filter's main spatial pattern (the first singular vector over its input channels) is compared with all "
    "discrete cosines and with Gabor functions of its size; likeness is |cosine|, and counts where 95 of 100 random "
    "filters have less. Few likenesses in a trained network mean that it trained briefly or on little data, or that "
    "its first layer is not the one that sees patterns. Near copies and dead filters are room to save. Size and number "
    "for the images: the window in which values correlate by more than a half, and as many filters as principal "
    "components that hold 95 % of the variance in it; no theory fixes them (filter design, arXiv 2410.21644)."
)


def section(model: nn.Module, images: Tensor | None = None) -> Section:
    """What the first filters look like, which of them could go, and how many of which size the images ask for.

    Args:
        model: has a convolution of more than one tap.
        images: (N, C, *spatial) to choose size and number by; none, or noise, leaves that out.

    Raises:
        ValueError: no convolution of more than one tap.
    """
    found = [(n, m) for n, m in model.named_modules() if has_taps(m)]
    check(bool(found), "model", type(model).__name__, "has no convolution of more than one tap")
    name, layer = found[0]
    any_layer: Any = layer
    weight: Tensor = any_layer.weight.detach().double().cpu()
    kernel = tuple(weight.shape[2:])
    designed, labels = _designed(kernel)
    patterns, share = _patterns(weight)
    likeness, nearest = (patterns @ designed.T).abs().max(1)
    chance = _chance(weight.shape, designed)
    norms = weight.flatten(1).norm(dim=1)
    dead = norms <= 1e-3 * norms.max()
    like = (likeness > chance) & ~dead
    report: dict[str, Any] = (
        filter_report(weight[~dead]) if bool((~dead).any()) else {"effective_rank": 0.0, "duplicates": []}
    )
    copies = len({b for _, b in report["duplicates"]})
    advice, enough = _advice(images, max(kernel))
    rows = [
        {
            "filter": i,
            "nearest": labels[int(nearest[i])],
            "likeness": float(likeness[i]),
            "beyond chance": bool(like[i]),
            "share of the main pattern": float(share[i]),
            "norm": float(norms[i]),
        }
        for i in range(len(weight))
    ]
    count, idle = len(weight), copies + int(dead.sum())
    size = " × ".join(map(str, kernel))
    verdict = (
        f"{int(like.sum())} of the {count} first filters ({name}, {size}) resemble a designed one beyond chance "
        f"({(1 - CHANCE) * count:.0f} would); {copies} are near copies, {int(dead.sum())} dead"
    )
    if advice is not None:
        verdict += f"; {enough} of this size would hold 95 % of these images' variance"
    tables: dict[str, Any] = {
        "filters": rows,
        "what others chose": [{"network": n, "filters": f} for n, f in PRESETS.items()],
    }
    if advice is not None:
        tables["sizes"] = advice.table
    return Section(
        key="filter-design",
        title="First filters",
        verdict=f"{verdict}.",
        reading=" ".join([READING, *(f"{r[0].upper()}{r[1:]}." for r in (advice.reasons if advice else ()))]),
        level="bad" if idle > count / 4 else "good" if int(like.sum()) > count / 2 and idle <= count / 20 else "note",
        tables=tables,
        pictures=_pictures(patterns, designed[nearest], likeness, chance, kernel, advice, count),
        data={
            "layer": name,
            "kernel": list(kernel),
            "filters": count,
            "beyond_chance": int(like.sum()),
            "chance": chance,
            "near_copies": copies,
            "dead": int(dead.sum()),
            "effective_rank": report["effective_rank"],
            "enough": enough or None,
            "advice": None if advice is None else {"kernel_size": advice.kernel_size, "filters": advice.filters},
        },
    )


def _designed(kernel: tuple[int, ...]) -> tuple[Tensor, list[str]]:
    """Discrete cosines and, on one or two axes, Gabor functions: rows of unit norm and what they are."""
    cosines = dct_bank(kernel, dtype=torch.float64).flatten(1)
    labels = [f"cosine {','.join(map(str, f))}" for f in product(*(range(k) for k in kernel))]
    if len(kernel) > 2 or max(kernel) < 3:
        return cosines, labels
    side = max(kernel)
    wavelengths = [max(2.0, side * f) for f in (0.4, 0.6, 0.9, 1.3)]
    phases, turns = (0.0, math.pi / 2), 8 if len(kernel) == 2 else 1
    sizes = kernel if len(kernel) == 2 else (1, *kernel)
    gabors = gabor_bank(sizes, turns, wavelengths, phases, zero_mean=True, unit_norm=True, dtype=torch.float64)
    for wavelength, phase, j in product(wavelengths, phases, range(turns)):
        kind = "even" if phase == 0 else "odd"
        labels.append(f"Gabor {kind}, wavelength {wavelength:.1f}, {180 * j / turns:.0f}°")
    return torch.cat([cosines, gabors.flatten(1)]), labels


def _patterns(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The main spatial pattern of each filter, of unit norm, and its share of the filter's energy."""
    _, values, vectors = torch.linalg.svd(weight.flatten(2), full_matrices=False)
    energy = values.square()
    return unit(vectors[:, 0]), energy[:, 0] / energy.sum(1).clamp_min(1e-300)


def _chance(shape: torch.Size, designed: Tensor) -> float:
    """The likeness that so many random filters of this shape stay below."""
    noise = torch.empty(DRAWS, *shape[1:], dtype=torch.float64).normal_(generator=Generator().manual_seed(0))
    return float((_patterns(noise)[0] @ designed.T).abs().amax(1).quantile(CHANCE))


def _advice(images: Tensor | None, side: int) -> tuple[Advice | None, int]:
    """Advice from images whose neighbouring values go together, not noise, and the filters enough for one side."""
    if images is None or len(images) < 2:
        return None, 0
    few = images[:256].detach().float().cpu()
    if float(few.std()) == 0 or _correlation_length(few, 0.2) == 0:
        return None, 0
    return advise(few), components(few, min(side, *few.shape[2:]))[0]


def _pictures(
    patterns: Tensor,
    nearest: Tensor,
    likeness: Tensor,
    chance: float,
    kernel: tuple[int, ...],
    advice: Advice | None,
    count: int,
) -> list[Picture]:
    require("matplotlib", "compare")
    from matplotlib.figure import Figure

    found = []
    if len(kernel) <= 2:
        best = likeness.argsort(descending=True)[:SHOWN].tolist()
        figure = Figure(figsize=(max(2.5, 0.42 * len(best)), 1.3), layout="constrained")
        panels: Any = figure.subplots(2, len(best), squeeze=False)
        for column, index in enumerate(best):
            sign = 1 if float(patterns[index] @ nearest[index]) >= 0 else -1
            for row, values in enumerate((patterns[index], sign * nearest[index])):
                axes = panels[row][column]
                reach = float(values.abs().max())
                axes.imshow(values.reshape(-1, kernel[-1]).numpy(), cmap="seismic", vmin=-reach, vmax=reach)
                axes.set(xticks=[], yticks=[])
            panels[0][column].set_title(f"{float(likeness[index]):.2f}", fontsize=6)
        found.append(
            Picture(
                "first-filters",
                figure,
                "Above the main pattern of a filter, below the designed one most like it, with |cosine|; random ones "
                f"reach {chance:.2f}. The likest come first; red positive, blue negative.",
                "Filters of the first layer above the designed filters that they resemble",
            )
        )
    if advice is not None:
        figure = Figure(figsize=(4.2, 2.8), layout="constrained")
        axes = figure.subplots()
        sizes = [row["kernel"] for row in advice.table]
        axes.plot(sizes, [row["filters"] for row in advice.table], "o-", label="95 % of the variance")
        axes.plot(sizes, [row["components"] for row in advice.table], ":", color="0.5", label="all components")
        axes.plot([max(kernel)], [count], "x", color="#e65100", label="this network")
        axes.set(xlabel="side of the filters", ylabel="filters", yscale="log")
        axes.legend(fontsize=7)
        found.append(
            Picture(
                "number-of-filters",
                figure,
                "How many principal components of the images' windows hold 95 % of their variance, by the side. A "
                "cross far above the line has filters to spare (a ReLU sees one sign: up to twice the line is of use).",
                "Filters needed for the images against the filters' side, and what the network has",
            )
        )
    return found
