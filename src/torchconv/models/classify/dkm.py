"""Convolutional deep kernel machines for images: a residual network of Gram matrices.

Milsom, Anson, Aitchison, "Convolutional Deep Kernel Machines", 2023, arXiv 2309.09814: whitened images, inducing
patches, one convolution, three stages of residual blocks with 16 m, 32 m and 64 m inducing points, pooling, and a
Gaussian process at the end. It is fitted to :meth:`~torchconv.ops.dkm.DeepKernelMachine.objective`, so it is not
among the networks of ``create_model``, whose training is another one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive
from torchconv.ops.dkm import DeepKernelMachine, GPOutput, GramLayer, Input, ReluKernel
from torchconv.ops.dkm_conv import BigFinalConv, ConvF2G, ConvMixup, GramBatchNorm, Norms, NystromGAP, ResNetBlock

POOLINGS = ("gap", "conv")


@dataclass(frozen=True)
class Whitening:
    """ZCA whitening of images with the statistics of a training set; call it with (N, C, H, W)."""

    mean: Tensor
    matrix: Tensor

    @classmethod
    def of(cls, images: Tensor, eps: float = 0.1) -> Whitening:
        """From training images; ``eps`` is added to the eigenvalues of their covariance.

        Memory and time are those of a matrix of C H W × C H W.

        Example:
            >>> images = torch.randn(200, 1, 3, 3) * torch.arange(1, 10).view(1, 1, 3, 3)
            >>> white = Whitening.of(images, 1e-6)(images)
            >>> torch.allclose(white.flatten(1).T @ white.flatten(1) / 200, torch.eye(9), atol=1e-3)
            True
        """
        check(images.dim() == 4 and images.is_floating_point(), "images", tuple(images.shape), "give (N, C, H, W)")
        check(eps > 0, "eps", eps, "must be > 0")
        flat = images.flatten(1).double()
        mean = flat.mean(0)
        values, vectors = torch.linalg.eigh((flat - mean).T @ (flat - mean) / len(flat))
        matrix = (vectors * (values.clamp(min=0) + eps).rsqrt()) @ vectors.T
        return cls(mean.to(images), matrix.to(images))

    def __call__(self, images: Tensor) -> Tensor:
        """Whitened images."""
        return ((images.flatten(1) - self.mean) @ self.matrix).view_as(images)


def inducing_patches(images: Tensor, count: int, size: int = 3, *, seed: int = 0) -> Tensor:
    """Random patches (count, size, size, C) of images (N, C, H, W): where inducing points start.

    Example:
        >>> tuple(inducing_patches(torch.randn(10, 3, 8, 8), 16).shape)
        (16, 3, 3, 3)
    """
    check_positive("count", count)
    check(images.dim() == 4 and min(images.shape[2:]) >= size, "images", tuple(images.shape), f"give {size}² at least")
    generator = torch.Generator().manual_seed(seed)
    ends = (len(images), images.shape[2] - size + 1, images.shape[3] - size + 1)
    picks = torch.stack([torch.randint(end, (count,), generator=generator) for end in ends], 1).tolist()
    return torch.stack([images[n, :, i : i + size, j : j + size] for n, i, j in picks]).movedim(1, -1)


def conv_dkm(
    images: Tensor,
    num_classes: int,
    *,
    multiplier: int = 1,
    blocks: int = 3,
    dof: float | None = 0.01,
    strides: tuple[int, int, int] = (2, 2, 2),
    pooling: str = "gap",
    norms: Norms = ("local", "local", "global", "global"),
    mc_samples: int = 100,
    gram: dict[str, str] | None = None,
    seed: int = 0,
) -> DeepKernelMachine:
    """Build the residual machine of the paper (18 kernels with ``blocks=3``) around the patches of some images.

    Args:
        images: (N, C, H, W) of the training set, whitened (:class:`Whitening`): inducing patches come from them, and
            one forward of a few of them sets the Gram layers to their kernels.
        num_classes: outputs.
        multiplier: m; the stages have 16 m, 32 m and 64 m inducing points (the paper: 1 to 32).
        blocks: residual blocks a stage.
        dof: ν of the Gram layers; None leaves them out, which is ν = ∞.
        strides: of the three stages.
        pooling: "gap": Nyström's global average pooling; "conv": means of the blocks.
        norms: of the batch norms, see :class:`~torchconv.ops.dkm_conv.GramBatchNorm`.
        mc_samples: function values drawn at the output.
        gram: options of :class:`~torchconv.ops.dkm.GramLayer`.
        seed: of the patches.

    Example:
        >>> machine = conv_dkm(torch.randn(8, 1, 8, 8, dtype=torch.float64), 3, blocks=1, mc_samples=4)
        >>> tuple(machine.predict(torch.randn(5, 1, 8, 8, dtype=torch.float64)).shape)
        (5, 3)
    """
    check_positive("num_classes", num_classes)
    check_positive("multiplier", multiplier)
    check_choice("pooling", pooling, POOLINGS)
    first, *widths = (16 * multiplier, 16 * multiplier, 32 * multiplier, 64 * multiplier)
    layers: list[nn.Module] = [Input(inducing_patches(images, first, seed=seed)), ConvF2G()]
    layers += [ReluKernel(), ConvMixup(first, first, 3)]
    if dof is not None:
        layers.append(GramLayer(first, dof, **(gram or {})))
    layers.append(GramBatchNorm(*norms))
    before = first
    for width, stride in zip(widths, strides, strict=True):
        layers.append(ResNetBlock(blocks, before, width, dof, stride=stride, norms=norms, gram=gram))
        before = width
    layers += [NystromGAP() if pooling == "gap" else BigFinalConv(), GramBatchNorm()]
    machine = DeepKernelMachine(*layers, GPOutput(before, num_classes, mc_samples)).to(images)
    with torch.no_grad():
        machine(images[:2])
    return machine
