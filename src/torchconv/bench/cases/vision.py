"""Parts of networks for dense prediction and restoration: sampling, several kernel sizes, spectra, folded branches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchconv.bench.cases import Case, Place, case, installed
from torchconv.kernels.deform import deformable_sum
from torchconv.ops.deeprftv2 import ResFFTConv2d
from torchconv.ops.deeprftv2_doconv import DOConv2d
from torchconv.ops.deeprftv2_kernel import FourierKernelEstimator
from torchconv.ops.dfyp import SCHARR, SOBEL, EdgeOperator
from torchconv.ops.hrvmamba import MultiKernelDWConv2d
from torchconv.ops.hrvmamba_dcn import DCNv4Conv2d
from torchconv.ops.mhafyolo_blocks import RepHDW2d, RepHMS2d


def sampled(x: Tensor, positions: Tensor, masks: Tensor) -> Tensor:
    """All taps sampled at once, then weighted and summed."""
    n, groups, taps, height, width = masks.shape
    size = torch.tensor([x.shape[3], x.shape[2]], dtype=x.dtype, device=x.device)
    grid = ((2 * positions + 1) / size - 1).reshape(n * groups, taps * height, width, 2)
    maps = x.reshape(n * groups, -1, *x.shape[2:])
    found = F.grid_sample(maps, grid, align_corners=False).unflatten(2, (taps, height))
    return (found * masks.reshape(n * groups, 1, taps, height, width)).sum(2).reshape(n, -1, height, width)


@case("deformable-sum")
def deformable(place: Place) -> Iterator[Case]:
    """Sampling and summing against ``F.grid_sample`` of all taps at once, and torchvision's deformable convolution."""
    for channels, groups, size in ((64, 4, 40), (256, 8, 14)):
        x = place.randn(2, channels, size, size)
        offsets, masks = place.randn(2, groups, 9, size, size, 2), place.randn(2, groups, 9, size, size)
        index = torch.arange(float(size)).to(x)
        centre = torch.stack([index.expand(size, size), index[:, None].expand(size, size)], -1)
        tap = torch.arange(9).to(x)
        base = centre + torch.stack([tap % 3 - 1, tap // 3 - 1], -1)[:, None, None]
        peers: dict[str, Callable[..., Tensor]] = {}
        if installed("torchvision"):
            from torchvision.ops import deform_conv2d

            ones = x.new_ones(channels, 1, 3, 3)

            def theirs(x: Tensor, positions: Tensor, masks: Tensor, base: Any = base, ones: Any = ones) -> Tensor:
                moved = (positions - base).flip(-1).movedim(-1, 3).flatten(1, 3)  # rows first, a tap after the other
                y: Tensor = deform_conv2d(x, moved, ones, padding=1, mask=masks.flatten(1, 2))
                return y

            peers["torchvision"] = theirs
        yield Case(f"2×{channels}×{size}² K=9 G={groups}", deformable_sum, (x, base + offsets, masks), sampled, peers)


@case("dcnv4")
def dcnv4(place: Place) -> Iterator[Case]:
    """The operator with its linear map; sampling and summing by torchvision's convolution with weights of one."""
    groups = 4
    layer = place.put(DCNv4Conv2d(64, offset_groups=groups))
    x = place.randn(2, 64, 40, 40)
    peers: dict[str, Callable[..., Tensor]] = {}
    if installed("torchvision"):
        from torchvision.ops import deform_conv2d

        ones = x.new_ones(64, 1, 3, 3)

        def theirs(x: Tensor) -> Tensor:
            entries = layer.offset_mask(x.permute(0, 2, 3, 1))[..., : 27 * groups].permute(0, 3, 1, 2)
            moves, masks = entries.unflatten(1, (groups, 27)).split((18, 9), 2)
            by_rows = moves.unflatten(2, (3, 3, 2)).transpose(2, 3).flip(4)  # its taps go along the rows, ours down
            masks = masks.unflatten(2, (3, 3)).transpose(2, 3).flatten(1, 3)
            y: Tensor = deform_conv2d(x, by_rows.flatten(1, 4), ones, padding=1, mask=masks)
            return y

        peers["torchvision"] = theirs
    yield Case(f"2×64×40² k=3 G={groups}", layer, (x,), None, peers, tuple(layer.parameters()))


@case("multikernel-dw")
def multikernel(place: Place) -> Iterator[Case]:
    """Depthwise kernels of 3 to 9 over parts of the channels, one after another; the peer is timm's module."""
    for channels, size in ((64, 56), (256, 14)):
        layer = place.put(MultiKernelDWConv2d(channels, kernel_size=9))
        convs = list(layer.children())
        x = place.randn(4, channels, size, size)

        def eager(x: Tensor, convs: Any = convs) -> Tensor:
            pieces = x.split([c.weight.shape[0] for c in convs], 1)
            outputs = [
                F.conv2d(p, c.weight, c.bias, padding=c.weight.shape[2] // 2, groups=p.shape[1])
                for p, c in zip(pieces, convs, strict=True)
            ]
            return torch.cat(outputs, 1)

        peers: dict[str, Callable[..., Tensor]] = {}
        if installed("timm"):
            from timm.layers import MixedConv2d

            theirs = place.put(MixedConv2d(channels, channels, [3, 5, 7, 9], depthwise=True, bias=True))
            theirs.load_state_dict(layer.state_dict())
            peers["timm"] = theirs
        yield Case(f"4×{channels}×{size}² k=3…9", layer, (x,), eager, peers, tuple(layer.parameters()))


@case("doconv")
def doconv(place: Place) -> Iterator[Case]:
    """The folded kernel, then one convolution; as published, and as the layer's first step says it: two convolutions.

    A depthwise convolution with T outputs for each channel, then a linear map over them.
    """
    layer = place.put(DOConv2d(64, 64, 3))
    with torch.no_grad():
        layer.D.normal_(std=0.1)
    x = place.randn(4, 64, 32, 32)

    def eager(x: Tensor) -> Tensor:
        first = (layer.D + layer.D_diag).transpose(1, 2).reshape(64 * 9, 1, 3, 3)
        return F.conv2d(F.conv2d(x, first, padding=1, groups=64), layer.W.reshape(64, -1, 1, 1), layer.bias)

    def published(x: Tensor) -> Tensor:
        kernel = torch.einsum("ims,ois->oim", layer.D + layer.D_diag, layer.W).reshape(64, 64, 3, 3)
        return F.conv2d(x, kernel, layer.bias, padding=1)

    peers: dict[str, Callable[..., Tensor]] = {"folded, as published": published, "merged": place.put(layer.merge())}
    yield Case("4×64×32² k=3", layer, (x,), eager, peers, tuple(layer.parameters()))


@case("res-fft-relu")
def res_fft(place: Place) -> Iterator[Case]:
    """Both forms of the block as published: transforms, 1 × 1 convolutions or complex matrices, transforms back."""
    x = place.randn(2, 32, 64, 64)
    real = place.put(ResFFTConv2d(32))
    complexes = place.put(ResFFTConv2d(32, form="complex"))

    def residual(x: Tensor, first: Any, second: Any) -> Tensor:
        y = F.relu(F.conv2d(x, first.weight, first.bias, padding=1))
        return x + F.conv2d(y, second.weight, second.bias, padding=1)

    def eager_real(x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(x)
        y = torch.cat([spectrum.real, spectrum.imag], 1)
        first, second = (step.main[0] for step in real.main_fft)
        y = F.conv2d(F.relu(F.conv2d(y, first.weight)), second.weight)
        y = torch.fft.irfft2(torch.complex(*y.chunk(2, 1)), s=x.shape[2:])
        return residual(x, real.main[0].main[0], real.main[1].main[0]) + y

    def eager_complex(x: Tensor) -> Tensor:
        branch = complexes.main_fft
        w1, w2 = (
            torch.complex(getattr(branch, f"complex_weight{i}_real"), getattr(branch, f"complex_weight{i}_imag"))
            for i in (1, 2)
        )
        y = torch.fft.rfft2(x).permute(0, 2, 3, 1) @ w1
        y = torch.complex(F.relu(y.real), F.relu(y.imag)) @ w2
        y = torch.fft.irfft2(y.permute(0, 3, 1, 2), s=x.shape[2:])
        return residual(x, complexes.main.conv1, complexes.main.conv2) + y

    yield Case("2×32×64² real", real, (x,), eager_real, params=tuple(real.parameters()))
    yield Case("2×32×64² complex", complexes, (x,), eager_complex, params=tuple(complexes.parameters()))


@case("fourier-kernel-estimator")
def estimator(place: Place) -> Iterator[Case]:
    """The first stage, whose states are empty, in plain modules: transforms apart, four blocks, a product."""
    layer = place.put(FourierKernelEstimator(16))
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith(("beta", "gamma")):  # at zero, blocks would be the identity
                parameter.normal_(std=0.3)
    feature, image = place.randn(1, 16, 64, 64), place.randn(1, 3, 64, 64)

    def ours(feature: Tensor, image: Tensor) -> Tensor:
        g, sharp, *_ = layer(feature, image)
        return torch.cat([g, sharp], 1)

    def norm(layer: Any, x: Tensor) -> Tensor:
        y = F.layer_norm(x.permute(0, 2, 3, 1), layer.normalized_shape, layer.weight, layer.bias, layer.eps)
        return y.permute(0, 3, 1, 2)

    def block(b: Any, x: Tensor) -> Tensor:
        y, z = b.conv2(b.conv1(norm(b.norm1, x))).chunk(2, 1)
        y = y * z
        x = x + b.beta * b.conv3(y * b.sca(y))
        y, z = b.conv4(norm(b.norm2, x)).chunk(2, 1)
        return x + b.gamma * b.conv5(y * z)

    def eager(feature: Tensor, image: Tensor) -> Tensor:
        seen = torch.fft.rfft2(layer.feature_extract["intro_inp"](feature))
        k = layer.intro["ending"](torch.cat([seen.real, seen.imag], 1))
        for i in range(4):
            k = block(layer.subnets_ker.get_submodule(f"level{i}").blocks[0], k)
        k = layer.end_ker1["ending"](norm(layer.end_ker1["norm"], k))
        spectrum = torch.fft.rfft2(layer.feature_extract["intro_deconv"](feature))
        z = torch.fft.irfft2(spectrum * torch.complex(*k.chunk(2, 1)), s=feature.shape[2:])
        g = layer.deblur_feature1(torch.cat([z, feature], 1))
        return torch.cat([g, layer.end_feature1(g) + image], 1)

    yield Case("1×16×64²", ours, (feature, image), eager, params=tuple(layer.parameters()))


def _conv_bn(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.act(m.bn(m.conv(x)))
    return y


def _branches(m: Any, x: Tensor) -> Tensor:
    """Branch by branch, as the authors run it before folding."""
    total = torch.stack([bn(conv(x)) for conv, bn in m.dwconv.pairs()]).sum(0)
    y: Tensor = m.norm(total)
    return y


def _bottleneck(b: Any, x: Tensor) -> Tensor:
    y = _conv_bn(b.one_conv, F.silu(_branches(b.conv2, _conv_bn(b.conv1, x))))
    return y if b.conv3 is None else _conv_bn(b.one_conv2, F.silu(_branches(b.conv3, y)))


@case("rephms")
def rephms(place: Place) -> Iterator[Case]:
    """The block with fixed statistics, folded on the way, against all branches in plain modules; and merged."""
    layer = place.put(RepHMS2d(64, kernel_size=7))
    x = place.randn(2, 64, 40, 40)

    def eager(x: Tensor) -> Tensor:
        chunks = _conv_bn(layer.conv1, x).chunk(3, 1)
        first = _bottleneck(layer.RepElanMSBlock[0][0], chunks[1] + chunks[0])
        second = _bottleneck(layer.RepElanMSBlock[1][0], chunks[2] + first)
        return _conv_bn(layer.conv2, torch.cat([chunks[0], first, second], 1))

    yield Case("2×64×40² k=7", layer, (x,), eager, {"merged": place.put(layer.merge())}, tuple(layer.parameters()))


@case("rephdw")
def rephdw(place: Place) -> Iterator[Case]:
    """The first form of that block, in the same ways."""
    layer = place.put(RepHDW2d(64, kernel_size=7, depth=2))
    x = place.randn(2, 64, 40, 40)

    def eager(x: Tensor) -> Tensor:
        outputs = list(_conv_bn(layer.conv1, x).chunk(2, 1))
        for b in layer.m:
            outputs.append(_bottleneck(b, outputs[-1]))
        return _conv_bn(layer.conv2, torch.cat(outputs, 1))

    yield Case("2×64×40² k=7 n=2", layer, (x,), eager, {"merged": place.put(layer.merge())}, tuple(layer.parameters()))


@case("edge-operator")
def edges(place: Place) -> Iterator[Case]:
    """Gradient magnitudes by two depthwise convolutions and a root."""
    layer = place.put(EdgeOperator("learnable"))
    x = place.randn(8, 9, 96, 96)
    sobel, scharr = (torch.tensor(k).to(x) for k in (SOBEL, SCHARR))

    def eager(x: Tensor) -> Tensor:
        share = torch.sigmoid(layer.alpha)
        kernel = share * sobel + (1 - share) * scharr
        kernel = kernel / kernel.abs().max()
        gx, gy = (F.conv2d(x, k.repeat(9, 1, 1, 1), padding=1, groups=9) for k in (kernel, kernel.T))
        return torch.sqrt(gx**2 + gy**2 + 1e-6) * torch.sigmoid(layer.scale)

    yield Case("8×9×96² learned", layer, (x,), eager, params=tuple(layer.parameters()))
