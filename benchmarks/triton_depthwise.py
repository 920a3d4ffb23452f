"""The Triton depthwise kernels against cuDNN on a GPU: forward and forward + backward, and the fused Inception layer.

Both sides of a pair run in turn on the same tensors after a warm-up and are timed by events of the device; medians and
the median of the pairs' ratios (with its quartiles) are reported, and the largest error against float32. ``cudnn`` is
``F.conv2d`` with as many groups as channels, with ``torch.backends.cudnn.benchmark`` on; the channels-last side is the
same on channels-last data, so that the better of cuDNN's layouts is in the table.

    python benchmarks/triton_depthwise.py --out benchmarks/results
    python benchmarks/triton_depthwise.py --sweep    # other tile shapes, to tune the kernels
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from torchconv.kernels import depthwise_conv2d, inception_conv

# (batch, channels, size, kernel)
CASES = [
    *((32, 96, 56, k) for k in (7, 13, 31)),
    *((32, 384, 14, k) for k in (7, 13)),
    (64, 64, 56, 31),
    (32, 192, 28, 29),
    (8, 128, 112, 51),
    (64, 768, 7, 13),
]
LAYERS = [(64, 96, 56), (64, 192, 28), (64, 384, 14)]
Run = Callable[[], object]


def milliseconds(run: Run) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def paired(one: Run, other: Run, rounds: int) -> dict[str, float]:
    for _ in range(5):
        one(), other()
    torch.cuda.synchronize()
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        for side, run in ((0, one), (1, other))[:: 1 if number % 2 else -1]:
            times[side].append(milliseconds(run))
    low, middle, high = statistics.quantiles([a / b for a, b in zip(*times, strict=True)], n=4)
    medians = [statistics.median(t) for t in times]
    return {"cudnn_ms": medians[0], "ours_ms": medians[1], "ratio": middle, "ratio_low": low, "ratio_high": high}


def passes(function: Callable[..., torch.Tensor], inputs: list[torch.Tensor], g: torch.Tensor) -> tuple[Run, Run]:
    """The forward pass without gradients, and both passes."""
    tracked = [t.detach().requires_grad_() for t in inputs]

    def forward() -> object:
        with torch.no_grad():
            return function(*inputs)

    return forward, lambda: torch.autograd.grad(function(*tracked), tracked, g)


def error(function: Callable[..., torch.Tensor], exact: Callable[..., torch.Tensor], inputs: list, g: torch.Tensor) -> float:  # fmt: skip # noqa: E501
    """The largest relative error of the output and the gradients, against float32 without TF32."""
    results = []
    for run, kind in ((function, g.dtype), (exact, torch.float32)):
        leaves = [t.detach().to(kind).requires_grad_() for t in inputs]
        out = run(*leaves)
        results.append((out, *torch.autograd.grad(out, leaves, g.to(kind))))
    pairs = zip(*results, strict=True)
    return max(((a.float() - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def measure(shape: tuple[int, int, int, int], dtype: torch.dtype, rounds: int, both_layouts: bool) -> list[dict]:
    n, c, size, k = shape
    x = torch.randn(n, c, size, size, device="cuda").to(dtype)
    w = (torch.randn(c, 1, k, k, device="cuda") / k).to(dtype)
    g = torch.randn(n, c, size, size, device="cuda").to(dtype)

    def ours(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return depthwise_conv2d(x, w, padding="same", backend="triton")

    def cudnn(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, w, padding="same", groups=c)

    rows = []
    for last in (False, True) if both_layouts else (False,):
        layout = torch.channels_last if last else torch.contiguous_format
        inputs, gradient = [x.contiguous(memory_format=layout), w], g.contiguous(memory_format=layout)
        sides = [passes(function, inputs, gradient) for function in (cudnn, ours)]
        row = {"input": f"{n}×{c}×{size}²", "kernel": k, "dtype": str(dtype).split(".")[1], "channels_last": last}
        row["forward"], row["training"] = (paired(a, b, rounds) for a, b in zip(*sides, strict=True))
        rows.append(row | {"error": error(ours, cudnn, inputs, gradient)})
    return rows


def layer(shape: tuple[int, int, int], dtype: torch.dtype, rounds: int, last: bool) -> dict:
    n, c, size = shape
    width = c // 8
    layout = torch.channels_last if last else torch.contiguous_format
    x, g = (torch.randn(n, c, size, size, device="cuda").to(dtype).contiguous(memory_format=layout) for _ in range(2))
    kernels = ((3, 3), (1, 11), (11, 1))
    weights = [(torch.randn(width, 1, *k, device="cuda") / 3).to(dtype) for k in kernels]

    def fused(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return inception_conv(x, weights, backend="triton")

    def native(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return inception_conv(x, weights, backend="native")

    sides = [passes(function, [x, *weights], g) for function in (native, fused)]
    row = {"input": f"{n}×{c}×{size}²", "kernel": "3², 1×11, 11×1", "dtype": str(dtype).split(".")[1]}
    row["forward"], row["training"] = (paired(a, b, rounds) for a, b in zip(*sides, strict=True))
    return row | {"channels_last": last, "error": error(fused, native, [x, *weights], g)}


def table(rows: list[dict]) -> str:
    head = "| input | k | type | forward cuDNN → ours (ms) | times faster | both passes (ms) | times faster | error |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        cells = [row["input"] + (" channels-last" if row["channels_last"] else ""), str(row["kernel"]), row["dtype"]]
        for part in ("forward", "training"):
            m = row[part]
            cells.append(f"{m['cudnn_ms']:.3g} → {m['ours_ms']:.3g}")
            cells.append(f"{m['ratio']:.2f} [{m['ratio_low']:.2f}, {m['ratio_high']:.2f}]")
        lines.append("| " + " | ".join([*cells, f"{row['error']:.1g}"]) + " |")
    return "\n".join(lines)


def sweep(rounds: int) -> None:
    """Windows of a program against time, for the kernels' author."""
    from torchconv.kernels import _depthwise_triton as kernels

    usual = kernels._ROWS
    for rows in (32, 64, 128, 256):
        kernels._ROWS = rows
        print(f"{rows} windows a program{' (as released)' if rows == usual else ''}")
        for shape in CASES[1:5]:
            print(table(measure(shape, torch.bfloat16, rounds, False)).splitlines()[-1], flush=True)
    kernels._ROWS = usual


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, help="folder for triton-depthwise-<device>.json and .md")
    parser.add_argument("--sweep", action="store_true", help="time other tile shapes instead")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: torch.cuda.is_available() is False")
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    about = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
    }
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    if args.sweep:
        return sweep(args.rounds)
    rows = []
    print(table([]))
    for dtype in (torch.bfloat16, torch.float16):
        for shape in CASES:
            new = measure(shape, dtype, args.rounds, dtype == torch.bfloat16)
            print("\n".join(table(new).splitlines()[2:]), flush=True)
            rows += new
        for shape in LAYERS:
            for last in (False, True):
                rows.append(layer(shape, dtype, args.rounds, last))
                print(table(rows).splitlines()[-1], flush=True)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        path = args.out / f"triton-depthwise-{about['device'].replace(' ', '-')}"
        path.with_suffix(".json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
        said = ", ".join(f"{key} {value}" for key, value in about.items())
        path.with_suffix(".md").write_text(f"# Triton depthwise kernels against cuDNN\n\n{said}.\n\n{table(rows)}\n")


if __name__ == "__main__":
    main()
