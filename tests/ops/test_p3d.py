"""Pseudo-3-D convolution and P3D: against loops and 3-D kernels, the paper's limits, both dialects, published sizes."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from torchconv.models.video import p3d as family
from torchconv.models.video.p3d import P3D, P3DBottleneck
from torchconv.ops.p3d import P3DConv3d, activated, p3d_conv, space_conv, time_conv, wire

FORMS = ("A", "B", "C")


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def randomised(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.is_floating_point():
                values = torch.randn(tensor.shape, generator=generator)
                fan = max(1, tensor[0].numel()) if tensor.dim() > 1 else 1
                tensor.copy_(0.5 + values.abs() if "var" in name else values / fan**0.5)
    return module.double().eval()


def loops(x, weight, padding, stride, dilation):
    """Dense 3-D cross-correlation, output by output and tap by tap; padding is (before, after) an axis."""
    sizes = [
        (n + sum(p) - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(x.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True)
    ]
    y = x.new_zeros(x.shape[0], len(weight), *sizes)
    for place in itertools.product(*(range(n) for n in sizes)):
        for tap in itertools.product(*(range(k) for k in weight.shape[2:])):
            source = [i * s + t * d - p[0] for i, s, t, d, p in zip(place, stride, tap, dilation, padding, strict=True)]
            if all(0 <= i < n for i, n in zip(source, x.shape[2:], strict=True)):
                y[(..., *place)] += x[(..., *source)] @ weight[(..., *tap)].T
    return y


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(FORMS),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 2)),
    st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 2)),
    st.integers(0, 99),
)
def test_equals_one_dense_kernel(form, kernel, stride, dilation, seed):
    layer = randomised(P3DConv3d(2, 3, kernel, stride, "same", dilation, bias=False, form=form), seed)
    space, time = layer.space.weight, layer.time.weight
    # The dense kernel on a grid without dilation, where S sits at T's centre and the other way round.
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    taps = [range(0, r + 1, d) for r, d in zip(reach, dilation, strict=True)]
    dense = torch.zeros(3, 2, *(r + 1 for r in reach), dtype=torch.float64)
    ct, ch, cw = (r // 2 for r in reach)
    for (i, t), (j, h), (k, w) in itertools.product(*(enumerate(axis) for axis in taps)):
        if form != "B":
            dense[:, :, t, h, w] += time[:, :, i, 0, 0] @ space[:, :, 0, j, k]
    for (j, h), (k, w) in itertools.product(enumerate(taps[1]), enumerate(taps[2])):
        if form != "A":
            dense[:, :, ct, h, w] += space[:, :, 0, j, k]
    for i, t in enumerate(taps[0]):
        if form == "B":
            dense[:, :, t, ch, cw] += time[:, :, i, 0, 0]
    x = noise(1, 2, 4, 5, 4, seed=seed)
    expected = loops(x, dense, [(r // 2, r - r // 2) for r in reach], stride, (1, 1, 1))
    torch.testing.assert_close(layer(x), expected)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(FORMS),
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from([1, 2, (2, 1, 3), 3]),
    st.sampled_from(["same", "valid", 0, 2, (2, 0, 3), 5]),
    st.sampled_from([1, 2]),
    st.booleans(),
)
def test_merge_gives_one_convolution(form, kernel, stride, dilation, padding, groups, bias):
    layer = randomised(P3DConv3d(4, 6, kernel, stride, padding, dilation, groups, bias, form=form))
    x = noise(2, 4, 11, 12, 10)
    merged = layer.merge()
    assert type(merged) is nn.Conv3d
    torch.testing.assert_close(layer(x), merged(x))


@pytest.mark.parametrize("dialect", ["caffe", "port"])
@pytest.mark.parametrize("form", FORMS)
def test_nonlinear_form_and_its_folded_twin(form, dialect):
    layer = randomised(P3DConv3d(4, 6, 3, (2, 1, 2), form=form, nonlinear=True, dialect=dialect))
    x = noise(2, 4, 5, 6, 7)
    s = layer.bn_space(F.conv3d(x, layer.space.weight, None, (1, 1, 2), (0, 1, 1))).relu()
    if form == "B":
        t = layer.bn_time(F.conv3d(x[..., ::2], layer.time.weight, None, (2, 1, 1), (1, 0, 0)))
    else:
        t = layer.bn_time(F.conv3d(s, layer.time.weight, None, (2, 1, 1), (1, 0, 0)))
    s = s[:, :, ::2]
    expected = {
        "A": t.relu(),
        "B": (s + t).relu() if dialect == "caffe" else s + t.relu(),
        "C": (0.5 * s + 0.5 * t).relu() if dialect == "caffe" else s + t.relu(),
    }[form]
    torch.testing.assert_close(layer(x), expected)
    twin = layer.merge()
    torch.testing.assert_close(twin.merge()(x), expected)
    assert not any(isinstance(m, nn.BatchNorm3d) for m in twin.modules())
    assert layer.bias is None


def test_factors_are_3d_convolutions():
    x, space, time = noise(2, 3, 5, 6, 7), noise(4, 3, 1, 3, 3), noise(4, 3, 3, 1, 1)
    bias = noise(4)
    torch.testing.assert_close(space_conv(x, space, bias), F.conv3d(x, space, bias, padding=(0, 1, 1)))
    torch.testing.assert_close(
        space_conv(x, space, None, 2, 0, (1, 2)), F.conv3d(x, space, None, (1, 2, 2), 0, (1, 1, 2))
    )
    torch.testing.assert_close(time_conv(x, time, bias), F.conv3d(x, time, bias, padding=(1, 0, 0)))
    torch.testing.assert_close(
        time_conv(x, time, None, 2, 2, 2), F.conv3d(x, time, None, (2, 1, 1), (2, 0, 0), (2, 1, 1))
    )


def test_permutations():
    x, space, time = noise(1, 2, 5, 4, 4), noise(2, 2, 1, 3, 3), noise(2, 2, 3, 1, 1)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(space_conv(x[:, :, order], space), space_conv(x, space)[:, :, order])
    assert (time_conv(x[:, :, order], time) - time_conv(x, time)[:, :, order]).abs().max() > 0.1
    places = torch.randperm(16, generator=torch.Generator().manual_seed(0))

    def shuffle(v):
        return v.flatten(3)[..., places].unflatten(3, (4, 4))

    torch.testing.assert_close(time_conv(shuffle(x), time), shuffle(time_conv(x, time)))


def test_still_clips_stay_still():
    frame = noise(1, 2, 1, 4, 4).expand(1, 2, 6, 4, 4)
    y = space_conv(frame, noise(3, 2, 1, 3, 3))
    torch.testing.assert_close(y, y[:, :, :1].expand_as(y))
    taps = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64) * torch.eye(2, dtype=torch.float64)[..., None]
    z = time_conv(frame, taps[..., None, None])
    torch.testing.assert_close(z[:, :, 1:-1], frame[:, :, 1:-1])
    assert (z[:, :, 0] - frame[:, :, 0]).abs().max() > 0.1


def still(block):
    """T passes its input on: the centre tap is the identity and its batch norm neutral."""
    planes = block.conv3.weight.shape[0]
    with torch.no_grad():
        block.conv3.weight.zero_()[:, :, 1, 0, 0] = torch.eye(planes)
        block.bn3.running_mean.zero_()
        block.bn3.running_var.fill_(1 - block.bn3.eps)
        block.bn3.weight.fill_(1)
        block.bn3.bias.zero_()
    return block


def test_block_a_reduces_to_the_2d_bottleneck_on_frames():
    block = still(randomised(P3DBottleneck(6, 3, 2)))
    flat = randomised(P3DBottleneck(6, 3, 2, "2d"))
    state = {}
    for name, tensor in block.state_dict().items():
        if "3." not in name.split("downsample")[0] or name.startswith("downsample"):
            place = name.replace("conv2", "conv_normal").replace("bn2", "bn_normal")
            state[place] = tensor.squeeze(2) if tensor.dim() == 5 else tensor
    flat.load_state_dict(state)
    x = noise(2, 6, 4, 5, 5)
    expected = torch.stack([flat(x[:, :, t]) for t in range(4)], 2)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize(("form", "dialect", "factor"), [("B", "caffe", 1), ("C", "caffe", 0.5), ("C", "port", 1)])
def test_without_time_the_middle_is_the_spatial_part(form, dialect, factor):
    x = noise(2, 3, 4, 4, 4)
    y = activated(x, lambda z: z, torch.zeros_like, form, dialect)
    torch.testing.assert_close(y, factor * x.relu())


def test_wiring():
    x = torch.tensor([1.0, -2.0])
    values = {f: wire(x, lambda z: 2 * z, lambda z: z + 1, f).tolist() for f in FORMS}
    assert values == {"A": [3.0, -3.0], "B": [4.0, -5.0], "C": [5.0, -7.0]}


def test_parameters_and_multiply_adds():
    layer = P3DConv3d(8, bias=False)
    assert sum(p.numel() for p in layer.parameters()) == (9 + 3) * 64
    x = torch.zeros(1, 8, 4, 5, 5)
    costs = []
    for module in (layer, layer.merge()):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(x)
        costs.append(counter.get_total_flops())
    assert costs[0] * 27 == costs[1] * 12


@pytest.mark.parametrize("form", FORMS)
def test_channels_last_is_kept(form):
    x = torch.randn(2, 4, 6, 5, 7).contiguous(memory_format=torch.channels_last_3d)
    for options in ({}, {"nonlinear": True}):
        layer = P3DConv3d(4, 6, stride=2, form=form, **options).eval()
        assert layer(x).is_contiguous(memory_format=torch.channels_last_3d)
        torch.testing.assert_close(layer(x), layer(x.contiguous()))


@pytest.mark.parametrize(
    ("name", "parameters", "billions"),
    [("p3d63", 25_745_232, 8.44), ("p3d131", 48_088_400, 12.90), ("p3d199", 66_492_240, 18.40)],
)
def test_published_sizes(name, parameters, billions):
    with torch.device("meta"):
        net, x = getattr(family, name)().eval(), torch.zeros(1, 3, 16, 160, 160)
    assert sum(p.numel() for p in net.parameters()) == parameters
    with FlopCounterMode(display=False) as counter:
        assert net.forward_features(x).shape == (1, 2048, 1, 5, 5)
    assert round(counter.get_total_flops() / 2e9, 2) == billions
    if name == "p3d199":  # Sports-1M
        net.reset_classifier(487)
        assert sum(p.numel() for p in net.parameters()) == 66_670_503


def test_letters_of_p3d199():
    with torch.device("meta"):
        net = family.p3d199()
    letters = ["".join(b.form[0] for b in getattr(net, f"layer{i}")) for i in (1, 2, 3, 4)]
    assert letters[:2] == ["ABC", "ABCABCAB"]
    assert letters[2].startswith("CABC")
    assert letters[3] == "222"
    forms = "".join(letters[:3])
    assert (forms.count("B"), forms.count("C")) == (16, 15)


def test_poolings_of_the_dialects():
    caffe, port = (P3D((1, 1, 1, 1), 0, 1, 1, dialect=d).eval() for d in ("caffe", "port"))
    for net in (caffe, port):
        nn.init.constant_(net.conv1_custom.weight, 1.0)
    for size, shapes in ((32, (8, 8)), (33, (8, 9))):
        x = torch.rand(1, 1, 4, size, size)
        maps = [net.stem(x) for net in (caffe, port)]
        assert [m.shape[-1] for m in maps] == list(shapes)
        if size == 32:
            assert (maps[0] - maps[1]).abs().max() > 0
    x = torch.rand(1, 1, 8, 32, 32)
    assert caffe.forward_features(x).shape[2] == 1
    with pytest.raises(ValueError, match="16 frames"):
        port(x)


def test_long_clips_do_not_mix_items():
    net = randomised(P3D((1, 1, 1, 1), 5, width=4))
    x = noise(3, 3, 32, 32, 32)
    assert net.forward_features(x).shape == (3, 128, 2, 1, 1)
    torch.testing.assert_close(net(x)[1:2], net(x[1:2]))
    two = torch.cat([net.forward_features(h) for h in (x[:, :, :16], x[:, :, :16])], 2)
    torch.testing.assert_close(net.forward_head(two), net(x[:, :, :16]))


def test_network_head_stages_and_merge():
    net = randomised(P3D((1, 2, 1, 1), 5, in_chans=2, width=4, forms="BC", dialect="port"))
    x = noise(1, 2, 16, 32, 32)
    assert [b.form for layer in (net.layer1, net.layer2, net.layer3) for b in layer] == ["B", "C", "B", "C"]
    torch.testing.assert_close(net.merge().merge()(x), net(x))
    assert not any("BatchNorm" in type(m).__name__ for m in net.merge().modules())
    maps = net.forward_intermediates(x, intermediates_only=True)
    assert [(m.shape[1], x.shape[-1] // m.shape[-1]) for m in maps] == [
        (i["num_chs"], i["reduction"]) for i in net.feature_info
    ]
    features = net.forward_head(net.forward_features(x), pre_logits=True)
    torch.testing.assert_close(net.fc(features), net(x))
    net.reset_classifier(7)
    assert net(x).shape == (1, 7)
    net.reset_classifier(0)
    torch.testing.assert_close(net(x), features)


def test_every_convolution_of_a_network_can_be_swapped():
    from torchconv.surgery import swap

    net, x = P3D((1, 1, 1, 1), 3, width=2), torch.randn(1, 3, 16, 16, 16)
    swapped = swap(net.eval(), "p3d", example=x)
    assert {n for n, m in swapped.named_modules() if isinstance(m, P3DConv3d)} == {
        f"layer{stage}.0.conv{number}" for stage in (1, 2, 3) for number in (2, 3)
    }
    torch.testing.assert_close(swapped.merge()(x), swapped(x))
    net.layer2[0].conv2 = nn.Conv3d(4, 4, 3, padding=1)
    assert net(x).shape == (1, 3)
    seen = []
    for layer in (net.layer1[0].conv2, net.layer1[0].conv3):
        layer.register_forward_hook(lambda module, inputs, y: seen.append((module.kernel_size, y.shape)))
    net(x)
    assert seen == [((1, 3, 3), (1, 2, 8, 4, 4)), ((3, 1, 1), (1, 2, 8, 4, 4))]


def test_dropout_before_the_classifier_only():
    torch.manual_seed(0)
    net = P3D((1, 1, 1, 1), 0, width=4, drop_rate=0.9)
    assert (net.neck(torch.ones(4, 128)) == 0).float().mean() > 0.8
    assert torch.equal(net.eval().neck(torch.ones(4, 128)), torch.ones(4, 128))


def test_resnet_weights_become_spatial_ones():
    from torchvision.models.resnet import Bottleneck, ResNet

    torch.manual_seed(0)
    resnet = ResNet(Bottleneck, [3, 4, 6, 3])
    net = family.p3d63(num_classes=5)
    left = net.load_resnet(resnet.state_dict())
    assert all(".conv3." in n or ".bn3." in n or n.startswith("fc.") for n in left)
    assert torch.equal(net.layer2[1].conv2.weight[:, :, 0], resnet.layer2[1].conv2.weight)
    assert torch.equal(net.layer4[0].conv_normal.weight, resnet.layer4[0].conv2.weight)
    assert torch.equal(net.layer3[0].conv4.weight[:, :, 0], resnet.layer3[0].conv3.weight)
    assert torch.equal(net.conv1_custom.weight[:, :, 0], resnet.conv1.weight)
    with pytest.raises(ValueError, match="layer1"):
        P3D((1, 1, 1, 1)).load_resnet(resnet.state_dict())
    with pytest.raises(ValueError, match="shape"):
        P3D((3, 4, 6, 3), width=32).load_resnet(resnet.state_dict())


@pytest.mark.parametrize(
    ("config", "stride"),
    [
        ({"n_s": 0, "downsample": True, "stride": 2}, 1),
        ({"n_s": 4, "downsample": True}, 2),
        ({"n_s": 4, "downsample": False}, 1),
        ({"n_s": 6, "depth_3d": 6, "downsample": True, "ds_stride": [1, 1, 1]}, 2),
        ({"n_s": 7, "depth_3d": 6, "downsample": True}, 1),
    ],
)
def test_parity_takes_the_ports_strides(config, stride):
    from tests.parity.p3d import _block

    module = _block({"inplanes": 8, "planes": 2, **config}).module
    assert module.conv1.stride[-1] == stride


@pytest.mark.parametrize(("last", "frames"), [("res2c_relu", None), ("3a_pool", 2)])
def test_parity_evaluates_the_graph_up_to_a_pooling(last, frames):
    from pathlib import Path

    from tests.parity.core import read_case, run_case
    from tests.parity.p3d import adapt

    case = read_case(Path(__file__).parents[1] / "golden/p3d/caffe_graph_res2_res3a.safetensors")
    pooled = F.max_pool3d(case.outputs["res2c"], (2, 1, 1), ceil_mode=True)
    outputs = {"res2c": case.outputs["res2c"], **({"3a_pool": pooled} if frames else {})}
    case.config["last"] = last
    names = [n for n in case.state if "3a_" not in n]
    assert len(outputs) == 1 or pooled.shape[2] == frames
    state = {n: case.state[n] for n in names}
    case = dataclasses.replace(case, outputs=outputs, grads={}, state=state)
    assert all(t.passed for t in run_case(case))
    case.config["last"] = "res2a_relu"  # the state may hold more than that
    assert set(adapt(case).forward(case.inputs)) == {"pool1", "res2a"}


def test_a_published_checkpoint_is_loaded_in_the_ports_dialect(tmp_path):
    from torchconv.weights import load_official

    sizes = {"layers": (1, 1, 1, 1), "width": 2}
    net, x = P3D(**sizes, num_classes=3, dialect="port").eval(), torch.randn(1, 3, 16, 33, 32)
    torch.save({"state_dict": {f"module.{n}": t for n, t in net.state_dict().items()}}, tmp_path / "port.pth")
    loaded = load_official("p3d63", tmp_path / "port.pth", **sizes)
    torch.testing.assert_close(loaded(x), net(x))


def test_refusals():
    with pytest.raises(ValueError, match="form='D'"):
        P3DConv3d(4, form="D")
    with pytest.raises(ValueError, match="dialect='torch'"):
        P3DConv3d(4, dialect="torch")
    with pytest.raises(ValueError, match="downsample=False"):
        P3DBottleneck(8, 4, downsample=False)
    with pytest.raises(ValueError, match="forms='ABX'"):
        P3D(forms="ABX")
    with pytest.raises(ValueError, match="layers="):
        P3D((3, 4, 6))
    with pytest.raises(ValueError, match="drop_rate=1"):
        P3D((1, 1, 1, 1), drop_rate=1)
    with pytest.raises(ValueError, match="form='X'"):
        p3d_conv(torch.zeros(1, 1, 2, 2, 2), torch.zeros(1, 1, 1, 1, 1), torch.zeros(1, 1, 1, 1, 1), form="X")


def test_refusals_of_clips_and_kernels():
    with pytest.raises(ValueError, match="convolution in time"):
        time_conv(torch.zeros(1, 2, 5, 6, 6), torch.zeros(4, 2, 3, 3, 1))
    with pytest.raises(ValueError, match="convolution in space"):
        p3d_conv(torch.zeros(1, 2, 5, 6, 6), torch.zeros(4, 2, 3, 3, 3), torch.zeros(4, 4, 3, 1, 1))
    with pytest.raises(ValueError, match="smaller than the kernel"):
        P3DConv3d(2, kernel_size=5, padding="valid", form="B")(torch.zeros(1, 2, 3, 9, 9))
    with pytest.raises(ValueError, match="frames"):
        P3DBottleneck(8, 2, form="2d")(torch.zeros(1, 8, 4, 5, 5))
    with pytest.raises(ValueError, match="layers="):
        P3D((1, 1, 1, 1.0))
    port, caffe = (P3D((1, 1, 1, 1), 0, width=1, dialect=d).eval() for d in ("port", "caffe"))
    with pytest.raises(ValueError, match="16 frames"):
        port(torch.zeros(1, 3, 1, 8, 8))
    with pytest.raises(ValueError, match="3 × 3"):
        caffe(torch.zeros(1, 3, 16, 2, 8))
    with pytest.raises(ValueError, match=r"\(N, C, T, H, W\)"):
        caffe(torch.zeros(3, 16, 8, 8))


def test_claim_clips_move_as_labelled():
    from torchconv.claims.p3d import _clips

    x, y = _clips(16, torch.Generator().manual_seed(0))
    shifts = [(1, 2), (-1, 2), (1, 1), (-1, 1)]
    for clip, label in zip(x[:, 0], y.tolist(), strict=True):
        amount, axis = shifts[label]
        assert torch.equal(clip[1:], clip[:-1].roll(amount, axis))
