"""Feed-forward layers in kernel form: what is found, how good it is, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from torchconv.ops.snnk import BundledFeatures, ReLUFeatures
from torchconv.surgery import bundle
from torchconv.weights import load, save


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 40), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(40, 5))


def inputs(count: int = 600) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(1))


def test_error_falls_with_features_and_is_of_unseen_inputs() -> None:
    errors = []
    for features in (8, 32, 128):
        rows = [bundle(mlp(), features, example=inputs(), seed=s).bundle_report.stacks[0] for s in range(3)]  # type: ignore[union-attr]
        errors.append(sum(row.error for row in rows) / 3)
        assert len({row.error for row in rows}) == 3, "it varies with the seed"
        assert rows[0].parameters == (6 * 40 + 40 + 40 * 5 + 5, features * 5 + 5)
        assert rows[0].fixed == features * 7
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.6 * rows[0].affine
    model = mlp()
    new: Any = bundle(model, 128, example=inputs())
    fresh = torch.randn(500, 6, generator=torch.Generator().manual_seed(2))
    error = float((new(fresh) - model.eval()(fresh)).norm() / model(fresh).norm())
    assert error == pytest.approx(new.bundle_report.stacks[0].error, rel=0.5)


def test_places_modes_and_seeds() -> None:
    model = mlp()
    state = torch.get_rng_state()
    new: Any = bundle(model, 0.5, example=inputs())
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(new[0][0], ReLUFeatures)
    assert new[0][0].num_features == 20
    assert [type(m) for m in new[1:]] == [nn.Identity] * 3, "no dropout on what is no hidden unit"
    assert all(m.training for m in new.modules())
    assert torch.equal(bundle(model, 0.5, example=inputs())(inputs()), new(inputs()))
    assert model[0].out_features == 40
    new(inputs()).sum().backward()
    assert all(p.grad is not None for p in new.parameters())
    report = str(new.bundle_report)
    assert "6–40–5  20 features" in report
    assert "fitted to the example" in report
    unfitted: Any = bundle(model, 8)
    assert "not fitted" in str(unfitted.bundle_report)
    assert unfitted.bundle_report.stacks[0].affine is None


def test_longer_stacks_are_bundled_whole() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 30), nn.Tanh(), nn.Linear(30, 20), nn.GELU(), nn.Linear(20, 3), nn.ReLU())
    new: Any = bundle(model, 16, example=inputs())
    (row,) = new.bundle_report.stacks
    assert row.widths == (6, 30, 20, 3)
    assert [type(m) for m in new[0]] == [ReLUFeatures, BundledFeatures, nn.Linear]
    assert isinstance(new[5], nn.ReLU)
    parametrizations.weight_norm(model[2])
    again: Any = bundle(model, 16, example=inputs())
    assert again.bundle_report.stacks[0].error == pytest.approx(row.error, rel=1e-3)
    chosen: Any = bundle(nn.Sequential(mlp(), nn.Tanh(), nn.Linear(5, 6), mlp()), 8, where="3.*", example=inputs())
    assert [row.path for row in chosen.bundle_report.stacks] == ["3.0"]


def test_timm_network(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_vit", img_size=32, num_classes=3).eval()
    x = torch.randn(4, 3, 32, 32)
    new: Any = bundle(model, 0.25, example=x)
    assert [row.path for row in new.bundle_report.stacks] == [f"blocks.{i}.mlp.fc1" for i in range(len(model.blocks))]
    save(new, tmp_path / "net")
    assert torch.equal(load(tmp_path / "net")(x), new(x))


def test_refusals() -> None:
    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.act, self.b = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.act(self.a(x))
            return self.b(hidden) + hidden.sum()

    act = nn.ReLU()
    shared = nn.Sequential(nn.Linear(6, 8), act, nn.Linear(8, 6), act)
    watched = mlp()
    watched[0].register_forward_hook(lambda module, args, out: None)
    broken = mlp()
    nn.init.constant_(broken[0].weight, torch.nan)
    for model, message in [
        (broken, "not finite"),
        (nn.Sequential(Uses()), "read from elsewhere"),
        (shared, "more than once"),
        (watched, "hook of 0"),
        (nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 2)), "takes linear"),
    ]:
        with pytest.raises(ValueError, match=message):
            bundle(model, 4, example=inputs())
    for features in (0, 1.5):
        with pytest.raises(ValueError, match="num_features"):
            bundle(mlp(), features, example=inputs())
    with pytest.raises(ValueError, match="too few"):
        bundle(mlp(), 4, example=inputs(1))
