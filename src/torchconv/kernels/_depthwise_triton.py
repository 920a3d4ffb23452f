"""Depthwise convolution on tensor cores: products of rows of the map with banded matrices (Triton).

For one channel and one row u of its kernel, the outputs of a piece of BW columns are a window of K ≥ (BW − 1)·s +
(k − 1)·d + 1 inputs times the K × BW matrix that holds w[u, v] at (j·s + v·d, j). Windows of many rows, images and
column pieces are stacked to a matrix, so that a channel is kD·kH matrix products with float32 sums. The fraction k/K of
the multiplications is useful, on units that multiply sixteen times as fast as those a direct kernel uses.

- Output: Σ_u X_u · T_u, with the bias added before the store.
- Gradient of x: the same over the (zero-stuffed) gradient with the flipped kernel.
- Gradient of w: P_u = Gᵀ · X_u, whose diagonals are dw[u]; they are stored per column of the piece and summed
  afterwards, in one order, so that results repeat bit by bit.

Windows begin where memory is aligned; the offset that this costs is put into the matrix. Imported only when used, as
this imports triton.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchconv.kernels._depthwise_forms import Geometry, _stuffed
from torchconv.kernels._triton import interpreted

_BANDS = 1 << 26  # entries of the banded matrices, and of the unsummed gradient, made at one time
_ROWS = 64  # windows of a program
_FILL = 1024  # programs that fill a large device several times


@triton.jit
def _split_rows(m, n_tiles, OD, OH):
    """Window number → image, position along the first two axes, column piece."""
    piece = m % n_tiles
    m = m // n_tiles
    oh = m % OH
    m = m // OH
    return m // OD, m % OD, oh, piece


@triton.jit
def _windows(x, c, n, z, y, piece, a, C, D, H, WV, inside, VEC: tl.constexpr, STEP: tl.constexpr, PW: tl.constexpr, BK: tl.constexpr):  # fmt: skip # noqa: E501
    """(rows, BK) of x from column a of every window on; zero outside the map."""
    W = WV * VEC  # tells the compiler what the width is divisible by
    row = ((n.to(tl.int64) * C + c) * D + z) * H + y
    columns = (piece * STEP - PW + a)[:, None] + tl.arange(0, BK)[None, :]
    ok = (inside & (z >= 0) & (z < D) & (y >= 0) & (y < H))[:, None] & (columns >= 0) & (columns < W)
    return tl.load(x + (row * W)[:, None] + columns, mask=ok, other=0.0)


@triton.jit
def _output_kernel(
    x, bands, bias, out,
    c0, C, rows, blocks, n_tiles, D, H, WV, OD, OH, OW,
    SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, DD: tl.constexpr, DH: tl.constexpr,
    PD: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, K: tl.constexpr,
    VEC: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BW: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    local = pid // blocks
    c = (c0 + local).to(tl.int64)
    m = (pid % blocks) * BM + tl.arange(0, BM)
    inside = m < rows
    n, od, oh, piece = _split_rows(m, n_tiles, OD, OH)
    acc = tl.zeros((BM, BW), dtype=tl.float32)
    entries = tl.arange(0, BK)[:, None] * BW + tl.arange(0, BW)[None, :]
    band = bands + local.to(tl.int64) * (KD * KH * K * BW)
    for step in range(KD * KH * (K // BK)):
        tap = step // (K // BK)
        a = (step % (K // BK)) * BK
        z = od * SD + (tap // KH) * DD - PD
        y = oh * SH + (tap % KH) * DH - PH
        xs = _windows(x, c, n, z, y, piece, a, C, D, H, WV, inside, VEC, BW * SW, PW, BK)
        ts = tl.load(band + (tap * K + a) * BW + entries)
        acc = tl.dot(xs, ts, acc, input_precision=PRECISION)
    if BIAS:
        acc += tl.load(bias + c).to(tl.float32)
    row = ((n.to(tl.int64) * C + c) * OD + od) * OH + oh
    columns = (piece * BW)[:, None] + tl.arange(0, BW)[None, :]
    ok = inside[:, None] & (columns < OW)
    tl.store(out + (row * OW)[:, None] + columns, acc.to(out.dtype.element_ty), mask=ok)


@triton.jit
def _weight_kernel(
    x, g, sums,
    c0, C, rows, per_split, n_tiles, D, H, WV, OD, OH, OV,
    SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, DD: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    PD: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    OFFSET: tl.constexpr, VEC: tl.constexpr, OUT_VEC: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BW: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    a = tl.program_id(1) * BK
    split = tl.program_id(2)
    c = (c0 + pid // (KD * KH)).to(tl.int64)
    tap = pid % (KD * KH)
    OW = OV * OUT_VEC
    acc = tl.zeros((BW, BK), dtype=tl.float32)
    start = split * per_split
    for first in range(start, min(start + per_split, rows), BM):
        m = first + tl.arange(0, BM)
        inside = m < rows
        n, od, oh, piece = _split_rows(m, n_tiles, OD, OH)
        row = ((n.to(tl.int64) * C + c) * OD + od) * OH + oh
        columns = (piece * BW)[:, None] + tl.arange(0, BW)[None, :]
        gs = tl.load(g + (row * OW)[:, None] + columns, mask=inside[:, None] & (columns < OW), other=0.0)
        z = od * SD + (tap // KH) * DD - PD
        y = oh * SH + (tap % KH) * DH - PH
        xs = _windows(x, c, n, z, y, piece, a, C, D, H, WV, inside, VEC, BW * SW, PW, BK)
        acc = tl.dot(tl.trans(gs), xs, acc, input_precision=PRECISION)
    j = tl.arange(0, BW)[:, None]
    t = a + tl.arange(0, BK)[None, :] - OFFSET - j * SW
    v = t // DW
    ok = (t >= 0) & (t - v * DW == 0) & (v < KW)
    place = (pid.to(tl.int64) * tl.num_programs(2) + split) * (BW * KW)
    tl.store(sums + place + j * KW + v, acc, mask=ok)


def _solid(geo: Geometry) -> Geometry:
    """The same convolution over three axes."""
    fills = ((1,), (1,), (1,), (1,), (0,), (1,))
    return Geometry(*geo[:2], *(fill * (3 - geo.ndim) + axes for fill, axes in zip(fills, geo[2:], strict=True)))


class _Tiling:
    """What both kernels need to know of a convolution's last axis."""

    def __init__(self, geo: Geometry, dtype: torch.dtype) -> None:
        width, extent, stride = geo.size[2], geo.extent[2], geo.stride[2]
        self.columns = 16 if geo.out[2] <= 16 or extent < 24 else 32
        self.vector = math.gcd(width, 16 // dtype.itemsize)
        self.before = -(-geo.padding[2] // self.vector) * self.vector
        self.offset = self.before - geo.padding[2]
        least = self.offset + (self.columns - 1) * stride + extent
        self.step = 16 if least <= 16 else 32
        self.window = -(-least // self.step) * self.step
        self.pieces = -(-geo.out[2] // self.columns)
        self.rows = geo.batch * geo.out[0] * geo.out[1] * self.pieces
        # float32 maps are multiplied as PyTorch's convolutions may: TF32 where they are allowed to.
        self.precision = "tf32" if dtype != torch.float32 or torch.backends.cudnn.allow_tf32 else "ieee"


def _bands(w: Tensor, geo: Geometry, tiling: _Tiling) -> Tensor:
    """(C, kD·kH, K, BW): w[c, u, v] at (offset + j·s + v·d, j)."""
    channels, taps = w.shape[0], geo.kernel[0] * geo.kernel[1]
    out = w.new_zeros(channels, taps, tiling.window, tiling.columns)
    outer, row, column, _ = out.stride()
    view = out.as_strided(
        (channels, taps, geo.kernel[2], tiling.columns),
        (outer, row, geo.dilation[2] * column, geo.stride[2] * column + 1),
        tiling.offset * column,
    )
    view.copy_(w.reshape(channels, taps, geo.kernel[2], 1))
    return out


def _correlate(x: Tensor, w: Tensor, bias: Tensor | None, geo: Geometry) -> Tensor:
    """out[o] = Σ_t w[t] · x[o·s + t·d − p] over three axes; the padding after the map is whatever ``out`` needs."""
    x = x.contiguous()
    tiling = _Tiling(geo, x.dtype)
    out = x.new_empty(geo.batch, geo.channels, *geo.out)
    per_channel = geo.kernel[0] * geo.kernel[1] * tiling.window * tiling.columns
    step = max(1, min(geo.channels, _BANDS // per_channel))
    blocks = -(-tiling.rows // _ROWS)
    step = max(1, min(step, (2**31 - 1) // blocks))  # programs in one launch
    for c in range(0, geo.channels, step):
        bands = _bands(w[c : c + step], geo, tiling)
        _output_kernel[(blocks * bands.shape[0],)](
            x, bands, bias if bias is not None else x, out,
            c, geo.channels, tiling.rows, blocks, tiling.pieces,
            *geo.size[:2], geo.size[2] // tiling.vector, *geo.out,
            *geo.stride, *geo.dilation[:2], *geo.padding[:2], tiling.before, *geo.kernel[:2], tiling.window,
            tiling.vector, bias is not None, tiling.precision, _ROWS, tiling.columns, tiling.step,
        )  # fmt: skip
    return out


def output(x: Tensor, w: Tensor, bias: Tensor | None, geo: Geometry) -> Tensor:
    """The convolution, contiguous."""
    kind, (x, w, bias) = x.dtype, _readable(x, w, bias)
    with _device(x):
        return _correlate(x, w, bias, _solid(geo)).reshape(geo.batch, geo.channels, *geo.out).to(kind)


def gradient_x(g: Tensor, w: Tensor, geo: Geometry) -> Tensor:
    """The gradient of the input, contiguous: the flipped kernel over the gradient of the output."""
    ones = (1,) * geo.ndim
    if set(geo.stride) != {1}:
        g = _stuffed(g, geo)
    before = tuple(e - 1 - p for e, p in zip(geo.extent, geo.padding, strict=True))
    there = Geometry(*geo[:2], tuple(g.shape[2:]), geo.kernel, geo.size, ones, before, geo.dilation)
    return output(g, w.flip(tuple(range(2, 2 + geo.ndim))), None, there)


def gradient_w(g: Tensor, x: Tensor, geo: Geometry) -> Tensor:
    """The gradient of the kernels, summed in float32."""
    kind, kernel = x.dtype, geo.kernel
    g, x = _readable(g.contiguous(), x.contiguous())
    geo = _solid(geo)
    tiling = _Tiling(geo, x.dtype)
    taps, width = geo.kernel[0] * geo.kernel[1], geo.kernel[2]
    chunks = tiling.window // tiling.step
    split = max(1, min(-(-_FILL // (geo.channels * taps * chunks)), -(-tiling.rows // (4 * _ROWS)), 65535))
    per_split = -(-tiling.rows // (split * _ROWS)) * _ROWS
    vector = math.gcd(geo.out[2], 16 // x.dtype.itemsize)
    step = max(1, min(geo.channels, _BANDS // (taps * split * tiling.columns * width)))
    dw = torch.empty(geo.channels, taps, width, device=x.device, dtype=torch.float32)
    with _device(x):
        for c in range(0, geo.channels, step):
            count = min(step, geo.channels - c)
            sums = torch.empty(count * taps, split, tiling.columns, width, device=x.device, dtype=torch.float32)
            _weight_kernel[(count * taps, chunks, split)](
                x, g, sums,
                c, geo.channels, tiling.rows, per_split, tiling.pieces,
                *geo.size[:2], geo.size[2] // tiling.vector, *geo.out[:2], geo.out[2] // vector,
                *geo.stride, *geo.dilation, *geo.padding[:2], tiling.before, *geo.kernel,
                tiling.offset, tiling.vector, vector, tiling.precision, _ROWS, tiling.columns, tiling.step,
            )  # fmt: skip
            dw[c : c + count] = sums.sum((1, 2)).reshape(count, taps, width)
    return dw.reshape(geo.channels, 1, *kernel).to(kind)


def _readable(*tensors: Any) -> tuple[Any, ...]:
    """Triton's interpreter multiplies the bits of bfloat16 matrices as integers (3.8): there they are widened."""
    if not interpreted():
        return tensors
    return tuple(t.float() if t is not None and t.dtype == torch.bfloat16 else t for t in tensors)


def _device(x: Tensor) -> Any:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device_of(x)
