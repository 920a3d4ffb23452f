"""Serpent and VM-UNet: written out, published count, authors' names, any size, tiles, training, export, refusals."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.ops.harness import randomise
from tests.parity.core import read_case
from torchconv import param_groups
from torchconv.analysis.count import count
from torchconv.models import create_model
from torchconv.models.restore.serpent import Serpent
from torchconv.models.restore.serpent_block import VSSBlock, spread
from torchconv.models.restore.serpent_vmunet import VMUNet, convert_official, read_official
from torchconv.weights import load, load_official, save

SMALL: dict[str, Any] = {"dim": 4, "depths": (1, 2), "states": 2}
GOLDEN = Path(__file__).parents[1] / "golden" / "serpent" / "u_shaped_vss_analogue.safetensors"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def lively(net: nn.Module) -> Any:
    """Away from linear maps near zero, which make every block almost the identity."""
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.3)
    return randomise(net).eval()


def merged(layer: Any, x: Tensor) -> Tensor:
    pieces = torch.cat([x[:, :, i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))], 1)
    return F.conv2d(normed(layer.norm, pieces), layer.reduction.weight[:, :, None, None])


def expanded(layer: Any, x: Tensor) -> Tensor:
    wide = F.conv2d(x, layer.expand.weight[:, :, None, None])
    s = layer.scale
    return normed(layer.norm, F.pixel_shuffle(wide.unflatten(1, (s * s, -1)).transpose(1, 2).flatten(1, 2), s))


def normed(norm: Any, x: Tensor) -> Tensor:
    return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], norm.weight, norm.bias).permute(0, 3, 1, 2)


@pytest.mark.parametrize("mlp_ratio", [0.0, 2.0])
def test_block(mlp_ratio: float) -> None:
    block, x = lively(VSSBlock(6, mlp_ratio, states=2)).double(), torch.randn(2, 6, 3, 5).double()
    y = x + block.op(normed(block.norm, x))
    if mlp_ratio:
        hidden = F.gelu(F.linear(normed(block.norm2, y).permute(0, 2, 3, 1), block.mlp.fc1.weight, block.mlp.fc1.bias))
        y = y + F.linear(hidden, block.mlp.fc2.weight, block.mlp.fc2.bias).permute(0, 3, 1, 2)
    torch.testing.assert_close(block(x), y)


@pytest.mark.parametrize(("skip", "patch"), [("cat", 2), ("add", 1)])
def test_serpent_written_out(skip: str, patch: int) -> None:
    net = lively(Serpent(2, **SMALL, skip=skip, patch=patch)).double()
    x = torch.rand(1, 2, 8, 12).double()
    e = F.conv2d(x, net.patch_embed.proj.weight, net.patch_embed.proj.bias, stride=patch)
    e = net.layers[0].blocks(normed(net.patch_embed.norm, e))
    up = expanded(net.layers_up[0].upsample, net.layers[1].blocks(merged(net.layers[1].downsample, e)))
    joined = net.layers_up[0].fuse(torch.cat([up, e], 1)) if skip == "cat" else up + e
    d = net.layers_up[0].blocks(joined)
    d = expanded(net.final_up, d) if patch > 1 else d
    torch.testing.assert_close(net(x), x + F.conv2d(d, net.final_conv.weight, net.final_conv.bias, padding=1))


def test_vmunet_written_out() -> None:
    options: dict[str, Any] = {"num_classes": 2, "dim": 4, "patch": 2, "states": 2, "patch_norm": False}
    net = lively(VMUNet(3, **options, depths=(1, 2, 1), decoder_depths=(1, 0, 2))).double()
    x = torch.rand(1, 3, 16, 8).double()
    first = net.patch_embed.proj(x)
    second = merged(net.layers[0].downsample, net.layers[0].blocks(first))
    third = merged(net.layers[1].downsample, net.layers[1].blocks(second))
    y = net.layers_up[0].blocks(net.layers[2].blocks(third))
    y = net.layers_up[1].blocks(expanded(net.layers_up[1].upsample, y + third))
    y = net.layers_up[2].blocks(expanded(net.layers_up[2].upsample, y + second))
    expected = net.final_conv(expanded(net.final_up, y))
    torch.testing.assert_close(net(x), expected)
    assert expected.shape == (1, 2, 32, 16)


def test_counts() -> None:
    with torch.device("meta"):
        published: Any = create_model("vmunet")
        tiny: Any = create_model("serpent_tiny", in_chans=1).eval()
        assert round(sum(p.numel() for p in published.parameters()) / 1e6, 2) == 27.43
        operations = [count(tiny, torch.zeros(1, 1, n, n)).flops for n in (32, 64)]
    assert operations[1] / operations[0] == pytest.approx(4, rel=0.01)


def test_authors_names(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"dim": 4, "depths": (1, 2), "decoder_depths": (2, 1), "patch": 2, "states": 3, "rank": 2}
    net = lively(VMUNet(2, 5, **sizes, drop_path=0.0))
    theirs = {}
    for name, tensor in net.state_dict().items():
        name = name.replace(".norm.", ".ln_1.") if ".blocks." in name and ".op." not in name else name
        theirs[f"vmunet.{name.replace('.op.', '.self_attention.')}"] = tensor
    assert "vmunet.layers.1.blocks.1.self_attention.A_logs" in theirs
    assert "vmunet.layers_up.1.upsample.norm.weight" in theirs
    torch.save({"model": theirs}, tmp_path / "a.pth")
    loaded: Any = load_official("vmunet", tmp_path / "a.pth")
    x = torch.rand(1, 2, 8, 12)
    assert torch.equal(loaded(x), net(x))
    bare = VMUNet(2, 5, **{**sizes, "depths": (2, 0), "decoder_depths": (0, 1)})
    found = read_official(bare.state_dict())
    assert (found["depths"], found["decoder_depths"]) == ([2, 0], [0, 1])


def test_single_precision_stays_near_the_reference() -> None:
    case = read_case(GOLDEN)
    state = convert_official(case.state)
    net = VMUNet(**read_official(state)).eval()
    net.load_state_dict(state)
    y, expected = net(case.inputs["x"]), case.outputs["y"]
    assert (y - expected).abs().max() < 2e-3 * expected.abs().max()


def test_no_head_is_the_identity_and_everything_is_seen() -> None:
    net = lively(Serpent(**{**SMALL, "dim": 8})).double()
    x = torch.rand(1, 3, 12, 8).double().requires_grad_()
    (seen,) = torch.autograd.grad(net(x)[0, 1, 11, 0], x)
    assert (seen.abs().amax(1) > 0).all()
    nn.init.zeros_(net.final_conv.weight)
    nn.init.zeros_(net.final_conv.bias)
    assert torch.equal(net(x), x)


def test_any_size_and_scale() -> None:
    net = lively(Serpent(**SMALL)).double()
    assert net.multiple == 4
    x = torch.rand(1, 3, 9, 6).double()
    padded = F.pad(x, (0, 2, 0, 3), mode="reflect")
    torch.testing.assert_close(net(x), net(padded)[:, :, :9, :6])
    assert net(x[:, :, :1, :1]).shape == (1, 3, 1, 1)
    torch.testing.assert_close(net.predict(x), net(x).clamp(0, 1))
    assert net.predict(x, tile=8, overlap=2).shape == x.shape
    bigger = Serpent(**SMALL, scale=2).double().eval()
    bigger.load_state_dict(net.state_dict())
    enlarged = F.interpolate(x, scale_factor=2, mode="bicubic")
    torch.testing.assert_close(bigger(x), net(enlarged))
    torch.testing.assert_close(bigger.predict(x), net(enlarged).clamp(0, 1))
    grey = Serpent(1, 2, **SMALL, residual=False).eval()
    assert grey(torch.rand(2, 1, 8, 8)).shape == (2, 2, 8, 8)


def test_learns_and_spares_rates() -> None:
    net = Serpent(1, **SMALL, drop_path=0.1, mlp_ratio=1.0)
    groups = param_groups(net, 1e-2, 0.05)
    named = {id(p): n for n, p in net.named_parameters()}
    free = {named[id(p)] for g in groups if g["weight_decay"] == 0 for p in g["params"]}
    assert {n for n in named.values() if n.endswith(("A_logs", "Ds", "dt_projs_bias"))} <= free
    x = torch.rand(4, 1, 8, 8)
    target, optimizer, losses = 0.5 * x, torch.optim.AdamW(groups), []
    for _ in range(8):
        loss = (net(x) - target).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert [len(stage.blocks) for stage in net.layers] == [1, 2]
    assert spread(0.2, (1, 2)) == [[0.0], [0.1, 0.2]]
    assert spread(0.2, (2, 1), falling=True) == [[0.2, 0.1], [0.0]]


def test_recomputation_gives_the_same_gradients() -> None:
    net = lively(Serpent(**SMALL, drop_path=0.5)).train()
    twin = copy.deepcopy(net)
    twin.set_grad_checkpointing()
    x, found = torch.rand(3, 3, 8, 8), []
    for model in (net, twin):
        torch.manual_seed(1)
        model(x).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["serpent_tiny", "vmunet"])
def test_saved_copied_layouts_and_types(name: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {**SMALL, "patch": 2}
    sizes |= {"decoder_depths": (1, 1)} if name == "vmunet" else {}
    net: Any = create_model(name, **sizes)
    net = lively(net)
    x = torch.rand(2, 3, 8, 12)
    y = net(x)
    save(net, tmp_path / "net")
    for twin in (load(tmp_path / "net"), copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin.eval()(x), y)
    last = net(x.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, y, rtol=1e-3, atol=1e-3)
    assert copy.deepcopy(net).bfloat16()(x.bfloat16()).isfinite().all()


def test_exported_with_a_batch_of_any_size() -> None:
    net, x = lively(Serpent(1, dim=4, depths=(1,), states=2)), torch.rand(2, 1, 5, 4)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for n in (1, 5):
        x = torch.rand(n, 1, 5, 4)
        torch.testing.assert_close(program.module()(x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Serpent(dim=5), "dim=5"),
        (lambda: Serpent(0), "in_chans=0"),
        (lambda: Serpent(3, 1), "out_chans=1"),
        (lambda: Serpent(depths=()), "depths="),
        (lambda: Serpent(depths=(1, -1)), "depths=-1"),
        (lambda: Serpent(depths=(1, 1), decoder_depths=(1, 1)), "decoder_depths="),
        (lambda: Serpent(skip="sum"), "skip='sum'"),
        (lambda: Serpent(scale=0), "scale=0"),
        (lambda: Serpent(**SMALL)(torch.zeros(1, 1, 8, 8)), "x of shape"),
        (lambda: Serpent(**SMALL)(torch.zeros(1, 3, 0, 8)), "x.shape="),
        (lambda: Serpent(**SMALL).predict(torch.zeros(1, 3, 8, 8), tile=6), "tile=6"),
        (lambda: VSSBlock(0), "channels=0"),
        (lambda: VSSBlock(4, -1.0), "mlp_ratio=-1.0"),
        (lambda: VSSBlock(4, 0.1), "mlp_ratio=0.1"),
        (lambda: VSSBlock(4, drop_path=1.0), "drop_path=1.0"),
        (lambda: VMUNet(dim=6), "dim=6"),
        (lambda: VMUNet(depths=(1, 1)), "decoder_depths="),
        (lambda: VMUNet(dim=4, depths=(1, 1), decoder_depths=(1, 1))(torch.zeros(1, 3, 12, 8)), "multiples of 8"),
    ],
)
def test_refusals(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
