"""Attentive convolution: one depthwise kernel for each image and channel, made from the pooled image.

Yu, Chen, Jiang, Peng, Sun, Kaski, Zhao 2025, "Attentive Convolution: Unifying the Expressivity of Self-Attention with
Convolutional Efficiency", arXiv 2510.20092.

With T = k^d taps, s = A·x (1 × 1), K of shape (N, C, T):

    K = W · act(pool_T(s)) + b          the flattened map is averaged in T consecutive bins: bands of rows
    K' = K − σ(d_c) · mean_t K          taps compete: a learned share of the mean is taken away
    y = P · correlate(V·x, K')          V and P are 1 × 1 convolutions

Averaging and the 1 × 1 convolution A commute, so that A is applied to the T averages instead of all positions: two
thirds of the published cost, 2·C² + T·C multiply-adds a position and C²·T an image. 3C² + 3C + T² + T + C parameters.
Kernels do not depend on the position, but on the size and orientation of the image.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive
from torchconv.catalog import part
from torchconv.kernels._layout import keep_layout
from torchconv.kernels.precision import wide_dtype
from torchconv.ops._common import (
    CONV,
    Padding,
    Size,
    check_input,
    check_padding,
    conv_nd,
    ntuple,
    resolve_padding,
)

BACKENDS = ("auto", "grouped", "shift")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


def band_means(x: Tensor, bins: int) -> Tensor:
    """Averages of ``bins`` consecutive stretches of the flattened map: (N, C, \\*spatial) → (N, C, bins).

    Of n positions, bin i covers ⌊i·n/bins⌋ to ⌈(i+1)·n/bins⌉ − 1: bins overlap where ``bins`` does not divide n, and
    repeat where n is smaller.

    Example:
        >>> band_means(torch.arange(5.0).reshape(1, 1, 5), 2)
        tensor([[[1., 3.]]])
    """
    flat = x.flatten(2)
    if not torch.compiler.is_exporting():
        check(flat.shape[2] > 0, "x.shape", tuple(x.shape), "every spatial axis needs a position")
        return F.adaptive_avg_pool1d(flat, bins)
    # Exporters know the adaptive pooling for some sizes only; the product works for all, also for sizes left open.
    n = flat.shape[2]
    bin_, position = torch.arange(bins, device=x.device), torch.arange(n, device=x.device)
    first, beyond = bin_ * n // bins, ((bin_ + 1) * n + bins - 1) // bins
    wide = wide_dtype(x.dtype)
    inside = ((position[:, None] >= first) & (position[:, None] < beyond)).to(wide)
    return ((flat.to(wide) @ inside) / (beyond - first).to(wide)).to(x.dtype)


def attentive_kernels(
    x: Tensor,
    projection: Tensor,
    generator: Tensor,
    kernel_size: tuple[int, ...],
    projection_bias: Tensor | None = None,
    generator_bias: Tensor | None = None,
    difference: Tensor | None = None,
    activation: str = "gelu",
) -> Tensor:
    """One kernel for each image and channel.

    K = generator · act(projection · band_means(x) + b) + b', then K − σ(difference_c) · mean(K).

    Args:
        x: the map.
        projection: (C, C), with ``projection_bias`` (C,) or None.
        generator: (T, T), T = product of ``kernel_size``, with ``generator_bias`` (T,) or None; shared by all channels.
        kernel_size: sizes of the kernels.
        difference: (C,) share of the mean to subtract, before the sigmoid; None subtracts nothing.
        activation: "gelu", "gelu_tanh" or "silu".

    Shape:
        (N, C, \\*spatial) → (N, C, \\*kernel_size).

    Raises:
        ValueError: an unknown activation.

    Reference: arXiv 2510.20092.
    """
    check_choice("activation", activation, ACTIVATIONS)
    context = projection @ band_means(x, torch.Size(kernel_size).numel())
    if projection_bias is not None:
        context = context + projection_bias[:, None]
    kernels = F.linear(ACTIVATIONS[activation](context), generator, generator_bias)
    if difference is not None:
        kernels = kernels - torch.sigmoid(difference)[:, None] * kernels.mean(2, keepdim=True)
    return kernels.unflatten(2, kernel_size)


def attentive_conv(
    x: Tensor,
    kernels: Tensor,
    stride: Size = 1,
    padding: Padding = "same",
    dilation: Size = 1,
    backend: str = "auto",
) -> Tensor:
    """Depthwise convolution with a kernel of its own for each item of the batch.

    y[n, c, i] = Σ_t kernels[n, c, t] · x[n, c, s·i + δ·t − p].

    Args:
        x: the map.
        kernels: the kernels; any sizes.
        stride, padding, dilation: as in ``nn.ConvNd``; "same" gives ceil(L / stride).
        backend: "grouped" is one convolution with N·C groups, the fastest in eager mode (measured: 1.4 to 30 times);
            "shift" adds shifted products, for any batch size in one graph. "auto" takes "shift" while compiling or
            exporting and for an empty batch, "grouped" otherwise.

    Shape:
        x (N, C, \\*spatial), kernels (N, C, \\*kernel) → (N, C, \\*spatial'). Channels-last inputs give channels-last
        results.

    Raises:
        ValueError: shapes do not fit or the backend is unknown.

    Example:
        >>> attentive_conv(torch.arange(4.0).reshape(2, 1, 2), torch.tensor([[[2.0]], [[3.0]]]))
        tensor([[[0., 2.]],
        <BLANKLINE>
                [[6., 9.]]])

    Reference: arXiv 2510.20092.
    """
    check_choice("backend", backend, BACKENDS)
    if kernels.dim() != x.dim() or kernels.shape[:2] != x.shape[:2]:
        expected = f"({x.shape[0]}, {x.shape[1]}, *kernel) with {x.dim() - 2} axes after the second"
        raise ValueError(f"kernels of shape {tuple(kernels.shape)}: expected {expected}")
    seen_through = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if backend == "shift" or (backend == "auto" and (seen_through or x.shape[0] == 0)):
        return _shift(x, kernels, stride, padding, dilation)
    batch, channels = x.shape[:2]
    rows = batch * channels
    flat, weight = x.reshape(1, rows, *x.shape[2:]), kernels.reshape(rows, 1, *kernels.shape[2:])
    y = conv_nd(flat, weight, None, stride, padding, dilation, rows)
    return keep_layout(y.reshape(batch, channels, *y.shape[2:]), x)


def _shift(x: Tensor, kernels: Tensor, stride: Size, padding: Padding, dilation: Size) -> Tensor:
    ndim = x.dim() - 2
    sizes = tuple(int(k) for k in kernels.shape[2:])
    strides, dilations = ntuple("stride", stride, ndim), ntuple("dilation", dilation, ndim)
    pads = resolve_padding(padding, sizes, dilations)
    lengths = [
        (length + sum(pad) - d * (k - 1) - 1) // s + 1
        for length, pad, d, k, s in zip(x.shape[2:], pads, dilations, sizes, strides, strict=True)
    ]
    padded = F.pad(x, [p for pair in reversed(pads) for p in pair])
    total: Tensor | None = None
    for tap in itertools.product(*(range(k) for k in sizes)):
        spans: tuple[Any, ...] = tuple(
            slice(t * d, t * d + s * (length - 1) + 1, s)
            for t, d, s, length in zip(tap, dilations, strides, lengths, strict=True)
        )
        one: tuple[Any, ...] = (slice(None), slice(None), *tap)
        weight = kernels[one].reshape(*kernels.shape[:2], *[1] * ndim)
        term = weight * padded[(..., *spans)]
        total = term if total is None else total + term
    assert total is not None
    return total


@part(
    "atconv",
    paper="atconv",
    kind="operator",
    dims=(1, 2, 3),
    mixes="space+channels",
    supports=("stride", "channels", "dilation", "even", "padding"),
    mixer={"kernel_size": 3},
    keywords="attentive convolution dynamic kernel per image AttNet global context lateral inhibition diffusion SiT",
)
class ATConv(nn.Module):
    """Attentive convolution: 1 × 1, a depthwise kernel made from the image itself, 1 × 1.

    Args:
        in_channels: C ≥ 1.
        out_channels: of the last 1 × 1 convolution; unset is C.
        kernel_size: odd or even, ≥ 1.
        stride, padding, dilation: of the generated depthwise kernels; published: 1, "same", 1.
        groups: 1, the 1 × 1 convolutions mix all channels.
        bias: biases in all four linear maps.
        activation: between the two maps that make the kernels: "gelu", "gelu_tanh" or "silu".
        backend: see :func:`attentive_conv`.

    Shape:
        (N, in_channels, \\*spatial) → (N, out_channels, \\*spatial').

    Raises:
        ValueError: an argument is out of range or not supported; the message names it.

    Example:
        >>> ATConv2d(6, kernel_size=3)(torch.zeros(2, 6, 5, 4)).shape
        torch.Size([2, 6, 5, 4])

    Reference: Yu et al., arXiv 2510.20092.
    """

    ndim: ClassVar[int] = 0

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_size: Size = 3,
        stride: Size = 1,
        padding: Padding = "same",
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        activation: str = "gelu",
        backend: str = "auto",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        check_positive("in_channels", in_channels)
        check_positive("out_channels", out_channels)
        check(groups == 1, "groups", groups, "ATConv's 1×1 convolutions mix all channels; leave groups at 1")
        check_padding(padding, self.ndim)
        check_choice("activation", activation, ACTIVATIONS)
        check_choice("backend", backend, BACKENDS)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size = ntuple("kernel_size", kernel_size, self.ndim)
        self.stride = ntuple("stride", stride, self.ndim)
        self.dilation = ntuple("dilation", dilation, self.ndim)
        self.padding, self.activation, self.backend = padding, activation, backend
        taps = torch.Size(self.kernel_size).numel()
        options: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        conv = CONV[self.ndim]
        self.kernel_proj = conv(in_channels, in_channels, 1, **options)
        self.kernel_gen = nn.Linear(taps, taps, **options)
        self.x_proj = conv(in_channels, in_channels, 1, **options)
        self.proj = conv(in_channels, out_channels, 1, **options)
        self.difference_control = nn.Parameter(torch.zeros(in_channels, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """PyTorch's defaults in the linear maps; half of the mean is subtracted."""
        for layer in (self.kernel_proj, self.kernel_gen, self.x_proj, self.proj):
            layer.reset_parameters()
        nn.init.zeros_(self.difference_control)

    def param_options(self) -> dict[str, dict[str, float]]:
        """The share of the mean is not decayed."""
        return {"difference_control": {"weight_decay": 0.0}}

    def kernels(self, x: Tensor, difference: bool = True) -> Tensor:
        """The kernels (N, C, \\*kernel_size) for ``x``; without ``difference`` before the mean is subtracted."""
        return _kernels(self, x, difference)

    def forward(self, x: Tensor) -> Tensor:
        """Make the kernels of ``x`` and apply them."""
        check_input(x, self.in_channels, self.ndim)
        kernels = self.kernels(x)
        o = attentive_conv(self.x_proj(x), kernels, self.stride, self.padding, self.dilation, self.backend)
        y: Tensor = self.proj(o)
        return y

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding!r}, dilation={self.dilation}, activation={self.activation!r}"
        )


def _kernels(layer: Any, x: Tensor, difference: bool) -> Tensor:
    return attentive_kernels(
        x,
        layer.kernel_proj.weight.flatten(1),
        layer.kernel_gen.weight,
        layer.kernel_size,
        layer.kernel_proj.bias,
        layer.kernel_gen.bias,
        layer.difference_control if difference else None,
        layer.activation,
    )


class ATConv1d(ATConv):
    """Attentive convolution over (N, C, L)."""

    ndim = 1


class ATConv2d(ATConv):
    """Attentive convolution over (N, C, H, W)."""

    ndim = 2


class ATConv3d(ATConv):
    """Attentive convolution over (N, C, D, H, W)."""

    ndim = 3


@part(
    "atconv-tokens",
    paper="atconv",
    kind="layer",
    dims=(2,),
    probe={"build": {"channels": 6, "grid": [4, 3]}, "inputs": [[2, 12, 6]]},
    keywords="attentive convolution tokens transformer SiT",
)
class ATConvTokens(nn.Module):
    """Attentive convolution on the tokens of an image, in place of self-attention in a (diffusion) transformer.

    Args:
        channels: C ≥ 1.
        kernel_size: odd or even, int or (rows, columns).
        grid: the image's (H, W) in tokens, or its side; unset takes a square of as many tokens as there are.
        bias: biases in all four linear maps.
        activation: "gelu_tanh" as published for SiT, "gelu" or "silu".
        backend: see :func:`attentive_conv`.

    Shape:
        (N, H·W, C) → the same, tokens in row-major order.

    Raises:
        ValueError: an argument is out of range, or the tokens do not fill the grid.

    Example:
        >>> ATConvTokens(6)(torch.zeros(2, 16, 6)).shape
        torch.Size([2, 16, 6])

    Reference: Yu et al., arXiv 2510.20092.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: Size = 3,
        grid: Size | None = None,
        bias: bool = True,
        *,
        activation: str = "gelu_tanh",
        backend: str = "auto",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_positive("channels", channels)
        check_choice("activation", activation, ACTIVATIONS)
        check_choice("backend", backend, BACKENDS)
        self.channels, self.activation, self.backend = channels, activation, backend
        self.kernel_size = ntuple("kernel_size", kernel_size, 2)
        self.grid = None if grid is None else ntuple("grid", grid, 2)
        taps = torch.Size(self.kernel_size).numel()
        options: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.kernel_proj = nn.Linear(channels, channels, **options)
        self.kernel_gen = nn.Linear(taps, taps, **options)
        self.x_proj = nn.Linear(channels, channels, **options)
        self.proj = nn.Linear(channels, channels, **options)
        self.difference_control = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))

    def param_options(self) -> dict[str, dict[str, float]]:
        """The share of the mean is not decayed."""
        return {"difference_control": {"weight_decay": 0.0}}

    def kernels(self, x: Tensor, difference: bool = True) -> Tensor:
        """The kernels (N, C, \\*kernel_size) for ``x``; without ``difference`` before the mean is subtracted."""
        return _kernels(self, x.transpose(1, 2), difference)

    def forward(self, x: Tensor) -> Tensor:
        """Make the kernels of the tokens and apply them on the grid."""
        if x.dim() != 3 or x.shape[2] != self.channels:
            raise ValueError(f"x of shape {tuple(x.shape)}: expected (N, tokens, {self.channels})")
        count = x.shape[1]
        side = round(int(count) ** 0.5) if self.grid is None else 0
        height, width = self.grid or (side, side)
        if height * width != count:
            wanted = "a square number of tokens; give grid=(H, W)" if side else f"{height}×{width} tokens"
            raise ValueError(f"x of shape {tuple(x.shape)}: expected {wanted}")
        v = self.x_proj(x).transpose(1, 2).unflatten(2, (height, width))
        o = attentive_conv(v, self.kernels(x), backend=self.backend)
        y: Tensor = self.proj(o.flatten(2).transpose(1, 2))
        return y
