"""Petals against NetworkX-free brute force, Laplacians against their formulas, filters and networks."""

from __future__ import annotations

import copy
import itertools
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchconv.models.graph.higcn import HiGCN, HiGCNGraph, HiGCNImputation, HiGCNLayer
from torchconv.ops.higcn import (
    PetalFilter,
    block_diagonal,
    cliques,
    filter_weights,
    petal_laplacian,
    petal_laplacians,
    polynomial_filter,
    rings,
    undirected,
)


def random_graph(nodes: int, share: float, seed: int = 0) -> Tensor:
    pairs = torch.combinations(torch.arange(nodes)).T if nodes > 1 else torch.zeros(2, 0, dtype=torch.int64)
    return pairs[:, torch.rand(pairs.shape[1], generator=torch.Generator().manual_seed(seed)) < share]


def complete(nodes: int) -> Tensor:
    return torch.combinations(torch.arange(nodes)).T


def brute_cliques(edges: Tensor, nodes: int, size: int) -> set[tuple[int, ...]]:
    joined = {tuple(sorted(e)) for e in edges.T.tolist()}
    return {
        c for c in itertools.combinations(range(nodes), size) if all(p in joined for p in itertools.combinations(c, 2))
    }


def brute_rings(edges: Tensor, nodes: int, size: int) -> set[frozenset[int]]:
    """Sets of nodes whose induced graph is one ring: everyone has two neighbours, and all are connected."""
    near: dict[int, set[int]] = {v: set() for v in range(nodes)}
    for a, b in edges.T.tolist():
        near[a].add(b)
        near[b].add(a)
    found = set()
    for c in itertools.combinations(range(nodes), size):
        inside = set(c)
        if all(len(near[v] & inside) == 2 for v in c):
            seen, front = {c[0]}, [c[0]]
            while front:
                more = near[front.pop()] & inside - seen
                seen |= more
                front += more
            if seen == inside:
                found.add(frozenset(c))
    return found


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 9), st.floats(0, 1), st.integers(0, 99))
def test_cliques_and_rings_are_all_there(nodes: int, share: float, seed: int) -> None:
    edges = random_graph(nodes, share, seed)
    for order, found in enumerate(cliques(edges, nodes, 4), start=1):
        rows = [tuple(r) for r in found.tolist()]
        assert len(rows) == len(set(rows))
        assert set(rows) == brute_cliques(edges, nodes, order + 1)
    for order, found in enumerate(rings(edges, nodes, 5), start=1):
        rows = [frozenset(r) for r in found.tolist()]
        assert len(rows) == len(set(rows))
        if order > 1:
            assert set(rows) == brute_rings(edges, nodes, order + 1)
        joined = {tuple(sorted(e)) for e in edges.T.tolist()}
        for row in found.tolist():  # in the order of the ring
            assert all(tuple(sorted((a, b))) in joined for a, b in zip(row, row[1:] + row[:1], strict=True))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.floats(0, 1), st.integers(0, 99), st.sampled_from(["simplex", "ring"]))
def test_laplacians(nodes: int, share: float, seed: int, kind: str) -> None:
    edges = random_graph(nodes, share, seed)
    find = cliques if kind == "simplex" else rings
    matrices = petal_laplacians(edges, nodes, 3, kind, dtype=torch.float64)
    for order, (sparse, petals) in enumerate(zip(matrices, find(edges, nodes, 3), strict=True), start=1):
        dense = sparse.to_dense()
        incidence = torch.zeros(nodes, len(petals), dtype=torch.float64)
        for number, petal in enumerate(petals):
            incidence[petal, number] = 1
        counts = incidence.sum(1)
        roots = torch.where(counts > 0, counts.clamp(min=1).rsqrt(), 0.0)
        expected = roots[:, None] * (incidence @ incidence.T) * roots / (order + 1)
        torch.testing.assert_close(dense, expected)
        values = torch.linalg.eigvalsh(dense)
        assert float(values[0]) > -1e-9
        assert float(values[-1]) < 1 + 1e-9
        torch.testing.assert_close(dense @ counts.sqrt(), counts.sqrt())
        assert float(dense.trace()) == pytest.approx(float((counts > 0).sum()) / (order + 1))


def test_known_graphs() -> None:
    for order, matrix in enumerate(petal_laplacians(complete(6), 6, 4), start=1):
        off = order / ((order + 1) * 5)
        expected = torch.full((6, 6), off).fill_diagonal_(1 / (order + 1))
        torch.testing.assert_close(matrix.to_dense(), expected)
    edges = random_graph(9, 0.5)
    adjacency = torch.zeros(9, 9)
    adjacency[edges[0], edges[1]] = 1
    adjacency += adjacency.T.clone()
    roots = adjacency.sum(1).rsqrt()
    half = (torch.eye(9) + roots[:, None] * adjacency * roots) / 2
    torch.testing.assert_close(petal_laplacians(edges, 9, 1)[0].to_dense(), half)
    square = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])
    assert not bool(petal_laplacians(square, 4)[1].to_dense().any())  # no triangles
    doubled = torch.cat([square, square.flip(0), torch.tensor([[2], [2]])], 1)
    assert torch.equal(undirected(doubled, 4), undirected(square, 4))
    hyper = petal_laplacian(torch.tensor([[0, 1, 2], [1, 2, 3]]), 5).to_dense()
    assert float(hyper[1, 2]) == pytest.approx(2 / (3 * 2))
    assert not bool(hyper[4].any())


def test_filters() -> None:
    torch.testing.assert_close(filter_weights(5, "ppr", 0.3).sum(), torch.tensor(1.0))
    assert filter_weights(3, "ppr", 1.0).tolist() == [1.0, 0.0, 0.0, 0.0]
    assert filter_weights(3, "sgc", 2).tolist() == [0.0, 0.0, 1.0, 0.0]
    torch.testing.assert_close(filter_weights(2, "nppr", 0.5), torch.tensor([4.0, 2.0, 1.0]) / 7)
    torch.testing.assert_close(filter_weights(4, "random").abs().sum(), torch.tensor(1.0))
    assert filter_weights(1, "given", given=[2.0, 3.0]).tolist() == [2.0, 3.0]
    edges = random_graph(8, 0.6)
    matrix = petal_laplacians(edges, 8, dtype=torch.float64)[1]
    petals = cliques(edges, 8, 2)[1]
    counts = torch.bincount(petals.flatten(), minlength=8).double()
    steady = counts.sqrt()[:, None]
    torch.testing.assert_close(polynomial_filter(steady, matrix, filter_weights(6).double()), steady)
    x = torch.randn(8, 3, dtype=torch.float64)
    torch.testing.assert_close(polynomial_filter(x, matrix, torch.tensor([2.0]).double()), 2 * x)
    w = torch.randn(5, dtype=torch.float64)
    dense = sum(w[k] * torch.linalg.matrix_power(matrix.to_dense(), k) for k in range(5)) @ x
    torch.testing.assert_close(polynomial_filter(x, matrix, w), dense)
    assert torch.autograd.gradcheck(
        lambda x, w: polynomial_filter(x, matrix, w), (x.requires_grad_(), w.requires_grad_())
    )
    uneven = torch.rand(8, 8, dtype=torch.float64) * (torch.rand(8, 8) < 0.4)
    for sparse in (uneven.to_sparse_csr(), uneven.to_sparse_coo()):
        assert torch.autograd.gradcheck(lambda x, w, m=sparse: polynomial_filter(x, m, w), (x, w))
        torch.testing.assert_close(polynomial_filter(x, sparse, w), polynomial_filter(x, uneven, w))
    module = PetalFilter(3)
    torch.testing.assert_close(copy.deepcopy(module).fW, module.fW)


def test_networks_do_not_see_the_numbering() -> None:
    torch.manual_seed(0)
    edges, x = random_graph(9, 0.5), torch.randn(9, 4)
    order = torch.randperm(9)
    places = torch.empty_like(order)
    places[order] = torch.arange(9)
    net = HiGCN(4, 3, order=3, hidden=5).eval()
    here, there = net(x, petal_laplacians(edges, 9, 3)), net(x[order], petal_laplacians(places[edges], 9, 3))
    torch.testing.assert_close(there, here[order])
    torch.testing.assert_close(here.exp().sum(1), torch.ones(9))
    pool = HiGCNGraph(4, 3, order=2, hidden=5, num_layers=2, readout="mean").eval()
    one = torch.zeros(9, dtype=torch.int64)
    here, there = (
        pool(x[p], petal_laplacians(e, 9), one) for p, e in ((torch.arange(9), edges), (order, places[edges]))
    )
    torch.testing.assert_close(there, here)


@pytest.mark.parametrize("readout", ["sum", "mean"])
def test_batches_are_separate_graphs(readout: str) -> None:
    torch.manual_seed(0)
    sizes, net = (5, 1, 7), HiGCNGraph(4, 2, hidden=6, readout=readout, nonlinearity="elu").eval()
    graphs = [
        petal_laplacians(random_graph(n, 0.6, n), n) if n > 1 else petal_laplacians(torch.zeros(2, 0).long(), 1)
        for n in sizes
    ]
    xs = [torch.randn(n, 4) for n in sizes]
    graph = torch.arange(3).repeat_interleave(torch.tensor(sizes))
    together = net(torch.cat(xs), [block_diagonal([g[p] for g in graphs]) for p in range(2)], graph, 4)
    alone = [net(x, g, torch.zeros(len(x), dtype=torch.int64)) for x, g in zip(xs, graphs, strict=True)]
    torch.testing.assert_close(together[:3], torch.cat(alone))
    assert bool(torch.isfinite(together[3]).all())  # a graph without nodes


def test_triangles_tell_regular_graphs_apart() -> None:
    """Ten K₅ and ten K₄,₄: every node has four neighbours and the same features; only triangles differ."""
    torch.manual_seed(0)
    blocks, labels, nodes = [], [], 0
    bipartite = torch.cartesian_prod(torch.arange(4), torch.arange(4, 8)).T
    for number in range(20):
        edges, size = (complete(5), 5) if number % 2 else (bipartite, 8)
        blocks.append(edges + nodes)
        labels += [number % 2] * size
        nodes += size
    x, y = torch.ones(nodes, 1), torch.tensor(labels)
    accuracy = {}
    for order in (1, 2):
        matrices = petal_laplacians(torch.cat(blocks, 1), nodes, order)
        net = HiGCN(1, 2, order=order, hidden=8, dropout=0.0, dprate=0.0)
        optimizer = torch.optim.Adam(net.parameters(), 0.05)
        for _ in range(120):
            optimizer.zero_grad()
            torch.nn.functional.nll_loss(net(x, matrices), y).backward()
            optimizer.step()
        accuracy[order] = float((net.eval()(x, matrices).argmax(1) == y).float().mean())
    assert accuracy[1] == pytest.approx(max(labels.count(0), labels.count(1)) / nodes, abs=1e-6)
    assert accuracy[2] == 1.0


def test_imputation_and_training_mode() -> None:
    matrices = petal_laplacians(random_graph(8, 0.7), 8, 3)
    net = HiGCNImputation(hidden=4, dropout=0.2)
    net.train()(torch.randn(8, 1), matrices).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    state = {**net.state_dict(), "lin_out.weight": torch.ones(3, 12), "lin_out.bias": torch.ones(3)}
    net.load_state_dict(state)  # as in the authors' files
    assert tuple(net.eval()(torch.randn(8, 1), matrices).shape) == (8, 1)
    layer = HiGCNLayer(4, 6, dropout=0.5)
    layer.train()(torch.randn(8, 4), matrices[:2]).sum().backward()
    assert layer.hgc[1].fW.grad is not None


@pytest.mark.skipif(not os.environ.get("TORCHCONV_DATA"), reason="Cora is in the data folder that TORCHCONV_DATA names")
def test_cora() -> None:
    path = Path(os.environ["TORCHCONV_DATA"]) / "planetoid" / "cora.npz"
    if not path.exists():
        pytest.skip("no planetoid/cora.npz there")
    edges = torch.from_numpy(np.load(path)["edges"].astype(np.int64)).T
    counts = [len(c) for c in cliques(edges, 2708, 2)]
    assert counts == [5278, 1630]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: undirected(torch.zeros(3, 2).long(), 4), "edges='\\(3, 2\\)"),
        (lambda: undirected(torch.zeros(2, 2), 4), "integer node numbers"),
        (lambda: undirected(torch.tensor([[0], [4]]), 4), r"edges=\[0, 4\]: node numbers"),
        (lambda: cliques(complete(3), 3, 0), "max_order=0"),
        (lambda: petal_laplacians(complete(3), 3, kind="star"), "kind='star'"),
        (lambda: petal_laplacian(torch.tensor([[0, 5]]), 3), "petals=5: node numbers must be below 3"),
        (lambda: polynomial_filter(torch.ones(3, 1), torch.eye(4), torch.ones(2)), "laplacian=\\(4, 4\\)"),
        (lambda: filter_weights(3, alpha=0.0), "alpha=0.0"),
        (lambda: filter_weights(3, "sgc", 0.5), "alpha=0.5"),
        (lambda: filter_weights(3, "given", given=[1.0]), "needs 4 weights"),
        (lambda: HiGCN(3, 2)(torch.ones(4, 2), []), "x=\\(4, 2\\)"),
        (lambda: HiGCN(3, 2)(torch.ones(4, 3), [torch.eye(4)]), "laplacians='1 matrices': give one for each of the 2"),
        (lambda: HiGCN(3, 2, dropout=2), "dropout=2"),
        (lambda: HiGCNGraph(3, 2, readout="max"), "readout='max'"),
        (lambda: HiGCNGraph(3, 2, nonlinearity="gelu"), "nonlinearity='gelu'"),
        (lambda: HiGCNGraph(3, 2)(torch.ones(4, 3), [torch.eye(4)] * 2, torch.zeros(3).long()), "graph=\\(3,\\)"),
        (lambda: block_diagonal([]), "laplacians="),
    ],
)
def test_bad_arguments(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_hubs_are_refused_before_memory_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchconv.ops.higcn.MOST", 10)
    with pytest.raises(ValueError, match="candidates in one step"):
        cliques(complete(9), 9, 2)
    assert math.comb(9, 2) == len(cliques(complete(9), 9, 1)[0])
