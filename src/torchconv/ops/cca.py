"""Compressed convolutional attention: attention inside a narrow latent, with tiny causal convolutions on q and k.

Figliolia et al. 2025, "Compressed Convolutional Attention: Efficient Attention in a Compressed Latent Space",
arXiv 2510.04476.

Queries, keys and values are projected down from E features and attend there. What the compression costs is bought back
by two causal convolutions over [q ‖ k], a mean of q and k as residual, and values of which half is a token late. With
fewer key than query heads it is CCGQA.

    q0 = x W_q,  k0 = x W_k,  M_q = (q0 + repeat(k0)) / 2,  M_k = mean of M_q over the heads that share a key
    [q1 ‖ k1] = grouped(depthwise([q0 ‖ k0]))            causal, t0 and t1 taps; one group for each head in the second
    q = √d · unit(q1 + M_q),  k = √d · τ · unit(k1 + M_k),  v = [x W_va ‖ shift(x W_vb)]
    y = softmax(rope(q) rope(k)ᵀ / √d + causal) v W_o

With e_q = n_q·d and e_k = n_k·d: 2E(e_q + e_k) + (e_q + e_k)(t0 + d·t1 + 2) + n_k parameters, and for S tokens
4·S·E·(e_q + e_k) + 2·S·(e_q + e_k)(t0 + d·t1) + 4·S²·e_q FLOPs, where attention of the full width takes
8·S·E² + 4·S²·E. A token leaves 2·e_k numbers in the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchconv._common import check, check_positive
from torchconv.catalog import part
from torchconv.ops.cca_decoding import CCACache, compressed_attention, visible
from torchconv.ops.cca_mixing import (
    causal_pair,
    head_norm,
    mean_residual,
    merge_pair,
    rotary_table,
    rotary_width,
    rotate,
    shifted_value,
)

Rotary = tuple[Tensor, Tensor]
# Names in the first checkpoints and in an interim form of them.
_RENAMED = (
    ("qkv.temp", "qk_norm.temp"),
    ("temp", "qk_norm.temp"),
    ("qkv.conv_qk.0.", "qkv_proj.conv_qk_depthwise."),
    ("qkv.conv_qk.1.", "qkv_proj.conv_qk_grouped."),
    ("qkv.", "qkv_proj."),
    ("qkv_proj.linear_q.", "qkv_proj.q_proj."),
    ("qkv_proj.linear_k.", "qkv_proj.k_proj."),
    ("qkv_proj.val_proj1.", "qkv_proj.v_proj_current."),
    ("qkv_proj.val_proj2.", "qkv_proj.v_proj_delayed."),
)


def convert_official(state: dict[str, Tensor], block: int = 0) -> dict[str, Tensor]:
    """The attention of one block of a ZAYA checkpoint, named as in :class:`CCA`.

    Args:
        state: the model's state, of transformers' ``zaya`` or of the authors, who number attention and experts in turn
            (block 3 is their layer 6).
        block: which.

    Raises:
        ValueError: the state has no such block.

    Example:
        >>> list(convert_official({"model.layers.6.self_attn.qkv.val_proj2.weight": torch.zeros(2, 4)}, block=3))
        ['qkv_proj.v_proj_delayed.weight']
    """
    original = any(".self_attn.qkv." in name for name in state)
    prefix = f"model.layers.{2 * block if original else block}.self_attn."
    found: dict[str, Tensor] = {}
    for full, tensor in state.items():
        name = full.removeprefix(prefix)
        if name == full:
            continue
        for old, new in _RENAMED:
            if name == old or (old.endswith(".") and name.startswith(old)):
                name = new + name.removeprefix(old)
        found[name] = tensor
    check(bool(found), "block", block, f"the state has no {prefix}*")
    return found


class CCAProjection(nn.Module):
    """Hidden states to mixed queries, keys and values; arguments as of :class:`CCA`.

    Shape:
        (B, S, E) → (B, S, n_q, d), (B, S, n_k, d), (B, S, n_k, d).
    """

    def __init__(
        self, embed_dim: int, heads: int, kv_heads: int, head_dim: int, time0: int, time1: int, **options: Any
    ) -> None:
        super().__init__()
        e_q, e_k = heads * head_dim, kv_heads * head_dim
        self.head_dim, self.before = head_dim, max(time0, 1) + time1 - 2
        self.q_proj = nn.Linear(embed_dim, e_q, **options)
        self.k_proj = nn.Linear(embed_dim, e_k, **options)
        self.v_proj_current = nn.Linear(embed_dim, e_k // 2, **options)
        self.v_proj_delayed = nn.Linear(embed_dim, e_k // 2, **options)
        place = {n: v for n, v in options.items() if n != "bias"}
        latent = e_q + e_k
        self.conv_qk_depthwise = nn.Conv1d(latent, latent, time0, groups=latent, **place) if time0 else None
        self.conv_qk_grouped = nn.Conv1d(latent, latent, time1, groups=heads + kv_heads, **place)

    def forward(self, x: Tensor, cache: CCACache | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Project and mix; takes up and leaves ``conv`` and ``delayed`` of ``cache``."""
        q0, k0 = self.q_proj(x), self.k_proj(x)
        current, delayed = self.v_proj_current(x), self.v_proj_delayed(x)
        z = torch.cat([q0, k0], 2)
        first, second = self.conv_qk_depthwise, self.conv_qk_grouped
        state = None if cache is None else cache.conv
        weight, bias = (None, None) if first is None else (first.weight, first.bias)
        mixed = causal_pair(z, weight, second.weight, bias, second.bias, state)
        q1, k1, q0, k0 = (
            t.unflatten(2, (-1, self.head_dim)) for t in (*mixed.split([q0.shape[2], k0.shape[2]], 2), q0, k0)
        )
        mean_q, mean_k = mean_residual(q0, k0)
        before = None if cache is None else cache.delayed
        if before is None:  # the projection of a token of zeros
            before = delayed.new_zeros(x.shape[0], 1, delayed.shape[2])
            before = before if self.v_proj_delayed.bias is None else before + self.v_proj_delayed.bias
        value = shifted_value(current, delayed, before).unflatten(2, (-1, self.head_dim))
        if cache is not None:
            past = z.new_zeros(x.shape[0], self.before, z.shape[2]) if state is None else state
            cache.conv = torch.cat([past, z], 1)[:, z.shape[1] :].clone()
            cache.delayed = delayed[:, -1:].clone()
        return q1 + mean_q, k1 + mean_k, value


class CCANorm(nn.Module):
    """Queries and keys at length √d, keys times their head's temperature."""

    def __init__(self, kv_heads: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.temp = nn.Parameter(torch.ones(kv_heads, device=device, dtype=dtype))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise (B, S, heads, d) each."""
        return head_norm(q), head_norm(k, self.temp)


@part(
    "cca",
    paper="cca",
    kind="layer",
    dims=(1,),
    mixes="space+channels",
    merges="self",
    probe={"build": {"embed_dim": 16, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4}, "inputs": [[2, 9, 16]]},
    keywords="compressed convolutional attention CCGQA GQA MLA KV cache language model transformer ZAYA decoding",
)
class CCA(nn.Module):
    """Compressed convolutional attention (CCA), with shared keys CCGQA: causal self-attention in a narrow latent.

    Args:
        embed_dim: features E of a token.
        num_heads: query heads n_q.
        num_kv_heads: key and value heads n_k, which divide n_q; unset is n_q, plain CCA.
        head_dim: features d of a head, n_k·d even; unset makes the queries half as wide as E. The queries are
            compressed C1 = E / (n_q·d) times, keys and values C2 = E / (n_k·d) times.
        time0, time1: taps of the depthwise and of the grouped convolution; ``time0`` 0 leaves the depthwise one out,
            as :meth:`merge` does.
        rotary: the share of a head's features that turn with the position, 0 to 1.
        theta: base of the turns' wavelengths.
        window: how many tokens back each one looks at most, itself included; unset is all.
        bias: biases in the linear maps; the convolutions always have them.

    Shape:
        (B, S, E) → (B, S, E).

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> layer = CCA(64, num_heads=8, num_kv_heads=2)
        >>> layer(torch.zeros(2, 10, 64)).shape
        torch.Size([2, 10, 64])
        >>> cache = CCACache()
        >>> for token in torch.zeros(2, 10, 64).split(1, 1):
        ...     y = layer(token, cache=cache)
        >>> cache.length, y.shape
        (10, torch.Size([2, 1, 64]))

    Reference: Figliolia et al., arXiv 2510.04476; parameters are named as in transformers' ``ZayaAttention``.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        time0: int = 2,
        time1: int = 2,
        rotary: float = 0.5,
        theta: float = 5e6,
        window: int | None = None,
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_positive("embed_dim", embed_dim)
        check_positive("num_heads", num_heads)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_positive("num_kv_heads", num_kv_heads)
        check(num_heads % num_kv_heads == 0, "num_kv_heads", num_kv_heads, f"must divide num_heads={num_heads}")
        head_dim = embed_dim // (2 * num_heads) if head_dim is None else head_dim
        check_positive("head_dim", head_dim)
        even = num_kv_heads * head_dim % 2 == 0
        check(even, "head_dim", head_dim, f"times num_kv_heads={num_kv_heads} must be even: half of a value is delayed")
        check(time0 >= 0, "time0", time0, "must be at least 1, or 0 for no depthwise convolution")
        check_positive("time1", time1)
        check(0 <= rotary <= 1, "rotary", rotary, "must be a share between 0 and 1")
        fits = rotary_width(head_dim, rotary) <= head_dim
        check(fits, "rotary", rotary, f"features turn in pairs, which do not fit in head_dim={head_dim}; take less")
        check(theta > 0, "theta", theta, "must be positive")
        check(window is None or window >= 1, "window", window, "must be at least 1, the token itself, or None for all")
        self.embed_dim, self.num_heads, self.num_kv_heads, self.head_dim = embed_dim, num_heads, num_kv_heads, head_dim
        self.time0, self.time1, self.rotary, self.theta = time0, time1, rotary, theta
        self.window, self.bias = window, bias
        options: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.qkv_proj = CCAProjection(embed_dim, num_heads, num_kv_heads, head_dim, time0, time1, **options)
        self.qk_norm = CCANorm(num_kv_heads, device, dtype)
        self.o_proj = nn.Linear(num_heads * head_dim, embed_dim, **options)

    def param_options(self) -> dict[str, dict[str, float]]:
        """Temperatures are not decayed."""
        return {"qk_norm.temp": {"weight_decay": 0.0}}

    def mixed(
        self, x: Tensor, padding_mask: Tensor | None = None, cache: CCACache | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values before the normalisation: (B, S, n_q, d) and twice (B, S, n_k, d)."""
        if padding_mask is not None:
            x = x.masked_fill(~padding_mask.bool().unsqueeze(2), 0.0)
        q, k, v = self.qkv_proj(x, cache)
        return q, k, v

    def _turned(self, q: Tensor, k: Tensor, start: int, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
        """Normalised and rotated, heads before time."""
        q, k = self.qk_norm(q, k)
        table = rotary or rotary_table(start, q.shape[1], self.head_dim, self.rotary, self.theta, q)
        return rotate(q, *table).transpose(1, 2), rotate(k, *table).transpose(1, 2)

    def attention_weights(
        self, x: Tensor, padding_mask: Tensor | None = None, *, rotary: Rotary | None = None
    ) -> Tensor:
        """Who looks at whom, (B, n_q, S, S), to look at: ``forward`` never forms it. Padding looks at all alike."""
        self._check(x, padding_mask, None)
        q, k, _ = self.mixed(x, padding_mask)
        q, k = self._turned(q, k, 0, rotary)
        logits = q @ k.repeat_interleave(self.num_heads // self.num_kv_heads, 1).transpose(2, 3) / self.head_dim**0.5
        seen = visible(x.shape[1], x.shape[1], None, self.window, x.device)
        if padding_mask is not None:
            seen = seen & padding_mask.bool()[:, None, None]
        return logits.masked_fill(~seen, torch.finfo(logits.dtype).min).softmax(-1)

    def forward(
        self,
        x: Tensor,
        padding_mask: Tensor | None = None,
        *,
        rotary: Rotary | None = None,
        cache: CCACache | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: tokens; with a cache those that follow its.
            padding_mask: (B, S), 1 at tokens and 0 at padding, which is taken as zeros, is seen by nobody and gives
                zeros. With a cache padding must come first; the cache remembers it.
            rotary: cosines and sines of the positions, (S, r) or (B, S, r) each, in place of the layer's own.
            cache: what earlier tokens left, updated.

        Shape:
            (B, S, E) → (B, S, E).
        """
        self._check(x, padding_mask, cache)
        real = None if padding_mask is None else padding_mask.bool()
        start = 0 if cache is None else cache.length
        q, k, v = self.mixed(x, real, cache)
        q, k = self._turned(q, k, start, rotary)
        v, seen = v.transpose(1, 2), real
        if cache is not None:
            cache.append(k, v, real)
            k, v, seen = cache.key, cache.value, cache.real  # type: ignore[assignment]
        y = self.o_proj(compressed_attention(q, k, v, seen, self.window).transpose(1, 2).flatten(2))
        out: Tensor = y if real is None else y.masked_fill(~real.unsqueeze(2), 0.0)
        return out

    def _check(self, x: Tensor, padding_mask: Tensor | None, cache: CCACache | None) -> None:
        if x.dim() != 3 or x.shape[2] != self.embed_dim or x.shape[1] == 0:
            raise ValueError(f"x of shape {tuple(x.shape)}: expected (B, S, {self.embed_dim}) with S ≥ 1")
        if padding_mask is not None and padding_mask.shape != x.shape[:2]:
            raise ValueError(f"padding_mask of shape {tuple(padding_mask.shape)}: expected {tuple(x.shape[:2])}")
        if cache is None:
            return
        if cache.key is not None and len(cache.key) != len(x):
            raise ValueError(f"cache of {len(cache.key)} sequences: x has {len(x)}; begin a new CCACache()")
        if padding_mask is not None and not cache.continued_by(padding_mask.bool()):
            raise ValueError(
                "padding_mask has padding after tokens: with a cache pad on the left, it keeps the last ones"
            )

    def merge(self) -> CCA:
        """The same with one convolution of t0 + t1 − 1 taps for two: exact, also at the start of a sequence."""
        merged = CCA(
            self.embed_dim,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            time0=0,
            time1=self.qkv_proj.before + 1,
            rotary=self.rotary,
            theta=self.theta,
            window=self.window,
            bias=self.bias,
            device=self.o_proj.weight.device,
            dtype=self.o_proj.weight.dtype,
        )
        state = {n: t.detach() for n, t in self.state_dict().items()}
        first, second = self.qkv_proj.conv_qk_depthwise, self.qkv_proj.conv_qk_grouped
        if first is not None:
            for name in ("weight", "bias"):
                del state[f"qkv_proj.conv_qk_depthwise.{name}"]
            with torch.no_grad():
                weight, bias = merge_pair(first.weight, second.weight, first.bias, second.bias)
            assert bias is not None
            state |= {"qkv_proj.conv_qk_grouped.weight": weight, "qkv_proj.conv_qk_grouped.bias": bias}
        merged.load_state_dict(state)
        return merged.train(self.training)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return (
            f"{self.embed_dim}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, time0={self.time0}, time1={self.time1}, rotary={self.rotary}, "
            f"theta={self.theta:g}, window={self.window}"
        )
