"""InceptionNeXt's depthwise convolution: most channels pass, a few meet a small square and long bands.

Yu, Zhou, Yan, Wang 2023, "InceptionNeXt: When Inception Meets ConvNeXt", arXiv 2303.16900 (CVPR 2024).

A large depthwise kernel costs few multiplications but reads and writes the whole map. Here g = ⌊C·ratio⌋ channels a
branch are convolved and the others copied. In two dimensions, with the channels in the order identity (C − 3g),
square, band along the width, band along the height:

    y = concat(x_id, x_hw ∗ K[k_s × k_s], x_w ∗ K[1 × k_b], x_h ∗ K[k_b × 1])

Cost in n dimensions: g·(k_s^n + n·k_b + n + 1) parameters with biases, g·(k_s^n + n·k_b) multiply-adds an output
position: 3.9 a channel with the defaults in two dimensions, where a 7 × 7 depthwise kernel has 49.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check
from torchconv.catalog import part
from torchconv.kernels import inception_conv
from torchconv.ops._common import (
    CONV,
    Padding,
    Size,
    check_depthwise,
    check_input,
    check_same,
    check_unit,
    dilate_kernel,
    make_conv,
    ntuple,
)


def inception_depthwise(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    dilation: Size = 1,
    inplace: bool = False,
    *,
    backend: str = "auto",
) -> Tensor:
    """Depthwise kernels of several shapes on the last channels, the identity on the ones before.

    y[:, :C−Σg_i] = x[:, :C−Σg_i]; the next g_1 channels are convolved with ``weights[0]``, and so on. The map keeps its
    size ("same" padding per kernel). Π k_i · g_i multiply-adds a position, summed over the kernels.

    Args:
        x: (N, C, \\*spatial).
        weights: kernels of shape (g_i, 1, \\*k_i), any sizes, Σ g_i ≤ C. InceptionNeXt in 2-D: (g, 1, k_s, k_s),
            (g, 1, 1, k_b), (g, 1, k_b, 1).
        biases: (g_i,) or None for each kernel; None for no biases at all.
        dilation: distance of the taps, int or one per axis; has no effect on axes where a kernel has one tap.
        inplace: where no gradient is recorded, overwrite the convolved channels of ``x`` and return ``x``: the identity
            channels are then neither read nor written. Ignored while gradients are recorded.
        backend: "auto" computes the layer in one launch on a GPU, "triton" insists on that, "native" never does.

    Shape:
        (N, C, \\*spatial) → the same.

    Raises:
        ValueError: the kernels ask for more channels than ``x`` has, the number of biases differs, or ``backend`` is
            unknown or cannot take ``x``.

    Example:
        >>> x = torch.arange(12.0).reshape(1, 3, 2, 2)
        >>> inception_depthwise(x, [torch.full((1, 1, 1, 1), 2.0)])[0, :, 0, 0]
        tensor([ 0.,  4., 16.])

    Reference: arXiv 2303.16900, equations (2) to (5).
    """
    if not weights:
        return x
    if inplace and not torch.is_grad_enabled():
        widths = [w.shape[0] for w in weights]
        check(sum(widths) <= x.shape[1], "weights", widths, f"they need more channels than the {x.shape[1]} of x")
        tail = x[:, x.shape[1] - sum(widths) :]
        tail.copy_(inception_conv(tail, weights, biases, dilation, backend=backend))
        return x
    return inception_conv(x, weights, biases, dilation, backend=backend)


class _PartialDepthwise(nn.Module):
    """Shared by the operators below: named depthwise convolutions on the last channels, the identity on the others."""

    ndim: ClassVar[int] = 0
    names: tuple[str, ...]
    _like: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None,
        kernel_size: tuple[int, ...],
        stride: Size,
        padding: Padding,
        dilation: Size,
        groups: int | None,
        label: str,
        inplace: bool,
    ) -> None:
        super().__init__()
        check_depthwise(in_channels, out_channels, groups, label)
        check_unit("stride", stride, self.ndim, label, "subsample with a strided convolution or pooling after it")
        self.in_channels = self.out_channels = in_channels
        self.kernel_size = kernel_size
        self.dilation = ntuple("dilation", dilation, self.ndim)
        self.stride, self.padding, self.inplace = (1,) * self.ndim, "same", inplace
        check_same(padding, kernel_size, label, self.dilation)

    def _build(self, width: int, kernels: dict[str, tuple[int, ...]], **options: Any) -> None:
        self.names = tuple(kernels) if width else ()
        options.update(padding="same", dilation=self.dilation, groups=width)
        for name, size in kernels.items():
            self.register_module(name, CONV[self.ndim](width, width, size, **options) if width else None)
        if not width:
            # Without parameters, this remembers device and type for merge().
            like = torch.empty(0, device=options["device"], dtype=options["dtype"])
            self.register_buffer("_like", like, persistent=False)

    def reset_parameters(self) -> None:
        """PyTorch's convolution defaults, each branch for itself."""
        for conv in self._branches():
            conv.reset_parameters()

    def _branches(self) -> list[Any]:
        return [getattr(self, name) for name in self.names]

    def forward(self, x: Tensor) -> Tensor:
        """Convolve the last channels of ``x`` (N, C, \\*spatial), pass the others."""
        check_input(x, self.in_channels, self.ndim)
        branches = self._branches()
        weights, biases = [c.weight for c in branches], [c.bias for c in branches]
        return inception_depthwise(x, weights, biases, self.dilation, self.inplace)

    def merge(self) -> nn.Module:
        """One depthwise ``nn.ConvNd`` that equals this operator: kernels framed by zeros, a centre tap for identity.

        It computes the largest extent on every channel, so it is slower than the operator; use it for tools that know
        plain convolutions only.
        """
        branches = self._branches()
        weights = [c.weight.detach() for c in branches]
        dilation = self.dilation
        sizes = [w.shape[2:] for w in weights]
        if any(k % 2 == 0 for size in sizes for k in size):
            # The centre of an even kernel lies between taps: only tap by tap do kernels of other sizes line up.
            weights = [dilate_kernel(w, dilation) for w in weights]
            dilation = (1,) * self.ndim
        extent = [max((int(w.shape[2 + a]) for w in weights), default=1) for a in range(self.ndim)]
        rest = self.in_channels - sum(int(w.shape[0]) for w in weights)
        like = weights[0] if weights else self._like
        frames = [_frame(w, extent) for w in (like.new_ones(rest, 1, *[1] * self.ndim), *weights)]
        bias = None
        if branches and branches[0].bias is not None:
            bias = torch.cat([like.new_zeros(rest), *(c.bias.detach() for c in branches)])
        return make_conv(torch.cat(frames), bias, 1, "same", dilation, self.in_channels)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"{self.in_channels}, kernel_size={self.kernel_size}, dilation={self.dilation}"


def _frame(weight: Tensor, extent: Sequence[int]) -> Tensor:
    """``weight`` in a kernel of size ``extent``, centres aligned as "same" padding aligns them."""
    pads: list[int] = []
    for size, whole in zip(reversed(weight.shape[2:]), reversed(extent), strict=True):
        before = (whole - 1) // 2 - (size - 1) // 2
        pads += [before, whole - size - before]
    return F.pad(weight, pads)


@part(
    "inceptionnext",
    paper="inceptionnext",
    kind="operator",
    dims=(1, 2, 3),
    mixes="space",
    supports=("dilation", "even"),
    merges="conv",
    mixer={"kernel_size": 11},
    conv={"kernel_size": 11},
    keywords="inception depthwise band kernels partial identity channels memory traffic MetaNeXt token mixer",
)
class InceptionDWConv(_PartialDepthwise):
    """Inception depthwise convolution: a square and one band an axis on a few channels, the identity on the rest.

    y = concat(x_id, square ∗ x_s, band ∗ x_w, band ∗ x_h, …) with g = ⌊C · branch_ratio⌋ channels a branch, in the
    order identity, square, then the bands from the last axis to the first. g·(k_s^n + n·k_b + n + 1) parameters.
    Official names in 2-D: ``dwconv_hw``, ``dwconv_w`` (1 × k_b), ``dwconv_h`` (k_b × 1). In 1-D: ``dwconv_s`` (short),
    ``dwconv_l`` (band); in 3-D: ``dwconv_dhw``, ``dwconv_w``, ``dwconv_h``, ``dwconv_d``.

    Args:
        in_channels: C ≥ 1; ``out_channels`` and ``groups`` are None or C.
        kernel_size: length of the bands k_b ≥ 1, odd or even; int or one per axis.
        stride: 1 only.
        padding: "same" only.
        dilation: distance of the taps ≥ 1, of the square in all axes, of a band along itself; int or one per axis.
        bias: learn an additive bias in the branches.
        square_kernel_size: k_s ≥ 1, odd or even; int or one per axis.
        branch_ratio: share of the channels for each branch, 0 ≤ branch_ratio ≤ 1/(n+1). Where it gives g = 0 the
            operator is the identity map and holds no parameters.
        inplace: overwrite the input where no gradient is recorded, which spares the copy of the identity channels. Only
            for callers that do not need ``x`` afterwards (a residual block does).

    Shape:
        (N, C, \\*spatial) → the same.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> mixer = InceptionDWConv2d(24)
        >>> x = torch.randn(1, 24, 9, 9)
        >>> bool((mixer(x)[:, :15] == x[:, :15]).all()), sum(p.numel() for p in mixer.parameters())
        (True, 102)

    Reference: arXiv 2303.16900, section 3.2; the dilation is timm's.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_size: Size = 11,
        stride: Size = 1,
        padding: Padding = "same",
        dilation: Size = 1,
        groups: int | None = None,
        bias: bool = True,
        *,
        square_kernel_size: Size = 3,
        branch_ratio: float = 0.125,
        inplace: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        n = self.ndim
        bands = ntuple("kernel_size", kernel_size, n)
        label = "the inception depthwise convolution"
        super().__init__(in_channels, out_channels, bands, stride, padding, dilation, groups, label, inplace)
        self.square_kernel_size = ntuple("square_kernel_size", square_kernel_size, n)
        self.branch_ratio = branch_ratio
        # Truncated, as the authors do: 17 channels with ratio 0.2 give 3 a branch.
        width = (
            int(in_channels * branch_ratio) if isinstance(branch_ratio, int | float) and 0 <= branch_ratio <= 1 else -1
        )
        ok = 0 <= (n + 1) * width <= in_channels
        check(ok, "branch_ratio", branch_ratio, f"{n + 1} branches share the channels: 0 <= branch_ratio <= 1/{n + 1}")
        kernels = {_SQUARE[n]: self.square_kernel_size}
        for name, axis in _BANDS[n].items():
            kernels[name] = tuple(k if i == axis else 1 for i, k in enumerate(bands))
        self._build(width, kernels, bias=bias, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        own = f"square_kernel_size={self.square_kernel_size}, branch_ratio={self.branch_ratio}"
        return f"{super().extra_repr()}, {own}"


_SQUARE = ("", "dwconv_s", "dwconv_hw", "dwconv_dhw")
_BANDS: tuple[dict[str, int], ...] = (
    {},
    {"dwconv_l": 0},
    {"dwconv_w": 1, "dwconv_h": 0},
    {"dwconv_w": 2, "dwconv_h": 1, "dwconv_d": 0},
)


class InceptionDWConv1d(InceptionDWConv):
    """Inception depthwise convolution over (N, C, L): a short kernel and a band."""

    ndim = 1


class InceptionDWConv2d(InceptionDWConv):
    """Inception depthwise convolution over (N, C, H, W)."""

    ndim = 2


class InceptionDWConv3d(InceptionDWConv):
    """Inception depthwise convolution over (N, C, D, H, W): a cube and three bands."""

    ndim = 3


@part(
    "partial-depthwise",
    paper="inceptionnext",
    kind="operator",
    dims=(1, 2, 3),
    mixes="space",
    supports=("dilation", "even"),
    merges="conv",
    mixer={"kernel_size": 3},
    keywords="partial convolution ConvNeXt ablation identity channels",
)
class PartialDepthwiseConv(_PartialDepthwise):
    """Depthwise convolution of a share of the channels, the identity on the others: the paper's ConvNeXt ablation.

    y = concat(x[:, :C−g], K ∗ x[:, C−g:]) with g = ⌊C · ratio⌋; k^n · g multiply-adds a position. The published
    ablation has kernel 3 and ratios 1/2, 3/8, 1/4, 1/8, 1/16.

    Args:
        in_channels: C ≥ 1; ``out_channels`` and ``groups`` are None or C.
        kernel_size: ≥ 1, odd or even; int or one per axis.
        stride: 1 only.
        padding: "same" only.
        dilation: ≥ 1, int or one per axis.
        bias: learn an additive bias in the convolved channels.
        ratio: share of the channels that are convolved, 0 ≤ ratio ≤ 1.
        inplace: as in :class:`InceptionDWConv`.

    Shape:
        (N, C, \\*spatial) → the same.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> PartialDepthwiseConv2d(16, ratio=0.25)
        PartialDepthwiseConv2d(
          16, kernel_size=(3, 3), dilation=(1, 1)
          (conv): Conv2d(4, 4, kernel_size=(3, 3), stride=(1, 1), padding=same, groups=4)
        )

    Reference: arXiv 2303.16900, section 3.1 and figure 3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_size: Size = 3,
        stride: Size = 1,
        padding: Padding = "same",
        dilation: Size = 1,
        groups: int | None = None,
        bias: bool = True,
        *,
        ratio: float = 0.25,
        inplace: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        size = ntuple("kernel_size", kernel_size, self.ndim)
        label = "the partial depthwise convolution"
        super().__init__(in_channels, out_channels, size, stride, padding, dilation, groups, label, inplace)
        check(0 <= ratio <= 1, "ratio", ratio, "a share of the channels lies between 0 and 1")
        self._build(int(in_channels * ratio), {"conv": size}, bias=bias, device=device, dtype=dtype)


class PartialDepthwiseConv1d(PartialDepthwiseConv):
    """Partial depthwise convolution over (N, C, L)."""

    ndim = 1


class PartialDepthwiseConv2d(PartialDepthwiseConv):
    """Partial depthwise convolution over (N, C, H, W)."""

    ndim = 2


class PartialDepthwiseConv3d(PartialDepthwiseConv):
    """Partial depthwise convolution over (N, C, D, H, W)."""

    ndim = 3
