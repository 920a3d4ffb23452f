"""Triton kernels of the short causal convolution: output and all gradients, one pass over the data each.

A program works on a tile of channels × positions; the taps read the same cache lines again. With SiLU the backward pass
computes the convolution anew instead of reading it back. Gradients of the weight and the bias are summed over a few
tiles in registers, written once a program and added up afterwards, always in the same order.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchconv.kernels._triton_launch import sum_type


@triton.jit
def _before(x, w, b, base, c, m, step_c, step_l, C, L, K: tl.constexpr, BIAS: tl.constexpr, ACC: tl.constexpr):
    """The convolution at positions m of channels c, before the activation."""
    total = tl.zeros((c.shape[0], m.shape[0]), ACC)
    rows = base + c.to(tl.int64)[:, None] * step_c
    for j in tl.static_range(K):
        at = m - j
        tap = tl.load(w + c * K + (K - 1 - j), mask=c < C, other=0.0).to(ACC)
        inside = (c < C)[:, None] & ((at >= 0) & (at < L))[None, :]
        read = tl.load(x + rows + at.to(tl.int64)[None, :] * step_l, mask=inside, other=0.0)
        total += tap[:, None] * read.to(ACC)
    if BIAS:
        total += tl.load(b + c, mask=c < C, other=0.0).to(ACC)[:, None]
    return total


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def _output(
    x, w, b, y, C, L, step_b, step_c, step_l, tiles_c, tiles_l,
    K: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, BC: tl.constexpr, BL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    c = program // tiles_l % tiles_c * BC + tl.arange(0, BC)
    m = program % tiles_l * BL + tl.arange(0, BL)
    base = (program // tiles_l // tiles_c).to(tl.int64) * step_b
    z = _before(x, w, b, base, c, m, step_c, step_l, C, L, K, BIAS, ACC)
    if SILU:
        z = z * _sigmoid(z)
    inside = (c < C)[:, None] & (m < L)[None, :]
    rows = base + c.to(tl.int64)[:, None] * step_c
    tl.store(y + rows + m.to(tl.int64)[None, :] * step_l, z.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _gradients(
    g, x, w, b, dx, sums, C, L, step_b, step_c, step_l, tiles_c, spans,
    K: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, BC: tl.constexpr, BL: tl.constexpr, TILES: tl.constexpr,
    KP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    span = program % spans
    c = program // spans % tiles_c * BC + tl.arange(0, BC)
    item = program // spans // tiles_c
    base = item.to(tl.int64) * step_b
    rows = base + c.to(tl.int64)[:, None] * step_c
    number = tl.arange(0, KP)
    by_tap = tl.zeros((BC, KP), ACC)
    for tile in range(TILES):
        m = (span * TILES + tile) * BL + tl.arange(0, BL)
        by_x = tl.zeros((BC, BL), ACC)
        for j in tl.static_range(K):
            at = m + j
            inside = (c < C)[:, None] & (at < L)[None, :]
            slope = tl.load(g + rows + at.to(tl.int64)[None, :] * step_l, mask=inside, other=0.0).to(ACC)
            if SILU:
                z = _before(x, w, b, base, c, at, step_c, step_l, C, L, K, BIAS, ACC)
                s = _sigmoid(z)
                slope = slope * s * (1.0 + z * (1.0 - s))
            tap = tl.load(w + c * K + (K - 1 - j), mask=c < C, other=0.0).to(ACC)
            by_x += tap[:, None] * slope
            # x at m meets the output j later through the same tap.
            here = (c < C)[:, None] & (m < L)[None, :]
            read = tl.load(x + rows + m.to(tl.int64)[None, :] * step_l, mask=here, other=0.0).to(ACC)
            found = tl.sum(slope * read, 1)
            by_tap += tl.where((number == K - 1 - j)[None, :], found[:, None], 0.0)
            if j == 0:
                by_tap += tl.where((number == K)[None, :], tl.sum(slope, 1)[:, None], 0.0)
        inside = (c < C)[:, None] & (m < L)[None, :]
        tl.store(dx + rows + m.to(tl.int64)[None, :] * step_l, by_x.to(dx.dtype.element_ty), mask=inside)
    line = (item * spans + span).to(tl.int64) * C + c
    tl.store(sums + line[:, None] * KP + number[None, :], by_tap, mask=(c < C)[:, None])


def _tile(channels: int, length: int, last: bool) -> tuple[int, int]:
    """Channels and positions of a tile: long in the direction in which memory runs."""
    if last:
        return min(64, triton.next_power_of_2(channels)), min(16, triton.next_power_of_2(length))
    many = min(1024, triton.next_power_of_2(length))
    return min(triton.next_power_of_2(channels), max(1, 1024 // many)), many


def _layout(x: Tensor, last: bool) -> tuple[int, int, int, tuple[int, int, int]]:
    """Batch, channels, length, and the steps between them."""
    if last:
        batch, length, channels = x.shape
        return batch, channels, length, (x.stride(0), 1, channels)
    batch, channels, length = x.shape
    return batch, channels, length, (x.stride(0), length, 1)


def output(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, last: bool) -> Tensor:
    """The convolution of a contiguous x, (B, C, L) or with ``last`` (B, L, C); weight (C, k)."""
    batch, channels, length, steps = _layout(x, last)
    bc, bl = _tile(channels, length, last)
    tiles_c, tiles_l = triton.cdiv(channels, bc), triton.cdiv(length, bl)
    y = torch.empty_like(x)
    _output[(batch * tiles_c * tiles_l,)](
        x, weight.contiguous(), weight if bias is None else bias.contiguous(), y, channels, length, *steps, tiles_c,
        tiles_l, K=weight.shape[1], BIAS=bias is not None, SILU=silu, BC=bc, BL=bl, ACC=sum_type(x),
    )  # fmt: skip
    return y


def gradients(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, last: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of the weight (C, k) and of the bias (C,), the latter two in the type of the sums."""
    batch, channels, length, steps = _layout(x, last)
    bc, bl = _tile(channels, length, last)
    tiles = max(1, min(8, triton.cdiv(length, bl)))
    tiles_c, spans = triton.cdiv(channels, bc), triton.cdiv(length, bl * tiles)
    size = weight.shape[1]
    padded = triton.next_power_of_2(size + 1)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    dx = torch.empty_like(x)
    sums = torch.empty(batch * spans, channels, padded, device=x.device, dtype=wide)
    _gradients[(batch * tiles_c * spans,)](
        grad, x, weight.contiguous(), weight if bias is None else bias.contiguous(), dx, sums, channels, length, *steps,
        tiles_c, spans, K=size, BIAS=bias is not None, SILU=silu, BC=bc, BL=bl, TILES=tiles, KP=padded,
        ACC=sum_type(x), num_warps=8 if last else 4,  # four would not have the registers for its addresses
    )  # fmt: skip
    total = sums.sum(0)
    return dx, total[:, :size], total[:, size]
