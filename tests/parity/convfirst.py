"""ConvFirst, MBConv and MLP."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from tests.parity.core import Adapted, Case, ParityError
from torchconv.ops.convfirst import MLP, ConvFirst, MBConv


def adapt(case: Case) -> Adapted:
    """The class is named in the config, the rest are its arguments."""
    options = dict(case.config)
    blocks: dict[str, Callable[..., nn.Module]] = {"ConvFirst": ConvFirst, "MBConv": MBConv, "MLP": MLP}
    name = options.pop("cls", "ConvFirst")
    if name not in blocks or "x" not in case.inputs:
        raise ParityError(
            "only the blocks ConvFirst, MBConv and MLP are covered so far, not the counts and the waterline"
        )
    build = blocks[name]
    if build is MLP:  # the author's block takes the arguments of a convolution and leaves them
        options = {n: v for n, v in options.items() if n not in ("kernel_size", "stride", "group_width")}
    module = build(**{**options, "act_cls": getattr(nn, options.get("act_cls", "SiLU"))})

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        y = module(inputs["x"])
        return {"y": y, **{f"after.{n}": b for n, b in module.named_buffers() if f"after.{n}" in case.outputs}}

    return Adapted(forward, module)
