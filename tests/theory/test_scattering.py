"""Scattering: frames, networks over them, their bounds, and the wavelet transform."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torchconv.theory.scattering import (
    FrameLayer,
    FrameNetwork,
    audit,
    conv_bounds,
    curvelet_wedges,
    daubechies,
    decay_constant,
    deform,
    deformation_bound,
    deformation_gap,
    energy,
    frame,
    frame_bounds,
    frame_network,
    lipschitz,
    make_admissible,
    ridgelet_wedges,
    translation_bound,
    weyl_heisenberg_frame,
)

FAMILIES = ("wavelet", "curvelet", "ridgelet", "shearlet", "haar", "daubechies", "weyl-heisenberg")
NONLINEARITIES = ("modulus", "relu", "tanh", "logsig")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return float(energy([x - y for x, y in zip(a, b, strict=True)]).sum().sqrt())


def random_network(*size: int, nonlinearity: str = "modulus", step: int = 2, average: bool = True) -> FrameNetwork:
    """Complex random filters in two layers."""
    layers = []
    for n in range(2):
        re, im = noise(3, *size, seed=n), noise(3, *size, seed=10 + n)
        pooling = noise(*size, seed=20 + n).abs() if average else None
        options = {"nonlinearity": nonlinearity, "step": step}
        layers.append(FrameLayer.from_kernels(re + 1j * im, noise(*size, seed=30 + n), pooling, **options))
        size = layers[-1].out_size
    return FrameNetwork(tuple(layers), torch.fft.fftn(noise(*size, seed=40)))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(FAMILIES), st.integers(1, 13), st.integers(1, 12), st.integers(2, 4), st.integers(1, 9))
def test_frames_are_tight_at_any_size(family, rows, columns, scale, wedges):
    atoms, low = frame(family, (rows, columns), scale, wedges)
    torch.testing.assert_close(
        atoms.abs().square().sum(0) + low.abs().square(), torch.ones(rows, columns, dtype=torch.float64)
    )


@pytest.mark.parametrize("size", [9, (8, 6, 5)])
@pytest.mark.parametrize("family", ["wavelet", "haar", "weyl-heisenberg"])
def test_frames_in_one_and_three_dimensions(family, size):
    atoms, low = frame(family, size, 2)
    assert frame_bounds(torch.cat([atoms, low[None]])) == pytest.approx((1, 1), abs=1e-12)


@pytest.mark.parametrize("family", ["curvelet", "shearlet"])
def test_directional_filters_are_real(family):
    atoms, low = frame(family, (15, 9), 2, 6)
    kernels = torch.fft.ifft2(torch.cat([atoms, low[None]]))
    assert kernels.imag.abs().max() < 1e-12


def test_wedges_and_windows():
    assert curvelet_wedges(5, 16) == (16, 8, 8, 4, 4)
    assert ridgelet_wedges(3, 3) == (3, 1, 1)
    windows = weyl_heisenberg_frame(24, 4)
    torch.testing.assert_close(windows[1], windows[0].roll(6))  # a quarter of the axis
    assert weyl_heisenberg_frame((8, 6), (2, 3)).shape == (6, 8, 6)
    taps = daubechies(2)
    known = np.array([1 + 3**0.5, 3 + 3**0.5, 3 - 3**0.5, 1 - 3**0.5]) / (4 * 2**0.5)
    assert np.abs(taps - known).max() < 1e-12


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("average", [True, False])
def test_admissible_networks_do_not_expand(nonlinearity, average):
    net, factors = make_admissible(random_network(12, nonlinearity=nonlinearity, average=average))
    assert net.admissibility() == pytest.approx([1] * 3)
    assert len(factors) == 3
    f, h = noise(4, 12, seed=50), 3 * noise(4, 12, seed=51)
    assert distance(net(f), net(h)) <= float((f - h).norm()) + 1e-12
    assert float(energy(net(f)).sum()) <= float(f.square().sum()) + 1e-12
    assert net.lipschitz() == pytest.approx(1)
    assert max(make_admissible(net, "paper")[0].admissibility("paper")) == pytest.approx(1)


def test_the_constant_of_a_network_that_is_not_admissible_holds():
    net = random_network(10)
    f, h = noise(10, seed=3), noise(10, seed=4)
    assert distance(net(f), net(h)) <= net.lipschitz() * float((f - h).norm())
    assert net.lipschitz() > 1


@pytest.mark.parametrize(("nonlinearity", "constant"), [("modulus", 1), ("relu", 1), ("tanh", 1), ("logsig", 0.25)])
def test_lipschitz_constants_are_tight(nonlinearity, constant):
    flat = torch.ones(1, 4, dtype=torch.complex128)
    layer = FrameLayer(flat, flat[0], nonlinearity)
    assert layer.lipschitz_constants()[0] == constant
    assert layer.lipschitz_constants("paper")[0] >= constant
    net = FrameNetwork((layer,), flat[0])
    x = torch.tensor([1e-4, 0, 0, 0], dtype=torch.float64)
    assert float(net(x)[1].abs().max()) == pytest.approx(constant * 1e-4, rel=1e-3)


def test_a_tight_unpooled_modulus_network_keeps_all_but_the_last_energy():
    net = frame_network("wavelet", (8, 8), depth=2)
    x = noise(8, 8)
    found = energy(net(x))
    spectra = [torch.fft.fft2(x)[None]]
    for layer in net.layers:
        maps = torch.fft.ifft2((spectra[-1][:, None] * layer.atoms).flatten(0, 1)).abs()
        spectra.append(torch.fft.fft2(maps))
    left = (spectra[-1] * (1 - net.output.square()).sqrt()).abs().square().sum() / 64
    assert float(found.sum() + left) == pytest.approx(float(x.square().sum()))


@pytest.mark.parametrize("norm", ["none", "continuous"])
@pytest.mark.parametrize(("size", "step"), [((12,), 2), ((9,), 2), ((6, 4), 2), ((6, 9, 3), 3)])
@pytest.mark.parametrize("average", [True, False])
def test_networks_against_direct_sums(size, step, average, norm):
    net = random_network(*size, nonlinearity="relu", step=step, average=average)
    x = noise(*size, seed=7)

    def conv(u, response):
        kernel = np.fft.ifftn(response.numpy())
        places = list(np.ndindex(*u.shape))
        return sum(u[m] * np.roll(kernel, m, tuple(range(u.ndim))) for m in places)

    maps = [x.numpy().astype(complex)]
    for found, layer in zip(net(x, norm), (*net.layers, None), strict=True):
        chi = net.output if layer is None else layer.output
        expected = np.stack([conv(u, chi) for u in maps])
        assert np.abs(found.numpy() - expected).max() < 1e-9 * max(1, np.abs(expected).max())
        if layer is None:
            break
        after = []
        for u, atom in itertools.product(maps, layer.atoms):
            z = conv(u, atom)
            z = np.maximum(z.real, 0) + 1j * np.maximum(z.imag, 0)
            z = z if layer.pooling is None else conv(z, layer.pooling)
            scale = step ** (len(size) / 2) if norm == "continuous" else 1
            after.append(scale * z[(slice(None, None, step),) * len(size)])
        maps = after


@pytest.mark.parametrize("family", ["wavelet", "haar", "weyl-heisenberg"])
def test_layers_move_with_the_signal(family):
    net = frame_network(family, 24, 2, scale=2, step=2, average=True)
    x = noise(24)
    for n, (a, b) in enumerate(zip(net(x), net(x.roll(4)), strict=True)):
        torch.testing.assert_close(b, a.roll(4 >> n, -1))
    torch.testing.assert_close(net(-x)[1:], net(x)[1:])  # the modulus forgets the sign
    assert all(not f.any() for f in net(torch.zeros(24)))
    shapes = [tuple(f.shape) for f in net(noise(2, 3, 24))]
    k = len(net.layers[0].atoms)
    assert shapes == [(2, 3, 1, 24), (2, 3, k, 12), (2, 3, k * k, 6)]


def test_translation_bound_holds_and_falls_with_depth():
    net = frame_network("wavelet", 64, 3, scale=2, step=2, average=True)
    x = noise(64)
    outputs = [*(layer.output for layer in net.layers), net.output]
    bounds = []
    for n in (0, 1, 2, 3):
        bounds.append(translation_bound([2] * n, 8, decay_constant(outputs[n])))
        change = distance([net(x.roll(8))[n]], [net(x)[n]])
        assert change <= bounds[-1] * float(x.norm())
    assert bounds == pytest.approx([bounds[0] / 2**n for n in range(4)], rel=0.2)


def test_deformation_bounds_hold():
    n = 64
    t = torch.arange(n, dtype=torch.float64)
    f = torch.cos(2 * math.pi * 3 * t / n) + torch.sin(2 * math.pi * 2 * t / n)
    net = frame_network("wavelet", n, 2, step=2, average=True)
    gaps = []
    for size in (0.5, 1.0, 2.0):
        tau = size * torch.sin(2 * math.pi * t / n)[None]
        omega = 0.01 * torch.cos(2 * math.pi * t / n)
        slope = size * 2 * math.pi / n
        gap = deformation_gap(f, tau, omega)
        assert gap <= deformation_bound(3 / n, size, slope, 1, 0.01)
        assert distance(net(deform(f, tau, omega)), net(f.to(torch.complex128))) <= gap * float(f.norm()) + 1e-12
        gaps.append(deformation_gap(f, tau))
    assert gaps[0] < gaps[1] < gaps[2]
    with pytest.raises(ValueError, match=r"jacobian=0\.6"):
        deformation_bound(0.1, 1, 0.6, 1)


def test_deform_by_whole_samples_is_a_shift():
    x = noise(2, 6, 5)
    tau = torch.stack([torch.full((6, 5), 2.0), torch.full((6, 5), -1.0)]).double()
    torch.testing.assert_close(deform(x, tau), x.roll((2, -1), (-2, -1)))
    with pytest.raises(ValueError, match=r"tau.shape=\(1, 6, 5\)"):
        deform(x, tau[:1])


CONVOLUTIONS = [
    (nn.Conv2d(2, 3, 3, padding=1), (2, 6, 5), False),
    (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (4, 6, 8), False),
    (nn.Conv1d(2, 3, 4, stride=3, dilation=2, padding=5), (2, 12), False),
    (nn.Conv1d(3, 2, 3, padding=1, padding_mode="circular"), (3, 9), True),
    (nn.Conv1d(1, 4, 5, stride=2, padding=2, padding_mode="circular"), (1, 8), True),
    (nn.Conv3d(1, 2, 3, padding="same", padding_mode="circular"), (1, 3, 4, 3), True),
    (nn.ConvTranspose2d(2, 3, 4, stride=2, padding=1), (2, 4, 3), False),
    (nn.ConvTranspose1d(2, 3, 5, stride=2, output_padding=1), (2, 5), False),
    (nn.MaxPool2d(3, 2), (1, 7, 7), False),
    (nn.AvgPool2d((2, 3), 1, padding=(0, 1)), (1, 6, 5), True),
    (nn.AdaptiveAvgPool2d(1), (2, 3, 5), True),
    (nn.AdaptiveAvgPool1d(3), (1, 7), True),
]


@pytest.mark.parametrize(("layer", "size", "exact"), CONVOLUTIONS, ids=lambda v: type(v).__name__)
def test_constants_of_layers_against_their_matrices(layer, size, exact):
    layer = layer.double()
    if getattr(layer, "bias", None) is not None:
        nn.init.zeros_(layer.bias)
    if isinstance(layer, nn.MaxPool2d):  # not linear; one place seen by four windows
        x = torch.zeros(1, *size, dtype=torch.float64)
        x[..., 2, 2] = 1
        assert float(layer(x).norm()) == pytest.approx(lipschitz(layer, size))
        return
    matrix = layer(torch.eye(math.prod(size), dtype=torch.float64).view(-1, *size)).detach().flatten(1).T
    largest = float(torch.linalg.matrix_norm(matrix, 2))
    found = lipschitz(layer, size)
    assert found == pytest.approx(largest) if exact else largest <= found <= 1.4 * largest


def test_lower_bound_of_a_periodic_convolution():
    conv = nn.Conv1d(2, 5, 3, stride=2, padding=1, padding_mode="circular", bias=False).double()
    conv_wide = nn.Conv1d(2, 1, 3, bias=False)
    matrix = conv(torch.eye(16, dtype=torch.float64).view(-1, 2, 8)).detach().flatten(1).T
    values = torch.linalg.svdvals(matrix).square()
    assert conv_bounds(conv.weight, 8, 2, circular=True) == pytest.approx((float(values.min()), float(values.max())))
    assert conv_bounds(conv_wide.weight, 8)[0] == 0


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.act, self.head = nn.GELU(), nn.Linear(12, 4)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)

    def forward(self, x):
        y = 0.5 * self.act(self.norm(self.conv(x))) + x
        y = torch.cat([y, torch.relu(x)], 1)
        z = (y - 1).mean((2, 3))
        return self.head(torch.cat([z, z.tanh()], 1))


def test_audit_bounds_the_change_of_the_output():
    torch.manual_seed(0)
    net = Branches().train()
    steps = audit(net, (3, 6, 6))
    assert net.training  # left as it was
    net = net.double().eval()
    constant = steps[-1].total
    worst = 0.0
    for seed in range(20):
        x, e = noise(1, 3, 6, 6, seed=seed), 0.01 * noise(1, 3, 6, 6, seed=100 + seed)
        worst = max(worst, float(((net(x + e) - net(x)).norm() / e.norm()).detach()))
    jacobian = torch.autograd.functional.jacobian(lambda x: net(x), noise(1, 3, 6, 6)).reshape(4, -1)
    worst = max(worst, float(torch.linalg.matrix_norm(jacobian, 2)))
    assert worst <= constant < 20 * worst
    conv = next(s for s in steps if s.kind == "Conv2d")
    assert conv.lipschitz == pytest.approx(math.sqrt(conv.upper))
    assert [s.kind for s in steps].count("cat") == 2


def test_audit_names_the_step_it_does_not_know():
    with pytest.raises(ValueError, match="module='LayerNorm'"):
        audit(nn.Sequential(nn.Conv1d(1, 1, 3), nn.LayerNorm(6)), (1, 8))

    class Square(nn.Module):
        def forward(self, x):
            return x * x

    with pytest.raises(ValueError, match="no Lipschitz constant is known of this step"):
        audit(Square(), (1, 8))
    with pytest.raises(ValueError, match="padding_mode='reflect'"):
        audit(nn.Conv1d(1, 1, 3, padding=1, padding_mode="reflect"), (1, 8))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: frame("wavelets", 8), "family='wavelets': did you mean"),
        (lambda: frame("curvelet", 8), "size="),
        (lambda: frame("weyl-heisenberg", 8, 1), "shifts=1"),
        (lambda: frame("wavelet", (8, 0)), r"size=\(8, 0\)"),
        (lambda: daubechies(30), "moments=30"),
        (lambda: frame_network("wavelet", 8, 0), "depth=0"),
        (lambda: frame_network("wavelet", 8, step=0), "step=0"),
        (lambda: frame_network("wavelet", 8)(torch.zeros(9)), r"x.shape=\(9,\)"),
        (lambda: frame_network("wavelet", 8)(torch.zeros(8), "all"), "norm='all'"),
        (lambda: FrameLayer(torch.ones(2, 8), torch.ones(7)), r"output.shape=\(7,\)"),
        (lambda: FrameLayer(torch.ones(2, 8), torch.ones(8), "gelu"), "nonlinearity='gelu'"),
        (lambda: FrameLayer(torch.ones(2, 8), torch.ones(8), pooling=torch.ones(4)), r"pooling.shape=\(4,\)"),
        (lambda: FrameNetwork((FrameLayer(torch.ones(1, 8), torch.ones(8), step=2),), torch.ones(8)), "layers="),
        (lambda: FrameNetwork((), torch.ones(8)), r"layers=\(\)"),
        (lambda: frame_bounds(torch.ones(2, 5), 4), "size=4"),
        (lambda: conv_bounds(torch.ones(2, 5), 4), "weight.shape="),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
