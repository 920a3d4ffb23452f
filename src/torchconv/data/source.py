"""Between a loader and a ``Dataset``: plan the splits from the labels, read what was chosen, resize, convert."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from torchconv.data.dataset import Dataset, Split, check_memory
from torchconv.data.splits import Chosen, Indices, plan

Array = NDArray[Any]
Read = Callable[[Chosen], dict[str, tuple[Array, Indices]]]


@dataclass
class Source:
    """What a loader knows before any split is made.

    Args:
        name: short name.
        classes: class names.
        labels: part ("train", optionally "val", "test") -> class indices.
        read: chosen examples -> split -> (x, y); x is (N, C, \\*spatial), uint8 or float32.
        warnings: sentences for the report; ``read`` may add to them.
        kind: see ``Dataset``; None tells it from the shape.
        sized: ``read`` has applied the image size already.
    """

    name: str
    classes: tuple[str, ...]
    labels: dict[str, Indices]
    read: Read
    warnings: list[str] = field(default_factory=list)
    kind: str | None = None
    sized: bool = False


def in_memory(x: dict[str, Array], y: dict[str, Indices]) -> Read:
    """The ``read`` of a loader that holds every part as an array."""

    def read(chosen: Chosen) -> dict[str, tuple[Array, Indices]]:
        whole = {part: (x[part], y[part]) for part in x}
        found = {}
        for split, (part, indices) in chosen.items():
            xs, ys = whole[part]
            found[split] = (xs, ys) if len(indices) == len(xs) else (xs[indices], ys[indices])
        return found

    return read


def build(
    spec: str,
    source: Source,
    *,
    image_size: int | None,
    limit: int | None,
    val_fraction: float,
    test_fraction: float,
    seed: int,
) -> Dataset:
    """Turn a source into a data set; the arguments are those of ``load``."""
    if len(source.classes) < 2:
        raise ValueError(f"spec={spec!r}: has {len(source.classes)} class; a classification set needs at least two")
    for part in ("val", "test"):
        if part in source.labels:
            present = np.unique(source.labels[part])
            lacking = [name for label, name in enumerate(source.classes) if label not in present]
            if lacking:
                source.warnings.append(f"the {part} split has no example of class {_some(lacking)}")
    chosen = plan(
        source.labels,
        source.classes,
        limit=limit,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        seed=seed,
    )
    splits = {}
    arrays = source.read(chosen)
    for part, (x, y) in arrays.items():
        tensor = torch.from_numpy(np.require(x, requirements=["C", "W"]))
        if image_size is not None and not source.sized:
            if tensor.ndim != 4:
                raise ValueError(
                    f"image_size={image_size}: {spec!r} holds no images (shape {tuple(x.shape[1:])}); leave it out"
                )
            total = sum(len(indices) for _, indices in chosen.values())
            check_memory(spec, total, (x.shape[1], image_size, image_size), x.dtype.itemsize)
            tensor = resize(tensor, image_size)
        splits[part] = Split(tensor, torch.from_numpy(np.require(y, np.int64, ["C", "W"])))
    return Dataset.from_splits(
        source.name,
        splits["train"],
        splits["val"],
        splits["test"],
        source.classes,
        source.kind,
        source.warnings,
    )


def resize(x: Tensor, size: int) -> Tensor:
    """Scale the shorter side of (N, C, H, W) to ``size`` (bilinear, anti-aliased) and cut the centre square."""
    height, width = x.shape[-2:]
    if (height, width) == (size, size):
        return x
    scale = size / min(height, width)
    target = (max(size, round(height * scale)), max(size, round(width * scale)))
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    out = torch.empty((*x.shape[:2], size, size), dtype=x.dtype)
    step = max(1, (1 << 24) // (x.shape[1] * target[0] * target[1]))
    for start in range(0, len(x), step):
        piece = F.interpolate(x[start : start + step].float(), target, mode="bilinear", antialias=True)
        piece = piece[..., top : top + size, left : left + size]
        out[start : start + step] = piece.round().clamp(0, 255) if x.dtype == torch.uint8 else piece
    return out


def encode(values: dict[str, Array], order: Sequence[str] | None = None) -> tuple[dict[str, Indices], tuple[str, ...]]:
    """Map label values (integers or strings) of every part to 0..K-1, sorted (numbers by value) or in ``order``.

    Raises:
        ValueError: a part has a class that the training part lacks.
    """
    names = {part: [str(v) for v in np.asarray(column).tolist()] for part, column in values.items()}
    seen = set(names["train"])
    for part, column in names.items():
        extra = sorted(set(column) - seen)
        if extra:
            raise ValueError(f"class {_some(extra)} occurs in the {part} part but not in the training part")
    classes = tuple(c for c in order if c in seen) if order is not None else tuple(natural(seen))
    index = {name: i for i, name in enumerate(classes)}
    return {part: np.array([index[n] for n in column], dtype=np.int64) for part, column in names.items()}, classes


def natural(names: Sequence[str] | set[str]) -> list[str]:
    """Sorted names; by value when all of them are integers, so that "10" follows "9"."""
    try:
        return sorted(names, key=lambda name: (int(name), name))
    except ValueError:
        return sorted(names)


def _some(names: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(repr(n) for n in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
