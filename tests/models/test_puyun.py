"""PuYun's network: its interface, persistence, units, the edges of the globe."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchconv.models import create_model, list_models
from torchconv.models.forecast.puyun import CHANNELS, WINDS, PuYun, pad_state
from torchconv.weights import load, save

TINY: dict[str, Any] = {"dim": 6, "depth": 1, "patch": 2, "kernel_size": 6, "decomposition": 2, "mlp_ratio": 2.0}


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def network(channels: int = 3, seed: int = 0, **options: Any) -> PuYun:
    """With random parameters in double precision, the last layer included."""
    torch.manual_seed(seed)
    net = PuYun(channels, **{**TINY, **options}).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return net.eval()


def test_fields() -> None:
    assert len(CHANNELS) == len(set(CHANNELS)) == 69
    assert CHANNELS[:2] == ("z50", "z100")
    assert CHANNELS[13] == "t50"
    assert CHANNELS[64:] == ("r1000", "2t", "10u", "10v", "msl")
    assert [CHANNELS[i] for i in WINDS if i > 51] == ["10u", "10v"]
    assert len(WINDS) == 28
    assert PuYun(dim=4, depth=0).winds == WINDS


def test_published_interface() -> None:
    assert list_models("puyun*", task="forecast") == ["puyun_toy", "puyun_small", "puyun_base"]
    with torch.device("meta"):
        net = create_model("puyun_base", depth=1)
        y = net(torch.empty(1, 2, 69, 721, 1440), torch.empty(1, 12))
    assert y.shape == (1, 69, 721, 1440)


@pytest.mark.parametrize(("dim", "depth", "patch", "ratio"), [(24, 2, 1, 4), (10, 3, 4, 2)])
def test_parameters(dim: int, depth: int, patch: int, ratio: int) -> None:
    net = PuYun(dim=dim, depth=depth, patch=patch, mlp_ratio=ratio)
    hidden = ratio * dim
    attention = dim * (25 + 49 + 3 * dim + 5)
    mlp = 2 * dim * hidden + dim + hidden * (1 + 9 + 1)
    fields = 69 * patch * patch
    expected = 2 * fields * dim + 13 * dim + dim + depth * (attention + mlp + 6 * dim) + fields * (dim + 1)
    assert sum(p.numel() for p in net.parameters()) == expected


def test_is_the_definition() -> None:
    net = network(mean=[1.0, 2.0, 3.0], std=[0.5, 2.0, 4.0])
    x, time = noise(2, 2, 3, 7, 8), noise(1, 12, seed=1)
    normal = (x - net.mean[:, None, None]) / net.std[:, None, None]
    z = F.conv2d(normal.reshape(2, 6, 7, 8)[:, :, :6], net.embed.weight, net.embed.bias, 2)
    z = net.blocks[0](z + F.linear(time, net.time.weight, net.time.bias)[..., None, None])
    change = F.conv2d(z, net.head.weight, net.head.bias).reshape(2, 3, 2, 2, 3, 4)
    change = change.permute(0, 1, 4, 2, 5, 3).reshape(2, 3, 6, 8)
    change = torch.cat((change, change[:, :, 5:]), 2)
    torch.testing.assert_close(net(x, time), x[:, 1] + net.std[:, None, None] * change)


def test_starts_with_persistence() -> None:
    x = 5e4 + 1e3 * noise(2, 2, 3, 9, 8, dtype=torch.float32)
    assert torch.equal(PuYun(3, **TINY, mean=4e4, std=700.0)(x, torch.randn(2, 12)), x[:, 1])


def test_the_pole_row_follows_the_row_above_it() -> None:
    net = network(margin=0)
    x, time = noise(1, 2, 3, 9, 8), noise(1, 12)
    y, other = x.clone(), x.clone()
    other[:, :, :, 8] += 1
    change = net(y, time) - y[:, 1]
    torch.testing.assert_close(change[:, :, 8], change[:, :, 7])
    torch.testing.assert_close(net(other, time) - other[:, 1], change)
    west = network(padding_mode="zeros")(noise(1, 2, 3, 9, 7), time)
    assert west.shape == (1, 3, 9, 7)


def test_units() -> None:
    """Scaled and shifted fields give the scaled and shifted forecast."""
    net = network()
    x, time = noise(2, 2, 3, 8, 8), noise(2, 12)
    mean, std = torch.tensor([10.0, -3.0, 250.0]).double(), torch.tensor([0.1, 5.0, 1e4]).double()
    other = copy.deepcopy(net)
    other.set_statistics(mean, std)
    scaled = mean[:, None, None] + std[:, None, None] * x
    torch.testing.assert_close(other(scaled, time), mean[:, None, None] + std[:, None, None] * net(x, time))


@pytest.mark.parametrize("margin", [0, 3])
def test_rolled_globe_gives_rolled_forecast(margin: int) -> None:
    x, time = noise(1, 2, 3, 11, 12), noise(1, 12)

    def error(mode: str) -> float:
        net = network(padding_mode=mode, margin=margin)
        return float((net(x.roll(4, 4), time) - net(x, time).roll(4, 3)).detach().abs().max())

    assert error("longitude") < 1e-12
    assert error("sphere") < 1e-12
    assert error("zeros") > 1e-6


@pytest.mark.parametrize("pole_rows", [False, True])
def test_fields_beyond_the_poles(pole_rows: bool) -> None:
    x = noise(2, 3, 5, 8)
    y = pad_state(x, 3, "sphere", [0, 2], pole_rows)
    skip = int(pole_rows)
    for row, column, channel in itertools.product(range(11), range(14), range(3)):
        source, east, sign = row - 3, (column - 3) % 8, 1
        if not 0 <= source <= 4:
            source = -source - 1 + skip if source < 0 else 9 - source - skip
            east, sign = (east + 4) % 8, 1 if channel == 1 else -1
        assert torch.equal(y[:, channel, row, column], sign * x[:, channel, source, east])
    assert torch.equal(pad_state(x, 0, "sphere", [0]), x)


@pytest.mark.parametrize("mode", ["zeros", "longitude"])
def test_fields_beyond_other_edges(mode: str) -> None:
    x = noise(2, 3, 5, 8)
    y = pad_state(x, 2, mode)
    assert torch.equal(y[:, :, 2:-2, 2:-2], x)
    assert y[:, :, :2].abs().max() == y[:, :, -2:].abs().max() == 0
    assert torch.equal(y[:, :, 2:-2, :2], x[:, :, :, -2:] if mode == "longitude" else torch.zeros(2, 3, 5, 2).double())


def test_wind_over_the_pole_is_seen_with_its_sign() -> None:
    """A flow across the pole is one wind: with a margin the network sees it go on."""
    net = network(1, margin=1, patch=1, padding_mode="sphere", pole_rows=False, winds=[0])
    seen = net._patches(torch.cat((torch.ones(1, 2, 1, 6, 4), -torch.ones(1, 2, 1, 6, 4)), 4).double())
    assert torch.equal(seen[:, :, 0], seen[:, :, 1])
    assert net.winds == (0,)


def test_recomputation_changes_nothing() -> None:
    net = network(depth=2).train()
    twin = copy.deepcopy(net)
    twin.set_grad_checkpointing()
    x, time = noise(2, 2, 3, 8, 8), noise(2, 12)
    for each in (net, twin):
        each(x, time).square().sum().backward()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("norm", ["layer", "group", "batch"])
def test_one_step_lowers_the_loss(norm: str) -> None:
    torch.manual_seed(0)
    net = PuYun(3, **TINY, norm=norm)
    x, time, target = (noise(*s, dtype=torch.float32) for s in ((4, 2, 3, 8, 8), (4, 12), (4, 3, 8, 8)))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    losses = []
    for _ in range(3):
        loss = (net(x, time) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[1] < losses[0]


def test_export_with_an_open_batch() -> None:
    net = network(padding_mode="sphere", margin=1).float()
    batch = torch.export.Dim("batch", min=1)
    inputs = (torch.randn(2, 2, 3, 9, 8), torch.randn(2, 12))
    program = torch.export.export(net, inputs, dynamic_shapes=({0: batch}, {0: batch}))
    x, time = torch.randn(5, 2, 3, 9, 8), torch.randn(5, 12)
    torch.testing.assert_close(program.module()(x, time), net(x, time))


def test_half_precision_and_empty_batches() -> None:
    net = network().float()
    x, time = torch.randn(2, 2, 3, 9, 8), torch.randn(2, 12)
    expected = net(x, time)
    y = copy.deepcopy(net).bfloat16()(x.bfloat16(), time)
    assert y.dtype == torch.bfloat16
    assert (y.float() - expected).abs().max() < 0.1 * expected.abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert net(x, time).dtype == torch.float32
    assert net(x[:0], time[:0]).shape == (0, 3, 9, 8)
    torch.testing.assert_close(net.to(memory_format=torch.channels_last)(x, time), expected)


def test_saved_and_built_again(tmp_path: Path) -> None:
    net = create_model("puyun_toy", channels=2, dim=8, depth=1, mean=[1.0, 2.0], std=[3.0, 4.0], padding_mode="sphere")
    torch.nn.init.normal_(net.head.weight)
    x, time = torch.randn(1, 2, 2, 12, 8), torch.randn(1, 12)
    again = load(save(net, tmp_path / "net"))
    assert torch.equal(again.eval()(x, time), net.eval()(x, time))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"channels": 0}, "channels=0"),
        ({"patch": 0}, "patch=0"),
        ({"depth": -1}, "depth=-1"),
        ({"padding_mode": "circular"}, "padding_mode='circular'"),
        ({"norm": "instance"}, "norm='instance'"),
        ({"winds": [3]}, r"winds=\(3,\)"),
        ({"time_features": 0}, "time_features=0"),
        ({"mean": torch.zeros(2)}, r"mean=\(2,\)"),
        ({"std": 0.0}, "std=0.0"),
        ({"drop_path": 1.0}, "drop_path"),
    ],
)
def test_bad_options(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        PuYun(**{"channels": 3, **TINY, "depth": 2, **options})


@pytest.mark.parametrize(
    ("shape", "features", "named"),
    [
        ((1, 2, 4, 8, 8), (1, 12), r"expected \(N, 2, 3, H, W\)"),
        ((1, 3, 8, 8), (1, 12), "expected"),
        ((1, 3, 3, 8, 8), (1, 12), "expected"),
        ((1, 2, 3, 8, 8), (1, 8), r"time=\(1, 8\)"),
        ((1, 2, 3, 8, 7), (1, 12), "multiple of 2 columns"),
        ((1, 2, 3, 1, 8), (1, 12), "holds no patch of 2"),
    ],
)
def test_bad_inputs(shape: tuple[int, ...], features: tuple[int, ...], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        network().float()(torch.zeros(shape), torch.zeros(features))


def test_temperature_is_forecast_better_than_by_persistence() -> None:
    """On ERA5 over the British Isles, six hours ahead, after seconds of training."""
    from torchconv.claims.puyun import WEATHER, _weather

    found = _weather(60)
    if found is None:
        pytest.skip(f"needs weather/{WEATHER} in $TORCHCONV_DATA")
    assert found["network"] < 0.95 * found["persistence"]
