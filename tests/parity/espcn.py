"""ESPCN with the parameter names and endings of its ports, and the sub-pixel convolution as a transposed one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.parity.core import Adapted, Case, ParityError
from torchconv.models.restore.espcn import ACTIVATIONS, ESPCN, FINALS, convert_state, parameter_names
from torchconv.ops.espcn import subpixel_conv, subpixel_to_transposed


class _Operator(nn.Module):
    """The case's parameters: one bias for each output channel, for all positions of its block."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in state.items():
            self.register_parameter(name, nn.Parameter(torch.empty_like(tensor)))

    def bias(self, block: int) -> Tensor | None:
        named = dict(self.named_parameters())
        if "bias_per_output_channel" in named:
            return named["bias_per_output_channel"].repeat_interleave(block)
        return named.get("bias")


def operator(case: Case) -> Adapted:
    config = case.config
    module = _Operator(case.state)
    weight: Any = module.weight
    ndim = weight.dim() - 2
    geometry = config.get("transposed") or {}
    factor = config.get("scale", geometry.get("stride", 2))
    kernel = config.get("kernel", weight.shape[2])
    # Padding of the transposed convolution is r·(k − 1 − p).
    padding = kernel - 1 - geometry["padding"] // factor if "padding" in geometry else kernel // 2

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        y = subpixel_conv(inputs["x"], weight, module.bias(factor**ndim), factor, padding)
        return {"y": y, "transposed_weight": subpixel_to_transposed(weight, factor)}

    return Adapted(forward, module)


def adapt(case: Case) -> Adapted:
    """The network, unless the config speaks of a single kernel."""
    config = case.config
    if "weight" in case.state:
        return operator(case)
    lornatang = any("sub_pixel" in name for name in case.state)
    enlarged = case.outputs["y"].shape[-1] // case.inputs["x"].shape[-1]
    factor = config.get("upscale_factor", config.get("scale_factor", enlarged))
    activation = config.get("activation") or "tanh"
    final = config.get("final") or ("clip01" if lornatang else "none")
    for name, value, known in (("activation", activation, ACTIVATIONS), ("final", final, FINALS)):
        if value not in known:
            raise ParityError(f"{name} {value!r} is not one of {', '.join(known)}")
    # What the config leaves out is as the parameters have it.
    converted = convert_state(case.state, factor)
    width, in_channels = converted["feature_maps.0.weight"].shape[:2]
    out_channels = len(converted["sub_pixel.0.bias"]) // factor**2
    module = ESPCN(
        config.get("in_channels", config.get("num_channels", in_channels)),
        config.get("out_channels", config.get("num_channels", out_channels)),
        config.get("channels", width),
        factor,
        activation,
        final,
    )
    names = parameter_names(case.state)
    return Adapted(
        lambda inputs: {"y": module(inputs["x"])},
        module,
        state=lambda _: converted,
        names=lambda name: names.get(name, name),
    )
