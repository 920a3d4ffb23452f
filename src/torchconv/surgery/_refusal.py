"""Why a network could not be exported: the layer, the operator or the line, and the reason, out of any error."""

from __future__ import annotations

import linecache
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

_OPERATOR = re.compile(r"OpOverload\(op='([\w.:]+)'|target=torch\.ops\.([\w.]+)")
_STATUS = re.compile(r"Name:'(?P<node>[^']*)' Status Message: (?:\S*/onnxruntime\S* )?(?P<why>.*)", re.DOTALL)
_LONGEST = 240
_TORCH = str(Path(torch.__file__).parent)


def reason(error: BaseException, network: nn.Module, program: Any = None, model: Any = None) -> str:
    """One line for an error met on the way.

    Args:
        error: what was raised.
        network: what was being exported.
        program: its ``ExportedProgram`` where there was one already.
        model: its ``ModelProto`` where there was one already.
    """
    chain = _chain(error)
    names = [type(e).__name__ for e in chain]
    if "ConversionError" in names or "DispatchError" in names:
        return _shortened(_unconverted(chain, program))
    stopped = _STATUS.search(str(error))
    if stopped:
        why = re.sub(r"^(?:[\w<>:]+ )*[\w<>:]+\([^)]*\)\s*", "", stopped["why"])  # the C++ function
        return _shortened(f"{_scope(model, stopped['node'])}onnxruntime stops at {stopped['node']}: {why}")
    return _shortened(f"{_line(error, network)}{_why(error)}")


def is_final(error: BaseException) -> bool:
    """Whether fixing sizes would change nothing: the operator or the way it is used is what cannot be exported."""
    return any(isinstance(e, GuardOnDataDependentSymNode) or type(e).__name__ == "DispatchError" for e in _chain(error))


def _chain(error: BaseException) -> list[BaseException]:
    chain = [error]
    while (before := chain[-1].__cause__) is not None:
        chain.append(before)
    return chain


def _shortened(text: str) -> str:
    text = " ".join(re.sub(r"\x1b\[\d*m", "", text).split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _why(error: BaseException) -> str:
    if isinstance(error, GuardOnDataDependentSymNode):
        return "the path taken depends on the values of a tensor, which no exported graph can follow"
    text = str(error).strip().split("\nFor more information")[0]
    text = text.split("! For more information")[0].split("\n\nThe error above occurred")[0]
    first, _, rest = text.partition("\n")
    wanted = first if len(first) > 20 else f"{first} {rest}"
    kind = type(error).__name__
    return wanted if kind in ("ExportError", "ValueError") else f"{wanted or 'no message'} ({kind})"


def _line(error: BaseException, network: nn.Module) -> str:
    """The innermost line outside of PyTorch on the way to the error, and the innermost layer it belongs to."""
    paths = {id(module): path for path, module in network.named_modules()}
    layer = line = ""
    trace = error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        file = trace.tb_frame.f_code.co_filename
        if isinstance(owner, nn.Module) and paths.get(id(owner)):
            layer = f"layer {paths[id(owner)]} ({type(owner).__name__})"
        within = layer or isinstance(owner, nn.Module)
        if within and not file.startswith((_TORCH, "<")):
            code = linecache.getline(file, trace.tb_lineno).strip()
            line = f"{Path(file).name}:{trace.tb_lineno} “{code}”" if code else ""
        trace = trace.tb_next
    where = ", ".join(part for part in (layer, line) if part)
    return f"{where}: " if where else ""


def _unconverted(chain: list[BaseException], program: Any) -> str:
    text = "\n".join(str(e) for e in chain)
    found = _OPERATOR.search(text)
    operator = (found[1] or found[2]).replace("::", ".") if found else "an operator"
    layer = _owner(program, operator.removesuffix(".default"))
    if "complex-valued" in text:
        return f"{layer}operator {operator} on complex numbers has no ONNX form"
    if "No ONNX function found" in text or "DispatchError" in {type(e).__name__ for e in chain}:
        return f"{layer}operator {operator} has no ONNX form"
    return f"{layer}operator {operator}: {str(chain[-1]).strip().splitlines()[0]}"


def _owner(program: Any, operator: str) -> str:
    """The layer that an operator of the decomposed program is from."""
    if program is None:
        return ""
    for candidate in (program, program.run_decompositions()):
        for node in candidate.graph.nodes:
            if node.op == "call_function" and str(node.target).startswith(operator):
                path, kind = list(node.meta.get("nn_module_stack", {"": ("", "")}).values())[-1]
                name = kind if isinstance(kind, str) else kind.__name__
                return f"layer {path} ({name.rpartition('.')[2]}): " if path else ""
    return ""


def _scope(model: Any, name: str) -> str:
    for node in model.graph.node if model is not None else ():
        if node.name == name:
            scopes = {p.key: p.value for p in node.metadata_props}.get("pkg.torch.onnx.name_scopes", "")
            path = re.findall(r"'([^']*)'", scopes)
            layer = path[-2] if len(path) > 1 else ""
            return f"layer {layer}: " if layer else ""
    return ""
