"""Whether Triton kernels can be used on a device: each is tried once on a small problem before it is believed."""

from __future__ import annotations

import importlib.util
import warnings
from functools import lru_cache

import torch
from torch import Tensor

from torchconv.kernels._triton import interpreted


def trustworthy(name: str, device: torch.device) -> bool:
    """Triton is there, the device can run it, and the kernels ``name`` agree with PyTorch; tried once per device."""
    if torch.compiler.is_compiling():
        return _remembered(name, device.type, device.index)
    return _tried(name, device.type, device.index)


def _remembered(name: str, kind: str, index: int | None) -> bool:
    return _tried(name, kind, index)


# What torch.compiler.assume_constant_result does, which would import all of the compiler, two seconds, here.
_remembered._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=64)
def _tried(name: str, kind: str, index: int | None) -> bool:
    if (
        importlib.util.find_spec("triton") is None
        or kind not in ("cuda", "cpu")
        or (kind == "cpu" and not interpreted())
    ):
        return False
    if interpreted():
        return True  # the interpreter takes seconds where a device takes microseconds, and tests compare anyway
    device = torch.device(kind) if index is None else torch.device(kind, index)
    measure, limit, matrices = _PROBES[name]
    if matrices and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return False  # matrix units with float32 sums for both half precisions
    try:
        with torch.no_grad(), torch.autocast("cuda", enabled=False):
            wrong = measure(device)
        problem = f"they differ from PyTorch's by {wrong:.2g}" if not wrong < limit else ""
    except Exception as error:  # whatever a compiler and a driver may say: there is another way
        problem = f"{type(error).__name__}: {error}"
    if problem:
        warnings.warn(f"Triton's {name} kernels are not used on {device}: {problem}", stacklevel=3)
    return not problem


def _numbers(device: torch.device, *shape: int) -> Tensor:
    count = torch.arange(torch.Size(shape).numel(), device=device, dtype=torch.float32)
    return (count * 0.7).sin().reshape(shape).to(torch.bfloat16)


def _off(got: Tensor, expected: Tensor) -> float:
    return float(((got.float() - expected.float()).abs().max() / expected.float().abs().max()).item())


def _depthwise_error(device: torch.device) -> float:
    """The largest relative error of the output and both gradients."""
    from torchconv.kernels import _depthwise_forms as forms
    from torchconv.kernels import _depthwise_triton as kernels
    from torchconv.kernels._depthwise_plan import geometry

    x, w = _numbers(device, 2, 3, 24, 24), _numbers(device, 3, 1, 13, 13)
    geo = geometry(tuple(x.shape), tuple(w.shape), 1, 6, 1)
    wide, kernel = x.float(), w.float()
    dx, dw = forms.native_gradients(wide, wide, kernel, geo, (True, True))
    pairs = (
        (kernels.output(x, w, None, geo), forms.native(wide, kernel, None, geo)),
        (kernels.gradient_x(x, w, geo), dx),
        (kernels.gradient_w(x, x, geo), dw),
    )
    return max(_off(got, expected) for got, expected in pairs)


def _inception_error(device: torch.device) -> float:
    """The largest relative error of one layer with a square and a band, forward and backward."""
    from torchconv.kernels import _depthwise_forms as forms
    from torchconv.kernels import _inception_triton as kernels
    from torchconv.kernels._depthwise_plan import geometry

    x = _numbers(device, 2, 3, 12, 12)
    shapes = ((1, (3, 3)), (1, (1, 7)))
    weights = [_numbers(device, width, 1, *size) for width, size in shapes]
    taps = torch.cat([w.flatten() for w in weights])
    outputs, inner, outer = [x[:, :1]], [x[:, :1]], []
    for c, w in enumerate(weights, start=1):
        part, kernel = x[:, c : c + 1].float(), w.float()
        geo = geometry(tuple(part.shape), tuple(w.shape), 1, tuple(k // 2 for k in w.shape[2:]), 1)
        dx, dw = forms.native_gradients(part, part, kernel, geo, (True, True))
        outputs.append(forms.native(part, kernel, None, geo))
        inner.append(dx)
        outer.append(dw.flatten())
    pairs = (
        (kernels.layer(x, taps, None, shapes, (1, 1)), torch.cat(outputs, 1)),
        (kernels.layer(x, taps, None, shapes, (1, 1), backward=True), torch.cat(inner, 1)),
        (kernels.gradient_taps(x, x, shapes, (1, 1)), torch.cat(outer)),
    )
    return max(_off(got, expected) for got, expected in pairs)


def _scan_error(device: torch.device) -> float:
    """The largest relative error of the selective scan and its five gradients."""
    from torchconv.kernels import _scan_triton as kernels
    from torchconv.kernels.scan import _native, _native_backward

    u, delta, g = (_numbers(device, 2, 8, 150).roll(k, 2) for k in range(3))
    delta, a = delta.float().abs(), -_numbers(device, 8, 3).float().abs()
    b, c = _numbers(device, 2, 2, 3, 150).float(), _numbers(device, 2, 1, 3, 150).float()
    expected = _native(u.float(), delta, a, b, c, None, False)
    by = _native_backward(g.float(), u.float(), delta, a, b, c, None, False)
    found = (kernels.output(u, delta, a, b, c), *kernels.gradients(g, u, delta, a, b, c))
    return max(_off(got, want) for got, want in zip(found, (expected, *by[:5]), strict=True))


def _causal_error(device: torch.device) -> float:
    """The largest relative error of the output and the three gradients, with SiLU, in both orders of the axes."""
    from torchconv.kernels import _causal_triton as kernels
    from torchconv.kernels.causal import _composite

    worst = 0.0
    for last in (False, True):
        x, w = _numbers(device, 2, 40, 24), _numbers(device, 24 if last else 40, 4)
        b = w[:, 0].contiguous()
        wide_x, wide_w, wide_b = leaves = [t.float().requires_grad_() for t in (x, w, b)]
        with torch.enable_grad():
            expected = _composite(wide_x, wide_w, wide_b, True, last)
            by = torch.autograd.grad(expected, leaves, x.float())
        found = (kernels.output(x, w, b, True, last), *kernels.gradients(x, x, w, b, True, last))
        worst = max(worst, *(_off(got, want) for got, want in zip(found, (expected, *by), strict=True)))
    return worst


def _adaptive_error(device: torch.device) -> float:
    """The largest relative error of the output and both gradients."""
    from torchconv.kernels import _adaptive_triton as kernels
    from torchconv.kernels.adaptive import _composite

    x, w = _numbers(device, 2, 6, 9, 7), _numbers(device, 2, 3, 9, 9, 7)
    wide_x, wide_w = leaves = [t.float().requires_grad_() for t in (x, w)]
    with torch.enable_grad():
        expected = _composite(wide_x, wide_w, (3, 3))
        by = torch.autograd.grad(expected, leaves, x.float())
    found = (
        kernels.aggregate(x, w, (3, 3)),
        kernels.aggregate(x, w, (3, 3), mirrored=True),
        kernels.weight_gradient(x, x, w, (3, 3)),
    )
    return max(_off(got, want) for got, want in zip(found, (expected, *by), strict=True))


def _long_error(device: torch.device) -> float:
    """The relative error of the output in float32."""
    from torchconv.kernels import _long_forms as forms
    from torchconv.kernels import _long_triton as kernels

    x, k = _numbers(device, 2, 3, 300).float(), _numbers(device, 2, 3, 300).float().flip(2)
    return _off(kernels.output(x, k, 0), forms.whole(x, k, 0))


def _resample_error(device: torch.device) -> float:
    """The largest relative error of the output and both gradients, with softmax."""
    from torchconv.kernels import _resample_triton as kernels
    from torchconv.kernels.resample import LEAST_WEIGHT, _composite

    x, w = _numbers(device, 2, 3, 15, 13), _numbers(device, 2, 1, 9, 7, 6)
    wide_x, wide_w = leaves = [t.float().requires_grad_() for t in (x, w)]
    with torch.enable_grad():
        expected = _composite(wide_x, wide_w, (2, 2), (3, 3), "softmax")
        by = torch.autograd.grad(expected, leaves, expected.detach())
    sizes = ((2, 2), (3, 3), "softmax", LEAST_WEIGHT)
    grad = expected.detach().to(x.dtype)
    found = (kernels.output(x, w, *sizes), *kernels.gradients(grad, x, w, *sizes, (True, True)))
    return max(_off(got, want) for got, want in zip(found, (expected, *by), strict=True))


# Kernels → how wrong they are, how wrong they may be, and whether they need matrix units.
_PROBES = {
    "adaptive": (_adaptive_error, 0.02, False),
    "causal": (_causal_error, 0.02, False),
    "depthwise": (_depthwise_error, 0.02, True),
    "inception": (_inception_error, 0.02, False),
    "long": (_long_error, 1e-4, True),
    "resample": (_resample_error, 0.03, False),
    "scan": (_scan_error, 0.02, False),
}
