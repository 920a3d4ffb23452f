"""Checkpoints as authors publish them, and networks as folders."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.ops.harness import randomise
from torchconv.models import create_model
from torchconv.weights import LoadReport, check_place, from_pretrained, load, load_official, read_state, save

# Options that a file's shapes must give back.
NETS: dict[str, dict[str, Any]] = {
    "unireplknet_a": {},
    "inception_next_atto": {},
    "lsnet_t": {"img_size": 64, "distillation": True},
    "attnet_xxs": {},
    "eca_resnet18": {"k_size": (3, 9, 5, 7)},
    "convnext_dcls_mini": {},
    "spartan_s": {"layer_depths": (1, 1, 2, 1), "expand_ratios": (4, 3, 2, 3), "init_dim": 16, "dims": (24, 32, 40)},
}


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise(create_model(name, num_classes=5, in_chans=2, **NETS[name])).eval()


def image() -> Tensor:
    return torch.randn(1, 2, 64, 64, generator=torch.Generator().manual_seed(1))


def close(ours: Tensor, expected: Tensor) -> bool:
    return torch.allclose(ours, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", NETS)
def test_official_files(name: str, tmp_path: Path) -> None:
    net = built(name)
    state = net.state_dict()
    with torch.no_grad():
        expected = net(image())
    torch.save({"model": state, "epoch": 3}, tmp_path / "a.pth")
    torch.save({"state_dict": {f"module.{n}": t for n, t in state.items()}}, tmp_path / "b.pt")
    save_file({n: t.clone() for n, t in state.items()}, tmp_path / "c.safetensors")
    for file in ("a.pth", "b.pt", "c.safetensors"):
        loaded: Any = load_official(name, tmp_path / file)
        assert not loaded.training
        assert loaded.load_report.complete
        with torch.no_grad():
            assert torch.equal(loaded(image()), expected), file
    other: Any = load_official(name, tmp_path / "a.pth", strict=False, num_classes=3)
    assert other(image()).shape == (1, 3)
    assert {n.rsplit(".", 1)[-1] for n in other.load_report.mismatched} <= {
        "weight",
        "bias",
        "running_mean",
        "running_var",
    }
    assert other.load_report.mismatched


@pytest.mark.parametrize("name", ["unireplknet_a", "inception_next_atto", "lsnet_t", "convnext_dcls_mini", "spartan_s"])
def test_merged_files(name: str, tmp_path: Path) -> None:
    net: Any = built(name)
    with torch.no_grad():
        expected = net(image())
        torch.save(net.merge().state_dict(), tmp_path / "merged.pth")
        assert close(load_official(name, tmp_path / "merged.pth")(image()), expected)


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    state = built("eca_resnet18").state_dict()
    state["extra.weight"] = torch.zeros(2)
    del state["layer2.0.conv1.weight"]
    state["bn1.weight"] = torch.zeros(9)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="missing") as caught:
        load_official("eca_resnet18", tmp_path / "x.pth")
    for word in ("layer2.0.conv1.weight", "extra.weight", "bn1.weight", "(9,) in the file, (64,) in the network"):
        assert word in str(caught.value)
    assert "… and 5 more" in str(LoadReport([], missing=[f"p{i}" for i in range(35)]))


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("touched"),))


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"w": torch.zeros(1)}, "args": Evil()}, "evil.pth")
    Path("plain.pkl").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.pth", "plain.pkl"):
        with pytest.raises(ValueError, match="path="):
            read_state(name)
    assert not Path("touched").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x04."])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_files(content: bytes, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"damaged{suffix}"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="path="):
        read_state(file)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_state(tmp_path / "absent.pth")
    torch.save({"epoch": 1}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="no tensors"):
        read_state(tmp_path / "empty.pth")


def test_averaged_weights(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.zeros(1)}, "model_ema": {"module.w": torch.ones(1)}}, tmp_path / "both.pth")
    assert read_state(tmp_path / "both.pth")["w"] == 0
    assert read_state(tmp_path / "both.pth", ema=True)["w"] == 1


def test_folder_in_a_fresh_process(tmp_path: Path) -> None:
    net = built("convnext_dcls_mini")
    with torch.no_grad():
        expected = net(image())
    save(net, tmp_path / "net")
    torch.save({"x": image(), "y": expected}, tmp_path / "case.pt")
    code = (
        "import torch, torchconv.weights as w; c = torch.load('case.pt', weights_only=True); "
        "assert torch.equal(w.from_pretrained('net')(c['x']), c['y']); print('equal')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "equal", done.stderr
    alone = load(tmp_path / "net" / "model.safetensors")
    assert torch.equal(alone(image()), expected)


def test_timm_networks_and_types(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    net = timm.create_model("resnet10t", num_classes=4).eval().bfloat16()
    save(net, tmp_path / "net")
    again = from_pretrained(tmp_path / "net")
    x = torch.randn(1, 3, 64, 64).bfloat16()
    assert torch.equal(again(x), net(x))
    assert again(x).shape == (1, 4)


def test_networks_without_a_record(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no record"):
        save(nn.Linear(2, 2), tmp_path / "net")
    assert not (tmp_path / "net").exists()
    net = create_model("inception_next_atto", num_classes=2, token_mixer=lambda dim, dilation: nn.Identity())
    with pytest.raises(ValueError, match="JSON"):
        save(net, tmp_path / "net")
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load(tmp_path / "nowhere")


def test_layers_changed_by_hand_are_saved(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    net = timm.create_model("test_resnet", num_classes=5)
    net.reset_classifier(3)
    net.conv1[0] = nn.Conv2d(1, 16, 3, padding=1, bias=False)
    net.bn1, net.act1, net.maxpool = nn.GroupNorm(4, net.bn1.num_features), nn.SiLU(), nn.Identity()
    x = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        expected = randomise(net).eval()(x)
        loaded: Any = load(save(net, tmp_path / "net"))
        assert torch.equal(loaded(x), expected)
        assert loaded.num_classes == 3
        assert torch.equal(load(save(loaded, tmp_path / "again"))(x), expected)
    own = create_model("eca_resnet18", num_classes=5)
    own.fc = nn.Linear(512, 2)
    assert load(save(own, tmp_path / "own.safetensors")).fc.out_features == 2


def test_what_could_not_be_read_again_is_not_saved(tmp_path: Path) -> None:
    net = create_model("eca_resnet18", num_classes=5)
    net.fc = nn.Sequential(nn.Dropout(0.1), nn.Linear(512, 5))
    with pytest.raises(ValueError, match=r"could not be read again, fc \(Sequential\)"):
        save(net, tmp_path / "net")
    net = create_model("eca_resnet18", num_classes=5)
    net.register_buffer("mean", torch.zeros(3))
    with pytest.raises(ValueError, match=r"mean +in the file"):
        save(net, tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


def test_damaged_and_foreign_files_say_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "empty.safetensors").touch()
    with pytest.raises(ValueError, match="no whole file of safetensors"):
        load(tmp_path / "empty.safetensors")
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="does not say how the network is built"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        load(tmp_path)


def test_places_are_looked_at_before_work(tmp_path: Path) -> None:
    check_place(tmp_path / "new" / "folder")
    check_place(tmp_path / "new.safetensors")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    for place in ("file", "file/below", "file/net.safetensors"):
        with pytest.raises(NotADirectoryError, match="is a file"):
            check_place(tmp_path / place)
