"""SpaRTAN: a light network of spatial and channel mixers (Pay et al. 2025, arXiv 2507.10999).

    x ← x + s₁ SMixer(GN x);   x ← x + s₂ CMixer(GN x)

GN is group norm with one group. Early stages mix space densely, late ones depthwise. 3,820,296 parameters and 0.800 G
multiplications at 224 × 224. Parameter names are those of the authors' checkpoint.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchconv._common import check, check_positive
from torchconv.catalog import part
from torchconv.models._backbone import Backbone
from torchconv.models._drop_path import DropPath
from torchconv.models._registry import register_model
from torchconv.ops._common import ChannelNorm, check_input
from torchconv.ops.spartan import CMixer, ConvNormAct, SMixer


class SpaRTANBlock(nn.Module):
    """Spatial and channel mixer, each residual with a scale for every channel.

    Args:
        channels: C, a multiple of 8.
        expand_ratio, c_groups: of :class:`torchconv.ops.spartan.CMixer`.
        s_groups: of :class:`torchconv.ops.spartan.SMixer`.
        use_group: group norm with one group; False normalises the channels of every position.
        drop_path: rate of whole samples without a branch, in training.

    Shape:
        (N, C, H, W) → the same.
    """

    def __init__(
        self,
        channels: int,
        expand_ratio: int = 4,
        s_groups: int = 1,
        c_groups: int = 1,
        use_group: bool = True,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        check_positive("channels", channels)

        def norm() -> nn.Module:
            return nn.GroupNorm(1, channels, eps=1e-6) if use_group else ChannelNorm(channels, eps=1e-6)

        self.norm_1, self.norm_2 = norm(), norm()
        self.smixer = SMixer(channels, s_groups)
        self.cmixer = CMixer(channels, expand_ratio, c_groups)
        self.scale_1: nn.Parameter | None = nn.Parameter(torch.full((1, channels, 1, 1), 1e-5))
        self.scale_2: nn.Parameter | None = nn.Parameter(torch.full((1, channels, 1, 1), 1e-5))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``x``."""
        check_input(x, self.smixer.proj_in.in_channels, 2)
        y = self.smixer(self.norm_1(x))
        x = x + self.drop_path(y if self.scale_1 is None else self.scale_1 * y)
        y = self.cmixer(self.norm_2(x))
        x = x + self.drop_path(y if self.scale_2 is None else self.scale_2 * y)
        return x

    def merge(self) -> SpaRTANBlock:
        """The exact inference form: mixers merged, the scales in their last convolutions."""
        merged: Any = copy.deepcopy(self).eval()
        merged.smixer, merged.cmixer = self.smixer.merge(self.scale_1), self.cmixer.merge(self.scale_2)
        merged.scale_1 = merged.scale_2 = None
        block: SpaRTANBlock = merged
        return block


@part(
    "spartan-net",
    paper="spartan",
    kind="model",
    dims=(2,),
    merges="self",
    keywords="SpaRTAN light classifier backbone spatial mixer",
)
class SpaRTAN(Backbone):
    """SpaRTAN classifier.

    Args:
        num_classes: logits; 0 leaves the classifier out.
        in_chans: channels of the image.
        layer_depths, expand_ratios: blocks and hidden over input channels of each stage.
        init_dim, dims: channels of the first stage and of the others. A stage without blocks has no downsampling after
            it, so the next one must have as many channels.
        dropout: drop-path rate towards which blocks rise; published: 0.1.

    Shape:
        (N, in_chans, H, W) → (N, num_classes).

    Raises:
        ValueError: lists of different lengths or channels that do not fit.

    Example:
        >>> SpaRTAN(10, 3, (1, 1), (2, 2), 8, (16,))(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    head_name = "linear"

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        layer_depths: Sequence[int] = (3, 3, 12, 2),
        expand_ratios: Sequence[int] = (4, 4, 2, 2),
        init_dim: int = 32,
        dims: Sequence[int] = (64, 128, 256),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_positive("num_classes", num_classes, zero=True)
        check_positive("in_chans", in_chans)
        count = len(layer_depths)
        check(count > 0, "layer_depths", tuple(layer_depths), "give at least one stage")
        check(min(layer_depths) >= 0, "layer_depths", tuple(layer_depths), "must not be negative")
        check(0 <= dropout < 1, "dropout", dropout, "must be at least 0 and below 1")
        check(
            len(expand_ratios) == count, "expand_ratios", tuple(expand_ratios), f"give one for each of {count} stages"
        )
        check(len(dims) == count - 1, "dims", tuple(dims), f"give one for each of {count - 1} stages after the first")
        widths = (init_dim, *dims)
        self.num_classes, self.in_chans, self.num_features = num_classes, in_chans, widths[-1]
        self.conv = nn.Sequential(
            ConvNormAct(in_chans, init_dim // 2, 3, 2, 1, act=nn.GELU()),
            ConvNormAct(init_dim // 2, init_dim, 3, 2, 1, act=nn.GELU()),
        )
        layers: list[nn.Module] = []
        self.bounds = [0]
        self.feature_info = []
        total, seen, reduction = sum(layer_depths), 0, 4
        for stage, (depth, width) in enumerate(zip(layer_depths, widths, strict=True)):
            late = stage >= count // 2
            for _ in range(depth):
                groups = (width // 2, width) if late else (1, 1)
                rate = dropout * seen / total
                layers.append(SpaRTANBlock(width, expand_ratios[stage], *groups, drop_path=rate))
                seen += 1
            self.bounds.append(len(layers))
            module = f"layers.{len(layers) - 1}" if layers else "conv"
            self.feature_info.append({"num_chs": width, "reduction": reduction, "module": module})
            if stage + 1 < count and depth > 0:
                layers.append(ConvNormAct(width, widths[stage + 1], 2, 2, act=nn.SiLU()))
                reduction *= 2
            elif stage + 1 < count:
                same = widths[stage + 1] == width
                check(same, "dims", tuple(dims), f"stage {stage} has no blocks: the next must have {width} channels")
        self.layers = nn.Sequential(*layers)
        self.linear = self.make_classifier(num_classes)
        self.apply(_start)

    def stage(self, index: int, x: Tensor) -> Tensor:
        """Stage ``index``: the stem or the downsampling before it, and its blocks."""
        if index == 0:
            check_input(x, self.in_chans, 2)
            x = self.conv(x)
        return self.run(list(self.layers)[self.bounds[index] : self.bounds[index + 1]], x)

    def merge(self) -> SpaRTAN:
        """The exact inference form: batch norms and scales folded, and the late stages' rotations."""
        net: Any = copy.deepcopy(self).eval()
        for name in ("conv", "layers"):
            setattr(net, name, nn.Sequential(*(layer.merge() for layer in getattr(net, name))))
        merged: SpaRTAN = net
        return merged


def _start(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels / module.groups
        nn.init.normal_(module.weight, 0.0, math.sqrt(2 / fan_out))
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


@register_model("spartan")
def spartan_s(**options: Any) -> SpaRTAN:
    """SpaRTAN-S: 3.82 M parameters, 0.800 G multiplications at 224; ImageNet 77.7 % (published)."""
    return SpaRTAN(**options)


def read_official(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Options of the network that a checkpoint of the authors belongs to, from the shapes of its tensors.

    Stages without blocks leave no tensors; as many are put in as the change from dense to depthwise stages, which
    happens half-way, asks for.
    """
    count = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers."))
    widths, depths, ratios, late = [int(state["conv.1.conv.weight"].shape[0])], [0], [2], [True]
    for index in range(count):
        if f"layers.{index}.conv.weight" in state:
            widths.append(int(state[f"layers.{index}.conv.weight"].shape[0]))
            depths.append(0)
            ratios.append(2)
            late.append(True)
            continue
        depths[-1] += 1
        ratios[-1] = int(state[f"layers.{index}.cmixer.theta.weight"].shape[0]) // widths[-1]
        late[-1] = state[f"layers.{index}.smixer.h_conv.conv.weight"].shape[1] == 1
    before = max(0, 2 * sum(late) - 1 - len(late))
    after = max(0, len(late) - 2 * sum(late))
    widths = [widths[0]] * before + widths + [widths[-1]] * after
    return {
        "layer_depths": (0,) * before + tuple(depths) + (0,) * after,
        "expand_ratios": (2,) * before + tuple(ratios) + (2,) * after,
        "init_dim": widths[0],
        "dims": tuple(widths[1:]),
    }


VARIANTS: dict[str, Callable[..., Any]] = {f.__name__: f for f in (spartan_s,)}
