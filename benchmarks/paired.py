"""Paired, interleaved timing and result files, for the scripts beside this one."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def paired(sides: dict[str, Callable[[], object]], seconds: float, device: str = "cpu") -> dict[str, dict[str, float]]:
    """Milliseconds of each side, run in rotating order after a warm-up, and how many times faster than the first.

    ``ratio`` is the median over rounds of the first side's time over this side's, with quartiles; ``best_ms`` and
    ``ratio_best`` compare the fastest runs, what the machine does undisturbed.
    """

    def once(function: Callable[[], object]) -> float:
        if device == "cpu":
            begin = time.perf_counter()
            function()
            return (time.perf_counter() - begin) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)

    names = list(sides)
    for function in sides.values():
        function()
        function()
    times: dict[str, list[float]] = {name: [] for name in names}
    stop = time.perf_counter() + seconds * len(names)
    while len(times[names[0]]) < 5 or (time.perf_counter() < stop and len(times[names[0]]) < 1000):
        turn = len(times[names[0]]) % len(names)
        for name in names[turn:] + names[:turn]:
            times[name].append(once(sides[name]))
    found = {}
    for name in names:
        ratios = [first / this for first, this in zip(times[names[0]], times[name], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        found[name] = {
            "ms": statistics.median(times[name]),
            "best_ms": min(times[name]),
            "ratio": middle,
            "ratio_low": low,
            "ratio_high": high,
            "ratio_best": min(times[names[0]]) / min(times[name]),
            "rounds": len(ratios),
        }
    return found


def about(device: str = "cpu") -> dict[str, Any]:
    """The date and what the numbers were measured on."""
    if device == "cpu":
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else platform.processor()
    else:
        name = torch.cuda.get_device_name()
    found = {"date": datetime.date.today().isoformat(), "device": name, "torch": torch.__version__}
    return {**found, "threads": torch.get_num_threads()} if device == "cpu" else found


def cell(one: dict[str, float]) -> str:
    """Times and ratio of a side as a table's cell."""
    ratio = f"{one['ratio']:.2f} [{one['ratio_low']:.2f}, {one['ratio_high']:.2f}]"
    return f"{one['ms']:.3g} (best {one['best_ms']:.3g}), {ratio}, best {one['ratio_best']:.2f}"


def write(path: Path, title: str, machine: dict[str, Any], note: str, rows: list[dict[str, Any]], table: str) -> None:
    """``path`` with .json and .md."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"about": machine, "rows": rows}, indent=1) + "\n"
    path.with_suffix(".json").write_text(text, encoding="utf-8")
    said = ", ".join(f"{key} {value}" for key, value in machine.items())
    path.with_suffix(".md").write_text(f"# {title}\n\n{said}. {note}\n\n{table}\n", encoding="utf-8")
