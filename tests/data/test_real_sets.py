"""The sets a user has under $TORCHCONV_DATA: published sizes, statistics and class counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from torchconv.data import load, normalise


def folder(real: Path, name: str) -> Path:
    if not (real / name).exists():
        pytest.skip(f"$TORCHCONV_DATA has no {name}")
    return real


def test_fashion_mnist(real: Path) -> None:
    data = load("fashion-mnist", root=folder(real, "fashion_mnist"))
    assert (len(data.train), len(data.val), len(data.test)) == (51000, 9000, 10000)
    assert torch.bincount(data.train.y).tolist() == [5100] * 10
    assert data.mean == pytest.approx((0.2860,), abs=5e-4)
    assert data.std == pytest.approx((0.3530,), abs=5e-4)
    small = load("fashion-mnist", root=real / "fashion_mnist", limit=1000, image_size=14)
    assert small.train.x.shape == (1000, 1, 14, 14)
    assert len(small.test) == 500


def test_cifar10_jpeg(real: Path) -> None:
    data = load("cifar10", root=folder(real, "cifar10_jpeg"))
    if "jpeg" not in data.warnings[0]:
        pytest.skip("$TORCHCONV_DATA has the binary version, which comes first")
    assert (len(data.train), len(data.val), len(data.test)) == (8500, 1500, 2000)
    assert torch.bincount(data.test.y).tolist() == [200] * 10
    assert data.mean == pytest.approx((0.491, 0.482, 0.447), abs=5e-3)


def test_cifar10_lossless(real: Path) -> None:
    data = load("cifar10", root=folder(real, "cifar10_lossless") / "cifar10_lossless")
    assert (len(data.train), len(data.val), len(data.test)) == (3400, 600, 100)
    assert torch.bincount(torch.cat([data.train.y, data.val.y])).tolist() == [
        396, 366, 420, 384, 422, 393, 414, 385, 407, 413,
    ]  # fmt: skip
    same = load(str(real / "cifar10_lossless" / "cifar10_lossless_4k.npz"))
    assert torch.equal(same.test.x, data.test.x)


@pytest.mark.parametrize(
    ("name", "train", "test", "channels", "length", "classes"),
    [
        ("GunPoint", 50, 150, 1, 150, 2),
        ("BasicMotions", 40, 40, 6, 100, 4),
        ("ItalyPowerDemand", 67, 1029, 1, 24, 2),
        ("JapaneseVowels", 270, 370, 12, 26, 9),
        ("PickupGestureWiimoteZ", 50, 50, 1, 361, 10),
        ("OliveOil", 30, 30, 1, 570, 4),
        ("FaceFour", 24, 88, 1, 350, 4),
        ("SyntheticControl", 300, 300, 1, 60, 6),
    ],
)
def test_ucr(real: Path, name: str, train: int, test: int, channels: int, length: int, classes: int) -> None:
    data = load(name, root=folder(real, "ucr_uea"))
    assert (len(data.train) + len(data.val), len(data.test)) == (train, test)
    assert (data.channels, data.size, data.num_classes, data.kind) == (channels, (length,), classes, "series")
    assert torch.isfinite(data.train.x).all()


def test_ucr_nearest_neighbour_accuracy_is_the_published_one(real: Path) -> None:
    data = load("GunPoint", root=folder(real, "ucr_uea"))
    x, y = torch.cat([data.train.x, data.val.x]), torch.cat([data.train.y, data.val.y])
    found = y[torch.cdist(data.test.x.flatten(1), x.flatten(1)).argmin(1)]
    assert (found == data.test.y).double().mean() == pytest.approx(0.913, abs=5e-4)
    assert normalise(data.train.x, data.mean, data.std).std() == pytest.approx(1, abs=1e-3)


def test_regression_is_refused(real: Path) -> None:
    with pytest.raises(ValueError, match="a regression problem"):
        load("Covid3Month", root=folder(real, "ucr_uea"))
