"""Sums of sampled maps against loops over positions, and their gradients."""

from __future__ import annotations

import math

import pytest
import torch

from torchconv.kernels import deform
from torchconv.kernels.deform import deformable_sum

WIDE = {"channels": 16, "taps": 4}  # enough channels in a group and taps for a table of pixels


def case(batch: int = 2, channels: int = 6, groups: int = 2, taps: int = 3) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels, 5, 4, generator=generator, dtype=torch.float64)
    positions = 6 * torch.rand(batch, groups, taps, 3, 2, 2, generator=generator, dtype=torch.float64) - 1.5
    masks = torch.randn(batch, groups, taps, 3, 2, generator=generator, dtype=torch.float64)
    return x, positions, masks


def by_loops(x: torch.Tensor, positions: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    y = torch.zeros(*x.shape[:2], *positions.shape[3:5], dtype=x.dtype)
    width = x.shape[1] // positions.shape[1]
    for n, c, k, i, j in torch.cartesian_prod(
        *(torch.arange(s) for s in (x.shape[0], x.shape[1], masks.shape[2], *y.shape[2:]))
    ).tolist():
        column, row = positions[n, c // width, k, i, j].tolist()
        for r in (math.floor(row), math.floor(row) + 1):
            for q in (math.floor(column), math.floor(column) + 1):
                if 0 <= r < x.shape[2] and 0 <= q < x.shape[3]:
                    share = (1 - abs(row - r)) * (1 - abs(column - q))
                    y[n, c, i, j] += share * masks[n, c // width, k, i, j] * x[n, c, r, q]
    return y


@pytest.mark.parametrize("sizes", [{}, WIDE])
@pytest.mark.parametrize("places", [1 << 18, 20])
def test_against_loops(sizes, places, monkeypatch):
    monkeypatch.setattr(deform, "_PLACES", places)
    x, positions, masks = case(**sizes)
    expected = by_loops(x, positions, masks)
    torch.testing.assert_close(deformable_sum(x, positions, masks), expected)
    last = x.to(memory_format=torch.channels_last)
    spread = masks[:, :, :, :1].expand_as(masks)
    torch.testing.assert_close(deformable_sum(last, positions, masks), expected)
    torch.testing.assert_close(deformable_sum(x, positions, spread), by_loops(x, positions, spread))
    for t in (x, positions, masks):
        t.requires_grad_()
    found = torch.autograd.grad(deformable_sum(x, positions, masks).square().sum(), (x, positions, masks))
    again = torch.autograd.grad(deform._composite(x, positions, masks).square().sum(), (x, positions, masks))
    torch.testing.assert_close(found, again)


@pytest.mark.parametrize("sizes", [{"channels": 4, "taps": 2}, {**WIDE, "groups": 1}])
def test_gradients(sizes):
    arguments = tuple(t.requires_grad_() for t in case(batch=1, **sizes))
    assert torch.autograd.gradcheck(deformable_sum, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(deformable_sum, arguments, fast_mode=True)
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.torchconv.deformable_sum.default, arguments, test_utils=utils)
    whole = torch.autograd.grad(deformable_sum(*arguments).sum(), arguments)
    for i, t in enumerate(arguments):
        one = [t if k == i else other.detach() for k, other in enumerate(arguments)]
        (found,) = torch.autograd.grad(deformable_sum(*one).sum(), t)
        torch.testing.assert_close(found, whole[i])


def test_transforms():
    x, positions, masks = case(**WIDE)
    expected = deformable_sum(x, positions, masks)
    mapped = torch.func.vmap(lambda *t: deformable_sum(*(a[None] for a in t))[0])(x, positions, masks)
    torch.testing.assert_close(mapped, expected)
    y, slope = torch.func.jvp(lambda t: deformable_sum(x, t, masks), (positions,), (torch.ones_like(positions),))
    ahead, behind = (deformable_sum(x, positions + d, masks) for d in (1e-6, -1e-6))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(slope, (ahead - behind) / 2e-6, rtol=1e-5, atol=1e-5)


def test_on_pixels_the_slope_is_towards_the_next():
    size = 33  # grid_sample's coordinates of some pixels round to below them
    x = torch.randn(1, 8, size, size, generator=torch.Generator().manual_seed(0)).requires_grad_()
    index = torch.arange(float(size))
    whole = torch.stack([index.expand(size, size), index[:, None].expand(size, size)], -1)
    positions = torch.stack([whole + i for i in (-1, 0, 1, size)])[None, None].requires_grad_()
    (found,) = torch.autograd.grad(deformable_sum(x, positions, torch.ones(1, 1, 4, size, size)).sum(), positions)
    map_ = torch.nn.functional.pad(x.detach().sum(1)[0], (0, 1, 0, 1))
    across, down = map_[:-1, 1:] - map_[:-1, :-1], map_[1:, :-1] - map_[:-1, :-1]
    torch.testing.assert_close(found[0, 0, 1], torch.stack([across, down], -1), rtol=1e-4, atol=1e-4)
    assert found[0, 0, 0, 0].abs().max() == 0  # on the frame, and outside of it
    assert found[0, 0, 3].abs().max() == 0


def test_the_graph_keeps_the_inputs_only():
    x, positions, masks = (t.requires_grad_() for t in case(taps=9))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        deformable_sum(x, positions, masks)
    assert sorted(kept) == sorted(t.numel() for t in (x, positions, masks))


def test_half_precision_and_empty_batches():
    x, positions, masks = case()
    y = deformable_sum(x.bfloat16(), positions.float(), masks.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), deformable_sum(x, positions, masks), atol=0.1, rtol=0.05)
    assert deformable_sum(x[:0], positions[:0], masks[:0]).shape == (0, 6, 3, 2)
    assert deformable_sum(x, positions.float(), masks.bfloat16()).dtype == torch.float64
    x, positions, masks = case(**WIDE)
    unknown = torch.full_like(positions, torch.nan)
    assert deformable_sum(x, unknown, masks).abs().max() == 0  # nowhere on the map


def test_refusals():
    x, positions, masks = case()
    with pytest.raises(ValueError, match="x of shape"):
        deformable_sum(x[0], positions, masks)
    with pytest.raises(ValueError, match="int64: expected real"):
        deformable_sum(x.long(), positions, masks)
    with pytest.raises(ValueError, match=r"masks\.device="):
        deformable_sum(x, positions, masks.to("meta"))
    with pytest.raises(ValueError, match="positions of shape"):
        deformable_sum(x, positions[..., :1], masks)
    with pytest.raises(ValueError, match="masks of shape"):
        deformable_sum(x, positions, masks[:, :1])
    with pytest.raises(ValueError, match="groups=2"):
        deformable_sum(x[:, :5], positions, masks)
