"""Serpent: selective scan, its directions, the gated scan, blocks, changes of scale, and the U of the same family."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tests.parity.core import Adapted, Case
from torchconv.models.restore.serpent_block import VSSBlock
from torchconv.models.restore.serpent_vmunet import VMUNet, convert_name, convert_official, read_official, read_scans
from torchconv.ops.hrvmamba_scan import cross_merge, cross_scan
from torchconv.ops.serpent import PatchExpand2d, PatchMerging2d, SS2d, stateful_scan


def adapt(case: Case) -> Adapted:
    """Which part it is follows from the state, and without one from the inputs."""
    state = case.state
    if not state:
        return Adapted(lambda inputs: _scan(case, inputs))
    if any(n.endswith("patch_embed.proj.weight") for n in state):
        return _network(case)
    if "reduction.weight" in state:
        out, width = (int(n) for n in state["reduction.weight"].shape)
        rows = case.inputs["x"].shape[1]
        odd = "crop" if rows % 2 and case.outputs["y"].shape[1] == rows // 2 else _odd_columns(case)
        return _channels_last(PatchMerging2d(width // 4, out, odd))
    if "expand.weight" in state:
        out, width = (int(n) for n in state["expand.weight"].shape)
        return _channels_last(PatchExpand2d(width, out // width))
    if "A_logs" in state:
        weight = state["out_proj.weight"]
        options = {**read_scans(state), "bias": "in_proj.bias" in state, "dropout": case.config.get("dropout", 0.0)}
        return _channels_last(SS2d(state["in_proj.weight"].shape[1], int(weight.shape[0]), **options))
    channels = int(state["norm.weight"].shape[0])
    hidden = int(state["mlp.fc1.weight"].shape[0]) if "mlp.fc1.weight" in state else 0
    ratio = (hidden + 0.5) / channels if hidden % channels else hidden / channels
    return _channels_last(VSSBlock(channels, ratio, **read_scans(state)))


def _odd_columns(case: Case) -> str:
    columns = case.inputs["x"].shape[2]
    return "crop" if columns % 2 and case.outputs["y"].shape[2] == columns // 2 else "pad"


def _channels_last(module: Any) -> Adapted:
    """Maps in the file have their channels last."""
    return Adapted(lambda inputs: {"y": module(inputs["x"].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)}, module)


def _scan(case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    if "u" in inputs:
        names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
        arguments: dict[str, Any] = {n: inputs[n] for n in names if n in inputs}
        if "bias" in inputs:
            arguments["delta_bias"] = inputs["bias"]
        softplus = bool(case.config.get("delta_softplus", True))
        y, state = stateful_scan(**arguments, delta_softplus=softplus, state=inputs.get("state"))
        return {"y": y, "last_state": state}
    found = {}
    if "x" in inputs:
        found["xs"] = cross_scan(inputs["x"])
    if "ys" in inputs:
        height, width = inputs["x"].shape[2:] if "x" in inputs else (case.config["H"], case.config["W"])
        found["merged"] = cross_merge(inputs["ys"].flatten(3), (int(height), int(width)))
    return {n: t.reshape(case.outputs[n].shape) if n in case.outputs else t for n, t in found.items()}


def _network(case: Case) -> Adapted:
    """In double precision: the last normalisation, over few channels, amplifies float32 rounding up to 300 times.

    What is left of the difference is then the rounding of the file alone.
    """
    for tensors in (case.state, case.inputs):
        tensors.update({n: t.double() for n, t in tensors.items() if t.is_floating_point()})
    network = VMUNet(drop_path=case.config.get("drop_path_rate", 0.0), **read_official(convert_official(case.state)))
    return Adapted(lambda inputs: {"y": network(inputs["x"])}, network, convert_official, convert_name)
