"""Theory: kernels of wide networks."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from torchconv.bench.cases import Case, Place, case, installed
from torchconv.theory.ntk import myrtle, nngp_ntk


@case("nngp-ntk")
def kernels_of_networks(place: Place) -> Iterator[Case]:
    """The tangent kernel of Myrtle-5, against convolutions of all pairs of pixels and ``neural-tangents``."""
    for images, size in ((12, 8), (4, 16)):
        x = place.randn(images, 3, size, size)
        layers = myrtle(5, size)

        def ours(x: Tensor, layers: Any = layers) -> Tensor:
            return nngp_ntk(x, None, layers)[1]

        def eager(x: Tensor, size: int = size) -> Tensor:
            n = len(x)
            k = torch.einsum("nchw,mcij->nmhwij", x, x) / x.shape[1]
            theta = torch.zeros_like(k)
            blocks = (2, 1, 1)
            for block, count in enumerate(blocks):
                for _ in range(count):
                    k = _taps(k)
                    theta = _taps(theta) + k
                    pixels = torch.diagonal(k, dim1=0, dim2=1).permute(4, 0, 1, 2, 3)
                    side = pixels.shape[1]
                    flat = pixels.reshape(n, side * side, side * side).diagonal(dim1=1, dim2=2).reshape(n, side, side)
                    scale = (flat[:, None, :, :, None, None] * flat[None, :, None, None]).sqrt()
                    angle = torch.acos((k / scale).clamp(-1, 1))
                    k = scale / (2 * math.pi) * (angle.sin() + (math.pi - angle) * angle.cos())
                    theta = theta * (math.pi - angle) / (2 * math.pi)
                for _ in range(1 if block < 2 else int(math.log2(size)) - 2):
                    k, theta = _pool(k), _pool(theta)
            return (theta + k).flatten(2).mean(2)

        peers: dict[str, Callable[..., Tensor]] = {}
        if installed("neural_tangents"):
            peers["neural-tangents"] = _neural_tangents(size)
        yield Case(f"{images}×3×{size}² Myrtle-5", ours, (x,), eager, peers, backward=False, flops=0)


def _taps(k: Tensor) -> Tensor:
    """The mean over nine taps of both images at once."""
    h, w = k.shape[2:4]
    padded = F.pad(k, (1, 1) * 4)
    taps = [padded[:, :, i : i + h, j : j + w, i : i + h, j : j + w] for i in range(3) for j in range(3)]
    return torch.stack(taps).mean(0)


def _pool(k: Tensor) -> Tensor:
    n, m, h, w = k.shape[:4]
    return k.reshape(n, m, h // 2, 2, w // 2, 2, h // 2, 2, w // 2, 2).mean((3, 5, 7, 9))


def _neural_tangents(size: int) -> Callable[..., Tensor]:
    jax, stax = importlib.import_module("jax"), importlib.import_module("neural_tangents.stax")
    layers: list[Any] = []
    for block, count in enumerate((2, 1, 1)):
        layers += [stax.Conv(1, (3, 3), padding="SAME", W_std=1.0, b_std=0.0), stax.Relu()] * count
        layers += [stax.AvgPool((2, 2), strides=(2, 2))] * (1 if block < 2 else int(math.log2(size)) - 2)
    *_, kernel = stax.serial(*layers, stax.Flatten(), stax.Dense(1, W_std=1.0, b_std=0.0))
    compiled = jax.jit(lambda x: kernel(x, None, "ntk"))

    def peer(x: Tensor) -> Tensor:
        return torch.from_numpy(np.array(compiled(x.permute(0, 2, 3, 1).numpy())))

    return peer
