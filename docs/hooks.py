"""MkDocs hooks: pages generated from the catalogue and from the claims' records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torchconv.bench.tables import markdown, models_markdown
from torchconv.catalog import papers, planned
from torchconv.catalog.tables import feed, methods_table, parts_table

ROOT = Path(__file__).resolve().parent


def ledger(folder: Path = ROOT / "claims") -> str:
    """The table of claims and their verdicts, and a section for each."""
    records = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json"))]
    marks = {"supported": "supported", "not supported": "**not supported**", "inconclusive": "*inconclusive*"}
    lines = ["| method | the paper says | measured | verdict |", "|---|---|---|---|"]
    for r in records:
        interval = f"{r['effect']:.3g} ({r['low']:.3g} to {r['high']:.3g}) {r['unit']}"
        lines.append(f"| [{r['key']}](#{r['key']}) | {r['says']} | {interval} | {marks[r['verdict']]} |")
    for r in records:
        lines += [f"\n## {r['key']}\n", f"**{r['title']}**\n", f"Claim: {r['says']} ({r['source']})\n"]
        lines += [f"Experiment: {r['experiment']}\n"]
        lines += [
            f"Measured: {r['effect']:.4g} {r['unit']}, 95 % interval {r['low']:.4g} to {r['high']:.4g}; "
            f"{r['meaning']}. "
            f"Verdict: {marks[r['verdict']]}.\n"
        ]
        lines += [f"- {note}" for note in r["notes"]]
        m = r["machine"]
        where = f"{m.get('cpu')}, {m.get('threads')} threads, torch {m.get('torch')}"
        lines.append(f"\nBudget {r['budget']}, {r['seconds']} s, {where}.")
    return "\n".join(lines)


def performance(folder: Path = ROOT.parent / "benchmarks" / "results") -> str:
    """The tables of ``torchconv bench ops``, one a machine and type."""
    results = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("ops-*.json"))]
    return (
        "\n\n".join(f"## {r['device']}, {r['dtype']}\n\n{markdown(r)}" for r in results) or "No result is recorded yet."
    )


def models(folder: Path = ROOT.parent / "benchmarks" / "results") -> str:
    """The tables of ``torchconv bench models``."""
    results = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("models-*.json"))]
    return "\n\n".join(models_markdown(r) for r in results) or "No result is recorded yet."


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in what is generated."""
    replacements = {
        "<!-- methods table -->": lambda: methods_table(links=True),
        "<!-- operators table -->": lambda: parts_table("operator"),
        "<!-- ledger -->": ledger,
        "<!-- performance -->": performance,
        "<!-- models -->": models,
        "<!-- contributing -->": lambda: (ROOT.parent / "CONTRIBUTING.md").read_text(encoding="utf-8"),
    }
    for mark, make in replacements.items():
        if mark in markdown:
            markdown = markdown.replace(mark, make())
    return markdown


def on_nav(nav: Any, config: Any, files: Any) -> Any:
    """Every ready method has a page."""
    pages = {Path(f.src_uri).stem for f in files if f.src_uri.startswith("methods/")}
    missing = sorted(set(papers()) - set(planned()) - pages)
    if missing:
        raise SystemExit(f"docs/methods: no page for {', '.join(missing)}")
    return nav


def on_post_build(config: Any) -> None:
    """Write the feed of parts."""
    (Path(config["site_dir"]) / "feed.xml").write_text(feed(config["site_url"]), encoding="utf-8")
