"""Resampling with taps between the pixels, the relative of ADK-Net's operator (CAR, arXiv 1907.12904).

See :mod:`torchconv.ops.adknet` for the layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchconv._common import check, check_positive
from torchconv.kernels._custom import in_ordinary_operators
from torchconv.kernels._layout import keep_layout
from torchconv.kernels.precision import wide_dtype
from torchconv.kernels.resample import mirror_pad

_CHUNK = 1 << 20  # samples taken at once


def fractional_downscale(
    x: Tensor,
    kernels: Tensor,
    offsets_v: Tensor,
    offsets_h: Tensor,
    scale: int,
    kernel_size: int | None = None,
    offset_unit: float | None = None,
    padding: int | None = None,
) -> Tensor:
    """Downscale with kernels whose taps are moved, each by its own fraction of a pixel, and sampled bilinearly.

    y[n, c, p, q] = Σ_{a,d} kernels[n, a·k + d, p, q] · X[n, c, py, px], X the mirrored map with ``padding`` more pixels
    at each border, py = (p + ½)/h · H + a + unit · offsets_v − ½ and px alike with offsets_h. Samples beyond X repeat
    its outermost pixel's neighbours: both corners are clipped, the fraction is not.

    Args:
        x: the map.
        kernels: one for all colours, used as they are.
        offsets_v, offsets_h: of each tap, down and to the right, usually in (−1, 1).
        scale: s.
        kernel_size: k; the root of the number of taps when None.
        offset_unit: pixels of the map that an offset of 1 means; the scale when None.
        padding: ⌊k/2⌋ when None, which centres the window.

    Shape:
        x (N, C, H, W), kernels and offsets (N, k², H // s, W // s) → (N, C, H // s, W // s).

    Raises:
        ValueError: shapes do not fit, or an argument is out of range.

    Example:
        >>> x = torch.arange(16.0).reshape(1, 1, 4, 4)
        >>> one, zero = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
        >>> fractional_downscale(x, one, zero, zero, scale=2)[0, 0]
        tensor([[ 2.5000,  4.5000],
                [10.5000, 12.5000]])

    Reference: Sun, Chen, "Learned Image Downscaling for Upscaling using Content Adaptive Resampler", arXiv 1907.12904.
    """
    check_positive("scale", scale)
    if x.dim() != 4:
        raise ValueError(f"x of shape {tuple(x.shape)}: expected (N, C, H, W)")
    grid = tuple(max(1, n // scale) for n in x.shape[2:])
    for name, tensor in (("kernels", kernels), ("offsets_v", offsets_v), ("offsets_h", offsets_h)):
        if tensor.dim() != 4 or tensor.shape[0] != x.shape[0] or tuple(tensor.shape[2:]) != grid:
            expected = f"({x.shape[0]}, taps, {grid[0]}, {grid[1]})"
            raise ValueError(f"{name} of shape {tuple(tensor.shape)}: expected {expected}")
        check(tensor.shape[1] == kernels.shape[1], name, tuple(tensor.shape), f"needs {kernels.shape[1]} taps")
    taps = int(kernels.shape[1])
    side = round(taps**0.5) if kernel_size is None else kernel_size
    check(side * side == taps, "kernel_size", kernel_size, f"its square must be the number of taps, {taps}")
    border = side // 2 if padding is None else padding
    check_positive("padding", border, zero=True)
    unit = float(scale if offset_unit is None else offset_unit)
    dtype = x.dtype
    for tensor in (kernels, offsets_v, offsets_h):
        dtype = torch.promote_types(dtype, tensor.dtype)
    wide = wide_dtype(dtype)
    size = (int(x.shape[2]), int(x.shape[3]))
    padded = mirror_pad(x.to(wide), [(-border, n + border) for n in size])
    tensors = (padded, kernels.to(wide), offsets_v.to(wide), offsets_h.to(wide))
    if in_ordinary_operators() or torch.compiler.is_compiling():
        out = _sample(tensors, 0, side, unit, size)
    else:
        out = _Sample.apply(*tensors, side, unit, size)
    return keep_layout(out.to(dtype), x)


def _corners(offset: Tensor, places: Tensor, unit: float, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """Both neighbours of each sample on one axis, and how far it lies between them."""
    at = places + offset * unit
    below = at.detach().floor()
    first = below.long().clamp(0, limit - 1)
    return first, (first + 1).clamp(max=limit - 1), at - below


def _sample(tensors: Sequence[Tensor], first: int, k: int, unit: float, size: tuple[int, int]) -> Tensor:
    """The sum over the given taps, of which the first has the number ``first``.

    ``tensors`` are the padded map, the kernels, the offsets down and to the right.
    """
    x, kernels, offsets_v, offsets_h = tensors
    height, width = kernels.shape[2:]
    tap = torch.arange(first, first + kernels.shape[1], device=x.device)
    options: dict[str, Any] = {"device": x.device, "dtype": x.dtype}
    rows = (torch.arange(height, **options) + 0.5) * (size[0] / height) - 0.5
    columns = (torch.arange(width, **options) + 0.5) * (size[1] / width) - 0.5
    down = tap.div(k, rounding_mode="floor")[:, None, None] + rows[:, None]
    right = tap.remainder(k)[:, None, None] + columns
    y0, y1, fy = _corners(offsets_v, down, unit, x.shape[2])
    x0, x1, fx = _corners(offsets_h, right, unit, x.shape[3])
    flat, channels, stride = x.flatten(2), x.shape[1], x.shape[3]

    def read(row: Tensor, column: Tensor) -> Tensor:
        index = (row * stride + column).flatten(1).unsqueeze(1).expand(-1, channels, -1)
        return flat.gather(2, index).unflatten(2, tuple(kernels.shape[1:]))

    fy, fx = fy.unsqueeze(1), fx.unsqueeze(1)
    above = torch.lerp(read(y0, x0), read(y0, x1), fx)
    beneath = torch.lerp(read(y1, x0), read(y1, x1), fx)
    return (kernels.unsqueeze(1) * torch.lerp(above, beneath, fy)).sum(2)


class _Sample(torch.autograd.Function):
    """Some taps at a time, forward and again backward, so that samples of all taps are never held at once."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kernels: Tensor, offsets_v: Tensor, offsets_h: Tensor, k: int, unit: float, size: Any
    ) -> Tensor:
        ctx.save_for_backward(x, kernels, offsets_v, offsets_h)
        ctx.options = (k, unit, size)
        out = x.new_zeros(*x.shape[:2], *kernels.shape[2:])
        for begin, end in _chunks(x, kernels):
            out += _sample((x, *(t[:, begin:end] for t in (kernels, offsets_v, offsets_h))), begin, *ctx.options)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *others = ctx.saved_tensors
        needs, again = ctx.needs_input_grad[:4], torch.is_grad_enabled()
        if again:  # someone will differentiate again
            out = _sample((x, *others), 0, *ctx.options)
            wanted = [t for t, need in zip((x, *others), needs, strict=True) if need]
            found = iter(torch.autograd.grad(out, wanted, grads[0], create_graph=True))
            return *(next(found) if need else None for need in needs), None, None, None
        by_x = torch.zeros_like(x) if needs[0] else None
        parts: list[list[Tensor]] = [[], [], []]
        for begin, end in _chunks(x, others[0]):
            pieces = [x.detach(), *(t[:, begin:end].detach() for t in others)]
            wanted = [t.requires_grad_() for t, need in zip(pieces, needs, strict=True) if need]
            with torch.enable_grad():
                out = _sample(pieces, begin, *ctx.options)
            found = iter(torch.autograd.grad(out, wanted, grads[0]))
            if by_x is not None:
                by_x += next(found)
            for gradients, need in zip(parts, needs[1:], strict=True):
                if need:
                    gradients.append(next(found))
        return by_x, *(torch.cat(g, 1) if g else None for g in parts), None, None, None


def _chunks(x: Tensor, kernels: Tensor) -> list[tuple[int, int]]:
    taps = kernels.shape[1]
    samples = max(1, x.shape[0] * x.shape[1] * kernels.shape[2] * kernels.shape[3])
    many = max(1, min(taps, _CHUNK // samples))
    return [(begin, min(begin + many, taps)) for begin in range(0, taps, many)]
