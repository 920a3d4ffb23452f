"""Long convolutions: kernels as long as the sequence, learned directly, kept sparse or smooth by a soft threshold.

Fu, Epstein, Nguyen, Thomas, Zhang, Dao, Rudra, Ré 2023, "Simple Hardware-Efficient Long Convolutions for Sequence
Modeling", arXiv 2302.06646.

    k = sign(w)·max(|w| − λ, 0),     y = k * u + D ⊙ u

The one thing that a directly learned kernel lacks against state-space models is smoothness; the threshold ("squash")
is enough to bring it. H·L parameters, O(H·L·log L) for one sequence. The authors' layers are :class:`LongConvLayer`
here and the stand-alone one and the H3 block in ``longconv_layers.py``; transforms are in ``longconv_fft.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive
from torchconv.catalog import part
from torchconv.ops._common import (
    Padding,
    Size,
    check_depthwise,
    check_input,
    check_padding,
    conv_nd,
    make_conv,
    ntuple,
)
from torchconv.ops._longconv_kernel import (
    STARTS,
    LongConvKernel,
    double_exponential,
    moving_average,
    smooth_frequencies,
    squash,
    warn_when_dead,
    wrapped,
)
from torchconv.ops._sequence import SpectrumCache, make_activation, projection, with_skip
from torchconv.ops.longconv_fft import BlockFFT, power_of_two

__all__ = [
    "LongConv",
    "LongConv1d",
    "LongConv2d",
    "LongConvKernel",
    "LongConvLayer",
    "double_exponential",
    "moving_average",
    "smooth_frequencies",
    "squash",
]

_LONG = (0, 255, 31)  # taps an axis unless given: both neighbourhoods of 128 samples, or of a map of 16 × 16


@part(
    "longconv",
    paper="longconv",
    kind="operator",
    dims=(1, 2),
    mixes="space",
    supports=("stride", "dilation", "even", "padding"),
    merges="conv",
    mixer={"kernel_size": None},
    conv={"kernel_size": None},
    keywords="long convolution global kernel squash soft threshold sequence FlashButterfly H3 FFT",
)
class LongConv(nn.Module):
    """Depthwise convolution with a kernel as long as the sequence under a soft threshold, in place of ``nn.ConvNd``.

    Args:
        in_channels: C ≥ 1; ``out_channels`` and ``groups`` are left unset or equal it.
        kernel_size: taps; 2·L − 1 reach from every to every position of a sequence of L. Unset: 255, in the plane 31.
            Longer kernels do not hurt: what cannot be met is not computed.
        stride, padding, dilation: as in ``nn.ConvNd``, with "same" padding at any stride.
        bias: learn an additive bias.
        lam: threshold λ ≥ 0.
        kernel_dropout: probability, of single taps in training.
        init: "random", or "double_exp": decaying with the distance, at other rates in every channel.
        init_std: standard deviation of the taps at the start.
        causal: outputs see the past only (one dimension, padding "same").
        backend: in one dimension, see :func:`torchconv.kernels.long_conv`.

    Shape:
        (N, C, \\*spatial) → (N, C, \\*spatial').

    Raises:
        ValueError: an argument is out of range or not supported; the message names it.

    Example:
        >>> LongConv1d(6, kernel_size=999)(torch.zeros(2, 6, 500)).shape
        torch.Size([2, 6, 500])

    Reference: Fu et al., arXiv 2302.06646.
    """

    ndim: ClassVar[int] = 0

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_size: Size | None = None,
        stride: Size = 1,
        padding: Padding = "same",
        dilation: Size = 1,
        groups: int | None = None,
        bias: bool = True,
        *,
        lam: float = 0.003,
        kernel_dropout: float = 0.0,
        init: str = "random",
        init_std: float = 0.02,
        causal: bool = False,
        backend: str = "auto",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_depthwise(in_channels, out_channels, groups, "LongConv")
        check_padding(padding, self.ndim)
        check(not causal or padding == "same", "padding", padding, "a causal kernel needs padding='same'")
        check(not causal or self.ndim == 1, "causal", causal, "planes have no past; only LongConv1d takes it")
        check(lam >= 0 and math.isfinite(lam), "lam", lam, "must be at least 0")
        check_choice("init", init, STARTS)
        self.in_channels = self.out_channels = self.groups = in_channels
        size = _LONG[self.ndim] if kernel_size is None else kernel_size
        self.kernel_size = ntuple("kernel_size", size, self.ndim)
        self.stride = ntuple("stride", stride, self.ndim)
        self.dilation = ntuple("dilation", dilation, self.ndim)
        self.padding, self.lam, self.causal, self.backend = padding, lam, causal, backend
        self.init, self.init_std = init, init_std
        options = {"device": device, "dtype": dtype}
        self.kernel = nn.Parameter(torch.empty(in_channels, *self.kernel_size, **options))
        self.D = nn.Parameter(torch.empty(in_channels, **options))
        self.bias = nn.Parameter(torch.empty(in_channels, **options)) if bias else None
        self.dropout = nn.Dropout(kernel_dropout)
        self._cache = SpectrumCache()
        self.reset_parameters()
        warn_when_dead(self.kernel, lam)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Kernel and skip normal, bias zero."""
        nn.init.normal_(self.kernel, std=self.init_std)
        if self.init == "double_exp":
            for axis, taps in enumerate(self.kernel_size, start=1):
                reach = taps if self.causal else taps // 2 + 1
                envelope = double_exponential(self.in_channels, reach, self.kernel.device, self.kernel.dtype)
                lag = torch.arange(taps, device=self.kernel.device)
                lag = lag if self.causal else (lag - taps // 2).abs()
                shape = [self.in_channels, *(1 for _ in self.kernel_size)]
                shape[axis] = taps
                self.kernel.mul_(envelope[:, lag].reshape(shape))
        nn.init.normal_(self.D)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def param_options(self) -> dict[str, dict[str, float]]:
        """Neither kernel nor skip are decayed."""
        return {"kernel": {"weight_decay": 0.0}, "D": {"weight_decay": 0.0}}

    def taps(self) -> tuple[Tensor, int]:
        """The kernel of a sequence (C, kernel_size) by rising lag, the skip in it, and the tap at lag 0."""
        origin = 0 if self.causal else self.kernel_size[0] // 2
        return with_skip(self.dropout(squash(self.kernel, self.lam)), self.D, origin), origin

    def weight(self) -> Tensor:
        """The same as the weight of a depthwise ``nn.ConvNd``; a causal kernel is filled up with future zeros."""
        if self.ndim == 1:
            kernel, _ = self.taps()
            weight = kernel.flip(-1).unsqueeze(1)
            return F.pad(weight, (0, weight.shape[-1] - 1)) if self.causal else weight
        kernel = self.dropout(squash(self.kernel, self.lam))
        centre = [p for k in reversed(self.kernel_size) for p in (k // 2, k - 1 - k // 2)]
        skip = F.pad(self.D.reshape(-1, *(1 for _ in self.kernel_size)), centre)
        return (kernel + skip).flip(tuple(range(1, 1 + self.ndim))).unsqueeze(1)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x``."""
        check_input(x, self.in_channels, self.ndim)
        if self.ndim > 1 or self.padding != "same" or self.dilation != (1,):
            return conv_nd(x, self.weight(), self.bias, self.stride, self.padding, self.dilation, self.in_channels)
        sources, settings = [self.kernel, self.D], (self.lam, self.causal)
        y = self._cache.convolve(x, sources, self.taps, settings, self.dropout, backend=self.backend)
        y = y[..., :: self.stride[0]] if self.stride != (1,) else y
        return y if self.bias is None else y + self.bias[:, None].to(y.dtype)

    def merge(self) -> nn.Module:
        """The same map as a depthwise ``nn.ConvNd``, without dropout."""
        was = self.dropout.training
        self.dropout.eval()
        weight = self.weight()
        self.dropout.train(was)
        return make_conv(weight, self.bias, self.stride, self.padding, self.dilation, self.in_channels)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return (
            f"{self.in_channels}, kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding!r}, "
            f"dilation={self.dilation}, lam={self.lam}, causal={self.causal}"
        )


class LongConv1d(LongConv):
    """Long convolution over (N, C, L)."""

    ndim = 1


class LongConv2d(LongConv):
    """Long convolution over (N, C, H, W): a kernel as large as the map."""

    ndim = 2


@part(
    "longconv-layer",
    paper="longconv",
    kind="layer",
    dims=(1,),
    probe={"build": {"d_model": 6, "l_max": 40, "channels": 2, "bidirectional": True}, "inputs": [[2, 6, 32]]},
    keywords="long convolution safari layer sequence GLU squash butterfly",
)
class LongConvLayer(nn.Module):
    """The authors' layer: convolution, skip, activation, dropout, projection. Norm and residual are yours.

    Args:
        d_model: H ≥ 1.
        l_max: taps of the kernel; inputs may be shorter (it is cut) or longer (zeros follow).
        channels: c kernels for every feature.
        bidirectional: a second kernel looks ahead, from lag −1.
        activation: after the convolution: "gelu", "silu", "relu", "tanh", "sigmoid", "softplus", "sqrelu", "laplace" or
            "id".
        postact: of the projection: "glu" or an activation; None leaves the projection out and gives c·H features.
        initializer, weight_norm: of the projection.
        dropout: probability; ``tie_dropout`` drops whole features of a sequence.
        transposed: sequences are (B, H, L), otherwise (B, L, H).
        block_fft_conv: transform by :class:`BlockFFT`, of sequences and kernels apart; the inverse is exact.
        block_fft_conv_args: its arguments.
        wrap: what the authors' layer does, circular convolution of length + min(length, l_max) samples: a kernel longer
            than the input is cut to twice the input only, and what is beyond the input acts at negative lags, so that
            a causal layer looks ahead. By blocks it is defined where that sum is a power of two.
        kernel_args: of :class:`LongConvKernel`.

    Shape:
        (B, H, L) → (B, H, L), or (B, L, H) → the same.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> LongConvLayer(6, l_max=100, channels=2)(torch.zeros(2, 6, 80)).shape
        torch.Size([2, 6, 80])

    Reference: Fu et al., arXiv 2302.06646.
    """

    def __init__(
        self,
        d_model: int,
        l_max: int = 1024,
        channels: int = 1,
        bidirectional: bool = False,
        activation: str | None = "gelu",
        postact: str | None = "glu",
        initializer: str | None = None,
        weight_norm: bool = False,
        dropout: float = 0.0,
        tie_dropout: bool = False,
        transposed: bool = True,
        block_fft_conv: bool = False,
        block_fft_conv_args: Mapping[str, Any] | None = None,
        *,
        wrap: bool = False,
        backend: str = "auto",
        device: Any = None,
        dtype: Any = None,
        **kernel_args: Any,
    ) -> None:
        super().__init__()
        for name, value in (("d_model", d_model), ("l_max", l_max), ("channels", channels)):
            check_positive(name, value)
        self.d_model, self.l_max, self.bidirectional = d_model, l_max, bidirectional
        self.transposed, self.block_fft_conv, self.wrap, self.backend = transposed, block_fft_conv, wrap, backend
        options = {"device": device, "dtype": dtype}
        self.D = nn.Parameter(torch.randn(channels, d_model, **options))
        self.kernel = LongConvKernel(
            d_model, l_max, 2 * channels if bidirectional else channels, **kernel_args, **options
        )
        if block_fft_conv:
            block = dict(block_fft_conv_args or {})
            self.block_fft_u, self.block_fft_k = BlockFFT(**block, **options), BlockFFT(**block, **options)
        self.activation = make_activation(activation)
        self.dropout = nn.Dropout1d(dropout) if tie_dropout else nn.Dropout(dropout)
        self.output_linear: nn.Module = nn.Identity()
        if postact is not None:
            width = channels * d_model
            self.output_linear = projection(
                width, d_model, transposed, postact, initializer, weight_norm, device, dtype
            )
        self._cache = SpectrumCache()

    def reset_parameters(self) -> None:
        """Skip normal; kernel, transforms and projection reset themselves."""
        nn.init.normal_(self.D)

    def _circular(self, length: int) -> Tensor:
        """The kernel of a circular convolution: the future, if it has one, stands at the end."""
        kernel = self.kernel()
        if not self.bidirectional:
            return kernel if self.wrap else kernel[..., :length]
        past, future = kernel.chunk(2)
        missing = length
        if not self.wrap:
            past, future = past[..., :length], future[..., :length]
            missing = power_of_two(2 * length) - past.shape[-1]
        return F.pad(past, (0, missing)) + F.pad(future.flip(-1), (missing, 0))

    def _taps(self, length: int) -> tuple[Tensor, int]:
        origin = 0
        if self.wrap:
            kernel, n = self._circular(length), min(length, self.l_max) + length
            if self.bidirectional or kernel.shape[-1] + length - 1 > n:
                kernel, origin = wrapped(kernel, length, n)
        else:
            kernel = self.kernel()
            if self.bidirectional:
                past, future = kernel.chunk(2)
                kernel, origin = torch.cat([future.flip(-1), past], -1), future.shape[-1]
        return with_skip(kernel, self.D, origin), origin

    def _by_blocks(self, u: Tensor) -> Tensor:
        length = u.shape[-1]
        n = min(length, self.l_max) + length if self.wrap else power_of_two(2 * length)
        spectrum = self.block_fft_u(u, n).unsqueeze(1) * self.block_fft_k(self._circular(length), n)
        y = torch.fft.ifft(spectrum, n).real[..., :length].to(u.dtype)
        return y + self.D.unsqueeze(-1) * u.unsqueeze(1)

    def forward(self, u: Tensor, lengths: Tensor | int | None = None) -> Tensor:
        """Mix the sequence; ``lengths`` (B,), (1,) or one number say where each ends and zeros follow."""
        axis = 1 if self.transposed else 2
        if u.dim() != 3 or u.shape[axis] != self.d_model:
            expected = f"(B, {self.d_model}, L)" if self.transposed else f"(B, L, {self.d_model})"
            raise ValueError(f"u of shape {tuple(u.shape)}: expected {expected}")
        u = u if self.transposed else u.transpose(1, 2)
        length = u.shape[-1]
        if lengths is not None:
            ends = torch.as_tensor(lengths, device=u.device).reshape(-1, 1, 1)
            if ends.shape[0] not in (1, u.shape[0]):
                raise ValueError(
                    f"lengths of shape ({ends.shape[0]},): expected one, or one for each of {u.shape[0]} sequences"
                )
            u = u * (torch.arange(length, device=u.device) < ends)
        if self.block_fft_conv:
            y = self._by_blocks(u)
        else:
            sources, settings = [self.kernel.kernel, self.D], (*self.kernel.settings(), self.wrap)
            dropout, make = self.kernel.dropout, lambda: self._taps(length)
            y = self._cache.convolve(u, sources, make, settings, dropout, backend=self.backend)
        y = y.flatten(1, 2)
        y = self.activation(y if self.transposed else y.transpose(1, 2))
        if isinstance(self.dropout, nn.Dropout1d) and not self.transposed:
            y = self.dropout(y.transpose(1, 2)).transpose(1, 2)
        else:
            y = self.dropout(y)
        y = self.output_linear(y)
        return y

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return (
            f"{self.d_model}, l_max={self.l_max}, bidirectional={self.bidirectional}, transposed={self.transposed}, "
            f"block_fft_conv={self.block_fft_conv}, wrap={self.wrap}"
        )
