"""Tunable layers against loops over items, their identities, merging, conversion and the multi-loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.parity.core import Case, run_case
from torchconv.models.restore.tunable import TunableEDSR
from torchconv.ops import tunable_transposed
from torchconv.ops.tunable import TunableConv1d, TunableConv2d, TunableConv3d, set_tuning, tunable_conv, tuned
from torchconv.ops.tunable_layers import TunableLinear, TunableParameter, make_tunable
from torchconv.ops.tunable_loss import multi_loss, sample_tuning
from torchconv.ops.tunable_transposed import TunableConvTranspose1d, TunableConvTranspose2d, TunableConvTranspose3d
from torchconv.surgery.merging import merge

KINDS = {1: TunableConv1d, 2: TunableConv2d, 3: TunableConv3d}
TRANSPOSED = {1: TunableConvTranspose1d, 2: TunableConvTranspose2d, 3: TunableConvTranspose3d}
CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
SPATIAL = {1: (9,), 2: (7, 6), 3: (5, 4, 6)}


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def kernel_of(layer, omega):
    a = omega if layer.mlp is None else layer.mlp.weight @ omega + layer.mlp.bias
    weight = sum(a[n] * layer.weight[0, n] for n in range(layer.num_kernels))
    bias = None if layer.bias is None else sum(a[n] * layer.bias[0, n] for n in range(layer.num_kernels))
    return weight, bias


@settings(max_examples=25, deadline=None)
@given(
    ndim=st.sampled_from([1, 2, 3]),
    groups=st.sampled_from([1, 2]),
    k=st.integers(1, 3),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    padding=st.integers(0, 2),
    expand=st.integers(1, 2),
    mode=st.sampled_from(["linear", "mlp"]),
    backend=st.sampled_from(["grouped", "basis"]),
    bias=st.booleans(),
)
def test_loop_over_items(ndim, groups, k, stride, dilation, padding, expand, mode, backend, bias):
    assume(dilation * (k - 1) < min(SPATIAL[ndim]) + 2 * padding)  # no convolution has a kernel beyond its input
    torch.manual_seed(0)
    layer = KINDS[ndim](
        4, 6, k, stride, padding, dilation, groups, bias,
        num_params=3, expand_params=expand, mode=mode, backend=backend, dtype=torch.float64,
    )  # fmt: skip
    x, omega = noise(3, 4, *SPATIAL[ndim]), noise(3, 3, seed=1)
    expected = [
        CONVOLVE[ndim](x[b : b + 1], *kernel_of(layer, omega[b]), stride, padding, dilation, groups) for b in range(3)
    ]
    torch.testing.assert_close(layer(x, omega), torch.cat(expected))
    torch.testing.assert_close(layer(x, omega[1]), torch.cat([layer(x[b : b + 1], omega[1]) for b in range(3)]))


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize(("groups", "stride", "output_padding", "dilation"), [(1, 2, 1, 1), (2, 1, 0, 2), (2, 3, 2, 1)])
def test_transposed_loop_over_items(ndim, groups, stride, output_padding, dilation):
    torch.manual_seed(0)
    layer = TRANSPOSED[ndim](
        4, 6, 3, stride, 1, output_padding, groups, dilation=dilation, num_params=3, dtype=torch.float64
    )
    x, omega = noise(2, 4, *SPATIAL[ndim]), noise(2, 3, seed=1)

    def expected(b):
        weight, bias = kernel_of(layer, omega[b])
        return TRANSPOSE[ndim](x[b : b + 1], weight, bias, stride, 1, output_padding, groups, dilation)

    torch.testing.assert_close(layer(x, omega), torch.cat([expected(0), expected(1)]))
    torch.testing.assert_close(layer.merge(omega[1])(x), layer(x, omega[1]))
    torch.testing.assert_close(layer(x, omega[:1]), layer(x, omega[0]))
    assert layer(x[:0], omega[:0]).shape == (0, *layer(x).shape[1:])


@pytest.mark.parametrize("mode", ["linear", "mlp"])
def test_corner_of_linear_mode_is_one_kernel(mode):
    layer = TunableConv2d(3, 4, 3, padding=1, num_params=3, mode="linear", dtype=torch.float64)
    x = noise(2, 3, 6, 5)
    for p in range(3):
        omega = torch.eye(3, dtype=torch.float64)[p]
        expected = F.conv2d(x, layer.weight[0, p], layer.bias[0, p], padding=1)
        torch.testing.assert_close(layer(x, omega), expected)
    first, second = noise(3, seed=3), noise(3, seed=4)
    blend = TunableConv2d(3, 4, 3, num_params=3, mode=mode, dtype=torch.float64)
    y = 0.3 * blend(x, first) + 0.7 * blend(x, second)
    torch.testing.assert_close(blend(x, 0.3 * first + 0.7 * second), y)


def test_one_parameter_is_the_plain_layer():
    layer = TunableConv2d(3, 4, 3, padding=1, num_params=1, mode="linear")
    x = torch.randn(2, 3, 6, 5)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight[0, 0], layer.bias[0, 0], padding=1))


def test_gradient_of_a_kernel_is_its_share_of_the_merged_ones():
    layer = TunableConv2d(2, 3, 3, num_params=3, mode="linear", dtype=torch.float64)
    x, omega, cotangent = noise(2, 2, 5, 5), noise(2, 3, seed=1), noise(2, 3, 5, 5, seed=2)
    (layer(x, omega) * cotangent).sum().backward()
    total = torch.zeros_like(layer.weight[0])
    for b in range(2):
        merged = kernel_of(layer, omega[b])[0].detach().requires_grad_()
        (F.conv2d(x[b : b + 1], merged, padding=1) * cotangent[b]).sum().backward()
        total += omega[b].reshape(3, 1, 1, 1, 1) * merged.grad
    torch.testing.assert_close(layer.weight.grad[0], total)


@pytest.mark.parametrize("build", ["conv", "transposed", "linear", "linear_tokens", "parameter"])
def test_gradcheck_with_tuning_of_each_item(build):
    torch.manual_seed(0)
    options = {"num_params": 2, "expand_params": 2, "dtype": torch.float64}
    module, inputs = {
        "conv": lambda: (TunableConv2d(2, 2, 2, **options), [noise(2, 2, 3, 4)]),
        "transposed": lambda: (TunableConvTranspose2d(2, 2, 2, 2, **options), [noise(2, 2, 2, 3)]),
        "linear": lambda: (TunableLinear(3, 2, **options), [noise(2, 3)]),
        "linear_tokens": lambda: (TunableLinear(3, 2, **options), [noise(2, 2, 2, 3)]),
        "parameter": lambda: (TunableParameter(torch.ones(2, 1), **options), []),
    }[build]()
    tensors = [t.requires_grad_() for t in (*inputs, noise(2, 2, seed=1))]
    assert torch.autograd.gradcheck(
        lambda *t: module(*t[: len(tensors)]), (*tensors, *module.parameters()), fast_mode=True
    )


def test_equal_rows_are_one_kernel_and_give_the_same_gradients():
    layer = TunableConv2d(3, 4, 3, num_params=2, dtype=torch.float64)
    x, row = noise(3, 3, 6, 5), torch.tensor([0.3, 0.7], dtype=torch.float64)
    assert layer.mixing(row.expand(3, 2), 3).dim() == 1
    assert layer.mixing(row.repeat(3, 1), 3).dim() == 1
    assert layer.mixing(row.repeat(3, 1).requires_grad_(), 3).dim() == 2
    grads = [
        torch.autograd.grad(layer(x, params).square().sum(), list(layer.parameters()))
        for params in (row.repeat(3, 1), row.repeat(3, 1).requires_grad_())
    ]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_linear_layer():
    layer = TunableLinear(5, 3, num_params=3, dtype=torch.float64)
    x, omega = noise(2, 4, 6, 5), noise(2, 3, seed=1)
    expected = torch.stack([F.linear(x[b], *kernel_of(layer, omega[b])) for b in range(2)])
    torch.testing.assert_close(layer(x, omega), expected)
    torch.testing.assert_close(layer(x[:, 0, 0], omega), expected[:, 0, 0])
    torch.testing.assert_close(layer.merge(omega[0])(x), layer(x, omega[0]))
    with pytest.raises(ValueError, match="x of shape"):
        layer(x[..., :4])


def test_parameter():
    start = torch.tensor([[1.0], [2.0]])
    layer = TunableParameter(start, num_params=3, mode="linear")
    assert layer.data.shape == (1, 3, 2, 1)
    torch.testing.assert_close(layer(), start)
    torch.testing.assert_close(layer(torch.eye(3)), start.expand(3, 2, 1))
    layer.data.data = torch.randn(1, 3, 2, 1)
    torch.testing.assert_close(layer(torch.eye(3)), layer.data[0])
    number = TunableParameter(2.0, mode="linear")
    torch.testing.assert_close(number(torch.tensor([[1.0, 0.0], [0.5, 1.0]])), torch.tensor([2.0, 3.0]))


@pytest.mark.parametrize(("mode", "expand"), [("linear", 1), ("mlp", 1), ("linear", 3)])
def test_parameter_count_and_names(mode, expand):
    layer = TunableConv2d(4, 6, 3, groups=2, num_params=2, expand_params=expand, mode=mode)
    slots, plain = 2 * expand, 6 * 2 * 9 + 6
    affine = mode == "mlp" or expand > 1
    assert sum(p.numel() for p in layer.parameters()) == slots * plain + affine * (2 * slots + slots)
    assert {n for n, _ in layer.named_parameters()} == {"weight", "bias"} | (
        {"mlp.weight", "mlp.bias"} if affine else set()
    )
    published = {n: torch.zeros_like(t) for n, t in layer.state_dict().items() if n != "tuning"}
    layer.set_tuning([0.9, 0.1])
    layer.load_state_dict(published)
    assert torch.equal(layer.tuning, torch.tensor([0.9, 0.1]))


@pytest.mark.parametrize("mode", ["linear", "mlp"])
def test_model_made_tunable_starts_as_the_model(mode):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding="same", dilation=2), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1, groups=2, bias=False),
        nn.ConvTranspose2d(4, 2, 2, 2), nn.Flatten(), nn.Linear(2 * 36, 5),
    ).double()  # fmt: skip
    net = make_tunable(model, 3, 2 if mode == "mlp" else 1, mode)
    x, omega = noise(2, 3, 6, 6), sample_tuning(2, 3, dtype=torch.float64)
    torch.testing.assert_close(net(x), model(x))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    with tuned(net, omega):
        y = net(x)
    for b in range(2):
        set_tuning(net, omega[b])
        torch.testing.assert_close(y[b : b + 1], net(x[b : b + 1]))
        torch.testing.assert_close(merge(net, x)(x), net.eval()(x))
    assert type(make_tunable(nn.Linear(3, 2))) is TunableLinear
    shared = nn.Linear(3, 3)
    both = make_tunable(nn.Sequential(shared, nn.Tanh(), shared))
    assert type(both[0]) is TunableLinear
    assert both[0] is both[2]
    encoder, tokens = nn.TransformerEncoderLayer(4, 1, 6, batch_first=True).eval(), torch.randn(2, 3, 4)
    with torch.no_grad():  # where PyTorch would take its fused kernel
        torch.testing.assert_close(make_tunable(encoder)(tokens), encoder(tokens), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="model="):
        make_tunable(nn.ReLU())
    with pytest.raises(ValueError, match="model="):
        set_tuning(nn.ReLU(), [1.0, 0.0])


def test_tuning_as_numbers_or_one_row():
    conv, transposed, linear = TunableConv2d(2, 3, 3), TunableConvTranspose2d(2, 3, 3), TunableLinear(5, 3)
    x = torch.randn(4, 2, 5, 5)
    for layer in (conv, transposed, linear):
        rows = torch.tensor([[0.2, 0.8], [0.5, 0.5], [1.0, 0.0], [0.3, 0.1]])
        torch.testing.assert_close(layer(x, rows.tolist()), layer(x, rows))
        torch.testing.assert_close(layer(x, [0.2, 0.8]), layer(x, rows[:1]))
        with tuned(layer, [0.2, 0.8]):
            torch.testing.assert_close(layer(x), layer(x, rows[0]))
    for backend in ("auto", "basis"):
        one = tunable_conv(x, conv.weight[0], conv.bias[0], torch.tensor([[0.2, 0.8]]), backend=backend)
        each = tunable_conv(x, conv.weight[0], conv.bias[0], torch.tensor([[0.2, 0.8]] * 4), backend=backend)
        torch.testing.assert_close(one, each)


def test_tuned_restores_and_passes_gradients():
    layer = TunableConv2d(2, 2, 3)
    omega = torch.tensor([[0.2, 0.8], [0.5, 0.5]], requires_grad=True)
    with tuned(layer, omega):
        y = layer(torch.randn(2, 2, 4, 4))
    y.sum().backward()
    assert omega.grad is not None
    assert torch.equal(layer.tuning, torch.full((2,), 0.5))


@pytest.mark.parametrize("kind", ["conv", "transposed"])
def test_exported_graph_serves_other_batches(kind):
    layer = (TunableConv2d(4, 6, 3, groups=2) if kind == "conv" else TunableConvTranspose2d(4, 6, 3, groups=2)).eval()
    batch = torch.export.Dim("batch", min=1)
    example = (torch.randn(2, 4, 5, 4), torch.rand(2, 2))
    program = torch.export.export(layer, example, dynamic_shapes=({0: batch}, {0: batch}))
    other = (torch.randn(5, 4, 5, 4), torch.rand(5, 2))
    torch.testing.assert_close(program.module()(*other), layer(*other), atol=1e-5, rtol=1e-5)
    row = torch.rand(1, 2)
    program = torch.export.export(layer, (example[0], row), dynamic_shapes=({0: batch}, None))
    torch.testing.assert_close(program.module()(other[0], row), layer(other[0], row), atol=1e-5, rtol=1e-5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*other), layer(*other), atol=1e-5, rtol=1e-5)


def test_channels_last_and_empty_batches():
    layer = TunableConv2d(4, 6, 3)
    x, omega = torch.randn(3, 4, 6, 5).contiguous(memory_format=torch.channels_last), torch.rand(3, 2)
    assert layer(x, omega).is_contiguous(memory_format=torch.channels_last)
    assert layer(x[:0], omega[:0]).shape == (0, 6, 6, 5)


@pytest.mark.parametrize(("scale", "expand"), [(1, 1), (2, 2), (3, 1), (4, 1)])
def test_edsr(scale, expand):
    torch.manual_seed(0)
    net = TunableEDSR(3, 2, 4, scale, num_params=3, expand_params=expand).double()
    x, omega = torch.rand(2, 3, 5, 6, dtype=torch.float64), sample_tuning(2, 3, dtype=torch.float64)
    y = net(x, omega)
    assert y.shape == (2, 3, 5 * scale, 6 * scale)
    merged = net.merge(omega[1])
    torch.testing.assert_close(merged(x[1:]), y[1:])
    assert not any("mlp" in n for n, _ in merged.named_parameters())
    assert merge(set_tuning(net, omega[0]))(x[:1]).allclose(y[:1])


def test_edsr_keeps_grey_images_and_refuses_scales():
    net = TunableEDSR(1, 0, 4, 1, mode="linear")
    for p in net.parameters():
        nn.init.zeros_(p)
    assert net(torch.rand(1, 1, 4, 4)).abs().max() == 0
    with pytest.raises(ValueError, match="scale=6"):
        TunableEDSR(scale=6)


def test_multi_loss():
    losses = [torch.tensor([1.0, 3.0]), torch.tensor([10.0, 30.0])]
    for p in range(2):
        assert multi_loss(losses, torch.eye(2)[p]) == losses[p].mean()
        assert multi_loss(torch.stack(losses, 1), torch.eye(2)[p].expand(2, 2)) == losses[p].mean()
    with pytest.raises(ValueError, match="losses of shape"):
        multi_loss([torch.tensor(1.0), torch.tensor(2.0)], torch.ones(2))
    with pytest.raises(ValueError, match="losses of shape"):
        multi_loss(losses, torch.ones(2, 3))
    assert multi_loss(losses, torch.eye(2)[1:]) == losses[1].mean()
    with pytest.raises(ValueError, match="losses of shapes"):
        multi_loss([torch.ones(3), torch.ones(2)], torch.ones(2))


@pytest.mark.parametrize("p", [1, 2, 3])
def test_samplers(p):
    draw = {s: sample_tuning(4000, p, s, torch.Generator().manual_seed(0)) for s in ("simplex", "uniform", "corners")}
    for values in draw.values():
        assert values.shape == (4000, p)
        assert values.min() >= 0
        assert values.max() <= 1
    torch.testing.assert_close(draw["simplex"].sum(1), torch.ones(4000))
    torch.testing.assert_close(draw["simplex"].mean(0), torch.full((p,), 1 / p), atol=0.02, rtol=0)
    # Dirichlet(1): variance (p − 1) / (p² (p + 1)).
    torch.testing.assert_close(draw["simplex"].var(0), torch.full((p,), (p - 1) / (p**2 * (p + 1))), atol=0.01, rtol=0)
    assert torch.equal(draw["corners"].sum(1), torch.ones(4000))
    assert set(draw["corners"].unique().tolist()) <= {0.0, 1.0}
    torch.testing.assert_close(draw["uniform"].mean(0), torch.full((p,), 0.5), atol=0.03, rtol=0)
    with pytest.raises(ValueError, match="sampler="):
        sample_tuning(2, 2, "normal")


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("num_params", {"num_params": 0}),
        ("expand_params", {"expand_params": 0}),
        ("mode", {"mode": "mpl"}),
        ("backend", {"backend": "fast"}),
    ],
)
def test_bad_options_are_named(argument, options):
    with pytest.raises(ValueError, match=argument):
        TunableConv2d(4, 4, 3, **options)


def test_refusals():
    layer, x = TunableConv2d(4, 4, 3), torch.zeros(3, 4, 5, 5)
    for shape in ((3,), (2, 2), (3, 3), (3, 2, 1)):
        with pytest.raises(ValueError, match="params of shape"):
            layer(x, torch.zeros(shape))
    with pytest.raises(ValueError, match="params of shape"):
        layer.merge(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="params of shape"):
        layer.set_tuning([1.0])
    with pytest.raises(ValueError, match="padding_mode"):
        TunableConv2d.from_conv(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"))
    with pytest.raises(ValueError, match="conv=Linear"):
        TunableConv2d.from_conv(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="conv=Conv2d"):
        TunableConvTranspose2d.from_conv(nn.Conv2d(2, 2, 3))
    with pytest.raises(ValueError, match="conv=ConvTranspose1d"):
        TunableConvTranspose2d.from_conv(nn.ConvTranspose1d(2, 2, 3))
    with pytest.raises(ValueError, match="linear=Conv1d"):
        TunableLinear.from_linear(nn.Conv1d(2, 2, 1))
    for mixing in (torch.ones(2, 2), torch.ones(3), torch.ones(3, 2, 1)):
        with pytest.raises(ValueError, match="mixing of shape"):
            tunable_conv(x, torch.zeros(2, 4, 4, 1, 1), None, mixing)
    with pytest.raises(ValueError, match="output_padding"):
        tunable_transposed.TunableConvTranspose2d(2, 2, 3, 2, output_padding=2)
    with pytest.raises(ValueError, match="backend="):
        tunable_conv(x, torch.zeros(1, 1, 4, 1, 1), None, torch.ones(1), backend="fast")


@pytest.mark.parametrize(("mode", "bias"), [("mlp", True), ("linear", False)])
def test_parity_takes_null_for_a_default_and_absent_options_from_the_state(mode, bias):
    config = {"class": "TunableDense", "in_channels": 2, "out_channels": 1, "expand_params": None, "mode": None}
    layer = TunableLinear(2, 1, bias, mode=mode)
    x, omega = torch.randn(3, 4, 2), torch.rand(3, 2)
    state = {n: t.detach() for n, t in layer.state_dict().items() if n != "tuning"}
    inputs, outputs = {"x": x, "params": omega}, {"y": layer(x, omega).detach()}
    case = Case("tunable", "null", config, "", "eval", "", None, None, state, inputs, outputs, {})
    assert all(t.passed for t in run_case(case))
