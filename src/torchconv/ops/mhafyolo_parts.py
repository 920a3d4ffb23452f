"""What MHAF-YOLO's network (arXiv 2502.04656) needs beside its blocks: pooling, downsampling, coarse attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_positive
from torchconv.catalog import part
from torchconv.ops._common import check_input
from torchconv.ops.mhafyolo import ConvBN, merged_copy


def shrink(x: Tensor, factor: int = 2) -> Tensor:
    """Average to ⌊size / factor⌋ positions an axis; windows overlap where the factor does not divide the size.

    Shape:
        (N, C, H, W) → (N, C, ⌊H / factor⌋, ⌊W / factor⌋).

    Raises:
        ValueError: nothing would be left of ``x``, or it has other axes.

    Example:
        >>> shrink(torch.arange(5.0).reshape(1, 1, 1, 5).expand(1, 1, 2, 5))
        tensor([[[[1., 3.]]]])
    """
    check_positive("factor", factor)
    if x.dim() != 4 or min(x.shape[2:]) < factor:
        raise ValueError(f"x of shape {tuple(x.shape)}: expected (N, C, H, W), H and W at least factor={factor}")
    return F.adaptive_avg_pool2d(x, (x.shape[2] // factor, x.shape[3] // factor))


@part(
    "sppf",
    paper="mhafyolo",
    kind="layer",
    dims=(2,),
    merges="self",
    probe={"build": {"in_channels": 6, "out_channels": 5, "kernel_size": 3}, "inputs": [[2, 6, 7, 5]]},
    keywords="spatial pyramid pooling fast YOLO max pooling context",
)
class SPPF(nn.Module):
    """Spatial pyramid pooling: three max poolings in a row, all four maps joined.

    Args:
        in_channels, out_channels: channels; in_channels // 2 are pooled.
        kernel_size: of each pooling, odd.
        eps, momentum: of the batch norms.

    Shape:
        (N, in_channels, H, W) → (N, out_channels, H, W).

    Example:
        >>> SPPF(8, 4)(torch.randn(2, 8, 6, 5)).shape
        torch.Size([2, 4, 6, 5])

    Reference: arXiv 2502.04656, section 3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 5,
        *,
        eps: float = 1e-3,
        momentum: float = 0.03,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check(isinstance(in_channels, int) and in_channels >= 2, "in_channels", in_channels, "must be at least 2")
        check_positive("kernel_size", kernel_size)
        check(kernel_size % 2 == 1, "kernel_size", kernel_size, "must be odd, to keep the size")
        options: dict[str, Any] = {"eps": eps, "momentum": momentum, "device": device, "dtype": dtype}
        self.in_channels, self.kernel_size = in_channels, kernel_size
        self.cv1 = ConvBN(in_channels, in_channels // 2, **options)
        self.cv2 = ConvBN(4 * (in_channels // 2), out_channels, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Pool ``x``."""
        check_input(x, self.in_channels, 2)
        maps = [self.cv1(x)]
        for _ in range(3):
            maps.append(F.max_pool2d(maps[-1], self.kernel_size, 1, self.kernel_size // 2))
        y: Tensor = self.cv2(torch.cat(maps, 1))
        return y

    def merge(self) -> nn.Module:
        """The same map with the batch norms folded."""
        return merged_copy(self)


@part(
    "scdown",
    paper="mhafyolo",
    kind="layer",
    dims=(2,),
    merges="self",
    probe={"build": {"in_channels": 6, "out_channels": 5}, "inputs": [[2, 6, 7, 5]]},
    keywords="spatial channel decoupled downsampling YOLO depthwise stride",
)
class SCDown(nn.Module):
    """Downsampling in two steps: channels by 1 × 1, then space by a strided depthwise convolution without activation.

    Args:
        in_channels, out_channels: channels.
        kernel_size, stride: of the depthwise convolution.
        eps, momentum: of the batch norms.

    Shape:
        (N, in_channels, H, W) → (N, out_channels, ⌈H / stride⌉, ⌈W / stride⌉) with an odd kernel.

    Example:
        >>> SCDown(8, 4)(torch.randn(2, 8, 7, 6)).shape
        torch.Size([2, 4, 4, 3])

    Reference: arXiv 2502.04656, section 3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 2,
        *,
        eps: float = 1e-3,
        momentum: float = 0.03,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"eps": eps, "momentum": momentum, "device": device, "dtype": dtype}
        self.in_channels = in_channels
        self.cv1 = ConvBN(in_channels, out_channels, **options)
        self.cv2 = ConvBN(out_channels, out_channels, kernel_size, stride, out_channels, act=False, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Downsample ``x``."""
        check_input(x, self.in_channels, 2)
        y: Tensor = self.cv2(self.cv1(x))
        return y

    def merge(self) -> nn.Module:
        """The same map with the batch norms folded."""
        return merged_copy(self)


class _Attention(nn.Module):
    """Self-attention over all positions, with keys half as wide as values and a depthwise 3 × 3 on the values."""

    def __init__(self, channels: int, heads: int, **options: Any) -> None:
        super().__init__()
        self.heads, self.head = heads, channels // heads
        self.key = self.head // 2
        self.qkv = ConvBN(channels, channels + 2 * self.key * heads, act=False, **options)
        self.proj = ConvBN(channels, channels, act=False, **options)
        self.pe = ConvBN(channels, channels, 3, groups=channels, act=False, **options)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).flatten(2).unflatten(1, (self.heads, 2 * self.key + self.head))
        q, k, v = parts.split((self.key, self.key, self.head), 2)
        # (N, heads, positions, width); the scale is the default 1 / √(width of a key)
        y = F.scaled_dot_product_attention(q.transpose(2, 3), k.transpose(2, 3), v.transpose(2, 3))
        y = y.transpose(2, 3).reshape(x.shape)
        y = y + self.pe(v.reshape(x.shape))
        z: Tensor = self.proj(y)
        return z


@part(
    "psa",
    paper="mhafyolo",
    kind="layer",
    dims=(2,),
    merges="self",
    probe={"build": {"channels": 8, "head_channels": 2}, "inputs": [[2, 8, 4, 3]]},
    keywords="partial self-attention YOLO YOLOv10 half the channels coarsest map",
)
class PSA(nn.Module):
    """Partial self-attention: half of the channels go through attention and a feed-forward part, the other half around.

    Args:
        channels: C.
        expansion: share of the channels with attention, c' = int(C · expansion).
        head_channels: about the width of a head; c' // head_channels heads, whose number divides c'.
        eps, momentum: of the batch norms.

    Shape:
        (N, C, H, W) → the same; memory (H·W)² a head where no fused attention is available.

    Raises:
        ValueError: fewer channels than one head needs (128 by default).

    Example:
        >>> PSA(128)(torch.randn(1, 128, 3, 4)).shape
        torch.Size([1, 128, 3, 4])

    Reference: arXiv 2502.04656, section 3, after YOLOv10, arXiv 2405.14458.
    """

    def __init__(
        self,
        channels: int,
        expansion: float = 0.5,
        head_channels: int = 64,
        *,
        eps: float = 1e-3,
        momentum: float = 0.03,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_positive("channels", channels)
        check(
            isinstance(head_channels, int) and head_channels > 1, "head_channels", head_channels, "must be at least 2"
        )
        part_ = int(channels * expansion)
        heads = part_ // head_channels
        remedy = f"attention on {part_} of them needs at least head_channels={head_channels}"
        check(heads >= 1, "channels", channels, remedy)
        remedy = f"{part_} of them do not divide into {heads} heads; choose head_channels to fit"
        check(part_ % heads == 0, "channels", channels, remedy)
        options: dict[str, Any] = {"eps": eps, "momentum": momentum, "device": device, "dtype": dtype}
        self.channels = channels
        self.cv1 = ConvBN(channels, 2 * part_, **options)
        self.attn = _Attention(part_, heads, **options)
        self.ffn = nn.Sequential(ConvBN(part_, 2 * part_, **options), ConvBN(2 * part_, part_, act=False, **options))
        self.cv2 = ConvBN(2 * part_, channels, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over the positions of ``x``."""
        check_input(x, self.channels, 2)
        a, b = self.cv1(x).chunk(2, 1)
        b = b + self.attn(b)
        b = b + self.ffn(b)
        y: Tensor = self.cv2(torch.cat([a, b], 1))
        return y

    def merge(self) -> nn.Module:
        """The same map with the batch norms folded."""
        return merged_copy(self)
