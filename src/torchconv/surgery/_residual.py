"""Residual blocks of a network, found by running it: which modules add their input, unchanged, to something."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchconv.surgery._layers import Where, chosen
from torchconv.surgery._probe import run

INPUT, SUM, RELU = range(3)
_VIEWS = ("alias", "slice", "view", "expand", "detach")


@dataclass
class ResidualCall:
    """A module that was called with one tensor and gave one of the same shape."""

    path: str
    x: Tensor
    version: int
    trunk: dict[int, int]  # id of x and of sums with it → INPUT, SUM, or RELU after a sum
    alive: list[Tensor]
    y: Tensor | None = None
    relu: bool = False
    why: str = ""  # it can't be used, although it is a residual block
    times: int = 1


class _Watch(TorchDispatchMode):
    """Follows, within every open call, the input through the sums that it enters."""

    def __init__(self, opened: list[ResidualCall | None]) -> None:
        super().__init__()
        self.opened = opened

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.rstrip("_")
        if name not in ("add", "sub", "addcmul", "relu", *_VIEWS):
            return out
        for call in self.opened:
            if call is None:
                continue
            inside = [call.trunk[id(a)] for a in args if isinstance(a, Tensor) and id(a) in call.trunk]
            if not inside or out.shape != call.x.shape:
                continue
            plain = (kwargs or {}).get("alpha", 1) == 1
            first = id(args[0]) in call.trunk and len(inside) == 1  # x is as it was, whatever is done to the rest
            if (name == "add" and plain) or (name in ("add", "sub", "addcmul") and first):
                call.trunk[id(out)] = SUM
            elif name == "relu" and inside[0] != INPUT:
                call.trunk[id(out)] = RELU
            elif name in _VIEWS and _whole(out, args[0]):
                call.trunk[id(out)] = inside[0]
            call.alive.append(out)
        return out


def _whole(view: Tensor, x: Tensor) -> bool:
    """Whether a view shows all of ``x`` as it is, as x[:, ::1] does."""
    same = view.shape == x.shape and view.stride() == x.stride()
    return bool(same and view.storage_offset() == x.storage_offset())


def watch(model: nn.Module, example: Any) -> tuple[Any, dict[str, ResidualCall]]:
    """The output, and the calls of residual blocks by path."""
    opened: list[ResidualCall | None] = []
    calls: dict[str, ResidualCall] = {}
    handles = []

    def enter(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            ok = len(args) == 1 and isinstance(args[0], Tensor) and not tree_leaves(kwargs)
            x = args[0] if ok else None
            opened.append(ResidualCall(path, x, x._version, {id(x): INPUT}, [x]) if x is not None else None)

        return hook

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        call = opened.pop()
        if call is None or not isinstance(out, Tensor) or call.trunk.get(id(out), INPUT) == INPUT:
            return
        if call.path in calls:
            calls[call.path].times += 1
            return
        call.y, call.relu = out, call.trunk[id(out)] == RELU
        if call.x._version != call.version:
            call.why = "changes its input in place"
        calls[call.path] = call

    for path, module in model.named_modules():
        if path:
            handles.append(module.register_forward_pre_hook(enter(path), with_kwargs=True))
            handles.append(module.register_forward_hook(leave, prepend=True))
    try:
        with _Watch(opened):
            return run(model, example), calls
    finally:
        for handle in handles:
            handle.remove()


def find_runs(
    model: nn.Module, calls: dict[str, ResidualCall], where: Where, kept: dict[str, str]
) -> list[list[ResidualCall]]:
    """Runs of two blocks and more, each reading what the one before gives; of nested ones, the innermost."""
    runs: list[list[ResidualCall]] = []
    for path, call in calls.items():  # in the order in which they ended
        if not chosen(where, path, model.get_submodule(path)):
            continue
        if call.times > 1:
            call.why = "is called more than once"
        if call.why:
            kept[path] = call.why
            continue
        parent = path.rpartition(".")[0]
        for run_ in runs:
            last = run_[-1]
            if last.y is call.x and last.relu == call.relu and last.path.rpartition(".")[0] == parent:
                run_.append(call)
                break
        else:
            runs.append([call])
    runs = [r for r in runs if len(r) > 1]
    inner = [c.path for r in runs for c in r]
    return [r for r in runs if not any(p.startswith(f"{c.path}.") for c in r for p in inner)]
