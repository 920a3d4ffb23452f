"""Hierarchical kernels of wide networks, their spectra, and kernel regression with them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchconv.theory.widecnn import (
    Kernels,
    capacity,
    convolutional_kernel,
    degeneracy,
    effective_dimension,
    funk_hecke,
    hierarchical_kernels,
    laplacian_kernel,
    learning_curve,
    learning_exponent,
    local_kernel,
    ridge_regression,
    sector_exponent,
    sphere_patches,
    torus_spectrum,
)


def patches(n: int, count: int, size: int, seed: int = 0) -> torch.Tensor:
    return sphere_patches(n, count, size, generator=torch.Generator().manual_seed(seed))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def direct(x: torch.Tensor, y: torch.Tensor, sizes: tuple[int, ...]) -> tuple[float, float]:
    """One pair of vectors, as the recursion is written."""

    def k0(t):
        return (math.pi - math.acos(max(-1.0, min(1.0, t)))) / math.pi

    def k1(t):
        t = max(-1.0, min(1.0, t))
        return (t * (math.pi - math.acos(t)) + math.sqrt(1 - t * t)) / math.pi

    ts = [float(a @ b) for a, b in zip(x.split(sizes[0]), y.split(sizes[0]), strict=True)]
    r, n = [k1(t) for t in ts], [k1(t) + t * k0(t) for t in ts]
    for s in sizes[1:]:
        means = [(sum(r[i : i + s]) / s, sum(n[i : i + s]) / s) for i in range(0, len(r), s)]
        r, n = [k1(m) for m, _ in means], [k1(m) + v * k0(m) for m, v in means]
    return sum(r) / len(r), sum(n) / len(n)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=3), st.integers(1, 3))
def test_against_the_recursion(sizes, positions):
    sizes = (sizes[0] + 1, *sizes[1:])
    count = positions * math.prod(sizes[1:])
    x, y = patches(2, count, sizes[0]), patches(3, count, sizes[0], 1)
    found = hierarchical_kernels(x, y, sizes)
    for i, j in itertools.product(range(2), range(3)):
        expected = direct(x[i], y[j], sizes)
        assert (float(found.rfk[i, j]), float(found.ntk[i, j])) == pytest.approx(expected, rel=1e-12)


def test_one_set_of_inputs(monkeypatch):
    """Blocks beside and below the diagonal; exact diagonal."""
    monkeypatch.setattr("torchconv.theory.widecnn._BLOCK", 3)
    x = patches(8, 8, 3)
    for sizes in ((3,), (3, 2), (3, 2, 4)):
        same, two = hierarchical_kernels(x, None, sizes), hierarchical_kernels(x, x.clone(), sizes)
        torch.testing.assert_close(same.rfk, two.rfk, atol=1e-7, rtol=0)
        torch.testing.assert_close(same.ntk, two.ntk, atol=1e-6, rtol=0)
        assert torch.equal(same.ntk, same.ntk.T)
        assert (same.rfk.diagonal() - 1).abs().max() < 1e-14
        assert (same.ntk.diagonal() - len(sizes) - 1).abs().max() < 1e-14
        assert torch.linalg.eigvalsh(same.ntk).min() > 0


def test_a_single_patch_is_the_two_layer_network():
    x, y = patches(4, 1, 6), patches(5, 1, 6, 1)
    t = x @ y.T
    angle = t.acos()
    k1 = (t * (math.pi - angle) + angle.sin()) / math.pi
    found = hierarchical_kernels(x, y, (6,))
    torch.testing.assert_close(found.rfk, k1)
    torch.testing.assert_close(found.ntk, k1 + t * (math.pi - angle) / math.pi)


def test_trees_split_and_move():
    x, y = patches(3, 12, 2), patches(4, 12, 2, 1)
    whole = hierarchical_kernels(x, y, (2, 3))
    blocks = [hierarchical_kernels(a, b, (2, 3)) for a, b in zip(x.split(6, 1), y.split(6, 1), strict=True)]
    for name in ("rfk", "ntk"):
        torch.testing.assert_close(getattr(whole, name), sum(getattr(b, name) for b in blocks) / 4)
    maps = hierarchical_kernels(x, y, (2, 3), reduce=False)
    torch.testing.assert_close(maps.ntk, torch.stack([b.ntk for b in blocks]))
    order = torch.tensor([2, 0, 3, 1])
    moved = [v.view(-1, 4, 6)[:, order].flatten(1) for v in (x, y)]
    torch.testing.assert_close(hierarchical_kernels(*moved, (2, 3)).ntk, whole.ntk)
    turn = torch.linalg.qr(noise(2, 2)).Q
    turned = [torch.cat([v[:, :4], v[:, 4:6] @ turn, v[:, 6:]], 1) for v in (x, y)]
    torch.testing.assert_close(hierarchical_kernels(*turned, (2, 3)).rfk, whole.rfk)


@pytest.mark.parametrize("sizes", [((2, 2), (2, 1)), (2, 2), ((1, 3), (4, 1), (1, 2))])
def test_maps_are_vectors_in_the_order_of_the_tree(sizes):
    x, y = noise(2, 3, 4, 12), noise(3, 3, 4, 12, seed=1)
    pairs = [(s, s) if isinstance(s, int) else s for s in sizes]

    def order(maps):
        blocks = [maps]
        for level in range(len(pairs), 0, -1):
            high, wide = (math.prod(p[a] for p in pairs[:level]) for a in (0, 1))
            blocks = [q for b in blocks for p in b.split(high, 2) for q in p.split(wide, 3)]
        return torch.cat([b.flatten(1) for b in blocks], 1)

    first = 3 * math.prod(pairs[0])
    flat = (first, *(math.prod(p) for p in pairs[1:]))
    found, expected = hierarchical_kernels(x, y, sizes), hierarchical_kernels(order(x), order(y), flat)
    torch.testing.assert_close(found.rfk, expected.rfk)
    torch.testing.assert_close(found.ntk, expected.ntk)
    lines = hierarchical_kernels(x[:, :, 0], y[:, :, 0], (3, 2))
    columns = [v[:, :, 0].unflatten(2, (4, 3)).permute(0, 2, 1, 3).flatten(1) for v in (x, y)]
    torch.testing.assert_close(lines.ntk, hierarchical_kernels(*columns, (9, 2)).ntk)


def network(x: torch.Tensor, weights: list[torch.Tensor], sizes: tuple[int, ...]) -> torch.Tensor:
    """A network of finite width: features of the last hidden layer (n, positions, width)."""
    f = x.unflatten(1, (-1, sizes[0])) @ weights[0].T
    f = math.sqrt(2) * f.relu()
    for w, s in zip(weights[1:], sizes[1:], strict=True):
        f = f.unflatten(1, (-1, s)).flatten(2) @ w.T / math.sqrt(w.shape[1])
        f = math.sqrt(2) * f.relu()
    return f


def draw(width: int, sizes: tuple[int, ...], seed: int) -> list[torch.Tensor]:
    shapes = [(width, sizes[0]), *((width, width * s) for s in sizes[1:])]
    return [noise(*shape, seed=seed + 10 * i) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("normalise", [True, False])
def test_wide_networks_have_these_kernels(normalise):
    sizes, width = (2, 2), 400
    x = patches(4, 4, 2) if normalise else noise(4, 8)
    found = hierarchical_kernels(x, None, sizes, normalise=normalise)
    rfk, ntk = torch.zeros(4, 4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)
    seeds = 12
    for seed in range(seeds):
        weights = [w.requires_grad_() for w in draw(width, sizes, 100 * seed)]
        features = network(x, weights, sizes)  # (n, positions, width)
        readout = noise(width, features.shape[1], seed=seed + 7000).requires_grad_()
        output = torch.einsum("npw,wp->n", features, readout) / math.sqrt(width * features.shape[1])
        rfk += torch.einsum("npw,mpw->nm", features, features).detach() / (width * features.shape[1])
        grads = [
            torch.cat([g.flatten() for g in torch.autograd.grad(o, [*weights, readout], retain_graph=True)])
            for o in output
        ]
        jacobian = torch.stack(grads)
        ntk += jacobian @ jacobian.T
    for ours, theirs in ((found.rfk, rfk / seeds), (found.ntk, ntk / seeds)):
        assert (ours - theirs).abs().max() < 0.06 * ours.abs().max()


def test_unnormalised_inputs_scale_the_kernels():
    x, y = patches(3, 4, 2), patches(2, 4, 2, 1)
    one, two = (hierarchical_kernels(x, y, (2, 2), normalise=n) for n in (True, False))
    scaled = hierarchical_kernels(2 * x, 3 * y, (2, 2), normalise=False)
    torch.testing.assert_close(one.ntk, two.ntk)
    torch.testing.assert_close(scaled.rfk, 6 * one.rfk)
    torch.testing.assert_close(hierarchical_kernels(2 * x, 3 * y, (2, 2)).rfk, one.rfk)
    dark = x.clone()
    dark[0, :2] = 0
    assert torch.isfinite(hierarchical_kernels(dark, None, (2, 2), normalise=False).ntk).all()
    with pytest.raises(ValueError, match="x='zero patch'"):
        hierarchical_kernels(dark, None, (2, 2))


def test_gradients_reach_the_inputs():
    x, y = noise(2, 8).requires_grad_(), noise(3, 8, seed=1)
    for normalise in (True, False):
        assert torch.autograd.gradcheck(
            lambda x, n=normalise: hierarchical_kernels(x, y, (2, 2), normalise=n).ntk, (x,), atol=1e-6
        )


def test_known_eigenvalues():
    assert funk_hecke("rfk", 3, 1) == pytest.approx([3 / 8, 1 / 6], abs=1e-14)
    assert funk_hecke("ntk", 3, 1) == pytest.approx([1 / 2, 1 / 3], abs=1e-14)
    assert funk_hecke("rfk", 2, 1) == pytest.approx([4 / math.pi**2, 1 / 4], abs=1e-14)
    assert funk_hecke(lambda t: t, 7, 3) == pytest.approx([0, 1 / 7, 0, 0], abs=1e-14)


@pytest.mark.parametrize("s", [2, 3, 4, 6])
@pytest.mark.parametrize(("kernel", "nu", "top"), [("rfk", 1.5, 1), ("ntk", 0.5, 2)])
def test_eigenvalues_add_up_and_fall(s, kernel, nu, top):
    values = funk_hecke(kernel, s, 200)
    counts = np.array([degeneracy(s, k) for k in range(201)], dtype=float)
    assert np.abs(values[3::2]).max() < 1e-13
    slope = math.log(values[200] / values[100]) / math.log(2)
    assert slope == pytest.approx(-2 * nu - (s - 1), abs=0.15)
    assert sector_exponent((s,), 1, kernel) == 2 * nu + s - 1
    left = top - float((counts * values).sum())
    assert 0 < left < (0.03 if kernel == "ntk" else 1e-4)
    deep = funk_hecke(lambda t: (t * (math.pi - np.arccos(t)) + np.sqrt(1 - t * t)) / math.pi, s, 3)
    assert deep == pytest.approx(funk_hecke("rfk", s, 3), abs=1e-9)


def test_spectrum_on_the_torus():
    found = torus_spectrum((2, 2), 256, 33)
    for values in found.values():
        assert np.abs(values - values.T).max() < 1e-15
    full = torus_spectrum((2, 2), 64, 32)["rfk"]
    weight = np.where(np.arange(32) == 0, 1, 2)
    assert float((full * weight[:, None] * weight).sum()) == pytest.approx(1, abs=1e-3)
    row, diagonal = found["ntk"][:, 0], np.diag(found["ntk"])
    assert math.log2(row[16] / row[8]) == pytest.approx(-sector_exponent((2, 2), 1), abs=0.3)
    assert math.log2(diagonal[32] / diagonal[16]) == pytest.approx(-sector_exponent((2, 2), 2), abs=0.3)
    one = torus_spectrum((2,), 512, 5)
    assert one["ntk"] == pytest.approx(funk_hecke("ntk", 2, 4), abs=1e-5)
    # The Gram matrix of a grid has these eigenvalues.
    angle = 2 * math.pi * torch.arange(12, dtype=torch.float64) / 12
    circle = torch.stack([angle.cos(), angle.sin()], 1)
    pairs = torch.cat([circle.repeat_interleave(12, 0), circle.repeat(12, 1)], 1)
    gram = hierarchical_kernels(pairs, None, (2, 2)).rfk / 144
    largest = torch.linalg.eigvalsh(gram).flip(0)[:5].numpy()
    spectrum = torus_spectrum((2, 2), 12, 3)["rfk"]
    assert largest == pytest.approx([spectrum[0, 0], *[spectrum[1, 0]] * 4], abs=1e-12)
    assert torus_spectrum((2, 2, 2), 16, 3)["ntk"].shape == (3, 3, 3, 3)


def test_exponents():
    assert [effective_dimension((3, 2, 2), level) for level in (1, 2, 3)] == [2, 4, 8]
    assert effective_dimension((5,)) == 4
    assert capacity((2, 2), "rfk") == 1 + 3 / 2
    for sizes in ((2, 2), (4, 3, 2)):
        deepest = learning_exponent(sizes, len(sizes), 0.5, ridgeless=True)
        assert deepest == pytest.approx(1 / effective_dimension(sizes))  # 2ν/d_eff for a teacher as deep as the student
        values = [learning_exponent(sizes, level, 0.5) for level in range(1, len(sizes) + 1)]
        assert values == sorted(values, reverse=True)


def test_local_and_convolutional_kernels():
    x, y = noise(3, 9), noise(2, 9, seed=1)
    torch.testing.assert_close(local_kernel(x, y, 9, 2.0), laplacian_kernel(x, y, 2.0))
    torch.testing.assert_close(convolutional_kernel(x, y, 9, 2.0), laplacian_kernel(x, y, 2.0))
    for periodic, stride in itertools.product((False, True), (1, 2, 4)):
        starts = range(0, 9 if periodic else 7, stride)
        a, b = ([v[:, [(i + t) % 9 for t in range(3)]] for i in starts] for v in (x, y))
        pairs = [[(p[:, None] - q).norm(dim=-1).div(-0.7).exp() for q in b] for p in a]
        local = sum(pairs[i][i] for i in range(len(a))) / len(a)
        every = sum(itertools.chain(*pairs)) / len(a) ** 2
        torch.testing.assert_close(local_kernel(x, y, 3, 0.7, stride=stride, periodic=periodic), local)
        torch.testing.assert_close(convolutional_kernel(x, y, 3, 0.7, stride=stride, periodic=periodic), every)
    rolled = convolutional_kernel(x.roll(4, 1), y, 3, periodic=True)
    torch.testing.assert_close(rolled, convolutional_kernel(x, y, 3, periodic=True))


def test_regression():
    x = patches(40, 2, 3)
    gram = hierarchical_kernels(x, None, (3, 2)).ntk
    y = noise(40, 3)
    train, test = gram[:30, :30], gram[30:, :30]
    for ridge in (0.0, 0.1):
        expected = test @ torch.linalg.inv(train + ridge * torch.eye(30)) @ y[:30]
        torch.testing.assert_close(ridge_regression(train, y[:30], test, ridge), expected)
        torch.testing.assert_close(ridge_regression(train, y[:30, 0], test, ridge), expected[:, 0])
    torch.testing.assert_close(ridge_regression(train, y[:30], train), y[:30])
    indefinite = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    torch.testing.assert_close(
        ridge_regression(indefinite, torch.tensor([1.0, 2.0]), torch.eye(2)), torch.tensor([2.0, 1.0])
    )


def test_local_targets_are_learnt_faster():
    x = patches(512 + 128, 4, 2)
    curves = [
        learning_curve(
            (2, 2, 2), t, x, (64, 512), teacher_inputs=x[:, :d], tests=128, generator=torch.Generator().manual_seed(1)
        )
        for t, d in (((2,), 2), ((2, 2, 2), 8))
    ]
    assert curves[0].exponent > curves[1].exponent > 0
    assert curves[0].errors.shape == (4, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hierarchical_kernels(noise(2, 7), None, (2, 2)), r"filter_sizes=\(2, 2\): their product \(4,\)"),
        (lambda: hierarchical_kernels(noise(2, 8), None, ()), r"filter_sizes=\(\)"),
        (lambda: hierarchical_kernels(noise(2, 8), None, (2, 0)), r"filter_sizes=\(0,\)"),
        (lambda: hierarchical_kernels(noise(2, 3, 8, 8), None, ((2, 2, 2),)), r"filter_sizes=\(2, 2, 2\)"),
        (lambda: hierarchical_kernels(noise(8), None, (2,)), r"x.shape=\(8,\)"),
        (lambda: hierarchical_kernels(noise(2, 8).long(), None, (2,)), "x.dtype"),
        (lambda: hierarchical_kernels(noise(2, 8), noise(2, 12), (2, 2)), "y.shape"),
        (lambda: ridge_regression(torch.eye(2), torch.ones(2), torch.eye(2), -1), "ridge=-1"),
        (lambda: ridge_regression(torch.eye(3), torch.ones(2), torch.eye(2)), r"k_train.shape=\(3, 3\)"),
        (lambda: ridge_regression(torch.eye(2), torch.ones(2), torch.ones(2, 3)), r"k_test.shape=\(2, 3\)"),
        (lambda: funk_hecke("nngp", 3, 2), "kernel='nngp'"),
        (lambda: funk_hecke("rfk", 1, 2), "s=1"),
        (lambda: degeneracy(3, -1), "k=-1"),
        (lambda: torus_spectrum((3, 2)), r"filter_sizes=\(3, 2\)"),
        (lambda: torus_spectrum((2, 2), 8, 9), "grid=8"),
        (lambda: torus_spectrum((2, 2, 2), 1024), "grid=1024"),
        (lambda: effective_dimension((2, 2), 3), "level=3"),
        (lambda: learning_exponent((2, 2), 1, 0), "smoothness=0"),
        (lambda: laplacian_kernel(noise(1, 2), noise(1, 2), 0), "sigma=0"),
        (lambda: local_kernel(noise(1, 4), noise(1, 4), 5), "size=5"),
        (lambda: local_kernel(noise(1, 4), noise(1, 5), 2), r"y.shape=\(1, 5\)"),
        (lambda: learning_curve((2,), (2,), noise(20, 2), (8, 16)), r"sizes=\(8, 16\)"),
        (lambda: learning_curve((2,), (2,), noise(40, 2), (8, 16), tests=8, fit_from=16), "fit_from=16"),
        (lambda: sphere_patches(2, 0, 3), "patches=0"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_single_precision_and_container():
    x = patches(3, 4, 2)
    found = hierarchical_kernels(x.float(), None, (2, 2))
    assert isinstance(found, Kernels)
    assert found.ntk.dtype == torch.float32
    torch.testing.assert_close(found.ntk.double(), hierarchical_kernels(x, None, (2, 2)).ntk, atol=1e-3, rtol=0)
    assert hierarchical_kernels(x[:0], x, (2, 2)).rfk.shape == (0, 3)
