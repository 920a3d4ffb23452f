"""Units of Terminator around its HyperZ·Z·W operators (Zhang 2024, arXiv 2401.17948): gates, RGU, G-IBS, slow loss.

gate over channels      x · σ(Z·Z·W(K, mean of x)),  Z·Z·W(K, y) = (y ⊙ K) ⊙ y
gate from another map   x · σ(s · c), over channels and positions
RGU                     P_y(GELU(IS(P_k x ⊙ P_q P_v x)) + b)
G-IBS                   groups of channels standardised over the batch and over the item in turn, no parameters
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive
from torchconv.catalog import part
from torchconv.kernels._layout import is_channels_last
from torchconv.ops._common import CONV, check_input, conv_nd
from torchconv.ops._slow_net import SlowNet, axes_of, freeze_kernels, plane_at, wide

BATCH_STATS = ("batch", "running")


def hyperzzw(kernel: Tensor, y: Tensor) -> Tensor:
    """(y ⊙ kernel) ⊙ y, shapes broadcast.

    Example:
        >>> hyperzzw(torch.tensor([2.0, 1.0]), torch.tensor([3.0, 4.0]))
        tensor([18., 16.])
    """
    return (y * kernel) * y


def standardise(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Mean 0 and variance 1 over the positions of every item and channel (instance norm without parameters).

    Example:
        >>> standardise(torch.tensor([[[1.0, 3.0]]]))
        tensor([[[-1.0000,  1.0000]]])
    """
    if x.numel() == 0:
        return x
    values = wide(x)
    if x.shape[2:].numel() > 1 and not is_channels_last(x):
        return F.instance_norm(values, eps=eps).to(x.dtype)  # one pass, but it knows one order in memory, and no point
    variance, mean = torch.var_mean(values, tuple(range(2, x.dim())), correction=0, keepdim=True)
    return ((values - mean) * torch.rsqrt(variance + eps)).to(x.dtype)


def slow_neural_loss(kernels: Sequence[Tensor], factors: Sequence[int]) -> Tensor:
    """The local feedback between blocks: Σ_{j<i} mean (tile(K_j) − K_i)², K_j repeated along channels to K_i's number.

    Args:
        kernels: K_0 … of the blocks, (1, C_i, H, W).
        factors: C_{t+1} / C_t of block t; the last is not needed.

    Raises:
        ValueError: there is no kernel, channels do not follow from the factors, or sizes differ.

    Example:
        >>> k = torch.ones(1, 2, 3, 3)
        >>> slow_neural_loss([k, k.repeat(1, 3, 1, 1)], [3]).item()
        0.0

    Reference: arXiv 2401.17948, slow neural loss.
    """
    check(len(kernels) > 0, "kernels", len(kernels), "give the kernel of at least one block")
    total = kernels[0].new_zeros(())
    for j, i in itertools.combinations(range(len(kernels)), 2):
        times = math.prod(factors[j:i])
        short, long = kernels[j].shape[1], kernels[i].shape[1]
        sizes = [tuple(kernels[k].shape[2:]) for k in (j, i)]
        check(sizes[0] == sizes[1], "kernels", sizes, "all blocks' kernels must have one size")
        check(short * times == long, "factors", tuple(factors), f"block {i} has {long} channels, block {j} {short}")
        tiled = kernels[i].unflatten(1, (times, short))
        total = total + (kernels[j].unsqueeze(1) - tiled).square().mean()
    return total


def _check_map(x: Tensor, channels: int) -> None:
    """``x`` has the channels and one to three spatial axes: a map of one channel would be broadcast in silence."""
    if not 3 <= x.dim() <= 5 or x.shape[1] != channels:
        raise ValueError(f"x of shape {tuple(x.shape)}: expected (N, {channels}) and one to three spatial axes")


def _means(x: Tensor) -> Tensor:
    """Mean over the positions, (N, 1, C)."""
    return x.mean(tuple(range(2, x.dim()))).unsqueeze(1)


def _spread(scores: Tensor, ndim: int) -> Tensor:
    """(N, 1, C) → (N, C, 1, …)."""
    return scores.reshape(scores.shape[0], scores.shape[2], *[1] * ndim)


@part(
    "hyper-channel",
    paper="terminator",
    kind="layer",
    dims=(1, 2, 3),
    merges="self",
    probe={"build": {"channels": 6, "hidden": 4}, "inputs": [[2, 6, 5, 4]]},
    keywords="channel gate attention hyper-kernel coordinate network",
)
class HyperChannelInteract(nn.Module):
    """Channel gate: x · σ(Z·Z·W(K, mean of x)), K a kernel over the channels from a slow net.

    Args:
        channels: C.
        hidden, num_layers, omega_0: of the slow net.

    Shape:
        (N, C, \\*spatial) → the same.

    Example:
        >>> HyperChannelInteract(6)(torch.zeros(2, 6, 5, 4)).shape
        torch.Size([2, 6, 5, 4])

    Reference: arXiv 2401.17948.
    """

    def __init__(
        self,
        channels: int,
        hidden: int = 32,
        num_layers: int = 2,
        omega_0: float = 1.0,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_positive("channels", channels)
        self.channels = channels
        self.slow_net_gc = SlowNet((channels,), 1, hidden, num_layers, omega_0, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Scale each channel of ``x``."""
        _check_map(x, self.channels)
        scores = hyperzzw(self.slow_net_gc(), _means(x))
        return x * torch.sigmoid(_spread(scores, x.dim() - 2))

    def merge(self) -> nn.Module:
        """The inference form: the kernel instead of the slow net that draws it."""
        merged = copy.deepcopy(self).eval()
        freeze_kernels(merged)
        return merged


@part(
    "hyper-interact",
    paper="terminator",
    kind="layer",
    dims=(1, 2, 3),
    probe={
        "build": {"channels": 6, "size": [5, 4], "channel_hidden": 4, "spatial_hidden": 3},
        "inputs": [[2, 6, 5, 4], [2, 6, 5, 4]],
    },
    keywords="channel and spatial gate attention hyper-kernel coordinate network",
)
class HyperInteract(nn.Module):
    """Gate from another map: x · σ(s · c), c over channels and s over positions, both Z·Z·W of the means of ``y``.

    Args:
        channels: C.
        size: of the map, one number an axis; at other sizes the spatial kernel is drawn anew.
        channel_hidden, spatial_hidden, channel_layers, spatial_layers, omega_0: of the slow nets.

    Shape:
        y, x: (N, C, \\*spatial) → the same.

    Reference: arXiv 2401.17948.
    """

    def __init__(
        self,
        channels: int,
        size: Sequence[int],
        channel_hidden: int = 16,
        spatial_hidden: int = 64,
        channel_layers: int = 2,
        spatial_layers: int = 2,
        omega_0: float = 1.0,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_positive("channels", channels)
        self.channels, self.size = channels, axes_of(size)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.slow_net_gc = SlowNet((channels,), 1, channel_hidden, channel_layers, omega_0, **options)
        self.slow_net_gs = SlowNet(self.size, 1, spatial_hidden, spatial_layers, omega_0, **options)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Scale ``x`` by the gate of ``y``."""
        check_input(x, self.channels, len(self.size))
        if y.shape[1:] != x.shape[1:]:
            raise ValueError(f"y of shape {tuple(y.shape)}: must be that of x, {tuple(x.shape)}")
        channel = _spread(hyperzzw(self.slow_net_gc(), _means(y)), y.dim() - 2)
        spatial = hyperzzw(self.slow_net_gs(y.shape[2:]), y.mean(1, keepdim=True))
        return x * torch.sigmoid(spatial * channel)


@part(
    "rgu",
    paper="terminator",
    kind="layer",
    dims=(1, 2, 3),
    probe={"build": {"channels": 6, "size": [5, 4]}, "inputs": [[2, 6, 5, 4]]},
    keywords="recursive gated unit multiplicative 1x1",
)
class RGU(nn.Module):
    """Recursive gated unit: P_y(GELU(IS(P_k x ⊙ P_q P_v x)) + b), P 1 × 1 convolutions and b a plane.

    Args:
        channels: C.
        size: of the map, one number an axis; for other sizes b is interpolated.

    Shape:
        (N, C, \\*spatial) → the same.

    Reference: arXiv 2401.17948.
    """

    def __init__(self, channels: int, size: Sequence[int], *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        check_positive("channels", channels)
        self.channels, self.size = channels, axes_of(size)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        conv = CONV[len(self.size)]
        self.fast_linear_k = conv(channels, channels, 1, **options)
        self.fast_linear_v = conv(channels, channels, 1, **options)
        self.fast_linear_q = conv(channels, channels, 1, **options)
        self.fast_linear_y = conv(channels, channels, 1, **options)
        self.fast_bias_p = nn.Parameter(torch.zeros(1, 1, *self.size, **options))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the unit."""
        check_input(x, self.channels, len(self.size))
        gated = self.fast_linear_k(x) * self.fast_linear_q(self.fast_linear_v(x))
        y: Tensor = self.fast_linear_y(F.gelu(standardise(gated)) + plane_at(self.fast_bias_p, x.shape[2:]))
        return y


@part(
    "g-ibs",
    paper="terminator",
    kind="layer",
    dims=(1, 2, 3),
    probe={"build": {"channels": 24}, "inputs": [[3, 24, 5, 4]]},
    keywords="group instance batch standardisation normalisation without parameters",
)
class GIBS(nn.Module):
    """Group-based instance and batch standardisation: groups of channels in turn over the batch and over the item.

    Groups 0, 2, 4 … get mean 0 and variance 1 over the batch, groups 1, 3, 5 … over each item. No parameters.

    Args:
        channels: C, divisible by ``groups``.
        groups: number of groups.
        batch_stats: "batch" as published uses the statistics of the batch in eval too; "running" running ones.
        momentum: of the running statistics.
        eps: added to the variance.

    Shape:
        (N, C, \\*spatial) → the same.

    Raises:
        ValueError: channels that do not divide.

    Reference: arXiv 2401.17948.
    """

    batch_groups: Tensor

    def __init__(
        self,
        channels: int,
        groups: int = 12,
        *,
        batch_stats: str = "batch",
        momentum: float = 0.1,
        eps: float = 1e-5,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_positive("groups", groups)
        check_positive("channels", channels)
        check(channels % groups == 0, "channels", channels, f"must be divisible by groups={groups}")
        check_choice("batch_stats", batch_stats, BATCH_STATS)
        self.channels, self.groups, self.batch_stats = channels, groups, batch_stats
        self.momentum, self.eps = momentum, eps
        group = torch.arange(channels, device=device) // (channels // groups)
        self.register_buffer("batch_groups", group % 2 == 0, persistent=False)
        running = batch_stats == "running"
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.running_mean: Tensor | None
        self.running_var: Tensor | None
        self.register_buffer("running_mean", torch.zeros(channels, **options) if running else None)
        self.register_buffer("running_var", torch.ones(channels, **options) if running else None)

    def forward(self, x: Tensor) -> Tensor:
        """Standardise ``x``."""
        _check_map(x, self.channels)
        if x.numel() == 0:  # has no statistics, and must not spoil the running ones
            return x
        values = wide(x)
        # One pass for the statistics of every item; those of the batch follow, its variance being the mean of the
        # items' variances plus the variance of their means.
        variance, mean = torch.var_mean(values, tuple(range(2, x.dim())), correction=0)
        if self.running_mean is not None and self.running_var is not None and not self.training:
            batch_mean, batch_variance = self.running_mean[None], self.running_var[None]
        else:
            spread, batch_mean = torch.var_mean(mean, 0, correction=0, keepdim=True)
            batch_variance = variance.mean(0, keepdim=True) + spread
            self._remember(batch_mean[0], batch_variance[0], x)
        mean = torch.where(self.batch_groups, batch_mean, mean)
        scale = torch.rsqrt(torch.where(self.batch_groups, batch_variance, variance) + self.eps)
        shape = (*mean.shape, *[1] * (x.dim() - 2))
        return ((values - mean.reshape(shape)) * scale.reshape(shape)).to(x.dtype)

    def _remember(self, mean: Tensor, variance: Tensor, x: Tensor) -> None:
        if self.running_mean is not None and self.running_var is not None:
            count = x.numel() // x.shape[1]
            unbiased = variance.detach() * (count / max(1, count - 1))
            self.running_mean.lerp_(mean.detach().to(self.running_mean), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var), self.momentum)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"{self.channels}, groups={self.groups}, batch_stats={self.batch_stats!r}"


class LocalConv(nn.Module):
    """GELU(BS(P(depthwise convolution of x))) with kernels given in the call; BS as :class:`GIBS`'s batch groups.

    Args:
        channels: C of map and kernels.
        ndim: spatial axes.
        batch_stats: see :class:`GIBS`.

    Shape:
        kernel (C, 1, \\*k), x (N, C, \\*spatial) → as x.

    Reference: arXiv 2401.17948.
    """

    def __init__(
        self, channels: int, ndim: int = 2, *, batch_stats: str = "batch", device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        check(ndim in (1, 2, 3), "ndim", ndim, "maps have one to three spatial axes")
        self.channels = channels
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.channel_mixer = CONV[ndim](channels, channels, 1, **options)
        self.norm = GIBS(channels, 1, batch_stats=batch_stats, **options)

    def forward(self, kernel: Tensor, x: Tensor) -> Tensor:
        """Convolve ``x``, mix its channels, standardise over the batch."""
        _check_map(x, self.channels)
        if kernel.dim() != x.dim() or tuple(kernel.shape[:2]) != (self.channels, 1):
            raise ValueError(f"kernel of shape {tuple(kernel.shape)}: expected ({self.channels}, 1, *k) for such an x")
        mixed = self.channel_mixer(conv_nd(x, kernel, padding="same", groups=x.shape[1]))
        return F.gelu(self.norm(mixed))
