"""A small U-Net that predicts noise, with the names of Hugging Face diffusers' networks, to try samplers on.

Two resolutions, no normalisation (J. Ho et al. 2020, arXiv 2006.11239, cut down; the names are those by which layers of
Stable Diffusion are addressed):

    a = conv_in(x);  h = down_0(a);  b = halve(h);  h = mid(down_1(b));
    h = double(up_0([h, b]));  h = up_1([h, a]);  y = conv_out(h)

The skips are the *inputs* of the two down blocks. Each block is shortcut(x) + conv2(silu(conv1(silu x) + W e)).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_positive
from torchconv.catalog import part
from torchconv.models._registry import register_model


class ResnetBlock(nn.Module):
    """shortcut(x) + conv2(silu(conv1(silu(x)) + emb(e))); the shortcut is a 1 × 1 convolution where channels change."""

    def __init__(self, in_channels: int, out_channels: int, embedding: int, **options: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, **options)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, **options)
        self.emb = nn.Linear(embedding, out_channels, **options)
        self.sc = nn.Conv2d(in_channels, out_channels, 1, **options) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """x (N, C, H, W), e (N, embedding)."""
        h = self.conv1(F.silu(x)) + self.emb(e)[:, :, None, None]
        y: Tensor = self.sc(x) + self.conv2(F.silu(h))
        return y


class _Sampler(nn.Module):
    """A 3 × 3 convolution under the name that it has in diffusers' networks."""

    def __init__(self, channels: int, stride: int, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride, padding=1, **options)


class _Stage(nn.Module):
    """One block, and the convolution that changes the resolution; only holds them."""

    def __init__(self, in_channels: int, out_channels: int, embedding: int, **options: Any) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(in_channels, out_channels, embedding, **options)])

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        y: Tensor = self.resnets[0](x, e)
        return y


@part(
    "small-unet",
    paper="scalecrafter",
    kind="model",
    dims=(2,),
    keywords="U-Net diffusion denoiser noise prediction toy diffusers names context timestep",
)
class SmallUNet(nn.Module):
    """A U-Net of two resolutions that predicts noise from a noisy image, a time step and a context vector.

    Args:
        in_channels: of the image (the latent).
        channels: (full resolution, half resolution).
        context: length of the context vector.
        out_channels: unset is ``in_channels``.

    Shape:
        x (N, in_channels, H, W) with even H and W, timestep a number or (N,), context (N, context) →
        (N, out_channels, H, W).

    Raises:
        ValueError: an argument or the size of x is out of range.

    Example:
        >>> net = SmallUNet(4, (8, 16), context=6)
        >>> net(torch.zeros(2, 4, 16, 12), 500, torch.zeros(2, 6)).shape
        torch.Size([2, 4, 16, 12])

    Reference: arXiv 2310.07702, figure 3 (which of its layers are re-dilated).
    """

    def __init__(
        self,
        in_channels: int = 4,
        channels: tuple[int, int] = (32, 64),
        context: int = 16,
        out_channels: int | None = None,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check(len(channels) == 2, "channels", channels, "give two, of the full and of the half resolution")
        full, half = channels
        for name, value in (("in_channels", in_channels), ("channels", full), ("channels", half), ("context", context)):
            check_positive(name, value)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.context, e = context, context + 1
        self.conv_in = nn.Conv2d(in_channels, full, 3, padding=1, **options)
        down0, down1 = _Stage(full, full, e, **options), _Stage(full, half, e, **options)
        up0, up1 = _Stage(half + full, half, e, **options), _Stage(half + full, full, e, **options)
        down0.downsamplers = nn.ModuleList([_Sampler(full, 2, **options)])
        up0.upsamplers = nn.ModuleList([_Sampler(half, 1, **options)])
        self.down_blocks, self.up_blocks = nn.ModuleList([down0, down1]), nn.ModuleList([up0, up1])
        self.mid_block = _Stage(half, half, e, **options)
        self.conv_out = nn.Conv2d(full, out_channels or in_channels, 3, padding=1, **options)

    def forward(self, x: Tensor, timestep: float | Tensor, context: Tensor) -> Tensor:
        """Predict the noise in ``x``."""
        if x.shape[2] % 2 or x.shape[3] % 2:
            raise ValueError(f"x of shape {tuple(x.shape)}: height and width must be even")
        time = torch.as_tensor(timestep, dtype=context.dtype, device=context.device) / 1000
        e = torch.cat([context, time.reshape(-1, 1).expand(len(context), 1)], 1)
        down0: Any = self.down_blocks[0]
        up0: Any = self.up_blocks[0]
        a = self.conv_in(x)
        b = down0.downsamplers[0].conv(down0(a, e))
        h = self.mid_block(self.down_blocks[1](b, e), e)
        h = up0(torch.cat([h, b], 1), e)
        h = up0.upsamplers[0].conv(F.interpolate(h, scale_factor=2.0, mode="nearest"))
        y: Tensor = self.conv_out(self.up_blocks[1](torch.cat([h, a], 1), e))
        return y


@register_model("scalecrafter")
def small_unet(**options: Any) -> SmallUNet:
    """Small U-Net that predicts noise, to try samplers and re-dilation on; see :class:`SmallUNet` for its options.

    Example:
        >>> small_unet(in_channels=3, channels=(8, 16)).conv_in
        Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    """
    return SmallUNet(**options)
