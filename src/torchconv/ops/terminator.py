"""HyperZ·Z·W: kernels from coordinate networks, made content-dependent by the activations that they then act on.

Zhang 2024, "HyperZ·Z·W Operator Connects Slow-Fast Networks for Full Context Interaction", arXiv 2401.17948.

A slow net draws a kernel W from coordinates; activations Z scale it element by element, and Z·W acts on Z again:

    channels, positions   Z·Z·W(k, y) = (y ⊙ k) ⊙ y
    global                (x ⊙ K_G) · f, a matrix product over the H × W plane of each channel
    local                 depthwise convolution with kernels whose slow net the pooled activations scale

A local layer's C·k^n taps come from O(L·h² + C·h) parameters of its slow net; it costs k^n·C + C·C_out multiply-adds a
position, a global one C² a position and C·H·W·min(H, W) an image. Slow nets run once a forward, whatever the batch.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive
from torchconv.catalog import part
from torchconv.ops._common import (
    CONV,
    Padding,
    Size,
    check_depthwise,
    check_input,
    check_padding,
    check_same,
    check_unit,
    conv_nd,
    make_conv,
    ntuple,
)
from torchconv.ops._slow_net import CONTEXTS, LocalSlowNet, SlowNet
from torchconv.ops.atconv import attentive_conv
from torchconv.ops.terminator_units import standardise


def hyperzzw_global(x: Tensor, kernel: Tensor, features: Tensor) -> Tensor:
    """(x ⊙ kernel) · features, the matrix product of the H × W planes of each channel.

    y[n, c, i, j] = Σ_t x[n, c, i, t] · kernel[c, i, t] · features[n, c, t, j], t below min(H, W): the published
    operator is for H = W; planes that are not square are multiplied as if filled up with zeros.

    Args:
        x, features: (N, C, H, W).
        kernel: (1 or N, C, H, W).

    Raises:
        ValueError: ``x`` has other axes.

    Example:
        >>> x = torch.arange(4.0).reshape(1, 1, 2, 2)
        >>> hyperzzw_global(x, torch.ones(1, 1, 2, 2), torch.eye(2).reshape(1, 1, 2, 2))
        tensor([[[[0., 1.],
                  [2., 3.]]]])

    Reference: arXiv 2401.17948, section 3.
    """
    if x.dim() != 4:
        raise ValueError(f"x of shape {tuple(x.shape)}: expected (N, C, H, W)")
    shared = min(x.shape[2], x.shape[3])
    return torch.matmul((x * kernel)[..., :shared], features[:, :, :shared])


@part(
    "terminator",
    paper="terminator",
    kind="operator",
    dims=(1, 2, 3),
    mixes="space+channels",
    supports=("stride", "channels", "dilation", "even", "padding"),
    merges="self",
    mixer={"kernel_size": 7},
    keywords="hyper-kernel implicit kernel coordinate network slow fast dynamic depthwise HyperZZW local",
)
class HyperZZWConv(nn.Module):
    """Local HyperZ·Z·W: depthwise kernels from a slow net that the pooled input scales, then a 1 × 1 convolution.

    Args:
        in_channels, out_channels: ``out_channels`` unset is ``in_channels``.
        kernel_size: odd or even, ≥ 1; the slow net's parameters hardly depend on it.
        stride, padding, dilation: of the depthwise convolution; published: 1, "same", 1.
        groups: 1, the 1 × 1 convolution mixes all channels.
        bias: of the 1 × 1 convolution; the slow net keeps its own.
        hidden, num_layers, omega_0: of the slow net: width h, depth L, base frequency.
        context: what the input is averaged over before it scales the kernel: "running" the batch in training, its
            running mean in eval; "image" each image alone; "batch" the batch at hand, in eval too, as published.
        detach: as published, no gradient through the first term of the slow net's re-normalisation. Here False, so
            that gradients are those of the function.

    Shape:
        (N, in_channels, \\*spatial) → (N, out_channels, \\*spatial').

    Raises:
        ValueError: an argument is out of range or not supported; the message names it.

    Example:
        >>> layer = HyperZZWConv2d(6, 8, 7, stride=2)
        >>> layer(torch.zeros(2, 6, 5, 4)).shape
        torch.Size([2, 8, 3, 2])

    Reference: Zhang, arXiv 2401.17948, local branch; batch standardisation and GELU after it are left to the network.
    """

    ndim: ClassVar[int] = 0

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_size: Size = 7,
        stride: Size = 1,
        padding: Padding = "same",
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        hidden: int = 32,
        num_layers: int = 2,
        omega_0: float = 1.0,
        context: str = "running",
        detach: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        check_positive("in_channels", in_channels)
        check_positive("out_channels", out_channels)
        check(groups == 1, "groups", groups, "HyperZ·Z·W's 1×1 convolution mixes all channels; leave groups at 1")
        check_padding(padding, self.ndim)
        check_choice("context", context, CONTEXTS)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size = ntuple("kernel_size", kernel_size, self.ndim)
        self.stride = ntuple("stride", stride, self.ndim)
        self.dilation = ntuple("dilation", dilation, self.ndim)
        self.padding = padding
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.slow_net = LocalSlowNet(
            in_channels, self.kernel_size, hidden, num_layers, omega_0, context=context, detach=detach, **options
        )
        self.channel_mixer = CONV[self.ndim](in_channels, out_channels, 1, bias=bias, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Make the kernels for ``x``, convolve, mix channels."""
        check_input(x, self.in_channels, self.ndim)
        kernel = self.slow_net(x)
        where = (self.stride, self.padding, self.dilation)
        if self.slow_net.context == "image":
            mixed = attentive_conv(x, kernel, *where)
        else:
            mixed = conv_nd(x, kernel, None, *where, self.in_channels)
        y: Tensor = self.channel_mixer(mixed)
        return y

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """The depthwise and the 1 × 1 convolution that it is in eval mode.

        Raises:
            ValueError: ``context`` is not "running", so that kernels depend on the input in eval mode.
        """
        mean = self.slow_net.running_context
        if mean is None:
            raise ValueError(f"context={self.slow_net.context!r}: kernels depend on the input; use context='running'")
        kernel = self.slow_net.Kernel(mean).transpose(0, 1)
        depthwise = make_conv(kernel, None, self.stride, self.padding, self.dilation, self.in_channels)
        return nn.Sequential(depthwise, copy.deepcopy(self.channel_mixer)).eval()

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding!r}, dilation={self.dilation}"
        )


class HyperZZWConv1d(HyperZZWConv):
    """Local HyperZ·Z·W over (N, C, L)."""

    ndim = 1


class HyperZZWConv2d(HyperZZWConv):
    """Local HyperZ·Z·W over (N, C, H, W)."""

    ndim = 2


class HyperZZWConv3d(HyperZZWConv):
    """Local HyperZ·Z·W over (N, C, D, H, W)."""

    ndim = 3


@part(
    "terminator-global",
    paper="terminator",
    kind="operator",
    dims=(2,),
    mixes="space+channels",
    supports=("even",),
    mixer={"kernel_size": 16},
    keywords="hyper-kernel global context image-sized kernel matrix product coordinate network HyperZZW long range",
)
class HyperZZWGlobal2d(nn.Module):
    """Global HyperZ·Z·W: (x ⊙ K) · IS(P x), a matrix product of image planes with an image-sized hyper-kernel K.

    Args:
        in_channels, out_channels: C; ``out_channels`` unset or equal.
        kernel_size: size at which the slow net's plane is kept; the kernel is drawn at the size of the map.
        stride, padding, dilation, groups: 1, "same", 1 and 1 only: it works on the whole map.
        bias: of the 1 × 1 convolution P before the standardisation, which takes it away again where the map is not
            constant; kept for the authors' form.
        hidden, num_layers, omega_0: of the slow net.

    Shape:
        (N, C, H, W) → the same. H = W as published; see :func:`hyperzzw_global` for others.

    Raises:
        ValueError: an argument is out of range or not supported; the message names it.

    Example:
        >>> HyperZZWGlobal2d(6, kernel_size=8)(torch.zeros(2, 6, 5, 5)).shape
        torch.Size([2, 6, 5, 5])

    Reference: Zhang, arXiv 2401.17948, global branch.
    """

    ndim: ClassVar[int] = 2

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_size: Size = 16,
        stride: Size = 1,
        padding: Padding = "same",
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        hidden: int = 32,
        num_layers: int = 2,
        omega_0: float = 1.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        name = "global HyperZ·Z·W"
        check_depthwise(in_channels, out_channels, None, name)
        check(groups == 1, "groups", groups, f"{name} mixes all channels first; leave groups at 1")
        self.in_channels = self.out_channels = in_channels
        self.kernel_size = ntuple("kernel_size", kernel_size, 2)
        check_unit("stride", stride, 2, name, "follow it with a strided 1×1 convolution")
        check_unit("dilation", dilation, 2, name, "it sees the whole map already")
        check_padding(padding, 2)
        check_same(padding, self.kernel_size, name)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.slow_net = SlowNet(self.kernel_size, in_channels, hidden, num_layers, omega_0, **options)
        self.channel_mixer = nn.Conv2d(in_channels, in_channels, 1, bias=bias, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply the planes."""
        check_input(x, self.in_channels, 2)
        y = hyperzzw_global(x, self.slow_net(x.shape[2:]), standardise(self.channel_mixer(x)))
        if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
            y = y.contiguous(memory_format=torch.channels_last)
        return y

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"{self.in_channels}, kernel_size={self.kernel_size}"
