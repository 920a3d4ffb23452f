"""Large kernel attention, the attention around it, and the block of the visual attention network."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tests.parity.core import Adapted, Case, ParityError
from torchconv.models.forecast.van import VANBlock
from torchconv.ops.puyun import LKA1d, LKA2d, LKA3d, LKAttention1d, LKAttention2d, LKAttention3d

GATES = {1: LKA1d, 2: LKA2d, 3: LKA3d}
ATTENTIONS = {1: LKAttention1d, 2: LKAttention2d, 3: LKAttention3d}


def parts(case: Case) -> Adapted:
    config, names = case.config, set(case.state)
    ndim = case.inputs["x"].dim() - 2
    # The kernels say K (a multiple of d with their number of taps) and d.
    local, spread = (
        next(t.shape for n, t in case.state.items() if n.endswith(f"{layer}.weight"))
        for layer in ("conv0", "conv_spatial")
    )
    apart = [(k + 1) // 2 for k in local[2:]]
    sizes: dict[str, Any] = {"kernel_size": [k * d for k, d in zip(spread[2:], apart, strict=True)]}
    sizes["decomposition"] = apart
    module: nn.Module
    if "norm1.weight" in names:
        module = VANBlock(config.get("dim", local[0]), config.get("mlp_ratio", 4.0), **sizes)
    elif "proj_1.weight" in names:
        module = ATTENTIONS[ndim](config.get("d_model", local[0]), bias="proj_1.bias" in names, **sizes)
    else:
        module = GATES[ndim](config.get("dim", local[0]), bias="conv0.bias" in names, **sizes)

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        y = module(inputs["x"])
        # Running statistics after the step.
        return {"y": y, **{f"after.{n}": t for n, t in module.named_buffers()}}

    return Adapted(forward, module)


def adapt(case: Case) -> Adapted:
    """Which part it is follows from the parameters."""
    if any(name.endswith("conv_spatial.weight") for name in case.state):
        return parts(case)
    raise ParityError("only large kernel attention and its block are covered so far, not the forecasting system")
