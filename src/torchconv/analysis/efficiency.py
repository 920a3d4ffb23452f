"""Where the time of a network goes, and how much of the machine each block uses (after Lavin 2024, arXiv 2404.03617).

The time of a block at full use of the machine is its FLOPs over the peak; its *efficiency* is that time over the
measured one. The peak is measured on the machine at hand, not taken from a data sheet.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from torchconv._common import require
from torchconv.analysis.ceiling import ceiling
from torchconv.analysis.count import count
from torchconv.analysis.section import Picture, Section


def block_times(model: nn.Module, x: Tensor, repeats: int = 7) -> dict[str, float]:
    """Median milliseconds spent inside each named module, children included, over ``repeats`` forward passes.

    Args:
        model: in eval mode.
        x: one input on the CPU; on other devices modules run asynchronously and cannot be timed this way.
        repeats: ≥ 1.

    Raises:
        ValueError: ``x`` is not on the CPU.
    """
    if x.device.type != "cpu":
        raise ValueError(f"x on {x.device}: modules are timed one by one on the CPU only")
    names = {m: n for n, m in model.named_modules() if n}
    begun: dict[nn.Module, float] = {}
    spent: dict[str, list[float]] = {n: [] for n in names.values()}

    def start(module: nn.Module, *_: Any) -> None:
        begun[module] = time.perf_counter()

    def stop(module: nn.Module, *_: Any) -> None:
        spent[names[module]].append((time.perf_counter() - begun[module]) * 1e3)

    handles = [m.register_forward_pre_hook(start) for m in names] + [m.register_forward_hook(stop) for m in names]
    try:
        with torch.no_grad():
            for _ in range(repeats + 1):
                model(x)
    finally:
        for handle in handles:
            handle.remove()
    # The first pass warms up; a module that runs twice a pass counts twice.
    return {
        n: statistics.median(t[len(t) // (repeats + 1) :]) * (len(t) // (repeats + 1)) for n, t in spent.items() if t
    }


def blocks_of(model: nn.Module, fewest: int = 3) -> list[str]:
    """Names of the largest modules, next to each other, that divide the network into at least ``fewest`` blocks."""
    level = [(n, m) for n, m in model.named_children()]
    while level and len(level) < fewest:
        finer = [(f"{n}.{c}", child) for n, m in level for c, child in m.named_children()]
        if not finer:
            break
        level = finer
    return [n for n, _ in level]


def section(model: nn.Module, x: Tensor) -> Section:
    """Where the time goes, block by block.

    Args:
        model: in eval mode.
        x: the input that is timed, on the CPU.
    """
    names = blocks_of(model)
    times, counts = block_times(model, x), count(model, x)
    peak = ceiling("cpu", x.dtype)["gflops"]
    rows: list[dict[str, Any]] = []
    for name in names:
        work, ms = counts.by_module[name], times.get(name, 0.0)
        if not ms:
            continue
        rows.append(
            {
                "block": name,
                "parameters": work.params,
                "MFLOP": work.flops / 1e6,
                "ms": ms,
                "GFLOP/s": work.flops / ms / 1e6,
                "efficiency": work.flops / ms / 1e6 / peak,
            }
        )
    total = sum(row["ms"] for row in rows)
    for row in rows:
        row["share of time"] = row["ms"] / total
    slowest = max(rows, key=lambda row: row["ms"])
    whole = counts.flops / total / 1e6 / peak
    return Section(
        key="efficiency",
        title="Where the time goes",
        verdict=f"{100 * slowest['share of time']:.0f} % of the time is spent in {slowest['block']} at "
        f"{100 * slowest['efficiency']:.0f} % efficiency; the whole network runs at {100 * whole:.0f} %.",
        reading="Efficiency is the time that a block's operations would take at the measured peak of this machine "
        f"({peak:.0f} GFLOP/s, a large matrix product), over the time it took, at batch {len(x)}. Wide bars far below "
        "the line at 1 are where speed can be won without fewer operations: by other shapes, fusion or a merged form.",
        level="note",
        tables={"blocks": rows},
        pictures=[_picture(rows)],
        data={"peak_gflops": peak, "efficiency": whole, "ms": total},
    )


def _picture(rows: list[dict[str, Any]]) -> Picture:
    require("matplotlib", "compare")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    axes: Any = figure.subplots()
    left = 0.0
    for number, row in enumerate(rows):
        axes.bar(
            left, row["efficiency"], row["ms"], align="edge", color=f"C{number % 10}", edgecolor="white", linewidth=0.5
        )
        if row["share of time"] > 0.06:
            axes.text(left + row["ms"] / 2, 0.02, row["block"], ha="center", va="bottom", rotation=90, fontsize=7)
        left += row["ms"]
    axes.axhline(1, color="black", lw=1)
    axes.set(
        xlabel="time, ms", ylabel="efficiency", xlim=(0, left), ylim=(0, max(1.05, *(r["efficiency"] for r in rows)))
    )
    return Picture(
        "efficiency",
        figure,
        "A block's width is its time, its height the share of the peak that it reaches; the area is its operations.",
        "Bars of the blocks: time against efficiency",
    )
