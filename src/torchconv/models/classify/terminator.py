"""Terminator: blocks of global and local HyperZ·Z·W branches, without residuals (Zhang 2024, arXiv 2401.17948).

A slow-fast neural encoding (SFNE) block multiplies the planes of its input by an image-sized hyper-kernel (three
global branches), convolves them with small ones (four local branches), gates them, concatenates everything with
features of earlier blocks and compresses it by one 1 × 1 convolution. Blocks, a mean over the map, one linear layer.
1,336,855 parameters for 32 × 32 images and 10 classes. Parameter names are those of the authors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torchconv._common import check, check_choice, check_positive
from torchconv.catalog import part
from torchconv.models._backbone import POOLS, Backbone, resolve_indices
from torchconv.models._registry import register_model
from torchconv.models.classify.terminator_block import SFNEBlock
from torchconv.ops._common import Size, ntuple
from torchconv.ops._slow_net import KernelNet, freeze_kernels
from torchconv.ops.terminator_units import slow_neural_loss


@part(
    "terminator-net",
    paper="terminator",
    kind="model",
    dims=(2,),
    merges="self",
    keywords="Terminator residual-free slow fast hyper-kernel classifier backbone small images",
)
class Terminator(Backbone):
    """Terminator classifier.

    Args:
        num_classes: logits; 0 leaves the classifier out.
        in_chans: channels of the image, times the first factor divisible by 12. A single one is repeated to three
            unless 12 divides the first factor.
        img_size: size of the learned planes. At other sizes kernels are drawn anew and planes interpolated, which is
            not in the paper; the matrix products want square images, see :func:`hyperzzw_global`.
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
        global_pool: "avg" as published, "max" or "avgmax".

    Shape:
        (N, in_chans, H, W) → (N, num_classes).

    Raises:
        ValueError: lists of different lengths, channels that 12 does not divide, or another number of image channels.

    Example:
        >>> net = terminator_mini(num_classes=7)
        >>> net(torch.randn(2, 1, 8, 8)).shape
        torch.Size([2, 7])
    """

    head_name = "out_layer"

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        img_size: Size = 32,
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
        global_pool: str = "avg",
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
        check_choice("global_pool", global_pool, POOLS[:3])
        self.num_classes, self.in_chans, self.img_size = num_classes, in_chans, ntuple("img_size", img_size, 2)
        self.global_pool = global_pool
        self.factors, self.earlier = tuple(factors), tuple(earlier)
        self.slow_loss_weight, self.norm_penalty = slow_loss_weight, norm_penalty
        self.grey = in_chans == 1 and factors[0] % 12 != 0
        channels = [3 if self.grey else in_chans]
        for factor in factors:
            channels.append(channels[-1] * factor)
        self.num_features = channels[-1]
        self.feature_info = [
            {"num_chs": c, "reduction": 1, "module": f"blocks.{i}"} for i, c in enumerate(channels[1:])
        ]
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
        self.out_layer = self.make_classifier(num_classes)

    def make_classifier(self, num_classes: int) -> nn.Module:
        """A linear layer with normal weights, or nothing for 0 classes."""
        if num_classes == 0:
            return nn.Identity()
        layer = nn.Linear(self.num_features, num_classes)
        nn.init.kaiming_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
        return layer

    def _maps(self, x: Tensor, blocks: int) -> list[Tensor]:
        """The image and the maps of the first ``blocks`` blocks."""
        if x.dim() != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"x of shape {tuple(x.shape)}: expected (N, {self.in_chans}, H, W)")
        maps = [x.expand(-1, 3, -1, -1) if self.grey else x]
        for index, block in enumerate(self.blocks[:blocks]):
            taken = [maps[index - 1 - k] for k in range(self.earlier[index])]
            y, _ = (
                checkpoint(block, maps[-1], *taken, use_reentrant=False) if self.recomputes else block(maps[-1], *taken)
            )
            maps.append(y)
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """The map of the last block, (N, num_features, H, W)."""
        return self._maps(x, len(self.blocks))[-1]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """As :meth:`Backbone.forward_intermediates`; blocks see more than the map of the block before them."""
        check_choice("output_fmt", output_fmt, ("NCHW", "NHWC"))
        wanted = resolve_indices(indices, len(self.blocks))
        blocks = max(wanted) + 1 if stop_early and intermediates_only else len(self.blocks)
        maps = self._maps(x, blocks)[1:]
        found = [maps[i].movedim(1, -1) if output_fmt == "NHWC" else maps[i] for i in wanted]
        return found if intermediates_only else (maps[-1], found)

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


def read_official(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Options of the network that a checkpoint of the authors belongs to, from the shapes of its tensors.

    Raises:
        ValueError: it holds no blocks.
    """
    branch = "fast_multi_branch"
    numbers = {int(n.split(".")[1]) for n in state if n.startswith("blocks.")}
    check(bool(numbers), "state", list(state)[:3], "has no entry blocks.0…: give the network's whole state dict")
    blocks = 1 + max(numbers)
    options: dict[str, Any] = {"factors": [], "earlier": [], "global_layers": [], "drop_rates": [0.0] * blocks}

    def shape(name: str) -> torch.Size:
        return state[f"{name}.weight"].shape

    for index in range(blocks):
        prefix = f"blocks.{index}.{branch}"
        channels = shape(f"{prefix}.channel_mixer_mlp")[0]
        after, before = shape(f"{prefix}.bottleneck_layer")[:2]
        options["factors"].append(after // channels)
        options["earlier"].append(before // channels - 10)
        linears = f"{prefix}.slow_net_g.Kernel.linears."
        options["global_layers"].append(sum(n.startswith(linears) and n.endswith(".weight") for n in state))
    prefix = f"blocks.0.{branch}"
    hidden = {
        name: shape(f"{prefix}.{path}.Kernel.output_linear")[1]
        for name, path in (
            ("global", "slow_net_g"),
            ("local", "slow_net_l1"),
            ("channel", "channel_mixer_hci.slow_net_gc"),
            ("over_channels", "hyper_interact.slow_net_gc"),
            ("over_positions", "hyper_interact.slow_net_gs"),
        )
    }
    planes = [state[f"{prefix}.slow_net_l{n}.Kernel.bias_pk"] for n in range(1, 5)]
    return {
        **options,
        "in_chans": shape(f"{prefix}.channel_mixer_mlp")[0],
        "img_size": tuple(state[f"{prefix}.slow_net_g.Kernel.bias_p"].shape[2:]),
        "kernel_sizes": [p.shape[2] for p in planes],
        "global_hidden": hidden["global"],
        "local_hidden": hidden["local"],
        "channel_hidden": hidden["channel"],
        "interact_hidden": (hidden["over_channels"], hidden["over_positions"]),
    }


@register_model("terminator")
def terminator(**options: Any) -> Terminator:
    """Terminator for 32 × 32 images: 1.34 M parameters, CIFAR-10 95.3 %, CIFAR-100 74.7 % in logs of its code."""
    return Terminator(**options)


@register_model("terminator")
def terminator_mini(**options: Any) -> Terminator:
    """Small Terminator for 8 × 8 images in grey: 76 thousand parameters."""
    mini: dict[str, Any] = {
        "in_chans": 1,
        "img_size": 8,
        "factors": (4, 2, 1, 1, 1),
        "kernel_sizes": (3, 5, 3, 5),
        "global_hidden": 16,
        "local_hidden": 8,
        "channel_hidden": 8,
        "interact_hidden": (8, 16),
    }
    return Terminator(**{**mini, **options})


VARIANTS: dict[str, Callable[..., Any]] = {f.__name__: f for f in (terminator, terminator_mini)}
