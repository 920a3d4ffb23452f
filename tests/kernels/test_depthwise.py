"""Depthwise convolution: every form against PyTorch's, its gradients, and what compilers and counters see of it."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from torchconv._common import write_json
from torchconv.kernels import _depthwise_forms as forms
from torchconv.kernels import _depthwise_matrix as matrix
from torchconv.kernels import _depthwise_run as run
from torchconv.kernels import _depthwise_tune as tune
from torchconv.kernels import autotune, depthwise_conv1d, depthwise_conv2d, depthwise_conv3d, inception_conv
from torchconv.kernels._depthwise_plan import Plan, geometry

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
    geo = geometry(x_shape, w_shape, stride, padding, dilation)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forms, "_FFT_WHOLE", tile)
        patch.setattr(forms, "_FFT_BLOCK", tile)
        patch.setattr(matrix, "_MATRIX_BLOCK", tile)
        patch.setattr(forms, "_SCRATCH", tile)
        patch.setattr(forms, "_IMAGES", tile)
        for chosen in (
            ("fft", "fft", "fft"),
            ("padded", "flipped", "correlate"),
            ("native", "flipped", "fft"),
            ("matmul", "fft", "matmul"),
        ):
            plan = Plan(geo, *chosen)
            assert_close(results(lambda *a: run.Depthwise.apply(*a, plan, "fft"), (x, w, b)), expected, 1e-9)  # noqa: B023


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
    def __init__(self, kernel=13, backend="auto"):
        super().__init__()
        weight = torch.randn(8, 1, kernel, kernel, generator=torch.Generator().manual_seed(0))
        self.weight, self.bias = torch.nn.Parameter(weight), torch.nn.Parameter(torch.ones(8))
        self.backend = backend

    def forward(self, x):
        return depthwise_conv2d(x, self.weight, self.bias, 1, "same", backend=self.backend)


def test_exporters_and_tracers_see_one_convolution():
    layer, x = Layer(), torch.randn(2, 8, 14, 14, generator=torch.Generator().manual_seed(1))
    expected = F.conv2d(x, layer.weight, layer.bias, padding=6, groups=8)
    for strict in (False, True):
        batch = torch.export.Dim("batch")
        exported = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},), strict=strict)
        assert [n.target for n in exported.graph.nodes if n.op == "call_function"] == [torch.ops.aten.conv2d.default]
        assert_close([exported.module()(x)], [expected], 1e-4)
    for function in (torch.jit.trace(layer, x), torch.fx.symbolic_trace(layer)):
        assert_close([function(x)], [expected], 1e-4)


def compiled(layer, **options):
    """The layer compiled whole, and the names of the operators its graphs call."""
    seen = []

    def look(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=look, bw_compiler=look)
    return torch.compile(layer, fullgraph=True, backend=backend, **options), seen


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_compilers_keep_the_fast_forms(dynamic, last):
    layer = Layer(kernel=15 if dynamic else 8)
    function, seen = compiled(layer, dynamic=dynamic)
    for size in (15, 18):
        x = torch.randn(2, 8, size, size, generator=torch.Generator().manual_seed(1))
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        x.requires_grad_()
        wanted = (x, layer.weight, layer.bias)
        out, expected = function(x), F.conv2d(x, layer.weight, layer.bias, padding="same", groups=8)
        assert out.stride() == expected.stride()
        g = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
        got, right = (torch.autograd.grad(y, wanted, g) for y in (out, expected))
        assert_close([out, *got], [expected, *right], 1e-4)
    assert "torchconv.depthwise.default" in seen
    assert "torchconv.depthwise_gradients.default" in seen
    assert not any("convolution" in name for name in seen)


def test_compilers_keep_pytorch_where_nothing_is_to_be_won():
    layer, x = Layer(kernel=3), torch.randn(2, 8, 9, 9)
    function, seen = compiled(layer)
    assert_close([function(x)], [layer(x)], 1e-5)
    assert not any("torchconv" in name for name in seen)
    function, seen = compiled(Layer(kernel=7))
    with torch.no_grad():
        function(x)
    assert not any("torchconv" in name for name in seen)
    function, seen = compiled(Layer(backend="native"))
    function(x)
    assert not any("torchconv" in name for name in seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_under_autocast(dtype):
    layer, x = Layer(), torch.randn(2, 8, 14, 14)
    function, seen = compiled(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = function(x.to(dtype)), layer(x.to(dtype))
    assert got.dtype == expected.dtype == torch.bfloat16
    assert "torchconv.depthwise.default" in seen
    assert_close([got], [expected], 5e-2)


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_operators_are_sound(ndim):
    """PyTorch's own checks: schema, shapes for compilers, gradients, tracing with fixed and symbolic sizes."""
    x, w, b = tensors((2, 2, *((9,), (5, 4), (3, 3, 4))[ndim - 1]), (2, 1, *((4,), (2, 3), (2, 1, 3))[ndim - 1]))
    sizes = [2] * ndim, [1] * ndim, [1] * ndim
    torch.library.opcheck(run.OUTPUT, (x, w, b, *sizes, "auto"))
    g = torch.ones_like(run.OUTPUT(x, w, b, *sizes, "auto")).requires_grad_()
    torch.library.opcheck(run.GRADIENTS, (g.detach().requires_grad_(), x, w, *sizes, True, True, "fft"))


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_gradients_of_the_operators(needs):
    x, w, b = tensors((1, 2, 4, 3), (2, 1, 2, 3))

    def output(x, w, b):
        return run.OUTPUT(x, w, b, [1, 2], [1, 1], [2, 1], "auto")

    def gradients(g, x, w):
        return [t for t in run.GRADIENTS(g, x, w, [1, 2], [1, 1], [2, 1], *needs, "auto") if t.numel()]

    assert torch.autograd.gradcheck(output, (x, w, b))
    g = torch.ones_like(output(x, w, b)).detach().requires_grad_()
    assert torch.autograd.gradcheck(gradients, (g, x, w))
    assert torch.autograd.gradgradcheck(gradients, (g, x, w))


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
        ((1, 4, 8, 8), (4, 1, 11, 11), {"padding": 1, "backend": "native"}, "must not exceed the padded input"),
        ((1, 4, 8, 8), (4, 1, 3, 3), {"stride": 1.5}, "stride=1.5: must be an integer"),
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


def test_bfloat16_channels_last_is_widened_for_wide_kernels(monkeypatch):
    """PyTorch's own convolution of these does not return in minutes."""
    types = []

    def convolve(x, *rest):
        types.append(x.dtype)
        return F.conv2d(x, *rest)

    monkeypatch.setattr(forms, "CONVOLVE", (None, None, convolve))
    x, w, _ = (t.detach() for t in tensors((2, 16, 14, 40), (16, 1, 3, 15), torch.bfloat16))
    y = forms.native(x.contiguous(memory_format=torch.channels_last), w, None, geometry(x.shape, w.shape, 1, (1, 7), 1))
    assert types == [torch.float32]
    assert y.dtype == torch.bfloat16
    assert_close([y], [F.conv2d(x.double(), w.double(), padding=(1, 7), groups=16)], 1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_may_be_changed_in_place(backend):
    x, w, b = tensors((2, 3, 6, 6), (3, 1, 3, 3))
    y = depthwise_conv2d(x, w, b, padding=1, backend=backend)
    expected = torch.autograd.grad(y, x, torch.full_like(y, 2.0), retain_graph=True)
    assert_close(torch.autograd.grad(y.mul_(2), x, torch.ones_like(y)), expected, 1e-12)


@pytest.mark.parametrize(
    ("shape", "weights", "biases", "message"),
    [
        ((1, 3, 4, 4), [(1, 1, 3, 3)], [(2,)], r"bias.shape=\(2,\): expected \(1,\)"),
        ((1, 3, 4, 4), [(0, 1, 3, 3)], None, r"weight.shape=\(0, 1, 3, 3\): expected \(g, 1"),
        ((1, 3, 0, 4), [(1, 1, 3, 3)], None, r"x.shape=\(1, 3, 0, 4\)"),
        ((1, 3, 4, 4), [(4, 1, 3, 3)], None, "more channels than the 3"),
    ],
)
def test_fused_layer_refuses(shape, weights, biases, message):
    given_ = None if biases is None else [torch.zeros(b) for b in biases]
    with pytest.raises(ValueError, match=message):
        inception_conv(torch.zeros(shape), [torch.zeros(w) for w in weights], given_)


@pytest.mark.parametrize("backend", ["auto", "native", "fft"])
def test_refuses_mixtures_instead_of_guessing(backend):
    x, w = torch.randn(1, 4, 20, 20), torch.randn(4, 1, 17, 17)
    with pytest.raises(ValueError, match="bias"):
        depthwise_conv2d(x, w, torch.zeros(1), padding=8, backend=backend)
    for other in ((x.double(), w, None), (x, w.half(), None), (x, w, torch.zeros(4, dtype=torch.float64))):
        with pytest.raises(RuntimeError, match="type"):
            depthwise_conv2d(*other, padding=8, backend=backend)
    for shape in ((1, 4, 0, 20), (1, 4, 0, 0)):
        with pytest.raises(ValueError, match="every spatial axis"):
            depthwise_conv2d(torch.zeros(shape), w, padding=9, backend=backend)
    with pytest.raises(ValueError, match="channels=0"):
        depthwise_conv2d(torch.zeros(1, 0, 8, 8), torch.zeros(0, 1, 3, 3), backend=backend)


def test_triton_needs_a_device():
    with pytest.raises(ValueError, match="backend"):
        depthwise_conv2d(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 3, 3), backend="triton")
    with pytest.raises(ValueError, match="backend"):
        depthwise_conv2d(torch.zeros(1, 1, 4, 4).double(), torch.zeros(1, 1, 3, 3).double(), backend="triton")


@pytest.fixture
def tuning(tmp_path):
    file = tmp_path / "cache" / "depthwise.json"
    autotune(True, file)
    yield file
    autotune(False)


def measured(patch):
    """Which forms are timed from now on."""
    seen, measure = [], tune._measure
    patch.setattr(tune, "_measure", lambda names, *a: seen.extend(names) or measure(names, *a))
    return seen


def test_autotuning_measures_once_and_remembers(tuning, monkeypatch):
    seen = measured(monkeypatch)
    inputs = tensors((2, 4, 12, 12), (4, 1, 9, 9), torch.float32)

    def ours(x, w, b):
        return depthwise_conv2d(x, w, b, padding=4)

    expected = results(lambda *a: F.conv2d(*a, padding=4, groups=4), inputs)
    assert_close(results(ours, inputs), expected, 1e-4)
    assert {name[0] for name in seen} == {"y", "x", "w"}
    ((machine, problems),) = json.loads(tuning.read_text()).items()
    assert torch.__version__ in machine
    assert set(next(iter(problems.values()))) == set(seen)
    seen.clear()
    autotune(True, tuning)  # as a new process
    assert_close(results(ours, inputs), expected, 1e-4)
    assert not seen
    with torch.no_grad():
        depthwise_conv2d(inputs[0][:1], inputs[1], padding=4)
    assert {name[0] for name in seen} == {"y"}
    assert [len(p) for p in json.loads(tuning.read_text()).values()] == [2]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[1, 2]", '{"m": 3}', '{"m": {"p": {"y:fft": "fast", "z": 1, "y:native": NaN}}}', "[" * 20000],
)
def test_autotuning_distrusts_the_file(tuning, content):
    tuning.parent.mkdir()
    tuning.write_text(content)
    x, w = torch.randn(2, 4, 12, 12), torch.randn(4, 1, 9, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = depthwise_conv2d(x, w, padding=4)
    assert_close([got], [F.conv2d(x, w, padding=4, groups=4)], 1e-4)
    assert json.loads(tuning.read_text())


def test_autotuning_takes_the_fastest_of_the_file(tuning):
    geo = geometry((2, 4, 12, 12), (4, 1, 9, 9), 1, 4, 1)
    names = ("native", "padded", "channels_last", "fft", "matmul")
    times = {f"y:{name}": 2.0 for name in names} | {"y:matmul": 1.0}
    write_json(tuning, {tune._machine(1): {tune._problem(geo, "float32", False): times}})
    assert tune.choose(geo, "float32", False, (False, False), 1) == ("matmul", "native", "native")


def test_autotuning_without_a_place_to_write(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    autotune(True, blocked / "depthwise.json")
    try:
        with pytest.warns(UserWarning, match="cannot be written|not readable"):
            depthwise_conv2d(torch.zeros(1, 2, 9, 9), torch.zeros(2, 1, 7, 7), padding=3)
    finally:
        autotune(False)


@given(problem=problems(), last=st.booleans(), dtype=st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_recording_gradients_changes_the_output_by_rounding_at_most(problem, last, dtype):
    ndim, x_shape, w_shape, stride, padding, dilation = problem
    x, w, b = tensors(x_shape, w_shape, dtype)
    if last and ndim > 1:
        x = x.detach().contiguous(memory_format=forms.channels_last_format(ndim)).requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forms, "_IMAGES", 16)
        recorded = DEPTHWISE[ndim](x, w, b, stride, padding, dilation)
        with torch.no_grad():
            torch.testing.assert_close(DEPTHWISE[ndim](x, w, b, stride, padding, dilation), recorded)
