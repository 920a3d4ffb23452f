"""How operators are computed fast: functions on tensors, no modules.

``from torchconv.kernels import adaptive_conv2d`` loads only the file that holds it.
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "adaptive_conv": "adaptive",
    "adaptive_conv2d": "adaptive",
    "adaptive_downscale": "resample",
    "autotune": "_depthwise_tune",
    "causal_conv1d": "causal",
    "deformable_sum": "deform",
    "depthwise_conv1d": "depthwise",
    "depthwise_conv2d": "depthwise",
    "depthwise_conv3d": "depthwise",
    "long_conv": "long",
    "long_conv_spectrum": "long",
    "inception_conv": "inception",
    "selective_scan": "scan",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"torchconv.kernels.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'torchconv.kernels' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
