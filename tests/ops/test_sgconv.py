"""Structured global convolution against loops, its identities, and every option of the layer and the operator."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchconv.kernels import _long_forms as forms
from torchconv.ops._sequence import SpectrumCache
from torchconv.ops.longconv import LongConvLayer
from torchconv.ops.longconv_layers import H3Conv, StandaloneLongConv
from torchconv.ops.sgconv import SGConv1d, SGConvLayer, octave_count, structured_kernel


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer(*args, seed=0, **options):
    torch.manual_seed(seed)
    options.setdefault("kernel_dim", 8)
    return SGConvLayer(*args, dtype=torch.float64, **options)


def loops(module, u):
    """The definition of convolution and skip, sample by sample, on (B, H, L): (B, c, H, L)."""
    kernel, length = module.one_sided(), u.shape[-1]
    past, future = (kernel.chunk(2)) if module.bidirectional else (kernel, kernel[..., :0])
    y = module.D[:, :, None] * u[:, None]
    for t in range(length):
        for s in range(length):
            if s <= t < s + past.shape[-1]:
                y[..., t] += past[..., t - s] * u[:, None, :, s]
            elif t < s <= t + future.shape[-1]:
                y[..., t] += future[..., s - t - 1] * u[:, None, :, s]
    return y


@pytest.mark.parametrize("mode", ["cat_randn", "sum_randn", "cat_cos", "sum_cos_nearest", "cat_randn_learnable"])
@pytest.mark.parametrize("length", [9, 32, 45])
@pytest.mark.parametrize(("channels", "bidirectional"), [(1, False), (2, True), (3, False), (1, True)])
def test_equals_the_definition(mode, length, channels, bidirectional):
    options = {"mode": mode, "kernel_dim": 4, "decay_min": 0.5, "decay_max": 1.5, "linear": True}
    module = layer(3, 32, channels, bidirectional, **options)
    u = noise(2, 3, length)
    expected = loops(module, u).flatten(1, 2)
    torch.testing.assert_close(module(u), expected, atol=1e-12, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(module(u), expected, atol=1e-12, rtol=0)
    module.transposed = False
    torch.testing.assert_close(module(u.transpose(1, 2)), expected.transpose(1, 2), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("l_max", "size", "scale", "n"), [(16384, 64, 0, 9), (40, 16, 0, 3), (64, 64, 0, 1), (64, 8, 1, 3)]
)
def test_number_of_octaves_and_length(l_max, size, scale, n):
    assert octave_count(l_max, size, scale) == n
    module = layer(2, l_max, kernel_dim=size, init_scale=scale)
    assert len(module.kernel_list) == n
    assert module.one_sided().shape == (1, 2, size * 2 ** (n - 1 + scale))
    assert sum(p.numel() for p in module.kernel_list) == 2 * size * n
    assert module.one_sided(7).shape[-1] == 7


def test_blocks_of_both_assemblies():
    octaves = [torch.full((1, 2, 4), v, dtype=torch.float64) for v in (1.0, 10.0, 100.0)]
    multiplier = torch.tensor([2.0, 3.0], dtype=torch.float64).reshape(1, 2, 1)
    cat = structured_kernel(octaves, multiplier)
    assert cat[0, 0].tolist() == [4.0] * 4 + [20.0] * 4 + [100.0] * 8
    assert cat[0, 1].tolist() == [9.0] * 4 + [30.0] * 4 + [100.0] * 8
    added = structured_kernel(octaves, multiplier, "sum")
    assert added[0, 0].tolist() == [124.0] * 4 + [120.0] * 4 + [100.0] * 8
    decay = torch.tensor([0.0, 1.0], dtype=torch.float64)
    weighted = structured_kernel(octaves, 1.0, decay=decay)
    position = torch.arange(1, 17, dtype=torch.float64)
    plain = structured_kernel(octaves, 1.0)
    torch.testing.assert_close(weighted, torch.stack([plain[:, 0], plain[:, 1] / position], 1))
    for length in (1, 5, 16, 99):
        for mode in ("cat", "sum"):
            part = structured_kernel(octaves, multiplier, mode, length=length)
            assert torch.equal(part, structured_kernel(octaves, multiplier, mode)[..., :length])
    stretched = structured_kernel([noise(1, 1, 4)], init_scale=1)
    torch.testing.assert_close(stretched, F.interpolate(noise(1, 1, 4), scale_factor=2.0, mode="linear"))
    nearest = structured_kernel([noise(1, 1, 4)], mode="cat_nearest", init_scale=1)
    assert torch.equal(nearest, noise(1, 1, 4).repeat_interleave(2, -1))
    assert torch.equal(structured_kernel(octaves[:1], 2.0, "sum"), structured_kernel(octaves[:1], 2.0, "cat"))


def test_one_octave_is_a_filter():
    module = layer(3, 8, kernel_dim=8, linear=True, decay_min=1.0, decay_max=1.0)
    nn.init.zeros_(module.D)
    w = module.kernel_list[0][0]
    taps = (w / w.norm(dim=-1, keepdim=True)).flip(-1).unsqueeze(1)
    u = noise(2, 3, 20)
    torch.testing.assert_close(module(u), F.conv1d(F.pad(u, (7, 0)), taps, groups=3))


def test_norm_is_that_of_the_start_and_stays():
    module = layer(4, 32, kernel_dim=4, linear=True)
    nn.init.zeros_(module.D)
    torch.testing.assert_close(module.one_sided().norm(dim=-1), torch.ones(1, 4, dtype=torch.float64))
    assert bool((module.one_sided(20).norm(dim=-1) < 1).all())
    u, norm = noise(2, 4, 30), module.kernel_norm.clone()
    before = module(u)
    with torch.no_grad():
        for octave in module.kernel_list:
            octave.mul_(3)
    torch.testing.assert_close(module(u), 3 * before)
    assert torch.equal(module.kernel_norm, norm)
    assert "kernel_norm" in module.state_dict()
    assert not any(p.shape == norm.shape and p is module.kernel_norm for p in module.parameters())


def test_loading_states_with_and_without_a_norm():
    source, target = (layer(4, 32, kernel_dim=4, seed=s) for s in (0, 1))
    with torch.no_grad():
        source.kernel_norm.mul_(1.5)
    state = source.state_dict()
    target.load_state_dict(state)
    assert torch.equal(target.kernel_norm, state["kernel_norm"])
    fresh = {**state, "kernel_norm": torch.ones(4, 1), "kernel_norm_initialized": torch.tensor(False)}
    target.load_state_dict(fresh)
    torch.testing.assert_close(target.kernel_norm, state["kernel_norm"] / 1.5)
    assert bool(target.kernel_norm_initialized)
    assert len(target.kernel_list) == 4
    with torch.device("meta"):
        empty = SGConvLayer(4, 32, kernel_dim=4)
    empty.load_state_dict(state, assign=True)
    u = noise(1, 4, 20)
    torch.testing.assert_close(empty(u), source(u))


def test_causality_and_direction():
    causal, both = layer(2, 16, kernel_dim=4, linear=True), layer(2, 16, bidirectional=True, kernel_dim=4, linear=True)
    jacobian = torch.autograd.functional.jacobian(lambda u: causal(u)[0].sum(0), noise(1, 2, 12))[:, 0]
    assert float(jacobian.abs().amax(1).triu(1).max()) < 1e-12
    with torch.no_grad():
        for mine, theirs in zip(both.kernel_list, causal.kernel_list, strict=True):
            mine[:1] = theirs
            mine[1:] = 0
        both.kernel_norm[:1] = causal.kernel_norm
        both.D.copy_(causal.D)
    u = noise(2, 2, 16)
    torch.testing.assert_close(both(u), causal(u))
    longer = torch.cat([u, noise(2, 2, 16, seed=1)], -1)
    torch.testing.assert_close(causal(longer)[..., :16], causal(u))


def test_time_reversal_exchanges_the_sides():
    module = layer(2, 16, bidirectional=True, kernel_dim=4, linear=True)
    nn.init.zeros_(module.D)
    u = noise(1, 2, 16)
    past, future = module.one_sided(16).chunk(2)
    backwards = module(u.flip(-1)).flip(-1)
    exchanged = torch.zeros_like(u)
    for t in range(16):
        for s in range(16):
            exchanged[..., t] += past[0, :, s - t] * u[..., s] if s >= t else future[0, :, t - s - 1] * u[..., s]
    torch.testing.assert_close(backwards, exchanged)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("ln", [True, False])
@pytest.mark.parametrize("postact", [None, "glu", "id", "relu"])
def test_after_the_convolution(transposed, ln, postact):
    module = layer(3, 16, 2, transposed=transposed, ln=ln, postact=postact, activation="silu", kernel_dim=4)
    u = noise(2, 3, 10)
    v = F.silu(loops(module, u).flatten(1, 2)).transpose(1, 2)
    if ln and transposed:
        nn.init.constant_(module.norm.norm.m, 0.3)
        nn.init.constant_(module.norm.norm.s, 1.3)
        v = 1.3 * (v - v.mean(-1, keepdim=True) + 0.3) / v.std(-1, correction=0, keepdim=True)
    elif ln:
        v = F.layer_norm(v, (6,), module.norm.norm.weight, module.norm.norm.bias)
    linear = module.output_linear if postact is None else module.output_linear[0]
    v = F.linear(v, linear.weight, linear.bias)
    v = {None: lambda z: z, "id": lambda z: z, "relu": F.relu, "glu": lambda z: F.glu(z, -1)}[postact](v)
    y = module(u if transposed else u.transpose(1, 2))
    torch.testing.assert_close(y.transpose(1, 2) if transposed else y, v)


@pytest.mark.parametrize("initializer", [None, "uniform", "normal", "xavier", "zero", "one"])
@pytest.mark.parametrize("weight_norm", [True, False])
def test_start_of_the_projection(initializer, weight_norm):
    module = layer(4, 16, initializer=initializer, weight_norm=weight_norm and initializer != "zero")
    names = set(dict(module.output_linear.named_parameters()))
    assert names == ({"weight_g", "weight_v", "bias"} if weight_norm and initializer != "zero" else {"weight", "bias"})
    y = module(noise(1, 4, 16))
    assert bool(torch.isfinite(y).all())
    if initializer == "one" and not weight_norm:
        assert bool((module.output_linear.weight == 1).all())
    if weight_norm and initializer == "one":  # the start of the weight is kept, its length is a number of its own
        with torch.no_grad():
            module.output_linear.weight_v.mul_(7)
        torch.testing.assert_close(module(noise(1, 4, 16)), y)


def test_learnable_and_fixed_decay():
    for words, trained in (("cat_randn_learnable", True), ("cat_randn_learnable_fixed", False)):
        module = layer(4, 32, mode=words, decay_min=0.2, decay_max=0.8)
        assert module.decay.requires_grad is trained
        assert bool(((module.decay >= 0.2) & (module.decay <= 0.8)).all())
        assert float(module.multiplier) == 1
        assert module.param_options() == {"decay": {"weight_decay": 0.0}}
    start = layer(5, 32, mode="cat_cos", kernel_dim=8).kernel_list[0][0]
    rows = {tuple(r.tolist()) for r in start.round(decimals=9)}
    waves = torch.stack([torch.linspace(0, 2 * h * math.pi, 8, dtype=torch.float64).cos() for h in range(5)])
    assert rows == {tuple(r.tolist()) for r in waves.round(decimals=9)}


def test_octaves_are_not_decayed_by_the_optimiser():
    module = layer(4, 32, kernel_dim=4)
    assert module.kernel_list.param_options() == {str(i): {"weight_decay": 0.0} for i in range(4)}


def test_dropout_drops_whole_features():
    module = layer(64, 16, activation="id", dropout=0.5).train()
    nn.init.eye_(module.output_linear.weight)
    nn.init.zeros_(module.output_linear.bias)
    torch.manual_seed(0)
    silent = module(noise(2, 64, 16)) == 0
    assert bool((silent.all(-1) == silent.any(-1)).all())
    assert 0.2 < float(silent.double().mean()) < 0.8
    assert not bool((module.eval()(noise(2, 64, 16)) == 0).any())


def test_gradients():
    module = layer(2, 12, 2, True, kernel_dim=3, activation="tanh", decay_min=1.5)
    names = [n for n, _ in module.named_parameters()]

    def run(u, *values):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (u,))

    values = [p.detach().clone().requires_grad_() for p in module.parameters()]
    assert torch.autograd.gradcheck(run, (noise(1, 2, 10).requires_grad_(), *values), fast_mode=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel_dim": 0}, "kernel_dim=0"),
        ({"l_max": 1, "kernel_dim": 64}, "kernel_dim=64"),
        ({"n_scales": 0}, "n_scales=0"),
        ({"n_scales": 2.0}, "n_scales=2.0"),
        ({"init_scale": 0.5}, "init_scale=0.5"),
        ({"decay_max": math.nan}, "decay_max=nan"),
        ({"mode": "randn"}, "mode='randn'"),
        ({"mode": "cat"}, "mode='cat'"),
        ({"activation": "glu"}, "activation='glu'"),
        ({"postact": "modrelu"}, "postact='modrelu'"),
        ({"initializer": "best"}, "initializer='best'"),
        ({"channels": 0}, "channels=0"),
        ({"init_scale": -9, "n_scales": 2}, "init_scale=-9"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        SGConvLayer(**{"d_model": 4, "l_max": 128, **change})
    with pytest.raises(ValueError, match="u of shape"):
        SGConvLayer(4, 64)(torch.zeros(1, 16, 4))


@pytest.mark.parametrize(("taps", "causal"), [(1, False), (2, False), (7, False), (12, False), (41, False), (9, True)])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_operator_is_the_convolution_it_merges_to(taps, causal, stride):
    torch.manual_seed(0)
    module = SGConv1d(
        3, kernel_size=taps, stride=stride, causal=causal, kernel_dim=3, decay=(1.5, 3), dtype=torch.float64
    )
    nn.init.normal_(module.bias)
    x = noise(2, 3, 15)
    y = module(x)
    merged = module.merge()
    assert type(merged) is nn.Conv1d
    torch.testing.assert_close(y, merged(x))
    if causal:
        torch.testing.assert_close(module(F.pad(x[..., :9], (0, 6)))[..., : 9 // stride], y[..., : 9 // stride])
    kernel, origin = module.taps()
    assert kernel.shape == (3, taps)
    assert origin == (0 if causal else taps // 2)


def test_operator_sees_both_sides_equally_far():
    kernel, origin = SGConv1d(2, kernel_size=9, kernel_dim=2).taps()
    assert origin == 4 == kernel.shape[-1] - 1 - origin
    with pytest.raises(ValueError, match="padding=0"):
        SGConv1d(2, kernel_size=9, causal=True, padding=0)
    for decay in (-1.0, (2.0,), "fast"):
        with pytest.raises(ValueError, match="decay="):
            SGConv1d(2, kernel_size=9, decay=decay)
    for arguments in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match="=0"):
            octave_count(*arguments)
    with pytest.raises(ValueError, match="octaves="):
        structured_kernel([])


@pytest.mark.parametrize(
    "make",
    [
        lambda **o: SGConv1d(3, kernel_size=31, kernel_dim=4, decay=(1.5, 3.0), **o),
        lambda **o: SGConvLayer(3, 16, kernel_dim=4, mode="sum_cos_learnable", ln=True, weight_norm=True, **o),
        lambda **o: LongConvLayer(3, 16, block_fft_conv=True, postact="relu", initializer="zero", **o),
        lambda **o: StandaloneLongConv(3, 16, **o),
        lambda **o: H3Conv(3, 16, **o),
    ],
)
def test_modules_without_memory_get_all_their_numbers(make):
    module = make(device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for t in (*module.parameters(), *module.buffers()):
            t.fill_(1) if t.dtype == torch.bool else t.fill_(math.nan)
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    fresh = make()
    for name, t in module.state_dict().items():
        assert bool(t.isfinite().all()), name
        if name in ("multiplier", "kernel_norm_initialized", "norm.norm.m", "norm.norm.s", "block_fft_u.mat_4"):
            torch.testing.assert_close(t, fresh.state_dict()[name])
    if hasattr(module, "one_sided"):
        torch.testing.assert_close(module.one_sided().norm(dim=-1), torch.ones(module.kernel_norm.shape[:2]))


def test_layer_exports_with_an_open_length():
    module = layer(3, 24, bidirectional=True, kernel_dim=4, mode="sum_randn")
    dynamic = ({0: torch.export.Dim.AUTO, 2: torch.export.Dim("length", min=4)},)
    program = torch.export.export(module, (noise(2, 3, 32),), dynamic_shapes=dynamic).module()
    for length in (5, 24, 100):
        u = noise(3, 3, length)
        torch.testing.assert_close(program(u), module(u))


class TestCache:
    """Kernels are remembered without gradients only, and only while the weights are what they were."""

    def build(self):
        return layer(3, 64, bidirectional=True, kernel_dim=8).eval(), noise(2, 3, 50)

    def test_is_used(self, monkeypatch):
        module, u = self.build()
        made, make = [], SGConvLayer._taps
        monkeypatch.setattr(SGConvLayer, "_taps", lambda self, n: made.append(n) or make(self, n))
        with torch.no_grad():
            first, again = module(u), module(u)
            module(u[..., :40])
        assert made == [50, 40]
        assert torch.equal(first, again)
        torch.testing.assert_close(first, module(u))
        assert made == [50, 40, 50]

    @pytest.mark.parametrize("how", ["in place", "data", "replaced", "loaded", "norm", "type"])
    def test_sees_changes(self, how):
        module, u = self.build()
        with torch.no_grad():
            module(u)
            octave = module.kernel_list[1]
            if how == "in place":
                octave.mul_(2)
            elif how == "data":
                octave.data.mul_(2)
            elif how == "replaced":
                module.D = nn.Parameter(2 * module.D)
            elif how == "loaded":
                module.load_state_dict(layer(3, 64, bidirectional=True, kernel_dim=8, seed=5).state_dict())
            elif how == "norm":
                module.kernel_norm.div_(2)
            else:
                module, u = module.float(), u.float()
            after = module(u)
        module._cache = SpectrumCache()
        torch.testing.assert_close(after, module(u))

    def test_sees_other_tensors_elsewhere_than_on_a_cpu(self):
        """Only identities and versions are known there; all meta tensors have one address, as memory used again has."""
        cache, x, made = SpectrumCache(), torch.zeros(1, 3, 8, device="meta"), []
        kernels = [torch.zeros(1, 3, 8, device="meta") for _ in range(2)]

        def ask(kernel):
            cache.convolve(x, [kernel], lambda: made.append(kernel) or (kernel, 0))

        with torch.no_grad():
            for k in (0, 0, 1, 1, 0):
                ask(kernels[k])
            assert [k is kernels[0] for k in made] == [True, False, True]
            kernels[0].mul_(2)
            ask(kernels[0])
        assert len(made) == 4

    def test_stays_behind_in_copies(self):
        module, u = self.build()
        with torch.no_grad():
            expected = module(u)
            for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
                assert twin._cache._held is None
                assert torch.equal(twin(u), expected)
        assert not any("cache" in name for name in module.state_dict())

    def test_in_inference_mode_and_training_after_it(self):
        module, u = self.build()
        with torch.inference_mode():
            expected = module(u)
        with torch.no_grad():
            assert torch.equal(module(u), expected)
        module.train()(u).sum().backward()
        assert module.D.grad is not None


def test_short_kernels_on_long_sequences_go_in_blocks():
    assert forms.block_length(1 << 16, 255, 0) > 0
    module = SGConv1d(1, kernel_size=99, dtype=torch.float64)
    x = noise(1, 1, 1 << 16)
    with torch.no_grad():
        torch.testing.assert_close(module(x), module.merge()(x))
