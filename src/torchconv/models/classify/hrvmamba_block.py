"""HRVMamba's residual block and its module of parallel resolutions (H. Zhang et al. 2024, arXiv 2410.03174).

    x₁ = x + GELU(shuffle(DW_{3,5,7,9}(LN x)))        several scales of the neighbourhood
    x₂ = x₁ + SS2D(LN x₁)                              the whole map, in linear time
    x₃ = x₂ + W₂ GELU(W₁ LN x₂)

A module runs blocks on every resolution by itself, then adds to each resolution what the others give. Names of
parameters are those of the authors' checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torchconv._common import check, check_positive
from torchconv.catalog import part
from torchconv.models._drop_path import DropPath
from torchconv.ops._common import ChannelNorm, apply_conv
from torchconv.ops.hrvmamba import MultiKernelDWConv2d, channel_shuffle
from torchconv.ops.hrvmamba_scan import Pointwise, SelectiveScan2d


class _MLP(nn.Module):
    def __init__(self, channels: int, hidden: int, **options: Any) -> None:
        super().__init__()
        self.fc1 = Pointwise(channels, hidden, **options)
        self.fc2 = Pointwise(hidden, channels, **options)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(F.gelu(self.fc1(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
        return y


@part(
    "dvss",
    paper="hrvmamba",
    kind="layer",
    dims=(2,),
    probe={"build": {"channels": 8}, "inputs": [[2, 8, 5, 4]]},
    keywords="DVSS block dynamic visual state space HRVMamba Mamba residual multi-scale depthwise",
)
class DVSSBlock(nn.Module):
    """Dynamic visual state space block: several depthwise kernel sizes, SS2D, and a feed-forward part, each residual.

    Args:
        channels: C, a multiple of 4.
        local: the form of the small models, with a depthwise 3 × 3 before the first part (whose residual is still the
            input itself) and one added before the last, and squeeze-excitation inside SS2D.
        mlp_ratio: hidden over C.
        drop_path: rate of whole samples without a branch, in training.
        ratio, states, rank, gated, head_kernel, backend: of :class:`torchconv.ops.hrvmamba_scan.SelectiveScan2d`.

    Shape:
        (N, C, H, W) → the same.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Reference: arXiv 2410.03174, section 3.
    """

    def __init__(
        self,
        channels: int,
        local: bool = False,
        mlp_ratio: float = 2.0,
        drop_path: float = 0.0,
        *,
        ratio: float = 2.0,
        states: int = 1,
        rank: int | None = None,
        gated: bool = False,
        head_kernel: int | str | None = "auto",
        backend: str = "auto",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_positive("channels", channels)
        check(channels % 4 == 0, "channels", channels, "must be a multiple of 4, one part for each kernel size")
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        scan = {"ratio": ratio, "states": states, "rank": rank, "gated": gated, "head_kernel": head_kernel}
        self.cpe1 = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, **options) if local else None
        self.cpe2 = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, **options) if local else None
        self.norm0 = ChannelNorm(channels, **options)
        self.conv2d = MultiKernelDWConv2d(channels, **options)
        self.norm = ChannelNorm(channels, **options)
        self.op = SelectiveScan2d(channels, attention=local, backend=backend, **scan, **options)  # type: ignore[arg-type]
        self.norm2 = ChannelNorm(channels, **options)
        self.mlp = _MLP(channels, int(channels * mlp_ratio), **options)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``x``."""
        u = x if self.cpe1 is None else x + apply_conv(self.cpe1, x)
        x = x + self.drop_path(F.gelu(channel_shuffle(self.conv2d(self.norm0(u)), 4)))
        x = x + self.drop_path(self.op(self.norm(x)))
        if self.cpe2 is not None:
            x = x + apply_conv(self.cpe2, x)
        y: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return y


def _batch_norm(channels: int, options: dict[str, Any]) -> nn.Module:
    return nn.BatchNorm2d(channels, **options)


def _up(source: int, target: int, options: dict[str, Any]) -> nn.Module:
    return nn.Sequential(nn.Conv2d(source, target, 1, bias=False, **options), _batch_norm(target, options))


def _down(source: int, target: int, steps: int, options: dict[str, Any]) -> nn.Module:
    """Halve ``steps`` times: depthwise 3 × 3, 1 × 1; channels change in the last, which has no ReLU."""
    found: list[nn.Module] = []
    for step in range(steps):
        final = step == steps - 1
        width = target if final else source
        layers = [
            nn.Conv2d(source, source, 3, 2, 1, groups=source, bias=False, **options),
            _batch_norm(source, options),
            nn.Conv2d(source, width, 1, bias=False, **options),
            _batch_norm(width, options),
        ]
        found.append(nn.Sequential(*layers, *([] if final else [nn.ReLU()])))
    return nn.Sequential(*found)


class HRModule(nn.Module):
    """Parallel resolutions: blocks on each by itself, then every one receives the sum of all, resized and projected.

    y_i = ReLU(Σ_j f_ij(x_j)): lower resolutions by 1 × 1 and bilinear enlargement, higher ones by strided depthwise
    convolutions, the same one as it is.

    Args:
        channels: of each resolution, the highest first; each next one has half the side, rounded up.
        blocks: blocks on each resolution, a number or one for each.
        multiscale_output: give all resolutions, else only the highest.
        drop_path: rates of the blocks; a number, or one for each block of a resolution.
        options: further arguments of :class:`DVSSBlock`.

    Shape:
        a list of (N, channels[i], H_i, W_i) → a list of the same shapes, or of the first one only.

    Raises:
        ValueError: a resolution is missing or an argument is out of range.

    Reference: arXiv 2410.03174, section 3; Yuan et al., arXiv 2110.09408 (HRFormer).
    """

    def __init__(
        self,
        channels: Sequence[int],
        blocks: int | Sequence[int] = 2,
        multiscale_output: bool = True,
        drop_path: float | Sequence[float] = 0.0,
        *,
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        super().__init__()
        check(len(channels) >= 1, "channels", tuple(channels), "give at least one resolution")
        counts = [blocks] * len(channels) if isinstance(blocks, int) else list(blocks)
        check(
            len(counts) == len(channels), "blocks", blocks, f"give one number for each of {len(channels)} resolutions"
        )
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        rates = [drop_path] * max(counts) if isinstance(drop_path, int | float) else list(drop_path)
        self.branches = nn.ModuleList(
            nn.Sequential(*(DVSSBlock(c, drop_path=rates[n], **options, **place) for n in range(count)))
            for c, count in zip(channels, counts, strict=True)
        )
        self.grad_checkpointing = False
        outputs = len(channels) if multiscale_output else 1
        self.fuse_layers = nn.ModuleList(
            nn.ModuleList(
                _up(channels[j], channels[i], place)
                if j > i
                else _down(channels[j], channels[i], i - j, place)
                if j < i
                else nn.Identity()
                for j in range(len(channels))
            )
            for i in range(outputs if len(channels) > 1 else 0)
        )

    def _run(self, branch: Any, x: Tensor) -> Tensor:
        """Blocks of one resolution; in training their inputs alone are kept if ``grad_checkpointing`` is set."""
        if not (self.grad_checkpointing and self.training):
            y: Tensor = branch(x)
            return y
        for block in branch:
            x = checkpoint(block, x, use_reentrant=False)
        return x

    def forward(self, xs: Sequence[Tensor]) -> list[Tensor]:
        """Transform all resolutions."""
        check(len(xs) == len(self.branches), "xs", len(xs), f"expected {len(self.branches)} maps")
        maps = [self._run(branch, x) for branch, x in zip(self.branches, xs, strict=True)]
        if len(maps) == 1:
            return maps
        found = []
        for i, row in enumerate(self.fuse_layers):
            total = None
            layers: Any = row
            for j, (layer, x) in enumerate(zip(layers, maps, strict=True)):
                y = layer(x)
                if j > i:
                    y = F.interpolate(y, scale_factor=float(2 ** (j - i)), mode="bilinear", align_corners=False)
                    if y.shape[2:] != maps[i].shape[2:]:
                        y = F.interpolate(y, size=maps[i].shape[2:], mode="bilinear", align_corners=False)
                total = y if total is None else total + y
            assert total is not None
            found.append(F.relu(total))
        return found
