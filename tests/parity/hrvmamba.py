"""HRVMamba: selective scan and its directions, DCNv4, the block, the module of parallel resolutions, the networks."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from tests.parity.core import Adapted, Case
from torchconv.kernels import selective_scan
from torchconv.models.classify.hrvmamba import HRVMamba, convert_name, convert_official, read_official
from torchconv.models.classify.hrvmamba_block import DVSSBlock, HRModule
from torchconv.models.detect.hrvmamba import HRVMambaPose
from torchconv.models.detect.hrvmamba import convert_official as convert_pose
from torchconv.ops.hrvmamba_dcn import dcnv4
from torchconv.ops.hrvmamba_scan import SelectiveScan2d, cross_merge, cross_scan


def adapt(case: Case) -> Adapted:
    """Which part it is follows from the inputs and the state."""
    config = case.config
    if "delta" in case.inputs or any(n.startswith("cross_") for n in case.outputs):
        return Adapted(lambda inputs: _scan(case, inputs))
    if "offset_mask" in case.inputs:
        return Adapted(lambda inputs: {"y": _dcn(config, inputs)})
    if any(re.match(r"(.*\.)?stage2\.", n) for n in case.state):
        return _network(case)
    if any(n.startswith("branches.") for n in case.state):
        return _module(case)
    block = _as_stored(case, DVSSBlock(_channels(case.state, ""), **_options(config, case.state)))
    return Adapted(lambda inputs: {"y": block(_image(inputs))}, block)


def _image(inputs: dict[str, Tensor]) -> Tensor:
    return inputs["x"] if "x" in inputs else next(t for t in inputs.values() if t.dim() == 4)


def _as_stored(case: Case, module: nn.Module) -> nn.Module:
    """The order of the scans by the name of the form; gradients of maps that the file has as 1 × 1 convolutions."""
    for layer in module.modules():
        if isinstance(layer, SelectiveScan2d) and case.config.get("forward_type", "").startswith("v052d"):
            layer.directions = "bidirectional"
    for name, parameter in module.named_parameters():
        if name in case.grads and parameter.dim() == 2 and case.grads[name].dim() == 4:
            case.grads[name] = case.grads[name].flatten(1)
    return module


def _scan(case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    found = {}
    if "y" in case.outputs:
        arguments = {n: inputs[n] for n in names if n in inputs}
        found["y"] = selective_scan(**arguments, delta_softplus=case.config.get("delta_softplus", True))
    for ending, directions in (("", "cross"), ("_bidi", "bidirectional")):
        if f"cross_scan{ending}" in case.outputs:
            found[f"cross_scan{ending}"] = cross_scan(inputs["x"], directions)
        if f"cross_merge{ending}" in case.outputs:
            ys = inputs["ys"]
            height, width = ys.shape[3:] if ys.dim() == 5 else (case.config["H"], case.config["W"])
            found[f"cross_merge{ending}"] = cross_merge(ys.flatten(3), (int(height), int(width)), directions)
    return found


def _dcn(config: dict[str, Any], inputs: dict[str, Tensor]) -> Tensor:
    return dcnv4(
        inputs["value"],
        inputs["offset_mask"],
        config.get("kernel", 3),
        config.get("stride", 1),
        config.get("pad", 1),
        config.get("dilation", 1),
        config["group"],
        config.get("offset_scale", 1.0),
        bool(config.get("remove_center", 0)),
    )


def _channels(state: dict[str, Tensor], prefix: str) -> int:
    return state[f"{prefix}norm.weight"].shape[0]


def _options(config: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Any]:
    """Of the blocks, read off the first one."""

    def shape(name: str) -> Any:
        return next(t.shape for n, t in sorted(state.items()) if n.endswith(name))

    channels, hidden = shape("norm.weight")[0], shape("mlp.fc1.weight")[0]
    rows, states = shape("op.A_logs")
    inner, rank = rows // 4, shape("op.dt_projs_weight")[2]
    heads = [t.shape[2] for n, t in state.items() if n.endswith("offset_mask_dw.weight")]
    names = [n for n in state if n.endswith("op.out_norm.weight")]
    # The published rule says which blocks have a convolution before the head; a state may differ from it.
    ruled = [n for n in names if state[n.replace("op.out_norm", "norm")].shape[0] % 80 == 0]
    head = "auto" if len(ruled) == len(heads) and set(heads) <= {3} else heads[0] if heads else None
    return {
        "local": any("cpe1." in n for n in state),
        "mlp_ratio": _ratio(hidden, channels, config.get("mlp_ratio", 2.0)),
        "ratio": _ratio(inner, channels, config.get("ssm_ratio", 2.0)),
        "states": states,
        "rank": None if rank == -(-channels // 16) else rank,
        "gated": shape("op.in_proj.weight")[0] == 2 * inner,
        "head_kernel": head,
    }


def _ratio(part: int, whole: int, said: float) -> float:
    return said if int(whole * said) == part else (part + 0.5) / whole


def _places(state: dict[str, Tensor], prefix: str = "") -> list[tuple[int, ...]]:
    """The numbers in the names of blocks: of stage, module, resolution and block, as far as the names have them."""
    found = {m[0] for n in state if (m := re.match(rf"{prefix}.*?branches\.\d+\.\d+\.", n))}
    return sorted(tuple(map(int, re.findall(r"\d+", name))) for name in found)


def _module(case: Case) -> Adapted:
    config, state = case.config, case.state
    places = _places(state)
    resolutions = 1 + max(b for b, _ in places)
    blocks = [1 + max(n for b, n in places if b == branch) for branch in range(resolutions)]
    several = config.get("multiscale_output", True) and (
        resolutions == 1 or any(n.startswith("fuse_layers.1.") for n in state)
    )
    channels = [_channels(state, f"branches.{b}.0.") for b in range(resolutions)]
    module = HRModule(channels, blocks, several, **_options(config, state))

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return _named(case, module([inputs[f"x{i}"] for i in range(resolutions)]))

    return Adapted(forward, _as_stored(case, module))


def _named(case: Case, ys: list[Tensor]) -> dict[str, Tensor]:
    if len(ys) == 1 and "y" in case.outputs:
        return {"y": ys[0]}
    return {f"y{i}": y for i, y in enumerate(ys)}


def _network(case: Case) -> Adapted:
    posed = any(n.endswith("head.final_layer.weight") for n in case.state)
    convert = convert_pose if posed else convert_official
    state = {n.removeprefix("backbone."): t for n, t in convert(case.state).items()}
    places = _places(state, "stage")
    last = max(s for s, *_ in places)
    stages = range(2, last + 1)
    options: dict[str, Any] = {
        "in_chans": state["conv1.weight"].shape[1],
        "channels": [_channels(state, f"stage{last}.0.branches.{b}.0.") for b in range(last)],
        "stage1_channels": state["layer1.0.conv1.weight"].shape[0],
        "stage1_blocks": 1 + max(int(n.split(".")[1]) for n in state if n.startswith("layer1.")),
        "modules": [1 + max(m for s, m, _, _ in places if s == stage) for stage in stages],
        "blocks": [
            [1 + max(n for s, _, b, n in places if (s, b) == (stage, branch)) for branch in range(stage)]
            for stage in stages
        ],
        "stem_channels": state["conv1.weight"].shape[0],
        **read_official(state),
        **_options(case.config, state),
    }
    if posed:
        pose = _as_stored(case, HRVMambaPose(state["final_layer.weight"].shape[0], **options))
        name = next(iter(case.outputs))
        return Adapted(lambda inputs: {name: pose(_image(inputs))}, pose, convert, names=_pose_name)
    network = HRVMamba(num_classes=state["head.weight"].shape[0] if "head.weight" in state else 0, **options)

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if not network.dense and "y0" not in case.outputs:
            name = next(n for n in case.outputs if not n.startswith("buffer."))
            return {name: network(_image(inputs))}
        return _named(case, network.forward_maps(_image(inputs)))

    return Adapted(forward, _as_stored(case, network), convert, names=convert_name)


def _pose_name(name: str) -> str:
    return re.sub(r"^.*head\.final_layer", "final_layer", name)
