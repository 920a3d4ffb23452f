"""Named networks: functions under ``@register_model``, read from the source text like the parts."""

from __future__ import annotations

import ast
import fnmatch
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from torchconv._common import did_you_mean

_PACKAGE = Path(__file__).resolve().parent.parent
_MARK = re.compile(r"^@register_model\(", re.MULTILINE)


@dataclass(frozen=True)
class Variant:
    """A named network: ``module`` holds a function of that ``name``; ``task`` is the folder (classify, video, …)."""

    name: str
    paper: str
    task: str
    module: str
    summary: str


@cache
def variants() -> dict[str, Variant]:
    """All named networks, by name."""
    found = {}
    for path in sorted((_PACKAGE / "models").glob("*/*.py")):
        text = path.read_text(encoding="utf-8")
        if not _MARK.search(text):
            continue
        module = ".".join(("torchconv", *path.relative_to(_PACKAGE).with_suffix("").parts))
        for node in ast.parse(text).body:
            for decorator in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
                call = decorator if isinstance(decorator, ast.Call) else None
                if call is not None and isinstance(call.func, ast.Name) and call.func.id == "register_model":
                    assert isinstance(node, ast.FunctionDef)
                    summary = (ast.get_docstring(node) or "").split("\n")[0]
                    paper = ast.literal_eval(call.args[0])
                    found[node.name] = Variant(node.name, paper, path.parent.name, module, summary)
    return found


def variant(name: str) -> Variant:
    """The network called ``name``; a wrong name raises ``ValueError`` with the nearest ones."""
    if name not in variants():
        raise ValueError(f"model={name!r}: {did_you_mean(name, variants())}")
    return variants()[name]


def matching(pattern: str = "", paper: str | None = None, task: str | None = None) -> list[str]:
    """Names that match a shell pattern (``unireplknet*``), of a method or a task."""
    return [
        v.name
        for v in variants().values()
        if (not pattern or fnmatch.fnmatch(v.name, pattern))
        and (paper is None or v.paper == paper)
        and (task is None or v.task == task)
    ]
