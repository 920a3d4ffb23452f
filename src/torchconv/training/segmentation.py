"""Segmentation: confusion matrix, scores, boundary F1, class weights and SegNet's weighted loss.

As SegNet (Badrinarayanan et al. 2015, arXiv 1511.00561, section 4) and DeepLab (Chen et al. 2016, arXiv 1606.00915)
report them. They differ in the classes that do not occur: SegNet's averages count them as 0, DeepLab's leave them out.
Maps hold class numbers; labels outside 0 … C − 1 are pixels without a label, which count nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchconv._common import check, check_choice, check_positive, require
from torchconv.catalog import part

LARGEST_LOSS = -math.log(torch.finfo(torch.float32).tiny)  # of a pixel: Caffe keeps probabilities above this number


def _valid(labels: Tensor, num_classes: int, ignore_label: int | None) -> Tensor:
    """Pixels with a label."""
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    check(whole, "labels.dtype", labels.dtype, "give class numbers as integers")
    valid = (labels >= 0) & (labels < num_classes)
    return valid if ignore_label is None else valid & (labels != ignore_label)


class ConfusionMatrix:
    """Pixels by true class (rows) and predicted class (columns), added up over batches.

    Args:
        num_classes: C.
        ignore_label: label of pixels that do not count; those outside 0 … C − 1 never do.

    Attributes:
        matrix: (C, C) of int64, on the device of the last update.

    Raises:
        ValueError: maps of different shapes, a prediction outside 0 … C − 1 at a pixel with a label.

    Example:
        >>> confusion = ConfusionMatrix(2, ignore_label=255)
        >>> confusion.update(torch.tensor([[0, 1, 1]]), torch.tensor([[0, 0, 255]]))
        >>> confusion.matrix
        tensor([[1, 1],
                [0, 0]])
    """

    def __init__(self, num_classes: int, ignore_label: int | None = None) -> None:
        check_positive("num_classes", num_classes)
        self.num_classes, self.ignore_label = num_classes, ignore_label
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.matrix = torch.zeros(self.num_classes, self.num_classes, dtype=torch.long)

    @torch.no_grad()
    def update(self, predicted: Tensor, target: Tensor) -> None:
        """Add maps of class numbers; the two have one shape, any."""
        if predicted.shape != target.shape:
            shapes = (
                f"{tuple(predicted.shape)}: expected that of target, {tuple(target.shape)} (logits: take argmax(1))"
            )
            raise ValueError(f"predicted of shape {shapes}")
        _valid(predicted, self.num_classes, None)
        valid = _valid(target, self.num_classes, self.ignore_label)
        rows, columns = target[valid].long(), predicted[valid].long()
        if columns.numel():
            low, high = (int(edge) for edge in columns.aminmax())
            known = low >= 0 and high < self.num_classes
            check(known, "predicted", (low, high), f"classes are 0 to {self.num_classes - 1}")
        counts = torch.bincount(rows * self.num_classes + columns, minlength=self.num_classes**2)
        self.matrix = self.matrix.to(counts.device) + counts.reshape(self.matrix.shape)

    def scores(self, absent: str = "skip") -> SegmentationScores:
        """See :func:`segmentation_scores`."""
        return segmentation_scores(self.matrix, absent)


@dataclass(frozen=True)
class SegmentationScores:
    """What a confusion matrix says; see :func:`segmentation_scores`."""

    global_accuracy: float
    mean_accuracy: float
    mean_iou: float
    frequency_weighted_iou: float
    class_accuracy: Tensor
    class_iou: Tensor


@part(
    "segmentation-scores",
    paper="segnet",
    kind="analysis",
    keywords="mIoU mean intersection over union class average global accuracy frequency weighted confusion matrix",
)
def segmentation_scores(matrix: Tensor, absent: str = "skip") -> SegmentationScores:
    """Accuracies and overlaps of a confusion matrix.

    Args:
        matrix: (C, C), true classes in rows.
        absent: classes that no label shows are left out of the means ("skip": DeepLab and most benchmarks) or count as
            0 ("zero": SegNet).

    Returns:
        Share of pixels that are right; means over classes of the share of a class that is right ("class average" in
        SegNet) and of intersection over union; intersection over union weighted by the classes' share of the labels;
        and for each class, in float64, accuracy (NaN: absent) and intersection over union (NaN: absent and never
        predicted). Without pixels all are NaN.

    Raises:
        ValueError: the matrix is not square, or an unknown way.

    Example:
        >>> scores = segmentation_scores(torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]]))
        >>> scores.global_accuracy, scores.mean_accuracy, scores.mean_iou
        (0.875, 0.875, 0.775)
        >>> round(segmentation_scores(torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]]), "zero").mean_iou, 4)
        0.5167

    Reference: arXiv 1511.00561, section 4.1; arXiv 1606.00915, section 4.
    """
    check_choice("absent", absent, ("skip", "zero"))
    square = matrix.dim() == 2 and matrix.shape[0] == matrix.shape[1] > 0
    check(square, "matrix.shape", tuple(matrix.shape), "needs (C, C)")
    counts = matrix.detach().double().cpu()
    right, labelled = counts.diagonal(), counts.sum(1)
    accuracy = right / labelled
    overlap = right / (labelled + counts.sum(0) - right)
    present = labelled > 0
    total = labelled.sum()
    number = present.sum() if absent == "skip" or total == 0 else len(present)
    return SegmentationScores(
        global_accuracy=float(right.sum() / total),
        mean_accuracy=float(accuracy[present].sum() / number),
        mean_iou=float(overlap[present].sum() / number),
        frequency_weighted_iou=float((labelled / total * overlap)[present].sum() if total else torch.nan),
        class_accuracy=accuracy,
        class_iou=overlap,
    )


def median_frequency_weights(
    labels: Tensor | Iterable[Tensor],
    num_classes: int,
    ignore_label: int | None = None,
    count_ignored: bool = False,
) -> Tensor:
    """Weights of classes: the median of the frequencies over the frequency.

    The frequency of a class is its pixels over the pixels of those images in which it occurs; of an even number of
    classes the median is the mean of the two in the middle.

    Args:
        labels: (N, H, W), or label maps (H, W), of any sizes.
        num_classes: C.
        ignore_label: as for :class:`ConfusionMatrix`.
        count_ignored: pixels without a label belong to the images' pixels.

    Returns:
        (C,) of float32; 0 for classes that never occur, which the median leaves out.

    Raises:
        ValueError: no pixel has a label.

    Example:
        >>> median_frequency_weights(torch.tensor([[[0, 0, 0, 1]], [[0, 0, 2, 2]]]), 3)
        tensor([0.8000, 2.0000, 1.0000])

    Reference: arXiv 1511.00561, section 3.1.
    """
    check_positive("num_classes", num_classes)
    pixels = torch.zeros(num_classes, dtype=torch.float64)
    among = torch.zeros(num_classes, dtype=torch.float64)
    for image in labels:
        valid = _valid(image, num_classes, ignore_label)
        counts = torch.bincount(image[valid].long(), minlength=num_classes).double().cpu()
        pixels += counts
        among += (counts > 0) * (image.numel() if count_ignored else counts.sum())
    found = pixels > 0
    check(bool(found.any()), "labels", "no pixel", f"has a label from 0 to {num_classes - 1}")
    frequency = pixels[found] / among[found]
    weights = torch.zeros(num_classes, dtype=torch.float64)
    weights[found] = frequency.quantile(0.5) / frequency
    return weights.float()


def weighted_cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None = None, ignore_label: int | None = None
) -> Tensor:
    """SegNet's loss: weighted cross-entropies of pixels, over the number of pixels that have a label.

    PyTorch's weighted mean divides by the sum of the weights instead. Of a pixel at most 87.3 is counted, as in the
    original, whose gradient knows no such bound.

    Args:
        logits: (N, C, \\*spatial).
        target: (N, \\*spatial), class numbers.
        weight: (C,); unset is 1 for every class.
        ignore_label: as for :class:`ConfusionMatrix`.

    Returns:
        A scalar; 0 where no pixel has a label.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> logits, target = torch.tensor([[[0.0, 0.0], [0.0, 0.0]]]), torch.tensor([[0, 255]])
        >>> weighted_cross_entropy(logits, target, torch.tensor([3.0, 1.0]), 255)  # 3 · log 2
        tensor(2.0794)

    Reference: arXiv 1511.00561, section 3.1.
    """
    if logits.dim() < 2 or target.shape != (logits.shape[0], *logits.shape[2:]):
        shapes = f"{tuple(target.shape)}: expected (N, *spatial) of logits (N, C, *spatial), {tuple(logits.shape)}"
        raise ValueError(f"target of shape {shapes}")
    classes = logits.shape[1]
    valid = _valid(target, classes, ignore_label)
    losses = F.cross_entropy(logits, target.long().masked_fill(~valid, -100), reduction="none", ignore_index=-100)
    losses = losses - (losses - LARGEST_LOSS).clamp(min=0).detach()
    if weight is not None:
        check(
            weight.shape == (classes,), "weight.shape", tuple(weight.shape), f"needs one number a class, ({classes},)"
        )
        losses = losses * weight.to(losses)[target.long().masked_fill(~valid, 0)]
    return losses.sum() / valid.sum().clamp(min=1)


def boundary_map(mask: Tensor) -> Tensor:
    """Pixels of a mask with a boundary at their lower right corner, as the Berkeley benchmark draws them.

    Args:
        mask: (\\*, H, W), or labels.

    Returns:
        Booleans of the shape of ``mask``: one of the four edges at the lower right corner of the pixel separates two
        values. In the last row and column only the edge along them counts, the last pixel is never a boundary.

    Example:
        >>> boundary_map(torch.tensor([[0, 0, 0], [0, 1, 1], [0, 1, 1]])).int()
        tensor([[1, 1, 1],
                [1, 0, 0],
                [1, 0, 0]], dtype=torch.int32)
    """
    check(mask.dim() >= 2, "mask.shape", tuple(mask.shape), "needs (*, H, W)")
    down, right = mask[..., 1:, :] != mask[..., :-1, :], mask[..., 1:] != mask[..., :-1]
    # An edge counts for the pixels on its side of a corner: those between rows for the one above and that left of it.
    edges = torch.zeros(mask.shape, dtype=torch.bool, device=mask.device)
    edges[..., :-1, :] |= down
    edges[..., :-1, :-1] |= down[..., 1:]
    edges[..., :-1] |= right
    edges[..., :-1, :-1] |= right[..., 1:, :]
    return edges


@part(
    "boundary-f1",
    paper="segnet",
    kind="analysis",
    keywords="BF score contour boundary precision recall segmentation Berkeley benchmark",
)
def boundary_f1(
    predicted: Tensor,
    target: Tensor,
    num_classes: int,
    max_distance: float = 0.0075,
    matching: str = "one_to_one",
) -> Tensor:
    """Harmonic mean of precision and recall of boundary pixels, for each image and class.

    The score of an image is the mean over its classes, that of a set the mean over images:
    ``boundary_f1(predicted, target, classes).nanmean(1).mean()``.

    Args:
        predicted, target: (N, H, W), class numbers; pixels outside 0 … C − 1 belong to no class.
        num_classes: C.
        max_distance: tolerance as a fraction of the image's diagonal.
        matching: "one_to_one" pairs as many boundary pixels as the tolerance allows, each once (official);
            "relaxed" counts the pixels that have any of the other side in reach (never less).

    Returns:
        (N, C) of float64 on the CPU; NaN where a class occurs in neither map. A class that fills both has no boundary
        to miss and scores 1.

    Raises:
        ValueError: maps of different shapes, an argument out of range.

    Example:
        >>> labels = torch.zeros(1, 20, 20, dtype=torch.long)
        >>> labels[:, 5:, 5:] = 1
        >>> boundary_f1(labels, labels, 3)
        tensor([[1., 1., nan]], dtype=torch.float64)

    Reference: arXiv 1511.00561, section 4.1; Csurka et al. 2013.
    """
    check_positive("num_classes", num_classes)
    check_choice("matching", matching, ("one_to_one", "relaxed"))
    ok = isinstance(max_distance, int | float) and max_distance >= 0
    check(ok, "max_distance", max_distance, "needs a fraction of the diagonal, at least 0")
    if predicted.shape != target.shape or target.dim() != 3:
        shapes = f"{tuple(predicted.shape)}: expected (N, H, W), that of target, {tuple(target.shape)}"
        raise ValueError(f"predicted of shape {shapes}")
    reach = max_distance * math.hypot(*target.shape[1:])
    matched = _matched_once if matching == "one_to_one" else _matched_any
    ours, theirs = predicted.detach().cpu(), target.detach().cpu()
    scores = torch.full((len(target), num_classes), torch.nan, dtype=torch.float64)
    for kind in range(num_classes):
        masks = ours == kind, theirs == kind
        edges = boundary_map(masks[0]).numpy(), boundary_map(masks[1]).numpy()
        occurs = (masks[0] | masks[1]).flatten(1).any(1)
        for index in occurs.nonzero().flatten().tolist():
            mine, other = edges[0][index], edges[1][index]
            if mine.any() and other.any():
                hits, found = matched(mine, other, reach)
                precision, recall = hits / mine.sum(), found / other.sum()
                scores[index, kind] = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
            else:
                scores[index, kind] = float(mine.any() == other.any())
    return scores


def _matched_any(mine: Any, other: Any, reach: float) -> tuple[int, int]:
    """Pixels on each side with one of the other within reach."""
    distance = require("scipy.ndimage", "compare").distance_transform_edt
    return int((distance(~other)[mine] <= reach).sum()), int((distance(~mine)[other] <= reach).sum())


def _matched_once(mine: Any, other: Any, reach: float) -> tuple[int, int]:
    """The largest number of pairs within reach that share no pixel."""
    import numpy as np

    sparse = require("scipy.sparse", "compare")
    graph = require("scipy.sparse.csgraph", "compare")
    height, width = other.shape
    number = np.full(other.shape, -1)
    number[other] = np.arange(other.sum())
    rows, columns = mine.nonzero()
    span = int(reach)
    left, right = [], []
    for down in range(-span, span + 1):
        for across in range(-span, span + 1):
            if math.hypot(down, across) > reach:
                continue
            y, x = rows + down, columns + across
            inside = ((y >= 0) & (y < height) & (x >= 0) & (x < width)).nonzero()[0]
            partner = number[y[inside], x[inside]]
            left.append(inside[partner >= 0])
            right.append(partner[partner >= 0])
    ours, theirs = len(rows), int(other.sum())
    # The size of the largest matching is the largest flow from a source (0) through pairs to a sink, of one a pixel.
    # SciPy's own matching of bipartite graphs takes exponential time on some contours.
    sink = ours + theirs + 1
    partners = np.arange(1 + ours, sink)
    tails = np.concatenate([np.zeros(ours, int), np.concatenate(left) + 1, partners])
    heads = np.concatenate([np.arange(ours) + 1, np.concatenate(right) + 1 + ours, np.full(theirs, sink)])
    ones = np.ones(len(tails), np.int32)
    network = sparse.csr_array((ones, (tails, heads)), shape=(sink + 1, sink + 1))
    count = int(graph.maximum_flow(network, 0, sink).flow_value)
    return count, count
