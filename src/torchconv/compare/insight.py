"""What a trained network shows of itself in the report: learned kernels and its effective receptive field."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchconv.analysis.erf import erf
from torchconv.catalog import parts
from torchconv.data import Dataset, normalise

KERNELS = 16
IMAGES = 32
_OPERATORS = {p.target for p in parts() if p.kind == "operator"}


def _operators(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The network's operators: outermost modules announced as such, in order."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        announced = getattr(module, "part", None)
        if announced is None or announced.kind != "operator" or announced.target not in _OPERATORS:
            continue
        if not any(name.startswith(f"{outer}.") for outer, _ in found):
            found.append((name, module))
    return found


def _spatial_kernel(module: nn.Module, ndim: int) -> Tensor | None:
    """The kernel that acts on the map: that of the merged convolution, else the largest spatial weight inside."""
    operator: Any = module
    if operator.part.merges == "conv":
        weight: Tensor = operator.merge().weight
        return weight
    weights = [p for p in module.parameters() if p.dim() == ndim + 2 and max(p.shape[2:]) > 1]
    return max(weights, key=lambda p: p[0, 0].numel(), default=None)


def kernels_of(model: nn.Module, ndim: int) -> list[dict[str, Any]]:
    """Up to sixteen kernels of the first operator in the network, evenly over its channels, as nested lists.

    A 1-D kernel is one row, of a 3-D kernel the middle slice is shown. Empty where the operator has no kernel of its
    own (it makes them from the input).
    """
    for name, module in _operators(model):
        with torch.no_grad():
            weight = _spatial_kernel(module, ndim)
        if weight is None:
            continue
        flat = weight.detach().float().cpu().flatten(0, 1)
        # Evenly over the channels: the first ones may be alike (those that an Inception mixer passes on).
        flat = flat[torch.linspace(0, len(flat) - 1, min(KERNELS, len(flat))).round().long()]
        if ndim == 1:
            flat = flat.unsqueeze(1)
        elif ndim == 3:
            flat = flat[:, flat.shape[1] // 2]
        return [{"name": f"{name}[{i}]", "data": _rounded(k)} for i, k in enumerate(flat)]
    return []


def field_of(model: nn.Module, data: Dataset) -> dict[str, Any] | None:
    """Effective receptive field on up to 32 test items, before the global pooling; None where it cannot be measured."""
    x = normalise(data.test.x[:IMAGES], data.mean, data.std)
    names = {n for n, _ in model.named_modules()}
    device = next(model.parameters()).device
    try:
        result = erf(model, x.to(device), feature="blocks" if "blocks" in names else None)
    except ValueError:
        return None
    picture = result.log_map.float().cpu()
    if picture.dim() == 3:
        picture = picture.amax(0)
    picture = picture.reshape(1, 1, *picture.shape) if picture.dim() == 2 else picture.reshape(1, 1, 1, -1)
    height, width = (min(n, 64) for n in picture.shape[2:])
    small = nn.functional.adaptive_avg_pool2d(picture, (height, width))[0, 0]
    return {
        "size": list(data.test.x.shape[2:]),
        "map": _rounded(small),
        "sides": {str(t): s for t, s in result.sides.items()},
        "ratios": {str(t): r for t, r in result.ratios.items()},
    }


def _rounded(values: Tensor) -> list[list[float]]:
    return [[round(v, 5) for v in row] for row in values.tolist()]
