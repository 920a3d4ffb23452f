"""Kernels learned directly, as long as the sequence, and what keeps them smooth or sparse."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive
from torchconv.kernels.precision import widen

STARTS = ("random", "double_exp")
_FEW = 0.05  # share of taps above the threshold at the start below which training is hopeless


def squash(kernel: Tensor, lam: float) -> Tensor:
    """Soft threshold sign(k)·max(|k| − lam, 0): the proximal map of lam·‖k‖₁.

    Taps within the threshold are zero and get no gradient.

    Example:
        >>> squash(torch.tensor([-3.0, 0.5, 2.0]), 1.0)
        tensor([-2.,  0.,  1.])

    Reference: arXiv 2302.06646, section 3.1.
    """
    return F.softshrink(kernel, lam) if lam > 0 else kernel


def moving_average(kernel: Tensor, window: int) -> Tensor:
    """Mean of ``window`` neighbours on the last axis of (\\*, H, L), zeros outside counted in; ``window`` is odd.

    Example:
        >>> moving_average(torch.tensor([[3.0, 3.0, 3.0]]), 3)
        tensor([[2., 3., 2.]])
    """
    check_positive("window", window)
    check(window % 2 == 1, "window", window, "must be odd, so that it has a centre")
    return F.avg_pool1d(kernel, window, 1, window // 2)


def smooth_frequencies(kernel: Tensor, window: int) -> Tensor:
    """Correlate the spectrum of (\\*, L) with the Gaussian exp(−½·(j − window // 2)²), not normalised.

    A product with a fixed bump in time, in effect. An odd L loses its last sample, as in the authors' code. An even
    ``window`` reaches one bin further to lower frequencies.

    Shape:
        (\\*, L) → (\\*, 2·(L // 2)).
    """
    check_positive("window", window)
    if kernel.shape[-1] < 2:
        raise ValueError(f"kernel of {kernel.shape[-1]} tap: the spectrum of at least 2 can be smoothed")
    wide = widen(kernel)
    spectrum = torch.fft.rfft(wide)
    offset = torch.arange(window, device=kernel.device, dtype=wide.dtype) - window // 2
    weight = torch.exp(-0.5 * offset.square()).reshape(1, 1, -1)
    parts = torch.stack([spectrum.real, spectrum.imag])
    padded = F.pad(parts, ((window - 1) // 2, window // 2))
    flat = F.conv1d(padded.reshape(-1, 1, padded.shape[-1]), weight).reshape(parts.shape)
    return torch.fft.irfft(torch.complex(flat[0], flat[1])).to(kernel.dtype)


def double_exponential(features: int, length: int, device: Any = None, dtype: Any = None) -> Tensor:
    """Envelopes exp(−(j/L)·⌊H/2⌋^(h/H)), (H, L): from slow to fast decay over the features."""
    h = torch.arange(features, device=device, dtype=dtype)[:, None]
    j = torch.arange(length, device=device, dtype=dtype)
    return torch.exp(-(j / length) * torch.tensor(features // 2, device=device, dtype=dtype) ** (h / features))


def initial_kernel(shape: tuple[int, ...], start: str, std: float, device: Any = None, dtype: Any = None) -> Tensor:
    """Gaussian with a standard deviation; "double_exp" lets (\\*, H, L) decay as :func:`double_exponential`."""
    kernel = std * torch.randn(shape, device=device, dtype=dtype)
    if start == "double_exp":
        kernel = kernel * double_exponential(shape[-2], shape[-1], device, dtype)
    return kernel


def warn_when_dead(kernel: Tensor, lam: float) -> None:
    """Say so when nearly all taps start within the threshold, where they have no gradient."""
    if lam <= 0 or kernel.is_meta or kernel.numel() == 0:
        return
    share = float((kernel.detach().abs() > lam).double().mean())
    if share < _FEW:
        warnings.warn(
            f"lam={lam}: {share:.2%} of the taps start above the threshold, the others get no gradient; "
            f"lower lam or raise init_std",
            stacklevel=3,
        )


class LongConvKernel(nn.Module):
    """A kernel learned tap by tap: smoothing, soft threshold, dropout.

    Args:
        H, L: features and taps (2·L taps unless ``causal``).
        channels: kernels for every feature.
        lam: threshold. The authors' 0.1 with their start silences every tap for good; see ``init_std``.
        causal: False doubles the number of taps.
        kernel_dropout: probability, of single taps.
        weight_init: "random", or "double_exp" with decaying envelopes.
        use_ma_smoothing: average ``ma_window_len`` neighbours first.
        smooth_freq: with it, smooth the spectrum by a Gaussian of that many bins instead (an odd number of taps loses
            one).
        init_std: standard deviation at the start; the authors' is 0.002 for "random" and 0.02 for "double_exp".

    Shape:
        () → (channels, H, taps).

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> LongConvKernel(4, 16, channels=2)().shape
        torch.Size([2, 4, 16])

    Reference: arXiv 2302.06646, section 3.1.
    """

    def __init__(
        self,
        H: int,
        L: int,
        channels: int = 1,
        lam: float = 0.003,
        causal: bool = True,
        kernel_dropout: float = 0.0,
        weight_init: str = "random",
        use_ma_smoothing: bool = False,
        ma_window_len: int = 7,
        smooth_freq: bool = False,
        *,
        init_std: float = 0.02,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        for name, value in (("H", H), ("L", L), ("channels", channels), ("ma_window_len", ma_window_len)):
            check_positive(name, value)
        check(lam >= 0 and math.isfinite(lam), "lam", lam, "must be at least 0")
        odd = ma_window_len % 2 == 1 or smooth_freq or not use_ma_smoothing
        check(odd, "ma_window_len", ma_window_len, "must be odd, so that the average has a centre")
        check_choice("weight_init", weight_init, STARTS)
        self.lam, self.weight_init, self.init_std = lam, weight_init, init_std
        self.window = ma_window_len if use_ma_smoothing else 0
        self.smooth_freq = smooth_freq
        self.dropout = nn.Dropout(kernel_dropout)
        shape = (channels, H, L if causal else 2 * L)
        self.kernel = nn.Parameter(initial_kernel(shape, weight_init, init_std, device, dtype))
        warn_when_dead(self.kernel, lam)

    def reset_parameters(self) -> None:
        """Draw the kernel anew."""
        with torch.no_grad():
            shape = tuple(self.kernel.shape)
            self.kernel.copy_(
                initial_kernel(shape, self.weight_init, self.init_std, self.kernel.device, self.kernel.dtype)
            )

    def param_options(self) -> dict[str, dict[str, float]]:
        """The kernel is not decayed."""
        return {"kernel": {"weight_decay": 0.0}}

    def forward(self) -> Tensor:
        """The kernel as it is applied."""
        kernel: Tensor = self.kernel
        if self.window:
            smooth = smooth_frequencies if self.smooth_freq else moving_average
            kernel = smooth(kernel, self.window)
        kernel = self.dropout(squash(kernel, self.lam))
        return kernel

    def settings(self) -> tuple[Any, ...]:
        """What else than its parameter the kernel depends on in evaluation."""
        return self.lam, self.window, self.smooth_freq

    def live_taps(self) -> float:
        """Share of the taps that the threshold lets through."""
        with torch.no_grad():
            return float((self() != 0).double().mean())

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"{tuple(self.kernel.shape)}, lam={self.lam}, window={self.window}, smooth_freq={self.smooth_freq}"


def wrapped(kernel: Tensor, length: int, n: int) -> tuple[Tensor, int]:
    """Taps by rising lag and the tap at lag 0 that act as a circular convolution of ``n`` samples with ``kernel``.

    ``kernel`` is cut or padded to n; tap n − m acts at lag −m.
    """
    kernel = kernel[..., :n]
    kernel = F.pad(kernel, (0, n - kernel.shape[-1]))
    return torch.cat([kernel[..., n - length + 1 :], kernel[..., :length]], -1), length - 1
