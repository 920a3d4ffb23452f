"""DeepLab v2 on ResNet, at several scales, and on VGG-16."""

from __future__ import annotations

from torch import Tensor, nn

from tests.parity.core import Adapted, Case, ParityError
from torchconv.models.segment.deeplab import DeepLabResNet, DeepLabVGG, MultiScale, convert_vgg


def resnet(case: Case) -> Adapted:
    config = case.config
    module: nn.Module = DeepLabResNet(
        config.get("n_classes", 21),
        config.get("n_blocks", (3, 4, 23, 3)),
        config.get("rates", (6, 12, 18, 24)),
        config.get("base", 64),
        case.inputs["x"].shape[1],
    )
    prefixed = any(n.startswith("base.") for n in case.state)
    scales = config.get("msc_scales")
    if scales is not None or prefixed:
        module = MultiScale(module, scales or ())
    prefix = "base." if isinstance(module, MultiScale) and not prefixed else ""
    return Adapted(
        lambda inputs: {"y": module(inputs["x"])},
        module,
        state=lambda state: {prefix + n: t for n, t in state.items()},
        names=lambda name: prefix + name,
    )


def vgg(case: Case) -> Adapted:
    config = case.config
    stride = config.get("output_stride", 8)
    if stride != 8:
        raise ParityError(f"output_stride {stride}: VGG-16 is built for 8 only")
    rates = config.get("rates", (6, 12, 18, 24)[: config.get("branches", 4)])
    module = DeepLabVGG(config.get("n_classes", 21), rates, config.get("channel_divisor", 1), case.inputs["x"].shape[1])

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        features = module.forward_features(inputs["x"])
        return {"y": module.head(features), "pool5": features}

    return Adapted(
        forward,
        module,
        state=lambda state: {convert_vgg(n): t for n, t in state.items()},
        names=convert_vgg,
    )


def adapt(case: Case) -> Adapted:
    """The networks; the conditional random field and the scores are not covered yet."""
    if any(".reduce.conv." in name for name in case.state):
        return resnet(case)
    if "conv1_1.weight" in case.state:
        return vgg(case)
    raise ParityError("only the networks are covered so far, not the conditional random field and the scores")
