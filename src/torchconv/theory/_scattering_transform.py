"""The wavelet scattering transform in the Fourier domain: all angles, or all wavelets of an octave, in one product.

A band-passed map is subsampled before the inverse transform, by adding the parts of its spectrum that coincide; only
parts that the wavelets reach are multiplied, and maps of the second order never exist at the resolution of the first.
In two dimensions the low-pass is separable and only one value in 2^J × 2^J is kept, so that it is two products with
small real matrices instead of transforms.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from torchconv._common import check, check_choice
from torchconv.theory._scattering_wavelets import (
    MorletBank1d,
    MorletBank2d,
    Wavelet1d,
    fold_2d,
    morlet_bank_1d,
    morlet_bank_2d,
)

Parts = tuple[tuple[int, ...], ...]
NEGLIGIBLE = 1e-12
"""A part of a spectrum where no response exceeds this share of the largest one is left out."""


@dataclass
class Tables:
    """The numbers of a transform.

    Attributes:
        tensors: responses and matrices by name. Wavelets are (wavelets, parts, \\*size of a part), divided by the
            number of all parts, so that the sum of part times table is the spectrum of the subsampled signal.
        parts: by the same names, how the spectrum is divided along its axes, and the parts that the wavelets reach.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    parts: dict[str, tuple[tuple[int, ...], Parts]] = field(default_factory=dict)

    def add(self, name: str, table: np.ndarray) -> None:
        """A response or matrix."""
        self.tensors[name] = torch.from_numpy(np.ascontiguousarray(table))

    def add_band(self, name: str, responses: np.ndarray, steps: tuple[int, ...]) -> None:
        """Wavelets (wavelets, \\*size) after which every ``steps``-th sample is kept."""
        sizes = [n // step for n, step in zip(responses.shape[1:], steps, strict=True)]
        least = NEGLIGIBLE * np.abs(responses).max()
        blocks = {}
        for part in itertools.product(*map(range, steps)):
            spans = tuple(slice(i * n, (i + 1) * n) for i, n in zip(part, sizes, strict=True))
            block = responses[(slice(None), *spans)]
            if np.abs(block).max() > least:
                blocks[part] = block / math.prod(steps)
        self.add(name, np.stack(list(blocks.values()), 1))
        self.parts[name] = steps, tuple(blocks)

    def band(self, spectrum: Tensor, name: str) -> Tensor:
        """Spectra (…, wavelets, \\*size of a part) of the filtered, subsampled signals; spectrum (…, \\*size)."""
        steps, parts = self.parts[name]
        table = self.tensors[name]
        divided = _divide(spectrum.unsqueeze(-len(steps) - 1), steps)
        total: Tensor | None = None
        for k, part in enumerate(parts):
            one, response = divided[part], table[:, k]
            total = one * response if total is None else torch.addcmul(total, one, response)
        assert total is not None
        return total

    def to(self, device: torch.device, dtype: torch.dtype) -> Tables:
        """Copies on a device."""
        return Tables({n: t.to(device, dtype) for n, t in self.tensors.items()}, self.parts)


def _divide(spectrum: Tensor, steps: tuple[int, ...]) -> dict[tuple[int, ...], Tensor]:
    """Parts of a spectrum by their places along the axes."""
    *outer, last = steps
    columns = enumerate(spectrum.unflatten(-1, (last, -1)).unbind(-2) if last > 1 else [spectrum])
    if not outer:
        return {(i,): block for i, block in columns}
    found: dict[tuple[int, ...], Tensor] = {}
    for j, column in columns:
        rows = column.unflatten(-2, (outer[0], -1)).unbind(-3) if outer[0] > 1 else [column]
        found.update({(i, j): block for i, block in enumerate(rows)})
    return found


def modulus(z: Tensor) -> Tensor:
    """|z|, with gradient 0 at 0."""
    if z.requires_grad:
        return z.abs()
    # A third of the time of ``abs``, which guards against overflow at 1e19.
    parts = torch.view_as_real(z)
    real, imaginary = parts[..., 0], parts[..., 1]
    return torch.addcmul(real * real, imaginary, imaginary).sqrt_()


def reflect(x: Tensor, before: int, after: int, axis: int) -> Tensor:
    """Pad by reflection without repeating the border, as far as needed."""
    n = x.shape[axis]
    if not before and not after:
        return x
    period = max(2 * n - 2, 1)
    at = torch.arange(-before, n + after, device=x.device) % period
    return x.index_select(axis, torch.minimum(at, period - at) if n > 1 else at)


def _octaves(wavelets: Sequence[Wavelet1d]) -> dict[int, slice]:
    """The wavelets, which are sorted, by the octaves by which their maps can be subsampled."""
    found: dict[int, slice] = {}
    for index, wavelet in enumerate(wavelets):
        first = found[wavelet.j].start if wavelet.j in found else index
        found[wavelet.j] = slice(first, index + 1)
    return found


def crop_1d(bank: MorletBank1d) -> slice:
    """The output samples that belong to the signal and not to its padding."""
    step = 1 << bank.log2_stride
    return slice(-(-bank.left // step), -(-(bank.left + bank.length) // step))


def tables_1d(bank: MorletBank1d, max_order: int = 2, reduce: str = "local") -> Tables:
    """What :func:`scatter_1d` reads, in double precision."""
    tables = Tables()
    for j1, ones in _octaves(bank.first).items():
        k1 = subsampling(bank, j1, reduce)
        tables.add_band(f"psi_{j1}", bank.psi1[ones], (1 << k1,))
        for j2, twos in _octaves(bank.second if max_order > 1 else ()).items():
            if j2 > j1:
                k2 = subsampling(bank, j2, reduce)
                tables.add_band(f"psi_{j1}_{j2}", bank.level(bank.psi2[twos], k1), (1 << max(k2 - k1, 0),))
    if reduce == "local":
        levels = {0, *(subsampling(bank, w.j, reduce) for w in (*bank.first, *bank.second))}
        for level in sorted(levels):
            tables.add_band(f"phi_{level}", bank.level(bank.phi, level)[None], (1 << (bank.log2_stride - level),))
    return tables


def subsampling(bank: MorletBank1d, j: int, reduce: str) -> int:
    """Octaves by which a wavelet's map is subsampled: no further than the local averages are."""
    return min(j, bank.log2_stride) if reduce == "local" else j


def scatter_1d(x: Tensor, bank: MorletBank1d, tables: Tables, max_order: int = 2, reduce: str = "local") -> Tensor:
    """Scattering coefficients of signals; see :func:`scattering_1d`.

    Shape:
        x (B, length) → (B, paths, output length).
    """
    if x.shape[0] == 0:  # there are no transforms of nothing
        return scatter_1d(x.new_zeros(1, *x.shape[1:]), bank, tables, max_order, reduce)[:0]
    kept = crop_1d(bank)

    def average(u: Tensor, spectrum: Tensor | None, level: int) -> Tensor:
        if reduce != "local":
            return u.mean(-1, keepdim=True) if reduce == "mean" else u.sum(-1, keepdim=True)
        low = tables.band(torch.fft.fft(u) if spectrum is None else spectrum, f"phi_{level}").squeeze(-2)
        return torch.fft.ifft(low).real[..., kept]

    u = reflect(x, bank.left, bank.padded - bank.left - bank.length, -1)
    spectrum = torch.fft.fft(u)
    zeroth, first, second = [average(u, spectrum, 0).unsqueeze(1)], [], []
    for j1 in _octaves(bank.first):
        k1 = subsampling(bank, j1, reduce)
        ones = modulus(torch.fft.ifft(tables.band(spectrum, f"psi_{j1}")))
        lines = torch.fft.fft(ones)
        first.append(average(ones, lines, k1))
        blocks = []
        for j2 in _octaves(bank.second if max_order > 1 else ()):
            if j2 > j1:
                k2 = subsampling(bank, j2, reduce)
                twos = modulus(torch.fft.ifft(tables.band(lines, f"psi_{j1}_{j2}")))
                blocks.append(average(twos, None, max(k1, k2)))
        if blocks:
            second.append(torch.cat(blocks, 2).flatten(1, 2))
    return torch.cat([*zeroth, *first, *second], 1)


def tables_2d(bank: MorletBank2d, max_order: int = 2) -> Tables:
    """What :func:`scatter_2d` reads, in double precision."""
    tables = Tables()
    for j1 in range(bank.scale):
        tables.add_band(f"psi_{j1}", bank.psi[j1], (1 << j1,) * 2)
        for j2 in range(j1 + 1, bank.scale if max_order > 1 else 0):
            tables.add_band(f"psi_{j1}_{j2}", fold_2d(bank.psi[j2], j1), (1 << (j2 - j1),) * 2)
        rows, columns = bank.averages(j1)
        tables.add(f"rows_{j1}", rows)
        tables.add(f"columns_{j1}", columns)
    return tables


def scatter_2d(x: Tensor, bank: MorletBank2d, tables: Tables, max_order: int = 2, pre_pad: bool = False) -> Tensor:
    """Scattering coefficients of images; see :func:`scattering_2d`.

    Shape:
        x (B, rows, columns) → (B, paths, ⌊rows / 2^J⌋, ⌊columns / 2^J⌋).
    """
    if x.shape[0] == 0:  # there are no transforms of nothing
        return scatter_2d(x.new_zeros(1, *x.shape[1:]), bank, tables, max_order, pre_pad)[:0]

    def average(u: Tensor, level: int) -> Tensor:
        return tables.tensors[f"rows_{level}"] @ (u @ tables.tensors[f"columns_{level}"].T)

    u = x
    for axis, n, padded in () if pre_pad else zip((-2, -1), bank.size, bank.padded, strict=True):
        u = reflect(u, (padded - n) // 2, (padded - n + 1) // 2, axis)
    spectrum = torch.fft.fft2(u)
    zeroth, first, second = [average(u, 0).unsqueeze(1)], [], []
    for j1 in range(bank.scale):
        ones = modulus(torch.fft.ifft2(tables.band(spectrum, f"psi_{j1}")))
        first.append(average(ones, j1))
        if max_order < 2 or j1 == bank.scale - 1:
            continue
        lines = torch.fft.fft2(ones)
        later = range(j1 + 1, bank.scale)
        twos = [average(modulus(torch.fft.ifft2(tables.band(lines, f"psi_{j1}_{j2}"))), j2) for j2 in later]
        second.append(torch.cat(twos, 2).flatten(1, 2))
    return torch.cat([*zeroth, *first, *second], 1)


def check_order(max_order: int) -> None:
    """First or second order."""
    check(max_order in (1, 2), "max_order", max_order, "must be 1 or 2")


def parse_average(average: float | str | None) -> tuple[float | None, str]:
    """The low-pass's samples, and whether coefficients are local or one for the whole signal."""
    if isinstance(average, str):
        check_choice("average", average, ("mean", "sum"))
        return None, average
    return average, "local"


def as_rows(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """All signals or images of ``x`` in one batch, half precision as float32."""
    check(x.is_floating_point(), "x.dtype", x.dtype, "must be a real floating type; convert it first")
    fits = tuple(x.shape[-len(size) :]) == size
    check(fits, "x.shape", tuple(x.shape), f"must end in {', '.join(map(str, size))}")
    batched = x if x.dim() > len(size) else x.unsqueeze(0)
    return batched.flatten(0, -len(size) - 1).to(torch.promote_types(x.dtype, torch.float32))


def as_batch(y: Tensor, x: Tensor, ndim: int) -> Tensor:
    """Coefficients of the rows of ``x`` in the batch of ``x``, in its type."""
    return y.reshape(*x.shape[:-ndim], *y.shape[1:]).to(x.dtype)


def scattering_1d(
    x: Tensor,
    scale: int,
    q: int | Sequence[int] = 1,
    average: float | str | None = None,
    max_order: int = 2,
    *,
    stride: int | None = None,
    fold: str = "sum",
) -> Tensor:
    """Wavelet scattering coefficients of signals.

    S₀ = x∗φ, S₁ = |x∗ψ_a|∗φ, S₂ = ||x∗ψ_a|∗ψ_b|∗φ for b of lower frequency than a, at every 2^⌊log₂ T⌋-th sample.

    Args:
        x: real signals. Half precision is computed in float32.
        scale: J, the widest wavelets cover about 2^J samples.
        q: wavelets an octave, of the first order or of both.
        average: T, samples under the low-pass; unset is 2^J. "mean" or "sum" gives one number a path, over the padded
            moduli ("sum" at each path's own sampling, as kymatio 0.4 with T="global").
        max_order: 1 or 2.
        stride, fold: see :func:`morlet_bank_1d`.

    Shape:
        (…, N) → (…, paths, about N / stride); paths in the order of :meth:`MorletBank1d.paths`.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> scattering_1d(torch.ones(2, 64), 3, (4, 1)).shape
        torch.Size([2, 16, 8])

    Reference: Andén and Mallat, arXiv 1304.6763.
    """
    check_order(max_order)
    samples, reduce = parse_average(average)
    bank = morlet_bank_1d(x.shape[-1], scale, q, samples, stride, fold)
    rows = as_rows(x, (bank.length,))
    tables = tables_1d(bank, max_order, reduce).to(x.device, rows.dtype)
    return as_batch(scatter_1d(rows, bank, tables, max_order, reduce), x, 1)


def scattering_2d(x: Tensor, scale: int, angles: int = 8, max_order: int = 2) -> Tensor:
    """Wavelet scattering coefficients of images.

    S₀ = x∗φ, S₁ = |x∗ψ_{j,θ}|∗φ, S₂ = ||x∗ψ_{j,θ}|∗ψ_{j',θ'}|∗φ for j' > j, at every 2^J-th pixel.

    Args:
        x: real images. Half precision is computed in float32.
        scale: J ≥ 1.
        angles: L, over half a turn.
        max_order: 1 or 2.

    Shape:
        (…, H, W) → (…, 1 + J·L + L²·J(J−1)/2, ⌊H / 2^J⌋, ⌊W / 2^J⌋); without the last group at ``max_order`` 1.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> scattering_2d(torch.ones(1, 3, 16, 16), 2, angles=4).shape
        torch.Size([1, 3, 25, 4, 4])

    Reference: Bruna and Mallat, arXiv 1203.1513.
    """
    check_order(max_order)
    bank = morlet_bank_2d(tuple(x.shape[-2:]), scale, angles)
    images = as_rows(x, bank.size)
    tables = tables_2d(bank, max_order).to(x.device, images.dtype)
    return as_batch(scatter_2d(images, bank, tables, max_order), x, 2)
