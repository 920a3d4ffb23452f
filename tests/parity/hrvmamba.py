"""HRVMamba's operators: selective scan and its directions, DCNv4, the block and the module of parallel resolutions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tests.parity.core import Adapted, Case, ParityError
from torchconv.kernels import selective_scan
from torchconv.models.classify.hrvmamba_block import DVSSBlock, HRModule
from torchconv.ops.hrvmamba_dcn import dcnv4
from torchconv.ops.hrvmamba_scan import SelectiveScan2d, cross_merge, cross_scan


def adapt(case: Case) -> Adapted:
    """Which part it is follows from the inputs and the keys of the config."""
    config = case.config
    if "delta" in case.inputs or any(n.startswith("cross_") for n in case.outputs):
        return Adapted(lambda inputs: _scan(case, inputs))
    if "offset_mask" in case.inputs:
        return Adapted(lambda inputs: {"y": _dcn(config, inputs)})
    if "num_modules" in config or any(n.startswith(("conv1.", "stage", "transition")) for n in case.state):
        raise ParityError("the backbone is not there yet; operators, block and module are")
    if "num_branches" in config:
        return _module(case)
    block = _as_stored(case, DVSSBlock(config["hidden_dim"], **_options(config, case.state)))
    return Adapted(lambda inputs: {"y": block(inputs["x"])}, block)


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


def _options(config: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Any]:
    rank = config.get("ssm_dt_rank", "auto")
    heads = [t.shape[2] for n, t in state.items() if n.endswith("offset_mask_dw.weight")]
    return {
        "local": any("cpe1." in n for n in state),
        "mlp_ratio": config.get("mlp_ratio", 2.0),
        "ratio": config.get("ssm_ratio", 2.0),
        "states": config.get("ssm_d_state", 1),
        "rank": None if rank == "auto" else rank,
        "gated": "noz" not in config.get("forward_type", "v05_noz"),
        "head_kernel": int(heads[0]) if heads else None,
    }


def _module(case: Case) -> Adapted:
    config = case.config
    blocks = config.get("num_blocks", 2)
    module = HRModule(
        config["num_channels"],
        blocks if isinstance(blocks, int) else list(blocks),
        config.get("multiscale_output", True),
        **_options(config, case.state),
    )

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        ys = module([inputs[f"x{i}"] for i in range(len(config["num_channels"]))])
        if len(ys) == 1 and "y" in case.outputs:
            return {"y": ys[0]}
        return {f"y{i}": y for i, y in enumerate(ys)}

    return Adapted(forward, _as_stored(case, module))
