"""What launches of Triton kernels share: the type that they add in, sizes of one to three axes as those of three."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor


def sum_type(x: Tensor) -> Any:
    """float64 for float64, otherwise float32."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def three(sizes: Sequence[int], fill: int = 1) -> tuple[int, ...]:
    """Sizes or strides, with ``fill`` for the first axes that are missing."""
    return (fill,) * (3 - len(sizes)) + tuple(sizes)
