"""Forecasts step by step: the time that a network is told, stages that take over from one another, training on them.

Zhu et al. 2024, "PuYun", arXiv 2409.02123, section 3; names and time encoding as in the authors' inference plug-in.

A network maps (states at t − 6 h and t, time) to the state at t + 6 h, which is fed back. A cascade holds one for every
stage; step s, counted from 0, is made by stage min(s // 20, last): five days each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import checkpoint as recompute

from torchconv._common import check, check_positive
from torchconv.catalog import part

STAGES = ("short", "medium", "long")
Moment = str | datetime | np.datetime64


def calendar(times: Moment | Sequence[Moment]) -> tuple[np.ndarray, np.ndarray]:
    """Day of the year, from 1, and full hour of each time.

    Raises:
        ValueError: one is no time.

    Example:
        >>> calendar(["2020-12-31T18:30", "2021-01-01T00:00"])
        (array([366,   1]), array([18,  0]))
    """
    return _calendar(_moments(times))


def _calendar(times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    days = times.astype("datetime64[D]")
    day_of_year = (days - times.astype("datetime64[Y]").astype("datetime64[D]")).astype(np.int64) + 1
    return day_of_year, (times - days).astype("timedelta64[h]").astype(np.int64)


def _moments(times: Moment | Sequence[Moment]) -> np.ndarray:
    several = [times] if isinstance(times, str | datetime | np.datetime64) else list(times)
    return np.array([_moment(t) for t in several], dtype="datetime64[us]")


def _moment(start: Moment) -> Any:
    """Naive, in UTC."""
    if isinstance(start, str):
        try:
            start = datetime.fromisoformat(start)
        except ValueError:
            raise ValueError(f"start={start!r}: write it like '2020-01-01T06:00'") from None
    if isinstance(start, datetime) and start.tzinfo is not None:
        start = start.astimezone(UTC).replace(tzinfo=None)
    moment = np.array(start, dtype="datetime64[us]")[()]
    check(not np.isnat(moment), "start", start, "is no time")
    return moment


def time_encoding(
    start: Moment | Sequence[Moment],
    steps: int,
    hours: float = 6,
    history: int = 2,
    periodic: bool = False,
) -> Tensor:
    """What the network is told about the time, for every step of a forecast.

    Step s is told of the times of its inputs and of its output, start + (s − 1, s, s + 1) · hours: for each
    sin(day / 366), sin(hour / 24), cos(day / 366), cos(hour / 24), with the day of the year from 1 and full hours, in
    radians as published, so that a year or a day does not close to a circle.

    Args:
        start: the time of the newest input, UTC; several for a batch of forecasts.
        steps: ≥ 1.
        hours: between states.
        history: input states, of which each adds four numbers.
        periodic: multiply the angles by 2π.

    Shape:
        → (steps, batch, 4 · (history + 1)), float32; the batch is 1 for a single start.

    Raises:
        ValueError: a number out of range, or a start that is no time.

    Example:
        >>> time_encoding("2020-01-01T00:00", 40).shape
        torch.Size([40, 1, 12])

    Reference: arXiv 2409.02123, section 3; the formula is the inference plug-in's.
    """
    check_positive("steps", steps)
    check_positive("history", history)
    check(hours > 0, "hours", hours, "must be positive")
    begin = _moments(start)
    offsets = [round(i * hours * 3_600_000_000) for i in range(1 - history, steps + 1)]
    times = begin + np.array(offsets, dtype="timedelta64[us]")[:, None]
    day_of_year, hour = _calendar(times)
    angles = torch.from_numpy(np.stack((day_of_year / 366, hour / 24), -1)).float()
    angles = angles * (2 * torch.pi) if periodic else angles
    features = torch.cat((angles.sin(), angles.cos()), -1)
    # Step by step a window over the times: (steps, batch, 4, history + 1), then time by time.
    return features.unfold(0, history + 1, 1).transpose(2, 3).flatten(2)


@part(
    "cascade",
    paper="puyun",
    kind="model",
    dims=(2,),
    keywords="autoregressive roll-out forecast stages short medium long lead time weather",
)
class Cascade(nn.Module):
    """Networks that take over from one another: step s is made by stage min(s // steps_per_stage, last).

    Args:
        stages: networks (x, time) → next state, by name or in order (then called short, medium, long).
        steps_per_stage: 20 as published, five days of six-hourly steps.

    Raises:
        ValueError: no stages, or more than three without names.

    Example:
        >>> from torchconv.models.forecast.puyun import PuYun
        >>> cascade = Cascade([PuYun(4, dim=8, depth=1, patch=2) for _ in range(2)])
        >>> [cascade.stage_index(s) for s in (0, 19, 20, 40)]
        [0, 0, 1, 1]

    Reference: arXiv 2409.02123, section 3 (two stages); the plug-in's file list has a third.
    """

    def __init__(self, stages: Mapping[str, nn.Module] | Sequence[nn.Module], steps_per_stage: int = 20) -> None:
        super().__init__()
        check(len(stages) >= 1, "stages", stages, "needs at least one network")
        check_positive("steps_per_stage", steps_per_stage)
        if not isinstance(stages, Mapping):
            check(len(stages) <= len(STAGES), "stages", len(stages), "give more than three as a mapping with names")
            stages = dict(zip(STAGES, stages, strict=False))
        self.stages = nn.ModuleDict(dict(stages))
        self.steps_per_stage = steps_per_stage

    def stage_index(self, step: int) -> int:
        """The number of the stage that makes step ``step``, both from 0."""
        check_positive("step", step, zero=True)
        return min(step // self.steps_per_stage, len(self.stages) - 1)

    def stage(self, step: int) -> nn.Module:
        """The network that makes step ``step``."""
        return list(self.stages.values())[self.stage_index(step)]

    def forward(self, x: Tensor, time: Tensor, step: int = 0) -> Tensor:
        """The state after ``x`` (N, T, C, H, W), made by the stage of ``step``."""
        following: Tensor = self.stage(step)(x, time)
        return following


Model = Callable[..., Tensor]


def _advance(model: Model, step: int, time: Tensor, *history: Tensor) -> Tensor:
    network = model.stage(step) if isinstance(model, Cascade) else model
    following = network(torch.stack(history, 1), time)
    fits = isinstance(following, Tensor) and following.shape == history[-1].shape
    got = tuple(following.shape) if isinstance(following, Tensor) else type(following).__name__
    check(fits, "model", got, f"must return the next state, of shape {tuple(history[-1].shape)}")
    return following


def _check_states(x: Tensor, times: Tensor) -> None:
    check(x.dim() == 5 and x.shape[1] >= 1, "x", tuple(x.shape), "expected states (N, T, C, H, W), the newest last")
    remedy = f"expected (steps, 1 or {x.shape[0]}, features), see time_encoding()"
    check(times.dim() == 3 and times.shape[1] in (1, x.shape[0]), "times", tuple(times.shape), remedy)


def rollout(model: Model, x: Tensor, times: Tensor, *, first: int = 0) -> Iterator[Tensor]:
    """Forecast step by step; only the newest states are held.

    Args:
        model: (states, time) → next state, or a :class:`Cascade`.
        x: the states known, oldest first.
        times: what each step is told, see :func:`time_encoding`; as many steps are made.
        first: number of the first step, which decides the cascade's stage.

    Shape:
        (N, T, C, H, W) → one (N, C, H, W) after the other. Gradients flow; call it under ``torch.inference_mode()`` to
        forecast.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> drift = lambda x, time: x[:, -1] + 1
        >>> times = time_encoding("2020-01-01", 3)
        >>> [float(s.mean()) for s in rollout(drift, torch.zeros(1, 2, 4, 8, 16), times)]
        [1.0, 2.0, 3.0]
    """
    _check_states(x, times)
    check_positive("first", first, zero=True)
    return _steps(model, list(x.unbind(1)), times, first)


def _steps(model: Model, history: list[Tensor], times: Tensor, first: int) -> Iterator[Tensor]:
    for step, time in enumerate(times, first):
        history = [*history[1:], _advance(model, step, time, *history)]
        yield history[-1]


def rollout_loss(
    model: Model,
    x: Tensor,
    targets: Tensor,
    times: Tensor,
    steps: int | None = None,
    *,
    start_model: Model | None = None,
    start_steps: int = 0,
    checkpoint: bool = True,
    loss: Callable[[Tensor, Tensor], Tensor] = F.l1_loss,
) -> Tensor:
    """The mean loss over the steps of a forecast, differentiable through all of them.

    For a later stage, ``start_model`` first makes the states that this stage will see, without gradient.

    Args:
        model: (states, time) → next state, or a :class:`Cascade`.
        x: the states known, oldest first.
        targets: the states to be forecast, those after the first ``start_steps``.
        times: what each step is told, those of the start included.
        steps: how many of the targets to forecast; all by default. Training raises it bit by bit.
        start_model: of the first ``start_steps`` steps; put it into eval mode.
        start_steps: ≥ 0.
        checkpoint: keep only the states of the steps and compute each step again in the backward pass.
        loss: of a forecast and its target, both (N, C, H, W); mean absolute error by default, see
            :func:`torchconv.training.weather.weighted_l1`.

    Shape:
        (N, T, C, H, W), (N, K, C, H, W), (start_steps + K, 1 or N, features) → a scalar.

    Raises:
        ValueError: shapes or numbers that do not fit.

    Example:
        >>> drift = lambda x, time: x[:, -1] + 1
        >>> times = time_encoding("2020-01-01", 5)
        >>> targets = torch.full((2, 3, 4, 8, 16), 5.0)
        >>> rollout_loss(drift, torch.zeros(2, 2, 4, 8, 16), targets, times, start_model=drift, start_steps=2)
        tensor(1.)
    """
    _check_states(x, times)
    check_positive("start_steps", start_steps, zero=True)
    needed = start_model is not None or start_steps == 0
    check(needed, "start_steps", start_steps, "give the start_model that makes them")
    same = targets.dim() == 5 and (targets.shape[0], *targets.shape[2:]) == (x.shape[0], *x.shape[2:])
    check(same, "targets", tuple(targets.shape), f"expected (N, K, C, H, W) like x, {tuple(x.shape)}")
    steps = targets.shape[1] if steps is None else steps
    check_positive("steps", steps)
    check(steps <= targets.shape[1], "steps", steps, f"there are {targets.shape[1]} targets")
    remedy = f"has {len(times)} steps, {start_steps + steps} are made"
    check(len(times) >= start_steps + steps, "times", tuple(times.shape), remedy)
    history = list(x.unbind(1))
    if start_model is not None:
        with torch.no_grad():
            for step in range(start_steps):
                history = [*history[1:], _advance(start_model, step, times[step], *history)]
    total = x.new_zeros(())
    for index in range(steps):
        arguments: tuple[Any, ...] = (model, start_steps + index, times[start_steps + index], *history)
        following = (
            recompute.checkpoint(_advance, *arguments, use_reentrant=False) if checkpoint else _advance(*arguments)
        )
        total = total + loss(following, targets[:, index])
        history = [*history[1:], following]
    return total / steps
