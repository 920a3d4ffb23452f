"""Selective scan of an image in four directions: VMamba's SS2D with HRVMamba's deformable sampling before it.

Liu et al. 2024, "VMamba: Visual State Space Model", arXiv 2401.10166; H. Zhang et al. 2024, arXiv 2410.03174.

The map becomes four sequences (rows, columns, and both reversed); each runs through a selective state space model
(:func:`torchconv.kernels.selective_scan`), and the four results are added back where they came from:

    h = SiLU(DCNv4(W_in x)),    (dt, B, C)_k = W_k h_k
    y = Σ_k back_k( scan(h_k, W'_k dt_k, −exp(A_k), B_k, C_k, D_k) )
    out = W_out( LN(y) [⊙ SiLU(z)] [⊙ squeeze-excitation(y)] )

Every position sees every other one at a cost that is linear in their number: with D = 2C channels inside, n states and
rank R, a position takes 2·C·D + 4·D·(2R + 2n) multiply-adds, about 36·D·n for the scans, and DCNv4's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive
from torchconv.catalog import part
from torchconv.kernels import selective_scan
from torchconv.kernels.scan import BACKENDS
from torchconv.ops._common import Padding, Size, check_input, check_same, check_unit
from torchconv.ops.hrvmamba_dcn import DCNv4Conv2d

DIRECTIONS = ("cross", "bidirectional")


def cross_scan(x: Tensor, directions: str = "cross") -> Tensor:
    """The map as four sequences.

    Args:
        x: the map.
        directions: "cross": row by row, column by column, and both reversed; "bidirectional": row by row twice, and
            both reversed.

    Shape:
        (N, C, H, W) → (N, 4, C, H·W).

    Example:
        >>> cross_scan(torch.arange(4.0).reshape(1, 1, 2, 2))[0, :, 0].tolist()
        [[0.0, 1.0, 2.0, 3.0], [0.0, 2.0, 1.0, 3.0], [3.0, 2.0, 1.0, 0.0], [3.0, 1.0, 2.0, 0.0]]

    Reference: arXiv 2401.10166, section 4.
    """
    check_choice("directions", directions, DIRECTIONS)
    if x.dim() != 4:
        raise ValueError(f"x of shape {tuple(x.shape)}: expected (N, C, H, W)")
    rows = x.flatten(2)
    second = x.transpose(2, 3).flatten(2) if directions == "cross" else rows
    both = torch.stack([rows, second], 1)
    return torch.cat([both, both.flip(3)], 1)


def cross_merge(ys: Tensor, size: tuple[int, int], directions: str = "cross") -> Tensor:
    """The sum of four sequences, each put back in row-major order: the transpose of :func:`cross_scan`.

    Args:
        ys: the sequences.
        size: (H, W) of the map.
        directions: as in :func:`cross_scan`.

    Shape:
        (N, 4, C, H·W) → (N, C, H·W).

    Raises:
        ValueError: the sequences do not have H·W positions.

    Reference: arXiv 2401.10166, section 4.
    """
    check_choice("directions", directions, DIRECTIONS)
    height, width = size
    if ys.dim() != 4 or ys.shape[1] != 4 or ys.shape[3] != height * width:
        raise ValueError(f"ys of shape {tuple(ys.shape)}: expected (N, 4, C, {height * width})")
    both = ys[:, :2] + ys[:, 2:].flip(3)
    second = both[:, 1]
    if directions == "cross":
        second = second.unflatten(2, (width, height)).transpose(2, 3).flatten(2)
    return both[:, 0] + second


class Pointwise(nn.Linear):
    """A linear map that also loads the weights of a 1 × 1 convolution."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        name = f"{prefix}weight"
        if name in state_dict and state_dict[name].dim() == 4:
            state_dict[name] = state_dict[name].flatten(1)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class ChannelAttention(nn.Module):
    """y · σ(W₂ relu(W₁ mean y)) over the channels of (N, H, W, C), without biases."""

    def __init__(self, channels: int, reduction: int = 8, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        options: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        self.fc = nn.Sequential(
            Pointwise(channels, hidden, **options), nn.ReLU(), Pointwise(hidden, channels, **options)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Weigh the channels of ``x``."""
        return x * torch.sigmoid(self.fc(x.mean((1, 2), keepdim=True)))


class FourScans(nn.Module):
    """The parameters of four selective scans, with the names of VMamba's checkpoints, and the scans of a map."""

    def _add_scans(self, inner: int, states: int, rank: int, directions: str, backend: str, **options: Any) -> None:
        check_choice("directions", directions, DIRECTIONS)
        check_choice("backend", backend, BACKENDS)
        self.inner, self.states, self.rank = inner, states, rank
        self.directions, self.backend = directions, backend
        self.x_proj_weight = nn.Parameter(torch.empty(4, rank + 2 * states, inner, **options))
        self.dt_projs_weight = nn.Parameter(torch.empty(4, inner, rank, **options))
        self.dt_projs_bias = nn.Parameter(torch.empty(4, inner, **options))
        self.A_logs = nn.Parameter(torch.empty(4 * inner, states, **options))
        self.Ds = nn.Parameter(torch.empty(4 * inner, **options))

    def _reset_scans(self) -> None:
        """Mamba's: rates −1 … −n, steps drawn log-uniformly from 10⁻³ to 10⁻¹, D = 1."""
        bound = 1 / math.sqrt(self.inner)
        nn.init.uniform_(self.x_proj_weight, -bound, bound)
        bound = 1 / math.sqrt(self.rank)
        nn.init.uniform_(self.dt_projs_weight, -bound, bound)
        with torch.no_grad():
            low, high = math.log(1e-3), math.log(1e-1)
            step = torch.empty_like(self.dt_projs_bias).uniform_(low, high).exp_().clamp_(min=1e-4)
            self.dt_projs_bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
            rates = torch.arange(1, self.states + 1, device=self.A_logs.device, dtype=self.A_logs.dtype)
            self.A_logs.copy_(rates.log().expand_as(self.A_logs))
            self.Ds.fill_(1.0)

    def param_options(self) -> dict[str, dict[str, float]]:
        """Rates and the direct path are not decayed."""
        return {"A_logs": {"weight_decay": 0.0}, "Ds": {"weight_decay": 0.0}}

    def scan(self, h: Tensor) -> Tensor:
        """The four scans of (N, inner, H, W), added: (N, inner, H·W)."""
        xs = cross_scan(h, self.directions)
        dt, b, c = torch.einsum("nkdl,kcd->nkcl", xs, self.x_proj_weight).split(
            (self.rank, self.states, self.states), 2
        )
        steps = torch.einsum("nkrl,kdr->nkdl", dt, self.dt_projs_weight)
        wide = torch.promote_types(self.A_logs.dtype, torch.float32)
        y = selective_scan(
            xs.flatten(1, 2),
            steps.flatten(1, 2),
            -torch.exp(self.A_logs.to(wide)),
            b,
            c,
            self.Ds,
            delta_bias=self.dt_projs_bias.flatten(),
            delta_softplus=True,
            backend=self.backend,
        )
        return cross_merge(y.unflatten(1, (4, self.inner)), (h.shape[2], h.shape[3]), self.directions)


@part(
    "ss2d",
    paper="hrvmamba",
    kind="operator",
    dims=(2,),
    mixes="space+channels",
    supports=("channels",),
    mixer={"kernel_size": 3},
    conv={"kernel_size": 3},
    keywords="SS2D selective scan Mamba VMamba state space four directions global linear time HRVMamba deformable",
)
class SelectiveScan2d(FourScans):
    """Four selective scans over the map, between linear maps, with a deformable sampling before them.

    Args:
        in_channels: C ≥ 1.
        out_channels: unset is C.
        kernel_size: of the sampling, odd; its groups are the largest divisor of the inner channels up to the rank.
        stride, dilation, groups: 1.
        padding: "same".
        bias: in the first and the last linear map; published: none.
        ratio: inner channels over C.
        states: numbers in the state of a channel.
        rank: of the step sizes; unset is ⌈C / 16⌉.
        gated: multiply by SiLU of a second half of the first map ("v05"; without it "v05_noz").
        attention: squeeze-excitation before the last map, as in the small models.
        head_kernel: depthwise convolution before the sampling's head; "auto" is 3 where C is a multiple of 80 (the
            published rule) and none otherwise.
        directions: see :func:`cross_scan`.
        backend: of the scan, see :func:`torchconv.kernels.selective_scan`.

    Shape:
        (N, in_channels, H, W) → (N, out_channels, H, W).

    Raises:
        ValueError: an argument is out of range or not supported; the message names it.

    Example:
        >>> SelectiveScan2d(16)(torch.randn(2, 16, 6, 5)).shape
        torch.Size([2, 16, 6, 5])

    Reference: arXiv 2410.03174, section 3; arXiv 2401.10166, section 4.
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
        bias: bool = False,
        *,
        ratio: float = 2.0,
        states: int = 1,
        rank: int | None = None,
        gated: bool = False,
        attention: bool = False,
        head_kernel: int | str | None = "auto",
        directions: str = "cross",
        backend: str = "auto",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        check_positive("in_channels", in_channels)
        check_positive("out_channels", out_channels)
        check_positive("states", states)
        check(groups == 1, "groups", groups, "SS2D's linear maps mix all channels; leave groups at 1")
        check_unit("stride", stride, 2, "SS2D", "follow it with a strided convolution")
        check_unit("dilation", dilation, 2, "SS2D", "it sees the whole map anyway")
        check(0 < ratio < math.inf, "ratio", ratio, "must be a positive number")
        inner = int(ratio * in_channels)
        check(inner >= 1, "ratio", ratio, "leaves no inner channel")
        rank = math.ceil(in_channels / 16) if rank is None else rank
        check_positive("rank", rank)
        self.in_channels, self.out_channels, self.gated = in_channels, out_channels, gated
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        if head_kernel == "auto":
            head_kernel = 3 if in_channels % 80 == 0 else None
        ok = head_kernel is None or isinstance(head_kernel, int)
        check(ok, "head_kernel", head_kernel, "must be 'auto', None or an odd integer")
        head: Any = head_kernel
        sharing = max(g for g in range(1, rank + 1) if inner % g == 0)
        self.in_proj = Pointwise(in_channels, inner * (2 if gated else 1), bias=bias, **options)
        self.conv2d = DCNv4Conv2d(
            inner,
            None,
            kernel_size,
            offset_groups=sharing,
            head_kernel=head,
            **options,
        )
        check_same(padding, self.conv2d.kernel_size, "SS2D")
        self._add_scans(inner, states, rank, directions, backend, **options)
        self.out_norm = nn.LayerNorm(inner, **options)
        self.se = ChannelAttention(inner, **options) if attention else None
        self.out_proj = Pointwise(inner, out_channels, bias=bias, **options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Mamba's: rates −1 … −n, steps drawn log-uniformly from 10⁻³ to 10⁻¹, D = 1; linear maps normal, 0.02."""
        for layer in (self.in_proj, self.out_proj, *(self.se.fc[::2] if self.se is not None else ())):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        self.conv2d.reset_parameters()
        self.out_norm.reset_parameters()
        self._reset_scans()

    def forward(self, x: Tensor) -> Tensor:
        """Mix ``x``."""
        check_input(x, self.in_channels, 2)
        last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        h = self.in_proj(x.permute(0, 2, 3, 1))
        gate: Tensor | None = None
        if self.gated:
            h, gate = h.chunk(2, 3)
        h = F.silu(self.conv2d(h.permute(0, 3, 1, 2)))
        y = self.scan(h).transpose(1, 2).unflatten(1, h.shape[2:])
        y = self.out_norm(y)
        if gate is not None:
            y = y * F.silu(gate)
        if self.se is not None:
            y = self.se(y)
        out: Tensor = self.out_proj(y).permute(0, 3, 1, 2)
        return out if last else out.contiguous()

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return (
            f"{self.in_channels}, {self.out_channels}, inner={self.inner}, states={self.states}, rank={self.rank}, "
            f"gated={self.gated}, directions={self.directions!r}"
        )
