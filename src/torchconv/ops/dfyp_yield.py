"""What stands around DFYP's operators: histograms of bands, convolution blocks, and a Gaussian process on features.

Zhang, Yan, Zhang, Miao, Wang 2025, "DFYP: A Dynamic Fusion Framework with Spectral Channel Attention and Adaptive
Operator Learning for Crop Yield Prediction", arXiv 2507.05849. Histograms and the Gaussian process are those of You,
Li, Low, Lobell, Ermon 2017, "Deep Gaussian Process for Crop Yield Prediction Based on Remote Sensing Data", AAAI.

A region's pixels are taken to be exchangeable: their histogram, by band and date, is all that the network sees.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_positive
from torchconv.catalog import part
from torchconv.ops._common import Size, check_input, conv_nd, fold_bn, ntuple

_PIECE = 1 << 20  # numbers that the histograms look at in one go: bounds the memory that they take


def histogram_features(image: Tensor, bands: int, bins: int = 32, largest: float = 4999.0) -> Tensor:
    """Histograms of the pixels of a region, by band and date, each with sum 1 (or 0 where no pixel counts).

    Args:
        image: channels are date · bands + band; masked pixels are 0.
        bands: bands at each date.
        bins: equal bins from 1 to ``largest``, the last one closed; smaller and larger values are dropped.
        largest: end of the last bin.

    Shape:
        (H, W, dates · bands) → (bands, dates, bins), float64.

    Raises:
        ValueError: channels that are no multiple of ``bands``, or ``largest`` of 1 or less.

    Example:
        >>> histogram_features(torch.tensor([[[0.0], [1.0], [4.0], [5.0]]]), 1, 2, 5)
        tensor([[[0.3333, 0.6667]]], dtype=torch.float64)

    Reference: You et al. 2017; arXiv 2507.05849.
    """
    check_positive("bands", bands)
    check_positive("bins", bins)
    check(largest > 1, "largest", largest, "must lie above 1, where the first bin starts")
    channels = image.shape[-1]
    check(channels > 0 and channels % bands == 0, "bands", bands, f"must divide the {channels} channels of the image")
    # Rounded as NumPy rounds them: a pixel on an edge must not change its bin.
    steps = torch.arange(bins + 1, dtype=torch.float64, device=image.device)
    edges = torch.where(steps == bins, largest, steps * ((largest - 1) / bins) + 1)
    edges[-1] = torch.nextafter(edges[-1], edges.new_tensor(torch.inf))  # closes the last bin
    column = torch.arange(channels, device=image.device)
    counts = torch.zeros((bins + 2) * channels, dtype=torch.long, device=image.device)
    for pixels in image.reshape(-1, channels).split(max(1, _PIECE // channels)):
        place = torch.bucketize(pixels.double(), edges, right=True)  # 0 and bins + 1 are below and above
        counts += torch.bincount((place * channels + column).flatten(), minlength=len(counts))
    inside = counts.reshape(bins + 2, channels)[1:-1].double()
    shares = inside / inside.sum(0).clamp(min=1)
    return shares.reshape(bins, -1, bands).permute(2, 1, 0).contiguous()


def gaussian_process(
    train: tuple[Tensor, Tensor, Tensor, Tensor],
    test: tuple[Tensor, Tensor, Tensor],
    weight: Tensor,
    bias: Tensor,
    *,
    sigma: float = 1.0,
    r_loc: float = 0.5,
    r_year: float = 1.5,
    sigma_e: float = 0.32,
    sigma_b: float = 0.01,
) -> Tensor:
    """Predictions of a linear model on features whose residuals are correlated in space and time.

    Mean H·β with the prior β ~ N([weight; bias], sigma_b · I), H the features and a column of ones; covariance
    sigma² · exp(−|Δloc|²/r_loc² − Δyear²/r_year²), and sigma_e² on the diagonal. Places and years are first centred and
    divided by their range over both sets.

    Args:
        train: features (n, d), places (n, p), years (n,), yields (n,).
        test: features (m, d), places (m, p), years (m,).
        weight, bias: (1, d) and (1,), the last layer of the network.
        sigma, r_loc, r_year, sigma_e, sigma_b: see above.

    Returns:
        Predictions (m, 1).

    Reference: You et al. 2017; Rasmussen and Williams 2006, equation 2.41.
    """
    features, places, years, yields = train
    features_test, places_test, years_test = test
    n = len(features)

    def scaled(a: Tensor, b: Tensor, reach: float) -> Tensor:
        both = torch.cat([a, b]).reshape(len(a) + len(b), -1).to(features.dtype)  # years may be integers
        span = both.amax(0) - both.amin(0)
        return (both - both.mean(0)) / torch.where(span > 0, span, 1) / reach

    at = torch.cat([scaled(places, places_test, r_loc), scaled(years, years_test, r_year)], 1)
    # Exact differences: the quicker way by products loses the digits that near places differ in.
    covariance = sigma**2 * torch.exp(-torch.cdist(at, at[:n], compute_mode="donot_use_mm_for_euclid_dist").square())
    noisy = covariance[:n] + sigma_e**2 * torch.eye(n, dtype=at.dtype, device=at.device)
    factor = torch.linalg.cholesky(noisy)
    design, design_test = (F.pad(h, (0, 1), value=1.0) for h in (features, features_test))
    prior = torch.cat([weight.reshape(-1, 1), bias.reshape(1, 1)])
    y = yields.reshape(-1, 1)
    solved = torch.cholesky_solve(torch.cat([design, y], 1), factor)
    precision = torch.eye(len(prior), dtype=at.dtype, device=at.device) / sigma_b
    beta = torch.linalg.solve(precision + design.T @ solved[:, :-1], design.T @ solved[:, -1:] + precision @ prior)
    return design_test @ beta + covariance[n:] @ torch.cholesky_solve(y - design @ beta, factor)


def pad_same_tf(x: Tensor, kernel_size: Size, stride: Size = 1) -> Tensor:
    """Zeros around a map for an output of ⌈L/stride⌉, as TensorFlow counts them: as few as needed, the odd one after.

    Unlike "same" elsewhere in this library the padding depends on the size of the map, and with a stride the taps stand
    elsewhere.

    Args:
        x: a map (N, C, \\*spatial).
        kernel_size, stride: of the convolution that follows.

    Returns:
        The map, larger by max(0, (⌈L/s⌉ − 1)·s + k − L) along each axis.

    Example:
        >>> pad_same_tf(torch.ones(1, 1, 4), 3, 2)
        tensor([[[1., 1., 1., 1., 0.]]])

    Reference: arXiv 2507.05849.
    """
    ndim = x.dim() - 2
    amounts: list[int] = []
    sizes, steps = ntuple("kernel_size", kernel_size, ndim), ntuple("stride", stride, ndim)
    for length, k, s in zip(reversed(x.shape[2:]), reversed(sizes), reversed(steps), strict=True):
        total = max(0, (-(-length // s) - 1) * s + k - length)
        amounts += [total // 2, total - total // 2]
    return F.pad(x, amounts) if any(amounts) else x


@part(
    "dfyp-conv-block",
    paper="dfyp",
    kind="layer",
    dims=(2,),
    merges="self",
    probe={"build": {"in_channels": 3, "out_channels": 5, "stride": 2}, "inputs": [[2, 3, 8, 7]]},
    keywords="convolution block TensorFlow same padding batch norm dropout",
)
class ConvBlock(nn.Module):
    """Convolution with TensorFlow's "same" padding, batch norm, ReLU, dropout.

    Args:
        in_channels, out_channels, kernel_size, stride: of the convolution, which has a bias.
        dropout: rate; the published network has 0.5.

    Shape:
        (N, in_channels, H, W) → (N, out_channels, ⌈H/stride⌉, ⌈W/stride⌉).

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> ConvBlock(9, 16, stride=2)(torch.zeros(2, 9, 7, 32)).shape
        torch.Size([2, 16, 4, 16])

    Reference: arXiv 2507.05849, after You et al. 2017.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size = 3,
        stride: Size = 1,
        dropout: float = 0.5,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_positive("in_channels", in_channels)
        check_positive("out_channels", out_channels)
        check(0 <= dropout < 1, "dropout", dropout, "must be at least 0 and below 1")
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        size: Any = ntuple("kernel_size", kernel_size, 2)
        steps: Any = ntuple("stride", stride, 2)
        self.conv = nn.Conv2d(in_channels, out_channels, size, steps, **options)
        self.batchnorm = nn.BatchNorm2d(out_channels, **options)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He's uniform start, zero bias."""
        nn.init.kaiming_uniform_(self.conv.weight)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        conv = self.conv
        check_input(x, conv.in_channels, 2)
        y = conv_nd(pad_same_tf(x, conv.kernel_size, conv.stride), conv.weight, conv.bias, conv.stride)
        z: Tensor = self.dropout(F.relu(self.batchnorm(y)))
        return z

    def merge(self) -> ConvBlock:
        """The same block with its batch norm folded into its convolution, for inference."""
        twin = copy.deepcopy(self).eval()
        if isinstance(self.batchnorm, nn.Identity):  # folded before
            return twin
        weight, bias = fold_bn(self.conv.weight, self.conv.bias, self.batchnorm)
        twin.conv.load_state_dict({"weight": weight, "bias": bias})
        twin.batchnorm = nn.Identity()  # type: ignore[assignment]
        return twin
