"""The selective scan: a linear recurrence whose coefficients depend on the input, in parallel over time.

    δ_t = softplus(δ'_t + bias)          s_t = exp(δ_t A) ⊙ s_{t−1} + δ_t u_t B_t          y_t = ⟨C_t, s_t⟩ + D u_t

for every channel a state of N numbers (Gu & Dao, "Mamba", arXiv 2312.00752; in the plane arXiv 2401.10166 and
2410.03174). Written as a loop it takes L steps of Python. Here time is cut in about √L chunks: all chunks advance
together, which takes one step a position *of a chunk*, then the chunks' last states are passed on, one step a chunk,
and each chunk's share of what came before is added with the decay since its start. Nothing is divided, no exponent is
larger than the loop's, so that it is as safe as the loop; 2√L steps and about twice the loop's multiply-adds. Where a
step of the loop is large enough by itself (many channels) there is one chunk, and it is the loop.

The states, N numbers a channel and position, are the reason why differentiating the expression needs so much memory.
They are made for a few of the N at a time, and made again for the gradient, which is the same recurrence run backwards:

    λ_t = g_t C_t + exp(δ_{t+1} A) ⊙ λ_{t+1}
    ∂B_t = Σ λ_t δ_t u_t,    ∂C_t = Σ g_t s_t,    ∂(δ_t A) = λ_t ⊙ exp(δ_t A) ⊙ s_{t−1}

On a GPU one Triton program advances several channels, and joins positions of a chunk by an associative scan
(``_scan_triton.py``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchconv._common import check, check_choice
from torchconv.catalog import part
from torchconv.kernels import _custom
from torchconv.kernels._triton_probe import trustworthy
from torchconv.kernels.precision import widen

BACKENDS = ("auto", "native", "triton", "reference")
_ROWS = 8192  # numbers in one step of the loop from which it is not worth cutting time in chunks
_BLOCK = 1 << 21  # states held at a time


class _Layout:
    """Time in chunks: (N, channels, L) as (T, chunks, N, groups, 1, channels of a group), and back.

    Position t of all chunks is one contiguous slab, which a step of the recurrence reads.
    """

    def __init__(self, u: Tensor, groups: int, cut: bool = False) -> None:
        self.batch, self.channels, self.length = u.shape[0], u.shape[1], int(u.shape[2])
        self.groups = groups
        large = not cut and self.batch * self.channels >= _ROWS
        self.steps = self.length if large else math.isqrt(max(0, self.length - 1)) + 1
        self.chunks = -(-self.length // self.steps) if self.length else 0

    def _cut(self, t: Tensor) -> Tensor:
        """(N, …, L) → (T, chunks, N, …), padded with zeros, for which the recurrence stands still."""
        t = F.pad(t, (0, self.steps * self.chunks - self.length)).unflatten(-1, (self.chunks, self.steps))
        return t.movedim((-1, -2), (0, 1)).contiguous()

    def channelwise(self, t: Tensor) -> Tensor:
        """u, δ, g: (N, C, L) → (T, chunks, N, groups, 1, C / groups)."""
        return self._cut(t).unflatten(3, (self.groups, self.channels // self.groups)).unsqueeze(4)

    def statewise(self, t: Tensor) -> Tensor:
        """B, C: (N, groups or 1, n, L) → (T, chunks, N, ·, n, 1); (C, n) → (1, 1, 1, groups, n, C / groups)."""
        if t.dim() == 2:
            return self.decay(t)
        return self._cut(t).unsqueeze(-1)

    def decay(self, a: Tensor) -> Tensor:
        """A: (C, n) → (1, 1, 1, groups, n, C / groups)."""
        return a.unflatten(0, (self.groups, self.channels // self.groups)).transpose(1, 2)[None, None, None]

    def _joined(self, t: Tensor) -> Tensor:
        """(T, chunks, N, …) → (N, …, L)."""
        return t.movedim((0, 1), (-1, -2)).flatten(-2)[..., : self.length]

    def to_channels(self, t: Tensor) -> Tensor:
        """The inverse of :meth:`channelwise`."""
        return self._joined(t.squeeze(4).flatten(3, 4))

    def to_states(self, t: Tensor, like: Tensor) -> Tensor:
        """The inverse of :meth:`statewise`, summed over what was broadcast."""
        return self.to_decay(t) if like.dim() == 2 else self._joined(t.squeeze(-1))

    def to_decay(self, t: Tensor) -> Tensor:
        """The inverse of :meth:`decay`."""
        return t[0, 0, 0].transpose(1, 2).flatten(0, 1)

    def blocks(self, states: int) -> list[slice]:
        """Some of the states at a time."""
        numbers = self.batch * self.channels * self.length
        width = max(1, min(states, _BLOCK // max(1, numbers)))
        return [slice(n, n + width) for n in range(0, states, width)]


def _run(decay: Tensor, s: Tensor, backwards: bool = False) -> Tensor:
    """s_t ← s_t + decay_t · s_{t−1} in place, over positions (axis 0) and chunks (axis 1); ``decay`` is used up."""
    order = range(len(s))
    chunks = range(s.shape[1])
    if backwards:
        order, chunks = order[::-1], chunks[::-1]
    for before, t in itertools.pairwise(order):
        s[t].addcmul_(decay[t], s[before])
        if len(chunks) > 1:
            decay[t].mul_(decay[before])
    if len(chunks) > 1:
        last, through = s[order[-1]], decay[order[-1]]
        carried = torch.zeros_like(last)
        for before, c in itertools.pairwise(chunks):
            torch.addcmul(last[before], through[before], carried[before], out=carried[c])
        s.addcmul_(decay, carried)
    return s


def _run_plain(decay: Tensor, s: Tensor) -> Tensor:
    """The same in ordinary operators, out of place."""
    states, through = [s[0]], [decay[0]]
    for t in range(1, len(s)):
        states.append(s[t] + decay[t] * states[-1])
        through.append(decay[t] * through[-1])
    carried = [torch.zeros_like(states[-1][0])]
    for c in range(s.shape[1] - 1):
        carried.append(states[-1][c] + through[-1][c] * carried[-1])
    return torch.stack(states) + torch.stack(through) * torch.stack(carried)


def _run_doubled(decay: Tensor, s: Tensor) -> Tensor:
    """The same in about log₂ L steps instead of 2√L, for graphs: each row takes in the one 1, 2, 4, … rows before."""
    states, through = _doubled(decay, s)
    if s.shape[1] == 1:
        return states
    carried, _ = _doubled(through[-1], states[-1])
    return states + through * _behind(carried, 1, 0.0)


def _doubled(decay: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence over axis 0, and the products of its coefficients."""
    step = 1
    while step < len(s):
        s = s + decay * _behind(s, step, 0.0)
        decay = decay * _behind(decay, step, 1.0)
        step *= 2
    return s, decay


def _behind(t: Tensor, step: int, value: float) -> Tensor:
    """Rows moved ``step`` towards the end, ``value`` in those that come free."""
    return F.pad(t, [0, 0] * (t.dim() - 1) + [step, -step], value=value)


def _softplus(delta: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    raw = widen(delta)
    raw = raw if bias is None else raw + widen(bias)[:, None]
    return F.softplus(raw) if softplus else raw


def _groups(b: Tensor, c: Tensor) -> int:
    return max(1 if t.dim() == 2 else int(t.shape[1]) for t in (b, c))


def _native(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    layout = _Layout(u, _groups(b, c))
    d = layout.channelwise(_softplus(delta, bias, softplus))
    x = d * layout.channelwise(widen(u))
    rates, enters, leaves = layout.decay(widen(a)), layout.statewise(widen(b)), layout.statewise(widen(c))
    y = torch.zeros_like(x)
    for n in layout.blocks(a.shape[1]):
        s = _run((d * rates[..., n, :]).exp_(), x * enters[..., n, :])
        y += s.mul_(leaves[..., n, :]).sum(4, keepdim=True)
    return layout.to_channels(y).to(u.dtype).contiguous()


def _native_backward(
    grad: Tensor,
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    bias: Tensor | None,
    softplus: bool,
) -> tuple[Tensor, ...]:
    layout = _Layout(u, _groups(b, c))
    d = layout.channelwise(_softplus(delta, bias, softplus))
    wide_u, g = layout.channelwise(widen(u)), layout.channelwise(widen(grad))
    x = d * wide_u
    rates, enters, leaves = layout.decay(widen(a)), layout.statewise(widen(b)), layout.statewise(widen(c))
    by_x, by_d = torch.zeros_like(x), torch.zeros_like(x)
    by_rates, by_enters, by_leaves = (torch.zeros_like(t) for t in (rates, enters, leaves))
    for n in layout.blocks(a.shape[1]):
        decay = (d * rates[..., n, :]).exp_()
        s = _run(decay.clone(), x * enters[..., n, :])
        by_leaves[..., n, :] = (g * s).sum_to_size(leaves[..., n, :].shape)
        # λ, which meets the decay of the next position: the next row, or the first row of the next chunk
        ahead = torch.empty_like(decay)
        ahead[:-1] = decay[1:]
        ahead[-1, :-1] = decay[0, 1:]
        ahead[-1, -1:] = 0
        adjoint = _run(ahead, g * leaves[..., n, :], backwards=True)
        by_x += (adjoint * enters[..., n, :]).sum(4, keepdim=True)
        by_enters[..., n, :] = (adjoint * x).sum_to_size(enters[..., n, :].shape)
        # λ ⊙ exp(δA) ⊙ s_{t−1}, the gradient of the exponent
        adjoint.mul_(decay)
        adjoint[1:] *= s[:-1]
        adjoint[0, 1:] *= s[-1, :-1]
        adjoint[0, :1] = 0
        by_d += (adjoint * rates[..., n, :]).sum(4, keepdim=True)
        by_rates[..., n, :] = (adjoint * d).sum_to_size(rates[..., n, :].shape)
    by_d.addcmul_(by_x, wide_u)
    by_delta = layout.to_channels(by_d)
    by_delta, by_bias = _through_softplus(by_delta, delta, bias, softplus)
    return (
        layout.to_channels(by_x.mul_(d)).to(u.dtype).contiguous(),
        by_delta.to(delta.dtype).contiguous(),
        layout.to_decay(by_rates).to(a.dtype).contiguous(),
        layout.to_states(by_enters, b).to(b.dtype).contiguous(),
        layout.to_states(by_leaves, c).to(c.dtype).contiguous(),
        by_bias,
    )


def _through_softplus(by: Tensor, delta: Tensor, bias: Tensor | None, softplus: bool) -> tuple[Tensor, Tensor]:
    """The gradient of δ' from that of δ, and the bias's."""
    if softplus:
        raw = widen(delta) if bias is None else widen(delta) + widen(bias)[:, None]
        by = by * torch.sigmoid(raw)
    if bias is None:
        return by, by.new_empty(0)
    return by, by.sum((0, 2)).to(bias.dtype)


def _composite(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, bias: Tensor | None, softplus: bool
) -> Tensor:
    """The scan in ordinary operators, for exporters, transforms and gradients of gradients."""
    layout = _Layout(u, _groups(b, c), cut=True)
    d = layout.channelwise(_softplus(delta, bias, softplus))
    x = d * layout.channelwise(widen(u))
    run = _run_doubled if torch.compiler.is_exporting() or torch.jit.is_tracing() else _run_plain
    s = run((d * layout.decay(widen(a))).exp(), x * layout.statewise(widen(b)))
    return layout.to_channels((s * layout.statewise(widen(c))).sum(4, keepdim=True)).to(u.dtype)


def _reference(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, bias: Tensor | None, softplus: bool
) -> Tensor:
    """The loop over time."""
    d, wide_u, a = _softplus(delta, bias, softplus), widen(u), widen(a)
    per_channel = []
    for vectors in (b, c):
        if vectors.dim() == 2:
            per_channel.append(widen(vectors)[None, :, :, None].expand(-1, -1, -1, u.shape[2]))
        else:
            per_channel.append(widen(vectors).repeat_interleave(u.shape[1] // vectors.shape[1], 1))
    enters, leaves = per_channel
    state = torch.zeros(u.shape[0], *a.shape, dtype=wide_u.dtype, device=u.device)
    found = []
    for t in range(u.shape[2]):
        state = torch.exp(d[:, :, t, None] * a) * state + (d * wide_u)[:, :, t, None] * enters[..., t]
        found.append((state * leaves[..., t]).sum(2))
    return torch.stack(found, 2).to(u.dtype)


def _on_programs(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> bool:
    """Whether the Triton kernels can take it: a GPU, coefficients that vary in time, up to 256 states."""
    alike = all(t.device == u.device and t.dtype != torch.float64 for t in (u, delta, a, b, c))
    return alike and b.dim() == 4 and c.dim() == 4 and 0 < a.shape[1] <= 256 and trustworthy("scan", u.device)


def _forward(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, bias: Tensor | None, softplus: bool, native: bool
) -> Tensor:
    if u.numel() == 0:
        return torch.empty_like(u, memory_format=torch.contiguous_format)
    if not native and _on_programs(u, delta, a, b, c):
        from torchconv.kernels import _scan_triton

        return _scan_triton.output(u, _softplus(delta, bias, softplus), a, b, c)
    return _native(u, delta, a, b, c, bias, softplus)


def _backward(
    grad: Tensor,
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    bias: Tensor | None,
    softplus: bool,
    native: bool,
) -> tuple[Tensor, ...]:
    if u.numel() == 0:
        zeros = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (u, delta, a, b, c)]
        return *zeros, u.new_empty(0) if bias is None else torch.zeros_like(bias)
    if not native and _on_programs(u, delta, a, b, c):
        from torchconv.kernels import _scan_triton

        by_u, by_delta, by_a, by_b, by_c = _scan_triton.gradients(grad, u, _softplus(delta, bias, softplus), a, b, c)
        by_delta, by_bias = _through_softplus(by_delta, delta, bias, softplus)
        return by_u, by_delta.to(delta.dtype).contiguous(), by_a, by_b, by_c, by_bias
    return _native_backward(grad, u, delta, a, b, c, bias, softplus)


def _fake(u: Tensor, *rest: Any) -> Tensor:
    return u.new_empty(u.shape)


def _fake_backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *tensors, bias, _, _ = arguments
    by_bias = widen(grad).new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return *(t.new_empty(t.shape) for t in tensors), by_bias


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.softplus, ctx.native = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    needs = ctx.needs_input_grad[:6]
    if torch.is_grad_enabled():  # someone will differentiate again
        wanted = [t for t, need in zip(tensors, needs, strict=True) if need]
        again: Any = _composite
        y = again(*tensors, ctx.softplus)
        found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
        return *(next(found) if need else None for need in needs), None, None
    by = _BACKWARD(grad, *tensors, ctx.softplus, ctx.native)
    return *(g if need else None for g, need in zip(by, needs, strict=True)), None, None


_ARGUMENTS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? bias, bool softplus, bool native"
_BACKWARD = _custom.define(
    "selective_scan_backward",
    f"(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
_SCAN = _custom.define("selective_scan", f"({_ARGUMENTS}) -> Tensor", _forward, _fake, _autograd, _keep)


def _check(u: Tensor, delta: Tensor, a: Tensor, vectors: Sequence[tuple[str, Tensor]]) -> None:
    if u.dim() != 3 or not u.is_floating_point():
        raise ValueError(f"u of shape {tuple(u.shape)}, {u.dtype}: expected real (N, channels, L)")
    if delta.shape != u.shape:
        raise ValueError(f"delta of shape {tuple(delta.shape)}: expected u's {tuple(u.shape)}")
    if a.dim() != 2 or a.shape[0] != u.shape[1] or a.is_complex():
        raise ValueError(f"A of shape {tuple(a.shape)}, {a.dtype}: expected real ({u.shape[1]}, states)")
    states = a.shape[1]
    groups: list[int] = []
    for name, t in vectors:
        fits = t.shape == a.shape if t.dim() == 2 else t.shape[::2] == (u.shape[0], states) and t.shape[3] == u.shape[2]
        if not fits:
            expected = f"({u.shape[0]}, groups, {states}, {u.shape[2]}) or {tuple(a.shape)}"
            raise ValueError(f"{name} of shape {tuple(t.shape)}: expected {expected}")
        if t.dim() == 4:
            fits = t.shape[1] > 0 and u.shape[1] % t.shape[1] == 0
            check(fits, f"{name}.shape[1]", t.shape[1], f"must divide channels={u.shape[1]}")
            groups.append(int(t.shape[1]))
    fit = len({g for g in groups if g > 1}) <= 1
    check(fit, "groups", tuple(groups), "B and C must have the same number of groups, or one of them a single one")


@part(
    "selective-scan",
    paper="hrvmamba",
    kind="kernel",
    dims=(1,),
    keywords="selective scan Mamba S6 state space model linear recurrence associative parallel VMamba SS2D",
)
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    backend: str = "auto",
) -> Tensor:
    """Linear recurrence with step size and coefficients given for every position.

    s_t = exp(δ_t A) ⊙ s_{t−1} + δ_t u_t B_t from s = 0, y_t = ⟨C_t, s_t⟩ + D u_t, times silu(z_t) where z is given.

    Args:
        u: the sequences. Half precision is computed in float32; the result has u's type.
        delta: step sizes δ', to which ``delta_bias`` is added.
        A: rates, real, negative (usually −exp of a parameter): the state fades. Over states that grow by 10³⁸ in a
            chunk only the reference runs.
        B, C: how the input enters the state and the state leaves: for every position, shared by the channels of a
            group, or fixed for every channel.
        D: weight of the input itself, a channel.
        z: gate.
        delta_bias: a channel.
        delta_softplus: δ = softplus(δ' + bias) instead of δ' + bias.
        backend: "auto"; "native" in PyTorch's operators, chunks of time in parallel; "triton" (a GPU); "reference", the
            loop over time in ordinary operators.

    Shape:
        u, delta, z (N, channels, L), A (channels, n), B and C (N, n, L), (N, groups, n, L) or (channels, n), D and
        delta_bias (channels,) → (N, channels, L).

    Raises:
        ValueError: shapes do not fit, or the back end is unknown or not available.

    Example:
        >>> u = torch.tensor([[[1.0, 0.0, 0.0]]])
        >>> half = -torch.log(torch.tensor([[2.0]]))
        >>> selective_scan(u, torch.ones(1, 1, 3), half, torch.ones(1, 1), torch.ones(1, 1))
        tensor([[[1.0000, 0.5000, 0.2500]]])

    Reference: Gu and Dao, arXiv 2312.00752, algorithm 2; their ``selective_scan_fn`` has these arguments.
    """
    check_choice("backend", backend, BACKENDS)
    B, C = (t.unsqueeze(1) if t.dim() == 3 else t for t in (B, C))
    _check(u, delta, A, (("B", B), ("C", C)))
    for name, t in (("D", D), ("delta_bias", delta_bias)):
        if t is not None and t.shape != u.shape[1:2]:
            raise ValueError(f"{name} of shape {tuple(t.shape)}: expected ({u.shape[1]},)")
    if z is not None and z.shape != u.shape:
        raise ValueError(f"z of shape {tuple(z.shape)}: expected u's {tuple(u.shape)}")
    _custom.check_devices(u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias)
    arguments = (u, delta, A, B, C, delta_bias, bool(delta_softplus))
    if backend == "triton":
        remedy = "needs a GPU with Triton, float32 or half precision, and B and C for every position; use 'auto'"
        check(_on_programs(u, delta, A, B, C), "backend", backend, remedy)
    if backend == "reference":
        y = _reference(*arguments)
    elif _custom.in_ordinary_operators():
        y = _composite(*arguments)
    else:
        y = _SCAN(*arguments, backend == "native")
    if D is not None:
        y = torch.addcmul(y, D.to(y.dtype)[:, None], u)
    return y if z is None else y * F.silu(z)
