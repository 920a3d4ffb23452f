"""Deformable convolution without kernel weights: DCNv4's operator as HRVMamba uses it.

Xiong et al. 2024, "Efficient Deformable ConvNets: Rethinking Dynamic and Sparse Operator for Vision Applications",
arXiv 2401.06197; HRVMamba (arXiv 2410.03174) puts it before its scan, without projections of the values and the output.

A linear map of every position gives, for each group of channels, K displacements (dx, dy) and K masks, which are
weights as they are: no softmax. With c = ⌊δ·(k−1)/2⌋ on each axis and tap (i, j), *i horizontal and outermost*,

    y[g](p) = Σ_{i,j} m_{ij}(p) · x[g]( p·stride − pad + c + ((i, j)·δ − c + (dx, dy)_{ij}(p))·s )

bilinear, zero outside. Cost a position: C · ⌈3KG/8⌉·8 multiply-adds for the map, 9·K·C for the sampling.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from torchconv._common import check, check_positive
from torchconv.catalog import part
from torchconv.kernels.deform import deformable_sum
from torchconv.kernels.precision import wide_dtype
from torchconv.ops._common import (
    Padding,
    Size,
    apply_conv,
    check_depthwise,
    check_input,
    check_odd,
    check_same,
    ntuple,
)


def sampling_positions(
    offsets: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    offset_scale: float = 1.0,
    remove_center: bool = False,
) -> Tensor:
    """Where each tap reads: (column, row) in pixels of the input.

    Args:
        offsets: (N, G, K, H', W', 2) displacements (dx, dy), taps with the horizontal index outermost.
        kernel_size, stride, padding, dilation: (rows, columns).
        offset_scale: s, which scales the regular grid as well.
        remove_center: the middle tap is left out, K = kH·kW − 1.

    Shape:
        (N, G, K, H', W', 2) → the same.

    Reference: arXiv 2401.06197.
    """
    like: dict[str, Any] = {"device": offsets.device, "dtype": offsets.dtype}
    axes = []
    for axis, size in ((1, offsets.shape[4]), (0, offsets.shape[3])):  # columns, then rows
        centre = dilation[axis] * (kernel_size[axis] - 1) // 2
        start = torch.arange(size, **like) * stride[axis] - padding[axis] + centre
        axes.append((start, torch.arange(kernel_size[axis], **like) * dilation[axis] - centre))
    (columns, i), (rows, j) = axes
    taps = torch.stack(torch.meshgrid(i, j, indexing="ij"), -1).flatten(0, 1)
    if remove_center:
        middle = len(taps) // 2
        taps = torch.cat([taps[:middle], taps[middle + 1 :]])
    base = torch.stack(torch.broadcast_tensors(columns, rows[:, None]), -1)
    return base + (taps[:, None, None] + offsets) * offset_scale


def dcnv4(
    value: Tensor,
    offset_mask: Tensor,
    kernel_size: Size = 3,
    stride: Size = 1,
    padding: Size = 1,
    dilation: Size = 1,
    groups: int = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
) -> Tensor:
    """Sum of sampled values times masks, with the displacements and masks given; channels last.

    Args:
        value: the map.
        offset_mask: for each group 2K displacements, dx and dy in turn, then K masks; more entries at the end are not
            read.
        kernel_size, stride, padding, dilation: int or (rows, columns).
        groups: G, divides the channels.
        offset_scale, remove_center: see :func:`sampling_positions`.

    Shape:
        value (N, H, W, C), offset_mask (N, H', W', ≥ 3·K·G) → (N, H', W', C).

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> only_middle = torch.zeros(1, 2, 2, 27)
        >>> only_middle[..., 18 + 4] = 1.0
        >>> dcnv4(torch.arange(4.0).reshape(1, 2, 2, 1), only_middle).flatten().tolist()
        [0.0, 1.0, 2.0, 3.0]

    Reference: arXiv 2401.06197.
    """
    if value.dim() != 4:
        raise ValueError(f"value of shape {tuple(value.shape)}: expected (N, H, W, C)")
    check_positive("groups", groups)
    check(value.shape[3] % groups == 0, "groups", groups, f"must divide the {value.shape[3]} channels")
    kernel = (k := ntuple("kernel_size", kernel_size, 2))[0], k[1]
    strides = (s := ntuple("stride", stride, 2))[0], s[1]
    pads = (p := ntuple("padding", padding, 2, least=0))[0], p[1]
    dilations = (d := ntuple("dilation", dilation, 2))[0], d[1]
    centre = kernel[0] % 2 == 1 and kernel[1] % 2 == 1
    check(centre or not remove_center, "remove_center", remove_center, f"kernel_size={kernel} has no middle tap")
    taps = kernel[0] * kernel[1] - int(remove_center)
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(value.shape[1:3], pads, dilations, kernel, strides, strict=True)
    ]
    whole = all(s > 0 or n == 0 for s, n in zip(size, value.shape[1:3], strict=True))
    remedy = f"reaches over the map of {tuple(value.shape[1:3])} with padding={pads}; pad more or take a smaller one"
    check(whole, "kernel_size", kernel, remedy)
    fits = offset_mask.dim() == 4 and list(offset_mask.shape[:3]) == [value.shape[0], *size]
    if not fits or offset_mask.shape[3] < 3 * taps * groups:
        expected = f"({value.shape[0]}, {size[0]}, {size[1]}, >= {3 * taps * groups})"
        raise ValueError(f"offset_mask of shape {tuple(offset_mask.shape)}: expected {expected}")
    split = offset_mask[..., : 3 * taps * groups].unflatten(3, (groups, 3 * taps)).permute(0, 3, 4, 1, 2)
    wide = wide_dtype(split.dtype)
    offsets = split[:, :, : 2 * taps].to(wide).unflatten(2, (taps, 2)).permute(0, 1, 2, 4, 5, 3)
    positions = sampling_positions(offsets, kernel, strides, pads, dilations, offset_scale, remove_center)
    y = deformable_sum(value.permute(0, 3, 1, 2), positions, split[:, :, 2 * taps :])
    return y.permute(0, 2, 3, 1)


@part(
    "dcnv4",
    paper="hrvmamba",
    kind="operator",
    dims=(2,),
    mixes="space",
    supports=("stride", "dilation"),
    mixer={"kernel_size": 3},
    keywords="deformable convolution DCNv4 DCNv3 dynamic offsets masks sampling adaptive per position",
)
class DCNv4Conv2d(nn.Module):
    """Deformable convolution without kernel weights: displacements and masks come from the position itself.

    Args:
        in_channels: C ≥ 1.
        out_channels: None or C.
        kernel_size: odd, int or (rows, columns).
        stride, dilation: as in ``nn.Conv2d``; with a stride the linear map reads every stride-th position.
        padding: "same".
        groups: None or C, since channels do not mix.
        bias: of the linear map.
        offset_groups: G, divides C: groups of channels with displacements and masks of their own.
        offset_scale: s.
        remove_center: leave out the middle tap.
        head_kernel: size of a depthwise convolution before the linear map; None for none.

    Shape:
        (N, C, H, W) → (N, C, ⌈H / stride⌉, ⌈W / stride⌉).

    Raises:
        ValueError: an argument is out of range or not supported; the message names it.

    Example:
        >>> DCNv4Conv2d(32, offset_groups=2)(torch.zeros(2, 32, 7, 6)).shape
        torch.Size([2, 32, 7, 6])

    Reference: Xiong et al., arXiv 2401.06197; arXiv 2410.03174, section 3.
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
        offset_groups: int = 1,
        offset_scale: float = 1.0,
        remove_center: bool = False,
        head_kernel: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_depthwise(in_channels, out_channels, groups, "DCNv4Conv2d")
        check_positive("offset_groups", offset_groups)
        check(
            in_channels % offset_groups == 0, "offset_groups", offset_groups, f"must divide in_channels={in_channels}"
        )
        self.in_channels = self.out_channels = in_channels
        self.kernel_size = ntuple("kernel_size", kernel_size, 2)
        self.stride, self.dilation = ntuple("stride", stride, 2), ntuple("dilation", dilation, 2)
        check_odd(self.kernel_size, "DCNv4Conv2d")
        check_same(padding, self.kernel_size, "DCNv4Conv2d", self.dilation)
        taps = math.prod(self.kernel_size) - int(remove_center)
        check(taps >= 1, "kernel_size", kernel_size, "without its middle no tap is left")
        if head_kernel is not None:
            check_positive("head_kernel", head_kernel)
            check(head_kernel % 2 == 1, "head_kernel", head_kernel, "must be odd or None")
        self.offset_groups, self.offset_scale, self.remove_center = offset_groups, offset_scale, remove_center
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.offset_mask_dw = (
            None
            if head_kernel is None
            else nn.Conv2d(
                in_channels, in_channels, head_kernel, padding=head_kernel // 2, groups=in_channels, **options
            )
        )
        # Rounded up to a multiple of eight, as in the authors' checkpoints.
        self.offset_mask = nn.Linear(in_channels, -(-3 * taps * offset_groups // 8) * 8, bias=bias, **options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Displacements and masks near zero: normal numbers of deviation 0.02, cut at 2, and no offset."""
        nn.init.trunc_normal_(self.offset_mask.weight, std=0.02)
        if self.offset_mask.bias is not None:
            nn.init.zeros_(self.offset_mask.bias)
        if self.offset_mask_dw is not None:
            self.offset_mask_dw.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Sample and sum ``x``."""
        check_input(x, self.in_channels, 2)
        source = x if self.offset_mask_dw is None else apply_conv(self.offset_mask_dw, x)
        source = source[:, :, :: self.stride[0], :: self.stride[1]].permute(0, 2, 3, 1)
        pads = [d * (k // 2) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        y = dcnv4(
            x.permute(0, 2, 3, 1),
            self.offset_mask(source),
            self.kernel_size,
            self.stride,
            pads,
            self.dilation,
            self.offset_groups,
            self.offset_scale,
            self.remove_center,
        )
        # Only the order of axes changes here: the sum is made with channels first.
        last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        y = y.permute(0, 3, 1, 2)
        return y.contiguous(memory_format=torch.channels_last) if last else y

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return (
            f"{self.in_channels}, kernel_size={self.kernel_size}, stride={self.stride}, dilation={self.dilation}, "
            f"offset_groups={self.offset_groups}"
        )
