"""A planned depthwise convolution and its gradients, as autograd and compilers see them.

Called eagerly this is an ``autograd.Function``, under ``torch.compile`` an operator ``torchconv::depthwise``: a call of
an operator that is written in Python costs about 10 microseconds without and 24 with gradients, one of a Function 3 and
4. Gradients of gradients are depthwise convolutions again, in fast forms too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchconv.kernels import _depthwise_forms as forms
from torchconv.kernels import _depthwise_matrix as matrix
from torchconv.kernels._custom import define, without_autocast
from torchconv.kernels._depthwise_forms import Geometry
from torchconv.kernels._depthwise_plan import Plan, plan
from torchconv.kernels._layout import is_channels_last, keep_layout
from torchconv.kernels.precision import HALF, widen

KINDS = {t: str(t).removeprefix("torch.") for t in (torch.float32, torch.float64, *HALF)}


def planned(
    x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, needs: tuple[bool, bool], backend: str
) -> Plan:
    """The plan of a call; sizes as integers or tuples."""
    return plan(
        tuple(x.shape),
        tuple(weight.shape),
        stride,
        padding,
        dilation,
        KINDS[x.dtype],
        is_channels_last(x),
        needs,
        backend,
        torch.get_num_threads(),
        x.device.type,
    )


def _triton() -> Any:
    from torchconv.kernels import _depthwise_triton  # brings triton along

    return _depthwise_triton


def output(x: Tensor, w: Tensor, bias: Tensor | None, form: str, geo: Geometry) -> Tensor:
    """The convolution in one form, in the memory format of ``x``."""
    if form == "native":
        return forms.by_images(x, w, bias, geo)
    if form == "triton":
        return keep_layout(_triton().output(x, w, bias, geo), x)
    wide, kernel, shift = widen(x), widen(w), None if bias is None else widen(bias)
    if form == "padded":
        out = forms.padded(wide, kernel, shift, geo)
    elif form == "channels_last":
        out = forms.channels_last(wide, kernel, shift, geo)
    else:
        out = (forms.fft if form == "fft" else matrix.matmul)(wide, kernel, geo)
        if shift is not None:
            out.add_(shift.reshape(-1, *(1,) * geo.ndim))
    return keep_layout(out.to(x.dtype), x)


def gradients(
    g: Tensor, x: Tensor, w: Tensor, by_x: str, by_w: str, geo: Geometry
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and w in the named forms; an empty name for one that is not needed."""
    dx: Tensor | None = None
    dw: Tensor | None = None
    x_type, w_type, like = x.dtype, w.dtype, x
    if "native" in (by_x, by_w):
        dx, dw = forms.native_gradients(g, x, w, geo, (by_x == "native", by_w == "native"))
    if by_x in ("", "native") and by_w in ("", "native"):
        return dx, dw
    if by_x == "triton":
        dx = _triton().gradient_x(g, w, geo)
    if by_w == "triton":
        dw = _triton().gradient_w(g, x, geo)
    if {by_x, by_w} - {"", "native", "triton"}:
        g, x, w = widen(g), widen(x), widen(w)
    if "fft" in (by_x, by_w):
        fx, fw = forms.fft_gradients(g, x, w, geo, (by_x == "fft", by_w == "fft"))
        dx, dw = dx if fx is None else fx, dw if fw is None else fw
    if by_x in ("flipped", "channels_last"):
        dx = forms.flipped(g, w, geo, by_x == "channels_last")
    elif by_x == "matmul":
        dx = matrix.matmul(g, w, geo, transposed=True)
    if by_w in ("correlate", "correlate_last"):
        dw = forms.correlated(g, x, geo, by_w == "correlate_last")
    elif by_w == "matmul":
        dw = matrix.matmul_weight(g, x, geo)
    dx = None if dx is None else keep_layout(dx.to(x_type), like)
    return dx, None if dw is None else dw.to(w_type)


def _bias_gradient(g: Tensor, needed: bool) -> Tensor | None:
    return g.sum((0, *range(2, g.dim()))) if needed else None


class Depthwise(torch.autograd.Function):
    """The eager form: (x, weight, bias, plan, backend)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, plan: Plan, backend: str) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.plan, ctx.backend = plan, backend
        y = output(x, w, bias, plan.forward, plan.geo)
        # Autograd forbids changes in place of results that are views, as products with matrices are.
        if y._base is None:
            return y
        return y.new_empty(0).set_(y.untyped_storage(), y.storage_offset(), y.shape, y.stride())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, w), (g,), plan = ctx.saved_tensors, grads, ctx.plan
        need_x, need_w, need_bias, *_ = ctx.needs_input_grad
        geo = plan.geo
        with without_autocast(g.device.type):
            dx: Tensor | None
            dw: Tensor | None
            if torch.is_grad_enabled():  # someone will differentiate again
                sizes = (geo.stride, geo.padding, geo.dilation)
                dx, dw = GRADIENTS(g, x, w, *sizes, need_x, need_w, ctx.backend)
            else:
                dx, dw = gradients(g, x, w, plan.grad_x if need_x else "", plan.grad_w if need_w else "", geo)
        return dx if need_x else None, dw if need_w else None, _bias_gradient(g, need_bias), None, None


# --- operators -------------------------------------------------------------------------------------------------------

_SIZES = "SymInt[] stride, SymInt[] padding, SymInt[] dilation"


def _empty_like(x: Tensor, shape: Sequence[Any]) -> Tensor:
    """Uninitialised, of ``shape`` and in the memory format of ``x``."""
    last = is_channels_last(x)
    layout = forms.channels_last_format(x.dim() - 2) if last else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _compute(
    x: Tensor, w: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, backend: str
) -> Tensor:
    chosen = planned(x, w, tuple(stride), tuple(padding), tuple(dilation), (False, False), backend)
    return keep_layout(output(x, w, bias, chosen.forward, chosen.geo), x)


def _fake(x: Tensor, w: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, backend: str) -> Tensor:
    axes = zip(x.shape[2:], w.shape[2:], stride, padding, dilation, strict=True)
    return _empty_like(x, (*x.shape[:2], *((n + 2 * p - (k - 1) * d - 1) // s + 1 for n, k, s, p, d in axes)))


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    x, w, _, *ctx.sizes, ctx.backend = inputs
    ctx.save_for_backward(x, w)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, w = ctx.saved_tensors
    need_x, need_w, need_bias, *_ = ctx.needs_input_grad
    dx = dw = None
    if need_x or need_w:
        dx, dw = GRADIENTS(g, x, w, *ctx.sizes, need_x, need_w, ctx.backend)
    return dx if need_x else None, dw if need_w else None, _bias_gradient(g, need_bias), None, None, None, None


def _compute_gradients(
    g: Tensor,
    x: Tensor,
    w: Tensor,
    stride: Any,
    padding: Any,
    dilation: Any,
    need_x: bool,
    need_w: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    chosen = planned(x, w, tuple(stride), tuple(padding), tuple(dilation), (need_x, need_w), backend)
    by_x, by_w = chosen.grad_x if need_x else "", chosen.grad_w if need_w else ""
    dx, dw = gradients(g, x, w, by_x, by_w, chosen.geo)
    return x.new_empty(0) if dx is None else keep_layout(dx, x), w.new_empty(0) if dw is None else dw.contiguous()


def _fake_gradients(
    g: Tensor,
    x: Tensor,
    w: Tensor,
    stride: Any,
    padding: Any,
    dilation: Any,
    need_x: bool,
    need_w: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    dx = _empty_like(x, x.shape) if need_x else x.new_empty(0)
    return dx, w.new_empty(w.shape) if need_w else w.new_empty(0)


def _keep_gradients(ctx: Any, inputs: Any, output: Any) -> None:
    g, x, w, *ctx.sizes, ctx.need_x, ctx.need_w, ctx.backend = inputs
    ctx.save_for_backward(g, x, w)


def _backward_gradients(ctx: Any, to_x: Tensor, to_w: Tensor) -> tuple[Tensor | None, ...]:
    """dx is linear in (g, w) and dw in (g, x): with their gradients in the other's place, both convolve again."""
    g, x, w = ctx.saved_tensors
    need_g, need_x, need_w, *_ = ctx.needs_input_grad
    sizes, backend = ctx.sizes, ctx.backend
    dg: Tensor | None = None
    if need_g and ctx.need_x:
        dg = OUTPUT(to_x, w, None, *sizes, backend)
    if need_g and ctx.need_w:
        other = OUTPUT(x, to_w, None, *sizes, backend)
        dg = other if dg is None else dg + other
    dx = GRADIENTS(g, x, to_w, *sizes, True, False, backend)[0] if need_x and ctx.need_w else None
    dw = GRADIENTS(g, to_x, w, *sizes, False, True, backend)[1] if need_w and ctx.need_x else None
    return dg, dx, dw, None, None, None, None, None, None


OUTPUT = define(
    "depthwise",
    f"(Tensor x, Tensor weight, Tensor? bias, {_SIZES}, str backend) -> Tensor",
    _compute,
    _fake,
    _backward,
    _keep,
)
GRADIENTS = define(
    "depthwise_gradients",
    f"(Tensor g, Tensor x, Tensor weight, {_SIZES}, bool need_x, bool need_w, str backend) -> (Tensor, Tensor)",
    _compute_gradients,
    _fake_gradients,
    _backward_gradients,
    _keep_gradients,
)
