"""The catalogue as Markdown and as a feed, for the README and the documentation."""

from __future__ import annotations

import re
from pathlib import Path
from xml.sax.saxutils import escape

from torchconv.catalog.papers import papers, planned
from torchconv.catalog.parts import parts

BEGIN, END = "<!-- methods -->", "<!-- /methods -->"


def methods_table(links: bool = False) -> str:
    """One row a method: key, state, paper, idea; with ``links`` the ready ones point to their page."""
    rows = ["| key | state | paper | idea |", "|---|---|---|---|"]
    waiting = set(planned())
    for m in papers().values():
        name = f"[`{m.key}`](methods/{m.key}.md)" if links and m.key not in waiting else f"`{m.key}`"
        state = "planned" if m.key in waiting else "**ready**"
        cited = [f"[{m.arxiv}]({m.url})", *(f"[{a['arxiv']}](https://arxiv.org/abs/{a['arxiv']})" for a in m.also)]
        rows.append(f"| {name} | {state} | {m.authors} {m.year}, {', '.join(cited)} | {m.idea} |")
    return "\n".join(rows)


def parts_table(kind: str) -> str:
    """One row a part of a kind: name, import, what it is."""
    rows = ["| name | import | dimensions | what it is |", "|---|---|---|---|"]
    for p in parts():
        if p.kind == kind:
            dims = ", ".join(map(str, p.dims))
            summary = re.sub(r"``|:\w+:", "", p.summary).replace("|", "\\|")
            rows.append(f"| `{p.name}` | `{p.home}.{p.target}` | {dims} | {summary} |")
    return "\n".join(rows)


def update(path: str | Path) -> bool:
    """Write the table of methods between the marks of a Markdown file; true if that changed it."""
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    before, mark, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise ValueError(f"path={str(path)!r}: has no lines {BEGIN} and {END}")
    new = f"{before}{BEGIN}\n\n{methods_table()}\n\n{END}{after}"
    if new != text:
        path.write_text(new, encoding="utf-8")
    return new != text


def feed(site: str) -> str:
    """An Atom feed of the parts, newest version first."""
    entries = []
    for p in sorted(parts(), key=lambda p: tuple(map(int, p.since.split("."))), reverse=True):
        page = f"{site}methods/{p.paper}/" if p.paper else f"{site}methods/"
        entries.append(
            f"<entry><id>{escape(site)}#{p.module}.{p.target}</id><title>{escape(p.name)} ({p.kind})</title>"
            f'<link href="{escape(page)}"/><updated>{_DATES[p.since]}T00:00:00Z</updated>'
            f"<summary>{escape(p.summary)}</summary></entry>"
        )
    newest = max(_DATES[p.since] for p in parts())
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n<feed xmlns="http://www.w3.org/2005/Atom">'
        f"<id>{escape(site)}</id><title>torchconv: new parts</title><updated>{newest}T00:00:00Z</updated>"
        f"<author><name>The torchconv developers</name></author>{''.join(entries)}</feed>\n"
    )


# When the versions appeared (or are meant to).
_DATES = {"0.1.0": "2026-11-21"}
