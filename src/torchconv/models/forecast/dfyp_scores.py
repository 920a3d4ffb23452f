"""How well yields are predicted: the loss that DFYP trains with, and the scores that it reports.

Zhang, Yan, Zhang, Miao, Wang 2025, arXiv 2507.05849. Published training: Adam at 1e-4, a tenth of it after 4,000 and
20,000 of 25,000 steps, batches of 64; L2 of 1 on all parameters for MODIS, which draws the scalars (shares, weights of
the branches) to 0 too; here :func:`torchconv.param_groups` leaves these out.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from torchconv._common import check, require


def yield_loss(prediction: Tensor, target: Tensor, l1_weight: float = 0.0) -> Tensor:
    """Mean squared error and, weighted, mean absolute error.

    Args:
        prediction, target: of one shape; shapes are never broadcast.
        l1_weight: of the absolute error, 0 or more. The authors' code adds it with weight 1 whatever is given.

    Shape:
        (N, …), (N, …) → a number.

    Raises:
        ValueError: shapes that differ, or a negative weight.

    Example:
        >>> import torch
        >>> yield_loss(torch.tensor([1.0, 4.0]), torch.tensor([1.0, 2.0]), l1_weight=0.5)
        tensor(2.5000)

    Reference: arXiv 2507.05849.
    """
    check(l1_weight >= 0, "l1_weight", l1_weight, "must be 0 or more")
    _check_pair(prediction, target)
    loss = F.mse_loss(prediction, target)
    return loss + l1_weight * F.l1_loss(prediction, target) if l1_weight else loss


def yield_scores(prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Errors and agreement of predicted and true yields; counties whose true yield is NaN are left out.

    Args:
        prediction, target: counties, or counties × outputs, each output scored alone.

    Shape:
        (N,), (N,) → numbers; (N, K), (N, K) → (K,) each.

    Returns:
        "rmse" and "mae"; "me", the mean of true less predicted; "r2", 1 − SSE/SST; "correlation", Pearson's.

    Raises:
        ValueError: shapes that differ, or fewer than two counties with a yield.
        ImportError: torchmetrics is not installed (``pip install 'torchconv[compare]'``).

    Example:
        >>> import torch
        >>> scores = yield_scores(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 2.0, 3.0]))
        >>> {name: round(float(score), 3) for name, score in scores.items()}
        {'rmse': 0.577, 'mae': 0.333, 'me': -0.333, 'r2': 0.5, 'correlation': 0.982}

    Reference: arXiv 2507.05849, section 4.
    """
    _check_pair(prediction, target)
    check(target.dim() in (1, 2), "target", tuple(target.shape), "must be (N,) or (N, K)")
    metrics = require("torchmetrics.functional", "compare")
    columns = target.reshape(len(target), -1)
    known = ~columns.isnan().any(1)
    check(int(known.sum()) >= 2, "target", tuple(target.shape), "needs two counties with a yield or more")
    y, t = (v.detach().reshape(len(target), -1)[known].double() for v in (prediction, target))
    outputs = y.shape[1]
    found = {
        "rmse": metrics.mean_squared_error(y, t, squared=False, num_outputs=outputs),
        "mae": metrics.mean_absolute_error(y, t, num_outputs=outputs),
        "me": (t - y).mean(0),
        "r2": metrics.r2_score(y, t, multioutput="raw_values"),
        "correlation": metrics.pearson_corrcoef(y, t),
    }
    return {name: score.reshape(target.shape[1:]) for name, score in found.items()}


def _check_pair(prediction: Tensor, target: Tensor) -> None:
    remedy = f"must have the shape of target, {tuple(target.shape)}; reshape one of them"
    check(prediction.shape == target.shape, "prediction", tuple(prediction.shape), remedy)
