"""The forms a long convolution is computed in; tensors are float32 or float64 here.

With x (B, C, L), M kernels a channel (M, C, K) and a the tap at lag 0,

- output: y[b, m, c, t] = Σ_j k[m, c, j] · x[b, c, t + a − j], zero outside x;
- gradient of x: dx[b, c, s] = Σ_m Σ_j k[m, c, j] · g[b, m, c, s − a + j], the same with reversed taps;
- gradient of k: dk[m, c, j] = Σ_b Σ_t g[b, m, c, t] · x[b, c, t + a − j].

A circular convolution of n ≥ max(a + L, L + K − 1 − a) samples holds the wanted outputs, at a … a + L − 1, free of
what wraps round; that is less than L + K − 1 unless the kernel is causal. The same n serves both gradients.

Conjugates are written out: inside an operator of our own, compiled graphs pass over the mark of a lazy one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

_WHOLE = 1 << 24  # samples of the longest single transform; longer ones are cut into blocks
_BLOCK = {"cpu": 1 << 20}  # numbers transformed at one time: four megabytes of float32
_BLOCK_ELSEWHERE = 1 << 27


@lru_cache(maxsize=4096)
def fast_length(n: int) -> int:
    """The smallest even number without prime factors above 7 that is at least ``n``."""
    found = 2
    while found < n:
        found *= 2
    odd = {1}
    for prime in (3, 5, 7):
        for power in sorted(odd):
            while (power := power * prime) < found:
                odd.add(power)
    return min([found, *(2 * m << max(0, (-(-n // (2 * m)) - 1).bit_length()) for m in odd)])


def transform_length(length: int, taps: int, origin: int) -> int:
    """How many samples a circular convolution needs so that nothing wraps into the output."""
    return fast_length(max(origin + length, length + taps - 1 - origin))


def trimmed(length: int, taps: int, origin: int) -> tuple[int, int]:
    """The range of taps that can meet both an input and an output: lags −(L − 1) to L − 1. May be empty."""
    first = min(max(0, origin - length + 1), taps)
    return first, max(first, min(taps, origin + length))


def block_length(length: int, taps: int, chunk: int) -> int:
    """Samples a block, or 0 for one transform of the whole; ``chunk`` as the caller gave it, 0 for unset."""
    if chunk:
        return 0 if max(length, taps) <= chunk else fast_length(2 * chunk) // 2
    if length > 1 << 15 and 8 * taps <= length:  # blocks of twice the kernel stay in the cache
        return max(1 << 12, fast_length(2 * taps))
    return 0 if length + taps <= _WHOLE else _WHOLE // 4


def _tiles(x: Tensor, numbers: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of channels, and of images where one channel of all is still too much, of about ``numbers`` a row.

    Single long rows are transformed three times slower by MKL than rows together, so that there are a few in a block.
    """
    few = 1 if numbers > _WHOLE else 2 if numbers > 1 << 22 else 8
    most = max(few, _BLOCK.get(x.device.type, _BLOCK_ELSEWHERE) // max(numbers, 1))
    batch, channels = x.shape[:2]
    images = max(1, min(batch, most))
    width = max(1, most // images)
    for c in range(0, channels, width):
        for b in range(0, batch, images):
            yield slice(b, b + images), slice(c, c + width)


def _rfft(x: Tensor, n: int) -> Tensor:
    """The transform of the last axis; a long row alone goes through MKL with a second one, which takes less time."""
    if _alone(x, n):
        return torch.fft.rfft(torch.cat([x, x]), n)[:1]
    return torch.fft.rfft(x, n)


def _irfft(x: Tensor, n: int) -> Tensor:
    if _alone(x, n):
        return torch.fft.irfft(torch.cat([x, x]), n)[:1]
    return torch.fft.irfft(x, n)


def _alone(x: Tensor, n: int) -> bool:
    return n >= 1 << 15 and x.device.type == "cpu" and x.numel() == x.shape[-1]


# --- one transform of the whole --------------------------------------------------------------------------------------


def whole(x: Tensor, kernel: Tensor, origin: int, spectrum: Tensor | None = None) -> Tensor:
    """The output by one transform a row, perhaps as part of a longer tensor.

    ``spectrum`` is that of the kernel where it is known.
    """
    length, n = x.shape[2], transform_length(x.shape[2], kernel.shape[2], origin)
    tiles = list(_tiles(x, n * (1 + kernel.shape[0])))
    y = None if len(tiles) == 1 else x.new_empty(x.shape[0], kernel.shape[0], *x.shape[1:])
    last, known = None, spectrum
    for images, channels in tiles:
        if spectrum is not None:
            known = spectrum[:, channels]
        elif channels != last:
            known, last = _rfft(kernel[:, channels], n), channels
        assert known is not None
        product = _rfft(x[images, channels], n).unsqueeze(1)
        product = product.mul_(known) if kernel.shape[0] == 1 else product * known
        part = _irfft(product, n)[..., origin : origin + length]
        if y is None:
            return part
        y[images, :, channels] = part
    assert y is not None
    return y


def whole_gradients(
    g: Tensor, x: Tensor, kernel: Tensor, origin: int, need_x: bool, need_k: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Both gradients from one transform of ``g``."""
    length, taps = x.shape[2], kernel.shape[2]
    n = transform_length(length, taps, origin)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else None
    dk = torch.zeros_like(kernel, memory_format=torch.contiguous_format) if need_k else None
    for images, channels in _tiles(x, n * (1 + kernel.shape[0])):
        part = _rfft(F.pad(g[images, :, channels], (origin, 0)), n)
        if dk is not None:
            inner = _rfft(x[images, channels], n).unsqueeze(1)
            dk[:, channels] += _irfft((part * inner.conj_physical()).sum(0), n)[..., :taps]
        if dx is not None:
            spectrum = (part * _rfft(kernel[:, channels], n).conj_physical()).sum(1)
            dx[images, channels] = _irfft(spectrum, n)[..., :length]
    return dx, dk


# --- blocks ----------------------------------------------------------------------------------------------------------


def _frames(x: Tensor, size: int, count: int) -> Tensor:
    return F.pad(x, (0, count * size - x.shape[-1])).unflatten(-1, (count, size))


def blocked(x: Tensor, kernel: Tensor, origin: int, size: int) -> Tensor:
    """The output by overlap-add: input and kernel in blocks of ``size`` samples, transforms of 2·size.

    Input blocks are streamed in groups at least as many as the kernel has blocks, so that memory follows the kernel
    and not the input, and no product is transformed back more than twice.
    """
    batch, _, length = x.shape
    many, _, taps = kernel.shape
    n, blocks, segments = 2 * size, -(-length // size), -(-taps // size)
    y = x.new_zeros(batch, many, x.shape[1], (blocks + segments) * size)
    group = max(segments, _BLOCK.get(x.device.type, _BLOCK_ELSEWHERE) // n, 1)
    for images, channels in _tiles(x, n * min(group + segments, blocks + segments) * (1 + many)):
        spectra = _rfft(_frames(kernel[:, channels], size, segments), n)
        for first in range(0, blocks, group):
            count = min(group, blocks - first)
            piece = x[images, channels, first * size : (first + count) * size]
            inner = _rfft(_frames(piece, size, count), n).unsqueeze(1)
            if segments == 1:
                outer = inner * spectra
            else:
                shape = (*inner.shape[:1], many, *inner.shape[2:3], count + segments - 1, inner.shape[-1])
                outer = inner.new_zeros(shape)
                for p in range(segments):
                    outer[..., p : p + count, :].addcmul_(inner, spectra[..., p : p + 1, :])
            parts = _irfft(outer, n).unflatten(-1, (2, size))
            target = y[images, :, channels, first * size :]
            for half in (0, 1):
                begin, width = half * size, parts.shape[-3] * size
                target[..., begin : begin + width] += parts[..., half, :].flatten(-2)
    return y[..., origin : origin + length].contiguous()


def blocked_gradients(
    g: Tensor, x: Tensor, kernel: Tensor, origin: int, size: int, need_x: bool, need_k: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Both gradients in blocks: that of x is an output, that of k a sum of products of blocks as many apart."""
    dx: Tensor | None = None
    if need_x:
        back = kernel.flip(-1)
        parts = (blocked(g[:, m], back[m : m + 1], kernel.shape[2] - 1 - origin, size) for m in range(kernel.shape[0]))
        dx = sum(parts, torch.zeros_like(x).unsqueeze(1)).squeeze(1)
    return dx, _blocked_kernel_gradient(g, x, kernel, origin, size) if need_k else None


def _blocked_kernel_gradient(g: Tensor, x: Tensor, kernel: Tensor, origin: int, size: int) -> Tensor:
    many, taps, length = kernel.shape[0], kernel.shape[2], x.shape[2]
    n, apart = 2 * size, (taps + size - 2) // size
    blocks = -(-(length + origin) // size)
    group = max(apart, _BLOCK.get(x.device.type, _BLOCK_ELSEWHERE) // n, 1)
    dk = x.new_zeros(many, x.shape[1], (apart + 2) * size)
    for images, channels in _tiles(x, n * min(2 * group, blocks) * (1 + many)):
        late = F.pad(g[images, :, channels], (origin, blocks * size - length - origin))
        early = F.pad(x[images, channels], (apart * size, max(0, blocks * size - length)))
        for first in range(0, blocks, group):
            count = min(group, blocks - first)
            piece = late[..., first * size : (first + count) * size]
            outer = _rfft(_frames(piece, size, count), n)
            piece = early[..., first * size : (first + count + apart) * size]
            inner = _rfft(_frames(piece, size, count + apart), n).conj_physical()
            for r in range(apart + 1):
                met = inner[..., apart - r : apart - r + count, :].unsqueeze(1)
                lags = _irfft((outer * met).sum((0, -2)), n)
                # Lags r·size − size … r·size + size − 1; the first block of dk takes the negative ones.
                dk[:, channels, r * size : (r + 1) * size] += lags[..., size:]
                dk[:, channels, (r + 1) * size : (r + 2) * size] += lags[..., :size]
    return dk[..., size : size + taps].contiguous()


# --- in ordinary operators, which differentiate themselves -----------------------------------------------------------


def composite(x: Tensor, kernel: Tensor, origin: int) -> Tensor:
    """The output as an expression of transforms."""
    length, taps = x.shape[2], kernel.shape[2]
    n = transform_length(length, taps, origin) if isinstance(length, int) else length + taps  # an open length
    product = torch.fft.rfft(x, n).unsqueeze(1) * torch.fft.rfft(kernel, n)
    return torch.fft.irfft(product, n)[..., origin : origin + length]


def native(x: Tensor, kernel: Tensor, origin: int) -> Tensor:
    """``F.conv1d``, a dot product of all taps for every output."""
    many, channels, taps = kernel.shape
    padded = F.pad(x, (taps - 1 - origin, origin))
    weight = kernel.flip(-1).transpose(0, 1).reshape(channels * many, 1, taps)
    return F.conv1d(padded, weight, groups=channels).unflatten(1, (channels, many)).transpose(1, 2)


def reference(x: Tensor, kernel: Tensor, origin: int) -> Tensor:
    """A sum over taps, as in the definition."""
    taps, length = kernel.shape[2], x.shape[2]
    padded = F.pad(x, (taps - 1 - origin, origin)).unsqueeze(1)
    total = torch.zeros_like(padded[..., :length]).expand(-1, kernel.shape[0], -1, -1)
    for j in range(taps):
        begin = taps - 1 - j
        total = total + kernel[:, :, j : j + 1] * padded[..., begin : begin + length]
    return total


SEEN_THROUGH: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "fft": composite,
    "native": native,
    "reference": reference,
}
