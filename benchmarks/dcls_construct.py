"""Construction of DCLS kernels with gradients against the authors' package ``dcls`` 0.1.1 (``pip install dcls``).

python benchmarks/dcls_construct.py --seconds 3 --out benchmarks/results/dcls-construct-cpu
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from DCLS.construct.modules import Dcls2d
from paired import about, cell, paired, write

from torchconv.ops._dcls_kernel import dcls_kernel

# (channels, size, weights a kernel, version)
CASES = [(96, 17, 34, kind) for kind in ("v0", "v1", "max", "gauss")] + [(384, 17, 34, "gauss"), (64, 7, 5, "gauss")]
NOTE = (
    "Depthwise. Milliseconds on one thread: median (fastest), then how many times faster than the package: median of "
    "rounds [quartiles], and of the fastest runs. Kernels and gradients agree to 1e-4. Other jobs shared the machine."
)


def measure(case: tuple[int, int, int, str], seconds: float) -> dict[str, Any]:
    channels, size, count, kind = case
    official = Dcls2d(
        channels, channels, count, dilated_kernel_size=size, padding=size // 2, groups=channels, version=kind
    )
    weight, positions = official.weight, official.P
    sigma = getattr(official, "SIG", None) if kind in ("max", "gauss") else None
    tensors = [t for t in (weight, positions, sigma) if t is not None]
    g = torch.randn(channels, 1, size, size)

    def package() -> torch.Tensor:
        return official.DCK(weight, positions, sigma)

    def ours() -> torch.Tensor:
        return dcls_kernel(weight, positions, sigma, (size, size), kind, axis_order="official")

    def both(function: Callable[[], torch.Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(function(), tensors, g)

    def without(function: Callable[[], torch.Tensor]) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return function()

        return run

    torch.testing.assert_close(ours(), package(), rtol=1e-4, atol=1e-5)
    for a, b in zip(both(ours)(), both(package)(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
    return {
        "case": f"{channels} kernels, S = {size}, m = {count}, {kind}",
        "forward": paired({"dcls": without(package), "ours": without(ours)}, seconds),
        "training": paired({"dcls": both(package), "ours": both(ours)}, seconds),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| case | forward dcls | forward ours | with gradients dcls | with gradients ours |", "|" + "---|" * 5]
    for row in rows:
        cells = [row["case"]]
        for part in ("forward", "training"):
            one = row[part]["dcls"]
            cells += [f"{one['ms']:.3g} ({one['best_ms']:.3g})", cell(row[part]["ours"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="per side of every comparison")
    parser.add_argument("--out", type=Path, help="path of the result files, without their ending")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    machine = {**about(), "dcls": version("dcls")}
    rows = []
    for case in CASES:
        rows.append(measure(case, args.seconds))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
        if args.out:
            title = "Construction of DCLS kernels against the authors' package"
            write(args.out, title, machine, NOTE, rows, table(rows))


if __name__ == "__main__":
    main()
