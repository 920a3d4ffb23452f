"""Weighted convolution: taps multiplied by a density of their distance to the centre (Cammarasana & Patanè 2025).

arXiv 2505.24558 (companion 2505.24527). A kernel of side k = 2h + 1 has a symmetric profile with its centre at 1, given
by h numbers, outermost first, and the density is the product of the profiles of the axes:

    α = (d_1, …, d_h, 1, d_h, …, d_1),   Φ = α ⊗ … ⊗ α,   y = b + (W ⊙ Φ) ⋆ x

The density is set for all layers of one kernel size (searched from outside, :func:`search_density`) or learned, h
numbers a layer. Cost: as the convolution, plus C_out · C_in/g · k^n products a forward and none after merging.
What functions can be expressed does not change; a gradient step moves the effective kernel by Φ² times the plain one.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from torchconv._common import check, check_choice
from torchconv.catalog import part
from torchconv.ops._common import (
    CONV,
    Padding,
    Size,
    check_channels,
    check_input,
    check_odd,
    check_padding,
    conv_nd,
    make_conv,
    ntuple,
)
from torchconv.ops._density import (
    Density,
    DensitySearch,
    density_kernel,
    density_profile,
    per_axis,
    search_density,
    suggested_density,
)

__all__ = [
    "DensitySearch",
    "WeightedConv1d",
    "WeightedConv2d",
    "WeightedConv3d",
    "density_kernel",
    "density_profile",
    "search_density",
    "suggested_density",
    "weighted_",
    "weighted_conv",
]

W = TypeVar("W", bound="WeightedConv")

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def weighted_conv(
    x: Tensor,
    weight: Tensor,
    density: Tensor | Sequence[Tensor],
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Tensor:
    """Convolve ``x`` with ``weight`` ⊙ Φ(``density``).

    Args:
        x: (N, C_in, \\*spatial).
        weight: (C_out, C_in/groups, \\*kernel), odd sizes.
        density: (h,) for all axes, or one tensor an axis, h the kernel's half size; outermost tap first.
        bias, stride, padding, dilation, groups: as of a convolution; ``padding`` also "same" at any stride. The density
            goes with the number of a tap, so ``dilation`` leaves it alone.

    Returns:
        (N, C_out, \\*spatial').

    Raises:
        ValueError: the density does not fit the kernel.

    Reference: arXiv 2505.24558, Section 3.
    """
    phi = density_kernel(density, weight.dim() - 2)
    if phi.shape != weight.shape[2:]:
        raise ValueError(f"density for a kernel of {tuple(phi.shape)}: the kernel is {tuple(weight.shape[2:])}")
    return conv_nd(x, weight * phi.to(weight.dtype), bias, stride, padding, dilation, groups, padding_mode)


@part(
    "weightedconv",
    paper="weightedconv",
    kind="operator",
    dims=(1, 2, 3),
    mixes="space+channels",
    supports=("stride", "channels", "groups", "dilation", "padding"),
    merges="conv",
    mixer={"kernel_size": 7, "groups": "channels", "init": "effective"},
    conv={"init": "effective"},
    keywords="density spatial weighting symmetric profile denoising reparametrisation",
)
class WeightedConv(nn.Module):
    """Convolution whose taps are weighted by a separable symmetric density around the centre.

    Args:
        in_channels, out_channels: channels, both divisible by ``groups``.
        kernel_size: odd, int or one per axis.
        stride, dilation: ≥ 1, int or one per axis.
        padding: int or one per axis, "valid", or "same" (output length ceil(L / stride)).
        groups: blocks of channels that do not see each other.
        bias: learn an additive bias.
        density: (k − 1)/2 numbers, outermost tap first, for all axes; or one list an axis, None for ones on that axis;
            "learned" for a trained parameter ``den``; None (default) for :func:`suggested_density`.
        density_init: start of a learned density, as ``density``.
        init: "official": Kaiming normal over the outputs, for W. "effective": W is scaled so that the mean square of
            W ⊙ Φ is that of Kaiming, with the outputs counted within a group; the fair start for comparisons.
        padding_mode: "zeros", "reflect", "replicate" or "circular".

    Shape:
        (N, in_channels, \\*spatial) → (N, out_channels, \\*spatial').

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> layer = WeightedConv2d(1, 1, 3, density=[0.5])
        >>> layer.Phi.tolist()
        [[0.25, 0.5, 0.25], [0.5, 1.0, 0.5], [0.25, 0.5, 0.25]]

    Reference: arXiv 2505.24558, Section 3.
    """

    ndim: ClassVar[int] = 0
    alfa: Tensor
    Phi: Tensor

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
        density: Density | str | None = None,
        density_init: Density | None = None,
        init: str = "official",
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_channels(in_channels, out_channels, groups)
        check_padding(padding, self.ndim)
        check_choice("init", init, ("official", "effective"))
        check_choice("padding_mode", padding_mode, PADDING_MODES)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = ntuple("kernel_size", kernel_size, self.ndim)
        check_odd(self.kernel_size, "a density")
        self.stride = ntuple("stride", stride, self.ndim)
        self.dilation = ntuple("dilation", dilation, self.ndim)
        self.padding, self.padding_mode, self.init = padding, padding_mode, init
        learned = isinstance(density, str)
        check(not learned or density == "learned", "density", density, "numbers, 'learned' or None")
        check(learned or density_init is None, "density_init", density_init, "only with density='learned'")
        start: Any = density_init if learned else density
        if start is None:
            start = [suggested_density(k, self.ndim) for k in self.kernel_size]
        axes = per_axis(start, self.kernel_size, "density_init" if learned else "density")
        if any(v <= 0 for axis in axes for v in axis):
            warnings.warn(f"density={axes}: zero silences taps for good and a negative value flips them", stacklevel=2)
        # One vector for all axes where they agree, else the axes' one after the other.
        self.shared = len(set(axes)) == 1
        self._start = axes
        options = {"device": device, "dtype": dtype}
        if learned:
            count = sum(len(axis) for axis in self._stored(axes))
            self.den = nn.Parameter(torch.empty(count, **options))
        else:
            self.register_parameter("den", None)
            tensors = [torch.tensor(axis, **options) for axis in axes]
            profiles = [density_profile(t) for t in self._stored(tensors)]
            self.register_buffer("alfa", torch.cat(profiles))
            self.register_buffer("Phi", density_kernel(tensors))
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, **options))
        self.bias = nn.Parameter(torch.empty(out_channels, **options)) if bias else None
        self.reset_parameters()

    def _stored(self, axes: list[Any]) -> list[Any]:
        return axes[:1] if self.shared else axes

    def reset_parameters(self) -> None:
        """Kaiming normal weight (see ``init``), zero bias, a learned density at its start."""
        if self.den is not None:
            with torch.no_grad():
                start = [v for axis in self._stored(self._start) for v in axis]
                self.den.copy_(torch.tensor(start, dtype=self.den.dtype))
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        if self.init == "effective":
            with torch.no_grad():
                self.weight.mul_(math.sqrt(self.groups) * self.phi().square().mean().rsqrt())
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def density(self) -> list[Tensor]:
        """The density of every axis, outermost tap first; views of ``den`` where it is learned."""
        halves = [k // 2 for k in self.kernel_size]
        sizes = halves[:1] if self.shared else halves
        if self.den is not None:
            axes = list(self.den.split(sizes))
        else:
            profiles = self.alfa.split([2 * h + 1 for h in sizes])
            axes = [profile[:h] for profile, h in zip(profiles, sizes, strict=True)]
        return axes * self.ndim if self.shared else axes

    def phi(self) -> Tensor:
        """Φ, of the kernel's shape."""
        return self.Phi if self.den is None else density_kernel(self.density)

    def kernel(self) -> Tensor:
        """The effective kernel W ⊙ Φ."""
        return self.weight * self.phi()

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x``."""
        check_input(x, self.in_channels, self.ndim)
        kernel = self.kernel()
        return conv_nd(x, kernel, self.bias, self.stride, self.padding, self.dilation, self.groups, self.padding_mode)

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """The same map as an ``nn.ConvNd`` that holds the effective kernel."""
        return make_conv(
            self.kernel(), self.bias, self.stride, self.padding, self.dilation, self.groups, self.padding_mode
        )

    def fold(self) -> nn.Module:
        """Another name for :meth:`merge`."""
        return self.merge()

    @classmethod
    def _like(cls: type[W], conv: Any, density: Density | str | None, **options: Any) -> W:
        check(isinstance(conv, CONV[cls.ndim]), "conv", type(conv).__name__, f"must be an nn.Conv{cls.ndim}d")
        shape = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation)
        options |= {"padding_mode": conv.padding_mode, "device": conv.weight.device, "dtype": conv.weight.dtype}
        made = cls(*shape, conv.groups, conv.bias is not None, density=density, **options)
        return made.train(conv.training)

    @classmethod
    def from_conv(cls: type[W], conv: nn.Module, density: Density | str | None = None, **options: Any) -> W:
        """The weighted convolution with the output of ``conv``: its weight is divided by the density.

        Args:
            conv: an ``nn.ConvNd`` of this class's dimension with odd kernel sizes.
            density: as in the constructor, without zeros.
            options: ``density_init`` for a learned one.

        Raises:
            ValueError: ``conv`` is of another kind, or the density has zeros.
        """
        made = cls._like(conv, density, **options)
        with torch.no_grad():
            phi = made.phi()
            check(bool((phi != 0).all()), "density", density, "has zeros, so the convolution's taps there are lost")
            state = conv.state_dict()
            made.weight.copy_(state["weight"] / phi)
            if made.bias is not None:
                made.bias.copy_(state["bias"])
        return made

    @classmethod
    def official(
        cls: type[W],
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        den: Sequence[float] | None = None,
        stride: Size = 1,
        padding: Padding = 1,
        groups: int = 1,
        dilation: Size = 1,
        bias: bool = False,
    ) -> W:
        """The authors' constructor: their order and defaults (padding 1, no bias); without ``den`` it is learned."""
        density: Any = "learned" if den is None else den
        return cls(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, density=density)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.den is None and not self.Phi.is_meta:
            tolerance = 4 * torch.finfo(self.Phi.dtype).eps
            expected = density_kernel(self.density).to(self.Phi)
            if not torch.allclose(self.Phi, expected, rtol=max(tolerance, 1e-6), atol=tolerance):
                warnings.warn(f"{prefix}Phi is not the product of {prefix}alfa; it is used as stored", stacklevel=2)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        density: Any = "learned"
        if self.den is None:
            density = "?" if self.alfa.is_meta else [[round(v, 4) for v in d.tolist()] for d in self.density]
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding!r}, dilation={self.dilation}, groups={self.groups}, "
            f"bias={self.bias is not None}, density={density}"
        )


class WeightedConv1d(WeightedConv):
    """Weighted convolution over (N, C, L)."""

    ndim = 1


class WeightedConv2d(WeightedConv):
    """Weighted convolution over (N, C, H, W)."""

    ndim = 2


class WeightedConv3d(WeightedConv):
    """Weighted convolution over (N, C, D, H, W)."""

    ndim = 3


_WEIGHTED: tuple[type[WeightedConv], ...] = (WeightedConv1d, WeightedConv2d, WeightedConv3d)


def weighted_(
    model: nn.Module,
    density_by_kernel_size: Mapping[int, Sequence[float] | str | None],
    *,
    skip_depthwise: bool = False,
    init: str | None = None,
) -> nn.Module:
    """Replace the plain convolutions of ``model`` by weighted ones, one density for each kernel size.

    Left alone are 1 × 1, even and anisotropic kernels, sizes that the mapping lacks, and subclasses of ``nn.ConvNd``.

    Args:
        model: changed in place and returned (a convolution itself is returned replaced).
        density_by_kernel_size: kernel size → density, "learned", or None for the suggested one.
        skip_depthwise: leave convolutions of one channel a group alone.
        init: None keeps the model's output, "official" or "effective" draws new weights (see :class:`WeightedConv`).

    Raises:
        ValueError: a density does not fit its kernel size, or has zeros while the output is to be kept.

    Example:
        >>> net = weighted_(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1)), {3: [0.7]})
        >>> [type(m).__name__ for m in net]
        ['WeightedConv2d', 'Conv2d']
    """
    if init is not None:
        check_choice("init", init, ("official", "effective"))
    made: dict[nn.Module, nn.Module] = {}

    def replacement(conv: Any) -> nn.Module:
        kind = next((w for w in _WEIGHTED if type(conv) is CONV[w.ndim]), None)
        if kind is None or len(set(conv.kernel_size)) != 1 or conv.kernel_size[0] not in density_by_kernel_size:
            return conv
        k = conv.kernel_size[0]
        if k < 3 or k % 2 == 0 or (skip_depthwise and conv.groups == conv.in_channels > 1):
            return conv
        if conv not in made:
            density = density_by_kernel_size[k]
            made[conv] = kind.from_conv(conv, density) if init is None else kind._like(conv, density, init=init)
        return made[conv]

    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # not named_children, which lists a shared one once
            parent._modules[name] = None if child is None else replacement(child)
    return replacement(model)
