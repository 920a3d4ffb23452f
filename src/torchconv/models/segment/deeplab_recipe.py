"""DeepLab as published: losses at the resolution of the scores, and labels of whole images.

Chen et al. 2016, arXiv 1606.00915, sections 3 and 4; v1: arXiv 1412.7062. Training: SGD of momentum 0.9 and weight
decay 5·10⁻⁴, rate lr·(1 − step / steps)^0.9 (``torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=0.9)``)
over ``torchconv.param_groups(net, lr, 5e-4)``, which honours the multipliers that the networks ask for; 20,000 steps of
ten crops of 321 pixels, lr 10⁻³ on VGG-16 and 2.5·10⁻⁴ on ResNet-101.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_positive
from torchconv.models.segment.crf import DenseCRF


def score_loss(logits: Tensor, labels: Tensor, stride: int = 8, ignore_index: int = 255) -> Tensor:
    """Cross-entropy of scores against every ``stride``-th label, which saves enlarging the scores in training.

    Args:
        logits: (B, L, h, w).
        labels: (B, H, W), class numbers, of the whole image.
        stride: of the network.
        ignore_index: label of pixels that do not count.

    Returns:
        A scalar, the mean over the labels that count; 0 where none does.

    Raises:
        ValueError: labels and scores that do not lie on one grid; images of 8n + 1 pixels do.

    Example:
        >>> labels = torch.zeros(1, 17, 25, dtype=torch.long)
        >>> score_loss(torch.zeros(1, 2, 3, 4), labels)
        tensor(0.6931)

    Reference: arXiv 1412.7062, section 3.2.
    """
    check_positive("stride", stride)
    picked = labels[..., ::stride, ::stride]
    fits = logits.dim() == 4 and picked.shape == (logits.shape[0], *logits.shape[2:])
    remedy = f"every {stride}th gives {tuple(picked.shape)}, scores are {tuple(logits.shape)}; crop to {stride}n + 1"
    check(fits, "shape of the labels", tuple(labels.shape), remedy)
    return _cross_entropy(logits, picked, ignore_index)


def multi_scale_loss(maps: Sequence[Tensor], labels: Tensor, ignore_index: int = 255) -> Tensor:
    """Sum of the cross-entropies of several maps of scores, each against the labels resized to it (nearest).

    Args:
        maps: (B, L, h, w) each: ``MultiScale(net).logits(x)``, the scores at every scale and fused.
        labels: (B, H, W), class numbers.
        ignore_index: label of pixels that do not count.

    Raises:
        ValueError: no maps, or of other batches.

    Example:
        >>> labels = torch.zeros(1, 17, 25, dtype=torch.long)
        >>> multi_scale_loss([torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 2, 2)], labels)
        tensor(1.3863)

    Reference: arXiv 1606.00915, section 4.1.2.
    """
    check(len(maps) > 0, "maps", list(maps), "give at least one map of scores")
    fits = labels.dim() == 3 and all(m.dim() == 4 and len(m) == len(labels) for m in maps)
    remedy = f"expected (B, H, W) for scores of {[tuple(m.shape) for m in maps]}"
    check(fits, "shape of the labels", tuple(labels.shape), remedy)
    losses = []
    for scores in maps:
        # Class numbers are exact in float32, and resized as numbers without mixing.
        resized = F.interpolate(labels[:, None].float(), size=scores.shape[2:], mode="nearest-exact")
        losses.append(_cross_entropy(scores, resized[:, 0], ignore_index))
    return torch.stack(losses).sum()


def _cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    total = F.cross_entropy(logits, labels.long(), ignore_index=ignore_index, reduction="sum")
    return total / (labels != ignore_index).sum().clamp(min=1)


@torch.no_grad()
def label_probabilities(net: nn.Module, x: Tensor, crf: DenseCRF | None = None, image: Tensor | None = None) -> Tensor:
    """Probabilities of the labels at every pixel: scores enlarged, softmax, and the field if one is given.

    Args:
        net: from images to scores at a lower resolution; in eval mode.
        x: (B, C, H, W), as the network wants it.
        crf: the field, which needs ``image``.
        image: (B, 3, H, W), the colours from 0 to 255.

    Shape:
        (B, C, H, W) → (B, L, H, W).

    Raises:
        ValueError: one of ``crf`` and ``image`` without the other.

    Example:
        >>> net = nn.Conv2d(3, 2, 1, stride=8)
        >>> label_probabilities(net, torch.zeros(1, 3, 17, 25)).shape
        torch.Size([1, 2, 17, 25])

    Reference: arXiv 1606.00915, section 3.
    """
    check((crf is None) == (image is None), "image", image, "give both image and crf, or neither")
    # Scores of a stride lie on every stride-th pixel, corner on corner, as the original enlarges them.
    logits = F.interpolate(net(x), size=x.shape[2:], mode="bilinear", align_corners=True)
    if crf is None:
        return logits.softmax(1)
    found: Tensor = crf(image, logits)
    return found.exp() if crf.log else found
