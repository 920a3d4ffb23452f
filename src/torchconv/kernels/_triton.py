"""What Triton kernels share: whether they can run on a device, and saying once why something slower runs instead."""

from __future__ import annotations

import importlib.util
import os
import warnings
from functools import lru_cache

import torch

_INSTALLED = importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Triton runs its kernels in Python, on any tensors, where ``TRITON_INTERPRET`` is set before its import."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


_INTERPRETED = interpreted()  # asked in hot paths, and fixed once triton is imported


def triton_available(device: torch.device) -> bool:
    """Triton is installed and compiles for ``device``, or its interpreter is on (``TRITON_INTERPRET=1``)."""
    return _INSTALLED and (device.type == "cuda" or _INTERPRETED)


@lru_cache(maxsize=64)
def say_once(message: str) -> None:
    """Warn, but not again with the same words."""
    warnings.warn(message, stacklevel=3)
