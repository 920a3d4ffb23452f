"""Analyses: what is computed from the maps and weights of a trained network."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from torchconv.analysis._filters_size import receptive_fields
from torchconv.analysis.cka import Reduction, compare_layers
from torchconv.analysis.count import count
from torchconv.analysis.filterdb import quality
from torchconv.analysis.offtheshelf import spatial_search
from torchconv.analysis.patternnet import binarise_thresholds, locate
from torchconv.bench.cases import Case, Place, case, installed


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


@case("filter-quality")
def filter_quality(place: Place) -> Iterator[Case]:
    """All metrics of a layer's filters, against the same in NumPy."""
    for filters in (64, 512):
        weight = place.randn(filters, filters, 3, 3)

        def ours(weight: Tensor) -> Tensor:
            found = quality(weight)
            entropies = [found.variance_entropy, found.variance_entropy_clean]
            norms = [found.norm_l2, found.norm_l1, found.norm_l2_norm, found.norm_l1_norm]
            return torch.tensor([found.sparsity, *entropies, found.orthogonality, *(n / found.n for n in norms)])

        def eager(weight: Tensor) -> Tensor:
            array = weight.double().cpu().numpy()
            rows, outputs = array.reshape(-1, 9), array.reshape(len(array), -1)
            sparse = np.abs(rows).max(1) < 0.01 * np.abs(rows).max()
            outputs = outputs / np.linalg.norm(outputs, axis=1, keepdims=True)
            apart = np.abs(outputs @ outputs.T - np.eye(len(outputs))).sum() / (len(outputs) * (len(outputs) - 1))
            normal = (rows - rows.mean()) / rows.std(ddof=1)
            norms = [f(v) / len(rows) for v in (rows, normal) for f in (np.linalg.norm, lambda v: np.abs(v).sum())]
            return torch.tensor([sparse.mean(), _entropy(rows), _entropy(rows[~sparse]), 1 - apart, *norms]).float()

        yield Case(f"{filters * filters:,} filters 3²", ours, (weight,), eager, backward=False, flops=0)


def _entropy(rows: Any) -> Any:
    values = np.linalg.svd(rows - rows.mean(0), full_matrices=False)[1] ** 2
    shares = values / values.sum()
    return -(shares * np.log10(shares)).sum()


@case("cka")
def layer_table(place: Place) -> Iterator[Case]:
    """CKA of all pairs of layers over minibatches, against the Gram matrices of each pair made anew."""
    depth, batch = 8, 32
    net, other = _stack(place, depth), _stack(place, depth)
    x = place.randn(64, 3, 16, 16)
    names = [str(2 * i) for i in range(depth)]

    def ours(x: Tensor) -> Tensor:
        reduction = Reduction("flatten")
        return compare_layers(net, other, x, names, names, reduction=reduction, batch_size=batch).values

    def eager(x: Tensor) -> Tensor:
        sums = x.new_zeros(3, depth, depth, dtype=torch.float64)
        for images in x.split(batch):
            first, second = (_features(n, images) for n in (net, other))
            for i, a in enumerate(first):
                for j, b in enumerate(second):
                    k, m = _similarities(a), _similarities(b)
                    sums[:, i, j] += torch.stack([_hsic(k, m), _hsic(k, k), _hsic(m, m)])
        return sums[0] / (sums[1] * sums[2]).sqrt()

    yield Case(f"64×3×16² {depth}×{depth} layers", ours, (x,), eager, backward=False, flops=0)


@case("count")
def counting(place: Place) -> Iterator[Case]:
    """Multiply-adds of a network, with what every module does, against PyTorch's own counter and published ones."""
    net, x = _stack(place, 12), place.randn(1, 3, 32, 32)

    def ours(x: Tensor) -> Tensor:
        return torch.tensor(float(count(net, x).macs))

    def eager(x: Tensor) -> Tensor:
        with FlopCounterMode(display=False) as counter:
            net(x)
        return torch.tensor(counter.get_total_flops() / 2)

    def fvcore(x: Tensor) -> Tensor:
        return torch.tensor(float(_package("fvcore.nn").FlopCountAnalysis(net, x).total()))

    def torchinfo(x: Tensor) -> Tensor:
        found = _package("torchinfo").summary(net, input_data=x, verbose=0)
        return torch.tensor(float(found.total_mult_adds))

    yield Case("12 convolutions", ours, (x,), eager, backward=False, flops=0)
    for name, form in (("fvcore", fvcore), ("torchinfo", torchinfo)):
        yield Case(f"12 convolutions, {name}", ours, (x,), None, {name: form}, alike=False, backward=False, flops=0)


@case("receptive-field")
def fields(place: Place) -> Iterator[Case]:
    """Receptive field of every layer, measured, against a forward and backward pass for each layer."""
    net, side = _stack(place, 8).double(), 40
    names = [str(2 * i) for i in range(8)]
    x = torch.ones(1, 3, side, side, dtype=torch.float64, device=place.device)

    def ours(x: Tensor) -> Tensor:
        found = receptive_fields(net, tuple(x.shape[1:]), names)
        return torch.tensor([field.size for field in found.values()])

    def eager(x: Tensor) -> Tensor:
        sizes = []
        for name in names:
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                y = net[: int(name) + 1](leaf)
                y[..., y.shape[-2] // 2, y.shape[-1] // 2].sum().backward()
            assert leaf.grad is not None
            seen = leaf.grad.abs().sum((0, 1)).nonzero()
            sizes.append((seen.amax(0) - seen.amin(0) + 1).cpu())
        return torch.stack(sizes)

    yield Case(f"8 layers, {side}²", ours, (x,), eager, backward=False, flops=0)


def _stack(place: Place, depth: int) -> Any:
    """Convolutions of 3 with smooth activations, whose gradients vanish nowhere."""
    layers: list[nn.Module] = []
    for index in range(depth):
        conv = nn.Conv2d(3 if index == 0 else 16, 16, 3, padding=1)
        nn.init.kaiming_normal_(conv.weight)
        layers += [conv, nn.Softplus()]
    return place.put(nn.Sequential(*layers))


def _features(net: Any, x: Tensor) -> list[Tensor]:
    found = []
    for layer in net:
        x = layer(x)
        if isinstance(layer, nn.Conv2d):
            found.append(x)
    return found


def _similarities(features: Tensor) -> Tensor:
    rows = features.flatten(1).double()
    return (rows @ rows.T).fill_diagonal_(0)


def _hsic(k: Tensor, m: Tensor) -> Tensor:
    """The unbiased estimate, from similarities without their diagonals."""
    n = len(k)
    both = k @ m
    rest = k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 * both.sum() / (n - 2)
    return (both.trace() + rest) / (n * (n - 3))


def _package(name: str) -> Any:
    if not installed(name.partition(".")[0]):
        raise RuntimeError(f"{name.partition('.')[0]} is not installed")
    return importlib.import_module(name)
