"""Downscaling with a kernel per output pixel: against loops, its identities, both ways to compute it, gradients."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels._interpreted import check_in_interpreter
from torchconv.kernels import adaptive_downscale, resample
from torchconv.kernels.resample import mirror_pad, normalise_kernels


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def fold(index, length):
    while not 0 <= index < length:
        index = -index if index < 0 else 2 * (length - 1) - index
        if length == 1:
            return 0
    return index


def loops(x, weights, scale, size):
    """The definition, one output number at a time."""
    out = torch.zeros(*x.shape[:2], *weights.shape[3:], dtype=x.dtype)
    for place in itertools.product(*(range(n) for n in out.shape[2:])):
        for number, tap in enumerate(itertools.product(*(range(k) for k in size))):
            source = [
                fold(s * p + (s - k) // 2 + t, n)
                for s, p, k, t, n in zip(scale, place, size, tap, x.shape[2:], strict=True)
            ]
            out[(..., *place)] += weights[(slice(None), slice(None), number, *place)] * x[(..., *source)]
    return out


def test_triton_kernels():
    check_in_interpreter("resample")


axis = st.tuples(st.integers(1, 7), st.integers(1, 3), st.integers(1, 5), st.booleans())


@settings(max_examples=40, deadline=None)
@given(st.lists(axis, min_size=1, max_size=2), st.integers(0, 2), st.integers(1, 3), st.booleans(), st.integers(0, 99))
def test_both_ways_equal_the_definition(axes, batch, channels, shared, seed):
    lengths, scale, size, up = zip(*axes, strict=True)
    grid = [-(-n // s) if u else max(1, n // s) for n, s, u in zip(lengths, scale, up, strict=True)]
    groups, taps = 1 if shared else channels, torch.Size(size).numel()
    x, kernels = noise(batch, channels, *lengths, seed=seed), noise(batch, groups, taps, *grid, seed=seed + 1)
    for normalisation in ("softmax", "sum", "none"):
        expected = loops(x, normalise_kernels(kernels, normalisation), scale, size)
        ours = adaptive_downscale(x, kernels, scale, size, normalisation)
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
        spans = [((s - k) // 2, (s - k) // 2 + s * (n - 1) + k) for s, k, n in zip(scale, size, grid, strict=True)]
        plain = resample._composite(mirror_pad(x, spans), kernels, scale, size, normalisation)
        torch.testing.assert_close(plain, expected, rtol=1e-12, atol=1e-12)


def test_volumes():
    x, kernels = noise(1, 2, 4, 3, 5), noise(1, 2, 12, 2, 3, 3)
    ours = adaptive_downscale(x, kernels, (2, 1, 2), (3, 2, 2), "none")
    torch.testing.assert_close(ours, loops(x, kernels, (2, 1, 2), (3, 2, 2)))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(-9, 5), st.integers(1, 12))
def test_mirrors_are_those_of_numpy(length, begin, count):
    x = np.arange(float(length))
    before, after = max(0, -begin), max(0, begin + count - length)
    expected = np.pad(x, (before, after), mode="reflect") if length > 1 else np.zeros(before + length + after)
    ours = mirror_pad(torch.from_numpy(x)[None, None], [(begin, begin + count)])
    assert ours[0, 0].tolist() == expected[begin + before : begin + before + count].tolist()


@pytest.mark.parametrize("normalisation", ["softmax", "sum", "none"])
@pytest.mark.parametrize(
    ("channels", "groups", "size", "grid", "scale", "kernel"),
    [
        (2, 2, (6, 4), (3, 2), 2, (4, 4)),
        (3, 1, (5, 4), (2, 2), 2, (3, 2)),
        (2, 2, (7,), (3,), 3, (5,)),
        (2, 1, (2, 3), (2, 3), 1, (3, 3)),
    ],
)
def test_gradients(normalisation, channels, groups, size, grid, scale, kernel):
    x = noise(2, channels, *size).requires_grad_()
    # "sum" has kinks at 1e-6 and 1.
    kernels = noise(2, groups, torch.Size(kernel).numel(), *grid, seed=1)
    kernels = torch.where((kernels - 1).abs() < 0.01, 0.5, kernels).requires_grad_()

    def run(x, kernels):
        return adaptive_downscale(x, kernels, scale, kernel, normalisation)

    assert torch.autograd.gradcheck(run, (x, kernels), check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (x, kernels), fast_mode=True)


def test_gradients_in_blocks(monkeypatch):
    """The same numbers whatever the block, and where only one gradient is wanted."""
    x, kernels = noise(3, 2, 12, 10).requires_grad_(), noise(3, 2, 9, 6, 5, seed=1).requires_grad_()
    g = noise(3, 2, 6, 5, seed=2)
    expected = torch.autograd.grad(adaptive_downscale(x, kernels, 2), (x, kernels), g)
    for block in (1, 200, 600):
        monkeypatch.setattr(resample, "_BLOCK", block)
        y = adaptive_downscale(x, kernels, 2)
        torch.testing.assert_close(torch.autograd.grad(y, (x, kernels), g), expected)
    only_x = torch.autograd.grad(adaptive_downscale(x, kernels.detach(), 2), x, g)[0]
    only_kernels = torch.autograd.grad(adaptive_downscale(x.detach(), kernels, 2), kernels, g)[0]
    torch.testing.assert_close((only_x, only_kernels), expected)


def test_what_is_kept_for_the_gradient():
    x, kernels = noise(1, 3, 16, 16).requires_grad_(), noise(1, 3, 36, 8, 8).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        adaptive_downscale(x, kernels, 2)
    assert sorted(t.numel() for t in kept) == [x.numel(), 3 * 20 * 20, kernels.numel()]


def test_delta_and_box_kernels():
    x = noise(2, 3, 8, 12)
    delta = torch.zeros(2, 3, 9, 8, 12, dtype=x.dtype)
    delta[:, :, 4] = 1
    torch.testing.assert_close(adaptive_downscale(x, delta, 1, normalisation="none"), x)
    flat = torch.zeros(2, 1, 4, 4, 6, dtype=x.dtype)
    torch.testing.assert_close(adaptive_downscale(x, flat, 2), F.avg_pool2d(x, 2))
    odd = torch.zeros(2, 3, 9, 2, 4, dtype=x.dtype)
    odd[:, :, 4] = 1
    torch.testing.assert_close(adaptive_downscale(x, odd, 3, normalisation="none"), x[..., 1:-1:3, 1::3])


def test_constant_kernels_are_a_strided_convolution():
    x, kernel = noise(2, 3, 9, 12), noise(3, 1, 5, 5, seed=1)
    per_pixel = kernel.reshape(1, 3, 25, 1, 1).expand(2, 3, 25, 3, 4)
    expected = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), kernel, stride=3, groups=3)
    torch.testing.assert_close(adaptive_downscale(x, per_pixel, 3, normalisation="none"), expected)


def test_antialiased_bicubic():
    """Its taps as kernels give PyTorch's own result away from the border."""
    d = (torch.arange(8, dtype=torch.float64) - 3.5).abs() / 2
    near, far = 1.5 * d**3 - 2.5 * d**2 + 1, -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
    taps = torch.where(d < 1, near, far)
    taps = taps / taps.sum()
    x = noise(1, 2, 24, 20)
    kernels = torch.outer(taps, taps).reshape(1, 1, 64, 1, 1).expand(1, 1, 64, 12, 10)
    ours = adaptive_downscale(x, kernels, 2, normalisation="none")
    expected = F.interpolate(x, scale_factor=0.5, mode="bicubic", antialias=True)
    torch.testing.assert_close(ours[..., 2:-2, 2:-2], expected[..., 2:-2, 2:-2])


def test_normalised_kernels_average():
    kernels = noise(2, 3, 16, 4, 5, seed=1)
    constant = torch.full((2, 3, 8, 10), 0.7, dtype=torch.float64)
    for normalisation in ("softmax", "sum"):
        assert (adaptive_downscale(constant, kernels, 2, normalisation=normalisation) - 0.7).abs().max() < 1e-12
    x = noise(2, 3, 8, 10)
    y = adaptive_downscale(x, kernels, 2)
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
    assert (y <= F.max_pool2d(padded, 4, 2)).all()
    assert (y >= -F.max_pool2d(-padded, 4, 2)).all()


def test_colours_are_independent():
    x, kernels = noise(1, 3, 8, 8), noise(1, 3, 9, 4, 4, seed=1).requires_grad_()
    (by,) = torch.autograd.grad(adaptive_downscale(x, kernels, 2)[:, 0].sum(), kernels)
    assert by[:, 0].abs().max() > 0
    assert by[:, 1:].abs().max() == 0


def test_shift_of_map_and_kernels():
    x, kernels = noise(1, 2, 24, 9), noise(1, 2, 9, 8, 3, seed=1)
    y = adaptive_downscale(x, kernels, 3)
    moved = adaptive_downscale(x.roll(3, 2), kernels.roll(1, 3), 3)
    torch.testing.assert_close(moved[:, :, 2:-1], y[:, :, 1:-2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_float32(dtype):
    x, kernels = noise(2, 3, 12, 12, dtype=dtype), noise(2, 3, 36, 6, 6, seed=1, dtype=dtype)
    y = adaptive_downscale(x, kernels, 2)
    assert y.dtype == dtype
    expected = adaptive_downscale(x.double(), kernels.double(), 2)
    assert (y.double() - expected).abs().max() <= torch.finfo(dtype).eps * expected.abs().max()
    assert adaptive_downscale(x, kernels.float(), 2).dtype == torch.float32
    x.requires_grad_()
    kernels.requires_grad_()
    by_x, by_kernels = torch.autograd.grad(adaptive_downscale(x, kernels, 2).float().sum(), (x, kernels))
    assert by_x.dtype == by_kernels.dtype == dtype


def test_registration_compiling_exporting_and_mapping():
    x, kernels = noise(2, 3, 8, 6).requires_grad_(), noise(2, 3, 9, 4, 3, seed=1).requires_grad_()
    arguments = (mirror_pad(x, [(-1, 8), (-1, 6)]).detach().requires_grad_(), kernels, (2, 2), (3, 3), "sum")
    torch.library.opcheck(torch.ops.torchconv.adaptive_downscale.default, arguments)

    def run(x, kernels):
        return adaptive_downscale(x, kernels, 2)

    expected = run(x, kernels)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, kernels), expected)
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x, kernels).square().sum(), (x, kernels)),
        torch.autograd.grad(expected.square().sum(), (x, kernels)),
    )

    class Net(torch.nn.Module):
        def forward(self, x, kernels):
            return run(x, kernels)

    program = torch.export.export(Net(), (x.detach(), kernels.detach()))
    assert "torchconv" not in program.graph_module.code
    torch.testing.assert_close(program.module()(x, kernels), expected)
    one = torch.func.vmap(lambda a, b: run(a[None], b[None])[0])(x, kernels)
    torch.testing.assert_close(one, expected)


def test_channels_last_is_kept():
    x = noise(2, 3, 8, 6).contiguous(memory_format=torch.channels_last)
    y = adaptive_downscale(x, noise(2, 3, 9, 4, 3), 2)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, adaptive_downscale(x.contiguous(), noise(2, 3, 9, 4, 3), 2))


def test_refusals():
    x, kernels = noise(2, 3, 8, 6), noise(2, 3, 9, 4, 3)
    with pytest.raises(ValueError, match=r"kernels of shape .*expected \(2, 1 or 3, taps, 4, 3\)"):
        adaptive_downscale(x, kernels[..., :2], 2)
    with pytest.raises(ValueError, match="kernels of shape"):
        adaptive_downscale(x, kernels[:, :2], 2)
    with pytest.raises(ValueError, match=r"kernels\.shape=.*k\^2"):
        adaptive_downscale(x, kernels[:, :, :8], 2)
    with pytest.raises(ValueError, match="kernel_size=2: has 4 taps"):
        adaptive_downscale(x, kernels, 2, 2)
    with pytest.raises(ValueError, match=r"scale=2\.5"):
        adaptive_downscale(x, kernels, 2.5)
    with pytest.raises(ValueError, match=r"kernels\.dtype="):
        adaptive_downscale(x, kernels.long(), 2)
    with pytest.raises(ValueError, match=r"kernels\.device="):
        adaptive_downscale(x, kernels.to("meta"), 2)
    with pytest.raises(ValueError, match="scale=0"):
        adaptive_downscale(x, kernels, 0)
    with pytest.raises(ValueError, match="normalisation='l2'"):
        adaptive_downscale(x, kernels, 2, normalisation="l2")
    with pytest.raises(ValueError, match="x of shape"):
        adaptive_downscale(x[0, 0], kernels, 2)
