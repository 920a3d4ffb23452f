"""The record of what was changed in a network, as plain data that can be carried out again on a fresh one.

A verb that changes a network carries out *edits* and notes them in ``model.torchconv_config["edits"]``. An edit is a
JSON object with the name of its ``"verb"``, mostly the ``"path"`` of a submodule, and the verb's own entries.
:func:`torchconv.weights.load` builds the network, carries the edits out again for their structure, and then loads the
tensors; nothing is pickled.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from torchconv._common import check, did_you_mean

Edit = dict[str, Any]
CarryOut = Callable[[nn.Module, Edit], nn.Module | None]
_VERBS: dict[str, CarryOut] = {}
_ALLOWED = ("torch.nn.", "torchconv.")
_HOOKS = {  # attribute of nn.Module → whether the hook runs before the module
    "_forward_pre_hooks": True,
    "_forward_pre_hooks_with_kwargs": True,
    "_backward_pre_hooks": False,
    "_forward_hooks": False,
    "_forward_hooks_with_kwargs": False,
    "_forward_hooks_always_called": False,
    "_backward_hooks": False,
}


def verb(name: str) -> Callable[[CarryOut], CarryOut]:
    """Announce what carries out the edits of a verb: in place, or by returning another network (edits of path "")."""

    def decorate(carry_out: CarryOut) -> CarryOut:
        _VERBS[name] = carry_out
        return carry_out

    return decorate


def has_hooks(module: nn.Module, before: bool = False) -> bool:
    """Whether hooks see what goes through the module; ``before``: its input, otherwise its output."""
    return any(bool(getattr(module, name)) for name, early in _HOOKS.items() if early == before)


def put(model: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """Put ``module`` where the submodule ``path`` is, under every name that the old one has (shared modules).

    The old one's hooks stay in its place.

    Returns:
        The network: ``model`` changed in place, or ``module`` where ``path`` is "", the whole.
    """
    old = model.get_submodule(path)
    for name in _HOOKS:
        getattr(module, name).update(getattr(old, name))
    if old._backward_hooks:
        module._is_full_backward_hook = old._is_full_backward_hook
    if old is model:
        return module
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() names a shared one once
            if child is old:
                setattr(parent, name, module)
    return model


def make(target: str, options: dict[str, Any]) -> nn.Module:
    """A module from the name of its class ("torch.nn.Conv2d", "torchconv.ops.dcls.DCLSConv2d") and its options.

    Raises:
        ValueError: a class outside of torch.nn and torchconv.
    """
    check(target.startswith(_ALLOWED), "class", target, "only classes of torch.nn and torchconv are built from a file")
    where, _, name = target.rpartition(".")
    found: Any = getattr(importlib.import_module(where), name, None)
    ok = isinstance(found, type) and issubclass(found, nn.Module)
    check(ok, "class", target, "is not a module class")
    module: nn.Module = found(**options)
    return module


@verb("replace")
def _replace(model: nn.Module, edit: Edit) -> None:
    put(model, edit["path"], make(edit["class"], edit["options"]))


def apply_edits(model: nn.Module, edits: Sequence[Edit]) -> nn.Module:
    """``model`` after the edits in order; it is changed in place, and random numbers drawn do not show outside.

    Raises:
        ValueError: an unknown verb, a path that the network lacks, or a class that may not be built.
    """
    importlib.import_module("torchconv.surgery")  # all verbs announce themselves
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for edit in edits:
            name = str(edit.get("verb"))
            check(name in _VERBS, "verb", name, did_you_mean(name, _VERBS))
            try:
                changed = _VERBS[name](model, edit)
            except AttributeError as error:
                raise ValueError(f"edit={edit}: {error}") from None
            model = model if changed is None else changed
    return model


def note(model: nn.Module, base: nn.Module, edits: Sequence[Edit]) -> None:
    """Note on ``model`` that it came from ``base`` by ``edits``, where it is known how ``base`` was built."""
    from torchconv.weights.store import describe

    try:
        config = describe(base)
    except ValueError:
        return  # a network of the user's own: it can be used, but only they can build it again
    config = copy.deepcopy({k: v for k, v in config.items() if k not in ("format", "version")})
    config["edits"] = [*config.get("edits", []), *copy.deepcopy(list(edits))]
    model.torchconv_config = config  # type: ignore[assignment]
