"""Depthwise convolution with kernels of any size, as fast as the machine's best form for it (arXiv 2203.06717, §3).

PyTorch's depthwise convolution is fast for some small kernels going forward and up to a hundred times off going
back. Here the output, the gradient of the input and the gradient of the weight each take whichever form an estimate
(``_depthwise_cost.py``) or, with ``autotune``, a measurement finds cheapest: PyTorch's own, the same on channels-last
data, a real FFT, a product with a banded matrix, or for the weight a convolution by the output's gradient. On a GPU,
large kernels in half precision run on tensor cores (``_depthwise_triton.py``).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from torchconv._common import Padding, Size, check, check_choice, ntuple, resolve_padding
from torchconv.catalog import part
from torchconv.kernels import _depthwise_forms as forms
from torchconv.kernels import _depthwise_run as run
from torchconv.kernels._custom import autocasts, in_ordinary_operators
from torchconv.kernels._depthwise_plan import BACKENDS, check_weight, geometry
from torchconv.kernels._triton_probe import trustworthy
from torchconv.kernels.precision import HALF

_LONG = 13  # taps from which an estimate of operations sends half precision on a GPU to the tensor cores
_SMALL = 1 << 21  # multiply-adds up to which no form beats PyTorch's own by what it takes to choose
_PLAIN = (Tensor, torch.nn.Parameter)
_TRITON_TYPES = (torch.float32, *HALF)


def _for_tensor_cores(x: Tensor, weight: Tensor, stride: Size, dilation: Size) -> bool:
    """Large kernels in half precision, where products with banded matrices do far less work than cuDNN's kernels."""
    kernel = weight.shape[2:]
    unit = all(value == 1 for sizes in (stride, dilation) for value in ((sizes,) if isinstance(sizes, int) else sizes))
    large = kernel[-1] >= _LONG and math.prod(kernel) >= _LONG**2 and unit and x.device.type == "cuda"
    return large and x.dtype in HALF and trustworthy("depthwise", x.device)


def _compiled_gains(x: Tensor, weight: Tensor) -> bool:
    """Whether an operator of ours, which a compiler cannot see into, may beat the compiler's convolution on a CPU.

    It chooses its forms when called, so that nothing here depends on the size of the map.
    """
    longest = max(weight.shape[2:])
    training = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return longest > 3 if training else longest >= _LONG


def _only_pytorch(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Kinds of tensors (integers, subclasses) that only PyTorch's operator takes, or mixtures that it refuses."""
    kind, device = x.dtype, x.device
    if type(x) not in _PLAIN or type(weight) not in _PLAIN or kind not in run.KINDS:
        return True
    if weight.dtype != kind or weight.device != device:
        return True
    return bias is not None and (type(bias) not in _PLAIN or bias.dtype != kind or bias.device != device)


def _pads(padding: str, kernel: tuple[int, ...], dilation: Size) -> tuple[tuple[int, ...], list[int]]:
    """The numbers behind "same" or "valid", and the zeros put after the map first where an extent is even."""
    pads = resolve_padding(padding, kernel, ntuple("dilation", dilation, len(kernel)))
    uneven = any(before != after for before, after in pads)
    extra = [q for before, after in reversed(pads) for q in (0, after - before)] if uneven else []
    return tuple(before for before, _ in pads), extra


_remembered_pads = lru_cache(maxsize=4096)(_pads)  # compilers warn of caches, and need none


def _key(value: Size) -> Size:
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _convolve(
    ndim: int, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Size, padding: Padding, dilation: Size
) -> Tensor:
    out: Tensor = forms.CONVOLVE[ndim](x, weight, bias, stride, padding, dilation, weight.shape[0])
    return out


def _depthwise(
    ndim: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Padding,
    dilation: Size,
    backend: str,
) -> Tensor:
    tensors = isinstance(x, Tensor) and isinstance(weight, Tensor)  # not where torch.fx traces with proxies
    if not tensors or (torch.jit.is_tracing() and not isinstance(padding, str)):
        return _convolve(ndim, x, weight, bias, stride, padding, dilation)
    if backend not in BACKENDS:
        check_choice("backend", backend, BACKENDS)
    if x.dim() == ndim + 1:
        return _depthwise(ndim, x.unsqueeze(0), weight, bias, stride, padding, dilation, backend).squeeze(0)
    if x.dim() != ndim + 2 or weight.dim() != ndim + 2:
        shapes = f"x of shape {tuple(x.shape)}, weight of shape {tuple(weight.shape)}"
        raise ValueError(f"{shapes}: expected (N, C, *size) and (C, 1, *kernel_size) with {ndim} spatial axes")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        raise ValueError(f"bias of shape {tuple(bias.shape)}: expected ({weight.shape[0]},), a number per channel")
    device, compiling = x.device.type, torch.compiler.is_compiling()
    if isinstance(padding, str):
        pads = _pads if compiling else _remembered_pads
        padding, extra = pads(padding, weight.shape[2:], _key(dilation))
        x = F.pad(x, extra) if extra else x
    plain = backend == "native" or in_ordinary_operators()
    if not plain and autocasts(device):
        narrow = torch.get_autocast_dtype(device)
        x, weight = (t.to(narrow) if t.is_floating_point() and t.dtype != torch.float64 else t for t in (x, weight))
        bias = bias.to(weight.dtype) if bias is not None else None
        if not compiling:  # an operator of ours is not touched by autocast
            with torch.autocast(device, enabled=False):
                return _depthwise(ndim, x, weight, bias, stride, padding, dilation, backend)
    plain = plain or _only_pytorch(x, weight, bias)
    if not plain and backend == "auto":
        if device != "cpu":
            plain = not _for_tensor_cores(x, weight, stride, dilation)
        elif compiling:
            plain = not _compiled_gains(x, weight)
    if plain:
        check_weight(x.shape[1], tuple(weight.shape))
        try:
            return _convolve(ndim, x, weight, bias, stride, padding, dilation)
        except RuntimeError:
            geometry(tuple(x.shape), tuple(weight.shape), stride, padding, dilation)  # says it better
            raise
    if backend == "triton":
        _check_triton(x)
    if compiling and backend != "reference":
        sizes = ntuple("stride", stride, ndim), ntuple("padding", padding, ndim, least=0)
        out: Tensor = run.OUTPUT(x, weight, bias, *sizes, ntuple("dilation", dilation, ndim), backend)
        return out
    record = torch.is_grad_enabled()
    needs = (record and x.requires_grad, record and weight.requires_grad)
    plan = run.planned(x, weight, _key(stride), _key(padding), _key(dilation), needs, backend)
    if backend == "reference":
        return forms.reference(x, weight, bias, plan.geo)
    if plan.plain:
        return forms.native(x, weight, bias, plan.geo)
    if True in needs or (record and bias is not None and bias.requires_grad):
        out = run.Depthwise.apply(x, weight, bias, plan, backend)
        return out
    return run.output(x, weight, bias, plan.forward, plan.geo)


def same(ndim: int, x: Tensor, weight: Tensor, bias: Tensor | None, dilation: tuple[int, ...]) -> Tensor:
    """With "same" padding, for callers that have checked the shapes and call it for one small piece after another."""
    if torch.compiler.is_compiling():
        return _depthwise(ndim, x, weight, bias, 1, "same", dilation, "auto")
    padding, extra = _remembered_pads("same", weight.shape[2:], dilation)
    x = F.pad(x, extra) if extra else x
    training = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    work = x.numel() * (weight.numel() // weight.shape[0])
    quick = padding[-1] <= min(forms.MOST_PADDING, x.shape[-1]) and not forms.stuck(x, weight)
    if not training and work <= _SMALL and quick:
        return _convolve(ndim, x, weight, bias, 1, padding, dilation)
    return _depthwise(ndim, x, weight, bias, 1, padding, dilation, "auto")


def _check_triton(x: Tensor) -> None:
    kinds = ", ".join(str(t).removeprefix("torch.") for t in _TRITON_TYPES)
    check(x.dtype in _TRITON_TYPES, "backend", "triton", f"x is {x.dtype}, the kernels know {kinds}; use 'auto'")
    remedy = f"x is on {x.device}; needs a CUDA device (or TRITON_INTERPRET=1 for tests) and triton; use 'auto'"
    check(trustworthy("depthwise", x.device), "backend", "triton", remedy)


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
    padding: Padding = 0,
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
            PyTorch's, "channels_last", "fft", "matmul" (banded matrices: memory grows with the square of the map),
            "triton" (the same on a GPU's tensor cores) and "reference" (a sum over taps) force one form for all
            three. Half precision runs in float32 inside "fft" and "matmul".

    Under ``torch.compile`` large kernels become one operator ``torchconv::depthwise`` that chooses when it is called.
    Under ``torch.export``, tracing and ``torch.func``, on integers and, with "auto", on devices other than the CPU
    (but for large kernels in half precision on a GPU) this is ``F.conv2d``.

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
    padding: Padding = 0,
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
    padding: Padding = 0,
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
