"""Gram matrices of hierarchical kernels, block by block, against all patches at once and against neural-tangents."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchconv.bench.cases import Case, Place, case, installed
from torchconv.theory.widecnn import hierarchical_kernels, sphere_patches


@case("hierarchical-kernels")
def grams(place: Place) -> Iterator[Case]:
    """Tangent kernels of two sets of inputs; the eager form holds every node of every pair."""
    for n, sizes in ((256, (2, 2, 2)), (1024, (2, 2, 2, 2, 2)), (1024, (4, 4, 4))):
        count = math.prod(sizes[1:])
        x, y = (sphere_patches(n, count, sizes[0]).to(place.device, place.dtype) for _ in range(2))

        def ours(x: Tensor, y: Tensor, sizes: Any = sizes) -> Tensor:
            return hierarchical_kernels(x, y, sizes).ntk

        def eager(x: Tensor, y: Tensor, sizes: Any = sizes) -> Tensor:
            r = torch.einsum("npe,mpe->pnm", x.unflatten(1, (-1, sizes[0])), y.unflatten(1, (-1, sizes[0])))
            t = r
            for size in (1, *sizes[1:]):
                r, t = (v.unflatten(0, (-1, size)).mean(1) for v in (r, t))
                r = r.clamp(-1, 1)
                angle = math.pi - r.acos()
                bent = (r * angle + (1 - r * r).sqrt()) / math.pi
                r, t = bent, bent + t * angle / math.pi
            return t.mean(0)

        peers: dict[str, Callable[..., Tensor]] = {}
        if installed("neural_tangents"):
            peers["neural-tangents"] = _neural_tangents(sizes)
        label = f"{n}² d={count * sizes[0]} filters {','.join(map(str, sizes))}"
        yield Case(label, ours, (x, y), eager, peers, backward=False)


def _neural_tangents(sizes: tuple[int, ...]) -> Callable[..., Tensor]:
    """Strided convolutions without overlap; it wants the patches' norm to be the root of their size."""
    stax = importlib.import_module("neural_tangents").stax
    layers = []
    for size in sizes:
        layers += [stax.Conv(1, (size,), (size,), "VALID", W_std=math.sqrt(2), b_std=0.0), stax.Relu()]
    kernel = stax.serial(*layers, stax.Flatten(), stax.Dense(1, W_std=1.0, b_std=0.0))[2]

    def theirs(x: Tensor, y: Tensor) -> Tensor:
        pair = [v.cpu().numpy()[..., None] * math.sqrt(sizes[0]) for v in (x, y)]
        return torch.from_numpy(np.array(kernel(*pair, "ntk"))).to(x)

    return theirs
