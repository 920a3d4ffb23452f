"""Depthwise convolution as products with banded matrices, one a channel: for maps little larger than the kernel.

As in ``_depthwise_forms.py``, nothing here is seen by autograd.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from torchconv.kernels._depthwise_forms import Geometry

_MATRIX_BLOCK = 1 << 19  # entries of the matrices made at one time


def toeplitz(w: Tensor, geo: Geometry) -> Tensor:
    """(C, inputs, outputs): each channel's convolution as a banded matrix, made one axis after another, last first."""
    channels, ndim = w.shape[0], geo.ndim
    bands = w.reshape(channels, *geo.kernel, 1, 1)
    for axis in reversed(range(ndim)):
        kernel, out, stride, dilation = geo.kernel[axis], geo.out[axis], geo.stride[axis], geo.dilation[axis]
        low, length = geo.padding[axis], geo.size[axis]
        inner, columns = bands.shape[-2:]
        room = max(length + 2 * low, (out - 1) * stride + (kernel - 1) * dilation + 1)
        full = bands.new_zeros(channels, *geo.kernel[:axis], room, inner, out, columns)
        _diagonals(full, kernel, stride, dilation).copy_(bands.unsqueeze(-2))
        bands = full.narrow(axis + 1, low, length).flatten(-2).flatten(axis + 1, axis + 2)
    return bands


def _diagonals(full: Tensor, kernel: int, stride: int, dilation: int) -> Tensor:
    """View (…, kernel, inner, out, columns) of (…, room, inner, out, columns): tap t of output o at o·s + t·d."""
    *lead, _, inner, out, columns = full.shape
    *steps, by_room, by_inner, by_out, by_column = full.stride()
    return full.as_strided(
        (*lead, kernel, inner, out, columns),
        (*steps, dilation * by_room, by_inner, stride * by_room + by_out, by_column),
    )


def _rows(x: Tensor) -> Tensor:
    """(C, N, positions) without a copy where ``x`` is contiguous."""
    return x.contiguous().flatten(2).transpose(0, 1)


def matmul_blocks(geo: Geometry) -> list[slice]:
    """The blocks of channels whose matrices are made at one time."""
    entries = (geo.size[0] + 2 * geo.padding[0]) * math.prod(geo.size[1:]) * math.prod(geo.out)
    step = max(1, min(geo.channels, _MATRIX_BLOCK // entries))
    return [slice(c, c + step) for c in range(0, geo.channels, step)]


def matmul(x: Tensor, w: Tensor, geo: Geometry, transposed: bool = False) -> Tensor:
    """x (or, ``transposed``, the output's gradient) times the matrix (its transpose)."""
    size = geo.size if transposed else geo.out
    out = x.new_empty(x.shape[0], x.shape[1], math.prod(size))
    rows = _rows(x)
    for block in matmul_blocks(geo):
        matrix = toeplitz(w[block], geo)
        torch.bmm(rows[block], matrix.mT if transposed else matrix, out=out.transpose(0, 1)[block])
    return out.unflatten(2, size)


def matmul_weight(g: Tensor, x: Tensor, geo: Geometry) -> Tensor:
    """The matrix's gradient xᵀ·g, summed along its diagonals one axis after another, first axis first."""
    rows, columns = _rows(x), _rows(g)
    sums = [_summed(torch.bmm(rows[block].mT, columns[block]), geo) for block in matmul_blocks(geo)]
    return (sums[0] if len(sums) == 1 else torch.cat(sums)).unsqueeze(1)


def _summed(grad: Tensor, geo: Geometry) -> Tensor:
    """(C, inputs, outputs) → (C, \\*kernel)."""
    channels = grad.shape[0]
    inner, columns = math.prod(geo.size), math.prod(geo.out)
    for axis in range(geo.ndim):
        kernel, out, stride, dilation = geo.kernel[axis], geo.out[axis], geo.stride[axis], geo.dilation[axis]
        low, length = geo.padding[axis], geo.size[axis]
        inner, columns = inner // length, columns // out
        room = max(length + 2 * low, (out - 1) * stride + (kernel - 1) * dilation + 1)
        grad = grad.reshape(channels, *geo.kernel[:axis], length, inner, out, columns)
        full = F.pad(grad, [0] * 6 + [low, room - low - length]) if room > length else grad
        grad = _diagonals(full, kernel, stride, dilation).sum(-2)
    return grad.reshape(channels, *geo.kernel)
