"""Filters kept by beta-rank: counts, ties, shared channels, removal from networks, the counts of the paper's VGG."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torchconv.analysis.count import count
from torchconv.compress.betarank import (
    BetaRank,
    filter_masks,
    keep_largest,
    normalise_ranks,
    select,
    union_fraction,
)
from torchconv.surgery.prune import channel_groups, prune


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_normalised_ranks() -> None:
    ranks = normalise_ranks(drawn(7))
    assert ranks.min() == 0
    assert ranks.max() == 1
    assert normalise_ranks(torch.full((3,), 5.0)).tolist() == [0, 0, 0]


@settings(max_examples=25, deadline=None)
@given(filters=st.integers(1, 40), rate=st.floats(0, 0.999), other=st.floats(0, 0.999), seed=st.integers(0, 99))
def test_kept_sets_are_nested(filters: int, rate: float, other: float, seed: int) -> None:
    ranks = drawn(filters, seed=seed).round(decimals=1)  # with ties
    few, many = (select({"a": ranks}, r)["a"].tolist() for r in (max(rate, other), min(rate, other)))
    assert set(few) <= set(many)
    assert few == sorted(few)
    assert len(few) == max(1, int(filters * (1 - max(rate, other))))
    assert min(ranks[few]) >= max([float(ranks[k]) for k in range(filters) if k not in few], default=-9.0)


def test_rates_by_layer() -> None:
    ranks = {"a": torch.arange(4.0), "b": torch.arange(10.0)}
    assert {n: len(k) for n, k in select(ranks, [0.5, 0.78]).items()} == {"a": 2, "b": 2}
    assert {n: k.tolist() for n, k in select(ranks, {"a": 0.75}).items()} == {"a": [3]}
    assert union_fraction([torch.tensor([0, 1]), torch.tensor([0, 1])], 8) == 0.25
    assert union_fraction(list(torch.arange(8).split(2)), 8) == 1


def vgg() -> nn.Sequential:
    """VGG-16 with batch norms for CIFAR: 13 convolutions, two linear layers."""
    layers: list[nn.Module] = []
    channels = 3
    for stage in ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3):
        for width in stage:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.MaxPool2d(2))
    layers[-1] = nn.AvgPool2d(2)
    layers += [nn.Flatten(), nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 10)]
    return nn.Sequential(*layers)


def test_counts_of_the_papers_vgg() -> None:
    model, example = vgg().eval(), torch.zeros(1, 3, 32, 32)
    assert round(count(model, example).macs / 1e6, 2) == 313.46
    ranks = BetaRank(model).collect([torch.rand(2, 3, 32, 32)])
    rates = [0.45] * 7 + [0.78] * 5 + [0.0]
    small = prune(model, filter_masks(ranks, rates, channel_groups(model, example)), example)
    parameters = [sum(p.numel() for p in m.parameters()) for m in (model, small)]
    assert [round(n / 1e6, 2) for n in parameters] == [14.99, 1.90]
    assert round(count(small, example).macs / 1e6, 2) == 66.52


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a, self.a_norm = nn.Conv2d(8, 10, 3, padding=1), nn.BatchNorm2d(10)
        self.b, self.b_norm = nn.Conv2d(10, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.bare, self.head = nn.Conv2d(8, 6, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(x)).relu()
        x = (x + self.b_norm(self.b(self.a_norm(self.a(x)).relu()))).relu()
        return self.head(self.bare(x).relu().mean((2, 3)))


@pytest.fixture
def residual() -> Residual:
    torch.manual_seed(0)
    model = Residual().double()
    for _ in range(3):
        model(drawn(8, 3, 8, 8))
    return model.eval()


def test_removed_filters_are_those_of_the_lowest_ranks(residual: Residual) -> None:
    x = drawn(6, 3, 8, 8, seed=4)
    ranks = BetaRank(residual).collect([x])
    groups = channel_groups(residual, x)
    masks = filter_masks(ranks, 0.5, groups)
    assert set(masks) == {"stem_norm", "a_norm", "b_norm"}
    assert masks["a_norm"].nonzero().flatten().tolist() == select(ranks, 0.5)["a"].tolist()
    added = keep_largest(ranks["stem"] + ranks["b"], 4)
    assert masks["stem_norm"].nonzero().flatten().tolist() == added.tolist()
    assert torch.equal(masks["stem_norm"], masks["b_norm"])
    silent = copy.deepcopy(residual)
    for name, mask in masks.items():
        norm: Any = silent.get_submodule(name)
        norm.weight.data[~mask] = 0
        norm.bias.data[~mask] = 0
    small = prune(residual, masks, x)
    torch.testing.assert_close(small(x), silent(x))
    assert not torch.allclose(small(x), residual(x))
    assert (small.stem.out_channels, small.a.out_channels, small.a.in_channels) == (4, 5, 4)


def test_shared_channels_take_the_smallest_rate(residual: Residual) -> None:
    x = drawn(6, 3, 8, 8)
    ranks, groups = BetaRank(residual).collect([x]), channel_groups(residual, x)
    assert set(filter_masks(ranks, {"a": 0.3, "stem": 0.5}, groups)) == {"a_norm"}
    masks = filter_masks(ranks, {"stem": 0.5, "b": 0.25}, groups)
    assert int(masks["stem_norm"].sum()) == 6
    assert filter_masks(ranks, 0.0, groups) == {}
    assert set(filter_masks({"stem": ranks["stem"]}, 0.5, groups)) == set()


@pytest.mark.parametrize(
    ("rates", "message"),
    [(1.0, "rates=1.0"), (-0.1, "rates=-0.1"), ([0.5], "one for each of the 2"), ({"c": 0.5}, "rates='c'")],
)
def test_bad_rates(rates: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select({"a": torch.arange(4.0), "b": torch.arange(4.0)}, rates)


def test_bad_counts() -> None:
    with pytest.raises(ValueError, match="count=5"):
        keep_largest(torch.arange(4.0), 5)
    with pytest.raises(ValueError, match="runs=0"):
        union_fraction([], 4)
    with pytest.raises(ValueError, match="available=2"):
        union_fraction([torch.tensor([2])], 2)
