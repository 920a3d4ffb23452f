"""Per-position aggregation against explicit loops, its identities, gradients, and the paths behind it."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels._interpreted import check_in_interpreter
from torchconv.kernels import adaptive_conv, adaptive_conv2d
from torchconv.kernels.adaptive import _composite


def loops(x, weight, kernel):
    """The definition, one output number at a time."""
    out = torch.zeros_like(x)
    groups = weight.shape[1]
    for place in itertools.product(*(range(s) for s in x.shape[2:])):
        for number, tap in enumerate(itertools.product(*(range(k) for k in kernel))):
            source = [i + t - (k - 1) // 2 for i, t, k in zip(place, tap, kernel, strict=True)]
            if all(0 <= i < s for i, s in zip(source, x.shape[2:], strict=True)):
                for c in range(x.shape[1]):
                    w = weight[(slice(None), c % groups, number, *place)]
                    out[(slice(None), c, *place)] += w * x[(slice(None), c, *source)]
    return out


def draw(batch, channels, groups, kernel, size, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    taps = torch.Size(kernel).numel()
    x = torch.randn(batch, channels, *size, generator=generator, dtype=dtype)
    return x, torch.randn(batch, groups, taps, *size, generator=generator, dtype=dtype)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3).flatmap(
        lambda n: st.tuples(
            st.tuples(*[st.sampled_from([1, 3, 5])] * n), st.tuples(*[st.integers(1, 5 if n < 3 else 3)] * n)
        )
    ),
    st.integers(0, 2),
    st.integers(1, 7),
    st.integers(1, 5),
    st.integers(0, 99),
)
def test_both_paths_equal_the_definition(sizes, batch, channels, groups, seed):
    kernel, size = sizes
    x, w = draw(batch, channels, groups, kernel, size, seed=seed)
    expected = loops(x, w, kernel)
    torch.testing.assert_close(adaptive_conv(x, w, kernel), expected)
    torch.testing.assert_close(_composite(x, w, kernel), expected)


@pytest.mark.parametrize(
    ("channels", "groups", "kernel", "size"),
    [(4, 2, (3, 3), (3, 2)), (5, 2, (3, 1), (2, 3)), (2, 3, (3,), (4,)), (2, 1, (1, 3, 3), (2, 2, 1))],
)
def test_gradients(channels, groups, kernel, size):
    x, w = (t.requires_grad_() for t in draw(2, channels, groups, kernel, size))

    def run(x, w):
        return adaptive_conv(x, w, kernel)

    assert torch.autograd.gradcheck(run, (x, w), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, (x, w))


def test_gradients_of_the_two_paths_agree():
    x, w = (t.requires_grad_() for t in draw(2, 7, 3, (5, 3), (6, 4)))
    g = torch.randn_like(x)
    ours = torch.autograd.grad(adaptive_conv(x, w, (5, 3)), (x, w), g)
    theirs = torch.autograd.grad(_composite(x, w, (5, 3)), (x, w), g)
    torch.testing.assert_close(ours, theirs)
    only_w = torch.autograd.grad(adaptive_conv(x.detach(), w, (5, 3)), w, g)[0]
    only_x = torch.autograd.grad(adaptive_conv(x, w.detach(), (5, 3)), x, g)[0]
    torch.testing.assert_close((only_x, only_w), ours)


def test_constant_kernels_are_a_depthwise_convolution():
    x, w = draw(1, 6, 2, (3, 3), (5, 7))
    w = w[..., :1, :1].expand_as(w)
    kernels = w[:, :, :, 0, 0].reshape(2, 1, 3, 3).repeat(3, 1, 1, 1)
    torch.testing.assert_close(adaptive_conv2d(x, w), F.conv2d(x, kernels, padding=1, groups=6))


def test_unfold_form():
    x, w = draw(2, 6, 3, (3, 3), (4, 5))
    columns = F.unfold(x, 3, padding=1).view(2, 2, 3, 9, 4, 5)
    torch.testing.assert_close(adaptive_conv2d(x, w), (columns * w[:, None]).sum(3).reshape(2, 6, 4, 5))


@pytest.mark.parametrize("tap", range(9))
def test_one_hot_taps_shift(tap):
    x, w = draw(1, 2, 1, (3, 3), (4, 5))
    w = torch.zeros_like(w)
    w[:, :, tap] = 1
    u, v = tap // 3, tap % 3
    torch.testing.assert_close(adaptive_conv2d(x, w), F.pad(x, (1, 1, 1, 1))[..., u : u + 4, v : v + 5])


def test_euler_identity_and_pointwise_product():
    x, w = (t.requires_grad_() for t in draw(2, 5, 2, (3, 3), (4, 4)))
    out = adaptive_conv2d(x, w)
    g = torch.randn_like(out)
    dx, dw = torch.autograd.grad(out, (x, w), g)
    torch.testing.assert_close((dx * x).sum(), (g * out).sum())
    torch.testing.assert_close((dw * w).sum(), (g * out).sum())
    x, w = draw(2, 4, 2, (1, 1), (3, 3))
    torch.testing.assert_close(adaptive_conv2d(x, w), x * w[:, :, 0].repeat(1, 2, 1, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_float32(dtype):
    x, w = draw(1, 4, 2, (5, 5), (8, 8), dtype=torch.float32)
    x, w = x.to(dtype), w.to(dtype)
    out = adaptive_conv2d(x, w)
    assert out.dtype == dtype
    torch.testing.assert_close(out, adaptive_conv2d(x.double(), w.double()).to(dtype), rtol=2 * 2**-8, atol=1e-4)
    assert adaptive_conv2d(x, w.float()).dtype == torch.float32
    x.requires_grad_()
    w.requires_grad_()
    dx, dw = torch.autograd.grad(adaptive_conv2d(x, w).float().sum(), (x, w))
    assert dx.dtype == dw.dtype == dtype


def test_channels_last_is_kept_forward_and_backward():
    x, w = draw(2, 4, 2, (3, 3), (5, 6))
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    out = adaptive_conv2d(x, w)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out.detach(), adaptive_conv2d(x.detach().contiguous(), w))
    (dx,) = torch.autograd.grad(out.square().sum(), x)
    assert dx.is_contiguous(memory_format=torch.channels_last)


def test_no_buffer_with_all_taps(monkeypatch):
    """What autograd keeps is x and the weights: no tensor of N·C·taps·positions."""
    x, w = (t.requires_grad_() for t in draw(2, 8, 2, (3, 3), (6, 6), dtype=torch.float32))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        adaptive_conv2d(x, w)
    assert sorted(t.numel() for t in kept) == sorted([x.numel(), w.numel()])


def test_compiles_exports_and_maps():
    x, w = draw(2, 6, 2, (3, 3), (4, 5), dtype=torch.float32)
    expected = adaptive_conv2d(x, w)
    compiled = torch.compile(adaptive_conv2d, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, w), expected)

    class Net(torch.nn.Module):
        def forward(self, x, w):
            return adaptive_conv2d(x, w)

    program = torch.export.export(Net(), (x, w))
    torch.testing.assert_close(program.module()(x, w), expected)
    one = torch.func.vmap(lambda a, b: adaptive_conv2d(a[None], b[None])[0])(x, w)
    torch.testing.assert_close(one, expected)


def test_compiled_code_serves_other_channels_and_sizes():
    compiled = torch.compile(adaptive_conv2d, fullgraph=True, backend="aot_eager")
    for batch, channels, groups, size in ((2, 8, 2, 6), (3, 13, 4, 7)):
        x, w = draw(batch, channels, groups, (3, 3), (size, size))
        torch.testing.assert_close(compiled(x, w), adaptive_conv2d(x, w))


def test_registration():
    for layout in (torch.contiguous_format, torch.channels_last):
        x, w = draw(2, 5, 2, (3, 3), (4, 5))
        x, w = x.contiguous(memory_format=layout).requires_grad_(), w.requires_grad_()
        torch.library.opcheck(torch.ops.torchconv.adaptive_conv.default, (x, w, (3, 3)))


def test_triton_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    check_in_interpreter("adaptive")


def test_bad_shapes_are_refused():
    x, w = draw(2, 4, 2, (3, 3), (4, 4))
    with pytest.raises(ValueError, match=r"weight of shape .*expected \(2, G, taps, 4, 4\)"):
        adaptive_conv2d(x, w[..., :3])
    with pytest.raises(ValueError, match="weight of shape"):
        adaptive_conv2d(x, w[:1])
    with pytest.raises(ValueError, match=r"weight\.shape=.*k\^2"):
        adaptive_conv2d(x, w[:, :, :4])
    with pytest.raises(ValueError, match=r"kernel_size=\(9, 2\)"):
        adaptive_conv(x, w, (9, 2))
    with pytest.raises(ValueError, match=r"kernel_size=\(-3, -3\)"):
        adaptive_conv(x, w, (-3, -3))
    with pytest.raises(ValueError, match=r"weight\.device="):
        adaptive_conv(x, w.to("meta"))
    assert torch.equal(adaptive_conv(x, w, 3), adaptive_conv(x, w))
    assert adaptive_conv(x[:, :0], w).shape == (2, 0, 4, 4)
    with pytest.raises(ValueError, match="x of shape"):
        adaptive_conv2d(x[0], w)
    with pytest.raises(ValueError, match="x of shape"):
        adaptive_conv(x[0, 0], w)
