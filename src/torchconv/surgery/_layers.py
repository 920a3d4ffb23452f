"""What several verbs need: which layers are meant, what they got, how far outputs are apart."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

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
