"""Inputs to ask a network with, and how far two answers are apart."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

SIDES = {1: (64, 1024), 2: (64, 224, 32), 3: (16, 32)}


def run(model: nn.Module, example: Any, kwargs: Mapping[str, Any] | None = None) -> Any:
    """``model`` on a tensor, on a tuple of arguments (and ``kwargs``), or on a dictionary of keyword arguments.

    No gradients; the example stays as it is; random numbers that the network draws are the same each time and do not
    show outside.
    """
    example, kwargs = tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, (example, kwargs))
    args = () if isinstance(example, dict) else example if isinstance(example, tuple) else (example,)
    named = {**(example if isinstance(example, dict) else {}), **(kwargs or {})}
    placed = [t for t in tree_leaves((args, named)) if isinstance(t, Tensor) and t.is_cuda]
    devices = sorted({t.device.index or 0 for t in placed})
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        return model(*args, **named)


def difference(ours: Any, theirs: Any) -> float:
    """The largest distance of two outputs, each tensor's relative to its largest value; infinite for other shapes.

    Outputs may be nested in lists, tuples and dictionaries. Where both are the same infinity or not a number, they
    agree.

    Raises:
        ValueError: there is no tensor in them.
    """
    found, expected = ([t for t in tree_leaves(out) if isinstance(t, Tensor)] for out in (ours, theirs))
    if not expected:
        raise ValueError(f"model: its output, a {type(theirs).__name__}, holds no tensor that could be compared")
    if [t.shape for t in found] != [t.shape for t in expected]:
        return math.inf
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if not b.numel():
            continue
        if not (b.is_floating_point() or b.is_complex()):
            worst = max(worst, float((a != b).any()))
            continue
        wide = torch.complex128 if b.is_complex() else torch.float64
        a, b = a.detach().cpu().to(wide), b.detach().cpu().to(wide)
        apart = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs())
        scale = float(torch.where(b.isfinite(), b.abs(), 0.0).max()) or 1.0
        worst = max(worst, float(apart.nan_to_num(nan=math.inf, posinf=math.inf).max()) / scale)
    return worst


def another(example: Any) -> Any:
    """Noise of the shape of ``example`` where it is one tensor of real numbers; otherwise ``example`` itself."""
    if isinstance(example, Tensor) and example.is_floating_point():
        noise = torch.randn(example.shape, generator=torch.Generator().manual_seed(1))
        return torch.empty_like(example).copy_(noise)
    return example


def make_up(model: nn.Module, size: int | None = None, batch: int = 2) -> Tensor:
    """Noise that ``model`` runs on: of the size that a timm network names, or found from its first layer by trying.

    Args:
        model: any module of one input, in eval mode.
        size: the side of the noise; tried before others.
        batch: the number of items.

    Raises:
        ValueError: the network runs on none that was tried.
    """
    tensors = [*model.parameters(), *model.buffers()]
    like = next((t for t in tensors if t.is_floating_point()), torch.empty(0))
    tried = []
    for shape in _shapes(model, size):
        noise = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))
        x = noise.to(like.device, like.dtype)
        try:
            run(model, x)
        except Exception as error:  # whatever a network says to a shape that it does not take
            tried.append(f"{tuple(x.shape)} ({' '.join(str(error).split())[:80]})")
            continue
        return x
    found = "; ".join(tried[:3]) or "it has no convolution or linear layer to tell its input from"
    raise ValueError(f"example=None: no input for {type(model).__name__} could be made up, give one ({found})")


def _shapes(model: nn.Module, size: int | None) -> Iterator[tuple[int, ...]]:
    named: Any = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    if named:
        if size:
            yield (named[0], size, size)
        yield tuple(named)
    for module in model.modules():
        channels, features = getattr(module, "in_channels", None), getattr(module, "in_features", None)
        if isinstance(channels, int):
            sizes: Any = getattr(module, "kernel_size", None)
            last = type(module).__name__[-2:]
            if last in ("1d", "2d", "3d"):
                dims: tuple[int, ...] = (int(last[0]),)
            else:
                dims = (len(sizes),) if isinstance(sizes, tuple) else (2, 1, 3)
            for ndim in dims:
                yield from ((channels, *[side] * ndim) for side in ((size,) if size else ()) + SIDES[ndim])
            return
        if isinstance(features, int):
            yield (features,)
            yield (size or 16, features)
            return
