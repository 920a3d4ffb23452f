"""What Triton kernels share: whether they are interpreted, and saying once why something slower runs instead."""

from __future__ import annotations

import os
import warnings
from functools import lru_cache


def interpreted() -> bool:
    """Triton runs its kernels in Python, on any tensors, where ``TRITON_INTERPRET`` is set before its import."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@lru_cache(maxsize=64)
def say_once(message: str) -> None:
    """Warn, but not again with the same words."""
    warnings.warn(message, stacklevel=3)
