"""Tight frames as responses on the DFT grid: the squares of the responses add up to 1 at every frequency."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from torchconv._common import check, check_choice, check_positive
from torchconv.catalog import part

Size = int | Sequence[int]


def sizes(size: Size) -> tuple[int, ...]:
    """A length, or one for each axis, as a tuple."""
    found = (size,) if isinstance(size, int) else tuple(size)
    ok = bool(found) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in found)
    check(ok, "size", size, "must be an integer >= 1 or one for each axis")
    return found


def _transition(x: Tensor) -> Tensor:
    """Angle from 0 at x ≤ 0 to π/2 at x ≥ 1, three times differentiable."""
    x = x.clamp(0, 1)
    return math.pi / 2 * x**4 * (35 - 84 * x + 70 * x**2 - 20 * x**3)


def rise(x: Tensor) -> Tensor:
    """From 0 at x ≤ 0 to 1 at x ≥ 1; the squares of :func:`rise` and :func:`fall` add up to 1."""
    return torch.sin(_transition(x))


def fall(x: Tensor) -> Tensor:
    """From 1 at x ≤ 0 to 0 at x ≥ 1."""
    return torch.cos(_transition(x))


def frequencies(size: Size) -> list[Tensor]:
    """Angular frequencies, one grid for each axis."""
    axes = [2 * math.pi * torch.fft.fftfreq(n, dtype=torch.float64) for n in sizes(size)]
    return list(torch.meshgrid(*axes, indexing="ij"))


def weyl_heisenberg_frame(size: Size, shifts: Size) -> Tensor:
    """One window at equally spaced frequencies (Gabor frame).

    Args:
        size: length of the signals, or one for each axis.
        shifts: K ≥ 2 windows, or one number for each axis; the first one is at frequency 0, a low-pass.

    Shape:
        (product of ``shifts``, \\*size), float64.

    Raises:
        ValueError: fewer than two windows, or not one number for each axis.

    Example:
        >>> weyl_heisenberg_frame(32, 6).square().sum(0).sub(1).abs().max() < 1e-12
        tensor(True)

    Reference: arXiv 1512.06293, appendix on Weyl–Heisenberg frames.
    """
    shape = sizes(size)
    counts = sizes(shifts) * (len(shape) if isinstance(shifts, int) else 1)
    fits = len(counts) == len(shape) and min(counts) >= 2
    check(fits, "shifts", shifts, f"must be an integer >= 2 or {len(shape)} of them")
    product = torch.ones(1, *[1] * len(shape), dtype=torch.float64)
    for axis, (n, count) in enumerate(zip(shape, counts, strict=True)):
        omega = 2 * math.pi * torch.fft.fftfreq(n, dtype=torch.float64)
        centres = 2 * math.pi * torch.arange(count, dtype=torch.float64) / count
        gap = (omega - centres[:, None] + math.pi) % (2 * math.pi) - math.pi
        windows = fall(gap.abs() * count / (2 * math.pi))
        view = [1] * len(shape)
        view[axis] = n
        product = (product.unsqueeze(1) * windows.view(1, count, *view)).flatten(0, 1)
    return product


def wavelet_frame(size: Size, scale: int) -> tuple[Tensor, Tensor]:
    """Meyer's radial wavelets: ``scale`` bands of an octave, from high to low frequencies, and a low-pass.

    Args:
        size: length of the signals, or one for each axis, any number of axes.
        scale: J ≥ 1 bands; the first one contains the corners of the grid.

    Shape:
        (J, \\*size) and (\\*size,), float64.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> bands, low = wavelet_frame((16, 20), 3)
        >>> bool((bands.square().sum(0) + low**2 - 1).abs().max() < 1e-12)
        True

    Reference: arXiv 1512.06293, appendix on wavelets.
    """
    check_positive("scale", scale)
    radius = torch.stack(frequencies(size)).square().sum(0).sqrt()
    low, bands = torch.ones_like(radius), []
    for j in range(scale):
        edge = math.pi / 3 * 2.0**-j
        at = (radius - edge) / edge
        bands.append(low * rise(at))
        low = low * fall(at)
    return torch.stack(bands), low


def curvelet_wedges(scale: int, wedges: int) -> tuple[int, ...]:
    """Angular windows by band where the resolution halves every second scale.

    Example:
        >>> curvelet_wedges(4, 8)
        (8, 4, 4, 2)
    """
    return tuple(max(wedges >> (j + 1) // 2, 1) for j in range(scale))


def ridgelet_wedges(scale: int, wedges: int) -> tuple[int, ...]:
    """Angular windows by band where the resolution halves every scale.

    Example:
        >>> ridgelet_wedges(4, 8)
        (8, 4, 2, 1)
    """
    return tuple(max(wedges >> j, 1) for j in range(scale))


def directional_frame(size: Sequence[int], wedges: Sequence[int], shear: bool = False) -> tuple[Tensor, Tensor]:
    """Radial bands cut into angular windows: curvelets, ridgelets or shearlets.

    Filters are real, but for the highest frequency of even sizes, whose sign the grid does not know.

    Args:
        size: rows and columns.
        wedges: angular windows of every band, from high to low frequencies (:func:`curvelet_wedges`,
            :func:`ridgelet_wedges`); 1 is the radial wavelet.
        shear: windows over slopes in two cones instead of angles.

    Shape:
        (sum of ``wedges``, rows, columns), bands outside, and the low-pass (rows, columns); float64.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> atoms, low = directional_frame((16, 20), curvelet_wedges(3, 8))
        >>> atoms.shape, bool((atoms.square().sum(0) + low**2 - 1).abs().max() < 1e-12)
        (torch.Size([16, 16, 20]), True)

    Reference: arXiv 1512.06293, appendix on curvelets, shearlets and ridgelets.
    """
    shape = sizes(size)
    check(len(shape) == 2, "size", size, "directions need two axes: (rows, columns)")
    for count in wedges:
        check_positive("wedges", count)
    bands, low = wavelet_frame(shape, len(wedges))
    rows, columns = frequencies(shape)
    if shear:
        flat = rows.abs() <= columns.abs()
        slope = torch.where(flat, rows, columns) / torch.where(flat, columns, rows).where(
            (rows != 0) | (columns != 0), 1
        )
        place, period = torch.where(flat, slope, 2 - slope), 4.0
    else:
        place, period = torch.atan2(rows, columns), math.pi
    atoms = []
    for band, count in zip(bands, wedges, strict=True):
        centres = period * torch.arange(count, dtype=torch.float64).view(-1, 1, 1) / count
        gap = ((place - centres + period / 2) % period - period / 2).abs()
        atoms.append(band * (fall(gap * count / period) if count > 1 else torch.ones_like(gap)))
    return torch.cat(atoms), low


def daubechies(moments: int) -> np.ndarray:
    """Low-pass of Daubechies' wavelet with ``moments`` vanishing moments, Haar's at 1: 2·moments taps of sum √2.

    Example:
        >>> daubechies(1).round(4)
        array([0.7071, 0.7071])
    """
    check_positive("moments", moments)
    check(moments <= 20, "moments", moments, "roots are no longer accurate above 20")
    # |H|² = 2·cos(ω/2)^2p · P(sin²(ω/2)); the roots of P inside the circle give the shortest delay.
    series = [math.comb(moments - 1 + k, k) for k in range(moments)]
    taps = np.ones(1)
    for root in np.roots(series[::-1]):
        pair = np.roots([1, 4 * root - 2, 1])  # z + 1/z = 2 − 4y
        taps = np.convolve(taps, [1, -pair[np.argmin(np.abs(pair))]])
    for _ in range(moments):
        taps = np.convolve(taps, [1, 1])
    taps = np.real(taps)
    return np.asarray(taps * math.sqrt(2) / taps.sum())


def undecimated_frame(size: Size, scale: int, moments: int = 1) -> tuple[Tensor, Tensor]:
    """Undecimated Daubechies wavelets (Haar's at one moment), products over the axes.

    Args:
        size: length of the signals, or one for each axis.
        scale: J ≥ 1 octaves.
        moments: vanishing moments, 1 to 20.

    Shape:
        (J·(2^d − 1), \\*size) complex responses, from high to low frequencies, and the low-pass (\\*size,).

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> atoms, low = undecimated_frame(16, 2)
        >>> bool((atoms.abs().square().sum(0) + low.abs() ** 2 - 1).abs().max() < 1e-12)
        True

    Reference: arXiv 1512.06293, section on tensor products of wavelets.
    """
    check_positive("scale", scale)
    h = torch.from_numpy(daubechies(moments)) / math.sqrt(2)
    n = torch.arange(len(h), dtype=torch.float64)
    grids = frequencies(size)
    low = torch.ones(sizes(size), dtype=torch.complex128)
    atoms = []
    for j in range(scale):
        pairs = []
        for omega in grids:
            phase = torch.exp(-1j * 2**j * omega.unsqueeze(-1) * n)
            pairs.append(((phase * h).sum(-1), (phase * (h.flip(0) * (-1) ** n)).sum(-1)))
        choices = list(itertools.product((0, 1), repeat=len(grids)))[1:]
        atoms += [low * math.prod(pair[c] for pair, c in zip(pairs, choice, strict=True)) for choice in choices]
        low = low * math.prod(pair[0] for pair in pairs)
    return torch.stack(atoms), low


@part(
    "frames",
    paper="scattering",
    kind="theory",
    keywords="tight frame wavelet Gabor Weyl-Heisenberg curvelet ridgelet shearlet Haar Daubechies filter bank",
)
def frame(family: str, size: Size, scale: int = 3, wedges: int = 8) -> tuple[Tensor, Tensor]:
    """A tight frame by name: its atoms and the one that is taken out to give the output, a low-pass.

    Args:
        family: "wavelet", "curvelet", "ridgelet", "shearlet" (two axes), "haar", "daubechies" (4 moments) or
            "weyl-heisenberg".
        size: length of the signals, or one for each axis.
        scale: octaves; of "weyl-heisenberg" the number of windows an axis.
        wedges: angular windows of the finest band, for the directional families.

    Shape:
        (atoms, \\*size) and (\\*size,) responses on the DFT grid.

    Raises:
        ValueError: unknown family, or an argument is out of range.

    Example:
        >>> atoms, low = frame("curvelet", (16, 16))
        >>> atoms.shape
        torch.Size([16, 16, 16])

    Reference: Wiatowski and Bölcskei, arXiv 1512.06293.
    """
    families = ("wavelet", "curvelet", "ridgelet", "shearlet", "haar", "daubechies", "weyl-heisenberg")
    check_choice("family", family, families)
    if family == "wavelet":
        return wavelet_frame(size, scale)
    if family == "weyl-heisenberg":
        windows = weyl_heisenberg_frame(size, scale)
        return windows[1:], windows[0]
    if family in ("haar", "daubechies"):
        return undecimated_frame(size, scale, 1 if family == "haar" else 4)
    check_positive("scale", scale)
    check_positive("wedges", wedges)
    counts = (ridgelet_wedges if family == "ridgelet" else curvelet_wedges)(scale, wedges)
    return directional_frame(sizes(size), counts, shear=family == "shearlet")
