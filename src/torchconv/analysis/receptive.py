"""The effective receptive field of a network as a section of an inspection (arXiv 2311.15599, section 3; 2203.06717).

How much every pixel contributes to the centre of the last feature map, averaged over images; the side of the smallest
centred square that holds a given share of it, and the square's share of the image.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from torchconv._common import require
from torchconv.analysis.erf import erf
from torchconv.analysis.section import Picture, Section

SHARE = 0.5


def section(model: nn.Module, images: Tensor) -> Section:
    """What the network sees.

    Args:
        model: gives a feature map somewhere.
        images: (N, C, H, W), normalised as the network expects them; noise tells of the architecture and the weights,
            images of what matters in images.
    """
    found = erf(model, images)
    rows = [
        {"share of the contribution": t, "side, pixels": found.sides[t], "share of the image": found.ratios[t]}
        for t in found.sides
    ]
    half = found.ratios.get(SHARE)
    seen = "more than the whole measured range" if half is None else f"{100 * half:.0f} % of the image"
    where = found.layer or "the last map"
    verdict = f"Half of what reaches the centre of {where} comes from {seen}"
    corner = float(found.log_map[0, 0]) if found.log_map.dim() == 2 else math.nan
    return Section(
        key="receptive-field",
        title="What it sees",
        verdict=f"{verdict}.",
        reading="Brightness is how much a pixel contributes to the centre of the last feature map (logarithmic, mean "
        "over the images). A wide, even glow means that context reaches the features; a small bright spot means that "
        "the network is local in effect, however deep it is. Measured by gradients (UniRepLKNet, arXiv 2311.15599).",
        level="bad" if half is not None and half < 0.02 else "note",
        tables={"sides": rows},
        pictures=[_picture(found.log_map)] if found.log_map.dim() == 2 else [],
        data={
            "layer": found.layer,
            "images": found.images,
            "skipped": found.skipped,
            "sides": {str(t): v for t, v in found.sides.items()},
            "ratios": {str(t): v for t, v in found.ratios.items()},
            "corner": None if math.isnan(corner) else corner,
        },
    )


def _picture(log_map: Tensor) -> Picture:
    require("matplotlib", "compare")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 3.6), layout="constrained")
    axes: Any = figure.subplots()
    image = axes.imshow(log_map.cpu().numpy(), cmap="magma", vmin=0, vmax=1)
    axes.set(xlabel="column, pixels", ylabel="row, pixels")
    figure.colorbar(image, ax=axes, label="contribution, log10, relative")
    return Picture(
        "effective-receptive-field",
        figure,
        "Rows and columns are pixels of the input; the centre of the last map lies in the middle.",
        "Map of how much each pixel contributes to the centre of the last feature map",
    )
