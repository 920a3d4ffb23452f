"""Adapter for the authors' DCLS layers, the repulsive loss and ConvNeXt-DCLS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tests.parity.core import Adapted, Case, ParityError
from torchconv.models.classify.dcls import ConvNeXtDCLS
from torchconv.ops.dcls import DCLSBase, DCLSConv1d, DCLSConv2d, DCLSConv3d, repulsive_loss
from torchconv.ops.dcls_restricted import Dcls2_1d, Dcls2dK1d, Dcls3_1d

_LAYERS: dict[str, Any] = {
    "Dcls1d": DCLSConv1d,
    "Dcls2d": DCLSConv2d,
    "Dcls3d": DCLSConv3d,
    "Dcls2_1d": Dcls2_1d,
    "Dcls3_1d": Dcls3_1d,
    "Dcls2dK1d": Dcls2dK1d,
}
_LEARNED_AXES = {"Dcls2d": 2, "Dcls3d": 3}


def _layer(config: dict[str, Any]) -> DCLSBase:
    options = {k: v for k, v in config.items() if k not in ("class", "use_implicit_gemm", "dilated_kernel_size")}
    size = config.get("dilated_kernel_size", 1)
    if config["class"] not in _LEARNED_AXES and not isinstance(size, int):
        (size,) = size
    made: DCLSBase = _LAYERS[config["class"]](**options, kernel_size=size, axis_order="official")
    return made


def _network(config: dict[str, Any]) -> nn.Module:
    return ConvNeXtDCLS(**{k: v for k, v in config.items() if k != "class"})


def adapt(case: Case) -> Adapted:
    """The repulsive loss has no class; the layers are built with the authors' order of axes."""
    name = case.config.get("class")
    if name is None:
        positions = [n for n in case.inputs if not n.startswith("cotangent")]

        def loss(inputs: dict[str, Tensor]) -> Mapping[str, Tensor]:
            return {"loss": repulsive_loss([inputs[n] for n in positions], official=True)}

        return Adapted(loss)
    if name in _LAYERS:
        layer = _layer(case.config)

        def forward(inputs: dict[str, Tensor]) -> Mapping[str, Tensor]:
            return {"y": layer(inputs["x"])}

        return Adapted(
            forward,
            layer,
            extra=lambda inputs: {"kernel": layer.learned_kernel()},
            ignore=lambda n: n.startswith("DCK."),
        )
    if name in ("ConvNeXt_dcls", "ConvNeXt"):
        network = _network(case.config)
        return Adapted(lambda inputs: {"y": network(inputs["x"])}, network)
    raise ParityError(f"unknown class {name!r}")
