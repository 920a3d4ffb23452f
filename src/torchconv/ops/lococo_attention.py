"""Attention that reads a long text chunk by chunk with a cache of bounded size.

Cai, Tian, Wang, Chen 2024, "LoCoCo: Dropping In Convolutions for Long Context Compression", arXiv 2406.05317.

For each chunk of q tokens, with a cache of at most M slots after compression:

    cache longer than M + 16 → compress it to M (``lococo.py``), by the attention that the last chunk paid
    append the chunk's rotated keys and its values; all slots are seen, the chunk itself causally
    y = softmax(Q Kᵀ / √d + causal) V W_o, s = column sums of the softmax, for the next compression

4·E² parameters and the compressor's. A text of n tokens costs O(n·(M + q)) instead of O(n²), and the cache holds at
most M + 16 + q tokens. Positions count all tokens ever read; keys are rotated before they are mixed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive
from torchconv.catalog import part
from torchconv.kernels.precision import wide_dtype
from torchconv.ops.cca_mixing import rotary_table, rotate
from torchconv.ops.lococo import LoCoCo, evict_cache

METHODS = ("conv", "hh")


@dataclass
class LoCoCoCache:
    """What the text so far leaves behind in one layer; empty at the start, replaced by every chunk.

    Its tensors are never written to: ``copy.copy(cache)`` is a snapshot to go back to.

    Attributes:
        key, value: (B, n_k, T, d), keys rotated.
        scores: (B, n_k, T), attention that the last chunk paid to each slot.
        seen: tokens read so far, also those that were compressed.
    """

    key: Tensor | None = None
    value: Tensor | None = None
    scores: Tensor | None = None
    seen: int = 0

    @property
    def length(self) -> int:
        """Slots in use."""
        return 0 if self.key is None else self.key.shape[2]


def scored_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of the last S of T positions to all before them and themselves, and how much each position got.

    Args:
        q: queries of the last S positions; query head i looks at key head i // (n_q / n_k).
        k, v: keys and values.

    Shape:
        q (B, n_q, S, d), k and v (B, n_k, T, d), S ≤ T → y (B, n_q, S, d), scores (B, n_k, T): sums over the queries
        and the heads that share a key, at least float32, without gradient.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> y, scores = scored_attention(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 3, 4), torch.ones(1, 1, 3, 4))
        >>> scores
        tensor([[[0.8333, 0.8333, 0.3333]]])
    """
    heads, queries, dim = q.shape[1:]
    keys = k.shape[2]
    if v.shape != k.shape or k.shape[::3] != q.shape[::3] or queries > keys or heads % max(k.shape[1], 1):
        shapes = f"q of shape {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"{shapes}: expected (B, n_q, S, d) and twice (B, n_k, T, d), S ≤ T, n_k a divisor of n_q")
    share = heads // k.shape[1]
    grouped = q.unflatten(1, (-1, share)).flatten(2, 3)  # (B, n_k, share · S, d): heads of a key after each other
    logits = (grouped @ k.transpose(2, 3)) * dim**-0.5
    later = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu(keys - queries + 1)
    weights = logits.masked_fill(later.repeat(share, 1), float("-inf")).softmax(-1, dtype=wide_dtype(logits.dtype))
    y = weights.to(v.dtype) @ v
    return y.unflatten(2, (share, queries)).flatten(1, 2), weights.detach().sum(2)


@part(
    "lococo-attention",
    paper="lococo",
    kind="layer",
    dims=(1,),
    mixes="space+channels",
    probe={
        "build": {
            "hidden_size": 8,
            "num_heads": 2,
            "mem_size": 4,
            "kernel_size": 3,
            "chunk_size": 5,
            "slack": 0,
            "detach": False,
        },
        "inputs": [[2, 14, 8]],
    },
    keywords="attention fixed size KV cache long context chunks streaming language model Llama compression",
)
class LoCoCoAttention(nn.Module):
    """Causal self-attention over texts of any length with a cache of bounded size.

    Args:
        hidden_size: features E of a token.
        num_heads: query heads.
        num_kv_heads: key and value heads, which divide ``num_heads``; unset is as many. Fewer are an extension of
            ours: a key's score is the sum over the queries that share it.
        head_dim: features d of a head, even; unset is E / num_heads.
        mem_size: slots M that a long cache is compressed to.
        method: "conv" compresses with :class:`torchconv.ops.lococo.LoCoCo`, "hh" evicts all but heavy hitters.
        chunk_size: longer inputs are read in chunks of so many tokens; None reads each input at once.
        slack: how far above M the cache may be before it is compressed; the published code has 16.
        theta: base of the rotations' wavelengths.
        rope_factor: positions are divided by it (linear interpolation of positions); may be less than 1.
        detach: take what earlier chunks left as constant, as published; memory then does not grow with the text, and
            the first chunk sends no gradient to ``k_proj`` and ``v_proj``. False trains through the cache.
        hh_keep_rate, local_len, n_convlayer, kernel_size, hidden_act, expand, normalizer_init, init_std: of the
            compressor.

    Shape:
        (B, S, E) → (B, S, E).

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> layer = LoCoCoAttention(32, num_heads=2, mem_size=16, kernel_size=5, chunk_size=24)
        >>> cache = LoCoCoCache()
        >>> layer(torch.zeros(1, 100, 32), cache=cache).shape
        torch.Size([1, 100, 32])
        >>> cache.seen, cache.length
        (100, 20)

    Reference: Cai et al., arXiv 2406.05317; parameters are named as in the authors' checkpoints, from ``self_attn.``
    on.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        mem_size: int = 128,
        method: str = "conv",
        chunk_size: int | None = 512,
        slack: int = 16,
        theta: float = 1e4,
        rope_factor: float = 1.0,
        detach: bool = True,
        hh_keep_rate: float = 0.5,
        local_len: int = 0,
        n_convlayer: int = 1,
        kernel_size: int = 21,
        hidden_act: str = "relu",
        expand: int = 1,
        normalizer_init: float = 0.5,
        init_std: float = 1.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_positive("hidden_size", hidden_size)
        check_positive("num_heads", num_heads)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_positive("num_kv_heads", num_kv_heads)
        check(num_heads % num_kv_heads == 0, "num_kv_heads", num_kv_heads, f"must divide num_heads={num_heads}")
        if head_dim is None:
            divides = hidden_size % num_heads == 0
            check(divides, "num_heads", num_heads, f"must divide hidden_size={hidden_size}, or give head_dim")
            head_dim = hidden_size // num_heads
        check_positive("head_dim", head_dim)
        check(head_dim % 2 == 0, "head_dim", head_dim, "must be even: features turn in pairs")
        check_positive("mem_size", mem_size)
        check_choice("method", method, METHODS)
        if chunk_size is not None:
            check_positive("chunk_size", chunk_size)
        check_positive("slack", slack, zero=True)
        check(theta > 0, "theta", theta, "must be positive")
        check(rope_factor > 0, "rope_factor", rope_factor, "must be positive")
        check(0 <= local_len <= mem_size, "local_len", local_len, f"must be between 0 and mem_size={mem_size}")
        self.hidden_size, self.num_heads, self.num_kv_heads, self.head_dim = (
            hidden_size,
            num_heads,
            num_kv_heads,
            head_dim,
        )
        self.mem_size, self.method, self.local_len = mem_size, method, local_len
        self.chunk_size, self.slack, self.theta, self.rope_factor = chunk_size, slack, theta, rope_factor
        self.detach = detach
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False, **place)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False, **place)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False, **place)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False, **place)
        self.memory_saver: LoCoCo | None = None
        if method == "conv":
            self.memory_saver = LoCoCo(
                head_dim,
                mem_size,
                hh_keep_rate=hh_keep_rate,
                local_len=local_len,
                n_convlayer=n_convlayer,
                kernel_size=kernel_size,
                hidden_act=hidden_act,
                expand=expand,
                normalizer_init=normalizer_init,
                init_std=init_std,
                detach=detach,
                **place,
            )

    def compress(self, key: Tensor, value: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """``mem_size`` slots for a longer cache, by the layer's method."""
        if self.method == "conv" and self.memory_saver is not None:
            slots: tuple[Tensor, Tensor] = self.memory_saver(key, value, scores)
            return slots
        if self.detach:
            key, value = key.detach(), value.detach()
        return evict_cache(key, value, scores, self.mem_size, self.local_len)

    def forward(self, x: Tensor, cache: LoCoCoCache | None = None) -> Tensor:
        """Attend.

        Args:
            x: tokens; with a cache those that follow its. Padding is not provided for.
            cache: what earlier tokens left, updated; None begins anew and leaves nothing behind.

        Shape:
            (B, S, E) → (B, S, E).
        """
        if x.dim() != 3 or x.shape[2] != self.hidden_size or x.shape[1] == 0:
            raise ValueError(f"x of shape {tuple(x.shape)}: expected (B, S, {self.hidden_size}) with S ≥ 1")
        cache = LoCoCoCache() if cache is None else cache
        if cache.key is not None and len(cache.key) != len(x):
            raise ValueError(f"cache of {len(cache.key)} sequences: x has {len(x)}; begin a new LoCoCoCache()")
        chunks = [self._read(chunk, cache) for chunk in x.split(self.chunk_size or x.shape[1], 1)]
        return torch.cat(chunks, 1) if len(chunks) > 1 else chunks[0]

    def _read(self, x: Tensor, cache: LoCoCoCache) -> Tensor:
        q, k, v = (f(x).unflatten(2, (-1, self.head_dim)) for f in (self.q_proj, self.k_proj, self.v_proj))
        table = rotary_table(cache.seen, x.shape[1], self.head_dim, 1.0, self.theta, x, self.rope_factor)
        q, k, v = rotate(q, *table).transpose(1, 2), rotate(k, *table).transpose(1, 2), v.transpose(1, 2)
        if cache.key is not None and cache.value is not None and cache.scores is not None:
            key, value = cache.key, cache.value
            if cache.length > self.mem_size + self.slack:
                key, value = self.compress(key, value, cache.scores)
            k, v = torch.cat([key, k], 2), torch.cat([value, v], 2)
        elif self.detach:
            k, v = k.detach(), v.detach()
        y, cache.scores = scored_attention(q, k, v)
        cache.key, cache.value = (k.detach(), v.detach()) if self.detach else (k, v)
        cache.seen += x.shape[1]
        out: Tensor = self.o_proj(y.transpose(1, 2).flatten(2))
        return out

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return (
            f"{self.hidden_size}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, mem_size={self.mem_size}, method={self.method!r}, "
            f"chunk_size={self.chunk_size}, slack={self.slack}, theta={self.theta:g}, rope_factor={self.rope_factor:g}"
        )
