"""DeepLab v2 on ResNet, at several scales, and on VGG-16."""

from __future__ import annotations

from torch import Tensor, nn

from tests.parity.core import Adapted, Case, ParityError
from torchconv.models.segment.deeplab import RATES, DeepLabResNet, DeepLabVGG, MultiScale, convert_vgg


def resnet(case: Case) -> Adapted:
    config = case.config
    prefixed = any(n.startswith("base.") for n in case.state)
    # What the config leaves out is as the parameters have it.
    state = {n.removeprefix("base."): t for n, t in case.state.items()}
    blocks = [sum(n.startswith(f"layer{i}.") and n.endswith(".reduce.conv.weight") for n in state) for i in range(2, 6)]
    module: nn.Module = DeepLabResNet(
        config.get("n_classes", len(state["aspp.c0.bias"])),
        config.get("n_blocks", blocks),
        config.get("rates", RATES),
        config.get("base", len(state["layer1.conv1.conv.weight"])),
        case.inputs["x"].shape[1],
    )
    scales = config.get("msc_scales")
    if scales is not None or prefixed:
        module = MultiScale(module, scales or (0.5, 0.75))
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
    # What the config leaves out is as the parameters have it.
    scores = [tensor for name, tensor in case.state.items() if name.startswith("fc8") and name.endswith(".bias")]
    rates = config.get("rates", RATES)[: config.get("branches", len(scores))]
    divisor = config.get("channel_divisor", 64 // len(case.state["conv1_1.weight"]))
    module = DeepLabVGG(config.get("n_classes", len(scores[0])), rates, divisor, case.inputs["x"].shape[1])

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
