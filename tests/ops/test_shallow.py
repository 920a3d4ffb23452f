"""Residual layers side by side and in a row: subsets, limits, orders of the error, the pair of networks."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.parity.core import read_case, run_case
from torchconv.models.classify.shallow import ResidualClassifier
from torchconv.ops.shallow import (
    ACTIVATIONS,
    ParallelResidual1d,
    ParallelResidual2d,
    ParallelResidual3d,
    WideResidual,
    expansion_terms,
    residual_stack,
)

KINDS = {1: ParallelResidual1d, 2: ParallelResidual2d, 3: ParallelResidual3d}


def block(ndim=2, channels=3, seed=0, **options):
    torch.manual_seed(seed)
    return KINDS[ndim](channels, dtype=torch.float64, **options)


def noise(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_terms_are_sums_over_ordered_subsets():
    layer = block(n_layers=4, activation="linear", bias=False)
    x = noise(2, 3, 5, 6)
    for m, term in enumerate(layer.terms(x, 4)):
        total = torch.zeros_like(x)
        for chosen in itertools.combinations(range(4), m):
            y = x
            for i in chosen:
                y = layer.layers[i](y)
            total = total + y
        torch.testing.assert_close(term, total, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_orders_end_at_the_stack(bias):
    layer = block(n_layers=5, activation="linear", bias=bias)
    x = noise(2, 3, 5, 6)
    expected = layer.with_order(None)(x)
    torch.testing.assert_close(layer.with_order(5)(x), expected)
    torch.testing.assert_close(layer.with_order(1)(x), x + sum(conv(x) for conv in layer.layers))
    assert torch.equal(layer.with_order(0)(x), x)
    errors = [float((layer.with_order(m)(x) - expected).detach().norm()) for m in range(5)]
    assert errors[-1] < errors[0]


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "tanh"])
def test_second_order_is_the_derivative_of_later_layers(activation):
    layer = block(n_layers=3, activation=activation)
    x = noise(1, 3, 4, 5)

    def single(i):
        return lambda x: layer.with_order(1)(x) if i is None else getattr(torch, activation)(layer.layers[i](x))

    expected = torch.zeros_like(x)
    for i, j in itertools.combinations(range(3), 2):
        expected = expected + torch.func.jvp(single(j), (x,), (single(i)(x),))[1]
    torch.testing.assert_close(layer.terms(x, 2)[2], expected)


@pytest.mark.parametrize(("order", "power"), [(1, 2), (2, 3)])
def test_error_falls_with_the_order(order, power):
    """Layers scaled by ε: what is left out starts with ε^(order + 1)."""
    layer = block(n_layers=5, activation="tanh", bias=False)
    x = noise(1, 3, 6, 6)
    weights = [conv.weight.detach() for conv in layer.layers]

    def error(scale):
        def scaled(order):
            # ε·F: the activation's value is scaled, through a linear map of the result.
            if order is None:
                y = x
                for w in weights:
                    y = y + scale * torch.tanh(torch.nn.functional.conv2d(y, w, padding=1))
                return y
            terms = expansion_terms(x, weights, None, order, "tanh")
            return sum(scale**m * t for m, t in enumerate(terms))

        return float((scaled(order) - scaled(None)).norm())

    assert error(0.02) / error(0.01) == pytest.approx(2**power, rel=0.1)


def test_relu_error_halves_twice():
    layer = block(n_layers=5, bias=False)
    x = noise(1, 3, 6, 6)
    weights = [conv.weight.detach() for conv in layer.layers]

    def error(scale):
        scaled = [scale * w for w in weights]
        return float((residual_stack(x, scaled, order=1) - residual_stack(x, scaled, order=None)).norm())

    assert error(0.05) / error(0.025) == pytest.approx(4, abs=0.2)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 2),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
    st.sampled_from(ACTIVATIONS),
    st.integers(0, 99),
)
def test_wide_and_merged_forms(ndim, kernel, layers, dilation, groups, bias, activation, seed):
    kernel = min(kernel, 2) if ndim == 3 else kernel
    options = {"kernel_size": kernel, "dilation": dilation, "groups": groups, "bias": bias, "n_layers": layers}
    layer = block(ndim, 4, seed, activation=activation, **options)
    x = noise(2, 4, *(4, 5, 3)[:ndim], seed=seed)
    function = (lambda z: z) if activation == "linear" else getattr(torch, activation)
    expected = x + sum(function(conv(x)) for conv in layer.layers)
    torch.testing.assert_close(layer(x), expected)
    merged = layer.merge()
    torch.testing.assert_close(merged(x), expected)
    assert isinstance(merged, WideResidual) == (activation != "linear")
    torch.testing.assert_close(layer.with_order(0).merge()(x), x)


def test_layers_of_several_sizes():
    weights = [noise(3, 3, k, k, seed=k) for k in (1, 3, 5)]
    x = noise(1, 3, 6, 7)
    expected = x + sum(torch.nn.functional.conv2d(x, w, padding="same") for w in weights)
    torch.testing.assert_close(residual_stack(x, weights, None, 1, "linear"), expected)


def test_one_layer_and_zero_layers_coincide():
    layer = block(n_layers=1)
    x = noise(1, 3, 4, 4)
    torch.testing.assert_close(layer(x), layer.with_order(None)(x))
    zero = block(bias=False, activation="tanh")
    for conv in zero.layers:
        torch.nn.init.zeros_(conv.weight)
    assert torch.equal(zero(x), x)
    assert torch.equal(zero.with_order(None)(x), x)


def test_only_the_stack_depends_on_the_order_of_layers():
    layer = block(n_layers=3)
    x = noise(1, 3, 5, 5)
    before = {order: layer.with_order(order)(x) for order in (1, None)}
    layer.layers = torch.nn.ModuleList(reversed(list(layer.layers)))
    torch.testing.assert_close(layer(x), before[1])
    assert (layer.with_order(None)(x) - before[None]).abs().max() > 1e-3


def test_gradients_of_parallel_layers_ignore_each_other():
    layer = block(n_layers=2)
    x = noise(1, 3, 5, 5)

    def gradient():
        return torch.autograd.grad(layer(x).sum(), layer.layers[0].weight)[0]

    before = gradient()
    torch.nn.init.normal_(layer.layers[1].weight)
    torch.testing.assert_close(gradient(), before)


@pytest.mark.parametrize(("order", "side"), [(1, 3), (None, 9), (2, 5)])
def test_receptive_field(order, side):
    layer = block(channels=1, n_layers=4, activation="linear", bias=False, order=order)
    x = torch.zeros(1, 1, 15, 15, dtype=torch.float64)
    x[..., 7, 7] = 1
    seen = layer(x)[0, 0].abs() > 1e-12
    assert int(seen.any(0).sum()) == int(seen.any(1).sum()) == side


def test_channels_last_is_kept_with_groups():
    layer = block(channels=4, groups=2).float()
    x = noise(2, 4, 6, 5).float().contiguous(memory_format=torch.channels_last)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"order": 3}, "order=3"),
        ({"order": 9, "activation": "linear"}, "order=9"),
        ({"order": -1}, "order=-1"),
        ({"activation": "gelu"}, "activation='gelu'"),
        ({"n_layers": 0}, "n_layers=0"),
        ({"stride": 2}, "stride=2"),
        ({"out_channels": 4}, "out_channels=4"),
    ],
)
def test_bad_arguments(options, named):
    with pytest.raises(ValueError, match=named):
        block(**options)
    with pytest.raises(ValueError, match="order=None"):
        block(order=None).merge()
    with pytest.raises(ValueError, match="order=None"):
        block().terms(noise(1, 3, 4, 4), None)
    with pytest.raises(ValueError, match="biases="):
        residual_stack(noise(1, 1, 4), [noise(1, 1, 1)] * 2, [None])


@pytest.mark.parametrize(
    ("name", "left_out"),
    [("sigmoid_k1", ("n_layers", "channels", "kernel_size", "bias")), ("linear_expansion", ("bias", "n_layers"))],
)
def test_parity_reads_what_the_config_leaves_out(name, left_out):
    """Sizes are those of the parameters where a case does not say them."""
    case = read_case(Path(__file__).parents[1] / "golden" / "shallow" / f"{name}.safetensors")
    assert set(left_out) <= set(case.config)
    config = {k: v for k, v in case.config.items() if k not in left_out}
    assert all(t.passed for t in run_case(replace(case, config=config)))


class TestNetwork:
    @pytest.mark.parametrize("img_size", [None, (8, 7)])
    def test_pair_has_equal_parameters(self, img_size):
        deep = ResidualClassifier(10, 1, 6, 4, img_size=img_size)
        shallow = deep.with_layout("parallel")
        counts = [sum(p.numel() for p in net.parameters()) for net in (deep, shallow)]
        features = 6 * (1 if img_size is None else 56)
        assert counts == [(6 + 6) + 4 * (9 * 36 + 6) + 10 * features + 10] * 2
        x = torch.randn(2, 1, 8, 7)
        assert deep(x).shape == shallow(x).shape == (2, 10)
        torch.testing.assert_close(shallow.merge()(x), shallow.eval()(x))

    def test_twin_keeps_an_oblong_kernel(self):
        deep = ResidualClassifier(3, width=4, n_layers=2, kernel_size=(3, 5))
        assert deep.with_layout("parallel").stack.kernel_size == (3, 5)

    def test_heads(self):
        net = ResidualClassifier(4, 3, 5, 2, layout="parallel", img_size=6)
        x = torch.randn(2, 3, 6, 6)
        assert net.forward_features(x).shape == (2, 5, 6, 6)
        assert net.forward_head(net.forward_features(x), pre_logits=True).shape == (2, 180)
        net.reset_classifier(7)
        assert net(x).shape == (2, 7)
        net.reset_classifier(0)
        assert net(x).shape == (2, 180)
        with pytest.raises(ValueError, match="made for"):
            net(torch.randn(2, 3, 5, 6))

    @pytest.mark.parametrize(("options", "named"), [({"layout": "deep"}, "layout"), ({"img_size": (3,)}, "img_size")])
    def test_bad_arguments(self, options, named):
        with pytest.raises(ValueError, match=named):
            ResidualClassifier(**options)
        with pytest.raises(ValueError, match="layout"):
            ResidualClassifier().merge()
