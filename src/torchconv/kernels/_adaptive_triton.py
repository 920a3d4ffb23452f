"""Triton kernels of the aggregation with a kernel at every position: output and both gradients.

A program holds a tile of channels × positions in registers and goes through the taps. Where channels lie apart in
memory the channels of a tile are those that share their weights (c, c + G, c + 2G, …), so that each weight is read once
a tile; where they lie side by side (channels-last) the tile takes neighbours. Sums are in float32 at least.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchconv.kernels._triton_launch import sum_type, three


@triton.jit
def _moved(p, t, D, H, W, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SIGN: tl.constexpr):
    """Where tap t leads from the positions p: three coordinates, and whether they are on the map."""
    d = p // (H * W) + SIGN * (t // (KH * KW) - KD // 2)
    h = p // W % H + SIGN * (t // KW % KH - KH // 2)
    w = p % W + SIGN * (t % KW - KW // 2)
    return d, h, w, (d >= 0) & (d < D) & (h >= 0) & (h < H) & (w >= 0) & (w < W) & (p < D * H * W)


@triton.jit
def _at(d, h, w, step_d, step_h, step_w):
    """Where a position lies in memory, in 64 bits: an image in channels-last steps far."""
    return d.to(tl.int64) * step_d + h.to(tl.int64) * step_h + w.to(tl.int64) * step_w


@triton.jit
def _aggregate(
    x, weight, out, C, G, D, H, W, blocks_c, blocks_p,
    xn, xc, xd, xh, xw, wn, wg, wt, wd, wh, ww, on, oc, od, oh, ow,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, MIRRORED: tl.constexpr, SHARED: tl.constexpr,
    BC: tl.constexpr, BP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    p = program % blocks_p * BP + tl.arange(0, BP)
    block = program // blocks_p % blocks_c
    n = (program // blocks_p // blocks_c).to(tl.int64)
    if SHARED:  # block counts tiles of one weight channel, weight channels fastest
        first = block % G
        c = first + (block // G * BC + tl.arange(0, BC)) * G
    else:
        c = block * BC + tl.arange(0, BC)
    rows = c.to(tl.int64)[:, None]
    total = tl.zeros((BC, BP), ACC)
    for t in range(KD * KH * KW):
        if MIRRORED:
            d, h, w, ok = _moved(p, t, D, H, W, KD, KH, KW, -1)
            at = _at(d, h, w, wd, wh, ww)
        else:
            d, h, w, ok = _moved(p, t, D, H, W, KD, KH, KW, 1)
            at = _at(p // (H * W), p // W % H, p % W, wd, wh, ww)
        inside = (c < C)[:, None] & ok[None, :]
        at += n * wn + tl.cast(t, tl.int64) * wt
        read = tl.load(x + rows * xc + (n * xn + _at(d, h, w, xd, xh, xw))[None, :], mask=inside, other=0.0)
        if SHARED:
            factor = tl.load(weight + tl.cast(first, tl.int64) * wg + at, mask=ok, other=0.0)[None, :]
        else:
            factor = tl.load(weight + rows % G * wg + at[None, :], mask=inside, other=0.0)
        total += factor.to(ACC) * read.to(ACC)
    here = n * on + _at(p // (H * W), p // W % H, p % W, od, oh, ow)
    inside = (c < C)[:, None] & (p < D * H * W)[None, :]
    tl.store(out + rows * oc + here[None, :], total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _weight_gradient(
    x, grad, out, C, G, D, H, W, blocks_p, repeats,
    xn, xc, xd, xh, xw, gn, gc, gd, gh, gw, on, og, ot, od, oh, ow,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    p = program % blocks_p * BP + tl.arange(0, BP)
    first = program // blocks_p % G
    n = (program // blocks_p // G).to(tl.int64)
    inside = p < D * H * W
    from_grad = n * gn + _at(p // (H * W), p // W % H, p % W, gd, gh, gw)
    to = out + n * on + tl.cast(first, tl.int64) * og + _at(p // (H * W), p // W % H, p % W, od, oh, ow)
    for t in range(KD * KH * KW):
        d, h, w, ok = _moved(p, t, D, H, W, KD, KH, KW, 1)
        from_x = n * xn + _at(d, h, w, xd, xh, xw)
        total = tl.zeros((BP,), ACC)
        for r in range(0, repeats, BR):
            c = first + (r + tl.arange(0, BR)) * G
            mask = (c < C)[:, None] & ok[None, :]
            rows = c.to(tl.int64)[:, None]
            read = tl.load(x + rows * xc + from_x[None, :], mask=mask, other=0.0).to(ACC)
            slope = tl.load(grad + rows * gc + from_grad[None, :], mask=mask, other=0.0).to(ACC)
            total += tl.sum(read * slope, 0)
        tl.store(to + tl.cast(t, tl.int64) * ot, total.to(out.dtype.element_ty), mask=inside)


def _steps(tensor: Tensor, lead: int) -> tuple[int, ...]:
    """Strides of the ``lead`` axes before the map, then of its three axes."""
    return (*tensor.stride()[:lead], *three(tensor.stride()[lead:], 0))


def aggregate(x: Tensor, weight: Tensor, kernel: tuple[int, ...], mirrored: bool = False) -> Tensor:
    """The aggregation, or with ``mirrored`` its transpose, in the memory format of x."""
    out = torch.empty_like(x)
    batch, channels = x.shape[:2]
    groups, size = weight.shape[1], three(x.shape[2:], 1)
    positions = size[0] * size[1] * size[2]
    shared = x.stride(1) != 1 or groups == 1
    repeats = triton.cdiv(channels, groups)
    bc = min(8, triton.next_power_of_2(repeats)) if shared else min(32, triton.next_power_of_2(channels))
    bp = min(triton.next_power_of_2(positions), 1024 // bc if shared else 32)
    blocks_c = groups * triton.cdiv(repeats, bc) if shared else triton.cdiv(channels, bc)
    blocks_p = triton.cdiv(positions, bp)
    kd, kh, kw = three(kernel, 1)
    _aggregate[(batch * blocks_c * blocks_p,)](
        x, weight, out, channels, groups, *size, blocks_c, blocks_p, *_steps(x, 2), *_steps(weight, 3), *_steps(out, 2),
        KD=kd, KH=kh, KW=kw, MIRRORED=mirrored, SHARED=shared, BC=bc, BP=bp, ACC=sum_type(x),
    )  # fmt: skip
    return out


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """The gradient of the weight, contiguous."""
    out = torch.empty_like(weight, memory_format=torch.contiguous_format)
    batch, channels = x.shape[:2]
    groups, size = weight.shape[1], three(x.shape[2:], 1)
    positions = size[0] * size[1] * size[2]
    repeats = triton.cdiv(channels, groups)
    br = min(8, triton.next_power_of_2(repeats))
    bp = min(triton.next_power_of_2(positions), 1024 // br)
    blocks_p = triton.cdiv(positions, bp)
    kd, kh, kw = three(kernel, 1)
    _weight_gradient[(batch * groups * blocks_p,)](
        x, grad, out, channels, groups, *size, blocks_p, repeats, *_steps(x, 2), *_steps(grad, 2), *_steps(out, 3),
        KD=kd, KH=kh, KW=kw, BR=br, BP=bp, ACC=sum_type(x),
    )  # fmt: skip
    return out
