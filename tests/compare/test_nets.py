"""The networks of a comparison: sizes known from the literature, every operator, equal budgets."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchconv.catalog import operators
from torchconv.compare.match import TOLERANCE, macs_of, parameters_of, solve
from torchconv.compare.nets import Shape, make_candidate, make_net
from torchconv.surgery.merging import merge, stored_parameters

SMALL = Shape(3, (32, 32), 10)


def test_resnet_is_resnet20() -> None:
    net, conv = make_net("resnet"), make_candidate("conv")
    # He et al. 2016: 0.27 M; with option-A shortcuts and plain batch norms exactly:
    assert parameters_of(net, conv, SMALL, 16, 64) == 269_722
    assert macs_of(net, conv, SMALL, 16, 64) == 40_551_040


@pytest.mark.parametrize("net", ["mini:depth=1", "resnet:blocks=1"])
@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("op", sorted(operators()))
def test_every_operator_in_every_net(op: str, ndim: int, net: str) -> None:
    candidate, family = make_candidate(op), make_net(net)
    shape = Shape(2, {1: (20,), 2: (9, 8), 3: (5, 5, 4)}[ndim], 3)
    if ndim not in operators()[op].dims:
        with pytest.raises(ValueError, match="ndim"):
            family.build(candidate, shape, 16, 32)
        return
    width = family.width(candidate, shape)
    model = family.build(candidate, shape, width, family.fine(width)).eval()
    x = torch.randn(2, 2, *shape.size)
    y = model(x)
    assert y.shape == (2, 3)
    merged = merge(model, x)
    assert torch.allclose(merged(x), y, atol=1e-4)
    assert stored_parameters(model) <= sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("match", ["params", "macs"])
@pytest.mark.parametrize("op", ["depthwise", "dilated", "dcls", "inceptionnext", "lsnet", "unireplknet", "atconv"])
def test_budgets_are_equal_within_two_per_cent(op: str, match: str) -> None:
    net, shape = make_net("mini:depth=2"), Shape(1, (16, 16), 10)
    baseline, candidate = make_candidate("conv"), make_candidate(op)
    found = solve(match, net, baseline, candidate, shape)
    cost = {"params": parameters_of, "macs": macs_of}[match]
    assert found.target == cost(net, baseline, shape, 32, 64)
    assert found.achieved == cost(net, candidate, shape, found.width, found.fine)
    assert abs(found.relative_error) <= TOLERANCE
    # Near the nominal proportions, so that the comparison is one of operators and not of MLPs.
    assert 0.8 < found.fine / net.fine(found.width) < 1.25


def test_baseline_keeps_its_size_and_none_changes_nothing() -> None:
    net, shape, conv = make_net("mini"), Shape(1, (8, 8), 10), make_candidate("conv")
    assert solve("params", net, conv, conv, shape).width == 32
    found = solve("none", net, conv, make_candidate("depthwise"), shape)
    assert (found.width, found.fine) == (32, 64)


def test_latency_is_matched_by_measurement() -> None:
    net, shape = make_net("mini:depth=1:base=8"), Shape(1, (8, 8), 10)
    found = solve("latency", net, make_candidate("conv"), make_candidate("conv:kernel_size=1"), shape, batch=2)
    assert found.target == 1.0
    assert found.achieved > 0
    assert found.width >= 1


def test_timm_model_gets_the_operator() -> None:
    net, shape = make_net("timm:convnext_atto"), Shape(3, (32, 32), 5)
    plain = net.build(make_candidate("depthwise"), shape, 100, 100)
    eca = net.build(make_candidate("eca"), shape, 100, 100)
    names = {type(m).__name__ for m in eca.modules()}
    assert "ECAConv2d" in names
    assert eca(torch.randn(1, 3, 32, 32)).shape == (1, 5)
    assert not [m for m in plain.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    half = net.build(make_candidate("depthwise"), shape, 50, 50)
    assert sum(p.numel() for p in half.parameters()) < 0.35 * sum(p.numel() for p in plain.parameters())


def test_strides_of_a_timm_resnet_are_kept() -> None:
    model = make_net("timm:resnet18").build(make_candidate("inceptionnext"), Shape(3, (64, 64), 5), 100, 100)
    assert model.forward_features(torch.randn(1, 3, 64, 64)).shape[2:] == (2, 2)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("big", "mini, resnet or timm"),
        ("mini:deep=3", "depth"),
        ("mini:depth=x", "number"),
        ("mini:depth=0", "positive"),
        ("timm:", "timm model"),
    ],
)
def test_bad_nets_are_refused(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_net(spec)


def test_unknown_timm_model_suggests_names() -> None:
    with pytest.raises(ValueError, match="convnext_atto"):
        make_net("timm:convnext_atom").build(make_candidate("conv"), SMALL, 100, 100)


@pytest.mark.parametrize(
    ("spec", "message"),
    [("dlcs", "did you mean"), ("dcls:kernel_size", "name=value"), ("dcls:kernelsize=3", "kernel_size")],
)
def test_bad_candidates_are_refused(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_net("mini").build(make_candidate(spec), Shape(1, (8, 8), 10), 8, 16)


def test_candidates_have_labels_and_folders() -> None:
    candidate = make_candidate("dcls:kernel_size=9:version='v1'")
    assert dict(candidate.options) == {"kernel_size": 9, "version": "v1"}
    assert candidate.label == "dcls:kernel_size=9:version=v1"
    assert set(candidate.slug) & set("/:\\ ") == set()


def test_separable_keeps_its_cheaper_form() -> None:
    net, shape = make_net("mini:depth=1"), Shape(1, (16, 16), 10)
    model = net.build(make_candidate("separable"), shape, 32, 64).eval()
    merged = merge(model, torch.randn(1, 1, 16, 16))
    assert any(type(m).__name__ == "SeparableConv2d" for m in merged.modules())
    assert not any(type(m).__name__ == "SeparableConv2d" for m in merge(model).modules())
