"""Operators in place of convolutions: what is carried over exactly, what is refused, what is saved."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from torchconv.models import create_model
from torchconv.ops.dcls import DCLSConv2d
from torchconv.surgery import swap
from torchconv.weights import from_pretrained, save

COMPARING = "comparing the outputs"
swapping = importlib.import_module("torchconv.surgery.swap")  # the package has a function of that name


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 5, padding=2, groups=8),
        nn.Conv2d(8, 12, 1),
        nn.Conv2d(12, 12, 3, stride=2, padding=1, bias=False),
        nn.Conv2d(12, 8, 3, padding=2, dilation=2),
    ).eval()


def image() -> torch.Tensor:
    return torch.randn(2, 3, 17, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("to", "where", "exact"),
    [
        ("conv", "all", 5),
        ("dcls", "spatial", 2),
        ("tunable", "spatial", 3),
        ("weightedconv", "spatial", 3),
        ("unireplknet", "depthwise", 1),
        ("depthwise", "depthwise", 1),
    ],
)
def test_exact_transfers(to: str, where: str, exact: int) -> None:
    model, x = network(), image()
    before = copy.deepcopy(model.state_dict())
    said: list[str] = []
    new: Any = swap(model, to, where=where, example=x, progress=said.append)
    report = new.swap_report
    asked = len(report.layers) + len(report.kept)
    assert [line.split(":")[0] for line in said] == [f"layer {n + 1} of {asked}" for n in range(asked)] + [COMPARING]
    assert [row.transfer for row in report.layers] == ["exact"] * exact, str(report)
    assert report.difference < 1e-4
    with torch.no_grad():
        assert torch.allclose(new(x), model(x), atol=1e-4)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items()), "the original is left as it is"
    assert not new.training


def test_fresh_and_approximate() -> None:
    fresh: Any = swap(network(), "dcls", where="5", keep_weights=False)
    assert [row.transfer for row in fresh.swap_report.layers] == ["fresh"]
    factored: Any = swap(network(), "apriori", where="5", rank=8)
    (row,) = factored.swap_report.layers
    assert row.transfer in ("exact", "approximate")
    gate: Any = swap(network(), "eca", where="3", example=image())
    assert gate.swap_report.difference > 0.01
    assert "fresh" in str(gate.swap_report)


def test_sizes_asked_for_are_kept_and_larger_kernels_find_room() -> None:
    large = nn.Sequential(nn.Conv2d(3, 4, 7, padding=3), nn.Conv2d(4, 4, 3, padding=1))
    new: Any = swap(large, "dcls", where="all")
    assert [row.transfer for row in new.swap_report.layers] == ["exact", "exact"]
    assert (new[0].kernel_size, new[1].kernel_size) == ((7, 7), (5, 5))
    wide: Any = swap(large, "dcls", where="1", kernel_size=9)
    assert wide[1].kernel_size == (9, 9)
    assert wide.swap_report.layers[0].transfer == "exact"


def test_what_cannot_be_replaced_is_named() -> None:
    model: Any = swap(network(), "dcls", where="all")
    assert "dilation" in model.swap_report.kept["6"]
    with pytest.raises(ValueError, match="matches no convolution"):
        swap(network(), "dcls", where="nothing*")
    with pytest.raises(ValueError, match="did you mean dcls"):
        swap(network(), "dclz")
    with pytest.raises(ValueError, match="kernel_siz"):
        swap(network(), "dcls", where="5", kernel_siz=3)

    class Scaled(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    with pytest.raises(ValueError, match="own way"):
        swap(nn.Sequential(nn.Conv2d(3, 3, 1), Scaled(3, 3, 3, padding=1)), "conv")


def test_an_operator_of_another_shape_is_kept_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swapping, "_build", lambda conv, edit: nn.Identity() if conv.stride != (1, 1) else conv)
    model: Any = swap(network(), "conv", where="all", keep_weights=False)
    assert set(model.swap_report.kept) == {"0", "5"}
    assert "the operator gives" in model.swap_report.kept["0"]


@pytest.mark.parametrize(
    ("to", "options", "replaced"),
    [
        ("dcls", {}, {"3": 0, "5": 0}),  # three numbers a weight: a third of the taps
        ("dcls", {"kernel_size": 9, "version": "gauss"}, {"3": 0, "5": 0}),
        ("apriori", {"form": "cp"}, {"3": 0, "5": 0, "6": 0}),
        ("adknet", {}, {"5": 0}),
        ("tunable", {"num_params": 2}, {"3": 0}),  # twice as large: only the small layer fits
    ],
)
def test_an_equal_budget_of_parameters(to: str, options: dict[str, Any], replaced: dict[str, int]) -> None:
    model = nn.Sequential(*network(), nn.Conv2d(8, 1024, 1))
    new: Any = swap(model, to, match="params", **options)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, new))
    assert new.swap_report.parameters == (before, after)
    assert abs(after / before - 1) <= 0.02
    assert {row.path for row in new.swap_report.layers} == set(replaced)
    stay = {path for path, why in new.swap_report.kept.items() if "budget" in why}
    assert stay | set(replaced) | {"6"} == {"3", "5", "6"}


def test_a_budget_that_cannot_be_met_says_what_can() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1))
    with pytest.raises(ValueError, match=r"within 2% of 420 parameters; all layers give 2,004 .*, 1 alone 852"):
        swap(model, "dcls", kernel_count=9, match="params")
    with pytest.raises(ValueError, match="match='macs': choose"):
        swap(model, "dcls", match="macs")


def test_fewer_weights_than_taps_stand_on_the_largest() -> None:
    conv = nn.Conv2d(3, 4, 3, padding=1)
    with torch.no_grad():
        conv.weight[..., 0, :] *= 1e-6
        conv.weight[..., 2, 1:] *= 1e-6
    new: Any = swap(nn.Sequential(conv), "dcls", where="all", kernel_count=4, version="v1")
    assert new.swap_report.layers[0].transfer == "exact"
    few: Any = swap(nn.Sequential(conv), "dcls", where="all", kernel_count=3, version="v1")
    assert few.swap_report.layers[0].transfer != "exact"


def test_selection_training_and_sharing() -> None:
    shared = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), shared, nn.ReLU(), shared).train().double()
    new: Any = swap(model, "dcls", where=lambda name, conv: conv.in_channels == 4)
    assert isinstance(new[1], DCLSConv2d)
    assert new[1] is new[3]
    assert new[1].training
    assert new[1].weight.dtype == torch.float64
    stem: Any = swap(model, "conv", where="stem")
    assert [row.path for row in stem.swap_report.layers] == ["0"]


def test_a_swapped_network_trains_saves_and_loads(tmp_path: Path) -> None:
    base = create_model("eca_resnet18", num_classes=3).eval()
    new: Any = swap(base, "tunable", where="layer1.0.*", example=torch.randn(1, 3, 32, 32))
    assert new.swap_report.layers
    save(new, tmp_path / "net")
    again = from_pretrained(tmp_path / "net")
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(again(x), new.eval()(x))
    timm = pytest.importorskip("timm")
    resnet = timm.create_model("resnet10t", num_classes=3).eval()
    changed: Any = swap(resnet, "dcls", where="layer[12].*.conv[12]", example=torch.randn(1, 3, 64, 64))
    assert [row.path for row in changed.swap_report.layers] == [f"layer{n}.0.conv{k}" for n in (1, 2) for k in (1, 2)]
    assert changed.swap_report.difference < 1e-4, str(changed.swap_report)
    save(changed, tmp_path / "resnet")
    assert torch.equal(from_pretrained(tmp_path / "resnet")(x), changed(x))
    changed.train()(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(p.grad is not None for p in changed.parameters())


class _ReadsItsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(self.a(x), self.b.weight, padding=1)


def test_kernels_that_are_not_a_layer_s_own_stay() -> None:
    model = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(4)))
    model[2].weight = model[1].weight
    torch.nn.utils.spectral_norm(model[3])
    with pytest.raises(ValueError, match=r"1, 2: another module has the same parameter; 3: a hook computes its weight"):
        swap(model, "dcls")
    with pytest.raises(ValueError, match=r"does not run with dcls: .*; leave b out"):
        swap(_ReadsItsWeight(), "dcls", example=torch.randn(1, 3, 8, 8))


def test_hooks_do_not_disturb_the_comparison_of_layers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    calls: list[int] = []
    model[1].register_forward_hook(lambda module, args, out: calls.append(1) or out * 2)
    new: Any = swap(model, "dcls")
    assert [row.transfer for row in new.swap_report.layers] == ["exact"]
    assert calls == []
    x = torch.randn(1, 3, 8, 8)
    assert torch.allclose(new(x), model(x), atol=1e-5)


def test_compiled_scripted_and_lazy_networks() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)).eval()
    new: Any = swap(torch.compile(model, backend="eager"), "dcls", example=torch.randn(1, 3, 8, 8))
    assert isinstance(new, nn.Sequential)
    assert new.swap_report.difference < 1e-5
    with pytest.raises(ValueError, match="TorchScript cannot be changed"):
        swap(torch.jit.trace(model, torch.randn(1, 3, 8, 8)), "dcls")
    with pytest.raises(ValueError, match=r"0.weight has no shape yet"):
        swap(nn.Sequential(nn.LazyConv2d(4, 3)), "dcls")
