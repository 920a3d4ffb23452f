"""What a candidate costs: operations, latency, throughput and memory of its inference form, all measured together."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torchconv.analysis.count import count
from torchconv.analysis.latency import model_peak_memory, paired_latency
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
        "counts": counted.kinds(),
    }


def in_layout(x: torch.Tensor) -> torch.Tensor:
    """Images on a CPU in channels-last order, in which every operator here ran as fast or faster."""
    last = x.dim() == 4 and x.device.type == "cpu"
    return x.contiguous(memory_format=torch.channels_last) if last else x


def deployed(model: nn.Module, shape: Shape, device: torch.device | str) -> nn.Module:
    """A network as one would deploy it: merged where that costs no more, on the device, in the layout that is timed."""
    merged = merge(model.cpu(), torch.zeros(1, shape.channels, *shape.size)).to(device)
    if shape.ndim == 2 and torch.device(device).type == "cpu":
        merged = merged.to(memory_format=torch.channels_last)
    return merged


def latencies_of(models: dict[str, nn.Module], shape: Shape, batch: int, device: torch.device) -> dict[str, Any]:
    """Latency at batch 1 and ``batch``, throughput and peak memory of each network.

    The networks take turns within a round, in changing order, so that drift cancels; figures are medians and 95th
    percentiles over the rounds.
    """
    ready: dict[str, nn.Module] = {}
    found: dict[str, dict[str, Any]] = {label: {} for label in models}
    for label, model in models.items():
        ready[label] = deployed(model, shape, device)
    for name, size in (("batch1", 1), ("batchN", batch)):
        x = in_layout(torch.randn(size, shape.channels, *shape.size, device=device))
        timed = paired_latency(ready, x, min_seconds=0.5)
        for label, model in ready.items():
            single = timed.latencies[label]
            entry: dict[str, Any] = single.summary()
            found[label].setdefault("latency", {})[name] = entry if name == "batch1" else {"batch": size, **entry}
            if name == "batchN":
                found[label]["latency"]["throughput"] = size / single.median_ms * 1e3
                found[label]["peak_memory_bytes"] = model_peak_memory(model, x) if device.type != "mps" else None
    return found
