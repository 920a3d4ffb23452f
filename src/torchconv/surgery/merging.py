"""Inference forms: every part's ``merge()`` taken where it does not cost more multiply-adds."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def _inputs_of(model: nn.Module, names: set[str], example: Tensor) -> dict[str, tuple[Tensor, ...]]:
    found: dict[str, tuple[Tensor, ...]] = {}
    handles = []
    for name, module in model.named_modules():
        if name in names:

            def remember(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                found[name] = inputs

            handles.append(module.register_forward_pre_hook(remember))
    try:
        with torch.no_grad():
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _flops(module: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return int(counter.get_total_flops())


def _kind(module: nn.Module) -> tuple[Any, ...]:
    """Equal for modules of the same make, whose costs are then equal too."""
    return repr(module), *(tuple(p.shape) for p in module.parameters())


def merge(model: nn.Module, example: Tensor | None = None) -> nn.Module:
    """A copy of ``model`` in eval mode in which every mergeable module is its exact inference form.

    Args:
        model: any module; those of its parts that have ``merge()`` are replaced, outermost first.
        example: an input; with it, a part keeps its own form where the merged one needs more multiply-adds
            (an Inception depthwise or a separable convolution as one dense kernel).
    """
    result = copy.deepcopy(model).eval()
    if hasattr(result, "merge"):
        whole: Any = result.merge
        if example is None or _flops(whole(), (example,)) <= _flops(result, (example,)):
            merged: nn.Module = whole()
            return merged
        return result
    names: list[str] = []
    for name, module in result.named_modules():
        if hasattr(module, "merge") and not any(name.startswith(f"{outer}.") for outer in names):
            names.append(name)
    inputs = _inputs_of(result, set(names), example) if example is not None else {}
    worth: dict[Any, bool] = {}
    for name in names:
        module = result.get_submodule(name)
        fold: Any = module.merge
        if name in inputs:
            key = (_kind(module), *(tuple(x.shape) for x in inputs[name]))
            if key not in worth:
                worth[key] = _flops(fold(), inputs[name]) <= _flops(module, inputs[name])
            if not worth[key]:
                continue
        parent, _, leaf = name.rpartition(".")
        setattr(result.get_submodule(parent), leaf, fold())
    return result


def stored_parameters(model: nn.Module) -> int:
    """Numbers that must be stored to use ``model``: the smaller of a mergeable part's two forms, and all the rest.

    Buffers of batch norms count neither way, as usual for published parameter counts.
    """
    saved: dict[Any, int] = {}
    done: set[str] = set()
    total = sum(p.numel() for p in model.parameters())
    for name, module in model.named_modules():
        if hasattr(module, "merge") and not any(name.startswith(f"{outer}.") or outer == "" for outer in done):
            done.add(name)
            key = _kind(module)
            if key not in saved:
                fold: Any = module.merge
                own, folded = (sum(p.numel() for p in m.parameters()) for m in (module, fold()))
                saved[key] = max(0, own - folded)
            total -= saved[key]
    return total
