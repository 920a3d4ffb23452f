"""torchconv: the convolution literature as verified, interchangeable, fast PyTorch parts.

Sub-packages load when they are first named, so that ``import torchconv`` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

from torchconv._version import __version__

_SUBPACKAGES = (
    "analysis",
    "catalog",
    "claims",
    "compare",
    "compress",
    "data",
    "initializers",
    "kernels",
    "models",
    "ops",
    "surgery",
    "theory",
    "training",
    "weights",
)
_FUNCTIONS = {"param_groups": "torchconv.training"}

__all__ = ["__version__", "param_groups", *_SUBPACKAGES]


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"torchconv.{name}")
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    raise AttributeError(f"module 'torchconv' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
