"""Where the time of a network goes, and how much of the machine it uses (Lavin 2024, arXiv 2404.03617).

With R operations a second at full use of the machine, two for each multiplication,

    latency = ops / (R · e),

e being the computational efficiency. The *gap* is 1 / e: how many times longer something takes than its operations
need. R is measured on the machine at hand, not taken from a data sheet.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchconv._common import check, check_positive, require
from torchconv.analysis.ceiling import cache_bytes
from torchconv.analysis.count import ModuleCounts, count
from torchconv.analysis.latency import latency
from torchconv.analysis.section import Picture, Section
from torchconv.analysis.waterline import Machine, Trace, Waterline, trace
from torchconv.catalog import part


@dataclass(frozen=True)
class Timed:
    """Something that did ``ops`` operations in ``seconds``; ``accuracy`` if it is a classifier."""

    name: str
    ops: float
    seconds: float
    accuracy: float | None = None


def timed(name: str, model: nn.Module, x: Tensor, accuracy: float | None = None, repeats: int = 20) -> Timed:
    """Count a network's operations for an image and measure its time for one, in a batch.

    Args:
        name: what to call it.
        model: any module.
        x: the batch, where the model is.
        accuracy: of the classifier, to draw it with.
        repeats: calls that are timed; the median counts.
    """
    check(len(x) > 0, "x", tuple(x.shape), "pass at least one image")
    seconds = latency(model, x, repeats=repeats).median_ms / 1e3
    return Timed(name, 2 * count(model, x).macs / len(x), seconds / len(x), accuracy)


@part(
    "efficiency-gap",
    paper="convfirst",
    kind="analysis",
    dims=(1, 2, 3),
    keywords="computational efficiency gap plot latency operations peak throughput utilisation",
)
def efficiency_gap(records: Sequence[Timed], peak: float) -> list[dict[str, Any]]:
    """Time at full use of the machine beside the measured one.

    Args:
        records: networks, or blocks of one.
        peak: operations a second at full use: ``Machine.measured().ops``.

    Returns:
        A row a record: ``name``, ``accuracy``, ``ideal`` and ``measured`` in milliseconds, ``efficiency``, ``gap``.

    Raises:
        ValueError: a time or the peak is not positive.

    Example:
        >>> round(efficiency_gap([Timed("net", ops=2e9, seconds=0.1)], peak=1e11)[0]["gap"], 3)
        5.0
    """
    check(peak > 0, "peak", peak, "must be positive")
    rows = []
    for record in records:
        check(record.seconds > 0, "seconds", record.seconds, f"{record.name}: must be positive")
        ideal = record.ops / peak
        rows.append(
            {
                "name": record.name,
                "accuracy": record.accuracy,
                "ideal": ideal * 1e3,
                "measured": record.seconds * 1e3,
                "efficiency": ideal / record.seconds,
                "gap": record.seconds / ideal if ideal else None,
            }
        )
    return rows


def gap_figure(rows: Sequence[dict[str, Any]]) -> Any:
    """The rows of :func:`efficiency_gap` as a matplotlib ``Figure``.

    Each is a line from the time that its operations need (hollow) to the one that it takes (filled), on a logarithmic
    axis, at the height of its accuracy, or one below the other where accuracies are missing.
    """
    require("matplotlib", "compare")
    from matplotlib.figure import Figure

    shown = [row for row in rows if row["ideal"] > 0]
    graded = bool(shown) and all(row["accuracy"] is not None for row in shown)
    figure = Figure(figsize=(7.5, 3.6 if graded else 1.2 + 0.22 * len(shown)), layout="constrained")
    axes: Any = figure.subplots()
    for number, row in enumerate(shown):
        height = row["accuracy"] if graded else number
        color = f"C{number % 10}" if graded else "C0"
        axes.plot([row["ideal"], row["measured"]], [height, height], color=color, lw=1.2)
        axes.plot(row["ideal"], height, "o", markerfacecolor="white", color=color)
        axes.plot(row["measured"], height, "o", color=color)
        if graded:
            axes.annotate(row["name"], (row["ideal"], height), (6, 3), textcoords="offset points", fontsize=8)
    if graded:
        axes.set(ylabel="accuracy")
    else:
        axes.set_yticks(range(len(shown)), [row["name"] for row in shown], fontsize=7)
        axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set(xscale="log", xlabel="ms: hollow what the operations need, filled what it takes")
    return figure


# -- the blocks of one network -----------------------------------------------------------------------------------------


def block_times(model: nn.Module, x: Tensor, repeats: int = 7, seconds: float = 1.0) -> dict[str, float]:
    """Least milliseconds spent inside each named module in a forward pass, children included.

    The least, not the median: it is set beside a peak that is the best of several runs too, and what other programs
    take from the machine is no property of the network.

    Args:
        model: in eval mode.
        x: one input, on the CPU or a CUDA device. There the device is waited for around every module, so that short
            modules show what it costs to start them.
        repeats: at least so many passes, ≥ 1, after one to warm up.
        seconds: go on until so much time was spent, for up to ten times as many passes.

    Raises:
        ValueError: ``x`` is on another device, or ``repeats`` is not positive.
    """
    check_positive("repeats", repeats)
    if x.device.type not in ("cpu", "cuda"):
        raise ValueError(f"x on {x.device}: modules are timed one by one on a CPU or CUDA device")
    wait: Callable[[], None] = torch.cuda.synchronize if x.device.type == "cuda" else lambda: None
    names = {m: n for n, m in model.named_modules() if n}
    begun: dict[nn.Module, list[float]] = {m: [] for m in names}
    spent: Counter[str] = Counter()

    def start(module: nn.Module, *_: Any) -> None:
        wait()
        begun[module].append(time.perf_counter())

    def stop(module: nn.Module, *_: Any) -> None:
        wait()
        spent[names[module]] += (time.perf_counter() - begun[module].pop()) * 1e3  # type: ignore[assignment]

    handles = [m.register_forward_pre_hook(start) for m in names] + [m.register_forward_hook(stop) for m in names]
    passes: list[dict[str, float]] = []
    until = time.perf_counter() + seconds
    try:
        with torch.no_grad():
            while len(passes) <= repeats or (time.perf_counter() < until and len(passes) <= 10 * repeats):
                spent.clear()
                model(x)
                passes.append(dict(spent))
    finally:
        for handle in handles:
            handle.remove()
    return {name: min(p[name] for p in passes[1:] if name in p) for name in passes[-1]}


def blocks_of(model: nn.Module, fewest: int = 3) -> list[str]:
    """Names of modules that divide the network, in its order: its residual or other repeated blocks where it has them.

    Args:
        model: any module.
        fewest: open modules until there are so many.
    """
    level = list(model.named_children())
    while True:
        opened = {n for n, m in level if _repeats(m)}
        if not opened and len(level) < fewest:
            opened = {n for n, m in level if any(True for _ in m.children())}
        if not opened:
            return [n for n, m in level if not isinstance(m, nn.Identity | nn.Dropout)]
        level = [
            item
            for n, m in level
            for item in ([(f"{n}.{c}", child) for c, child in m.named_children()] if n in opened else [(n, m)])
        ]


def _repeats(module: nn.Module) -> bool:
    """Whether ``module`` is a row of blocks, or holds one: two composed modules of one class."""
    rows = [m for m in (module, *module.children()) if isinstance(m, nn.Sequential | nn.ModuleList)]
    for row in rows:
        kinds = [type(m) for m in row if any(True for _ in m.children())]
        if len(set(kinds)) < len(kinds):
            return True
    return False


def section(model: nn.Module, x: Tensor) -> Section:
    """Where the time goes, block by block: operations, bytes, intensity, time, efficiency, and what limits it.

    Args:
        model: in eval mode.
        x: the input that is timed, on the CPU or a CUDA device.

    Raises:
        ValueError: the model has no parts that run, or ``x`` is on another device.
    """
    names = blocks_of(model)
    check(bool(names), "model", type(model).__name__, "has no parts whose time could be told apart")
    times, counts, ran = block_times(model, x), count(model, x), trace(model, x)
    machine = Machine.measured(str(x.device), x.dtype)
    rows = [
        _row(name, counts.by_module[name], times[name], ran, machine)
        for name in names
        if times.get(name) and name in counts.by_module
    ]
    total = sum(row["ms"] for row in rows)
    for row in rows:
        row["share of time"] = row["ms"] / total
    line = Waterline(tuple(ran.kernels), machine, total / 1e3)
    fused = Waterline(tuple(ran.fused([row["block"] for row in rows])), machine)
    gaps = efficiency_gap(
        [Timed(r["block"], _ops(counts.by_module[r["block"]]), r["ms"] / 1e3) for r in rows], machine.ops
    )
    cache = cache_bytes(str(x.device))
    pictures = [
        _picture(rows),
        Picture(
            "gap",
            gap_figure(gaps),
            "From the time that a block's operations need at the peak to the time that it takes: long lines are "
            "where kernels, not operations, cost time.",
            "Lines of the blocks: ideal against measured time",
        ),
        Picture(
            "waterline",
            line.figure(),
            "A bar a kernel, in order: as wide as its bytes take, as high as its operations a byte. Bars under the "
            "waterline (blue) wait for memory whatever their code; fusing them with their neighbours lifts them.",
            "Bars of the kernels: memory time against operations a byte, and the waterline",
        ),
    ]
    return Section(
        key="efficiency",
        title="Where the time goes",
        verdict=f"{_most(rows)}; the whole network runs at {100 * (line.efficiency or 0):.0f} %, memory would allow "
        f"{100 * line.attainable:.0f} %.",
        reading="Efficiency is the time that a block's operations would take at the measured peak of this machine "
        f"({machine.ops / 1e9:.0f} GFLOP/s, a large matrix product), over the time it took, at batch {len(x)}. Memory "
        f"moves {machine.bandwidth / 1e9:.0f} GB/s (a large copy), so that kernels below {machine.waterline:.3g} "
        "operations a byte wait for it; 'attainable' is the efficiency that this leaves, 'fused' the one if the block "
        f"were a single kernel. {_cached(ran, cache)}After Lavin 2024, arXiv 2404.03617.",
        level="note",
        tables={"blocks": rows, "kernels": line.rows()},
        pictures=pictures,
        data={
            "peak_gflops": machine.ops / 1e9,
            "bandwidth_gbs": machine.bandwidth / 1e9,
            "waterline": machine.waterline,
            "cache_bytes": cache,
            "efficiency": line.efficiency,
            "attainable": line.attainable,
            "attainable_fused": fused.attainable,
            "under_water": line.under_water,
            "ms": total,
        },
    )


def _most(rows: list[dict[str, Any]]) -> str:
    """Where most of the time goes: the stage, if there are several, and the slowest block."""
    stages: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        stages.setdefault(row["block"].rpartition(".")[0] or row["block"], []).append(row)
    name, stage = max(stages.items(), key=lambda item: sum(row["ms"] for row in item[1]))
    if len(stage) == 1 or sum(row["ms"] for row in stage) > 0.75 * sum(row["ms"] for row in rows):
        stage = [max(rows, key=lambda row: row["ms"])]
        name = stage[0]["block"]
    ms, share = (sum(row[key] for row in stage) for key in ("ms", "share of time"))
    efficiency = sum(row["efficiency"] * row["ms"] for row in stage) / ms
    return f"{100 * share:.0f} % of the time is spent in {name} at {100 * efficiency:.0f} % efficiency"


def _ops(work: ModuleCounts) -> int:
    """What kernels do: convolutions, matrix products, Fourier transforms."""
    return work.convolution + work.matmul + work.fft


def _row(name: str, work: ModuleCounts, ms: float, ran: Trace, machine: Machine) -> dict[str, Any]:
    apart = Waterline(tuple(ran.of(name)), machine)
    moved = sum(k.bytes for k in apart.kernels)
    fused = Waterline(tuple(ran.whole(name)), machine)
    return {
        "block": name,
        "parameters": work.params,
        "MFLOP": work.flops / 1e6,
        "MB": moved / 1e6,
        "op/byte": apart.level if moved else None,
        "ms": ms,
        "GFLOP/s": work.flops / ms / 1e6,
        "efficiency": _ops(work) / (ms / 1e3) / machine.ops,
        "attainable": apart.attainable if moved else None,
        "attainable, fused": fused.attainable if moved else None,
    }


def _cached(ran: Trace, cache: int | None) -> str:
    largest = max((k.bytes for k in ran.kernels), default=0)
    if cache is None or largest > cache:
        return ""
    return (
        f"No kernel touches more than {largest / 1e6:.1f} MB, and the cache holds {cache / 1e6:.0f} MB: maps may stay "
        "in it, and blocks may beat what memory would allow. "
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
        "A block's width is its time, its height the share of the peak that it reaches; the area is its operations. "
        "Pooling and the like take time without operations that count: width, no height.",
        "Bars of the blocks: time against efficiency",
    )
