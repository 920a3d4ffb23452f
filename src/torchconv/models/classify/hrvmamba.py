"""HRVMamba: four parallel resolutions all the way, mixed by selective scans; a backbone for poses and segmentation.

H. Zhang et al. 2024, "HRVMamba: High-Resolution Visual State Space Model for Dense Prediction", arXiv 2410.03174.

A stem takes the image to a quarter of its side. Stages of one more resolution each then run DVSS blocks on every
resolution and add what each gives to all others, as HRNet (arXiv 1908.07919) and HRFormer (arXiv 2110.09408) do:

    x_i ← relu(Σ_j f_ij(blocks_j(x_j))),    resolution i at stride 4·2ⁱ

The classifier joins the four maps by strided convolutions, most of the parameters of the small networks: of Nano's
12.3 M the backbone has 0.7 M. Names of parameters are those of the authors' checkpoints, but for their ``neck``, which
is ``fuse_scales`` here (:func:`convert_official`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive
from torchconv.catalog import part
from torchconv.models._backbone import POOLS, Backbone, resolve_indices
from torchconv.models._registry import register_model
from torchconv.models.classify.hrvmamba_block import HRModule
from torchconv.models.classify.hrvmamba_neck import Bottleneck, FuseScales
from torchconv.ops._common import check_input

Blocks = int | Sequence[int | Sequence[int]]


def _entry(source: int, target: int, stride: int, options: dict[str, Any]) -> list[nn.Module]:
    conv = nn.Conv2d(source, target, 3, stride, 1, bias=False, **options)
    return [conv, nn.BatchNorm2d(target, **options), nn.ReLU()]


def _transition(before: Sequence[int], after: Sequence[int], options: dict[str, Any]) -> nn.ModuleList:
    """To the resolutions of the next stage: a 3 × 3 where the channels change, and one with stride 2 for a new one."""
    layers: list[nn.Module] = []
    for i, channels in enumerate(after):
        if i >= len(before):
            layers.append(nn.Sequential(nn.Sequential(*_entry(before[-1], channels, 2, options))))
        elif channels != before[i]:
            layers.append(nn.Sequential(*_entry(before[i], channels, 1, options)))
        else:
            layers.append(nn.Identity())
    return nn.ModuleList(layers)


@part(
    "hrvmamba-net",
    paper="hrvmamba",
    kind="model",
    dims=(2,),
    keywords="backbone high resolution HRNet HRFormer Mamba pose segmentation dense prediction classifier ImageNet",
)
class HRVMamba(Backbone):
    """The high-resolution network, as a classifier or as a backbone that returns one map for each resolution.

    Args:
        in_chans: input channels.
        num_classes: classes; 0 returns the pooled features.
        channels: of the resolutions, the finest first, multiples of 4; four as published.
        stage1_channels: width of the bottlenecks before the first transition, which give four times as many.
        stage1_blocks: how many of them.
        modules: modules of the stages of two, three, … resolutions.
        blocks: blocks on each resolution of a module; one number, or for each stage a number or one a resolution.
        local: the blocks of Nano and Tiny, see :class:`torchconv.models.classify.hrvmamba_block.DVSSBlock`.
        drop_path_rate: drop path of the last block, rising linearly from 0; published 0.1 (Nano, Tiny) and 0.2.
        dense: no classifier and nothing that it needs; the network then returns the list of maps.
        multiscale_output: give all resolutions, else only the finest; False only with ``dense``.
        stem_channels: of the two strided convolutions at the start.
        global_pool: "avg", "max", "avgmax" or "".
        options: further arguments of the blocks: mlp_ratio, ratio, states, rank, gated, head_kernel, backend.

    Shape:
        (N, in_chans, H, W) → (N, num_classes), or with ``dense`` maps (N, channels[i], ⌈H / 4·2ⁱ⌉, ⌈W / 4·2ⁱ⌉). Any
        H and W from 1; the sides need not divide by 32.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> import torch
        >>> net = HRVMamba(3, 5, (8, 12, 16, 20), 8, modules=(1, 1, 1), blocks=1, dense=True).eval()
        >>> [tuple(y.shape[1:]) for y in net(torch.zeros(1, 3, 40, 64))]
        [(8, 10, 16), (12, 5, 8), (16, 3, 4), (20, 2, 2)]

    Reference: arXiv 2410.03174, section 3 and its table of architectures.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        channels: Sequence[int] = (32, 64, 128, 256),
        stage1_channels: int = 64,
        stage1_blocks: int = 2,
        modules: Sequence[int] = (1, 4, 2),
        blocks: Blocks = 2,
        local: bool = False,
        drop_path_rate: float = 0.0,
        dense: bool = False,
        multiscale_output: bool = True,
        *,
        stem_channels: int = 64,
        global_pool: str = "avg",
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        super().__init__()
        check_choice("global_pool", global_pool, POOLS)
        check_positive("in_chans", in_chans)
        check_positive("num_classes", num_classes, zero=True)
        check_positive("stage1_channels", stage1_channels)
        check_positive("stage1_blocks", stage1_blocks)
        check_positive("stem_channels", stem_channels)
        channels, modules = tuple(channels), tuple(modules)
        check(len(channels) >= 2, "channels", channels, "give those of at least two resolutions")
        whole = all(isinstance(n, int) and n >= 1 for n in modules)
        ok = whole and len(modules) == len(channels) - 1
        remedy = f"give a number >= 1 for each of the {len(channels) - 1} stages of 2 to {len(channels)} resolutions"
        check(ok, "modules", modules, remedy)
        check(0 <= drop_path_rate < 1, "drop_path_rate", drop_path_rate, "must be at least 0 and below 1")
        check(multiscale_output or dense, "multiscale_output", False, "the classifier needs all maps; give dense=True")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_chans, self.channels, self.dense, self.global_pool = in_chans, channels, dense, global_pool
        self.num_classes = 0 if dense else num_classes

        self.conv1 = nn.Conv2d(in_chans, stem_channels, 3, 2, 1, bias=False, **place)
        self.bn1 = nn.BatchNorm2d(stem_channels, **place)
        self.conv2 = nn.Conv2d(stem_channels, stem_channels, 3, 2, 1, bias=False, **place)
        self.bn2 = nn.BatchNorm2d(stem_channels, **place)
        wide = 4 * stage1_channels
        sources = [stem_channels, *[wide] * (stage1_blocks - 1)]
        self.layer1 = nn.Sequential(*(Bottleneck(c, wide, stage1_channels, **place) for c in sources))

        counts = _counts(blocks, len(channels))
        depth = sum(number * max(row) for number, row in zip(modules, counts, strict=True))
        rates = iter([drop_path_rate * i / max(depth - 1, 1) for i in range(depth)])
        before: tuple[int, ...] = (wide,)
        for number, row in enumerate(counts, 1):
            after = channels[: number + 1]
            self.add_module(f"transition{number}", _transition(before, after, place))
            stage = [
                HRModule(
                    after,
                    row,
                    multiscale_output or number < len(modules) or m < modules[-1] - 1,
                    [next(rates) for _ in range(max(row))],
                    local=local,
                    **options,
                    **place,
                )
                for m in range(modules[number - 1])
            ]
            self.add_module(f"stage{number + 1}", nn.ModuleList(stage))
            before = after

        last = f"stage{len(channels)}.{modules[-1] - 1}.fuse_layers"
        outputs = channels if multiscale_output else channels[:1]
        self.feature_info = [
            {"num_chs": c, "reduction": 4 * 2**i, "module": f"{last}.{i}"} for i, c in enumerate(outputs)
        ]
        self.fuse_scales = None if dense else FuseScales(channels, **place)
        self.num_features = outputs[-1] if dense else 2048
        self.head: Any = self.make_classifier(self.num_classes).to(device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Linear maps: normal with σ = 0.02 cut at ±2, zero biases. All others keep their layers' start."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward_maps(self, x: Tensor) -> list[Tensor]:
        """The maps of all resolutions, the finest first."""
        check_input(x, self.in_chans, 2)
        if 0 in x.shape[2:]:
            raise ValueError(f"x of shape {tuple(x.shape)}: has no pixels; give images of at least 1 × 1")
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        xs: list[Tensor] = [self.layer1(x)]
        for number in range(1, len(self.channels)):
            transition: Any = getattr(self, f"transition{number}")
            xs = [layer(xs[min(i, len(xs) - 1)]) for i, layer in enumerate(transition)]
            for module in getattr(self, f"stage{number + 1}"):
                xs = module(xs)
        return xs

    def forward_features(self, x: Tensor) -> Tensor:
        """The joined map, (N, 2048, ⌈H/32⌉, ⌈W/32⌉); with ``dense`` the coarsest one."""
        maps = self.forward_maps(x)
        return maps[-1] if self.fuse_scales is None else self.fuse_scales(maps)

    def forward(self, x: Tensor) -> Any:
        """Logits, or the list of maps."""
        return self.forward_maps(x) if self.dense else super().forward(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The maps of the resolutions ``indices``, all of them made at the end; arguments as of the parent's."""
        check_choice("output_fmt", output_fmt, ("NCHW", "NHWC"))
        wanted = resolve_indices(indices, len(self.feature_info))
        maps = self.forward_maps(x)
        found = [maps[i].movedim(1, -1) if output_fmt == "NHWC" else maps[i] for i in wanted]
        if intermediates_only:
            return found
        return (maps[-1] if self.fuse_scales is None else self.fuse_scales(maps)), found

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the DVSS blocks' inputs for the backward pass and recompute the rest."""
        super().set_grad_checkpointing(enable)
        for module in self.modules():
            if isinstance(module, HRModule):
                module.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's groups for layer-wise learning rates: bottlenecks, then each stage with the transition to it."""
        stages = [(rf"^transition{n}\.|^stage{n + 1}\.", (n,)) for n in range(1, len(self.channels))]
        return {"stem": r"^(conv|bn)[12]\.", "blocks": [(r"^layer1\.", (0,)), *stages]}


def _counts(blocks: Blocks, resolutions: int) -> list[list[int]]:
    """Blocks on every resolution, by stage."""
    stages = resolutions - 1
    given: Any = [blocks] * stages if isinstance(blocks, int) else list(blocks)
    remedy = f"give one number, or one entry for each of the {stages} stages"
    check(len(given) == stages, "blocks", blocks, remedy)
    rows = [[row] * (n + 2) if isinstance(row, int) else list(row) for n, row in enumerate(given)]
    fits = all(len(row) == n + 2 and all(isinstance(b, int) and b >= 1 for b in row) for n, row in enumerate(rows))
    check(fits, "blocks", blocks, "each stage needs a number >= 1, or one for each of its 2, 3, … resolutions")
    return rows


VARIANTS: dict[str, dict[str, Any]] = {
    "hrvmamba_n": {"channels": (8, 16, 32, 64), "stage1_channels": 16, "local": True},
    "hrvmamba_t": {"channels": (16, 32, 64, 128), "stage1_channels": 32, "local": True},
    "hrvmamba_s": {"channels": (32, 64, 128, 256), "stage1_channels": 64},
    "hrvmamba_b": {"channels": (80, 160, 320, 640), "stage1_channels": 64},
}


def _build(variant: str, options: dict[str, Any]) -> HRVMamba:
    return HRVMamba(**{**VARIANTS[variant], **options})


@register_model("hrvmamba")
def hrvmamba_n(**options: Any) -> HRVMamba:
    """HRVMamba-Nano: 12.3 M parameters (backbone 0.7 M), ImageNet-1K top-1 74.8 %."""
    return _build("hrvmamba_n", options)


@register_model("hrvmamba")
def hrvmamba_t(**options: Any) -> HRVMamba:
    """HRVMamba-Tiny: 14.1 M parameters (backbone 2.4 M), ImageNet-1K top-1 78.6 %."""
    return _build("hrvmamba_t", options)


@register_model("hrvmamba")
def hrvmamba_s(**options: Any) -> HRVMamba:
    """HRVMamba-Small: 20.1 M parameters (backbone 8.2 M), ImageNet-1K top-1 81.3 %."""
    return _build("hrvmamba_s", options)


@register_model("hrvmamba")
def hrvmamba_b(**options: Any) -> HRVMamba:
    """HRVMamba-Base: 60.5 M parameters (backbone 48.0 M), ImageNet-1K top-1 84.2 %."""
    return _build("hrvmamba_b", options)


# Names of the same things in other necks and heads for these maps, and under the prefixes of whole detectors.
_RENAMED = (
    (r"^backbone\.", ""),
    (r"^(neck\.)?incre(ase_layers|_modules)\.", "fuse_scales.increase_layers."),
    (r"^(neck\.)?downsamp(le_layers|_modules)\.", "fuse_scales.downsample_layers."),
    (r"^(neck\.)?final_layer\.", "fuse_scales.final_layer."),
    (r"^(fuse_scales\.(?:downsample_layers\.\d+|final_layer))\.0\.", r"\1.conv."),
    (r"^(fuse_scales\.(?:downsample_layers\.\d+|final_layer))\.1\.", r"\1.bn."),
    (r"^(head\.(fc|head)|classifier(\.head)?)\.", "head."),
)
_POINTWISE = re.compile(r"(in_proj|out_proj|fc[12]|se\.fc\.[02]|offset_mask)\.weight$")


def convert_name(name: str) -> str:
    """This library's name of an entry of the authors' checkpoints.

    Example:
        >>> convert_name("neck.downsample_layers.0.bn.weight"), convert_name("stage2.0.branches.0.0.norm.bias")
        ('fuse_scales.downsample_layers.0.bn.weight', 'stage2.0.branches.0.0.norm.bias')
    """
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def convert_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint of the authors under this library's names, weights of 1 × 1 convolutions as matrices."""
    found = {convert_name(n): t for n, t in state.items()}
    return {n: t.flatten(1) if t.dim() == 4 and _POINTWISE.search(n) else t for n, t in found.items()}


def read_official(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Whether a converted checkpoint is a backbone alone, and whether that gives all maps."""
    last = max((n for n in state if ".fuse_layers." in n), key=_place, default="")
    several = any(n.startswith(f"{last.partition('.fuse_layers.')[0]}.fuse_layers.1.") for n in state)
    return {"dense": not any(n.startswith("fuse_scales.") for n in state), "multiscale_output": several}


def _place(name: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", name.partition(".fuse_layers.")[0])))
