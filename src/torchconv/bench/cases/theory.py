"""Theory: kernels of wide networks, sparse codes, learned Gram matrices."""

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
from torchconv.ops.dkm import GramLayer
from torchconv.theory.csc import cbpdn, constrained
from torchconv.theory.dkm import GramStructure
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


@case("cbpdn")
def sparse_codes(place: Place) -> Iterator[Case]:
    """Twenty iterations of ADMM, against the same written down plainly and SPORCO."""
    for kernels, size in ((72, 64), (24, 128)):
        dictionary, image = constrained(place.randn(kernels, 12, 12)), place.randn(size, size)

        def ours(dictionary: Tensor, image: Tensor) -> Tensor:
            return cbpdn(dictionary, image, 0.05, rho=3.0, auto_rho=None, max_iter=20, tol=0.0).maps

        def eager(dictionary: Tensor, image: Tensor) -> Tensor:
            rho, size = 3.0, tuple(image.shape)
            d = torch.fft.rfft2(dictionary, s=size)
            y = u = dictionary.new_zeros(len(dictionary), *size)
            for _ in range(20):
                b = d.conj() * torch.fft.rfft2(image) + rho * torch.fft.rfft2(y - u)
                inside = (d * b).sum(0) / ((d.conj() * d).sum(0) + rho)
                x = torch.fft.irfft2((b - d.conj() * inside) / rho, s=size)
                relaxed = 1.8 * x - 0.8 * y
                y = torch.sign(relaxed + u) * ((relaxed + u).abs() - 0.05 / rho).clamp(min=0)
                u = u + relaxed - y
            return y

        peers: dict[str, Callable[..., Tensor]] = {}
        if installed("sporco"):
            peers["sporco"] = _sporco
        yield Case(f"{kernels} kernels 12², {size}²", ours, (dictionary, image), eager, peers, backward=False, flops=0)


def _sporco(dictionary: Tensor, image: Tensor) -> Tensor:
    solver = importlib.import_module("sporco.admm.cbpdn").ConvBPDN
    options = {"MaxMainIter": 20, "RelStopTol": 0.0, "rho": 3.0, "AutoRho": {"Enabled": False}}
    problem = solver(dictionary.movedim(0, -1).numpy(), image.numpy(), 0.05, solver.Options(options))
    return torch.from_numpy(problem.solve().squeeze()).movedim(-1, 0)


@case("gram-layer")
def gram_matrices(place: Place) -> Iterator[Case]:
    """A learned Gram matrix and its term of the objective, against inverses and determinants as in the formulas."""
    for inducing, data in ((64, 1024), (256, 8192)):
        layer = place.put(GramLayer(inducing, 1.0))
        x, z = place.randn(data, 32), place.randn(inducing, 32)
        kernel = (x @ z.T / 32).exp(), (z @ z.T / 32).exp() + torch.eye(inducing).to(x), (x.square().sum(1) / 32).exp()
        layer(GramStructure(kernel[1], kernel[0], kernel[2], x.new_zeros(())))

        def ours(ti: Tensor, ii: Tensor, t: Tensor, layer: GramLayer = layer) -> Tensor:
            found = layer(GramStructure(ii, ti, t, t.new_zeros(())))
            return found.terms + found.ti.sum() + found.t.sum()

        def eager(ti: Tensor, ii: Tensor, t: Tensor, layer: GramLayer = layer) -> Tensor:
            gram, inverse = layer.V @ layer.V.T / len(ii) * layer.latent_Gscale.exp(), torch.linalg.inv(ii)
            a = ti @ inverse
            own = t + (a @ gram * a).sum(1) - (a * ti).sum(1)
            distance = (inverse @ gram).trace() + torch.logdet(ii) - torch.logdet(gram) - len(ii)
            return (a @ gram).sum() + own.sum() - distance / 2

        yield Case(f"P={inducing} N={data}", ours, kernel, eager, params=tuple(layer.parameters()), flops=0)


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
