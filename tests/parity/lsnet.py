"""LSNet: aggregation, kernel prediction, LSConv, RepVGGDW, attention and whole networks."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from tests.parity.core import Adapted, Case
from torchconv.kernels import adaptive_conv2d
from torchconv.models.classify.lsnet import Attention, LSNet, RepVGGDW
from torchconv.ops.lsnet import LKP, LSConv2d


def adapt(case: Case) -> Adapted:
    """Which part it is follows from the keys of the config."""
    config = case.config
    if "ks" in config:
        k = config["ks"]
        return Adapted(lambda inputs: {"y": _aggregate(inputs, k)})
    if "ed" in config:
        module = RepVGGDW(config["ed"])
        return Adapted(lambda inputs: {"y": module(inputs["x"])}, module, extra=partial(_fused, case, module))
    if "embed_dim" in config:
        return _network(case)
    if "resolution" in config or "attn_ratio" in config:
        names = ("key_dim", "num_heads", "attn_ratio", "resolution")
        attention = Attention(config["dim"], **{n: config[n] for n in names if n in config})
        return Adapted(lambda inputs: {"y": attention(inputs["x"])}, attention)
    if {"lks", "sks", "groups"} & set(config) or any(n.startswith("cv1.") for n in case.state):
        lkp = LKP(config["dim"], config.get("lks", 7), config.get("sks", 3), config.get("groups", 8))
        return Adapted(lambda inputs: {"y": lkp(inputs["x"])}, lkp)
    conv = LSConv2d(config["dim"])
    return Adapted(lambda inputs: {"y": conv(inputs["x"])}, conv)


def _aggregate(inputs: dict[str, Tensor], k: int) -> Tensor:
    weight = inputs["w"]
    if weight.shape[2] != k * k:
        raise ValueError(f"weight of shape {tuple(weight.shape)}: ks={k} in the config")
    return adaptive_conv2d(inputs["x"], weight)


def _fused(case: Case, module: RepVGGDW, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    merged = module.merge()
    found = {f"fused.{n}": t for n, t in merged.state_dict().items()}
    if "y_fused" in case.outputs:
        found["y_fused"] = merged(inputs["x"])
    return found


def _network(case: Case) -> Adapted:
    config = case.config
    renamed = {
        "embed_dim": "dims",
        "depth": "depths",
        "num_heads": "num_heads",
        "key_dim": "key_dim",
        "num_classes": "num_classes",
        "img_size": "img_size",
        "patch_size": "patch_size",
        "distillation": "distillation",
    }
    module = LSNet(**{ours: config[theirs] for theirs, ours in renamed.items() if theirs in config})

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        y = module(inputs["x"])
        return {"y": y} if isinstance(y, Tensor) else {f"y{i}": t for i, t in enumerate(y)}

    def extra(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y_fused": module.merge()(inputs["x"])} if "y_fused" in case.outputs else {}

    return Adapted(forward, module, extra=extra)
