"""Poset filters, each applied to the same map, and their tables of up-sets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.parity.core import Adapted, Case
from torchconv.ops.posetfilters import poset_filter
from torchconv.theory.posets import Poset

_WINDOW = ("kernel_size", "stride", "padding", "dilation")


def adapt(case: Case) -> Adapted:
    """Every poset gets its copy of the input as parameter x<id>, so that one backward pass gives all gradients."""
    window: dict[str, Any] = {n: case.config[n] for n in _WINDOW if n in case.config}
    ids = case.config.get("ids", [int(n[1:]) for n in case.outputs if n[0] == "y"])
    copies = nn.Module()
    for number in ids:
        copies.register_parameter(f"x{number}", nn.Parameter(case.inputs["x"].clone()))

    def outputs() -> dict[str, Tensor]:
        return {f"y{n}": poset_filter(copies.get_parameter(f"x{n}"), n, **window) for n in ids}

    def extra(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        tables = {n: _upsets(int(n[6:]), t) for n, t in case.outputs.items() if n.startswith("upsets")}
        return {**tables, **outputs()}

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        # One cotangent serves all: the gradient of the sum for a copy is that of its own output.
        return {"y": torch.stack(list(outputs().values())).sum(0)} if ids else {}

    return Adapted(forward, copies, extra=extra, fresh=lambda n: True)


def _upsets(number: int, expected: Tensor) -> Tensor:
    """Our up-sets, in the file's order where they are the same ones."""
    ours = torch.from_numpy(Poset.named(number).order_polytope_vertices()).to(expected.dtype)
    order = {tuple(row): k for k, row in enumerate(expected.tolist())}
    rows = sorted(ours.tolist(), key=lambda row: order.get(tuple(row), len(order)))
    return torch.tensor(rows, dtype=expected.dtype)
