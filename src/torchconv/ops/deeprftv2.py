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

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive
from torchconv.catalog import part
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
from torchconv.ops._deeprftv2_spectral import (
    ACTIVATIONS,
    NORMS,
    ComplexSpectral,
    RealSpectral,
    complex_spectral_mlp,
    hidden_width,
    spectral_mlp,
)
from torchconv.ops.deeprftv2_doconv import DOConv1d, DOConv2d, DOConv3d

__all__ = [
    "ACTIVATIONS",
    "CONVS",
    "NORMS",
    "ComplexSpectral",
    "RealSpectral",
    "ResFFTConv",
    "ResFFTConv1d",
    "ResFFTConv2d",
    "ResFFTConv3d",
    "complex_spectral_mlp",
    "spectral_mlp",
]

CONVS = ("plain", "doconv")
_DOCONV: tuple[Any, ...] = (nn.Module, DOConv1d, DOConv2d, DOConv3d)


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
            hidden = hidden_width(2 * in_channels, expansion)
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
