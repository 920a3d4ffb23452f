"""Scores of forecasts on a globe: weights of rows, identities, averages in the right order."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchconv.training.weather import (
    LeadScores,
    acc,
    activity,
    bias,
    climatology,
    latitude_weights,
    mae,
    mse,
    rmse,
    spatial_mean,
    weighted_l1,
)

POLES = torch.linspace(-90, 90, 7)
CENTRES = torch.linspace(-81, 81, 10)


def fields(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestWeights:
    @pytest.mark.parametrize("kind", ["area", "cosine"])
    @pytest.mark.parametrize("latitude", [POLES, CENTRES])
    def test_symmetric_with_mean_one(self, latitude: Tensor, kind: str) -> None:
        weights = latitude_weights(latitude, kind)
        torch.testing.assert_close(weights.mean(), torch.tensor(1.0).double())
        torch.testing.assert_close(weights, weights.flip(0))
        torch.testing.assert_close(latitude_weights(latitude.flip(0), kind), weights)

    def test_are_the_areas_of_the_cells(self) -> None:
        rows = [-70.0, -50.0, 10.0, 30.0, 85.0]
        bounds = np.sin(np.radians([-90, -60, -20, 20, 57.5, 90]))
        expected = torch.from_numpy(np.diff(bounds) * 5 / 2)
        torch.testing.assert_close(latitude_weights(rows), expected)
        torch.testing.assert_close(latitude_weights(rows[::-1]), expected.flip(0))

    def test_poles_count_in_area_only(self) -> None:
        assert latitude_weights(POLES, "cosine")[0].abs() < 1e-12
        assert latitude_weights(POLES)[0] > 0.05

    def test_a_part_of_the_globe(self) -> None:
        part, globe = torch.linspace(50, 58, 33), torch.linspace(-90, 90, 721)
        near = (globe >= 50) & (globe <= 58)
        expected = latitude_weights(globe)[near]
        torch.testing.assert_close(latitude_weights(part, poles=False), expected / expected.mean(), rtol=1e-6, atol=0)
        assert latitude_weights(part).max() > 10

    @pytest.mark.parametrize(
        ("latitude", "options", "named"),
        [
            ([0.0, 10.0, 5.0], {}, "from row to row"),
            ([0.0, 95.0], {}, "±90"),
            ([], {}, "one axis"),
            ([45.0], {"poles": False}, "2 rows"),
            ([0.0, 10.0], {"kind": "cos"}, "kind='cos'"),
        ],
    )
    def test_bad_arguments(self, latitude: Any, options: dict[str, Any], named: str) -> None:
        with pytest.raises(ValueError, match=named):
            latitude_weights(latitude, **options)


class TestScores:
    @settings(max_examples=20, deadline=None)
    @given(st.integers(2, 9), st.integers(1, 6), st.floats(-3, 3), st.integers(0, 99))
    def test_a_constant_error(self, rows: int, columns: int, error: float, seed: int) -> None:
        weights = latitude_weights(torch.linspace(-90, 90, rows))
        truth = fields(3, rows, columns, seed=seed)
        forecast = truth + error
        expected = torch.full((3,), error, dtype=torch.float64)
        torch.testing.assert_close(bias(forecast, truth, weights), expected)
        torch.testing.assert_close(mae(forecast, truth, weights), expected.abs())
        torch.testing.assert_close(mse(forecast, truth, weights), expected.square())
        for root in ("after", "before"):
            torch.testing.assert_close(rmse(forecast, truth, weights, root=root), expected[0].abs())

    def test_anomaly_correlation(self) -> None:
        weights = latitude_weights(POLES)
        truth, climatology = fields(4, 7, 5), fields(7, 5, seed=1)
        ones = torch.ones(4, dtype=torch.float64)
        torch.testing.assert_close(acc(truth, truth, climatology, weights), ones)
        torch.testing.assert_close(acc(2 * climatology - truth, truth, climatology, weights), -ones)
        forecast = fields(4, 7, 5, seed=2)
        scaled = climatology + 7 * (forecast - climatology)
        value = acc(forecast, truth, climatology, weights)
        torch.testing.assert_close(acc(scaled, truth, climatology, weights), value)
        assert (value.abs() < 1).all()
        # Not centred again: a common shift of the anomalies counts.
        assert (acc(forecast + 5, truth + 5, climatology, weights) > 0.9).all()

    def test_order_of_root_and_mean(self) -> None:
        forecast, truth = fields(6, 2, 7, 5), 0 * fields(6, 2, 7, 5)
        scale = torch.arange(1.0, 7)[:, None, None, None]
        after, before = (rmse(forecast * scale, truth, root=root) for root in ("after", "before"))
        assert after.shape == (2,)
        assert (after > before).all()
        moved = rmse((forecast * scale).movedim(0, 1), truth.movedim(0, 1), axis=1)
        torch.testing.assert_close(moved, after)

    def test_activity(self) -> None:
        x = fields(3, 7, 5)
        expected = torch.stack([f.std(correction=0) for f in x])
        torch.testing.assert_close(activity(x + 2, torch.full((7, 5), 2.0).double()), expected)
        torch.testing.assert_close(activity(0.5 * x + 9, torch.zeros(7, 5).double()), 0.5 * expected)

    def test_regions_look_at_nothing_else(self) -> None:
        x = fields(2, 7, 5)
        mask = torch.zeros(7, 5)
        mask[2:4, :3] = 1
        weights = latitude_weights(POLES)[:, None] * mask
        expected = (x[:, 2:4, :3] * weights[2:4, :3]).sum((1, 2)) / weights.sum()
        x[:, 0] = torch.nan
        torch.testing.assert_close(spatial_mean(x, weights), expected)

    def test_half_precision_is_averaged_in_single(self) -> None:
        height = torch.full((1, 4, 8), 5e4, dtype=torch.float16)
        assert float(rmse(height, height - 2000)) == pytest.approx(2000, rel=0.02)
        x = torch.ones(1, 64, 64, dtype=torch.bfloat16)
        for weights in (None, latitude_weights(torch.linspace(-80, 80, 64))):
            y = spatial_mean(x, weights)
            assert y.dtype == torch.float32
            assert abs(float(y) - 1) < 1e-5

    def test_bad_arguments(self) -> None:
        with pytest.raises(ValueError, match=r"weights=\(5,\)"):
            spatial_mean(fields(2, 7, 5), torch.ones(5))
        with pytest.raises(ValueError, match=r"x=\(7,\)"):
            spatial_mean(fields(7))
        with pytest.raises(ValueError, match="root='never'"):
            rmse(fields(2, 7, 5), fields(2, 7, 5), root="never")


class TestClimatology:
    TIMES = np.datetime64("2019-12-20T00", "h") + np.arange(0, 4 * 366 * 24, 6).astype("timedelta64[h]")

    @pytest.mark.parametrize("window", [1, 5, None])
    def test_is_the_mean_of_the_same_hour_and_time_of_year(self, window: int | None) -> None:
        values = fields(len(self.TIMES), 2, 3)
        valid = ["2024-01-01T06:00", "2024-12-31T18:00", "2023-06-15T00:00"]
        for text, found in zip(valid, climatology(values, self.TIMES, valid, window), strict=True):
            when = datetime.fromisoformat(text)
            day, chosen = when.timetuple().tm_yday, []
            for index, time in enumerate(self.TIMES.astype("datetime64[s]").tolist()):
                apart = abs(time.timetuple().tm_yday - day)
                near = window is None or min(apart, 366 - apart) <= window // 2
                if time.hour == when.hour and near:
                    chosen.append(index)
            torch.testing.assert_close(found, values[chosen].mean(0))

    def test_makes_anomalies_that_correlate(self) -> None:
        values = fields(len(self.TIMES), 7, 5)
        expected = climatology(values, self.TIMES, self.TIMES[:3])
        torch.testing.assert_close(acc(values[:3], values[:3], expected), torch.ones(3).double())
        assert torch.equal(expected[:1], climatology(values, self.TIMES, self.TIMES[0]))

    def test_bad_arguments(self) -> None:
        values, times = fields(2, 3), ["2020-01-01T06:00", "2020-02-01T06:00"]
        with pytest.raises(ValueError, match="times=1"):
            climatology(values, times[:1], times)
        with pytest.raises(ValueError, match="window=4"):
            climatology(values, times, times, 4)
        with pytest.raises(ValueError, match=r"day 15, 6 h.*within 3 days"):
            climatology(values, times, "2021-01-15T06:00", 3)
        with pytest.raises(ValueError, match=r"day 15, 7 h.*no field of that hour"):
            climatology(values, times, "2021-01-15T07:00", None)


class TestLoss:
    def test_weighs_rows_and_channels(self) -> None:
        forecast, truth, scale = fields(2, 3, 7, 5), fields(2, 3, 7, 5, seed=1), torch.tensor([1.0, 10.0, 0.5])
        weights = latitude_weights(POLES)
        expected = ((forecast - truth).abs() * weights[:, None] / scale[:, None, None]).mean()
        torch.testing.assert_close(weighted_l1(forecast, truth, weights, scale), expected)
        torch.testing.assert_close(weighted_l1(forecast, truth), (forecast - truth).abs().mean())

    def test_bad_scale(self) -> None:
        with pytest.raises(ValueError, match=r"scale=\(2,\)"):
            weighted_l1(fields(2, 3, 7, 5), fields(2, 3, 7, 5), scale=torch.ones(2))


class TestLeads:
    def test_equals_all_at_once(self) -> None:
        weights = latitude_weights(POLES)
        forecast, truth, climatology = (fields(9, 2, 3, 7, 5, seed=s) for s in range(3))  # start, lead, channel, …
        scores = LeadScores(2, weights)
        for rows in (slice(0, 4), slice(4, 9)):
            for lead in range(2):
                scores.update(lead, forecast[rows, lead], truth[rows, lead], climatology[rows, lead])
        found = scores.compute()
        torch.testing.assert_close(found["rmse"], rmse(forecast, truth, weights))
        torch.testing.assert_close(found["rmse_mean"], rmse(forecast, truth, weights, root="before"))
        torch.testing.assert_close(found["bias"], bias(forecast, truth, weights).mean(0))
        torch.testing.assert_close(found["mae"], mae(forecast, truth, weights).mean(0))
        torch.testing.assert_close(found["acc"], acc(forecast, truth, climatology, weights).mean(0))
        torch.testing.assert_close(found["activity"], activity(forecast, climatology, weights).mean(0))
        torch.testing.assert_close(found["activity_truth"], activity(truth, climatology, weights).mean(0))

    def test_without_climatology(self) -> None:
        scores = LeadScores(1)
        assert scores.compute() == {}
        scores.update(0, fields(2, 3, 7, 5), fields(2, 3, 7, 5))
        assert "acc" not in scores.compute()

    def test_bad_arguments(self) -> None:
        scores = LeadScores(1)
        with pytest.raises(ValueError, match="lead=1"):
            scores.update(1, fields(2, 3, 7, 5), fields(2, 3, 7, 5))
        with pytest.raises(ValueError, match="like the truth"):
            scores.update(0, fields(2, 3, 7, 5), fields(2, 3, 7, 4))
        with pytest.raises(ValueError, match="leads=0"):
            LeadScores(0)
