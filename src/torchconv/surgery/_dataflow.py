"""Which batch norms can be folded into which layers: read off one run of the network, operation by operation.

Nothing is concluded from names or the order of registration. While the network runs on an example, every ATen operation
is seen with the tensors that it reads and makes. A batch norm can be folded into the layer before it when the tensor
that the layer makes is the very tensor that the batch norm is called with, when no other operation reads it and the
network does not return it, when each of the two runs once, and when the operation uses the layer's own parameters as
they are. This holds for networks that cannot be traced as well.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchconv.surgery._probe import run
from torchconv.surgery.structure import has_hooks

_CONVOLUTION = torch.ops.aten.convolution.default


@dataclass(frozen=True)
class Use:
    """One run of a layer with a weight: what it ran with, the id of what it read, what it made.

    ``path`` is a linear layer's; convolutions are known by their operation.
    """

    weight: Tensor
    bias: Tensor | None
    read: int
    made: Tensor
    path: str = ""
    padded: bool = False
    transposed: bool = False


@dataclass(frozen=True)
class NormCall:
    """One call of a batch norm: the id of what it read, and what it made."""

    read: int
    made: Tensor


class Dataflow:
    """What was seen: runs of layers, calls of norms by their path, and who read what.

    Tensors that matter (parameters, what layers and norms make) are kept alive, because an id means something only as
    long as its tensor lives.
    """

    def __init__(self, model: nn.Module) -> None:
        self.uses: list[Use] = []
        self.norms: dict[str, list[NormCall]] = {}
        self.seen_outside: set[int] = set()
        self._alive: list[Any] = []
        self._readers: dict[int, list[str]] = {}
        for parameter in model.parameters():
            self.mind(parameter)

    def mind(self, tensor: Tensor) -> None:
        """Note from now on who reads ``tensor``."""
        self._alive.append(tensor)
        self._readers.setdefault(id(tensor), [])

    def read(self, tensors: Any, where: str) -> None:
        """An operation within the norm or linear layer ``where`` ("" elsewhere) reads ``tensors``."""
        for key in {id(t) for t in tree_leaves(tensors) if isinstance(t, Tensor)}:
            if key in self._readers:
                self._readers[key].append(where)

    def show(self, *tensors: Any) -> None:
        """Somebody outside looks at ``tensors``."""
        self._alive.append(tensors)
        self.seen_outside.update(id(t) for t in tree_leaves(tensors) if isinstance(t, Tensor))

    def known(self, tensor: Any) -> int:
        """The id of a tensor that is minded, else 0."""
        return id(tensor) if id(tensor) in self._readers else 0

    def readers(self, tensor: Tensor) -> list[str]:
        """Where ``tensor`` was read, an entry an operation."""
        return self._readers[id(tensor)]


class _Watch(TorchDispatchMode):
    def __init__(self, flow: Dataflow, inside: list[str]) -> None:
        super().__init__()
        self.flow, self.inside = flow, inside

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.flow.read((args, kwargs), self.inside[-1] if self.inside else "")
        if func is _CONVOLUTION:
            x, weight, bias, _, padding, _, transposed = args[:7]
            self.flow.mind(made)
            self.flow.uses.append(
                Use(weight, bias, self.flow.known(x), made, padded=any(padding), transposed=transposed)
            )
        return made


def watch(model: nn.Module, example: Any, is_norm: Callable[[nn.Module], bool]) -> tuple[Any, Dataflow]:
    """Run ``model`` once and see what is made of what.

    Args:
        model: in eval mode.
        example: its input.
        is_norm: which modules are batch norms.

    Returns:
        The output, and what was seen.
    """
    flow = Dataflow(model)
    inside: list[str] = []
    # What runs in a compiled graph is not seen; nothing is compiled as long as the compiler was not imported.
    eager: Any = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    with _hooks(model, flow, inside, is_norm), eager, _Watch(flow, inside):
        out = run(model, example)
    flow.show(out)
    return out, flow


@contextmanager
def _hooks(model: nn.Module, flow: Dataflow, inside: list[str], is_norm: Callable[[nn.Module], bool]) -> Iterator[None]:
    handles = []

    def enter(path: str) -> Callable[..., None]:
        return lambda module, args: inside.append(path)

    def leave_norm(path: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, out: Any) -> None:
            inside.pop()
            flow.norms.setdefault(path, []).append(NormCall(flow.known(args[0]) if len(args) == 1 else 0, out))
            flow.mind(out)

        return note

    def leave_linear(path: str) -> Callable[..., None]:
        def note(module: Any, args: Any, out: Any) -> None:
            inside.pop()
            if len(args) == 1 and out.dim() == 2:
                flow.mind(out)
                flow.uses.append(Use(module.weight, module.bias, flow.known(args[0]), out, path))

        return note

    def show(module: nn.Module, args: Any, out: Any = None) -> None:
        flow.show(args, out)

    for path, module in model.named_modules():
        if has_hooks(module, before=True):
            handles.append(module.register_forward_pre_hook(show, prepend=True))
        if has_hooks(module):
            handles.append(module.register_forward_hook(show))
        if is_norm(module) or type(module) is nn.Linear:
            handles.append(module.register_forward_pre_hook(enter(path)))
            leave = leave_norm(path) if is_norm(module) else leave_linear(path)
            handles.append(module.register_forward_hook(leave, prepend=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
