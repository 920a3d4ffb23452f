"""Peers of CKA that align the features themselves: orthogonal Procrustes, SVCCA, PWCCA."""

from __future__ import annotations

import torch
from torch import Tensor

from torchconv._common import check, check_choice
from torchconv.analysis._cka_kernels import check_pair


def compact(x: Tensor) -> Tensor:
    """At most n features with the same inner products between stimuli: a rotation of the rows of x."""
    return torch.linalg.qr(x.T, mode="r").R.T if x.shape[1] > len(x) else x


def procrustes_distance(x: Tensor, y: Tensor) -> Tensor:
    """1 − ‖X_cᵀY_c‖_*/(‖X_c‖‖Y_c‖): what the best rotation leaves over, 0 to 1.

    Args:
        x: (n, p).
        y: (n, q).

    Shape:
        Scalar.

    Example:
        >>> x = torch.randn(9, 4, dtype=torch.float64)
        >>> abs(round(float(procrustes_distance(x, 2 * x.flip(1))), 6))
        0.0
    """
    check_pair(x, y)
    x, y = x - x.mean(0), y - y.mean(0)
    x, y = compact(x), compact(y)
    return 1 - torch.linalg.svdvals(x.T @ y).sum() / (x.norm() * y.norm())


def _directions(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of centred features without the directions that are rounding."""
    u, s, vh = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    rank = max(1, int((s > s[0] * max(x.shape) * torch.finfo(x.dtype).eps).sum()))
    return u[:, :rank], s[:rank], vh[:rank]


def svcca_distance(x: Tensor, y: Tensor, share: float = 0.99) -> Tensor:
    """1 − mean canonical correlation of the leading singular directions (Raghu et al. 2017).

    Args:
        x: (n, p).
        y: (n, q).
        share: of the sum of singular values; the direction that reaches it is dropped.

    Shape:
        Scalar.
    """
    check_pair(x, y)
    check(0 < share <= 1, "share", share, "must lie in (0, 1]")
    bases = []
    for value in (x, y):
        u, s, _ = _directions(value)
        kept = int((s.cumsum(0) / s.sum() < share).sum()) if share < 1 else len(s)
        bases.append(u[:, : max(1, kept)])
    return 1 - torch.linalg.svdvals(bases[0].T @ bases[1]).clamp(max=1).mean()


def pwcca_distance(x: Tensor, y: Tensor, weights: str = "canonical") -> Tensor:
    """1 − Σ α_i ρ_i: canonical correlations weighed by how much of x they tell (Morcos et al. 2018).

    With p + q > n − 1 some correlations are 1 whatever the features, and their directions, hence the weights, are
    arbitrary.

    Args:
        x: (n, p).
        y: (n, q).
        weights: "canonical": α_i ∝ Σ_j |⟨h_i, x_j⟩| with canonical variables h_i and columns x_j of centred x;
            "orthogonal": α_i ∝ Σ |X q_i|, q_i of the QR decomposition of the canonical weights and X not centred (as
            the library anatome computes it).

    Shape:
        Scalar.
    """
    check_pair(x, y)
    check_choice("weights", weights, ("canonical", "orthogonal"))
    u, s, vh = _directions(x)
    left, correlations, _ = torch.linalg.svd(u.T @ _directions(y)[0], full_matrices=False)
    if weights == "canonical":
        alpha = ((u @ left).T @ (x - x.mean(0))).abs().sum(1)
    else:
        q = torch.linalg.qr(vh.T @ (left / s[:, None])).Q
        alpha = (x @ q).abs().sum(0)
    return 1 - (alpha / alpha.sum()) @ correlations
