"""Every golden file in ``tests/golden`` through our code; the harness itself reports what it should."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parity.core import run_file

GOLDEN = Path(__file__).parent / "golden"
FILES = sorted(GOLDEN.rglob("*.safetensors"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_golden(path: Path) -> None:
    report = run_file(path)
    worst = [f"{t.name}: {t.max_abs:.2e}" for t in report.tensors if not t.passed]
    assert report.passed, report.error or worst
