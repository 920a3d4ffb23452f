"""``FILE.npz``: arrays of examples and labels.

Keys: ``x`` and ``y``, or ``x_train``, ``y_train`` with ``x_test``, ``y_test`` and/or ``x_val``, ``y_val``; a missing
part is split off. Optional: ``layout`` (a string, below) and ``classes`` (names for the labels 0..K-1). Other keys are
ignored.

``x`` is uint8 (kept), bool (0 / 255) or a number type (made float32); ``y`` is an integer or a string for each example.
Without ``layout`` the axes are told from the shape, the first always counting examples:

- 2 axes: (N, L), series of one channel.
- 3 axes: (N, H, W), grey images, when uint8 or when the longer side is at most twice the shorter and that at least 8;
  otherwise (N, C, L), series.
- 4 axes: if exactly two neighbouring axes are equal they are H and W, and the remaining one is the channels; otherwise
  the channels are the one of axis 1 and the last that is at most 4; otherwise ``layout`` is needed.
- 5 axes: (N, C, D, H, W).

``layout`` overrides this: NL, NCL, NLC, NHW, NCHW, NHWC, NDHW, NCDHW or NDHWC. Object arrays are pickles and are
refused.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from torchconv._common import did_you_mean
from torchconv.data.dataset import check_memory
from torchconv.data.source import Source, encode, in_memory

Array = NDArray[Any]

LAYOUTS = {2: ("NL",), 3: ("NCL", "NLC", "NHW"), 4: ("NCHW", "NHWC", "NDHW"), 5: ("NCDHW", "NDHWC")}
_PARTS = ("train", "val", "test")


def open_npz(path: Path) -> Source:
    """Read and check an ``.npz`` file; see the module's text for the keys and the layout rule."""
    headers = _headers(path)
    parts = _parts(path, set(headers))
    warnings: list[str] = []
    for key in (*(key for pair in parts.values() for key in pair), "layout", "classes"):
        if key in headers and headers[key][1].hasobject:
            raise ValueError(f"{path}: {key} is an object array (a pickle); store numbers, or strings of dtype str")
    whole = [headers[x_key] for x_key, _ in parts.values()]
    widths = [1 if dtype.itemsize == 1 else 4 for _, dtype in whole]  # in memory: uint8 or float32
    size = sum(math.prod(shape) * width for (shape, _), width in zip(whole, widths, strict=True))
    one = whole[0][0][1:]  # parts of other shapes are refused later; counted in examples of the first until then
    count = size // max(1, math.prod(one) * widths[0])
    check_memory(str(path), count, one, widths[0], "store fewer or smaller examples")
    x: dict[str, Array] = {}
    y: dict[str, Array] = {}
    with np.load(path, allow_pickle=False) as file:
        layout = str(_read(path, file, "layout")) if "layout" in headers else None
        names = [str(name) for name in _read(path, file, "classes").ravel()] if "classes" in headers else None
        for part, (x_key, y_key) in parts.items():
            data = _read(path, file, x_key)
            if part == "train" or layout is None:
                layout = _layout(path, x_key, data, layout, warnings)
            x[part] = _examples(path, x_key, data, layout, warnings)
            y[part] = _labels(path, y_key, _read(path, file, y_key), len(x[part]), x_key)
            if x[part].shape[1:] != x["train"].shape[1:] or x[part].dtype != x["train"].dtype:
                raise ValueError(
                    f"{path}: {x_key} is {x[part].dtype} {x[part].shape[1:]} an example, but the training part is "
                    f"{x['train'].dtype} {x['train'].shape[1:]}"
                )
    try:
        labels, classes = encode(y)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if names is not None:
        classes = _rename(path, classes, names)
    if len(classes) < 2:
        raise ValueError(f"{path}: {parts['train'][1]} holds the single class {classes[0]!r}; at least two are needed")
    return Source(path.stem, classes, labels, in_memory(x, labels), warnings)


def _read(path: Path, file: Any, key: str) -> Array:
    try:
        return file[key]
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path}: {key} cannot be read ({error}); write the file again with numpy.savez") from None


def _headers(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape and type of every array, without reading the arrays."""
    found: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if not name.endswith(".npy"):
                    continue
                with archive.open(name) as file:
                    version = npy.read_magic(file)
                    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
                    shape, _, dtype = read(file)
                    found[name.removesuffix(".npy")] = (shape, dtype)
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise ValueError(f"{path}: not a readable .npz file ({error}); write it with numpy.savez") from None
    return found


def _parts(path: Path, keys: set[str]) -> dict[str, tuple[str, str]]:
    """part -> its two keys, the training part first."""
    if {"x", "y"} <= keys:
        if keys & {f"x_{part}" for part in _PARTS}:
            raise ValueError(f"{path}: has both x and x_train/x_val/x_test; keep one of the two forms")
        return {"train": ("x", "y")}
    for part in _PARTS:
        if (f"x_{part}" in keys) != (f"y_{part}" in keys):
            raise ValueError(f"{path}: x_{part} and y_{part} come together, but only one is there")
    if "x_train" not in keys:
        raise ValueError(
            f"{path}: needs the arrays x and y, or x_train, y_train, x_test, y_test; "
            f"has {', '.join(sorted(keys)) or 'none'}"
        )
    return {part: (f"x_{part}", f"y_{part}") for part in _PARTS if f"x_{part}" in keys}


def guess_layout(shape: tuple[int, ...], dtype: np.dtype[Any]) -> str | None:
    """The layout of an array by the module's rule; None when only the user can know."""
    match len(shape):
        case 2:
            return "NL"
        case 3:
            low, high = sorted(shape[1:])
            return "NHW" if dtype == np.uint8 or (low >= 8 and high <= 2 * low) else "NCL"
        case 4:
            _, a, b, c = shape
            if (a == b) != (b == c):
                return "NHWC" if a == b else "NCHW"
            if (a <= 4) != (c <= 4):
                return "NCHW" if a <= 4 else "NHWC"
            return None
        case 5:
            return "NCDHW"
    return None


def _layout(path: Path, key: str, data: Array, given: str | None, warnings: list[str]) -> str:
    if data.ndim not in LAYOUTS:
        raise ValueError(f"{path}: {key} has {data.ndim} axes; examples need 2 to 5, such as (N, H, W, C) or (N, C, L)")
    allowed = LAYOUTS[data.ndim]
    if given is not None:
        if given.upper() not in allowed:
            raise ValueError(f"{path}: layout={given!r} for {key} of {data.ndim} axes: {did_you_mean(given, allowed)}")
        return given.upper()
    guess = guess_layout(data.shape, data.dtype)
    if guess is None:
        raise ValueError(
            f"{path}: {key} of shape {data.shape} may be channels-first or channels-last; "
            f"add layout='NCHW' or layout='NHWC' to the file"
        )
    if data.ndim == 3 and data.dtype != np.uint8:
        meaning = "grey images (N, H, W)" if guess == "NHW" else "series (N, C, L)"
        warnings.append(
            f"{key} of shape {data.shape} was read as {meaning}; a 'layout' entry in the file overrides this"
        )
    return guess


def _examples(path: Path, key: str, data: Array, layout: str, warnings: list[str]) -> Array:
    """Checked examples as (N, C, \\*spatial), uint8 or float32."""
    if data.ndim != len(layout):
        raise ValueError(f"{path}: {key} has {data.ndim} axes, but the layout {layout} has {len(layout)}")
    if 0 in data.shape:
        raise ValueError(f"{path}: {key} is empty (shape {data.shape})")
    if data.dtype == np.bool_:
        data = data.astype(np.uint8) * 255
    elif data.dtype.kind not in "iuf":
        raise ValueError(f"{path}: {key} holds {data.dtype}; examples are uint8 or real numbers")
    elif data.dtype != np.uint8:
        bad = int(data.size - np.isfinite(data).sum()) if data.dtype.kind == "f" else 0
        if bad:
            raise ValueError(f"{path}: {key} holds {bad} values that are NaN or infinite; replace or remove them")
        if data.dtype != np.float32:
            with np.errstate(over="ignore"):
                converted = data.astype(np.float32)
            if not np.isfinite(converted).all():
                raise ValueError(f"{path}: {key} holds values beyond the range of float32; scale them down")
            if data.dtype.kind in "iu":
                warnings.append(f"{key} was converted from {data.dtype} to float32")
            data = converted
    axes = layout.replace("N", "")
    if "C" not in axes:
        return np.ascontiguousarray(data[:, None])
    return np.ascontiguousarray(np.moveaxis(data, 1 + axes.index("C"), 1))


def _labels(path: Path, key: str, y: Array, examples: int, x_key: str) -> Array:
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1:
        raise ValueError(
            f"{path}: {key} has shape {y.shape}; it needs one label an example (one-hot: store the argmax)"
        )
    if len(y) != examples:
        raise ValueError(f"{path}: {x_key} has {examples} examples but {key} has {len(y)} labels")
    if y.dtype.kind == "S":
        y = np.char.decode(y, "utf-8")
    if y.dtype.kind == "b":
        y = y.astype(np.int64)
    if y.dtype.kind not in "iuU":
        raise ValueError(
            f"{path}: {key} holds {y.dtype}; class labels are integers or strings (regression is not supported)"
        )
    return y


def _rename(path: Path, found: tuple[str, ...], names: list[str]) -> tuple[str, ...]:
    """Names for integer labels from the file's ``classes``."""
    if set(found) <= set(names):
        return found
    if all(label.isdecimal() and int(label) < len(names) for label in found):
        return tuple(names[int(label)] for label in found)
    raise ValueError(
        f"{path}: 'classes' has {len(names)} names, which do not cover the labels {found[0]} to {found[-1]}"
    )
