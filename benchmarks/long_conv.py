"""``torchconv.kernels.long_conv`` against the obvious expression of transforms, and ``F.conv1d`` where feasible.

The obvious expression is ``irfft(rfft(x, 2 * L) * rfft(k, 2 * L))[..., :L]``. Sides run in turn on the same tensors
after a warm-up, so load from elsewhere hits all alike. Medians, and medians of the ratios of a round with quartiles.

    python benchmarks/long_conv.py --threads 1 --seconds 2 --out benchmarks/results
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from torchconv.kernels import long_conv

_DIRECT = 1 << 31  # multiply-adds up to which F.conv1d is run
# (batch, channels, length, taps): kernels as long as the sequence, then short ones on long sequences, then ragged ones.
CASES = [
    *((4, 16, 1 << p, 1 << p) for p in range(8, 17, 2)),
    (1, 4, 1 << 18, 1 << 18),
    (1, 2, 1 << 20, 1 << 20),
    (1, 4, 1 << 18, 128),
    (1, 2, 1 << 20, 1024),
    (8, 32, 784, 784),
    (8, 32, 1021, 1021),
]


def eager(x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    n = 2 * x.shape[-1]
    return torch.fft.irfft(torch.fft.rfft(x, n) * torch.fft.rfft(k, n), n)[..., : x.shape[-1]]


def direct(x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    taps = k.shape[-1]
    return F.conv1d(x, k.flip(-1).unsqueeze(1), padding=taps - 1, groups=k.shape[0])[..., : x.shape[-1]]


def rounds(sides: dict[str, Callable[[], object]], seconds: float) -> dict[str, dict[str, float]]:
    """Milliseconds of every side, run in turn with a rotating order."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for function in sides.values():
        function()
    names, end, count = list(sides), time.perf_counter() + seconds * len(sides), 0
    while count < 3 or (time.perf_counter() < end and count < 200):
        turn = count % len(names)
        for name in names[turn:] + names[:turn]:
            begin = time.perf_counter()
            sides[name]()
            times[name].append((time.perf_counter() - begin) * 1e3)
        count += 1
    ours = times["long_conv"]
    found = {}
    for name, values in times.items():
        ratios = sorted(a / b for a, b in zip(values, ours, strict=True))
        low, middle, high = statistics.quantiles(ratios, n=4)
        found[name] = {
            "ms": statistics.median(values), "best_ms": min(values),
            "ratio": middle, "ratio_low": low, "ratio_high": high, "rounds": count,
        }  # fmt: skip
    return found


def measure(case: tuple[int, int, int, int], seconds: float) -> dict[str, object]:
    batch, channels, length, taps = case
    x, k = torch.randn(batch, channels, length), torch.randn(channels, taps) / taps**0.5
    g = torch.randn_like(x)
    functions = {"expression": eager, "long_conv": long_conv}
    if batch * channels * length * taps <= _DIRECT:
        functions["conv1d"] = direct
    expected = eager(x, k)
    error = float((long_conv(x, k) - expected).abs().max() / expected.abs().max())

    def forward(function: Callable[..., torch.Tensor]) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return function(x, k)

        return run

    def both(function: Callable[..., torch.Tensor]) -> Callable[[], object]:
        xx, kk = x.clone().requires_grad_(), k.clone().requires_grad_()
        return lambda: torch.autograd.grad(function(xx, kk), (xx, kk), g)

    return {
        "batch": batch, "channels": channels, "length": length, "taps": taps, "relative_difference": error,
        "forward": rounds({n: forward(f) for n, f in functions.items()}, seconds),
        "training": rounds({n: both(f) for n, f in functions.items()}, seconds),
    }  # fmt: skip


def table(rows: list[dict]) -> str:
    lines = [
        "| B×C×L | taps | forward: long_conv (ms) | expression | conv1d | with gradients: long_conv (ms) | expression "
        "| conv1d |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"{row['batch']}×{row['channels']}×{row['length']}", str(row["taps"])]
        for part in ("forward", "training"):
            m = row[part]
            cells.append(f"{m['long_conv']['ms']:.3g} (best {m['long_conv']['best_ms']:.3g})")
            for name in ("expression", "conv1d"):
                r = m.get(name)
                said = r and f"{r['ms']:.3g}, ×{r['ratio']:.2f} [{r['ratio_low']:.2f}, {r['ratio_high']:.2f}]"
                cells.append(said or "–")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def write(path: Path, about: dict, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    said = ", ".join(f"{key} {value}" for key, value in about.items())
    note = "Medians; × is how many times the other side takes what long_conv takes, median of rounds [quartiles]."
    note += " The expression uses two transforms of 2·L samples; conv1d is left out above 2^31 multiply-adds."
    path.with_suffix(".md").write_text(f"# Long convolution\n\n{said}. {note}\n\n{table(rows)}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="per side of every comparison")
    parser.add_argument("--out", type=Path, help="folder for long_conv-cpu.json and .md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    about = {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "threads": args.threads,
        "torch": torch.__version__,
        "dtype": "float32",
    }
    rows = []
    for case in CASES:
        rows.append(measure(case, args.seconds))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
        if args.out:  # after every case, so that an interrupted run keeps what it measured
            write(args.out / "long_conv-cpu", about, rows)


if __name__ == "__main__":
    main()
