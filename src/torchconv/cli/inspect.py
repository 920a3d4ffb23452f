"""``torchconv inspect``: look inside a network."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from torchconv.cli._network import Model, place


def inspect(
    model: Model,
    weights: Annotated[
        str | None,
        typer.Option(
            help="A checkpoint for a named network (.pth, .safetensors), or 'pretrained' for timm's; fresh ones "
            "by default."
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Images: a named set, a folder by class, an .npz; noise by default.")
    ] = None,
    against: Annotated[str | None, typer.Option(help="A second network to compare representations with.")] = None,
    against_weights: Annotated[str | None, typer.Option(help="As --weights, for the network of --against.")] = None,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            parser=place,
            metavar="FILE",
            help="The page to write; a folder of its name stands beside it.",
        ),
    ] = Path("inspection.html"),
    only: Annotated[str | None, typer.Option(help="Sections, separated by commas; all that apply by default.")] = None,
    size: Annotated[
        int | None,
        typer.Option(min=8, help="Side of the images; by default the network's own, else that of --data, else 224."),
    ] = None,
    limit: Annotated[int, typer.Option(min=8, help="At most this many images of --data.")] = 512,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Look inside a network: filter health, receptive field, efficiency, similarity, transfer, patterns.

    [bold]Examples[/bold]

      torchconv inspect timm:resnet18 --weights resnet18.pth

      torchconv inspect torchconv:unireplknet_a --only filters,receptive-field -o unireplknet.html

      torchconv inspect trained/ --data photos/ --against timm:resnet18 --against-weights resnet18.pth

      torchconv inspect trained/ --data photos/ --only transfer,patterns
    """
    import torch

    from torchconv._common import check, check_choice, check_writable
    from torchconv.analysis.inspection import SECTIONS, as_data, inspect_model, plain, write_report

    torch.manual_seed(0)  # fresh weights are the same the next time
    chosen = tuple(s.strip() for s in only.split(",") if s.strip()) if only else ()
    for key in chosen:
        check_choice("only", key, SECTIONS)
    check(against is not None or against_weights is None, "against_weights", against_weights, "needs --against MODEL")
    check(bool(out.suffix), "out", str(out), f"name the page with its ending, as in {out.name}.html")
    check_writable("out", out)
    check_writable("out", out.with_suffix(""), folder=True)
    with Console(stderr=True).status("opening the network …") as status:
        network = _network(model, weights, "weights")
        other = None if against is None else _network(against, against_weights, "against_weights")
        status.update("reading the images …")
        images, labels, names = _images(network, data, size, limit) if data else (None, None, ())
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
        if not weights and model.partition(":")[0] in ("timm", "torchconv"):
            fresh = "fresh, as before training: give --weights, or a saved folder"
            found = replace(found, facts={"weights": fresh, **found.facts})
        page = write_report(found, out)
    if as_json:
        typer.echo(json.dumps(plain(as_data(found)), indent=2))
        return
    console = Console()
    if "weights" in found.facts:
        console.print(f"weights: {found.facts['weights']}", highlight=False, style="dim")
    for verdict in found.verdicts:
        console.print(f"• {verdict}", highlight=False, markup=False)
    for key, why in found.left_out.items():
        console.print(f"left out {key}: {why}", highlight=False, markup=False, style="dim")
    console.print(f"report: {page}", highlight=False, markup=False, soft_wrap=True)


def _network(spec: str, weights: str | None, option: str) -> Any:
    """The network of ``MODEL``, with the checkpoint for it that an option gave."""
    from torchconv._common import check
    from torchconv.weights import load_official, open_model, read_state

    source, _, name = spec.partition(":")
    if weights is None:
        return open_model(spec)
    if source not in ("timm", "torchconv"):
        raise ValueError(f"{option}={weights!r}: {spec!r} has its own; they are for timm:NAME and torchconv:NAME")
    if weights == "pretrained":
        if source != "timm":
            raise ValueError(f"{option}='pretrained': is for timm:NAME; give a file for torchconv:NAME")
        return open_model(spec, pretrained=True)
    check(Path(weights).is_file(), option, weights, "is no file; give a checkpoint (.pth, .safetensors)")
    try:
        return load_official(name, weights) if source == "torchconv" else _timm(spec, read_state(weights))
    except ValueError as error:  # every tensor that does not fit has a line of its own
        first, *others = str(error).split("\n")
        more = f"; {others[0].strip()}; and {len(others) - 1} more" if others else ""
        raise ValueError(f"{option}={weights!r}: {first}{more}") from error


def _timm(spec: str, state: dict[str, Any]) -> Any:
    """A network of timm with a state, and as many classes as it has."""
    from torchconv.weights import load_into, open_model

    network: Any = open_model(spec)
    classifier = (getattr(network, "pretrained_cfg", None) or {}).get("classifier")
    head = state.get(f"{classifier}.weight") if isinstance(classifier, str) else None
    if head is not None:
        network.reset_classifier(len(head))
    load_into(network, state)
    return network


def _images(network: Any, spec: str, size: int | None, limit: int) -> tuple[Any, Any, tuple[str, ...]]:
    from torchconv.analysis.inspection import own_size
    from torchconv.data import load, normalise

    found = load(spec, image_size=size or own_size(network), limit=limit)
    x, mean, std = found.train.x, found.mean, found.std
    configured = getattr(network, "pretrained_cfg", None) or {}
    own_mean, own_std = configured.get("mean"), configured.get("std")
    if (
        x.dim() == 4
        and own_mean
        and own_std
        and len(own_mean) == 3
        and x.shape[1] in (1, 3)
        and not x.is_floating_point()
    ):
        return normalise(x.expand(-1, 3, -1, -1), own_mean, own_std), found.train.y, found.classes
    return normalise(x, mean, std), found.train.y, found.classes


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("inspect")(inspect)
