"""Kernels of infinitely wide convolutional networks: NNGP and neural tangent kernel, exactly, in PyTorch.

Jacot et al. 2018, arXiv 1806.07572; for convolutions Arora et al. 2019, arXiv 1904.11955; the parameterisation
and the conventions are those of neural-tangents (arXiv 1912.02803), the networks those of arXiv 2311.14646. For two
images and every pair of their pixels p, p' a network of infinite width has a covariance K(p, p') and a tangent kernel
Θ(p, p'):

    input    K = mean over channels of x(p) x'(p'),  Θ = 0
    conv     K ← w² · mean over taps of K(s p + d, s p' + d) + b²,  Θ ← w² · the same mean of Θ + K
    ReLU     K ← √(a b)/(2π) · (sin θ + (π − θ) cos θ),  Θ ← Θ (π − θ)/(2π),  a, b the variances, cos θ = K/√(a b)

With pooling all pairs of pixels are needed, (H W)² numbers for a pair of images; without it only p = p', H W numbers.
A convolution is a sum along diagonals, one axis after the other: k_h + k_w additions a number whatever the kernel's
area. Pairs go in blocks of limited memory, of one set only those above the diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from torchconv._common import check, check_choice, check_positive
from torchconv.catalog import part
from torchconv.data.progress import bar

PADDINGS = ("SAME", "VALID")
_PIECE = 1 << 15  # numbers to which a non-linearity is applied at a time

Bend = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Conv:
    """Convolution with weights N(0, w_std²/fan-in), biases N(0, b_std²); SAME pads with zeros, more at the end."""

    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: str = "SAME"
    w_std: float = 1.0
    b_std: float = 0.0


@dataclass(frozen=True)
class Dense:
    """Fully connected layer on one position: after :class:`Flatten` or :class:`GlobalAvgPool`, or on vectors."""

    w_std: float = 1.0
    b_std: float = 0.0


@dataclass(frozen=True)
class ReLU:
    """max(x, 0), without He's factor: w_std = √2 keeps the scale."""


@dataclass(frozen=True)
class Erf:
    """The error function."""


@dataclass(frozen=True)
class AvgPool:
    """Mean over windows that lie in the image."""

    kernel: tuple[int, int] = (2, 2)
    stride: tuple[int, int] = (2, 2)


@dataclass(frozen=True)
class GlobalAvgPool:
    """Mean over all positions."""


@dataclass(frozen=True)
class Flatten:
    """All positions as features of one."""


Layer = Conv | Dense | ReLU | Erf | AvgPool | GlobalAvgPool | Flatten


def fully_connected(depth: int) -> list[Layer]:
    """``depth`` hidden ReLU layers with He's scale and a linear output, on vectors.

    Example:
        >>> len(fully_connected(2))
        5
    """
    check_positive("depth", depth)
    hidden: list[Layer] = [layer for _ in range(depth) for layer in (Dense(math.sqrt(2)), ReLU())]
    return [*hidden, Dense()]


MYRTLE = {5: (2, 1, 1), 7: (2, 2, 2), 10: (3, 3, 3)}


def myrtle(depth: int, input_size: int) -> list[Layer]:
    """The Myrtle network: 3 × 3 convolutions in three blocks with 2 × 2 pooling, w_std = 1 throughout.

    Args:
        depth: 5, 7 or 10 layers.
        input_size: height of the images, a power of two from 4: log2(input_size) poolings in all.

    Reference: Shankar et al. 2020, arXiv 2003.02237.
    """
    check_choice("depth", depth, MYRTLE)
    power = int(input_size).bit_length() - 1
    check(input_size >= 4 and 2**power == input_size, "input_size", input_size, "must be a power of two from 4")
    layers: list[Layer] = []
    for block, count in enumerate(MYRTLE[depth]):
        layers += [layer for _ in range(count) for layer in (Conv(), ReLU())]
        layers += [AvgPool()] * (1 if block < 2 else power - 2)
    return [*layers, Flatten(), Dense()]


@part(
    "nngp-ntk",
    paper="eigenlearning",
    kind="theory",
    keywords="neural tangent kernel NNGP infinite width convolutional CNTK Myrtle Gaussian process",
)
def nngp_ntk(
    x1: Tensor,
    x2: Tensor | None,
    layers: Sequence[Layer],
    *,
    memory: int | None = None,
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """NNGP and NTK of every image of ``x1`` with every one of ``x2``.

    Args:
        x1, x2: images (N, C, H, W) or vectors (N, D), floating point (float64 for matrices to be inverted). x2 = None
            is x1 itself: half the pairs, and exactly symmetric matrices.
        layers: of the network, in order, for instance from :func:`myrtle`.
        memory: bytes that the pairs of pixels of one block may take, one pair of images at least. By default what
            stays in a processor's cache, 4 MiB, or 256 MiB of another device.
        progress: show a bar on standard error.

    Shape:
        (N1, N2) each. Gradients with respect to the images are supported.

    Raises:
        ValueError: shapes that do not fit each other or a layer, a Dense layer on several positions.

    Example:
        >>> x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
        >>> nngp, ntk = nngp_ntk(x, None, myrtle(5, 8))
        >>> tuple(ntk.shape), bool((ntk == ntk.T).all())
        ((4, 4), True)

    Reference: arXiv 2311.14646, Appendix on convolutional kernels; arXiv 1904.11955, Section 4.
    """
    first, second = _images(x1, "x1"), None if x2 is None else _images(x2, "x2")
    if second is not None and (second.shape[1:], second.dtype) != (first.shape[1:], first.dtype):
        got = f"{tuple(second.shape)} of {second.dtype}"
        raise ValueError(f"x2={got}: expected (N2, {', '.join(map(str, first.shape[1:]))}) of {first.dtype}, as x1")
    pooled = max((i for i, layer in enumerate(layers) if isinstance(layer, AvgPool | GlobalAvgPool)), default=-1)
    size = math.prod(first.shape[2:]) ** (2 if pooled >= 0 else 1)
    if memory is None:
        memory = 1 << (22 if first.device.type == "cpu" else 28)
    block = max(1, memory // (3 * size * first.element_size()))
    variances1 = _variances(first, layers, pooled, block)
    variances2 = variances1 if second is None else _variances(second, layers, pooled, block)
    other = first if second is None else second
    if second is None:
        rows, columns = torch.triu_indices(len(first), len(first), device=first.device)
    else:
        rows, columns = torch.cartesian_prod(*(torch.arange(len(t), device=t.device) for t in (first, other))).T
    found: list[tuple[Tensor, Tensor]] = []
    with bar("kernel", len(rows), progress, unit="items") as advance:
        for i, j in zip(rows.split(block), columns.split(block), strict=True):
            pairs = _Pairs(first[i], other[j], pooled >= 0)
            given = [(a[i], b[j]) for a, b in zip(variances1, variances2, strict=True)]
            found.append(pairs.run(layers, pooled, given))
            advance(len(i))
    matrices = []
    for values in zip(*found, strict=True):
        matrix = first.new_zeros(len(first), len(other)).index_put((rows, columns), torch.cat(values))
        matrices.append(matrix if second is not None else matrix + matrix.triu(1).T)
    return matrices[0], matrices[1]


def _images(x: Tensor, name: str) -> Tensor:
    shape = f"{tuple(x.shape)} of {x.dtype}"
    check(x.dim() in (2, 4) and x.is_floating_point(), name, shape, "give floating-point (N, C, H, W) or (N, D)")
    check(x.numel() > 0, name, shape, "holds nothing")
    return x[:, :, None, None] if x.dim() == 2 else x


def _variances(x: Tensor, layers: Sequence[Layer], pooled: int, block: int) -> list[Tensor]:
    """K(p, p) of every image with itself, before every non-linearity."""
    found = []
    for images in x.split(block):
        pairs = _Pairs(images, images, pooled >= 0)
        pairs.run(layers, pooled, None)
        found.append(pairs.seen)
    return [torch.cat(values) for values in zip(*found, strict=True)]


class _Pairs:
    """K and Θ of pairs of images, (N, H, W), or (N, H, W, H, W) while all pairs of pixels are needed."""

    def __init__(self, x: Tensor, y: Tensor, full: bool) -> None:
        channels = x.shape[1]
        if full:
            self.k = torch.einsum("nchw,ncij->nhwij", x, y) / channels
        else:
            self.k = (x * y).mean(1)
        self.theta = torch.zeros_like(self.k)
        self.seen: list[Tensor] = []

    @property
    def full(self) -> bool:
        return self.k.dim() == 5

    def run(
        self, layers: Sequence[Layer], pooled: int, variances: list[tuple[Tensor, Tensor]] | None
    ) -> tuple[Tensor, Tensor]:
        """Through all layers; without ``variances`` the images are each paired with themselves and note theirs."""
        given = None if variances is None else iter(variances)
        for number, layer in enumerate(layers):
            if self.full and number > pooled:
                self.k, self.theta = _diagonal(self.k), _diagonal(self.theta)
            self._step(layer, number, given)
        if self.full:
            self.k, self.theta = _diagonal(self.k), _diagonal(self.theta)
        left = tuple(self.k.shape[1:3])
        check(left == (1, 1), "layers", f"end on {left} positions", "end with Flatten or GlobalAvgPool and Dense")
        return self.k.flatten(), self.theta.flatten()

    def _step(self, layer: Layer, number: int, given: Iterator[tuple[Tensor, Tensor]] | None) -> None:
        where = f"layers[{number}]"
        if isinstance(layer, Conv):
            k, theta = (self._window_sums(t, layer, where) for t in (self.k, self.theta))
            self._linear(layer, k, theta, math.prod(layer.kernel))
        elif isinstance(layer, Dense):
            positions = math.prod(self.k.shape[1:3])
            check(positions == 1, where, layer, f"on {positions} positions: put Flatten or GlobalAvgPool before it")
            self._linear(layer, self.k, self.theta)
        elif isinstance(layer, ReLU | Erf):
            own = _diagonal(self.k).clone()  # what comes is written over it
            self.seen.append(own)
            a, b = (own, own) if given is None else next(given)
            if self.full:
                a, b = a[:, :, :, None, None], b[:, None, None]
            self._bend(_relu if isinstance(layer, ReLU) else _erf, a, b)
        elif isinstance(layer, AvgPool):
            check(self._fits(layer.kernel), where, layer, f"does not fit maps of {tuple(self.k.shape[1:3])}")
            self.k, self.theta = (self._pooled(t, layer.kernel, layer.stride) for t in (self.k, self.theta))
        elif isinstance(layer, GlobalAvgPool):
            size = (self.k.shape[1], self.k.shape[2])
            self.k, self.theta = (self._pooled(t, size, size) for t in (self.k, self.theta))
        elif isinstance(layer, Flatten):
            self.k, self.theta = (t.mean((1, 2), keepdim=True) for t in map(_diagonal, (self.k, self.theta)))
        else:
            raise ValueError(f"{where}={layer!r}: expected one of the layers of torchconv.theory.ntk")

    def _linear(self, layer: Conv | Dense, k: Tensor, theta: Tensor, taps: int = 1) -> None:
        scale = layer.w_std**2 / taps
        self.k = k * scale
        if layer.b_std:
            self.k = self.k + layer.b_std**2
        self.theta = torch.add(self.k, theta, alpha=scale)

    def _bend(self, bend: Bend, a: Tensor, b: Tensor) -> None:
        """Through a non-linearity; where nothing is differentiated in pieces whose steps stay in the cache."""
        if self.k.requires_grad:
            self.k, slope = bend(self.k, a, b)
            self.theta = self.theta * slope
            return
        row = self.k[:1, :1].numel()
        items, rows = max(1, _PIECE // (row * self.k.shape[1])), max(1, _PIECE // row)
        for item in range(0, len(self.k), items):
            for first in range(0, self.k.shape[1], rows):
                piece = (slice(item, item + items), slice(first, first + rows))
                seen = b[piece] if b.shape[1] > 1 else b[piece[0]]
                self.k[piece], slope = bend(self.k[piece], a[piece], seen)
                self.theta[piece] *= slope

    def _fits(self, kernel: tuple[int, int]) -> bool:
        return all(size <= n for size, n in zip(kernel, self.k.shape[1:3], strict=True))

    def _window_sums(self, t: Tensor, layer: Conv, where: str) -> Tensor:
        """Sums over the taps, both pixels moving together, one axis after the other."""
        check_choice(f"{where}.padding", layer.padding, PADDINGS)
        check(layer.padding == "SAME" or self._fits(layer.kernel), where, layer, f"maps of {tuple(t.shape[1:3])}")
        for axis, (size, step) in enumerate(zip(layer.kernel, layer.stride, strict=True), start=1):
            t = _window_sums(t, (axis, axis + 2) if t.dim() == 5 else (axis,), size, step, layer.padding)
        return t

    def _pooled(self, t: Tensor, kernel: tuple[int, int], stride: tuple[int, int]) -> Tensor:
        """Means over windows of either image."""
        n, h, w = t.shape[:3]
        y = F.avg_pool2d(t.reshape(n, h * w, h, w), kernel, stride)  # of the second image
        small = tuple(y.shape[2:])
        y = F.avg_pool2d(y.flatten(2).transpose(1, 2).reshape(n, -1, h, w), kernel, stride)
        return y.flatten(2).transpose(1, 2).reshape(n, *small, *small)


def _diagonal(t: Tensor) -> Tensor:
    """p' = p."""
    if t.dim() == 3:
        return t
    n, h, w = t.shape[:3]
    return t.reshape(n, h * w, h * w).diagonal(dim1=1, dim2=2).reshape(n, h, w)


def _window_sums(t: Tensor, axes: tuple[int, ...], size: int, step: int, padding: str) -> Tensor:
    """Sums over windows along several axes at once that move together."""
    length = t.shape[axes[0]]
    out = -(-length // step) if padding == "SAME" else (length - size) // step + 1
    before = max(0, (out - 1) * step + size - length) // 2 if padding == "SAME" else 0
    shape = [out if axis in axes else n for axis, n in enumerate(t.shape)]
    total = None
    for tap in sorted(range(size), key=lambda tap: abs(tap - before)):  # the one that meets every pixel first
        first = max(0, -(-(before - tap) // step))  # the first window whose tap lies in the image, and past the last
        beyond = min(out, (length - 1 + before - tap) // step + 1)
        if first >= beyond:
            continue
        source = t
        for axis in axes:
            begin = first * step + tap - before
            picked = [slice(None)] * t.dim()
            picked[axis] = slice(begin, begin + (beyond - first - 1) * step + 1, step)
            source = source[tuple(picked)]
        if total is None and (first, beyond) == (0, out):
            total = source.clone(memory_format=torch.contiguous_format)
            continue
        total = t.new_zeros(shape) if total is None else total
        target = total
        for axis in axes:
            target = target.narrow(axis, first, beyond - first)
        target += source
    assert total is not None
    return total


def _relu(k: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """K after a ReLU and the factor of Θ."""
    # A pixel without variance has no angle with others: a right one does no harm.
    one, other = (torch.where(v > 0, torch.where(v > 0, v, 1.0).rsqrt(), 0.0) for v in (a, b))
    cosine = k * one * other
    # What rounding leaves of θ where both images are one would cost half of its digits (and the slope is infinite).
    same = cosine.abs() >= 1 - 4 * torch.finfo(k.dtype).eps
    cosine = torch.where(same, 0.0, cosine)
    share = torch.where(same, (k > 0).to(k.dtype) / 2, 0.5 - torch.acos(cosine) / (2 * math.pi))
    sine = torch.where(same, 0.0, (1 - cosine * cosine).sqrt())
    return sine * (a.sqrt() * b.sqrt() / (2 * math.pi)) + share * k, share


def _erf(k: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """K after an error function and the factor of Θ."""
    scale = (1 + 2 * a) * (1 + 2 * b)
    slope = 4 / math.pi / (scale - 4 * k * k).clamp(min=torch.finfo(k.dtype).tiny).sqrt()
    return 2 / math.pi * torch.asin((2 * k / scale.sqrt()).clamp(-1, 1)), slope
