"""``torchconv inspect``: look inside a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console


def inspect(
    model: Annotated[str, typer.Argument(help="timm:NAME, torchconv:NAME, or a saved folder.")],
    data: Annotated[
        str | None, typer.Option(help="Images: a named set, a folder by class, an .npz; noise by default.")
    ] = None,
    against: Annotated[str | None, typer.Option(help="A second network to compare representations with.")] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The page to write; a folder of its name stands beside it.")
    ] = Path("inspection.html"),
    only: Annotated[str | None, typer.Option(help="Sections, separated by commas; all that apply by default.")] = None,
    size: Annotated[int, typer.Option(min=8, help="Side of the images.")] = 224,
    limit: Annotated[int, typer.Option(min=8, help="At most this many images of --data.")] = 512,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Look inside a network: filter health, receptive field, efficiency, similarity, transfer, patterns.

    [bold]Examples[/bold]

      torchconv inspect timm:resnet18

      torchconv inspect torchconv:unireplknet_a --only filters,receptive-field -o unireplknet.html

      torchconv inspect trained/ --data photos/ --against timm:resnet18

      torchconv inspect trained/ --data photos/ --only transfer,patterns
    """
    from torchconv.analysis.inspection import as_data, inspect_model, plain, write_report
    from torchconv.weights import open_model

    network = open_model(model)
    other = open_model(against) if against else None
    images, labels, names = _images(data, size, limit) if data else (None, None, ())
    chosen = tuple(s.strip() for s in only.split(",") if s.strip()) if only else ()
    with Console(stderr=True).status("reading …") as status:
        found = inspect_model(
            network,
            images,
            other,
            labels=labels,
            names=names,
            title=model,
            image_size=size,
            only=chosen,
            progress=lambda line: status.update(f"looking at {line} …"),
        )
        page = write_report(found, out)
    if as_json:
        typer.echo(json.dumps(plain(as_data(found)), indent=2))
        return
    console = Console()
    for verdict in found.verdicts:
        console.print(f"• {verdict}", highlight=False)
    for key, why in found.left_out.items():
        console.print(f"left out {key}: {why}", highlight=False, style="dim")
    console.print(f"report: {page}", highlight=False)


def _images(spec: str, size: int, limit: int) -> tuple[Any, Any, tuple[str, ...]]:
    from torchconv.data import load, normalise

    found = load(spec, image_size=size, limit=limit)
    return normalise(found.train.x, found.mean, found.std), found.train.y, found.classes


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("inspect")(inspect)
