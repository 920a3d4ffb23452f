"""How far deformed and shifted signals are from the original, measured and bounded."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchconv._common import check


def deform(f: Tensor, tau: Tensor, omega: Tensor | None = None) -> Tensor:
    """F f(x) = e^{2πi·ω(x)} · f(x − τ(x)) on a periodic grid, by linear interpolation.

    Args:
        f: (…, \\*size).
        tau: displacements in samples, (d, \\*size), one for each axis.
        omega: phase in turns, (\\*size); None leaves it out.

    Shape:
        (…, \\*size); complex where ``omega`` is given.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> deform(torch.tensor([1.0, 2, 3, 4]), torch.full((1, 4), 0.5))
        tensor([2.5000, 1.5000, 2.5000, 3.5000])
    """
    size = tuple(tau.shape[1:])
    fits = tau.dim() == tau.shape[0] + 1 and tuple(f.shape[-len(size) :]) == size
    check(fits, "tau.shape", tuple(tau.shape), "must be (d, *size) for signals with d axes, (…, *size)")
    weights, places = [], []
    for axis, n in enumerate(size):
        view = [1] * len(size)
        view[axis] = n
        at = torch.arange(n, device=tau.device, dtype=tau.dtype).view(view) - tau[axis]
        low = at.floor()
        weights.append((1 - (at - low), at - low))
        places.append((low.long() % n, (low.long() + 1) % n))
    moved = torch.zeros_like(f)
    for corner in itertools.product((0, 1), repeat=len(size)):
        weight = math.prod(w[c] for w, c in zip(weights, corner, strict=True))
        at_corner: tuple[Any, ...] = (..., *(p[c] for p, c in zip(places, corner, strict=True)))
        moved = moved + weight * f[at_corner]
    if omega is None:
        return moved
    check(tuple(omega.shape) == size, "omega.shape", tuple(omega.shape), f"must be {size}")
    return moved * torch.exp(2j * math.pi * omega)


def deformation_gap(f: Tensor, tau: Tensor, omega: Tensor | None = None) -> float:
    """‖F f − f‖ / ‖f‖: by how much at most the features of an admissible network change, relative to ‖f‖.

    Arguments as of :func:`deform`.

    Example:
        >>> deformation_gap(torch.ones(8), torch.rand(1, 8))
        0.0
    """
    return float(torch.linalg.vector_norm(deform(f, tau, omega) - f) / torch.linalg.vector_norm(f))


def deformation_bound(bandwidth: float, displacement: float, jacobian: float, ndim: int, phase: float = 0.0) -> float:
    """A bound of ‖F f − f‖ / ‖f‖ for band-limited f: 2√2·π·(bandwidth·‖τ‖_∞ + ‖ω‖_∞).

    f(x) − f(x − τ(x)) is the integral of ∇f(x − sτ(x))·τ(x) over s in [0, 1], ‖∇f‖ ≤ 2π·bandwidth·‖f‖, and x − sτ(x)
    has a Jacobian of at least 1 − d·‖Dτ‖_∞ ≥ 1/2. Features of an admissible network change by no more.

    Args:
        bandwidth: largest frequency |ω| of f, in cycles per unit of length.
        displacement: ‖τ‖_∞, in the same unit.
        jacobian: ‖Dτ‖_∞, the largest derivative of a component of τ; at most 1/(2·ndim).
        ndim: d.
        phase: ‖ω‖_∞ of the modulation, in turns.

    Raises:
        ValueError: the displacement varies too fast for the theorem.

    Example:
        >>> round(deformation_bound(0.1, 0.5, 0.2, ndim=1), 4)
        0.4443

    Reference: arXiv 1512.06293, theorem on deformations of band-limited functions.
    """
    check(jacobian <= 1 / (2 * ndim), "jacobian", jacobian, f"the theorem needs at most 1/(2d) = {1 / (2 * ndim)}")
    return 2 * math.sqrt(2) * math.pi * (bandwidth * displacement + phase)


def decay_constant(output: Tensor) -> float:
    """K = max |χ̂(ω)|·|ω| over the DFT grid, ω in cycles per sample: small for atoms that average over many samples.

    Args:
        output: response of an output-generating atom, (\\*size).

    Example:
        >>> decay_constant(torch.tensor([1.0, 0.0, 0.0, 0.0]))
        0.0
    """
    axes = [torch.fft.fftfreq(n, dtype=torch.float64, device=output.device) for n in output.shape]
    radius = torch.stack(torch.meshgrid(*axes, indexing="ij")).square().sum(0).sqrt()
    return float((output.abs() * radius).max())


def translation_bound(steps: Sequence[int], shift: float, decay: float) -> float:
    """A bound of |||Φ^n(T_t f) − Φ^n(f)||| / ‖f‖ of an admissible network: 2π·|t|·K / (S_1·…·S_n).

    For continuous signals; on a grid for shifts by multiples of S_1·…·S_n, which every subsampling follows.

    Args:
        steps: pooling factors S_1, …, S_n up to the layer.
        shift: |t|, in samples of the input.
        decay: K of χ_n, in cycles per sample of its layer; see :func:`decay_constant`.

    Example:
        >>> round(translation_bound((2, 2), 1.0, 0.1), 4)
        0.1571

    Reference: arXiv 1512.06293, theorem on vertical translation invariance.
    """
    return 2 * math.pi * abs(shift) * decay / math.prod(steps)
