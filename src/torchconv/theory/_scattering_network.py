"""Networks over frames: what a layer does to the spectra of its signals, and the constants that follow from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torchconv._common import check, check_choice, check_positive
from torchconv.catalog import part
from torchconv.theory._scattering_frames import frame

NORMS = ("none", "continuous")
CONSTANTS = ("tight", "paper")


def _modulus(z: Tensor) -> Tensor:
    """|z| as complex numbers; gradient 0 at 0."""
    return z.abs().to(z.dtype)


def _on_parts(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A real function applied to real and imaginary parts by themselves."""
    return lambda z: torch.view_as_complex(f(torch.view_as_real(z)))


# Function, smallest Lipschitz constant, and the paper's, which is safe.
NONLINEARITIES: dict[str, tuple[Callable[[Tensor], Tensor], float, float]] = {
    "modulus": (_modulus, 1.0, 1.0),
    "relu": (_on_parts(torch.relu), 1.0, 2.0),
    "tanh": (_on_parts(torch.tanh), 1.0, 2.0),
    "logsig": (_on_parts(lambda r: torch.sigmoid(r) - 0.5), 0.25, 0.5),
}


@dataclass(frozen=True)
class FrameLayer:
    """One layer: a frame, a non-linearity, a pooling.

    Attributes:
        atoms: responses ĝ_λ on the DFT grid, (K, \\*size), real or complex.
        output: response of the output-generating atom χ of this frame, (\\*size).
        nonlinearity: "modulus", or "relu", "tanh", "logsig" (logistic − 1/2) of real and imaginary part.
        step: S ≥ 1, every S-th sample is kept.
        pooling: response of the averaging filter before it, (\\*size); None keeps samples as they are.

    Raises:
        ValueError: shapes do not fit, or an argument is out of range.

    Example:
        >>> layer = FrameLayer(*frame("wavelet", 32), step=2)
        >>> layer.size, layer.out_size, [round(b, 9) for b in layer.bounds()]
        ((32,), (16,), [1.0, 1.0])
    """

    atoms: Tensor
    output: Tensor
    nonlinearity: str = "modulus"
    step: int = 1
    pooling: Tensor | None = None

    def __post_init__(self) -> None:
        check_choice("nonlinearity", self.nonlinearity, NONLINEARITIES)
        check_positive("step", self.step)
        shape = tuple(self.atoms.shape)
        check(len(shape) >= 2, "atoms.shape", shape, "must be (K, *size)")
        check(tuple(self.output.shape) == shape[1:], "output.shape", tuple(self.output.shape), f"must be {shape[1:]}")
        if self.pooling is not None:
            given = tuple(self.pooling.shape)
            check(given == shape[1:], "pooling.shape", given, f"must be {shape[1:]}")

    @classmethod
    def from_kernels(cls, kernels: Tensor, output: Tensor, pooling: Tensor | None = None, **options: Any) -> FrameLayer:
        """The layer of filters given in time or space, each of the size of the signals (K, \\*size)."""
        axes = tuple(range(-output.dim(), 0))
        average = None if pooling is None else torch.fft.fftn(pooling, dim=axes)
        return cls(torch.fft.fftn(kernels, dim=axes), torch.fft.fftn(output, dim=axes), pooling=average, **options)

    @property
    def size(self) -> tuple[int, ...]:
        """Of the signals that come in."""
        return tuple(self.atoms.shape[1:])

    @property
    def out_size(self) -> tuple[int, ...]:
        """Of the signals that go out."""
        return tuple(-(-n // self.step) for n in self.size)

    def bounds(self) -> tuple[float, float]:
        """The frame bounds A, B."""
        return frame_bounds(torch.cat([self.atoms, self.output[None]]))

    def lipschitz_constants(self, constants: str = "tight") -> tuple[float, float]:
        """L of the non-linearity and R of the pooling, the ℓ¹ norm of the averaging filter.

        Args:
            constants: "tight" takes the smallest L, "paper" the published ones (2 for ReLU and tanh, 1/2).
        """
        check_choice("constants", constants, CONSTANTS)
        _, tight, published = NONLINEARITIES[self.nonlinearity]
        if self.pooling is None:
            return (tight if constants == "tight" else published), 1.0
        kernel = torch.fft.ifftn(self.pooling, dim=tuple(range(self.pooling.dim())))
        return (tight if constants == "tight" else published), float(kernel.abs().sum())

    def admissibility(self, constants: str = "tight") -> float:
        """max(B, B·R²·L²); the layer is admissible where that is at most 1."""
        gain, pooled = self.lipschitz_constants(constants)
        return self.bounds()[1] * max(1.0, (gain * pooled) ** 2)


@part(
    "frame-scattering",
    paper="scattering",
    kind="theory",
    keywords="feature extractor frame Lipschitz admissible translation deformation energy invariance",
)
@dataclass(frozen=True)
class FrameNetwork:
    """A feature extractor: layers, and the atom that gives the output of the last one.

    Attributes:
        layers: from the input on; each one's size is the ``out_size`` of the one before.
        output: response of χ_N, (\\*size) after the last layer.

    Raises:
        ValueError: no layer, or sizes do not follow each other.

    Example:
        >>> net = frame_network("wavelet", (16, 16), depth=2, step=2)
        >>> features = net(torch.ones(5, 16, 16))
        >>> [tuple(f.shape) for f in features]
        [(5, 1, 16, 16), (5, 3, 8, 8), (5, 9, 4, 4)]
        >>> [round(a, 9) for a in net.admissibility()]
        [1.0, 1.0, 1.0]

    Reference: Wiatowski and Bölcskei, arXiv 1512.06293.
    """

    layers: tuple[FrameLayer, ...]
    output: Tensor

    def __post_init__(self) -> None:
        check(len(self.layers) > 0, "layers", (), "needs at least one layer")
        found = [*(layer.size for layer in self.layers), tuple(self.output.shape)]
        for layer, size in zip(self.layers, found[1:], strict=True):
            check(layer.out_size == size, "layers", size, f"the layer before gives signals of size {layer.out_size}")

    def __call__(self, x: Tensor, norm: str = "none") -> list[Tensor]:
        """Φ⁰(x), …, Φ^N(x).

        Args:
            x: (…, \\*size), real or complex, of the type and on the device of the responses.
            norm: "continuous" multiplies by S^{d/2} at every pooling; "none" keeps the guaranteed bounds.

        Shape:
            One tensor a layer, (…, paths, \\*size of the layer), paths in lexicographic order; complex.

        Raises:
            ValueError: the size is not that of the first layer, or ``norm`` is unknown.
        """
        check_choice("norm", norm, NORMS)
        size = self.layers[0].size
        axes = tuple(range(-len(size), 0))
        fits = tuple(x.shape[-len(size) :]) == size
        check(fits, "x.shape", tuple(x.shape), f"the last axes must be {size}")
        spectrum = torch.fft.fftn(x, dim=axes).unsqueeze(-len(size) - 1)
        features = []
        for layer in self.layers:
            features.append(torch.fft.ifftn(spectrum * layer.output, dim=axes))
            spectrum = propagate(spectrum, layer.atoms, layer.pooling, layer.nonlinearity, layer.step, norm)
        return [*features, torch.fft.ifftn(spectrum * self.output, dim=axes)]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> FrameNetwork:
        """The network on a device; complex responses get the complex type of the same precision."""
        check(dtype.is_floating_point, "dtype", dtype, "must be a real floating type")

        def move(t: Tensor) -> Tensor:
            return t.to(device, torch.promote_types(dtype, torch.complex32) if t.is_complex() else dtype)

        layers = tuple(
            replace(
                layer,
                atoms=move(layer.atoms),
                output=move(layer.output),
                pooling=None if layer.pooling is None else move(layer.pooling),
            )
            for layer in self.layers
        )
        return FrameNetwork(layers, move(self.output))

    def admissibility(self, constants: str = "tight") -> list[float]:
        """max(B, B·R²·L²) of every layer and of the last output atom; all at most 1: admissible."""
        last = frame_bounds(self.output[None])[1]
        return [*(layer.admissibility(constants) for layer in self.layers), last]

    def lipschitz(self, constants: str = "tight") -> float:
        """A constant c with |||Φ(f) − Φ(h)||| ≤ c·‖f − h‖ (``norm="none"``); 1 where the network is admissible.

        From the last layer backwards: ‖u∗χ‖² + c²·Σ_λ‖U[λ]u‖² ≤ B·max(1, c²·L²·R²)·‖u‖².
        """
        square = frame_bounds(self.output[None])[1]
        for layer in reversed(self.layers):
            gain, pooled = layer.lipschitz_constants(constants)
            square = layer.bounds()[1] * max(1.0, (gain * pooled) ** 2 * square)
        return math.sqrt(square)


def propagate(
    spectrum: Tensor,
    atoms: Tensor,
    pooling: Tensor | None,
    nonlinearity: str,
    step: int,
    norm: str = "none",
) -> Tensor:
    """Spectra of the paths that a layer adds, subsampled as early as the pooling allows.

    Shape:
        spectrum (…, paths, \\*size), atoms (K, \\*size), pooling (\\*size) → (…, paths·K, \\*out size).
    """
    size = atoms.shape[1:]
    axes = tuple(range(-len(size), 0))
    spectrum = spectrum.unsqueeze(-len(size) - 1) * atoms
    even = all(n % step == 0 for n in size)
    if pooling is None and even:
        spectrum = _fold(spectrum, step, len(axes))  # commutes with what is done point by point
    u = NONLINEARITIES[nonlinearity][0](torch.fft.ifftn(spectrum, dim=axes))
    if pooling is not None:
        spectrum = torch.fft.fftn(u, dim=axes) * pooling
        if even:
            spectrum = _fold(spectrum, step, len(axes))
        else:
            u = torch.fft.ifftn(spectrum, dim=axes)
    if not even:
        kept: tuple[Any, ...] = (..., *(slice(None, None, step) for _ in axes))
        u = u[kept]
    if pooling is None or not even:
        spectrum = torch.fft.fftn(u, dim=axes)
    if norm == "continuous":
        spectrum = spectrum * step ** (len(axes) / 2)
    return spectrum.flatten(-len(axes) - 2, -len(axes) - 1)


def _fold(spectrum: Tensor, step: int, ndim: int) -> Tensor:
    """Spectrum of every ``step``-th sample along the last axes."""
    for axis in range(-ndim, 0) if step > 1 else ():
        spectrum = spectrum.unflatten(axis, (step, -1)).mean(axis - 1)
    return spectrum


def energy(features: Sequence[Tensor]) -> Tensor:
    """Σ|·|² of the features of every layer: (layers,).

    Example:
        >>> energy([torch.ones(1, 2), torch.full((2, 2), 2j)])
        tensor([ 2., 16.])
    """
    return torch.stack([f.abs().square().sum() for f in features])


def frame_bounds(filters: Tensor, size: int | Sequence[int] | None = None) -> tuple[float, float]:
    """The largest A and the smallest B with A·‖f‖² ≤ Σ_λ ‖f ∗ g_λ‖² ≤ B·‖f‖² for periodic signals.

    Args:
        filters: responses on the DFT grid (K, \\*size); with ``size``, filters in time or space (K, \\*kernel).
        size: length of the signals, or one for each axis, at least the filters'.

    Returns:
        Minimum and maximum of Σ|ĝ_λ|² over the grid.

    Raises:
        ValueError: a filter is longer than the signals.

    Example:
        >>> frame_bounds(torch.tensor([[1.0, 2.0]]), 2)
        (1.0, 9.0)
    """
    check(filters.dim() >= 2, "filters.shape", tuple(filters.shape), "must be (K, *size)")
    if size is not None:
        shape = (size,) if isinstance(size, int) else tuple(size)
        given = tuple(filters.shape[1:])
        fits = len(shape) == len(given) and all(n >= k for n, k in zip(shape, given, strict=True))
        check(fits, "size", size, f"must have {len(given)} axes of at least the filters' {given}")
        filters = torch.fft.fftn(filters, s=shape, dim=tuple(range(1, filters.dim())))
    total = filters.abs().square().sum(0)
    return float(total.min()), float(total.max())


def make_admissible(network: FrameNetwork, constants: str = "tight") -> tuple[FrameNetwork, list[float]]:
    """Scale every frame by 1/√(B·max(1, R²L²)), so that the network is non-expansive.

    Args:
        network: any filters.
        constants: see :meth:`FrameLayer.lipschitz_constants`.

    Returns:
        The scaled network, and the factor of every layer and of the last output atom.

    Raises:
        ValueError: all filters of a layer are zero.

    Example:
        >>> loud = FrameLayer(3 * torch.ones(1, 8), torch.ones(8), step=2)
        >>> net, factors = make_admissible(FrameNetwork((loud,), torch.ones(4)))
        >>> [round(f, 4) for f in factors], [round(a, 4) for a in net.admissibility()]
        ([0.3162, 1.0], [1.0, 1.0])
    """
    values = network.admissibility(constants)
    for index, value in enumerate(values):
        check(value > 0, "network", f"layer {index}", "all its filters are zero, so that no factor helps")
    *factors, last = (1 / math.sqrt(value) for value in values)
    layers = tuple(
        replace(layer, atoms=factor * layer.atoms, output=factor * layer.output)
        for layer, factor in zip(network.layers, factors, strict=True)
    )
    return FrameNetwork(layers, last * network.output), [*factors, last]


def frame_network(
    family: str,
    size: int | Sequence[int],
    depth: int = 2,
    *,
    scale: int = 3,
    wedges: int = 8,
    nonlinearity: str = "modulus",
    step: int = 1,
    average: bool = False,
) -> FrameNetwork:
    """A network with a tight frame of one family in every layer; admissible.

    Args:
        family, scale, wedges: see :func:`frame`.
        size: length of the signals, or one for each axis.
        depth: layers ≥ 1.
        nonlinearity, step: of every layer, see :class:`FrameLayer`.
        average: average over blocks of ``step`` samples instead of keeping one of them.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> net = frame_network("weyl-heisenberg", 64, 3, scale=4, nonlinearity="relu", step=2, average=True)
        >>> [layer.size for layer in net.layers]
        [(64,), (32,), (16,)]
    """
    check_positive("depth", depth)
    check_positive("step", step)
    current = (size,) if isinstance(size, int) else tuple(size)
    layers = []
    for _ in range(depth):
        atoms, low = frame(family, current, scale, wedges)
        pooling = _block_average(current, step) if average else None
        layers.append(FrameLayer(atoms, low, nonlinearity, step, pooling))
        current = layers[-1].out_size
    return FrameNetwork(tuple(layers), frame(family, current, scale, wedges)[1])


def _block_average(size: Sequence[int], step: int) -> Tensor:
    kernel = torch.zeros(*size, dtype=torch.float64)
    block = tuple(min(step, n) for n in size)
    kernel[tuple(slice(n) for n in block)] = 1 / math.prod(block)
    return torch.fft.fftn(kernel)
