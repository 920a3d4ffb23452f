"""``python -m tests.parity``: what it prints, when it fails, and that one bad file does not stop the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.parity.__main__ import main
from tests.parity.core import compare, run_file

GOLDEN = Path(__file__).parent / "golden"
CASE = GOLDEN / "eca" / "eca_k3.safetensors"


def rewrite(target: Path, change: Any) -> Path:
    """A copy of a golden file with its tensors and metadata changed."""
    with safe_open(CASE, "pt") as file:
        tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
        meta = dict(file.metadata())
    change(tensors, meta)
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, target, metadata=meta)
    return target


def test_a_line_a_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(CASE), str(GOLDEN / "weightedconv")]) == 0
    lines = capsys.readouterr().out.splitlines()
    key, case, max_abs, max_rel, verdict = lines[0].split()
    assert (key, case, verdict) == ("eca", "eca_k3", "PASS")
    assert float(max_abs) >= 0
    assert float(max_rel) < 1e-4
    assert len(lines) == 1 + len(list((GOLDEN / "weightedconv").glob("*.safetensors")))


def test_json_has_every_tensor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(CASE), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"]
    assert {t["name"] for t in report["tensors"]} == {"output.y", "grad.x", "grad.conv.weight"}


def _scaled(name: str) -> Any:
    return lambda tensors, meta: tensors.update({name: tensors[name] * 1.001})


@pytest.mark.parametrize("name", ["output.y", "grad.x", "grad.conv.weight"])
def test_a_wrong_number_fails(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = rewrite(tmp_path / "eca" / "wrong.safetensors", _scaled(name))
    assert main([str(path)]) == 1
    assert name in capsys.readouterr().out
    assert main([str(path), "--rtol", "1e-2"]) == 0


def test_tolerances_in_the_file_win(tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor], meta: dict[str, str]) -> None:
        _scaled("grad.x")(tensors, meta)
        meta["grad_rtol"] = "0.01"

    assert run_file(rewrite(tmp_path / "eca" / "loose.safetensors", change)).passed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t.pop("state.conv.weight"), "missing ['conv.weight']"),
        (lambda t, m: t.update({"state.conv.extra": torch.zeros(1)}), "unexpected ['conv.extra']"),
        (lambda t, m: t.pop("input.x"), "x"),
        (lambda t, m: [t.pop(n) for n in list(t) if n.startswith(("output.", "grad."))], "no output"),
        (lambda t, m: t.update({"something": torch.zeros(1)}), "unknown tensor 'something'"),
        (lambda t, m: t.update({"output.z": torch.zeros(1)}), "not computed: output.z"),
        (lambda t, m: t.update({"grad.nothing": torch.zeros(1)}), "grad.nothing"),
        (lambda t, m: t.update({"output.y": torch.zeros(1)}), "shape"),
        (lambda t, m: t.update({"input.cotangent": torch.zeros(7)}), "cotangent"),
        (lambda t, m: m.update(config="{"), "unreadable"),
        (lambda t, m: m.update(config="[1]"), "not a JSON object"),
        (lambda t, m: m.update(config=json.dumps({"channel": 12, "k_size": 4})), "k"),
    ],
)
def test_what_is_wrong_is_said(change: Any, message: str, tmp_path: Path) -> None:
    report = run_file(rewrite(tmp_path / "eca" / "bad.safetensors", change))
    assert not report.passed
    assert message in str(report.error)


def test_a_bad_file_does_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "eca" / "broken.safetensors"
    broken.parent.mkdir()
    broken.write_bytes(b"no tensors here")
    unknown = rewrite(tmp_path / "nosuchkey" / "case.safetensors", lambda t, m: None)
    assert main([str(broken), str(tmp_path / "absent.safetensors"), str(unknown), str(CASE)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[4] for line in lines] == ["FAIL", "FAIL", "FAIL", "PASS"]
    assert "unreadable" in lines[0]
    assert "no such file" in lines[1]
    assert "unknown key 'nosuchkey'" in lines[2]


def test_key_can_be_given(tmp_path: Path) -> None:
    path = rewrite(tmp_path / "elsewhere" / "case.safetensors", lambda t, m: None)
    assert run_file(path, key="eca").passed


def test_rule_of_the_comparison() -> None:
    zero = torch.zeros(2)
    assert compare("a", torch.tensor([1.0, 100.009]), torch.tensor([1.0, 100.0]), 1e-4, 0).passed
    assert not compare("a", torch.tensor([1.0, 100.02]), torch.tensor([1.0, 100.0]), 1e-4, 0).passed
    # Zero in exact arithmetic: round-off passes relative to the largest tensor of the kind.
    assert compare("a", zero + 9e-7, zero, 1e-4, 1.0).passed
    assert not compare("a", zero + 9e-6, zero, 1e-4, 1.0).passed
    assert not compare("a", zero * float("nan"), zero, 1e-4, 1.0).passed


def test_numbers_that_are_none_are_compared_by_place() -> None:
    expected = torch.tensor([1.0, float("nan"), float("inf"), -float("inf")])
    assert compare("x", expected.clone(), expected, 1e-4, 1.0).passed
    assert compare("x", expected + torch.tensor([1e-6, 0, 0, 0]), expected, 1e-4, 1.0).passed
    for wrong in ([float("nan"), float("nan")], [2.0, float("inf")], [float("inf"), float("nan")], [2.0, 1.0]):
        assert not compare("x", torch.tensor(wrong), torch.tensor([2.0, float("nan")]), 1e-4, 1.0).passed


def test_half_precision_is_run_in_half_precision(tmp_path: Path) -> None:
    def halved(tensors: dict[str, torch.Tensor], meta: dict[str, str]) -> None:
        tensors.update({name: t.bfloat16() for name, t in tensors.items()})
        meta["rtol"] = meta["grad_rtol"] = "0.03"

    report = run_file(rewrite(tmp_path / "eca" / "half.safetensors", halved))
    assert report.passed, report
