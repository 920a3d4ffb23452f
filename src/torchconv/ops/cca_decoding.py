"""Attention of new tokens to all so far, and what stays of them for the next; see :mod:`.cca`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class CCACache:
    """What the tokens so far leave behind, for decoding in steps; empty at the start, replaced by every call.

    Its tensors are never written to: ``copy.copy(cache)`` is a snapshot to go back to (speculative decoding).

    Attributes:
        key: (B, n_k, T, d) after normalisation and rotation.
        value: (B, n_k, T, d).
        conv: (B, t0 + t1 − 2, e_q + e_k), the last queries and keys before the convolutions, oldest first.
        delayed: (B, 1, e_k / 2), the half of the last token's value that the next one takes.
        real: (B, T) bool, False at padding; None where there is none.
    """

    key: Tensor | None = None
    value: Tensor | None = None
    conv: Tensor | None = None
    delayed: Tensor | None = None
    real: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens so far."""
        return 0 if self.key is None else self.key.shape[2]

    def continued_by(self, real: Tensor) -> bool:
        """Whether no padding of ``real`` (B, S), True at tokens, comes after a token."""
        if self.length:
            before = real.new_ones(len(real), 1) if self.real is None else self.real[:, -1:]
            real = torch.cat([before, real], 1)
        return not bool((real[:, :-1] & ~real[:, 1:]).any())

    def append(self, key: Tensor, value: Tensor, real: Tensor | None) -> None:
        """Take in the keys and values of new tokens."""
        if real is not None or self.real is not None:
            old = self.real if self.real is not None else key.new_ones(len(key), self.length, dtype=torch.bool)
            new = real if real is not None else key.new_ones(len(key), key.shape[2], dtype=torch.bool)
            self.real = torch.cat([old, new], 1)
        self.key = key if self.key is None else torch.cat([self.key, key], 2)
        self.value = value if self.value is None else torch.cat([self.value, value], 2)


def visible(
    queries: int, keys: int, real: Tensor | None = None, window: int | None = None, device: Any = None
) -> Tensor:
    """Which keys the last ``queries`` of ``keys`` tokens see: those not after them that are no padding, and themselves.

    Args:
        queries, keys: how many.
        real: (B, keys) bool, False at padding, or None.
        window: how many keys at most, the token's own included; None is all.
        device: where to make it.

    Shape:
        → (queries, keys), or (B, 1, queries, keys) with ``real``.

    Example:
        >>> visible(2, 3, window=2)
        tensor([[ True,  True, False],
                [False,  True,  True]])
    """
    column, row = torch.arange(keys, device=device), torch.arange(keys - queries, keys, device=device)[:, None]
    seen = column <= row
    if window is not None:
        seen = seen & (column > row - window)
    # Padding sees itself, so that no row is empty, which not every kernel of softmax survives.
    return seen if real is None else (seen & real[:, None, None]) | (column == row)


def compressed_attention(
    q: Tensor, k: Tensor, v: Tensor, real: Tensor | None = None, window: int | None = None
) -> Tensor:
    """Causal attention of the last queries to the keys, query head i with key head i // (n_q / n_k).

    Args:
        q: queries; as many as keys, or the last of them.
        k, v: keys and values.
        real: (B, T) bool, False at padding, or None.
        window: how many keys a query sees at most, its own included; None is all.

    Shape:
        q (B, n_q, S, d), k and v (B, n_k, T, d), S ≤ T → (B, n_q, S, d).
    """
    queries, keys, share = q.shape[2], k.shape[2], q.shape[1] != k.shape[1]
    if window is not None and keys > queries + window - 1:  # before all windows
        first = keys - queries - window + 1
        k, v, real = k[:, :, first:], v[:, :, first:], None if real is None else real[:, first:]
        keys -= first
    inside = window is None or keys <= window
    if real is None and inside and queries in (1, keys):
        return F.scaled_dot_product_attention(q, k, v, is_causal=bool(queries > 1), enable_gqa=share)
    mask = visible(queries, keys, real, window, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=share)
