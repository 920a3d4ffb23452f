"""ConvNeXt's block as the baseline, and stacks of blocks (Lavin 2024, arXiv 2404.03617).

ConvNeXt (Liu et al. 2022, arXiv 2201.03545) has the parameter names of timm, whose weights load as they are; stacks
have those of the author's code.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from torchconv._common import Size, check, check_choice, check_positive
from torchconv.catalog import part
from torchconv.ops._common import ChannelNorm, apply_conv, make_conv
from torchconv.ops.convfirst import (
    MLP,
    Activation,
    Block,
    ConvFirst,
    FusedMBConv,
    MBConv,
    grouped_conv,
    hidden_channels,
    keeps_shape,
)
from torchconv.ops.convfirst_fusion import FusedBlock


@part(
    "convnext-block",
    paper="convfirst",
    kind="layer",
    dims=(2,),
    mixes="space+channels",
    merges="self",
    probe={"build": {"in_channels": 4, "layer_scale": 0.5}, "inputs": [[2, 4, 7, 6]]},
    keywords="ConvNeXt block depthwise layer norm layer scale baseline",
)
class ConvNeXt(Block):
    """Depthwise convolution, layer norm, expansion, GELU, projection, layer scale, residual: the baseline.

    Parameter names are those of timm's ``ConvNeXtBlock``, whose weights load as they are.

    Args:
        in_channels, out_channels: channels, the same.
        kernel_size: of the first convolution, odd.
        group_width: channels of a group of the first convolution; 1 is depthwise.
        expansion_ratio: hidden over input channels.
        act_cls: makes the activation.
        layer_scale: start of γ.
        options: ``device`` and ``dtype``.

    Shape:
        (N, C, H, W) → the same.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_size: Size = 7,
        group_width: int = 1,
        expansion_ratio: float = 4,
        act_cls: Activation = nn.GELU,
        layer_scale: float = 1e-6,
        **options: Any,
    ) -> None:
        super().__init__()
        check(out_channels in (None, in_channels), "out_channels", out_channels, f"the block keeps its {in_channels}")
        hidden = hidden_channels(in_channels, expansion_ratio)
        self.in_channels = in_channels
        self.residual = keeps_shape(in_channels, in_channels, 1, kernel_size)
        self.conv_dw = grouped_conv(in_channels, in_channels, kernel_size, 1, group_width, bias=True)
        self.norm = ChannelNorm(in_channels, eps=1e-6)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(in_channels, hidden), "act": act_cls(), "fc2": nn.Linear(hidden, in_channels)}
        )
        self.gamma = nn.Parameter(torch.full((in_channels,), layer_scale))
        self.drop = nn.Identity()
        if options:
            self.to(**options)

    def branch(self, x: Tensor) -> Tensor:
        """Everything but the addition."""
        y = self.norm(apply_conv(self.conv_dw, x)).permute(0, 2, 3, 1)
        y = self.mlp["fc2"](self.mlp["act"](self.mlp["fc1"](y)))
        return (self.gamma * y).permute(0, 3, 1, 2)

    def merge(self) -> FusedBlock:
        """The exact inference form: γ folded into the projection, linear layers as 1 × 1 convolutions."""
        fc1, fc2 = cast(nn.Linear, self.mlp["fc1"]), cast(nn.Linear, self.mlp["fc2"])
        conv: Any = self.conv_dw
        first: Any = make_conv(conv.weight, conv.bias, 1, conv.padding, groups=conv.groups)
        expand: Any = make_conv(fc1.weight[..., None, None], fc1.bias)
        project: Any = make_conv((self.gamma[:, None] * fc2.weight)[..., None, None], self.gamma * fc2.bias)
        norm = copy.deepcopy(self.norm)
        return FusedBlock(expand, project, self.mlp["act"], first=first, norm=norm, residual=True).eval()


BLOCKS: dict[str, Callable[..., Block]] = {
    "ConvFirst": ConvFirst,
    "MBConv": MBConv,
    "FusedMBConv": FusedMBConv,
    "ConvNeXt": ConvNeXt,
}


@part(
    "stacked-blocks",
    paper="convfirst",
    kind="layer",
    dims=(2,),
    mixes="space+channels",
    merges="self",
    probe={
        "build": {"num_channels": 4, "group_width": 4, "depth": 1, "extra_depth": 2, "block_cls": "ConvFirst"},
        "inputs": [[2, 4, 7, 6]],
    },
    keywords="benchmark stack of blocks MLP ConvFirst MBConv",
)
class StackedBlocks(nn.Module):
    """Blocks of one kind with MLPs before and after, and global pooling: what the author times blocks in.

    Args:
        num_channels: C.
        kernel_size, group_width, expansion_ratio: of the blocks.
        depth: blocks.
        block_cls: "ConvFirst", "MBConv", "FusedMBConv" or "ConvNeXt", or a class with their arguments.
        extra_depth: MLPs, the greater half before the blocks.
        act_cls: makes the activation; None leaves every block its own.
        options: ``device`` and ``dtype``.

    Shape:
        (N, C, H, W) → (N, C, 1, 1).

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> StackedBlocks(16, depth=2)(torch.randn(2, 16, 8, 8)).shape
        torch.Size([2, 16, 1, 1])
    """

    def __init__(
        self,
        num_channels: int = 64,
        kernel_size: Size = 3,
        group_width: int = 8,
        expansion_ratio: float = 4,
        depth: int = 16,
        block_cls: str | Callable[..., nn.Module] = "MBConv",
        extra_depth: int = 1,
        act_cls: Activation | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        check_positive("depth", depth, zero=True)
        check_positive("extra_depth", extra_depth, zero=True)
        build: Callable[..., nn.Module]
        if isinstance(block_cls, str):
            check_choice("block_cls", block_cls, tuple(BLOCKS))
            build = BLOCKS[block_cls]
        else:
            build = block_cls
        shared: dict[str, Any] = {"expansion_ratio": expansion_ratio, **options}
        if act_cls is not None:
            shared["act_cls"] = act_cls
        own = {"kernel_size": kernel_size, **({} if build is FusedMBConv else {"group_width": group_width}), **shared}
        after = extra_depth // 2
        self.pre = nn.Sequential(*(MLP(num_channels, num_channels, **shared) for _ in range(extra_depth - after)))
        self.blocks = nn.Sequential(*(build(num_channels, num_channels, **own) for _ in range(depth)))
        self.post = nn.Sequential(*(MLP(num_channels, num_channels, **shared) for _ in range(after)))

    def forward(self, x: Tensor) -> Tensor:
        """Transform and pool ``x``."""
        y: Tensor = self.post(self.blocks(self.pre(x)))
        return y.mean((2, 3), keepdim=True)

    def merge(self) -> nn.Sequential:
        """The blocks in their exact inference form, and the pooling."""
        blocks: Any = (*self.pre, *self.blocks, *self.post)
        return nn.Sequential(*(block.merge() for block in blocks), nn.AdaptiveAvgPool2d(1)).eval()
