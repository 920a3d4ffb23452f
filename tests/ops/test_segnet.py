"""Pooling and unpooling against loops and PyTorch, their identities, and a level of SegNet."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from torchconv.kernels._layout import channels_last_format
from torchconv.ops.segnet import IndexPool, IndexUnpool, index_pool, index_unpool, plane_indices
from torchconv.ops.segnet_level import SegNetLevel1d, SegNetLevel2d, SegNetLevel3d

POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
LEVELS = {1: SegNetLevel1d, 2: SegNetLevel2d, 3: SegNetLevel3d}


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loops(x, kernel, stride):
    """Clipped windows, the first maximum in row-major order; the map of the maxima."""
    size = x.shape[2:]
    counts = [math.ceil((n - kernel) / stride) + 1 for n in size]
    pooled, index = x.new_zeros(*x.shape[:2], *counts), torch.zeros(*x.shape[:2], *counts, dtype=torch.long)
    unpooled = torch.zeros_like(x)
    for n, c in itertools.product(range(x.shape[0]), range(x.shape[1])):
        for window in itertools.product(*(range(k) for k in counts)):
            spans = [
                range(w * stride, min(w * stride + kernel, length)) for w, length in zip(window, size, strict=True)
            ]
            best = None
            for place in itertools.product(*spans):
                if best is None or x[(n, c, *place)] > x[(n, c, *best)]:
                    best = place
            flat = 0
            for i, length in zip(best, size, strict=True):
                flat = flat * length + i
            pooled[(n, c, *window)], index[(n, c, *window)] = x[(n, c, *best)], flat
            unpooled[(n, c, *best)] = x[(n, c, *best)]
    return pooled, index, unpooled


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(3, 8), st.integers(3, 6), st.integers(0, 99)
)
def test_equals_loops(ndim, kernel, stride, a, b, seed):
    stride = min(stride, kernel)
    x = noise(1, 2, *(a, b, 4)[:ndim], seed=seed).mul(2).round()  # with many ties
    pooled, index, unpooled = loops(x, kernel, stride)
    ours, offsets = index_pool(x, kernel, stride)
    assert offsets.dtype == torch.uint8
    assert torch.equal(ours, pooled)
    assert torch.equal(plane_indices(offsets, x.shape[2:], kernel, stride), index)
    assert torch.equal(index_unpool(ours, offsets, x.shape[2:], kernel, stride), unpooled)


@pytest.mark.parametrize("ceil_mode", [True, False])
@pytest.mark.parametrize("shape", [(7, 9), (8, 6), (1, 5), (2, 2)])
def test_equals_pytorch_with_gradients(shape, ceil_mode):
    if not ceil_mode and min(shape) < 2:
        pytest.skip("no window fits")
    x = noise(2, 3, *shape).requires_grad_()
    cotangent = noise(2, 3, *shape, seed=1)
    expected, index = F.max_pool2d(x, 2, ceil_mode=ceil_mode, return_indices=True)
    full = F.max_unpool2d(expected, index, 2, output_size=shape)
    (wanted,) = torch.autograd.grad((full * cotangent).sum(), x)
    pooled, offsets = index_pool(x, ceil_mode=ceil_mode)
    y = index_unpool(pooled, offsets, shape)
    assert torch.equal(y, full)
    assert torch.equal(torch.autograd.grad((y * cotangent).sum(), x)[0], wanted)


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_many_channels_in_both_layouts(ndim, stride):
    """Maps of many channels take another way on a CPU; windows of -inf alone have their first place."""
    x = noise(2, 9, *(9, 7, 6)[:ndim]).mul(2).round()
    x = x.masked_fill(noise(*x.shape, seed=1) < 0.5, -math.inf)
    expected, index = POOL[ndim](x, 2, stride, ceil_mode=True, return_indices=True)
    formats = [torch.contiguous_format, *([] if ndim == 1 else [channels_last_format(ndim)])]
    for layout in formats:
        ours, offsets = index_pool(x.contiguous(memory_format=layout), 2, stride)
        assert torch.equal(ours, expected)
        assert torch.equal(plane_indices(offsets, x.shape[2:], 2, stride), index)
        assert all(t.is_contiguous(memory_format=layout) for t in (ours, offsets))
        y = index_unpool(ours, offsets, x.shape[2:], 2, stride)
        assert y.is_contiguous(memory_format=layout)
        assert torch.equal(y.flatten(2).gather(2, index.flatten(2)), expected.flatten(2))


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_gradcheck_twice(ndim):
    shape = (5, 4, 3)[:ndim]
    x = noise(1, 2, *shape).requires_grad_()

    def run(x):
        # Windows that share a maximum have unpooled values that no difference quotient can tell apart: step as wide.
        pooled, offsets = index_pool(x)
        return index_pool(x, 3, 2)[0], index_unpool(pooled * 2, offsets, shape)

    assert torch.autograd.gradcheck(run, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: run(x)[0].square() + run(x)[1].square().sum(), (x,), fast_mode=True)


def test_identities():
    x = noise(2, 3, 7, 9).abs() + 0.1
    pooled, offsets = index_pool(x)
    y = index_unpool(pooled, offsets, (7, 9))
    assert torch.equal(index_pool(y)[0], pooled)
    assert torch.equal(torch.where(y != 0, x, 0.0), y)
    assert int((y != 0).sum()) == pooled.numel()
    torch.testing.assert_close(y.sum(), pooled.sum())
    scaled = index_pool(3 * x)
    torch.testing.assert_close(index_unpool(*scaled, (7, 9)), 3 * y)
    moved = index_pool(F.pad(x, (2, 0, 4, 0), value=-1.0))
    assert torch.equal(index_unpool(*moved, (11, 11))[..., 4:, 2:], y)


def test_gradient_is_the_mask_of_the_maxima():
    x = noise(1, 2, 5, 7).requires_grad_()
    pooled, offsets = index_pool(x)
    y = index_unpool(pooled, offsets, (5, 7))
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, (y != 0).double())


def test_remembers_bytes():
    """Saved for the backward pass: one byte a window, for both directions together."""
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    x = torch.randn(1, 4, 32, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        pooled, offsets = index_pool(x)
        index_unpool(pooled, offsets, (32, 32))
    storages = {t.data_ptr(): t.numel() * t.element_size() for t in saved}
    assert sum(storages.values()) == pooled.numel()


def test_large_windows_have_wide_places():
    x = noise(1, 1, 40, 40)
    pooled, offsets = index_pool(x, 20)
    assert offsets.dtype == torch.int32
    assert torch.equal(pooled, F.max_pool2d(x, 20))
    assert int((index_unpool(pooled, offsets, (40, 40), 20) != 0).sum()) == 4


def test_layouts_batches_and_modules():
    x = torch.randn(2, 4, 7, 6).contiguous(memory_format=torch.channels_last)
    pooled, offsets, size = IndexPool()(x)
    assert pooled.is_contiguous(memory_format=torch.channels_last)
    y = IndexUnpool()(pooled, offsets, size)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, index_unpool(*index_pool(x.contiguous()), size))
    empty = index_pool(torch.zeros(0, 3, 5, 5))
    assert index_unpool(*empty, (5, 5)).shape == (0, 3, 5, 5)
    half, _ = index_pool(x.bfloat16())
    assert torch.equal(half, POOL[2](x.bfloat16(), 2, ceil_mode=True))


def test_bad_arguments():
    pooled, offsets = index_pool(noise(1, 1, 4, 4))
    with pytest.raises(ValueError, match="size="):
        index_unpool(pooled, offsets, (4,))
    with pytest.raises(ValueError, match="offsets of shape"):
        index_unpool(pooled[..., :1], offsets, (4, 4))
    with pytest.raises(ValueError, match=r"size=\(20, 20\)"):
        index_unpool(pooled, offsets, (20, 20))
    with pytest.raises(ValueError, match=r"offsets.dtype=torch.int64"):
        index_unpool(pooled, plane_indices(offsets, (4, 4)), (4, 4))
    with pytest.raises(ValueError, match="kernel_size=0"):
        index_pool(noise(1, 1, 4), 0)
    with pytest.raises(ValueError, match="kernel_size=3: leaves no window"):
        index_pool(noise(1, 1, 4, 2), 3, ceil_mode=False)
    for shape in ((3, 4), (1, 1, 0, 4)):
        with pytest.raises(ValueError, match="x of shape"):
            index_pool(noise(*shape))


class TestLevel:
    @pytest.mark.parametrize("ndim", [1, 2, 3])
    def test_is_the_definition(self, ndim):
        level = LEVELS[ndim](2, 3, width=4, kernel_size=3, depth=2, decoder_relu=True).double().eval()
        x = noise(2, 2, *(7, 5, 3)[:ndim])
        z = x
        for block in level.encoder:
            z = F.relu(block.bn(block.conv(z)))
        pooled, index = POOL[ndim](z, 2, ceil_mode=True, return_indices=True)
        unpool = (F.max_unpool1d, F.max_unpool2d, F.max_unpool3d)[ndim - 1]
        y = unpool(pooled, index, 2, output_size=x.shape[2:])
        for block in level.decoder:
            y = F.relu(block.bn(block.conv(y)))
        torch.testing.assert_close(level(x), y)

    def test_levels_nest_and_fold(self):
        torch.manual_seed(0)
        net = SegNetLevel2d(3, 5, 8, SegNetLevel2d(8, kernel_size=3), kernel_size=5, depth=2).double()
        x = noise(2, 3, 13, 9)
        for _ in range(3):
            net.train()(x)
        merged = net.eval().merge()
        torch.testing.assert_close(merged(x), net(x))
        assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in merged.modules())
        assert any(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules())

    @pytest.mark.parametrize(("options", "named"), [({"width": 0}, "width"), ({"depth": 0}, "depth")])
    def test_bad_arguments(self, options, named):
        with pytest.raises(ValueError, match=named):
            SegNetLevel2d(3, **options)
