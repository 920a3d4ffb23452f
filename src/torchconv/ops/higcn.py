"""Convolution on graphs through cliques: one propagation matrix and one polynomial filter for every order.

Huang, Zeng, Wu, Lü, "Higher-order Graph Convolutional Network with Flower-Petals Laplacians on Simplicial Complexes",
2023, arXiv 2309.12971. The nodes are the core of a flower; its petals of order p are the cliques of p + 1 nodes (edges,
triangles, …), or rings. With H the incidence of nodes and petals and δ(v) the number of petals at v, a walk from the
core to a petal and back is

    L_p = D^−½ H Hᵀ D^−½/(p + 1),  off the diagonal (number of common petals)/((p + 1) √(δ_u δ_v))
    filter_p(X) = Σ_{k=0}^{K} γ_k L_p^k X                    (γ learned; L_p is zero where a node has no petals)

L_p has no entry where the graph has no edge (rings: no ring). A filter costs K products with it; listing the cliques
costs about their number times the degeneracy of the graph.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive
from torchconv.catalog import part

KINDS = ("simplex", "ring")
MOST = 50_000_000  # petals, or candidates of a step


def undirected(edges: Tensor, num_nodes: int) -> Tensor:
    """Each edge once as (2, E) with the smaller node first; self-loops and repetitions are dropped.

    Args:
        edges: (2, E) of node numbers, either or both directions of an edge.
        num_nodes: of the graph; nodes without edges count.

    Example:
        >>> undirected(torch.tensor([[1, 0, 2, 2], [0, 1, 2, 1]]), 3).tolist()
        [[0, 1], [1, 2]]
    """
    ok = edges.dim() == 2 and edges.shape[0] == 2 and not edges.is_floating_point()
    check(ok, "edges", f"{tuple(edges.shape)} of {edges.dtype}", "give integer node numbers (2, E)")
    check_positive("num_nodes", num_nodes)
    low, high = (int(edges.min()), int(edges.max())) if edges.numel() else (0, 0)
    remedy = f"node numbers must lie between 0 and {num_nodes - 1}"
    check(low >= 0 and high < num_nodes, "edges", [low, high], remedy)
    a, b = torch.minimum(*edges.long()), torch.maximum(*edges.long())
    keys = (a * num_nodes + b)[a != b].unique()
    return torch.stack([keys.div(num_nodes, rounding_mode="floor"), keys % num_nodes])


class _Neighbours:
    """Sorted neighbours of every node, and whether two nodes are joined."""

    def __init__(self, source: Tensor, target: Tensor, num_nodes: int) -> None:
        self.n = num_nodes
        self.keys = (source * num_nodes + target).sort().values
        self.target = self.keys % num_nodes
        self.degree = torch.bincount(source, minlength=num_nodes)
        self.start = self.degree.cumsum(0) - self.degree

    def joined(self, a: Tensor, b: Tensor) -> Tensor:
        keys = a * self.n + b
        if not len(self.keys):
            return torch.zeros_like(keys, dtype=torch.bool)
        places = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        return self.keys[places] == keys

    def extended(self, last: Tensor) -> tuple[Tensor, Tensor]:
        """(row, neighbour) for each neighbour of the node of each row."""
        counts = self.degree[last]
        total = int(counts.sum())
        check(total <= MOST, "edges", f"{total:,} candidates in one step", f"more than {MOST:,}: lower max_order")
        rows = torch.arange(len(last), device=last.device).repeat_interleave(counts)
        within = torch.arange(total, device=last.device) - (counts.cumsum(0) - counts)[rows]
        return rows, self.target[self.start[last][rows] + within]


def cliques(edges: Tensor, num_nodes: int, max_order: int) -> list[Tensor]:
    """All cliques of 2, 3, …, ``max_order`` + 1 nodes, maximal or not.

    Shape:
        a list of (number, order + 1), the nodes of a row in increasing order.

    Raises:
        ValueError: node numbers out of range, or more than fifty million candidates.

    Example:
        >>> [len(c) for c in cliques(torch.combinations(torch.arange(4)).T, 4, 3)]
        [6, 4, 1]
    """
    check_positive("max_order", max_order)
    pairs = undirected(edges, num_nodes)
    # Towards nodes of higher degree, so that hubs have few neighbours ahead.
    degree = torch.bincount(pairs.flatten(), minlength=num_nodes)
    rank = torch.argsort(torch.argsort(degree, stable=True))
    ahead = torch.where(rank[pairs[0]] < rank[pairs[1]], pairs, pairs.flip(0))
    neighbours = _Neighbours(ahead[0], ahead[1], num_nodes)
    found = [ahead.T.contiguous()]
    for _ in range(max_order - 1):
        rows, new = neighbours.extended(found[-1][:, -1])
        kept = found[-1][rows]
        for column in range(kept.shape[1] - 1):
            yes = neighbours.joined(kept[:, column], new)
            kept, new = kept[yes], new[yes]
        found.append(torch.cat([kept, new[:, None]], 1))
    return [c.sort(1).values for c in found]


def rings(edges: Tensor, num_nodes: int, max_order: int) -> list[Tensor]:
    """Edges, and all rings without chords of 3, …, ``max_order`` + 1 nodes; a ring of c nodes has order c − 1.

    Shape:
        a list of (number, order + 1), in the order of the ring, each once.

    The number of paths that are followed grows exponentially with the size: rings of 6 to 8 are usual in molecules.

    Example:
        >>> square = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])
        >>> [len(r) for r in rings(square, 4, 3)]
        [4, 0, 1]
    """
    check_positive("max_order", max_order)
    pairs = undirected(edges, num_nodes)
    both = torch.cat([pairs, pairs.flip(0)], 1)
    neighbours = _Neighbours(both[0], both[1], num_nodes)
    found, paths = [pairs.T.contiguous()], pairs.T.contiguous()  # a path starts at its smallest node
    for _ in range(max_order - 1):
        rows, new = neighbours.extended(paths[:, -1])
        kept = paths[rows]
        yes = (new > kept[:, 0]) & (kept != new[:, None]).all(1)
        kept, new = kept[yes], new[yes]
        for column in range(1, kept.shape[1] - 1):  # a chord
            yes = ~neighbours.joined(kept[:, column], new)
            kept, new = kept[yes], new[yes]
        closed = neighbours.joined(kept[:, 0], new)
        longer = torch.cat([kept, new[:, None]], 1)
        found.append(longer[closed & (kept[:, 1] < new)])  # one of the two directions
        paths = longer[~closed]
    return found


def petal_laplacian(petals: Tensor, num_nodes: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """L_p of petals of one order, a sparse (n, n) matrix in compressed rows.

    Args:
        petals: (number, p + 1) of node numbers: cliques, rings, or the simplices of a complex or hypergraph.
        num_nodes: n.
        dtype: of the entries.

    Example:
        >>> petal_laplacian(torch.tensor([[0, 1, 2]]), 4).to_dense()[0]
        tensor([0.3333, 0.3333, 0.3333, 0.0000])
    """
    check(petals.dim() == 2 and petals.shape[1] >= 1, "petals", tuple(petals.shape), "give node numbers (number, size)")
    size = petals.shape[1]
    counts = torch.bincount(petals.flatten(), minlength=num_nodes).double()
    check(len(counts) == num_nodes, "petals", len(counts) - 1, f"node numbers must be below {num_nodes}")
    i, j = torch.triu_indices(size, size, 1, device=petals.device)
    a, b = petals[:, i].flatten(), petals[:, j].flatten()
    nodes = counts.nonzero()[:, 0]
    keys, common = torch.cat([a * num_nodes + b, b * num_nodes + a]).unique(return_counts=True)
    keys = torch.cat([keys, nodes * num_nodes + nodes])
    order = keys.argsort()
    rows, columns = keys[order].div(num_nodes, rounding_mode="floor"), keys[order] % num_nodes
    weights = torch.cat([common.double(), counts[nodes]])[order]
    values = weights / (size * (counts[rows] * counts[columns]).sqrt())
    starts = torch.cat([rows.new_zeros(1), torch.bincount(rows, minlength=num_nodes).cumsum(0)])
    return _sparse(starts, columns, values.to(dtype))


@part(
    "petal-laplacians",
    paper="higcn",
    kind="data",
    keywords="graph simplicial complex cliques triangles rings higher-order Laplacian",
)
def petal_laplacians(
    edges: Tensor, num_nodes: int, max_order: int = 2, kind: str = "simplex", *, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """The propagation matrices of all orders of a graph.

    Args:
        edges: (2, E), either or both directions of an edge (PyTorch Geometric's ``edge_index``).
        num_nodes: of the graph; nodes without edges count.
        max_order: P; 1 are the edges alone, 2 triangles too.
        kind: "simplex" (cliques) or "ring".
        dtype: of the entries.

    Returns:
        [L_1, …, L_P], sparse.

    Example:
        >>> first, second = petal_laplacians(torch.tensor([[0, 1, 2], [1, 2, 0]]), 4)
        >>> second.to_dense()[0]
        tensor([0.3333, 0.3333, 0.3333, 0.0000])
    """
    check_choice("kind", kind, KINDS)
    found = (cliques if kind == "simplex" else rings)(edges, num_nodes, max_order)
    return [petal_laplacian(petals, num_nodes, dtype=dtype) for petals in found]


def block_diagonal(laplacians: Sequence[Tensor]) -> Tensor:
    """One matrix for a batch of graphs, whose nodes come one after the other.

    Example:
        >>> block_diagonal([torch.eye(2).to_sparse_csr(), torch.eye(1).to_sparse_csr()]).shape
        torch.Size([3, 3])
    """
    check(len(laplacians) > 0, "laplacians", [], "give at least one")
    starts, columns, values = [torch.zeros(1, dtype=torch.int64, device=laplacians[0].device)], [], []
    nodes = entries = 0
    for matrix in laplacians:
        starts.append(matrix.crow_indices()[1:] + entries)
        columns.append(matrix.col_indices() + nodes)
        values.append(matrix.values())
        nodes, entries = nodes + matrix.shape[0], entries + len(matrix.values())
    return _sparse(torch.cat(starts), torch.cat(columns), torch.cat(values))


def _sparse(starts: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """A square matrix in compressed rows, which PyTorch announces as beta at its first one."""
    n = len(starts) - 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support")
        return torch.sparse_csr_tensor(starts, columns, values, (n, n), check_invariants=False)


def polynomial_filter(x: Tensor, laplacian: Tensor, weights: Tensor) -> Tensor:
    """Σ_k γ_k L^k x.

    Args:
        x: (n, features).
        laplacian: (n, n), dense or sparse; no gradient is taken for a sparse one.
        weights: γ, (K + 1,).

    Example:
        >>> polynomial_filter(torch.ones(2, 1), torch.full((2, 2), 0.5), torch.tensor([1.0, 2.0])).flatten()
        tensor([3., 3.])
    """
    check(weights.dim() == 1 and len(weights) > 0, "weights", tuple(weights.shape), "give (K + 1,)")
    expected = (x.shape[0], x.shape[0])
    check(tuple(laplacian.shape) == expected, "laplacian", tuple(laplacian.shape), f"must be {expected}")
    step = _walk(laplacian)
    y = weights[0] * x
    for weight in weights[1:]:
        x = step(x)
        y = y + weight * x
    return y


def _walk(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    """Multiplication by a matrix. PyTorch's own gradient of a sparse one sorts the transpose anew at each product."""
    if matrix.layout == torch.strided:
        return lambda x: matrix @ x
    both = _BothWays(matrix if matrix.layout == torch.sparse_csr else matrix.to_sparse_csr())

    def step(x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(both, x)
        return y

    return step


class _BothWays:
    """A sparse matrix, and its transpose once somebody asks for it."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    @functools.cached_property
    def turned(self) -> _BothWays:
        return _BothWays(self.rows.t().to_sparse_csr())


class _Product(torch.autograd.Function):
    """The product with a sparse matrix; its gradient is the one with the transpose."""

    @staticmethod
    def forward(ctx: Any, both: _BothWays, x: Tensor) -> Tensor:
        ctx.both = both
        return both.rows @ x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, _Product.apply(ctx.both.turned, grad.contiguous())


STARTS = ("ppr", "sgc", "nppr", "random", "given")


def filter_weights(
    degree: int, start: str = "ppr", alpha: float = 0.5, given: Tensor | Sequence[float] | None = None
) -> Tensor:
    """γ of a new filter.

    Args:
        degree: K.
        start: "ppr", personalised PageRank: α(1 − α)^k and (1 − α)^K for the last; "sgc": one at k = α; "nppr": α^k
            over their sum; "random": uniform, over the sum of magnitudes; "given".
        alpha: α.
        given: the weights themselves.

    Example:
        >>> filter_weights(2)
        tensor([0.5000, 0.2500, 0.2500])
    """
    check_positive("degree", degree, zero=True)
    check_choice("start", start, STARTS)
    k = torch.arange(degree + 1, dtype=torch.float64)
    if start == "given":
        fits = given is not None and len(given) == degree + 1
        check(fits, "given", given, f"start='given' needs {degree + 1} weights")
        return torch.as_tensor(given, dtype=torch.float32)
    if start == "sgc":
        check(alpha in range(degree + 1), "alpha", alpha, f"start='sgc': the power, an integer from 0 to {degree}")
        return (k == alpha).float()
    if start == "random":
        bound = (3 / (degree + 1)) ** 0.5
        weights = torch.empty(degree + 1).uniform_(-bound, bound)
        return weights / weights.abs().sum()
    check(0 < alpha <= 1, "alpha", alpha, "must be above 0, at most 1")
    if start == "nppr":
        return (alpha**k / (alpha**k).sum()).float()
    weights = alpha * (1 - alpha) ** k
    weights[-1] = (1 - alpha) ** degree
    return weights.float()


class PetalFilter(nn.Module):
    """A learned polynomial of one propagation matrix.

    Args:
        degree: K.
        start, alpha, given: see :func:`filter_weights`.
    """

    def __init__(
        self,
        degree: int = 10,
        start: str = "ppr",
        alpha: float = 0.5,
        given: Tensor | Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.fW = nn.Parameter(filter_weights(degree, start, alpha, given))

    def forward(self, x: Tensor, laplacian: Tensor) -> Tensor:
        """Filter (n, features)."""
        return polynomial_filter(x, laplacian, self.fW)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"degree={len(self.fW) - 1}"
