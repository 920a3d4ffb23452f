"""A folder of images, one sub-folder a class: ``DIR/CLASS/*`` or ``DIR/{train,val,test}/CLASS/*``.

Pictures are turned upright (EXIF), put on white where transparent, and reduced to 8 bits; they have one channel when
all of them are grey and three otherwise. Only the examples that the splits and the limit keep are decoded. A picture
that cannot be read is left out and listed; more than one in ten, or a whole class, is an error.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from torchconv._common import require
from torchconv.data.dataset import check_memory
from torchconv.data.progress import bar
from torchconv.data.source import Array, Source, encode
from torchconv.data.splits import Chosen, Indices

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm"})
LARGEST_KEPT = 96
"""Images of one common size up to this stay as they are; others become ``DEFAULT_SIZE`` squares."""
DEFAULT_SIZE = 64
MOST_UNREADABLE = 0.1

_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_GREY = frozenset({"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N"})
_ALPHA = frozenset({"LA", "La", "PA", "RGBA", "RGBa"})

In = TypeVar("In")
Out = TypeVar("Out")


class Header(NamedTuple):
    """What is known of a picture before it is decoded."""

    height: int
    width: int
    grey: bool
    deep: bool
    transparent: bool


def open_folder(path: Path, image_size: int | None, progress: bool) -> Source:
    """List the pictures of a folder; they are decoded once the splits are known."""
    names = {entry.name: entry for entry in _entries(path) if entry.is_dir()}
    split_of = {name: _SPLITS[name.lower()] for name in names if name.lower() in _SPLITS}
    if "train" not in split_of.values():
        parts = {"train": path}
    else:
        others = sorted(set(names) - set(split_of))
        if others:
            raise ValueError(
                f"{path}: mixes {', '.join(sorted(split_of))} with the folder {others[0]!r}; "
                "use either train/val/test folders or class folders"
            )
        if len(set(split_of.values())) < len(split_of):
            raise ValueError(f"{path}: holds the same split twice ({', '.join(sorted(split_of))}); keep one of each")
        _no_images_in(path)
        parts = {split: names[name] for name, split in split_of.items()}
    files: dict[str, list[Path]] = {}
    values: dict[str, Array] = {}
    for part in ("train", "val", "test"):
        if part in parts:
            classes = _classes(parts[part])
            files[part] = [file for pictures in classes.values() for file in pictures]
            values[part] = np.array([name for name, pictures in classes.items() for _ in pictures])
    try:
        labels, classes_found = encode(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if len(classes_found) < 2:
        raise ValueError(f"{path}: has the single class {classes_found[0]!r}; at least two class folders are needed")
    warnings: list[str] = []
    if "train" in parts and len(parts) > 1 and "test" not in parts:
        warnings.append("there is no test folder; the test examples are split off from the training images")

    def read(chosen: Chosen) -> dict[str, tuple[Array, Indices]]:
        return _read(path, files, labels, classes_found, chosen, image_size, warnings, progress)

    return Source(path.resolve().name, classes_found, labels, read, warnings, sized=True)


def _entries(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith((".", "__")))


def _images(entries: Iterable[Path]) -> list[Path]:
    return [entry for entry in entries if entry.suffix.lower() in SUFFIXES and entry.is_file()]


def _no_images_in(folder: Path) -> None:
    loose = _images(_entries(folder))
    if loose:
        raise ValueError(
            f"{folder}: {len(loose)} images such as {loose[0].name} lie outside any class folder; move them into one"
        )


def _classes(folder: Path) -> dict[str, list[Path]]:
    """class name -> its pictures."""
    entries = _entries(folder)
    found = {entry.name: _entries(entry) for entry in entries if entry.is_dir()}
    if not found:
        raise ValueError(
            f"{folder}: has no class folders; expected {folder.name}/CLASS/*.png or {folder.name}/train/CLASS/*.png "
            "(a named set is chosen by name: fashion-mnist, cifar10, with root (--data-root) for its folder)"
        )
    _no_images_in(folder)
    pictures = {}
    for name, inside in found.items():
        deeper = [entry for entry in inside if entry.is_dir()]
        if deeper:
            raise ValueError(
                f"{folder / name}: a class folder holds the folder {deeper[0].name!r}; "
                "images lie directly in their class, and splits are called train, val, test"
            )
        pictures[name] = _images(inside)
        if not pictures[name]:
            raise ValueError(f"{folder / name}: the class holds no images; add some or remove the folder")
    return pictures


def _read(
    root: Path,
    files: dict[str, list[Path]],
    labels: dict[str, Indices],
    classes: tuple[str, ...],
    chosen: Chosen,
    image_size: int | None,
    warnings: list[str],
    progress: bool,
) -> dict[str, tuple[Array, Indices]]:
    paths = {split: [files[part][i] for i in indices] for split, (part, indices) in chosen.items()}
    flat = [path for column in paths.values() for path in column]
    total = len(flat)
    headers = dict(zip(flat, _parallel(_header, flat, "reading headers", progress), strict=True))
    good = [h for h in headers.values() if isinstance(h, Header)]
    _judge(root, flat, headers, warnings=None)
    target = _target(good, image_size, warnings)
    channels = 1 if all(h.grey for h in good) else 3
    if deep := sum(h.deep for h in good):
        warnings.append(f"{deep} images of 16 bits were reduced to 8")
    if transparent := sum(h.transparent for h in good):
        warnings.append(f"{transparent} images with transparency were put on white")
    check_memory(str(root), total, (channels, *target), 1)
    outcome: dict[Path, Any] = dict(headers)
    found = {}
    for split, column in paths.items():
        readable = [path for path in column if isinstance(headers[path], Header)]
        x = np.empty((len(readable), channels, *target), dtype=np.uint8)
        decoded = _parallel(lambda p: decode(p, target, channels), readable, f"decoding {split}", progress)
        row, kept = 0, []
        for path, picture in zip(readable, decoded, strict=True):
            if isinstance(picture, str):
                outcome[path] = picture
                continue
            x[row] = picture
            row += 1
            kept.append(path)
        part, indices = chosen[split]
        stays = np.array([not isinstance(outcome[path], str) for path in column], dtype=bool)
        found[split] = (x[:row], labels[part][indices[stays]])
    _judge(root, flat, outcome, warnings)
    counts = np.bincount(found["train"][1], minlength=len(classes))
    lost = [name for name, count in zip(classes, counts, strict=True) if count == 0]
    if lost:
        raise ValueError(f"{root}: no image of class {lost[0]!r} could be read for training; replace its files")
    for split, (_, y) in found.items():
        if len(y) == 0:
            raise ValueError(f"{root}: no image of the {split} split could be read; replace its files")
    return found


def _judge(root: Path, flat: list[Path], outcome: dict[Path, Any], warnings: list[str] | None) -> None:
    """Raise when too many pictures are unreadable; otherwise list them in ``warnings``."""
    failed = [path for path in flat if isinstance(outcome[path], str)]
    if not failed:
        return
    shown = "; ".join(f"{path.relative_to(root)} ({outcome[path]})" for path in failed[:5])
    more = f"; and {len(failed) - 5} more" if len(failed) > 5 else ""
    if len(failed) > MOST_UNREADABLE * len(flat):
        raise ValueError(
            f"{root}: {len(failed)} of {len(flat)} images cannot be read: {shown}{more}; replace or remove them"
        )
    if warnings is not None:
        warnings.append(f"{len(failed)} of {len(flat)} images could not be read and were left out: {shown}{more}")


def _target(headers: list[Header], image_size: int | None, warnings: list[str]) -> tuple[int, int]:
    sizes = {(h.height, h.width) for h in headers}
    if image_size is not None:
        return image_size, image_size
    first = next(iter(sizes))
    if len(sizes) == 1 and max(first) <= LARGEST_KEPT:
        return first
    if len(sizes) == 1:
        what = f"images are {first[0]} x {first[1]}"
    else:
        low, high = min(map(min, sizes)), max(map(max, sizes))
        what = f"images differ in size (sides of {low} to {high})"
    warnings.append(
        f"{what}: scaled to {DEFAULT_SIZE} x {DEFAULT_SIZE} (shorter side, then centre crop); "
        "choose another with image_size (--image-size)"
    )
    return DEFAULT_SIZE, DEFAULT_SIZE


def _parallel(work: Callable[[In], Out], items: list[In], text: str, progress: bool) -> Iterator[Out]:
    """Results in order, from threads (Pillow decodes without the interpreter lock); Ctrl-C drops work not begun."""
    pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))
    try:
        with bar(text, len(items), progress) as advance:
            for start in range(0, len(items), 4096):  # a future for each of a million files would be a gigabyte
                for result in pool.map(work, items[start : start + 4096]):
                    advance(1)
                    yield result
    finally:
        pool.shutdown(cancel_futures=True)


def _header(path: Path) -> Header | str:
    image = require("PIL.Image", "compare")
    try:
        with image.open(path) as picture:
            width, height = picture.size
            if picture.mode == "F":
                return "floating-point pixels; store such images in an .npz file"
            if picture.getexif().get(0x0112, 1) in (5, 6, 7, 8):  # orientations that swap the sides
                width, height = height, width
            deep = picture.mode.startswith("I")
            transparent = not deep and (picture.mode in _ALPHA or "transparency" in picture.info)
            return Header(height, width, picture.mode in _GREY, deep, transparent)
    except Exception as error:  # decoders raise whatever a broken file provokes
        return _say(error)


def decode(path: Path, target: tuple[int, int], channels: int) -> NDArray[np.uint8] | str:
    """(C, H, W) of one picture, or what is wrong with it."""
    image, ops = require("PIL.Image", "compare"), require("PIL.ImageOps", "compare")
    try:
        with image.open(path) as picture:
            picture.draft(
                None, (2 * max(target), 2 * max(target))
            )  # lets JPEG decode large photographs at 1/2, 1/4, 1/8
            picture = ops.exif_transpose(picture)
            if picture.mode.startswith("I"):
                values = np.asarray(picture).astype(np.int64)
                if values.min() < 0 or values.max() > 65535:
                    return "32-bit pixels outside 0..65535; store such images in an .npz file"
                picture = image.fromarray((values // 257).astype(np.uint8))
            elif picture.mode in _ALPHA or "transparency" in picture.info:
                picture = picture.convert("RGBA")
                picture = image.alpha_composite(image.new("RGBA", picture.size, "white"), picture)
            picture = picture.convert("L" if channels == 1 else "RGB")
            if picture.size != (target[1], target[0]):
                picture = ops.fit(picture, (target[1], target[0]), method=image.Resampling.BILINEAR)
            pixels = np.asarray(picture)
            return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
    except Exception as error:  # decoders raise whatever a broken file provokes
        return _say(error)


def _say(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return "not an image" if "cannot identify image" in text else text[:80]
