"""SGConv: depthwise convolution as long as the sequence, whose kernel has few parameters and decays with the distance.

Li, Cai, Zhang, Chen, Dey 2022, "What Makes Convolutional Models Great on Long Sequence Modeling?", arXiv 2210.09298.

    k = [ up_1(w_0), α·up_1(w_1), α²·up_2(w_2), α³·up_4(w_3), … ] / Z,     y = k * u + D ⊙ u

Each octave of the kernel is one small tensor w_i of K numbers, interpolated to its length and weighted by a power of
α; Z is the norm at the start and stays. H·K·(1 + log2(L/K)) parameters instead of H·L; O(H·L·log L) for one sequence.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchconv._common import check, check_positive
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
from torchconv.ops._sequence import SpectrumCache, make_activation, projection, with_skip
from torchconv.ops._sgconv_kernel import StructuredKernel, check_mode, octave_count, structured_kernel

__all__ = ["SGConv", "SGConv1d", "SGConvLayer", "check_mode", "octave_count", "structured_kernel"]

_LONG = 255  # taps of the operator unless given: both neighbourhoods of a sequence of 128 samples


@part(
    "sgconv",
    paper="sgconv",
    kind="operator",
    dims=(1,),
    mixes="space",
    supports=("stride", "dilation", "even", "padding"),
    merges="conv",
    mixer={"kernel_size": 255},
    conv={"kernel_size": 255},
    keywords="structured global convolution long sequence decay multi-scale interpolation S4 LRA FFT",
)
class SGConv(StructuredKernel):
    """Depthwise convolution with a structured global kernel, in place of ``nn.Conv1d``.

    Args:
        in_channels: C ≥ 1; ``out_channels`` and ``groups`` are left unset or equal it.
        kernel_size: taps; 2·L − 1 reach from every to every position of a sequence of L. Longer kernels do not hurt:
            what cannot be met is not computed.
        stride, padding, dilation: as in ``nn.Conv1d``, with "same" padding at any stride.
        bias: learn an additive bias.
        kernel_dim: K, numbers an octave; at most half of the kernel is used.
        causal: outputs see the past only; needs padding "same".
        decay: α⁻¹ ≥ 1, by which every octave is weaker, or (least, most) over the channels.
        mode: assembly and start, see :func:`structured_kernel` and :class:`SGConvLayer`.
        backend: see :func:`torchconv.kernels.long_conv`.

    Shape:
        (N, C, L) → (N, C, L').

    Raises:
        ValueError: an argument is out of range or not supported; the message names it.

    Example:
        >>> SGConv1d(6, kernel_size=999)(torch.zeros(2, 6, 500)).shape
        torch.Size([2, 6, 500])

    Reference: Li et al., arXiv 2210.09298.
    """

    ndim: ClassVar[int] = 1

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_size: Size = _LONG,
        stride: Size = 1,
        padding: Padding = "same",
        dilation: Size = 1,
        groups: int | None = None,
        bias: bool = True,
        *,
        kernel_dim: int = 16,
        causal: bool = False,
        decay: float | tuple[float, float] = 2.0,
        mode: str = "cat_randn",
        backend: str = "auto",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_depthwise(in_channels, out_channels, groups, "SGConv")
        check_padding(padding, 1)
        check(not causal or padding == "same", "padding", padding, "a causal kernel needs padding='same'")
        check_positive("kernel_dim", kernel_dim)
        self.in_channels = self.out_channels = self.groups = in_channels
        self.kernel_size = ntuple("kernel_size", kernel_size, 1)
        self.stride, self.dilation = ntuple("stride", stride, 1), ntuple("dilation", dilation, 1)
        self.padding, self.causal, self.backend = padding, causal, backend
        taps = self.kernel_size[0]
        reach = taps if causal else (taps + 1) // 2
        ends = (decay, decay) if isinstance(decay, int | float) else tuple(decay)
        remedy = "must be a number of at least 0, or two: the least and the most over the channels"
        check(len(ends) == 2 and all(isinstance(e, int | float) and e >= 0 for e in ends), "decay", decay, remedy)
        low, high = ends
        self.make_kernel(
            1 if causal else 2, in_channels, reach, mode, 0, min(kernel_dim, reach), None, low, high, device, dtype
        )
        self.D = nn.Parameter(torch.randn(in_channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(in_channels, device=device, dtype=dtype)) if bias else None
        self._cache = SpectrumCache()

    def reset_parameters(self) -> None:
        """Octaves and skip normal, bias zero."""
        self.reset_kernel()
        nn.init.normal_(self.D)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def param_options(self) -> dict[str, dict[str, float]]:
        """The skip is not decayed."""
        return {"D": {"weight_decay": 0.0}}

    def taps(self) -> tuple[Tensor, int]:
        """The kernel (C, kernel_size) by rising lag, the skip in it, and the number of the tap at lag 0."""
        count = self.kernel_size[0]
        if self.causal:
            (kernel,), origin = self.one_sided(count), 0
        else:
            past, future = self.one_sided((count + 1) // 2)
            origin = count // 2
            kernel = torch.cat([future[:, :origin].flip(-1), past], -1)
        return with_skip(kernel, self.D, origin), origin

    def weight(self) -> Tensor:
        """The same as the weight of a depthwise ``nn.Conv1d``; a causal kernel is filled up with future zeros."""
        kernel, _ = self.taps()
        weight = kernel.flip(-1).unsqueeze(1).to(self.D.dtype)
        return nn.functional.pad(weight, (0, weight.shape[-1] - 1)) if self.causal else weight

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x``."""
        check_input(x, self.in_channels, 1)
        if self.padding != "same" or self.dilation != (1,):
            return conv_nd(x, self.weight(), self.bias, self.stride, self.padding, self.dilation, self.in_channels)
        y = self._cache.convolve(x, [*self.weights(), self.D], self.taps, backend=self.backend)
        y = y[..., :: self.stride[0]] if self.stride != (1,) else y
        return y if self.bias is None else y + self.bias[:, None].to(y.dtype)

    def merge(self) -> nn.Module:
        """The same map as a depthwise ``nn.Conv1d``."""
        return make_conv(self.weight(), self.bias, self.stride, self.padding, self.dilation, self.in_channels)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return (
            f"{self.in_channels}, kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding!r}, "
            f"dilation={self.dilation}, causal={self.causal}, mode={self.mode!r}, octaves={len(self.kernel_list)}"
        )


class SGConv1d(SGConv):
    """SGConv over (N, C, L)."""


class _FeatureNorm(nn.Module):
    """(x − mean + m) · s / std over the features of (B, D, L): scalars m and s, the biased std, no epsilon."""

    def __init__(self, device: Any, dtype: Any) -> None:
        super().__init__()
        self.m = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))
        self.s = nn.Parameter(torch.ones(1, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.m)
        nn.init.ones_(self.s)

    def forward(self, x: Tensor) -> Tensor:
        std, mean = torch.std_mean(x, dim=-2, correction=0, keepdim=True)
        y: Tensor = (self.s / std) * (x - mean + self.m)
        return y


class _Norm(nn.Module):
    """Holds a norm under the name that checkpoints have it."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x)
        return y


@part(
    "sgconv-layer",
    paper="sgconv",
    kind="layer",
    dims=(1,),
    probe={"build": {"d_model": 6, "l_max": 48, "kernel_dim": 8, "bidirectional": True}, "inputs": [[2, 6, 40]]},
    keywords="structured global convolution GConv S4 drop-in sequence layer",
)
class SGConvLayer(StructuredKernel):
    """The authors' layer ``GConv``: convolution, skip, activation, dropout, norm, projection. The residual is yours.

    Args:
        d_model: H ≥ 1.
        l_max: the kernel reaches at least so far; inputs may be shorter (it is cut) or longer (zeros follow).
        channels: c kernels for every feature.
        bidirectional: a second kernel looks ahead, from lag −1.
        activation: after the convolution: "gelu", "silu", "relu", "tanh", "sigmoid" or "id".
        ln: normalise the features before the projection (with scalars m, s where ``transposed``; not defined where all
            features are equal).
        postact: after the projection: None, "glu" or an activation.
        initializer, weight_norm: of the projection.
        dropout: probability, of whole features of a sequence.
        transposed: sequences are (B, H, L), otherwise (B, L, H).
        linear: convolution and skip only; gives c·H features.
        mode: words in a string: "cat" or "sum" (assembly), "randn" or "cos" (start), "nearest" (interpolation instead
            of linear), "learnable" (tap j is weighted by (j + 1)^(−decay) instead of by octave; give decay_min and
            decay_max between 0 and 1), "fixed" (that decay is not trained).
        init_scale: s, kernel_dim: K, n_scales: n octaves; unset 1 + ⌈log2(l_max/K)⌉ − s. K·2^(n − 1 + s) taps.
        decay_min, decay_max: ends of the multipliers over the features, or of the learnable decays.

    Shape:
        (B, H, L) → (B, H, L), or (B, L, H) → the same.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> SGConvLayer(6, l_max=100, bidirectional=True, postact="glu")(torch.zeros(2, 6, 80)).shape
        torch.Size([2, 6, 80])

    Reference: Li et al., arXiv 2210.09298.
    """

    def __init__(
        self,
        d_model: int,
        l_max: int,
        channels: int = 1,
        bidirectional: bool = False,
        activation: str | None = "gelu",
        ln: bool = False,
        postact: str | None = None,
        initializer: str | None = None,
        weight_norm: bool = False,
        dropout: float = 0.0,
        transposed: bool = True,
        linear: bool = False,
        mode: str = "cat_randn",
        init_scale: int = 0,
        kernel_dim: int = 64,
        n_scales: int | None = None,
        decay_min: float = 2.0,
        decay_max: float = 2.0,
        *,
        backend: str = "auto",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_positive("d_model", d_model)
        check_positive("channels", channels)
        self.d_model, self.channels, self.bidirectional = d_model, channels, bidirectional
        self.transposed, self.linear, self.backend = transposed, linear, backend
        self.D = nn.Parameter(torch.randn(channels, d_model, device=device, dtype=dtype))
        sides = 2 * channels if bidirectional else channels
        self.make_kernel(
            sides, d_model, l_max, mode, init_scale, kernel_dim, n_scales, decay_min, decay_max, device, dtype
        )
        self._cache = SpectrumCache()
        if linear:
            return
        self.activation = make_activation(activation)
        self.dropout = nn.Dropout1d(dropout)
        options = {"device": device, "dtype": dtype}
        width = channels * d_model
        self.norm: nn.Module = nn.Identity()
        if ln:
            self.norm = _Norm(_FeatureNorm(device, dtype) if transposed else nn.LayerNorm(width, **options))
        self.output_linear = projection(width, d_model, transposed, postact, initializer, weight_norm, device, dtype)

    def reset_parameters(self) -> None:
        """Octaves and skip normal; norm and projection reset themselves."""
        self.reset_kernel()
        nn.init.normal_(self.D)

    def param_options(self) -> dict[str, dict[str, float]]:
        """A learned decay is not decayed by the optimiser."""
        return {} if self.decay is None else {"decay": {"weight_decay": 0.0}}

    def kernel(self, length: int) -> Tensor:
        """The normalised kernel for inputs of ``length``: (c, H, length), or two-sided (c, H, 2·length).

        In the two-sided form tap j < length stands at lag j and tap 2·length − j at lag −j.
        """
        kernel = self.one_sided(length)
        kernel = nn.functional.pad(kernel, (0, length - kernel.shape[-1]))
        if not self.bidirectional:
            return kernel
        past, future = kernel.chunk(2)
        return torch.cat([past, future.flip(-1)], -1)

    def _taps(self, length: int) -> tuple[Tensor, int]:
        # Exporters may leave the length open; the convolution cuts what is beyond it anyway.
        kernel = self.one_sided(None if torch.compiler.is_exporting() else length)
        if not self.bidirectional:
            return with_skip(kernel, self.D, 0), 0
        past, future = kernel.chunk(2)
        origin = future.shape[-1]
        return with_skip(torch.cat([future.flip(-1), past], -1), self.D, origin), origin

    def forward(self, u: Tensor) -> Tensor:
        """Mix the sequence."""
        axis = 1 if self.transposed else 2
        if u.dim() != 3 or u.shape[axis] != self.d_model:
            expected = f"(B, {self.d_model}, L)" if self.transposed else f"(B, L, {self.d_model})"
            raise ValueError(f"u of shape {tuple(u.shape)}: expected {expected}")
        u = u if self.transposed else u.transpose(1, 2)
        length = u.shape[-1]
        sources = [*self.weights(), self.D]
        y = self._cache.convolve(u, sources, lambda: self._taps(length), backend=self.backend).flatten(1, 2)
        if not self.linear:
            y = self.dropout(self.activation(y))
        y = y if self.transposed else y.transpose(1, 2)
        return y if self.linear else self.output_linear(self.norm(y))

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return (
            f"{self.d_model}, channels={self.channels}, bidirectional={self.bidirectional}, mode={self.mode!r}, "
            f"octaves={len(self.kernel_list)}, transposed={self.transposed}, linear={self.linear}"
        )
