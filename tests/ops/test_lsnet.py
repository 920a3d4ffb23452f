"""Large-small convolution against its definition, its merged form, and the network around it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.parity.core import Case, run_case
from torchconv.models.classify.lsnet import VARIANTS, Attention, LSNet, RepVGGDW, SqueezeExcite
from torchconv.ops.lsnet import LKP, ConvBN, LSConv1d, LSConv2d, LSConv3d


def randomise(module, seed=0):
    """Parameters and running statistics away from their initial values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            scale = 0.3 if tensor.dim() > 1 else 0.2
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale + (1.0 if "bn.weight" in name else 0.0))
        for name, tensor in module.named_buffers():
            if name.endswith("running_mean"):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return module


def oracle(layer, x):
    """The definition in unfused steps with the unfold form of the aggregation (C a multiple of the kernels)."""
    p = layer.lkp

    def conv_bn(block, x, **options):
        y = F.conv2d(x, block.c.weight, None, **options)
        bn = block.bn
        return F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, layer.training, 0.0, 1e-5)

    half = p.cv1.c.weight.shape[0]
    h = conv_bn(p.cv1, x).relu()
    pads = tuple((k - 1) // 2 for k in p.large_kernel_size)
    h = conv_bn(p.cv2, h, padding=pads, groups=half)
    h = conv_bn(p.cv3, h).relu()
    w = F.conv2d(h, p.cv4.weight, p.cv4.bias)
    n, _, rows, columns = w.shape
    w = w.view(n, p.kernels, -1)
    w = (w - w.mean(-1, keepdim=True)) / (w.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    w = w.view(n, p.kernels * p.taps, rows, columns) * p.norm.weight.view(-1, 1, 1) + p.norm.bias.view(-1, 1, 1)
    w = w.view(n, 1, p.kernels, p.taps, rows, columns)
    pads = tuple((k - 1) // 2 for k in layer.kernel_size)
    columns_of_x = F.unfold(x, layer.kernel_size, padding=pads).view(n, -1, p.kernels, p.taps, rows, columns)
    a = (columns_of_x * w).sum(3).reshape(x.shape)
    bn = layer.bn
    return F.batch_norm(a, bn.running_mean, bn.running_var, bn.weight, bn.bias, layer.training, 0.0, 1e-5) + x


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("channels", "options"),
    [
        (16, {}),
        (12, {"kernel_size": 5, "share": 3, "large_kernel_size": 3}),
        (6, {"kernel_size": (3, 1), "share": 2, "bias": False}),
        (5, {"large_kernel_size": (5, 3), "share": 1}),
        (3, {"share": 8}),
    ],
)
def test_equals_the_definition(channels, options, training):
    layer = randomise(LSConv2d(channels, **options)).double().train(training)
    x = torch.randn(2, channels, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x), oracle(layer, x))
    if not training:
        merged = layer.merge()
        torch.testing.assert_close(merged(x), layer(x))
        kinds = [type(m).__name__ for m in merged.modules()]
        assert not any("BatchNorm" in k for k in kinds)


def test_merge_folds_half_weights_in_wide_arithmetic():
    layer = randomise(LSConv2d(16)).eval()
    half = LSConv2d(16).eval()
    half.load_state_dict(layer.state_dict())
    half = half.to(torch.bfloat16)
    conv, source = half.merge().lkp.cv1, half.lkp.cv1
    scale = source.bn.weight.double() / (source.bn.running_var.double() + 1e-5).sqrt()
    exact = source.c.weight.double() * scale.view(-1, 1, 1, 1)
    assert torch.equal(conv.weight, exact.to(torch.bfloat16))


def test_perception_is_normalised_over_taps_and_positions():
    look = randomise(LKP(24)).eval()
    torch.nn.init.ones_(look.norm.weight)
    torch.nn.init.zeros_(look.norm.bias)
    w = look(torch.randn(2, 24, 6, 5, generator=torch.Generator().manual_seed(2)))
    assert w.shape == (2, 3, 9, 6, 5)
    torch.testing.assert_close(w.mean((2, 3, 4)), torch.zeros(2, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(w.var((2, 3, 4), unbiased=False), torch.ones(2, 3), atol=1e-3, rtol=0)


@pytest.mark.parametrize("channels", [1, 2, 7, 13, 20])
def test_any_width(channels):
    layer = LSConv2d(channels).eval()
    assert layer.lkp.kernels == max(1, channels // 8)
    assert layer(torch.randn(1, channels, 4, 4)).shape == (1, channels, 4, 4)


@pytest.mark.parametrize(("build", "size"), [(LSConv1d, (9,)), (LSConv2d, (4, 5)), (LSConv3d, (3, 4, 2))])
def test_dimensions_and_gradients(build, size):
    layer = randomise(build(5, share=2, large_kernel_size=3)).double()
    x = torch.randn(2, 5, *size, dtype=torch.float64, requires_grad=True)
    assert layer(x).shape == x.shape
    assert torch.autograd.gradcheck(layer, (x,), fast_mode=True)
    layer.eval()
    parameters = list(layer.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *parameters), fast_mode=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 4}, "kernel_size="),
        ({"large_kernel_size": 6}, "large_kernel_size="),
        ({"stride": 2}, "stride="),
        ({"dilation": 2}, "dilation="),
        ({"padding": 0}, "padding="),
        ({"groups": 4}, "groups="),
        ({"out_channels": 9}, "out_channels="),
        ({"share": 0}, "share="),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        LSConv2d(16, **options)


def test_repvggdw_is_one_convolution():
    layer = randomise(RepVGGDW(6)).eval()
    x = torch.randn(2, 6, 5, 4)
    merged = layer.merge()
    assert type(merged) is torch.nn.Conv2d
    torch.testing.assert_close(merged(x), layer(x), atol=1e-5, rtol=1e-5)


def test_attention_against_loops():
    layer = randomise(Attention(8, key_dim=3, num_heads=2, attn_ratio=1.5, resolution=(3, 2))).double().eval()
    x = torch.randn(2, 8, 3, 2, dtype=torch.float64)
    q, k, v = layer.qkv(x).split([6, 6, 8], 1)
    q = layer.dw(q)
    places = [(i, j) for i in range(3) for j in range(2)]
    offsets: list[tuple[int, int]] = []
    for a in places:
        for b in places:
            offset = (abs(a[0] - b[0]), abs(a[1] - b[1]))
            if offset not in offsets:
                offsets.append(offset)
    out = torch.zeros(2, 8, 3, 2, dtype=torch.float64)
    for h in range(2):
        for a in places:
            logits = []
            for b in places:
                bias = layer.attention_biases[h, offsets.index((abs(a[0] - b[0]), abs(a[1] - b[1])))]
                product = (q[:, 3 * h : 3 * h + 3, a[0], a[1]] * k[:, 3 * h : 3 * h + 3, b[0], b[1]]).sum(1)
                logits.append(product * 3**-0.5 + bias)
            weights = torch.stack(logits, 1).softmax(1)
            values = torch.stack([v[:, 4 * h : 4 * h + 4, b[0], b[1]] for b in places], 1)
            out[:, 4 * h : 4 * h + 4, a[0], a[1]] = (weights[..., None] * values).sum(1)
    torch.testing.assert_close(layer(x), layer.proj(out))


def test_attention_bias_follows_loaded_weights_and_flips():
    layer = Attention(8, 4, 2, 1.0, 3).eval()
    torch.nn.init.normal_(layer.attention_biases)
    table = layer.attention_biases[:, layer.attention_bias_idxs].view(2, 3, 3, 3, 3)
    assert torch.equal(table, table.flip(1, 3))
    assert layer.attention_biases.shape == (2, 9)
    layer(torch.randn(1, 8, 3, 3)).sum().backward()
    assert layer.attention_biases.grad is not None
    assert layer.param_options() == {"attention_biases": {"weight_decay": 0.0}}
    with pytest.raises(ValueError, match="maps of 3×3"):
        layer(torch.zeros(1, 8, 4, 4))


@pytest.mark.parametrize(("channels", "inner"), [(8, 8), (64, 16), (96, 24), (320, 80), (48, 16), (40, 8)])
def test_gate_width(channels, inner):
    assert SqueezeExcite(channels).fc1.out_channels == inner


@pytest.mark.parametrize(
    ("name", "plain", "distilled", "merged"),
    [
        ("lsnet_t", 11_409_832, 11_795_600, 11_370_488),
        ("lsnet_s", 16_146_304, 16_596_200, 16_098_232),
        ("lsnet_b", 23_313_608, 23_827_632, 23_249_320),
    ],
)
def test_parameter_counts(name, plain, distilled, merged):
    with torch.device("meta"):
        first, second = VARIANTS[name](), VARIANTS[name](distillation=True)
    assert sum(p.numel() for p in first.parameters()) == plain
    assert sum(p.numel() for p in second.parameters()) == distilled
    if name == "lsnet_t":
        assert sum(p.numel() for p in VARIANTS[name]().merge().parameters()) == merged


def test_network_with_two_heads_merges_into_one():
    options = {"dims": (8, 16, 24, 32), "depths": (0, 2, 2, 2), "num_heads": (1, 1, 1, 2), "key_dim": (4,) * 4}
    net = randomise(LSNet(**options, num_classes=5, img_size=128, distillation=True))
    x = torch.randn(2, 3, 128, 128)
    first, second = net.train()(x)
    assert first.shape == second.shape == (2, 5)
    net.eval()
    expected = net(x)
    merged = net.merge()
    assert merged.head_dist is None
    assert not any(isinstance(m, ConvBN | torch.nn.modules.batchnorm._BatchNorm) for m in merged.modules())
    assert (merged(x) - expected).abs().max() <= 1e-4 * expected.abs().max()
    torch.testing.assert_close(merged.merge()(x), merged(x))
    with pytest.raises(ValueError, match="depths="):
        LSNet(depths=(1, 2))


def test_claim_target_is_the_bilateral_filter():
    from torchconv.claims.lsnet import _images, _ratio_interval

    noisy, target = (t[0, 0].double() for t in _images())
    i, j = 50, 70
    total = weight_sum = 0.0
    for u in (-1, 0, 1):
        for v in (-1, 0, 1):
            value = noisy[i + u, j + v]
            weight = torch.exp(-torch.tensor((u * u + v * v) / 2) - (value - noisy[i, j]) ** 2 / (2 * noisy.var()))
            total, weight_sum = total + weight * value, weight_sum + weight
    torch.testing.assert_close(target[i, j], total / weight_sum, rtol=1e-5, atol=1e-6)
    effect, low, high = _ratio_interval(torch.full((9,), 3.0), torch.full((9,), 2.0))
    assert effect == pytest.approx(0.5)
    assert low == pytest.approx(0.5)
    assert high == pytest.approx(0.5)


def run_parity(module, inputs, config, y):
    state = {n: t.detach().clone() for n, t in module.state_dict().items()} if module else {}
    return run_case(Case("lsnet", "made", config, "", "eval", "", None, None, state, inputs, {"y": y.detach()}, {}))


def test_parity_reads_the_channels_of_the_image_and_the_options_of_the_look():
    few = {"num_heads": (1, 1, 1, 2), "key_dim": (4, 4, 4, 4), "num_classes": 3, "in_chans": 5, "img_size": 64}
    net = randomise(LSNet((8, 8, 16, 16), (0, 1, 1, 2), **few)).eval()
    x = torch.randn(1, 5, 64, 64)
    config = {**few, "embed_dim": [8, 8, 16, 16], "depth": [0, 1, 1, 2], "patch_size": None}
    assert all(t.passed for t in run_parity(net, {"x": x}, config, net(x)))
    layer = randomise(LSConv2d(8, kernel_size=5, large_kernel_size=3, share=4)).eval()
    x = torch.randn(2, 8, 5, 4)
    config = {"dim": 8, "lks": 3, "sks": 5, "groups": 4}
    assert all(t.passed for t in run_parity(layer, {"x": x}, config, layer(x)))


def test_parity_takes_the_size_of_an_aggregation_from_its_weight():
    x, w = torch.randn(1, 4, 3, 3), torch.randn(1, 2, 9, 3, 3)
    y = (F.unfold(x, 3, padding=1).unflatten(1, (2, 2, 9)) * w.flatten(3)[:, None]).sum(3).reshape(x.shape)
    assert all(t.passed for t in run_parity(None, {"x": x, "w": w}, {}, y))


@pytest.mark.parametrize(
    ("name", "value"),
    [("patch_size", 0), ("in_chans", 0), ("num_classes", -1), ("num_heads", (0, 1)), ("depths", (-1, 1)), ("dims", ())],
)
def test_network_names_the_argument_it_refuses(name, value):
    options = {"dims": (8, 8), "depths": (1, 1), "num_heads": (1, 1), "key_dim": (4, 4), "num_classes": 3}
    with pytest.raises(ValueError, match=f"^{name}="):
        LSNet(**{**options, name: value})
