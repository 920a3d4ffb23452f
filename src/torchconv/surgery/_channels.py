"""Which layers share their channels: read off one run of the network, operation by operation.

Every tensor's second axis belongs to an *axis* of channels. A dense convolution or linear layer ends one and begins
another; norms, depthwise convolutions, pooling and element-wise operations carry it on, and an addition makes two of
them one. What is not known to keep channels apart makes its axis one that cannot be pruned, and says why. This holds
for networks that cannot be traced symbolically as well.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchconv.surgery._probe import run

_NORM = nn.modules.batchnorm._BatchNorm
_CONV = nn.modules.conv._ConvNd
# Operations that treat every channel by itself and keep the second axis; all others must be element-wise.
_POOLS = ("max_pool", "avg_pool", "adaptive_avg_pool", "_adaptive_avg_pool", "adaptive_max_pool", "upsample")
_KEEP = ("clone", "detach", "alias", "contiguous", "_to_copy", "native_dropout", "dropout", "hardswish", "lift_fresh")
_REDUCE = ("mean", "sum", "amax", "amin")
_RESHAPE = ("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "squeeze", "unsqueeze")


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that stand or fall together.

    Attributes:
        norms: batch norms over these channels, by path.
        producers: convolutions and linear layers that make them.
        consumers: those that read them.
        through: depthwise convolutions that carry them on.
        size: how many there are.
        reason: why none can be removed; empty where they can.
    """

    norms: tuple[str, ...]
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    through: tuple[str, ...] = ()
    size: int = 0
    reason: str = ""


class _Axis:
    def __init__(self, size: int, reason: str = "") -> None:
        self.size, self.reason = size, reason
        self.parent: _Axis | None = None
        self.roles: dict[str, dict[str, None]] = {r: {} for r in ("norms", "producers", "consumers", "through")}

    def root(self) -> _Axis:
        found = self
        while found.parent is not None:
            found = found.parent
        return found

    def add(self, role: str, path: str) -> None:
        self.root().roles[role][path] = None

    def block(self, reason: str) -> None:
        root = self.root()
        root.reason = root.reason or reason

    def join(self, other: _Axis) -> None:
        a, b = self.root(), other.root()
        if a is b:
            return
        b.parent = a
        a.reason = a.reason or b.reason
        for role, paths in b.roles.items():
            a.roles[role].update(paths)


_Label = tuple[_Axis, int]  # an axis, and how many neighbours along axis 1 belong to each of its channels


class _Trace(TorchDispatchMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.axes: list[_Axis] = []
        self.labels: dict[int, _Label] = {}
        self.alive: list[Any] = []  # an id means something only as long as its tensor lives
        self.transposed: dict[int, Tensor] = {}
        self.sides: dict[str, tuple[_Label | None, _Axis]] = {}  # of layers that ran
        self.owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
        for path, module in model.named_modules():
            tensors = {**module._parameters, **module._buffers}
            for name, tensor in tensors.items():
                if tensor is not None:
                    self.owners.setdefault(id(tensor), []).append((path, module, name))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.alive.append((args, kwargs, out))
        self._follow(func, args, kwargs or {}, out)
        return out

    def axis(self, size: int, reason: str = "") -> _Axis:
        self.axes.append(_Axis(size, reason))
        return self.axes[-1]

    def give(self, out: Any, label: _Label | None) -> None:
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.labels.pop(id(tensor), None)
                if label is not None and tensor.dim() > 1 and tensor.shape[1] == label[0].size * label[1]:
                    self.labels[id(tensor)] = label

    def label(self, tensor: Any) -> _Label | None:
        return self.labels.get(id(tensor))

    def block(self, tensors: Any, reason: str) -> None:
        for tensor in tree_leaves(tensors):
            found = self.label(tensor)
            if found is not None:
                found[0].block(reason)

    def _follow(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        name = func._schema.name.removeprefix("aten::")
        name = name[:-1] if name.endswith("_") and not name.endswith("__") else name
        if name == "convolution":
            self._convolution(args, out)
        elif "batch_norm" in name:
            self._norm(args, out)
        elif name == "t":
            self.transposed[id(out)] = args[0]
            self.block(args, "an operation transposes them")
        elif name in ("addmm", "mm"):
            x, matrix = args[-2:]
            self._layer(x, self.transposed.get(id(matrix)), out, (args, kwargs), nn.Linear)
        elif name == "linear":
            self._layer(args[0], args[1], out, (args[:2], kwargs), nn.Linear)
        elif name.startswith(_POOLS) or name in _KEEP:
            self.give(out, self.label(args[0]))
        elif name in _REDUCE:
            self._reduce(args, out)
        elif name in _RESHAPE:
            self._reshape(args[0], out)
        elif (name == "as_strided" and _is_pooled(*args[:3])) or (name == "constant_pad_nd" and _pads_space(*args[:2])):
            self.give(out, self.label(args[0]))
        elif torch.Tag.pointwise in func.tags and isinstance(out, Tensor):
            self._pointwise(name, (args, kwargs), out)
        else:
            self.block((args, kwargs), f"{name} reads them")
            self.give(out, None)

    def _owner(self, weight: Any, kind: type) -> tuple[str | None, str]:
        """The layer whose own parameter ``weight`` is, or why it is none."""
        found = self.owners.get(id(weight), [])
        if len(found) != 1:
            return None, "a computed weight acts on them" if not found else f"{found[0][0]} shares its weight"
        path, module, name = found[0]
        if not isinstance(module, kind) or name != "weight" or parametrize.is_parametrized(module):
            return None, f"{path} uses its weight in its own way"
        return path, ""

    def _convolution(self, args: Any, out: Tensor) -> None:
        x, weight, transposed, groups = args[0], args[1], args[6], args[8]
        inputs = x.shape[1]
        outputs = weight.shape[1] * groups if transposed else weight.shape[0]
        if groups == 1:
            self._layer(x, weight, out, args[:1], _CONV)
            return
        path, why = self._owner(weight, _CONV)
        label = self.label(x)
        if path is not None and groups == inputs == outputs:  # depthwise
            if label is None:
                label = (self.axis(inputs, f"{path} reads what no known layer makes"), 1)
            label[0].add("through", path)
            before = self.sides.setdefault(path, (label, label[0]))
            before[1].join(label[0])
            self.give(out, label)
            return
        why = why or f"{path} has groups"
        self.block(x, why)
        self.give(out, (self.axis(outputs, why), 1))

    def _layer(self, x: Any, weight: Any, out: Tensor, read: Any, kind: type) -> None:
        """A dense layer ends the axis of ``x`` and begins that of ``out``."""
        path, why = self._owner(weight, kind)
        if path is None:
            self.block(read, why)
            self.give(out, (self.axis(out.shape[1], why), 1) if out.dim() > 1 else None)
            return
        label = self.label(x)
        made = self.axis(out.shape[1])
        made.add("producers", path)
        if label is not None:
            label[0].add("consumers", path)
        if path in self.sides:  # it runs more than once: the same channels each time
            earlier, axis = self.sides[path]
            axis.join(made)
            if earlier is not None and label is not None and earlier[1] == label[1]:
                earlier[0].join(label[0])
            else:
                for one in (earlier, label):
                    if one is not None:
                        one[0].block(f"{path} also reads something else")
        else:
            self.sides[path] = (label, made)
        self.give(out, (made, 1))

    def _norm(self, args: Any, out: Any) -> None:
        x, known = args[0], [a for a in args[1:5] if isinstance(a, Tensor) and id(a) in self.owners]
        label = self.label(x)
        if label is None:
            label = (self.axis(x.shape[1], "it reads what no known layer makes"), 1)
        paths = {p for t in known for p, module, _ in self.owners[id(t)] if isinstance(module, _NORM)}
        if len(paths) != 1 or label[1] != 1:
            label[0].block("a norm acts on them in its own way")
        for path in paths:
            label[0].add("norms", path)
            before = self.sides.setdefault(path, (label, label[0]))
            before[1].join(label[0])
        self.give(out[0] if isinstance(out, list | tuple) else out, label)

    def _reduce(self, args: Any, out: Any) -> None:
        x, dims = args[0], args[1] if len(args) > 1 else None
        dims = [dims] if isinstance(dims, int) else dims
        if dims and isinstance(x, Tensor) and all(d % x.dim() > 1 for d in dims):
            self.give(out, self.label(x))
        else:
            self.block(args, "an operation sums over them")
            self.give(out, None)

    def _reshape(self, x: Tensor, out: Any) -> None:
        label = self.label(x)
        if label is None:
            return self.give(out, None)
        axis, width = label
        inner = x[0, 0].numel() if x.dim() > 2 and x.shape[0] else 1
        if out.dim() > 1 and out.shape[:2] == x.shape[:2]:
            self.give(out, label)
        elif out.dim() == 2 and out.shape[0] == x.shape[0] and out.shape[1] == x.shape[1] * inner:
            self.give(out, (axis, width * inner))
        else:
            axis.block("a reshape moves them")
            self.give(out, None)

    def _pointwise(self, name: str, inputs: Any, out: Tensor) -> None:
        found: _Label | None = None
        for tensor in tree_leaves(inputs):
            if not isinstance(tensor, Tensor) or out.dim() < 2:
                continue
            at = 1 - (out.dim() - tensor.dim())
            if at < 0 or at >= tensor.dim() or (tensor.shape[at] == 1 and out.shape[1] > 1):
                self.block(tensor, f"{name} spreads them")
                continue
            label = self.label(tensor)
            if label is None or at != 1:
                label = (self.axis(tensor.shape[at], f"{name} reads another tensor over them"), 1)
                self.block(tensor, f"{name} spreads them")
            if found is None:
                found = label
            elif found[1] == label[1]:
                found[0].join(label[0])
            else:
                found[0].block(f"{name} mixes them with others")
                label[0].block(f"{name} mixes them with others")
        self.give(out, found)


def _pads_space(x: Tensor, padding: Sequence[int]) -> bool:
    return len(padding) <= 2 * (x.dim() - 2)


def _is_pooled(x: Tensor, size: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether this is what a global pooling does to (N, C, 1, 1) for the sake of the memory format."""
    pooled = x.dim() > 2 and x.numel() == x.shape[0] * x.shape[1]
    return pooled and list(size) == list(x.shape) and list(stride[:2]) == [x.shape[1], 1]


def trace(model: nn.Module, example: Any) -> list[ChannelGroup]:
    """The groups of channels of ``model`` that have a batch norm, in the order of running.

    Args:
        model: any module, in eval mode.
        example: a tensor, a tuple of arguments, or a dictionary of keyword arguments.
    """
    eager: Any = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    with eager, (watch := _Trace(model)):
        out = run(model, example)
    watch.block(out, "the network returns them")
    roots = dict.fromkeys(axis.root() for axis in watch.axes)
    groups = []
    for axis in roots:
        if axis.roles["norms"]:
            lists = {role: tuple(paths) for role, paths in axis.roles.items()}
            groups.append(ChannelGroup(**lists, size=axis.size, reason=axis.reason))
    return groups
