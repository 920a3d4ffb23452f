"""Key points as heatmaps: targets, loss, reading points off maps, averaging with a mirrored image, PCK.

As in top-down pose estimation since Xiao et al. 2018 (arXiv 1804.06208) and HRNet (arXiv 1902.09212), which HRVMamba
(arXiv 2410.03174) follows: each joint has a map at a quarter of the image's side with a Gaussian of σ = 2 pixels around
the joint's place; the network is trained by squared error.

    target_k(p) = exp(−|p − μ_k|² / 2σ²),    μ_k = ⌊point_k / stride + ½⌋,    zero beyond 3σ on either axis

A point is read off as the largest value's place, a quarter of a pixel towards the larger neighbour on each axis.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from torchconv._common import check

Pairs = Sequence[tuple[int, int]]

# Left and right of COCO's 17 joints.
COCO_PAIRS: Pairs = tuple((i, i + 1) for i in range(1, 17, 2))


def keypoint_heatmaps(
    points: Tensor,
    size: tuple[int, int],
    stride: float | tuple[float, float] = 4.0,
    sigma: float = 2.0,
    visible: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Targets of training: a Gaussian around every joint, and weights that leave joints out.

    Args:
        points: (x, y) of the joints in pixels of the image.
        size: (H, W) of the maps.
        stride: pixels of the image for one of a map; a number or (x, y).
        sigma: σ in pixels of the map; published: 2 for 48 × 64, 3 for 72 × 96.
        visible: weights of the joints, 0 where a joint is not labelled; None is 1.

    Shape:
        points (N, K, 2), visible (N, K) → maps (N, K, H, W), weights (N, K), which are 0 also for joints whose Gaussian
        lies outside of the map.

    Raises:
        ValueError: shapes do not fit, or σ is not positive.

    Example:
        >>> maps, weights = keypoint_heatmaps(torch.tensor([[[8.0, 4.0], [400.0, 4.0]]]), (8, 8))
        >>> divmod(int(maps[0, 0].argmax()), 8), weights.tolist()
        ((1, 2), [[1.0, 0.0]])

    Reference: Xiao et al., arXiv 1804.06208; Sun et al., arXiv 1902.09212.
    """
    if points.dim() != 3 or points.shape[2] != 2:
        raise ValueError(f"points of shape {tuple(points.shape)}: expected (N, joints, 2), x and y")
    if visible is not None and visible.shape != points.shape[:2]:
        raise ValueError(f"visible of shape {tuple(visible.shape)}: expected {tuple(points.shape[:2])}")
    check(sigma > 0, "sigma", sigma, "must be positive")
    height, width = size
    places = torch.trunc(points / points.new_tensor(stride) + 0.5)
    limits = places.new_tensor([width, height])
    near = ((places - 3 * sigma < limits) & (places + 3 * sigma + 1 >= 0)).all(2)
    weights = near.to(points.dtype) if visible is None else visible.to(points.dtype) * near
    axes = []
    for axis, length in ((1, height), (0, width)):
        distance = torch.arange(length, device=points.device) - places[:, :, axis, None]
        axes.append(torch.exp(-distance.square() / (2 * sigma**2)) * (distance.abs() <= 3 * sigma))
    maps = axes[0].unsqueeze(3) * axes[1].unsqueeze(2)
    return maps * (weights > 0.5)[:, :, None, None], weights


def keypoint_loss(heatmaps: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean squared error of maps times the joints' weights.

    Args:
        heatmaps, targets: (N, K, H, W).
        weights: (N, K), as :func:`keypoint_heatmaps` gives them; None is 1.

    Returns:
        A scalar.

    Example:
        >>> keypoint_loss(torch.ones(1, 2, 3, 3), torch.zeros(1, 2, 3, 3), torch.tensor([[1.0, 0.0]])).item()
        0.5

    Reference: Xiao et al., arXiv 1804.06208.
    """
    if heatmaps.shape != targets.shape:
        raise ValueError(f"targets of shape {tuple(targets.shape)}: expected those of the maps {tuple(heatmaps.shape)}")
    if weights is None:
        return F.mse_loss(heatmaps, targets)
    scale = weights[:, :, None, None]
    return F.mse_loss(heatmaps * scale, targets * scale)


def decode_heatmaps(
    heatmaps: Tensor, stride: float | tuple[float, float] = 4.0, shift: bool = True
) -> tuple[Tensor, Tensor]:
    """Points and scores from maps.

    Args:
        heatmaps: one map a joint.
        stride: pixels of the image for one of a map; a number or (x, y).
        shift: go a quarter of a pixel of the map towards the larger neighbour on each axis, where the maximum is not
            in the first two or the last of the rows and columns.

    Shape:
        (N, K, H, W) → points (N, K, 2), x and y in pixels of the image, and scores (N, K), the largest values. A joint
        without a positive value is at −1 pixel of the map.

    Raises:
        ValueError: the maps are not of four axes, or empty.

    Example:
        >>> maps = torch.zeros(1, 1, 6, 6)
        >>> maps[0, 0, 2, 3], maps[0, 0, 2, 4] = 1.0, 0.5
        >>> decode_heatmaps(maps)[0].tolist()
        [[[13.0, 8.0]]]

    Reference: Xiao et al., arXiv 1804.06208; Sun et al., arXiv 1902.09212.
    """
    if heatmaps.dim() != 4 or 0 in heatmaps.shape[2:]:
        raise ValueError(f"heatmaps of shape {tuple(heatmaps.shape)}: expected (N, joints, H, W) with pixels")
    height, width = heatmaps.shape[2:]
    flat = heatmaps.flatten(2)
    scores, index = flat.max(2)
    column, row = index % width, index // width
    points = torch.stack([column, row], 2).to(heatmaps.dtype)
    if shift:
        inside = (column > 1) & (column < width - 1) & (row > 1) & (row < height - 1)
        for axis, step in ((0, 1), (1, width)):
            after, before = (
                flat.gather(2, (index + s).clamp(0, height * width - 1).unsqueeze(2)).squeeze(2) for s in (step, -step)
            )
            points[:, :, axis] += torch.sign(after - before) * inside / 4
    points = torch.where((scores > 0).unsqueeze(2), points, -1.0)
    return points * points.new_tensor(stride), scores


def average_with_mirrored(heatmaps: Tensor, mirrored: Tensor, pairs: Pairs = COCO_PAIRS, shift: bool = True) -> Tensor:
    """The mean of maps and of those of the mirrored image, put back: the flip test.

    Args:
        heatmaps: of the image.
        mirrored: of the image with its columns reversed.
        pairs: joints that trade places.
        shift: move the mirrored maps by one pixel, which aligns maps whose stride is not taken into account.

    Shape:
        (N, K, H, W), (N, K, H, W) → (N, K, H, W).

    Raises:
        ValueError: shapes differ, or a pair names a joint that is not there.

    Reference: Xiao et al., arXiv 1804.06208.
    """
    if heatmaps.shape != mirrored.shape:
        raise ValueError(f"mirrored of shape {tuple(mirrored.shape)}: expected {tuple(heatmaps.shape)}")
    joints = heatmaps.shape[1]
    order = list(range(joints))
    for left, right in pairs:
        check(0 <= left < joints and 0 <= right < joints, "pairs", (left, right), f"there are {joints} joints")
        order[left], order[right] = right, left
    back = mirrored[:, order].flip(3)
    if shift:
        back = torch.cat([back[..., :1], back[..., :-1]], 3)
    return (heatmaps + back) / 2


def pck(
    predicted: Tensor,
    target: Tensor,
    normalizer: float | Tensor,
    threshold: float = 0.5,
    visible: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Percentage of correct key points: the share that is nearer than ``threshold`` times a length.

    Args:
        predicted, target: points.
        normalizer: the length by which differences are divided: a number, one a sample (N,), or (N, 2) for x and y.
        threshold: of the normalised distance.
        visible: joints that count; None is all.

    Shape:
        predicted, target (N, K, 2), visible (N, K) → the share for each joint (K,), NaN for one that is never visible,
        and the mean over the others, a scalar (NaN where there is none).

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> shares, mean = pck(torch.tensor([[[0.0, 3.0], [0.0, 9.0]]]), torch.zeros(1, 2, 2), 10.0)
        >>> shares.tolist(), mean.item()
        ([1.0, 0.0], 0.5)

    Reference: Yang and Ramanan, IEEE TPAMI 2013.
    """
    if predicted.shape != target.shape or predicted.dim() != 3 or predicted.shape[2] != 2:
        shapes = f"{tuple(predicted.shape)}, target of {tuple(target.shape)}"
        raise ValueError(f"predicted of shape {shapes}: expected (N, joints, 2) of both")
    if visible is not None and visible.shape != target.shape[:2]:
        raise ValueError(f"visible of shape {tuple(visible.shape)}: expected {tuple(target.shape[:2])}")
    length = torch.as_tensor(normalizer, dtype=predicted.dtype, device=predicted.device)
    if length.dim():
        if length.shape not in ((len(target),), (len(target), 2)):
            raise ValueError(f"normalizer of shape {tuple(length.shape)}: expected a number, (N,) or (N, 2)")
        length = length.reshape(len(target), 1, -1)
    distance = torch.linalg.vector_norm((predicted - target) / length, dim=2)
    counts = torch.ones_like(distance, dtype=torch.bool) if visible is None else visible > 0
    shares = ((distance < threshold) & counts).sum(0) / counts.sum(0)
    return shares, shares.nanmean()
