"""Sub-pixel convolution: the shuffle, its transposed twin, ICNR; and ESPCN."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchconv
from tests.parity.core import read_case, run_case
from torchconv.models.restore.espcn import ESPCN, convert_state, parameter_names
from torchconv.ops.espcn import (
    SubpixelConv1d,
    SubpixelConv2d,
    SubpixelConv3d,
    channels_from_depth_to_space,
    channels_to_depth_to_space,
    icnr_,
    pixel_shuffle,
    pixel_unshuffle,
    subpixel_conv,
    subpixel_to_transposed,
    transposed_to_subpixel,
)

KINDS = {1: SubpixelConv1d, 2: SubpixelConv2d, 3: SubpixelConv3d}
TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("factor", [1, (2,), (2, 3), (3, 1, 2)])
def test_shuffle_is_the_definition(factor):
    factors = (1, 1) if factor == 1 else factor
    ndim, block = len(factors), torch.Size(factors).numel()
    z = noise(2, 3 * block, *(3, 4, 2)[:ndim])
    y = pixel_shuffle(z, factor)
    for c in range(3):
        for place in itertools.product(*(range(n) for n in y.shape[2:])):
            u = 0
            for i, r in zip(place, factors, strict=True):
                u = u * r + i % r
            source = tuple(i // r for i, r in zip(place, factors, strict=True))
            assert torch.equal(y[(slice(None), c, *place)], z[(slice(None), c * block + u, *source)])
    assert torch.equal(pixel_unshuffle(y, factor), z)
    if ndim == 2 and factors[0] == factors[1]:
        assert torch.equal(y, F.pixel_shuffle(z, factors[0]))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 5), st.integers(1, 3), st.integers(0, 4), st.integers(1, 3), st.integers(0, 99)
)
def test_equals_a_transposed_convolution(ndim, kernel, factor, padding, channels, seed):
    padding = min(padding, kernel - 1)
    kernel = min(kernel, 3) if ndim == 3 else kernel
    padding = min(padding, kernel - 1)
    x = noise(2, 2, *(6, 5, 4)[:ndim], seed=seed)
    weight = noise(channels * factor**ndim, 2, *[kernel] * ndim, seed=seed + 1)
    moved = subpixel_to_transposed(weight, factor)
    assert moved.shape == (2, channels, *[kernel * factor] * ndim)
    y = subpixel_conv(x, weight, None, factor, padding)
    expected = TRANSPOSE[ndim](x, moved, stride=factor, padding=factor * (kernel - 1 - padding))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-11)
    assert torch.equal(transposed_to_subpixel(moved, factor), weight)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kernel_size": 4, "upscale_factor": 3},
        {"kernel_size": (2, 5), "upscale_factor": (2, 3), "bias": False},
        {"groups": 2, "dilation": 2, "icnr": False},
        {"padding": "valid", "icnr": False},
        {"padding": 2, "blur": True},
        {"upscale_factor": 1},
    ],
)
def test_merge(options):
    torch.manual_seed(0)
    layer = SubpixelConv2d(4, 2, dtype=torch.float64, **options)
    x = noise(2, 4, 7, 6)
    torch.testing.assert_close(layer.merge()(x), layer(x))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(noise(*parameter.shape, seed=3))
    merged = layer.merge()
    torch.testing.assert_close(merged(x), layer(x))


def test_merge_with_equal_biases_is_one_module():
    assert type(SubpixelConv3d(2, 1, 3, (1, 2, 2)).merge()) is nn.ConvTranspose3d
    with pytest.raises(ValueError, match="padding=5"):
        SubpixelConv1d(2, 1, 3, padding=5).merge()


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_icnr_starts_as_nearest_neighbours(ndim):
    layer = KINDS[ndim](2, 3, upscale_factor=2, dtype=torch.float64)
    x = noise(1, 2, *[4] * ndim)
    block = 2**ndim
    convolve = (F.conv1d, F.conv2d, F.conv3d)[ndim - 1]
    base = convolve(x, layer.weight[::block], layer.bias[::block], padding=1)
    torch.testing.assert_close(layer(x), F.interpolate(base, scale_factor=2.0, mode="nearest"))
    weight = icnr_(torch.empty(12, 2, 3), (4,), nn.init.normal_)
    assert torch.equal(weight[0], weight[3])
    assert not torch.equal(weight[3], weight[4])


def test_shift_by_a_pixel_shifts_a_block():
    layer = SubpixelConv2d(2, 1, upscale_factor=3, icnr=False, dtype=torch.float64)
    x = noise(1, 2, 8, 8)
    moved = layer(x.roll(1, 3))
    torch.testing.assert_close(moved[..., 6:-3], layer(x).roll(3, 3)[..., 6:-3])


def test_blur_is_a_mean_over_neighbours():
    layer = SubpixelConv2d(2, 1, blur=True, dtype=torch.float64)
    x = noise(1, 2, 3, 3)
    y = subpixel_conv(x, layer.weight, layer.bias)
    edge = F.pad(y, (1, 0, 1, 0), mode="replicate")
    torch.testing.assert_close(
        layer(x), (edge[..., 1:, 1:] + edge[..., :-1, 1:] + edge[..., 1:, :-1] + edge[..., :-1, :-1]) / 4
    )


def test_blur_of_volumes_in_half_precision():
    x = torch.randn(1, 2, 3, 4, 2).bfloat16()
    layer = SubpixelConv3d(2, 1, blur=True, dtype=torch.bfloat16)
    expected = copy.deepcopy(layer).double()(x.double())
    torch.testing.assert_close(layer(x).double(), expected, rtol=0.02, atol=0.02)


def test_depth_to_space_order():
    weight = noise(12, 2, 3, 3)
    assert torch.equal(channels_to_depth_to_space(channels_from_depth_to_space(weight, 2), 2), weight)
    one = noise(4, 2, 3, 3)
    assert torch.equal(channels_from_depth_to_space(one, 2), one)
    # What TensorFlow computes: channel (u·r + v)·C + c.
    z = noise(1, 12, 2, 3)
    expected = z.reshape(1, 2, 2, 3, 2, 3).permute(0, 3, 4, 1, 5, 2).reshape(1, 3, 4, 6)
    reordered = channels_from_depth_to_space(z[0].flatten(1)[..., None, None], 2)[..., 0, 0]
    torch.testing.assert_close(pixel_shuffle(reordered.reshape(1, 12, 2, 3), 2), expected)


@pytest.mark.parametrize("ndim", [1, 3])
def test_gradcheck(ndim):
    layer = KINDS[ndim](2, 1, 3, 2, icnr=False, dtype=torch.float64)
    x = noise(1, 2, *[3] * ndim).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()), fast_mode=True)


def test_channels_last_is_kept():
    x = torch.randn(2, 4, 5, 6).contiguous(memory_format=torch.channels_last)
    assert SubpixelConv2d(4, 3)(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"upscale_factor": 0}, "upscale_factor"), ({"groups": 3}, "groups"), ({"padding": "even"}, "padding")],
)
def test_bad_arguments(options, named):
    with pytest.raises(ValueError, match=named):
        SubpixelConv2d(4, 2, **options)
    with pytest.raises(ValueError, match="upscale_factor=3"):
        pixel_shuffle(torch.zeros(1, 4, 2, 2), 3)
    with pytest.raises(ValueError, match="z of shape"):
        pixel_shuffle(torch.zeros(4, 4), 2)
    with pytest.raises(ValueError, match="must divide 5 output channels"):
        icnr_(torch.zeros(5, 2, 3, 3), 2, nn.init.zeros_)
    with pytest.raises(ValueError, match="downscale_factor=2"):
        pixel_unshuffle(torch.zeros(1, 4, 3, 2), 2)
    with pytest.raises(ValueError, match=r"1, 3, 2, 2"):
        SubpixelConv2d(4, 2)(torch.zeros(1, 3, 2, 2))


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("rgb_x2_c8", ("in_channels", "out_channels", "channels", "upscale_factor")),
        ("y_x3", ("num_channels", "scale_factor")),
        ("subpixel_equals_transposed_k3_r3", ("scale", "kernel")),
    ],
)
def test_parity_reads_what_the_config_leaves_out(name, left_out):
    """Sizes are those of the parameters where a case does not say them."""
    case = read_case(Path(__file__).parents[1] / "golden" / "espcn" / f"{name}.safetensors")
    assert set(left_out) <= set(case.config)
    config = {k: v for k, v in case.config.items() if k not in left_out}
    assert all(t.passed for t in run_case(replace(case, config=config)))


class TestNetwork:
    @pytest.mark.parametrize(
        ("channels", "factor", "count"), [(1, 2, 21284), (1, 3, 22729), (1, 4, 24752), (3, 3, 31131)]
    )
    def test_parameters(self, channels, factor, count):
        net = ESPCN(channels, upscale_factor=factor)
        assert sum(p.numel() for p in net.parameters()) == count
        assert net(torch.zeros(1, channels, 4, 5)).shape == (1, channels, 4 * factor, 5 * factor)

    def test_multiply_adds(self):
        from torchconv.analysis.count import count

        found = count(ESPCN(upscale_factor=3), torch.zeros(1, 1, 10, 10))
        assert found.macs == 22624 * 100

    def test_no_gradient_outside_the_clamp(self):
        net = ESPCN(final="clip01", upscale_factor=2)
        with torch.no_grad():
            net.sub_pixel[0].bias.copy_(torch.tensor([-1.0, 0.5, 0.5, 2.0]))
        y = net(torch.rand(1, 1, 4, 4))
        y.sum().backward()
        assert net.sub_pixel[0].bias.grad.tolist() == [0.0, 16.0, 16.0, 0.0]

    def test_predict_is_clamped(self):
        net = ESPCN(upscale_factor=1, channels=4)
        nn.init.constant_(net.sub_pixel[0].bias, 3.0)
        x = torch.rand(1, 1, 4, 4)
        assert net.predict(x).max() == 1 < net(x).max()

    def test_last_layer_learns_slowly(self):
        net = ESPCN()
        slow = [
            group["lr"]
            for group in torchconv.param_groups(net, 1e-3, 0.0)
            for p in group["params"]
            if any(p is q for q in net.sub_pixel.parameters())
        ]
        assert slow == [pytest.approx(1e-4)] * 2

    @pytest.mark.parametrize(
        "names",
        [
            ("module.first_part.0", "module.first_part.2", "module.last_part.0"),
            ("conv_1", "conv_2", "conv_3"),
            ("conv1", "conv2", "conv3"),
        ],
    )
    def test_names_of_ports(self, names):
        net = ESPCN(3, channels=8)
        ours = dict(net.state_dict())
        layers = ("feature_maps.0", "feature_maps.2", "sub_pixel.0")
        theirs = {
            f"{n}.{k}": ours[f"{layer}.{k}"] for n, layer in zip(names, layers, strict=True) for k in ("weight", "bias")
        }
        assert all(torch.equal(ours[n], t) for n, t in convert_state(theirs, 3).items())
        assert set(parameter_names(theirs).values()) == set(ours)

    def test_constants_of_graphs(self):
        """Depth-to-space written out for one image, with three channels."""
        net = ESPCN(3, channels=4, upscale_factor=2).double()
        constants = {}
        widths = [(3, 4, 5), (4, 2, 3), (2, 12, 3)]
        for i, (a, b, k) in enumerate(widths, 1):
            constants |= {f"f{i}": noise(k, k, a, b, seed=i), f"b{i}": noise(b, seed=i + 9)}
        net.load_state_dict(convert_state(constants, 2))
        x = noise(1, 3, 4, 5)
        z = x
        for i, (_, _, k) in enumerate(widths, 1):
            z = F.conv2d(
                z if i == 1 else torch.tanh(z),
                constants[f"f{i}"].permute(3, 2, 0, 1),
                constants[f"b{i}"],
                padding=k // 2,
            )
        expected = z.reshape(1, 2, 2, 3, 4, 5).permute(0, 3, 4, 1, 5, 2).reshape(1, 3, 8, 10)
        torch.testing.assert_close(net(x), expected)
        with pytest.raises(ValueError, match="known port"):
            convert_state({"a.weight": x}, 2)

    @pytest.mark.parametrize(("options", "named"), [({"channels": 1}, "channels"), ({"final": "clamp"}, "final")])
    def test_bad_arguments(self, options, named):
        with pytest.raises(ValueError, match=named):
            ESPCN(**options)
