"""Fourier units, spectral transform, FFC blocks, Fourier kernels, capsule routing, vegetation indices."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tests.parity.core import Adapted, Case, ParityError
from torchconv.ops.ffdnn import FFC2d, FFCBlock
from torchconv.ops.ffdnn_capsules import dynamic_routing, margin_loss
from torchconv.ops.ffdnn_series import INDICES, fourier_kernel_conv, time_kernel, vegetation_index
from torchconv.ops.ffdnn_spectral import FourierUnit, SpectralTransform


def adapt(case: Case) -> Adapted:
    """By the class of the config, or by the inputs."""
    config = case.config
    if "cls" in config:
        return _spectral(case)
    if "weight_ri" in case.inputs:
        return Adapted(_fourier_kernel)
    if "bands" in case.inputs:
        return Adapted(lambda inputs: _indices(case, inputs["bands"]))
    if "u" in case.inputs:
        return Adapted(lambda inputs: _routing(config, inputs))
    raise ParityError(
        "neither a class, nor a Fourier kernel, nor capsules, nor bands; whole networks have no code to check"
    )


def _spectral(case: Case) -> Adapted:
    config = case.config
    kind, channels = config["cls"], (config["in_channels"], config["out_channels"])
    groups, lfu = config.get("groups", 1), config.get("enable_lfu", True)
    ndim = next((t.dim() - 2 for n, t in case.state.items() if n.endswith("weight") and t.dim() > 1), 2)
    module: Any
    if kind == "FourierUnit":
        module = FourierUnit(*channels, groups, ndim)
    elif kind == "SpectralTransform":
        stride = 2 if config.get("stride") == 2 else 1  # any other one does nothing in the authors' code
        module = SpectralTransform(*channels, stride, groups, lfu, ndim)
    elif kind in ("FFC_BN_ACT", "FFC"):
        return _ffc(case, kind == "FFC")
    else:
        raise ParityError(f"unknown class {kind!r}")
    return Adapted(lambda inputs: {"y": module(inputs["x"])}, module)


def _ffc(case: Case, bare: bool) -> Adapted:
    config = case.config
    kernel_size = config.get("kernel_size", 3)
    # Without local channels on both sides no convolution is left that could be padded.
    everywhere = min(config.get("ratio_gin", 0.5), config.get("ratio_gout", 0.5)) >= 1
    sizes = (
        config["in_channels"],
        config["out_channels"],
        kernel_size,
        config.get("stride", 1),
        "same" if everywhere else config.get("padding", 0),
        config.get("dilation", 1),
        config.get("groups", 1),
        config.get("bias", False),
    )
    shares: dict[str, Any] = {
        "ratio_gin": config.get("ratio_gin", 0.5),
        "ratio_gout": config.get("ratio_gout", 0.5),
        "enable_lfu": config.get("enable_lfu", True),
    }
    activation = getattr(nn, str(config.get("activation_layer") or "Identity").rsplit(".", 1)[-1])
    module: Any = FFC2d(*sizes, **shares) if bare else FFCBlock(*sizes, **shares, activation=activation)
    apply, ffc = (module.local_global, module) if bare else (module, module.ffc)
    if ffc.convg2g is not None and not ffc.in_local:
        ffc.convg2g.ceil_mode = False  # the authors round down, which only shows where no convolution is added

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        local, other = inputs.get("x_local"), inputs.get("x_global")
        if "x" in inputs:
            local, other = (inputs["x"], None) if shares["ratio_gin"] < 1 else (None, inputs["x"])
        y_local, y_global = apply(local, other)
        found = {"y_local": y_local, "y_global": y_global}
        present = {n: t for n, t in found.items() if t is not None}
        return {"y": next(iter(present.values()))} if set(case.outputs) == {"y"} else present

    return Adapted(forward, module)


def _fourier_kernel(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    x, weight = inputs["x"], inputs["weight_ri"]
    return {"y": fourier_kernel_conv(x, weight), "time_kernel": time_kernel(weight, x.shape[-1])}


def _routing(config: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    v, coupling = dynamic_routing(inputs["u"], inputs["weight"], config.get("iterations", 3))
    margins = (config.get("m_pos", 0.9), config.get("m_neg", 0.1), config.get("lam", 0.5))
    loss = margin_loss(v.norm(dim=2), inputs["label"], *margins)
    return {"v": v, "coupling": coupling, "loss": loss, "margin_loss": loss.reshape(1)}


def _indices(case: Case, bands: Tensor) -> dict[str, Tensor]:
    config = case.config
    order = config.get("band_order", ["B3", "B4", "B5", "B6", "B8", "B8A"])
    named = {band: bands[..., i] for i, band in enumerate(order)}
    options = {k: config[k] for k in ("soil_slope", "clair_alpha", "wdvi_inf", "clip") if k in config}
    wanted = [name for name in INDICES if name in case.outputs]
    return {name: vegetation_index(name, named, config.get("band_map"), **options) for name in wanted}
