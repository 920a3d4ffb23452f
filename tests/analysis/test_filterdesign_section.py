"""The inspection's section on first filters: designed ones are recognised, random ones are not, images give advice."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchconv.analysis.filterdesign import init, section
from torchconv.analysis.inspection import inspect_model

DIMS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def smooth(count: int = 32, side: int = 24) -> torch.Tensor:
    noise = torch.randn(count, 3, side + 8, side + 8, generator=torch.Generator().manual_seed(0))
    return F.avg_pool2d(noise, 9, stride=1)


@pytest.mark.parametrize("method", ["gabor", "dct"])
def test_designed_filters_are_recognised(method: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(3, 24, 7), nn.Linear(4, 4))
    init(model, method)
    found = section(model, smooth())
    assert found.data["layer"] == "1"
    assert found.data["beyond_chance"] >= 22
    assert found.data["near_copies"] == 0
    rows = found.tables["filters"]
    if method == "dct":  # the same bank, filter by filter
        assert all(r["likeness"] == pytest.approx(1, abs=1e-5) for r in rows)
        assert [r["nearest"] for r in rows[:3]] == ["cosine 0,0", "cosine 0,1", "cosine 1,0"]
    assert found.data["advice"]["filters"] >= 1
    assert f"{found.data['enough']} of this size" in found.verdict
    assert {p.name for p in found.pictures} == {"first-filters", "number-of-filters"}
    assert "at once" not in found.reading
    assert found.level == "good"


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_random_filters_are_not(ndim: int) -> None:
    torch.manual_seed(0)
    layer = DIMS[ndim](3, 200, 7 if ndim < 3 else 3)
    nn.init.normal_(layer.weight)
    found = section(layer)
    assert found.data["beyond_chance"] <= 24  # 10 by chance, whose deviation is 3
    assert found.data["advice"] is None
    assert {p.name for p in found.pictures} == ({"first-filters"} if ndim < 3 else set())


def test_copies_and_dead_filters_are_told() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 12, 5)
    with torch.no_grad():
        layer.weight[1:4] = layer.weight[0]
        layer.weight[4] *= 1e-6
    found = section(layer, torch.randn(8, 3, 16, 16))
    assert (found.data["near_copies"], found.data["dead"]) == (3, 1)
    assert not found.tables["filters"][4]["beyond chance"]
    assert found.level == "bad"
    assert found.data["advice"] is None  # noise asks for nothing
    with torch.no_grad():
        layer.weight.zero_()
    assert section(layer).data["dead"] == 12


def test_it_is_part_of_the_inspection() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    (found,) = inspect_model(model, smooth(), only=("filter-design",)).sections
    assert "first filters (0, 3 × 3)" in found.verdict
    with pytest.raises(ValueError, match="more than one tap"):
        section(nn.Conv2d(3, 4, 1))
