"""Kernels applied per pixel and colour, and the content-adaptive resampler with fractional taps."""

from __future__ import annotations

from torch import Tensor

from tests.parity.core import Adapted, Case, ParityError
from torchconv.ops.adknet import adaptive_downscale, fractional_downscale, normalise_kernels


def adapt(case: Case) -> Adapted:
    """Files with offsets hold the fractional form."""
    return Adapted(_fractional(case) if "offsets_v" in case.inputs else _per_pixel(case))


def _fractional(case: Case):
    config = case.config

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors = (inputs[name] for name in ("image", "kernels", "offsets_v", "offsets_h"))
        options = (config.get(name) for name in ("kernel_size", "offset_unit", "padding"))
        return {"y": fractional_downscale(*tensors, config["scale"], *options)}

    return forward


def _per_pixel(case: Case):
    config = case.config
    padding = config.get("padding", "reflect")
    if padding != "reflect":
        raise ParityError(f"padding={padding!r}: maps are mirrored at the border ('reflect')")
    normalisation = config.get("normalisation", "softmax")

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        given = inputs["logits"] if "logits" in inputs else inputs["kernels"]
        shared = given.dim() == inputs["image"].dim()  # one kernel for all colours, without an axis for them
        kernels = given.unsqueeze(1) if shared else given
        if "logits" in inputs:
            kernels = normalise_kernels(kernels, normalisation)
        # grad.kernels is the gradient of the normalised kernels, which are no input of the file.
        kernels = kernels.squeeze(1) if shared else kernels.view_as(kernels)
        inputs["kernels"] = kernels
        applied = kernels.unsqueeze(1) if shared else kernels
        y = adaptive_downscale(inputs["image"], applied, config["scale"], config.get("kernel_size"), "none")
        return {"y": y, "kernels": kernels}

    return forward
