"""Large depthwise kernel trained with dilated side branches that fold into it (UniRepLKNet).

X. Ding, Y. Zhang et al., "UniRepLKNet: A Universal Perception Large-Kernel ConvNet", CVPR 2024, arXiv 2311.15599;
Y. Zhang, X. Ding, X. Yue, "Scaling Up Your Kernels", TPAMI 2025, arXiv 2410.08049.

A large kernel alone learns fine detail badly. In training it is therefore accompanied by small kernels at several
dilations, each followed by its own batch norm; with fixed statistics the sum is again one K × K convolution:

    y = BN₀(W₀ ⋆ x) + Σ_j BN_j(W_j ⋆_{r_j} x)  =  (s₀W₀ + Σ_j pad(s_j · dense(W_j, r_j))) ⋆ x + Σ_j t_j,

with s = γ/√(σ²+ε), t = β − μ·s a channel, and ``dense`` putting r − 1 zeros between the taps.

Cost a channel and position: K^n multiply-adds merged, K^n + Σ_j k_j^n while training (K = 13 in 2-D: 169 and 270).
In eval mode the branches are folded *before* the convolution, so that validation, and fine-tuning with frozen batch
norms, pay for one convolution too; the fold is differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_positive
from torchconv.catalog import part
from torchconv.kernels.precision import HALF
from torchconv.ops._common import (
    BATCH_NORM,
    CONV,
    Padding,
    Size,
    apply_conv,
    check_depthwise,
    check_input,
    check_same,
    check_unit,
    conv_nd,
    dilate_kernel,
    make_conv,
    ntuple,
)

# Kernel size → (size, dilation) of the side branches; every extent r(k−1)+1 is odd and at most the kernel's.
BRANCHES: dict[int, tuple[tuple[int, int], ...]] = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 2), (3, 3)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}


def dilated_kernel_to_dense(weight: Tensor, dilation: Size) -> Tensor:
    """The dense kernel that equals ``weight`` at ``dilation``: r − 1 zeros between neighbouring taps.

    Args:
        weight: (out, in/groups, \\*kernel), 1 to 3 spatial axes.
        dilation: r ≥ 1, int or one per axis.

    Shape:
        kernel sizes k → r(k − 1) + 1.

    Example:
        >>> dilated_kernel_to_dense(torch.ones(1, 1, 3), 2)[0, 0].tolist()
        [1.0, 0.0, 1.0, 0.0, 1.0]

    Reference: arXiv 2311.15599, section 3.2.
    """
    return dilate_kernel(weight, dilation)


def merge_branches(
    weights: Sequence[Tensor], dilations: Sequence[int], biases: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor | None]:
    """Sum of convolutions at several sizes and dilations as one convolution; differentiable.

    W = W₀ + Σ_j pad(dense(W_j, r_j)), b = Σ_j b_j; each branch sits in the centre of the first, largest kernel.

    Args:
        weights: kernels (C_out, C_in/groups, \\*kernel), the large one first; each extent fits centred into it.
        dilations: one a kernel; the first kernel's is 1.
        biases: one a kernel, or none at all.

    Returns:
        (weight, bias), bias None without ``biases``.

    Raises:
        ValueError: lengths differ, or a branch's extent does not fit centred into the first kernel.

    Example:
        >>> w, b = merge_branches([torch.zeros(1, 1, 5), torch.ones(1, 1, 3)], [1, 2])
        >>> w[0, 0].tolist()
        [1.0, 0.0, 1.0, 0.0, 1.0]

    Reference: arXiv 2311.15599, section 3.2 and figure 2.
    """
    check(len(weights) == len(dilations) > 0, "dilations", tuple(dilations), "must give one dilation per kernel")
    check(dilations[0] == 1, "dilations", tuple(dilations), "the first, large kernel is not dilated")
    check(len(biases) in (0, len(weights)), "biases", len(biases), "must be none or one per kernel")
    total = weights[0]
    sizes = total.shape[2:]
    for weight, dilation in zip(weights[1:], dilations[1:], strict=True):
        dense = dilate_kernel(weight, dilation)
        gaps = [large - small for large, small in zip(sizes, dense.shape[2:], strict=True)]
        fits = all(g >= 0 and g % 2 == 0 for g in gaps)
        check(fits, "dilations", dilation, f"extent {tuple(dense.shape[2:])} does not fit centred into {tuple(sizes)}")
        total = total + F.pad(dense, [p for g in reversed(gaps) for p in (g // 2, g // 2)])
    if not biases:
        return total, None
    bias = biases[0]
    for more in biases[1:]:
        bias = bias + more
    return total, bias


def scale_shift(bn: Any) -> tuple[Tensor, Tensor]:
    """A batch norm with fixed statistics as y = scale·x + shift, at least in float32; differentiable in γ and β."""
    dtype = torch.promote_types(bn.running_var.dtype, torch.float32)
    scale = torch.rsqrt(bn.running_var.to(dtype) + bn.eps)
    if bn.weight is not None:
        scale = scale * bn.weight.to(dtype)
    shift = -bn.running_mean.to(dtype) * scale
    return scale, shift if bn.bias is None else shift + bn.bias.to(dtype)


def uses_fixed_statistics(bn: Any) -> bool:
    """Whether the batch norm normalises by its running statistics now."""
    return not bn.training and bn.running_mean is not None and bn.running_var is not None


@part(
    "unireplknet",
    paper="unireplknet",
    kind="operator",
    dims=(1, 2, 3),
    mixes="space",
    supports=(),
    merges="conv",
    mixer={"kernel_size": 13},
    conv={"kernel_size": 7},
    keywords="large kernel dilated reparameterization structural re-parameterisation branches receptive field backbone",
)
class DilatedReparamConv(nn.Module):
    """Depthwise large kernel with parallel dilated small ones in training, one plain depthwise convolution after it.

    y = BN₀(W₀ ⋆ x) + Σ_j BN_j(W_j ⋆_{r_j} x), zero "same" padding; the branches (k_j, r_j) follow from the kernel
    size (:data:`BRANCHES`).

    Args:
        in_channels: channels C ≥ 1.
        out_channels: None or C.
        kernel_size: 5, 7, 9, 11, 13, 15 or 17, the same on every axis. Default 13.
        stride, dilation: 1.
        padding: "same".
        groups: None or C.
        bias: whether the convolution of the ``deploy`` form has a bias. The training form has no convolution bias in
            either case, and always an offset, which the batch norms give; so has its ``merge()``.
        deploy: build the merged form: only ``lk_origin``, with bias, and no batch norm.

    Shape:
        (N, C, \\*spatial) → (N, C, \\*spatial); spatial sizes ≥ 1, smaller than the kernel too.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> op = DilatedReparamConv2d(8, kernel_size=7).eval()
        >>> x = torch.randn(2, 8, 9, 12)
        >>> conv = op.merge()
        >>> conv.kernel_size, torch.allclose(conv(x), op(x), atol=1e-5)
        ((7, 7), True)

    Reference: arXiv 2311.15599, section 3.2 (Dilated Reparam Block).
    """

    ndim: ClassVar[int] = 0
    table: ClassVar[dict[int, tuple[tuple[int, int], ...]]] = BRANCHES
    branches: tuple[tuple[int, int], ...]

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_size: Size = 13,
        stride: Size = 1,
        padding: Padding = "same",
        dilation: Size = 1,
        groups: int | None = None,
        bias: bool = True,
        *,
        deploy: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_depthwise(in_channels, out_channels, groups, name)
        sizes = ntuple("kernel_size", kernel_size, self.ndim)
        size = sizes[0]
        near = sorted(k for k in self.table if abs(k - size) == min(abs(j - size) for j in self.table))
        remedy = f"{name} has branches for {', '.join(map(str, self.table))}; use {' or '.join(map(str, near))}"
        check(size in self.table, "kernel_size", kernel_size, remedy)
        check(len(set(sizes)) == 1, "kernel_size", kernel_size, f"{name} needs the same size on every axis")
        check_unit("stride", stride, self.ndim, name, "follow it with a pooling or a strided convolution")
        check_unit("dilation", dilation, self.ndim, name, "choose a larger kernel_size")
        check_same(padding, sizes, name)
        self.in_channels = self.out_channels = self.groups = in_channels
        self.kernel_size, self.padding, self.deploy = sizes, padding, deploy
        self.branches = () if deploy else self.table[size]
        options = {"groups": in_channels, "device": device, "dtype": dtype}
        conv, norm = CONV[self.ndim], BATCH_NORM[self.ndim]
        self.lk_origin = conv(in_channels, in_channels, size, padding=size // 2, bias=bool(bias) and deploy, **options)
        if deploy:
            return
        self.origin_bn = norm(in_channels, device=device, dtype=dtype)
        for k, r in self.branches:
            pad = r * (k - 1) // 2
            side = conv(in_channels, in_channels, k, padding=pad, dilation=r, bias=False, **options)
            self.add_module(f"dil_conv_k{k}_{r}", side)
            self.add_module(f"dil_bn_k{k}_{r}", norm(in_channels, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """PyTorch's defaults: convolutions uniform in ±1/√fan_in, batch norms the identity."""
        for child in self.children():
            reset: Any = child.reset_parameters
            reset()

    def pairs(self) -> list[tuple[Any, Any]]:
        """(convolution, batch norm) of every branch, the large kernel first; empty in the deploy form."""
        if self.deploy:
            return []
        sides = [(getattr(self, f"dil_conv_k{k}_{r}"), getattr(self, f"dil_bn_k{k}_{r}")) for k, r in self.branches]
        return [(self.lk_origin, self.origin_bn), *sides]

    def merged_weight(self) -> tuple[Tensor, Tensor | None]:
        """Kernel (C, 1, \\*kernel) and bias of the merged convolution in the weights' dtype; differentiable."""
        if self.deploy:
            return self.lk_origin.weight, self.lk_origin.bias
        weights, biases = [], []
        for conv, bn in self.pairs():
            scale, shift = scale_shift(bn)
            weights.append(conv.weight.to(scale.dtype) * scale.reshape(-1, *[1] * (self.ndim + 1)))
            biases.append(shift)
        weight, bias = merge_branches(weights, [1, *(r for _, r in self.branches)], biases)
        dtype = self.lk_origin.weight.dtype
        return weight.to(dtype), None if bias is None else bias.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x``: branch by branch while a batch norm learns its statistics, merged otherwise."""
        check_input(x, self.in_channels, self.ndim)
        y: Tensor
        if self.deploy:
            y = self.lk_origin(x)
            return y
        pairs = self.pairs()
        if all(uses_fixed_statistics(bn) for _, bn in pairs):
            weight, bias = self.merged_weight()
            return conv_nd(x, weight, bias, padding=self.kernel_size[0] // 2, groups=self.groups)
        y = pairs[0][1](apply_conv(pairs[0][0], x))
        for conv, bn in pairs[1:]:
            y = y + bn(apply_conv(conv, x))
        return y

    def merge(self) -> nn.Module:
        """The same map, with the running statistics, as one depthwise ``nn.ConvNd``."""
        weight, bias = self.merged_weight()
        return make_conv(weight, bias, padding=self.kernel_size[0] // 2, groups=self.groups)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"{self.in_channels}, kernel_size={self.kernel_size}, deploy={self.deploy}"


class DilatedReparamConv1d(DilatedReparamConv):
    """Dilated re-parameterised depthwise convolution over (N, C, L)."""

    ndim = 1


class DilatedReparamConv2d(DilatedReparamConv):
    """Dilated re-parameterised depthwise convolution over (N, C, H, W)."""

    ndim = 2


class DilatedReparamConv3d(DilatedReparamConv):
    """Dilated re-parameterised depthwise convolution over (N, C, D, H, W)."""

    ndim = 3


def global_response_norm(x: Tensor, gamma: Tensor, beta: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Scale every channel by its share of the image's response.

    G_c = ‖x[…, c]‖₂ over the positions, N_c = G_c / (mean_c G + eps), y = (γ_c N_c + 1)·x + β_c.

    Args:
        x: channels last.
        gamma, beta: broadcast against x, (…, C); β may be None.
        eps: > 0; defines 0/0 for an image of zeros.

    Shape:
        (N, \\*spatial, C) → the same.

    Reference: Woo et al., arXiv 2301.00808, algorithm 1.
    """
    places = tuple(range(1, x.dim() - 1))
    if x.dtype in HALF:
        response = torch.linalg.vector_norm(x, dim=places, keepdim=True)  # squares would overflow
    else:
        # Six times as fast as vector_norm over axes that are not the last; a channel of zeros gets no gradient in both.
        response = x.square().sum(places, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny).sqrt()
    share = response / (response.mean(-1, keepdim=True) + eps)
    y = (gamma * share + 1) * x
    return y if beta is None else y + beta


@part(
    "grn",
    paper="unireplknet",
    kind="layer",
    dims=(1, 2, 3),
    probe={"build": {"dim": 6}, "inputs": [[2, 5, 4, 6]]},
    keywords="global response normalization normalisation ConvNeXt V2 channel competition",
)
class GRN(nn.Module):
    """Global response normalisation, channels last: channels compete by their norm over the image.

    y = (γ_c N_c + 1)·x + β_c with N_c the channel's L2 norm over the mean of all channels'. γ = β = 0 at the start,
    which is the identity.

    Args:
        dim: channels ≥ 1.
        use_bias: learn β. False is the form left after folding β into the next linear layer.
        ndim: spatial axes, 1 to 3; γ and β have shape (1, …, 1, dim) with ndim + 2 axes.

    Shape:
        (N, \\*spatial, dim) → the same.

    Example:
        >>> GRN(4)(torch.ones(1, 2, 2, 4)).shape
        torch.Size([1, 2, 2, 4])

    Reference: arXiv 2301.00808, algorithm 1; arXiv 2311.15599, section 3.1.
    """

    def __init__(
        self, dim: int, use_bias: bool = True, *, ndim: int = 2, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        check_positive("dim", dim)
        check(ndim in (1, 2, 3), "ndim", ndim, "must be 1, 2 or 3")
        shape = (*[1] * (ndim + 1), dim)
        self.dim, self.ndim, self.use_bias = dim, ndim, use_bias
        self.gamma = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if use_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """γ = β = 0: the identity."""
        nn.init.zeros_(self.gamma)
        if self.beta is not None:
            nn.init.zeros_(self.beta)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` (N, \\*spatial, dim)."""
        if x.dim() != self.ndim + 2 or x.shape[-1] != self.dim:
            raise ValueError(f"x of shape {tuple(x.shape)}: expected {self.ndim + 2} axes, the last of {self.dim}")
        return global_response_norm(x, self.gamma, self.beta)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"{self.dim}, use_bias={self.use_bias}"
