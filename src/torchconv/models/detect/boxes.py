"""Boxes of detectors: complete IoU, selection with and without suppression, fitting images in, packing targets.

Boxes are x₁, y₁, x₂, y₂ in pixels unless something else is said; targets of a batch are rows (T, 6) of image, class and
centre x, centre y, width, height as fractions of the image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchconv._common import check, check_positive, ntuple, require
from torchconv.kernels.precision import widen

MAX_CANDIDATES = 30_000  # boxes of an image that enter the suppression
GREY = 114 / 255


class Detections(NamedTuple):
    """Boxes (K, 4), their scores (K,) and classes (K,), best first."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


def complete_iou(a: Tensor, b: Tensor, eps: float = 1e-7) -> Tensor:
    """Intersection over union less the distance of the centres and the difference of the aspects.

        IoU − d² / diagonal² − α·v,   v = 4/π² (atan w_b/h_b − atan w_a/h_a)²,   α = v / (v − IoU + 1) without gradient

    Args:
        a, b: boxes that broadcast.
        eps: in the denominators.

    Shape:
        (…, 4), (…, 4) → (…).

    Example:
        >>> complete_iou(torch.tensor([0.0, 0, 2, 2]), torch.tensor([[0.0, 0, 2, 2], [1, 0, 3, 2]])).round(decimals=3)
        tensor([1.0000, 0.2560])

    Reference: Zheng et al. 2020, arXiv 1911.08287.
    """
    size_a, size_b = a[..., 2:] - a[..., :2], b[..., 2:] - b[..., :2]
    (wa, ha), (wb, hb) = size_a.unbind(-1), size_b.unbind(-1)
    ha, hb = ha + eps, hb + eps
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    common = (high - low).clamp(min=0).prod(-1)
    iou = common / (wa * ha + wb * hb - common + eps)
    hull = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    apart = (b[..., :2] + b[..., 2:] - a[..., :2] - a[..., 2:]).square().sum(-1) / 4
    v = 4 / math.pi**2 * (torch.atan(wb / hb) - torch.atan(wa / ha)).square()
    with torch.no_grad():
        alpha = v / (v - iou + (1 + eps))
    return iou - apart / (hull.square().sum(-1) + eps) - alpha * v


def corners(boxes: Tensor) -> Tensor:
    """Centre, width and height (…, 4) → x₁, y₁, x₂, y₂.

    Example:
        >>> corners(torch.tensor([5.0, 5.0, 4.0, 2.0]))
        tensor([3., 4., 7., 6.])
    """
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def select(predictions: Tensor, max_det: int = 300) -> tuple[Tensor, Tensor, Tensor]:
    """The best boxes of each image, without suppression: for a branch that gives each object one box.

    The ``max_det`` anchors with the best classes, and of all their scores the ``max_det`` best, so that a box may come
    with several classes.

    Args:
        predictions: (B, 4 + C, A), boxes first.
        max_det: K; fewer where there are fewer scores.

    Returns:
        Boxes (B, K, 4) as in ``predictions``, scores (B, K), classes (B, K).

    Raises:
        ValueError: ``max_det`` below 1.

    Example:
        >>> p = torch.zeros(1, 6, 3)
        >>> p[0, 4:] = torch.tensor([[0.1, 0.9, 0.2], [0.3, 0.8, 0.0]])
        >>> select(p, 2)[1:]
        (tensor([[0.9000, 0.8000]]), tensor([[0, 1]]))

    Reference: YOLOv10, arXiv 2405.14458.
    """
    check_positive("max_det", max_det)
    boxes, scores = predictions.transpose(1, 2).split((4, predictions.shape[1] - 4), 2)
    best = scores.amax(2).topk(min(max_det, scores.shape[1]), 1).indices.unsqueeze(2)
    boxes = boxes.gather(1, best.expand(-1, -1, 4))
    scores = scores.gather(1, best.expand(-1, -1, scores.shape[2]))
    found, place = scores.flatten(1).topk(min(max_det, scores.shape[1] * scores.shape[2]), 1)
    row, label = place // scores.shape[2], place % scores.shape[2]
    return boxes.gather(1, row.unsqueeze(2).expand(-1, -1, 4)), found, label


def suppress(
    predictions: Tensor, conf: float = 0.001, iou: float = 0.7, max_det: int = 300, multi_label: bool = True
) -> list[Detections]:
    """The best boxes of each image after suppression within each class: for a branch with several boxes an object.

    Args:
        predictions: (B, 4 + C, A): centre, width, height, scores.
        conf: candidates score more than this.
        iou: a box goes if it overlaps a better one of its class by more than this.
        max_det: boxes of an image at most.
        multi_label: every (anchor, class) is a candidate; otherwise the best class of an anchor only.

    Raises:
        ValueError: ``max_det`` below 1, ``conf`` or ``iou`` outside of [0, 1].
        ImportError: torchvision is missing.

    Example:
        >>> p = torch.tensor([[[10.0, 10, 30], [10, 11, 10], [8, 8, 8], [8, 8, 8], [0.9, 0.8, 0.7]]])
        >>> suppress(p, 0.1, 0.5)[0].scores
        tensor([0.9000, 0.7000])
    """
    check_positive("max_det", max_det)
    for name, value in (("conf", conf), ("iou", iou)):
        check(0 <= value <= 1, name, value, "must lie in [0, 1]")
    ops = require("torchvision.ops", "models")
    found = []
    for image in widen(predictions):
        boxes, table = corners(image[:4].T), image[4:].T
        if multi_label:
            row, label = (table > conf).nonzero().T
            scores = table[row, label]
        else:
            best = table.max(1)
            row = (best.values > conf).nonzero().flatten()
            scores, label = best.values[row], best.indices[row]
        first = scores.argsort(descending=True, stable=True)[:MAX_CANDIDATES]
        boxes, scores, label = boxes[row[first]], scores[first], label[first]
        # torchvision keeps classes apart by an offset that holds for positive coordinates only
        low = boxes.amin() if len(boxes) else 0
        kept = ops.batched_nms(boxes - low, scores, label, iou)[:max_det]
        found.append(Detections(boxes[kept], scores[kept], label[kept]))
    return found


@dataclass(frozen=True)
class Placement:
    """Where :func:`letterbox` put an image: x ↦ scale·x + offset on each axis (width, height).

    Attributes:
        size: (width, height) of the image.
        scale, offset: on the two axes.
    """

    size: tuple[int, int]
    scale: tuple[float, float]
    offset: tuple[int, int]

    def _like(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        return boxes.new_tensor(self.scale * 2), boxes.new_tensor(self.offset * 2)

    def into(self, boxes: Tensor) -> Tensor:
        """Boxes of the image in the network's input; (…, 4)."""
        scale, offset = self._like(boxes)
        return boxes * scale + offset

    def back(self, boxes: Tensor, clip: bool = False) -> Tensor:
        """Boxes of the network's input in the image, the inverse of :meth:`into`; ``clip`` cuts what is outside."""
        scale, offset = self._like(boxes)
        found = (boxes - offset) / scale
        return found.clamp(min=0).minimum(boxes.new_tensor(self.size * 2)) if clip else found


def letterbox(
    image: Tensor, size: int | tuple[int, int] = 640, multiple: int = 32, fill: float = GREY
) -> tuple[Tensor, Placement]:
    """Fit images in a size, their aspect kept (to a pixel), the margin equal on both sides.

    Args:
        image: (C, H, W) or (N, C, H, W), floating point.
        size: side, or (height, width), of the result.
        multiple: of which the size has to be one.
        fill: value of the margin.

    Returns:
        The images of that size, and where they are in it.

    Raises:
        ValueError: a size that is no multiple, or an image of another shape or type.

    Example:
        >>> y, place = letterbox(torch.rand(3, 20, 32), 64)
        >>> y.shape, place.offset
        (torch.Size([3, 64, 64]), (0, 12))
        >>> place.back(place.into(torch.tensor([3.0, 5.0, 20.0, 10.0])))
        tensor([ 3.,  5., 20., 10.])
    """
    height, width = ntuple("size", size, 2)
    ok = min(height, width) >= 1 and height % multiple == width % multiple == 0
    check(ok, "size", size, f"must be multiples of {multiple}")
    fits = image.dim() in (3, 4) and image.numel() > 0 and image.is_floating_point()
    remedy = "needs floating-point images (C, H, W) or (N, C, H, W)"
    check(fits, "image", f"{image.dtype} {tuple(image.shape)}", remedy)
    h, w = image.shape[-2:]
    ratio = min(height / h, width / w)
    new = max(1, round(h * ratio)), max(1, round(w * ratio))
    top, left = (height - new[0]) // 2, (width - new[1]) // 2
    batch = image if image.dim() == 4 else image.unsqueeze(0)
    if new != (h, w):
        batch = F.interpolate(batch, new, mode="bilinear", align_corners=False, antialias=True)
    pads = (left, width - new[1] - left, top, height - new[0] - top)
    batch = F.pad(batch, pads, value=fill)
    placement = Placement((w, h), (new[1] / w, new[0] / h), (left, top))
    return batch if image.dim() == 4 else batch.squeeze(0), placement


def pack_targets(boxes: Sequence[Tensor], labels: Sequence[Tensor], size: int | tuple[int, int]) -> Tensor:
    """The targets of a batch as rows of image, class, centre x, centre y, width, height in fractions of the image.

    Args:
        boxes: (Kᵢ, 4) for each image, x₁, y₁, x₂, y₂ in pixels of the network's input.
        labels: (Kᵢ,) for each image.
        size: side, or (height, width), of the input.

    Raises:
        ValueError: lists of unequal lengths, boxes of another shape.

    Example:
        >>> pack_targets([torch.tensor([[8.0, 0, 24, 16]])], [torch.tensor([2])], 32)
        tensor([[0.0000, 2.0000, 0.5000, 0.2500, 0.5000, 0.5000]])
    """
    height, width = ntuple("size", size, 2)
    check(len(boxes) == len(labels), "labels", len(labels), f"needs one tensor for each of {len(boxes)} images")
    rows = []
    for number, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        fits = box.shape == (len(label), 4)
        check(fits, f"boxes[{number}].shape", tuple(box.shape), f"needs ({len(label)}, 4)")
        whole: Any = box.new_tensor([width, height] * 2)
        middle = torch.cat([(box[:, :2] + box[:, 2:]) / 2, box[:, 2:] - box[:, :2]], 1) / whole
        columns = torch.stack([torch.full_like(label, number), label], 1).to(middle.dtype)
        rows.append(torch.cat([columns, middle], 1))
    return torch.cat(rows) if rows else torch.zeros(0, 6)
