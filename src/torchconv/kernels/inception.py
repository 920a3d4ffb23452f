"""A layer of depthwise kernels of several shapes, with the identity on the other channels (arXiv 2303.16900).

y[:, :C − Σ g_i] = x[:, :C − Σ g_i]; the next g_1 channels meet kernels of the first shape, and so on; "same" padding.

On a GPU the layer, and the gradient of its input, are one launch that moves 2·C·positions numbers (``backend="triton"``
and "auto"); PyTorch's operators are a split, a launch for every shape and a concatenation, which also move them twice.
Elsewhere each shape takes the form that ``depthwise_conv`` finds for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchconv._common import Size, check, check_choice, ntuple
from torchconv.catalog import part
from torchconv.kernels import depthwise
from torchconv.kernels._custom import autocasts, define, in_ordinary_operators
from torchconv.kernels._layout import channels_last_format, is_channels_last
from torchconv.kernels._triton_probe import trustworthy

BACKENDS = ("auto", "native", "triton")
_TYPES = (torch.float32, torch.float16, torch.bfloat16)


@part(
    "inception_conv",
    paper="inceptionnext",
    kind="kernel",
    dims=(1, 2, 3),
    keywords="bands 1×k k×1 square identity channels fused one launch partial depthwise",
)
def inception_conv(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    dilation: Size = 1,
    *,
    backend: str = "auto",
) -> Tensor:
    """Depthwise kernels of several shapes on the last channels, the first ones copied.

    Args:
        x: (N, C, \\*spatial), contiguous or channels-last.
        weights: kernels of shape (g_i, 1, \\*k_i), any sizes, Σ g_i ≤ C.
        biases: (g_i,) or None for each kernel; None for no biases at all.
        dilation: distance of the taps, int or one per axis.
        backend: "auto" takes the fused kernels on a GPU in float32, float16 and bfloat16, "triton" insists on them,
            "native" is a depthwise convolution for each shape and a concatenation.

    Shape:
        (N, C, \\*spatial) → the same.

    Raises:
        ValueError: shapes do not fit, or ``backend`` is unknown or cannot take ``x``.

    Example:
        >>> x = torch.arange(12.0).reshape(1, 3, 2, 2)
        >>> inception_conv(x, [torch.full((1, 1, 1, 1), 2.0)])[0, :, 0, 0]
        tensor([ 0.,  4., 16.])

    Reference: arXiv 2303.16900, equations (2) to (5).
    """
    check_choice("backend", backend, BACKENDS)
    ndim = x.dim() - 2
    check(ndim in (1, 2, 3), "x.shape", tuple(x.shape), "expected (N, C, *size) with one to three spatial axes")
    biases = [None] * len(weights) if biases is None else biases
    check(len(biases) == len(weights), "biases", len(biases), f"give one for each of the {len(weights)} kernels")
    check(all(n > 0 for n in x.shape[2:]), "x.shape", tuple(x.shape), "every spatial axis needs a position")
    for w, b in zip(weights, biases, strict=True):
        ok = w.dim() == ndim + 2 and w.shape[1] == 1 and min(w.shape) >= 1
        check(ok, "weight.shape", tuple(w.shape), f"expected (g, 1, *kernel_size), g ≥ 1, with {ndim} spatial axes")
        if b is not None:
            check(b.shape == w.shape[:1], "bias.shape", tuple(b.shape), f"expected ({w.shape[0]},), a number a channel")
    widths = [w.shape[0] for w in weights]
    rest = x.shape[1] - sum(widths)
    check(rest >= 0, "weights", widths, f"together they need more channels than the {x.shape[1]} of x")
    dilations = ntuple("dilation", dilation, ndim)
    if not weights:
        return x
    device = x.device.type
    if backend != "native" and (device != "cpu" or backend == "triton") and not in_ordinary_operators():
        y = _fused(x, list(weights), list(biases), dilations, backend)
        if y is not None:
            return y
    passed, *pieces = torch.split(x, [rest, *widths], dim=1)
    outputs = [
        depthwise.same(ndim, piece, w, b, dilations) for piece, w, b in zip(pieces, weights, biases, strict=True)
    ]
    # One concatenation is the cheapest form that autograd and compilers take: writing the branches into a clone or an
    # empty map costs as much forward and about twice as much backward.
    return torch.cat([passed, *outputs] if rest else outputs, dim=1)  # an empty part hides the memory format


def _fused(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], dilation: tuple[int, ...], backend: str
) -> Tensor | None:
    """The layer in one launch, or None where it must be done otherwise."""
    if autocasts(x.device.type):
        narrow = torch.get_autocast_dtype(x.device.type)
        x, *weights = (t.to(narrow) if t.dtype != torch.float64 else t for t in (x, *weights))
        biases = [None if b is None else b.to(narrow) for b in biases]
    given = [b for b in biases if b is not None]
    alike = all(t.dtype == x.dtype and t.device == x.device for t in (*weights, *given))
    fits = math.prod(x.shape[2:]) < 2**30 and x.numel() > 0
    if not (alike and fits and x.dtype in _TYPES and trustworthy("inception", x.device)):
        remedy = f"needs tensors of one type of {_TYPES} on one CUDA device (or TRITON_INTERPRET=1), x is {x.dtype} on {x.device}"  # fmt: skip # noqa: E501
        check(backend == "auto" or x.numel() == 0, "backend", backend, remedy)
        return None
    taps = torch.cat([w.reshape(-1) for w in weights])
    bias = None
    if given:
        zeros = (w.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True))
        bias = torch.cat(list(zeros))
    sizes = [k for w in weights for k in w.shape[2:]]
    y: Tensor = _LAYER(x, taps, bias, [w.shape[0] for w in weights], sizes, dilation)
    return y


# --- operators -------------------------------------------------------------------------------------------------------


def _kernels(x: Tensor, widths: Sequence[int], sizes: Sequence[int]) -> tuple[tuple[int, tuple[int, ...]], ...]:
    n = x.dim() - 2
    return tuple((width, tuple(sizes[i * n : i * n + n])) for i, width in enumerate(widths))


def _triton() -> Any:
    from torchconv.kernels import _inception_triton  # brings triton along

    return _inception_triton


def _compute(x: Tensor, taps: Tensor, bias: Tensor | None, widths: Any, sizes: Any, dilation: Any) -> Tensor:
    y: Tensor = _triton().layer(x, taps, bias, _kernels(x, widths, sizes), tuple(dilation))
    return y


def _empty(x: Tensor) -> Tensor:
    last = is_channels_last(x)
    return torch.empty_like(x, memory_format=channels_last_format(x.dim() - 2) if last else torch.contiguous_format)


def _fake(x: Tensor, taps: Tensor, bias: Tensor | None, widths: Any, sizes: Any, dilation: Any) -> Tensor:
    return _empty(x)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    x, taps, _, *ctx.sizes = inputs
    ctx.save_for_backward(x, taps)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, taps = ctx.saved_tensors
    need_x, need_taps, need_bias, *_ = ctx.needs_input_grad
    dx = dt = db = None
    if need_x or need_taps:
        dx, dt = _GRADIENTS(g, x, taps, *ctx.sizes, need_x, need_taps)
    if need_bias:
        db = g[:, x.shape[1] - sum(ctx.sizes[0]) :].sum((0, *range(2, g.dim())))
    return dx if need_x else None, dt if need_taps else None, db, None, None, None


def _compute_gradients(
    g: Tensor, x: Tensor, taps: Tensor, widths: Any, sizes: Any, dilation: Any, need_x: bool, need_taps: bool
) -> tuple[Tensor, Tensor]:
    kernels, dilation = _kernels(x, widths, sizes), tuple(dilation)
    dx, dt = x.new_empty(0), taps.new_empty(0)
    if need_x:
        dx = _empty(x).copy_(_triton().layer(g, taps, None, kernels, dilation, backward=True))
    if need_taps:
        dt = _triton().gradient_taps(g, x, kernels, dilation).to(taps.dtype)
    return dx, dt


def _fake_gradients(
    g: Tensor, x: Tensor, taps: Tensor, widths: Any, sizes: Any, dilation: Any, need_x: bool, need_taps: bool
) -> tuple[Tensor, Tensor]:
    return _empty(x) if need_x else x.new_empty(0), torch.empty_like(taps) if need_taps else taps.new_empty(0)


def _keep_gradients(ctx: Any, inputs: Any, output: Any) -> None:
    g, x, taps, *ctx.sizes, ctx.need_x, ctx.need_taps = inputs
    ctx.save_for_backward(g, x, taps)


def _backward_gradients(ctx: Any, to_x: Tensor, to_taps: Tensor) -> tuple[Tensor | None, ...]:
    """Both gradients are linear in g and in x or the taps: with theirs in the other's place they are layers again."""
    g, x, taps = ctx.saved_tensors
    need_g, need_x, need_taps, *_ = ctx.needs_input_grad
    first = x.shape[1] - sum(ctx.sizes[0])
    dg: Tensor | None = None
    if need_g and ctx.need_x:
        dg = _LAYER(to_x, taps, None, *ctx.sizes)
    if need_g and ctx.need_taps:
        other = _without_identity(_LAYER(x, to_taps, None, *ctx.sizes), first)
        dg = other if dg is None else dg + other
    dx = dt = None
    if need_x and ctx.need_taps:
        dx = _without_identity(_GRADIENTS(g, x, to_taps, *ctx.sizes, True, False)[0], first)
    if need_taps and ctx.need_x:
        dt = _GRADIENTS(g, to_x, taps, *ctx.sizes, False, True)[1]
    return dg, dx, dt, None, None, None, None, None


def _without_identity(y: Tensor, first: int) -> Tensor:
    """The copied channels have no weights, so a derivative by weights has zeros there."""
    keep = torch.arange(y.shape[1], device=y.device) >= first
    return torch.where(keep.reshape(-1, *(1,) * (y.dim() - 2)), y, 0.0)


_SIZES = "SymInt[] widths, SymInt[] sizes, SymInt[] dilation"
_LAYER = define(
    "inception", f"(Tensor x, Tensor taps, Tensor? bias, {_SIZES}) -> Tensor", _compute, _fake, _backward, _keep
)
_GRADIENTS = define(
    "inception_gradients",
    f"(Tensor g, Tensor x, Tensor taps, {_SIZES}, bool need_x, bool need_taps) -> (Tensor, Tensor)",
    _compute_gradients,
    _fake_gradients,
    _backward_gradients,
    _keep_gradients,
)
