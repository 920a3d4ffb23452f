"""Convolutions of maps: depthwise kernels, and the operators whose kernels are built, merged or made from the input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchconv.bench.cases import Case, Place, case, installed
from torchconv.kernels import adaptive_conv2d, depthwise_conv1d, depthwise_conv2d, depthwise_conv3d
from torchconv.ops.atconv import ATConv2d
from torchconv.ops.dcls import DCLSConv2d
from torchconv.ops.eca import ECA
from torchconv.ops.inceptionnext import InceptionDWConv2d
from torchconv.ops.lsnet import LSConv2d
from torchconv.ops.unireplknet import DilatedReparamConv2d
from torchconv.ops.weightedconv import WeightedConv2d


@case("depthwise_conv")
def depthwise(place: Place) -> Iterator[Case]:
    """Large kernels against ``F.convNd`` with as many groups as channels."""
    by_ndim: dict[int, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
        1: (depthwise_conv1d, F.conv1d),
        2: (depthwise_conv2d, F.conv2d),
        3: (depthwise_conv3d, F.conv3d),
    }
    shapes: list[tuple[int, int, tuple[int, ...], int]] = [(4, 96, (56, 56), k) for k in (3, 7, 13, 31)]
    shapes += [(4, 384, (14, 14), 7), (4, 384, (14, 14), 13), (8, 64, (4096,), 31), (2, 32, (16, 16, 16), 7)]
    for batch, channels, size, k in shapes:
        ours, native = by_ndim[len(size)]
        x, w = place.randn(batch, channels, *size), place.randn(channels, 1, *[k] * len(size), scale=1 / k)
        label = f"{batch}×{channels}×{'×'.join(map(str, size))} k={k}"

        def run(x: Tensor, w: Tensor, k: int = k, ours: Any = ours) -> Tensor:
            y: Tensor = ours(x, w, padding=k // 2)
            return y

        def eager(x: Tensor, w: Tensor, k: int = k, native: Any = native) -> Tensor:
            y: Tensor = native(x, w, padding=k // 2, groups=w.shape[0])
            return y

        yield Case(label, run, (x, w), eager)


@case("dcls")
def dcls(place: Place) -> Iterator[Case]:
    """Kernel construction and convolution; the peer is the authors' package."""
    for channels, size, kernel, count in ((96, 28, 17, 34), (64, 56, 7, 5)):
        layer = place.put(
            DCLSConv2d(channels, channels, kernel, padding="same", groups=channels, kernel_count=count, version="v1")
        )
        x = place.randn(4, channels, size, size)

        def eager(x: Tensor, layer: Any = layer) -> Tensor:
            """Each weight spread over its four neighbours, one position at a time over the whole grid."""
            s = layer.size[0]
            grid = torch.arange(s, device=x.device, dtype=x.dtype)
            rows, columns = ((1 - (grid - (p + s // 2).unsqueeze(-1)).abs()).relu() for p in layer.P)
            windows = rows.unsqueeze(-1) * columns.unsqueeze(-2)
            windows = windows / (windows.sum((-1, -2), keepdim=True) + 1e-7)
            kernel = (layer.weight[..., None, None] * windows).sum(2)
            return F.conv2d(x, kernel, layer.bias, padding=s // 2, groups=layer.groups)

        peers: dict[str, Callable[..., Tensor]] = {}
        if installed("DCLS"):
            from DCLS.construct.modules import Dcls2d

            official = Dcls2d(
                channels,
                channels,
                count,
                dilated_kernel_size=kernel,
                padding=kernel // 2,
                groups=channels,
                version="v1",
            )
            place.put(official)
            with torch.no_grad():
                official.weight.copy_(layer.weight)
                official.bias.copy_(layer.bias)
                official.P.copy_(layer.P.flip(0) if layer.axis_order == "spatial" else layer.P)
            peers["dcls (PyPI)"] = official
        params = (layer.weight, layer.P, layer.bias)
        yield Case(f"4×{channels}×{size}² S={kernel} m={count}", layer, (x,), eager, peers, params)


@case("inceptionnext")
def inceptionnext(place: Place) -> Iterator[Case]:
    """Inception depthwise; the peer is timm's module."""
    for channels, size in ((96, 56), (384, 14)):
        layer = place.put(InceptionDWConv2d(channels))
        convs = [getattr(layer, name) for name in layer.names]
        x = place.randn(4, channels, size, size)

        def eager(x: Tensor, convs: Any = convs) -> Tensor:
            widths = [c.weight.shape[0] for c in convs]
            passed, *pieces = x.split([x.shape[1] - sum(widths), *widths], 1)
            outputs = [
                F.conv2d(p, c.weight, c.bias, padding=tuple(k // 2 for k in c.kernel_size), groups=p.shape[1])
                for p, c in zip(pieces, convs, strict=True)
            ]
            return torch.cat([passed, *outputs], 1)

        peers: dict[str, Callable[..., Tensor]] = {}
        if installed("timm"):
            from timm.models.inception_next import InceptionDWConv2d as Theirs

            theirs = place.put(Theirs(channels))
            theirs.load_state_dict(layer.state_dict())
            peers["timm"] = theirs
        yield Case(f"4×{channels}×{size}²", layer, (x,), eager, peers, tuple(layer.parameters()))


@case("unireplknet")
def unireplknet(place: Place) -> Iterator[Case]:
    """Dilated reparametrisation with fixed statistics: the branches one by one are what the authors' code does."""
    for channels, size, kernel in ((96, 56, 13), (384, 14, 13)):
        layer = place.put(DilatedReparamConv2d(channels, kernel_size=kernel))
        x = place.randn(4, channels, size, size)

        def eager(x: Tensor, layer: Any = layer) -> Tensor:
            return sum((bn(conv(x)) for conv, bn in layer.pairs()), torch.zeros((), device=x.device, dtype=x.dtype))

        yield Case(f"4×{channels}×{size}² k={kernel}", layer, (x,), eager, params=tuple(layer.parameters()))


@case("lsnet")
def lsnet(place: Place) -> Iterator[Case]:
    """LS convolution with its aggregation written with ``F.unfold``, as usual without a custom kernel."""
    for channels, size in ((64, 56), (192, 14)):
        layer = place.put(LSConv2d(channels))
        x = place.randn(4, channels, size, size)

        def eager(x: Tensor, layer: Any = layer) -> Tensor:
            return layer.bn(unfolded(x, layer.lkp(x))) + x

        yield Case(f"4×{channels}×{size}²", layer, (x,), eager, params=tuple(layer.parameters()))


@case("adaptive-conv")
def adaptive(place: Place) -> Iterator[Case]:
    """A kernel of its own at every position, against ``F.unfold``."""
    for channels, groups, size in ((64, 8, 56), (192, 24, 14)):
        x, w = place.randn(4, channels, size, size), place.randn(4, groups, 9, size, size)
        yield Case(f"4×{channels}×{size}² k=3", adaptive_conv2d, (x, w), unfolded)


def unfolded(x: Tensor, w: Tensor) -> Tensor:
    """The aggregation through a tensor of all neighbourhoods."""
    n, c, h, width = x.shape
    taps = w.shape[2]
    k = round(taps**0.5)
    patches = F.unfold(x, k, padding=k // 2).reshape(n, c // w.shape[1], w.shape[1], taps, h, width)
    return (patches * w.unsqueeze(1)).sum(3).reshape(n, c, h, width)


@case("atconv")
def atconv(place: Place) -> Iterator[Case]:
    """Attentive convolution as published: the projection of the whole map, then the pooling."""
    for channels, size in ((64, 56), (192, 14)):
        layer = place.put(ATConv2d(channels, kernel_size=3))
        x = place.randn(4, channels, size, size)

        def eager(x: Tensor, layer: Any = layer) -> Tensor:
            n, c = x.shape[:2]
            pooled = F.adaptive_avg_pool1d(layer.kernel_proj(x).flatten(2), 9)
            kernels = layer.kernel_gen(F.gelu(pooled))
            kernels = kernels - layer.difference_control.sigmoid()[:, None] * kernels.mean(2, keepdim=True)
            v = layer.x_proj(x).reshape(1, n * c, *x.shape[2:])
            o = F.conv2d(v, kernels.reshape(n * c, 1, 3, 3), padding=1, groups=n * c)
            y: Tensor = layer.proj(o.reshape(x.shape))
            return y

        yield Case(f"4×{channels}×{size}² k=3", layer, (x,), eager, params=tuple(layer.parameters()))


@case("eca-gate")
def eca(place: Place) -> Iterator[Case]:
    """Efficient channel attention; the peer is timm's module."""
    for channels, size in ((256, 56), (1024, 14)):
        layer = place.put(ECA(channels))
        x = place.randn(4, channels, size, size)
        weight = layer.conv.weight

        def eager(x: Tensor, weight: Any = weight) -> Tensor:
            y = F.adaptive_avg_pool2d(x, 1).flatten(2).transpose(1, 2)
            gate = F.conv1d(y, weight, padding=weight.shape[-1] // 2).transpose(1, 2).unsqueeze(-1)
            return x * gate.sigmoid()

        peers: dict[str, Callable[..., Tensor]] = {}
        if installed("timm"):
            from timm.layers import EcaModule

            theirs = place.put(EcaModule(kernel_size=weight.shape[-1]))
            theirs.conv.load_state_dict({"weight": weight.detach()})
            peers["timm"] = theirs
        yield Case(f"4×{channels}×{size}²", layer, (x,), eager, peers, tuple(layer.parameters()))


@case("weightedconv")
def weightedconv(place: Place) -> Iterator[Case]:
    """The density times the kernel, then a dense convolution."""
    layer = place.put(WeightedConv2d(64, 64, 5, padding="same"))
    x = place.randn(4, 64, 28, 28)

    def eager(x: Tensor) -> Tensor:
        return F.conv2d(x, layer.weight * layer.Phi, layer.bias, padding=2)

    yield Case("4×64×28² k=5", layer, (x,), eager, params=tuple(layer.parameters()))
