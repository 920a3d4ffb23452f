"""The layers that take initial weights: finding them, their shapes, writing weights, a quiet forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from torchconv._common import check

Layers = Iterable[str] | Callable[[str, nn.Module], bool] | None

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def is_conv(module: Any) -> bool:
    """``nn.ConvNd``, or a layer of ours that has its arguments and stores its weight in the same way."""
    if isinstance(module, CONVS):
        return True
    names = ("in_channels", "out_channels", "kernel_size", "groups", "dilation", "weight", "bias")
    if isinstance(module, TRANSPOSED) or not all(hasattr(module, n) for n in names):
        return False
    kernel, weight = module.kernel_size, module.weight
    if not isinstance(kernel, tuple) or not isinstance(weight, Tensor):
        return False
    return tuple(weight.shape) == (module.out_channels, module.in_channels // module.groups, *kernel)


def selected(model: nn.Module, layers: Layers) -> dict[str, nn.Module]:
    """Convolutions and linear layers, by name, in the order of the model."""
    found: dict[str, nn.Module] = {
        n: m for n, m in model.named_modules() if isinstance(m, (*TRANSPOSED, nn.Linear)) or is_conv(m)
    }
    if callable(layers):
        found = {n: m for n, m in found.items() if layers(n, m)}
    elif layers is not None:
        wanted = [layers] if isinstance(layers, str) else list(layers)
        unknown = [n for n in wanted if n not in found]
        check(not unknown, "layers", unknown, f"no such layers; the model has {', '.join(map(repr, found))}")
        found = {n: found[n] for n in wanted}
    check(bool(found), "model", type(model).__name__, "has no convolution or linear layer that is selected")
    lazy = [n for n, m in found.items() if isinstance(m.weight, Tensor) and is_lazy(m.weight)]
    check(not lazy, "model", lazy, "has layers without a shape yet; run it once first")
    return found


def set_weight(module: Any, weight: Tensor) -> None:
    """Write a weight, through its parametrisation if it has one."""
    with torch.no_grad():
        if parametrize.is_parametrized(module, "weight"):
            module.weight = weight.to(module.weight)
        else:
            module.weight.copy_(weight)


def zero_bias(module: Any) -> None:
    """Zero, where there is a bias."""
    if module.bias is not None:
        with torch.no_grad():
            module.bias.zero_()


def shape_of(module: Any) -> tuple[int, ...]:
    """(out, in / groups, *kernel), for transposed convolutions too."""
    shape = tuple(module.weight.shape)
    if isinstance(module, TRANSPOSED):
        return (module.out_channels, module.in_channels // module.groups, *shape[2:])
    return shape


def stored(module: Any, weight: Tensor) -> Tensor:
    """A weight (out, in / groups, *kernel) as the module stores it."""
    if not isinstance(module, TRANSPOSED):
        return weight
    grouped = weight.unflatten(0, (module.groups, -1)).transpose(1, 2)
    return grouped.flatten(0, 1)


def draw_dtype(module: Any) -> torch.dtype:
    """The weight's, or float32 for the narrower ones."""
    dtype: torch.dtype = module.weight.dtype
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def has_taps(module: Any) -> bool:
    """A convolution (not transposed) of more than one tap."""
    return is_conv(module) and math.prod(module.kernel_size) > 1


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside; every module's own mode afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
