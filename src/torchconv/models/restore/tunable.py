"""EDSR with tunable convolutions: super-resolution or restoration whose objective is chosen at inference.

Maggioni et al. 2023, arXiv 2304.00898, after EDSR (Lim et al. 2017, arXiv 1707.02921). As in the authors' code the head
is followed by a ReLU and no convolution stands after the residual blocks. Every convolution is a
:class:`~torchconv.ops.tunable.TunableConv2d`; state-dict names are the authors', whose fixed mean shifts
(``sub_mean``, ``add_mean``) are constants here.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchconv._common import check, check_positive
from torchconv.catalog import part
from torchconv.ops._tunable_mixing import Tunable, set_tuning
from torchconv.ops.tunable import TunableConv2d

RGB_MEAN = (0.4488, 0.4371, 0.4040)


def _apply(layer: nn.Module, x: Tensor, params: Tensor | None) -> Tensor:
    """ω goes to tunable layers only; merged ones and pixel shuffles take the map alone."""
    y: Tensor = layer(x, params) if isinstance(layer, Tunable | TunableResBlock) else layer(x)
    return y


class TunableResBlock(nn.Module):
    """x + scale · conv2(relu(conv1(x))), both 3 × 3 and tunable.

    Args:
        channels: channels in and out.
        scale: of the residual.
        options: of :class:`~torchconv.ops.tunable.TunableConv2d`.
    """

    def __init__(self, channels: int, scale: float = 0.1, **options: Any) -> None:
        super().__init__()
        self.conv1 = TunableConv2d(channels, channels, 3, **options)
        self.conv2 = TunableConv2d(channels, channels, 3, **options)
        self.scale = scale

    def forward(self, x: Tensor, params: Tensor | None = None) -> Tensor:
        """(B, C, H, W) → the same."""
        y = torch.relu(_apply(self.conv1, x, params))
        return torch.add(x, _apply(self.conv2, y, params), alpha=self.scale)


@part(
    "tunable-edsr",
    paper="tunable",
    kind="model",
    dims=(2,),
    merges="self",
    keywords="EDSR super-resolution denoising deblurring controllable tunable",
)
class TunableEDSR(nn.Module):
    """EDSR whose convolutions are mixed by ω.

    s = relu(head(x − mean)), y = tail(upsample(body(s) + s)) + mean.

    Args:
        img_channels: of the image; the RGB mean is taken away and added back where there are 3.
        num_blocks, num_channels: residual blocks and width.
        scale: 1, 3 or a power of two.
        num_params, expand_params, mode: as in :class:`~torchconv.ops.tunable.TunableConv`.

    Shape:
        x (B, img_channels, H, W) in 0 to 1, params (P,), (1, P), (B, P) or None → (B, img_channels, scale·H, scale·W).

    Raises:
        ValueError: ``scale`` is none of these, or another argument is out of range.

    Example:
        >>> net = TunableEDSR(num_blocks=2, num_channels=8, scale=2)
        >>> net(torch.zeros(1, 3, 6, 8), torch.tensor([0.3, 0.7])).shape
        torch.Size([1, 3, 12, 16])

    Reference: arXiv 2304.00898, section 4.
    """

    mean: Tensor

    def __init__(
        self,
        img_channels: int = 3,
        num_blocks: int = 16,
        num_channels: int = 64,
        scale: int = 4,
        num_params: int = 2,
        expand_params: int = 1,
        mode: str = "mlp",
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_positive("num_blocks", num_blocks, zero=True)
        check_positive("scale", scale)
        check(scale == 3 or scale & (scale - 1) == 0, "scale", scale, "must be 1, 3 or a power of two")
        options: dict[str, Any] = {
            "num_params": num_params,
            "expand_params": expand_params,
            "mode": mode,
            "device": device,
            "dtype": dtype,
        }
        factors = [3] if scale == 3 else [2] * (scale.bit_length() - 1)
        self.head = TunableConv2d(img_channels, num_channels, 3, **options)
        self.body = nn.ModuleList(TunableResBlock(num_channels, **options) for _ in range(num_blocks))
        self.upsample = nn.ModuleList()
        for factor in factors:
            self.upsample.append(TunableConv2d(num_channels, num_channels * factor**2, 3, **options))
            self.upsample.append(nn.PixelShuffle(factor))
        self.tail = TunableConv2d(num_channels, img_channels, 3, **options)
        mean = torch.tensor(RGB_MEAN if img_channels == 3 else (0.0,), device=device, dtype=dtype)
        self.register_buffer("mean", mean.reshape(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor, params: Tensor | None = None) -> Tensor:
        """Restore ``x`` at ``params``, by default at the layers' ``tuning``."""
        s = torch.relu(_apply(self.head, x - self.mean, params))
        y = s
        for block in self.body:
            y = _apply(block, y, params)
        y = y + s
        for layer in self.upsample:
            y = _apply(layer, y, params)
        return _apply(self.tail, y, params) + self.mean

    def merge(self, params: Tensor | Sequence[float] | None = None) -> nn.Module:
        """The network with plain convolutions at one ω, by default at the layers' ``tuning``; call it with x alone."""
        result = copy.deepcopy(self).eval()
        if params is not None:
            set_tuning(result, params)
        for name, module in list(result.named_modules()):
            if isinstance(module, TunableConv2d):
                parent, _, leaf = name.rpartition(".")
                setattr(result.get_submodule(parent), leaf, module.merge())
        return result
