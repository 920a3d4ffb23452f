"""The visual attention network: published sizes, what each stage gives, the authors' files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from torchconv.models import create_model
from torchconv.models.classify.van import VAN
from torchconv.weights import load_official

SMALL: dict[str, Any] = {"dims": (4, 6), "depths": (1, 2), "mlp_ratios": (2, 1)}


@pytest.mark.parametrize(
    ("name", "published"),
    [("van_b0", 4_105_800), ("van_b1", 13_861_800), ("van_b3", 44_765_608)],
)
def test_published_parameters(name: str, published: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in create_model(name).parameters()) == published


def test_is_the_definition() -> None:
    torch.manual_seed(0)
    net = VAN(3, 5, **SMALL).eval()
    x = torch.randn(2, 3, 32, 48)
    y = x
    for number in (1, 2):
        embed, blocks, norm = (getattr(net, f"{n}{number}") for n in ("patch_embed", "block", "norm"))
        y = embed.norm(F.conv2d(y, embed.proj.weight, embed.proj.bias, (4, 2)[number - 1], (3, 1)[number - 1]))
        for block in blocks:
            y = block(y)
        y = F.layer_norm(y.movedim(1, -1), y.shape[1:2], norm.weight, norm.bias, 1e-6).movedim(-1, 1)
    assert y.shape == (2, 6, 4, 6)
    torch.testing.assert_close(net(x), F.linear(y.mean((2, 3)), net.head.weight, net.head.bias))


def test_drop_path_rises_over_all_blocks() -> None:
    net = VAN(drop_path_rate=0.3, **{**SMALL, "depths": (2, 2)})
    rates = [b.drop_path.rate for stage in (net.block1, net.block2) for b in stage]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


def test_authors_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = create_model("van_b0", num_classes=4, in_chans=2).eval()
    torch.save({"state_dict": net.state_dict()}, tmp_path / "van_tiny.pth.tar")
    ours = load_official("van_b0", tmp_path / "van_tiny.pth.tar")
    x = torch.randn(1, 2, 64, 64)
    assert torch.equal(ours(x), net(x))
    assert ours.num_classes == 4


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"dims": ()}, r"dims=\(\)"),
        ({"depths": (1,)}, r"depths=\(1,\)"),
        ({"depths": (1, 0)}, "depths=0"),
        ({"mlp_ratios": (1, 1, 1)}, "mlp_ratios"),
        ({"drop_path_rate": 1.0}, "drop_path_rate=1.0"),
        ({"global_pool": "sum"}, "global_pool='sum'"),
        ({"num_classes": -1}, "num_classes=-1"),
        ({"in_chans": 0}, "in_chans=0"),
    ],
)
def test_bad_options(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        VAN(**{**SMALL, **options})


def test_bad_images() -> None:
    with pytest.raises(ValueError, match=r"x of shape \(1, 4, 64, 64\)"):
        VAN(**SMALL)(torch.zeros(1, 4, 64, 64))
