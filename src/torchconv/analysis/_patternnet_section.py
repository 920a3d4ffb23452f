"""Patterns as a section of an inspection: mined on a part of the images, tested on the others, drawn on pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from torchconv._common import check, require
from torchconv.analysis._patternnet_geometry import Geometry, aligned, receptive_field
from torchconv.analysis._patternnet_head import PatternNetHead, fit_head
from torchconv.analysis._patternnet_maps import FeatureMaps
from torchconv.analysis._patternnet_mining import (
    Mining,
    Pattern,
    bag_of_patterns,
    classify_by_patterns,
    largest_responses,
    mine_patterns,
)
from torchconv.analysis.erf import erf
from torchconv.analysis.receptive import squares
from torchconv.analysis.section import Picture, Section

FEWEST = 10
"""Images that a class must have."""
QUANTILES = (0.8, 0.9, 0.95, 0.98)
ROWS, COLUMNS = 10, 6


@dataclass(frozen=True)
class Study:
    """Patterns of a network and what they know of images that took no part in mining.

    Attributes:
        maps: of the held-out images.
        geometry: of the boxes: centres by arithmetic, sides by measurement.
        head: fitted to the mining images.
        mining: the patterns.
        quantile: chosen on the mining images.
        classes: labels of the patterns' classes.
        accuracy: on the held-out images: "patterns", "head", "chance".
        rest: rows of the held-out images.
    """

    maps: FeatureMaps
    geometry: Geometry
    head: PatternNetHead
    mining: Mining
    quantile: float
    classes: list[int]
    accuracy: dict[str, float]
    rest: Tensor


def study_patterns(model: nn.Module, images: Tensor, labels: Tensor, *, layer: str | None = None) -> Study:
    """Mine patterns of a trained network on 70 % of the images and classify the others by them.

    The threshold of the filters is the quantile, of four, at which the classes' best patterns have the largest mean
    support × confidence on the mining images.

    Args:
        model: left as it was.
        images: (N, C, H, W), normalised as it expects them.
        labels: (N,), at least ten images of each of two classes; smaller classes are left out.
        layer: whose maps; by default the last with more than one position.

    Raises:
        ValueError: too few images, or no pattern was found.
    """
    check(len(labels) == len(images), "labels", tuple(labels.shape), f"must be one for each of {len(images)} images")
    values, counts = labels.cpu().unique(return_counts=True)
    classes = values[counts >= FEWEST].tolist()
    remedy = f"needs at least {FEWEST} images of each of two classes"
    check(len(classes) > 1, "labels", dict(zip(values.tolist(), counts.tolist(), strict=True)), remedy)
    train, rest = _split(labels.cpu(), classes)
    seen = erf(model, images[train[:4]], layer)
    remedy = (
        "is not channels first; name a layer of a convolutional network whose channels say by themselves what is where"
    )
    check(seen.layout == "first", "layer", seen.layer, remedy)
    index = torch.full((max(classes) + 1,), -1)
    index[torch.tensor(classes)] = torch.arange(len(classes))
    y, test_y = index[labels.cpu()[train]], index[labels.cpu()[rest]]
    maps, test_maps = (FeatureMaps(model, images[rows], seen.layer) for rows in (train, rest))
    responses = largest_responses(maps)
    geometry = _geometry(model, images[:1], maps, squares(seen.map, [0.5])[0][0])
    head = fit_head(responses, y, len(classes))
    mined = {q: mine_patterns(maps, y, head, sizes=(2, 3), quantile=q, geometry=geometry) for q in QUANTILES}
    quantile = max(QUANTILES, key=lambda q: _worth(mined[q], len(classes)))
    mining = mined[quantile]
    check(bool(mining.patterns), "images", tuple(images.shape), "no filters fire together in a tenth of a class")
    bags = [bag_of_patterns(m, mining) for m in (maps, test_maps)]
    with torch.no_grad():
        logits = head.fc(head.gate(largest_responses(test_maps)))
    accuracy = {
        "patterns": classify_by_patterns(bags[0], y, bags[1], test_y),
        "head": float((logits.argmax(1) == test_y).float().mean()),
        "chance": float(test_y.bincount().max()) / len(test_y),
    }
    return Study(test_maps, geometry, head, mining, quantile, classes, accuracy, rest)


def _split(labels: Tensor, classes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Rows for mining, 70 % of every class, and the others; both in random order."""
    generator = torch.Generator().manual_seed(0)
    rows = [(labels == c).nonzero().flatten() for c in classes]
    rows = [r[torch.randperm(len(r), generator=generator)] for r in rows]
    cuts = [round(0.7 * len(r)) for r in rows]
    parts = (torch.cat([r[:n] for r, n in zip(rows, cuts, strict=True)]),
             torch.cat([r[n:] for r, n in zip(rows, cuts, strict=True)]))  # fmt: skip
    first, second = (p[torch.randperm(len(p), generator=generator)] for p in parts)
    return first, second


def _worth(mining: Mining, classes: int) -> float:
    """Support × confidence of the classes' best patterns, mean over the classes."""
    best = [mining.of(c)[:1] for c in range(classes)]
    return sum(p[0].support * p[0].confidence for p in best if p) / classes


def _geometry(model: nn.Module, image: Tensor, maps: FeatureMaps, side: int | None) -> Geometry:
    size = next(iter(maps)).shape[2:]
    wide = float(side or min(image.shape[2:]) / 2)
    try:
        return replace(receptive_field(model, image, maps.layer), receptive_field=wide)
    except ValueError:  # attention, reshaping: the map is taken to lie evenly over the image
        return aligned(image.shape[2:], size, wide)


def section(model: nn.Module, images: Tensor, labels: Tensor, names: Sequence[str] = ()) -> Section:
    """The patterns of a network, drawn on its images.

    Args:
        model: a classifier, or any network with a map of features.
        images: (N, C, H, W), normalised as it expects them.
        labels: (N,), at least ten images of each of two classes.
        names: of the classes.
    """
    check(images.dim() == 4, "images", tuple(images.shape), "patterns are drawn on pictures (N, C, H, W)")
    found = study_patterns(model, images, labels)
    mining, accuracy = found.mining, found.accuracy
    called = {i: names[c] if c < len(names) else str(c) for i, c in enumerate(found.classes)}
    best = max(mining.patterns, key=lambda p: p.support * p.confidence)
    rows = [_row(p, called) for p in mining.patterns]
    tests = [{"classified by": n, "held-out accuracy": v} for n, v in accuracy.items()]
    return Section(
        key="patterns",
        title="Parts that tell the classes apart",
        verdict=f"{len(rows)} patterns in {len({p.label for p in mining.patterns})} of {len(called)} classes. The "
        f"best, of class {called[best.label]}, is in {100 * best.support:.0f} % of its images with confidence "
        f"{best.confidence:.2f}; patterns alone classify {100 * accuracy['patterns']:.0f} % of held-out images rightly "
        f"(largest class: {100 * accuracy['chance']:.0f} %).",
        reading="A pattern is two or three filters of the last maps that fire at one place. Support is the share of "
        "its class's images that show it, confidence the class's share of all support, both on the 70 % of the images "
        "used for mining. Good patterns sit on the object; boxes on the background, or on a watermark, say that the "
        "network decides by something else. Accuracy near that of the largest class says that the last maps hold no "
        "parts of these classes (PatternNet, arXiv 1703.06339).",
        level="bad" if accuracy["patterns"] <= 1.2 * accuracy["chance"] else "note",
        tables={"accuracy": tests, "patterns": rows},
        pictures=[_picture(found, images, labels, called)],
        data={
            "layer": found.maps.layer,
            "quantile": found.quantile,
            "stride": found.geometry.stride,
            "box": found.geometry.receptive_field,
            "held_out": len(found.rest),
            "accuracy": accuracy,
            "patterns": [{**row, "supports": p.supports} for row, p in zip(rows, mining.patterns, strict=True)],
        },
    )


def _row(pattern: Pattern, called: dict[int, str]) -> dict[str, Any]:
    return {
        "class": called[pattern.label],
        "filters": " ".join(map(str, pattern.filters)),
        "support": round(pattern.support, 4),
        "confidence": round(pattern.confidence, 4),
    }


def _picture(found: Study, images: Tensor, labels: Tensor, called: dict[int, str]) -> Picture:
    firsts = [found.mining.of(c)[0] for c in called if found.mining.of(c)]
    seen = Mining(firsts, found.mining.thresholds).locate(found.maps).present
    own = torch.tensor([found.classes[p.label] for p in firsts]) == labels.cpu()[found.rest][:, None]
    held = [p for p, at in zip(firsts, (seen & own).any(0).tolist(), strict=True) if at]
    shown = sorted(held, key=lambda p: -p.support * p.confidence)[:ROWS]
    side = found.geometry.receptive_field
    return Picture(
        "on-images",
        draw_patterns(found, images, labels, shown, [called[p.label] for p in shown]),
        f"A row is the best pattern of a class, on the held-out images of the class where it fires most. The box, "
        f"{side:.0f} pixels wide, is what reaches that place of {found.maps.layer or 'the map'} in effect (half of the "
        "contribution), not the theoretical receptive field, which is larger.",
        "Images with boxes around the parts at which the filters of a pattern fire",
    )


def draw_patterns(
    found: Study, images: Tensor, labels: Tensor, patterns: Sequence[Pattern], names: Sequence[str]
) -> Any:
    """A row of held-out images for every pattern, with a box where it fires most, as a matplotlib figure."""
    require("matplotlib", "compare")
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    at = Mining(list(patterns), found.mining.thresholds).locate(found.maps, found.geometry)
    truth = labels.cpu()[found.rest]
    called = [f"{n}\n" + ", ".join(map(str, p.filters)) for n, p in zip(names, patterns, strict=True)]
    margin = 0.2 + 0.07 * max(len(line) for text in called for line in text.split("\n"))  # inches, for 8 points
    height, width = images.shape[2:]
    step_x, step_y = 1.06 * width, 1.06 * height
    figure = Figure(figsize=(margin + 1.25 * COLUMNS, 1.25 * len(patterns) * height / width))
    figure.subplots_adjust(margin / (margin + 1.25 * COLUMNS), 0, 1, 1)
    axes: Any = figure.subplots()
    for i, pattern in enumerate(patterns):
        own = at.score[:, i] * (truth == found.classes[pattern.label])
        order = own.sort(descending=True, stable=True).indices[:COLUMNS].tolist()
        for column, row in enumerate(r for r in order if own[r] > 0):
            left, top = column * step_x, i * step_y
            picture = _shown(images[found.rest[row]])
            extent = (left, left + width, top + height, top)
            axes.imshow(picture, cmap="gray", vmin=0, vmax=1, extent=extent)
            low = (at.box[row, i, :2] - 0.5).clamp_min(-0.5)
            high = torch.minimum(at.box[row, i, 2:] + 0.5, torch.tensor([width - 0.5, height - 0.5]))
            x, y = (low + 0.5).tolist()
            axes.add_patch(Rectangle((left + x, top + y), *(high - low).tolist(), fill=False, lw=2, ec="#00e5ff"))
    axes.set_yticks([(i + 0.5) * step_y for i in range(len(patterns))], called, fontsize=8)
    axes.set(xticks=[], xlim=(0, COLUMNS * step_x), ylim=(len(patterns) * step_y, 0))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def _shown(image: Tensor) -> Any:
    """A normalised image as grey or RGB in 0..1: from its 1st to its 99th percentile."""
    x = image.detach().float().cpu()
    x = x if len(x) == 3 else x[:1]
    low, high = x.flatten()[:: -(-x.numel() // 1_000_000)].quantile(torch.tensor([0.01, 0.99])).tolist()
    x = ((x - low) / max(high - low, 1e-12)).clamp(0, 1)
    return x.permute(1, 2, 0).numpy() if len(x) == 3 else x[0].numpy()
