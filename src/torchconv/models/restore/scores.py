"""Scores of restored images: PSNR and SSIM, on RGB or on the luma, with a border left out.

SSIM: Wang et al. 2004, "Image Quality Assessment: From Error Visibility to Structural Similarity". Results of different
papers can only be compared where colour and border are treated alike: for downscaling by s both on RGB and on the luma
without s pixels at each border (arXiv 2511.01620), for deblurring on RGB without a crop (arXiv 2511.21132).
"""

from __future__ import annotations

from torch import Tensor

from torchconv._common import check, check_positive, require
from torchconv.kernels.precision import widen

WINDOW = 11


def luma(x: Tensor) -> Tensor:
    """Y of ITU-R BT.601 in studio range, 16/255 to 235/255, of RGB images in 0 to 1.

    Shape:
        (N, 3, H, W) → (N, 1, H, W).

    Raises:
        ValueError: not three channels.

    Example:
        >>> import torch
        >>> (255 * luma(torch.ones(1, 3, 1, 1))).round().item()
        235.0
    """
    check(x.dim() == 4 and x.shape[1] == 3, "x.shape", tuple(x.shape), "expected RGB images (N, 3, H, W)")
    red, green, blue = x.unbind(1)
    return ((65.481 * red + 128.553 * green + 24.966 * blue + 16) / 255).unsqueeze(1)


def psnr(y: Tensor, target: Tensor, crop: int = 0, on_luma: bool = False, peak: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio in dB of every image: 10 log₁₀(peak² / mean squared error).

    Args:
        y, target: images, used as they are: clamp and round before, where files would be compared.
        crop: pixels left out at each border.
        on_luma: compare Y of RGB images in 0 to 1.
        peak: the largest possible value.

    Shape:
        (N, C, H, W) twice → (N,).

    Raises:
        ValueError: shapes differ, or ``crop`` leaves nothing.

    Example:
        >>> import torch
        >>> psnr(torch.full((1, 3, 8, 8), 0.1), torch.zeros(1, 3, 8, 8))
        tensor([20.])
    """
    y, target = _prepared(y, target, crop, on_luma, peak, 1)
    return 10 * (peak**2 / (y - target).square().mean((1, 2, 3))).log10()


def ssim(y: Tensor, target: Tensor, crop: int = 0, on_luma: bool = False, peak: float = 1.0) -> Tensor:
    """Structural similarity of every image, 1 where they are equal: the mean over channels and places.

    Gaussian windows of 11 × 11 with deviation 1.5 that lie inside of the image, constants 0.01 and 0.03.

    Args:
        y, target, crop, on_luma, peak: see :func:`psnr`.

    Shape:
        (N, C, H, W) twice → (N,); at least 11 × 11 after the crop.

    Raises:
        ValueError: shapes differ, or less than a window is left.
        ImportError: torchmetrics is not installed (``pip install 'torchconv[compare]'``).

    Example:
        >>> import torch
        >>> x = torch.rand(1, 3, 16, 16)
        >>> ssim(x, x)
        tensor([1.])
    """
    y, target = _prepared(y, target, crop, on_luma, peak, WINDOW)
    metrics = require("torchmetrics.functional.image", "compare")
    options = {"data_range": float(peak), "reduction": "none", "return_full_image": True}
    _, places = metrics.structural_similarity_index_measure(y, target, **options)
    half = WINDOW // 2  # torchmetrics has windows over a mirrored border too
    found: Tensor = places[..., half:-half, half:-half].mean((1, 2, 3))
    return found


def _prepared(y: Tensor, target: Tensor, crop: int, on_luma: bool, peak: float, least: int) -> tuple[Tensor, Tensor]:
    check(peak > 0, "peak", peak, "must be positive")
    check(not on_luma or peak == 1, "peak", peak, "luma is of images in 0 to 1")
    check(y.dim() == 4, "y.shape", tuple(y.shape), "expected images (N, C, H, W)")
    check(y.shape == target.shape, "target.shape", tuple(target.shape), f"must be that of y, {tuple(y.shape)}")
    check_positive("crop", crop, zero=True)
    height, width = (n - 2 * crop for n in y.shape[2:])
    remedy = f"leaves {max(height, 0)} × {max(width, 0)} of {tuple(y.shape)}; {least} × {least} are needed"
    check(min(height, width) >= least, "crop", crop, remedy)
    pair = [widen(t)[:, :, crop : crop + height, crop : crop + width] for t in (y, target)]
    return (luma(pair[0]), luma(pair[1])) if on_luma else (pair[0], pair[1])
