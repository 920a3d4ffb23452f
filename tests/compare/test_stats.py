"""Intervals, tests and fronts: coverage by simulation, exact values by hand, behaviour at the edges."""

from __future__ import annotations

import itertools
import json
import math
import time

import numpy as np
import pytest
from scipy import stats as sps

from torchconv.compare.stats import accuracy_interval, holm, paired_difference, pareto_front, summarise


def draw(rng, seeds, items, mu, difficulty, effect, share=None):
    """0/1 answers: item difficulty and seed effect on the logit scale. ``share``: difficulty common to two designs."""
    common = rng.normal(0, difficulty, items) if share is None else share
    logits = mu + common[None] + rng.normal(0, effect, (seeds, 1))
    return rng.random((seeds, items)) < 1 / (1 + np.exp(-logits))


def expected_accuracy(mu, difficulty, effect):
    nodes, weights = np.polynomial.hermite_e.hermegauss(101)
    value = 1 / (1 + np.exp(-(mu + math.hypot(difficulty, effect) * nodes)))
    return float((weights * value).sum() / weights.sum())


@pytest.mark.parametrize(
    ("seeds", "items", "mu", "difficulty", "effect"),
    [
        (3, 300, 4.0, 1.0, 0.0),
        (3, 300, 3.0, 2.0, 0.2),
        (3, 1000, 2.0, 1.0, 0.1),
        (5, 500, 1.0, 2.0, 0.3),
        (1, 300, 2.0, 1.0, 0),
    ],
)
def test_accuracy_interval_covers(seeds, items, mu, difficulty, effect):
    rng = np.random.default_rng(0)
    truth = expected_accuracy(mu, difficulty, effect)
    hits = 0
    for _ in range(400):
        interval = accuracy_interval(draw(rng, seeds, items, mu, difficulty, effect))
        hits += interval["low"] <= truth <= interval["high"]
    assert hits / 400 >= 0.92  # 95 % less what 400 draws leave open


@pytest.mark.parametrize(
    ("seeds", "items", "effect"), [(3, 300, 0.0), (3, 300, 0.3), (3, 1500, 0.15), (2, 500, 0.2), (1, 300, 0.0)]
)
def test_paired_difference_holds_its_level_when_nothing_differs(seeds, items, effect):
    rng = np.random.default_rng(1)
    covered = rejected = 0
    for _ in range(300):
        difficulty = rng.normal(0, 1.5, items)
        a, b = (draw(rng, seeds, items, 2.0, 0, effect, share=difficulty + rng.normal(0, 0.5, items)) for _ in range(2))
        result = paired_difference(a, b)
        covered += result["low"] <= 0 <= result["high"]
        rejected += result["p"] <= 0.05
    assert covered / 300 >= 0.92
    assert rejected / 300 <= 0.08


def test_three_seeds_find_a_real_difference():
    rng = np.random.default_rng(2)
    difficulty = rng.normal(0, 1.5, 2000)
    better, worse = draw(rng, 3, 2000, 2.5, 0, 0.03, difficulty), draw(rng, 3, 2000, 2.0, 0, 0.03, difficulty)
    result = paired_difference(better, worse)
    assert result["low"] > 0
    assert result["p"] < 0.01
    back = paired_difference(worse, better)
    assert back["mean"] == -result["mean"]
    assert back["p"] == pytest.approx(result["p"])
    assert (back["low"], back["high"]) == (pytest.approx(-result["high"]), pytest.approx(-result["low"]))


def test_a_difference_that_only_two_seeds_of_three_show_is_not_certain():
    # On items alone this is 6 standard errors; the third seed says the opposite.
    items = 2000
    base = np.zeros((3, items))
    base[:, :1000] = 1
    other = base.copy()
    other[0, 1000:1080] = other[1, 1000:1080] = 1
    other[2, :60] = 0
    assert accuracy_interval(other)["basis"] == "items and seeds"
    result = paired_difference(other, base)
    assert result["p"] > 0.05
    assert result["low"] < 0 < result["high"]
    assert paired_difference(other[:1], base[:1])["p"] < 1e-6


def test_p_is_the_level_at_which_the_interval_reaches_zero():
    rng = np.random.default_rng(3)
    difficulty = rng.normal(0, 1.0, 1500)
    a, b = draw(rng, 3, 1500, 1.3, 0, 0.05, difficulty), draw(rng, 3, 1500, 1.0, 0, 0.05, difficulty)
    p = paired_difference(a, b)["p"]
    edge = paired_difference(a, b, confidence=1 - p)
    assert min(abs(edge["low"]), abs(edge["high"])) < 1e-6


def test_one_seed_is_mcnemar_and_says_so():
    a, b = np.ones(200), np.ones(200)
    a[:9], b[9:11] = 0, 0  # 9 lost, 2 won
    result = paired_difference(a, b)
    assert result["p"] == pytest.approx(float(sps.binomtest(2, 11).pvalue))
    assert result["mean"] == pytest.approx(-7 / 200)
    assert result["n_items"] == 200
    assert "items only" in result["basis"]
    assert "items only" in accuracy_interval(a)["basis"]


def test_few_disagreements_use_the_exact_sign_flip():
    a, b = np.ones((3, 100)), np.ones((3, 100))
    b[:, 0] = b[:, 1] = b[0, 2] = b[:2, 3] = 0
    values = np.array([1, 1, 1 / 3, 2 / 3])
    flipped = [abs(np.dot(s, values)) for s in itertools.product([-1, 1], repeat=4)]
    exact = np.mean([v >= values.sum() - 1e-9 for v in flipped])
    assert exact == 1 / 8
    assert paired_difference(a, b)["p"] >= exact


def test_random_sign_flips_are_seeded_and_near_exact():
    rng = np.random.default_rng(4)
    a, b = np.ones((2, 400)), np.ones((2, 400))
    a[:, :10], b[:, 10:36] = rng.random((2, 10)) < 0.3, rng.random((2, 26)) < 0.3
    first = paired_difference(a, b, seed=5)
    assert first == paired_difference(a, b, seed=5)
    assert 0 < first["p"] < 0.2


def test_degenerate_matrices_give_no_false_certainty():
    ones = np.ones((3, 50))
    same = paired_difference(ones, ones)
    assert (same["mean"], same["p"]) == (0.0, 1.0)
    assert same["low"] < 0 < same["high"]
    perfect = accuracy_interval(ones)
    assert perfect["mean"] == perfect["high"] == 1.0
    assert perfect["low"] < 0.98
    hopeless = accuracy_interval(np.zeros((3, 50)))
    assert (hopeless["mean"], hopeless["low"]) == (0.0, 0.0)
    assert hopeless["high"] > 0.02
    single = accuracy_interval([[1]])
    assert 0 < single["low"] < 1
    total = paired_difference(np.ones((3, 4)), np.zeros((3, 4)))
    assert total["p"] >= 1 / 8  # four items cannot do better
    assert -1 <= total["low"] <= total["mean"] == total["high"] == 1


def test_unequal_numbers_of_seeds():
    rng = np.random.default_rng(6)
    a, b = draw(rng, 3, 500, 2, 1, 0.2), draw(rng, 1, 500, 2, 1, 0.2)
    one_sided, reverse = paired_difference(a, b), paired_difference(b, a)
    assert one_sided["basis"] == "items and seeds"
    assert reverse["high"] == pytest.approx(-one_sided["low"])
    narrow = paired_difference(a, draw(rng, 3, 500, 2, 1, 0.2))
    assert narrow["high"] - narrow["low"] < one_sided["high"] - one_sided["low"]


def test_confidence_widens():
    matrix = draw(np.random.default_rng(7), 3, 400, 2, 1, 0.1)
    widths = [(r := accuracy_interval(matrix, confidence=c))["high"] - r["low"] for c in (0.8, 0.95, 0.99)]
    assert widths == sorted(widths)


def test_holm():
    assert holm([]) == []
    assert holm([0.01, 0.02, 0.03]) == pytest.approx([0.03, 0.04, 0.04])
    assert holm([0.5, 0.01, 0.9, 0.02]) == pytest.approx([1.0, 0.04, 1.0, 0.06])
    rng = np.random.default_rng(8)
    p = rng.random(20) ** 3
    adjusted = np.array(holm(p))
    # Step-down by its definition: reject in order until one fails.
    for alpha in (0.01, 0.05, 0.2):
        rejected = set()
        for k, i in enumerate(np.argsort(p)):
            if p[i] * (20 - k) > alpha:
                break
            rejected.add(int(i))
        assert rejected == {int(i) for i in np.flatnonzero(adjusted <= alpha)}


def test_summarise_is_json_quick_and_deterministic():
    rng = np.random.default_rng(9)
    difficulty = rng.normal(0, 2, 10_000)
    names = ["conv", "a", "b", "c", "d", "e", "good"]
    correct = {n: draw(rng, 3, 10_000, 2.6 if n == "good" else 2.0, 0, 0.02, difficulty) for n in names}
    start = time.perf_counter()
    result = summarise(correct, "conv")
    assert time.perf_counter() - start < 5  # takes a tenth of a second; minutes would be another algorithm
    assert json.loads(json.dumps(result, allow_nan=False)) == summarise(correct, "conv")
    assert list(result) == names
    assert result["conv"]["difference"] is None
    assert result["good"]["difference"]["significant"]
    assert not any(result[n]["difference"]["significant"] for n in "abcde")
    differences = [r["difference"] for r in result.values() if r["difference"]]
    assert [d["p_adjusted"] for d in differences] == pytest.approx(holm([d["p"] for d in differences]))
    assert result["a"]["accuracy"]["per_seed"] == pytest.approx(list(correct["a"].mean(1)))


def test_bad_arguments():
    with pytest.raises(ValueError, match="correct"):
        accuracy_interval([[0.5, 1]])
    with pytest.raises(ValueError, match="correct"):
        accuracy_interval(np.zeros((0, 4)))
    with pytest.raises(ValueError, match="correct"):
        accuracy_interval([[float("nan"), 1]])
    with pytest.raises(ValueError, match="confidence=95"):
        accuracy_interval([[1, 0]], confidence=95)
    with pytest.raises(ValueError, match="candidate"):
        paired_difference(np.ones((3, 4)), np.ones((3, 5)))
    with pytest.raises(ValueError, match="baseline='conv'"):
        summarise({"a": [[1, 0]]}, "conv")
    with pytest.raises(ValueError, match="p_values"):
        holm([0.5, 1.2])


def test_pareto_front_by_definition():
    rng = np.random.default_rng(10)
    for _ in range(30):
        cost, accuracy = rng.integers(1, 6, 8).astype(float), rng.integers(0, 5, 8) / 5
        kept = [
            i
            for i in range(8)
            if not any(
                cost[j] <= cost[i] and accuracy[j] >= accuracy[i] and (cost[j] < cost[i] or accuracy[j] > accuracy[i])
                for j in range(8)
            )
        ]
        assert sorted(pareto_front(cost, accuracy)) == kept


def test_pareto_ties():
    assert pareto_front([1, 1], [0.5, 0.5]) == [0, 1]
    assert pareto_front([100, 101], [0.9, 0.9], cost_tolerance=0.02) == [0, 1]  # 1 % dearer is a tie
    assert pareto_front([100, 103], [0.9, 0.9], cost_tolerance=0.02) == [0]
    assert pareto_front([101, 100], [0.95, 0.9], cost_tolerance=0.02) == [0]  # cost ties, accuracy decides
    assert pareto_front([2, 1], [0.901, 0.9], accuracy_tolerance=0.01) == [1]
    assert pareto_front([], []) == []
    rng = np.random.default_rng(11)
    for _ in range(200):  # tolerances make no cycles: something always stays
        assert pareto_front(rng.random(6) + 1, rng.random(6), cost_tolerance=0.3, accuracy_tolerance=0.3)
    with pytest.raises(ValueError, match="cost"):
        pareto_front([1], [0.1, 0.2])
