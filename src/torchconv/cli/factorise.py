"""``torchconv factorise`` and ``parallelise``: cheaper or shallower forms of a trained network's layers."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from torchconv.cli._network import WHERE, Batch, Model, Out, value_of

Side = Annotated[int | None, typer.Option(min=1, help="Side of the noise it is measured on; the network's own.")]


def _rank(text: str) -> Any:
    """8, 0.5, (8, 4), or PATTERN=8,PATTERN=0.25."""

    def value(word: str) -> Any:
        found = value_of(word)
        if not isinstance(found, int | float | tuple):
            raise typer.BadParameter(f"{word!r}: give a rank (8), a share (0.5), a pair (8,4), or NAME=RANK,…")
        return found

    if "=" not in text:
        return value(text)
    pairs = [pair.partition("=") for pair in text.split(",")]
    return {name.strip(): value(rank) for name, _, rank in pairs}


def factorise(
    model: Model,
    out: Out,
    rank: Annotated[
        str | None, typer.Option(help="R, a share of the numbers (0.5), a pair for tucker (8,4), or PATTERN=R,…")
    ] = None,
    energy: Annotated[float | None, typer.Option(help="Share of each kernel's squares to keep, instead.")] = None,
    form: Annotated[str, typer.Option(help="sequential, tucker, cp, per_pair or depthwise_1d.")] = "sequential",
    where: Annotated[str | None, typer.Option(help=WHERE)] = None,
    force: Annotated[bool, typer.Option("--force", help="Also where it saves nothing.")] = False,
    size: Side = None,
    batch: Batch = 1,
) -> None:
    """Put low-rank kernels in place of a network's dense ones and save the result.

    [bold]Examples[/bold]

      torchconv factorise timm:resnet18 --rank 0.5 -o half.safetensors

      torchconv factorise trained/ --energy 0.9 --form tucker -o small

      torchconv factorise trained/ --rank "layer3.*=16,layer4.*=0.25" -o small --size 128
    """
    from torchconv.cli._network import noise_for
    from torchconv.surgery import factorise as carry_out
    from torchconv.weights import check_place, open_model, save

    wish = None if rank is None else _rank(rank)
    check_place(out)
    network = open_model(model)
    with Console(stderr=True).status("factorising and measuring …"):
        example = noise_for(network, size, batch)
        changed: Any = carry_out(
            network, rank=wish, energy=energy, form=form, where=where, force=force, example=example
        )
        save(changed, out)
    typer.echo(str(changed.factorise_report))
    typer.echo(f"saved: {out}")


def parallelise(
    model: Model,
    out: Out,
    order: Annotated[int, typer.Option(help="1: side by side; 2: with the products of two blocks.")] = 1,
    where: Annotated[str, typer.Option(help="Pattern for the names of blocks.")] = "*",
    at_most: Annotated[int | None, typer.Option(min=2, help="Blocks in a stack; longer runs are cut.")] = None,
    size: Side = None,
    batch: Batch = 1,
) -> None:
    """Put stacks of residual blocks side by side, measure what that loses, and save the result.

    [bold]Examples[/bold]

      torchconv parallelise timm:resnet34 -o shallow

      torchconv parallelise trained/ --order 2 --where "layer4.*" --at-most 2 -o shallow.safetensors
    """
    from torchconv.cli._network import noise_for
    from torchconv.surgery import parallelise as carry_out
    from torchconv.weights import check_place, open_model, save

    check_place(out)
    network = open_model(model)
    with Console(stderr=True).status("finding stacks and measuring …"):
        example = noise_for(network, size, batch)
        changed: Any = carry_out(network, order=order, where=where, size=at_most, example=example)
        save(changed, out)
    typer.echo(str(changed.parallelise_report))
    typer.echo(f"saved: {out}")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("factorise")(factorise)
    app.command("parallelise")(parallelise)
