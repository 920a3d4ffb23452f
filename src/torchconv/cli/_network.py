"""What the commands that change a network share."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def noise_for(network: nn.Module, size: int | None, batch: int = 1) -> Tensor:
    """Noise that the network runs on; ``size`` is the side asked for."""
    from torchconv.surgery._probe import make_up

    x = make_up(network, size, batch)
    if size and size not in x.shape[2:]:
        raise ValueError(f"size={size}: the network runs on {tuple(x.shape)}, but not at that size")
    return x


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
