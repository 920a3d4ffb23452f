"""A made-up `results.json`: six operators, three seeds, one failed trial, one failed and one skipped candidate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

# op, options, kernel, accuracy, params, MACs, latency in ms, receptive field
_PLAN: list[tuple[str, dict[str, Any], int, float, int, int, float, float]] = [
    ("conv", {"kernel_size": 3}, 3, 0.9610, 48_922, 2_910_000, 0.62, 4.5),
    ("separable", {"kernel_size": 7}, 7, 0.9655, 49_310, 3_050_000, 0.71, 6.0),
    ("dilated", {"kernel_size": 3, "dilation": 2}, 3, 0.9648, 48_640, 2_880_000, 0.66, 6.5),
    ("dcls", {"kernel_size": 17, "kernel_count": 20, "version": "gauss"}, 17, 0.9790, 49_104, 3_420_000, 1.35, 10.5),
    ("inceptionnext", {"square_kernel_size": 3, "band_kernel_size": 11}, 11, 0.9705, 48_515, 2_610_000, 0.93, 8.0),
    ("unireplknet", {"kernel_size": 13}, 13, 0.9768, 49_720, 3_890_000, 1.02, 11.5),
]
_EPOCHS = 20


def _curve(rng: np.random.Generator, seed: int, final: float, speed: float) -> dict[str, Any]:
    epochs = list(range(1, _EPOCHS + 1))
    rise = [1 - math.exp(-e / speed) for e in epochs]
    accuracy = [0.1 + (final - 0.1) * r + float(rng.normal(0, 0.03 * (1 - r) + 0.002)) for r in rise]
    loss = [2.3 * math.exp(-e / (speed * 1.4)) + 0.03 + float(rng.normal(0, 0.004)) for e in epochs]
    return {
        "seed": seed,
        "epochs": epochs,
        "train_loss": [round(v, 4) for v in loss],
        "val_accuracy": [round(min(v, 1.0), 4) for v in accuracy],
    }


def _kernels(rng: np.random.Generator, op: str, size: int) -> list[dict[str, Any]]:
    axis = np.linspace(-1, 1, size)
    yy, xx = np.meshgrid(axis, axis, indexing="ij")
    layers = []
    for block in range(3):
        stack = []
        for _ in range(16):
            angle, frequency = rng.uniform(0, math.pi), rng.uniform(1, 3.5)
            wave = np.cos(frequency * (xx * math.cos(angle) + yy * math.sin(angle)) + rng.uniform(0, 6))
            kernel = wave * np.exp(-2.5 * (xx**2 + yy**2)) * rng.uniform(0.1, 0.4) + rng.normal(0, 0.02, xx.shape)
            if op == "dcls":
                kernel = kernel * (rng.uniform(size=xx.shape) < 0.12)
            stack.append(np.round(kernel, 4).tolist())
        layers.append({"name": f"blocks.{block}.mixer", "data": stack})
    return layers


def _field(rng: np.random.Generator, width: float, size: int = 32) -> dict[str, Any]:
    axis = np.arange(size) - (size - 1) / 2
    yy, xx = np.meshgrid(axis, axis, indexing="ij")
    power = np.exp(-(xx**2 + yy**2) / (2 * (width / 2) ** 2)) * rng.uniform(0.6, 1.4, xx.shape)
    log = np.log10(power / power.max() + 1e-4) / 4 + 1
    sides: dict[str, float | None] = {}
    for share, factor in (("0.2", 0.7), ("0.3", 0.9), ("0.5", 1.3), ("0.99", 3.2)):
        side = round(width * factor)
        sides[share] = side if side <= size else None
    ratios = {key: None if side is None else (side / size) ** 2 for key, side in sides.items()}
    return {"size": [size, size], "map": np.round(log, 3).tolist(), "sides": sides, "ratios": ratios}


def _candidate(rng: np.random.Generator, row: tuple[Any, ...], seeds: int, target: int) -> dict[str, Any]:
    op, options, kernel, level, params, macs, latency, width = row
    scores = [round(level + float(rng.normal(0, 0.0025)), 4) for _ in range(seeds)]
    mean = float(np.mean(scores))
    half = 0.0045 + 0.1 * abs(level - 0.975)
    noise, blur = [0.05, 0.1, 0.2, 0.3, 0.5], [0.5, 1.0, 1.5, 2.0]
    time = 31.0 + latency * 40
    fft = 410_000 if op == "dcls" else 0
    return {
        "op": op,
        "options": options,
        "label": op,
        "width": 24 + kernel % 5,
        "status": "ok",
        "error": None,
        "params": params,
        "macs": macs,
        "flops": 2 * macs + 210_000 + fft,
        "counts": {
            "convolution": int(1.6 * macs),
            "matmul": 2 * macs - int(1.6 * macs),
            "fft": fft,
            "elementwise": 210_000,
            "not_counted": ["aten.sort"] if op == "dcls" else [],
        },
        "match": {"target": target, "achieved": params, "relative_error": params / target - 1},
        "accuracy": {"mean": mean, "low": mean - half, "high": min(mean + half, 1.0), "per_seed": scores},
        "difference": None,
        "robustness": {
            "noise": {"levels": noise, "accuracy": [round(mean - 0.9 * v**1.5 * (9 / (width + 6)), 4) for v in noise]},
            "blur": {"levels": blur, "accuracy": [round(mean - 0.05 * v**2 * (8 / (width + 3)), 4) for v in blur]},
        },
        "latency": {
            "batch1": {"median_ms": latency, "p95_ms": latency * 1.18},
            "batchN": {"batch": 64, "median_ms": latency * 21, "p95_ms": latency * 23.5},
            "throughput": 64e3 / (latency * 21),
        },
        "peak_memory_bytes": int(18e6 + latency * 9e6),
        "train_seconds": time,
        "erf": _field(rng, width),
        "kernels": _kernels(rng, op, kernel),
        "curves": [_curve(rng, s, score, 2.2 + 0.4 * (level < 0.97)) for s, score in enumerate(scores)],
        "trials": [
            {"seed": s, "status": "ok", "accuracy": score, "error": None, "epochs": _EPOCHS, "seconds": time}
            for s, score in enumerate(scores)
        ],
    }


_TRACEBACK = """Traceback (most recent call last):
  File "torchconv/training/loop.py", line 141, in fit
    loss.backward()
  File "torch/_tensor.py", line 648, in backward
    torch.autograd.backward(self, gradient, retain_graph, create_graph, inputs=inputs)
torch.OutOfMemoryError: tried to allocate 1.21 GiB (GPU 0; 7.79 GiB total capacity; 6.94 GiB already allocated)"""


def _empty(op: str, label: str, status: str, error: str, seeds: int) -> dict[str, Any]:
    trials = [
        {"seed": s, "status": "failed", "accuracy": None, "error": error, "epochs": 3, "seconds": 4.2}
        for s in range(seeds if status == "failed" else 0)
    ]
    return {"op": op, "options": {}, "label": label, "width": None, "status": status, "error": error, "trials": trials}


def _front(candidates: list[dict[str, Any]], cost: Callable[[dict[str, Any]], float]) -> list[str]:
    measured = sorted((c for c in candidates if c["status"] == "ok"), key=cost)
    best, front = -1.0, []
    for candidate in measured:
        if candidate["accuracy"]["mean"] > best:
            best = candidate["accuracy"]["mean"]
            front.append(candidate["op"])
    return front


def _points(candidate: dict[str, Any]) -> str:
    mean, low, high = (f"{100 * candidate['difference'][k]:+.1f}" for k in ("mean", "low", "high"))
    return f"{mean} points (95 % interval {low} to {high})".replace("-", "−")


def fake_results(seeds: int = 3, incomplete: bool = True) -> dict[str, Any]:
    """Results as `torchconv compare` writes them; ``incomplete`` adds failures and a candidate that was left out."""
    rng = np.random.default_rng(7)
    candidates = [_candidate(rng, row, seeds, 49_000) for row in _PLAN]
    base = candidates[0]["accuracy"]["mean"]
    for candidate in candidates[1:]:
        mean = candidate["accuracy"]["mean"] - base
        p = min(1.0, math.exp(-mean * 420) * 0.6)
        adjusted = min(1.0, p * 5)
        candidate["difference"] = {
            "mean": mean, "low": mean - 0.0082, "high": mean + 0.0082, "p": p, "p_adjusted": adjusted,
            "significant": adjusted < 0.05, "n_items": 360,
        }  # fmt: skip
    if incomplete:
        lost = candidates[2]
        lost["trials"][-1].update(status="failed", accuracy=None, error=_TRACEBACK, epochs=11)
        lost["curves"].pop()
        lost["accuracy"]["per_seed"].pop()
        candidates.append(_empty("adknet", "adknet", "failed", _TRACEBACK, seeds))
        candidates.append(_empty("spherical", "spherical", "skipped", "no width has 49000 parameters within 2 %", 0))
    return {
        "schema": 1,
        "torchconv": "0.1.0",
        "command": "torchconv compare --data digits --ops conv,separable,dilated,dcls,inceptionnext,unireplknet",
        "created": "2025-11-21T09:14:03+00:00",
        "environment": {
            "python": "3.11.9", "torch": "2.8.0", "timm": "1.0.15", "platform": "Linux x86_64",
            "device": "cpu", "processor": "16 cores", "threads": 8,
        },
        "config": {
            "data": "digits", "net": "mini", "match": "params", "seeds": seeds, "epochs": _EPOCHS, "batch_size": 64,
        },
        "dataset": {
            "name": "digits", "kind": "image", "train": 1168, "val": 269, "test": 360, "classes": 10, "channels": 1,
            "size": [32, 32], "fingerprint": "9f2c51d0e7aa", "warnings": ["images were enlarged from 8×8 to 32×32"],
        },
        "baseline": "conv",
        "candidates": candidates,
        "pareto": {
            "params": _front(candidates, lambda c: c["params"]),
            "macs": _front(candidates, lambda c: c["macs"]),
            "latency": _front(candidates, lambda c: c["latency"]["batchN"]["median_ms"]),
        },
        "verdict": {
            "pick": "dcls",
            "text": f"dcls is more accurate than conv by {_points(candidates[3])}, p < 0.001 after correction for 5 "
            "candidates. It is 118 % slower at batch 64 than conv. The data do not separate it from unireplknet, so it "
            "is a good choice, not the best for certain. Of these, unireplknet is 32 % faster at batch 64 than dcls.",
            "reasons": [
                f"{c['label']} is {'' if c['difference']['significant'] else 'not '}more accurate than conv: "
                f"{_points(c)}, p = {c['difference']['p_adjusted']:.3f} corrected."
                for c in candidates
                if c.get("difference")
            ],
        },
        "notes": ["Latency was measured on the same machine while nothing else ran."],
    }  # fmt: skip
