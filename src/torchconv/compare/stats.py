"""Which differences in accuracy are real: intervals, paired tests and their correction, from 0/1 answers.

Every candidate was trained with S seeds and answered the same n test items; entry (s, i) of its matrix says whether
network s was right on item i. Two things are samples here: the networks (another seed gives another network) and the
items (another test set gives other items). An interval that leaves out either promises too much, and with three seeds
the usual remedies do not help: a bootstrap of three seeds understates their variance by a third and has no t-tails, and
a test that flips signs of three differences cannot go below p = 0.25. So both variances are estimated and combined:

    half-width² = t²_ν · σ̂²_seed / S  +  z² · V_item / n

σ̂²_seed is the variance of the seeds' accuracies less the part that finite n alone puts there, V_item the variance over
items of the accuracy averaged over seeds. Each part has the quantile that its own degrees of freedom call for
(ν = S − 1), as in intervals by variance-estimate recovery (Zou & Donner 2008). V_item includes pseudo-items as
in Agresti & Coull 1998 (two right, two wrong) and Agresti & Min 2005 (one won, one lost), so that 100 % right, or no
disagreement at all, does not give an interval of width zero.

Differences are paired over items: both networks met the same ones, which removes their difficulty. Seeds are not
paired: two architectures under one seed share little but the order of the data, and what they share makes the interval
too wide, never too narrow; treating them as independent gives up to 2(S − 1) degrees of freedom (Welch) instead of
S − 1. Simulated over n from 360 to 10,000, S of 2, 3 and 5 and seed effects from none to dominating, nominal 95 %
intervals held the truth in 92-97 % (accuracy) and 94-99 % (difference) of cases; over items alone it was 31-98 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from torchconv._common import check
from torchconv.compare.verdict import pareto_front, pareto_fronts, verdict

__all__ = [
    "accuracy_interval",
    "holm",
    "paired_difference",
    "pareto_front",
    "pareto_fronts",
    "summarise",
    "verdict",
]

_BOTH = "items and seeds"
_ITEMS = "items only: one seed says nothing about another training run"
_EXACT_UP_TO = 14  # items, 2^14 sign patterns
_FLIPS_UP_TO = 64  # items; beyond, the normal approximation is as good
_FLIPS = 20_000


def accuracy_interval(correct: ArrayLike, *, confidence: float = 0.95) -> dict[str, Any]:
    """Mean accuracy over seeds and items, with an interval for other seeds and other items.

    Args:
        correct: (seeds, items) of 0/1 or bool; (items,) is one seed.
        confidence: in (0, 1).

    Returns:
        {"mean", "low", "high", "per_seed", "basis"}. With one seed the interval covers the choice of items only, and
        ``basis`` says so.

    Raises:
        ValueError: the matrix is empty, holds anything but 0 and 1, or ``confidence`` is out of range.

    Example:
        >>> accuracy_interval([[1, 1, 1, 0], [1, 1, 0, 0]])["mean"]
        0.625
    """
    matrix = _matrix("correct", correct)
    _check_confidence(confidence)
    seeds, items = matrix.shape
    mean = float(matrix.mean())
    per_item = matrix.mean(0)
    centre = (per_item.sum() + 2) / (items + 4)
    of_items = ((per_item**2).sum() + 2) / (items + 4) - centre**2
    of_seeds = _seed_variance(matrix)
    half = _half_width(1 - confidence, of_items / (items + 4), of_seeds / seeds if seeds > 1 else 0.0, seeds - 1)
    return {
        "mean": mean,
        "low": float(min(max(centre - half, 0.0), mean)),
        "high": float(max(min(centre + half, 1.0), mean)),
        "per_seed": [float(v) for v in matrix.mean(1)],
        "basis": _BOTH if seeds > 1 else _ITEMS,
    }


def paired_difference(
    candidate: ArrayLike, baseline: ArrayLike, *, confidence: float = 0.95, seed: int = 0
) -> dict[str, Any]:
    """Accuracy of ``candidate`` less that of ``baseline`` on the same items: interval and two-sided p-value.

    p is the level at which the interval begins to leave out 0. Where the two disagree on few items (64 at most) it is
    never smaller than the sign-flip test's over those items (exact up to 14 items; with one seed each, McNemar's exact
    test at any number), because there the normal approximation is too sure of itself.

    Args:
        candidate, baseline: (seeds, items) of 0/1, items in the same order; the numbers of seeds may differ. When only
            one side has several seeds, its seed variance stands for both.
        confidence: in (0, 1).
        seed: for the random sign flips.

    Returns:
        {"mean", "low", "high", "p", "n_items", "basis"}; ``mean`` > 0 favours the candidate.

    Raises:
        ValueError: the numbers of items differ, or a matrix is not one of 0 and 1.
    """
    a, b = _matrix("candidate", candidate), _matrix("baseline", baseline)
    _check_confidence(confidence)
    check(a.shape[1] == b.shape[1], "candidate", a.shape, f"must have the baseline's {b.shape[1]} items, in that order")
    items = a.shape[1]
    won = a.mean(0) - b.mean(0)
    centre = float(won.sum() / (items + 2))
    of_items = float((((won**2).sum() + 2) / (items + 2) - centre**2) / (items + 2))
    of_seeds, freedom = _welch(a, b)
    half = _half_width(1 - confidence, of_items, of_seeds, freedom)
    mean = float(won.mean())
    several = max(len(a), len(b)) > 1
    p = max(_p_value(abs(centre), of_items, of_seeds, freedom), _sign_flip(won, several, seed))
    return {
        "mean": mean,
        "low": float(min(max(centre - half, -1.0), mean)),
        "high": float(max(min(centre + half, 1.0), mean)),
        "p": p,
        "n_items": items,
        "basis": _BOTH if several else _ITEMS,
    }


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: p of the k-th smallest of m times (m − k + 1), made monotone and at most 1.

    Rejecting where the adjusted value is at most α keeps the chance of any false rejection at most α, whatever the
    dependence.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, dtype=float)
    check(p.ndim == 1 and bool(np.all((p >= 0) & (p <= 1))), "p_values", list(p_values), "must lie between 0 and 1")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return [float(v) for v in adjusted]


def summarise(
    correct: Mapping[str, ArrayLike], baseline: str, *, confidence: float = 0.95, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Accuracy of every candidate and its difference from the baseline, with p-values corrected over the candidates.

    Args:
        correct: candidate → (seeds, items) of 0/1, all on the same items.
        baseline: one of the candidates.
        confidence: of the intervals; a difference is significant when its adjusted p is at most 1 − confidence.
        seed: for random sign flips.

    Returns:
        candidate → {"accuracy": :func:`accuracy_interval`, "difference": :func:`paired_difference` with "p_adjusted"
        (:func:`holm`) and "significant", or None for the baseline}.

    Raises:
        ValueError: ``baseline`` is not among the candidates, or a matrix does not fit.
    """
    check(baseline in correct, "baseline", baseline, f"choose one of {', '.join(correct) or 'no candidates'}")
    reference = _matrix("correct", correct[baseline])
    others = [name for name in correct if name != baseline]
    differences = {n: paired_difference(correct[n], reference, confidence=confidence, seed=seed) for n in others}
    for name, adjusted in zip(others, holm([differences[n]["p"] for n in others]), strict=True):
        differences[name]["p_adjusted"] = adjusted
        differences[name]["significant"] = bool(adjusted <= 1 - confidence)
    return {
        name: {"accuracy": accuracy_interval(matrix, confidence=confidence), "difference": differences.get(name)}
        for name, matrix in correct.items()
    }


# -- below: the parts --------------------------------------------------------------------------------------------------


def _matrix(argument: str, correct: ArrayLike) -> NDArray[np.float64]:
    matrix = np.atleast_2d(np.asarray(correct, dtype=float))
    check(matrix.ndim == 2 and matrix.size > 0, argument, matrix.shape, "must be (seeds, items) with at least one each")
    check(bool(np.all((matrix == 0) | (matrix == 1))), argument, "other numbers", "must hold 0 and 1 only")
    return matrix


def _check_confidence(confidence: float) -> None:
    check(0 < confidence < 1, "confidence", confidence, "must lie between 0 and 1")


def _seed_variance(matrix: NDArray[np.float64]) -> float:
    """Variance between seeds beyond what answering finitely many items puts there; 0 for one seed."""
    seeds, items = matrix.shape
    if seeds < 2:
        return 0.0
    rows = matrix.mean(1)
    between = float(rows.var(ddof=1))
    if items < 2:
        return between
    rest = matrix - rows[:, None] - matrix.mean(0)[None] + matrix.mean()
    noise = float((rest**2).sum() / ((seeds - 1) * (items - 1)))
    return max(between - noise / items, 0.0)


def _welch(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[float, float]:
    """Variance of the difference of two means over seeds, and its degrees of freedom."""
    s, t = len(a), len(b)
    if max(s, t) < 2:
        return 0.0, 0.0
    of_a, of_b = _seed_variance(a), _seed_variance(b)
    if min(s, t) < 2:
        known, freedom = (of_a, s - 1) if s > 1 else (of_b, t - 1)
        return known / s + known / t, float(freedom)
    x, y = of_a / s, of_b / t
    if x + y == 0:
        return 0.0, float(s + t - 2)
    return x + y, max((x + y) ** 2 / (x**2 / (s - 1) + y**2 / (t - 1)), float(min(s, t) - 1))


def _half_width(alpha: float, of_items: float, of_seeds: float, freedom: float) -> float:
    z = float(special.ndtri(alpha / 2))
    t = float(special.stdtrit(freedom, alpha / 2)) if of_seeds > 0 else 0.0
    return math.sqrt(t**2 * of_seeds + z**2 * of_items)


def _p_value(distance: float, of_items: float, of_seeds: float, freedom: float) -> float:
    """The level whose half-width is ``distance``: half-widths fall from infinity to 0 as the level goes from 0 to 1."""
    low, high = math.log(1e-12), 0.0
    if distance <= 0:
        return 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if _half_width(math.exp(middle), of_items, of_seeds, freedom) > distance:
            low = middle
        else:
            high = middle
    return min(math.exp(high), 1.0)


def _sign_flip(won: NDArray[np.float64], several: bool, seed: int) -> float:
    """Two-sided p-value of Σ won when each item's difference is as likely to point either way."""
    values = won[np.abs(won) > 1e-12]
    total, m = abs(float(values.sum())), len(values)
    if m == 0:
        return 1.0
    if not several:  # every value is ±1
        return float(stats.binomtest(int((values > 0).sum()), m).pvalue)
    if m > _FLIPS_UP_TO:
        return 0.0
    if m <= _EXACT_UP_TO:
        signs = 1 - 2 * ((np.arange(2**m)[:, None] >> np.arange(m)) & 1)
        return float((np.abs(signs @ values) >= total - 1e-9).mean())
    flips = 1 - 2 * np.random.default_rng(seed).integers(0, 2, (_FLIPS, m), dtype=np.int8)
    return (1 + int((np.abs(flips @ values) >= total - 1e-9).sum())) / (_FLIPS + 1)
