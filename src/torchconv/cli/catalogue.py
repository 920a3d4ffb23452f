"""``torchconv list``, ``show`` and ``search``: what there is. No torch is imported."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Table

from torchconv import catalog
from torchconv._common import check_choice, did_you_mean
from torchconv.cli._network import wide

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _state(key: str) -> str:
    return "planned" if key in catalog.planned() else "ready"


def _table(*columns: str) -> Table:
    """Names are never cut: what cannot be read cannot be typed."""
    table = Table(box=None)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column in ("name", "key"))
    return table


def list_(
    kind: Annotated[
        str, typer.Option(help="methods, or parts of a kind: operator, layer, model, analysis, …")
    ] = "methods",
    family: Annotated[str | None, typer.Option(help="Only methods of this family.")] = None,
    as_json: Json = False,
) -> None:
    """List the methods, or the parts of a kind.

    [bold]Examples[/bold]

      torchconv list

      torchconv list --kind operator

      torchconv list --family backbone --json
    """
    if kind != "methods":
        kinds = sorted({p.kind for p in catalog.parts()})
        check_choice("kind", kind, ["methods", *kinds])
        parts = [p for p in catalog.parts() if p.kind == kind]
        if as_json:
            _print_json([catalog.describe(p) for p in parts])
            return
        table = _table("name", "paper", "dims", "mixes", "import", "what it is")
        for p in parts:
            dims = ",".join(map(str, p.dims))
            table.add_row(p.name, p.paper or "", dims, p.mixes, f"{p.home}.{p.target}", p.summary.replace("``", ""))
        wide().print(table)
        return
    methods = list(catalog.papers().values())
    if family is not None:
        check_choice("family", family, sorted({m.family for m in methods}))
        methods = [m for m in methods if m.family == family]
    if as_json:
        _print_json([{**asdict(m), "state": _state(m.key)} for m in methods])
        return
    table = _table("key", "state", "family", "year", "idea")
    for m in methods:
        state = _state(m.key)
        table.add_row(m.key, f"[green]{state}[/green]" if state == "ready" else state, m.family, str(m.year), m.idea)
    wide().print(table)


def show(
    key: Annotated[str, typer.Argument(help="A method's key or a part's name.")],
    as_json: Json = False,
) -> None:
    """Show a method: paper, licence, idea, its parts and how to import them.

    [bold]Examples[/bold]

      torchconv show dcls

      torchconv show conv --json
    """
    named = [p for p in catalog.parts() if key in (p.name, p.paper, p.target)]
    paper = catalog.papers().get(key)
    if paper is None and not named:
        known = {*catalog.papers(), *(p.name for p in catalog.parts())}
        raise ValueError(f"key={key!r}: {did_you_mean(key, known)}")
    if as_json:
        method = {**asdict(paper), "state": _state(key)} if paper else None
        _print_json({"method": method, "parts": [catalog.describe(p) for p in named]})
        return
    console = wide()
    if paper:
        console.print(f"[bold]{paper.key}[/bold]  {paper.title}", highlight=False)
        console.print(f"{paper.authors}, {paper.year}. {paper.url}", highlight=False, soft_wrap=True)
        for other in paper.also:
            also = f"also: {other['title']}. https://arxiv.org/abs/{other['arxiv']}"
            console.print(also, highlight=False, soft_wrap=True)
        if paper.code:
            code = f"authors' code: {paper.code} ({paper.licence or 'no licence'})"
            console.print(code, highlight=False, soft_wrap=True)
        console.print(f"\n{paper.idea}\n", highlight=False)
        console.print(f"family {paper.family}, {_state(key)}", highlight=False)
    for p in named:
        console.print(f"\n[bold]{p.name}[/bold] ({p.kind})  {p.summary.replace('``', '')}", highlight=False)
        if p.kind == "operator":
            classes = [p.target] if p.target[-2:] in ("1d", "2d", "3d") else [f"{p.target}{n}d" for n in p.dims]
            console.print(f"  from torchconv.ops import {', '.join(classes)}", highlight=False)
            console.print(
                f"  mixes {p.mixes}; honours {', '.join(p.supports) or 'the plain case only'}", highlight=False
            )
            merged = {
                "conv": "one plain convolution",
                "self": "a cheaper equivalent",
                "": "nothing: it has no other form",
            }
            console.print(f"  merge() gives {merged[p.merges]}", highlight=False)
            console.print(f"  torchconv compare --ops conv,{p.name}", highlight=False)
        else:
            console.print(f"  from {p.home} import {p.target}", highlight=False)


def search(
    words: Annotated[list[str], typer.Argument(help="Words to look for, e.g.: long range")],
    limit: Annotated[int, typer.Option(min=1, help="At most this many.")] = 10,
    as_json: Json = False,
) -> None:
    """Search methods and parts by words, best first.

    [bold]Examples[/bold]

      torchconv search long range

      torchconv search prune

      torchconv search spectral --json
    """
    hits = catalog.search(" ".join(words), limit)
    if as_json:
        _print_json([asdict(h) for h in hits])
        return
    if not hits:
        typer.echo("nothing found")
        raise typer.Exit(1)
    table = _table("key", "kind", "state", "title")
    for h in hits:
        table.add_row(h.key, h.kind, _state(h.key) if h.kind == "method" else "ready", h.title.replace("``", ""))
    wide().print(table)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("list")(list_)
    app.command("show")(show)
    app.command("search")(search)
