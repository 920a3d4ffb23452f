"""Dispersed convolutions: a larger kernel that is a fixed linear map of a trained small one (ScaleCrafter).

Y. He, S. Yang et al. 2023, "ScaleCrafter: Tuning-free Higher-Resolution Visual Generation with Diffusion Models",
arXiv 2310.07702.

w' = R·vec(w): R is the least-squares map by which the k' × k' kernel does on an enlarged map what the k × k kernel does
on the original, see :func:`dispersion_matrix`. It widens kernels where spreading their taps apart would leave gaps.

No parameters of its own; (k'/k)^n times the multiply-adds of the plain convolution.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from torchconv._common import check
from torchconv.catalog import part
from torchconv.ops._common import Padding, Size, check_input, conv_nd, make_conv
from torchconv.ops._dispersion import disperse_kernel, dispersion_matrix
from torchconv.ops.scalecrafter import SameConv, as_same_conv

__all__ = [
    "DispersedConv",
    "DispersedConv1d",
    "DispersedConv2d",
    "DispersedConv3d",
    "disperse_conv",
    "disperse_kernel",
    "dispersion_matrix",
]


def disperse_conv(conv: nn.Module, matrix: Tensor) -> nn.Module:
    """A plain ``nn.ConvNd`` with the dispersed kernel of ``conv``, and the padding that keeps the size.

    Raises:
        ValueError: ``conv`` is no convolution with odd, equal sizes and "same" padding.
    """
    original, _ = as_same_conv(conv)
    weight = disperse_kernel(original.weight, matrix)
    return make_conv(weight, original.bias, original.stride, "same", original.dilation, original.groups)


@part(
    "dispersed",
    paper="scalecrafter",
    kind="operator",
    dims=(1, 2, 3),
    mixes="space+channels",
    supports=("stride", "channels", "groups", "dilation"),
    merges="conv",
    mixer={"kernel_size": 3, "groups": "channels"},
    keywords="dispersed convolution ScaleCrafter kernel enlargement linear map higher resolution structure calibration",
)
class DispersedConv(SameConv):
    """A convolution with a larger kernel that is a fixed linear map of a small one: w' = R·vec(w).

    Args:
        in_channels: channels, divisible by ``groups``.
        out_channels: None is ``in_channels``.
        kernel_size: k of the learned kernel, odd, the same on every axis.
        stride, dilation, groups, bias: as in ``nn.ConvNd``.
        padding: "same", of the large kernel.
        large: k' of the applied kernel, odd; unset is k + 2.
        size, scale, eta, preserve_sum: of the map R, see :func:`dispersion_matrix`.

    Shape:
        (N, in_channels, L, …) → (N, out_channels, ⌈L / stride⌉, …).

    Raises:
        ValueError: an argument is out of range or not supported; the message names it.

    Example:
        >>> layer = DispersedConv2d(4, kernel_size=3)
        >>> layer.weight.shape, layer.merge().weight.shape
        (torch.Size([4, 4, 3, 3]), torch.Size([4, 4, 5, 5]))

    Reference: He et al., arXiv 2310.07702.
    """

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
        large: int | None = None,
        size: int = 3,
        scale: float = 2,
        eta: float = 0.05,
        preserve_sum: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device, dtype)
        small = self.kernel_size[0]
        check(set(self.kernel_size) == {small}, "kernel_size", kernel_size, "needs the same size on every axis")
        large = small + 2 if large is None else large
        # Neither parameter nor buffer: it follows from the arguments, keeps float64 and is no part of a checkpoint.
        self.matrix = dispersion_matrix(small, large, size, scale, eta, self.ndim, preserve_sum)

    def dispersed_weight(self) -> Tensor:
        """The kernel that is applied, (out, in/groups, k', …); differentiable."""
        return disperse_kernel(self.weight, self.matrix)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x`` with the dispersed kernel."""
        check_input(x, self.in_channels, self.ndim)
        return conv_nd(x, self.dispersed_weight(), self.bias, self.stride, "same", self.dilation, self.groups)

    def merge(self) -> nn.Module:
        """The same map as an ``nn.ConvNd`` with the large kernel."""
        return make_conv(self.dispersed_weight(), self.bias, self.stride, "same", self.dilation, self.groups)


class DispersedConv1d(DispersedConv):
    """Dispersed convolution over (N, C, L)."""

    ndim = 1


class DispersedConv2d(DispersedConv):
    """Dispersed convolution over (N, C, H, W)."""

    ndim = 2


class DispersedConv3d(DispersedConv):
    """Dispersed convolution over (N, C, D, H, W)."""

    ndim = 3
