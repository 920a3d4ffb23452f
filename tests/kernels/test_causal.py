"""Short causal convolution against ``F.conv1d`` on the left-padded sequence, in every layout, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels._interpreted import check_in_interpreter
from torchconv.kernels import causal, causal_conv1d


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def reference(x, weight, bias, activation):
    y = F.conv1d(F.pad(x, (weight.shape[-1] - 1, 0)), weight.reshape(len(weight), 1, -1), bias, groups=len(weight))
    return F.silu(y) if activation else y


def lay(x, layout):
    """(B, C, L) as the argument that ``layout`` names; "turned" has the axes of one and the memory of the other."""
    if layout == "BCL":
        return x.contiguous(), "BCL"
    vectors = x.transpose(1, 2).contiguous()
    return (vectors.transpose(1, 2), "BCL") if layout == "turned" else (vectors, "BLC")


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 3),
    st.integers(1, 9),
    st.integers(1, 40) | st.integers(120, 140),
    st.integers(1, 12),
    st.booleans(),
    st.sampled_from([None, "silu", "swish"]),
    st.sampled_from(["BCL", "BLC", "turned"]),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_equals_the_padded_convolution(batch, channels, length, k, with_bias, activation, layout, dtype):
    x, g = noise(batch, channels, length, dtype=dtype), noise(batch, channels, length, seed=1, dtype=dtype)
    weight = noise(channels, k, seed=2, dtype=dtype).requires_grad_()
    bias = noise(channels, seed=3, dtype=dtype).requires_grad_() if with_bias else None
    given_, layout = lay(x, layout)
    given_.requires_grad_()
    y = causal_conv1d(given_, weight, bias, activation, layout=layout)
    back = (lambda t: t.transpose(1, 2)) if layout == "BLC" else (lambda t: t)
    expected = reference(back(given_), weight, bias, activation)
    torch.testing.assert_close(back(y), expected)
    tensors = [t for t in (given_, weight, bias) if t is not None]
    torch.testing.assert_close(
        torch.autograd.grad(back(y), tensors, g), torch.autograd.grad(expected, tensors, g), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(("layout", "block"), [("BCL", 400), ("BCL", 64), ("BCL", 2), ("BLC", 400)])
def test_blocks_do_not_show(layout, block, monkeypatch):
    for name, value in (("_ROWS", block), ("_SHORT_ROW", 1), ("_LONG_ROW", 1)):
        monkeypatch.setattr(causal, name, value)
    monkeypatch.setattr(causal, "_SPAN", 300)
    x, weight, bias = noise(2, 5, 150), noise(5, 4, seed=1).requires_grad_(), noise(5, seed=2).requires_grad_()
    given_, _ = lay(x, layout)
    given_.requires_grad_()
    back = (lambda t: t.transpose(1, 2)) if layout == "BLC" else (lambda t: t)
    y, expected = (
        causal_conv1d(given_, weight, bias, "silu", layout=layout),
        reference(back(given_), weight, bias, True),
    )
    torch.testing.assert_close(back(y), expected)
    g = noise(2, 5, 150, seed=3)
    tensors = (given_, weight, bias)
    torch.testing.assert_close(torch.autograd.grad(back(y), tensors, g), torch.autograd.grad(expected, tensors, g))


@pytest.mark.parametrize("k", [3, 12])
@pytest.mark.parametrize("layout", ["BCL", "BLC", "turned"])
def test_memory_keeps_its_order(layout, k):
    x, layout = lay(noise(2, 4, 6), layout)
    assert causal_conv1d(x, noise(4, k), layout=layout).stride() == x.stride()


@pytest.mark.parametrize("k", [1, 4, 12])
def test_nothing_in_nothing_out(k):
    weight = noise(3, k).requires_grad_()
    y, states = causal_conv1d(noise(2, 3, 0), weight, activation="silu", return_final_states=True)
    assert y.shape == (2, 3, 0)
    assert states.shape == (2, 3, k - 1)
    assert not states.any()
    assert not torch.autograd.grad(y.sum(), weight)[0].any()


@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradients_of_every_order(activation):
    x, weight, bias = (t.requires_grad_() for t in (noise(2, 3, 5), noise(3, 4, seed=1), noise(3, seed=2)))

    def run(x, weight, bias):
        return causal_conv1d(x, weight, bias, activation)

    assert torch.autograd.gradcheck(run, (x, weight, bias), check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (x, weight, bias), fast_mode=True)
    g = noise(2, 3, 5, seed=3)
    every = torch.autograd.grad(run(x, weight, bias), (x, weight, bias), g)
    for wanted, expected in zip(range(3), every, strict=True):
        tensors = [t if n == wanted else t.detach() for n, t in enumerate((x, weight, bias))]
        torch.testing.assert_close(torch.autograd.grad(run(*tensors), tensors[wanted], g)[0], expected)


def test_what_is_kept_for_the_gradient():
    x, weight, bias = noise(2, 3, 50).requires_grad_(), noise(3, 4), noise(3)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        causal_conv1d(x, weight, bias, "silu")
    assert sorted(t.numel() for t in kept) == [3, 12, 300]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 7), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.booleans(), st.integers(0, 9))
def test_pieces_make_the_sequence(k, lengths, vectors, seed):
    x, weight, bias = noise(2, 3, sum(lengths), seed=seed), noise(3, k, seed=1), noise(3, seed=2)
    layout, axis = ("BLC", 1) if vectors else ("BCL", 2)
    x, _ = lay(x, layout)
    whole, end = causal_conv1d(x, weight, bias, "silu", layout=layout, return_final_states=True)
    states, pieces = None, []
    for piece in x.split(lengths, axis):
        y, states = causal_conv1d(
            piece, weight, bias, "silu", layout=layout, initial_states=states, return_final_states=True
        )
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, axis), whole)
    torch.testing.assert_close(states, end)
    assert end.shape[axis] == k - 1


def test_causality_and_the_last_tap():
    x, weight = noise(1, 2, 20).requires_grad_(), noise(2, 5, seed=1)
    (by,) = torch.autograd.grad(causal_conv1d(x, weight)[0, 0, 7], x)
    assert by[0, 0].nonzero().flatten().tolist() == [3, 4, 5, 6, 7]
    torch.testing.assert_close(by[0, 0, 3:8], weight[0])
    assert by[0, 1].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["BCL", "BLC"])
def test_half_precision_accumulates_in_float32(dtype, layout):
    x, weight, bias = noise(2, 3, 140, dtype=dtype), noise(3, 4, seed=1, dtype=dtype), noise(3, seed=2)
    given_, _ = lay(x, layout)
    given_.requires_grad_()
    y = causal_conv1d(given_, weight, bias.to(dtype), "silu", layout=layout)
    assert y.dtype == dtype
    back = (lambda t: t.transpose(1, 2)) if layout == "BLC" else (lambda t: t)
    expected = reference(x.double(), weight.double(), bias.to(dtype).double(), True)
    assert (back(y).double() - expected).abs().max() <= torch.finfo(dtype).eps * expected.abs().max()
    (by,) = torch.autograd.grad(y.float().sum(), given_)
    assert by.dtype == dtype
    # Weights of a wider type, as in mixed precision: the result has the type of x, the gradients their own.
    master = weight.float().requires_grad_()
    mixed = causal_conv1d(given_, master, None, layout=layout)
    assert mixed.dtype == dtype
    assert torch.autograd.grad(mixed.float().sum(), master)[0].dtype == torch.float32


def test_registration_compiling_exporting_and_mapping():
    x, weight, bias = (t.requires_grad_() for t in (noise(2, 3, 9), noise(3, 4, seed=1), noise(3, seed=2)))
    for last, given_ in ((False, x), (True, noise(2, 9, 3).requires_grad_())):
        torch.library.opcheck(torch.ops.torchconv.causal_conv1d.default, (given_, weight, bias, True, last))

    def run(x, weight, bias):
        return causal_conv1d(x, weight, bias, "silu")

    expected = run(x, weight, bias)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, bias), expected)

    class Net(torch.nn.Module):
        def forward(self, x, weight, bias):
            return run(x, weight, bias)

    program = torch.export.export(Net(), tuple(t.detach() for t in (x, weight, bias)))
    assert "torchconv" not in program.graph_module.code
    torch.testing.assert_close(program.module()(x, weight, bias), expected)
    one = torch.func.vmap(lambda a: run(a[None], weight, bias)[0])(x)
    torch.testing.assert_close(one, expected)


def test_triton_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    check_in_interpreter("causal")


def test_refusals():
    x = noise(2, 3, 5)
    with pytest.raises(ValueError, match="layout='BHL'"):
        causal_conv1d(x, noise(3, 4), layout="BHL")
    with pytest.raises(ValueError, match="activation='relu'"):
        causal_conv1d(x, noise(3, 4), activation="relu")
    with pytest.raises(ValueError, match=r"weight of shape \(5, 4\): expected \(3, k\)"):
        causal_conv1d(x, noise(5, 4))
    with pytest.raises(ValueError, match="bias of shape"):
        causal_conv1d(x, noise(3, 4), noise(4))
    with pytest.raises(ValueError, match=r"initial_states of shape .* expected \(2, 3, 3\)"):
        causal_conv1d(x, noise(3, 4), initial_states=noise(2, 3, 4))
    with pytest.raises(ValueError, match="x of shape"):
        causal_conv1d(x[0], noise(3, 4))
    with pytest.raises(ValueError, match="weight on meta: expected cpu"):
        causal_conv1d(x, noise(3, 4).to("meta"))
    with pytest.raises(ValueError, match=r"x of torch.int64, weight of torch.float64, .* floating point"):
        causal_conv1d(x.long(), noise(3, 4))
    with pytest.raises(ValueError, match=r"activation='silu': make x floating point"):
        causal_conv1d(x.long(), noise(3, 4).long(), activation="silu")
    torch.testing.assert_close(causal_conv1d(x, noise(3, 1, 4)), causal_conv1d(x, noise(3, 4)))
