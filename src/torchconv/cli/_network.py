"""What the commands that change a network share."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def noise_for(network: nn.Module, size: int | None, batch: int = 1) -> Tensor:
    """Noise that the network runs on: of the side ``size`` where it can, otherwise of a size that it takes."""
    from torchconv.surgery._probe import make_up

    return make_up(network, size, batch)


def costs(before: nn.Module, after: nn.Module, x: Any) -> str:
    """Multiply-adds and FLOPs of both for ``x``, as a line each."""
    from torchconv.analysis.count import count

    old, new = count(before, x), count(after, x)
    rows = [("MACs", old.macs, new.macs), ("FLOPs", old.flops, new.flops)]
    lines = [f"{name}: {a:,} → {b:,} ({_percent(a, b)})" for name, a, b in rows]
    lines += [f"not counted: {', '.join(new.not_counted)}"] if new.not_counted else []
    return "\n".join(lines)


def _percent(a: int, b: int) -> str:
    return "=" if a == b else f"{b / a - 1:+.1%}" if a else "new"
