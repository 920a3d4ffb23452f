"""``torchconv.kernels.causal_conv1d`` against ``F.conv1d`` with padding on a CPU, forward and with gradients.

python benchmarks/causal.py --threads 2 --seconds 2 --out benchmarks/results
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from paired import about, cell, paired, write

from torchconv.kernels import causal_conv1d

# (batch, channels, length, taps, layout, SiLU)
CASES = [
    (batch, channels, length, k, layout, silu)
    for batch, channels, length, k in [
        (1, 1024, 2048, 4),
        (8, 256, 1024, 4),
        (4, 768, 512, 3),
        (8, 64, 4096, 7),
        (16, 128, 64, 4),
    ]
    for layout in ("BCL", "BLC")
    for silu in (False, True)
]
NOTE = (
    "Milliseconds: median (fastest), then how many times faster than `F.conv1d(x, w, b, padding=k-1, groups=C)` cut to "
    "L, with `F.silu` after it, for B×L×C on the transposed view: median of rounds [quartiles], and of the fastest "
    "runs. GB/s: bytes of x and y over the fastest time; copy: `x.clone()`. No other job ran on the machine."
)


def measure(case: tuple[Any, ...], seconds: float) -> dict[str, Any]:
    batch, channels, length, k, layout, silu = case
    vectors, act = layout == "BLC", "silu" if silu else None
    shape = (batch, length, channels) if vectors else (batch, channels, length)
    x, w, b = (torch.randn(*s, requires_grad=True) for s in (shape, (channels, k), (channels,)))
    g = torch.randn(shape)

    def conv() -> torch.Tensor:
        rows = x.transpose(1, 2) if vectors else x
        y = F.conv1d(rows, w[:, None], b, padding=k - 1, groups=channels)[..., :length]
        y = F.silu(y) if silu else y
        return y.transpose(1, 2) if vectors else y

    def ours() -> torch.Tensor:
        return causal_conv1d(x, w, b, act, layout=layout)

    def without(function: Callable[[], torch.Tensor]) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return function()

        return run

    def both(function: Callable[[], torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(), (x, w, b), g)

    torch.testing.assert_close(ours(), conv(), rtol=1e-4, atol=1e-4)
    forward = paired({"conv": without(conv), "ours": without(ours), "copy": without(lambda: x.clone())}, seconds)
    gigabytes = 8 * x.numel() / 1e6
    return {
        "case": f"{'×'.join(map(str, shape))} {layout}, k {k}{', SiLU' if silu else ''}",
        "forward": forward,
        "training": paired({"conv": both(conv), "ours": both(ours)}, seconds),
        "gbs": {name: gigabytes / forward[name]["best_ms"] for name in ("conv", "ours", "copy")},
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| case | forward conv | forward ours | GB/s conv, ours, copy | training conv | training ours |",
        "|" + "---|" * 6,
    ]
    for row in rows:
        conv, training = row["forward"]["conv"], row["training"]["conv"]
        rates = ", ".join(f"{row['gbs'][name]:.1f}" for name in ("conv", "ours", "copy"))
        cells = [
            row["case"],
            f"{conv['ms']:.3g} ({conv['best_ms']:.3g})",
            cell(row["forward"]["ours"]),
            rates,
            f"{training['ms']:.3g} ({training['best_ms']:.3g})",
            cell(row["training"]["ours"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="per side of every comparison")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for causal-cpu-<threads>.json and .md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = []
    for case in CASES:
        rows.append(measure(case, args.seconds))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
        if args.out:
            write(
                args.out / f"causal-cpu-{args.threads}",
                "Short causal convolution against `F.conv1d`",
                about(),
                NOTE,
                rows,
                table(rows),
            )


if __name__ == "__main__":
    main()
