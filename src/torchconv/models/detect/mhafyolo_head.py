"""MHAF-YOLO's head: box sides as distributions over bins and class scores, twice, at every level.

One branch learns from several anchors an object ("one2many"), the other from one ("one2one"), on features that its
gradients do not reach. The second needs no suppression of overlapping boxes (YOLOv10, arXiv 2405.14458).

    side = Σᵢ i · softmax(logits)ᵢ        in cells of the level, left, top, right and bottom of the cell's centre
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchconv._common import check_choice, check_positive
from torchconv.kernels.precision import widen
from torchconv.ops.mhafyolo import ConvBN, MultiKernelReparamConv2d

BRANCHES = ("one2many", "one2one")


def anchors(
    sizes: Sequence[tuple[int, int]], strides: Sequence[int], device: Any = None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Centres of all cells, level by level and row by row, in cells, and the stride of each.

    Args:
        sizes: (height, width) of every level.
        strides: of every level.
        device, dtype: of the result.

    Returns:
        (A, 2) of x and y, (A, 1).

    Example:
        >>> centres, strides = anchors([(1, 2), (1, 1)], (8, 16))
        >>> centres.tolist(), strides.flatten().tolist()
        ([[0.5, 0.5], [1.5, 0.5], [0.5, 0.5]], [8.0, 8.0, 16.0])
    """
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    centres, steps = [], []
    for (h, w), stride in zip(sizes, strides, strict=True):
        y, x = torch.meshgrid(torch.arange(h, **options) + 0.5, torch.arange(w, **options) + 0.5, indexing="ij")
        centres.append(torch.stack([x, y], -1).reshape(-1, 2))
        steps.append(torch.full((h * w, 1), float(stride), **options))
    return torch.cat(centres), torch.cat(steps)


def expected_sides(logits: Tensor) -> Tensor:
    """The mean of the distributions over bins.

    Shape:
        (…, bins) → (…).

    Example:
        >>> expected_sides(torch.tensor([0.0, 0.0, 50.0, 0.0])).item()
        2.0
    """
    return logits.softmax(-1) @ torch.arange(logits.shape[-1], device=logits.device, dtype=logits.dtype)


def flatten_maps(maps: Sequence[Tensor], reg_max: int) -> tuple[Tensor, Tensor]:
    """A branch's maps as logits of sides (B, A, 4, reg_max) and of classes (B, A, classes); halves become float32."""
    flat = widen(torch.cat([m.flatten(2) for m in maps], 2).transpose(1, 2))
    return flat[..., : 4 * reg_max].unflatten(2, (4, reg_max)), flat[..., 4 * reg_max :]


def decode_sides(sides: Tensor, centres: Tensor) -> Tensor:
    """Corners (…, A, 4) x₁, y₁, x₂, y₂ of boxes whose sides are left, top, right, bottom of ``centres`` (A, 2)."""
    return torch.cat([centres - sides[..., :2], centres + sides[..., 2:]], -1)


class DetectionHead(nn.Module):
    """Both branches on the maps of several levels.

    Args:
        channels: of the maps, finest first.
        strides: of the maps.
        num_classes: C.
        reg_max: bins of a side.
        eps, momentum: of the batch norms.

    Shape:
        Maps (B, channels[l], h, w) → for each branch, maps (B, 4·reg_max + C, h, w), bins of the sides first.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int = 80,
        reg_max: int = 16,
        *,
        eps: float = 1e-3,
        momentum: float = 0.03,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_positive("num_classes", num_classes)
        check_positive("reg_max", reg_max)
        norms: dict[str, Any] = {"eps": eps, "momentum": momentum, "device": device, "dtype": dtype}
        plain: dict[str, Any] = {"device": device, "dtype": dtype}
        self.strides, self.num_classes, self.reg_max = tuple(strides), num_classes, reg_max
        box = max(16, channels[0] // 4, 4 * reg_max)
        scores = max(channels[0], min(num_classes, 100))

        def boxes(c: int) -> nn.Module:
            return nn.Sequential(
                ConvBN(c, box, **norms),
                MultiKernelReparamConv2d(box, kernel_size=5, **norms),
                ConvBN(box, box, **norms),
                nn.Conv2d(box, 4 * reg_max, 1, **plain),
            )

        def classes(c: int) -> nn.Module:
            return nn.Sequential(
                nn.Sequential(ConvBN(c, c, 3, groups=c, **norms), ConvBN(c, scores, **norms)),
                nn.Sequential(ConvBN(scores, scores, 3, groups=scores, **norms), ConvBN(scores, scores, **norms)),
                nn.Conv2d(scores, num_classes, 1, **plain),
            )

        self.cv2 = nn.ModuleList(boxes(c) for c in channels)
        self.cv3 = nn.ModuleList(classes(c) for c in channels)
        self.one2one_cv2 = nn.ModuleList(boxes(c) for c in channels)
        self.one2one_cv3 = nn.ModuleList(classes(c) for c in channels)
        self.one2one_cv2.load_state_dict(self.cv2.state_dict())
        self.one2one_cv3.load_state_dict(self.cv3.state_dict())
        self.reset_biases()

    def reset_biases(self, image: int = 640) -> None:
        """Boxes start at 1 for every bin, classes at the rate of 5 objects in an image of side ``image``."""
        check_positive("image", image)
        for prefix in ("", "one2one_"):
            both: Any = zip(getattr(self, f"{prefix}cv2"), getattr(self, f"{prefix}cv3"), self.strides, strict=True)
            for boxes, classes, stride in both:
                nn.init.constant_(boxes[-1].bias, 1.0)
                nn.init.constant_(classes[-1].bias, math.log(5 / self.num_classes / (image / stride) ** 2))

    @property
    def branches(self) -> tuple[str, ...]:
        """Branches that are there: both, or the one that :meth:`keep` left."""
        return tuple(b for b in BRANCHES if hasattr(self, f"{_prefix(b)}cv2"))

    def keep(self, branch: str) -> None:
        """Remove the other branch."""
        check_choice("branch", branch, self.branches)
        for other in self.branches:
            if other != branch:
                delattr(self, f"{_prefix(other)}cv2")
                delattr(self, f"{_prefix(other)}cv3")

    def maps(self, features: Sequence[Tensor], branch: str) -> list[Tensor]:
        """Raw maps of one branch, its gradients reaching the features."""
        check_choice("branch", branch, self.branches)
        boxes: Any = getattr(self, f"{_prefix(branch)}cv2")
        classes: Any = getattr(self, f"{_prefix(branch)}cv3")
        levels = zip(boxes, classes, features, strict=True)
        return [torch.cat([box(x), score(x)], 1) for box, score, x in levels]

    def forward(self, features: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        """Raw maps of both branches; the gradients of "one2one" do not reach the features."""
        return {
            branch: self.maps([x.detach() for x in features] if branch == "one2one" else features, branch)
            for branch in self.branches
        }

    def decode(self, maps: Sequence[Tensor]) -> Tensor:
        """Boxes and scores of a branch.

        Shape:
            (B, 4·reg_max + C, h, w) each → (B, 4 + C, A): centre, width and height in pixels, scores in [0, 1].
        """
        logits, scores = flatten_maps(maps, self.reg_max)
        sizes = [(m.shape[2], m.shape[3]) for m in maps]
        centres, strides = anchors(sizes, self.strides, logits.device, logits.dtype)
        sides = expected_sides(logits)
        before, after = sides[..., :2], sides[..., 2:]
        boxes = torch.cat([centres + (after - before) / 2, before + after], -1) * strides
        return torch.cat([boxes, scores.sigmoid()], -1).transpose(1, 2)


def _prefix(branch: str) -> str:
    return "one2one_" if branch == "one2one" else ""
