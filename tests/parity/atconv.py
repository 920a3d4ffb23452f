"""Attentive convolution on maps and tokens, the GLU, the block and AttNet."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tests.parity.core import Adapted, Case
from torchconv.models.classify.atconv import GLU, AttNet, Block
from torchconv.ops.atconv import ATConv2d, ATConvTokens


def adapt(case: Case) -> Adapted:
    """Which part it is follows from the keys of the config."""
    config = case.config
    module = _module(config)
    extra = None
    if isinstance(module, ATConv2d | ATConvTokens):
        operator = module

        def extra(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            x = inputs["x"]
            return {"kernels_raw": operator.kernels(x, difference=False), "kernels": operator.kernels(x)}

    return Adapted(lambda inputs: {"y": module(inputs["x"])}, module, extra=extra)


def _module(config: dict[str, Any]) -> nn.Module:
    bias = config.get("bias", config.get("conv_bias", True))
    if "input_size" in config:
        return ATConvTokens(config["dim"], config.get("kernel_size", 3), config["input_size"], bias)
    if "hidden_features" in config:
        conv, norm = config.get("glu_dconv", False), config.get("glu_norm", True)
        return GLU(config["in_features"], config["hidden_features"], conv, norm)
    if "depths" in config:
        return AttNet(
            config["dims"],
            config["depths"],
            config.get("exp_rates", 4),
            config.get("kernel_sizes", 5),
            config.get("glu_dconv", True),
            config.get("glu_norm", True),
            config.get("use_layer_scale", True),
            config.get("num_classes", 1000),
            bias=bias,
        )
    if "exp_rate" in config:
        return Block(
            config["dim"],
            config.get("kernel_size", 3),
            config["exp_rate"],
            config.get("use_layer_scale", True),
            config.get("glu_dconv", False),
            config.get("glu_norm", True),
            bias,
        )
    return ATConv2d(config["dim"], kernel_size=config.get("kernel_size", 3), bias=bias)
