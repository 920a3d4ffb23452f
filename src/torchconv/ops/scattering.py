"""Wavelet scattering as a fixed feature extractor, in one and two dimensions.

Bruna, Mallat 2012, "Invariant Scattering Convolution Networks", arXiv 1203.1513; the theory of such extractors with any
frames, non-linearities and poolings: Wiatowski, Bölcskei 2015, arXiv 1512.06293 (:mod:`torchconv.theory.scattering`).

Morlet wavelets ψ, modulus, and a Gaussian φ as wide as the largest wavelet, at every 2^J-th sample:

    S₀ = x∗φ,    S₁[a] = |x∗ψ_a|∗φ,    S₂[a, b] = ||x∗ψ_a|∗ψ_b|∗φ,  b of lower frequency than a

Nothing is learned. Coefficients hardly change under shifts of less than 2^J samples and small deformations, and keep
what a plain average of that width loses, so that a linear classifier on them needs few labels. Numbers are kymatio's.

Cost in two dimensions: one transform of the image, J·L of maps at sizes 4^{−j}, L²·J(J−1)/2 at sizes 4^{−j₂} only;
buffers of about 2·J·L responses of the size of the image, no parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchconv.catalog import part
from torchconv.kernels._custom import without_autocast
from torchconv.theory._scattering_network import frame_network, make_admissible, propagate
from torchconv.theory._scattering_transform import (
    Tables,
    as_batch,
    as_rows,
    check_order,
    parse_average,
    scatter_1d,
    scatter_2d,
    tables_1d,
    tables_2d,
)
from torchconv.theory._scattering_wavelets import morlet_bank_1d, morlet_bank_2d


class _Scattering(nn.Module):
    """Tables as buffers, so that they follow the module to its device and type."""

    flatten: bool

    def _keep(self, tables: Tables, device: Any, dtype: Any) -> None:
        self._parts = tables.parts
        kind = dtype or torch.get_default_dtype()
        for name, table in tables.tensors.items():
            self.register_buffer(name, table.to(device, kind))

    def _join(self, y: Tensor, ndim: int) -> Tensor:
        """Channels and paths as one axis, where there are channels and that is wanted."""
        return y.flatten(-ndim - 2, -ndim - 1) if self.flatten and y.dim() > ndim + 1 else y

    def _tables(self, kind: torch.dtype) -> Tables:
        return Tables({name: table.to(kind) for name, table in self._buffers.items() if table is not None}, self._parts)


@part(
    "scattering1d",
    paper="scattering",
    kind="layer",
    dims=(1,),
    probe={"build": {"length": 50, "scale": 3, "q": [2, 1]}, "inputs": [[2, 3, 50]]},
    keywords="wavelet scattering transform audio time series fixed features Morlet invariance few labels kymatio",
)
class Scattering1d(_Scattering):
    """Wavelet scattering coefficients of signals.

    Args:
        length: N ≥ 2, any.
        scale: J, the widest wavelets cover about 2^J samples.
        q: wavelets an octave, of the first order or of both; the second order has 1.
        average: T ≥ 1, samples under the low-pass, also other than powers of 2; unset is 2^J. "mean" gives one number
            a path, "sum" what kymatio 0.4 gives for T="global".
        max_order: 1 or 2.
        stride: of the output, a power of 2; unset is the largest one that does not exceed T.
        fold: "sum", or "mean" as kymatio up to 0.3, which weighs the second order by less.
        flatten: join channels and paths, for the layers that follow.

    Attributes:
        paths: the indices of the wavelets of every coefficient; ``bank``: their frequencies, widths and responses.

    Shape:
        (\\*batch, C, N) → (\\*batch, C, paths, length), or (\\*batch, C·paths, length) with ``flatten``.

    Raises:
        ValueError: an argument is out of range, or the signal has another length.

    Example:
        >>> layer = Scattering1d(1000, 5, q=8)
        >>> layer(torch.zeros(2, 3, 1000)).shape, len(layer.paths)
        (torch.Size([2, 3, 84, 31]), 84)

    Reference: Andén and Mallat, arXiv 1304.6763; Wiatowski and Bölcskei, arXiv 1512.06293.
    """

    def __init__(
        self,
        length: int,
        scale: int,
        q: int | Sequence[int] = 1,
        average: float | str | None = None,
        max_order: int = 2,
        *,
        stride: int | None = None,
        fold: str = "sum",
        flatten: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_order(max_order)
        samples, self.reduce = parse_average(average)
        self.bank = morlet_bank_1d(length, scale, q, samples, stride, fold)
        self.max_order, self.flatten = max_order, flatten
        self._keep(tables_1d(self.bank, max_order, self.reduce), device, dtype)

    @property
    def paths(self) -> list[tuple[int, ...]]:
        """Indices of the wavelets of every coefficient: (), (first,), (first, second)."""
        return [path for path in self.bank.paths() if len(path) <= self.max_order]

    def forward(self, x: Tensor) -> Tensor:
        """The coefficients of ``x``."""
        rows = as_rows(x, (self.bank.length,))
        with without_autocast(x.device.type):
            y = scatter_1d(rows, self.bank, self._tables(rows.dtype), self.max_order, self.reduce)
        return self._join(as_batch(y, x, 1), 1)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"{self.bank.length}, scale={self.bank.scale}, max_order={self.max_order}, paths={len(self.paths)}"


@part(
    "scattering2d",
    paper="scattering",
    kind="layer",
    dims=(2,),
    probe={"build": {"size": [12, 9], "scale": 2, "angles": 3}, "inputs": [[2, 3, 12, 9]]},
    keywords="wavelet scattering transform image fixed features Morlet texture invariance few labels kymatio",
)
class Scattering2d(_Scattering):
    """Wavelet scattering coefficients of images.

    Args:
        size: (rows, columns), or the side of a square; at least 2^J, any otherwise.
        scale: J ≥ 1, coefficients are given for every 2^J-th pixel.
        angles: L ≥ 1, over half a turn.
        max_order: 1 or 2.
        pre_pad: the images come padded to ``bank.padded``, of which ``size`` is the middle.
        flatten: join channels and paths, for the layers that follow.

    Attributes:
        paths: scale and angle of the wavelets of every coefficient; ``bank``: their responses.

    Shape:
        (\\*batch, C, H, W) → (\\*batch, C, K, ⌊H/2^J⌋, ⌊W/2^J⌋), or (\\*batch, C·K, …) with ``flatten``;
        K = 1 + J·L + L²·J(J−1)/2, without the last term at ``max_order`` 1.

    Raises:
        ValueError: an argument is out of range, or the image has another size.

    Example:
        >>> layer = Scattering2d(32, 2, flatten=True)
        >>> layer(torch.zeros(2, 3, 32, 32)).shape, layer.paths[-1]
        (torch.Size([2, 243, 8, 8]), ((0, 7), (1, 7)))

    Reference: Bruna and Mallat, arXiv 1203.1513; Wiatowski and Bölcskei, arXiv 1512.06293.
    """

    def __init__(
        self,
        size: int | Sequence[int],
        scale: int,
        angles: int = 8,
        max_order: int = 2,
        *,
        pre_pad: bool = False,
        flatten: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_order(max_order)
        self.bank = morlet_bank_2d(size, scale, angles)
        self.max_order, self.pre_pad, self.flatten = max_order, pre_pad, flatten
        self._keep(tables_2d(self.bank, max_order), device, dtype)

    @property
    def paths(self) -> list[tuple[tuple[int, int], ...]]:
        """(scale, angle) of the wavelets of every coefficient: (), ((j, θ),), ((j, θ), (j', θ'))."""
        return [path for path in self.bank.paths() if len(path) <= self.max_order]

    def forward(self, x: Tensor) -> Tensor:
        """The coefficients of ``x``."""
        images = as_rows(x, self.bank.padded if self.pre_pad else self.bank.size)
        with without_autocast(x.device.type):
            y = scatter_2d(images, self.bank, self._tables(images.dtype), self.max_order, self.pre_pad)
        return self._join(as_batch(y, x, 2), 2)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        bank = self.bank
        return f"{bank.size}, scale={bank.scale}, angles={bank.angles}, max_order={self.max_order}"


@part(
    "frame-features",
    paper="scattering",
    kind="layer",
    dims=(1, 2, 3),
    probe={"build": {"family": "haar", "size": [6, 5], "depth": 2, "scale": 1, "step": 2}, "inputs": [[2, 2, 6, 5]]},
    keywords="frame features curvelet shearlet Gabor Haar Daubechies fixed extractor admissible non-expansive",
)
class FrameFeatures(nn.Module):
    """Features of an admissible network over tight frames, of any number of spatial axes; non-expansive.

    Args:
        family, size, depth, scale, wedges, nonlinearity, step, average: see
            :func:`torchconv.theory.scattering.frame_network`.

    Attributes:
        complex: whether features have an imaginary part, which then follows the real part along the paths.

    Shape:
        (\\*batch, C, \\*size) → a tuple with one tensor a layer from 0 on, (\\*batch, C, paths, \\*size of the layer).

    Raises:
        ValueError: an argument is out of range, or the input has another size.

    Example:
        >>> layer = FrameFeatures("shearlet", (16, 16), depth=1, scale=2, wedges=4, step=2)
        >>> [tuple(f.shape) for f in layer(torch.zeros(2, 3, 16, 16))]
        [(2, 3, 1, 16, 16), (2, 3, 6, 8, 8)]

    Reference: Wiatowski and Bölcskei, arXiv 1512.06293.
    """

    def __init__(
        self,
        family: str,
        size: int | Sequence[int],
        depth: int = 2,
        *,
        scale: int = 3,
        wedges: int = 8,
        nonlinearity: str = "modulus",
        step: int = 1,
        average: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"nonlinearity": nonlinearity, "step": step, "average": average}
        network = make_admissible(frame_network(family, size, depth, scale=scale, wedges=wedges, **options))[0]
        self.size, self.depth = network.layers[0].size, depth
        self.nonlinearity, self.step = nonlinearity, step
        filters = [network.output, *(layer.output for layer in network.layers)]
        if nonlinearity != "modulus":  # the modulus is real, whatever the filters
            filters += [layer.atoms for layer in network.layers]
        self.complex = not all(_is_real(f, len(self.size)) for f in filters)
        kind = dtype or torch.get_default_dtype()
        for n, layer in enumerate(network.layers):
            for name, response in (("atoms", layer.atoms), ("output", layer.output), ("pooling", layer.pooling)):
                if response is not None:
                    self.register_buffer(f"{name}_{n}", _as_real(response).to(device, kind))
        self.register_buffer(f"output_{depth}", _as_real(network.output).to(device, kind))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The features of every layer."""
        rows = as_rows(x, self.size)
        axes = tuple(range(-len(self.size), 0))

        def response(name: str) -> Tensor | None:
            buffer = self._buffers.get(name)
            return None if buffer is None else torch.view_as_complex(buffer.to(rows.dtype).contiguous())

        features = []
        with without_autocast(x.device.type):
            if rows.shape[0] == 0:  # there are no transforms of nothing
                return tuple(
                    f[:0].reshape(*x.shape[: -len(self.size)], *f.shape[1:]) for f in self(x.new_zeros(1, *self.size))
                )
            spectrum = torch.fft.fftn(rows, dim=axes).unsqueeze(-len(axes) - 1)
            for n in range(self.depth + 1):
                output, atoms = response(f"output_{n}"), response(f"atoms_{n}")
                z = torch.fft.ifftn(spectrum * output, dim=axes)
                features.append(torch.cat([z.real, z.imag], 1) if self.complex else z.real)
                if atoms is not None:
                    spectrum = propagate(spectrum, atoms, response(f"pooling_{n}"), self.nonlinearity, self.step)
        return tuple(as_batch(f, x, len(axes)) for f in features)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"size={self.size}, depth={self.depth}, nonlinearity={self.nonlinearity!r}, step={self.step}"


def _is_real(response: Tensor, ndim: int) -> bool:
    """Whether the filters are real."""
    kernels = torch.fft.ifftn(response, dim=tuple(range(-ndim, 0)))
    return bool(kernels.imag.abs().max() <= 1e-12 * kernels.abs().max())


def _as_real(response: Tensor) -> Tensor:
    """Real and imaginary part as the last axis: complex buffers would not follow ``module.to(dtype)``."""
    return torch.view_as_real(response.to(torch.complex128))
