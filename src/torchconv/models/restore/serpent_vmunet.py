"""VM-UNet: the U of visual state space blocks that Serpent's reconstruction is built after, with the authors' names.

Ruan, Li, Xiang 2024, "VM-UNet: Vision Mamba UNet for Medical Image Segmentation", arXiv 2402.02491. It differs from
:class:`torchconv.models.restore.serpent.Serpent`: the map that a stage *received* is kept, and added *before* the side
is doubled; the first stage on the way up only has blocks; the last enlargement is by 4 whatever the patch, so that the
result has 4 / P times the image's side; a 1 × 1 convolution ends it, without the image added.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from torchconv._common import check, check_positive
from torchconv.catalog import part
from torchconv.models._registry import register_model
from torchconv.models.restore.serpent_block import Blocks, PatchEmbed, initialise, set_grad_checkpointing, spread
from torchconv.ops._common import check_input
from torchconv.ops.serpent import PatchExpand2d, PatchMerging2d


class _Stage(nn.Module):
    """Blocks, with a change of the side behind them (down) or before them (up)."""

    def __init__(
        self, channels: int, rates: Sequence[float], change: str, place: dict[str, Any], **blocks: Any
    ) -> None:
        super().__init__()
        self.upsample = PatchExpand2d(2 * channels, **place) if change == "up" else None
        self.blocks = Blocks(channels, rates, **blocks, **place)
        self.downsample = PatchMerging2d(channels, odd="crop", **place) if change == "down" else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x if self.upsample is None else self.upsample(x))
        return x if self.downsample is None else self.downsample(x)


@part(
    "vm-unet",
    paper="serpent",
    kind="model",
    dims=(2,),
    keywords="VM-UNet VMamba U-Net medical segmentation state space Mamba VSS",
)
class VMUNet(nn.Module):
    """VM-UNet.

    Args:
        in_chans: of the images.
        num_classes: channels of the result.
        dim: C, a multiple of ``final_scale``; stage i has C·2^i.
        depths: blocks of every stage on the way down.
        decoder_depths: on the way up, the lowest resolution first.
        patch: side of the patches.
        patch_norm: normalise the embedded patches.
        final_scale: of the last enlargement.
        drop_path: rate of dropped branches in the deepest block, rising from 0, and falling on the way up.
        ratio, states, rank, kernel_size, dropout, backend: of :class:`torchconv.ops.serpent.SS2d`.

    Shape:
        (N, in_chans, H, W) → (N, num_classes, 4·H / P, 4·W / P), P·2^(stages − 1) a divisor of H and W.

    Raises:
        ValueError: an argument is out of range, or a size does not divide; the message names it.

    Example:
        >>> import torch
        >>> net = VMUNet(num_classes=2, dim=8, depths=(1, 1), decoder_depths=(1, 1), states=4)
        >>> net(torch.rand(1, 3, 16, 24)).shape
        torch.Size([1, 2, 16, 24])

    Reference: arXiv 2402.02491, section 3.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1,
        dim: int = 96,
        depths: Sequence[int] = (2, 2, 2, 2),
        decoder_depths: Sequence[int] = (2, 2, 2, 1),
        patch: int = 4,
        patch_norm: bool = True,
        final_scale: int = 4,
        drop_path: float = 0.2,
        *,
        ratio: float = 2.0,
        states: int = 16,
        rank: int | None = None,
        kernel_size: int = 3,
        dropout: float = 0.0,
        backend: str = "auto",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        for name, value in (("in_chans", in_chans), ("num_classes", num_classes), ("dim", dim), ("patch", patch)):
            check_positive(name, value)
        check(len(depths) >= 1, "depths", depths, "give at least one stage")
        remedy = f"give {len(depths)} numbers, one for each stage"
        check(len(decoder_depths) == len(depths), "decoder_depths", decoder_depths, remedy)
        for name, counts in (("depths", depths), ("decoder_depths", decoder_depths)):
            for count in counts:
                check_positive(name, count, zero=True)
        check_positive("final_scale", final_scale)
        check(dim % final_scale == 0, "dim", dim, f"must be a multiple of final_scale={final_scale}")
        self.in_chans, self.num_classes, self.patch = in_chans, num_classes, patch
        self.multiple = patch << (len(depths) - 1)
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        blocks: dict[str, Any] = {"ratio": ratio, "states": states, "rank": rank, "kernel_size": kernel_size}
        blocks |= {"dropout": dropout, "backend": backend}
        down, up = spread(drop_path, depths), spread(drop_path, decoder_depths, falling=True)
        last = len(depths) - 1
        self.patch_embed = PatchEmbed(in_chans, dim, patch, patch_norm, **place)
        self.layers = nn.ModuleList(
            _Stage(dim << i, rates, "down" if i < last else "", place, **blocks) for i, rates in enumerate(down)
        )
        self.layers_up = nn.ModuleList(
            _Stage(dim << (last - i), rates, "up" if i else "", place, **blocks) for i, rates in enumerate(up)
        )
        self.final_up = PatchExpand2d(dim, final_scale, **place)
        self.final_conv = nn.Conv2d(dim // final_scale, num_classes, 1, **place)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits or an image."""
        check_input(x, self.in_chans, 2)
        # Pixels that fill no patch are left out, as published; patches must then halve in every stage.
        halvings = self.multiple // self.patch
        if any(n < self.patch or (n // self.patch) % halvings for n in x.shape[2:]):
            remedy = f"height and width must be multiples of {self.multiple}; pad the image to that"
            raise ValueError(f"x of shape {tuple(x.shape)}: {remedy}")
        x = self.patch_embed(x)
        received = []
        for layer in self.layers:
            received.append(x)
            x = layer(x)
        for i, layer in enumerate(self.layers_up):
            x = layer(x + received[-i] if i else x)
        y: Tensor = self.final_conv(self.final_up(x))
        return y

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep the inputs of blocks alone in training and compute the rest again for the gradient."""
        set_grad_checkpointing(self, enable)


def convert_name(name: str) -> str:
    """This library's name for one of the authors' checkpoint."""
    name = re.sub(r"^(module\.)?(vmunet\.)?", "", name)
    return name.replace(".ln_1.", ".norm.").replace(".self_attention.", ".op.")


def convert_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' checkpoint under this library's names."""
    return {convert_name(n): t for n, t in state.items()}


def read_official(state: dict[str, Tensor]) -> dict[str, Any]:
    """Options of :class:`VMUNet` from a state under its names."""

    def counts(part: str) -> list[int]:
        found = [m for n in state if (m := re.match(rf"{part}\.(\d+)\.(?:blocks\.(\d+)\.|)", n))]
        stages = 1 + max(int(m[1]) for m in found)
        return [1 + max([int(m[2]) for m in found if int(m[1]) == i and m[2]], default=-1) for i in range(stages)]

    down, up = counts("layers"), counts("layers_up")
    missing = len(up) - len(down)  # a last stage without blocks has no names
    embed, final = state["patch_embed.proj.weight"], state["final_up.expand.weight"]
    dim = int(embed.shape[0])
    options: dict[str, Any] = {
        "in_chans": int(embed.shape[1]),
        "num_classes": int(state["final_conv.weight"].shape[0]),
        "dim": dim,
        "depths": [*down, *[0] * missing],
        "decoder_depths": up,
        "patch": int(embed.shape[2]),
        "patch_norm": "patch_embed.norm.weight" in state,
        "final_scale": int(final.shape[0] // final.shape[1]),
    }
    return {**options, **read_scans(state)}


def read_scans(state: dict[str, Tensor]) -> dict[str, Any]:
    """Options of :class:`torchconv.ops.serpent.SS2d` from the first one in a state; its prefix does not matter."""
    prefix = next((n.removesuffix("A_logs") for n in state if n.endswith("A_logs")), None)
    if prefix is None:
        return {}
    rows, states = state[f"{prefix}A_logs"].shape
    channels, rank = state[f"{prefix}in_proj.weight"].shape[1], int(state[f"{prefix}dt_projs_weight"].shape[2])
    kernel = state[f"{prefix}conv2d.weight"].shape[2:]
    return {
        "ratio": ((rows // 4) + 0.5) / channels if (rows // 4) % channels else rows // 4 / channels,
        "states": int(states),
        "rank": None if rank == math.ceil(channels / 16) else rank,
        "kernel_size": int(kernel[0]),
    }


@register_model("serpent")
def vmunet(**options: Any) -> VMUNet:
    """VM-UNet as published for segmentation at 256 × 256: width 96."""
    return VMUNet(**options)
