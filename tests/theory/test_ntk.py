"""Kernels of wide networks against brute force over pixels, closed forms and networks of finite width."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from torchconv.theory.ntk import (
    AvgPool,
    Conv,
    Dense,
    Erf,
    Flatten,
    GlobalAvgPool,
    Layer,
    ReLU,
    fully_connected,
    myrtle,
    nngp_ntk,
)

ROOT2 = math.sqrt(2)


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def window(out: int, tap: int, stride: int, size: int, length: int, padding: str) -> int | None:
    """The pixel that a tap of an output sees, None outside of the image."""
    before = 0
    if padding == "SAME":
        before = max(0, (math.ceil(length / stride) - 1) * stride + size - length) // 2
    found = out * stride + tap - before
    return found if 0 <= found < length else None


def brute_conv(k: Tensor, layer: Conv) -> Tensor:
    """(H, W, H, W) of one pair of images, tap by tap."""
    sizes = [
        math.ceil(n / s) if layer.padding == "SAME" else (n - size) // s + 1
        for n, s, size in zip(k.shape, layer.stride, layer.kernel, strict=False)
    ]
    y = k.new_zeros(*sizes, *sizes)
    for h, w, i, j in itertools.product(*map(range, y.shape)):
        for taps in itertools.product(*map(range, layer.kernel)):
            seen = [
                window(o, taps[a], layer.stride[a], layer.kernel[a], k.shape[a], layer.padding)
                for a, o in ((0, h), (1, w), (0, i), (1, j))
            ]
            if None not in seen:
                y[h, w, i, j] += k[tuple(seen)]
    return y / math.prod(layer.kernel)


@pytest.mark.parametrize(
    "layer",
    [
        Conv(),
        Conv((2, 3), (1, 2), "SAME", 1.3, 0.2),
        Conv((3, 2), (2, 1), "VALID", 0.7),
        Conv((5, 1), (3, 3), "SAME", 1.1, 0.4),
        Conv((7, 7)),
    ],
)
def test_convolution_is_the_sum_over_taps(layer: Conv) -> None:
    x, y = images(2, 2, 5, 6)
    covariance = torch.einsum("chw,cij->hwij", x, y) / 2
    first = layer.w_std**2 * brute_conv(covariance, layer) + layer.b_std**2
    pairs = (x[None], y[None])
    for end, pick in ((Flatten(), "diagonal"), (GlobalAvgPool(), "all")):
        nngp, ntk = nngp_ntk(*pairs, [layer, end, Dense(1.2)])
        n = math.prod(first.shape[:2])
        flat = first.reshape(n, n)
        mean = flat.diagonal().mean() if pick == "diagonal" else flat.mean()
        torch.testing.assert_close(nngp[0, 0], 1.44 * mean)
        torch.testing.assert_close(ntk[0, 0], 2 * 1.44 * mean)  # of two linear layers, each adds the kernel once


def test_vectors_follow_the_arc_cosine_recursion() -> None:
    x = images(5, 7)
    nngp, ntk = nngp_ntk(x, None, fully_connected(3))
    k = x @ x.T / 7 * 2
    theta = k.clone()
    for layer in range(3):
        norms = k.diagonal().sqrt()
        cosine = (k / norms[:, None] / norms).clamp(-1, 1).fill_diagonal_(1)
        angle = torch.acos(cosine)
        new = norms[:, None] * norms / (2 * math.pi) * (angle.sin() + (math.pi - angle) * cosine)
        theta = theta * (math.pi - angle) / (2 * math.pi)
        scale = 2 if layer < 2 else 1
        k = scale * new
        theta = scale * theta + k
    torch.testing.assert_close(nngp, k)
    torch.testing.assert_close(ntk, theta, rtol=1e-7, atol=1e-9)


def test_one_pixel_is_a_vector() -> None:
    x, layers = images(4, 6, 1, 1), [Conv(w_std=ROOT2), ReLU(), Conv((5, 5), w_std=ROOT2), ReLU(), Flatten(), Dense()]
    # Of a k × k window one tap lies in the image: the variance is divided by the area.
    nngp, ntk = nngp_ntk(x, None, layers)
    flat = nngp_ntk(x.flatten(1), None, [Dense(ROOT2 / 3), ReLU(), Dense(ROOT2 / 5), ReLU(), Dense()])
    torch.testing.assert_close(nngp, flat[0])
    torch.testing.assert_close(ntk, flat[1])


@pytest.mark.parametrize(
    "layers",
    [
        myrtle(5, 8),
        [Conv(w_std=1.4, b_std=0.1), Erf(), AvgPool((3, 2), (2, 2)), Conv((2, 2)), ReLU(), GlobalAvgPool(), Dense()],
        [Conv(w_std=1.4, b_std=0.1), ReLU(), Conv((3, 3), (2, 2), "VALID"), Erf(), Flatten(), Dense(1, 0.3)],
    ],
)
def test_symmetric_positive_and_independent_of_blocks(layers: list[Layer]) -> None:
    x = images(5, 3, 8, 8)
    for matrix, again in zip(nngp_ntk(x, None, layers), nngp_ntk(x, x, layers, memory=1), strict=True):
        assert torch.equal(matrix, matrix.T)
        torch.testing.assert_close(matrix, again, rtol=1e-9, atol=1e-12)
        assert float(torch.linalg.eigvalsh(matrix)[0]) > 0


def test_weights_scale_the_kernel() -> None:
    x = images(3, 2, 4, 4)
    for c in (0.5, 3.0):
        one = nngp_ntk(x, None, [Conv(), ReLU(), Conv(), ReLU(), Flatten(), Dense()])[0]
        scaled = [Conv(w_std=c), ReLU(), Conv(w_std=c), ReLU(), Flatten(), Dense(w_std=c)]
        torch.testing.assert_close(nngp_ntk(x, None, scaled)[0], c**6 * one)


class _Scaled(nn.Module):
    """A layer in the parameterisation of the kernel: unit weights, scaled when used."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, w_std: float, b_std: float) -> None:
        super().__init__()
        self.layer, self.w, self.b = layer.double(), w_std / math.sqrt(layer.weight[0].numel()), b_std
        for parameter in layer.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.layer.weight * self.w, self.layer.bias * self.b
        if isinstance(self.layer, nn.Linear):
            return nn.functional.linear(x, weight, bias)
        return nn.functional.conv2d(x, weight, bias, padding=1)


@pytest.mark.parametrize("activation", [ReLU(), Erf()])
def test_wide_networks_have_these_kernels(activation: Layer) -> None:
    """The mean over random networks of f(x) f(x') and of the product of their gradients."""
    torch.manual_seed(0)
    x, width, draws = images(2, 2, 4, 4), 64, 150
    bend = torch.relu if isinstance(activation, ReLU) else torch.erf
    layers: list[Layer] = [Conv(w_std=1.4, b_std=0.3), activation, AvgPool(), Conv(w_std=1.2, b_std=0.1), activation]
    layers += [GlobalAvgPool(), Dense(1.1, 0.2)]
    nngp, ntk = nngp_ntk(x, None, layers)
    outputs, tangents = [], []
    for _ in range(draws):
        first = _Scaled(nn.Conv2d(2, width, 3), 1.4, 0.3)
        second = _Scaled(nn.Conv2d(width, width, 3), 1.2, 0.1)
        last = _Scaled(nn.Linear(width, 1), 1.1, 0.2)
        parameters = [p for m in (first, second, last) for p in m.parameters()]
        hidden = nn.functional.avg_pool2d(bend(first(x)), 2)
        y = last(bend(second(hidden)).mean((2, 3))).flatten()
        rows = [torch.cat([g.flatten() for g in torch.autograd.grad(v, parameters, retain_graph=True)]) for v in y]
        outputs.append(y.detach()[:, None] * y.detach())
        tangents.append(torch.stack(rows) @ torch.stack(rows).T)
    for measured, expected, slack in ((outputs, nngp, 0.0), (tangents, ntk, 0.03)):
        each = torch.stack(measured)
        error = 4 * each.std(0) / math.sqrt(draws) + slack * expected.abs()
        assert bool(((each.mean(0) - expected).abs() < error).all()), (each.mean(0), expected)


def test_gradients_reach_the_images() -> None:
    layers = [Conv(w_std=ROOT2, b_std=0.1), ReLU(), AvgPool(), Conv(), Erf(), Flatten(), Dense()]
    x, y = images(2, 1, 4, 4).requires_grad_(), images(1, 1, 4, 4, seed=1)
    assert torch.autograd.gradcheck(lambda t: nngp_ntk(t, y, layers), (x,))
    nngp_ntk(x, None, layers)[1].sum().backward()
    assert bool(torch.isfinite(x.grad).all())


def test_blank_images_and_single_precision() -> None:
    x = images(3, 1, 6, 6)
    x[0] = 0
    x[1, :, :3] = 0
    layers = [Conv(w_std=ROOT2), ReLU(), AvgPool(), Conv(w_std=ROOT2), ReLU(), GlobalAvgPool(), Dense()]
    nngp, ntk = nngp_ntk(x, None, layers)
    assert bool(torch.isfinite(ntk).all())
    assert not bool(nngp[0].any())
    for wide, single in zip((nngp, ntk), nngp_ntk(x.float(), None, layers), strict=True):
        assert single.dtype == torch.float32
        torch.testing.assert_close(single, wide.float(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: nngp_ntk(x[0], None, [Dense()]), r"x1='\(1, 4, 4\)"),
        (lambda x: nngp_ntk(x.long(), None, [Dense()]), "floating-point"),
        (lambda x: nngp_ntk(x[:0], None, [Dense()]), "holds nothing"),
        (lambda x: nngp_ntk(x, x.float(), [Flatten()]), "x2=.*expected"),
        (lambda x: nngp_ntk(x, x[..., 1:], [Flatten()]), r"x2=.*expected \(N2, 1, 4, 4\)"),
        (lambda x: nngp_ntk(x, None, [Conv(), Dense()]), r"layers\[1\]=.*on 16 positions: put Flatten"),
        (lambda x: nngp_ntk(x, None, [Conv()]), "end with Flatten"),
        (lambda x: nngp_ntk(x, None, [Conv((5, 5), padding="VALID"), Flatten()]), r"layers\[0\]="),
        (lambda x: nngp_ntk(x, None, [Conv(padding="same"), Flatten()]), r"layers\[0\].padding='same'"),
        (lambda x: nngp_ntk(x, None, [AvgPool((5, 2)), Flatten()]), r"does not fit maps of \(4, 4\)"),
        (lambda x: nngp_ntk(x, None, [nn.ReLU()]), "expected one of the layers"),
        (lambda x: myrtle(6, 32), "depth=6"),
        (lambda x: myrtle(5, 24), "input_size=24: must be a power of two"),
        (lambda x: fully_connected(0), "depth=0"),
    ],
)
def test_bad_arguments(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(images(2, 1, 4, 4))  # type: ignore[operator]
