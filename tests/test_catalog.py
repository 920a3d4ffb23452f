"""The catalogue is complete: every method is planned, or has parts, citation, checks, a claim and a page."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from torchconv import catalog
from torchconv.catalog.tables import feed

ROOT = Path(__file__).resolve().parent.parent
READY = sorted(set(catalog.papers()) - set(catalog.planned()))


def test_all_papers_are_here() -> None:
    papers = catalog.papers().values()
    assert sum(1 + len(p.also) for p in papers) == 59
    assert all(p.title and p.authors and p.idea.endswith(".") and 2012 <= p.year <= 2026 for p in papers)
    assert all(part.paper in catalog.papers() for part in catalog.parts() if part.paper is not None)


def test_planned_methods_exist() -> None:
    assert set(catalog.planned()) <= set(catalog.papers())


@pytest.mark.parametrize("key", READY)
def test_method_is_complete(key: str) -> None:
    parts = [p for p in catalog.parts() if p.paper == key]
    assert parts, "no part"
    for part in parts:
        public = part.home if "._" in part.module else part.module  # a private file leaves it to that of its method
        source = ROOT / "src" / Path(*public.split(".")).with_suffix(".py")
        cited = ast.get_docstring(ast.parse(source.read_text())) or ""
        assert "arXiv" in cited or "arxiv" in cited, f"{public}: cite the paper in the module's docstring"
    assert (ROOT / "tests" / "parity" / f"{key}.py").exists(), "no parity adapter"
    assert list((ROOT / "tests" / "golden" / key).glob("*.safetensors")), "no golden file"
    assert list((ROOT / "tests").rglob(f"test_{key}*.py")), "no tests of its own"
    assert (ROOT / "src" / "torchconv" / "claims" / f"{key}.py").exists(), "no claim"
    assert (ROOT / "docs" / "claims" / f"{key}.json").exists(), "no record of the claim"
    assert (ROOT / "docs" / "methods" / f"{key}.md").exists(), "no page"


def test_static_reading_equals_the_decorator() -> None:
    for part in catalog.parts():
        assert catalog.load(part).part == part, part.name


def test_parts_are_imported_from_public_modules() -> None:
    for part in catalog.parts():
        home = importlib.import_module(part.home)
        names = [part.target]
        if part.kind == "operator" and not re.search(r"\dd$", part.target):
            names = [f"{part.target}{n}d" for n in part.dims]
        assert "._" not in part.home, part.name
        assert [n for n in names if not hasattr(home, n)] == [], part.name


def test_names_of_operators_are_unique() -> None:
    names = [p.name for p in catalog.parts()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("long range", {"longconv", "sgconv", "lococo", "dcls", "unireplknet", "terminator", "dilated", "serpent"}),
        ("spectral", {"ffdnn", "deeprftv2", "dfyp"}),
        ("prune", {"masksparsity", "betarank"}),
        ("pruning", {"masksparsity", "betarank"}),
        ("quantization", {"quantize", "dfp"}),
        ("time series", {"lightwaves", "ffdnn", "unireplknet"}),
        ("atrous", {"deeplab", "dilated"}),
        ("weather", {"puyun"}),
        ("super resolution", {"espcn"}),
    ],
)
def test_search_finds(query: str, expected: set[str]) -> None:
    found = [h.key for h in catalog.search(query, limit=8)]
    assert found[0] in expected, found
    assert len(expected & set(found)) >= min(2, len(expected)), found


def test_search_refuses_nothing() -> None:
    with pytest.raises(ValueError, match="query"):
        catalog.search("  ")


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean dcls"):
        catalog.paper("dclss")
    with pytest.raises(ValueError, match="did you mean"):
        catalog.operator("lsnett")
    with pytest.raises(ValueError, match="ndim"):
        catalog.load(catalog.operator("conv"), 4)


def test_reading_the_catalogue_imports_no_torch() -> None:
    code = "import sys, torchconv, torchconv.catalog as c; c.parts(); c.papers(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_subpackages_load_when_named() -> None:
    import torchconv

    assert torchconv.ops.PlainConv2d is not None
    assert "param_groups" in dir(torchconv)
    with pytest.raises(AttributeError, match="nope"):
        torchconv.nope  # noqa: B018


def test_feed_is_xml() -> None:
    from xml.etree import ElementTree

    assert len(ElementTree.fromstring(feed("https://example.org/"))) > len(catalog.parts())
