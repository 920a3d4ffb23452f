"""Architectures of timm through swap, training, merge and export: every cell passes or is refused with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.surgery.test_merge import settle
from torchconv.surgery import merge, swap
from torchconv.surgery._probe import difference

timm = pytest.importorskip("timm")

SHALLOW = {"layers": (1, 1, 1, 1)}
# Name: side of the images, options that make it small.
ARCHITECTURES: dict[str, tuple[int, dict[str, Any]]] = {
    "cspresnet50": (32, {}),
    "densenet121": (32, {"block_config": (1, 1, 1, 1)}),
    "dla46x_c": (32, {}),
    "dpn48b": (32, {}),
    "ese_vovnet19b_slim_dw": (32, {}),
    "ghostnet_050": (32, {}),
    "hardcorenas_a": (32, {}),
    "hrnet_w18_small": (64, {}),
    "inception_v3": (75, {}),
    "lcnet_035": (32, {}),
    "levit_128s": (64, {"img_size": 64}),
    "mobilenetv2_035": (32, {}),
    "mobilenetv3_small_050": (32, {}),
    "poolformer_s12": (32, {}),
    "regnetx_002": (32, {}),
    "repghostnet_050": (32, {}),
    "repvgg_a0": (32, {}),
    "resnest14d": (32, {}),
    "resnext50_32x4d": (32, SHALLOW),
    "selecsls42": (32, {}),
    "test_byobnet": (32, {}),
    "test_convnext": (32, {}),
    "test_efficientnet": (32, {}),
    "test_nfnet": (32, {}),
    "test_resnet": (32, {}),
    "tresnet_m": (32, SHALLOW),
    "vgg11_bn": (32, {"mlp_ratio": 0.01}),
    "xception41": (64, {}),
}
# What is refused, and a part of the message.
REFUSALS = {("test_nfnet", "swap"): "ScaledStdConv2d computes its kernel in its own way"}


def few() -> Callable[[str, Any], bool]:
    """The first four spatial convolutions with few weights: time goes into kinds of layers, not into sizes."""
    found: list[str] = []

    def chosen(name: str, conv: Any) -> bool:
        if len(found) < 4 and max(conv.kernel_size) > 1 and conv.weight.numel() < 80_000:
            found.append(name)
        return name in found

    return chosen


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name: str) -> None:
    side, options = ARCHITECTURES[name]
    torch.manual_seed(0)
    plain = settle(timm.create_model(name, num_classes=3, **options))
    x = torch.randn(2, 3, side, side)

    def cell(step: str, work: Callable[[], Any]) -> Any:
        why = REFUSALS.get((name, step))
        if why is None:
            return work()
        with pytest.raises(ValueError, match=why):
            work()
        return None

    swapped = cell("swap", lambda: swap(plain, "dcls", where=few(), example=x))
    if swapped is not None:
        assert swapped.swap_report.difference < 1e-4, str(swapped.swap_report)
    network: Any = swapped or plain

    cell("train", lambda: trained(network, x))
    settle(network)

    merged = cell("merge", lambda: merge(network, x))
    report = merged.merge_report
    assert difference(run(merged, x), run(network, x)) < 1e-4, str(report)
    # An activation or sum between; one convolution for two norms; a re-parameterised block with a swapped branch.
    reasons = ("no convolution or linear layer directly", "used elsewhere too", "() fails: ")
    assert all(any(reason in why for reason in reasons) for why in report.kept.values()), str(report)
    assert not any("DCLS" in type(m).__name__ for m in merged.modules())

    exported = cell("export", lambda: torch.export.export(merged, (x,), strict=False))
    assert difference(exported.module()(x), run(merged, x)) < 1e-5


def trained(network: nn.Module, x: Tensor) -> None:
    """One backward pass reaches every parameter."""
    out = network.train()(x)
    (out[0] if isinstance(out, tuple) else out).square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


@torch.no_grad()
def run(network: nn.Module, x: Tensor) -> Any:
    return network.eval()(x)
