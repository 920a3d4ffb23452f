"""A residual classifier in two layouts with the same parameters: layers in a row, or all side by side.

Bermeitinger, Hrycej, Handschuh 2023, "Make Deep Networks Shallow Again", arXiv 2309.08414. An embedding convolution to
C channels, K residual layers of equal width, a pooled or flattened head. P = P_embed + K·(k²·C² + C) + P_head
parameters in both layouts, which the paper compares at equal P.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchconv._common import Size, check, check_choice, check_positive
from torchconv.catalog import part
from torchconv.models._backbone import Backbone
from torchconv.models._registry import register_model
from torchconv.ops.shallow import ParallelResidual2d

LAYOUTS: dict[str, int | None] = {"sequential": None, "parallel": 1}


@part(
    "residual-classifier",
    paper="shallow",
    kind="model",
    dims=(2,),
    keywords="deep shallow network pair parallel residual layers depth study digits MNIST CIFAR",
)
class ResidualClassifier(Backbone):
    """Embedding, K residual layers in a row or side by side, linear head.

    Args:
        num_classes: logits; 0 for none.
        in_chans: channels of the image.
        width: C, channels of the residual layers.
        n_layers: K.
        kernel_size: of the residual layers; the parallel layout sees no farther than it.
        layout: "sequential" (deep) or "parallel" (shallow).
        activation: "relu", "sigmoid", "tanh" or "linear".
        embed_size: kernel of the embedding.
        img_size: side or (H, W) of the images: the head then reads the flattened map. None pools the map by
            ``global_pool``.
        global_pool: "avg", "max" or "avgmax", where ``img_size`` is None.

    Shape:
        (N, in_chans, H, W) → (N, num_classes).

    Raises:
        ValueError: an argument is out of range, or the images are not of ``img_size``.

    Example:
        >>> deep, shallow = (ResidualClassifier(layout=layout) for layout in ("sequential", "parallel"))
        >>> shallow.load_state_dict(deep.state_dict())
        <All keys matched successfully>

    Reference: arXiv 2309.08414.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        width: int = 16,
        n_layers: int = 8,
        kernel_size: Size = 3,
        layout: str = "sequential",
        activation: str = "relu",
        embed_size: int = 1,
        img_size: int | Sequence[int] | None = None,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        check_positive("num_classes", num_classes, zero=True)
        check_positive("in_chans", in_chans)
        check_positive("width", width)
        check_positive("embed_size", embed_size)
        check_choice("layout", layout, LAYOUTS)
        check_choice("global_pool", global_pool, ("avg", "max", "avgmax"))
        size = (img_size, img_size) if isinstance(img_size, int) else img_size and tuple(img_size)
        ok = size is None or (len(size) == 2 and min(size) >= 1)
        check(ok, "img_size", img_size, "must be the side of the images or their (height, width)")
        self.img_size = size
        self.num_classes, self.in_chans, self.layout = num_classes, in_chans, layout
        self.num_features = width * (1 if size is None else size[0] * size[1])
        self.global_pool = global_pool if size is None else ""
        self.embed = nn.Conv2d(in_chans, width, embed_size, padding="same")
        self.stack = ParallelResidual2d(
            width, kernel_size=kernel_size, n_layers=n_layers, activation=activation, order=LAYOUTS[layout]
        )
        self.feature_info = [{"num_chs": width, "reduction": 1, "module": "stack"}]
        self.head = self.make_classifier(num_classes)

    def stage(self, index: int, x: Tensor) -> Tensor:
        """The map after the residual layers."""
        return self.run([self.stack], self.embed(x))

    def neck(self, x: Tensor) -> Tensor:
        """Flatten the map where the head was made for one size of images."""
        if x.dim() == 4 and self.img_size is not None:
            check(tuple(x.shape[2:]) == self.img_size, "x", tuple(x.shape), f"the head was made for {self.img_size}")
            return x.flatten(1)
        return x

    def with_layout(self, layout: str) -> ResidualClassifier:
        """A copy in the other layout with equal parameters, the fair start of a comparison."""
        check_choice("layout", layout, LAYOUTS)
        pool = self.global_pool or "avg"
        stack = self.stack
        twin = ResidualClassifier(
            self.num_classes,
            self.in_chans,
            stack.in_channels,
            stack.n_layers,
            stack.kernel_size,
            layout,
            stack.activation,
            self.embed.kernel_size[0],
            self.img_size,
            pool,
        ).to(self.embed.weight.device, self.embed.weight.dtype)
        twin.load_state_dict(self.state_dict())
        return twin.train(self.training)

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """The parallel layout with its layers as one wide convolution.

        Raises:
            ValueError: the sequential layout has no such form.
        """
        check(self.layout == "parallel", "layout", self.layout, "only parallel layers merge into one")
        merged: Any = self.with_layout("parallel").eval()
        merged.stack = merged.stack.merge()
        found: nn.Module = merged
        return found


@register_model("shallow")
def residual_sequential(**options: Any) -> ResidualClassifier:
    """Residual layers in a row."""
    return ResidualClassifier(**{"layout": "sequential", **options})


@register_model("shallow")
def residual_parallel(**options: Any) -> ResidualClassifier:
    """The same residual layers side by side: one layer deep."""
    return ResidualClassifier(**{"layout": "parallel", **options})
