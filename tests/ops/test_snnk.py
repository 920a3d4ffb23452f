"""SNNK: estimates against closed forms, bundling, closed-form training, adapters, the convolution."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.parity.core import Case, run_case
from tests.parity.snnk import _formula
from torchconv.ops._snnk_features import (
    ReLUFeatures,
    URFeatures,
    arccos_kernel,
    exp_features,
    gaussian_rows,
    relu_features,
    wave_features,
)
from torchconv.ops.snnk import SNNKLinear, bundle, convert_official, fit_closed_form, to_snnk
from torchconv.ops.snnk_adapter import SNNKAdapter
from torchconv.ops.snnk_conv import SNNKConv1d, SNNKConv2d, SNNKConv3d


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def noise(*shape, scale=1.0):
    return scale * torch.randn(*shape, dtype=torch.float64)


def wide(module):
    return module.double()


@pytest.mark.parametrize("order", [0, 1, 2])
def test_relu_features_estimate_half_the_arc_cosine_kernel(order):
    x, w = noise(4, 5), noise(3, 5)
    exact = arccos_kernel(x, w, order)
    errors = []
    for m in (1_000, 100_000):
        rows = gaussian_rows(m, 5, dtype=torch.float64)
        estimate = relu_features(x, rows, order=order) @ relu_features(w, rows, order=order).T
        errors.append(float((estimate - exact).abs().max() / exact.abs().max()))
    assert errors[1] < 0.05
    assert errors[1] < errors[0]


def test_arc_cosine_kernel_by_quadrature_and_at_the_ends():
    x = noise(2)
    angles = torch.arange(200_000, dtype=torch.float64) * (2 * math.pi / 200_000)
    circle = torch.stack([angles.cos(), angles.sin()], 1)
    w = noise(3, 2)
    for order, moment in enumerate((1.0, 2.0, 8.0)):  # E r^(2·order) of a Gaussian in the plane
        rect = [(circle @ v.T).clamp(min=0) ** order * (circle @ v.T > 0) for v in (x[None], w)]
        expected = moment * (rect[0] * rect[1]).mean(0)
        torch.testing.assert_close(arccos_kernel(x, w, order), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(arccos_kernel(x, x[None]), x.square().sum()[None] / 2)
    assert arccos_kernel(x, -x[None]).abs().max() < 1e-6
    assert torch.equal(arccos_kernel(torch.zeros(1, 2), torch.ones(1, 2)), torch.zeros(1, 1))


@pytest.mark.parametrize(
    ("f", "function"),
    [("cos", torch.cos), ("sin", torch.sin), ("exp", torch.exp), ("gaussian", lambda z: torch.exp(-z.square() / 2))],
)
@pytest.mark.parametrize("variance", [0.0, 0.1, -0.02])
def test_universal_features_are_unbiased(f, function, variance):
    x, w, b = noise(3, 3, scale=0.4), noise(2, 3, scale=0.4), noise(2)
    exact = function(x @ w.T + b)
    errors = []
    for m in (1_000, 200_000):
        features = URFeatures(3, m, f, variance=variance, dtype=torch.float64)
        errors.append(float((features(x) @ features.weight_features(w, b).T - exact).abs().max()))
    assert errors[1] < 0.02
    assert errors[1] < errors[0]


def test_spectrum_of_ones_own():
    # sin(z)/z = ½ ∫ e^{itz} dt over [−1, 1]: t uniform, τ/p = 1.
    m = 200_000
    t = 2 * torch.rand(m, dtype=torch.float64) - 1
    features = URFeatures(3, m, frequency=t, coefficient=torch.ones(m), dtype=torch.float64)
    x, w, b = noise(3, 3, scale=0.4), noise(2, 3, scale=0.4), 3 * noise(2)
    z = x @ w.T + b
    exact = z.sin() / z
    assert (features(x) @ features.weight_features(w, b).T - exact).abs().max() < 0.03


@pytest.mark.parametrize("sign", [1, -1])
def test_real_form_is_the_complex_sum_over_both_signs(sign):
    rows, x, w, b = noise(50, 4), noise(5, 4), noise(3, 4), noise(3)
    phi = exp_features(x, rows, variance=0.15).to(torch.complex128)
    halves = []
    for s in (1, -1):
        psi = exp_features(w, rows, torch.full((50,), 1j * s, dtype=torch.complex128), variance=0.15)
        halves.append(torch.exp(1j * s * b) * (phi @ psi.T))
    total = (halves[0] + halves[1]) / 2 if sign == 1 else (halves[0] - halves[1]) / 2j
    assert total.imag.abs().max() < 1e-9
    phase = 0.0 if sign == 1 else -math.pi / 2
    real = exp_features(x, rows, variance=0.15) @ wave_features(w, b, rows, phase=phase, variance=0.15).T
    torch.testing.assert_close(real, total.real)


def test_orthogonal_rows():
    rows = gaussian_rows(11, 4, orthogonal=True, dtype=torch.float64)
    for block in (rows[:4], rows[4:8], rows[8:]):
        gram = block @ block.T
        assert (gram - gram.diagonal().diag()).abs().max() < 1e-12
    x, w = noise(1, 8), noise(1, 8)
    spread = []
    for orthogonal in (False, True):
        draws = [gaussian_rows(16, 8, orthogonal, dtype=torch.float64) for _ in range(2000)]
        spread.append(torch.stack([relu_features(x, g) @ relu_features(w, g).T for g in draws]).var())
    assert spread[1] < 0.9 * spread[0]
    assert gaussian_rows(3, 4, True, dtype=torch.float16).dtype == torch.float16


@pytest.mark.parametrize("bias", [False, True])
def test_layer_is_features_of_the_linear_layer(bias):
    linear = nn.Linear(6, 5, bias)
    layer = SNNKLinear.from_linear(linear, 2_000)
    x = torch.randn(2, 3, 6)
    torch.testing.assert_close(layer(x), layer.features(x) @ layer.weights.T)
    one = (torch.ones(2, 3, 1),) if bias else ()
    column = (linear.bias[:, None],) if bias else ()
    exact = arccos_kernel(torch.cat((x, *one), -1), torch.cat((linear.weight, *column), -1))
    assert (layer(x) - exact).abs().max() < 0.15 * exact.abs().max()
    assert [tuple(p.shape) for p in layer.parameters()] == [(5, 2_000)]


def test_layer_estimates_cosine_layers():
    linear = wide(nn.Linear(4, 6))
    layer = SNNKLinear.from_linear(linear, URFeatures(4, 100_000, "cos", dtype=torch.float64))
    x = noise(3, 4, scale=0.3)
    assert (layer(x) - linear(x).cos()).abs().max() < 0.02


def test_homogeneity_floor_and_normalisation():
    layer = wide(SNNKLinear(6, 5, 16))
    x = noise(4, 6)
    torch.testing.assert_close(layer(3 * x), 3 * layer(x))
    floored = wide(SNNKLinear(6, 5, ReLUFeatures(6, 16, floor=-0.5)))
    assert not torch.allclose(floored(3 * x), 3 * floored(x))
    assert floored.features(x).min() >= -0.5 / 4
    on_sphere = wide(SNNKLinear(6, 5, ReLUFeatures(6, 16, normalize=1.5)))
    torch.testing.assert_close(on_sphere(3 * x), on_sphere(x))
    expected = relu_features(1.5 * F.normalize(x, dim=1), on_sphere.features.projection_matrix)
    torch.testing.assert_close(on_sphere.features(x), expected)


def test_bundling_is_exact():
    stack = nn.Sequential(
        SNNKLinear(6, 40, 8, bias=True),
        nn.Dropout(0.5),
        nn.Sequential(SNNKLinear(40, 30, 10, bias=True), nn.Linear(30, 20)),
        SNNKLinear(20, 7, ReLUFeatures(20, 9, order=2)),
        nn.Linear(7, 5),
        nn.Linear(5, 3),
    ).eval()
    bundled = bundle(stack)
    x = torch.randn(2, 11, 6)
    torch.testing.assert_close(bundled(x), stack(x), rtol=1e-5, atol=1e-6)
    assert [tuple(p.shape) for p in bundled.parameters()] == [(10, 8), (10,), (9, 10), (9,), (3, 9), (3,)]
    state = {n: t.clone() for n, t in stack.state_dict().items()}
    bundled(x).sum().backward()
    assert all(torch.equal(t, state[n]) for n, t in stack.state_dict().items())
    first = nn.Sequential(nn.Linear(6, 5), SNNKLinear(5, 4, 8))
    torch.testing.assert_close(bundle(first)(x), first(x))
    waves = nn.Sequential(SNNKLinear(6, 5, URFeatures(6, 8, "sin")), SNNKLinear(5, 4, 3))
    torch.testing.assert_close(bundle(waves)(x), waves(x))


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 4), st.integers(1, 5), st.integers(0, 3))
def test_bundling_any_widths(d, width, m1, m2, batch):
    stack = wide(nn.Sequential(SNNKLinear(d, width, m1, bias=True), SNNKLinear(width, 3, m2), nn.Linear(3, 2)))
    x = noise(batch, d)
    torch.testing.assert_close(bundle(stack)(x), stack(x))


def test_what_cannot_be_bundled():
    for inner in (URFeatures(5, 8), ReLUFeatures(5, 8, normalize=1.0)):
        with pytest.raises(ValueError, match="norm of its input"):
            bundle(nn.Sequential(SNNKLinear(6, 5, 8), SNNKLinear(5, 4, inner)))
    with pytest.raises(ValueError, match="GELU"):
        bundle(nn.Sequential(SNNKLinear(6, 5, 8), nn.GELU()))


def test_closed_form_is_the_optimum():
    x, y = noise(60, 4), noise(60, 3)
    phi = relu_features(x, gaussian_rows(12, 4, dtype=torch.float64))
    for ridge in (0.0, 0.3):
        w = fit_closed_form(phi, y, ridge).requires_grad_()
        ((phi @ w.T - y).square().sum() + ridge * w.square().sum()).backward()
        assert w.grad.abs().max() < 1e-9
    descended = torch.zeros(3, 12, dtype=torch.float64)
    step = 1 / (torch.linalg.matrix_norm(phi, 2) ** 2 + 0.3)
    for _ in range(3000):
        descended -= step * ((descended @ phi.T - y.T) @ phi + 0.3 * descended)
    torch.testing.assert_close(descended, fit_closed_form(phi, y, 0.3), rtol=1e-5, atol=1e-7)
    few = fit_closed_form(phi[:5], y[:5])
    torch.testing.assert_close(phi[:5] @ few.T, y[:5])
    with pytest.raises(ValueError, match=r"ridge=-1"):
        fit_closed_form(phi, y, -1)


def test_conversion_of_a_stack():
    mlp = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4))
    mlp.eval()
    x = torch.randn(600, 8)
    errors = []
    for m in (8, 32, 256):
        layers = to_snnk(mlp, m, inputs=x, bundled=False)
        small = bundle(layers)
        torch.testing.assert_close(small(x), layers(x), rtol=1e-4, atol=1e-5)
        errors.append(float((small(x) - mlp(x)).detach().square().mean() / mlp(x).detach().var()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.1
    assert [tuple(p.shape) for p in small.parameters()] == [(256, 256), (256,), (4, 256), (4,)]
    plain = to_snnk(mlp, 8, bundled=False)
    assert [type(m) for m in plain] == [SNNKLinear, SNNKLinear, nn.Linear]
    assert plain[2].weight is not mlp[5].weight
    waves = to_snnk(mlp, 16, features=lambda d, m, bias: URFeatures(d, m, "sin"), bundled=False)
    assert isinstance(waves[0].features, URFeatures)
    with pytest.raises(ValueError, match="BatchNorm1d"):
        to_snnk(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), 8)
    with pytest.raises(ValueError, match="targets=None"):
        SNNKLinear.from_linear(nn.Linear(3, 2), 4, inputs=torch.zeros(1, 3))
    with pytest.raises(ValueError, match="inputs=None"):
        SNNKLinear.from_linear(nn.Linear(3, 2), 4, targets=torch.zeros(1, 2))


def test_layers_take_the_type_and_the_mode_of_what_they_stand_for():
    mlp = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double().eval()
    x = noise(20, 3)
    small = to_snnk(mlp, 8, inputs=x, features=lambda d, m, bias: URFeatures(d, m, "sin"))
    assert small(x).dtype == torch.float64
    assert not SNNKLinear.from_linear(mlp[0]).training
    assert not SNNKConv2d.from_conv(nn.Conv2d(2, 2, 1).eval()).training
    assert SNNKLinear(3, 2, ReLUFeatures(3, 4, dtype=torch.float64))(x).dtype == torch.float64


def test_variance_of_many_inputs_stays_in_range():
    rows = gaussian_rows(8, 768)
    vectors = torch.randn(3, 768) / 28
    for build in (exp_features, lambda w, g, variance: wave_features(w, None, g, variance=variance)):
        found = build(vectors, rows, variance=0.2)
        expected = build(vectors.double(), rows.double(), variance=0.2)
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_features_are_kept_once_for_the_gradient():
    layer, x = SNNKConv2d(4, 4, num_features=16), torch.randn(1, 4, 8, 8, requires_grad=True)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        layer(x).sum()
    assert sum(t.shape[1:] == (16, 8, 8) for t in kept.values()) == 1


def test_parity_of_formulas_and_of_a_norm_listed_twice():
    xi = torch.tensor([0.25, 0.5])
    for formula, value in (
        ("np.cos(2*np.pi*xi)", (2 * math.pi * xi).cos()),
        ("+xi^2", xi**2),
        ("-cosh(xi)", -xi.cosh()),
    ):
        torch.testing.assert_close(_formula(formula, xi), value)
    with pytest.raises(ValueError, match="cannot evaluate"):
        _formula("__import__('os')", xi)
    adapter, x, cotangent = SNNKAdapter(3, 4, 2, ln_before=True), torch.randn(5, 3), torch.randn(5, 3)
    nn.init.normal_(adapter.adapter_up.weight)
    norm = adapter.adapter_norm_before
    y = adapter(x)
    by_weight, by_bias = torch.autograd.grad((y * cotangent).sum(), (norm.weight, norm.bias))
    names = {"adapter_norm_before": norm, "adapter_down.0": norm, "adapter_up": adapter.adapter_up}
    state = {f"{n}.{p}": t.detach() for n, m in names.items() for p, t in m.named_parameters()}
    state["adapter_down.1.weights"] = adapter.adapter_down.weights.detach()
    state["projection_matrix"] = adapter.adapter_down.features.projection_matrix
    grads = {"adapter_down.0.weight": by_weight, "adapter_norm_before.bias": by_bias}
    config = {"input_size": 3, "num_rfs": 4, "down_sample": 2, "ln_before": True}
    inputs, outputs = {"x": x, "cotangent": cotangent}, {"y": y.detach()}
    case = Case("snnk", "twice", config, "", "eval", "", None, None, state, inputs, outputs, grads)
    assert all(t.passed for t in run_case(case))


@pytest.mark.parametrize("down_sample", [None, 3])
@pytest.mark.parametrize("ln_before", [False, True])
def test_adapters(down_sample, ln_before):
    adapter = SNNKAdapter(6, 10, down_sample, ln_before)
    x = torch.randn(2, 5, 6)
    assert torch.equal(adapter(x), x)
    count = sum(p.numel() for p in adapter.parameters())
    assert count == (3 * 10 + 6 * 3 + 6 if down_sample else 6 * 10 + 6) + 12 * ln_before
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    normed = F.layer_norm(x, (6,), *adapter.adapter_norm_before.parameters()) if ln_before else x
    down = adapter.adapter_down.features(normed) @ adapter.adapter_down.weights.T
    expected = x + (adapter.adapter_up(down) if down_sample else down * adapter.modulating_vector)
    torch.testing.assert_close(adapter(x), expected)
    torch.testing.assert_close(adapter.merge()(x), adapter(x), rtol=1e-5, atol=1e-5)


def test_adapter_starts():
    weight = SNNKAdapter(64, 8, 32, init_weights="bert").adapter_up.weight.detach()
    assert abs(weight.std() / 0.02 - 1) < 0.1
    with pytest.raises(ValueError, match="init_weights='lora'"):
        SNNKAdapter(6, init_weights="lora")


def test_official_names():
    layer = SNNKLinear(3, 5, 8)
    rows = torch.randn(8, 3)
    layer.load_state_dict(convert_official({"weights": torch.ones(5, 8)}, rows))
    assert torch.equal(layer.features.projection_matrix, rows)
    adapter = SNNKAdapter(6, 10, 3, ln_before=True)
    names = ("adapter_norm_before.weight", "adapter_norm_before.bias", "adapter_up.weight", "adapter_up.bias")
    state = {n: torch.randn_like(adapter.state_dict()[n]) for n in names}
    twice = {"adapter_down.0.weight": state[names[0]], "adapter_down.0.bias": state[names[1]]}
    official = {**state, **twice, "adapter_down.1.weights": torch.randn(3, 10)}
    adapter.load_state_dict(convert_official(official, torch.randn(10, 6)))
    assert torch.equal(adapter.adapter_down.weights, official["adapter_down.1.weights"])


@pytest.mark.parametrize(
    ("build", "shape"), [(SNNKConv1d, (9,)), (SNNKConv2d, (6, 5)), (SNNKConv3d, (4, 3, 5))], ids=["1d", "2d", "3d"]
)
@pytest.mark.parametrize("bias", [False, True])
def test_pointwise_convolution_is_the_layer_at_each_position(build, shape, bias):
    conv = wide(build(6, 5, 1, bias=bias, num_features=12, orthogonal=False))
    layer = wide(SNNKLinear(6, 5, 12, bias=bias))
    layer.features.projection_matrix = conv.projection_matrix.flatten(1)
    layer.features.projection_offset = conv.projection_offset
    layer.weights = conv.weights
    x = noise(2, 6, *shape)
    torch.testing.assert_close(conv(x), layer(x.movedim(1, -1)).movedim(-1, 1))


@pytest.mark.parametrize("groups", [1, 2])
def test_convolution_is_the_layer_on_each_patch(groups):
    conv = wide(SNNKConv2d(4, 6, (3, 2), stride=2, padding=1, groups=groups, num_features=10, order=2))
    x = noise(2, 4, 7, 6)
    patches = F.unfold(x, (3, 2), padding=1, stride=2).unflatten(1, (groups, -1))
    rows = conv.projection_matrix.flatten(1).unflatten(0, (groups, -1))
    offsets = conv.projection_offset.unflatten(0, (groups, -1))
    weights = conv.weights.unflatten(0, (groups, -1))
    expected = [weights[g] @ relu_features(patches[:, g].mT, rows[g], offsets[g], order=2).mT for g in range(groups)]
    torch.testing.assert_close(conv(x).flatten(2), torch.cat(expected, 1))


def test_convolution_from_a_convolution():
    plain = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
    layer = SNNKConv2d.from_conv(plain, 8000)
    x = torch.randn(2, 4, 7, 6)
    patches = F.unfold(x, 3, padding=1, stride=2).unflatten(1, (2, -1))
    one = torch.ones(2, patches.shape[3], 1)
    exact = []
    for g in range(2):
        rows = slice(3 * g, 3 * g + 3)
        w = torch.cat((plain.weight[rows].flatten(1), plain.bias[rows, None]), 1)
        exact.append(arccos_kernel(torch.cat((patches[:, g].mT, one), 2), w).mT)
    exact = torch.cat(exact, 1)
    assert (layer(x).flatten(2) - exact).abs().max() < 0.15 * exact.max()
    with pytest.raises(ValueError, match="padding_mode='reflect'"):
        SNNKConv2d.from_conv(nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SNNKLinear(6, 5, 0), "features=0"),
        (lambda: SNNKLinear(6, 5, None), "features=None"),
        (lambda: SNNKLinear(6, 5)(torch.ones(2, 5)), r"x of shape \(2, 5\): expected \(\*, 6\)"),
        (lambda: SNNKLinear.from_linear(nn.Conv1d(6, 5, 1)), "linear=Conv1d"),
        (lambda: ReLUFeatures(6, 8, normalize=0.0), r"normalize=0\.0"),
        (lambda: fit_closed_form(torch.ones(5, 2), torch.ones(4, 1)), r"targets of shape \(4, 1\)"),
        (lambda: fit_closed_form(torch.full((5, 2), torch.inf), torch.ones(5, 1)), r"features=\(5, 2\)"),
        (lambda: SNNKConv2d.from_conv(nn.Conv1d(4, 4, 1)), "conv=Conv1d"),
        (lambda: SNNKLinear(6, 5, ReLUFeatures(4, 8)), "takes 4 inputs"),
        (lambda: ReLUFeatures(6, 8, order=3), "order=3"),
        (lambda: ReLUFeatures(6, 8, order=2, floor=0.1), r"floor=0\.1"),
        (lambda: URFeatures(6, 8, "tan"), "f='tan'"),
        (lambda: URFeatures(6, 8, variance=-0.3), r"variance=-0\.3"),
        (lambda: URFeatures(6, 8, frequency=torch.ones(8)), "frequency="),
        (lambda: URFeatures(6, 8, frequency=torch.ones(3), coefficient=torch.ones(3)), r"frequency=\(3,\)"),
        (lambda: exp_features(torch.ones(1, 2), torch.ones(3, 2), variance=-1), "variance=-1"),
        (lambda: SNNKConv2d(4, groups=2, num_features=9), "num_features=9"),
        (lambda: SNNKConv2d(4).set_from(nn.Conv2d(4, 4, 3)), "conv="),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build()
