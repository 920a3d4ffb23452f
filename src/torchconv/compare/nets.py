"""The networks in which operators are compared: everything but the operator stays the same.

Each net has two sizes: ``width``, which scales all channels, and ``fine``, one inner width that moves the cost in
small steps, so that candidates can be matched to within a per cent or two.
"""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from torchconv._common import check, did_you_mean, require
from torchconv.catalog import operator
from torchconv.ops import as_conv, as_mixer
from torchconv.ops._common import BATCH_NORM, CONV
from torchconv.ops.roles import channel_multiple


@dataclass(frozen=True)
class Candidate:
    """An operator with the user's options; ``label`` is what reports call it."""

    op: str
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def label(self) -> str:
        """``dcls`` or ``dcls:kernel_size=9``."""
        return ":".join([self.op, *(f"{k}={v}" for k, v in self.options)])

    @property
    def slug(self) -> str:
        """The label as a folder name."""
        return "".join(c if c.isalnum() or c in "-_.=," else "-" for c in self.label)


@dataclass(frozen=True)
class Shape:
    """What a network must fit: input channels, spatial size, classes."""

    channels: int
    size: tuple[int, ...]
    classes: int

    @property
    def ndim(self) -> int:
        """Spatial dimensions."""
        return len(self.size)


class Net(Protocol):
    """A family of networks around one operator."""

    @property
    def name(self) -> str:
        """As given to ``--net``."""

    def width(self, candidate: Candidate, shape: Shape) -> int:
        """The nominal width."""

    def step(self, candidate: Candidate, shape: Shape) -> int:
        """Widths are multiples of this."""

    def fine(self, width: int) -> int:
        """The nominal inner width for a width."""

    def build(self, candidate: Candidate, shape: Shape, width: int, fine: int) -> nn.Module:
        """The network."""


class MixerBlock(nn.Module):
    """x + γ ⊙ MLP(BN(mixer(x))): a ConvNeXt-like block with the operator as the spatial mixer.

    The MLP is 1 × 1 convolution, GELU, 1 × 1 convolution; γ starts at 0.1.
    """

    def __init__(self, candidate: Candidate, width: int, hidden: int, ndim: int) -> None:
        super().__init__()
        self.mixer = as_mixer(candidate.op, width, ndim, **dict(candidate.options))
        self.norm = BATCH_NORM[ndim](width)
        self.expand = CONV[ndim](width, hidden, 1)
        self.act = nn.GELU()
        self.project = CONV[ndim](hidden, width, 1, bias=False)
        # The second norm's scale is the layer scale γ.
        self.scale = BATCH_NORM[ndim](width)
        nn.init.constant_(self.scale.weight, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, \\*spatial) → the same shape."""
        y: Tensor = x + self.scale(self.project(self.act(self.expand(self.norm(self.mixer(x))))))
        return y


class MiniNet(nn.Sequential):
    """Patch stem, ``depth`` mixer blocks at one resolution, global average pooling, linear classifier."""

    def __init__(self, candidate: Candidate, shape: Shape, width: int, hidden: int, depth: int, patch: int) -> None:
        n = shape.ndim
        super().__init__()
        if patch == 1:
            stem: nn.Module = CONV[n](shape.channels, width, 3, padding=1, bias=False)
        else:
            stem = CONV[n](shape.channels, width, patch, stride=patch, bias=False)
        self.add_module("stem", nn.Sequential(stem, BATCH_NORM[n](width)))
        self.add_module("blocks", nn.Sequential(*(MixerBlock(candidate, width, hidden, n) for _ in range(depth))))
        pool: Any = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[n - 1]
        self.add_module("pool", nn.Sequential(pool(1), nn.Flatten()))
        self.add_module("head", nn.Linear(width, shape.classes))


@dataclass(frozen=True)
class Mini:
    """Isotropic ConvNeXt-like network (``--net mini``); ``fine`` is the hidden width of the MLPs."""

    depth: int = 4
    base: int = 32
    expansion: float = 2.0
    name: str = "mini"

    def patch(self, shape: Shape) -> int:
        """Stem patch: about 16 positions a side for images, 128 for series."""
        target = 128 if shape.ndim == 1 else 16
        return max(1, 2 ** round(math.log2(max(1.0, min(shape.size) / target))))

    def width(self, candidate: Candidate, shape: Shape) -> int:
        """32, or the next multiple that the operator takes."""
        step = self.step(candidate, shape)
        return step * math.ceil(self.base / step)

    def step(self, candidate: Candidate, shape: Shape) -> int:
        """The operator's channel multiple."""
        return _step(candidate, shape)

    def fine(self, width: int) -> int:
        """Hidden width of the MLPs."""
        return round(self.expansion * width)

    def build(self, candidate: Candidate, shape: Shape, width: int, fine: int) -> nn.Module:
        """The network."""
        return MiniNet(candidate, shape, width, fine, self.depth, self.patch(shape))


class BasicBlock(nn.Module):
    """relu(BN(op(relu(BN(op(x))))) + shortcut(x)) with the parameter-free shortcut (subsample, pad channels)."""

    def __init__(self, make: Callable[..., nn.Module], in_channels: int, channels: int, stride: int, ndim: int) -> None:
        super().__init__()
        self.conv1 = make(in_channels, channels, stride)
        self.bn1 = BATCH_NORM[ndim](channels)
        self.conv2 = make(channels, channels, 1)
        self.bn2 = BATCH_NORM[ndim](channels)
        self.act = nn.ReLU()
        self.stride, self.extra, self.ndim = stride, channels - in_channels, ndim

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, \\*spatial) → (N, channels, \\*spatial/stride)."""
        y = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        steps: tuple[Any, ...] = (slice(None, None, self.stride),) * self.ndim
        shortcut = x[(slice(None), slice(None), *steps)]
        if self.extra:
            before = self.extra // 2
            shortcut = nn.functional.pad(shortcut, (0, 0) * self.ndim + (before, self.extra - before))
        z: Tensor = self.act(y + shortcut)
        return z


@dataclass(frozen=True)
class ResNet20:
    """CIFAR ResNet-20 (He et al. 2016, section 4.2) whose eighteen 3 × 3 convolutions in blocks are the operator.

    Widths are w, 2w, 4w with w = 16; ``fine`` is the last one. The stem stays a plain convolution.
    """

    base: int = 16
    blocks: int = 3
    name: str = "resnet"

    def width(self, candidate: Candidate, shape: Shape) -> int:
        """16, or the next multiple that the operator takes."""
        step = self.step(candidate, shape)
        return step * math.ceil(self.base / step)

    def step(self, candidate: Candidate, shape: Shape) -> int:
        """The operator's channel multiple."""
        return _step(candidate, shape)

    def fine(self, width: int) -> int:
        """Channels of the last stage."""
        return 4 * width

    def build(self, candidate: Candidate, shape: Shape, width: int, fine: int) -> nn.Module:
        """The network."""
        n, options, step = shape.ndim, dict(candidate.options), self.step(candidate, shape)

        def make(in_channels: int, out_channels: int, stride: int) -> nn.Module:
            return as_conv(candidate.op, in_channels, out_channels, 3, stride, n, bias=False, **options)

        last = max(2 * width, step * round(fine / step))
        stages, channels = [], width
        for stage, out in enumerate((width, 2 * width, last)):
            for block in range(self.blocks):
                stages.append(BasicBlock(make, channels, out, 2 if stage and not block else 1, n))
                channels = out
        pool: Any = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[n - 1]
        net = nn.Sequential()
        stem = CONV[n](shape.channels, width, 3, padding=1, bias=False)
        net.add_module("stem", nn.Sequential(stem, BATCH_NORM[n](width), nn.ReLU()))
        net.add_module("blocks", nn.Sequential(*stages))
        net.add_module("pool", nn.Sequential(pool(1), nn.Flatten()))
        net.add_module("head", nn.Linear(last, shape.classes))
        return net


@dataclass(frozen=True)
class Timm:
    """A timm model with the operator swapped in for its spatial convolutions (``--net timm:NAME``).

    Depthwise convolutions become the operator as a mixer, dense k × k ones (but for those that read the image) the
    operator in a convolution's place. ``width`` is a percentage of the model's own channels, for models that take
    ``dims``, ``channels`` or ``embed_dims``; ``fine`` is the last stage's.
    """

    model: str
    name: str = ""

    def width(self, candidate: Candidate, shape: Shape) -> int:
        """100 per cent."""
        return 100

    def step(self, candidate: Candidate, shape: Shape) -> int:
        """One per cent."""
        return 1

    def fine(self, width: int) -> int:
        """The last stage's percentage: that of the others by default."""
        return width

    def build(self, candidate: Candidate, shape: Shape, width: int, fine: int) -> nn.Module:
        """The network; ``width=fine=100`` is the model as it is."""
        check(shape.ndim == 2, "net", f"timm:{self.model}", "timm models take images; use --net mini for other data")
        timm = require("timm", "models")
        if not timm.is_model(self.model):
            raise ValueError(f"net='timm:{self.model}': {did_you_mean(self.model, timm.list_models())}")
        settings: dict[str, Any] = {"num_classes": shape.classes, "in_chans": shape.channels}
        if (width, fine) != (100, 100):
            argument, base = _channels_argument(timm, self.model)
            multiple = math.lcm(8, channel_multiple(candidate.op, 2))
            scaled = [max(multiple, multiple * round(c * width / 100 / multiple)) for c in base]
            scaled[-1] = max(multiple, multiple * round(base[-1] * fine / 100 / multiple))
            settings[argument] = tuple(scaled)
        model: nn.Module = timm.create_model(self.model, **settings)
        replaced = _replace(model, candidate, shape.channels)
        check(replaced > 0, "net", f"timm:{self.model}", "has no spatial convolution to put an operator in place of")
        return model


def _step(candidate: Candidate, shape: Shape) -> int:
    multiple = channel_multiple(candidate.op, shape.ndim)
    groups = dict(candidate.options).get("groups", operator(candidate.op).mixer.get("groups", 1))
    return math.lcm(multiple, groups) if isinstance(groups, int) else multiple


def _channels_argument(timm: Any, name: str) -> tuple[str, tuple[int, ...]]:
    """The keyword that sets a timm model's channels, and their values."""
    with torch.device("meta"):
        model = timm.create_model(name)
    parameters = inspect.signature(type(model).__init__).parameters
    for argument in ("dims", "channels", "embed_dims"):
        if argument in parameters:
            default = parameters[argument].default
            if argument == "channels" and isinstance(default, tuple):
                return argument, default
            return argument, tuple(i["num_chs"] for i in model.feature_info)
    raise ValueError(f"net='timm:{name}': its channels cannot be set from outside; use --match none")


def _replace(model: nn.Module, candidate: Candidate, image_channels: int) -> int:
    options, count = dict(candidate.options), 0
    for parent in list(model.modules()):
        for name, conv in list(parent.named_children()):
            if not isinstance(conv, nn.Conv2d) or set(conv.kernel_size) == {1} or conv.in_channels == image_channels:
                continue
            same = conv.kernel_size[0] % 2 == 1 and conv.padding[0] == conv.dilation[0] * (conv.kernel_size[0] // 2)
            if not same or conv.kernel_size[0] != conv.kernel_size[1]:
                continue  # patch embeddings and downsampling by non-overlapping patches
            depthwise = conv.groups == conv.in_channels == conv.out_channels
            stride = int(conv.stride[0])
            if depthwise and stride == 1:
                new = as_mixer(candidate.op, conv.in_channels, **options)
            elif conv.groups == 1 or depthwise:
                size, has_bias = int(conv.kernel_size[0]), conv.bias is not None
                new = as_conv(candidate.op, conv.in_channels, conv.out_channels, size, stride, bias=has_bias, **options)
            else:
                continue
            setattr(parent, name, new)
            count += 1
    return count


def make_net(spec: str) -> Net:
    """The net for ``mini``, ``resnet`` or ``timm:NAME``; options as in ``mini:depth=6:base=48``."""
    head, *rest = spec.split(":")
    if head == "timm":
        check(len(rest) == 1 and bool(rest[0]), "net", spec, "give a timm model, as in timm:convnext_atto")
        return Timm(rest[0], spec)
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "mini": (Mini, {"depth": int, "base": int, "expansion": float}),
        "resnet": (ResNet20, {"base": int, "blocks": int}),
    }
    check(head in kinds, "net", spec, "choose mini, resnet or timm:NAME")
    make, allowed = kinds[head]
    options = {}
    for item in rest:
        key, _, value = item.partition("=")
        check(key in allowed, "net", spec, f"options of {head} are {', '.join(allowed)}")
        try:
            options[key] = allowed[key](value)
        except ValueError:
            raise ValueError(f"net={spec!r}: {key} must be a number, got {value!r}") from None
        check(options[key] > 0, "net", spec, f"{key} must be positive")
    net: Net = make(**options, name=spec)
    return net


def make_candidate(spec: str) -> Candidate:
    """The candidate for ``dcls`` or ``dcls:kernel_size=9:kernel_count=5``."""
    op, *rest = spec.strip().split(":")
    operator(op)
    options = []
    for item in rest:
        key, separator, value = item.partition("=")
        check(bool(separator and key), "ops", spec, "options are written name=value, as in dcls:kernel_size=9")
        try:
            options.append((key, ast.literal_eval(value)))
        except (ValueError, SyntaxError):
            options.append((key, value))
    return Candidate(op, tuple(options))
