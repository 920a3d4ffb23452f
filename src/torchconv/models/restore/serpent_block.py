"""Residual blocks of selective scans, and the stages that Serpent and VM-UNet are made of.

    x ← x + SS2D(LN x),        and with a feed-forward part   x ← x + W₂ GELU(W₁ LN x)

Liu et al., arXiv 2401.10166; without the feed-forward part as in Ruan et al., arXiv 2402.02491. Names of parameters are
VMamba's.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torchconv._common import check, check_positive
from torchconv.catalog import part
from torchconv.models._drop_path import DropPath
from torchconv.ops._common import ChannelNorm
from torchconv.ops.hrvmamba_scan import Pointwise
from torchconv.ops.serpent import SS2d


class _FeedForward(nn.Sequential):
    """Over the channels of a map."""

    def __init__(self, channels: int, hidden: int, **options: Any) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict(fc1=Pointwise(channels, hidden, **options))
        layers |= {"act": nn.GELU(), "fc2": Pointwise(hidden, channels, **options)}
        super().__init__(layers)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return y


@part(
    "vss",
    paper="serpent",
    kind="layer",
    dims=(2,),
    probe={"build": {"channels": 6, "mlp_ratio": 2.0, "states": 3}, "inputs": [[2, 6, 5, 4]]},
    keywords="VSS block visual state space VMamba Mamba Serpent residual",
)
class VSSBlock(nn.Module):
    """Visual state space block: gated scans in four directions, and a feed-forward part, each residual.

    Args:
        channels: C.
        mlp_ratio: hidden over C; 0 leaves the feed-forward part out, as VMamba's blocks of early 2024 do.
        drop_path: rate of whole samples without a branch, in training.
        kernel_size, ratio, states, rank, dropout, backend: of :class:`torchconv.ops.serpent.SS2d`.

    Shape:
        (N, C, H, W) → the same.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> import torch
        >>> VSSBlock(8, states=4)(torch.randn(1, 8, 6, 5)).shape
        torch.Size([1, 8, 6, 5])

    Reference: arXiv 2401.10166, section 4.
    """

    def __init__(
        self,
        channels: int,
        mlp_ratio: float = 0.0,
        drop_path: float = 0.0,
        *,
        kernel_size: int = 3,
        ratio: float = 2.0,
        states: int = 16,
        rank: int | None = None,
        dropout: float = 0.0,
        backend: str = "auto",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_positive("channels", channels)
        check(0 <= mlp_ratio < math.inf, "mlp_ratio", mlp_ratio, "must be 0 or a positive number")
        hidden = int(channels * mlp_ratio)
        check(hidden > 0 or mlp_ratio == 0, "mlp_ratio", mlp_ratio, "leaves no hidden channel")
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        scan: dict[str, Any] = {"ratio": ratio, "states": states, "rank": rank, "dropout": dropout, "backend": backend}
        self.norm = ChannelNorm(channels, **options)
        self.op = SS2d(channels, None, kernel_size, **scan, **options)
        self.norm2 = ChannelNorm(channels, **options) if hidden else None
        self.mlp = _FeedForward(channels, hidden, **options) if hidden else None
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``x``."""
        x = x + self.drop_path(self.op(self.norm(x)))
        if self.norm2 is not None and self.mlp is not None:
            x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x


class Blocks(nn.Sequential):
    """Blocks one after the other; in training their inputs alone are kept if ``grad_checkpointing`` is set."""

    def __init__(self, channels: int, rates: Sequence[float], **options: Any) -> None:
        super().__init__(*(VSSBlock(channels, drop_path=rate, **options) for rate in rates))
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → the same."""
        for block in self:
            x = checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing and self.training else block(x)
        return x


class PatchEmbed(nn.Module):
    """Patches of P × P pixels as vectors, normalised where ``norm`` is set; pixels that fill no patch are left out."""

    def __init__(self, in_chans: int, channels: int, patch: int, norm: bool = True, **options: Any) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, channels, patch, patch, **options)
        self.norm = ChannelNorm(channels, **options) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) → (N, channels, H / P, W / P)."""
        y: Tensor = self.proj(x)
        return y if self.norm is None else self.norm(y)


def set_grad_checkpointing(network: nn.Module, enable: bool) -> None:
    """Of all :class:`Blocks` in a network."""
    for module in network.modules():
        if isinstance(module, Blocks):
            module.grad_checkpointing = enable


def initialise(network: nn.Module) -> None:
    """Linear maps normal with deviation 0.02, cut at 2, and no offset, as VMamba's networks start."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def spread(rate: float, depths: Sequence[int], falling: bool = False) -> list[list[float]]:
    """Rates of dropped branches for the blocks of each stage: from 0 in the first block to ``rate`` in the last."""
    total = sum(depths)
    rates = [rate * i / max(total - 1, 1) for i in range(total)]
    steps = iter(rates[::-1] if falling else rates)
    return [[next(steps) for _ in range(depth)] for depth in depths]
