"""Before and after sparse coding: contrast normalisation, high-pass and whitening of images, and scores.

The preparations of arXiv 2312.14685, as in SPORCO and SLIP. Images are (H, W) or (K, H, W), grey, floating point.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from torchconv._common import check
from torchconv.theory.csc_gabor import frequencies


def _image(image: Tensor, name: str = "image") -> None:
    ok = image.dim() in (2, 3) and image.is_floating_point() and image.numel() > 0
    check(ok, name, f"{tuple(image.shape)} of {image.dtype}", "give floating-point (H, W) or (K, H, W)")


def _mirrored(image: Tensor, padding: int) -> Tensor:
    """Padded by mirroring at the edge of the border pixels, which are repeated."""
    check(padding <= min(image.shape[-2:]), "image", tuple(image.shape), f"must be at least {padding} pixels wide")
    for axis in (-2, -1):
        n = image.shape[axis]
        places = torch.arange(-padding, n + padding, device=image.device)
        places = torch.where(places < 0, -1 - places, torch.where(places >= n, 2 * n - 1 - places, places))
        image = image.index_select(axis, places)
    return image


def _cropped(image: Tensor, padding: int) -> Tensor:
    return image[..., padding : image.shape[-2] - padding, padding : image.shape[-1] - padding]


def local_contrast_normalise(image: Tensor, n: int = 7, c: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Take off the local mean and divide by the local contrast.

    Args:
        image: (H, W) or (K, H, W).
        n: the Gaussian window has 2n + 1 pixels on a side and a standard deviation of n/3.
        c: the least divisor; None takes the mean contrast of the image (with its padding).

    Returns:
        (normalised, local mean, divisor), each of the image's shape.

    Example:
        >>> tuple(local_contrast_normalise(torch.rand(20, 24), 3)[0].shape)
        (20, 24)
    """
    _image(image)
    check(n >= 1, "n", n, "must be at least 1")
    line = torch.linspace(-3, 3, 2 * n + 1, dtype=image.dtype, device=image.device)
    window = (-line.square() / 2).exp()
    window = window / window.sum()
    padded = _mirrored(image, n)
    size = (padded.shape[-2], padded.shape[-1])
    spectrum = torch.fft.rfft2(window[:, None] * window, s=size)

    def blurred(t: Tensor) -> Tensor:  # circular, as wide as the padding: what wraps around is cut off
        return torch.fft.irfft2(torch.fft.rfft2(t) * spectrum, s=size).roll((-n, -n), (-2, -1))

    mean = blurred(padded)
    centred = padded - mean
    contrast = blurred(centred.square()).clamp(min=0).sqrt()
    least = contrast.mean((-2, -1), keepdim=True) if c is None else torch.tensor(c).to(image)
    # Of an image without contrast the rounding alone would be normalised.
    rounding = 16 * torch.finfo(image.dtype).eps * image.abs().amax((-2, -1), keepdim=True)
    divisor = torch.maximum(contrast, least.clamp(min=torch.finfo(image.dtype).tiny))
    normalised = centred / torch.maximum(divisor, rounding)
    return _cropped(normalised, n), _cropped(mean, n), _cropped(divisor, n)


def tikhonov_split(image: Tensor, lmbda: float = 10.0, padding: int = 16) -> tuple[Tensor, Tensor]:
    """Low and high frequencies of an image: low = (1 + λ |∇|²)⁻¹ image, high the rest.

    Args:
        image: (H, W) or (K, H, W).
        lmbda: λ ≥ 0; more of it leaves more in the high part.
        padding: pixels of mirrored border during the filtering.

    Example:
        >>> x = torch.rand(20, 24)
        >>> low, high = tikhonov_split(x, padding=4)
        >>> torch.allclose(low + high, x)
        True
    """
    _image(image)
    check(lmbda >= 0, "lmbda", lmbda, "must be >= 0")
    check(padding >= 0, "padding", padding, "must be >= 0")
    padded = _mirrored(image, padding)
    size = (padded.shape[-2], padded.shape[-1])
    kind = {"dtype": image.dtype, "device": image.device}
    rows = (torch.fft.fftfreq(size[0], **kind) * torch.pi).sin().square()
    columns = (torch.fft.rfftfreq(size[1], **kind) * torch.pi).sin().square()
    spectrum = torch.fft.rfft2(padded) / (1 + 4 * lmbda * (rows[:, None] + columns))
    low = _cropped(torch.fft.irfft2(spectrum, s=size), padding)
    return low, image - low


def whitening_filter(size: tuple[int, int], *, f_0: float = 0.4, alpha: float = 1.4, steepness: float = 4.0) -> Tensor:
    """Gain of every frequency (zero in the middle) that flattens the spectrum f^−2α of natural images up to f_0."""
    radius, _ = frequencies(size)
    power = radius ** (-2 * alpha)
    gain = (power / power.mean()) ** -0.5 * (-((radius / f_0) ** steepness)).exp()
    return gain / gain.mean()


def whiten(image: Tensor, *, f_0: float = 0.4, alpha: float = 1.4, steepness: float = 4.0) -> Tensor:
    """An image with the gain of :func:`whitening_filter`, circular.

    Example:
        >>> tuple(whiten(torch.rand(20, 24)).shape)
        (20, 24)
    """
    _image(image)
    size = (image.shape[-2], image.shape[-1])
    gain = torch.fft.ifftshift(whitening_filter(size, f_0=f_0, alpha=alpha, steepness=steepness)).to(image)
    return torch.fft.ifft2(torch.fft.fft2(image) * gain).real


def _pair(image: Tensor, reference: Tensor) -> float:
    _image(reference, "reference")
    same = image.shape == reference.shape
    check(same, "image", tuple(image.shape), f"must have the shape of the reference, {tuple(reference.shape)}")
    extent = float(reference.max() - reference.min())
    check(extent > 0, "reference", "constant", "scores are relative to its range")
    return extent


def psnr(image: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, relative to the range of the reference.

    Example:
        >>> round(psnr(torch.tensor([[0.0, 0.9]]), torch.tensor([[0.0, 1.0]])), 2)
        23.01
    """
    extent = _pair(image, reference)
    error = (image - reference).square().mean()
    return float(10 * torch.log10(extent**2 / error))


def ssim(image: Tensor, reference: Tensor) -> float:
    """Structural similarity of two images (H, W) in windows of 7 × 7, relative to the range of the reference.

    Reference: Wang et al. 2004, with uniform windows and sample variances, as scikit-image's default.
    """
    extent = _pair(image, reference)
    check(reference.dim() == 2 and min(reference.shape) >= 7, "reference", tuple(reference.shape), "give (H, W) >= 7")

    def mean(t: Tensor) -> Tensor:
        return F.avg_pool2d(t[None, None], 7, 1)[0, 0]

    a, b = image.double(), reference.double()
    ma, mb, sample = mean(a), mean(b), 49 / 48
    va, vb, both = ((mean(s * t) - m * n) * sample for s, t, m, n in ((a, a, ma, ma), (b, b, mb, mb), (a, b, ma, mb)))
    c1, c2 = (0.01 * extent) ** 2, (0.03 * extent) ** 2
    found = (2 * ma * mb + c1) * (2 * both + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    return float(found.mean())
