"""ConvFirstNet: a backbone of ConvFirst and MBConv blocks, and its fused inference form (Lavin 2024, arXiv 2404.03617).

Stem: 3 × 3 convolution, stride 2. Four stages, each beginning with a block of stride 2: ConvFirst blocks on the large
maps, where fusion spares the most memory traffic, and MBConv blocks on the small ones. Spatial convolutions after the
stem have groups of 8 channels.

The paper's table of depths and widths is not at hand. The sizes here are ours, around the widths in which the author's
benchmarks run the blocks (64 channels at 64 × 64, 256 at 16 × 16); their counts are not the published ones.

| variant | parameters | MACs at 224 |
|---------|------------|-------------|
| tiny    | 1,772,952  | 0.300 G     |
| small   | 4,421,104  | 0.865 G     |
| base    | 11,569,992 | 2.120 G     |
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive
from torchconv.catalog import part
from torchconv.models._backbone import POOLS, Backbone
from torchconv.models._drop_path import DropPath
from torchconv.models._registry import register_model
from torchconv.ops._common import fold_bn, make_conv
from torchconv.ops.convfirst import Block, ConvFirst, FusedMBConv, MBConv
from torchconv.ops.convfirst_fusion import BUDGET, FusedBlock

BLOCKS: dict[str, type[ConvFirst] | type[MBConv] | type[FusedMBConv]] = {
    "convfirst": ConvFirst,
    "mbconv": MBConv,
    "fusedmbconv": FusedMBConv,
}


@part(
    "convfirst-net",
    paper="convfirst",
    kind="model",
    dims=(2,),
    keywords="ConvFirstNet ConvFirst MBConv backbone classifier block fusion efficient inference",
)
class ConvFirstNet(Backbone):
    """Classifier of ConvFirst and MBConv blocks.

    Args:
        num_classes: logits; 0 leaves the classifier out.
        in_chans: channels of the image.
        depths, widths: blocks and channels of each stage.
        block_types: of each stage, or of all: "convfirst", "mbconv" or "fusedmbconv".
        expansion_ratios, kernel_sizes: of each stage, or of all.
        group_width: channels of a group of the spatial convolutions; the widths must be multiples.
        stem_width: channels of the stem; None: half of the first stage's, up to a multiple of the group width.
        act_cls: makes the activations.
        drop_rate: dropout before the classifier.
        drop_path_rate: drop path of the last block, rising linearly from 0.
        global_pool: "avg", "max", "avgmax", or "".

    Shape:
        (N, in_chans, H, W) → (N, num_classes), any H and W.

    Raises:
        ValueError: an argument is out of range or lists do not fit; the message names it.

    Example:
        >>> import torch
        >>> net = ConvFirstNet(10, 3, (1, 1), (16, 32), ("convfirst", "mbconv"), expansion_ratios=4).eval()
        >>> x = torch.randn(1, 3, 32, 32)
        >>> torch.allclose(net.fuse(budget=4096)(x), net(x), atol=1e-5)
        True

    Reference: arXiv 2404.03617.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        depths: Sequence[int] = (3, 3, 9, 3),
        widths: Sequence[int] = (64, 128, 256, 512),
        block_types: str | Sequence[str] = ("convfirst", "convfirst", "mbconv", "mbconv"),
        expansion_ratios: float | Sequence[float] = (6, 6, 4, 4),
        kernel_sizes: int | Sequence[int] = 3,
        group_width: int = 8,
        stem_width: int | None = None,
        act_cls: Callable[[], nn.Module] = nn.SiLU,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        check_positive("num_classes", num_classes, zero=True)
        check_positive("in_chans", in_chans)
        check_positive("group_width", group_width)
        check_choice("global_pool", global_pool, POOLS)
        check(0 <= drop_rate < 1, "drop_rate", drop_rate, "must be at least 0 and below 1")
        check(0 <= drop_path_rate < 1, "drop_path_rate", drop_path_rate, "must be at least 0 and below 1")
        count = len(depths)
        check(count > 0 and min(depths) > 0, "depths", tuple(depths), "give at least one stage of at least one block")
        check(len(widths) == count, "widths", tuple(widths), f"give one for each of {count} stages")
        kinds = _each("block_types", block_types, count)
        ratios = _each("expansion_ratios", expansion_ratios, count)
        kernels = _each("kernel_sizes", kernel_sizes, count)
        for kind in kinds:
            check_choice("block_types", kind, tuple(BLOCKS))
        for width in widths:
            check(width > 0 and width % group_width == 0, "widths", tuple(widths), f"use multiples of {group_width}")
        stem = stem_width or -(-widths[0] // (2 * group_width)) * group_width
        check(stem > 0 and stem % group_width == 0, "stem_width", stem_width, f"must be a multiple of {group_width}")

        self.num_classes, self.in_chans, self.num_features = num_classes, in_chans, widths[-1]
        self.global_pool = global_pool
        self.stem = nn.Sequential(nn.Conv2d(in_chans, stem, 3, 2, 1, bias=False), nn.BatchNorm2d(stem), act_cls())
        stages: list[nn.Module] = []
        self.feature_info = []
        total, before, seen = sum(depths), stem, 0
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            blocks = []
            for index in range(depth):
                options: dict[str, Any] = {"expansion_ratio": ratios[stage], "act_cls": act_cls}
                if kinds[stage] != "fusedmbconv":
                    options["group_width"] = group_width
                block = BLOCKS[kinds[stage]](before, width, kernels[stage], 2 if index == 0 else 1, **options)
                block.drop = DropPath(drop_path_rate * seen / max(total - 1, 1))
                blocks.append(block)
                before, seen = width, seen + 1
            stages.append(nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": width, "reduction": 4 << stage, "module": f"stages.{stage}"})
        self.stages = nn.Sequential(*stages)
        self.dropout = nn.Dropout(drop_rate)
        self.head = self.make_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def stage(self, index: int, x: Tensor) -> Tensor:
        """Blocks of one stage; the stem comes before the first."""
        x = self.stem(x) if index == 0 else x
        return self.run(cast(nn.Sequential, self.stages[index]), x)

    def neck(self, x: Tensor) -> Tensor:
        """Dropout on the pooled features."""
        y: Tensor = self.dropout(x)
        return y

    def merge(self) -> ConvFirstNet:
        """The exact inference form: every batch norm folded into the convolution before it."""
        return self._converted(lambda block: block.merge())

    def fuse(self, budget: int = BUDGET) -> ConvFirstNet:
        """The exact inference form that runs every block tile by tile, within ``budget`` bytes of fast memory.

        No expanded map ever exists. Faster only where the layers wait for memory, see
        :func:`torchconv.analysis.waterline.waterline`.
        """
        return self._converted(lambda block: block.fuse(budget=budget))

    def _converted(self, convert: Callable[[Block], FusedBlock]) -> ConvFirstNet:
        net = copy.deepcopy(self).eval().requires_grad_(False)
        conv: Any = net.stem[0]
        if isinstance(net.stem[1], nn.BatchNorm2d):
            weight, bias = fold_bn(conv.weight, conv.bias, net.stem[1])
            net.stem[0], net.stem[1] = make_conv(weight, bias, conv.stride, conv.padding), nn.Identity()
        net.stages = nn.Sequential(
            *(
                nn.Sequential(*(convert(b) if isinstance(b, Block) else b for b in cast(nn.Sequential, stage)))
                for stage in self.stages
            )
        )
        return net.eval().requires_grad_(False)


def _each(name: str, value: Any, count: int) -> tuple[Any, ...]:
    """One value for each stage, from a list or from one for all."""
    items = (value,) * count if isinstance(value, str | int | float) else tuple(value)
    check(len(items) == count, name, value, f"give one for each of {count} stages, or one for all")
    return items


@register_model("convfirst")
def convfirstnet_tiny(**options: Any) -> ConvFirstNet:
    """ConvFirstNet of our own size: 1.77 million parameters, 0.30 GMACs at 224."""
    return ConvFirstNet(**{"depths": (2, 2, 4, 2), "widths": (32, 64, 128, 256), **options})


@register_model("convfirst")
def convfirstnet_small(**options: Any) -> ConvFirstNet:
    """ConvFirstNet of our own size: 4.42 million parameters, 0.86 GMACs at 224."""
    return ConvFirstNet(**{"depths": (2, 3, 6, 2), "widths": (48, 96, 192, 384), **options})


@register_model("convfirst")
def convfirstnet_base(**options: Any) -> ConvFirstNet:
    """ConvFirstNet of our own size: 11.57 million parameters, 2.12 GMACs at 224."""
    return ConvFirstNet(**options)


VARIANTS: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (convfirstnet_tiny, convfirstnet_small, convfirstnet_base)
}
