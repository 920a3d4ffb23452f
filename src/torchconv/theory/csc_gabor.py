"""Dictionaries of log-Gabor kernels, of one bandwidth of orientation or of many.

arXiv 2312.14685, whose kernels are those of the packages LogGabor and SLIP (Fischer et al. 2007, IJCV 75). In the
Fourier plane, f and θ_f radius and angle of a frequency:

    E(f) = (1/f) exp(−½ ln²(f/f₀)/B_f²) · exp(cos(θ_f − θ)/B_θ²) · retina(f)
    kernel = (Re F⁻¹(E e^{−iφ}) · mask), its median taken off, divided by its largest magnitude

A wide B_θ is an uncertain orientation. Kernels have peak 1, not norm 1. Numbers are float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchconv._common import check, check_choice, check_positive, require
from torchconv.catalog import part

WIDEST = math.pi / 6
_WIDTH = 0.07  # of the edge of the retina's band, in units of the highest frequency


def frequencies(size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Radius and angle of every frequency, zero in the middle; rows are the first axis of the angle."""
    rows, columns = ((torch.arange(n, dtype=torch.float64) - n // 2) / n for n in size)
    radius = (rows[:, None] ** 2 + columns**2).sqrt()
    radius[size[0] // 2, size[1] // 2] = 1e-6
    angle = torch.atan2(columns.expand(size), rows[:, None].expand(size))
    return radius, angle


def retina(size: tuple[int, int]) -> Tensor:
    """The band of frequencies that the kernels have: neither the mean nor the corners of the plane."""
    radius, _ = frequencies(size)
    edge = (1 - ((radius - 0.5) / (0.5 * _WIDTH)).exp()) * (radius < 0.5)
    return edge * (1 - (-0.5 * radius**2 / (0.5 / size[0]) ** 2).exp())


def mask(size: tuple[int, int]) -> Tensor:
    """A round window, zero at the border."""
    rows, columns = (torch.linspace(-1, 1, n, dtype=torch.float64) for n in size)
    radius = (rows[:, None] ** 2 + columns**2).sqrt()
    return (((math.pi * radius).cos() + 1) / 2 * (radius < 1)) ** (1 / 3)


def envelope(
    theta: float, b_theta: float, *, size: tuple[int, int] = (12, 12), sf_0: float = 0.4, b_sf: float = 0.4
) -> Tensor:
    """E on the plane of frequencies (zero in the middle), with the retina's band and a mean square of 2.

    Args:
        theta: orientation in radians.
        b_theta: bandwidth of orientation in radians.
        size: (h, w) of the kernel.
        sf_0: central frequency, in cycles a pixel.
        b_sf: bandwidth of frequency, as the standard deviation of its logarithm.
    """
    for name, value in (("b_theta", b_theta), ("sf_0", sf_0), ("b_sf", b_sf)):
        check(value > 0, name, value, "must be > 0")
    check(min(size) >= 2, "size", size, "needs at least 2 × 2 pixels")
    radius, angle = frequencies(size)
    radial = (-0.5 * ((radius / sf_0).log() / b_sf) ** 2).exp() / radius
    angular = (((angle - theta).cos() - 1) / b_theta**2).exp()  # the −1 goes with the scale
    (h, w), (rows, columns) = size, (radius * angle.cos(), radius * angle.sin())
    rows[h // 2, w // 2] = columns[h // 2, w // 2] = 0
    centre = torch.polar(torch.ones_like(radius), -2 * math.pi * (h // 2 * rows + w // 2 * columns))
    found = radial * angular * centre * retina(size)
    return found * math.sqrt(2) / found.abs().square().mean().sqrt()


def log_gabor(
    theta: float,
    b_theta: float,
    phase: float = 0.0,
    *,
    size: tuple[int, int] = (12, 12),
    sf_0: float = 0.4,
    b_sf: float = 0.4,
) -> Tensor:
    """One kernel (h, w).

    Arguments are those of :func:`envelope`, and ``phase`` in radians: 0 is even (a line), π/2 odd (an edge).

    Example:
        >>> kernel = log_gabor(0.0, 0.2, size=(12, 12))
        >>> tuple(kernel.shape), float(kernel.abs().max())
        ((12, 12), 1.0)
    """
    turned = envelope(theta, b_theta, size=size, sf_0=sf_0, b_sf=b_sf) * complex(math.cos(phase), -math.sin(phase))
    kernel = torch.fft.ifft2(torch.fft.ifftshift(turned)).real * mask(size)
    kernel = kernel - kernel.flatten().quantile(0.5)  # the mean of the two in the middle
    return kernel / kernel.abs().max()


KINDS = ("heterogeneous", "thin")


@part(
    "log-gabor-dictionary",
    paper="csc",
    kind="theory",
    keywords="log-Gabor filters orientation bandwidth heterogeneity dictionary primary visual cortex",
)
def log_gabor_dictionary(
    kind: str = "heterogeneous",
    *,
    size: tuple[int, int] = (12, 12),
    n_theta: int = 12,
    n_b_theta: int = 6,
    n_phase: int = 2,
    sf_0: float = 0.4,
    b_sf: float = 0.4,
) -> tuple[Tensor, Tensor]:
    """Kernels of all orientations, bandwidths and phases.

    Args:
        kind: "heterogeneous": bandwidths in equal steps up to π/6; "thin": all of π/15 (12°), ``n_b_theta`` must be 1.
        size: (h, w); even sizes, as the authors' grid of frequencies has a sample too many for odd ones.
        n_theta, n_b_theta, n_phase: how many of each.
        sf_0, b_sf: as in :func:`envelope`.

    Returns:
        Kernels (M, h, w) and their (θ, B_θ, φ) as (M, 3): θ outermost, then B_θ, then φ.

    Example:
        >>> kernels, parameters = log_gabor_dictionary(n_theta=4, n_b_theta=3)
        >>> tuple(kernels.shape), tuple(parameters.shape)
        ((24, 12, 12), (24, 3))
    """
    check_choice("kind", kind, KINDS)
    for name, value in (("n_theta", n_theta), ("n_b_theta", n_b_theta), ("n_phase", n_phase)):
        check_positive(name, value)
    check(kind != "thin" or n_b_theta == 1, "n_b_theta", n_b_theta, "a thin dictionary has one bandwidth: give 1")
    widths = [WIDEST / 2.5] if kind == "thin" else [WIDEST * i / n_b_theta for i in range(1, n_b_theta + 1)]
    parameters = [
        (i * math.pi / n_theta, width, j * math.pi / n_phase)
        for i in range(n_theta)
        for width in widths
        for j in range(n_phase)
    ]
    kernels = [log_gabor(*p, size=size, sf_0=sf_0, b_sf=b_sf) for p in parameters]
    return torch.stack(kernels), torch.tensor(parameters, dtype=torch.float64)


@dataclass(frozen=True)
class Fit:
    """The log-Gabor kernel nearest to a given one, up to its scale; ``r2`` is the share of variance explained."""

    theta: float
    b_theta: float
    phase: float
    sf_0: float
    b_sf: float
    r2: float


def fit_log_gabor(kernel: Tensor, *, widths: Sequence[float] = (5.0, 30.0)) -> Fit:
    """Find orientation, bandwidths, phase and frequency of a kernel, learned or measured, by least squares.

    Args:
        kernel: (h, w), not constant.
        widths: the least and the largest B_θ, in degrees.

    Example:
        >>> found = fit_log_gabor(log_gabor(0.6, 0.2, 0.4))
        >>> round(found.theta, 3), round(found.b_theta, 3), round(found.r2, 4)
        (0.6, 0.2, 1.0)
    """
    optimize = require("scipy.optimize", "compare")
    check(kernel.dim() == 2, "kernel", tuple(kernel.shape), "give one kernel (h, w)")
    target = kernel.detach().double().cpu()
    check(bool((target != target[0, 0]).any()), "kernel", "constant", "give one that is not constant")
    size, (low, high) = (target.shape[0], target.shape[1]), (math.radians(v) for v in widths)
    window, constant = mask(size), torch.ones(target.numel(), dtype=torch.float64)

    def solved(parameters: Any) -> tuple[Tensor, Tensor]:
        """Weights of the even kernel, the odd one and a constant, and what they leave."""
        theta, b_theta, sf_0, b_sf = parameters
        plane = torch.fft.ifftshift(envelope(theta, b_theta, size=size, sf_0=sf_0, b_sf=b_sf))
        both = torch.fft.ifft2(plane) * window
        basis = torch.stack([both.real.flatten(), both.imag.flatten(), constant], 1)
        weights = torch.linalg.lstsq(basis, target.flatten()[:, None]).solution
        return weights[:, 0], target.flatten() - (basis @ weights)[:, 0]

    starts = [(i * math.pi / 12, (low + high) / 2, f, 0.4) for i in range(12) for f in (0.15, 0.3, 0.45)]
    start = min(starts, key=lambda p: float(solved(p)[1].square().sum()))
    bounds = ([-math.pi, low, 0.02, 0.05], [2 * math.pi, high, 0.7, 2.0])
    found = optimize.least_squares(lambda p: solved(p)[1].numpy(), start, bounds=bounds, x_scale=[0.1, 0.1, 0.1, 0.1])
    weights, left = solved(found.x)
    theta, phase = float(found.x[0]), math.atan2(float(weights[1]), float(weights[0]))
    turns = math.floor(theta / math.pi)  # half a turn more is the conjugate: the same kernel with the phase mirrored
    theta, phase = theta - turns * math.pi, -phase if turns % 2 else phase
    r2 = abs(1 - float(left.var() / target.var()))
    return Fit(theta, float(found.x[1]), phase, float(found.x[2]), float(found.x[3]), r2)
