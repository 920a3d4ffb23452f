"""Terminator: slow nets, HyperZ·Z·W, gates, standardisations, blocks, network, slow loss, Kar."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torchconv.models import create_model
from torchconv.models.classify.terminator import (
    Terminator,
    convert_official,
    norm_penalty,
    read_official,
    terminator,
    terminator_mini,
)
from torchconv.models.classify.terminator_block import SFNEBlock
from torchconv.ops._slow_net import FrozenKernel, KernelNet, LocalSlowNet, SlowNet, coordinates, renormalise
from torchconv.ops.terminator import HyperZZWConv1d, HyperZZWConv2d, HyperZZWConv3d, HyperZZWGlobal2d, hyperzzw_global
from torchconv.ops.terminator_units import (
    GIBS,
    RGU,
    HyperChannelInteract,
    HyperInteract,
    LocalConv,
    hyperzzw,
    slow_neural_loss,
    standardise,
)
from torchconv.training.kar import Kar
from torchconv.training.optim import Hooks


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def noise(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def away(module):
    """Double, and away from zeros and ones."""
    with torch.no_grad():
        for p in module.double().parameters():
            p.copy_(torch.randn(p.shape, dtype=torch.float64) / max(1, p[0].numel()) ** 0.5)
    return module


def small_net(**options):
    settings = {"img_size": 6, "factors": (4, 1, 2, 1), "earlier": (0, 0, 1, 2), "global_layers": (3, 2, 2, 2)}
    widths = {"global_hidden": 4, "local_hidden": 3, "channel_hidden": 3, "interact_hidden": (3, 4)}
    rest = {"kernel_sizes": (3, 5, 1, 3), "drop_rates": (0.0,) * 4}
    return Terminator(5, **{**settings, **widths, **rest, **options})


def kernel_by_loops(net, size, s=None):
    """The recurrence at each position and hidden channel; ``s`` (h, positions) for a conditioned net."""
    places = coordinates(size, dtype=torch.float64)

    def lin(conv, v):
        return conv.weight.flatten(1) @ v + conv.bias

    plane = (net.bias_p if net.bias_p is not None else net.bias_pk).flatten()
    z = [torch.sin(lin(net.filters[0].linear, places[:, i])) for i in range(places.shape[1])]
    for level, inner in enumerate(net.linears):
        z = [
            torch.sin(lin(net.filters[level + 1].linear, places[:, i])) * lin(inner, v) + plane[i]
            for i, v in enumerate(z)
        ]
        if s is not None:
            norm = torch.stack(z).square().sum(0).sqrt()
            z = [(v + 0.1 * v / norm) * lin(net.fast_linears_x[level], s[:, i]) for i, v in enumerate(z)]
    return torch.stack([lin(net.output_linear, v) for v in z], 1).unflatten(1, size)[None]


@pytest.mark.parametrize("size", [(5,), (4, 3), (2, 3, 2)])
def test_slow_net_by_loops(size):
    net = away(SlowNet(size, 3, 4, 3))
    torch.testing.assert_close(net(), kernel_by_loops(net.Kernel, size))


def test_local_slow_net_by_loops():
    net = away(LocalSlowNet(3, (3, 5), 4, 2))
    x = noise(4, 3, 7, 8)
    boxes = F.adaptive_avg_pool2d(x, (3, 5)).mean(0).flatten(1)
    k = net.Kernel
    s = k.fast_reduce.weight.flatten(1) @ boxes + k.fast_reduce.bias[:, None]
    s = F.gelu(k.fast_fc1.weight.flatten(1) @ s + k.fast_fc1.bias[:, None])
    torch.testing.assert_close(net(x), kernel_by_loops(k, (3, 5), s).transpose(0, 1))


def test_start_of_slow_nets():
    net = KernelNet((16, 16), 8, 400, 2, omega_0=3.0)
    # E γ = 6/(l+1); the default weights have deviation 1/√(3·axes).
    for level, sine in enumerate(net.filters):
        second = 6 / (level + 1) * (1 + 6 / (level + 1))
        expected = 2 * math.pi * 3 * math.sqrt(second / (3 * 2))
        assert sine.linear.weight.std().item() == pytest.approx(expected, rel=0.15)
        assert sine.linear.bias.abs().max() == 0
    assert torch.equal(net.bias_p, torch.zeros(1, 1, 16, 16))
    assert (net.linears[0].bias == 1).all()
    bound = math.sqrt(3 / 400)
    assert net.linears[0].weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert net.output_linear.weight.abs().max().item() == pytest.approx(bound / 16, rel=0.01)


def test_renormalisation():
    z = noise(2, 3, 7).requires_grad_()
    value = renormalise(z)
    torch.testing.assert_close(value, z * (1 + 0.1 / z.norm(dim=2, keepdim=True)))
    ct = noise(2, 3, 7)
    grad = torch.autograd.grad((value * ct).sum(), z)[0]
    torch.testing.assert_close(grad, torch.autograd.grad((0.1 * F.normalize(z, dim=2) * ct).sum(), z)[0])
    full = torch.autograd.grad((renormalise(z, detach=False) * ct).sum(), z)[0]
    torch.testing.assert_close(full, grad + ct)


def test_what_kernels_depend_on():
    x = noise(4, 3, 6, 6)
    net = LocalSlowNet(3, (3, 3), 4).double()
    torch.testing.assert_close(net(x), net(x.flip(0)))
    torch.testing.assert_close(net(x), net(x.mean(0, keepdim=True)))
    assert not torch.allclose(net(x), net(x[:2]))
    each = LocalSlowNet(3, (3, 3), 4, context="image").double()
    torch.testing.assert_close(each(x)[1:2], each(x[1:2]))
    running = LocalSlowNet(3, (3, 3), 4, context="running", momentum=0.25).double()
    running.load_state_dict(net.state_dict(), strict=False)
    torch.testing.assert_close(running(x), net(x))
    mean = F.adaptive_avg_pool2d(x, 3).mean(0, keepdim=True)
    torch.testing.assert_close(running.running_context, mean / 4)
    running.running_context.copy_(mean)
    torch.testing.assert_close(running.eval()(noise(2, 3, 6, 6)), net(x))


def test_kernels_at_other_sizes():
    net = away(SlowNet((5, 5), 2, 4))
    torch.testing.assert_close(net((9, 9))[..., ::2, ::2], net())
    assert net((3, 7)).shape == (1, 2, 3, 7)


def test_zzw():
    y, k = noise(2, 3, 4), noise(3, 4)
    torch.testing.assert_close(hyperzzw(k, y), k * y.square())
    x = noise(2, 3, 5, 5)
    eye = torch.eye(5, dtype=torch.float64).expand(2, 3, 5, 5)
    kernel = noise(1, 3, 5, 5)
    torch.testing.assert_close(hyperzzw_global(x, kernel, eye), x * kernel)
    torch.testing.assert_close(hyperzzw_global(x, torch.ones_like(kernel), eye), x)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 3), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6))
def test_global_product_by_definition(batch, channels, height, width):
    x, f = noise(batch, channels, height, width), noise(batch, channels, height, width)
    kernel = noise(1, channels, height, width)
    side = max(height, width)
    full = [F.pad(t, (0, side - width, 0, side - height)) for t in (x * kernel, f)]
    expected = torch.einsum("ncit,nctj->ncij", *full)[..., :height, :width]
    torch.testing.assert_close(hyperzzw_global(x, kernel, f), expected)


def test_channel_gate():
    x = noise(1, 4, 5, 6)
    gate = HyperChannelInteract(4, 3).double()
    with torch.no_grad():
        gate.slow_net_gc.Kernel.output_linear.weight.zero_()
        gate.slow_net_gc.Kernel.output_linear.bias.fill_(1)
    torch.testing.assert_close(gate(x), x * torch.sigmoid(x.mean((2, 3), keepdim=True).square()))
    torch.testing.assert_close(gate(x[..., 0]), x[..., 0] * torch.sigmoid(x[..., 0].mean(2, keepdim=True).square()))


def test_merged_channel_gate_holds_its_kernel():
    gate = away(HyperChannelInteract(5, 3))
    merged = gate.merge()
    assert list(merged.parameters()) == []
    x = noise(2, 5, 3, 4)
    torch.testing.assert_close(merged(x), gate(x))
    assert list(gate.parameters())


def test_interaction_gate():
    gate = away(HyperInteract(3, (4, 5), 3, 4))
    y, x = noise(2, 3, 4, 5), noise(2, 3, 4, 5)
    kc, ks = gate.slow_net_gc().flatten(), gate.slow_net_gs()[0, 0]
    expected = torch.empty_like(x)
    for n in range(2):
        for c in range(3):
            channel, spatial = kc[c] * y[n, c].mean() ** 2, ks * y[n].mean(0) ** 2
            expected[n, c] = x[n, c] * torch.sigmoid(spatial * channel)
    torch.testing.assert_close(gate(y, x), expected)
    assert gate(noise(2, 3, 6, 6), noise(2, 3, 6, 6)).shape == (2, 3, 6, 6)


def test_rgu():
    unit = away(RGU(3, (4, 5)))
    x = noise(2, 3, 4, 5)

    def lin(conv, v):
        return F.conv2d(v, conv.weight, conv.bias)

    inner = lin(unit.fast_linear_k, x) * lin(unit.fast_linear_q, lin(unit.fast_linear_v, x))
    expected = lin(unit.fast_linear_y, F.gelu(F.instance_norm(inner)) + unit.fast_bias_p)
    torch.testing.assert_close(unit(x), expected)


@pytest.mark.parametrize("groups", [12, 3])
def test_g_ibs(groups):
    unit = GIBS(24, groups).double()
    x = 3 * noise(4, 24, 5, 6) + 7
    y = unit(x)
    assert list(unit.parameters()) == []
    for group, (a, b) in enumerate(zip(x.chunk(groups, 1), y.chunk(groups, 1), strict=True)):
        normed = F.instance_norm(a) if group % 2 else F.batch_norm(a, None, None, training=True)
        torch.testing.assert_close(b, normed)
    torch.testing.assert_close(unit.eval()(x), y)


def test_running_statistics_are_those_of_batch_norm():
    unit, norm = GIBS(4, 1, batch_stats="running").double(), nn.BatchNorm2d(4, affine=False).double()
    for _ in range(3):
        x = 2 * noise(3, 4, 5, 6) + 1
        torch.testing.assert_close(unit(x), norm(x))
    torch.testing.assert_close(unit.running_var, norm.running_var)
    torch.testing.assert_close(unit.eval()(x), norm.eval()(x))
    torch.testing.assert_close(unit(x[:1]), norm(x[:1]))


def test_local_convolution():
    layer = LocalConv(3).double()
    x, kernel = noise(2, 3, 6, 7), noise(3, 1, 5, 3)
    mixed = layer.channel_mixer(F.conv2d(x, kernel, padding=(2, 1), groups=3))
    torch.testing.assert_close(layer(kernel, x), F.gelu(F.batch_norm(mixed, None, None, training=True)))


@pytest.mark.parametrize(
    ("build", "size"), [(HyperZZWConv1d, (9,)), (HyperZZWConv2d, (6, 7)), (HyperZZWConv3d, (4, 5, 3))]
)
def test_operator_is_a_separable_convolution_with_a_made_kernel(build, size):
    layer = away(build(3, 5, 3, stride=2, hidden=4))
    x = noise(2, 3, *size)
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(size)]
    kernel = layer.slow_net(x)
    depthwise = convolve(x, kernel, stride=2, padding=1, groups=3)
    expected = convolve(depthwise, layer.channel_mixer.weight, layer.channel_mixer.bias)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.eval().merge()(x), layer(x), rtol=1e-5, atol=1e-7)


def test_contexts_of_the_operator():
    x = noise(3, 3, 6, 7)
    layer = away(HyperZZWConv2d(3, kernel_size=3, hidden=4, context="image")).eval()
    torch.testing.assert_close(layer(x)[1:2], layer(x[1:2]))
    one = copy.deepcopy(layer)
    one.slow_net.context = "batch"
    torch.testing.assert_close(layer(x[:1]), one(x[:1]))
    assert not torch.allclose(one(x)[:1], one(x[:1]))
    with pytest.raises(ValueError, match="context='image'"):
        layer.merge()
    held, true = (HyperZZWConv2d(3, kernel_size=3, hidden=4, detach=d) for d in (True, False))
    true.load_state_dict(held.state_dict())
    assert torch.equal(held(x.float()), true(x.float()))


def test_global_operator():
    layer = away(HyperZZWGlobal2d(3, kernel_size=5, hidden=4))
    x = noise(2, 3, 5, 5)
    kernel = layer.slow_net()
    f = F.instance_norm(layer.channel_mixer(x))
    torch.testing.assert_close(layer(x), torch.einsum("ncit,cit,nctj->ncij", x, kernel[0], f))


def test_block_by_its_equations():
    block = away(SFNEBlock(6, 2, 5, 2, (3, 5, 1, 3), 4, 3, 3, 2, 3, (3, 4)))
    x, pre, pre2 = noise(3, 6, 5, 5), noise(3, 3, 5, 5), noise(3, 2, 5, 5)
    b, norm = block.fast_multi_branch, F.instance_norm
    kernel = b.slow_net_g()
    fast = norm(b.Fast_Kernel_rgu_2(x * kernel) + b.Fast_Kernel_rgu(x))
    mix, hci = norm(b.channel_mixer_mlp(x)), norm(b.channel_mixer_hci(x))
    o1, o2, o3 = ((x * kernel) @ f for f in (fast, mix, hci))
    l1 = b.local_interact_conv_1(b.slow_net_l1(x), hci) + b.bias1
    l2 = b.local_interact_conv_2(b.slow_net_l2(hci), x) + b.bias2
    l3 = b.local_interact_conv_3(b.slow_net_l3(mix), x) + b.bias3
    l4 = b.local_interact_conv_4(b.slow_net_l4(x), mix) + b.bias4
    twice, thrice = pre.repeat(1, 2, 1, 1), pre2.repeat(1, 3, 1, 1)
    gate = torch.sigmoid(o1) * o1
    cat = torch.cat([o1, l2, twice, fast, o2, l1, gate, l3, o3, l4, thrice, b.hyper_interact(o1, x)], 1)
    expected = F.gelu(GIBS(12)(b.bottleneck_layer(cat))) + block.bias
    y, k = block(x, pre, pre2)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(k, kernel)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(block(x[order], pre[order], pre2[order])[0], y[order])
    with pytest.raises(ValueError, match="earlier=2"):
        block(x)
    with pytest.raises(ValueError, match="must divide"):
        block(x, noise(3, 4, 5, 5), pre2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_standardises_large_and_shifted_values(dtype):
    x = (300 * torch.randn(4, 6, 8, 8) + 500).to(dtype)
    step = 2 * torch.finfo(dtype).eps  # of a result up to 4
    for y, expected in (
        (standardise(x), F.instance_norm(x.float())),
        (GIBS(6, 1)(x), F.batch_norm(x.float(), None, None, training=True)),
    ):
        assert y.dtype == dtype
        assert (y.float() - expected).abs().max() < step


def test_empty_batch_leaves_running_values_alone():
    layer, unit = HyperZZWConv2d(3, kernel_size=3, hidden=4), GIBS(12, batch_stats="running")
    layer(torch.randn(2, 3, 5, 5))
    unit(torch.randn(2, 12, 5, 5))
    for module, channels in ((layer, 3), (unit, 12)):
        before = {n: b.clone() for n, b in module.named_buffers()}
        module(torch.randn(0, channels, 5, 5)).sum().backward() if module is layer else module(torch.zeros(0, 12, 2))
        for name, buffer in module.named_buffers():
            assert torch.equal(buffer, before[name])
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert HyperZZWGlobal2d(3, kernel_size=4, hidden=4)(torch.zeros(0, 3, 4, 4)).shape == (0, 3, 4, 4)


def test_published_parameter_counts():
    ten, hundred, mini = terminator(), terminator(num_classes=100), terminator_mini()
    assert [sum(p.numel() for p in m.parameters()) for m in (ten, hundred, mini)] == [1_336_855, 1_362_865, 76_075]
    nets = [m for m in ten.modules() if isinstance(m, KernelNet)]
    coordinate_part = sum(p.numel() for m in nets for n, p in m.named_parameters() if not n.startswith("fast"))
    assert coordinate_part == 220_800


def test_network():
    net = small_net().eval()
    x = torch.randn(3, 3, 6, 6)
    final, maps = net.forward_intermediates(x)
    assert [m.shape[1] for m in maps] == [i["num_chs"] for i in net.feature_info] == [12, 12, 24, 24]
    assert torch.equal(final, net.forward_features(x))
    y, _ = net.blocks[3](maps[2], maps[1], maps[0])
    assert torch.equal(y, final)
    assert torch.equal(net.forward_head(final), net(x))
    torch.testing.assert_close(net.forward_head(final, pre_logits=True), final.mean((2, 3)))
    first = net.forward_intermediates(x, [0], stop_early=True, output_fmt="NHWC", intermediates_only=True)
    assert torch.equal(first[0], maps[0].movedim(1, -1))
    net.reset_classifier(7)
    assert net(x).shape == (3, 7)
    net.reset_classifier(0)
    assert torch.equal(net(x), final.mean((2, 3)))
    assert net.get_classifier() is net.out_layer
    assert net(torch.randn(2, 3, 8, 9)).shape == (2, 24)
    with pytest.raises(ValueError, match="expected"):
        net(x[:, :2])


def test_recomputation_changes_nothing():
    net = small_net()
    twin = copy.deepcopy(net)
    twin.set_grad_checkpointing()
    x = torch.randn(3, 3, 6, 6)
    for each in (net, twin):
        each(x).square().sum().backward()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_merge_freezes_kernels():
    x = torch.randn(3, 3, 6, 6)
    for stats, frozen in (("batch", 4 * 4), ("running", 4 * 8)):
        net = small_net(batch_stats=stats)
        net(x)
        net.eval()
        merged = net.merge()
        assert sum(isinstance(m, FrozenKernel) for m in merged.modules()) == frozen
        torch.testing.assert_close(merged(x), net(x))
        assert sum(p.numel() for p in merged.parameters()) < sum(p.numel() for p in net.parameters())
        with pytest.raises(ValueError, match="frozen kernel"):
            merged(torch.randn(3, 3, 7, 7))
    torch.testing.assert_close(net(x)[1:2], net(x[1:2]))  # running statistics: images do not see each other


def test_slow_loss():
    k = noise(1, 2, 3, 3)
    chain = [k, k.repeat(1, 3, 1, 1), k.repeat(1, 6, 1, 1)]
    assert slow_neural_loss(chain, (3, 2)) == 0
    kernels = [noise(1, c, 3, 3).requires_grad_() for c in (2, 6, 12)]
    pairs = [(0, 1, 3), (0, 2, 6), (1, 2, 2)]
    expected = sum((kernels[j].repeat(1, t, 1, 1) - kernels[i]).square().mean() for j, i, t in pairs)
    torch.testing.assert_close(slow_neural_loss(kernels, (3, 2, 5)), expected)
    assert torch.autograd.gradcheck(lambda *ks: slow_neural_loss(ks, (3, 2)), kernels)
    with pytest.raises(ValueError, match="factors="):
        slow_neural_loss(kernels, (2, 2))


def test_auxiliary_loss_reaches_training():
    net = small_net(norm_penalty=0.5)
    hooks = Hooks(net)
    total = hooks.auxiliary_loss(torch.tensor(2.0), 0)
    torch.testing.assert_close(total, 2 + net.slow_loss() + 0.5 * norm_penalty(net))
    total.backward()
    assert net.blocks[0].fast_multi_branch.slow_net_g.Kernel.output_linear.weight.grad.abs().max() > 0
    assert Terminator.auxiliary_loss([small_net(slow_loss_weight=0.0)], 0) is None


def test_norm_penalty():
    net = small_net(factors=(4,), earlier=(0,), global_layers=(1,), drop_rates=(0.0,))
    fast = sum(p.norm() for n, p in net.named_parameters() if "fast" in n and "Kernel" not in n)
    slow = [m for m in net.modules() if isinstance(m, KernelNet)]
    weights = [m.weight for k in slow for m in k.modules() if isinstance(m, nn.Conv1d | nn.Conv2d)]
    torch.testing.assert_close(norm_penalty(net), fast + 1e-6 * sum(w.norm() for w in weights))


def test_options_from_a_checkpoint():
    net = small_net()
    state = {**net.state_dict(), "blocks.0.fast_multi_branch.slow_net_g.train_length": torch.tensor([6])}
    converted = convert_official(state)
    twin = Terminator(5, **read_official(converted))
    twin.load_state_dict(converted)
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(twin.eval()(x), net.eval()(x))


def test_grey_images_and_names():
    net = create_model("terminator_mini", num_classes=3).eval()
    x = torch.randn(4, 1, 8, 8)
    assert net(x).shape == (4, 3)
    assert net.torchconv_config["model"] == "terminator_mini"
    assert small_net(in_chans=1, factors=(12, 1, 2, 1)).blocks[0].fast_multi_branch.channels == 1


@pytest.mark.parametrize("betas", [0.95, (0.5, 0.95), (0.1, 0.2, 0.3)])
def test_kar(betas):
    decays = (betas,) if isinstance(betas, float) else betas
    p = nn.Parameter(noise(3, 4))
    optimizer = Kar([p], 0.01, betas)
    expected, averages = p.detach().clone(), [torch.zeros(3, 4, dtype=torch.float64) for _ in decays]
    for step in range(5):
        p.grad = noise(3, 4) if step < 3 else torch.zeros(3, 4, dtype=torch.float64)
        before = p.detach().clone()
        move = p.grad.sign() + sum(m.sign() for m in averages)
        averages = [b * m + (1 - b) * p.grad for b, m in zip(decays, averages, strict=True)]
        optimizer.step()
        expected = expected - 0.01 * move
        torch.testing.assert_close(p.detach(), expected)
        if step == 0:
            torch.testing.assert_close(p.detach(), before - 0.01 * p.grad.sign())
    assert not torch.equal(p.detach(), before)  # the gradient was zero
    twin = Kar([p], 0.5, betas)
    twin.load_state_dict(optimizer.state_dict())
    assert twin.param_groups[0]["lr"] == 0.01


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GIBS(10), "channels=10"),
        (lambda: GIBS(12, batch_stats="none"), "batch_stats='none'"),
        (lambda: LocalSlowNet(3, (3,), context="item"), "context='item'"),
        (lambda: SlowNet((3,), 1, omega_0=0.0), r"omega_0=0\.0"),
        (lambda: HyperZZWConv2d(4, groups=2), "groups=2"),
        (lambda: HyperZZWGlobal2d(4, groups=4), "groups=4"),
        (lambda: SFNEBlock(3, 4, 5, earlier=3), "earlier=3"),
        (lambda: SFNEBlock(3, 4, 5, kernel_sizes=(3,)), "kernel_sizes="),
        (lambda: SFNEBlock(3, 4, 5, dropout=1.0), "dropout="),
        (lambda: small_net(earlier=(0, 1, 1, 2)), "earlier="),
        (lambda: small_net(global_layers=(2,)), "global_layers="),
        (lambda: small_net(factors=(3, 1, 2, 1)), "channels=9"),
        (lambda: small_net(global_pool="sum"), "global_pool="),
        (lambda: HyperChannelInteract(4)(torch.zeros(2, 1, 5, 5)), r"\(2, 1, 5, 5\): expected \(N, 4\)"),
        (lambda: HyperInteract(4, (5, 5))(*[torch.zeros(2, 1, 5, 5)] * 2), r"x of shape \(2, 1, 5, 5\)"),
        (lambda: HyperInteract(4, (5,))(torch.zeros(2, 1, 5), torch.zeros(2, 4, 5)), r"y of shape \(2, 1, 5\)"),
        (lambda: HyperInteract(4, 5), "size=5"),
        (lambda: RGU(4, (0, 5)), r"size=\(0, 5\)"),
        (lambda: RGU(4, (5, 5))(torch.zeros(2, 4, 5)), r"x of shape \(2, 4, 5\)"),
        (lambda: GIBS(12)(torch.zeros(2, 24, 3)), r"x of shape \(2, 24, 3\)"),
        (lambda: LocalConv(3)(torch.zeros(2, 1, 3, 3), torch.zeros(2, 3, 5, 5)), r"kernel of shape \(2, 1, 3, 3\)"),
        (lambda: LocalConv(3, 4), "ndim=4"),
        (lambda: hyperzzw_global(*[torch.zeros(2, 3, 4)] * 3), r"x of shape \(2, 3, 4\)"),
        (lambda: slow_neural_loss([], []), "kernels=0"),
        (lambda: slow_neural_loss([torch.zeros(1, 2, 3, n) for n in (3, 4)], [1]), r"kernels=\[\(3, 3\), \(3, 4\)\]"),
        (lambda: SFNEBlock(3, 4, 6)(torch.zeros(2, 4, 6, 6)), r"x of shape \(2, 4, 6, 6\)"),
        (lambda: SFNEBlock(3, 4, 6, 1)(*(torch.zeros(2, 3, n, n) for n in (6, 5))), r"earlier features of shape"),
        (lambda: read_official({"weight": torch.zeros(1)}), "state="),
        (lambda: Kar([nn.Parameter(torch.ones(1))], -1), "lr=-1"),
        (lambda: Kar([nn.Parameter(torch.ones(1))], betas=()), "betas="),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build()
