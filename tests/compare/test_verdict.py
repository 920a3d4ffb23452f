"""The verdict names a winner only where the data do."""

from __future__ import annotations

import json

import numpy as np
import pytest

from torchconv.compare.stats import summarise
from torchconv.compare.verdict import pareto_fronts, verdict


def entry(
    op, mean, *, low=None, high=None, p=None, seeds=3, params=1000, macs=10_000, ms=10.0, base=0.9, batch=64, **more
):
    """A candidate of a result file; ``low`` and ``high`` bound its difference from the baseline."""
    difference = None
    if p is not None:
        gap = mean - base
        difference = {"mean": gap, "low": low, "high": high, "p": p, "p_adjusted": p, "significant": p <= 0.05}
    latency = None if ms is None else {"batch1": {"median_ms": 1.0}, "batchN": {"batch": batch, "median_ms": ms}}
    accuracy = {"mean": mean, "low": mean - 0.01, "high": mean + 0.01, "per_seed": [mean] * seeds}
    fixed = {"op": op, "label": op, "status": "ok", "accuracy": accuracy, "difference": difference}
    return {**fixed, "params": params, "macs": macs, "latency": latency, **more}


CONV = entry("conv", 0.9)


def test_a_significant_winner():
    dcls = entry("dcls", 0.93, low=0.01, high=0.05, p=0.004, ms=12.0)
    fast = entry("fast", 0.905, low=-0.01, high=0.02, p=0.6, ms=5.0)
    answer = verdict([CONV, dcls, fast])
    assert answer["pick"] == "dcls"
    assert "dcls is more accurate than conv by +3.0 points (95 % interval +1.0 to +5.0), p = 0.004" in answer["text"]
    assert "after correction for 2 candidates" in answer["text"]
    assert "20 % slower at batch 64" in answer["text"]
    assert "not tested" in answer["text"]
    assert any(r.startswith("fast is not distinguishable from conv") for r in answer["reasons"])


def test_the_winner_is_not_called_best_when_others_are_as_good():
    dcls = entry("dcls", 0.93, low=0.01, high=0.05, p=0.004, ms=12.0)
    twin = entry("twin", 0.928, low=0.01, high=0.05, p=0.005, ms=6.0)
    bad = entry("bad", 0.88, low=-0.04, high=-0.01, p=0.01)
    against = {"twin": {"significant": False}, "bad": {"significant": True}, "conv": {"significant": True}}
    text = verdict([CONV, dcls, twin, bad], against_best=against)["text"]
    assert "do not separate it from twin" in text
    assert "twin is 100 % faster at batch 64 than dcls" in text
    against["twin"]["significant"] = True
    assert "more accurate than every other candidate" in verdict([CONV, dcls, twin, bad], against_best=against)["text"]


def test_no_winner_but_a_cheaper_one():
    fast = entry("fast", 0.895, low=-0.015, high=0.005, p=0.4, ms=8.0)
    slow = entry("slow", 0.907, low=-0.01, high=0.02, p=0.3, ms=30.0)
    answer = verdict([CONV, fast, slow])
    assert answer["pick"] == "fast"
    assert "No candidate is distinguishable from conv in accuracy: there is no winner." in answer["text"]
    assert "fast is 25 % faster at batch 64 than conv, and at worst 1.5 points less accurate" in answer["text"]


def test_no_winner_and_nothing_cheaper():
    same = entry("same", 0.901, low=-0.01, high=0.01, p=0.8, ms=9.8)  # 2 % is a tie
    answer = verdict([CONV, same])
    assert answer["pick"] == "conv"
    assert "there is no winner" in answer["text"]
    assert "stay with conv" in answer["text"]


def test_wide_intervals_are_not_equality():
    fast = entry("fast", 0.9, low=-0.12, high=0.12, p=0.9, ms=1.0)
    answer = verdict([CONV, fast])
    assert answer["pick"] == "conv"
    assert "too wide" in answer["text"]
    assert verdict([CONV, fast], margin=0.2)["pick"] == "fast"


def test_worse_candidates_are_never_picked_for_cost():
    cheap = entry("cheap", 0.85, low=-0.07, high=-0.03, p=0.001, ms=1.0)
    answer = verdict([CONV, cheap])
    assert answer["pick"] == "conv"
    assert "Stay with conv" in answer["text"]
    fast = entry("fast", 0.9, low=-0.01, high=0.01, p=0.9, ms=5.0)
    answer = verdict([CONV, cheap, fast])
    assert answer["pick"] == "fast"
    assert "No candidate is more accurate than conv beyond the noise; cheap is less accurate." in answer["text"]


@pytest.mark.parametrize(("axis", "words"), [("macs", "50 % fewer MACs"), ("params", "50 % fewer parameters")])
def test_other_costs_decide_when_asked_or_when_times_are_missing(axis, words):
    half = {"params": 1000, "macs": 10_000, axis: {"params": 500, "macs": 5000}[axis]}
    lean = entry("lean", 0.9, low=-0.01, high=0.01, p=0.9, ms=50.0, **half)
    answer = verdict([CONV, lean], cost=axis)
    assert answer["pick"] == "lean"
    assert words in answer["text"]
    untimed = [entry("conv", 0.9, ms=None, macs=None if axis == "params" else 10_000), {**lean, "latency": None}]
    assert verdict(untimed)["pick"] == "lean"


def test_one_seed_is_said():
    one = [entry("conv", 0.9, seeds=1), entry("dcls", 0.93, low=0.01, high=0.05, p=0.001, seeds=1)]
    assert "trained once" in verdict(one)["text"]
    assert "trained once" not in verdict([CONV, entry("dcls", 0.93, low=0.01, high=0.05, p=0.001)])["text"]


def test_failures():
    broken = {"op": "broken", "status": "failed", "error": "no", "accuracy": None, "difference": None}
    answer = verdict([CONV, broken])
    assert answer["pick"] is None
    assert "broken did not finish" in answer["reasons"][0]
    assert verdict([broken], "broken")["pick"] is None
    assert verdict([])["pick"] is None
    with pytest.raises(ValueError, match="cost='flops'"):
        verdict([CONV], cost="flops")
    with pytest.raises(ValueError, match="margin"):
        verdict([CONV], margin=2)


def test_fronts():
    entries = [
        CONV,
        entry("dcls", 0.93, ms=12.0, params=1010),
        entry("slow", 0.89, ms=20.0),
        entry("unknown", 0.95, ms=None),
    ]
    fronts = pareto_fronts(entries)
    assert fronts["latency"] == ["conv", "dcls"]
    assert fronts["params"] == ["unknown"]  # equal within 2 %: accuracy decides
    assert list(fronts) == ["params", "macs", "latency"]


def test_from_answers_to_verdict():
    rng = np.random.default_rng(0)
    difficulty = rng.normal(0, 2, 3000)

    def answers(skill):
        logits = skill + difficulty[None] + rng.normal(0, 0.02, (3, 1))
        return rng.random((3, 3000)) < 1 / (1 + np.exp(-logits))

    correct = {"conv": answers(2.0), "equal": answers(2.0), "good": answers(2.7)}
    results = summarise(correct, "conv")
    costs = {"conv": 10.0, "equal": 9.0, "good": 11.0}
    entries = [{"op": n, "status": "ok", "latency": {"batch1": {"median_ms": costs[n]}}, **results[n]} for n in correct]
    against = {n: r["difference"] for n, r in summarise(correct, "good").items() if n != "good"}
    answer = verdict(entries, against_best=against)
    assert answer["pick"] == "good"
    assert "every other candidate" in answer["text"]
    assert "at batch 1" in answer["text"]
    json.dumps(answer, allow_nan=False)
    assert verdict([e for e in entries if e["op"] != "good"])["pick"] == "equal"
