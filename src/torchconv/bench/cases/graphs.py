"""Convolution on graphs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from torchconv.bench.cases import Case, Place, case
from torchconv.ops.higcn import petal_laplacians, polynomial_filter


@case("petal-filter")
def petal_filters(place: Place) -> Iterator[Case]:
    """Ten powers of a sparse propagation matrix, against the same with a dense one, as the authors keep it."""
    for nodes, edges in ((1000, 5000), (4000, 20000)):
        pairs = torch.randint(nodes, (2, edges))
        matrix = petal_laplacians(pairs, nodes, 1, dtype=place.dtype)[0].to(place.device)
        dense, x, weights = matrix.to_dense(), place.randn(nodes, 32), place.randn(11)

        def ours(x: Tensor, weights: Tensor, matrix: Tensor = matrix) -> Tensor:
            return polynomial_filter(x, matrix, weights)

        def eager(x: Tensor, weights: Tensor, dense: Tensor = dense) -> Tensor:
            return polynomial_filter(x, dense, weights)

        flops = 2 * 10 * len(matrix.values()) * 32
        yield Case(f"{nodes:,} nodes, {edges:,} edges, 32 features", ours, (x, weights), eager, flops=flops)
