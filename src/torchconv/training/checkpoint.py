"""Checkpoints of a run: one file, complete or absent, refused when it belongs to another run."""

from __future__ import annotations

import hashlib
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchconv._common import atomic_write
from torchconv.data import Dataset
from torchconv.training.config import CheckpointError, FitConfig

NAME = "checkpoint.pt"
_SCHEMA = 1
_KEYS = {"fingerprint", "model", "optimizer", "scaler", "ema", "best", "history", "rng", "finished", "stopped"}


def fingerprint(model: nn.Module, data: Dataset, config: FitConfig, processes: int) -> dict[str, str]:
    """What must agree between a checkpoint and the run that resumes it: settings, data, tensors and structure."""
    marks: dict[str, str] = {f"config.{k}": repr(v) for k, v in asdict(config).items() if k != "device"}
    marks["data"] = f"{data.name} {data.fingerprint}"
    marks["processes"] = str(processes)
    # Addresses of functions in a repr differ from one process to the next.
    structure = re.sub(r" at 0x[0-9a-f]+", "", repr(model))
    marks["model"] = f"{type(model).__name__} {hashlib.sha256(structure.encode()).hexdigest()[:16]}"
    for name, value in model.state_dict().items():
        described = f"{str(value.dtype)[6:]} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else "other"
        marks[f"model.{name}"] = described
    return marks


def save(path: Path, payload: dict[str, Any]) -> None:
    """Write ``payload`` to ``path`` atomically."""
    with atomic_write(path) as temporary:
        torch.save({"schema": _SCHEMA, **payload}, temporary)


def load(path: Path, expected: dict[str, str]) -> dict[str, Any]:
    """Read the checkpoint at ``path`` for the run with fingerprint ``expected``.

    Raises:
        CheckpointError: unreadable, of another version, or of another run; the message says how to go on.
    """
    remedy = "delete it, or pass resume=False to start again"
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises half a dozen types on damaged files
        reason = str(error).strip().split("\n")[0][:120] or type(error).__name__
        raise CheckpointError(f"{path}: cannot be read as a checkpoint ({reason}); {remedy}") from error
    if not isinstance(payload, dict) or payload.get("schema") != _SCHEMA or not set(payload) >= _KEYS:
        raise CheckpointError(f"{path}: is not a training checkpoint of this version of torchconv; {remedy}")
    found = payload["fingerprint"]
    names = [
        name for name in [*expected, *sorted(found.keys() - expected.keys())] if found.get(name) != expected.get(name)
    ]
    if names:
        told = [f"{n} was {found.get(n, 'absent')}, is {expected.get(n, 'absent')}" for n in names[:4]]
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        raise CheckpointError(
            f"{path}: belongs to another run ({'; '.join(told)}{more}); "
            "choose another run_dir, or pass resume=False to overwrite it"
        )
    return payload
