"""Beta-rank: double loops, identities of the ratios, several batches, real layers, bad arguments."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torchconv.compress.betarank import (
    RATIOS,
    BetaRank,
    beta_rank,
    hrank,
    l1_rank,
)

CONVOLVE: tuple[Any, ...] = (None, F.conv1d, F.conv2d, F.conv3d)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(channels: int = 4, filters: int = 6, side: int = 7, batch: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    x = drawn(batch, channels, side, side + 2).relu() + 0.1 * drawn(batch, channels, side, side + 2, seed=3)
    weight = drawn(filters, channels, 3, 3, seed=1)
    return x, F.conv2d(x, weight, padding=1), weight


def by_loops(
    x: Tensor, y: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int, ratio: str
) -> Tensor:
    """The equation, patch by patch, for any dimension."""
    ndim = weight.dim() - 2
    x = F.pad(x, [p for p in reversed(padding) for _ in range(2)])
    inputs, outputs = weight.shape[1], len(weight) // groups
    found = torch.zeros(len(weight), dtype=torch.float64)
    for k in range(len(weight)):
        own = x[:, k // outputs * inputs : (k // outputs + 1) * inputs]
        for place in itertools.product(*map(range, y.shape[2:])):
            window = tuple(
                slice(
                    place[a] * stride[a],
                    place[a] * stride[a] + dilation[a] * (weight.shape[2 + a] - 1) + 1,
                    dilation[a],
                )
                for a in range(ndim)
            )
            incoming = own[(slice(None), slice(None), *window)].std(correction=0)
            outgoing = y[(slice(None), k, *place)].std(correction=0)
            if incoming > 1e-12 and outgoing > 1e-12:
                found[k] += outgoing / incoming if ratio == "out_over_in" else incoming / outgoing
    return found * weight.abs().flatten(1).mean(1)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_equals_loops(data: st.DataObject) -> None:
    ndim = data.draw(st.sampled_from([1, 2, 2, 3]))
    groups, ratio = data.draw(st.sampled_from([1, 2])), data.draw(st.sampled_from(RATIOS))
    kernel = [data.draw(st.integers(1, 3)) for _ in range(ndim)]
    stride, dilation = ([data.draw(st.integers(1, 2)) for _ in range(ndim)] for _ in range(2))
    padding = [data.draw(st.integers(0, 2)) for _ in range(ndim)]
    sizes = [data.draw(st.integers(5, 6 if ndim == 3 else 9)) for _ in range(ndim)]
    x, weight = drawn(3, 2 * groups, *sizes), drawn(2 * groups, 2, *kernel, seed=1)
    y = CONVOLVE[ndim](x, weight, None, stride, padding, dilation, groups)
    ours = beta_rank(x, y, weight, stride, padding, ratio, dilation=dilation, groups=groups)
    expected = by_loops(x, y, weight, stride, padding, dilation, groups, ratio)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("height", "width", "stride", "padding"), [(7, 7, 1, 1), (9, 6, 2, 1), (5, 11, 2, 0), (3, 3, 1, 3)]
)
def test_released_axes_equal_numpy_slices(height: int, width: int, stride: int, padding: int) -> None:
    x, weight = drawn(4, 5, height, width), drawn(3, 5, 3, 3, seed=1)
    y = F.conv2d(x, weight, None, stride, padding)
    step = int(width / y.shape[3])
    expected = np.zeros(3)
    for i, j in itertools.product(range(y.shape[2]), range(y.shape[3])):
        window = x.numpy()[:, i * step : i * step + 3, j * step : j * step + 3, :]
        if window.size:
            expected += y[:, :, i, j].numpy().std(0) / window.std()
    expected *= weight.abs().flatten(1).mean(1).numpy()
    ours = beta_rank(x, y, weight, stride, padding, axes="released")
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-10)
    assert not torch.allclose(ours, beta_rank(x, y, weight, stride, padding))


@pytest.mark.parametrize(
    ("stride", "padding", "extra", "groups"), [(1, 0, 0, 1), (2, 1, 1, 1), (2, 0, 0, 2), (3, 1, 0, 1)]
)
def test_transposed_is_the_convolution_of_the_stretched_input(
    stride: int, padding: int, extra: int, groups: int
) -> None:
    x, weight = drawn(4, 4, 5, 4), drawn(4, 3, 3, 3, seed=1)
    y = F.conv_transpose2d(x, weight, None, stride, padding, extra, groups)
    stretched = x.new_zeros(4, 4, 4 * stride + 1, 3 * stride + 1)
    stretched[:, :, ::stride, ::stride] = x
    stretched = F.pad(stretched, (2 - padding, 2 - padding + extra) * 2)
    flipped = weight.flip(2, 3).unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(F.conv2d(stretched, flipped, groups=groups), y)
    for ratio in RATIOS:
        ours = beta_rank(x, y, weight, stride, padding, ratio, groups=groups, transposed=True)
        torch.testing.assert_close(ours, beta_rank(stretched, y, flipped, ratio=ratio, groups=groups))


# -- identities --------------------------------------------------------------------------------------------------------


def test_scale_of_a_filter() -> None:
    x, y, weight = case()
    scale = torch.tensor([1.0, 3.0, 0.5, 1.0, -2.0, 1.0], dtype=torch.float64)
    scaled = weight * scale[:, None, None, None]
    larger = F.conv2d(x, scaled, padding=1)
    for ratio, power in (("in_over_out", 0), ("out_over_in", 2)):
        before, after = beta_rank(x, y, weight, 1, 1, ratio), beta_rank(x, larger, scaled, 1, 1, ratio)
        torch.testing.assert_close(after, before * scale.abs() ** power)
    torch.testing.assert_close(l1_rank(scaled), l1_rank(weight) * scale.abs())


@pytest.mark.parametrize("axes", ["patch", "released"])
@pytest.mark.parametrize("ratio", RATIOS)
def test_what_does_not_matter(ratio: str, axes: str) -> None:
    x, y, weight = case()
    plain = beta_rank(x, y, weight, 1, 1, ratio, axes)
    torch.testing.assert_close(beta_rank(x, y + drawn(6, 1, 1), weight, 1, 1, ratio, axes), plain)  # a bias
    torch.testing.assert_close(beta_rank(7 * x, 7 * y, weight, 1, 1, ratio, axes), plain)  # brighter images
    order = torch.randperm(5)
    torch.testing.assert_close(beta_rank(x[order], y[order], weight, 1, 1, ratio, axes), plain)
    torch.testing.assert_close(beta_rank(x.repeat(2, 1, 1, 1), y.repeat(2, 1, 1, 1), weight, 1, 1, ratio, axes), plain)
    order = torch.randperm(6)
    torch.testing.assert_close(beta_rank(x, y[:, order], weight[order], 1, 1, ratio, axes), plain[order])
    torch.testing.assert_close(beta_rank(x.to(memory_format=torch.channels_last), y, weight, 1, 1, ratio, axes), plain)


@pytest.mark.parametrize("side", [4, 7])
def test_closed_form_of_one_weight(side: int) -> None:
    x, weight = drawn(6, 1, side, side), drawn(5, 1, 1, 1, seed=1)
    y = F.conv2d(x, weight)
    squares = weight.flatten().square() * side * side
    torch.testing.assert_close(beta_rank(x, y, weight), squares)
    expected = torch.full((5,), side * side, dtype=torch.float64)
    torch.testing.assert_close(beta_rank(x, y, weight, ratio="in_over_out"), expected)


def test_dead_patches_and_filters_give_nothing() -> None:
    x, _, weight = case()
    weight[2] = 0
    x[..., :4] = 0
    y = F.conv2d(x, weight, padding=1)
    for ratio in RATIOS:
        ours = beta_rank(x, y, weight, 1, 1, ratio)
        assert ours[2] == 0
        edge = F.pad(x, (0, 1))[..., 2:]  # only columns whose patches change
        live = beta_rank(edge, y[..., 3:], weight, 1, (1, 0), ratio)
        torch.testing.assert_close(ours, live)
    constant = torch.full((4, 3, 6, 6), 0.1)  # float32 rounding is no spread
    y = F.conv2d(constant, torch.rand(2, 3, 3, 3))
    assert beta_rank(constant, y, torch.rand(2, 3, 3, 3)).tolist() == [0, 0]


def test_large_offsets_do_not_cancel() -> None:
    x, y, weight = case()
    inner = y[..., 1:-1, 1:-1]  # no zeros of the padding, which an offset would make an edge of
    shifted = beta_rank(x + 1000, inner + 1e6, weight)
    torch.testing.assert_close(shifted, beta_rank(x, inner, weight), rtol=1e-6, atol=0)


def test_chunks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, weight = case()
    whole = beta_rank(x, y, weight, 1, 1)
    monkeypatch.setattr("torchconv.compress._betarank_statistics._AT_ONCE", 700)
    torch.testing.assert_close(beta_rank(x, y, weight, 1, 1), whole)


def test_half_precision_enters_as_float64() -> None:
    x, _, weight = case()
    x, weight = x.bfloat16(), weight.bfloat16()
    y = F.conv2d(x.float(), weight.float(), padding=1)
    torch.testing.assert_close(beta_rank(x, y, weight, 1, 1), beta_rank(x.double(), y.double(), weight.double(), 1, 1))


# -- the network -------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(8, 6, 3, stride=2)  # declared first, runs last
        self.stem = nn.Conv2d(3, 8, 3, padding="same")
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 8, (3, 2), padding="same", dilation=(1, 2), groups=2, padding_mode="circular")
        self.up = nn.ConvTranspose2d(8, 8, 3, stride=2, output_padding=1, groups=4)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.act(self.norm(self.stem(x))))
        return self.act(self.last(self.up(self.grouped(x))))


@pytest.fixture
def small() -> Small:
    torch.manual_seed(0)
    model = Small().double()
    model(drawn(8, 3, 9, 9))
    return model


def test_layers_of_a_network(small: Small) -> None:
    x = drawn(6, 3, 9, 8)
    before = copy.deepcopy(small.state_dict())
    small.norm.eval()
    modes = [m.training for m in small.modules()]
    found = BetaRank(small).scores([x])
    assert list(found) == ["stem", "grouped", "up", "last"]
    assert [m.training for m in small.modules()] == modes
    assert not small.stem._forward_hooks
    assert all(torch.equal(before[n], t) for n, t in small.state_dict().items())
    small.eval()
    y = small.stem(x)
    torch.testing.assert_close(found["stem"], beta_rank(x, y, small.stem.weight, padding="same"))
    x = small.depthwise(small.act(small.norm(y)))
    y = small.grouped(x)
    wrapped = F.pad(x, (1, 1, 1, 1), "circular")
    weight = small.grouped.weight
    torch.testing.assert_close(found["grouped"], beta_rank(wrapped, y, weight, dilation=(1, 2), groups=2))
    x, y = y, small.up(y)
    torch.testing.assert_close(found["up"], beta_rank(x, y, small.up.weight, 2, groups=4, transposed=True))
    x, y = y, small.last(y)
    torch.testing.assert_close(found["last"], beta_rank(x, y, small.last.weight, 2))
    ranks = BetaRank(small).collect([drawn(6, 3, 9, 8)])
    assert all(float(r.min()) == 0 and float(r.max()) == 1 for r in ranks.values())


@pytest.mark.parametrize("axes", ["patch", "released"])
def test_batches_add_up(axes: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 4, 3, 2)).double()
    x, labels = drawn(9, 3, 8, 8) + torch.arange(9.0)[:, None, None, None], torch.arange(9)
    whole = BetaRank(model, axes=axes).scores([x])
    parts = [(x[:2], labels[:2]), (x[2:3], labels[2:3]), (x[3:], labels[3:])]
    together = BetaRank(model, axes=axes, batches=None).scores(parts)
    for name, expected in whole.items():
        torch.testing.assert_close(together[name], expected)
    first = BetaRank(model, axes=axes).scores(parts)
    assert not torch.allclose(first["0"], whole["0"])
    two = BetaRank(model, axes=axes, batches=2).scores(iter(parts))
    torch.testing.assert_close(two["2"], BetaRank(model, axes=axes).scores([x[:3]])["2"])


@pytest.mark.parametrize("ndim", [1, 3])
def test_other_dimensions(ndim: int) -> None:
    layer = (None, nn.Conv1d, None, nn.Conv3d)[ndim]
    model = nn.Sequential(layer(2, 4, 3, padding=1, bias=False)).double()
    x = drawn(4, 2, *(6,) * ndim)
    found = BetaRank(model, ratio="in_over_out").scores([x])["0"]
    torch.testing.assert_close(found, beta_rank(x, model(x), model[0].weight, 1, 1, "in_over_out"))


def test_other_criteria(small: Small) -> None:
    x = drawn(4, 3, 9, 9)
    l1 = BetaRank(small, ["stem", "up"], criterion="l1").scores([x])
    torch.testing.assert_close(l1["stem"], small.stem.weight.abs().mean((1, 2, 3)) * 81)
    by_filter = [small.up.weight[2 * g : 2 * g + 2, k].abs().mean() for g in range(4) for k in range(2)]
    torch.testing.assert_close(l1["up"], torch.stack(by_filter) * 400)
    small.eval()
    ranked = BetaRank(small, ["stem"], criterion="hrank", after={"stem": "norm"}, batches=None).scores([x[:1], x[1:]])
    torch.testing.assert_close(ranked["stem"], hrank(small.norm(small.stem(x))))
    rectified = BetaRank(small, ["last"], criterion="hrank").scores([x])["last"]
    torch.testing.assert_close(rectified, hrank(small(x)))
    maps = drawn(2, 3, 5, 6)
    expected = [np.mean([np.linalg.matrix_rank(m) for m in maps[:, k].numpy()]) for k in range(3)]
    assert hrank(maps).tolist() == expected


def test_shared_and_compiled_layers() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 4, 3, padding=1).double()
    model = nn.Sequential(layer, nn.ReLU(), layer)
    x = drawn(5, 4, 6, 6)
    found = BetaRank(model).scores([x])
    inputs = torch.cat([x, layer(x).relu()])
    torch.testing.assert_close(found["0"], beta_rank(inputs, layer(inputs), layer.weight, 1, 1))
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(BetaRank(compiled).scores([x])["0"], found["0"])


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio": "in"}, "ratio='in'"),
        ({"axes": "nhwc"}, "axes='nhwc'"),
        ({"groups": 2}, "x=.*8 channels"),
        ({"groups": 0}, "groups=0"),
        ({"stride": 0}, "stride=0"),
        ({"stride": 2}, r"y=\(7, 9\).*stride"),
        ({"padding": -1}, "padding=-1"),
        ({"padding": "reflect"}, "padding='reflect'"),
        ({"dilation": 9, "padding": 0}, "x=.*smaller than the kernel"),
        ({"transposed": True, "padding": "same"}, "padding='same'"),
        ({"weight": torch.ones(3, 3)}, "weight=.*1 to 3 dimensions"),
        ({"weight": drawn(5, 4, 3, 3)}, "weight=.*y has 6 channels"),
        ({"x": drawn(1, 4, 7, 9), "y": drawn(1, 6, 7, 9)}, "x=1: .*two samples"),
        ({"x": drawn(4, 4, 7, 9)}, "y=5.*4 inputs"),
        ({"x": drawn(5, 4, 7)}, "x=.*2 spatial axes"),
        ({"y": drawn(5, 6, 7)}, "y=.*2 spatial axes"),
        ({"x": case()[0] / 0}, "not finite"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    x, y, weight = case()
    with pytest.raises(ValueError, match=message):
        beta_rank(**({"x": x, "y": y, "weight": weight, "padding": 1} | change))


def test_transposed_sizes_and_released_axes_are_checked() -> None:
    x, weight = drawn(3, 2, 5), drawn(2, 4, 3, seed=1)
    with pytest.raises(ValueError, match=r"y=\(13,\).*transposed convolution"):
        beta_rank(x, drawn(3, 4, 13), weight, 2, transposed=True)
    with pytest.raises(ValueError, match=r"axes='released'.*'patch'"):
        beta_rank(x, drawn(3, 4, 11), weight, 2, axes="released", transposed=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ["stam"]}, "layers='stam': did you mean stem"),
        ({"layers": "stem"}, "layers='stem': must be a list"),
        ({"layers": []}, "no convolution"),
        ({"criterion": "taylor"}, "criterion='taylor'"),
        ({"ratio": "in"}, "ratio='in'"),
        ({"axes": "released"}, "axes='released'"),
        ({"batches": 0}, "batches=0"),
        ({"after": {"nrm": "act"}}, "after='nrm'"),
        ({"after": {"stem": "acts"}}, "after='acts'"),
    ],
)
def test_bad_options(small: Small, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BetaRank(small, **options)


def test_bad_batches(small: Small) -> None:
    rank = BetaRank(small, batches=None)
    with pytest.raises(ValueError, match="gave no batch"):
        rank.collect([])
    with pytest.raises(ValueError, match="loader='dict'"):
        rank.collect([{"x": drawn(2, 3, 9, 9)}])
    with pytest.raises(ValueError, match="maps of one size"):
        rank.collect([drawn(2, 3, 9, 9), drawn(2, 3, 11, 9)])
    with pytest.raises(ValueError, match="two samples"):
        rank.collect([drawn(1, 3, 9, 9)])
    assert small.training
    assert not small.stem._forward_hooks
    small.idle = nn.Conv2d(3, 3, 1).double()
    with pytest.raises(ValueError, match=r"idle.*did not run"):
        BetaRank(small).collect([drawn(2, 3, 9, 9)])


def test_bad_maps() -> None:
    with pytest.raises(ValueError, match="maps="):
        hrank(torch.ones(3, 4, 4))
    with pytest.raises(ValueError, match="positions=0"):
        l1_rank(torch.ones(3, 4, 4), 0)
