"""UniRepLKNet's block and network: merging, published sizes, feature maps, and what a block leaves unchanged."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchconv.models._drop_path import DropPath
from torchconv.models.classify import unireplknet as family
from torchconv.models.classify.unireplknet import VARIANTS, UniRepLKNet, layer_group
from torchconv.models.classify.unireplknet_block import LayerNorm2d, UniRepLKNetBlock

SMALL: dict[str, Any] = {
    "depths": (1, 1, 2, 1),
    "dims": (8, 12, 16, 24),
    "kernel_sizes": ((3,), (7,), (13, 0), (5,)),
    "num_classes": 5,
}
# name: parameters in training, merged; multiply-adds merged in units of 10⁹; image size
PUBLISHED = {
    "unireplknet_a": (4_649_060, 4_437_300, 0.640, 224),
    "unireplknet_f": (6_489_328, 6_235_216, 0.905, 224),
    "unireplknet_p": (11_080_520, 10_741_704, 1.573, 224),
    "unireplknet_n": (18_818_880, 18_318_560, 2.767, 224),
    "unireplknet_t": (31_693_420, 31_037_980, 4.899, 224),
    "unireplknet_s": (56_456_704, 55_645_984, 9.094, 224),
    "unireplknet_b": (99_089_416, 98_008_456, 47.18, 384),
    "unireplknet_l": (220_076_056, 218_454_616, 105.4, 384),
    "unireplknet_xl": (388_690_984, 386_529_064, 186.8, 384),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def randomised(module: nn.Module) -> Any:
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape)
                fan = math.sqrt(tensor[0].numel()) if tensor.dim() > 1 else 1.0
                tensor.copy_(noise + 0.5 if "var" in name else (2 * noise - 1) / fan)
    return module


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("kernel_size", [0, 3, 5, 7, 9, 11, 13, 15, 17])
@pytest.mark.parametrize("scale", [None, 1e-6])
def test_block_merge_is_exact(kernel_size: int, scale: float | None) -> None:
    block = randomised(UniRepLKNetBlock(8, kernel_size, layer_scale_init_value=scale, ffn_factor=3.5)).eval()
    x = torch.randn(2, 8, 9, 11)
    merged = block.merge()
    torch.testing.assert_close(merged(x), block(x), rtol=1e-5, atol=1e-5)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in merged.modules())
    assert not {"gamma", "act.1.beta"} & set(merged.state_dict())
    built = UniRepLKNetBlock(8, kernel_size, deploy=True, ffn_factor=3.5).eval()
    built.load_state_dict(merged.state_dict())
    assert torch.equal(built(x), merged(x))
    assert torch.equal(merged.merge()(x), merged(x))


def test_merging_draws_no_random_numbers_and_leaves_the_block_alone() -> None:
    block = randomised(UniRepLKNetBlock(8, 7))
    before = {n: t.clone() for n, t in block.state_dict().items()}
    state = torch.get_rng_state()
    merged = block.merge()
    assert torch.equal(torch.get_rng_state(), state)
    nn.init.zeros_(merged.se.down.weight)
    assert all(torch.equal(t, before[n]) for n, t in block.state_dict().items())


def test_half_precision_is_merged_in_single() -> None:
    block = randomised(UniRepLKNetBlock(8, 7)).eval()
    half = UniRepLKNetBlock(8, 7, dtype=torch.bfloat16).eval()
    half.load_state_dict(block.state_dict())
    block.load_state_dict(half.state_dict())
    for name, tensor in half.merge().state_dict().items():
        torch.testing.assert_close(tensor, block.merge().state_dict()[name].to(torch.bfloat16))


def test_block_identities() -> None:
    x = torch.randn(2, 8, 6, 7)
    block = randomised(UniRepLKNetBlock(8, 7)).eval()
    nn.init.zeros_(block.gamma)
    assert torch.equal(block(x), x)
    nn.init.zeros_(block.se.up.weight)
    torch.testing.assert_close(block.se(x), x * torch.sigmoid(block.se.up.bias)[:, None, None])
    pointwise = randomised(UniRepLKNetBlock(8, 0)).eval()
    torch.testing.assert_close(pointwise(x.flip(2, 3)), pointwise(x).flip(2, 3))


def test_block_gradients() -> None:
    block = randomised(UniRepLKNetBlock(4, 5, ffn_factor=2, dtype=torch.float64)).eval()
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    names, values = zip(*block.named_parameters(), strict=True)

    def run(x: Tensor, *tensors: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(names, tensors, strict=True)), (x,))

    torch.autograd.gradcheck(run, (x, *values))


@pytest.mark.parametrize("features_only", [False, True])
def test_network_merge_shapes_and_pickled_state(features_only: bool) -> None:
    net = randomised(UniRepLKNet(**SMALL, features_only=features_only)).eval()
    x = torch.randn(2, 3, 70, 45)
    expected, merged = net(x), net.merge()
    ours = merged(x)
    if features_only:
        strides = [tuple(math.ceil(n / s) for n in (70, 45)) for s in (4, 8, 16, 32)]
        assert [tuple(t.shape[2:]) for t in expected] == strides
        assert not {"norm.weight", "head.weight"} & set(net.state_dict())
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert all(p.requires_grad and not p.is_meta for p in merged.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name: str) -> None:
    trained, merged, _, _ = PUBLISHED[name]
    with torch.device("meta"):
        net = getattr(family, name)()
        assert parameters(net) == trained
        assert parameters(getattr(family, name)(deploy=True)) == merged
    assert set(VARIANTS) == set(PUBLISHED)


@pytest.mark.parametrize("name", ["unireplknet_a", "unireplknet_t", "unireplknet_b"])
def test_published_multiply_adds(name: str) -> None:
    _, _, expected, size = PUBLISHED[name]
    total = 0

    def count(module: Any, _: Any, output: Tensor) -> None:
        nonlocal total
        total += output.numel() * module.weight[0].numel()

    with torch.device("meta"):
        net = getattr(family, name)(deploy=True).eval()
        for module in net.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(count)
        net(torch.zeros(1, 3, size, size))
    assert total / 1e9 == pytest.approx(expected, rel=2e-3)


def test_initial_values() -> None:
    net = UniRepLKNet(**SMALL, head_init_scale=0.5)
    weights = torch.cat(
        [p.flatten() for n, p in net.named_parameters() if p.dim() == 4 and "se" not in n and "act" not in n]
    )
    assert weights.std().item() == pytest.approx(0.02, rel=0.1)
    assert net.head.weight.std().item() == pytest.approx(0.01, rel=0.3)
    assert net.stages[0][0].gamma.unique().tolist() == pytest.approx([1e-6])
    rates = [getattr(b.drop_path, "rate", 0.0) for s in UniRepLKNet(**SMALL, drop_path_rate=0.4).stages for b in s]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_drop_path_keeps_the_mean() -> None:
    drop = DropPath(0.25)
    y = drop(torch.ones(4000, 2, 1, 1))
    assert y.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert y.mean().item() == pytest.approx(1.0, abs=0.05)
    assert torch.equal(y[:, 0], y[:, 1])
    assert torch.equal(drop.eval()(y), y)


def test_layer_norm_is_over_channels() -> None:
    norm = randomised(LayerNorm2d(6))
    x = torch.randn(2, 6, 3, 4)
    centred = x - x.mean(1, keepdim=True)
    expected = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(norm(x), expected * norm.weight[:, None, None] + norm.bias[:, None, None])


def test_checkpointing_changes_no_gradient() -> None:
    net = randomised(UniRepLKNet(**SMALL))
    x = torch.randn(2, 3, 32, 32)
    plain = torch.autograd.grad(net(x).square().sum(), net.downsample_layers[0][0].weight)
    net.set_grad_checkpointing()
    again = torch.autograd.grad(net(x).square().sum(), net.downsample_layers[0][0].weight)
    torch.testing.assert_close(again, plain)


def test_compiles_whole_and_exports() -> None:
    small = {"depths": (0, 1, 0, 1), "dims": (4, 4, 4, 4), "kernel_sizes": ((), (7,), (), (3,)), "num_classes": 3}
    net = randomised(UniRepLKNet(**small)).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-5)
    exported = torch.export.export(net.merge(), (x,)).module()
    torch.testing.assert_close(exported(x), net(x), rtol=1e-4, atol=1e-4)


def test_no_classes_gives_pooled_features_and_empty_batches_pass() -> None:
    net = UniRepLKNet(**{**SMALL, "num_classes": 0}).eval()
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 24)
    assert net(torch.randn(0, 3, 32, 32)).shape == (0, 24)


def test_layer_groups() -> None:
    with torch.device("meta"):
        names = [n for n, _ in family.unireplknet_t().named_parameters()]
    groups = {n: layer_group(n) for n in names}
    assert set(groups.values()) == {0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 13}
    assert groups["downsample_layers.0.3.weight"] == 0
    assert groups["downsample_layers.3.0.weight"] == 12
    assert groups["stages.2.17.gamma"] == 8
    assert groups["head.weight"] == 13


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("kernel_sizes", {"depths": (1, 1, 1, 1)}),
        ("kernel_sizes", {"kernel_sizes": ((3,),)}),
        ("depths", {"depths": (1, 2)}),
        ("dims", {"dims": (8, 8, 8, 2)}),
        ("num_classes", {"num_classes": -1}),
        ("in_chans", {"in_chans": 0}),
        ("drop_path_rate", {"drop_path_rate": 1.0}),
    ],
)
def test_refusals_name_the_argument(argument: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{argument}="):
        UniRepLKNet(**options)


def test_block_refusals_name_the_argument() -> None:
    for argument, options in (
        ("kernel_size", {"kernel_size": 4}),
        ("dim", {"dim": 2}),
        ("ffn_factor", {"ffn_factor": 0}),
    ):
        with pytest.raises(ValueError, match=f"^{argument}="):
            UniRepLKNetBlock(**{"dim": 8, "kernel_size": 7, **options})


@pytest.mark.parametrize("start", [None, 0, 0.0, -1.0])
def test_no_layer_scale(start: float | None) -> None:
    assert UniRepLKNetBlock(4, 3, layer_scale_init_value=start).gamma is None


def test_network_says_what_does_not_fit() -> None:
    net = UniRepLKNet(**SMALL)
    for shape in ((3, 32, 32), (1, 4, 32, 32)):
        with pytest.raises(ValueError, match=r"expected \(N, 3, H, W\)"):
            net(torch.zeros(shape))
    with pytest.raises(ValueError, match="kernel_sizes"):
        UniRepLKNet(**{**SMALL, "kernel_sizes": (3, 3, 3, 3)})
