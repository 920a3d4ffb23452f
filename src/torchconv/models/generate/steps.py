"""Which step of sampling a call belongs to, read from the time step that the network is called with."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from torchconv._common import check, check_positive

NAMES = ("timestep", "timesteps", "t", "time")


@dataclass(frozen=True)
class Steps:
    """The first, noisiest ``active`` of a sampler's ``total`` steps.

    Args:
        active: τ.
        total: N, the number of steps that the sampler takes.
        timesteps: the number of time steps in training, a multiple of N over which the sampler's are spread evenly, or
            the sampler's own, noisiest first.

    Raises:
        ValueError: an argument is out of range, or there are not N time steps.

    Example:
        >>> steps = Steps(30, 50)
        >>> [steps.index(t) for t in (981, 961, 401, 381, 1)]
        [0, 1, 29, 30, 49]
        >>> Steps(1, 3, timesteps=(999.0, 437.5, 12.0)).index(437.5)
        1
    """

    active: int
    total: int
    timesteps: float | tuple[float, ...] = 1000

    def __post_init__(self) -> None:
        check_positive("steps", self.total)
        check_positive("steps", self.active, zero=True)
        check(
            self.active <= self.total, "steps", (self.active, self.total), "the first steps of all: give (τ, N), τ ≤ N"
        )
        if isinstance(self.timesteps, tuple):
            fits = len(self.timesteps) == self.total
            check(fits, "timesteps", self.timesteps, f"steps has {self.total} steps, these are {len(self.timesteps)}")
        else:
            check(self.timesteps > 0, "timesteps", self.timesteps, "must be positive, or the sampler's own time steps")

    def index(self, timestep: float | Tensor) -> int:
        """The step, 0 the noisiest, at which a network is called with ``timestep``; one for the whole batch."""
        values = set(timestep.flatten().tolist()) if isinstance(timestep, Tensor) else {float(timestep)}
        if len(values) != 1:
            raise ValueError(f"timestep={timestep!r}: the whole batch must be at one step")
        (t,) = values
        if isinstance(self.timesteps, tuple):
            return min(range(self.total), key=lambda i: abs(self.timesteps[i] - t))  # type: ignore[index]
        # Samplers call step i at a time between (N − i − 1)·T/N and (N − i)·T/N, some at either end.
        passed = math.ceil(self.total * (1 - t / self.timesteps) - 1e-6) - 1
        return min(max(passed, 0), self.total - 1)


def as_steps(steps: int | Sequence[int], timesteps: Any) -> Steps:
    """``Steps`` from what a user gives: (τ, N), or τ where ``timesteps`` lists all (a sequence or a tensor)."""
    values = timesteps.tolist() if isinstance(timesteps, Tensor) else timesteps
    listed = tuple(float(t) for t in values) if isinstance(values, Sequence) else float(values)
    if isinstance(steps, int) and isinstance(listed, tuple):
        return Steps(steps, len(listed), listed)
    pair = not isinstance(steps, int) and len(steps) == 2
    check(pair, "steps", steps, "give (τ, N), the first τ of N steps, or τ and the sampler's own timesteps")
    active, total = steps  # type: ignore[misc]
    return Steps(active, total, listed)


@dataclass(frozen=True)
class Argument:
    """One argument of a network's ``forward``: its name, and its place among the positional ones."""

    name: str
    place: int | None

    @classmethod
    def timestep(cls, network: nn.Module, name: str | None = None) -> Argument:
        """The argument with the time step, found by one of the usual names, or the one called ``name``.

        Raises:
            ValueError: ``forward`` has none.
        """
        parameters = inspect.signature(network.forward).parameters
        wanted = NAMES if name is None else (name,)
        found = next((n for n in wanted if n in parameters), None)
        if found is None:
            takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
            if name is not None and takes_all:
                return cls(name, None)
            has = f"forward of {type(network).__name__} takes {', '.join(parameters)}"
            remedy = "name the one with the time step, or change the network for all steps and use the original after"
            raise ValueError(f"argument={name!r}: {has}; {remedy}")
        positional = parameters[found].kind is not inspect.Parameter.KEYWORD_ONLY
        return cls(found, list(parameters).index(found) if positional else None)

    def read(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Its value in a call.

        Raises:
            ValueError: it was not given.
        """
        if self.name in kwargs:
            return kwargs[self.name]
        given = self.place is not None and self.place < len(args)
        check(given, self.name, None, "the network was called without it, and the step follows from it")
        assert self.place is not None
        return args[self.place]
