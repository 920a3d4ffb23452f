"""Features of LightWaveS: 84 fixed kernels, six dilations, two scattering layers (arXiv 2204.01379).

Every series is filtered by kernels of nine taps, three of weight 2 and six of −1, at dilations δ = 1, 2, …, 32. Four
numbers describe the result; its modulus at half the rate goes through the same kernel again and gives four more:

    z₁[t] = δ^(−3/2) Σ_i w_i x[t + (i − 4)δ],   s[n] = |z₁[2n]|,   z₂[n] = δ^(−3/2) Σ_i w_i s[n + (i − 4)δ]

described by: share of z > 0, largest |z|, longest run of z > 0 that ends before the series does (as a share of the
length), smallest |z|. No parameters; 9·T + 9·T/2 multiply-adds a kernel application.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_choice
from torchconv.catalog import part
from torchconv.kernels.precision import widen

TAPS = 9
KERNELS = 84
VARIANTS = {"L1": 4, "L2": 4, "L1L2": 8}  # features a kernel application
DILATIONS = (1, 2, 4, 8, 16, 32)
FEATURES = ("ppv", "max_abs", "longest_positive_run", "min_abs")


def base_kernels(*, device: Any = None, dtype: Any = None) -> Tensor:
    """The 84 kernels with three weights 2 and six −1, in the lexicographic order of their values.

    Returns:
        (84, 9); every row sums to zero. MiniROCKET counts them from the other end.

    Example:
        >>> base_kernels()[0].tolist()
        [-1.0, -1.0, -1.0, -1.0, -1.0, -1.0, 2.0, 2.0, 2.0]

    Reference: Pantiskas et al., arXiv 2204.01379; Dempster et al., arXiv 2012.08791.
    """
    twos = torch.tensor(list(itertools.combinations(range(TAPS), 3))[::-1], device=device)
    kernels = torch.full((KERNELS, TAPS), -1, device=device, dtype=dtype or torch.get_default_dtype())
    return kernels.scatter_(1, twos, 2)


def check_dilations(dilations: Sequence[int]) -> tuple[int, ...]:
    """As a tuple of integers ≥ 1."""
    found = tuple(int(d) for d in dilations)
    check(len(found) > 0 and min(found) > 0, "dilations", found, "must be integers >= 1")
    return found


def filtered(x: Tensor, kernels: Tensor, dilation: int) -> Tensor:
    """Σ_i w_i x[t + (i − 4)δ], zeros outside: (…, 1 or k, T), (k, 9) → (…, k, T).

    The order of the sum is that of the authors' compiled code, ((0+4)+(2+6)) + ((1+5)+(3+7)) + 8: with weights −1 and 2
    every product is exact, so that float32 results agree to the last bit and no count of z > 0 differs. Taps that see
    nothing but padding are skipped.
    """
    length, middle = x.shape[-1], TAPS // 2
    reach = min(middle, (length - 1) // dilation)
    padded = F.pad(x, (reach * dilation, reach * dilation))

    def tap(i: int, before: Tensor | None = None) -> Tensor | None:
        if abs(i - middle) > reach:
            return before
        view, weight = padded.narrow(-1, (i - middle + reach) * dilation, length), kernels[:, i, None]
        return weight * view if before is None else before.addcmul_(weight, view)

    def plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return b if a is None else a if b is None else a.add_(b)

    even = plus(tap(4, tap(0)), tap(6, tap(2)))
    odd = plus(tap(5, tap(1)), tap(7, tap(3)))
    total = tap(8, plus(even, odd))
    assert total is not None  # the middle tap always sees the series
    return total


def counts(z: Tensor) -> tuple[Tensor, Tensor]:
    """How often z > 0, and the longest run of it that an element z ≤ 0 ends: (…, T) → (…), (…).

    A run that reaches the end is not counted, as by the authors.
    """
    length = z.shape[-1]
    ends = (z <= 0).to(torch.int16 if length < 2**15 else torch.int32)
    after = torch.arange(1, length + 1, device=z.device, dtype=ends.dtype)
    last = (ends * after).cummax(-1).values  # one past the latest z ≤ 0
    runs = (after[:-1] - last[..., :-1]) * ends[..., 1:]
    longest = runs.amax(-1) if length > 1 else ends.sum(-1) * 0
    return length - ends.sum(-1, dtype=torch.int32), longest


def describe(z: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """The four features of ``z · scale``: (…, T) → (…, 4) in ``dtype``."""
    size = z.abs()
    positive, longest = ((n.to(torch.float64 if dtype == torch.float64 else torch.float32)) for n in counts(z.detach()))
    largest, smallest = ((f.to(_wide(z)) * scale).to(dtype) for f in (size.amax(-1), size.amin(-1)))
    length = z.shape[-1]
    return torch.stack([(positive / length).to(dtype), largest, (longest / length).to(dtype), smallest], -1)


def _wide(x: Tensor) -> torch.dtype:
    """Sums of float32 numbers are exact in it, where the device has it."""
    return x.dtype if x.device.type == "mps" else torch.float64


def kernel_features(x: Tensor, kernels: Tensor, dilation: int, variant: str = "L1L2") -> Tensor:
    """Describe series under several kernels of one dilation.

    The first sum is taken in the type of the series, tap after tap, the second in double precision, both as in the
    authors' code: the counts of z > 0 then do not depend on the order of summation.

    Args:
        x: the series.
        kernels: weights of nine taps.
        dilation: δ.
        variant: "L1" (first layer), "L2" (second) or "L1L2".

    Shape:
        (…, T), (k, 9) → (…, k, 4 or 8).

    Raises:
        ValueError: an unknown variant, or a series too short for it.

    Reference: Pantiskas et al., arXiv 2204.01379.
    """
    check_choice("variant", variant, VARIANTS)
    length = x.shape[-1]
    least = 1 if variant == "L1" else 2
    check(length >= least, "x", tuple(x.shape), f"variant {variant} needs series of at least {least} steps")
    check(kernels.dim() == 2 and kernels.shape[1] == TAPS, "kernels", tuple(kernels.shape), f"must be (k, {TAPS})")
    return _two_layers(x.unsqueeze(-2), kernels, dilation, variant)


def _two_layers(x: Tensor, kernels: Tensor, dilation: int, variant: str) -> Tensor:
    """One series for all kernels, or one for each: (…, 1 or k, T) → (…, k, features)."""
    dtype, length = x.dtype, x.shape[-1]
    with torch.autocast(x.device.type, enabled=False):
        x = widen(x)
        kernels = kernels.to(x.dtype)
        z = filtered(x, kernels, dilation)
        found = [] if variant == "L2" else [describe(z, dilation**-1.5, dtype)]
        if variant != "L1":
            s = z.abs()[..., ::2][..., : length // 2].to(_wide(x))
            found.append(describe(filtered(s, kernels.to(s.dtype), dilation), dilation**-3.0, dtype))
    return torch.cat(found, -1)


@part(
    "lightwaves-features",
    paper="lightwaves",
    kind="layer",
    dims=(1,),
    probe={"build": {"rows": [[0, 3, 0], [2, 17, 2], [2, 3, 2], [1, 83, 5]]}, "inputs": [[2, 3, 40]]},
    keywords="wavelet scattering ROCKET fixed kernels time series features proportion of positive values",
)
class LightWaveSFeatures(nn.Module):
    """Chosen features of chosen kernel applications, of series that are standardised first.

    Differentiable with respect to the series through the largest and smallest |z|; counts have no gradient. Channels
    without a row are not read.

    Args:
        rows: (n, 3) kernel applications: channel, kernel of :func:`base_kernels`, index into ``dilations``.
        mask: (n, 4 or 8) features to keep; all by default.
        variant: "L1", "L2" or "L1L2".
        mean, std: of the channels, (C,); series are taken as they are without them.
        dilations: δ to choose from.

    Shape:
        (B, C, T) → (B, kept features), by row, then by feature.

    Raises:
        ValueError: rows or mask of a wrong shape, an index out of range, or a series with too few channels.

    Example:
        >>> layer = LightWaveSFeatures([[0, 3, 1], [1, 50, 0]], variant="L1")
        >>> layer(torch.zeros(2, 2, 64)).shape
        torch.Size([2, 8])

    Reference: Pantiskas et al., arXiv 2204.01379.
    """

    keep: Tensor
    kernels: Tensor
    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self,
        rows: Any,
        mask: Any = None,
        variant: str = "L1L2",
        mean: Any = None,
        std: Any = None,
        dilations: Sequence[int] = DILATIONS,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_choice("variant", variant, VARIANTS)
        self.variant, width = variant, VARIANTS[variant]
        table = torch.as_tensor(rows).cpu()
        check(table.dim() == 2 and table.shape[1] == 3 and len(table) > 0, "rows", tuple(table.shape), "must be (n, 3)")
        self.rows: list[tuple[int, ...]] = [tuple(row) for row in table.tolist()]
        self.dilations = check_dilations(dilations)
        ranges = f"must be (channel, kernel below {KERNELS}, index below {len(self.dilations)} of a dilation)"
        for row in self.rows:
            check(min(row) >= 0 and row[1] < KERNELS and row[2] < len(self.dilations), "rows", row, ranges)
        check((mean is None) == (std is None), "std", std, "give mean and std, or neither")
        mask = torch.ones(len(table), width, dtype=torch.bool) if mask is None else torch.as_tensor(mask).cpu().bool()
        check(mask.shape == (len(table), width), "mask", tuple(mask.shape), f"must be ({len(table)}, {width})")
        self.channels = sorted({row[0] for row in self.rows})
        self.groups: dict[int, list[int]] = {}  # dilation → rows
        for n, row in enumerate(self.rows):
            self.groups.setdefault(self.dilations[row[2]], []).append(n)
        place = torch.empty(len(table), dtype=torch.int64)
        place[[n for members in self.groups.values() for n in members]] = torch.arange(len(table))
        keep = (place[:, None] * width + torch.arange(width))[mask]
        self.register_buffer("keep", keep.to(device), persistent=False)
        self.register_buffer("kernels", base_kernels(device=device, dtype=torch.int8), persistent=False)
        for name, value in (("mean", mean), ("std", std)):
            self.register_buffer(name, None if value is None else torch.as_tensor(value).to(device=device, dtype=dtype))

    def extra_repr(self) -> str:
        """Counts of what is computed."""
        return f"applications={len(self.rows)}, features={len(self.keep)}, variant={self.variant!r}"

    def forward(self, x: Tensor) -> Tensor:
        """Standardise, filter, describe, choose."""
        needed, least = self.channels[-1] + 1, 1 if self.variant == "L1" else 2
        remedy = f"must be (B, C >= {needed}, T >= {least})"
        check(x.dim() == 3 and x.shape[1] >= needed and x.shape[2] >= least, "x", tuple(x.shape), remedy)
        series = x[:, self.channels]
        if self.mean is not None and self.std is not None:
            series = (series - self.mean[self.channels, None]) / self.std[self.channels, None]
        found = []
        for dilation, members in self.groups.items():
            own = series[:, [self.channels.index(self.rows[n][0]) for n in members]]
            kernels = self.kernels[[self.rows[n][1] for n in members]]
            found.append(_two_layers(own, kernels, dilation, self.variant))
        return torch.cat(found, 1).flatten(1).index_select(1, self.keep)
