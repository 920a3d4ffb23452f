"""The two backward passes of a convolution in dynamic fixed point, exact or in chains.

Das et al. 2018, arXiv 1802.00930. They are convolutions of integers like the forward pass:

    gX = Σ i_g · i_w · 2^(E_g + E_w),   gW = Σ i_x · i_g · 2^(E_x + E_g)

The chained forms take the forward pass's emulation on rearranged operands: gX convolves the gradient, with zeros put
between for the stride, with the turned kernel (sums over taps, then output channels); gW convolves the input, images as
channels, with the gradient as the kernel (sums over positions, then images).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchconv._common import Padding, Size, ntuple, resolve_padding
from torchconv.compress.dfp import Chain, DFPTensor, chained_conv, exact_sum, top

Pads = tuple[tuple[int, int], ...]


def integer_conv_input(
    grad: DFPTensor,
    w: DFPTensor,
    size: Sequence[int],
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    as_summed: bool = False,
) -> DFPTensor:
    """The exact gradient of :func:`~torchconv.compress.dfp.integer_conv` for its input.

    Args:
        grad: of the output (N, O, \\*spatial').
        w: (O, C/groups, \\*kernel).
        size: of the input's axes, \\*spatial.
        stride, padding, dilation, groups, as_summed: of the convolution.

    Returns:
        int64 sums (N, C, \\*size), and the sum of the exponents.

    Example:
        >>> from torchconv.compress.dfp import quantize
        >>> grad, w = quantize(torch.ones(1, 1, 2)), quantize(torch.ones(1, 1, 3))
        >>> integer_conv_input(grad, w, (4,)).dequantize()
        tensor([[[1., 2., 2., 1.]]])
    """
    ndim = w.integers.dim() - 2
    strides, dilations, pads = _settled(stride, padding, dilation, w.integers.shape[2:])
    padded, even = _even(size, pads)
    kernel = w.integers.double()
    shape = (len(grad.integers), w.integers.shape[1] * groups, *padded)

    def backward(part: Tensor) -> Tensor:
        return _backward(part, part.new_empty(1).expand(shape), kernel, strides, even, dilations, groups, 0)

    terms = w.integers.shape[0] // groups * w.integers[0, 0].numel()
    sums = exact_sum(backward, grad.integers, terms, top(grad.bits) * top(w.bits))
    for axis in range(ndim):
        sums = sums.narrow(2 + axis, pads[axis][0] - even[axis], size[axis])
    sums = sums if as_summed else sums.to(torch.int64)
    return DFPTensor(sums, grad.exponent + w.exponent, max(grad.bits, w.bits))


def integer_conv_weight(
    x: DFPTensor,
    grad: DFPTensor,
    kernel_size: Sequence[int],
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    as_summed: bool = False,
) -> DFPTensor:
    """The exact gradient of :func:`~torchconv.compress.dfp.integer_conv` for its kernel.

    Args:
        x: the input (N, C, \\*spatial).
        grad: of the output (N, O, \\*spatial').
        kernel_size: of the kernel's axes.
        stride, padding, dilation, groups, as_summed: of the convolution.

    Returns:
        int64 sums (O, C/groups, \\*kernel), and the sum of the exponents.

    Example:
        >>> from torchconv.compress.dfp import quantize
        >>> x, grad = quantize(torch.ones(1, 1, 4)), quantize(torch.ones(1, 1, 2))
        >>> integer_conv_weight(x, grad, (3,)).dequantize()
        tensor([[[2., 2., 2.]]])
    """
    strides, dilations, pads = _settled(stride, padding, dilation, kernel_size)
    _, even = _even(x.integers.shape[2:], pads)
    values = x.integers.double()
    if any(a != b for a, b in pads):
        values = F.pad(values, [p for pair in reversed(pads) for p in pair])
    shape = (grad.integers.shape[1], x.integers.shape[1] // groups, *kernel_size)

    def backward(part: Tensor) -> Tensor:
        return _backward(part, values, part.new_empty(1).expand(shape), strides, even, dilations, groups, 1)

    terms = grad.integers[:, :1].numel()
    sums = exact_sum(backward, grad.integers, terms, top(x.bits) * top(grad.bits))
    sums = sums if as_summed else sums.to(torch.int64)
    return DFPTensor(sums, x.exponent + grad.exponent, max(x.bits, grad.bits))


def chained_conv_input(
    grad: DFPTensor,
    w: DFPTensor,
    size: Sequence[int],
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    chain: Chain,
) -> tuple[Tensor, Tensor]:
    """:func:`integer_conv_input` in 32-bit chains (``grad`` is shifted): float32 sums, and how many overflowed."""
    strides, dilations, pads = _settled(stride, padding, dilation, w.integers.shape[2:])
    values = grad.integers
    ndim = values.dim() - 2
    spread = [(n - 1) * s + 1 for n, s in zip(values.shape[2:], strides, strict=True)]
    spaced = values.new_zeros(*values.shape[:2], *spread)
    spaced[(slice(None), slice(None), *(slice(None, None, s) for s in strides))] = values
    around = []
    for n, m, d, k, (before, _) in zip(size, spread, dilations, w.integers.shape[2:], pads, strict=True):
        first = d * (k - 1) - before
        around.append((first, n + d * (k - 1) - m - first))
    kernel = w.integers.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flip(list(range(2, 2 + ndim)))
    operands = DFPTensor(spaced, grad.exponent, grad.bits), DFPTensor(kernel, w.exponent, w.bits)
    return chained_conv(*operands, 1, tuple(around), dilations, groups, chain=chain)


def chained_conv_weight(
    x: DFPTensor,
    grad: DFPTensor,
    kernel_size: Sequence[int],
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    chain: Chain,
) -> tuple[Tensor, Tensor]:
    """:func:`integer_conv_weight` in 32-bit chains (``x`` is shifted): float32 sums, and how many overflowed."""
    strides, dilations, pads = _settled(stride, padding, dilation, kernel_size)
    # What the strides leave over at the end would give taps beyond the kernel: the padding there is cut by as much.
    reach = [
        (m - 1) * s + d * (k - 1) + 1
        for m, s, d, k in zip(grad.integers.shape[2:], strides, dilations, kernel_size, strict=True)
    ]
    around = tuple((a, r - n - a) for r, n, (a, _) in zip(reach, x.integers.shape[2:], pads, strict=True))
    images = x.integers.unflatten(1, (groups, -1)).transpose(0, 2).flatten(1, 2)
    kernel = grad.integers.unflatten(1, (groups, -1)).movedim(0, 2).flatten(0, 1)
    operands = DFPTensor(images, x.exponent, x.bits), DFPTensor(kernel, grad.exponent, grad.bits)
    sums, overflows = chained_conv(*operands, dilations, around, strides, groups, chain=chain)
    return sums.transpose(0, 1), overflows


def _settled(
    stride: Size, padding: Padding, dilation: Size, sizes: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...], Pads]:
    dilations = ntuple("dilation", dilation, len(sizes))
    return ntuple("stride", stride, len(sizes)), dilations, resolve_padding(padding, sizes, dilations)


def _even(size: Sequence[int], pads: Pads) -> tuple[list[int], list[int]]:
    """Sizes of what the convolution sees and its padding: its own where both ends have the same, else none."""
    if all(a == b for a, b in pads):
        return list(size), [a for a, _ in pads]
    return [n + a + b for n, (a, b) in zip(size, pads, strict=True)], [0] * len(pads)


def _backward(
    grad: Tensor, x: Tensor, w: Tensor, stride: Any, padding: Any, dilation: Any, groups: int, which: int
) -> Tensor:
    mask = [which == 0, which == 1, False]
    none = [0] * len(stride)
    grads = torch.ops.aten.convolution_backward(grad, x, w, None, stride, padding, dilation, False, none, groups, mask)
    result: Tensor = grads[which]
    return result
