"""PCANet (arXiv 1404.3606): two stages of PCA filters, binary codes, histograms of blocks; for a linear SVM.

    stage: zero padding k//2, patches less their mean (per channel), filters = leading eigenvectors of XᵀX
    code of a stage-1 map: Σ_l 2^l [stage-2 map l > 0];  features: histograms of the codes in blocks

Nothing is trained by gradients and no labels are used.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from torchconv._common import check, check_positive, ntuple
from torchconv.analysis._filters_learned import patches, principal_filters
from torchconv.catalog import part


def pca_stage(images: Tensor, kernel_size: int | Sequence[int], count: int) -> tuple[Tensor, Tensor]:
    """PCA filters (count, C, k_h, k_w) of images (N, C, H, W) and their eigenvalues, descending.

    Example:
        >>> filters, values = pca_stage(torch.randn(4, 1, 8, 8), 3, 4)
        >>> filters.shape, values.shape
        (torch.Size([4, 1, 3, 3]), torch.Size([4]))

    Reference: arXiv 1404.3606, section II-A.
    """
    check(images.dim() == 4, "images", tuple(images.shape), "must be (N, C, H, W)")
    height, width = ntuple("kernel_size", kernel_size, 2)
    padded = F.pad(images, (width // 2, width // 2, height // 2, height // 2))
    x = patches(padded, (height, width)).reshape(-1, images.shape[1], height * width)
    x = (x - x.mean(2, keepdim=True)).flatten(1)
    filters, values = principal_filters(x, count)
    return filters.reshape(count, images.shape[1], height, width), values[:count]


@part(
    "pcanet",
    paper="filterdesign",
    kind="analysis",
    dims=(2,),
    keywords="PCANet PCA filters unsupervised features histogram binary hashing small data",
)
class PCANet:
    """Unsupervised features of images by two stages of PCA filters.

    Args:
        kernel_size: of both stages.
        filters1, filters2: how many filters; codes have 2^filters2 values.
        block: side of the blocks in which codes are counted.
        overlap: share of a block that it has in common with the next, 0 or 0.5 in the paper.

    Example:
        >>> images = torch.rand(6, 1, 8, 8)
        >>> net = PCANet(3, 4, 3, block=4, overlap=0.5).fit(images)
        >>> net.transform(images).shape  # 4 maps × 9 blocks × 8 codes
        torch.Size([6, 288])

    Reference: arXiv 1404.3606.
    """

    weight1: Tensor
    weight2: Tensor
    eigenvalues1: Tensor
    eigenvalues2: Tensor

    def __init__(
        self,
        kernel_size: int | Sequence[int] = 7,
        filters1: int = 8,
        filters2: int = 8,
        *,
        block: int | Sequence[int] = 7,
        overlap: float = 0.0,
    ) -> None:
        check_positive("filters1", filters1)
        check_positive("filters2", filters2)
        check(0 <= overlap < 1, "overlap", overlap, "is a share of the block: at least 0, less than 1")
        self.kernel_size = ntuple("kernel_size", kernel_size, 2)
        self.filters1, self.filters2 = filters1, filters2
        self.block = ntuple("block", block, 2)
        self.overlap = overlap

    def _maps(self, images: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(images, weight, padding=(self.kernel_size[0] // 2, self.kernel_size[1] // 2))

    def fit(self, images: Tensor) -> PCANet:
        """Find the filters of both stages; the second has one set for all stage-1 maps."""
        self.weight1, self.eigenvalues1 = pca_stage(images, self.kernel_size, self.filters1)
        first = self._maps(images, self.weight1).flatten(0, 1)[:, None]
        self.weight2, self.eigenvalues2 = pca_stage(first, self.kernel_size, self.filters2)
        return self

    def codes(self, images: Tensor) -> Tensor:
        """(N, C, H, W) → codes (N, filters1, H, W), 0 to 2^filters2 − 1; the first filter is bit 0."""
        first = self._maps(images, self.weight1)
        second = self._maps(first.flatten(0, 1)[:, None], self.weight2)
        bits = 2 ** torch.arange(self.filters2, device=images.device)
        return ((second > 0) * bits[:, None, None]).sum(1).reshape(len(images), self.filters1, *second.shape[2:])

    def transform(self, images: Tensor) -> Tensor:
        """(N, C, H, W) → features (N, maps · blocks · 2^filters2): map, block row-major, code; whole blocks only."""
        codes = self.codes(images)
        for axis, side in enumerate(self.block):
            check(side <= codes.shape[2 + axis], "block", self.block, f"must fit maps of {tuple(codes.shape[2:])}")
            codes = codes.unfold(2 + axis, side, max(1, round(side * (1 - self.overlap))))
        codes = codes.flatten(4).flatten(1, 3)
        counts = images.new_zeros(*codes.shape[:2], 2**self.filters2)
        counts.scatter_add_(2, codes, images.new_ones(()).expand(codes.shape))
        return counts.flatten(1)
