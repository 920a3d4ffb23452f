"""Parameter groups, schedule, averaging and the hooks of modules."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import torchconv
from torchconv.training import FitConfig, learning_rate, param_groups
from torchconv.training.ema import Ema
from torchconv.training.optim import Hooks, make_optimizer


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 3))
        self.P = nn.Parameter(torch.zeros(2, 3))
        self.steps = 0

    def param_options(self) -> dict[str, dict[str, float]]:
        return {"P": {"lr_mult": 5.0, "weight_decay": 0.0}}

    def after_step(self) -> None:
        self.P.clamp_(-1, 1)
        self.steps += 1

    @classmethod
    def auxiliary_loss(cls, modules: list[Positions], epoch: int) -> Tensor | None:
        return None if epoch < 1 else sum((m.P.sum() for m in modules), torch.zeros(()))


def found(groups: list[dict], parameter: nn.Parameter) -> list[tuple[float, float, float]]:
    return [(g["lr"], g["lr_mult"], g["weight_decay"]) for g in groups if any(p is parameter for p in g["params"])]


def test_groups_follow_what_modules_declare() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), Positions())
    groups = param_groups(net, 0.1, 0.05)
    assert torchconv.param_groups is param_groups
    assert found(groups, net[0].weight) == [(0.1, 1.0, 0.05)]
    assert found(groups, net[0].bias) == [(0.1, 1.0, 0.0)]
    assert found(groups, net[1].weight) == [(0.1, 1.0, 0.0)]
    assert found(groups, net[2].P) == [(0.5, 5.0, 0.0)]
    assert found(groups, net[2].weight) == [(0.1, 1.0, 0.05)]
    torch.optim.AdamW(groups)


def test_shared_parameters_appear_once_and_frozen_ones_never() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    net[2].requires_grad_(False)
    groups = param_groups(net, 0.1, 0.05)
    assert found(groups, net[0].weight) == [(0.1, 1.0, 0.05)]
    assert sum(len(g["params"]) for g in groups) == 3


def test_a_bias_of_any_shape_and_timm_names_are_not_decayed() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(1, 3, 1, 1))
            self.pos_embed = nn.Parameter(torch.zeros(1, 4, 3))

        def no_weight_decay(self) -> set[str]:
            return {"pos_embed", "cls_token"}

    net = Odd()
    assert [g["weight_decay"] for g in param_groups(net, 0.1, 0.05)] == [0.0]


@pytest.mark.parametrize(
    ("options", "told"), [({"Q": {}}, "no such parameter"), ({"P": {"momentum": 1}}, "lr_mult and weight_decay")]
)
def test_a_wrong_declaration_is_an_error(options: dict, told: str) -> None:
    module = Positions()
    module.param_options = lambda: options  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=told):
        param_groups(nn.Sequential(module), 0.1, 0.05)


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ValueError, match="no trainable parameters"):
        make_optimizer(nn.Flatten(), FitConfig())


def test_hooks_call_every_module_once() -> None:
    one = Positions()
    net = nn.Sequential(one, nn.Sequential(one, Positions()))
    hooks = Hooks(net)
    with torch.no_grad():
        net[1][1].P.fill_(3)
        hooks.after_step()
    assert one.steps == 1
    assert net[1][1].P.max() == 1
    assert hooks.auxiliary_loss(torch.tensor(2.0), 0) == 2
    assert hooks.auxiliary_loss(torch.tensor(2.0), 1) == 2 + 6


@given(st.integers(1, 6), st.integers(1, 7), st.floats(0, 8), st.floats(1e-4, 1.0), st.floats(0, 1))
def test_schedule_is_bounded_rises_then_falls(epochs: int, steps: int, warmup: float, lr: float, floor: float) -> None:
    config = FitConfig(epochs=epochs, warmup_epochs=warmup, lr=lr, min_lr=lr * floor)
    rates = [learning_rate(t, steps, config) for t in range(epochs * steps)]
    warm = min(round(warmup * steps), len(rates))
    assert all(0 < r <= lr * (1 + 1e-12) for r in rates)
    assert rates[:warm] == sorted(rates[:warm])
    assert rates[warm:] == sorted(rates[warm:], reverse=True)
    assert len(rates) == warm or math.isclose(rates[warm], lr)


def test_ema_starts_fast_and_then_keeps_its_decay() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    net.register_buffer("mask", torch.full((2,), -math.inf))
    before = copy.deepcopy(net)
    ema = Ema(net, 0.5)
    expected = before[0].weight.detach().clone()
    for step in range(20):
        with torch.no_grad():
            net[0].weight.add_(1)
            net[1].running_mean.add_(1)
            net[1].num_batches_tracked.add_(1)
        ema.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * net[0].weight.detach()
    torch.testing.assert_close(ema.model[0].weight, expected)
    assert 18 < ema.model[1].running_mean[0] < 20
    assert ema.model[1].num_batches_tracked == 20
    assert torch.equal(ema.model.mask, net.mask)
    assert not ema.model[0].weight.requires_grad
