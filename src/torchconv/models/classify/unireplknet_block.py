"""The residual block of UniRepLKNet and its small parts (X. Ding et al., CVPR 2024, arXiv 2311.15599).

y = x + γ·f(x), f = depthwise K × K → BN → squeeze-excitation → linear C → 4C → GELU → GRN → linear 4C → C → BN. For
K ≥ 7 the depthwise convolution has dilated side branches (:mod:`torchconv.ops.unireplknet`). ``merge()`` folds every
branch, both batch norms, γ and GRN's β into one depthwise convolution and two linear layers, exactly.

Cost of a merged block a pixel: K²·C multiply-adds for the convolution, 8C² for the linear layers at ``ffn_factor`` 4.
Names of parameters are those of the authors' checkpoints.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_positive
from torchconv.catalog import part
from torchconv.models._drop_path import DropPath
from torchconv.ops.unireplknet import BRANCHES, GRN, DilatedReparamConv2d, scale_shift


class LayerNorm2d(nn.Module):
    """Layer norm over the channels of every pixel, (N, C, H, W) → the same."""

    def __init__(self, channels: int, eps: float = 1e-6, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x``."""
        y = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, self.eps)
        return y.permute(0, 3, 1, 2)


class SqueezeExcitation(nn.Module):
    """x·σ(up(relu(down(mean x)))): channels weighted by a bottleneck network of their means."""

    def __init__(self, channels: int, hidden: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, hidden, 1, device=device, dtype=dtype)
        self.up = nn.Conv2d(hidden, channels, 1, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Weigh the channels of ``x``."""
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class ToChannelsLast(nn.Module):
    """(N, C, H, W) → (N, H, W, C), a view."""

    def forward(self, x: Tensor) -> Tensor:
        """Permute ``x``."""
        return x.permute(0, 2, 3, 1)


class ToChannelsFirst(nn.Module):
    """(N, H, W, C) → (N, C, H, W), a view."""

    def forward(self, x: Tensor) -> Tensor:
        """Permute ``x``."""
        return x.permute(0, 3, 1, 2)


@part(
    "unireplknet-block",
    paper="unireplknet",
    kind="layer",
    dims=(2,),
    merges="self",
    probe={"build": {"dim": 8, "kernel_size": 7, "layer_scale_init_value": 1.0}, "inputs": [[2, 8, 6, 5]]},
    keywords="large kernel block squeeze excitation GRN layer scale residual",
)
class UniRepLKNetBlock(nn.Module):
    """One residual block, y = x + DropPath(γ·f(x)).

    Args:
        dim: channels C ≥ 4 (the squeeze-excitation has C // 4 hidden units).
        kernel_size: 0 (no spatial mixing), 3 or 5 (plain depthwise), or 7, 9 … 17 (with dilated branches).
        drop_path: probability in [0, 1) of dropping the residual of a sample in training.
        layer_scale_init_value: start of γ; None, 0 or a negative number removes it.
        deploy: build the merged form: no batch norm, γ or GRN bias, biases in the convolution and both linear layers.
        ffn_factor: hidden width over C, > 0; int(ffn_factor·C) units.

    Shape:
        (N, C, H, W) → (N, C, H, W).

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> block = UniRepLKNetBlock(8, 7, layer_scale_init_value=1.0).eval()
        >>> x = torch.randn(1, 8, 6, 6)
        >>> torch.allclose(block.merge()(x), block(x), atol=1e-5)
        True

    Reference: arXiv 2311.15599, section 3.1 and figure 3.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        drop_path: float = 0.0,
        layer_scale_init_value: float | None = 1e-6,
        deploy: bool = False,
        ffn_factor: float = 4,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_positive("dim", dim)
        check(dim >= 4, "dim", dim, "must be at least 4, squeeze-excitation works on dim // 4 units")
        check(int(ffn_factor * dim) >= 1, "ffn_factor", ffn_factor, "must leave at least one hidden unit")
        allowed = (0, 3, *BRANCHES)
        check(kernel_size in allowed, "kernel_size", kernel_size, f"must be one of {', '.join(map(str, allowed))}")
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden = int(ffn_factor * dim)
        self.dim, self.kernel_size, self.ffn_factor, self.deploy = dim, kernel_size, ffn_factor, deploy
        self.dwconv: nn.Module
        if kernel_size == 0:
            self.dwconv = nn.Identity()
        elif kernel_size >= 7:
            self.dwconv = DilatedReparamConv2d(dim, kernel_size=kernel_size, deploy=deploy, **options)
        else:
            pad = kernel_size // 2
            self.dwconv = nn.Conv2d(dim, dim, kernel_size, padding=pad, groups=dim, bias=deploy, **options)
        plain = deploy or kernel_size == 0
        self.norm: nn.Module = nn.Identity() if plain else nn.BatchNorm2d(dim, **options)
        self.se = SqueezeExcitation(dim, dim // 4, **options)
        self.pwconv1 = nn.Sequential(ToChannelsLast(), nn.Linear(dim, hidden, **options))
        self.act = nn.Sequential(nn.GELU(), GRN(hidden, use_bias=not deploy, **options))
        tail = [] if deploy else [nn.BatchNorm2d(dim, **options)]
        self.pwconv2 = nn.Sequential(nn.Linear(hidden, dim, bias=deploy, **options), ToChannelsFirst(), *tail)
        scaled = (layer_scale_init_value or 0) > 0 and not deploy
        self.gamma = nn.Parameter(torch.full((dim,), float(layer_scale_init_value or 0), **options)) if scaled else None
        self.drop_path: nn.Module = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        y = self.se(self.norm(self.dwconv(x)))
        y = self.pwconv2(self.act(self.pwconv1(y)))
        if self.gamma is not None:
            y = self.gamma.reshape(1, -1, 1, 1) * y
        return x + self.drop_path(y)

    def merged_state(self) -> dict[str, Tensor]:
        """State dict of the equivalent ``deploy`` block (running statistics), folded in float32 or higher."""
        state = {n: t.detach().clone() for n, t in self.state_dict().items()}
        if self.deploy:
            return state
        kept = {n: t for n, t in state.items() if n.split(".")[0] in ("se", "pwconv1")}
        with torch.no_grad():
            return {**kept, "act.1.gamma": state["act.1.gamma"], **self._merged_convolution(), **self._merged_linear()}

    def _merged_convolution(self) -> dict[str, Tensor]:
        conv: Any = self.dwconv
        if self.kernel_size == 0:
            return {}
        prefix, bias = "dwconv", None
        if self.kernel_size >= 7:
            weight, bias = conv.merged_weight()
            prefix = "dwconv.lk_origin"
        else:
            weight = conv.weight
        scale, shift = scale_shift(self.norm)
        offset = shift if bias is None else bias.to(scale.dtype) * scale + shift
        folded = weight.to(scale.dtype) * scale.reshape(-1, 1, 1, 1)
        return {f"{prefix}.weight": folded.to(weight.dtype), f"{prefix}.bias": offset.to(weight.dtype)}

    def _merged_linear(self) -> dict[str, Tensor]:
        # GRN's β reaches the output through the linear layer; batch norm and γ then scale it all.
        linear: Any = self.pwconv2[0]
        grn: Any = self.act[1]
        scale, shift = scale_shift(self.pwconv2[2])
        weight = linear.weight.to(scale.dtype)
        offset = (weight @ grn.beta.to(scale.dtype).reshape(-1)) * scale + shift
        if self.gamma is not None:
            gamma = self.gamma.to(scale.dtype)
            scale, offset = scale * gamma, offset * gamma
        dtype = linear.weight.dtype
        return {"pwconv2.0.weight": (weight * scale[:, None]).to(dtype), "pwconv2.0.bias": offset.to(dtype)}

    def merge(self) -> UniRepLKNetBlock:
        """The same map, with the running statistics, as a ``deploy`` block in eval mode."""
        rate = getattr(self.drop_path, "rate", 0.0)
        with torch.device("meta"):
            block = UniRepLKNetBlock(self.dim, self.kernel_size, rate, deploy=True, ffn_factor=self.ffn_factor)
        block.load_state_dict(self.merged_state(), assign=True)
        return block.eval()

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"{self.dim}, kernel_size={self.kernel_size}, ffn_factor={self.ffn_factor}, deploy={self.deploy}"
