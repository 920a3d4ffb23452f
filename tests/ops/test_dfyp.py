"""DFYP's parts: closed forms of the edge operators, routing, attention, same padding, histograms, the process."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torchconv.ops import dfyp_yield
from torchconv.ops.dfyp import (
    SCHARR,
    SOBEL,
    EdgeOperator,
    OperatorBlend,
    OperatorRouter,
    ResolutionAttention,
    edge_magnitude,
    mixed_kernel,
)
from torchconv.ops.dfyp_yield import ConvBlock, gaussian_process, histogram_features, pad_same_tf

INSIDE = (..., slice(1, -1), slice(1, -1))


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def learnable(alpha=0.5, scale=0.1):
    operator = EdgeOperator("learnable").double()
    nn.init.constant_(operator.alpha, alpha)
    nn.init.constant_(operator.scale, scale)
    return operator


@pytest.mark.parametrize("kernel", [SOBEL, SCHARR])
def test_magnitude_by_loops(kernel):
    x, k = noise(1, 2, 4, 5), torch.tensor(kernel, dtype=torch.float64)
    padded = F.pad(x, (1, 1, 1, 1))
    for c in range(2):
        for i in range(4):
            for j in range(5):
                patch = padded[0, c, i : i + 3, j : j + 3]
                expected = math.sqrt(float((patch * k).sum() ** 2 + (patch * k.T).sum() ** 2) + 1e-8)
                assert abs(float(edge_magnitude(x, k)[0, c, i, j]) - expected) < 1e-12


def test_constants_and_ramps():
    flat, ramp = torch.ones(1, 1, 6, 6, dtype=torch.float64), torch.arange(6.0).double().expand(1, 1, 6, 6)
    sobel, scharr = EdgeOperator("sobel"), EdgeOperator("scharr")
    assert sobel(flat)[INSIDE].max() < 1.01e-4
    for operator, slope in ((sobel, 8), (scharr, 32)):
        torch.testing.assert_close(operator(ramp)[INSIDE], torch.full((1, 1, 4, 4), slope).double())
    a = 1 / (1 + math.exp(-0.7))
    expected = 2 * (16 - 12 * a) / (10 - 8 * a) / (1 + math.exp(-0.3))
    torch.testing.assert_close(
        learnable(0.7, 0.3)(ramp)[INSIDE], torch.full((1, 1, 4, 4), expected).double(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(("alpha", "kind", "divisor"), [(60.0, "sobel", 2), (-60.0, "scharr", 10)])
def test_learned_operator_has_both_as_limits(alpha, kind, divisor):
    x = noise(2, 3, 6, 7)
    expected = EdgeOperator(kind)(x) / divisor / (1 + math.exp(-0.1))
    torch.testing.assert_close(learnable(alpha)(x), expected, rtol=1e-4, atol=1e-6)
    assert mixed_kernel(torch.tensor(alpha)).abs().max() == 1


@pytest.mark.parametrize("kind", ["sobel", "scharr", "learnable"])
def test_sign_and_rotations(kind):
    operator, x = EdgeOperator(kind).double(), noise(2, 3, 6, 6)
    torch.testing.assert_close(operator(-x), operator(x))
    for turns in (1, 2, 3):
        torch.testing.assert_close(operator(x.rot90(turns, (2, 3))), operator(x).rot90(turns, (2, 3)))


def test_start_of_the_learned_operator():
    operator = EdgeOperator()
    assert {n: p.tolist() for n, p in operator.named_parameters()} == {"alpha": 0.5, "scale": [0.10000000149011612]}
    assert sum(1 for _ in EdgeOperator("sobel").parameters()) == 0


def test_half_precision_has_finite_gradients_on_flat_maps():
    x = torch.ones(1, 2, 6, 6, dtype=torch.float16, requires_grad=True)
    EdgeOperator("sobel")(x).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_router_gives_each_item_its_operator():
    table = {2009: "scharr", 2011: "sobel", 2012: "learnable"}
    router, x = OperatorRouter(table, "sobel").double(), noise(5, 2, 6, 5)
    years = [2012, 2009, 2010, 2009, 2011]
    y = router(x, years)
    for item, kind in enumerate(("learnable", "scharr", "sobel", "scharr", "sobel")):
        torch.testing.assert_close(y[item : item + 1], router.operators[kind](x[item : item + 1]))
    torch.testing.assert_close(OperatorRouter({}, "scharr")(x, years), EdgeOperator("scharr")(x))
    torch.testing.assert_close(OperatorRouter(table, "scharr")(x), EdgeOperator("scharr")(x))


def test_router_takes_years_as_a_tensor_and_empty_batches():
    router, x = OperatorRouter({2009: "scharr"}, "sobel"), noise(2, 1, 4, 4)
    assert torch.equal(router(x, torch.tensor([2010, 2009])), router(x, [2010, 2009]))
    assert router(x[:0], []).shape == (0, 1, 4, 4)


@pytest.mark.parametrize("kind", ["sobel", "scharr", "learnable"])
def test_half_precision_stays_half_beside_single_precision_parameters(kind):
    assert EdgeOperator(kind)(torch.ones(1, 2, 5, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_parity_finds_the_years_among_the_inputs():
    from tests.parity.dfyp import _router

    config = {"year_operator_map": {"2009": "scharr"}, "default_operator": "sobel"}
    inputs = {"x": noise(2, 1, 4, 4), "years": torch.tensor([2010, 2009])}
    case = SimpleNamespace(config=config, inputs=inputs, note="")
    expected = OperatorRouter({2009: "scharr"}, "sobel")(inputs["x"], [2010, 2009])
    torch.testing.assert_close(_router(case).forward(inputs)["y"], expected)


def test_router_computes_only_what_is_needed():
    router, ran = OperatorRouter({"corn": "sobel", "cotton": "scharr"}), []
    for kind, operator in router.operators.items():
        operator.register_forward_hook(lambda *_, kind=kind: ran.append(kind))
    router(torch.zeros(3, 1, 4, 4), ["cotton", "corn", "cotton"])
    assert sorted(ran) == ["scharr", "sobel"]


def test_soft_mixture():
    router, x = OperatorRouter(soft=True).double(), noise(2, 3, 5, 5)
    mean = sum(operator(x) for operator in router.operators.values()) / 3
    torch.testing.assert_close(router(x), mean)
    router.logits.data = torch.tensor([60.0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(router(x), EdgeOperator("sobel")(x))


def test_blend():
    x = noise(2, 9, 5, 6)
    module = OperatorBlend(default="sobel").double()
    torch.testing.assert_close(module(x), (EdgeOperator("sobel")(x) + x) / 2)
    nn.init.zeros_(module.operator_weight)
    torch.testing.assert_close(module(x), x)
    colour = noise(2, 3, 5, 6)
    grey = OperatorBlend(default="scharr", grey=True).double()
    nn.init.constant_(grey.operator_weight, 0.3)
    luma = 0.299 * colour[:, :1] + 0.587 * colour[:, 1:2] + 0.114 * colour[:, 2:]
    torch.testing.assert_close(grey(colour), 0.3 * EdgeOperator("scharr")(luma) + 0.7 * colour)


@pytest.mark.parametrize("pool", ["max", "avg"])
def test_attention(pool):
    module, x = ResolutionAttention(9, 4, pool).double(), noise(3, 9, 5, 6)
    down, up = module.fc[0].weight, module.fc[2].weight
    assert down.shape == (2, 9)
    pooled = x.flatten(2).max(2).values if pool == "max" else x.flatten(2).mean(2)
    torch.testing.assert_close(module(x), x * torch.sigmoid((pooled @ down.T).relu() @ up.T)[..., None, None])
    nn.init.zeros_(up)
    torch.testing.assert_close(module(x), x / 2)
    assert module(noise(2, 9, 7)).shape == (2, 9, 7)
    assert ResolutionAttention(3, 8).fc[0].weight.shape == (1, 3)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 13), st.integers(1, 5), st.integers(1, 4))
def test_tensorflow_padding(length, kernel, stride):
    x = torch.ones(1, 1, length, 2 * length)
    padded = pad_same_tf(x, kernel, stride)
    for axis, n in ((2, length), (3, 2 * length)):
        extra = padded.shape[axis] - n
        before = int((padded.sum(5 - axis).flatten() > 0).nonzero()[0])
        assert before == extra // 2
        assert extra == max(0, (math.ceil(n / stride) - 1) * stride + kernel - n)
        if kernel >= stride:
            assert (padded.shape[axis] - kernel) // stride + 1 == math.ceil(n / stride)
    if stride == 1 and kernel == 3:
        torch.testing.assert_close(padded, F.pad(x, (1, 1, 1, 1)))


def test_convolution_block():
    torch.manual_seed(0)
    block, x = ConvBlock(3, 5, 3, 2).double().eval(), noise(2, 3, 8, 7)
    nn.init.uniform_(block.batchnorm.running_mean)
    nn.init.uniform_(block.conv.bias)
    y = F.conv2d(F.pad(x, (1, 1, 0, 1)), block.conv.weight, block.conv.bias, 2)
    torch.testing.assert_close(block(x), block.batchnorm(y).relu())
    torch.testing.assert_close(block.merge().merge()(x), block(x))
    dropped = block.train()(x)
    assert (dropped == 0).double().mean() > 0.55
    assert ConvBlock(3, 5).conv.bias.abs().max() == 0


def test_histogram_is_numpys(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 12, (7, 6, 6), generator=generator).float()
    features = histogram_features(image, bands=3, bins=4, largest=9)
    assert features.shape == (3, 2, 4)
    for band in range(3):
        for date in range(2):
            counts, _ = np.histogram(image[..., 3 * date + band].numpy(), np.linspace(1, 9, 5))
            np.testing.assert_allclose(features[band, date].numpy(), counts / max(1, counts.sum()))
    shuffled = image.flatten(0, 1)[torch.randperm(42, generator=generator)].reshape(image.shape)
    assert torch.equal(histogram_features(shuffled, 3, 4, 9), features)
    assert histogram_features(torch.zeros(2, 2, 4), 2).sum() == 0
    monkeypatch.setattr(dfyp_yield, "_PIECE", 30)  # five pixels at a time
    assert torch.equal(histogram_features(image, 3, 4, 9), features)
    torch.testing.assert_close(features.sum(2), torch.ones(3, 2, dtype=torch.float64))


@pytest.mark.parametrize(("bins", "largest"), [(7, 100.0), (30, 4999.0), (49, 1.7)])
def test_pixels_on_an_edge_fall_where_numpy_puts_them(bins, largest):
    edges = np.linspace(1, largest, bins + 1)
    expected, _ = np.histogram(edges, edges)
    features = histogram_features(torch.from_numpy(edges).reshape(-1, 1, 1), 1, bins, largest)
    np.testing.assert_allclose(features[0, 0].numpy(), expected / expected.sum())


def process(sigma_e=0.32, sigma_b=0.01, **options):
    train = (noise(8, 3), noise(8, 2, seed=1), noise(8, seed=2), noise(8, seed=3))
    test = (noise(4, 3, seed=4), noise(4, 2, seed=5), noise(4, seed=6))
    weight, bias = noise(1, 3, seed=7), noise(1, seed=8)
    prior = test[0] @ weight.T + bias
    return train, prior, gaussian_process(train, test, weight, bias, sigma_e=sigma_e, sigma_b=sigma_b, **options)


def test_process_limits():
    _, prior, prediction = process(sigma_e=1e6)
    torch.testing.assert_close(prediction, prior, rtol=0, atol=1e-6)
    train, _, _ = process()
    back = gaussian_process(train, train[:3], noise(1, 3), noise(1), sigma_e=1e-5)
    torch.testing.assert_close(back[:, 0], train[3], rtol=0, atol=1e-6)


def test_process_takes_years_as_integers():
    train = (noise(4, 2), noise(4, 2, seed=1), torch.tensor([2003, 2004, 2005, 2006]), noise(4, seed=2))
    test = (noise(1, 2, seed=3), noise(1, 2, seed=4), torch.tensor([2007]))
    whole = gaussian_process(train, test, noise(1, 2), noise(1))
    train, test = ((*part[:2], part[2].double(), *part[3:]) for part in (train, test))
    torch.testing.assert_close(whole, gaussian_process(train, test, noise(1, 2), noise(1)))


def test_process_by_explicit_inverses():
    train, test = (
        (noise(5, 2), noise(5, 2, seed=1), noise(5, seed=2), noise(5, seed=3)),
        (noise(2, 2, seed=4), noise(2, 2, seed=5), noise(2, seed=6)),
    )
    weight, bias = noise(1, 2, seed=7), noise(1, seed=8)
    both = torch.cat([torch.cat([train[1], test[1]]), torch.cat([train[2], test[2]])[:, None]], 1)
    both = (both - both.mean(0)) / (both.amax(0) - both.amin(0))
    k = torch.zeros(7, 5, dtype=torch.float64)
    for i in range(7):
        for j in range(5):
            d = (both[i] - both[j]).square()
            k[i, j] = 4 * torch.exp(-(d[0] + d[1]) / 0.49 - d[2] / 1.21)
    h = torch.cat([torch.cat([train[0], test[0]]), torch.ones(7, 1)], 1)
    inverse = torch.linalg.inv(k[:5] + 0.25 * torch.eye(5))
    b = torch.cat([weight.T, bias[:, None]])
    a = torch.eye(3).double() / 0.1 + h[:5].T @ inverse @ h[:5]
    beta = torch.linalg.inv(a) @ (h[:5].T @ inverse @ train[3][:, None] + b / 0.1)
    expected = h[5:] @ beta + k[5:] @ inverse @ (train[3][:, None] - h[:5] @ beta)
    options = {"sigma": 2.0, "r_loc": 0.7, "r_year": 1.1, "sigma_e": 0.5, "sigma_b": 0.1}
    torch.testing.assert_close(gaussian_process(train, test, weight, bias, **options), expected)


def test_refusals():
    with pytest.raises(ValueError, match="kind='laplace'"):
        EdgeOperator("laplace")
    with pytest.raises(ValueError, match="table='canny'"):
        OperatorRouter({2009: "canny"})
    with pytest.raises(ValueError, match="soft=True"):
        OperatorRouter({2009: "sobel"}, soft=True)
    with pytest.raises(ValueError, match="keys="):
        OperatorRouter()(torch.zeros(2, 1, 4, 4), [2009])
    with pytest.raises(ValueError, match="x of shape"):
        OperatorBlend(grey=True)(torch.zeros(1, 4, 5, 5))
    with pytest.raises(ValueError, match="x of shape"):
        EdgeOperator()(torch.zeros(3, 4, 5))
    with pytest.raises(ValueError, match="pool='sum'"):
        ResolutionAttention(4, pool="sum")
    with pytest.raises(ValueError, match="x of shape"):
        ResolutionAttention(4)(torch.zeros(1, 3, 5, 5))
    with pytest.raises(ValueError, match="dropout=1"):
        ConvBlock(3, 4, dropout=1)
    with pytest.raises(ValueError, match="floating point"):
        EdgeOperator("sobel")(torch.zeros(1, 3, 4, 5, dtype=torch.uint8))
    with pytest.raises(ValueError, match="x of shape"):
        ConvBlock(3, 4)(torch.zeros(3, 5, 5))
    with pytest.raises(ValueError, match="largest=1"):
        histogram_features(torch.zeros(2, 2, 6), 2, largest=1)
    with pytest.raises(ValueError, match="bands=4"):
        histogram_features(torch.zeros(2, 2, 6), 4)


def test_claim_data():
    from torchconv.claims.dfyp import _counties

    x, y = _counties(20, [0, 1], 3)
    assert x.shape == (40, 9, 32, 32)
    torch.testing.assert_close(x.sum(3), torch.ones(40, 9, 32))
    assert 5 < float(y.std()) < 10
