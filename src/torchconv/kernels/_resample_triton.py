"""Triton kernels of downscaling with a kernel for every output pixel: output, gradient of the kernels and of the map.

The kernels are read once and normalised on the way, by a running maximum and sum as in attention. Both gradients start
from the output and its sums, computed anew; that of the map gathers, so that nothing is added by atomics and runs agree
to the bit. Maps are contiguous, with three spatial axes, the first ones of length 1 where there are fewer.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchconv.kernels._triton_launch import sum_type, three

MODES = {"none": 0, "sum": 1, "softmax": 2}


@triton.jit
def _window(p, t, H, W, OH, OW, SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr):  # fmt: skip # noqa: E501
    """Where tap t of the windows of output pixels p lies in the map."""
    d = p // (OH * OW) * SD + t // (KH * KW)
    h = p // OW % OH * SH + t // KW % KH
    w = p % OW * SW + t % KW
    return (d * H + h) * W + w


@triton.jit
def _output(
    x, kernels, out, tops, sums, C, G, tiles, blocks, D, H, W, OD, OH, OW, LEAST,
    SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    MODE: tl.constexpr, STATS: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    p = program % blocks * BP + tl.arange(0, BP)
    tile = program // blocks % tiles
    g = program // blocks // tiles % G
    n = (program // blocks // tiles // G).to(tl.int64)
    P = OD * OH * OW
    c = (g if G > 1 else 0) + tile * BC + tl.arange(0, BC)
    here = p < P
    inside = (c < C)[:, None] & here[None, :]
    base = (n * C + c)[:, None]
    row = (n * G + g) * (KD * KH * KW) * P
    acc = tl.zeros((BC, BP), ACC)
    total = tl.zeros((BP,), ACC)
    top = tl.full((BP,), float("-inf"), ACC)
    for t in range(KD * KH * KW):
        value = tl.load(kernels + row + tl.cast(t, tl.int64) * P + p, mask=here, other=0.0).to(ACC)
        read = tl.load(x + base * (D * H * W) + _window(p, t, H, W, OH, OW, SD, SH, SW, KH, KW)[None, :], mask=inside, other=0.0).to(ACC)  # fmt: skip # noqa: E501
        if MODE == 2:
            higher = tl.maximum(top, value)
            scale = tl.exp(top - higher)
            value = tl.exp(value - higher)
            acc = acc * scale[None, :]
            total = total * scale
            top = higher
        if MODE == 1:
            value = tl.minimum(tl.maximum(value, LEAST), 1.0)
        acc += value[None, :] * read
        total += value
    if MODE > 0:
        acc = acc / total[None, :]
    tl.store(out + base * P + p[None, :], acc.to(out.dtype.element_ty), mask=inside)
    if STATS:
        tl.store(tops + (n * G + g) * P + p, top, mask=here & (tile == 0))
        tl.store(sums + (n * G + g) * P + p, total, mask=here & (tile == 0))


@triton.jit
def _normalised(kernels, tops, sums, row, stat, t, P, p, here, LEAST, MODE: tl.constexpr, ACC: tl.constexpr):
    """The weights of tap t at pixels p, and the sums they were divided by."""
    value = tl.load(kernels + row + tl.cast(t, tl.int64) * P + p, mask=here, other=0.0).to(ACC)
    total = tl.load(sums + stat + p, mask=here, other=1.0)
    weight = value
    if MODE == 1:
        weight = tl.minimum(tl.maximum(value, LEAST), 1.0) / total
    if MODE == 2:
        weight = tl.exp(value - tl.load(tops + stat + p, mask=here, other=0.0)) / total
    return weight, value, total


@triton.jit
def _by_kernels(
    x, grad, kernels, tops, sums, inner, out, C, G, blocks, D, H, W, OD, OH, OW, LEAST,
    SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    MODE: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    p = program % blocks * BP + tl.arange(0, BP)
    g = program // blocks % G
    n = (program // blocks // G).to(tl.int64)
    P = OD * OH * OW
    here = p < P
    row, stat = (n * G + g) * (KD * KH * KW) * P, (n * G + g) * P
    mean = tl.load(inner + stat + p, mask=here, other=0.0)
    for t in range(KD * KH * KW):
        from_x = _window(p, t, H, W, OH, OW, SD, SH, SW, KH, KW)
        by = tl.zeros((BP,), ACC)
        for first in range(0, C // G, BC):
            c = (g if G > 1 else 0) + first + tl.arange(0, BC)
            inside = (c < C)[:, None] & here[None, :]
            base = (n * C + c)[:, None]
            read = tl.load(x + base * (D * H * W) + from_x[None, :], mask=inside, other=0.0).to(ACC)
            by += tl.sum(read * tl.load(grad + base * P + p[None, :], mask=inside, other=0.0).to(ACC), 0)
        weight, value, total = _normalised(kernels, tops, sums, row, stat, t, P, p, here, LEAST, MODE, ACC)
        if MODE == 1:
            by = tl.where((value >= LEAST) & (value <= 1.0), (by - mean) / total, 0.0)
        if MODE == 2:
            by = weight * (by - mean)
        tl.store(out + row + tl.cast(t, tl.int64) * P + p, by.to(out.dtype.element_ty), mask=here)


@triton.jit
def _by_map(
    grad, kernels, tops, sums, out, C, G, tiles, blocks, D, H, W, OD, OH, OW, LEAST,
    SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    MODE: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    q = program % blocks * BP + tl.arange(0, BP)
    tile = program // blocks % tiles
    g = program // blocks // tiles % G
    n = (program // blocks // tiles // G).to(tl.int64)
    P = OD * OH * OW
    c = (g if G > 1 else 0) + tile * BC + tl.arange(0, BC)
    row, stat = (n * G + g) * (KD * KH * KW) * P, (n * G + g) * P
    d, h, w = q // (H * W), q // W % H, q % W
    base = (n * C + c)[:, None]
    # An element is in the windows of the pixels q // s − j, as their tap q % s + s·j.
    JD: tl.constexpr = (KD + SD - 1) // SD
    JH: tl.constexpr = (KH + SH - 1) // SH
    JW: tl.constexpr = (KW + SW - 1) // SW
    acc = tl.zeros((BC, BP), ACC)
    for j in range(JD * JH * JW):
        jd, jh, jw = j // (JH * JW), j // JW % JH, j % JW
        pd, ph, pw = d // SD - jd, h // SH - jh, w // SW - jw
        td, th, tw = d % SD + SD * jd, h % SH + SH * jh, w % SW + SW * jw
        ok = (q < D * H * W) & (td < KD) & (th < KH) & (tw < KW)
        ok &= (pd >= 0) & (pd < OD) & (ph >= 0) & (ph < OH) & (pw >= 0) & (pw < OW)
        p = (pd * OH + ph) * OW + pw
        t = (td * KH + th) * KW + tw
        weight, _, _ = _normalised(kernels, tops, sums, row, stat, t, P, p, ok, LEAST, MODE, ACC)
        slope = tl.load(grad + base * P + p[None, :], mask=(c < C)[:, None] & ok[None, :], other=0.0).to(ACC)
        acc += tl.where(ok, weight, 0.0)[None, :] * slope
    inside = (c < C)[:, None] & (q < D * H * W)[None, :]
    tl.store(out + base * (D * H * W) + q[None, :], acc.to(out.dtype.element_ty), mask=inside)


def _constants(x: Tensor, scale: Sequence[int], size: Sequence[int], normalisation: str) -> dict[str, Any]:
    (sd, sh, sw), (kd, kh, kw) = three(scale), three(size)
    return {
        "SD": sd,
        "SH": sh,
        "SW": sw,
        "KD": kd,
        "KH": kh,
        "KW": kw,
        "MODE": MODES[normalisation],
        "ACC": sum_type(x),
    }


def _tile(channels: int, groups: int, positions: int) -> tuple[int, int, int, int]:
    """Channels and positions of a program, and how many of each."""
    bc = 1 if groups > 1 else min(8, triton.next_power_of_2(channels))
    bp = min(triton.next_power_of_2(positions), 512 // bc)
    return bc, bp, 1 if groups > 1 else triton.cdiv(channels, bc), triton.cdiv(positions, bp)


def output(
    x: Tensor, kernels: Tensor, scale: Sequence[int], size: Sequence[int], normalisation: str, least: float,
    stats: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """The downscaled map (N, C, \\*out) of contiguous x and kernels (N, G, taps, \\*out); fills ``stats``."""
    batch, channels = x.shape[:2]
    groups = kernels.shape[1]
    out = x.new_empty(batch, channels, *kernels.shape[3:])
    bc, bp, tiles, blocks = _tile(channels, groups, out[0, 0].numel())
    tops, sums = stats or (out, out)
    with torch.cuda.device_of(x):
        _output[(batch * groups * tiles * blocks,)](
            x, kernels, out, tops, sums, channels, groups, tiles, blocks, *three(x.shape[2:]), *three(out.shape[2:]),
            least, STATS=stats is not None, BC=bc, BP=bp, **_constants(x, scale, size, normalisation),
        )  # fmt: skip
    return out


def gradients(
    grad: Tensor, x: Tensor, kernels: Tensor, scale: Sequence[int], size: Sequence[int], normalisation: str,
    least: float, needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of x and of the kernels, empty where not needed; all arguments contiguous."""
    batch, channels = x.shape[:2]
    groups, pixels = kernels.shape[1], kernels.shape[3:]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    tops, sums = (torch.empty(batch, groups, *pixels, device=x.device, dtype=wide) for _ in range(2))
    y = output(x, kernels, scale, size, normalisation, least, (tops, sums))
    inner = (y.to(wide) * grad.to(wide)).unflatten(1, (groups, -1)).sum(2)
    sizes = (*three(x.shape[2:]), *three(pixels))
    constants = _constants(x, scale, size, normalisation)
    dx, dk = x.new_empty(0), kernels.new_empty(0)
    with torch.cuda.device_of(x):
        if needs[0]:
            dx = torch.empty_like(x)
            bc, bp, tiles, blocks = _tile(channels, groups, x[0, 0].numel())
            _by_map[(batch * groups * tiles * blocks,)](
                grad, kernels, tops, sums, dx, channels, groups, tiles, blocks, *sizes, least,
                BC=bc, BP=bp, **constants,
            )  # fmt: skip
        if needs[1]:
            dk = torch.empty_like(kernels)
            bc, bp, _, blocks = _tile(channels, groups, inner[0, 0].numel())
            _by_kernels[(batch * groups * blocks,)](
                x, grad, kernels, tops, sums, inner, dk, channels, groups, blocks, *sizes, least,
                BC=bc, BP=bp, **constants,
            )  # fmt: skip
    return dx, dk
