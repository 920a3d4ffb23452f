"""Golden files through our code: reading a case, running an adapter, comparing tensors.

A case is a safetensors file with tensors ``state.<official parameter>``, ``input.<name>``, ``output.<name>``,
``grad.<name>`` and metadata ``config`` (JSON), ``source``, ``mode``, ``note``, optionally ``rtol`` and ``grad_rtol``.
The adapter of a method, ``tests/parity/KEY.py``, has one function ``adapt(case) -> Adapted``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

COTANGENT = "cotangent"


class ParityError(Exception):
    """A case that could not be run: wrong key, wrong file, missing or unknown tensors."""


@dataclass(frozen=True)
class Case:
    """One golden file; ``state``, ``inputs``, ``outputs``, ``grads`` are keyed without their prefix."""

    key: str
    name: str
    config: dict[str, Any]
    source: str
    mode: str
    note: str
    rtol: float | None
    grad_rtol: float | None
    state: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    grads: dict[str, Tensor]

    @property
    def training(self) -> bool:
        """Batch statistics, dropout and the like as in training."""
        return self.mode == "train"

    @property
    def dtype(self) -> torch.dtype:
        """The floating type in which the numbers were computed."""
        tensors = (*self.inputs.values(), *self.state.values(), *self.outputs.values())
        found = [t.dtype for t in tensors if t.is_floating_point()]
        return functools.reduce(torch.promote_types, found) if found else torch.float32


@dataclass
class Adapted:
    """How our code runs a case.

    Attributes:
        module: our module, or None for a pure function. It gets the case's dtype, mode and state.
        forward: named inputs (without cotangents) → named differentiable outputs.
        state: converts the official state dict into the module's; identity by default.
        names: our parameter or buffer name for an official one; identity by default.
        extra: outputs compared without gradient (kernels, merged weights …), called before ``forward`` so that it
            sees the state as loaded; keys as in ``output.<name>``. ``buffer.*`` is compared by itself.
        ignore: official state entries that have no counterpart (derived tables); ``fresh``: ours that the file lacks.
    """

    forward: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
    module: nn.Module | None = None
    state: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda s: s
    names: Callable[[str], str] = lambda n: n
    extra: Callable[[dict[str, Tensor]], Mapping[str, Tensor]] | None = None
    ignore: Callable[[str], bool] = lambda n: n.endswith("num_batches_tracked")
    fresh: Callable[[str], bool] = lambda n: n.endswith("num_batches_tracked")


@dataclass(frozen=True)
class Comparison:
    """One tensor compared."""

    name: str
    max_abs: float
    max_rel: float
    passed: bool


@dataclass
class Report:
    """The outcome of a case; ``error`` is set when it could not be run."""

    key: str
    case: str
    path: str
    error: str | None = None
    tensors: list[Comparison] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Ran, compared something, and every tensor passed."""
        return self.error is None and bool(self.tensors) and all(t.passed for t in self.tensors)

    @property
    def max_abs(self) -> float:
        """Largest absolute difference."""
        return max((t.max_abs for t in self.tensors), default=float("nan"))

    @property
    def max_rel(self) -> float:
        """Largest difference relative to the largest expected value of its tensor."""
        return max((t.max_rel for t in self.tensors), default=float("nan"))


def read_case(path: Path, key: str | None = None) -> Case:
    """Read a golden file; the key is the name of its folder unless given."""
    groups: dict[str, dict[str, Tensor]] = {"state": {}, "input": {}, "output": {}, "grad": {}}
    try:
        with safe_open(path, "pt") as file:
            meta = file.metadata() or {}
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                group, _, rest = name.partition(".")
                if group not in groups or not rest:
                    raise ParityError(f"unknown tensor {name!r}: expected state.*, input.*, output.* or grad.*")
                groups[group][rest] = file.get_tensor(name)
        config = json.loads(meta.get("config", "{}"))
        tolerances = [float(meta[k]) if k in meta else None for k in ("rtol", "grad_rtol")]
    except FileNotFoundError:
        raise ParityError("no such file") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise ParityError(f"unreadable: {error}") from None
    if not isinstance(config, dict):
        raise ParityError("metadata config is not a JSON object")
    if not groups["output"] and not groups["grad"]:
        raise ParityError("holds no output.* and no grad.* tensor")
    return Case(
        key=key or path.resolve().parent.name,
        name=path.stem,
        config=config,
        source=meta.get("source", ""),
        mode=meta.get("mode", "eval"),
        note=meta.get("note", ""),
        rtol=tolerances[0],
        grad_rtol=tolerances[1],
        state=groups["state"],
        inputs=groups["input"],
        outputs=groups["output"],
        grads=groups["grad"],
    )


def adapter(key: str) -> Callable[[Case], Adapted]:
    """The ``adapt`` function of a method."""
    name = f"tests.parity.{key}"
    if not key.isidentifier() or key in ("core", "__main__") or importlib.util.find_spec(name) is None:
        known = sorted(
            p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in ("core",) and p.stem[0] != "_"
        )
        raise ParityError(f"unknown key {key!r}; known: {', '.join(known)} (give --key for a file elsewhere)")
    found: Callable[[Case], Adapted] = importlib.import_module(name).adapt
    return found


def _load(case: Case, adapted: Adapted) -> None:
    module = adapted.module
    if module is None:
        return
    module.to(case.dtype).train(case.training)
    official = {n: t for n, t in case.state.items() if not adapted.ignore(n)}
    state = adapted.state(official)
    result = module.load_state_dict(state, strict=False)
    missing = [n for n in result.missing_keys if not adapted.fresh(n)]
    if missing or result.unexpected_keys:
        raise ParityError(f"state does not fit: missing {missing}, unexpected {result.unexpected_keys}")


def _cotangents(case: Case, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name in outputs:
        for official in (f"{COTANGENT}.{name}", f"{COTANGENT}_{name}"):
            if official in case.inputs:
                found[name] = case.inputs[official]
    if not found and COTANGENT in case.inputs:
        shape = case.inputs[COTANGENT].shape
        fitting = [n for n in outputs if n == "y"] or [n for n, t in outputs.items() if t.shape == shape]
        if not fitting:
            raise ParityError(f"input.cotangent of shape {tuple(shape)} fits none of the outputs {list(outputs)}")
        found[fitting[0]] = case.inputs[COTANGENT]
    for name, cotangent in found.items():
        if cotangent.shape != outputs[name].shape:
            shapes = f"{tuple(cotangent.shape)}, of the output {tuple(outputs[name].shape)}"
            raise ParityError(f"cotangent of {name}: shape {shapes}")
    return found


def _gradients(
    case: Case, adapted: Adapted, inputs: dict[str, Tensor], outputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    if not case.grads:
        return {}
    cotangents = _cotangents(case, outputs)
    if cotangents:
        total = torch.stack([(outputs[n] * c).sum() for n, c in cotangents.items()]).sum()
    else:
        scalars = [t for t in outputs.values() if t.dim() == 0]
        if len(scalars) != 1:
            raise ParityError("grad.* without input.cotangent needs exactly one scalar output")
        total = scalars[0]
    parameters = dict(adapted.module.named_parameters(remove_duplicate=False)) if adapted.module else {}
    sources: dict[str, Tensor] = {}
    for name in case.grads:
        ours = adapted.names(name)
        if name in inputs:
            sources[name] = inputs[name]
        elif ours in parameters:
            sources[name] = parameters[ours]
        else:
            raise ParityError(f"grad.{name}: neither an input nor a parameter")
    grads = torch.autograd.grad(total, list(sources.values()), allow_unused=True)
    return {n: torch.zeros_like(s) if g is None else g for (n, s), g in zip(sources.items(), grads, strict=True)}


def compare(name: str, ours: Tensor, expected: Tensor, rtol: float, scale: float) -> Comparison:
    """max|ours − expected| ≤ rtol · max|expected| + 1e-6 · scale, scale the largest value among tensors of the kind.

    NaN and infinities must stand where they are expected; the other values are compared.
    """
    if ours.shape != expected.shape:
        raise ParityError(f"{name}: shape {tuple(ours.shape)}, expected {tuple(expected.shape)}")
    if expected.numel() == 0:
        return Comparison(name, 0.0, 0.0, True)
    found, wanted = ours.detach().double(), expected.double()
    same = (found == wanted) | (found.isnan() & wanted.isnan())
    max_abs, largest = float(torch.where(same, 0.0, found - wanted).abs().max()), _largest(wanted)
    passed = max_abs <= rtol * largest + 1e-6 * scale
    return Comparison(name, max_abs, max_abs / largest if largest else max_abs, passed)


def _largest(t: Tensor) -> float:
    finite = t.double().abs()
    return float(torch.where(finite.isfinite(), finite, 0.0).max())


def _compare_all(kind: str, ours: Mapping[str, Tensor], expected: dict[str, Tensor], rtol: float) -> list[Comparison]:
    missing = [n for n in expected if n not in ours]
    if missing:
        raise ParityError(f"not computed: {', '.join(f'{kind}.{n}' for n in missing)}")
    values = [_largest(t) for t in expected.values() if t.numel()]
    scale = max(values, default=0.0)
    return [compare(f"{kind}.{n}", ours[n], e, rtol, scale) for n, e in expected.items()]


def run_case(case: Case, rtol: float = 1e-4) -> list[Comparison]:
    """Run one case through its adapter and compare outputs, buffers and gradients."""
    adapted = adapter(case.key)(case)
    _load(case, adapted)
    inputs = {n: t.clone() for n, t in case.inputs.items() if n.split(".")[0] != COTANGENT}
    for name in inputs:
        if name in case.grads:
            inputs[name].requires_grad_()
    extra = dict(adapted.extra(inputs)) if adapted.extra else {}
    outputs = dict(adapted.forward(inputs))
    gradients = _gradients(case, adapted, inputs, outputs)
    buffers = {}
    if adapted.module is not None:
        available = dict(adapted.module.named_buffers())
        for name in case.outputs:
            if name.startswith("buffer.") and adapted.names(name[7:]) in available:
                buffers[name] = available[adapted.names(name[7:])]
    compared = _compare_all("output", {**outputs, **extra, **buffers}, case.outputs, case.rtol or rtol)
    return compared + _compare_all("grad", gradients, case.grads, case.grad_rtol or rtol)


def run_file(path: str | Path, rtol: float = 1e-4, key: str | None = None) -> Report:
    """Run one file; whatever goes wrong is in the report, so that other files still run."""
    path = Path(path)
    report = Report(key or path.resolve().parent.name, path.stem, str(path))
    try:
        report.tensors = run_case(read_case(path, key), rtol)
    except ParityError as error:
        report.error = str(error)
    except Exception as error:
        report.error = f"{type(error).__name__}: {error}".split("\n")[0]
    return report
