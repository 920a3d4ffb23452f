"""Views of an image: levels of overlapping patches, crops, rotations, mirror images; boxes are (x0, y0, x1, y1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from torchconv._common import check, check_positive, ntuple

Box = tuple[float, float, float, float]
SIDE = 2 / 3  # of width and height: a crop has 4/9 of the area
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class View:
    """One way to look at an image: rotate it about its centre, cut a box out, resize, mirror.

    Attributes:
        box: in units of width and height.
        angle: degrees, counter-clockwise; multiples of 90 are exact, other angles reflect what is outside.
        mirror: left and right exchanged, last of all.
    """

    box: Box = WHOLE
    angle: float = 0.0
    mirror: bool = False

    def __call__(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, C, H, W) → (B, C, \\*size), whatever the aspect ratio of the box; antialiased where it shrinks."""
        images = rotate(images, self.angle)
        height, width = images.shape[-2:]
        x0, x1 = _pixels(self.box[0] * width, self.box[2] * width, width)
        y0, y1 = _pixels(self.box[1] * height, self.box[3] * height, height)
        images = images[..., y0:y1, x0:x1]
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        return images.flip(-1) if self.mirror else images


def _pixels(start: float, end: float, length: int) -> tuple[int, int]:
    """The nearest whole pixels, at least one."""
    first = min(max(round(start), 0), length - 1)
    return first, min(max(round(end), first + 1), length)


def patch_boxes(levels: int, width: float, height: float) -> Tensor:
    """Boxes of the spatial search: for level i = 1 … ``levels``, i² patches that overlap by half and cover the image.

    Args:
        levels: 1, 2, 3, 4 give 1, 5, 14, 30 patches.
        width, height: of the image, in any unit.

    Returns:
        (levels (levels + 1) (2 levels + 1) / 6, 4) float64, level by level, row-major, not rounded: sides
        2 width / (i + 1) and 2 height / (i + 1), steps of half of them.

    Raises:
        ValueError: levels < 1.

    Example:
        >>> patch_boxes(2, 300, 200)[1:3].tolist()
        [[0.0, 0.0, 200.0, 133.33333333333334], [100.0, 0.0, 300.0, 133.33333333333334]]
    """
    check_positive("levels", levels)
    found = [
        (column * width / (i + 1), row * height / (i + 1), (column + 2) * width / (i + 1), (row + 2) * height / (i + 1))
        for i in range(1, levels + 1)
        for row in range(i)
        for column in range(i)
    ]
    return torch.tensor(found, dtype=torch.float64)


def crop_boxes(width: float, height: float) -> Tensor:
    """The five crops of 4/9 of the area: top left, top right, bottom left, bottom right, centre; (5, 4) float64."""
    w, h = SIDE * width, SIDE * height
    x, y = width - w, height - h
    corners = [(0.0, 0.0), (x, 0.0), (0.0, y), (x, y), (x / 2, y / 2)]
    return torch.tensor([(a, b, a + w, b + h) for a, b in corners], dtype=torch.float64)


def square_box(box: Sequence[float], width: float, height: float) -> Box:
    """The smallest square around a region of interest, moved into the image; what does not fit is cut off.

    Example:
        >>> square_box((10.0, 40.0, 30.0, 90.0), 200, 100)
        (0, 40.0, 50.0, 90.0)
    """
    x0, y0, x1, y1 = box
    check(0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height, "box", tuple(box), f"must lie in {width} × {height}")
    side = max(x1 - x0, y1 - y0)

    def place(start: float, end: float, length: float) -> tuple[float, float]:
        first = max(0, min((start + end - side) / 2, length - side))
        return first, min(first + side, length)

    left, right = place(x0, x1, width)
    top, bottom = place(y0, y1, height)
    return left, top, right, bottom


def patches(levels: int, *, rotations: Sequence[float] = (0.0,), mirror: bool = False) -> list[View]:
    """Views for retrieval: the patches of :func:`patch_boxes`, each jittered by rotations and mirror images.

    Args:
        levels: of patches; 1 is the whole image alone.
        rotations: angles in degrees at which every patch is taken; (0, 90, 180, 270) for objects that may lie.
        mirror: add the mirror image of each.
    """
    check(len(rotations) > 0, "rotations", rotations, "must name at least one angle; (0,) for none")
    boxes = [(a, b, c, d) for a, b, c, d in patch_boxes(levels, 1.0, 1.0).tolist()]
    found = [View(box, angle) for angle in rotations for box in boxes]
    return found + [replace(view, mirror=True) for view in found] if mirror else found


def sixteen_views(angle: float = 15.0) -> list[View]:
    """The augmentation of the recognition experiments: original, five crops, a rotation each way, all mirrored too."""
    boxes = [(a, b, c, d) for a, b, c, d in crop_boxes(1.0, 1.0).tolist()]
    plain = [View(), *map(View, boxes), View(angle=angle), View(angle=-angle)]
    return plain + [replace(view, mirror=True) for view in plain]


def rotate(images: Tensor, angle: float) -> Tensor:
    """(B, C, H, W) turned counter-clockwise about its centre by degrees; quarter turns exactly (H and W change)."""
    quarters, rest = divmod(angle, 90)
    if rest == 0:
        return images.rot90(int(quarters) % 4, (-2, -1)) if quarters % 4 else images
    height, width = images.shape[-2:]
    turn = torch.deg2rad(torch.tensor(angle, dtype=torch.float64))
    cos, sin = float(turn.cos()), float(turn.sin())
    # Where a pixel comes from, in coordinates that run from -1 to 1 along each axis.
    theta = images.new_tensor([[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]])
    grid = F.affine_grid(theta.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def whole_size(size: int | Sequence[int] | None, image: Tensor) -> tuple[int, int]:
    """What the network is given: ``size``, or the size of the image."""
    height, width = image.shape[-2:] if size is None else ntuple("size", size, 2)
    return height, width
