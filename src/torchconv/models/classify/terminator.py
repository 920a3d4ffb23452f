"""Terminator: blocks of global and local HyperZ·Z·W branches, without residuals (Zhang 2024, arXiv 2401.17948).

A slow-fast neural encoding (SFNE) block multiplies the planes of its input by an image-sized hyper-kernel (three
global branches), convolves them with small ones (four local branches), gates them, concatenates everything with
features of earlier blocks and compresses it by one 1 × 1 convolution. Blocks, a mean over the map, one linear layer.
1,336,855 parameters for 32 × 32 images and 10 classes. Parameter names are those of the authors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_positive
from torchconv.catalog import part
from torchconv.ops._common import Size, ntuple
from torchconv.ops._slow_net import KernelNet, LocalSlowNet, SlowNet, freeze_kernels
from torchconv.ops.terminator import hyperzzw_global
from torchconv.ops.terminator_units import (
    GIBS,
    RGU,
    HyperChannelInteract,
    HyperInteract,
    LocalConv,
    slow_neural_loss,
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

    def _repeated(self, x: Tensor) -> Tensor:
        times, rest = divmod(self.channels, x.shape[1])
        if rest:
            raise ValueError(f"earlier features of {x.shape[1]} channels: must divide the block's {self.channels}")
        return x.repeat(1, times, 1, 1)

    def forward(self, x: Tensor, *earlier: Tensor) -> tuple[Tensor, Tensor]:
        """The compressed map and the global kernel."""
        kernel = self.slow_net_g()
        weighted = x * kernel
        fast = standardise(self.Fast_Kernel_rgu_2(weighted) + self.Fast_Kernel_rgu(x))
        mixed = standardise(self.channel_mixer_mlp(x))
        gated = standardise(self.channel_mixer_hci(x))
        first, second, third = (hyperzzw_global(x, kernel, f) for f in (fast, mixed, gated))
        interacted = self.hyper_interact(first, x)
        local = [self._local(n, *pair) for n, pair in enumerate(((x, gated), (gated, x), (mixed, x), (x, mixed)), 1)]
        previous = [self._repeated(t) for t in earlier]
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
        size: of the map.
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
        x (N, C, \\*size) and ``earlier`` maps of the same size, their channels dividing C → map (N, C · factor,
        \\*size) and kernel (1, C, \\*size).

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
        self.size = ntuple("size", size, 2)
        check(self.size[0] == self.size[1], "size", size, "planes are multiplied as matrices, so that H = W")
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
        if tuple(x.shape[2:]) != self.size:
            raise ValueError(f"x of shape {tuple(x.shape)}: the kernels are for maps of {self.size}; set img_size")
        if len(earlier) != self.earlier:
            raise ValueError(f"{len(earlier)} earlier maps given: the block takes earlier={self.earlier}")
        y, kernel = self.fast_multi_branch(x, *earlier)
        return F.dropout2d(F.gelu(self.g_ibs(y)) + self.bias, self.dropout, self.training), kernel


@part(
    "terminator-net",
    paper="terminator",
    kind="model",
    dims=(2,),
    merges="self",
    keywords="Terminator residual-free slow fast hyper-kernel classifier backbone small images",
)
class Terminator(nn.Module):
    """Terminator classifier.

    Args:
        num_classes: logits; 0 leaves the classifier out.
        in_chans: channels of the image, times the first factor divisible by 12. A single one is repeated to three
            unless 12 divides the first factor.
        img_size: side of the images: planes belong to one size, and are square.
        factors: widening of each block.
        earlier: number of earlier maps that each block takes in: 1 is the output of the block before the last one, 2
            also of the one before that.
        global_layers: depth of each block's slow net of the image-sized kernel.
        kernel_sizes: of the four local branches of every block.
        global_hidden, local_hidden, channel_hidden, interact_hidden: widths of the slow nets, see :class:`SFNEBlock`.
        omega_0: base frequency of all slow nets; the published configuration leaves it open.
        drop_rates: channel dropout of each block.
        batch_stats: see :class:`SFNEBlock`.
        slow_loss_weight: of the slow neural loss in :meth:`auxiliary_loss`.
        norm_penalty: weight of :func:`norm_penalty` there; published: 5e-5 (CIFAR-10).

    Shape:
        (N, in_chans, img_size, img_size) → (N, num_classes).

    Raises:
        ValueError: lists of different lengths, channels that 12 does not divide, or images of another size.

    Example:
        >>> net = terminator_mini(num_classes=7)
        >>> net(torch.randn(2, 1, 8, 8)).shape
        torch.Size([2, 7])
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        img_size: int = 32,
        factors: Sequence[int] = (4, 3, 2, 2, 2),
        earlier: Sequence[int] = (0, 0, 1, 1, 2),
        global_layers: Sequence[int] = (3, 2, 2, 2, 2),
        kernel_sizes: Sequence[int] = (3, 9, 5, 7),
        global_hidden: int = 64,
        local_hidden: int = 32,
        channel_hidden: int = 32,
        interact_hidden: tuple[int, int] = (16, 64),
        omega_0: float = 1.0,
        drop_rates: Sequence[float] = (0.0, 0.05, 0.05, 0.05, 0.05),
        batch_stats: str = "batch",
        slow_loss_weight: float = 1.0,
        norm_penalty: float = 0.0,
    ) -> None:
        super().__init__()
        check_positive("num_classes", num_classes, zero=True)
        check_positive("in_chans", in_chans)
        count = len(factors)
        check(count > 0, "factors", tuple(factors), "give at least one block")
        for name, values in (("earlier", earlier), ("global_layers", global_layers), ("drop_rates", drop_rates)):
            check(len(values) == count, name, tuple(values), f"needs one entry a block, as factors has ({count})")
        for index, taken in enumerate(earlier):
            known = "block i takes earlier maps of blocks i − 2 and i − 3, which must exist"
            check(taken == 0 or index - 1 - taken >= 0, "earlier", tuple(earlier), known)
        self.num_classes, self.in_chans, self.img_size = num_classes, in_chans, img_size
        self.factors, self.earlier = tuple(factors), tuple(earlier)
        self.slow_loss_weight, self.norm_penalty = slow_loss_weight, norm_penalty
        self.grey = in_chans == 1 and factors[0] % 12 != 0
        channels = [3 if self.grey else in_chans]
        for factor in factors:
            channels.append(channels[-1] * factor)
        self.num_features = channels[-1]
        self.blocks = nn.ModuleList(
            SFNEBlock(
                channels[i],
                factors[i],
                img_size,
                earlier[i],
                kernel_sizes,
                global_hidden,
                global_layers[i],
                local_hidden,
                channel_hidden=channel_hidden,
                interact_hidden=interact_hidden,
                omega_0=omega_0,
                dropout=drop_rates[i],
                batch_stats=batch_stats,
            )
            for i in range(count)
        )
        self.out_layer = self._classifier(num_classes)

    def _classifier(self, num_classes: int) -> nn.Module:
        if num_classes == 0:
            return nn.Identity()
        layer = nn.Linear(self.num_features, num_classes)
        nn.init.kaiming_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
        return layer

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.out_layer

    def reset_classifier(self, num_classes: int) -> None:
        """A new last layer for ``num_classes``; 0 leaves it out."""
        check_positive("num_classes", num_classes, zero=True)
        like = next(self.parameters())
        self.num_classes = num_classes
        self.out_layer = self._classifier(num_classes).to(like.device, like.dtype)

    def forward_features(self, x: Tensor) -> Tensor:
        """The map of the last block, (N, num_features, H, W)."""
        if x.dim() != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"x of shape {tuple(x.shape)}: expected (N, {self.in_chans}, H, W)")
        maps = [x.expand(-1, 3, -1, -1) if self.grey else x]
        for index, block in enumerate(self.blocks):
            taken = [maps[index - 1 - k] for k in range(self.earlier[index])]
            y, _ = block(maps[-1], *taken)
            maps.append(y)
        return maps[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Mean over the map and, unless ``pre_logits``, the classifier."""
        x = x.mean((2, 3))
        return x if pre_logits else self.out_layer(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.forward_head(self.forward_features(x))

    def global_kernels(self) -> list[Tensor]:
        """The image-sized kernel of every block."""
        return [block.fast_multi_branch.slow_net_g() for block in self.blocks]  # type: ignore[union-attr, operator]

    def slow_loss(self) -> Tensor:
        """The slow neural loss: how far later blocks' kernels are from repetitions of earlier ones'."""
        return slow_neural_loss(self.global_kernels(), self.factors)

    @classmethod
    def auxiliary_loss(cls, modules: Sequence[Terminator], epoch: int) -> Tensor | None:
        """The slow neural loss of every network and, where asked for, the penalty on norms."""
        terms = [m.slow_loss_weight * m.slow_loss() for m in modules if m.slow_loss_weight]
        terms += [m.norm_penalty * norm_penalty(m) for m in modules if m.norm_penalty]
        return torch.stack(terms).sum() if terms else None

    def merge(self) -> Terminator:
        """The inference form: slow nets whose kernels do not depend on the input are replaced by their kernels.

        With ``batch_stats="batch"`` the local kernels depend on the batch and stay.
        """
        merged = copy.deepcopy(self).eval()
        freeze_kernels(merged)
        return merged


def norm_penalty(model: nn.Module) -> Tensor:
    """The authors' regulariser without its factor of 5e-5: norms of fast weights plus 1e-6 of those of slow ones.

    Σ ‖p‖ over parameters whose name contains "fast" but not "Kernel" + 1e-6 · Σ ‖W‖ over 1 × 1 weights in slow nets.
    """
    fast = [p.norm() for n, p in model.named_parameters() if "fast" in n and "Kernel" not in n]
    nets = [m for m in model.modules() if isinstance(m, KernelNet)]
    slow = [p.norm() for m in nets for n, p in m.named_parameters() if n.endswith(".weight")]
    return torch.stack([*fast, *(1e-6 * norm for norm in slow)]).sum()


def convert_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An official state dict with our entries: the lengths that the authors keep as buffers are left out.

    The weights must be those after the authors' first forward, which rescales ``output_linear``.
    """
    return {name: tensor for name, tensor in state.items() if not name.endswith("train_length")}


terminator = partial(Terminator)
terminator_mini = partial(
    Terminator,
    in_chans=1,
    img_size=8,
    factors=(4, 2, 1, 1, 1),
    kernel_sizes=(3, 5, 3, 5),
    global_hidden=16,
    local_hidden=8,
    channel_hidden=8,
    interact_hidden=(8, 16),
)

VARIANTS: dict[str, Callable[..., Terminator]] = {"terminator": terminator, "terminator_mini": terminator_mini}
