"""Representational similarity analysis: dissimilarities of stimuli in two networks, compared.

Kriegeskorte et al. 2008; one of the measures of arXiv 2511.02404. A representational dissimilarity matrix (RDM) holds
1 − correlation (or another distance) of every two stimuli; two networks are alike when their RDMs are. Cost: n² p for
an RDM, n² log n for ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torchconv._common import check, check_choice, require
from torchconv.analysis._cka_kernels import check_pair, squared_distances
from torchconv.catalog.parts import part

DISTANCES = ("correlation", "euclidean", "cosine")
COMPARISONS = ("corr", "spearman", "kendall", "tau-a", "cosine", "rho-a")


def rdm(x: Tensor, distance: str = "correlation") -> Tensor:
    """Dissimilarities of all stimuli.

    Args:
        x: (n, p).
        distance: "correlation": 1 − Pearson of two rows; "cosine"; "euclidean": the squared distance divided by the
            number of features.

    Shape:
        (n, n), zeros on the diagonal. Rows without variance (or length) give NaN.

    Example:
        >>> rdm(torch.tensor([[0.0, 1.0], [3.0, 1.0]]), "euclidean")
        tensor([[0.0000, 4.5000],
                [4.5000, 0.0000]])
    """
    check_choice("distance", distance, DISTANCES)
    check(x.dim() == 2, "x", tuple(x.shape), "give a matrix (stimuli, features)")
    if distance == "euclidean":
        return squared_distances(x) / x.shape[1]
    if distance == "correlation":
        x = x - x.mean(1, keepdim=True)
    unit = x / x.norm(dim=1, keepdim=True)
    return (1 - unit @ unit.T).fill_diagonal_(0)


def upper(matrix: Tensor) -> Tensor:
    """The entries above the diagonal, row by row."""
    rows, columns = torch.triu_indices(len(matrix), len(matrix), 1, device=matrix.device)
    return matrix[rows, columns]


def ranks(values: Tensor) -> Tensor:
    """Ranks from 1 along the last dimension, equal values sharing the mean of theirs."""
    if values.dim() > 1:
        return torch.stack([ranks(v) for v in values])
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).to(values.dtype)
    return (last - (counts - 1).to(values.dtype) / 2)[inverse]


def compare_rdms(a: Tensor, b: Tensor, how: str = "spearman") -> Tensor:
    """How alike two RDMs are, from the entries above the diagonal.

    Args:
        a, b: (n, n), or vectors of their upper triangles.
        how: "corr" (Pearson), "spearman", "kendall" (τ-b), "tau-a", "cosine", "rho-a" (Spearman's mean under random
            breaking of ties). Kendall's need scipy.

    Shape:
        Scalar.
    """
    check_choice("how", how, COMPARISONS)
    check(a.shape == b.shape, "b", tuple(b.shape), f"must have the shape of a, {tuple(a.shape)}")
    if a.dim() == 2:
        a, b = upper(a), upper(b)
    check(len(a) > 1, "a", tuple(a.shape), "at least three stimuli are needed")
    if how in ("kendall", "tau-a"):
        return _kendall(a, b, how)
    if how in ("spearman", "rho-a"):
        a, b = ranks(a), ranks(b)
    if how != "cosine":
        a, b = a - a.mean(), b - b.mean()
    if how == "rho-a":
        n = len(a)
        return 12 * (a @ b) / (n**3 - n)
    return (a @ b) / (a.norm() * b.norm())


def _kendall(a: Tensor, b: Tensor, how: str) -> Tensor:
    stats = require("scipy.stats", "compare")
    tau = float(stats.kendalltau(a.detach().cpu().numpy(), b.detach().cpu().numpy()).statistic)
    if how == "tau-a":
        pairs = len(a) * (len(a) - 1) / 2
        for v in (a, b):
            tied = torch.unique(v, return_counts=True)[1].double()
            tau *= math.sqrt(1 - float((tied * (tied - 1) / 2).sum()) / pairs)
    return a.new_tensor(tau)


@part(
    "rsa",
    paper="cka",
    kind="analysis",
    keywords="representational similarity analysis dissimilarity RDM Mantel Spearman Kendall",
)
def rsa(x: Tensor, y: Tensor, distance: str = "correlation", how: str = "spearman") -> Tensor:
    """Correlation of the two networks' dissimilarities.

    Args:
        x: (n, p), n stimuli.
        y: (n, q), the same stimuli.
        distance: see :func:`rdm`.
        how: see :func:`compare_rdms`.

    Shape:
        Scalar.

    Example:
        >>> x = torch.randn(10, 6, dtype=torch.float64)
        >>> round(float(rsa(x, 5 * x + 2)), 6)
        1.0
    """
    check_pair(x, y, 3)
    return compare_rdms(rdm(x, distance), rdm(y, distance), how)


@dataclass(frozen=True)
class Permuted:
    """A permutation test: the statistic, its values under permutation, p by the rule (1 + #)/(1 + B).

    ``p`` counts values at least the observed one, ``p_two_sided`` those at least as far from zero.
    """

    observed: Tensor
    null: Tensor

    @property
    def p(self) -> float:
        """One-sided."""
        return self._share(self.null, self.observed)

    @property
    def p_two_sided(self) -> float:
        """Two-sided."""
        return self._share(self.null.abs(), self.observed.abs())

    @staticmethod
    def _share(null: Tensor, observed: Tensor) -> float:
        # The identity, and permutations among equals, must count whatever rounding does.
        reached = null >= observed - 1e-12 * observed.abs()
        return (1 + int(reached.sum())) / (1 + len(null))


def draw_permutations(count: int, n: int, seed: int) -> Tensor:
    """(count, n): permutations of n."""
    check(count > 0, "permutations", count, "must be positive")
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(n, generator=generator) for _ in range(count)])


def mantel(a: Tensor, b: Tensor, how: str = "spearman", permutations: int | Tensor = 999, seed: int = 0) -> Permuted:
    """Whether two RDMs agree better than with the stimuli of one of them shuffled.

    Args:
        a, b: (n, n).
        how: "spearman" or "corr".
        permutations: how many, or (B, n) indices; rows and columns of b follow them.
        seed: of the drawn permutations.

    Returns:
        The comparison, its null values and p.

    Raises:
        ValueError: unknown comparison, shapes or indices that do not fit.
    """
    check_choice("how", how, ("spearman", "corr"))
    check(a.dim() == 2 and a.shape == b.shape, "b", tuple(b.shape), f"must be square as a is, {tuple(a.shape)}")
    n = len(a)
    drawn = draw_permutations(permutations, n, seed) if isinstance(permutations, int) else permutations
    check(drawn.dim() == 2 and drawn.shape[1] == n, "permutations", tuple(drawn.shape), f"must be (B, {n})")
    rows, columns = torch.triu_indices(n, n, 1, device=a.device)
    # Shuffling moves entries and changes none, so that ranks and norms are taken once.
    vectors = [a[rows, columns], b[rows, columns]]
    if how == "spearman":
        vectors = [ranks(v) for v in vectors]
    first, second = ((v - v.mean()) / (v - v.mean()).norm() for v in vectors)
    square = b.new_zeros(n, n)
    square[rows, columns] = second
    square = square + square.T
    null = torch.stack([first @ square[p[rows], p[columns]] for p in drawn.to(a.device)])
    return Permuted(first @ second, null)
