"""Sizes per axis and padding, as integers: what ``ops`` and ``kernels`` both need."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torchconv._common.checks import check

Size = int | Sequence[int]
Padding = int | Sequence[int] | str


def ntuple(argument: str, value: Size, ndim: int, *, least: int = 1) -> tuple[int, ...]:
    """``value`` as one integer per spatial axis; anything else raises ``ValueError`` naming ``argument``."""
    items = tuple(value) if isinstance(value, Iterable) else (value,) * ndim
    ok = len(items) == ndim and all(isinstance(i, int) and not isinstance(i, bool) and i >= least for i in items)
    check(ok, argument, value, f"must be an integer >= {least} or {ndim} of them, one per spatial axis")
    return items


def resolve_padding(
    padding: Padding, kernel_size: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """Padding as (before, after) per axis.

    "same" gives an output of ceil(length / stride) at any stride, with PyTorch's rule for even extents (the extra
    element goes after); "valid" is none.
    """
    ndim = len(kernel_size)
    if isinstance(padding, str):
        check(padding in ("same", "valid"), "padding", padding, "must be 'same', 'valid' or integers")
        totals = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel_size, dilation, strict=True)]
        return tuple((t // 2, t - t // 2) for t in totals)
    return tuple((p, p) for p in ntuple("padding", padding, ndim, least=0))
