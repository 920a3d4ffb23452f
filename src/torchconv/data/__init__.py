"""Datasets as tensors: named sets, folders of images, ``.npz`` files and UCR/UEA ``.ts`` files.

``load(spec)`` answers with a ``Dataset``: training, validation and test split, class names, and the mean and standard
deviation of each channel. Importing this package imports neither torch nor Pillow; the first use does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchconv.data.dataset import Dataset, Split, normalise
    from torchconv.data.loading import load

NAMES = ("digits", "fashion-mnist", "cifar10")
"""The named sets that ``load`` knows."""

__all__ = ["NAMES", "Dataset", "Split", "load", "normalise"]

_HOME = {
    "Dataset": "torchconv.data.dataset",
    "Split": "torchconv.data.dataset",
    "normalise": "torchconv.data.dataset",
    "load": "torchconv.data.loading",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'torchconv.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
