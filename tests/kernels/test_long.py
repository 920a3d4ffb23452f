"""Long convolution: every form against the definition, its gradients of both orders, and what compilers see of it."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import signal

from torchconv.kernels import _long_forms as forms
from torchconv.kernels import long, long_conv, long_conv_spectrum
from torchconv.kernels._long_monarch import (
    block_dft,
    first_pass,
    inverse_block_dft,
    last_pass,
    three_pass_conv,
)

WAYS = [
    *({"backend": b} for b in ("auto", "native", "fft", "monarch", "reference")),
    *({"chunk": c} for c in (1, 3, 8)),
]
IDS = [str(*way.values()) for way in WAYS]


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def toeplitz(x, kernel, origin):
    """The definition, one matrix of taps for each pair of positions."""
    length, taps = x.shape[2], kernel.shape[-1]
    tap = torch.arange(length)[:, None] + origin - torch.arange(length)[None]
    inside = (tap >= 0) & (tap < taps)
    matrix = torch.where(inside, kernel[..., tap.clamp(0, taps - 1)], 0)
    return torch.einsum("...cts,bcs->b...ct", matrix, x)


@st.composite
def problems(draw):
    """(batch, many, channels, length, taps, origin), many 0 for one kernel without its axis."""
    length, taps = draw(st.integers(1, 24)), draw(st.integers(1, 60))
    many = draw(st.integers(0, 3))
    return draw(st.integers(1, 3)), many, draw(st.integers(1, 3)), length, taps, draw(st.integers(0, taps - 1))


@pytest.mark.parametrize("way", WAYS, ids=IDS)
@given(problem=problems(), with_skip=st.booleans())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_equals_the_definition_with_all_gradients(way, problem, with_skip):
    batch, many, channels, length, taps, origin = problem
    rows = (many, channels) if many else (channels,)
    x = noise(batch, channels, length).requires_grad_()
    kernel, skip = (noise(*rows, *n, seed=s).requires_grad_() for n, s in (((taps,), 1), ((), 2)))
    inputs = (x, kernel, skip) if with_skip else (x, kernel)
    y = long_conv(x, kernel, False, origin, skip if with_skip else None, **way)
    expected = toeplitz(x, kernel, origin)
    if with_skip:
        expected = expected + skip[..., None] * (x[:, None] if many else x)
    g = noise(*expected.shape, seed=3)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-9)
    ours, theirs = (torch.autograd.grad(t, inputs, g) for t in (y, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("taps", [1, 6, 7, 40])
def test_is_scipys_convolution(causal, taps):
    x, kernel = noise(1, 1, 20), noise(1, taps, seed=1)
    full = signal.convolve(x[0, 0], kernel[0])
    begin = 0 if causal else (taps - 1) // 2
    np.testing.assert_allclose(long_conv(x, kernel, causal)[0, 0], full[begin : begin + 20], atol=1e-12)


def test_long_sequence_in_blocks_and_whole():
    x, kernel = noise(1, 1, 65536), noise(1, 65536, seed=1)
    expected = torch.from_numpy(signal.fftconvolve(x[0, 0], kernel[0])[:65536])
    scale = float(expected.abs().max())
    for way in ({}, {"chunk": 8192}):
        assert float((long_conv(x, kernel, **way)[0, 0] - expected).abs().max()) < 1e-10 * scale
    assert float((three_pass_conv(x, kernel, 256, 512)[0, 0] - expected).abs().max()) < 1e-10 * scale


def test_blocks_of_channels_images_and_frames(monkeypatch):
    x, kernel = noise(3, 4, 50).requires_grad_(), noise(2, 4, 30, seed=1).requires_grad_()
    expected = toeplitz(x, kernel, 4)
    grads = torch.autograd.grad(expected, (x, kernel), torch.ones_like(expected))
    for block in (1, 100, 300, 3000):
        monkeypatch.setitem(forms._BLOCK, "cpu", block)
        for chunk in (None, 4, 20):
            y = long_conv(x, kernel, False, 4, chunk=chunk)
            torch.testing.assert_close(y, expected)
            for a, b in zip(torch.autograd.grad(y, (x, kernel), torch.ones_like(y)), grads, strict=True):
                torch.testing.assert_close(a, b)


def test_when_blocks_are_taken():
    assert forms.block_length(1 << 20, 100, 0) == 1 << 12
    assert forms.block_length(1 << 20, 1 << 20, 0) == 0
    assert forms.block_length(1 << 25, 1 << 25, 0) == 1 << 22
    assert forms.block_length(100, 100, 100) == 0
    assert 100 <= forms.block_length(1000, 1000, 100) <= 110


@given(st.integers(1, 100_000))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_fast_length(n):
    found = forms.fast_length(n)
    assert found >= n
    assert found % 2 == 0
    assert found <= max(2, 1.15 * n + 2)
    for p in (2, 3, 5, 7):
        while found % p == 0:
            found //= p
    assert found == 1
    assert [forms.fast_length(m) for m in (1, 2, 3, 11, 1567, 2041)] == [2, 2, 4, 12, 1568, 2048]


@pytest.mark.parametrize("chunk", [None, 3])
def test_gradients_of_gradients(chunk):
    inputs = [noise(*s, seed=i).requires_grad_() for i, s in enumerate([(2, 2, 6), (2, 2, 5), (2, 2)])]

    def run(x, kernel, skip):
        return long_conv(x, kernel, False, 2, skip, backend="fft", chunk=chunk)

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_only_what_is_asked_for(needed):
    x, kernel = (noise(2, 3, 30, seed=s)[: 2 - s] for s in (0, 1))
    x, kernel = x.requires_grad_(needed[0]), kernel[0].detach().requires_grad_(needed[1])
    long_conv(x, kernel, backend="fft").sum().backward()
    assert (x.grad is not None, kernel.grad is not None) == needed


def test_keeps_nothing_but_its_inputs():
    x, kernel = noise(2, 3, 64).requires_grad_(), noise(3, 64, seed=1).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        long_conv(x, kernel, backend="fft")
    assert sum(t.numel() for t in kept) == x.numel() + kernel.numel()


def test_spectrum_made_beforehand():
    x, kernel, skip = noise(2, 3, 20), noise(2, 3, 50, seed=1), noise(2, 3, seed=2)
    spectrum = long_conv_spectrum(kernel, 20, False, 30, skip)
    expected = long_conv(x, kernel, False, 30, skip)
    torch.testing.assert_close(long_conv(x, kernel, False, 30, skip, spectrum=spectrum), expected)
    other = spectrum._replace(values=2 * spectrum.values)
    doubled = long_conv(x, kernel, False, 30, skip, spectrum=other)
    torch.testing.assert_close(doubled, 2 * expected)  # it was taken
    x.requires_grad_()
    (grad,) = torch.autograd.grad(long_conv(x, kernel, False, 30, skip, spectrum=other).sum(), x)
    (right,) = torch.autograd.grad(long_conv(x, kernel, False, 30, skip).sum(), x)
    torch.testing.assert_close(grad, right)  # it was not
    for change in (
        {"x": x[..., :19]},
        {"origin": 29},
        {"kernel": kernel[..., 1:]},
        {"kernel": kernel[:1], "skip": None},
    ):
        with pytest.raises(ValueError, match="spectrum="):
            long_conv(**{"x": x, "kernel": kernel, "causal": False, "origin": 30, **change}, spectrum=spectrum)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    x, kernel = noise(2, 3, 200, dtype=dtype), noise(3, 200, seed=1, dtype=dtype)
    expected = long_conv(x.float(), kernel.float())
    for way in WAYS[:-3]:
        y = long_conv(x, kernel, **way)
        assert y.dtype == dtype
        torch.testing.assert_close(y, expected.to(dtype), rtol=1e-2, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(long_conv(x.float(), kernel.float(), backend="monarch"), expected, atol=1e-3, rtol=0)
    mixed = long_conv(x, kernel.double())
    assert mixed.dtype == dtype


def test_strides_of_the_input_do_not_matter():
    x, kernel = noise(4, 30, 6).permute(0, 2, 1)[:, ::2], noise(60, 3, seed=1).T[:, ::2]
    torch.testing.assert_close(long_conv(x, kernel), toeplitz(x, kernel, 0))
    shared = kernel[:1].expand(3, -1)
    torch.testing.assert_close(long_conv(x, shared, backend="fft"), toeplitz(x, shared, 0))


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5)])
def test_empty(shape):
    x = torch.zeros(shape, requires_grad=True)
    kernel = torch.ones(shape[1], 40, requires_grad=True)
    y = long_conv(x, kernel)
    assert y.shape == shape
    y.sum().backward()
    assert kernel.grad.abs().sum() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": torch.zeros(3, 0)}, "kernel of shape"),
        ({"kernel": torch.zeros(2, 4)}, "kernel of shape"),
        ({"kernel": torch.zeros(4)}, "kernel of shape"),
        ({"kernel": torch.zeros(3, 4, dtype=torch.int64)}, "kernel.dtype"),
        ({"kernel": torch.zeros(3, 4, device="meta")}, "kernel.device"),
        ({"x": torch.zeros(2, 3, 4, dtype=torch.int32)}, "x.dtype"),
        ({"x": torch.zeros(2, 3, 4, dtype=torch.complex64)}, "x.dtype"),
        ({"x": torch.zeros(3, 4)}, "x of shape"),
        ({"x": torch.zeros(1, 3, 0)}, "x of shape"),
        ({"skip": torch.zeros(1, 3)}, "skip of shape"),
        ({"origin": 1}, "origin=1"),
        ({"origin": 4, "causal": False}, "origin=4"),
        ({"origin": -1, "causal": False}, "origin=-1"),
        ({"chunk": 0}, "chunk=0"),
        ({"backend": "cuda"}, "backend='cuda'"),
    ],
)
def test_refusals(change, message):
    options = {"x": torch.zeros(2, 3, 4), "kernel": torch.zeros(3, 4), **change}
    with pytest.raises(ValueError, match=message):
        long_conv(**options)


def test_compile_export_and_transforms():
    x, kernel = noise(2, 3, 40).requires_grad_(), noise(3, 40, seed=1).requires_grad_()

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = torch.nn.Parameter(kernel.detach().clone())

        def forward(self, x):
            return long_conv(x, self.kernel)

    layer = Layer()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch, length in ((2, 40), (3, 33)):
        part = noise(batch, 3, length)
        torch.testing.assert_close(compiled(part), layer(part))
    compiled(x).square().sum().backward()
    (expected,) = torch.autograd.grad(layer(x).square().sum(), layer.kernel)
    torch.testing.assert_close(layer.kernel.grad, expected)
    program = torch.export.export(layer, (noise(2, 3, 40),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert not any("torchconv" in str(n.target) for n in program.graph.nodes)
    torch.testing.assert_close(program.module()(noise(5, 3, 40)), layer(noise(5, 3, 40)))
    one = torch.func.vmap(lambda k: long_conv(x, k))(torch.stack([kernel, 2 * kernel]))
    torch.testing.assert_close(one[1], 2 * one[0])
    _, tangent = torch.func.jvp(lambda k: long_conv(x, k), (kernel.detach(),), (torch.ones_like(kernel),))
    torch.testing.assert_close(tangent, long_conv(x, torch.ones_like(kernel)))


@pytest.mark.parametrize("operator", [long.OUTPUT, long.GRADIENTS])
def test_operators_keep_the_rules_of_the_dispatcher(operator):
    x, kernel = noise(2, 3, 10).requires_grad_(), noise(2, 3, 8, seed=1).requires_grad_()
    g = noise(2, 2, 3, 10)
    args = (x, kernel, 2, 0, "fft", None) if operator is long.OUTPUT else (g, x, kernel, 2, 0, True, True)
    torch.library.opcheck(operator, args)


@pytest.mark.parametrize(("size", "radix"), [(1, 16), (2, 16), (16, 16), (64, 16), (1024, 16), (64, 2), (4096, 8)])
def test_block_transform_is_the_fourier_transform(size, radix):
    x = torch.complex(noise(2, 3, size), noise(2, 3, size, seed=1))
    expected = torch.fft.fft(x)
    scale = float(expected.abs().max())
    assert float((block_dft(x, size, radix=radix) - expected).abs().max()) < 1e-12 * scale
    assert float((inverse_block_dft(expected, size, radix=radix) - x).abs().max()) < 1e-12 * scale
    single = block_dft(x.to(torch.complex64), size, radix=radix)
    assert float((single - expected).abs().max()) < 1e-5 * scale


@pytest.mark.parametrize(("size", "kept"), [(64, 40), (64, 100)])
def test_block_transform_pads_and_cuts(size, kept):
    x = noise(2, 3, kept)
    torch.testing.assert_close(block_dft(x, size), torch.fft.fft(x, size))
    for argument in ("size", "radix"):
        with pytest.raises(ValueError, match=f"{argument}=12"):
            block_dft(x, **{"size": 16, "radix": 4, argument: 12})


def test_passes():
    x, rows, columns = noise(2, 3, 100), 8, 16
    outer = first_pass(x, rows, columns)
    whole = torch.fft.fft(x, rows * columns)
    order = torch.arange(rows)[:, None] + rows * torch.arange(columns)[None]
    torch.testing.assert_close(torch.fft.fft(outer), whole[..., order])
    torch.testing.assert_close(last_pass(outer).real, F.pad(x, (0, 28)))
    with pytest.raises(ValueError, match="rows=2"):
        three_pass_conv(x, x, 2, 8)


TRITON = """
import torch
from torchconv.kernels import long_conv
from torchconv.kernels import _long_triton
generator = torch.Generator().manual_seed(0)
for batch, many, taps, length, origin, dtype in [
    (3, 2, 100, 100, 0, torch.float32), (2, 1, 7, 300, 3, torch.float32), (1, 1, 50, 60, 49, torch.bfloat16),
]:
    x = torch.randn(batch, 2, length, generator=generator).to(dtype)[..., ::1].requires_grad_()
    kernel = torch.randn(many, 2, taps, generator=generator).requires_grad_()
    y = long_conv(x, kernel, origin == 0, origin, backend="triton")
    expected = long_conv(x, kernel, origin == 0, origin, backend="fft")
    scale = expected.float().abs().max()
    assert y.dtype == dtype
    assert (y.float() - expected.float()).abs().max() <= scale * (1e-5 if dtype == torch.float32 else 1e-2)
    grads = [torch.autograd.grad(t.float().square().sum(), (x, kernel)) for t in (y, expected)]
    for a, b in zip(*grads):
        assert (a.float() - b.float()).abs().max() <= 0.02 * b.float().abs().max()
assert _long_triton.refusal(torch.zeros(1, 2, 250), torch.zeros(1, 2, 250), 0) == ""
print("agreed")
"""


def test_triton_in_the_interpreter():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:torchconv", "-c", TRITON],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.stdout.strip() == "agreed", done.stderr


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
def test_triton_compiles_where_all_sizes_are_one(tmp_path, monkeypatch):
    """Triton makes Python integers of arguments that are 1, which have no methods."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from torchconv.kernels import _long_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tensors = {"x": "*bf16", "y": "*bf16", **dict.fromkeys(("spectrum", "first", "second", "twiddle"), "*fp32")}
    constants = dict.fromkeys(("B", "C", "L", "M", "origin"), 1) | {"N1": 16, "N2": 16, "PRECISION": "tf32"}
    names = [p.name for p in _long_triton._monarch_kernel.params]
    signature = {n: tensors.get(n, "constexpr") for n in names}
    source = ASTSource(_long_triton._monarch_kernel, signature, constants)
    binary = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": 4})
    assert 0 < binary.metadata.shared <= 48 << 10


def test_triton_refuses_transforms_that_leave_the_registers():
    triton = pytest.importorskip("torchconv.kernels._long_triton")
    for dtype, longest in ((torch.float32, 256), (torch.bfloat16, 1024)):
        fits, beyond = (torch.zeros(1, 2, n, dtype=dtype) for n in (longest, longest + 1))
        assert "longer" not in triton.refusal(fits, fits, 0)
        assert f"longer than {2 * longest}" in triton.refusal(beyond, beyond, 0)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter runs it")
def test_triton_falls_back_once_and_says_so():
    triton = pytest.importorskip("torchconv.kernels._long_triton")
    triton.tell.cache_clear()
    x, kernel = noise(1, 2, 30, dtype=torch.float32), noise(2, 30, seed=1, dtype=torch.float32)
    with pytest.warns(UserWarning, match="backend='triton'"):
        y = long_conv(x, kernel, backend="triton")
    torch.testing.assert_close(y, long_conv(x, kernel, backend="fft"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        long_conv(x, kernel, backend="triton")
