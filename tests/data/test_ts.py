"""``.ts`` files: parsing, repairs, pairs of files and every error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from torchconv.data import load
from torchconv.data.ts import read_ts

HEADER = "#comment\n@problemName Toy\n@timeStamps false\n@univariate true\n@classLabel true a b\n@data\n"
WIDE = "@problemName Toy\n@univariate false\n@dimensions 2\n@classLabel true a b\n@data\n"


def write(path: Path, *cases: str, header: str = HEADER) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(header + "\n".join(cases) + "\n")
    return path


def cases(count: int = 6, length: int = 4) -> list[str]:
    return [",".join(str(i + 10 * n) for i in range(length)) + ":" + "ab"[n % 2] for n in range(count)]


def pair(folder: Path, train: list[str] | None = None, test: list[str] | None = None, header: str = HEADER) -> Path:
    write(folder / "Toy_TEST.ts", *(test or cases(4)), header=header)
    return write(folder / "Toy_TRAIN.ts", *(train or cases()), header=header)


def test_parser(tmp_path: Path) -> None:
    found = read_ts(write(tmp_path / "x.ts", "1,2,-3e1:4,5,6.5:a", "", "0, 1 ,2:3,4,5:b", header=WIDE))
    assert (found.name, found.labels, found.declared, found.missing) == ("Toy", ["a", "b"], ("a", "b"), 0)
    np.testing.assert_array_equal(found.series, [[[1, 2, -30], [4, 5, 6.5]], [[0, 1, 2], [3, 4, 5]]])


@pytest.mark.parametrize("which", ["Toy_TRAIN.ts", "Toy_TEST.ts", ""])
def test_both_files_are_found_from_one_or_the_folder(tmp_path: Path, which: str) -> None:
    pair(tmp_path)
    data = load(str(tmp_path / which))
    assert (data.name, data.kind, data.classes, data.ndim) == ("Toy", "series", ("a", "b"), 1)
    assert (len(data.train), len(data.val), len(data.test)) == (4, 2, 4)
    assert data.train.x.shape == (4, 1, 4)
    assert data.test.x[:, 0, 0].tolist() == [0, 10, 20, 30]
    assert data.warnings == ()


@pytest.mark.parametrize(("below", "spec"), [("ucr_uea/Toy", "Toy"), ("Toy", "toy"), ("", "Toy")])
def test_bare_name_under_root(tmp_path: Path, below: str, spec: str) -> None:
    pair(tmp_path / below)
    assert load(spec, root=tmp_path).name == "Toy"


def test_bare_name_under_the_environment_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair(tmp_path / "ucr_uea" / "Toy")
    monkeypatch.setenv("TORCHCONV_DATA", str(tmp_path))
    assert load("Toy").name == "Toy"
    with pytest.raises(FileNotFoundError, match="did you mean Toy"):
        load("Toyy")


@pytest.mark.parametrize("name", ["Toy_TRAIN.ts", "Toy_TEST.ts", "Toy.ts"])
def test_a_file_alone_is_split(tmp_path: Path, name: str) -> None:
    data = load(str(write(tmp_path / name, *cases(20))))
    assert (len(data.train), len(data.val), len(data.test)) == (14, 2, 4)
    assert "stands alone; the test examples are split off" in data.warnings[0]


def test_missing_values_are_interpolated_and_counted(tmp_path: Path) -> None:
    path = pair(tmp_path, ["?,1,NaN,5:a", "0,1,2,?:a", *cases(4)])
    found = read_ts(path)
    assert found.missing == 3
    np.testing.assert_array_equal(np.stack(found.series[:2])[:, 0], [[1, 1, 3, 5], [0, 1, 2, 2]])
    assert "3 missing values in the train series were interpolated" in load(str(path)).warnings


def test_unequal_lengths_are_padded_and_cut(tmp_path: Path) -> None:
    train = ["1,2:a", "1,2,3:a", "4,5,6:b", "4,5,6:b", "7,8,9:a", "7,8,9:b"]
    data = load(str(pair(tmp_path, train, ["1:a", "1,2,3,4,5:b", "1,2,3:a"])))
    assert data.size == (3,)
    assert data.test.x[:, 0].tolist() == [[1, 0, 0], [1, 2, 3], [1, 2, 3]]
    assert data.warnings == (
        "1 of 6 train series are shorter than 3 steps: zeros at the end",
        "1 of 3 test series are shorter than 3 steps: zeros at the end",
        "1 of 3 test series are longer than the training series' 3 steps: cut",
    )


def test_channels(tmp_path: Path) -> None:
    wide = [case.replace(":", ":9,8,7,6:") for case in cases()]
    data = load(str(pair(tmp_path, wide, wide, WIDE)))
    assert data.train.x.shape == (4, 2, 4)
    assert torch.equal(data.train.x[:, 1], torch.tensor([9.0, 8, 7, 6]).expand(4, 4))


def test_declared_order_of_classes_is_kept(tmp_path: Path) -> None:
    header = HEADER.replace("true a b", "true b a unused")
    assert load(str(pair(tmp_path, header=header))).classes == ("b", "a")


@pytest.mark.parametrize(
    ("header", "lines", "message"),
    [
        (HEADER.replace("timeStamps false", "timeStamps true"), ["1,2:a"], "time stamps are not supported; resample"),
        (HEADER, ["(0,1),(1,2):a"], r":7: values with time stamps"),
        (HEADER.replace("@classLabel true a b", "@targetLabel true"), ["1,2:0.5"], "a regression problem"),
        (HEADER.replace("true a b", "false"), ["1,2"], "carry no class labels"),
        (HEADER.replace("@classLabel true a b\n", ""), ["1,2:a"], "carry no class labels"),
        (HEADER, ["1,2:a", "1,2:c"], r":8: label 'c' is not among the declared classes a, b"),
        (HEADER, ["1,2:3,4:a"], r":7: has 2 channels, expected 1"),
        (WIDE, ["1,2:a"], "has 1 channels, expected 2"),
        (WIDE.replace("@dimensions 2\n", ""), ["1:2:a", "1:b"], "has 1 channels, expected 2"),
        (WIDE, ["1,2:3:a"], r"channels of unequal length \(2, 1\)"),
        (HEADER, ["1,x:a"], "channel 0 holds something that is not a number"),
        (HEADER, ["1,,2:a"], "not a number"),
        (WIDE, ["1,2::a"], "channel 1 holds something that is not a number"),
        (HEADER, ["1,inf:a"], "channel 0 holds an infinite value"),
        (HEADER, ["?,?:a"], "channel 0 has no value at all; remove the case"),
        (HEADER, ["1,2"], "expected values, a colon and a class label"),
        (HEADER, ["1,2:"], "expected values, a colon and a class label"),
        (HEADER, [], "holds no cases after @data"),
        (HEADER.replace("@data\n", ""), [], "has no @data line"),
        ("1,2:a\n" + HEADER, [], ":1: expected a header line starting with @"),
        (HEADER, ["1,2:a", "1,3:a", "1,4:a"], "holds the single class 'a'"),
        (HEADER, ["1,2:a", "1,3:a", "1,4:a", "1,5:b"], "class 'b' has 1 training"),
        (HEADER, ["1e300,2:a", "1,3:b"], "beyond the range of float32"),
    ],
)
def test_errors(tmp_path: Path, header: str, lines: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(str(write(tmp_path / "Toy.ts", *lines, header=header)))


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    pair(tmp_path / "a")
    wide = [case.replace(":", ":9,8,7,6:") for case in cases()]
    write(tmp_path / "a" / "Toy_TEST.ts", *wide, header=WIDE)
    with pytest.raises(ValueError, match=r"Toy_TEST\.ts: has 2 channels, but .*Toy_TRAIN\.ts has 1"):
        load(str(tmp_path / "a"))
    header = HEADER.replace("true a b", "true")
    pair(tmp_path / "b", test=["1,2,3,4:c"], header=header)
    with pytest.raises(ValueError, match="class 'c' occurs in the test part"):
        load(str(tmp_path / "b"))


def test_folder_with_several_problems(tmp_path: Path) -> None:
    pair(tmp_path)
    write(tmp_path / "Other_TRAIN.ts", *cases())
    with pytest.raises(ValueError, match=r"holds 2 problems \(Other, Toy.*name one of its files"):
        load(str(tmp_path))
    assert load("Other", root=tmp_path).name == "Toy"  # the name in the header is shown
