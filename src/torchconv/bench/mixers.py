"""Operators as spatial mixers on one input, timed in turn: forward, and forward with backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torchconv._common import check_choice, check_positive
from torchconv.analysis.count import count
from torchconv.analysis.latency import PairedLatency, machine, paired_latency
from torchconv.catalog import operators
from torchconv.compare.nets import make_candidate
from torchconv.ops import as_mixer
from torchconv.surgery.merging import merge

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def bench(
    ops: tuple[str, ...] = (),
    *,
    channels: int = 64,
    size: tuple[int, ...] = (56, 56),
    batch: int = 8,
    dtype: str = "float32",
    device: str = "cpu",
    channels_last: bool = False,
    backward: bool = True,
    min_seconds: float = 1.0,
) -> dict[str, Any]:
    """Time operators as mixers of ``channels`` channels on a map of ``size``.

    The forward pass is that of the inference form, without gradients; the training pass is forward and backward of the
    training form. All operators take turns within each round, so that drift of the machine cancels.

    Args:
        ops: operators with options, the baseline first; all that work in this dimension by default.
        channels, size, batch: shape of the input.
        dtype: "float32", "bfloat16" or "float16".
        device: "cpu", "cuda", ….
        channels_last: memory format of 4-D inputs.
        backward: time training passes as well.
        min_seconds: time spent on each operator and pass.

    Returns:
        {"machine", "input", "rows": [{"op", "params", "macs", "forward_ms", "forward_ratio", "training_ms", …}]}
    """
    check_choice("dtype", dtype, DTYPES)
    for name, value in (("channels", channels), ("batch", batch)):
        check_positive(name, value)
    ndim = len(size)
    candidates = [make_candidate(op) for op in ops or tuple(operators(ndim))]
    where: dict[str, Any] = {"dtype": DTYPES[dtype], "device": device}
    models: dict[str, nn.Module] = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for candidate in candidates:
            made = as_mixer(candidate.op, channels, ndim, **dict(candidate.options))
            models[candidate.label] = made.to(**where)
        x = torch.randn(batch, channels, *size).to(**where)
    if channels_last and ndim == 2:
        x = x.contiguous(memory_format=torch.channels_last)
        models = {k: m.to(memory_format=torch.channels_last) for k, m in models.items()}
    ready = {k: merge(m, x) for k, m in models.items()}
    rows: dict[str, dict[str, Any]] = {}
    for label, model in ready.items():
        counted = count(model, x)
        params = sum(p.numel() for p in models[label].parameters())
        rows[label] = {"op": label, "params": params, "macs": counted.macs, "flops": counted.flops}
    _fill(rows, "forward", paired_latency(ready, x, min_seconds=min_seconds))
    if backward:
        leaf = x.detach().requires_grad_()
        training = {k: _training(m.train(), leaf) for k, m in models.items()}
        # latency's own calls run without gradients; these take them back.
        _fill(rows, "training", paired_latency(training, min_seconds=min_seconds, device=device))
    shape = {"batch": batch, "channels": channels, "size": list(size), "dtype": dtype, "channels_last": channels_last}
    return {"schema": 1, "machine": machine(), "device": device, "input": shape, "rows": list(rows.values())}


def _fill(rows: dict[str, Any], name: str, timed: PairedLatency) -> None:
    for label, single in timed.latencies.items():
        ratio = timed.ratios.get(label)
        rows[label] |= {
            f"{name}_ms": single.median_ms,
            f"{name}_p95_ms": single.p95_ms,
            f"{name}_ratio": ratio.median if ratio else 1.0,
            f"{name}_ratio_interval": [ratio.low, ratio.high] if ratio else [1.0, 1.0],
        }


def _training(model: nn.Module, x: torch.Tensor) -> Any:
    cotangent = torch.ones_like(x)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        x.grad = None
        with torch.enable_grad():
            model(x).backward(cotangent)

    return step
