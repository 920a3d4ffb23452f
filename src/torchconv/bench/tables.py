"""The results of ``bench ops`` and ``bench models`` as tables for a page, and the roofline plot."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchconv._common import atomic_write, require


def pairs(result: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(our row, another form's row) of the same case and pass."""
    ours = {(r["op"], r["case"], r["pass"]): r for r in result["rows"] if r["form"] == "torchconv"}
    for row in result["rows"]:
        if row["form"] != "torchconv":
            yield ours[row["op"], row["case"], row["pass"]], row


def where(result: dict[str, Any]) -> str:
    """The machine and its measured ceilings, in a line."""
    roof = result["ceiling"]
    device = _device(result["machine"], result["device"])
    return f"{device}, {result['dtype']}; measured ceilings {roof['gflops']:.0f} GFLOP/s and {roof['gbs']:.0f} GB/s"


def _device(machine: dict[str, Any], device: str) -> str:
    what = (
        machine.get("gpu") if device.startswith("cuda") else f"{machine.get('cpu')}, {machine.get('threads')} threads"
    )
    return f"{what}, torch {machine.get('torch')}"


def markdown(result: dict[str, Any]) -> str:
    """A table of all pairs: times, how many times faster ours is with its interval, memory, use of the machine."""
    lines = [
        f"{where(result)}.\n",
        "| operator | case | pass | ours, ms | against | its ms | ours is faster by | memory, MB (ours / its) "
        "| GFLOP/s | GB/s | of the bound |",
        "|---|---|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for ours, other in pairs(result):
        low, high = other["speedup_interval"]
        faster = f"{other['speedup']:.2f}× ({low:.2f} to {high:.2f})"
        if other["speedup"] < 1 and high < 1:
            faster = f"**{faster}**"
        memory = f"{ours['memory_bytes'] / 1e6:.1f} / {other['memory_bytes'] / 1e6:.1f}"
        note = "" if other["agrees"] else f" (differs by {other['max_rel_diff']:.0e})"
        lines.append(
            f"| `{ours['op']}` | {ours['case']} | {ours['pass']} | {ours['ms']:.2f} | {other['form']}{note} "
            f"| {other['ms']:.2f} | {faster} | {memory} | {ours['gflops']:.1f} | {ours['gbs']:.1f} "
            f"| {100 * ours['of_bound']:.0f} % {ours['bound']} |"
        )
    lines += [f"\nLeft out: `{s['op']}` {s['case']}: {s['why']}" for s in result["skipped"]]
    return "\n".join(lines) + "\n"


def models_where(result: dict[str, Any]) -> str:
    """The machine and the options of a run of ``bench models``, in a line."""
    given = result["input"]
    layout = ", channels-last" if given["channels_last"] else ""
    return f"{_device(result['machine'], given['device'])}, {given['dtype']}{layout}, batches of {given['batch']}"


def models_columns(result: dict[str, Any]) -> list[str]:
    """Headings of :func:`model_lines`."""
    batch = result["input"]["batch"]
    names = ["network", "input", "M params", "G MACs", "ms", "p95", "faster", f"a second ({batch})", "faster", "MB"]
    return names + (["training ms", "faster", "MB"] if result["input"]["training"] else [])


def model_lines(row: dict[str, Any]) -> list[list[str]]:
    """A line for our network and one for its peer, with its time over ours and the interval under "faster"."""
    lines = []
    for side in ("ours", "peer"):
        fact = row[side]
        if fact is None:
            continue

        def faster(kind: str, side: str = side) -> str:
            found = row["speedup"].get(kind) if side == "peer" else None
            return "{:.2f}× ({:.2f} to {:.2f})".format(*found) if found else ""

        line = [fact["model"], "×".join(map(str, row["shape"])) if side == "ours" else ""]
        line += [f"{fact['params'] / 1e6:.2f}", f"{fact['macs'] / 1e9:.3f}"]
        line += [f"{fact['latency_ms']:.1f}", f"{fact['latency_p95_ms']:.1f}", faster("latency")]
        line += [f"{fact['throughput']:.1f}", faster("batch"), f"{fact['memory_bytes'] / 1e6:.1f}"]
        if "training_ms" in fact:
            line += [f"{fact['training_ms']:.0f}", faster("training"), f"{fact['training_memory_bytes'] / 1e6:.0f}"]
        lines.append(line)
    return lines


def models_markdown(result: dict[str, Any]) -> str:
    """The table of ``bench models``: two lines a pair, losses in bold."""
    head = models_columns(result)
    lines = [f"{models_where(result)}.\n", f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    for name, *values in (line for row in result["rows"] for line in model_lines(row)):
        lines.append(f"| `{name}` | {' | '.join(map(_marked, values))} |")
    lines += [f"\nLeft out: `{s['model']}`: {s['why']}" for s in result["skipped"]]
    return "\n".join(lines) + "\n"


def _marked(cell: str) -> str:
    """A speed-up in bold where its whole interval lies below 1."""
    found = re.fullmatch(r"[\d.]+× \([\d.]+ to ([\d.]+)\)", cell)
    return f"**{cell}**" if found and float(found[1]) < 1 else cell


def roofline(result: dict[str, Any], path: str | Path) -> None:
    """Draw the useful GFLOP/s of every form against FLOPs per byte, under the measured ceilings.

    Args:
        result: of :func:`torchconv.bench.bench_ops`.
        path: where the picture goes; its suffix says the format (.png, .svg, .pdf).
    """
    require("matplotlib", "compare")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    roof = result["ceiling"]
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    looks = {"torchconv": ("#3f51b5", "o", 28.0), "eager": ("#9e9e9e", "x", 22.0)}
    for axes, name in zip(figure.subplots(1, 2, sharey=True), ("forward", "training"), strict=True):
        rows = [r for r in result["rows"] if r["pass"] == name and r["gflops"] > 0]
        span = [r["intensity"] for r in rows] or [1.0]
        low, high = min(span) / 1.5, max(max(span), roof["ridge"]) * 1.5
        axes.plot([low, roof["ridge"], high], [low * roof["gbs"], roof["gflops"], roof["gflops"]], color="black", lw=1)
        for form, (colour, marker, size) in {**looks, "published peer or relative": ("#e65100", "^", 22.0)}.items():
            chosen = [r for r in rows if (r["form"] if r["form"] in looks else "published peer or relative") == form]
            xs, ys = [r["intensity"] for r in chosen], [r["gflops"] for r in chosen]
            axes.scatter(xs, ys, s=size, c=colour, marker=marker, label=form, linewidths=1)
        axes.set(xscale="log", yscale="log", title=name, xlabel="FLOPs per byte of the direct form")
        axes.grid(alpha=0.3, which="both", lw=0.4)
        axes.legend(fontsize=7)
    figure.axes[0].set_ylabel("useful GFLOP/s")
    figure.suptitle(where(result), fontsize=8)
    path = Path(path)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150, format=path.suffix.lstrip(".") or "png")
