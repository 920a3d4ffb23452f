"""Pattern mining: the head, thresholds and votes, frequent sets, boxes by arithmetic and by gradients, the section."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torchconv.analysis import patternnet as lib
from torchconv.analysis._patternnet_geometry import aligned
from torchconv.analysis._patternnet_section import draw_patterns, study_patterns
from torchconv.analysis._patternnet_sets import distinct, pack
from torchconv.analysis.inspection import inspect_model, write_report
from torchconv.analysis.patternnet import Geometry, PatternNetHead, receptive_field


def maps(seed: int = 0, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape or (12, 6, 5, 7), generator=generator, dtype=torch.float64).relu()


def head_of(filters: int, classes: int, scale: float = 1.0) -> PatternNetHead:
    torch.manual_seed(0)
    return PatternNetHead(filters, classes, scale).double()


# -- the head ----------------------------------------------------------------------------------------------------------


def test_presence_does_not_depend_on_position() -> None:
    x, head = maps(), head_of(6, 3)
    assert torch.equal(head(x), head(x.roll((2, 3), (2, 3))))
    assert torch.equal(head(x), head(x.flatten(2)[..., torch.randperm(35)].unflatten(2, (5, 7))))
    assert torch.equal(head(x), head(x.flatten(2)))  # one axis as well as two


def test_steep_gates_see_only_the_set_of_fired_filters() -> None:
    x, head = maps(), head_of(6, 3, scale=1e6)
    fired = (lib.respond(x)[0] > 1).double()
    assert torch.allclose(head(x), fired @ head.fc.weight.T + head.fc.bias)


def test_a_filter_twice_with_half_the_weight_is_the_same() -> None:
    x, head, twice = maps(), head_of(6, 3), head_of(7, 3)
    with torch.no_grad():
        for mine, theirs in ((twice.sigmoid_scale, head.sigmoid_scale), (twice.fc.bias, head.fc.bias)):
            mine[: len(theirs)] = theirs
        weight = head.fc.weight.clone()
        weight[:, 5] /= 2
        twice.fc.weight.copy_(torch.cat([weight, weight[:, 5:]], 1))
    assert torch.allclose(twice(torch.cat([x, x[:, 5:]], 1)), head(x))


def test_gradient_is_at_the_largest_response_only() -> None:
    x, head = maps().requires_grad_(), head_of(6, 3)
    head(x)[0, 2].backward()
    response, position = lib.respond(x)
    gate = head.gate(response)[0]
    expected = torch.zeros(6, 35, dtype=torch.float64)
    expected[torch.arange(6), position[0]] = head.fc.weight[2] * gate * (1 - gate) * head.sigmoid_scale
    assert x.grad is not None
    assert torch.allclose(x.grad[0].flatten(1), expected)
    assert (x.grad[1:] == 0).all()


def test_head_finds_the_filter_that_speaks_for_a_class() -> None:
    x, labels = maps(3, 60, 6, 4, 4), torch.arange(60) % 3
    for c in range(3):
        x[labels == c, c, 1, 2] += 3
    head = lib.fit_head(lib.largest_responses(x), labels, 3)
    assert lib.class_filters(head.fc.weight, 1) == [(0,), (1,), (2,)]
    again = lib.fit_head(lib.largest_responses(x), labels, 3)
    assert torch.equal(again.fc.weight, head.fc.weight)


# -- thresholds, votes, places -----------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 200), st.floats(0, 1), st.sampled_from([torch.float32, torch.float64]))
def test_thresholds_are_quantiles_of_all_images(count: int, quantile: float, dtype: torch.dtype) -> None:
    x = maps(count, count, 3, 2, 3).to(dtype)
    found = lib.binarise_thresholds(x, quantile)
    expected = np.quantile(x.transpose(0, 1).flatten(1).numpy(), quantile, axis=1)
    assert np.allclose(found.numpy(), expected, rtol=1e-6, atol=1e-7)
    assert found.dtype == dtype


def test_votes_are_sums_of_masks_and_grow_with_the_set() -> None:
    x = maps()
    masks = lib.binarise(x, lib.binarise_thresholds(x, 0.7))
    small, large = lib.votes(masks, [(1, 4), (1, 4, 5)]).unbind(1)
    assert torch.equal(small, masks[:, 1].long() + masks[:, 4].long())
    assert (large >= small).all()
    assert lib.binarise(x, torch.full((6,), -1.0)).all()


def test_one_filter_is_located_at_its_largest_response() -> None:
    x = maps()
    never = torch.full((6,), 100.0)
    found = lib.locate(x, torch.zeros(6), [(3,)], 1)
    assert torch.equal(found.position[:, 0], lib.respond(x)[1][:, 3])
    assert torch.equal(found.score[:, 0], lib.respond(x)[0][:, 3])
    absent = lib.locate(x, never, [(3,), (1, 2)], [1, 2])
    assert not absent.present.any()
    assert (absent.position == -1).all()
    assert (absent.box == -1).all()
    assert (absent.score == 0).all()


def test_places_need_the_votes() -> None:
    x = torch.zeros(1, 3, 2, 2)
    x[0, 0] = torch.tensor([[9.0, 2.0], [0.0, 0.0]])  # strong alone at the first place
    x[0, 1] = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    found = lib.locate(x, torch.full((3,), 0.5), [(0, 1), (0, 1, 2)], [2, 1])
    assert found.position.tolist() == [[1, 0]]
    assert found.score.tolist() == [[2.0, 3.0]]


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (lambda: lib.locate(maps(), torch.zeros(6), [(0, 6)], 1), "sets="),
        (lambda: lib.locate(maps(), torch.zeros(6), [(0,)], [1, 2]), "min_votes="),
        (lambda: lib.binarise_thresholds(maps(), 1.5), "quantile="),
        (lambda: lib.binarise_thresholds(torch.zeros(3, 4)), "maps="),
        (lambda: PatternNetHead(5, 2)(maps()), "maps="),
        (lambda: PatternNetHead(0, 2), "n_filters="),
        (lambda: lib.class_filters(torch.zeros(2, 3), 0), "k="),
        (lambda: lib.mine_patterns(maps(), torch.zeros(3).long(), head_of(6, 3)), "labels="),
        (lambda: lib.mine_patterns(maps(), torch.full((12,), 3), head_of(6, 3)), "labels="),
        (lambda: lib.mine_patterns(maps(), torch.zeros(12).long(), head_of(6, 3), sizes=(3, 2)), "sizes="),
        (lambda: lib.frequent_sets(pack(maps() > 1), [0, 1], 0.0), "min_support="),
        (lambda: lib.frequent_sets(pack(maps() > 1), [1, 0]), "filters="),
        (lambda: Geometry((1, 2, 3)).boxes(torch.zeros(1).long(), (4, 4)), "geometry="),
        (lambda: Geometry().shrunk(0), "alpha="),
        (lambda: receptive_field(nn.Conv2d(1, 1, 3), torch.rand(1, 1, 5, 5), "conv"), "layers="),
        (
            lambda: lib.classify_by_patterns(torch.rand(4, 2), torch.ones(4), torch.rand(1, 2), torch.ones(1)),
            "labels=",
        ),
    ],
)
def test_wrong_arguments_are_named(wrong, named: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=named):
        wrong()


# -- sets --------------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 7), st.integers(1, 4), st.sampled_from([0.05, 0.3, 0.6]))
def test_frequent_sets_equal_brute_force(seed: int, count: int, size: int, least: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(9, count, 3, 5, generator=generator) < 0.4
    found = lib.frequent_sets(pack(masks), range(count), least, size)
    expected = {}
    for n in range(1, size + 1):
        for chosen in itertools.combinations(range(count), n):
            support = float(masks[:, chosen].all(1).flatten(1).any(1).double().mean())
            if support >= least:
                expected[chosen] = support
    assert found == pytest.approx(expected)
    assert all(found[s] <= found[s[:-1]] for s in found if len(s) > 1)


def planted() -> tuple[Tensor, Tensor, PatternNetHead]:
    """Class 1 has filters 2 and 3 at one place, class 2 filters 4 and 5 at two places; filter 0 is everywhere."""
    x, labels = maps(5, 90, 8, 6, 6) * 0.5, torch.arange(90) % 3
    place = torch.arange(90) % 36
    for i in range(90):
        y, z = divmod(int(place[i]), 6)
        x[i, 0, y, z] += 4
        if labels[i] == 1:
            x[i, 2:4, y, z] += 4
        if labels[i] == 2:
            x[i, 4, y, z] += 4
            x[i, 5, 5 - y, 5 - z] += 4
    head = lib.fit_head(lib.largest_responses(x), labels, 3)
    return x, labels, head


def test_planted_patterns_are_found_where_they_are() -> None:
    x, labels, head = planted()
    found = lib.mine_patterns(x, labels, head, sizes=(2, 3), quantile=0.98)
    (best, *_) = found.of(1)
    assert best.filters == (2, 3)
    assert best.support == 1
    assert best.confidence > 0.95
    assert (4, 5) not in [p.filters for p in found.of(2)]  # both fire, never at one place
    at = found.locate(x).position[:, found.patterns.index(best)]
    assert torch.equal(at[labels == 1], (torch.arange(90) % 36)[labels == 1])
    bag = lib.bag_of_patterns(x, found)
    assert torch.allclose(bag.norm(dim=1)[labels == 1], torch.ones(30))
    assert lib.classify_by_patterns(bag[::2], labels[::2] == 1, bag[1::2], labels[1::2] == 1) == 1
    votes = lib.basic_patterns(x, labels, head, k=2, min_votes=2, quantile=0.98)
    assert set(votes.of(1)[0].filters) == {2, 3}
    assert votes.of(1)[0].support == 1


def test_more_images_of_other_classes_change_confidence_only() -> None:
    x, labels, _ = planted()
    shown = lib.locate(x, torch.full((8,), 2.0), [(2, 3)], 2).present
    less = labels != 2
    few, all_of_them = lib.supports(shown[less], labels[less], 3), lib.supports(shown, labels, 3)
    assert few[0, 1] == all_of_them[0, 1] == 1
    assert few[0, 2] == 0  # a class without images
    pattern = lib.Pattern((2, 3), 1, 2, (0.25, 0.5, 0.25))
    assert (pattern.support, pattern.confidence) == (0.5, 0.5)
    assert lib.Pattern((2,), 0, 1, (0.0, 0.0)).confidence == 0


def test_overlapping_sets_are_dropped() -> None:
    geometry = Geometry(4, 9)
    at = torch.tensor([[0, 0, 15, -1], [5, 6, 10, 5]])
    boxes = geometry.boxes(at, (4, 4))
    assert distinct(boxes, at >= 0, 0.5) == [0, 2, 3]  # 1 lies on 0; 3 is mostly absent
    assert distinct(boxes, at >= 0, 0.0) == [0]
    one, two = torch.tensor([0.0, 0.0, 3.0, 3.0]), torch.tensor([2.0, 0.0, 5.0, 3.0])
    assert lib.iou(one, two).item() == pytest.approx(8 / 24)


def test_maps_read_from_a_network_are_those_in_memory() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()).train()
    images, labels = torch.randn(30, 3, 12, 12), torch.arange(30) % 2
    kept, fresh = (lib.FeatureMaps(net, images, batch_size=7, keep_bytes=n) for n in (1 << 20, 0))
    assert kept.layer == "1"
    expected = net[:2](images).detach()
    head = PatternNetHead(6, 2)
    direct = lib.mine_patterns(expected, labels, head, sizes=(1, 2), quantile=0.8)
    for source in (kept, fresh):
        assert torch.allclose(torch.cat(list(source)), expected, atol=1e-6)
        found = lib.mine_patterns(source, labels, head, sizes=(1, 2), quantile=0.8)
        assert found.patterns == direct.patterns
        assert found.patterns
    assert kept._kept
    assert not fresh._kept
    assert net.training


def test_proposals_are_the_best_regions_without_overlaps() -> None:
    x = torch.zeros(2, 3, 6, 6)
    x[0, :2, 0:2, 0:3] = 2.0  # two filters fire on six cells, and again, weaker, on one
    x[0, :2, 5, 5] = 3.0
    x[0, 2, 0:2, 0:2] = 1.0  # a third one on a part of the first region
    patterns = [lib.Pattern((2,), 0, 1), lib.Pattern((0, 1), 0, 2)]
    mining = lib.Mining(patterns, torch.full((3,), 0.5))
    first, second = lib.propose(x, mining, Geometry(4, 8, 2), max_overlap=0.4)
    assert first.boxes.tolist() == [[-1.5, -1.5, 13.5, 9.5]]  # cells 0..2 and 0..1, half a box around them
    assert first.scores.tolist() == [12]
    assert first.patterns.tolist() == [1]
    assert second.boxes.shape == (0, 4)
    assert len(lib.propose(x, mining, Geometry(4, 8, 2), max_overlap=0.9)[0].boxes) == 2
    with pytest.raises(ValueError, match="max_overlap="):
        lib.propose(x, mining, max_overlap=2)


# -- geometry ----------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(channels, channels, 3, stride, 1), nn.Conv2d(channels, channels, 3, 1, 2, 2)
        self.short = nn.Conv2d(channels, channels, 1, stride)
        self.gate = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(self.one(x).relu())
        return torch.relu(y * self.gate(y.mean((2, 3), keepdim=True)).sigmoid() + self.short(x))


STACKS = {
    "dilated": nn.Sequential(nn.Conv2d(2, 4, 3, dilation=3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, (5, 3), (2, 1))),
    "pooled": nn.Sequential(
        nn.Conv2d(2, 4, 5, 2, 2), nn.AvgPool2d(3, 2, 1), nn.ZeroPad2d((3, 0, 1, 2)), nn.Conv2d(4, 3, 3)
    ),
    "separable": nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 7, padding=3, groups=4), nn.BatchNorm2d(4), nn.GELU()
    ),
    "residual": nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1), nn.BatchNorm2d(4), Residual(4, 2), Residual(4, 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", STACKS)
def test_arithmetic_equals_the_extent_of_the_gradient(name: str) -> None:
    net = STACKS[name].double().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.abs_()  # so that nothing cancels
    x = torch.rand(1, 2, 61, 65, dtype=torch.float64, requires_grad=True)
    y = net(x)
    size = y.shape[2:]
    unit = (size[0] // 2, size[1] // 2)
    with torch.no_grad():
        geometry = receptive_field(net, x)
    if name == "residual":  # without what every gate sees of the whole image
        for module in net:
            if isinstance(module, Residual):
                module.gate.weight.data.zero_()
        y = net(x)
    (gradient,) = torch.autograd.grad(y[0, :, unit[0], unit[1]].sum(), x)
    rows, columns = (gradient[0].abs().sum((0, axis)).nonzero().flatten() for axis in (2, 1))
    expected = [columns.min(), rows.min(), columns.max(), rows.max()]
    box = geometry.boxes(torch.tensor(unit[0] * size[1] + unit[1]), size)
    assert box.tolist() == [float(e) for e in expected]


def test_known_networks() -> None:
    torchvision = pytest.importorskip("torchvision")
    x = torch.rand(1, 3, 224, 224)
    with torch.device("meta"):
        alexnet, vgg = torchvision.models.alexnet().features, torchvision.models.vgg16().features
    assert receptive_field(alexnet, x, "11") == Geometry(16, 163, 15)
    assert receptive_field(vgg, x, "29") == Geometry(16, 196, 7.5)


def test_arithmetic_agrees_with_the_measured_fields() -> None:
    from torchconv.analysis._filters_size import receptive_fields

    net = nn.Sequential(nn.Conv2d(1, 2, 5, 2, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(2, 2, 3, dilation=2))
    measured = receptive_fields(net, (1, 96, 96))["3"]
    found = receptive_field(net, torch.rand(1, 1, 96, 96))
    assert not measured.clipped
    assert (measured.size[0], measured.jump[0]) == (found.receptive_field, found.stride)


def test_reach_that_is_not_known_is_refused() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(36, 36)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mix(x.flatten(2)).unflatten(2, (6, 6))

    with pytest.raises(ValueError, match="not known by arithmetic"):
        receptive_field(nn.Sequential(nn.Conv2d(1, 2, 3), Mixer()), torch.rand(1, 1, 8, 8))
    even = aligned((8, 16), (4, 4), 5)
    assert even.centres(torch.tensor([0, 15]), (4, 4)).tolist() == [[1.5, 0.5], [13.5, 6.5]]


def test_moving_the_image_by_a_stride_moves_the_box() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU())
    image = torch.zeros(1, 1, 64, 64)
    image[..., 24:40, 28:36] = torch.randn(16, 8)
    moved = image.roll((4, 8), (2, 3))
    geometry = receptive_field(net, image)
    assert geometry.stride == 4
    with torch.no_grad():
        here, there = (lib.locate(net(i), torch.zeros(4), [(0, 1)], 1, geometry) for i in (image, moved))
    assert (there.box - here.box).tolist() == [[[8.0, 4.0, 8.0, 4.0]]]


# -- the section -------------------------------------------------------------------------------------------------------


def squares() -> tuple[nn.Module, Tensor, Tensor]:
    """A network that sees upright and level bars, and images that hold one of them, or a spot."""
    generator = torch.Generator().manual_seed(0)
    images, labels = 0.1 * torch.rand(90, 3, 24, 24, generator=generator), torch.arange(90) % 3
    corners = torch.randint(2, 15, (90, 2), generator=generator)
    for image, label, (y, x) in zip(images, labels.tolist(), corners.tolist(), strict=True):
        height, width = ((6, 2), (2, 6), (2, 2))[label]
        image[:, y : y + height, x : x + width] += 1
    first = nn.Conv2d(3, 6, 5, padding=2, bias=False)
    with torch.no_grad():
        first.weight.fill_(-0.1)
        first.weight[0::2, :, :, 2] = 0.3
        first.weight[1::2, :, 2] = 0.3
    return nn.Sequential(first, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)), images, labels


def test_section_draws_patterns_on_the_bars(tmp_path: Path) -> None:
    model, images, labels = squares()
    found = inspect_model(model, images, labels=labels, names=("upright", "level"), only=("patterns",))
    (section,) = found.sections
    accuracy = {row["classified by"]: row["held-out accuracy"] for row in section.tables["accuracy"]}
    assert accuracy["patterns"] > 0.8 > accuracy["chance"] == pytest.approx(1 / 3)
    assert section.level == "note"
    assert {row["class"] for row in section.tables["patterns"]} <= {"upright", "level", "2"}
    assert section.data["stride"] == 1
    assert section.verdict in write_report(found, tmp_path / "page.html").read_text()
    study = study_patterns(model, images, labels)
    (pattern, *_) = study.mining.of(0)
    at = lib.Mining([pattern], study.mining.thresholds).locate(study.maps, study.geometry)
    shown = at.present[:, 0] & (labels[study.rest] == 0)
    x, y = at.box[shown, 0].unflatten(-1, (2, 2)).mean(1).long().unbind(-1)
    assert bool((images[study.rest][shown, 0, y, x] > 0.9).float().mean() > 0.8)  # boxes are centred on bars
    figure = draw_patterns(study, images, labels, [pattern], ["upright"])
    assert len(figure.axes[0].images) == len(figure.axes[0].patches) == 6


def test_section_says_what_it_needs() -> None:
    model, images, labels = squares()
    with pytest.raises(ValueError, match="needs --data with classes"):
        inspect_model(model, images, only=("patterns",))
    with pytest.raises(ValueError, match="10 images of each of two classes"):
        study_patterns(model, images[:12], labels[:12])
    with pytest.raises(ValueError, match="labels="):
        study_patterns(model, images, labels[:3])

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(images.shape[1], 16, 4, 4), nn.LayerNorm(16)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(self.conv(x).permute(0, 2, 3, 1)).mean((1, 2))
            return y

    with pytest.raises(ValueError, match="layer='norm': is not channels first"):
        study_patterns(Last(), images, labels)
