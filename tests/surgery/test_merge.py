"""Inference forms: what is folded, what must not be, what is put back, what is saved."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from torchconv.cli import main
from torchconv.models import create_model
from torchconv.ops.dcls import DCLSConv2d
from torchconv.ops.plain import SeparableConv2d
from torchconv.surgery import merge, swap
from torchconv.surgery._probe import difference, make_up
from torchconv.weights import load, save


def settle(model: nn.Module, seed: int = 0) -> Any:
    """Batch norms as after training: nothing neutral that would hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if getattr(module, "running_var", None) is not None:
            norm: Any = module
            for tensor, low, high in (
                (norm.running_var, 0.5, 2.0),
                (norm.running_mean, -1.0, 1.0),
                (norm.weight, 0.5, 1.5),
                (norm.bias, -0.5, 0.5),
            ):
                if tensor is not None:
                    tensor.data.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return model.eval()


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def norms(model: nn.Module) -> int:
    return sum("BatchNorm" in type(m).__name__ for m in model.modules())


LAYERS = {
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1, bias=False), nn.BatchNorm1d(6), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, 2, groups=2, padding_mode="reflect", padding=1), nn.BatchNorm2d(6), (2, 4, 9, 8)),
    "conv3d": (nn.Conv3d(4, 6, 2, dilation=2), nn.BatchNorm3d(6, affine=False), (2, 4, 5, 6, 7)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, 2, groups=2), nn.BatchNorm2d(6), (2, 4, 5, 6)),
    "linear": (nn.Linear(4, 6), nn.BatchNorm1d(6), (3, 4)),
    "sync": (nn.Conv2d(4, 6, 1), nn.SyncBatchNorm(6), (2, 4, 5, 5)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_norm_after_a_layer_is_folded(kind: str) -> None:
    layer, norm, shape = LAYERS[kind]
    model = settle(nn.Sequential(layer, norm, nn.ReLU()).double())
    before = copy.deepcopy(model.state_dict())
    fast: Any = merge(model, noise(*shape).double())
    assert isinstance(fast[1], nn.Identity)
    torch.testing.assert_close(fast(noise(*shape).double()), model(noise(*shape).double()))
    assert fast[0].weight.dtype == torch.float64
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items()), "the original is left as it is"
    assert norms(model) == 1


@pytest.mark.parametrize("groups", [1, 2])
def test_a_norm_before_a_layer_is_folded_where_nothing_is_padded(groups: int) -> None:
    norm = nn.BatchNorm2d(4)
    model = settle(nn.Sequential(norm, nn.Conv2d(4, 6, 3, groups=groups), nn.ReLU()))
    fast: Any = merge(model, noise(2, 4, 8, 8))
    assert [row.order for row in fast.merge_report.folded] == ["before"]
    torch.testing.assert_close(fast(noise(2, 4, 8, 8)), model(noise(2, 4, 8, 8)))
    padded: Any = merge(nn.Sequential(norm, nn.Conv2d(4, 6, 3, padding=1)), noise(2, 4, 8, 8))
    assert "pads with zeros" in padded.merge_report.kept["0"]
    head = settle(nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3)))
    short: Any = merge(head)
    torch.testing.assert_close(short(noise(5, 4)), head(noise(5, 4)))
    assert norms(short) == 0


def test_one_norm_behind_another() -> None:
    model = settle(
        nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    )
    fast = merge(model)
    assert norms(fast) == 0
    torch.testing.assert_close(fast(noise(2, 3, 8, 8)), model(noise(2, 3, 8, 8)))


class Tangled(nn.Module):
    """Everything in it that looks like a pair is none, except for the last."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(4, 4, 3, padding=1)
        self.first, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.forked, self.after_fork = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.tied, self.after_tied = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.twin = nn.Conv2d(4, 4, 1)
        self.twin.weight = self.tied.weight
        self.apart, self.after_sum = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.batch = nn.BatchNorm2d(4, track_running_stats=False)
        self.one, self.other, self.common = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.watched, self.after_watched = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.last, self.end = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if float(x.abs().sum()) == 0:  # no tracer gets past this
            return x, x
        x = self.first(self.shared(x)) + self.second(self.shared(x))
        forked = self.forked(x)
        x = self.after_fork(forked) * forked.sigmoid()
        x = self.after_tied(self.tied(x)) + self.twin(x)
        x = self.after_sum(self.apart(x) + x)
        x = self.common(self.one(x)) + self.common(self.other(x))
        x = self.after_watched(self.watched(self.batch(x)))
        y = self.end(self.last(x.relu()))
        return y, forked


def test_what_must_not_be_folded_stays() -> None:
    torch.manual_seed(0)
    model = settle(Tangled())
    seen: list[torch.Tensor] = []
    model.watched.register_forward_hook(lambda module, args, out: seen.append(out.detach().clone()))
    model.end.register_forward_hook(lambda module, args, out: None)
    x = noise(2, 4, 8, 8)
    fast: Any = merge(model, x)
    kept = fast.merge_report.kept
    assert not fast.merge_report.folded
    assert "more than once" in kept["first"]
    assert "used elsewhere" in kept["after_fork"]
    assert "shared" in kept["after_tied"]
    assert "used by more than" in kept["after_sum"]
    assert "runs 2 times" in kept["common"]
    assert "own statistics" in kept["batch"]
    assert "hooks" in kept["after_watched"]
    assert "hooks" in kept["end"]
    seen.clear()
    model(x), fast(x)
    assert torch.equal(*seen), "a hook sees what it saw"
    assert difference(fast(x), model(x)) == 0
    model.end._forward_hooks.clear()
    again: Any = merge(model, x)
    assert [row.path for row in again.merge_report.folded] == ["end"]
    assert difference(again(x), model(x)) < 1e-5


def test_computed_parameters_become_plain() -> None:
    torch.manual_seed(0)
    conv = parametrizations.spectral_norm(nn.Conv2d(3, 4, 3))
    model = settle(nn.Sequential(conv, nn.BatchNorm2d(4), parametrizations.weight_norm(nn.Conv2d(4, 4, 1))))
    fast: Any = merge(model)
    assert type(fast[0]) is nn.Conv2d
    assert norms(fast) == 0
    torch.testing.assert_close(fast(noise(2, 3, 8, 8)), model(noise(2, 3, 8, 8)))
    assert norms(merge(model, fold=False)) == 1
    behind = settle(nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)))
    plain: Any = merge(behind)
    assert norms(plain) == 0
    assert isinstance(plain[0].weight, nn.Parameter)
    assert plain[0].weight.requires_grad
    torch.testing.assert_close(plain(noise(2, 3, 8, 8)), behind(noise(2, 3, 8, 8)))
    assert torch.nn.utils.parametrize.is_parametrized(model[0]), "the original is left as it is"


def test_parts_hooks_sharing_and_cost() -> None:
    torch.manual_seed(0)
    part, wide = DCLSConv2d(4, 4, 5, kernel_count=3), SeparableConv2d(4, 4, 5)
    calls: list[str] = []
    part.register_forward_hook(lambda module, args, out: calls.append(type(module).__name__))
    model = settle(nn.Sequential(nn.Conv2d(3, 4, 1), part, nn.BatchNorm2d(4), wide, nn.ReLU(), part))
    x = noise(2, 3, 16, 16)
    fast: Any = merge(model, x)
    assert fast[1] is fast[5]
    assert type(fast[1]) is nn.Conv2d
    assert "multiply-adds" in fast.merge_report.kept["3"]
    assert fast.merge_report.merged[0].path == "1"
    calls.clear()
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
    assert calls[:2] == ["Conv2d", "Conv2d"]
    assert type(merge(model)[3]) is nn.Conv2d, "without an example every part is merged"


def test_what_does_not_agree_is_put_back() -> None:
    class Wrong(nn.Conv2d):
        def merge(self) -> nn.Module:
            return nn.Identity()

    class Sly(nn.Conv2d):
        """Its forward ignores the bias, so that a fold loses the shift."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.conv2d(x, self.weight, None, self.stride, self.padding)

    class Broken(nn.Conv2d):
        def merge(self) -> nn.Module:
            raise NotImplementedError("not yet")

    torch.manual_seed(0)
    model = settle(
        nn.Sequential(
            Wrong(3, 3, 3, padding=1),
            Broken(3, 3, 1),
            nn.Conv2d(3, 3, 1),
            nn.BatchNorm2d(3),
            Sly(3, 4, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 4, 3),
            nn.BatchNorm2d(4),
        )
    )
    fast: Any = merge(model)
    report = fast.merge_report
    assert "differs" in report.kept["0"]
    assert "not yet" in report.kept["1"]
    assert report.kept["5"] == "the network's output would differ"
    assert [row.path for row in report.folded] == ["3", "7"]
    assert report.difference < 1e-5
    assert "2 batch norms folded, 3 kept" in str(report)

    class Restless(nn.Conv2d):
        count = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            type(self).count += 1
            return super().forward(x) * type(self).count

    with pytest.raises(ValueError, match="from run to run"):
        merge(nn.Sequential(Restless(3, 3, 1), nn.BatchNorm2d(3)))


def test_inputs_and_types() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> dict[str, Any]:
            return {"out": [self.norm(self.conv(x)) * scale]}

    model = settle(Two())
    x, scale = noise(2, 3, 4, 4), torch.tensor(2.0)
    for example in ((x, scale), {"x": x, "scale": scale}):
        fast: Any = merge(model, example, timed=isinstance(example, dict))
        assert norms(fast) == 0
        assert difference(fast(x, scale), model(x, scale)) < 1e-6
    assert fast.merge_report.speed.low <= fast.merge_report.speed.median <= fast.merge_report.speed.high
    with pytest.raises(ValueError, match="example=None: no input for Two"):
        merge(model)
    half = settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).bfloat16()
    narrow: Any = merge(half, timed=True)
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    assert narrow.merge_report.difference < 1e-5
    assert difference(narrow(x.bfloat16()), half(x.bfloat16())) < 0.05
    last = settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).to(memory_format=torch.channels_last)
    kept_layout: Any = merge(last)
    assert kept_layout[0].weight.is_contiguous(memory_format=torch.channels_last)
    with torch.device("meta"):
        unreal = nn.Sequential(DCLSConv2d(3, 4, 5), nn.BatchNorm2d(4)).eval()
        assert type(merge(unreal, torch.empty(1, 3, 8, 8))[0]) is nn.Conv2d
    with pytest.raises(ValueError, match="tolerance"):
        merge(model, (x, scale), tolerance=0)


def test_difference() -> None:
    one = torch.ones(3)
    assert difference([one], [one * 2]) == 0.5
    assert difference(one, torch.ones(4)) == float("inf")
    nan = torch.tensor([1.0, float("nan"), float("inf")])
    assert difference(nan, nan) == 0
    assert difference(one, nan) == float("inf")
    with pytest.raises(ValueError, match="holds no tensor"):
        difference("a", "b")
    assert make_up(nn.Sequential(nn.ReLU(), nn.Linear(5, 2))).shape == (2, 5)
    assert make_up(nn.Sequential(nn.Conv1d(3, 2, 200), nn.ReLU())).shape == (2, 3, 1024)


RELOAD = """
import sys, torch
from torchconv.weights import load
from torchconv.surgery._probe import make_up
for path in sys.argv[1:]:
    model = load(path)
    torch.save(model(torch.load(path + ".x")), path + ".y")
"""


def test_merged_networks_load_in_a_fresh_process(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    resnet = timm.create_model("resnet10t", num_classes=3)
    networks = {
        "whole.safetensors": create_model("inception_next_atto", num_classes=3),
        "folded": resnet,
        "blocks.safetensors": timm.create_model("repghostnet_050", num_classes=3),
        "swapped": swap(resnet, "dcls", where="layer1.*", kernel_size=5),
    }
    verbs = {"whole.safetensors": "merge", "folded": "fold", "blocks.safetensors": "merge", "swapped": "swap"}
    for name, network in networks.items():
        x = noise(1, 3, 64, 64)
        fast: Any = merge(settle(network), x)
        assert verbs[name] in {e["verb"] for e in fast.torchconv_config["edits"]}
        assert norms(fast) < norms(network)
        path = save(fast, tmp_path / name)
        assert path.is_file() == name.endswith(".safetensors")
        torch.save(x, f"{path}.x")
        assert torch.equal(load(path)(x), fast(x))
    paths = [str(tmp_path / name) for name in networks]
    subprocess.run([sys.executable, "-c", RELOAD, *paths], check=True)
    for name, network in networks.items():
        assert difference(torch.load(tmp_path / f"{name}.y"), network(noise(1, 3, 64, 64))) < 1e-4
    merged_twice: Any = merge(load(tmp_path / "folded"))
    assert not merged_twice.merge_report.folded


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    merged, swapped = tmp_path / "merged.safetensors", tmp_path / "swapped"

    def ask(*arguments: Any) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main([str(a) for a in arguments])
        said = capsys.readouterr()
        return int(end.value.code or 0), said.out, said.err

    code, out, _ = ask("merge", "timm:test_byobnet", "-o", merged, "--size", 32)
    assert code == 0
    assert "14 batch norms folded" in out
    assert "MACs: " in out
    assert "× as fast" in out
    assert norms(load(merged)) == 0
    code, out, _ = ask("swap", merged, "--to", "dcls", "--match", "params", "--size", 32, "-o", swapped)
    assert code == 0
    assert "layers replaced" in out
    assert (swapped / "config.json").is_file()
    code, _, err = ask("merge", tmp_path / "nothing", "-o", merged)
    assert code == 2
    assert "give timm:NAME" in err
