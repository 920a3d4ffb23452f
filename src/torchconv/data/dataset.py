"""What every loader returns: three splits of tensors, their classes and the statistics to normalise by."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchconv._common import check

MAX_BYTES = 8 * 1000**3
"""Data sets are held in memory; a larger one is refused with the way out."""

_CHUNK = 1 << 24  # elements handled at a time, so that statistics need no second copy of the data


@dataclass(frozen=True, eq=False)
class Split:
    """Examples of one split.

    Args:
        x: uint8 or float32, (N, C, \\*spatial).
        y: int64 (N,), indices into ``Dataset.classes``.
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A classification data set in memory.

    Args:
        name: short name for tables and reports.
        train, val, test: disjoint splits.
        classes: class names; ``y`` indexes them.
        mean, std: per channel over ``train.x`` as float (uint8 is divided by 255 first).
        kind: "image" (2-D, 1 or 3 channels), "series" (1-D) or "array" (anything else).
        warnings: what was decided or repaired while loading, one sentence each.
        fingerprint: SHA-256 over the content of all splits and the class names.

    Example:
        >>> from torchconv.data import load
        >>> data = load("digits")
        >>> data.train.x.shape, data.num_classes
        (torch.Size([1222, 1, 8, 8]), 10)
    """

    name: str
    train: Split
    val: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    kind: str = "image"
    warnings: tuple[str, ...] = ()
    fingerprint: str = ""

    @classmethod
    def from_splits(
        cls,
        name: str,
        train: Split,
        val: Split,
        test: Split,
        classes: Sequence[str],
        kind: str | None = None,
        warnings: Sequence[str] = (),
    ) -> Dataset:
        """Build a data set from tensors already in memory; statistics and fingerprint are computed.

        Args:
            name: short name.
            train, val, test: splits with equal shapes but for the number of examples.
            classes: names, one a label value.
            kind: "image", "series" or "array"; by default told from the shape.
            warnings: sentences to pass on to the report.

        Raises:
            ValueError: shapes or label values do not fit together.
        """
        shape = tuple(train.x.shape[1:])
        for part, split in (("train", train), ("val", val), ("test", test)):
            check(split.x.dtype in (torch.uint8, torch.float32), f"{part}.x", split.x.dtype, "must be uint8 or float32")
            check(tuple(split.x.shape[1:]) == shape, f"{part}.x", tuple(split.x.shape), f"must be (N, *{shape})")
            check(
                len(split.x) == len(split.y), f"{part}.y", len(split.y), f"needs one label for {len(split.x)} examples"
            )
            check(len(split.y) > 0, f"{part}.y", 0, "must hold at least one example")
            ends = (int(split.y.min()), int(split.y.max()))
            check(
                ends[0] >= 0 and ends[1] < len(classes), f"{part}.y", ends, f"labels run from 0 to {len(classes) - 1}"
            )
        mean, std = moments(train.x)
        notes = list(warnings)
        flat = [c for c, s in enumerate(std) if s == 0.0]
        if flat:
            std = tuple(s or 1.0 for s in std)
            notes.append(f"channel {', '.join(map(str, flat))} is constant in the training split; it is only centred")
        return cls(
            name=name,
            train=train,
            val=val,
            test=test,
            classes=tuple(classes),
            mean=mean,
            std=std,
            kind=kind or kind_of(shape),
            warnings=tuple(notes),
            fingerprint=fingerprint((train, val, test), classes),
        )

    @property
    def size(self) -> tuple[int, ...]:
        """Spatial extent of one example."""
        return tuple(self.train.x.shape[2:])

    @property
    def ndim(self) -> int:
        """Number of spatial axes."""
        return self.train.x.ndim - 2

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.train.x.shape[1]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    def describe(self) -> dict[str, Any]:
        """The data set in plain values, ready for JSON."""
        return {
            "name": self.name,
            "kind": self.kind,
            "train": len(self.train),
            "val": len(self.val),
            "test": len(self.test),
            "classes": list(self.classes),
            "channels": self.channels,
            "size": list(self.size),
            "dtype": str(self.train.x.dtype).removeprefix("torch."),
            "mean": list(self.mean),
            "std": list(self.std),
            "fingerprint": self.fingerprint,
            "warnings": list(self.warnings),
        }


def kind_of(shape: Sequence[int]) -> str:
    """ "image", "series" or "array" for one example's shape (C, \\*spatial)."""
    if len(shape) == 2:
        return "series"
    return "image" if len(shape) == 3 and shape[0] in (1, 3) else "array"


def normalise(x: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> Tensor:
    """Centre and scale each channel: (x − mean) / std, where uint8 counts as x / 255.

    Args:
        x: (N, C, \\*spatial), uint8 or floating point.
        mean, std: one number a channel, ``std`` > 0.

    Shape:
        as ``x``; float32 for uint8, otherwise the type of ``x``.

    Raises:
        ValueError: the numbers do not fit the channels, or ``x`` has another integer type.

    Example:
        >>> normalise(torch.full((1, 1, 2), 255, dtype=torch.uint8), [0.5], [0.25])
        tensor([[[2., 2.]]])
    """
    check(x.ndim >= 2, "x", tuple(x.shape), "must be (N, C, *spatial)")
    if x.dtype == torch.uint8:
        x = x.float() / 255
    check(x.is_floating_point(), "x", str(x.dtype), "must be uint8 or floating point")
    shape = (x.shape[1],) + (1,) * (x.ndim - 2)
    scale = []
    for name, value in (("mean", mean), ("std", std)):
        numbers = torch.as_tensor(value, dtype=x.dtype, device=x.device)
        check(numbers.shape == (x.shape[1],), name, tuple(numbers.shape), f"needs one number for {x.shape[1]} channels")
        scale.append(numbers.reshape(shape))
    return (x - scale[0]) / scale[1]


def moments(x: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel (uint8 as x / 255), to float64 and without a copy of ``x``."""
    x = x.cpu()
    if x.dtype == torch.uint8:
        levels = torch.arange(256, dtype=torch.float64) / 255
        counts = torch.stack([torch.bincount(x[:, c].reshape(-1), minlength=256) for c in range(x.shape[1])]).double()
        weights = counts / counts.sum(1, keepdim=True)
        mean = weights @ levels
        spread = (weights * (levels - mean[:, None]).square()).sum(1)
    else:
        count = x.numel() // x.shape[1]
        pieces = x.split(max(1, _CHUNK // max(1, x[0].numel())))
        axes = [d for d in range(x.ndim) if d != 1]
        zero = torch.zeros(x.shape[1], dtype=torch.float64)
        mean = sum((piece.double().sum(axes) for piece in pieces), zero) / count
        centre = mean.reshape(-1, *[1] * (x.ndim - 2))
        spread = sum(((piece.double() - centre).square().sum(axes) for piece in pieces), zero) / count
    # A constant channel leaves round-off of the mean behind; that is not a spread to divide by.
    spread = torch.where(spread <= (1e-12 * mean).square(), 0.0, spread)
    return tuple(mean.tolist()), tuple(spread.sqrt().tolist())


def fingerprint(splits: Sequence[Split], classes: Sequence[str]) -> str:
    """SHA-256 over shapes, types, values, labels and class names."""
    digest = hashlib.sha256(repr(tuple(classes)).encode())
    for split in splits:
        for tensor in (split.x, split.y):
            digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def check_memory(
    spec: str,
    examples: int,
    shape: Sequence[int],
    itemsize: int,
    remedy: str = "choose a smaller image_size (--image-size) or a limit (--limit)",
) -> None:
    """Refuse data that would not fit in ``MAX_BYTES``, before it is allocated."""
    size = examples * math.prod(shape) * itemsize
    if size > MAX_BYTES:
        raise ValueError(
            f"spec={spec!r}: {examples} examples of {'x'.join(map(str, shape))} need {size / 1e9:.3g} GB in memory, "
            f"more than {MAX_BYTES / 1e9:g} GB; {remedy}"
        )
