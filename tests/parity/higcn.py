"""Petal Laplacians, polynomial filters, and HiGCN for nodes and graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.parity.core import Adapted, Case
from torchconv.models.graph.higcn import HiGCN, HiGCNGraph, HiGCNImputation
from torchconv.ops.higcn import PetalFilter, block_diagonal, cliques, filter_weights, petal_laplacian, rings

Tensors = Mapping[str, Tensor]


def adapt(case: Case) -> Adapted:
    """The tensors of a case tell its kind."""
    if "lin1.weight" in case.state:
        return _graphs(case)
    if "lin_in.0.weight" in case.state:
        return _nodes(case)
    if "fW" in case.state:
        return _filter(case)
    return Adapted(lambda inputs: _laplacians(inputs["edges"], case.config))


def _matrices(edges: Tensor, config: dict[str, Any], nodes: int, order: int, dtype: torch.dtype) -> list[Tensor]:
    find = rings if config.get("petalType", "simplex") == "ring" else cliques
    return [petal_laplacian(petals, nodes, dtype=dtype) for petals in find(edges, nodes, order)]


def _laplacians(edges: Tensor, config: dict[str, Any]) -> Tensors:
    nodes, order = config["num_nodes"], config.get("max_order", config.get("Order", 2))
    ring = config.get("petalType", "simplex") == "ring"
    found = (rings if ring else cliques)(edges, nodes, order)
    # The authors follow a ring in both directions.
    counts = [nodes, *(len(p) * (2 if ring and p.shape[1] > 2 else 1) for p in found)]
    matrices = {f"L{p}": petal_laplacian(petals, nodes).to_dense() for p, petals in enumerate(found, start=1)}
    return {**matrices, "petal_num": torch.tensor(counts)}


def _filter(case: Case) -> Adapted:
    module = PetalFilter(len(case.state["fW"]) - 1)

    def forward(inputs: dict[str, Tensor]) -> Tensors:
        found = {"y": module(inputs["x"], inputs["L"])}
        if "ppr_init" in case.outputs:
            found["ppr_init"] = filter_weights(case.config["K"], "ppr", case.config.get("alpha", 0.5))
        return found

    return Adapted(forward, module)


def _sizes(state: Tensors, prefix: str = "") -> dict[str, Any]:
    orders = len([name for name in state if name.startswith(f"{prefix}hgc.")])
    hidden, features = state[f"{prefix}lin_in.0.weight"].shape
    degree = len(state[f"{prefix}hgc.0.fW"]) - 1
    return {"in_features": features, "hidden": hidden, "order": orders, "degree": degree}


def _nodes(case: Case) -> Adapted:
    config, sizes = case.config, _sizes(case.state)
    module: HiGCN | HiGCNImputation
    if "lin_out1.weight" in case.state:
        module = HiGCNImputation(out_features=len(case.state["lin_out2.weight"]), **sizes)
    else:
        module = HiGCN(num_classes=len(case.state["lin_out.weight"]), **sizes)
    nodes = config.get("num_nodes", len(case.inputs["x"]))

    def forward(inputs: dict[str, Tensor]) -> Tensors:
        matrices = _matrices(inputs["edges"], config, nodes, sizes["order"], inputs["x"].dtype)
        y = module(inputs["x"], matrices)
        name = next(iter(case.outputs)) if len(case.outputs) == 1 else "log_softmax"
        return {name: y}

    return Adapted(forward, module)


def _graphs(case: Case) -> Adapted:
    config, state = case.config, case.state
    sizes = _sizes(state, "conv1.")
    layers = 1 + len({name.split(".")[1] for name in state if name.startswith("convs.")})
    options = {name: config[name] for name in ("readout", "nonlinearity") if name in config}
    module = HiGCNGraph(num_classes=len(state["lin2.weight"]), num_layers=layers, **sizes, **options)
    nodes = config["num_nodes"]

    def forward(inputs: dict[str, Tensor]) -> Tensors:
        dtype = inputs["x"].dtype
        graphs = [_matrices(inputs[f"edges{g}"], config, n, sizes["order"], dtype) for g, n in enumerate(nodes)]
        matrices = [block_diagonal([graph[p] for graph in graphs]) for p in range(sizes["order"])]
        graph = torch.arange(len(nodes)).repeat_interleave(torch.tensor(nodes))
        return {"logits": module(inputs["x"], matrices, graph, len(nodes))}

    return Adapted(forward, module)
