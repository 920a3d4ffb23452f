"""The effective receptive field of a network as a section of an inspection (arXiv 2311.15599, section 3; 2203.06717).

How much every pixel contributes to the centre of the last feature map, averaged over images; the side of the smallest
square around the middle of that which holds a given share, and the square's share of the image. The middle is that of
the contributions: strides and padding put it beside the image's, by as much as half a stride.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchconv._common import require
from torchconv.analysis.erf import THRESHOLDS, erf
from torchconv.analysis.section import Picture, Section

SHARE = 0.5


def squares(contribution: Tensor, shares: Sequence[float] = THRESHOLDS) -> list[tuple[int, float]]:
    """Side and share of the area of the smallest square, around the middle, holding each share of a map's sum.

    Squares are cut at the border, sides are odd, and the middle is the centre of mass.

    Args:
        contribution: not negative, of any number of axes.
        shares: in (0, 1).

    Example:
        >>> one = torch.zeros(8, 8)
        >>> one[2, 5] = 1.0
        >>> squares(one, [0.5])
        [(1, 0.015625)]
    """
    weight = contribution.detach().double().cpu()
    total = float(weight.sum())
    if total == 0:
        return [(0, 0.0) for _ in shares]
    distance = torch.zeros(weight.shape, dtype=torch.long)
    for axis, n in enumerate(weight.shape):
        line = weight.movedim(axis, 0).reshape(n, -1).sum(1)
        places = torch.arange(n)
        middle = round(float((line * places).sum()) / total)
        shape = [n if a == axis else 1 for a in range(weight.dim())]
        distance = distance.maximum((places - middle).abs().reshape(shape))
    held = torch.bincount(distance.flatten(), weight.flatten()).cumsum(0) / total
    area = torch.bincount(distance.flatten()).double().cumsum(0) / weight.numel()
    reach = [min(int((held < share).sum()), len(held) - 1) for share in shares]
    return [(2 * r + 1, float(area[r])) for r in reach]


def section(model: nn.Module, images: Tensor) -> Section:
    """What the network sees.

    Args:
        model: gives a feature map somewhere.
        images: (N, C, H, W), normalised as the network expects them; noise tells of the architecture and the weights,
            images of what matters in images.

    Raises:
        ValueError: no feature map, or nothing of the images reaches it.
    """
    found = erf(model, images)
    if not bool(found.map.any()):
        raise ValueError(f"nothing of the images reaches the centre of {found.layer or 'the last map'}")
    held = squares(found.map)
    rows = [
        {
            "share of the contribution": t,
            "side": side,
            "share of the image": area,
            "side as published": found.sides[t],
            "share of the image as published": found.ratios[t],
        }
        for t, (side, area) in zip(THRESHOLDS, held, strict=True)
    ]
    side, half = held[THRESHOLDS.index(SHARE)]
    where = found.layer or "the last map"
    axes = found.map.dim()
    thing = "image" if axes == 2 else "input"
    return Section(
        key="receptive-field",
        title="What it sees",
        verdict=f"Half of what reaches the centre of {where} comes from {_percent(half)} of the {thing} "
        f"({' × '.join([str(side)] * axes)}).",
        reading="Brightness is how much a pixel contributes to the centre of the last feature map (logarithmic, mean "
        "over the images). A wide, even glow means that context reaches the features; a small bright spot means that "
        "the network is local in effect, however deep it is. Measured by gradients (UniRepLKNet, arXiv 2311.15599). "
        "Sides are of squares around the middle of the contributions; those as published are around the middle of the "
        "image and share out the logarithm, for comparison with papers.",
        level="bad" if half ** (2 / axes) < 0.02 else "note",
        tables={"sides": rows},
        pictures=[_picture(found.log_map)] if found.log_map.dim() <= 2 else [],
        data={
            "layer": found.layer,
            "images": found.images,
            "skipped": found.skipped,
            "sides": {str(t): side for t, (side, _) in zip(THRESHOLDS, held, strict=True)},
            "ratios": {str(t): area for t, (_, area) in zip(THRESHOLDS, held, strict=True)},
            "published_sides": {str(t): v for t, v in found.sides.items()},
            "published_ratios": {str(t): v for t, v in found.ratios.items()},
        },
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.02 else f"{100 * share:.2g} %"


def _picture(log_map: Tensor) -> Picture:
    require("matplotlib", "compare")
    from matplotlib.figure import Figure

    values = log_map.cpu().numpy()
    if values.ndim == 1:
        figure = Figure(figsize=(6.0, 2.4), layout="constrained")
        axes: Any = figure.subplots()
        axes.plot(values, color="#6a1b9a")
        axes.set(xlabel="position in the input", ylabel="contribution, log10, relative", ylim=(0, 1.05))
        reading = "Along the input. The centre of the last map lies in the middle, or beside it by up to half a stride."
    else:
        figure = Figure(figsize=(4.2, 3.6), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(values, cmap="magma", vmin=0, vmax=1)
        axes.set(xlabel="column, pixels", ylabel="row, pixels")
        figure.colorbar(image, ax=axes, label="contribution, log10, relative")
        reading = (
            "Rows and columns are pixels of the input. The centre of the last map lies in the middle, or beside it by "
            "up to half a stride."
        )
    return Picture(
        "effective-receptive-field",
        figure,
        reading,
        "Map of how much each position of the input contributes to the centre of the last feature map",
    )
