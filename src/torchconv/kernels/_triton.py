"""What Triton kernels share: whether they can run on a device, and saying once why something slower runs instead."""

from __future__ import annotations

import importlib.util
import os
import warnings
from functools import lru_cache

import torch


def triton_available(device: torch.device) -> bool:
    """Triton is installed and compiles for ``device``, or its interpreter is on (``TRITON_INTERPRET=1``)."""
    return _available(device.type)


@lru_cache(maxsize=8)
def _available(kind: str) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    return kind == "cuda" or os.environ.get("TRITON_INTERPRET", "0") == "1"


@lru_cache(maxsize=64)
def say_once(message: str) -> None:
    """Warn, but not again with the same words."""
    warnings.warn(message, stacklevel=3)
