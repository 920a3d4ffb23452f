"""Patterns of a class: mined, ranked, and used to classify (PatternNet, arXiv 1703.06339, section 3).

Set growth on packed bits needs at most (K choose s) ANDs of B·H·W/64 words for a class of B images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchconv._common import check, check_positive, require
from torchconv.analysis._patternnet_geometry import Geometry
from torchconv.analysis._patternnet_head import PatternNetHead, class_filters
from torchconv.analysis._patternnet_maps import (
    Located,
    Maps,
    batches,
    binarise_thresholds,
    locate,
    respond,
    supports,
)
from torchconv.analysis._patternnet_sets import distinct_sets, frequent_sets, pack_maps, present
from torchconv.catalog.parts import part

CANDIDATES = 50
"""Sets of a class, best first, among which overlapping ones are looked for."""


@dataclass(frozen=True)
class Pattern:
    """Filters that fire together for one class.

    Attributes:
        filters: of the last convolution.
        label: the class.
        min_votes: how many must fire at one place.
        supports: share of every class's mining images in which the pattern is present.
    """

    filters: tuple[int, ...]
    label: int
    min_votes: int
    supports: tuple[float, ...] = ()

    @property
    def support(self) -> float:
        """How representative: share of the class's images that show it."""
        return self.supports[self.label]

    @property
    def confidence(self) -> float:
        """How discriminative: its support in the class over the sum of those in all classes; 0 when it never fires."""
        total = sum(self.supports)
        return self.support / total if total else 0.0


@dataclass(frozen=True)
class Mining:
    """Patterns of all classes, best first in each, and the thresholds above which filters fire."""

    patterns: list[Pattern]
    thresholds: Tensor

    def of(self, label: int) -> list[Pattern]:
        """The patterns of one class."""
        return [p for p in self.patterns if p.label == label]

    def locate(self, maps: Maps, geometry: Geometry | None = None) -> Located:
        """Where the patterns are in other images."""
        sets = [p.filters for p in self.patterns]
        return locate(maps, self.thresholds, sets, [p.min_votes for p in self.patterns], geometry)


def basic_patterns(
    maps: Maps,
    labels: Tensor,
    head: PatternNetHead,
    *,
    k: int = 5,
    min_votes: int = 3,
    quantile: float = 0.9,
    positive_only: bool = True,
) -> Mining:
    """One pattern a class: its k filters of largest weight, of which ``min_votes`` must fire at one place.

    Args:
        maps: (B, N, \\*spatial) after the ReLU, in memory or a :class:`FeatureMaps`.
        labels: (B,).
        head: whose weights choose the filters.
        k: filters a pattern.
        min_votes: all of them where a class has fewer filters.
        quantile: of a filter's responses over all images and positions; it fires above.
        positive_only: only filters that speak for the class; a class without any has no pattern.
    """
    _check(maps, labels, head)
    check_positive("min_votes", min_votes)
    thresholds = binarise_thresholds(maps, quantile)
    chosen = list(enumerate(class_filters(head.fc.weight, k, positive_only)))
    patterns = [Pattern(f, c, min(min_votes, len(f))) for c, f in chosen if f]
    where = Mining(patterns, thresholds).locate(maps)
    shares = supports(where.present, labels.to(where.position.device), head.fc.out_features).tolist()
    found = [Pattern(p.filters, p.label, p.min_votes, tuple(s)) for p, s in zip(patterns, shares, strict=True)]
    return Mining(found, thresholds)


@part(
    "pattern-mining",
    paper="patternnet",
    kind="analysis",
    dims=(1, 2, 3),
    keywords="explain parts discover localise class frequent item sets Apriori filters co-fire support confidence",
)
def mine_patterns(
    maps: Maps,
    labels: Tensor,
    head: PatternNetHead,
    *,
    k: int = 10,
    sizes: tuple[int, int] = (1, 3),
    min_support: float = 0.1,
    quantile: float = 0.9,
    positive_only: bool = True,
    geometry: Geometry | None = None,
    max_overlap: float = 0.5,
) -> Mining:
    """All sets of a class's filters that fire at one place in many of its images, the most telling ones first.

    Sets are ranked by support × confidence, and one whose boxes overlap a better one's is dropped.

    Args:
        maps: (B, N, \\*spatial) after the ReLU, in memory or a :class:`FeatureMaps`.
        labels: (B,).
        head: whose weights choose the filters.
        k: filters of a class among which sets are sought.
        sizes: fewest and most filters of a set; all of them must fire.
        min_support: share of the class's images that must show a set.
        quantile: of a filter's responses over all images and positions; it fires above.
        positive_only: only filters that speak for the class.
        geometry: of the boxes; by default two sets overlap when their best cells are the same.
        max_overlap: largest mean IoU of two sets' boxes, over the images that show either; 1 keeps all.

    Raises:
        ValueError: labels that do not fit, sizes out of order.

    Example:
        >>> from torchconv.analysis.patternnet import fit_head
        >>> maps, labels = torch.rand(40, 6, 5, 5), torch.arange(40) % 2
        >>> maps[labels == 1, 2:4, 1, 1] += 2  # two filters that fire together in class 1
        >>> head = fit_head(respond(maps)[0], labels, 2)
        >>> mine_patterns(maps, labels, head, quantile=0.97, sizes=(2, 3)).of(1)[0].filters
        (2, 3)

    Reference: arXiv 1703.06339, section 3.
    """
    _check(maps, labels, head)
    check(1 <= sizes[0] <= sizes[1], "sizes", sizes, "must be the fewest and the most filters of a set, at least 1")
    thresholds = binarise_thresholds(maps, quantile)
    chosen = [sorted(f) for f in class_filters(head.fc.weight, k, positive_only)]
    used = sorted(set().union(*chosen))
    if not used:
        return Mining([], thresholds)
    bits = pack_maps(maps, thresholds, used)
    row = {n: i for i, n in enumerate(used)}
    host = labels.cpu()
    ranked: dict[int, list[Pattern]] = {}
    for c, filters in enumerate(chosen):
        own = bits[[row[n] for n in filters]][:, (host == c).numpy()]
        sets = [s for s in frequent_sets(own, filters, min_support, sizes[1]) if len(s) >= sizes[0]]
        if not sets:
            continue
        shown = torch.stack([torch.from_numpy(present(bits, [row[n] for n in s])) for s in sets], 1)
        shares = supports(shown, host, len(chosen)).tolist()
        made = [Pattern(s, c, len(s), tuple(share)) for s, share in zip(sets, shares, strict=True)]
        ranked[c] = sorted(made, key=lambda p: (-p.support * p.confidence, len(p.filters), p.filters))[:CANDIDATES]
    if max_overlap < 1:
        candidates = {c: [p.filters for p in found] for c, found in ranked.items()}
        kept = distinct_sets(maps, labels, thresholds, candidates, geometry, max_overlap)
        ranked = {c: [found[i] for i in kept[c]] for c, found in ranked.items()}
    return Mining([p for found in ranked.values() for p in found], thresholds)


def _check(maps: Maps, labels: Tensor, head: PatternNetHead) -> None:
    classes = head.fc.out_features
    ok = labels.dim() == 1 and len(labels) == len(maps) and not labels.is_floating_point()
    check(ok, "labels", tuple(labels.shape), f"must be {len(maps)} integers, one an image")
    ends = (int(labels.min()), int(labels.max())) if len(labels) else (0, -1)
    check(0 <= ends[0] <= ends[1] < classes, "labels", ends, f"must run from 0 to {classes - 1}, the head's classes")


def largest_responses(maps: Maps) -> Tensor:
    """Largest response of every filter in every image, (B, N)."""
    return torch.cat([respond(batch)[0] for batch in batches(maps)])


def bag_of_patterns(maps: Maps, mining: Mining, binary: bool = False) -> Tensor:
    """An image as the scores of all patterns, of length one.

    Args:
        maps: (B, N, \\*spatial) after the ReLU.
        mining: of :func:`mine_patterns` or :func:`basic_patterns`.
        binary: whether a pattern is present instead of its score.

    Shape:
        → (B, P); zeros where an image shows no pattern
    """
    found = mining.locate(maps)
    return nn.functional.normalize(found.present.float() if binary else found.score.float(), dim=1)


def classify_by_patterns(
    bag: Tensor, labels: Tensor, test_bag: Tensor, test_labels: Tensor, strength: float = 10.0
) -> float:
    """Accuracy of a linear classifier on bags of patterns: what the patterns know of the classes.

    Args:
        bag: (B, P), of :func:`bag_of_patterns`; any other features serve as well.
        labels: (B,), at least two classes.
        test_bag: (T, P), of images that took no part in mining.
        test_labels: (T,).
        strength: inverse of the quadratic penalty.

    Returns:
        Share of the test images classified rightly.
    """
    linear = require("sklearn.linear_model", "compare")
    check(len(labels.unique()) > 1, "labels", labels.unique().tolist(), "a classifier needs at least two classes")
    check(bag.shape[1] > 0, "bag", tuple(bag.shape), "there is no pattern; lower min_support or the quantile")
    model = linear.LogisticRegression(C=strength, max_iter=2000)
    model.fit(bag.cpu().double().numpy(), labels.cpu().numpy())
    return float(model.score(test_bag.cpu().double().numpy(), test_labels.cpu().numpy()))
