"""The block that PuYun repeats: large kernel attention and a feed-forward part with a depthwise convolution.

Guo et al. 2022, "Visual Attention Network", arXiv 2202.09741; Zhu et al. 2024, "PuYun", arXiv 2409.02123.

    x ← x + DropPath(λ_1 ⊙ Attention(BN(x)))
    x ← x + DropPath(λ_2 ⊙ MLP(BN(x)))             MLP: 1 × 1 to r·C, depthwise 3 × 3, GELU, 1 × 1 to C

The attention adds its own input, so that the normalised map enters twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive
from torchconv.catalog import part
from torchconv.models._drop_path import DropPath
from torchconv.ops._common import ChannelNorm
from torchconv.ops.plain import DepthwiseConv2d
from torchconv.ops.puyun import LKAttention2d, depthwise_same, init_fan_out

NORMS: dict[str, Callable[..., nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "layer": ChannelNorm,
    "group": lambda dim, **options: nn.GroupNorm(1, dim, **options),
}


class DWConv(nn.Module):
    """Depthwise 3 × 3 convolution, under the authors' name ``dwconv``."""

    def __init__(self, dim: int, padding_mode: str = "zeros", *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.padding_mode = padding_mode
        self.dwconv = DepthwiseConv2d(dim, kernel_size=3, padding=1, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → the same."""
        if self.padding_mode == "zeros":
            y: Tensor = self.dwconv(x)
            return y
        return depthwise_same(x, self.dwconv.weight, self.dwconv.bias, (1, 1), self.padding_mode)


class ConvMlp(nn.Module):
    """1 × 1 convolution, depthwise 3 × 3, GELU, 1 × 1 convolution, with dropout after the last two.

    ``padding_mode`` is that of the depthwise convolution, see :func:`~torchconv.ops.puyun.large_kernel_attention`.

    Shape:
        (N, C, H, W) → the same.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        drop: float = 0.0,
        padding_mode: str = "zeros",
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fc1 = nn.Conv2d(dim, hidden, 1, **options)
        self.dwconv = DWConv(hidden, padding_mode, **options)
        self.fc2 = nn.Conv2d(hidden, dim, 1, **options)
        self.drop = nn.Dropout(drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of variance 2 / fan-out, zero biases."""
        for layer in (self.fc1, self.dwconv.dwconv, self.fc2):
            init_fan_out(layer)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the four."""
        x = self.drop(F.gelu(self.dwconv(self.fc1(x))))
        y: Tensor = self.drop(self.fc2(x))
        return y


@part(
    "van-block",
    paper="puyun",
    kind="layer",
    dims=(2,),
    probe={"build": {"dim": 6, "mlp_ratio": 2.0}, "inputs": [[2, 6, 8, 7]]},
    keywords="visual attention network block large kernel attention batch norm",
)
class VANBlock(nn.Module):
    """Large kernel attention and a convolutional feed-forward part, each normalised before, scaled and added.

    Args:
        dim: channels C ≥ 1.
        mlp_ratio: width of the feed-forward part over C.
        drop: dropout in the feed-forward part.
        drop_path: chance in [0, 1) of dropping a branch for a sample in training.
        layer_scale: initial λ.
        kernel_size, decomposition: of the attention, see :class:`~torchconv.ops.puyun.LKA`.
        padding_mode: "zeros", "longitude" or "sphere", before each of the three depthwise convolutions.
        norm: "batch" as published for images; "layer", over the channels of each position, or "group", over the whole
            map, where a device holds a single sample.

    Shape:
        (N, C, H, W) → the same.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> VANBlock(8)(torch.zeros(2, 8, 12, 12)).shape
        torch.Size([2, 8, 12, 12])

    Reference: arXiv 2202.09741, figure 3.
    """

    def __init__(
        self,
        dim: int,
        mlp_ratio: float = 4.0,
        drop: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float = 1e-2,
        kernel_size: int = 21,
        decomposition: int = 3,
        padding_mode: str = "zeros",
        norm: str = "batch",
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_positive("dim", dim)
        check_choice("norm", norm, NORMS)
        hidden = int(dim * mlp_ratio)
        check(hidden >= 1, "mlp_ratio", mlp_ratio, f"leaves no hidden channels of {dim}")
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        sizes: dict[str, Any] = {"kernel_size": kernel_size, "decomposition": decomposition}
        self.norm1 = NORMS[norm](dim, **options)
        self.attn = LKAttention2d(dim, **sizes, padding_mode=padding_mode, **options)
        self.drop_path = DropPath(drop_path)
        self.norm2 = NORMS[norm](dim, **options)
        self.mlp = ConvMlp(dim, hidden, drop, padding_mode, **options)
        self.layer_scale_1 = nn.Parameter(torch.full((dim,), float(layer_scale), **options))
        self.layer_scale_2 = nn.Parameter(torch.full((dim,), float(layer_scale), **options))

    def param_options(self) -> dict[str, dict[str, float]]:
        """The scales are not decayed."""
        return {name: {"weight_decay": 0.0} for name in ("layer_scale_1", "layer_scale_2")}

    def forward(self, x: Tensor) -> Tensor:
        """Apply both branches."""
        x = x + self.drop_path(self.layer_scale_1[:, None, None] * self.attn(self.norm1(x)))
        y: Tensor = x + self.drop_path(self.layer_scale_2[:, None, None] * self.mlp(self.norm2(x)))
        return y
