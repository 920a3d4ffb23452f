"""``fit`` against a loop written by hand, and everything it promises besides."""

from __future__ import annotations

import copy
import math
import random

import accelerate
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.training.common import Net, make_data, make_net, numbers, same_state
from torchconv.data import normalise
from torchconv.training import (
    EpochRecord,
    FitConfig,
    NonFiniteLossError,
    evaluate,
    fit,
    learning_rate,
    param_groups,
    predict,
)
from torchconv.training.augment import plan_epoch
from torchconv.training.kar import Kar

BASE = FitConfig(epochs=3, batch_size=8, lr=0.02, device="cpu")


def config(**changes: object) -> FitConfig:
    return FitConfig(**{**BASE.__dict__, **changes})


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "kar"])
def test_weights_are_those_of_a_loop_written_by_hand(optimizer: str) -> None:
    data, settings = make_data(), config(optimizer=optimizer, label_smoothing=0.1, clip_grad=0.5)
    net, x = make_net(dropout=0.0), normalise(data.train.x, data.mean, data.std)
    lay = {"memory_format": torch.channels_last}  # what fit chooses on a CPU
    groups = param_groups(net, settings.lr, settings.weight_decay)
    step, best = 0, (-1.0, 0.0, {})
    if optimizer == "adamw":
        optim: torch.optim.Optimizer = torch.optim.AdamW(groups, fused=True)
    elif optimizer == "kar":
        optim = Kar(groups)
    else:
        optim = torch.optim.SGD(groups, lr=1.0, momentum=0.9, nesterov=True, fused=True)
    for epoch in range(settings.epochs):
        plan = plan_epoch(settings, len(x), (6, 6), epoch)
        net.train()
        for a, b in plan.bounds:
            for group in optim.param_groups:
                group["lr"] = learning_rate(step, len(plan.bounds), settings)
            optim.zero_grad()
            chosen = plan.order[a:b]
            F.cross_entropy(net(x[chosen].clone(**lay)), data.train.y[chosen], label_smoothing=0.1).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            optim.step()
            step += 1
        scored = evaluate(net, data.val, data)
        if (scored.accuracy, -scored.loss) > best[:2]:
            best = (scored.accuracy, -scored.loss, copy.deepcopy(net.state_dict()))
    net.load_state_dict(best[2])
    result = fit(make_net(dropout=0.0), data, settings)
    assert same_state(result.model, net)
    assert not result.model.training
    assert result.epochs_run == 3
    assert max(r.val_accuracy for r in result.history) == best[0]


def test_it_learns_and_says_what_it_did() -> None:
    data, seen = make_data(train=120), []
    result = fit(make_net(), data, config(epochs=8, augment="shift", mixup=0.2, ema=0.9), on_epoch=seen.append)
    assert seen == result.history
    assert [r.epoch for r in seen] == list(range(1, 9))
    assert result.history[-1].train_loss < result.history[0].train_loss
    assert evaluate(result.model, data.test, data).accuracy > 0.8
    assert result.seconds == pytest.approx(sum(r.seconds for r in seen))
    assert all(r.seconds > 0 and r.images_per_second > 0 for r in seen)
    assert seen[-1].lr == learning_rate(8 * 15 - 1, 15, config(epochs=8))


def test_accumulated_batches_equal_one_large_batch() -> None:
    data = make_data(train=44)  # 44 = 5 · 8 + 4: the last group is smaller
    small = fit(make_net(norm=False, dropout=0.0), data, config(grad_accum=4))
    large = fit(make_net(norm=False, dropout=0.0), data, config(batch_size=32))
    for name, value in large.model.state_dict().items():
        torch.testing.assert_close(small.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    assert [r.train_loss for r in small.history] == pytest.approx([r.train_loss for r in large.history], rel=1e-4)


def test_averaged_weights_are_the_ones_evaluated_and_returned() -> None:
    data = make_data()
    result = fit(make_net(), data, config(ema=0.95))
    best = result.history[result.best_epoch - 1]
    scored = evaluate(result.model, data.val, data)
    assert (scored.loss, scored.accuracy) == pytest.approx((best.val_loss, best.val_accuracy))
    assert numbers(result.history) != numbers(fit(make_net(), data, BASE).history)


def test_early_stop_keeps_the_best_epoch() -> None:
    data = make_data()
    result = fit(make_net(), data, config(epochs=30, lr=0.05, early_stop=2))
    accuracies = [r.val_accuracy for r in result.history]
    assert result.stopped_early
    assert result.epochs_run == len(accuracies) < 30
    assert accuracies.index(max(accuracies)) == len(accuracies) - 3
    assert evaluate(result.model, data.val, data).accuracy == max(accuracies)


@pytest.mark.parametrize("shape", [(12,), (4, 4, 4)])
def test_series_and_volumes(shape: tuple[int, ...]) -> None:
    data = make_data(size=shape)
    net = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 3))
    fit(net, data, config(augment="shift", mixup=0.3, cutmix=0.5))
    for augment in ("flip", "rand-m9"):
        with pytest.raises(ValueError, match=f"augment='{augment}': is for images, and stripes is of kind"):
            fit(net, data, config(augment=augment))


def test_bf16_runs_and_fp16_on_a_cpu_is_refused() -> None:
    data = make_data()
    result = fit(make_net(), data, config(amp="bf16"))
    assert result.model.conv.weight.dtype == torch.float32
    with pytest.raises(ValueError, match="amp='fp16': needs a GPU; on a CPU use amp='bf16'"):
        fit(make_net(), data, config(amp="fp16"))
    fit(result.model, data, config(amp="no", epochs=1))  # accelerate alone would refuse to change its mind


def test_a_policy_of_timm() -> None:
    data = make_data(channels=3, size=(8, 8))
    once, twice = (fit(make_net(channels=3), data, config(epochs=2, augment="rand-m5-mstd0.5")) for _ in range(2))
    assert numbers(once.history) == numbers(twice.history)


def test_the_caller_keeps_random_state_and_accelerator() -> None:
    mine = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    fit(make_net(), make_data(), config(epochs=1))
    torch.set_rng_state(before[2])
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()
    fit(Net(), make_data(), config(epochs=1, seed=1))
    assert mine.mixed_precision == "bf16"
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_the_seed_decides_and_the_global_state_does_not() -> None:
    data = make_data()
    runs = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        net = make_net()
        torch.manual_seed(noise)
        runs.append(numbers(fit(net, data, config(seed=seed)).history))
    assert runs[0] == runs[1] != runs[2]


def test_a_callback_that_draws_changes_nothing() -> None:
    def draw(record: EpochRecord) -> None:
        torch.rand(3)
        np.random.rand()

    data = make_data()
    assert same_state(fit(make_net(), data, BASE, on_epoch=draw).model, fit(make_net(), data, BASE).model)


class Declaring(Net):
    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        self.scale = nn.Parameter(torch.full((1, 4, 1, 1), 0.5))
        self.calls: list[int] = []
        self.epochs: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.scale.mean())

    def param_options(self) -> dict[str, dict[str, float]]:
        return {"scale": {"lr_mult": 0.0, "weight_decay": 0.0}}

    def after_step(self) -> None:
        self.calls.append(1)
        self.head.bias.zero_()

    @classmethod
    def auxiliary_loss(cls, modules: list[Declaring], epoch: int) -> Tensor | None:
        modules[0].epochs.append(epoch)
        return 100 * modules[0].conv.weight.square().sum() if epoch == 1 else None


def test_modules_get_what_they_declare() -> None:
    torch.manual_seed(0)
    net, data = Declaring(), make_data()
    history = fit(net, data, config(warmup_epochs=0)).history
    assert len(net.calls) == 3 * 5
    assert net.epochs == [0] * 5 + [1] * 5 + [2] * 5
    assert (net.scale == 0.5).all()
    assert (net.head.bias == 0).all()
    assert history[1].train_loss > 10 > history[0].train_loss


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_loss_that_explodes_names_the_step() -> None:
    class Fuse(Net):
        count = 0

        def forward(self, x: Tensor) -> Tensor:
            self.count += self.training
            return super().forward(x) * (math.nan if self.count == 7 else 1)

    torch.manual_seed(0)
    with pytest.raises(NonFiniteLossError, match=r"epoch 2, step 2 of 5 \(lr .*\): lower lr") as caught:
        fit(Fuse(), make_data(), config(device="cpu"))
    assert isinstance(caught.value, FloatingPointError)


def test_a_model_of_the_wrong_shape_is_named() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 5))
    with pytest.raises(ValueError, match=r"model=Sequential: returned a tensor of shape \(8, 5\); expected .*\(8, 3\)"):
        fit(net, make_data(), BASE)
    with pytest.raises(ValueError, match="device='gpu'"):
        fit(net, make_data(), config(device="gpu"))


def test_predict_takes_raw_items_and_leaves_the_model_as_it_was() -> None:
    data, net = make_data(), make_net()
    net.train()
    net.norm.eval()
    logits = predict(net, data.test.x, data, batch_size=7)
    assert net.training
    assert not net.norm.training
    assert logits.shape == (19, 3)
    assert logits.dtype == torch.float32
    assert not logits.requires_grad
    net.eval()
    want = net(normalise(data.test.x, data.mean, data.std))
    torch.testing.assert_close(logits, want)
    scored = evaluate(net, data.test, data, batch_size=5)
    assert scored.items == 19
    assert scored.loss == pytest.approx(F.cross_entropy(want, data.test.y).item(), rel=1e-5)
    assert scored.accuracy == pytest.approx((want.argmax(1) == data.test.y).float().mean().item())
    assert predict(net, data.test.x[:0], data).shape == (0, 3)
    with pytest.raises(ValueError, match=r"x=\(19, 6, 6\): expected \(N, \*\(1, 6, 6\)\)"):
        predict(net, data.test.x[:, 0], data)


def test_a_model_that_views_its_maps_gets_contiguous_ones() -> None:
    class Viewing(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(channels, 4, 3), nn.Linear(64, 3)
            self.layouts: list[bool] = []

        def forward(self, x: Tensor) -> Tensor:
            self.layouts.append(self.conv(x).is_contiguous())
            return self.head(self.conv(x).view(len(x), -1))

    for channels in (1, 3):
        data, net = make_data(channels=channels), Viewing(channels)
        fit(net, data, config(epochs=1))
        predict(net, data.test.x, data)
        assert net.layouts[0] is False  # the attempt
        assert sum(not contiguous for contiguous in net.layouts) == 2
