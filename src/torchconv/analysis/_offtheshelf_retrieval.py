"""Retrieval with frozen features: PCA, whitening and a signed power; distances of sets of patches, block by block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchconv._common import check, check_positive
from torchconv.analysis._offtheshelf_features import signed_power, unit
from torchconv.catalog.parts import part

_ROWS = 4096  # features whose products are summed at a time, so that float64 copies stay small


@part(
    "pca-whitening",
    paper="offtheshelf",
    kind="analysis",
    keywords="PCA whitening signed power normalisation image retrieval descriptors post-processing",
)
class Postprocess(nn.Module):
    """L2 → PCA → whitening → L2 → signed power, fitted on references or on a set of its own, never on queries.

        z = V (x/‖x‖ − μ) / √(λ + ε),    y = sign(z/‖z‖) |z/‖z‖|^p

    Args:
        dim: components kept; fewer where the features have a lower rank.
        power: exponent p. The paper squares; ½ is the signed root of Fisher vectors; 1 leaves the components.
        whiten: divide by the deviations.
        eps: added to the variances, which keeps components of hardly any variance from being blown up.

    Attributes:
        mean, components, variances: μ (D,), V (d, D) with the entry of largest magnitude in each row positive, and λ
            (d,), with divisor N − 1. Buffers: they move and are saved with the module.

    Example:
        >>> references = torch.randn(50, 16)
        >>> post = Postprocess(8).fit(references)
        >>> post(torch.randn(3, 16)).shape
        torch.Size([3, 8])

    Reference: A. Sharif Razavian et al. 2014, arXiv 1403.6382, section on retrieval.
    """

    mean: Tensor
    components: Tensor
    variances: Tensor

    def __init__(self, dim: int = 500, power: float = 2.0, whiten: bool = True, eps: float = 0.0) -> None:
        super().__init__()
        check_positive("dim", dim)
        check(power > 0, "power", power, "must be positive")
        check(eps >= 0, "eps", eps, "must not be negative")
        self.dim, self.power, self.whiten, self.eps = dim, power, whiten, eps
        for name in ("mean", "components", "variances"):
            self.register_buffer(name, torch.empty(0))

    def fit(self, features: Tensor) -> Postprocess:
        """Take mean, components and variances from features (N, D) or (N, patches, D); the sums are in float64.

        Raises:
            ValueError: fewer than two rows, or rows that are all alike.
        """
        rows = features.detach().flatten(0, -2)
        check(len(rows) > 1, "features", tuple(features.shape), "give at least two rows")
        mean, components, variances = _principal(rows)
        largest = float(variances[0])
        check(largest > 0, "features", "all alike", "have no variance to keep")
        rank = int((variances > largest * max(rows.shape) * torch.finfo(torch.float64).eps).sum())
        kept = min(self.dim, rank)
        components = components[:kept]
        signs = components.gather(1, components.abs().argmax(1, keepdim=True)).sign()
        kind = torch.float64 if rows.dtype == torch.float64 else torch.float32
        self.mean, self.components = mean.to(kind), (components * signs).to(kind)
        self.variances = variances[:kept].to(kind)
        return self

    def project(self, x: Tensor) -> Tensor:
        """(…, D) → (…, d): up to whitening, before the second normalisation."""
        check(self.mean.numel() > 0, "Postprocess", "not fitted", "call fit(references) first")
        check(x.shape[-1] == len(self.mean), "x", tuple(x.shape), f"must have {len(self.mean)} features")
        z = (unit(x) - self.mean) @ self.components.T
        return z * (self.variances + self.eps).rsqrt() if self.whiten else z

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) → (…, d)."""
        return signed_power(unit(self.project(x)), self.power)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        for name in ("mean", "components", "variances"):  # their sizes come from the data
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name], device=self.mean.device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Settings."""
        return f"dim={self.dim}, power={self.power}, whiten={self.whiten}, eps={self.eps}"


def _principal(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, components and variances of the normalised rows, in float64, largest variance first."""
    count, width = rows.shape
    blocks = rows.split(_ROWS)
    mean = torch.stack([unit(b.double()).sum(0) for b in blocks]).sum(0) / count
    if count <= width:
        _, s, components = torch.linalg.svd(unit(rows.double()) - mean, full_matrices=False)
        return mean, components, s.square() / (count - 1)
    scatter = torch.zeros(width, width, dtype=torch.float64, device=rows.device)
    for block in blocks:
        centred = unit(block.double()) - mean
        scatter.addmm_(centred.T, centred)
    variances, vectors = torch.linalg.eigh(scatter / (count - 1))
    return mean, vectors.T.flip(0), variances.flip(0).clamp(min=0)


@dataclass(frozen=True)
class Retrieval:
    """What a search found.

    Attributes:
        distance: (queries, references).
        nearest: (queries, references, query patches): which patch of the reference was nearest to each of the query's;
            None unless asked for.
        ranking: (queries, references): references by rising distance.
    """

    distance: Tensor
    nearest: Tensor | None
    ranking: Tensor


@part(
    "spatial-search",
    paper="offtheshelf",
    kind="analysis",
    dims=(2,),
    keywords="image retrieval instance search patches off-the-shelf features nearest patch distance",
)
def spatial_search(query: Tensor, reference: Tensor, *, nearest: bool = False, block: int = 1 << 22) -> Retrieval:
    """Distance of every query image to every reference image by their patches, and the ranking.

        D(Q, R) = mean over the query's patches q of  min over the reference's patches r of ‖f(q) − f(r)‖

    Not symmetric, without gradient; with one patch each it is the plain distance. Q R p_q p_r d multiply-adds as matrix
    products; memory beyond the result is a few times ``block`` numbers.

    Args:
        query: (Q, D) or (Q, p_q, D), post-processed as wanted.
        reference: (R, D) or (R, p_r, D).
        nearest: also say which patches were nearest.
        block: distances of the query's patches to references that are held at once.

    Returns:
        Distances and rankings, and nearest patches.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> reference = torch.randn(6, 5, 16)
        >>> found = spatial_search(reference[2, 3:4][None], reference, nearest=True)
        >>> int(found.ranking[0, 0]), found.nearest[0, 2].tolist(), float(found.distance[0, 2])
        (2, [3], 0.0)
    """
    query, reference = (x.detach()[:, None] if x.dim() == 2 else x.detach() for x in (query, reference))
    fits = query.dim() == 3 and reference.dim() == 3 and query.shape[-1] == reference.shape[-1]
    check(fits, "reference", tuple(reference.shape), f"must be (R, patches, {query.shape[-1]})")
    check_positive("block", block)
    check(reference.numel() > 0, "reference", tuple(reference.shape), "must hold at least one patch")
    (n, p, _), (m, r, _) = query.shape, reference.shape
    distance = query.new_empty(n, m)
    where = torch.zeros(n, m, p, dtype=torch.int64, device=query.device) if nearest else None
    columns = max(1, min(m, block // p))
    lines = max(1, block // (p * columns))
    for j in range(0, m, columns):
        there = reference[j : j + columns]
        lengths = torch.linalg.vector_norm(there, dim=-1).square()
        for i in range(0, n, lines):
            some = query[i : i + lines]
            rows = some.flatten(0, 1)
            least = rows.new_full((len(rows), len(there)), torch.inf)
            for k in range(r):  # one patch of all references at a time: |b|² − 2ab; |a|² is the same for all of them
                product = torch.addmm(lengths[:, k], rows, there[:, k].T, alpha=-2)
                if where is not None:
                    closer = (product < least).view(len(some), p, -1).transpose(1, 2)
                    where[i : i + lines, j : j + columns].masked_fill_(closer, k)
                torch.minimum(least, product, out=least)
            squared = least.view(len(some), p, -1) + some.square().sum(-1, keepdim=True)
            _exactly(squared.clamp_(min=0), some, there)
            distance[i : i + lines, j : j + columns] = squared.sqrt().mean(1)
    return Retrieval(distance, where, distance.argsort(dim=-1, stable=True))


def _exactly(squared: Tensor, query: Tensor, reference: Tensor) -> None:
    """Differences instead of products where patches are so near that the products cancel; in place."""
    near = (squared < 1e-3 * query.square().sum(-1, keepdim=True)).nonzero()
    for x, y, z in (part_.unbind(1) for part_ in near.split(max(1, _ROWS // reference.shape[1]))):
        squared[x, y, z] = (query[x, y][:, None] - reference[z]).square().sum(-1).amin(-1)
