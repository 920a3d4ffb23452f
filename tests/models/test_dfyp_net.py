"""DFYP's networks: published sizes, years, inference form, checkpoints, training, refusals, scores."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.ops.harness import randomise
from torchconv import param_groups, weights
from torchconv.models import create_model
from torchconv.models.forecast.dfyp import YEARS, DFYPNet, dfyp_modis
from torchconv.models.forecast.dfyp_scores import yield_loss, yield_scores
from torchconv.models.forecast.dfyp_sentinel import CROPS, SentinelDFYPNet, dfyp_sentinel2
from torchconv.models.forecast.dfyp_vit import ViT
from torchconv.surgery.merging import merge

MODIS: dict[str, Any] = {"widths": (6, 8, 8), "hidden": 12, "dim": 8, "depth": 1, "dim_head": 2, "mlp_dim": 12}
IMAGES: dict[str, Any] = {
    "widths": (4, 6),
    "image_size": 32,
    "dim": 12,
    "depth": 2,
    "dim_head": 2,
    "mlp_dim": 10,
}


def modis(**options: Any) -> Any:
    torch.manual_seed(0)
    return randomise(dfyp_modis(**{**MODIS, **options})).eval()


def images(**options: Any) -> Any:
    torch.manual_seed(0)
    return randomise(dfyp_sentinel2(**{**IMAGES, **options})).eval()


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "options", "parameters"),
    [
        ("dfyp_modis", {}, 26_790_713),
        ("dfyp_modis", {"time": 20}, 22_596_409),
        ("dfyp_sentinel2", {}, 1_381_007),
        ("dfyp_sentinel2", {"crop": "winter wheat"}, 1_381_007),
    ],
)
def test_published_sizes(name: str, options: dict[str, Any], parameters: int) -> None:
    with torch.device("meta"):
        net = create_model(name, **options)
    assert sum(p.numel() for p in net.parameters()) == parameters


def test_merged_network_loses_the_largest_layer() -> None:
    with torch.device("meta"):
        net = dfyp_modis()
        merged = net.merge()
    before, after = (sum(p.numel() for p in m.parameters()) for m in (net, merged))
    norms = 2 * sum(net.cnn_model.convblocks[i].conv.out_channels for i in range(6))
    assert before - after == 2048 * 8192 + 2048 + 2048 - 8192 + norms


def test_forward_by_hand() -> None:
    """The formula of the network, written out with PyTorch's own layers."""
    net, x = modis(table={2009: "scharr"}, default="sobel"), noise(2, 9, 20, 32)
    net = net.double()
    net.cnn_model.reduced = (10, 16)
    net.cnn_model.dense_layers[0] = nn.Linear(8 * 10 * 16, 12).double()
    x = x.double()
    down, up = net.se_block.fc[0].weight, net.se_block.fc[2].weight
    s = x * torch.sigmoid(F.relu(x.amax((2, 3)) @ down.T) @ up.T)[..., None, None]
    kernels = {"scharr": [[-3.0, 0, 3], [-10, 0, 10], [-3, 0, 3]], "sobel": [[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]}
    z = []
    for item, kind in zip(s, ("scharr", "sobel"), strict=True):
        k = torch.tensor(kernels[kind], dtype=torch.float64)
        gx, gy = (F.conv2d(item[:, None], w[None, None], padding=1)[:, 0] for w in (k, k.T))
        z.append((gx**2 + gy**2 + 1e-8).sqrt())
    share = net.cnn_model.operator_weight
    h = share * torch.stack(z) + (1 - share) * s
    for index, block in enumerate(net.cnn_model.convblocks):
        h = F.pad(h, (0, 1, 0, 1)) if index % 2 else F.pad(h, (1, 1, 1, 1))  # even maps: the odd zero goes after
        h = F.relu(block.batchnorm(F.conv2d(h, block.conv.weight, block.conv.bias, 1 + index % 2)))
    cnn = net.cnn_model.dense_layers[1](net.cnn_model.dense_layers[0](h.flatten(1)))
    hidden = net.cnn_model.forward_features(net.se_block(x), [2009, 1999])
    torch.testing.assert_close(net.cnn_model.dense_layers[-1](hidden), cnn)
    found, vit = net.branches(x, [2009, 1999])
    torch.testing.assert_close(found, cnn)
    torch.testing.assert_close(vit, net.vit_model(s))
    torch.testing.assert_close(net(x, [2009, 1999]), net.a1 * cnn + net.a2 * vit)


def test_transformer_by_hand() -> None:
    torch.manual_seed(0)
    vit: Any = randomise(ViT((8, 12), 4, 2, 3, 6, 1, 2, 5, 7)).double().eval()
    x = noise(2, 2, 8, 8).double()
    patches = [x[:, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].movedim(1, 3).flatten(1) for i in (0, 1) for j in (0, 1)]
    tokens = vit.to_patch_embedding[1:](torch.stack(patches, 1))
    tokens = torch.cat([vit.cls_token.expand(2, 1, 6), tokens], 1) + vit.pos_embedding[:, :5]
    attention, feed = vit.transformer.layers[0]
    q, k, v = (attention.norm(tokens) @ attention.to_qkv.weight.T).chunk(3, 2)
    heads = []
    for head in (slice(0, 5), slice(5, 10)):
        a = torch.softmax(q[..., head] @ k[..., head].transpose(1, 2) / math.sqrt(5), 2)
        heads.append(a @ v[..., head])
    tokens = tokens + attention.to_out[0](torch.cat(heads, 2))
    tokens = tokens + feed.net[4](F.gelu(feed.net[1](feed.net[0](tokens))))
    torch.testing.assert_close(vit(x), vit.mlp_head(vit.transformer.norm(tokens[:, 0])))
    assert vit.param_options() == {n: {"weight_decay": 0.0} for n in ("pos_embedding", "cls_token")}
    bare = ViT(8, 4, 2, dim=10, depth=1, heads=2, dim_head=5, project=False)
    assert "transformer.layers.0.0.to_out.0.weight" not in bare.state_dict()
    assert bare(x.float()).shape == (2, 1)


def test_years_choose_the_operator() -> None:
    net, x = modis(), noise(3, 9, 32, 32)
    mixed = net(x, [2009, 2011, 1999])
    each = torch.cat([net(x[i : i + 1], year) for i, year in enumerate((2009, 2011, 1999))])
    torch.testing.assert_close(mixed, each)
    torch.testing.assert_close(net(x, torch.tensor([2009, 2011, 1999])), mixed)
    torch.testing.assert_close(net(x, np.array([2009, 2011, 1999])), mixed)
    torch.testing.assert_close(net(x), net(x, 2012))  # learnable, the default too
    kinds = [modis(table={}, default=kind)(x) for kind in ("sobel", "scharr", "learnable")]
    assert not torch.allclose(kinds[0], kinds[1])
    torch.testing.assert_close(kinds[2], net(x))
    torch.testing.assert_close(modis(table={"2009": "sobel"})(x, 2009), kinds[0])  # as JSON writes it
    assert YEARS[2013] == "scharr"
    assert set(CROPS.values()) == {"sobel", "scharr"}
    soft = modis(table={}, soft=True)
    assert soft(x).shape == (3, 1)
    assert torch.equal(soft(x, 2009), soft(x))


def test_branches_can_be_shut() -> None:
    net, x = modis(), noise(2, 9, 32, 32)
    cnn, _ = net.branches(x, 2009)
    with torch.no_grad():
        net.a2.zero_()
        torch.testing.assert_close(net(x, 2009), net.a1 * cnn)
        net.cnn_model.operator_weight.zero_()
        assert torch.equal(net(x, 2009), net(x, 2011))


def test_inference_form_is_exact() -> None:
    net, x = modis(widths=(6, 8, 8, 8), time=20), noise(2, 9, 20, 32)
    expected = net(x, 2009)
    for form in (net.merge(), net.merge().merge(), merge(net, x)):
        torch.testing.assert_close(form(x, 2009), expected, rtol=1e-5, atol=1e-5)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in form.modules())
        assert len(form.cnn_model.dense_layers) == 1
    assert len(net.cnn_model.dense_layers) == 2
    torch.testing.assert_close(net(x, 2009), expected)


def test_county_is_the_mean_of_its_images() -> None:
    net, x = images(), noise(2, 3, 2, 3, 32, 32)
    whole = net(x)
    assert whole.shape == (2, 2)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(net(x.flatten(1, 2)[:, order].unflatten(1, (2, 3))), whole)
    torch.testing.assert_close(net(x.repeat(1, 2, 1, 1, 1, 1)), whole)
    assert not torch.allclose(images(crop="cotton")(x), whole)
    torch.testing.assert_close(net(x[1:]), whole[1:])


def test_pieces_of_images_give_the_same_gradients() -> None:
    x = noise(1, 3, 2, 3, 32, 32)
    grads = []
    for pieces in (None, 4):
        net = images(images_at_once=pieces, dropout=0.0, emb_dropout=0.0).train()
        net(x).square().sum().backward()
        grads.append([p.grad for p in net.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["modis", "images"])
def test_network_everywhere(kind: str, tmp_path: Path) -> None:
    """Copies, saving, export, precision, layout, empty batches."""
    net, x = (modis(), noise(2, 9, 32, 32)) if kind == "modis" else (images(crop="cotton"), noise(2, 2, 1, 3, 32, 32))
    expected = net(x)
    assert torch.equal(copy.deepcopy(net)(x), expected)
    weights.save(net, tmp_path / "net")
    again: Any = weights.load(tmp_path / "net")
    assert torch.equal(again(x), expected)
    if kind == "modis":
        assert torch.equal(again(x, 2009), net(x, 2009))
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    torch.testing.assert_close(program.module()(x[:1]), expected[:1])
    half = copy.deepcopy(net).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.05, atol=0.05)
    if kind == "modis":
        torch.testing.assert_close(net(x.contiguous(memory_format=torch.channels_last)), expected)
    assert net(x[:0]).shape == (0, expected.shape[1])


@pytest.mark.parametrize("kind", ["modis", "images"])
def test_official_checkpoint(kind: str, tmp_path: Path) -> None:
    """Constant kernels in the file, tokens with and without a batch axis; sizes are read off the shapes."""
    net = modis(time=20) if kind == "modis" else images()
    state = dict(net.state_dict())
    state["cnn_model.operator_gate.sobel.kernel_x"] = torch.zeros(1, 1, 3, 3)
    state["cnn_model.operator_router.operators.sobel.sobel_x"] = torch.zeros(9, 1, 3, 3)
    for flat in ("vit_model.cls_token", "vit_model.pos_embedding"):
        state[flat] = state[flat][0]
    torch.save({"state_dict": state, "epoch": torch.tensor(3)}, tmp_path / "best.pth")
    found: Any = weights.load_official(f"dfyp_{'modis' if kind == 'modis' else 'sentinel2'}", tmp_path / "best.pth")
    x = noise(1, 9, 20, 32) if kind == "modis" else noise(1, 2, 1, 3, 32, 32)
    assert torch.equal(found(x), net(x))
    if kind == "modis":
        torch.save({"state_dict": net.merge().state_dict()}, tmp_path / "merged.pth")
        merged: Any = weights.load_official("dfyp_modis", tmp_path / "merged.pth")
        assert torch.equal(merged(x), net.merge()(x))
    torch.save({"head.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not fit"):
        weights.load_official("dfyp_modis", tmp_path / "other.pth", **MODIS)


@pytest.mark.parametrize("kind", ["modis", "images"])
def test_training_lowers_the_loss_and_spares_the_scalars(kind: str) -> None:
    if kind == "modis":
        net, x = modis(dropout=0.0, emb_dropout=0.0, conv_dropout=0.0), noise(6, 9, 32, 32)
    else:
        net, x = images(dropout=0.0, emb_dropout=0.0), noise(6, 2, 1, 3, 32, 32)
    target = noise(6, net.num_classes)
    groups = param_groups(net.train(), 1e-3, 1.0)
    spared = {id(p) for g in groups if g["weight_decay"] == 0 for p in g["params"]}
    front = net.cnn_model if kind == "modis" else net.cnn_model.operator_gate
    assert {id(p) for p in (net.a1, net.a2, front.operator_weight, net.vit_model.cls_token)} <= spared
    optimiser = torch.optim.Adam(net.parameters(), 1e-3)
    losses = []
    for _ in range(4):
        loss = yield_loss(net(x), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_refusals() -> None:
    net, county = modis(), images()
    for x, message in (
        (noise(1, 8, 32, 32), "expected"),
        (noise(1, 9, 20, 32), "31 to 32 dates"),
        (noise(1, 9, 32, 16), "31 to 32 bins"),
        (noise(1, 9, 31, 32), "do not tile"),
    ):
        with pytest.raises(ValueError, match=message):
            net(x)
    with pytest.raises(ValueError, match="keys"):
        net(noise(2, 9, 32, 32), [2009])
    for x, message in (
        (noise(1, 2, 3, 32, 32), "expected"),
        (noise(1, 0, 1, 3, 32, 32), "a date and a cell"),
        (noise(1, 1, 1, 3, 48, 48), "positions for 4"),
        (noise(1, 1, 1, 3, 24, 32), "do not tile"),
    ):
        with pytest.raises(ValueError, match=message):
            county(x)
    for options, message in (
        ({"time": 40}, "num_periods"),
        ({"table": {"corn": "sobel"}}, "years"),
        ({"table": {2009: "laplace"}}, "table"),
        ({"default": "laplace"}, "default"),
        ({"widths": ()}, "widths"),
        ({"hidden": 0}, "hidden"),
        ({"conv_dropout": 1.0}, "dropout"),
        ({"num_bins": 30}, "image_size"),
    ):
        with pytest.raises(ValueError, match=message):
            DFYPNet(**{**MODIS, **options})
    for options, message in (
        ({"operator": "laplace"}, "kind"),
        ({"widths": (4, 1)}, "widths"),
        ({"images_at_once": 0}, "images_at_once"),
        ({"image_size": 40}, "image_size"),
    ):
        with pytest.raises(ValueError, match=message):
            SentinelDFYPNet(**{**IMAGES, **options})
    with pytest.raises(ValueError, match="crop"):
        dfyp_sentinel2("rice")
    with pytest.raises(ValueError, match="project"):
        ViT(8, 4, dim=8, heads=2, dim_head=3, project=False)
    with pytest.raises(ValueError, match="poolings"):
        images(widths=(2, 2, 2, 2, 2, 2), image_size=16)(noise(1, 1, 1, 3, 16, 16))


def test_loss_and_scores() -> None:
    y, t = noise(40, 2).double(), noise(2, 40).T.double()
    expected = ((y - t) ** 2).mean() + 0.3 * (y - t).abs().mean()
    torch.testing.assert_close(yield_loss(y, t, 0.3), expected)
    scores = yield_scores(y, t)
    for k in range(2):
        a, b = y[:, k].numpy(), t[:, k].numpy()
        one = yield_scores(y[:, k], t[:, k])
        by_hand = {
            "rmse": np.sqrt(((a - b) ** 2).mean()),
            "mae": np.abs(a - b).mean(),
            "me": (b - a).mean(),
            "r2": 1 - ((a - b) ** 2).sum() / ((b - b.mean()) ** 2).sum(),
            "correlation": np.corrcoef(a, b)[0, 1],
        }
        for name, value in by_hand.items():
            assert abs(float(scores[name][k]) - value) < 1e-6, name
            assert abs(float(one[name]) - value) < 1e-6, name
    assert yield_scores(y[:, :1], t[:, :1])["r2"].shape == (1,)
    missing = t[:, 0].clone()
    missing[:5] = torch.nan
    assert torch.equal(yield_scores(y[:, 0], missing)["rmse"], yield_scores(y[5:, 0], t[5:, 0])["rmse"])
    with pytest.raises(ValueError, match="prediction"):
        yield_loss(y, t[:, 0])
    with pytest.raises(ValueError, match="l1_weight"):
        yield_loss(y, t, -1.0)
    with pytest.raises(ValueError, match="two counties"):
        yield_scores(y[:1, 0], t[:1, 0])
