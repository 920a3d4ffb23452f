"""One way of exporting a network, with some axes open: captured, written, read again, compared."""

from __future__ import annotations

import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from torchconv._version import __version__
from torchconv.kernels._custom import for_onnx
from torchconv.surgery import _onnx

Shape = tuple[int | str, ...]
Run = Callable[[tuple[Tensor, ...]], list[Tensor]]
_AXES: tuple[tuple[str, ...], ...] = ((), ("length",), ("height", "width"), ("depth", "height", "width"))
_STEP = 32  # by which other sizes are tried: most networks halve a map up to five times


@contextmanager
def quiet() -> Iterator[None]:
    """Without what exporters log, warn of and print on the way, whole graphs among it."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def tensors_of(outputs: Any) -> dict[str, Tensor]:
    """The tensors among what a network returns, by name: keys where it returns a dictionary."""
    if isinstance(outputs, Tensor):
        return {"output": outputs}
    found = {}
    for number, (path, value) in enumerate(pytree.tree_flatten_with_path(outputs)[0]):
        if isinstance(value, Tensor):
            keys = [str(getattr(p, "key", "")) for p in path]
            found["_".join(keys) if all(keys) else f"output_{number}"] = value
    return found


def _noise(like: Tensor, shape: Sequence[int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if like.is_floating_point():
        return torch.randn(*shape, generator=generator).to(like.dtype)
    top = 2 if like.dtype == torch.bool else max(1, int(like.max()) + 1)
    return torch.randint(0, top, tuple(shape), generator=generator).to(like.dtype)


def _name(axis: int, dim: int) -> str:
    if axis == 0:
        return "batch"
    return _AXES[dim - 2][axis - 2] if 3 <= dim <= 5 and axis >= 2 else f"axis{axis}"


class Attempt:
    """Export ``network`` with the batch and sizes open ("sizes"), the batch ("batch") or nothing ("none").

    ``original`` is what the file is compared with; ``program`` and ``proto`` are there after the steps that make them.
    """

    program: torch.export.ExportedProgram | None = None
    proto: Any = None

    def __init__(
        self, original: nn.Module, network: nn.Module, inputs: tuple[Tensor, ...], level: str, tolerance: float
    ) -> None:
        self.original, self.network, self.tolerance = original, network, tolerance
        if level != "none":  # a batch of one would be taken for a fixed one
            inputs = tuple(torch.cat([x, x]) if x.dim() and x.shape[0] == 1 else x for x in inputs)
        self.inputs = inputs
        self.open = tuple(
            [axis for axis in range(x.dim()) if (axis == 0 and level != "none") or (axis > 1 and level == "sizes")]
            for x in inputs
        )
        self.level = level

    def carry_out(self, file: Path, to: str, opset: int | None) -> dict[str, Any]:
        """Write and check ``file``: what the report says of it.

        Raises:
            Exception: of any kind.
        """
        others = self._others()
        names = list(tensors_of(self._eager(self.inputs)))
        limits: tuple[str, ...] = ()
        if to == "torchscript":
            shapes = [_named(x.shape, axes) for x, axes in zip(self.inputs, self.open, strict=True)]
            run, nodes = self._torchscript(file)
        else:
            with for_onnx() if to != "torch-export" else nullcontext():
                self.program = program = self._capture(self.open)
            shapes, limits = _shapes(program)
            self._hold(program, others)
            if to == "torch-export":
                run, nodes = _torch_export(program, file)
            else:
                run, nodes = self._onnx(program, file, names, shapes, opset or _onnx.OPSET, to)
        if any(axes and not isinstance(shape[0], str) for axes, shape in zip(self.open, shapes, strict=True)):
            raise ValueError("the captured operators fix the batch")
        checks, seen = {}, []
        for inputs in (self.inputs, *(self._fitted(other, shapes, seed) for seed, other in enumerate(others, 1))):
            label = " and ".join("×".join(map(str, x.shape)) for x in inputs)
            expected = list(self._eager(inputs).values())
            checks[f"{label}, other noise" if label in checks else label] = self._compare(run(inputs), expected, label)
            seen.append((inputs, expected))
        dynamic = tuple(dict.fromkeys(n for shape in shapes for n in shape if isinstance(n, str)))
        only_batch = self.level == "sizes" and dynamic == ("batch",)
        return {
            "inputs": dict(zip(self._input_names(), shapes, strict=True)),
            "outputs": dict(zip(names, _output_shapes(seen, shapes), strict=True)),
            "dynamic": dynamic,
            "limits": limits,
            "fixed": ("sizes open: the captured operators fix them",) if only_batch else (),
            "nodes": nodes,
            "checks": checks,
        }

    def _eager(self, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        with torch.no_grad():
            return tensors_of(self.original(*inputs))

    def _others(self) -> list[tuple[Tensor, ...]]:
        """Inputs of other sizes, which PyTorch takes, along the open axes."""
        if self.level == "none":
            return [tuple(_noise(x, x.shape, 1) for x in self.inputs)]
        single = tuple(_noise(x, (1, *x.shape[1:]) if x.dim() else (), 1) for x in self.inputs)
        more = [(x.shape[0] + 1, *x.shape[1:]) if x.dim() else () for x in self.inputs]
        if self.level == "batch":
            return [single, tuple(_noise(x, shape, 2) for x, shape in zip(self.inputs, more, strict=True))]
        smallest = min((n for shape in more for n in shape[2:]), default=_STEP)
        step = _STEP if smallest >= _STEP else _STEP // 4
        added = [tuple(n + step * max(0, axis - 1) for axis, n in enumerate(shape)) for shape in more]
        doubled = [tuple(n * (1 + (axis > 1)) for axis, n in enumerate(shape)) for shape in more]
        refusals = []
        for sizes in (added, doubled):
            sized = tuple(_noise(x, shape, 2) for x, shape in zip(self.inputs, sizes, strict=True))
            try:
                self._eager(sized)
            except Exception as error:
                refusals.append(error)
            else:
                return [single, sized]
        why = str(refusals[0]).strip() or type(refusals[0]).__name__
        raise ValueError(f"the network itself takes no other sizes: {why.splitlines()[0]}")

    def _fitted(self, inputs: tuple[Tensor, ...], shapes: Sequence[Shape], seed: int) -> tuple[Tensor, ...]:
        """Noise of the shape of ``inputs``, but for the axes that turned out fixed."""
        fitted = []
        for x, given, shape in zip(self.inputs, inputs, shapes, strict=True):
            sizes = [g if isinstance(n, str) else k for n, g, k in zip(shape, given.shape, x.shape, strict=True)]
            fitted.append(_noise(x, sizes, seed))
        return tuple(fitted)

    def _capture(self, open_axes: Sequence[Sequence[int]]) -> torch.export.ExportedProgram:
        auto: Any = torch.export.Dim.AUTO
        dynamic: Any = None
        if any(open_axes):
            dynamic = tuple(dict.fromkeys(axes, auto) for axes in open_axes)
            parameters = list(inspect.signature(self.network.forward).parameters.values())
            single = [p for p in parameters if p.kind is not inspect.Parameter.VAR_POSITIONAL]
            if len(single) < len(dynamic):  # forward(x, *more) takes those of "more" as one
                dynamic = (*dynamic[: len(single)], dynamic[len(single) :])
        with torch.no_grad():
            return torch.export.export(self.network, self.inputs, dynamic_shapes=dynamic)

    def _hold(self, program: torch.export.ExportedProgram, others: Sequence[tuple[Tensor, ...]]) -> None:
        """Ask the captured program itself whether it holds for other sizes: ONNX keeps no guards."""
        shapes, _ = _shapes(program)
        module = program.module()
        for seed, inputs in enumerate(others, 1):
            try:
                with torch.no_grad():
                    module(*self._fitted(inputs, shapes, seed))
            except AssertionError as error:
                bound = str(error).strip().removeprefix("Guard failed: ")
                raise ValueError(f"the captured operators hold for {bound} only") from None

    def _onnx(
        self,
        program: torch.export.ExportedProgram,
        file: Path,
        names: list[str],
        shapes: Sequence[Shape],
        opset: int,
        to: str,
    ) -> tuple[Run, int]:
        axes = tuple({axis: n for axis, n in enumerate(shape) if isinstance(n, str)} for shape in shapes)
        notes = {"torchconv": __version__, "network": type(self.original).__name__}
        options: dict[str, Any] = {"opset": opset, "inputs": self._input_names(), "outputs": names, "axes": axes}
        self.proto = _onnx.write(program, file, notes=notes, **options)
        objections = _onnx.openvino_objections(self.proto) if to == "openvino-ready-onnx" else []
        if objections:
            raise ValueError("; ".join(objections[:3]))
        return lambda inputs: _onnx.run(file, inputs), sum(1 for _ in _onnx.nodes(self.proto.graph))

    def _torchscript(self, file: Path) -> tuple[Run, int]:
        try:  # a trace would follow one of the paths without a word
            self._capture([])
        except GuardOnDataDependentSymNode:
            raise
        except Exception:  # what that exporter cannot do may be traced all the same
            self.program = None
        with torch.no_grad():
            traced = torch.jit.trace(self.network, self.inputs, strict=False)
        torch.jit.save(traced, file)
        loaded = torch.jit.load(file)

        def run(inputs: tuple[Tensor, ...]) -> list[Tensor]:
            with torch.no_grad():
                return list(tensors_of(loaded(*inputs)).values())

        return run, sum(1 for _ in loaded.inlined_graph.nodes())

    def _input_names(self) -> list[str]:
        if len(self.inputs) == 1:
            return ["input"]
        names = list(inspect.signature(self.network.forward).parameters)[: len(self.inputs)]
        return names if len(names) == len(self.inputs) else [f"input_{n}" for n in range(len(self.inputs))]

    def _compare(self, ours: list[Tensor], expected: list[Tensor], label: str) -> float:
        largest = 0.0
        for a, b in zip(ours, expected, strict=True):
            if a.shape != b.shape:
                raise ValueError(f"on {label} gives shape {tuple(a.shape)} instead of PyTorch's {tuple(b.shape)}")
            a, b = a.double(), b.double()
            if not b.isfinite().all():
                raise ValueError(f"on {label} PyTorch's output is not finite; nothing can be compared")
            if b.numel():
                apart = (a - b).abs().nan_to_num(torch.inf).max() / b.abs().max().clamp(min=1e-12)
                largest = max(largest, float(apart))
        if largest > self.tolerance:
            far = f"differs from PyTorch by {largest:.1e} of the largest output on {label}"
            raise ValueError(f"{far}, tolerance {self.tolerance:g}")
        return largest


def _named(shape: Sequence[int], axes: Sequence[int]) -> Shape:
    return tuple(_name(axis, len(shape)) if axis in axes else n for axis, n in enumerate(shape))


def _shapes(program: torch.export.ExportedProgram) -> tuple[list[Shape], tuple[str, ...]]:
    """The inputs' shapes with names for open axes, and the bounds that the captured program has for these."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    shapes: list[Shape] = []
    limits: dict[str, None] = {}
    for name in program.graph_signature.user_inputs:
        shape: list[int | str] = []
        value: Any = values[str(name)]
        for axis, n in enumerate(value.shape):
            if isinstance(n, int):
                shape.append(n)
                continue
            label = _name(axis, value.dim())
            shape.append(label)
            bounds = program.range_constraints.get(n.node.expr)
            if bounds is None:
                limits[f"{label} = {n.node.expr}"] = None
                continue
            if bounds.lower > 2:  # 2 says no more than that 0 and 1 were not assumed
                limits[f"{label} ≥ {bounds.lower}"] = None
            if bounds.upper < 2**31:
                limits[f"{label} ≤ {bounds.upper}"] = None
        shapes.append(tuple(shape))
    return shapes, tuple(limits)


def _output_shapes(seen: list[tuple[tuple[Tensor, ...], list[Tensor]]], shapes: Sequence[Shape]) -> list[Shape]:
    """The outputs' shapes, in terms of the inputs' open axes as far as what was run shows it."""
    given: dict[str, list[int]] = {}
    for which, shape in enumerate(shapes):
        for axis, name in enumerate(shape):
            if isinstance(name, str):
                given[name] = [inputs[which].shape[axis] for inputs, _ in seen]

    def label(runs: list[int]) -> int | str:
        if len(set(runs)) == 1:
            return runs[0]
        return next((found for name, sizes in given.items() if (found := _ratio(name, sizes, runs))), "?")

    return [
        tuple(label([outputs[number].shape[axis] for _, outputs in seen]) for axis in range(first.dim()))
        for number, first in enumerate(seen[0][1])
    ]


def _ratio(name: str, given: list[int], runs: list[int]) -> str:
    """The name, a multiple or a fraction of it where ``runs`` are that of ``given`` throughout, else nothing."""
    pairs = {(n / g, g / n) for n, g in zip(runs, given, strict=True) if n and g}
    if len(pairs) != 1:
        return ""
    times, part = pairs.pop()
    if times == 1:
        return name
    return f"{times:g}·{name}" if times > 1 else f"{name}/{part:g}"


def _torch_export(program: torch.export.ExportedProgram, file: Path) -> tuple[Run, int]:
    torch.export.save(program, file)
    loaded = torch.export.load(file).module()

    def run(inputs: tuple[Tensor, ...]) -> list[Tensor]:
        with torch.no_grad():
            return list(tensors_of(loaded(*inputs)).values())

    return run, sum(node.op == "call_function" for node in program.graph.nodes)
