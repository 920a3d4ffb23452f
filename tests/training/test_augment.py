"""Batches, their order and their augmentation, against loops."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.training.common import make_data
from torchconv.data import normalise
from torchconv.training import FitConfig
from torchconv.training.augment import Mix, batch_bounds, flip, mix, plan_epoch, shift
from torchconv.training.batches import Batches
from torchconv.training.inputs import Inputs
from torchconv.training.policy import PolicyLoader, make_policy

CPU = torch.device("cpu")


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 6))
def test_bounds_cover_everything_once(items: int, size: int, least: int) -> None:
    bounds = batch_bounds(items, size, least)
    assert [i for a, b in bounds for i in range(a, b)] == list(range(items))
    assert all(b - a >= min(size, least, items) for a, b in bounds)


@pytest.mark.parametrize("fill", [True, False])
@pytest.mark.parametrize("size", [(7,), (5, 6), (3, 4, 5)])
def test_shift_against_a_loop(size: tuple[int, ...], fill: bool) -> None:
    x = torch.randint(1, 255, (4, 2, *size), dtype=torch.uint8)
    offsets = torch.randint(-2, 3, (4, len(size)))
    got = shift(x, offsets, fill=fill)
    for item in range(4):
        for place in np.ndindex(*size):
            source = [p + int(o) for p, o in zip(place, offsets[item], strict=True)]
            inside = all(0 <= s < n for s, n in zip(source, size, strict=True))
            nearest = tuple(min(max(s, 0), n - 1) for s, n in zip(source, size, strict=True))
            want = x[(item, slice(None), *nearest)] * int(inside or not fill)
            assert torch.equal(got[(item, slice(None), *place)], want)


def test_flip_mirrors_the_chosen() -> None:
    x = torch.rand(3, 2, 4, 5)
    got = flip(x, torch.tensor([True, False, True]))
    assert torch.equal(got[0], x[0].flip(-1))
    assert torch.equal(got[1], x[1])


def test_mixup_and_cutmix_blend_with_the_mirrored_item() -> None:
    x = torch.rand(3, 2, 4, 5)
    torch.testing.assert_close(mix(x, Mix(0.3, None))[0], 0.3 * x[0] + 0.7 * x[2])
    got = mix(x, Mix(0.7, (slice(1, 3), slice(0, 3))))
    assert torch.equal(got[0, :, 1:3, :3], x[2, :, 1:3, :3])
    assert torch.equal(got[0, :, :, 3:], x[0, :, :, 3:])


@pytest.mark.parametrize("size", [(9,), (6, 7), (4, 5, 3)])
def test_plan_is_a_function_of_seed_and_epoch(size: tuple[int, ...]) -> None:
    config = FitConfig(batch_size=8, mixup=0.4, cutmix=1.0, augment="shift", seed=3)
    one, same, other = (plan_epoch(config, 60, size, epoch) for epoch in (1, 1, 2))
    assert torch.equal(one.order, same.order)
    assert one.mixes == same.mixes
    assert not torch.equal(one.order, other.order)
    assert one.order.sort().values.tolist() == list(range(60))
    assert one.shifts is not None
    assert one.shifts.shape == (60, len(size))
    whole = float(np.prod(size))
    for how in one.mixes:
        assert how is not None
        assert 0 <= how.share <= 1
        if how.box is not None:
            inside = torch.zeros(size)
            inside[how.box] = 1
            assert how.share == pytest.approx(1 - inside.sum().item() / whole)
    assert {how.box is None for plan in (one, other) for how in plan.mixes if how} == {True, False}


def test_plain_batches_are_the_normalised_items_in_order() -> None:
    data = make_data()
    config = FitConfig(batch_size=8)
    batches = list(Batches(data, config, Inputs(data, CPU)).epoch(0))
    order = plan_epoch(config, 41, (6, 6), 0).order
    assert [len(b.y) for b in batches] == [8, 8, 8, 8, 9]  # 41 = 5 · 8 + 1
    assert torch.equal(torch.cat([b.x for b in batches]), normalise(data.train.x, data.mean, data.std)[order])
    assert torch.equal(torch.cat([b.y for b in batches]), data.train.y[order])


def test_processes_share_each_batch() -> None:
    data, config = make_data(), FitConfig(batch_size=8, augment="flip", seed=1)
    whole = list(Batches(data, config, Inputs(data, CPU)).epoch(2))
    parts = [list(Batches(data, config, Inputs(data, CPU), rank, 2).epoch(2)) for rank in range(2)]
    for batch, first, second in zip(whole, *parts, strict=True):
        assert torch.equal(batch.x, torch.cat([first.x, second.x]))
        assert first.total == second.total == len(batch.y)


@pytest.mark.parametrize("spec", ["rand-m9-mstd0.5-inc1", "rand-m10-inc1-n4", "augmix-m3-w2", "original", "v0", "3a"])
@pytest.mark.parametrize("channels", [1, 3])
def test_policies_are_seeded_by_item_and_leave_the_caller_alone(spec: str, channels: int) -> None:
    data = make_data(channels=channels, size=(12, 10))
    loader = PolicyLoader(data.train.x, spec, data.mean, seed=5)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    first = torch.cat(list(loader.epoch(0, [[0, 1, 2], [3, 4, 5]])))
    again = torch.cat(list(loader.epoch(0, [[5, 4], [3, 2, 1, 0]])))
    assert first.shape == (6, channels, 12, 10)
    assert first.dtype == torch.uint8
    assert torch.equal(first, again.flip(0))
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])


def test_policy_on_floats_and_its_refusals() -> None:
    x = torch.rand(4, 3, 8, 8)
    out = next(PolicyLoader(x, "rand-m9", [0.5] * 3, 0).epoch(0, [[0, 1]]))
    assert out.dtype == torch.float32
    assert out.min() >= 0
    assert out.max() <= 1
    with pytest.raises(ValueError, match=r"augment='rand-m9': needs uint8 or 0 to 1"):
        PolicyLoader(x * 3, "rand-m9", [0.5] * 3, 0)
    with pytest.raises(ValueError, match=r"augment='rand-zz9': timm does not understand"):
        make_policy("rand-zz9", [0.5] * 3, 32)
