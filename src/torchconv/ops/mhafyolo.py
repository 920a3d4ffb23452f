"""Large depthwise kernels trained with all smaller ones beside them (MHAF-YOLO).

Z. Yang et al. 2025, "MHAF-YOLO: Multi-Branch Heterogeneous Auxiliary Fusion YOLO for accurate object detection",
arXiv 2502.04656; the first form is MAF-YOLO (PRCV 2024).

Kernels grow with depth (3, 5, 7, 9), and each is trained with all smaller odd ones in parallel, without dilation:

    Rep(x) = BN( BN₀(W_K ⋆ x) + Σ_b BN_b(W_b ⋆ x) )     one K × K depthwise convolution after folding

K^n multiply-adds a channel and position folded, K^n + Σ_b k_b^n while training. The blocks made of it are in
:mod:`torchconv.ops.mhafyolo_blocks`, the rest of the network's parts in :mod:`torchconv.ops.mhafyolo_parts`.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

from torch import Tensor, nn

from torchconv._common import check, check_positive
from torchconv.catalog import part
from torchconv.ops._common import (
    BATCH_NORM,
    CONV,
    Padding,
    Size,
    apply_conv,
    check_channels,
    check_depthwise,
    check_input,
    check_same,
    check_unit,
    conv_nd,
    fold_bn,
    make_conv,
    ntuple,
)
from torchconv.ops.unireplknet import (
    BRANCHES,
    DilatedReparamConv,
    DilatedReparamConv1d,
    DilatedReparamConv2d,
    DilatedReparamConv3d,
    scale_shift,
    uses_fixed_statistics,
)

# Kernel size → (size, dilation) of the side branches: all smaller odd sizes up to 9, UniRepLKNet's beyond.
MULTI_KERNELS: dict[int, tuple[tuple[int, int], ...]] = {
    3: ((3, 1), (1, 1)),
    5: ((3, 1), (1, 1)),
    7: ((5, 1), (3, 1)),
    9: ((7, 1), (5, 1), (3, 1)),
    **{k: branches for k, branches in BRANCHES.items() if k > 9},
}


class _Branches1d(DilatedReparamConv1d):
    table = MULTI_KERNELS


class _Branches2d(DilatedReparamConv2d):
    table = MULTI_KERNELS


class _Branches3d(DilatedReparamConv3d):
    table = MULTI_KERNELS


_BRANCHES: tuple[Any, ...] = (nn.Module, _Branches1d, _Branches2d, _Branches3d)


def check_sizes(
    name: str, ndim: int, kernel_size: Size, stride: Size, padding: Padding, dilation: Size
) -> tuple[int, ...]:
    """Refuse what neither the convolution nor the blocks made of it can do; the kernel's size on every axis."""
    sizes = ntuple("kernel_size", kernel_size, ndim)
    check(len(set(sizes)) == 1, "kernel_size", kernel_size, f"{name} needs the same size on every axis")
    nearest = min(abs(k - sizes[0]) for k in MULTI_KERNELS)
    use = " or ".join(str(k) for k in MULTI_KERNELS if abs(k - sizes[0]) == nearest)
    check(nearest == 0, "kernel_size", kernel_size, f"{name} has branches for 3, 5, 7, …, 17; use {use}")
    check_unit("stride", stride, ndim, name, "follow it with a strided convolution or a pooling")
    check_unit("dilation", dilation, ndim, name, "choose a larger kernel_size")
    check_same(padding, sizes, name)
    return sizes


def _set_norms(module: nn.Module, eps: float, momentum: float) -> None:
    for child in module.modules():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            child.eps, child.momentum = eps, momentum


def merged_copy(module: nn.Module) -> nn.Module:
    """A copy in eval mode in which every child with a ``merge()`` is merged."""
    twin = copy.deepcopy(module).eval()
    _merge_children(twin)
    return twin


def _merge_children(module: nn.Module) -> None:
    for name, child in module.named_children():
        if hasattr(child, "merge"):
            merge: Any = child.merge
            setattr(module, name, merge())
        else:
            _merge_children(child)


@part(
    "multikernel-reparam",
    paper="mhafyolo",
    kind="operator",
    dims=(1, 2, 3),
    mixes="space",
    supports=(),
    merges="conv",
    mixer={"kernel_size": 9},
    conv={"kernel_size": 7},
    keywords="re-parameterisation parallel depthwise kernels large kernel RepHDW heterogeneous YOLO detection",
)
class MultiKernelReparamConv(nn.Module):
    """Depthwise K × K kernel with parallel smaller ones in training, one plain depthwise convolution after it.

    y = BN( BN₀(W_K ⋆ x) + Σ_b BN_b(W_b ⋆ x) ); sizes of the branches in :data:`MULTI_KERNELS`. With fixed statistics
    the branches are folded before the convolution, differentiably.

    Args:
        in_channels: channels C ≥ 1.
        out_channels: None or C.
        kernel_size: 3, 5, 7, 9, 11, 13, 15 or 17, the same on every axis.
        stride, dilation: 1.
        padding: "same".
        groups: None or C.
        bias: no effect, since the batch norms give an offset in either case.
        eps, momentum: of all batch norms.

    Shape:
        (N, C, \\*spatial) → the same.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> import torch
        >>> op = MultiKernelReparamConv2d(8, kernel_size=9).eval()
        >>> x = torch.randn(2, 8, 9, 12)
        >>> torch.allclose(op.merge()(x), op(x), atol=1e-5)
        True

    Reference: arXiv 2502.04656, section 3.
    """

    ndim: ClassVar[int] = 0

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_size: Size = 9,
        stride: Size = 1,
        padding: Padding = "same",
        dilation: Size = 1,
        groups: int | None = None,
        bias: bool = True,
        *,
        eps: float = 1e-3,
        momentum: float = 0.03,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_depthwise(in_channels, out_channels, groups, name)
        self.in_channels = self.out_channels = in_channels
        self.kernel_size = check_sizes(name, self.ndim, kernel_size, stride, padding, dilation)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dwconv: DilatedReparamConv = _BRANCHES[self.ndim](in_channels, None, kernel_size, **options)
        self.norm = BATCH_NORM[self.ndim](in_channels, **options)
        _set_norms(self, eps, momentum)

    def merged_weight(self) -> tuple[Tensor, Tensor]:
        """Kernel (C, 1, \\*kernel) and bias of the merged convolution; differentiable."""
        weight, bias = self.dwconv.merged_weight()
        scale, shift = scale_shift(self.norm)
        assert bias is not None
        total = weight.to(scale.dtype) * scale.reshape(-1, *[1] * (self.ndim + 1))
        return total.to(weight.dtype), (bias.to(scale.dtype) * scale + shift).to(weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x``: branch by branch while a batch norm learns its statistics, merged otherwise."""
        check_input(x, self.in_channels, self.ndim)
        norms = (self.norm, *(bn for _, bn in self.dwconv.pairs()))
        if all(uses_fixed_statistics(bn) for bn in norms):
            weight, bias = self.merged_weight()
            return conv_nd(x, weight, bias, padding=self.kernel_size[0] // 2, groups=self.in_channels)
        y: Tensor = self.norm(self.dwconv(x))
        return y

    def merge(self) -> nn.Module:
        """The same map, with the running statistics, as one depthwise ``nn.ConvNd``."""
        weight, bias = self.merged_weight()
        return make_conv(weight, bias, padding=self.kernel_size[0] // 2, groups=self.in_channels)


class MultiKernelReparamConv1d(MultiKernelReparamConv):
    """Depthwise convolution with parallel smaller kernels over (N, C, L)."""

    ndim = 1


class MultiKernelReparamConv2d(MultiKernelReparamConv):
    """Depthwise convolution with parallel smaller kernels over (N, C, H, W)."""

    ndim = 2


class MultiKernelReparamConv3d(MultiKernelReparamConv):
    """Depthwise convolution with parallel smaller kernels over (N, C, D, H, W)."""

    ndim = 3


class ConvBN(nn.Module):
    """Convolution without bias, batch norm, and SiLU unless ``act`` is False; padding ⌊k/2⌋.

    Args:
        in_channels, out_channels, kernel_size, stride, groups: of the convolution.
        act: apply SiLU.
        ndim: spatial axes.
        eps, momentum: of the batch norm.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        act: bool = True,
        *,
        ndim: int = 2,
        eps: float = 1e-3,
        momentum: float = 0.03,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_channels(in_channels, out_channels, groups)
        check_positive("kernel_size", kernel_size)
        check_positive("stride", stride)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv = CONV[ndim](
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding=kernel_size // 2,
            groups=groups,
            bias=False,
            **options,
        )
        self.bn = BATCH_NORM[ndim](out_channels, eps=eps, momentum=momentum, **options)
        self.act = nn.SiLU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, normalise, activate."""
        y: Tensor = self.act(self.bn(apply_conv(self.conv, x)))
        return y

    def merge(self) -> nn.Module:
        """The same map with the batch norm folded into the convolution."""
        c = self.conv
        conv = make_conv(*fold_bn(c.weight, None, self.bn), c.stride, c.padding, c.dilation, c.groups)
        return nn.Sequential(conv, copy.deepcopy(self.act)).eval()
