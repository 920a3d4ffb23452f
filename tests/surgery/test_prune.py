"""Channels removed for good: what belongs together, what is computed afterwards, what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv.compress.masksparsity import channel_masks
from torchconv.surgery import ChannelGroup, channel_groups, merge, prune
from torchconv.weights import load, save


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """In eval mode, with norms that are not the identity."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, (low, high) in (
                (module.weight, (0.1, 1.5)),
                (module.bias, (-0.5, 0.5)),
                (module.running_mean, (-0.5, 0.5)),
                (module.running_var, (0.5, 2.0)),
            ):
                if tensor is not None:
                    tensor.data.uniform_(low, high, generator=generator)
    return model.eval()


def silenced(model: nn.Module, masks: dict[str, Tensor], beta: bool = True) -> nn.Module:
    """A copy whose removed channels have zero γ, and β if asked for."""
    new = copy.deepcopy(model)
    for name, keep in masks.items():
        norm: Any = new.get_submodule(name)
        norm.weight.data[~keep] = 0
        if beta:
            norm.bias.data[~keep] = 0
    return new


def apart(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        ours, theirs = a(x), b(x)
    return float((ours - theirs).abs().max() / theirs.abs().max())


class Plain(nn.Module):
    """Convolutions, depthwise ones, a gate, an addition in place, a flattened map."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.stem, self.stem_bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise, self.depthwise_bn = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.squeeze, self.squeeze_bn, self.gate = nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 8, 1)
        kind: Any = nn.ConvTranspose2d if transposed else nn.Conv2d
        self.out, self.out_bn = kind(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8 * 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_bn(self.stem(x)))
        y = F.relu(self.depthwise_bn(self.depthwise(x)))
        gate = self.gate(F.relu(self.squeeze_bn(self.squeeze(y.mean((2, 3), keepdim=True)))))
        y = y * gate.sigmoid()
        y = self.out_bn(self.out(y)).add_(y)
        return self.fc(F.adaptive_max_pool2d(F.relu_(y), 3).flatten(1))


@pytest.mark.parametrize("transposed", [False, True])
def test_it_computes_what_the_dense_network_does_with_silent_channels(transposed: bool) -> None:
    torch.manual_seed(0)
    net, x = randomised(Plain(transposed)), torch.randn(2, 3, 6, 6)
    groups = channel_groups(net, x)
    assert [sorted(g.norms) for g in groups if len(g.norms) > 1] == [["depthwise_bn", "out_bn", "stem_bn"]]
    assert not any(g.reason for g in groups)
    masks = channel_masks(net, ratio=0.5, groups=groups)
    small: Any = prune(net, masks, x)
    assert apart(small, silenced(net, masks), x) < 1e-6
    assert (small.depthwise.groups, small.fc.in_features, small.out.in_channels) == (4, 36, 4)
    numbers = sum(p.numel() for p in small.parameters())
    expected = (3 * 4 * 9 + 4) + 4 * 9 + (4 * 2 + 2) + (2 * 4 + 4) + (4 * 4 * 9 + 4) + 2 * (4 + 4 + 2 + 4) + 36 * 5 + 5
    assert small.prune_report.parameters[1] == numbers == expected
    assert small.prune_report.macs[1] < small.prune_report.macs[0]
    small(x.requires_grad_()).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())


@pytest.mark.parametrize("name", ["mobilenetv2_035", "mobilenetv3_small_050"])
def test_networks_of_timm(name: str) -> None:
    torch.manual_seed(0)
    net, x = randomised(timm.create_model(name, num_classes=7)), torch.randn(1, 3, 64, 64)
    groups = channel_groups(net, x)
    assert not any(g.reason for g in groups)
    assert sum(len(g.norms) for g in groups) == sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    masks = channel_masks(net, ratio=0.4, groups=groups)
    assert apart(prune(net, masks, groups=groups), silenced(net, masks), x) < 1e-5


@pytest.mark.parametrize("ndim", [1, 3])
def test_other_dimensions(ndim: int) -> None:
    conv, norm = getattr(nn, f"Conv{ndim}d"), getattr(nn, f"BatchNorm{ndim}d")
    net = randomised(
        nn.Sequential(conv(2, 6, 3), norm(6), nn.GELU(), conv(6, 6, 1, bias=False), norm(6), conv(6, 2, 1))
    )
    x = torch.randn(2, 2, *[5] * ndim)
    masks = {"1": torch.arange(6) > 1, "4": torch.arange(6) != 3}
    small: Any = prune(net, masks, x)
    assert apart(small, silenced(net, masks), x) < 1e-6
    assert (small[3].in_channels, small[3].out_channels) == (4, 5)


def test_absorbed_constants() -> None:
    """Exact where nothing pads; without it the constants are lost."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, bias=False), nn.BatchNorm2d(6)]
    net = randomised(nn.Sequential(*layers, nn.SiLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 4)))
    x = torch.randn(2, 3, 9, 9)
    masks = {"1": torch.arange(8) > 2, "4": torch.arange(6) != 3}
    still = silenced(net, masks, beta=False)
    assert apart(prune(net, masks, x), still, x) > 1e-2
    absorbed: Any = prune(net, masks, x, absorb=True)
    assert apart(absorbed, still, x) < 1e-6
    assert absorbed[3].bias.shape == (5,)
    with pytest.raises(ValueError, match="absorb=True: needs example"):
        prune(net, masks, groups=channel_groups(net, x), absorb=True)


def test_saved_and_loaded(tmp_path: Path) -> None:
    net, x = randomised(timm.create_model("resnet10t", num_classes=3)), torch.randn(1, 3, 32, 32)
    small = prune(net, channel_masks(net, ratio=0.8, groups=channel_groups(net, x)), x, absorb=True).eval()
    again = load(save(small, tmp_path / "small"))
    assert apart(again, small, x) == 0
    twice = prune(again, channel_masks(again, ratio=0.5, groups=channel_groups(again, x)), x).eval()
    assert apart(load(save(merge(twice), tmp_path / "twice.safetensors")), twice, x) < 1e-4


def test_the_original_stays_and_the_rest_is_kept() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1)).train().bfloat16()
    net[1].requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    small: Any = prune(net, {"1": torch.arange(6) < 3}, torch.randn(2, 3, 8, 8).bfloat16())
    assert net.training
    assert small.training
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    assert small[0].weight.dtype == torch.bfloat16
    assert not small[1].weight.requires_grad
    assert small[0].weight.requires_grad
    assert small[1].num_batches_tracked.dim() == 0
    assert "6 → 3 (50%)" in str(small.prune_report)
    assert torch.equal(
        copy.deepcopy(small)(torch.ones(2, 3, 8, 8).bfloat16()), small(torch.ones(2, 3, 8, 8).bfloat16())
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pooling_in_any_layout(layout: torch.memory_format) -> None:
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)]
    net = randomised(nn.Sequential(*layers)).to(memory_format=layout)
    x = torch.randn(4, 3, 8, 8).to(memory_format=layout)
    masks = {"1": torch.arange(6) < 2}
    small: Any = prune(net, masks, x)
    assert apart(small, silenced(net, masks), x) < 1e-6
    assert small[0].weight.is_contiguous(memory_format=layout)


def test_masks_that_keep_all_change_nothing() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1))
    same: Any = prune(net, {"1": torch.ones(6, dtype=torch.bool)}, torch.randn(1, 3, 8, 8))
    assert same.prune_report.channels == {}
    assert same.prune_report.parameters[0] == same.prune_report.parameters[1]


class Awkward(nn.Module):
    """A norm whose channels go where they cannot be taken out."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.norm, self.how = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), how
        self.grouped, self.last = nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 4, 1)
        self.scale = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        changes: dict[str, Any] = {
            "grouped": lambda: self.grouped(y),
            "cat": lambda: torch.cat([y, y], 1)[:, 2:10],
            "chunk": lambda: torch.cat(y.chunk(2, 1), 1),
            "reshape": lambda: y.reshape(len(y), 4, 2, *y.shape[2:]).mean(2).repeat(1, 2, 1, 1),
            "scale": lambda: y * self.scale,
            "sum": lambda: y + y.sum(1, keepdim=True),
            "permute": lambda: y.permute(0, 2, 3, 1).softmax(-1).permute(0, 3, 1, 2),
            "weight": lambda: F.conv2d(y, self.last.weight * 2),
        }
        if self.how == "returned":
            return y
        changed: Tensor = changes[self.how]()
        return changed if changed.shape[1] == 4 else self.last(changed)


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("grouped", "grouped has groups"),
        ("cat", "cat"),
        ("chunk", "split"),
        ("reshape", "a reshape moves them"),
        ("scale", "another tensor"),
        ("sum", "sums over them"),
        ("permute", "permute"),
        ("weight", "a computed weight"),
        ("returned", "returns them"),
    ],
)
def test_what_cannot_be_removed_says_why(how: str, why: str) -> None:
    net, x = Awkward(how), torch.randn(2, 3, 6, 6)
    [group] = channel_groups(net, x)
    assert why in group.reason
    assert channel_masks(net, ratio=0.5, groups=[group]) == {}
    with pytest.raises(ValueError, match=r"masks=.*norm.*cannot be removed"):
        prune(net, {"norm": torch.arange(8) < 4}, x)


def test_widths_fixed_in_code() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.a(x))
            return self.b(y).reshape(y.shape)

    with pytest.raises(ValueError, match=r"masks=\['norm'\]: code of the network fixes their channels"):
        prune(Fixed().eval(), {"norm": torch.arange(8) < 4}, torch.randn(1, 3, 4, 4))


def test_bad_masks() -> None:
    net, x = randomised(Plain()), torch.randn(1, 3, 6, 6)
    keep = torch.arange(8) < 4
    with pytest.raises(ValueError, match=r"masks='stem_bm': is no batch norm.*stem_bn"):
        prune(net, {"stem_bm": keep}, x)
    with pytest.raises(ValueError, match=r"expected bool of shape \(8,\)"):
        prune(net, {"stem_bn": keep[:7]}, x)
    with pytest.raises(ValueError, match="float"):
        prune(net, {"stem_bn": keep.float()}, x)
    with pytest.raises(ValueError, match="need one mask"):
        prune(net, {"stem_bn": keep}, x)
    with pytest.raises(ValueError, match="need one mask"):
        prune(net, {"stem_bn": keep, "depthwise_bn": keep, "out_bn": ~keep}, x)
    with pytest.raises(ValueError, match="would lose all channels"):
        prune(net, {"squeeze_bn": torch.zeros(4, dtype=torch.bool)}, x)


def test_layers_that_run_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm, self.last = (
                nn.Conv2d(3, 6, 1),
                nn.Conv2d(6, 6, 1),
                nn.BatchNorm2d(6),
                nn.Conv2d(6, 2, 1),
            )

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            for _ in range(2):
                x = F.relu(self.norm(self.b(x)))
            return self.last(x)

    torch.manual_seed(0)
    net, x = randomised(Twice()), torch.randn(2, 3, 5, 5)
    [group] = channel_groups(net, x)
    assert (set(group.producers), set(group.consumers), group.reason) == ({"a", "b"}, {"b", "last"}, "")
    masks = {"norm": torch.arange(6) > 2}
    small: Any = prune(net, masks, x)
    assert (small.b.in_channels, small.b.out_channels) == (3, 3)
    before = silenced(net, masks)
    before.a.weight.data[:3] = 0  # type: ignore[union-attr]
    before.a.bias.data[:3] = 0  # type: ignore[union-attr]
    assert apart(small, before, x) < 1e-6


def test_groups_can_be_given() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1))
    small: Any = prune(net, {"1": torch.arange(6) < 2}, groups=[ChannelGroup(("1",), ("0",), ("2",))])
    assert small(torch.randn(1, 3, 4, 4)).shape == (1, 2, 4, 4)
    assert small.prune_report.macs is None
