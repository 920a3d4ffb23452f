"""Two more layers with long convolutions (arXiv 2302.06646): the stand-alone one, and the H3 block.

H3 (Fu et al. 2022, arXiv 2212.14052) gates a long convolution of gated keys and values by queries:

    k' = k_kernel * k + k_D ⊙ k,     y = q ⊙ (kernel * (k' ⊙ v) + D ⊙ k' ⊙ v)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchconv._common import check, check_positive
from torchconv.catalog import part
from torchconv.ops._longconv_kernel import LongConvKernel, initial_kernel, squash, warn_when_dead, wrapped
from torchconv.ops._sequence import SpectrumCache, projection, with_skip


@part(
    "longconv-standalone",
    paper="longconv",
    kind="layer",
    dims=(1,),
    probe={"build": {"H": 4, "L": 24}, "inputs": [[2, 4, 20]]},
    keywords="long convolution standalone layer squash GLU two-sided",
)
class StandaloneLongConv(nn.Module):
    """The authors' stand-alone layer: long convolution, skip, GELU, dropout, linear map with GLU.

    The authors' kernel of 2·L taps acts circularly on 2·(length of the input) samples: the second half stands at
    negative lags, so that their layer sees both sides although a comment calls it causal. ``causal=True`` uses the
    first half only.

    Args:
        H, L: features, and half of the number of taps.
        channels: kernels for every feature.
        dropout, kernel_dropout: probabilities.
        kernel_lam: threshold; the authors' 0.1 silences the kernel at their start.
        causal: see above.
        init_std: of the kernel at the start; the authors' is 0.002.

    Shape:
        (B, H, length) → the same.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> StandaloneLongConv(6, 50)(torch.zeros(2, 6, 40)).shape
        torch.Size([2, 6, 40])

    Reference: Fu et al., arXiv 2302.06646.
    """

    def __init__(
        self,
        H: int,
        L: int,
        channels: int = 2,
        dropout: float = 0.1,
        kernel_lam: float = 0.003,
        kernel_dropout: float = 0.0,
        causal: bool = False,
        *,
        init_std: float = 0.02,
        backend: str = "auto",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        for name, value in (("H", H), ("L", L), ("channels", channels)):
            check_positive(name, value)
        check(kernel_lam >= 0, "kernel_lam", kernel_lam, "must be at least 0")
        self.H, self.L, self.channels = H, L, channels
        self.kernel_lam, self.causal, self.backend, self.init_std = kernel_lam, causal, backend, init_std
        options = {"device": device, "dtype": dtype}
        self.D = nn.Parameter(torch.randn(channels, H, **options))
        self.kernel = nn.Parameter(initial_kernel((channels, H, 2 * L), "random", init_std, **options))
        warn_when_dead(self.kernel, kernel_lam)
        self.kernel_drop, self.dropout = nn.Dropout(kernel_dropout), nn.Dropout(dropout)
        self.output_linear = projection(channels * H, H, False, "glu", device=device, dtype=dtype)
        self._cache = SpectrumCache()

    def reset_parameters(self) -> None:
        """Kernel and skip normal; the projection resets itself."""
        nn.init.normal_(self.kernel, std=self.init_std)
        nn.init.normal_(self.D)

    def param_options(self) -> dict[str, dict[str, float]]:
        """The kernel is not decayed."""
        return {"kernel": {"weight_decay": 0.0}}

    def _taps(self, length: int) -> tuple[Tensor, int]:
        kernel = self.kernel_drop(squash(self.kernel, self.kernel_lam))
        if self.causal:
            return with_skip(kernel[..., : self.L], self.D, 0), 0
        kernel, origin = wrapped(kernel, length, 2 * length)
        return with_skip(kernel, self.D, origin), origin

    def forward(self, u: Tensor) -> Tensor:
        """Mix the sequence."""
        if u.dim() != 3 or u.shape[1] != self.H:
            raise ValueError(f"u of shape {tuple(u.shape)}: expected (B, {self.H}, length)")
        length = u.shape[-1]
        sources, settings = [self.kernel, self.D], (self.kernel_lam, self.causal)
        y = self._cache.convolve(
            u, sources, lambda: self._taps(length), settings, self.kernel_drop, backend=self.backend
        )
        y = self.dropout(nn.functional.gelu(y.flatten(1, 2)))
        y = self.output_linear(y.transpose(1, 2)).transpose(1, 2)
        return y

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"{self.H}, {self.L}, channels={self.channels}, kernel_lam={self.kernel_lam}, causal={self.causal}"


@part(
    "h3-conv",
    paper="longconv",
    kind="layer",
    dims=(1,),
    probe={"build": {"d_model": 5, "l_max": 24}, "inputs": [[2, 20, 5]]},
    keywords="H3 hungry hippos gated long convolution language model mixer attention replacement",
)
class H3Conv(nn.Module):
    """The H3 block with long convolutions in place of its two state-space models.

    Args:
        d_model: H ≥ 1.
        l_max: taps of both kernels; inputs may be shorter or longer.
        head_dim: 1, as in the authors' code, where other values fail.
        wrap: what the authors' code does with inputs shorter than the kernels, see
            :class:`~torchconv.ops.longconv.LongConvLayer`.
        kernel_args: of both :class:`~torchconv.ops.longconv.LongConvKernel`.

    Shape:
        (B, L, H) → the same.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> H3Conv(6, l_max=50)(torch.zeros(2, 40, 6)).shape
        torch.Size([2, 40, 6])

    Reference: Fu et al., arXiv 2302.06646, section 4; arXiv 2212.14052.
    """

    def __init__(
        self,
        d_model: int,
        l_max: int,
        head_dim: int = 1,
        *,
        wrap: bool = False,
        backend: str = "auto",
        device: Any = None,
        dtype: Any = None,
        **kernel_args: Any,
    ) -> None:
        super().__init__()
        check_positive("d_model", d_model)
        check_positive("l_max", l_max)
        check(head_dim == 1, "head_dim", head_dim, "only 1 is defined with one kernel for every feature")
        self.d_model, self.wrap, self.backend = d_model, wrap, backend
        options = {"device": device, "dtype": dtype}
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d_model, d_model, **options) for _ in range(3))
        self.k_kernel = LongConvKernel(d_model, l_max, **kernel_args, **options)
        self.k_D = nn.Parameter(torch.randn(d_model, **options))
        self.kernel = LongConvKernel(d_model, l_max, **kernel_args, **options)
        self.D = nn.Parameter(torch.randn(d_model, **options))
        self.output_linear = nn.Linear(d_model, d_model, **options)
        self._caches = SpectrumCache(), SpectrumCache()

    def reset_parameters(self) -> None:
        """Skips normal; kernels and projections reset themselves."""
        nn.init.normal_(self.k_D)
        nn.init.normal_(self.D)

    def _mix(self, x: Tensor, kernel: LongConvKernel, skip: Tensor, cache: SpectrumCache) -> Tensor:
        length = x.shape[-1]

        def make() -> tuple[Tensor, int]:
            (taps,) = kernel()
            if not self.wrap:
                return with_skip(taps, skip, 0), 0
            taps, origin = wrapped(taps, length, 2 * length)
            return with_skip(taps, skip, origin), origin

        settings = (*kernel.settings(), self.wrap)
        return cache.convolve(x, [kernel.kernel, skip], make, settings, kernel.dropout, backend=self.backend)

    def forward(self, u: Tensor) -> Tensor:
        """Mix the sequence."""
        if u.dim() != 3 or u.shape[2] != self.d_model:
            raise ValueError(f"u of shape {tuple(u.shape)}: expected (B, L, {self.d_model})")
        q, k, v = (p(u).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        k = self._mix(k, self.k_kernel, self.k_D, self._caches[0])
        y = q * self._mix(k * v, self.kernel, self.D, self._caches[1])
        out: Tensor = self.output_linear(y.transpose(1, 2))
        return out
