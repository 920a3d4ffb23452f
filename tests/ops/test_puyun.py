"""Large kernel attention: its dense kernel, identities, the globe's edges; the block around it."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from torchconv.models.forecast.van import VANBlock
from torchconv.ops.puyun import (
    LKA1d,
    LKA2d,
    LKA3d,
    LKAttention2d,
    large_kernel_attention,
    pad_circular,
    pad_sphere,
)

KINDS = {1: LKA1d, 2: LKA2d, 3: LKA3d}
CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def randomise(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    return module.double()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 3), st.integers(1, 2), st.booleans(), st.integers(0, 99))
def test_equals_three_convolutions(ndim, kernel, d, dilation, bias, seed):
    kernel = min(kernel, 4) if ndim == 3 else kernel
    layer = randomise(KINDS[ndim](3, kernel_size=kernel, dilation=dilation, bias=bias, decomposition=d), seed)
    x = noise(2, 3, *(7, 6, 4)[:ndim], seed=seed)
    convolve = CONVOLVE[ndim]
    z = convolve(x, layer.conv0.weight, layer.conv0.bias, padding="same", dilation=dilation, groups=3)
    spread = layer.conv_spatial
    assert spread.weight.shape[2:] == (-(-kernel // d),) * ndim
    z = convolve(z, spread.weight, spread.bias, padding="same", dilation=d * dilation, groups=3)
    expected = x * convolve(z, layer.conv1.weight, layer.conv1.bias)
    torch.testing.assert_close(layer(x), expected)


def test_published_sizes_and_count():
    layer = LKA2d(10)
    assert layer.conv0.weight.shape == (10, 1, 5, 5)
    assert layer.conv_spatial.weight.shape == (10, 1, 7, 7)
    assert sum(p.numel() for p in layer.parameters()) == 10 * 26 + 10 * 50 + 100 + 10


def test_dense_kernel_in_the_interior():
    """The three convolutions compose to one 23 × 23 kernel where no padding is seen."""
    layer = randomise(LKA2d(3, bias=False))
    impulse = torch.zeros(1, 3, 23, 23, dtype=torch.float64)
    impulse[0, :, 11, 11] = 1
    depth = F.conv2d(impulse, layer.conv0.weight, padding=2, groups=3)
    depth = F.conv2d(depth, layer.conv_spatial.weight, padding=9, dilation=3, groups=3).flip(2, 3)
    dense = layer.conv1.weight * depth
    x = noise(1, 3, 30, 28)
    gate = F.conv2d(x, dense)
    inside = x[:, :, 11:-11, 11:-11]
    torch.testing.assert_close(layer(x)[:, :, 11:-11, 11:-11], inside * gate)


@pytest.mark.parametrize(("kernel", "d", "side"), [(21, 3, 23), (7, 2, 9), (35, 4, 39)])
def test_receptive_field(kernel, d, side):
    layer = randomise(LKA2d(1, kernel_size=kernel, decomposition=d))
    size = 2 * kernel + 9
    x = noise(1, 1, size, size).requires_grad_()
    (grad,) = torch.autograd.grad(layer(x)[0, 0, size // 2, size // 2], x)
    seen = grad[0, 0].abs() > 0
    assert int(seen.any(0).sum()) == int(seen.any(1).sum()) == side


def test_gate_of_one_is_the_identity():
    layer = randomise(LKA2d(4))
    torch.nn.init.zeros_(layer.conv1.weight)
    torch.nn.init.ones_(layer.conv1.bias)
    x = noise(2, 4, 8, 9)
    assert torch.equal(layer(x), x)
    attention = randomise(LKAttention2d(4))
    torch.nn.init.zeros_(attention.proj_2.weight)
    torch.nn.init.zeros_(attention.proj_2.bias)
    assert torch.equal(attention(x), x)


@pytest.mark.parametrize("kind", [LKA2d, LKAttention2d])
def test_circular_longitude(kind):
    x = noise(1, 3, 12, 20)

    def error(mode):
        layer = randomise(kind(3, padding_mode=mode))
        return float((layer(x.roll(7, 3)) - layer(x).roll(7, 3)).detach().abs().max())

    assert error("longitude") < 1e-12
    assert error("sphere") < 1e-12
    assert error("zeros") > 1e-3


def test_longitude_in_other_dimensions():
    for ndim in (1, 3):
        layer = randomise(KINDS[ndim](2, kernel_size=5, decomposition=2, padding_mode="longitude"))
        x = noise(1, 2, *(4, 5, 6)[-ndim:])
        torch.testing.assert_close(layer(x.roll(2, -1)), layer(x).roll(2, -1))


def test_sphere_is_continued_over_the_pole():
    """With kernels symmetric in latitude, a globe upside down gives the result upside down."""
    layer = randomise(LKA2d(2, kernel_size=6, decomposition=2, padding_mode="sphere"))
    with torch.no_grad():
        for conv in (layer.conv0, layer.conv_spatial):
            assert conv.weight.shape[2:] == (3, 3)
            conv.weight.copy_(conv.weight + conv.weight.flip(2))
    x = noise(1, 2, 9, 12)
    torch.testing.assert_close(layer(x.flip(2)), layer(x).flip(2))


@pytest.mark.parametrize("pole_rows", [False, True])
def test_pads_of_the_sphere(pole_rows):
    x = noise(2, 3, 5, 8)
    y = pad_sphere(x, (2, 1), (3, 10), pole_rows)
    assert y.shape == (2, 3, 8, 21)
    skip = int(pole_rows)
    for row, column in itertools.product(range(8), range(21)):
        source, east = row - 2, (column - 3) % 8
        if source < 0:
            source, east = -source - 1 + skip, (east + 4) % 8
        elif source > 4:
            source, east = 9 - source - skip, (east + 4) % 8
        assert torch.equal(y[..., row, column], x[..., source, east])
    assert torch.equal(pad_circular(x, (0, 0)), x)


def test_parity_reads_the_decomposition_from_the_kernels():
    from tests.parity.puyun import parts

    layer = LKA2d(3, kernel_size=11, decomposition=4)
    case = SimpleNamespace(config={"dim": 3}, state=layer.state_dict(), inputs={"x": noise(1, 3, 4, 4)})
    ours = parts(case).module
    ours.load_state_dict(layer.state_dict())
    x = torch.randn(1, 3, 9, 9)
    torch.testing.assert_close(ours(x), layer(x))


def test_bad_arguments():
    with pytest.raises(ValueError, match="padding_mode='pole'"):
        LKA2d(2, padding_mode="pole")
    with pytest.raises(ValueError, match="padding_mode='sphere'"):
        LKA3d(2, padding_mode="sphere")
    with pytest.raises(ValueError, match="decomposition=0"):
        LKA2d(2, decomposition=0)
    with pytest.raises(ValueError, match="even number of columns"):
        pad_sphere(torch.zeros(1, 1, 4, 5), (1, 1), (1, 1))
    with pytest.raises(ValueError, match="expected"):
        pad_sphere(torch.zeros(1, 4, 6), (1, 1), (1, 1))
    with pytest.raises(ValueError, match="rows="):
        pad_sphere(torch.zeros(1, 1, 4, 6), (-1, 1), (1, 1))
    with pytest.raises(ValueError, match="nothing to repeat"):
        pad_circular(torch.zeros(1, 1, 0), (1, 1))
    with pytest.raises(ValueError, match="rows="):
        pad_sphere(torch.zeros(1, 1, 4, 6), (5, 1), (1, 1))
    with pytest.raises(ValueError, match="padding_mode"):
        large_kernel_attention(noise(1, 1, 4), noise(1, 1, 3), noise(1, 1, 3), noise(1, 1, 1), padding_mode="x")


class TestBlock:
    def test_is_the_definition(self):
        block = randomise(VANBlock(4, 2.0)).eval()
        x = noise(2, 4, 9, 10)
        scale = [s[:, None, None] for s in (block.layer_scale_1, block.layer_scale_2)]
        y = x + scale[0] * block.attn(block.norm1(x))
        hidden = F.conv2d(block.norm2(y), block.mlp.fc1.weight, block.mlp.fc1.bias)
        hidden = F.conv2d(hidden, block.mlp.dwconv.dwconv.weight, block.mlp.dwconv.dwconv.bias, padding=1, groups=8)
        expected = y + scale[1] * F.conv2d(F.gelu(hidden), block.mlp.fc2.weight, block.mlp.fc2.bias)
        torch.testing.assert_close(block(x), expected)

    @pytest.mark.parametrize("norm", ["batch", "layer", "group"])
    @pytest.mark.parametrize("mode", ["longitude", "sphere"])
    def test_is_closed_around_the_globe(self, norm, mode):
        block = randomise(VANBlock(4, 2.0, padding_mode=mode, norm=norm)).eval()
        x = noise(2, 4, 9, 10)
        torch.testing.assert_close(block(x.roll(3, 3)), block(x).roll(3, 3))

    def test_starts_as_published(self):
        """Every convolution: variance 2 / (taps · outputs / groups), no bias."""
        torch.manual_seed(0)
        for conv in (m for m in VANBlock(64).modules() if hasattr(m, "kernel_size") and hasattr(m, "weight")):
            fan_out = conv.weight[0, 0].numel() * conv.out_channels // conv.groups
            assert abs(float(conv.weight.detach().var()) * fan_out / 2 - 1) < 0.15
            assert conv.bias.abs().max() == 0

    def test_is_built_where_it_is_told(self):
        block = VANBlock(4, device="meta", dtype=torch.float64)
        assert {(p.device.type, p.dtype) for p in block.parameters()} == {("meta", torch.float64)}

    def test_without_scales_it_is_the_identity(self):
        block = VANBlock(4, layer_scale=0.0)
        x = torch.randn(2, 4, 6, 6)
        assert torch.equal(block(x), x)

    def test_starts_near_the_identity_and_drops_paths(self):
        block = VANBlock(4, drop_path=0.5)
        assert torch.all(block.layer_scale_1 == 0.01)
        assert block.param_options() == {n: {"weight_decay": 0.0} for n in ("layer_scale_1", "layer_scale_2")}
        torch.manual_seed(0)
        x = torch.randn(64, 4, 6, 6)
        kept = (block.train()(x) != x).flatten(1).any(1).float().mean()
        assert 0.6 < kept < 0.9

    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({"mlp_ratio": 0.1}, "mlp_ratio"),
            ({"drop_path": 1.0}, "drop_path"),
            ({"norm": "instance"}, "norm='instance'"),
        ],
    )
    def test_bad_arguments(self, options, named):
        with pytest.raises(ValueError, match=named):
            VANBlock(4, **options)
