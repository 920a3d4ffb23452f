"""How good a frozen network's features are: linear SVMs on them, few-shot curves, retrieval with spatial search.

A. Sharif Razavian, H. Azizpour, J. Sullivan and S. Carlsson, "CNN Features off-the-shelf: an Astounding Baseline for
Recognition", CVPR Workshops 2014, arXiv 1403.6382. A network trained once for classification is frozen; activations of
one late layer, normalised, serve tasks that it was never trained for:

    f = φ(x) / ‖φ(x)‖,    min_w ½‖w‖² + C Σᵢ max(0, 1 − yᵢ wᵀfᵢ),    retrieval by ‖f(q) − f(r)‖

Cost: one forward pass an image (16 with augmentation, 5, 14 or 30 with two, three or four levels of patches), seconds
for the SVMs. No parameter of the network is trained.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, require
from torchconv.analysis._cka_resample import Interval
from torchconv.analysis._offtheshelf_features import extract, signed_power, unit
from torchconv.analysis._offtheshelf_metrics import (
    area_under_roc,
    average_precision,
    bootstrap,
    group_score,
    mean_class_accuracy,
    ranking_precision,
)
from torchconv.analysis._offtheshelf_recognition import Recognition, Shots, few_shot, recognise
from torchconv.analysis._offtheshelf_retrieval import Postprocess, Retrieval, spatial_search
from torchconv.analysis._offtheshelf_svm import LinearSVM, choose_C, fit_svm, scaled_C
from torchconv.analysis._offtheshelf_views import (
    View,
    crop_boxes,
    patch_boxes,
    patches,
    rotate,
    sixteen_views,
    square_box,
)
from torchconv.analysis.section import Picture, Section

__all__ = [
    "Interval",
    "LinearSVM",
    "Postprocess",
    "Recognition",
    "Retrieval",
    "Shots",
    "View",
    "area_under_roc",
    "average_precision",
    "bootstrap",
    "choose_C",
    "crop_boxes",
    "extract",
    "few_shot",
    "fit_svm",
    "group_score",
    "mean_class_accuracy",
    "patch_boxes",
    "patches",
    "random_weights",
    "ranking_precision",
    "recognise",
    "rotate",
    "scaled_C",
    "section",
    "signed_power",
    "sixteen_views",
    "spatial_search",
    "square_box",
    "unit",
]


def random_weights(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy with fresh weights, in eval mode: what the architecture alone is worth.

    Layers start as their ``reset_parameters`` says, convolutions and linear layers with He's deviations and no bias;
    parameters that belong to neither keep their values.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> bool((random_weights(net)[0].weight == net[0].weight).any())
        False
    """
    fresh = copy.deepcopy(model).eval()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for module in fresh.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    return fresh


# -- a section of the inspection ---------------------------------------------------------------------------------------

TRAINED, UNTRAINED, PIXELS = "this network", "the same with random weights", "pixels"


def section(model: nn.Module, images: Tensor, labels: Tensor, *, draws: int = 10, seed: int = 0) -> Section:
    """How well the frozen features transfer to the classes of some images, as a section of an inspection.

    Half of each class is drawn for training, the rest for testing. The same network with random weights and the pixels
    themselves say what the training of the network is worth.

    Args:
        model: the network.
        images: (N, C, H, W), normalised as it expects them.
        labels: (N,) their classes.
        draws: training sets of each size for the few-shot curve.
        seed: of all draws.

    Returns:
        Accuracy with its interval, the few-shot curve.

    Raises:
        ValueError: fewer than two classes with four images each.
    """
    check(
        labels.shape == (len(images),), "labels", tuple(labels.shape), f"must be one for each of {len(images)} images"
    )
    classes, counts = labels.unique(return_counts=True)
    usable = classes[counts >= 4]
    check(len(usable) > 1, "labels", counts.tolist(), "give at least two classes with four images each")
    kept = torch.isin(labels, usable)
    images, labels = images[kept.to(images.device)], labels[kept].cpu()
    train, test = _halves(labels, seed)
    kinds = {
        TRAINED: extract(model, images),
        UNTRAINED: extract(random_weights(model, seed), images),
        PIXELS: _thumbnails(images),
    }
    scores, curves = {}, {}
    for name, x in kinds.items():
        x = x.cpu()
        C, sets = scaled_C(unit(x[train])), (x[train], labels[train], x[test], labels[test])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Liblinear")  # the last digits of a machine do not change a share
            scores[name] = recognise(*sets, C=C, seed=seed).score
            curves[name] = few_shot(*sets, C=C, draws=draws, scheme="one-vs-all", seed=seed)
    own, others = scores[TRAINED], [scores[UNTRAINED], scores[PIXELS]]
    bar = max(others, key=lambda found: found.value)
    level = "good" if own.low > bar.high else "bad" if own.value <= bar.value else "note"
    return Section(
        key="transfer",
        title="Off-the-shelf features",
        verdict=f"A linear SVM on the frozen features tells the {len(usable)} classes apart with {own.value:.1%} "
        f"accuracy [{own.low:.1%}, {own.high:.1%}]; with random weights {others[0].value:.1%}, with pixels "
        f"{others[1].value:.1%} ({len(train)} training, {len(test)} test images).",
        reading="What the classifier would get is read, normalised, and given to linear SVMs (C: one over the variance "
        "of the features); the network is not trained further. The distance to the same network with random weights is "
        "what its training is worth for these classes; pixels say how hard they are. A curve that is high on its left "
        "needs few labels. Images that the network was trained on flatter it (arXiv 1403.6382).",
        level=level,
        tables={
            "accuracy": [
                {"features": n, "accuracy": s.value, "low": s.low, "high": s.high, "numbers": kinds[n].shape[1]}
                for n, s in scores.items()
            ],
            "few-shot": [
                {"features": n, "images of a class": s.shots, "accuracy": s.score.value, "low": s.score.low,
                 "high": s.score.high}
                for n, curve in curves.items()
                for s in curve
            ],
        },
        pictures=[_curves(curves, len(usable))],
        data={"classes": len(usable), "train": len(train), "test": len(test), "draws": draws, "seed": seed},
    )  # fmt: skip


def _halves(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of half of each class, and of the rest."""
    generator = torch.Generator().manual_seed(seed)
    train, test = [], []
    for c in labels.unique():
        rows = (labels == c).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        train.append(rows[: len(rows) // 2])
        test.append(rows[len(rows) // 2 :])
    return torch.cat(train), torch.cat(test)


def _thumbnails(images: Tensor) -> Tensor:
    """Pixels of pictures no larger than 32 × 32, one row an image."""
    if images.dim() == 4:
        images = F.adaptive_avg_pool2d(images, (min(images.shape[2], 32), min(images.shape[3], 32)))
    return images.flatten(1).float()


def _curves(curves: dict[str, list[Shots]], classes: int) -> Picture:
    require("matplotlib", "compare")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    axes: Any = figure.subplots()
    for (name, curve), mark in zip(curves.items(), "osD", strict=True):
        x = [s.shots for s in curve]
        (line,) = axes.plot(x, [100 * s.score.value for s in curve], marker=mark, label=name)
        bounds = ([100 * getattr(s.score, side) for s in curve] for side in ("low", "high"))
        axes.fill_between(x, *bounds, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.axhline(100 / classes, color="grey", linestyle=":", label="chance")
    axes.set_xscale("log")
    ticks = [s.shots for s in next(iter(curves.values()))]
    axes.set_xticks(ticks, labels=map(str, ticks))
    axes.minorticks_off()
    axes.set(xlabel="training images of each class", ylabel="accuracy, %")
    axes.legend(frameon=False, fontsize=8)
    return Picture(
        "few-shot",
        figure,
        "Accuracy of linear SVMs on frozen features against the number of labelled images; bands are 95 % intervals "
        "over draws of these.",
        "Curves of accuracy over the number of training images for this network, random weights and pixels",
    )
