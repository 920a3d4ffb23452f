"""Fashion-MNIST and CIFAR-10: layouts, order of places, downloads and damage, on small stand-ins for the real files."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from torchconv.data import load, named
from torchconv.data.download import cache_dir, md5

RNG = np.random.default_rng(0)
FASHION = {
    "train-images-idx3-ubyte": struct.pack(">4I", 2051, 60, 28, 28) + RNG.bytes(60 * 784),
    "train-labels-idx1-ubyte": struct.pack(">2I", 2049, 60) + bytes(i % 10 for i in range(60)),
    "t10k-images-idx3-ubyte": struct.pack(">4I", 2051, 20, 28, 28) + RNG.bytes(20 * 784),
    "t10k-labels-idx1-ubyte": struct.pack(">2I", 2049, 20) + bytes(i % 10 for i in range(20)),
}
CIFAR = {name: b"".join(bytes([i % 10]) + RNG.bytes(3072) for i in range(20)) for name in named.CIFAR_FILES}


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named, "FASHION_FILES", {name: md5(data) for name, data in FASHION.items()})
    monkeypatch.setattr(named, "FASHION_URLS", ("http://127.0.0.1:9/",))
    monkeypatch.setattr(named, "CIFAR_URLS", ("http://127.0.0.1:9/",))
    monkeypatch.setattr(named, "CIFAR_MD5", md5(archive()))


def archive() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in CIFAR.items():
            info = tarfile.TarInfo(f"{named.CIFAR_FOLDER}/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return gzip.compress(buffer.getvalue(), mtime=0)


def fashion(folder: Path, packed: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in FASHION.items():
        (folder / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(data) if packed else data)
    return folder


def cifar(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def jpeg(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for part in ("train", "test"):
        pieces = []
        for i in range(40):
            buffer = io.BytesIO()
            Image.new("RGB", (32, 32), (6 * i, 0, 0)).save(buffer, "JPEG")
            pieces.append(buffer.getvalue())
        arrays[f"jpeg_{part}"] = np.frombuffer(b"".join(pieces), dtype=np.uint8)
        arrays[f"offset_{part}"] = np.cumsum([0, *map(len, pieces)])
        arrays[f"y_{part}"] = np.arange(40, dtype=np.uint8) % 10
    np.savez(folder / "cifar10_jpeg_12k.npz", **arrays)


def lossless(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    y = np.arange(40, dtype=np.uint8) % 10
    x = RNG.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    np.savez(folder / "cifar10_lossless_4k.npz", x_train=x, y_train=y, x_test=x, y_test=y)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("below", ["", "fashion_mnist", "fashion-mnist", "FashionMNIST/raw"])
def test_fashion_layouts(tmp_path: Path, below: str, packed: bool) -> None:
    fashion(tmp_path / below, packed)
    data = load("fashion-mnist", root=tmp_path)
    assert (len(data.train), len(data.val), len(data.test)) == (50, 10, 20)
    assert data.classes[9] == "Ankle boot"
    expected = np.frombuffer(FASHION["t10k-images-idx3-ubyte"], np.uint8, offset=16).reshape(20, 1, 28, 28)
    assert np.array_equal(data.test.x.numpy(), expected)
    data.test.x.zero_()  # not a view of read-only bytes


@pytest.mark.parametrize("spec", ["FashionMNIST", "fashion_mnist", "Fashion-MNIST"])
def test_spelling_of_the_name(tmp_path: Path, spec: str) -> None:
    assert load(spec, root=fashion(tmp_path)).name == "fashion-mnist"


def test_places_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fashion(cache_dir() / "fashion_mnist")
    assert load("fashion-mnist").name == "fashion-mnist"
    lossless(cache_dir() / "cifar10_lossless")
    jpeg(tmp_path / "env" / "cifar10_jpeg")
    cifar(tmp_path / "root" / "cifar10", {named.CIFAR_ARCHIVE: archive()})
    assert "lossless" in load("cifar10").warnings[0]
    monkeypatch.setenv("TORCHCONV_DATA", str(tmp_path / "env"))
    assert "jpeg" in load("cifar10").warnings[0]
    assert "binary" in load("cifar10", root=tmp_path / "root").warnings[0]


def test_cifar_prefers_binary_then_jpeg_then_lossless(tmp_path: Path) -> None:
    lossless(tmp_path / "cifar10_lossless")
    data = load("cifar10", root=tmp_path)
    assert "read cifar10_lossless_4k.npz: 40 + 40 of the 60000 images; 40 test images" in data.warnings[0]
    assert data.train.x.shape == (30, 3, 32, 32)
    jpeg(tmp_path / "cifar10_jpeg")
    data = load("cifar10", root=tmp_path)
    assert "read cifar10_jpeg_12k.npz: 40 + 40 of the 60000 images, JPEG-compressed" in data.warnings[0]
    assert abs(int(data.test.x[20, 0, 16, 16]) - 120) <= 2
    assert "lossless" in load("cifar10", root=tmp_path / "cifar10_lossless").warnings[0]
    cifar(tmp_path, {named.CIFAR_ARCHIVE: archive()})
    data = load("cifar10", root=tmp_path)
    assert data.warnings == ("read the binary version (100 + 20 images)",)


@pytest.mark.parametrize("below", ["", "cifar10", "cifar-10-batches-bin", "cifar10/cifar-10-batches-bin"])
def test_cifar_unpacked(tmp_path: Path, below: str) -> None:
    cifar(tmp_path / below, CIFAR)
    data = load("cifar10", root=tmp_path)
    assert (len(data.train), len(data.val), len(data.test)) == (85, 15, 20)
    record = np.frombuffer(CIFAR["test_batch.bin"], np.uint8).reshape(20, 3073)
    assert np.array_equal(data.test.x.numpy(), record[:, 1:].reshape(20, 3, 32, 32))
    assert data.test.y.tolist() == record[:, 0].tolist()


def test_pickled_cifar_is_never_read(tmp_path: Path) -> None:
    cifar(tmp_path / "cifar-10-batches-py", {f"data_batch_{i}": b"\x80\x04." for i in range(1, 6)})
    with pytest.raises(FileNotFoundError, match=r"cifar10 is not in .* put cifar-10-binary\.tar\.gz into a folder"):
        load("cifar10", root=tmp_path)


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10"])
def test_offline_says_how_to_provide_the_data(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        FileNotFoundError, match=rf"{name} is not in .*could not be downloaded .*--data-root.*TORCHCONV_DATA"
    ):
        load(name, root=tmp_path)


def test_fashion_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named, "FASHION_URLS", (fashion(tmp_path / "publisher").as_uri() + "/",))
    assert len(load("fashion-mnist").test) == 20
    assert sorted(p.name for p in (cache_dir() / "fashion_mnist").glob("*.gz")) == sorted(f"{n}.gz" for n in FASHION)
    monkeypatch.setattr(named, "FASHION_URLS", ("http://127.0.0.1:9/",))
    assert len(load("fashion-mnist").test) == 20
    (tmp_path / "root").mkdir()
    (cache_dir() / "fashion_mnist" / "t10k-labels-idx1-ubyte.gz").unlink()
    monkeypatch.setattr(named, "FASHION_URLS", ((tmp_path / "publisher").as_uri() + "/",))
    load("fashion-mnist", root=tmp_path / "root")
    assert (tmp_path / "root" / "fashion_mnist" / "t10k-labels-idx1-ubyte.gz").exists()


def test_cifar_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cifar(tmp_path, {named.CIFAR_ARCHIVE: archive()})
    monkeypatch.setattr(named, "CIFAR_URLS", ((tmp_path / named.CIFAR_ARCHIVE).as_uri(),))
    assert "binary" in load("cifar10").warnings[0]
    assert (cache_dir() / "cifar10" / named.CIFAR_ARCHIVE).exists()


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10"])
def test_download_of_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "login.html").write_text("<html>please log in</html>")
    address = (tmp_path / "login.html").as_uri()
    monkeypatch.setattr(named, "FASHION_URLS", (address + "?",))
    monkeypatch.setattr(named, "CIFAR_URLS", (address,))
    with pytest.raises(FileNotFoundError, match=r"could not be downloaded \(.*MD5|could not be downloaded"):
        load(name)
    assert not [p for p in cache_dir().rglob("*") if p.suffix in (".gz", ".part")]


def test_damaged_files(tmp_path: Path) -> None:
    fashion(tmp_path)
    labels = tmp_path / "train-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(FASHION["t10k-labels-idx1-ubyte"]))
    with pytest.raises(ValueError, match=r"its content is not Fashion-MNIST's train-labels.*remove it"):
        load("fashion-mnist", root=tmp_path)
    labels.write_bytes(labels.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"not a whole \.gz file"):
        load("fashion-mnist", root=tmp_path)
    jpeg(tmp_path)
    subset = tmp_path / "cifar10_jpeg_12k.npz"
    for damaged in (subset.read_bytes()[:-100], b"PK"):
        subset.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"cifar10_jpeg_12k\.npz: damaged \(.*\); remove it"):
            load("cifar10", root=tmp_path)
    cifar(tmp_path, {named.CIFAR_ARCHIVE: archive()[:-1]})
    with pytest.raises(ValueError, match=r"not the published cifar-10-binary\.tar\.gz \(MD5"):
        load("cifar10", root=tmp_path)
    cifar(tmp_path, {**CIFAR, "data_batch_3.bin": b"short"})
    with pytest.raises(ValueError, match=r"data_batch_3\.bin is not a whole number of 3073-byte records"):
        load("cifar10", root=tmp_path)
    cifar(tmp_path, {**CIFAR, "test_batch.bin": bytes([10]) + bytes(3072)})
    with pytest.raises(ValueError, match="the test labels do not fit the images"):
        load("cifar10", root=tmp_path)
