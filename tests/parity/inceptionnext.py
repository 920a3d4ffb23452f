"""InceptionNeXt: the mixer, the MetaNeXt block and the network, of the authors and of timm; the partial convolution."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tests.parity.core import Adapted, Case
from torchconv.models.classify.inceptionnext import MetaNeXt, MetaNeXtBlock
from torchconv.ops.inceptionnext import InceptionDWConv2d, PartialDepthwiseConv2d


def _mixer(config: dict[str, Any]) -> dict[str, Any]:
    names = {"square_kernel_size": "square_kernel_size", "band_kernel_size": "kernel_size"}
    options = {ours: config[theirs] for theirs, ours in names.items() if theirs in config}
    return {**options, **{n: config[n] for n in ("branch_ratio",) if n in config}}


def _module(case: Case) -> nn.Module:
    # Null is the default, but for the layer scale, where it means none.
    config = {n: v for n, v in case.config.items() if v is not None or n == "ls_init_value"}
    if "stem.0.weight" in case.state:
        known: tuple[str, ...] = (
            "in_chans",
            "num_classes",
            "depths",
            "dims",
            "mlp_ratios",
            "ls_init_value",
            "output_stride",
            "square_kernel_size",
            "band_kernel_size",
            "branch_ratio",
        )
        return MetaNeXt(**{n: config[n] for n in known if n in config})
    dilation, channels = config.get("dilation", 1), case.inputs["x"].shape[1]
    if "mlp.fc1.weight" in case.state:
        mixer = _mixer(config)
        return MetaNeXtBlock(
            channels,
            config.get("mlp_ratio", 4),
            config.get("ls_init_value", 1e-6),
            dilation=dilation,
            token_mixer=lambda dim, dilation: InceptionDWConv2d(dim, dilation=dilation, **mixer),
        )
    if "conv.weight" in case.state:
        size, ratio = tuple(case.state["conv.weight"].shape[2:]), config.get("conv_ratio", 1.0)
        bias = "conv.bias" in case.state
        return PartialDepthwiseConv2d(channels, kernel_size=size, dilation=dilation, bias=bias, ratio=ratio)
    return InceptionDWConv2d(channels, dilation=dilation, **_mixer(config))


def adapt(case: Case) -> Adapted:
    """Which part it is follows from the names in the state; a mixer without branches has none."""
    module = _module(case)

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if not isinstance(module, MetaNeXt):
            return {"y": module(inputs["x"])}
        features = module.forward_features(inputs["x"])
        return {"y": module.forward_head(features), "forward_features": features}

    return Adapted(forward=forward, module=module)
