"""MHAF-YOLO's loss against loops, boxes against torchvision, selection on scores made by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import complete_box_iou, complete_box_iou_loss

from tests.parity.core import Case, run_case
from torchconv.models.detect.boxes import complete_iou, corners, letterbox, pack_targets, select, suppress
from torchconv.models.detect.mhafyolo_head import DetectionHead, anchors, decode_sides, expected_sides
from torchconv.models.detect.mhafyolo_loss import DetectionLoss, assign

SIZES, STRIDES = [(6, 8), (3, 4)], (8, 16)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def some_boxes(count: int, seed: int = 0) -> Tensor:
    middle, size = uniform(count, 2, seed=seed), 0.1 + 0.5 * uniform(count, 2, seed=seed + 1)
    return corners(torch.cat([middle, size], 1) * torch.tensor([64.0, 48, 64, 48]))


def raw_maps(batch: int, classes: int, seed: int = 0) -> list[Tensor]:
    return [3 * uniform(batch, 64 + classes, h, w, seed=seed) - 1.5 for h, w in SIZES]


TARGETS = torch.tensor(
    [[0, 2, 0.5, 0.4, 0.6, 0.5], [1, 0, 0.3, 0.3, 0.2, 0.5], [0, 1, 0.45, 0.5, 0.5, 0.5], [1, 2, 0.7, 0.6, 0.4, 0.6]],
    dtype=torch.float64,
)


def test_complete_iou() -> None:
    a, b = some_boxes(7), some_boxes(5, 9)
    torch.testing.assert_close(complete_iou(a[:, None], b), complete_box_iou(a, b), rtol=1e-6, atol=1e-7)
    a.requires_grad_()
    ours, theirs = (1 - complete_iou(a[:5], b)).sum(), complete_box_iou_loss(a[:5], b, reduction="sum")
    grads = [torch.autograd.grad(y, a)[0] for y in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-8)
    flat = complete_iou(torch.zeros(4), torch.tensor([0.0, 0, 1, 1]))
    assert flat.isfinite()


@pytest.mark.parametrize(("topk", "seed"), [(1, 0), (3, 1), (100, 2)])
def test_assignment_by_loops(topk: int, seed: int) -> None:
    centres, strides = anchors(SIZES, STRIDES, dtype=torch.float64)
    centres = centres * strides
    scores, objects = uniform(1, 60, 3, seed=seed), some_boxes(5, seed)[None]
    predicted = corners(torch.cat([centres, 8 + 20 * uniform(60, 2, seed=seed)], 1))[None]
    labels = torch.tensor([[0, 2, 1, 1, 0]])
    found = assign(scores, predicted, centres, labels, objects, torch.ones(1, 5).bool(), topk)
    inside, overlap, align = (torch.zeros(5, 60, dtype=torch.float64) for _ in range(3))
    for m, (x1, y1, x2, y2) in enumerate(objects[0].tolist()):
        for a, (x, y) in enumerate(centres.tolist()):
            if x1 < x < x2 and y1 < y < y2:
                inside[m, a] = 1
                overlap[m, a] = max(float(complete_box_iou(objects[0, m : m + 1], predicted[0, a : a + 1])), 0)
                align[m, a] = math.sqrt(float(scores[0, a, labels[0, m]])) * overlap[m, a] ** 6
    wants = torch.zeros(5, 60).bool()
    for m in range(5):
        wants[m, align[m].argsort(descending=True, stable=True)[:topk]] = True
    wants &= align > 0
    owner = {}
    for a in range(60):
        claims = [m for m in range(5) if wants[m, a]]
        if claims:
            owner[a] = claims[0] if len(claims) == 1 else int(overlap[:, a].argmax())
    # an anchor that overlaps its object by nothing may be taken as well, with a target of 0
    targets = torch.zeros(60, 3, dtype=torch.float64)
    for a, m in owner.items():
        mine = [b for b, o in owner.items() if o == m]
        share = align[m, a] / (max(float(align[m, b]) for b in mine) + 1e-9)
        targets[a, labels[0, m]] = share * max(float(overlap[m, b]) for b in mine)
    torch.testing.assert_close(found.scores[0], targets, rtol=1e-5, atol=1e-7)
    assert {a for a, m in owner.items()} <= set(found.foreground[0].nonzero().flatten().tolist())
    assert all(int(found.object_index[0, a]) == m for a, m in owner.items())
    assert torch.equal(found.boxes, objects[:, found.object_index[0]])
    if topk == 1:
        assert found.foreground.sum() <= 5
    for m in {*owner.values()}:
        best = max(float(overlap[m, a]) for a, o in owner.items() if o == m)
        mine = (found.object_index[0] == m) & found.foreground[0]
        assert float(found.scores[0][mine].max()) == pytest.approx(best, rel=1e-3)


def test_rows_that_only_fill_up_change_nothing() -> None:
    centres, strides = anchors(SIZES, STRIDES, dtype=torch.float64)
    scores, objects = uniform(2, 60, 3), torch.stack([some_boxes(3), some_boxes(3, 4)])
    predicted = corners(torch.cat([centres * strides, 8 + 20 * uniform(60, 2)], 1)).expand(2, -1, -1)
    labels, valid = torch.tensor([[0, 1, 2], [2, 2, 0]]), torch.ones(2, 3).bool()
    args = (scores, predicted, centres * strides)
    found = assign(*args, labels, objects, valid)
    more = [F.pad(labels, (0, 4)), F.pad(objects, (0, 0, 0, 4), value=30.0), F.pad(valid, (0, 4))]
    for a, b in zip(found, assign(*args, *more), strict=True):
        assert torch.equal(a, b)


def test_loss_by_loops() -> None:
    loss = DetectionLoss(3, STRIDES, gains={"box": 2.0, "cls": 3.0, "dfl": 5.0}, topk={"one2many": 4, "one2one": 2})
    maps = raw_maps(2, 3)
    given = loss.assignment(maps, TARGETS, 4)
    centres, strides = anchors(SIZES, STRIDES, dtype=torch.float64)
    flat = torch.cat([m.flatten(2) for m in maps], 2)
    box = dfl = cls = 0.0
    for i in range(2):
        for a in range(60):
            logits = flat[i, :64, a].reshape(4, 16)
            weight = float(given.scores[i, a].sum())
            cls += float(F.binary_cross_entropy_with_logits(flat[i, 64:, a], given.scores[i, a], reduction="sum"))
            if given.foreground[i, a]:
                x, y = centres[a].tolist()
                left, top, right, bottom = (logits.softmax(1) @ torch.arange(16.0).double()).tolist()
                predicted = torch.tensor([[x - left, y - top, x + right, y + bottom]], dtype=torch.float64)
                goal = given.boxes[i, a] / strides[a]
                box += weight * float(1 - complete_box_iou(predicted, goal[None]))
                sides = [x - goal[0], y - goal[1], goal[2] - x, goal[3] - y]
                for side, row in zip(map(float, sides), logits, strict=True):
                    side = min(max(side, 0.0), 14.99)
                    low = math.floor(side)
                    bins = row.log_softmax(0)
                    dfl -= weight / 4 * float((low + 1 - side) * bins[low] + (side - low) * bins[low + 1])
    total = max(float(given.scores.sum()), 1.0)
    expected = torch.tensor([2 * box, 3 * cls, 5 * dfl], dtype=torch.float64) / total
    torch.testing.assert_close(loss.items(maps, TARGETS, 4), expected, rtol=1e-5, atol=1e-8)
    both = loss({"one2one": raw_maps(2, 3, 5), "one2many": maps}, TARGETS)
    torch.testing.assert_close(both.items[:3], expected, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(both.loss, 2 * both.items.sum())
    only = loss({"one2one": raw_maps(2, 3, 5)}, TARGETS)
    assert torch.equal(only.items, both.items[3:])


def test_loss_without_objects_and_in_another_order() -> None:
    loss = DetectionLoss(3, STRIDES)
    maps = [m.requires_grad_() for m in raw_maps(2, 3)]
    nothing = loss({"one2many": maps}, torch.zeros(0, 6))
    scores = torch.cat([m[:, 64:].flatten() for m in maps])
    torch.testing.assert_close(nothing.items[1], 0.5 * F.softplus(scores).sum())
    assert nothing.items[[0, 2]].abs().sum() == 0
    nothing.loss.backward()
    assert all(m.grad is not None and m.grad[:, :64].abs().sum() == 0 for m in maps)
    before = loss.items(maps, TARGETS, 10)
    torch.testing.assert_close(loss.items(maps, TARGETS[[3, 0, 1, 2]], 10), before)
    one = loss.items(maps, TARGETS[TARGETS[:, 0] == 1], 10)
    assert (one > 0).all()
    narrow = loss.items([m.detach().bfloat16() for m in maps], TARGETS, 10)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), before.detach(), rtol=0.05, atol=0.05)


def test_sides_and_boxes() -> None:
    logits = torch.full((3, 16), -1e4, dtype=torch.float64)
    for row, place in enumerate((0, 7, 15)):
        logits[row, place] = 0
    torch.testing.assert_close(expected_sides(logits), torch.tensor([0.0, 7, 15], dtype=torch.float64))
    head = DetectionHead((8, 8), STRIDES, 2)
    centres, strides = anchors(SIZES, STRIDES)
    goal = corners(torch.tensor([30.0, 20, 38, 26]))
    sides = torch.cat([centres - goal[:2] / strides, goal[2:] / strides - centres], 1)
    maps, first = [], 0
    for h, w in SIZES:
        side = sides[first : first + h * w].clamp(0, 14.9)
        low = side.long().unsqueeze(-1)
        share = torch.zeros(h * w, 4, 16).scatter(-1, low, 1 - side.unsqueeze(-1) + low)
        share = share.scatter(-1, low + 1, side.unsqueeze(-1) - low)
        maps.append(F.pad(share.clamp(min=1e-30).log().flatten(1).T.reshape(1, 64, h, w), (0, 0, 0, 0, 0, 2)))
        first += h * w
    y = head.decode(maps)
    assert y.shape == (1, 6, 60)
    inside = ((sides > 0) & (sides < 14.9)).all(1)
    assert inside.sum() > 10
    torch.testing.assert_close(corners(y[0, :4].T[inside]), goal.expand(int(inside.sum()), 4), rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(decode_sides(sides, centres) * strides, goal.expand(60, 4))
    assert (y[0, 4:] == 0.5).all()


def test_selection() -> None:
    p = torch.zeros(1, 4 + 3, 4)
    p[0, :4] = torch.arange(16.0).reshape(4, 4)
    p[0, 4:] = torch.tensor([[0.9, 0.1, 0.0, 0.3], [0.85, 0.2, 0.7, 0.0], [0.0, 0.0, 0.65, 0.6]])
    boxes, scores, labels = select(p, 3)
    torch.testing.assert_close(scores, torch.tensor([[0.9, 0.85, 0.7]]))
    assert labels.tolist() == [[0, 1, 1]]
    assert boxes[0, :, 0].tolist() == [0.0, 0.0, 2.0]
    boxes, scores, _ = select(p, 300)
    assert scores.shape == (1, 12)
    assert boxes.shape == (1, 12, 4)


@pytest.mark.parametrize("multi_label", [True, False])
def test_suppression_by_loops(multi_label: bool) -> None:
    middle = 40 * uniform(40, 2) - 25  # some coordinates are negative
    p = torch.cat([middle, 10 + 15 * uniform(40, 2), uniform(40, 3)], 1).T[None].expand(2, -1, -1)
    found = suppress(p, 0.3, 0.4, 15, multi_label)
    assert len(found) == 2
    pairs = [(a, c) for a in range(40) for c in range(3) if multi_label or c == int(p[0, 4:, a].argmax())]
    rows = [(float(p[0, 4 + c, a]), c, corners(p[0, :4, a])) for a, c in pairs if p[0, 4 + c, a] > 0.3]
    kept: list[Any] = []
    for score, label, box in sorted(rows, key=lambda r: -r[0]):
        for _, other, better in kept:
            common = (torch.minimum(box, better)[2:] - torch.maximum(box, better)[:2]).clamp(min=0).prod()
            union = (box[2:] - box[:2]).prod() + (better[2:] - better[:2]).prod() - common
            if other == label and common / union > 0.4:
                break
        else:
            kept.append((score, label, box))
    expected = kept[:15]
    assert found[0].labels.tolist() == [r[1] for r in expected]
    torch.testing.assert_close(found[0].boxes, torch.stack([r[2] for r in expected]))
    assert [len(t) for t in suppress(p, 1.0)[0]] == [0, 0, 0]


@pytest.mark.parametrize(("shape", "size"), [((3, 37, 91), 64), ((2, 1, 200, 50), (96, 128)), ((1, 64, 64), 64)])
def test_letterbox(shape: tuple[int, ...], size: Any) -> None:
    image = uniform(*shape).float()
    y, place = letterbox(image, size, fill=-1.0)
    height, width = (size, size) if isinstance(size, int) else size
    assert y.shape == (*shape[:-2], height, width)
    left, top = place.offset
    inner = y[..., top : height - top, left : width - left]
    assert (y < 0).sum() >= y.numel() - inner.numel()
    boxes = some_boxes(6).float()
    torch.testing.assert_close(place.back(place.into(boxes)), boxes)
    whole = torch.tensor([0.0, 0, shape[-1], shape[-2]])
    x1, y1, x2, y2 = place.into(whole).tolist()
    assert bool((y[..., round(y1) : round(y2), round(x1) : round(x2)] >= 0).all())
    assert int((y >= 0).sum()) == round((x2 - x1) * (y2 - y1)) * y[..., 0, 0].numel()
    torch.testing.assert_close(place.back(torch.tensor([-50.0, -50, 900, 900]), clip=True), whole)


def test_refusals() -> None:
    loss = DetectionLoss(3, STRIDES)
    for targets, message in (
        (torch.zeros(2, 5), r"targets=\(2, 5\)"),
        (torch.tensor([[2.0, 0, 0, 0, 1, 1]]), r"targets\[:, 0\]=\[2.0\]"),
        (torch.tensor([[0.0, 3, 0, 0, 1, 1]]), r"targets\[:, 1\]=\[3.0\]"),
    ):
        with pytest.raises(ValueError, match=message):
            loss.items(raw_maps(2, 3), targets, 10)
    with pytest.raises(ValueError, match="maps=1"):
        loss.items(raw_maps(2, 3)[:1], TARGETS, 10)
    with pytest.raises(ValueError, match=r"maps=\(2, 66, 6, 8\)"):
        loss.items(raw_maps(2, 2), TARGETS, 10)
    with pytest.raises(ValueError, match="heads="):
        loss({}, TARGETS)
    for options, message in (
        ({"reg_max": 1}, "reg_max=1"),
        ({"gains": {"box": 1.0}}, "gains="),
        ({"topk": {"one2one": 0}}, "topk"),
        ({"topk": {"both": 1}}, "topk='both'"),
    ):
        with pytest.raises(ValueError, match=message):
            DetectionLoss(3, **options)
    with pytest.raises(ValueError, match="size=100"):
        letterbox(torch.rand(3, 8, 8), 100)
    with pytest.raises(ValueError, match="image="):
        letterbox(torch.zeros(3, 8, 8, dtype=torch.uint8), 64)
    with pytest.raises(ValueError, match=r"boxes\[0\].shape=\(4,\)"):
        pack_targets([torch.zeros(4)], [torch.zeros(1)], 64)
    with pytest.raises(ValueError, match="labels=0"):
        pack_targets([torch.zeros(1, 4)], [], 64)
    with pytest.raises(ValueError, match="iou=2"):
        suppress(torch.zeros(1, 6, 3), iou=2)
    with pytest.raises(ValueError, match="max_det=0"):
        select(torch.zeros(1, 6, 3), 0)
    assert pack_targets([torch.zeros(0, 4)] * 2, [torch.zeros(0)] * 2, 64).shape == (0, 6)


def test_golden_files_may_leave_out_what_is_usual() -> None:
    inputs = {f"{b}.{level}": m for b in ("one2many", "one2one") for level, m in enumerate(raw_maps(2, 3))}
    columns = {"batch_idx": TARGETS[:, 0], "cls": TARGETS[:, 1], "bboxes": TARGETS[:, 2:]}
    loss = DetectionLoss(3, STRIDES)
    maps = raw_maps(2, 3)
    found = loss({"one2many": maps, "one2one": maps}, TARGETS)
    case = Case("mhafyolo", "", {}, "", "train", "", None, None, {}, {**inputs, **columns}, found._asdict(), {})
    assert all(c.passed for c in run_case(case))
