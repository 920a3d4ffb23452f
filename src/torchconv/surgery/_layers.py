"""What several verbs need: which layers are meant, what they got, how far outputs are apart."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from torchconv.surgery._probe import run

Where = str | Callable[[str, nn.Module], bool]
ROLES = ("all", "spatial", "depthwise", "pointwise", "stem")


def convolutions(model: nn.Module, where: Where) -> dict[str, Any]:
    """The convolutions that ``where`` means, by name.

    Args:
        model: any module.
        where: "all", "spatial" (kernels larger than 1, the stem excepted), "depthwise", "pointwise", "stem" (the first
            convolution), a pattern for names ("stages.2.*"), or a predicate of name and module.
    """
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)}
    stem = next(iter(found), None)
    if callable(where):
        return {n: m for n, m in found.items() if where(n, m)}
    if where not in ROLES:
        return {n: m for n, m in found.items() if fnmatch.fnmatch(n, where)}

    def has_role(name: str, conv: Any) -> bool:
        wide = max(conv.kernel_size) > 1
        roles = {
            "all": True,
            "stem": name == stem,
            "pointwise": not wide,
            "depthwise": wide and conv.groups == conv.in_channels > 1,
            "spatial": wide and name != stem,
        }
        return roles[where]

    return {n: m for n, m in found.items() if has_role(n, m)}


def chosen(where: Where, name: str, module: nn.Module) -> bool:
    """Whether a pattern or a predicate means this module."""
    return fnmatch.fnmatch(name, where) if isinstance(where, str) else bool(where(name, module))


def exchange(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """``new`` under every name that ``old`` has within ``model``; hooks stay on ``old``, which lives on elsewhere."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)


@torch.no_grad()
def inputs_of(model: nn.Module, names: Iterable[str], example: Any) -> dict[str, tuple[Tensor, ...]]:
    """What the named submodules get in a pass over ``example`` (their last call's arguments)."""
    found: dict[str, tuple[Tensor, ...]] = {}
    handles = []
    for name in names:

        def remember(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            found[name] = tuple(x.clone() if isinstance(x, Tensor) else x for x in inputs)  # may be changed in place

        handles.append(model.get_submodule(name).register_forward_pre_hook(remember))
    try:
        run(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return found


def distance(ours: Tensor, theirs: Tensor) -> float:
    """‖ours − theirs‖ / ‖theirs‖."""
    return float((ours - theirs).norm()) / (float(theirs.norm()) or 1.0)


def own_copy(model: nn.Module) -> nn.Module:
    """A copy to change; of a compiled network that of the network inside, which is compiled again where that is wanted.

    Raises:
        ValueError: TorchScript, which cannot be changed, or a network whose parameters have no values yet.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("model: TorchScript cannot be changed; give the nn.Module that it was made from")
    lazy = next((name for name, p in model.named_parameters() if isinstance(p, UninitializedParameter)), None)
    if lazy is not None:
        raise ValueError(f"model: {lazy} has no shape yet; call the network once first")
    inner = getattr(model, "_orig_mod", None)  # torch.compile(model)
    return copy.deepcopy(inner if isinstance(inner, nn.Module) else model)


def tied(model: nn.Module) -> set[int]:
    """Ids of parameters that more than one module has."""
    seen: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                seen[id(parameter)] = seen.get(id(parameter), 0) + 1
    return {key for key, times in seen.items() if times > 1}


def check_own_kernel(conv: Any, shared: set[int]) -> None:
    """Raise ``ValueError`` unless the kernel of ``conv`` is computed by nobody else's code and is nobody else's too."""
    if not parametrize.is_parametrized(conv) and "weight" not in conv._parameters:
        raise ValueError("a hook computes its weight; use torch.nn.utils.parametrizations or remove the hook first")
    if any(id(p) in shared for p in conv.parameters(recurse=False)):
        raise ValueError("another module has the same parameter")


def parameter_count(module: nn.Module) -> int:
    """Numbers that are learned, shared ones once."""
    return sum(p.numel() for p in module.parameters())


def some(paths: list[str]) -> str:
    """The first three, and how many more there are."""
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(path or "the network" for path in paths[:3]) + more


def by_reason(kept: Mapping[str, str]) -> dict[str, list[str]]:
    """Reason → the paths that were kept for it."""
    paths: dict[str, list[str]] = {}
    for path, why in kept.items():
        paths.setdefault(why, []).append(path)
    return paths


def grouped(kept: Mapping[str, str]) -> str:
    """Why layers were kept, each reason once."""
    return "; ".join(f"{some(paths)}: {why}" for why, paths in by_reason(kept).items())
