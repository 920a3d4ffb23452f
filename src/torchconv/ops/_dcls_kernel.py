"""The dense kernel of DCLS from weights and their positions, and the loss that keeps positions apart.

See :mod:`torchconv.ops.dcls` for the method and its layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from torchconv._common import check, check_choice

VERSIONS = ("v0", "v1", "max", "gauss")
AXIS_ORDERS = ("spatial", "official")
LEAST_WIDTH = {"max": 1.0, "gauss": 0.27}
_LEAST_EXPONENT = {torch.float32: -40.0, torch.float64: -350.0}  # e to it, squared, is still a normal number
_NO_MASS = 1e-7  # keeps the normalisation finite when a window lies wholly outside the grid


def position_axes(ndim: int, version: str, axis_order: str) -> tuple[int, ...]:
    """The spatial axis that each row of the positions is about."""
    if axis_order == "spatial" or ndim == 1:
        return tuple(range(ndim))
    if version == "v0":  # the authors' bilinear version: (row, column), (depth, width, height)
        return (0, 1) if ndim == 2 else (0, 2, 1)
    return tuple(reversed(range(ndim)))


def _window(offset: Tensor, width: Tensor | None, version: str) -> Tensor:
    if version == "gauss":
        assert width is not None
        exponent = (offset * width.reciprocal().unsqueeze(-1)).square().mul(-0.5)
        return exponent.clamp(min=_LEAST_EXPONENT[exponent.dtype]).exp()
    if version == "max":
        assert width is not None
        return (width.unsqueeze(-1) - offset.abs()).relu()
    return (1 - offset.abs()).relu()


def _bilinear(grid: Tensor, position: Tensor) -> Tensor:
    """1 − r at the cell below and r at the next; at a grid point the slope is that towards the next cell."""
    below = position.detach().floor()
    rest = (position - below).unsqueeze(-1)
    cell = grid - below.unsqueeze(-1)
    return torch.where(cell == 0, 1 - rest, torch.where(cell == 1, rest, torch.zeros_like(rest)))


def _full_precision(device: str) -> AbstractContextManager[Any]:
    """Autocast would round the windows to half precision, and with them the gradient of the positions."""
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


def dcls_kernel(
    weight: Tensor,
    positions: Tensor,
    sigma: Tensor | None,
    size: Sequence[int],
    version: str = "gauss",
    *,
    axis_order: str = "spatial",
    least_width: float | None = None,
) -> Tensor:
    """The dense kernel that ``weight`` at ``positions`` makes on a grid of ``size``.

    Half-precision arguments are computed in float32; the result has the dtype of ``weight``.

    Args:
        weight: (\\*pairs, m), for a convolution (out, in/groups, m).
        positions: (n, \\*pairs, m), relative to the kernel's centre ⌊S/2⌋.
        sigma: (n, \\*pairs, m), widths before the least width is added; None for "v0" and "v1".
        size: the n sizes S of the kernel.
        version: "v0", "v1", "max" or "gauss", see :mod:`torchconv.ops.dcls`.
        axis_order: "spatial": row j of ``positions`` is about spatial axis j. "official": as in the authors' code, last
            axis first (for "v0" row, column and depth, width, height), every row centred by the size of the axis
            of *its own* number, which differs for non-square kernels.
        least_width: what is added to \\|sigma\\|; 0.27 for "gauss" and 1 for "max" when None.

    Returns:
        (\\*pairs, \\*size).

    Example:
        >>> dcls_kernel(torch.ones(1, 1, 1), torch.tensor([[[[0.25]]]]), None, (3,), "v1")
        tensor([[[0.0000, 0.7500, 0.2500]]])

    Reference: arXiv 2112.03740, Section 2 and appendix; arXiv 2306.00817, Section 2.
    """
    check(isinstance(size, Sequence), "size", size, "give one integer for each row of positions, such as (7,)")
    ndim = len(size)
    check_choice("version", version, VERSIONS)
    check_choice("axis_order", axis_order, AXIS_ORDERS)
    if positions.shape != (ndim, *weight.shape):
        raise ValueError(f"positions of shape {tuple(positions.shape)}: expected {(ndim, *weight.shape)}")
    wide = version in LEAST_WIDTH
    if wide and (sigma is None or sigma.shape != positions.shape):
        got = None if sigma is None else tuple(sigma.shape)
        raise ValueError(f"sigma of shape {got}: version {version!r} needs {tuple(positions.shape)}")
    if not weight.is_floating_point():
        raise ValueError(f"weight of dtype {weight.dtype}: the kernel has real numbers, give a floating dtype")
    work = torch.promote_types(weight.dtype, torch.float32)
    windows: list[Tensor] = [weight] * ndim
    with _full_precision(weight.device.type):
        strength = weight.to(work)
        positions = positions.to(work)
        mass = None
        for row, axis in enumerate(position_axes(ndim, version, axis_order)):
            grid = torch.arange(size[axis], device=weight.device, dtype=work)
            place = positions[row] + size[row] // 2
            if version == "v0":
                windows[axis] = _bilinear(grid, place)
                continue
            width = None
            if wide:
                assert sigma is not None
                width = sigma[row].to(work).abs() + (LEAST_WIDTH[version] if least_width is None else least_width)
            windows[axis] = _window(grid - place.unsqueeze(-1), width, version)
            total = windows[axis].sum(-1)
            mass = total if mass is None else mass * total
        if mass is not None:
            strength = strength / (mass + _NO_MASS)
        left = strength.unsqueeze(-1)
        for window in windows[:-1]:
            left = (left.unsqueeze(-1) * window.unsqueeze(-2)).flatten(-2)
        kernel = left.transpose(-1, -2) @ windows[-1]
    return kernel.reshape(*weight.shape[:-1], *size).to(weight.dtype)


def repulsive_loss(positions: Sequence[Tensor], *, official: bool = False) -> Tensor:
    """How much the weights of a kernel crowd, the mean over layers of

        2 · Σ_{i<j} max(0, 1 − |p_i − p_j|) / (m(m−1) · pairs).

    The authors add its **square** to the training loss from the 21st epoch on.

    Args:
        positions: one tensor (n, \\*pairs, m) a layer. Pass a tensor that layers share once. A layer of one weight
            counts as 0.
        official: measure distances as the authors do, by ``torch.cdist``. From 26 weights on it expands the square,
            which costs neighbours a cell apart three digits of their gradient. For reproduction.

    Raises:
        ValueError: ``positions`` is empty, or a tensor instead of a list of them.
    """
    if isinstance(positions, Tensor):
        raise ValueError(f"positions of shape {tuple(positions.shape)}: give a list with one tensor a layer")
    if not positions:
        raise ValueError("positions=[]: give the position tensor of at least one layer")
    losses = []
    for p in positions:
        count = p.shape[-1]
        first, second = torch.triu_indices(count, count, 1, device=p.device)
        apart = p.flatten(1, -2) if p.dim() > 2 else p.unsqueeze(1)
        if official:
            places = apart.permute(1, 2, 0).contiguous()
            distance = torch.cdist(places, places)[:, first, second]
        else:
            squared = (apart[..., first] - apart[..., second]).square().sum(0)
            # √ has no slope at 0: two weights in one place get no push, as in the authors' pairwise distances.
            distance = torch.where(squared > 0, squared, 1.0).sqrt() * (squared > 0)
        losses.append(2 * (1 - distance).relu().sum() / max(1, count * (count - 1) * apart.shape[1]))
    return torch.stack(losses).mean()
