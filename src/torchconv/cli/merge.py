"""``torchconv merge``: a network's inference form."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from torchconv.cli._network import Batch, Model, Out


def merge(
    model: Model,
    out: Out,
    size: Annotated[
        int | None, typer.Option(min=1, help="Side of the noise it is checked and timed on; the network's own.")
    ] = None,
    batch: Batch = 1,
    fold: Annotated[bool, typer.Option(help="Fold batch norms too.")] = True,
    tolerance: Annotated[float, typer.Option(min=0.0, help="Largest relative difference of the output.")] = 1e-4,
) -> None:
    """Merge branches, fold batch norms, check that the output stays, time it, and save the result.

    [bold]Examples[/bold]

      torchconv merge timm:repvgg_a0 -o repvgg.safetensors

      torchconv merge trained/ -o merged --size 128 --batch 8

      torchconv merge torchconv:unireplknet_a -o merged --no-fold
    """
    from torchconv.cli._network import costs, noise_for
    from torchconv.surgery import merge as carry_out
    from torchconv.weights import check_place, open_model, save

    check_place(out)
    network = open_model(model)
    with Console(stderr=True).status("merging, checking, timing …"):
        x = noise_for(network, size, batch)
        changed = carry_out(network, x, fold=fold, tolerance=tolerance, timed=True)
        cost = costs(network, changed, x)
        save(changed, out)
    typer.echo(str(changed.merge_report))
    typer.echo(cost)
    typer.echo(f"saved: {out}")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("merge")(merge)
