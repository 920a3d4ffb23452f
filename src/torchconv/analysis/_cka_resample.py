"""How far a similarity can be trusted: intervals over stimuli, fewer stimuli, perturbed stimuli."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from torchconv._common import check, check_choice
from torchconv.analysis._cka_canonical import compact, procrustes_distance
from torchconv.analysis._cka_kernels import check_pair, cka
from torchconv.analysis.rsa import compare_rdms, ranks, rdm, rsa

MEASURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda x, y: cka(x, y),
    "rbf": lambda x, y: cka(x, y, "rbf"),
    "linear-biased": lambda x, y: cka(x, y, "linear", "biased"),
    "rbf-biased": lambda x, y: cka(x, y, "rbf", "biased"),
    "rsa-pearson": lambda x, y: rsa(x, y, how="corr"),
    "rsa-spearman": lambda x, y: rsa(x, y),
    "procrustes": lambda x, y: 1 - procrustes_distance(x, y),
}
"""Similarities by name, all 1 for a network with itself: CKA (unbiased unless said), RSA of correlation RDMs, and one
minus the Procrustes distance."""


@dataclass(frozen=True)
class Interval:
    """A similarity with its interval; ``draws`` are the resampled values."""

    value: float
    low: float
    high: float
    draws: Tensor


def interval(
    x: Tensor,
    y: Tensor,
    measure: str = "linear",
    how: str = "bootstrap",
    *,
    draws: int | Tensor = 200,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """A similarity and how much it owes to the choice of stimuli.

    Args:
        x: (n, p).
        y: (n, q), the same stimuli.
        measure: of :data:`MEASURES`.
        how: "bootstrap": percentiles over stimuli drawn with replacement, the same for both; RSA drops pairs of a
            stimulus with itself, CKA is raised by them. "subsample": normal interval from random halves. "jackknife":
            normal interval from leaving one out.
        draws: how many, or for the bootstrap (B, n) indices.
        level: of the interval.
        seed: of the draws.

    Returns:
        Value, bounds and draws.

    Raises:
        ValueError: unknown choices or shapes that do not fit.
    """
    check_choice("measure", measure, MEASURES)
    check_choice("how", how, ("bootstrap", "subsample", "jackknife"))
    check(0 < level < 1, "level", level, "must lie between 0 and 1")
    check_pair(x, y, 8 if how == "subsample" else 5)
    n = len(x)
    rows = _rows(n, how, draws, seed).to(x.device)
    score = _scorer(x, y, measure)
    found = torch.stack([score(r) for r in rows])
    value = float(score(torch.arange(n, device=x.device)))
    tail = (1 - level) / 2
    if how == "bootstrap":
        low, high = (float(torch.quantile(found, q)) for q in (tail, 1 - tail))
        return Interval(value, low, high, found)
    if how == "jackknife":
        spread = math.sqrt((n - 1) / n * float((found - found.mean()).square().sum()))
    else:
        m = rows.shape[1]
        spread = math.sqrt(m / (n - m)) * float(found.std())
    half = NormalDist().inv_cdf(1 - tail) * spread
    return Interval(value, value - half, value + half, found)


def _rows(n: int, how: str, draws: int | Tensor, seed: int) -> Tensor:
    if isinstance(draws, Tensor):
        check(how == "bootstrap", "draws", "indices", f"are for the bootstrap, not for {how}")
        check(draws.dim() == 2 and draws.shape[1] == n, "draws", tuple(draws.shape), f"must be (B, {n})")
        return draws
    if how == "jackknife":
        everything = torch.arange(n).expand(n, n)
        return everything[~torch.eye(n, dtype=torch.bool)].view(n, n - 1)
    check(draws > 1, "draws", draws, "must be at least 2")
    generator = torch.Generator().manual_seed(seed)
    if how == "bootstrap":
        return torch.randint(n, (draws, n), generator=generator)
    return torch.stack([torch.randperm(n, generator=generator)[: n // 2] for _ in range(draws)])


def _scorer(x: Tensor, y: Tensor, measure: str) -> Callable[[Tensor], Tensor]:
    """Stimuli → similarity; what does not change with the stimuli is computed once."""
    if measure.startswith("rsa"):
        a, b = rdm(x), rdm(y)
        how = {"rsa-pearson": "corr", "rsa-spearman": "spearman"}[measure]

        def score(rows: Tensor) -> Tensor:
            i, j = torch.triu_indices(len(rows), len(rows), 1, device=rows.device)
            i, j = rows[i], rows[j]
            different = i != j
            i, j = i[different], j[different]
            return compare_rdms(a[i, j], b[i, j], how)

        return score
    small_x, small_y = compact(x), compact(y)
    return lambda rows: MEASURES[measure](small_x[rows], small_y[rows])


def compare_features(x: Mapping[str, Tensor], y: Mapping[str, Tensor], measure: str = "linear") -> Tensor:
    """Similarity of every layer of one network with every layer of another, from collected features.

    Args:
        x: name → (n, p).
        y: name → (n, q).
        measure: of :data:`MEASURES`.

    Shape:
        (layers of x, layers of y).
    """
    check_choice("measure", measure, MEASURES)
    small = [[compact(v) if not measure.startswith("rsa") else v for v in side.values()] for side in (x, y)]
    return torch.stack([torch.stack([MEASURES[measure](a, b) for b in small[1]]) for a in small[0]])


@dataclass(frozen=True)
class Stability:
    """Scores of layers over draws of stimuli of one size.

    Attributes:
        size: stimuli a draw.
        mean, low, high: layer → number; the bounds hold 95 % of the draws.
        rank_stability: mean Spearman correlation of a draw's layer profile with that of all stimuli.
    """

    size: int
    mean: dict[str, float]
    low: dict[str, float]
    high: dict[str, float]
    rank_stability: float


def stability(
    x: Mapping[str, Tensor],
    y: Mapping[str, Tensor],
    measure: str = "linear",
    *,
    sizes: tuple[int, ...] | None = None,
    draws: int = 20,
    seed: int = 0,
) -> list[Stability]:
    """Whether a profile over layers would be the same with fewer, other stimuli.

    Args:
        x: layer → (n, p).
        y: the same layers → (n, q), the same stimuli.
        measure: of :data:`MEASURES`.
        sizes: stimuli a draw, without replacement; a quarter, a half and three quarters by default.
        draws: of each size.
        seed: of the draws.

    Returns:
        One entry a size.
    """
    check_choice("measure", measure, MEASURES)
    names = list(x)
    check(names == list(y), "y", list(y), f"needs the layers of x, {names}")
    n = len(x[names[0]])
    sizes = sizes or tuple(max(5, n * k // 4) for k in (1, 2, 3))
    check(draws > 1, "draws", draws, "must be at least 2")
    scorers = [_scorer(x[k], y[k], measure) for k in names]
    generator = torch.Generator().manual_seed(seed)
    everything = torch.arange(n)
    full = torch.stack([s(everything) for s in scorers])
    found = []
    for size in sizes:
        check(5 <= size <= n, "sizes", size, f"must lie between 5 and the {n} stimuli")
        rows = [torch.randperm(n, generator=generator)[:size] for _ in range(draws)]
        scores = torch.stack([torch.stack([s(r) for s in scorers]) for r in rows])
        profile = [spearman(full, s) for s in scores] if len(names) > 1 else [math.nan]
        bounds = torch.quantile(scores, scores.new_tensor([0.025, 0.975]), dim=0)
        columns = (scores.mean(0), bounds[0], bounds[1])
        mean, low, high = (dict(zip(names, c.tolist(), strict=True)) for c in columns)
        found.append(Stability(size, mean, low, high, sum(profile) / len(profile)))
    return found


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two vectors."""
    first, second = ranks(a), ranks(b)
    first, second = first - first.mean(), second - second.mean()
    return float(first @ second / (first.norm() * second.norm()))
