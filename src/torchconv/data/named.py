"""The named sets: scikit-learn's digits, Fashion-MNIST and CIFAR-10, in their publishers' file formats.

Nothing is unpickled: CIFAR-10's "python version" is a pickle and is never read; its binary version holds the same
pixels. Layouts understood below a place (``root``, ``$TORCHCONV_DATA``, the cache; it may be the set's own folder):

- Fashion-MNIST: ``{train,t10k}-{images-idx3,labels-idx1}-ubyte``, with or without ``.gz``, in ``fashion_mnist/``,
  ``fashion-mnist/`` or ``FashionMNIST/raw/``.
- CIFAR-10: ``cifar-10-binary.tar.gz`` or its unpacked ``cifar-10-batches-bin/``, directly or in ``cifar10/``; or a
  subset ``cifar10_jpeg/cifar10_jpeg_12k.npz`` or ``cifar10_lossless/cifar10_lossless_4k.npz``.
"""

from __future__ import annotations

import functools
import gzip
import io
import itertools
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchconv._common import require
from torchconv.data import NAMES
from torchconv.data.download import cache_dir, download, md5
from torchconv.data.source import Source, in_memory

Parts = dict[str, NDArray[Any]]

FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

FASHION_FILES = {  # MD5 of the unpacked content: a .gz differs from machine to machine in its time stamp
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}
FASHION_URLS = (
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
)
CIFAR_ARCHIVE = "cifar-10-binary.tar.gz"
CIFAR_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CIFAR_URLS = (f"https://www.cs.toronto.edu/~kriz/{CIFAR_ARCHIVE}",)
CIFAR_FILES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
CIFAR_FOLDER = "cifar-10-batches-bin"


def canonical(spec: str) -> str | None:
    """The named set meant by ``spec`` whatever its case and hyphens ("FashionMNIST"), or None."""
    if "/" in spec or os.sep in spec:
        return None
    return {name.replace("-", ""): name for name in NAMES}.get(spec.lower().replace("-", "").replace("_", ""))


def places(root: str | Path | None) -> list[Path]:
    """Folders to look in, in order: ``root``, ``$TORCHCONV_DATA``, the user cache."""
    given = [root, os.environ.get("TORCHCONV_DATA") or None]
    return [*(Path(p).expanduser() for p in given if p is not None), cache_dir()]


def open_named(name: str, root: str | Path | None, progress: bool) -> Source:
    """The source of a named set; downloads it when no place has it."""
    if name == "digits":
        return _digits()
    find = {"fashion-mnist": _find_fashion, "cifar10": _find_cifar}[name]
    searched = places(root)
    for place in searched:
        source = find(place)
        if source is not None:
            return source
    home = Path(root).expanduser() if root is not None else cache_dir()
    fetch = {"fashion-mnist": _fetch_fashion, "cifar10": _fetch_cifar}[name]
    try:
        fetch(home, progress)
    except (OSError, ValueError) as error:
        files = ", ".join(f"{file}.gz" for file in FASHION_FILES) if name == "fashion-mnist" else CIFAR_ARCHIVE
        raise FileNotFoundError(
            f"{name} is not in {', '.join(map(str, searched))} and could not be downloaded ({error}); "
            f"put {files} into a folder and name that folder with root (--data-root) or $TORCHCONV_DATA"
        ) from error
    source = find(home)
    assert source is not None
    return source


def _digits() -> Source:
    datasets = require("sklearn.datasets", "compare")
    bunch = datasets.load_digits()
    # Grey levels 0..16 onto 0..255: one to one, and the same type as every other picture.
    x = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    y = bunch.target.astype(np.int64)
    return Source("digits", tuple("0123456789"), {"train": y}, in_memory({"train": x}, {"train": y}), kind="image")


def _source(name: str, classes: tuple[str, ...], x: Parts, y: Parts, note: str | None) -> Source:
    labels = {part: column.astype(np.int64) for part, column in y.items()}
    for part, column in labels.items():
        if len(column) != len(x[part]) or (len(column) and not 0 <= column.min() <= column.max() < len(classes)):
            raise ValueError(f"{name}: the {part} labels do not fit the images; the file is damaged, remove it")
    return Source(name, classes, labels, in_memory(x, labels), [note] if note else [], kind="image")


# --- Fashion-MNIST -------------------------------------------------------------------------------------------------


def _find_fashion(place: Path) -> Source | None:
    for folder in ("", "fashion_mnist", "fashion-mnist", "FashionMNIST/raw", "FashionMNIST"):
        paths = {name: _first(place / folder / name, place / folder / f"{name}.gz") for name in FASHION_FILES}
        if all(paths.values()):
            data = {name: _idx(path) for name, path in paths.items() if path}
            x = {"train": data["train-images-idx3-ubyte"][:, None], "test": data["t10k-images-idx3-ubyte"][:, None]}
            y = {"train": data["train-labels-idx1-ubyte"], "test": data["t10k-labels-idx1-ubyte"]}
            return _source("fashion-mnist", FASHION_CLASSES, x, y, None)
    return None


def _fetch_fashion(home: Path, progress: bool) -> None:
    for name in FASHION_FILES:
        target = home / "fashion_mnist" / f"{name}.gz"
        if not target.exists():
            urls = [f"{base}{name}.gz" for base in FASHION_URLS]
            download(urls, target, functools.partial(_check_packed, name), progress=progress)


def _check_packed(name: str, path: Path) -> None:
    _check_idx(_unpack(path), name, path)


def _first(*paths: Path) -> Path | None:
    return next((path for path in paths if path.is_file()), None)


def _unpack(path: Path) -> bytes:
    data = path.read_bytes()
    if data[:2] != b"\x1f\x8b":
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a whole .gz file ({error}); remove it and try again") from None


def _check_idx(data: bytes, name: str, path: Path) -> None:
    if md5(data) != FASHION_FILES[name]:
        raise ValueError(
            f"{path}: its content is not Fashion-MNIST's {name} (MD5 {md5(data)}); remove it and try again"
        )


def _idx(path: Path) -> NDArray[Any]:
    data = _unpack(path)
    _check_idx(data, path.name.removesuffix(".gz"), path)
    shape = np.frombuffer(data, dtype=">u4", count=data[3], offset=4)
    return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * data[3]).reshape(shape.tolist())


# --- CIFAR-10 ------------------------------------------------------------------------------------------------------


def _find_cifar(place: Path) -> Source | None:
    kinds: tuple[Callable[[Path], Source | None], ...] = (_cifar_binary, _cifar_jpeg, _cifar_lossless)
    for kind in kinds:
        for folder in ("", "cifar10", "cifar-10", "cifar10_binary", "cifar10_jpeg", "cifar10_lossless"):
            source = kind(place / folder)
            if source is not None:
                return source
    return None


def _fetch_cifar(home: Path, progress: bool) -> None:
    download(CIFAR_URLS, home / "cifar10" / CIFAR_ARCHIVE, _check_cifar, progress=progress)


def _check_cifar(path: Path) -> None:
    found = md5(path)
    if found != CIFAR_MD5:
        raise ValueError(
            f"{path}: not the published {CIFAR_ARCHIVE} (MD5 {found}, not {CIFAR_MD5}); remove it and try again"
        )


def _cifar_binary(folder: Path) -> Source | None:
    raw: list[bytes] = []
    archive = folder / CIFAR_ARCHIVE
    for base in (folder, folder / CIFAR_FOLDER):
        if all((base / name).is_file() for name in CIFAR_FILES):
            raw = [(base / name).read_bytes() for name in CIFAR_FILES]
            break
    else:
        if not archive.is_file():
            return None
        _check_cifar(archive)
        with tarfile.open(archive, "r:gz") as tar:  # members are read by name; nothing is written to disk
            for name in CIFAR_FILES:
                member = tar.extractfile(f"{CIFAR_FOLDER}/{name}")
                if member is None:
                    raise ValueError(f"{archive}: holds no {CIFAR_FOLDER}/{name}; remove it and try again")
                raw.append(member.read())
    records = []
    for name, data in zip(CIFAR_FILES, raw, strict=True):
        if len(data) == 0 or len(data) % 3073:
            raise ValueError(
                f"{folder}: {name} is not a whole number of 3073-byte records; unpack {CIFAR_ARCHIVE} again"
            )
        records.append(np.frombuffer(data, dtype=np.uint8).reshape(-1, 3073))
    train, test = np.concatenate(records[:-1]), records[-1]
    x = {"train": train[:, 1:].reshape(-1, 3, 32, 32), "test": test[:, 1:].reshape(-1, 3, 32, 32)}
    y = {"train": train[:, 0], "test": test[:, 0]}
    return _source("cifar10", CIFAR_CLASSES, x, y, f"read the binary version ({len(train)} + {len(test)} images)")


def _cifar_jpeg(folder: Path) -> Source | None:
    path = folder / "cifar10_jpeg_12k.npz"
    if not path.is_file():
        return None
    image = require("PIL.Image", "compare")
    x, y = {}, {}
    with _whole(path), np.load(path, allow_pickle=False) as file:
        for part in ("train", "test"):
            data, ends = file[f"jpeg_{part}"].tobytes(), file[f"offset_{part}"].tolist()
            pictures = [
                np.asarray(image.open(io.BytesIO(data[start:end])).convert("RGB"))
                for start, end in itertools.pairwise(ends)
            ]
            x[part] = np.ascontiguousarray(np.stack(pictures).transpose(0, 3, 1, 2))
            y[part] = file[f"y_{part}"]
    note = (
        f"read {path.name}: {len(x['train'])} + {len(x['test'])} of the 60000 images, JPEG-compressed; "
        "accuracies compare methods with each other, not with published numbers"
    )
    return _source("cifar10", CIFAR_CLASSES, x, y, note)


def _cifar_lossless(folder: Path) -> Source | None:
    path = folder / "cifar10_lossless_4k.npz"
    if not path.is_file():
        return None
    with _whole(path), np.load(path, allow_pickle=False) as file:
        x = {part: np.ascontiguousarray(file[f"x_{part}"].transpose(0, 3, 1, 2)) for part in ("train", "test")}
        y = {part: file[f"y_{part}"] for part in ("train", "test")}
    note = (
        f"read {path.name}: {len(x['train'])} + {len(x['test'])} of the 60000 images; "
        f"{len(x['test'])} test images leave wide intervals"
    )
    return _source("cifar10", CIFAR_CLASSES, x, y, note)


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Say which file is damaged, whatever its decoder raises."""
    try:
        yield
    except (KeyError, ValueError, OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: damaged ({error}); remove it") from None
