"""Grouped-query attention as language models have it: what compressed convolutional attention is compared with."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from torchconv.ops.cca_mixing import rotary_table, rotate


class GroupedQueryAttention(nn.Module):
    """Causal attention, rotary, query heads sharing keys (Ainslie et al., arXiv 2305.13245); n_k = n_q is multi-head.

    A token leaves 2·n_k·d numbers in the cache.

    Shape:
        (B, S, E) → (B, S, E).
    """

    def __init__(self, embed_dim: int, heads: int, kv_heads: int, head_dim: int, theta: float = 1e4, **options: Any):
        super().__init__()
        self.head_dim, self.theta, self.share = head_dim, theta, heads != kv_heads
        self.q_proj = nn.Linear(embed_dim, heads * head_dim, bias=False, **options)
        self.k_proj = nn.Linear(embed_dim, kv_heads * head_dim, bias=False, **options)
        self.v_proj = nn.Linear(embed_dim, kv_heads * head_dim, bias=False, **options)
        self.o_proj = nn.Linear(heads * head_dim, embed_dim, bias=False, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        q, k, v = (f(x).unflatten(2, (-1, self.head_dim)) for f in (self.q_proj, self.k_proj, self.v_proj))
        table = rotary_table(0, x.shape[1], self.head_dim, 1.0, self.theta, x)
        q, k, v = (t.transpose(1, 2) for t in (rotate(q, *table), rotate(k, *table), v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.share)
        out: Tensor = self.o_proj(y.transpose(1, 2).flatten(2))
        return out
