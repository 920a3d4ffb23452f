"""The eigenframework against its own equations, its limits, simulations and real regressions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from torch import Tensor

from torchconv.theory.eigenlearning import (
    eigenframework,
    eigensystem,
    finite_population_error,
    kernel_regression,
    measure_exponents,
    optimal_fitting_ratio,
    optimal_ridge,
    power_law_error,
)


def powers(modes: int, alpha: float = 1.4, beta: float = 1.6) -> tuple[Tensor, Tensor]:
    i = torch.arange(1, modes + 1, dtype=torch.float64)
    return i**-alpha, i ** (-beta / 2)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(2, 200),
    st.one_of(st.integers(2, 5000).map(float), st.just(math.inf)),
    st.floats(1e-8, 1e3),
    st.floats(0, 2),
    st.integers(20, 300),
)
def test_the_equations_hold(n: int, k: float, ridge: float, noise: float, modes: int) -> None:
    values, held = powers(modes)
    found = eigenframework(values, held, n, k, ridge, noise)
    shares = values / (values + found.gamma)
    assert found.z == pytest.approx(float(shares.sum()), rel=1e-9)
    assert n == pytest.approx(found.z + ridge / found.kappa, rel=1e-7)
    if math.isfinite(k):
        assert k == pytest.approx(found.z + k * found.kappa / found.gamma, rel=1e-7)
    else:
        assert found.gamma == pytest.approx(found.kappa, rel=1e-12)
    assert found.train_mse == pytest.approx((ridge / (n * found.kappa)) ** 2 * found.test_mse, rel=1e-9)
    assert found.overfitting >= 1
    assert 0 <= found.fitting_ratio <= 1 + 1e-9
    assert found.test_mse >= noise**2


def test_limits() -> None:
    values, held = powers(300)
    kernel = eigenframework(values, held, 40, ridge=0.1, noise_std=0.3)
    many = eigenframework(values, held, 40, 1e9, 0.1, 0.3)
    assert many.test_mse == pytest.approx(kernel.test_mse, rel=1e-6)
    closed = 40 / (40 - kernel.q) * (float(((1 - kernel.learnabilities) * held).square().sum()) + 0.09)
    assert kernel.test_mse == pytest.approx(closed, rel=1e-12)
    data = eigenframework(values, held, math.inf, 60, 0.1, 0.3)
    assert data.test_mse == pytest.approx(eigenframework(values, held, 1e9, 60, 0.1, 0.3).test_mse, rel=1e-6)
    assert (data.kappa, data.z) == (0.0, pytest.approx(60))
    assert data.test_mse == pytest.approx(float((data.gamma / (values + data.gamma) * held**2).sum()) + 0.09)
    damped = eigenframework(values, held, 40, 80, 1e12, 0.3)
    assert damped.test_mse == pytest.approx(float(held.square().sum()) + 0.09, rel=1e-6)
    assert damped.fitting_ratio == pytest.approx(1, rel=1e-6)


def test_without_ridge() -> None:
    values, held = powers(100)
    for n, k in ((30, 50), (50, 30), (30, math.inf)):
        found = eigenframework(values, held, n, k, noise_std=0.1)
        near = eigenframework(values, held, n, k, 1e-12, 0.1)
        assert found.z == pytest.approx(min(n, k))
        assert found.test_mse == pytest.approx(near.test_mse, rel=1e-5)
        assert found.train_mse == pytest.approx(near.train_mse, abs=1e-9)
    assert eigenframework(values, held, 40, 40).test_mse == math.inf  # the peak of the double descent
    # More samples and features than modes: ordinary least squares.
    for k in (200, math.inf):
        full = eigenframework(values, held, 150, k, noise_std=0.5)
        assert full.test_mse == pytest.approx(0.25 * 150 / 50)
        assert full.train_mse == pytest.approx(0.25 * 50 / 150)
    assert eigenframework(values, held, 150).test_mse == 0.0


def test_multiplicities_are_repeated_modes() -> None:
    values, counts = torch.tensor([1.0, 0.1, 0.01, 0.0]).double(), torch.tensor([1, 3, 5, 2])
    held = torch.tensor([1.0, 0.5, 0.2, 0.3]).double()
    once = eigenframework(values, held, 5, 9, 0.02, 0.1, multiplicities=counts)
    each = (held / counts.double().sqrt()).repeat_interleave(counts)
    many = eigenframework(values.repeat_interleave(counts), each, 5, 9, 0.02, 0.1)
    for name in ("kappa", "gamma", "z", "q", "overfitting", "learnability", "test_mse", "train_mse"):
        assert getattr(once, name) == pytest.approx(getattr(many, name), rel=1e-10), name


def test_more_is_better_at_the_best_ridge() -> None:
    values, held = powers(400)
    by_n = [optimal_ridge(values, held, n, 80, 0.5).test_mse for n in (10, 79, 81, 1000)]
    by_k = [optimal_ridge(values, held, 80, k).test_mse for k in (10, 79, 81, math.inf)]
    assert by_n == sorted(by_n, reverse=True)
    assert by_k == sorted(by_k, reverse=True)
    best = optimal_ridge(values, held, 60, noise_std=0.5)
    for factor in (0.9, 1.1):
        assert eigenframework(values, held, 60, ridge=factor * best.ridge, noise_std=0.5).test_mse > best.test_mse


def test_random_features_of_gaussian_data() -> None:
    """Regressions on Gaussian features, whose mean the framework predicts."""
    values, held = powers(200)
    n, k, ridge, noise, trials = 60, 90, 0.05, 0.3, 60
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tests, trains = [], []
    for _ in range(trials):
        x, fresh, mix = normal(n, 200), normal(500, 200), normal(200, k)
        features, seen = (t * values.sqrt() @ mix / math.sqrt(k) for t in (x, fresh))
        y, truth = x @ held + noise * normal(n), fresh @ held
        gram = features @ features.T + ridge * torch.eye(n, dtype=torch.float64)
        weights = torch.linalg.solve(gram, y)
        trains.append((features @ (features.T @ weights) - y).square().mean())
        tests.append((seen @ (features.T @ weights) - truth).square().mean() + noise**2)
    found = eigenframework(values, held, n, k, ridge, noise)
    for measured, predicted in ((tests, found.test_mse), (trains, found.train_mse)):
        each = torch.stack(measured)
        assert float(each.mean()) == pytest.approx(predicted, abs=4 * float(each.std()) / math.sqrt(trials))


def test_power_laws() -> None:
    values, held = powers(200_000, 1.5, 1.9)
    for ridge in (1e-3, 0.3):
        found = eigenframework(values, held, 300, ridge=ridge)
        assert float(power_law_error(found.fitting_ratio, 300, 1.5, 1.9)) == pytest.approx(found.test_mse, rel=0.02)
    # The singularity at β = α + 1 is removable.
    near = [float(power_law_error(0.3, 50, 1.5, b, 0.2)) for b in (2.5 - 1e-7, 2.5, 2.5 + 1e-7)]
    assert near[1] == pytest.approx(near[0], rel=1e-5)
    assert near[1] == pytest.approx(near[2], rel=1e-5)


@pytest.mark.parametrize(("alpha", "beta"), [(1.17, 1.14), (1.5, 1.9), (1.2, 3.0)])
@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0, 100.0])
def test_optimal_fitting_ratio_is_stationary(alpha: float, beta: float, noise: float) -> None:
    ratio = optimal_fitting_ratio(alpha, beta, noise)
    if noise <= (beta - alpha) / (alpha * (alpha - 1)):
        assert ratio == 0.0
        assert float(power_law_error(1e-6, 10, alpha, beta, noise)) > float(power_law_error(0, 10, alpha, beta, noise))
        return

    def slope(s: float) -> float:
        return beta - alpha + (alpha - 1) * beta * s - alpha * (alpha - 1) * (1 - s) ** beta * noise

    assert math.sqrt(ratio) == pytest.approx(brentq(slope, 0, 1), rel=1e-9)
    least = float(power_law_error(ratio, 10, alpha, beta, noise))
    around = power_law_error(torch.linspace(0, 0.99, 100), 10, alpha, beta, noise)
    assert least <= float(around.min()) * (1 + 1e-9)


def test_eigensystem_of_a_sample() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 60, generator=generator, dtype=torch.float64)
    y = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    kernel = x @ x.T
    found = eigensystem(kernel, y)
    functions = found.functions
    torch.testing.assert_close(functions.T @ functions / 40, torch.eye(40, dtype=torch.float64))
    torch.testing.assert_close(functions * found.eigenvalues @ functions.T, kernel)
    assert float(found.coefficients.square().sum()) == pytest.approx(float(y.square().sum() / 40))
    assert bool((found.eigenvalues.diff() <= 0).all())


def test_prediction_of_a_real_regression() -> None:
    """Handwritten digits: predicted errors are those of random splits."""
    from sklearn.datasets import load_digits

    from torchconv.theory.ntk import fully_connected, nngp_ntk

    digits = load_digits()
    rows = torch.randperm(1797, generator=torch.Generator().manual_seed(1))[:400]
    x = torch.tensor(digits.data)[rows]
    x = (x - x.mean()) / x.std()
    y = torch.nn.functional.one_hot(torch.tensor(digits.target)[rows], 10).double()
    _, kernel = nngp_ntk(x, None, fully_connected(3))
    task = eigensystem(kernel, y)
    for n, ridge in ((50, 0.1), (100, 3.0)):
        splits = [torch.randperm(400, generator=torch.Generator().manual_seed(s))[:n] for s in range(8)]
        measured = torch.tensor([kernel_regression(kernel, y, rows, ridge) for rows in splits]).mean(0)
        found = eigenframework(task.eigenvalues, task.coefficients, n, ridge=ridge)
        predicted = finite_population_error(found.test_mse, found.train_mse, n, 400)
        assert predicted == pytest.approx(float(measured[1]), rel=0.12)
        assert found.train_mse == pytest.approx(float(measured[0]), rel=0.3)


def test_exponents_of_a_made_task() -> None:
    values, held = powers(5000, 1.5, 1.8)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 5000, generator=generator, dtype=torch.float64)
    found = measure_exponents(x * values @ x.T, x @ held, [25, 50, 100, 200], trials=4)
    assert found.alpha == pytest.approx(1.5, abs=0.15)
    assert found.beta == pytest.approx(1.8, abs=0.25)
    assert found.sizes == (25, 50, 100, 200)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v, c: eigenframework(v, c[:-1], 5), "coefficients=.*give one for each of 10 modes"),
        (lambda v, c: eigenframework(-v, c, 5), "eigenvalues=.*must be finite, >= 0"),
        (lambda v, c: eigenframework(v * 0, c, 5), "eigenvalues=.*not all zero"),
        (lambda v, c: eigenframework(v, c, 0), "n=0: the number of samples"),
        (lambda v, c: eigenframework(v, c, 5, -1), "k=-1: the number of features"),
        (lambda v, c: eigenframework(v, c, math.inf), "n=inf: with infinitely many samples"),
        (lambda v, c: eigenframework(v, c, 5, ridge=-1), "ridge=-1: must be finite"),
        (lambda v, c: eigenframework(v, c, 5, noise_std=math.nan), "noise_std=nan"),
        (lambda v, c: eigenframework(v, c, 5, multiplicities=c[:3]), "multiplicities="),
        (lambda v, c: optimal_ridge(v, c, math.inf, 5), "n=inf"),
        (lambda v, c: power_law_error(0.1, 10, 1.0, 1.5), "alpha=1.0"),
        (lambda v, c: power_law_error(0.1, 10, 1.5, 4.5), "beta=4.5: must lie between 1 and"),
        (lambda v, c: power_law_error(1.0, 10, 1.5, 2.0), r"fitting_ratio=1.0: must lie in \[0, 1\)"),
        (lambda v, c: eigensystem(v, c), "kernel=.*square"),
        (lambda v, c: eigensystem(torch.eye(3), c), "targets="),
        (lambda v, c: kernel_regression(torch.eye(3), c[:3], torch.arange(3)), "train=3: leave rows"),
        (lambda v, c: finite_population_error(1, 0, 5, 5), "n=5: must lie between"),
        (lambda v, c: measure_exponents(torch.ones(9, 9), c[:9], [3, 5]), "kernel='singular on 3 rows'"),
        (lambda v, c: measure_exponents(torch.eye(9), c[:9], [3]), "sizes="),
    ],
)
def test_bad_arguments(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(*powers(10))  # type: ignore[operator]
