"""The kernels of any module: one run under a dispatch mode that notes operations and tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from torchconv._common import check
from torchconv.analysis import _formulas as formulas
from torchconv.analysis._waterline_kernels import Kernel, fuse
from torchconv.analysis.count import _CountingMode, _Scopes, _undisturbed


@dataclass
class Call:
    """One call of a module: ``kernels[start:stop]``, and the bytes that entered and left it."""

    name: str
    start: int
    boundary: int
    stop: int = -1


@dataclass
class Trace:
    """What ran, in order."""

    kernels: list[Kernel] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    def of(self, name: str) -> list[Kernel]:
        """The kernels inside module ``name``."""
        return [k for c in self.calls if c.name == name for k in self.kernels[c.start : c.stop]]

    def whole(self, name: str) -> list[Kernel]:
        """The calls of module ``name``, each as one kernel."""
        calls = [c for c in self.calls if c.name == name and c.stop > c.start]
        return [fuse(self.kernels[c.start : c.stop], c.boundary, name) for c in calls]

    def fused(self, blocks: Sequence[str]) -> list[Kernel]:
        """The kernels, with those of each module in ``blocks`` as one."""
        known = {c.name for c in self.calls}
        for name in blocks:
            check(name in known, "blocks", name, "is no module that ran")
        chosen = sorted((c for c in self.calls if c.name in set(blocks)), key=lambda c: (c.start, -c.stop))
        kernels: list[Kernel] = []
        at = 0
        for call in chosen:
            if call.start < at or call.start == call.stop:
                continue  # inside another block, or without kernels of its own
            kernels += self.kernels[at : call.start]
            kernels.append(fuse(self.kernels[call.start : call.stop], call.boundary, call.name))
            at = call.stop
        return kernels + self.kernels[at:]


def trace(model: nn.Module, *inputs: Any, eager: bool = False) -> Trace:
    """Run a module once, in eval mode without gradients, and note its kernels: operations and bytes.

    Convolutions, matrix products, attention and Fourier transforms are kernels. What stands between them (norms,
    activations, pooling, additions, copies) is taken as part of the kernel before it, so that it moves no bytes but
    those of other maps that it reads: the residual. ``eager`` makes each of these a kernel instead.

    Args:
        model: any module; on the meta device nothing is computed.
        inputs: what it is called with.
        eager: see above.
    """
    found = Trace()
    scopes = _Calls(model, found)
    mode = _Tracing(scopes, found, [*model.parameters(), *model.buffers()], eager)
    with _undisturbed(model, inputs), scopes, torch.no_grad(), mode:
        model(*inputs)
    return found


def _bytes(values: Any) -> int:
    """Bytes of distinct tensors; an expanded one is as large as its storage."""
    distinct = {id(t): t for t in formulas.tensors(values)}
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in distinct.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Calls(_Scopes):
    """Also notes which kernels ran inside which call of a module, and what the call took and gave."""

    def __init__(self, module: nn.Module, found: Trace) -> None:
        super().__init__(module)
        self.found = found
        self.open: list[Call] = []

    def _start(self, name: str) -> Any:
        begin = super()._start(name)

        def hook(module: nn.Module, args: Any) -> None:
            begin(module, args)
            call = Call(name, len(self.found.kernels), _bytes([args]))
            self.open.append(call)
            self.found.calls.append(call)

        return hook

    def _stop(self, *given: Any) -> None:
        super()._stop(*given)
        call = self.open.pop()
        call.stop = len(self.found.kernels)
        call.boundary += _bytes([given[2]])


class _Tracing(_CountingMode):
    """Counts as :func:`torchconv.analysis.count.count` does and notes the tensors of each operator."""

    def __init__(self, scopes: _Calls, found: Trace, state: list[Tensor], eager: bool) -> None:
        super().__init__(scopes)
        self.found, self.eager = found, eager
        self.state = {_storage(t) for t in state}
        self.at_hand: dict[int, Tensor] = {}  # what the last kernel wrote, and what was made of it on the way
        self.call: tuple[Any, list[Tensor], list[Tensor]] | None = None

    def _remember(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        super()._remember(func, args, kwargs, out)
        self.call = (func, formulas.tensors([args, kwargs]), formulas.tensors(out))

    def _book(self, name: str, work: Any) -> None:
        super()._book(name, work)
        (func, inputs, outputs), self.call = self.call or (None, [], []), None
        work = work or {}
        heavy = sum(work.get(kind, 0) for kind in ("convolution", "matmul", "fft"))
        kernels = self.found.kernels
        if heavy:
            self._kernel(name, heavy, inputs, outputs)
            self.at_hand = {_storage(t): t for t in outputs}
            return
        if func is None or func.is_view:
            return
        if self.eager:
            if outputs and formulas.is_floating(outputs[0]):
                self._kernel(name, sum(work.values()), inputs, outputs)
            return
        size = max((t.numel() for t in outputs), default=0)
        elsewhere = {_storage(t): t for t in inputs if t.numel() == size and _storage(t) not in self.at_hand}
        if kernels and work.get("elementwise") and len(elsewhere) < len(inputs):
            kernels[-1] = replace(kernels[-1], read=kernels[-1].read + _bytes([*elsewhere.values()]))
        if any(_storage(t) in self.at_hand for t in inputs):
            self.at_hand.update((_storage(t), t) for t in outputs)

    def _kernel(self, name: str, ops: float, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        weights = _bytes([t for t in inputs if _storage(t) in self.state])
        where = self.scopes.running[-1] or name
        self.found.kernels.append(
            Kernel(where, float(ops), float(_bytes(inputs)), float(_bytes(outputs)), float(weights))
        )
