"""LoCoCo against its definition in loops, its identities, and attention without compression."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.parity.core import Case, run_case
from torchconv.ops.lococo import ACTIVATIONS, LoCoCo, compress_cache, evict_cache, heavy_hitters
from torchconv.ops.lococo_attention import LoCoCoAttention, LoCoCoCache, scored_attention


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def cache(batch=2, heads=3, length=40, dim=6, seed=0):
    key, value = noise(2, batch, heads, length, dim, seed=seed)
    return key, value, noise(batch, heads, length, seed=seed + 1).exp()


def compressor(*args, seed=0, **options):
    torch.manual_seed(seed)
    return LoCoCo(*args, dtype=torch.float64, **options)


def loops(module, key, value, scores):
    """The definition, a head and a token at a time."""
    keys, values = [], []
    lam, m, length = module.normalizer, module.fused, key.shape[2]
    h = module.mem_size - m
    for k, v, s in zip(key.flatten(0, 1), value.flatten(0, 1), scores.flatten(0, 1), strict=True):
        earlier = sorted(range(length - module.local_len), key=lambda i: -float(s[i]))
        kept = sorted([*earlier[: h - module.local_len], *range(length - module.local_len, length)])
        rest = [i for i in range(length) if i not in kept]
        best = sorted(sorted(rest, key=lambda i: -float(s[i]))[:m])
        x = torch.cat([k[rest], v[rest]], 1)  # (T, channels)
        for conv in module.layers.values():
            pad = (conv.weight.shape[2] - 1) // 2
            padded = F.pad(x, (0, 0, pad, pad))
            taps = [padded[t : t + len(x)] @ conv.weight[:, :, t].T for t in range(conv.weight.shape[2])]
            x = ACTIVATIONS[module.hidden_act](sum(taps) + conv.bias)
        weights = lam * x.exp().T / x.exp().sum(0)[:, None]
        for slot, token in enumerate(best):
            one_hot = torch.zeros_like(weights)
            one_hot[slot, rest.index(token)] = 1
            weights = weights + (1 - lam) * one_hot
        keys.append(torch.cat([k[kept], weights @ k[rest]]))
        values.append(torch.cat([v[kept], weights @ v[rest]]))
    return tuple(torch.stack(t).unflatten(0, key.shape[:2]) for t in (keys, values))


@settings(max_examples=15, deadline=None)
@given(
    st.integers(4, 9),
    st.sampled_from([0.0, 0.25, 0.5, 0.7]),
    st.integers(0, 2),
    st.integers(1, 3),
    st.sampled_from([1, 3, 7]),
    st.sampled_from(sorted(ACTIVATIONS)),
    st.integers(1, 3),
    st.integers(0, 12),
    st.integers(0, 99),
)
def test_equals_the_definition(mem_size, rate, local, layers, kernel, act, expand, more, seed):
    local = min(local, mem_size - int(mem_size * (1 - rate)))
    options = {"hh_keep_rate": rate, "local_len": local, "n_convlayer": layers, "kernel_size": kernel}
    module = compressor(
        3, mem_size, **options, hidden_act=act, expand=expand, normalizer_init=0.3, init_std=0.3, seed=seed
    )
    given_cache = cache(2, 2, mem_size + more, 3, seed)
    for ours, theirs in zip(module(*given_cache), loops(module, *given_cache), strict=True):
        assert ours.shape == (2, 2, mem_size, 3)
        torch.testing.assert_close(ours, theirs)


def test_published_sizes_and_names():
    module = LoCoCo(128, 512, device="meta")
    assert sum(p.numel() for p in module.parameters()) == 1_376_513
    assert set(module.state_dict()) == {"layers.0.weight", "layers.0.bias", "normalizer"}
    two = LoCoCo(4, 12, hh_keep_rate=0.75, n_convlayer=2, expand=2, kernel_size=3)
    assert [tuple(c.weight.shape) for c in two.layers.values()] == [(6, 8, 3), (3, 6, 3)]
    assert list(two.layers) == ["0", "2"]
    assert LoCoCo(4, 10, hh_keep_rate=0.7).fused == int(10 * (1 - 0.7)) == 3
    torch.manual_seed(0)
    assert abs(float(LoCoCo(16, 64).layers["0"].weight.detach().std()) - 1) < 0.05
    assert float(LoCoCo(16, 64, init_std=0.1).layers["0"].weight.detach().std()) < 0.2


def test_heavy_hitters_are_copies_in_the_order_of_time():
    key, value, scores = cache()
    module = compressor(6, 16, local_len=3, kernel_size=5)
    k, v = module(key, value, scores)
    mask = heavy_hitters(scores, 8, 3)
    assert mask[..., -3:].all()
    assert mask.sum(-1).eq(8).all()
    assert torch.equal(k[:, :, :8], key[mask].reshape(2, 3, 8, 6))
    assert torch.equal(v[:, :, :8], value[mask].reshape(2, 3, 8, 6))


def test_without_lambda_it_is_the_eviction_up_to_the_order_of_slots():
    key, value, scores = cache()
    module = compressor(6, 16, kernel_size=5, normalizer_init=0.0)
    ours, evicted = module(key, value, scores), evict_cache(key, value, scores, 16)
    q = noise(2, 3, 7, 6, seed=5)
    torch.testing.assert_close(
        F.scaled_dot_product_attention(q, *ours), F.scaled_dot_product_attention(q, *evicted), rtol=1e-12, atol=1e-12
    )
    assert not torch.equal(ours[0], evicted[0])
    best = scores.topk(16, -1).indices.sort(-1).values
    assert torch.equal(evicted[1], value.gather(2, best[..., None].expand(-1, -1, -1, 6)))


def test_zero_convolutions_give_the_mean_of_the_rest():
    key, value, scores = cache()
    module = compressor(6, 16, kernel_size=5, normalizer_init=1.0)
    for parameter in module.layers.parameters():
        torch.nn.init.zeros_(parameter)
    k, v = module(key, value, scores)
    rest = ~heavy_hitters(scores, 8)
    for fused, tokens in ((k, key), (v, value)):
        mean = tokens[rest].reshape(2, 3, 32, 6).mean(2, keepdim=True)
        torch.testing.assert_close(fused[:, :, 8:], mean.expand(2, 3, 8, 6))


@pytest.mark.parametrize("lam", [0.0, 0.4, 1.0, 1.7])
def test_mixtures_are_weighted_means(lam):
    key, value, scores = cache()
    constant = value[:, :, :1].expand_as(value)
    module = compressor(6, 16, kernel_size=5, normalizer_init=lam, hidden_act="tanh")
    k, v = module(key, constant, scores)
    torch.testing.assert_close(v, constant[:, :, :16])
    rest = key[~heavy_hitters(scores, 8)].reshape(2, 3, 32, 6)
    low, high = rest.amin(2, keepdim=True), rest.amax(2, keepdim=True)
    inside = bool(((k[:, :, 8:] >= low - 1e-12) & (k[:, :, 8:] <= high + 1e-12)).all())
    assert inside == (lam <= 1)


def test_heads_and_batch_are_independent():
    key, value, scores = cache()
    module = compressor(6, 16, kernel_size=5)
    turned = [t.flatten(0, 1).flip(0).unflatten(0, (3, 2)) for t in (key, value, scores)]
    for ours, moved in zip(module(key, value, scores), module(*turned), strict=True):
        torch.testing.assert_close(moved, ours.flatten(0, 1).flip(0).unflatten(0, (3, 2)))


def test_gradients_reach_the_convolutions_and_lambda_only():
    key, value, scores = (t.requires_grad_() for t in cache())
    module = compressor(6, 16, kernel_size=5, hidden_act="silu")
    k, v = module(key, value, scores)
    ck, cv = noise(*k.shape, seed=3), noise(*v.shape, seed=4)
    loss = (k * ck).sum() + (v * cv).sum()
    grads = torch.autograd.grad(loss, [key, value, scores, module.normalizer], allow_unused=True)
    assert grads[:3] == (None, None, None)
    soft, hard = copy.deepcopy(module), copy.deepcopy(module)
    soft.normalizer.data.fill_(1.0)
    hard.normalizer.data.fill_(0.0)
    with torch.no_grad():
        (k1, v1), (k0, v0) = soft(key, value, scores), hard(key, value, scores)
    torch.testing.assert_close(grads[3], (((k1 - k0) * ck).sum() + ((v1 - v0) * cv).sum()).reshape(1))
    module.detach = False
    k, v = module(key, value, scores)
    assert float(torch.autograd.grad(k.sum() + v.sum(), key)[0].abs().max()) > 0


def test_empty_batch_and_exact_fit():
    module = compressor(6, 16, kernel_size=5)
    assert module(*cache(batch=0))[0].shape == (0, 3, 16, 6)
    key, value, scores = cache(length=16)
    assert module(key, value, scores)[0].shape == key.shape
    assert evict_cache(key, value, scores, 16)[0] is key
    assert evict_cache(key, value, scores, 20)[1] is value


def layer(seed=0, **options):
    torch.manual_seed(seed)
    options = {"mem_size": 8, "kernel_size": 3, "slack": 4, "chunk_size": 6, "normalizer_init": 0.4} | options
    return LoCoCoAttention(16, 4, dtype=torch.float64, **options)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_short_texts_get_plain_causal_attention(kv_heads):
    """Chunks of any size, compression out of reach, against one pass with explicit rotations."""
    module, x = layer(num_kv_heads=kv_heads, mem_size=64, rope_factor=2.0, chunk_size=5), noise(2, 17, 16)
    rates = 1e4 ** -(torch.arange(0, 4, 2, dtype=torch.float64) / 4)
    turn = torch.polar(torch.ones(17, 2, dtype=torch.float64), torch.arange(17)[:, None] / 2.0 * rates)

    def heads(linear, turned):
        t = linear(x).unflatten(2, (-1, 4)).transpose(1, 2)
        if turned:
            z = torch.complex(t[..., :2], t[..., 2:]) * turn
            t = torch.cat([z.real, z.imag], -1)
        return t

    q, k, v = heads(module.q_proj, True), heads(module.k_proj, True), heads(module.v_proj, False)
    k, v = (t.repeat_interleave(4 // kv_heads, 1) for t in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    torch.testing.assert_close(module(x), module.o_proj(y))
    module.chunk_size = None
    torch.testing.assert_close(module(x), module.o_proj(y))


def test_scores_are_column_sums():
    q, k, v = noise(2, 6, 5, 4), noise(2, 3, 9, 4, seed=1), noise(2, 3, 9, 4, seed=2)
    y, scores = scored_attention(q, k, v)
    expected, total = torch.zeros_like(y), torch.zeros_like(scores)
    for b in range(2):
        for h in range(6):
            for i in range(5):
                seen = 9 - 5 + i + 1
                weights = torch.softmax(k[b, h // 2, :seen] @ q[b, h, i] / 2, 0)
                total[b, h // 2, :seen] += weights
                expected[b, h, i] = weights @ v[b, h // 2, :seen]
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(scores, total)


@pytest.mark.parametrize("method", ["conv", "hh"])
def test_the_cache_stays_small_and_compresses_before_it_grows(method):
    module, text = layer(method=method), noise(2, 60, 16)
    state, lengths = LoCoCoCache(), []
    for chunk in text.split(6, 1):
        before = copy.copy(state)
        y = module(chunk, state)
        if before.length > 12:
            slots = module.compress(before.key, before.value, before.scores)
            assert torch.equal(state.key[:, :, :8], slots[0])
            assert torch.equal(state.value[:, :, :8], slots[1])
        lengths.append(state.length)
        assert y.shape == chunk.shape
        assert not state.key.requires_grad
    assert lengths == [6, 12, 18, 14, 14, 14, 14, 14, 14, 14]
    assert state.seen == 60
    assert (module.memory_saver is None) == (method == "hh")
    torch.testing.assert_close(
        module(text), torch.cat([module(c, s) for s in [LoCoCoCache()] for c in text.split(6, 1)], 1)
    )


def test_token_by_token():
    module, text = layer(chunk_size=1), noise(1, 30, 16)
    state = LoCoCoCache()
    for token in text.split(1, 1):
        module(token, state)
        assert state.length <= 8 + 4 + 1
    assert state.seen == 30


def test_gradients_of_chunks():
    """Constant pasts as published: the first chunk trains q and o only; through the cache where that is asked for."""
    module, text = layer(), noise(1, 30, 16)
    module(text[:, :6]).square().sum().backward()
    trained = {n for n, p in module.named_parameters() if p.grad is not None}
    assert trained == {"q_proj.weight", "o_proj.weight"}
    module(text).square().sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    through = layer(detach=False)
    through(text[:, :6]).square().sum().backward()
    assert float(through.k_proj.weight.grad.abs().max()) > 0


def test_training_lowers_the_error_of_the_compressed_cache():
    key, value, scores = cache(4, 2, 48, 4)
    q = noise(4, 2, 16, 4, seed=7)
    target = F.scaled_dot_product_attention(q, key, value)
    module = compressor(4, 8, kernel_size=5)
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (F.scaled_dot_product_attention(q, *module(key, value, scores)) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mem_size": 0}, "mem_size=0"),
        ({"hh_keep_rate": 1.0}, "hh_keep_rate=1.0"),
        ({"mem_size": 10, "hh_keep_rate": 0.9}, "evict_cache"),
        ({"kernel_size": 4}, "kernel_size=4: must be odd"),
        ({"local_len": 9}, "local_len=9"),
        ({"local_len": -1}, "local_len=-1"),
        ({"n_convlayer": 0}, "n_convlayer=0"),
        ({"expand": 0}, "expand=0"),
        ({"hidden_act": "rellu"}, "relu"),
        ({"init_std": -1.0}, "init_std=-1.0"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        LoCoCo(4, **({"mem_size": 16} | options))
    with pytest.raises(ValueError, match=message):
        LoCoCoAttention(8, 2, **({"mem_size": 16} | options))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 3}, "num_heads=3: must divide hidden_size=16"),
        ({"num_kv_heads": 3}, "num_kv_heads=3: must divide"),
        ({"head_dim": 3}, "head_dim=3: must be even"),
        ({"method": "h2o"}, "method='h2o'"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"slack": -1}, "slack=-1"),
        ({"theta": 0.0}, "theta=0.0"),
        ({"rope_factor": 0.0}, "rope_factor=0.0"),
        ({"method": "hh", "local_len": 200}, "local_len=200"),
    ],
)
def test_bad_arguments_of_attention(arguments, message):
    with pytest.raises(ValueError, match=message):
        LoCoCoAttention(16, **({"num_heads": 4} | arguments))


def test_bad_inputs():
    key, value, scores = cache()
    module = compressor(6, 16)
    with pytest.raises(ValueError, match=r"key of shape \(2, 3, 40, 5\): expected"):
        module(key[..., :5], value[..., :5], scores)
    with pytest.raises(ValueError, match="fits into mem_size=16"):
        module(key[:, :, :15], value[:, :, :15], scores[:, :, :15])
    with pytest.raises(ValueError, match=r"scores of shape \(2, 3, 39\)"):
        module(key, value, scores[..., 1:])
    with pytest.raises(ValueError, match="both are"):
        evict_cache(key, value[:, :1], scores, 4)
    with pytest.raises(ValueError, match="mem_size=0"):
        evict_cache(key, value, scores, 0)
    with pytest.raises(ValueError, match="local_len=5"):
        evict_cache(key, value, scores, 4, 5)
    with pytest.raises(ValueError, match="size=41"):
        heavy_hitters(scores, 41)
    with pytest.raises(ValueError, match="local=5"):
        heavy_hitters(scores, 4, 5)
    convolutions = [(noise(8, 12, 3), None)]
    with pytest.raises(ValueError, match="mem_size=7"):
        compress_cache(key, value, scores, convolutions, torch.ones(1), 7)
    with pytest.raises(ValueError, match="local_len=3"):
        compress_cache(key, value, scores, convolutions, torch.ones(1), 10, 3)
    with pytest.raises(ValueError, match="n_k a divisor of n_q"):
        scored_attention(noise(1, 3, 2, 4), noise(1, 2, 5, 4), noise(1, 2, 5, 4))
    attention = layer()
    with pytest.raises(ValueError, match=r"x of shape \(1, 0, 16\)"):
        attention(noise(1, 0, 16))
    state = LoCoCoCache()
    attention(noise(1, 3, 16), state)
    with pytest.raises(ValueError, match="cache of 1 sequences"):
        attention(noise(2, 3, 16), state)


def test_files_with_few_keys_and_linear_positions():
    """What a file leaves out is the published setting; scaled positions, shared keys, eviction in attention."""
    key, value, scores = cache(1, 2, 200, 4)
    module = compressor(4, 128)
    k, v = module(key, value, scores)
    state = dict(module.state_dict())
    inputs = {"key": key, "value": value, "hh_scores": scores}
    outputs = {"key": k.detach(), "value": v.detach()}
    case = Case("lococo", "bare", {}, "", "eval", "", None, None, state, inputs, outputs, {})
    assert all(c.passed for c in run_case(case))
    for method in ("conv", "hh"):
        attention = layer(num_kv_heads=2, rope_factor=0.5, slack=16, method=method, mem_size=12, local_len=2)
        cache_, inputs, outputs = LoCoCoCache(), {}, {}
        for i, size in enumerate((20, 10, 7)):
            inputs[f"chunk{i}"] = noise(1, size, 16, seed=i)
            attention.chunk_size = None
            outputs[f"y{i}"] = attention(inputs[f"chunk{i}"], cache_).detach()
            outputs[f"hh_scores{i}"], outputs[f"cache_key{i}"] = cache_.scores, cache_.key
        config = {"heads": 4, "mem_size": 12, "local_len": 2, "method": method}
        config["rope_scaling"] = {"type": "linear", "factor": 0.5}
        state = {n: t.detach() for n, t in attention.state_dict().items()}
        case = Case("lococo", method, config, "", "eval", "", None, None, state, inputs, outputs, {})
        assert all(c.passed and math.isfinite(c.max_abs) for c in run_case(case))
