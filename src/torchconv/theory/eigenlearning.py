"""The errors of kernel and random-feature ridge regression, predicted from the spectrum of the kernel alone.

Simon, Karkada, Ghosh, Belkin, "More is Better in Modern Machine Learning: when Infinite Overparameterization is
Optimal and Overfitting is Obligatory", 2023, arXiv 2311.14646. With eigenvalues λ_i of the kernel under the law of the
data and coefficients v_i of the target, n samples, k random features and a ridge δ (added to the Gram matrix itself),
two numbers κ and γ say which part of every mode is learned:

    n = z + δ/κ,   k = z + k κ/γ,   z = Σ λ_i/(λ_i + γ),   q = Σ (λ_i/(λ_i + γ))²
    E_test = [1 − (q (k − 2z) + z²)/(n (k − q))]⁻¹ · (Σ (γ/(λ_i + γ) − κ λ_i/(λ_i + γ)² · k/(k − q)) v_i² + σ²)
    E_train = (δ/(n κ))² · E_test

k = ∞ is kernel ridge regression (γ = κ; arXiv 2110.03922). One scalar root, some sixty passes over the M modes; an
eigendecomposition of a measured kernel costs M³. Kernels of convolutional networks are in
:mod:`torchconv.theory.ntk`. Errors are mean squares, summed over the outputs; numbers are float64 throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchconv._common import check
from torchconv.catalog import part

INF = math.inf


@dataclass(frozen=True)
class Prediction:
    """What the framework says of one (n, k, ridge).

    Attributes:
        ridge: δ.
        kappa, gamma, z, q: the solution of the equations above.
        learnabilities: λ_i/(λ_i + γ), the learned share of every mode, by decreasing eigenvalue.
        overfitting: the factor [1 − …]⁻¹ ≥ 1 by which fitting noise multiplies the error.
        learnability: the learned share of the target, Σ L_i v_i²/Σ v_i².
        test_mse, train_mse: the errors, label noise included.
    """

    ridge: float
    kappa: float
    gamma: float
    z: float
    q: float
    learnabilities: Tensor
    overfitting: float
    learnability: float
    test_mse: float
    train_mse: float

    @property
    def fitting_ratio(self) -> float:
        """E_train/E_test, 0 for interpolation."""
        return self.train_mse / self.test_mse if self.test_mse else 0.0


@dataclass
class _Task:
    """Modes by decreasing eigenvalue, how often each occurs, squared coefficients and noise."""

    eigenvalues: Tensor
    counts: Tensor
    power: Tensor
    noise: float
    found: dict[float, float] = field(default_factory=dict)

    @property
    def rank(self) -> float:
        return float(self.counts[self.eigenvalues > 0].sum())

    def shares(self, gamma: float) -> Tensor:
        """λ/(λ + γ); of a mode without eigenvalue 0, also at γ = 0."""
        return torch.where(self.eigenvalues > 0, self.eigenvalues / (self.eigenvalues + gamma), 0.0)

    def sum(self, gamma: float, power: int = 1) -> float:
        return float((self.counts * self.shares(gamma) ** power).sum())

    def where_sum_is(self, z: float) -> float:
        """γ at which Σ λ/(λ + γ) = z, for z below the rank."""
        if z not in self.found:
            total = float((self.counts * self.eigenvalues).sum())
            # The sum is at most Σλ/γ and at least rank · λ/(λ + γ) of the smallest eigenvalue that is not zero.
            low = float(self.eigenvalues[self.eigenvalues > 0].min()) * (self.rank - z) / z
            self.found[z] = _falling_root(lambda gamma: self.sum(gamma) - z, low / 2, 2 * total / z)
        return self.found[z]


def _task(eigenvalues: Tensor, coefficients: Tensor, noise_std: float, multiplicities: Tensor | None) -> _Task:
    values = torch.as_tensor(eigenvalues).detach().double()
    held = torch.as_tensor(coefficients, device=values.device).detach().double()
    check(values.dim() == 1 and len(values) > 0, "eigenvalues", tuple(values.shape), "give a vector of modes")
    check(held.shape == values.shape, "coefficients", tuple(held.shape), f"give one for each of {len(values)} modes")
    good = bool(torch.isfinite(values).all()) and float(values.min()) >= 0 and float(values.max()) > 0
    remedy = "must be finite, >= 0 and not all zero (clip the round-off of an eigendecomposition)"
    check(good, "eigenvalues", [float(values.min()), float(values.max())], remedy)
    check(math.isfinite(noise_std) and noise_std >= 0, "noise_std", noise_std, "must be finite and >= 0")
    counts = torch.ones_like(values)
    if multiplicities is not None:
        counts = torch.as_tensor(multiplicities, device=values.device).double()
        check(counts.shape == values.shape, "multiplicities", tuple(counts.shape), f"give {len(values)} numbers")
        check(bool((counts > 0).all()), "multiplicities", float(counts.min()), "must be positive")
    order = torch.argsort(values, descending=True, stable=True)
    return _Task(values[order], counts[order], held[order] ** 2, float(noise_std) ** 2)


def _falling_root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a decreasing function of a positive number passes zero between two others, to the last digit."""
    a, b = math.log(low), math.log(high)
    while True:
        middle = (a + b) / 2
        if not a < middle < b:
            return math.exp(middle)
        a, b = (middle, b) if function(math.exp(middle)) > 0 else (a, middle)


def _solve(task: _Task, n: float, k: float, ridge: float) -> tuple[float, float]:
    """κ and γ."""

    def kappa(gamma: float, z: float) -> float:
        if n > k and ridge > 0:
            return ridge / (n - z)  # here k − z loses digits, below n − z does
        return gamma * (1 - z / k)

    if n == INF or ridge == 0:  # the smaller of samples, features and modes decides
        fewest = min(n, k)
        gamma = task.where_sum_is(fewest) if fewest < task.rank else 0.0
        return (0.0, gamma) if n >= k else (kappa(gamma, task.sum(gamma)), gamma)

    def excess(gamma: float) -> float:
        z = task.sum(gamma)
        return z + ridge / (gamma * (1 - z / k)) - n if z < k else INF

    low = ridge / n / 2
    if k < task.rank:
        low = max(low, task.where_sum_is(k) * (1 - 1e-12))
    high = 2 * low
    while excess(high) > 0:
        high *= 16
    gamma = _falling_root(excess, low, high)
    return kappa(gamma, task.sum(gamma)), gamma


def _predict(task: _Task, n: float, k: float, ridge: float) -> Prediction:
    kappa, gamma = _solve(task, n, k, ridge)
    shares = task.shares(gamma)
    z, q = task.sum(gamma), task.sum(gamma, 2)
    left = 1 - (q * (1 - 2 * z / k) + z * z / k) / (n * (1 - q / k))
    overfitting = 1 / left if left > 1e-12 else INF  # below: as many samples as features or modes, nothing to damp it
    steep = torch.where(task.eigenvalues > 0, shares / (task.eigenvalues + gamma), 0.0)
    unlearned = 1 - shares if gamma == 0 else gamma / (task.eigenvalues + gamma)
    bias = float(((unlearned - kappa * steep / (1 - q / k)) * task.power).sum())
    total = bias + task.noise
    test = overfitting * total if total > 0 else 0.0
    if n == INF:
        ratio = 1.0
    else:
        ratio = (ridge / (n * kappa)) ** 2 if kappa > 0 else max(0.0, 1 - z / n) ** 2
    return Prediction(
        ridge=ridge,
        kappa=kappa,
        gamma=gamma,
        z=z,
        q=q,
        learnabilities=shares,
        overfitting=overfitting,
        learnability=float((shares * task.power).sum() / task.power.sum()) if float(task.power.sum()) else 0.0,
        test_mse=test,
        train_mse=test * ratio if math.isfinite(test) else (0.0 if ratio == 0 else INF),
    )


def _check_sizes(n: float, k: float) -> None:
    check(n > 0, "n", n, "the number of samples must be positive (math.inf for no limit)")
    check(k > 0, "k", k, "the number of features must be positive (math.inf for the kernel itself)")
    check(min(n, k) < INF, "n", n, "with infinitely many samples give a finite number of features k")


@part(
    "eigenframework",
    paper="eigenlearning",
    kind="theory",
    keywords="kernel ridge regression random features generalisation test error learning curve spectrum NTK",
)
def eigenframework(
    eigenvalues: Tensor,
    coefficients: Tensor,
    n: float,
    k: float = INF,
    ridge: float = 0.0,
    noise_std: float = 0.0,
    *,
    multiplicities: Tensor | None = None,
) -> Prediction:
    """Predict the errors of ridge regression with a kernel, or with k random features of it.

    Args:
        eigenvalues: λ_i ≥ 0 of the kernel under the law of the data, in any order.
        coefficients: v_i of the target (not squared); for several outputs the root of the sum of squares.
        n: samples; ``math.inf`` with finite k.
        k: random features; ``math.inf`` is the kernel itself.
        ridge: δ ≥ 0, added to the Gram matrix of the samples, not divided by n. 0 interpolates.
        noise_std: σ of the noise of the labels.
        multiplicities: how often each eigenvalue occurs; the coefficient is then that of the whole level.

    Raises:
        ValueError: vectors that do not fit, negative or non-finite numbers, n = k = ∞.

    Example:
        >>> i = torch.arange(1, 1001, dtype=torch.float64)
        >>> found = eigenframework(i**-1.5, i**-0.8, n=50, ridge=0.01)
        >>> round(float(found.learnabilities.sum()) + found.ridge / found.kappa, 6)
        50.0

    Reference: arXiv 2311.14646, the RF eigenframework; its limit of many features is arXiv 2110.03922.
    """
    _check_sizes(n, k)
    check(math.isfinite(ridge) and ridge >= 0, "ridge", ridge, "must be finite and >= 0")
    return _predict(_task(eigenvalues, coefficients, noise_std, multiplicities), float(n), float(k), float(ridge))


def optimal_ridge(
    eigenvalues: Tensor,
    coefficients: Tensor,
    n: float,
    k: float = INF,
    noise_std: float = 0.0,
    *,
    multiplicities: Tensor | None = None,
) -> Prediction:
    """The prediction at the ridge of the smallest test error, 0 where interpolating is best.

    Arguments are those of :func:`eigenframework`. A grid over 24 decades finds the valley, golden sections its bottom.

    Example:
        >>> i = torch.arange(1, 1001, dtype=torch.float64)
        >>> optimal_ridge(i**-1.5, i**-1.3, n=50).ridge, optimal_ridge(i**-1.5, i**-1.3, n=50, noise_std=1).ridge > 0.1
        (0.0, True)
    """
    _check_sizes(n, k)
    check(n < INF, "n", n, "with infinitely many samples every ridge gives the same error")
    task = _task(eigenvalues, coefficients, noise_std, multiplicities)

    def error(logarithm: float) -> float:
        return _predict(task, float(n), float(k), math.exp(logarithm)).test_mse

    scale = math.log(float((task.counts * task.eigenvalues).sum()))
    decades = [scale + math.log(10) * (step / 2) for step in range(-32, 17)]
    errors = [error(d) for d in decades]
    best = min(range(len(errors)), key=errors.__getitem__)
    a, b = decades[max(0, best - 1)], decades[min(len(decades) - 1, best + 1)]
    golden = (math.sqrt(5) - 1) / 2
    c, d = b - golden * (b - a), a + golden * (b - a)
    low, high = error(c), error(d)
    while b - a > 1e-7:
        if low < high:
            b, d, high = d, c, low
            c = b - golden * (b - a)
            low = error(c)
        else:
            a, c, low = c, d, high
            d = a + golden * (b - a)
            high = error(d)
    found, without = (_predict(task, float(n), float(k), r) for r in (math.exp((a + b) / 2), 0.0))
    return without if without.test_mse <= found.test_mse * (1 + 1e-12) else found


def _check_powers(alpha: float, beta: float, relative_noise: float) -> None:
    check(alpha > 1, "alpha", alpha, "eigenvalues i^-alpha need alpha > 1 for a finite trace")
    check(1 < beta < 2 * alpha + 1, "beta", beta, f"must lie between 1 and 2·alpha + 1 = {2 * alpha + 1:g}")
    check(relative_noise >= 0, "relative_noise", relative_noise, "must be >= 0")


def power_law_error(
    fitting_ratio: Tensor | float, n: float, alpha: float, beta: float, relative_noise: float = 0.0
) -> Tensor:
    """Test error of kernel ridge regression on a power-law task, for many samples.

    λ_i = i^−α, v_i² = i^−β, and the ridge is the one that fits with the ratio E_train/E_test.

    Args:
        fitting_ratio: E_train/E_test in [0, 1), a number or a tensor of them.
        n: samples.
        alpha, beta: the exponents, α > 1 and 1 < β < 2α + 1.
        relative_noise: variance of the label noise, in units of the error without ridge and noise.

    Example:
        >>> round(float(power_law_error(0.0, 100, 1.5, 1.9)), 5)
        0.04636

    Reference: arXiv 2311.14646, the theorem on power-law tasks.
    """
    _check_powers(alpha, beta, relative_noise)
    ratio = torch.as_tensor(fitting_ratio, dtype=torch.float64)
    check(bool(((ratio >= 0) & (ratio < 1)).all()), "fitting_ratio", fitting_ratio, "must lie in [0, 1)")
    s, sine = ratio.sqrt(), math.sin(math.pi / alpha)
    # (α − β + 1)/sin(π(β − 1)/α) without its removable singularity at β = α + 1
    smooth = alpha / math.pi / torch.sinc(torch.tensor((alpha - beta + 1) / alpha, dtype=torch.float64))
    scale = n ** (1 - beta) * math.pi**beta * sine * smooth
    noise = 1 - s + alpha * relative_noise * (1 - s) ** beta
    found: Tensor = scale * noise / (1 + (alpha - 1) * s) * (alpha * sine * (1 - s)) ** -beta
    return found


def optimal_fitting_ratio(alpha: float, beta: float, relative_noise: float = 0.0) -> float:
    """E_train/E_test of the best ridge on a power-law task: 0 (interpolate) up to a noise of (β − α)/(α(α − 1)).

    Example:
        >>> optimal_fitting_ratio(1.5, 1.9), round(optimal_fitting_ratio(1.5, 1.9, 10.0), 3)
        (0.0, 0.423)
    """
    _check_powers(alpha, beta, relative_noise)
    strength = alpha * (alpha - 1) * relative_noise
    if strength <= beta - alpha:
        return 0.0

    def falling(distance: float) -> float:  # in 1 − s, so that a root near 1 keeps its digits
        return beta - alpha + (alpha - 1) * beta * (1 - distance) - strength * distance**beta

    return (1 - _falling_root(falling, 1e-300, 1.0)) ** 2


@dataclass(frozen=True)
class Eigensystem:
    """The spectrum of a kernel on a sample and what the targets have in it.

    Attributes:
        eigenvalues: (M,), decreasing, of the kernel as an operator on functions of the sample.
        coefficients: (M,), root of the sum over outputs of the squared coefficients.
        functions: (M, M), the eigenfunction i in column i, of mean square 1.
    """

    eigenvalues: Tensor
    coefficients: Tensor
    functions: Tensor


def _targets(kernel: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    kernel = kernel.detach().double()
    y = targets.detach().to(kernel)
    y = y.unsqueeze(1) if y.dim() == 1 else y
    square = kernel.dim() == 2 and kernel.shape[0] == kernel.shape[1]
    check(square, "kernel", tuple(kernel.shape), "give a square matrix")
    fits = y.dim() == 2 and len(y) == len(kernel)
    check(fits, "targets", tuple(targets.shape), f"give ({len(kernel)},) or ({len(kernel)}, outputs)")
    return kernel, y


def eigensystem(kernel: Tensor, targets: Tensor) -> Eigensystem:
    """Eigenvalues and coefficients of targets, measured on a sample: what :func:`eigenframework` takes.

    Args:
        kernel: (M, M), symmetric and positive semi-definite; small negative eigenvalues become 0.
        targets: (M,) or (M, outputs).

    Example:
        >>> found = eigensystem(torch.tensor([[2.0, 0.0], [0.0, 4.0]]), torch.tensor([1.0, 3.0]))
        >>> found.eigenvalues.tolist(), [round(v, 4) for v in found.coefficients.tolist()]
        ([2.0, 1.0], [2.1213, 0.7071])
    """
    kernel, y = _targets(kernel, targets)
    values, vectors = torch.linalg.eigh((kernel + kernel.T) / 2)
    functions = vectors.flip(1) * math.sqrt(len(kernel))
    coefficients = (functions.T @ y / len(kernel)).norm(dim=1)
    return Eigensystem(values.flip(0).clamp(min=0) / len(kernel), coefficients, functions)


def finite_population_error(test_mse: float, train_mse: float, n: int, population: int) -> float:
    """Error on the points left over, where n of a finite population train and the framework counts all of them.

    Example:
        >>> finite_population_error(0.5, 0.1, n=20, population=100)
        0.6
    """
    check(0 < n < population, "n", n, f"must lie between 0 and the population of {population}")
    return (population * test_mse - n * train_mse) / (population - n)


def kernel_regression(kernel: Tensor, targets: Tensor, train: Tensor, ridge: float = 0.0) -> tuple[float, float]:
    """Train and test error of ridge regression on some rows of a sample, tested on the others.

    Args:
        kernel: (M, M).
        targets: (M,) or (M, outputs).
        train: the rows to train on, as indices or a mask.
        ridge: δ, added to the Gram matrix of those rows; 0 takes the solution of least norm.

    Returns:
        Mean squared errors over rows, summed over outputs: (train, test).

    Example:
        >>> kernel_regression(torch.eye(3), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1]))
        (0.0, 9.0)
    """
    kernel, y = _targets(kernel, targets)
    mask = torch.zeros(len(kernel), dtype=torch.bool, device=kernel.device)
    mask[train.to(kernel.device)] = True
    check(bool(mask.any()) and not bool(mask.all()), "train", int(mask.sum()), "leave rows on either side")
    check(math.isfinite(ridge) and ridge >= 0, "ridge", ridge, "must be finite and >= 0")
    gram = kernel[mask][:, mask]
    if ridge:
        gram = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        weights = torch.linalg.solve(gram, y[mask], left=True)
    else:
        weights = torch.linalg.pinv(gram, hermitian=True) @ y[mask]
    missed = (kernel[:, mask] @ weights - y).square().sum(1)
    return float(missed[mask].mean()), float(missed[~mask].mean())


@dataclass(frozen=True)
class Exponents:
    """Power laws fitted to proxies: eigenvalues like i^−alpha, squared coefficients like i^−beta."""

    alpha: float
    beta: float
    sizes: tuple[int, ...]
    traces: tuple[float, ...]
    errors: tuple[float, ...]


def measure_exponents(
    kernel: Tensor, targets: Tensor, sizes: Sequence[int] = (), *, trials: int = 5, seed: int = 0
) -> Exponents:
    """Measure α and β of a task by proxies that a finite sample does not bias as it biases the spectrum.

    1/tr K_n⁻¹ falls as n^−α and the test error without ridge as n^−(β−1); the slopes are least squares in logarithms.

    Args:
        kernel: (M, M) of full rank.
        targets: (M,) or (M, outputs).
        sizes: numbers of samples n < M; by default six from M/32 to M/2.
        trials: random subsets a size.
        seed: of the subsets.

    Raises:
        ValueError: fewer than two sizes, or a singular Gram matrix.
    """
    kernel, y = _targets(kernel, targets)
    total = len(kernel)
    chosen = tuple(sizes) or tuple(round(total / 2 ** (1 + 4 * step / 5)) for step in range(5, -1, -1))
    remedy = f"give two or more different numbers between 1 and {total - 1}"
    check(len(set(chosen)) > 1 and min(chosen) > 0 and max(chosen) < total, "sizes", chosen, remedy)
    check(trials > 0, "trials", trials, "must be at least 1")
    generator = torch.Generator().manual_seed(seed)
    traces: list[float] = []
    errors: list[float] = []
    for n in chosen:
        found = []
        for _ in range(trials):
            rows = torch.randperm(total, generator=generator)[:n]
            factor, info = torch.linalg.cholesky_ex(kernel[rows][:, rows])
            check(int(info) == 0, "kernel", f"singular on {n} rows", "remove repeated rows or add a small ridge to it")
            inverse = float(torch.cholesky_inverse(factor).diagonal().sum())
            found.append((1 / inverse, kernel_regression(kernel, y, rows)[1]))
        traces.append(sum(t for t, _ in found) / trials)
        errors.append(sum(e for _, e in found) / trials)
    alpha, beta = (-_slope(chosen, values) for values in (traces, errors))
    return Exponents(alpha, beta + 1, chosen, tuple(traces), tuple(errors))


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    a, b = (torch.tensor(v, dtype=torch.float64).log() for v in (x, y))
    a = a - a.mean()
    return float((a * b).sum() / (a * a).sum())
