"""``torchconv claim``: a paper's claim as an experiment with a verdict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from torchconv.cli._network import place


def _show(console: Console, record: dict[str, Any]) -> None:
    colour = {"supported": "green", "not supported": "red"}.get(record["verdict"], "yellow")
    console.print(f"[bold]{record['key']}[/bold]  {record['title']}", highlight=False)
    console.print(f"claim:      {record['says']} ({record['source']})", highlight=False)
    console.print(f"experiment: {record['experiment']}", highlight=False)
    console.print(
        f"measured:   {record['effect']:.4g} {record['unit']}, 95 % interval {record['low']:.4g} to "
        f"{record['high']:.4g}; {record['meaning']}",
        highlight=False,
    )
    for note in record["notes"]:
        console.print(f"note:       {note}", highlight=False)
    console.print(f"verdict:    [bold {colour}]{record['verdict']}[/bold {colour}] in {record['seconds']} s\n")


def claim(
    key: Annotated[str | None, typer.Argument(help="The method; leave out with --all or to list the claims.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Run every claim.")] = False,
    budget: Annotated[str, typer.Option(help="quick (about a minute) or full (about ten), a claim.")] = "quick",
    out: Annotated[
        Path | None, typer.Option(parser=place, metavar="FOLDER", help="Folder for the records, KEY.json.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the records as JSON.")] = False,
) -> None:
    """Test a paper's claim at desk scale and say what came out.

    [bold]Examples[/bold]

      torchconv claim

      torchconv claim dcls

      torchconv claim --all --budget full --out claims/
    """
    from torchconv._common import check_writable
    from torchconv.claims import claims, run_claim, write_record

    console = Console()
    if key is None and not every:
        if as_json:
            listed = [{"key": c.key, "says": c.says, "source": c.source} for c in claims().values()]
            typer.echo(json.dumps(listed, indent=2, ensure_ascii=False))
            return
        for known in claims().values():
            console.print(f"[bold]{known.key}[/bold]  {known.says}", highlight=False)
        return
    if out is not None:
        check_writable("out", out, folder=True)
    keys = list(claims()) if every else [str(key)]
    records, failed = [], []
    for name in keys:
        try:
            with Console(stderr=True).status(f"{name} …") as status:
                record = run_claim(name, budget, lambda line, n=name: status.update(f"{n}: {line}"))  # type: ignore[misc]
        except Exception as error:
            if not every:
                raise
            failed.append(name)
            typer.echo(f"torchconv: {name}: {type(error).__name__}: {error}", err=True)
            continue
        records.append(record)
        if out is not None:
            write_record(record, out)
        if not as_json:
            _show(console, record)
    if as_json:
        typer.echo(json.dumps(records if every else records[0], indent=2, ensure_ascii=False))
    if failed:
        raise RuntimeError(f"claims that could not be run: {', '.join(failed)}")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("claim")(claim)
