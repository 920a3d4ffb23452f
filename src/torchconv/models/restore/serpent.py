"""Serpent: restoration of images by selective scans at several scales, at a cost linear in the number of pixels.

Sepehri, Fabian, Soltanolkotabi 2024, "Serpent: Scalable and Efficient Image Restoration via Multi-scale Structured
State Space Models", arXiv 2403.17902.

Patches of P × P pixels become vectors; on the way down blocks scan the map, then its side is halved and its width
doubled; on the way up the side is doubled and the map of the same size from the way down joined in:

    e_0 = blocks(embed(x)),      e_i = blocks(merge(e_{i−1}))
    d_i = blocks(W [expand(d_{i+1}); e_i]),      y = x + conv(expand_P(d_0))

**A reconstruction.** The paper gives the U-shape, the patches, and scans in four directions. Widths and depths, the
exact block, the head and the way skips are joined could not be checked against the authors' code, so that their
checkpoints do not load. Blocks and changes of scale are those of VMamba and VM-UNet
(:mod:`torchconv.models.restore.serpent_vmunet`), whose outputs are reproduced; head, residual and the joining of skips
are our reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive
from torchconv.catalog import part
from torchconv.kernels.resample import mirror_pad
from torchconv.models._registry import register_model
from torchconv.models.restore.serpent_block import Blocks, PatchEmbed, initialise, set_grad_checkpointing, spread
from torchconv.models.restore.tiles import restore
from torchconv.ops._common import check_input
from torchconv.ops.serpent import PatchExpand2d, PatchMerging2d

SKIPS = ("cat", "add")


class _Down(nn.Module):
    """Half the side, twice the width (not in the first stage), then blocks."""

    def __init__(
        self, channels: int, rates: Sequence[float], first: bool, place: dict[str, Any], **blocks: Any
    ) -> None:
        super().__init__()
        self.downsample = None if first else PatchMerging2d(channels // 2, **place)
        self.blocks = Blocks(channels, rates, **blocks, **place)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks(x if self.downsample is None else self.downsample(x))
        return y


class _Up(nn.Module):
    """Twice the side, half the width, joined with the map from the way down, then blocks."""

    def __init__(self, channels: int, rates: Sequence[float], skip: str, place: dict[str, Any], **blocks: Any) -> None:
        super().__init__()
        self.upsample = PatchExpand2d(2 * channels, **place)
        self.fuse = nn.Conv2d(2 * channels, channels, 1, **place) if skip == "cat" else None
        self.blocks = Blocks(channels, rates, **blocks, **place)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.upsample(x)
        x = x + skip if self.fuse is None else self.fuse(torch.cat([x, skip], 1))
        y: Tensor = self.blocks(x)
        return y


@part(
    "serpent",
    paper="serpent",
    kind="model",
    dims=(2,),
    keywords="image restoration deblurring super-resolution Mamba state space U-Net multi-scale linear high resolution",
)
class Serpent(nn.Module):
    """U of visual state space blocks that restores images; a reconstruction, see the module's text.

    Args:
        in_chans: of the images.
        out_chans: unset is ``in_chans``.
        dim: C, the width at the highest resolution; stage i has C·2^i.
        depths: blocks of every stage on the way down, the last one at the bottom.
        decoder_depths: on the way up, from the bottom; unset is as on the way down.
        patch: P, side of the patches; C must be a multiple.
        skip: "cat": maps side by side through a linear map, or "add".
        residual: add the image itself to the result.
        scale: enlarge the image bicubically before; the network then works at the size of the result.
        drop_path: rate of dropped branches in the deepest block, rising from 0.
        mlp_ratio, ratio, states, rank, backend: of :class:`torchconv.models.restore.serpent_block.VSSBlock`.

    Shape:
        (N, in_chans, H, W) → (N, out_chans, scale·H, scale·W), of any size; where P·2^(stages − 1) does not divide the
        sides, the image is mirrored beyond its border and the result cut.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> net = Serpent(dim=8, depths=(1, 1), states=4)
        >>> net(torch.rand(1, 3, 18, 25)).shape
        torch.Size([1, 3, 18, 25])

    Reference: arXiv 2403.17902, section 3.
    """

    def __init__(
        self,
        in_chans: int = 3,
        out_chans: int | None = None,
        dim: int = 64,
        depths: Sequence[int] = (2, 2, 2, 2),
        decoder_depths: Sequence[int] | None = None,
        patch: int = 2,
        skip: str = "cat",
        residual: bool = True,
        scale: int = 1,
        drop_path: float = 0.0,
        *,
        mlp_ratio: float = 0.0,
        ratio: float = 2.0,
        states: int = 16,
        rank: int | None = None,
        backend: str = "auto",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        out_chans = in_chans if out_chans is None else out_chans
        for name, value in (("in_chans", in_chans), ("out_chans", out_chans), ("dim", dim), ("patch", patch)):
            check_positive(name, value)
        check_positive("scale", scale)
        check_choice("skip", skip, SKIPS)
        check(dim % patch == 0, "dim", dim, f"must be a multiple of patch={patch}, whose pixels share the channels")
        fits = out_chans == in_chans or not residual
        check(fits, "out_chans", out_chans, f"residual=True adds the image, which has in_chans={in_chans}")
        check(len(depths) >= 1, "depths", depths, "give at least one stage")
        decoder_depths = tuple(depths[-2::-1]) if decoder_depths is None else tuple(decoder_depths)
        remedy = f"give {len(depths) - 1} numbers, one for each stage but the bottom"
        check(len(decoder_depths) == len(depths) - 1, "decoder_depths", decoder_depths, remedy)
        for name, counts in (("depths", depths), ("decoder_depths", decoder_depths)):
            for count in counts:
                check_positive(name, count, zero=True)
        self.in_chans, self.out_chans, self.residual, self.scale = in_chans, out_chans, residual, scale
        self.multiple = patch << (len(depths) - 1)
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        blocks: dict[str, Any] = {"mlp_ratio": mlp_ratio, "ratio": ratio, "states": states, "rank": rank}
        blocks["backend"] = backend
        down, up = spread(drop_path, depths), spread(drop_path, decoder_depths, falling=True)
        widths = [dim << i for i in range(len(depths))]
        self.patch_embed = PatchEmbed(in_chans, dim, patch, **place)
        self.layers = nn.ModuleList(
            _Down(width, rates, i == 0, place, **blocks)
            for i, (width, rates) in enumerate(zip(widths, down, strict=True))
        )
        self.layers_up = nn.ModuleList(
            _Up(width, rates, skip, place, **blocks) for width, rates in zip(widths[-2::-1], up, strict=True)
        )
        self.final_up = PatchExpand2d(dim, patch, **place) if patch > 1 else None
        self.final_conv = nn.Conv2d(dim // patch, out_chans, 3, padding=1, **place)
        initialise(self)

    def enlarge(self, x: Tensor) -> Tensor:
        """The image at the size of the result."""
        if self.scale == 1:
            return x
        return F.interpolate(x, scale_factor=float(self.scale), mode="bicubic", align_corners=False)

    def forward(self, x: Tensor) -> Tensor:
        """Restore ``x``."""
        check_input(x, self.in_chans, 2)
        check(0 not in x.shape[2:], "x.shape", tuple(x.shape), "an image without pixels cannot be restored")
        return self._restore(self.enlarge(x))

    def _restore(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        spans = [(0, -(-n // self.multiple) * self.multiple) for n in (height, width)]
        y = self.patch_embed(mirror_pad(x, spans))
        skips = []
        for layer in self.layers:
            y = layer(y)
            skips.append(y)
        for layer, skip in zip(self.layers_up, skips[-2::-1], strict=True):
            y = layer(y, skip)
        y = self.final_conv(y if self.final_up is None else self.final_up(y))[:, :, :height, :width]
        return x + y if self.residual else y

    @torch.no_grad()
    def predict(self, x: Tensor, tile: int | None = None, overlap: int = 32) -> Tensor:
        """The restored image in [0, 1], whole or in tiles of the result, see :func:`restore`.

        Tiles bound the memory; with them no pixel sees farther than its tile.
        """
        check_input(x, self.in_chans, 2)
        return restore(self._restore, self.enlarge(x), self.multiple, tile, overlap).clamp(0, 1)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep the inputs of blocks alone in training and compute the rest again for the gradient."""
        set_grad_checkpointing(self, enable)


@register_model("serpent")
def serpent_tiny(**options: Any) -> Serpent:
    """Width 16, patches of 2, three stages, 4 states: 93,227 parameters; not published, for small data."""
    return Serpent(**{"dim": 16, "depths": (1, 1, 1), "states": 4, **options})


@register_model("serpent")
def serpent_base(**options: Any) -> Serpent:
    """Width 64, patches of 2, four stages of two blocks, 16 states: 8,841,379 parameters; the sizes are ours."""
    return Serpent(**options)
