"""What the machine can do at best, measured: multiply-adds of a large matrix product, bytes of a large copy."""

from __future__ import annotations

from typing import Any

import torch

from torchconv.analysis.latency import latency

_SIDE = {"cpu": 1024, "cuda": 8192}
_COPIED = {"cpu": 1 << 26, "cuda": 1 << 30}  # bytes: well beyond the last-level cache


def ceiling(device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """GFLOP/s of a square matrix product and GB/s of a copy (bytes read plus bytes written), the best of several runs.

    Args:
        device: "cpu", "cuda", ….
        dtype: of the matrices.

    Returns:
        {"gflops": …, "gbs": …, "ridge": FLOPs per byte at which the two roofs meet}.
    """
    kind = torch.device(device).type
    side, size = _SIDE.get(kind, 2048), _COPIED.get(kind, 1 << 28)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)

    def best(fn: Any) -> float:
        return min(latency(fn, repeats=10, min_seconds=0.2, device=device).samples) / 1e3

    gflops = 2 * side**3 / best(lambda: torch.mm(a, b, out=out)) / 1e9
    gbs = 2 * size / best(lambda: target.copy_(source)) / 1e9
    return {"gflops": gflops, "gbs": gbs, "ridge": gflops / gbs}
