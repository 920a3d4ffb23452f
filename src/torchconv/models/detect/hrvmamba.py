"""Poses by HRVMamba: the finest map of the high-resolution backbone, one 1 × 1 convolution, a heatmap a joint.

H. Zhang et al. 2024, "HRVMamba: High-Resolution Visual State Space Model for Dense Prediction", arXiv 2410.03174.

Top-down: the image is a crop around one person, 256 × 192 or 384 × 288 pixels as published; maps have a quarter of its
side. Trained by :func:`keypoint_loss` on :func:`keypoint_heatmaps` from a backbone that has seen ImageNet: AdamW at
5·10⁻⁴ with weight decay 0.01, batches of 256, 210 epochs, a tenth of the rate after 170 and 200.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchconv._common import check_positive
from torchconv.catalog import part
from torchconv.models._registry import register_model
from torchconv.models.classify.hrvmamba import VARIANTS, HRVMamba
from torchconv.models.classify.hrvmamba import convert_official as convert_backbone
from torchconv.models.classify.hrvmamba import read_official as read_backbone
from torchconv.models.detect.hrvmamba_keypoints import (
    COCO_PAIRS,
    Pairs,
    average_with_mirrored,
    decode_heatmaps,
    keypoint_heatmaps,
    keypoint_loss,
    pck,
)

__all__ = [
    "COCO_PAIRS",
    "HRVMambaPose",
    "average_with_mirrored",
    "decode_heatmaps",
    "keypoint_heatmaps",
    "keypoint_loss",
    "pck",
]


@part(
    "hrvmamba-pose",
    paper="hrvmamba",
    kind="model",
    dims=(2,),
    keywords="human pose estimation key points heatmaps top-down COCO CrowdPose HRNet",
)
class HRVMambaPose(nn.Module):
    """The high-resolution backbone with one heatmap for each joint.

    Args:
        joints: maps; 17 in COCO, 14 in CrowdPose.
        options: of the backbone, :class:`torchconv.models.classify.hrvmamba.HRVMamba`. Only its finest map is made in
            the end unless ``multiscale_output`` is True.

    Shape:
        (N, in_chans, H, W) → (N, joints, ⌈H/4⌉, ⌈W/4⌉).

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> net = HRVMambaPose(5, channels=(8, 12), stage1_channels=8, modules=(1,), blocks=1).eval()
        >>> net(torch.zeros(1, 3, 64, 48)).shape
        torch.Size([1, 5, 16, 12])

    Reference: arXiv 2410.03174, experiments on poses.
    """

    def __init__(self, joints: int = 17, *, device: Any = None, dtype: Any = None, **options: Any) -> None:
        super().__init__()
        check_positive("joints", joints)
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.backbone = HRVMamba(**{"multiscale_output": False, **options, "dense": True}, **place)
        self.joints, self.in_chans = joints, self.backbone.in_chans
        self.final_layer = nn.Conv2d(self.backbone.channels[0], joints, 1, **place)
        nn.init.normal_(self.final_layer.weight, std=0.001)
        assert self.final_layer.bias is not None
        nn.init.zeros_(self.final_layer.bias)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As :meth:`HRVMamba.set_grad_checkpointing`."""
        self.backbone.set_grad_checkpointing(enable)

    def forward(self, x: Tensor) -> Tensor:
        """Heatmaps of ``x``."""
        y: Tensor = self.final_layer(self.backbone.forward_maps(x)[0])
        return y

    @torch.no_grad()
    def predict(self, x: Tensor, pairs: Pairs | None = COCO_PAIRS, shift: bool = True) -> tuple[Tensor, Tensor]:
        """Points and scores, in the network's current mode.

        Args:
            x: crops.
            pairs: joints that trade places in the mirrored crop, which is looked at too; None leaves that out.
            shift: a pixel of the mirrored maps and a quarter of one of the result; see the functions named there.

        Shape:
            (N, in_chans, H, W) → points (N, joints, 2), x and y in pixels of ``x``, and scores (N, joints).
        """
        maps = self(x)
        if pairs is not None:
            maps = average_with_mirrored(maps, self(x.flip(3)), pairs, shift)
        return decode_heatmaps(maps, (x.shape[3] / maps.shape[3], x.shape[2] / maps.shape[2]), shift)


def _build(variant: str, options: dict[str, Any]) -> HRVMambaPose:
    return HRVMambaPose(**{**VARIANTS[variant], **options})


@register_model("hrvmamba")
def hrvmamba_pose_t(**options: Any) -> HRVMambaPose:
    """HRVMamba-Tiny for poses, COCO val AP 69.5 at 256 × 192."""
    return _build("hrvmamba_t", options)


@register_model("hrvmamba")
def hrvmamba_pose_s(**options: Any) -> HRVMambaPose:
    """HRVMamba-Small for poses, COCO val AP 74.6 at 256 × 192 and 76.4 at 384 × 288."""
    return _build("hrvmamba_s", options)


@register_model("hrvmamba")
def hrvmamba_pose_b(**options: Any) -> HRVMambaPose:
    """HRVMamba-Base for poses, COCO val AP 76.5 at 256 × 192 and 77.7 at 384 × 288."""
    return _build("hrvmamba_b", options)


def convert_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint of the authors under this library's names; the last layer is looked for below any name of a head."""
    last = {re.sub(r"^.*final_layer\.", "final_layer.", n): t for n, t in state.items() if "final_layer." in n}
    inner = convert_backbone({n: t for n, t in state.items() if "final_layer." not in n})
    return {**{f"backbone.{n}": t for n, t in inner.items()}, **last}


def read_official(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Joints, and whether the backbone gives all maps, from a converted checkpoint."""
    inner = {n.removeprefix("backbone."): t for n, t in state.items() if n.startswith("backbone.")}
    found: dict[str, Any] = {"multiscale_output": read_backbone(inner)["multiscale_output"]}
    if "final_layer.weight" in state:
        found["joints"] = int(state["final_layer.weight"].shape[0])
    return found
