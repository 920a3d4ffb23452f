"""ADK-Net: downscaling by kernels that a network predicts for every output pixel and every colour.

Pise, Ghosh 2025, "Learned Adaptive Kernels for High-Fidelity Image Downscaling", arXiv 2511.01620.

    f = W₂ unshuffle_s(blocks(W₁ x)),    K_c = normalise(W_c blocks_c(f)) for c in R, G, B,    y_c = resample(x_c, K_c)

A residual feature extractor that the colours share, and one generator for each of them. The paper's abstract gives the
structure; widths and depths here are this library's. Training starts from a classic downscaler: the generators' last
convolutions have zero weights and its kernel as their bias.

Cost an output pixel, for C colours, width w, T = k² taps: 2·9·w²·N₀·s² + 9·w²·s² + C·(2·9·w²·(N₁ + N₂) + 9·w·T + T)
multiply-adds.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check_choice, check_positive
from torchconv.catalog import part
from torchconv.kernels import adaptive_downscale
from torchconv.kernels.resample import LEAST_WEIGHT, NORMALISATIONS, mirror_pad, normalise_kernels
from torchconv.models._registry import register_model
from torchconv.ops._common import check_input

STARTS = ("bicubic", "area")
_LEAST_SHARE = 1e-3  # of the other taps before a softmax, which learns slowly what starts near 0
_RESIDUAL = 0.1  # factor of the last weights of a residual block at the start, against growth from block to block


def classic_kernel(kind: str, kernel_size: int, scale: int) -> Tensor:
    """Taps of a classic downscaler, centred on the output pixel, that sum to one.

    Args:
        kind: "area", the mean of scale × scale pixels, or "bicubic" with antialiasing (a = −1/2, as
            ``F.interpolate(mode="bicubic", antialias=True)``); cut off where ``kernel_size`` is below its support.
        kernel_size: k.
        scale: s.

    Shape:
        → (k²,), rows first.

    Example:
        >>> classic_kernel("area", 4, 2).reshape(4, 4)[1]
        tensor([0.0000, 0.2500, 0.2500, 0.0000])
    """
    check_choice("kind", kind, STARTS)
    at = torch.arange(kernel_size) - ((scale - 1) / 2 - (scale - kernel_size) // 2)
    if kind == "area":
        taps = (torch.minimum(at + 0.5, at.new_tensor(scale / 2)) - torch.clamp(at - 0.5, min=-scale / 2)).clamp(min=0)
    else:
        t = (at / scale).abs()
        near, far = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
        taps = torch.where(t <= 1, near, torch.where(t < 2, far, torch.zeros_like(t)))
    taps = taps / taps.sum()
    return torch.outer(taps, taps).flatten()


class _Conv(nn.Conv2d):
    """3 × 3 with mirrored borders, of maps of any size."""

    def __init__(self, ins: int, outs: int, **options: Any) -> None:
        super().__init__(ins, outs, 3, **options)

    def forward(self, x: Tensor) -> Tensor:
        """The map's size is kept."""
        return super().forward(mirror_pad(x, [(-1, n + 1) for n in x.shape[2:]]))


class _Block(nn.Module):
    """x + conv(relu(conv(x)))."""

    def __init__(self, width: int, **options: Any) -> None:
        super().__init__()
        self.conv1, self.conv2 = _Conv(width, width, **options), _Conv(width, width, **options)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.conv2(F.relu(self.conv1(x)))
        return y


@part(
    "adknet-net",
    paper="adknet",
    kind="model",
    dims=(2,),
    keywords="image downscaling adaptive kernels per pixel per colour RealSR camera pipeline thumbnails",
)
class ADKNet(nn.Module):
    """Network that predicts resampling kernels and downscales by them.

    Args:
        in_chans: C colours.
        scale: s ≥ 1.
        width: channels.
        blocks: N₀ residual blocks of the feature extractor, at the input's resolution.
        trunk, branch: N₁ and N₂ residual blocks of each generator, at the output's.
        kernel_size: k; 3·scale when unset. Any k with the parity of the scale centres the windows.
        normalisation: of the kernels: "softmax", "sum", or "none" (signed kernels, which can sharpen).
        start: the downscaler that training starts from, "bicubic" or "area". Negative and zero taps are there only
            with "none".
        shared: one generator whose kernels all colours share.

    Shape:
        (N, C, H, W) → (N, C, ⌊H/s⌋, ⌊W/s⌋), any H, W ≥ s.

    Raises:
        ValueError: an argument is out of range, or the image is smaller than one output pixel.

    Example:
        >>> net = ADKNet(scale=2, width=8, blocks=1, trunk=1, branch=1)
        >>> x = torch.rand(1, 3, 12, 17)
        >>> net(x).shape, net.kernels(x).shape
        (torch.Size([1, 3, 6, 8]), torch.Size([1, 3, 36, 6, 8]))

    Reference: arXiv 2511.01620.
    """

    def __init__(
        self,
        in_chans: int = 3,
        scale: int = 2,
        width: int = 64,
        blocks: int = 8,
        trunk: int = 4,
        branch: int = 4,
        kernel_size: int | None = None,
        normalisation: str = "softmax",
        start: str = "bicubic",
        shared: bool = False,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        for name, value in (("in_chans", in_chans), ("scale", scale), ("width", width)):
            check_positive(name, value)
        for name, value in (("blocks", blocks), ("trunk", trunk), ("branch", branch)):
            check_positive(name, value, zero=True)
        kernel_size = 3 * scale if kernel_size is None else kernel_size
        check_positive("kernel_size", kernel_size)
        check_choice("normalisation", normalisation, NORMALISATIONS)
        check_choice("start", start, STARTS)
        self.in_chans, self.scale, self.kernel_size = in_chans, scale, kernel_size
        self.normalisation, self.start = normalisation, start
        options: dict[str, Any] = {"device": device, "dtype": dtype}

        def chain(count: int) -> list[nn.Module]:
            return [_Block(width, **options) for _ in range(count)]

        self.features = nn.Sequential(_Conv(in_chans, width, **options), *chain(blocks))
        self.reduce = nn.Sequential(nn.PixelUnshuffle(scale), _Conv(width * scale**2, width, **options))
        self.generators = nn.ModuleList(
            nn.ModuleDict(
                {
                    "trunk": nn.Sequential(*chain(trunk)),
                    "branch": nn.Sequential(*chain(branch)),
                    "last": _Conv(width, kernel_size**2, **options),
                }
            )
            for _ in range(1 if shared else in_chans)
        )
        # How far a kernel looks, in output pixels: exact tiles need no more around them.
        self.reach = -(-max(1 + 2 * blocks, kernel_size) // scale) + 2 + 2 * (trunk + branch)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """He's normal weights, a tenth of them at the end of residual blocks; the classic kernel at the very end."""
        for module in self.modules():
            if isinstance(module, _Conv):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, _Block):
                module.conv2.weight.mul_(_RESIDUAL)
        kernel = classic_kernel(self.start, self.kernel_size, self.scale)
        if self.normalisation == "softmax":
            kernel = kernel.clamp(min=_LEAST_SHARE).log()
        elif self.normalisation == "sum":
            kernel = kernel.clamp(min=2 * LEAST_WEIGHT)
        for generator in self.generators:
            last: Any = generator["last"]  # type: ignore[index]
            nn.init.zeros_(last.weight)
            last.bias.copy_(kernel)

    def kernels(self, x: Tensor, normalised: bool = True) -> Tensor:
        """The kernels (N, C or 1, k², ⌊H/s⌋, ⌊W/s⌋) for ``x``, after the normalisation or before it."""
        check_input(x, self.in_chans, 2)
        s = self.scale
        if min(x.shape[2:]) < s:
            raise ValueError(f"x of shape {tuple(x.shape)}: height and width must be at least scale={s}")
        height, width = (n // s * s for n in x.shape[2:])
        features = self.reduce(self.features(x)[:, :, :height, :width])
        found = []
        for generator in self.generators:
            parts: Any = generator
            found.append(parts["last"](parts["branch"](parts["trunk"](features))))
        kernels = torch.stack(found, 1)
        return normalise_kernels(kernels, self.normalisation) if normalised else kernels

    def forward(self, x: Tensor) -> Tensor:
        """Downscale ``x``."""
        kernels = self.kernels(x, normalised=False)
        return adaptive_downscale(x, kernels, self.scale, self.kernel_size, self.normalisation).to(kernels.dtype)

    @torch.no_grad()
    def predict(self, x: Tensor, tile: int | None = 128) -> Tensor:
        """The downscaled image in [0, 1]; in tiles of so many output pixels a side, which give the same as the whole.

        A kernel has k² numbers for each colour and output pixel: photographs do not fit whole.
        """
        check_input(x, self.in_chans, 2)
        if tile is None:
            return self(x).clamp(0, 1)
        check_positive("tile", tile)
        s, halo = self.scale, self.reach
        height, width = (n // s for n in x.shape[2:])
        if min(height, width) == 0:
            return self(x)  # which says what is wrong
        rows = []
        for top in range(0, height, tile):
            row = []
            for left in range(0, width, tile):
                spans = []
                for begin, length, whole in ((top, height, x.shape[2]), (left, width, x.shape[3])):
                    end = begin + tile + halo
                    spans.append((max(0, begin - halo), whole if end >= length else end * s))
                (y0, y1), (x0, x1) = spans
                small = self(x[:, :, y0 * s : y1, x0 * s : x1])
                row.append(small[:, :, top - y0 : top - y0 + tile, left - x0 : left - x0 + tile])
            rows.append(torch.cat(row, 3))
        return torch.cat(rows, 2).clamp(0, 1)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"scale={self.scale}, kernel_size={self.kernel_size}, normalisation={self.normalisation!r}"


@register_model("adknet")
def adknet_tiny(**options: Any) -> ADKNet:
    """Width 16, one residual block a part; 57,820 parameters at scale 2."""
    return ADKNet(**{"width": 16, "blocks": 1, "trunk": 1, "branch": 1, **options})


@register_model("adknet")
def adknet_small(**options: Any) -> ADKNet:
    """Width 32, four blocks for features and two a part of the generators; 364,940 parameters at scale 2."""
    return ADKNet(**{"width": 32, "blocks": 4, "trunk": 2, "branch": 2, **options})


@register_model("adknet")
def adknet_base(**options: Any) -> ADKNet:
    """Width 64, eight blocks for features and four a part of the generators; 2,575,020 parameters at scale 2."""
    return ADKNet(**{"width": 64, "blocks": 8, "trunk": 4, "branch": 4, **options})
