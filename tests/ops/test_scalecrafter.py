"""Re-dilation against dilated convolutions and enlarged maps, dispersion against its definition, guidance, U-Net."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.parity.core import read_case, run_case
from torchconv.models.generate.guidance import attention_scale, classifier_free_guidance, noise_damped_guidance
from torchconv.models.generate.unet import SmallUNet
from torchconv.ops.scalecrafter import ReDilatedConv1d, ReDilatedConv2d, ReDilatedConv3d, redilate_conv, step_factor
from torchconv.ops.scalecrafter_dispersed import DispersedConv2d, disperse_conv, disperse_kernel, dispersion_matrix


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(
    factor=st.integers(1, 4),
    k=st.sampled_from([1, 3, 5]),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
)
def test_integer_factor_is_the_dilated_convolution(factor, k, stride, dilation, groups, size):
    x, weight, bias = noise(2, 4, *size), noise(6, 4 // groups, k, k), noise(6)
    d = factor * dilation
    expected = F.conv2d(x, weight, bias, stride, d * (k // 2), d, groups)
    assert torch.equal(redilate_conv(x, weight, bias, factor, stride, dilation, groups), expected)
    floor = (
        redilate_conv(x, weight, bias, factor, stride, dilation, groups, rounding="floor")
        if min(size) >= stride
        else None
    )
    if floor is not None:
        assert list(floor.shape[2:]) == [n // stride for n in size]


@pytest.mark.parametrize("factor", [2, 3])
def test_enlarged_map_gives_the_enlarged_result(factor):
    x, weight = noise(1, 2, 5, 6), noise(3, 2, 3, 3)
    up = lambda t: t.repeat_interleave(factor, 2).repeat_interleave(factor, 3)  # noqa: E731
    torch.testing.assert_close(redilate_conv(up(x), weight, None, factor), up(F.conv2d(x, weight, padding=1)))


def linear_resize(length: int, size: int) -> torch.Tensor:
    """Half-pixel centres, clamped at the ends, written as a matrix."""
    matrix = torch.zeros(size, length, dtype=torch.float64)
    for i in range(size):
        at = max((i + 0.5) * length / size - 0.5, 0.0)
        low = min(int(at), length - 1)
        high = min(low + 1, length - 1)
        matrix[i, low] += 1 - (at - low)
        matrix[i, high] += at - low
    return matrix


@pytest.mark.parametrize(
    ("factor", "stride", "rounding"), [(1.5, 1, "ceil"), (2.5, 2, "ceil"), (2.5, 2, "floor"), (1.2, 1, "ceil")]
)
def test_fractional_factor_against_matrices(factor, stride, rounding):
    x, weight, bias = noise(2, 3, 11), noise(4, 3, 3), noise(4)
    d = int(np.ceil(factor))
    size = -(-11 // stride) if rounding == "ceil" else 11 // stride
    wide = x @ linear_resize(11, round(11 * d / factor)).T
    y = F.conv1d(wide, weight, bias, stride, d, d)
    expected = y @ linear_resize(y.shape[2], size).T
    torch.testing.assert_close(redilate_conv(x, weight, bias, factor, stride, rounding=rounding), expected)


def test_modes_and_dimensions():
    x, weight = noise(1, 2, 10, 9), noise(2, 2, 3, 3)
    for mode, word in (("nearest", "nearest"), ("cubic", "bicubic")):
        options = {} if mode == "nearest" else {"align_corners": False}
        wide = F.interpolate(x, (13, 12), mode=word, **options)
        expected = F.interpolate(F.conv2d(wide, weight, padding=2, dilation=2), (10, 9), mode=word, **options)
        torch.testing.assert_close(redilate_conv(x, weight, None, 1.5, mode=mode), expected)
    assert ReDilatedConv3d(2, factor=1.5)(torch.zeros(1, 2, 5, 6, 7)).shape == (1, 2, 5, 6, 7)
    with pytest.raises(ValueError, match="mode='cubic'"):
        ReDilatedConv1d(2, factor=1.5, mode="cubic")(torch.zeros(1, 2, 5))


def test_wrapping_shares_parameters_and_leaves_the_convolution():
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
    before = {n: t.clone() for n, t in conv.state_dict().items()}
    wrapped = ReDilatedConv2d.from_conv(conv, 1)
    x = torch.randn(2, 4, 9, 8)
    assert torch.equal(wrapped(x), conv(x))
    wrapped.factor = 2.5
    assert wrapped.weight is conv.weight
    assert wrapped.bias is conv.bias
    assert not torch.allclose(wrapped(x), conv(x))
    assert list(wrapped.state_dict()) == list(before)
    assert all(torch.equal(before[n], t) for n, t in conv.state_dict().items())
    assert (conv.dilation, conv.padding) == ((1, 1), (1, 1))
    assert ReDilatedConv2d.from_conv(nn.Conv2d(2, 2, 3, padding="same", bias=False), 2).bias is None


def test_merge_is_for_integer_factors():
    with pytest.raises(ValueError, match=r"factor=2\.5"):
        ReDilatedConv2d(3, factor=2.5).merge()
    with pytest.raises(ValueError, match="rounding='floor'"):
        ReDilatedConv2d(3, factor=2, rounding="floor").merge()
    layer = ReDilatedConv2d(3, 4, factor=3, dilation=2).eval()
    assert layer.merge().dilation == (6, 6)


def test_refusals():
    with pytest.raises(ValueError, match=r"factor=0\.5"):
        redilate_conv(torch.zeros(1, 1, 4), torch.zeros(1, 1, 3), factor=0.5)
    with pytest.raises(ValueError, match="x of shape"):
        redilate_conv(torch.zeros(1, 1, 4), torch.zeros(1, 1, 3, 3))
    with pytest.raises(ValueError, match="leaves nothing"):
        redilate_conv(torch.zeros(1, 1, 3), torch.zeros(1, 1, 3), stride=4, rounding="floor")
    with pytest.raises(ValueError, match="weight of shape"):
        disperse_kernel(torch.zeros(3, 3), dispersion_matrix())
    with pytest.raises(ValueError, match="rounding='up'"):
        ReDilatedConv2d(3, rounding="up")
    with pytest.raises(ValueError, match="padding="):
        ReDilatedConv2d.from_conv(nn.Conv2d(3, 3, 3), 2)
    with pytest.raises(ValueError, match="padding_mode='reflect'"):
        ReDilatedConv2d.from_conv(nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), 2)
    with pytest.raises(ValueError, match="conv='Conv1d'"):
        ReDilatedConv2d.from_conv(nn.Conv1d(3, 3, 3, padding=1), 2)
    with pytest.raises(ValueError, match="conv=Linear"):
        ReDilatedConv2d.from_conv(nn.Linear(3, 3), 2)
    for name, options in (
        ("small", {"small": 2}),
        ("large", {"large": 4}),
        ("eta", {"eta": -1}),
        ("ndim", {"ndim": 4}),
    ):
        with pytest.raises(ValueError, match=f"{name}="):
            dispersion_matrix(**options)
    with pytest.raises(ValueError, match="matrix of shape"):
        disperse_kernel(torch.zeros(1, 1, 5, 5), dispersion_matrix())
    with pytest.raises(ValueError, match="kernel_size"):
        DispersedConv2d(3, kernel_size=(3, 5))


def test_schedule():
    assert [step_factor(4, i, 35, True) for i in range(35)] == [4] * 9 + [3] * 9 + [2] * 17
    assert step_factor(2.5, 3, 10) == 2.5
    assert step_factor(2.5, 10, 10) is None
    assert step_factor(3, 0, 10, dispersed=True) == 1.5
    assert step_factor(3, 9, 10, True, True) == 1
    with pytest.raises(ValueError, match="step=-1"):
        step_factor(2, -1, 10)


def equations(n: int, eta: float) -> tuple[np.ndarray, np.ndarray]:
    """The least-squares problem by running convolutions on unit maps and unit kernels (3 → 5, twice enlarged)."""

    def column(tap: int, k: int, large: bool) -> np.ndarray:
        kernel = F.one_hot(torch.tensor(tap), k * k).double().reshape(1, 1, k, k)
        maps = torch.eye(n * n, dtype=torch.float64).reshape(-1, 1, n, n)
        up = lambda t: F.interpolate(t, (2 * n - 1, 2 * n - 1), mode="bilinear", align_corners=True)  # noqa: E731
        conv = lambda t: F.conv2d(t, kernel, padding=k // 2)  # noqa: E731
        structure = conv(up(maps)) if large else up(conv(maps))
        return np.concatenate([structure.numpy().ravel(), eta * conv(maps).numpy().ravel()])

    return (
        np.stack([column(t, 5, True) for t in range(25)], 1),
        np.stack([column(t, 3, False) for t in range(9)], 1),
    )


@pytest.mark.parametrize(("n", "eta"), [(3, 0.05), (4, 0.3)])
def test_dispersion_solves_its_normal_equations(n, eta):
    a, b = equations(n, eta)
    residual = a @ dispersion_matrix(3, 5, n, 2, eta).numpy() - b
    assert np.abs(a.T @ residual).max() < 1e-12
    assert np.abs(residual).max() > 0.01  # it is a fit, not an equality


def test_properties_of_the_dispersion_matrix():
    matrix = dispersion_matrix()
    centre = F.one_hot(torch.tensor(12), 25).double()
    torch.testing.assert_close(matrix[:, 4], centre, atol=1e-12, rtol=0)
    kernels = torch.eye(9, dtype=torch.float64).reshape(9, 1, 3, 3)
    for turns, flip in itertools.product(range(4), (False, True)):
        change = lambda t: (t.flip(2) if flip else t).rot90(turns, (2, 3))  # noqa: B023, E731
        torch.testing.assert_close(disperse_kernel(change(kernels), matrix), change(disperse_kernel(kernels, matrix)))
    padded = F.pad(kernels, (1, 1, 1, 1))
    torch.testing.assert_close(disperse_kernel(kernels, dispersion_matrix(eta=1e4)), padded, atol=1e-6, rtol=0)
    gains = [float(dispersion_matrix(size=n).sum()) / 9 - 1 for n in (3, 5, 7)]
    assert [round(g, 3) for g in gains] == [0.084, 0.031, 0.016]
    assert [round(float(s), 3) for s in matrix.sum(0)[[4, 1, 0]]] == [1.0, 1.061, 1.127]
    kept = dispersion_matrix(preserve_sum=True)
    torch.testing.assert_close(kept.sum(0), torch.ones(9, dtype=torch.float64))
    torch.testing.assert_close(kept - matrix, (kept - matrix).mean(0, keepdim=True).expand(25, 9))


@pytest.mark.parametrize(
    ("name", "left_out"),
    [("redilate_f2.5", ("in_channels", "out_channels", "kernel_size", "stride", "padding", "mode"))],
)
def test_parity_reads_what_the_config_leaves_out(name, left_out):
    """Sizes are those of the parameters where a case does not say them."""
    case = read_case(Path(__file__).parents[1] / "golden" / "scalecrafter" / f"{name}.safetensors")
    assert set(left_out) <= set(case.config)
    config = {k: v for k, v in case.config.items() if k not in left_out}
    assert all(t.passed for t in run_case(replace(case, config=config)))


@pytest.mark.parametrize("ndim", [1, 3])
def test_dispersion_in_other_dimensions(ndim):
    matrix = dispersion_matrix(ndim=ndim)
    assert matrix.shape == (5**ndim, 3**ndim)
    centre = F.one_hot(torch.tensor(5**ndim // 2), 5**ndim).double()
    torch.testing.assert_close(matrix[:, 3**ndim // 2], centre, atol=1e-10, rtol=0)


def test_dispersed_convolution():
    layer = DispersedConv2d(4, 6, groups=2, stride=2, size=5, preserve_sum=True).double()
    large = disperse_kernel(layer.weight, dispersion_matrix(size=5, preserve_sum=True))
    x = noise(2, 4, 9, 8)
    torch.testing.assert_close(layer(x), F.conv2d(x, large, layer.bias, 2, 2, groups=2))
    conv = nn.Conv2d(4, 6, 3, padding=1).double()
    dispersed = disperse_conv(conv, dispersion_matrix())
    assert (dispersed.kernel_size, dispersed.padding) == ((5, 5), (2, 2))
    assert ReDilatedConv2d.from_conv(dispersed, 1.5)(x).shape == (2, 6, 9, 8)
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert DispersedConv2d(2, large=9).merge().kernel_size == (9, 9)


def test_guidance():
    uncond, text, vanilla = noise(2, 3), noise(3, 2).T, noise(1, 3)
    plain = classifier_free_guidance(uncond, text, 7.5)
    torch.testing.assert_close(noise_damped_guidance(uncond, uncond, text, 7.5), plain)
    torch.testing.assert_close(noise_damped_guidance(uncond, uncond, text, 1.0), text)
    torch.testing.assert_close(noise_damped_guidance(vanilla, uncond, text, 7.5) - plain, vanilla - uncond)
    assert attention_scale(256, 256) == 1
    assert attention_scale(16, 256) == pytest.approx(2**0.5)
    with pytest.raises(ValueError, match="tokens=1"):
        attention_scale(16, 1)


def test_unet():
    net = SmallUNet(3, (4, 6), context=5, out_channels=2)
    x, context = torch.randn(2, 3, 8, 12), torch.randn(2, 5)
    y = net(x, 400, context)
    assert y.shape == (2, 2, 8, 12)
    torch.testing.assert_close(net(x, torch.tensor([400.0, 400.0]), context), y)
    assert not torch.allclose(net(x, 100, context), y)
    y.sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    with pytest.raises(ValueError, match="must be even"):
        net(x[..., :7], 400, context)
    with pytest.raises(ValueError, match="channels="):
        SmallUNet(3, (4, 6, 8))
