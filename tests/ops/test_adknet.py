"""ADK-Net's operator and the content-adaptive resampler: against loops, limits, options, refusals."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from tests.parity.core import Case, run_case
from torchconv.ops import _adknet_fractional
from torchconv.ops.adknet import (
    ADKConv1d,
    ADKConv2d,
    ADKConv3d,
    CARDownscale2d,
    adaptive_downscale,
    fractional_downscale,
    normalise_kernels,
)


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def randomise(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4)
    return module


def loops(x, kernels, down, right, k, unit, pad):
    """The equations of the sampler, one tap at a time."""
    height, width = x.shape[2:]
    xp = F.pad(x, (pad,) * 4, mode="reflect")
    limits = xp.shape[2:]
    h, w = kernels.shape[2:]
    out = torch.zeros(*x.shape[:2], h, w, dtype=x.dtype)
    for n, p, q, a, d in itertools.product(range(x.shape[0]), range(h), range(w), range(k), range(k)):
        t = a * k + d
        py = (p + 0.5) / h * height + a + float(down[n, t, p, q]) * unit - 0.5
        px = (q + 0.5) / w * width + d + float(right[n, t, p, q]) * unit - 0.5
        rows, columns = [], []
        for at, limit, found in ((py, limits[0], rows), (px, limits[1], columns)):
            first = min(max(math.floor(at), 0), limit - 1)
            found.extend([first, min(first + 1, limit - 1), at - math.floor(at)])
        (y0, y1, fy), (x0, x1, fx) = rows, columns
        above = (1 - fx) * xp[n, :, y0, x0] + fx * xp[n, :, y0, x1]
        below = (1 - fx) * xp[n, :, y1, x0] + fx * xp[n, :, y1, x1]
        out[n, :, p, q] += kernels[n, t, p, q] * ((1 - fy) * above + fy * below)
    return out


@pytest.mark.parametrize(
    ("size", "scale", "k", "unit", "pad"),
    [((6, 8), 2, 3, 2.0, 1), ((7, 9), 3, 2, 0.5, 1), ((8, 8), 4, 5, 9.0, 4), ((5, 4), 1, 1, 1.5, 0)],
)
def test_fractional_taps_equal_the_loops(size, scale, k, unit, pad, monkeypatch):
    h, w = (n // scale for n in size)
    x, kernels = noise(2, 3, *size), noise(2, k * k, h, w, seed=1)
    down, right = noise(2, k * k, h, w, seed=2), noise(2, k * k, h, w, seed=3)
    expected = loops(x, kernels, down, right, k, unit, pad)
    for chunk in (1, 1 << 20):
        monkeypatch.setattr(_adknet_fractional, "_CHUNK", chunk)
        torch.testing.assert_close(fractional_downscale(x, kernels, down, right, scale, k, unit, pad), expected)
    defaults = fractional_downscale(x, kernels, down, right, scale)
    torch.testing.assert_close(defaults, loops(x, kernels, down, right, k, scale, k // 2))


def test_no_offsets_and_odd_sizes_are_the_integer_taps():
    x, kernels = noise(2, 3, 9, 12), noise(2, 25, 3, 4, seed=1)
    still = torch.zeros_like(kernels)
    expected = adaptive_downscale(x, kernels.unsqueeze(1), 3, 5, "none")
    torch.testing.assert_close(fractional_downscale(x, kernels, still, still, 3), expected)


def test_fractional_gradients(monkeypatch):
    x = noise(1, 2, 5, 6).requires_grad_()
    others = [(noise(1, 4, 2, 3, seed=s) * 0.4).requires_grad_() for s in (1, 2, 3)]

    def run(*tensors):
        return fractional_downscale(*tensors, 2)

    assert torch.autograd.gradcheck(run, (x, *others), fast_mode=True)
    g = noise(1, 2, 2, 3, seed=4)
    expected = torch.autograd.grad(run(x, *others), (x, *others), g)
    monkeypatch.setattr(_adknet_fractional, "_CHUNK", 1)
    torch.testing.assert_close(torch.autograd.grad(run(x, *others), (x, *others), g), expected)
    assert torch.autograd.gradgradcheck(run, (x, *others), fast_mode=True)
    only = torch.autograd.grad(run(x.detach(), others[0].detach(), others[1], others[2].detach()), others[1], g)
    torch.testing.assert_close(only[0], expected[2])


def test_fractional_form_keeps_no_samples():
    x, kernels = noise(1, 3, 16, 16).requires_grad_(), noise(1, 49, 8, 8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fractional_downscale(x, kernels, kernels, kernels, 2)
    assert max(t.numel() for t in kept) == 49 * 64


@pytest.mark.parametrize("normalisation", ["softmax", "sum", "none"])
@pytest.mark.parametrize(("build", "size"), [(ADKConv1d, (11,)), (ADKConv2d, (7, 6)), (ADKConv3d, (4, 5, 3))])
def test_operator_is_its_kernels_applied(build, size, normalisation):
    layer = randomise(build(3, stride=2, kernel_size=3, normalisation=normalisation))
    x = noise(2, 3, *size)
    kernels = layer.kernels(x)
    assert kernels.shape == (2, 3, 3 ** len(size), *(-(-n // 2) for n in size))
    torch.testing.assert_close(layer(x), adaptive_downscale(x, kernels, 2, normalisation="none"))
    torch.testing.assert_close(normalise_kernels(layer.kernels(x, normalised=False), normalisation), kernels)


@pytest.mark.parametrize("normalisation", ["softmax", "sum", "none"])
@pytest.mark.parametrize(("stride", "k"), [(1, 3), (1, 4), (2, 6), (2, 5), (3, 9)])
def test_starts_as_a_gaussian_on_the_output_pixel(stride, k, normalisation):
    layer = ADKConv1d(2, kernel_size=k, stride=stride, normalisation=normalisation).double()
    ramp = torch.arange(60.0, dtype=torch.float64).expand(1, 2, 60)
    y = layer(ramp)[0, 0, 4:-4]
    centres = stride * torch.arange(4, 4 + len(y), dtype=torch.float64) + (stride - 1) / 2
    # A window that is cut off unevenly pulls a little to one side.
    assert (y - centres).abs().max() < (1e-4 if (k - stride) % 2 == 0 else 0.15 * stride)


@pytest.mark.parametrize("k", [6, 7])
def test_resampler_starts_centred(k):
    layer = CARDownscale2d(1, 2, k).double()
    torch.nn.init.zeros_(layer.offset_head.weight)
    ramp = torch.arange(40.0, dtype=torch.float64).expand(1, 1, 40, 40)
    y = layer(ramp)[0, 0, 10, 5:-5]
    assert (y - (2 * torch.arange(5, 15) + 0.5)).abs().max() < 0.15


def test_kernels_follow_the_content_and_gradients_reach_everything():
    layer = randomise(ADKConv2d(3, kernel_size=4, stride=2, width=5))
    x = noise(2, 3, 8, 10).requires_grad_()
    kernels = layer.kernels(x)
    assert kernels.std(dim=(3, 4)).min() > 1e-4
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()), fast_mode=True)
    layer(x).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in layer.parameters())


@pytest.mark.parametrize(("channels", "stride", "width"), [(3, 2, 16), (5, 1, 4)])
def test_parameter_count(channels, stride, width):
    layer = ADKConv2d(channels, stride=stride, width=width)
    taps = (3 * stride) ** 2
    count = taps * channels * width + 9 * width**2 + width * channels * taps + 2 * width + channels * taps
    assert sum(p.numel() for p in layer.parameters()) == count
    bare = ADKConv2d(channels, stride=stride, width=width, bias=False)
    assert sum(p.numel() for p in bare.parameters()) == count - 2 * width
    assert layer.param_options() == {"base": {"weight_decay": 0.0}}


def test_tiny_maps_and_sizes_that_the_stride_does_not_divide():
    for size in ((1, 1), (2, 3), (5, 7)):
        x = noise(1, 2, *size)
        assert ADKConv2d(2, stride=2).double()(x).shape[2:] == tuple(-(-n // 2) for n in size)
        assert CARDownscale2d(2, 2).double()(x).shape[2:] == tuple(max(1, n // 2) for n in size)


def test_refusals():
    with pytest.raises(ValueError, match=r"normalisation='l1'"):
        ADKConv2d(3, normalisation="l1")
    with pytest.raises(ValueError, match="width=0"):
        ADKConv2d(3, width=0)
    with pytest.raises(ValueError, match="out_channels=4"):
        ADKConv2d(3, 4)
    with pytest.raises(ValueError, match="scale=0"):
        CARDownscale2d(3, 0)
    x, k = noise(1, 3, 8, 8), noise(1, 9, 4, 4)
    with pytest.raises(ValueError, match="offsets_h of shape"):
        fractional_downscale(x, k, k, k[..., :3], 2)
    with pytest.raises(ValueError, match=r"offsets_v=\(1, 4, 4, 4\)"):
        fractional_downscale(x, k, k[:, :4], k, 2)
    with pytest.raises(ValueError, match="kernel_size=2"):
        fractional_downscale(x, k, k, k, 2, 2)
    with pytest.raises(ValueError, match="padding=-1"):
        fractional_downscale(x, k, k, k, 2, padding=-1)
    with pytest.raises(ValueError, match="x of shape"):
        fractional_downscale(x[0], k, k, k, 2)
    with pytest.raises(ValueError, match=r"padding=1\.5"):
        fractional_downscale(x, k, k, k, 2, padding=1.5)
    for layer in (ADKConv2d(3), CARDownscale2d(3)):
        with pytest.raises(ValueError, match="nothing to mirror"):
            layer.double()(x[:, :, :0])


def test_fractional_form_under_vmap():
    x, k, offsets = noise(3, 2, 4, 4), noise(3, 9, 2, 2), noise(2, 3, 9, 2, 2)

    def one(x, k, down, right):
        return fractional_downscale(x[None], k[None], down[None], right[None], 2)[0]

    found = torch.func.vmap(one)(x, k, *offsets)
    torch.testing.assert_close(found, fractional_downscale(x, k, *offsets, 2))


def test_parity_of_one_kernel_for_all_colours():
    x, logits, cotangent = noise(1, 3, 4, 6), noise(1, 4, 2, 3).requires_grad_(), noise(1, 3, 2, 3)
    kernels = logits.softmax(1)
    y = adaptive_downscale(x, kernels[:, None], 2, 2, "none")
    by_logits, by_kernels = torch.autograd.grad((y * cotangent).sum(), (logits, kernels))
    inputs = {"image": x, "logits": logits.detach(), "cotangent": cotangent}
    outputs = {"y": y.detach(), "kernels": kernels.detach()}
    grads = {"logits": by_logits, "kernels": by_kernels}
    case = Case("adknet", "shared", {"scale": 2}, "", "eval", "", None, None, {}, inputs, outputs, grads)
    assert all(t.passed for t in run_case(case))


def test_claim_task_follows_the_content():
    from torchconv.claims.adknet import _batch, _static_kernels

    x, y = _batch(4, torch.Generator().manual_seed(0))
    assert y.shape == (4, 3, *(n // 2 for n in x.shape[2:]))
    one = torch.ones_like(x)
    wide, narrow = _static_kernels()
    for kernels in (wide, narrow):
        assert torch.allclose(kernels.sum(1), torch.ones(3))
        again = adaptive_downscale(one, kernels[None, :, :, None, None].expand(4, 3, 36, *y.shape[2:]), 2, 6, "none")
        assert torch.allclose(again, torch.ones_like(y), atol=1e-5)
