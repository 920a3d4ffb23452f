"""Scores and losses of forecasts on a globe, weighted by the area of the rows.

The definitions are WeatherBench 2's (Rasp et al. 2023, arXiv 2308.15560). With w the weights of the rows (mean 1),
⟨·⟩ the weighted mean over latitude and longitude, f the forecast, o the truth and c the climatology at the valid time:

    MSE_t = ⟨(f − o)²⟩     MAE_t = ⟨|f − o|⟩     bias_t = ⟨f − o⟩
    RMSE = √(mean_t MSE_t), or mean_t √MSE_t in many papers
    ACC_t = ⟨f'o'⟩ / √(⟨f'²⟩⟨o'²⟩),  f' = f − c,  o' = o − c, anomalies that are not centred again
    activity_t = √⟨(f' − ⟨f'⟩)²⟩: forecasts that blur have less of it than the truth

Fields are (…, latitude, longitude); scores have the axes before these two.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from torchconv._common import check, check_choice, check_positive
from torchconv.catalog import part
from torchconv.kernels.precision import widen
from torchconv.models.forecast.puyun_rollout import Moment, calendar

WEIGHTS = ("area", "cosine")
ROOTS = ("after", "before")


def latitude_weights(latitude: Tensor | Sequence[float], kind: str = "area", poles: bool = True) -> Tensor:
    """Weights of the rows of a grid, with mean 1.

    Args:
        latitude: degrees, increasing or decreasing.
        kind: "area", the cells' share of the sphere: sin(upper) − sin(lower), with bounds half-way between rows;
            "cosine", cos(latitude), which is 0 at a pole where the area is not.
        poles: the outermost cells reach the poles. False, for a part of the globe: half a spacing beyond the last row.

    Shape:
        (H,) → (H,), float64.

    Raises:
        ValueError: fewer than two rows (one for "cosine"), rows out of order or beyond ±90, or another kind.

    Example:
        >>> latitude_weights([-90, -45, 0, 45, 90])
        tensor([0.1903, 1.3530, 1.9134, 1.3530, 0.1903], dtype=torch.float64)

    Reference: arXiv 2308.15560, section 3.1; "cosine" as in GraphCast and FuXi.
    """
    check_choice("kind", kind, WEIGHTS)
    rows = torch.as_tensor(latitude).detach().to(torch.float64)
    shown = tuple(rows.shape)
    least = 1 if kind == "cosine" or poles else 2
    check(rows.dim() == 1 and len(rows) >= least, "latitude", shown, f"must be one axis of {least} rows or more")
    check(bool((rows.abs() <= 90).all()), "latitude", float(rows.abs().max()), "must lie within ±90 degrees")
    steps = rows.diff()
    ordered = bool((steps > 0).all()) or bool((steps < 0).all())
    check(ordered, "latitude", [float(r) for r in rows[:4]], "must increase, or decrease, from row to row")
    rows = rows.deg2rad()
    if kind == "cosine":
        weights = rows.cos()
    else:
        between = (rows[1:] + rows[:-1]) / 2
        if poles:
            end = torch.pi / 2 if len(rows) == 1 or rows[1] > rows[0] else -torch.pi / 2
            first, last = rows.new_tensor([-end]), rows.new_tensor([end])
        else:
            first, last = rows[:1] - (between[:1] - rows[:1]), rows[-1:] + (rows[-1:] - between[-1:])
            first, last = (b.clamp(-torch.pi / 2, torch.pi / 2) for b in (first, last))
        weights = torch.cat((first, between, last)).sin().diff().abs()
    return weights / weights.mean()


def spatial_mean(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """The weighted mean over latitude and longitude.

    Args:
        x: (…, H, W); half precision is averaged in float32.
        weights: ≥ 0, of the rows (H,) or of the cells (H, W); None weighs all alike. Where it is 0, ``x`` is not
            looked at: multiply by a mask to score a region.

    Shape:
        (…, H, W) → (…).

    Raises:
        ValueError: weights of another shape.

    Example:
        >>> spatial_mean(torch.tensor([[1.0, 1.0], [4.0, 4.0]]), torch.tensor([0.5, 1.5]))
        tensor(3.2500)
    """
    check(x.dim() >= 2, "x", tuple(x.shape), "expected (…, latitude, longitude)")
    x = widen(x)  # squares of geopotentials do not fit in half precision
    if weights is None:
        return x.mean((-2, -1))
    grid = tuple(x.shape[-2:])
    remedy = f"must have the grid's shape {grid} or be one weight a row"
    check(tuple(weights.shape) in (grid, grid[:1]), "weights", tuple(weights.shape), remedy)
    weights = weights.to(x)
    weights = (weights[:, None] if weights.dim() == 1 else weights).expand(grid)
    return (torch.where(weights > 0, x, 0) * weights).sum((-2, -1)) / weights.sum()


def mse(forecast: Tensor, truth: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean squared error of every field: (…, H, W), twice → (…)."""
    return spatial_mean((widen(forecast) - truth).square(), weights)


def mae(forecast: Tensor, truth: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean absolute error of every field: (…, H, W), twice → (…)."""
    return spatial_mean((widen(forecast) - truth).abs(), weights)


def bias(forecast: Tensor, truth: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of forecast − truth of every field: (…, H, W), twice → (…)."""
    return spatial_mean(widen(forecast) - truth, weights)


def rmse(
    forecast: Tensor, truth: Tensor, weights: Tensor | None = None, *, axis: int = 0, root: str = "after"
) -> Tensor:
    """Root mean squared error over an axis of times.

    Args:
        forecast, truth: (…, H, W), one of the axes before the last two being time.
        weights: see :func:`spatial_mean`.
        axis: that of the times.
        root: "after" the mean over the times (WeatherBench 2), or "before" it (many papers), which is never larger.

    Shape:
        (T, …, H, W) → (…).

    Raises:
        ValueError: another ``root``.

    Example:
        >>> errors = torch.tensor([3.0, 4.0])[:, None, None].expand(2, 4, 8)
        >>> rmse(errors, 0 * errors), rmse(errors, 0 * errors, root="before")
        (tensor(3.5355), tensor(3.5000))
    """
    check_choice("root", root, ROOTS)
    squared = mse(forecast, truth, weights)
    return squared.mean(axis).sqrt() if root == "after" else squared.sqrt().mean(axis)


def acc(forecast: Tensor, truth: Tensor, climatology: Tensor, weights: Tensor | None = None) -> Tensor:
    """Anomaly correlation of every field, in [−1, 1]; the mean over the times is the published score.

    Args:
        forecast, truth: (…, H, W).
        climatology: the field expected at the valid time, of the same shape or one that broadcasts.
        weights: see :func:`spatial_mean`.

    Shape:
        (…, H, W) → (…).

    Example:
        >>> truth = torch.randn(5, 8, 16)
        >>> acc(3 * truth, truth, torch.zeros(8, 16))
        tensor([1.0000, 1.0000, 1.0000, 1.0000, 1.0000])
    """
    forecast, truth = widen(forecast) - climatology, widen(truth) - climatology
    product, own, other = (spatial_mean(a * b, weights) for a, b in _pairs(forecast, truth))
    return product / (own * other).sqrt()


def _pairs(a: Tensor, b: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    return (a, b), (a, a), (b, b)


def climatology(
    fields: Tensor, times: Sequence[Moment], valid: Moment | Sequence[Moment], window: int | None = 61
) -> Tensor:
    """The field expected at each valid time: the mean over past fields of the same hour and time of the year.

    Args:
        fields: (T, …), of many years.
        times: of the fields, UTC.
        valid: the times to look up.
        window: days, odd, around the day of the year, all weighed alike; None for the mean of the hour of the day.

    Shape:
        (T, …) → (len(valid), …); a single valid time counts as one.

    Raises:
        ValueError: numbers that do not fit, or a valid time with no field in its window.

    Example:
        >>> fields, times = torch.tensor([1.0, 3.0, 9.0]), ["2020-01-01T06:00", "2021-01-02T06:00", "2021-01-01T18:00"]
        >>> climatology(fields, times, ["2022-01-01T06:00", "2022-01-01T18:00"], window=3)
        tensor([2., 9.])
    """
    check(len(times) == len(fields), "times", len(times), f"give one for each of the {len(fields)} fields")
    odd = window is None or (isinstance(window, int) and window >= 1 and window % 2 == 1)
    check(odd, "window", window, "must be an odd number of days, or None")
    days, hours = calendar(times)
    means = []
    for day, hour in zip(*calendar(valid), strict=True):
        near = hours == hour
        if window is not None:
            apart = abs(days - day)
            near &= np.minimum(apart, 366 - apart) <= window // 2
        remedy = "there is no field of that hour" + ("" if window is None else f" within {window} days; widen window")
        check(bool(near.any()), "valid", f"day {day}, {hour} h", remedy)
        means.append(fields[torch.from_numpy(near.nonzero()[0])].mean(0))
    return torch.stack(means)


def activity(fields: Tensor, climatology: Tensor, weights: Tensor | None = None) -> Tensor:
    """Standard deviation of the anomalies of every field: (…, H, W) → (…)."""
    anomaly = widen(fields) - climatology
    centred = anomaly - spatial_mean(anomaly, weights)[..., None, None]
    return spatial_mean(centred.square(), weights).sqrt()


def weighted_l1(forecast: Tensor, truth: Tensor, weights: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """The training loss: absolute errors in units of ``scale``, weighted by latitude, and their mean.

    Args:
        forecast, truth: (…, C, H, W).
        weights: see :func:`spatial_mean`.
        scale: (C,), the size of an error that counts as 1: standard deviations, or those of six-hourly changes.

    Shape:
        (…, C, H, W) → a scalar.

    Example:
        >>> weighted_l1(torch.zeros(2, 3, 4, 8), torch.ones(2, 3, 4, 8), latitude_weights([-60, -20, 20, 60]))
        tensor(1.)

    Reference: PuYun is trained like FuXi (arXiv 2306.12873, equation 1).
    """
    errors = mae(forecast, truth, weights)
    if scale is not None:
        remedy = f"one number for each of the {errors.shape[-1:]} channels"
        check(tuple(scale.shape) == tuple(errors.shape[-1:]), "scale", tuple(scale.shape), remedy)
        errors = errors / scale.to(errors)
    return errors.mean()


@part(
    "weather-scores",
    paper="puyun",
    kind="analysis",
    dims=(2,),
    keywords="WeatherBench RMSE ACC anomaly correlation bias activity latitude weights forecast verification",
)
class LeadScores:
    """Scores by lead time and channel, summed up forecast by forecast so that none has to be kept.

    Args:
        leads: number of lead times.
        weights: see :func:`spatial_mean`.

    Example:
        >>> scores = LeadScores(2)
        >>> for lead in range(2):
        ...     scores.update(lead, torch.full((5, 3, 4, 8), 2.0), torch.zeros(5, 3, 4, 8))
        >>> scores.compute()["rmse"].shape, scores.compute()["rmse"][0, 0]
        (torch.Size([2, 3]), tensor(2., dtype=torch.float64))
    """

    def __init__(self, leads: int, weights: Tensor | None = None) -> None:
        check_positive("leads", leads)
        self.leads, self.weights = leads, weights
        self.totals: dict[str, Tensor] = {}
        self.counts = torch.zeros(leads, dtype=torch.int64)

    @torch.no_grad()
    def update(self, lead: int, forecast: Tensor, truth: Tensor, climatology: Tensor | None = None) -> None:
        """Add forecasts of one lead time.

        Args:
            lead: 0 for the first step.
            forecast, truth: (N, C, H, W), one for each initial time.
            climatology: at the valid times; without it there is no ACC and no activity.

        Raises:
            ValueError: a lead out of range, or fields of different shapes.
        """
        check(0 <= lead < self.leads, "lead", lead, f"must be 0 to {self.leads - 1}")
        same = forecast.dim() == 4 and forecast.shape == truth.shape
        remedy = f"expected (N, C, H, W) like the truth, {tuple(truth.shape)}"
        check(same, "forecast", tuple(forecast.shape), remedy)
        squared = mse(forecast, truth, self.weights)
        found = {"mse": squared, "rmse_mean": squared.sqrt()}
        found |= {"mae": mae(forecast, truth, self.weights), "bias": bias(forecast, truth, self.weights)}
        if climatology is not None:
            found["acc"] = acc(forecast, truth, climatology, self.weights)
            found["activity"] = activity(forecast, climatology, self.weights)
            found["activity_truth"] = activity(truth, climatology, self.weights)
        for name, values in found.items():
            total = self.totals.setdefault(name, torch.zeros(self.leads, forecast.shape[1], dtype=torch.float64))
            total[lead] += values.double().sum(0).cpu()
        self.counts[lead] += len(forecast)

    def compute(self) -> dict[str, Tensor]:
        """Means over the initial times, each (leads, C): "rmse" (root after the mean), "rmse_mean" (before), "mse",
        "mae", "bias", and with a climatology "acc", "activity" and "activity_truth"."""
        means = {name: total / self.counts[:, None] for name, total in self.totals.items()}
        return {"rmse": means["mse"].sqrt(), **means} if means else {}
