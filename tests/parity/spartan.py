"""SpaRTAN's mixers, block and network."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from tests.parity.core import Adapted, Case
from torchconv.models.classify.spartan import SpaRTAN, SpaRTANBlock
from torchconv.ops.spartan import CMixer, SMixer


def widths_used(init: int, dims: Sequence[int], depths: Sequence[int]) -> list[int]:
    """Widths after the first stage. The authors' network ignores the one after a stage without blocks; ours refuses."""
    widths = [init]
    for depth, width in zip(depths, dims, strict=False):
        widths.append(width if depth else widths[-1])
    return widths[1:]


def adapt(case: Case) -> Adapted:
    """Which part it is follows from the names in the state."""
    config = case.config
    module: nn.Module
    if "conv.0.conv.weight" in case.state:
        depths = config.get("layer_depths", (3, 3, 12, 2))
        ratios = config.get("expand_ratios", (4, 4, 2, 2))
        stages = config.get("num_layer", len(depths))
        init = config.get("init_dim", 32)
        widths = widths_used(init, config.get("dims", (64, 128, 256))[: stages - 1], depths)
        classes = config.get("num_classes", 1000)
        image = case.state["conv.0.conv.weight"].shape[1]
        module = SpaRTAN(classes, image, depths[:stages], ratios[:stages], init, widths, dropout=0.0)
    elif "scale_1" in case.state:
        groups = (config.get("s_groups", 1), config.get("c_groups", 1), config.get("use_group", True))
        module = SpaRTANBlock(config["in_dim"], config.get("expand_ratio", 4), *groups)
    elif "complex" in case.state:
        module = CMixer(config["in_dim"], config.get("expand_ratio", 4), config.get("groups", 1))
    else:
        module = SMixer(config["in_dim"], config.get("groups", 1))
    return Adapted(lambda inputs: {"y": module(inputs["x"])}, module)
