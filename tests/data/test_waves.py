"""The wave solvers against closed forms of their discrete schemes, matrices, stability limits and convergence."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from torchconv.data.waves import (
    elements,
    gaussian,
    grid,
    laplacian,
    leapfrog,
    newmark,
    ricker_source,
    stable_step,
    wave_energy,
    wave_trajectories,
)


def mode(n, p, q):
    x, y = grid(n)
    return np.sin(p * np.pi * x) * np.sin(q * np.pi * y)


@pytest.mark.parametrize(("p", "q", "c"), [(1, 1, 1.0), (3, 2, 1.4)])
def test_modes_of_finite_differences(p, q, c):
    n, dt, steps = 11, 0.03, 40
    h = 1 / (n + 1)
    rate = 4 * c**2 / h**2 * (np.sin(p * np.pi * h / 2) ** 2 + np.sin(q * np.pi * h / 2) ** 2)
    theta = 2 * np.arcsin(np.sqrt(rate * dt**2 / 4))
    u = leapfrog(mode(n, p, q), dt=dt, steps=steps, c=c)
    expected = np.cos(np.arange(steps + 1) * theta)[:, None, None] * mode(n, p, q)
    np.testing.assert_allclose(u, expected, atol=1e-11)


@pytest.mark.parametrize("mass", ["consistent", "lumped"])
def test_modes_and_energy_of_finite_elements(mass):
    n, dt, steps, p, q, c = 9, 0.11, 60, 2, 3, 1.2
    h = 1 / (n + 1)
    m = [h / 3 * (2 + np.cos(k * np.pi * h)) for k in (p, q)]
    k = [2 / h * (1 - np.cos(i * np.pi * h)) for i in (p, q)]
    rate = c**2 * (k[0] * m[1] + m[0] * k[1]) / (m[0] * m[1] if mass == "consistent" else h**2)
    theta = 2 * np.arctan(np.sqrt(rate * dt**2 / 4))
    u, v = newmark(mode(n, p, q), dt=dt, steps=steps, c=c, mass=mass)
    np.testing.assert_allclose(u, np.cos(np.arange(steps + 1) * theta)[:, None, None] * mode(n, p, q), atol=1e-11)
    u, v = newmark(gaussian(n, 0.4, 0.6, 0.1), gaussian(n, 0.3, 0.3, 0.2), dt=dt, steps=steps, c=c, mass=mass)
    energy = wave_energy(u, v, c, mass)
    np.testing.assert_allclose(energy, energy[0], rtol=1e-11)


def test_newmark_against_assembled_matrices():
    n, dt, c = 5, 0.2, 1.3
    h = 1 / (n + 1)
    line = np.eye(n, k=1) + np.eye(n, k=-1)
    m, k = h / 6 * (4 * np.eye(n) + line), (2 * np.eye(n) - line) / h
    mass, stiffness = np.kron(m, m), np.kron(k, m) + np.kron(m, k)
    basis = elements(n)
    x = np.random.default_rng(0).normal(size=(n, n))
    np.testing.assert_allclose(basis.to_modes(basis.mass * basis.to_modes(x)).ravel(), mass @ x.ravel(), atol=1e-12)
    source = ricker_source(n, 2.0, 0.2, 0.4, 0.6, 0.2)
    u, v = x.ravel(), np.zeros(n * n)
    a = np.linalg.solve(mass, mass @ source(0.0).ravel() - c**2 * stiffness @ u)
    found, speeds = newmark(x, dt=dt, steps=6, c=c, source=source, beta=0.3, gamma=0.6)
    for step in range(1, 7):
        predicted, v = u + dt * v + dt**2 * (0.5 - 0.3) * a, v + dt * (1 - 0.6) * a
        load = mass @ source(step * dt).ravel()
        a = np.linalg.solve(mass + 0.3 * dt**2 * c**2 * stiffness, load - c**2 * stiffness @ predicted)
        u, v = predicted + 0.3 * dt**2 * a, v + 0.6 * dt * a
        np.testing.assert_allclose(found[step].ravel(), u, atol=1e-11)
        np.testing.assert_allclose(speeds[step].ravel(), v, atol=1e-10)


@pytest.mark.parametrize("scheme", ["leapfrog", "consistent", "lumped"])
def test_stability_limits(scheme):
    n, c = 15, 1.5
    start = np.random.default_rng(0).normal(size=(n, n))
    last = []
    for factor in (0.98, 1.02):
        dt = factor * stable_step(n, c, scheme)
        if scheme == "leapfrog":
            u = leapfrog(start, dt=dt, steps=300, c=c)
        else:
            u, _ = newmark(start, dt=dt, steps=300, c=c, beta=0.0, mass=scheme)
        last.append(np.linalg.norm(u[-1]) / np.linalg.norm(start))
    assert last[0] < 20
    assert last[1] > 1e6


# With elements the errors of space and time cancel at Δt = h/2 for this mode.
@pytest.mark.parametrize(("solve", "cfl"), [(leapfrog, 0.5), (lambda *a, **k: newmark(*a, **k)[0], 1.0)])
def test_second_order(solve, cfl):
    errors = []
    for n in (7, 15, 31):
        dt, steps = cfl / (n + 1), n + 1
        u = solve(mode(n, 1, 1), dt=dt, steps=steps)[-1]
        errors.append(np.abs(u - np.cos(np.sqrt(2) * np.pi * steps * dt) * mode(n, 1, 1)).max())
    assert 3.5 < errors[0] / errors[1] < 4.5
    assert 3.5 < errors[1] / errors[2] < 4.5


def test_source_start_and_batches():
    n, dt = 8, 0.05
    source = ricker_source(n, 3.0, 0.1, 0.4, 0.6, 0.1)
    u = leapfrog(np.zeros((n, n)), dt=dt, steps=3, source=source)
    np.testing.assert_allclose(u[1], 0.5 * dt**2 * source(0.0))
    np.testing.assert_allclose(u[2], 2 * u[1] + dt**2 * (laplacian(u[1]) + source(dt)))
    np.testing.assert_allclose(source(0.1), gaussian(n, 0.4, 0.6, 0.1))
    pair = np.stack([gaussian(n, 0.3, 0.5, 0.1), gaussian(n, 0.6, 0.5, 0.1)])
    speed = np.where(grid(n)[0] < 0.5, 1.0, 1.3) * np.ones((n, n))
    both = leapfrog(pair, dt=dt, steps=5, c=speed)
    np.testing.assert_allclose(both[:, 1], leapfrog(pair[1], dt=dt, steps=5, c=speed))
    np.testing.assert_allclose(newmark(pair, dt=dt, steps=5)[0][:, 1], newmark(pair[1], dt=dt, steps=5)[0])


@pytest.mark.parametrize(("start", "scheme"), [("pulse", "leapfrog"), ("source", "newmark"), ("source", "leapfrog")])
def test_trajectories(start, scheme):
    first = wave_trajectories(3, 12, 6, start=start, scheme=scheme, seed=4)
    assert first.shape == (3, 6, 12, 12)
    assert first.dtype == torch.float32
    assert torch.isfinite(first).all()
    assert torch.equal(first, wave_trajectories(3, 12, 6, start=start, scheme=scheme, seed=4))
    assert not torch.equal(first[0], first[1])
    assert wave_trajectories(1, 8, 1).shape == (1, 1, 8, 8)


def test_refusals():
    with pytest.raises(ValueError, match="u0="):
        leapfrog(np.zeros((3, 4)), dt=0.1, steps=2)
    with pytest.raises(ValueError, match="steps="):
        newmark(np.zeros((3, 3)), dt=0.1, steps=0)
    with pytest.raises(ValueError, match="cfl="):
        wave_trajectories(1, cfl=0.8)
    with pytest.raises(ValueError, match="start="):
        wave_trajectories(1, start="bang")
    with pytest.raises(ValueError, match="c="):
        wave_trajectories(1, 8, scheme="newmark", c=np.ones((8, 8)))
    with pytest.raises(ValueError, match="c="):
        newmark(np.zeros((3, 3)), dt=0.1, steps=2, c=np.ones((3, 3)))
    with pytest.raises(ValueError, match="mass="):
        elements(4, "diagonal")
    with pytest.raises(ValueError, match="scheme="):
        stable_step(4, 1.0, "euler")
