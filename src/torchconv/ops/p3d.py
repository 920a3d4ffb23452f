"""Pseudo-3-D convolution: a convolution in space and one in time, wired in three ways, in place of a 3-D kernel.

Qiu, Yao, Mei 2017, "Learning Spatio-Temporal Representation with Pseudo-3D Residual Networks", ICCV, arXiv 1711.10305.

With S a 1 × k × k convolution over each frame and T a k × 1 × 1 convolution over time:

    A   y = T(S(x))            in series
    B   y = S(x) + T(x)        in parallel
    C   y = S(x) + T(S(x))     in series with a shortcut

Without nonlinearity between (the default) each form is one 3-D kernel of low rank, which :meth:`P3DConv3d.merge` gives.
With ``nonlinear=True`` it is the middle of the published bottleneck, batch norms and ReLUs included.
k²·C_in·C_out/g + k·C_out²/g parameters (B: k·C_in·C_out/g for T), as many multiply-adds a position: 12/27 of 3 × 3 × 3.
Both are computed as 2-D convolutions, S with time in the batch and T on maps of T × (H·W).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check_choice
from torchconv.catalog import part
from torchconv.kernels._layout import keep_layout
from torchconv.ops._common import (
    BatchNorm,
    Padding,
    Size,
    check_channels,
    check_input,
    check_padding,
    dilate_kernel,
    fold_bn,
    make_conv,
    ntuple,
    resolve_padding,
)
from torchconv.ops._p3d_factors import SPACE, TIME, space_conv, time_conv

FORMS = ("A", "B", "C")
DIALECTS = ("caffe", "port")


def wire(
    x: Tensor,
    space: Callable[[Tensor], Tensor],
    time: Callable[[Tensor], Tensor],
    form: str = "A",
    join: Callable[[Tensor, Tensor], Tensor] = torch.add,
) -> Tensor:
    """The three forms, for any S and T: A is T(S(x)), B joins S(x) and T(x), C joins S(x) and T(S(x)).

    Args:
        x: a clip.
        space, time: S and T.
        form: "A", "B" or "C".
        join: of two clips of one shape, a sum by default.

    Raises:
        ValueError: an unknown form.

    Example:
        >>> wire(torch.tensor([2.0]), lambda x: 10 * x, lambda x: x + 1, "C")
        tensor([41.])

    Reference: arXiv 1711.10305, figure 2.
    """
    check_choice("form", form, FORMS)
    s = space(x)
    if form == "A":
        return time(s)
    return join(s, time(x if form == "B" else s))


def activated(
    x: Tensor,
    space: Callable[[Tensor], Tensor],
    time: Callable[[Tensor], Tensor],
    form: str = "A",
    dialect: str = "caffe",
    shortcut: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The middle of the published bottleneck; ``space`` and ``time`` are convolution and batch norm.

    With s = relu(space(x)) and t = time(s), in form B time(x):

    | form | "caffe" (the authors' graph) | "port" (the PyTorch port) |
    |------|-----------------------------|---------------------------|
    | A    | relu(t)                     | relu(t)                   |
    | B    | relu(s + t)                 | s + relu(t)               |
    | C    | relu(s/2 + t/2)             | s + relu(t)               |

    Args:
        x: a clip.
        space, time: S and T, each with its batch norm.
        form: "A", "B" or "C".
        dialect: "caffe" or "port"; weights trained in one are not weights of the other.
        shortcut: what s passes on its way around T in form C; nothing unless given.

    Raises:
        ValueError: an unknown form or dialect.

    Reference: arXiv 1711.10305, section 3.2.
    """
    check_choice("dialect", dialect, DIALECTS)

    def join(s: Tensor, t: Tensor) -> Tensor:
        s = s if shortcut is None or form == "B" else shortcut(s)
        if dialect == "port":
            return s + F.relu(t)
        return F.relu(s + t) if form == "B" else F.relu((s + t) / 2)

    y = wire(x, lambda z: F.relu(space(z)), time, form, join)
    return F.relu(y) if form == "A" else y


def p3d_conv(
    x: Tensor,
    space: Tensor,
    time: Tensor,
    bias: Tensor | None = None,
    form: str = "A",
    stride: Size = 1,
    padding: Padding = "same",
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """Pseudo-3-D convolution without nonlinearity.

    Args:
        x: a clip.
        space: S, (O, C/groups, 1, kh, kw).
        time: T, (O, O/groups, kt, 1, 1); in form B (O, C/groups, kt, 1, 1).
        bias: (O,) or None, added at the end.
        form: "A", "B" or "C".
        stride, padding, dilation: of the 3-D convolution that this stands for.
        groups: blocks of channels that do not see each other.

    Shape:
        (N, C, T, H, W) → (N, O, T', H', W').

    Raises:
        ValueError: an unknown form, a wrong size or padding.

    Example:
        >>> p3d_conv(torch.zeros(1, 2, 5, 6, 6), torch.zeros(4, 2, 1, 3, 3), torch.zeros(4, 4, 3, 1, 1)).shape
        torch.Size([1, 4, 5, 6, 6])

    Reference: arXiv 1711.10305, section 3.1.
    """
    place = _Placement((time.shape[2], *space.shape[3:]), stride, padding, dilation, groups)
    y = wire(
        x,
        lambda z: place.space(z, space, None, form),
        lambda z: place.time(z, time, None, form),
        form,
        lambda s, t: (place.centre(s, TIME) if form == "C" else s) + t,
    )
    return y if bias is None else y + bias.reshape(-1, 1, 1, 1)


class _Placement:
    """Stride, padding and dilation of a 3-D convolution, handed out to its two factors."""

    def __init__(self, kernel_size: Sequence[int], stride: Size, padding: Padding, dilation: Size, groups: int) -> None:
        self.kernel_size = tuple(int(k) for k in kernel_size)
        self.stride, self.dilation = ntuple("stride", stride, 3), ntuple("dilation", dilation, 3)
        self.pads = resolve_padding(padding, self.kernel_size, self.dilation)
        self.groups = groups

    def space(self, x: Tensor, weight: Tensor, bias: Tensor | None, form: str) -> Tensor:
        """S; in form B at the times that the whole convolution keeps."""
        x = self.centre(x, TIME) if form == "B" else x
        x = self._pad(x, SPACE)
        return space_conv(x, weight, bias, self.stride[1:], 0, self.dilation[1:], self.groups)

    def time(self, x: Tensor, weight: Tensor, bias: Tensor | None, form: str) -> Tensor:
        """T; in form B at the places that the whole convolution keeps."""
        x = self.centre(x, SPACE) if form == "B" else x
        x = self._pad(x, TIME)
        return time_conv(x, weight, bias, self.stride[0], 0, self.dilation[0], self.groups)

    def centre(self, x: Tensor, axes: tuple[int, ...]) -> Tensor:
        """What a kernel that is one at its centre tap and zero elsewhere makes of ``x`` along ``axes``."""
        x = self._pad(x, axes, inside=True)
        y = x
        for axis in axes:
            step = self.stride[axis - 2]
            if step > 1:
                y = y[(slice(None),) * axis + (slice(None, None, step),)]
        return keep_layout(y, x)

    def _pad(self, x: Tensor, axes: tuple[int, ...], inside: bool = False) -> Tensor:
        amounts = []
        for axis in (4, 3, 2):
            before, after = self.pads[axis - 2] if axis in axes else (0, 0)
            if inside and axis in axes:
                reach = self.dilation[axis - 2] * (self.kernel_size[axis - 2] - 1)
                before, after = before - reach // 2, after - (reach - reach // 2)
                if x.shape[axis] + before + after < 0:
                    raise ValueError(f"x of shape {tuple(x.shape)}: smaller than the kernel {self.kernel_size}; pad it")
            amounts += [before, after]
        return F.pad(x, amounts) if any(amounts) else x


@part(
    "p3d",
    paper="p3d",
    kind="operator",
    dims=(3,),
    mixes="space+channels",
    supports=("stride", "channels", "groups", "dilation", "even", "padding"),
    merges="conv",
    mixer={"kernel_size": 3},
    keywords="pseudo-3D factorised spatio-temporal video convolution separable R(2+1)D action recognition volumes",
)
class P3DConv3d(nn.Module):
    """Pseudo-3-D convolution in place of ``nn.Conv3d``: space, then time, in form A, B or C.

    Args:
        in_channels, out_channels: channels, both divisible by ``groups``; unset ``out_channels`` is ``in_channels``.
        kernel_size, stride, padding, dilation: as in ``nn.Conv3d``, odd or even; "same" gives ceil(L / stride).
        groups: blocks of channels that do not see each other.
        bias: learn an additive bias; with ``nonlinear`` the batch norms have their own.
        form: "A" in series, "B" in parallel, "C" in series with a shortcut.
        nonlinear: batch norms and ReLUs as in the published bottleneck (see :func:`activated`), a ReLU at the end.
        dialect: of ``nonlinear``, "caffe" or "port".

    Shape:
        (N, in_channels, T, H, W) → (N, out_channels, T', H', W').

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> layer = P3DConv3d(4, 6, 3, stride=(1, 2, 2), form="C")
        >>> layer(torch.zeros(1, 4, 5, 8, 8)).shape, tuple(layer.merge().weight.shape)
        (torch.Size([1, 6, 5, 4, 4]), (6, 4, 3, 3, 3))

    Reference: Qiu et al., arXiv 1711.10305.
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
        form: str = "A",
        nonlinear: bool = False,
        dialect: str = "caffe",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        check_channels(in_channels, out_channels, groups)
        check_padding(padding, 3)
        check_choice("form", form, FORMS)
        check_choice("dialect", dialect, DIALECTS)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = kt, kh, kw = ntuple("kernel_size", kernel_size, 3)
        self.stride, self.dilation = ntuple("stride", stride, 3), ntuple("dilation", dilation, 3)
        self.padding, self.form, self.nonlinear, self.dialect = padding, form, nonlinear, dialect
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        between = in_channels if form == "B" else out_channels
        factors: dict[str, Any] = {"groups": groups, "bias": False, **options}
        self.space = nn.Conv3d(in_channels, out_channels, (1, kh, kw), **factors)
        self.time = nn.Conv3d(between, out_channels, (kt, 1, 1), **factors)
        self.bn_space = nn.BatchNorm3d(out_channels, **options) if nonlinear else nn.Identity()
        self.bn_time = nn.BatchNorm3d(out_channels, **options) if nonlinear else nn.Identity()
        has_bias = bias and not nonlinear
        self.bias = nn.Parameter(torch.zeros(out_channels, **options)) if has_bias else None

    def reset_parameters(self) -> None:
        """PyTorch's defaults in both convolutions, a zero bias."""
        for layer in (self.space, self.time, self.bn_space, self.bn_time):
            if not isinstance(layer, nn.Identity):
                layer.reset_parameters()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x``."""
        check_input(x, self.in_channels, 3)
        size = (self.kernel_size, self.stride, self.padding, self.dilation, self.groups)
        if not self.nonlinear:
            return p3d_conv(x, self.space.weight, self.time.weight, self.bias, self.form, *size[1:])
        place = _Placement(*size)
        return activated(
            x,
            lambda z: self.bn_space(place.space(z, self.space.weight, self.space.bias, self.form)),
            lambda z: self.bn_time(place.time(z, self.time.weight, self.time.bias, self.form)),
            self.form,
            self.dialect,
            lambda s: place.centre(s, TIME),
        )

    def merge(self) -> nn.Module:
        """One ``nn.Conv3d`` with the product kernel; with ``nonlinear`` the same form with its batch norms folded in.

        The dense kernel has 27/12 of the multiply-adds at k = 3: keep the factors for speed.
        """
        if self.nonlinear:
            twin = copy.deepcopy(self).eval()
            fold_in(twin, "space", "bn_space")
            fold_in(twin, "time", "bn_time")
            return twin
        space, time, dilation = self.space.weight.detach(), self.time.weight.detach(), self.dilation
        reach = [d * (k - 1) for d, k in zip(dilation, self.kernel_size, strict=True)]
        if self.form != "A" and any(r // 2 % d for r, d in zip(reach, dilation, strict=True)):
            # An even number of spread taps has none at the centre: write the zeros between them out.
            space, time = dilate_kernel(space, (1, *dilation[1:])), dilate_kernel(time, (dilation[0], 1, 1))
            dilation = (1, 1, 1)
        kt, kh, kw = time.shape[2], *space.shape[3:]
        ct, ch, cw = (r // 2 // d for r, d in zip(reach, dilation, strict=True))
        weight = space.new_zeros(self.out_channels, self.in_channels // self.groups, kt, kh, kw)
        if self.form == "B":
            weight[:, :, :, ch, cw] += time[..., 0, 0]
        else:
            s, t = space.squeeze(2).unflatten(0, (self.groups, -1)), time.flatten(2).unflatten(0, (self.groups, -1))
            weight += torch.einsum("gomt,gmihw->goithw", t, s).flatten(0, 1)
        if self.form != "A":
            weight[:, :, ct] += space.squeeze(2)
        return make_conv(weight, self.bias, self.stride, self.padding, dilation, self.groups)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding!r}, dilation={self.dilation}, groups={self.groups}, "
            f"form={self.form!r}, nonlinear={self.nonlinear}, dialect={self.dialect!r}"
        )


def fold_in(module: nn.Module, conv: str, norm: str) -> None:
    """Put the batch norm after a convolution of ``module`` into it, where both are still what they were built as."""
    layer: Any = module.get_submodule(conv)
    bn = module.get_submodule(norm)
    if type(layer) in (nn.Conv2d, nn.Conv3d) and isinstance(bn, BatchNorm):
        layer.weight, layer.bias = (nn.Parameter(t) for t in fold_bn(layer.weight, layer.bias, bn))
        setattr(module, norm, nn.Identity())
