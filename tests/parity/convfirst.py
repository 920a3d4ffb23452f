"""ConvFirst and MBConv."""

from __future__ import annotations

from torch import Tensor, nn

from tests.parity.core import Adapted, Case
from torchconv.ops.convfirst import ConvFirst, MBConv


def adapt(case: Case) -> Adapted:
    """The class is named in the config, the rest are its arguments."""
    options = dict(case.config)
    blocks = {"ConvFirst": ConvFirst, "MBConv": MBConv}
    build = blocks[options.pop("cls", "ConvFirst")]
    module = build(**{**options, "act_cls": getattr(nn, options.get("act_cls", "SiLU"))})

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        y = module(inputs["x"])
        return {"y": y, **{f"after.{n}": b for n, b in module.named_buffers() if f"after.{n}" in case.outputs}}

    return Adapted(forward, module)
