"""Splits: disjoint, complete, stratified, nested under a limit, and the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchconv.data.splits import TEST_MINIMUM, allocate, plan

OPTIONS = {"limit": None, "val_fraction": 0.15, "test_fraction": 0.2, "seed": 0}


def labels(*counts: int) -> np.ndarray:
    y = np.repeat(np.arange(len(counts)), counts)
    return np.random.default_rng(0).permutation(y)


def names(*counts: int) -> list[str]:
    return [f"c{i}" for i in range(len(counts))]


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(3, 60), min_size=2, max_size=6),
    val=st.floats(0.01, 0.9),
    test=st.floats(0.01, 0.9),
    seed=st.integers(0, 2**32 - 1),
)
def test_plan_is_a_partition_with_every_class_everywhere(counts: list[int], val: float, test: float, seed: int) -> None:
    y = labels(*counts)
    options = {"limit": None, "val_fraction": val, "test_fraction": test, "seed": seed}
    chosen = plan({"train": y}, names(*counts), **options)
    together = np.concatenate([indices for _, indices in chosen.values()])
    assert sorted(together.tolist()) == list(range(len(y)))
    for origin, indices in chosen.values():
        assert origin == "train"
        assert set(y[indices].tolist()) == set(range(len(counts)))
    again = plan({"train": y}, names(*counts), **options)
    assert all(np.array_equal(again[part][1], chosen[part][1]) for part in chosen)


def test_shares_follow_the_fractions_in_every_class() -> None:
    y = labels(100, 300, 600)
    chosen = plan({"train": y}, names(1, 1, 1), **OPTIONS)
    assert np.bincount(y[chosen["test"][1]]).tolist() == [20, 60, 120]
    assert np.bincount(y[chosen["val"][1]]).tolist() == [12, 36, 72]
    assert np.bincount(y[chosen["train"][1]]).tolist() == [68, 204, 408]


def test_another_seed_gives_another_split() -> None:
    y = labels(50, 50)
    first, second = (plan({"train": y}, names(1, 1), **{**OPTIONS, "seed": seed}) for seed in (0, 1))
    assert not np.array_equal(first["test"][1], second["test"][1])


def test_the_split_of_seed_0_is_frozen() -> None:
    chosen = plan({"train": np.arange(20) % 2}, ["a", "b"], **OPTIONS)
    assert chosen["test"][1].tolist() == [0, 3, 15, 18]
    assert chosen["val"][1].tolist() == [6, 13]


def test_publishers_parts_are_kept() -> None:
    parts = {"train": labels(20, 20), "val": labels(5, 5), "test": labels(7, 7)}
    chosen = plan(parts, names(1, 1), **OPTIONS)
    assert {part: (origin, len(i)) for part, (origin, i) in chosen.items()} == {
        "train": ("train", 40),
        "val": ("val", 10),
        "test": ("test", 14),
    }


def test_limit_is_exact_nested_and_keeps_500_test_examples() -> None:
    parts = {"train": labels(2000, 4000), "test": labels(1000, 2000)}
    small, large = (plan(parts, names(1, 1), **{**OPTIONS, "limit": limit}) for limit in (300, 600))
    y = parts["train"][small["train"][1]]
    assert np.bincount(y).tolist() == [100, 200]
    assert len(large["train"][1]) == 600
    assert set(small["train"][1].tolist()) <= set(large["train"][1].tolist())
    assert len(small["val"][1]) == round(900 * 300 / 5100)
    assert len(small["test"][1]) == TEST_MINIMUM
    assert len(plan(parts, names(1, 1), **{**OPTIONS, "limit": 2550})["test"][1]) == 1500


def test_limit_beyond_the_data_keeps_all_of_it() -> None:
    parts = {"train": labels(20, 20)}
    whole, limited = (plan(parts, names(1, 1), **{**OPTIONS, "limit": limit}) for limit in (None, 10_000))
    assert all(np.array_equal(whole[part][1], limited[part][1]) for part in whole)


def test_limit_below_the_number_of_classes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"limit=2: needs at least one example for each of 3 classes"):
        plan({"train": labels(20, 20, 20)}, names(1, 1, 1), **{**OPTIONS, "limit": 2})


@pytest.mark.parametrize(
    ("parts", "need"),
    [({"train": labels(20, 2)}, 3), ({"train": labels(20, 1), "test": labels(3, 3)}, 2)],
)
def test_a_class_too_small_to_split_is_named(parts: dict[str, np.ndarray], need: int) -> None:
    with pytest.raises(ValueError, match=rf"class 'c1' has {need - 1} training example.*but {need} are needed"):
        plan(parts, names(1, 1), **OPTIONS)


def test_allocate_stays_between_its_bounds() -> None:
    sizes = np.array([1000, 10, 1])
    low, high = np.ones(3, dtype=np.int64), np.array([5, 9, 1])
    assert allocate(sizes, 12, low, high).tolist() == [5, 6, 1]
    assert allocate(sizes, 10_000, low, high).tolist() == [5, 9, 1]
    assert allocate(sizes, 3, low, high).tolist() == [1, 1, 1]
