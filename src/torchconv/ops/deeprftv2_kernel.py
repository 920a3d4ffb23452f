"""Fourier kernel estimator: a network on the spectrum predicts a transfer function and applies it by one product.

Mao, Song, Liu, Li, Wang 2025, "DeepRFTv2: Kernel-level Learning for Image Deblurring", arXiv 2511.21132.

Blur is a convolution, so undoing it is one too, with a kernel as large as the image. A small network sees real and
imaginary parts of the spectrum of a few channels and predicts, for every channel and frequency, a complex factor H:

    H = K([Re F ξ; Im F ξ]),  ξ = W_1 f        z = F⁻¹( F(W_2 f) · H )        g = W_3 [z; f],   image = b + conv(g)

K: 1 × 1 convolution, four levels of NAF blocks with states that are passed from stage to stage
(:mod:`torchconv.ops.deeprftv2_reversible`), 1 × 1 convolution. Two FFTs of w + d channels, 4·levels·(7·w² + 18·w)
multiply-adds a frequency for one NAF block a level; a global kernel at O(N log N).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive
from torchconv.catalog import part
from torchconv.kernels.precision import widen
from torchconv.ops._common import ChannelNorm, apply_conv, check_input
from torchconv.ops.deeprftv2_reversible import MEMORIES, keep_away_from_zero, reversible_column

LEVELS = 4


@part(
    "naf-block",
    paper="deeprftv2",
    kind="layer",
    dims=(2,),
    probe={"build": {"channels": 5}, "inputs": [[2, 5, 6, 7]]},
    keywords="NAFNet nonlinear activation free simple gate channel attention restoration deblurring denoising",
)
class NAFBlock(nn.Module):
    """Residual block without activations: products of channel halves stand for them.

    y = x + β·W₃(SCA(gate(DW₃(W₁ LN x)))), out = y + γ·W₅(gate(W₄ LN y)); gate(a, b) = a ⊙ b, SCA(z) = z ⊙ (W z̄).
    β = γ = 0 at the start: the identity.

    Args:
        channels: C ≥ 1.

    Shape:
        (N, C, H, W) → the same.

    Example:
        >>> x = torch.randn(1, 4, 5, 5)
        >>> torch.equal(NAFBlock(4)(x), x)
        True

    Reference: Chen et al., "Simple Baselines for Image Restoration", arXiv 2204.04676.
    """

    def __init__(self, channels: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        check_positive("channels", channels)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.channels = channels
        self.norm1, self.norm2 = ChannelNorm(channels, eps=1e-6, **options), ChannelNorm(channels, eps=1e-6, **options)
        self.conv1 = nn.Conv2d(channels, 2 * channels, 1, **options)
        self.conv2 = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels, **options)
        self.sca = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, channels, 1, **options))
        self.conv3 = nn.Conv2d(channels, channels, 1, **options)
        self.conv4 = nn.Conv2d(channels, 2 * channels, 1, **options)
        self.conv5 = nn.Conv2d(channels, channels, 1, **options)
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1, **options))
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1, **options))

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``x``."""
        check_input(x, self.channels, 2)
        a, b = apply_conv(self.conv2, self.conv1(self.norm1(x))).chunk(2, 1)
        z = a * b
        y = x + self.beta * self.conv3(z * self.sca(z))
        a, b = self.conv4(self.norm2(y)).chunk(2, 1)
        out: Tensor = y + self.gamma * self.conv5(a * b)
        return out


class _Join(nn.Module):
    """1 × 1 over two maps, under the name ``down.0``."""

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(2 * channels, channels, 1, **options))

    def forward(self, x: Tensor, second: Tensor) -> Tensor:
        y: Tensor = self.down(torch.cat([x, second], 1))
        return y


class _Level(nn.Module):
    """Blocks, on the map below joined with the next level's old state where there is one."""

    def __init__(self, channels: int, blocks: int, joins: bool, **options: Any) -> None:
        super().__init__()
        self.fusion = _Join(channels, **options) if joins else None
        self.blocks = nn.Sequential(*(NAFBlock(channels, **options) for _ in range(blocks)))

    def forward(self, x: Tensor, second: Tensor | None = None) -> Tensor:
        if self.fusion is not None and second is not None:
            x = self.fusion(x, second)
        y: Tensor = self.blocks(x)
        return y


class StateStack(nn.Module):
    """Four levels at one width and resolution whose states c_i ← α_i c_i + L_i(c_{i−1}, old c_{i+1}) are passed on.

    Args:
        channels: width.
        blocks: NAF blocks of each level.
        first: the first stage, whose levels do not look at old states.
        memory: see :func:`torchconv.ops.deeprftv2_reversible.reversible_column`.

    Shape:
        x (N, C, H, W), states four of the same shape → four of the same shape.
    """

    def __init__(
        self, channels: int, blocks: Sequence[int], first: bool, memory: str = "store", **options: Any
    ) -> None:
        super().__init__()
        self.memory = memory
        for i, count in enumerate(blocks):
            alpha = torch.full((1, channels, 1, 1), 0.5, **options)
            self.register_parameter(f"alpha{i}", nn.Parameter(alpha))
            self.add_module(f"level{i}", _Level(channels, count, not first and i < LEVELS - 1, **options))

    def forward(self, x: Tensor, states: Sequence[Tensor]) -> list[Tensor]:
        """The new states, the first level's first."""
        levels = [self.get_submodule(f"level{i}") for i in range(LEVELS)]
        alphas = [keep_away_from_zero(self.get_parameter(f"alpha{i}")) for i in range(LEVELS)]
        return reversible_column(levels, alphas, x, states, memory=self.memory)


@part(
    "fourier-kernel-estimator",
    paper="deeprftv2",
    kind="layer",
    dims=(2,),
    probe={
        "build": {"channels": 4, "width": 3, "first": False},
        "inputs": [[2, 4, 6, 8], [2, 3, 6, 8], [2, 3, 6, 5], [2, 3, 6, 5], [2, 3, 6, 5], [2, 3, 6, 5]],
    },
    keywords="FKE Fourier kernel estimator transfer function deblurring deconvolution DeepRFTv2 global convolution",
)
class FourierKernelEstimator(nn.Module):
    """Predict a transfer function for every channel from the spectrum, apply it, and make an image.

    Args:
        channels: d of the feature map.
        width: w of the estimator; unset is d.
        blocks: NAF blocks of its four levels; a last entry of −1 gives a plain sequence of ``blocks[0]`` blocks without
            states.
        first: the first stage, which has no old states to look at.
        norm: layer norm before the last 1 × 1 convolution.
        padding: of the maps before the transform, repeating the border.
        image_channels: of the image.
        memory: "store", or "invert" to compute old states backward instead of storing them.

    Shape:
        feature (N, d, H, W), image (N, image_channels, H, W), and the states (l3, l2, l1, dec), each
        (N, w, H + 2p, (W + 2p)/2 + 1) or left out for zeros → feature, image and the four new states.

    Raises:
        ValueError: an argument is out of range, or the number of states is wrong.

    Example:
        >>> layer = FourierKernelEstimator(8)
        >>> feature, image, *states = layer(torch.randn(1, 8, 12, 16), torch.rand(1, 3, 12, 16))
        >>> feature.shape, image.shape, states[0].shape
        (torch.Size([1, 8, 12, 16]), torch.Size([1, 3, 12, 16]), torch.Size([1, 8, 12, 9]))

    Reference: arXiv 2511.21132, section 3.
    """

    def __init__(
        self,
        channels: int,
        width: int | None = None,
        blocks: Sequence[int] = (1, 1, 1, 1),
        first: bool = True,
        norm: bool = True,
        padding: int = 0,
        image_channels: int = 3,
        memory: str = "store",
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        width = channels if width is None else width
        check_positive("channels", channels)
        check_positive("width", width)
        check_positive("padding", padding, zero=True)
        check_positive("image_channels", image_channels)
        check_choice("memory", memory, MEMORIES)
        remedy = f"give {LEVELS} numbers, or a last one of -1 for a plain sequence"
        check(isinstance(blocks, Sequence), "blocks", blocks, remedy)
        plain = len(blocks) >= 1 and blocks[-1] == -1
        counts = list(blocks[:1]) if plain else list(blocks)
        ok = (plain or len(counts) == LEVELS) and all(isinstance(n, int) and n >= 0 for n in counts)
        check(ok, "blocks", tuple(blocks), remedy)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.channels, self.width, self.padding, self.image_channels = channels, width, padding, image_channels
        self.stateful = not plain

        def pointwise(ins: int, outs: int, bias: bool = False) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(ins, outs, 1, bias=bias, **options))

        self.feature_extract = nn.ModuleDict(
            {"intro_inp": pointwise(channels, width), "intro_deconv": pointwise(channels, channels)}
        )
        self.intro = nn.ModuleDict({"ending": pointwise(2 * width, width)})
        self.subnets_ker: nn.Module = (
            nn.Sequential(*(NAFBlock(width, **options) for _ in range(counts[0])))
            if plain
            else StateStack(width, counts, first, memory, **options)
        )
        self.end_ker1 = nn.ModuleDict(
            {
                "norm": ChannelNorm(width, eps=1e-6, **options) if norm else nn.Identity(),
                "ending": pointwise(width, 2 * channels, bias=True),
            }
        )
        self.deblur_feature1 = pointwise(2 * channels, channels)
        self.end_feature1 = nn.Sequential(nn.Conv2d(channels, image_channels, 3, padding=1, **options))

    def _spectra(self, feature: Tensor) -> tuple[Tensor, Tensor, list[int]]:
        """Spectra of the estimator's and of the filtered maps, and the padded size."""
        maps = torch.cat([self.feature_extract["intro_inp"](feature), self.feature_extract["intro_deconv"](feature)], 1)
        if self.padding:
            maps = F.pad(maps, [self.padding] * 4, mode="replicate")
        maps = widen(maps)
        size = [int(maps.shape[2]), int(maps.shape[3])]
        if maps.numel():
            spectrum = torch.fft.rfft2(maps)
        else:  # which transforms refuse
            spectrum = torch.complex(maps, maps)[..., : size[1] // 2 + 1]
        return spectrum[:, : self.width], spectrum[:, self.width :], size

    def _estimate(self, spectrum: Tensor, states: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        k = self.intro["ending"](torch.cat([spectrum.real, spectrum.imag], 1).to(dtype))
        new: list[Tensor] = []
        for name, state in zip(("l3", "l2", "l1", "dec"), states, strict=False):
            if state.shape != k.shape:
                raise ValueError(f"{name} of shape {tuple(state.shape)}: expected {tuple(k.shape)}")
        if self.stateful:
            old = [states[i] for i in (2, 1, 0, 3)] if states else [torch.zeros_like(k)] * LEVELS
            new = self.subnets_ker(k, old)
            k = new[-1]
            new = [new[i] for i in (2, 1, 0, 3)]
        else:
            k = self.subnets_ker(k)
        real, imag = self.end_ker1["ending"](self.end_ker1["norm"](k)).to(spectrum.real.dtype).chunk(2, 1)
        return torch.complex(real.contiguous(), imag.contiguous()), new

    def transfer(self, feature: Tensor, *states: Tensor) -> Tensor:
        """The transfer function, complex (N, d, H + 2p, (W + 2p)/2 + 1)."""
        check_input(feature, self.channels, 2)
        spectrum, _, _ = self._spectra(feature)
        return self._estimate(spectrum, states, feature.dtype)[0]

    def forward(
        self,
        feature: Tensor,
        image: Tensor,
        l3: Tensor | None = None,
        l2: Tensor | None = None,
        l1: Tensor | None = None,
        dec: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Deblur; see the class for the states."""
        check_input(feature, self.channels, 2)
        check_input(image, self.image_channels, 2)
        if image.shape[::2] != feature.shape[::2] or image.shape[3] != feature.shape[3]:
            expected = f"{feature.shape[0]}, {self.image_channels}, {feature.shape[2]}, {feature.shape[3]}"
            raise ValueError(f"image of shape {tuple(image.shape)}: expected ({expected}) beside this feature map")
        states = [t for t in (l3, l2, l1, dec) if t is not None]
        check(len(states) in ((0, LEVELS) if self.stateful else (0,)), "states", len(states), f"give {LEVELS} or none")
        inputs, filtered, size = self._spectra(feature)
        transfer, new = self._estimate(inputs, states, feature.dtype)
        z = (
            torch.fft.irfft2(filtered * transfer, s=size)
            if feature.numel()
            else feature.new_zeros(0, self.channels, *size)
        )
        p = self.padding
        z = z[:, :, p : size[0] - p, p : size[1] - p].to(feature.dtype)
        g = self.deblur_feature1(torch.cat([z, feature], 1))
        return g, self.end_feature1(g) + image, *new
