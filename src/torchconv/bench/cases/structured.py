"""Operators with structure: mixed, factored, parallel, gated, resampling and order-theoretic convolutions."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchconv.bench.cases import Case, Place, case
from torchconv.kernels import adaptive_downscale
from torchconv.ops.apriori import APrioriConv2d
from torchconv.ops.espcn import SubpixelConv2d
from torchconv.ops.p3d import P3DConv3d
from torchconv.ops.posetfilters import poset_filter
from torchconv.ops.puyun import LKA2d
from torchconv.ops.scalecrafter import ReDilatedConv2d
from torchconv.ops.scalecrafter_dispersed import DispersedConv2d
from torchconv.ops.shallow import ParallelResidual2d
from torchconv.ops.snnk import SNNKLinear
from torchconv.ops.snnk_conv import SNNKConv2d
from torchconv.ops.tunable import TunableConv2d
from torchconv.theory.posets import Poset


@case("tunable")
def tunable(place: Place) -> Iterator[Case]:
    """A tuning vector for each image: one grouped convolution against one convolution an image."""
    layer = place.put(TunableConv2d(32, 32, 3, num_params=3))
    x, omega = place.randn(8, 32, 32, 32), place.randn(8, 3).softmax(1)

    def eager(x: Tensor, omega: Tensor) -> Tensor:
        mixing = layer.mixing(omega, len(x))
        kernels = torch.einsum("bn,n...->b...", mixing, layer.weight[0])
        biases = mixing @ layer.bias[0]
        return torch.cat([F.conv2d(i[None], k, b, padding=1) for i, k, b in zip(x, kernels, biases, strict=True)])

    yield Case("8×32×32² k=3 N=3", layer, (x, omega), eager, params=tuple(layer.parameters()))


@case("shallow")
def shallow(place: Place) -> Iterator[Case]:
    """Four residual layers side by side: one wide convolution against one after another."""
    layer = place.put(ParallelResidual2d(32, kernel_size=3, n_layers=4))
    x = place.randn(8, 32, 28, 28)

    def eager(x: Tensor) -> Tensor:
        weights, biases = layer._tensors()
        return x + sum(
            (F.relu(F.conv2d(x, w, b, padding=1)) for w, b in zip(weights, biases, strict=True)), torch.zeros_like(x)
        )

    yield Case("8×32×28² k=3 n=4", layer, (x,), eager, params=tuple(layer.parameters()))


@case("apriori")
def apriori(place: Place) -> Iterator[Case]:
    """Factored kernels against the dense kernel multiplied out for each call."""
    for form in ("sequential", "per_pair"):
        layer = place.put(APrioriConv2d(32, 32, 5, form=form))
        x = place.randn(4, 32, 32, 32)

        def eager(x: Tensor, layer: Any = layer) -> Tensor:
            return F.conv2d(x, layer.kernel(), layer.bias, padding=2)

        yield Case(f"4×32×32² k=5 {form}", layer, (x,), eager, params=tuple(layer.parameters()))


@case("posetfilters")
def posets(place: Place) -> Iterator[Case]:
    """Poset pooling of 2 × 2 blocks against all up-sets' sums, stacked."""
    for name in (12, 13):
        poset = Poset.named(name)
        members = torch.tensor([[(mask >> i) & 1 for i in range(4)] for mask in poset.upsets()])
        x = place.randn(8, 32, 56, 56)

        def ours(x: Tensor, poset: Poset = poset) -> Tensor:
            return poset_filter(x, poset)

        def eager(x: Tensor, members: Tensor = members) -> Tensor:
            blocks = F.pixel_unshuffle(x, 2).unflatten(1, (x.shape[1], 4))
            sums = torch.einsum("bckhw,uk->bcuhw", blocks, members.to(x))
            return sums.amax(2)

        yield Case(f"8×32×56² poset {name}", ours, (x,), eager)
    peers: dict[str, Any] = {"F.max_pool2d": partial(F.max_pool2d, kernel_size=2)}
    yield Case("8×32×56² poset 13, a relative", partial(poset_filter, poset=13), (x,), None, peers, alike=False)


@case("lka")
def lka(place: Place) -> Iterator[Case]:
    """Large kernel attention against the three ``F.conv2d`` calls and the product."""
    for channels, size in ((64, 56), (256, 14)):
        layer = place.put(LKA2d(channels))
        x = place.randn(4, channels, size, size)

        def eager(x: Tensor, layer: Any = layer) -> Tensor:
            a, b, c = layer.conv0, layer.conv_spatial, layer.conv1
            y = F.conv2d(x, a.weight, a.bias, padding=2, groups=x.shape[1])
            y = F.conv2d(y, b.weight, b.bias, padding=9, dilation=3, groups=x.shape[1])
            return x * F.conv2d(y, c.weight, c.bias)

        yield Case(f"4×{channels}×{size}² K=21", layer, (x,), eager, params=tuple(layer.parameters()))


@case("subpixel")
def subpixel(place: Place) -> Iterator[Case]:
    """Sub-pixel convolution against the transposed convolution that equals it."""
    layer = place.put(SubpixelConv2d(32, 3, 3, 3, bias=False))
    merged: Any = layer.merge()
    x = place.randn(2, 32, 64, 64)

    def eager(x: Tensor) -> Tensor:
        return F.pixel_shuffle(F.conv2d(x, layer.weight, padding=1), 3)

    yield Case("2×32×64² r=3", layer, (x,), eager, {"transposed convolution": merged}, tuple(layer.parameters()))


@case("p3d")
def p3d(place: Place) -> Iterator[Case]:
    """Pseudo-3-D convolution; the 3 × 3 × 3 convolution in whose place it stands is a relative, not an equal."""
    layer = place.put(P3DConv3d(32, 32, 3))
    x = place.randn(2, 32, 8, 28, 28)
    full = place.put(torch.nn.Conv3d(32, 32, 3, padding=1))

    def eager(x: Tensor) -> Tensor:
        y = F.conv3d(x, layer.space.weight, layer.space.bias, padding=(0, 1, 1))
        return F.conv3d(y, layer.time.weight, layer.bias, padding=(1, 0, 0))

    params = tuple(layer.parameters())
    yield Case("2×32×8×28²", layer, (x,), eager, params=params)
    yield Case("2×32×8×28² (Conv3d)", layer, (x,), None, {"nn.Conv3d": full}, params, alike=False)


@case("redilated")
def redilated(place: Place) -> Iterator[Case]:
    """Re-dilation by a fraction against resizing the map, the whole-number dilation, and resizing back."""
    layer = place.put(ReDilatedConv2d(32, 32, 3, factor=1.5))
    x = place.randn(2, 32, 32, 32)

    def eager(x: Tensor) -> Tensor:
        grown = [round(n * 2 / 1.5) for n in x.shape[2:]]
        y = F.conv2d(F.interpolate(x, grown, mode="bilinear"), layer.weight, layer.bias, padding=2, dilation=2)
        return F.interpolate(y, x.shape[2:], mode="bilinear")

    yield Case("2×32×32² factor 1.5", layer, (x,), eager, params=tuple(layer.parameters()))


@case("dispersed")
def dispersed(place: Place) -> Iterator[Case]:
    """A kernel enlarged in each call against the same written out; the 3 × 3 convolution is a relative."""
    layer = place.put(DispersedConv2d(32, 32, 3))
    small = place.put(torch.nn.Conv2d(32, 32, 3, padding=1))
    x = place.randn(2, 32, 32, 32)
    matrix = layer.matrix.to(x)

    def eager(x: Tensor) -> Tensor:
        kernels = torch.einsum("lk,oik->oil", matrix, layer.weight.flatten(2)).unflatten(2, (5, 5))
        return F.conv2d(x, kernels, layer.bias, padding=2)

    yield Case("2×32×32² 3 → 5", layer, (x,), eager, params=tuple(layer.parameters()))
    yield Case("2×32×32² 3 → 5 (3 × 3)", layer, (x,), None, {"nn.Conv2d": small}, backward=False, alike=False)


@case("adaptive-downscale")
def downscale(place: Place) -> Iterator[Case]:
    """A kernel for every output pixel and colour, against ``F.unfold``."""
    x, kernels = place.randn(2, 3, 128, 128), place.randn(2, 3, 49, 64, 64)

    def ours(x: Tensor, kernels: Tensor) -> Tensor:
        return adaptive_downscale(x, kernels, 2, 7)

    def eager(x: Tensor, kernels: Tensor) -> Tensor:
        before, after = (7 - 2) // 2, 7 - 2 - (7 - 2) // 2
        padded = F.pad(x, (before, after, before, after), mode="reflect")
        patches = F.unfold(padded, 7, stride=2).reshape(2, 3, 49, 64, 64)
        return (patches * kernels.softmax(2)).sum(2)

    yield Case("2×3×128² s=2 k=7", ours, (x, kernels), eager, alike=False)


@case("snnk")
def snnk_conv(place: Place) -> Iterator[Case]:
    """Random features of every patch; a convolution and its ReLU is what it stands for."""
    layer = place.put(SNNKConv2d(32, 32, 3, num_features=32))
    dense = place.put(torch.nn.Sequential(torch.nn.Conv2d(32, 32, 3, padding=1), torch.nn.ReLU()))
    x = place.randn(4, 32, 32, 32)

    def eager(x: Tensor) -> Tensor:
        z = F.conv2d(x, layer.projection_matrix, layer.projection_offset, padding=1)
        return F.conv2d(z.clamp(min=0) / layer.num_features**0.5, layer.weights[:, :, None, None])

    params = tuple(layer.parameters())
    yield Case("4×32×32² k=3 m=32", layer, (x,), eager, params=params)
    yield Case("4×32×32² k=3 m=32 (dense)", layer, (x,), None, {"convolution + ReLU": dense}, params, alike=False)


@case("snnk-linear")
def snnk(place: Place) -> Iterator[Case]:
    """A feed-forward layer through random features; the dense layer and ReLU is what it stands for."""
    layer = place.put(SNNKLinear(768, 768, 32))
    dense = place.put(torch.nn.Sequential(torch.nn.Linear(768, 768), torch.nn.ReLU()))
    x = place.randn(64, 768)
    peers = {"linear + ReLU": dense}
    yield Case("64×768 m=32", layer, (x,), None, peers, tuple(layer.parameters()), alike=False)
