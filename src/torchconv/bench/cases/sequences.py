"""Sequences: short causal, long and structured kernels, the selective scan, and compressed convolutional attention."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchconv.bench.cases import Case, Place, case, installed
from torchconv.kernels import causal_conv1d, long_conv, selective_scan
from torchconv.ops._grouped_query import GroupedQueryAttention
from torchconv.ops.cca import CCA
from torchconv.ops.cca_mixing import rotary_table, rotate
from torchconv.ops.hrvmamba_scan import SelectiveScan2d
from torchconv.ops.lococo import ACTIVATIONS, LoCoCo, evict_cache, heavy_hitters
from torchconv.ops.lococo_attention import LoCoCoAttention
from torchconv.ops.longconv import LongConv1d, LongConvLayer
from torchconv.ops.serpent import SS2d
from torchconv.ops.sgconv import SGConv1d, SGConvLayer


def by_fft(x: Tensor, kernel: Tensor) -> Tensor:
    """Causal convolution with padded transforms of all rows at once."""
    length = x.shape[-1]
    spectrum = torch.fft.rfft(x, 2 * length) * torch.fft.rfft(kernel, 2 * length)
    return torch.fft.irfft(spectrum, 2 * length)[..., :length]


@case("long-conv")
def long(place: Place) -> Iterator[Case]:
    """Kernels as long as the sequence."""
    for batch, channels, length in ((8, 64, 1024), (4, 64, 8192), (1, 16, 65536)):
        x, kernel = place.randn(batch, channels, length), place.randn(channels, length, scale=length**-0.5)
        yield Case(f"{batch}×{channels}×{length}", long_conv, (x, kernel), by_fft)


@case("causal-conv1d")
def causal(place: Place) -> Iterator[Case]:
    """Short depthwise kernels with SiLU, in both layouts."""
    for k, layout in ((4, "BCL"), (4, "BLC")):
        x = place.randn(4, 256, 2048) if layout == "BCL" else place.randn(4, 2048, 256)
        w, b = place.randn(256, k), place.randn(256)

        def ours(x: Tensor, w: Tensor, b: Tensor, layout: Any = layout) -> Tensor:
            y: Tensor = causal_conv1d(x, w, b, "silu", layout=layout)
            return y

        def eager(x: Tensor, w: Tensor, b: Tensor, k: int = k, layout: str = layout) -> Tensor:
            rows = x if layout == "BCL" else x.transpose(1, 2)
            y = F.silu(F.conv1d(rows, w.unsqueeze(1), b, padding=k - 1, groups=len(w))[..., : rows.shape[-1]])
            return y if layout == "BCL" else y.transpose(1, 2)

        yield Case(f"4×256×2048 k={k} {layout}", ours, (x, w, b), eager)


@case("sgconv")
def sgconv(place: Place) -> Iterator[Case]:
    """The structured kernel, assembled for each call, and one FFT convolution."""
    layer = place.put(SGConv1d(64, kernel_size=1023, bias=False))
    yield from _against_fft(place, layer)


@case("longconv")
def longconv(place: Place) -> Iterator[Case]:
    """The squashed kernel and one FFT convolution."""
    layer = place.put(LongConv1d(64, kernel_size=1023, bias=False))
    yield from _against_fft(place, layer)


def _against_fft(place: Place, layer: Any) -> Iterator[Case]:
    x = place.randn(4, 64, 4096)

    def eager(x: Tensor) -> Tensor:
        weight, length = layer.weight(), x.shape[-1]  # a correlation, centred
        taps = weight.shape[-1]
        size = length + taps
        spectrum = torch.fft.rfft(x, size) * torch.fft.rfft(weight[:, 0].flip(-1), size)
        return torch.fft.irfft(spectrum, size)[..., taps // 2 : taps // 2 + length]

    params = tuple(p for p in layer.parameters() if p.requires_grad)
    yield Case("4×64×4096 k=1023", layer, (x,), eager, params=params)


@case("sgconv-layer")
def sgconv_layer(place: Place) -> Iterator[Case]:
    """The authors' layer, causal: kernel, padded transforms, skip, GELU, projection."""
    layer = place.put(SGConvLayer(64, 2048))
    u = place.randn(4, 64, 2048)

    def eager(u: Tensor) -> Tensor:
        y = by_fft(u, layer.kernel(u.shape[-1])[0]) + layer.D[0][:, None] * u
        out: Tensor = layer.output_linear(F.gelu(y))
        return out

    yield Case("4×64×2048", layer, (u,), eager, params=tuple(p for p in layer.parameters() if p.requires_grad))


@case("longconv-layer")
def longconv_layer(place: Place) -> Iterator[Case]:
    """The authors' layer, causal, in the same way."""
    layer = place.put(LongConvLayer(64, 2048, init_std=0.02))
    u = place.randn(4, 64, 2048)

    def eager(u: Tensor) -> Tensor:
        y = by_fft(u, layer.kernel()[0]) + layer.D[0][:, None] * u
        out: Tensor = layer.output_linear(F.gelu(y))
        return out

    yield Case("4×64×2048", layer, (u,), eager, params=tuple(layer.parameters()))


@case("ss2d")
def ss2d(place: Place) -> Iterator[Case]:
    """Four scans over a map between linear maps, against the same with a loop over the positions."""
    layer = place.put(SelectiveScan2d(32))
    loop: Any = copy.deepcopy(layer)
    loop.backend = "reference"
    x = place.randn(2, 32, 16, 16)
    yield Case("2×32×16²", layer, (x,), loop, params=tuple(layer.parameters()))


@case("ss2d-gated")
def ss2d_gated(place: Place) -> Iterator[Case]:
    """VMamba's first form with 16 states, against the same with a loop, which is what it falls back to without CUDA."""
    layer = place.put(SS2d(32))
    loop: Any = copy.deepcopy(layer)
    loop.backend = "reference"
    x = place.randn(2, 32, 16, 16)
    yield Case("2×32×16² N=16", layer, (x,), loop, params=tuple(layer.parameters()))


@case("selective-scan")
def scan(place: Place) -> Iterator[Case]:
    """The selective scan against the recurrence, a step at a time."""
    batch, channels, state, length = 2, 64, 16, 512
    u, delta = place.randn(batch, channels, length), F.softplus(place.randn(batch, channels, length) - 3)
    a = -torch.arange(1.0, state + 1).expand(channels, -1).to(u).contiguous()
    b, c = place.randn(batch, state, length), place.randn(batch, state, length)

    def eager(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        hidden = u.new_zeros(batch, channels, state)
        outputs = []
        for t in range(length):
            d = delta[:, :, t, None]
            hidden = torch.exp(d * a) * hidden + d * u[:, :, t, None] * b[:, None, :, t]
            outputs.append((hidden * c[:, None, :, t]).sum(-1))
        return torch.stack(outputs, -1)

    yield Case(f"{batch}×{channels}×{length} N={state}", selective_scan, (u, delta, a, b, c), eager)


@case("cca")
def cca(place: Place) -> Iterator[Case]:
    """Compressed convolutional attention: step by step, by transformers, and grouped queries with as many features."""
    for batch, length, embed_dim, heads, kv_heads in ((1, 512, 2048, 8, 2), (4, 256, 512, 8, 8)):
        layer: CCA = place.put(CCA(embed_dim, heads, kv_heads))
        x, params = place.randn(batch, length, embed_dim), tuple(layer.parameters())

        def eager(x: Tensor, layer: CCA = layer) -> Tensor:
            return _attention_in_steps(layer, x)

        peers = {}
        if installed("transformers") and installed("transformers.models.zaya"):
            peers["transformers"] = _zaya(place, layer, x)
        label = f"{batch}×{length}×{embed_dim} heads={heads}/{kv_heads}"
        yield Case(label, layer, (x,), eager, peers, params)
        shared = place.put(GroupedQueryAttention(embed_dim, heads, kv_heads, layer.head_dim))
        yield Case(f"{label}, of GQA", layer, (x,), None, {"gqa": shared}, params, alike=False)


def _attention_in_steps(layer: CCA, x: Tensor) -> Tensor:
    """Convolutions of sequences, repeated keys, a matrix of attention."""
    p, d, shared = layer.qkv_proj, layer.head_dim, layer.num_heads // layer.num_kv_heads
    q0, k0 = p.q_proj(x), p.k_proj(x)
    assert p.conv_qk_depthwise is not None
    z = F.pad(torch.cat([q0, k0], 2).transpose(1, 2), (p.before, 0))
    z = p.conv_qk_grouped(p.conv_qk_depthwise(z)).transpose(1, 2)
    q1, k1, q0, k0 = (t.unflatten(2, (-1, d)) for t in (*z.split([q0.shape[2], k0.shape[2]], 2), q0, k0))
    mean = (q0 + k0.repeat_interleave(shared, 2)) / 2
    q, k = q1 + mean, k1 + mean.unflatten(2, (-1, shared)).mean(3)
    delayed = F.pad(p.v_proj_delayed(x), (0, 0, 1, 0))[:, :-1]
    v = torch.cat([p.v_proj_current(x), delayed], 2).unflatten(2, (-1, d))
    q = q / q.norm(dim=3, keepdim=True) * d**0.5
    k = k / k.norm(dim=3, keepdim=True) * d**0.5 * layer.qk_norm.temp[:, None]
    table = rotary_table(0, x.shape[1], d, layer.rotary, layer.theta, x)
    q, k, v = (t.transpose(1, 2) for t in (rotate(q, *table), rotate(k, *table), v))
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    after = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
    weights = (q @ k.transpose(2, 3) / d**0.5).masked_fill(after, float("-inf")).softmax(3)
    y: Tensor = layer.o_proj((weights @ v).transpose(1, 2).flatten(2))
    return y


def _zaya(place: Place, layer: CCA, x: Tensor) -> Any:
    """The layer of the published language model with our weights."""
    from transformers.models.zaya.configuration_zaya import ZayaConfig
    from transformers.models.zaya.modeling_zaya import ZayaAttention

    sizes = {"num_attention_heads": layer.num_heads, "num_key_value_heads": layer.num_kv_heads}
    config = ZayaConfig(hidden_size=layer.embed_dim, head_dim=layer.head_dim, num_hidden_layers=1, **sizes)
    config._attn_implementation = "sdpa"
    theirs = place.put(ZayaAttention(config, 0))
    theirs.load_state_dict(layer.state_dict())
    table = rotary_table(0, x.shape[1], layer.head_dim, layer.rotary, layer.theta, x)
    embeddings = tuple(t.to(x.dtype).unsqueeze(0) for t in table)

    class Peer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = theirs

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.attention(x, position_embeddings=embeddings)[0]
            return y

    return Peer()


@case("lococo")
def lococo(place: Place) -> Iterator[Case]:
    """A cache compressed, with masks and one-hot matrices, and evicted; a layer on a long text, and full attention."""
    for batch, heads, length, dim, slots in ((1, 4, 552, 64, 256), (2, 8, 280, 32, 128)):
        layer = place.put(LoCoCo(dim, slots, detach=False))
        key, value, scores = (place.randn(batch, heads, length, *d) for d in ((dim,), (dim,), ()))

        def ours(key: Tensor, value: Tensor, layer: LoCoCo = layer, scores: Tensor = scores) -> Tensor:
            return torch.stack(layer(key, value, scores))

        def eager(key: Tensor, value: Tensor, layer: LoCoCo = layer, scores: Tensor = scores) -> Tensor:
            return _one_hot_compression(layer, key, value, scores)

        peers = _kvpress(scores, slots)
        params, label = tuple(layer.parameters()), f"{batch}×{heads}×{length}×{dim} to {slots}"
        yield Case(label, ours, (key, value), eager, params=params)

        def evict(key: Tensor, value: Tensor, slots: int = slots, scores: Tensor = scores) -> Tensor:
            return torch.stack(evict_cache(key, value, scores, slots))

        def sorted_eviction(key: Tensor, value: Tensor, slots: int = slots, scores: Tensor = scores) -> Tensor:
            index = scores.topk(slots, -1).indices.sort(-1).values.unsqueeze(-1).expand(-1, -1, -1, key.shape[3])
            return torch.stack([key.gather(2, index), value.gather(2, index)])

        yield Case(f"{label}, eviction", evict, (key, value), sorted_eviction)
        if peers:
            yield Case(f"{label}, eviction by rank", evict, (key, value), None, peers, alike=False)
    attention = place.put(LoCoCoAttention(256, 4, mem_size=128, chunk_size=128))
    full = place.put(GroupedQueryAttention(256, 4, 4, 64))
    x = place.randn(1, 4096, 256)
    params = tuple(attention.parameters())
    yield Case("1×4096×256, a layer", attention, (x,), None, {"full attention": full}, params, alike=False)


def _one_hot_compression(layer: LoCoCo, key: Tensor, value: Tensor, scores: Tensor) -> Tensor:
    """The definition: tokens by boolean masks, the selection as a dense matrix, keys and values apart."""
    shape = (*key.shape[:2], -1, key.shape[3])
    kept = heavy_hitters(scores, layer.mem_size - layer.fused, layer.local_len)
    rest, rest_scores = ~kept, scores[~kept].reshape(*key.shape[:2], -1)
    k, v = key[rest].reshape(shape), value[rest].reshape(shape)
    best = rest_scores.topk(layer.fused, -1).indices.sort(-1).values
    x = torch.cat([k, v], -1).flatten(0, 1).transpose(1, 2)
    for conv in layer.layers.values():
        x = ACTIVATIONS[layer.hidden_act](conv(x))
    share, lam = x.softmax(-1).unflatten(0, key.shape[:2]), layer.normalizer
    mix = (1 - lam) * F.one_hot(best, k.shape[2]).to(share.dtype) + lam * share
    slots = [torch.cat([old[kept].reshape(shape), mix @ new], 2) for old, new in ((key, k), (value, v))]
    return torch.stack(slots)


def _kvpress(scores: Tensor, slots: int) -> dict[str, Any]:
    """kvpress's eviction by given scores, which leaves the tokens in the order of scores."""
    if not (installed("kvpress") and installed("transformers")):
        return {}
    base: Any = importlib.import_module("kvpress").ScorerPress

    class Given(base):
        def score(self, *_: Any) -> Tensor:
            return scores

    press = Given(1 - (slots + 0.5) / scores.shape[2])  # it rounds down

    def evict(key: Tensor, value: Tensor) -> Tensor:
        module = SimpleNamespace(head_dim=key.shape[3])
        return torch.stack(press.compress(module, None, key, value, None, {}))

    return {"kvpress": evict}
