"""How good detections are: average precision as on COCO (Lin et al. 2014, arXiv 1405.0312).

Detections of a class are taken from the best score down, and each finds the object of its class and image that it
overlaps most and that no better one has found. Precision at a recall is the best at that recall or above; its mean over
101 recalls is the average precision at one threshold of overlap, whose mean over thresholds and classes is reported.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from torchconv._common import check, check_positive, require
from torchconv.catalog import part

THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
_RECALLS = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class DetectionScores:
    """Mean average precision, at an overlap of 0.5 and of 0.75 (NaN where not asked for), and mean recall.

    Attributes:
        ap, ap50, ap75: means over the classes that have objects.
        recall: largest, mean over thresholds and classes.
        class_ap: by class, mean over thresholds.
    """

    ap: float
    ap50: float
    ap75: float
    recall: float
    class_ap: dict[int, float]


@part(
    "average-precision",
    paper="mhafyolo",
    kind="analysis",
    keywords="mAP mean average precision COCO AP50 AP75 object detection score recall",
)
class AveragePrecision:
    """Average precision over images that come batch by batch.

    Args:
        thresholds: of the overlap, 0.5, 0.55, …, 0.95 as on COCO.
        max_det: best detections of an image and class that count.

    Raises:
        ValueError: a threshold outside of (0, 1], or ``max_det`` below 1.

    Example:
        >>> import torch
        >>> score = AveragePrecision()
        >>> boxes, labels = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0]]), torch.tensor([0, 1])
        >>> score.update([(boxes, torch.tensor([0.9, 0.8]), labels)], [(boxes, labels)])
        >>> score.compute().ap50
        1.0

    Reference: Lin et al. 2014, "Microsoft COCO: Common Objects in Context", arXiv 1405.0312; objects of all sizes,
    none of them a crowd.
    """

    def __init__(self, thresholds: Sequence[float] = THRESHOLDS, max_det: int = 100) -> None:
        check(len(thresholds) > 0 and all(0 < t <= 1 for t in thresholds), "thresholds", thresholds, "lie in (0, 1]")
        check_positive("max_det", max_det)
        self.thresholds, self.max_det = tuple(thresholds), max_det
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        self._objects: dict[int, int] = defaultdict(int)
        self._scores: dict[int, list[Any]] = defaultdict(list)
        self._right: dict[int, list[Any]] = defaultdict(list)

    def update(self, found: Sequence[tuple[Tensor, Tensor, Tensor]], objects: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Count images.

        Args:
            found: for each image boxes (K, 4) as x₁, y₁, x₂, y₂, scores (K,) and classes (K,).
            objects: for each image boxes (M, 4) and classes (M,).

        Raises:
            ValueError: lists of unequal lengths, or tensors that do not fit.
            ImportError: torchvision is missing.
        """
        check(len(found) == len(objects), "found", len(found), f"needs one entry for each of {len(objects)} images")
        for (boxes, scores, labels), (true_boxes, true_labels) in zip(found, objects, strict=True):
            fits = boxes.shape == (len(scores), 4) and labels.shape == scores.shape == (len(scores),)
            shapes = [tuple(t.shape) for t in (boxes, scores, labels)]
            check(fits, "found", shapes, "needs boxes (K, 4), scores (K,) and classes (K,)")
            fits = true_boxes.shape == (len(true_labels), 4)
            check(fits, "objects", tuple(true_boxes.shape), f"needs boxes ({len(true_labels)}, 4)")
            self._count(boxes, scores, labels, true_boxes, true_labels)

    def _count(self, boxes: Tensor, scores: Tensor, labels: Tensor, true_boxes: Tensor, true_labels: Tensor) -> None:
        overlap = require("torchvision.ops", "models").box_iou(boxes.detach().double().cpu(), true_boxes.double().cpu())
        values, kinds = scores.detach().double().cpu().numpy(), labels.cpu().numpy()
        wanted = true_labels.cpu().numpy()
        for label in {*kinds.tolist(), *wanted.tolist()}:
            mine, theirs = np.flatnonzero(kinds == label), np.flatnonzero(wanted == label)
            mine = mine[np.argsort(-values[mine], kind="stable")[: self.max_det]]
            self._objects[int(label)] += len(theirs)
            self._scores[int(label)].append(values[mine])
            self._right[int(label)].append(_match(overlap.numpy()[np.ix_(mine, theirs)], self.thresholds))

    def compute(self) -> DetectionScores:
        """The scores of all images so far; NaN without any object."""
        precision, recall = {}, {}
        for label, count in self._objects.items():
            if count == 0:
                continue
            scores, right = np.concatenate(self._scores[label]), np.concatenate(self._right[label], 1)
            right = right[:, np.argsort(-scores, kind="stable")]
            precision[label] = np.array([_average(row, count) for row in right])
            recall[label] = right.sum(1) / count
        if not precision:
            none = float("nan")
            return DetectionScores(none, none, none, none, {})
        table = np.stack(list(precision.values()))

        def at(threshold: float) -> float:
            near = [i for i, t in enumerate(self.thresholds) if abs(t - threshold) < 1e-9]
            return float(table[:, near[0]].mean()) if near else float("nan")

        classes = {label: float(row.mean()) for label, row in sorted(precision.items())}
        return DetectionScores(float(table.mean()), at(0.5), at(0.75), float(np.mean(list(recall.values()))), classes)


def _match(overlap: Any, thresholds: Sequence[float]) -> Any:
    """Which of the detections (rows, best first) find an object (columns), for each threshold."""
    right = np.zeros((len(thresholds), len(overlap)), dtype=bool)
    if not overlap.size:
        return right
    for number, threshold in enumerate(thresholds):
        free = np.ones(overlap.shape[1], dtype=bool)
        for row, values in enumerate(overlap):
            left = np.where(free, values, -1.0)
            best = len(left) - 1 - int(left[::-1].argmax())  # of equals the last, as on COCO
            if left[best] >= min(threshold, 1 - 1e-10):
                free[best], right[number, row] = False, True
    return right


def _average(right: Any, count: int) -> float:
    """Mean over 101 recalls of the best precision at that recall or above."""
    hits = np.cumsum(right)
    precision = hits / np.arange(1, len(right) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    place = np.searchsorted(hits / count, _RECALLS, side="left")
    return float(np.where(place < len(right), np.append(envelope, 0.0)[np.minimum(place, len(right))], 0.0).mean())
