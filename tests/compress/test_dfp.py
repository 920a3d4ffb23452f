"""Dynamic fixed point: the format, exact and chained integer convolutions, gradients, training."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torchconv.compress.dfp import (
    Chain,
    DFPTensor,
    add,
    chained_conv,
    down_convert,
    integer_conv,
    multiply,
    quantize,
    shared_exponent,
)
from torchconv.compress.dfp_gradients import (
    chained_conv_input,
    chained_conv_weight,
    integer_conv_input,
    integer_conv_weight,
)
from torchconv.compress.dfp_networks import convert_to_dfp, watch
from torchconv.compress.dfp_training import DFPConv1d, DFPConv2d, DFPConv3d, DFPLinear, dfp_conv
from torchconv.models import create_model
from torchconv.surgery import swap
from torchconv.weights import load, save

LAYERS: list[tuple[Any, Any, tuple[int, ...]]] = [
    (DFPConv1d, nn.Conv1d, (2, 4, 9)),
    (DFPConv2d, nn.Conv2d, (2, 4, 7, 6)),
    (DFPConv3d, nn.Conv3d, (2, 4, 5, 4, 6)),
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def random_dfp(*shape: int, bits: int = 16) -> DFPTensor:
    top = 2 ** (bits - 1) - 1
    return DFPTensor(torch.randint(-top, top + 1, shape, dtype=torch.int32), torch.tensor(-9), bits)


def integers(value: Tensor) -> list[int]:
    found: list[int] = value.flatten().tolist()
    return found


# --- the format


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=8),
    st.integers(2, 24),
    st.integers(-20, 20),
)
def test_format(values: list[float], bits: int, power: int) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    x = torch.where(x.abs() < 1e-25, 0.0, x)
    q = quantize(x, bits)
    step, top = 2.0 ** int(q.exponent), 2 ** (bits - 1) - 1
    error = (q.dequantize(torch.float64) - x).abs()
    assert int(q.integers.abs().max()) <= top
    assert bool((error <= torch.where(q.integers.abs() == top, step, step / 2)).all())
    if int(q.integers.abs().max()) > 0 and shared_exponent(q.dequantize(torch.float64), bits) == q.exponent:
        again = quantize(q.dequantize(torch.float64), bits)
        assert torch.equal(again.integers, q.integers)
    assert torch.equal(quantize(-x, bits).integers, -q.integers)
    moved = quantize(x * 2.0**power, bits)
    assert torch.equal(moved.integers, q.integers)
    assert int(moved.exponent) == int(q.exponent) + power * bool(x.abs().max() > 0)


def test_exponents_next_to_powers_of_two_and_at_the_ends() -> None:
    below = torch.nextafter(torch.tensor(8.0), torch.tensor(0.0))
    assert int(shared_exponent(below.reshape(1))) == 2 - 14  # log2 in float32 says 3
    q = quantize(torch.tensor([float(below), -float(below), 1.0]))
    assert integers(q.integers) == [32767, -32767, 4096]
    assert integers(quantize(torch.tensor([1.0, 0.5, 2.5 / 2**14, 1.5 / 2**14])).integers) == [16384, 8192, 2, 2]
    tiny = quantize(torch.tensor([1e-44, 0.0]))  # subnormal: its exponent would be below −128
    assert (int(tiny.exponent), integers(tiny.integers)) == (-128, [0, 0])
    huge = torch.tensor([3e38, -1.0])
    assert int(quantize(huge).exponent) == 127 - 14
    assert abs(float(quantize(huge).dequantize()[0]) / 3e38 - 1) < 2**-14
    zero = quantize(torch.zeros(3))
    assert (int(zero.exponent), integers(zero.integers)) == (0, [0, 0, 0])
    assert quantize(torch.zeros(0, 3)).integers.shape == (0, 3)
    assert quantize(torch.ones(2, dtype=torch.bfloat16)).integers.dtype == torch.int16
    assert quantize(torch.ones(2), 20).integers.dtype == torch.int32


def test_stochastic_rounding_is_right_on_average() -> None:
    x = torch.cat([torch.ones(1), torch.full((20_000,), 0.3 / 2**14)])
    drawn = quantize(x, rounding="stochastic", generator=torch.Generator().manual_seed(1)).integers[1:].double()
    assert set(integers(drawn)) == {0.0, 1.0}
    assert abs(float(drawn.mean()) - 0.3) < 0.02


def test_arithmetic_in_python_integers() -> None:
    a, b = quantize(torch.randn(50)), quantize(torch.randn(50) * 0.01)
    shift = int(a.exponent - b.exponent)
    total, product = add(a, b), multiply(a, b)
    pairs = list(zip(integers(a.integers), integers(b.integers), strict=True))
    assert integers(total.integers) == [i + (j >> shift) for i, j in pairs] == integers(add(b, a).integers)
    assert int(total.exponent) == int(a.exponent)
    assert integers(product.integers) == [i * j for i, j in pairs]
    assert int(product.exponent) == int(a.exponent + b.exponent)
    far = DFPTensor(torch.tensor([-5, 5], dtype=torch.int16), torch.tensor(-100))
    near = DFPTensor(torch.tensor([7, 7], dtype=torch.int16), torch.tensor(0))
    assert integers(add(near, far).integers) == [6, 7]  # −5 >> 31 is −1


@pytest.mark.parametrize("mode", ["round", "truncate"])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_down_convert(mode: str, bits: int) -> None:
    top = 2 ** (bits - 1) - 1
    for largest in (0, 1, top, top + 1, 2**30 - 1, 2**31 - 1, 2**54 - 1):
        wide = torch.tensor([largest, -largest, -(largest // 3), largest // 7, -1, 1], dtype=torch.int64)
        down = down_convert(wide, -20, bits, mode)
        shift = max(0, max(largest, 1).bit_length() - (bits - 1))
        half = 2**shift // 2 if mode == "round" else 0
        assert integers(down.integers) == [max(-top, min(top, (i + half) >> shift)) for i in integers(wide)]
        assert int(down.exponent) == shift - 20
    assert down_convert(torch.tensor([-(2**31)], dtype=torch.int32), 0).integers.item() == -(2**14)
    assert down_convert(torch.zeros(0, dtype=torch.int32), 3).integers.shape == (0,)


# --- convolutions of integers


def loops(x: Tensor, w: Tensor, stride: int, padding: int, dilation: int, groups: int) -> dict[tuple[int, ...], list]:
    """Output position → its products, taps row-major, then channels; and the places of both factors."""
    found: dict[tuple[int, ...], list] = {}
    sizes = w.shape[2:]
    spans = [(n + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for n, k in zip(x.shape[2:], sizes, strict=True)]
    per, width = w.shape[1], w.shape[0] // groups
    for n, o, *p in itertools.product(range(len(x)), range(len(w)), *map(range, spans)):
        terms = found.setdefault((n, o, *p), [])
        for *t, c in itertools.product(*map(range, sizes), range(per)):
            at = [a * stride + b * dilation - padding for a, b in zip(p, t, strict=True)]
            if all(0 <= i < size for i, size in zip(at, x.shape[2:], strict=True)):
                terms.append(((n, o // width * per + c, *at), (o, c, *t)))
            else:
                terms.append(None)
    return found


GEOMETRIES = [(1, 1, 1, 1), (2, 0, 1, 2), (2, 1, 2, 1), (3, 2, 1, 4), (1, 3, 2, 2)]


@pytest.mark.parametrize(("stride", "padding", "dilation", "groups"), GEOMETRIES)
@pytest.mark.parametrize("ndim", [1, 2])
def test_three_passes_in_python_integers(stride: int, padding: int, dilation: int, groups: int, ndim: int) -> None:
    size, kernel = ((11,), (3,)) if ndim == 1 else ((7, 6), (3, 2))
    x, w = random_dfp(2, 4, *size), random_dfp(4, 4 // groups, *kernel)
    options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    y = integer_conv(x, w, **options)
    g = random_dfp(*y.integers.shape)
    gx, gw = torch.zeros_like(x.integers, dtype=torch.int64), torch.zeros_like(w.integers, dtype=torch.int64)
    for place, terms in loops(x.integers, w.integers, **options).items():
        kept = [t for t in terms if t]
        assert int(y.integers[place]) == sum(int(x.integers[i]) * int(w.integers[j]) for i, j in kept)
        for i, j in kept:
            gx[i] += int(g.integers[place]) * int(w.integers[j])
            gw[j] += int(g.integers[place]) * int(x.integers[i])
    ours_x, ours_w = integer_conv_input(g, w, size, **options), integer_conv_weight(x, g, kernel, **options)
    assert torch.equal(ours_x.integers, gx)
    assert torch.equal(ours_w.integers, gw)
    # ⟨g, conv(x, w)⟩ = ⟨x, gX⟩ = ⟨w, gW⟩ without rounding
    sums = [
        sum(a * b for a, b in zip(integers(u), integers(v), strict=True))
        for u, v in ((g.integers, y.integers), (x.integers, gx), (w.integers, gw))
    ]
    assert sums[0] == sums[1] == sums[2]
    # chains that cannot overflow are these sums up to float32
    chain = Chain(*Chain.safe())
    for ours, exact in (
        (chained_conv(x, w, **options, chain=chain), y),
        (chained_conv_input(g, w, size, **options, chain=chain), ours_x),
        (chained_conv_weight(x, g, kernel, **options, chain=chain), ours_w),
    ):
        wanted = exact.dequantize(torch.float64)
        assert ours[0].shape == wanted.shape
        assert int(ours[1]) == 0
        assert float((ours[0] - wanted).abs().max()) <= 1e-6 * float(wanted.abs().max())


@pytest.mark.parametrize("policy", ["wrap", "saturate"])
@pytest.mark.parametrize(("length", "shift"), [(1, 0), (3, 0), (5, 1), (7, 2), (100, 0), (100, 3)])
def test_chains_in_python_integers(policy: str, length: int, shift: int) -> None:
    options = {"stride": 2, "padding": 1, "dilation": 1, "groups": 2}
    top = 2**15 - 1
    x, w = random_dfp(1, 6, 5, 5), random_dfp(4, 3, 3, 3)
    x = DFPTensor(x.integers.sign().clamp(min=0) * 2 * top - top, x.exponent)  # ± the largest
    w = DFPTensor(w.integers.abs().clamp(min=top // 2), w.exponent)
    ours, overflows = chained_conv(x, w, **options, chain=Chain(length, shift, policy))
    events = 0
    for place, terms in loops(x.integers, w.integers, **options).items():
        total, acc = torch.zeros(()), 0
        for number, term in enumerate(terms, 1):
            acc += (int(x.integers[term[0]]) >> shift) * int(w.integers[term[1]]) if term else 0
            if not -(2**31) <= acc < 2**31:
                events += 1
                wrapped = (acc + 2**31) % 2**32 - 2**31
                acc = wrapped if policy == "wrap" else max(-(2**31), min(2**31 - 1, acc))
            if number % length == 0 or number == len(terms):
                total = total + torch.tensor(acc).float() * 2.0 ** (int(x.exponent + w.exponent) + shift)
                acc = 0
        assert float(ours[place]) == float(total)
    assert int(overflows) == events
    assert events == 0 or length > Chain.safe(shift)[0]
    assert events > 0 or (length, shift) not in ((3, 0), (100, 0))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_passes_agree_at_any_geometry(data: st.DataObject) -> None:
    ndim, groups = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))

    def each(low: int, high: int) -> list[int]:
        return data.draw(st.lists(st.integers(low, high), min_size=ndim, max_size=ndim))

    kernel, stride, dilation = each(1, 3), each(1, 3), each(1, 3)
    size = [n + d * (k - 1) for n, d, k in zip(each(1, 5), dilation, kernel, strict=True)]
    options: dict[str, Any] = {"stride": stride, "dilation": dilation, "groups": groups}
    options["padding"] = data.draw(st.sampled_from(["same", "valid", each(0, 4)]))

    def draw(*shape: int) -> DFPTensor:
        return DFPTensor(torch.randint(-99, 100, shape, dtype=torch.int16), torch.tensor(0))

    x, w = draw(2, 2 * groups, *size), draw(3 * groups, 2, *kernel)
    y = integer_conv(x, w, **options)
    g = draw(*y.integers.shape)
    gx, gw = integer_conv_input(g, w, size, **options), integer_conv_weight(x, g, kernel, **options)
    inner = [int((a.integers.long() * b.integers.long()).sum()) for a, b in ((g, y), (x, gx), (w, gw))]
    assert inner[0] == inner[1] == inner[2]
    chain = Chain(3)  # sums are below 2^24, so that these are exact too
    assert torch.equal(chained_conv(x, w, **options, chain=chain)[0].long(), y.integers)
    assert torch.equal(chained_conv_input(g, w, size, **options, chain=chain)[0].long(), gx.integers)
    assert torch.equal(chained_conv_weight(x, g, kernel, **options, chain=chain)[0].long(), gw.integers)


def test_longest_safe_chain() -> None:
    largest = DFPTensor(torch.full((1, 8, 1), 32767, dtype=torch.int16), torch.tensor(0))
    for shift in range(3):
        length = Chain.safe(shift)[0]
        _, overflows = chained_conv(largest, largest, chain=Chain(length, shift, "check"))
        assert int(overflows) == 0
    with pytest.raises(OverflowError, match="product 3 of 8 leaves 32 bits"):
        chained_conv(largest, largest, chain=Chain(3, 0, "check"))


def test_order_does_not_matter() -> None:
    x, w = random_dfp(2, 16, 6, 6), random_dfp(8, 16, 3, 3)
    order = torch.randperm(16)
    other_x, other_w = (DFPTensor(t.integers[:, order], t.exponent) for t in (x, w))
    assert torch.equal(integer_conv(x, w, padding=1).integers, integer_conv(other_x, other_w, padding=1).integers)


@pytest.mark.parametrize("bits", [20, 24])
def test_wide_numbers_are_exact_too(bits: int) -> None:
    x, w = random_dfp(1, 300, 5, bits=bits), random_dfp(2, 300, 3, bits=bits)
    x = DFPTensor(x.integers.abs(), x.exponent, bits)
    w = DFPTensor(w.integers.abs(), w.exponent, bits)
    y = integer_conv(x, w)
    assert bits < 24 or int(y.integers.max()) > 2**53  # more than float64 holds
    expected = (x.integers.long().unfold(2, 3, 1)[:, None] * w.integers.long()[None, :, :, None]).sum((2, 4))
    assert torch.equal(y.integers, expected)
    g = random_dfp(*y.integers.shape, bits=bits)
    gx, gw = integer_conv_input(g, w, (5,)), integer_conv_weight(x, g, (3,))
    full = F.pad(g.integers.long(), (2, 2)).unfold(2, 3, 1)[:, :, None] * w.integers.long().flip(2)[None, :, :, None]
    assert torch.equal(gx.integers, full.sum((1, 4)))
    seen = x.integers.long().unfold(2, 3, 1)[:, None] * g.integers.long()[:, :, None, :, None]
    assert torch.equal(gw.integers, seen.sum((0, 3)))
    with pytest.raises(ValueError, match=r"bits=24.*use 16 bits"):
        integer_conv(random_dfp(1, 2**17 + 1, 1, bits=24), random_dfp(1, 2**17 + 1, 1, bits=24))


@pytest.mark.parametrize("padding", ["same", "valid", 2])
def test_words_for_padding(padding: Any) -> None:
    x, w = random_dfp(1, 2, 9), random_dfp(3, 2, 4)
    y = integer_conv(x, w, padding=padding, dilation=2)
    leaf = x.integers.double().requires_grad_()
    kernel = w.integers.double().requires_grad_()
    expected = F.conv1d(leaf, kernel, padding=padding, dilation=2)
    g = random_dfp(*expected.shape)
    gx, gw = torch.autograd.grad(expected, (leaf, kernel), g.integers.double())
    options: dict[str, Any] = {"padding": padding, "dilation": 2}
    assert torch.equal(y.integers.double(), expected)
    assert torch.equal(integer_conv_input(g, w, (9,), **options).integers.double(), gx)
    assert torch.equal(integer_conv_weight(x, g, (4,), **options).integers.double(), gw)
    chain = Chain(2)
    for (sums, _), exact in (
        (chained_conv(x, w, **options, chain=chain), expected.detach()),
        (chained_conv_input(g, w, (9,), **options, chain=chain), gx),
        (chained_conv_weight(x, g, (4,), **options, chain=chain), gw),
    ):
        wanted = exact * 2.0**-18
        torch.testing.assert_close(sums.double(), wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))


# --- layers


@pytest.mark.parametrize(("ours", "plain", "shape"), LAYERS, ids=["1d", "2d", "3d"])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 2},
        {"kernel_size": 2, "padding": "same", "dilation": 2, "bias": False},
        {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "groups": 4},
    ],
)
def test_layer_is_near_its_float_twin(ours: Any, plain: Any, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    twin = plain(4, 8, **options)
    layer = ours(4, 8, **options)
    layer.load_state_dict(twin.state_dict())
    x = torch.randn(shape)
    grads = []
    for module in (twin, layer):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        torch.manual_seed(1)
        grads.append([y, *torch.autograd.grad(y, [leaf, *module.parameters()], torch.randn_like(y))])
    for theirs, mine in zip(*grads, strict=True):
        assert mine.dtype == theirs.dtype
        apart = float((mine - theirs).detach().abs().max())
        assert apart <= 5e-4 * float(theirs.detach().abs().max())
        assert apart > 0 or theirs.dim() == 1  # the bias has its gradient from floats
    assert torch.equal(layer(x[0]), layer(x[:1])[0])  # without a batch axis


def test_layer_is_the_integers() -> None:
    layer = DFPConv2d(3, 4, 3, stride=2, padding=1, bits=10)
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    y = layer(x)
    grad = torch.randn_like(y)
    qx, qw, qg = quantize(x, 10), quantize(layer.weight, 10), quantize(grad, 10)
    geometry: tuple[Any, ...] = (2, 1)
    assert layer.bias is not None
    assert torch.equal(y, integer_conv(qx, qw, *geometry).dequantize() + layer.bias[:, None, None])
    gx, gw = torch.autograd.grad(y, (x, layer.weight), grad)
    assert torch.equal(gx, integer_conv_input(qg, qw, (6, 6), *geometry).dequantize())
    assert torch.equal(gw, integer_conv_weight(qx, qg, (3, 3), *geometry).dequantize())


def test_linear() -> None:
    twin, layer = nn.Linear(6, 3), DFPLinear(6, 3)
    layer.load_state_dict(twin.state_dict())
    for shape in ((6,), (5, 6), (2, 3, 6), (0, 6)):
        x = torch.randn(shape)
        torch.testing.assert_close(layer(x), twin(x), rtol=1e-3, atol=1e-3)
    x = torch.randn(4, 6, requires_grad=True)
    y = layer(x)
    grad = torch.randn_like(y)
    qx, qw, qg = (quantize(t).dequantize(torch.float64) for t in (x, layer.weight, grad))
    torch.testing.assert_close(y, (qx @ qw.t()).float() + layer.bias)
    gx, gw = torch.autograd.grad(y, (x, layer.weight), grad)
    torch.testing.assert_close(gx, (qg @ qw).float())
    torch.testing.assert_close(gw, (qg.t() @ qx).float())


def test_more_bits_come_closer() -> None:
    x, w = torch.randn(2, 8, 6, 6).double(), torch.randn(4, 8, 3, 3).double()
    exact = F.conv2d(x, w)
    errors = [float((dfp_conv(x, w, bits=b) - exact).abs().max()) for b in (4, 8, 12, 16, 20, 24)]
    assert all(a > 8 * b for a, b in itertools.pairwise(errors))
    assert errors[-1] < 1e-5


def test_chains_in_all_three_passes() -> None:
    exact = DFPConv2d(4, 4, 3, padding=1, groups=2)
    chained = DFPConv2d(4, 4, 3, padding=1, groups=2, chain=(8, 2, "saturate"))
    chained.load_state_dict(exact.state_dict())
    x = torch.randn(1, 4, 4, 4)
    grads = []
    for layer in (exact, chained):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        grads.append([y, *torch.autograd.grad(y.square().sum(), [leaf, layer.weight])])
    for theirs, mine in zip(*grads, strict=True):
        apart = float((mine - theirs).detach().abs().max() / theirs.detach().abs().max())
        assert 0 < apart < 1e-2


def test_stochastic_layer_draws_in_training_only() -> None:
    layer = DFPConv2d(2, 2, 3, bits=6, rounding="stochastic")
    x = torch.randn(1, 2, 5, 5)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    state = torch.get_rng_state()
    assert torch.equal(layer(x), layer(x))
    assert torch.equal(torch.get_rng_state(), state)


def test_types_layouts_and_copies() -> None:
    layer = DFPConv2d(3, 4, 3)
    x = torch.randn(2, 3, 8, 8)
    y = layer(x)
    last = layer(x.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, y)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    half = copy.deepcopy(layer).bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16
    short = quantize(torch.tensor([1.0, 0.25])).dequantize(torch.float16)  # 2^−14 is nearly nothing in float16
    assert short.tolist() == [1.0, 0.25]
    small = copy.deepcopy(layer).half()(x.half())
    torch.testing.assert_close(small.float(), y, rtol=1e-2, atol=1e-2)
    double = copy.deepcopy(layer).double()
    assert double(x.double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), y)  # integers do not become bfloat16
    assert layer(x[:0]).shape == (0, 4, 6, 6)


def test_empty_batches_have_gradients() -> None:
    layer = DFPConv2d(3, 4, 3)
    x = torch.zeros(0, 3, 8, 8, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert x.grad.shape == x.shape
    assert float(layer.weight.grad.abs().sum()) == 0


def test_compiled_and_exported() -> None:
    layer: Any = DFPConv2d(3, 4, 3, padding=1)
    x = torch.randn(2, 3, 8, 8)
    compiled: Any = torch.compile(layer, backend="eager", fullgraph=True)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [module(leaf) for module, leaf in ((layer, leaves[0]), (compiled, leaves[1]))]
    assert torch.equal(*outputs)
    for y in outputs:
        y.square().sum().backward()
    assert torch.equal(*(leaf.grad for leaf in leaves))  # type: ignore[arg-type]
    exported = torch.export.export(layer.eval(), (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    again = torch.randn(5, 3, 8, 8)
    assert torch.equal(exported.module()(again), layer(again))


# --- networks


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.norm = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.b(self.a(x)))
        return y


def test_convert() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(64, 2)
    )
    calls = []
    net[0].register_forward_hook(lambda *_: calls.append(1))
    new: Any = convert_to_dfp(net.eval(), bits=12)
    assert new.dfp_report.layers == ("0", "3", "5")
    assert [type(new[i]).__name__ for i in (0, 3, 5)] == ["DFPConv2d", "DFPConv2d", "DFPLinear"]
    assert new[0].bits == 12
    assert not new[0].training
    assert type(net[0]) is nn.Conv2d
    assert list(new.state_dict()) == list(net.state_dict())
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(new(x), net(x), rtol=1e-2, atol=1e-2)
    assert len(calls) == 2  # the hook stays
    assert convert_to_dfp(net, "pointwise").dfp_report.layers == ("3",)  # type: ignore[union-attr]
    assert convert_to_dfp(net, linear=False).dfp_report.layers == ("0", "3")  # type: ignore[union-attr]
    assert convert_to_dfp(net, "5").dfp_report.layers == ("5",)  # type: ignore[union-attr]
    assert convert_to_dfp(net, lambda n, m: n != "0").dfp_report.layers == ("3", "5")  # type: ignore[union-attr]
    assert "3 layers" in str(new.dfp_report)


def test_convert_keeps_sharing_and_says_what_stays() -> None:
    new: Any = convert_to_dfp(Tied())
    assert new.a.weight is new.b.weight
    assert new.dfp_report.layers == ("a", "b")
    assert "computes in its own way" in new.dfp_report.kept["norm"]
    assert "norm: kept" in str(new.dfp_report)


def test_converted_network_is_saved_and_loaded(tmp_path: Path) -> None:
    net = create_model("eca_resnet18", num_classes=3)
    new = convert_to_dfp(net.eval(), chain=None, bits=14)
    save(new, tmp_path / "net")
    again = load(tmp_path / "net")
    x = torch.randn(1, 3, 32, 32)
    assert sum(isinstance(m, DFPConv2d) for m in again.modules()) == 20
    assert torch.equal(again.eval()(x), new(x))


def test_swap_leaves_integer_layers_alone() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    new: Any = swap(convert_to_dfp(net, "0"), "dcls", where="all")
    assert type(new[0]) is DFPConv2d
    assert "computes its kernel in its own way" in new.swap_report.kept["0"]


def test_training_and_watching() -> None:
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 3))
    new: Any = convert_to_dfp(net)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(48, 1, 6, 6, generator=generator)
    y = torch.randint(0, 3, (48,), generator=generator)
    optimizer = torch.optim.SGD(new.parameters(), lr=0.1, momentum=0.9)
    losses = []
    with watch(new) as seen:
        for _ in range(25):
            optimizer.zero_grad()
            loss = F.cross_entropy(new(x), y)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]
    gradients = seen.exponents("0", "gradient")
    assert len(gradients) == 25
    assert gradients[-1] < gradients[0]
    assert max(seen.exponents("4", "weight")) - min(seen.exponents("4", "weight")) <= 4
    assert "gradient" in str(seen)
    assert seen.overflows == {}
    count = len(seen.readings)
    new(x)
    assert len(seen.readings) == count


def test_watching_overflows_and_losses() -> None:
    layer = DFPConv1d(2, 1, 8, bias=False, chain=(16, 0, "wrap"))
    nn.init.constant_(layer.weight, 1.99)
    x = torch.full((1, 2, 8), 1.99999)
    x[0, 0, 0] = 1e-6
    with watch(nn.Sequential(layer)) as seen:
        layer(x.requires_grad_()).sum().backward()
    first = seen.readings[0]
    assert (first.layer, first.tensor, first.zeroed, first.saturated) == ("0", "input", 1 / 16, 15)
    assert seen.overflows["0", "output"] > 0
    assert seen.overflows["0", "input gradient"] == 0  # one product each
    assert "overflows of the output" in str(seen)


def test_bad_arguments() -> None:
    x = torch.ones(2)
    for bits in (1, 25, 8.0):
        with pytest.raises(ValueError, match=r"bits=.*from 2 to 24"):
            quantize(x, bits)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rounding='near'"):
        quantize(x, rounding="near")
    with pytest.raises(ValueError, match=r"x=torch.int64"):
        quantize(torch.ones(2, dtype=torch.int64))
    for bad in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match="infinities or NaN"):
            quantize(torch.tensor([1.0, bad]))
    with pytest.raises(ValueError, match="mode='up'"):
        down_convert(torch.ones(1, dtype=torch.int32), 0, mode="up")
    with pytest.raises(ValueError, match="length=0"):
        Chain(0)
    with pytest.raises(ValueError, match="shift=16"):
        Chain(2, 16)
    with pytest.raises(ValueError, match="policy='clip'"):
        Chain(2, 0, "clip")
    with pytest.raises(ValueError, match="chain="):
        DFPLinear(1, 1, chain=())
    with pytest.raises(ValueError, match=r"x=\(1, 2, 4, 4\): expected \(N, 3"):
        DFPConv2d(3, 1, 1)(torch.ones(1, 2, 4, 4))
    with pytest.raises(ValueError, match=r"x=\(2, 4\): expected \(…, 3\)"):
        DFPLinear(3, 1)(torch.ones(2, 4))
    with pytest.raises(ValueError, match="smaller than the kernel"):
        chained_conv(random_dfp(1, 1, 2), random_dfp(1, 1, 3), chain=Chain(2))
    with pytest.raises(ValueError, match="where='all'"):
        convert_to_dfp(nn.ReLU())
    with pytest.raises(ValueError, match="bits=1:"):
        convert_to_dfp(nn.Linear(2, 2), bits=1)
    with pytest.raises(ValueError, match="convert_to_dfp makes them"), watch(nn.Linear(2, 2)):
        pass
