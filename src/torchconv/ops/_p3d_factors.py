"""The two factors of a pseudo-3-D convolution, both computed as 2-D convolutions.

Qiu, Yao, Mei 2017, "Learning Spatio-Temporal Representation with Pseudo-3D Residual Networks", ICCV, arXiv 1711.10305.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from torchconv._common import check
from torchconv.kernels._layout import keep_layout
from torchconv.ops._common import Padding, Size, conv_nd, ntuple

TIME, SPACE = (2,), (3, 4)


def space_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Padding = "same",
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """The same 2-D convolution on every frame, computed with time in the batch.

    Args:
        x: a clip.
        weight: (O, C/groups, 1, kh, kw), with ``bias`` (O,) or None.
        stride, padding, dilation: of the two spatial axes.
        groups: blocks of channels that do not see each other.

    Shape:
        (N, C, T, H, W) → (N, O, T, H', W').

    Raises:
        ValueError: a weight that reaches over time.

    Example:
        >>> import torch
        >>> space_conv(torch.zeros(1, 2, 5, 6, 6), torch.zeros(3, 2, 1, 3, 3), stride=2).shape
        torch.Size([1, 3, 5, 3, 3])

    Reference: arXiv 1711.10305, section 3.1.
    """
    spatial = weight.dim() == 5 and weight.shape[2] == 1
    check(spatial, "weight", tuple(weight.shape), "a convolution in space has the shape (O, C/groups, 1, kh, kw)")
    batch, frames = x.shape[0], x.shape[2]
    flat = x.transpose(1, 2).reshape(batch * frames, x.shape[1], *x.shape[3:])
    y = conv_nd(flat, weight.squeeze(2), bias, stride, padding, dilation, groups)
    return keep_layout(y.reshape(batch, frames, *y.shape[1:]).transpose(1, 2), x)


def time_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: Padding = "same",
    dilation: int = 1,
    groups: int = 1,
) -> Tensor:
    """The same 1-D convolution over time at every place, computed as a k × 1 convolution on maps of T × (H·W).

    Args:
        x: a clip.
        weight: (O, C/groups, k, 1, 1), with ``bias`` (O,) or None.
        stride, padding, dilation: of the time axis; "same", "valid" or an integer.
        groups: blocks of channels that do not see each other.

    Shape:
        (N, C, T, H, W) → (N, O, T', H, W).

    Raises:
        ValueError: a weight that reaches over space.

    Example:
        >>> import torch
        >>> time_conv(torch.ones(1, 1, 4, 1, 1), torch.ones(1, 1, 3, 1, 1)).flatten()
        tensor([2., 3., 3., 2.])

    Reference: arXiv 1711.10305, section 3.1.
    """
    temporal = weight.dim() == 5 and tuple(weight.shape[3:]) == (1, 1)
    check(temporal, "weight", tuple(weight.shape), "a convolution in time has the shape (O, C/groups, k, 1, 1)")
    pad: Padding = padding if isinstance(padding, str) else (*ntuple("padding", padding, 1, least=0), 0)
    y = conv_nd(x.flatten(3), weight.flatten(3), bias, (stride, 1), pad, (dilation, 1), groups)
    return y.reshape(*y.shape[:3], *x.shape[3:])


def apply_space(conv: nn.Module, x: Tensor) -> Tensor:
    """What ``conv(x)`` gives, by :func:`space_conv` where it is a plain 1 × k × k convolution that nobody looks at."""
    if not _leaves(conv, TIME):
        y: Tensor = conv(x)
        return y
    own: Any = conv
    return space_conv(x, own.weight, own.bias, own.stride[1:], own.padding[1:], own.dilation[1:], own.groups)


def apply_time(conv: nn.Module, x: Tensor) -> Tensor:
    """What ``conv(x)`` gives, by :func:`time_conv` where it is a plain k × 1 × 1 convolution that nobody looks at."""
    if not _leaves(conv, SPACE):
        y: Tensor = conv(x)
        return y
    own: Any = conv
    return time_conv(x, own.weight, own.bias, own.stride[0], own.padding[0], own.dilation[0], own.groups)


def _leaves(conv: nn.Module, axes: tuple[int, ...]) -> bool:
    """A plain convolution that does nothing along ``axes``, without hooks, which only a call sees."""
    if type(conv) is not nn.Conv3d or conv._forward_hooks or conv._forward_pre_hooks:
        return False
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return False
    return all((conv.kernel_size[a - 2], conv.stride[a - 2], conv.padding[a - 2]) == (1, 1, 0) for a in axes)
