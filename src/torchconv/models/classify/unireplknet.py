"""UniRepLKNet: a classifier and backbone whose few 13 × 13 depthwise kernels give the receptive field.

X. Ding, Y. Zhang et al., CVPR 2024, arXiv 2311.15599; Y. Zhang, X. Ding, X. Yue, TPAMI 2025, arXiv 2410.08049.

Depth comes from cheap 3 × 3 blocks between the large-kernel ones. Stem of two strided 3 × 3 convolutions, four stages
at strides 4, 8, 16, 32. ``merge()`` gives the inference network: no batch norm, no branch (T: 31.7 M → 31.0 M
parameters, 4.9 G multiply-adds at 224 × 224). Names of parameters are those of the authors' checkpoints.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive
from torchconv.catalog import part
from torchconv.models._backbone import POOLS, Backbone
from torchconv.models._registry import register_model
from torchconv.models.classify.unireplknet_block import LayerNorm2d, UniRepLKNetBlock
from torchconv.ops._common import check_input

Kernels = Sequence[Sequence[int]]


def _alternating(depth: int, period: int) -> tuple[int, ...]:
    return tuple(13 if i % period == 0 else 3 for i in range(depth))


# Kernel sizes of every block, by the depths of the four stages.
DEFAULT_KERNELS: dict[tuple[int, ...], tuple[tuple[int, ...], ...]] = {
    (2, 2, 6, 2): ((3,) * 2, (13,) * 2, (13,) * 6, (13,) * 2),
    (2, 2, 8, 2): ((3,) * 2, (13,) * 2, (13,) * 8, (13,) * 2),
    (3, 3, 18, 3): ((3,) * 3, (13,) * 3, _alternating(18, 2), (13,) * 3),
    (3, 3, 27, 3): ((3,) * 3, (13,) * 3, _alternating(27, 3), (13,) * 3),
}


@part(
    "unireplknet-net",
    paper="unireplknet",
    kind="model",
    dims=(2,),
    merges="self",
    keywords="backbone image classification ImageNet large kernel audio video point cloud time series features",
)
class UniRepLKNet(Backbone):
    """The four-stage network, as a classifier or as a backbone that returns four feature maps.

    Args:
        in_chans: input channels.
        num_classes: classes; 0 returns the normalised pooled features.
        depths: blocks of the four stages.
        dims: channels of the four stages.
        drop_path_rate: drop path of the last block, rising linearly from 0.
        layer_scale_init_value: start of every block's γ; None, 0 or a negative number removes it.
        head_init_scale: factor on the initial classifier weights.
        kernel_sizes: one kernel size a block, by stage; None takes the paper's for the paper's depths.
        deploy: build the merged form.
        features_only: return the outputs of the four stages (strides 4, 8, 16, 32), each through a layer norm, and
            have no classifier: the authors' form for detection and segmentation.
        global_pool: "avg", "max", "avgmax" or "".

    Shape:
        (N, in_chans, H, W) → (N, num_classes), or four maps (N, dims[i], ⌈H/4·2ⁱ⌉, ⌈W/4·2ⁱ⌉).

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> net = UniRepLKNet(3, 5, (1, 1, 1, 1), (8, 8, 8, 8), kernel_sizes=((3,), (7,), (13,), (5,))).eval()
        >>> net(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 5])

    Reference: arXiv 2311.15599, section 3.1 and table 1; arXiv 2410.08049.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: Sequence[int] = (3, 3, 27, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float | None = 1e-6,
        head_init_scale: float = 1.0,
        kernel_sizes: Kernels | None = None,
        deploy: bool = False,
        features_only: bool = False,
        *,
        global_pool: str = "avg",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_choice("global_pool", global_pool, POOLS)
        depths, dims = tuple(depths), tuple(dims)
        check_positive("in_chans", in_chans)
        check_positive("num_classes", num_classes, zero=True)
        check(len(depths) == 4 and min(depths) >= 0, "depths", depths, "must give the blocks of four stages")
        check(len(dims) == 4 and min(dims) >= 4, "dims", dims, "must give the channels of four stages, at least 4 each")
        check(0 <= drop_path_rate < 1, "drop_path_rate", drop_path_rate, "must be at least 0 and below 1")
        if kernel_sizes is None:
            check(depths in DEFAULT_KERNELS, "kernel_sizes", None, f"depths {depths} have no default; give one a block")
            kernel_sizes = DEFAULT_KERNELS[depths]
        nested = all(isinstance(stage, Sequence) for stage in kernel_sizes)
        check(nested, "kernel_sizes", kernel_sizes, "must give a list of kernel sizes for every stage")
        kernels = tuple(tuple(stage) for stage in kernel_sizes)
        check(tuple(map(len, kernels)) == depths, "kernel_sizes", kernels, f"must give one a block of depths {depths}")
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_chans, self.num_classes, self.depths, self.dims = in_chans, num_classes, depths, dims
        self.kernel_sizes, self.deploy, self.features_only = kernels, deploy, features_only
        self.head_init_scale, self.global_pool, self.num_features = head_init_scale, global_pool, dims[-1]
        self.feature_info = [{"num_chs": c, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, c in enumerate(dims)]

        def reduce(channels_in: int, channels_out: int) -> list[nn.Module]:
            conv = nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1, **options)
            return [conv, LayerNorm2d(channels_out, **options)]

        half = dims[0] // 2
        stem = nn.Sequential(*reduce(in_chans, half), nn.GELU(), *reduce(half, dims[0]))
        rest = [nn.Sequential(*reduce(a, b)) for a, b in itertools.pairwise(dims)]
        self.downsample_layers = nn.ModuleList([stem, *rest])
        total = sum(depths)
        rates = iter([drop_path_rate * i / max(total - 1, 1) for i in range(total)])
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(UniRepLKNetBlock(c, k, next(rates), layer_scale_init_value, deploy, **options) for k in stage)
            )
            for c, stage in zip(dims, kernels, strict=True)
        )
        if features_only:
            for i, channels in enumerate(dims):
                self.add_module(f"norm{i}", LayerNorm2d(channels, **options))
        else:
            self.norm = nn.LayerNorm(dims[-1], eps=1e-6, **options)
            self.head: Any = self.make_classifier(num_classes).to(device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Convolutions and linear layers: normal with σ = 0.02 cut at ±2, zero biases. The head times its scale."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if not self.features_only and self.num_classes:
            with torch.no_grad():
                self.head.weight.mul_(self.head_init_scale)

    def stage(self, index: int, x: Tensor) -> Tensor:
        """Reduction and blocks of one stage."""
        if index == 0:
            check_input(x, self.in_chans, 2)
        blocks: Any = self.stages[index]
        return self.run(blocks, self.downsample_layers[index](x))

    def neck(self, x: Tensor) -> Tensor:
        """Layer norm of the pooled features."""
        return x if self.features_only or x.dim() > 2 else self.norm(x)

    def forward(self, x: Tensor) -> Any:
        """Logits, or the list of four feature maps."""
        if not self.features_only:
            return super().forward(x)
        maps = self.forward_intermediates(x, intermediates_only=True)
        return [getattr(self, f"norm{i}")(y) for i, y in enumerate(maps)]

    def merge(self) -> UniRepLKNet:
        """The same map, with the running statistics, as a ``deploy`` network in eval mode."""
        with torch.device("meta"):
            net = UniRepLKNet(
                self.in_chans,
                self.num_classes,
                self.depths,
                self.dims,
                kernel_sizes=self.kernel_sizes,
                deploy=True,
                features_only=self.features_only,
                global_pool=self.global_pool,
            )
        state = {n: t.detach().clone() for n, t in self.state_dict().items() if not n.startswith("stages.")}
        for name, module in self.named_modules():
            if isinstance(module, UniRepLKNetBlock):
                state.update({f"{name}.{n}": t for n, t in module.merged_state().items()})
        net.load_state_dict(state, assign=True)
        return net.eval()


VARIANTS: dict[str, dict[str, Any]] = {
    "unireplknet_a": {"depths": (2, 2, 6, 2), "dims": (40, 80, 160, 320)},
    "unireplknet_f": {"depths": (2, 2, 6, 2), "dims": (48, 96, 192, 384)},
    "unireplknet_p": {"depths": (2, 2, 6, 2), "dims": (64, 128, 256, 512)},
    "unireplknet_n": {"depths": (2, 2, 8, 2), "dims": (80, 160, 320, 640)},
    "unireplknet_t": {"depths": (3, 3, 18, 3), "dims": (80, 160, 320, 640)},
    "unireplknet_s": {"depths": (3, 3, 27, 3), "dims": (96, 192, 384, 768)},
    "unireplknet_b": {"depths": (3, 3, 27, 3), "dims": (128, 256, 512, 1024)},
    "unireplknet_l": {"depths": (3, 3, 27, 3), "dims": (192, 384, 768, 1536)},
    "unireplknet_xl": {"depths": (3, 3, 27, 3), "dims": (256, 512, 1024, 2048)},
}


def _build(variant: str, options: dict[str, Any]) -> UniRepLKNet:
    return UniRepLKNet(**{**VARIANTS[variant], **options})


@register_model("unireplknet")
def unireplknet_a(**options: Any) -> UniRepLKNet:
    """UniRepLKNet-A: 4.4 M parameters merged, 0.6 G multiply-adds at 224, ImageNet-1K top-1 77.0 %."""
    return _build("unireplknet_a", options)


@register_model("unireplknet")
def unireplknet_f(**options: Any) -> UniRepLKNet:
    """UniRepLKNet-F: 6.2 M parameters merged, 0.9 G multiply-adds at 224, ImageNet-1K top-1 78.6 %."""
    return _build("unireplknet_f", options)


@register_model("unireplknet")
def unireplknet_p(**options: Any) -> UniRepLKNet:
    """UniRepLKNet-P: 10.7 M parameters merged, 1.6 G multiply-adds at 224, ImageNet-1K top-1 80.2 %."""
    return _build("unireplknet_p", options)


@register_model("unireplknet")
def unireplknet_n(**options: Any) -> UniRepLKNet:
    """UniRepLKNet-N: 18.3 M parameters merged, 2.8 G multiply-adds at 224, ImageNet-1K top-1 81.6 %."""
    return _build("unireplknet_n", options)


@register_model("unireplknet")
def unireplknet_t(**options: Any) -> UniRepLKNet:
    """UniRepLKNet-T: 31.0 M parameters merged, 4.9 G multiply-adds at 224, ImageNet-1K top-1 83.2 %."""
    return _build("unireplknet_t", options)


@register_model("unireplknet")
def unireplknet_s(**options: Any) -> UniRepLKNet:
    """UniRepLKNet-S: 55.6 M parameters merged, 9.1 G multiply-adds at 224, ImageNet-1K top-1 83.9 %."""
    return _build("unireplknet_s", options)


@register_model("unireplknet")
def unireplknet_b(**options: Any) -> UniRepLKNet:
    """UniRepLKNet-B: 98.0 M parameters merged, 47.2 G multiply-adds at 384, top-1 87.4 % (22K pre-training)."""
    return _build("unireplknet_b", options)


@register_model("unireplknet")
def unireplknet_l(**options: Any) -> UniRepLKNet:
    """UniRepLKNet-L: 218.5 M parameters merged, 105.4 G multiply-adds at 384, top-1 87.9 % (22K pre-training)."""
    return _build("unireplknet_l", options)


@register_model("unireplknet")
def unireplknet_xl(**options: Any) -> UniRepLKNet:
    """UniRepLKNet-XL: 386.5 M parameters merged, 186.8 G multiply-adds at 384, top-1 88.0 % (22K pre-training)."""
    return _build("unireplknet_xl", options)


def read_official(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Options of the network that a checkpoint of the authors belongs to: its merged form has no batch norms."""
    blocks = [n for n in state if n.startswith("stages.")]
    return {
        "deploy": not any(n.endswith("running_mean") for n in blocks),
        "features_only": "norm0.weight" in state,
    }


def layer_group(name: str) -> int:
    """The layer-decay group of a parameter in the paper's fine-tuning: learning rate = base · 0.8^(13 − group).

    Stem 0; stage 1 blocks 1; stage 2 blocks and the reduction before it 2; block i of stage 3 is 3 + i // 3 (the
    reduction before it 3); stage 4 and its reduction 12; everything after the stages 13.

    Args:
        name: parameter name in :class:`UniRepLKNet`.
    """
    found = re.match(r"(downsample_layers|stages)\.(\d)\.(\d+)", name)
    if found is None:
        return 13
    kind, stage, block = found[1], int(found[2]), int(found[3])
    if kind == "downsample_layers":
        return (0, 2, 3, 12)[stage]
    return (1, 2, 3 + block // 3, 12)[stage]
