"""MHAF-YOLO: a detector of heterogeneous large-kernel blocks whose neck looks at finer and coarser levels twice.

Z. Yang et al. 2025, "MHAF-YOLO: Multi-Branch Heterogeneous Auxiliary Fusion YOLO for accurate object detection",
arXiv 2502.04656. Every stage of backbone and neck is a RepHMS block (:mod:`torchconv.ops.mhafyolo_blocks`), kernels
growing from 3 to 9 with the stride. The neck's first pass joins each level with the finer one averaged and the coarser
one enlarged, its second pass with the neck's own neighbours. Two heads learn from many anchors an object and from one;
the second alone is deployed, without suppression of overlapping boxes.

Training and deployed parameters, 80 classes: Lite-N 1.63 and 1.36 million, N 2.55 and 2.18, S 7.92 and 7.14, M 16.7
and 15.3; multiply-adds at 640 × 640: 2.3, 3.5, 12.5 and 32.2 billion.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchconv._common import check_choice
from torchconv.catalog import part
from torchconv.models._registry import register_model
from torchconv.models.detect.boxes import Detections, corners, letterbox, select, suppress
from torchconv.models.detect.mhafyolo_graph import PLANS, Plan, Row, build_graph, plan_rows
from torchconv.models.detect.mhafyolo_head import BRANCHES, DetectionHead
from torchconv.ops._common import check_input
from torchconv.ops.mhafyolo import merged_copy


@part(
    "mhafyolo",
    paper="mhafyolo",
    kind="model",
    dims=(2,),
    merges="self",
    keywords="object detection detector YOLO NMS-free one-to-one head MAFPN RepHMS real-time COCO",
)
class MHAFYOLO(nn.Module):
    """The detector of a plan, or of rows of one's own.

    Training, ``forward`` gives the raw maps of both heads, for
    :class:`torchconv.models.detect.mhafyolo_loss.DetectionLoss`; in eval mode the boxes and scores of one head.

    Args:
        graph: a plan's name ("lite_n", "n", "s", "m"), a :class:`Plan`, or rows
            (:mod:`torchconv.models.detect.mhafyolo_graph`).
        num_classes: C.
        in_chans: channels of the image.
        reg_max: bins of a box's side.
        eps, momentum: of all batch norms.

    Shape:
        (B, in_chans, H, W), H and W multiples of 32, values in [0, 1] → (B, 4 + C, A) in eval mode: centre x, centre y,
        width and height in pixels and scores of A = H·W·(1/64 + 1/256 + 1/1024) anchors; in training mode
        {"one2many": maps, "one2one": maps} with maps (B, 4·reg_max + C, H/s, W/s), s = 8, 16, 32.

    Raises:
        ValueError: an argument is out of range, or an image of another shape.

    Example:
        >>> import torch
        >>> plan = Plan(0.125, (64, 64, 128, 128), (2, 2, 2, 2), neck=(128, 64, 64), down=64)
        >>> net = MHAFYOLO(plan, num_classes=3).eval()
        >>> net(torch.rand(1, 3, 64, 96)).shape
        torch.Size([1, 7, 126])
        >>> [tuple(m.shape) for m in net.train()(torch.rand(2, 3, 64, 96))["one2one"]]
        [(2, 67, 8, 12), (2, 67, 4, 6), (2, 67, 2, 3)]

    Reference: arXiv 2502.04656, section 3.
    """

    def __init__(
        self,
        graph: str | Plan | Sequence[Row] = "n",
        num_classes: int = 80,
        in_chans: int = 3,
        *,
        reg_max: int = 16,
        eps: float = 1e-3,
        momentum: float = 0.03,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if isinstance(graph, str):
            check_choice("graph", graph, PLANS)
            graph = PLANS[graph]
        rows = plan_rows(graph) if isinstance(graph, Plan) else graph
        norms: dict[str, Any] = {"eps": eps, "momentum": momentum, "device": device, "dtype": dtype}
        built = build_graph(rows, in_chans, **norms)
        head = DetectionHead(built.channels, built.strides, num_classes, reg_max, **norms)
        self.num_classes, self.in_chans, self.branch = num_classes, in_chans, "one2one"
        self.strides, self.multiple = built.strides, built.multiple
        self.model = nn.ModuleList([*built.modules, head])
        self.sources, self.outputs = built.sources, built.outputs
        needed = {source: row for row, sources in enumerate(built.sources) for source in sources}
        self._last_use = {row: [s for s, last in needed.items() if last == row] for row in range(len(built.modules))}

    @property
    def head(self) -> DetectionHead:
        """The module of the last row."""
        head: Any = self.model[-1]
        return head

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """The maps that the head gets, finest first."""
        check_input(x, self.in_chans, 2)
        if any(side == 0 or side % self.multiple for side in x.shape[2:]):
            remedy = f"height and width must be multiples of {self.multiple}; see torchconv.models.detect.boxes"
            raise ValueError(f"x of shape {tuple(x.shape)}: {remedy}.letterbox")
        kept = {-1: x}
        for row, sources in enumerate(self.sources[:-1]):
            kept[row] = self.model[row](*[kept[s] for s in sources])
            for source in self._last_use[row]:
                del kept[source]
        return [kept[row] for row in self.outputs]

    def forward(self, x: Tensor) -> Any:
        """Raw maps of both heads in training, boxes and scores of the head ``self.branch`` otherwise."""
        features = self.forward_features(x)
        if self.training:
            return self.head(features)
        return self.head.decode(self.head.maps(features, self.branch))

    def use(self, branch: str) -> MHAFYOLO:
        """Give the boxes of the head "one2one" (for :func:`select`) or "one2many" (for :func:`suppress`)."""
        check_choice("branch", branch, self.head.branches)
        self.branch = branch
        return self

    def merge(self) -> nn.Module:
        """The deployed form: one head, every branch and batch norm folded into its convolution."""
        twin: Any = merged_copy(self)
        twin.head.keep(self.branch)
        return twin

    @torch.no_grad()
    def detect(
        self, image: Tensor, size: int | tuple[int, int] = 640, conf: float = 0.25, iou: float = 0.7, max_det: int = 300
    ) -> list[Detections]:
        """Find objects: fit the images in ``size``, run the network in eval mode, put the boxes back.

        Args:
            image: (N, in_chans, H, W) or (in_chans, H, W), values in [0, 1].
            size: side, or (height, width), at which the network looks.
            conf: objects score more than this.
            iou: of the suppression, which only the head "one2many" needs.
            max_det: objects of an image at most.

        Returns:
            For each image, boxes in its pixels, scores and classes, best first.
        """
        batch, place = letterbox(image if image.dim() == 4 else image.unsqueeze(0), size, self.multiple)
        modes = [(module, module.training) for module in self.modules()]
        try:
            y = self.eval()(batch)
        finally:
            for module, mode in modes:
                module.training = mode
        if self.branch == BRANCHES[0]:
            found = suppress(y, conf, iou, max_det)
        else:
            boxes, scores, labels = select(y, max_det)
            sure = scores > conf
            both = zip(corners(boxes), scores, labels, sure, strict=True)
            found = [Detections(b[k], s[k], c[k]) for b, s, c, k in both]
        return [Detections(place.back(b, clip=True), s, c) for b, s, c in found]


def convert_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' state dict under this library's names: one prefix; the bins' numbers are counted, not stored."""
    named = {re.sub(r"^(?:model\.)*(?=\d)", "model.", n): t for n, t in state.items()}
    return {n: t for n, t in named.items() if not n.endswith("dfl.conv.weight")}


def read_official(state: dict[str, Tensor]) -> dict[str, int]:
    """Classes and bins of a checkpoint, from the shapes of its head."""
    found = {}
    for name, tensor in state.items():
        if re.search(r"\.(?:one2one_)?cv3\.0\.2\.bias$", name):
            found["num_classes"] = len(tensor)
        elif re.search(r"\.(?:one2one_)?cv2\.0\.3\.bias$", name):
            found["reg_max"] = len(tensor) // 4
    return found


@register_model("mhafyolo")
def mhafyolo_lite_n(**options: Any) -> MHAFYOLO:
    """MHAF-YOLO Lite-N; 1.6 million parameters in training, 1.4 deployed, 38.5 AP on COCO."""
    return MHAFYOLO("lite_n", **options)


@register_model("mhafyolo")
def mhafyolo_n(**options: Any) -> MHAFYOLO:
    """MHAF-YOLO N; 2.5 million parameters in training, 2.2 deployed, 42.3 AP on COCO."""
    return MHAFYOLO("n", **options)


@register_model("mhafyolo")
def mhafyolo_s(**options: Any) -> MHAFYOLO:
    """MHAF-YOLO S; 7.9 million parameters in training, 7.1 deployed, 48.9 AP on COCO."""
    return MHAFYOLO("s", **options)


@register_model("mhafyolo")
def mhafyolo_m(**options: Any) -> MHAFYOLO:
    """MHAF-YOLO M; 16.7 million parameters in training, 15.3 deployed, 52.7 AP on COCO."""
    return MHAFYOLO("m", **options)
