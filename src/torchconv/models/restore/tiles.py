"""Images of any size through networks that want certain ones, whole or in tiles that fade into each other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchconv._common import check, check_positive
from torchconv.kernels.resample import mirror_pad


def restore(
    net: Callable[[Tensor], Tensor], x: Tensor, multiple: int = 1, tile: int | None = None, overlap: int = 48
) -> Tensor:
    """Run a network that keeps the size of its input on images of any size.

    Args:
        net: (N, C, h, w) → (N, C', h, w).
        x: images.
        multiple: what h and w must be multiples of; images are mirrored at the lower and right border up to that.
        tile: side of the square tiles that are run by themselves, where the image is larger; None runs it whole.
        overlap: pixels that neighbours share at least, across which one fades linearly into the other.

    Shape:
        (N, C, H, W) → (N, C', H, W).

    Raises:
        ValueError: ``tile`` is no multiple of ``multiple``, or ``overlap`` leaves nothing of it.

    Example:
        >>> x = torch.rand(1, 3, 21, 40)
        >>> torch.allclose(restore(lambda t: t, x, multiple=4, tile=16, overlap=5), x)
        True

    Reference: the tiles are those of arXiv 2511.21132, section 4.
    """
    check_positive("multiple", multiple)
    height, width = x.shape[2:]
    padded = mirror_pad(x, [(0, -(-n // multiple) * multiple) for n in (height, width)])
    if tile is None:
        return net(padded)[:, :, :height, :width]
    check_positive("tile", tile)
    check(tile % multiple == 0, "tile", tile, f"must be a multiple of {multiple}")
    check_positive("overlap", overlap, zero=True)
    check(overlap < tile, "overlap", overlap, f"must be less than tile={tile}")
    rows, columns = (_starts(n, tile, overlap) for n in padded.shape[2:])
    total: Tensor | None = None
    weights = x.new_zeros(padded.shape[2:], dtype=torch.float32)
    for top in rows:
        for left in columns:
            y = net(padded[:, :, top : top + tile, left : left + tile])
            fade = _fade(rows, top, y.shape[2], overlap, y.device)[:, None]
            fade = fade * _fade(columns, left, y.shape[3], overlap, y.device)
            if total is None:
                total = y.new_zeros(*y.shape[:2], *padded.shape[2:])
            total[:, :, top : top + tile, left : left + tile] += (y * fade).to(y.dtype)
            weights[top : top + tile, left : left + tile] += fade
    assert total is not None
    return (total / weights).to(total.dtype)[:, :, :height, :width]


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin; the last one ends with the image."""
    if length <= tile:
        return [0]
    return [*range(0, length - tile, tile - overlap), length - tile]


def _fade(starts: list[int], start: int, length: int, overlap: int, device: torch.device) -> Tensor:
    """The weights of a tile on one axis: rising and falling over the overlap, where there is a neighbour."""
    ramp = (torch.arange(length, device=device) + 1.0) / (overlap + 1)
    rising = ramp.clamp(max=1) if start != starts[0] else torch.ones_like(ramp)
    return rising * (ramp.flip(0).clamp(max=1) if start != starts[-1] else 1)
