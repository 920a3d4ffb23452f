"""Memory formats: whether a map is channels-last, and results in the format of their input."""

from __future__ import annotations

import torch
from torch import Tensor


def channels_last_format(ndim: int) -> torch.memory_format:
    """The channels-last format of maps with ``ndim`` spatial axes (two for lines, as maps of one row)."""
    return torch.channels_last_3d if ndim == 3 else torch.channels_last


def is_channels_last(x: Tensor) -> bool:
    """Channels vary fastest in memory, and saying so is not ambiguous (one channel, one position)."""
    if x.dim() not in (4, 5) or x.is_contiguous():
        return False
    return x.is_contiguous(memory_format=channels_last_format(x.dim() - 2))


def keep_layout(y: Tensor, x: Tensor) -> Tensor:
    """``y`` in channels-last memory where ``x`` is in no other, else contiguous."""
    if is_channels_last(x):
        return y.contiguous(memory_format=channels_last_format(x.dim() - 2))
    return y.contiguous()
