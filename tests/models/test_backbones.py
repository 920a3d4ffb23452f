"""Every named network for images keeps the same contract, whatever its method."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from torchconv import catalog
from torchconv.models import create_model, list_models
from torchconv.models._backbone import Backbone, Features

NAMES = list_models(task="classify")
# The smallest of each method is run for real; the others only in shape.
SMALL = [
    "unireplknet_a",
    "inception_next_atto",
    "lsnet_t",
    "attnet_xxs",
    "eca_resnet18",
    "eca_mobilenet_v2",
    "convnext_dcls_mini",
    "spartan_s",
    "convfirstnet_tiny",
    "van_b0",
]


def build(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    size = {"img_size": 64} if name.startswith("lsnet") else {}
    return create_model(name, **size, **options)


def images(count: int = 2, channels: int = 3) -> torch.Tensor:
    return torch.randn(count, channels, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NAMES)
def test_shapes_without_memory(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name, num_classes=7)
    x = torch.empty(1, model.in_chans, 224, 224, device="meta")
    assert model.eval()(x).shape == (1, 7)
    assert model.torchconv_config == {"model": name, "options": {"num_classes": 7}}
    assert catalog.variant(name).summary.endswith(".")
    if isinstance(model, Backbone):
        for info, y in zip(model.feature_info, model.forward_intermediates(x, intermediates_only=True), strict=True):
            assert y.shape[1] == info["num_chs"]
            assert y.shape[2] == -(-224 // info["reduction"]), info


@pytest.mark.parametrize("name", SMALL)
def test_head(name: str) -> None:
    model, x = build(name, num_classes=5).eval(), images()
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape[:2] == (2, model.num_features)
        assert torch.equal(model.forward_head(features), model(x))
        assert model.get_classifier() is model.get_submodule(model.head_name)
        kept = model.forward_head(features, pre_logits=True)
        model.reset_classifier(0)
        assert torch.equal(model(x), kept)
        assert model.num_classes == 0
        model.reset_classifier(3, global_pool="max")
        assert model(x).shape == (2, 3)
        if features[0, 0].numel() > 1:
            assert not torch.equal(model.forward_head(features, pre_logits=True), kept)
    with pytest.raises(ValueError, match="global_pool"):
        model.reset_classifier(3, global_pool="sum")
    with pytest.raises(ValueError, match="num_classes"):
        model.reset_classifier(-1)


@pytest.mark.parametrize("name", SMALL)
def test_features(name: str) -> None:
    whole = build(name).eval()
    wanted = (1, len(whole.feature_info) - 1)
    parts = build(name, features_only=True, out_indices=(-1, 1)).eval()
    assert isinstance(parts, Features)
    assert parts.feature_info.channels() == [whole.feature_info[i]["num_chs"] for i in wanted]
    with torch.no_grad():
        maps = parts(images())
        final, expected = whole.forward_intermediates(images(), indices=wanted)
        early = whole.forward_intermediates(images(), indices=[0], stop_early=True, intermediates_only=True)
        last = whole.forward_intermediates(images(), indices=1, output_fmt="NHWC", intermediates_only=True)
        assert torch.equal(final, whole.forward_features(images()))
    for y, info, e in zip(maps, parts.feature_info.get_dicts(), expected, strict=True):
        assert torch.equal(y, e)
        assert y.shape == (2, info["num_chs"], *(-(-64 // info["reduction"]),) * 2)
    assert early[0].shape[1] == whole.feature_info[0]["num_chs"]
    assert last[0].shape[-1] == whole.feature_info[-1]["num_chs"]
    with pytest.raises(ValueError, match="out_indices"):
        build(name, features_only=True, out_indices=(9,))


@pytest.mark.parametrize("name", SMALL)
def test_recomputation_changes_nothing(name: str) -> None:
    model = build(name, num_classes=3)
    for module in model.modules():  # randomness and running statistics would tell the two passes apart
        if isinstance(module, nn.Dropout | nn.BatchNorm2d | nn.BatchNorm1d):
            module.eval()
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    model.training = twin.training = True
    for net in (model, twin):
        net(images()).square().sum().backward()
    for (n, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), n
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_options(name: str) -> None:
    model = build(name, in_chans=1, num_classes=0).eval()
    assert model.in_chans == 1
    with torch.no_grad():
        y = model(images(channels=1))
    assert y.shape[0] == 2
    assert y.dim() == 2
    with pytest.raises(ValueError, match="load_official"):
        build(name, pretrained=True)
    groups = model.group_matcher()
    assert {"stem", "blocks"} <= set(groups)
    assert model.no_weight_decay() <= {n for n, _ in model.named_parameters()}


def test_timm_sees_them() -> None:
    timm = pytest.importorskip("timm")
    assert set(timm.list_models("unireplknet*")) == set(list_models("unireplknet*"))
    model = timm.create_model("convnext_dcls_mini", num_classes=4, features_only=False)
    assert model(images()).shape == (2, 4)
    maps = timm.create_model("unireplknet_a", features_only=True, out_indices=(2, 3))(images())
    assert [m.shape[1] for m in maps] == [160, 320]


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="did you mean unireplknet_t"):
        create_model("unireplknet_tt")
    assert list_models("eca*", paper="eca")
    assert list_models(paper="lsnet") == ["lsnet_t", "lsnet_s", "lsnet_b"]
