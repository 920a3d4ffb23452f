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
_VERBS: dict[str, Callable[[nn.Module, Edit], None]] = {}
_ALLOWED = ("torch.nn.", "torchconv.")


def verb(name: str) -> Callable[[Callable[[nn.Module, Edit], None]], Callable[[nn.Module, Edit], None]]:
    """Announce what carries out the edits of a verb, in place."""

    def decorate(carry_out: Callable[[nn.Module, Edit], None]) -> Callable[[nn.Module, Edit], None]:
        _VERBS[name] = carry_out
        return carry_out

    return decorate


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` where the submodule ``path`` is, under every name that the old one has (shared modules)."""
    old = model.get_submodule(path)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() names a shared one once
            if child is old:
                setattr(parent, name, module)


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


@verb("merge")
def _merge(model: nn.Module, edit: Edit) -> None:
    fold: Any = model.get_submodule(edit["path"]).eval()
    put(model, edit["path"], fold.merge())


def apply_edits(model: nn.Module, edits: Sequence[Edit]) -> nn.Module:
    """``model``, changed in place by the edits in order; random numbers drawn on the way do not show outside.

    Raises:
        ValueError: an unknown verb, a path that the network lacks, or a class that may not be built.
    """
    importlib.import_module("torchconv.surgery")  # all verbs announce themselves
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for edit in edits:
            name = str(edit.get("verb"))
            check(name in _VERBS, "verb", name, did_you_mean(name, _VERBS))
            try:
                _VERBS[name](model, edit)
            except AttributeError as error:
                raise ValueError(f"edit={edit}: {error}") from None
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
