"""Depthwise convolution with kernels of any size, as fast as the machine's best form for it (arXiv 2203.06717, §3).

PyTorch's depthwise convolution is fast for some small kernels going forward and up to a hundred times off going
back. Here the output, the gradient of the input and the gradient of the weight each take whichever form an estimate
(``_depthwise_cost.py``) finds cheapest: PyTorch's own, the same on channels-last data, a real FFT, a product with a
banded matrix, or for the weight a convolution by the output's gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchconv._common import check, check_choice
from torchconv.catalog import part
from torchconv.kernels import _depthwise_cost as cost
from torchconv.kernels import _depthwise_forms as forms
from torchconv.kernels._depthwise_forms import Geometry

Size = int | Sequence[int]
BACKENDS = ("auto", "native", "channels_last", "fft", "matmul", "reference")
_HALF = (torch.float16, torch.bfloat16)
_KINDS = {t: str(t).removeprefix("torch.") for t in (torch.float32, torch.float64, *_HALF)}
# The forms of the output, of the input's gradient and of the weight's gradient when the caller names one.
_FORCED = {
    "channels_last": ("channels_last", "channels_last", "correlate_last"),
    "fft": ("fft", "fft", "fft"),
    "matmul": ("matmul", "matmul", "matmul"),
}


class Plan(NamedTuple):
    """The sizes of a call and the forms chosen for it."""

    geo: Geometry
    forward: str
    grad_x: str
    grad_w: str

    @property
    def plain(self) -> bool:
        return self.forward == self.grad_x == self.grad_w == "native"


def _per_axis(argument: str, value: Size, ndim: int, least: int) -> tuple[int, ...]:
    items = (value,) * ndim if isinstance(value, int) else tuple(value)
    items = items * ndim if len(items) == 1 else items
    ok = len(items) == ndim and all(isinstance(i, int) and not isinstance(i, bool) and i >= least for i in items)
    check(ok, argument, value, f"must be an integer >= {least} or {ndim} of them, one per spatial axis")
    return items


@lru_cache(maxsize=4096)
def _plan(
    shape: tuple[int, ...],
    weight: tuple[int, ...],
    stride: Size,
    padding: Size,
    dilation: Size,
    kind: str,
    last: bool,
    needs: tuple[bool, bool],
    backend: str,
    threads: int,
) -> Plan:
    """Check a call's sizes and choose its forms; remembered per signature, as this takes longer than a small call."""
    ndim = len(weight) - 2
    strides, dilations = _per_axis("stride", stride, ndim, 1), _per_axis("dilation", dilation, ndim, 1)
    pads = _per_axis("padding", padding, ndim, 0)
    check_weight(shape[1], weight)
    out = []
    for n, k, s, p, d in zip(shape[2:], weight[2:], strides, pads, dilations, strict=True):
        extent = (k - 1) * d + 1
        remedy = f"its extent {extent} must not exceed the padded input, {n} + 2·{p}: pad more or take a shorter kernel"
        check(n + 2 * p >= extent, "weight.shape", weight, remedy)
        out.append((n + 2 * p - extent) // s + 1)
    geo = Geometry(shape[0], shape[1], tuple(shape[2:]), tuple(weight[2:]), tuple(out), strides, pads, dilations)
    if 0 in shape:
        return Plan(geo, "native", "native", "native")
    chosen = _FORCED[backend] if backend in _FORCED else cost.choose(geo, kind, last, needs, threads)
    return Plan(geo, *chosen)


def check_weight(channels: int, weight: tuple[int, ...]) -> None:
    """One kernel per channel, at least one tap."""
    ok = weight[0] == channels and weight[1] == 1 and min(weight[2:]) >= 1
    remedy = f"expected ({channels}, 1, *kernel_size), one kernel per channel of x; use F.convNd for other groups"
    check(ok, "weight.shape", weight, remedy)


def _like(out: Tensor, x: Tensor) -> Tensor:
    """``out`` in the memory format of ``x``."""
    if forms.is_channels_last(x):
        return out.contiguous(memory_format=forms.channels_last_format(x.dim() - 2))
    return out.contiguous()


def _wide(tensor: Tensor) -> Tensor:
    """Half precision as float32: PyTorch has few fast kernels for it, and intermediate results need the digits."""
    return tensor.float() if tensor.dtype in _HALF else tensor


def _forward(x: Tensor, w: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
    geo = plan.geo
    if plan.forward == "native":
        return forms.native(x, w, bias, geo)
    wide, kernel, shift = _wide(x), _wide(w), None if bias is None else _wide(bias)
    if plan.forward == "padded":
        out = forms.padded(wide, kernel, shift, geo)
    elif plan.forward == "channels_last":
        out = forms.channels_last(wide, kernel, shift, geo)
    else:
        out = (forms.fft if plan.forward == "fft" else forms.matmul)(wide, kernel, geo)
        if shift is not None:
            out.add_(shift.reshape(-1, *(1,) * geo.ndim))
    return _like(out.to(x.dtype), x)


def _gradients(
    g: Tensor, x: Tensor, w: Tensor, plan: Plan, need_x: bool, need_w: bool
) -> tuple[Tensor | None, Tensor | None]:
    dx: Tensor | None = None
    dw: Tensor | None = None
    geo, x_type, w_type, like = plan.geo, x.dtype, w.dtype, x
    by_x, by_w = plan.grad_x if need_x else "", plan.grad_w if need_w else ""
    if "native" in (by_x, by_w):
        dx, dw = forms.native_gradients(g, x, w, geo, (by_x == "native", by_w == "native"))
    if by_x in ("", "native") and by_w in ("", "native"):
        return dx, dw
    g, x, w = _wide(g), _wide(x), _wide(w)
    if "fft" in (by_x, by_w):
        fx, fw = forms.fft_gradients(g, x, w, geo, (by_x == "fft", by_w == "fft"))
        dx, dw = dx if fx is None else fx, dw if fw is None else fw
    if by_x in ("flipped", "channels_last"):
        dx = forms.flipped(g, w, geo, by_x == "channels_last")
    elif by_x == "matmul":
        dx = forms.matmul(g, w, geo, transposed=True)
    if by_w in ("correlate", "correlate_last"):
        dw = forms.correlated(g, x, geo, by_w == "correlate_last")
    elif by_w == "matmul":
        dw = forms.matmul_weight(g, x, geo)
    dx = None if dx is None else _like(dx.to(x_type), like)
    return dx, None if dw is None else dw.to(w_type)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.plan = plan
        return _forward(x, w, bias, plan)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        (g,) = grads
        need_x, need_w, need_bias, _ = ctx.needs_input_grad
        db = g.sum((0, *range(2, g.dim()))) if need_bias else None
        with _without_autocast(g.device.type):
            if torch.is_grad_enabled():  # someone will differentiate again: PyTorch's own gradients know how
                dx, dw = forms.native_gradients(g, x, w, ctx.plan.geo, (need_x, need_w))
            else:
                dx, dw = _gradients(g, x, w, ctx.plan, need_x, need_w)
        return dx, dw, db, None


def _without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    on = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else contextlib.nullcontext()


def _plain_wanted(x: Tensor, weight: Tensor) -> bool:
    """Someone wants to see one convolution (a counter of operations, a transform of ``torch.func``, forward-mode
    differentiation), or the tensors are of a kind (integers, subclasses) that only PyTorch's operator takes."""
    return (
        type(x) not in (Tensor, torch.nn.Parameter)
        or type(weight) not in (Tensor, torch.nn.Parameter)
        or x.dtype not in _KINDS
        or x.dtype != weight.dtype
        or x.device != weight.device
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def _sized_padding(x: Tensor, weight: Tensor, padding: str, dilation: Size) -> tuple[Tensor, Size]:
    """The number behind "same" or "valid"; for an even extent one zero is put after the map first, as PyTorch does."""
    check_choice("padding", padding, ("same", "valid"))
    ndim = weight.dim() - 2
    if padding == "valid":
        return x, 0
    totals = [d * (k - 1) for d, k in zip(_per_axis("dilation", dilation, ndim, 1), weight.shape[2:], strict=True)]
    if any(t % 2 for t in totals):
        x = F.pad(x, [q for t in reversed(totals) for q in (0, t % 2)])
    return x, tuple(t // 2 for t in totals)


def _key(value: Size) -> Size:
    return value if isinstance(value, int) else tuple(value)


def _depthwise(
    ndim: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Size | str,
    dilation: Size,
    backend: str,
) -> Tensor:
    tensors = isinstance(x, Tensor) and isinstance(weight, Tensor)  # not where torch.fx traces with proxies
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not tensors:
        return _convolve(ndim, x, weight, bias, stride, padding, dilation)
    check_choice("backend", backend, BACKENDS)
    if x.dim() == ndim + 1:
        return _depthwise(ndim, x.unsqueeze(0), weight, bias, stride, padding, dilation, backend).squeeze(0)
    if x.dim() != ndim + 2 or weight.dim() != ndim + 2:
        shapes = f"x of shape {tuple(x.shape)}, weight of shape {tuple(weight.shape)}"
        raise ValueError(f"{shapes}: expected (N, C, *size) and (C, 1, *kernel_size) with {ndim} spatial axes")
    device = x.device.type
    if device != "cpu" and backend == "auto":
        check_weight(x.shape[1], tuple(weight.shape))
        return _convolve(ndim, x, weight, bias, stride, padding, dilation)
    if torch.is_autocast_enabled(device):
        narrow = torch.get_autocast_dtype(device)
        x, weight = (t.to(narrow) if t.is_floating_point() and t.dtype != torch.float64 else t for t in (x, weight))
        bias = bias.to(weight.dtype) if bias is not None else None
        with torch.autocast(device, enabled=False):
            return _depthwise(ndim, x, weight, bias, stride, padding, dilation, backend)
    if backend == "native" or _plain_wanted(x, weight):
        check_weight(x.shape[1], tuple(weight.shape))
        return _convolve(ndim, x, weight, bias, stride, padding, dilation)
    if isinstance(padding, str):
        x, padding = _sized_padding(x, weight, padding, dilation)
    record = torch.is_grad_enabled()
    needs = (record and x.requires_grad, record and weight.requires_grad)
    plan = _plan(
        tuple(x.shape),
        tuple(weight.shape),
        _key(stride),
        _key(padding),
        _key(dilation),
        _KINDS[x.dtype],
        forms.is_channels_last(x),
        needs,
        backend,
        torch.get_num_threads(),
    )
    if backend == "reference":
        return forms.reference(x, weight, bias, plan.geo)
    if plan.plain:
        return forms.native(x, weight, bias, plan.geo)
    if True in needs or (record and bias is not None and bias.requires_grad):
        out: Tensor = _Depthwise.apply(x, weight, bias, plan)
        return out
    return _forward(x, weight, bias, plan)


def _convolve(
    ndim: int, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Size, padding: Size | str, dilation: Size
) -> Tensor:
    if padding == "same" and stride not in (1, (1,) * ndim, [1] * ndim):
        x, padding = _sized_padding(x, weight, "same", dilation)
    out: Tensor = forms.CONVOLVE[ndim](x, weight, bias, stride, padding, dilation, weight.shape[0])
    return out


@part(
    "depthwise_conv",
    paper=None,
    kind="kernel",
    dims=(1, 2, 3),
    keywords="large kernel depthwise FFT Toeplitz channels-last fast backward gradient",
)
def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    *,
    backend: str = "auto",
) -> Tensor:
    """Convolve every channel with its own kernel: ``F.conv2d`` with as many groups as channels, faster.

    out[n, c, i, j] = bias[c] + Σ_{u,v} weight[c, 0, u, v] · x[n, c, i·s + u·d − p, j·s + v·d − p], zero outside x.

    Args:
        x: the map, floating point, contiguous or channels-last (which the result then is too).
        weight: one kernel per channel, any size up to the padded input.
        stride, dilation: at least 1, an integer or one per axis.
        padding: at least 0, an integer or one per axis, or "same" (ceil(size / stride) outputs; the odd zero goes
            after the map) or "valid" (none).
        backend: "auto" takes for the output and each gradient the form that an estimate finds fastest; "native" is
            PyTorch's, "channels_last", "fft", "matmul" (banded matrices: memory grows with the square of the map) and
            "reference" (a sum over taps) force one form for all three. Half precision runs in float32 inside "fft"
            and "matmul".

    Under ``torch.compile``, ``torch.export``, tracing and ``torch.func``, on integers and, with "auto", on
    devices other than the CPU this is ``F.conv2d``. Gradients of gradients are PyTorch's.

    Shape:
        x (N, C, H, W) or (C, H, W), weight (C, 1, kH, kW), bias (C) → (N, C, H', W').

    Raises:
        ValueError: shapes do not fit, the kernel exceeds the padded map, or an argument is out of its range.

    Example:
        >>> depthwise_conv2d(torch.ones(1, 2, 3, 3), torch.ones(2, 1, 3, 3), padding="same")[0, 0]
        tensor([[4., 6., 4.],
                [6., 9., 6.],
                [4., 6., 4.]])

    Reference: Ding et al., "Scaling Up Your Kernels to 31×31", arXiv 2203.06717, Section 3.
    """
    return _depthwise(2, x, weight, bias, stride, padding, dilation, backend)


def depthwise_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    *,
    backend: str = "auto",
) -> Tensor:
    """Convolve every channel of a series with its own kernel; see :func:`depthwise_conv2d`.

    out[n, c, i] = bias[c] + Σ_t weight[c, 0, t] · x[n, c, i·s + t·d − p], zero outside x.

    Shape:
        x (N, C, L) or (C, L), weight (C, 1, k), bias (C) → (N, C, L').

    Raises:
        ValueError: shapes do not fit, the kernel exceeds the padded series, or an argument is out of its range.

    Example:
        >>> depthwise_conv1d(torch.arange(4.0).reshape(1, 1, 4), torch.ones(1, 1, 2))
        tensor([[[1., 3., 5.]]])
    """
    return _depthwise(1, x, weight, bias, stride, padding, dilation, backend)


def depthwise_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    *,
    backend: str = "auto",
) -> Tensor:
    """Convolve every channel of a volume with its own kernel; see :func:`depthwise_conv2d`.

    out[n, c, i] = bias[c] + Σ_t weight[c, 0, t] · x[n, c, i·s + t·d − p] over three axes, zero outside x.

    Shape:
        x (N, C, D, H, W) or (C, D, H, W), weight (C, 1, kD, kH, kW), bias (C) → (N, C, D', H', W').

    Raises:
        ValueError: shapes do not fit, the kernel exceeds the padded volume, or an argument is out of its range.

    Example:
        >>> depthwise_conv3d(torch.ones(1, 1, 2, 2, 2), torch.ones(1, 1, 2, 2, 2)).item()
        8.0
    """
    return _depthwise(3, x, weight, bias, stride, padding, dilation, backend)
