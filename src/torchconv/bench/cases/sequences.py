"""Sequences: short causal, long and structured kernels, and the selective scan."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchconv.bench.cases import Case, Place, case
from torchconv.kernels import causal_conv1d, long_conv, selective_scan
from torchconv.ops.hrvmamba_scan import SelectiveScan2d
from torchconv.ops.longconv import LongConv1d, LongConvLayer
from torchconv.ops.sgconv import SGConv1d, SGConvLayer


def by_fft(x: Tensor, kernel: Tensor) -> Tensor:
    """Causal convolution with padded transforms of all rows at once."""
    length = x.shape[-1]
    spectrum = torch.fft.rfft(x, 2 * length) * torch.fft.rfft(kernel, 2 * length)
    return torch.fft.irfft(spectrum, 2 * length)[..., :length]


@case("long-conv")
def long(place: Place) -> Iterator[Case]:
    """Kernels as long as the sequence."""
    for batch, channels, length in ((8, 64, 1024), (4, 64, 8192), (1, 16, 65536)):
        x, kernel = place.randn(batch, channels, length), place.randn(channels, length, scale=length**-0.5)
        yield Case(f"{batch}×{channels}×{length}", long_conv, (x, kernel), by_fft)


@case("causal-conv1d")
def causal(place: Place) -> Iterator[Case]:
    """Short depthwise kernels with SiLU, in both layouts."""
    for k, layout in ((4, "BCL"), (4, "BLC")):
        x = place.randn(4, 256, 2048) if layout == "BCL" else place.randn(4, 2048, 256)
        w, b = place.randn(256, k), place.randn(256)

        def ours(x: Tensor, w: Tensor, b: Tensor, layout: Any = layout) -> Tensor:
            y: Tensor = causal_conv1d(x, w, b, "silu", layout=layout)
            return y

        def eager(x: Tensor, w: Tensor, b: Tensor, k: int = k, layout: str = layout) -> Tensor:
            rows = x if layout == "BCL" else x.transpose(1, 2)
            y = F.silu(F.conv1d(rows, w.unsqueeze(1), b, padding=k - 1, groups=len(w))[..., : rows.shape[-1]])
            return y if layout == "BCL" else y.transpose(1, 2)

        yield Case(f"4×256×2048 k={k} {layout}", ours, (x, w, b), eager)


@case("sgconv")
def sgconv(place: Place) -> Iterator[Case]:
    """The structured kernel, assembled for each call, and one FFT convolution."""
    layer = place.put(SGConv1d(64, kernel_size=1023, bias=False))
    yield from _against_fft(place, layer)


@case("longconv")
def longconv(place: Place) -> Iterator[Case]:
    """The squashed kernel and one FFT convolution."""
    layer = place.put(LongConv1d(64, kernel_size=1023, bias=False))
    yield from _against_fft(place, layer)


def _against_fft(place: Place, layer: Any) -> Iterator[Case]:
    x = place.randn(4, 64, 4096)

    def eager(x: Tensor) -> Tensor:
        weight, length = layer.weight(), x.shape[-1]  # a correlation, centred
        taps = weight.shape[-1]
        size = length + taps
        spectrum = torch.fft.rfft(x, size) * torch.fft.rfft(weight[:, 0].flip(-1), size)
        return torch.fft.irfft(spectrum, size)[..., taps // 2 : taps // 2 + length]

    params = tuple(p for p in layer.parameters() if p.requires_grad)
    yield Case("4×64×4096 k=1023", layer, (x,), eager, params=params)


@case("sgconv-layer")
def sgconv_layer(place: Place) -> Iterator[Case]:
    """The authors' layer, causal: kernel, padded transforms, skip, GELU, projection."""
    layer = place.put(SGConvLayer(64, 2048))
    u = place.randn(4, 64, 2048)

    def eager(u: Tensor) -> Tensor:
        y = by_fft(u, layer.kernel(u.shape[-1])[0]) + layer.D[0][:, None] * u
        out: Tensor = layer.output_linear(F.gelu(y))
        return out

    yield Case("4×64×2048", layer, (u,), eager, params=tuple(p for p in layer.parameters() if p.requires_grad))


@case("longconv-layer")
def longconv_layer(place: Place) -> Iterator[Case]:
    """The authors' layer, causal, in the same way."""
    layer = place.put(LongConvLayer(64, 2048, init_std=0.02))
    u = place.randn(4, 64, 2048)

    def eager(u: Tensor) -> Tensor:
        y = by_fft(u, layer.kernel()[0]) + layer.D[0][:, None] * u
        out: Tensor = layer.output_linear(F.gelu(y))
        return out

    yield Case("4×64×2048", layer, (u,), eager, params=tuple(layer.parameters()))


@case("ss2d")
def ss2d(place: Place) -> Iterator[Case]:
    """Four scans over a map between linear maps, against the same with a loop over the positions."""
    layer = place.put(SelectiveScan2d(32))
    loop: Any = copy.deepcopy(layer)
    loop.backend = "reference"
    x = place.randn(2, 32, 16, 16)
    yield Case("2×32×16²", layer, (x,), loop, params=tuple(layer.parameters()))


@case("selective-scan")
def scan(place: Place) -> Iterator[Case]:
    """The selective scan against the recurrence, a step at a time."""
    batch, channels, state, length = 2, 64, 16, 512
    u, delta = place.randn(batch, channels, length), F.softplus(place.randn(batch, channels, length) - 3)
    a = -torch.arange(1.0, state + 1).expand(channels, -1).to(u).contiguous()
    b, c = place.randn(batch, state, length), place.randn(batch, state, length)

    def eager(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        hidden = u.new_zeros(batch, channels, state)
        outputs = []
        for t in range(length):
            d = delta[:, :, t, None]
            hidden = torch.exp(d * a) * hidden + d * u[:, :, t, None] * b[:, None, :, t]
            outputs.append((hidden * c[:, None, :, t]).sum(-1))
        return torch.stack(outputs, -1)

    yield Case(f"{batch}×{channels}×{length} N={state}", selective_scan, (u, delta, a, b, c), eager)
