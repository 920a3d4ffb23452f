"""Pruning: criteria that say which filters of a trained layer matter."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from torchconv.bench.cases import Case, Place, case
from torchconv.compress.betarank import beta_rank


@case("beta-rank")
def ranks(place: Place) -> Iterator[Case]:
    """Scores of a layer's filters from its inputs and outputs, against deviations of unfolded patches."""

    def eager(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        patches = F.unfold(x, 3, padding=1)
        incoming = patches.transpose(0, 1).flatten(0, 1).std(0, correction=0)
        outgoing = y.std(0, correction=0).flatten(1)
        return weight.abs().mean((1, 2, 3)).double() * (outgoing / incoming).double().sum(1)

    for batch, channels, side in ((32, 32, 16), (64, 64, 32)):
        x, weight = place.randn(batch, channels, side, side), place.randn(channels, channels, 3, 3)
        inputs = (x, F.conv2d(x, weight, padding=1), weight)
        flops = 3 * (inputs[0].numel() + inputs[1].numel())
        label = f"{batch}×{channels}×{side}² k=3"
        yield Case(label, partial(beta_rank, padding=1), inputs, eager, backward=False, flops=flops)
