"""Aggregation with a kernel of its own at every position (the small-kernel aggregation of LSNet, arXiv 2503.23135).

out[n, c, i] = Σ_t weight[n, c mod G, t, i] · x[n, c, i + t − p], zero outside the map, p = (k − 1)/2 on each axis.

Channel c uses weight channel **c mod G**. Cost: k^d · N · C · positions multiply-adds; the weights are read once for
each channel that shares them. Gradients, with g the gradient of out:

- x: Σ_t weight[n, c mod G, t, a − t + p] · g[n, c, a − t + p] (the same sum with mirrored taps);
- weight: Σ over the channels c = γ (mod G) of x[n, c, i + t − p] · g[n, c, i].

All three are k^d shifted multiply-adds into one buffer, so that nothing of size N · C · k^d · positions is ever made,
forward or backward. On a GPU each is one Triton kernel. On a CPU they run in place (a third of the time of letting
autograd differentiate the sum). Compilers for a CPU, exporters and ``torch.func`` get the sum in ordinary operators,
which they fuse and know.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchconv._common import Size, check, ntuple
from torchconv.catalog import part
from torchconv.kernels import _custom
from torchconv.kernels._layout import is_channels_last, keep_layout
from torchconv.kernels._triton_probe import trustworthy
from torchconv.kernels.precision import wide_dtype

_Index = tuple[Any, ...]


def _taps(kernel: tuple[int, ...], size: tuple[int, ...]) -> Iterator[tuple[int, _Index, _Index]]:
    """For each tap, the centre first: its number, where it lands in the output, where it reads from the input."""
    axes = []
    for k, length in zip(kernel, size, strict=True):
        spans = []
        for shift in range(-((k - 1) // 2), (k - 1) // 2 + 1):
            # A tap that reaches beyond a short map has an empty span.
            before, after = min(max(0, -shift), length), min(max(0, shift), length)
            spans.append((slice(before, length - after), slice(after, length - before)))
        axes.append(spans)
    taps = list(enumerate(itertools.product(*axes)))
    middle = len(taps) // 2
    for number, tap in (taps[middle], *taps[:middle], *taps[middle + 1 :]):
        yield number, (..., *(out for out, _ in tap)), (..., *(source for _, source in tap))


def _shared(x: Tensor, weight_channels: int) -> Iterator[tuple[Tensor, int]]:
    """``x`` as views (N, repeats, G', \\*size) whose channel axis G' lines up with the first G' weight channels.

    One view of the whole multiples of G channels and, where G does not divide C, one of the channels left over.
    """
    repeats, rest = x.shape[1] // weight_channels, x.shape[1] % weight_channels
    whole = repeats * weight_channels
    if repeats:
        yield x[:, :whole].unflatten(1, (repeats, weight_channels)), weight_channels
    if rest:
        yield x[:, whole:].unsqueeze(1), rest


def _joined(blocks: list[Tensor], x: Tensor) -> Tensor:
    """Blocks of channels side by side; none where x has no channels."""
    if len(blocks) == 1:
        return blocks[0]
    return torch.cat(blocks, 1) if blocks else torch.zeros_like(x)


def _spread(x: Tensor, weight: Tensor, kernel: tuple[int, ...], mirrored: bool = False) -> Tensor:
    """The aggregation, or with ``mirrored`` its transpose (the gradient of x)."""
    blocks = []
    for source, used in _shared(x, weight.shape[1]):
        taps = _taps(kernel, tuple(x.shape[2:]))
        number, _, _ = next(taps)  # the centre covers the whole map, so it makes the buffer
        out = weight[:, :used, number].unsqueeze(1) * source
        for number, at, reads in taps:
            w = weight[:, :used, number].unsqueeze(1)[at]
            if mirrored:
                out[reads].addcmul_(w, source[at])
            else:
                out[at].addcmul_(w, source[reads])
        blocks.append(out.flatten(1, 2))
    return _joined(blocks, x)


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, kernel: tuple[int, ...]) -> Tensor:
    out = torch.zeros_like(weight)
    groups = weight.shape[1]
    for (g, used), (source, _) in zip(_shared(grad, groups), _shared(x, groups), strict=True):
        for number, at, reads in _taps(kernel, tuple(x.shape[2:])):
            out[:, :used, number][at].add_((g[at] * source[reads]).sum(1))
    return out


def _rows(tensor: Tensor) -> Tensor:
    """A contiguous copy where needed, in float32 at least.

    On channels-last tensors the in-place sums take longer than copying them to rows and the result back.
    """
    wide = wide_dtype(tensor.dtype)
    return tensor.to(wide, memory_format=torch.contiguous_format).contiguous()


def _aggregate(x: Tensor, weight: Tensor, kernel: tuple[int, ...], mirrored: bool = False) -> Tensor:
    return keep_layout(_spread(_rows(x), _rows(weight), kernel, mirrored).to(x.dtype), x)


def _composite(x: Tensor, weight: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """The aggregation in ordinary operators on a zero-padded map."""
    dtype, wide = x.dtype, wide_dtype(x.dtype)
    size = x.shape[2:]
    padded = F.pad(x.to(wide), [(k - 1) // 2 for k in reversed(kernel) for _ in range(2)])
    weight = weight.to(wide)
    blocks = []
    for source, used in _shared(padded, weight.shape[1]):
        total: Tensor | None = None
        for number, offset in enumerate(itertools.product(*(range(k) for k in kernel))):
            shifted = source
            for axis, (begin, length) in enumerate(zip(offset, size, strict=True), start=3):
                shifted = shifted.narrow(axis, begin, length)
            term = weight[:, :used, number].unsqueeze(1) * shifted
            total = term if total is None else total + term
        assert total is not None
        blocks.append(total.flatten(1, 2))
    return _joined(blocks, x).to(dtype)


def _forward(x: Tensor, weight: Tensor, kernel: Sequence[int]) -> Tensor:
    if trustworthy("adaptive", x.device) and x.numel():
        from torchconv.kernels import _adaptive_triton

        return _adaptive_triton.aggregate(x, weight, tuple(kernel))
    return _aggregate(x, weight, tuple(kernel))


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, kernel: Sequence[int], needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    size = tuple(kernel)
    grad = keep_layout(grad, x)
    dx, dw = x.new_empty(0), weight.new_empty(0)
    if trustworthy("adaptive", x.device) and x.numel():
        from torchconv.kernels import _adaptive_triton

        dx = _adaptive_triton.aggregate(grad, weight, size, mirrored=True) if needs[0] else dx
        return dx, _adaptive_triton.weight_gradient(grad, x, weight, size) if needs[1] else dw
    dx = _aggregate(grad, weight, size, True) if needs[0] else dx
    if needs[1]:
        dw = _weight_gradient(_rows(grad), _rows(x), _rows(weight), size).to(weight.dtype)
    return dx, dw


def _fake(x: Tensor, weight: Tensor, kernel: Sequence[int]) -> Tensor:
    return torch.empty_like(x)


def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, kernel: Sequence[int], needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x) if needs[0] else x.new_empty(0)
    return dx, weight.new_empty(weight.shape) if needs[1] else weight.new_empty(0)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.kernel = inputs
    ctx.save_for_backward(x, weight)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:2])
    if torch.is_grad_enabled():  # someone will differentiate again
        wanted = [t for t, need in zip((x, weight), needs, strict=True) if need]
        found = iter(torch.autograd.grad(_composite(x, weight, tuple(ctx.kernel)), wanted, grad, create_graph=True))
        return *(next(found) if need else None for need in needs), None
    by = _BACKWARD(grad, x, weight, ctx.kernel, needs)
    return *(g if need else None for g, need in zip(by, needs, strict=True)), None


_BACKWARD = _custom.define(
    "adaptive_conv_backward",
    "(Tensor grad, Tensor x, Tensor weight, int[] kernel, bool[] needs) -> (Tensor, Tensor)",
    _backward,
    _fake_backward,
)
_ADAPTIVE = _custom.define(
    "adaptive_conv", "(Tensor x, Tensor weight, int[] kernel) -> Tensor", _forward, _fake, _autograd, _keep
)


@part(
    "adaptive-conv",
    paper="lsnet",
    kind="kernel",
    dims=(1, 2, 3),
    keywords="small kernel aggregation SKA dynamic per position involution local",
)
def adaptive_conv(x: Tensor, weight: Tensor, kernel_size: Size | None = None) -> Tensor:
    """Aggregate a small neighbourhood with a kernel given for every position and channel group.

    out[n, c, i] = Σ_t weight[n, c mod G, t, i] · x[n, c, i + t − p], zero outside the map.

    Args:
        x: the map. Half precision is accumulated in float32.
        weight: the kernels, taps in row-major order; C need not be a multiple of G (nor G at most C).
        kernel_size: an odd size or one per axis, whose product is the number of taps; by default the same on each axis.

    Shape:
        x (N, C, \\*size), weight (N, G, taps, \\*size) → (N, C, \\*size), one to three spatial axes. The result has
        x's memory format and the wider of the two types.

    Raises:
        ValueError: shapes do not fit, or kernel_size has an even entry or another number of taps.

    Example:
        >>> x = torch.arange(4.0).reshape(1, 1, 4)
        >>> right = torch.tensor([0.0, 0.0, 1.0]).reshape(1, 1, 3, 1).expand(1, 1, 3, 4)
        >>> adaptive_conv(x, right)
        tensor([[[1., 2., 3., 0.]]])

    Reference: Wang et al., "LSNet: See Large, Focus Small", arXiv 2503.23135.
    """
    ndim = x.dim() - 2
    if ndim not in (1, 2, 3):
        raise ValueError(f"x of shape {tuple(x.shape)}: expected (N, C, *size) with one to three spatial axes")
    fits = weight.dim() == ndim + 3 and weight.shape[0] == x.shape[0] and weight.shape[3:] == x.shape[2:]
    if not fits or weight.shape[1] < 1:
        expected = f"({x.shape[0]}, G, taps, {', '.join(map(str, x.shape[2:]))})"
        raise ValueError(f"weight of shape {tuple(weight.shape)}: expected {expected} for x {tuple(x.shape)}")
    taps = int(weight.shape[2])
    if kernel_size is None:
        side = round(taps ** (1 / ndim))
        remedy = f"its taps axis must hold k^{ndim} of them, k odd; give kernel_size for another form"
        check(side**ndim == taps and side % 2 == 1, "weight.shape", tuple(weight.shape), remedy)
        kernel_size = (side,) * ndim
    else:
        kernel_size = ntuple("kernel_size", kernel_size, ndim)
        ok = math.prod(kernel_size) == taps and all(k % 2 for k in kernel_size)
        check(ok, "kernel_size", kernel_size, f"must be {ndim} odd sizes with product {taps}, the taps of weight")
    _custom.check_devices(x, weight=weight)
    if x.dtype != weight.dtype:
        dtype = torch.promote_types(x.dtype, weight.dtype)
        x, weight = x.to(dtype), weight.to(dtype)
    compiled_for_cpu = torch.compiler.is_compiling() and not trustworthy("adaptive", x.device)
    if compiled_for_cpu or _custom.in_ordinary_operators():
        return _composite(x, weight, kernel_size)
    x = x if is_channels_last(x) else x.contiguous()
    out: Tensor = (_ADAPTIVE if _custom.recorded(x, weight) else _forward)(x, weight, kernel_size)
    return out


def adaptive_conv2d(x: Tensor, weight: Tensor) -> Tensor:
    """Small-kernel aggregation on images: :func:`adaptive_conv` with two spatial axes and a square kernel.

    out[n, c, i, j] = Σ_{u,v} weight[n, c mod G, u·k + v, i, j] · x[n, c, i + u − p, j + v − p].

    Shape:
        x (N, C, H, W), weight (N, G, k·k, H, W) → (N, C, H, W), k odd.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> adaptive_conv2d(torch.ones(1, 4, 5, 5), torch.ones(1, 2, 9, 5, 5))[0, 0, 0]
        tensor([4., 6., 6., 6., 4.])
    """
    if x.dim() != 4:
        raise ValueError(f"x of shape {tuple(x.shape)}: expected (N, C, H, W)")
    return adaptive_conv(x, weight)
