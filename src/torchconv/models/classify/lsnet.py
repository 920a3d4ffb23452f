"""LSNet: a lightweight backbone of large-small convolutions, with attention on its smallest map.

Wang, Chen, Lin, Han, Ding 2025, "LSNet: See Large, Focus Small", arXiv 2503.23135 (CVPR 2025).

Stem of three strided convolutions (stride 8), four stages with strides 8, 16, 32, 64. A block is a mixer and a
feed-forward part. Even blocks mix with a re-parameterisable 3 × 3 depthwise convolution and a squeeze-excite gate; odd
ones with a large-small convolution, in the fourth stage with attention.

| variant | parameters | merged     | MACs at 224 |
|---------|------------|------------|-------------|
| t       | 11,409,832 | 11,370,488 | 0.32 G      |
| s       | 16,146,304 | 16,098,232 | 0.54 G      |
| b       | 23,313,608 | 23,249,320 | 1.24 G      |
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive
from torchconv.catalog import part
from torchconv.models._backbone import POOLS, Backbone
from torchconv.models._backbone import global_pool as pool
from torchconv.models._registry import register_model
from torchconv.ops._common import Size, make_conv, ntuple
from torchconv.ops.lsnet import ConvBN, LSConv2d


class RepVGGDW(nn.Module):
    """A 3 × 3 and a 1 × 1 depthwise convolution, each with a batch norm, and the identity, summed.

    Args:
        channels: C ≥ 1.

    Shape:
        (N, C, H, W) → the same.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        check_positive("channels", channels)
        self.conv = ConvBN(channels, channels, 3, padding=1, groups=channels)
        self.conv1 = ConvBN(channels, channels, 1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """Sum of the three branches."""
        y: Tensor = self.conv(x) + self.conv1(x) + x
        return y

    def merge(self) -> nn.Module:
        """One 3 × 3 depthwise convolution with bias: the 1 × 1 branch and the identity sit in its centre tap."""
        kernel, bias = self.conv.folded(torch.float64)
        point, shift = self.conv1.folded(torch.float64)
        kernel = kernel + F.pad(point + 1, (1, 1, 1, 1))
        dtype = self.conv.c.weight.dtype
        return make_conv(kernel.to(dtype), (bias + shift).to(dtype), padding=1, groups=kernel.shape[0])


class Attention(nn.Module):
    """Multi-head attention on a small map of fixed size, with a learned bias for each offset |Δy|, |Δx|.

    softmax(qᵀk / √d + bias) applied to v; q passes a 3 × 3 depthwise convolution first; ReLU and a 1 × 1 convolution
    follow.

    Args:
        dim: C.
        key_dim: d, channels of a head's queries and keys.
        num_heads: heads.
        attn_ratio: values have int(attn_ratio · d) channels a head.
        resolution: size of the map, int or (H, W).

    Shape:
        (N, C, H, W) → the same.

    Raises:
        ValueError: an argument is out of range, or the map has another size.
    """

    def __init__(
        self, dim: int, key_dim: int = 16, num_heads: int = 8, attn_ratio: float = 4.0, resolution: Size = 14
    ) -> None:
        super().__init__()
        check_positive("dim", dim)
        check_positive("key_dim", key_dim)
        check_positive("num_heads", num_heads)
        value_dim = int(attn_ratio * key_dim)
        check(value_dim >= 1, "attn_ratio", attn_ratio, f"leaves no value channels with key_dim={key_dim}")
        self.key_dim, self.num_heads, self.value_dim = key_dim, num_heads, value_dim
        self.resolution = height, width = ntuple("resolution", resolution, 2)
        queries, values = key_dim * num_heads, value_dim * num_heads
        self.qkv = ConvBN(dim, 2 * queries + values)
        self.proj = nn.Sequential(nn.ReLU(), ConvBN(values, dim, bn_weight=0.0))
        self.dw = ConvBN(queries, queries, 3, padding=1, groups=queries)
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, height * width))
        rows = torch.arange(height).repeat_interleave(width)
        columns = torch.arange(width).repeat(height)
        offsets = (rows[:, None] - rows).abs() * width + (columns[:, None] - columns).abs()
        self.attention_bias_idxs: Tensor
        self.register_buffer("attention_bias_idxs", offsets)

    def param_options(self) -> dict[str, dict[str, float]]:
        """The biases are not decayed."""
        return {"attention_biases": {"weight_decay": 0.0}}

    def forward(self, x: Tensor) -> Tensor:
        """Attend over all positions."""
        if tuple(x.shape[2:]) != self.resolution:
            size = "×".join(map(str, self.resolution))
            raise ValueError(f"x of shape {tuple(x.shape)}: the attention biases are for maps of {size}; set img_size")
        queries, values = self.key_dim * self.num_heads, self.value_dim * self.num_heads
        q, k, v = self.qkv(x).split([queries, queries, values], 1)
        q, k, v = (t.flatten(2).unflatten(1, (self.num_heads, -1)).transpose(2, 3) for t in (self.dw(q), k, v))
        # Gathered anew in each call: a cached table would miss weights loaded later and the gradient in eval mode.
        bias = self.attention_biases[:, self.attention_bias_idxs].to(q.dtype)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        out: Tensor = self.proj(y.transpose(2, 3).flatten(1, 2).unflatten(2, self.resolution))
        return out


class SqueezeExcite(nn.Module):
    """Channel gate: the means over space pass two 1 × 1 convolutions and a sigmoid.

    Args:
        channels: C; inner channels are C/4 rounded to a multiple of 8, at least 8.

    Shape:
        (N, C, H, W) → the same.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(8, int(channels * 0.25 + 4) // 8 * 8)
        self.fc1 = nn.Conv2d(channels, inner, 1)
        self.fc2 = nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Scale each channel."""
        means = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(means))))


class Residual(nn.Module):
    """x + m(x)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.m = module

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch."""
        y: Tensor = x + self.m(x)
        return y


class FeedForward(nn.Module):
    """1 × 1 convolution to ``hidden`` channels, ReLU, and back; the last batch norm starts at scale 0."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.pw1 = ConvBN(channels, hidden)
        self.pw2 = ConvBN(hidden, channels, bn_weight=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Apply both layers."""
        y: Tensor = self.pw2(F.relu(self.pw1(x)))
        return y


class Block(nn.Module):
    """Mixer, gate (even blocks), feed-forward part.

    Args:
        dim: channels.
        index: depth in the stage: even blocks mix with :class:`RepVGGDW`, odd ones with ``mixer``.
        mixer: builds the odd blocks' mixer.
    """

    def __init__(self, dim: int, index: int, mixer: Callable[[], nn.Module]) -> None:
        super().__init__()
        even = index % 2 == 0
        self.mixer = RepVGGDW(dim) if even else mixer()
        self.se = SqueezeExcite(dim) if even else nn.Identity()
        self.ffn = Residual(FeedForward(dim, 2 * dim))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        y: Tensor = self.ffn(self.se(self.mixer(x)))
        return y


class Head(nn.Module):
    """Batch norm and a linear classifier."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(channels)
        self.l = nn.Linear(channels, num_classes)
        nn.init.trunc_normal_(self.l.weight, std=0.02)
        nn.init.zeros_(self.l.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the features (N, C)."""
        y: Tensor = self.l(self.bn(x))
        return y

    def merge(self) -> nn.Linear:
        """One linear layer, exact for the running statistics."""
        bn, linear = copy.deepcopy(self.bn).double(), copy.deepcopy(self.l).double()
        assert bn.running_var is not None
        assert bn.running_mean is not None
        scale = bn.weight * torch.rsqrt(bn.running_var + bn.eps)
        shift = bn.bias - bn.running_mean * scale
        with torch.no_grad():
            linear.bias.add_(linear.weight @ shift)
            linear.weight.mul_(scale)
        return linear.to(self.l.weight.dtype).eval()


@part(
    "lsnet-net",
    paper="lsnet",
    kind="model",
    dims=(2,),
    merges="self",
    keywords="LSNet lightweight backbone classifier edge real time",
)
class LSNet(Backbone):
    """LSNet classifier.

    Args:
        dims, depths: channels and blocks of each stage; a depth may be 0.
        num_heads, key_dim: of each stage's attention; only the fourth stage has any.
        num_classes: logits.
        in_chans: channels of the image.
        img_size: size of the images, int or (H, W): the attention's biases belong to one size.
        patch_size: stride of the stem as far as ``img_size`` is concerned; 8.
        drop_path_rate: only 0: the published network has no drop path.
        global_pool: "avg", "max" or "avgmax".
        distillation: a second classifier ``head_dist``; in training both logits are returned, in eval their mean.

    Shape:
        (N, in_chans, H, W) → (N, num_classes).

    Raises:
        ValueError: stage lists of different lengths, or images of another size.
    """

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 256, 384),
        depths: Sequence[int] = (0, 2, 8, 10),
        num_heads: Sequence[int] = (3, 3, 3, 4),
        key_dim: Sequence[int] = (16, 16, 16, 16),
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: Size = 224,
        patch_size: int = 8,
        distillation: bool = False,
        *,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        check(drop_path_rate == 0, "drop_path_rate", drop_path_rate, "LSNet has no drop path; leave it at 0")
        check_choice("global_pool", global_pool, POOLS[:3])
        check_positive("num_classes", num_classes, zero=True)
        check_positive("in_chans", in_chans)
        check_positive("patch_size", patch_size)
        stages = len(dims)
        check(stages > 0, "dims", tuple(dims), "needs an entry for each stage, at least one")
        self.in_chans, self.num_classes, self.num_features = in_chans, num_classes, dims[-1]
        self.global_pool = global_pool
        self.feature_info = [
            {"num_chs": c, "reduction": 8 * 2**i, "module": f"blocks{i + 1}"} for i, c in enumerate(dims)
        ]
        for name, values in (("depths", depths), ("num_heads", num_heads), ("key_dim", key_dim)):
            check(len(values) == stages, name, tuple(values), f"needs one entry a stage, as dims has ({stages})")
            low = 0 if name == "depths" else 1
            check(all(v >= low for v in values), name, tuple(values), f"entries must be at least {low}")
        check(dims[0] >= 4, "dims", tuple(dims), "the stem starts with a quarter of the first: at least 4")
        quarter, half = dims[0] // 4, dims[0] // 2
        self.patch_embed = nn.Sequential(
            ConvBN(in_chans, quarter, 3, 2, 1),
            nn.ReLU(),
            ConvBN(quarter, half, 3, 2, 1),
            nn.ReLU(),
            ConvBN(half, dims[0], 3, 2, 1),
        )
        size = tuple(s // patch_size for s in ntuple("img_size", img_size, 2))
        self.stages = stages
        for stage, dim in enumerate(dims):
            layers: list[nn.Module] = []
            if stage:
                previous = dims[stage - 1]
                layers += [ConvBN(previous, previous, 3, 2, 1, groups=previous), ConvBN(previous, dim)]
                size = tuple((s - 1) // 2 + 1 for s in size)
            heads, keys = num_heads[stage], key_dim[stage]
            mixer: Callable[[], nn.Module] = partial(LSConv2d, dim)
            if stage == 3:
                mixer = partial(_attention, dim, keys, heads, dim / (keys * heads), size)
            layers += [Block(dim, index, mixer) for index in range(depths[stage])]
            setattr(self, f"blocks{stage + 1}", nn.Sequential(*layers))
        self.head: nn.Module = self.make_classifier(num_classes)
        self.head_dist: nn.Module | None = self.make_classifier(num_classes) if distillation and num_classes else None

    def stage(self, index: int, x: Tensor) -> Tensor:
        """Blocks of one stage; the stem comes before the first, the reduction is the first two layers of the others."""
        return self.run(getattr(self, f"blocks{index + 1}"), self.patch_embed(x) if index == 0 else x)

    def make_classifier(self, num_classes: int) -> nn.Module:
        """Batch norm and a linear layer."""
        return Head(self.num_features, num_classes) if num_classes else nn.Identity()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New classifiers, of distillation too; 0 removes both."""
        super().reset_classifier(num_classes, global_pool)
        if self.head_dist is not None:
            first = next(self.parameters())
            self.head_dist = self.make_classifier(num_classes).to(first.device, first.dtype) if num_classes else None

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """Pooling and logits; in training with distillation the pair (head, head_dist), in eval their mean."""
        if self.head_dist is None or pre_logits:
            return super().forward_head(x, pre_logits)
        features = pool(x, self.global_pool)
        both = self.head(features), self.head_dist(features)
        return both if self.training else (both[0] + both[1]) / 2

    def merge(self) -> LSNet:
        """The inference form: every batch norm folded away, branches and the two classifiers joined."""
        merged = copy.deepcopy(self).eval()
        if isinstance(self.head, Head) and isinstance(self.head_dist, Head):
            first, second = self.head.merge(), self.head_dist.merge()
            with torch.no_grad():
                first.weight.add_(second.weight).div_(2)
                first.bias.add_(second.bias).div_(2)
            merged.head, merged.head_dist = first, None
        _merge_children(merged)
        return merged


def _attention(dim: int, key_dim: int, num_heads: int, ratio: float, resolution: tuple[int, ...]) -> nn.Module:
    return Residual(Attention(dim, key_dim, num_heads, ratio, resolution))


def _merge_children(module: nn.Module) -> None:
    for name, child in module.named_children():
        merge = getattr(child, "merge", None)
        if callable(merge):
            setattr(module, name, merge())
        else:
            _merge_children(child)


def read_official(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Options of the network that a checkpoint of the authors belongs to: the image size, and a second classifier."""
    options: dict[str, Any] = {"distillation": any(n.startswith("head_dist.") for n in state)}
    sides = [t.shape[0] for n, t in state.items() if n.endswith("attention_bias_idxs")]
    if sides:  # positions of the last map, whose side is the image's over 64, rounded up at each stride
        options["img_size"] = 64 * math.isqrt(int(sides[0]))
    return options


@register_model("lsnet")
def lsnet_t(**options: Any) -> LSNet:
    """LSNet-T: 11.4 M parameters, 0.3 G multiply-adds at 224, ImageNet-1K top-1 74.9 %."""
    return LSNet((64, 128, 256, 384), (0, 2, 8, 10), **options)


@register_model("lsnet")
def lsnet_s(**options: Any) -> LSNet:
    """LSNet-S: 16.1 M parameters, 0.5 G multiply-adds at 224, ImageNet-1K top-1 77.8 %."""
    return LSNet((96, 192, 320, 448), (1, 2, 8, 10), **options)


@register_model("lsnet")
def lsnet_b(**options: Any) -> LSNet:
    """LSNet-B: 23.2 M parameters, 1.3 G multiply-adds at 224, ImageNet-1K top-1 80.3 %."""
    return LSNet((128, 256, 384, 512), (4, 6, 8, 10), **options)


VARIANTS: dict[str, Callable[..., Any]] = {f.__name__: f for f in (lsnet_t, lsnet_s, lsnet_b)}
