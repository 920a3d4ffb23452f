"""DeepRFTv2: deblurring by reversible U-Nets at two scales, each followed by a Fourier kernel estimator.

Mao, Song, Liu, Li, Wang 2025, "DeepRFTv2: Kernel-level Learning for Image Deblurring", arXiv 2511.21132.

Every stage encodes the image X at full size, then Y at half of it with the full-size states joined in, decodes Y,
estimates its kernel, puts the deblurred features of Y into the full-size latent, decodes X and estimates its kernel:

    e = enc(X),  m = menc(Y, ↓e),  k_Y, Ŷ = FKE(dec(m), Y),  e₃ ← W[↓k_Y; e₃],  k_X, X̂ = FKE(dec(e), X)

All states, encoders', decoders' and estimators', pass to the next stage, whose inputs also see k_X and k_Y. Columns are
invertible: with ``memory="invert"`` the activations of their blocks are not kept. The paper's best network has
selective-scan blocks in some places; here all are NAF blocks, which the authors' code offers for each of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive
from torchconv.catalog import part
from torchconv.models._registry import register_model
from torchconv.models.restore.deeprftv2_column import LEVELS, Halve, decoder, encoder
from torchconv.models.restore.deeprftv2_loss import deblur_loss
from torchconv.models.restore.tiles import restore
from torchconv.ops._common import check_input
from torchconv.ops.deeprftv2_kernel import FourierKernelEstimator
from torchconv.ops.deeprftv2_reversible import MEMORIES

Blocks = Sequence[int] | Sequence[Sequence[int]]


def half_size(x: Tensor) -> Tensor:
    """The next level of a Gaussian pyramid: five binomial taps with a mirrored border, then the mean of 2 × 2.

    Shape:
        (N, C, H, W) → (N, C, H/2, W/2); both even and at least 4.

    Example:
        >>> half_size(torch.ones(1, 1, 4, 6)).shape
        torch.Size([1, 1, 2, 3])
    """
    taps = torch.tensor([1, 5, 10, 10, 5, 1], device=x.device, dtype=x.dtype) / 32  # the two in one
    channels = x.shape[1]
    kernel = taps.expand(channels, 1, 6)
    x = F.pad(x, [2] * 4, mode="reflect")
    x = F.conv2d(x, kernel[:, :, :, None], stride=(2, 1), groups=channels)
    return F.conv2d(x, kernel[:, :, None], stride=(1, 2), groups=channels)


class _Embed(nn.Module):
    """3 × 3 without bias, under the name ``proj``."""

    def __init__(self, in_chans: int, out_channels: int, **options: Any) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, out_channels, 3, padding=1, bias=False, **options)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(x)
        return y


def _per_stage(name: str, blocks: Blocks, stages: int) -> list[list[int]]:
    """Numbers of blocks for every stage; one list stands for all of them."""
    remedy = f"give {LEVELS} numbers of blocks, or as many for each of {stages} stages"
    check(isinstance(blocks, Sequence) and not isinstance(blocks, str), name, blocks, remedy)
    each: list[Any] = list(blocks) if blocks and isinstance(blocks[0], Sequence) else [blocks] * stages
    check(len(each) == stages and all(isinstance(e, Sequence) and len(e) == LEVELS for e in each), name, blocks, remedy)
    found = [list(e) for e in each]
    check(all(isinstance(n, int) and n >= 0 for e in found for n in e), name, blocks, remedy)
    return found


@part(
    "deeprftv2",
    paper="deeprftv2",
    kind="model",
    dims=(2,),
    keywords="image deblurring motion blur reversible U-Net Fourier kernel estimator multi-scale NAFNet",
)
class DeepRFTv2(nn.Module):
    """Decoupled multi-scale deblurring in stages of reversible columns and Fourier kernel estimators.

    Args:
        in_chans: of the images.
        widths: d at full and at half size.
        kernel_widths: of the estimators; unset is ``widths``.
        stages: N ≥ 1.
        encoder, decoder: NAF blocks of the three levels at full size, the decoder's from the latent up; three numbers,
            or three for each stage.
        mid_encoder, mid_decoder: the same at half size; unset is as at full size.
        estimator: NAF blocks of the estimators' four levels; a last −1 gives a plain sequence of the first number.
        estimator_norm: layer norm before an estimator's last convolution.
        memory: "store", or "invert" to compute the columns' old states backward instead of storing activations.

    Shape:
        (N, in_chans, H, W) → the same, H and W multiples of 8; :meth:`predict` takes any.

    Raises:
        ValueError: an argument is out of range, or a size does not divide; the message names it.

    Example:
        >>> net = DeepRFTv2(widths=(4, 4), encoder=(1, 1, 1), decoder=(1, 1, 1))
        >>> net(torch.rand(1, 3, 16, 24)).shape
        torch.Size([1, 3, 16, 24])

    Reference: arXiv 2511.21132, section 3.
    """

    multiple = 8

    def __init__(
        self,
        in_chans: int = 3,
        widths: Sequence[int] = (48, 48),
        kernel_widths: Sequence[int] | None = None,
        stages: int = 2,
        encoder: Blocks = (1, 4, 8),
        decoder: Blocks = (8, 4, 1),
        mid_encoder: Blocks | None = None,
        mid_decoder: Blocks | None = None,
        estimator: Sequence[int] = (1, 1, 1, 1),
        estimator_norm: bool = True,
        memory: str = "store",
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_positive("in_chans", in_chans)
        check_positive("stages", stages)
        check_choice("memory", memory, MEMORIES)
        kernel_widths = widths if kernel_widths is None else kernel_widths
        for name, pair in (("widths", widths), ("kernel_widths", kernel_widths)):
            ok = isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(w, int) and w >= 1 for w in pair)
            check(ok, name, pair, "give two widths, at full and at half size")
        counts = {
            "encoder": _per_stage("encoder", encoder, stages),
            "decoder": _per_stage("decoder", decoder, stages),
            "mid_encoder": _per_stage("mid_encoder", encoder if mid_encoder is None else mid_encoder, stages),
            "mid_decoder": _per_stage("mid_decoder", decoder if mid_decoder is None else mid_decoder, stages),
        }
        self.in_chans, self.widths, self.stages = in_chans, tuple(widths), stages
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        full, mid = widths
        for i in range(stages):
            self._add("patch_embed_maxs", i, _Embed(in_chans, full, **options))
            self._add("patch_embed_mids", i, _Embed(in_chans, mid, **options))
            if i:
                self._add("patch_embed_maxs2", i, nn.Conv2d(2 * full, full, 1, **options))
                self._add("patch_embed_mids2", i, nn.Conv2d(2 * mid, mid, 1, **options))
            self._add("subnets_max", i, _encoder(full, counts["encoder"][i], False, memory, **options))
            self._add("subnets_mid", i, _encoder(mid, counts["mid_encoder"][i], True, memory, **options))
            self._add("subdenets_max", i, _decoder(full, counts["decoder"][i], memory, **options))
            self._add("subdenets_mid", i, _decoder(mid, counts["mid_decoder"][i], memory, **options))
            for level in range(LEVELS):
                self._add(f"down_max{level + 1}", i, Halve(full << level, mid << level, **options))
            self._add("down_mid2max", i, Halve(mid, 4 * full, **options))
            self._add("fusd_max_2", i, nn.Conv2d(8 * full, 4 * full, 1, **options))
            self._add("output_maxs", i, nn.Conv2d(full, in_chans, 3, padding=1, **options))
            self._add("output_mids", i, nn.Conv2d(mid, in_chans, 3, padding=1, **options))
            for name, width, kernel_width in zip(
                ("kernel_estimator", "mid_kernel_estimator"), widths, kernel_widths, strict=True
            ):
                arguments = (width, kernel_width, estimator, i == 0, estimator_norm, 0, in_chans, memory)
                self._add(name, i, FourierKernelEstimator(*arguments, **options))

    def _add(self, name: str, stage: int, module: nn.Module) -> None:
        """Stage by stage into lists that have the checkpoints' names; some lists begin with the second stage."""
        if name not in self._modules:
            self.add_module(name, nn.ModuleDict())
        self.get_submodule(name).add_module(str(stage), module)

    def _stage(self, stage: int) -> dict[str, Any]:
        """The modules of a stage by the names of their lists."""
        lists: dict[str, Any] = dict(self.named_children())
        return {name: modules[str(stage)] for name, modules in lists.items() if str(stage) in modules}

    def forward(self, x: Tensor, all_outputs: bool = False) -> Any:
        """The deblurred image; with ``all_outputs`` two lists, all images at full and at half size.

        Each list has, for every stage, the U-Net's image and the estimator's, whose last is the result.
        """
        check_input(x, self.in_chans, 2)
        if x.shape[2] == 0 or x.shape[3] == 0 or x.shape[2] % self.multiple or x.shape[3] % self.multiple:
            remedy = f"height and width must be multiples of {self.multiple}; predict() pads to that"
            raise ValueError(f"x of shape {tuple(x.shape)}: {remedy}")
        y = half_size(x)
        full, mid = self.widths
        e = _zeros(x, [(full << i, 1 << i) for i in range(LEVELS)])
        m = _zeros(x, [(mid << i, 2 << i) for i in range(LEVELS)])
        d, dm = _zeros(x, [(full, 1), (mid, 2)])
        kernels: list[Tensor] = []
        mid_kernels: list[Tensor] = []
        seen = seen_mid = x
        images: list[Tensor] = []
        mid_images: list[Tensor] = []
        for i in range(self.stages):
            of = self._stage(i)
            below, below_mid = of["patch_embed_maxs"](x), of["patch_embed_mids"](y)
            if "patch_embed_maxs2" in of:
                below = of["patch_embed_maxs2"](torch.cat([below, seen], 1))
                below_mid = of["patch_embed_mids2"](torch.cat([below_mid, seen_mid], 1))
            e = of["subnets_max"](below, e)
            m = of["subnets_mid"](below_mid, m, [of[f"down_max{level + 1}"](c) for level, c in enumerate(e)])
            m[1], m[0], dm = of["subdenets_mid"](m[2], [m[1], m[0], dm])
            mid_images.append(of["output_mids"](dm) + y)
            seen_mid, image, *mid_kernels = of["mid_kernel_estimator"](dm, y, *mid_kernels)
            mid_images.append(image)
            e[2] = of["fusd_max_2"](torch.cat([of["down_mid2max"](seen_mid), e[2]], 1))
            e[1], e[0], d = of["subdenets_max"](e[2], [e[1], e[0], d])
            images.append(of["output_maxs"](d) + x)
            seen, image, *kernels = of["kernel_estimator"](d, x, *kernels)
            images.append(image)
        return (images, mid_images) if all_outputs else images[-1]

    def loss(self, x: Tensor, target: Tensor, weight: float = 0.01) -> Tensor:
        """Of all images against ``target`` and its half; see :mod:`torchconv.models.restore.deeprftv2_loss`."""
        images, mid_images = self(x, all_outputs=True)
        targets = [target] * len(images) + [half_size(target)] * len(mid_images)
        return deblur_loss([*images, *mid_images], targets, weight)

    @torch.no_grad()
    def predict(self, x: Tensor, tile: int | None = 512, overlap: int = 48) -> Tensor:
        """The deblurred image in [0, 1], of any size, in tiles as published; see :func:`restore`."""
        return restore(self, x, self.multiple, tile, overlap).clamp(0, 1)


_encoder, _decoder = encoder, decoder  # arguments of the network have these names


def _zeros(x: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """States to begin with: (channels, reduction) each."""
    return [x.new_zeros(x.shape[0], channels, x.shape[2] // r, x.shape[3] // r) for channels, r in sizes]


def convert_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' checkpoint under this library's names: without ``module.`` and ``global_model.``."""
    return {re.sub(r"^(module\.)?(global_model\.)?", "", n): t for n, t in state.items()}


def read_official(state: dict[str, Tensor]) -> dict[str, Any]:
    """Options of :class:`DeepRFTv2` from a state under its names."""

    def highest(pattern: str) -> int:
        return max((int(m[1]) for n in state if (m := re.match(pattern, n))), default=-1) + 1

    def blocks(column: str) -> list[list[int]]:
        counts = range(LEVELS)
        return [[highest(rf"{column}\.{i}\.level{j}\.blocks\.(\d+)\.") for j in counts] for i in range(stages)]

    embeds = [state[f"patch_embed_{s}.0.proj.weight"] for s in ("maxs", "mids")]
    names = ("kernel_estimator.0", "mid_kernel_estimator.0")
    stages = highest(r"patch_embed_maxs\.(\d+)\.")
    stack = f"{names[0]}.subnets_ker"
    plain = f"{stack}.alpha0" not in state
    levels = [highest(rf"{re.escape(stack)}\.level{j}\.blocks\.(\d+)\.") for j in range(4)]
    return {
        "in_chans": int(embeds[0].shape[1]),
        "widths": [int(w.shape[0]) for w in embeds],
        "kernel_widths": [int(state[f"{n}.feature_extract.intro_inp.0.weight"].shape[0]) for n in names],
        "stages": stages,
        "encoder": blocks("subnets_max"),
        "decoder": blocks("subdenets_max"),
        "mid_encoder": blocks("subnets_mid"),
        "mid_decoder": blocks("subdenets_mid"),
        "estimator": [highest(rf"{re.escape(stack)}\.(\d+)\."), 0, 0, -1] if plain else levels,
        "estimator_norm": f"{names[0]}.end_ker1.norm.weight" in state,
    }


@register_model("deeprftv2")
def deeprftv2_base(**options: Any) -> DeepRFTv2:
    """The published sizes with NAF blocks throughout: width 48, two stages; 21,181,752 parameters."""
    return DeepRFTv2(**options)


@register_model("deeprftv2")
def deeprftv2_tiny(**options: Any) -> DeepRFTv2:
    """Width 16, one to two blocks a level, 804,216 parameters; not published, for small data."""
    return DeepRFTv2(**{"widths": (16, 16), "encoder": (1, 1, 2), "decoder": (2, 1, 1), **options})
