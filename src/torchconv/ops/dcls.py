"""DCLS: dilated convolution with learnable spacings (Khalfaoui-Hassani, Pellegrini, Masquelier 2021, arXiv 2112.03740).

A large kernel holds only m weights a channel pair, and the real-valued position of each is trained. A window spreads
every weight over the neighbouring grid cells, so positions get gradients (arXiv 2306.00817 adds the wider windows):

    K[o, c, i] = Σ_k w[o,c,k] · Π_j a_j(i_j) / (Σ_grid Π_j a_j + 1e-7),   y = K ⋆ x + b,

    a(i) = max(0, 1 − |i − q|)           "v1" ("v0": the same without the division)
    a(i) = max(0, s − |i − q|)           "max",    s = |σ| + 1
    a(i) = exp(−½ ((i − q)/s)²)          "gauss",  s = |σ| + 0.27

with q = p + ⌊S/2⌋ the absolute position. Windows are products over the axes and so are their sums, hence K is a matrix
product of m × S windows: O(C_out · C_in/g · m · ΠS) multiply-adds once a forward, then one plain convolution.
Parameters a pair: m(1 + n) for "v0" and "v1", m(1 + 2n) for the others, on n axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive
from torchconv.catalog import part
from torchconv.ops._common import (
    Padding,
    Size,
    check_channels,
    check_input,
    check_padding,
    check_unit,
    conv_nd,
    make_conv,
    ntuple,
)
from torchconv.ops._dcls_kernel import (
    AXIS_ORDERS,
    LEAST_WIDTH,
    VERSIONS,
    dcls_kernel,
    position_axes,
    repulsive_loss,
)

__all__ = ["DCLSBase", "DCLSConv1d", "DCLSConv2d", "DCLSConv3d", "dcls_kernel", "repulsive_loss", "share_positions"]

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
SIGMA_INIT = {"max": 0.0, "gauss": 0.23}


class DCLSBase(nn.Module):
    """Parameters, training needs and merging of every DCLS layer; :meth:`kernel` is what they differ in.

    ``size`` are the sizes of the axes whose positions are learned, ``dense`` those of the axes before them on which
    every cell has weights of its own.
    """

    ndim: ClassVar[int] = 0
    repulsion_from_epoch: ClassVar[int] = 20
    least_width: float | None = None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: tuple[int, ...],
        dense: tuple[int, ...],
        stride: Size,
        padding: Padding,
        groups: int,
        bias: bool,
        kernel_count: int | None,
        version: str,
        axis_order: str,
        position_init: float | str,
        sigma_init: float | None,
        padding_mode: str,
        device: Any,
        dtype: Any,
    ) -> None:
        super().__init__()
        check_channels(in_channels, out_channels, groups)
        check_padding(padding, self.ndim)
        check_choice("version", version, VERSIONS)
        check_choice("axis_order", axis_order, AXIS_ORDERS)
        check_choice("padding_mode", padding_mode, PADDING_MODES)
        number = isinstance(position_init, int | float) and position_init >= 0
        check(number or position_init == "uniform", "position_init", position_init, "a deviation >= 0 or 'uniform'")
        if kernel_count is None:
            cells = math.prod(size)
            free = 1 + len(size) * (2 if version in LEAST_WIDTH else 1)
            kernel_count = max(min(cells, 3), round(cells / free))
        check_positive("kernel_count", kernel_count)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.size, self.stride = size, ntuple("stride", stride, self.ndim)
        self.padding, self.padding_mode = padding, padding_mode
        self.kernel_count, self.version, self.axis_order = kernel_count, version, axis_order
        self.position_init, self.sigma_init = position_init, sigma_init
        shape = (out_channels, in_channels // groups, *dense, kernel_count)
        options = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(shape, **options))
        self.P = nn.Parameter(torch.empty((len(size), *shape), **options))
        self.SIG = nn.Parameter(torch.empty((len(size), *shape), **options)) if version in LEAST_WIDTH else None
        self.bias = nn.Parameter(torch.empty(out_channels, **options)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight and bias uniform in ±1/√(m·C_in/g); positions normal or uniform, within the grid; σ constant."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)
        if self.position_init == "uniform":
            with torch.no_grad():
                for row, (low, high) in enumerate(self.limits()):
                    self.P[row].uniform_(low, high)
        else:
            nn.init.normal_(self.P, 0.0, float(self.position_init))
        self.clamp_parameters()
        if self.SIG is not None:
            start = SIGMA_INIT[self.version] if self.sigma_init is None else self.sigma_init
            nn.init.constant_(self.SIG, start)

    def limits(self) -> list[tuple[int, int]]:
        """Least and largest position of every row of ``P`` that lies on the grid: 0 ≤ p + centre ≤ S − 1."""
        axes = position_axes(len(self.size), self.version, self.axis_order)
        centres = [s // 2 for s in self.size]
        return [(-c, self.size[axis] - 1 - c) for c, axis in zip(centres, axes, strict=True)]

    def clamp_parameters(self) -> None:
        """Move positions that left the grid back to its border."""
        with torch.no_grad():
            for row, (low, high) in enumerate(self.limits()):
                self.P[row].clamp_(low, high)

    def after_step(self) -> None:
        """Called after every optimiser step: positions stay on the grid, where they have gradients."""
        self.clamp_parameters()

    def param_options(self) -> dict[str, dict[str, float]]:
        """Positions learn five times as fast as weights and are not decayed, which would draw them to the centre."""
        return {"P": {"lr_mult": 5.0, "weight_decay": 0.0}}

    @classmethod
    def auxiliary_loss(cls, modules: Sequence[DCLSBase], epoch: int) -> Tensor | None:
        """The squared :func:`repulsive_loss` of all layers, from epoch index 20 (the 21st) on; None before."""
        positions = list({id(m.P): m.P for m in modules}.values())
        return repulsive_loss(positions).square() if positions and epoch >= cls.repulsion_from_epoch else None

    def learned_kernel(self) -> Tensor:
        """The kernel on the learned axes (out, in/groups, \\*dense, \\*size)."""
        return dcls_kernel(
            self.weight,
            self.P,
            self.SIG,
            self.size,
            self.version,
            axis_order=self.axis_order,
            least_width=self.least_width,
        )

    def kernel(self) -> Tensor:
        """The dense kernel with which the input is convolved, (out, in/groups, \\*spatial)."""
        return self.learned_kernel()

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x`` (N, in_channels, \\*spatial) with the kernel built from the present positions."""
        check_input(x, self.in_channels, self.ndim)
        kernel = self.kernel()
        return conv_nd(x, kernel, self.bias, self.stride, self.padding, 1, self.groups, self.padding_mode)

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """The same map as an ``nn.ConvNd``: positions are frozen into its kernel."""
        return make_conv(self.kernel(), self.bias, self.stride, self.padding, 1, self.groups, self.padding_mode)

    def to_conv(self) -> nn.Module:
        """Another name for :meth:`merge`."""
        return self.merge()

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.size}, stride={self.stride}, "
            f"padding={self.padding!r}, groups={self.groups}, bias={self.bias is not None}, "
            f"kernel_count={self.kernel_count}, version={self.version!r}, axis_order={self.axis_order!r}"
        )


@part(
    "dcls",
    paper="dcls",
    kind="operator",
    dims=(1, 2, 3),
    mixes="space+channels",
    supports=("stride", "channels", "groups", "even", "padding"),
    merges="conv",
    mixer={"kernel_size": 7, "groups": "channels", "position_init": "uniform"},
    conv={"kernel_size": 5, "position_init": "uniform"},
    keywords="long range sparse learned positions spacings dilation delays large kernel interpolation",
)
class DCLSConv(DCLSBase):
    """Convolution whose few weights learn where in a large kernel they stand.

    Args:
        in_channels, out_channels: channels, both divisible by ``groups``.
        kernel_size: S, the size of the dense kernel (not the number of weights), ≥ 1, int or one per axis. To cover a
            k-tap kernel of dilation d take d(k−1)+1.
        stride: ≥ 1, int or one per axis.
        padding: int or one per axis, "valid", or "same" (output length ceil(L / stride)).
        dilation: only 1: the spacing is inside the kernel.
        groups: blocks of channels that do not see each other.
        bias: learn an additive bias.
        kernel_count: m, all the weights of a kernel (not per axis), ≥ 1. None: as many as give it no more parameters
            than the dense kernel of that size, ΠS/(1+2n), and at least 3.
        version: window, "gauss" (default; its reach lets positions travel), "max", "v1" or "v0".
        axis_order: "spatial" (row j of ``P`` is spatial axis j) or "official" for checkpoints of the authors.
        position_init: deviation of the normal distribution that positions start from, or "uniform" over the grid.
        sigma_init: start of ``SIG``; None: 0.23 for "gauss" (width 0.5), 0 for "max" (width 1).
        padding_mode: "zeros", "reflect", "replicate" or "circular".

    Shape:
        (N, in_channels, \\*spatial) → (N, out_channels, \\*spatial').

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> layer = DCLSConv2d(8, 8, 17, padding="same", groups=8, kernel_count=34)
        >>> layer(torch.zeros(1, 8, 20, 20)).shape, layer.merge().kernel_size
        (torch.Size([1, 8, 20, 20]), (17, 17))

    The training loop must call :meth:`after_step` after each optimiser step and honour :meth:`param_options`.
    Reference: arXiv 2112.03740, Sections 2 and 3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size = 7,
        stride: Size = 1,
        padding: Padding = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        kernel_count: int | None = None,
        version: str = "gauss",
        axis_order: str = "spatial",
        position_init: float | str = 0.5,
        sigma_init: float | None = None,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        check_unit("dilation", dilation, self.ndim, "DCLS", "enlarge kernel_size instead")
        super().__init__(
            in_channels,
            out_channels,
            ntuple("kernel_size", kernel_size, self.ndim),
            (),
            stride,
            padding,
            groups,
            bias,
            kernel_count,
            version,
            axis_order,
            position_init,
            sigma_init,
            padding_mode,
            device,
            dtype,
        )
        self.kernel_size = self.size


class DCLSConv1d(DCLSConv):
    """DCLS over (N, C, L)."""

    ndim = 1


class DCLSConv2d(DCLSConv):
    """DCLS over (N, C, H, W)."""

    ndim = 2


class DCLSConv3d(DCLSConv):
    """DCLS over (N, C, D, H, W)."""

    ndim = 3


def share_positions(model: nn.Module, *, sigma: bool = True) -> nn.Module:
    """Let the DCLS layers of ``model`` that are alike use one ``P`` (and one ``SIG``), that of the first of them.

    Alike are layers of one class with equal channels, groups, size, number of weights, version and axis order. Call
    it on a stage of a network to share within the stage only, as the authors do. A shared parameter gets the sum of
    the gradients; the state dict lists it once a layer.

    Args:
        model: changed in place and returned.
        sigma: share the widths too.
    """
    first: dict[tuple[Any, ...], DCLSBase] = {}
    for layer in model.modules():
        if isinstance(layer, DCLSBase):
            alike = (type(layer), tuple(layer.P.shape), layer.size, layer.groups, layer.version, layer.axis_order)
            owner = first.setdefault(alike, layer)
            layer.P = owner.P
            if sigma:
                layer.SIG = owner.SIG
    return model
