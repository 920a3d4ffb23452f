"""Edge operators blended with their input, and channel attention whose pooling follows the sensor.

Zhang, Yan, Zhang, Miao, Wang 2025, "DFYP: A Dynamic Fusion Framework with Spectral Channel Attention and Adaptive
Operator Learning for Crop Yield Prediction", arXiv 2507.05849.

    edges    |∇x| = √(gx² + gy² + ε),   gx = correlate(x, K), gy = correlate(x, Kᵀ), a channel at a time, zeros outside
             K = Sobel, Scharr, or (a·Sobel + (1−a)·Scharr)/max|·| with a = σ(α), the result times σ(scale)
    blend    y = ω · |∇x| + (1−ω) · x
    gate     x · σ(W₂ relu(W₁ pool(x))): maximum over the map for MODIS, mean for Sentinel-2

18·C multiply-adds a position for the edges. Two numbers are learned by the edge operator, one by the blend, 2·C·h by
the gate. The paper speaks of choosing operators dynamically; published is a fixed table by year or crop.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive
from torchconv.catalog import part
from torchconv.kernels._layout import keep_layout
from torchconv.ops._common import conv_nd

SOBEL = ((-1.0, 0.0, 1.0), (-2.0, 0.0, 2.0), (-1.0, 0.0, 1.0))
SCHARR = ((-3.0, 0.0, 3.0), (-10.0, 0.0, 10.0), (-3.0, 0.0, 3.0))
KINDS = ("sobel", "scharr", "learnable")
POOLS = ("max", "avg")
GREY = (0.299, 0.587, 0.114)


def edge_magnitude(x: Tensor, kernel: Tensor, eps: float = 1e-8) -> Tensor:
    """√(gx² + gy² + eps) of every channel, gx by ``kernel`` and gy by its transpose.

    Args:
        x: a map.
        kernel: (3, 3), the derivative along the rows; cross-correlated, zeros outside the map.
        eps: under the root.

    Shape:
        (N, C, H, W) → the same. The root is taken in float32 for half precision.

    Example:
        >>> ramp = torch.arange(5.0).expand(1, 1, 5, 5)
        >>> edge_magnitude(ramp, torch.tensor(SOBEL))[0, 0, 2, 2]
        tensor(8.)

    Reference: arXiv 2507.05849.
    """
    channels = x.shape[1]
    gx, gy = (
        conv_nd(x, k.to(x.dtype).expand(channels, 1, 3, 3).contiguous(), None, 1, 1, 1, channels)
        for k in (kernel, kernel.T)
    )
    if gx.dtype in (torch.float16, torch.bfloat16):
        return (gx.float().square() + gy.float().square() + eps).sqrt().to(gx.dtype)
    return (gx.square() + gy.square() + eps).sqrt()


def mixed_kernel(alpha: Tensor) -> Tensor:
    """(a·Sobel + (1−a)·Scharr) divided by its largest absolute entry, a = σ(alpha).

    Args:
        alpha: a number; gradients flow through the division too.

    Shape:
        () → (3, 3).

    Example:
        >>> mixed_kernel(torch.tensor(100.0))
        tensor([[-0.5000,  0.0000,  0.5000],
                [-1.0000,  0.0000,  1.0000],
                [-0.5000,  0.0000,  0.5000]])

    Reference: arXiv 2507.05849.
    """
    share = torch.sigmoid(alpha)
    sobel, scharr = (torch.tensor(k, device=alpha.device, dtype=alpha.dtype) for k in (SOBEL, SCHARR))
    kernel = share * sobel + (1 - share) * scharr
    return kernel / kernel.abs().max()


def blend(x: Tensor, edges: Tensor, share: Tensor) -> Tensor:
    """share · edges + (1 − share) · x; edges of one channel serve all.

    Example:
        >>> blend(torch.zeros(1, 3, 1, 1), torch.ones(1, 1, 1, 1), torch.tensor(0.25)).flatten()
        tensor([0.2500, 0.2500, 0.2500])

    Reference: arXiv 2507.05849.
    """
    return share * edges + (1 - share) * x


@part(
    "edge-operator",
    paper="dfyp",
    kind="layer",
    dims=(2,),
    probe={"build": {"kind": "learnable"}, "inputs": [[2, 3, 7, 6]]},
    keywords="Sobel Scharr gradient magnitude edge detection learnable operator",
)
class EdgeOperator(nn.Module):
    """Gradient magnitude of every channel by Sobel, Scharr or a learned mixture of both.

    Args:
        kind: "sobel", "scharr" or "learnable". The last one has two parameters, α (share of Sobel, before the sigmoid,
            starts at 0.5) and a scale (before the sigmoid, starts at 0.1); one α serves all channels.

    Shape:
        (N, C, H, W) → the same.

    Raises:
        ValueError: an unknown kind.

    Example:
        >>> EdgeOperator("scharr")(torch.arange(5.0).expand(1, 2, 5, 5))[0, :, 2, 2]
        tensor([32., 32.])

    Reference: arXiv 2507.05849.
    """

    def __init__(self, kind: str = "learnable", *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        check_choice("kind", kind, KINDS)
        self.kind = kind
        if kind == "learnable":
            self.alpha = nn.Parameter(torch.tensor(0.5, device=device, dtype=dtype))
            self.scale = nn.Parameter(torch.full((1,), 0.1, device=device, dtype=dtype))

    def kernel(self, x: Tensor) -> Tensor:
        """The derivative along the rows that is applied to ``x``, (3, 3)."""
        if self.kind == "learnable":
            return mixed_kernel(self.alpha)
        return torch.tensor(SOBEL if self.kind == "sobel" else SCHARR, device=x.device, dtype=x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """The magnitude."""
        if x.dim() != 4:
            raise ValueError(f"x of shape {tuple(x.shape)}: expected (N, C, H, W)")
        check(x.is_floating_point(), "x.dtype", x.dtype, "must be floating point; convert it")
        if self.kind != "learnable":
            return keep_layout(edge_magnitude(x, self.kernel(x)), x)
        edges = edge_magnitude(x, self.kernel(x), 1e-6)
        return keep_layout(edges * torch.sigmoid(self.scale).to(edges.dtype), x)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return repr(self.kind)


@part(
    "operator-router",
    paper="dfyp",
    kind="layer",
    dims=(2,),
    probe={"build": {"soft": True}, "inputs": [[2, 3, 7, 6]]},
    keywords="operator selection by year crop table mixture",
)
class OperatorRouter(nn.Module):
    """An edge operator for each item of a batch, by a table of keys such as years or crops.

    Only operators that some item needs are computed. All three are held, so that a checkpoint fits any table.

    Args:
        table: key → kind. Keys of a batch may come as a tensor of integers, such as years, too.
        default: kind for keys that the table lacks, and where no keys are given.
        soft: instead of choosing, add the three with learned weights that sum to 1 (not in the paper).

    Shape:
        x (N, C, H, W), keys: N of them or None → as x.

    Raises:
        ValueError: an unknown kind, or as many keys as the batch has not items.

    Example:
        >>> router = OperatorRouter({2009: "scharr"}, default="sobel")
        >>> router(torch.arange(5.0).expand(2, 1, 5, 5), [2009, 2010])[:, 0, 2, 2]
        tensor([32.,  8.])

    Reference: arXiv 2507.05849.
    """

    def __init__(
        self,
        table: Mapping[Hashable, str] | None = None,
        default: str = "learnable",
        soft: bool = False,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_choice("default", default, KINDS)
        self.table, self.default = dict(table or {}), default
        for kind in self.table.values():
            check_choice("table", kind, KINDS)
        check(not (soft and self.table), "soft", soft, "a learned mixture has no table; leave one of them out")
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.operators = nn.ModuleDict({kind: EdgeOperator(kind, **options) for kind in KINDS})
        self.logits = nn.Parameter(torch.zeros(len(KINDS), **options)) if soft else None

    def kinds(self, keys: Sequence[Hashable] | Tensor) -> list[str]:
        """The kind that each key gets."""
        keys = keys.tolist() if isinstance(keys, Tensor) else keys  # tensors hash by identity
        return [self.table.get(key, self.default) for key in keys]

    def forward(self, x: Tensor, keys: Sequence[Hashable] | Tensor | None = None) -> Tensor:
        """Apply to each item its operator."""
        if self.logits is not None:
            weights = self.logits.softmax(0)
            maps = [operator(x) for operator in self.operators.values()]
            return keep_layout(sum((w * m for w, m in zip(weights, maps, strict=True)), torch.zeros_like(x)), x)
        if keys is None or x.shape[0] == 0:
            y: Tensor = self.operators[self.default](x)
            return y
        check(len(keys) == x.shape[0], "keys", list(keys), f"must be one for each of the {x.shape[0]} items")
        kinds = self.kinds(keys)
        if len(set(kinds)) == 1:
            y = self.operators[kinds[0]](x)
            return y
        rows = {kind: [i for i, k in enumerate(kinds) if k == kind] for kind in dict.fromkeys(kinds)}
        found = torch.cat([self.operators[kind](x[items]) for kind, items in rows.items()])
        order = torch.tensor([i for items in rows.values() for i in items], device=x.device).argsort()
        return keep_layout(found[order], x)


@part(
    "operator-blend",
    paper="dfyp",
    kind="layer",
    dims=(2,),
    probe={"build": {}, "inputs": [[2, 3, 7, 6]]},
    keywords="AOL-Net adaptive operator learning edge blend Sobel Scharr crop yield",
)
class OperatorBlend(nn.Module):
    """The input blended with its edges: ω · |∇x| + (1 − ω) · x, ω learned.

    Args:
        table, default, soft: which operator, see :class:`OperatorRouter`.
        grey: take the edges of the grey image 0.299 r + 0.587 g + 0.114 b for all three channels, as published for
            Sentinel-2.

    Shape:
        x (N, C, H, W), keys: N of them or None → as x.

    Raises:
        ValueError: as the router; with ``grey`` another number of channels than three.

    Example:
        >>> OperatorBlend(default="sobel")(torch.zeros(1, 9, 8, 8)).shape
        torch.Size([1, 9, 8, 8])

    Reference: arXiv 2507.05849.
    """

    def __init__(
        self,
        table: Mapping[Hashable, str] | None = None,
        default: str = "learnable",
        soft: bool = False,
        grey: bool = False,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.grey = grey
        self.operator_router = OperatorRouter(table, default, soft, device=device, dtype=dtype)
        self.operator_weight = nn.Parameter(torch.tensor(0.5, device=device, dtype=dtype))

    def forward(self, x: Tensor, keys: Sequence[Hashable] | Tensor | None = None) -> Tensor:
        """Blend."""
        source = x
        if self.grey:
            if x.dim() != 4 or x.shape[1] != 3:
                raise ValueError(f"x of shape {tuple(x.shape)}: expected (N, 3, H, W), whose grey image has the edges")
            weights = torch.tensor(GREY, device=x.device, dtype=x.dtype).reshape(1, 3, 1, 1)
            source = (x * weights).sum(1, keepdim=True)
        return blend(x, self.operator_router(source, keys), self.operator_weight)


def channel_gate(x: Tensor, down: Tensor, up: Tensor, pool: str = "avg") -> Tensor:
    """x · σ(up · relu(down · pool(x))).

    Args:
        x: a map.
        down, up: (h, C) and (C, h).
        pool: "max" or "avg" over all positions.

    Shape:
        (N, C, \\*spatial) → the same.

    Raises:
        ValueError: an unknown pool.

    Example:
        >>> channel_gate(torch.ones(1, 2, 3), torch.ones(1, 2), torch.zeros(2, 1))[0, 0]
        tensor([0.5000, 0.5000, 0.5000])

    Reference: arXiv 2507.05849.
    """
    check_choice("pool", pool, POOLS)
    axes = tuple(range(2, x.dim()))
    pooled = x.amax(axes) if pool == "max" else x.mean(axes)
    gate = torch.sigmoid(F.linear(F.relu(F.linear(pooled, down)), up))
    return x * gate.reshape(*gate.shape, *[1] * len(axes))


@part(
    "resolution-attention",
    paper="dfyp",
    kind="layer",
    dims=(1, 2, 3),
    probe={"build": {"channels": 9, "reduction": 4, "pool": "max"}, "inputs": [[2, 9, 7, 6]]},
    keywords="resolution-aware channel attention RCA spectral squeeze excitation max pooling MODIS Sentinel-2",
)
class ResolutionAttention(nn.Module):
    """Channel attention that pools by the maximum (coarse pixels, histograms) or by the mean (fine images).

    Args:
        channels: C.
        reduction: r; the gate has max(C // r, 1) hidden units. Published: 16 for MODIS, 8 for Sentinel-2.
        pool: "max" (published for MODIS) or "avg" (for Sentinel-2).

    Shape:
        (N, channels, \\*spatial) → the same.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> sum(p.numel() for p in ResolutionAttention(9, 16).parameters())
        18

    Reference: arXiv 2507.05849.
    """

    def __init__(
        self, channels: int, reduction: int = 16, pool: str = "max", *, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        check_positive("channels", channels)
        check_positive("reduction", reduction)
        check_choice("pool", pool, POOLS)
        self.channels, self.pool = channels, pool
        hidden = max(channels // reduction, 1)
        options: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        self.fc: Any = nn.Sequential(
            nn.Linear(channels, hidden, **options), nn.ReLU(), nn.Linear(hidden, channels, **options)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels."""
        if x.dim() < 3 or x.shape[1] != self.channels:
            raise ValueError(f"x of shape {tuple(x.shape)}: expected (N, {self.channels}, *spatial)")
        down, _, up = self.fc
        return channel_gate(x, down.weight, up.weight, self.pool)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"{self.channels}, pool={self.pool!r}"
