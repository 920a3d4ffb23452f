"""FFDNN: the network written out, its explanation, its input and its scores."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.ops.harness import randomise
from torchconv import weights
from torchconv.models import create_model
from torchconv.models.forecast.ffdnn import FFDNN, FourierLocalBlock, ffdnn_small
from torchconv.models.forecast.ffdnn_input import IndexSeries, resample_series
from torchconv.models.forecast.ffdnn_scores import map_accuracy
from torchconv.ops.ffdnn_capsules import MarginLoss, squash
from torchconv.ops.ffdnn_series import vegetation_index
from torchconv.surgery.merging import merge

BANDS = ("B3", "B4", "B5", "B8", "B8A")


def build(**options: Any) -> Any:
    torch.manual_seed(0)
    return randomise(ffdnn_small(**options)).eval()


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_sizes() -> None:
    assert sum(p.numel() for p in create_model("ffdnn_small").parameters()) == 5_880
    bins, width, length = 13, 16, 24
    for kernel, filters in (("fourier", 2 * 2 * width * bins), ("unit", 4 * 2 * width + 4 * width)):
        net = FFDNN(kernel=kernel, num_classes=5)
        rest = (2 * 3 + 1) * width + 4 * width + (2 * width + 1) * 8 + length * 5 * 8 * 8
        assert sum(p.numel() for p in net.parameters()) == filters + rest, kernel


@pytest.mark.parametrize("iterations", [1, 3])
def test_network_by_hand(iterations: int) -> None:
    net, x = build(iterations=iterations, length=15).double(), noise(4, 2, 15).double()
    block, capsules = net.blocks[0], net.capsules
    kernel = torch.complex(*block.fourier.weight().unbind(-1))
    far = torch.fft.irfft(torch.einsum("bif,iof->bof", torch.fft.rfft(x), kernel), n=15)
    near = F.conv1d(x, block.local.weight, block.local.bias, padding=1)
    h = F.relu(block.norm(torch.cat([far, near], 1))).transpose(1, 2)
    u = squash(capsules.primary(h))
    votes = torch.einsum("ijnm,bin->bijm", capsules.routing.weight, u)
    b = torch.zeros(4, 15, 3, dtype=torch.float64)
    for _ in range(iterations):
        c = b.softmax(2)
        v = squash((c[..., None] * votes).sum(1))
        b = b + (votes * v[:, None]).sum(3)
    torch.testing.assert_close(net(x), v.norm(dim=2))
    found = net.explain(x)
    torch.testing.assert_close(found.scores, net(x))
    torch.testing.assert_close(found.capsules, v)
    torch.testing.assert_close(found.coupling, c)
    torch.testing.assert_close(found.dates, u.norm(dim=2))
    torch.testing.assert_close(found.spectrum, kernel.abs())
    torch.testing.assert_close(found.coupling.sum(2), torch.ones(4, 15, dtype=torch.float64))
    assert ((net(x) >= 0) & (net(x) < 1)).all()


def test_padding_parts_the_end_from_the_start() -> None:
    x = noise(2, 3, 12)
    turned = x.roll(3, -1)
    circular, open_ended = (randomise(FourierLocalBlock(3, 4, 12, padding=p)).eval() for p in (0, 12))
    far = [block.fourier(F.pad(x, (p, p)))[..., p : p + 12] for block, p in ((circular, 0), (open_ended, 12))]
    for block, y in zip((circular, open_ended), far, strict=True):
        assert torch.equal(block(x)[:, :4], F.relu(block.norm(torch.cat([y, block.local(x)], 1)))[:, :4])
    torch.testing.assert_close(circular(turned)[:, :4], circular(x)[:, :4].roll(3, -1))
    assert not torch.allclose(open_ended(turned)[:, :4], open_ended(x)[:, :4].roll(3, -1), atol=1e-2)
    for mode in ("reflect", "replicate"):
        block = FourierLocalBlock(3, 4, 12, padding=5, padding_mode=mode).eval()
        expected = block.fourier(F.pad(x, (5, 5), mode=mode))[..., 5:17]
        torch.testing.assert_close(block(x)[:, :4], F.relu(block.norm(torch.cat([expected, block.local(x)], 1)))[:, :4])


def test_band_and_depth() -> None:
    net = build(band=(2, 5), depth=2, local_size=5)
    spectrum = net.explain(noise(1, 2, 24)).spectrum
    assert spectrum.shape == (2, 16, 13)
    assert (spectrum[..., 2:6] > 0).all()
    assert spectrum[..., :2].abs().max() == spectrum[..., 6:].abs().max() == 0
    assert net.blocks[1].in_channels == 32
    assert build(kernel="unit").explain(noise(1, 2, 24)).spectrum is None


@pytest.mark.parametrize("kernel", ["fourier", "unit"])
def test_network_everywhere(kernel: str, tmp_path: Path) -> None:
    net, x = build(kernel=kernel, depth=2, padding=2), noise(3, 2, 24)
    expected = net(x)
    assert torch.equal(copy.deepcopy(net)(x), expected)
    weights.save(net, tmp_path / "net")
    again: Any = weights.load(tmp_path / "net")
    assert torch.equal(again(x), expected)
    torch.testing.assert_close(merge(net, x)(x), expected, rtol=1e-5, atol=1e-5)
    if kernel == "fourier":
        program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
        torch.testing.assert_close(program.module()(x[:2]), expected[:2])
    half = copy.deepcopy(net).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.1, atol=0.05)
    assert net(x[:0]).shape == (0, 3)
    scores = net.explain(x[:0])
    assert scores.coupling.shape == (0, 24, 3)


def test_training_lowers_the_loss() -> None:
    net, x = build().train(), noise(30, 2, 24)
    label = torch.arange(30) % 3
    loss_of, optimiser = MarginLoss(), torch.optim.Adam(net.parameters(), 3e-3)
    losses = []
    for _ in range(15):
        loss = loss_of(net(x), label)
        optimiser.zero_grad()
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in net.parameters())
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_resampling_is_numpys_interpolation() -> None:
    days = np.array([0.0, 3, 10, 11, 25, 40, 41])
    x = noise(4, 2, 7).double()
    x[torch.rand(x.shape, generator=torch.Generator().manual_seed(3)) < 0.3] = torch.nan
    x[0, 0, 0] = x[1, 1, -1] = torch.nan  # no observation at an end
    x[2, 1] = torch.nan
    x[3, 0, :] = torch.nan
    x[3, 0, 4] = 1.5
    found = resample_series(x, 11, torch.from_numpy(days))
    steps = np.linspace(0, 41, 11)
    for i in range(4):
        for j in range(2):
            series = x[i, j].numpy()
            seen = ~np.isnan(series)
            expected = np.interp(steps, days[seen], series[seen]) if seen.any() else np.full(11, np.nan)
            np.testing.assert_allclose(found[i, j].numpy(), expected, rtol=1e-9, atol=1e-12)
    whole = noise(3, 24)
    torch.testing.assert_close(resample_series(whole, 24), whole)
    assert resample_series(whole, 1).shape == (3, 1)
    for bad, match in (([0, 1], "days"), (list(range(23, -1, -1)), "days")):
        with pytest.raises(ValueError, match=match):
            resample_series(whole, 24, bad)
    with pytest.raises(ValueError, match="observations"):
        resample_series(whole[:, :0], 4)


def test_indices_are_standardised() -> None:
    x = 0.05 + 0.4 * torch.rand(40, 5, 9, generator=torch.Generator().manual_seed(0))
    front = IndexSeries(BANDS, soil_slope=1.2)
    y = front.fit(x)(x)
    assert y.shape == (40, 2, 9)
    torch.testing.assert_close(y.mean((0, 2)), torch.zeros(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(y.std((0, 2), correction=0), torch.ones(2))
    named = {band: x[:, i] for i, band in enumerate(BANDS)}
    lai = vegetation_index("lai_clair", named, soil_slope=1.2)
    torch.testing.assert_close(y[:, 0], (lai - lai.mean()) / lai.std(correction=0))
    clouded = x.clone()
    clouded[3:, :, 4] = torch.nan
    gaps = IndexSeries(BANDS).fit(clouded)
    assert torch.isfinite(gaps.mean).all()
    filled = gaps.raw(clouded)
    torch.testing.assert_close(filled[3:, :, 4], (filled[3:, :, 3] + filled[3:, :, 5]) / 2)
    shadow = x.clone()
    shadow[0, :, 0] = 0  # near infrared and red alike: a quotient by 0
    shadow[1] = 0
    found = front(shadow)
    torch.testing.assert_close(found[0, 1, 0], found[0, 1, 1])
    assert torch.isfinite(found[:, 0]).all()
    assert found[1, 1].isnan().all()
    days = torch.tensor([0.0, 5, 10, 20, 30, 40, 50, 60, 80])
    resampled = IndexSeries(BANDS, 24, soil_slope=1.2).fit(x, days)(x, days)
    assert resampled.shape == (40, 2, 24)
    torch.testing.assert_close(resampled.mean((0, 2)), torch.zeros(2), rtol=0, atol=1e-5)
    twin = IndexSeries(BANDS, soil_slope=1.2)
    twin.load_state_dict(front.state_dict())
    assert torch.equal(nn.Sequential(twin, build(length=9))(x), nn.Sequential(front, build(length=9))(x))
    landsat = IndexSeries(("SR_B4", "SR_B5"), None, ("ndvi",), {"red": "SR_B4", "nir": "SR_B5"})
    torch.testing.assert_close(landsat(x[:, 1:4:2])[:, 0], vegetation_index("ndvi", named))


def test_accuracies_by_hand() -> None:
    scores = noise(90, 4)
    label = torch.where(noise(90, seed=2) > 0, scores.argmax(1), torch.arange(90) % 4)
    found = map_accuracy(scores, label)
    prediction = scores.argmax(1)
    table = torch.zeros(4, 4)
    for truth, said in zip(label.tolist(), prediction.tolist(), strict=True):
        table[truth, said] += 1
    right, rows, columns = table.diagonal(), table.sum(1), table.sum(0)
    chance = float((rows * columns).sum()) / 90**2
    agreement = float((prediction == label).float().mean())
    assert torch.equal(found["confusion"].float(), table)
    assert abs(float(found["accuracy"]) - agreement) < 1e-6
    assert abs(float(found["kappa"]) - (agreement - chance) / (1 - chance)) < 1e-6
    torch.testing.assert_close(found["users"], right / columns)
    torch.testing.assert_close(found["producers"], right / rows)
    for name, value in map_accuracy(prediction, label, 4).items():
        assert torch.equal(value, found[name]), name
    absent = map_accuracy(torch.tensor([0, 0]), torch.tensor([1, 0]), 3)
    assert absent["users"].isnan().tolist() == [False, True, True]
    assert absent["producers"].isnan().tolist() == [False, False, True]
    for call, match in (
        (lambda: map_accuracy(prediction, label), "num_classes=None"),
        (lambda: map_accuracy(scores, label, 5), "num_classes=5"),
        (lambda: map_accuracy(prediction, label[:3], 4), "label"),
        (lambda: map_accuracy(prediction, label, 3), "prediction"),
        (lambda: map_accuracy(prediction, label.float(), 4), "label"),
        (lambda: map_accuracy(scores[:0], label[:0]), "an item or more"),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def test_refusals() -> None:
    for options, match in (
        ({"kernel": "wavelet"}, "kernel"),
        ({"kernel": "unit", "band": (1, 3)}, "band"),
        ({"local_size": 4}, "local_size"),
        ({"padding": 24, "padding_mode": "reflect"}, "padding=24"),
        ({"padding_mode": "circular"}, "padding_mode"),
        ({"padding": -1}, "padding"),
        ({"num_classes": 0}, "num_classes"),
        ({"depth": 0}, "depth"),
        ({"band": (3, 14)}, "band"),
        ({"iterations": 0}, "iterations"),
    ):
        with pytest.raises(ValueError, match=match):
            FFDNN(**options)  # type: ignore[arg-type]
    for x, match in ((noise(1, 3, 24), "expected"), (noise(1, 2, 20), "24 steps"), (noise(2, 24), "expected")):
        with pytest.raises(ValueError, match=match):
            build()(x)
    for call, match in (
        (lambda: IndexSeries(("B4",)), "needs B8A"),
        (lambda: IndexSeries(BANDS, indices=("ndwi",)), "indices"),
        (lambda: IndexSeries(BANDS, indices=()), "indices"),
        (lambda: IndexSeries(("B4", "B4")), "twice"),
        (lambda: IndexSeries(BANDS, 0), "length"),
        (lambda: IndexSeries(BANDS, band_map={"Red": "B4"}), "band_map"),
        (lambda: IndexSeries(BANDS)(torch.rand(1, 4, 24)), "expected"),
        (lambda: IndexSeries(BANDS).fit(torch.full((1, 5, 3), torch.nan)), "no observation"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
