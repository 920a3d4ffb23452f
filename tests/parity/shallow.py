"""Residual layers in a row and side by side, the expansion of linear layers, the collapsed kernel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.parity.core import Adapted, Case, ParityError
from torchconv.ops.shallow import ParallelResidual, ParallelResidual1d, ParallelResidual2d, ParallelResidual3d

KINDS = {1: ParallelResidual1d, 2: ParallelResidual2d, 3: ParallelResidual3d}
LAYOUTS: dict[str, int | None] = {"sequential": None, "parallel": 1}


class Both(nn.Module):
    """Each layout with parameters and an input of its own, since gradients are given for each."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        config, x = case.config, case.inputs["x"]
        ndim = x.dim() - 2
        if ndim not in KINDS:
            raise ParityError(f"x of shape {tuple(x.shape)}: expected one to three spatial axes")
        # What the config leaves out is as the parameters have it.
        weights = [tensor for name, tensor in case.state.items() if name.endswith(".weight")]
        biased = any(name.endswith(".bias") for name in case.state)
        for layout, order in LAYOUTS.items():
            block: ParallelResidual = KINDS[ndim](
                config.get("channels", x.shape[1]),
                kernel_size=config.get("kernel_size", tuple(weights[0].shape[2:])),
                bias=config.get("bias", biased),
                n_layers=config.get("n_layers", len(weights)),
                activation=config.get("activation", "relu"),
                order=order,
            )
            block.register_parameter("x", nn.Parameter(x.clone()))
            self.add_module(layout, block)

    def forward(self) -> dict[str, Tensor]:
        return {layout: block(block.x) for layout, block in self.named_children()}


def adapt(case: Case) -> Adapted:
    """Outputs of both layouts; ``orderM`` and ``merged.*`` as far as the file has them."""
    module = Both(case)
    parallel = module.get_submodule("parallel")
    assert isinstance(parallel, ParallelResidual)

    def state(official: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            **{f"{layout}.{name}": tensor for layout in LAYOUTS for name, tensor in official.items()},
            **{f"{layout}.x": case.inputs["x"] for layout in LAYOUTS},
        }

    def forward(_: dict[str, Tensor]) -> dict[str, Tensor]:
        outputs = module()
        return {"y": torch.stack(list(outputs.values())).sum(0), **outputs}

    def extra(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name in case.outputs:
            if name.startswith("order"):
                found[name] = torch.stack(parallel.terms(inputs["x"], int(name.removeprefix("order")))).sum(0)
        if any(name.startswith("merged.") for name in case.outputs):
            found.update({f"merged.{n}": t for n, t in parallel.merge().state_dict().items()})
        return found

    return Adapted(forward, module, state, extra=extra)
