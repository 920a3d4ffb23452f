"""Parts: the pieces of code that implement a method, announced by ``@part`` and read without importing them."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from torchconv._common import check, check_choice, did_you_mean

KINDS = ("operator", "layer", "model", "analysis", "compression", "surgery", "theory", "kernel", "data")
MIXES = ("", "space", "channels", "space+channels")
SUPPORTS = ("stride", "channels", "groups", "dilation", "even", "padding")
MERGES = ("", "conv", "self")

_PACKAGE = Path(__file__).resolve().parent.parent
_DECORATOR = re.compile(r"^@part\(", re.MULTILINE)
_DEFINITION = re.compile(r"^(?:class|def)\s+(\w+)", re.MULTILINE)
_DOCSTRING = re.compile(r"\s*[rR]?(\"\"\"|''')(.*?)\1", re.DOTALL)
T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """One announced piece of code.

    ``supports`` names the constructor arguments that an operator honours beyond the plain case: what is not listed
    raises ``ValueError``. ``merges`` is "conv" when ``merge()`` returns one plain ``nn.ConvNd``, "self" when it
    returns a cheaper equivalent. ``since`` is the version that brought it. ``mixer`` and ``conv`` are constructor
    options for the two places where an operator is dropped in: as the spatial mixer of a block, and instead of a
    k × k convolution. ``probe`` tells the tests how to build and call a layer: ``{"build": {constructor options},
    "inputs": [[2, 8, 13, 11], …]}``, one shape for each argument of ``forward``, the batch first.
    """

    name: str
    paper: str | None = None
    kind: str = "operator"
    dims: tuple[int, ...] = ()
    mixes: str = ""
    supports: tuple[str, ...] = ()
    merges: str = ""
    mixer: dict[str, Any] = field(default_factory=dict)
    conv: dict[str, Any] = field(default_factory=dict)
    probe: dict[str, Any] = field(default_factory=dict)
    keywords: str = ""
    since: str = "0.1.0"
    module: str = ""
    target: str = ""
    summary: str = ""

    @property
    def home(self) -> str:
        """The public module to import it from: a private file belongs to that of its method."""
        package, _, name = self.module.rpartition(".")
        if package == "torchconv.ops":
            return package
        return f"{package}.{self.paper}" if name.startswith("_") else self.module

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        check_choice("mixes", self.mixes, MIXES)
        check_choice("merges", self.merges, MERGES)
        for item in self.supports:
            check_choice("supports", item, SUPPORTS)
        check(set(self.dims) <= {1, 2, 3}, "dims", self.dims, "spatial dimensions are 1, 2 or 3")


_OPTIONS = {f.name for f in fields(Part)} - {"module", "target", "summary"}


def part(name: str, **options: Any) -> Callable[[T], T]:
    """Announce a class or function as a part; arguments are literals and those of :class:`Part`.

    The decorated object gets a ``part`` attribute; the catalogue itself is read from the source text.
    """

    def decorate(target: T) -> T:
        code: Any = target
        code.part = Part(
            name=name,
            module=code.__module__,
            target=code.__name__,
            summary=(inspect.getdoc(code) or "").split("\n")[0],
            **options,
        )
        return target

    return decorate


def _module_name(path: Path) -> str:
    relative = path.relative_to(_PACKAGE.parent).with_suffix("")
    return ".".join(relative.parts).removesuffix(".__init__")


def _scan(path: Path) -> Iterator[Part]:
    text = path.read_text(encoding="utf-8")
    for match in _DECORATOR.finditer(text):
        definition = _DEFINITION.search(text, match.end())
        if definition is None:
            continue
        # Other decorators may stand between: the first one ends where a line starts anew with "@", "class" or "def".
        end = re.compile(r"^(?:@|class|def)", re.MULTILINE).search(text, match.end())
        assert end is not None
        call = ast.parse(text[match.start() + 1 : end.start()].strip(), mode="eval").body
        assert isinstance(call, ast.Call)
        values = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg in _OPTIONS}
        header_end = re.compile(r":\s*\n").search(text, definition.end())
        doc = _DOCSTRING.match(text, header_end.end()) if header_end else None
        yield Part(
            name=ast.literal_eval(call.args[0]),
            module=_module_name(path),
            target=definition.group(1),
            summary=doc.group(2).strip().split("\n")[0] if doc else "",
            **values,
        )


@cache
def parts() -> tuple[Part, ...]:
    """All parts of the library, in the order of their modules."""
    return tuple(p for path in sorted(_PACKAGE.rglob("*.py")) if path.name != "parts.py" for p in _scan(path))


def operators(ndim: int | None = None) -> dict[str, Part]:
    """Operators by name, optionally only those for ``ndim`` spatial dimensions."""
    return {p.name: p for p in parts() if p.kind == "operator" and (ndim is None or ndim in p.dims)}


def operator(name: str) -> Part:
    """The operator called ``name``; a wrong name raises ``ValueError`` with the nearest ones."""
    known = operators()
    if name not in known:
        raise ValueError(f"op={name!r}: {did_you_mean(name, known)}")
    return known[name]


def load(announced: Part, ndim: int | None = None) -> Any:
    """Import a part's code; with ``ndim``, the operator's class of that dimension (``DCLSConv`` → ``DCLSConv2d``)."""
    module = importlib.import_module(announced.module)
    if ndim is None or re.search(r"\dd$", announced.target):
        check(ndim is None or ndim in announced.dims, "ndim", ndim, f"{announced.name} works in {announced.dims} only")
        return getattr(module, announced.target)
    check(ndim in announced.dims, "ndim", ndim, f"{announced.name} works in {announced.dims} only")
    return getattr(module, f"{announced.target}{ndim}d")


def describe(announced: Part) -> dict[str, Any]:
    """A part as plain data, for JSON output."""
    return {f.name: getattr(announced, f.name) for f in fields(Part)}
