"""The answer of a comparison in plain words, and the Pareto fronts it rests on.

It names a winner on accuracy only where the corrected test supports one. Otherwise it says that there is none, and
picks by cost among those whose accuracy cannot be far below the baseline's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from torchconv._common import check, check_choice

__all__ = ["pareto_front", "pareto_fronts", "verdict"]

Candidate = Mapping[str, Any]

#: Relative differences in cost below these are ties: widths are matched to 2 %, and times repeat to about 5 %.
COST_TOLERANCE = {"params": 0.02, "macs": 0.02, "latency": 0.05}
_LESS = {"params": "fewer parameters", "macs": "fewer MACs"}
_MORE = {"params": "more parameters", "macs": "more MACs"}


def pareto_front(
    cost: Sequence[float],
    accuracy: Sequence[float],
    *,
    cost_tolerance: float = 0.0,
    accuracy_tolerance: float = 0.0,
) -> list[int]:
    """Indices of the candidates that no other one dominates, cheapest first.

    One dominates another when it is no worse in both, and better in at least one, by more than the tolerance; what
    differs by less is a tie. Equals do not dominate each other, so both stay.

    Args:
        cost: smaller is better, ≥ 0.
        accuracy: larger is better.
        cost_tolerance: relative, ≥ 0.
        accuracy_tolerance: absolute, ≥ 0.

    Raises:
        ValueError: different lengths or a negative tolerance.

    Example:
        >>> pareto_front([1, 2, 3, 2], [0.7, 0.9, 0.8, 0.9])
        [0, 1, 3]
    """
    check(len(cost) == len(accuracy), "cost", len(cost), f"must be as long as accuracy ({len(accuracy)})")
    check(cost_tolerance >= 0, "cost_tolerance", cost_tolerance, "must be >= 0")
    check(accuracy_tolerance >= 0, "accuracy_tolerance", accuracy_tolerance, "must be >= 0")
    c, a = np.asarray(cost, dtype=float), np.asarray(accuracy, dtype=float)
    # row: the one that might dominate; column: the one dominated
    cheaper = np.less(c[:, None] * (1 + cost_tolerance), c[None])
    dearer = np.greater(c[:, None], c[None] * (1 + cost_tolerance))
    better = np.greater(a[:, None], a[None] + accuracy_tolerance)
    worse = np.less(a[:, None], a[None] - accuracy_tolerance)
    dominated = np.any(~dearer & ~worse & (cheaper | better), axis=0)
    return [int(i) for i in np.lexsort((-a, c)) if not dominated[i]]


def pareto_fronts(candidates: Sequence[Candidate]) -> dict[str, list[str]]:
    """Fronts of accuracy against parameters, MACs and latency, as names; a candidate without a cost is left out of it.

    Args:
        candidates: entries of a result file ("label" or "op", "status", "accuracy", "params", "macs", "latency").
    """
    fronts = {}
    for axis, tolerance in COST_TOLERANCE.items():
        known = [(c, _cost(c, axis)) for c in candidates if _usable(c)]
        priced = [(c, cost) for c, cost in known if cost is not None]
        costs, accuracies = [cost for _, cost in priced], [c["accuracy"]["mean"] for c, _ in priced]
        fronts[axis] = [_name(priced[i][0]) for i in pareto_front(costs, accuracies, cost_tolerance=tolerance)]
    return fronts


def verdict(
    candidates: Sequence[Candidate],
    baseline: str = "conv",
    *,
    cost: str = "latency",
    margin: float = 0.05,
    against_best: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Which candidate to use, and why, or that the data do not tell.

    The rule: the most accurate of those significantly better than the baseline; if there is none, the cheapest on the
    Pareto front whose accuracy is not distinguishable from the baseline's and at worst ``margin`` below it; if none is
    cheaper than the baseline, the baseline.

    Args:
        candidates: entries of a result file: "label" or "op", "status", "accuracy" {"mean", "low", "high",
            "per_seed"}, "difference" {"mean", "low", "high", "p_adjusted", "significant"} or None, "params", "macs",
            "latency"; costs may be missing.
        baseline: the name of the one that differences refer to.
        cost: what to save when accuracy does not decide: "latency", "macs" or "params". Where the baseline lacks it,
            the next of these is used.
        margin: accuracy that the interval may reach below the baseline for "not distinguishable" to count as good
            enough, in (0, 1); a wider interval is ignorance, not equality.
        against_best: candidate → difference from the most accurate one (``stats.summarise`` with that one as the
            baseline), to say whether the winner beats the others too.

    Returns:
        {"pick": name or None, "text": the answer in a few sentences, "reasons": one sentence per candidate}.

    Raises:
        ValueError: ``cost`` is unknown or ``margin`` out of range.
    """
    check_choice("cost", cost, ("latency", "macs", "params"))
    check(0 < margin < 1, "margin", margin, "must lie between 0 and 1")
    usable = {_name(c): c for c in candidates if _usable(c)}
    failed = [_name(c) for c in candidates if not _usable(c)]
    reasons = [f"{name} did not finish and is not judged." for name in failed]
    if baseline not in usable:
        text = f"No verdict: the baseline {baseline} has no result to compare with."
        return {"pick": None, "text": text, "reasons": reasons}
    base = usable[baseline]
    rivals = {name: c for name, c in usable.items() if name != baseline and c.get("difference")}
    if not rivals:
        text = f"No verdict: nothing finished that could be compared with {baseline}."
        return {"pick": None, "text": text, "reasons": reasons}
    axis = next((a for a in (cost, "latency", "macs", "params") if _cost(base, a) is not None), cost)
    better = {n: c for n, c in rivals.items() if c["difference"]["significant"] and c["difference"]["mean"] > 0}
    worse = {n: c for n, c in rivals.items() if c["difference"]["significant"] and c["difference"]["mean"] < 0}
    reasons = [_reason(n, c, baseline, base, axis, n in better, n in worse) for n, c in rivals.items()] + reasons

    if better:
        pick = max(better, key=lambda n: (better[n]["accuracy"]["mean"], -(_cost(better[n], axis) or 0.0)))
        sentences = _winner(pick, usable, baseline, axis, len(rivals), against_best)
    else:
        front = pareto_fronts(list(usable.values()))[axis]
        pick, sentences = _by_cost(rivals, worse, baseline, base, axis, margin, front)
    seeds = min(len(c["accuracy"].get("per_seed") or [0]) for c in usable.values())
    if seeds < 2:
        sentences.append(
            "Each was trained once: this holds for these trained networks, and another seed may turn it round. "
            "Run at least 3 seeds."
        )
    return {"pick": pick, "text": " ".join(sentences), "reasons": reasons}


# -- sentences ---------------------------------------------------------------------------------------------------------


def _winner(
    pick: str,
    usable: Mapping[str, Candidate],
    baseline: str,
    axis: str,
    tests: int,
    against_best: Mapping[str, Mapping[str, Any]] | None,
) -> list[str]:
    difference = usable[pick]["difference"]
    corrected = f" after correction for {tests} candidates" if tests > 1 else ""
    sentences = [
        f"{pick} is more accurate than {baseline} by {_points(difference)}, {_p(difference['p_adjusted'])}{corrected}."
    ]
    price = _price(usable[pick], usable[baseline], axis)
    if price:
        sentences.append(f"It is {price} than {baseline}." if axis == "latency" else f"It has {price} than {baseline}.")
    others = [n for n, c in usable.items() if n != pick and n != baseline and c.get("difference")]
    if not others:
        return sentences
    if against_best is None:
        sentences.append("Whether it also beats the other candidates was not tested.")
        return sentences
    tied = [n for n in others if n in against_best and not against_best[n].get("significant", False)]
    if not tied:
        sentences.append("It is more accurate than every other candidate as well.")
        return sentences
    sentences.append(
        f"The data do not separate it from {_list(tied)}, so it is a good choice, not the best for certain."
    )
    priced = {n: v for n in tied if (v := _cost(usable[n], axis)) is not None}
    own = _cost(usable[pick], axis)
    if priced and own is not None:
        cheapest = min(priced, key=lambda n: priced[n])
        saving = _price(usable[cheapest], usable[pick], axis)
        if saving and priced[cheapest] < own:
            sentences.append(f"Of these, {cheapest} {'is' if axis == 'latency' else 'has'} {saving} than {pick}.")
    return sentences


def _by_cost(
    rivals: Mapping[str, Candidate],
    worse: Mapping[str, Candidate],
    baseline: str,
    base: Candidate,
    axis: str,
    margin: float,
    front: Sequence[str],
) -> tuple[str, list[str]]:
    open_ones = {n: c for n, c in rivals.items() if n not in worse}
    if not open_ones:
        everyone = "the only candidate" if len(rivals) == 1 else f"every one of the {len(rivals)} candidates"
        return baseline, [f"Stay with {baseline}: it is more accurate than {everyone}."]
    if worse:
        losers = f"{_list(list(worse))} {'is' if len(worse) == 1 else 'are'}"
        sentences = [f"No candidate is more accurate than {baseline} beyond the noise; {losers} less accurate."]
    else:
        sentences = [f"No candidate is distinguishable from {baseline} in accuracy: there is no winner."]
    widest = max(open_ones, key=lambda n: abs(open_ones[n]["difference"]["mean"]))
    sentences.append(
        f"The largest difference that is not settled is {widest}'s, {_points(open_ones[widest]['difference'])}."
    )
    close = {n: c for n, c in open_ones.items() if c["difference"]["low"] >= -margin}
    own = _cost(base, axis)
    saving = {
        n: v
        for n, c in close.items()
        if own is not None and (v := _cost(c, axis)) is not None and v * (1 + COST_TOLERANCE[axis]) < own and n in front
    }
    if saving:
        pick = min(saving, key=lambda n: saving[n])
        lowest = max(-close[pick]["difference"]["low"], 0.0)
        verb = "is" if axis == "latency" else "has"
        sentences.append(
            f"{pick} {verb} {_price(close[pick], base, axis)} than {baseline}, and at worst {_number(lowest)} points "
            "less accurate: take it for the cost."
        )
        return pick, sentences
    if not close:
        sentences.append(
            f"The intervals reach more than {_number(margin)} points below {baseline}, which is too wide to call any "
            f"of them equal: stay with {baseline}, or run more seeds or a larger test set."
        )
    elif own is None:
        sentences.append(f"No cost was measured that could decide: stay with {baseline}.")
    else:
        saved = "is faster" if axis == "latency" else f"has {_LESS[axis]}"
        sentences.append(f"None that is as good within the noise {saved} either: stay with {baseline}.")
    return baseline, sentences


def _reason(
    name: str, candidate: Candidate, baseline: str, base: Candidate, axis: str, better: bool, worse: bool
) -> str:
    difference = candidate["difference"]
    how = "more accurate than" if better else "less accurate than" if worse else "not distinguishable from"
    sentence = f"{name} is {how} {baseline}: {_points(difference)}, {_p(difference['p_adjusted'])} corrected"
    price = _price(candidate, base, axis)
    return f"{sentence}; {price}." if price else f"{sentence}."


def _points(difference: Mapping[str, Any]) -> str:
    mean, low, high = (f"{100 * difference[k]:+.1f}".replace("-", "−") for k in ("mean", "low", "high"))
    return f"{mean} points (95 % interval {low} to {high})"


def _number(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _price(candidate: Candidate, base: Candidate, axis: str) -> str:
    """ "30 % faster at batch 64", "12 % more MACs"; empty when either is unknown or they tie."""
    mine, theirs = _cost(candidate, axis), _cost(base, axis)
    if mine is None or theirs is None or mine <= 0 or theirs <= 0:
        return ""
    if abs(mine - theirs) <= COST_TOLERANCE[axis] * min(mine, theirs):
        return ""
    if axis != "latency":
        change = abs(mine / theirs - 1)
        return f"{100 * change:.0f} % {_LESS[axis] if mine < theirs else _MORE[axis]}"
    batch = (candidate.get("latency") or {}).get("batchN") or {}
    where = f" at batch {batch['batch']}" if batch.get("batch") else " at batch 1"
    if mine < theirs:
        return f"{100 * (theirs / mine - 1):.0f} % faster{where}"
    return f"{100 * (mine / theirs - 1):.0f} % slower{where}"


# -- entries -----------------------------------------------------------------------------------------------------------


def _name(candidate: Candidate) -> str:
    return str(candidate.get("label") or candidate["op"])


def _usable(candidate: Candidate) -> bool:
    accuracy = candidate.get("accuracy") or {}
    return candidate.get("status", "ok") == "ok" and accuracy.get("mean") is not None


def _cost(candidate: Candidate, axis: str) -> float | None:
    """Parameters, MACs, or the median time of the large batch (of batch 1 where that is all there is)."""
    if axis != "latency":
        value = candidate.get(axis)
        return None if value is None else float(value)
    times = candidate.get("latency") or {}
    for key in ("batchN", "batch1"):
        if (times.get(key) or {}).get("median_ms") is not None:
            return float(times[key]["median_ms"])
    return None
