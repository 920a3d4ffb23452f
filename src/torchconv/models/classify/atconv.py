"""AttNet: a ConvNet whose token mixer is attentive convolution.

Yu, Chen, Jiang, Peng, Sun, Kaski, Zhao 2025, "Attentive Convolution: Unifying the Expressivity of Self-Attention with
Convolutional Efficiency", arXiv 2510.20092.

A block is x + γ₁·ATConv(LN(x)) followed by x + γ₂·GLU(LN(x)); the norms are over the channels of each pixel.

| variant | parameters | published MACs at 224 |
|---------|------------|-----------------------|
| xxs     |  2,853,556 |  0.53 G               |
| xs      |  5,554,902 |  1.00 G               |
| s       |  7,681,316 |  1.32 G               |
| t1      | 13,714,900 |  2.42 G               |
| t2      | 27,010,782 |  5.09 G               |
| t3      | 49,175,682 |  9.38 G               |
| t4      | 87,320,214 | 16.7 G                |

Ours needs fewer multiply-adds than published, since the kernels' projection runs on pooled maps (see ``ops.atconv``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive
from torchconv.catalog import part
from torchconv.models._backbone import POOLS, Backbone
from torchconv.models._drop_path import DropPath
from torchconv.models._registry import register_model
from torchconv.ops._common import ChannelNorm
from torchconv.ops.atconv import ATConv2d

T = TypeVar("T")


class PixelRMSNorm(nn.Module):
    """Each pixel's channels divided by their root mean square (the mean is not subtracted), and scaled.

    Args:
        channels: C.
        eps: added to the mean square.

    Shape:
        (N, C, H, W) → the same.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise."""
        y = F.rms_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.eps)
        return y.permute(0, 3, 1, 2)


class LayerScale(nn.Module):
    """A learned factor for each channel."""

    def __init__(self, channels: int, init: float = 1e-6) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels,), init))

    def forward(self, x: Tensor) -> Tensor:
        """Scale."""
        return x * self.gamma.reshape(-1, 1, 1)


class GLU(nn.Module):
    """Gated feed-forward part: GELU(dw(a)) · b with a, b the halves of a 1 × 1 convolution.

    Args:
        channels: C.
        hidden: m, width of each half.
        conv: whether the gate passes a 3 × 3 depthwise convolution.
        norm: whether the product is divided by its root mean square over channels.
        drop: dropout.

    Shape:
        (N, C, H, W) → the same.
    """

    def __init__(self, channels: int, hidden: int, conv: bool = False, norm: bool = True, drop: float = 0.0) -> None:
        super().__init__()
        check_positive("channels", channels)
        check_positive("hidden", hidden)
        self.fc1 = nn.Conv2d(channels, 2 * hidden, 1)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden) if conv else nn.Identity()
        self.norm_layer = PixelRMSNorm(hidden) if norm else nn.Identity()
        self.fc2 = nn.Conv2d(hidden, channels, 1)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the gate."""
        gate, value = self.fc1(x).chunk(2, 1)
        x = self.drop(self.norm_layer(F.gelu(self.dwconv(gate)) * value))
        y: Tensor = self.drop(self.fc2(x))
        return y


class Block(nn.Module):
    """Attentive convolution and a gated feed-forward part, each normalised before and added.

    Args:
        channels: C.
        kernel_size: of the attentive convolution.
        expansion: the GLU's halves have int(2·int(C·expansion)/3) channels.
        layer_scale: learned factors, initially 1e-6, on both branches.
        conv, norm: of the GLU.
        bias: of the attentive convolution.
        drop_path_rate: chance of dropping a branch in training.

    Shape:
        (N, C, H, W) → the same.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 3,
        expansion: float = 4.0,
        layer_scale: bool = True,
        conv: bool = False,
        norm: bool = True,
        bias: bool = True,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.token_mixer = ATConv2d(channels, kernel_size=kernel_size, bias=bias)
        hidden = int(2 * int(channels * expansion) / 3)
        check(hidden >= 1, "expansion", expansion, f"leaves no hidden channels of {channels}")
        self.channel_mixer = GLU(channels, hidden, conv, norm)
        self.drop_path = DropPath(drop_path_rate)
        self.layer_scale_1 = LayerScale(channels) if layer_scale else nn.Identity()
        self.layer_scale_2 = LayerScale(channels) if layer_scale else nn.Identity()
        self.norm_1 = ChannelNorm(channels, eps=1e-6)
        self.norm_2 = ChannelNorm(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Apply both branches."""
        x = x + self.drop_path(self.layer_scale_1(self.token_mixer(self.norm_1(x))))
        y: Tensor = x + self.drop_path(self.layer_scale_2(self.channel_mixer(self.norm_2(x))))
        return y


def _down(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, 2, 1, bias=False), nn.BatchNorm2d(out_channels))


def _each(name: str, value: T | Sequence[T], stages: int) -> list[T]:
    """``value`` for each stage; one value stands for all."""
    values: list[Any] = list(value) if isinstance(value, Sequence) else [value] * stages
    check(len(values) == stages, name, value, f"needs one entry a stage, as dims has ({stages})")
    return values


@part(
    "attnet", paper="atconv", kind="model", dims=(2,), keywords="AttNet attentive convolution classifier backbone GLU"
)
class AttNet(Backbone):
    """AttNet classifier.

    Args:
        dims, depths: channels and blocks of each stage.
        expansions, kernel_sizes, glu_conv, glu_norm: of the blocks, one value or one a stage.
        layer_scale: learned factors on the branches.
        num_classes: logits.
        in_chans: channels of the image.
        drop_path_rate: chance of dropping a branch in the last block, rising linearly from 0 in the first.
        bias: of the attentive convolutions.
        global_pool: "avg", "max", "avgmax" or "".

    Shape:
        (N, in_chans, H, W) → (N, num_classes).

    Raises:
        ValueError: a per-stage argument of another length than ``dims``.
    """

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 288, 512),
        depths: Sequence[int] = (3, 3, 16, 3),
        expansions: float | Sequence[float] = (8, 8, 4, 4),
        kernel_sizes: int | Sequence[int] = 3,
        glu_conv: bool | Sequence[bool] = True,
        glu_norm: bool | Sequence[bool] = True,
        layer_scale: bool = True,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        bias: bool = True,
        *,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        check_choice("global_pool", global_pool, POOLS)
        check_positive("num_classes", num_classes, zero=True)
        check_positive("in_chans", in_chans)
        check(len(dims) > 0, "dims", tuple(dims), "needs an entry for each stage, at least one")
        stages, first = len(dims), dims[0]
        self.in_chans, self.num_classes, self.num_features = in_chans, num_classes, dims[-1]
        self.global_pool = global_pool
        self.feature_info = [{"num_chs": c, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, c in enumerate(dims)]
        depths = _each("depths", depths, stages)
        check(all(d >= 0 for d in depths), "depths", tuple(depths), "entries must be at least 0")
        expansions, kernel_sizes = _each("expansions", expansions, stages), _each("kernel_sizes", kernel_sizes, stages)
        convs, norms = _each("glu_conv", glu_conv, stages), _each("glu_norm", glu_norm, stages)
        check(first >= 2, "dims", tuple(dims), "the stem starts with half of the first: at least 2")
        stem = nn.Sequential(_down(in_chans, first // 2), nn.GELU(), _down(first // 2, first))
        self.downsample_layers = nn.ModuleList([stem, *(_down(a, b) for a, b in pairwise(dims))])
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.stages = nn.ModuleList()
        for stage, dim in enumerate(dims):
            options = (kernel_sizes[stage], expansions[stage], layer_scale, convs[stage], norms[stage], bias)
            self.stages.append(nn.Sequential(*(Block(dim, *options, next(rates)) for _ in range(depths[stage]))))
        self.norm = nn.LayerNorm(dims[-1])
        self.head: nn.Module = self.make_classifier(num_classes)
        self.apply(_init)

    def stage(self, index: int, x: Tensor) -> Tensor:
        """Reduction and blocks of one stage."""
        blocks: Any = self.stages[index]
        return self.run(blocks, self.downsample_layers[index](x))

    def neck(self, x: Tensor) -> Tensor:
        """Layer norm of the pooled features."""
        y: Tensor = self.norm(x) if x.dim() == 2 else x
        return y


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@register_model("atconv")
def attnet_xxs(**options: Any) -> AttNet:
    """AttNet-XXS: 2.9 M parameters, 0.53 G multiply-adds at 224 (published)."""
    return AttNet((32, 64, 128, 240), (2, 2, 4, 2), **{"glu_norm": False, "layer_scale": False, **options})


@register_model("atconv")
def attnet_xs(**options: Any) -> AttNet:
    """AttNet-XS: 5.6 M parameters, 1.0 G multiply-adds."""
    return AttNet((40, 80, 160, 320), (2, 2, 7, 2), **{"glu_norm": False, **options})


@register_model("atconv")
def attnet_s(**options: Any) -> AttNet:
    """AttNet-S: 7.7 M parameters, 1.3 G multiply-adds."""
    return AttNet((40, 80, 160, 320), (2, 3, 10, 3), **{"glu_norm": False, "layer_scale": False, **options})


@register_model("atconv")
def attnet_t1(**options: Any) -> AttNet:
    """AttNet-T1: 13.7 M parameters, 2.4 G multiply-adds."""
    return AttNet((48, 96, 224, 384), (2, 3, 12, 3), **options)


@register_model("atconv")
def attnet_t2(**options: Any) -> AttNet:
    """AttNet-T2: 27.0 M parameters, 5.1 G multiply-adds, ImageNet-1K top-1 84.4 %."""
    return AttNet((64, 128, 288, 512), (3, 3, 16, 3), **options)


@register_model("atconv")
def attnet_t3(**options: Any) -> AttNet:
    """AttNet-T3: 49.2 M parameters, 9.4 G multiply-adds."""
    return AttNet((72, 144, 320, 576), (4, 4, 26, 4), **options)


@register_model("atconv")
def attnet_t4(**options: Any) -> AttNet:
    """AttNet-T4: 87.3 M parameters, 16.7 G multiply-adds."""
    return AttNet((96, 192, 384, 768), (5, 5, 28, 5), **options)


VARIANTS: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (attnet_xxs, attnet_xs, attnet_s, attnet_t1, attnet_t2, attnet_t3, attnet_t4)
}
