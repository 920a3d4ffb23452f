"""``causal_conv1d`` on a GPU: bandwidth against a copy, times against ``F.conv1d`` and the package causal-conv1d.

python benchmarks/triton_causal.py --out benchmarks/results/causal-gpu
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from paired import about, paired, write

from torchconv.kernels import causal_conv1d
from torchconv.kernels._triton_probe import trustworthy

CASES = [
    (batch, channels, length, k, layout, dtype)
    for batch, channels, length in [(8, 2048, 4096), (32, 1536, 1024), (1, 4096, 16384), (64, 256, 256)]
    for k in (4,)
    for layout in ("BCL", "BLC")
    for dtype in (torch.bfloat16, torch.float32)
] + [(8, 2048, 4096, k, "BCL", torch.bfloat16) for k in (2, 3, 8)]
NOTE = (
    "Bias, SiLU. Milliseconds are medians of runs in turn. Share of copy: bytes that must move (forward x and y; "
    "backward x, g, dx) over our time, as a share of the bytes a second that `y.copy_(x)` moves."
)


def measure(case: tuple[Any, ...], seconds: float) -> dict[str, Any]:
    batch, channels, length, k, layout, dtype = case
    vectors = layout == "BLC"
    shape = (batch, length, channels) if vectors else (batch, channels, length)
    made = {"device": "cuda", "dtype": dtype}
    x, w, b = (torch.randn(*s, **made).requires_grad_() for s in (shape, (channels, k), (channels,)))
    g, target = torch.randn(shape, **made), torch.empty(shape, **made)

    def conv() -> torch.Tensor:
        rows = x.transpose(1, 2) if vectors else x
        y = F.silu(F.conv1d(rows, w[:, None], b, padding=k - 1, groups=channels)[..., :length])
        return y.transpose(1, 2) if vectors else y

    def ours() -> torch.Tensor:
        return causal_conv1d(x, w, b, "silu", layout=layout)

    forms: dict[str, Any] = {"conv": conv, "ours": ours}
    if importlib.util.find_spec("causal_conv1d") and 2 <= k <= 4:
        from causal_conv1d import causal_conv1d_fn

        def package() -> torch.Tensor:
            y = causal_conv1d_fn(x.transpose(1, 2) if vectors else x, w, b, activation="silu")
            return y.transpose(1, 2) if vectors else y

        forms["causal-conv1d"] = package
    torch.testing.assert_close(ours().float(), conv().float(), rtol=0.02, atol=0.02)
    with torch.no_grad():
        forward = paired({**forms, "copy": lambda: target.copy_(x)}, seconds, "cuda")
    outputs = {name: form() for name, form in forms.items()}
    backward = paired(
        {n: lambda y=y: torch.autograd.grad(y, (x, w, b), g, retain_graph=True) for n, y in outputs.items()},
        seconds,
        "cuda",
    )
    copy = forward["copy"]["ms"]
    return {
        "case": f"{'×'.join(map(str, shape))} {layout}, k {k}, {str(dtype).removeprefix('torch.')}",
        "forward": forward,
        "backward": backward,
        "share_forward": copy / forward["ours"]["ms"],
        "share_backward": 1.5 * copy / backward["ours"]["ms"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    names = list(rows[0]["backward"])
    order = f"{', '.join(names)} (ms)"
    lines = [
        f"| case | forward {order} | share of copy | backward {order} | share of copy |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        forward, backward = (
            ", ".join(f"{row[p][n]['ms']:.3g}" for n in names if n in row[p]) for p in ("forward", "backward")
        )
        shares = (f"{row[s]:.0%}" for s in ("share_forward", "share_backward"))
        lines.append("| {} | {} | {} | {} | {} |".format(row["case"], forward, next(shares), backward, next(shares)))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="per side of every comparison")
    parser.add_argument("--out", type=Path, help="path of the result files, without their ending")
    args = parser.parse_args()
    if not (torch.cuda.is_available() and trustworthy("causal", torch.device("cuda"))):
        parser.exit(2, "needs a CUDA device on which the Triton kernels agree with PyTorch\n")
    print(about("cuda"), flush=True)
    rows = []
    for case in CASES:
        rows.append(measure(case, args.seconds))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
        if args.out:
            write(args.out, "Short causal convolution on a GPU", about("cuda"), NOTE, rows, table(rows))


if __name__ == "__main__":
    main()
