"""The slow-fast neural encoding (SFNE) block of Terminator (Zhang 2024, arXiv 2401.17948).

With K the image-sized hyper-kernel, Z·Z·W(f) = (x ⊙ K) · f the matrix product of planes, and L1 … L4 local
convolutions with generated kernels:

    fast = IS(RGU₂(x ⊙ K) + RGU₁(x)),  mix = IS(P x),  hci = IS(gate(x));  o₁, o₂, o₃ = Z·Z·W of the three
    y = dropout(GELU(G-IBS(bottleneck[o₁, l₂, earlier, fast, o₂, l₁, σ(o₁)·o₁, l₃, o₃, l₄, earlier, gate(o₁; x)])) + b)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_positive
from torchconv.ops._common import Size, check_input, ntuple
from torchconv.ops._slow_net import LocalSlowNet, SlowNet
from torchconv.ops.terminator import hyperzzw_global
from torchconv.ops.terminator_units import (
    GIBS,
    RGU,
    HyperChannelInteract,
    HyperInteract,
    LocalConv,
    standardise,
)


class FastMultiBranch(nn.Module):
    """The branches of an SFNE block up to and with the bottleneck; see :class:`SFNEBlock`."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        size: tuple[int, ...],
        earlier: int,
        kernel_sizes: Sequence[int],
        global_hidden: int,
        global_layers: int,
        local_hidden: int,
        local_layers: int,
        channel_hidden: int,
        interact_hidden: tuple[int, int],
        gate_layers: int,
        omega_0: float,
        batch_stats: str,
    ) -> None:
        super().__init__()
        self.channels, self.earlier = channels, earlier
        context = "running" if batch_stats == "running" else "batch"
        self.slow_net_g = SlowNet(size, channels, global_hidden, global_layers, omega_0)
        for number, kernel_size in enumerate(kernel_sizes, 1):
            sizes = ntuple("kernel_sizes", kernel_size, 2)
            slow = LocalSlowNet(channels, sizes, local_hidden, local_layers, omega_0, context=context)
            setattr(self, f"slow_net_l{number}", slow)
            setattr(self, f"local_interact_conv_{number}", LocalConv(channels, batch_stats=batch_stats))
            setattr(self, f"bias{number}", nn.Parameter(torch.zeros(1)))
        self.Fast_Kernel_rgu = RGU(channels, size)
        self.Fast_Kernel_rgu_2 = RGU(channels, size)
        self.channel_mixer_mlp = nn.Conv2d(channels, channels, 1)
        self.channel_mixer_hci = HyperChannelInteract(channels, channel_hidden, gate_layers, omega_0)
        self.hyper_interact = HyperInteract(channels, size, *interact_hidden, gate_layers, gate_layers, omega_0)
        self.bottleneck_layer = nn.Conv2d((10 + earlier) * channels, out_channels, 1)

    def _local(self, number: int, context: Tensor, x: Tensor) -> Tensor:
        kernel = getattr(self, f"slow_net_l{number}")(context)
        y: Tensor = getattr(self, f"local_interact_conv_{number}")(kernel, x) + getattr(self, f"bias{number}")
        return y

    def _repeated(self, x: Tensor, size: Sequence[int]) -> Tensor:
        if x.dim() != 4 or tuple(x.shape[2:]) != tuple(size):
            raise ValueError(f"earlier features of shape {tuple(x.shape)}: expected (N, C, {size[0]}, {size[1]})")
        times, rest = divmod(self.channels, x.shape[1])
        if rest:
            raise ValueError(f"earlier features of {x.shape[1]} channels: must divide the block's {self.channels}")
        return x.repeat(1, times, 1, 1)

    def forward(self, x: Tensor, *earlier: Tensor) -> tuple[Tensor, Tensor]:
        """The compressed map and the global kernel."""
        kernel = self.slow_net_g(x.shape[2:])
        weighted = x * kernel
        fast = standardise(self.Fast_Kernel_rgu_2(weighted) + self.Fast_Kernel_rgu(x))
        mixed = standardise(self.channel_mixer_mlp(x))
        gated = standardise(self.channel_mixer_hci(x))
        first, second, third = (hyperzzw_global(x, kernel, f) for f in (fast, mixed, gated))
        interacted = self.hyper_interact(first, x)
        local = [self._local(n, *pair) for n, pair in enumerate(((x, gated), (gated, x), (mixed, x), (x, mixed)), 1)]
        previous = [self._repeated(t, x.shape[2:]) for t in earlier]
        branches = [
            first,
            local[1],
            *previous[:1],
            fast,
            second,
            local[0],
            torch.sigmoid(first) * first,
            local[2],
            third,
            local[3],
            *previous[1:],
            interacted,
        ]
        return self.bottleneck_layer(torch.cat(branches, 1)), kernel


class SFNEBlock(nn.Module):
    """Slow-fast neural encoding block; returns its map and its global hyper-kernel.

    Args:
        channels: C.
        factor: the output has C · ``factor`` channels, divisible by 12.
        size: of the map; at other sizes kernels are drawn anew and planes interpolated.
        earlier: number of maps of earlier blocks taken in, 0 to 2.
        kernel_sizes: of the four local branches.
        global_hidden, global_layers: of the slow net of the image-sized kernel.
        local_hidden, local_layers: of those of the local kernels.
        channel_hidden, interact_hidden, gate_layers: of those of the gates; ``interact_hidden`` over channels and
            positions.
        omega_0: base frequency of all slow nets.
        dropout: probability of dropping a channel.
        batch_stats: "batch" as published: in eval too, results depend on the other images of the batch; "running"
            takes running means in eval.

    Shape:
        x (N, C, H, W) and ``earlier`` maps of the same size, their channels dividing C → map (N, C · factor, H, W)
        and kernel (1, C, H, W).

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    def __init__(
        self,
        channels: int,
        factor: int,
        size: Size,
        earlier: int = 0,
        kernel_sizes: Sequence[int] = (3, 9, 5, 7),
        global_hidden: int = 64,
        global_layers: int = 2,
        local_hidden: int = 32,
        local_layers: int = 2,
        channel_hidden: int = 32,
        interact_hidden: tuple[int, int] = (16, 64),
        gate_layers: int = 2,
        omega_0: float = 1.0,
        dropout: float = 0.0,
        batch_stats: str = "batch",
    ) -> None:
        super().__init__()
        check_positive("channels", channels)
        check_positive("factor", factor)
        check(earlier in (0, 1, 2), "earlier", earlier, "a block takes in 0, 1 or 2 earlier maps")
        check(len(kernel_sizes) == 4, "kernel_sizes", tuple(kernel_sizes), "give four, one for each local branch")
        check(0 <= dropout < 1, "dropout", dropout, "must be at least 0 and below 1")
        self.channels, self.size = channels, ntuple("size", size, 2)
        self.earlier, self.dropout = earlier, dropout
        self.fast_multi_branch = FastMultiBranch(
            channels,
            channels * factor,
            self.size,
            earlier,
            kernel_sizes,
            global_hidden,
            global_layers,
            local_hidden,
            local_layers,
            channel_hidden,
            interact_hidden,
            gate_layers,
            omega_0,
            batch_stats,
        )
        self.g_ibs = GIBS(channels * factor, 12, batch_stats=batch_stats)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, *earlier: Tensor) -> tuple[Tensor, Tensor]:
        """The block's map and kernel."""
        check_input(x, self.channels, 2)
        if len(earlier) != self.earlier:
            raise ValueError(f"{len(earlier)} earlier maps given: the block takes earlier={self.earlier}")
        y, kernel = self.fast_multi_branch(x, *earlier)
        return F.dropout2d(F.gelu(self.g_ibs(y)) + self.bias, self.dropout, self.training), kernel
