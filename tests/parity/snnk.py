"""SNNK: ReLU layers and adapters, universal random features, exponential features, closed forms."""

from __future__ import annotations

import ast
import operator
from typing import Any

import torch
from torch import Tensor

from tests.parity.core import Adapted, Case
from torchconv.ops._snnk_features import (
    ReLUFeatures,
    arccos_kernel,
    exp_features,
    relu_features,
    wave_features,
)
from torchconv.ops.snnk import SNNKLinear, convert_official, fit_closed_form
from torchconv.ops.snnk_adapter import SNNKAdapter


def adapt(case: Case) -> Adapted:
    """Which function it is follows from the config and the outputs."""
    config = case.config
    if "input_size" in config:
        return _adapter(case)
    if "f" in config:
        return Adapted(lambda inputs: _estimate(config, inputs))
    if "A" in config or "a" in config:
        return Adapted(lambda inputs: {"phi": _exponential(config, inputs)})
    if any(name.startswith("order") for name in case.outputs):
        orders = [int(name[5:]) for name in case.outputs]
        return Adapted(lambda inputs: {f"order{n}": arccos_kernel(inputs["x"], inputs["W"], n) for n in orders})
    if any(name.startswith("W") for name in case.outputs):
        return Adapted(lambda inputs: _closed_form(config, inputs))
    return _layer(case)


def _features(config: dict[str, Any], size: int) -> ReLUFeatures:
    length = config.get("normalization_constant")
    normalize = (1.0 if length is None else length) if config.get("normalize", False) else None
    return ReLUFeatures(size, config["num_rfs"], floor=config.get("constant") or 0.0, normalize=normalize)


def _official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    rest = {n: t for n, t in state.items() if n != "projection_matrix"}
    return convert_official(rest, state["projection_matrix"])


def _layer(case: Case) -> Adapted:
    features = _features(case.config, case.config["dim"])
    out = case.config["out"] if "out" in case.config else len(case.state["weights"])
    module = SNNKLinear(case.config["dim"], out, features)
    return Adapted(
        lambda inputs: {"phi_x": module.features(inputs["x"]), "y": module(inputs["x"])}, module, state=_official
    )


def _adapter(case: Case) -> Adapted:
    config = case.config
    module = SNNKAdapter(
        config["input_size"],
        _features(config, config["input_size"]),
        config.get("down_sample"),
        config.get("ln_before", False),
    )

    def name(official: str) -> str:
        first, _, last = official.partition(".")
        if first != "adapter_down":
            return official
        return "adapter_down.weights" if last.endswith("weights") else f"adapter_norm_before.{last.split('.')[-1]}"

    return Adapted(
        lambda inputs: {"y": module(inputs["x"])},
        module,
        state=_official,
        names=name,
        ignore=lambda n: n.startswith("adapter_norm_after."),  # held by the authors' class, never applied
    )


def _estimate(config: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    rows, variance = inputs["G"], config.get("M", 0.0)
    phase = {"cos": 0.0, "sin": -torch.pi / 2}[config["f"]]
    phi = exp_features(inputs["x"], rows, variance=variance)
    psi = wave_features(inputs["W"], inputs.get("b"), rows, phase=phase, variance=variance)
    exact = inputs["x"] @ inputs["W"].T + inputs.get("b", 0)
    return {"estimate": phi @ psi.T, "exact": getattr(torch, config["f"])(exact)}


def _exponential(config: dict[str, Any], inputs: dict[str, Tensor]) -> Tensor:
    amplitude, scale = (_formula(config.get(name, "1"), inputs["xis"]) for name in ("A", "a"))
    return exp_features(inputs["x"], inputs["G"], scale, amplitude)


def _closed_form(config: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    phi, y = relu_features(inputs["x"], inputs["G"]), inputs["y"]
    return {"W": fit_closed_form(phi, y), "W_ridge": fit_closed_form(phi, y, config.get("ridge", 0.0))}


_BINARY: dict[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
_SIGNS: dict[type, Any] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_CALLS = ("cos", "sin", "tan", "cosh", "sinh", "tanh", "exp", "log", "sqrt", "abs", "square", "sigmoid")


def _formula(text: Any, xi: Tensor) -> Any:
    """A formula in xi, its tree evaluated node by node: numbers, + − · / powers and a few functions."""

    def value(node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=int() | float() | complex() as number):
                return number
            case ast.Name(id="xi"):
                return xi
            case ast.Name(id="pi") | ast.Attribute(value=ast.Name(), attr="pi"):
                return torch.pi
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _SIGNS:
                return _SIGNS[type(op)](value(operand))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                return _BINARY[type(op)](value(left), value(right))
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=[only]) if name in _CALLS:
                return getattr(torch, name)(torch.as_tensor(value(only), dtype=xi.dtype))
            case _:
                raise ValueError(f"formula {text!r}: cannot evaluate {ast.unparse(node)!r}")

    return value(ast.parse(str(text).replace("^", "**"), mode="eval").body)
