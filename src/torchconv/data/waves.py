"""Solutions of the wave equation on the unit square: the data of wave simulators.

∂²u/∂t² = c² Δu + f, u = 0 on the boundary, on N × N interior nodes x_i = (i + 1)·h, h = 1/(N + 1); rows are x. Schemes:

- :func:`leapfrog`: five-point differences, u^{n+1} = 2u^n − u^{n−1} + Δt²(c² L u^n + f^n); stable for c·Δt ≤ h/√2;
- :func:`newmark`: bilinear finite elements, M ü + c² K u = M f, Newmark's β and γ. M and K have the sine functions as
  eigenvectors on this grid, so that every step is a division: exact, without a linear solver.

Everything is computed in float64. Boukraichi et al. 2023, arXiv 2304.04964, trains networks on such fields.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from torchconv._common import check, check_choice, check_positive

Array = NDArray[np.float64]
Source = Callable[[float], Array]


def grid(n: int) -> tuple[Array, Array]:
    """Coordinates x (n, 1) and y (1, n) of the interior nodes.

    Example:
        >>> grid(3)[1]
        array([[0.25, 0.5 , 0.75]])
    """
    check_positive("n", n)
    nodes = np.arange(1, n + 1) / (n + 1)
    return nodes[:, None], nodes[None, :]


def gaussian(n: int, x0: float, y0: float, sigma: float) -> Array:
    """exp(−((x − x0)² + (y − y0)²) / 2σ²) on the nodes."""
    x, y = grid(n)
    pulse: Array = np.exp(-((x - x0) ** 2 + (y - y0) ** 2) / (2 * sigma**2))
    return pulse


def ricker_source(n: int, f0: float, t0: float, x0: float, y0: float, sigma: float) -> Source:
    """A Ricker wavelet of peak 1 at ``t0`` on a Gaussian: f(t) = (1 − 2r)·e^{−r}, r = (π f0 (t − t0))²."""
    shape = gaussian(n, x0, y0, sigma)

    def source(t: float) -> Array:
        r = (np.pi * f0 * (t - t0)) ** 2
        return (1 - 2 * r) * np.exp(-r) * shape

    return source


def laplacian(u: ArrayLike) -> Array:
    """Five-point Laplacian over the last two axes, zeros outside."""
    u = np.asarray(u, dtype=np.float64)
    padded = np.pad(u, [(0, 0)] * (u.ndim - 2) + [(1, 1), (1, 1)])
    near = padded[..., 2:, 1:-1] + padded[..., :-2, 1:-1] + padded[..., 1:-1, 2:] + padded[..., 1:-1, :-2]
    result: Array = (near - 4 * u) * (u.shape[-1] + 1) ** 2
    return result


def stable_step(n: int, c: float = 1.0, scheme: str = "leapfrog") -> float:
    """The largest stable Δt of an explicit scheme at speed ``c``.

    Args:
        n: nodes a side.
        c: greatest speed.
        scheme: "leapfrog", h/(c√2); "consistent" or "lumped", central differences (β = 0) with finite elements:
            h/(c√6) and h/c.

    Raises:
        ValueError: an unknown scheme.
    """
    factors = {"leapfrog": 2**-0.5, "consistent": 6**-0.5, "lumped": 1.0}
    check_choice("scheme", scheme, factors)
    return factors[scheme] / ((n + 1) * c)


def _start(u0: ArrayLike, v0: ArrayLike | None) -> tuple[Array, Array]:
    u = np.asarray(u0, dtype=np.float64)
    square = u.ndim >= 2 and u.shape[-1] == u.shape[-2]
    check(square, "u0", u.shape, "expected fields (…, N, N)")
    return u, np.zeros_like(u) if v0 is None else np.broadcast_to(np.asarray(v0, dtype=np.float64), u.shape)


def leapfrog(
    u0: ArrayLike,
    v0: ArrayLike | None = None,
    *,
    dt: float,
    steps: int,
    c: ArrayLike = 1.0,
    source: Source | None = None,
) -> Array:
    """Five-point finite differences in space, leap-frog in time.

    u^1 = u^0 + Δt v_0 + ½Δt²(c² L u^0 + f^0).

    Args:
        u0, v0: (…, N, N) field and its velocity at the start; no velocity is 0.
        dt, steps: Δt and the number of steps. Above :func:`stable_step` the solution blows up; that is not refused.
        c: speed, a number or a field (N, N).
        source: f(t) as a field.

    Returns:
        (steps + 1, …, N, N): u^0 to u^steps.

    Example:
        >>> leapfrog(gaussian(8, 0.5, 0.5, 0.1), dt=0.05, steps=3).shape
        (4, 8, 8)
    """
    check_positive("steps", steps)
    u, v = _start(u0, v0)
    squared = np.asarray(c, dtype=np.float64) ** 2

    def acceleration(u: Array, n: int) -> Array:
        a: Array = squared * laplacian(u)
        return a if source is None else a + source(n * dt)

    fields = np.empty((steps + 1, *u.shape))
    fields[0] = u
    fields[1] = u + dt * v + 0.5 * dt**2 * acceleration(u, 0)
    for n in range(1, steps):
        fields[n + 1] = 2 * fields[n] - fields[n - 1] + dt**2 * acceleration(fields[n], n)
    return fields


@dataclass(frozen=True)
class Elements:
    """Bilinear elements on an N × N grid in their eigenvectors: M = S·diag(mass)·S, K = S·diag(stiffness)·S.

    Attributes:
        sines: S = √(2h)·sin(π p x_i), symmetric and orthogonal.
        mass, stiffness: (N, N) eigenvalues.
    """

    sines: Array
    mass: Array
    stiffness: Array

    def to_modes(self, u: Array) -> Array:
        """Fields to coefficients; the same map leads back."""
        modes: Array = self.sines @ u @ self.sines
        return modes


def elements(n: int, mass: str = "consistent") -> Elements:
    """Mass and stiffness of bilinear elements; "lumped" makes the mass h² times the identity."""
    check_positive("n", n)
    check_choice("mass", mass, ("consistent", "lumped"))
    h = 1 / (n + 1)
    p = np.arange(1, n + 1)
    sines = np.sqrt(2 * h) * np.sin(np.pi * h * np.outer(p, p))
    m, k = h / 3 * (2 + np.cos(np.pi * h * p)), 2 / h * (1 - np.cos(np.pi * h * p))
    stiffness = np.outer(k, m) + np.outer(m, k)
    return Elements(sines, np.outer(m, m) if mass == "consistent" else np.full((n, n), h**2), stiffness)


def newmark(
    u0: ArrayLike,
    v0: ArrayLike | None = None,
    *,
    dt: float,
    steps: int,
    c: float = 1.0,
    source: Source | None = None,
    beta: float = 0.25,
    gamma: float = 0.5,
    mass: str = "consistent",
) -> tuple[Array, Array]:
    """Bilinear finite elements in space, Newmark in time; the defaults are stable at any Δt and conserve energy.

    Args:
        u0, v0, dt, steps, source: as in :func:`leapfrog`; the load is M f.
        c: speed, a number.
        beta, gamma: Newmark's; 0 and ½ are central differences, stable up to :func:`stable_step`.
        mass: "consistent" or "lumped".

    Returns:
        u and its velocity, each (steps + 1, …, N, N).

    Example:
        >>> u, v = newmark(gaussian(8, 0.5, 0.5, 0.1), dt=0.1, steps=10)
        >>> energies = wave_energy(u, v)
        >>> bool(abs(energies - energies[0]).max() < 1e-12)
        True
    """
    check_positive("steps", steps)
    check(np.ndim(c) == 0, "c", np.shape(c), "finite elements take one speed; use leapfrog for a field")
    u, v = _start(u0, v0)
    basis = elements(u.shape[-1], mass)
    ratio = c**2 * basis.stiffness / basis.mass

    def load(n: int) -> Array | float:
        return 0.0 if source is None else basis.to_modes(source(n * dt))

    us, vs = np.empty((steps + 1, *u.shape)), np.empty((steps + 1, *u.shape))
    us[0], vs[0] = basis.to_modes(u), basis.to_modes(v)
    a = load(0) - ratio * us[0]
    for n in range(steps):
        predicted = us[n] + dt * vs[n] + dt**2 * (0.5 - beta) * a
        velocity = vs[n] + dt * (1 - gamma) * a
        a = (load(n + 1) - ratio * predicted) / (1 + beta * dt**2 * ratio)
        us[n + 1], vs[n + 1] = predicted + beta * dt**2 * a, velocity + gamma * dt * a
    us, vs = basis.to_modes(us), basis.to_modes(vs)
    us[0], vs[0] = u, v
    return us, vs


def wave_energy(u: Array, v: Array, c: float = 1.0, mass: str = "consistent") -> Array:
    """½ vᵀMv + ½c² uᵀKu of fields (…, N, N) with the matrices of :func:`elements`."""
    basis = elements(u.shape[-1], mass)
    kinetic = (basis.mass * basis.to_modes(v) ** 2).sum((-2, -1))
    potential = (basis.stiffness * basis.to_modes(u) ** 2).sum((-2, -1))
    energy: Array = 0.5 * kinetic + 0.5 * c**2 * potential
    return energy


def wave_trajectories(
    count: int,
    n: int = 64,
    frames: int = 100,
    every: int = 4,
    *,
    c: ArrayLike = 1.0,
    cfl: float = 0.5,
    start: str = "pulse",
    scheme: str = "leapfrog",
    seed: int = 0,
) -> Any:
    """Trajectories of random waves; split them by trajectory, since neighbouring frames are nearly equal.

    Args:
        count: trajectories.
        n: nodes a side.
        frames: stored fields of each, the first at t = 0, ``every`` steps apart.
        c: speed, a number or, for "leapfrog", a field (n, n).
        cfl: Δt = cfl·h/max(c).
        start: "pulse", a Gaussian of random centre in (0.2, 0.8)² and width in (0.03, 0.08) released at rest; "source",
            from rest, driven by a Ricker wavelet of frequency 5 at such a place.
        scheme: "leapfrog" or "newmark"; their phases differ, so do not mix them.
        seed: of the random numbers.

    Returns:
        float32 tensor (count, frames, n, n), computed in float64.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> wave_trajectories(2, n=16, frames=5).shape
        torch.Size([2, 5, 16, 16])

    Reference: the data of arXiv 2304.04964 are of this kind; this recipe is ours.
    """
    import torch

    for name, value in (("count", count), ("n", n), ("frames", frames), ("every", every)):
        check_positive(name, value)
    check_choice("start", start, ("pulse", "source"))
    check_choice("scheme", scheme, ("leapfrog", "newmark"))
    speed = float(np.max(c))
    limit = 2**-0.5
    check(scheme == "newmark" or 0 < cfl <= limit, "cfl", cfl, f"leap-frog is stable up to {limit:.4f}")
    check(scheme == "leapfrog" or np.ndim(c) == 0, "c", np.shape(c), "finite elements take one speed; use 'leapfrog'")
    draw = np.random.default_rng(seed)
    dt, steps = cfl / ((n + 1) * speed), max(1, (frames - 1) * every)
    found = []
    for _ in range(count):
        x0, y0, sigma = *draw.uniform(0.2, 0.8, 2), draw.uniform(0.03, 0.08)
        pulse = start == "pulse"
        u0 = gaussian(n, x0, y0, sigma) if pulse else np.zeros((n, n))
        source = None if pulse else ricker_source(n, 5.0, 0.2, x0, y0, sigma)
        if scheme == "leapfrog":
            u = leapfrog(u0, dt=dt, steps=steps, c=c, source=source)
        else:
            u, _ = newmark(u0, dt=dt, steps=steps, c=speed, source=source)
        found.append(u[: (frames - 1) * every + 1 : every])
    return torch.from_numpy(np.stack(found).astype(np.float32))
