"""One trial: a network with one operator under one seed, trained, tested and written down.

A trial's folder holds ``config.json``, ``progress.json`` (while it runs), ``checkpoint.pt`` (while it runs),
``predictions.safetensors``, ``model.safetensors`` and ``metrics.json``, which is written last and says it is finished.
"""

from __future__ import annotations

import json
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from torchconv._common import atomic_write, write_json, write_text
from torchconv.compare.config import CompareConfig
from torchconv.compare.insight import field_of, kernels_of
from torchconv.compare.nets import Candidate, Shape, make_net
from torchconv.data import Dataset, load
from torchconv.training import EpochRecord, fit, predict

FILES = ("config.json", "predictions.safetensors", "model.safetensors", "metrics.json", "error.txt")


@dataclass(frozen=True)
class Trial:
    """All that a worker needs, wherever it runs."""

    config: CompareConfig
    candidate: Candidate
    width: int
    fine: int
    seed: int
    epochs: int
    augment: str
    threads: int
    fingerprint: str
    folder: str

    @property
    def name(self) -> str:
        """Operator and seed."""
        return f"{self.candidate.label}, seed {self.seed}"

    def describe(self) -> dict[str, Any]:
        """For ``config.json``."""
        return {
            "op": self.candidate.op,
            "options": dict(self.candidate.options),
            "net": self.config.net,
            "width": self.width,
            "fine": self.fine,
            "seed": self.seed,
            "data": Path(self.config.data).name,
            "fit": asdict(self.config.fit_config(self.seed, self.epochs, self.augment)),
        }


@lru_cache(maxsize=1)
def _load(options: tuple[tuple[str, Any], ...]) -> Dataset:
    arguments = dict(options)
    return load(arguments.pop("spec"), **arguments)


def load_data(config: CompareConfig) -> Dataset:
    """The comparison's data, kept for the next trial of this process."""
    return _load(tuple(config.data_options().items()))


def shape_of(data: Dataset) -> Shape:
    """What a network must fit."""
    return Shape(data.channels, tuple(data.train.x.shape[2:]), data.num_classes)


def build(trial: Trial, data: Dataset) -> torch.nn.Module:
    """The trial's network with its seeded initial weights."""
    with torch.random.fork_rng():
        torch.manual_seed(trial.seed)
        return make_net(trial.config.net).build(trial.candidate, shape_of(data), trial.width, trial.fine)


def read_metrics(folder: str | Path) -> dict[str, Any] | None:
    """A finished trial's metrics, or None; a damaged file counts as unfinished."""
    try:
        found = json.loads((Path(folder) / "metrics.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) and "status" in found else None


def _train_and_test(trial: Trial, folder: Path) -> dict[str, Any]:
    from torchconv.analysis.robustness import robustness

    began = time.perf_counter()
    data = load_data(trial.config)
    if data.fingerprint != trial.fingerprint:
        raise RuntimeError(
            f"data={trial.config.data!r}: differ from those of the plan (another version on this worker?)"
        )
    settings = trial.config.fit_config(trial.seed, trial.epochs, trial.augment)

    def report(record: EpochRecord) -> None:
        write_json(folder / "progress.json", {**asdict(record), "epochs": trial.epochs})

    write_json(folder / "config.json", trial.describe())
    result = fit(build(trial, data), data, settings, run_dir=folder, resume=True, on_epoch=report)
    model = result.model
    device = trial.config.device

    def logits(x: torch.Tensor) -> torch.Tensor:
        return predict(model, x, data, device=device)

    predicted = logits(data.test.x).argmax(1)
    correct = predicted.eq(data.test.y)
    metrics: dict[str, Any] = {
        "status": "ok",
        "op": trial.candidate.label,
        "seed": trial.seed,
        "accuracy": float(correct.double().mean()),
        "epochs": result.epochs_run,
        "stopped_early": result.stopped_early,
        "history": [asdict(r) for r in result.history],
        "robustness": robustness(logits, data.test.x, data.test.y, std=data.std, seed=trial.config.seed),
        "error": None,
    }
    if trial.seed == trial.config.seed:
        metrics["erf"] = field_of(model, data)
        metrics["kernels"] = kernels_of(model, data.ndim)
    metrics["seconds"] = time.perf_counter() - began
    metrics["train_seconds"] = sum(r.seconds for r in result.history)
    with atomic_write(folder / "predictions.safetensors") as path:
        save_file({"predicted": predicted, "correct": correct.to(torch.uint8)}, path)
    state = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    with atomic_write(folder / "model.safetensors") as path:
        save_file(state, path, metadata={"config": json.dumps(trial.describe())})
    return metrics


def run_trial(trial: Trial) -> dict[str, Any]:
    """Run a trial, or carry on where it was interrupted; a finished one is returned at once.

    An exception becomes a "failed" record.
    """
    folder = Path(trial.folder)
    done = read_metrics(folder)
    if done is not None and done["status"] == "ok":
        return done
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(trial.threads)
    try:
        metrics = _train_and_test(trial, folder)
    except Exception as error:
        metrics = failure(trial, f"{type(error).__name__}: {error}".split("\n")[0])
        write_text(folder / "error.txt", traceback.format_exc())
    write_json(folder / "metrics.json", metrics)
    for name in ("checkpoint.pt", "progress.json"):
        (folder / name).unlink(missing_ok=True)
    return metrics


def failure(trial: Trial, error: str) -> dict[str, Any]:
    """The record of a trial that did not end well."""
    return {"status": "failed", "op": trial.candidate.label, "seed": trial.seed, "error": error}


def run_trial_elsewhere(trial: Trial) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Run a trial on a machine that may not see the run directory; then its files come back as bytes."""
    if Path(trial.folder).parent.parent.is_dir():
        return run_trial(trial), {}
    with tempfile.TemporaryDirectory() as temporary:
        moved = Trial(**{**{f: getattr(trial, f) for f in trial.__dataclass_fields__}, "folder": temporary})
        metrics = run_trial(moved)
        return metrics, {n: (Path(temporary) / n).read_bytes() for n in FILES if (Path(temporary) / n).exists()}
