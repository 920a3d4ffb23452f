"""ConvFirstNet: counts, options, and the inference forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.ops.harness import randomise
from torchconv.analysis.count import count
from torchconv.analysis.waterline import Machine, trace, waterline
from torchconv.models import create_model
from torchconv.models.classify.convfirst import VARIANTS, ConvFirstNet

SMALL: dict[str, Any] = {"depths": (1, 2, 1), "widths": (16, 24, 32), "block_types": ("convfirst", "mbconv", "mbconv")}


def build(**options: Any) -> Any:
    torch.manual_seed(0)
    settings = {**SMALL, "expansion_ratios": 2, "group_width": 4, "num_classes": 5, **options}
    return randomise(ConvFirstNet(**settings)).eval()


@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    [
        ("convfirstnet_tiny", 1_772_952, 299_907_072),
        ("convfirstnet_small", 4_421_104, 864_715_776),
        ("convfirstnet_base", 11_569_992, 2_120_347_648),
    ],
)
def test_counts(name: str, parameters: int, macs: int) -> None:
    with torch.device("meta"):
        net = VARIANTS[name]()
    found = count(net, torch.empty(1, 3, 224, 224, device="meta"))
    assert (found.params, found.macs) == (parameters, macs)


def test_counts_in_closed_form() -> None:
    g, e = 4, 2
    net = build()
    blocks = [(8, 16, "c", 2), (16, 24, "m", 2), (24, 24, "m", 1), (24, 32, "m", 2)]
    parameters, macs, side = 3 * 8 * 9 + 16 + 32 * 5 + 5, 3 * 8 * 9 * 32**2 + 32 * 5, 32
    for before, after, kind, stride in blocks:
        hidden, width = e * before, before if kind == "c" else e * before
        out = side // stride
        parameters += width * g * 9 + 2 * width + hidden * before + 2 * hidden + hidden * after + 2 * after
        expanded = out if kind == "c" else side
        macs += width * g * 9 * out**2 + before * hidden * expanded**2 + hidden * after * out**2
        side = out
    found = count(net, torch.empty(1, 3, 64, 64))
    assert (found.params, found.macs) == (parameters, macs)


def test_inference_forms_are_exact() -> None:
    for options in ({}, {"kernel_sizes": (5, 3, 5), "block_types": "fusedmbconv"}, {"act_cls": nn.ReLU}):
        net, x = build(**options), torch.randn(2, 3, 45, 38)
        expected = net(x)
        for form in (net.merge(), net.fuse(budget=1 << 13), net.merge().merge()):
            torch.testing.assert_close(form(x), expected, rtol=1e-4, atol=1e-5)
            assert not any(isinstance(m, nn.BatchNorm2d) for m in form.modules())
    assert any(isinstance(m, nn.BatchNorm2d) for m in net.modules())


def test_fusion_lifts_a_network_over_the_waterline() -> None:
    """On a machine with few bytes for its operations the fused blocks attain more; nothing moves more bytes."""
    with torch.device("meta"):
        net = create_model("convfirstnet_base")
    x = torch.empty(16, 3, 224, 224, device="meta", dtype=torch.float16)
    net.half()
    roof = Machine(312e12, 2.039e12)
    blocks = [f"stages.{s}.{b}" for s, depth in enumerate((3, 3, 9, 3)) for b in range(depth)]
    apart, together = waterline(net, x, machine=roof), waterline(net, x, machine=roof, blocks=blocks)
    assert together.attainable > 1.8 * apart.attainable
    assert sum(k.bytes for k in together.kernels) < sum(k.bytes for k in apart.kernels)
    assert len(trace(net, x).kernels) == 1 + 3 * 18 + 1


def test_drop_path_rises_and_runs_in_training() -> None:
    net = build(drop_path_rate=0.3, drop_rate=0.5)
    assert [b.drop.rate for stage in net.stages for b in stage] == pytest.approx([0, 0.1, 0.2, 0.3])
    x = torch.randn(8, 3, 32, 32)
    assert torch.equal(net(x), net(x))
    assert not torch.equal(net.train()(x), net(x))


def test_wrong_arguments() -> None:
    for options, name in (
        ({"widths": (16, 24)}, "widths"),
        ({"widths": (16, 24, 30)}, "widths"),
        ({"depths": ()}, "depths"),
        ({"block_types": "resnet"}, "block_types='resnet'"),
        ({"expansion_ratios": (2, 2)}, "expansion_ratios"),
        ({"stem_width": 6}, "stem_width=6"),
        ({"drop_path_rate": 1.0}, "drop_path_rate=1.0"),
        ({"global_pool": "sum"}, "global_pool='sum'"),
    ):
        with pytest.raises(ValueError, match=name):
            build(**options)
