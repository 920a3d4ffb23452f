"""ECA-Net: ResNets and MobileNetV2 with efficient channel attention in every block.

Wang, Wu, Zhu, Li, Zuo, Hu 2019, arXiv 1910.03151. Parameter names are the authors': torchvision's, plus
``layerS.B.eca.conv.weight`` and, in MobileNetV2, ``features.I.conv.<last>.conv.weight``. The published checkpoints use
kernel sizes chosen by hand for each stage, not the paper's formula; the named constructors have those sizes, and
:func:`kernel_sizes` reads them from a state dict. Attention costs 31 (MobileNetV2) to 234 (ResNet-152) parameters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from torchconv._common import check, check_choice
from torchconv.catalog import part
from torchconv.models._backbone import POOLS, Backbone
from torchconv.models._registry import register_model
from torchconv.ops.eca import ECA


def _conv3x3(inplanes: int, planes: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inplanes, planes, 3, stride=stride, padding=1, bias=False)


def shortcut(inplanes: int, outplanes: int, stride: int) -> nn.Sequential:
    """The projection of a residual block: 1 × 1 convolution with the block's stride, batch norm."""
    return nn.Sequential(nn.Conv2d(inplanes, outplanes, 1, stride=stride, bias=False), nn.BatchNorm2d(outplanes))


class ECABasicBlock(nn.Module):
    """Two 3 × 3 convolutions, attention after the last batch norm, shortcut, ReLU.

    Args:
        inplanes, planes: channels in and out.
        stride: of the first convolution.
        downsample: module of the shortcut (:func:`shortcut`), None for the identity.
        k_size: odd size of the channel kernel; None for the adaptive size.

    Reference: arXiv 1910.03151, section 4.1.
    """

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        k_size: int | None = 3,
    ) -> None:
        super().__init__()
        self.conv1 = _conv3x3(inplanes, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.eca = ECA(planes, k_size)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """(N, inplanes, H, W) → (N, planes, H', W')."""
        residual = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        # Scaling and addition in one pass over the map.
        out: Tensor = self.relu(self.eca(y, residual))
        return out


class ECABottleneck(nn.Module):
    """1 × 1, 3 × 3 (with the stride), 1 × 1 to 4·planes, attention after the last batch norm, shortcut, ReLU.

    Arguments as :class:`ECABasicBlock`; the output has 4·planes channels.
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        k_size: int | None = 3,
    ) -> None:
        super().__init__()
        outplanes = planes * self.expansion
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = _conv3x3(planes, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, outplanes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outplanes)
        self.relu = nn.ReLU(inplace=True)
        self.eca = ECA(outplanes, k_size)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """(N, inplanes, H, W) → (N, 4·planes, H', W')."""
        residual = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        out: Tensor = self.relu(self.eca(y, residual))
        return out


@part(
    "eca-resnet", paper="eca", kind="model", dims=(2,), keywords="ECA-Net ResNet backbone classifier channel attention"
)
class ECAResNet(Backbone):
    """ResNet with efficient channel attention in every block.

    Args:
        block: :class:`ECABasicBlock` or :class:`ECABottleneck`.
        layers: blocks in each of the four stages.
        k_size: odd size of the channel kernel in each stage (a string of digits is read digit by digit, as the authors'
            training script does: "3557"), or None for the adaptive size of the blocks' output channels.
        num_classes: outputs; 0 for pooled features.
        in_chans: channels of the image.
        drop_path_rate: only 0: the published network has no drop path.
        global_pool: "avg", "max", "avgmax" or "".

    Shape:
        (N, in_chans, H, W) → (N, num_classes); H, W ≥ 33 give more than one position in the last stage.

    Raises:
        ValueError: not one kernel size for each stage.

    Reference: arXiv 1910.03151, table 3.
    """

    head_name = "fc"

    def __init__(
        self,
        block: type[ECABasicBlock] | type[ECABottleneck],
        layers: Sequence[int],
        k_size: Sequence[int] | str | None = (3, 3, 3, 3),
        num_classes: int = 1000,
        in_chans: int = 3,
        *,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        check(drop_path_rate == 0, "drop_path_rate", drop_path_rate, "ECA-ResNet has no drop path; leave it at 0")
        check_choice("global_pool", global_pool, POOLS)
        one_each = f"give one size for each of the {len(layers)} stages"
        readable = k_size.isdecimal() if isinstance(k_size, str) else k_size is None or isinstance(k_size, Sequence)
        check(readable, "k_size", k_size, one_each)
        sizes = (None,) * len(layers) if k_size is None else tuple(int(k) for k in k_size)
        check(len(sizes) == len(layers), "k_size", k_size, one_each)
        self.in_chans, self.num_classes, self.inplanes, self.global_pool = in_chans, num_classes, 64, global_pool
        self.feature_info = []
        self.conv1 = nn.Conv2d(in_chans, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.stages = tuple(f"layer{i + 1}" for i in range(len(layers)))
        for i, (name, depth, k) in enumerate(zip(self.stages, layers, sizes, strict=True)):
            self.add_module(name, self._stage(block, 64 * 2**i, depth, 1 if i == 0 else 2, k))
            self.feature_info.append({"num_chs": self.inplanes, "reduction": 4 * 2**i, "module": name})
        self.num_features = self.inplanes
        self.fc: nn.Module = self.make_classifier(num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                fan_out = m.kernel_size[0] * m.kernel_size[1] * m.out_channels
                nn.init.normal_(m.weight, std=math.sqrt(2 / fan_out))

    def _stage(self, block: Any, planes: int, depth: int, stride: int, k_size: int | None) -> nn.Sequential:
        outplanes = planes * block.expansion
        projection = shortcut(self.inplanes, outplanes, stride) if stride > 1 or self.inplanes != outplanes else None
        blocks = [block(self.inplanes, planes, stride, projection, k_size)]
        blocks += [block(outplanes, planes, k_size=k_size) for _ in range(depth - 1)]
        self.inplanes = outplanes
        return nn.Sequential(*blocks)

    def stage(self, index: int, x: Tensor) -> Tensor:
        """Blocks of one stage; the stem comes before the first."""
        if index == 0:
            x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.run(getattr(self, self.stages[index]), x)


class ConvBNReLU6(nn.Sequential):
    """Convolution with padding (k − 1)/2 and no bias, batch norm, ReLU6."""

    def __init__(self, inp: int, oup: int, kernel_size: int = 3, stride: int = 1, groups: int = 1) -> None:
        conv = nn.Conv2d(inp, oup, kernel_size, stride, (kernel_size - 1) // 2, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(oup), nn.ReLU6(inplace=True))


class ECAInvertedResidual(nn.Module):
    """MobileNetV2's block with attention on its output: expand 1 × 1, depthwise 3 × 3, project 1 × 1, gate.

    Args:
        inp, oup: channels in and out; the input is added where they are equal and the stride is 1.
        stride: 1 or 2, of the depthwise convolution.
        expand_ratio: width inside, round(inp · expand_ratio); 1 leaves the expansion out.
        k_size: odd size of the channel kernel; None for the adaptive size.

    Raises:
        ValueError: a stride other than 1 or 2.
    """

    def __init__(self, inp: int, oup: int, stride: int, expand_ratio: float, k_size: int | None = 3) -> None:
        super().__init__()
        check(stride in (1, 2), "stride", stride, "must be 1 or 2")
        hidden = round(inp * expand_ratio)
        self.use_res_connect = stride == 1 and inp == oup
        expand = [ConvBNReLU6(inp, hidden, 1)] if expand_ratio != 1 else []
        self.conv = nn.Sequential(
            *expand,
            ConvBNReLU6(hidden, hidden, stride=stride, groups=hidden),
            nn.Conv2d(hidden, oup, 1, bias=False),
            nn.BatchNorm2d(oup),
            ECA(oup, k_size),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, inp, H, W) → (N, oup, H', W')."""
        if not self.use_res_connect:
            y: Tensor = self.conv(x)
            return y
        *body, gate = self.conv
        y = x
        for layer in body:
            y = layer(y)
        y = gate(y, x)
        return y


_MOBILE = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


@part(
    "eca-mobilenetv2",
    paper="eca",
    kind="model",
    dims=(2,),
    keywords="ECA-Net MobileNetV2 mobile backbone channel attention",
)
class ECAMobileNetV2(Backbone):
    """MobileNetV2 with efficient channel attention; kernel size 1 in stages narrower than 96 channels, else 3.

    Args:
        num_classes: outputs; 0 for pooled features.
        width_mult: factor on all widths (truncated); the kernel sizes follow the unscaled widths.
        in_chans: channels of the image.
        drop_rate: dropout before the classifier.
        drop_path_rate: only 0: the published network has no drop path.
        global_pool: "avg", "max", "avgmax" or "".

    Shape:
        (N, in_chans, H, W) → (N, num_classes).

    Reference: arXiv 1910.03151, table 4.
    """

    head_name = "classifier.1"

    def __init__(
        self,
        num_classes: int = 1000,
        width_mult: float = 1.0,
        in_chans: int = 3,
        drop_rate: float = 0.25,
        *,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        check(drop_path_rate == 0, "drop_path_rate", drop_path_rate, "ECA-MobileNetV2 has no drop path; leave it at 0")
        check_choice("global_pool", global_pool, POOLS)
        width = int(32 * width_mult)
        check(width >= 1, "width_mult", width_mult, "leaves no channels; use a larger factor")
        features: list[nn.Module] = [ConvBNReLU6(in_chans, width, stride=2)]
        self.feature_info = []
        self._ends: list[int] = []  # a stage ends before the next stride and at the end
        reached = 2
        for expand_ratio, channels, depth, stride in _MOBILE:
            if stride == 2:
                self._end_stage(len(features), width, reached)
                reached *= 2
            outputs, k_size = int(channels * width_mult), 1 if channels < 96 else 3
            for i in range(depth):
                features.append(ECAInvertedResidual(width, outputs, stride if i == 0 else 1, expand_ratio, k_size))
                width = outputs
        self.in_chans, self.num_classes, self.global_pool = in_chans, num_classes, global_pool
        self.num_features = int(1280 * max(1.0, width_mult))
        self._end_stage(len(features), width, reached)
        features.append(ConvBNReLU6(width, self.num_features, 1))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(drop_rate), self.make_classifier(num_classes))
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out")
            elif isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, std=0.01)
                nn.init.zeros_(m.bias)

    def _end_stage(self, end: int, channels: int, reduction: int) -> None:
        self._ends.append(end)
        self.feature_info.append({"num_chs": channels, "reduction": reduction, "module": f"features.{end - 1}"})

    def stage(self, index: int, x: Tensor) -> Tensor:
        """The blocks at one resolution."""
        begin = self._ends[index - 1] if index else 0
        return self.run(self.features[begin : self._ends[index]], x)

    def final(self, x: Tensor) -> Tensor:
        """The 1 × 1 convolution to ``num_features`` channels."""
        y: Tensor = self.features[-1](x)
        return y

    def neck(self, x: Tensor) -> Tensor:
        """Dropout."""
        y: Tensor = self.classifier[0](x)
        return y


def kernel_sizes(state: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Channel kernel size of each stage, read from the state dict of an ECA-ResNet (authors' names).

    Example:
        >>> kernel_sizes(eca_resnet18(num_classes=2).state_dict())
        (3, 5, 7, 7)

    Raises:
        ValueError: the state holds no ``layerS.0.eca.conv.weight``.
    """
    found = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"(?:module\.)?layer(\d+)\.0\.eca\.conv\.weight", name)
        if match:
            found[int(match.group(1))] = int(tensor.shape[-1])
    check(bool(found), "state", list(state)[:3], "expected an ECA-ResNet's tensors, layer1.0.eca.conv.weight and so on")
    return tuple(found[stage] for stage in sorted(found))


def read_official(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Options of the network that a checkpoint of the authors belongs to: the kernel sizes set by hand."""
    return {"k_size": kernel_sizes(state)} if "layer1.0.eca.conv.weight" in state else {}


@register_model("eca")
def eca_resnet18(k_size: Sequence[int] | str | None = (3, 5, 7, 7), **options: Any) -> ECAResNet:
    """ECA-Net18, 11.69 million parameters, top-1 70.92 % on ImageNet (published)."""
    return ECAResNet(ECABasicBlock, (2, 2, 2, 2), k_size, **options)


@register_model("eca")
def eca_resnet34(k_size: Sequence[int] | str | None = (3, 3, 5, 7), **options: Any) -> ECAResNet:
    """ECA-Net34, 21.80 million parameters, top-1 74.21 %."""
    return ECAResNet(ECABasicBlock, (3, 4, 6, 3), k_size, **options)


@register_model("eca")
def eca_resnet50(k_size: Sequence[int] | str | None = (3, 5, 5, 7), **options: Any) -> ECAResNet:
    """ECA-Net50, 25.56 million parameters, top-1 77.42 %."""
    return ECAResNet(ECABottleneck, (3, 4, 6, 3), k_size, **options)


@register_model("eca")
def eca_resnet101(k_size: Sequence[int] | str | None = (3, 3, 5, 7), **options: Any) -> ECAResNet:
    """ECA-Net101, 44.55 million parameters, top-1 78.65 %."""
    return ECAResNet(ECABottleneck, (3, 4, 23, 3), k_size, **options)


@register_model("eca")
def eca_resnet152(k_size: Sequence[int] | str | None = (3, 3, 5, 7), **options: Any) -> ECAResNet:
    """ECA-Net152, 60.19 million parameters, top-1 78.92 %."""
    return ECAResNet(ECABottleneck, (3, 8, 36, 3), k_size, **options)


@register_model("eca")
def eca_mobilenet_v2(**options: Any) -> ECAMobileNetV2:
    """ECA-MobileNetV2, 3.50 million parameters, top-1 72.56 %."""
    return ECAMobileNetV2(**options)


VARIANTS: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (eca_resnet18, eca_resnet34, eca_resnet50, eca_resnet101, eca_resnet152, eca_mobilenet_v2)
}
