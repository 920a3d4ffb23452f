"""ConvFirst and MBConv: size, residual, arguments."""

from __future__ import annotations

import pytest
import torch

from torchconv.ops.convfirst import MLP, ConvFirst, MBConv


def test_parameters() -> None:
    c, e, g, k = 16, 4, 8, 5
    found = sum(p.numel() for p in ConvFirst(c, c, k, group_width=g, expansion_ratio=e).parameters())
    assert found == c * g * k**2 + 2 * e * c**2 + 2 * c + 2 * e * c + 2 * c


@pytest.mark.parametrize("build", [ConvFirst, MBConv])
def test_residual_only_where_the_shape_stays(build: type[ConvFirst] | type[MBConv]) -> None:
    x = torch.randn(1, 8, 7, 6)
    for out, stride, expected in ((8, 1, x), (8, 2, torch.zeros(1, 8, 4, 3)), (16, 1, torch.zeros(1, 16, 7, 6))):
        block = build(8, out, stride=stride).eval()
        torch.nn.init.zeros_(block.layers[-1].weight)  # type: ignore[arg-type]
        assert torch.equal(block(x), expected)


def test_group_width_must_divide() -> None:
    with pytest.raises(ValueError, match="group_width"):
        ConvFirst(12, 12)


def test_mlp_sees_single_pixels() -> None:
    block, x = MLP(8, 8, 2).eval(), torch.randn(1, 8, 3, 3)
    assert torch.allclose(block(x)[..., 1:2, 1:2], block(x[..., 1:2, 1:2]), atol=1e-6)
