"""VAN: the network for images in which large kernel attention was published.

Guo, Lu, Liu, Cheng, Hu 2022, "Visual Attention Network", arXiv 2202.09741; PuYun's operator and block are its. Four
stages: a strided convolution with batch norm (7 × 7 by 4, then 3 × 3 by 2), blocks, layer norm over the channels.
Parameter names are the authors' (``block1.0.attn.spatial_gating_unit.conv0.weight``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive
from torchconv.catalog import part
from torchconv.models._backbone import POOLS, Backbone
from torchconv.models._registry import register_model
from torchconv.models.forecast.van import VANBlock
from torchconv.ops._common import ChannelNorm, check_input
from torchconv.ops.puyun import init_fan_out


class PatchEmbed(nn.Module):
    """Overlapping patches: a k × k convolution with a stride and batch norm; official names ``proj`` and ``norm``."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2)
        self.norm = nn.BatchNorm2d(out_channels)
        init_fan_out(self.proj)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C', ⌈H/stride⌉, ⌈W/stride⌉)."""
        y: Tensor = self.norm(self.proj(x))
        return y


@part(
    "van",
    paper="puyun",
    kind="model",
    dims=(2,),
    keywords="visual attention network large kernel attention backbone classifier ImageNet",
)
class VAN(Backbone):
    """Visual attention network.

    Args:
        in_chans: channels of the image.
        num_classes: outputs; 0 for the pooled features.
        dims, depths, mlp_ratios: channels, blocks and ratio of the feed-forward part of each stage.
        drop_rate: dropout in the feed-forward parts.
        drop_path_rate: drop path of the last block, rising linearly from 0.
        global_pool: "avg", "max" or "avgmax".

    Shape:
        (N, in_chans, H, W) → (N, num_classes).

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> import torch
        >>> net = VAN(num_classes=10, dims=(8, 16), depths=(1, 1), mlp_ratios=(2, 2))
        >>> net(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 10])

    Reference: arXiv 2202.09741, section 3.3 and table 2.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        dims: Sequence[int] = (32, 64, 160, 256),
        depths: Sequence[int] = (3, 3, 5, 2),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        *,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        check_positive("in_chans", in_chans)
        check_positive("num_classes", num_classes, zero=True)
        check_choice("global_pool", global_pool, POOLS[:3])
        check(len(dims) > 0, "dims", tuple(dims), "needs an entry for each stage, at least one")
        for name, given in {"depths": depths, "mlp_ratios": mlp_ratios}.items():
            check(len(given) == len(dims), name, tuple(given), f"give one for each of the {len(dims)} stages")
        for depth in depths:
            check_positive("depths", depth)
        check(0 <= drop_path_rate < 1, "drop_path_rate", drop_path_rate, "must be at least 0 and below 1")
        self.in_chans, self.num_classes, self.global_pool = in_chans, num_classes, global_pool
        self.feature_info, before, reduction = [], in_chans, 1
        rates = iter(drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths)))
        for number, (dim, depth, ratio) in enumerate(zip(dims, depths, mlp_ratios, strict=True), 1):
            kernel, stride = (7, 4) if number == 1 else (3, 2)
            blocks = (VANBlock(dim, ratio, drop_rate, next(rates)) for _ in range(depth))
            setattr(self, f"patch_embed{number}", PatchEmbed(before, dim, kernel, stride))
            setattr(self, f"block{number}", nn.ModuleList(blocks))
            setattr(self, f"norm{number}", ChannelNorm(dim, eps=1e-6))
            before, reduction = dim, reduction * stride
            self.feature_info.append({"num_chs": dim, "reduction": reduction, "module": f"block{number}"})
        self.num_features = before
        self.head = self.make_classifier(num_classes)
        if num_classes:
            nn.init.trunc_normal_(self.head.weight, std=0.02)  # type: ignore[arg-type]
            nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def stage(self, index: int, x: Tensor) -> Tensor:
        """Patches, blocks and the norm of one stage."""
        embed, blocks, norm = (getattr(self, f"{name}{index + 1}") for name in ("patch_embed", "block", "norm"))
        if index == 0:
            check_input(x, self.in_chans, 2)
        y: Tensor = norm(self.run(blocks, embed(x)))
        return y


@register_model("puyun")
def van_b0(**options: Any) -> VAN:
    """VAN-B0: 4,105,800 parameters, 0.9 GMACs, top-1 75.4 % on ImageNet (published)."""
    return VAN(**options)


@register_model("puyun")
def van_b1(**options: Any) -> VAN:
    """VAN-B1: 13,861,800 parameters, top-1 81.1 %."""
    return VAN(**{"dims": (64, 128, 320, 512), "depths": (2, 2, 4, 2), **options})


@register_model("puyun")
def van_b2(**options: Any) -> VAN:
    """VAN-B2: 26,578,472 parameters, top-1 82.8 %."""
    return VAN(**{"dims": (64, 128, 320, 512), "depths": (3, 3, 12, 3), **options})


@register_model("puyun")
def van_b3(**options: Any) -> VAN:
    """VAN-B3: 44,765,608 parameters, top-1 83.9 %."""
    return VAN(**{"dims": (64, 128, 320, 512), "depths": (3, 5, 27, 3), **options})
