"""Poset neural networks: a poset's tropical polynomial as a ReLU network with integer weights.

Dolores-Cuenca, Guzmán-Sáenz, Kim, López-Moreno, Mendoza-Cortes 2024, arXiv 2412.06097; see
:mod:`torchconv.ops.posetfilters`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check
from torchconv.theory.posets import Poset, points


class PosetReLUNetwork(nn.Module):
    """The ReLU network with integer weights that computes a poset's tropical polynomial exactly.

    Neurons of one depth form a layer, which sees the input and all layers before it. Weights are −1, 0 and 1 (and small
    multiples where paths meet), read off the poset's formula; max(p, q) is p + relu(q − p).

    Args:
        poset: the poset.

    Shape:
        (\\*, n) → (\\*).

    Example:
        >>> PosetReLUNetwork(Poset.chain(3))(torch.tensor([1.0, -3.0, 2.5]))
        tensor(2.5000)

    Reference: arXiv 2412.06097, poset neural networks.
    """

    def __init__(self, poset: Poset, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        check(isinstance(poset, Poset), "poset", poset, "must be a Poset, such as Poset.named(12)")
        self.poset = poset
        depths = [0] * poset.n  # of inputs and neurons
        neurons: list[dict[int, int]] = []

        def add(*terms: dict[int, int]) -> dict[int, int]:
            result: dict[int, int] = {}
            for term in terms:
                for node, weight in term.items():
                    result[node] = result.get(node, 0) + weight
            return result

        def relu(term: dict[int, int]) -> dict[int, int]:
            neurons.append(term)
            depths.append(1 + max(depths[node] for node in term))
            return {len(depths) - 1: 1}

        def first_max(p: dict[int, int], q: dict[int, int]) -> dict[int, int]:
            return add(p, relu(add(q, {node: -weight for node, weight in p.items()}))) if p else relu(q)

        found: dict[int, dict[int, int]] = {0: {}}
        for mask in poset.formula.order:
            kind, *rest = poset.formula.steps[mask]
            if kind == "point":
                term = relu({rest[0]: 1})
            elif kind == "sum":
                term = add(*(found[m] for m in rest[0]))
            elif kind == "stack":
                term = found[rest[0][0]]
                for m in rest[0][1:]:
                    above = {} if m.bit_count() == 1 else found[m]
                    term = first_max(above, add(dict.fromkeys(points(m), 1), term))
            else:
                without, forced, within = rest
                term = first_max(found[without], add(dict.fromkeys(points(forced), 1), found[within]))
            found[mask] = term
        order = sorted(range(len(depths)), key=lambda node: (depths[node], node))
        place = {node: k for k, node in enumerate(order)}
        self.depth = max(depths)
        for layer in range(1, self.depth + 1):
            members = [node for node in order if depths[node] == layer]
            weight = torch.zeros(len(members), place[members[0]], device=device, dtype=dtype)
            for row, node in enumerate(members):
                for source, value in neurons[node - poset.n].items():
                    weight[row, place[source]] = value
            self.register_buffer(f"weight{layer}", weight)
        output = torch.zeros(len(order), device=device, dtype=dtype)
        for node, value in found[poset.formula.root].items():
            output[place[node]] = value
        self.register_buffer("output", output)

    def forward(self, x: Tensor) -> Tensor:
        """The largest sum over an up-set, along the last axis."""
        if x.shape[-1:] != (self.poset.n,):
            raise ValueError(f"x of shape {tuple(x.shape)}: expected (*, {self.poset.n})")
        for layer in range(1, self.depth + 1):
            x = torch.cat([x, F.relu(F.linear(x, self.get_buffer(f"weight{layer}")))], -1)
        return x @ self.get_buffer("output")
