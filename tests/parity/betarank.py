"""Beta-rank of one layer: both ratios over the right patches, the released axes, L1, and the filters kept."""

from __future__ import annotations

import re

import torch.nn.functional as F
from torch import Tensor

from tests.parity.core import Adapted, Case
from torchconv.compress.betarank import beta_rank, keep_largest, l1_rank, normalise_ranks


def adapt(case: Case) -> Adapted:
    """Names of outputs say what is asked: official_{rank,l1,keep<n>}, patch_{ratio}, patch_{ratio}_raw."""
    c = case.config
    x, weight = case.inputs["x"], case.inputs["w"]
    narrower = x.shape[-1] // case.inputs["y"].shape[-1] if "y" in case.inputs else 1
    stride, dilation = c.get("stride", max(1, narrower)), c.get("dilation", 1)
    groups = c.get("groups", x.shape[1] // weight.shape[1])
    padding = c.get("padding")
    if padding is None:  # that which gives y, else that which keeps the size at stride 1
        extent = dilation * (weight.shape[-1] - 1)
        padding = extent // 2
        if "y" in case.inputs:
            padding = max(0, (case.inputs["y"].shape[-1] - 1) * stride + extent + 1 - x.shape[-1] + 1) // 2

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x, weight = inputs["x"], inputs["w"]
        y = inputs.get("y")
        if y is None:
            y = F.conv2d(x.double(), weight.double(), None, stride, padding, dilation, groups)

        def score(ratio: str, axes: str) -> Tensor:
            return beta_rank(x, y, weight, stride, padding, ratio, axes, dilation=dilation, groups=groups)

        found = {"official_l1": l1_rank(weight, y[0, 0].numel(), groups=groups)}
        for ratio in ("out_over_in", "in_over_out"):
            found[f"patch_{ratio}_raw"] = score(ratio, "patch")
            found[f"patch_{ratio}"] = normalise_ranks(found[f"patch_{ratio}_raw"])
        if any(name.startswith(("official_rank", "official_keep")) for name in case.outputs):
            found["official_rank"] = normalise_ranks(score("out_over_in", "released"))
        for name in case.outputs:
            if kept := re.fullmatch(r"official_keep(\d+)", name):
                found[name] = keep_largest(found["official_rank"], int(kept[1]))
        return found

    return Adapted(forward)
