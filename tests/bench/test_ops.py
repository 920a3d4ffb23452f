"""The operators' benchmark: all forms of a case compute the same numbers, and the result says what it should."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from torchconv.bench import bench_ops, cases
from torchconv.bench import ops as runner
from torchconv.bench.cases import Case, Place
from torchconv.bench.tables import markdown, pairs, roofline


@pytest.mark.parametrize("op", sorted(cases()))
def test_forms_agree(op: str) -> None:
    torch.manual_seed(0)
    seen = 0
    for one in cases()[op](Place()):
        seen += 1
        with torch.no_grad():
            expected = one.ours(*one.inputs)
            forms = ({"eager": one.eager} if one.eager is not None else {}) | one.peers
            for name, fn in forms.items():
                y = fn(*one.inputs)
                assert y.shape == expected.shape, (one.label, name)
                if one.alike:
                    assert torch.allclose(y, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())), name
        if seen == 1 and one.backward:
            leaves = [x.detach().requires_grad_() if x.is_floating_point() else x for x in one.inputs]
            one.ours(*leaves).sum().backward()
            assert all(p.grad is not None for p in one.params)
        break  # one shape says it; the benchmark itself compares all of them
    assert seen, "a case function without cases"


def test_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def few(place: Place):
        x = place.randn(2, 8, 8)
        w = place.randn(8, 8)
        yield Case("same", lambda x, w: x @ w, (x, w), lambda x, w: torch.einsum("bij,jk->bik", x, w))
        yield Case("other", lambda x, w: x @ w, (x, w), lambda x, w: x @ w + 1, {"peer": lambda x, w: w @ x})

    def broken(place: Place):
        def fail(x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("not here")

        yield Case("never", fail, (place.randn(1),))

    monkeypatch.setattr(runner, "cases", lambda: {"few": few, "broken": broken})
    monkeypatch.setattr(runner, "ceiling", lambda *_: {"gflops": 100.0, "gbs": 10.0, "ridge": 10.0})
    result = bench_ops(min_seconds=0)
    assert json.loads(json.dumps(result))["schema"] == 1
    rows = {(r["case"], r["pass"], r["form"]): r for r in result["rows"]}
    assert len(rows) == 10
    assert rows["same", "forward", "eager"]["agrees"]
    assert not rows["other", "forward", "eager"]["agrees"]
    one = rows["same", "forward", "torchconv"]
    flops, moved = 2 * 2 * 8 * 8 * 8, 4 * (128 + 64 + 128)
    assert one["intensity"] == pytest.approx(flops / moved)
    assert one["gflops"] == pytest.approx(flops / one["ms"] / 1e6)
    assert one["gbs"] == pytest.approx(moved / one["ms"] / 1e6)
    assert one["bound"] == "memory"
    assert result["skipped"] == [{"op": "broken", "case": "never", "why": "not here"}]
    assert len(list(pairs(result))) == 6
    assert markdown(result).count("\n| `few`") == 6
    roofline(result, tmp_path / "roof.png")
    assert (tmp_path / "roof.png").read_bytes()[:4] == b"\x89PNG"


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="did you mean dcls"):
        bench_ops(("dlcs",))
    with pytest.raises(ValueError, match="dtype"):
        bench_ops(dtype="int8")
