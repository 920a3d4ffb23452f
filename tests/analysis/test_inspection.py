"""The inspection: sections gathered, verdicts first, files that open offline."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from torchconv.analysis import inspection
from torchconv.analysis.efficiency import _most, block_times, blocks_of
from torchconv.analysis.inspection import inspect_model, own_size, plain, write_report
from torchconv.analysis.receptive import section, squares
from torchconv.analysis.section import Section
from torchconv.cli import main


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).train()


def test_receptive_field_of_a_small_stack(tmp_path: Path) -> None:
    model = network()
    found = inspect_model(model, image_size=20, only=("receptive-field",), title="<small>")
    assert model.training
    (made,) = found.sections
    sides = {r["share of the contribution"]: r["side"] for r in made.tables["sides"]}
    assert max(s for s in sides.values() if s) <= 7  # two 3 × 3 convolutions see 5 × 5
    assert found.facts["parameters"] == sum(p.numel() for p in model.parameters())
    page = write_report(found, tmp_path / "page.html").read_text()
    assert "&lt;small&gt;" in page
    assert made.verdict in page
    assert "data:image/png;base64," in page
    assert "http" not in page.replace("http://www.w3.org", "")
    rows = list(csv.DictReader((tmp_path / "page" / "receptive-field-sides.csv").open()))
    assert len(rows) == len(sides)
    assert json.loads((tmp_path / "page" / "inspection.json").read_text())["title"] == "<small>"
    assert (tmp_path / "page" / "receptive-field-effective-receptive-field.png").read_bytes()[:4] == b"\x89PNG"


def test_squares_stand_around_what_contributes_not_around_the_image() -> None:
    bright = torch.zeros(9, 12)
    bright[1:4, 7:10] = 1.0
    assert squares(bright, (0.05, 0.5, 0.99)) == [(1, pytest.approx(1 / 108)), *[(3, pytest.approx(9 / 108))] * 2]
    line = torch.zeros(10)
    line[:5] = 1.0  # the middle is position 2
    assert squares(line, (0.5, 0.9)) == [(3, pytest.approx(0.3)), (5, pytest.approx(0.5))]
    strided = nn.Conv2d(3, 4, 16, stride=16)  # the middle of two positions starts at pixel 16
    found = section(strided, torch.rand(2, 3, 32, 32))
    assert "the last map comes from" in found.verdict
    assert found.data["sides"]["0.99"] <= 17
    assert found.data["published_sides"]["0.99"] == 31
    with pytest.raises(ValueError, match="nothing of the images"):
        section(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Threshold(9.0, 0.0)), torch.rand(2, 3, 8, 8))


def test_receptive_field_of_tokens_and_of_channels_last() -> None:
    class Patches(nn.Module):
        def __init__(self, last: bool) -> None:
            super().__init__()
            self.patch, self.last = nn.Conv2d(3, 8, 4, 4), last
            self.mix, self.norm, self.head = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.patch(x).permute(0, 2, 3, 1)
            if not self.last:
                x = x.flatten(1, 2)
                x = torch.cat([x.mean(1, keepdim=True), x], 1)
            return self.head(self.norm(self.mix(x)).flatten(1, -2).mean(1))

    for last in (False, True):
        torch.manual_seed(0)
        found = section(Patches(last), torch.rand(2, 3, 20, 20))
        assert found.data["layer"] == "norm"
        assert found.data["sides"]["0.99"] <= 5  # a patch, which no other reaches


def test_time_and_operations_of_blocks() -> None:
    model = network().eval()
    x = torch.randn(1, 3, 32, 32)
    times = block_times(model, x, repeats=3)
    assert set(times) == {"0", "1", "2", "3", "4"}
    assert all(t > 0 for t in times.values())
    assert blocks_of(nn.Sequential(model, nn.Identity())) == ["0.0", "0.1", "0.2", "0.3", "0.4"]
    (found,) = inspect_model(model, x, only=("efficiency",)).sections
    rows = {row["block"]: row for row in found.tables["blocks"]}
    assert rows["2"]["MFLOP"] == pytest.approx((2 * 8 * 8 * 9 + 8) * 32 * 32 / 1e6)
    assert sum(row["share of time"] for row in rows.values()) == pytest.approx(1)
    assert all(row["efficiency"] >= 0 for row in rows.values())
    with pytest.raises(ValueError, match="CPU or CUDA"):
        block_times(model, torch.empty(1, 3, 4, 4, device="meta"))


def test_what_fails_is_left_out_and_alarms_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> Section:
        raise ValueError("needs more")

    made = {
        "a": lambda _: Section("a", "A", "All is well.", "", "good"),
        "b": lambda _: Section("b", "B", "Look here!", "", "bad", data={"x": torch.tensor([1.0, float("nan")])}),
        "c": fail,
    }
    monkeypatch.setattr(inspection, "SECTIONS", made)
    found = inspect_model(network(), image_size=16)
    assert found.verdicts == ["Look here!", "All is well."]
    assert found.left_out == {"c": "needs more"}
    assert plain(inspection.as_data(found))["sections"][1]["data"]["x"] == [1.0, None]
    with pytest.raises(ValueError, match="nothing could be inspected"):
        inspect_model(network(), image_size=16, only=("c",))
    with pytest.raises(ValueError, match="only"):
        inspect_model(network(), only=("filterz",))


def test_a_network_says_what_it_takes_and_refuses_the_rest_in_one_line() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pretrained_cfg = nn.Conv2d(3, 4, 3), {"input_size": (3, 20, 20)}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.shape[-1] == 20, "not made\nfor this"
            out: torch.Tensor = self.conv(x)
            return out

    assert own_size(Fixed()) == 20
    assert inspect_model(Fixed(), only=("receptive-field",)).facts["input"] == "3 × 20 × 20"
    with pytest.raises(ValueError, match=r"does not take them \(AssertionError: not made\); give others"):
        inspect_model(Fixed(), image_size=24)
    with pytest.raises(ValueError, match="nothing could be inspected: similarity needs --against"):
        inspect_model(Fixed(), only=("similarity",))
    series = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU())
    assert inspect_model(series, image_size=30, only=("receptive-field",)).facts["input"] == "2 × 30"
    with pytest.raises(ValueError, match="--data"):
        inspect_model(nn.Linear(3, 2))


def test_time_is_told_by_stage_where_there_are_several() -> None:
    def row(block: str, ms: float, efficiency: float) -> dict[str, Any]:
        return {"block": block, "ms": ms, "efficiency": efficiency, "share of time": ms / 10}

    rows = [row("stem", 3, 0.9), row("a.0", 2, 0.1), row("a.1", 2, 0.3), row("b.0", 3, 0.5)]
    assert _most(rows) == "40 % of the time is spent in a at 20 % efficiency"
    assert _most([row("a.0", 4, 0.1), row("a.1", 6, 0.3)]) == "60 % of the time is spent in a.1 at 30 % efficiency"


def test_weights_for_a_named_network(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    trained = timm.create_model("test_resnet", num_classes=7)
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "trained.pth")
    options = ["--only", "filters", "--size", "64", "-o", str(tmp_path / "page.html"), "--json"]
    for weights, fresh in (([], True), (["--weights", str(tmp_path / "trained.pth")], False)):
        with pytest.raises(SystemExit) as stopped:
            main(["inspect", "timm:test_resnet", *weights, *options])
        assert not stopped.value.code
        found = json.loads(capsys.readouterr().out)
        assert ("weights" in found["facts"]) == fresh
    assert found["facts"]["parameters"] == sum(p.numel() for p in trained.parameters())
    points = sum(m.kernel_size == (1, 1) for m in trained.modules() if isinstance(m, nn.Conv2d))
    judged = found["sections"][0]["data"]["layers"]
    assert len(judged) + points == found["facts"]["convolutions"]
    assert f"of {len(judged)} layers" in found["verdicts"][0]
    assert f"{points} convolutions of 1 × 1 not judged" in found["verdicts"][0]
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", "timm:test_vit", "--weights", str(tmp_path / "trained.pth"), *options])
    assert stopped.value.code == 2
    assert re.search(r"does not fit.*; and \d+ more$", capsys.readouterr().err.strip())


def test_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "found.html"
    options = ["--size", "32", "--only", "receptive-field", "-o", str(out), "--json"]
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", "torchconv:convnext_dcls_mini", *options])
    assert not stopped.value.code
    assert json.loads(capsys.readouterr().out)["title"] == "torchconv:convnext_dcls_mini"
    assert out.exists()
    for wrong, hint in (("torchconv:nope", "model="), ("timm:resnet1888", "did you mean"), ("nowhere", "timm:NAME")):
        with pytest.raises(SystemExit) as stopped:
            main(["inspect", wrong, "-o", str(tmp_path / "never.html")])
        assert stopped.value.code == 2
        assert hint in capsys.readouterr().err
    assert not (tmp_path / "never.html").exists()
