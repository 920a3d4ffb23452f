"""Pruning: criteria that say which filters of a trained layer matter, the pull on scales, channels removed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv.bench.cases import Case, Place, case
from torchconv.compress.betarank import beta_rank
from torchconv.compress.masksparsity import sparsity_penalty
from torchconv.surgery import prune


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


@case("masksparsity")
def pull(place: Place) -> Iterator[Case]:
    """The penalty on the scales of 53 batch norms, as one tensor, against one norm after another."""
    sizes = [64, *[64, 64, 256] * 3, *[128, 128, 512] * 4, *[256, 256, 1024] * 6, *[512, 512, 2048] * 3]
    sizes += [256, 512, 1024, 2048]  # those of ResNet-50
    scales = tuple(place.randn(n) for n in sizes)
    keeps = [torch.arange(n, device=place.device) % 2 == 0 for n in sizes]
    together = torch.cat(keeps)

    def ours(*gammas: Tensor) -> Tensor:
        return sparsity_penalty(torch.cat(gammas), together, 0.5)

    def eager(*gammas: Tensor) -> Tensor:
        return torch.stack([0.5 * g[~keep].abs().sum() for g, keep in zip(gammas, keeps, strict=True)]).sum()

    yield Case("53 norms, 26,560 scales", ours, scales, eager, flops=2 * len(together))


@case("prune")
def removed(place: Place) -> Iterator[Case]:
    """Three convolutions without half of their channels, against the same with these silent."""
    for channels, side in ((64, 28), (256, 14)):
        layers: list[nn.Module] = []
        for into in (3, channels, channels):
            layers += [nn.Conv2d(into, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        net = place.put(nn.Sequential(*layers, nn.Conv2d(channels, 8, 1)))
        keep = torch.arange(channels, device=place.device) % 2 == 0
        for at in (1, 4, 7):
            with torch.no_grad():
                net[at].weight.mul_(keep)
        x = place.randn(8, 3, side, side)
        small = prune(net, {"1": keep, "4": keep, "7": keep}, x)
        yield Case(f"8×{channels}×{side}² half", small, (x,), net, backward=False)
