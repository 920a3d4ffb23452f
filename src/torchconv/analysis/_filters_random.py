"""Initial weights from a law or a closed form: the scales of LeCun, Glorot and He, orthogonal matrices, DCT and Gabor.

    fan_in = i·r, fan_out = o·r for a weight (o, i, k_1 … k_n), r = Πk, i = channels / groups
    LeCun: variance 1/fan_in; Glorot: 2g²/(fan_in + fan_out); He: g²/fan, g² = 2/(1 + slope²)

Sources: LeCun 1998; Glorot and Bengio 2010; He et al. 2015 (arXiv 1502.01852); Saxe et al. 2014 (arXiv 1312.6120);
Xiao et al. 2018 (arXiv 1806.05393); the survey is arXiv 2410.21644.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from torch import Generator, Tensor, nn

from torchconv._common import check, check_choice

GAINS = {"linear": 1.0, "sigmoid": 1.0, "tanh": 5 / 3, "relu": math.sqrt(2), "selu": 0.75}
Shape = Sequence[int]


def scales(
    shape: Shape, *, gain: float = 1.0, negative_slope: float = 0.0, groups: int = 1, fan_out_groups: bool = False
) -> dict[str, float]:
    """Fans, and the bounds and standard deviations of the classical laws, for a weight of this shape.

    Args:
        shape: (out, in / groups, k_1 … k_n), as PyTorch stores it; a matrix has no k.
        gain: of the Glorot laws.
        negative_slope: of the leaky ReLU in the He laws; 0 is the ReLU.
        groups: of the convolution; matters with ``fan_out_groups`` only.
        fan_out_groups: divide fan_out by ``groups``. PyTorch does not, so that fan_out of a depthwise kernel is o·r.

    Raises:
        ValueError: a shape of fewer than two axes or with an empty axis.

    Example:
        >>> scales((16, 3, 3, 3))["fan_in"]
        27.0

    Reference: LeCun 1998; Glorot and Bengio 2010; arXiv 1502.01852.
    """
    check(len(shape) >= 2 and min(shape) >= 1, "shape", tuple(shape), "give (out, in, *kernel), all at least 1")
    taps = math.prod(shape[2:])
    fan_in = float(shape[1] * taps)
    fan_out = shape[0] * taps / (groups if fan_out_groups else 1)
    he = math.sqrt(2 / (1 + negative_slope**2))
    return {
        "fan_in": fan_in,
        "fan_out": fan_out,
        "xavier_uniform_bound": gain * math.sqrt(6 / (fan_in + fan_out)),
        "xavier_normal_std": gain * math.sqrt(2 / (fan_in + fan_out)),
        "he_uniform_bound_fan_in": he * math.sqrt(3 / fan_in),
        "he_normal_std_fan_in": he / math.sqrt(fan_in),
        "he_uniform_bound_fan_out": he * math.sqrt(3 / fan_out),
        "he_normal_std_fan_out": he / math.sqrt(fan_out),
        "lecun_uniform_bound_unit_variance": math.sqrt(3 / fan_in),
        "lecun_normal_std": math.sqrt(1 / fan_in),
        "lecun1998_bound_2.4_over_fan_in": 2.4 / fan_in,
    }


# law → (column of ``scales`` for fan_in, for fan_out, is it a uniform law)
LAWS = {
    "lecun_1998": ("lecun1998_bound_2.4_over_fan_in", "", True),
    "lecun_uniform": ("lecun_uniform_bound_unit_variance", "", True),
    "lecun_normal": ("lecun_normal_std", "", False),
    "xavier_uniform": ("xavier_uniform_bound", "", True),
    "xavier_normal": ("xavier_normal_std", "", False),
    "he_uniform": ("he_uniform_bound_fan_in", "he_uniform_bound_fan_out", True),
    "he_normal": ("he_normal_std_fan_in", "he_normal_std_fan_out", False),
}


def law(name: str) -> Callable[..., Tensor]:
    """A function ``(shape, *, generator, fan="in", dtype, device, **options of scales) -> Tensor`` of a classical law.

    Example:
        >>> law("he_normal")((64, 16, 3, 3), generator=torch.Generator().manual_seed(0)).shape
        torch.Size([64, 16, 3, 3])
    """
    check_choice("name", name, LAWS)
    column_in, column_out, uniform = LAWS[name]

    def draw(
        shape: Shape,
        *,
        generator: Generator | None = None,
        fan: str = "in",
        dtype: torch.dtype | None = None,
        device: Any = None,
        **options: Any,
    ) -> Tensor:
        check_choice("fan", fan, ("in", "out") if column_out else ("in",))
        scale = scales(shape, **options)[column_in if fan == "in" else column_out]
        weight = torch.empty(tuple(shape), dtype=dtype, device=device)
        if uniform:
            return weight.uniform_(-scale, scale, generator=generator)
        return weight.normal_(0, scale, generator=generator)

    draw.__name__ = name
    return draw


def gaussian(
    shape: Shape,
    *,
    generator: Generator | None = None,
    std: float = 0.01,
    dtype: torch.dtype | None = None,
    device: Any = None,
) -> Tensor:
    """N(0, std²), the habit of AlexNet.

    Example:
        >>> gaussian((4, 1, 3, 3)).abs().max().item() < 0.1
        True
    """
    return torch.empty(tuple(shape), dtype=dtype, device=device).normal_(0, std, generator=generator)


def trunc_normal(
    shape: Shape,
    *,
    generator: Generator | None = None,
    std: float = 0.02,
    dtype: torch.dtype | None = None,
    device: Any = None,
) -> Tensor:
    """N(0, std²) cut off at two standard deviations, the habit of vision transformers.

    Example:
        >>> trunc_normal((4, 1, 3, 3)).abs().max().item() <= 0.04
        True
    """
    weight = torch.empty(tuple(shape), dtype=dtype, device=device)
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)


def constant(
    shape: Shape,
    *,
    generator: Generator | None = None,
    value: float = 0.0,
    dtype: torch.dtype | None = None,
    device: Any = None,
) -> Tensor:
    """One value everywhere; the generator is not used. All filters of a layer then learn the same.

    Example:
        >>> constant((1, 1, 2), value=3.0)
        tensor([[[3., 3.]]])
    """
    return torch.full(tuple(shape), value, dtype=dtype, device=device)


def orthonormal(matrix: Tensor) -> Tensor:
    """The orthonormal rows (or columns, whichever are fewer) of a matrix by QR, with R's diagonal made positive.

    Without the correction of signs a Gaussian matrix would not give a uniformly (Haar) distributed one.

    Example:
        >>> q = orthonormal(torch.randn(4, 9))
        >>> torch.allclose(q @ q.T, torch.eye(4), atol=1e-5)
        True

    Reference: arXiv 1312.6120.
    """
    wide = matrix.shape[0] < matrix.shape[1]
    q, r = torch.linalg.qr(matrix.T if wide else matrix)
    q = q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)
    return q.T if wide else q


def orthogonal(
    shape: Shape,
    *,
    generator: Generator | None = None,
    gain: float = math.sqrt(2),
    dtype: torch.dtype | None = None,
    device: Any = None,
) -> Tensor:
    """The flattened weight (o × i·r) has orthonormal rows or columns, times the gain.

    The convolution itself is not orthogonal by that: see :func:`delta_orthogonal`.

    Example:
        >>> w = orthogonal((8, 4, 3, 3), gain=1.0).flatten(1)
        >>> torch.allclose(w @ w.T, torch.eye(8), atol=1e-5)
        True

    Reference: arXiv 1312.6120.
    """
    a = torch.empty(shape[0], math.prod(shape[1:]), device=device).normal_(generator=generator)
    return (gain * orthonormal(a)).reshape(tuple(shape)).to(dtype or a.dtype)


def delta_orthogonal_from(matrix: Tensor, kernel_size: Shape, gain: float = 1.0) -> Tensor:
    """A weight that is zero but for its centre tap: the gain times orthonormal columns from ``matrix`` (o × i, o ≥ i).

    Example:
        >>> delta_orthogonal_from(torch.randn(6, 4), (3, 3)).shape
        torch.Size([6, 4, 3, 3])
    """
    out_channels, in_channels = matrix.shape
    remedy = "delta-orthogonal weights need at least as many output as input channels"
    check(out_channels >= in_channels, "shape", (out_channels, in_channels, *kernel_size), remedy)
    check(all(k % 2 for k in kernel_size), "kernel_size", tuple(kernel_size), "must be odd: the centre is one tap")
    weight = matrix.new_zeros(out_channels, in_channels, *kernel_size)
    centre: tuple[Any, ...] = (..., *(k // 2 for k in kernel_size))
    weight[centre] = gain * orthonormal(matrix)
    return weight


def delta_orthogonal(
    shape: Shape,
    *,
    generator: Generator | None = None,
    gain: float = 1.0,
    dtype: torch.dtype | None = None,
    device: Any = None,
) -> Tensor:
    """Zero but for the centre tap, an orthonormal matrix: a convolution that keeps the norm exactly (circular padding).

    Raises:
        ValueError: fewer output than input channels, or an even kernel.

    Example:
        >>> conv = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular", bias=False)
        >>> _ = conv.weight.data.copy_(delta_orthogonal((4, 4, 3, 3)))
        >>> x = torch.randn(1, 4, 8, 8)
        >>> torch.allclose(conv(x).norm(), x.norm())
        True

    Reference: arXiv 1806.05393.
    """
    d = torch.empty(shape[0], shape[1], device=device).normal_(generator=generator)
    return delta_orthogonal_from(d, shape[2:], gain).to(dtype or d.dtype)


def dct_bank(
    kernel_size: Shape,
    count: int | None = None,
    *,
    zigzag: bool = False,
    drop_dc: bool = False,
    dtype: torch.dtype | None = None,
    device: Any = None,
) -> Tensor:
    """The orthonormal DCT-II filters of a size, (filters, *kernel_size).

    Filter (u, v)[y, x] = c_u c_v cos(π(2y+1)u/2k_h) cos(π(2x+1)v/2k_w), c_0 = √(1/k), else √(2/k); any number of axes.

    Args:
        kernel_size: one size for each axis.
        count: the first so many; all by default.
        zigzag: order by u + v + …, low frequencies first; else the first axis is slowest.
        drop_dc: leave the constant filter out.

    Raises:
        ValueError: more filters asked for than there are.

    Example:
        >>> dct_bank((3, 3)).flatten(1).sum(1).abs().round().tolist()
        [3.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    """
    frequencies = list(product(*(range(k) for k in kernel_size)))
    if zigzag:
        frequencies.sort(key=sum)  # stable: within a sum the first axis is slowest
    if drop_dc:
        frequencies = [f for f in frequencies if any(f)]
    count = len(frequencies) if count is None else count
    check(0 <= count <= len(frequencies), "count", count, f"there are {len(frequencies)} filters")
    bases = []
    for k in kernel_size:
        n = torch.arange(k, dtype=torch.float64)
        basis = torch.cos(math.pi * (2 * n + 1) * n[:, None] / (2 * k)) * math.sqrt(2 / k)
        basis[0] = math.sqrt(1 / k)
        bases.append(basis)
    bank = torch.empty(count, *kernel_size, dtype=torch.float64)
    for row, frequency in zip(bank, frequencies[:count], strict=True):
        value = torch.ones((), dtype=torch.float64)
        for basis, u in zip(bases, frequency, strict=True):
            value = value[..., None] * basis[u]
        row.copy_(value)
    return bank.to(dtype=dtype or torch.get_default_dtype(), device=device)


def gabor_bank(
    kernel_size: int | Shape,
    orientations: int = 8,
    wavelengths: Sequence[float] = (4.0,),
    phases: Sequence[float] = (0.0, math.pi / 2),
    *,
    sigma_over_lambda: float = 0.56,
    gamma: float = 0.5,
    zero_mean: bool = False,
    unit_norm: bool = False,
    dtype: torch.dtype | None = None,
    device: Any = None,
) -> Tensor:
    """Gabor filters (wavelengths · phases · orientations, k_h, k_w), in that order, θ = jπ/n fastest.

    g = exp(−(x'² + γ²y'²)/2σ²) cos(2πx'/λ + ψ), x' = x cosθ + y sinθ, y' = −x sinθ + y cosθ, σ = 0.56 λ; x is the
    column's, y the row's distance from the centre.

    Args:
        kernel_size: one size or (height, width).
        orientations: how many angles in half a turn.
        wavelengths: in pixels.
        phases: in radians.
        sigma_over_lambda, gamma: width of the envelope and its aspect.
        zero_mean: take the mean out, so that a constant image gives nothing.
        unit_norm: divide by the Euclidean norm.

    Example:
        >>> gabor_bank(7, orientations=4).shape
        torch.Size([8, 7, 7])
    """
    height, width = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    check(min(height, width, orientations) >= 1, "kernel_size", kernel_size, "sizes and orientations are at least 1")
    y = (torch.arange(height, dtype=torch.float64) - (height - 1) / 2)[:, None]
    x = torch.arange(width, dtype=torch.float64) - (width - 1) / 2
    bank = []
    for wavelength, phase, j in product(wavelengths, phases, range(orientations)):
        theta, sigma = j * math.pi / orientations, sigma_over_lambda * wavelength
        along = x * math.cos(theta) + y * math.sin(theta)
        across = y * math.cos(theta) - x * math.sin(theta)
        envelope = torch.exp(-(along.square() + (gamma * across).square()) / (2 * sigma**2))
        bank.append(envelope * torch.cos(2 * math.pi * along / wavelength + phase))
    filters = torch.stack(bank)
    if zero_mean:
        filters = filters - filters.mean((1, 2), keepdim=True)
    if unit_norm:
        filters = filters / filters.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None]
    return filters.to(dtype=dtype or torch.get_default_dtype(), device=device)
