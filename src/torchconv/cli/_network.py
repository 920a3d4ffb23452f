"""What the commands share: places, networks, the terminal. No torch is imported with it."""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from torch import Tensor, nn


def place(text: str | Path) -> Path:
    """A path that was named: an empty one, as of an unset shell variable, would be the current folder."""
    if not str(text).strip():
        raise typer.BadParameter("is empty; name a place, or . for this folder")
    return Path(text)


Model = Annotated[str, typer.Argument(help="timm:NAME, torchconv:NAME, or a saved folder or file.")]
Out = Annotated[
    Path,
    typer.Option("--out", "-o", parser=place, metavar="PATH", help="Folder, or file OUT.safetensors, to save to."),
]
Batch = Annotated[int, typer.Option(min=1, help="Items of the noise.")]
WHERE = (
    "all, spatial (kernels above 1, the stem excepted), depthwise, pointwise, stem, or a pattern for names, which "
    "means 1×1 convolutions too."
)


def wide() -> Console:
    """The terminal; a file or pipe takes whole rows, unless COLUMNS says otherwise."""
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 170)


def value_of(text: str) -> Any:
    """A number, tuple, … where the text is one, otherwise the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def noise_for(network: nn.Module, size: int | None, batch: int = 1) -> Tensor:
    """Noise that the network runs on: of the side ``size`` where it can, otherwise of a size that it takes."""
    from torchconv.surgery._probe import make_up

    return make_up(network, size, batch)


def costs(before: nn.Module, after: nn.Module, x: Any) -> str:
    """Multiply-adds and FLOPs of both for ``x``, as a line each."""
    from torchconv.analysis.count import count

    old, new = count(before, x), count(after, x)
    rows = [("MACs", old.macs, new.macs), ("FLOPs", old.flops, new.flops)]
    lines = [f"{name}: {a:,} → {b:,} ({_percent(a, b)})" for name, a, b in rows]
    lines += [f"not counted: {', '.join(new.not_counted)}"] if new.not_counted else []
    return "\n".join(lines)


def _percent(a: int, b: int) -> str:
    return "=" if a == b else f"{b / a - 1:+.1%}" if a else "new"
