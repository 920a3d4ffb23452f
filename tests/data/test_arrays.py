"""``.npz`` files: keys, layouts, types and every error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from torchconv.data import dataset, load
from torchconv.data.arrays import guess_layout

Save = Callable[..., str]
Y = np.arange(20) % 2


def uint8(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20, *shape), dtype=np.uint8)


def real(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(20, *shape)).astype(np.float32)


@pytest.mark.parametrize(
    ("x", "expected", "kind"),
    [
        (real(30), (1, 30), "series"),
        (uint8(9, 30), (1, 9, 30), "image"),
        (real(28, 28), (1, 28, 28), "image"),
        (real(6, 100), (6, 100), "series"),
        (uint8(8, 8, 3), (3, 8, 8), "image"),
        (uint8(3, 8, 8), (3, 8, 8), "image"),
        (uint8(8, 9, 3), (3, 8, 9), "image"),
        (uint8(3, 8, 9), (3, 8, 9), "image"),
        (real(13, 8, 8), (13, 8, 8), "array"),
        (real(8, 8, 13), (13, 8, 8), "array"),
        (real(1, 4, 5, 6), (1, 4, 5, 6), "array"),
    ],
)
def test_layout_is_told_from_the_shape(npz: Save, x: np.ndarray, expected: tuple[int, ...], kind: str) -> None:
    data = load(npz(x=x, y=Y))
    assert tuple(data.train.x.shape[1:]) == expected
    assert data.kind == kind
    assert data.train.x.dtype == (torch.uint8 if x.dtype == np.uint8 else torch.float32)


def test_values_survive_the_change_of_layout(npz: Save) -> None:
    x = uint8(8, 9, 3)
    data = load(npz(x=x, y=Y))
    rows = sorted(row.tobytes() for part in (data.train, data.val, data.test) for row in part.x.numpy())
    assert rows == sorted(row.tobytes() for row in np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


@pytest.mark.parametrize(
    ("layout", "shape", "expected"),
    [
        ("NLC", (28, 20), (20, 28)),
        ("NCL", (28, 28), (28, 28)),
        ("nhw", (3, 50), (1, 3, 50)),
        ("NCHW", (3, 3, 3), (3, 3, 3)),
        ("NDHW", (4, 5, 6), (1, 4, 5, 6)),
        ("NHWC", (3, 8, 8), (8, 3, 8)),
        ("NDHWC", (4, 5, 6, 2), (2, 4, 5, 6)),
    ],
)
def test_layout_in_the_file_wins(npz: Save, layout: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    data = load(npz(x=real(*shape), y=Y, layout=layout))
    assert tuple(data.train.x.shape[1:]) == expected
    assert data.warnings == ()


@pytest.mark.parametrize("shape", [(3, 3, 3), (16, 20, 30), (2, 9, 4)])
def test_ambiguous_shapes_ask_for_a_layout(npz: Save, shape: tuple[int, ...]) -> None:
    assert guess_layout((20, *shape), np.dtype(np.float32)) is None
    with pytest.raises(ValueError, match=r"may be channels-first or channels-last; add layout='NCHW' or layout='NHWC'"):
        load(npz(x=real(*shape), y=Y))


def test_three_float_axes_say_how_they_were_read(npz: Save) -> None:
    assert "read as grey images (N, H, W); a 'layout' entry" in load(npz(x=real(28, 28), y=Y)).warnings[0]
    assert "read as series (N, C, L)" in load(npz(x=real(6, 50), y=Y)).warnings[0]


def test_parts_of_the_file_are_kept(npz: Save) -> None:
    x = uint8(8, 8)
    data = load(npz(x_train=x, y_train=Y, x_val=x[:4], y_val=Y[:4], x_test=x[:6], y_test=Y[:6], extra=np.zeros(3)))
    assert (len(data.train), len(data.val), len(data.test)) == (20, 4, 6)
    assert np.array_equal(data.test.x[:, 0].numpy(), x[:6])
    data = load(npz(x_train=x, y_train=Y, x_val=x[:4], y_val=Y[:4]))
    assert (len(data.train), len(data.val), len(data.test)) == (16, 4, 4)


def test_labels_of_every_kind(npz: Save) -> None:
    x = uint8(8, 8)
    assert load(npz(x=x, y=Y * 5 - 2)).classes == ("-2", "3")
    assert load(npz(x=x, y=np.array(["yes", "no"])[Y])).classes == ("no", "yes")
    assert load(npz(x=x, y=np.array([b"yes", b"no"])[Y])).classes == ("no", "yes")
    assert load(npz(x=x, y=Y.astype(bool))).classes == ("0", "1")
    assert load(npz(x=x, y=Y[:, None].astype(np.uint8))).classes == ("0", "1")
    assert load(npz(x=x, y=Y, classes=["cat", "dog"])).classes == ("cat", "dog")
    assert load(npz(x=x, y=Y * 2, classes=["cat", "dog", "emu"])).classes == ("cat", "emu")
    assert load(npz(x=x, y=np.array(["cat", "dog"])[Y], classes=["dog", "cat"])).classes == ("cat", "dog")


def test_types(npz: Save) -> None:
    assert load(npz(x=real(30).astype(np.float64), y=Y)).warnings == ()
    assert load(npz(x=(real(8, 8) > 0), y=Y)).train.x.unique().tolist() == [0, 255]
    data = load(npz(x=(real(30) * 1000).astype(np.int16), y=Y))
    assert data.train.x.dtype == torch.float32
    assert data.warnings == ("x was converted from int16 to float32",)


def test_reading_leaves_writable_tensors(npz: Save) -> None:
    data = load(npz(x_train=uint8(8, 8), y_train=Y, x_test=uint8(8, 8), y_test=Y))
    data.test.x.zero_()


def put(x: np.ndarray, value: float) -> np.ndarray:
    x = x.copy()
    x[0, 0] = value
    return x


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": uint8(8, 8)}, r"needs the arrays x and y, or x_train.*; has x$"),
        ({"images": uint8(8, 8)}, "has images"),
        ({}, "has none"),
        ({"x": uint8(8, 8), "y": Y, "x_train": uint8(8, 8), "y_train": Y}, "has both x and x_train"),
        ({"x_train": uint8(8, 8), "y_train": Y, "x_test": uint8(8, 8)}, "x_test and y_test come together"),
        ({"x_test": uint8(8, 8), "y_test": Y}, "needs the arrays"),
        ({"x": uint8(8, 8), "y": Y[:-1]}, "x has 20 examples but y has 19 labels"),
        ({"x": put(real(30), np.nan), "y": Y}, "x holds 1 values that are NaN or infinite"),
        ({"x": put(real(30), np.inf), "y": Y}, "NaN or infinite"),
        ({"x": put(real(30).astype(np.float64), 1e300), "y": Y}, "beyond the range of float32"),
        ({"x": uint8(8, 8), "y": Y * 0}, "y holds the single class '0'"),
        ({"x": uint8(8, 8)[:0], "y": Y[:0]}, r"x is empty \(shape \(0, 8, 8\)\)"),
        ({"x": uint8(8, 0), "y": Y}, "x is empty"),
        ({"x": uint8(), "y": Y}, "x has 1 axes; examples need 2 to 5"),
        ({"x": uint8(2, 2, 2, 2, 2), "y": Y}, "x has 6 axes"),
        ({"x": uint8(8, 8), "y": np.eye(2)[Y]}, r"y has shape \(20, 2\).*one-hot: store the argmax"),
        ({"x": uint8(8, 8), "y": Y + 0.5}, "class labels are integers or strings"),
        ({"x": real(30) + 0j, "y": Y}, "x holds complex64"),
        ({"x": np.array([{}] * 20, dtype=object), "y": Y}, r"x is an object array \(a pickle\)"),
        ({"x": uint8(8, 8), "y": np.array(["a", "b"], dtype=object)[Y]}, "y is an object array"),
        ({"x": uint8(8, 8), "y": Y, "classes": np.array(["a", None])}, "classes is an object array"),
        ({"x": uint8(8, 8), "y": Y, "layout": "NHWC"}, "layout='NHWC' for x of 3 axes: did you mean NHW"),
        ({"x": uint8(8, 8), "y": Y, "classes": ["cat"]}, "'classes' has 1 names, which do not cover the labels 0 to 1"),
        ({"x": uint8(8, 8), "y": Y - 1, "classes": ["a", "b"]}, "do not cover the labels -1 to 0"),
        ({"x": uint8(8, 8), "y": (np.arange(20) == 0) * 1}, r"class '1' has 1 training example\(s\), but 3 are needed"),
        (
            {"x_train": uint8(8, 8), "y_train": Y, "x_test": uint8(8, 9), "y_test": Y},
            r"x_test is uint8 \(1, 8, 9\) an example, but the training part is uint8 \(1, 8, 8\)",
        ),
        (
            {"x_train": uint8(8, 8), "y_train": Y, "x_test": real(8, 8), "y_test": Y},
            "x_test is float32",
        ),
        (
            {"x_train": uint8(8, 8), "y_train": Y, "x_test": uint8(8, 8), "y_test": Y + 1},
            "class '2' occurs in the test part but not in the training part",
        ),
    ],
)
def test_errors(npz: Save, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(npz(**arrays))


def test_axes_that_differ_between_parts(npz: Save) -> None:
    with pytest.raises(ValueError, match="x_test has 4 axes, but the layout NHW has 3"):
        load(npz(x_train=uint8(8, 8), y_train=Y, x_test=uint8(8, 8, 1), y_test=Y, layout="NHW"))


def test_not_a_zip(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    path.write_bytes(b"PK nonsense")
    with pytest.raises(ValueError, match=r"not a readable \.npz file"):
        load(str(path))


def test_damaged_content(npz: Save) -> None:
    path = Path(npz(x=uint8(8, 8), y=Y))
    content = path.read_bytes()
    start = content.index(uint8(8, 8).tobytes()[:16])
    path.write_bytes(content[:start] + b"damaged!" + content[start + 8 :])
    with pytest.raises(ValueError, match=r"set\.npz: .*Bad CRC-32"):
        load(str(path))


def test_memory_is_checked_before_reading(npz: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    path = npz(x=uint8(8, 8), y=Y)
    monkeypatch.setattr(dataset, "MAX_BYTES", 1000)
    monkeypatch.setattr(np, "load", None)
    with pytest.raises(ValueError, match=r"20 examples of 8x8 need .*; store fewer"):
        load(path)
