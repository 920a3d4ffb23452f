"""Downscaling with a kernel of its own for every output pixel and colour (ADK-Net, arXiv 2511.01620).

y[n, c, p] = Σ_t K[n, c, t, p] · x[n, c, s·p + o + t],  o = ⌊(s − k)/2⌋,  K = normalise(kernels);  x is mirrored.

Cost: k^d · N · C · positions multiply-adds; bounded by reading the kernels once. With g the gradient of y:

- kernel, before it is divided by the sum over the taps: g[n, c, p] · (x[n, c, s·p + o + t] − y[n, c, p]) over that sum,
  summed over c where the colours share a kernel; so that no tap has to wait for the others;
- x: the transpose of y, ∂x[n, c, s·p + o + t] += K[n, c, t, p] · g[n, c, p].

The map is split once into its s^d phases, so that every tap is a shifted multiply-add of contiguous rows, and the work
goes block by block through the cache: kernels are normalised tap by tap, forward and again backward, and nothing
of the size of the kernels is kept besides the kernels themselves and their gradient. On a GPU Triton kernels do the
same without the phases (``_resample_triton.py``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchconv._common import check, check_choice, ntuple
from torchconv.catalog import part
from torchconv.kernels import _custom
from torchconv.kernels._layout import keep_layout
from torchconv.kernels._triton_probe import trustworthy
from torchconv.kernels.precision import widen

NORMALISATIONS = ("softmax", "sum", "none")
LEAST_WEIGHT = 1e-6  # of the "sum" normalisation, as in arXiv 1907.12904
_LOG2E = math.log2(math.e)
_Index = tuple[Any, ...]
_BLOCK = 1 << 15  # elements of a tap in a block: fits the cache, and long enough to hide the cost of a call


def normalise_kernels(kernels: Tensor, normalisation: str = "softmax") -> Tensor:
    """Kernels (N, G, taps, \\*positions) that sum to one over the taps.

    Args:
        kernels: as predicted.
        normalisation: "softmax"; "sum" clamps to [1e-6, 1] and divides by the sum (arXiv 1907.12904); "none".

    Raises:
        ValueError: an unknown normalisation.

    Example:
        >>> normalise_kernels(torch.tensor([[[[3.0], [0.5]]]]), "sum").flatten()
        tensor([0.6667, 0.3333])
    """
    check_choice("normalisation", normalisation, NORMALISATIONS)
    if normalisation == "softmax":
        return torch.softmax(kernels, 2)
    if normalisation == "sum":
        clamped = kernels.clamp(LEAST_WEIGHT, 1.0)
        return clamped / clamped.sum(2, keepdim=True)
    return kernels


def _share(tap: Tensor, top: Tensor | None, normalisation: str) -> Tensor:
    """The kernel of one tap, before it is divided by the sum over the taps."""
    if top is not None:
        return (tap - top).mul_(_LOG2E).exp2_()  # on a CPU a third of the time of exp
    return tap.clamp(LEAST_WEIGHT, 1.0) if normalisation == "sum" else tap


def _slope(tap: Tensor, share: Tensor, normalisation: str) -> Tensor | None:
    """The derivative of :func:`_share`; None is 1."""
    if normalisation == "softmax":
        return share
    return (tap >= LEAST_WEIGHT) & (tap <= 1) if normalisation == "sum" else None


class Geometry(NamedTuple):
    """Sizes of a call: the scale, the kernel and the output, per axis."""

    scale: tuple[int, ...]
    kernel: tuple[int, ...]
    out: tuple[int, ...]

    @property
    def extent(self) -> tuple[int, ...]:
        """What the windows cover, from the first tap of the first to the last of the last."""
        return tuple(s * (n - 1) + k for s, k, n in zip(self.scale, self.kernel, self.out, strict=True))

    @property
    def phases(self) -> tuple[int, ...]:
        """Elements of one phase, per axis."""
        return tuple(-(-e // s) for e, s in zip(self.extent, self.scale, strict=True))


def _split(x: Tensor, geo: Geometry) -> Tensor:
    """The phases of the covered map: (\\*scale, N, C, \\*phases), element a of phase u is x[s·a + u]."""
    ndim = len(geo.scale)
    whole = [s * a for s, a in zip(geo.scale, geo.phases, strict=True)]
    missing = [w - e for w, e in zip(whole, geo.extent, strict=True)]
    if any(missing):
        x = F.pad(x, [p for m in reversed(missing) for p in (0, m)])
    x = x.reshape(*x.shape[:2], *(i for a, s in zip(geo.phases, geo.scale, strict=True) for i in (a, s)))
    phases, places = range(3, 3 + 2 * ndim, 2), range(2, 2 + 2 * ndim, 2)
    return x.permute(*phases, 0, 1, *places).contiguous()


def _join(phases: Tensor, geo: Geometry) -> Tensor:
    """The inverse of :func:`_split`."""
    ndim = len(geo.scale)
    order = [i for axis in range(ndim) for i in (ndim + 2 + axis, axis)]
    x = phases.permute(ndim, ndim + 1, *order).reshape(
        *phases.shape[ndim : ndim + 2], *(s * a for s, a in zip(geo.scale, geo.phases, strict=True))
    )
    covered: _Index = (..., *(slice(0, e) for e in geo.extent))
    return x[covered]


def _blocks(kernels: Tensor) -> Iterator[tuple[slice, slice]]:
    """Items and rows of the output of which one tap fits the cache."""
    batch, rows = kernels.shape[0], kernels.shape[3]
    if kernels.device.type != "cpu":  # no cache to fill, but launches to save
        yield slice(0, batch), slice(0, rows)
        return
    row = max(1, kernels[:1, :, 0, :1].numel())
    many, tall = max(1, _BLOCK // (row * rows)), max(1, min(rows, _BLOCK // row))
    for item in range(0, batch, many):
        for top in range(0, rows, tall):
            yield slice(item, item + many), slice(top, min(top + tall, rows))


def _taps(phases: Tensor, geo: Geometry, items: slice, rows: slice) -> Iterator[Tensor]:
    """For each tap the view of what it reads for a block of the output."""
    ndim = len(geo.scale)
    block: _Index = (*(0,) * ndim, items, slice(None), rows)
    start = phases[block]
    shape, steps = (*start.shape[:3], *geo.out[1:]), start.stride()
    by_phase, by_place = phases.stride()[:ndim], start.stride()[2:]
    moves = [
        [t % s * phase + t // s * place for t in range(k)]
        for k, s, phase, place in zip(geo.kernel, geo.scale, by_phase, by_place, strict=True)
    ]
    for tap in itertools.product(*moves):
        yield phases.as_strided(shape, steps, start.storage_offset() + sum(tap))


def _sums(kernels: Tensor, taps: Iterator[Tensor], normalisation: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The output of a block; the largest kernel and the sum over the taps where the normalisation needs them."""
    top = kernels.amax(2) if normalisation == "softmax" else None
    y: Tensor | None = None
    total: Tensor | None = None
    for tap, source in zip(kernels.unbind(2), taps, strict=True):
        share = _share(tap, top, normalisation)
        y = share * source if y is None else y.addcmul_(share, source)
        if normalisation != "none":
            total = share.clone() if total is None else total.add_(share)
    assert y is not None
    return (y if total is None else y.div_(total)), top, total


def _on_device(x: Tensor, kernels: Tensor) -> bool:
    return x.numel() > 0 and kernels.numel() > 0 and trustworthy("resample", x.device)


def _forward(x: Tensor, kernels: Tensor, scale: Sequence[int], size: Sequence[int], normalisation: str) -> Tensor:
    if _on_device(x, kernels):
        from torchconv.kernels import _resample_triton

        return _resample_triton.output(x.contiguous(), kernels.contiguous(), scale, size, normalisation, LEAST_WEIGHT)
    geo = Geometry(tuple(scale), tuple(size), tuple(kernels.shape[3:]))
    phases = _split(widen(x), geo)
    out = phases.new_empty(*x.shape[:2], *geo.out)
    for items, rows in _blocks(kernels):
        taps = _taps(phases, geo, items, rows)
        out[items, :, rows], _, _ = _sums(widen(kernels[items, :, :, rows]), taps, normalisation)
    return out.to(x.dtype)


def _backward(
    grad: Tensor,
    x: Tensor,
    kernels: Tensor,
    scale: Sequence[int],
    size: Sequence[int],
    normalisation: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    if _on_device(x, kernels):
        from torchconv.kernels import _resample_triton

        tensors = (grad.contiguous(), x.contiguous(), kernels.contiguous())
        return _resample_triton.gradients(*tensors, scale, size, normalisation, LEAST_WEIGHT, needs)
    geo = Geometry(tuple(scale), tuple(size), tuple(kernels.shape[3:]))
    phases, grad = _split(widen(x), geo), widen(grad)
    by_x = torch.zeros_like(phases) if needs[0] else phases
    by_kernels = torch.empty_like(kernels, memory_format=torch.contiguous_format) if needs[1] else kernels.new_empty(0)
    for items, rows in _blocks(kernels):
        block, g = widen(kernels[items, :, :, rows]), grad[items, :, rows].contiguous()
        y, top, total = _sums(block, _taps(phases, geo, items, rows), normalisation)
        # ∂y/∂share_t = (x_t − y) / total
        g = g if total is None else g / total
        offset = None if total is None else (g * y).neg_().sum_to_size(total.shape)
        places = (_taps(phases, geo, items, rows), _taps(by_x, geo, items, rows))
        targets = (by_kernels[items, :, :, rows] if needs[1] else block).unbind(2)
        for tap, by_tap, source, target in zip(block.unbind(2), targets, *places, strict=True):
            share = _share(tap, top, normalisation)
            if needs[0]:
                target.addcmul_(share, g)
            if not needs[1]:
                continue
            slope = _slope(tap, share, normalisation)
            by_share = (g * source).sum_to_size(tap.shape)
            by_share = by_share if offset is None else by_share.add_(offset)
            by_tap.copy_(by_share if slope is None else by_share.mul_(slope))
    return (_join(by_x, geo).to(x.dtype).contiguous() if needs[0] else x.new_empty(0)), by_kernels


def _composite(x: Tensor, kernels: Tensor, scale: Sequence[int], size: Sequence[int], normalisation: str) -> Tensor:
    """The same in ordinary operators."""
    weight = normalise_kernels(widen(kernels), normalisation)
    wide, total = widen(x), None
    for number, tap in enumerate(itertools.product(*(range(k) for k in size))):
        spans = (slice(t, t + s * (n - 1) + 1, s) for t, s, n in zip(tap, scale, kernels.shape[3:], strict=True))
        at: _Index = (..., *spans)
        term = weight[:, :, number] * wide[at]
        total = term if total is None else total + term
    assert total is not None
    return total.to(x.dtype)


def _fake(x: Tensor, kernels: Tensor, scale: Sequence[int], size: Sequence[int], normalisation: str) -> Tensor:
    return x.new_empty(*x.shape[:2], *kernels.shape[3:])


def _fake_backward(
    grad: Tensor, x: Tensor, kernels: Tensor, scale: Any, size: Any, normalisation: str, needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    by_x = x.new_empty(x.shape) if needs[0] else x.new_empty(0)
    return by_x, kernels.new_empty(kernels.shape) if needs[1] else kernels.new_empty(0)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, kernels, *ctx.options = inputs
    ctx.save_for_backward(x, kernels)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, kernels = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:2])
    if torch.is_grad_enabled():  # someone will differentiate again
        by = torch.autograd.grad(
            _composite(x, kernels, *ctx.options),
            [t for t, need in zip((x, kernels), needs, strict=True) if need],
            grad,
            create_graph=True,
        )
        found = iter(by)
        return *(next(found) if need else None for need in needs), None, None, None
    by_x, by_kernels = _DOWNSCALE_BACKWARD(grad, x, kernels, *ctx.options, needs)
    return by_x if needs[0] else None, by_kernels if needs[1] else None, None, None, None


_DOWNSCALE_BACKWARD = _custom.define(
    "adaptive_downscale_backward",
    "(Tensor grad, Tensor x, Tensor kernels, int[] scale, int[] size, str normalisation, bool[] needs)"
    " -> (Tensor, Tensor)",
    _backward,
    _fake_backward,
)
_DOWNSCALE = _custom.define(
    "adaptive_downscale",
    "(Tensor x, Tensor kernels, int[] scale, int[] size, str normalisation) -> Tensor",
    _forward,
    _fake,
    _autograd,
    _keep,
)


def _mirrored(length: int, begin: int, end: int, device: torch.device) -> Tensor:
    """Indices begin … end − 1 folded into 0 … length − 1 by mirrors on the first and the last element."""
    index = torch.arange(begin, end, device=device)
    if length == 1:
        return torch.zeros_like(index)
    period = 2 * (length - 1)
    folded = index.remainder(period)
    return torch.minimum(folded, period - folded)


def mirror_pad(x: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """The map from element ``begin`` to ``end`` − 1 on each spatial axis, mirrored where these lie outside.

    As ``F.pad(mode="reflect")``, and as often to and fro as it takes where the map is shorter than what is asked for.

    Example:
        >>> mirror_pad(torch.arange(3.0).reshape(1, 1, 3), [(-3, 4)])
        tensor([[[1., 2., 1., 0., 1., 2., 1.]]])
    """
    pads = []
    check(0 not in x.shape[2:], "x.shape", tuple(x.shape), "an axis without elements has nothing to mirror")
    for axis, (begin, end) in enumerate(spans, start=2):
        n = x.shape[axis]
        low, high = max(begin, 0), min(end, n)
        if max(low - begin, end - high) < high - low:
            x = x.narrow(axis, low, high - low)
            pads.append((low - begin, end - high))
        else:
            x = x.index_select(axis, _mirrored(n, begin, end, x.device))
            pads.append((0, 0))
    return F.pad(x, [p for pad in reversed(pads) for p in pad], mode="reflect") if any(map(any, pads)) else x


@part(
    "adaptive-downscale",
    paper="adknet",
    kind="kernel",
    dims=(1, 2, 3),
    keywords="adaptive resampling downscaling per pixel kernels kernel prediction KPN content adaptive resampler",
)
def adaptive_downscale(
    x: Tensor,
    kernels: Tensor,
    scale: int | Sequence[int],
    kernel_size: int | Sequence[int] | None = None,
    normalisation: str = "softmax",
) -> Tensor:
    """Downscale with a kernel given for every output pixel and colour.

    y[n, c, p] = Σ_t K[n, c, t, p] · x[n, c, s·p + o + t], o = ⌊(s − k)/2⌋, x mirrored at its border (the outermost
    element is not repeated). Where k and s are both even or both odd, the window is centred on the output pixel;
    otherwise it lies half an element to the left.

    Args:
        x: the map. Half precision is accumulated in float32.
        kernels: for each output pixel, taps in row-major order; one per colour (G = C) or one for all (G = 1).
        scale: s, an integer or one per axis.
        kernel_size: k, an integer or one per axis; by default the same on each axis, from the number of taps.
        normalisation: of the kernels over the taps, see :func:`normalise_kernels`.

    Shape:
        x (N, C, \\*size), kernels (N, G, taps, \\*out) → (N, C, \\*out), one to three spatial axes. An axis of n
        elements gives ⌊n/s⌋ pixels, or ⌈n/s⌉ where the kernels have so many.

    Raises:
        ValueError: shapes do not fit, or an argument is out of range.

    Example:
        >>> x = torch.arange(6.0).reshape(1, 1, 6)
        >>> adaptive_downscale(x, torch.zeros(1, 1, 2, 3), scale=2)
        tensor([[[0.5000, 2.5000, 4.5000]]])

    Reference: Pise, Ghosh, "Learned Adaptive Kernels for High-Fidelity Image Downscaling", arXiv 2511.01620.
    """
    check_choice("normalisation", normalisation, NORMALISATIONS)
    ndim = x.dim() - 2
    if ndim not in (1, 2, 3):
        raise ValueError(f"x of shape {tuple(x.shape)}: expected (N, C, *size) with one to three spatial axes")
    check(kernels.is_floating_point(), "kernels.dtype", kernels.dtype, "must be a floating-point type")
    _custom.check_devices(x, kernels=kernels)
    scales = ntuple("scale", scale, ndim)
    fits = kernels.dim() == ndim + 3 and kernels.shape[0] == x.shape[0] and kernels.shape[1] in (1, x.shape[1])
    grids = [(max(1, n // s), -(-n // s)) for n, s in zip(x.shape[2:], scales, strict=True)]
    if not fits or any(n not in grid for n, grid in zip(kernels.shape[3:], grids, strict=True)):
        sizes = ", ".join(str(low) if low == high else f"{low} or {high}" for low, high in grids)
        expected = f"({x.shape[0]}, 1 or {x.shape[1]}, taps, {sizes})"
        raise ValueError(f"kernels of shape {tuple(kernels.shape)}: expected {expected} for x {tuple(x.shape)}")
    taps = int(kernels.shape[2])
    if kernel_size is None:
        side = round(taps ** (1 / ndim))
        remedy = f"its taps axis must hold k^{ndim} of them; give kernel_size for another form"
        check(side**ndim == taps, "kernels.shape", tuple(kernels.shape), remedy)
        kernel_size = side
    sizes_ = ntuple("kernel_size", kernel_size, ndim)
    product = torch.Size(sizes_).numel()
    check(product == taps, "kernel_size", kernel_size, f"has {product} taps, but the kernels have {taps}")
    if x.dtype != kernels.dtype:
        dtype = torch.promote_types(x.dtype, kernels.dtype)
        x, kernels = x.to(dtype), kernels.to(dtype)
    spans = []
    for s, k, n in zip(scales, sizes_, kernels.shape[3:], strict=True):
        begin = (s - k) // 2
        spans.append((begin, begin + s * (n - 1) + k))
    covered = mirror_pad(x, spans)
    arguments = (covered, kernels, scales, sizes_, normalisation)
    out: Tensor
    if _custom.in_ordinary_operators():
        out = _composite(*arguments)
    else:
        out = (_DOWNSCALE if _custom.recorded(*arguments) else _forward)(*arguments)
    return keep_layout(out, x)
