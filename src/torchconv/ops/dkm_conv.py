"""Convolutional deep kernel machines: patches, mixing of inducing points, normalisation and pooling of Gram matrices.

Milsom, Anson, Aitchison, "Convolutional Deep Kernel Machines", 2023, arXiv 2309.09814. A convolution of features with
random weights has, in expectation, a Gram matrix that is a mean over the taps; inducing points have no space, and the
ones of the next layer are made of those before by a learned k × k mixing:

    K_ti ← conv(K_ti, Ŵ)/k²,   K_ii ← mean over taps d of Ŵ_d K_ii Ŵ_dᵀ,   K_t ← mean of K_t over the window

with Ŵ = W/√P. Cost: a convolution of P_in to P_out channels a layer, and k² products of P × P matrices.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive
from torchconv.catalog import part
from torchconv.ops.dkm import GramLayer, Inputs, ReluKernel, SumKernel
from torchconv.theory.dkm import GramStructure, cholesky, projected


def _window_mean(t: Tensor, size: int, stride: int) -> Tensor:
    """The mean over the part of each window that lies in the image."""
    y = F.avg_pool2d(t.unsqueeze(1), size, stride, size // 2, count_include_pad=False)
    return y.squeeze(1)


class ConvF2G(nn.Module):
    """Gram matrices of patches: inner products with inducing patches (P, k, k, C), divided by C k²."""

    def forward(self, inputs: Inputs) -> GramStructure:
        """Of patches and images (N, C, H, W); K_ti is (N, H, W, P)."""
        patches, x = inputs
        k, channels = patches.shape[1], patches.shape[3]
        check(k == patches.shape[2], "X", tuple(patches.shape), "give square patches (P, k, k, C)")
        size, flat = channels * k * k, patches.flatten(1)
        ti = F.conv2d(x, patches.permute(0, 3, 1, 2), padding=k // 2) / size
        t = _window_mean(x.square().mean(1), k, 1)
        return GramStructure(flat @ flat.T / size, ti.movedim(1, -1), t, x.new_zeros(()))


@part(
    "conv-mixup",
    paper="dkm",
    kind="theory",
    keywords="convolution of kernels inducing points deep kernel machine",
)
class ConvMixup(nn.Module):
    """The convolution: space of the data, and new inducing points out of the old ones.

    Args:
        inducing_in, inducing_out: P before and after; more than k² · ``inducing_in`` makes K_ii singular.
        kernel_size: k, padded by k // 2.
        stride: of the data.

    Example:
        >>> g = ConvF2G()(Inputs(torch.randn(4, 3, 3, 2), torch.randn(5, 2, 8, 8)))
        >>> tuple(ConvMixup(4, 6, 3, 2)(g).ti.shape)
        (5, 4, 4, 6)
    """

    def __init__(self, inducing_in: int, inducing_out: int, kernel_size: int = 3, stride: int = 1) -> None:
        super().__init__()
        sizes = {"inducing_in": inducing_in, "inducing_out": inducing_out, "kernel_size": kernel_size, "stride": stride}
        for name, value in sizes.items():
            check_positive(name, value)
        self.stride = stride
        self.latent_learned_weights = nn.Parameter(torch.randn(inducing_out, inducing_in, kernel_size, kernel_size))

    def forward(self, g: GramStructure) -> GramStructure:
        """Mix."""
        check(g.ti.dim() == 4, "ti", tuple(g.ti.shape), "give blocks of images, (N, H, W, P)")
        size = self.latent_learned_weights.shape[1]
        check(g.ti.shape[-1] == size, "ti", tuple(g.ti.shape), f"this layer takes {size} inducing points")
        weights = self.latent_learned_weights / math.sqrt(size)
        k = weights.shape[2]
        ti = F.conv2d(g.ti.movedim(-1, 1), weights, padding=k // 2, stride=self.stride) / k**2
        taps = weights.flatten(2).movedim(2, 0)
        ii = torch.einsum("dap,pq,dbq->ab", taps, g.ii, taps) / k**2
        return g.but(ii=ii, ti=ti.movedim(1, -1), t=_window_mean(g.t, k, self.stride))


I_NORMS = ("none", "global", "local")
T_NORMS = ("none", "global", "local", "location", "image")
I_SCALES = ("none", "global", "local")
T_SCALES = ("none", "global", "location")


class _InducingScale(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.i_logscale = nn.Parameter(torch.zeros(size))


class _DataScale(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.t_logscale = nn.Parameter(torch.zeros(*shape))


@part(
    "gram-batch-norm",
    paper="dkm",
    kind="theory",
    keywords="batch normalisation of Gram matrices deep kernel machine",
)
class GramBatchNorm(nn.Module):
    """Divide features that nobody formed by their standard deviation: rows and columns of the Gram matrix.

    Args:
        i_norm: of inducing points: "none", "global" (mean of the diagonal) or "local" (each by its own).
        t_norm: of data: "none", "global", "local" (each pixel), "location" (mean over the batch) or "image" (mean
            over an image).
        i_scale: learned log-scale: "none", "global" or "local" (each inducing point, needs ``inducing``).
        t_scale: "none", "global" or "location" (each pixel, needs ``size``).
        inducing, size: P and (H, W).

    There are no running statistics: batches normalise themselves, in evaluation too.
    """

    def __init__(
        self,
        i_norm: str = "local",
        t_norm: str = "local",
        i_scale: str = "global",
        t_scale: str = "global",
        *,
        inducing: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        check_choice("i_norm", i_norm, I_NORMS)
        check_choice("t_norm", t_norm, T_NORMS)
        check_choice("i_scale", i_scale, I_SCALES)
        check_choice("t_scale", t_scale, T_SCALES)
        check(i_scale != "local" or inducing is not None, "inducing", inducing, "i_scale='local' needs it")
        check(t_scale != "location" or size is not None, "size", size, "t_scale='location' needs it")
        self.i_norm, self.t_norm = i_norm, t_norm
        if i_scale != "none":
            self.i_scale = _InducingScale(1 if i_scale == "global" else inducing or 1)
        if t_scale != "none":
            self.t_scale = _DataScale(1) if t_scale == "global" or size is None else _DataScale(1, *size, 1)

    def forward(self, g: GramStructure) -> GramStructure:
        """Normalise and scale."""
        i, t = self._inducing(g.ii.diagonal()), self._data(g.t)
        if hasattr(self, "i_scale"):
            i = i * self.i_scale.i_logscale.exp()
        if hasattr(self, "t_scale"):
            scale = self.t_scale.t_logscale.exp()
            t = t * (scale.squeeze(-1) if scale.dim() > 1 else scale)
        i, t = i.expand(len(g.ii)), t.expand(g.t.shape)
        return g.but(ii=g.ii * i[:, None] * i, ti=g.ti * t.unsqueeze(-1) * i, t=g.t * t * t)

    def _inducing(self, diagonal: Tensor) -> Tensor:
        if self.i_norm == "none":
            return diagonal.new_ones(1)
        return (diagonal.mean(0, keepdim=True) if self.i_norm == "global" else diagonal).rsqrt()

    def _data(self, t: Tensor) -> Tensor:
        if self.t_norm == "none":
            return t.new_ones(1)
        if self.t_norm == "local":
            return t.rsqrt()
        check(self.t_norm == "global" or t.dim() == 3, "t", tuple(t.shape), f"t_norm={self.t_norm!r} needs images")
        axes = {"global": tuple(range(t.dim())), "location": (0,), "image": (1, 2)}[self.t_norm]
        return t.mean(axes, keepdim=True).rsqrt()

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"i_norm={self.i_norm!r}, t_norm={self.t_norm!r}"


def _mixed(ii: Tensor, ti: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    weights = weights / math.sqrt(weights.shape[1])
    return weights @ ii @ weights.T, ti @ weights.T


class NystromGAP(nn.Module):
    """Global average pooling with the covariances of pixels as the inducing points explain them.

    Args:
        inducing_in, inducing_out: also mix the inducing points; None leaves them.
    """

    def __init__(self, inducing_in: int | None = None, inducing_out: int | None = None) -> None:
        super().__init__()
        check((inducing_in is None) == (inducing_out is None), "inducing_out", inducing_out, "give both or neither")
        if inducing_in is not None and inducing_out is not None:
            self.latent_learned_weights = nn.Parameter(torch.randn(inducing_out, inducing_in))

    def forward(self, g: GramStructure) -> GramStructure:
        """(N, H, W, P) → (N, P)."""
        check(g.ti.dim() == 4, "ti", tuple(g.ti.shape), "give blocks of images, (N, H, W, P)")
        factor, ti = cholesky(g.ii), g.ti.mean((1, 2))
        a = projected(factor, g.ti)
        left = g.t - (a * g.ti).sum(-1)
        positions = g.t.shape[1] * g.t.shape[2]
        t = ((a.mean((1, 2)) * ti).sum(-1) + left.sum((1, 2)) / positions**2).clamp(min=0)
        ii = g.ii
        if hasattr(self, "latent_learned_weights"):
            ii, ti = _mixed(ii, ti, self.latent_learned_weights)
        return g.but(ii=ii, ti=ti, t=t)


class BigFinalConv(nn.Module):
    """A last convolution as large as the image: the mean over positions.

    Args:
        inducing_in, inducing_out, positions: with weights of its own for each of the H · W positions; None without.
    """

    def __init__(
        self, inducing_in: int | None = None, inducing_out: int | None = None, positions: int | None = None
    ) -> None:
        super().__init__()
        given = [v for v in (inducing_in, inducing_out, positions) if v is not None]
        check(len(given) in (0, 3), "positions", positions, "give inducing_in, inducing_out and positions, or none")
        if inducing_in is not None and inducing_out is not None and positions is not None:
            self.inducing = inducing_in
            self.latent_learned_weights = nn.Parameter(torch.randn(inducing_out, positions * inducing_in))

    def forward(self, g: GramStructure) -> GramStructure:
        """(N, H, W, P) → (N, P)."""
        check(g.ti.dim() == 4, "ti", tuple(g.ti.shape), "give blocks of images, (N, H, W, P)")
        ii, ti, t = g.ii, g.ti.mean((1, 2)), g.t.mean((1, 2))
        if hasattr(self, "latent_learned_weights"):
            size, flat = g.t.shape[1] * g.t.shape[2], g.ti.flatten(1)
            weights = self.latent_learned_weights / math.sqrt(self.inducing)
            fits = flat.shape[1] == weights.shape[1]
            check(fits, "ti", tuple(g.ti.shape), f"this layer takes {weights.shape[1] // self.inducing} positions")
            ti = flat @ weights.T / size
            each = weights.unflatten(1, (size, self.inducing))
            ii = torch.einsum("asp,pq,bsq->ab", each, g.ii, each) / size
        return g.but(ii=ii, ti=ti, t=t)


Norms = tuple[str, str, str, str]


class ResNetBlock(nn.Module):
    """Residual blocks of two (kernel, convolution, Gram matrix, norm) each, with the mean as residual connection.

    Args:
        count: blocks; the first one strides and changes the number of inducing points.
        inducing_in, inducing_out: P before and after.
        dof: ν of the Gram layers; None leaves them out, which is ν = ∞.
        stride: of the first block.
        norms: arguments of :class:`GramBatchNorm`.
        gram: options of :class:`~torchconv.ops.dkm.GramLayer`.
    """

    def __init__(
        self,
        count: int,
        inducing_in: int,
        inducing_out: int,
        dof: float | None,
        *,
        stride: int = 1,
        norms: Norms = ("local", "local", "global", "global"),
        gram: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        check_positive("count", count)

        def half(before: int, step: int) -> list[nn.Module]:
            layers: list[nn.Module] = [ReluKernel(), ConvMixup(before, inducing_out, 3, step)]
            if dof is not None:
                layers.append(GramLayer(inducing_out, dof, **(gram or {})))
            return [*layers, GramBatchNorm(*norms)]

        blocks: list[nn.Module] = []
        for number in range(count):
            before, step = (inducing_in, stride) if number == 0 else (inducing_out, 1)
            shortcut: nn.Module = nn.Identity()
            if step != 1 or before != inducing_out:
                shortcut = nn.Sequential(ConvMixup(before, inducing_out, 1, step), GramBatchNorm(*norms))
            blocks.append(SumKernel([shortcut, nn.Sequential(*half(before, step), *half(inducing_out, 1))]))
        self.b: nn.Module = blocks[0] if count == 1 else nn.Sequential(*blocks)

    def forward(self, g: GramStructure) -> GramStructure:
        """Through all blocks."""
        found: GramStructure = self.b(g)
        return found
