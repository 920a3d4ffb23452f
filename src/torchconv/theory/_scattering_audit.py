"""How much a trained convolutional network can amplify a difference of inputs: bounds layer by layer."""

from __future__ import annotations

import copy
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from torchconv._common import check, ntuple
from torchconv.catalog import part

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_AVERAGE = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_ADAPTIVE = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_MAX = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
# Largest slopes, rounded up; functions are those of torch, torch.nn.functional and of tensors, by name.
_SLOPES: dict[str, float] = {
    "relu": 1.0,
    "relu_": 1.0,
    "relu6": 1.0,
    "tanh": 1.0,
    "sigmoid": 0.25,
    "softplus": 1.0,
    "hardtanh": 1.0,
    "abs": 1.0,
    "gelu": 1.1290,
    "silu": 1.0999,
    "mish": 1.0890,
    "hardswish": 1.5,
    "hardsigmoid": 0.16667,
}
_RESHAPES = ("flatten", "reshape", "view", "permute", "transpose", "contiguous", "squeeze", "unsqueeze", "dropout")


@dataclass(frozen=True)
class LayerBounds:
    """One step of a network.

    Attributes:
        name, kind: of the module or function.
        size: of what comes out, without the batch.
        lower, upper: frame bounds A and B, of convolutions; None otherwise.
        lipschitz: constant of this step, √B of a convolution.
        total: constant from the input to here.
    """

    name: str
    kind: str
    size: tuple[int, ...]
    lower: float | None
    upper: float | None
    lipschitz: float
    total: float


def conv_bounds(
    weight: Tensor,
    size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    circular: bool = False,
) -> tuple[float, float]:
    """A and B with A·‖x‖² ≤ ‖conv(x)‖² ≤ B·‖x‖²: the extreme squared singular values of a convolution.

    At every frequency of the subsampled grid, the matrix of responses at the s^d frequencies that coincide there.

    Args:
        weight: (out, in/groups, \\*kernel), as in ``nn.ConvNd``.
        size: of the map, one number or one for each axis.
        stride, dilation, groups: as in ``nn.ConvNd``.
        circular: periodic padding, where the bounds are attained (when strides divide the size). Otherwise zero
            padding of any width: the map is embedded in a larger periodic one; B stays a bound, A is one of the
            convolution that keeps all its outputs.

    Raises:
        ValueError: an argument does not fit the weight.

    Example:
        >>> conv_bounds(torch.tensor([[[1.0, 2.0]]]), 2, circular=True)
        (1.0, 9.0)
    """
    ndim = weight.dim() - 2
    check(1 <= ndim <= 3, "weight.shape", tuple(weight.shape), "must be (out, in/groups, *kernel) with 1 to 3 axes")
    check(weight.shape[0] % groups == 0, "groups", groups, f"must divide the {weight.shape[0]} output channels")
    kernel = tuple(weight.shape[2:])
    steps, rates = ntuple("stride", stride, ndim), ntuple("dilation", dilation, ndim)
    grid = [
        n if circular else -(-(n + d * (k - 1)) // s) * s
        for n, k, d, s in zip(ntuple("size", size, ndim), kernel, rates, steps, strict=True)
    ]
    if any(n % s for n, s in zip(grid, steps, strict=True)):
        steps = (1,) * ndim  # periodic aliases do not line up; without subsampling B is still a bound
    rows = weight.detach().double().cpu().reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    taps = torch.tensor(list(itertools.product(*map(range, kernel))), dtype=torch.float64) * torch.tensor(rates)
    coarse = [n // s for n, s in zip(grid, steps, strict=True)]
    coarse[-1] = coarse[-1] // 2 + 1  # the other half is conjugate
    aliases = torch.tensor(list(itertools.product(*map(range, steps))), dtype=torch.float64) / torch.tensor(steps)
    lowest, highest = math.inf, 0.0
    places = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in coarse)).view(-1, ndim)
    for chunk in places.split(max(1, (1 << 20) // (rows[0, ..., 0].numel() * len(aliases)))):
        turns = (chunk / torch.tensor(grid))[:, None] + aliases
        waves = torch.exp(-2j * math.pi * (turns @ taps.T))
        response = torch.einsum("goit,fat->gfoai", rows.to(waves.dtype), waves).flatten(-2) / math.sqrt(len(aliases))
        wide = response.shape[-1] > response.shape[-2]
        gram = response @ response.mH if wide else response.mH @ response
        values = torch.linalg.eigvalsh(gram) if gram.shape[-1] > 1 else gram.real
        lowest = 0.0 if wide else min(lowest, float(values.min()))
        highest = max(highest, float(values.max()))
    return max(lowest, 0.0), highest


def lipschitz(module: nn.Module, size: Sequence[int]) -> float:
    """A Lipschitz constant of one layer in eval mode, for the Euclidean norm.

    Args:
        module: a convolution, linear map, batch norm, pooling, activation, dropout or reshape of ``torch.nn``.
        size: of its input without the batch, (C, \\*spatial).

    Raises:
        ValueError: nothing is known about the module.

    Example:
        >>> round(lipschitz(nn.AvgPool2d(2), (3, 8, 8)), 9), lipschitz(nn.Sigmoid(), (3, 8, 8))
        (0.5, 0.25)
    """
    return _module_bounds(module, tuple(size))[2]


def _module_bounds(module: Any, size: tuple[int, ...]) -> tuple[float | None, float | None, float]:
    if isinstance(module, _CONV):
        circular = module.padding_mode == "circular"
        fits = module.padding_mode in ("zeros", "circular")
        check(fits, "padding_mode", module.padding_mode, "bounds are known for zeros and circular padding")
        if circular and not isinstance(module.padding, str):
            extent = zip(module.padding, module.dilation, module.kernel_size, strict=True)
            fits = all(2 * p <= d * (k - 1) for p, d, k in extent)
            check(fits, "padding", module.padding, "periodic padding beyond 'same' repeats outputs; use 'same'")
        options = (module.stride, module.dilation, module.groups, circular)
        lower, upper = conv_bounds(module.weight, size[1:], *options)
        return lower, upper, math.sqrt(upper)
    if isinstance(module, _TRANSPOSED):  # the adjoint of a convolution of the larger map
        larger = [n * s for n, s in zip(size[1:], module.stride, strict=True)]
        lower, upper = conv_bounds(module.weight, larger, module.stride, module.dilation, module.groups)
        return 0.0, upper, math.sqrt(upper)
    return None, None, _constant(module, size)


def _constant(module: Any, size: tuple[int, ...]) -> float:
    if isinstance(module, nn.Linear):
        return float(torch.linalg.matrix_norm(module.weight.detach().double(), 2))
    if isinstance(module, _BATCH_NORM) and module.running_var is not None:
        scale = (module.running_var.double() + module.eps).rsqrt()
        return float((scale if module.weight is None else scale * module.weight.detach().abs()).max())
    if isinstance(module, (*_AVERAGE, *_ADAPTIVE)):
        return _averages(module, size[1:])
    if isinstance(module, _MAX):
        kernels, strides = (ntuple("kernel_size", v, len(size) - 1) for v in (module.kernel_size, module.stride))
        return math.sqrt(math.prod(-(-k // s) for k, s in zip(kernels, strides, strict=True)))  # windows over a place
    if isinstance(module, nn.LeakyReLU):
        return max(1.0, abs(module.negative_slope))
    if isinstance(module, nn.ELU):
        return max(1.0, module.alpha)
    if isinstance(module, nn.PReLU):
        return max(1.0, float(module.weight.detach().abs().max()))
    name = type(module).__name__.lower()
    if name in _SLOPES and type(module).__module__.startswith("torch.nn"):
        return _SLOPES[name]
    known = isinstance(module, (nn.Identity, nn.Flatten, nn.Unflatten, *_DROPOUT))
    check(known, "module", type(module).__name__, "no Lipschitz constant is known; audit the network up to it")
    return 1.0


def _averages(module: Any, size: Sequence[int]) -> float:
    """Averaging works axis by axis; the norm of every axis' matrix, which is what the pooling makes of the identity."""
    total = 1.0
    for axis, n in enumerate(size):
        unit = torch.eye(n, dtype=torch.float64).unsqueeze(1)

        def one(value: Any, axis: int = axis) -> Any:
            return value[axis] if isinstance(value, tuple) else value

        if isinstance(module, _ADAPTIVE):
            pooled = F.adaptive_avg_pool1d(unit, one(module.output_size) or n)
        else:
            check(getattr(module, "divisor_override", None) is None, "divisor_override", "set", "leave it unset")
            window = (one(module.kernel_size), one(module.stride), one(module.padding))
            pooled = F.avg_pool1d(unit, *window, module.ceil_mode, module.count_include_pad)
        total *= float(torch.linalg.matrix_norm(pooled.squeeze(1), 2))
    return total


@part(
    "lipschitz-audit",
    paper="scattering",
    kind="theory",
    keywords="Lipschitz constant certificate robustness frame bounds trained network spectral norm audit",
)
def audit(model: nn.Module, size: Sequence[int]) -> list[LayerBounds]:
    """Certified Lipschitz constants of a network in eval mode, step by step; the last one's ``total`` is the network's.

    Constants multiply along a chain, add where branches are added, and add in square where they are concatenated.

    Args:
        model: convolutions, linear maps, batch norms, poolings, activations; traced by ``torch.fx``.
        size: of the input without the batch, (C, \\*spatial).

    Raises:
        ValueError: a step of which no constant is known; the message names it.

    Example:
        >>> net = nn.Sequential(nn.Conv1d(1, 1, 1, bias=False), nn.ReLU(), nn.AvgPool1d(4))
        >>> _ = nn.init.constant_(net[0].weight, 3)
        >>> [(step.kind, round(step.total, 4)) for step in audit(net, (1, 16))]
        [('Conv1d', 3.0), ('ReLU', 3.0), ('AvgPool1d', 1.5)]

    Reference: arXiv 1512.06293, admissibility condition.
    """
    traced = fx.symbolic_trace(nn.Sequential(copy.deepcopy(model).eval()))
    example = next(model.parameters(), torch.zeros(()))
    with torch.no_grad():
        ShapeProp(traced).propagate(example.new_zeros(1, *size))
    totals: dict[fx.Node, float] = {}
    steps = []
    for node in traced.graph.nodes:
        before = [totals[n] for n in node.all_input_nodes if n in totals]
        lower = upper = None
        if node.op == "placeholder":
            totals[node] = 1.0
            continue
        if node.op in ("output", "get_attr"):
            continue
        if node.op == "call_module":
            module = traced.get_submodule(str(node.target))
            lower, upper, own = _module_bounds(module, _shape(node.all_input_nodes[0]))
            total, name, kind = own * before[0], str(node.target).removeprefix("0."), type(module).__name__
        else:
            kind = node.target if node.op == "call_method" else getattr(node.target, "__name__", str(node.target))
            name = node.name
            total = _function(node, kind, before)
            own = total / max(before)
        totals[node] = total
        steps.append(LayerBounds(name, kind, _shape(node), lower, upper, own, total))
    return steps


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["tensor_meta"].shape[1:])


def _function(node: fx.Node, kind: str, before: list[float]) -> float:
    """The constant after a function, from those of its arguments."""
    operations: dict[str, Callable[[], float]] = {
        "add": lambda: sum(before) if len(node.all_input_nodes) == 2 else before[0] * _added_twice(node),
        "sub": lambda: sum(before),
        "cat": lambda: math.sqrt(sum(t * t for t in before)),
        "neg": lambda: before[0],
        "mean": lambda: before[0] * math.sqrt(math.prod(_shape(node)) / math.prod(_shape(node.all_input_nodes[0]))),
    }
    name = "add" if node.target in (operator.add, operator.iadd, torch.add) else kind.rstrip("_")
    if name == "mul" and any(isinstance(a, int | float) for a in node.args):
        return before[0] * max(abs(a) for a in node.args if isinstance(a, int | float))
    if name in _SLOPES:
        return _SLOPES[name] * before[0]
    if name in _RESHAPES:
        return before[0]
    check(name in operations, "model", node.format_node(), "no Lipschitz constant is known of this step")
    return operations[name]()


def _added_twice(node: fx.Node) -> float:
    """x + x, or x plus a number."""
    return float(sum(isinstance(a, fx.Node) for a in node.args))
