"""DeepLab v2: classification backbones at stride 8 by atrous convolution, and an atrous pyramid as the head.

Chen et al. 2016, arXiv 1606.00915. The last strides of VGG-16 and ResNet-101 are replaced by dilation in all later
layers, so that their weights stay valid; the head sums branches of several rates. Logits are at stride 8; images of
8n + 1 pixels give n + 1. Poolings round up, as Caffe's do. Parameter names are those of the converted official
checkpoints (ResNet) and of the official layers (VGG, see :func:`convert_vgg`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_positive
from torchconv.catalog import part
from torchconv.models._registry import register_model
from torchconv.ops._common import check_input
from torchconv.ops.deeplab import ASPP2d, ASPPHead

RATES = (6, 12, 18, 24)
_STAGES = ((1, 1), (2, 1), (1, 2), (1, 4))  # stride and dilation of ResNet's stages


class ConvBN(nn.Module):
    """Convolution without bias, batch norm, and a ReLU if asked for; official names ``conv`` and ``bn``."""

    def __init__(
        self, channels: tuple[int, int], kernel: int, stride: int = 1, dilation: int = 1, relu: bool = True
    ) -> None:
        super().__init__()
        padding = dilation * (kernel // 2)
        self.conv = nn.Conv2d(*channels, kernel, stride, padding, dilation, bias=False)
        self.bn = nn.BatchNorm2d(channels[1], momentum=0.001)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C', H', W')."""
        x = self.bn(self.conv(x))
        return F.relu(x) if self.relu else x


class Bottleneck(nn.Module):
    """1 × 1 with the stride, atrous 3 × 3, 1 × 1 to four times the width, added to a projection or the input."""

    def __init__(self, in_channels: int, width: int, stride: int, dilation: int, project: bool) -> None:
        super().__init__()
        self.reduce = ConvBN((in_channels, width), 1, stride)
        self.conv3x3 = ConvBN((width, width), 3, dilation=dilation)
        self.increase = ConvBN((width, 4 * width), 1, relu=False)
        self.shortcut = ConvBN((in_channels, 4 * width), 1, stride, relu=False) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, 4·width, H', W')."""
        return F.relu(self.increase(self.conv3x3(self.reduce(x))) + self.shortcut(x))


class Stem(nn.Module):
    """7 × 7 with stride 2 and a pooling of stride 2."""

    def __init__(self, in_chans: int, width: int) -> None:
        super().__init__()
        self.conv1 = ConvBN((in_chans, width), 7, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) → (N, width, ⌈H/4⌉, ⌈W/4⌉)."""
        return F.max_pool2d(self.conv1(x), 3, 2, 1, ceil_mode=True)


@part(
    "deeplab-resnet",
    paper="deeplab",
    kind="model",
    dims=(2,),
    keywords="semantic segmentation atrous dilated ResNet-101 ASPP VOC Cityscapes",
)
class DeepLabResNet(nn.Module):
    """DeepLab v2 on a ResNet: stages of stride 1, 2, 1, 1 and dilation 1, 1, 2, 4, then an atrous pyramid.

    Args:
        num_classes: score maps.
        blocks: of the four stages.
        rates: of the head.
        base: width of the first stage, 64 as published.
        in_chans: channels of the image.
        freeze_bn: keep batch norms on their running statistics in training, as published.

    Shape:
        (N, in_chans, H, W) → (N, num_classes, ≈H/8, ≈W/8).

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> net = DeepLabResNet(5, (1, 1, 2, 1), base=4).eval()
        >>> net(torch.zeros(1, 3, 65, 49)).shape
        torch.Size([1, 5, 9, 7])

    Reference: arXiv 1606.00915, section 3.
    """

    def __init__(
        self,
        num_classes: int = 21,
        blocks: Sequence[int] = (3, 4, 23, 3),
        rates: Sequence[int] = RATES,
        base: int = 64,
        in_chans: int = 3,
        freeze_bn: bool = True,
    ) -> None:
        super().__init__()
        check_positive("num_classes", num_classes)
        check_positive("base", base)
        check_positive("in_chans", in_chans)
        several = isinstance(blocks, Sequence) and len(blocks) == len(_STAGES)
        ok = several and all(isinstance(n, int) and n >= 1 for n in blocks)
        check(ok, "blocks", blocks, "needs a number of blocks >= 1 for each of the four stages")
        self.num_classes, self.in_chans, self.freeze_bn = num_classes, in_chans, freeze_bn
        self.layer1 = Stem(in_chans, base)
        channels = base
        for number, (count, (stride, dilation)) in enumerate(zip(blocks, _STAGES, strict=True)):
            width = base * 2**number
            stage = nn.Sequential()
            for index in range(count):
                block = Bottleneck(channels, width, stride if index == 0 else 1, dilation, index == 0)
                stage.add_module(f"block{index + 1}", block)
                channels = 4 * width
            self.add_module(f"layer{number + 2}", stage)
        self.aspp = ASPP2d(channels, num_classes, rates=rates)
        for name, parameter in self.aspp.named_parameters():
            (nn.init.zeros_ if name.endswith("bias") else _small)(parameter)

    def param_options(self) -> dict[str, dict[str, float]]:
        """As published: the head learns ten times faster, its biases twenty; frozen batch norms do not learn."""
        options = {n: {"lr_mult": 20.0 if n.endswith("bias") else 10.0} for n in _names(self) if n.startswith("aspp.")}
        norms = {n: {"lr_mult": 0.0} for n in _names(self) if ".bn." in n and self.freeze_bn}
        return {**options, **norms}

    def train(self, mode: bool = True) -> DeepLabResNet:
        """Training mode, in which batch norms stay as they are if ``freeze_bn``."""
        super().train(mode)
        for module in self.modules():
            if self.freeze_bn and isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Logits at stride 8."""
        check_input(x, self.in_chans, 2)
        x = self.layer1(x)
        for number in range(len(_STAGES)):
            x = self.get_submodule(f"layer{number + 2}")(x)
        y: Tensor = self.aspp(x)
        return y


def _names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters()]


def _small(weight: Tensor) -> Tensor:
    return nn.init.normal_(weight, 0.0, 0.01)


@part(
    "deeplab-vgg",
    paper="deeplab",
    kind="model",
    dims=(2,),
    keywords="semantic segmentation atrous dilated VGG-16 LargeFOV ASPP",
)
class DeepLabVGG(nn.Module):
    """DeepLab on VGG-16: the last two poolings without stride, the convolutions after them atrous, LargeFOV or ASPP.

    Args:
        num_classes: score maps.
        rates: one branch for each; (12,) is LargeFOV.
        divisor: of all widths.
        in_chans: channels of the image.
        dropout: in the head.

    Shape:
        (N, in_chans, H, W) → (N, num_classes, ≈H/8, ≈W/8).

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> sum(p.numel() for p in DeepLabVGG(21, (12,)).parameters())
        20505429

    Reference: arXiv 1606.00915, section 3; v1: arXiv 1412.7062.
    """

    # Channels and convolutions of a stage, dilation, stride of the pooling after it.
    _plan = ((64, 2, 1, 2), (128, 2, 1, 2), (256, 3, 1, 2), (512, 3, 1, 1), (512, 3, 2, 1))

    def __init__(
        self,
        num_classes: int = 21,
        rates: Sequence[int] = RATES,
        divisor: int = 1,
        in_chans: int = 3,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        check_positive("num_classes", num_classes)
        check_positive("in_chans", in_chans)
        check(isinstance(divisor, int) and 1 <= divisor <= 64, "divisor", divisor, "leaves channels for 1 to 64")
        self.num_classes, self.in_chans = num_classes, in_chans
        channels = in_chans
        for stage, (width, count, dilation, _) in enumerate(self._plan, 1):
            for index in range(1, count + 1):
                conv = nn.Conv2d(channels, width // divisor, 3, padding=dilation, dilation=dilation)
                self.add_module(f"conv{stage}_{index}", conv)
                channels = width // divisor
        self.head = ASPPHead(channels, num_classes, 1024 // divisor, rates, dropout=dropout)

    def param_options(self) -> dict[str, dict[str, float]]:
        """As published: biases learn twice as fast as weights, the last layers ten times faster than others."""
        rate = {n: (2.0 if n.endswith("bias") else 1.0) * (10.0 if ".fc8_" in n else 1.0) for n in _names(self)}
        return {n: {"lr_mult": r} for n, r in rate.items()}

    def forward_features(self, x: Tensor) -> Tensor:
        """The map after the last pooling."""
        check_input(x, self.in_chans, 2)
        for stage, (_, count, _, stride) in enumerate(self._plan, 1):
            for index in range(1, count + 1):
                x = F.relu(self.get_submodule(f"conv{stage}_{index}")(x))
            x = F.max_pool2d(x, 3, stride, 1, ceil_mode=True)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Logits at stride 8."""
        y: Tensor = self.head(self.forward_features(x))
        return y

    @torch.no_grad()
    def load_vgg16(self, state: Mapping[str, Tensor]) -> None:
        """Start from a VGG-16 classifier, its fully connected layers thinned out; the scores' layers stay as they are.

        The first of them, 4096 filters of 7 × 7, is subsampled in space and filters to the size of every branch's
        first layer, the second in filters.

        Args:
            state: state dict of torchvision's ``vgg16``. Give images as that network had them.

        Raises:
            ValueError: the state of another network, or other widths than published here.

        Reference: arXiv 1412.7062, section 3.2.
        """
        names = [n for n, _ in self.named_children() if n.startswith("conv")]
        found = sorted(int(n.split(".")[1]) for n in state if n.startswith("features.") and n.endswith(".weight"))
        theirs = [f"features.{number}" for number in found]
        shapes = [tuple(state[f"{n}.weight"].shape) for n in theirs]
        ok = shapes == [tuple(self.get_parameter(f"{n}.weight").shape) for n in names]
        fully = [tuple(state[n].shape) for n in ("classifier.0.weight", "classifier.3.weight") if n in state]
        ok = ok and fully == [(4096, 25088), (4096, 4096)]
        remedy = "needs torchvision's vgg16, and divisor 1 here"
        check(ok, "state", f"of {len(shapes)} convolutions {shapes[:2]} ... and layers {fully}", remedy)
        for name, layer in zip(names, theirs, strict=True):
            for kind in ("weight", "bias"):
                self.get_parameter(f"{name}.{kind}").copy_(state[f"{layer}.{kind}"])
        first = state["classifier.0.weight"].unflatten(1, (512, 7, 7))
        for branch in range(1, len(self.head.rates) + 1):
            weight = self.head.get_parameter(f"fc6_{branch}.weight")
            filters, down, across = (_spread(*pair) for pair in zip((4096, 7, 7), _sides(weight), strict=True))
            weight.copy_(first[:, :, down][..., across][filters])
            second = state["classifier.3.weight"][filters][:, filters]
            self.head.get_parameter(f"fc7_{branch}.weight").copy_(second[:, :, None, None])
            for layer, number in (("fc6", 0), ("fc7", 3)):
                self.head.get_parameter(f"{layer}_{branch}.bias").copy_(state[f"classifier.{number}.bias"][filters])


def _sides(weight: Tensor) -> tuple[int, int, int]:
    return weight.shape[0], weight.shape[2], weight.shape[3]


def _spread(total: int, count: int) -> Tensor:
    """``count`` places among ``total``, evenly, ends included."""
    return torch.linspace(0, total - 1, count).round().long()


_FULLY = re.compile(r"^(fc[67])(?:_(\d+))?\.|^(fc8)(?:_[A-Za-z][^.]*?)?(?:_(\d+))?\.")


def convert_vgg(name: str) -> str:
    """A parameter of the official VGG layers under this library's name.

    Example:
        >>> [convert_vgg(n) for n in ("fc8_voc12_3.weight", "fc6_1.bias", "fc7.bias", "conv1_2.bias")]
        ['head.fc8_3.weight', 'head.fc6_1.bias', 'head.fc7_1.bias', 'conv1_2.bias']
    """
    found = _FULLY.match(name)
    if found is None:
        return name
    layer, branch = found[1] or found[3], found[2] or found[4] or "1"
    return f"head.{layer}_{branch}.{name[found.end() :]}"


def convert_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' parameters under this library's names; of a network at several scales, those of the network."""
    return {convert_vgg(n.removeprefix("base.")): t for n, t in state.items()}


def read_official(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Classes, blocks and width as the converted parameters have them; the rates are the network's."""
    if "conv1_1.weight" in state:
        found = {"divisor": 64 // len(state["conv1_1.weight"])}
        return {**found, "num_classes": len(state["head.fc8_1.bias"])} if "head.fc8_1.bias" in state else found
    ends = ".reduce.conv.weight"
    blocks = [sum(n.startswith(f"layer{stage}.") and n.endswith(ends) for n in state) for stage in range(2, 6)]
    options: dict[str, Any] = {"blocks": blocks} if all(blocks) else {}
    for name, option in (("aspp.c0.bias", "num_classes"), ("layer1.conv1.conv.weight", "base")):
        if name in state:
            options[option] = len(state[name])
    return options


class MultiScale(nn.Module):
    """A network on several sizes of the image, fused by the maximum of the logits.

    Args:
        base: the network.
        scales: besides 1, with bilinear resizing.

    Shape:
        As ``base``.

    Raises:
        ValueError: a scale that is not positive.

    Reference: arXiv 1606.00915, section 4.1.2.
    """

    def __init__(self, base: nn.Module, scales: Sequence[float] = (0.5, 0.75)) -> None:
        super().__init__()
        ok = isinstance(scales, Sequence) and all(isinstance(s, int | float) and s > 0 for s in scales)
        check(ok, "scales", scales, "give numbers above 0")
        self.base, self.scales = base, tuple(scales)

    def logits(self, x: Tensor) -> list[Tensor]:
        """The logits at scale 1, at the other scales, each at its own size, and fused: four equal terms of the loss."""
        first = self.base(x)
        others = [
            self.base(F.interpolate(x, scale_factor=float(s), mode="bilinear", align_corners=False))
            for s in self.scales
        ]
        size = first.shape[2:]
        resized = [F.interpolate(y, size=size, mode="bilinear", align_corners=False) for y in others]
        return [first, *others, torch.stack([first, *resized]).amax(0)]

    def forward(self, x: Tensor) -> Tensor:
        """Fused logits."""
        return self.logits(x)[-1]


@register_model("deeplab")
def deeplab_resnet101(**options: Any) -> DeepLabResNet:
    """DeepLab v2 on ResNet-101; 44,048,532 parameters for 21 classes."""
    return DeepLabResNet(**options)


@register_model("deeplab")
def deeplab_vgg16_aspp(**options: Any) -> DeepLabVGG:
    """DeepLab v2 on VGG-16 with the pyramid of rates 6, 12, 18, 24; 37,877,652 parameters for 21 classes."""
    return DeepLabVGG(**{"rates": RATES, **options})


@register_model("deeplab")
def deeplab_vgg16_aspp_s(**options: Any) -> DeepLabVGG:
    """DeepLab v2 on VGG-16 with the small pyramid of rates 2, 4, 8, 12; 37,877,652 parameters for 21 classes."""
    return DeepLabVGG(**{"rates": (2, 4, 8, 12), **options})


@register_model("deeplab")
def deeplab_vgg16_largefov(**options: Any) -> DeepLabVGG:
    """DeepLab v1 on VGG-16, one branch of rate 12; 20,505,429 parameters for 21 classes."""
    return DeepLabVGG(**{"rates": (12,), **options})
