"""Wavelet scattering against one path after the other, and against kymatio."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from torchconv.bench.cases import Case, Place, case, installed
from torchconv.ops.scattering import Scattering1d, Scattering2d
from torchconv.theory._scattering_transform import crop_1d, reflect


def _kymatio(name: str, *arguments: Any) -> dict[str, Callable[..., Tensor]]:
    """Its module, where it can be imported: releases up to 0.3 need a SciPy before 1.17."""
    if not installed("kymatio"):
        return {}
    try:
        build = getattr(importlib.import_module("kymatio.torch"), name)
    except ImportError:
        return {}
    return {"kymatio": build(*arguments)}


@case("scattering2d")
def images(place: Place) -> Iterator[Case]:
    """Two orders, eight angles."""
    for batch, size, scale in ((8, 64, 3), (1, 256, 4), (32, 32, 2)):
        layer = place.put(Scattering2d(size, scale))
        bank, x = layer.bank, place.randn(batch, size, size)
        psi = [torch.from_numpy(bank.psi_level(r)).to(x) for r in range(scale)]
        phi = [torch.from_numpy(bank.phi_level(r)).to(x) for r in range(scale)]

        def eager(
            x: Tensor, bank: Any = bank, psi: Any = psi, phi: Any = phi, paths: Any = tuple(layer.paths)
        ) -> Tensor:
            u = x
            for axis, n, padded in zip((-2, -1), bank.size, bank.padded, strict=True):
                u = reflect(u, (padded - n) // 2, (padded - n + 1) // 2, axis)
            maps = {(): u}
            found = []
            for path in paths:
                level = path[-1][0] if path else 0
                if path:
                    before = path[-2][0] if len(path) > 1 else 0
                    spectrum = torch.fft.fft2(maps[path[:-1]]) * psi[before][path[-1]]
                    step = 1 << (level - before)
                    maps[path] = torch.fft.ifft2(spectrum)[..., ::step, ::step].abs()
                low = torch.fft.ifft2(torch.fft.fft2(maps[path]) * phi[level]).real
                step = 1 << (bank.scale - level)
                found.append(low[..., ::step, ::step][..., 1:-1, 1:-1])
            return torch.stack(found, 1)

        peers = _kymatio("Scattering2D", scale, (size, size))
        yield Case(f"{batch}×{size}² J={scale}", layer, (x,), eager, peers)


@case("scattering1d")
def signals(place: Place) -> Iterator[Case]:
    """Two orders, eight wavelets an octave."""
    for batch, length, scale in ((8, 8192, 6), (32, 1024, 5), (1, 65536, 8)):
        layer = place.put(Scattering1d(length, scale, q=8))
        bank, x = layer.bank, place.randn(batch, length)
        levels = range(bank.log2_stride + 1)
        tables = [[torch.from_numpy(bank.level(t, r)).to(x) for r in levels] for t in (bank.phi, bank.psi1, bank.psi2)]

        def eager(x: Tensor, bank: Any = bank, tables: Any = tables, paths: Any = tuple(layer.paths)) -> Tensor:
            phi, *psi = tables
            maps = {(): (reflect(x, bank.left, bank.padded - bank.left - bank.length, -1), 0)}
            found = []
            for path in paths:
                if path:
                    before, level = maps[path[:-1]]
                    wavelet = (bank.first, bank.second)[len(path) - 1][path[-1]]
                    after = max(level, min(wavelet.j, bank.log2_stride))
                    spectrum = torch.fft.fft(before) * psi[len(path) - 1][level][path[-1]]
                    maps[path] = torch.fft.ifft(spectrum)[..., :: 1 << (after - level)].abs(), after
                u, level = maps[path]
                low = torch.fft.ifft(torch.fft.fft(u) * phi[level]).real
                found.append(low[..., :: 1 << (bank.log2_stride - level)][..., crop_1d(bank)])
            return torch.stack(found, 1)

        peers = _kymatio("Scattering1D", scale, length, 8)
        yield Case(f"{batch}×{length} J={scale}", layer, (x,), eager, peers)
