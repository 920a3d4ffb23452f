"""Long convolutions: kernels, both layers, H3, learned transforms, the operator, against their definitions."""

from __future__ import annotations

import copy
import json
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from tests.parity.core import run_file
from torchconv.kernels._long_monarch import dft_matrix
from torchconv.models.sequence.longconv import LongConvModel
from torchconv.ops._sequence import SpectrumCache
from torchconv.ops.longconv import (
    LongConv1d,
    LongConv2d,
    LongConvKernel,
    LongConvLayer,
    double_exponential,
    moving_average,
    smooth_frequencies,
    squash,
)
from torchconv.ops.longconv_fft import BlockFFT, frequency_sparse_conv, partial_conv
from torchconv.ops.longconv_layers import H3Conv, StandaloneLongConv


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def build(kind, *args, seed=0, **options):
    torch.manual_seed(seed)
    return kind(*args, dtype=torch.float64, **options)


def circular(u, kernel, n):
    """Circular convolution of n samples, as the authors write it; u (B, H, L), kernel (c, H, K) → (B, c, H, L)."""
    product = torch.fft.rfft(u, n).unsqueeze(1) * torch.fft.rfft(kernel, n)
    return torch.fft.irfft(product, n)[..., : u.shape[-1]]


class TestKernel:
    def test_squash_is_the_proximal_map(self):
        k, lam = noise(500), 0.3
        grid = torch.linspace(-4, 4, 8001, dtype=torch.float64)
        costs = 0.5 * (grid[:, None] - k).square() + lam * grid[:, None].abs()
        torch.testing.assert_close(squash(k, lam), grid[costs.argmin(0)], atol=1e-3, rtol=0)
        assert torch.equal(squash(k, 0.0), k)
        assert not torch.equal(squash(squash(k, lam), lam), squash(k, lam))
        zeros = [int((squash(k, v) == 0).sum()) for v in (0.0, 0.1, 0.5, 2.0)]
        assert zeros == sorted(set(zeros))
        k.requires_grad_()
        (grad,) = torch.autograd.grad(squash(k, lam).sum(), k)
        assert torch.equal(grad, (k.abs() > lam).double())

    @pytest.mark.parametrize("window", [1, 3, 7])
    def test_moving_average(self, window):
        k = noise(2, 3, 20)
        padded = F.pad(k, (window // 2, window // 2))
        torch.testing.assert_close(moving_average(k, window), padded.unfold(-1, window, 1).mean(-1))
        flat = moving_average(torch.ones(1, 1, 20), window)[0, 0]
        edge = window // 2
        assert torch.allclose(flat[edge : 20 - edge], torch.ones(20 - 2 * edge))
        assert float(flat[0]) == pytest.approx((window - edge) / window)

    @pytest.mark.parametrize(("length", "window"), [(24, 7), (24, 1), (25, 5), (8, 7), (24, 4), (25, 2), (8, 20)])
    def test_frequency_smoothing(self, length, window):
        k = noise(2, 3, length)
        spectrum = torch.fft.rfft(k)
        bins, half = spectrum.shape[-1], (window - 1) // 2
        out = torch.zeros_like(spectrum)
        for b in range(bins):
            for j in range(window):
                if 0 <= b + j - half < bins:
                    out[..., b] += math.exp(-0.5 * abs(j - window // 2) ** 2) * spectrum[..., b + j - half]
        torch.testing.assert_close(smooth_frequencies(k, window), torch.fft.irfft(out))
        assert smooth_frequencies(k, window).shape[-1] == 2 * (length // 2)
        assert LongConvKernel(3, length, use_ma_smoothing=True, smooth_freq=True, ma_window_len=window).window == window

    def test_envelopes(self):
        e = double_exponential(6, 20, dtype=torch.float64)
        for h in range(6):
            for j in (0, 7, 19):
                assert float(e[h, j]) == pytest.approx(math.exp(-(j / 20) * 3 ** (h / 6)))

    def test_pipeline_and_start(self):
        kernel = build(LongConvKernel, 3, 24, 2, lam=0.01, use_ma_smoothing=True, ma_window_len=5)
        torch.testing.assert_close(kernel(), squash(moving_average(kernel.kernel, 5), 0.01))
        kernel.smooth_freq = True
        torch.testing.assert_close(kernel(), squash(smooth_frequencies(kernel.kernel, 5), 0.01))
        assert LongConvKernel(3, 24, causal=False).kernel.shape == (1, 3, 48)
        wide = build(LongConvKernel, 8, 4000, init_std=0.5)
        assert float(wide.kernel.detach().std()) == pytest.approx(0.5, rel=0.05)
        decayed = build(LongConvKernel, 8, 4000, weight_init="double_exp", init_std=0.5)
        expected = 0.5 * double_exponential(8, 4000, dtype=torch.float64)
        torch.testing.assert_close(decayed.kernel[0] / wide.kernel[0] * 0.5, expected)
        before = kernel.kernel.clone()
        kernel.reset_parameters()
        assert not torch.equal(kernel.kernel, before)
        assert kernel.param_options() == {"kernel": {"weight_decay": 0.0}}

    def test_dropout_is_of_single_taps_in_training(self):
        kernel = build(LongConvKernel, 3, 2000, lam=0.0, kernel_dropout=0.25)
        drawn = kernel.train()()
        dropped = drawn == 0
        assert 0.2 < float(dropped.double().mean()) < 0.3
        torch.testing.assert_close(drawn[~dropped], kernel.kernel[~dropped] / 0.75)
        assert torch.equal(kernel.eval()(), kernel.kernel)

    def test_dead_starts_are_told(self):
        with pytest.warns(UserWarning, match=r"lam=0\.1: 0\.00% of the taps"):
            kernel = LongConvKernel(4, 100, lam=0.1, init_std=0.002)
        assert kernel.live_taps() == 0
        with pytest.warns(UserWarning, match="lam="):
            LongConv1d(4, lam=0.5)
        with pytest.warns(UserWarning, match="lam="):
            StandaloneLongConv(4, 20, kernel_lam=0.1, init_std=0.002)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert LongConvKernel(4, 100).live_taps() > 0.5
            LongConv1d(4)

    def test_dead_kernels_leave_the_skip(self):
        with pytest.warns(UserWarning, match="lam="):
            layer = build(LongConvLayer, 3, 16, postact=None, activation="id", lam=0.9, init_std=0.1)
        u = noise(2, 3, 16)
        y = layer(u)
        torch.testing.assert_close(y, layer.D[0, :, None] * u)
        y.sum().backward()
        assert int(layer.kernel.kernel.grad.count_nonzero()) == 0


class TestLayer:
    @pytest.mark.parametrize("length", [1, 2, 9, 16, 17, 32, 45, 80])
    @pytest.mark.parametrize("bidirectional", [False, True])
    @pytest.mark.parametrize("causal", [False, True])
    def test_wrapped_is_what_the_authors_compute(self, length, bidirectional, causal):
        options = {"postact": None, "activation": "id", "causal": causal}
        layer = build(LongConvLayer, 3, 32, 2, bidirectional, wrap=True, **options)
        u, kernel = noise(2, 3, length), layer.kernel()
        if bidirectional:
            past, future = kernel.chunk(2)
            kernel = F.pad(past, (0, length)) + F.pad(future.flip(-1), (length, 0))
        expected = circular(u, kernel, min(length, 32) + length) + layer.D[..., None] * u[:, None]
        torch.testing.assert_close(layer(u), expected.flatten(1, 2))
        with torch.no_grad():
            torch.testing.assert_close(layer(u), expected.flatten(1, 2))

    @pytest.mark.parametrize("length", [9, 32, 45])
    def test_unwrapped_is_a_linear_convolution(self, length):
        causal = build(LongConvLayer, 3, 32, postact=None, activation="id", lam=0.0)
        nn.init.zeros_(causal.D)
        u = noise(2, 3, length)
        taps = causal.kernel.kernel[0].flip(-1).unsqueeze(1)
        torch.testing.assert_close(causal(u), F.conv1d(F.pad(u, (31, 0)), taps, groups=3))
        both = build(LongConvLayer, 3, 32, 1, True, postact=None, activation="id", lam=0.0)
        nn.init.zeros_(both.D)
        past, future = both.kernel.kernel
        two_sided = torch.cat([past.flip(-1), future], -1).unsqueeze(1)
        torch.testing.assert_close(both(u), F.conv1d(F.pad(u, (31, 32)), two_sided, groups=3))

    @pytest.mark.parametrize("wrap", [False, True])
    def test_causality(self, wrap):
        layer = build(LongConvLayer, 2, 32, wrap=wrap)
        jacobian = torch.autograd.functional.jacobian(lambda u: layer(u)[0].sum(0), noise(1, 2, 10))[:, 0]
        ahead = float(jacobian.abs().amax(1).triu(1).max())
        assert ahead > 1e-6 if wrap else ahead < 1e-12

    @pytest.mark.parametrize("transposed", [True, False])
    @pytest.mark.parametrize("postact", [None, "glu", "id", "tanh"])
    def test_after_the_convolution(self, transposed, postact):
        layer = build(LongConvLayer, 3, 16, 2, activation="silu", postact=postact, transposed=transposed)
        bare = build(LongConvLayer, 3, 16, 2, activation="id", postact=None)
        bare.load_state_dict({n: t for n, t in layer.state_dict().items() if "output" not in n})
        u = noise(2, 3, 12)
        v = F.silu(bare(u)).transpose(1, 2)
        if postact is not None:
            v = F.linear(v, layer.output_linear[0].weight, layer.output_linear[0].bias)
            v = {"glu": lambda z: F.glu(z, -1), "id": lambda z: z, "tanh": torch.tanh}[postact](v)
        y = layer(u if transposed else u.transpose(1, 2))
        torch.testing.assert_close(y.transpose(1, 2) if transposed else y, v)

    def test_lengths_hide_what_follows(self):
        layer = build(LongConvLayer, 3, 16, bidirectional=True)
        u = noise(2, 3, 12)
        hidden = u * (torch.arange(12) < torch.tensor([[[5]], [[9]]]))
        assert torch.equal(layer(u, torch.tensor([5, 9])), layer(hidden))
        assert torch.equal(layer(u, 7), layer(F.pad(u[..., :7], (0, 5))))
        assert torch.equal(layer(u, torch.tensor([12])), layer(u))

    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize("transposed", [True, False])
    def test_dropout(self, tied, transposed):
        layer = build(
            LongConvLayer, 50, 16, activation="id", postact=None, dropout=0.5, tie_dropout=tied, transposed=transposed
        )
        torch.manual_seed(0)
        u = noise(2, 50, 16)
        y = layer.train()(u if transposed else u.transpose(1, 2))
        silent = (y if transposed else y.transpose(1, 2)) == 0
        assert bool((silent.all(-1) == silent.any(-1)).all()) is tied
        assert 0.3 < float(silent.double().mean()) < 0.7

    def test_kernel_dropout_is_not_remembered(self):
        layer = build(LongConvLayer, 3, 64, kernel_dropout=0.5).train()
        u = noise(1, 3, 64)
        with torch.no_grad():
            assert not torch.equal(layer(u), layer(u))
            layer.eval()
            assert torch.equal(layer(u), layer(u))
            first = layer(u)
            layer.kernel.window = 5
            assert not torch.equal(layer(u), first)
            layer.kernel.window = 0
            layer.kernel.lam = 0.05
            assert not torch.equal(layer(u), first)
            layer._cache = SpectrumCache()
            changed = layer(u)
            layer.kernel.kernel.data.mul_(2)
            assert not torch.equal(layer(u), changed)
            for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
                assert torch.equal(twin(u), layer(u))

    def test_exact_blocks_are_the_transform(self):
        options = {"block_fft_conv_args": {"learn_dft_matrices": False}, "bidirectional": True}
        layer = build(LongConvLayer, 3, 32, 2, block_fft_conv=True, **options)
        plain = build(LongConvLayer, 3, 32, 2, bidirectional=True)
        plain.load_state_dict(layer.state_dict())
        for length in (5, 32, 40):
            u = noise(2, 3, length)
            torch.testing.assert_close(layer(u), plain(u))

    @pytest.mark.parametrize("bidirectional", [False, True])
    def test_wrapped_by_blocks(self, bidirectional):
        options = {"block_fft_conv": True, "block_fft_conv_args": {"learn_dft_matrices": False}, "wrap": True}
        layer = build(LongConvLayer, 3, 20, 1, bidirectional, "id", None, **options)
        for length, n in ((16, 32), (20, 40), (44, 64)):  # only the first and the last are a transform's length
            u, kernel = noise(2, 3, length), layer.kernel()
            if bidirectional:
                kernel = F.pad(kernel[:1], (0, length)) + F.pad(kernel[1:].flip(-1), (length, 0))
            size = 1 << (n - 1).bit_length()
            product = torch.fft.fft(u, size).unsqueeze(1) * torch.fft.fft(kernel, size)
            expected = torch.fft.ifft(product, n).real[..., :length] + layer.D[..., None] * u[:, None]
            torch.testing.assert_close(layer(u), expected.flatten(1, 2))

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("softplus", lambda x: (1 + x.exp()).log()),
            ("sqrelu", lambda x: x.clamp(min=0) ** 2),
            ("relu2", lambda x: x.clamp(min=0) ** 2),
            ("laplace", lambda x: torch.special.ndtr((x - 0.707107) / 0.282095)),
        ],
    )
    def test_activations_of_language_models(self, name, expected):
        layer = build(LongConvLayer, 3, 16, activation=name, postact=name)
        bare = build(LongConvLayer, 3, 16, activation="id", postact=None)
        u, linear = noise(2, 3, 12), layer.output_linear[0]
        v = F.linear(expected(bare(u)).transpose(1, 2), linear.weight, linear.bias)
        torch.testing.assert_close(layer(u), expected(v).transpose(1, 2))

    def test_exports_with_an_open_length(self):
        layer = build(LongConvLayer, 3, 24, bidirectional=True)
        dynamic = ({0: torch.export.Dim.AUTO, 2: torch.export.Dim("length", min=4)},)
        program = torch.export.export(layer, (noise(2, 3, 32),), dynamic_shapes=dynamic).module()
        for length in (5, 24, 100):
            u = noise(3, 3, length)
            torch.testing.assert_close(program(u), layer(u))

    def test_lengths_in_a_golden_file(self, tmp_path):
        layer, u, lengths = LongConvLayer(3, 16, wrap=True), noise(2, 3, 16).float(), torch.tensor([16, 5])
        tensors = {f"state.{n}": t for n, t in layer.state_dict().items()}
        tensors |= {"input.u": u, "input.lengths": lengths, "output.y": layer(u, lengths).detach()}
        config = json.dumps({"d_model": 3, "l_max": 16, "lam": 0.003})
        save_file(tensors, tmp_path / "case.safetensors", {"config": config, "source": "long_conv.py:LongConv"})
        report = run_file(tmp_path / "case.safetensors", key="longconv")
        assert report.passed, report

    def test_refusals(self):
        for change, message in (
            ({"d_model": 0}, "d_model=0"),
            ({"l_max": 0}, "l_max=0"),
            ({"activation": "glu"}, "activation='glu'"),
            ({"postact": "best"}, "postact='best'"),
            ({"lam": -1.0}, "lam=-1.0"),
            ({"weight_init": "zero"}, "weight_init='zero'"),
            ({"use_ma_smoothing": True, "ma_window_len": 4}, "ma_window_len=4"),
            ({"block_fft_conv": True, "block_fft_conv_args": {"max_m": 12}}, "max_m=12"),
        ):
            with pytest.raises(ValueError, match=message):
                LongConvLayer(**{"d_model": 3, "l_max": 16, **change})
        with pytest.raises(ValueError, match="u of shape"):
            LongConvLayer(3, 16)(torch.zeros(1, 16, 3))
        with pytest.raises(ValueError, match=r"lengths of shape \(3,\)"):
            LongConvLayer(3, 16)(torch.zeros(2, 3, 16), torch.tensor([1, 2, 3]))
        with pytest.raises(ValueError, match="kernel of 1 tap"):
            smooth_frequencies(torch.zeros(1, 1, 1), 3)


class TestStandalone:
    @pytest.mark.parametrize("length", [1, 10, 24, 40])
    def test_is_circular_on_twice_the_input(self, length):
        layer = build(StandaloneLongConv, 3, 24, kernel_lam=0.01).eval()
        u = noise(2, 3, length)
        v = circular(u, squash(layer.kernel, 0.01), 2 * length) + layer.D[..., None] * u[:, None]
        linear = layer.output_linear[0]
        v = F.glu(F.linear(F.gelu(v.flatten(1, 2)).transpose(1, 2), linear.weight, linear.bias), -1)
        torch.testing.assert_close(layer(u), v.transpose(1, 2))

    def test_causal_is_the_framework_layer(self):
        layer = build(StandaloneLongConv, 3, 24, causal=True, dropout=0.0)
        other = build(LongConvLayer, 3, 24, 2)
        state = {n.replace("kernel", "kernel.kernel"): t for n, t in layer.state_dict().items()}
        state["kernel.kernel"] = state["kernel.kernel"][..., :24]
        other.load_state_dict(state)
        u = noise(2, 3, 24)
        torch.testing.assert_close(layer(u), other(u))
        two_sided = build(StandaloneLongConv, 3, 24, dropout=0.0)
        two_sided.load_state_dict(layer.state_dict())
        assert not torch.allclose(two_sided(u), layer(u))
        with torch.no_grad():
            two_sided.kernel[..., 24:] = 0
        torch.testing.assert_close(two_sided(u), layer(u))

    def test_refusals(self):
        for options, message in (({"H": 0}, "H=0"), ({"kernel_lam": -1}, "kernel_lam=-1")):
            with pytest.raises(ValueError, match=message):
                StandaloneLongConv(**{"H": 3, "L": 8, **options})
        with pytest.raises(ValueError, match="u of shape"):
            StandaloneLongConv(3, 8)(torch.zeros(1, 4, 8))


@pytest.mark.parametrize("wrap", [True, False])
@pytest.mark.parametrize("length", [10, 16, 25])
def test_h3(wrap, length):
    block = build(H3Conv, 4, 16, wrap=wrap)
    u = noise(2, length, 4)
    q, k, v = (p(u).transpose(1, 2) for p in (block.q_proj, block.k_proj, block.v_proj))
    taps = slice(None) if wrap else slice(length)
    k = circular(k, block.k_kernel()[..., taps], 2 * length)[:, 0] + block.k_D[:, None] * k
    y = q * (circular(k * v, block.kernel()[..., taps], 2 * length)[:, 0] + block.D[:, None] * k * v)
    torch.testing.assert_close(block(u), block.output_linear(y.transpose(1, 2)))
    with pytest.raises(ValueError, match="head_dim=2"):
        H3Conv(4, 16, head_dim=2)


class TestBlockFFT:
    @pytest.mark.parametrize("learned", [True, False])
    @pytest.mark.parametrize("size", [1, 2, 16, 64, 512, 1024])
    def test_starts_exact(self, learned, size):
        block, x = build(BlockFFT, learned), torch.complex(noise(2, 3, size), noise(2, 3, size, seed=1))
        torch.testing.assert_close(block(x), torch.fft.fft(x))
        torch.testing.assert_close(block(block(x), forward=False), x)
        single = BlockFFT(learned)(x.to(torch.complex64)).detach()
        assert float((single - torch.fft.fft(x)).abs().max()) <= 1e-5 * float(torch.fft.fft(x).abs().max())

    def test_sizes_are_rounded_up_and_inputs_padded(self):
        x = noise(2, 3, 40)
        torch.testing.assert_close(BlockFFT()(x, 50), torch.fft.fft(x, 64))
        torch.testing.assert_close(BlockFFT()(x, 32), torch.fft.fft(x[..., :32]))

    @pytest.mark.parametrize("features", [1, 3])
    def test_learned_matrices_are_where_they_belong(self, features):
        block = build(BlockFFT, H=features)
        with torch.no_grad():
            for p in block.parameters():
                p.add_(noise(*p.shape, seed=int(p.shape[1])))
        first, second = (torch.view_as_complex(p).expand(3, -1, -1) for p in (block.mat_16, block.mat_4))
        x = torch.complex(noise(2, 3, 64), noise(2, 3, 64, seed=1))
        rows = torch.einsum("hkm,bhmn->bhkn", first, x.unflatten(-1, (16, 4)))
        angle = torch.arange(16)[:, None] * torch.arange(4) * (-2 * math.pi / 64)
        rows = rows * torch.polar(torch.ones(16, 4, dtype=torch.float64), angle.double())
        expected = torch.einsum("hqn,bhkn->bhqk", second, rows).flatten(-2)
        torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(block(x, forward=False), block(x.conj()).conj() / 64)

    def test_refusals(self):
        with pytest.raises(ValueError, match=r"x of shape \(2, 3, 16\).*H=4"):
            BlockFFT(H=4)(torch.zeros(2, 3, 16))
        with pytest.raises(ValueError, match="N=0"):
            BlockFFT()(torch.zeros(2, 3, 16), 0)

    def test_corrections_are_added_and_small_matrices_serve(self):
        block, x = build(BlockFFT, learn_additive=True, max_m=4), noise(2, 3, 64)
        off = float((block(x) - torch.fft.fft(x)).detach().abs().max())
        assert 0 < off < 10
        with torch.no_grad():
            for p in block.parameters():
                p.zero_()
        torch.testing.assert_close(block(x), torch.fft.fft(x))
        assert {n for n, _ in block.named_parameters()} == {"mat_2", "mat_4"}
        torch.testing.assert_close(build(BlockFFT, max_m=32)(x), torch.fft.fft(x))

    def test_gradients_compile_and_autocast(self):
        block = build(BlockFFT, H=2)
        x = noise(1, 2, 64).requires_grad_()
        used = [block.mat_4, block.mat_16]

        def run(x, *_):
            return torch.view_as_real(block(x))

        assert torch.autograd.gradcheck(run, (x, *used), fast_mode=True)
        replaced = {n: 2 * p.detach() for n, p in block.named_parameters()}
        doubled = torch.func.functional_call(block, replaced, (x,))
        torch.testing.assert_close(doubled, 4 * block(x))  # of two steps
        compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), block(x))
        with torch.autocast("cpu", torch.bfloat16):
            assert block(x.bfloat16()).dtype == torch.complex64
        assert block.double()(x).dtype == torch.complex128
        torch.testing.assert_close(dft_matrix(4) @ dft_matrix(4).conj() / 4, torch.eye(4) + 0j, atol=1e-6, rtol=0)


def test_partial_and_sparse_convolutions():
    x, k = noise(2, 3, 32), noise(3, 32, seed=1)
    full = circular(x, k[None], 64)[:, 0]
    torch.testing.assert_close(partial_conv(x, k, 32), full)
    torch.testing.assert_close(partial_conv(x, k, 5), circular(x, k[None, :, :5], 64)[:, 0])
    torch.testing.assert_close(frequency_sparse_conv(x, k, 66), full)
    spectrum = torch.fft.rfft(k, 64)
    spectrum[:, 10:] = 0
    expected = torch.fft.irfft(torch.fft.rfft(x, 64) * spectrum, 64)[..., :32]
    torch.testing.assert_close(frequency_sparse_conv(x, k, 20), expected)
    with pytest.raises(ValueError, match="taps=0"):
        partial_conv(x, k, 0)
    for bad, message in (((x, k[:2]), "kernel of shape"), ((x[0], k), "x of shape"), ((x.int(), k), "x.dtype")):
        with pytest.raises(ValueError, match=message):
            frequency_sparse_conv(*bad, 20)


@pytest.mark.parametrize("taps", [1, 2, 7, 12, 41])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("stride", [1, 3])
def test_operator_is_the_convolution_it_merges_to(taps, causal, stride):
    layer = build(LongConv1d, 3, kernel_size=taps, stride=stride, causal=causal, lam=0.001)
    nn.init.normal_(layer.bias)
    x = noise(2, 3, 15)
    y = layer(x)
    merged = layer.merge()
    assert type(merged) is nn.Conv1d
    torch.testing.assert_close(y, merged(x))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), y)
    if causal:
        past = layer(F.pad(x[..., :9], (0, 6)))
        torch.testing.assert_close(past[..., : -(-9 // stride)], y[..., : -(-9 // stride)])


def test_operator_in_the_plane():
    layer = build(LongConv2d, 3, kernel_size=(5, 8), lam=0.01)
    x = noise(2, 3, 9, 7)
    kernel = squash(layer.kernel, 0.01).flip(1, 2).unsqueeze(1)
    expected = F.conv2d(F.pad(x, (3, 4, 2, 2)), kernel, layer.bias, groups=3) + layer.D.reshape(-1, 1, 1) * x
    torch.testing.assert_close(layer(x), expected)
    assert LongConv2d(2).kernel_size == (31, 31)
    assert LongConv1d(2).kernel_size == (255,)


def test_operator_starts_decaying_from_lag_zero():
    wide = build(LongConv1d, 6, kernel_size=101, init_std=1.0)
    for causal, origin in ((False, 50), (True, 0)):
        layer = build(LongConv1d, 6, kernel_size=101, init="double_exp", init_std=1.0, causal=causal)
        envelope = (layer.kernel / wide.kernel)[:, origin:]
        assert bool((envelope.diff(dim=-1) < 0).all())
        assert torch.equal(envelope[:, 0], torch.ones(6, dtype=torch.float64))


def test_operator_merges_without_dropout():
    layer = build(LongConv1d, 3, kernel_size=9, kernel_dropout=0.5).train()
    x = noise(1, 3, 20)
    assert not torch.equal(layer(x), layer(x))
    merged = layer.merge()
    assert layer.dropout.training
    torch.testing.assert_close(merged(x), layer.eval()(x))


def test_operator_refusals():
    for options, message in (
        ({"causal": True, "padding": 0}, "padding=0"),
        ({"lam": -0.1}, "lam=-0.1"),
        ({"init": "zero"}, "init='zero'"),
    ):
        with pytest.raises(ValueError, match=message):
            LongConv1d(3, kernel_size=9, **options)
    with pytest.raises(ValueError, match="causal=True"):
        LongConv2d(3, causal=True)


@pytest.mark.parametrize("prenorm", [True, False])
def test_model(prenorm):
    torch.manual_seed(0)
    net = LongConvModel(2, 5, d_model=4, n_layers=2, prenorm=prenorm, length=32).double().eval()
    x = noise(3, 20, 2)
    z = net.encoder(x)
    for layer, norm in zip(net.conv_layers, net.norms, strict=True):
        y = layer((norm(z) if prenorm else z).transpose(1, 2)).transpose(1, 2)
        z = z + y if prenorm else norm(z + y)
    torch.testing.assert_close(net(x), net.decoder(z.mean(1)))
    with pytest.raises(ValueError, match="n_layers=0"):
        LongConvModel(2, 5, n_layers=0)
