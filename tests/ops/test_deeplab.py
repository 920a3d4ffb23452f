"""Atrous convolution and its pyramid: phases, degenerate rates, merging; the heads and networks of DeepLab."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.parity.core import read_case, run_case
from torchconv.models.segment.deeplab import DeepLabResNet, DeepLabVGG, MultiScale, convert_vgg
from torchconv.ops.deeplab import ASPP1d, ASPP2d, ASPP3d, ASPPHead, aspp, atrous_conv

KINDS = {1: ASPP1d, 2: ASPP2d, 3: ASPP3d}
CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 12),
    st.integers(1, 3),
    st.sampled_from([1, 2]),
    st.integers(1, 7),
    st.integers(0, 99),
)
def test_equals_the_dilated_convolution(ndim, kernel, rate, stride, groups, length, seed):
    """Also where taps that miss the map are left out."""
    kernel = min(kernel, 3) if ndim == 3 else kernel
    x = noise(2, 4, *(length, 6, 5)[:ndim], seed=seed)
    weight, bias = noise(2, 4 // groups, *[kernel] * ndim, seed=seed + 1), noise(2, seed=seed + 2)
    total = rate * (kernel - 1)
    padded = F.pad(x, (total // 2, total - total // 2) * ndim)
    expected = CONVOLVE[ndim](padded, weight, bias, stride, 0, rate, groups)
    torch.testing.assert_close(atrous_conv(x, weight, bias, rate, stride, groups), expected)


def test_gradients_of_taps_left_out_are_zero():
    x, weight = noise(1, 2, 5, 9), noise(3, 2, 3, 3).requires_grad_()
    y = atrous_conv(x, weight, rate=6)
    (grad,) = torch.autograd.grad(y.square().sum(), weight)
    assert grad[:, :, [0, 2]].abs().max() == 0
    assert grad[:, :, 1].abs().min() > 0


@pytest.mark.parametrize("rate", [2, 3])
def test_equals_phases(rate):
    x, weight = noise(1, 2, 4 * rate, 3 * rate), noise(3, 2, 3, 3)
    y = atrous_conv(x, weight, rate=rate)
    for a in range(rate):
        for b in range(rate):
            phase = F.conv2d(x[..., a::rate, b::rate], weight, padding=1)
            torch.testing.assert_close(y[..., a::rate, b::rate], phase)


def test_dense_extraction():
    """Subsampling after atrous layers equals a strided layer followed by ordinary ones, away from the border."""
    x, first, second = noise(1, 2, 24, 24), noise(3, 2, 3, 3), noise(2, 3, 3, 3)
    strided = F.conv2d(F.conv2d(x, first, stride=2, padding=1), second, padding=1)
    dense = atrous_conv(atrous_conv(x, first), second, rate=2)[..., ::2, ::2]
    torch.testing.assert_close(dense[..., 1:-1, 1:-1], strided[..., 1:-1, 1:-1])


def test_large_rates_leave_the_centre():
    layer = ASPP2d(3, 4, rates=(24,)).double()
    x = noise(2, 3, 5, 5)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.c0.weight[:, :, 1:2, 1:2], layer.c0.bias))
    plain = ASPP2d(3, 4, rates=(1,)).double()
    torch.testing.assert_close(plain(x), F.conv2d(x, plain.c0.weight, plain.c0.bias, padding=1))


def test_one_branch_is_left_of_zeros():
    layer = ASPP2d(3, 4, rates=(1, 2, 5)).double()
    for branch in (layer.c0, layer.c2):
        nn.init.zeros_(branch.weight)
        nn.init.zeros_(branch.bias)
    x = noise(2, 3, 11, 12)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.c1.weight, layer.c1.bias, padding=2, dilation=2))


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
def test_merge(ndim, kernel):
    layer = KINDS[ndim](4, 2, kernel, stride=2, groups=2, rates=(1, 2, 4)).double()
    x = noise(2, 4, *(9, 8, 5)[:ndim])
    merged = layer.merge()
    assert merged.kernel_size[0] in (4 * (kernel - 1) + 1, 4 * (kernel - 1) + 2)
    torch.testing.assert_close(merged(x), layer(x))


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"rates=\(\)"):
        ASPP2d(3, rates=())
    for rates in ((0,), 6, (True,), (2.0,)):
        with pytest.raises(ValueError, match="rates"):
            ASPPHead(3, 2, rates=rates)
    with pytest.raises(ValueError, match="x of shape"):
        atrous_conv(noise(1, 3, 4), noise(3, 3, 3, 3))
    with pytest.raises(ValueError, match="padding"):
        ASPP2d(3, padding="valid")
    with pytest.raises(ValueError, match="rates"):
        aspp(noise(1, 1, 4), [noise(1, 1, 3)], [None], [1, 2])
    with pytest.raises(ValueError, match="dropout"):
        ASPPHead(3, 2, dropout=2.0)


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("v2_resnet_aspp", ("n_classes", "n_blocks", "rates", "base", "msc_scales")),
        ("v2_resnet_msc", ("msc_scales",)),
        ("v2_vgg16_aspp", ("n_classes", "branches", "rates", "channel_divisor", "output_stride")),
        ("crf_after", ("pos_w", "pos_xy_std", "bi_w", "bi_xy_std", "bi_rgb_std", "normalization", "compat")),
        ("crf_symmetric", ("iterations", "pos_w", "bi_w", "include_self")),
        ("metrics", ("n_class", "ignore")),
    ],
)
def test_parity_reads_what_the_config_leaves_out(name, left_out):
    """Sizes are those of the parameters where a case does not say them."""
    case = read_case(Path(__file__).parents[1] / "golden" / "deeplab" / f"{name}.safetensors")
    assert set(left_out) <= set(case.config)
    config = {k: v for k, v in case.config.items() if k not in left_out}
    assert all(t.passed for t in run_case(replace(case, config=config)))


class TestNetworks:
    @pytest.mark.parametrize(
        ("build", "count"),
        [
            (lambda: DeepLabVGG(21, (12,)), 20_505_429),
            (lambda: DeepLabVGG(21), 37_877_652),
            (lambda: DeepLabResNet(21), 44_048_532),
        ],
    )
    def test_parameters(self, build, count):
        with torch.device("meta"):
            assert sum(p.numel() for p in build().parameters()) == count

    @pytest.mark.parametrize("size", [(33, 41), (65, 49)])
    def test_sizes(self, size):
        expected = [(n - 1) // 8 + 1 for n in size]
        x = torch.zeros(1, 3, *size)
        for net in (DeepLabResNet(3, (1, 1, 1, 1), base=2), DeepLabVGG(3, divisor=64)):
            assert list(net.eval()(x).shape[2:]) == expected

    def test_head_sums_branches(self):
        head = ASPPHead(3, 2, 4, (1, 3)).double().eval()
        x = noise(1, 3, 7, 8)
        total = 0
        for number, rate in ((1, 1), (2, 3)):
            first, second, third = (getattr(head, f"fc{i}_{number}") for i in (6, 7, 8))
            y = F.relu(F.conv2d(x, first.weight, first.bias, padding=rate, dilation=rate))
            total = total + third(F.relu(second(y)))
        torch.testing.assert_close(head(x), total)
        assert not torch.equal(head.train()(x), total)

    def test_batch_norms_stay_frozen(self):
        net = DeepLabResNet(3, (1, 1, 1, 1), base=2).train()
        before = net.layer1.conv1.bn.running_mean.clone()
        net(torch.randn(2, 3, 33, 33))
        assert torch.equal(net.layer1.conv1.bn.running_mean, before)
        learning = DeepLabResNet(3, (1, 1, 1, 1), base=2, freeze_bn=False).train()
        learning(torch.randn(2, 3, 33, 33))
        assert not torch.equal(learning.layer1.conv1.bn.running_mean, before)

    def test_several_scales(self):
        net = DeepLabResNet(3, (1, 1, 1, 1), base=2).eval()
        x = torch.randn(1, 3, 41, 49)
        assert torch.equal(MultiScale(net, ())(x), net(x))
        first, half, _, fused = MultiScale(net).logits(x)
        assert half.shape[2:] == (3, 4)
        assert torch.all(fused >= first)
        for scales in ((0.0,), 0.5):
            with pytest.raises(ValueError, match="scales"):
                MultiScale(net, scales)

    def test_bad_arguments(self):
        for build in (DeepLabResNet, DeepLabVGG):
            with pytest.raises(ValueError, match="in_chans=0"):
                build(in_chans=0)
        with pytest.raises(ValueError, match="blocks=3"):
            DeepLabResNet(2, 3)
        for net in (DeepLabResNet(3, (1, 1, 1, 1), base=2), DeepLabVGG(3, divisor=64)):
            with pytest.raises(ValueError, match=r"expected \(N, 3, H, W\)"):
                net(torch.zeros(1, 4, 33, 33))

    @pytest.mark.parametrize(
        ("official", "ours"),
        [
            ("fc8_voc12_1.bias", "head.fc8_1.bias"),
            ("fc8_pascal_context_4.weight", "head.fc8_4.weight"),
            ("fc8_voc12.weight", "head.fc8_1.weight"),
            ("fc6.weight", "head.fc6_1.weight"),
            ("fc7_2.bias", "head.fc7_2.bias"),
            ("conv5_3.weight", "conv5_3.weight"),
        ],
    )
    def test_official_names(self, official, ours):
        assert convert_vgg(official) == ours
