"""Convolution with kernels as long as the sequence, O(L log L) (Fu et al. 2023, arXiv 2302.06646; Li et al. 2022,
arXiv 2210.09298).

The output and both gradients take one real transform a row each, of the shortest length that keeps what wraps round out
of the result, in blocks of rows that stay in the cache. Only the input and the kernel are kept for the backward pass, a
quarter of what differentiating the expression of transforms keeps. Kernels much shorter than the sequence, and
sequences whose transform would not fit, run by overlap-add.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchconv._common import check, check_choice, check_positive
from torchconv.catalog import part
from torchconv.kernels import _long_forms as forms
from torchconv.kernels._custom import define, in_ordinary_operators, without_autocast, without_transforms
from torchconv.kernels._long_monarch import monarch
from torchconv.kernels.precision import wide_dtype

BACKENDS = ("auto", "native", "fft", "monarch", "triton", "reference")
_FEW_TAPS = 16  # up to which the dot products of F.conv1d are faster than transforms
_FEW_NUMBERS = 1 << 17  # of the output, up to which a call of an operator of our own takes longer than it saves
_PLAIN = (Tensor, torch.nn.Parameter)


def _compute_type(x: Tensor, kernel: Tensor) -> torch.dtype:
    return wide_dtype(torch.promote_types(x.dtype, kernel.dtype))


def _output(x: Tensor, kernel: Tensor, origin: int, chunk: int, backend: str, spectrum: Tensor | None) -> Tensor:
    length, dtype = x.shape[2], _compute_type(x, kernel)
    first, beyond = forms.trimmed(length, kernel.shape[2], origin)
    if first == beyond or 0 in x.shape:
        return x.new_zeros(x.shape[0], kernel.shape[0], *x.shape[1:])
    wide, taps, origin = x.to(dtype), kernel[..., first:beyond].to(dtype), origin - first
    size = forms.block_length(length, beyond - first, chunk)
    with without_autocast(x.device.type):
        if backend == "triton" and (y := _by_triton(x, taps, origin)) is not None:
            return y
        if backend == "monarch":
            y = monarch(wide, taps, origin)
        elif spectrum is None and size:
            y = forms.blocked(wide, taps, origin, size)
        else:
            y = forms.whole(wide, taps, origin, spectrum)
    return y.to(x.dtype)


def _contiguous_output(*args: Any) -> Tensor:
    return _output(*args).contiguous()


def _by_triton(x: Tensor, kernel: Tensor, origin: int) -> Tensor | None:
    try:
        from torchconv.kernels import _long_triton as kernels
    except ImportError:
        return None
    reason = kernels.refusal(x, kernel, origin)
    if reason:
        kernels.tell(reason)
        return None
    return kernels.output(x, kernel, origin)


def _gradients(
    g: Tensor, x: Tensor, kernel: Tensor, origin: int, chunk: int, need_x: bool, need_k: bool
) -> tuple[Tensor, Tensor]:
    length, dtype = x.shape[2], _compute_type(x, kernel)
    first, beyond = forms.trimmed(length, kernel.shape[2], origin)
    dx: Tensor | None = None
    dk: Tensor | None = None
    if first < beyond and 0 not in x.shape:
        taps = kernel[..., first:beyond].to(dtype)
        size = forms.block_length(length, beyond - first, chunk)
        args = (g.to(dtype), x.to(dtype), taps, origin - first)
        with without_autocast(x.device.type):
            if size:
                dx, dk = forms.blocked_gradients(*args, size, need_x, need_k)
            else:
                dx, dk = forms.whole_gradients(*args, need_x, need_k)
    if dx is None:
        dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if need_x else x.new_empty(0)
    if dk is not None:
        dk = F.pad(dk, (first, kernel.shape[2] - beyond))
    else:
        dk = torch.zeros_like(kernel, memory_format=torch.contiguous_format) if need_k else kernel.new_empty(0)
    return dx.to(x.dtype), dk.to(kernel.dtype)


def _gradients_keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.geometry = inputs[3:5]


def _gradients_backward(ctx: Any, ddx: Tensor, ddk: Tensor) -> tuple[Any, ...]:
    """dx is linear in g and k, dk in g and x: the gradients of both are the same two functions again."""
    g, x, kernel = ctx.saved_tensors
    ddx = torch.zeros_like(x) if ddx is None or ddx.shape != x.shape else ddx
    ddk = torch.zeros_like(kernel) if ddk is None or ddk.shape != kernel.shape else ddk
    dg = OUTPUT(ddx, kernel, *ctx.geometry, "fft", None) + OUTPUT(x, ddk, *ctx.geometry, "fft", None)
    dx, dk = GRADIENTS(g, ddx, ddk, *ctx.geometry, True, True)
    return dg.to(g.dtype), dx, dk, None, None, None, None


def _output_keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.geometry = inputs[2:4]


def _output_backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    x, kernel = ctx.saved_tensors
    need_x, need_k = ctx.needs_input_grad[:2]
    dx, dk = GRADIENTS(g, x, kernel, *ctx.geometry, need_x, need_k)
    return dx if need_x else None, dk if need_k else None, None, None, None, None


def _output_fake(x: Tensor, kernel: Tensor, origin: int, chunk: int, backend: str, spectrum: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], kernel.shape[0], x.shape[1], x.shape[2])


def _gradients_fake(
    g: Tensor, x: Tensor, kernel: Tensor, origin: int, chunk: int, need_x: bool, need_k: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if need_x else 0), kernel.new_empty(kernel.shape if need_k else 0)


GRADIENTS = define(
    "long_conv_backward",
    "(Tensor g, Tensor x, Tensor kernel, SymInt origin, SymInt chunk, bool need_x, bool need_k) -> (Tensor, Tensor)",
    _gradients,
    _gradients_fake,
    _gradients_backward,
    _gradients_keep,
)
OUTPUT = define(
    "long_conv",
    "(Tensor x, Tensor kernel, SymInt origin, SymInt chunk, str backend, Tensor? spectrum) -> Tensor",
    _contiguous_output,
    _output_fake,
    _output_backward,
    _output_keep,
)


def _settled(
    kernel: Tensor, channels: int | None, causal: bool, origin: int | None, skip: Tensor | None
) -> tuple[Tensor, int]:
    """The kernel as (M, C, K) with the skip added at lag 0, and the number of the tap at lag 0."""
    ok = kernel.dim() in (2, 3) and kernel.shape[-1] >= 1 and (channels is None or kernel.shape[-2] == channels)
    if not ok:
        wanted = "C" if channels is None else str(channels)
        remedy = f"expected ({wanted}, K) or (M, {wanted}, K) with K ≥ 1, a kernel for every channel of x"
        raise ValueError(f"kernel of shape {tuple(kernel.shape)}: {remedy}")
    taps = kernel.shape[-1]
    if origin is None:
        origin = 0 if causal else (taps - 1) // 2
    check(not causal or origin == 0, "origin", origin, "a causal kernel begins at lag 0; give causal=False")
    check(0 <= origin < taps, "origin", origin, f"must be one of the {taps} taps, 0 to {taps - 1}")
    if skip is not None:
        if skip.shape != kernel.shape[:-1]:
            shape = tuple(kernel.shape[:-1])
            raise ValueError(f"skip of shape {tuple(skip.shape)}: expected {shape}, a number for every kernel")
        kernel = kernel + F.pad(skip.unsqueeze(-1), (origin, taps - 1 - origin))
    return kernel if kernel.dim() == 3 else kernel.unsqueeze(0), origin


class Spectrum(NamedTuple):
    """A kernel's transform ``values`` (M, C, n), complex, and what it was made for."""

    values: Tensor
    length: int
    taps: int
    origin: int


def long_conv_spectrum(
    kernel: Tensor, length: int, causal: bool = True, origin: int | None = None, skip: Tensor | None = None
) -> Spectrum:
    """The kernel's transform for inputs of one length, to be made once and given to :func:`long_conv`.

    Args:
        kernel, causal, origin, skip: as in :func:`long_conv`.
        length: L of the inputs, at least 1.

    Raises:
        ValueError: shapes do not fit or an argument is out of range.

    Example:
        >>> kernel, x = torch.randn(3, 50), torch.randn(2, 3, 50)
        >>> spectrum = long_conv_spectrum(kernel, 50)
        >>> torch.allclose(long_conv(x, kernel, spectrum=spectrum), long_conv(x, kernel), atol=1e-5)
        True
    """
    check_positive("length", length)
    kernel, origin = _settled(kernel, None, causal, origin, skip)
    taps = kernel.shape[2]
    first, beyond = forms.trimmed(length, taps, origin)
    wide = kernel[..., first:beyond].to(_compute_type(kernel, kernel))
    values = torch.fft.rfft(wide, forms.transform_length(length, beyond - first, origin - first))
    return Spectrum(values, length, taps, origin)


def check_input(x: Tensor, kernel: Tensor, skip: Tensor | None = None) -> None:
    """Rank of the sequences, types and devices."""
    if x.dim() != 3 or x.shape[2] < 1:
        raise ValueError(f"x of shape {tuple(x.shape)}: expected (B, C, L) with L ≥ 1")
    for name, tensor in (("x", x), ("kernel", kernel), ("skip", skip)):
        if tensor is not None:
            check(tensor.is_floating_point(), f"{name}.dtype", tensor.dtype, "must be floating point; convert it")
            remedy = f"x is on {x.device}; move both to one device"
            check(tensor.device == x.device, f"{name}.device", tensor.device, remedy)


@part(
    "long-conv",
    paper="longconv",
    kind="kernel",
    dims=(1,),
    keywords="long convolution FFT overlap-add causal sequence global kernel Monarch butterfly streaming",
)
def long_conv(
    x: Tensor,
    kernel: Tensor,
    causal: bool = True,
    origin: int | None = None,
    skip: Tensor | None = None,
    *,
    spectrum: Spectrum | None = None,
    chunk: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Convolve every channel with its own kernel of any length, shorter or longer than the sequence.

    y[b, m, c, t] = Σ_j kernel[m, c, j] · x[b, c, t + origin − j] + skip[m, c] · x[b, c, t], zero outside x.

    Args:
        x: the sequences, any strides. Half precision is computed in float32.
        kernel: one kernel a channel, or M of them; any floating type, the result has that of x.
        causal: tap j stands at lag j: outputs depend on the present and the past only.
        origin: without ``causal``, the tap at lag 0; unset it is the centre (K − 1) // 2, as in
            ``scipy.signal.convolve(x, kernel, "same")``. K − 1 makes an anti-causal kernel.
        skip: D, added to the tap at lag 0 before the transform, so that it costs nothing.
        spectrum: the kernel's transform from :func:`long_conv_spectrum`; used where no gradient is recorded.
        chunk: most samples of x and of the kernel in one transform; longer ones go through in blocks (overlap-add).
            Unset: blocks of twice the kernel where that is at most an eighth of a sequence of over 32768 samples, and
            where one transform would have over 16.8 million samples. Working memory follows the kernel, not x.
        backend: "auto" is "native", ``F.conv1d``, up to 16 taps and "fft" above; "monarch" makes the transforms by
            products with 16 × 16 matrices; "triton" does so in one launch for transforms of up to 512 samples (2048 in
            half precision) and says once when it cannot, "fft" taking over; "reference" is a sum over taps.

    Gradients of any order. Under ``torch.compile`` this is one operator ``torchconv::long_conv``; under
    ``torch.export``, tracing and ``torch.func`` an expression of ordinary ones.

    Shape:
        x (B, C, L), kernel (C, K), skip (C) → (B, C, L); kernel (M, C, K), skip (M, C) → (B, M, C, L).

    Raises:
        ValueError: shapes, devices or types do not fit, or an argument is out of its range.

    Example:
        >>> long_conv(torch.arange(4.0).reshape(1, 1, 4), torch.ones(1, 3))
        tensor([[[0., 1., 3., 6.]]])

    Reference: arXiv 2302.06646 and arXiv 2210.09298.
    """
    check_choice("backend", backend, BACKENDS)
    check_input(x, kernel, skip)
    if chunk is not None:
        check_positive("chunk", chunk)
    single = kernel.dim() == 2
    kernel, origin = _settled(kernel, x.shape[1], causal, origin, skip)
    plain = in_ordinary_operators()
    if backend == "auto":
        free = chunk is None and spectrum is None
        backend = "native" if free and kernel.shape[2] <= _FEW_TAPS else "fft"
        small = x.shape[0] * x.shape[2] * kernel.shape[0] * kernel.shape[1] <= _FEW_NUMBERS
        plain = plain or (free and small and not torch.compiler.is_compiling())
    record = torch.is_grad_enabled() and (x.requires_grad or kernel.requires_grad)
    known = None if spectrum is None else _checked_spectrum(spectrum, x, kernel, origin)
    known = None if record or backend != "fft" else known
    if backend in ("native", "reference") or plain:
        y = _seen_through(x, kernel, origin, backend)
    elif record or torch.compiler.is_compiling() or type(x) not in _PLAIN or type(kernel) not in _PLAIN:
        y = OUTPUT(x, kernel, origin, chunk or 0, backend, known)
    else:  # without the dispatcher, which takes longer than a short transform
        y = _output(x, kernel, origin, chunk or 0, backend, known)
    return y.squeeze(1) if single else y


def _checked_spectrum(spectrum: Spectrum, x: Tensor, kernel: Tensor, origin: int) -> Tensor:
    made, needed = spectrum[1:], (x.shape[2], kernel.shape[2], origin)
    remedy = f"(length, taps, origin) are {needed} here; make it by long_conv_spectrum with the same arguments"
    check(made == needed and spectrum.values.shape[:2] == kernel.shape[:2], "spectrum", made, remedy)
    return spectrum.values


def _seen_through(x: Tensor, kernel: Tensor, origin: int, backend: str) -> Tensor:
    dtype = _compute_type(x, kernel)
    first, beyond = 0, kernel.shape[2]
    if isinstance(x.shape[2], int):  # else an exporter leaves the length open
        first, beyond = forms.trimmed(x.shape[2], kernel.shape[2], origin)
    form = forms.native if without_transforms() else forms.SEEN_THROUGH.get(backend, forms.composite)
    with without_autocast(x.device.type):
        if first == beyond or any(isinstance(n, int) and n == 0 for n in x.shape):  # MKL transforms no empty batch
            return x.unsqueeze(1) * kernel[..., first:beyond].sum(-1, keepdim=True).to(x.dtype)
        return form(x.to(dtype), kernel[..., first:beyond].to(dtype), origin - first).to(x.dtype)
