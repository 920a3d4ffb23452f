"""LSNet: aggregation, kernel prediction, LSConv, RepVGGDW, attention and whole networks."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from tests.parity.core import Adapted, Case
from torchconv.kernels import adaptive_conv2d
from torchconv.models.classify.lsnet import Attention, LSNet, RepVGGDW
from torchconv.ops.lsnet import LKP, LSConv2d


def adapt(case: Case) -> Adapted:
    """Which part it is follows from the names in the state; options absent or null are the authors' defaults."""
    config = {n: v for n, v in case.config.items() if v is not None}
    if "w" in case.inputs:
        return Adapted(lambda inputs: {"y": _aggregate(inputs, config.get("ks"))})
    if "patch_embed.0.c.weight" in case.state:
        return _network(case)
    channels = config.get("dim", config.get("ed", case.inputs["x"].shape[1]))
    if "conv1.c.weight" in case.state:
        module = RepVGGDW(channels)
        return Adapted(lambda inputs: {"y": module(inputs["x"])}, module, extra=partial(_fused, case, module))
    if "qkv.c.weight" in case.state:
        names = ("key_dim", "num_heads", "attn_ratio", "resolution")
        attention = Attention(channels, **{n: config[n] for n in names if n in config})
        return Adapted(lambda inputs: {"y": attention(inputs["x"])}, attention)
    look, small, share = config.get("lks", 7), config.get("sks", 3), config.get("groups", 8)
    if "cv1.c.weight" in case.state:
        lkp = LKP(channels, look, small, share)
        return Adapted(lambda inputs: {"y": lkp(inputs["x"])}, lkp)
    conv = LSConv2d(channels, kernel_size=small, large_kernel_size=look, share=share)
    return Adapted(lambda inputs: {"y": conv(inputs["x"])}, conv)


def _aggregate(inputs: dict[str, Tensor], k: int | None) -> Tensor:
    weight = inputs["w"]
    if k is not None and weight.shape[2] != k * k:
        raise ValueError(f"weight of shape {tuple(weight.shape)}: ks={k} in the config")
    return adaptive_conv2d(inputs["x"], weight)


def _fused(case: Case, module: RepVGGDW, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    merged = module.merge()
    found = {f"fused.{n}": t for n, t in merged.state_dict().items()}
    if "y_fused" in case.outputs:
        found["y_fused"] = merged(inputs["x"])
    return found


def _network(case: Case) -> Adapted:
    renamed = {"embed_dim": "dims", "depth": "depths"}
    known = ("embed_dim", "depth", "num_heads", "key_dim", "num_classes", "in_chans", "img_size", "patch_size")
    options = {renamed.get(n, n): case.config[n] for n in known if case.config.get(n) is not None}
    module = LSNet(**options, distillation=any(n.startswith("head_dist.") for n in case.state))

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        y = module(inputs["x"])
        return {"y": y} if isinstance(y, Tensor) else {f"y{i}": t for i, t in enumerate(y)}

    def extra(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y_fused": module.merge()(inputs["x"])} if "y_fused" in case.outputs else {}

    return Adapted(forward, module, extra=extra)
