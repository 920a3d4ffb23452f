"""``torchconv.kernels.depthwise_conv*d`` against ``F.conv*d`` with as many groups as channels, forward and backward.

Both sides of a pair run in turn on the same tensors after a warm-up, so load from elsewhere hits both alike. Medians
and the median of the pairs' ratios (with its quartiles) are reported; the fastest run of each side is kept too, as what
the machine can do undisturbed.

    python benchmarks/depthwise.py --threads 1 --seconds 1.5 --out benchmarks/results
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from torchconv.kernels import _depthwise_run, depthwise

# (batch, channels, size, kernel, channels-last)
CASES: list[tuple[int, int, tuple[int, ...], int, bool]] = [
    *((4, 96, (56, 56), k, False) for k in (3, 7, 13, 31)),
    *((4, 96, (56, 56), k, True) for k in (7, 13, 31)),
    *((4, 384, (14, 14), k, False) for k in (7, 13)),
    *((64, c, (8, 8), k, False) for c in (40, 60) for k in (3, 5, 7, 13)),
    *((64, 48, (14, 14), k, False) for k in (5, 7, 13)),
    (64, 96, (14, 14), 7, False),
    (1, 16, (8, 8), 3, False),
    (1, 16, (8, 8), 7, False),
    (8, 64, (4096,), 31, False),
    (8, 64, (4096,), 127, False),
    (2, 32, (16, 16, 16), 5, False),
    (2, 32, (16, 16, 16), 9, False),
]
CONV = (None, F.conv1d, F.conv2d, F.conv3d)
OURS = (None, depthwise.depthwise_conv1d, depthwise.depthwise_conv2d, depthwise.depthwise_conv3d)


def paired(one: Callable[[], object], other: Callable[[], object], seconds: float) -> dict[str, float]:
    """Milliseconds of both, run in alternating order, and how many times faster the other is."""
    times: tuple[list[float], list[float]] = ([], [])
    one(), other()
    end = time.perf_counter() + seconds
    while len(times[0]) < 3 or (time.perf_counter() < end and len(times[0]) < 300):
        order = ((0, one), (1, other)) if len(times[0]) % 2 else ((1, other), (0, one))
        for side, function in order:
            begin = time.perf_counter()
            function()
            times[side].append((time.perf_counter() - begin) * 1e3)
    ratios = sorted(a / b for a, b in zip(*times, strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "conv_ms": statistics.median(times[0]),
        "ours_ms": statistics.median(times[1]),
        "conv_best_ms": min(times[0]),
        "ours_best_ms": min(times[1]),
        "ratio": middle,
        "ratio_low": low,
        "ratio_high": high,
        "ratio_best": min(times[0]) / min(times[1]),
        "pairs": len(ratios),
    }


def measure(case: tuple[int, int, tuple[int, ...], int, bool], seconds: float) -> dict[str, object]:
    batch, channels, size, k, last = case
    ndim, p = len(size), k // 2
    x, w = torch.randn(batch, channels, *size), torch.randn(channels, 1, *(k,) * ndim)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    g = torch.randn_like(x)
    conv, ours = CONV[ndim], OURS[ndim]

    def forward(function: Callable[..., torch.Tensor], *options: int) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return function(x, w, None, 1, p, 1, *options)

        return run

    def both(function: Callable[..., torch.Tensor], *options: int) -> Callable[[], object]:
        xx, ww = x.detach().requires_grad_(), w.detach().requires_grad_()

        def run() -> object:
            return torch.autograd.grad(function(xx, ww, None, 1, p, 1, *options), (xx, ww), g)

        return run

    # What was chosen belongs in the table, so the private planner is asked too.
    plans = [_depthwise_run.planned(x, w, 1, p, 1, needs, "auto") for needs in ((False, False), (True, True))]
    return {
        "shape": list(x.shape),
        "kernel": k,
        "channels_last": last,
        "forms": {"forward": plans[0].forward, "training": [plans[1].forward, plans[1].grad_x, plans[1].grad_w]},
        "forward": paired(forward(conv, channels), forward(ours), seconds),
        "training": paired(both(conv, channels), both(ours), seconds),
    }


def table(rows: list[dict]) -> str:
    head = (
        "| input | k | forward conv → ours (ms) | times faster | forward + backward conv → ours (ms) | times faster |"
    )
    lines = [head + " forms (output, dx, dw) |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        cells = [
            "×".join(map(str, row["shape"])) + (" channels-last" if row["channels_last"] else ""),
            str(row["kernel"]),
        ]
        for part in ("forward", "training"):
            m = row[part]
            cells.append(
                f"{m['conv_ms']:.3g} → {m['ours_ms']:.3g} (best {m['conv_best_ms']:.3g} → {m['ours_best_ms']:.3g})"
            )
            cells.append(f"{m['ratio']:.2f} [{m['ratio_low']:.2f}, {m['ratio_high']:.2f}], best {m['ratio_best']:.2f}")
        cells.append(", ".join(row["forms"]["training"]))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="per side of every comparison")
    parser.add_argument("--out", type=Path, help="folder for depthwise-cpu-<threads>.json and .md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    about = {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "threads": args.threads,
        "torch": torch.__version__,
        "dtype": "float32",
        "load at the start": f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores",
    }
    rows = []
    for case in CASES:
        rows.append(measure(case, args.seconds))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
        if args.out:  # after every case, so that an interrupted run keeps what it measured
            write(args.out / f"depthwise-cpu-{args.threads}", about, rows)


def write(path: Path, about: dict, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    said = ", ".join(f"{key} {value}" for key, value in about.items())
    note = "Medians; ratios are medians of pairs [quartiles]; best is the fastest run of each side."
    text = f"# Depthwise convolution against `F.conv*d`\n\n{said}. {note}\n\n{table(rows)}\n"
    path.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
