"""The documentation's Python examples run, and what is generated is up to date."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from torchconv.catalog.tables import BEGIN, END, methods_table

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", [p for p in PAGES if BLOCK.search(p.read_text())], ids=lambda p: p.stem)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, block in enumerate(BLOCK.findall(page.read_text()), 1):
        exec(compile(block, f"{page.name}, example {number}", "exec"), names)


def test_table_of_methods_is_up_to_date() -> None:
    text = (ROOT / "README.md").read_text()
    shown = text.partition(BEGIN)[2].partition(END)[0].strip()
    assert shown == methods_table(), "run: python -m torchconv.catalog"


def test_links_to_files_are_good() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", page.read_text()):
            if target.endswith("feed.xml"):  # written by the build
                continue
            assert (page.parent / target).exists(), f"{page.name}: {target}"
