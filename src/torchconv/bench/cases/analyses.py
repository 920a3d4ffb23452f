"""Analyses: what is computed from the maps and weights of a trained network."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from torchconv.analysis.offtheshelf import spatial_search
from torchconv.analysis.patternnet import binarise_thresholds, locate
from torchconv.bench.cases import Case, Place, case


@case("pattern-thresholds")
def pattern_thresholds(place: Place) -> Iterator[Case]:
    """Every filter's quantile over images and positions: the largest tenth selected, against ``torch.quantile``."""
    x = place.randn(64, 256, 7, 7).relu()

    def eager(x: Tensor) -> Tensor:
        return x.transpose(0, 1).flatten(1).quantile(0.9, dim=1)

    yield Case("64×256×7²", binarise_thresholds, (x,), eager, backward=False)


@case("pattern-mining")
def pattern_mining(place: Place) -> Iterator[Case]:
    """Places of patterns in images, all at once, against one pattern after another."""
    x = place.randn(64, 256, 7, 7).relu()
    thresholds = binarise_thresholds(x)
    sets = [tuple(range(i, i + 3)) for i in range(0, 240, 5)]

    def ours(x: Tensor) -> Tensor:
        return locate(x, thresholds, sets, 3).score

    def eager(x: Tensor) -> Tensor:
        fires = x > thresholds.view(-1, 1, 1)
        scores = []
        for chosen in sets:
            mean = x[:, chosen].mean(1)
            scores.append((mean * fires[:, chosen].all(1)).amax((1, 2)))
        return torch.stack(scores, 1)

    yield Case("64×256×7² P=48 k=3", ours, (x,), eager, backward=False)


@case("spatial-search")
def patch_search(place: Place) -> Iterator[Case]:
    """Distances of images by their nearest patches, block by block, against ``torch.cdist`` of all patches at once."""
    for n, p, m, r, d in ((16, 5, 256, 14, 512), (64, 14, 512, 30, 128)):
        query, reference = place.randn(n, p, d), place.randn(m, r, d)

        def ours(query: Tensor, reference: Tensor) -> Tensor:
            return spatial_search(query, reference).distance

        def eager(query: Tensor, reference: Tensor) -> Tensor:
            every = torch.cdist(query.flatten(0, 1), reference.flatten(0, 1))
            return every.view(*query.shape[:2], *reference.shape[:2]).amin(-1).mean(1)

        flops = 2 * n * p * m * r * d
        label = f"{n}×{p} in {m}×{r} patches, d={d}"
        yield Case(label, ours, (query, reference), eager, backward=False, flops=flops)
