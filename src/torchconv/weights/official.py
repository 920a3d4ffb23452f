"""Networks with the weights that their authors published."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchconv import catalog
from torchconv.weights.reading import read_state
from torchconv.weights.report import LoadReport, compare_states, load_into


def load_official(name: str, path: str | Path, *, strict: bool = True, ema: bool = False, **options: Any) -> nn.Module:
    """Build a named network and load the authors' checkpoint into it.

    Classes, input channels and options that authors set by hand (channel kernel sizes of ECA-Net, merged forms, …) are
    read off the file's shapes; ``options`` override them.

    Args:
        name: one of :func:`torchconv.models.list_models`.
        path: the authors' file, see :func:`torchconv.weights.read_state`.
        strict: refuse a file that does not fit whole; otherwise load what fits and leave the rest as initialised.
        ema: take the averaged weights where the file holds both.
        options: of the network.

    Returns:
        The network in eval mode, in its merged form if the file holds that; ``load_report`` says what fitted.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown name, an unreadable file, or tensors that do not fit (all of them are listed).
    """
    announced = catalog.variant(name)
    module: Any = importlib.import_module(announced.module)
    state = read_state(path, ema=ema)
    convert = getattr(module, "convert_official", None)
    if convert is not None:
        state = convert(state)
    build = getattr(module, name)
    read = getattr(module, "read_official", None)
    found: dict[str, Any] = dict(read(state)) if read is not None else {}
    model = build(**{**found, **_sizes(build, found, state), **options})
    model = _form_of(model, state)
    report: LoadReport = load_into(model, state, strict=strict)
    model.load_report = report  # type: ignore[assignment]
    return model.eval()


def _sizes(build: Any, found: dict[str, Any], state: dict[str, Tensor]) -> dict[str, int]:
    """Classes and input channels, from the shapes of the classifier and of the first convolution."""
    with torch.device("meta"):
        like = build(**found)
    sizes: dict[str, int] = {}
    own = dict(like.named_parameters())
    classifier = getattr(like, "head_name", None)
    if classifier is not None:
        rows = [t.shape[0] for n, t in state.items() if n.startswith(f"{classifier}.") and t.dim() == 2]
        sizes["num_classes"] = int(rows[-1]) if rows else 0
    first = next((n for n, p in own.items() if p.dim() >= 4), None)
    if first not in state:  # a merged form calls its layers otherwise
        first = next((n for n, t in state.items() if t.dim() >= 4), None)
    if first is not None and hasattr(like, "in_chans"):
        sizes["in_chans"] = int(state[first].shape[1])
    return {n: v for n, v in sizes.items() if n not in found}


def _form_of(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """``model``, or its merged form where the file's names fit that one better."""
    fold: Any = getattr(model, "merge", None)
    report = compare_states(model, state)
    if report.complete or fold is None:
        return model
    merged: nn.Module = fold()
    other = compare_states(merged, state)
    misses = [len(r.missing) + len(r.unexpected) for r in (report, other)]
    return merged if misses[1] < misses[0] else model
