"""Frequent sets of filters that fire at one place, on packed bits (PatternNet, arXiv 1703.06339; Apriori)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchconv._common import check, check_positive
from torchconv.analysis._patternnet_geometry import Geometry
from torchconv.analysis._patternnet_maps import Maps, batches, binarise, locate

Bits = NDArray[np.uint64]
Sets = dict[tuple[int, ...], float]


def pack(masks: Tensor) -> Bits:
    """Masks (B, N, \\*spatial) as bits (N, B, words): the AND of two rows is where both fire, image by image."""
    packed = np.packbits(masks.flatten(2).cpu().numpy(), axis=-1)
    packed = np.pad(packed, ((0, 0), (0, 0), (0, -packed.shape[-1] % 8)))
    return np.ascontiguousarray(packed.transpose(1, 0, 2)).view(np.uint64)


def pack_maps(maps: Maps, thresholds: Tensor, filters: Sequence[int]) -> Bits:
    """Bits of some filters over all images: N·B·positions/8 bytes, whatever the network's batch size."""
    rows = torch.tensor(list(filters), dtype=torch.long)
    parts = []
    for batch in batches(maps):
        here = rows.to(batch.device)
        parts.append(pack(binarise(batch[:, here], thresholds.to(batch.device)[here])))
    return np.concatenate(parts, 1)


def frequent_sets(bits: Bits, filters: Sequence[int], min_support: float = 0.1, max_size: int = 3) -> Sets:
    """All sets of filters that fire together at some position in at least a share of the images.

    Grown a filter at a time from frequent sets only, since a larger set cannot have more support.

    Args:
        bits: (filters, images, words) of :func:`pack`.
        filters: what the rows are called, ascending.
        min_support: share of the images, above 0.
        max_size: of a set.

    Returns:
        Set → share of the images with a position where all its filters fire.

    Example:
        >>> masks = torch.tensor([[[1, 1, 0], [1, 0, 0]], [[1, 0, 0], [0, 0, 1]]]).bool()  # two images, two filters
        >>> frequent_sets(pack(masks), [3, 8], 0.5)
        {(3,): 1.0, (8,): 1.0, (3, 8): 0.5}
    """
    check(0 < min_support <= 1, "min_support", min_support, "must be a share of the images, above 0 and at most 1")
    check_positive("max_size", max_size)
    check(list(filters) == sorted(set(filters)), "filters", list(filters), "must ascend, each once")
    found: Sets = {}
    single = bits.any(-1).mean(-1) if bits.shape[1] else np.zeros(len(bits))
    members = np.flatnonzero(single >= min_support)
    level: list[tuple[tuple[int, ...], Bits]] = [((int(i),), bits[i]) for i in members]
    found |= {(filters[int(i)],): float(single[i]) for i in members}
    for _ in range(max_size - 1):
        grown: list[tuple[tuple[int, ...], Bits]] = []
        for chosen, mask in level:
            after = members[members > chosen[-1]]
            joint = bits[after] & mask
            support = joint.any(-1).mean(-1)
            for at in np.flatnonzero(support >= min_support):
                larger = (*chosen, int(after[at]))
                grown.append((larger, joint[at]))
                found[tuple(filters[i] for i in larger)] = float(support[at])
        level = grown
    return found


def present(bits: Bits, rows: Sequence[int]) -> NDArray[np.bool_]:
    """(images,): whether the filters in these rows fire at one place."""
    return np.asarray(np.bitwise_and.reduce(bits[list(rows)], 0).any(-1))


def distinct(boxes: Tensor, found: Tensor, max_overlap: float) -> list[int]:
    """Greedy choice, best first: a pattern is dropped when its boxes overlap those of a better one.

    Args:
        boxes: (B, P, 4), patterns from best to worst.
        found: (B, P), bool.
        max_overlap: largest mean IoU, over the images in which either pattern is present (0 where only one is).

    Returns:
        Indices of the patterns that stay.
    """
    kept: list[int] = []
    for i in range(boxes.shape[1]):
        if kept:
            either = found[:, i, None] | found[:, kept]
            both = found[:, i, None] & found[:, kept]
            overlap = (iou(boxes[:, i, None], boxes[:, kept]) * both).sum(0) / either.sum(0).clamp_min(1)
            if bool((overlap > max_overlap).any()):
                continue
        kept.append(i)
    return kept


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes (…, 2·axes) whose corners are pixels, both inside."""
    axes = a.shape[-1] // 2
    (a_low, a_high), (b_low, b_high) = a.split(axes, -1), b.split(axes, -1)
    joint = (torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low) + 1).clamp_min(0).prod(-1)
    return joint / ((a_high - a_low + 1).prod(-1) + (b_high - b_low + 1).prod(-1) - joint)


def distinct_sets(
    maps: Maps,
    labels: Tensor,
    thresholds: Tensor,
    ranked: dict[int, list[tuple[int, ...]]],
    geometry: Geometry | None,
    max_overlap: float,
) -> dict[int, list[int]]:
    """For every class the indices of its ranked sets that :func:`distinct` keeps, on the images of the class."""
    boxes: dict[int, list[Tensor]] = {c: [] for c in ranked}
    found: dict[int, list[Tensor]] = {c: [] for c in ranked}
    start = 0
    for batch in batches(maps):
        here = labels[start : start + len(batch)].to(batch.device)
        start += len(batch)
        for c, sets in ranked.items():
            rows = batch[here == c]
            if len(rows) and sets:
                at = locate(rows, thresholds, sets, [len(s) for s in sets], geometry)
                boxes[c].append(at.box)
                found[c].append(at.present)
    return {c: distinct(torch.cat(boxes[c]), torch.cat(found[c]), max_overlap) if boxes[c] else [] for c in ranked}
