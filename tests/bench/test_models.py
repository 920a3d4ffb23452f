"""The networks' benchmark: pairs, peers, what is left out, and a run that is carried on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from torchconv.bench import models as bench
from torchconv.bench.models import PEERS, bench_models
from torchconv.bench.tables import model_lines, models_columns, models_markdown
from torchconv.cli import main
from torchconv.models import list_models

FAST: dict[str, Any] = {"size": 32, "batch": 2, "min_seconds": 0, "repeats": 1}


def test_peers_exist() -> None:
    timm = pytest.importorskip("timm")
    assert set(PEERS) <= set(list_models())
    assert set(bench.SIDES) <= set(list_models())
    theirs = [label.partition(":") for label, _ in PEERS.values()]
    assert all(timm.is_model(name) for package, _, name in theirs if package == "timm")


def test_a_network_its_peer_and_what_is_left_out(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    before = torch.get_rng_state()
    result = bench_models(("residual_sequential", "eca_resnet18", "small_unet"), training=True, **FAST)
    assert torch.equal(before, torch.get_rng_state())
    assert [r["model"] for r in result["rows"]] == ["eca_resnet18", "residual_sequential"]
    assert [s["model"] for s in result["skipped"]] == ["small_unet"]
    assert "timestep" in result["skipped"][0]["why"]
    pair, alone = result["rows"]
    assert pair["peer"]["model"] == "timm:resnet18 with ECA"
    # The same architecture; batch norms folded leave ours two numbers a channel less.
    assert pair["ours"]["params"] <= pair["peer"]["params"]
    assert pair["ours"]["macs"] == pytest.approx(pair["peer"]["macs"], rel=1e-3)
    for fact in (pair["ours"], pair["peer"]):
        assert fact["throughput"] == pytest.approx(2e3 / fact["batch_ms"])
        assert fact["training_memory_bytes"] > fact["memory_bytes"] > 0
    assert set(pair["speedup"]) == {"latency", "batch", "training"}
    assert (alone["peer"], alone["speedup"], alone["shape"]) == (None, {}, [1, 28, 28])
    assert all(len(line) == len(models_columns(result)) for r in result["rows"] for line in model_lines(r))
    pair["speedup"]["latency"] = [0.5, 0.4, 0.6]
    text = models_markdown(json.loads(json.dumps(result)))
    assert "**0.50× (0.40 to 0.60)**" in text
    assert text.count("\n| `") == 3
    assert "Left out: `small_unet`" in text


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 3, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": self.conv(x)}


def test_a_run_is_carried_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []

    def create(name: str, **_: Any) -> nn.Module:
        built.append(name)
        if name == "p3d131":
            raise KeyboardInterrupt
        return Tiny()

    monkeypatch.setattr(bench, "create_model", create)
    monkeypatch.setattr(bench, "PEERS", {})
    out = tmp_path / "models.json"
    with pytest.raises(KeyboardInterrupt):
        bench_models(("p3d*",), out=out, **FAST)
    (row,) = json.loads(out.read_text())["rows"]
    assert row["model"] == "p3d63"
    assert row["shape"] == [2, 16, 16, 16]
    last = bench_models(("p3d63",), channels_last=True, **FAST)
    assert not last["skipped"]
    built.clear()
    monkeypatch.setattr(bench, "create_model", lambda name, **_: built.append(name) or Tiny())
    seen: list[tuple[str, int, int]] = []
    result = bench_models(("p3d*",), out=out, resume=True, progress=lambda *now: seen.append(now), **FAST)
    assert built == ["p3d131", "p3d199"]
    assert [r["model"] for r in result["rows"]] == ["p3d63", "p3d131", "p3d199"]
    assert seen == [("p3d131", 0, 2), ("p3d199", 1, 2), ("", 2, 2)]
    with pytest.raises(ValueError, match="size=32, not 64"):
        bench_models(("p3d*",), out=out, resume=True, **{**FAST, "size": 64})
    with pytest.raises(ValueError, match="out=None"):
        bench_models(("p3d*",), resume=True, **FAST)


def test_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "models.json"
    options = ["--filter", "residual_*", "--batch", "1", "--seconds", "0", "--out", str(out)]
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "models", *options])
    assert not stopped.value.code
    assert "residual_parallel" in capsys.readouterr().out
    assert len(json.loads(out.read_text())["rows"]) == 2
    for wrong, hint in ((["--filter", "lsnet_tt"], "did you mean lsnet_t"), (["--dtype", "int8"], "dtype=")):
        with pytest.raises(SystemExit) as stopped:
            main(["bench", "models", *wrong])
        assert stopped.value.code == 2
        assert hint in capsys.readouterr().err
