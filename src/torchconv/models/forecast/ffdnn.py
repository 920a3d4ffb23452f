"""FFDNN: Fourier kernels beside local ones, then capsules, on series of vegetation indices.

Shi, Han et al. 2023, "A Fast Fourier Convolutional Deep Neural Network For Accurate and Explainable Discrimination Of
Wheat Yellow Rust And Nitrogen Deficiency From Sentinel-2 Time-Series Data", arXiv 2306.17207.

    h = relu(bn([irfft(W ⊙ rfft(x)); conv₃(x)]))          both of C channels
    u_t = squash(linear(h_t));  v = routing(u);  score of class k = |v_k|

5,880 parameters for 24 dates, two indices and three classes, of which the routing holds 4,608. Principle and parts are
the paper's; no code of it could be found, so that widths, capsules and the order of the layers are ours.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive
from torchconv.catalog import part
from torchconv.models._registry import register_model
from torchconv.ops._common import check_input
from torchconv.ops.ffdnn_capsules import CapsuleEncoder
from torchconv.ops.ffdnn_series import FourierKernelConv1d
from torchconv.ops.ffdnn_spectral import FourierUnit

KERNELS = ("fourier", "unit")
MODES = ("zeros", "reflect", "replicate")


@part(
    "fourier-local-block",
    paper="ffdnn",
    kind="layer",
    dims=(1,),
    probe={"build": {"in_channels": 3, "width": 4, "length": 9, "padding": 2}, "inputs": [[2, 3, 9]]},
    keywords="Fourier domain kernel and local convolution side by side time series",
)
class FourierLocalBlock(nn.Module):
    """A branch that sees the whole series and one that sees a few steps, batch norm, ReLU.

    Args:
        in_channels: of the series.
        width: channels C of each branch.
        length: steps T.
        kernel: "fourier", a complex weight for each frequency and pair of channels; or "unit", one 1 × 1 convolution,
            batch norm and ReLU on the spectrum (:class:`~torchconv.ops.ffdnn_spectral.FourierUnit`).
        local_size: steps that the local branch sees, odd.
        band: (first, last) frequencies that pass the Fourier kernel, in cycles a (padded) series; None for all.
        padding: steps added to both ends of the series before the transform and cut off after it, so that the end of a
            season does not join its start. 0 keeps the convolution circular.
        padding_mode: "zeros", "reflect" or "replicate".

    Shape:
        (N, in_channels, length) → (N, 2·width, length).

    Raises:
        ValueError: an argument is out of range, or series of another length.

    Example:
        >>> FourierLocalBlock(2, 16, 24)(torch.zeros(5, 2, 24)).shape
        torch.Size([5, 32, 24])

    Reference: arXiv 2306.17207.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        length: int,
        kernel: str = "fourier",
        local_size: int = 3,
        band: tuple[int, int] | None = None,
        padding: int = 0,
        padding_mode: str = "zeros",
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_positive("in_channels", in_channels)
        check_positive("width", width)
        check_positive("length", length)
        check_choice("kernel", kernel, KERNELS)
        check_positive("local_size", local_size)
        check(local_size % 2 == 1, "local_size", local_size, "must be odd, so that it has a centre")
        check_positive("padding", padding, zero=True)
        check_choice("padding_mode", padding_mode, MODES)
        fits = padding_mode != "reflect" or padding < length
        check(fits, "padding", padding, f"reflects no more than the {length - 1} steps that there are")
        check(band is None or kernel == "fourier", "band", band, "only Fourier kernels have one; take kernel='fourier'")
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_channels, self.length, self.padding = in_channels, length, padding
        self.padding_mode = "constant" if padding_mode == "zeros" else padding_mode
        self.fourier: FourierKernelConv1d | FourierUnit
        if kernel == "fourier":
            self.fourier = FourierKernelConv1d(in_channels, width, length + 2 * padding, band=band, **options)
        else:
            self.fourier = FourierUnit(in_channels, width, ndim=1, **options)
        self.local = nn.Conv1d(in_channels, width, local_size, padding=local_size // 2, **options)
        self.norm = nn.BatchNorm1d(2 * width, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        check_input(x, self.in_channels, 1)
        if x.shape[-1] != self.length:
            raise ValueError(f"x of shape {tuple(x.shape)}: this block is for {self.length} steps; resample the series")
        padded = F.pad(x, (self.padding, self.padding), mode=self.padding_mode) if self.padding else x
        far = self.fourier(padded)[..., self.padding : self.padding + self.length]
        y: Tensor = F.relu(self.norm(torch.cat([far, self.local(x)], 1)))
        return y


class Explanation(NamedTuple):
    """Why a network decided as it did.

    Attributes:
        scores: (N, classes), lengths of the class capsules.
        capsules: (N, classes, dim), the class capsules.
        coupling: (N, T, classes), how each date shares itself out among the classes; sums to 1 over classes.
        dates: (N, T), lengths of the capsules of the dates: how much a date has to say.
        spectrum: (indices, C, frequencies), size of the first block's Fourier kernels at each frequency, cycles a
            series; None with ``kernel="unit"``.
    """

    scores: Tensor
    capsules: Tensor
    coupling: Tensor
    dates: Tensor
    spectrum: Tensor | None


@part(
    "ffdnn-net",
    paper="ffdnn",
    kind="model",
    dims=(1,),
    keywords="time series classifier explainable capsule Fourier crop stress wheat rust nitrogen Sentinel-2",
)
class FFDNN(nn.Module):
    """Classes of short series, told apart by Fourier kernels, local kernels and capsules.

    Args:
        in_chans: indices of a series.
        length: dates T.
        num_classes: classes.
        width: channels C of both branches of a block.
        depth: blocks.
        kernel, local_size, band, padding, padding_mode: of the blocks, see :class:`FourierLocalBlock`.
        primary, dim: numbers in the capsule of a date and of a class.
        iterations: of the routing.

    Shape:
        (N, in_chans, length) → (N, num_classes), in [0, 1): train them with
        :class:`~torchconv.ops.ffdnn_capsules.MarginLoss`.

    Raises:
        ValueError: an argument is out of range, or series of another length.

    Example:
        >>> FFDNN()(torch.zeros(5, 2, 24)).shape
        torch.Size([5, 3])

    Reference: arXiv 2306.17207.
    """

    def __init__(
        self,
        in_chans: int = 2,
        length: int = 24,
        num_classes: int = 3,
        *,
        width: int = 16,
        depth: int = 1,
        kernel: str = "fourier",
        local_size: int = 3,
        band: tuple[int, int] | None = None,
        padding: int = 0,
        padding_mode: str = "zeros",
        primary: int = 8,
        dim: int = 8,
        iterations: int = 3,
    ) -> None:
        super().__init__()
        check_positive("in_chans", in_chans)
        check_positive("num_classes", num_classes)
        check_positive("depth", depth)
        self.in_chans, self.length, self.num_classes = in_chans, length, num_classes
        inputs = (in_chans, *[2 * width] * (depth - 1))
        self.blocks = nn.Sequential(
            *(
                FourierLocalBlock(channels, width, length, kernel, local_size, band, padding, padding_mode)
                for channels in inputs
            )
        )
        self.capsules = CapsuleEncoder(2 * width, length, num_classes, primary, dim, iterations)

    def forward_features(self, x: Tensor) -> Tensor:
        """What the blocks see at each date, (N, 2·width, length)."""
        y: Tensor = self.blocks(x)
        return y

    def forward(self, x: Tensor) -> Tensor:
        """Lengths of the class capsules."""
        v, _ = self.capsules(self.forward_features(x))
        y: Tensor = v.norm(dim=2)
        return y

    def explain(self, x: Tensor) -> Explanation:
        """The scores, and which dates and frequencies they come from."""
        h = self.forward_features(x)
        v, coupling = self.capsules(h)
        first = self.blocks[0].get_submodule("fourier")
        weights = first.weight() if isinstance(first, FourierKernelConv1d) else None
        return Explanation(
            scores=v.norm(dim=2),
            capsules=v,
            coupling=coupling,
            dates=self.capsules.primary_capsules(h).norm(dim=2),
            spectrum=None if weights is None else weights.norm(dim=-1),
        )


@register_model("ffdnn")
def ffdnn_small(**options: Any) -> FFDNN:
    """FFDNN of 16 + 16 channels and capsules of 8 numbers; 5,880 parameters for 24 dates of two indices."""
    return FFDNN(**options)
