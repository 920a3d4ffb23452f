"""Sparse codes at their minimum, dictionaries in their constraint set, and log-Gabor kernels."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from torchconv.theory.csc import AutoRho, OnlineDictionary, cbpdn, constrained, kkt_residual, reconstruct
from torchconv.theory.csc_gabor import envelope, fit_log_gabor, log_gabor, log_gabor_dictionary, mask, retina
from torchconv.theory.csc_images import local_contrast_normalise, psnr, ssim, tikhonov_split, whiten


def task(kernels: int = 5, size: tuple[int, int] = (4, 3), image: tuple[int, ...] = (11, 14)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    d = torch.randn(kernels, *size, generator=generator, dtype=torch.float64)
    return constrained(d), torch.randn(*image, generator=generator, dtype=torch.float64)


def as_matrix(d: Tensor, size: tuple[int, int]) -> Tensor:
    """(H W, M H W) of Σ d_m ∗ x_m."""
    columns = torch.eye(len(d) * size[0] * size[1], dtype=d.dtype).reshape(-1, len(d), *size)
    return reconstruct(d, columns).flatten(1).T


def test_reconstruction_is_the_sum_of_circular_convolutions() -> None:
    d, _ = task()
    maps = torch.randn(2, 5, 7, 6, dtype=torch.float64)
    expected = torch.zeros(2, 7, 6, dtype=torch.float64)
    for m, i, j in np.ndindex(5, 4, 3):
        expected += d[m, i, j] * maps[:, m].roll((i, j), (-2, -1))
    torch.testing.assert_close(reconstruct(d, maps), expected)


@pytest.mark.parametrize("weighted", [False, True])
def test_codes_are_the_minimum(weighted: bool) -> None:
    """The conditions of the minimum hold, and FISTA on the dense matrix finds the same objective."""
    d, s = task(3, (3, 3), (6, 7))
    weight: Tensor | float = torch.linspace(0.5, 2, 3).double()[:, None, None] if weighted else 1.0
    found = cbpdn(d, s, 0.2, l1_weight=weight, rho=2.0, auto_rho=None, tol=1e-10, max_iter=20000)
    assert found.converged
    assert kkt_residual(d, s, found, weight) < 1e-6
    matrix, w = as_matrix(d, (6, 7)), (torch.as_tensor(weight) * torch.ones(3, 6, 7)).flatten().double()
    step = 1 / float(torch.linalg.matrix_norm(matrix, 2)) ** 2
    x = v = torch.zeros(matrix.shape[1], dtype=torch.float64)
    t = 1.0
    for _ in range(20000):
        g = v - step * (matrix.T @ (matrix @ v - s.flatten()))
        new = g.sign() * (g.abs() - 0.2 * step * w).clamp(min=0)
        t, before = (1 + math.sqrt(1 + 4 * t * t)) / 2, t
        x, v = new, new + (before - 1) / t * (new - x)
    least = float((matrix @ x - s.flatten()).square().sum() / 2 + 0.2 * (w * x.abs()).sum())
    assert found.trace.objective[-1] == pytest.approx(least, rel=1e-8)


def test_limits_of_lambda() -> None:
    d, s = task()
    correlated = torch.fft.irfft2(torch.fft.rfft2(d, s=(11, 14)).conj() * torch.fft.rfft2(s), s=(11, 14))
    above = float(correlated.abs().max()) * 1.0001
    assert not bool(cbpdn(d, s, above, rho=5.0, auto_rho=None, tol=1e-9, max_iter=5000).maps.any())
    assert bool(cbpdn(d, s, 0.9 * above, rho=5.0, auto_rho=None, tol=1e-9, max_iter=5000).maps.any())
    delta = torch.ones(1, 1, 1, dtype=torch.float64)
    shrunk = s.sign() * (s.abs() - 0.3).clamp(min=0)
    exact = cbpdn(delta, s, 0.3, auto_rho=None, rho=1.0, tol=1e-12, max_iter=5000).maps[0]
    torch.testing.assert_close(exact, shrunk, rtol=1e-8, atol=1e-9)
    chosen = cbpdn(d, s, max_iter=2).lmbda
    spectrum = torch.fft.rfft2(d, s=(11, 14)).conj() * torch.fft.rfft2(s)
    assert chosen == pytest.approx(0.1 * float(spectrum.abs().max()))


def test_translation_and_batches() -> None:
    d, s = task(image=(3, 11, 14))
    fixed = {"rho": 5.0, "auto_rho": None, "tol": 0.0, "max_iter": 40}
    together = cbpdn(d, s, 0.1, **fixed).maps
    for image, maps in zip(s, together, strict=True):
        torch.testing.assert_close(cbpdn(d, image, 0.1, **fixed).maps, maps)
    moved = cbpdn(d, s.roll((3, -2), (-2, -1)), 0.1, **fixed).maps
    torch.testing.assert_close(moved, together.roll((3, -2), (-2, -1)))


def test_options() -> None:
    d, s = task()
    positive = cbpdn(d, s, 0.1, non_negative=True, max_iter=50)
    assert float(positive.maps.min()) == 0.0
    assert 0 < positive.sparseness < 1
    at_codes = cbpdn(d, s, 0.1, objective_at_codes=True, max_iter=5)
    missing = reconstruct(d, at_codes.maps) - s
    expected = float(missing.square().sum()) / 2 + 0.1 * float(at_codes.maps.abs().sum())
    assert at_codes.trace.objective[-1] == pytest.approx(expected)
    seen = []
    stopped = cbpdn(d, s, 0.1, tol=0.0, on_iteration=lambda i, trace: seen.append((i, len(trace.rho))) or i == 3)
    assert seen == [(1, 1), (2, 2), (3, 3)]
    assert (stopped.iterations, stopped.converged) == (3, False)
    every_third = cbpdn(d, s, 0.1, tol=0.0, max_iter=12, auto_rho=AutoRho(period=3, auto_scaling=False, scaling=2.0))
    rho = every_third.trace.rho
    assert all(a == b for i, (a, b) in enumerate(pairwise(rho), start=1) if i % 3)
    assert {round(b / a, 9) for a, b in pairwise(rho)} <= {0.5, 1.0, 2.0}
    single = cbpdn(d.float(), s.float(), 0.1, rho=5.0, auto_rho=None, max_iter=30)
    assert single.maps.dtype == torch.float32
    torch.testing.assert_close(
        single.maps.double(), cbpdn(d, s, 0.1, rho=5.0, auto_rho=None, max_iter=30).maps, atol=1e-4, rtol=1e-3
    )


def test_dictionaries_learn_and_stay_of_norm_one() -> None:
    """Images made of four kernels: what is learned from them codes new ones better than where it started."""
    generator = torch.Generator().manual_seed(0)
    true = constrained(torch.randn(4, 5, 5, generator=generator, dtype=torch.float64))

    def image() -> Tensor:
        on = torch.rand(4, 20, 20, generator=generator, dtype=torch.float64) < 0.02
        return reconstruct(true, on * torch.randn(4, 20, 20, generator=generator, dtype=torch.float64))

    learner = OnlineDictionary(torch.randn(4, 5, 5, generator=generator).double(), 0.02, zero_mean=False, max_iter=60)
    start, fresh = learner.dictionary, torch.stack([image() for _ in range(3)])
    moved = [learner.step(image()).moved for _ in range(25)]
    assert moved[-1] < moved[0]
    torch.testing.assert_close(learner.dictionary.flatten(1).norm(dim=1), torch.ones(4, dtype=torch.float64))
    before, after = (cbpdn(d, fresh, 0.02, tol=1e-4).trace.objective[-1] for d in (start, learner.dictionary))
    assert after < 0.9 * before
    centred = OnlineDictionary(start, 0.02, zero_mean=True, max_iter=5)
    centred.step(image())
    assert float(centred.dictionary.mean((1, 2)).abs().max()) < 1e-12
    torch.testing.assert_close(constrained(centred.dictionary, zero_mean=True), centred.dictionary)


def test_log_gabor_kernels() -> None:
    kernels, parameters = log_gabor_dictionary(n_theta=3, n_b_theta=2, n_phase=2)
    assert tuple(kernels.shape) == (12, 12, 12)
    torch.testing.assert_close(kernels.abs().amax((1, 2)), torch.ones(12, dtype=torch.float64))
    assert [round(math.degrees(v)) for v in parameters[:4, 1]] == [15, 15, 30, 30]
    _, thin = log_gabor_dictionary("thin", n_theta=6, n_b_theta=1)
    assert torch.allclose(thin[:, 1], torch.tensor(math.radians(12), dtype=torch.float64))
    band = retina((12, 12))
    assert float(band[0, 6]) == 0.0  # the highest frequency of the rows
    assert float(band[6, 6]) == pytest.approx(0, abs=1e-9)
    assert float(mask((12, 12))[0].max()) == 0.0
    # Half a turn mirrors the one-sided envelope: the conjugate kernel.
    one, other = (envelope(theta, 0.3).abs() for theta in (0.4, 0.4 + math.pi))
    torch.testing.assert_close(one[1:, 1:], other[1:, 1:].flip(0, 1))
    assert torch.isfinite(log_gabor(0.3, math.radians(1))).all()  # exp(1/B²) alone would overflow


def test_kernels_are_found_again() -> None:
    for theta, width, phase in ((0.3, 0.2, 0.5), (2.5, 0.4, -1.2)):
        found = fit_log_gabor(3 * log_gabor(theta, width, phase, sf_0=0.3))
        assert found.r2 > 0.9999
        assert found.theta == pytest.approx(theta, abs=1e-3)
        assert found.b_theta == pytest.approx(width, abs=1e-3)
        assert found.sf_0 == pytest.approx(0.3, abs=1e-3)
        assert math.cos(found.phase - phase) == pytest.approx(1, abs=1e-4)
    assert fit_log_gabor(torch.randn(12, 12, generator=torch.Generator().manual_seed(0))).r2 < 0.5


def test_images_and_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 24, 30, generator=generator, dtype=torch.float64)
    for one, both in zip(local_contrast_normalise(x[1]), local_contrast_normalise(x), strict=True):
        torch.testing.assert_close(both[1], one)
    normalised, mean, divisor = local_contrast_normalise(x)
    torch.testing.assert_close(normalised * divisor + mean, x)
    torch.testing.assert_close(local_contrast_normalise(5 * x + 3)[0], normalised)
    assert not bool((local_contrast_normalise(torch.full((16, 16), 0.5))[0].abs() > 0.1).any())
    low, high = tikhonov_split(x, 10.0, 8)
    torch.testing.assert_close(low + high, x)
    torch.testing.assert_close(tikhonov_split(torch.ones(20, 20).double(), 10.0, 4)[1].abs().max().item(), 0.0)
    assert whiten(x.float()).dtype == torch.float32
    assert psnr(x[0] + 0.1, x[0]) == pytest.approx(20 + 20 * math.log10(float(x[0].max() - x[0].min())))
    assert ssim(x[0], x[0]) == pytest.approx(1)
    noisy = x[0] + 0.2 * torch.randn(24, 30, generator=generator, dtype=torch.float64)
    assert ssim(noisy, x[0]) < 0.95


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d, s: cbpdn(d[0], s), "dictionary=.*kernels"),
        (lambda d, s: cbpdn(d, s[None, None]), "signal=.*give"),
        (lambda d, s: cbpdn(d, s[:2]), "larger than the image"),
        (lambda d, s: cbpdn(d.float(), s), "give both in one float type"),
        (lambda d, s: cbpdn(d, s, -1.0), "lmbda=-1.0"),
        (lambda d, s: cbpdn(d, s, rho=0.0), "rho=0.0"),
        (lambda d, s: cbpdn(d, s, relax=2.0), "relax=2.0"),
        (lambda d, s: cbpdn(d, s, max_iter=0), "max_iter=0"),
        (lambda d, s: cbpdn(d, s, l1_weight=-1.0), "l1_weight=-1.0"),
        (lambda d, s: reconstruct(d, s), "maps="),
        (lambda d, s: OnlineDictionary(d, eta_a=0), "eta_a=0"),
        (lambda d, s: OnlineDictionary(d, 0.1).step(s[None]), "image=.*one image"),
        (lambda d, s: log_gabor_dictionary("wide"), "kind='wide'"),
        (lambda d, s: log_gabor_dictionary("thin", n_b_theta=2), "n_b_theta=2"),
        (lambda d, s: envelope(0.0, 0.0), "b_theta=0.0"),
        (lambda d, s: fit_log_gabor(torch.ones(5, 5)), "kernel='constant'"),
        (lambda d, s: local_contrast_normalise(s.long()), "floating-point"),
        (lambda d, s: local_contrast_normalise(s, 20), "at least 20 pixels wide"),
        (lambda d, s: psnr(s, s[1:]), "must have the shape of the reference"),
        (lambda d, s: psnr(s, s * 0), "reference='constant'"),
        (lambda d, s: ssim(s[:5], s[:5]), "give"),
    ],
)
def test_bad_arguments(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(*task())  # type: ignore[operator]
