"""DFYP for Sentinel-2: series of images of a county's grid cells, to the logarithms of production and yield.

Zhang, Yan, Zhang, Miao, Wang 2025, "DFYP: A Dynamic Fusion Framework with Spectral Channel Attention and Adaptive
Operator Learning for Crop Yield Prediction", arXiv 2507.05849. The network for MODIS is in ``dfyp``.

    s = attention(x)                                            each image alone, mean pooling
    y = a₁ ⊙ cnn(ω · edges(grey(s)) + (1 − ω) · s) + a₂ ⊙ vit(s)      both averaged over dates and cells

1,381,007 parameters; 0.92 GMACs an image of 224 × 224, 0.62 of them in convolutions. Names are those of the authors'
checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torchconv._common import Size, check, check_choice, check_positive
from torchconv.catalog import part
from torchconv.models._registry import register_model
from torchconv.models.forecast.dfyp import convert_official as convert_official
from torchconv.models.forecast.dfyp import read_vit
from torchconv.models.forecast.dfyp_vit import ViT
from torchconv.ops.dfyp import GREY, EdgeOperator, ResolutionAttention, blend

# The operator of each crop, as published.
CROPS = {"corn": "sobel", "cotton": "scharr", "soybean": "sobel", "winter wheat": "scharr"}
WIDTHS = (32, 64, 128, 128)


class CropGate(nn.Module):
    """Edges of the grey image blended into its three channels: ω · |∇grey| + (1 − ω) · x, ω learned.

    Shape:
        (N, 3, H, W) → the same.
    """

    def __init__(self, operator: str) -> None:
        super().__init__()
        self.operator = EdgeOperator(operator)
        self.operator_weight = nn.Parameter(torch.tensor(0.5))

    def param_options(self) -> dict[str, dict[str, float]]:
        """The share of the edges is not decayed; it would fall to zero."""
        return {"operator_weight": {"weight_decay": 0.0}}

    def forward(self, x: Tensor) -> Tensor:
        """Blend."""
        weights = torch.tensor(GREY, device=x.device, dtype=x.dtype).reshape(1, 3, 1, 1)
        return blend(x, self.operator((x * weights).sum(1, keepdim=True)), self.operator_weight)


class ImageBranch(nn.Module):
    """The gate and a small convolutional network for each image, and linear layers on the mean of a county.

    Args:
        operator: of the gate.
        num_classes: outputs.
        widths: channels of the convolutions, each followed by ReLU, dropout (but for the first) and pooling by 2, the
            last one over the whole map.
        dropout: between the linear layers; half of it between the convolutions.
    """

    def __init__(self, operator: str, num_classes: int, widths: Sequence[int], dropout: float) -> None:
        super().__init__()
        self.operator_gate = CropGate(operator)
        layers: list[nn.Module] = []
        for index, (before, after) in enumerate(zip((3, *widths), widths, strict=False)):
            last = index == len(widths) - 1
            layers += [
                nn.Conv2d(before, after, 3, padding=1),
                nn.ReLU(),
                nn.Dropout(dropout / 2 if index else 0.0),
                nn.AdaptiveAvgPool2d(1) if last else nn.MaxPool2d(2),
            ]
        self.cnn = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        width = widths[-1]
        self.fusion = nn.Sequential(
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(width, width // 2),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(width // 2, num_classes),
        )

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) → (N, width)."""
        y: Tensor = self.cnn(self.operator_gate(x))
        return y.flatten(1)

    def forward_head(self, x: Tensor) -> Tensor:
        """Means of counties (B, width) → (B, num_classes)."""
        y: Tensor = self.fusion(self.dropout(x))
        return y


@part(
    "sentinel-dfyp-net",
    paper="dfyp",
    kind="model",
    dims=(2,),
    keywords="crop yield prediction regression Sentinel-2 image time series CropNet agriculture CNN ViT fusion",
)
class SentinelDFYPNet(nn.Module):
    """Production and yield of a county from images of its grid cells at several dates.

    Args:
        num_classes: outputs; the published two are log(production) and log(yield).
        operator: edges of the gate: "sobel", "scharr", or "learnable" (not in the paper).
        reduction: of the channel attention.
        widths: channels of the convolutions.
        image_size: side of the images for which the transformer holds positions; smaller ones take the first of them.
        patch_size, dim, depth, heads, dim_head, mlp_dim: of the transformer, see
            :class:`~torchconv.models.forecast.dfyp_vit.ViT`.
        dropout: between linear layers and in the transformer, half of it between convolutions.
        emb_dropout: on the tokens of the transformer.
        images_at_once: pass so many images at a time through the branches and, in training, keep only the images for
            the backward pass; counties of a thousand images then fit. None takes all at once.

    Shape:
        (B, dates, cells, 3, H, W) → (B, num_classes).

    Raises:
        ValueError: an argument is out of range, or an input of another size.

    Example:
        >>> net = SentinelDFYPNet(widths=(4, 6), image_size=32, dim=8, depth=1, heads=2, dim_head=4, mlp_dim=8).eval()
        >>> net(torch.zeros(1, 3, 2, 3, 32, 32)).shape
        torch.Size([1, 2])

    Reference: arXiv 2507.05849.
    """

    def __init__(
        self,
        num_classes: int = 2,
        *,
        operator: str = "sobel",
        reduction: int = 8,
        widths: Sequence[int] = WIDTHS,
        image_size: Size = 224,
        patch_size: Size = 16,
        dim: int = 128,
        depth: int = 6,
        heads: int = 6,
        dim_head: int = 32,
        mlp_dim: int = 256,
        dropout: float = 0.5,
        emb_dropout: float = 0.1,
        images_at_once: int | None = None,
    ) -> None:
        super().__init__()
        check_positive("num_classes", num_classes)
        ok = len(widths) > 0 and all(isinstance(w, int) and w > 0 for w in widths) and widths[-1] > 1
        check(ok, "widths", widths, "needs the channels of one convolution or more, the last one 2 or more")
        check(0 <= dropout < 1, "dropout", dropout, "must be at least 0 and below 1")
        if images_at_once is not None:
            check_positive("images_at_once", images_at_once)
        self.num_classes, self.images_at_once = num_classes, images_at_once
        self.se = ResolutionAttention(3, reduction, "avg")
        self.cnn_model = ImageBranch(operator, num_classes, tuple(widths), dropout)
        transformer = (dim, depth, heads, dim_head, mlp_dim, dropout, emb_dropout)
        self.vit_model = ViT(image_size, patch_size, 3, num_classes, *transformer)
        self.a1 = nn.Parameter(torch.full((num_classes,), 0.5))
        self.a2 = nn.Parameter(torch.full((num_classes,), 0.5))

    def branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the convolutional and the transformer branch say, before they are weighted: (B, num_classes) each."""
        if x.dim() != 6 or x.shape[3] != 3 or not x.shape[1] * x.shape[2]:
            raise ValueError(
                f"x of shape {tuple(x.shape)}: expected (B, dates, cells, 3, H, W), a date and a cell or more"
            )
        images = x.flatten(0, 2)
        self.vit_model.check(images)
        smallest = 2 ** (len(self.cnn_model.cnn) // 4 - 1)
        if min(x.shape[4:]) < smallest:
            raise ValueError(f"x of shape {tuple(x.shape)}: the poolings need {smallest} pixels a side; resize it")
        cnn, vit = self._features(images)
        # The images of a county are a run.
        cnn, vit = (y.unflatten(0, (x.shape[0], x.shape[1] * x.shape[2])).mean(1) for y in (cnn, vit))
        return self.cnn_model.forward_head(cnn), self.vit_model.mlp_head(vit)

    def _features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What both branches see in each image, at once or in pieces."""
        if self.images_at_once is None:
            return self._both(images)
        pieces = images.split(self.images_at_once)
        if self.training:
            pairs = [checkpoint(self._both, piece, use_reentrant=False) for piece in pieces]
        else:
            pairs = [self._both(piece) for piece in pieces]
        cnn, vit = zip(*pairs, strict=True)
        return torch.cat(cnn), torch.cat(vit)

    def _both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        s = self.se(images)
        return self.cnn_model.forward_features(s), self.vit_model.forward_features(s)

    def forward(self, x: Tensor) -> Tensor:
        """The logarithms of production and yield."""
        cnn, vit = self.branches(x)
        return self.a1 * cnn + self.a2 * vit


def read_official(state: Mapping[str, Tensor], heads: int = 6, patch_size: int | None = None) -> dict[str, Any]:
    """Options of :class:`SentinelDFYPNet` that the shapes of a state tell; heads and operator they do not."""
    convs = sorted(int(n.split(".")[2]) for n in state if re.fullmatch(r"cnn_model\.cnn\.\d+\.weight", n))
    if not convs or "vit_model.mlp_head.weight" not in state:
        return {}  # of another network: loading it lists what does not fit
    patch = patch_size or round((state["vit_model.to_patch_embedding.2.weight"].shape[1] / 3) ** 0.5)
    return {
        **read_vit(state, heads),
        "reduction": 3 // state["se.fc.0.weight"].shape[0],
        "widths": tuple(state[f"cnn_model.cnn.{i}.weight"].shape[0] for i in convs),
        "image_size": patch * round((state["vit_model.pos_embedding"].shape[-2] - 1) ** 0.5),
        "patch_size": patch,
        "heads": heads,
    }


@register_model("dfyp")
def dfyp_sentinel2(crop: str = "corn", **options: Any) -> SentinelDFYPNet:
    """DFYP for Sentinel-2 images, with the published operator of the crop; 1,381,007 parameters."""
    check_choice("crop", crop, tuple(CROPS))
    return SentinelDFYPNet(**{"operator": CROPS[crop], **options})
