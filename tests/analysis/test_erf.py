"""Effective receptive field: linear layers whose map is their kernel, the sides, and how the feature map is found."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torchconv.analysis.erf import contribution_map, erf, high_contribution, log_normalised


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def by_numpy(data: np.ndarray, threshold: float) -> int | None:
    """The published search, on square maps."""
    h, w = data.shape
    for i in range(1, h // 2):
        if data[h // 2 - i : h // 2 + i + 1, w // 2 - i : w // 2 + i + 1].sum() / data.sum() > threshold:
            return 2 * i + 1
    return None


@pytest.mark.parametrize("size", [(11, 14), (9,), (6, 7, 8)])
def test_map_of_one_convolution_is_its_kernel_unflipped(size: tuple[int, ...]) -> None:
    ndim, channels = len(size), 2
    conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[ndim - 1](channels, 3, 5, padding=2, bias=False)
    nn.init.uniform_(conv.weight, 0.1, 1.0)
    maps = contribution_map(conv, torch.rand(2, channels, *size))
    expected = torch.zeros(size)
    window = tuple(slice(n // 2 - 2, n // 2 + 3) for n in size)
    expected[window] = conv.weight.detach().sum((0, 1))
    assert maps.shape == (2, *size)
    for one in maps:
        torch.testing.assert_close(one, expected)


def test_both_relus() -> None:
    conv = nn.Conv2d(1, 2, 3, padding=1, bias=False)
    with torch.no_grad():
        conv.weight[0], conv.weight[1] = 1.0, -1.0
        conv.weight[0, 0, 0, 0] = -1.0
    found = contribution_map(conv, torch.full((1, 1, 5, 5), 0.5))[0]
    assert found.sum() == 8  # the second channel is negative, the corner's gradient too
    assert found[1, 1] == 0


@pytest.mark.parametrize("size", [4, 5, 8, 13, 24])
def test_sides_are_those_of_the_published_search(size: int) -> None:
    data = torch.rand(size, size) ** 3
    thresholds = (0.0, 0.2, 0.3, 0.5, 0.8, 0.99)
    sides, ratios = high_contribution(data, thresholds)
    for threshold in thresholds:
        expected = by_numpy(data.numpy(), threshold)
        assert sides[threshold] == expected
        assert ratios[threshold] == (None if expected is None else pytest.approx((expected / size) ** 2))


def test_sides_of_a_dot_of_intervals_and_of_uneven_maps() -> None:
    dot = torch.zeros(8, 8)
    dot[4, 4] = 1
    assert high_contribution(dot, [0.99]) == ({0.99: 3}, {0.99: (3 / 8) ** 2})
    assert high_contribution(torch.ones(20), [0.5]) == ({0.5: 11}, {0.5: pytest.approx(11 / 20)})
    assert high_contribution(torch.ones(20, 8), [0.3, 0.5])[0] == {0.3: 7, 0.5: None}
    assert high_contribution(torch.ones(8, 20), [0.2, 0.5])[0] == {0.2: 7, 0.5: None}
    assert high_contribution(torch.zeros(9, 9), [0.2]) == ({0.2: None}, {0.2: None})
    assert high_contribution(torch.ones(3, 3), [0.0])[0] == {0.0: None}


def test_log_map_is_normalised() -> None:
    assert log_normalised(torch.tensor([0.0, 9.0, 99.0])).tolist() == pytest.approx([0.0, 0.5, 1.0])
    assert log_normalised(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1))
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.body(x)).flatten(1))


def test_the_feature_map_of_a_classifier_is_found_before_its_pooling() -> None:
    model, x = Classifier(), torch.randn(3, 3, 8, 8)
    model.body[0].eval()
    found = erf(model, x)
    named = erf(model, x, feature="body.3")
    assert found.layer == "body"
    assert named.layer == "body.3"
    assert torch.equal(found.map, named.map)
    assert torch.equal(contribution_map(lambda images: model.body.eval()(images), x).mean(0), named.map)
    assert (found.map.shape, found.images, found.skipped) == ((8, 8), 3, 0)


def test_the_model_is_left_as_it_was() -> None:
    model = Classifier()
    model.body[1].eval()
    modes = [m.training for m in model.modules()]
    before = {n: t.clone() for n, t in model.state_dict().items()}
    erf(model, torch.randn(2, 3, 8, 8))
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_batches_iterables_and_progress() -> None:
    model, x = Classifier(), torch.randn(5, 3, 8, 8)
    one = contribution_map(model, x)
    seen: list[tuple[int, int | None]] = []
    many = contribution_map(model, x, batch_size=2, progress=lambda done, total: seen.append((done, total)))
    torch.testing.assert_close(many, one)
    assert seen == [(2, 5), (4, 5), (5, 5)]
    lazily = erf(model, (x[i : i + 2] for i in range(0, 5, 2)), progress=lambda *a: seen.append(a))
    torch.testing.assert_close(lazily.map, one.mean(0))
    assert seen[-1] == (5, None)


def test_images_without_a_finite_gradient_are_counted_out() -> None:
    x = torch.rand(3, 1, 9, 9) + 0.5
    x[1] = 0
    result = erf(lambda images: images.sqrt(), x)
    assert (result.images, result.skipped) == (2, 1)
    assert result.map.isfinite().all()
    with pytest.raises(ValueError, match="finite"):
        erf(lambda images: images.sqrt(), x[1:2])


def test_series_and_several_outputs() -> None:
    net = nn.Sequential(nn.Conv1d(2, 4, 9, padding=4), nn.Conv1d(4, 4, 1))
    for p in net.parameters():
        nn.init.constant_(p, 0.1)
    result = erf(net, torch.rand(2, 2, 32))
    assert result.sides[0.99] == 9
    pyramid = erf(lambda x: {"first": x, "rest": [net[0](x), torch.zeros(2)]}, torch.rand(2, 2, 32))
    torch.testing.assert_close(pyramid.map, erf(net[0], torch.rand(2, 2, 32)).map)


def test_half_precision_models_and_no_grad() -> None:
    with torch.no_grad():
        result = erf(nn.Conv2d(1, 1, 3, padding=1).to(torch.bfloat16), torch.rand(1, 1, 8, 8))
    assert result.map.dtype == torch.float32


def test_refusals() -> None:
    model, x = Classifier(), torch.randn(1, 3, 8, 8)
    with pytest.raises(ValueError, match=r"feature='bodi'.*did you mean body"):
        erf(model, x, feature="bodi")
    with pytest.raises(ValueError, match=r"feature='head'.*no feature map \(N, C, H, W\)"):
        erf(model, x, feature="head")
    with pytest.raises(ValueError, match="a callable has no layers"):
        erf(lambda images: images, x, feature="body")
    with pytest.raises(ValueError, match="does not depend"):
        erf(lambda images: torch.zeros(1, 1, 4, 4), x)
    with pytest.raises(ValueError, match=r"thresholds=1\.5"):
        erf(model, x, thresholds=(1.5,))
    with pytest.raises(ValueError, match="spatial size"):
        erf(model, [x, x[:, :, 1:]])
    with pytest.raises(ValueError, match="floating point"):
        erf(model, x.to(torch.uint8))
    with pytest.raises(ValueError, match="batch_size=0"):
        contribution_map(model, x, batch_size=0)
    for empty in (x[:0], []):
        with pytest.raises(ValueError, match="at least one image"):
            contribution_map(model, empty)
        with pytest.raises(ValueError, match="at least one image"):
            erf(model, empty)
    with pytest.raises(ValueError, match="log_map"):
        high_contribution(torch.ones(()))
