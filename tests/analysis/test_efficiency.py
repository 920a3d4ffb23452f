"""Waterline and efficiency: closed forms against what runs, bounds, blocks, pictures."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from torchconv.analysis import _waterline_kernels, efficiency
from torchconv.analysis.ceiling import cache_bytes
from torchconv.analysis.count import count
from torchconv.analysis.efficiency import Timed, block_times, blocks_of, efficiency_gap, gap_figure, section, timed
from torchconv.analysis.waterline import (
    Kernel,
    Machine,
    Waterline,
    block_kernels,
    conv2d_stats,
    fuse,
    trace,
    waterline,
)
from torchconv.ops.convfirst import ConvFirst, FusedMBConv, MBConv
from torchconv.ops.convfirst_stack import ConvNeXt

ROOF = Machine(ops=312e12, bandwidth=2.039e12)
BLOCKS = {"convfirst": ConvFirst, "mbconv": MBConv, "convnext": ConvNeXt, "fusedmbconv": FusedMBConv}


def meta(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta")


def test_a_published_design_point() -> None:
    """N 64, 56 × 56, 64 channels, expansion 4, half precision: what fusion brings on a machine of 153 op/byte."""
    expected = {"convfirst": 0.294, "mbconv": 0.275, "convnext": 0.282, "fusedmbconv": 0.794}
    for kind, attainable in expected.items():
        kernels = block_kernels(kind, 64, 56, 56, 64)
        assert Waterline(tuple(kernels), ROOF).attainable == pytest.approx(attainable, abs=5e-4)
        one = fuse(kernels, 2 * 2 * 64 * 56 * 56 * 64)
        assert Waterline((one,), ROOF).attainable == 1
    macs = {kind: sum(k.macs for k in block_kernels(kind, 64, 56, 56, 64)) / 1e9 for kind in expected}
    assert (round(macs["convfirst"], 2), round(macs["mbconv"], 2)) == (7.5, 10.28)


@pytest.mark.parametrize("kind", BLOCKS)
def test_traced_kernels_are_the_closed_forms(kind: str) -> None:
    n, h, w, c = 2, 9, 8, 16
    block = BLOCKS[kind](c, c, device="meta")
    found, expected = trace(block, meta(n, c, h, w)).kernels, block_kernels(kind, n, h, w, c, unit=4)
    biases = [16, 64, 16] if kind == "convnext" else [0, 0, 0]
    for k, e, bias in zip(found, expected, biases, strict=False):
        assert (k.ops, k.bytes - 4 * bias, k.weights - 4 * bias) == (e.ops, e.bytes, e.weights)
    assert len(found) == len(expected)
    (whole,) = trace(nn.Sequential(block), meta(n, c, h, w)).fused(["0"])
    assert whole.bytes == 4 * (2 * n * h * w * c) + sum(k.weights for k in found)
    assert whole.ops == sum(k.ops for k in found)


def test_operations_are_those_of_torch() -> None:
    timm = pytest.importorskip("timm")
    for name in ("mobilenetv3_small_050", "test_convnext"):
        net, x = timm.create_model(name).eval(), torch.randn(1, 3, 64, 64)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(x)
        kernels = trace(net, x).kernels
        assert sum(k.ops for k in kernels) == counter.get_total_flops() == 2 * count(net, x).macs
        assert all(k.weights <= k.read for k in kernels)


def test_eager_counts_what_an_engine_would_fuse() -> None:
    net = nn.Sequential(nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    kernels = trace(net, torch.randn(2, 4, 5, 5), eager=True).kernels
    size, parameters = 4 * 2 * 25, 4 * 4 * 8
    assert [k.name for k in kernels] == ["0", "1", "2"]
    assert kernels[0].bytes == size * (4 + 8) + 4 * 32
    assert kernels[1].bytes == size * (8 + 8) + parameters
    assert kernels[2].bytes == size * (8 + 8)
    assert len(trace(net, torch.randn(2, 4, 5, 5)).kernels) == 1


def test_bytes_of_maps_that_are_read_again() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 4, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            y = y * torch.sigmoid(y)  # still at hand
            z: Tensor = self.b(y)
            return F.relu(z + y) + x  # both are fetched

    first, second = trace(Net(), meta(1, 4, 6, 6)).kernels
    size, weights = 4 * 4 * 36, 4 * 16
    assert (first.read, first.written) == (size + weights, size)
    assert (second.read, second.written) == (3 * size + weights, size)


@settings(max_examples=60, deadline=None)
@given(
    kernels=st.lists(st.tuples(st.floats(1, 1e12), st.floats(1, 1e9)), min_size=1, max_size=6),
    peak=st.floats(1e9, 1e15),
    bandwidth=st.floats(1e8, 1e13),
)
def test_bounds(kernels: list[tuple[float, float]], peak: float, bandwidth: float) -> None:
    roof = Machine(peak, bandwidth)
    made = [Kernel("", ops, moved / 2, moved / 2) for ops, moved in kernels]
    line = Waterline(tuple(made), roof)
    for k in made:
        assert k.time(roof) == pytest.approx(k.bytes / bandwidth * max(1, k.intensity / roof.waterline))
    assert 0 < line.attainable <= 1 + 1e-12
    assert line.overlapped <= line.serial * (1 + 1e-12)
    twice = Waterline(tuple(made), Machine(2 * peak, 2 * bandwidth))
    assert twice.serial == pytest.approx(line.serial / 2)
    assert twice.attainable == pytest.approx(line.attainable)
    boundary = made[0].read + made[-1].written
    assert Waterline((fuse(made, boundary),), roof).serial <= line.serial * (1 + 1e-12)
    share = line.under_water
    assert 0 <= share["ops"] <= 1 + 1e-12
    assert share["time"] >= share["ops"] - 1e-9


def test_splitting_a_kernel_bound_by_arithmetic_costs_nothing() -> None:
    whole = [block_kernels("fusedmbconv", n, 56, 56, 64)[0] for n in (8, 4)]
    assert whole[0].intensity > ROOF.waterline
    assert 2 * whole[1].time(ROOF) == pytest.approx(whole[0].time(ROOF))


def test_measured_times_and_levels() -> None:
    line = waterline(block_kernels("convfirst", 1, 8, 8, 16), machine=Machine(1e9, 1e9), measured=1e-2)
    assert line.efficiency == pytest.approx(line.ideal / 1e-2)
    assert line.level == pytest.approx(sum(k.ops for k in line.kernels) / sum(k.bytes for k in line.kernels))
    assert [row["bound by"] for row in line.rows()] == ["arithmetic"] * 3
    assert waterline(line.kernels, machine=line.machine).efficiency is None
    empty = Waterline((), ROOF)
    assert (empty.attainable, empty.level, empty.under_water) == (1.0, math.inf, {"ops": 0.0, "time": 0.0})


def test_statistics_of_a_convolution() -> None:
    """Against the operator itself where the padding keeps the map, and the author's conventions elsewhere."""
    found = conv2d_stats(2, 24, 7, 9, (5, 3), (2, 1), bias=True, unit=4)
    conv = nn.Conv2d(24, 24, (5, 3), padding=(2, 1), groups=3, device="meta")
    (ran,) = trace(conv, meta(2, 24, 7, 9)).kernels
    assert (found.read, found.written, found.weights) == (ran.read, ran.written, ran.weights)
    assert found.ops == ran.ops + 2 * 24 * 7 * 9  # the bias
    assert conv2d_stats(1, 16, 11, 5, padding=0, what="grad_weight").macs == 16 * 11 * 5 * 8 * 9
    assert conv2d_stats(1, 16, 11, 5, padding=0, bias=True, what="grad_bias").written == 2 * 16
    for options, name in (
        ({"what": "grad"}, "what='grad'"),
        ({"group_width": 5}, "group_width=5"),
        ({"kernel_size": 9, "padding": 0}, "kernel_size=9"),
        ({"padding": -1}, "padding=-1"),
    ):
        with pytest.raises(ValueError, match=name):
            conv2d_stats(1, 16, 5, 5, **options)  # type: ignore[arg-type]


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="kind='resnet'"):
        block_kernels("resnet", 1, 1, 1, 1)
    with pytest.raises(ValueError, match="bandwidth=0"):
        Machine(1.0, 0)
    with pytest.raises(ValueError, match="blocks='nowhere'"):
        waterline(nn.Conv2d(1, 1, 1), torch.zeros(1, 1, 2, 2), machine=ROOF, blocks=["nowhere"])
    with pytest.raises(ValueError, match="inputs"):
        waterline([Kernel("", 1, 1, 1)], 3, machine=ROOF)
    with pytest.raises(ValueError, match="peak=0"):
        efficiency_gap([], 0)
    with pytest.raises(ValueError, match="net: must be positive"):
        efficiency_gap([Timed("net", 1, 0)], 1)
    with pytest.raises(ValueError, match="repeats"):
        block_times(nn.Conv2d(1, 1, 1), torch.zeros(1, 1, 2, 2), 0)
    with pytest.raises(ValueError, match="x="):
        timed("net", nn.Conv2d(1, 1, 1), torch.zeros(0, 1, 2, 2))


def test_gap() -> None:
    rows = efficiency_gap([Timed("a", 1e9, 0.1, 0.7), Timed("b", 4e9, 0.1, 0.8), Timed("pool", 0, 0.1, 0.9)], 1e11)
    assert [r["efficiency"] for r in rows] == pytest.approx([0.1, 0.4, 0])
    assert [r["gap"] for r in rows[:2]] == pytest.approx([10, 2.5])
    assert rows[2]["gap"] is None
    pytest.importorskip("matplotlib")
    (graded,) = gap_figure(rows).axes
    assert graded.get_ylabel() == "accuracy"
    assert [t.get_text() for t in graded.texts] == ["a", "b"]
    (listed,) = gap_figure([{**r, "accuracy": None} for r in rows]).axes
    assert [t.get_text() for t in listed.get_yticklabels()] == ["a", "b"]
    found = timed("net", nn.Conv2d(2, 4, 1, bias=False), torch.zeros(3, 2, 5, 5), repeats=2)
    assert found.ops == 2 * 2 * 4 * 25
    assert found.seconds > 0


def test_blocks_of_common_layouts() -> None:
    def block() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())

    stages = nn.Sequential(nn.Sequential(block(), block()), nn.Sequential(block(), nn.ReLU()))
    net = nn.Sequential()
    net.add_module("stem", nn.Conv2d(3, 4, 1))
    net.add_module("stages", stages)
    net.add_module("drop", nn.Dropout())
    net.add_module("head", nn.Linear(4, 2))
    assert blocks_of(net) == ["stem", "stages.0.0", "stages.0.1", "stages.1", "head"]
    assert blocks_of(nn.ReLU()) == []


def test_section_joins_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(efficiency.Machine, "measured", classmethod(lambda cls, *_: Machine(1e11, 1e10)))
    net = nn.Sequential(ConvFirst(16, 16), ConvFirst(16, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    found = section(net.eval(), torch.randn(1, 16, 12, 12))
    rows: dict[str, Any] = {r["block"]: r for r in found.tables["blocks"]}
    assert list(rows) == ["0", "1", "2", "3", "4"]
    closed = block_kernels("convfirst", 1, 12, 12, 16, unit=4)
    assert rows["0"]["MB"] == pytest.approx(sum(k.bytes for k in closed) / 1e6)
    assert rows["0"]["efficiency"] == pytest.approx(sum(k.ops for k in closed) / 1e11 / (rows["0"]["ms"] / 1e3))
    assert rows["0"]["attainable"] < rows["0"]["attainable, fused"] <= 1
    assert rows["2"]["attainable"] is None
    assert found.data["attainable"] <= found.data["attainable_fused"]
    assert len(found.tables["kernels"]) == 7
    assert [p.name for p in found.pictures] == ["efficiency", "gap", "waterline"]
    (axes,) = found.pictures[2].figure.axes
    assert len(axes.patches) == 7
    with pytest.raises(ValueError, match="no parts"):
        section(nn.ReLU(), torch.zeros(1, 1, 2, 2))


def test_the_machine_is_measured_where_the_inputs_are(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, torch.dtype]] = []

    def fake(device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, float]:
        asked.append((device, dtype))
        return {"gflops": 100.0, "gbs": 10.0, "ridge": 10.0}

    monkeypatch.setattr(_waterline_kernels, "ceiling", fake)
    conv = nn.Conv2d(1, 1, 1)
    assert waterline(conv.bfloat16(), torch.zeros(1, 1, 2, 2, dtype=torch.bfloat16)).machine.waterline == 10
    assert waterline(conv.to("meta"), meta(1, 1, 2, 2).bfloat16()).machine.ops == 1e11
    assert asked == [("cpu", torch.bfloat16), ("cpu", torch.float32)]


def test_cache_is_known_or_not() -> None:
    size = cache_bytes()
    assert size is None or size >= 1 << 14
