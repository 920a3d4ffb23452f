"""Depthwise kernels of several shapes on ranges of channels, the identity on the others, in one launch (Triton).

A table holds for every channel the size of its kernel and where its weights begin; a channel without a kernel is
copied. Programs compute a tile of positions × channels: one channel and many positions for contiguous maps, 32 channels
for channels-last ones, so that neighbouring threads read neighbouring numbers in both. Each number of the map is read
from memory once and from the cache by the other taps: 2·C·H·W numbers moved, which bounds the time from below.

The gradient of the input is the same with mirrored taps. The gradient of the weights is a sum per tap, in one order.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchconv.kernels._layout import channels_last_format, is_channels_last

Kernels = tuple[tuple[int, tuple[int, ...]], ...]  # channels and sizes of every kernel
_FIELDS = 7  # of a table's line: start of the weights, kernel size, padding before the map


@triton.jit
def _layer_kernel(
    x, taps, bias, table, out,
    C, D, H, W, positions, blocks, groups, first, DD, DH, DW,
    BACKWARD: tl.constexpr, BIAS: tl.constexpr, LAST: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    block = pid % blocks
    group = (pid // blocks) % groups
    n = (pid // (blocks * groups)).to(tl.int64)
    c = group * BC + tl.arange(0, BC)
    known = c < C
    line = table + c * 7
    start = tl.load(line, mask=known, other=0)
    kd = tl.load(line + 1, mask=known, other=0)
    kh = tl.load(line + 2, mask=known, other=0)
    kw = tl.load(line + 3, mask=known, other=0)
    bd = tl.load(line + 4, mask=known, other=0)[None, :]
    bh = tl.load(line + 5, mask=known, other=0)[None, :]
    bw = tl.load(line + 6, mask=known, other=0)[None, :]
    count = kd * kh * kw
    position = block * BP + tl.arange(0, BP)  # of one image: 32 bits, in which divisions are several times faster
    inside = (position < positions)[:, None] & known[None, :]
    col = (position % W)[:, None]
    row = ((position // W) % H)[:, None]
    plane = (position // W // H)[:, None]
    c64 = c.to(tl.int64)[None, :]
    if LAST:
        base = n * positions * C + c64
        step = C
    else:
        base = (n * C + c64) * positions
        step = 1
    acc = tl.zeros((BP, BC), dtype=tl.float32)
    for tap in range(tl.max(count)):
        u = (tap // tl.maximum(kh * kw, 1))[None, :]
        v = (tap // tl.maximum(kw, 1) % tl.maximum(kh, 1))[None, :]
        w = (tap % tl.maximum(kw, 1))[None, :]
        if BACKWARD:
            z, y, a = plane - u * DD + bd, row - v * DH + bh, col - w * DW + bw
        else:
            z, y, a = plane + u * DD - bd, row + v * DH - bh, col + w * DW - bw
        ok = inside & (tap < count)[None, :] & (z >= 0) & (z < D) & (y >= 0) & (y < H) & (a >= 0) & (a < W)
        value = tl.load(x + base + ((z * H + y) * W + a).to(tl.int64) * step, mask=ok, other=0.0).to(tl.float32)
        weight = tl.load(taps + start + tap, mask=tap < count, other=0.0).to(tl.float32)
        acc += value * weight[None, :]
    if BIAS:
        acc += tl.load(bias + c - first, mask=count > 0, other=0.0).to(tl.float32)[None, :]
    here = base + position[:, None].to(tl.int64) * step
    copied = (count == 0)[None, :]
    passed = tl.load(x + here, mask=inside & copied, other=0.0)
    tl.store(out + here, tl.where(copied, passed, acc.to(out.dtype.element_ty)), mask=inside)


@triton.jit
def _taps_kernel(x, g, lines, out, N, C, D, H, W, positions, LAST: tl.constexpr, BP: tl.constexpr):
    pid = tl.program_id(0)
    line = lines + pid.to(tl.int64) * 4
    c = tl.load(line).to(tl.int64)
    dz, dy, da = tl.load(line + 1), tl.load(line + 2), tl.load(line + 3)
    acc = tl.zeros((BP,), dtype=tl.float32)
    for n in range(N):
        if LAST:
            base = tl.cast(n, tl.int64) * positions * C + c
            step = C
        else:
            base = (tl.cast(n, tl.int64) * C + c) * positions
            step = 1
        for start in range(0, positions, BP):
            position = start + tl.arange(0, BP)
            ok = position < positions
            col, row, plane = position % W + da, (position // W) % H + dy, position // W // H + dz
            seen = ok & (plane >= 0) & (plane < D) & (row >= 0) & (row < H) & (col >= 0) & (col < W)
            gs = tl.load(g + base + position.to(tl.int64) * step, mask=ok, other=0.0).to(tl.float32)
            there = ((plane * H + row) * W + col).to(tl.int64)
            xs = tl.load(x + base + there * step, mask=seen, other=0.0).to(tl.float32)
            acc += gs * xs
    tl.store(out + pid, tl.sum(acc))


def _solid(sizes: Sequence[int], fill: int = 1) -> tuple[int, ...]:
    return (fill,) * (3 - len(sizes)) + tuple(sizes)


@lru_cache(maxsize=256)
def _tables(channels: int, kernels: Kernels, dilation: tuple[int, ...], device: str) -> tuple[Tensor, Tensor]:
    """A line for every channel, and a line (channel, displacement) for every tap in the order of the weights."""
    lines = [[0] * _FIELDS for _ in range(channels - sum(width for width, _ in kernels))]
    taps: list[list[int]] = []
    d = _solid(dilation)
    for width, size in kernels:
        k = _solid(size)
        before = [(a - 1) * b // 2 for a, b in zip(k, d, strict=True)]
        shifts = [
            [u * d[0] - before[0], v * d[1] - before[1], w * d[2] - before[2]]
            for u in range(k[0])
            for v in range(k[1])
            for w in range(k[2])
        ]
        for _ in range(width):
            channel = len(lines)
            lines.append([len(taps), *k, *before])
            taps += [[channel, *shift] for shift in shifts]
    return torch.tensor(lines, dtype=torch.int32, device=device), torch.tensor(taps, dtype=torch.int32, device=device)


def _laid_out(x: Tensor, like: Tensor) -> tuple[Tensor, bool]:
    """``x`` contiguous or, where ``like`` is, channels-last."""
    if is_channels_last(like):
        return x.contiguous(memory_format=channels_last_format(like.dim() - 2)), True
    return x.contiguous(), False


def layer(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    kernels: Kernels,
    dilation: tuple[int, ...],
    backward: bool = False,
) -> Tensor:
    """The convolved map, or ``backward`` the gradient of the input from that of the output, in the layout of x."""
    x, last = _laid_out(x, x)
    out = torch.empty_like(x)
    n, channels, size = x.shape[0], x.shape[1], _solid(x.shape[2:])
    positions = math.prod(size)
    table, _ = _tables(channels, kernels, dilation, str(x.device))
    bp, bc = (16, 32) if last else (min(1024, max(64, triton.next_power_of_2(positions))), 1)
    blocks, groups = -(-positions // bp), -(-channels // bc)
    first = channels - sum(width for width, _ in kernels)
    most = max(1, (2**31 - 1) // (blocks * groups))  # images in one launch
    with torch.cuda.device_of(x):
        for i in range(0, n, most):
            part, there = x[i : i + most], out[i : i + most]
            _layer_kernel[(blocks * groups * part.shape[0],)](
                part, taps, taps if bias is None else bias, table, there,
                channels, *size, positions, blocks, groups, first, *_solid(dilation),
                backward, bias is not None, last, bp, bc,
            )  # fmt: skip
    return out


def gradient_taps(g: Tensor, x: Tensor, kernels: Kernels, dilation: tuple[int, ...]) -> Tensor:
    """The gradient of all weights, one after another, in float32."""
    x, last = _laid_out(x, x)
    g, _ = _laid_out(g, x)
    if g.stride() != x.stride():  # one channel or position: layouts of the same memory order may differ in name
        g = torch.empty_like(x).copy_(g)
    channels, size = x.shape[1], _solid(x.shape[2:])
    _, lines = _tables(channels, kernels, dilation, str(x.device))
    out = torch.empty(len(lines), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _taps_kernel[(len(lines),)](
            x, g, lines, out, x.shape[0], channels, *size, math.prod(size), last, 1024
        )  # fmt: skip
    return out
