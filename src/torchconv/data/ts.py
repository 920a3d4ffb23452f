"""Time series in the ``.ts`` text format of the UCR/UEA archives (Dau et al. 2018; Bagnall et al. 2018).

Header lines start with ``#`` (comment) or ``@`` (key, value); after ``@data`` every line is one case: channels
separated by ``:``, values by ``,``, the class label last. ``NAME_TRAIN.ts`` and ``NAME_TEST.ts`` find each other.

What is done to the values, each time with a counted warning: missing ones (``?``, ``NaN``) are interpolated linearly
within their channel (the ends repeat the nearest value); series shorter than the longest training series are padded
with zeros at the end, longer test series are cut. Nothing else: no z-normalisation. Padding counts in the channels'
mean and spread. Time stamps and regression targets are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchconv.data.dataset import check_memory
from torchconv.data.source import Source, encode, in_memory

Array = NDArray[Any]


@dataclass
class Cases:
    """The content of one file: float64 (channels, length) for each case, labels, declared classes, repaired values."""

    name: str
    series: list[Array]
    labels: list[str]
    declared: tuple[str, ...] | None
    missing: int


def open_file(path: Path) -> Source:
    """One ``.ts`` file, with its partner where there is one beside it."""
    stem = path.stem
    for suffix, other in (("_TRAIN", "_TEST"), ("_TEST", "_TRAIN")):
        if stem.upper().endswith(suffix):
            base = stem[: -len(suffix)]
            partner = _sibling(path, base + other)
            train, test = (path, partner) if suffix == "_TRAIN" else (partner, path)
            return _source(base, train, test)
    return _source(stem, path, None)


def open_folder(folder: Path, name: str | None = None) -> Source:
    """The problem whose files lie in ``folder``."""
    names = _names(folder)
    if name is None:
        if len(names) != 1:
            raise ValueError(
                f"{folder}: holds {len(names)} problems ({', '.join(sorted(names)[:5])}, ...); name one of its files"
            )
        name = next(iter(names))
    return open_file(names[name])


def problems(places: list[Path]) -> dict[str, Path]:
    """Problem name -> folder, for every problem kept below the places; the first place wins."""
    found: dict[str, Path] = {}
    for place in places:
        for base in (place, place / "ucr_uea"):
            if base.is_dir():
                for file in sorted([*base.glob("*_TRAIN.ts"), *base.glob("*/*_TRAIN.ts")]):
                    found.setdefault(file.name.removesuffix("_TRAIN.ts"), file.parent)
    return found


def _names(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.ts")):
        base = file.stem
        for suffix in ("_TRAIN", "_TEST"):
            if base.upper().endswith(suffix):
                base = base[: -len(suffix)]
        found.setdefault(base, file)
    return found


def _sibling(path: Path, stem: str) -> Path | None:
    return next((p for p in sorted(path.parent.glob("*.ts")) if p.stem.lower() == stem.lower()), None)


def _source(name: str, train: Path | None, test: Path | None) -> Source:
    warnings: list[str] = []
    if train is None or test is None:
        only = train or test
        assert only is not None
        warnings.append(f"{only.name} stands alone; the test examples are split off from it")
        train, test = only, None
    files = {"train": read_ts(train)} | ({"test": read_ts(test)} if test else {})
    channels = len(files["train"].series[0])
    length = max(case.shape[1] for case in files["train"].series)
    check_memory(
        name, sum(len(f.series) for f in files.values()), (channels, length), 4, "store fewer or shorter series"
    )
    x = {}
    for part, cases in files.items():
        if len(cases.series[0]) != channels:
            raise ValueError(f"{test}: has {len(cases.series[0])} channels, but {train} has {channels}")
        x[part] = _stack(cases, part, channels, length, warnings)
    try:
        labels, classes = encode({part: np.array(c.labels) for part, c in files.items()}, files["train"].declared)
    except ValueError as error:
        raise ValueError(f"{train.parent / name}: {error}") from None
    if len(classes) < 2:
        raise ValueError(f"{train}: holds the single class {classes[0]!r}; at least two are needed")
    return Source(files["train"].name or name, classes, labels, in_memory(x, labels), warnings, kind="series")


def _stack(cases: Cases, part: str, channels: int, length: int, warnings: list[str]) -> Array:
    x = np.zeros((len(cases.series), channels, length), dtype=np.float32)
    shorter = longer = 0
    for row, case in zip(x, cases.series, strict=True):
        steps = min(case.shape[1], length)
        with np.errstate(over="ignore"):  # seen below
            row[:, :steps] = case[:, :steps]
        shorter += case.shape[1] < length
        longer += case.shape[1] > length
    total = len(x)
    if shorter:
        warnings.append(f"{shorter} of {total} {part} series are shorter than {length} steps: zeros at the end")
    if longer:
        warnings.append(f"{longer} of {total} {part} series are longer than the training series' {length} steps: cut")
    if cases.missing:
        warnings.append(f"{cases.missing} missing values in the {part} series were interpolated")
    if not np.isfinite(x).all():
        raise ValueError(f"{cases.name}: the {part} series hold values beyond the range of float32; scale them down")
    return x


def read_ts(path: Path) -> Cases:
    """Parse one file.

    Args:
        path: a ``.ts`` file.

    Raises:
        ValueError: the file and line that break the format, or what cannot be used (time stamps, regression).
    """
    header: dict[str, str] = {}
    series: list[Array] = []
    labels: list[str] = []
    missing = 0
    inside = False
    declared: tuple[str, ...] | None = None
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            text = line.strip()
            if not text or text.startswith("#"):
                continue
            if not inside:
                if not text.startswith("@"):
                    raise ValueError(f"{path}:{number}: expected a header line starting with @ before @data")
                key, _, value = text[1:].partition(" ")
                header[key.lower()] = value.strip()
                if key.lower() == "data":
                    declared = _check_header(path, header)
                    inside = True
                continue
            case, label, repaired = _case(f"{path}:{number}", text)
            if declared is not None and label not in declared:
                raise ValueError(
                    f"{path}:{number}: label {label!r} is not among the declared classes {', '.join(declared)}"
                )
            expected = len(series[0]) if series else _declared_channels(header)
            if expected is not None and len(case) != expected:
                raise ValueError(f"{path}:{number}: has {len(case)} channels, expected {expected}")
            series.append(case)
            labels.append(label)
            missing += repaired
    if not inside:
        raise ValueError(f"{path}: has no @data line; not a .ts file")
    if not series:
        raise ValueError(f"{path}: holds no cases after @data")
    return Cases(header.get("problemname", ""), series, labels, declared, missing)


def _check_header(path: Path, header: dict[str, str]) -> tuple[str, ...] | None:
    """Refuse what is not classification of plain series; the declared classes, if any are listed."""
    if header.get("timestamps", "false").lower().startswith("true"):
        raise ValueError(f"{path}: @timeStamps true: time stamps are not supported; resample to equal steps")
    if header.get("targetlabel", "false").lower().startswith("true"):
        raise ValueError(f"{path}: @targetLabel true: a regression problem; only classification is supported")
    flag, *names = header.get("classlabel", "false").split()
    if flag.lower() != "true":
        raise ValueError(f"{path}: @classLabel is not true: the cases carry no class labels")
    return tuple(dict.fromkeys(names)) or None


def _declared_channels(header: dict[str, str]) -> int | None:
    if header.get("dimensions", "").isdigit():
        return int(header["dimensions"])
    return 1 if header.get("univariate", "").lower() == "true" else None


def _case(where: str, text: str) -> tuple[Array, str, int]:
    """Values (channels, length), label and number of interpolated values of one line."""
    if text.startswith("("):
        raise ValueError(f"{where}: values with time stamps are not supported; resample to equal steps")
    *channels, label = (field.strip() for field in text.split(":"))
    if not channels or not label:
        raise ValueError(f"{where}: expected values, a colon and a class label")
    rows: list[Array] = []
    missing = 0
    for index, field in enumerate(channels):
        try:
            row = np.array(field.replace("?", "nan").split(","), dtype=np.float64)
        except ValueError:
            raise ValueError(f"{where}: channel {index} holds something that is not a number") from None
        if np.isinf(row).any():
            raise ValueError(f"{where}: channel {index} holds an infinite value")
        gaps = np.isnan(row)
        if gaps.all():
            raise ValueError(f"{where}: channel {index} has no value at all; remove the case")
        if gaps.any():
            missing += int(gaps.sum())
            row[gaps] = np.interp(np.flatnonzero(gaps), np.flatnonzero(~gaps), row[~gaps])
        rows.append(row)
    if len({len(row) for row in rows}) > 1:
        raise ValueError(f"{where}: channels of unequal length ({', '.join(str(len(row)) for row in rows)})")
    return np.stack(rows), label, missing
