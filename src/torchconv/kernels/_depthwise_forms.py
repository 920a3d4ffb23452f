"""The forms a depthwise convolution is computed in, each for the output and for both gradients.

With e = (k − 1)·d + 1 the extent of the kernel, for every image n and channel c:

- output: out[o] = Σ_t w[t] · x[o·s + t·d − p];
- gradient of x: dx[i] = Σ_{o, t: o·s + t·d − p = i} w[t] · g[o], the flipped kernel over the zero-stuffed gradient;
- gradient of w: dw[t] = Σ_n Σ_o g[o] · x[o·s + t·d − p], a convolution of x by g with stride and dilation exchanged.

No function here is seen by autograd: they are the inside of the ``autograd.Function`` in ``depthwise.py``.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchconv.kernels._layout import channels_last_format, is_channels_last

CONVOLVE: tuple[Any, ...] = (None, F.conv1d, F.conv2d, F.conv3d)
_Ints = tuple[int, ...]
MOST_PADDING = 6  # zeros on a side of the last axis that PyTorch's fast kernels add themselves
_WIDE = 7  # columns of a kernel up to which PyTorch's bfloat16 channels-last convolutions are as quick as others
_FFT_BLOCK = 1 << 19  # numbers per block of channels: two megabytes of float32, which stay in the second-level cache
_SCRATCH = 1 << 18  # numbers of a scratch that holds padded planes: one megabyte of float32
_IMAGES = 1 << 19  # numbers of the images convolved at one time
_FFT_WHOLE = 1 << 16  # longer maps are cut into overlapping tiles when the kernel is much shorter


class Geometry(NamedTuple):
    """The sizes of one convolution: batch, channels, and per axis input, kernel, output, stride, padding, dilation."""

    batch: int
    channels: int
    size: _Ints
    kernel: _Ints
    out: _Ints
    stride: _Ints
    padding: _Ints
    dilation: _Ints

    @property
    def ndim(self) -> int:
        return len(self.size)

    @property
    def extent(self) -> _Ints:
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation, strict=True))


# --- native: what torch.nn.functional does ---------------------------------------------------------------------------


def stuck(x: Tensor, w: Tensor) -> bool:
    """PyTorch 2.14 hardly returns from bfloat16 channels-last convolutions with wide kernels on a CPU."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and w.shape[-1] > _WIDE and is_channels_last(x)


def native(x: Tensor, w: Tensor, bias: Tensor | None, geo: Geometry) -> Tensor:
    if stuck(x, w):
        return native(x.float(), w.float(), None if bias is None else bias.float(), geo).to(x.dtype)
    out: Tensor = CONVOLVE[geo.ndim](x, w, bias, geo.stride, geo.padding, geo.dilation, geo.channels)
    return out


def by_images(x: Tensor, w: Tensor, bias: Tensor | None, geo: Geometry) -> Tensor:
    """The same some images at a time where maps are large: PyTorch's kernels copy their input and output into layouts
    of their own, and the pages of such copies are new ones each time unless the copies are of moderate size."""
    per_image = max(1, geo.channels * max(math.prod(geo.size), math.prod(geo.out)))
    step = max(1, _IMAGES // per_image)
    if geo.batch * per_image < 2 * _IMAGES or geo.batch == 1 or not x.is_contiguous() or x.device.type != "cpu":
        return native(x, w, bias, geo)
    out = x.new_empty(geo.batch, geo.channels, *geo.out)
    for n in range(0, geo.batch, step):
        out[n : n + step] = native(x[n : n + step], w, bias, geo)
    return out


def native_gradients(g: Tensor, x: Tensor, w: Tensor, geo: Geometry, mask: tuple[bool, bool]) -> tuple[Any, ...]:
    """PyTorch's own gradients of x and w; themselves differentiable."""
    args = (geo.stride, geo.padding, geo.dilation, False, (0,) * geo.ndim, geo.channels, (*mask, False))
    grads: tuple[Any, ...] = torch.ops.aten.convolution_backward(g, x, w, None, *args)
    return grads[:2]


def refused(geo: Geometry, last: bool) -> bool:
    """PyTorch leaves its fast kernels where the padding of the last axis is wide, unless channels-last and dense."""
    return geo.padding[-1] > min(MOST_PADDING, geo.out[-1]) and (not last or max(geo.dilation) > 1)


def padded(x: Tensor, w: Tensor, bias: Tensor | None, geo: Geometry) -> Tensor:
    """The same after writing the zeros around the map, which no fast kernel refuses."""
    x = F.pad(x, [q for p in reversed(geo.padding) for q in (p, p)])
    size = tuple(x.shape[2:])
    return native(x, w, bias, geo._replace(size=size, padding=(0,) * geo.ndim))


# --- convolutions of other arguments ---------------------------------------------------------------------------------


def channels_last(x: Tensor, w: Tensor, bias: Tensor | None, geo: Geometry) -> Tensor:
    """F.convNd on a channels-last copy; the result is left channels-last (a line is a map of one row)."""
    if geo.ndim == 1:
        flat = Geometry(
            *geo[:2], *((fill, *per_axis) for fill, per_axis in zip((1, 1, 1, 1, 0, 1), geo[2:], strict=True))
        )
        return channels_last(x.unsqueeze(2), w.unsqueeze(2), bias, flat).squeeze(2)
    return native(x.contiguous(memory_format=channels_last_format(geo.ndim)), w, bias, geo)


def flipped(g: Tensor, w: Tensor, geo: Geometry, last: bool) -> Tensor:
    """The gradient of x as a convolution of ``g`` with the flipped kernel."""
    axes = tuple(range(2, 2 + geo.ndim))
    if set(geo.stride) != {1}:
        g = _stuffed(g, geo)
    before = [e - 1 - p for e, p in zip(geo.extent, geo.padding, strict=True)]
    after = [n + e - 1 - b - m for n, e, b, m in zip(geo.size, geo.extent, before, g.shape[2:], strict=True)]
    pads: tuple[int, ...] = tuple(before)
    if before != after or min(before) < 0:
        g = F.pad(g, [p for pair in zip(reversed(before), reversed(after), strict=True) for p in pair])
        pads = (0,) * geo.ndim
    there = Geometry(
        geo.batch, geo.channels, tuple(g.shape[2:]), geo.kernel, geo.size, (1,) * geo.ndim, pads, geo.dilation
    )
    w = w.flip(axes)
    if last:
        return channels_last(g, w, None, there)
    return (padded if refused(there, False) else by_images)(g, w, None, there)


def correlated(g: Tensor, x: Tensor, geo: Geometry, last: bool) -> Tensor:
    """The gradient of w as a convolution of N·C channels: the padded input with the output gradient as its kernel."""
    sizes = tuple((o - 1) * s + e for o, s, e in zip(geo.out, geo.stride, geo.extent, strict=True))
    inside: Any = (..., *(slice(p, p + n) for p, n in zip(geo.padding, geo.size, strict=True)))
    seen: Any = (..., *(slice(max(0, z - p)) for z, p in zip(sizes, geo.padding, strict=True)))
    there = Geometry(1, 0, sizes, geo.out, geo.kernel, geo.dilation, (0,) * geo.ndim, geo.stride)
    if last and geo.ndim > 1:
        # Written channels-last at once: images and channels together are the fastest axis.
        order, back = (*range(2, 2 + geo.ndim), 0, 1), (geo.ndim, *range(geo.ndim))
        padded = x.new_zeros(*sizes, geo.batch, geo.channels)
        padded.permute(-2, -1, *range(geo.ndim))[inside].copy_(x[seen])
        padded = padded.flatten(-2).permute(back).unsqueeze(0)
        kernel = g.permute(order).contiguous().flatten(-2).permute(back).unsqueeze(1)
        dw = native(padded, kernel, None, there._replace(channels=geo.batch * geo.channels))
        return dw.reshape(geo.batch, geo.channels, 1, *geo.kernel).sum(0)
    dw = x.new_zeros(geo.channels, 1, *geo.kernel)
    images, channels = _plane_blocks(geo, math.prod(sizes))
    scratch = x.new_zeros(images, channels, *sizes)
    for n in range(0, geo.batch, images):
        for c in range(0, geo.channels, channels):
            part = x[n : n + images, c : c + channels]
            planes = part.shape[0] * part.shape[1]
            padded = scratch[: part.shape[0], : part.shape[1]]
            padded[inside].copy_(part[seen])
            kernel = g[n : n + images, c : c + channels].reshape(planes, 1, *geo.out)
            some = native(padded.reshape(1, planes, *sizes), kernel, None, there._replace(channels=planes))
            dw[c : c + channels].add_(some.reshape(*part.shape[:2], 1, *geo.kernel).sum(0))
    return dw


def _plane_blocks(geo: Geometry, numbers: int) -> tuple[int, int]:
    """Images and channels whose padded planes of ``numbers`` numbers are made at one time.

    One scratch of moderate size is written again and again: it stays in the cache, and the operating system hands its
    pages out once, which for a copy of the whole map takes longer than the convolution.
    """
    planes = max(1, _SCRATCH // numbers)
    if planes >= geo.channels:
        return min(geo.batch, planes // geo.channels), geo.channels
    blocks = -(-geo.channels // planes)
    return 1, -(-geo.channels // blocks)


def _stuffed(g: Tensor, geo: Geometry) -> Tensor:
    """``g`` with stride − 1 zeros between its positions."""
    out = g.new_zeros(*g.shape[:2], *((o - 1) * s + 1 for o, s in zip(geo.out, geo.stride, strict=True)))
    steps: Any = (..., *(slice(None, None, s) for s in geo.stride))
    out[steps] = g
    return out


# --- Fourier ---------------------------------------------------------------------------------------------------------


def good_size(least: int) -> int:
    """The smallest even length ≥ ``least`` whose prime factors are 2, 3, 5 and 7."""
    size = max(2, least + least % 2)
    while True:
        rest = size
        for prime in (2, 3, 5, 7):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return size
        size += 2


def fft_sizes(geo: Geometry) -> tuple[_Ints, _Ints]:
    """Lengths of the transforms, and how many tiles each axis is cut into (one: the whole map at once).

    A whole map needs only size + padding: what wraps around falls into the padding or into outputs nobody reads.
    """
    least_sizes = (max(n + p, e, n + 2 * p - e + 1) for n, p, e in zip(geo.size, geo.padding, geo.extent, strict=True))
    whole = tuple(good_size(n) for n in least_sizes)
    if math.prod(whole) <= _FFT_WHOLE:
        return whole, (1,) * geo.ndim
    lengths, tiles = [], []
    least = round((_FFT_WHOLE // 4) ** (1 / geo.ndim))
    for length, n, p, e in zip(whole, geo.size, geo.padding, geo.extent, strict=True):
        tile = good_size(max(least, 4 * e))
        fits = tile < length
        lengths.append(tile if fits else good_size(n + 2 * p))
        tiles.append(-(-(n + 2 * p - e + 1) // (tile - e + 1)) if fits else 1)
    return (tuple(lengths), tuple(tiles)) if max(tiles) > 1 else (whole, (1,) * geo.ndim)


def fft_blocks(geo: Geometry) -> list[slice]:
    """The blocks of channels whose spectra are made at one time."""
    lengths, tiles = fft_sizes(geo)
    numbers = max(1, geo.batch) * math.prod(lengths) * math.prod(tiles)
    step = max(1, min(geo.channels, _FFT_BLOCK // numbers))
    return [slice(c, c + step) for c in range(0, geo.channels, step)]


def _dilated(w: Tensor, geo: Geometry) -> Tensor:
    """(C, \\*extent): the kernel with zeros between its taps."""
    if set(geo.dilation) == {1}:
        return w[:, 0]
    out = w.new_zeros(w.shape[0], *geo.extent)
    steps: Any = (slice(None), *(slice(None, None, d) for d in geo.dilation))
    out[steps] = w[:, 0]
    return out


def _tiled(x: Tensor, before: _Ints, lengths: _Ints, steps: _Ints, tiles: _Ints) -> Tensor:
    """Zero-padded overlapping tiles (N, C, \\*tiles, \\*lengths) of ``x``; tile i starts at i·step − before."""
    pads: list[int] = []
    axes = list(zip(before, lengths, steps, tiles, x.shape[2:], strict=True))
    for b, length, step, count, n in reversed(axes):
        pads += (b, (count - 1) * step + length - b - n)
    x = F.pad(x, pads)
    for axis, (_, length, step, _, _) in enumerate(axes, start=2):
        x = x.unfold(axis, length, step)
    return x


def _untiled(y: Tensor, ndim: int, steps: _Ints, tiles: _Ints) -> Tensor:
    """The first ``step`` of every tile, joined: (N, C, \\*tiles, \\*lengths) → (N, C, \\*tiles·step)."""
    first: tuple[Any, ...] = (..., *(slice(s) for s in steps))
    y = y[first]
    if max(tiles) == 1:
        return y.reshape(*y.shape[:2], *steps)
    order = [axis for pair in zip(range(2, 2 + ndim), range(2 + ndim, 2 + 2 * ndim), strict=True) for axis in pair]
    return y.permute(0, 1, *order).reshape(*y.shape[:2], *(s * t for s, t in zip(steps, tiles, strict=True)))


def _fft_correlate(x: Tensor, w: Tensor, geo: Geometry, before: _Ints, out: Tensor, stride: _Ints) -> None:
    """out = Σ_t w[t] · x[o·stride + t − before], ``w`` already dilated; ``geo`` only sets the transforms' sizes."""
    lengths, tiles = fft_sizes(geo)
    axes = tuple(range(-geo.ndim, 0))
    full = tuple((o - 1) * s + 1 for o, s in zip(out.shape[2:], stride, strict=True))
    if max(tiles) == 1:
        steps = full
    else:
        steps = tuple(m - e + 1 for m, e in zip(lengths, geo.extent, strict=True))
        tiles = tuple(-(-f // s) for f, s in zip(full, steps, strict=True))
    inner = (slice(None), slice(None), *(slice(0, f, s) for f, s in zip(full, stride, strict=True)))
    ones = (1,) * geo.ndim
    for block in fft_blocks(geo):
        spectrum = torch.fft.rfftn(_tiled(x[:, block], before, lengths, steps, tiles), dim=axes)
        kernel = torch.fft.rfftn(w[block], s=lengths, dim=axes).conj_physical_()
        spectrum.mul_(kernel.reshape(kernel.shape[0], *ones, *kernel.shape[1:]))
        y = torch.fft.irfftn(spectrum, s=lengths, dim=axes)
        out[:, block] = _untiled(y, geo.ndim, steps, tiles)[inner]


def fft(x: Tensor, w: Tensor, geo: Geometry) -> Tensor:
    out = x.new_empty(geo.batch, geo.channels, *geo.out)
    _fft_correlate(x.contiguous(), _dilated(w, geo), geo, geo.padding, out, geo.stride)
    return out


def fft_gradients(g: Tensor, x: Tensor, w: Tensor, geo: Geometry, mask: tuple[bool, bool]) -> tuple[Any, ...]:
    """Both gradients share the spectrum of g; the gradient of w is summed over images as a spectrum."""
    lengths, tiles = fft_sizes(geo)
    x, g = x.contiguous(), _stuffed(g, geo) if set(geo.stride) != {1} else g.contiguous()
    wide = _dilated(w, geo)
    axes = tuple(range(-geo.ndim, 0))
    whole, ones = max(tiles) == 1, (1,) * geo.ndim
    dx = x.new_empty(x.shape) if mask[0] else None
    dw = w.new_empty(w.shape) if mask[1] else None
    taps: Any = (slice(None), *(slice(0, e, d) for e, d in zip(geo.extent, geo.dilation, strict=True)))
    inside: Any = (..., *(slice(p, p + n) for p, n in zip(geo.padding, geo.size, strict=True)))
    if dx is not None and not whole:
        before = tuple(e - 1 - p for e, p in zip(geo.extent, geo.padding, strict=True))
        _fft_correlate(g, wide.flip(axes), geo, before, dx, ones)
        if dw is None:
            return dx, dw
    steps = tuple(m - e + 1 for m, e in zip(lengths, geo.extent, strict=True))
    if not whole:
        tiles = tuple(-(-m // s) for m, s in zip(g.shape[2:], steps, strict=True))
    for block in fft_blocks(geo):
        part = g[:, block] if whole else _tiled(g[:, block], (0,) * geo.ndim, steps, steps, tiles)
        spectrum = torch.fft.rfftn(part, s=lengths, dim=axes)
        if dw is not None:
            other = torch.fft.rfftn(_tiled(x[:, block], geo.padding, lengths, steps, tiles), dim=axes)
            other = other.reshape(other.shape[:2] + spectrum.shape[2:]) if whole else other
            # Conjugated in memory: a lazy conj() is lost inside an operator that a compiled graph calls.
            other.conj_physical_().mul_(spectrum)
            total = other.sum((0, *range(2, 2 + geo.ndim))) if not whole else other.sum(0)
            total.conj_physical_()
            dw[block, 0] = torch.fft.irfftn(total, s=lengths, dim=axes)[taps]
        if dx is not None and whole:
            spectrum.mul_(torch.fft.rfftn(wide[block], s=lengths, dim=axes))
            dx[:, block] = torch.fft.irfftn(spectrum, s=lengths, dim=axes)[inside]
    return dx, dw


# --- by definition ---------------------------------------------------------------------------------------------------


def reference(x: Tensor, w: Tensor, bias: Tensor | None, geo: Geometry) -> Tensor:
    """The sum over the taps, one shifted product each, in ordinary differentiable operators."""
    padded = F.pad(x, [q for p in reversed(geo.padding) for q in (p, p)])
    total: Tensor | None = None
    for tap in itertools.product(*(range(k) for k in geo.kernel)):
        index: Any = (
            ...,
            *(
                slice(t * d, t * d + (o - 1) * s + 1, s)
                for t, d, o, s in zip(tap, geo.dilation, geo.out, geo.stride, strict=True)
            ),
        )
        at: tuple[Any, ...] = (slice(None), 0, *tap)
        weight = w[at]
        term = padded[index] * weight.reshape(-1, *(1,) * geo.ndim)
        total = term if total is None else total + term
    assert total is not None
    return total if bias is None else total + bias.reshape(-1, *(1,) * geo.ndim)
