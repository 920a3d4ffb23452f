"""``torchconv bench ops | mixers | models``: how fast is it on this machine?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from torchconv.cli._network import place, wide

Device = Annotated[str, typer.Option(help="cpu, cuda, ….")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads.")]
ChannelsLast = Annotated[bool, typer.Option("--channels-last", help="Channels-last memory format.")]
Backward = Annotated[bool, typer.Option(help="Time training passes too.")]
Out = Annotated[Path | None, typer.Option(parser=place, metavar="FILE", help="Write the JSON here.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

benchmarks = typer.Typer(
    name="bench",
    help="How fast is it on this machine?\n\n[bold]Examples[/bold]\n\n  torchconv bench ops\n\n"
    "  torchconv bench mixers --size 28x28\n\n  torchconv bench models --filter 'lsnet*,spartan_s'",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(s) for s in text.lower().split("x"))
    except ValueError:
        sizes = ()
    if not 1 <= len(sizes) <= 3 or min(sizes, default=0) < 1:
        raise ValueError(f"size={text!r}: write one to three sides, as in 1024, 56x56 or 16x32x32")
    return sizes


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(s.strip() for s in (text or "").split(",") if s.strip())


def _prepare(threads: int | None, **files: Path | None) -> None:
    """Before long work: set the threads, see that the files can be written."""
    import torch

    from torchconv._common import check_writable

    for option, file in files.items():
        if file is not None:
            check_writable(option, file)
    if threads:
        torch.set_num_threads(threads)


@benchmarks.command("ops")
def ops_command(
    ops: Annotated[str | None, typer.Option(help="Operators and kernels; all by default.")] = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    backward: Backward = True,
    seconds: Annotated[float, typer.Option(min=0.0, help="Time for each form of each case and pass.")] = 0.3,
    threads: Threads = None,
    out: Out = None,
    plot: Annotated[
        Path | None,
        typer.Option(parser=place, metavar="FILE", help="Write the roofline plot here (.png, .svg, .pdf)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Time every operator against the obvious PyTorch expression and published packages, paired in one run.

    [bold]Examples[/bold]

      torchconv bench ops

      torchconv bench ops --ops dcls,lsnet --plot roofline.png

      torchconv bench ops --device cuda --dtype bfloat16 --json
    """
    from torchconv._common import write_json
    from torchconv.bench import bench_ops
    from torchconv.bench.tables import pairs, roofline, where

    _prepare(threads, out=out, plot=plot)
    with Console(stderr=True).status("measuring what the machine can do …") as status:
        result = bench_ops(
            _names(ops),
            device=device,
            dtype=dtype,
            backward=backward,
            min_seconds=seconds,
            progress=lambda line: status.update(f"timing {line} …"),
        )
    if out is not None:
        write_json(out, result)
    if plot is not None:
        roofline(result, plot)
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    console = wide()
    table = Table(box=None)
    for column in (
        "operator",
        "case",
        "pass",
        "against",
        "ours ms",
        "its ms",
        "faster",
        "MB",
        "its MB",
        "GFLOP/s",
        "GB/s",
    ):
        left = column in ("operator", "case", "pass", "against")
        table.add_column(column, justify="left" if left else "right", no_wrap=column == "operator")
    for ours, other in pairs(result):
        table.add_row(
            ours["op"],
            ours["case"],
            ours["pass"],
            other["form"] if other["agrees"] else f"{other['form']} (other numbers)",
            *(f"{r['ms']:.2f}" for r in (ours, other)),
            f"{other['speedup']:.2f}×",
            *(f"{r['memory_bytes'] / 1e6:.1f}" for r in (ours, other)),
            f"{ours['gflops']:.1f}",
            f"{ours['gbs']:.1f}",
        )
    console.print(table)
    for skipped in result["skipped"]:
        console.print(f"left out: {skipped['op']} {skipped['case']}: {skipped['why']}", highlight=False)
    console.print(where(result), highlight=False)


@benchmarks.command("mixers")
def mixers_command(
    ops: Annotated[str | None, typer.Option(help="Operators, the baseline first; all by default.")] = None,
    channels: Annotated[int, typer.Option(min=1, help="Channels.")] = 64,
    size: Annotated[str, typer.Option(help="Sides of the map: 1024, 56x56, 16x32x32.")] = "56x56",
    batch: Annotated[int, typer.Option(min=1, help="Batch size.")] = 8,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    channels_last: ChannelsLast = False,
    backward: Backward = True,
    threads: Threads = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Time the operators as spatial mixers, all in one run and in turn.

    [bold]Examples[/bold]

      torchconv bench mixers

      torchconv bench mixers --ops depthwise,dcls,lsnet --channels 96 --size 28x28

      torchconv bench mixers --size 4096 --channels 32 --json
    """
    from torchconv._common import write_json
    from torchconv.bench.mixers import bench as run

    _prepare(threads, out=out)
    sizes = _sizes(size)
    with Console(stderr=True).status("timing …"):
        result = run(
            _names(ops),
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
    console = wide()
    table = Table(box=None)
    for column in ("operator", "params", "M MACs", "forward ms", "p95", "× first", "training ms", "p95", "× first"):
        first = column == "operator"
        table.add_column(column, justify="left" if first else "right", no_wrap=first)
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


@benchmarks.command("models")
def models_command(
    wanted: Annotated[str | None, typer.Option("--filter", help="Names or patterns; all networks by default.")] = None,
    size: Annotated[int, typer.Option(min=1, help="Side of the images.")] = 224,
    batch: Annotated[int, typer.Option(min=1, help="Batch size of the throughput.")] = 8,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    channels_last: ChannelsLast = False,
    training: Annotated[bool, typer.Option("--training", help="Time training passes too.")] = False,
    seconds: Annotated[float, typer.Option(min=0.0, help="Time for each network and kind of call.")] = 0.5,
    threads: Threads = None,
    out: Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="Carry on the run in --out.")] = False,
    as_json: Json = False,
) -> None:
    """Time named networks against timm's of the same name or the nearest published one, in turn.

    [bold]Examples[/bold]

      torchconv bench models

      torchconv bench models --filter 'inception_next*,eca_resnet50' --training --out models.json

      torchconv bench models --device cuda --dtype bfloat16 --batch 64 --out models.json --resume
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from torchconv.bench.models import bench_models
    from torchconv.bench.tables import model_lines, models_columns, models_where

    _prepare(threads, out=out)
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with bars:
        task = bars.add_task("building")
        result = bench_models(
            _names(wanted),
            size=size,
            batch=batch,
            dtype=dtype,
            device=device,
            channels_last=channels_last,
            training=training,
            min_seconds=seconds,
            out=out,
            resume=resume,
            progress=lambda name, done, total: bars.update(task, description=name, completed=done, total=total),
        )
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    table = Table(box=None)
    for index, column in enumerate(models_columns(result)):
        table.add_column(column, justify="right" if index else "left", no_wrap=not index)
    for row in result["rows"]:
        for line in model_lines(row):
            table.add_row(*line)
    console = wide()
    console.print(table)
    for skipped in result["skipped"]:
        console.print(f"left out: {skipped['model']}: {skipped['why']}", highlight=False)
    console.print(models_where(result), highlight=False)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(benchmarks)
