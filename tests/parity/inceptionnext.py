"""InceptionNeXt: the mixer, the MetaNeXt block and the network, of the authors and of timm."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tests.parity.core import Adapted, Case, ParityError
from torchconv.models.classify.inceptionnext import MetaNeXt, MetaNeXtBlock
from torchconv.ops.inceptionnext import InceptionDWConv2d


def _mixer(config: dict[str, Any]) -> dict[str, Any]:
    names = {"square_kernel_size": "square_kernel_size", "band_kernel_size": "kernel_size"}
    options = {ours: config[theirs] for theirs, ours in names.items() if theirs in config}
    return {**options, **{n: config[n] for n in ("branch_ratio",) if n in config}}


def adapt(case: Case) -> Adapted:
    """Build the class named in ``source`` from the config."""
    config, name = case.config, case.source.split(":")[-1].split()[0]
    module: nn.Module
    if name == "InceptionDWConv2d":
        channels = config["in_channels"] if "in_channels" in config else config["in_chs"]
        module = InceptionDWConv2d(channels, dilation=config.get("dilation", 1), **_mixer(config))
    elif name == "MetaNeXtBlock":
        mixer = _mixer(config)
        module = MetaNeXtBlock(
            config["dim"],
            config.get("mlp_ratio", 4),
            config.get("ls_init_value", 1e-6),
            dilation=config.get("dilation", 1),
            token_mixer=lambda dim, dilation: InceptionDWConv2d(dim, dilation=dilation, **mixer),
        )
    elif name == "MetaNeXt":
        known = ("in_chans", "num_classes", "depths", "dims", "mlp_ratios", "ls_init_value", "output_stride")
        known += ("square_kernel_size", "band_kernel_size", "branch_ratio")
        module = MetaNeXt(**{n: config[n] for n in known if n in config})
    else:
        raise ParityError(f"source {case.source!r}: no such class here")

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if not isinstance(module, MetaNeXt):
            return {"y": module(inputs["x"])}
        features = module.forward_features(inputs["x"])
        return {"y": module.forward_head(features), "forward_features": features}

    return Adapted(forward=forward, module=module)
