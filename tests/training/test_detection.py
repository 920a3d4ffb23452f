"""Average precision against numbers of the COCO tools and on cases made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from torchconv.training.detection import AveragePrecision


def drawn(seed: int) -> tuple[list[tuple[Tensor, Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """Five images with up to seven objects, detections near them or elsewhere, and many equal scores."""
    r = np.random.RandomState(seed)
    found, objects = [], []
    for _ in range(5):
        m, k = r.randint(0, 8), r.randint(1, 12)
        low = r.randint(0, 60, (m, 2))
        boxes = np.concatenate([low, low + r.randint(8, 30, (m, 2))], 1).astype(float)
        labels = r.randint(0, 3, m)
        if m:
            which = r.randint(0, m, k)
            near = boxes[which] + r.randint(-3, 4, (k, 4))
            kinds = np.where(r.rand(k) < 0.8, labels[which], r.randint(0, 4, k))
        else:
            low = r.randint(0, 60, (k, 2))
            near = np.concatenate([low, low + 9], 1).astype(float)
            kinds = r.randint(0, 4, k)
        scores = r.randint(1, 20, k) / 20
        found.append((torch.tensor(near), torch.tensor(scores), torch.tensor(kinds)))
        objects.append((torch.tensor(boxes), torch.tensor(labels)))
    return found, objects


# From pycocotools 2.0.11: AP, AP50, AP75, recall.
@pytest.mark.parametrize(
    ("seed", "max_det", "expected"),
    [
        (0, 100, [0.167949, 0.463618, 0.088009, 0.252778]),
        (0, 1, [0.127283, 0.377888, 0.079208, 0.146667]),
        (1, 100, [0.245150, 0.502530, 0.185259, 0.330688]),
        (1, 3, [0.231733, 0.474752, 0.176733, 0.302116]),
    ],
)
def test_as_the_coco_tools(seed: int, max_det: int, expected: list[float]) -> None:
    found, objects = drawn(seed)
    tally = AveragePrecision(max_det=max_det)
    for image in range(5):
        tally.update(found[image : image + 1], objects[image : image + 1])
    scores = tally.compute()
    assert [scores.ap, scores.ap50, scores.ap75, scores.recall] == pytest.approx(expected, abs=1e-6)
    assert sorted(scores.class_ap) == [0, 1, 2]  # class 3 has no objects
    assert np.mean(list(scores.class_ap.values())) == pytest.approx(scores.ap)


def test_by_hand() -> None:
    box = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    far = box + 100
    one = torch.tensor([0])
    tally = AveragePrecision((0.5,))
    # right, wrong, wrong, right: precision 1 up to half of the objects, 1/2 up to all
    tally.update([(torch.cat([box, far, far]), torch.tensor([0.9, 0.8, 0.7]), torch.zeros(3))], [(box, one)])
    tally.update([(box, torch.tensor([0.6]), one)], [(box, one)])
    assert tally.compute().ap50 == pytest.approx((51 + 50 * 0.5) / 101)
    assert tally.compute().recall == 1.0
    assert math.isnan(tally.compute().ap75)
    tally.reset()
    # an object is found once: the second of two equal boxes is wrong
    tally.update(
        [(torch.cat([box, box]), torch.tensor([0.9, 0.8]), torch.zeros(2))], [(torch.cat([box, far]), one[[0, 0]])]
    )
    assert tally.compute().ap == pytest.approx(51 / 101)
    assert math.isnan(AveragePrecision().compute().ap)


def test_refusals() -> None:
    box, one = torch.zeros(1, 4), torch.zeros(1)
    for thresholds in ((), (0.0,), (1.2,)):
        with pytest.raises(ValueError, match="thresholds="):
            AveragePrecision(thresholds)
    with pytest.raises(ValueError, match="max_det=0"):
        AveragePrecision(max_det=0)
    tally = AveragePrecision()
    with pytest.raises(ValueError, match="found=1"):
        tally.update([(box, one, one)], [])
    with pytest.raises(ValueError, match="found="):
        tally.update([(box, torch.zeros(2), one)], [(box, one)])
    with pytest.raises(ValueError, match="objects="):
        tally.update([(box, one, one)], [(torch.zeros(2, 4), one)])
