"""Objects proposed by patterns: the connected places where a pattern fires (PatternNet, arXiv 1703.06339)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torchconv._common import check, require
from torchconv.analysis._patternnet_geometry import Geometry
from torchconv.analysis._patternnet_maps import Maps, batches, binarise, votes
from torchconv.analysis._patternnet_mining import Mining
from torchconv.analysis._patternnet_sets import iou


@dataclass(frozen=True)
class Proposals:
    """Boxes of one image, best first.

    Attributes:
        boxes: (n, 2·axes), low corner and high corner, x before y, not clipped.
        scores: (n,), summed mean response of the pattern's filters over the region.
        patterns: (n,), index into the mining's patterns.
    """

    boxes: Tensor
    scores: Tensor
    patterns: Tensor


def propose(maps: Maps, mining: Mining, geometry: Geometry | None = None, max_overlap: float = 0.5) -> list[Proposals]:
    """For every image the regions in which patterns fire, the best one of each pattern, without those that overlap.

    Args:
        maps: (B, N, \\*spatial) after the ReLU.
        mining: whose patterns.
        geometry: of the boxes; cells of the map by default. A theoretical receptive field makes boxes far larger than
            what is seen: give its :meth:`Geometry.shrunk`.
        max_overlap: largest IoU of two boxes of an image.

    Example:
        >>> from torchconv.analysis.patternnet import Pattern
        >>> maps = torch.zeros(1, 2, 4, 4)
        >>> maps[0, :, 1:3, 2] = 1
        >>> propose(maps, Mining([Pattern((0, 1), 0, 2)], torch.tensor([0.5, 0.5])))[0].boxes.tolist()
        [[2.0, 1.0, 2.0, 2.0]]
    """
    check(0 <= max_overlap <= 1, "max_overlap", max_overlap, "must lie in 0..1")
    label = require("scipy.ndimage", "compare").label
    found = []
    for batch in batches(maps):
        counted = votes(binarise(batch, mining.thresholds), [p.filters for p in mining.patterns])
        for responses, image in zip(batch, counted, strict=True):
            regions = []
            for i, pattern in enumerate(mining.patterns):
                fires = (image[i] >= pattern.min_votes).cpu().numpy()
                if fires.any():
                    mean = responses[list(pattern.filters)].mean(0).double().cpu().numpy()
                    regions.append((i, *_largest(label(fires)[0], mean)))
            found.append(_chosen(regions, geometry or Geometry(), tuple(batch.shape[2:]), max_overlap))
    return found


def _largest(components: np.ndarray, mean: np.ndarray) -> tuple[float, int, int]:
    """Summed response of the best component, and the flat positions of its low and its high corner."""
    sums = np.bincount(components.ravel(), mean.ravel())
    best = int(sums[1:].argmax()) + 1
    cells = np.nonzero(components == best)
    low, high = (np.ravel_multi_index([ends(axis) for axis in cells], mean.shape) for ends in (np.min, np.max))
    return float(sums[best]), int(low), int(high)


def _chosen(
    regions: list[tuple[int, float, int, int]], geometry: Geometry, size: tuple[int, ...], most: float
) -> Proposals:
    """The regions' boxes without those that overlap a better one."""
    regions = sorted(regions, key=lambda r: -r[1])
    corners = geometry.boxes(torch.tensor([r[2:] for r in regions], dtype=torch.long).reshape(-1, 2), size)
    axes = len(size)
    boxes = torch.cat([corners[:, 0, :axes], corners[:, 1, axes:]], -1)
    kept: list[int] = []
    for i in range(len(boxes)):
        if not kept or bool((iou(boxes[i], boxes[kept]) <= most).all()):
            kept.append(i)
    scores, patterns = (torch.tensor([regions[i][k] for i in kept]) for k in (1, 0))
    return Proposals(boxes[kept], scores, patterns)
