"""``torchconv compare``: the main job on the command line, with a live display."""

from __future__ import annotations

import re
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from torchconv.cli._network import place

_DURATION = re.compile(r"^(\d+(?:\.\d+)?)(s|m|h)?$")


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    match = _DURATION.match(text.strip())
    if match is None:
        raise ValueError(f"time_budget={text!r}: write seconds, minutes or hours, as in 90s, 10m, 2h")
    return float(match.group(1)) * {"s": 1, "m": 60, "h": 3600}[match.group(2) or "s"]


def compare(
    data: Annotated[
        str,
        typer.Option(help="digits, fashion-mnist, cifar10, a folder of images by class, FILE.npz (x, y) or FILE.ts."),
    ] = "digits",
    ops: Annotated[
        str | None, typer.Option(help="Operators, the baseline first; options as in dcls:kernel_size=9.")
    ] = None,
    net: Annotated[str, typer.Option(help="mini, resnet or timm:NAME; options as in mini:depth=6.")] = "mini",
    match: Annotated[str, typer.Option(help="What is made equal: params, macs, latency or none.")] = "params",
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions a candidate.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="The first seed.")] = 0,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs a trial (8).")] = None,
    time_budget: Annotated[
        str | None, typer.Option(help="Time for all training, as in 10m; sets the epochs instead.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")] = "auto",
    jobs: Annotated[int | None, typer.Option(min=1, help="Trials at a time on this machine.")] = None,
    dask: Annotated[str | None, typer.Option(help="A Dask scheduler, tcp://HOST:PORT, instead of --jobs.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(parser=place, metavar="FOLDER", help="The run's folder; a new one is named when not given."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Carry on the run in --out.")] = False,
    data_root: Annotated[
        Path | None, typer.Option(envvar="TORCHCONV_DATA", help="Where named data sets lie or are put.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=2, help="Train on at most this many items.")] = None,
    image_size: Annotated[int | None, typer.Option(min=4, help="Side to which images are brought.")] = None,
    batch_size: Annotated[int, typer.Option(min=2, help="Batch size, in training and for throughput.")] = 64,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 4e-3,
    weight_decay: Annotated[float, typer.Option(help="Weight decay.")] = 0.05,
    optimizer: Annotated[str, typer.Option(help="adamw, sgd or kar.")] = "adamw",
    augment: Annotated[str, typer.Option(help="auto, none, shift, flip, or timm's, as in rand-m9-mstd0.5.")] = "auto",
    label_smoothing: Annotated[float, typer.Option(help="Label smoothing.")] = 0.0,
    mixup: Annotated[float, typer.Option(help="Mixup's alpha.")] = 0.0,
    cutmix: Annotated[float, typer.Option(help="CutMix's alpha.")] = 0.0,
    ema: Annotated[float, typer.Option(help="Decay of the weights' moving average, as in 0.99; 0 is off.")] = 0.0,
    amp: Annotated[str, typer.Option(help="no, bf16 or fp16.")] = "no",
    early_stop: Annotated[int, typer.Option(min=0, help="Epochs without gain before a trial stops; 0 is off.")] = 0,
) -> None:
    """Answer "which convolution should I use here?" with evidence.

    Trains one network with each operator at an equal budget, over several seeds, and writes a table and a report.

    [bold]Examples[/bold]

      torchconv compare

      torchconv compare --data photos/ --time-budget 10m --out report

      torchconv compare --data fashion-mnist --limit 6000 --ops conv,dcls,lsnet --seeds 2

      torchconv compare --data GunPoint_TRAIN.ts --ops conv,depthwise,dcls:kernel_size=31

      torchconv compare --net timm:convnext_atto --match none --data photos/

      torchconv compare --out report --resume
    """
    from torchconv._common import check_writable
    from torchconv.cli.live import LiveListener, print_results
    from torchconv.compare import DEFAULT_OPS, CompareConfig
    from torchconv.compare import compare as run
    from torchconv.compare.schedule import stop

    if resume and out is None:
        raise ValueError("out=None: --resume needs the folder of the run, --out DIR")
    if out is None:
        name = re.sub(r"[^A-Za-z0-9]+", "-", Path(data).stem).strip("-").lower() or "data"
        out = Path(f"torchconv-compare-{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    check_writable("out", out, folder=True)
    config = CompareConfig(
        data=data,
        ops=tuple(s.strip() for s in ops.split(",") if s.strip()) if ops else DEFAULT_OPS,
        net=net,
        match=match,
        seeds=seeds,
        seed=seed,
        epochs=epochs,
        time_budget=_seconds(time_budget),
        device=device,
        jobs=jobs,
        dask=dask,
        out=str(out),
        data_root=str(data_root) if data_root else None,
        limit=limit,
        image_size=image_size,
        batch_size=batch_size,
        lr=lr,
        weight_decay=weight_decay,
        optimizer=optimizer,
        augment=augment,
        label_smoothing=label_smoothing,
        mixup=mixup,
        cutmix=cutmix,
        ema=ema,
        amp=amp,
        early_stop=early_stop,
    )
    listener = LiveListener(out)
    command = shlex.join(["torchconv", *(a for a in sys.argv[1:] if a != "--resume")])
    try:
        results = run(config, resume=resume, command=command, listener=listener)
    except KeyboardInterrupt:
        listener.close()
        typer.echo(
            f"\ninterrupted; carry on with: torchconv compare … --out {shlex.quote(str(out))} --resume", err=True
        )
        stop(130)
    print_results(results, out)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("compare")(compare)
