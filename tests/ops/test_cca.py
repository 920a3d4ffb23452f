"""Compressed convolutional attention against loops over tokens, its identities, decoding, padding, windows, names."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchconv.analysis.count import count
from torchconv.ops._grouped_query import GroupedQueryAttention
from torchconv.ops.cca import CCA, convert_official
from torchconv.ops.cca_decoding import CCACache, compressed_attention, visible
from torchconv.ops.cca_mixing import causal_pair, head_norm, mean_residual, merge_pair, rotary_table, rotate


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer(*args, seed=0, **options):
    torch.manual_seed(seed)
    module = CCA(*args, dtype=torch.float64, **options).eval()
    with torch.no_grad():
        module.qk_norm.temp.copy_(0.5 + torch.rand_like(module.qk_norm.temp))
    return module


def exact(ours, expected, atol=1e-12):
    torch.testing.assert_close(ours, expected, atol=atol, rtol=0)


def loops(m, x):
    """The definition, token by token and head by head, for one sequence (S, E)."""
    p, d, n_q, n_k = m.qkv_proj, m.head_dim, m.num_heads, m.num_kv_heads
    zero, length, g = torch.zeros_like(x[0]), len(x), n_q // n_k
    q0, k0 = [p.q_proj(t) for t in x], [p.k_proj(t) for t in x]
    z = [torch.cat(pair) for pair in zip(q0, k0, strict=True)]
    silent = torch.zeros_like(z[0])
    a_weight, a_bias, b_weight, b_bias = (
        *(p.conv_qk_depthwise.weight[:, 0], p.conv_qk_depthwise.bias),
        *(p.conv_qk_grouped.weight, p.conv_qk_grouped.bias),
    )
    t0, t1 = a_weight.shape[1], b_weight.shape[2]

    def first(t):
        return a_bias + sum(a_weight[:, t0 - 1 - j] * (z[t - j] if t - j >= 0 else silent) for j in range(t0))

    def second(t, head):
        rows = slice(head * d, head * d + d)
        return b_bias[rows] + sum(b_weight[rows, :, t1 - 1 - j] @ first(t - j)[rows] for j in range(t1))

    def part(v, head):
        return v[head * d : head * d + d]

    def turn(v, t):
        width = int(d * m.rotary)
        v, half = v.clone(), (width + 1) // 2
        for i in range(half):
            angle = t * m.theta ** (-2 * i / width)
            a, b = v[i].clone(), v[half + i].clone()
            v[i], v[half + i] = a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)
        return v

    queries, keys, values = {}, {}, {}
    for t in range(length):
        mean = [(part(q0[t], i) + part(k0[t], i // g)) / 2 for i in range(n_q)]
        for i in range(n_q):
            q = second(t, i) + mean[i]
            queries[t, i] = turn(math.sqrt(d) * q / q.norm(), t)
        value = torch.cat([p.v_proj_current(x[t]), p.v_proj_delayed(x[t - 1] if t else zero)])
        for j in range(n_k):
            k = second(t, n_q + j) + sum(mean[j * g : j * g + g]) / g
            keys[t, j] = turn(math.sqrt(d) * m.qk_norm.temp[j] * k / k.norm(), t)
            values[t, j] = part(value, j)
    out = []
    for t in range(length):
        heads = []
        for i in range(n_q):
            seen = range(max(0, t + 1 - (m.window or length)), t + 1)
            weights = torch.stack([queries[t, i] @ keys[s, i // g] / math.sqrt(d) for s in seen]).softmax(0)
            heads.append(sum(w * values[s, i // g] for w, s in zip(weights, seen, strict=True)))
        out.append(m.o_proj(torch.cat(heads)))
    return torch.stack(out)


@pytest.mark.parametrize(
    "options",
    [
        {"embed_dim": 12, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4},
        {"embed_dim": 10, "num_heads": 3, "head_dim": 2, "time0": 3, "time1": 1},
        {"embed_dim": 9, "num_heads": 2, "num_kv_heads": 1, "head_dim": 6, "time0": 1, "time1": 3, "bias": True},
        {"embed_dim": 8, "num_heads": 3, "head_dim": 4, "rotary": 1.0, "theta": 100.0, "window": 3},
        {"embed_dim": 8, "num_heads": 2, "head_dim": 6, "time0": 3, "time1": 4},
    ],
    ids=["grouped", "odd-heads", "bias", "window", "odd-rotary"],
)
def test_equals_the_definition(options):
    module = layer(**options)
    x = noise(7, options["embed_dim"])
    with torch.no_grad():
        expected = loops(module, x)
        exact(module(x[None])[0], expected)
        exact(module.merge()(x[None])[0], expected)
        weights = module.attention_weights(x[None])
        v = module.mixed(x[None])[2].transpose(1, 2).repeat_interleave(module.num_heads // module.num_kv_heads, 1)
        exact(module.o_proj((weights @ v).transpose(1, 2).flatten(2))[0], expected)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([(2, 1, 4), (4, 2, 2), (3, 3, 4), (4, 1, 8)]),
    st.integers(0, 3),
    st.integers(1, 4),
    st.lists(st.integers(1, 4), min_size=1, max_size=5),
    st.sampled_from([None, 1, 3]),
    st.booleans(),
    st.integers(0, 9),
)
def test_pieces_give_what_the_whole_gives(heads, time0, time1, pieces, window, bias, padding):
    module = layer(6, *heads, time0=time0, time1=time1, window=window, bias=bias)
    x, cache = noise(2, sum(pieces), 6), CCACache()
    mask = torch.ones(2, sum(pieces), dtype=torch.bool)
    mask[1, :padding] = False
    outputs, begin = [], 0
    with torch.no_grad():
        for n in pieces:
            here = mask[:, begin : begin + n] if begin < padding else None  # the cache remembers what was padding
            outputs.append(module(x[:, begin : begin + n], here, cache=cache))
            begin += n
        exact(torch.cat(outputs, 1), module(x, mask if padding else None))
    e_q, e_k = module.num_heads * module.head_dim, module.num_kv_heads * module.head_dim
    assert cache.length == sum(pieces)
    assert cache.key.numel() + cache.value.numel() == 2 * cache.length * 2 * e_k
    assert cache.conv.shape == (2, max(time0, 1) + time1 - 2, e_q + e_k)
    assert cache.delayed.shape == (2, 1, e_k // 2)


def test_a_copied_cache_is_a_place_to_go_back_to():
    module, x, cache = layer(8, 2, head_dim=4), noise(1, 6, 8), CCACache()
    with torch.no_grad():
        module(x[:, :4], cache=cache)
        snapshot = copy.copy(cache)
        once = module(x[:, 4:5], cache=cache)
        module(x[:, 5:], cache=cache)
        assert (snapshot.length, cache.length) == (4, 6)
        exact(module(x[:, 4:5], cache=snapshot), once)


def test_left_padding_leaves_the_rows_as_they_are():
    module, x = layer(8, 4, 1, 4, time0=3, time1=2), noise(3, 7, 8)
    mask = torch.ones(3, 7)
    mask[1, :2] = mask[2, :5] = 0
    y = module(x, mask)
    for row, start in enumerate((0, 2, 5)):
        exact(y[row, start:], module(x[row : row + 1, start:])[0])
        assert not y[row, :start].any()
    x[2, :5] = math.nan
    exact(module(x, mask), y)
    weights = module.attention_weights(noise(3, 7, 8), mask)
    exact(weights[2, :, :5], torch.full((4, 5, 7), 1 / 7, dtype=torch.float64))
    assert not weights[1, :, 2:, :2].any()


def test_padding_gets_no_gradient():
    module, x = layer(8, 2, head_dim=4), noise(2, 5, 8).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    module(x, mask).square().sum().backward()
    assert not x.grad[1, :2].any()
    assert x.grad[1, 2:].all()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())


def test_zeros_in_front_that_nobody_sees_change_nothing():
    module, x = layer(8, 2, head_dim=4), noise(1, 5, 8)
    ahead = torch.cat([torch.zeros(1, 3, 8, dtype=torch.float64), x], 1)
    exact(module(ahead, torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]]))[:, 3:], module(x))


def test_the_future_is_not_seen():
    module, x = layer(8, 4, 2, 4, window=4), noise(2, 9, 8)
    later = x.clone()
    later[:, 5:] += 1
    exact(module(later)[:, :5], module(x)[:, :5])
    assert not torch.allclose(module(later)[:, 5:], module(x)[:, 5:])


def test_convolutions_that_do_nothing_leave_the_means():
    module, x = layer(12, 4, 2, 4, time0=2, time1=3), noise(2, 6, 12)
    p, d = module.qkv_proj, 4
    q0, k0 = (f(x).unflatten(2, (-1, d)) for f in (p.q_proj, p.k_proj))
    mean_q, mean_k = mean_residual(q0, k0)
    with torch.no_grad():
        for tensor in (*p.conv_qk_depthwise.parameters(), *p.conv_qk_grouped.parameters()):
            tensor.zero_()
        p.conv_qk_depthwise.weight[..., -1] = 1
        q, k, _ = module.mixed(x)
        exact(q, mean_q)
        exact(k, mean_k)
        p.conv_qk_grouped.weight[..., -1] = torch.eye(d, dtype=torch.float64).repeat(6, 1)
        q, k, _ = module.mixed(x)
        exact(q, q0 + mean_q)
        exact(k, k0 + mean_k)


def test_without_sharing_the_means_are_the_same():
    q, k = noise(2, 3, 4, 5), noise(2, 3, 4, 5, seed=1)
    mean_q, mean_k = mean_residual(q, k)
    exact(mean_q, (q + k) / 2)
    exact(mean_k, mean_q)


def test_lengths_and_scale():
    module, x = layer(8, 4, 2, 6), noise(2, 5, 8)
    q, k = module.qk_norm(*module.mixed(x)[:2])
    exact(q.norm(dim=-1), torch.full((2, 5, 4), math.sqrt(6), dtype=torch.float64))
    exact(k.norm(dim=-1), (module.qk_norm.temp.abs() * math.sqrt(6)).expand(2, 5, 2))
    expected, p = module(x), module.qkv_proj
    with torch.no_grad():
        for tensor in (p.q_proj.weight, p.k_proj.weight, p.conv_qk_depthwise.bias, p.conv_qk_grouped.bias):
            tensor.mul_(7)
    exact(module(x), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_of_zeros_is_zero(dtype):
    x = torch.zeros(1, 2, 3, 4, dtype=dtype)
    assert not head_norm(x, torch.ones(3, dtype=dtype)).any()
    assert head_norm(x).dtype == dtype


def test_half_a_value_is_late_by_whole_heads():
    module, x = layer(8, 4, 2, 4), noise(1, 6, 8)
    p = module.qkv_proj
    value = module.mixed(x)[2]
    exact(value[:, :, 0], p.v_proj_current(x))
    exact(value[:, 1:, 1], p.v_proj_delayed(x)[:, :-1])
    assert not value[:, 0, 1].any()
    with torch.no_grad():
        p.v_proj_delayed.weight.zero_()
    assert not module.mixed(x)[2][:, :, 1].any()
    odd = layer(8, 3, 3, 2).mixed(x)[2]  # the border is in the middle of the second head
    assert odd[:, 0, 1, 0].all()
    assert not odd[:, 0, 1, 1].any()


def test_groups_in_another_order():
    module, x = layer(8, 4, 2, 4), noise(2, 5, 8)
    other, order = copy.deepcopy(module), torch.tensor([1, 0])
    heads = torch.tensor([2, 3, 0, 1])
    p, o = module.qkv_proj, other.qkv_proj

    def swap(tensor, axis=0, which=heads):
        return tensor.unflatten(axis, (len(which), -1)).index_select(axis, which).flatten(axis, axis + 1)

    latent = torch.cat([heads, 4 + order])
    with torch.no_grad():
        o.q_proj.weight.copy_(swap(p.q_proj.weight))
        o.k_proj.weight.copy_(swap(p.k_proj.weight, which=order))
        for name in ("conv_qk_depthwise", "conv_qk_grouped"):
            getattr(o, name).weight.copy_(swap(getattr(p, name).weight, which=latent))
            getattr(o, name).bias.copy_(swap(getattr(p, name).bias, which=latent))
        other.qk_norm.temp.copy_(module.qk_norm.temp[order])
    q, k, _ = module.mixed(x)
    other_q, other_k, _ = other.mixed(x)
    exact(other_q, q[:, :, heads])
    exact(other_k, k[:, :, order])
    exact(other.attention_weights(x), module.attention_weights(x)[:, heads])


@pytest.mark.parametrize(("time0", "time1"), [(1, 1), (2, 2), (3, 4), (4, 1)])
def test_the_two_convolutions_are_one(time0, time1):
    depthwise, grouped = noise(6, 1, time0), noise(6, 3, time1, seed=1)
    biases, z = (noise(6, seed=2), noise(6, seed=3)), noise(2, 9, 6, seed=4)
    weight, bias = merge_pair(depthwise, grouped, *biases)
    exact(causal_pair(z, None, weight, None, bias), causal_pair(z, depthwise, grouped, *biases))
    weight, bias = merge_pair(depthwise, grouped)
    assert bias is None
    exact(causal_pair(z, None, weight), causal_pair(z, depthwise, grouped))
    # Padding before each of them would be another function wherever the first has a bias and the second a past.
    padded = torch.nn.functional.conv1d(
        torch.nn.functional.pad(z.transpose(1, 2), (time0 - 1, 0)), depthwise, biases[0], groups=6
    )
    twice = torch.nn.functional.conv1d(torch.nn.functional.pad(padded, (time1 - 1, 0)), grouped, biases[1], groups=2)
    assert torch.allclose(twice.transpose(1, 2), causal_pair(z, depthwise, grouped, *biases)) == (time1 == 1)


def test_merge_keeps_decoding_options_and_mode():
    module, x = layer(8, 4, 2, 4, time0=3, rotary=0.25, theta=50.0, window=3, bias=True), noise(2, 6, 8)
    merged, cache = module.merge(), CCACache()
    assert merged.qkv_proj.conv_qk_depthwise is None
    assert not merged.training
    steps = torch.cat([merged(t, cache=cache) for t in x.split(1, 1)], 1)
    exact(steps, module(x))
    exact(merged.merge()(x), module(x))
    assert merged.float().merge().o_proj.weight.dtype == torch.float32


def test_rotation_is_relative_and_can_be_given():
    q, k = noise(1, 8, 2, 6), noise(1, 8, 2, 6, seed=1)
    near, far = (rotary_table(start, 8, 6, 1.0, 1e4, q) for start in (0, 1000))
    products = [rotate(q, *t).transpose(1, 2) @ rotate(k, *t).permute(0, 2, 3, 1) for t in (near, far)]
    exact(*products)
    module, x = layer(8, 2, head_dim=4, theta=100.0), noise(2, 5, 8)
    table = rotary_table(3, 5, 4, 0.5, 100.0, x)
    exact(module(x, rotary=table), module(x))
    exact(module(x, rotary=tuple(t.expand(2, -1, -1) for t in table)), module(x))
    still = (torch.ones(5, 2), torch.zeros(5, 2))
    exact(module(x, rotary=still), layer(8, 2, head_dim=4, rotary=0.0)(x))
    assert rotary_table(0, 3, 6, 0.5, 5e6, x)[0].shape == (3, 4)  # three features would turn: four do


def test_attention_of_the_last_queries():
    q, k, v = noise(2, 4, 6, 3), noise(2, 2, 6, 3, seed=1), noise(2, 2, 6, 3, seed=2)
    for window in (None, 1, 2, 9):
        whole = compressed_attention(q, k, v, None, window)
        for last in range(1, 7):
            exact(compressed_attention(q[:, :, -last:], k, v, None, window), whole[:, :, -last:])
    assert visible(3, 3, torch.tensor([[False, True, True]])).tolist() == [
        [[[True, False, False], [False, True, False], [False, True, True]]]
    ]


def test_export_for_any_length():
    module, x, mask = layer(8, 4, 2, 4, window=5), noise(2, 7, 8), torch.ones(2, 7)
    sizes = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("length", min=3)}
    program = torch.export.export(module, (x, mask), dynamic_shapes=(sizes, sizes)).module()
    longer, mask = noise(3, 12, 8), torch.ones(3, 12)
    mask[1, :4] = 0
    exact(program(longer, mask), module(longer, mask))


def test_counts():
    """The published layer of ZAYA1, multi-head attention of its width, and FLOPs as the formula has them."""
    with torch.device("meta"):
        module = CCA(2048, 8, 2, 128)
        wide = GroupedQueryAttention(2048, 16, 16, 128)
    assert sum(p.numel() for p in module.parameters()) == 5_575_682
    assert sum(p.numel() for p in wide.parameters()) == 16_777_216
    small, tokens, e_q, e_k = CCA(32, 4, 2, 4), 16, 16, 8
    assert sum(p.numel() for p in small.parameters()) == 2 * 32 * (e_q + e_k) + (e_q + e_k) * (2 + 4 * 2 + 2) + 2
    linear, attention = 2 * tokens * 32 * (e_q + e_k), 2 * tokens**2 * e_q
    convolutions = (tokens + 1) * (e_q + e_k) * 2 + tokens * (e_q + e_k) * 4 * 2  # one position more in the first
    assert count(small, torch.zeros(1, tokens, 32)).macs == linear + convolutions + attention
    assert CCA(64, 4).head_dim == 8


def test_a_latent_that_is_wider_or_as_wide_works():
    x = noise(2, 5, 6)
    assert layer(6, 2, 2, 8)(x).shape == x.shape
    assert layer(6, 4, 2, 2)(x[:0]).shape == (0, 5, 6)
    assert layer(6, 4, 2, 2)(x[:, :1]).shape == (2, 1, 6)


def test_temperature_starts_at_one_and_is_not_decayed():
    module = CCA(8, 2)
    assert module.qk_norm.temp.tolist() == [1.0, 1.0]
    assert set(module.param_options()) <= dict(module.named_parameters()).keys()
    module.qk_norm.temp.data.zero_()  # as in the authors' code: everyone looks at all alike
    exact(module.attention_weights(torch.randn(1, 3, 8))[0, 0, 2], torch.full((3,), 1 / 3), 1e-6)


def test_checkpoints_load_by_either_name():
    module = CCA(8, 4, 2, 4)
    state, other = module.state_dict(), {n: t + 1 for n, t in module.state_dict().items()}
    old = {
        "qkv_proj.q_proj": "qkv.linear_q",
        "qkv_proj.k_proj": "qkv.linear_k",
        "qkv_proj.v_proj_current": "qkv.val_proj1",
        "qkv_proj.v_proj_delayed": "qkv.val_proj2",
        "qkv_proj.conv_qk_depthwise": "qkv.conv_qk.0",
        "qkv_proj.conv_qk_grouped": "qkv.conv_qk.1",
        "qk_norm": "qkv",
        "o_proj": "o_proj",
    }
    maintained = {f"model.layers.{i}.self_attn.{n}": t for i, s in enumerate((other, state)) for n, t in s.items()}
    original = {}
    for i, s in enumerate((other, state)):
        for name, tensor in s.items():
            place, last = name.rsplit(".", 1)
            original[f"model.layers.{2 * i}.self_attn.{old[place]}.{last}"] = tensor
    original["model.layers.3.zaya_block.router.weight"] = torch.zeros(1)
    for whole in (maintained, original):
        found = convert_official(whole, 1)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[n], state[n]) for n in state)
        module.load_state_dict(found)
    with pytest.raises(ValueError, match=r"block=7: .*model\.layers\.14"):
        convert_official(original, 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 0}, "embed_dim=0"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"num_kv_heads": 3}, "num_kv_heads=3: must divide num_heads=4"),
        ({"head_dim": 0}, "head_dim=0"),
        ({"num_kv_heads": 1, "head_dim": 3}, "head_dim=3: .*even"),
        ({"time0": -1}, "time0=-1"),
        ({"time1": 0}, "time1=0"),
        ({"rotary": 1.5}, "rotary=1.5"),
        ({"head_dim": 3, "rotary": 1.0}, "rotary=1.0: .*head_dim=3"),
        ({"theta": 0.0}, "theta=0.0"),
        ({"window": 0}, "window=0"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        CCA(**{"embed_dim": 16, "num_heads": 4, **options})


def test_bad_inputs():
    module, cache, x = CCA(8, 2), CCACache(), torch.zeros(2, 4, 8)
    for bad in (x[0], x[..., :7], x[:, :0]):
        with pytest.raises(ValueError, match=r"x of shape .*expected \(B, S, 8\)"):
            module(bad)
    with pytest.raises(ValueError, match=r"padding_mask of shape \(2, 3\): expected \(2, 4\)"):
        module(x, torch.ones(2, 3))
    with pytest.raises(ValueError, match="rotary="):
        module(x, rotary=(torch.zeros(3, 2), torch.zeros(3, 2)))
    with pytest.raises(ValueError, match="pad on the left"):
        module(x, torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]), cache=cache)
    module(x, torch.tensor([[0, 0, 0, 0], [0, 1, 1, 1]]), cache=cache)
    for late in ([[0, 1, 1, 1], [0, 1, 1, 1]], [[0, 1, 0, 1], [1, 1, 1, 1]]):
        with pytest.raises(ValueError, match="pad on the left"):
            module(x, torch.tensor(late), cache=cache)
    module(x, cache=cache)
    with pytest.raises(ValueError, match="pad on the left"):
        module(x, torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]), cache=cache)
    with pytest.raises(ValueError, match="cache of 2 sequences: x has 1"):
        module(x[:1], cache=cache)
