"""Scores of segmentation against loops, torchmetrics and an assignment solver; class weights and the loss."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torchmetrics.functional.classification import multiclass_confusion_matrix, multiclass_jaccard_index

from torchconv.training.segmentation import (
    LARGEST_LOSS,
    ConfusionMatrix,
    boundary_f1,
    boundary_map,
    median_frequency_weights,
    segmentation_scores,
    weighted_cross_entropy,
)


def labels(*shape, high=4, low=0, seed=0):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def scenes(count, seed=0, classes=3, height=14, width=17):
    """Rectangles of classes on a background."""
    maps = torch.zeros(count, height, width, dtype=torch.long)
    generator = torch.Generator().manual_seed(seed)
    for image, kind in itertools.product(range(count), range(1, classes)):
        top, left = (int(torch.randint(0, n - 5, (1,), generator=generator)) for n in (height, width))
        maps[image, top : top + 5 + kind, left : left + 6] = kind
    return maps


def confusion_of(predicted, target, classes, ignored=None):
    confusion = ConfusionMatrix(classes, ignored)
    confusion.update(predicted, target)
    return confusion


def test_confusion_equals_loops():
    predicted, target = labels(2, 5, 6), labels(2, 5, 6, low=-1, high=6, seed=1)
    expected = torch.zeros(4, 4, dtype=torch.long)
    for ours, theirs in zip(predicted.flatten().tolist(), target.flatten().tolist(), strict=True):
        if theirs in (0, 1, 3):  # 2 is ignored, -1, 4 and 5 are no classes
            expected[theirs, ours] += 1
    confusion = ConfusionMatrix(4, ignore_label=2)
    for image in range(2):
        confusion.update(predicted[image], target[image].to(torch.int16))
    assert torch.equal(confusion.matrix, expected)
    confusion.reset()
    assert confusion.matrix.sum() == 0


def test_equals_torchmetrics():
    predicted, target = labels(3, 9, 8, high=5), labels(3, 9, 8, high=5, seed=1)
    target[:, :2] = 255
    confusion = confusion_of(predicted, target, 5, 255)
    theirs = multiclass_confusion_matrix(predicted, target, 5, ignore_index=255)
    assert torch.equal(confusion.matrix, theirs)
    jaccard = multiclass_jaccard_index(predicted, target, 5, ignore_index=255)
    assert confusion.scores().mean_iou == pytest.approx(float(jaccard))


def test_absent_classes():
    matrix = torch.tensor([[6, 0, 2, 0], [1, 3, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    skip, zero = segmentation_scores(matrix), segmentation_scores(matrix, "zero")
    assert skip.global_accuracy == zero.global_accuracy == 9 / 12
    assert skip.mean_accuracy == pytest.approx((6 / 8 + 3 / 4) / 2)
    assert skip.mean_iou == pytest.approx((6 / 9 + 3 / 4) / 2)
    assert zero.mean_accuracy == pytest.approx(skip.mean_accuracy / 2)
    assert zero.mean_iou == pytest.approx(skip.mean_iou / 2)
    assert skip.frequency_weighted_iou == pytest.approx(8 / 12 * 6 / 9 + 4 / 12 * 3 / 4)
    assert skip.class_iou[2] == 0  # predicted, never true
    assert skip.class_iou[3].isnan()
    assert skip.class_accuracy[2].isnan()
    nothing = segmentation_scores(torch.zeros(3, 3))
    assert math.isnan(nothing.mean_iou)
    assert math.isnan(nothing.global_accuracy)


def test_scores_of_the_perfect_and_of_renamed_classes():
    target, predicted = labels(2, 8, 8, high=5), labels(2, 8, 8, high=5, seed=1)
    perfect = confusion_of(target, target, 5).scores()
    assert perfect.mean_iou == perfect.mean_accuracy == perfect.frequency_weighted_iou == 1
    order = torch.tensor([3, 0, 4, 1, 2])
    renamed = confusion_of(order[predicted], order[target], 5).scores()
    assert renamed.mean_iou == pytest.approx(confusion_of(predicted, target, 5).scores().mean_iou)


def test_bad_arguments_of_scores():
    with pytest.raises(ValueError, match=r"argmax"):
        confusion_of(torch.zeros(1, 3, 4, 4), labels(1, 4, 4), 3)
    with pytest.raises(ValueError, match=r"predicted=\(0, 3\).*0 to 2"):
        confusion_of(torch.tensor([0, 3]), torch.tensor([1, 2]), 3)
    with pytest.raises(ValueError, match=r"integers"):
        confusion_of(labels(4), torch.rand(4), 4)
    with pytest.raises(ValueError, match="num_classes=0"):
        ConfusionMatrix(0)
    with pytest.raises(ValueError, match=r"matrix.shape"):
        segmentation_scores(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="absent='zeros': did you mean zero"):
        segmentation_scores(torch.eye(2), "zeros")


def test_median_frequency():
    equal = torch.arange(4).repeat(3, 2, 2)
    assert torch.equal(median_frequency_weights(equal, 4), torch.ones(4))
    maps = [torch.tensor([[0, 0, 0, 1]]), torch.tensor([[0, 0, 2, 9], [0, 0, 0, 9]])]  # of two sizes
    frequency = torch.tensor([8 / 10, 1 / 4, 1 / 6, 0])
    weights = median_frequency_weights(maps, 4, ignore_label=9)
    assert torch.allclose(weights[:3], 0.25 / frequency[:3])
    assert weights[3] == 0  # never occurs
    assert weights[1] == 1  # the median
    counted = median_frequency_weights(maps, 4, ignore_label=9, count_ignored=True)
    frequency = torch.tensor([8 / 12, 1 / 4, 1 / 8])
    assert torch.allclose(counted[:3], 0.25 / frequency)
    even = median_frequency_weights(torch.tensor([[[0, 0, 0, 1]]]), 2)
    assert torch.allclose(even, 0.5 / torch.tensor([0.75, 0.25]))
    with pytest.raises(ValueError, match="no pixel"):
        median_frequency_weights(torch.full((1, 2, 2), 7), 3)


def test_loss():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    target = labels(2, 4, 5, high=3)
    target[0, 0] = 255
    ordinary = F.cross_entropy(logits, target, ignore_index=255)
    assert torch.allclose(weighted_cross_entropy(logits, target, None, 255), ordinary)
    assert torch.allclose(weighted_cross_entropy(logits, target, torch.ones(3)), ordinary)
    weight = torch.tensor([0.5, 3.0, 1.0], dtype=torch.float64)
    loss = weighted_cross_entropy(logits, target, weight)
    assert torch.allclose(loss, F.cross_entropy(logits, target, weight, ignore_index=255, reduction="sum") / 35)
    assert torch.allclose(weighted_cross_entropy(logits, target, 4 * weight), 4 * loss)
    small = logits[:1, :, :2, :2].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: weighted_cross_entropy(z, target[:1, 1:3, :2], weight), small)
    nothing = weighted_cross_entropy(logits, torch.full_like(target, 255), weight)
    assert nothing == 0
    assert torch.autograd.grad(nothing, logits)[0].abs().max() == 0
    with pytest.raises(ValueError, match="target of shape"):
        weighted_cross_entropy(logits, target[:, 0])
    with pytest.raises(ValueError, match=r"weight\.shape"):
        weighted_cross_entropy(logits, target, torch.ones(4))


def test_loss_is_bounded_but_not_its_gradient():
    logits = torch.tensor([[200.0, 0.0]], requires_grad=True)
    loss = weighted_cross_entropy(logits, torch.tensor([1]))
    assert float(loss.detach()) == pytest.approx(LARGEST_LOSS)
    assert torch.allclose(torch.autograd.grad(loss, logits)[0], torch.tensor([[1.0, -1.0]]))


def test_boundary_map_equals_loops():
    mask = labels(7, 6, high=2).bool()
    expected = torch.zeros(7, 6, dtype=torch.bool)
    for i, j in itertools.product(range(7), range(6)):
        if i < 6 and j < 5:
            block = mask[i : i + 2, j : j + 2]
            expected[i, j] = block.any() and not block.all()
        elif i < 6:
            expected[i, j] = mask[i, j] != mask[i + 1, j]
        elif j < 5:
            expected[i, j] = mask[i, j] != mask[i, j + 1]
    assert torch.equal(boundary_map(mask), expected)
    assert torch.equal(boundary_map(mask.expand(2, 3, 7, 6))[1, 2], expected)
    with pytest.raises(ValueError, match=r"mask\.shape"):
        boundary_map(mask[0])


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 99), st.floats(0, 0.2))
def test_boundary_f1_equals_an_assignment(seed, distance):
    predicted, target = scenes(1, seed), scenes(1, seed + 1)
    ours = boundary_f1(predicted, target, 3, distance)
    reach = distance * math.hypot(14, 17)
    for kind in range(3):
        points = [boundary_map(m[0] == kind).nonzero().numpy() for m in (predicted, target)]
        apart = np.sqrt(((points[0][:, None] - points[1][None]) ** 2).sum(-1))
        far = apart > reach
        pairs = linear_sum_assignment(np.where(far, 1e6, apart))
        hits = (~far[pairs]).sum()
        f = 2 * hits / (len(points[0]) + len(points[1]))  # the harmonic mean of hits/a and hits/b
        assert float(ours[0, kind]) == pytest.approx(f)


def test_boundary_f1_identities():
    predicted, target = scenes(4, 0), scenes(4, 5)
    assert (boundary_f1(target, target, 3) == 1).all()
    for matching in ("one_to_one", "relaxed"):
        by_distance = [boundary_f1(predicted, target, 3, d, matching) for d in (0.0, 0.03, 0.1, 0.3)]
        assert torch.allclose(by_distance[1], boundary_f1(target, predicted, 3, 0.03, matching))
        assert all((b >= a).all() for a, b in itertools.pairwise(by_distance))
    once, relaxed = (boundary_f1(predicted, target, 3, 0.05, m) for m in ("one_to_one", "relaxed"))
    assert (relaxed >= once).all()
    assert (relaxed > once).any()


def test_boundary_f1_of_shifted_contours():
    """Thousands of pixels with many partners each."""
    rows, columns = torch.arange(360).reshape(-1, 1), torch.arange(480).reshape(1, -1)
    target = ((rows // 36 + columns // 48) % 3)[None]
    predicted = target.roll((2, 1), (1, 2))
    assert (boundary_f1(predicted, target, 3) > 0.98).all()
    near = boundary_f1(predicted, target, 3, 0.002)  # a pixel: upright contours match, level ones do not
    assert ((near > 0.4) & (near < 0.5)).all()


def test_boundary_f1_without_boundaries():
    full, other = torch.zeros(1, 6, 6, dtype=torch.long), torch.ones(1, 6, 6, dtype=torch.long)
    assert torch.equal(boundary_f1(full, full, 3)[0, :1], torch.ones(1, dtype=torch.float64))
    assert boundary_f1(full, full, 3)[0, 1:].isnan().all()
    half = full.clone()
    half[:, 3:] = 1
    assert boundary_f1(half, full, 2).tolist() == [[0.0, 0.0]]
    assert boundary_f1(other + 7, other + 7, 2).isnan().all()


def test_bad_arguments_of_boundary_f1():
    maps = scenes(1)
    with pytest.raises(ValueError, match="matching='greedy'"):
        boundary_f1(maps, maps, 3, matching="greedy")
    with pytest.raises(ValueError, match="max_distance=-1"):
        boundary_f1(maps, maps, 3, -1)
    with pytest.raises(ValueError, match="predicted of shape"):
        boundary_f1(maps[0], maps[0], 3)
