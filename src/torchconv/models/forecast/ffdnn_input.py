"""From reflectances to the series that FFDNN reads: gaps filled, equal steps, two indices, standardised.

Shi, Han et al. 2023, "A Fast Fourier Convolutional Deep Neural Network For Accurate and Explainable Discrimination Of
Wheat Yellow Rust And Nitrogen Deficiency From Sentinel-2 Time-Series Data", arXiv 2306.17207: a photochemical filter in
front of the network keeps canopy structure (leaf area by WDVI) and leaf chlorophyll (TCARI/OSAVI).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive
from torchconv.ops.ffdnn_series import INDICES, SENTINEL2, vegetation_index


def resample_series(x: Tensor, length: int, days: Sequence[float] | Tensor | None = None) -> Tensor:
    """Series with gaps at any days → series at equal steps from the first day to the last, linear between neighbours.

    Args:
        x: series; NaN where there is no observation, such as under clouds.
        length: T, steps of the result.
        days: when the observations were, increasing; equally spaced unless given.

    Shape:
        (…, observations) → (…, length). Before the first observation and after the last one their values stay; a series
        without any is NaN.

    Raises:
        ValueError: no observations, or days of another number or order.

    Example:
        >>> resample_series(torch.tensor([1.0, torch.nan, 3.0, 9.0]), 3, [0, 5, 10, 20])
        tensor([1., 3., 9.])

    Reference: arXiv 2306.17207.
    """
    check_positive("length", length)
    count = x.shape[-1]
    check(count > 0 and x.is_floating_point(), "x", tuple(x.shape), "needs observations in floating point")
    at = torch.arange(count, device=x.device) if days is None else torch.as_tensor(days, device=x.device)
    at = at.to(torch.float64)
    ordered = days is None or (at.shape == (count,) and bool((at.diff() > 0).all()))
    check(ordered, "days", tuple(at.shape), f"needs {count} increasing numbers, one an observation")
    steps = torch.linspace(0, 1, length, dtype=at.dtype, device=x.device) * (at[-1] - at[0]) + at[0]
    # The nearest observation at or before each step, and at or after it.
    index = torch.arange(count, device=x.device)
    seen = ~x.isnan()
    before = torch.where(seen, index, -1).cummax(-1).values
    after = torch.where(seen, index, count).flip(-1).cummin(-1).values.flip(-1)
    left = before[..., (torch.searchsorted(at, steps, right=True) - 1).clamp(0, count - 1)]
    right = after[..., torch.searchsorted(at, steps).clamp(0, count - 1)]
    left, right = torch.where(left < 0, right, left), torch.where(right >= count, left, right)
    left, right = left.clamp(0, count - 1), right.clamp(0, count - 1)  # series without observations
    gap = at[right] - at[left]
    share = ((steps - at[left]) / torch.where(gap > 0, gap, 1)).clamp(0, 1).to(x.dtype)
    return torch.lerp(x.gather(-1, left), x.gather(-1, right), share)


class IndexSeries(nn.Module):
    """Series of bands → vegetation indices, their gaps filled, at equal steps, standardised as :meth:`fit` saw them.

    Args:
        band_order: what the channels of the input are, such as ("B3", "B4", "B5", "B8", "B8A").
        length: T, steps of the result; unset, as many as there are observations.
        indices: of :func:`~torchconv.ops.ffdnn_series.vegetation_index`.
        band_map, soil_slope, clair_alpha, wdvi_inf, clip: of the indices, see there.
        smallest: reflectances below are raised to this; clouds and shadows make red vanish, and TCARI divides by it.

    Shape:
        (N, bands, observations), NaN for gaps, days: (observations,) or None → (N, indices, T). Where an index has no
        value, such as a quotient by 0 in shadows, it is a gap too. Series that are all gap stay NaN.

    Raises:
        ValueError: an unknown index, a band that an index needs and ``band_order`` lacks, or other channels.

    Example:
        >>> front = IndexSeries(("B3", "B4", "B5", "B8", "B8A"), length=24)
        >>> front.fit(torch.rand(50, 5, 30))(torch.rand(3, 5, 30)).shape
        torch.Size([3, 2, 24])

    Reference: arXiv 2306.17207.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        band_order: Sequence[str],
        length: int | None = None,
        indices: Sequence[str] = ("lai_clair", "tcari_osavi"),
        band_map: Mapping[str, str] | None = None,
        *,
        soil_slope: float = 1.0,
        clair_alpha: float = 0.4,
        wdvi_inf: float = 0.65,
        clip: float = 1e-6,
        smallest: float = 1e-4,
    ) -> None:
        super().__init__()
        if length is not None:
            check_positive("length", length)
        check(len(indices) > 0, "indices", indices, "needs one or more")
        for name in indices:
            check_choice("indices", name, INDICES)
        for role in band_map or ():
            check_choice("band_map", role, SENTINEL2)
        check(len(set(band_order)) == len(band_order), "band_order", tuple(band_order), "names a band twice")
        self.band_order, self.length = tuple(band_order), length
        self.indices, self.smallest = tuple(indices), smallest
        options: dict[str, Any] = {"soil_slope": soil_slope, "clair_alpha": clair_alpha, "wdvi_inf": wdvi_inf}
        self.options: dict[str, Any] = {"band_map": dict(band_map or {}), **options, "clip": clip}
        self.register_buffer("mean", torch.zeros(len(indices)))
        self.register_buffer("std", torch.ones(len(indices)))
        self.raw(torch.ones(1, len(self.band_order), 1))  # a missing band is said now

    def raw(self, x: Tensor, days: Sequence[float] | Tensor | None = None) -> Tensor:
        """The indices at equal steps, as they are."""
        if x.dim() != 3 or x.shape[1] != len(self.band_order):
            raise ValueError(f"x of shape {tuple(x.shape)}: expected (N, {len(self.band_order)}, T), {self.band_order}")
        bands = dict(zip(self.band_order, x.clamp(min=self.smallest).unbind(1), strict=True))
        values = torch.stack([vegetation_index(name, bands, **self.options) for name in self.indices], 1)
        values = torch.where(values.isfinite(), values, torch.nan)
        return resample_series(values, self.length or x.shape[2], days)

    @torch.no_grad()
    def fit(self, x: Tensor, days: Sequence[float] | Tensor | None = None) -> IndexSeries:
        """Take mean and standard deviation of each index from the training set."""
        values = self.raw(x, days).movedim(1, 0).flatten(1)
        count = (~values.isnan()).sum(1)
        check(bool((count > 0).all()), "x", tuple(x.shape), "holds no observation")
        mean = values.nansum(1) / count
        variance = (values - mean[:, None]).square().nansum(1) / count
        self.mean.copy_(mean)
        self.std.copy_(torch.where(variance > 0, variance.sqrt(), 1))
        return self

    def forward(self, x: Tensor, days: Sequence[float] | Tensor | None = None) -> Tensor:
        """The indices, standardised."""
        return (self.raw(x, days) - self.mean[:, None]) / self.std[:, None]

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"{self.band_order}, length={self.length}, indices={self.indices}"
