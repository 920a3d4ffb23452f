"""Operators of our own for PyTorch's dispatcher: how they are registered, and when ordinary ones are wanted instead."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch

from torchconv._common import check


def define(
    name: str,
    schema: str,
    compute: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    keep: Callable[..., None] | None = None,
) -> Any:
    """Register ``torchconv::name`` and return it.

    Args:
        name: of the operator.
        schema: its arguments and results, as in ``"(Tensor x, int n) -> Tensor"``.
        compute: the function, for every device.
        fake: shapes and types of the results, for compilers.
        backward: ``backward(ctx, *grads)``; without one the operator has no gradient.
        keep: ``keep(ctx, inputs, output)`` stores what ``backward`` needs.
    """
    full = f"torchconv::{name}"
    torch.library.define(full, schema)
    torch.library.impl(full, "default", compute)
    torch.library.register_fake(full, fake)
    if backward is not None:
        torch.library.register_autograd(full, backward, setup_context=keep)
    return getattr(torch.ops.torchconv, name).default


def check_devices(x: torch.Tensor, **others: torch.Tensor | None) -> None:
    """Raise ValueError unless all are where ``x`` is: beside one on "meta" the dispatcher would compute nothing."""
    for name, tensor in others.items():
        if tensor is not None:
            remedy = f"the first tensor is on {x.device}; move both to one device"
            check(tensor.device == x.device, f"{name}.device", tensor.device, remedy)


def in_ordinary_operators() -> bool:
    """Someone wants to see through an operator: an exporter, a tracer, a counter of operations, a transform of
    ``torch.func`` or forward-mode differentiation."""
    if torch.compiler.is_exporting():
        return True
    if torch.compiler.is_compiling():
        return False
    return (
        torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


_FOR_ONNX = ContextVar("torchconv_for_onnx", default=False)


@contextlib.contextmanager
def for_onnx() -> Iterator[None]:
    """Within, what is exported will become ONNX: see :func:`without_transforms`."""
    token = _FOR_ONNX.set(True)
    try:
        yield
    finally:
        _FOR_ONNX.reset(token)


def without_transforms() -> bool:
    """Someone exports to ONNX, which has no complex numbers and hardly a runtime with a fast Fourier transform: take
    the form without one where there is such a form."""
    return torch.compiler.is_exporting() and (_FOR_ONNX.get() or torch.onnx.is_in_onnx_export())


def autocasts(device: str) -> bool:
    """Whether autocast is on for a kind of device ("meta" has none)."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast off, where it is on."""
    return torch.autocast(device, enabled=False) if autocasts(device) else contextlib.nullcontext()


def recorded(*arguments: Any) -> bool:
    """Whether a compiler, autograd or a subclass of tensors watches a call. Otherwise the function behind an operator
    can be called at once, which saves the 40 µs of its way through the dispatcher."""
    if torch.compiler.is_compiling():
        return True
    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
    return any(type(t) not in (torch.Tensor, torch.nn.Parameter) for t in tensors) or (
        torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    )
