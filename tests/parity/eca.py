"""Efficient channel attention: the gates of the authors and of timm, the authors' blocks and networks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tests.parity.core import Adapted, Case, ParityError
from torchconv.models.classify.eca import (
    VARIANTS,
    ECABasicBlock,
    ECABottleneck,
    ECAInvertedResidual,
    ECAMobileNetV2,
    shortcut,
)
from torchconv.ops.eca import ECA


def _gate(case: Case, name: str, timm: bool) -> nn.Module:
    config = case.config
    channels = config.get("channel", config.get("channels"))
    kernel_size = config.get("k_size", config.get("kernel_size"))
    # timm's size is adaptive whenever it is told the channels; without a size both take 3.
    adaptive = "gamma" in config or "beta" in config or (timm and channels is not None)
    if adaptive:
        kernel_size = None
    elif kernel_size is None:
        kernel_size = 3
    variant = "circular" if name == "CecaModule" else "per_channel" if "eca_ns.py" in case.source else "shared"
    channels = case.inputs["x"].shape[1] if channels is None else channels
    return ECA(channels, kernel_size, config.get("gamma", 2), config.get("beta", 1), variant=variant)


def _residual(block: Any, config: dict[str, Any]) -> nn.Module:
    inplanes, planes, stride = config["inplanes"], config["planes"], config.get("stride", 1)
    projection = shortcut(inplanes, planes * block.expansion, stride) if config.get("downsample") else None
    return block(inplanes, planes, stride, projection, config.get("k_size", 3))


def adapt(case: Case) -> Adapted:
    """Build the gate, block or network named in ``source`` from the config."""
    config, name = case.config, case.source.split(":")[-1].split()[0]
    module: nn.Module
    if name == "ECABasicBlock":
        module = _residual(ECABasicBlock, config)
    elif name == "ECABottleneck":
        module = _residual(ECABottleneck, config)
    elif name == "InvertedResidual":
        module = ECAInvertedResidual(
            config["inp"], config["oup"], config["stride"], config["expand_ratio"], config.get("k_size", 3)
        )
    elif name == "ECA_MobileNetV2":
        module = ECAMobileNetV2(**config)
    elif name in VARIANTS:
        stages = {"k_size": config.get("k_size", (3, 3, 3, 3))} if "resnet" in name else {}
        module = VARIANTS[name](**{**config, **stages})
    elif name in ("eca_layer", "EcaModule", "CecaModule", "EfficientChannelAttn", "CircularEfficientChannelAttn"):
        name = "CecaModule" if name.startswith("C") else name
        module = _gate(case, name, timm=name != "eca_layer")
    else:
        raise ParityError(f"source {case.source!r}: no such class here")

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}

    return Adapted(forward=forward, module=module)
