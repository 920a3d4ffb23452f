"""Eigenvalues of the kernels on spheres and on the torus, and the exponents that follow from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from torchconv._common import check, check_choice, check_positive

SMOOTHNESS = {"rfk": 1.5, "ntk": 0.5}
"""ν: eigenvalues fall as |k|^(−2ν − dimension)."""


def kappas(angle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """κ₁ and κ₀ at the cosine of an angle in [0, π]."""
    return (np.cos(angle) * (math.pi - angle) + np.sin(angle)) / math.pi, (math.pi - angle) / math.pi


def _shape(kernel: str | Callable[[np.ndarray], np.ndarray], angle: np.ndarray) -> np.ndarray:
    if callable(kernel):
        return np.asarray(kernel(np.cos(angle)))
    check_choice("kernel", kernel, SMOOTHNESS)
    k1, k0 = kappas(angle)
    return k1 if kernel == "rfk" else k1 + np.cos(angle) * k0


def degeneracy(s: int, k: int) -> int:
    """Spherical harmonics of degree ``k`` in ``s`` dimensions.

    Example:
        >>> [degeneracy(3, k) for k in range(4)]
        [1, 3, 5, 7]
    """
    check(isinstance(s, int) and s >= 2, "s", s, "the sphere needs at least 2 dimensions")
    check_positive("k", k, zero=True)
    return 1 if k == 0 else (2 * k + s - 2) * math.comb(k + s - 3, k - 1) // k


def funk_hecke(kernel: str | Callable[[np.ndarray], np.ndarray], s: int, kmax: int) -> np.ndarray:
    """Eigenvalues μ_0, …, μ_kmax of a kernel f(u·v) on the sphere in ``s`` dimensions, uniform measure.

    μ_k = c_s · ∫_0^π f(cos a)·P_k(cos a)·sin^{s−2}a da; Σ_k degeneracy·μ_k = f(1). For one hidden layer odd k ≥ 3
    vanish. In the angle the integrand is smooth, so that Gauss–Legendre nodes give it to round-off.

    Args:
        kernel: "rfk" (κ₁), "ntk" (κ₁ + tκ₀), or a function of the cosine.
        s: entries of a patch, ≥ 2.
        kmax: largest degree.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> funk_hecke("ntk", 3, 1).round(12).tolist()
        [0.5, 0.333333333333]

    Reference: arXiv 2208.01003, appendix on spherical harmonics.
    """
    check(isinstance(s, int) and s >= 2, "s", s, "the sphere needs at least 2 dimensions")
    check_positive("kmax", kmax, zero=True)
    nodes, weights = np.polynomial.legendre.leggauss(kmax + s + 64)
    angle = math.pi / 2 * (nodes + 1)
    t = np.cos(angle)
    constant = math.exp(math.lgamma(s / 2) - math.lgamma((s - 1) / 2)) / math.sqrt(math.pi)
    measure = constant * math.pi / 2 * weights * np.sin(angle) ** (s - 2) * _shape(kernel, angle)
    before, now = np.zeros_like(t), np.ones_like(t)
    values = []
    for k in range(kmax + 1):
        values.append(float((measure * now).sum()))
        before, now = now, t if k == 0 else ((2 * k + s - 2) * t * now - k * before) / (k + s - 2)
    return np.array(values)


def torus_spectrum(filter_sizes: Sequence[int] = (2, 2), grid: int = 1024, keep: int = 9) -> dict[str, np.ndarray]:
    """Fourier coefficients of the kernels where patches are points of a circle, s_1 = 2.

    Args:
        filter_sizes: 2, s_2, …, s_L; all patches of one output, Π s_l for l ≥ 2.
        grid: angles an axis; aliasing falls with it, grid^patches numbers are held.
        keep: coefficients kept an axis, from 0.

    Returns:
        "rfk" and "ntk", each (keep, …, keep), one axis a patch.

    Raises:
        ValueError: the first size is not 2, or the grid is too small or too large.

    Example:
        >>> torus_spectrum((2, 2), 64, 3)["rfk"].shape
        (3, 3)

    Reference: arXiv 2208.01003, section on the spectrum.
    """
    check(len(filter_sizes) > 0 and filter_sizes[0] == 2, "filter_sizes", tuple(filter_sizes), "must begin with 2")
    for s in filter_sizes:
        check_positive("filter_sizes", s)
    check_positive("keep", keep)
    patches = math.prod(filter_sizes[1:])
    check(isinstance(grid, int) and grid >= 2 * keep, "grid", grid, f"must be at least twice keep={keep}")
    check(grid**patches <= 1 << 25, "grid", grid, f"{grid}^{patches} numbers are too many; at most 2^25")
    angle = 2 * math.pi * np.arange(grid) / grid
    angle = np.minimum(angle, 2 * math.pi - angle)
    k1, k0 = kappas(angle)
    views = [[-1 if a == axis else 1 for a in range(patches)] for axis in range(patches)]
    r = [k1.reshape(view) for view in views]
    n = [(k1 + np.cos(angle) * k0).reshape(view) for view in views]
    for size in filter_sizes[1:]:
        means = [[sum(t[i : i + size]) / size for i in range(0, len(t), size)] for t in (r, n)]
        bent = [kappas(np.arccos(np.clip(m, -1, 1))) for m in means[0]]
        r = [one for one, _ in bent]
        n = [one + mean * zero for (one, zero), mean in zip(bent, means[1], strict=True)]
    corner = (slice(keep),) * patches
    return {name: np.fft.rfftn(t[0]).real[corner] / grid**patches for name, t in (("rfk", r), ("ntk", n))}


def effective_dimension(filter_sizes: Sequence[int], level: int | None = None) -> int:
    """(s_1 − 1)·s_2·…·s_l: the angles in a patch of the ``level``-th layer; unset is the last one.

    Example:
        >>> [effective_dimension((3, 2, 2), level) for level in (1, 2, 3)]
        [2, 4, 8]
    """
    last = len(filter_sizes) if level is None else level
    check(1 <= last <= len(filter_sizes), "level", level, f"layers are 1 to {len(filter_sizes)}")
    return (filter_sizes[0] - 1) * math.prod(filter_sizes[1:last])


def _smoothness(kernel: str) -> float:
    check_choice("kernel", kernel, SMOOTHNESS)
    return SMOOTHNESS[kernel]


def sector_exponent(filter_sizes: Sequence[int], level: int, kernel: str = "ntk") -> float:
    """How the eigenvalues of functions of one ``level``-th layer patch fall with the degree: |k|^(−2ν − d_eff).

    Example:
        >>> sector_exponent((2, 2), 1), sector_exponent((2, 2), 2)
        (2.0, 3.0)
    """
    return 2 * _smoothness(kernel) + effective_dimension(filter_sizes, level)


def capacity(filter_sizes: Sequence[int], kernel: str = "ntk", level: int | None = None) -> float:
    """α of the ranked eigenvalues ρ^−α: 1 + 2ν/d_eff.

    Example:
        >>> capacity((2, 2, 2))
        1.25
    """
    return 1 + 2 * _smoothness(kernel) / effective_dimension(filter_sizes, level)


def learning_exponent(
    filter_sizes: Sequence[int], level: int, smoothness: float, kernel: str = "ntk", ridgeless: bool = False
) -> float:
    """β of the test error n^−β for a target on one ``level``-th layer patch.

    With source r = 2m/(2ν + d_eff(l)) and capacity α = 1 + 2ν/d_eff(L): β = αr/(αr + 1) at the best ridge, an upper
    bound of the error; without ridge the spectral estimate β = αr.

    Args:
        filter_sizes, kernel: of the student.
        level: of the patch on which the target depends.
        smoothness: m, the target has m/2 bounded Laplacians; a Gaussian field with a kernel's covariance has that
            kernel's ν, "ntk" ½, "rfk" 3/2.
        ridgeless: the estimate instead of the bound.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> learning_exponent((2, 2, 2), 3, 0.5, ridgeless=True), learning_exponent((2, 2, 2), 1, 0.5, ridgeless=True)
        (0.25, 0.625)

    Reference: arXiv 2208.01003, theorem on the generalisation error.
    """
    check(smoothness > 0, "smoothness", smoothness, "must be positive")
    source = 2 * smoothness / sector_exponent(filter_sizes, level, kernel)
    product = capacity(filter_sizes, kernel) * source
    return product if ridgeless else product / (product + 1)
