"""Poset filters and pooling against the maximum over listed up-sets, the paper's closed forms, and its algebra."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from torchconv.ops.posetfilters import (
    PosetFilter1d,
    PosetFilter2d,
    PosetFilter3d,
    PosetPool,
    as_poset,
    largest_upset_sum,
    poset_filter,
)
from torchconv.ops.posetnetwork import PosetReLUNetwork
from torchconv.theory.posets import Formula, Poset, all_posets

COUNTS = (9, 16, 12, 6, 10, 10, 9, 6, 8, 9, 7, 7, 8, 5, 6, 7)
EXTENSIONS = (6, 24, 12, 2, 8, 8, 6, 2, 4, 6, 3, 4, 5, 1, 2, 3)
relu, most = torch.relu, torch.maximum
CLOSED = (
    lambda a, b, c, d: relu(d + relu(a) + relu(b) + relu(c)),
    lambda a, b, c, d: relu(a) + relu(b) + relu(c) + relu(d),
    lambda a, b, c, d: relu(b + relu(a)) + relu(c) + relu(d),
    lambda a, b, c, d: relu(d + relu(c + relu(a) + relu(b))),
    lambda a, b, c, d: relu(c + relu(a) + relu(b)) + relu(d),
    lambda a, b, c, d: most(relu(b) + relu(c), a + b + c) + relu(d),
    lambda a, b, c, d: relu(b + relu(a)) + relu(d + relu(c)),
    lambda a, b, c, d: most(relu(c) + relu(d), c + d + relu(b + relu(a))),
    lambda a, b, c, d: relu(c + relu(b + relu(a))) + relu(d),
    lambda a, b, c, d: most(relu(b) + relu(c) + relu(d), a + b + c + d),
    lambda a, b, c, d: most(relu(b) + relu(d + relu(c)), a + b + c + d),
    lambda a, b, c, d: most(relu(c) + relu(d), c + d + relu(a) + relu(b)),
    lambda a, b, c, d: most(relu(b + relu(a)) + relu(d), b + c + d + relu(a)),
    lambda a, b, c, d: relu(d + relu(c + relu(b + relu(a)))),
    lambda a, b, c, d: relu(d + most(relu(b) + relu(c), a + b + c)),
    lambda a, b, c, d: relu(d + relu(b) + relu(c + relu(a))),
)


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def listed(poset, x):
    """The definition: the largest of the sums over all up-sets, along the last axis."""
    return (x @ torch.from_numpy(poset.order_polytope_vertices()).T).amax(-1)


def value(poset, x):
    return largest_upset_sum(x.unbind(-1), poset.formula)


@st.composite
def posets(draw, most=6):
    n = draw(st.integers(1, most))
    pairs = list(itertools.combinations(range(n), 2))
    return Poset(n, draw(st.lists(st.sampled_from(pairs), max_size=8)) if pairs else [])


def brute_upsets(poset):
    """All sets of points that hold with every point all that lie above it."""
    sets = range(1 << poset.n)
    return {s for s in sets if all(poset.above[i] & ~s == 0 for i in range(poset.n) if s >> i & 1)}


@settings(max_examples=60, deadline=None)
@given(posets())
def test_any_poset(poset):
    upsets = poset.upsets()
    assert set(upsets) == brute_upsets(poset)
    assert len(upsets) == len(set(upsets))
    orders = itertools.permutations(range(poset.n))
    inside = sum(all(order[i] < order[j] for i, j in poset.relations()) for order in orders)
    assert poset.linear_extensions() == inside
    x = noise(50, poset.n)
    torch.testing.assert_close(value(poset, x), listed(poset, x))
    torch.testing.assert_close(value(poset, x), x.sum(-1) + value(poset.dual(), -x))
    torch.testing.assert_close(PosetReLUNetwork(poset, dtype=torch.float64)(x), listed(poset, x))
    assert Poset(poset.n, poset.relations()) == poset
    assert poset.dual().dual() == poset


@pytest.mark.parametrize("number", range(16))
def test_the_sixteen(number):
    poset = Poset.named(number)
    assert len(poset.upsets()) == COUNTS[number]
    assert poset.linear_extensions() == EXTENSIONS[number]
    upsets = set(poset.upsets())
    assert all(u & v in upsets and u | v in upsets for u in upsets for v in upsets)
    x = noise(300, 4)
    torch.testing.assert_close(value(poset, x), CLOSED[number](*x.unbind(-1)), atol=1e-12, rtol=0)
    torch.testing.assert_close(value(poset, x), listed(poset, x), atol=1e-12, rtol=0)
    torch.testing.assert_close(value(poset, 3 * x), 3 * value(poset, x))
    assert (value(poset, x) >= 0).all()
    torch.testing.assert_close(value(poset, x.abs()), x.abs().sum(-1))
    assert value(poset, -x.abs()).abs().max() == 0
    middle = value(poset, (x[:150] + x[150:]) / 2)
    assert (middle <= (value(poset, x[:150]) + value(poset, x[150:])) / 2 + 1e-12).all()


def test_numbers_up_to_isomorphism_and_pairs_of_opposites():
    assert [len(all_posets(n)) for n in range(1, 6)] == [1, 2, 5, 16, 63]
    codes = [Poset.named(k).canonical for k in range(16)]
    assert set(codes) == {p.canonical for p in all_posets(4)}
    partner = {k: codes.index(Poset.named(k).dual().canonical) for k in range(16)}
    pairs = {0: 9, 9: 0, 3: 7, 7: 3, 4: 5, 5: 4, 10: 15, 15: 10}
    assert partner == {k: pairs.get(k, k) for k in range(16)}
    kinds = {k: {s[0] for s in Poset.named(k).formula.steps.values()} for k in range(16)}
    assert [k for k in kinds if "choose" in kinds[k]] == [12]


def test_a_relation_more_never_gives_more():
    x = noise(200, 4)
    for poset in all_posets(4):
        f = value(poset, x)
        assert (f <= value(Poset.antichain(4), x) + 1e-12).all()
        for pair in itertools.combinations(range(4), 2):
            if not poset.above[pair[1]] >> pair[0] & 1:
                assert (value(Poset(4, [*poset.relations(), pair]), x) <= f + 1e-12).all()


def test_volume_of_the_order_polytope():
    for number in (2, 12, 15):
        poset = Poset.named(number)
        t = torch.rand(40000, 4, generator=torch.Generator().manual_seed(number))
        inside = torch.stack([t[:, i] <= t[:, j] for i, j in poset.relations()]).all(0).double().mean()
        assert abs(float(inside) - poset.linear_extensions() / 24) < 0.01


def test_composition():
    p, q = Poset(3, [(0, 1), (0, 2)]), Poset(2, [(0, 1)])
    x, y = noise(100, 3), noise(100, 2, seed=1)
    both = torch.cat([x, y], 1)
    torch.testing.assert_close(value(p.disjoint(q), both), value(p, x) + value(q, y))
    torch.testing.assert_close(value(p.ordinal(q), both), torch.maximum(value(q, y), y.sum(1) + value(p, x)))
    assert Poset.chain(2).substitute([Poset(1), Poset.antichain(2)]) == p
    assert Poset.antichain(2).substitute([Poset.chain(2), Poset.chain(2)]) == Poset.named(6)
    # Lexicographic composition is associative.
    inner = [Poset.chain(2), Poset.antichain(2), Poset(1)]
    one = p.substitute(inner).substitute([q, Poset(1), Poset(1), q, Poset(1)])
    other = p.substitute([inner[0].substitute([q, Poset(1)]), inner[1].substitute([Poset(1), q]), Poset(1)])
    assert one == other
    with pytest.raises(ValueError, match="inner=2"):
        p.substitute([q, q])


@settings(max_examples=30, deadline=None)
@given(
    ndim=st.sampled_from([1, 2, 3]),
    k=st.integers(1, 3),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    padding=st.sampled_from([0, 1, "same", "valid", "ceil"]),
    family=st.sampled_from(["chain", "antichain", "rows"]),
    length=st.integers(5, 8),
)
def test_sliding(ndim, k, stride, dilation, padding, family, length):
    taps = k**ndim
    poset = [(i, i + k) for i in range(taps - k)] if family == "rows" else family
    x = noise(2, 2, *[length + i for i in range(ndim)])
    y = poset_filter(x, poset, k, stride, padding, dilation)
    extent = dilation * (k - 1) + 1
    total = {"same": extent - 1, "valid": 0, "ceil": 0}.get(padding, 2 * padding if isinstance(padding, int) else 0)
    before = total // 2 if padding == "same" else total - total // 2 if isinstance(padding, int) else 0
    padded = F.pad(x, [before, 40] * ndim)
    rounding = math.ceil if padding == "ceil" else math.floor
    sizes = [rounding((n + total - extent) / stride) + 1 for n in x.shape[2:]]
    if padding == "ceil":
        sizes = [min(m, math.ceil(n / stride)) for m, n in zip(sizes, x.shape[2:], strict=True)]
    assert list(y.shape[2:]) == sizes
    order = as_poset(poset, taps)
    for place in itertools.product(*(range(n) for n in sizes)):
        window = padded[(..., *(slice(i * stride, i * stride + extent, dilation) for i in place))].flatten(2)
        torch.testing.assert_close(y[(..., *place)], value(order, window))


@pytest.mark.parametrize(("height", "width"), [(5, 7), (4, 5), (1, 1), (6, 4)])
def test_odd_sizes_are_padded_behind(height, width):
    x = noise(2, 3, height, width)
    padded = F.pad(x, (0, width % 2, 0, height % 2))
    for number in (1, 12, 13):
        y = poset_filter(x, number)
        torch.testing.assert_close(y, poset_filter(padded, number))
        blocks = padded.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
        torch.testing.assert_close(y, listed(Poset.named(number), blocks))
        layer = PosetFilter2d(3, kernel_size=2, stride=2, poset=number, bias=False).double()
        torch.testing.assert_close(layer(x), y)
        torch.testing.assert_close(PosetPool(number, scale=0.25)(x), y / 4)


def test_windows_apart_start_inside():
    x = noise(1, 2, 9, 4)
    y = poset_filter(x, 1, 2, stride=3)
    assert y.shape == (1, 2, 3, 2)  # not a fourth row from nothing but padding, behind row 9
    torch.testing.assert_close(y, poset_filter(F.pad(x, (0, 1)), 1, 2, stride=3, padding=0))
    assert PosetPool(12, 2, stride=5)(noise(1, 1, 4, 6)).shape == (1, 1, 1, 2)


def test_points_from_arrays():
    pairs = np.array([[i, i + 1] for i in range(69)])
    assert Poset(70, pairs) == Poset.chain(70)  # more points than an integer of the array has bits
    assert as_poset(pairs[:3], 4) == Poset.chain(4)


def test_known_limits():
    x = noise(2, 3, 6, 8)
    torch.testing.assert_close(poset_filter(x, 1), 4 * F.avg_pool2d(x.relu(), 2))
    torch.testing.assert_close(poset_filter(x, "chain", 1), x.relu())
    for number in range(16):
        torch.testing.assert_close(poset_filter(x.relu(), number), 4 * F.avg_pool2d(x.relu(), 2))


@pytest.mark.parametrize("number", range(16))
def test_gradient_is_the_smallest_best_upset(number):
    poset = Poset.named(number)
    rows = torch.from_numpy(poset.order_polytope_vertices())
    # Few values, hence many ties.
    x = torch.tensor(list(itertools.product([-1.0, 0.0, 1.0], repeat=4)), dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(value(poset, x).sum(), x)
    first = (x @ rows.T).argmax(1)
    assert torch.equal(gradient, rows[first])
    with torch.no_grad():
        assert torch.equal(value(poset, x), listed(poset, x))
    z = noise(5, 4, seed=number).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda z: value(poset, z).square(), z)


def test_permutation_turns_the_filter():
    x = noise(2, 3, 6, 8)
    turned = PosetPool(5, permutation=(1, 3, 0, 2))(x)
    torch.testing.assert_close(PosetPool(5)(x.rot90(1, (2, 3))), turned.rot90(1, (2, 3)))
    layer = PosetFilter2d(3, kernel_size=2, stride=2, poset=5, permutation=(1, 3, 0, 2)).double()
    torch.testing.assert_close(layer(x), turned)
    for build in (PosetPool, lambda **options: PosetFilter2d(3, poset=5, **options)):
        for wrong in ((0, 1, 2, 2), 3):
            with pytest.raises(ValueError, match="permutation="):
                build(permutation=wrong)


@pytest.mark.parametrize("build", [PosetFilter1d, PosetFilter2d, PosetFilter3d])
def test_operator_is_filter_scale_and_bias(build):
    layer = build(3, kernel_size=2, poset="antichain", scale=0.5).double()
    assert [n for n, _ in layer.named_parameters()] == ["bias"]
    layer.bias.data = noise(3)
    x = noise(2, 3, *(5, 4, 6)[: build.ndim])
    expected = poset_filter(x, "antichain", 2, 1, "same") / 2 + layer.bias.reshape(-1, *[1] * build.ndim)
    torch.testing.assert_close(layer(x), expected)


def test_network_is_of_small_integers():
    net = PosetReLUNetwork(Poset.named(13))
    assert net.depth == 4
    for number in range(16):
        for buffer in PosetReLUNetwork(Poset.named(number)).buffers():
            assert set(buffer.flatten().tolist()) <= {-1.0, 0.0, 1.0, 2.0}
    with pytest.raises(ValueError, match="x of shape"):
        net(torch.zeros(3))


def test_not_a_number_is_passed_on():
    for number in range(16):
        for place in range(4):
            x = torch.zeros(4)
            x[place] = math.nan
            for enabled in (True, False):
                with torch.set_grad_enabled(enabled):
                    assert value(Poset.named(number), x).isnan()


def test_series_parallel_formulas_are_short_and_others_bounded():
    assert len(Poset.chain(300).formula.steps) == 2
    fence = Poset(40, [(i, i + 1) if i % 2 == 0 else (i + 1, i) for i in range(39)])
    x = noise(20, 40)
    assert len(fence.formula.steps) < 5000
    torch.testing.assert_close(value(fence, x), x.sum(-1) + value(fence.dual(), -x))


class _Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_additions_and_maxima():
    """Four maxima and three to five additions for a block, one more maximum where two sums compete."""
    for poset, n in [(Poset.named(k), 4) for k in range(16)] + [(Poset.chain(9), 9), (Poset.antichain(9), 9)]:
        with torch.no_grad(), _Calls() as calls:
            value(poset, torch.zeros(2, n))
        counted = [sum(c in names for c in calls.names) for names in (("relu", "maximum"), ("add",))]
        assert n <= counted[0] <= n + 1
        assert n - 1 <= counted[1] <= n + 1
    assert [len(w) for w in PosetReLUNetwork(Poset.chain(4)).buffers()] == [1, 1, 1, 1, 8]


def test_refusals():
    with pytest.raises(ValueError, match="relations="):
        Poset(2, [(0, 2)])
    with pytest.raises(ValueError, match="cycle"):
        Poset(3, [(0, 1), (1, 2), (2, 0)])
    for pairs in ([(0, 1, 2)], [(0,)], [0, 1], ["ab"], [(0.0, 1)]):
        with pytest.raises(ValueError, match=r"relations=.*must be pairs"):
            Poset(3, pairs)
    for value_ in (None, 1.5):
        with pytest.raises(ValueError, match="poset="):
            PosetPool(value_)
    with pytest.raises(ValueError, match=r"kernel_size=2\.0"):
        PosetPool(kernel_size=2.0)
    with pytest.raises(ValueError, match="values=1"):
        largest_upset_sum([torch.zeros(2)], Poset(2).formula)
    with pytest.raises(ValueError, match="poset=12"):
        PosetReLUNetwork(12)
    with pytest.raises(ValueError, match=r"x of shape \(1, 1, 0, 2\)"):
        PosetPool()(torch.zeros(1, 1, 0, 2))
    with pytest.raises(ValueError, match="number="):
        Poset.named(16)
    with pytest.raises(ValueError, match="limit=65536"):
        Poset.antichain(20).upsets()
    with pytest.raises(ValueError, match=r"formula has more than 10 steps"):
        Formula(Poset(40, [(i, i + 1) if i % 2 == 0 else (i + 1, i) for i in range(39)]), limit=10)
    with pytest.raises(ValueError, match="362880 orders"):
        _ = Poset.antichain(9).canonical
    with pytest.raises(ValueError, match="n=7"):
        all_posets(7)
    with pytest.raises(ValueError, match="places="):
        Poset.chain(2).relabel((0, 0))
    with pytest.raises(ValueError, match="poset=-1"):
        PosetPool(-1)
    with pytest.raises(ValueError, match="poset='tree'"):
        PosetPool("tree")
    with pytest.raises(ValueError, match="the window has 9"):
        PosetPool(3, kernel_size=3)
    with pytest.raises(ValueError, match="kernel_size="):
        PosetPool("chain", kernel_size=(2, 2, 2, 2))
    with pytest.raises(ValueError, match="x of shape"):
        PosetPool()(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="smaller than the window"):
        poset_filter(torch.zeros(1, 1, 2, 2), "chain", 3, padding=0)
