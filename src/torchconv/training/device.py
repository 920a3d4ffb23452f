"""Which device to run on, and accelerate set up for one run at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from torchconv._common import require
from torchconv.training.config import FitConfig


def resolve_device(name: str | torch.device) -> torch.device:
    """The device for ``name``; "auto" is cuda, then mps, then cpu.

    Raises:
        ValueError: when the name means nothing or the device is not there.
    """
    if name == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(kind)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name!r}: use 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={str(name)!r}: {torch.cuda.device_count()} CUDA devices are visible; use 'auto' or 'cpu'"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device={str(name)!r}: MPS is not available here; use 'auto' or 'cpu'")
    return device


@contextmanager
def accelerator(config: FitConfig) -> Iterator[Any]:
    """An ``accelerate.Accelerator`` for ``config``.

    accelerate keeps device and precision of the first Accelerator for the life of the process; here each run has its
    own, and what the caller had set up is put back.

    Raises:
        ValueError: fp16 on a CPU, or a sharded launch (FSDP, DeepSpeed).
    """
    accelerate = require("accelerate", "compare")
    device = resolve_device(config.device)
    if config.amp == "fp16" and device.type == "cpu":
        raise ValueError("amp='fp16': needs a GPU; on a CPU use amp='bf16' or 'no'")
    states = [s._shared_state for s in (accelerate.state.AcceleratorState, accelerate.state.PartialState)]
    gradient = accelerate.state.GradientState._shared_state
    before = [dict(state) for state in (*states, gradient)]
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    for state in (*states, gradient):
        state.clear()
    try:
        partial = accelerate.PartialState(cpu=device.type == "cpu")
        if partial.num_processes == 1 or not launched:
            partial.device = device
        runner = accelerate.Accelerator(
            mixed_precision=config.amp, cpu=device.type == "cpu", gradient_accumulation_steps=1
        )
        kind = str(runner.distributed_type.value)
        if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA"):
            raise ValueError(f"accelerate launch with {kind}: fit trains whole models on every device; use multi-GPU")
        yield runner
    finally:
        for state, content in zip((*states, gradient), before, strict=True):
            state.clear()
            state.update(content)
