"""Res-FFT-ReLU: a residual block of two convolutions with a branch that works on the spectrum of the map.

Mao et al., "Intriguing Findings of Frequency Selection for Image Deblurring" (DeepRFT), AAAI 2023, arXiv 2111.11745, on
which DeepRFTv2 (2025, arXiv 2511.21132) builds. A ReLU applied in the Fourier domain selects frequencies; through it
every pixel sees the whole map.

    y = x + conv(relu(conv x)) + F⁻¹( W₂ · relu(W₁ · F x) )

First form: W₁, W₂ are real 2C × 2C matrices on the real and imaginary parts together. Second form ("complex"): complex
C × C·e and C·e × C matrices, the ReLU on real and imaginary parts by themselves, optionally in windows.

Cost a position: 2·k^n·C² multiply-adds for the convolutions, 4·C² (first form; half the frequencies are redundant) for
the matrices, and two real FFTs, O(log positions) each a channel. The Fourier kernel estimator of DeepRFTv2 is in
:mod:`torchconv.ops.deeprftv2_kernel`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive
from torchconv.catalog import part
from torchconv.kernels._custom import without_autocast
from torchconv.ops._common import (
    CONV,
    Padding,
    Size,
    apply_conv,
    check_input,
    check_odd,
    check_same,
    check_unit,
    ntuple,
)
from torchconv.ops.deeprftv2_doconv import DOConv1d, DOConv2d, DOConv3d

NORMS = ("backward", "forward", "ortho")
CONVS = ("plain", "doconv")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "leaky_relu": F.leaky_relu,
    "identity": lambda x: x,
}
_DOCONV: tuple[Any, ...] = (nn.Module, DOConv1d, DOConv2d, DOConv3d)


def _wide(t: Tensor) -> Tensor:
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def _spatial(x: Tensor) -> list[int]:
    return list(range(2, x.dim()))


def _hidden(channels: int, expansion: float) -> int:
    """⌊channels · expansion⌋; a quotient h / channels gives h, which the product misses by an ulp for some."""
    return math.floor(channels * expansion + 1e-6)


def _check_matrices(x: Tensor, w1: Tensor, w2: Tensor, axis: int, width: int) -> None:
    """``width`` numbers of a frequency enter ``w1`` on ``axis``, and ``w2`` leads back."""
    if x.dim() < 3 or not x.is_floating_point():
        raise ValueError(f"x of shape {tuple(x.shape)}, {x.dtype}: expected real (N, C, *spatial)")
    if w1.dim() != 2 or w1.shape[axis] != width or w2.shape != w1.shape[::-1]:
        expected = f"{width} on axis {axis} of w1 for {x.shape[1]} channels, and for w2 the shape of its transpose"
        raise ValueError(f"w1, w2 of shapes {tuple(w1.shape)}, {tuple(w2.shape)}: expected {expected}")


def spectral_mlp(x: Tensor, w1: Tensor, w2: Tensor, norm: str = "backward", activation: str = "relu") -> Tensor:
    """Two real matrices on the real and imaginary parts of the spectrum: F⁻¹( w2 · act(w1 · [Re F x; Im F x]) ).

    Args:
        x: the map; half precision is computed in float32.
        w1, w2: (hidden, 2C) and (2C, hidden).
        norm: of the transforms, as in ``torch.fft``.
        activation: "relu", "gelu", "silu", "leaky_relu" or "identity".

    Shape:
        (N, C, \\*spatial) → the same.

    Example:
        >>> x = torch.arange(6.0).reshape(1, 1, 6)
        >>> spectral_mlp(x, torch.eye(2), torch.eye(2), activation="identity").round().flatten().tolist()
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]

    Reference: arXiv 2111.11745, version 1, section 3.
    """
    check_choice("activation", activation, ACTIVATIONS)
    check_choice("norm", norm, NORMS)
    _check_matrices(x, w1, w2, 1, 2 * x.shape[1])
    if x.numel() == 0:  # which transforms refuse
        return x * 1
    axes, size = _spatial(x), list(x.shape[2:])
    with without_autocast(x.device.type):
        spectrum = torch.fft.rfftn(_wide(x), dim=axes, norm=norm)
        parts = torch.cat([spectrum.real, spectrum.imag], 1)
        hidden = ACTIVATIONS[activation](torch.einsum("oc,nc...->no...", _wide(w1), parts))
        real, imag = torch.einsum("oc,nc...->no...", _wide(w2), hidden).chunk(2, 1)
        y = torch.fft.irfftn(torch.complex(real.contiguous(), imag.contiguous()), s=size, dim=axes, norm=norm)
    return y.to(x.dtype)


def complex_spectral_mlp(
    x: Tensor,
    w1: tuple[Tensor, Tensor],
    w2: tuple[Tensor, Tensor],
    b1: tuple[Tensor, Tensor] | None = None,
    b2: tuple[Tensor, Tensor] | None = None,
    window_size: int | None = None,
    norm: str = "backward",
    activation: str = "relu",
) -> Tensor:
    """Two complex matrices on the spectrum: F⁻¹( act(F x · w1 + b1) · w2 + b2 ), act on both parts by themselves.

    Args:
        x: the map; half precision is computed in float32.
        w1, w2: real and imaginary part of (C, hidden) and (hidden, C), applied from the right.
        b1, b2: real and imaginary parts that broadcast to (…, hidden) and (…, C), or None.
        window_size: side of windows that are transformed by themselves; where it does not divide the size, a last
            window lies at the end, of which only what the others leave is used. None transforms the whole map.
        norm, activation: see :func:`spectral_mlp`.

    Shape:
        (N, C, \\*spatial) → the same.

    Raises:
        ValueError: a window is larger than the map.

    Reference: arXiv 2111.11745, version 2, section 3.
    """
    check_choice("activation", activation, ACTIVATIONS)
    check_choice("norm", norm, NORMS)
    for first, second in zip(w1, w2, strict=True):
        _check_matrices(x, first, second, 0, x.shape[1])
    if window_size is not None:
        check_positive("window_size", window_size)
    act = ACTIVATIONS[activation]
    if x.numel() == 0:  # which transforms refuse
        return x * 1
    if window_size is not None and list(x.shape[2:]) != [window_size] * (x.dim() - 2):
        windows, put_back = _windows(x, window_size)
        return put_back(complex_spectral_mlp(windows, w1, w2, b1, b2, None, norm, activation))
    axes, size = _spatial(x), list(x.shape[2:])
    with without_autocast(x.device.type):
        spectrum = torch.fft.rfftn(_wide(x), dim=axes, norm=norm)
        real, imag = spectrum.real.movedim(1, -1), spectrum.imag.movedim(1, -1)
        real, imag = _complex_linear(real, imag, w1, b1)
        real, imag = _complex_linear(act(real), act(imag), w2, b2)
        back = torch.complex(real, imag).movedim(-1, 1)
        y = torch.fft.irfftn(back, s=size, dim=axes, norm=norm)
    return y.to(x.dtype)


def _complex_linear(
    real: Tensor, imag: Tensor, weight: tuple[Tensor, Tensor], bias: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    a, b = (_wide(t) for t in weight)
    out_real, out_imag = real @ a - imag @ b, real @ b + imag @ a
    if bias is not None:
        out_real, out_imag = out_real + _wide(bias[0]).flatten(), out_imag + _wide(bias[1]).flatten()
    return out_real, out_imag


def _windows(x: Tensor, window: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Windows as items of a batch, and the function that puts results back."""
    check(min(x.shape[2:]) >= window, "window_size", window, f"is larger than the map {tuple(x.shape[2:])}")
    ndim, counts, kept = x.dim() - 2, [], []
    for axis, length in enumerate(x.shape[2:], start=2):
        whole = length // window * window
        reads, keeps = list(range(whole)), list(range(whole))
        if whole < length:
            reads += range(length - window, length)
            keeps += range(2 * whole + window - length, whole + window)
        x = x.index_select(axis, torch.tensor(reads, device=x.device))
        counts.append(len(reads) // window)
        kept.append(torch.tensor(keeps, device=x.device))
    for axis, count in enumerate(counts):  # (N, C, count, window, count, window, …)
        x = x.unflatten(2 + 2 * axis, (count, window))
    order = [0, *range(2, 2 + 2 * ndim, 2), 1, *range(3, 3 + 2 * ndim, 2)]
    batch = x.shape[0]
    flat = x.permute(order).flatten(0, ndim)

    def put_back(y: Tensor) -> Tensor:
        y = y.unflatten(0, (batch, *counts))
        back = [0, ndim + 1]
        for axis in range(ndim):
            back += [1 + axis, ndim + 2 + axis]
        y = y.permute(back)
        for axis in range(ndim):
            y = y.flatten(2 + axis, 3 + axis)
        for axis, keeps in enumerate(kept, start=2):
            y = y.index_select(axis, keeps)
        return y

    return flat, put_back


class RealSpectral(nn.ModuleList):
    """The first form's branch: two 1 × 1 convolutions on real and imaginary parts (names of the checkpoints)."""

    def __init__(self, layers: Sequence[nn.Module], norm: str, activation: str) -> None:
        super().__init__(layers)
        self.norm, self.activation = norm, activation

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``x``."""
        first, second = (_weight(layer[0]).flatten(1) for layer in (self[0].main, self[1].main))  # type: ignore[index]
        return spectral_mlp(x, first, second, self.norm, self.activation)


class ComplexSpectral(nn.Module):
    """The second form's branch: two complex matrices on the spectrum.

    Args:
        channels: C ≥ 1.
        expansion: hidden width over C.
        window_size: see :func:`complex_spectral_mlp`.
        bias: complex offsets after both matrices.
        norm, activation: see :func:`spectral_mlp`.
        ndim: spatial axes.
    """

    def __init__(
        self,
        channels: int,
        expansion: float = 1,
        window_size: int | None = None,
        bias: bool = False,
        norm: str = "backward",
        activation: str = "relu",
        *,
        ndim: int = 2,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_positive("channels", channels)
        hidden = _hidden(channels, expansion)
        check(hidden >= 1, "expansion", expansion, "leaves no hidden channel")
        if window_size is not None:
            check_positive("window_size", window_size)
        check_choice("norm", norm, NORMS)
        check_choice("activation", activation, ACTIVATIONS)
        self.channels, self.ndim = channels, ndim
        self.window_size, self.norm, self.activation = window_size, norm, activation
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        for i, shape in ((1, (channels, hidden)), (2, (hidden, channels))):
            for kind in ("real", "imag"):
                self.register_parameter(f"complex_weight{i}_{kind}", nn.Parameter(torch.empty(shape, **options)))
                offset = nn.Parameter(torch.empty(*[1] * (ndim + 1), shape[1], **options)) if bias else None
                self.register_parameter(f"b{i}_{kind}", offset)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming's uniform numbers in all four matrices, zero offsets."""
        for name, parameter in self.named_parameters():
            if name.startswith("b"):
                nn.init.zeros_(parameter)
            else:
                nn.init.kaiming_uniform_(parameter, a=16)

    def _pair(self, name: str) -> Any:
        pair = tuple(getattr(self, f"{name}_{kind}") for kind in ("real", "imag"))
        return None if pair[0] is None else pair

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``x`` (N, C, \\*spatial)."""
        check_input(x, self.channels, self.ndim)
        weights = (self._pair("complex_weight1"), self._pair("complex_weight2"))
        offsets = (self._pair("b1"), self._pair("b2"))
        return complex_spectral_mlp(x, *weights, *offsets, self.window_size, self.norm, self.activation)


def _weight(conv: Any) -> Tensor:
    weight: Tensor = conv.folded_weight() if hasattr(conv, "folded_weight") else conv.weight
    return weight


class _Named(nn.Module):
    """One convolution under the name ``main.0``."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.main = nn.ModuleList([conv])


class _Pair(nn.Module):
    """Two convolutions under the names ``conv1`` and ``conv2``."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.conv1, self.conv2 = first, second


@part(
    "res-fft-relu",
    paper="deeprftv2",
    kind="operator",
    dims=(1, 2, 3),
    mixes="space+channels",
    supports=(),
    mixer={"kernel_size": 3},
    keywords="Fourier FFT ReLU frequency selection residual block deblurring DeepRFT spectral global",
)
class ResFFTConv(nn.Module):
    """Residual block: two convolutions and a branch with a ReLU in the Fourier domain, added to the input.

    Args:
        in_channels: C ≥ 1.
        out_channels: None or C.
        kernel_size: of both convolutions, odd.
        stride, dilation, groups: 1.
        padding: "same".
        bias: in both convolutions; published: none.
        form: "real" (the first version's branch) or "complex".
        conv: "plain" or "doconv" (:class:`torchconv.ops.deeprftv2_doconv.DOConv`); "real" only.
        expansion: hidden width of the branch over C, or over 2C in the "real" form.
        window_size, spectral_bias: of the "complex" branch, see :class:`ComplexSpectral`.
        norm: of the transforms.
        activation: in the branch.

    Shape:
        (N, C, \\*spatial) → the same, any sizes.

    Raises:
        ValueError: an argument is out of range or not supported; the message names it.

    Example:
        >>> ResFFTConv2d(4)(torch.randn(2, 4, 9, 7)).shape
        torch.Size([2, 4, 9, 7])

    Reference: Mao et al., arXiv 2111.11745.
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
        bias: bool = False,
        *,
        form: str = "real",
        conv: str = "plain",
        expansion: float = 1,
        window_size: int | None = None,
        spectral_bias: bool = False,
        norm: str = "backward",
        activation: str = "relu",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_positive("in_channels", in_channels)
        remedy = f"{name} adds its input ({in_channels} channels); follow it with a 1×1 convolution to change them"
        check(out_channels in (None, in_channels), "out_channels", out_channels, remedy)
        sizes = ntuple("kernel_size", kernel_size, self.ndim)
        check_odd(sizes, name)
        check_unit("stride", stride, self.ndim, name, "follow it with a strided convolution")
        check_unit("dilation", dilation, self.ndim, name, "it sees the whole map anyway")
        check(groups == 1, "groups", groups, f"{name} mixes all channels; leave groups at 1")
        check_same(padding, sizes, name)
        check_choice("form", form, ("real", "complex"))
        check_choice("conv", conv, CONVS)
        check_choice("norm", norm, NORMS)
        check_choice("activation", activation, ACTIVATIONS)
        real = form == "real"
        check(real or conv == "plain", "conv", conv, "is for the 'real' form")
        check(not real or window_size is None, "window_size", window_size, "is for the 'complex' form")
        check(not real or not spectral_bias, "spectral_bias", spectral_bias, "is for the 'complex' form")
        self.in_channels = self.out_channels = in_channels
        self.kernel_size, self.form = sizes, form
        options: dict[str, Any] = {"device": device, "dtype": dtype}

        def make(ins: int, outs: int, size: Any, offset: bool) -> nn.Module:
            if conv == "doconv":
                layer: nn.Module = _DOCONV[self.ndim](ins, outs, size, bias=offset, **options)
                return layer
            pads = [k // 2 for k in size]
            layer = CONV[self.ndim](ins, outs, size, padding=pads, bias=offset, **options)
            return layer

        first, second = (make(in_channels, in_channels, sizes, bias) for _ in range(2))
        self.main: nn.Module
        self.main_fft: nn.Module
        if real:
            hidden = _hidden(2 * in_channels, expansion)
            check(hidden >= 1, "expansion", expansion, "leaves no hidden channel")
            one = (1,) * self.ndim
            pointwise = [make(2 * in_channels, hidden, one, False), make(hidden, 2 * in_channels, one, False)]
            self.main = nn.ModuleList([_Named(first), _Named(second)])
            self.main_fft = RealSpectral([_Named(layer) for layer in pointwise], norm, activation)
        else:
            self.main = _Pair(first, second)
            spectral = (in_channels, expansion, window_size, spectral_bias, norm, activation)
            self.main_fft = ComplexSpectral(*spectral, ndim=self.ndim, **options)

    def _convs(self) -> list[Any]:
        main: Any = self.main
        return [main[0].main[0], main[1].main[0]] if self.form == "real" else [main.conv1, main.conv2]

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``x``."""
        check_input(x, self.in_channels, self.ndim)
        first, second = (layer if isinstance(layer, _DOCONV) else _Applied(layer) for layer in self._convs())
        y = second(F.relu(first(x)))
        spectral: Tensor = self.main_fft(x)
        total: Tensor = x + y + spectral
        if not x.is_contiguous() and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            return total.contiguous(memory_format=torch.channels_last)
        return total

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"{self.in_channels}, kernel_size={self.kernel_size}, form={self.form!r}"


class _Applied:
    """A plain convolution, computed by the library's kernels."""

    def __init__(self, conv: Any) -> None:
        self.conv = conv

    def __call__(self, x: Tensor) -> Tensor:
        return apply_conv(self.conv, x)


class ResFFTConv1d(ResFFTConv):
    """Res-FFT-ReLU block over (N, C, L)."""

    ndim = 1


class ResFFTConv2d(ResFFTConv):
    """Res-FFT-ReLU block over (N, C, H, W)."""

    ndim = 2


class ResFFTConv3d(ResFFTConv):
    """Res-FFT-ReLU block over (N, C, D, H, W)."""

    ndim = 3
