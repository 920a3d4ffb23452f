"""What a candidate costs: operations, latency, throughput and memory of its inference form, all measured together."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torchconv.analysis.count import count
from torchconv.analysis.latency import paired_latency, peak_memory
from torchconv.compare.nets import Shape
from torchconv.surgery.merging import merge, stored_parameters


def counts_of(model: nn.Module, shape: Shape) -> dict[str, Any]:
    """Parameters and operations of a network's inference form for one input."""
    x = torch.randn(1, shape.channels, *shape.size, generator=torch.Generator().manual_seed(0))
    counted = count(merge(model, x), x)
    return {
        "params": stored_parameters(model),
        "macs": counted.macs,
        "flops": counted.flops,
        "counts": {
            "convolution": counted.convolution,
            "matmul": counted.matmul,
            "fft": counted.fft,
            "elementwise": counted.elementwise,
            "not_counted": list(counted.not_counted),
        },
    }


def latencies_of(models: dict[str, nn.Module], shape: Shape, batch: int, device: torch.device) -> dict[str, Any]:
    """Latency at batch 1 and ``batch``, throughput and peak memory of each network, timed in turn so that drift cancels.

    The order within a round changes; figures are medians and 95th percentiles over the rounds.
    """
    ready, found = {}, {label: {} for label in models}  # type: dict[str, nn.Module], dict[str, dict[str, Any]]
    for label, model in models.items():
        x = torch.zeros(1, shape.channels, *shape.size)
        ready[label] = merge(model.cpu(), x).to(device)
    for name, size in (("batch1", 1), ("batchN", batch)):
        x = torch.randn(size, shape.channels, *shape.size, device=device)
        with torch.inference_mode():
            timed = paired_latency({label: _call(m, x) for label, m in ready.items()}, device=device)
            for label, model in ready.items():
                single = timed[label]
                entry = {"median_ms": single.median_ms, "p95_ms": single.p95_ms}
                found[label].setdefault("latency", {})[name] = entry if size == 1 else {"batch": size, **entry}
                if size > 1:
                    found[label]["throughput"] = size / single.median_ms * 1e3
                    found[label]["peak_memory_bytes"] = peak_memory(_call(model, x), device=device)
    return found


def _call(model: nn.Module, x: torch.Tensor) -> Any:
    return lambda: model(x)
