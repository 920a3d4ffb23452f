"""ConvFirst and its peers: size, residual, arguments, the fused form tile by tile, the stack."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.ops.harness import randomise
from tests.parity.convfirst import width_used
from torchconv.analysis.count import count
from torchconv.ops.convfirst import MLP, Block, ConvFirst, FusedMBConv, MBConv
from torchconv.ops.convfirst_fusion import FusedBlock, Tile, plan_tile
from torchconv.ops.convfirst_stack import BLOCKS, ConvNeXt, StackedBlocks

BUILD: dict[str, Callable[..., Block]] = {**BLOCKS, "MLP": MLP}


def made(name: str, channels: int = 8, out: int | None = None, **options: Any) -> Block:
    torch.manual_seed(0)
    return randomise(BUILD[name](channels, out or channels, **options)).eval()  # type: ignore[return-value]


def test_parameters() -> None:
    c, e, g, k = 16, 4, 8, 5
    found = sum(p.numel() for p in ConvFirst(c, c, k, group_width=g, expansion_ratio=e).parameters())
    assert found == c * g * k**2 + 2 * e * c**2 + 2 * c + 2 * e * c + 2 * c


def test_multiplications_of_a_pixel() -> None:
    c, e, g, k, side = 16, 3, 4, 5, 6
    expected = {
        "ConvFirst": c * g * k**2 + 2 * e * c**2,
        "MBConv": 2 * e * c**2 + e * c * g * k**2,
        "ConvNeXt": c * k**2 + 2 * e * c**2,
        "FusedMBConv": e * c**2 * k**2 + e * c**2,
        "MLP": 2 * e * c**2,
    }
    for name, build in BUILD.items():
        options: dict[str, Any] = {"expansion_ratio": e}
        if name != "MLP":
            options["kernel_size"] = k
        if name in ("ConvFirst", "MBConv"):
            options["group_width"] = g
        block = build(c, c, **options, device="meta")
        assert count(block, torch.empty(1, c, side, side, device="meta")).macs == expected[name] * side**2


@pytest.mark.parametrize("build", [ConvFirst, MBConv, FusedMBConv])
def test_residual_only_where_the_shape_stays(build: Callable[..., Any]) -> None:
    x = torch.randn(1, 8, 7, 6)
    for out, stride, expected in ((8, 1, x), (8, 2, torch.zeros(1, 8, 4, 3)), (16, 1, torch.zeros(1, 16, 7, 6))):
        block = build(8, out, stride=stride).eval()
        nn.init.zeros_(block.layers[-1].weight)
        assert torch.equal(block(x), expected)


def test_group_width_of_all_channels_is_a_dense_convolution() -> None:
    assert ConvFirst(12, 12, group_width=12).layers[0].groups == 1


def test_wrong_arguments() -> None:
    for build, options, name in (
        (ConvFirst, {"in_channels": 12, "out_channels": 12}, "group_width=8"),
        (MBConv, {"in_channels": 6, "out_channels": 6, "expansion_ratio": 2}, "group_width=8"),
        (ConvFirst, {"in_channels": 8, "out_channels": 8, "kernel_size": 4}, "kernel_size=4"),
        (ConvFirst, {"in_channels": 8, "out_channels": 0}, "out_channels=0"),
        (MLP, {"in_channels": 8, "out_channels": 8, "expansion_ratio": 0.1}, "expansion_ratio=0.1"),
        (ConvNeXt, {"in_channels": 8, "out_channels": 16}, "out_channels=16"),
        (StackedBlocks, {"block_cls": "ResNet"}, "block_cls='ResNet'"),
        (StackedBlocks, {"depth": -1}, "depth=-1"),
    ):
        with pytest.raises(ValueError, match=name):
            build(**options)  # type: ignore[operator]
    block = MBConv(8, 8)
    with pytest.raises(ValueError, match="multiple of the group width 8"):
        block.fuse(tile=4, chunk=12)
    with pytest.raises(ValueError, match="chunk=8"):
        block.fuse(chunk=8)
    with pytest.raises(ValueError, match="height=0"):
        FusedBlock(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1), nn.ReLU(), tile=Tile(1, 0, 1, 8))
    with pytest.raises(ValueError, match="use merge"):
        ConvFirst(8, 8, act_cls=nn.PReLU).fuse()
    assert ConvFirst(8, 8, act_cls=nn.PReLU).eval().merge()(torch.zeros(1, 8, 4, 4)).shape == (1, 8, 4, 4)


def test_even_kernels_work_without_a_residual() -> None:
    block = made("ConvFirst", 8, 16, kernel_size=(4, 2))
    x = torch.randn(1, 8, 9, 8)
    assert block(x).shape == (1, 16, 10, 9)
    torch.testing.assert_close(block.fuse(tile=(3, 4))(x), block(x), rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_fused_equals_whole(data: st.DataObject) -> None:
    """Tiles that do not divide the map, strides, chunks, several images at a time."""
    name = data.draw(st.sampled_from([*BUILD]))
    options: dict[str, Any] = {"expansion_ratio": data.draw(st.sampled_from([2, 3]))}
    out = 8
    if name != "MLP":
        options["kernel_size"] = data.draw(st.sampled_from([3, 5, (1, 3)]))
    if name in ("ConvFirst", "MBConv", "FusedMBConv"):
        options["stride"] = data.draw(st.sampled_from([1, 2, (2, 1)]))
        out = data.draw(st.sampled_from([8, 12]))
    if name in ("ConvFirst", "MBConv"):
        options["group_width"] = data.draw(st.sampled_from([2, 4, 8]))
    if name == "ConvNeXt":
        options["layer_scale"] = 0.5
    block = made(name, 8, out, **options).double()
    x = torch.randn(3, 8, *data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9))), dtype=torch.float64)
    tile, samples = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 6))), data.draw(st.integers(1, 3))
    y = block(x)
    torch.testing.assert_close(block.fuse(tile, data.draw(st.sampled_from([8, 16, None])), samples)(x), y)
    torch.testing.assert_close(block.fuse(budget=data.draw(st.sampled_from([1, 4000, 1 << 20])))(x), y)
    torch.testing.assert_close(block.merge()(x), y)


def test_activation_of_zero_is_not_zero() -> None:
    """The zeros around the map come after the expansion's activation."""
    block = made("MBConv", act_cls=nn.Sigmoid)
    x = torch.randn(1, 8, 5, 5)
    torch.testing.assert_close(block.fuse(tile=2)(x), block(x), rtol=1e-5, atol=1e-5)


def test_halo_is_recomputed_only_after_the_expansion() -> None:
    """ConvFirst computes no more in tiles; MBConv expands ρ times as often, less at the border."""
    c, e, g, k, tile, side = 8, 2, 4, 3, 4, 12
    x = torch.empty(1, c, side, side, device="meta")
    first, middle = ConvFirst(c, c, k, 1, g, e), MBConv(c, c, k, 1, g, e)
    assert count(first.fuse(tile).to("meta"), x).macs == count(first.to("meta"), x).macs
    counted = count(middle.fuse(tile).to("meta"), x).macs
    expand = sum(
        math.prod(min(a + tile + k // 2, side) - max(a - k // 2, 0) for a in (top, left))
        for top in range(0, side, tile)
        for left in range(0, side, tile)
    )
    assert counted - count(middle.to("meta"), x).macs == (expand - side**2) * e * c**2
    assert middle.fuse(tile).halo(tile, tile) == (tile + k - 1) ** 2 / tile**2


def test_tiles_fit_the_budget() -> None:
    for budget in (1, 3000, 1 << 14, 1 << 20, 1 << 26):
        tile = plan_tile((28, 30), 32, 128, 48, budget=budget, multiple=8)
        used = 4 * tile.samples * tile.height * tile.width * (32 + tile.chunk + 48)
        assert used <= budget or (tile.height, tile.width, tile.chunk) == (1, 1, 8)
        assert tile.chunk % 8 == 0
    assert plan_tile((7, 7), 8, 32, 8, budget=4 * 49 * 48 * 5) == Tile(5, 7, 7, 32)


def test_the_expanded_map_never_exists() -> None:
    widest = 0

    class Watch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            nonlocal widest
            widest = max(widest, x.numel())
            return torch.relu(x)

    fused = made("ConvFirst", act_cls=Watch).fuse(budget=1 << 14)
    x = torch.randn(2, 8, 32, 32)
    fused(x)
    assert widest * 4 <= 1 << 14 < 4 * x.numel() * 4
    tile = fused.tile_for(x)
    assert widest == tile.height * tile.width * tile.chunk


def test_layout_and_device_options() -> None:
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    assert made("ConvFirst").fuse(tile=4)(x).is_contiguous(memory_format=torch.channels_last)
    for out in (8, 12):  # with the residual and without it
        block = made("ConvFirst", out=out)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert block.fuse(tile=4)(x).dtype == block.merge()(x).dtype == block(x).dtype
    assert made("MBConv").fuse(tile=4)(x[:0]).shape == x[:0].shape
    assert "height=4" in repr(made("MBConv").fuse(tile=4))
    block = ConvFirst(8, 8, dtype=torch.float64, device="meta")
    assert {p.dtype for p in block.parameters()} == {torch.float64}
    assert {p.device.type for p in block.parameters()} == {"meta"}


def test_convnext_is_that_of_timm() -> None:
    convnext = pytest.importorskip("timm.models.convnext")
    theirs = randomise(convnext.ConvNeXtBlock(8, ls_init_value=0.5)).eval()
    ours = ConvNeXt(8).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 8, 9, 8)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_stack() -> None:
    torch.manual_seed(0)
    for name in BLOCKS:
        stack = randomise(StackedBlocks(8, depth=2, block_cls=name, extra_depth=3, act_cls=nn.ReLU)).eval()
        assert isinstance(stack, StackedBlocks)
        assert (len(stack.pre), len(stack.blocks), len(stack.post)) == (2, 2, 1)
        x = torch.randn(2, 8, 6, 6)
        expected = stack.post(stack.blocks(stack.pre(x))).mean((2, 3), keepdim=True)
        torch.testing.assert_close(stack(x), expected)
        torch.testing.assert_close(stack.merge()(x), expected, rtol=1e-5, atol=1e-5)
    assert len(StackedBlocks(8, depth=0, extra_depth=0).blocks) == 0


def test_cases_whose_group_width_leaves_a_remainder() -> None:
    assert width_used("ConvFirst", {"in_channels": 20, "group_width": 8}) == 10
    assert width_used("MBConv", {"in_channels": 3}) == 12
    assert width_used("StackedBlocks", {"num_channels": 20, "expansion_ratio": 1}) == 10
    assert width_used("StackedBlocks", {"num_channels": 20, "block_cls": "ConvFirst", "group_width": 5}) == 5


@pytest.mark.parametrize("name", sorted(BUILD))
@pytest.mark.parametrize("shape", [(8, 5, 5), (2, 3, 5, 5)])
def test_inputs_that_do_not_fit(name: str, shape: tuple[int, ...]) -> None:
    block = made(name)
    for form in (block, block.merge(), block.fuse(), block.fuse(3)):
        with pytest.raises(ValueError, match=r"x of shape .*expected \(N, 8, H, W\)"):
            form(torch.zeros(shape))


def test_fused_block_names_a_map_without_positions() -> None:
    with pytest.raises(ValueError, match="leaves no outputs"):
        made("MLP").fuse()(torch.zeros(1, 8, 0, 5))


def test_no_channels_are_called_by_their_name() -> None:
    with pytest.raises(ValueError, match="in_channels=0"):
        ConvFirst(0, 8)
