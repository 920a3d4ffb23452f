"""An equal budget of parameters for operators put in the place of convolutions.

Every layer is given the size at which it has as many parameters as the convolution had, where its operator has a size
that is free to choose; what is missing or left over at one layer is taken into account at the next, from the largest
layer to the smallest. Where that is not enough, the layers that are furthest from their old size stay convolutions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

TOLERANCE = 0.02

# Operator → the option that sets its capacity and leaves what it computes as it is.
FREE = {
    "adknet": "width",
    "apriori": "rank",
    "dcls": "kernel_count",
    "shallow": "n_layers",
    "snnk": "num_features",
    "terminator": "hidden",
    "terminator-global": "hidden",
}
_LARGEST = 1 << 14


def nearest(count: Callable[[int], int], target: int, step: int = 1) -> int | None:
    """The multiple of ``step`` at which the growing ``count`` is nearest to ``target``; None if none is possible.

    ``count`` raises ``ValueError`` for sizes that cannot be.
    """
    seen: dict[int, int] = {}

    def reached(size: int) -> bool:
        try:
            seen[size] = count(size)
        except ValueError:
            return True
        return seen[size] >= target

    high = step
    while not reached(high) and high < _LARGEST:
        high *= 2
    low = 0 if high == step else high // 2
    while high - low > step:
        middle = low + (high - low) // step // 2 * step
        if reached(middle):
            high = middle
        else:
            low = middle
    return min(seen, key=lambda size: (abs(seen[size] - target), size), default=None)


def left_out(changes: Mapping[str, int], slack: float) -> list[str]:
    """The layers to leave as they are so that the sum of the others' ``changes`` is at most ``slack`` either way.

    The largest change of the sum's sign goes first, so that as many layers as possible remain.
    """
    out: list[str] = []
    left = dict(changes)
    while abs(total := sum(left.values())) > slack:
        worst = max(left, key=lambda path: left[path] if total > 0 else -left[path])
        out.append(worst)
        del left[worst]
    return out
