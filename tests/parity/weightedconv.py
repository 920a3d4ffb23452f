"""Adapter for the authors' weighted convolutions, with a fixed or a trained density."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tests.parity.core import Adapted, Case, ParityError
from torchconv.ops.weightedconv import WeightedConv1d, WeightedConv2d, WeightedConv3d

_LAYERS: dict[str, Any] = {"wConv1d": WeightedConv1d, "wConv2d": WeightedConv2d, "wConv3d": WeightedConv3d}


def adapt(case: Case) -> Adapted:
    """Both kinds have one class name; the trained one finds its density in the state."""
    config = dict(case.config)
    name, trainable = config.pop("class", None), config.pop("trainable", "den" in case.state)
    if name not in _LAYERS:
        raise ParityError(f"unknown class {name!r}")
    if trainable:
        config.pop("den", None)
    layer = _LAYERS[name].official(**config)

    def forward(inputs: dict[str, Tensor]) -> Mapping[str, Tensor]:
        return {"y": layer(inputs["x"])}

    def extra(inputs: dict[str, Tensor]) -> Mapping[str, Tensor]:
        return {"kernel": layer.kernel(), "Phi": layer.phi()}

    return Adapted(forward, layer, extra=extra, fresh=lambda n: n in ("alfa", "Phi"))
