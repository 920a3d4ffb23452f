"""InceptionNeXt: ConvNeXt's layout with the inception depthwise convolution as token mixer and batch norm.

Yu, Zhou, Yan, Wang 2023, arXiv 2303.16900. Parameter names are the authors' and timm's
(``stages.S.blocks.B.token_mixer.dwconv_hw.weight``). Strides 16 and 8 are timm's: later downsamplings keep the size,
and the mixers that follow are dilated.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive
from torchconv.catalog import part
from torchconv.models._backbone import POOLS, Backbone, global_pool
from torchconv.models._registry import register_model
from torchconv.ops.inceptionnext import InceptionDWConv2d
from torchconv.ops.plain import PlainConv2d

Mixer = Callable[..., nn.Module]


class ConvMlp(nn.Module):
    """1 × 1 convolution to r·C channels, GELU, dropout, 1 × 1 convolution back."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.act = nn.GELU()
        self.drop = nn.Dropout(drop)
        self.fc2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → the same."""
        y: Tensor = self.fc2(self.drop(self.act(self.fc1(x))))
        return y


class MetaNeXtBlock(nn.Module):
    """One residual block: y = x + DropPath(γ · MLP(BN(mixer(x)))).

    Args:
        dim: channels C.
        mlp_ratio: width of the MLP over C.
        ls_init_value: initial γ; None or 0 leaves γ out.
        drop_path: probability in [0, 1) of skipping the block for a sample in training.
        dilation: of the mixer.
        token_mixer: called as ``token_mixer(dim, dilation=dilation)``.

    Shape:
        (N, C, H, W) → the same.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Reference: arXiv 2303.16900, equation (1) and figure 2.
    """

    def __init__(
        self,
        dim: int,
        mlp_ratio: float = 4,
        ls_init_value: float | None = 1e-6,
        drop_path: float = 0.0,
        dilation: int = 1,
        token_mixer: Mixer = InceptionDWConv2d,
    ) -> None:
        super().__init__()
        check_positive("dim", dim)
        check(int(mlp_ratio * dim) >= 1, "mlp_ratio", mlp_ratio, "leaves no hidden channels")
        check(0 <= drop_path < 1, "drop_path", drop_path, "must be at least 0 and below 1")
        self.token_mixer = token_mixer(dim, dilation=dilation)
        self.norm: nn.Module = nn.BatchNorm2d(dim)
        self.mlp = ConvMlp(dim, int(mlp_ratio * dim))
        self.gamma = nn.Parameter(torch.full((dim,), float(ls_init_value))) if ls_init_value else None
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        """Add the block's residual to ``x``."""
        y = self.mlp(self.norm(self.token_mixer(x)))
        scale = None if self.gamma is None else self.gamma.reshape(1, -1, 1, 1)
        if self.training and self.drop_path > 0:
            keep = x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(1 - self.drop_path) / (1 - self.drop_path)
            scale = keep if scale is None else scale * keep
        # Scaling and addition in one pass over the map.
        return x + y if scale is None else torch.addcmul(x, y, scale)

    def merge(self) -> MetaNeXtBlock:
        """The exact inference form: batch norm folded into the first 1 × 1 convolution, γ into the second."""
        block = copy.deepcopy(self).eval().requires_grad_(False)
        _fold_before(block.norm, block.mlp.fc1)
        block.norm = nn.Identity()
        if block.gamma is not None:
            fc2 = block.mlp.fc2
            gamma, weight, bias = block.gamma.double(), fc2.weight.double(), cast(Tensor, fc2.bias).double()
            _assign(fc2, weight * gamma.reshape(-1, 1, 1, 1), bias * gamma)
            block.gamma = None
        return block


class MetaNeXtStage(nn.Module):
    """Downsampling (batch norm, 2 × 2 convolution) unless ``downsample`` is None, then blocks."""

    def __init__(self, downsample: nn.Module | None, blocks: Sequence[MetaNeXtBlock]) -> None:
        super().__init__()
        self.downsample = downsample or nn.Identity()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C', H', W')."""
        y: Tensor = self.blocks(self.downsample(x))
        return y


class MlpHead(nn.Module):
    """Linear to ``mlp_ratio``·C, GELU, layer norm, dropout, linear to the classes (0: none), on pooled features."""

    def __init__(self, dim: int, num_classes: int, mlp_ratio: float = 3, drop: float = 0.0) -> None:
        super().__init__()
        self.in_features, self.num_features = dim, int(mlp_ratio * dim)
        self.fc1: nn.Module = nn.Linear(dim, self.num_features)
        self.act: nn.Module = nn.GELU()
        self.norm: nn.Module = nn.LayerNorm(self.num_features, eps=1e-6)
        self.drop = nn.Dropout(drop)
        self.fc2: nn.Module = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(N, C) → (N, classes)."""
        x = self.drop(self.norm(self.act(self.fc1(x))))
        return x if pre_logits else self.fc2(x)

    def reset(self, num_classes: int, reset_other: bool = False) -> None:
        """A new classifier; ``reset_other`` also removes the layers before it."""
        like = next(self.parameters(), torch.empty(0))
        if reset_other:
            self.fc1, self.act, self.norm = nn.Identity(), nn.Identity(), nn.Identity()
            self.num_features = self.in_features
        if num_classes > 0:
            self.fc2 = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
        else:
            self.fc2 = nn.Identity()


@part(
    "inceptionnext-net",
    paper="inceptionnext",
    kind="model",
    dims=(2,),
    keywords="MetaNeXt InceptionNeXt backbone classifier",
)
class MetaNeXt(Backbone):
    """InceptionNeXt, and its layout with any other token mixer.

    Args:
        in_chans: channels of the image.
        num_classes: outputs; 0 for the head's features.
        depths, dims: blocks and channels of each stage.
        mlp_ratios: one for each stage, or one for all.
        square_kernel_size, band_kernel_size, branch_ratio: of :class:`~torchconv.ops.inceptionnext.InceptionDWConv2d`.
        ls_init_value: initial γ of the blocks; None or 0 leaves it out.
        drop_rate: dropout before the classifier.
        drop_path_rate: drop path of the last block, rising linearly from 0.
        output_stride: 32, or 16, 8, 4 for dilation instead of the last strides.
        global_pool: "avg", "max" or "avgmax".
        token_mixer: called as ``token_mixer(dim, dilation=dilation)`` instead of the inception convolution.

    Shape:
        (N, in_chans, H, W) with H, W ≥ 32 → (N, num_classes).

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> net = MetaNeXt(num_classes=10, depths=(1, 1), dims=(16, 32), mlp_ratios=2)
        >>> net(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    Reference: arXiv 2303.16900, section 3 and table 1.
    """

    head_name = "head.fc2"

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        mlp_ratios: float | Sequence[float] = (4, 4, 4, 3),
        square_kernel_size: int = 3,
        band_kernel_size: int = 11,
        branch_ratio: float = 0.125,
        ls_init_value: float | None = 1e-6,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        output_stride: int = 32,
        token_mixer: Mixer | None = None,
        *,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        check_choice("global_pool", global_pool, POOLS[:3])
        check_positive("num_classes", num_classes, zero=True)
        check_positive("in_chans", in_chans)
        check(len(dims) > 0, "dims", tuple(dims), "needs an entry for each stage, at least one")
        check(all(d >= 0 for d in depths), "depths", tuple(depths), "entries must be at least 0")
        ratios = (mlp_ratios,) * len(depths) if isinstance(mlp_ratios, int | float) else tuple(mlp_ratios)
        check(len(dims) == len(depths), "dims", dims, f"give one width for each of the {len(depths)} stages")
        check(len(ratios) == len(depths), "mlp_ratios", mlp_ratios, f"give one for each of the {len(depths)} stages")
        check_choice("output_stride", output_stride, (4, 8, 16, 32))
        check(0 <= drop_path_rate < 1, "drop_path_rate", drop_path_rate, "must be at least 0 and below 1")
        mixer = token_mixer or partial(
            InceptionDWConv2d,
            kernel_size=band_kernel_size,
            square_kernel_size=square_kernel_size,
            branch_ratio=branch_ratio,
        )
        self.in_chans, self.num_classes, self.global_pool = in_chans, num_classes, global_pool
        self.stem: nn.Module = nn.Sequential(nn.Conv2d(in_chans, dims[0], 4, stride=4), nn.BatchNorm2d(dims[0]))
        total, block = sum(depths), 0
        reached, dilation = 4, 1
        stages = []
        self.feature_info = []
        for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            downsample = None
            if i > 0:
                if reached >= output_stride:
                    dilation *= 2
                    # Half of the mixers' dilation, never above 2 (timm): the size is kept by padding.
                    conv: Any = PlainConv2d(dims[i - 1], dim, 2, padding="same", dilation=min(dilation // 2, 2))
                else:
                    reached *= 2
                    conv = nn.Conv2d(dims[i - 1], dim, 2, stride=2)
                downsample = nn.Sequential(nn.BatchNorm2d(dims[i - 1]), conv)
            rates = [drop_path_rate * j / max(total - 1, 1) for j in range(block, block + depth)]
            blocks = [MetaNeXtBlock(dim, ratios[i], ls_init_value, rate, dilation, mixer) for rate in rates]
            stages.append(MetaNeXtStage(downsample, blocks))
            self.feature_info.append({"num_chs": dim, "reduction": reached, "module": f"stages.{i}"})
            block += depth
        self.stages = nn.Sequential(*stages)
        self.num_features = dims[-1]
        self.head = MlpHead(self.num_features, num_classes, drop=drop_rate)
        for m in self.modules():
            if isinstance(m, nn.Conv2d | nn.Linear | PlainConv2d):
                nn.init.trunc_normal_(m.weight, std=0.02)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)

    def stage(self, index: int, x: Tensor) -> Tensor:
        """Reduction and blocks of one stage; the stem comes before the first."""
        stage: Any = self.stages[index]
        x = self.stem(x) if index == 0 else x
        y: Tensor = self.run(stage.blocks, stage.downsample(x)) if self.recomputes else stage(x)
        return y

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The head on a map of the last stage; ``pre_logits`` stops before the classifier."""
        y: Tensor = self.head(global_pool(x, self.global_pool), pre_logits)
        return y

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """A new ``head.fc2`` (0: none); ``reset_other`` also removes the head's other layers."""
        check_positive("num_classes", num_classes, zero=True)
        if global_pool is not None:
            check_choice("global_pool", global_pool, POOLS[:3])
            self.global_pool = global_pool
        self.num_classes = num_classes
        self.head.reset(num_classes, reset_other)

    def merge(self) -> MetaNeXt:
        """The exact inference form: every batch norm folded into the convolution beside it, γ into the MLPs.

        A batch norm before a zero-padded downsampling (``output_stride`` < 32) stays: its shift does not reach the
        padding, so it has no exact folded form.
        """
        net: Any = copy.deepcopy(self).eval().requires_grad_(False)
        conv, norm = net.stem
        scale, shift = _affine(norm)
        weight, bias = conv.weight.double(), conv.bias.double()
        _assign(conv, weight * scale.reshape(-1, 1, 1, 1), bias * scale + shift)
        net.stem = nn.Sequential(conv)
        for stage in net.stages:
            if isinstance(stage.downsample, nn.Sequential) and isinstance(stage.downsample[1], nn.Conv2d):
                _fold_before(stage.downsample[0], stage.downsample[1])
                stage.downsample[0] = nn.Identity()
            stage.blocks = nn.Sequential(*(block.merge() for block in stage.blocks))
        merged: MetaNeXt = net
        return merged


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Batch norm in inference as scale and shift, in double precision."""
    scale = norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)
    return scale, norm.bias.double() - norm.running_mean.double() * scale


def _fold_before(norm: Any, conv: nn.Conv2d) -> None:
    scale, shift = _affine(norm)
    weight = conv.weight.double()
    moved = F.linear(shift, weight.sum((2, 3)))
    _assign(conv, weight * scale.reshape(1, -1, 1, 1), moved if conv.bias is None else conv.bias.double() + moved)


def _assign(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    with torch.no_grad():
        conv.weight.copy_(weight)
        cast(Tensor, conv.bias).copy_(bias)


@register_model("inceptionnext")
def inception_next_atto(**options: Any) -> MetaNeXt:
    """InceptionNeXt-A, 4.16 million parameters, 0.50 GMACs, top-1 75.3 % on ImageNet (published)."""
    settings = {"depths": (2, 2, 6, 2), "dims": (40, 80, 160, 320), "band_kernel_size": 9, "branch_ratio": 0.25}
    return MetaNeXt(**{**settings, **options})


@register_model("inceptionnext")
def inception_next_tiny(**options: Any) -> MetaNeXt:
    """InceptionNeXt-T, 28.06 million parameters, 4.19 GMACs, top-1 82.3 %."""
    return MetaNeXt(**options)


@register_model("inceptionnext")
def inception_next_small(**options: Any) -> MetaNeXt:
    """InceptionNeXt-S, 49.37 million parameters, 8.36 GMACs, top-1 83.5 %."""
    return MetaNeXt(**{"depths": (3, 3, 27, 3), **options})


@register_model("inceptionnext")
def inception_next_base(**options: Any) -> MetaNeXt:
    """InceptionNeXt-B, 86.67 million parameters, 14.84 GMACs, top-1 84.0 %."""
    return MetaNeXt(**{"depths": (3, 3, 27, 3), "dims": (128, 256, 512, 1024), **options})


VARIANTS: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (inception_next_atto, inception_next_tiny, inception_next_small, inception_next_base)
}
