"""Residual stacks in parallel form: exact cases, order of the error, what is found and what is left alone."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchconv.cli import main
from torchconv.models import create_model
from torchconv.ops.shallow import ParallelResidual2d, residual_stack
from torchconv.surgery import ParallelBlocks, parallelise
from torchconv.weights import load, save


class Block(nn.Module):
    """x + act(conv(x)); with ``last`` a ReLU after the sum."""

    def __init__(self, width: int = 4, act: nn.Module | None = None, last: bool = False, scale: float = 1.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.act, self.last, self.scale = act or nn.Identity(), last, scale

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.scale * self.act(self.conv(x))
        return y.relu() if self.last else y


def stack(blocks: int, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), *(Block(**options) for _ in range(blocks))).double()


def image() -> Tensor:
    return torch.randn(2, 3, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def changed(model: nn.Module, **options: Any) -> Any:
    return parallelise(model, example=image(), **options)


def test_first_order_is_the_sum_and_second_order_of_two_linear_blocks_is_exact() -> None:
    model = stack(2)
    first, second = (changed(model, order=order) for order in (1, 2))
    x = model[:2](image())
    assert torch.allclose(first(image()), x + model[2].conv(x) + model[3].conv(x))
    assert first.parallelise_report.stacks[0].error > 0.01
    assert second.parallelise_report.difference < 1e-12
    assert torch.allclose(second(image()), model(image()))


def test_orders_equal_those_of_the_operator() -> None:
    for act, name in [(nn.Tanh(), "tanh"), (nn.Identity(), "linear"), (nn.ReLU(), "relu")]:
        model = stack(4, act=act)
        weights = [block.conv.weight for block in model[2:]]  # type: ignore[union-attr]
        x = model[:2](image())
        for order in (1, 2):
            expected = residual_stack(x, weights, None, order, name)
            assert torch.allclose(changed(model, order=order)(image()), expected)


def test_error_falls_with_the_square_and_the_cube_of_the_residuals() -> None:
    for order in (1, 2):
        errors = [
            changed(stack(3, act=nn.Tanh(), scale=scale), order=order).parallelise_report.stacks[0].error
            for scale in (0.1, 0.05, 0.025)
        ]
        assert all(0.9 < a / b / 2 ** (order + 1) < 1.1 for a, b in itertools.pairwise(errors))
    kinks = [
        changed(stack(3, act=nn.Tanh(), last=True, scale=scale)).parallelise_report.stacks[0].error
        for scale in (0.1, 0.05)
    ]
    assert 1.9 < kinks[0] / kinks[1] < 2.2, "as documented: with a ReLU after the sum only in proportion"


def test_a_relu_after_the_sum_is_kept_and_helps() -> None:
    model = stack(3, last=True)
    new = changed(model)
    (row,) = new.parallelise_report.stacks
    assert row.relu
    assert "ReLU after the sum" in str(new.parallelise_report)
    x = model[:2](image())
    bare = sum(block(x) for block in model[2:]) - 2 * x
    assert torch.allclose(new(image()), bare.relu())
    truth = model(image())
    assert (bare.relu() - truth).norm() <= (bare - truth).norm()
    assert row.error == pytest.approx(float((bare.relu() - truth).norm() / truth.norm()))
    assert row.gains[1] == pytest.approx(float((model[3](x) - x).norm() / x.norm()))


def test_networks_of_torchvision_and_timm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    timm, vision = pytest.importorskip("timm"), pytest.importorskip("torchvision.models")
    x = torch.randn(1, 3, 48, 48)
    block = vision.resnet.BasicBlock
    resnet: Any = parallelise(vision.ResNet(block, [3, 2, 1, 3]), order=2, example=x)
    found = [row.blocks for row in resnet.parallelise_report.stacks]
    assert found == [("layer1.0", "layer1.1", "layer1.2"), ("layer4.1", "layer4.2")]
    assert all(row.relu for row in resnet.parallelise_report.stacks)
    resnet.train()(torch.randn(2, 3, 48, 48)).sum().backward()
    assert all(p.grad is not None for p in resnet.parameters())
    options = {"depths": (1, 2, 3, 1), "dims": (8, 8, 16, 16), "num_classes": 3, "ls_init_value": 0.1}
    net = timm.create_model("convnext_atto", **options).eval()
    errors = []
    for order in (1, 2):
        convnext: Any = parallelise(net, order=order, example=x)
        assert [len(row.blocks) for row in convnext.parallelise_report.stacks] == [2, 3]
        errors.append(convnext.parallelise_report.difference)
    assert errors[1] < errors[0] / 2
    save(convnext, tmp_path / "net")
    assert torch.equal(load(tmp_path / "net")(x), convnext(x))
    with pytest.raises(ValueError, match="two blocks in a row"):
        parallelise(vision.vgg11(), example=x)


def test_the_library_s_own_stack() -> None:
    model = create_model("residual_sequential", width=4, n_layers=3).train()
    x = torch.randn(2, 1, 8, 8)
    new: Any = parallelise(model, example=x)
    assert isinstance(new.stack, ParallelResidual2d)
    assert new.stack.order == 1
    assert new.stack.training
    twin = create_model("residual_parallel", width=4, n_layers=3)
    twin.load_state_dict(model.state_dict())
    assert torch.allclose(new.eval()(x), twin.eval()(x), atol=1e-6)
    assert len(new.parallelise_report.stacks[0].gains) == 3
    assert model.stack.order is None
    linear = create_model("residual_sequential", width=4, n_layers=2, activation="linear")
    exact: Any = parallelise(linear, order=2, example=x, where="stack")
    assert exact.parallelise_report.difference < 1e-6


def test_selection_and_size() -> None:
    model = stack(5)
    pairs = changed(model, size=2)
    assert [row.blocks for row in pairs.parallelise_report.stacks] == [("2", "3"), ("4", "5")]
    assert pairs.parallelise_report.difference < changed(model).parallelise_report.difference
    some = changed(model, where=lambda name, module: name in ("3", "4"))
    assert [row.blocks for row in some.parallelise_report.stacks] == [("3", "4")]
    assert isinstance(some[3], ParallelBlocks)
    assert isinstance(some[4], nn.Identity)
    assert some[2](torch.ones(1, 4, 5, 5).double()).shape == (1, 4, 5, 5)


def test_what_cannot_be_taken_apart_is_left() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = Block(), Block(), Block()

        def forward(self, x: Tensor) -> Tensor:
            first = self.a(x)
            return self.c(self.b(first)) * first

    class InPlace(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.abs_())

    def asked(*blocks: nn.Module) -> Any:
        return parallelise(nn.Sequential(nn.Conv2d(3, 4, 1), *blocks, Block(), Block()).double(), example=image())

    twice = Block()
    for blocks, kept, reason in [
        ((Skip(),), "1.a", "read from elsewhere"),
        ((nn.Sequential(InPlace(), InPlace()),), "1.0", "in place"),
        ((nn.Sequential(twice, twice),), "1.0", "more than once"),
    ]:
        report = asked(*blocks).parallelise_report
        assert reason in report.kept[kept]
        assert f"{kept}: kept" in str(report)
    for options, message in [({"order": 3}, "order=3"), ({"size": 1}, "size=1"), ({"where": "x*"}, "where=")]:
        with pytest.raises(ValueError, match=message):
            changed(stack(2), **options)
    with pytest.raises(ValueError, match="order=0"):
        ParallelBlocks([nn.Identity()], order=0)


def test_a_shortcut_that_is_a_whole_view_counts() -> None:
    class Sliced(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :, ::1] + self.conv(x)

    class Flipped(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x.flip(2) + self.conv(x)

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Sliced(), Sliced(), Flipped(), Flipped()).double()
    assert [row.blocks for row in changed(model).parallelise_report.stacks] == [("1", "2")]


def test_modes_hooks_and_the_original_stay() -> None:
    model = stack(3)
    model[3].eval()
    model[0].eval()
    calls: list[int] = []
    for number in (2, 3):
        model[number].register_forward_hook(lambda module, args, out, number=number: calls.append(number))
    before = model(image())
    new = changed(model)
    assert [m.training for m in new[:3]] == [False, True, True]
    assert [block.training for block in new[2].blocks] == [True, False, True]
    calls.clear()
    new(image())
    assert calls == [2, 3]
    assert torch.equal(model(image()), before)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "shallow"
    with pytest.raises(SystemExit) as stopped:
        main(["parallelise", "torchconv:residual_sequential", "-o", str(out), "--size", "12", "--order", "2"])
    assert stopped.value.code == 0
    assert "1 stacks in parallel form, truncated at order 2" in capsys.readouterr().out
    assert load(out).stack.order == 2  # type: ignore[union-attr]


def test_stacks_that_add_nothing_are_called_so() -> None:
    report = str(changed(stack(3, scale=0.0)).parallelise_report)
    assert "1 of 1 stacks add nothing" in report
    assert "add nothing" not in str(changed(stack(3)).parallelise_report)


@pytest.mark.parametrize("way", [lambda x, y: x - y, lambda x, y: torch.add(x, y, alpha=0.5)])
def test_differences_and_scaled_sums_count(way: Any) -> None:
    class Other(Block):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = way(x, self.conv(x))
            return y

    torch.manual_seed(0)
    model = nn.Sequential(Other(3), Other(3)).double()
    wide = changed(model)
    assert [row.blocks for row in wide.parallelise_report.stacks] == [("0", "1")]
    x = image()
    assert torch.allclose(wide(x), model[0](x) + model[1](x) - x)


def test_a_sum_with_a_product_counts() -> None:
    net = create_model("eca_resnet18", num_classes=3).eval()
    wide: Any = parallelise(net, example=torch.randn(1, 3, 32, 32))
    assert [row.blocks for row in wide.parallelise_report.stacks] == [("layer1.0", "layer1.1")]
