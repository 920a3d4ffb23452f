"""Equal budgets: the width of each candidate is solved so that it costs what the baseline costs.

Cost is the number of stored parameters, multiply-adds of the inference form, or its measured latency. ``width`` is
searched by bisection, then ``fine`` (one inner width) closes the gap; among sizes within the tolerance the one whose
proportions are nearest to nominal wins.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchconv._common import check_choice
from torchconv.analysis.count import count
from torchconv.analysis.latency import paired_latency
from torchconv.compare.nets import Candidate, Net, Shape
from torchconv.surgery.merging import merge, stored_parameters

MATCHES = ("params", "macs", "latency", "none")
TOLERANCE = 0.02
Cost = Callable[[int, int], float]


@dataclass(frozen=True)
class Match:
    """The size chosen for a candidate and how near it came; ``relative_error`` is achieved / target − 1."""

    width: int
    fine: int
    target: float
    achieved: float

    @property
    def relative_error(self) -> float:
        """Signed distance from the target."""
        return self.achieved / self.target - 1 if self.target else 0.0

    def describe(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "relative_error": self.relative_error}


def _on_meta(net: Net, candidate: Candidate, shape: Shape, width: int, fine: int) -> tuple[nn.Module, Tensor]:
    with torch.device("meta"):
        return net.build(candidate, shape, width, fine).eval(), torch.empty(1, shape.channels, *shape.size)


def parameters_of(net: Net, candidate: Candidate, shape: Shape, width: int, fine: int) -> int:
    """Stored parameters of a candidate at a size."""
    return stored_parameters(_on_meta(net, candidate, shape, width, fine)[0])


def macs_of(net: Net, candidate: Candidate, shape: Shape, width: int, fine: int) -> int:
    """Multiply-adds of a candidate's inference form for one input."""
    model, x = _on_meta(net, candidate, shape, width, fine)
    return count(merge(model, x), x).macs


def _solve(cost: Cost, net: Net, start: int, step: int, target: float, tolerance: float) -> tuple[int, int, float]:
    seen: dict[tuple[int, int], float] = {}

    def at(width: int, fine: int) -> float:
        if (width, fine) not in seen:
            seen[width, fine] = cost(width, fine)
        return seen[width, fine]

    # The width at which the nominal proportions cross the target.
    low, high = step, start
    while at(high, net.fine(high)) < target and high < 4096 * step:
        low, high = high, 2 * high
    while high - low > step:
        middle = low + step * ((high - low) // (2 * step))
        low, high = (middle, high) if at(middle, net.fine(middle)) < target else (low, middle)
    # Around it, the inner width that hits the target.
    for width in {max(step, w) for w in (low - step, low, high, high + step)}:
        nominal = net.fine(width)
        below, above = max(1, nominal // 2), 2 * nominal
        while above - below > 1:
            middle = (below + above) // 2
            below, above = (middle, above) if at(width, middle) < target else (below, middle)
        at(width, below), at(width, above)

    def error(size: tuple[int, int]) -> float:
        return abs(seen[size] / target - 1)

    def distortion(size: tuple[int, int]) -> float:
        return abs(math.log(size[1] / net.fine(size[0])))

    near = [s for s in seen if error(s) <= tolerance / 2] or [s for s in seen if error(s) <= tolerance]
    best = min(near, key=lambda s: (distortion(s), error(s))) if near else min(seen, key=error)
    return (*best, seen[best])


def _latency_ratio(model: nn.Module, baseline: nn.Module, x: Tensor, min_seconds: float) -> float:
    """Median of the paired ratios model / baseline."""
    with torch.no_grad():
        result = paired_latency({"baseline": lambda: baseline(x), "model": lambda: model(x)}, min_seconds=min_seconds)
    return result.ratio("model", "baseline").median


def solve(
    match: str,
    net: Net,
    baseline: Candidate,
    candidate: Candidate,
    shape: Shape,
    *,
    batch: int = 64,
    device: torch.device | str = "cpu",
) -> Match:
    """The size of ``candidate`` that costs what ``baseline`` costs at its nominal size.

    Args:
        match: "params", "macs", "latency" (paired ratio to the baseline, batch ``batch``) or "none".
        net: network family.
        baseline, candidate: operators; the baseline itself is returned at its nominal size.
        shape: input and classes.
        batch: batch size of latency measurements.
        device: where latency is measured.
    """
    check_choice("match", match, MATCHES)
    width = net.width(baseline, shape)
    reference = (width, net.fine(width))
    start = net.width(candidate, shape)
    if match == "latency":
        x = torch.randn(batch, shape.channels, *shape.size, device=device)

        def ready(which: Candidate, width: int, fine: int) -> nn.Module:
            with torch.random.fork_rng():
                return merge(net.build(which, shape, width, fine).to(device).eval(), x)

        base = ready(baseline, *reference)
        if candidate == baseline:
            return Match(*reference, 1.0, 1.0)

        def ratio(width: int, fine: int) -> float:
            return _latency_ratio(ready(candidate, width, fine), base, x, min_seconds=0.3)

        chosen, fine, _ = _solve(ratio, net, start, net.step(candidate, shape), 1.0, TOLERANCE)
        # A longer measurement of the winner: the short ones were only good enough to search with.
        achieved = _latency_ratio(ready(candidate, chosen, fine), base, x, min_seconds=1.5)
        return Match(chosen, fine, 1.0, achieved)
    cost_of = macs_of if match == "macs" else parameters_of
    target = cost_of(net, baseline, shape, *reference)
    if candidate == baseline:
        return Match(*reference, target, target)
    if match == "none":
        size = (start, net.fine(start))
        return Match(*size, target, parameters_of(net, candidate, shape, *size))

    def cost(width: int, fine: int) -> float:
        return cost_of(net, candidate, shape, width, fine)

    chosen, fine, achieved = _solve(cost, net, start, net.step(candidate, shape), target, TOLERANCE)
    return Match(chosen, fine, target, achieved)
