"""HRVMamba's networks: published sizes, resolutions, checkpoints, training, export; points on heatmaps by loops."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.ops.harness import randomise
from tests.parity.core import Case, run_case
from torchconv.models import create_model
from torchconv.models.classify.hrvmamba import VARIANTS, HRVMamba, convert_name
from torchconv.models.classify.hrvmamba_block import DVSSBlock
from torchconv.models.classify.hrvmamba_cost import published_flops
from torchconv.models.detect.hrvmamba import (
    HRVMambaPose,
    average_with_mirrored,
    decode_heatmaps,
    keypoint_heatmaps,
    keypoint_loss,
    pck,
)
from torchconv.surgery import merge
from torchconv.training import param_groups
from torchconv.weights import load, load_into, load_official, save

# name: parameters, those of the backbone; the table's operations in units of 10⁹ and the side of the image
PUBLISHED = {
    "hrvmamba_n": (12_284_240, 687_336, 1.9, 256),
    "hrvmamba_t": (14_066_728, 2_361_024, 2.8, 256),
    "hrvmamba_s": (20_101_976, 8_178_672, 5.8, 256),
    "hrvmamba_b": (60_548_520, 47_972_416, 15.8, 224),
}
SMALL: dict[str, Any] = {"channels": (8, 12, 16, 20), "stage1_channels": 4, "stage1_blocks": 1, "stem_channels": 6}
SMALL |= {"modules": (1, 1, 1), "blocks": 1}
TWO: dict[str, Any] = {**SMALL, "channels": (8, 12), "modules": (1,), "dense": True}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    whole, backbone, operations, side = PUBLISHED[name]
    with torch.device("meta"):
        net = create_model(name)
    assert parameters(net) == whole
    assert whole - parameters(net.fuse_scales) - parameters(net.head) == backbone
    assert set(VARIANTS) == set(PUBLISHED)
    if name == "hrvmamba_b":  # the others: 1.90, 2.78, 5.73
        assert published_flops(net, (side, side)) / 1e9 == pytest.approx(operations, rel=0.015)


def test_any_size_gives_halves_rounded_up() -> None:
    net = randomise(HRVMamba(**SMALL, dense=True)).eval()
    assert not any(n.startswith(("fuse_scales", "head")) for n in net.state_dict())
    for height, width in ((33, 50), (1, 1), (70, 7)):
        maps = net(torch.randn(2, 3, height, width))
        assert [tuple(y.shape) for y in maps] == [
            (2, c, math.ceil(height / s), math.ceil(width / s))
            for c, s in zip(SMALL["channels"], (4, 8, 16, 32), strict=True)
        ]
    assert net(torch.randn(0, 3, 32, 32))[3].shape == (0, 20, 1, 1)
    assert HRVMamba(**SMALL, num_classes=3).eval()(torch.randn(0, 3, 32, 32)).shape == (0, 3)


def test_classifier_joins_the_maps() -> None:
    net = randomise(HRVMamba(**SMALL, num_classes=4)).eval()
    x = torch.randn(1, 3, 40, 33)
    maps = net.forward_maps(x)
    join: Any = net.fuse_scales
    total = join.increase_layers[0](maps[0])
    for i in (1, 2, 3):
        block = join.downsample_layers[i - 1]
        total = F.relu(block.bn(F.conv2d(total, block.conv.weight, stride=2, padding=1))) + join.increase_layers[i](
            maps[i]
        )
    torch.testing.assert_close(net(x), net.head(join.final_layer(total).mean((2, 3))))
    for y, e in zip(net.forward_intermediates(x, indices=(0, 2), intermediates_only=True), maps[::2], strict=True):
        assert torch.equal(y, e)


def test_stages_follow_one_another() -> None:
    net = HRVMamba(**{**SMALL, "channels": (16, 12, 8, 4), "modules": (2, 1, 3), "blocks": (1, (1, 2, 1), 2)})
    assert isinstance(net.transition1[0], nn.Identity)  # four times stage1_channels already
    assert [len(b) for b in net.stage3[0].branches] == [1, 2, 1]
    assert len(net.stage4) == 3
    assert [info["module"] for info in net.feature_info] == [f"stage4.2.fuse_layers.{i}" for i in range(4)]
    assert all(net.get_submodule(info["module"]) is not None for info in net.feature_info)


def test_drop_path_rises_over_the_stages() -> None:
    net = HRVMamba(**{**SMALL, "modules": (1, 2, 1), "blocks": 2}, drop_path_rate=0.7)
    first = [m.branches[0] for stage in (net.stage2, net.stage3, net.stage4) for m in stage]
    assert [b.drop_path.rate for blocks in first for b in blocks] == pytest.approx([0.1 * i for i in range(8)])
    last = net.stage4[0].branches[3]
    assert [b.drop_path.rate for b in last] == pytest.approx([0.6, 0.7])


def test_start_and_decay() -> None:
    net = HRVMamba(**{**SMALL, "channels": (32, 32, 32, 32)}, num_classes=50)
    for layer in (m for m in net.modules() if isinstance(m, nn.Linear)):
        assert layer.weight.abs().max() < 0.12
        assert layer.bias is None or not layer.bias.any()
    assert net.head.weight.std().item() == pytest.approx(0.02, rel=0.02)
    named = {id(p): n for n, p in net.named_parameters()}
    free = {named[id(p)] for g in param_groups(net, 0.1, 0.05) if g["weight_decay"] == 0 for p in g["params"]}
    spared = {n for n in named.values() if n.endswith(("A_logs", "Ds"))}
    assert len(spared) == 2 * sum(isinstance(m, DVSSBlock) for m in net.modules())
    assert spared <= free
    assert net.no_weight_decay() == spared
    groups = net.group_matcher()
    assert [pattern[1] for pattern in groups["blocks"]] == [(0,), (1,), (2,), (3,)]


def test_recomputation_gives_the_same_gradients() -> None:
    net = randomise(HRVMambaPose(3, **TWO, drop_path_rate=0.5))
    twin = copy.deepcopy(net)
    twin.set_grad_checkpointing()
    x, found = torch.randn(4, 3, 24, 20), []
    for model in (net, twin):
        torch.manual_seed(1)
        model(x).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    assert all(a is not None for a in found[0])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def theirs(net: nn.Module, prefix: str = "", necks: str = "neck.") -> dict[str, Tensor]:
    """The state under the names of the authors' files, 1 × 1 maps as convolutions."""
    maps = ("in_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight", "se.fc.0.weight", "se.fc.2.weight")
    state = {n.replace("fuse_scales.", necks): t for n, t in net.state_dict().items()}
    return {prefix + n: t[:, :, None, None] if n.endswith(maps) else t for n, t in state.items()}


def test_authors_files(tmp_path: Path) -> None:
    few: dict[str, Any] = {"modules": (1, 1, 1), "blocks": 1}
    net = randomise(create_model("hrvmamba_n", num_classes=5, in_chans=2, **few)).eval()
    x = torch.randn(1, 2, 32, 40)
    torch.save({"model": theirs(net)}, tmp_path / "a.pth")
    loaded: Any = load_official("hrvmamba_n", tmp_path / "a.pth", **few)
    with torch.no_grad():
        assert torch.equal(loaded(x), net(x))
        state = {n: t for n, t in theirs(net).items() if not n.startswith(("neck.", "head."))}
        torch.save({"state_dict": {f"backbone.{n}": t for n, t in state.items()}}, tmp_path / "b.pth")
        for y, e in zip(load_official("hrvmamba_n", tmp_path / "b.pth", **few)(x), net.forward_maps(x), strict=True):
            assert torch.equal(y, e)
    with pytest.raises(ValueError, match="does not fit"):
        load_official("hrvmamba_t", tmp_path / "b.pth", **few)
    assert convert_name("neck.downsample_layers.1.0.weight") == "fuse_scales.downsample_layers.1.conv.weight"
    assert convert_name("head.fc.bias") == "head.bias"


def test_files_of_poses(tmp_path: Path) -> None:
    few: dict[str, Any] = {"modules": (1, 1, 1), "blocks": 1}
    net = randomise(create_model("hrvmamba_pose_t", joints=6, **few)).eval()
    state = theirs(net.backbone, "backbone.")
    state |= {f"keypoint_head.{n}": t for n, t in net.state_dict().items() if n.startswith("final_layer")}
    torch.save({"state_dict": state}, tmp_path / "pose.pth")
    loaded = load_official("hrvmamba_pose_t", tmp_path / "pose.pth", **few)
    x = torch.randn(1, 3, 32, 24)
    with torch.no_grad():
        assert torch.equal(loaded(x), net(x))
    assert loaded(x).shape == (1, 6, 8, 6)
    # a backbone that gives all maps, as trained on ImageNet, starts one that gives the finest
    donor = HRVMamba(**{**TWO, "multiscale_output": True})
    pose = HRVMambaPose(2, **TWO)
    report = load_into(pose.backbone, donor.state_dict(), strict=False)
    assert report.missing == []
    assert all(".fuse_layers.1." in n for n in report.unexpected)


def test_features_saved_copied_and_pickled(tmp_path: Path) -> None:
    net = randomise(create_model("hrvmamba_n", **TWO)).eval()
    x = torch.randn(1, 3, 20, 24)
    features = create_model("hrvmamba_n", **TWO, features_only=True, out_indices=(1,))
    assert features.feature_info.channels() == [12]
    assert features(x)[0].shape == (1, 12, 3, 3)
    save(net, tmp_path / "net")
    for twin in (load(tmp_path / "net"), copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert all(torch.equal(y, e) for y, e in zip(twin(x), net(x), strict=True))


def test_merged_channels_last_and_half_precision() -> None:
    net = randomise(HRVMambaPose(3, **TWO)).eval()
    x = torch.randn(2, 3, 24, 20)
    with torch.no_grad():
        expected = net(x)
        fast = merge(net, x)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in fast.modules())
        torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        last = copy.deepcopy(net).to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
        torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        assert net.bfloat16()(x.bfloat16()).isfinite().all()


def test_exports_with_any_batch() -> None:
    net = randomise(HRVMamba(**TWO)).eval()
    batch = {0: torch.export.Dim("batch", min=1, max=8)}
    program = torch.export.export(net, (torch.randn(2, 3, 10, 8),), dynamic_shapes=(batch,)).module()
    x = torch.randn(3, 3, 10, 8)
    for y, e in zip(program(x), net(x), strict=True):
        torch.testing.assert_close(y, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("channels", {"channels": (8, 10, 16, 20)}),
        ("channels", {"channels": (8,)}),
        ("modules", {"modules": (1, 1)}),
        ("blocks", {"blocks": (1, 1)}),
        ("blocks", {"blocks": 0}),
        ("stage1_channels", {"stage1_channels": 0}),
        ("drop_path_rate", {"drop_path_rate": 1.0}),
        ("multiscale_output", {"multiscale_output": False}),
        ("global_pool", {"global_pool": "sum"}),
        ("x of shape", {}),
    ],
)
def test_refusals(argument: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{argument}"):
        HRVMamba(**{**SMALL, **options})(torch.zeros(1, 3, 0, 8))


@pytest.mark.parametrize("local", [False, True])
def test_parity_of_other_networks(local: bool) -> None:
    options = {"channels": (80, 8, 4), "modules": (2, 1), "blocks": (1, (1, 2, 1)), "in_chans": 2, "local": local}
    net = HRVMamba(**{**SMALL, **options, "mlp_ratio": 1.3, "states": 2, "rank": 3, "gated": True}, num_classes=3)
    randomise(net).double().eval()
    x = torch.randn(1, 2, 20, 12, dtype=torch.float64)
    y = net(x)
    name = "fuse_scales.increase_layers.1.0.conv1.weight"
    (grad,) = torch.autograd.grad(y.sum(), dict(net.named_parameters())[name])
    inputs = {"x": x, "cotangent": torch.ones_like(y)}
    grads = {name.replace("fuse_scales.", "neck."): grad}
    case = Case("hrvmamba", "made", {}, "", "eval", "", None, None, theirs(net), inputs, {"y": y.detach()}, grads)
    assert all(t.passed for t in run_case(case))
    single = HRVMamba(**{**SMALL, **options, "dense": True, "multiscale_output": False}).double().eval()
    outputs = {"y": single(x)[0].detach()}
    case = Case("hrvmamba", "made", {}, "", "eval", "", None, None, theirs(single), {"x": x}, outputs, {})
    assert all(t.passed for t in run_case(case))


def test_parity_of_poses() -> None:
    net = randomise(HRVMambaPose(3, **TWO)).double().eval()
    x = torch.randn(1, 3, 20, 12, dtype=torch.float64)
    y = net(x)
    names = ("backbone.layer1.0.conv1.weight", "final_layer.bias")
    grads = torch.autograd.grad(y.sum(), [dict(net.named_parameters())[n] for n in names])
    state = theirs(net.backbone, "backbone.") | {
        f"keypoint_head.{n}": t for n, t in net.state_dict().items() if n.startswith("final_layer")
    }
    case = Case(
        "hrvmamba",
        "made",
        {},
        "",
        "eval",
        "",
        None,
        None,
        state,
        {"x": x, "cotangent": torch.ones_like(y)},
        {"y": y.detach()},
        dict(zip((names[0], f"keypoint_head.{names[1]}"), grads, strict=True)),
    )
    assert all(t.passed for t in run_case(case))


def test_heatmaps_by_loops() -> None:
    points = torch.tensor([[[9.0, 21.0], [-3.0, 2.0], [58.0, 1.0], [200.0, 3.0]]])
    maps, weights = keypoint_heatmaps(points, (11, 15), (4.0, 5.0), 1.0, torch.tensor([[1.0, 1.0, 0.0, 1.0]]))
    assert weights.tolist() == [[1.0, 1.0, 0.0, 0.0]]
    for k, (x, y) in enumerate(points[0].tolist()):
        mu = (int(x / 4 + 0.5), int(y / 5 + 0.5))
        for row in range(11):
            for column in range(15):
                near = max(abs(column - mu[0]), abs(row - mu[1])) <= 3 and weights[0, k] > 0
                value = math.exp(-((column - mu[0]) ** 2 + (row - mu[1]) ** 2) / 2) if near else 0.0
                assert maps[0, k, row, column].item() == pytest.approx(value, abs=1e-6)


def test_decoding_undoes_the_targets() -> None:
    points = torch.randint(5, 40, (3, 7, 2)).float() * 4
    maps, _ = keypoint_heatmaps(points, (48, 50))
    found, scores = decode_heatmaps(maps)
    assert torch.equal(found, points)
    assert torch.equal(scores, torch.ones(3, 7))
    lopsided = maps + 0.01 * maps.roll(1, 3) - 0.01 * maps.roll(1, 2)
    shifted, _ = decode_heatmaps(lopsided)
    assert (shifted - points).unique(dim=1).tolist()[0] == [[1.0, -1.0]]
    assert torch.equal(decode_heatmaps(lopsided, shift=False)[0], points)
    assert decode_heatmaps(torch.zeros(1, 1, 3, 3))[0].tolist() == [[[-4.0, -4.0]]]


def test_mirrored_maps_and_correct_points() -> None:
    maps, mirrored = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    y = average_with_mirrored(maps, mirrored, [(0, 2)], shift=False)
    torch.testing.assert_close(y[:, 0], (maps[:, 0] + mirrored[:, 2].flip(2)) / 2)
    torch.testing.assert_close(y[:, 1], (maps[:, 1] + mirrored[:, 1].flip(2)) / 2)
    moved = average_with_mirrored(maps, mirrored, [(0, 2)])
    torch.testing.assert_close(moved[..., 1:], (maps[..., 1:] + mirrored[:, [2, 1, 0]].flip(3)[..., :-1]) / 2)
    predicted = torch.tensor([[[3.0, 4.0], [0.0, 0.0], [9.0, 0.0]], [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]])
    shares, mean = pck(predicted, torch.zeros(2, 3, 2), torch.tensor([10.0, 1.0]), 0.5)
    assert shares.tolist() == [0.5, 1.0, 0.5]  # a distance of half the length is too far
    assert mean.item() == pytest.approx(2 / 3)
    shares, mean = pck(
        predicted, torch.zeros(2, 3, 2), torch.tensor([[10.0, 10.0]] * 2), 0.6, torch.tensor([[1, 0, 0]] * 2)
    )
    assert shares[0] == 1
    assert shares[1:].isnan().all()
    assert mean == 1
    with pytest.raises(ValueError, match="pairs="):
        average_with_mirrored(maps, mirrored)
    for call in (
        lambda: keypoint_heatmaps(torch.zeros(2, 3), (4, 4)),
        lambda: keypoint_heatmaps(torch.zeros(1, 3, 2), (4, 4), visible=torch.ones(3, 1)),
        lambda: keypoint_loss(maps, maps[:1]),
        lambda: decode_heatmaps(maps[0]),
        lambda: pck(predicted, predicted[:1], 1.0),
        lambda: pck(predicted, predicted, torch.ones(3)),
    ):
        with pytest.raises(ValueError, match="of shape"):
            call()


def test_poses_are_learnt() -> None:
    net = HRVMambaPose(2, **TWO)
    x = torch.zeros(8, 3, 32, 32)
    points = torch.randint(1, 7, (8, 2, 2)).float() * 4
    for n in range(8):
        for k in range(2):
            column, row = points[n, k].int().tolist()
            x[n, k, row - 2 : row + 3, column - 2 : column + 3] = 1.0
    targets, weights = keypoint_heatmaps(points, (8, 8), sigma=1.0)
    optimizer, losses = torch.optim.AdamW(param_groups(net, 1e-2, 0.01)), []
    for _ in range(25):
        loss = keypoint_loss(net(x), targets, weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    found, scores = net.eval().predict(x, pairs=None)
    assert found.shape == (8, 2, 2)
    assert scores.shape == (8, 2)
    assert pck(found, points, 32.0, 0.25)[1] > 0.5
