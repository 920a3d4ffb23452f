"""The wavelet scattering transform of signals and images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from torchconv.ops.scattering import FrameFeatures, Scattering1d, Scattering2d
from torchconv.theory.scattering import frame_network, morlet_bank_1d, morlet_bank_2d, scattering_1d, scattering_2d


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("n", "scale", "q", "average"), [(50, 3, 1, None), (64, 2, (3, 2), 3.5), (33, 4, 2, 8), (300, 5, 8, None)]
)
def test_signals_against_transforms_at_full_resolution(n, scale, q, average):
    """One path after the other; maps are subsampled in time."""
    bank = morlet_bank_1d(n, scale, q, average)
    x = noise(2, n)
    right = bank.padded - bank.left - n
    u = np.pad(x.numpy(), ((0, 0), (bank.left, right)), mode="reflect")
    inside = [i for i in range(0, bank.padded, 1 << bank.log2_stride) if bank.left <= i < bank.left + n]
    expected = []
    for path in bank.paths():
        v, level = u, 0
        for responses, family, index in zip((bank.psi1, bank.psi2), (bank.first, bank.second), path, strict=False):
            v = np.abs(np.fft.ifft(np.fft.fft(v) * bank.level(responses[index], level)))
            step = max(min(family[index].j, bank.log2_stride) - level, 0)
            v, level = v[:, :: 1 << step], level + step
        v = np.fft.ifft(np.fft.fft(v) * bank.level(bank.phi, level)).real
        expected.append(v[:, [i >> level for i in inside]])
    found = scattering_1d(x, scale, q, average).numpy()
    assert found.shape == (2, len(bank.paths()), len(inside))
    assert np.abs(found - np.stack(expected, 1)).max() < 1e-11 * np.abs(found).max()


def test_paths_descend_and_counts():
    bank = morlet_bank_1d(256, 5, (4, 1))
    assert all(bank.second[b].j > bank.first[a].j for a, b in (p for p in bank.paths() if len(p) == 2))
    for scale, angles, order in ((2, 4, 2), (3, 3, 2), (4, 2, 1), (1, 8, 2)):
        layer = Scattering2d(16, scale, angles, order)
        count = 1 + scale * angles + (angles**2 * scale * (scale - 1) // 2 if order == 2 else 0)
        y = layer(torch.zeros(1, 16, 16))
        assert y.shape[1] == len(layer.paths) == count
        assert y.shape[2:] == (16 >> scale, 16 >> scale)
        assert all(two[0] > one[0] for one, two in (p for p in layer.paths if len(p) == 2))


@pytest.mark.parametrize("size", [(16, 16), (13, 22), (9, 8)])
def test_scattering_of_images(size):
    bank = morlet_bank_2d(size, 2, 4)
    assert np.abs(bank.psi[..., 0, 0]).max() < 1e-12  # mean 0
    assert bank.phi_level(0)[0, 0] == pytest.approx(1, abs=1e-4)
    flat = scattering_2d(torch.full(size, 2.0, dtype=torch.float64), 2, 4)
    assert float(flat[1:].abs().max()) < 1e-12
    assert float((flat[0] - 2 * bank.phi_level(0)[0, 0]).abs().max()) < 1e-12
    x = noise(3, *size)
    y = scattering_2d(x, 2, 4)
    torch.testing.assert_close(scattering_2d(-x, 2, 4)[:, 1:], y[:, 1:])
    torch.testing.assert_close(scattering_2d(x, 2, 4, 1), y[:, :9])
    assert not scattering_2d(torch.zeros(size), 2, 4).any()


@pytest.mark.parametrize(("size", "scale", "angles"), [((12, 15), 2, 3), ((17, 9), 3, 4)])
def test_images_against_transforms_at_full_resolution(size, scale, angles):
    """One path after the other; maps are subsampled in space."""
    bank = morlet_bank_2d(size, scale, angles)
    x, step = noise(*size), 1 << scale
    pads = [((p - n) // 2, (p - n + 1) // 2) for n, p in zip(bank.size, bank.padded, strict=True)]
    u = np.pad(x.numpy(), pads, mode="reflect")
    expected = []
    for path in bank.paths():
        v, level = u, 0
        for j, a in path:
            v = np.abs(np.fft.ifft2(np.fft.fft2(v) * bank.psi_level(level)[j, a]))
            v, level = v[:: 1 << (j - level), :: 1 << (j - level)], j
        v = np.fft.ifft2(np.fft.fft2(v) * bank.phi_level(level)).real
        expected.append(v[:: step >> level, :: step >> level][1:-1, 1:-1])
    found, expected = scattering_2d(x, scale, angles).numpy(), np.stack(expected)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-11 * np.abs(found).max()


def test_small_shifts_change_coefficients_less_than_pixels():
    x = torch.nn.functional.interpolate(noise(4, 1, 8, 8), (32, 32), mode="bicubic")
    layer = Scattering2d(32, 3, 4, dtype=torch.float64)
    y, moved = layer(x), layer(x.roll(1, -1))
    change = float((y - moved).norm() / y.norm())
    assert change < 0.5 * float((x - x.roll(1, -1)).norm() / x.norm())


def test_whole_signal_averages():
    x = noise(2, 120)
    local = morlet_bank_1d(120, 4, 3)
    mean, total = (scattering_1d(x, 4, 3, average) for average in ("mean", "sum"))
    assert mean.shape == total.shape == (2, len(local.paths()), 1)
    padded = torch.nn.functional.pad(x.unsqueeze(1), (local.left, local.padded - 120 - local.left), mode="reflect")
    torch.testing.assert_close(mean[:, :1], padded.mean(-1, keepdim=True))
    counts = [local.padded >> w.j for w in local.first]
    ratio = (total / mean)[0, 1 : 1 + len(counts), 0]
    torch.testing.assert_close(ratio, torch.tensor(counts, dtype=torch.float64))


def test_fold_by_the_mean_only_weighs_the_second_order_and_the_averages():
    x = noise(1, 64)
    new, old = scattering_1d(x, 3, 2), scattering_1d(x, 3, 2, fold="mean")
    bank = morlet_bank_1d(64, 3, 2)
    high = [n for n, w in enumerate(bank.first) if w.j == 0]
    torch.testing.assert_close(new[:, : 1 + len(high)], old[:, : 1 + len(high)])
    low = len(bank.first)  # the last wavelet of the first order, subsampled by 2^j
    torch.testing.assert_close(new[:, low], old[:, low] * 2 ** min(bank.first[-1].j, 3))


def test_padding_by_the_caller():
    x = noise(2, 9, 12)
    layer, bare = Scattering2d((9, 12), 2, 3), Scattering2d((9, 12), 2, 3, pre_pad=True)
    (rows, columns) = ((p - n) // 2 for n, p in zip(layer.bank.size, layer.bank.padded, strict=True))
    after = [p - n - b for n, p, b in zip(layer.bank.size, layer.bank.padded, (rows, columns), strict=True)]
    padded = torch.nn.functional.pad(x, (columns, after[1], rows, after[0]), mode="reflect")
    torch.testing.assert_close(bare(padded), layer(x))


def test_stride_keeps_more_samples():
    x = noise(1, 100)
    fine, coarse = scattering_1d(x, 3, stride=2), scattering_1d(x, 3)
    left = morlet_bank_1d(100, 3).left
    offset = (-(-left // 8) * 8 - -(-left // 2) * 2) // 2
    torch.testing.assert_close(fine[..., offset::4][..., : coarse.shape[-1]], coarse, atol=2e-2, rtol=0)
    assert fine.shape[-1] == 50


def test_batches_types_and_gradients():
    one, two = Scattering1d(40, 3, flatten=True), Scattering2d((9, 12), 2, 3, flatten=True)
    for layer, shape in ((one, (40,)), (two, (9, 12))):
        x = torch.randn(2, 3, *shape, requires_grad=True)
        y = layer(x)
        assert y.shape[:2] == (2, 3 * len(layer.paths))
        torch.testing.assert_close(layer(x[1, 2]), y.unflatten(1, (3, -1))[1, 2])
        assert layer(x[:0]).shape == (0, *y.shape[1:])
        assert layer(x.half()).dtype == torch.float16
        with torch.no_grad():
            torch.testing.assert_close(layer(x), y)
        y.sum().backward()
        assert torch.isfinite(x.grad).all()
        zero = torch.zeros(1, *shape, requires_grad=True)
        layer(zero)[:, 1:].sum().backward()
        assert torch.isfinite(zero.grad).all()
        with pytest.raises(ValueError, match=r"x.shape=\(2, 3, \d+"):
            layer(x[..., 1:])
        with pytest.raises(ValueError, match=r"x.dtype=torch.int64"):
            layer(x.long())


@pytest.mark.parametrize(
    ("family", "scale", "real"), [("haar", 2, True), ("shearlet", 2, True), ("weyl-heisenberg", 3, False)]
)
@pytest.mark.parametrize("nonlinearity", ["modulus", "relu"])
def test_features_over_frames_are_the_network(family, scale, real, nonlinearity):
    options = {"scale": scale, "wedges": 4, "nonlinearity": nonlinearity, "step": 2, "average": True}
    layer = FrameFeatures(family, (9, 5), 2, dtype=torch.float64, **options)
    x = noise(2, 3, 9, 5)
    found, expected = layer(x), frame_network(family, (9, 5), 2, **options)(x)
    assert layer.complex == (not real and nonlinearity != "modulus")
    for ours, theirs in zip(found, expected, strict=True):
        wanted = torch.cat([theirs.real, theirs.imag], 2) if layer.complex else theirs.real
        torch.testing.assert_close(ours, wanted)
        assert layer.complex or theirs.imag.abs().max() < 1e-12
    assert [f.shape for f in layer(x[:0])] == [(0, *f.shape[1:]) for f in found]
    change = torch.cat([(a - b).flatten() for a, b in zip(layer(2 * x), found, strict=True)])
    assert change.norm() <= x.norm() + 1e-12


def test_networks_on_other_types():
    net = frame_network("haar", 12, 2, step=2).to(dtype=torch.float32)
    x = noise(12)
    features = net(x.float())
    assert all(f.dtype == torch.complex64 for f in features)
    torch.testing.assert_close(features[2].cdouble(), frame_network("haar", 12, 2, step=2)(x)[2], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Scattering2d(7, 3), "scale=3: 2.scale exceeds the image's 7×7"),
        (lambda: Scattering2d((8, 8, 8), 2), "size="),
        (lambda: Scattering2d(8, 0), "scale=0"),
        (lambda: Scattering2d(8, 2, 0), "angles=0"),
        (lambda: Scattering2d(8, 2, max_order=3), "max_order=3"),
        (lambda: Scattering1d(1, 0), "length=1"),
        (lambda: Scattering1d(20, 2, (1, 2, 3)), r"q=\(1, 2, 3\)"),
        (lambda: Scattering1d(20, 2, 0), "q=0"),
        (lambda: Scattering1d(20, 2, average=30), "average=30"),
        (lambda: Scattering1d(20, 2, average=0), "average=0"),
        (lambda: Scattering1d(20, 2, average="max"), "average='max'"),
        (lambda: Scattering1d(20, 2, stride=3), "stride=3"),
        (lambda: Scattering1d(20, 9), "scale=9"),
        (lambda: Scattering1d(256, 4, (1, 4)), r"q=\(1, 4\): paths would rise"),
        (lambda: FrameFeatures("haar", 8)(torch.zeros(2, 9)), r"x.shape=\(2, 9\)"),
        (lambda: Scattering1d(20, 2, fold="max"), "fold='max'"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
