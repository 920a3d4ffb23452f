"""The selective scan against the loop over time, closed forms, autograd's checks, compilers and the interpreter."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels._interpreted import check_in_interpreter
from torchconv.kernels import scan as code
from torchconv.kernels import selective_scan


def inputs(
    batch: int, channels: int, length: int, states: int, groups: int | None, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """u, δ > 0, A < 0, B, C; B and C are fixed where ``groups`` is None."""
    generator = torch.Generator().manual_seed(batch + 10 * channels + 100 * length + states)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    shape = (channels, states) if groups is None else (batch, groups, states, length)
    u, delta, rates = draw(batch, channels, length), draw(batch, channels, length), draw(channels, states)
    return u, delta.abs(), -rates.abs() - 0.1, draw(*shape), draw(*shape)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    width=st.integers(1, 3),
    length=st.integers(1, 40),
    states=st.integers(1, 5),
    groups=st.sampled_from([None, 1, 2, 4]),
    softplus=st.booleans(),
    extras=st.booleans(),
)
def test_against_the_loop(batch, width, length, states, groups, softplus, extras):
    channels = 4 * width
    arguments = list(inputs(batch, channels, length, states, groups))
    if extras:
        arguments += [torch.randn(channels).double(), arguments[0].roll(1, 0).cos(), torch.randn(channels).double()]
    for t in arguments:
        t.requires_grad_()
    y = selective_scan(*arguments, delta_softplus=softplus)
    expected = selective_scan(*arguments, delta_softplus=softplus, backend="reference")
    torch.testing.assert_close(y, expected)
    g = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(out, arguments, g) for out in (y, expected))
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("rows", "block"), [(0, 1), (0, 1 << 21), (10**9, 1), (10**9, 200)])
def test_every_cut_of_time_and_states_is_the_same(monkeypatch, rows, block):
    arguments = [t.requires_grad_() for t in inputs(2, 4, 23, 5, 2)]
    expected = selective_scan(*arguments, backend="reference")
    by = torch.autograd.grad(expected.sin().sum(), arguments)
    monkeypatch.setattr(code, "_ROWS", rows)
    monkeypatch.setattr(code, "_BLOCK", block)
    y = selective_scan(*arguments)
    torch.testing.assert_close(y, expected)
    for got, want in zip(torch.autograd.grad(y.sin().sum(), arguments), by, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("rows", "chunks"), [(1, 1), (5, 1), (8, 3), (1, 7)])
def test_doubling_is_the_recurrence(rows, chunks):
    decay, s = torch.rand(rows, chunks, 2, 1, 3, 2).double(), torch.randn(rows, chunks, 2, 1, 3, 2).double()
    torch.testing.assert_close(code._run_doubled(decay, s), code._run(decay.clone(), s.clone()))


def test_groups_of_b_and_c_may_differ():
    u, delta, a, b, _ = inputs(2, 6, 11, 3, 3)
    one, fixed = torch.randn(2, 3, 11).double(), torch.randn(6, 3).double()
    for c in (one, fixed):
        expected = selective_scan(u, delta, a, b, c, backend="reference")
        torch.testing.assert_close(selective_scan(u, delta, a, b, c), expected)
        torch.testing.assert_close(
            selective_scan(u, delta, a, c, b), selective_scan(u, delta, a, c, b, backend="reference")
        )


def test_memoryless_prefix_sum_and_sum_of_states():
    u, delta, a, b, c = inputs(2, 4, 30, 3, 1)
    product = (b * c).sum(2)
    torch.testing.assert_close(selective_scan(u, delta + 0.1, a - 1e6, b, c), (delta + 0.1) * product * u)
    ones, fixed = torch.ones_like(delta), torch.ones(4, 1).double()
    torch.testing.assert_close(selective_scan(u, ones, fixed * 0, fixed, fixed), u.cumsum(2))
    parts = [selective_scan(u, delta, a[:, i : i + 1], b[:, :, i : i + 1], c[:, :, i : i + 1]) for i in range(3)]
    torch.testing.assert_close(selective_scan(u, delta, a, b, c), sum(parts))


def test_causal():
    u, delta, a, b, c = (t.requires_grad_() for t in inputs(1, 2, 17, 2, 1))
    y = selective_scan(u, delta, a, b, c)
    by = torch.autograd.grad(y[..., 9].sum(), (u, delta, b, c))
    assert all(t[..., 10:].abs().max() == 0 and t[..., :10].abs().max() > 0 for t in by)


@pytest.mark.parametrize("rate", [-200.0, -1e-6, 0.05])
def test_fast_fading_keeping_and_growing_states(rate):
    u, delta, a, b, c = inputs(1, 2, 400, 2, 1)
    a = torch.full_like(a, rate)
    arguments = [t.requires_grad_() for t in (u, delta, a, b, c)]
    y = selective_scan(*arguments)
    expected = selective_scan(*arguments, backend="reference")
    assert torch.isfinite(y).all()
    torch.testing.assert_close(y, expected)
    for got, want in zip(
        torch.autograd.grad(y.sum(), arguments), torch.autograd.grad(expected.sum(), arguments), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_gradients_of_gradients_and_forward_mode():
    arguments = tuple(t.requires_grad_() for t in inputs(1, 2, 5, 2, 1))
    bias = torch.randn(2).double().requires_grad_()

    def run(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, bias: Tensor) -> Tensor:
        return selective_scan(u, delta, a, b, c, delta_bias=bias, delta_softplus=True)

    assert torch.autograd.gradcheck(run, (*arguments, bias), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, (*arguments, bias))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_state_in_float32(dtype):
    u, delta, a, b, c = inputs(1, 2, 500, 2, 1)
    low = [t.to(dtype).requires_grad_() for t in (u, delta, b, c)]
    y = selective_scan(low[0], low[1], a.float(), low[2], low[3])
    expected = selective_scan(low[0].double(), low[1].double(), a, low[2].double(), low[3].double())
    assert y.dtype == dtype
    assert (y - expected).abs().max() <= torch.finfo(dtype).eps * expected.abs().max()
    assert all(g.dtype == dtype for g in torch.autograd.grad(y.sum(), low))


def test_memory_of_the_graph_does_not_hold_the_states():
    u, delta, a, b, c = (t.requires_grad_() for t in inputs(1, 4, 64, 16, 1))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        selective_scan(u, delta, a, b, c)
    assert max(kept) <= max(t.numel() for t in (u, delta, b, c))


def test_compiled_exported_and_empty():
    arguments = [t.float() for t in inputs(2, 4, 12, 3, 2)]
    expected = selective_scan(*arguments, delta_softplus=True)

    class Layer(torch.nn.Module):
        def forward(self, u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
            return selective_scan(u, delta, a, b, c, delta_softplus=True)

    compiled = torch.compile(Layer(), backend="aot_eager", fullgraph=True)
    leaves = [t.clone().requires_grad_() for t in arguments]
    torch.testing.assert_close(compiled(*leaves), expected)
    compiled(*leaves).sum().backward()
    torch.testing.assert_close(leaves[0].grad, torch.autograd.grad(Layer()(*leaves).sum(), leaves[0])[0])
    batch = {0: torch.export.Dim("batch", min=1)}
    program = torch.export.export(Layer(), tuple(arguments), dynamic_shapes=(batch, batch, None, batch, batch))
    other = [t if t.dim() == 2 else torch.cat([t, t]) for t in arguments]
    torch.testing.assert_close(program.module()(*other), Layer()(*other))
    assert selective_scan(*(t if t.dim() == 2 else t[:0] for t in arguments)).shape == (0, 4, 12)
    assert selective_scan(*(t if t.dim() == 2 else t[..., :0] for t in arguments)).shape == (2, 4, 0)


def test_operator_checks():
    arguments = [t.float().requires_grad_() for t in inputs(1, 2, 6, 2, 1)]
    bias = torch.randn(2, requires_grad=True)
    torch.library.opcheck(torch.ops.torchconv.selective_scan.default, (*arguments, bias, True, False))
    torch.library.opcheck(torch.ops.torchconv.selective_scan.default, (*arguments, None, False, True))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_triton_kernels_in_the_interpreter():
    check_in_interpreter("scan")


def test_refusals():
    u, delta, a, b, c = inputs(2, 4, 6, 3, 2)
    with pytest.raises(ValueError, match=r"u of shape \(4, 6\)"):
        selective_scan(u[0], delta, a, b, c)
    with pytest.raises(ValueError, match="int64: expected real"):
        selective_scan(u.long(), delta, a, b, c)
    with pytest.raises(ValueError, match=r"B.shape\[1\]=0"):
        selective_scan(u, delta, a, b[:, :0], c)
    with pytest.raises(ValueError, match=r"C\.device="):  # which would compute nothing
        selective_scan(u, delta, a, b, c.to("meta"))
    with pytest.raises(ValueError, match="delta of shape"):
        selective_scan(u, delta[:1], a, b, c)
    with pytest.raises(ValueError, match="A of shape"):
        selective_scan(u, delta, a[:2], b, c)
    with pytest.raises(ValueError, match="B of shape"):
        selective_scan(u, delta, a, b[..., :4], c)
    with pytest.raises(ValueError, match=r"C.shape\[1\]=3"):
        selective_scan(u, delta, a, b, c.repeat(1, 2, 1, 1)[:, :3])
    with pytest.raises(ValueError, match="groups"):
        selective_scan(u, delta, a, b, c.repeat(1, 2, 1, 1))
    with pytest.raises(ValueError, match="D of shape"):
        selective_scan(u, delta, a, b, c, torch.zeros(3))
    with pytest.raises(ValueError, match="z of shape"):
        selective_scan(u, delta, a, b, c, z=F.pad(u, (0, 1)))
    with pytest.raises(ValueError, match="backend='cuda'"):
        selective_scan(u, delta, a, b, c, backend="cuda")
    with pytest.raises(ValueError, match="backend='triton'"):
        selective_scan(u, delta, a, b, c, backend="triton")
