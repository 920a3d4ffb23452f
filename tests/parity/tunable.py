"""Tunable convolutions of any rank, transposed, linear, parameter, and EDSR."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.parity.core import Adapted, Case, ParityError
from torchconv.models.restore.tunable import TunableEDSR
from torchconv.ops import tunable, tunable_transposed
from torchconv.ops.tunable_layers import TunableLinear, TunableParameter


def adapt(case: Case) -> Adapted:
    """The class is in the config; "tuning" (our default ω) and the mean shift are not in the authors' states."""
    module = _module(case)

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        arguments = [inputs["x"]] if "x" in inputs else []
        return {"y": module(*arguments, inputs["params"])}

    return Adapted(
        forward,
        module,
        ignore=lambda n: n.endswith("num_batches_tracked") or n.startswith(("sub_mean.", "add_mean.")),
        fresh=lambda n: n.endswith("tuning"),
    )


def _module(case: Case) -> nn.Module:
    # The authors' classes take null for a default.
    config = {name: value for name, value in case.config.items() if value is not None}
    kind = config.get("class", "TunableConv2d")
    mixing: dict[str, Any] = {
        "num_params": config.get("num_params", case.inputs["params"].shape[-1]),
        "expand_params": config.get("expand_params", 1),
        "mode": config.get("mode", "mlp" if any(".mlp." in f".{n}" for n in case.state) else "linear"),
    }
    bias = config.get("bias", "bias" in case.state)
    if kind == "TunableEDSR":
        names = ("img_channels", "num_blocks", "num_channels", "scale")
        return TunableEDSR(**{n: config[n] for n in names if n in config}, **mixing)
    if kind == "TunableParameter":
        return TunableParameter(torch.zeros(config["data_shape"]), **mixing)
    if kind in ("TunableDense", "TunableLinear"):
        return TunableLinear(config["in_channels"], config["out_channels"], bias, **mixing)
    channels = (config["in_channels"], config["out_channels"], _size(config["kernel_size"]))
    options = {n: _size(config.get(n, 1)) for n in ("stride", "dilation")}
    options |= {"groups": config.get("groups", 1), "bias": bias, "padding": _size(config.get("padding", 0)), **mixing}
    if kind.startswith("TunableConvTranspose"):
        output_padding = _size(config.get("output_padding", 0))
        module: nn.Module = getattr(tunable_transposed, kind)(*channels, output_padding=output_padding, **options)
        return module
    if not hasattr(tunable, kind):
        raise ParityError(f"class={kind!r}: unknown")
    module = getattr(tunable, kind)(*channels, **options)
    return module


def _size(value: Any) -> Any:
    """Sizes in a config are numbers or lists of them."""
    return tuple(value) if isinstance(value, list) else value
