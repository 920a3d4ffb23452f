"""Layers of several convolutions: spectral, multi-kernel, atrous pyramids, index pooling, hyper-kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchconv.bench.cases import Case, Place, case
from torchconv.ops.deeplab import ASPP2d
from torchconv.ops.ffdnn import FFC2d
from torchconv.ops.mhafyolo import MultiKernelReparamConv2d
from torchconv.ops.segnet import index_pool, index_unpool
from torchconv.ops.terminator import HyperZZWConv2d, HyperZZWGlobal2d


@case("ffc")
def ffc(place: Place) -> Iterator[Case]:
    """Fast Fourier convolution against its paths one by one; a convolution of the same channels is a relative."""
    layer: Any = place.put(FFC2d(64))
    dense = place.put(torch.nn.Conv2d(64, 64, 3, padding=1))
    x, params = place.randn(4, 64, 32, 32), tuple(layer.parameters())

    def eager(x: Tensor) -> Tensor:
        local, other = x.chunk(2, 1)
        spectral = layer.convg2g
        h = spectral.conv1(other)
        s = torch.fft.rfft2(h, norm="ortho")
        s = torch.stack([s.real, s.imag], 2).flatten(1, 2)
        s = F.relu(spectral.fu.bn(spectral.fu.conv_layer(s)))
        h = h + torch.fft.irfft2(torch.complex(s[:, 0::2], s[:, 1::2]), s=h.shape[2:], norm="ortho")
        y = layer.convl2l(local) + layer.convg2l(other), layer.convl2g(local) + spectral.conv2(h)
        return torch.cat(y, 1)

    yield Case("4×64×32² ratio 0.5", layer, (x,), eager, params=params)
    yield Case("4×64×32² ratio 0.5 (Conv2d)", layer, (x,), None, {"nn.Conv2d": dense}, params, alike=False)


@case("multikernel-reparam")
def multikernel(place: Place) -> Iterator[Case]:
    """With fixed statistics, folded on the way, against the branches one by one; and merged."""
    layer = place.put(MultiKernelReparamConv2d(64, kernel_size=9))
    merged = place.put(layer.merge())
    x = place.randn(4, 64, 40, 40)

    def eager(x: Tensor) -> Tensor:
        y: Tensor = layer.norm(sum(bn(conv(x)) for conv, bn in layer.dwconv.pairs()))
        return y

    yield Case("4×64×40² k=9", layer, (x,), eager, {"merged": merged}, tuple(layer.parameters()))


@case("aspp")
def aspp(place: Place) -> Iterator[Case]:
    """Atrous spatial pyramid pooling; one convolution of the same channels is a relative."""
    layer = place.put(ASPP2d(64, rates=(2, 4, 6, 8)))
    dense = place.put(torch.nn.Conv2d(64, 64, 3, padding=2, dilation=2))
    x, params = place.randn(2, 64, 32, 32), tuple(layer.parameters())
    yield Case("2×64×32² rates 2…8", layer, (x,), None, {"nn.Conv2d d=2": dense}, params, alike=False)


@case("index-pool")
def pooling(place: Place) -> Iterator[Case]:
    """Pooling and unpooling by positions against ``F.max_pool2d`` with indices and ``F.max_unpool2d``."""
    x = place.randn(4, 32, 64, 64)

    def ours(x: Tensor) -> Tensor:
        y, offsets = index_pool(x)
        return index_unpool(y, offsets, x.shape[2:])

    def eager(x: Tensor) -> Tensor:
        y, indices = F.max_pool2d(x, 2, return_indices=True)
        return F.max_unpool2d(y, indices, [2, 2])

    yield Case("4×32×64²", ours, (x,), eager)


@case("terminator")
def terminator(place: Place) -> Iterator[Case]:
    """The hyper-kernel, generated for each call, against plain calls with the same slow net, and its merged form."""
    layer = place.put(HyperZZWConv2d(32))
    x = place.randn(4, 32, 32, 32)

    def eager(x: Tensor) -> Tensor:
        mixer = layer.channel_mixer
        return F.conv2d(F.conv2d(x, layer.slow_net(x), padding=3, groups=32), mixer.weight, mixer.bias)

    merged = place.put(layer.merge())
    yield Case("4×32×32² k=7", layer, (x,), eager, {"merged": merged}, tuple(layer.parameters()))


@case("terminator-global")
def terminator_global(place: Place) -> Iterator[Case]:
    """Products of planes with an image-sized kernel, against the same as one sum over indices."""
    layer = place.put(HyperZZWGlobal2d(32, kernel_size=32))
    x = place.randn(4, 32, 32, 32)

    def eager(x: Tensor) -> Tensor:
        features = F.instance_norm(layer.channel_mixer(x))
        return torch.einsum("ncit,cit,nctj->ncij", x, layer.slow_net()[0], features)

    yield Case("4×32×32²", layer, (x,), eager, params=tuple(layer.parameters()))
