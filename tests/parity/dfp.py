"""Dynamic fixed point: primitives, and the three passes of a convolution (exact, in chains, down-converted)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tests.parity.core import Adapted, Case, ParityError
from torchconv.compress.dfp import Chain, DFPTensor, add, chained_conv, down_convert, integer_conv, multiply, quantize
from torchconv.compress.dfp_gradients import integer_conv_input, integer_conv_weight


def adapt(case: Case) -> Adapted:
    """By the inputs: a convolution, or tensors for the primitives."""
    run = _convolution if "w" in case.inputs else _primitives
    return Adapted(lambda inputs: {}, extra=lambda inputs: run(case, inputs))


def _put(found: dict[str, Tensor], name: str, value: DFPTensor, suffix: str = "int") -> None:
    found[f"{name}_{suffix}"], found[f"{name}_exp"] = value.integers, value.exponent


def _primitives(case: Case, inputs: dict[str, Tensor]) -> Mapping[str, Tensor]:
    bits = int(case.config.get("P", 16))
    found: dict[str, Tensor] = {}
    tensors = {n: quantize(x, bits) for n, x in inputs.items() if x.is_floating_point()}
    for name, value in tensors.items():
        _put(found, name, value)
        found[f"{name}_dequant"] = value.dequantize()
    for name in case.outputs:
        pair = re.fullmatch(r"(add|mul)_([^_]+)_([^_]+)_(?:int|exp)", name)
        if pair and {pair[2], pair[3]} <= set(tensors):
            combine = add if pair[1] == "add" else multiply
            _put(found, name.rpartition("_")[0], combine(tensors[pair[2]], tensors[pair[3]]))
    for name, x in inputs.items():
        if not x.is_floating_point():
            for mode in ("truncate", "round"):
                _put(found, f"down_{mode}", down_convert(x, case.config.get(f"input_exp_of_{name}", 0), bits, mode))
    return found


def _convolution(case: Case, inputs: dict[str, Tensor]) -> Mapping[str, Tensor]:
    config = case.config
    bits = int(config.get("P", 16))
    found: dict[str, Tensor] = {}
    if inputs["w"].dim() == 2:  # a linear layer is a kernel of one tap
        mapped = _convolution(case, {n: t.unsqueeze(-1) for n, t in inputs.items()})
        return {n: t.squeeze(-1) if t.dim() == 3 else t for n, t in mapped.items()}
    x, w = quantize(inputs["x"], bits), quantize(inputs["w"], bits)
    options: dict[str, Any] = {n: config.get(n, d) for n, d in (("stride", 1), ("padding", 0), ("dilation", 1))}
    options["groups"] = int(config.get("groups", 1))
    _put(found, "x", x)
    _put(found, "w", w)
    y = integer_conv(x, w, **options)
    results = {"y": y}
    if "grad_y" in inputs:
        g = quantize(inputs["grad_y"], bits)
        _put(found, "grad_y", g)
        results["grad_x"] = integer_conv_input(g, w, x.integers.shape[2:], **options)
        results["grad_w"] = integer_conv_weight(x, g, w.integers.shape[2:], **options)
    for name, value in results.items():
        _put(found, name, value, "int64")
        found[f"{name}_float"] = value.dequantize()
    events = dict(config.get("overflow_events", {}))
    for name in case.outputs:
        if setting := re.fullmatch(r"y_(chain(\d+)_shift(\d+)_(\w+))", name):
            chain = Chain(int(setting[2]), int(setting[3]), setting[4])
            found[name], overflows = chained_conv(x, w, **options, chain=chain)
            expected = events.get(setting[1], int(overflows))
            if int(overflows) != expected:
                raise ParityError(f"{setting[1]}: {int(overflows)} overflows, expected {expected}")
        elif down := re.fullmatch(r"y_dfp(\d+)_(truncate|round)_(?:int|exp)", name):
            _put(found, name.rpartition("_")[0], down_convert(y.integers, y.exponent, int(down[1]), down[2]))
    return found
