"""A network as a file that runs without its Python code: ONNX, ``torch.export``, TorchScript.

What is written is read again and compared with PyTorch on random inputs, before it stands where it was asked for.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive, check_writable, ntuple, require
from torchconv.surgery import _onnx
from torchconv.surgery._attempt import Attempt, quiet
from torchconv.surgery._probe import make_up, run
from torchconv.surgery._refusal import is_final, reason
from torchconv.surgery.merging import merge as merged_form

FORMATS = {"onnx": ".onnx", "torch-export": ".pt2", "torchscript": ".pt", "openvino-ready-onnx": ".onnx"}
_ONNX = ("onnx", "openvino-ready-onnx")
_LEVELS = {"sizes": "batch and sizes open", "batch": "batch open", "none": "no axis open"}
_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 0.1}
_SIZES: tuple[tuple[int, ...], ...] = ((), (1024,), (224, 224), (16, 112, 112))


class ExportError(ValueError):
    """A network cannot be exported; the message names the layer, the operator and the reason."""


@dataclass(frozen=True)
class ExportReport:
    """What :func:`export` did.

    Attributes:
        path: the file.
        files: all files: it, and one of weights where there is one.
        format: as asked for.
        opset: of ONNX; None for other formats.
        inputs, outputs: name → shape; an open axis has a name instead of a number.
        dynamic: names of the open axes.
        limits: bounds that the captured program has for an open axis, as in "height ≥ 33".
        fixed: why further axes were not left open.
        nodes: operators in the graph.
        size: bytes of all files.
        merged: the inference form was written.
        checks: input shapes that were compared → largest difference, relative to the largest output.
        tolerance: what ``checks`` had to stay under.
    """

    path: Path
    files: tuple[Path, ...]
    format: str
    opset: int | None
    inputs: dict[str, tuple[int | str, ...]]
    outputs: dict[str, tuple[int | str, ...]]
    dynamic: tuple[str, ...]
    limits: tuple[str, ...]
    nodes: int
    size: int
    tolerance: float
    checks: dict[str, float] = field(default_factory=dict)
    fixed: tuple[str, ...] = ()
    merged: bool = False

    def __str__(self) -> str:
        def shapes(named: dict[str, tuple[int | str, ...]]) -> str:
            return ", ".join(f"{name} ({', '.join(map(str, shape))})" for name, shape in named.items())

        version = "" if self.opset is None else f", operator set {self.opset}"
        bounds = f"; {', '.join(self.limits)}" if self.limits else ""
        runtime = {"torch-export": "torch.export.load", "torchscript": "torch.jit.load"}.get(self.format, "onnxruntime")
        lines = [
            f"{self.format}{version}{', inference form' if self.merged else ''}",
            f"  input    {shapes(self.inputs)}",
            f"  output   {shapes(self.outputs)}",
            f"  open     {', '.join(self.dynamic) or 'no axis'}{bounds}",
            *(f"  not open {why}" for why in self.fixed),
            f"  graph    {self.nodes} operators, {self.size / 1e6:.2f} MB",
            *(
                f"  checked  {runtime} against PyTorch, {shape}: {difference:.1e} of the largest output"
                f" (tolerance {self.tolerance:g})"
                for shape, difference in self.checks.items()
            ),
        ]
        return "\n".join([*lines, *(f"saved: {file}" for file in self.files)])


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    to: str = "onnx",
    *,
    example: Tensor | tuple[Tensor, ...] | None = None,
    size: int | Sequence[int] | None = None,
    batch: int = 1,
    opset: int | None = None,
    dynamic: bool = True,
    merge: bool = True,
    tolerance: float | None = None,
) -> ExportReport:
    """Write ``model`` to a file, read the file again and compare it with PyTorch.

    Open axes are tried in turn: batch and spatial sizes, the batch alone, none. The first of these that converts and
    agrees with PyTorch, on an input of other sizes too, is kept; the report says why it is not an earlier one.

    Args:
        model: any module; it stays as it is.
        path: the file, which is moved into place when it has passed.
        to: "onnx", "torch-export" (``.pt2``), "torchscript", or "openvino-ready-onnx": ONNX without what OpenVINO's
            reader refuses (domains other than ai.onnx, float64, operators that it lacks, unknown ranks).
        example: the input, or all inputs; unset, noise of ``batch`` and ``size``.
        size: of the input, an integer or one per spatial axis; unset, what the network's description says (timm), else
            224, 1024 for 1-D and 16 × 112 × 112 for 3-D convolutions, or another on which it runs.
        batch: of the example, and of the file where the batch is not open.
        opset: of ONNX; unset 18.
        dynamic: leave axes open where that can be done.
        merge: write the inference form, see :func:`torchconv.surgery.merge`.
        tolerance: largest difference from PyTorch, relative to the largest output; unset 1e-4, in float16 2e-2.

    Returns:
        What was reached.

    Raises:
        ExportError: nothing was; the message names the layer, the operator and the reason.
        ValueError: an argument is out of range.
        ImportError: the extra ``torchconv[export]`` is missing.

    Example:
        >>> import tempfile
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export(net, f"{folder}/net.pt2", "torch-export", size=16).dynamic
        ('batch', 'height', 'width')
    """
    check_choice("to", to, FORMATS)
    check_positive("batch", batch)
    check_writable("path", path)
    if to in _ONNX:
        opset = _checked(opset, to)
    else:
        check(opset is None, "opset", opset, f"{to} has none; leave it out")
    original = copy.deepcopy(model).cpu().eval()
    inputs = example_inputs(original, size, batch) if example is None else example
    inputs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    kind = next((t.dtype for t in (*original.parameters(), *inputs) if t.is_floating_point()), torch.float32)
    tolerance = _TOLERANCE.get(kind, 1e-4) if tolerance is None else tolerance
    check(tolerance > 0, "tolerance", tolerance, "must be positive")
    network = inference_form(original, inputs) if merge else original
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    failures: dict[str, str] = {}
    for level, name in _LEVELS.items() if dynamic else [("none", "")]:
        attempt = Attempt(original, network, inputs, level, tolerance)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
            try:
                with quiet():
                    found = attempt.carry_out(Path(folder) / target.name, to, opset)
            except ImportError:
                raise
            except Exception as error:
                failures[name] = reason(error, network, attempt.program, attempt.proto)
                if is_final(error):
                    break
                continue
            written = sorted(Path(folder).iterdir(), key=lambda file: file.name == target.name)
            bytes_ = sum(file.stat().st_size for file in written)
            for file in written:  # what the file refers to goes first
                os.replace(file, target.parent / file.name)
        report = ExportReport(
            path=target,
            files=tuple(target.parent / file.name for file in reversed(written)),
            format=to,
            opset=opset,
            size=bytes_,
            tolerance=tolerance,
            merged=network is not original,
            **found,
        )
        return replace(report, fixed=(*(f"{name}: {why}" for name, why in failures.items()), *report.fixed))
    raise ExportError(f"cannot be exported to {to}: {list(failures.values())[-1]}")


def _checked(opset: int | None, to: str) -> int:
    onnx = require("onnx", "export")
    for package in ("onnxscript", "onnxruntime"):
        require(package, "export")
    newest = int(onnx.defs.onnx_opset_version()) if to == "onnx" else _onnx.OPENVINO_OPSET
    opset = _onnx.OPSET if opset is None else opset
    check(isinstance(opset, int) and 9 <= opset <= newest, "opset", opset, f"must be 9 to {newest} for {to}")
    return opset


def example_inputs(model: nn.Module, size: int | Sequence[int] | None = None, batch: int = 1) -> Tensor:
    """Noise of the shape that a network takes, told from its description (timm) or its first layer.

    Raises:
        ValueError: the network has no convolution or linear layer, or ``size`` has not as many axes.
    """
    found = make_up(model, size if isinstance(size, int) else None, batch=1)
    channels, usual = found.shape[1], tuple(found.shape[2:])
    if usual and not (getattr(model, "pretrained_cfg", None) or {}).get("input_size"):
        usual = _SIZES[len(usual)]
    sizes = usual if size is None else ntuple("size", size if isinstance(size, int) else tuple(size), len(usual))
    x = torch.randn(batch, channels, *sizes, generator=torch.Generator().manual_seed(0)).to(found.dtype)
    if size is None:
        try:
            run(model, x)
        except Exception:  # made for the size that was found
            return make_up(model, batch=batch)
    return x


def inference_form(model: nn.Module, inputs: tuple[Tensor, ...]) -> nn.Module:
    """``model`` with its parts merged and its batch norms folded, or itself where there is nothing of the kind."""
    form = merged_form(model, inputs[0] if len(inputs) == 1 else inputs)
    done: Any = form.merge_report
    return form if done.merged or done.folded else model
