"""Which device to run on, and accelerate set up for one run at a time."""

from __future__ import annotations

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
        count = torch.cuda.device_count()
        raise ValueError(f"device={str(name)!r}: {count} CUDA devices are visible; use 'auto' or 'cpu'")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device={str(name)!r}: MPS is not available here; use 'auto' or 'cpu'")
    return device


@contextmanager
def accelerator(config: FitConfig) -> Iterator[Any]:
    """An ``accelerate.Accelerator`` for ``config``.

    accelerate keeps device and precision of the first Accelerator for the life of the process; here each run has its
    own, and what the caller had set up is put back. The settings are global: one run at a time in a process.

    Raises:
        ValueError: fp16 on a CPU, or a sharded launch (FSDP, DeepSpeed).
    """
    accelerate = require("accelerate", "compare")
    device = resolve_device(config.device)
    if config.amp == "fp16" and device.type == "cpu":
        raise ValueError("amp='fp16': needs a GPU; on a CPU use amp='bf16' or 'no'")
    names = ("AcceleratorState", "PartialState", "GradientState")
    states = [getattr(accelerate.state, name)._shared_state for name in names]
    before = [dict(state) for state in states]
    for state in states:
        state.clear()
    try:
        cpu = device.type == "cpu"
        partial = accelerate.PartialState(cpu=cpu)
        if partial.num_processes == 1:
            partial.device = device
        once = accelerate.utils.GradientAccumulationPlugin(num_steps=1)  # the loop accumulates by itself
        runner = accelerate.Accelerator(mixed_precision=config.amp, cpu=cpu, gradient_accumulation_plugin=once)
        kind = str(runner.distributed_type.value)
        if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA"):
            raise ValueError(f"accelerate launch with {kind}: fit trains whole models on every device; use multi-GPU")
        yield runner
    finally:
        for state, content in zip(states, before, strict=True):
            state.clear()
            state.update(content)
