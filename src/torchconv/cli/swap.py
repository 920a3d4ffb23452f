"""``torchconv swap``: operators in place of a network's convolutions."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from torchconv.cli._network import WHERE, Model, Out, value_of


def swap(
    model: Model,
    to: Annotated[str, typer.Option(help="Operator with options, as in dcls:kernel_size=9.")],
    out: Out,
    where: Annotated[str, typer.Option(help=WHERE)] = "spatial",
    keep_weights: Annotated[bool, typer.Option(help="Carry weights over where there is a way to.")] = True,
    match: Annotated[
        str | None, typer.Option(help="params: as many parameters as before, within 2 %, by the operator's free size.")
    ] = None,
    size: Annotated[int, typer.Option(min=8, help="Side of the noise image that outputs are compared on.")] = 64,
) -> None:
    """Put an operator in place of a network's convolutions and save the result.

    [bold]Examples[/bold]

      torchconv swap timm:resnet18 --to dcls -o resnet18-dcls

      torchconv swap timm:convnext_atto --to unireplknet:kernel_size=13 --where depthwise -o large

      torchconv swap timm:resnet18 --to dcls:kernel_size=7 --match params -o resnet18-dcls.safetensors

      torchconv swap trained/ --to apriori:rank=8 --where "layer4.*.conv[12]" -o factored
    """
    from torchconv.cli._network import costs, noise_for
    from torchconv.surgery import swap as carry_out
    from torchconv.weights import check_place, open_model, save

    op, *pairs = to.split(":")
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise ValueError(f"to={to!r}: write options as NAME=VALUE behind colons, as in dcls:kernel_size=9")
        options[name] = value_of(value)
    check_place(out)
    with Console(stderr=True).status("opening the network …") as status:
        network = open_model(model)
        try:
            x = noise_for(network, size)
        except ValueError:  # layers are compared one by one all the same
            x = None
        changed = carry_out(
            network,
            op,
            where=where,
            keep_weights=keep_weights,
            match=match,
            example=x,
            progress=lambda line: status.update(f"{line} …"),
            **options,
        )
        status.update("counting and saving …")
        cost = None if x is None else costs(network, changed, x)
        save(changed, out)
    typer.echo(str(changed.swap_report))
    if cost is not None:
        typer.echo(cost)
    typer.echo(f"saved: {out}")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("swap")(swap)
