"""Other signals as images: what the definitions imply, brute force for the projection, and refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchconv.models.classify.unireplknet_points import (
    VIEW_ANGLES,
    PointProjection,
    nearest,
    rotation_matrices,
    splat_cells,
)
from torchconv.models.classify.unireplknet_series import (
    TIME_FEATURES,
    StationEmbedding,
    decompose_series,
    map_to_tokens,
    series_to_image,
    sinusoids,
    spectrogram_to_image,
    standardise,
    video_to_image,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_video_is_a_view_of_the_memory() -> None:
    frames, height, width = 16, 3, 5
    x = torch.arange(2 * 2 * frames * height * width).reshape(2, 2, frames, height, width)
    y = video_to_image(x)
    for t in range(frames):
        for h in range(height):
            for w in range(width):
                at = t * height * width + h * width + w
                assert y[1, 1, at // (4 * width), at % (4 * width)] == x[1, 1, t, h, w]
    assert y.shape == (2, 2, 4 * height, 4 * width)


def test_decomposition_adds_up_and_averages() -> None:
    x = torch.randn(2, 9, 3, dtype=torch.float64)
    seasonal, trend = decompose_series(x, 5)
    torch.testing.assert_close(seasonal + trend, x)
    edged = torch.cat((x[:, :1], x[:, :1], x, x[:, -1:], x[:, -1:]), 1)
    torch.testing.assert_close(trend, torch.stack([edged[:, i : i + 5].mean(1) for i in range(9)], 1))
    assert decompose_series(torch.full((1, 30, 2), 0.3))[0].abs().max() < 1e-6
    assert torch.equal(decompose_series(x, 1)[0], torch.zeros_like(x))
    with pytest.raises(ValueError, match="kernel_size=4"):
        decompose_series(x, 4)


@pytest.mark.parametrize("embed_type", ["fixed", "learned", "timeF"])
@pytest.mark.parametrize("freq", TIME_FEATURES)
def test_station_embedding_is_a_sum(embed_type: str, freq: str) -> None:
    nodes, length, width = 3, 4, 6
    table = torch.randn(2 * nodes, 3, dtype=torch.float64) * 20
    module = StationEmbedding(2, width, table, nodes, embed_type, freq).eval()
    x = torch.randn(2 * nodes, length, 2)
    if embed_type == "timeF":
        mark = torch.randn(2 * nodes, length, TIME_FEATURES[freq])
        time = mark @ module.temporal_embedding.embed.weight.T
    else:
        columns = ["month", "day", "weekday", "hour", *(["minute"] if freq == "t" else [])]
        mark = torch.randint(0, 4, (2 * nodes, length, len(columns)))
        tables = {n.split("_")[0]: p for n, p in module.temporal_embedding.named_parameters()}
        assert set(tables) == set(columns)
        assert all(p.requires_grad == (embed_type == "learned") for p in tables.values())
        time = torch.stack([tables[c][mark[..., i]] for i, c in enumerate(columns)]).sum(0)
    around = torch.cat((x[:, -1:], x, x[:, :1]), 1)
    taps = module.value_embedding.tokenConv.weight
    value = torch.stack([torch.einsum("nkc,dck->nd", around[:, i : i + 3], taps) for i in range(length)], 1)
    place = ((table - table.mean(0)) / table.std(0, unbiased=False)).float().reshape(nodes, 6)
    where = module.national_embedding.location_embedding(place)
    expected = value + time + where.repeat(2, 1)[:, None]
    torch.testing.assert_close(module(x, mark), expected, rtol=1e-4, atol=1e-5)


def test_tables_and_standardising() -> None:
    table = sinusoids(4, 6)
    for i in range(3):
        angle = 3 * 10000 ** (-2 * i / 6)
        assert table[3, 2 * i : 2 * i + 2].tolist() == pytest.approx([math.sin(angle), math.cos(angle)], abs=1e-6)
    assert sinusoids(3, 5).shape == (3, 5)
    assert torch.equal(standardise(torch.full((4, 2), 0.1)), torch.zeros(4, 2, dtype=torch.float64))


def test_series_and_spectrograms_become_images_and_back() -> None:
    tokens = torch.arange(2 * 4 * 9.0).reshape(2, 4, 9)
    image = series_to_image(tokens)
    assert image.shape == (2, 1, 6, 6)
    assert torch.equal(image.flatten(1), tokens.flatten(1))
    assert map_to_tokens(torch.randn(2, 768, 6, 6)).shape == (2, 36, 768)
    bands = torch.randn(2, 10, 4)
    assert torch.equal(spectrogram_to_image(bands, 6, 1.0, 2.0), ((bands[:, :6] - 1) / 4).transpose(1, 2)[:, None])
    assert spectrogram_to_image(bands, 16, 0.0, 0.5)[..., 10:].abs().max() == 0
    with pytest.raises(ValueError, match="square"):
        series_to_image(tokens[:, :3])
    with pytest.raises(ValueError, match="square"):
        video_to_image(torch.zeros(1, 3, 8, 4, 4))


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("embed_type", {"embed_type": "fix"}),
        ("freq", {"freq": "q"}),
        ("node_num", {"node_num": 4}),
        ("stations", {"stations": torch.zeros(6, 2)}),
        ("d_model", {"d_model": 0}),
    ],
)
def test_station_refusals(argument: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{argument}="):
        StationEmbedding(**{"c_in": 2, "d_model": 4, "stations": torch.randn(6, 3), "node_num": 3, **options})


def test_rotations_are_rotations() -> None:
    r = rotation_matrices(torch.tensor(VIEW_ANGLES, dtype=torch.float64))
    torch.testing.assert_close(r @ r.transpose(1, 2), torch.eye(3, dtype=torch.float64).expand(10, 3, 3))
    torch.testing.assert_close(torch.linalg.det(r), torch.ones(10, dtype=torch.float64))
    quarter = rotation_matrices(torch.tensor([[0.0, 0.0, math.pi / 2]]))[0]
    torch.testing.assert_close(quarter @ torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 1, 0]), atol=1e-6, rtol=0)


def test_nearest_points_are_nearest() -> None:
    points = torch.rand(2, 12, 3, dtype=torch.float64)
    expected = torch.cdist(points, points).argsort(-1)[..., :5].sort(-1).values
    assert torch.equal(nearest(points, 5).sort(-1).values, expected)


def projected_by_loops(module: PointProjection, points: Tensor) -> Tensor:
    """The splatted grid, point by point."""
    features = module.point_features(points).detach()
    views = module.view_points(points)
    size = module.obj_size
    grid = torch.zeros(len(views), features.shape[1], size, size)
    for n, cloud in enumerate(views):
        xy = cloud[:, :2]
        step = (xy.amax(0) - xy.amin(0)).max() / (size - 3)
        cell = torch.floor((xy - xy.amin(0)) / step).long() + 1
        around = [c + torch.tensor([dx, dy]) for c in cell for dx in (-1, 0, 1) for dy in (-1, 0, 1)]
        covered = torch.stack(around)
        shift = size // 2 - (covered.amax(0) + covered.amin(0)) // 2 - 1
        for i, c in enumerate(cell):
            x, y = (c + shift).tolist()
            grid[n, :, x - 1 : x + 2, y - 1 : y + 2] += features[n // module.num_views, :, i, None, None]
    return grid


def test_projection_against_loops() -> None:
    module = PointProjection(4, 3, 8, 20, 14, 5).eval()
    points = torch.rand(2, 15, 3) * torch.tensor([1.0, 2.0, 0.5])
    features, views = module.point_features(points), module.view_points(points)
    torch.testing.assert_close(module.splat(features, views), projected_by_loops(module, points))
    assert module(points).shape == (10, 3, 20, 20)


@pytest.mark.parametrize("fusion", [False, True])
def test_projection_gradients_reach_every_parameter(fusion: bool) -> None:
    module = PointProjection(3, 2, 4, 14, 10, 2, atten_fusion=fusion)
    module(torch.rand(2, 10, 3)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_points_in_one_place_stay_in_the_grid() -> None:
    cells = splat_cells(torch.ones(1, 4, 3), 8)
    assert cells.unique().numel() == 1
    assert 0 <= cells.min() <= cells.max() < 64


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("graph_dim", {"graph_dim": 6}),
        ("obj_size", {"obj_size": 13}),
        ("img_size", {"img_size": 15}),
        ("img_size", {"img_size": 12}),
        ("num_views", {"num_views": 11}),
        ("local_size", {"local_size": 0}),
    ],
)
def test_projection_refusals(argument: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{argument}="):
        PointProjection(**{"local_size": 4, "trans_dim": 2, "graph_dim": 8, "img_size": 16, "obj_size": 14, **options})


def test_too_few_points_and_wrong_shapes() -> None:
    module = PointProjection(8, 2, 4, 10, 10, 1)
    with pytest.raises(ValueError, match="local_size=8"):
        module(torch.rand(1, 7, 3))
    with pytest.raises(ValueError, match="points of shape"):
        module(torch.rand(1, 9, 2))
    stations = StationEmbedding(2, 4, torch.randn(3, 3), 3)
    with pytest.raises(ValueError, match="multiple of 3 nodes"):
        stations(torch.randn(4, 5, 2), torch.zeros(4, 5, 4))
    with pytest.raises(ValueError, match="4 columns"):
        stations(torch.randn(3, 5, 2), torch.zeros(3, 5, 2))
    assert isinstance(stations.dropout, nn.Dropout)


def test_no_clouds_give_no_images() -> None:
    projection = PointProjection(local_size=2, trans_dim=2, graph_dim=4, img_size=8, obj_size=8, num_views=2).eval()
    assert projection(torch.zeros(0, 5, 3)).shape == (0, 3, 8, 8)


def test_series_that_do_not_fit() -> None:
    x, mark = torch.zeros(4, 5, 2), torch.zeros(4, 5, 4)
    for kind in ("fixed", "timeF"):
        embedding = StationEmbedding(2, 4, torch.randn(2, 3), 2, embed_type=kind)
        for wrong in (torch.zeros(5, 2), torch.zeros(4, 0, 2), torch.zeros(4, 5, 3)):
            with pytest.raises(ValueError, match="x of shape"):
                embedding(wrong, mark)
        for other in (mark[:, :4], mark[..., :3], mark[0]):
            with pytest.raises(ValueError, match="x_mark of shape"):
                embedding(x, other)
    flat = torch.zeros(4, 4)
    for name, call in (
        ("x", decompose_series),
        ("tokens", series_to_image),
        ("features", map_to_tokens),
        ("spectrogram", lambda t: spectrogram_to_image(t, 8)),
    ):
        with pytest.raises(ValueError, match=rf"{name}=\(4, 4\)"):
            call(flat)
