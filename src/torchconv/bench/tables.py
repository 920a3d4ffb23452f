"""The result of ``bench ops`` as a table for a page and as a roofline plot."""

from __future__ import annotations

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
    m, roof = result["machine"], result["ceiling"]
    device = m.get("gpu") if result["device"].startswith("cuda") else f"{m.get('cpu')}, {m.get('threads')} threads"
    return (
        f"{device}, torch {m.get('torch')}, {result['dtype']}; measured ceilings {roof['gflops']:.0f} GFLOP/s and "
        f"{roof['gbs']:.0f} GB/s"
    )


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
