"""Atrous convolution and its pyramid: several fields of view at the price of small kernels.

Chen, Papandreou, Kokkinos, Murphy, Yuille 2016, "DeepLab: Semantic Image Segmentation with Deep Convolutional Nets,
Atrous Convolution, and Fully Connected CRFs", arXiv 1606.00915.

    y[i] = Σ_t W[t] · x[i + r·(t − c)]                        taps r apart, c the centre: extent r·(k − 1) + 1
    ASPP(x) = Σ_b (W_b ∗_{r_b} x + b_b)                       one kernel for each rate, all on the same map, summed

B·(k^n·C_in·C_out/g + C_out) parameters with B rates, B·k^n·C_in·C_out/g multiply-adds a position, whatever the rates. A
kernel whose outer taps miss the map from everywhere is computed without them: from rates of the map's size on, with its
centre alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_positive
from torchconv.catalog import part
from torchconv.ops._common import (
    CONV,
    Padding,
    Size,
    check_channels,
    check_input,
    check_same,
    conv_nd,
    dilate_kernel,
    make_conv,
    ntuple,
)


def atrous_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, rate: Size = 1, stride: Size = 1, groups: int = 1
) -> Tensor:
    """Convolution with taps ``rate`` apart, centred, the map's size kept.

    Taps that would only meet the padding are left out, which makes large rates on small maps cheaper.

    Args:
        x: (N, C_in, \\*spatial).
        weight: (C_out, C_in / groups, \\*kernel), any sizes.
        bias: (C_out,) or None.
        rate: ≥ 1, int or one per axis.
        stride: ≥ 1, int or one per axis.
        groups: of the convolution.

    Shape:
        (N, C_in, L, …) → (N, C_out, ⌈L / stride⌉, …).

    Raises:
        ValueError: a rate or stride below 1.

    Example:
        >>> atrous_conv(torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]), torch.ones(1, 1, 3), rate=2)
        tensor([[[4., 6., 4., 6.]]])

    Reference: arXiv 1606.00915, equation (1).
    """
    if x.dim() != weight.dim():
        raise ValueError(f"x of shape {tuple(x.shape)}: expected as many axes as the kernel {tuple(weight.shape)} has")
    rates = ntuple("rate", rate, weight.dim() - 2)
    if not torch.compiler.is_exporting():  # whose sizes may be left open
        weight = _reached(x, weight, rates)
    return conv_nd(x, weight, bias, stride, "same", rates, groups)


def _checked(rates: Sequence[int]) -> tuple[int, ...]:
    """The rates of a pyramid's branches."""
    several = isinstance(rates, Sequence) and len(rates) >= 1
    ok = several and all(isinstance(r, int) and not isinstance(r, bool) and r >= 1 for r in rates)
    check(ok, "rates", rates, "needs at least one integer >= 1, a branch for each")
    return tuple(rates)


def _reached(x: Tensor, weight: Tensor, rates: tuple[int, ...]) -> Tensor:
    """The part of an odd kernel whose taps meet the map from some position."""
    spans: list[Any] = [...]
    for k, rate, length in zip(weight.shape[2:], rates, x.shape[2:], strict=True):
        reach = (k - 1) // 2 if k % 2 == 0 else min((k - 1) // 2, max(0, length - 1) // rate)
        cut = (k - 1) // 2 - reach
        spans.append(slice(cut, k - cut))
    return weight[tuple(spans)]


def aspp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    rates: Sequence[Size],
    stride: Size = 1,
    groups: int = 1,
) -> Tensor:
    """Sum of atrous convolutions of the same map, one for each rate.

    Args:
        x: (N, C_in, \\*spatial).
        weights, biases, rates: one for each branch, see :func:`atrous_conv`.
        stride, groups: of all branches.

    Shape:
        (N, C_in, L, …) → (N, C_out, ⌈L / stride⌉, …).

    Raises:
        ValueError: no branches, or other numbers of weights, biases and rates.

    Reference: arXiv 1606.00915, section 3.2.
    """
    ok = len(weights) == len(biases) == len(rates) >= 1
    check(ok, "rates", tuple(rates), f"give one for each of the {len(weights)} kernels and {len(biases)} biases")
    branches = zip(weights, biases, rates, strict=True)
    outputs = [atrous_conv(x, weight, bias, rate, stride, groups) for weight, bias, rate in branches]
    total = outputs[0]
    for output in outputs[1:]:
        total = total + output
    return total


@part(
    "aspp",
    paper="deeplab",
    kind="operator",
    dims=(1, 2, 3),
    mixes="space+channels",
    supports=("stride", "channels", "groups", "dilation", "even"),
    merges="conv",
    mixer={"kernel_size": 3, "rates": (1, 2, 3), "groups": "channels"},
    conv={"rates": (1, 2, 3)},
    keywords="atrous spatial pyramid pooling dilated parallel rates DeepLab v2 field of view segmentation head",
)
class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: one convolution for each rate on the same map, summed.

    Args:
        in_channels, out_channels: divisible by ``groups``; ``out_channels`` unset is ``in_channels``.
        kernel_size: of every branch, ≥ 1, odd or even.
        stride: ≥ 1.
        padding: "same" only, the branches have different extents.
        dilation: multiplies all rates.
        groups: blocks of channels that do not see each other.
        bias: learn an additive bias in every branch, as published.
        rates: distances of the taps, one for each branch; published: 6, 12, 18, 24.

    Shape:
        (N, in_channels, L, …) → (N, out_channels, ⌈L / stride⌉, …).

    Raises:
        ValueError: an argument is out of range or not supported; the message names it.

    Example:
        >>> head = ASPP2d(16, 21)
        >>> head(torch.zeros(1, 16, 41, 41)).shape, list(dict(head.named_children()))
        (torch.Size([1, 21, 41, 41]), ['c0', 'c1', 'c2', 'c3'])

    Reference: arXiv 1606.00915, section 3.2.
    """

    ndim: ClassVar[int] = 0

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_size: Size = 3,
        stride: Size = 1,
        padding: Padding = "same",
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        rates: Sequence[int] = (6, 12, 18, 24),
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        check_channels(in_channels, out_channels, groups)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = ntuple("kernel_size", kernel_size, self.ndim)
        self.stride = ntuple("stride", stride, self.ndim)
        self.dilation = ntuple("dilation", dilation, self.ndim)
        check_same(padding, self.kernel_size, "the atrous pyramid", self.dilation)
        self.padding, self.rates = "same", _checked(rates)
        options: dict[str, Any] = {"groups": groups, "bias": bias, "device": device, "dtype": dtype}
        for number, rate in enumerate(self._rates()):
            conv = CONV[self.ndim](in_channels, out_channels, self.kernel_size, dilation=rate, **options)
            self.add_module(f"c{number}", conv)

    def _rates(self) -> list[tuple[int, ...]]:
        return [tuple(d * rate for d in self.dilation) for rate in self.rates]

    def _branches(self) -> list[Any]:
        return [self.get_submodule(f"c{number}") for number in range(len(self.rates))]

    def reset_parameters(self) -> None:
        """PyTorch's convolution defaults in every branch."""
        for conv in self._branches():
            conv.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x`` at all rates and add."""
        check_input(x, self.in_channels, self.ndim)
        convs = self._branches()
        return aspp(x, [c.weight for c in convs], [c.bias for c in convs], self._rates(), self.stride, self.groups)

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """One dense ``nn.ConvNd`` of the largest extent, r·(k − 1) + 1, zeros between the taps.

        Far more multiply-adds than the branches; for tools that know plain convolutions only.
        """
        convs = self._branches()
        dense = [dilate_kernel(c.weight, rate) for c, rate in zip(convs, self._rates(), strict=True)]
        extent = [max(w.shape[axis] for w in dense) for axis in range(2, dense[0].dim())]
        weight = torch.stack([_frame(w, extent) for w in dense]).sum(0)
        biases = [c.bias for c in convs if c.bias is not None]
        bias = torch.stack(biases).sum(0) if biases else None
        return make_conv(weight, bias, self.stride, "same", 1, self.groups)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, rates={self.rates}"


def _frame(weight: Tensor, extent: Sequence[int]) -> Tensor:
    """``weight`` in a kernel of size ``extent``, placed as "same" padding places both."""
    pads: list[int] = []
    for size, whole in zip(reversed(weight.shape[2:]), reversed(extent), strict=True):
        before = (whole - 1) // 2 - (size - 1) // 2
        pads += [before, whole - size - before]
    return F.pad(weight, pads)


class ASPP1d(ASPP):
    """Atrous pyramid over (N, C, L)."""

    ndim = 1


class ASPP2d(ASPP):
    """Atrous pyramid over (N, C, H, W)."""

    ndim = 2


class ASPP3d(ASPP):
    """Atrous pyramid over (N, C, D, H, W)."""

    ndim = 3


@part(
    "aspp-head",
    paper="deeplab",
    kind="layer",
    dims=(2,),
    probe={
        "build": {"in_channels": 4, "num_classes": 3, "hidden": 6, "rates": [1, 2]},
        "inputs": [[2, 4, 7, 6]],
    },
    keywords="DeepLab VGG head fc6 fc7 fc8 LargeFOV ASPP-L ASPP-S segmentation",
)
class ASPPHead(nn.Module):
    """DeepLab's head on VGG-16: for each rate an atrous 3 × 3, two 1 × 1 convolutions with ReLU and dropout; summed.

    One rate of 12 is LargeFOV; 6, 12, 18, 24 is ASPP-L, and 2, 4, 8, 12 ASPP-S. Names are ``fc6_1`` to ``fc8_1`` for
    the first branch and so on.

    Args:
        in_channels: of the map.
        num_classes: score maps.
        hidden: channels of the two hidden layers of a branch.
        rates: one for each branch.
        kernel_size: of the atrous convolutions.
        dropout: probability in [0, 1].

    Shape:
        (N, in_channels, H, W) → (N, num_classes, H, W).

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> head = ASPPHead(512, 21)
        >>> sum(p.numel() for p in head.parameters())
        23162964

    Reference: arXiv 1606.00915, section 3.2 and figure 7.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        hidden: int = 1024,
        rates: Sequence[int] = (6, 12, 18, 24),
        kernel_size: Size = 3,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("num_classes", num_classes), ("hidden", hidden)):
            check_positive(name, value)
        check(0 <= dropout <= 1, "dropout", dropout, "is a probability")
        kernel: Any = ntuple("kernel_size", kernel_size, 2)
        self.in_channels, self.rates, self.dropout = in_channels, _checked(rates), dropout
        for number, rate in enumerate(self.rates, 1):
            self.add_module(f"fc6_{number}", nn.Conv2d(in_channels, hidden, kernel, dilation=rate))
            self.add_module(f"fc7_{number}", nn.Conv2d(hidden, hidden, 1))
            self.add_module(f"fc8_{number}", nn.Conv2d(hidden, num_classes, 1))
            last: Any = self.get_submodule(f"fc8_{number}")
            nn.init.normal_(last.weight, 0.0, 0.01)
            nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Score maps."""
        check_input(x, self.in_channels, 2)
        total: Tensor | None = None
        for number, rate in enumerate(self.rates, 1):
            first: Any = self.get_submodule(f"fc6_{number}")
            y = F.dropout(F.relu(atrous_conv(x, first.weight, first.bias, rate)), self.dropout, self.training)
            y = F.dropout(F.relu(self.get_submodule(f"fc7_{number}")(y)), self.dropout, self.training)
            y = self.get_submodule(f"fc8_{number}")(y)
            total = y if total is None else total + y
        assert total is not None
        return total
