"""Low-rank kernels in a trained network: what is exact, what is measured, what is refused, what is saved."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from torchconv.cli import main
from torchconv.ops.apriori import APrioriConv1d, APrioriConv2d
from torchconv.ops.factorise import choose_rank, factorise_kernel
from torchconv.surgery import bundle, factorise, parallelise
from torchconv.weights import load, save


def image(size: int = 16) -> torch.Tensor:
    return torch.randn(2, 3, size, size - 1, generator=torch.Generator().manual_seed(1))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=(1, 0), bias=False),
        nn.Conv2d(12, 12, (3, 5), padding="same", dilation=2, groups=2),
        nn.Conv2d(12, 12, 7, padding=3, groups=12),
        nn.Conv2d(12, 6, 1),
    ).eval()


@pytest.mark.parametrize(
    ("form", "rank"), [("tucker", 12), ("tucker", (12, 12)), ("sequential", 84), ("per_pair", 7), ("tucker", 1.0)]
)
def test_full_rank_is_exact(form: str, rank: Any) -> None:
    model = network()
    new: Any = factorise(model, rank=rank, form=form, example=image(), where="[24]", force=True)
    report = new.factorise_report
    assert [row.path for row in report.layers] == ["2", "4"]
    if rank == 1.0:  # as good as its size allows
        assert all(row.parameters[1] <= row.parameters[0] for row in report.layers)
        return
    assert report.difference < 1e-5, str(report)
    assert all(row.kernel_error < 1e-6 and row.output_error < 1e-5 and row.energy > 1 - 1e-9 for row in report.layers)
    with torch.no_grad():
        assert torch.allclose(new(image()), model(image()), atol=1e-5)


@pytest.mark.parametrize("form", ["tucker", "sequential", "cp"])
def test_all_of_the_energy_of_a_low_rank_kernel_is_exact(form: str) -> None:
    torch.manual_seed(0)
    low = APrioriConv2d(12, 16, 3, form=form, rank=2, stride=2).merge()
    model = nn.Sequential(low).double()
    energy = 1 - 1e-9 if form == "cp" else 1.0
    new: Any = factorise(model, energy=energy, form=form, where="all")
    (row,) = new.factorise_report.layers
    assert row.rank == ((2, 2) if form == "tucker" else 2)
    assert row.kernel_error < 1e-4
    assert row.parameters[1] < row.parameters[0]
    x = torch.randn(1, 12, 9, 9, dtype=torch.float64)
    assert torch.allclose(new(x), model(x), atol=1e-3 if form == "cp" else 1e-6)


def test_energy_is_reached_and_errors_fall_with_it() -> None:
    for form in ("tucker", "sequential"):
        errors = []
        for energy in (0.3, 0.5, 0.6):
            new: Any = factorise(network(), energy=energy, form=form, where="2", example=image())
            (row,) = new.factorise_report.layers
            assert energy <= row.energy < energy + 0.12
            assert row.energy == pytest.approx(1 - row.kernel_error**2)
            errors.append(row.output_error)
        assert errors == sorted(errors, reverse=True)


def test_a_share_bounds_the_numbers_and_multiply_adds() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, padding=1))
    for form in ("tucker", "sequential", "cp"):
        new: Any = factorise(model, rank=0.5, form=form, example=image())
        (row,) = new.factorise_report.layers
        assert 0.35 < (row.parameters[1] - 12) / (row.parameters[0] - 12) <= 0.5
        assert row.macs is not None
        assert row.macs[1] < row.macs[0]
        report = new.factorise_report
        assert report.parameters[0] - report.parameters[1] == row.parameters[0] - row.parameters[1]
        assert report.macs[0] - report.macs[1] == row.macs[0] - row.macs[1]
        assert f"{form} rank" in str(report)
        assert "MACs on the example" in str(report)
    kernel = torch.randn(12, 8, 3, 3, generator=torch.Generator().manual_seed(2))
    rank = choose_rank(kernel, share=0.5)
    best = factorise_kernel(kernel, rank, form="tucker")
    assert best.parameters <= 432
    square = max(r for r in range(1, 9) if factorise_kernel(kernel, r, form="tucker").parameters <= 432)
    assert best.error <= factorise_kernel(kernel, square, form="tucker").error + 1e-3
    with pytest.raises(ValueError, match=r"share=0\.01"):
        choose_rank(kernel, share=0.01)


def test_grouped_and_depthwise_layers() -> None:
    model = network()
    new: Any = factorise(model, rank={"3": 6, "4": 12}, form="sequential", example=image())
    assert [row.path for row in new.factorise_report.layers] == ["3", "4"]
    assert new[4].factors()["vertical"].shape == (12, 1, 7, 1)
    best = factorise_kernel(network()[4].weight, 1, form="per_pair", groups=12)  # one product of filters a channel
    assert new.factorise_report.layers[1].kernel_error == pytest.approx(best.error, abs=1e-6)
    assert new.factorise_report.layers[1].macs[1] < new.factorise_report.layers[1].macs[0]
    shared: Any = factorise(model, rank=3, form="tucker", where="depthwise", example=image())
    assert shared[4].execute == "dense", "groups run what they share once each, more than the dense kernel"
    refused: Any = factorise(model, rank=6, form="sequential", where="[23]*")
    assert set(refused.factorise_report.kept) == set()
    with pytest.raises(ValueError, match="multiple of groups=12"):
        factorise(model, rank=5, form="sequential", where="4")


def test_what_runs_only_as_passes_or_dense() -> None:
    strided: Any = factorise(nn.Conv2d(8, 12, 3, stride=2), rank=12, form="sequential", where="all")
    assert strided.execute == "dense", "the first pass runs on twice as many positions"
    assert factorise(nn.Conv2d(8, 12, 3), rank=0.5, form="sequential", where="all").execute == "factored"
    assert factorise(nn.Conv2d(8, 12, 7), rank=1, form="per_pair", where="all").execute == "dense"
    assert factorise(nn.Conv2d(8, 12, 3), rank=4, form="tucker", where="all", execute="auto").execute == "auto"


def test_a_weight_that_another_module_reads_is_left() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.called = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.called(nn.functional.conv2d(x, self.read.weight))

    new: Any = factorise(Reader(), rank=2, where="all", example=image())
    assert "does not pass through" in new.factorise_report.kept["read"]


def test_a_layer_without_finite_values_is_kept() -> None:
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3))
    nn.init.constant_(net[0].weight, torch.nan)
    new = factorise(net, rank=1, where="all")
    assert "not finite" in new.factorise_report.kept["0"]
    assert [row.path for row in new.factorise_report.layers] == ["1"]


def test_ranks_by_name() -> None:
    new: Any = factorise(network(), rank={"2": 3, "[3-9]": (2, 4), "5": 0.9}, form="tucker")
    assert {row.path: row.rank for row in new.factorise_report.layers} == {
        "2": 3,
        "3": (2, 4),
        "4": (2, 4),
        "5": (3, 3),
    }
    with pytest.raises(ValueError, match="names no convolution"):
        factorise(network(), rank={"nothing": 3})


def test_what_saves_nothing_or_is_not_plain_is_kept() -> None:
    class Scaled(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    shared = nn.Conv2d(8, 8, 3, padding=1)
    twin = nn.Conv2d(8, 8, 3, padding=1)
    twin.weight = shared.weight
    model = nn.ModuleDict(
        {
            "good": nn.Conv2d(8, 8, 3),
            "scaled": Scaled(8, 8, 3),
            "circular": nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
            "tied": shared,
            "twin": twin,
            "hooked": torch.nn.utils.spectral_norm(nn.Conv2d(8, 8, 3)),
        }
    )
    new: Any = factorise(model, rank=2, where="all")
    kept = new.factorise_report.kept
    assert [row.path for row in new.factorise_report.layers] == ["good"]
    assert set(kept) == {"scaled", "circular", "tied", "twin", "hooked"}
    for path, reason in [("scaled", "own way"), ("circular", "zeros"), ("twin", "same parameter"), ("hooked", "hook")]:
        assert reason in kept[path]
    with pytest.raises(ValueError, match=r"holds .* numbers, the kernel"):
        factorise(network(), rank=16, where="2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "rank=None"),
        ({"rank": 2, "energy": 0.5}, "rank=2"),
        ({"rank": 0}, "rank=0"),
        ({"rank": 1.5}, "rank=1.5"),
        ({"rank": True}, "rank=True"),
        ({"energy": 0.0}, "energy=0.0"),
        ({"rank": 2, "form": "tt"}, "form='tt'"),
        ({"rank": (2, 2)}, "two ranks"),
        ({"rank": 2, "form": "depthwise_1d"}, "neither"),
        ({"rank": 2, "execute": "fast"}, "execute='fast'"),
        ({"rank": 2, "where": "layer*"}, "matches no convolution"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        factorise(network(), **options)


def test_the_model_and_its_surroundings_stay() -> None:
    conv = nn.Conv1d(6, 6, 5, padding=2)
    model = nn.Sequential(nn.Conv1d(4, 6, 1), parametrizations.weight_norm(conv), nn.ReLU(), conv).train().double()
    calls: list[torch.Size] = []
    model[1].register_forward_hook(lambda module, args, out: calls.append(out.shape))
    x = torch.randn(2, 4, 9, dtype=torch.float64)
    before = model(x)
    calls.clear()
    new: Any = factorise(model, rank=2, form="sequential", example=x)
    calls.clear()
    y = new(x)
    assert len(calls) == 2, "the hook is in the new layer's place, which is used twice"
    assert isinstance(new[1], APrioriConv1d)
    assert new[1] is new[3]
    assert new.training
    assert new[1].training
    assert y.dtype == torch.float64
    assert torch.equal(model(x), before)
    y.sum().backward()
    assert all(p.grad is not None for p in new.parameters())
    alone: Any = factorise(nn.Conv2d(8, 8, 3), rank=2, where="all")
    assert isinstance(alone, APrioriConv2d)


def test_all_verbs_load_in_a_fresh_process(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    options = {"depths": (1, 1, 2, 1), "dims": (8, 8, 16, 16), "conv_mlp": False, "num_classes": 3}
    model = timm.create_model("convnext_atto", **options).eval()
    x = image(48)
    new: Any = factorise(model, rank={"*downsample*": 0.5, "*conv_dw": (4, 1)}, form="tucker", example=x)
    assert len(new.factorise_report.layers) == 6 + 2
    new = factorise(new, energy=0.9, where="stem.0", example=x, force=True)  # once more
    new = parallelise(bundle(new, 6, example=x), example=x)
    assert [row.blocks for row in new.parallelise_report.stacks] == [("stages.2.blocks.0", "stages.2.blocks.1")]
    assert len(new.torchconv_config["edits"]) == 8 + 1 + 5 + 1
    save(new, tmp_path / "net")
    torch.save(x, tmp_path / "x.pt")
    code = "import sys, torch; from torchconv.weights import load; net, x, y = sys.argv[1:]; "
    code += "torch.save(load(net)(torch.load(x)), y)"
    names = [str(tmp_path / name) for name in ("net", "x.pt", "y.pt")]
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, *names], check=True)
    assert torch.equal(torch.load(tmp_path / "y.pt"), new(x))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    model, out = "timm:test_resnet", tmp_path / "small.safetensors"
    with pytest.raises(SystemExit) as stopped:
        main(["factorise", model, "--rank", "layer1.*=0.5,layer4.0.conv2=8", "-o", str(out), "--size", "32"])
    assert stopped.value.code == 0
    assert "3 layers factorised" in capsys.readouterr().out
    assert sum(isinstance(m, APrioriConv2d) for m in load(out).modules()) == 3
    for wrong, message in [(["--rank", "x"], "give a rank"), ([], "rank=None"), (["--rank", "0.001"], "share=0.001")]:
        with pytest.raises(SystemExit) as stopped:
            main(["factorise", model, *wrong, "-o", str(out)])
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
