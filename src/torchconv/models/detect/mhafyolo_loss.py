"""The loss of a detector with two branches: task-aligned assignment, complete IoU, class scores, distances in bins.

    L = Σ_branches B · (7.5·box + 0.5·cls + 1.5·dfl),      t = s^α · CIoU^β

Every object gets the ``topk`` anchors inside of it with the largest alignment t between score s and overlap (10 for
"one2many", 1 for "one2one"), and its class's target at an anchor is t relative to the object's largest t, times its
largest overlap (TOOD, arXiv 2108.07755; YOLOv10, arXiv 2405.14458).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive
from torchconv.models.detect.boxes import complete_iou, corners
from torchconv.models.detect.mhafyolo_head import BRANCHES, anchors, decode_sides, expected_sides, flatten_maps

GAINS = {"box": 7.5, "cls": 0.5, "dfl": 1.5}
TOPK = {"one2many": 10, "one2one": 1}


class Assignment(NamedTuple):
    """What each anchor has to find; where ``foreground`` is false, nothing, and ``object_index`` is 0.

    Attributes:
        object_index: (B, A) number of the object within its image.
        boxes: (B, A, 4) of that object.
        scores: (B, A, C) targets of the classes.
        foreground: (B, A).
    """

    object_index: Tensor
    boxes: Tensor
    scores: Tensor
    foreground: Tensor


@torch.no_grad()
def assign(
    scores: Tensor,
    boxes: Tensor,
    centres: Tensor,
    labels: Tensor,
    objects: Tensor,
    valid: Tensor,
    topk: int = 10,
    alpha: float = 0.5,
    beta: float = 6.0,
) -> Assignment:
    """Give every object its anchors by task alignment.

    Candidates have their centre inside the object. An anchor that several objects want goes to the one that it overlaps
    most, among all that it lies in.

    Args:
        scores: (B, A, C) in [0, 1].
        boxes: (B, A, 4) predicted.
        centres: (A, 2) of the anchors, in the units of the boxes.
        labels: (B, M) classes of the objects.
        objects: (B, M, 4) boxes of the objects.
        valid: (B, M), false for rows that only fill up.
        topk: anchors of an object.
        alpha, beta: exponents of score and overlap.

    Example:
        >>> centres = torch.tensor([[0.5, 0.5], [1.5, 0.5]])
        >>> boxes = torch.tensor([[[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 2.0, 1.0]]])
        >>> found = assign(torch.full((1, 2, 1), 0.5), boxes, centres, torch.zeros(1, 1).long(),
        ...                torch.tensor([[[0.0, 0.0, 2.0, 1.0]]]), torch.ones(1, 1).bool(), topk=1)
        >>> found.foreground.tolist(), found.scores.flatten().round(decimals=3).tolist()
        ([[False, True]], [0.0, 1.0])
    """
    batch, count, classes = scores.shape
    if objects.shape[1] == 0:
        none = torch.zeros(batch, count, dtype=torch.long, device=scores.device)
        return Assignment(none, torch.zeros_like(boxes), torch.zeros_like(scores), none.bool())
    inside = valid[..., None].expand(-1, -1, count)
    for axis in (0, 1):
        place, (low, high) = centres[:, axis], objects[..., None, axis::2].unbind(-1)
        inside = inside & (place - low > 1e-9) & (high - place > 1e-9)
    image, row, anchor = inside.nonzero(as_tuple=True)
    overlap, align = scores.new_zeros(2, *inside.shape)
    pairs = complete_iou(objects[image, row], boxes[image, anchor]).clamp(min=0)
    overlap[image, row, anchor] = pairs
    align[image, row, anchor] = scores[image, anchor, labels[image, row]].pow(alpha) * pairs.pow(beta)
    best = align.topk(min(topk, count), -1).indices
    taken = torch.zeros_like(inside).scatter_(-1, best, True) & inside
    contested = taken.sum(1, keepdim=True) > 1
    winner = torch.zeros_like(inside).scatter_(1, overlap.argmax(1, keepdim=True), True)
    taken = torch.where(contested, winner, taken)
    index = taken.byte().argmax(1)
    foreground = taken.any(1)
    align, overlap = align * taken, overlap * taken
    quality = align * overlap.amax(-1, keepdim=True) / (align.amax(-1, keepdim=True) + 1e-9)
    targets = F.one_hot(labels.gather(1, index), classes) * (foreground * quality.amax(1))[..., None]
    chosen = objects.gather(1, index[..., None].expand(-1, -1, 4))
    return Assignment(index, chosen, targets.to(scores.dtype), foreground)


class LossOutput(NamedTuple):
    """The loss, and its items box, cls, dfl of every branch, gains applied, batch size not, detached."""

    loss: Tensor
    items: Tensor


class DetectionLoss(nn.Module):
    """The loss of both branches.

    Args:
        num_classes: C.
        strides: of the levels.
        reg_max: bins of a side.
        gains: of the items "box", "cls" and "dfl".
        topk: anchors of an object, for each branch.
        alpha, beta: exponents of score and overlap in the alignment.

    Shape:
        Maps (B, 4·reg_max + C, h, w) of every level for each branch, targets (T, 6) of image, class, centre x, centre
        y, width, height in fractions of the image → a scalar and (3·branches,).

    Raises:
        ValueError: an argument out of range; maps or targets that do not fit.

    Example:
        >>> maps = [torch.zeros(1, 66, 4 // s, 4 // s, requires_grad=True) for s in (1, 2, 4)]
        >>> loss = DetectionLoss(2)
        >>> found = loss({"one2many": maps, "one2one": maps}, torch.tensor([[0, 1, 0.5, 0.5, 0.4, 0.6]]))
        >>> found.items.shape, bool(found.loss > 0)
        (torch.Size([6]), True)

    Reference: arXiv 2502.04656; arXiv 2405.14458, section 3.1; arXiv 2006.04388 (distances in bins).
    """

    def __init__(
        self,
        num_classes: int,
        strides: Sequence[int] = (8, 16, 32),
        reg_max: int = 16,
        *,
        gains: Mapping[str, float] = GAINS,
        topk: Mapping[str, int] = TOPK,
        alpha: float = 0.5,
        beta: float = 6.0,
    ) -> None:
        super().__init__()
        check_positive("num_classes", num_classes)
        check(isinstance(reg_max, int) and reg_max >= 2, "reg_max", reg_max, "needs two bins to lie between")
        check(set(gains) == set(GAINS), "gains", dict(gains), f"needs {', '.join(GAINS)}")
        for name, number in topk.items():
            check_choice("topk", name, BRANCHES)
            check_positive(f"topk[{name!r}]", number)
        self.num_classes, self.strides, self.reg_max = num_classes, tuple(strides), reg_max
        self.gains, self.topk, self.alpha, self.beta = dict(gains), dict(topk), alpha, beta

    def forward(self, heads: Mapping[str, Sequence[Tensor]], targets: Tensor) -> LossOutput:
        """The loss of the branches in ``heads``, "one2many" first."""
        known = [b for b in BRANCHES if b in heads]
        check(bool(known), "heads", list(heads), f"holds none of {', '.join(BRANCHES)}")
        items = torch.cat([self.items(heads[b], targets, self.topk[b]) for b in known])
        return LossOutput(items.sum() * len(heads[known[0]][0]), items.detach())

    def items(self, maps: Sequence[Tensor], targets: Tensor, topk: int) -> Tensor:
        """(3,) of one branch: box, cls, dfl, gains applied."""
        seen = self._read(maps, targets)
        found = self._assign(seen, targets, topk)
        total = found.scores.sum().clamp(min=1)
        cls = F.binary_cross_entropy_with_logits(seen.classes, found.scores, reduction="sum")
        mine = found.foreground
        weight = found.scores.sum(-1)[mine]
        goal = (found.boxes / seen.strides)[mine]
        box = ((1 - complete_iou(seen.boxes[mine], goal)) * weight).sum()
        middle = seen.centres.expand(len(mine), -1, -1)[mine]
        sides = torch.cat([middle - goal[:, :2], goal[:, 2:] - middle], -1)
        dfl = (_bin_loss(seen.logits[mine], sides) * weight).sum()
        gains = total.new_tensor([self.gains["box"], self.gains["cls"], self.gains["dfl"]])
        return torch.stack([box, cls, dfl]) * gains / total

    def assignment(self, maps: Sequence[Tensor], targets: Tensor, topk: int) -> Assignment:
        """What each anchor of a branch has to find; boxes in pixels."""
        return self._assign(self._read(maps, targets), targets, topk)

    def _assign(self, seen: _Seen, targets: Tensor, topk: int) -> Assignment:
        labels, objects, valid = _by_image(targets.to(seen.boxes), len(seen.boxes))
        objects = corners(objects * objects.new_tensor(seen.size * 2))
        scores, pixels = seen.classes.detach().sigmoid(), seen.boxes.detach() * seen.strides
        centres = seen.centres * seen.strides
        return assign(scores, pixels, centres, labels, objects, valid, topk, self.alpha, self.beta)

    def _read(self, maps: Sequence[Tensor], targets: Tensor) -> _Seen:
        check(len(maps) == len(self.strides), "maps", len(maps), f"needs one for each of the strides {self.strides}")
        channels = 4 * self.reg_max + self.num_classes
        for m in maps:
            check(m.dim() == 4 and m.shape[1] == channels, "maps", tuple(m.shape), f"needs (B, {channels}, h, w)")
        check(targets.dim() == 2 and targets.shape[1] == 6, "targets", tuple(targets.shape), "needs rows (T, 6)")
        for column, end, what in ((0, len(maps[0]), "image"), (1, self.num_classes, "class")):
            values = targets[:, column]
            wrong = values[(values < 0) | (values >= end)]
            check(not len(wrong), f"targets[:, {column}]", wrong[:3].tolist(), f"{what} numbers are 0 to {end - 1}")
        logits, classes = flatten_maps(maps, self.reg_max)
        sizes = [(m.shape[2], m.shape[3]) for m in maps]
        centres, strides = anchors(sizes, self.strides, logits.device, logits.dtype)
        height, width = (side * self.strides[0] for side in sizes[0])
        return _Seen(logits, classes, centres, strides, decode_sides(expected_sides(logits), centres), (width, height))


class _Seen(NamedTuple):
    """A branch's maps: logits of sides and classes, centres in cells, strides, boxes in cells; the image's size."""

    logits: Tensor
    classes: Tensor
    centres: Tensor
    strides: Tensor
    boxes: Tensor
    size: tuple[int, int]


def _by_image(targets: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Labels (B, M), boxes (B, M, 4) and which rows are real (B, M), in the order of the targets."""
    image = targets[:, 0].long()
    counts = torch.bincount(image, minlength=batch)
    most = int(counts.max()) if len(image) else 0
    order = image.argsort(stable=True)
    first = counts.cumsum(0) - counts
    place = torch.arange(len(image), device=image.device) - first[image[order]]
    labels = image.new_zeros(batch, most)
    boxes = targets.new_zeros(batch, most, 4)
    labels[image[order], place] = targets[order, 1].long()
    boxes[image[order], place] = targets[order, 2:]
    return labels, boxes, torch.arange(most, device=image.device) < counts[:, None]


def _bin_loss(logits: Tensor, sides: Tensor) -> Tensor:
    """Cross-entropy of the two bins beside each side, by nearness; (P, 4, bins), (P, 4) → (P,)."""
    sides = sides.clamp(0, logits.shape[-1] - 1 - 0.01)
    left = sides.long()
    share = sides - left
    log = logits.log_softmax(-1)
    below, above = (log.gather(-1, (left + step).unsqueeze(-1)).squeeze(-1) for step in (0, 1))
    return -(below * (1 - share) + above * share).mean(-1)
