"""Banks of Morlet wavelets in the Fourier domain, in one and two dimensions, with kymatio's constants."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from torchconv._common import check, check_choice, check_positive, ntuple

SIGMA0, ALPHA, BANDWIDTH = 0.1, 5.0, math.sqrt(0.5)
"""Width of the low-pass at scale 1, widths from the centre to a wavelet's edge, height where neighbours meet."""
FOLDS = ("sum", "mean")


@dataclass(frozen=True)
class Wavelet1d:
    """Centre and width in cycles per sample, and the octaves by which the filtered signal can be subsampled."""

    xi: float
    sigma: float
    j: int


@dataclass(frozen=True)
class MorletBank1d:
    """What :func:`morlet_bank_1d` returns.

    Attributes:
        length, padded: of the signal, and of the filters; ``left`` samples are added in front.
        scale: J; ``log2_stride``: of the local averages.
        phi: (padded,) low-pass; ``psi1``, ``psi2``: (wavelets, padded), described by ``first`` and ``second``.
        fold: how a filter is brought to a lower resolution.
    """

    length: int
    padded: int
    left: int
    scale: int
    log2_stride: int
    phi: np.ndarray
    psi1: np.ndarray
    psi2: np.ndarray
    first: tuple[Wavelet1d, ...]
    second: tuple[Wavelet1d, ...]
    fold: str = "sum"

    def level(self, response: np.ndarray, octaves: int) -> np.ndarray:
        """Responses at a resolution that is lower by ``octaves``."""
        blocks = response.reshape(*response.shape[:-1], 2**octaves, -1)
        return blocks.sum(-2) if self.fold == "sum" else blocks.mean(-2)

    def paths(self) -> list[tuple[int, ...]]:
        """Indices of the wavelets of every coefficient, in the order of the output."""
        pairs = [(a, b) for a, one in enumerate(self.first) for b, two in enumerate(self.second) if two.j > one.j]
        return [(), *((a,) for a in range(len(self.first))), *pairs]


def wavelets_1d(scale: int, q: int) -> tuple[Wavelet1d, ...]:
    """Geometric progression of ``q`` wavelets an octave down to the width 0.1 / 2^scale, then q − 1 of that width.

    Example:
        >>> [round(w.xi, 3) for w in wavelets_1d(2, 1)]
        [0.35, 0.175, 0.087]
    """
    step = 2.0 ** (1 / q)
    xi = max(1 / (1 + 2 ** (3 / q)), 0.35)
    sigma = xi * (1 - 1 / step) / (1 + 1 / step) / math.sqrt(2 * math.log(1 / BANDWIDTH))
    least = SIGMA0 / 2**scale
    pairs = []
    if sigma <= least:
        xi = sigma
    else:
        pairs.append((xi, sigma))
        while sigma > least * step:
            xi, sigma = xi / step, sigma / step
            pairs.append((xi, sigma))
    elbow = xi
    for _ in range(q - 1):
        xi -= elbow / q
        pairs.append((xi, least))
    return tuple(Wavelet1d(x, s, _octaves(x, s)) for x, s in pairs)


def _octaves(xi: float, sigma: float) -> int:
    return math.floor(-math.log2(min(abs(xi) + ALPHA * sigma, 0.5))) - 1


def morlet_1d(length: int, xi: float, sigma: float) -> np.ndarray:
    """Response of a Morlet wavelet, or of a Gaussian at ``xi`` 0: zero at frequency 0, ℓ¹ norm 1 in time."""
    periods = min(math.ceil(math.sqrt(-2 * sigma**2 * math.log(1e-7)) + 1), 5)
    frequency = np.arange((1 - periods) * length, periods * length) / length

    def gaussian(centre: float) -> np.ndarray:
        bump = np.exp(-((frequency - centre) ** 2) / (2 * sigma**2))
        folded: np.ndarray = bump.reshape(2 * periods - 1, -1).mean(0)
        return folded

    response = gaussian(0.0)
    if xi:
        wave = gaussian(xi)
        response = wave - wave[0] / response[0] * response
    return np.asarray(response / np.abs(np.fft.ifft(response)).sum())


def _support(length: int, sigma: float) -> int:
    """Half of the samples that hold all but 1e-3 of a Gaussian."""
    half = length // 2
    kernel = np.abs(np.fft.ifft(morlet_1d(length, 0.0, sigma)))[:half]
    small = np.flatnonzero(np.cumsum(kernel[::-1])[::-1] <= 1e-3)
    return int(small[0]) + 1 if small.size else half


def morlet_bank_1d(
    length: int,
    scale: int,
    q: int | Sequence[int] = 1,
    average: float | None = None,
    stride: int | None = None,
    fold: str = "sum",
) -> MorletBank1d:
    """The wavelets of a scattering transform of signals of ``length`` samples.

    Args:
        length: any N ≥ 2.
        scale: J ≥ 0, the widest wavelets cover about 2^J samples.
        q: wavelets an octave of the first order, or of both orders; the second has 1.
        average: T ≥ 1, the samples over which the low-pass averages; unset is 2^J. Need not be a power of 2.
        stride: of the output, a power of 2; unset is the largest one that does not exceed T.
        fold: "sum" or "mean" (kymatio up to 0.3) of the parts of a spectrum that coincide at a lower resolution.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> bank = morlet_bank_1d(64, 3, (4, 1))
        >>> bank.padded, bank.psi1.shape, bank.psi2.shape, len(bank.paths())
        (128, (10, 128), (4, 128), 16)

    Reference: Andén and Mallat, arXiv 1304.6763; kymatio.
    """
    check_positive("length", length)
    check(length > 1, "length", length, "must be at least 2")
    check_positive("scale", scale, zero=True)
    both = (q, 1) if isinstance(q, int) else (*q, 1)[: max(2, len(q))]
    fine = len(both) == 2 and all(isinstance(i, int) and i >= 1 for i in both)
    check(fine, "q", q, "must be an integer >= 1 or two of them, for the first and the second order")
    check_choice("fold", fold, FOLDS)
    t = 2**scale if average is None else average
    check(t >= 1, "average", average, "must be at least one sample")
    check(average is None or t <= length, "average", average, f"must not exceed the {length} samples of the signal")
    log2_stride = math.floor(math.log2(t))
    if stride is not None:
        check_positive("stride", stride)
        log2_stride = stride.bit_length() - 1
        check(stride == 1 << log2_stride, "stride", stride, "must be a power of 2")
    wanted = math.ceil(math.log2(length + 6 * _support(length, SIGMA0 / t)))
    padded = 1 << min(wanted, math.floor(math.log2(3 * length - 2)))
    check(1 << log2_stride <= padded, "scale", scale, f"steps of {1 << log2_stride} samples exceed the padded {padded}")
    first, second = (wavelets_1d(scale, i) for i in both)
    falls = all(a.xi > b.xi for a in first for b in second if b.j > a.j)
    check(falls, "q", q, "paths would rise in frequency; take no more wavelets an octave in the second order")
    psi1, psi2 = (
        np.stack([morlet_1d(padded, w.xi, w.sigma) for w in wavelets]) if wavelets else np.zeros((0, padded))
        for wavelets in (first, second)
    )
    phi = morlet_1d(padded, 0.0, SIGMA0 / t)
    left = (padded - length) // 2
    return MorletBank1d(length, padded, left, scale, log2_stride, phi, psi1, psi2, first, second, fold)


@dataclass(frozen=True)
class MorletBank2d:
    """What :func:`morlet_bank_2d` returns.

    Attributes:
        size, padded: (rows, columns) of the image, and of the filters.
        scale, angles: J and L.
        psi: (J, L, \\*padded) wavelets.
        phi: the low-pass, (rows,) and (columns,): it is the outer product of the two.
    """

    size: tuple[int, int]
    padded: tuple[int, int]
    scale: int
    angles: int
    psi: np.ndarray
    phi: tuple[np.ndarray, np.ndarray]

    def psi_level(self, octaves: int) -> np.ndarray:
        """Wavelets at a resolution that is lower by ``octaves``: (J, L, rows, columns)."""
        return fold_2d(self.psi, octaves)

    def phi_level(self, octaves: int) -> np.ndarray:
        """The low-pass at a resolution that is lower by ``octaves``: (rows, columns)."""
        return np.multiply.outer(*(fold_axis(p, octaves, 0) for p in self.phi))

    def averages(self, octaves: int) -> tuple[np.ndarray, np.ndarray]:
        """Matrices A, B with A·u·Bᵀ the low-passed map u of that level at steps of 2^J, without the outermost ones."""
        rows, columns = (_average(fold_axis(p, octaves, 0), 2 ** (self.scale - octaves)) for p in self.phi)
        return rows, columns

    def paths(self) -> list[tuple[tuple[int, int], ...]]:
        """Scale and angle of the wavelets of every coefficient, in the order of the output."""
        one = [(j, a) for j in range(self.scale) for a in range(self.angles)]
        pairs = [(x, y) for x in one for y in one if y[0] > x[0]]
        return [(), *((x,) for x in one), *pairs]


def fold_axis(response: np.ndarray, octaves: int, axis: int) -> np.ndarray:
    """Half of the spectrum for each octave: frequencies beyond it are cleared, the parts that coincide are added."""
    n = response.shape[axis]
    first = int(n * 2.0 ** (-octaves - 1))
    kept = np.ones(n)
    kept[first : first + int(n * (1 - 2.0**-octaves))] = 0
    moved = np.moveaxis(response, axis, -1) * kept
    return np.moveaxis(moved.reshape(*moved.shape[:-1], 2**octaves, -1).sum(-2), -1, axis)


def fold_2d(response: np.ndarray, octaves: int) -> np.ndarray:
    """:func:`fold_axis` on the last two axes."""
    return fold_axis(fold_axis(response, octaves, -1), octaves, -2)


def _average(response: np.ndarray, step: int) -> np.ndarray:
    """Rows of the circulant matrix of a filter at every ``step``, without the first and the last."""
    n = len(response)
    kernel = np.fft.ifft(response).real
    at = np.arange(step, n - step, step)
    return np.asarray(kernel[(at[:, None] - np.arange(n)) % n])


def _gaussians(size: tuple[int, int], sigma: float, theta: float, xi: float, slant: float) -> np.ndarray:
    """Envelope, and wave times envelope, each summed over the 5 × 5 periodic images: (2, rows, columns), complex."""
    cos, sin = math.cos(theta), math.sin(theta)
    # The inverse covariance R·diag(1, slant²)·Rᵀ / (2σ²) as xx, 2·xy and yy.
    xx, xy, yy = cos**2 + slant**2 * sin**2, 2 * cos * sin * (1 - slant**2), sin**2 + slant**2 * cos**2
    scale = 1 / (2 * sigma**2)
    nearest = min(1.0, slant**2) * scale
    found = np.zeros((2, *size), dtype=np.complex128)
    for ex in range(-2, 3):
        for ey in range(-2, 3):
            gap = [max(e * n, -((e + 1) * n - 1), 0) for e, n in ((ex, size[0]), (ey, size[1]))]
            if nearest * (gap[0] ** 2 + gap[1] ** 2) > 60:
                continue  # below 1e-26 everywhere
            x = np.arange(size[0])[:, None] + float(ex * size[0])
            y = np.arange(size[1]) + float(ey * size[1])
            envelope = np.exp(-scale * (xx * x**2 + xy * x * y + yy * y**2))
            found[0] += envelope
            found[1] += envelope * (np.exp(1j * xi * cos * x) * np.exp(1j * xi * sin * y))
    return found / (2 * 3.1415 * sigma**2 / slant)


def padded_size(size: Sequence[int], scale: int) -> tuple[int, int]:
    """Sizes of the padded image: the next multiple of 2^scale that leaves room for a step on both sides."""
    step = 2**scale
    rows, columns = (((n + step) // step + 1) * step for n in size)
    return rows, columns


def morlet_bank_2d(size: int | Sequence[int], scale: int, angles: int = 8) -> MorletBank2d:
    """The wavelets of a scattering transform of images, computed in double precision.

    ψ_{j,θ}: Morlet wavelets of width 0.8·2^j, frequency (3π/4)/2^j and slant 4/L, with mean 0; φ: a Gaussian of width
    0.8·2^{J−1}. The responses are real.

    Args:
        size: (rows, columns), or the side of a square; ≥ 2^J, any otherwise.
        scale: J ≥ 1.
        angles: L ≥ 1, spread over half a turn.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> bank = morlet_bank_2d((16, 20), 2, angles=4)
        >>> bank.padded, bank.psi.shape, len(bank.paths())
        ((24, 28), (2, 4, 24, 28), 25)

    Reference: Bruna and Mallat, arXiv 1203.1513; kymatio.
    """
    rows, columns = ntuple("size", size, 2)
    check_positive("scale", scale)
    check_positive("angles", angles)
    fits = min(rows, columns) >= 2**scale
    check(fits, "scale", scale, f"2^scale exceeds the image's {rows}×{columns}; lower it or enlarge the image")
    padded = padded_size((rows, columns), scale)
    psi = np.empty((scale, angles, *padded))
    for j in range(scale):
        for a in range(angles):
            theta = (int(angles - angles / 2 - 1) - a) * math.pi / angles
            envelope, wave = _gaussians(padded, 0.8 * 2**j, theta, 0.75 * math.pi / 2**j, 4 / angles)
            psi[j, a] = np.fft.fft2(wave - wave.sum() / envelope.sum() * envelope).real
    phi = tuple(_gaussian_response(n, 0.8 * 2 ** (scale - 1)) for n in padded)
    return MorletBank2d((rows, columns), padded, scale, angles, psi, (phi[0], phi[1]))


def _gaussian_response(n: int, sigma: float) -> np.ndarray:
    positions = np.arange(-2 * n, 3 * n)
    kernel = np.exp(-(positions**2) / (2 * sigma**2)).reshape(5, n).sum(0)
    return np.asarray(np.fft.fft(kernel).real / math.sqrt(2 * 3.1415 * sigma**2))
