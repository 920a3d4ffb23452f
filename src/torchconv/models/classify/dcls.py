"""ConvNeXt-DCLS: ConvNeXt whose depthwise convolutions learn where their weights stand (arXiv 2112.03740, Section 4).

Every 7 × 7 depthwise convolution of ConvNeXt becomes a DCLS layer of size 17 with "same" padding. The positions (and
widths, for the Gaussian version) are shared by all blocks of a stage, so a network has as many parameters as the plain
one. Parameters: T 28,587,688, S 50,217,064, B 88,582,632. Names are those of the authors' checkpoints.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchconv._common import check, check_choice
from torchconv.catalog import part
from torchconv.models._backbone import POOLS, Backbone
from torchconv.models._drop_path import drop_path
from torchconv.models._registry import register_model
from torchconv.ops._common import ChannelNorm
from torchconv.ops.dcls import DCLSConv2d, share_positions


class Block(nn.Module):
    """DCLS → layer norm → linear to 4C → GELU → linear → layer scale, added to the input.

    Args:
        dim: channels C.
        kernel_size, kernel_count, version: of the DCLS layer.
        drop_path: probability that a sample skips the block in training, in [0, 1).
        layer_scale_init_value: start of the layer scale ``gamma``; 0 leaves it out.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 17,
        kernel_count: int = 34,
        version: str = "v0",
        drop_path: float = 0.0,
        layer_scale_init_value: float = 1e-6,
    ) -> None:
        super().__init__()
        self.dwconv = DCLSConv2d(
            dim,
            dim,
            kernel_size,
            padding=kernel_size // 2,
            groups=dim,
            kernel_count=kernel_count,
            version=version,
            axis_order="official",
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * dim, dim)
        scale = torch.full((dim,), layer_scale_init_value)
        self.gamma = nn.Parameter(scale) if layer_scale_init_value > 0 else None
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → the same shape."""
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.pwconv2(self.act(self.pwconv1(y)))
        if self.gamma is not None:
            y = self.gamma * y
        y = y.permute(0, 3, 1, 2)
        y = drop_path(y, self.drop_path, self.training)
        return x + y


@part(
    "convnext-dcls", paper="dcls", kind="model", dims=(2,), keywords="ConvNeXt learnable spacings backbone classifier"
)
class ConvNeXtDCLS(Backbone):
    """ConvNeXt with DCLS depthwise convolutions, positions shared within a stage.

    Args:
        in_chans, num_classes: input channels and classes.
        depths, dims: blocks and channels of the stages.
        drop_path_rate: probability of skipping the last block, rising linearly from 0.
        layer_scale_init_value: start of the layer scale; 0 leaves it out.
        head_init_scale: factor on the classifier's initial weights.
        dcls_kernel_size: S, odd.
        dcls_kernel_count: m, weights a channel.
        global_pool: "avg", "max", "avgmax" or "".
        version: window of the DCLS layers, "v0" (the paper) or "gauss" (its sequel, with S = 23 and m = 26).

    Shape:
        (N, in_chans, H, W) → (N, num_classes), H and W at least 4 · 2^(stages − 1).

    Raises:
        ValueError: ``dcls_kernel_size`` is even, or ``depths`` and ``dims`` differ in length.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        head_init_scale: float = 1.0,
        dcls_kernel_size: int = 17,
        dcls_kernel_count: int = 34,
        version: str = "v0",
        *,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        check_choice("global_pool", global_pool, POOLS)
        odd = "must be odd, so that the residual keeps its size"
        check(dcls_kernel_size % 2 == 1, "dcls_kernel_size", dcls_kernel_size, odd)
        check(len(depths) == len(dims), "depths", depths, f"give one number for each of dims={tuple(dims)}")
        self.in_chans, self.num_classes, self.num_features = in_chans, num_classes, dims[-1]
        self.global_pool = global_pool
        self.feature_info = [{"num_chs": c, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, c in enumerate(dims)]
        self.downsample_layers = nn.ModuleList()
        self.stages = nn.ModuleList()
        blocks = sum(depths)
        rates = [drop_path_rate * i / max(1, blocks - 1) for i in range(blocks)]
        before = in_chans
        for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            if i == 0:
                layers = [nn.Conv2d(before, dim, 4, stride=4), ChannelNorm(dim, eps=1e-6)]
            else:
                layers = [ChannelNorm(before, eps=1e-6), nn.Conv2d(before, dim, 2, stride=2)]
            self.downsample_layers.append(nn.Sequential(*layers))
            own, rates = rates[:depth], rates[depth:]
            options = (dcls_kernel_size, dcls_kernel_count, version)
            stage = nn.Sequential(*[Block(dim, *options, rate, layer_scale_init_value) for rate in own])
            self.stages.append(share_positions(stage))
            before = dim
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head: Any = self.make_classifier(num_classes)
        self.apply(self._init_weights)
        with torch.no_grad():
            for parameter in self.head.parameters():
                parameter.mul_(head_init_scale)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear | DCLSConv2d):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def stage(self, index: int, x: Tensor) -> Tensor:
        """Reduction and blocks of one stage."""
        blocks: Any = self.stages[index]
        return self.run(blocks, self.downsample_layers[index](x))

    def neck(self, x: Tensor) -> Tensor:
        """Layer norm of the pooled features."""
        y: Tensor = self.norm(x) if x.dim() == 2 else x
        return y

    def merge(self) -> nn.Module:
        """The same network for inference with plain depthwise convolutions."""
        merged = copy.deepcopy(self).eval()
        for module in merged.modules():
            if isinstance(module, Block):
                module.dwconv = module.dwconv.merge()  # type: ignore[assignment]
        return merged


@register_model("dcls")
def convnext_dcls_mini(**options: Any) -> ConvNeXtDCLS:
    """ConvNeXt-DCLS for small images and tests: one block a stage, 16 to 48 channels, S = 7, m = 10."""
    settings = {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 48), "dcls_kernel_size": 7, "dcls_kernel_count": 10}
    return ConvNeXtDCLS(**{**settings, **options})


@register_model("dcls")
def convnext_dcls_tiny(**options: Any) -> ConvNeXtDCLS:
    """ConvNeXt-T-DCLS: 28.6 M parameters, ImageNet-1K top-1 82.5 % (published)."""
    return ConvNeXtDCLS(**options)


@register_model("dcls")
def convnext_dcls_small(**options: Any) -> ConvNeXtDCLS:
    """ConvNeXt-S-DCLS: 50.2 M parameters, ImageNet-1K top-1 83.7 % (published)."""
    return ConvNeXtDCLS(**{"depths": (3, 3, 27, 3), "dcls_kernel_count": 40, **options})


@register_model("dcls")
def convnext_dcls_base(**options: Any) -> ConvNeXtDCLS:
    """ConvNeXt-B-DCLS: 88.6 M parameters, ImageNet-1K top-1 84.1 % (published)."""
    settings = {"depths": (3, 3, 27, 3), "dims": (128, 256, 512, 1024), "dcls_kernel_count": 40}
    return ConvNeXtDCLS(**{**settings, **options})


@register_model("dcls")
def convnext_dcls_gauss_tiny(**options: Any) -> ConvNeXtDCLS:
    """ConvNeXt-T-DCLS with Gaussian windows, S = 23 and m = 26 (arXiv 2306.00817)."""
    return ConvNeXtDCLS(**{"dcls_kernel_size": 23, "dcls_kernel_count": 26, "version": "gauss", **options})
