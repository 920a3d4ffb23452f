"""Folders of images: layouts, picture formats, sizes, unreadable files and every error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.conftest import picture
from torchconv.data import Split, dataset, load

Make = Callable[..., Path]


def everything(*splits: Split) -> torch.Tensor:
    return torch.cat([s.x for s in splits])


def test_classes_in_folders(pictures: Make) -> None:
    data = load(str(pictures(("dog", "cat", "10", "9"))))
    assert data.classes == ("10", "9", "cat", "dog")
    assert (data.name, data.kind, data.warnings) == ("set", "image", ())
    assert data.train.x.shape[1:] == (1, 8, 8)
    x = everything(data.train, data.val, data.test)
    assert sorted(x[:, 0, 0, 0].tolist()) == list(range(1, 41))
    dogs = data.train.x[data.train.y == 3][:, 0, 0, 0]
    assert ((dogs >= 1) & (dogs <= 10)).all()


def test_numeric_classes_in_order(pictures: Make) -> None:
    assert load(str(pictures(("10", "9", "1")))).classes == ("1", "9", "10")


def test_split_folders(pictures: Make) -> None:
    pictures(each=6, below="set/train")
    pictures(each=2, below="set/Valid")
    data = load(str(pictures(each=3, below="set/test")))
    assert (len(data.train), len(data.val), len(data.test)) == (12, 4, 6)
    assert data.warnings == ()


def test_split_folders_without_test(pictures: Make) -> None:
    pictures(each=10, below="set/train")
    data = load(str(pictures(each=2, below="set/val")))
    assert (len(data.train), len(data.val), len(data.test)) == (16, 4, 4)
    assert "there is no test folder" in data.warnings[0]


def test_class_missing_from_test_is_told(pictures: Make) -> None:
    pictures(each=10, below="set/train")
    data = load(str(pictures(("cat",), each=2, below="set/test")))
    assert data.warnings == ("the test split has no example of class 'dog'",)


def test_limit_decodes_only_what_is_kept(pictures: Make, tmp_path: Path) -> None:
    root = pictures(each=30)
    whole = load(str(root))
    for extra in range(200):
        picture(root / "cat" / f"new{extra}.png", 3)
    data = load(str(root), limit=20)
    assert len(data.train) == 20
    assert torch.bincount(data.train.y).tolist() == [18, 2]
    assert len(whole.train) == 41


def test_common_small_size_is_kept_even_when_not_square(pictures: Make) -> None:
    data = load(str(pictures(size=(12, 20))))
    assert data.size == (20, 12)
    assert data.warnings == ()


def test_large_or_unequal_images_become_64(pictures: Make) -> None:
    large = load(str(pictures(size=(120, 100), each=4, below="large")))
    assert large.size == (64, 64)
    assert "images are 100 x 120: scaled to 64 x 64" in large.warnings[0]
    pictures(("cat",), each=4, below="mixed")
    mixed = load(str(pictures(("dog",), each=4, below="mixed", size=(10, 9))))
    assert mixed.size == (64, 64)
    assert "sides of 8 to 10" in mixed.warnings[0]
    assert load(str(large_root := pictures(size=(120, 100), each=4, below="large")), image_size=24).size == (24, 24)
    assert load(str(large_root), image_size=24).warnings == ()


def test_centre_crop(tmp_path: Path) -> None:
    pixels = np.zeros((10, 30), dtype=np.uint8)
    pixels[:, 10:20] = 200
    for name in ("a", "b"):
        for i in range(3):
            path = tmp_path / "set" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    data = load(str(tmp_path / "set"), image_size=10)
    assert (data.train.x == 200).all()


def formats(tmp_path: Path, special: Image.Image, name: str, **options: object) -> str:
    """A set of grey squares with one special picture in class a's every file."""
    for i in range(3):
        (tmp_path / "a").mkdir(exist_ok=True)
        special.save(tmp_path / "a" / f"{i}{name}", **options)
        picture(tmp_path / "b" / f"{i}.png", 7)
    return str(tmp_path)


def test_colour_makes_three_channels(tmp_path: Path) -> None:
    data = load(formats(tmp_path, Image.new("RGB", (8, 8), (10, 20, 30)), ".png"))
    x = everything(data.train, data.val, data.test)
    assert x.shape[1:] == (3, 8, 8)
    y = torch.cat([data.train.y, data.val.y, data.test.y])
    assert x[y == 0][0, :, 0, 0].tolist() == [10, 20, 30]
    assert x[y == 1][0, :, 0, 0].tolist() == [7, 7, 7]


@pytest.mark.parametrize(
    ("mode", "colour", "expected", "warning"),
    [
        ("I;16", 65535, [255], "3 images of 16 bits were reduced to 8"),
        ("I;16", 257 * 9, [9], "16 bits"),
        ("1", 1, [255], None),
        ("LA", (100, 0), [255], "3 images with transparency were put on white"),
        ("LA", (100, 255), [100], "transparency"),
        ("RGBA", (10, 20, 30, 0), [255, 255, 255], "transparency"),
        ("P", 0, [0, 0, 0], None),
    ],
)
def test_pixel_formats(tmp_path: Path, mode: str, colour: object, expected: list[int], warning: str | None) -> None:
    data = load(formats(tmp_path, Image.new(mode, (8, 8), colour), ".png"))
    assert data.train.x[data.train.y == 0][0, :, 0, 0].tolist() == expected
    assert data.channels == len(expected)
    assert (warning is None and not data.warnings) or (warning or "") in data.warnings[0]


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    pixels = np.zeros((6, 8), dtype=np.uint8)
    pixels[0] = 200  # the top row of the file is the right column of the upright picture
    exif = Image.Exif()
    exif[0x0112] = 6
    data = load(formats(tmp_path, Image.fromarray(pixels), ".png", exif=exif), image_size=None)
    assert data.size == (64, 64)  # 8 x 6 upright beside 8 x 8
    (tmp_path / "b").rename(tmp_path / "c")
    for i in range(3):
        picture(tmp_path / "c" / f"{i}.png", 7, (6, 8))
    data = load(str(tmp_path))
    assert data.size == (8, 6)
    assert data.train.x[data.train.y == 0][0, 0].tolist() == [[0, 0, 0, 0, 0, 200]] * 8


def test_jpeg_of_a_photograph_scales_while_decoding(tmp_path: Path) -> None:
    data = load(formats(tmp_path, Image.new("RGB", (1600, 1200), (200, 100, 50)), ".jpg"), image_size=32)
    picked = data.train.x[data.train.y == 0][0].float().mean((1, 2))
    assert torch.allclose(picked, torch.tensor([200.0, 100.0, 50.0]), atol=3)


def test_unreadable_images_are_left_out_and_listed(pictures: Make) -> None:
    root = pictures(each=30)
    (root / "cat" / "3.png").write_bytes(b"not a picture")
    whole = (root / "dog" / "4.png").read_bytes()
    (root / "dog" / "4.png").write_bytes(whole[: len(whole) // 2])  # a header, but no end
    data = load(str(root))
    assert len(data.train) + len(data.val) + len(data.test) == 58
    assert "2 of 60 images could not be read and were left out" in data.warnings[0]
    assert "cat/3.png (not an image)" in data.warnings[0]
    assert "dog/4.png" in data.warnings[0]


def test_labels_stay_with_their_images_when_some_are_left_out(pictures: Make) -> None:
    root = pictures(each=40)
    for i in (0, 7, 20):
        (root / "cat" / f"{i}.png").write_bytes(b"")
    data = load(str(root))
    for part in (data.train, data.val, data.test):
        assert ((part.x[:, 0, 0, 0] > 40).long() == part.y).all()


def test_too_many_unreadable(pictures: Make) -> None:
    root = pictures(each=10)
    for i in range(7):
        (root / "cat" / f"{i}.png").write_bytes(b"x")
    with pytest.raises(
        ValueError, match=r"7 of 20 images cannot be read: .*not an image.*and 2 more; replace or remove"
    ):
        load(str(root))


def test_a_class_without_one_readable_image(pictures: Make) -> None:
    pictures(("cat", "dog"), each=50)
    root = pictures(("emu",), each=4)
    for file in (root / "emu").iterdir():
        file.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"no image of class 'emu' could be read for training"):
        load(str(root))


def test_float_images_are_unreadable(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"floating-point pixels; store such images in an \.npz"):
        load(formats(tmp_path, Image.new("F", (8, 8), 0.5), ".tif"))
    with pytest.raises(ValueError, match="32-bit pixels outside"):
        load(formats(tmp_path, Image.new("I", (8, 8), 70000), ".tif"))


def test_other_files_and_hidden_ones_are_ignored(pictures: Make) -> None:
    root = pictures()
    (root / "cat" / "notes.txt").write_text("meow")
    (root / "cat" / "._0.png").write_bytes(b"x")
    (root / ".cache").mkdir()
    (root / "__MACOSX").mkdir()
    (root / "README.md").write_text("pets")
    assert load(str(root)).num_classes == 2


def test_no_class_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no class folders; expected .*/CLASS/\*\.png .*chosen by name"):
        load(str(tmp_path))


def test_single_class(pictures: Make) -> None:
    with pytest.raises(ValueError, match="has the single class 'cat'"):
        load(str(pictures(("cat",))))


def test_empty_class(pictures: Make) -> None:
    root = pictures()
    (root / "emu").mkdir()
    with pytest.raises(ValueError, match=r"emu: the class holds no images"):
        load(str(root))


def test_images_outside_the_classes(pictures: Make) -> None:
    root = pictures()
    picture(root / "stray.png")
    with pytest.raises(ValueError, match=r"1 images such as stray\.png lie outside any class folder"):
        load(str(root))
    (root / "stray.png").unlink()
    pictures(below="two/train")
    picture(root.parent / "two" / "stray.png")
    with pytest.raises(ValueError, match="outside any class folder"):
        load(str(root.parent / "two"))


def test_folders_within_a_class(pictures: Make) -> None:
    root = pictures()
    picture(root / "cat" / "tabby" / "0.png")
    with pytest.raises(ValueError, match=r"cat: a class folder holds the folder 'tabby'"):
        load(str(root))


def test_split_folders_beside_class_folders(pictures: Make) -> None:
    pictures(below="set/train")
    with pytest.raises(ValueError, match=r"mixes train with the folder 'cat'"):
        load(str(pictures(below="set")))


def test_the_same_split_twice(pictures: Make) -> None:
    for name in ("train", "val", "valid"):
        pictures(below=f"set/{name}")
    with pytest.raises(ValueError, match=r"the same split twice \(train, val, valid\)"):
        load(str(pictures(below="set/train")))


def test_test_class_unknown_to_training(pictures: Make) -> None:
    pictures(below="set/train")
    with pytest.raises(ValueError, match=r"class 'emu' occurs in the test part but not in the training part"):
        load(str(pictures(("cat", "emu"), below="set/test")))


def test_class_too_small_to_split(pictures: Make) -> None:
    pictures(("cat",))
    with pytest.raises(ValueError, match=r"class 'dog' has 2 training example\(s\), but 3 are needed"):
        load(str(pictures(("dog",), each=2)))


def test_memory_is_checked_before_decoding(pictures: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "MAX_BYTES", 10_000)
    with pytest.raises(ValueError, match=r"20 examples of 1x64x64 need .*--image-size"):
        load(str(pictures()), image_size=64)


def test_progress_goes_to_standard_error(pictures: Make, capfd: pytest.CaptureFixture[str]) -> None:
    load(str(pictures()), progress=True)
    assert capfd.readouterr().out == ""
