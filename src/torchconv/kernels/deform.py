"""Weighted sums of a map sampled at given positions: what every deformable convolution computes in the end.

    y[n, c, o] = Σ_k mask[n, g(c), k, o] · bilinear(x[n, c], position[n, g(c), k, o])

Zeros outside of the map; channels of a group share positions and masks. One bilinear sampling a tap, 8 operations for
each of K taps, channels and positions. The sampled maps, K times the output, are what differentiating the sum would
keep; here they are sampled again for the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchconv._common import check
from torchconv.catalog import part
from torchconv.kernels import _custom

_HALF = (torch.float16, torch.bfloat16)


def _wide(t: Tensor) -> Tensor:
    return t.float() if t.dtype in _HALF else t


def _grouped(x: Tensor, positions: Tensor) -> Tensor:
    """(N, C, H, W) → (N·G, C / G, H, W)."""
    groups = positions.shape[1]
    return x.unflatten(1, (groups, x.shape[1] // groups)).flatten(0, 1)


def _grid(positions: Tensor, tap: int, height: int, width: int) -> Tensor:
    """Positions of one tap in ``grid_sample``'s coordinates, where −1 and 1 are the outer borders of the map."""
    size = torch.tensor([width, height], dtype=positions.dtype, device=positions.device)
    return (2 * positions[:, :, tap].flatten(0, 1) + 1) / size - 1


def _sample(x: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _composite(x: Tensor, positions: Tensor, masks: Tensor) -> Tensor:
    maps, places, weights = _grouped(_wide(x), positions), _wide(positions), _wide(masks)
    total: Tensor | None = None
    for tap in range(positions.shape[2]):
        found = _sample(maps, _grid(places, tap, *x.shape[2:])) * weights[:, :, tap].flatten(0, 1).unsqueeze(1)
        total = found if total is None else total + found
    assert total is not None
    return total.unflatten(0, positions.shape[:2]).flatten(1, 2).to(x.dtype)


def _forward(x: Tensor, positions: Tensor, masks: Tensor) -> Tensor:
    maps, places, weights = _grouped(_wide(x), positions), _wide(positions), _wide(masks)
    total = maps.new_zeros(maps.shape[0], maps.shape[1], *positions.shape[3:5])
    if x.numel():
        for tap in range(positions.shape[2]):
            weight = weights[:, :, tap].flatten(0, 1).unsqueeze(1)
            total.addcmul_(_sample(maps, _grid(places, tap, *x.shape[2:])), weight)
    return total.unflatten(0, positions.shape[:2]).flatten(1, 2).to(x.dtype)


def _backward(grad: Tensor, x: Tensor, positions: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    maps, places, weights = _grouped(_wide(x), positions), _wide(positions), _wide(masks)
    g = _grouped(_wide(grad), positions)
    by_maps = torch.zeros_like(maps)
    by_places, by_weights = torch.zeros_like(places), torch.zeros_like(weights)
    size = torch.tensor([x.shape[3], x.shape[2]], dtype=places.dtype, device=places.device)
    ends = positions.shape[:2]
    if x.numel():
        for tap in range(positions.shape[2]):
            grid = _grid(places, tap, *x.shape[2:])
            by_weights[:, :, tap] = (g * _sample(maps, grid)).sum(1).unflatten(0, ends)
            weighted = g * weights[:, :, tap].flatten(0, 1).unsqueeze(1)
            by_map, by_grid = torch.ops.aten.grid_sampler_2d_backward(weighted, maps, grid, 0, 0, False, (True, True))
            by_maps += by_map
            by_places[:, :, tap] = (by_grid * 2 / size).unflatten(0, ends)
    by_x = by_maps.unflatten(0, ends).flatten(1, 2).to(x.dtype)
    return by_x, by_places.to(positions.dtype), by_weights.to(masks.dtype)


def _fake(x: Tensor, positions: Tensor, masks: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], *positions.shape[3:5])


def _fake_backward(grad: Tensor, x: Tensor, positions: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    by_x, by_positions, by_masks = (t.new_empty(t.shape) for t in (x, positions, masks))
    return by_x, by_positions, by_masks


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    by = _BACKWARD(grad, *ctx.saved_tensors)
    return tuple(g if need else None for g, need in zip(by, ctx.needs_input_grad, strict=True))


_BACKWARD = _custom.define(
    "deformable_sum_backward",
    "(Tensor grad, Tensor x, Tensor positions, Tensor masks) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
_SUM = _custom.define(
    "deformable_sum", "(Tensor x, Tensor positions, Tensor masks) -> Tensor", _forward, _fake, _autograd, _keep
)


@part(
    "deformable-sum",
    paper="hrvmamba",
    kind="kernel",
    dims=(2,),
    keywords="deformable convolution DCN DCNv2 DCNv3 DCNv4 bilinear sampling offsets masks grid",
)
def deformable_sum(x: Tensor, positions: Tensor, masks: Tensor) -> Tensor:
    """Sum over taps of the map at given positions, times masks.

    y[n, c, o] = Σ_k masks[n, g, k, o] · bilinear(x[n, c], positions[n, g, k, o]), zero outside.

    Args:
        x: the map. Half precision is computed in float32; the result has the type of x.
        positions: (column, row) in pixels, 0 the centre of the first.
        masks: any weights.

    Shape:
        x (N, C, H, W), positions (N, G, K, H', W', 2), masks (N, G, K, H', W'), G a divisor of C → (N, C, H', W').

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> x = torch.tensor([[[[1.0, 3.0]]]])
        >>> deformable_sum(x, torch.tensor([0.5, 0.0]).reshape(1, 1, 1, 1, 1, 2), torch.ones(1, 1, 1, 1, 1))
        tensor([[[[2.]]]])

    Reference: Zhu et al., arXiv 1811.11168 (modulated deformable convolution).
    """
    if x.dim() != 4:
        raise ValueError(f"x of shape {tuple(x.shape)}: expected (N, C, H, W)")
    if positions.dim() != 6 or positions.shape[0] != x.shape[0] or positions.shape[5] != 2:
        raise ValueError(f"positions of shape {tuple(positions.shape)}: expected ({x.shape[0]}, G, K, H', W', 2)")
    if masks.shape != positions.shape[:5]:
        raise ValueError(f"masks of shape {tuple(masks.shape)}: expected {tuple(positions.shape[:5])}")
    groups = positions.shape[1]
    check(groups >= 1 and x.shape[1] % groups == 0, "groups", groups, f"must divide the {x.shape[1]} channels")
    check(positions.shape[2] >= 1, "taps", positions.shape[2], "give at least one")
    y: Tensor = (_composite if _custom.in_ordinary_operators() else _SUM)(x, positions, masks)
    return y
