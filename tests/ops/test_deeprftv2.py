"""Spectral branches against written-out transforms, the kernel estimator against convolution, reversible columns."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.ops.harness import randomise
from tests.parity.core import Case, run_case
from torchconv.ops.deeprftv2 import (
    ComplexSpectral,
    ResFFTConv1d,
    ResFFTConv2d,
    ResFFTConv3d,
    complex_spectral_mlp,
    spectral_mlp,
)
from torchconv.ops.deeprftv2_doconv import DOConv1d, DOConv2d, fold_depthwise
from torchconv.ops.deeprftv2_kernel import FourierKernelEstimator, NAFBlock, StateStack
from torchconv.ops.deeprftv2_reversible import invert_column, keep_away_from_zero, reversible_column


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@pytest.mark.parametrize("size", [(8, 7), (5, 6), (1, 4)])
@pytest.mark.parametrize("norm", ["backward", "forward", "ortho"])
def test_real_branch_by_the_complex_transform(size, norm):
    x, w1, w2 = noise(2, 3, *size), noise(4, 6), noise(6, 4)
    spectrum = torch.fft.rfft2(x, norm=norm)
    parts = torch.cat([spectrum.real, spectrum.imag], 1)
    y = torch.einsum("oc,nchw->nohw", w2, torch.relu(torch.einsum("oc,nchw->nohw", w1, parts)))
    expected = torch.fft.irfft2(torch.complex(y[:, :3], y[:, 3:]), s=size, norm=norm)
    torch.testing.assert_close(spectral_mlp(x, w1, w2, norm), expected)


@pytest.mark.parametrize("window", [None, 3, 4])
def test_identity_without_activation(window):
    x, eye, zero = noise(2, 3, 7, 8), torch.eye(3).double(), torch.zeros(3, 3).double()
    y = complex_spectral_mlp(x, (eye, zero), (eye, zero), window_size=window, activation="identity")
    torch.testing.assert_close(y, x)
    turned = complex_spectral_mlp(x, (zero, eye), (zero, -eye), window_size=window, activation="identity")
    torch.testing.assert_close(turned, x)  # i · (−i) = 1


@pytest.mark.parametrize("size", [(7, 8), (8, 8), (9, 4)])
def test_windows_by_loops(size):
    layer = randomise(ComplexSpectral(3, 2, window_size=4, bias=True)).double()
    x, expected = noise(2, 3, *size), torch.zeros(2, 3, *size).double()
    whole = ComplexSpectral(3, 2, bias=True).double()
    whole.load_state_dict(layer.state_dict())
    starts = [[*range(0, n - 3, 4), *([n - 4] if n % 4 else [])] for n in size]
    for i in reversed(starts[0]):  # earlier windows overwrite the overlapped last ones
        for j in reversed(starts[1]):
            expected[:, :, i : i + 4, j : j + 4] = whole(x[:, :, i : i + 4, j : j + 4])
    torch.testing.assert_close(layer(x), expected)
    square = noise(1, 3, 4, 4)
    torch.testing.assert_close(layer(square), whole(square))
    with pytest.raises(ValueError, match="window_size=4"):
        layer(x[:, :, :3])


def test_complex_branch_by_complex_numbers():
    layer = randomise(ComplexSpectral(3, 2, bias=True)).double()
    for name in ("b1_real", "b1_imag", "b2_real", "b2_imag"):
        nn.init.normal_(layer.get_parameter(name))
    x = noise(2, 3, 6, 5)
    parts = {n: torch.complex(*(layer.get_parameter(f"{n}_{k}") for k in ("real", "imag"))) for n in ("b1", "b2")}
    w1, w2 = (torch.complex(*(layer.get_parameter(f"complex_weight{i}_{k}") for k in ("real", "imag"))) for i in (1, 2))
    y = torch.fft.rfft2(x).movedim(1, 3) @ w1 + parts["b1"]
    y = torch.complex(torch.relu(y.real), torch.relu(y.imag)) @ w2 + parts["b2"]
    torch.testing.assert_close(layer(x), torch.fft.irfft2(y.movedim(3, 1), s=(6, 5)))
    assert layer.complex_weight1_real.shape == (3, 6)
    assert layer.b1_real.shape == (1, 1, 1, 6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"conv": "doconv"},
        {"form": "complex", "window_size": 4},
        {"bias": True, "expansion": 0.5},
        {"kernel_size": 5},
    ],
)
def test_block_is_the_sum_of_its_parts(options):
    block = randomise(ResFFTConv2d(4, **options)).double()
    x = noise(2, 4, 7, 8)
    first, second = block._convs()
    pad = options.get("kernel_size", 3) // 2

    def convolve(conv: Any, t: Tensor) -> Tensor:
        weight = conv.folded_weight() if hasattr(conv, "folded_weight") else conv.weight
        return F.conv2d(t, weight, conv.bias, padding=pad)

    expected = x + convolve(second, torch.relu(convolve(first, x))) + block.main_fft(x)
    torch.testing.assert_close(block(x), expected)


def test_other_dimensions_and_names():
    assert ResFFTConv1d(3)(torch.randn(2, 3, 9)).shape == (2, 3, 9)
    assert ResFFTConv3d(2, form="complex", window_size=2)(torch.randn(1, 2, 3, 4, 5)).shape == (1, 2, 3, 4, 5)
    names = set(ResFFTConv2d(3, conv="doconv").state_dict())
    assert names == {
        *(f"main.{i}.main.0.{n}" for i in (0, 1) for n in ("W", "D", "D_diag")),
        *(f"main_fft.{i}.main.0.W" for i in (0, 1)),
    }


@settings(max_examples=15, deadline=None)
@given(
    groups=st.sampled_from([1, 2, 4]),
    k=st.integers(1, 4),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
)
def test_over_parameterised_kernel(groups, k, stride, dilation):
    layer = DOConv2d(4, 8, k, stride, dilation=dilation, groups=groups).double()
    x = noise(2, 4, 9, 8)
    if layer.D is not None:
        nn.init.normal_(layer.D)
    kernel = torch.zeros(8, 4 // groups, k * k).double()
    for o in range(8):
        for j in range(4 // groups):
            channel = (o % groups) * (4 // groups) + j
            factor = torch.eye(k * k).double() if layer.D is None else layer.D[channel] + torch.eye(k * k)
            kernel[o, j] = factor @ layer.W[o, j]
    extent = dilation * (k - 1)
    padded = F.pad(x, (extent // 2, extent - extent // 2) * 2)
    expected = F.conv2d(padded, kernel.reshape(8, -1, k, k), layer.bias, stride, 0, dilation, groups)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.merge()(x), expected)


def test_over_parameterised_start_and_fold():
    layer = DOConv1d(3, 5, 4)
    assert torch.equal(layer.folded_weight().flatten(2), layer.W)
    assert DOConv2d(3, 5, 1).D is None
    w, d = noise(6, 2, 9), noise(2, 9, 9)
    torch.testing.assert_close(fold_depthwise(w, d, (3, 3)).flatten(2), torch.einsum("ims,ois->oim", d, w))


def test_block_without_activations():
    block = NAFBlock(4).double()
    x = noise(2, 4, 5, 6)
    assert torch.equal(block(x), x)
    nn.init.normal_(block.beta)
    nn.init.normal_(block.gamma)
    normal = lambda t, n: F.layer_norm(t.movedim(1, 3), (4,), n.weight, n.bias, 1e-6).movedim(3, 1)  # noqa: E731
    z = block.conv2(block.conv1(normal(x, block.norm1)))
    z = z[:, :4] * z[:, 4:]
    y = x + block.beta * block.conv3(z * block.sca[1](z.mean((2, 3), keepdim=True)))
    v = block.conv4(normal(y, block.norm2))
    torch.testing.assert_close(block(x), y + block.gamma * block.conv5(v[:, :4] * v[:, 4:]))


def estimator(**options: Any) -> FourierKernelEstimator:
    return randomise(FourierKernelEstimator(4, 3, **options)).double()


def with_transfer(layer: FourierKernelEstimator, real: Tensor, imag: Tensor) -> None:
    ending = layer.end_ker1["ending"][0]
    nn.init.zeros_(ending.weight)
    ending.bias.data.copy_(torch.cat([real.expand(4), imag.expand(4)]))


@pytest.mark.parametrize(("size", "padding"), [((6, 8), 0), ((5, 7), 0), ((6, 5), 2)])
def test_transfer_of_one_changes_nothing(size, padding):
    layer = estimator(padding=padding)
    with_transfer(layer, torch.tensor(1.0), torch.tensor(0.0))
    feature, image = noise(2, 4, *size), noise(2, 3, *size)
    g, out, *states = layer(feature, image)
    deconvolved = layer.feature_extract["intro_deconv"](feature)
    expected = layer.deblur_feature1(torch.cat([deconvolved, feature], 1))
    torch.testing.assert_close(g, expected)
    torch.testing.assert_close(out, layer.end_feature1(expected) + image)
    assert [s.shape[2:] for s in states] == [(size[0] + 2 * padding, (size[1] + 2 * padding) // 2 + 1)] * 4


def test_transfer_is_a_circular_convolution():
    layer = estimator()
    feature, image = noise(1, 4, 6, 8), noise(1, 3, 6, 8)
    kernel = torch.fft.irfft2(layer.transfer(feature), s=(6, 8))[0]
    x = layer.feature_extract["intro_deconv"](feature)[0]
    z = torch.zeros_like(x)
    for u in range(6):
        for v in range(8):
            z += kernel[:, u, v, None, None] * x.roll((u, v), (1, 2))
    expected = layer.deblur_feature1(torch.cat([z[None], feature], 1))
    torch.testing.assert_close(layer(feature, image)[0], expected)


def test_states_are_passed_on():
    first, later = estimator(), estimator(first=False)
    feature, image = noise(1, 4, 6, 8), noise(1, 3, 6, 8)
    _, _, *states = first(feature, image)
    assert not torch.allclose(later(feature, image, *states)[0], later(feature, image)[0])
    zeros = [torch.zeros_like(s) for s in states]
    torch.testing.assert_close(first(feature, image, *zeros)[0], first(feature, image)[0])
    plain = estimator(blocks=(2, 1, 1, -1))
    assert len(plain(feature, image)) == 2
    assert {n.split(".")[1] for n, _ in plain.named_parameters() if n.startswith("subnets_ker")} == {"0", "1"}
    assert "end_ker1.norm.weight" not in estimator(norm=False).state_dict()


def test_stack_order_of_states():
    stack = randomise(StateStack(3, (1, 1, 1, 1), False)).double()
    x, old = noise(1, 3, 4, 5), [noise(1, 3, 4, 5) * (i + 1) for i in range(4)]
    below = x
    for i, new in enumerate(stack(x, old)):
        level = stack.get_submodule(f"level{i}")
        joined = level.fusion.down(torch.cat([below, old[i + 1]], 1)) if i < 3 else below
        expected = stack.get_parameter(f"alpha{i}") * old[i] + level.blocks(joined)
        torch.testing.assert_close(new, expected)
        below = new


class Level(nn.Module):
    def __init__(self, second: bool = True) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 3, 3, padding=1), nn.Conv1d(3, 3, 1) if second else None

    def forward(self, below: Tensor, second: Tensor | None = None) -> Tensor:
        y = self.a(below)
        return torch.tanh(y if self.b is None or second is None else y + self.b(second))


def column(external: bool) -> tuple[Any, ...]:
    torch.manual_seed(0)
    levels = [Level(external or i < 2).double() for i in range(3)]
    alphas = [(0.5 + torch.rand(1, 3, 1).double()).requires_grad_() for _ in range(3)]
    x, *states = (noise(2, 3, 4 + i)[..., :4].clone().requires_grad_() for i in range(4))
    seconds = [noise(2, 3, 14 + i)[..., :4].clone().requires_grad_() for i in range(3)] if external else None
    return levels, alphas, x, states, seconds


@pytest.mark.parametrize("external", [False, True])
def test_gradients_by_inversion_are_those_of_autograd(external):
    levels, alphas, x, states, seconds = column(external)
    leaves = [x, *alphas, *states, *(seconds or []), *(p for level in levels for p in level.parameters())]
    found = []
    for memory in ("invert", "store"):
        new = reversible_column(levels, alphas, x, states, seconds, memory)
        total = sum((c * (i + 1)).sin().sum() for i, c in enumerate(new))
        found.append((new, torch.autograd.grad(total, leaves)))
    for ours, theirs in zip(*(f[0] for f in found), strict=True):
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(*(f[1] for f in found), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_inverse_recovers_the_states():
    for external in (False, True):
        levels, alphas, x, states, seconds = column(external)
        with torch.no_grad():
            new = reversible_column(levels, alphas, x, states, seconds)
            for ours, theirs in zip(invert_column(levels, alphas, x, new, seconds), states, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_columns_keep_no_activations():
    levels, alphas, x, states, _ = column(False)

    def kept(memory: str) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
            reversible_column(levels, alphas, x, states, memory=memory)
        return sum(sizes)

    assert kept("invert") == x.numel() * 4 + sum(a.numel() for a in alphas)
    assert kept("store") > 2 * kept("invert")


def test_estimator_with_inversion():
    layer = estimator(first=False)
    twin = copy.deepcopy(layer)
    twin.subnets_ker.memory = "invert"
    feature, image = noise(1, 4, 6, 8), noise(1, 3, 6, 8)
    states = [noise(1, 3, 6, 5) for _ in range(4)]
    for module in (layer, twin):
        module(feature, image, *states)[1].sin().sum().backward()
    for a, b in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-7, atol=1e-7)


def test_factors_away_from_zero():
    alpha = torch.tensor([1e-5, -1e-5, 0.0, -0.7], requires_grad=True)
    limited = keep_away_from_zero(alpha)
    torch.testing.assert_close(limited, torch.tensor([1e-3, -1e-3, 0.0, -0.7]))
    assert torch.autograd.grad(limited.sum(), alpha)[0].tolist() == [1.0] * 4


def test_refusals():
    with pytest.raises(ValueError, match="form='imaginary'"):
        ResFFTConv2d(4, form="imaginary")
    with pytest.raises(ValueError, match="conv='doconv'"):
        ResFFTConv2d(4, form="complex", conv="doconv")
    with pytest.raises(ValueError, match="window_size=4"):
        ResFFTConv2d(4, window_size=4)
    with pytest.raises(ValueError, match="activation='sine'"):
        spectral_mlp(torch.zeros(1, 1, 4), torch.eye(2), torch.eye(2), activation="sine")
    with pytest.raises(ValueError, match="blocks="):
        FourierKernelEstimator(4, blocks=(1, 1))
    with pytest.raises(ValueError, match="states=1"):
        FourierKernelEstimator(4)(torch.zeros(1, 4, 4, 4), torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4, 3))
    with pytest.raises(ValueError, match="image of shape"):
        FourierKernelEstimator(4)(torch.zeros(2, 4, 4, 4), torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="l3 of shape"):
        FourierKernelEstimator(4)(torch.zeros(1, 4, 4, 4), torch.zeros(1, 3, 4, 4), *[torch.zeros(1, 4, 4, 4)] * 4)
    with pytest.raises(ValueError, match="blocks=2"):
        FourierKernelEstimator(4, blocks=2)
    with pytest.raises(ValueError, match="norm='half'"):
        spectral_mlp(torch.zeros(1, 1, 4), torch.eye(2), torch.eye(2), norm="half")
    with pytest.raises(ValueError, match="w1, w2 of shapes"):
        spectral_mlp(torch.zeros(1, 1, 4), torch.eye(2), torch.ones(4, 2))
    with pytest.raises(ValueError, match="window_size=0"):
        complex_spectral_mlp(torch.zeros(1, 2, 4), (torch.eye(2),) * 2, (torch.eye(2),) * 2, window_size=0)
    with pytest.raises(ValueError, match="weight, factors of shapes"):
        fold_depthwise(torch.ones(4, 2, 9), torch.ones(3, 9, 9), (3, 3))
    with pytest.raises(ValueError, match="memory='forget'"):
        reversible_column([], [], torch.zeros(1), [], memory="forget")
    with pytest.raises(ValueError, match="alphas=0"):
        reversible_column([Level()], [], torch.zeros(1), [torch.zeros(1)])
    nothing = FourierKernelEstimator(4)(torch.zeros(0, 4, 4, 4), torch.zeros(0, 3, 4, 4))
    assert [len(t) for t in nothing] == [0] * 6
    matrix = torch.ones(2, 2, device="meta")
    assert spectral_mlp(torch.ones(1, 1, 4, device="meta"), matrix, matrix).device.type == "meta"
    assert math.isfinite(float(ResFFTConv2d(2)(torch.zeros(1, 2, 3, 3)).sum().detach()))


def test_hidden_widths_are_exact():
    for channels, hidden in ((49, 1), (11, 15), (19, 53)):
        assert ComplexSpectral(channels, hidden / channels).complex_weight1_real.shape == (channels, hidden)


def test_parity_of_an_estimator_as_wide_as_the_image():
    layer = FourierKernelEstimator(3, norm=False).double()
    randomise(layer)
    feature = noise(1, 3, 4, 6).requires_grad_()
    image = noise(1, 3, 4, 6)
    g, y = layer(feature, image)[:2]
    cotangent = noise(1, 3, 4, 6)
    (grad,) = torch.autograd.grad(y, feature, cotangent)
    inputs = {"feature": feature.detach(), "blur_img": image, "cotangent": cotangent}
    outputs = {"feature_deblur": g.detach(), "img_deblur": y.detach()}
    state = {n: t.detach() for n, t in layer.state_dict().items()}
    config = {"feature_channels": 3}
    case = Case("deeprftv2", "made", config, "", "eval", "", None, None, state, inputs, outputs, {"feature": grad})
    assert all(t.passed for t in run_case(case))
