"""Sums of sampled maps against loops over positions, and their gradients."""

from __future__ import annotations

import math

import pytest
import torch

from torchconv.kernels.deform import deformable_sum


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


def test_against_loops():
    x, positions, masks = case()
    torch.testing.assert_close(deformable_sum(x, positions, masks), by_loops(x, positions, masks))


def test_gradients():
    arguments = tuple(t.requires_grad_() for t in case(1, 4, 2, 2))
    assert torch.autograd.gradcheck(deformable_sum, arguments)
    torch.library.opcheck(torch.ops.torchconv.deformable_sum.default, arguments)


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


def test_refusals():
    x, positions, masks = case()
    with pytest.raises(ValueError, match="x of shape"):
        deformable_sum(x[0], positions, masks)
    with pytest.raises(ValueError, match="positions of shape"):
        deformable_sum(x, positions[..., :1], masks)
    with pytest.raises(ValueError, match="masks of shape"):
        deformable_sum(x, positions, masks[:, :1])
    with pytest.raises(ValueError, match="groups=2"):
        deformable_sum(x[:, :5], positions, masks)
