"""MHAF-YOLO's depthwise convolution, blocks, attention and pooling."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tests.parity.core import Adapted, Case, ParityError
from torchconv.ops.mhafyolo import MultiKernelReparamConv2d
from torchconv.ops.mhafyolo_blocks import RepHDW2d, RepHMS2d
from torchconv.ops.mhafyolo_parts import PSA, SPPF, SCDown, shrink


def adapt(case: Case) -> Adapted:
    """Which part it is follows from the keys of the config and the names of the state."""
    config = case.config
    if {"backbone", "head", "gains", "topk"} & set(config):
        raise ParityError("the detector and its loss are not there yet; blocks and operators are")
    if not case.state:
        return Adapted(lambda inputs: {"y": shrink(inputs["x"], config.get("down_n", 2))})
    norms = {"eps": config.get("bn_eps", 1e-3), "momentum": config.get("bn_momentum", 0.03)}
    module = _module(case, norms)

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}

    def extra(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name in case.outputs:
            if name == "y_deploy":
                fold: Any = module.merge
                found[name] = fold()(inputs["x"])
            elif name.startswith("merged."):
                path, _, tensor = name.removeprefix("merged.").rpartition(".")
                part: Any = module.get_submodule(path)
                found[name] = getattr(part.merge(), tensor)
        return found

    merged = any(n == "y_deploy" or n.startswith("merged.") for n in case.outputs)
    return Adapted(forward, module, extra=extra if merged else None)


def _module(case: Case, norms: dict[str, float]) -> nn.Module:
    config = case.config
    if "dim" in config:
        return MultiKernelReparamConv2d(config["dim"], kernel_size=config.get("kernel_size", 3), **norms)
    ends = [config.get("in_channels", config.get("c1")), config.get("out_channels", config.get("c2"))]
    if any(n.startswith("attn.") for n in case.state):
        return PSA(ends[0], config.get("e", config.get("expansion", 0.5)), **norms)
    size = config.get("kersize", config.get("kernel_size", config.get("k")))
    if any(n.startswith("RepElanMSBlock.") for n in case.state):
        options = {"width": config.get("width", 3), "depth": config.get("depth", 1)}
        return RepHMS2d(*ends, size or 5, expansion=config.get("depth_expansion", 2), **options, **norms)
    if any(n.startswith("m.0.") for n in case.state):
        options = {"depth": config.get("depth", 1), "expansion": config.get("expansion", 0.5)}
        return RepHDW2d(*ends, size or 5, depth_expansion=config.get("depth_expansion", 2), **options, **norms)
    if case.state["cv2.conv.weight"].shape[1] == 1:
        return SCDown(*ends, size or 3, config.get("stride", config.get("s", 2)), **norms)
    return SPPF(*ends, size or 5, **norms)
