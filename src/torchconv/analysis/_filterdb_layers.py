"""Kernels of a network: which layers have them, and how deep each lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from torchconv._common import check, check_choice
from torchconv.analysis._filterdb_stream import Array

Source = nn.Module | Mapping[str, Tensor]


@dataclass(frozen=True)
class Layer:
    """The kernels of one 2-D convolution.

    Attributes:
        name: of the module, or of the entry of the state dict.
        weight: (O, I, kh, kw), detached; I is that of one group.
        layer_id: its number among the layers taken, from 0.
        depth: rank of its depth among the distinct depths of all 2-D convolutions of any kernel size, from 0.
        depth_norm: depth over the largest one, 0 to 1; 0 where there is only one depth.
        in_channels: of the whole layer; of one group where only the weight is known.
    """

    name: str
    weight: Tensor
    layer_id: int
    depth: int
    depth_norm: float
    in_channels: int

    @property
    def filters(self) -> Array:
        """(O·I, kh·kw) float32 rows, O outermost."""
        taps = self.weight.shape[2] * self.weight.shape[3]
        return np.asarray(self.weight.cpu().float().reshape(-1, taps).numpy())


def layers(
    source: Source,
    kernel_size: int | tuple[int, int] | None = 3,
    *,
    depth: str = "auto",
    fold_bn: bool = False,
) -> list[Layer]:
    """The layers of a network whose kernels have a given size.

    Every 2-D convolution counts, grouped, depthwise and dilated too, and other modules with a four-dimensional
    ``weight``. Transposed ones, those of one and three dimensions and linear layers are left out.

    Args:
        source: a module, of which layers that the forward pass (of its present mode) never calls are left out where it
            can be traced; or a state dict, in which all entries of four dimensions are taken for kernels (it cannot
            tell transposed convolutions).
        kernel_size: 3 as in the paper, another size, or None for all above 1 × 1.
        depth: "graph" is the longest path from the input in the traced graph, as published; "order" that of the
            modules, exact for chains and an approximation elsewhere; "auto" the graph where the network can be
            traced. A state dict has the order only.
        fold_bn: multiply kernels by the scale of the batch norm that follows them, as exported networks have it.
            That changes sparsity and norms, not the shift.

    Raises:
        ValueError: bad arguments, or ``depth="graph"`` or ``fold_bn`` where the network cannot be traced.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Conv2d(2, 2, 3))
        >>> [(layer.name, layer.depth, layer.filters.shape) for layer in layers(net)]
        [('0', 0, (12, 9)), ('3', 2, (4, 9))]
    """
    check_choice("depth", depth, ("auto", "graph", "order"))
    kinds = (kernel_size,) * 2 if isinstance(kernel_size, int) else kernel_size
    check(kinds is None or (len(kinds) == 2 and min(kinds) >= 1), "kernel_size", kernel_size, "must be >= 1, or None")
    if isinstance(source, nn.Module):
        found = {n: m for n, m in source.named_modules() if _is_convolution(m)}
        weights = {n: _weight(m) for n, m in found.items()}
        widths = {n: w.shape[1] * int(getattr(found[n], "groups", 1) or 1) for n, w in weights.items()}
    else:
        check(not fold_bn, "fold_bn", fold_bn, "needs a module, not a state dict")
        check(depth != "graph", "depth", depth, "needs a module, not a state dict; use 'order'")
        weights = {n: t.detach() for n, t in source.items() if t.dim() == 4 and t.is_floating_point()}
        widths = {n: w.shape[1] for n, w in weights.items()}
    graph = None
    if isinstance(source, nn.Module) and (fold_bn or depth != "order"):
        graph = _trace(source, set(weights))
        for option in ("fold_bn",) * fold_bn + ("depth",) * (depth == "graph"):
            check(graph is not None, option, True if option == "fold_bn" else depth, "the network cannot be traced")
    order = {n: k for k, n in enumerate(weights)}
    paths = _longest_paths(graph, set(weights)) if graph is not None and depth != "order" else order
    reached = {n: paths[n] for n in weights if n in paths}  # what the forward pass never calls has no depth
    distinct = sorted(set(reached.values()))
    ranks = {d: k for k, d in enumerate(distinct)}
    scales = _scales(source, graph) if fold_bn and graph is not None and isinstance(source, nn.Module) else {}
    taken: list[Layer] = []
    for name, weight in weights.items():
        size = tuple(weight.shape[2:])
        if name not in reached or (size != tuple(kinds) if kinds is not None else size == (1, 1)):
            continue
        rank = ranks[reached[name]]
        scaled = weight * scales[name].reshape(-1, 1, 1, 1) if name in scales else weight
        share = rank / (len(distinct) - 1) if len(distinct) > 1 else 0.0
        taken.append(Layer(name, scaled, len(taken), rank, share, widths[name]))
    return taken


def _is_convolution(module: nn.Module) -> bool:
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return False
    weight = getattr(module, "weight", None)
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise ValueError("source: has lazy layers without weights; call it once on an input first")
    return isinstance(weight, Tensor) and weight.dim() == 4 and weight.is_floating_point()


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


class _Tracer(fx.Tracer):
    """Convolutions and whatever PyTorch ships are nodes; other modules are traced through."""

    def __init__(self, names: set[str]) -> None:
        super().__init__()
        self.names = names

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.names or super().is_leaf_module(m, module_qualified_name)


def _trace(model: nn.Module, names: set[str]) -> fx.Graph | None:
    try:
        return _Tracer(names).trace(model)
    except Exception:  # tracing runs any code of the network's on stand-ins, which can fail in any way
        return None


def _longest_paths(graph: fx.Graph, names: set[str]) -> dict[str, int]:
    """Operations on the longest path from an input to a convolution, itself included; of its first call.

    Convolutions inside of a module that is one node lie as deep as it does, and so does the network itself.
    """
    length: dict[fx.Node, int] = {}
    found: dict[str, int] = {"": 0}
    for node in graph.nodes:
        before = max((length[n] for n in node.all_input_nodes), default=0)
        length[node] = before + node.op.startswith("call")
        if node.op == "call_module":
            target = str(node.target)
            for name in names:
                if name == target or name.startswith(f"{target}."):
                    found.setdefault(name, length[node])
    return found


def _scales(model: nn.Module, graph: fx.Graph) -> dict[str, Tensor]:
    """γ / √(variance + ε) for convolutions whose only reader is a batch norm."""
    found: dict[str, Tensor] = {}
    modules: dict[str, Any] = dict(model.named_modules())
    for node in graph.nodes:
        source = node.args[0] if node.args else None
        if node.op != "call_module" or not isinstance(source, fx.Node) or source.op != "call_module":
            continue
        norm = modules[str(node.target)]
        if not isinstance(norm, nn.BatchNorm2d) or norm.running_var is None or len(source.users) != 1:
            continue
        if _is_convolution(modules[str(source.target)]):
            gamma = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight.detach()
            found[str(source.target)] = gamma / (norm.running_var + norm.eps).sqrt()
    return found
