"""Scans with a state, gated scans of the plane against a loop and under symmetries, changes of scale."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.ops.harness import randomise
from tests.parity.core import Case, run_case
from torchconv import param_groups
from torchconv.kernels import selective_scan
from torchconv.ops.hrvmamba_scan import cross_merge, cross_scan
from torchconv.ops.serpent import PatchExpand2d, PatchMerging2d, SS2d, stateful_scan


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def build(*arguments: Any, **options: Any) -> SS2d:
    torch.manual_seed(0)
    layer: Any = randomise(SS2d(*arguments, **options)).double().eval()
    for p in layer.parameters():  # away from linear maps near zero
        nn.init.normal_(p, std=0.4)
    return layer


def loop(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence, δ as it is, b and c a channel."""
    found = []
    for t in range(u.shape[2]):
        d = delta[:, :, t, None]
        state = torch.exp(d * a) * state + d * b[..., t] * u[:, :, t, None]
        found.append((state * c[..., t]).sum(2))
    return torch.stack(found, 2), state


def test_constant_coefficients_are_a_convolution() -> None:
    length, n = 37, 3
    u, a = noise(2, 4, length), -noise(4, n).exp()
    b, c = noise(4, n), noise(4, n)
    step = torch.tensor(0.3, dtype=torch.float64)
    y, _ = stateful_scan(u, step.expand(2, 4, length), a, b, c)
    powers = torch.exp(step * a)[..., None] ** torch.arange(length)
    taps = (c[..., None] * powers * (step * b)[..., None]).sum(1)
    expected = torch.fft.irfft(torch.fft.rfft(u, 2 * length) * torch.fft.rfft(taps, 2 * length), 2 * length)
    torch.testing.assert_close(y, expected[..., :length])


def test_limits_of_the_rate() -> None:
    u, delta = noise(1, 3, 20), noise(1, 3, 21)[..., :20].abs() + 0.1
    b, c = noise(1, 1, 20), noise(1, 2, 20)[:, :1]
    forgets, _ = stateful_scan(u, delta, torch.full((3, 1), -1e6).double(), b, c)
    torch.testing.assert_close(forgets, c * delta * b * u)
    keeps, last = stateful_scan(u, delta, torch.zeros(3, 1).double(), b, c)
    torch.testing.assert_close(keeps, c * (delta * b * u).cumsum(2))
    torch.testing.assert_close(last[..., 0], (delta * b * u).sum(2))


@settings(max_examples=15, deadline=None)
@given(
    length=st.integers(1, 30),
    states=st.integers(1, 4),
    groups=st.sampled_from([0, 1, 2, 4, -1]),
    softplus=st.booleans(),
    cut=st.integers(0, 30),
)
def test_pieces_with_a_state_are_the_whole(length: int, states: int, groups: int, softplus: bool, cut: int) -> None:
    cut = min(cut, length)
    u, delta, z = noise(2, 4, length), noise(2, 4, length, 2)[..., 0], noise(2, 4, length, 3)[..., 0]
    delta = delta if softplus else delta.abs()
    a, d, bias, first = -noise(4, states).exp(), noise(4), noise(4, 5)[:, 0].abs(), noise(2, 4, states, 1)[..., 0]
    if groups == -1:
        b, c = noise(4, states, 7)[..., 0], noise(4, states, 8)[..., 0]
        wide = [t[None, :, :, None].expand(2, -1, -1, length) for t in (b, c)]
    else:
        shape = (2, groups, states, length) if groups else (2, states, length)
        b, c = noise(*shape, 2)[..., 0], noise(*shape, 3)[..., 0]
        wide = [t.reshape(2, max(groups, 1), states, length).repeat_interleave(4 // max(groups, 1), 1) for t in (b, c)]
    steps = delta + bias[:, None]
    y, last = loop(u, F.softplus(steps) if softplus else steps, a, *wide, first)
    y = (y + d[:, None] * u) * F.silu(z)
    found, state = [], first
    for part in (slice(0, cut), slice(cut, length)):
        vectors = [t if t.dim() == 2 else t[..., part] for t in (b, c)]
        pieces = [t[..., part] for t in (u, delta)]
        piece, state = stateful_scan(*pieces, a, *vectors, d, z[..., part], bias, softplus, state)
        found.append(piece)
    torch.testing.assert_close(torch.cat(found, 2), y)
    torch.testing.assert_close(state, last)
    zero, _ = stateful_scan(u, delta, a, b, c, d, z, bias, softplus)
    torch.testing.assert_close(zero, selective_scan(u, delta, a, b, c, d, z, bias, softplus))


def test_gradients_through_the_state() -> None:
    tensors = [noise(1, 2, 5), noise(1, 2, 6)[..., :5], -noise(2, 2).exp(), noise(1, 2, 5, 1)[..., 0]]
    tensors += [noise(1, 2, 5, 2)[..., 0], noise(1, 2, 2)]
    tensors = [t.clone().requires_grad_() for t in tensors]

    def run(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return stateful_scan(u, delta, a, b, c, delta_softplus=True, state=state)

    assert torch.autograd.gradcheck(run, tensors)
    with pytest.raises(ValueError, match=r"state of shape .*expected \(1, 2, 2\)"):
        run(*tensors[:5], noise(2, 2))


def test_directions() -> None:
    x = noise(2, 3, 4, 7)
    xs = cross_scan(x)
    torch.testing.assert_close(cross_merge(xs, (4, 7)), 4 * x.flatten(2))
    assert torch.equal(cross_scan(x.transpose(2, 3)), xs[:, [1, 0, 3, 2]])
    assert torch.equal(cross_scan(x.rot90(2, (2, 3))), xs[:, [2, 3, 0, 1]])


@pytest.mark.parametrize("options", [{}, {"ratio": 1.0, "rank": 3, "states": 2}, {"kernel_size": 1}, {"bias": True}])
def test_written_out(options: dict[str, Any]) -> None:
    layer = build(6, 5, **{"states": 3, **options})
    x = noise(2, 6, 3, 4)
    h, z = F.linear(x.permute(0, 2, 3, 1), layer.in_proj.weight, layer.in_proj.bias).chunk(2, 3)
    pad = layer.conv2d.weight.shape[2] // 2
    h = F.conv2d(h.permute(0, 3, 1, 2), layer.conv2d.weight, layer.conv2d.bias, padding=pad, groups=layer.inner)
    h = F.silu(h)
    places = [(i, j) for i in range(3) for j in range(4)]
    by_column = [(i, j) for j in range(4) for i in range(3)]
    total = torch.zeros_like(h)
    rates = -layer.A_logs.exp().unflatten(0, (4, -1))
    for k, order in enumerate((places, by_column, places[::-1], by_column[::-1])):
        rows, columns = zip(*order, strict=True)
        u = h[:, :, list(rows), list(columns)]
        dt, b, c = (layer.x_proj_weight[k] @ u).split((layer.rank, layer.states, layer.states), 1)
        delta = F.softplus(layer.dt_projs_weight[k] @ dt + layer.dt_projs_bias[k][:, None])
        channels = [t[:, None].expand(-1, layer.inner, -1, -1) for t in (b, c)]
        y, _ = loop(u, delta, rates[k], *channels, torch.zeros(2, layer.inner, layer.states).double())
        total[:, :, list(rows), list(columns)] += y + layer.Ds.unflatten(0, (4, -1))[k][:, None] * u
    y = layer.out_norm(total.permute(0, 2, 3, 1)) * F.silu(z)
    expected = F.linear(y, layer.out_proj.weight, layer.out_proj.bias).permute(0, 3, 1, 2)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("turn", ["transpose", "rotate"])
def test_symmetries(turn: str) -> None:
    layer, twin = build(6, states=3), build(6, states=3)
    order = [1, 0, 3, 2] if turn == "transpose" else [2, 3, 0, 1]

    def turned(t: Tensor) -> Tensor:
        return t.transpose(2, 3) if turn == "transpose" else t.rot90(2, (2, 3))

    with torch.no_grad():
        for name in ("x_proj_weight", "dt_projs_weight", "dt_projs_bias"):
            getattr(twin, name).copy_(getattr(layer, name)[order])
        for name in ("A_logs", "Ds"):
            getattr(twin, name).copy_(getattr(layer, name).unflatten(0, (4, -1))[order].flatten(0, 1))
        twin.conv2d.weight.copy_(turned(layer.conv2d.weight))
    x = noise(1, 6, 4, 7)
    torch.testing.assert_close(twin(turned(x)), turned(layer(x)))
    assert not torch.allclose(layer(turned(x)), turned(layer(x)))


def test_closed_gate_and_reach() -> None:
    layer = build(4, states=2)
    x = noise(1, 4, 5, 6).requires_grad_()
    for place in ((0, 0), (2, 3), (4, 5)):
        (seen,) = torch.autograd.grad(layer(x)[0, :, place[0], place[1]].square().sum(), x)
        assert (seen.abs().amax(1) > 0).all()
    with torch.no_grad():
        layer.in_proj.weight[layer.inner :] = 0
    assert not layer(x).any()


def test_start_decay_and_dropout() -> None:
    torch.manual_seed(0)
    layer = SS2d(32, states=5, dropout=0.5)
    torch.testing.assert_close(layer.A_logs.exp(), torch.arange(1.0, 6).expand(4 * 64, 5))
    steps = F.softplus(layer.dt_projs_bias)
    assert steps.min() >= 9.9e-4
    assert steps.max() <= 0.101
    assert (layer.Ds == 1).all()
    named = {id(p): n for n, p in layer.named_parameters()}
    free = {named[id(p)] for g in param_groups(layer, 0.1, 0.05) if g["weight_decay"] == 0 for p in g["params"]}
    assert {"A_logs", "Ds", "dt_projs_bias"} <= free
    assert "x_proj_weight" not in free
    x = torch.randn(1, 32, 4, 4)
    dropped = (layer(x) == 0).float().mean()
    assert 0.3 < dropped < 0.7
    assert torch.equal(layer.eval()(x), layer(x))


def test_merging_and_expanding_are_permutations() -> None:
    x = noise(1, 3, 4, 6)
    merge = PatchMerging2d(3, 12).double()
    merge.norm = nn.Identity()  # type: ignore[assignment]
    nn.init.eye_(merge.reduction.weight)
    pieces = [x[:, :, i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))]
    assert torch.equal(merge(x), torch.cat(pieces, 1))
    for scale in (1, 2, 3):
        expand = PatchExpand2d(6 * scale, scale).double()
        expand.norm = nn.Identity()  # type: ignore[assignment]
        y = noise(1, 6 * scale, 2, 3)
        wide = F.linear(y.permute(0, 2, 3, 1), expand.expand.weight).permute(0, 3, 1, 2)
        # pixels outermost where pixel shuffle has them innermost
        wide = wide.unflatten(1, (scale**2, 6)).transpose(1, 2).flatten(1, 2)
        torch.testing.assert_close(expand(y), F.pixel_shuffle(wide, scale))


def test_odd_sides() -> None:
    x = noise(2, 3, 5, 7)
    for odd, fits in (("pad", F.pad(x, (0, 1, 0, 1))), ("crop", x[:, :, :4, :6])):
        layer = PatchMerging2d(3, odd=odd).double()
        torch.testing.assert_close(layer(x), layer(fits))
        assert layer(x).shape[1] == 6


def test_case_with_other_settings() -> None:
    """The adapter reads sizes off the file: cropped sides, a rank and a kernel of its own, a mixture of forms."""
    layer = build(5, 5, kernel_size=5, ratio=1.5, states=3, rank=2)
    x = noise(1, 3, 4, 5)
    outputs = {"y": layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).detach()}
    case = Case("serpent", "made", {}, "", "eval", "", None, None, dict(layer.state_dict()), {"x": x}, outputs, {})
    assert all(c.passed for c in run_case(case))
    merge = PatchMerging2d(4, odd="crop").double()
    x = noise(1, 5, 6, 4)
    outputs = {"y": merge(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).detach()}
    case = Case("serpent", "made", {}, "", "eval", "", None, None, dict(merge.state_dict()), {"x": x}, outputs, {})
    assert all(c.passed for c in run_case(case))


@pytest.mark.parametrize(
    ("build_it", "message"),
    [
        (lambda: SS2d(0), "in_channels=0"),
        (lambda: SS2d(4, groups=2), "groups=2"),
        (lambda: SS2d(4, stride=2), "stride=2"),
        (lambda: SS2d(4, kernel_size=4), "kernel_size="),
        (lambda: SS2d(4, ratio=0.1), "ratio=0.1"),
        (lambda: SS2d(4, ratio=-1), "ratio=-1"),
        (lambda: SS2d(4, states=0), "states=0"),
        (lambda: SS2d(4, rank=0), "rank=0"),
        (lambda: SS2d(4, dropout=1.0), "dropout=1.0"),
        (lambda: SS2d(4, directions="both"), "directions='both'"),
        (lambda: SS2d(4, backend="cuda"), "backend='cuda'"),
        (lambda: PatchMerging2d(0), "in_channels=0"),
        (lambda: PatchMerging2d(4, odd="mirror"), "odd='mirror'"),
        (lambda: PatchExpand2d(6, 4), "in_channels=6"),
        (lambda: PatchExpand2d(6, 0), "scale=0"),
        (lambda: SS2d(4)(torch.zeros(1, 3, 4, 4)), "x of shape"),
    ],
)
def test_refusals(build_it: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_it()
