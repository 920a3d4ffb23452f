"""Stratified, disjoint splits that depend on nothing but the labels and the seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from torchconv._common import check

Indices = NDArray[np.int64]
Chosen = dict[str, tuple[str, Indices]]
"""split -> (publisher's part it comes from, indices into that part)"""

TEST_MINIMUM = 500
"""A limited test split keeps at least this many examples, because its size sets the width of every interval."""

_TEST, _VAL, _LIMIT = 1, 2, 3  # one random stream for each purpose


def allocate(sizes: Indices, total: int, low: Indices, high: Indices) -> Indices:
    """Share ``total`` over classes in proportion to ``sizes``, each within [low, high] (largest remainder)."""
    quota = sizes * (total / max(1, int(sizes.sum())))
    counts = np.clip(np.floor(quota).astype(np.int64), low, high)
    while (missing := total - int(counts.sum())) != 0:
        step = 1 if missing > 0 else -1
        free = counts < high if step > 0 else counts > low
        if not free.any():
            break
        gap = np.where(free, step * (quota - counts), -np.inf)
        counts[int(gap.argmax())] += step
    return counts


def take(y: Indices, counts: Indices, seed: int, stream: int) -> Indices:
    """Sorted indices of ``counts[c]`` random members of each class; a larger count keeps the smaller one's members."""
    picked = []
    for label, count in enumerate(counts):
        members = np.flatnonzero(y == label)
        # RandomState, because its stream is frozen: the same split with every version of numpy.
        order = np.random.RandomState([seed, stream, label]).permutation(len(members))
        picked.append(members[order[:count]])
    return np.sort(np.concatenate(picked)).astype(np.int64)


def _split_off(y: Indices, classes: Sequence[str], fraction: float, spare: int, seed: int, stream: int) -> Indices:
    sizes = np.bincount(y, minlength=len(classes))
    total = max(len(classes), round(fraction * len(y)))
    return take(y, allocate(sizes, total, np.ones_like(sizes), sizes - spare), seed, stream)


def plan(
    labels: dict[str, Indices],
    classes: Sequence[str],
    *,
    limit: int | None,
    val_fraction: float,
    test_fraction: float,
    seed: int,
) -> Chosen:
    """Decide which example goes where.

    A missing "test" takes ``test_fraction`` of the training part, a missing "val" takes ``val_fraction`` of what is
    left of it; every class gives at least one example to each. ``limit`` then keeps that many training examples, the
    same share of the validation examples, and the same share but at least 500 (or all) of the test examples.

    Args:
        labels: part ("train", optionally "val" and "test") -> class indices.
        classes: class names.
        limit: number of training examples to keep, at least one a class; None keeps all.
        val_fraction, test_fraction: between 0 and 1.
        seed: 0 to 2**32 - 1.

    Raises:
        ValueError: a class has too few examples for the splits, or the limit is below the number of classes.
    """
    y = labels["train"]
    sizes = np.bincount(y, minlength=len(classes))
    absent = [part for part in ("test", "val") if part not in labels]
    need = 1 + len(absent)
    for name, count in zip(classes, sizes.tolist(), strict=True):
        if count < need:
            what = f"for {', '.join(('training', *absent))}" if absent else "for training"
            raise ValueError(
                f"class {name!r} has {count} training example(s), but {need} are needed {what}: "
                "add examples or leave the class out"
            )
    chosen: Chosen = {part: (part, np.arange(len(labels[part]))) for part in ("val", "test") if part in labels}
    rest = np.arange(len(y))
    for part, fraction, stream in (("test", test_fraction, _TEST), ("val", val_fraction, _VAL)):
        if part in absent:
            spare = 2 if part == "test" and "val" in absent else 1
            picked = _split_off(y[rest], classes, fraction, spare, seed, stream)
            chosen[part] = ("train", rest[picked])
            rest = np.delete(rest, picked)
    chosen["train"] = ("train", rest)
    if limit is not None and limit < len(rest):
        check(limit >= len(classes), "limit", limit, f"needs at least one example for each of {len(classes)} classes")
        share = limit / len(rest)
        floor = {"train": 0, "val": 0, "test": TEST_MINIMUM}
        for part, (origin, indices) in chosen.items():
            here = labels[origin][indices]
            sizes = np.bincount(here, minlength=len(classes))
            low = np.minimum(sizes, 1)
            total = limit if part == "train" else max(round(share * len(here)), floor[part], int(low.sum()))
            kept = take(here, allocate(sizes, min(total, len(here)), low, sizes), seed, _LIMIT)
            chosen[part] = (origin, indices[kept])
    return {part: chosen[part] for part in ("train", "val", "test")}
