"""Parts for crop-stress time series: kernels learned in the Fourier domain, and vegetation indices.

Shi, Han et al. 2023, "A Fast Fourier Convolutional Deep Neural Network For Accurate and Explainable Discrimination Of
Wheat Yellow Rust And Nitrogen Deficiency From Sentinel-2 Time-Series Data", arXiv 2306.17207. No code of the
paper could be found, so that sizes are ours. Capsules are in ``ops.ffdnn_capsules``.

    y = irfft(W ⊙ rfft(x)), W[i, o, f] complex: a circular convolution with irfft(W), O(T log T)

2·C·C'·(⌊T/2⌋ + 1) parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive
from torchconv.catalog import part
from torchconv.kernels.precision import widen
from torchconv.ops._common import check_input


def _complex(weight: Tensor) -> Tensor:
    return torch.view_as_complex(widen(weight).contiguous())


def time_kernel(weight: Tensor, length: int) -> Tensor:
    """The kernel in time, irfft(W): what :func:`fourier_kernel_conv` convolves with.

    Args:
        weight: (…, bins, 2), real and imaginary parts.
        length: T, with ⌊T/2⌋ + 1 bins.

    Shape:
        (…, bins, 2) → (…, length).

    Raises:
        ValueError: another number of bins.

    Example:
        >>> time_kernel(torch.tensor([1.0, 0.0]).expand(3, 2), 4)
        tensor([1., 0., 0., 0.])

    Reference: arXiv 2306.17207.
    """
    bins = length // 2 + 1
    fits = weight.dim() > 1 and tuple(weight.shape[-2:]) == (bins, 2)
    check(fits, "weight", tuple(weight.shape), f"series of {length} steps have the shape (…, {bins}, 2)")
    return torch.fft.irfft(_complex(weight), n=length)


def fourier_kernel_conv(x: Tensor, weight: Tensor) -> Tensor:
    """Circular convolution by a complex weight for every frequency.

    The imaginary part at frequency 0, and at T/2 for even T, has no effect.

    Args:
        x: series of T steps.
        weight: (C_in, C_out, ⌊T/2⌋ + 1, 2), or (C, ⌊T/2⌋ + 1, 2) for one weight a channel.

    Shape:
        (N, C_in, T) → (N, C_out, T). Half precision is computed in float32.

    Raises:
        ValueError: shapes that do not fit, or a series of integers.

    Example:
        >>> gain = torch.tensor([2.0, 0.0]).expand(1, 3, 2)
        >>> fourier_kernel_conv(torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]), gain)
        tensor([[[2., 4., 6., 8.]]])

    Reference: arXiv 2306.17207.
    """
    check(x.is_floating_point(), "x.dtype", x.dtype, "must be floating point; convert it")
    length, bins = x.shape[-1], x.shape[-1] // 2 + 1
    mixing = weight.dim() == 4
    if weight.dim() not in (3, 4) or weight.shape[0] != x.shape[1] or tuple(weight.shape[-2:]) != (bins, 2):
        expected = f"({x.shape[1]}, {bins}, 2) or ({x.shape[1]}, C_out, {bins}, 2) for series of {length} steps"
        raise ValueError(f"weight of shape {tuple(weight.shape)}: expected {expected}")
    if x.shape[0] == 0:  # not every FFT library takes an empty batch
        return x.new_zeros(0, weight.shape[1] if mixing else x.shape[1], length)
    gain = _complex(weight)
    spectrum = torch.fft.rfft(widen(x))
    y = torch.einsum("bif,iof->bof", spectrum, gain) if mixing else spectrum * gain
    return torch.fft.irfft(y, n=length).to(x.dtype)


@part(
    "fourier-kernel",
    paper="ffdnn",
    kind="layer",
    dims=(1,),
    probe={"build": {"in_channels": 3, "out_channels": 4, "length": 12, "band": [1, 5]}, "inputs": [[2, 3, 12]]},
    keywords="Fourier domain kernel circular convolution FNO spectral convolution time series season",
)
class FourierKernelConv1d(nn.Module):
    """Convolution of a series of fixed length whose kernel is learned in the Fourier domain.

    Args:
        in_channels: C_in.
        out_channels: C_out; unset is C_in.
        length: T, steps of a series.
        depthwise: one kernel a channel; channels do not mix.
        band: (first, last) frequencies that pass, both included, in cycles a series; None for all.

    Shape:
        (N, in_channels, length) → (N, out_channels, length). The end of the series joins its start: pad where it must
        not.

    Raises:
        ValueError: an argument is out of range, or series of another length.

    Example:
        >>> FourierKernelConv1d(2, 16, length=24)(torch.zeros(5, 2, 24)).shape
        torch.Size([5, 16, 24])

    Reference: arXiv 2306.17207.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        length: int = 24,
        depthwise: bool = False,
        band: tuple[int, int] | None = None,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        check_positive("in_channels", in_channels)
        check_positive("out_channels", out_channels)
        check_positive("length", length)
        fits = not depthwise or out_channels == in_channels
        check(fits, "out_channels", out_channels, f"a depthwise kernel keeps the {in_channels} channels")
        bins = length // 2 + 1
        first, last = ends = (0, bins - 1) if band is None else tuple(band)[:2] if len(band) == 2 else (0, -1)
        ok = all(isinstance(end, int) for end in ends) and 0 <= first <= last < bins
        check(ok, "band", band, f"must be two of the frequencies 0 to {bins - 1} of {length} steps, first and last")
        self.in_channels, self.out_channels, self.length, self.depthwise = in_channels, out_channels, length, depthwise
        self.first, self.last = first, last
        channels = (in_channels,) if depthwise else (in_channels, out_channels)
        self.weight_ri = nn.Parameter(torch.empty(*channels, last - first + 1, 2, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal, so that white noise in gives noise of the same variance."""
        nn.init.normal_(self.weight_ri, std=(0.5 / (1 if self.depthwise else self.in_channels)) ** 0.5)

    def weight(self) -> Tensor:
        """The weights of all frequencies, zero outside the band: (…, ⌊length/2⌋ + 1, 2)."""
        return F.pad(self.weight_ri, (0, 0, self.first, self.length // 2 - self.last))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x``."""
        check_input(x, self.in_channels, 1)
        if x.shape[-1] != self.length:
            raise ValueError(f"x of shape {tuple(x.shape)}: kernels are for series of {self.length} steps; resample it")
        return fourier_kernel_conv(x, self.weight())

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        band = (self.first, self.last)
        return f"{self.in_channels}, {self.out_channels}, {self.length}, depthwise={self.depthwise}, band={band}"


SENTINEL2: dict[str, str] = {"green": "B3", "red": "B4", "edge": "B5", "nir": "B8", "narrow_nir": "B8A"}
INDICES = ("ndvi", "wdvi", "lai_clair", "tcari", "osavi", "tcari_osavi")


def vegetation_index(
    name: str,
    bands: Mapping[str, Tensor],
    band_map: Mapping[str, str] | None = None,
    *,
    soil_slope: float = 1.0,
    clair_alpha: float = 0.4,
    wdvi_inf: float = 0.65,
    clip: float = 1e-6,
) -> Tensor:
    """A vegetation index from reflectances.

    | name | definition |
    |------|------------|
    | ndvi | (nir − red)/(nir + red) |
    | wdvi | narrow_nir − soil_slope · red: 0 on bare soil |
    | lai_clair | −ln(max(clip, 1 − wdvi/wdvi_inf))/clair_alpha: leaf area |
    | tcari | 3·[(edge − red) − 0.2·(edge − green)·edge/red] |
    | osavi | 1.16·(nir − red)/(nir + red + 0.16) |
    | tcari_osavi | tcari/osavi: chlorophyll |

    Args:
        name: of the index.
        bands: reflectances in 0 to 1 by band name, of one shape. Clouds and shadows make red vanish: clamp it first.
        band_map: band name of "green", "red", "edge" (700 nm), "nir", "narrow_nir"; Sentinel-2's B3, B4, B5, B8, B8A
            unless given.
        soil_slope: of the soil line, near infrared over red; a constant of the scene.
        clair_alpha, wdvi_inf: of the leaf area: extinction, and WDVI of a closed canopy.
        clip: smallest argument of the logarithm.

    Returns:
        The index, of the bands' shape.

    Raises:
        ValueError: an unknown index, an unknown name in ``band_map``, or a band that is missing.

    Example:
        >>> bands = {"B4": torch.tensor([0.1]), "B8": torch.tensor([0.3])}
        >>> vegetation_index("ndvi", bands)
        tensor([0.5000])

    Reference: Clevers 1989 (WDVI, CLAIR), Haboudane 2002 (TCARI), Rondeaux 1996 (OSAVI); used in arXiv 2306.17207.
    """
    check_choice("name", name, INDICES)
    for role in band_map or ():
        check_choice("band_map", role, SENTINEL2)
    places = {**SENTINEL2, **(band_map or {})}

    def band(role: str) -> Tensor:
        if places[role] not in bands:
            raise ValueError(f"bands={sorted(bands)}: {name} needs {places[role]} ({role}); give it or a band_map")
        return bands[places[role]]

    def index(other: str) -> Tensor:
        options: dict[str, float] = {"soil_slope": soil_slope, "clair_alpha": clair_alpha, "wdvi_inf": wdvi_inf}
        return vegetation_index(other, bands, band_map, **options, clip=clip)

    if name == "ndvi":
        return (band("nir") - band("red")) / (band("nir") + band("red"))
    if name == "wdvi":
        return band("narrow_nir") - soil_slope * band("red")
    if name == "lai_clair":
        return -torch.log((1 - index("wdvi") / wdvi_inf).clamp(min=clip)) / clair_alpha
    if name == "tcari":
        edge, red = band("edge"), band("red")
        return 3 * ((edge - red) - 0.2 * (edge - band("green")) * edge / red)
    if name == "osavi":
        return 1.16 * (band("nir") - band("red")) / (band("nir") + band("red") + 0.16)
    return index("tcari") / index("osavi")
