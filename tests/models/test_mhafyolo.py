"""MHAF-YOLO: published counts, deployed form, graphs from rows, export, a small detection job."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.parity.core import Case, read_case, run_case
from torchconv import weights
from torchconv.analysis.count import count
from torchconv.models import create_model
from torchconv.models.detect.boxes import corners, letterbox, pack_targets, select, suppress
from torchconv.models.detect.mhafyolo import MHAFYOLO, Plan, convert_official
from torchconv.models.detect.mhafyolo_graph import PLANS, build_graph, plan_rows, scale_rows
from torchconv.models.detect.mhafyolo_loss import DetectionLoss
from torchconv.ops.mhafyolo import ConvBN
from torchconv.ops.mhafyolo_blocks import RepHDW2d, RepHMS2d
from torchconv.ops.mhafyolo_parts import PSA
from torchconv.surgery import merge
from torchconv.training.detection import AveragePrecision

SMALL = Plan(0.125, (64, 64, 64, 64), (2, 2, 2, 2), (32, 64), (2, 2, 2, 2), (64, 64, 64), 2, (2, 2, 2), 64)
# One level at stride 8.
SHALLOW: list[list[Any]] = [
    [-1, 1, "Conv", [16, 3, 2]],
    [-1, 1, "Conv", [24, 3, 2]],
    [-1, 1, "Conv", [32, 3, 2]],
    [-1, 1, "RepHMS", [32, 2, 1, 2, 7]],
    [[3], 1, "v10Detect", ["nc"]],
]
GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "mhafyolo"


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def seen(net: MHAFYOLO) -> MHAFYOLO:
    """A network whose batch norms have statistics of images, and whose last layers say something."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    net.train()(noise(4, 3, 64, 64).float())
    for m in (*net.head.cv3, *net.head.one2one_cv3, *net.head.cv2, *net.head.one2one_cv2):
        nn.init.normal_(m[-1].weight, std=0.3)
        nn.init.zeros_(m[-1].bias)
    return net.double().eval()


@pytest.fixture(scope="module")
def net() -> MHAFYOLO:
    torch.manual_seed(0)
    return seen(MHAFYOLO(SMALL, num_classes=3))


# Published counts hold the 16 numbers of the bins, and the batch norms that the authors' fusion leaves in RepHMS.
@pytest.mark.parametrize(
    ("name", "training", "deployed", "flops"),
    [
        ("lite_n", 1_630_528, 1_359_968, 4.63e9),
        ("n", 2_548_096, 2_182_272, 7.07e9),
        ("s", 7_915_920, 7_140_864, 24.95e9),
        ("m", 16_721_568, 15_327_744, 64.4e9),
    ],
)
def test_published_counts(name: str, training: int, deployed: int, flops: float) -> None:
    with torch.device("meta"):
        net: Any = create_model(f"mhafyolo_{name}")
    blocks = [m for m in net.modules() if isinstance(m, RepHMS2d)]
    left = sum(len(c.bn.weight) for b in blocks for c in b.modules() if isinstance(c, ConvBN))
    twin = net.merge()
    assert sum(p.numel() for p in net.parameters()) + 16 == training
    assert sum(p.numel() for p in twin.parameters()) + left + 16 == deployed
    assert sum(isinstance(m, PSA) for m in net.modules()) == 1
    if name == "n":
        found = count(twin, torch.empty(1, 3, 640, 640, device="meta")).kinds()["convolution"]
        assert found == pytest.approx(flops, rel=2e-3)


def test_wiring_of_the_published_graphs() -> None:
    rows = plan_rows(PLANS["n"])
    joins = {i: r[0] for i, r in enumerate(rows) if r[2] == "Concat"}
    assert list(joins) == [12, 17, 22, 25, 30, 34]
    assert [i for i, r in enumerate(rows) if r[2] == "RepHMS"] == [2, 4, 6, 8, 13, 18, 23, 26, 31, 35]
    kinds = [r[2] for r in rows]
    golden = read_case(GOLDEN / "tiny_detector.safetensors").config
    theirs = [*golden["backbone"], *golden["head"]]
    assert [k for k in kinds if k != "PSA"] == [r[2] for i, r in enumerate(theirs) if i != 10]
    ours = build_graph(rows, 3).sources
    assert [sorted(s) for s in ours] == [sorted(s) for s in build_graph(theirs, 3).sources]
    assert len(plan_rows(PLANS["lite_n"])) == len(rows) - 2


def test_deployed_form(net: MHAFYOLO) -> None:
    x = noise(2, 3, 64, 96)
    one = net(x)
    twin = net.merge()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in twin.modules())
    assert twin.head.branches == ("one2one",)
    torch.testing.assert_close(twin(x), one)
    assert (one[..., 1:] - one[..., :-1]).abs().amax(2).min() > 1e-3  # it is no constant
    many = copy.deepcopy(net).use("one2many")
    torch.testing.assert_close(many.merge()(x), many(x))
    assert (many(x) - one).abs().max() > 1e-2
    with pytest.raises(ValueError, match="branch='one2many'"):
        twin.use("one2many")
    assert list(twin.train()(x)) == ["one2one"]


def test_forms_and_types(net: MHAFYOLO) -> None:
    x = noise(2, 3, 64, 64)
    y, maps = net(x), copy.deepcopy(net).train()(x)
    assert y.shape == (2, 7, 84)
    assert {n: [tuple(m.shape) for m in v] for n, v in maps.items()} == {
        b: [(2, 67, 8, 8), (2, 67, 4, 4), (2, 67, 2, 2)] for b in ("one2many", "one2one")
    }
    laid = copy.deepcopy(net).to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(laid, y)
    single = copy.deepcopy(net).float()(x.float())
    assert (single - y).abs().max() < 0.1  # pixels
    half = copy.deepcopy(net).bfloat16()(x.bfloat16())
    assert half.dtype == torch.float32
    assert (half - y)[:, 4:].abs().max() < 0.2


def test_export_with_a_dynamic_batch() -> None:
    net, x = seen(MHAFYOLO(SHALLOW, num_classes=2)), noise(2, 3, 64, 64)
    twin = merge(net, x)
    assert [row.path for row in twin.merge_report.merged] == [""]
    program = torch.export.export(twin, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    more = noise(5, 3, 64, 64)
    torch.testing.assert_close(program.module()(more), twin(more))


def test_gradients_of_the_second_head_stop_at_the_features(net: MHAFYOLO) -> None:
    twin = copy.deepcopy(net).train()
    heads = twin(noise(2, 3, 64, 64))
    sum(m.square().sum() for m in heads["one2one"]).backward()
    moved = {n for n, p in twin.named_parameters() if p.grad is not None}
    assert moved
    assert all(".one2one_cv" in n for n in moved)
    assert net(noise(1, 3, 32, 32).requires_grad_()).requires_grad  # in eval mode it can be explained


def test_first_biases() -> None:
    head = MHAFYOLO(SHALLOW, num_classes=4).head
    for box, score in ((head.cv2, head.cv3), (head.one2one_cv2, head.one2one_cv3)):
        assert torch.equal(box[0][-1].bias, torch.ones(64))
        expected = torch.tensor(5 / 4 / 80**2).log()
        torch.testing.assert_close(score[0][-1].bias, expected.expand(4))
    assert torch.equal(head.cv3[0][2].weight, head.one2one_cv3[0][2].weight)
    head.reset_biases(80)
    torch.testing.assert_close(head.one2one_cv3[0][-1].bias, torch.tensor(5 / 4 / 10**2).log().expand(4))


def test_shifted_images_give_shifted_boxes() -> None:
    torch.manual_seed(1)
    net = seen(MHAFYOLO(SHALLOW, num_classes=2))
    x = noise(1, 3, 208, 208)
    y, z = net(x), net(x.roll((32, 32), (2, 3)))
    y, z = (t.unflatten(2, (26, 26)) for t in (y, z))
    before, after = y[..., 9:13, 9:13].clone(), z[..., 13:17, 13:17]
    before[:, :2] += 32
    torch.testing.assert_close(after, before)


def test_rows_of_ones_own() -> None:
    rows = [
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 3, "Conv", [16, 3, 2]],
        [-1, 3, "RepHDW", [20, 2]],
        [-1, 1, "AVG", [3]],
        [-1, 1, "nn.Upsample", ["None", 3, "nearest"]],
        [[-1, 2], 1, "Concat", [1]],
        [[5], 1, "v10Detect", ["nc"]],
    ]
    net = MHAFYOLO(scale_rows(rows, depth=0.67, width=0.5), num_classes=1, in_chans=1).double().eval()
    assert net.strides == (8,)
    assert net.multiple == 24
    assert [type(m) for m in net.model[2]] == [RepHDW2d, RepHDW2d]
    assert net.model[2][1].out_channels == 16
    assert net(noise(1, 1, 48, 24)).shape == (1, 5, 18)
    for change, message in (
        ({1: [7, 1, "Conv", [8]]}, r"rows\[1\]=7"),
        ({1: [-1, 1, "Convolution", [8]]}, r"rows\[1\].*did you mean"),
        ({1: [-1, 1, "Conv", [8, 3, 2, 1, 1, 1]]}, r"rows\[1\].*argument"),
        ({2: [-1, 1, "RepHMS", [8, 2, 1, 2, 4]]}, r"rows\[2\].*kernel_size=4"),
        ({2: [-1, 1, "PSA", [64]]}, r"rows\[2\]"),
        ({5: [[-1, 0], 1, "Concat", [1]]}, r"rows\[5\].*strides 2, 16"),
        ({5: [[-1, 2], 1, "Conv", [8]]}, r"rows\[5\].*takes one map"),
        ({6: [-1, 1, "Conv", [8]]}, "rows=7.*head"),
    ):
        with pytest.raises(ValueError, match=message):
            MHAFYOLO([change.get(i, row) for i, row in enumerate(rows)])


def test_wrong_inputs(net: MHAFYOLO) -> None:
    for shape in ((1, 3, 60, 64), (1, 4, 64, 64), (3, 64, 64), (1, 3, 0, 64)):
        with pytest.raises(ValueError, match=r"x of shape \("):
            net(torch.zeros(shape))
    with pytest.raises(ValueError, match="graph='l'"):
        MHAFYOLO("l")
    with pytest.raises(ValueError, match="num_classes=0"):
        MHAFYOLO(SHALLOW, num_classes=0)
    with pytest.raises(ValueError, match="in_chans=0"):
        MHAFYOLO(SHALLOW, in_chans=0)


def test_authors_checkpoints_and_own(tmp_path: Any) -> None:
    with torch.device("meta"):
        theirs = create_model("mhafyolo_lite_n", num_classes=5, in_chans=1)
    state = {f"model.{n}": torch.full(t.shape, 0.5, dtype=t.dtype) for n, t in theirs.state_dict().items()}
    state["model.model.34.dfl.conv.weight"] = torch.arange(16.0).reshape(1, 16, 1, 1)
    torch.save({"model": state}, tmp_path / "their.pth")
    net: Any = weights.load_official("mhafyolo_lite_n", tmp_path / "their.pth")
    assert net.load_report.complete
    assert (net.num_classes, net.in_chans) == (5, 1)
    assert set(convert_official(state)) == set(net.state_dict())
    weights.save(net, tmp_path / "own")
    again = weights.load(tmp_path / "own")
    assert all(map(torch.equal, again.state_dict().values(), net.state_dict().values()))


def test_finding_objects_in_images_of_any_size(net: MHAFYOLO) -> None:
    image = noise(2, 3, 50, 120).sigmoid()
    batch, place = letterbox(image, 64)
    for branch in ("one2one", "one2many"):
        model = copy.deepcopy(net).use(branch).train()
        model.model[0].eval()
        found = model.detect(image, 64, conf=0.5, iou=0.5, max_det=7)
        assert model.training
        assert not model.model[0].training
        with torch.no_grad():
            y = model.eval()(batch)
        for i, (boxes, scores, labels) in enumerate(found):
            assert 0 < len(scores) <= 7
            assert (scores > 0.5).all()
            assert (boxes.amin() >= 0) & (boxes.amax(0) <= torch.tensor([120, 50, 120, 50])).all()
            if branch == "one2one":
                expected = select(y[i : i + 1], 7)
                assert torch.equal(labels, expected[2][0][: len(labels)])
                torch.testing.assert_close(boxes, place.back(corners(expected[0][0]), clip=True)[: len(labels)])
            else:
                assert torch.equal(scores, suppress(y[i : i + 1], 0.5, 0.5, 7)[0].scores)
    single = net.detect(image[0], 64, conf=0.5)
    assert len(single) == 1


def squares(count: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Bright and dark squares on grey noise: images, boxes, classes."""
    draw = torch.Generator().manual_seed(5)
    images = 0.5 + 0.05 * torch.randn(count, 3, 64, 64, generator=draw)
    boxes, labels = [], []
    for image in images:
        side = torch.randint(14, 24, (2,), generator=draw)
        corner = torch.randint(2, 8, (2, 2), generator=draw) + torch.tensor([[0, 0], [30, 30]])
        kind = torch.randint(0, 2, (2,), generator=draw)
        for (x, y), s, k in zip(corner.tolist(), side.tolist(), kind.tolist(), strict=True):
            image[:, y : y + s, x : x + s] += 0.8 * k - 0.4
        boxes.append(torch.cat([corner, corner + side[:, None]], 1).float())
        labels.append(kind)
    return images, boxes, labels


def test_a_step_lowers_the_loss(net: MHAFYOLO) -> None:
    twin, loss = copy.deepcopy(net).float().train(), DetectionLoss(3)
    images, boxes, labels = squares(4)
    targets = pack_targets(boxes, labels, 64)
    before = loss(twin(images), targets)
    before.loss.backward()
    slopes = [p.grad for p in twin.parameters()]
    rate = 1e-3 * before.loss.detach() / sum(g.square().sum() for g in slopes)
    for parameter, slope in zip(twin.parameters(), slopes, strict=True):
        parameter.data -= rate * slope
    assert before.items.shape == (6,)
    assert loss(twin(images), targets).loss < before.loss


def test_a_small_job() -> None:
    """Trained on 48 images, both heads find what is in 16 others."""
    torch.manual_seed(0)
    net, loss = MHAFYOLO(SHALLOW, num_classes=2, momentum=0.2), DetectionLoss(2, (8,))
    images, boxes, labels = squares(64)
    net.head.reset_biases(64)
    optimiser = torch.optim.AdamW(net.parameters(), 1.5e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1.5e-2, 35)
    draw = torch.Generator().manual_seed(0)
    for _ in range(35):
        some = torch.randperm(48, generator=draw)[:8].tolist()
        targets = pack_targets([boxes[i] for i in some], [labels[i] for i in some], 64)
        optimiser.zero_grad()
        (loss(net(images[some]), targets).loss / len(some)).backward()
        optimiser.step()
        schedule.step()
    scores = {}
    for branch in ("one2one", "one2many"):
        found = net.use(branch).detect(images[48:], 64, conf=0.01, iou=0.6)
        tally = AveragePrecision()
        tally.update(found, list(zip(boxes[48:], labels[48:], strict=True)))
        scores[branch] = tally.compute().ap50
    assert min(scores.values()) > 0.7, scores


def test_golden_files_may_leave_to_the_weights_what_they_show() -> None:
    net, x = seen(MHAFYOLO(SHALLOW, num_classes=3)), noise(2, 3, 64, 32)
    with torch.no_grad():
        maps = net.head(net.forward_features(x))
    y = {branch: net.head.decode(m) for branch, m in maps.items()}
    boxes, scores, labels = select(y["one2one"])
    rows = suppress(y["one2many"])
    y |= {"post_boxes_xywh": boxes, "post_scores": scores, "post_labels": labels, "y_deploy": net.merge()(x).detach()}
    y |= {f"nms.{i}": torch.cat([r.boxes, r.scores[:, None], r.labels[:, None]], 1) for i, r in enumerate(rows)}
    state = {n: t.clone() for n, t in net.state_dict().items()}
    config = {"backbone": SHALLOW[:3], "head": SHALLOW[3:]}
    case = Case("mhafyolo", "", config, "", "eval", "", None, None, state, {"x": x}, y, {})
    assert all(c.passed for c in run_case(case))
