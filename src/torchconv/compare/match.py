"""Equal budgets: the width of each candidate is solved so that it costs what the baseline costs.

Cost is the number of stored parameters, multiply-adds of the inference form, or its measured latency. ``width`` is
searched by bisection, then ``fine`` (one inner width) closes the gap; among sizes within the tolerance the one whose
proportions are nearest to nominal wins.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from torchconv._common import check_choice
from torchconv.analysis.latency import paired_latency
from torchconv.compare.measure import deployed, in_layout
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
    merged = merge(model, x)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        merged(x)
    # The same formulas as torchconv.analysis.count, without the rest that it counts.
    return int(counter.get_total_flops()) // 2


def _cross(cost: Callable[[int], float], target: float, step: int, start: int) -> tuple[int, int]:
    """Neighbouring multiples of ``step`` between which the growing ``cost`` crosses ``target``.

    Regula falsi in the logarithms, where costs are nearly straight lines, with a bisection whenever it stalls: a
    handful of evaluations instead of a dozen.
    """
    low, high, at_low, at_high = step, start, 0.0, cost(start)
    if at_high >= target and start > step:
        at_low = cost(step)
        if at_low >= target:
            return step, step
    while at_high < target and high < 4096 * step:
        low, at_low, high = high, at_high, 2 * high
        at_high = cost(high)
    stalled = False
    while high - low > step:
        share = 0.5
        if not stalled and 0 < at_low < target:
            share = math.log(target / at_low) / math.log(at_high / at_low)
        middle = low + step * min(max(round(share * (high - low) / step), 1), (high - low) // step - 1)
        value, before = cost(middle), high - low
        if value < target:
            low, at_low = middle, value
        else:
            high, at_high = middle, value
        stalled = high - low > before / 2
    return low, high


def _solve(cost: Cost, net: Net, start: int, step: int, target: float, tolerance: float) -> tuple[int, int, float]:
    seen: dict[tuple[int, int], float] = {}

    def at(width: int, fine: int) -> float:
        if (width, fine) not in seen:
            seen[width, fine] = cost(width, fine)
        return seen[width, fine]

    # The two widths between which the nominal proportions cross the target.
    low, high = _cross(lambda w: at(w, net.fine(w)), target, step, start)
    # At each, the inner width that hits the target.
    for width in {low, high}:
        _cross(partial(at, width), target, 1, net.fine(width))

    def error(size: tuple[int, int]) -> float:
        return abs(seen[size] / target - 1)

    def distortion(size: tuple[int, int]) -> float:
        return abs(math.log(size[1] / net.fine(size[0])))

    near = [s for s in seen if error(s) <= tolerance / 2] or [s for s in seen if error(s) <= tolerance]
    best = min(near, key=lambda s: (distortion(s), error(s))) if near else min(seen, key=error)
    return (*best, seen[best])


def _latency_ratio(model: nn.Module, baseline: nn.Module, x: Tensor, min_seconds: float) -> float:
    """Median of the paired ratios model / baseline."""
    timed = paired_latency({"baseline": baseline, "model": model}, x, min_seconds=min_seconds)
    return timed.ratios["model"].median


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
        x = in_layout(torch.randn(batch, shape.channels, *shape.size, device=device))

        def ready(which: Candidate, width: int, fine: int) -> nn.Module:
            with torch.random.fork_rng():
                return deployed(net.build(which, shape, width, fine).eval(), shape, device)

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
