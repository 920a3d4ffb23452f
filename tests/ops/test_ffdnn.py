"""Fast Fourier convolution, Fourier kernels, routing and indices: loops, identities, limits, refusals."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torchconv.ops.ffdnn import FFC1d, FFC2d, FFC3d, FFCBlock, split_channels
from torchconv.ops.ffdnn_capsules import (
    CapsuleEncoder,
    DynamicRouting,
    MarginLoss,
    dynamic_routing,
    margin_loss,
    squash,
)
from torchconv.ops.ffdnn_series import FourierKernelConv1d, fourier_kernel_conv, time_kernel, vegetation_index
from torchconv.ops.ffdnn_spectral import FourierUnit, SpectralTransform, on_spectrum, quarters


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def randomised(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.is_floating_point():
                values = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(0.5 + values.abs() if "var" in name else values * 0.4)
    return module.double().eval()


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.booleans(), st.integers(0, 99))
def test_fourier_kernel_is_a_circular_convolution(length, depthwise, seed):
    bins = length // 2 + 1
    weight = noise(3, bins, 2, seed=seed) if depthwise else noise(3, 2, bins, 2, seed=seed)
    x = noise(2, 3, length, seed=seed + 1)
    kernel = time_kernel(weight, length)
    expected = torch.zeros(2, 3 if depthwise else 2, length, dtype=torch.float64)
    for t in range(length):
        for lag in range(length):
            taps, value = kernel[..., lag], x[:, :, (t - lag) % length]
            expected[:, :, t] += value * taps if depthwise else value @ taps
    torch.testing.assert_close(fourier_kernel_conv(x, weight), expected)


@pytest.mark.parametrize("length", [7, 8])
def test_fourier_kernel_identity_delay_and_shift(length):
    x, bins = noise(2, 3, length), length // 2 + 1
    one = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(3, bins, 2)
    torch.testing.assert_close(fourier_kernel_conv(x, one), x)
    phase = 2 * math.pi * torch.arange(bins, dtype=torch.float64) * 3 / length
    delay = torch.stack([phase.cos(), -phase.sin()], 1).expand(3, bins, 2)
    torch.testing.assert_close(fourier_kernel_conv(x, delay), x.roll(3, 2))
    weight = noise(3, 4, bins, 2)
    y = fourier_kernel_conv(x, weight)
    torch.testing.assert_close(fourier_kernel_conv(x.roll(2, 2), weight), y.roll(2, 2))


@pytest.mark.parametrize("length", [7, 8])
def test_imaginary_parts_without_effect(length):
    x, bins = noise(2, 3, length), length // 2 + 1
    weight = noise(3, bins, 2).requires_grad_()
    idle = [0] + ([bins - 1] if length % 2 == 0 else [])
    other = weight.detach().clone()
    other[:, idle, 1] += 5
    torch.testing.assert_close(fourier_kernel_conv(x, other), fourier_kernel_conv(x, weight))
    (grad,) = torch.autograd.grad(fourier_kernel_conv(x, weight).square().sum(), weight)
    assert grad[:, idle, 1].abs().max() == 0
    assert (grad[:, :, 0].abs().sum(0) > 0).all()


def test_band_passes_its_frequencies_only():
    layer = FourierKernelConv1d(2, length=12, depthwise=True, band=(2, 4)).double()
    assert layer.weight_ri.shape == (2, 3, 2)
    spectrum = torch.fft.rfft(layer(noise(5, 2, 12)))
    assert spectrum[..., [0, 1, 5, 6]].abs().max() < 1e-12
    assert spectrum[..., 2:5].abs().min() > 0
    full = FourierKernelConv1d(2, 5, 12, band=(0, 6)).double()
    torch.testing.assert_close(full(noise(1, 2, 12)), fourier_kernel_conv(noise(1, 2, 12), full.weight_ri))


def test_fourier_kernel_keeps_the_variance_of_noise():
    torch.manual_seed(0)
    x = torch.randn(64, 8, 64)
    assert 0.85 < float(FourierKernelConv1d(8, 32, 64)(x).detach().var()) < 1.15
    assert 0.7 < float(FourierKernelConv1d(8, length=64, depthwise=True)(x).detach().var()) < 1.3


@pytest.mark.parametrize("shape", [(2, 3, 7), (2, 3, 6, 5), (2, 3, 4, 3, 6)])
def test_spectrum_keeps_energy_and_comes_back(shape):
    x = noise(*shape)
    torch.testing.assert_close(on_spectrum(x, lambda s: s), x)
    found = []
    on_spectrum(x, lambda s: found.append(s) or s)
    axes = tuple(range(2, x.dim()))
    whole = torch.fft.fftn(x, dim=axes, norm="ortho")
    torch.testing.assert_close(whole.abs().square().sum(), x.square().sum())
    half = torch.fft.rfftn(x, dim=axes, norm="ortho")
    torch.testing.assert_close(found[0][:, 2], half[:, 1].real)
    torch.testing.assert_close(found[0][:, 5], half[:, 2].imag)
    assert on_spectrum(x[:0], lambda s: s[:, :2]).shape == (0, 1, *shape[2:])


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_fourier_unit_by_hand(ndim):
    unit = randomised(FourierUnit(3, 2, ndim=ndim))
    x = noise(2, 3, *(5, 4, 6)[:ndim])
    spectrum = torch.fft.rfftn(x, dim=tuple(range(2, 2 + ndim)), norm="ortho")
    channels = torch.stack([part for c in range(3) for part in (spectrum[:, c].real, spectrum[:, c].imag)], 1)
    y = torch.einsum("oi,ni...->no...", unit.conv_layer.weight.flatten(1), channels)
    y = F.relu(F.batch_norm(y, unit.bn.running_mean, unit.bn.running_var, unit.bn.weight, unit.bn.bias))
    y = torch.complex(y[:, 0::2], y[:, 1::2])
    expected = torch.fft.irfftn(y, s=x.shape[2:], dim=tuple(range(2, 2 + ndim)), norm="ortho")
    torch.testing.assert_close(unit(x), expected)
    torch.testing.assert_close(unit.merge()(x), expected)
    assert sum(p.numel() for p in unit.parameters()) == 4 * 3 * 2 + 4 * 2


def test_fourier_unit_sees_the_whole_map_and_is_not_equivariant():
    unit = randomised(FourierUnit(2, 4))
    x = noise(1, 2, 6, 6).requires_grad_()
    (grad,) = torch.autograd.grad(unit(x)[0, :, 1, 2].sum(), x)
    assert (grad.abs() > 0).float().mean() > 0.9
    assert (unit(x.roll(1, 3)) - unit(x).roll(1, 3)).abs().max() > 1e-3


def test_crops_and_local_unit():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    q = quarters(x)[0]
    assert [int(c[0, 0]) for c in q] == [0, 8, 2, 10]
    assert quarters(torch.zeros(1, 3, 4, 6, 2)).shape == (1, 24, 2, 3, 1)
    transform = randomised(SpectralTransform(4, 16))
    x = noise(2, 4, 6, 8)
    h = transform.conv1(x)
    crops = [h[:, :2, r, c] for c in (slice(4), slice(4, 8)) for r in (slice(3), slice(3, 6))]
    local = transform.lfu(torch.cat(crops, 1))
    tiled = torch.cat([torch.cat([local, local], 3)] * 2, 2)
    torch.testing.assert_close(transform(x), transform.conv2(h + transform.fu(h) + tiled))
    torch.testing.assert_close(transform.merge()(x), transform(x))
    with pytest.raises(ValueError, match="even sizes"):
        transform(noise(1, 4, 5, 8))


def test_spectral_transform_rounds_down_as_published():
    x = noise(2, 4, 7, 9)
    transform = randomised(SpectralTransform(4, 6, 2, enable_lfu=False))
    h = transform.conv1(F.avg_pool2d(x, 2))
    assert h.shape[2:] == (3, 4)
    torch.testing.assert_close(transform(x), transform.conv2(h + transform.fu(h)))
    assert SpectralTransform(4, 6, 2, enable_lfu=False, ceil_mode=True)(x.float()).shape == (2, 6, 4, 5)
    with pytest.raises(ValueError, match="stride"):
        SpectralTransform(4, 6, 2, enable_lfu=False)(torch.zeros(1, 4, 5, 1))


@pytest.mark.parametrize(("kind", "size"), [(FFC1d, (9,)), (FFC2d, (9, 8)), (FFC3d, (5, 4, 6))])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_ffc_is_the_sum_of_its_paths(kind, size, ratio):
    layer = randomised(kind(4, 6, stride=2, ratio_gin=0.5, ratio_gout=ratio))
    x = noise(2, 4, *size)
    local, other = x[:, :2], x[:, 2:]
    parts = []
    if ratio < 1:
        parts.append(layer.convl2l(local) + layer.convg2l(other))
    if ratio > 0:
        pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[layer.ndim - 1]
        g = layer.convg2g
        h = g.conv1(pool(other, 2, ceil_mode=True))
        parts.append(layer.convl2g(local) + g.conv2(h + g.fu(h)))
    torch.testing.assert_close(layer(x), torch.cat(parts, 1))
    torch.testing.assert_close(layer.merge()(x), layer(x))


def test_ffc_without_global_channels_is_a_convolution():
    layer = randomised(FFC2d(3, 5, 4, 2, dilation=2, ratio_gin=0, ratio_gout=0))
    x = noise(2, 3, 9, 8)
    padded = F.pad(x, (3, 3, 3, 3))
    expected = F.conv2d(padded, layer.convl2l.weight, layer.convl2l.bias, 2, 0, 2)
    torch.testing.assert_close(layer(x), expected)
    free = FFC2d(3, 5, 3, padding=0, ratio_gin=0, ratio_gout=0.5)
    assert free(torch.zeros(1, 3, 6, 6)).shape == (1, 5, 4, 4)
    with pytest.raises(ValueError, match="padding=0"):
        FFC2d(4, 4, 3, padding=0)


def test_shares_of_channels():
    assert split_channels(8, 0.25) == (6, 2)
    assert split_channels(5, 0.5) == (3, 2)
    block = FFCBlock(8, 6, ratio_gin=1.0, ratio_gout=0.0)
    y, none = block(None, torch.zeros(1, 8, 4, 4))
    assert y.shape == (1, 6, 4, 4)
    assert none is None
    assert block.ffc.convl2l is None
    assert block.ffc.convg2g is None


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_block(ndim):
    block = randomised(FFCBlock(8, 8, activation=nn.GELU, ndim=ndim))
    size = (6, 5, 4)[:ndim]
    a, b = noise(2, 4, *size), noise(2, 4, *size, seed=1)
    y = block.ffc(torch.cat([a, b], 1))
    got = block(a, b)
    torch.testing.assert_close(got[0], F.gelu(block.bn_l(y[:, :4])))
    torch.testing.assert_close(got[1], F.gelu(block.bn_g(y[:, 4:])))
    for ours, merged in zip(got, block.merge().merge()(a, b), strict=True):
        torch.testing.assert_close(merged, ours)


def test_refusals_of_ffc():
    with pytest.raises(ValueError, match=r"ratio_gin=1\.5"):
        FFC2d(4, ratio_gin=1.5)
    with pytest.raises(ValueError, match="groups=8"):
        FFC2d(8, groups=8)
    with pytest.raises(ValueError, match="enable_lfu=True"):
        FFC2d(8, enable_lfu=True)
    with pytest.raises(ValueError, match="ndim=4"):
        FourierUnit(2, 2, ndim=4)
    with pytest.raises(ValueError, match="x of shape"):
        FourierUnit(2, 2)(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="x_global=None"):
        FFCBlock(8, 8)(torch.zeros(1, 4, 5, 5))
    with pytest.raises(ValueError, match="x_global="):
        FFCBlock(8, 8, ratio_gin=0)(torch.zeros(1, 8, 5, 5), torch.zeros(1, 4, 5, 5))


def test_squash():
    s = noise(5, 4)
    v = squash(s)
    length = s.norm(dim=1)
    torch.testing.assert_close(v.norm(dim=1), length**2 / (1 + length**2))
    torch.testing.assert_close(F.normalize(v, dim=1), F.normalize(s, dim=1))
    torch.testing.assert_close(squash(1e-2 * s).norm(dim=1), (1e-2 * length) ** 2, rtol=1e-2, atol=0)
    zero = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    squash(zero).sum().backward()
    assert torch.isfinite(zero.grad).all()
    half = torch.tensor([[0.0, 0.0], [300.0, 400.0]], dtype=torch.float16)
    torch.testing.assert_close(squash(half), torch.tensor([[0.0, 0.0], [0.6, 0.8]], dtype=torch.float16))


def routing_by_loops(u, weight, iterations):
    """Procedure 1 of the paper on routing, capsule by capsule."""
    batch, (inputs, outputs) = len(u), weight.shape[:2]
    v = torch.zeros(batch, outputs, weight.shape[3], dtype=u.dtype)
    shares = torch.zeros(batch, inputs, outputs, dtype=u.dtype)
    for n in range(batch):
        votes = [[u[n, i] @ weight[i, j] for j in range(outputs)] for i in range(inputs)]
        b = torch.zeros(inputs, outputs, dtype=u.dtype)
        for _ in range(iterations):
            c = torch.stack([b[i].softmax(0) for i in range(inputs)])
            for j in range(outputs):
                s = sum(c[i, j] * votes[i][j] for i in range(inputs))
                v[n, j] = s * s.norm() / (1 + s.norm() ** 2)
            b = b + torch.stack([torch.stack([votes[i][j] @ v[n, j] for j in range(outputs)]) for i in range(inputs)])
        shares[n] = c
    return v, shares


@pytest.mark.parametrize("iterations", [1, 2, 3, 5])
def test_routing(iterations):
    u, weight = noise(2, 4, 3), noise(4, 3, 3, 5)
    v, shares = dynamic_routing(u, weight, iterations)
    expected, expected_shares = routing_by_loops(u, weight, iterations)
    torch.testing.assert_close(v, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(shares, expected_shares, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(shares.sum(2), torch.ones(2, 4, dtype=torch.float64))
    if iterations == 1:
        torch.testing.assert_close(shares, torch.full_like(shares, 1 / 3))
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(dynamic_routing(u[:, order], weight[order], iterations)[0], v)
    torch.testing.assert_close(dynamic_routing(u, weight[:, [2, 0, 1]], iterations)[0], v[:, [2, 0, 1]])


def test_margin_loss():
    label = torch.tensor([1, 0])
    assert margin_loss(torch.tensor([[0.1, 0.95], [0.9, 0.0]]), label) == 0
    lengths = torch.tensor([[0.5, 0.6], [0.9, 0.3]])
    expected = ((0.3**2 + 0.5 * 0.4**2) + 0.5 * 0.2**2) / 2
    torch.testing.assert_close(margin_loss(lengths, label), torch.tensor(expected))
    torch.testing.assert_close(MarginLoss()(lengths, label), torch.tensor(expected))
    strict = MarginLoss(upper=1.0, lower=0.0, absent=1.0)
    squares = (0.4**2 + 0.5**2 + 0.1**2 + 0.3**2) / 2
    torch.testing.assert_close(strict(lengths, label), torch.tensor(squares))
    with pytest.raises(ValueError, match=r"upper=0\.1"):
        MarginLoss(upper=0.1)
    with pytest.raises(ValueError, match="absent=-1"):
        MarginLoss(absent=-1)


def test_routing_module():
    routing, u = DynamicRouting(4, 3, 5, 2, iterations=2).double(), noise(2, 4, 5)
    for ours, expected in zip(routing(u), dynamic_routing(u, routing.weight, 2), strict=True):
        assert torch.equal(ours, expected)
    votes = torch.einsum("ijpk,nip->nijk", DynamicRouting(200, 3).weight, F.normalize(torch.randn(9, 200, 8), dim=2))
    assert abs(float(votes.detach().square().sum(3).mean()) - 1) < 0.1  # as large as the capsules that cast them
    with pytest.raises(ValueError, match="outputs=0"):
        DynamicRouting(4, 0)
    with pytest.raises(ValueError, match="weight of shape"):
        routing(noise(2, 5, 5))


def test_capsule_encoder():
    encoder = CapsuleEncoder(4, 6, 3, primary=5, dim=2)
    assert sum(p.numel() for p in encoder.parameters()) == 4 * 5 + 5 + 6 * 3 * 5 * 2
    x = torch.randn(2, 4, 6)
    u = encoder.primary_capsules(x)
    assert u.shape == (2, 6, 5)
    torch.testing.assert_close(encoder(x)[0], dynamic_routing(u, encoder.routing.weight)[0])
    assert (encoder(x)[0].norm(dim=2) < 1).all()


def test_indices():
    bands = {b: torch.rand(5, dtype=torch.float64) * 0.4 + 0.05 for b in ("B3", "B4", "B5", "B8", "B8A")}
    bare = {**bands, "B8A": 1.3 * bands["B4"]}
    for name in ("wdvi", "lai_clair"):
        assert vegetation_index(name, bare, soil_slope=1.3).abs().max() < 1e-12
    grey = {**bands, "B5": bands["B4"], "B3": bands["B4"]}
    assert vegetation_index("tcari", grey).abs().max() < 1e-12
    twice = {b: 2 * t for b, t in bands.items()}
    torch.testing.assert_close(vegetation_index("ndvi", twice), vegetation_index("ndvi", bands))
    assert (vegetation_index("osavi", twice) - vegetation_index("osavi", bands)).abs().min() > 1e-4
    ratio = vegetation_index("tcari", bands) / vegetation_index("osavi", bands)
    torch.testing.assert_close(vegetation_index("tcari_osavi", bands), ratio)
    dense = {**bands, "B8A": torch.full((5,), 0.9)}
    lai = vegetation_index("lai_clair", dense, soil_slope=0.0, wdvi_inf=0.5, clair_alpha=0.5, clip=1e-3)
    torch.testing.assert_close(lai, torch.full_like(lai, -math.log(1e-3) / 0.5))
    landsat = {"SR_B4": bands["B4"], "SR_B5": bands["B8"]}
    named = vegetation_index("ndvi", landsat, {"red": "SR_B4", "nir": "SR_B5"})
    torch.testing.assert_close(named, vegetation_index("ndvi", bands))
    with pytest.raises(ValueError, match="needs B5"):
        vegetation_index("tcari", {"B4": bands["B4"]})
    with pytest.raises(ValueError, match="name='ndwi'"):
        vegetation_index("ndwi", bands)


def test_parity_asks_for_the_bands_of_the_stored_indices_only():
    from tests.parity.ffdnn import _indices

    case = SimpleNamespace(config={"band_order": ["B8", "B4"]}, outputs={"ndvi": None})
    found = _indices(case, torch.tensor([[0.3, 0.1]]))
    torch.testing.assert_close(found, {"ndvi": torch.tensor([0.5])})


def test_refusals_of_the_series_parts():
    with pytest.raises(ValueError, match="band="):
        FourierKernelConv1d(2, length=8, band=(3, 7))
    for band in ((4,), (0.5, 2)):
        with pytest.raises(ValueError, match="band="):
            FourierKernelConv1d(2, length=8, band=band)
    with pytest.raises(ValueError, match="floating point"):
        fourier_kernel_conv(torch.ones(1, 2, 8, dtype=torch.long), torch.ones(2, 5, 2))
    with pytest.raises(ValueError, match="weight="):
        time_kernel(torch.zeros(3, 5, 2), 4)
    with pytest.raises(ValueError, match="u="):
        dynamic_routing(torch.zeros(4, 3), torch.zeros(4, 2, 3, 3))
    with pytest.raises(ValueError, match="label="):
        margin_loss(torch.zeros(2, 3), torch.eye(3, dtype=torch.long)[:2])
    with pytest.raises(ValueError, match="band_map='Red'"):
        vegetation_index("ndvi", {}, {"Red": "B4"})
    with pytest.raises(ValueError, match="out_channels=3"):
        FourierKernelConv1d(2, 3, depthwise=True)
    with pytest.raises(ValueError, match="24 steps"):
        FourierKernelConv1d(2)(torch.zeros(1, 2, 20))
    with pytest.raises(ValueError, match="24 steps"):
        CapsuleEncoder(2, 24, 3)(torch.zeros(1, 2, 20))
    with pytest.raises(ValueError, match="weight of shape"):
        fourier_kernel_conv(torch.zeros(1, 2, 8), torch.zeros(2, 4, 2))
    with pytest.raises(ValueError, match="weight of shape"):
        dynamic_routing(torch.zeros(1, 4, 3), torch.zeros(4, 2, 5, 3))
    with pytest.raises(ValueError, match="iterations=0"):
        dynamic_routing(torch.zeros(1, 4, 3), torch.zeros(4, 2, 3, 3), 0)


def test_claim_network_has_the_size_that_is_reported():
    from torchconv.claims.ffdnn import _network, _seasons

    assert sum(p.numel() for p in _network("Fourier").parameters()) == 5880
    x, y = _seasons(300, 0)
    assert x.shape == (300, 2, 24)
    assert torch.equal(y.unique(), torch.arange(3))
    assert _network("Fourier")(x[:4]).shape == (4, 3)
