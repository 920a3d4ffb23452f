"""``Dataset``, ``normalise``, ``load``'s arguments and the light import."""

from __future__ import annotations

import doctest
import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import torchconv.data
from torchconv.data import Dataset, Split, dataset, load, normalise
from torchconv.data.source import encode, natural, resize


def split(n: int = 6, shape: tuple[int, ...] = (1, 4), value: float | None = None) -> Split:
    x = (
        torch.rand(n, *shape, generator=torch.Generator().manual_seed(n))
        if value is None
        else torch.full((n, *shape), value)
    )
    return Split(x, torch.arange(n) % 2)


def test_import_brings_neither_torch_nor_pillow() -> None:
    code = "import sys, torchconv.data; print([m for m in ('torch', 'PIL', 'numpy', 'sklearn') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_unknown_attribute() -> None:
    assert set(torchconv.data.__all__) == set(dir(torchconv.data))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        torchconv.data.nothing  # noqa: B018


@pytest.mark.parametrize("name", ["dataset", "loading"])
def test_doctests(name: str) -> None:
    module = importlib.import_module(f"torchconv.data.{name}")
    result = doctest.testmod(module, extraglobs={"load": load})
    assert result.attempted > 0
    assert result.failed == 0


def test_digits() -> None:
    data = load("digits")
    assert (data.kind, data.ndim, data.channels, data.num_classes, data.size) == ("image", 2, 1, 10, (8, 8))
    assert data.train.x.dtype == torch.uint8
    assert data.train.y.dtype == torch.int64
    assert len(data.train) + len(data.val) + len(data.test) == 1797
    assert int(data.train.x.max()) == 255
    z = normalise(data.train.x, data.mean, data.std)
    assert z.mean().abs() < 1e-5
    assert abs(float(z.std(correction=0)) - 1) < 1e-5
    assert all(torch.bincount(s.y, minlength=10).min() > 0 for s in (data.train, data.val, data.test))


def test_same_arguments_same_data_and_other_seed_other_data() -> None:
    assert load("digits").fingerprint == load("digits").fingerprint != load("digits", seed=1).fingerprint


def test_digits_share_no_example_between_splits() -> None:
    data = load("digits")
    rows = torch.cat([s.x.flatten(1) for s in (data.train, data.val, data.test)])
    from sklearn.datasets import load_digits

    every = torch.from_numpy(np.rint(load_digits().data * 255 / 16).astype(np.uint8))
    assert sorted(map(bytes, rows.numpy())) == sorted(map(bytes, every.numpy()))


def test_image_size_scales_images_and_refuses_series(tmp_path: Path) -> None:
    data = load("digits", image_size=16, limit=50)
    assert data.train.x.shape == (50, 1, 16, 16)
    assert data.train.x.dtype == torch.uint8
    path = tmp_path / "series.npz"
    np.savez(path, x=np.random.default_rng(0).normal(size=(20, 30)), y=np.arange(20) % 2)
    with pytest.raises(ValueError, match=r"image_size=16: .* holds no images"):
        load(str(path), image_size=16)


def test_resize_crops_the_centre_of_the_longer_side() -> None:
    x = torch.zeros(1, 1, 4, 12, dtype=torch.uint8)
    x[..., 4:8] = 200
    assert torch.equal(resize(x, 4), torch.full((1, 1, 4, 4), 200, dtype=torch.uint8))
    assert resize(x.float(), 2).dtype == torch.float32
    assert resize(x, 6).shape == (1, 1, 6, 6)
    assert resize(torch.zeros(0, 3, 5, 7), 6).shape == (0, 3, 6, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"val_fraction": 0.0}, "val_fraction=0.0: must lie between 0 and 1"),
        ({"val_fraction": 1.0}, "val_fraction=1.0"),
        ({"test_fraction": -0.1}, "test_fraction=-0.1"),
        ({"test_fraction": float("nan")}, "test_fraction=nan"),
        ({"image_size": 0}, "image_size=0: must be an integer >= 1"),
        ({"limit": -3}, "limit=-3"),
        ({"limit": 5}, "limit=5: needs at least one example for each of 10"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**32}, "seed="),
    ],
)
def test_wrong_arguments(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load("digits", **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digit", "did you mean digits"),
        ("cifar-100", "did you mean cifar10"),
        ("nothing.npz", "no such file or folder"),
        ("some/where", "no such file or folder; the named sets are digits"),
    ],
)
def test_unknown_specs(spec: str, message: str) -> None:
    with pytest.raises(FileNotFoundError, match=message):
        load(spec)


def test_root_that_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"root=.*no such folder"):
        load("digits", root=tmp_path / "absent")


def test_file_of_another_type(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("1,2\n")
    with pytest.raises(ValueError, match=r"a file must be an \.npz"):
        load(str(path))


def test_too_large_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "MAX_BYTES", 1_000_000)
    with pytest.raises(ValueError, match=r"need .* GB in memory.*--image-size.*--limit"):
        load("digits", image_size=64)
    load("digits", image_size=64, limit=20, test_fraction=0.05)


def test_describe_is_json() -> None:
    text = json.loads(json.dumps(load("digits").describe(), allow_nan=False))
    assert (text["name"], text["train"], text["channels"], text["size"], text["dtype"]) == (
        "digits",
        1222,
        1,
        [8, 8],
        "uint8",
    )
    assert text["classes"] == list("0123456789")
    assert len(text["fingerprint"]) == 64


def test_moments_match_numpy_for_both_types() -> None:
    x = torch.randint(0, 256, (50, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for data, unit in ((x, 255.0), (x.float() * 7 - 1e3, 1.0)):
        mean, std = dataset.moments(data)
        expected = data.double().numpy() / unit
        np.testing.assert_allclose(mean, expected.mean((0, 2, 3)), rtol=1e-12)
        np.testing.assert_allclose(std, expected.std((0, 2, 3)), rtol=1e-10)


def test_moments_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(31, 2, 9, generator=torch.Generator().manual_seed(0))
    whole = dataset.moments(x)
    monkeypatch.setattr(dataset, "_CHUNK", 40)
    np.testing.assert_allclose(dataset.moments(x), whole, rtol=1e-12)


def test_constant_channel_is_centred_only() -> None:
    data = Dataset.from_splits("flat", split(value=0.1), split(), split(), ["a", "b"])
    assert data.std == (1.0,)
    assert "channel 0 is constant" in data.warnings[0]
    assert torch.allclose(normalise(data.train.x, data.mean, data.std), torch.zeros(1), atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "kind"), [((4, 9), "series"), ((3, 4, 4), "image"), ((5, 4, 4), "array"), ((1, 2, 2, 2), "array")]
)
def test_kind_from_shape(shape: tuple[int, ...], kind: str) -> None:
    part = split(shape=shape)
    assert Dataset.from_splits("any", part, part, part, ["a", "b"]).kind == kind


def test_fingerprint_sees_values_labels_classes_and_shape() -> None:
    base = split()
    seen = {
        dataset.fingerprint(splits, classes)
        for splits, classes in [
            ([base], ["a", "b"]),
            ([base], ["a", "c"]),
            ([Split(base.x + 1, base.y)], ["a", "b"]),
            ([Split(base.x, 1 - base.y)], ["a", "b"]),
            ([Split(base.x.reshape(6, 2, 2), base.y)], ["a", "b"]),
        ]
    }
    assert len(seen) == 5


@pytest.mark.parametrize(
    ("val", "message"),
    [
        (split(shape=(2, 4)), r"val\.x=.*must be"),
        (Split(torch.zeros(3, 1, 4), torch.zeros(2, dtype=torch.int64)), r"val\.y=2: needs one label for 3"),
        (Split(torch.zeros(0, 1, 4), torch.zeros(0, dtype=torch.int64)), "at least one example"),
        (Split(torch.zeros(1, 1, 4), torch.tensor([2])), "labels run from 0 to 1"),
    ],
)
def test_from_splits_refuses_what_does_not_fit(val: Split, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Dataset.from_splits("bad", split(), val, split(), ["a", "b"])


def test_normalise() -> None:
    x = torch.arange(12, dtype=torch.float64).reshape(2, 2, 3)
    out = normalise(x, (1.0, 2.0), torch.tensor([2.0, 4.0]))
    assert out.dtype == torch.float64
    assert torch.equal(out[:, 1], (x[:, 1] - 2) / 4)
    assert normalise(torch.zeros(0, 2, 3, dtype=torch.uint8), [0, 0], [1, 1]).shape == (0, 2, 3)


@pytest.mark.parametrize(
    ("x", "mean", "std", "message"),
    [
        (torch.zeros(2, 3, 4), [0.0], [1.0, 1.0, 1.0], r"mean=\(1,\): needs one number for 3 channels"),
        (torch.zeros(2, 1, 4), [0.0], [1.0, 1.0], "std="),
        (torch.zeros(2, 1, 4, dtype=torch.int32), [0.0], [1.0], "must be uint8 or floating"),
        (torch.zeros(2), [0.0], [1.0], r"must be \(N, C"),
    ],
)
def test_normalise_refuses(x: torch.Tensor, mean: list[float], std: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        normalise(x, mean, std)


def test_class_names_sort_by_value() -> None:
    assert natural({"10", "9", "-1"}) == ["-1", "9", "10"]
    assert natural({"b", "10", "a"}) == ["10", "a", "b"]
    labels, classes = encode({"train": np.array([10, 9, 10])})
    assert (labels["train"].tolist(), classes) == ([1, 0, 1], ("9", "10"))
