"""The parametric multi-loss: the ω that mixes the kernels weighs the objectives.

Maggioni et al. 2023, arXiv 2304.00898, section 3.2: with ω drawn for every item of every batch,

    L(x, y; ω) = Σ_p ω_p · L_p(x, y),

so that at ω = e_p the network is trained for objective p alone, and between them for the trade-off. Draw ω on the
simplex for trade-offs, in the unit cube where objectives are independent (noise and blur).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchconv._common import check_choice, check_positive

SAMPLERS = ("simplex", "uniform", "corners")


def multi_loss(losses: Tensor | Sequence[Tensor], params: Tensor) -> Tensor:
    """Mean over the batch of Σ_p ω_bp · L_bp.

    Args:
        losses: P tensors (B,), the losses of each item for each objective, or one tensor (B, P).
        params: (B, P), or (P,) or (1, P) for all.

    Returns:
        a scalar.

    Raises:
        ValueError: the losses are already averaged over the batch, or there are not P of them.

    Example:
        >>> multi_loss([torch.tensor([1.0, 3.0]), torch.tensor([10.0, 30.0])], torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
        tensor(8.7500)

    Reference: arXiv 2304.00898, equation of the multi-loss.
    """
    sizes = {tuple(losses.shape)} if isinstance(losses, Tensor) else {tuple(loss.shape) for loss in losses}
    if len(sizes) != 1:
        raise ValueError(f"losses of shapes {sorted(sizes)}: expected P tensors of one shape, (B,)")
    table = losses if isinstance(losses, Tensor) else torch.stack(list(losses), -1)
    fits = table.dim() == 2 and params.shape in ((table.shape[1],), (1, table.shape[1]), table.shape)
    if not fits:
        shapes = f"{tuple(table.shape)} with params of shape {tuple(params.shape)}"
        raise ValueError(f"losses of shape {shapes}: expected (B, P), not averaged over the batch, and (B, P) or (P,)")
    return (table * params).sum(1).mean()


def sample_tuning(
    batch: int,
    num_params: int,
    sampler: str = "simplex",
    generator: torch.Generator | None = None,
    device: Any = None,
    dtype: Any = None,
) -> Tensor:
    """One tuning vector for each item.

    Args:
        batch, num_params: B and P.
        sampler: "simplex", uniform over ω ≥ 0 with Σω = 1 (for P = 2, ω_1 is uniform in (0, 1)); "uniform", uniform
            in the unit cube; "corners", one objective at a time.
        generator: of the random numbers; on ``device``.

    Shape:
        → (B, P).

    Raises:
        ValueError: an unknown sampler or a number out of range.

    Example:
        >>> sample_tuning(3, 2, "simplex").sum(1)
        tensor([1., 1., 1.])
    """
    check_positive("batch", batch)
    check_positive("num_params", num_params)
    check_choice("sampler", sampler, SAMPLERS)
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    if sampler == "corners":
        chosen = torch.randint(num_params, (batch,), generator=generator, device=device)
        return torch.eye(num_params, **options)[chosen]
    uniform = torch.rand(batch, num_params, generator=generator, **options)
    if sampler == "uniform":
        return uniform
    # Spacings of sorted uniforms are uniform on the simplex.
    cuts = uniform[:, 1:].sort(1).values
    edges = (cuts.new_zeros(batch, 1), cuts, cuts.new_ones(batch, 1))
    return torch.cat(edges, 1).diff(dim=1)
