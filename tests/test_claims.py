"""The mechanism of claims, and the records that the ledger is made from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import torchconv.claims as mechanism
from torchconv.catalog import papers, planned
from torchconv.claims import Evidence, claim, claims, get_claim, read_records, run_claim, write_record
from torchconv.claims._support import paired_interval

RECORDS = Path(__file__).resolve().parent.parent / "docs" / "claims"


@pytest.mark.parametrize(
    ("low", "high", "threshold", "verdict"),
    [
        (0.1, 0.5, 0.0, "supported"),
        (-0.5, -0.1, 0.0, "not supported"),
        (-0.1, 0.5, 0.0, "inconclusive"),
        (-0.4, 0.5, -0.5, "supported"),
    ],
)
def test_verdict_follows_from_the_interval(low: float, high: float, threshold: float, verdict: str) -> None:
    assert Evidence((low + high) / 2, low, high, "%", "", threshold).conclude() == verdict


def test_a_claim_may_conclude_otherwise() -> None:
    assert Evidence(1.0, 0.5, 1.5, "%", "", verdict="not supported").conclude() == "not supported"


def test_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, mechanism.Claim] = {}
    monkeypatch.setattr(mechanism, "_FOUND", found)
    monkeypatch.setattr(mechanism, "claims", lambda: found)
    heard: list[str] = []

    @claim(key="dcls", says="More is more.", source="Table 1", experiment="Count.")
    def run(budget: str, progress: mechanism.Progress) -> Evidence:
        progress(budget)
        return Evidence(2.0, 1.0, 3.0, "points", "positive is more", measurements={"a": [1]}, notes=["A note."])

    record = run_claim("dcls", "full", heard.append)
    assert heard == ["full"]
    assert record["verdict"] == "supported"
    assert record["title"].startswith("Dilated convolution")
    assert record["machine"]["torch"]
    assert read_records(write_record(record, tmp_path).parent) == [json.loads(json.dumps(record))]
    with pytest.raises(ValueError, match="budget"):
        run_claim("dcls", "huge")


def test_unknown_claim() -> None:
    with pytest.raises(ValueError, match="did you mean dcls"):
        get_claim("dclss")


def test_every_ready_method_has_a_claim_and_a_record() -> None:
    ready = set(papers()) - set(planned())
    assert ready <= set(claims())
    records = {r["key"]: r for r in read_records(RECORDS)}
    assert ready <= set(records)
    for key, record in records.items():
        known = claims()[key]
        stated = (record["says"], record["source"], record["experiment"])
        assert stated == (known.says, known.source, known.experiment), f"run: torchconv claim {key} --out docs/claims"
        assert record["low"] <= record["effect"] <= record["high"]
        assert record["verdict"] in ("supported", "not supported", "inconclusive")


def test_listing_claims_imports_no_torch() -> None:
    code = "import sys, torchconv.claims as c; c.claims(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_paired_interval_is_students() -> None:
    mean, low, high = paired_interval([1.0, 2.0, 4.0], [0.0, 1.0, 1.0])
    # differences 1, 1, 3: mean 5/3, standard error 2/3, t(0.975, 2) = 4.3027
    assert mean == pytest.approx(5 / 3)
    assert high - mean == pytest.approx(4.30265 * 2 / 3, rel=1e-4)
    assert mean - low == pytest.approx(high - mean)
