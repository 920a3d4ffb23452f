"""Re-dilated convolutions, dispersion matrices, and a guided step of a small U-Net with both."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from tests.parity.core import Adapted, Case
from torchconv.models.generate.guidance import classifier_free_guidance, noise_damped_guidance
from torchconv.models.generate.unet import SmallUNet
from torchconv.ops.scalecrafter import ReDilatedConv2d, redilate_conv, step_factor
from torchconv.ops.scalecrafter_dispersed import disperse_conv, disperse_kernel, dispersion_matrix

_MODES = {"bilinear": "linear", "nearest": "nearest", "bicubic": "cubic"}


def adapt(case: Case) -> Adapted:
    """Which part it is follows from the keys of the config."""
    if "dilate_settings" in case.config:
        return _step(case)
    if "factor" in case.config:
        return _conv(case)
    return Adapted(lambda _: {name: _matrix(name) for name in case.outputs})


def _matrix(name: str) -> Tensor:
    """R_<small>_<large>_<input size>_<scale>_<eta>."""
    small, large, size, scale, eta = name.split("_")[1:]
    return dispersion_matrix(int(small), int(large), int(size), float(scale), float(eta))


def _conv(case: Case) -> Adapted:
    # What the config leaves out is as the input and the parameters have it.
    config, weight, channels = case.config, case.state["weight"], case.inputs["x"].shape[1]
    kernel = tuple(weight.shape[2:])
    conv = nn.Conv2d(
        config.get("in_channels", channels),
        config.get("out_channels", len(weight)),
        config.get("kernel_size", kernel),
        config.get("stride", 1),
        config.get("padding", [k // 2 for k in kernel]),
        config.get("dilation", 1),
        config.get("groups", channels // weight.shape[1]),
        "bias" in case.state,
    )

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x, mode = inputs["x"], _MODES[config.get("mode", "bilinear")]
        # The published form overwrites the convolution's own dilation.
        options: dict[str, Any] = {"stride": conv.stride, "groups": conv.groups, "mode": mode, "rounding": "floor"}
        return {"y": redilate_conv(x, conv.weight, conv.bias, config["factor"], **options), "y_inactive": conv(x)}

    return Adapted(forward, conv)


def _step(case: Case) -> Adapted:
    config, state = case.config, case.state
    full, in_channels = state["conv_in.weight"].shape[:2]
    half = state["down_blocks.1.resnets.0.conv1.weight"].shape[0]
    context = state["mid_block.resnets.0.emb.weight"].shape[1] - 1
    net = SmallUNet(in_channels, (full, half), context, state["conv_out.weight"].shape[0])
    step, guidance = config["step_index"], config["guidance"]
    dispersed = config.get("disperse", []) if step < config.get("inflate_tau", 0) else []
    matrix = _matrix(config["transform"]) if dispersed else None

    def with_table(table: dict[str, float], tau: int) -> nn.Module:
        changed = copy.deepcopy(net)
        for name in dispersed:
            assert matrix is not None
            _replace(changed, name, disperse_conv(changed.get_submodule(name), matrix))
        for name, factor in table.items():
            now = step_factor(factor, step, tau, config.get("progressive", False), name in dispersed)
            if now is not None:
                conv = changed.get_submodule(name)
                _replace(changed, name, ReDilatedConv2d.from_conv(conv, now, rounding="floor"))
        return changed

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        latent = inputs["latent"].repeat(2, 1, 1, 1)
        arguments = (latent, config["timestep"], inputs["context"])
        with torch.no_grad():
            uncond, text = with_table(config["dilate_settings"], config["dilate_tau"])(*arguments).chunk(2)
            vanilla, tau = uncond, config.get("ndcfg_tau", 0)
            if step < tau:
                vanilla = with_table(config["ndcfg_dilate_settings"], tau)(*arguments).chunk(2)[0]
                noise = noise_damped_guidance(vanilla, uncond, text, guidance)
            else:
                noise = classifier_free_guidance(uncond, text, guidance)
        found = {"uncond": uncond, "text": text, "vanilla_uncond": vanilla, "noise_pred": noise}
        for name in dispersed:
            conv: Any = net.get_submodule(name)
            assert matrix is not None
            found[f"inflated.{name}.weight"] = disperse_kernel(conv.weight, matrix)
        return found

    return Adapted(forward, net)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
