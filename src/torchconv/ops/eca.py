"""Efficient channel attention: every channel is gated by its own mean and those of its neighbours.

Wang, Wu, Zhu, Li, Zuo, Hu 2019, "ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks",
arXiv 1910.03151 (CVPR 2020).

With y the mean over space and p = (k − 1)/2:

    z_c = Σ_j a_j · y_{c+j−p},   out = x · σ(z)

k parameters, shared by all channels; k·C multiply-adds an image for the gate, one pass over the map for the mean and
one for the scaling. The gate depends on the input, so it cannot be folded into a convolution.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive
from torchconv.catalog import part
from torchconv.ops._common import Padding, Size
from torchconv.ops.plain import PlainConv1d, PlainConv2d, PlainConv3d

VARIANTS = ("shared", "per_channel", "circular")
GATES = ("none", "diagonal", "block", "full")


def adaptive_kernel_size(channels: int, gamma: float = 2, beta: float = 1, minimum: int = 3) -> int:
    """Size of the channel kernel for a number of channels: the odd integer nearest to (log2 C + beta) / gamma.

    t = ⌊|(log2 C + beta) / gamma|⌋; k = t where t is odd, else t + 1 (ties go up: 128 channels give 5).

    Args:
        channels: C ≥ 1.
        gamma, beta: the paper's constants, gamma ≠ 0.
        minimum: least size returned, odd; 3 as in timm, 1 for the paper's formula alone.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> [adaptive_kernel_size(c) for c in (16, 64, 128, 512, 2048)]
        [3, 3, 5, 5, 7]

    Reference: arXiv 1910.03151, equation (12).
    """
    check_positive("channels", channels)
    check(gamma != 0, "gamma", gamma, "must not be 0")
    check_positive("minimum", minimum)
    check(minimum % 2 == 1, "minimum", minimum, "must be odd")
    t = int(abs((math.log2(channels) + beta) / gamma))
    return max(t if t % 2 else t + 1, minimum)


def channel_means(x: Tensor) -> Tensor:
    """Mean over all axes after the second: (N, C, \\*spatial) → (N, C); a tensor (N, C) is returned as it is."""
    return x.mean(tuple(range(2, x.dim()))) if x.dim() > 2 else x


def eca_logits(y: Tensor, weight: Tensor, circular: bool = False) -> Tensor:
    """The channel convolution on means: z_c = Σ_j a_j · y_{c+j−p}, k·C multiply-adds a row.

    Args:
        y: (N, C) channel means.
        weight: (1, 1, k) taps shared by all channels, or (C, 1, k) taps of each channel; k odd.
        circular: channel indices modulo C instead of zeros outside; needs (k − 1)/2 ≤ C.

    Shape:
        (N, C) → (N, C).

    Raises:
        ValueError: ``weight`` fits neither form, k is even, or too large for the circular form.
    """
    channels = y.shape[1]
    fits = weight.dim() == 3 and weight.shape[0] in (1, channels) and weight.shape[1] == 1
    check(fits, "weight", tuple(weight.shape), f"expected (1, 1, k) or ({channels}, 1, k)")
    rows, _, k = weight.shape
    check(k % 2 == 1, "kernel_size", k, "the channel kernel needs a centre: use an odd size")
    p = (k - 1) // 2
    check(
        not circular or p <= channels,
        "kernel_size",
        k,
        f"circular over {channels} channels: at most {2 * channels + 1}",
    )
    if rows == 1 and not circular:
        return F.conv1d(y.unsqueeze(1), weight, padding=p).squeeze(1)
    padded = F.pad(y.unsqueeze(1), (p, p), mode="circular" if circular else "constant")
    if rows == 1:
        return F.conv1d(padded, weight).squeeze(1)
    return (padded.squeeze(1).unfold(1, k, 1) * weight.squeeze(1)).sum(-1)


def eca_gate(x: Tensor, weight: Tensor, circular: bool = False, residual: Tensor | None = None) -> Tensor:
    """Efficient channel attention: x · σ(z), z the channel convolution of the means of x.

    Args:
        x: (N, C, \\*spatial), any number of spatial axes, also none.
        weight, circular: as in :func:`eca_logits`.
        residual: added to the result in the same pass over the map, shape of ``x``.

    Shape:
        (N, C, \\*spatial) → the same.

    Raises:
        ValueError: as :func:`eca_logits`.

    Example:
        >>> eca_gate(torch.ones(1, 2, 2), torch.zeros(1, 1, 3))
        tensor([[[0.5000, 0.5000],
                 [0.5000, 0.5000]]])

    Reference: arXiv 1910.03151, equations (5) to (9).
    """
    return _scale(x, torch.sigmoid(eca_logits(channel_means(x), weight, circular)), residual)


def _scale(x: Tensor, gates: Tensor, residual: Tensor | None = None) -> Tensor:
    gates = gates.reshape(*gates.shape, *[1] * (x.dim() - 2)).to(x.dtype)
    return x * gates if residual is None else torch.addcmul(residual, x, gates)


def _check_map(x: Tensor, channels: int) -> None:
    if x.dim() < 2 or x.shape[1] != channels:
        raise ValueError(f"x of shape {tuple(x.shape)}: expected (N, {channels}, *spatial)")
    if not x.is_floating_point():
        raise ValueError(f"x of dtype {x.dtype}: means and gates are real numbers, convert it to a floating dtype")


@part(
    "eca-gate",
    paper="eca",
    kind="layer",
    dims=(1, 2, 3),
    probe={"build": {"channels": 8}, "inputs": [[2, 8, 5, 4]]},
    keywords="efficient channel attention squeeze excitation gate adaptive kernel",
)
class ECA(nn.Module):
    """Efficient channel attention: scales each channel by a gate from the means of the channels around it.

    z_c = Σ_j a_j · mean(x)_{c+j−p}, out = x · σ(z). k parameters (k·C for "per_channel"). The only parameter is
    ``conv.weight`` of shape (1, 1, k) or (C, 1, k), as in the authors' and timm's checkpoints.

    Channels have an order here: after pruning, shuffling or re-ordering channels the gate is another one.

    Args:
        channels: C ≥ 1.
        kernel_size: odd k ≥ 1; None for :func:`adaptive_kernel_size` of C.
        gamma, beta, minimum: its constants.
        variant: "shared", the paper's; "per_channel", own taps for each channel (ECA-NS); "circular", channel indices
            modulo C (timm's CecaModule), needs (k − 1)/2 ≤ C.

    Shape:
        (N, C, \\*spatial) → the same; any number of spatial axes.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> gate = ECA(256)
        >>> gate.kernel_size, gate(torch.zeros(2, 256, 7, 7)).shape
        (5, torch.Size([2, 256, 7, 7]))

    Reference: arXiv 1910.03151, section 3.2.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | None = None,
        gamma: float = 2,
        beta: float = 1,
        minimum: int = 3,
        *,
        variant: str = "shared",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_positive("channels", channels)
        check_choice("variant", variant, VARIANTS)
        if kernel_size is None:
            kernel_size = adaptive_kernel_size(channels, gamma, beta, minimum)
        check_positive("kernel_size", kernel_size)
        check(kernel_size % 2 == 1, "kernel_size", kernel_size, "the channel kernel needs a centre: use an odd size")
        p = (kernel_size - 1) // 2
        fits = variant != "circular" or p <= channels
        check(fits, "kernel_size", kernel_size, f"circular over {channels} channels: at most {2 * channels + 1}")
        self.channels, self.kernel_size, self.variant = channels, kernel_size, variant
        rows = channels if variant == "per_channel" else 1
        # Holds the taps under the official name; the computation is eca_logits.
        self.conv = nn.Conv1d(rows, rows, kernel_size, groups=rows, bias=False, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """``nn.Conv1d``'s default: uniform in ±1/√k."""
        self.conv.reset_parameters()

    def gates(self, x: Tensor) -> Tensor:
        """The gates alone, (N, C), each in (0, 1)."""
        _check_map(x, self.channels)
        return torch.sigmoid(eca_logits(channel_means(x), self.conv.weight, self.variant == "circular"))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Gate ``x``; with ``residual``, add it in the same pass over the map."""
        return _scale(x, self.gates(x), residual)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"{self.channels}, kernel_size={self.kernel_size}, variant={self.variant!r}"


@part(
    "channel-gate",
    paper="eca",
    kind="layer",
    dims=(1, 2, 3),
    probe={"build": {"channels": 8, "form": "block", "groups": 2}, "inputs": [[2, 8, 5, 4]]},
    keywords="channel attention ablation SE-Var squeeze excitation block diagonal full matrix",
)
class ChannelGate(nn.Module):
    """The gates that the paper compares with ECA: out = x · σ(W · mean(x)) with W of a given form.

    "none": no W, σ(mean) (SE-Var1, no parameters); "diagonal": one factor a channel (SE-Var2, C parameters); "block":
    block-diagonal in ``groups`` blocks (C²/groups); "full": a C × C matrix (SE-Var3, C²). No biases.

    Args:
        channels: C ≥ 1.
        form: one of the above.
        groups: blocks of the "block" form, must divide C.

    Shape:
        (N, C, \\*spatial) → the same; any number of spatial axes.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> sum(p.numel() for p in ChannelGate(8, "block", groups=4).parameters())
        16

    Reference: arXiv 1910.03151, section 3.1 and table 1.
    """

    def __init__(
        self, channels: int, form: str = "full", groups: int = 4, *, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        check_positive("channels", channels)
        check_choice("form", form, GATES)
        self.channels, self.form = channels, form
        self.groups = {"none": channels, "diagonal": channels, "full": 1}.get(form, groups)
        check_positive("groups", self.groups)
        check(channels % self.groups == 0, "groups", self.groups, f"must divide channels={channels}")
        options = {"groups": self.groups, "bias": False, "device": device, "dtype": dtype}
        self.conv = None if form == "none" else nn.Conv1d(channels, channels, 1, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Gate ``x``."""
        _check_map(x, self.channels)
        y = channel_means(x)
        z = y if self.conv is None else self.conv(y.unsqueeze(2)).squeeze(2)
        return _scale(x, torch.sigmoid(z))

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"{self.channels}, form={self.form!r}, groups={self.groups}"


@part(
    "eca",
    paper="eca",
    kind="operator",
    dims=(1, 2, 3),
    mixes="space+channels",
    supports=("stride", "channels", "groups", "dilation", "even", "padding"),
    merges="",
    mixer={"kernel_size": 7, "groups": "channels"},
    conv={"kernel_size": 3},
    keywords="efficient channel attention gate convolution squeeze excitation",
)
class ECAConv(nn.Module):
    """A plain convolution followed by efficient channel attention.

    y = conv(x), out = y · σ(z(y)). Costs the convolution, k more parameters and two more passes over the map. There is
    no merged form: the gate depends on the input.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as
            :class:`~torchconv.ops.plain.PlainConv`.
        gate_kernel_size: odd size k of the channel kernel; None for :func:`adaptive_kernel_size` of ``out_channels``.
        variant: "shared", "per_channel" or "circular", as :class:`ECA`.

    Shape:
        (N, in_channels, \\*spatial) → (N, out_channels, \\*spatial').

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> layer = ECAConv2d(3, 64, 3, padding="same", bias=False)
        >>> sum(p.numel() for p in layer.parameters()) - 3 * 64 * 9
        3

    Reference: arXiv 1910.03151, figure 2.
    """

    ndim: ClassVar[int] = 0

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size = 3,
        stride: Size = 1,
        padding: Padding = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        gate_kernel_size: int | None = None,
        variant: str = "shared",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv = _PLAIN[self.ndim](
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, **options
        )
        self.eca = ECA(out_channels, gate_kernel_size, variant=variant, **options)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride = self.conv.kernel_size, self.conv.stride
        self.dilation, self.padding = self.conv.dilation, padding

    def reset_parameters(self) -> None:
        """PyTorch's convolution defaults for both."""
        self.conv.reset_parameters()
        self.eca.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Convolve and gate ``x``."""
        y: Tensor = self.eca(self.conv(x))
        return y


_PLAIN: tuple[Any, ...] = (None, PlainConv1d, PlainConv2d, PlainConv3d)


class ECAConv1d(ECAConv):
    """Convolution with efficient channel attention over (N, C, L)."""

    ndim = 1


class ECAConv2d(ECAConv):
    """Convolution with efficient channel attention over (N, C, H, W)."""

    ndim = 2


class ECAConv3d(ECAConv):
    """Convolution with efficient channel attention over (N, C, D, H, W)."""

    ndim = 3
