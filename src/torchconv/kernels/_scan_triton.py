"""The selective scan on a GPU (Triton): channels and all their states at once, chunks of time one after another.

A program holds a tile of channels × states × positions. Within a chunk an associative scan joins positions,
(a, b) ∘ (a', b') = (a·a', a'·b + b'); the state at the end of a chunk is carried to the next. Backward, the states at
the beginning of the chunks are made first (N numbers a channel and chunk), then chunks run in reverse, each making
its states again. Gradients of B and C are sums over channels: over a program's channels here, over programs afterwards,
in one order. Memory read and written: u, δ, y forward, those and their gradients backward, and N / R times as much for
the sums, R channels in a program.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096  # numbers in a program's tile
_MOST = 16  # channels of a tile: sums over its states are numbers per channel and position, which fill registers too
_WARPS = 8  # of a program: four have not the registers for a tile and its gradients


@triton.jit
def _join(a, b, later_a, later_b):
    return a * later_a, later_a * b + later_b


@triton.jit
def _output_kernel(
    u, delta, rates, enters, leaves, out, saved,
    channels, L, states, width_b, width_c, chunks,
    SAVE: tl.constexpr, R: tl.constexpr, NS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    blocks = channels // R
    n, first = pid // blocks, (pid % blocks) * R
    c, s = first + tl.arange(0, R), tl.arange(0, NS)
    known = (s < states)[None, :]
    rate = tl.load(rates + c[:, None] * states + s[None, :], mask=known, other=0.0).to(tl.float32)
    rows = ((n * channels + c) * L)[:, None]
    b_rows = ((n * (channels // width_b) + first // width_b) * states + s)[:, None] * L
    c_rows = ((n * (channels // width_c) + first // width_c) * states + s)[:, None] * L
    carry = tl.zeros((R, NS), dtype=tl.float32)
    for k in range(chunks):
        t = k * BT + tl.arange(0, BT)
        inside = (t < L)[None, :]
        here = (s < states)[:, None] & inside
        d = tl.load(delta + rows + t[None, :], mask=inside, other=0.0).to(tl.float32)
        x = tl.load(u + rows + t[None, :], mask=inside, other=0.0).to(tl.float32) * d
        b = tl.load(enters + b_rows + t[None, :], mask=here, other=0.0).to(tl.float32)
        if SAVE:
            place = ((n * channels + c) * chunks + k)[:, None] * states + s[None, :]
            tl.store(saved + place, carry, mask=known)
        decay = tl.exp(d[:, None, :] * rate[:, :, None])
        through, h = tl.associative_scan((decay, x[:, None, :] * b[None, :, :]), 2, _join)
        h += through * carry[:, :, None]
        carry = tl.sum(tl.where((tl.arange(0, BT) == BT - 1)[None, None, :], h, 0.0), 2)
        if not SAVE:
            w = tl.load(leaves + c_rows + t[None, :], mask=here, other=0.0).to(tl.float32)
            y = tl.sum(h * w[None, :, :], 1)
            tl.store(out + rows + t[None, :], y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_kernel(
    grad, u, delta, rates, enters, leaves, saved, by_u, by_delta, by_rates, by_b, by_c,
    channels, L, states, width_b, width_c, chunks,
    R: tl.constexpr, NS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    blocks = channels // R
    n, first = pid // blocks, (pid % blocks) * R
    c, s = first + tl.arange(0, R), tl.arange(0, NS)
    known = (s < states)[None, :]
    rate = tl.load(rates + c[:, None] * states + s[None, :], mask=known, other=0.0).to(tl.float32)
    rows = ((n * channels + c) * L)[:, None]
    b_rows = ((n * (channels // width_b) + first // width_b) * states + s)[:, None] * L
    c_rows = ((n * (channels // width_c) + first // width_c) * states + s)[:, None] * L
    sums = (pid * states + s)[:, None] * L
    carry = tl.zeros((R, NS), dtype=tl.float32)
    total = tl.zeros((R, NS), dtype=tl.float32)
    for back in range(chunks):
        k = chunks - 1 - back
        t = k * BT + tl.arange(0, BT)
        inside = (t < L)[None, :]
        here = (s < states)[:, None] & inside
        d = tl.load(delta + rows + t[None, :], mask=inside, other=0.0).to(tl.float32)
        later = tl.load(delta + rows + t[None, :] + 1, mask=(t + 1 < L)[None, :], other=0.0).to(tl.float32)
        v = tl.load(u + rows + t[None, :], mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + rows + t[None, :], mask=inside, other=0.0).to(tl.float32)
        b = tl.load(enters + b_rows + t[None, :], mask=here, other=0.0).to(tl.float32)
        w = tl.load(leaves + c_rows + t[None, :], mask=here, other=0.0).to(tl.float32)
        place = ((n * channels + c) * chunks + k)[:, None] * states + s[None, :]
        start = tl.load(saved + place, mask=known, other=0.0)
        x = (d * v)[:, None, :] * b[None, :, :]
        through, h = tl.associative_scan((tl.exp(d[:, None, :] * rate[:, :, None]), x), 2, _join)
        h += through * start[:, :, None]
        ahead = tl.exp(later[:, None, :] * rate[:, :, None])
        through, adjoint = tl.associative_scan((ahead, g[:, None, :] * w[None, :, :]), 2, _join, reverse=True)
        adjoint += through * carry[:, :, None]
        carry = tl.sum(tl.where((tl.arange(0, BT) == 0)[None, None, :], adjoint, 0.0), 2)
        by_x = tl.sum(adjoint * b[None, :, :], 1)
        by_exponent = adjoint * (h - x)
        total += tl.sum(by_exponent * d[:, None, :], 2)
        by_d = tl.sum(by_exponent * rate[:, :, None], 1) + by_x * v
        tl.store(by_u + rows + t[None, :], (by_x * d).to(by_u.dtype.element_ty), mask=inside)
        tl.store(by_delta + rows + t[None, :], by_d, mask=inside)
        tl.store(by_b + sums + t[None, :], tl.sum(adjoint * (d * v)[:, None, :], 0), mask=here)
        tl.store(by_c + sums + t[None, :], tl.sum(g[:, None, :] * h, 0), mask=here)
    tl.store(by_rates + (n * channels + c)[:, None] * states + s[None, :], total, mask=known)


def _tile(channels: int, groups: int, states: int) -> tuple[int, int, int]:
    """Channels, states and positions of a program; its channels are of one group."""
    padded = triton.next_power_of_2(states)
    positions = max(16, min(64, _TILE // padded))
    width = channels // groups
    return math.gcd(width, max(1, min(_MOST, _TILE // (padded * positions)))), padded, positions


def _launch(u: Tensor, b: Tensor, c: Tensor, states: int) -> tuple[int, tuple[int, ...], tuple[int, int, int]]:
    batch, channels, length = u.shape
    groups = math.lcm(int(b.shape[1]), int(c.shape[1]))
    tile = _tile(channels, groups, states)
    chunks = -(-length // tile[2])
    sizes = (channels, length, states, channels // b.shape[1], channels // c.shape[1], chunks)
    return batch * channels // tile[0], sizes, tile


def output(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """y without the direct path: u (N, C, L), δ in float32, A (C, n), B and C (N, groups, n, L)."""
    u, delta, a, b, c = (t.contiguous() for t in (u, delta, a, b, c))
    out = torch.empty_like(u)
    programs, sizes, tile = _launch(u, b, c, a.shape[1])
    with torch.cuda.device_of(u):
        _output_kernel[(programs,)](u, delta, a, b, c, out, out, *sizes, False, *tile, num_warps=_WARPS)
    return out


def gradients(
    grad: Tensor, u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, δ (in float32), A, B and C."""
    grad, u, delta, a, b, c = (t.contiguous() for t in (grad, u, delta, a, b, c))
    batch, channels, length = u.shape
    states = a.shape[1]
    programs, sizes, tile = _launch(u, b, c, states)
    wide: dict[str, Any] = {"device": u.device, "dtype": torch.float32}
    saved = torch.empty(batch, channels, sizes[-1], states, **wide)
    by_u, by_delta = torch.empty_like(u), torch.empty(u.shape, **wide)
    by_a = torch.empty(batch, channels, states, **wide)
    by_b, by_c = (torch.empty(batch, programs // batch, states, length, **wide) for _ in range(2))
    with torch.cuda.device_of(u):
        _output_kernel[(programs,)](u, delta, a, b, c, u, saved, *sizes, True, *tile, num_warps=_WARPS)
        _gradient_kernel[(programs,)](
            grad, u, delta, a, b, c, saved, by_u, by_delta, by_a, by_b, by_c, *sizes, *tile, num_warps=_WARPS
        )  # fmt: skip
    groups = (t.unflatten(1, (like.shape[1], -1)).sum(2).to(like.dtype) for t, like in ((by_b, b), (by_c, c)))
    return by_u, by_delta, by_a.sum(0).to(a.dtype), *groups
