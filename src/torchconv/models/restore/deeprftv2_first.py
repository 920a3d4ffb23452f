"""DeepRFT: a U-Net with images at three sizes in and out, of blocks with a ReLU in the Fourier domain.

Mao et al., "Intriguing Findings of Frequency Selection for Image Deblurring", AAAI 2023, arXiv 2111.11745, with the
wiring of MIMO-UNet (Cho et al. 2021, arXiv 2108.05054). The image and its halves each enter an encoder, whose outputs
are mixed across all sizes, and every decoder gives an image of its size. Convolutions are trained as DO-Conv
(:mod:`torchconv.ops.deeprftv2_doconv`) and folded by ``merge()``.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive
from torchconv.catalog import part
from torchconv.models._registry import register_model
from torchconv.models.restore.deeprftv2_loss import deblur_loss
from torchconv.models.restore.tiles import restore
from torchconv.ops._common import apply_conv, check_input
from torchconv.ops.deeprftv2 import CONVS, ResFFTConv2d
from torchconv.ops.deeprftv2_doconv import DOConv2d

SCALES = 3


def _resize(x: Tensor, steps: int) -> Tensor:
    """Nearest neighbours: halved where ``steps`` is negative, doubled where positive."""
    if steps < 0:
        return x[:, :, :: 2**-steps, :: 2**-steps]
    return F.interpolate(x, scale_factor=2**steps, mode="nearest") if steps else x


class _Conv(nn.Module):
    """A convolution that keeps the size, or halves it with stride 2, under the name ``main.0``; a ReLU unless unset."""

    def __init__(self, ins: int, outs: int, kernel: int, stride: int = 1, relu: bool = True, **options: Any) -> None:
        super().__init__()
        options = dict(options)
        if options.pop("conv") == "doconv":
            conv: nn.Module = DOConv2d(ins, outs, kernel, stride, kernel // 2, bias=False, **options)
        else:
            conv = nn.Conv2d(ins, outs, kernel, stride, kernel // 2, bias=False, **options)
        self.main = nn.ModuleList([conv])
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        conv: Any = self.main[0]
        y: Tensor = apply_conv(conv, x) if isinstance(conv, nn.Conv2d) else conv(x)
        return F.relu(y) if self.relu else y


class _Transposed(nn.Module):
    """Transposed 4 × 4 with stride 2 and a ReLU, under the name ``main.0``."""

    def __init__(self, ins: int, outs: int, **options: Any) -> None:
        super().__init__()
        self.main = nn.ModuleList([nn.ConvTranspose2d(ins, outs, 4, 2, 1, bias=False, **options)])

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.main[0](x))


class _Blocks(nn.Module):
    """Res-FFT-ReLU blocks, under the name ``layers``."""

    def __init__(self, channels: int, count: int, **options: Any) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(ResFFTConv2d(channels, **options) for _ in range(count)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


class _Shallow(nn.Module):
    """SCM: features of a smaller image, which stay beside the image itself."""

    def __init__(self, in_chans: int, outs: int, **options: Any) -> None:
        super().__init__()
        quarter, half = outs // 4, outs // 2
        self.main = nn.Sequential(
            _Conv(in_chans, quarter, 3, **options),
            _Conv(quarter, half, 1, **options),
            _Conv(half, half, 3, **options),
            _Conv(half, outs - in_chans, 1, **options),
        )
        self.conv = _Conv(outs, outs, 1, relu=False, **options)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(torch.cat([x, self.main(x)], 1))
        return y


class _Attend(nn.Module):
    """FAM: add a convolution of the product of both maps."""

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__()
        self.merge = _Conv(channels, channels, 3, relu=False, **options)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        y: Tensor = a + self.merge(a * b)
        return y


class _Mix(nn.Module):
    """AFF: maps of all sizes, brought to one."""

    def __init__(self, ins: int, outs: int, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Sequential(_Conv(ins, outs, 1, **options), _Conv(outs, outs, 3, relu=False, **options))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        y: Tensor = self.conv(torch.cat(list(maps), 1))
        return y


@part(
    "deeprft",
    paper="deeprftv2",
    kind="model",
    dims=(2,),
    merges="self",
    keywords="image deblurring MIMO-UNet multi-scale Fourier ReLU frequency selection DO-Conv",
)
class DeepRFT(nn.Module):
    """DeepRFT, first and second version: MIMO-UNet of Res-FFT-ReLU blocks.

    Args:
        in_chans: of the images.
        num_blocks: blocks of each encoder and decoder; published: 4, 8 and 20.
        width: channels at full size, a multiple of 4, more than ``in_chans``.
        conv: "doconv", the training form, or "plain".
        form: of the blocks, "real" or "complex" (second version; its blocks then have plain convolutions).
        expansion, window_size, spectral_bias, norm, activation: of the blocks, see
            :class:`torchconv.ops.deeprftv2.ResFFTConv`.

    Shape:
        (N, in_chans, H, W) → the same, H and W multiples of 4; :meth:`predict` takes any.

    Raises:
        ValueError: an argument is out of range, or a size does not divide; the message names it.

    Example:
        >>> net = DeepRFT(num_blocks=1, width=8)
        >>> [tuple(y.shape) for y in net(torch.rand(1, 3, 16, 24), all_outputs=True)]
        [(1, 3, 16, 24), (1, 3, 8, 12), (1, 3, 4, 6)]

    Reference: arXiv 2111.11745, section 3.
    """

    multiple = 4

    def __init__(
        self,
        in_chans: int = 3,
        num_blocks: int = 8,
        width: int = 32,
        conv: str = "doconv",
        form: str = "real",
        expansion: float = 1,
        window_size: int | None = None,
        spectral_bias: bool = False,
        norm: str = "backward",
        activation: str = "relu",
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_positive("in_chans", in_chans)
        check_positive("num_blocks", num_blocks, zero=True)
        check_positive("width", width)
        check_choice("conv", conv, CONVS)
        check(width % 4 == 0, "width", width, "must be a multiple of 4")
        check(2 * width > in_chans, "width", width, f"must be more than half of in_chans={in_chans}")
        self.in_chans, self.width, self.num_blocks = in_chans, width, num_blocks
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        options = {"conv": conv, **where}
        own: dict[str, Any] = {"form": form, "expansion": expansion, "norm": norm, "activation": activation}
        own |= {"window_size": window_size, "spectral_bias": spectral_bias}
        own |= {"conv": conv if form == "real" else "plain", **where}
        one, two, four = width, 2 * width, 4 * width
        self.Encoder = nn.ModuleList(_Blocks(c, num_blocks, **own) for c in (one, two, four))
        self.feat_extract = nn.ModuleList(
            [
                _Conv(in_chans, one, 3, **options),
                _Conv(one, two, 3, 2, **options),
                _Conv(two, four, 3, 2, **options),
                _Transposed(four, two, **where),
                _Transposed(two, one, **where),
                _Conv(one, in_chans, 3, relu=False, **options),
            ]
        )
        self.Decoder = nn.ModuleList(_Blocks(c, num_blocks, **own) for c in (four, two, one))
        self.Convs = nn.ModuleList([_Conv(four, two, 1, **options), _Conv(two, one, 1, **options)])
        self.ConvsOut = nn.ModuleList(_Conv(c, in_chans, 3, relu=False, **options) for c in (four, two))
        self.AFFs = nn.ModuleList(_Mix(one + two + four, c, **options) for c in (one, two))
        self.FAM1, self.FAM2 = _Attend(four, **options), _Attend(two, **options)
        self.SCM1, self.SCM2 = _Shallow(in_chans, four, **options), _Shallow(in_chans, two, **options)

    def forward(self, x: Tensor, all_outputs: bool = False) -> Any:
        """The deblurred image; with ``all_outputs`` the images at full, half and quarter size."""
        check_input(x, self.in_chans, 2)
        if x.shape[2] == 0 or x.shape[3] == 0 or x.shape[2] % self.multiple or x.shape[3] % self.multiple:
            remedy = f"height and width must be multiples of {self.multiple}; predict() pads to that"
            raise ValueError(f"x of shape {tuple(x.shape)}: {remedy}")
        half, quarter = _resize(x, -1), _resize(x, -2)
        r1 = self.Encoder[0](self.feat_extract[0](x))
        r2 = self.Encoder[1](self.FAM2(self.feat_extract[1](r1), self.SCM2(half)))
        z = self.Encoder[2](self.FAM1(self.feat_extract[2](r2), self.SCM1(quarter)))
        skip2 = self.AFFs[1]([_resize(r1, -1), r2, _resize(z, 1)])
        skip1 = self.AFFs[0]([r1, _resize(r2, 1), _resize(z, 2)])
        images = []
        z = self.Decoder[0](z)
        if all_outputs:
            images.append(self.ConvsOut[0](z) + quarter)
        z = self.Decoder[1](self.Convs[0](torch.cat([self.feat_extract[3](z), skip2], 1)))
        if all_outputs:
            images.append(self.ConvsOut[1](z) + half)
        z = self.Decoder[2](self.Convs[1](torch.cat([self.feat_extract[4](z), skip1], 1)))
        y = self.feat_extract[5](z) + x
        return (y, *reversed(images)) if all_outputs else y

    def merge(self) -> nn.Module:
        """The same network with plain convolutions."""
        merged = copy.deepcopy(self)
        for module in list(merged.modules()):
            if isinstance(module, nn.ModuleList):
                for i, layer in enumerate(module):
                    if isinstance(layer, DOConv2d):
                        module[i] = layer.merge()
        return merged

    def loss(self, x: Tensor, target: Tensor, weight: float = 0.01) -> Tensor:
        """Of the three images; see :mod:`torchconv.models.restore.deeprftv2_loss`."""
        targets = [_resize(target, -steps) for steps in range(SCALES)]
        return deblur_loss(self(x, all_outputs=True), targets, weight)

    @torch.no_grad()
    def predict(self, x: Tensor, tile: int | None = None, overlap: int = 48) -> Tensor:
        """The deblurred image in [0, 1], of any size; see :func:`torchconv.models.restore.tiles.restore`."""
        return restore(self, x, self.multiple, tile, overlap).clamp(0, 1)


def convert_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' checkpoint under this library's names.

    Without ``module.``; kernels that are stored folded (``W`` without a ``D``, of more than one tap, or of rank 4)
    become those of plain convolutions. A file of the training form is left as it is.
    """
    state = {n.removeprefix("module."): t for n, t in state.items()}
    if any(n.endswith(".D") for n in state):
        return state
    found = {}
    for name, tensor in state.items():
        if name.endswith(".W"):
            side = round(tensor[0, 0].numel() ** 0.5)
            found[f"{name[:-2]}.weight"] = tensor.reshape(*tensor.shape[:2], side, side)
        elif not name.endswith(".D_diag"):
            found[name] = tensor
    return found


def read_official(state: dict[str, Tensor]) -> dict[str, Any]:
    """Options of :class:`DeepRFT` from a state under its names."""
    block = "Encoder.0.layers.0"
    counts = [int(m[1]) for n in state if (m := re.match(r"Encoder\.0\.layers\.(\d+)\.", n))]
    first = next(state[f"feat_extract.0.main.0.{n}"] for n in ("W", "weight") if f"feat_extract.0.main.0.{n}" in state)
    width, in_chans = int(first.shape[0]), int(first.shape[1])
    found: dict[str, Any] = {"in_chans": in_chans, "width": width, "num_blocks": max(counts, default=-1) + 1}
    found["conv"] = "doconv" if "feat_extract.0.main.0.D" in state else "plain"
    hidden = state.get(f"{block}.main_fft.complex_weight1_real")
    if hidden is not None:
        bias = f"{block}.main_fft.b1_real" in state
        return {**found, "form": "complex", "expansion": hidden.shape[1] / width, "spectral_bias": bias}
    for name in ("W", "weight"):
        if f"{block}.main_fft.0.main.0.{name}" in state:
            found["expansion"] = state[f"{block}.main_fft.0.main.0.{name}"].shape[0] / (2 * width)
    return found


@register_model("deeprftv2")
def deeprft_small(**options: Any) -> DeepRFT:
    """DeepRFT-small: 4 blocks each, 5,078,256 parameters merged."""
    return DeepRFT(**{"num_blocks": 4, **options})


@register_model("deeprftv2")
def deeprft(**options: Any) -> DeepRFT:
    """DeepRFT: 8 blocks each, 9,551,088 parameters merged (published, from memory: 9.6 million)."""
    return DeepRFT(**options)


@register_model("deeprftv2")
def deeprft_plus(**options: Any) -> DeepRFT:
    """DeepRFT+: 20 blocks each, 22,969,584 parameters merged (published, from memory: 23.0 million)."""
    return DeepRFT(**{"num_blocks": 20, **options})
