"""Attentive convolution on maps and tokens, the GLU, the block and AttNet."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from tests.parity.core import Adapted, Case
from torchconv.models.classify.atconv import GLU, AttNet, Block
from torchconv.ops.atconv import ATConv2d, ATConvTokens


def adapt(case: Case) -> Adapted:
    """Which part it is follows from the names in the state; options absent or null are as the state shows."""
    config = {n: v for n, v in case.config.items() if v is not None}
    if case.inputs["x"].dim() == 3:
        return _tokens(case, config)
    module = _module(case.state, config)
    extra = None
    if isinstance(module, ATConv2d):
        operator = module

        def extra(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            return _kernels(operator, inputs["x"])

    return Adapted(lambda inputs: {"y": module(inputs["x"])}, module, extra=extra)


def _kernels(module: ATConv2d | ATConvTokens, x: Tensor) -> dict[str, Tensor]:
    return {"kernels_raw": module.kernels(x, difference=False), "kernels": module.kernels(x)}


def _mixer(state: dict[str, Tensor], config: dict[str, Any], prefix: str = "") -> tuple[int, bool]:
    """Size and bias of the attentive convolution."""
    size = config.get("kernel_size", math.isqrt(state[f"{prefix}kernel_gen.weight"].shape[0]))
    bias = config.get("bias", config.get("conv_bias", f"{prefix}kernel_gen.bias" in state))
    return size, bias


def _tokens(case: Case, config: dict[str, Any]) -> Adapted:
    size, bias = _mixer(case.state, config)
    _, count, channels = case.inputs["x"].shape
    side = config.get("input_size", math.isqrt(count))
    if case.state["kernel_proj.weight"].dim() == 2:
        tokens = ATConvTokens(channels, size, side, bias)
        return Adapted(lambda inputs: {"y": tokens(inputs["x"])}, tokens, extra=lambda i: _kernels(tokens, i["x"]))
    # The REPA dialect: 1 × 1 convolutions and SiLU.
    conv = ATConv2d(channels, kernel_size=size, bias=bias, activation="silu")

    def as_map(x: Tensor) -> Tensor:
        return x.transpose(1, 2).unflatten(2, (side, side))

    return Adapted(
        lambda inputs: {"y": conv(as_map(inputs["x"])).flatten(2).transpose(1, 2)},
        conv,
        extra=lambda inputs: _kernels(conv, as_map(inputs["x"])),
    )


def _module(state: dict[str, Tensor], config: dict[str, Any]) -> nn.Module:
    if "head.weight" in state:
        first = state["downsample_layers.0.0.0.weight"]
        return AttNet(
            config.get("dims", (64, 128, 256, 512)),
            config.get("depths", (2, 2, 6, 2)),
            config.get("exp_rates", 4),
            config.get("kernel_sizes", 5),
            config.get("glu_dconv", True),
            config.get("glu_norm", True),
            config.get("use_layer_scale", any(n.endswith("layer_scale_1.gamma") for n in state)),
            config.get("num_classes", 1000),
            in_chans=first.shape[1],
            bias=config.get("bias", config.get("conv_bias", True)),
        )
    if "fc1.weight" in state:
        hidden, channels = state["fc1.weight"].shape[0] // 2, state["fc1.weight"].shape[1]
        return GLU(channels, hidden, "dwconv.weight" in state, "norm_layer.weight" in state)
    if "norm_1.weight" in state:
        size, bias = _mixer(state, config, "token_mixer.")
        return Block(
            config.get("dim", state["norm_1.weight"].shape[0]),
            size,
            config.get("exp_rate", 4),
            config.get("use_layer_scale", "layer_scale_1.gamma" in state),
            config.get("glu_dconv", "channel_mixer.dwconv.weight" in state),
            config.get("glu_norm", "channel_mixer.norm_layer.weight" in state),
            bias,
        )
    size, bias = _mixer(state, config)
    return ATConv2d(config.get("dim", state["difference_control"].shape[0]), kernel_size=size, bias=bias)
