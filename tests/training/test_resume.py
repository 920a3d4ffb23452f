"""A run that was interrupted ends with the same bits as one that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.training.common import make_data, make_net, numbers, same_state
from torchconv.training import CheckpointError, EpochRecord, FitConfig, fit

BASE = FitConfig(epochs=5, batch_size=8, lr=0.02, device="cpu")
RICH = replace(BASE, augment="flip", mixup=0.3, cutmix=0.5, ema=0.9, clip_grad=1.0, grad_accum=2, label_smoothing=0.1)
VARIANTS = {
    "plain": BASE,
    "rich": RICH,
    "sgd": replace(BASE, optimizer="sgd", early_stop=4),
    "bf16": replace(BASE, amp="bf16"),
    "policy": replace(BASE, augment="rand-m9-mstd0.5"),
}


class Interrupted(Exception):
    pass


def interrupt(epoch: int):
    def on_epoch(record: EpochRecord) -> None:
        torch.rand(5)
        if record.epoch == epoch:
            raise Interrupted

    return on_epoch


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("epoch", [1, 3])
def test_resumed_equals_uninterrupted(tmp_path: Path, name: str, epoch: int) -> None:
    settings, data = VARIANTS[name], make_data()
    whole = fit(make_net(), data, settings)
    with pytest.raises(Interrupted):
        fit(make_net(), data, settings, run_dir=tmp_path, on_epoch=interrupt(epoch))
    other = make_net()
    with torch.no_grad():
        other.conv.weight.zero_()  # what the model holds before does not matter
    seen: list[EpochRecord] = []
    resumed = fit(other, data, settings, run_dir=tmp_path, on_epoch=seen.append)
    assert [r.epoch for r in seen] == list(range(epoch + 1, 6))
    assert numbers(resumed.history) == numbers(whole.history)
    assert resumed.best_epoch == whole.best_epoch
    assert same_state(resumed.model, whole.model)


KILLED = """
import os, signal, sys
from tests.training.common import make_data, make_net
from tests.training.test_resume import RICH
from torchconv.training import fit

def kill(record):
    if record.epoch == 3:
        os.kill(os.getpid(), signal.SIGKILL)

fit(make_net(), make_data(), RICH, run_dir=sys.argv[1], on_epoch=kill)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_sigkill_loses_nothing_that_was_finished(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "src")])}
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=environment, cwd=root, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]
    resumed = fit(make_net(), make_data(), RICH, run_dir=tmp_path)
    threads = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert len(threads["history"]) == 5
    whole = fit(make_net(), make_data(), RICH)
    assert numbers(resumed.history) == numbers(whole.history)
    assert same_state(resumed.model, whole.model)


def test_a_finished_run_comes_back_at_once(tmp_path: Path) -> None:
    data = make_data()
    settings = replace(BASE, epochs=30, lr=0.05, early_stop=2)
    first = fit(make_net(), data, settings, run_dir=tmp_path)
    before = (tmp_path / "checkpoint.pt").stat().st_mtime_ns

    def never(record: EpochRecord) -> None:
        raise AssertionError("nothing is left to train")

    again = fit(make_net(), data, settings, run_dir=tmp_path, on_epoch=never)
    assert again.history == first.history
    assert (again.stopped_early, again.seconds) == (first.stopped_early, first.seconds) == (True, again.seconds)
    assert same_state(again.model, first.model)
    assert not again.model.training
    assert (tmp_path / "checkpoint.pt").stat().st_mtime_ns == before


def test_a_checkpoint_of_another_run_is_refused_by_what_differs(tmp_path: Path) -> None:
    data = make_data()
    fit(make_net(), data, replace(BASE, epochs=1), run_dir=tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.lr was 0\.02, is 0\.01.*resume=False"):
        fit(make_net(), data, replace(BASE, epochs=1, lr=0.01), run_dir=tmp_path)
    with pytest.raises(CheckpointError, match=r"data was stripes"):
        fit(make_net(), make_data(seed=1), replace(BASE, epochs=1), run_dir=tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.norm\.bias was float32 \(4,\), is absent"):
        fit(make_net(norm=False), data, replace(BASE, epochs=1), run_dir=tmp_path)
    with pytest.raises(CheckpointError, match=r"model was Net \w+, is Net \w+"):
        fit(make_net(dropout=0.5), data, replace(BASE, epochs=1), run_dir=tmp_path)
    result = fit(make_net(), data, replace(BASE, epochs=2, lr=0.01), run_dir=tmp_path, resume=False)
    assert result.epochs_run == 2


def test_a_damaged_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    data, path = make_data(), tmp_path / "checkpoint.pt"
    fit(make_net(), data, replace(BASE, epochs=1), run_dir=tmp_path)
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"not a checkpoint", whole[:200] + bytes(100) + whole[300:]):
        path.write_bytes(broken)
        with pytest.raises(CheckpointError, match=r"checkpoint\.pt: .*(delete it, or pass resume=False)"):
            fit(make_net(), data, replace(BASE, epochs=1), run_dir=tmp_path)
    torch.save({"model": {}}, path)
    with pytest.raises(CheckpointError, match="is not a training checkpoint"):
        fit(make_net(), data, replace(BASE, epochs=1), run_dir=tmp_path)
    payload = {"schema": 1, "evil": os.system}
    torch.save(payload, path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        fit(make_net(), data, replace(BASE, epochs=1), run_dir=tmp_path)


def test_a_failed_write_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, path = make_data(), tmp_path / "checkpoint.pt"
    with pytest.raises(Interrupted):
        fit(make_net(), data, BASE, run_dir=tmp_path, on_epoch=interrupt(2))
    before = path.read_bytes()

    def full(payload: object, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space"):
        fit(make_net(), data, BASE, run_dir=tmp_path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]
