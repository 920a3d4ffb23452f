"""More features at a desk: ridge regression on digits with ever more random ReLU features, and what was predicted."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from torchconv.claims import Evidence, Progress, claim
from torchconv.claims._support import paired_interval

SAMPLES = 400
FEATURES = (25, 100, 400, 1600, 6400)
RIDGES = tuple(10.0 ** (step / 2) for step in range(-10, 5))


@claim(
    key="eigenlearning",
    says="With the best ridge, random-feature regression only gains from more features (and from more samples), its "
    "errors follow from the spectrum of the kernel and the coefficients of the target, and on tasks with little noise "
    "the best ridge all but interpolates.",
    source="arXiv 2311.14646, the RF eigenframework, the theorem that more is better, the experiments on image sets",
    experiment="Digits (8 × 8), one-hot targets: 400 images train, the other 1397 test, ridge regression on random "
    "ReLU features of one hidden layer, 25 to 6400 of them, the best of 15 ridges at each. Effect: the smallest gain "
    "in test error of the four steps to four times as many features, paired over splits. Beside it: measured over "
    "predicted errors, and train over test error at the best ridge of the limit.",
)
def run(budget: str, progress: Progress) -> Evidence:
    """Regress on every number of features, and predict the same from the spectrum."""
    import torch
    import torch.nn.functional as F
    from sklearn.datasets import load_digits

    from torchconv.theory.eigenlearning import eigenframework, eigensystem, finite_population_error
    from torchconv.theory.ntk import Dense, ReLU, nngp_ntk

    digits = load_digits()
    x = torch.tensor(digits.data)
    x = (x - x.mean()) / x.std()
    y = F.one_hot(torch.tensor(digits.target), 10).double()
    kernel, _ = nngp_ntk(x, None, [Dense(), ReLU(), Dense()])
    task = eigensystem(kernel, y)

    seeds = 8 if budget == "quick" else 32
    best: dict[float, list[float]] = {k: [] for k in (*FEATURES, math.inf)}
    ratios: dict[float, list[float]] = {k: [] for k in best}
    chosen: dict[float, list[float]] = {k: [] for k in best}
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(x), generator=generator)
        train, rest = order[:SAMPLES], order[SAMPLES:]
        for k in best:
            if k == math.inf:
                gram = kernel
            else:
                first = torch.randn(x.shape[1], int(k), generator=generator, dtype=torch.float64)
                hidden = torch.relu(x @ first / math.sqrt(x.shape[1]))
                gram = hidden @ hidden.T / k
            errors = _errors(gram[train][:, train], gram[rest][:, train], y[train], y[rest])
            number = min(range(len(RIDGES)), key=lambda i, e=errors: e[i][1])  # type: ignore[misc]
            fit, error = errors[number]
            best[k].append(error)
            ratios[k].append(fit / error)
            chosen[k].append(RIDGES[number])
        progress(f"split {seed}: " + ", ".join(f"{k:g} features {v[-1]:.3f}" for k, v in best.items()))

    steps = {}
    for fewer, more in pairwise(FEATURES):
        gains = [100 * (1 - b / a) for a, b in zip(best[fewer], best[more], strict=True)]
        steps[f"{fewer} to {more}"] = paired_interval(gains, [0.0] * len(gains))
    effect, low, high = min(steps.values())
    predicted = {}
    for k, ridges in chosen.items():
        ridge = sorted(ridges)[len(ridges) // 2]
        found = eigenframework(task.eigenvalues, task.coefficients, SAMPLES, k, ridge)
        predicted[k] = finite_population_error(found.test_mse, found.train_mse, SAMPLES, len(x))
    mean = {k: sum(v) / len(v) for k, v in best.items()}
    return Evidence(
        effect=effect,
        low=low,
        high=high,
        unit="% of the test error gone",
        meaning="positive: every step to four times as many features lowers the test error at the best ridge",
        measurements={
            "test_mse_at_the_best_ridge": {f"{k:g}": v for k, v in mean.items()},
            "measured_over_predicted": {f"{k:g}": mean[k] / predicted[k] for k in mean},
            "gain_of_each_step_percent": {name: {"mean": m, "low": a, "high": b} for name, (m, a, b) in steps.items()},
            "train_over_test_error": {f"{k:g}": sum(v) / len(v) for k, v in ratios.items()},
            "median_best_ridge": {f"{k:g}": sorted(v)[len(v) // 2] for k, v in chosen.items()},
            "splits": seeds,
        },
        notes=[
            "The interval is Student's, over splits, for the step of the smallest mean gain.",
            "The best ridge is chosen on the test images, as in the statement of the theorem.",
            "The predictions know the spectrum on all 1797 images and are corrected for the finite population.",
        ],
    )


def _errors(gram: Any, cross: Any, y: Any, truth: Any) -> list[tuple[float, float]]:
    """(train, test) error at every ridge, from one eigendecomposition."""
    import torch

    values, vectors = torch.linalg.eigh(gram)
    inside, seen = vectors.T @ y, cross @ vectors
    found = []
    for ridge in RIDGES:
        weights = inside / (values.clamp(min=0) + ridge)[:, None]
        fit = (ridge * weights).square().sum() / len(y)
        found.append((float(fit), float((seen @ weights - truth).square().sum(1).mean())))
    return found
