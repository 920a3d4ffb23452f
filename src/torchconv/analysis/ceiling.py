"""What the machine can do at best, measured: multiply-adds of a large matrix product, bytes of a large copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from torchconv.analysis.latency import latency

# Small products too: on a machine that is shared or throttled, a short run is the one that shows the peak.
_SIDES = {"cpu": (256, 512, 1024), "cuda": (4096, 8192)}
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
    size = _COPIED.get(kind, 1 << 28)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)

    def best(fn: Any) -> float:
        return min(latency(fn, repeats=10, min_seconds=0.2, device=device).samples) / 1e3

    def product(side: int) -> float:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        return 2 * side**3 / best(lambda: torch.mm(a, b, out=out)) / 1e9

    gflops = max(product(side) for side in _SIDES.get(kind, (1024, 2048)))
    gbs = 2 * size / best(lambda: target.copy_(source)) / 1e9
    return {"gflops": gflops, "gbs": gbs, "ridge": gflops / gbs}


def cache_bytes(device: str = "cpu") -> int | None:
    """Size of the largest cache in front of the memory; None where the system does not say.

    Maps that fit into it move faster than the copy that :func:`ceiling` measures.
    """
    if torch.device(device).type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        if text[:-1].isdigit() and text[-1] in units:
            sizes.append(int(text[:-1]) * units[text[-1]])
    return max(sizes, default=None)
