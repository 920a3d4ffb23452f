"""Networks in dynamic fixed point: converting them, and watching exponents, lost numbers and overflows.

Das et al. 2018, "Mixed Precision Training of Convolutional Neural Networks using Integer Operations", arXiv 1802.00930.
The recipe stays the one of floats, learning rate and number of steps included, and no loss scale is needed, because the
exponent of the gradient follows it. Batch norm, activations, loss and optimizer are left in floating point.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from torchconv._common import check
from torchconv.catalog import part
from torchconv.compress.dfp import scale_by_power, top
from torchconv.compress.dfp_training import (
    ChainArguments,
    DFPConv1d,
    DFPConv2d,
    DFPConv3d,
    DFPLayer,
    DFPLinear,
    Reader,
)
from torchconv.surgery._layers import ROLES, Where, check_own_kernel, convolutions, grouped, own_copy
from torchconv.surgery.structure import Edit, note, put

_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: DFPConv1d,
    nn.Conv2d: DFPConv2d,
    nn.Conv3d: DFPConv3d,
    nn.Linear: DFPLinear,
}


@dataclass(frozen=True)
class DFPReport:
    """What :func:`convert_to_dfp` did: ``layers`` it replaced by name, ``kept`` name → why not."""

    layers: tuple[str, ...]
    kept: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.layers)} layers in dynamic fixed point"]
        return "\n".join(lines + [f"  {path}: kept, {why}" for path, why in self.kept.items()])


@part(
    "dfp",
    paper="dfp",
    kind="compression",
    keywords="quantization quantisation int16 integer training mixed precision dynamic fixed point shared exponent",
)
def convert_to_dfp(
    model: nn.Module,
    where: Where = "all",
    *,
    linear: bool = True,
    bits: int = 16,
    rounding: str = "nearest",
    chain: ChainArguments | None = None,
) -> nn.Module:
    """A copy of a network whose convolutions and linear layers work in dynamic fixed point, to be trained as before.

    Parameters keep their names, values and sharing: a state dict goes from one to the other, and training in
    integers may end in the network of floats. Make the optimizer after converting.

    Args:
        model: any module; it stays as it is.
        where: of :func:`torchconv.surgery.swap`: a role, a pattern for names, or a predicate of name and module.
        linear: ``nn.Linear`` too, where ``where`` is "all", a pattern or a predicate that means it.
        bits, rounding, chain: of :func:`dfp_conv`.

    Returns:
        The new network; ``dfp_report`` on it is the :class:`DFPReport`.

    Raises:
        ValueError: nothing to replace (with the reason for each candidate), or an option out of range.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
        >>> _ = net(torch.zeros(1, 3, 8, 8))
        >>> convert_to_dfp(net).dfp_report.layers
        ('0', '3')

    Reference: arXiv 1802.00930.
    """
    new = own_copy(model)
    model = getattr(model, "_orig_mod", model)
    options: dict[str, Any] = {"bits": bits, "rounding": rounding, "chain": None if chain is None else list(chain)}
    DFPLinear(1, 1, **options)  # refuses options out of range before anything is done
    found = convolutions(new, where)
    if linear:
        found |= {n: m for n, m in new.named_modules() if isinstance(m, nn.Linear) and _means(where, n, m)}
    layers, kept, edits = [], {}, []
    for path, old in found.items():
        try:
            edit = _edit(path, old, options)
        except ValueError as error:
            kept[path] = str(error)
            continue
        with torch.device("meta"):
            made = _LAYERS[type(old)](**edit["options"])
        made._parameters.update(old._parameters)  # the same ones, so that shared ones stay shared
        put(new, path, made.train(old.training))
        layers.append(path)
        edits.append(edit)
    check(bool(layers), "where", where, grouped(kept) or "means no convolution and no linear layer")
    new.dfp_report = DFPReport(tuple(layers), kept)  # type: ignore[assignment]
    note(new, model, edits)
    return new


def _means(where: Where, name: str, module: nn.Module) -> bool:
    if callable(where):
        return bool(where(name, module))
    return where == "all" or (where not in ROLES and fnmatch.fnmatch(name, where))


def _edit(path: str, old: Any, options: dict[str, Any]) -> Edit:
    """The replacement as plain data, or a ``ValueError`` that says why there is none."""
    kind = type(old)
    if kind not in _LAYERS:
        raise ValueError(f"{kind.__name__} computes in its own way")
    check_own_kernel(old, set())
    if kind is nn.Linear:
        names: tuple[str, ...] = ("in_features", "out_features")
    else:
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        names += ("padding_mode",)
    settings = {n: list(v) if isinstance(v := getattr(old, n), tuple) else v for n in names}
    settings |= {"bias": old.bias is not None, **options}
    made = _LAYERS[kind]
    return {"verb": "replace", "path": path, "class": f"{made.__module__}.{made.__name__}", "options": settings}


@dataclass(frozen=True)
class Reading:
    """One tensor at one step.

    Attributes:
        layer: its name.
        tensor: "input", "weight" or "gradient" (of the output).
        exponent: shared by its integers.
        zeroed: share of the numbers that are not zero and became 0.
        saturated: how many would have rounded beyond the largest integer.
    """

    layer: str
    tensor: str
    exponent: int
    zeroed: float
    saturated: int


@dataclass
class Watch:
    """What :func:`watch` saw: ``readings`` in order, ``overflows`` by layer and pass (chained sums only)."""

    readings: list[Reading] = field(default_factory=list)
    overflows: dict[tuple[str, str], int] = field(default_factory=dict)

    def exponents(self, layer: str, tensor: str) -> list[int]:
        """The exponents of one tensor, step by step."""
        return [r.exponent for r in self.readings if (r.layer, r.tensor) == (layer, tensor)]

    def __str__(self) -> str:
        seen: dict[tuple[str, str], list[Reading]] = {}
        for r in self.readings:
            seen.setdefault((r.layer, r.tensor), []).append(r)
        width = max((len(layer) for layer, _ in seen), default=5)
        lines = [f"{'layer':<{width}}  tensor    first  last   min   max  zeroed  saturated"]
        for (layer, tensor), rows in seen.items():
            values = [r.exponent for r in rows]
            spread = f"{values[0]:>5} {values[-1]:>5} {min(values):>5} {max(values):>5}"
            zeroed, saturated = max(r.zeroed for r in rows), sum(r.saturated for r in rows)
            lines.append(f"{layer:<{width}}  {tensor:<8}  {spread}  {zeroed:>6.1%}  {saturated:>9}")
        lines += [f"{layer}: {count} overflows of the {what}" for (layer, what), count in self.overflows.items()]
        return "\n".join(lines)


@contextmanager
def watch(model: nn.Module) -> Iterator[Watch]:
    """Note exponents, lost and saturated numbers, and overflows of every pass through the layers of ``model``.

    Example:
        >>> layer = DFPLinear(2, 1, bias=False)
        >>> with watch(layer) as seen:
        ...     _ = layer(torch.tensor([[1.0, 1e-9]]))
        >>> seen.readings[0].exponent, seen.readings[0].zeroed
        (-14, 0.5)
    """
    seen = Watch()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, DFPLayer)}
    check(
        bool(layers), "model", type(model).__name__, "has no layers in dynamic fixed point; convert_to_dfp makes them"
    )
    try:
        for name, layer in layers.items():
            layer.reader = _reader(seen, name)
        yield seen
    finally:
        for layer in layers.values():
            layer.reader = None


def _reader(seen: Watch, layer: str) -> Reader:
    def read(name: str, value: Any, x: Any) -> None:
        if x is None:
            seen.overflows[layer, name] = seen.overflows.get((layer, name), 0) + int(value)
            return
        zeroed = int(((value.integers == 0) & (x != 0)).sum()) / max(x.numel(), 1)
        rounded = scale_by_power(x.detach().double(), -value.exponent).round()
        saturated = int((rounded.abs() > top(value.bits)).sum())
        seen.readings.append(Reading(layer, name, int(value.exponent), zeroed, saturated))

    return read
