"""Long convolution as matrix products in one launch (Triton): up to 2048 samples stay on the chip between the steps.

Fu et al. 2023, arXiv 2302.06646, sections 3.2 and 3.3, and Fu et al. 2023, arXiv 2311.05908. Two images are the real
and the imaginary part of one sequence, viewed as (N_1, N_2):

    A = F_1 · Z,  B = (A ∘ T) · F_2,  C = B ∘ K̂,  y = conj(F_1) · ((C · conj(F_2)) ∘ conj(T)) / N

for every channel, the last two for each of its M kernels. x is read once and y written once: 4·B·C·L·(1 + M) bytes in
float32, against 4·(1 + M)·B·N·(N_1 + N_2) FLOPs a channel, three times as many in float32. The kernel's transform K̂ is
made by PyTorch beforehand.
"""

from __future__ import annotations

import warnings
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchconv.kernels._long_monarch import dft_matrix, power_of_two, roots
from torchconv.kernels._triton_probe import trustworthy

# Samples of the longest transform whose parts fit the registers of a block of threads, compiled for compute
# capabilities 8.0 and 9.0. Twice as many spill kilobytes a thread.
LONGEST = {torch.float32: 1 << 9, torch.bfloat16: 1 << 11, torch.float16: 1 << 11}
_SHORTEST = 256  # 16 × 16, the smallest product of matrix units


@triton.jit
def _monarch_kernel(  # type: ignore[no-untyped-def]
    x, spectrum, first, second, twiddle, y,
    B, C, L, M, origin,
    N1: tl.constexpr, N2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pair = (tl.program_id(0) // C).to(tl.int64)
    c = (tl.program_id(0) % C).to(tl.int64)
    i1 = tl.arange(0, N1)
    i2 = tl.arange(0, N2)
    at = i1[:, None] * N2 + i2[None, :]
    square1 = i1[:, None] * N1 + i1[None, :]
    square2 = i2[:, None] * N2 + i2[None, :]
    N: tl.constexpr = N1 * N2
    f1r = tl.load(first + square1)
    f1i = tl.load(first + N1 * N1 + square1)
    f2r = tl.load(second + square2)
    f2i = tl.load(second + N2 * N2 + square2)
    tr = tl.load(twiddle + at)
    ti = tl.load(twiddle + N + at)
    even = (2 * pair * C + c) * L
    odd = ((2 * pair + 1) * C + c) * L
    inside = at < L
    zr = tl.load(x + even + at, mask=inside, other=0.0).to(tl.float32)
    zi = tl.load(x + odd + at, mask=inside & (2 * pair + 1 < B), other=0.0).to(tl.float32)
    ar = tl.dot(f1r, zr, input_precision=PRECISION) - tl.dot(f1i, zi, input_precision=PRECISION)
    ai = tl.dot(f1r, zi, input_precision=PRECISION) + tl.dot(f1i, zr, input_precision=PRECISION)
    ur = ar * tr - ai * ti
    ui = ar * ti + ai * tr
    br = tl.dot(ur, f2r, input_precision=PRECISION) - tl.dot(ui, f2i, input_precision=PRECISION)
    bi = tl.dot(ur, f2i, input_precision=PRECISION) + tl.dot(ui, f2r, input_precision=PRECISION)
    t = at - origin
    wanted = (t >= 0) & (t < L)
    for m in range(M):
        base = spectrum + (m * C + c) * 2 * N
        kr = tl.load(base + at)
        ki = tl.load(base + N + at)
        cr = br * kr - bi * ki
        ci = br * ki + bi * kr
        dr = tl.dot(cr, f2r, input_precision=PRECISION) + tl.dot(ci, f2i, input_precision=PRECISION)
        di = tl.dot(ci, f2r, input_precision=PRECISION) - tl.dot(cr, f2i, input_precision=PRECISION)
        er = dr * tr + di * ti
        ei = di * tr - dr * ti
        yr = tl.dot(f1r, er, input_precision=PRECISION) + tl.dot(f1i, ei, input_precision=PRECISION)
        yi = tl.dot(f1r, ei, input_precision=PRECISION) - tl.dot(f1i, er, input_precision=PRECISION)
        out = ((2 * pair * M + m) * C + c) * L
        tl.store(y + out + t, (yr / N).to(y.dtype.element_ty), mask=wanted)
        out = (((2 * pair + 1) * M + m) * C + c) * L
        tl.store(y + out + t, (yi / N).to(y.dtype.element_ty), mask=wanted & (2 * pair + 1 < B))


def _planes(z: Tensor) -> Tensor:
    """Real and imaginary parts as planes of one contiguous tensor, before the last two axes."""
    return torch.stack([z.real, z.imag], -3).to(torch.float32).contiguous()


@lru_cache(maxsize=64)
def _tables(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    with torch.inference_mode(False):
        twiddle = roots(rows, columns, rows * columns, torch.float32, device)
        matrices = (dft_matrix(n, torch.float32, device) for n in (rows, columns))
        first, second = (_planes(m) for m in matrices)
        return first, second, _planes(twiddle)


def samples(length: int, taps: int, origin: int) -> int:
    """Samples of the transform that a call takes."""
    return max(_SHORTEST, power_of_two(max(origin + length, length + taps - 1 - origin)))


def output(x: Tensor, kernel: Tensor, origin: int) -> Tensor:
    """The output as in ``_long_forms.py``, x in any floating type up to float32, kernel float32."""
    batch, channels, length = x.shape
    many = kernel.shape[0]
    size = samples(length, kernel.shape[2], origin)
    rows = 1 << (size.bit_length() // 2)
    columns = size // rows
    # Entry k_1 + N_1·k_2 of the transform stands at [k_1, k_2].
    spectrum = torch.fft.fft(kernel, size).unflatten(-1, (columns, rows)).transpose(-1, -2)
    y = x.new_empty(batch, many, channels, length)
    if y.numel():
        precision = "tf32x3" if x.dtype == torch.float32 else "tf32"
        with torch.cuda.device_of(x):
            _monarch_kernel[((batch + 1) // 2 * channels,)](
                x.contiguous(), _planes(spectrum), *_tables(rows, columns, x.device), y,
                batch, channels, length, many, origin,
                N1=rows, N2=columns, PRECISION=precision, num_warps=4 if size == _SHORTEST else 8,
            )  # fmt: skip
    return y


def refusal(x: Tensor, kernel: Tensor, origin: int) -> str:
    """Why this call can't run here; empty when it can."""
    if x.dtype not in LONGEST:
        return f"x is {x.dtype}"
    size = samples(x.shape[2], kernel.shape[2], origin)
    if size > LONGEST[x.dtype]:
        return f"a transform of {size} samples of {x.dtype} is longer than {LONGEST[x.dtype]}"
    return "" if trustworthy("long", x.device) else f"Triton kernels cannot be used on {x.device.type} here"


@lru_cache(maxsize=64)
def tell(reason: str) -> None:
    """Say once that another form was taken."""
    warnings.warn(f"backend='triton': {reason}; backend 'fft' computes instead", stacklevel=4)
