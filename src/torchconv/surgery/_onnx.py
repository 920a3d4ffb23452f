"""ONNX files: written, run by onnxruntime, and held against what OpenVINO's reader takes.

Operators of our own show themselves as ordinary ones to an exporter (``kernels/_custom.py``); what is left for this
file is what PyTorch's converter writes in a form that no runtime computes: real Fourier transforms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from torchconv._common import require

OPSET = 18  # in which PyTorch's converter is written: what it gives is not converted again; read everywhere since 2023
OPENVINO_OPSET = 23  # newest operator set in the table named at ``_ABSENT``
INLINE = 1900 << 20  # bytes of weights from which they stand beside the file: protobuf ends at 2 GiB


# --- Fourier transforms ----------------------------------------------------------------------------------------------
#
# PyTorch's own way to ONNX writes real transforms as a one-sided ``DFT``: the inverse one is not defined by ONNX below
# operator set 26, the other is read with another rank by OpenVINO. And it takes the root of "ortho" of a size, which it
# thereby fixes.


def _scale(like: Tensor, sizes: Sequence[Any], norm: str) -> Tensor:
    """What norm="ortho" or "forward" multiplies a transform by, as a tensor: sizes may be symbols."""
    samples = like.new_full((), math.prod(sizes))
    return samples.rsqrt() if norm == "ortho" else samples.reciprocal()


def _complex(pairs: Tensor) -> Tensor:
    """``view_as_complex``, for any strides."""
    return torch.view_as_complex(pairs.contiguous())


def _axes(x: Tensor, sizes: Any, axes: Any) -> list[int]:
    if axes is None:
        axes = range(-len(sizes), 0) if sizes is not None else range(x.dim())
    return list(axes)


def _rfftn(x: Tensor, s: Any = None, dim: Any = None, norm: str | None = None) -> Tensor:
    """By complex transforms, of which the first half of the last is kept."""
    axes = _axes(x, s, dim)
    sizes = [x.shape[d] for d in axes] if s is None else list(s)
    *others, last = axes
    whole = torch.view_as_real(torch.fft.fft(x, sizes[-1], last))
    y = _complex(whole.narrow(last % x.dim(), 0, sizes[-1] // 2 + 1))
    for axis, n in zip(reversed(others), reversed(sizes[:-1]), strict=True):
        y = torch.fft.fft(y, n, axis)
    if norm is None or norm == "backward":
        return y
    return _complex(torch.view_as_real(y) * _scale(x, sizes, norm))


def _irfftn(x: Tensor, s: Any = None, dim: Any = None, norm: str | None = None) -> Tensor:
    """By a complex transform of the whole spectrum, whose other half is the mirrored conjugate."""
    axes = _axes(x, s, dim)
    *others, last = axes
    sizes = [*(x.shape[d] for d in others), 2 * (x.shape[last] - 1)] if s is None else list(s)
    for axis, n in zip(others, sizes[:-1], strict=True):
        x = torch.fft.ifft(x, n, axis)
    n = sizes[-1]
    half = n // 2 + 1
    real, imag = torch.view_as_real(x.movedim(last, -1)).unbind(-1)
    if statically_known_true(real.shape[-1] < half):
        real, imag = (F.pad(t, (0, half - t.shape[-1])) for t in (real, imag))
    bins = torch.arange(n, device=x.device)
    mirrored = torch.minimum(bins, n - bins)  # 0, 1, …, n // 2, …, 1, and exactly n of them where n is a symbol
    real, imag = (t.index_select(-1, mirrored) for t in (real, imag))
    whole = torch.complex(real, torch.where(2 * bins > n, -imag, imag))
    y = torch.view_as_real(torch.fft.ifft(whole))[..., 0].movedim(-1, last)
    return y if norm is None or norm == "backward" else y / _scale(y, sizes, norm)


def _line(transform: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def on_axis(x: Tensor, n: Any = None, dim: int = -1, norm: str | None = None) -> Tensor:
        return transform(x, None if n is None else [n], [dim], norm)

    return on_axis


def _plane(transform: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def on_axes(x: Tensor, s: Any = None, dim: Any = (-2, -1), norm: str | None = None) -> Tensor:
        return transform(x, s, dim, norm)

    return on_axes


def _in_defined_operators(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    aten = torch.ops.aten
    table: dict[Any, Callable[..., Tensor]] = {
        aten.fft_rfft.default: _line(_rfftn),
        aten.fft_rfft2.default: _plane(_rfftn),
        aten.fft_rfftn.default: _rfftn,
        aten.fft_irfft.default: _line(_irfftn),
        aten.fft_irfft2.default: _plane(_irfftn),
        aten.fft_irfftn.default: _irfftn,
    }
    graphs: list[Any] = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    used = {node.target for graph in graphs for node in graph.nodes}  # also of what is under autocast
    return program.run_decompositions(table) if used & set(table) else program


# --- writing and running ---------------------------------------------------------------------------------------------


def write(
    program: torch.export.ExportedProgram,
    file: Path,
    *,
    opset: int,
    inputs: Sequence[str],
    outputs: Sequence[str],
    axes: tuple[dict[int, str], ...],
    notes: dict[str, str],
) -> Any:
    """The program as ``file``; weights beyond ``INLINE`` bytes go to ``file.data`` beside it.

    Returns:
        The model as onnx's protocol buffer, without its weights where they are beside it.

    Raises:
        ValueError: the converter could not reach the operator set.
    """
    onnx = require("onnx", "export")
    require("onnxscript", "export")
    converted = torch.onnx.export(
        _in_defined_operators(program),
        (),
        dynamo=True,
        verbose=False,
        opset_version=opset,
        input_names=list(inputs),
        output_names=list(outputs),
        dynamic_shapes=axes,
    )
    assert converted is not None
    converted.model.metadata_props.update(notes)
    reached = converted.model.opset_imports.get("", 0)
    if reached != opset:
        raise ValueError(f"operator set {reached} could not be converted to {opset}; give --opset {OPSET} or more")
    weights = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    converted.save(file, external_data=weights > INLINE)
    onnx.checker.check_model(file, full_check=True)  # with shape inference; the path, as for a file beside it
    return onnx.load(file, load_external_data=False)


def run(file: Path, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of the file in onnxruntime on the CPU."""
    ort = require("onnxruntime", "export")
    options = ort.SessionOptions()
    options.log_severity_level = 4  # an error is raised as well
    session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    feed = {slot.name: x.numpy() for slot, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, feed)]


def nodes(graph: Any) -> Iterator[Any]:
    """All nodes of a graph and of the graphs within it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from nodes(inner)


# --- OpenVINO --------------------------------------------------------------------------------------------------------

# From "ONNX Operations Supported by OpenVINO ONNX Frontend" (src/frontends/onnx/docs/supported_ops.md of its
# repository): operators of ai.onnx with no supported version …
_ABSENT = frozenset(
    {
        "Bernoulli",
        "DeformConv",
        "Det",
        "ImageDecoder",
        "LpPool",
        "MaxUnpool",
        "MelWeightMatrix",
        "Optional",
        "OptionalGetElement",
        "OptionalHasElement",
        "RegexFullMatch",
        "SequenceMap",
        "StringConcat",
        "StringNormalizer",
        "StringSplit",
        "TfIdfVectorizer",
    }
)
# … in certain patterns only …
_PATTERNS = frozenset(
    {
        "ConcatFromSequence",
        "SequenceAt",
        "SequenceConstruct",
        "SequenceEmpty",
        "SequenceErase",
        "SequenceInsert",
        "SequenceLength",
    }
)
# … and those of which only versions before a change of meaning are: where the change shows in a node.
_ELEMENT_TYPES = (11, 14, 15)  # double, complex64, complex128 in TensorProto.DataType
_NAMES = {11: "float64", 14: "complex64", 15: "complex128"}


def openvino_objections(model: Any) -> list[str]:
    """Why OpenVINO's ONNX reader would not take a model, or would misread it; empty where there is no reason.

    Args:
        model: onnx's ``ModelProto``, after shape inference.
    """
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    found: dict[str, None] = {}
    if opset > OPENVINO_OPSET:
        found[f"operator set {opset} is newer than {OPENVINO_OPSET}"] = None
    for node in nodes(model.graph):
        given = {a.name: a for a in node.attribute}
        name = f"{node.op_type} ({node.name})"
        if node.domain not in ("", "ai.onnx"):
            found[f"{name}: domain {node.domain!r} is not ai.onnx"] = None
        elif node.op_type in _ABSENT:
            found[f"{name}: not in OpenVINO's table of operators"] = None
        elif node.op_type in _PATTERNS:
            found[f"{name}: taken in certain patterns only"] = None
        elif node.op_type == "DFT" and opset >= 20:
            found[f"{name}: read as in operator set 17, where the axis is an attribute; use --opset {OPSET}"] = None
        elif node.op_type == "DFT" and "onesided" in given and given["onesided"].i:
            found[f"{name}: one-sided, of which the reader makes another rank"] = None
        elif node.op_type == "GridSample" and opset >= 20:
            found[f"{name}: read as in operator set 16, which has other names of modes; use --opset {OPSET}"] = None
        elif node.op_type == "Pad" and len(node.input) > 3 and node.input[3]:
            found[f"{name}: read as in operator set 11, without axes"] = None
        elif node.op_type == "Resize" and ("axes" in given or ("antialias" in given and given["antialias"].i)):
            found[f"{name}: read as in operator set 11, without axes and antialias"] = None
        if node.op_type == "Cast" and given["to"].i in _ELEMENT_TYPES:
            found[f"{name}: computes in {_NAMES[given['to'].i]}"] = None
    for weight in model.graph.initializer:
        if weight.data_type in _ELEMENT_TYPES:
            found[f"{weight.name}: is {_NAMES[weight.data_type]}"] = None
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        kind = value.type.tensor_type
        if kind.elem_type in _ELEMENT_TYPES:
            found[f"{value.name}: is {_NAMES[kind.elem_type]}"] = None
    for value in (*model.graph.input, *model.graph.output):
        if not value.type.tensor_type.HasField("shape"):
            found[f"{value.name}: has no known number of axes"] = None
    return list(found)
