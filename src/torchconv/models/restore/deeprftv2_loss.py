"""The loss of the DeepRFT family: distance of images and of their spectra, for every image that a network gives.

Mao et al., arXiv 2111.11745 and 2511.21132, section 4: Σ mean|y − t| + 0.01 · mean|F y − F t|, on half of
the spectrum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchconv._common import check
from torchconv.kernels._custom import without_autocast
from torchconv.kernels.precision import widen


def spectral_loss(y: Tensor, target: Tensor) -> Tensor:
    """Mean magnitude of the difference of two images' spectra.

    Shape:
        (N, C, H, W) twice → a number; half precision is computed in float32.

    Example:
        >>> spectral_loss(torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)).item()  # 4 at frequency 0, of 4 frequencies
        1.0

    Reference: arXiv 2111.11745, section 3.
    """
    check(y.shape == target.shape, "target.shape", tuple(target.shape), f"must be that of y, {tuple(y.shape)}")
    with without_autocast(y.device.type):
        return torch.fft.rfft2(widen(y) - widen(target)).abs().mean()


def deblur_loss(images: Sequence[Tensor], targets: Sequence[Tensor], weight: float = 0.01) -> Tensor:
    """Mean absolute and spectral distance, summed over images.

    Args:
        images: outputs of a network.
        targets: the sharp image for each of them, at its size.
        weight: of the spectral distance.

    Raises:
        ValueError: there is not one target for each image, or sizes differ.

    Example:
        >>> deblur_loss([torch.ones(1, 1, 2, 2)], [torch.zeros(1, 1, 2, 2)]).item()
        1.0099999904632568

    Reference: arXiv 2511.21132, section 4.
    """
    check(len(targets) == len(images) > 0, "targets", len(targets), f"give one for each of {len(images)} images")
    terms = [
        (widen(y) - widen(t)).abs().mean() + weight * spectral_loss(y, t) for y, t in zip(images, targets, strict=True)
    ]
    return torch.stack(terms).sum()
