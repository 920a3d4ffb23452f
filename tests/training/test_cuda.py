"""What only a GPU can show: no waiting between steps, mixed precision, resuming."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from tests.training.common import make_data, make_net
from torchconv.training import FitConfig, fit

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
BASE = FitConfig(
    epochs=2, batch_size=8, lr=0.02, device="cuda", augment="flip", mixup=0.3, cutmix=0.5, ema=0.9, clip_grad=1.0
)


@pytest.mark.parametrize("amp", ["no", "bf16", "fp16"])
def test_the_host_waits_once_an_epoch_however_many_steps(amp: str) -> None:
    waits = []
    for items in (40, 160):
        data, net = make_data(train=items), make_net()
        settings = FitConfig(**{**BASE.__dict__, "amp": amp})
        fit(net, data, settings)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                fit(net, data, settings)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchronizing" in str(warning.message) for warning in caught))
    assert waits[0] == waits[1]


@pytest.mark.parametrize("amp", ["no", "bf16", "fp16"])
def test_resuming_continues_close_to_an_uninterrupted_run(tmp_path: Path, amp: str) -> None:
    data, settings = make_data(), FitConfig(**{**BASE.__dict__, "amp": amp})

    def interrupt(record: object) -> None:
        raise InterruptedError

    whole = fit(make_net(), data, settings)
    with pytest.raises(InterruptedError):
        fit(make_net(), data, settings, run_dir=tmp_path, on_epoch=interrupt)
    resumed = fit(make_net(), data, settings, run_dir=tmp_path)
    losses = [[record.train_loss for record in run.history] for run in (resumed, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
