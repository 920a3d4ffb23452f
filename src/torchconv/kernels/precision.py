"""Half precision is stored, not summed: sums, spectra and exponentials are taken in float32."""

from __future__ import annotations

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for half precision, any other type itself."""
    return torch.float32 if dtype in HALF else dtype


def widen(tensor: Tensor) -> Tensor:
    """Half precision as float32, anything else as it is."""
    return tensor.float() if tensor.dtype in HALF else tensor
