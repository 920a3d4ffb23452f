"""Discrete Fourier transforms as products with small matrices, and long convolutions by them.

Fu et al. 2023, arXiv 2302.06646, sections 3.2 and 3.3. With N = m·n, x viewed as (m, n) and W = exp(−2πi/N),

    X[k_m + m·k_n] = Σ_{i_n} exp(−2πi·i_n·k_n/n) · W^(i_n·k_m) · Σ_{i_m} exp(−2πi·i_m·k_m/m) · x[i_m·n + i_n]

is a product with an m × m matrix, a twiddle and a transform of length n, which goes on in the same way. 8·N·Σ m_i
FLOPs against the FFT's 5·N·log2 N: worth it where products run on matrix units, not on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from torchconv._common import check, check_positive


def _complex_type(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype in (torch.float64, torch.complex128) else torch.complex64


def roots(rows: int, columns: int, size: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """exp(−2πi·r·c/size), (rows, columns), complex, of the precision of ``dtype``; exact angles, no rounding of r·c."""
    product = torch.arange(rows)[:, None] * torch.arange(columns)[None] % size
    angle = product.to(torch.float64) * (-2 * math.pi / size)
    return torch.polar(torch.ones_like(angle), angle).to(_complex_type(dtype)).to(device)


def dft_matrix(size: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
    """The (size, size) matrix of the transform.

    Example:
        >>> torch.allclose(dft_matrix(4) @ torch.ones(4, dtype=torch.complex64), torch.tensor([4.0, 0, 0, 0]) + 0j,
        ...                atol=1e-6)
        True
    """
    return roots(size, size, size, dtype, device)


@lru_cache(maxsize=256)
def _kept(rows: int, columns: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # the same numbers serve training later
        return roots(rows, columns, size, dtype, device)


def _table(rows: int, columns: int, size: int, like: Tensor) -> Tensor:
    make = roots if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() else _kept
    return make(rows, columns, size, _complex_type(like.dtype), like.device)


def _multiply(matrix: Tensor, x: Tensor) -> Tensor:
    """``matrix`` (size, size), or one a channel (H, size, size), on axis −2 of x (…, H, size, columns)."""
    return torch.matmul(matrix, x)


def block_dft(x: Tensor, size: int, matrices: Mapping[int, Tensor] | None = None, radix: int = 16) -> Tensor:
    """The transform of ``size`` samples of the last axis, by matrices of at most ``radix`` rows.

    Args:
        x: real or complex, zero-padded or cut to ``size``.
        size: a power of two.
        matrices: matrices to use in place of the exact ones, by their size: (size, size), or (H, size, size) with one
            for each entry of the second last axis of x. All sizes that occur must be there.
        radix: a power of two, at least 2.

    Shape:
        (…, H, L) → (…, H, size), complex.

    Raises:
        ValueError: a size is not a power of two.

    Example:
        >>> x = torch.randn(2, 3, 50)
        >>> torch.allclose(block_dft(x, 64), torch.fft.fft(x, 64), atol=1e-4)
        True

    Reference: arXiv 2302.06646, section 3.2.
    """
    for argument, value in (("size", size), ("radix", radix)):
        check_positive(argument, value)
        check(value & (value - 1) == 0, argument, value, "must be a power of two")
    check(radix >= 2, "radix", radix, "must be at least 2")
    missing = size - x.shape[-1]
    x = F.pad(x, (0, missing)) if missing > 0 else x[..., :size]
    return _recurse(x.to(_complex_type(x.dtype)).unsqueeze(-2), size, matrices, radix).flatten(-2)


def _recurse(x: Tensor, size: int, matrices: Mapping[int, Tensor] | None, radix: int) -> Tensor:
    """Transform the last axis of (…, H, G, size); G are the rows that earlier steps made."""
    if size <= radix:
        matrix = _table(size, size, size, x) if matrices is None else matrices[size]
        return _multiply(matrix, x.transpose(-1, -2)).transpose(-1, -2)
    m, n = radix, size // radix
    matrix = _table(m, m, m, x) if matrices is None else matrices[m]
    rows = x.unflatten(-1, (m, n))  # (…, H, G, m, n)
    if matrix.dim() == 3:
        matrix = matrix.unsqueeze(1)  # the rows G stand between channels and the matrix
    inner = _multiply(matrix, rows) * _table(m, n, size, x)
    # k_m joins G as rows of the next transforms; the result, (…, G, m, n), is read as k_n·m + k_m.
    outer = _recurse(inner.flatten(-3, -2), n, matrices, radix)
    return outer.unflatten(-2, (rows.shape[-3], m)).transpose(-1, -2).flatten(-2)


def inverse_block_dft(x: Tensor, size: int, matrices: Mapping[int, Tensor] | None = None, radix: int = 16) -> Tensor:
    """conj(:func:`block_dft` (conj x)) / size, which for exact matrices is the inverse transform."""
    return block_dft(x.conj_physical(), size, matrices, radix).conj_physical() / size


def monarch(x: Tensor, kernel: Tensor, origin: int) -> Tensor:
    """Long convolution by :func:`block_dft`; two images share one complex transform as its two parts.

    x (B, C, L), kernel (M, C, K) → (B, M, C, L), as in ``_long_forms.py``.
    """
    batch, length = x.shape[0], x.shape[2]
    size = power_of_two(max(origin + length, length + kernel.shape[2] - 1 - origin))
    spectrum = block_dft(kernel, size)
    if batch % 2:
        x = torch.cat([x, torch.zeros_like(x[:1])])
    pairs = torch.complex(x[0::2].contiguous(), x[1::2].contiguous())
    product = block_dft(pairs, size).unsqueeze(1) * spectrum
    y = inverse_block_dft(product, size)[..., origin : origin + length]
    return torch.stack([y.real, y.imag], 1).flatten(0, 1)[:batch]


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


# --- three passes ----------------------------------------------------------------------------------------------------


def first_pass(x: Tensor, rows: int, columns: int) -> Tensor:
    """Columns of x, viewed as (rows, columns), transformed and multiplied by the twiddles.

    Shape:
        (…, L) → (…, rows, columns), complex, L ≤ rows·columns. A transform of the last axis then gives entry
        k_1 + rows·k_2 of the whole transform at [k_1, k_2].
    """
    view = F.pad(x, (0, rows * columns - x.shape[-1])).unflatten(-1, (rows, columns))
    table = _table(rows, rows, rows, x)
    return _multiply(table, view.to(table.dtype)) * _table(rows, columns, rows * columns, x)


def inner_convolutions(u: Tensor, k: Tensor) -> Tensor:
    """Circular convolutions of the last axes, independent of each other: what the second pass does to every row."""
    return torch.fft.ifft(torch.fft.fft(u) * torch.fft.fft(k))


def last_pass(x: Tensor) -> Tensor:
    """Undo :func:`first_pass`: (…, rows, columns) → (…, rows·columns), complex."""
    rows, columns = x.shape[-2:]
    twiddle = _table(rows, columns, rows * columns, x).conj_physical()
    return (_multiply(_table(rows, rows, rows, x).conj_physical(), x * twiddle) / rows).flatten(-2)


def three_pass_conv(u: Tensor, k: Tensor, rows: int, columns: int) -> Tensor:
    """Causal convolution in three passes over memory, each of pieces that fit in fast memory.

    y[t] = Σ_{s ≤ t} k[t − s] · u[s]. The first pass transforms columns, the second convolves rows, the third
    transforms back.

    Args:
        u: (…, L).
        k: (…, K), broadcast against u.
        rows, columns: N_1 and N_2 with N_1·N_2 ≥ L + K − 1.

    Raises:
        ValueError: the view is too small.

    Example:
        >>> y = three_pass_conv(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 1.0]), 2, 4)
        >>> torch.allclose(y, torch.tensor([1.0, 3.0, 5.0]), atol=1e-5)
        True

    Reference: arXiv 2302.06646, section 3.3.
    """
    check_positive("rows", rows)
    check_positive("columns", columns)
    needed = u.shape[-1] + k.shape[-1] - 1
    check(rows * columns >= needed, "rows", rows, f"rows · columns must be at least L + K − 1 = {needed}")
    y = last_pass(inner_convolutions(first_pass(u, rows, columns), first_pass(k, rows, columns)))
    return y.real[..., : u.shape[-1]]
