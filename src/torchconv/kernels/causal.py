"""Short causal depthwise convolution of sequences, with bias and SiLU: the one in front of state-space models.

y[b, c, l] = act(bias[c] + Σ_j weight[c, k − 1 − j] · x[b, c, l − j]),  x = 0 before the sequence (or its last state).

Bound by memory: k multiply-adds for each element read and written. On a GPU a Triton kernel makes one pass forward and
one backward. On a CPU, sequences in rows (B × C × L) are convolved block by block in the cache by one shifted
multiply-add a tap, and sequences of vectors (B × L × C) by PyTorch's own depthwise convolution of channels-last images,
which has no such path for sequences; gradients likewise. With SiLU the backward pass computes the convolution anew
instead of keeping it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchconv._common import check, check_choice
from torchconv.catalog import part
from torchconv.kernels import _custom
from torchconv.kernels._depthwise_forms import MOST_PADDING
from torchconv.kernels._triton import say_once
from torchconv.kernels._triton_probe import trustworthy
from torchconv.kernels.precision import wide_dtype

LAYOUTS = ("BCL", "BLC")
ACTIVATIONS = (None, "silu", "swish")
_SHORT = 8  # taps; longer kernels have better forms than a pass a tap
_FEW = 5  # taps up to which shifted rows beat PyTorch's convolution …
_SHORT_ROW = 128  # … from so many positions, …
_LITTLE = 1 << 18  # … or beyond so many elements, where the convolution takes new memory from the system;
_LONG_ROW = 256  # positions from which they do whatever the taps
_ROWS = 1 << 19  # elements of a block of rows, …
_SPAN = 1 << 18  # … and of a span of vectors


def _shifts_pay(x: Tensor, w: Tensor) -> bool:
    length, k = x.shape[2], w.shape[1]
    few = k <= _FEW and (length >= _SHORT_ROW or x.numel() > _LITTLE)
    return few or length >= _LONG_ROW or w.dtype == torch.float64


def _row_blocks(x: Tensor, w: Tensor) -> Iterator[tuple[tuple[slice, slice], int, int]]:
    """Items and channels, begin and end of blocks of (B, C, L) that fit the cache; all for PyTorch's convolution."""
    batch, channels, length = x.shape
    size = _ROWS if _shifts_pay(x, w) else x.numel()
    items, some, step = max(1, size // (channels * length)), max(1, size // length), min(length, size)
    for item in range(0, batch, items):
        for channel in range(0, channels, some):
            for begin in range(0, length, step):
                yield (slice(item, item + items), slice(channel, channel + some)), begin, min(length, begin + step)


def _seen(begin: int, end: int, length: int, k: int, mirrored: bool) -> tuple[int, int]:
    """The positions that ``begin`` to ``end`` of the convolution, or of its transpose, see."""
    return (begin, min(length, end + k - 1)) if mirrored else (max(0, begin - k + 1), end)


def _convolve_rows(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    begin: int,
    end: int,
    out: Tensor,
    *,
    silu: bool = False,
    mirrored: bool = False,
) -> None:
    """Positions ``begin`` to ``end`` of the convolution of rows (B, C, L) by shifts, or of its transpose."""
    k = w.shape[1]
    first, last = _seen(begin, end, x.shape[2], k, mirrored)
    rows, before = x[..., first:last].to(w.dtype), begin - first
    y = out if out.dtype == w.dtype else torch.empty_like(out, dtype=w.dtype)
    if bias is None:
        torch.mul(rows.narrow(2, before, end - begin), w[:, -1:], out=y)
    else:
        torch.addcmul(bias.unsqueeze(1), rows.narrow(2, before, end - begin), w[:, -1:], out=y)
    for j in range(1, min(k, last - first)):
        skipped = 0 if mirrored else max(0, j - before)
        source = rows[..., j:] if mirrored else rows[..., before + skipped - j : last - first - j]
        meets = min(source.shape[2], end - begin - skipped)
        y.narrow(2, skipped, meets).addcmul_(source.narrow(2, 0, meets), w[:, k - 1 - j, None])
    if silu:
        F.silu(y, inplace=True)
    if y is not out:
        out.copy_(y)


def _native_rows(x: Tensor, w: Tensor, bias: Tensor | None, mirrored: bool = False, whole: bool = False) -> Tensor:
    """The convolution of all of the rows by PyTorch's, as a view unless it shall be ``whole``."""
    before, x = w.shape[1] - 1, x.to(w.dtype)
    taps = (w.flip(1) if mirrored else w).unsqueeze(1)
    if whole or before > MOST_PADDING:
        return F.conv1d(F.pad(x, (0, before) if mirrored else (before, 0)), taps, bias, groups=len(w))
    y = F.conv1d(x, taps, bias, padding=before, groups=len(w))
    return y.narrow(2, before if mirrored else 0, x.shape[2])


def _forward_rows(x: Tensor, w: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    if not _shifts_pay(x, w):
        y = _native_rows(x, w, bias, whole=not silu)
        return (F.silu(y) if silu else y).to(x.dtype).contiguous()
    out = torch.empty_like(x)
    for block, begin, end in _row_blocks(x, w):
        target, shift = out[block][..., begin:end], None if bias is None else bias[block[1]]
        _convolve_rows(x[block], w[block[1]], shift, begin, end, target, silu=silu)
    return out


def _backward_rows(
    grad: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, silu: bool, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    length, k, shifted = x.shape[2], w.shape[1], _shifts_pay(x, w)
    dx, by_tap, by_bias = torch.empty_like(x), torch.zeros_like(w), w.new_zeros(len(w))
    for block, begin, end in _row_blocks(x, w):
        rows, channels, beyond = x[block], block[1], min(length, end + k - 1)  # the gradient of x looks ahead
        taps, g = w[channels], grad[block][..., begin:beyond].to(w.dtype)
        if silu:
            shift = None if bias is None else bias[channels]
            if shifted:
                before = torch.empty_like(g)
                _convolve_rows(rows, taps, shift, begin, beyond, before)
            else:
                before = _native_rows(rows, taps, shift)
            g = torch.ops.aten.silu_backward(g, before)
        if needs[0] and shifted:
            _convolve_rows(g, taps, None, 0, end - begin, dx[block][..., begin:end], mirrored=True)
        elif needs[0]:
            dx[block] = _native_rows(g, taps, None, mirrored=True)
        if needs[1]:
            first, _ = _seen(begin, end, length, k, False)
            wide = rows[..., first:end].to(w.dtype)
            for j in range(min(k, end)):
                skipped = max(0, j - begin)
                late = g[..., skipped : end - begin].flatten(0, 1)
                early = wide[..., begin - first + skipped - j : end - first - j].flatten(0, 1)
                # A transpose, whose strides BLAS takes as they are; those of unsqueeze(2) would cost a copy.
                products = torch.bmm(late.unsqueeze(1), early.unsqueeze(1).transpose(1, 2)).view(g.shape[:2])
                by_tap[channels, k - 1 - j] += products.sum(0)
        if needs[2]:
            by_bias[channels] += g[..., : end - begin].sum((0, 2))
    return dx, by_tap, by_bias


def _convolve_span(x: Tensor, w: Tensor, bias: Tensor | None, begin: int, end: int, mirrored: bool = False) -> Tensor:
    """Positions ``begin`` to ``end`` of the convolution of vectors (B, L, C), as (B, end − begin, C)."""
    length, k = x.shape[1], w.shape[1]
    first, last = _seen(begin, end, length, k, mirrored)
    missing = k - 1 - ((last - end) if mirrored else (begin - first))
    # Axes are added in the order that leaves the strides of a channels-last image.
    image = x[:, first:last].to(w.dtype).transpose(1, 2).unsqueeze(2)
    taps = (w.flip(1) if mirrored else w)[:, None, None]
    y = F.conv2d(image, taps, bias, padding=(0, missing), groups=len(w)).squeeze(2)
    return y.narrow(2, missing if mirrored else 0, end - begin).transpose(1, 2)


def _spans(x: Tensor) -> Iterator[tuple[slice, int, int]]:
    """Items, begin and end of spans of (B, L, C)."""
    batch, length, channels = x.shape
    step, items = max(64, _SPAN // channels), max(1, _SPAN // (channels * length))
    for item in range(0, batch, items):
        for begin in range(0, length, step):
            yield slice(item, item + items), begin, min(length, begin + step)


def _forward_vectors(x: Tensor, w: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    out = torch.empty_like(x)
    for items, begin, end in _spans(x):
        y, target = _convolve_span(x[items], w, bias, begin, end), out[items, begin:end]
        if silu and y.dtype == target.dtype:
            torch.ops.aten.silu.out(y, out=target)
        else:
            target.copy_(F.silu(y) if silu else y)
    return out


def _backward_vectors(
    grad: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, silu: bool, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    (_, length, channels), k = x.shape, w.shape[1]
    dx = torch.empty_like(x)
    by_tap, by_bias = w.new_zeros(k, channels), w.new_zeros(channels)
    for items, begin, end in _spans(x):
        vectors, beyond = x[items], min(length, end + k - 1)  # the gradient of x looks ahead
        g = grad[items, begin:beyond].to(w.dtype)
        if silu:
            g = torch.ops.aten.silu_backward(g, _convolve_span(vectors, w, bias, begin, beyond))
        if needs[0]:
            dx[items, begin:end] = _convolve_span(g, w, None, 0, end - begin, mirrored=True)
        if needs[1]:
            for j in range(min(k, end)):
                skipped = max(0, j - begin)
                source = vectors[:, begin + skipped - j : end - j]
                by_tap[k - 1 - j] += (g[:, skipped : end - begin] * source).sum((0, 1))
        if needs[2]:
            by_bias += g[:, : end - begin].sum((0, 1))
    return dx, by_tap.t().contiguous(), by_bias


def _wide(tensor: Tensor | None, like: Tensor) -> Any:
    """In the type of the sums: float32 for half precision."""
    return None if tensor is None else tensor.to(wide_dtype(like.dtype))


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, last: bool) -> Tensor:
    if x.numel() == 0:
        return torch.empty_like(x)
    if trustworthy("causal", x.device):
        from torchconv.kernels import _causal_triton

        return _causal_triton.output(x, weight, bias, silu, last)
    compute = _forward_vectors if last else _forward_rows
    return compute(x, _wide(weight, x), _wide(bias, x), silu)


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, last: bool, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    grad = grad.contiguous()
    if x.numel() == 0:
        return torch.empty_like(x), torch.zeros_like(weight), weight.new_zeros(len(weight))
    if trustworthy("causal", x.device):
        from torchconv.kernels import _causal_triton

        dx, dw, db = _causal_triton.gradients(grad, x, weight, bias, silu, last)
    else:
        compute = _backward_vectors if last else _backward_rows
        dx, dw, db = compute(grad, x, _wide(weight, x), _wide(bias, x), silu, needs)
    dw = dw.to(weight.dtype, memory_format=torch.contiguous_format).contiguous()
    return dx.to(x.dtype), dw, db.to(weight.dtype if bias is None else bias.dtype).contiguous()


def _composite(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, last: bool) -> Tensor:
    """The same in ordinary operators."""
    wide, k = _wide(x.transpose(1, 2) if last else x, x), weight.shape[1]
    y = F.conv1d(F.pad(wide, (k - 1, 0)), _wide(weight, x).unsqueeze(1), _wide(bias, x), groups=len(weight))
    y = (F.silu(y) if silu else y).to(x.dtype)
    return y.transpose(1, 2) if last else y


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, last: bool) -> Tensor:
    return torch.empty_like(x)


def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, last: bool, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    by_bias = weight.new_empty(len(weight)) if bias is None else torch.empty_like(bias)
    return torch.empty_like(x), weight.new_empty(weight.shape), by_bias


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, *ctx.options = inputs
    ctx.save_for_backward(x, weight, bias)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    if torch.is_grad_enabled():  # someone will differentiate again
        wanted = [t for t, need in zip(tensors, needs, strict=True) if need]
        y = _composite(*tensors, *ctx.options)
        found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
        return *(next(found) if need else None for need in needs), None, None
    by = _BACKWARD(grad, *tensors, *ctx.options, needs)
    return *(g if need else None for g, need in zip(by, needs, strict=True)), None, None


_BACKWARD = _custom.define(
    "causal_conv1d_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor? bias, bool silu, bool last, bool[] needs)"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
_CAUSAL = _custom.define(
    "causal_conv1d",
    "(Tensor x, Tensor weight, Tensor? bias, bool silu, bool last) -> Tensor",
    _forward,
    _fake,
    _autograd,
    _keep,
)


@part(
    "causal-conv1d",
    kind="kernel",
    dims=(1,),
    keywords="short causal depthwise convolution sequence Mamba Hyena state space model SiLU",
)
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    layout: str = "BCL",
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
) -> Any:
    """Causal depthwise convolution of sequences: a position sees itself and the k − 1 before it.

    y[b, c, l] = act(bias[c] + Σ_j weight[c, k − 1 − j] · x[b, c, l − j]), x[l < 0] = 0 or the initial states.

    Args:
        x: the sequences. Half precision is accumulated in float32; the result has the type of x. Either order of axes
            may lie in memory as the other one does and is then computed as such; the result lies as x does.
        weight: (C, k) or (C, 1, k), k ≥ 1; the last tap meets the position itself, as in ``nn.Conv1d``.
        bias: (C,) or None.
        activation: "silu" (also called "swish") or None.
        layout: the axes of x and of the result, "BCL" or "BLC".
        initial_states: what came before, k − 1 positions with the axes of x; zeros when None.
        return_final_states: return (y, states) with the last k − 1 positions, for the next piece of the sequence.

    Shape:
        x (B, C, L) or (B, L, C) → the same.

    Raises:
        ValueError: shapes do not fit, an unknown activation or layout, or integers that would cut the result.

    Example:
        >>> causal_conv1d(torch.tensor([[[1.0, 2.0, 4.0]]]), torch.tensor([[10.0, 1.0]]))
        tensor([[[ 1., 12., 24.]]])

    Reference: Dao and Gu's ``causal-conv1d`` package, whose arguments these are; first used so in Mamba, arXiv
    2312.00752, Section 3.4.
    """
    check_choice("layout", layout, LAYOUTS)
    check(activation in ACTIVATIONS, "activation", activation, "must be 'silu', 'swish' or None")
    if x.dim() != 3:
        raise ValueError(f"x of shape {tuple(x.shape)}: expected ({', '.join(layout)})")
    vectors = layout == "BLC"
    channels = x.shape[2 if vectors else 1]
    taps = weight.squeeze(1) if weight.dim() == 3 and weight.shape[1] == 1 else weight
    if taps.dim() != 2 or taps.shape[0] != channels or taps.shape[1] < 1:
        raise ValueError(f"weight of shape {tuple(weight.shape)}: expected ({channels}, k) or ({channels}, 1, k)")
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias of shape {tuple(bias.shape)}: expected ({channels},)")
    for name, t in (("weight", weight), ("bias", bias), ("initial_states", initial_states)):
        if t is not None and t.device != x.device:
            raise ValueError(f"{name} on {t.device}: expected {x.device}, where x is")
    if not x.is_floating_point() and (activation is not None or weight.is_floating_point()):
        raise ValueError(f"x of {x.dtype}, weight of {weight.dtype}, activation={activation!r}: make x floating point")
    axis, before = 1 if vectors else 2, taps.shape[1] - 1
    if initial_states is not None:
        expected = (x.shape[0], before, channels) if vectors else (x.shape[0], channels, before)
        if tuple(initial_states.shape) != expected:
            raise ValueError(f"initial_states of shape {tuple(initial_states.shape)}: expected {expected}")
        x = torch.cat([initial_states.to(x.dtype), x], axis)
    y = _call(x, taps, bias, activation is not None, vectors)
    if initial_states is not None:
        y = y.narrow(axis, before, y.shape[axis] - before)
    if not return_final_states:
        return y
    missing = max(0, before - x.shape[axis])
    states = x.narrow(axis, x.shape[axis] - before + missing, before - missing)
    return y, F.pad(states, (0, 0, missing, 0) if vectors else (missing, 0)).clone()


def _call(x: Tensor, taps: Tensor, bias: Tensor | None, silu: bool, vectors: bool) -> Tensor:
    """Choose how to compute it; the memory, not the order of the axes, says what is a row."""
    y: Tensor
    turned = not x.is_contiguous() and x.transpose(1, 2).is_contiguous()
    straight = (x.transpose(1, 2) if turned else x).contiguous()
    arguments = (straight, taps, bias, silu, vectors != turned)
    if taps.shape[1] > _SHORT and x.numel():
        y = _long(*arguments)
        return y.transpose(1, 2) if turned else y
    plain = x.device.type != "cpu" and not trustworthy("causal", x.device)
    if plain:
        say_once(f"causal_conv1d on {x.device.type} runs as F.conv1d: Triton is not available there")
    if plain or _custom.in_ordinary_operators():
        y = _composite(*arguments)
    else:
        y = (_CAUSAL if _custom.recorded(*arguments) else _forward)(*arguments)
    return y.transpose(1, 2) if turned else y


def _long(x: Tensor, taps: Tensor, bias: Tensor | None, silu: bool, vectors: bool) -> Tensor:
    from torchconv.kernels.depthwise import depthwise_conv1d

    rows = x.transpose(1, 2) if vectors else x
    padded, wide = F.pad(rows, (taps.shape[1] - 1, 0)), torch.promote_types(x.dtype, taps.dtype)
    shift = None if bias is None else bias.to(wide)
    y: Tensor = depthwise_conv1d(padded.to(wide), taps.unsqueeze(1).to(wide), shift)
    y = (F.silu(y) if silu else y).to(x.dtype)
    return (y.transpose(1, 2) if vectors else y).contiguous()
