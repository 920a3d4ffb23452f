"""Depthwise convolution: every form against PyTorch's, its gradients, and what compilers and counters see of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from torchconv.kernels import _depthwise_forms as forms
from torchconv.kernels import depthwise, depthwise_conv1d, depthwise_conv2d, depthwise_conv3d

CONV = (None, F.conv1d, F.conv2d, F.conv3d)
DEPTHWISE = (None, depthwise_conv1d, depthwise_conv2d, depthwise_conv3d)
BACKENDS = ["auto", "native", "channels_last", "fft", "matmul", "reference"]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 5e-2, torch.float16: 6e-3}


@st.composite
def problems(draw, ndim=None):
    """(ndim, x shape, weight shape, stride, padding, dilation) of a convolution with at least one output."""
    ndim = ndim or draw(st.sampled_from([1, 2, 2, 3]))
    axes = []
    for _ in range(ndim):
        size = draw(st.integers(1, (30, 12, 6)[ndim - 1]))
        dilation, padding = draw(st.integers(1, 3)), draw(st.integers(0, 7))
        most = (size + 2 * padding - 1) // dilation + 1
        kernel = draw(st.integers(1, min(most, (40, 14, 7)[ndim - 1])))
        axes.append((size, kernel, draw(st.integers(1, 3)), padding, dilation))
    size, kernel, stride, padding, dilation = zip(*axes, strict=True)
    batch, channels = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    return ndim, (batch, channels, *size), (channels, 1, *kernel), stride, padding, dilation


def tensors(x_shape, w_shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = (torch.randn(s, generator=generator, dtype=torch.float64) for s in (x_shape, w_shape, w_shape[:1]))
    return tuple(t.to(dtype).requires_grad_() for t in made)


def results(function, inputs):
    """The output and the gradients of the three inputs for one fixed gradient of the output."""
    out = function(*inputs)
    g = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).sin().reshape(out.shape).to(out.dtype)
    return (out, *torch.autograd.grad(out, inputs, g))


def assert_close(got, expected, tolerance):
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
        assert (a.double() - b.double()).abs().max().item() <= tolerance * scale if b.numel() else True


@pytest.mark.parametrize("backend", BACKENDS)
@given(problem=problems())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_equals_pytorch_with_all_gradients(backend, problem):
    ndim, x_shape, w_shape, stride, padding, dilation = problem
    inputs = tensors(x_shape, w_shape)
    got = results(lambda x, w, b: DEPTHWISE[ndim](x, w, b, stride, padding, dilation, backend=backend), inputs)
    expected = results(lambda x, w, b: CONV[ndim](x, w, b, stride, padding, dilation, x_shape[1]), inputs)
    assert_close(got, expected, 1e-9)


@given(problem=problems(), tile=st.sampled_from([16, 1 << 16]), last=st.booleans())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_forms_only_the_estimate_combines(problem, tile, last):
    """Convolutions by flipped kernels and by gradients, Fourier tiles, and blocks of channels."""
    ndim, x_shape, w_shape, stride, padding, dilation = problem
    x, w, b = tensors(x_shape, w_shape)
    if last and ndim > 1:
        x = x.detach().contiguous(memory_format=forms.channels_last_format(ndim)).requires_grad_()
    expected = results(lambda x, w, b: CONV[ndim](x, w, b, stride, padding, dilation, x_shape[1]), (x, w, b))
    signature = (x_shape, w_shape, stride, padding, dilation, "float64", last, (True, True), "fft", 1)
    plan = depthwise._plan(*signature)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forms, "_FFT_WHOLE", tile)
        patch.setattr(forms, "_FFT_BLOCK", tile)
        patch.setattr(forms, "_MATRIX_BLOCK", tile)
        for chosen in (("fft", "fft", "fft"), ("padded", "flipped", "correlate"), ("matmul", "fft", "matmul")):
            other = depthwise.Plan(plan.geo, *chosen)
            assert_close(results(lambda *a: depthwise._Depthwise.apply(*a, other), (x, w, b)), expected, 1e-9)  # noqa: B023


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
@given(problem=problems(ndim=2))
@settings(max_examples=6, deadline=None, derandomize=True)
def test_other_types(backend, dtype, problem):
    _, x_shape, w_shape, stride, padding, dilation = problem
    inputs = tensors(x_shape, w_shape, dtype)
    got = results(lambda x, w, b: depthwise_conv2d(x, w, b, stride, padding, dilation, backend=backend), inputs)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = results(lambda x, w, b: F.conv2d(x, w, b, stride, padding, dilation, x_shape[1]), exact)
    assert all(t.dtype == dtype for t in got)
    assert_close(got, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_gradcheck_twice(ndim, backend):
    x, w, b = tensors((2, 1, *((5,), (3, 3), (2, 2, 1))[ndim - 1]), (1, 1, *((3,), (2, 2), (2, 1, 2))[ndim - 1]))

    def function(x, w, b):
        return DEPTHWISE[ndim](x, w, b, 2 if ndim == 1 else 1, 1, backend=backend)

    assert torch.autograd.gradcheck(function, (x, w, b), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (x, w, b))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", [3, 4, (2, 5)])
def test_padding_by_word(kernel, backend):
    sizes = (kernel, kernel) if isinstance(kernel, int) else kernel
    x, w, b = tensors((2, 3, 9, 9), (3, 1, *sizes))
    for word in ("same", "valid"):
        got = results(lambda *a: depthwise_conv2d(*a, padding=word, dilation=2, backend=backend), (x, w, b))  # noqa: B023
        expected = results(lambda *a: F.conv2d(*a, padding=word, dilation=2, groups=3), (x, w, b))  # noqa: B023
        assert_close(got, expected, 1e-9)
    strided = depthwise_conv2d(x, w, b, stride=2, padding="same", backend=backend)
    assert_close([strided], [F.conv2d(x, w, b, padding="same", groups=3)[..., ::2, ::2]], 1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_channels_last_stays(backend):
    x, w, b = tensors((2, 4, 6, 6), (4, 1, 5, 5), torch.float32)
    expected = F.conv2d(x, w, b, padding=2, groups=4)
    got = depthwise_conv2d(x.contiguous(memory_format=torch.channels_last), w, b, padding=2, backend=backend)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert depthwise_conv2d(x, w, b, padding=2, backend=backend).is_contiguous()
    assert_close([got], [expected], 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_of_any_strides(backend):
    x, w, _ = tensors((12, 7, 2, 4), (4, 1, 3, 3))
    views = [x.permute(2, 3, 0, 1), x.permute(2, 3, 0, 1)[:, :, ::2], x[:1, :1].permute(2, 3, 0, 1).expand(2, 4, 6, 7)]
    for view in views:
        flip = w.flip(2).transpose(2, 3)
        inputs = (view, flip, None)
        expected = F.conv2d(view.contiguous(), flip.contiguous(), padding=1, groups=4)
        assert_close([depthwise_conv2d(*inputs, padding=1, backend=backend)], [expected], 1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_of_none_and_no_batch_axis(backend):
    x, w, b = tensors((0, 3, 8, 8), (3, 1, 5, 5), torch.float32)
    out, *grads = results(lambda *a: depthwise_conv2d(*a, padding=2, backend=backend), (x, w, b))
    assert out.shape == (0, 3, 8, 8)
    assert all(not g.any() for g in grads)
    x, w, b = tensors((3, 8, 8), (3, 1, 5, 5))
    got = depthwise_conv2d(x, w, b, padding=2, backend=backend)
    assert_close([got], [F.conv2d(x, w, b, padding=2, groups=3)], 1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_asked_for(backend):
    x, w, b = tensors((2, 3, 8, 8), (3, 1, 5, 5))
    for wanted in ((x,), (w,), (b,), (x, b)):
        inputs = [t if any(t is u for u in wanted) else t.detach() for t in (x, w, b)]
        got = torch.autograd.grad(depthwise_conv2d(*inputs, padding=2, backend=backend).square().sum(), wanted)
        expected = torch.autograd.grad(F.conv2d(*inputs, padding=2, groups=3).square().sum(), wanted)
        assert_close(got, expected, 1e-9)


@pytest.mark.parametrize("backend", ["auto", "fft", "matmul", "channels_last"])
def test_autocast_casts_as_the_convolution(backend):
    inputs = tensors((2, 8, 14, 14), (8, 1, 13, 13), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = results(lambda *a: depthwise_conv2d(*a, padding=6, backend=backend), inputs)
        expected = results(lambda *a: F.conv2d(*a, padding=6, groups=8), inputs)
    assert [t.dtype for t in got] == [t.dtype for t in expected]
    assert_close(got, expected, 5e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_each_time(backend):
    inputs = tensors((4, 8, 12, 12), (8, 1, 11, 11), torch.float32)
    runs = [results(lambda *a: depthwise_conv2d(*a, padding=5, backend=backend), inputs) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(8, 1, 13, 13, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        return depthwise_conv2d(x, self.weight, None, 1, 6)


def test_compilers_exporters_and_tracers_see_one_convolution():
    layer, x = Layer(), torch.randn(2, 8, 14, 14, generator=torch.Generator().manual_seed(1))
    expected = F.conv2d(x, layer.weight, padding=6, groups=8)
    exported = torch.export.export(layer, (x,))
    assert sum("conv2d" in str(node.target) for node in exported.graph.nodes) == 1
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    traced, graph = torch.jit.trace(layer, x), torch.fx.symbolic_trace(layer)
    for function in (exported.module(), compiled, traced, graph):
        assert_close([function(x)], [expected], 1e-4)
    compiled(x).sum().backward()
    assert layer.weight.grad is not None


def test_operations_are_counted_as_a_convolution():
    x, w, _ = tensors((2, 8, 14, 14), (8, 1, 13, 13), torch.float32)
    with FlopCounterMode(display=False) as counter:
        depthwise_conv2d(x, w, padding=6)
    assert counter.get_total_flops() == 2 * 2 * 8 * 14 * 14 * 13 * 13


def test_functional_transforms():
    x, w, _ = tensors((2, 3, 8, 8), (3, 1, 5, 5))

    def loss(x, w, convolve):
        return convolve(x, w).square().sum()

    def plain(x, w):
        return F.conv2d(x, w, padding=2, groups=3)

    def ours(x, w):
        return depthwise_conv2d(x, w, padding=2, backend="fft")

    x, w = x.detach(), w.detach()
    assert_close(torch.func.grad(loss, (0, 1))(x, w, ours), torch.func.grad(loss, (0, 1))(x, w, plain), 1e-9)
    batched = torch.func.vmap(ours, (0, None))(x.unsqueeze(1), w)
    assert_close([batched[:, 0]], [plain(x, w)], 1e-9)


def test_integers_are_exact():
    x, w = torch.arange(32).reshape(1, 2, 4, 4), torch.arange(18).reshape(2, 1, 3, 3)
    assert torch.equal(depthwise_conv2d(x, w), F.conv2d(x, w, groups=2))


@pytest.mark.parametrize(
    ("x", "w", "options", "message"),
    [
        ((1, 4, 8, 8), (8, 1, 3, 3), {}, "one kernel per channel"),
        ((1, 4, 8, 8), (4, 2, 3, 3), {}, "one kernel per channel"),
        ((1, 4, 8, 8), (4, 1, 11, 11), {"padding": 1}, "must not exceed the padded input"),
        ((1, 4, 8, 8), (4, 1, 3), {}, "spatial axes"),
        ((4, 8), (4, 1, 3, 3), {}, "spatial axes"),
        ((1, 4, 8, 8), (4, 1, 3, 3), {"stride": 0}, "stride"),
        ((1, 4, 8, 8), (4, 1, 3, 3), {"padding": (1, 2, 3)}, "padding"),
        ((1, 4, 8, 8), (4, 1, 3, 3), {"padding": "full"}, "padding"),
        ((1, 4, 8, 8), (4, 1, 3, 3), {"dilation": -1}, "dilation"),
        ((1, 4, 8, 8), (4, 1, 3, 3), {"backend": "fastest"}, "backend"),
    ],
)
def test_refuses(x, w, options, message):
    with pytest.raises(ValueError, match=message):
        depthwise_conv2d(torch.zeros(x), torch.zeros(w), **options)
