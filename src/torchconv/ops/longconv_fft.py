"""Transforms and convolutions of arXiv 2302.06646 (FlashButterfly) and arXiv 2311.05908 (FlashFFTConv).

- :class:`BlockFFT`: the transform as products with small matrices, exact or learned (a Butterfly/Monarch product).
- three passes: :func:`three_pass_conv` of :mod:`torchconv.kernels._long_monarch`, and its parts.
- :func:`partial_conv` and :func:`frequency_sparse_conv`: kernels cut short in time or in frequency.

2·16·N·log16 N complex multiply-adds a sequence, learned or not; N·log2 N for a plain FFT.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from torchconv._common import check, check_positive
from torchconv.kernels._long_monarch import (
    block_dft,
    dft_matrix,
    first_pass,
    inner_convolutions,
    inverse_block_dft,
    last_pass,
    power_of_two,
    three_pass_conv,
)
from torchconv.kernels.long import check_input, long_conv
from torchconv.kernels.precision import HALF, wide_dtype

__all__ = [
    "BlockFFT",
    "block_dft",
    "first_pass",
    "frequency_sparse_conv",
    "inner_convolutions",
    "inverse_block_dft",
    "last_pass",
    "partial_conv",
    "three_pass_conv",
]

_RADIX = 16  # of the authors' transform, whatever matrices there are


def partial_conv(x: Tensor, kernel: Tensor, taps: int) -> Tensor:
    """Causal convolution with the first ``taps`` of the kernel only, which bounds the memory of past samples.

    Kernels longer than the sequence do not wrap round, as they do in the authors' example.

    Shape:
        x (B, H, L), kernel (H, K) → (B, H, L).

    Example:
        >>> partial_conv(torch.ones(1, 1, 4), torch.ones(1, 4), 2)
        tensor([[[1., 2., 2., 2.]]])

    Reference: arXiv 2311.05908, section 3.3.
    """
    check_positive("taps", taps)
    return long_conv(x, kernel[..., :taps])


def frequency_sparse_conv(x: Tensor, kernel: Tensor, partial: int) -> Tensor:
    """Causal convolution whose kernel has only the ``partial`` // 2 lowest bins of its transform of 2·L samples.

    Without its high bins the kernel wraps round into the outputs a little, as in the authors' code.

    Shape:
        x (B, H, L), kernel (H, K) → (B, H, L).

    Reference: arXiv 2311.05908, section 3.3.
    """
    check_positive("partial", partial)
    check_input(x, kernel)
    if kernel.dim() != 2 or kernel.shape[0] != x.shape[1] or kernel.shape[1] < 1:
        raise ValueError(f"kernel of shape {tuple(kernel.shape)}: expected ({x.shape[1]}, K) with K ≥ 1")
    n = 2 * x.shape[-1]
    wide = wide_dtype(x.dtype)
    spectrum = torch.fft.rfft(kernel.to(wide), n)[..., : partial // 2]
    kept = spectrum.shape[-1]
    product = torch.fft.rfft(x.to(wide), n)[..., :kept] * spectrum
    return torch.fft.irfft(product, n)[..., : x.shape[-1]].to(x.dtype)


class BlockFFT(nn.Module):
    """A Fourier transform by 16 × 16 matrices, exact or with learned matrices that begin as the exact ones.

    Args:
        learn_dft_matrices: learn one complex matrix, stored (H, n, n, 2) as ``mat_<n>``, for n = 2, 4, … max_m.
        H: 1 for all features alike, or the number of features for one each.
        max_m: the largest matrix, a power of two. Transforms go by 16 (or max_m, if that is less).
        dropout: of the entries of learned matrices.
        learn_additive: learn a correction, added to the exact matrices.

    Shape:
        (B, H, L), real or complex → (B, H, N), complex.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> x = torch.randn(2, 3, 50)
        >>> torch.allclose(BlockFFT()(x, 64), torch.fft.fft(x, 64), atol=1e-4)
        True

    Reference: arXiv 2302.06646, section 3.2.
    """

    def __init__(
        self,
        learn_dft_matrices: bool = True,
        H: int = 1,
        max_m: int = 16,
        dropout: float = 0.0,
        learn_additive: bool = False,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_positive("H", H)
        check_positive("max_m", max_m)
        check(max_m >= 2 and max_m & (max_m - 1) == 0, "max_m", max_m, "must be a power of two, at least 2")
        self.H, self.max_m, self.learn_additive = H, max_m, learn_additive
        self.sizes = [2 ** (i + 1) for i in range(int(math.log2(max_m)))] if learn_dft_matrices else []
        self.dropout = nn.Dropout(dropout)
        for n in self.sizes:
            self.register_parameter(f"mat_{n}", nn.Parameter(torch.empty(H, n, n, 2, device=device, dtype=dtype)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The exact transform; corrections are small noise."""
        for n in self.sizes:
            matrix = self.get_parameter(f"mat_{n}")
            if self.learn_additive:
                nn.init.normal_(matrix, std=0.01)
            else:
                matrix.copy_(torch.view_as_real(dft_matrix(n, torch.float64)).expand(self.H, -1, -1, -1))

    def _matrix(self, n: int, wide: torch.dtype) -> Tensor:
        stored = self.dropout(getattr(self, f"mat_{n}").to(wide))  # a tensor in the place of a parameter, perhaps
        matrix = torch.view_as_complex(stored)
        return matrix + dft_matrix(n, wide, matrix.device) if self.learn_additive else matrix

    def forward(self, x: Tensor, N: int | None = None, forward: bool = True) -> Tensor:
        """Transform ``x``, zero-padded or cut to N samples (unset: as many as there are), rounded up to a power of two.

        With ``forward=False`` the inverse of exact matrices, conj(F(conj x)) / N.
        """
        samples = x.shape[-1] if N is None else N
        if N is not None:
            check_positive("N", N)
        if self.sizes and self.H > 1 and (x.dim() < 2 or x.shape[-2] != self.H):
            raise ValueError(
                f"x of shape {tuple(x.shape)}: expected (…, {self.H}, L), as there are matrices for H={self.H}"
            )
        size = power_of_two(samples)
        if x.dtype in HALF:
            x = x.float()
        radix = min(_RADIX, self.max_m)
        matrices = None
        if self.sizes:
            wide = torch.float64 if x.dtype in (torch.float64, torch.complex128) else torch.float32
            matrices = {1: torch.ones(1, 1, 1, device=x.device, dtype=torch.promote_types(wide, torch.complex64))}
            matrices |= {n: self._matrix(n, wide) for n in _used(size, radix)}
        with torch.autocast(x.device.type, enabled=False):
            if forward:
                return block_dft(x, size, matrices, radix)
            return inverse_block_dft(x, size, matrices, radix) * (size / samples)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"learned={self.sizes}, H={self.H}, learn_additive={self.learn_additive}"


def _used(size: int, radix: int) -> list[int]:
    """The sizes of the matrices in a transform."""
    found = []
    while size > radix:
        found.append(radix)
        size //= radix
    return [n for n in {*found, size} if n > 1]
