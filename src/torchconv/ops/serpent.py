"""Serpent's parts: gated selective scans of an image in four directions, and changes of scale between them.

Sepehri, Fabian, Soltanolkotabi 2024, "Serpent: Scalable and Efficient Image Restoration via Multi-scale Structured
State Space Models", arXiv 2403.17902; the scan of the plane is VMamba's first one (Liu et al., arXiv 2401.10166).

A map becomes four sequences (rows, columns, both reversed), each a linear recurrence with coefficients that depend on
the pixel; the results are added where they came from and gated. Inside of a U every scale is scanned by itself:

    h, z = W_in x,   h ← SiLU(DW_3×3 h),   (dt, B, C)_k = W_k h_k
    y = Σ_k back_k( scan(h_k, W'_k dt_k + b_k, −exp(A_k), B_k, C_k, D_k) ),   out = W_out( LN(y) ⊙ SiLU(z) )
    merging:   (2·2 pixels) 4C → LN → W → 2C,        expanding:   C → W → s·C = s × s pixels of C/s → LN

With D = 2C channels inside, n states and rank R a position takes 3·C·D + 9·D + 4·D·(2R + 2n) multiply-adds and about
36·D·n operations for the scans, whatever the size of the image; parameters: 3·C·D + 10·D + 4·D·(2R + 3n + 2) + 2·D.
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
from torchconv.kernels.precision import widen
from torchconv.ops._common import (
    Padding,
    Size,
    apply_conv,
    check_input,
    check_odd,
    check_same,
    check_unit,
    ntuple,
)
from torchconv.ops.hrvmamba_scan import FourScans, Pointwise

ODD = ("pad", "crop")


def stateful_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    state: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The selective scan from a state that is given, and the state that it ends in: sequences in pieces.

    What the first state adds, and the last state, are sums in closed form, s_L = Σ_t exp(A Σ_{r>t} δ_r) δ_t u_t B_t,
    whose exponents are sums of steps that lie ahead: no differences, no divisions.

    Args:
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, backend: see :func:`torchconv.kernels.selective_scan`.
        state: s_0; unset is zero.

    Shape:
        as :func:`torchconv.kernels.selective_scan`, state (N, channels, n) → (N, channels, L) and (N, channels, n).

    Raises:
        ValueError: shapes do not fit; the message names the argument.

    Example:
        >>> u, delta = torch.randn(2, 1, 3, 10).unbind(0)
        >>> A, B, C = -torch.rand(3, 2), torch.randn(1, 2, 10), torch.randn(1, 2, 10)
        >>> whole = stateful_scan(u, delta, A, B, C, delta_softplus=True)[0]
        >>> _, state = stateful_scan(*(t[..., :6] for t in (u, delta)), A, B[..., :6], C[..., :6], delta_softplus=True)
        >>> rest = (u[..., 6:], delta[..., 6:], A, B[..., 6:], C[..., 6:])
        >>> torch.allclose(stateful_scan(*rest, delta_softplus=True, state=state)[0], whole[..., 6:], atol=1e-5)
        True

    Reference: Gu and Dao, arXiv 2312.00752, algorithm 2.
    """
    y = selective_scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus, backend=backend)
    if state is not None and state.shape != (u.shape[0], *A.shape):
        raise ValueError(f"state of shape {tuple(state.shape)}: expected {(u.shape[0], *A.shape)}")
    steps = widen(delta) if delta_bias is None else widen(delta) + widen(delta_bias)[:, None]
    steps = F.softplus(steps) if delta_softplus else steps
    ahead = steps.flip(2).cumsum(2).flip(2)  # Σ_{r≥t} δ_r
    after, whole = F.pad(ahead[:, :, 1:], (0, 1)), steps.sum(2)
    enters, rates = steps * widen(u), widen(A)
    found, early = [], torch.zeros_like(steps)
    past = None if state is None else steps.cumsum(2)
    for n in range(A.shape[1]):
        rate = rates[:, n, None]
        last = (torch.exp(rate * after) * enters * _of_state(B, n, u.shape[1])).sum(2)
        if state is not None and past is not None:
            first = widen(state)[:, :, n]
            last = last + torch.exp(rates[:, n] * whole) * first
            early = early + torch.exp(rate * past) * first[:, :, None] * _of_state(C, n, u.shape[1])
        found.append(last)
    if state is not None:
        y = y + early.to(y.dtype)
    return y if z is None else y * F.silu(z), torch.stack(found, 2)


def _of_state(vectors: Tensor, n: int, channels: int) -> Tensor:
    """The coefficients of one number of the state, (N or 1, channels, L or 1), from B or C in one of its forms."""
    if vectors.dim() == 2:
        return widen(vectors)[None, :, n, None]
    one = widen(vectors[:, None, n] if vectors.dim() == 3 else vectors[:, :, n])
    return one.repeat_interleave(channels // one.shape[1], 1)


@part(
    "ss2d-gated",
    paper="serpent",
    kind="operator",
    dims=(2,),
    mixes="space+channels",
    supports=("channels",),
    mixer={"kernel_size": 3},
    conv={"kernel_size": 3},
    keywords="SS2D VSS selective scan Mamba VMamba Serpent state space four directions global linear time restoration",
)
class SS2d(FourScans):
    """Four selective scans over the map after a depthwise convolution, gated, between linear maps.

    The first form of VMamba's SS2D ("v0").

    Args:
        in_channels: C ≥ 1.
        out_channels: unset is C.
        kernel_size: of the depthwise convolution before the scans, odd.
        stride, dilation, groups: 1.
        padding: "same".
        bias: in the first and the last linear map; published: none.
        ratio: inner channels over C.
        states: numbers in the state of a channel.
        rank: of the step sizes; unset is ⌈C / 16⌉.
        dropout: rate behind the last map, in training.
        directions: see :func:`torchconv.ops.hrvmamba_scan.cross_scan`.
        backend: of the scan, see :func:`torchconv.kernels.selective_scan`.

    Shape:
        (N, in_channels, H, W) → (N, out_channels, H, W).

    Raises:
        ValueError: an argument is out of range or not supported; the message names it.

    Example:
        >>> SS2d(16)(torch.randn(2, 16, 6, 5)).shape
        torch.Size([2, 16, 6, 5])

    Reference: arXiv 2403.17902, section 3; arXiv 2401.10166, section 4.
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
        states: int = 16,
        rank: int | None = None,
        dropout: float = 0.0,
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
        self.kernel_size = ntuple("kernel_size", kernel_size, 2)
        check_odd(self.kernel_size, "SS2D")
        check_same(padding, self.kernel_size, "SS2D")
        check(0 < ratio < math.inf, "ratio", ratio, "must be a positive number")
        inner = int(ratio * in_channels)
        check(inner >= 1, "ratio", ratio, "leaves no inner channel")
        check(0 <= dropout < 1, "dropout", dropout, "must be at least 0 and below 1")
        rank = math.ceil(in_channels / 16) if rank is None else rank
        check_positive("rank", rank)
        self.in_channels, self.out_channels, self.dropout = in_channels, out_channels, dropout
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = Pointwise(in_channels, 2 * inner, bias=bias, **options)
        height, width = self.kernel_size
        pads = (height // 2, width // 2)
        self.conv2d = nn.Conv2d(inner, inner, (height, width), padding=pads, groups=inner, **options)
        self._add_scans(inner, states, rank, directions, backend, **options)
        self.out_norm = nn.LayerNorm(inner, **options)
        self.out_proj = Pointwise(inner, out_channels, bias=bias, **options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Mamba's for the scans; linear maps normal with deviation 0.02, cut at 2; the convolution PyTorch's."""
        for layer in (self.in_proj, self.out_proj):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        self.conv2d.reset_parameters()
        self.out_norm.reset_parameters()
        self._reset_scans()

    def param_options(self) -> dict[str, dict[str, float]]:
        """Rates, steps and the direct path are not decayed."""
        return {**super().param_options(), "dt_projs_bias": {"weight_decay": 0.0}}

    def forward(self, x: Tensor) -> Tensor:
        """Mix ``x``."""
        check_input(x, self.in_channels, 2)
        last = _channels_last(x)
        h, gate = self.in_proj(x.permute(0, 2, 3, 1)).chunk(2, 3)
        h = F.silu(apply_conv(self.conv2d, h.permute(0, 3, 1, 2)))
        y = self.scan(h).transpose(1, 2).unflatten(1, h.shape[2:])
        y = self.out_proj(self.out_norm(y) * F.silu(gate))
        return _placed(F.dropout(y, self.dropout, self.training), last)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, inner={self.inner}, "
            f"states={self.states}, rank={self.rank}, directions={self.directions!r}"
        )


def _channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _placed(y: Tensor, last: bool) -> Tensor:
    """(N, H, W, C) → (N, C, H, W) in the layout that the input had."""
    y = y.permute(0, 3, 1, 2)
    return y if last else y.contiguous()


@part(
    "patch-merging",
    paper="serpent",
    kind="layer",
    dims=(2,),
    probe={"build": {"in_channels": 6}, "inputs": [[2, 6, 7, 10]]},
    keywords="patch merging downsampling halve resolution Swin VMamba U-Net multi-scale",
)
class PatchMerging2d(nn.Module):
    """Half the resolution: 2 × 2 pixels side by side, normalised together, then a linear map of 4C to 2C channels.

    The pixels follow each other by column, (0, 0), (1, 0), (0, 1), (1, 1) as (row, column).

    Args:
        in_channels: C.
        out_channels: unset is 2C.
        odd: "pad" a last odd row or column with zeros, or "crop" it.

    Shape:
        (N, in_channels, H, W) → (N, out_channels, ⌈H / 2⌉, ⌈W / 2⌉), rounded down with "crop".

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> PatchMerging2d(8)(torch.randn(1, 8, 6, 5)).shape
        torch.Size([1, 16, 3, 3])

    Reference: Liu et al., arXiv 2103.14030, section 3.1; arXiv 2401.10166.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        odd: str = "pad",
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        out_channels = 2 * in_channels if out_channels is None else out_channels
        check_positive("in_channels", in_channels)
        check_positive("out_channels", out_channels)
        check_choice("odd", odd, ODD)
        self.in_channels, self.out_channels, self.odd = in_channels, out_channels, odd
        self.norm = nn.LayerNorm(4 * in_channels, device=device, dtype=dtype)
        self.reduction = Pointwise(4 * in_channels, out_channels, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Merge the pixels of ``x``."""
        check_input(x, self.in_channels, 2)
        last = _channels_last(x)
        rows, columns = x.shape[2] % 2, x.shape[3] % 2
        if rows or columns:
            sign = 1 if self.odd == "pad" else -1
            x = F.pad(x, (0, sign * columns, 0, sign * rows))
        n, c, h, w = x.shape
        pixels = x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 5, 3, 1).flatten(3)
        return _placed(self.reduction(self.norm(pixels)), last)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"{self.in_channels}, {self.out_channels}, odd={self.odd!r}"


@part(
    "patch-expand",
    paper="serpent",
    kind="layer",
    dims=(2,),
    probe={"build": {"in_channels": 8}, "inputs": [[2, 8, 5, 4]]},
    keywords="patch expanding upsampling pixel shuffle Swin-Unet VM-UNet U-Net multi-scale",
)
class PatchExpand2d(nn.Module):
    """``scale`` times the resolution: a linear map to scale·C channels, dealt out to scale × scale pixels, normalised.

    Args:
        in_channels: C, a multiple of ``scale``.
        scale: s ≥ 1.

    Shape:
        (N, in_channels, H, W) → (N, in_channels / s, s·H, s·W).

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> PatchExpand2d(8, 4)(torch.randn(1, 8, 3, 2)).shape
        torch.Size([1, 2, 12, 8])

    Reference: Cao et al., arXiv 2105.05537 (Swin-Unet); Ruan et al., arXiv 2402.02491 (VM-UNet).
    """

    def __init__(self, in_channels: int, scale: int = 2, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        check_positive("in_channels", in_channels)
        check_positive("scale", scale)
        check(in_channels % scale == 0, "in_channels", in_channels, f"must be a multiple of scale={scale}")
        self.in_channels, self.scale = in_channels, scale
        self.expand = Pointwise(in_channels, scale * in_channels, bias=False, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(in_channels // scale, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Expand ``x``."""
        check_input(x, self.in_channels, 2)
        last = _channels_last(x)
        s = self.scale
        n, c, h, w = x.shape
        pixels = self.expand(x.permute(0, 2, 3, 1)).reshape(n, h, w, s, s, c // s)
        return _placed(self.norm(pixels.transpose(2, 3).reshape(n, h * s, w * s, c // s)), last)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"{self.in_channels}, scale={self.scale}"
