"""HiGCN: classification of nodes and graphs, and imputation, with a filter for every order of a complex.

Huang, Zeng, Wu, Lü 2023, arXiv 2309.12971; parameter names are the authors'. A branch for each order p is
dropout → linear → dropout → Σ_k γ_k L_p^k; branches are concatenated. The node network has no other non-linearity than
its softmax. The propagation matrices come from :func:`torchconv.ops.higcn.petal_laplacians`, once for a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive
from torchconv.catalog import part
from torchconv.ops.higcn import PetalFilter

READOUTS = ("sum", "mean")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "elu": F.elu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "id": lambda x: x,
}


class _Branches(nn.Module):
    """A linear map and a filter for every order, concatenated."""

    def __init__(
        self, in_features: int, hidden: int, order: int, degree: int, alpha: float, dropout: float, dprate: float
    ) -> None:
        super().__init__()
        sizes = {"in_features": in_features, "hidden": hidden, "order": order}
        for name, size in sizes.items():
            check_positive(name, size)
        for name, rate in (("dropout", dropout), ("dprate", dprate)):
            check(0 <= rate <= 1, name, rate, "must lie between 0 and 1")
        self.lin_in = nn.ModuleList(nn.Linear(in_features, hidden) for _ in range(order))
        self.hgc = nn.ModuleList(PetalFilter(degree, alpha=alpha) for _ in range(order))
        self.dropout, self.dprate = dropout, dprate

    def branches(self, x: Tensor, laplacians: Sequence[Tensor]) -> Tensor:
        """(n, order · hidden)."""
        order, features = len(self.lin_in), self.lin_in[0].in_features
        check(x.dim() == 2 and x.shape[1] == features, "x", tuple(x.shape), f"give (nodes, {features})")
        given = f"{len(laplacians)} matrices"
        check(len(laplacians) == order, "laplacians", given, f"give one for each of the {order} orders")
        found = []
        for linear, propagate, matrix in zip(self.lin_in, self.hgc, laplacians, strict=True):
            h = linear(F.dropout(x, self.dropout, self.training))
            found.append(propagate(F.dropout(h, self.dprate, self.training), matrix))
        return torch.cat(found, 1)


@part(
    "higcn",
    paper="higcn",
    kind="model",
    keywords="graph neural network node classification simplicial complex cliques spectral filter",
)
class HiGCN(_Branches):
    """Log probabilities of the classes of nodes.

    Args:
        in_features: of a node.
        num_classes: C.
        order: P, the number of orders.
        hidden: features of a branch.
        degree: K of the filters.
        alpha: where their weights start, see :func:`~torchconv.ops.higcn.filter_weights`.
        dropout: of the inputs and of the joined branches; ``dprate`` before a filter.

    Shape:
        x (n, in_features), ``order`` matrices (n, n) → (n, C).

    Example:
        >>> from torchconv.ops.higcn import petal_laplacians
        >>> matrices = petal_laplacians(torch.tensor([[0, 1, 2], [1, 2, 0]]), 4)
        >>> HiGCN(5, 3).eval()(torch.randn(4, 5), matrices).argmax(1).shape
        torch.Size([4])
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        order: int = 2,
        hidden: int = 32,
        *,
        degree: int = 10,
        alpha: float = 0.5,
        dropout: float = 0.5,
        dprate: float = 0.5,
    ) -> None:
        super().__init__(in_features, hidden, order, degree, alpha, dropout, dprate)
        check_positive("num_classes", num_classes)
        self.lin_out = nn.Linear(order * hidden, num_classes)

    def forward(self, x: Tensor, laplacians: Sequence[Tensor]) -> Tensor:
        """Log probabilities."""
        joined = F.dropout(self.branches(x, laplacians), self.dropout, self.training)
        return self.lin_out(joined).log_softmax(1)


class _Activation(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        check_choice("nonlinearity", name, ACTIVATIONS)
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.name](x)


class HiGCNLayer(_Branches):
    """The branches, joined by a linear map and two layers with batch norms.

    Args:
        in_features, hidden, order, degree, alpha: as in :class:`HiGCN`.
        nonlinearity: "relu", "elu", "tanh", "sigmoid" or "id".
        dropout: of the inputs, before the filters and of the joined branches.
    """

    def __init__(
        self,
        in_features: int,
        hidden: int,
        order: int = 2,
        *,
        degree: int = 10,
        alpha: float = 0.5,
        nonlinearity: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(in_features, hidden, order, degree, alpha, dropout, dropout)
        self.lin_out = nn.Linear(order * hidden, hidden)
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), _Activation(nonlinearity)]
        self.nn = nn.Sequential(*layers)

    def forward(self, x: Tensor, laplacians: Sequence[Tensor]) -> Tensor:
        """(n, in_features) → (n, hidden)."""
        joined = F.dropout(self.branches(x, laplacians), self.dropout, self.training)
        y: Tensor = self.nn(self.lin_out(joined))
        return y


@part(
    "higcn-graph",
    paper="higcn",
    kind="model",
    keywords="graph classification molecules simplicial complex rings",
)
class HiGCNGraph(nn.Module):
    """Logits of the classes of graphs.

    Args:
        in_features, num_classes, hidden, order: as in :class:`HiGCN`.
        num_layers: of :class:`HiGCNLayer`.
        readout: "sum" or "mean" over the nodes of a graph.
        nonlinearity: see :class:`HiGCNLayer`.
        dropout: rate of all dropouts.
        options: ``degree`` and ``alpha`` of the layers.

    Shape:
        x (n, in_features) of all nodes of a batch, ``order`` matrices (n, n) (see
        :func:`~torchconv.ops.higcn.block_diagonal`), the graph of every node (n,) → (graphs, C).

    Example:
        >>> from torchconv.ops.higcn import block_diagonal, petal_laplacians
        >>> triangle = petal_laplacians(torch.tensor([[0, 1, 2], [1, 2, 0]]), 3)
        >>> matrices = [block_diagonal([m, m]) for m in triangle]
        >>> net = HiGCNGraph(5, 2).eval()
        >>> tuple(net(torch.randn(6, 5), matrices, torch.tensor([0, 0, 0, 1, 1, 1])).shape)
        (2, 2)
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        order: int = 2,
        hidden: int = 32,
        num_layers: int = 1,
        *,
        readout: str = "sum",
        nonlinearity: str = "relu",
        dropout: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        check_positive("num_layers", num_layers)
        check_positive("num_classes", num_classes)
        check_choice("readout", readout, READOUTS)
        options |= {"nonlinearity": nonlinearity, "dropout": dropout}
        self.conv1 = HiGCNLayer(in_features, hidden, order, **options)
        self.convs = nn.ModuleList(HiGCNLayer(hidden, hidden, order, **options) for _ in range(num_layers - 1))
        self.lin1, self.lin2 = nn.Linear(hidden, hidden), nn.Linear(hidden, num_classes)
        self.readout, self.dropout, self.act = readout, dropout, _Activation(nonlinearity)

    def forward(self, x: Tensor, laplacians: Sequence[Tensor], graph: Tensor, num_graphs: int | None = None) -> Tensor:
        """Logits; ``num_graphs`` counts graphs without nodes at the end, too."""
        check(graph.shape == x.shape[:1], "graph", tuple(graph.shape), f"give the graph of each of the {len(x)} nodes")
        for layer in (self.conv1, *self.convs):
            x = layer(x, laplacians)
        count = num_graphs if num_graphs is not None else int(graph.max()) + 1 if len(graph) else 0
        pooled = x.new_zeros(count, x.shape[1]).index_add(0, graph, x)
        if self.readout == "mean":
            pooled = pooled / torch.bincount(graph, minlength=count).clamp(min=1).to(x.dtype)[:, None]
        y: Tensor = self.lin2(F.dropout(self.act(self.lin1(pooled)), self.dropout, self.training))
        return y


class HiGCNImputation(_Branches):
    """Missing values of the nodes of a complex, from those that are known.

    Args:
        in_features, out_features: of a node.
        order, hidden, degree, alpha, dropout, dprate: as in :class:`HiGCN`.
    """

    def __init__(
        self,
        in_features: int = 1,
        out_features: int = 1,
        order: int = 3,
        hidden: int = 32,
        *,
        degree: int = 10,
        alpha: float = 0.5,
        dropout: float = 0.0,
        dprate: float = 0.0,
    ) -> None:
        super().__init__(in_features, hidden, order, degree, alpha, dropout, dprate)
        self.lin_out1, self.lin_out2 = nn.Linear(order * hidden, hidden), nn.Linear(hidden, out_features)

    def _load_from_state_dict(self, state: Any, prefix: str, *arguments: Any) -> None:
        for name in ("weight", "bias"):  # the authors' files hold a layer that they do not use
            state.pop(f"{prefix}lin_out.{name}", None)
        super()._load_from_state_dict(state, prefix, *arguments)

    def forward(self, x: Tensor, laplacians: Sequence[Tensor]) -> Tensor:
        """(n, in_features) → (n, out_features)."""
        joined = F.dropout(self.branches(x, laplacians), self.dropout, self.training)
        return F.leaky_relu(self.lin_out2(F.leaky_relu(self.lin_out1(joined))))
