"""``torchconv bench``: how fast are the operators on this machine?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(s) for s in text.lower().split("x"))
    except ValueError:
        sizes = ()
    if not 1 <= len(sizes) <= 3 or min(sizes, default=0) < 1:
        raise ValueError(f"size={text!r}: write one to three sides, as in 1024, 56x56 or 16x32x32")
    return sizes


def bench(
    ops: Annotated[str | None, typer.Option(help="Operators, the baseline first; all by default.")] = None,
    channels: Annotated[int, typer.Option(min=1, help="Channels.")] = 64,
    size: Annotated[str, typer.Option(help="Sides of the map: 1024, 56x56, 16x32x32.")] = "56x56",
    batch: Annotated[int, typer.Option(min=1, help="Batch size.")] = 8,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, ….")] = "cpu",
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Channels-last memory format.")] = False,
    backward: Annotated[bool, typer.Option(help="Time training passes too.")] = True,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the JSON here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time the operators as spatial mixers, all in one run and in turn.

    [bold]Examples[/bold]

      torchconv bench

      torchconv bench --ops depthwise,dcls,lsnet --channels 96 --size 28x28

      torchconv bench --size 4096 --channels 32 --json
    """
    import torch

    from torchconv._common import write_json
    from torchconv.compare.bench import bench as run

    if threads:
        torch.set_num_threads(threads)
    sizes = _sizes(size)
    chosen = tuple(s.strip() for s in ops.split(",") if s.strip()) if ops else ()
    console = Console()
    with console.status("timing …"):
        result = run(
            chosen,
            channels=channels,
            size=sizes,
            batch=batch,
            dtype=dtype,
            device=device,
            channels_last=channels_last,
            backward=backward,
        )
    if out is not None:
        write_json(out, result)
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    table = Table(box=None)
    for column in ("operator", "params", "M MACs", "forward ms", "p95", "× first", "training ms", "p95", "× first"):
        table.add_column(column, justify="left" if column == "operator" else "right")
    for row in result["rows"]:
        cells = [row["op"], f"{row['params']:,}", f"{row['macs'] / 1e6:.1f}"]
        for name in ("forward", "training"):
            if f"{name}_ms" in row:
                cells += [f"{row[f'{name}_ms']:.2f}", f"{row[f'{name}_p95_ms']:.2f}", f"{row[f'{name}_ratio']:.2f}"]
        table.add_row(*cells)
    console.print(table)
    where = result["machine"]
    console.print(
        f"{where.get('cpu', '')}, {where.get('threads', '?')} threads, torch {where.get('torch', '')}", highlight=False
    )


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("bench")(bench)
