"""``torchconv inspect``: every analysis that fits a network, as one report.

The first screen is the verdicts; each section explains how to read its pictures. Beside the page stands a folder with
the pictures (PNG), tables (CSV) and all numbers (JSON).
"""

from __future__ import annotations

import base64
import csv
import importlib
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchconv._common import atomic_write, check_choice, require, write_json, write_text
from torchconv._version import __version__
from torchconv.analysis.count import count
from torchconv.analysis.latency import machine
from torchconv.analysis.section import Section

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Subject:
    """What is inspected: a network, images it takes, a network to compare it with, the images' classes if known."""

    model: nn.Module
    images: Tensor
    against: nn.Module | None = None
    labels: Tensor | None = None
    names: Sequence[str] = ()


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        title: of the network.
        facts: parameters, multiply-adds, size of the images and the like.
        sections: in the order of the page.
        left_out: key of a section → why it could not be made.
    """

    title: str
    facts: Mapping[str, Any]
    sections: list[Section]
    left_out: dict[str, str] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=machine)

    @property
    def verdicts(self) -> list[str]:
        """One sentence a section, the alarming ones first."""
        order = {"bad": 0, "note": 1, "good": 2}
        return [s.verdict for s in sorted(self.sections, key=lambda s: order[s.level])]


def _module(name: str) -> Any:
    return importlib.import_module(f"torchconv.analysis.{name}")


def _similarity(subject: Subject) -> Section:
    if subject.against is None:
        raise ValueError("needs --against MODEL2")
    section: Section = _module("cka").section(subject.model, subject.against, subject.images)
    return section


def _transfer(subject: Subject) -> Section:
    section: Section = _module("offtheshelf").section(subject.model, subject.images, _labels(subject))
    return section


def _patterns(subject: Subject) -> Section:
    section: Section = _module("patternnet").section(subject.model, subject.images, _labels(subject), subject.names)
    return section


def _labels(subject: Subject) -> Tensor:
    if subject.labels is None:
        raise ValueError("needs --data with classes")
    return subject.labels


SECTIONS: dict[str, Callable[[Subject], Section]] = {
    "filters": lambda s: _module("filterdb").section(s.model),
    "filter-design": lambda s: _module("filterdesign").section(s.model, s.images),
    "receptive-field": lambda s: _module("receptive").section(s.model, s.images[:8]),
    "efficiency": lambda s: _module("efficiency").section(s.model, s.images[:1]),
    "similarity": _similarity,
    "transfer": _transfer,
    "patterns": _patterns,
}


def inspect_model(
    model: nn.Module,
    images: Tensor | None = None,
    against: nn.Module | None = None,
    *,
    labels: Tensor | None = None,
    names: Sequence[str] = (),
    title: str = "",
    image_size: int | None = None,
    only: tuple[str, ...] = (),
    progress: Progress | None = None,
) -> Inspection:
    """Look inside a network with every analysis that applies.

    Args:
        model: any module that takes images; it is left as it is.
        images: (N, C, H, W), or (N, C, *spatial), normalised as it expects them, grey ones as well for a network that
            takes three channels; eight of unit noise by default.
        against: a second network; with it representations are compared.
        labels: (N,) classes of the images; with them it is measured how well the features transfer, and which
            parts tell the classes apart.
        names: of the classes, for the pictures.
        title: what to call the network.
        image_size: side of the noise images; by default :func:`own_size`, else 224 (32 in three dimensions).
        only: keys of :data:`SECTIONS`; all that apply by default.
        progress: called with a line a section.

    Returns:
        The sections, and why others were left out.

    Raises:
        ValueError: an unknown key in ``only``, images that the network does not take, or no section could be made.
    """
    for key in only:
        check_choice("only", key, SECTIONS)
    say = progress or (lambda line: None)
    if images is None:
        images = _noise(model, image_size)
    elif images.dim() == 4 and images.shape[1] == 1 and _channels(model) == 3:
        images = images.expand(-1, 3, -1, -1)  # grey pictures, a network for coloured ones
    training = [(m, m.training) for m in model.modules()]
    model.eval()
    sections: list[Section] = []
    left_out: dict[str, str] = {}
    subject = Subject(model, images, against, labels, names)
    try:
        try:
            facts = _facts(model, images[:1])
        except Exception as error:
            raise ValueError(
                f"images={tuple(images.shape)}: the network does not take them ({_reason(error)}); give others "
                "(--data), or another side (--size)"
            ) from error
        for key in only or tuple(SECTIONS):
            say(key)
            try:
                sections.append(SECTIONS[key](subject))
            except Exception as error:  # a network may fail in any way; the other sections are still of use
                left_out[key] = _reason(error)
    finally:
        for module, flag in training:
            module.training = flag
    if not sections:
        reasons = "; ".join(f"{key} {why}" for key, why in left_out.items())
        raise ValueError(f"model={title or type(model).__name__}: nothing could be inspected: {reasons}")
    return Inspection(title or type(model).__name__, facts, sections, left_out)


def _reason(error: Exception) -> str:
    words, kind = str(error).strip().split("\n")[0], type(error).__name__
    expected = isinstance(error, ValueError | RuntimeError | ImportError)
    return words if words and expected else f"{kind}: {words}".removesuffix(": ")


def own_size(model: nn.Module) -> int | None:
    """The side of the images that a network was made for, where it says so (timm's and torchvision's do).

    Example:
        >>> own_size(nn.Conv2d(3, 4, 3)) is None
        True
    """
    configured = getattr(model, "pretrained_cfg", None) or {}
    sizes = (
        getattr(getattr(model, "patch_embed", None), "img_size", None),
        getattr(model, "img_size", None),
        getattr(model, "image_size", None),
        tuple(configured.get("input_size") or ())[1:] if isinstance(configured, Mapping) else None,
    )
    for size in sizes:
        side = size[0] if isinstance(size, list | tuple) and size else size
        if isinstance(side, int) and side > 0:
            return side
    return None


def _first(model: nn.Module) -> Any:
    return next((m for m in model.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)), None)


def _channels(model: nn.Module) -> int | None:
    """Those of the first convolution, a network's images."""
    first = _first(model)
    return None if first is None else int(first.in_channels)


def _noise(model: nn.Module, size: int | None) -> Tensor:
    first = _first(model)
    if first is None:
        raise ValueError(f"model={type(model).__name__}: has no convolution to take noise by, so give images (--data)")
    dims = len(first.kernel_size)
    side = size or own_size(model) or (32 if dims == 3 else 224)
    noise = torch.randn(8, first.in_channels, *[side] * dims, generator=torch.Generator().manual_seed(0))
    return noise.to(first.weight.device, first.weight.dtype)


def _facts(model: nn.Module, x: Tensor) -> dict[str, Any]:
    counts = count(model, x)
    convolutions = sum(isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d) for m in model.modules())
    return {
        "parameters": counts.params,
        "multiply-adds": counts.macs,
        "FLOPs": counts.flops,
        "convolutions": convolutions,
        "input": " × ".join(map(str, x.shape[1:])),
        "not counted": ", ".join(counts.not_counted) or "nothing",
    }


# -- the report --------------------------------------------------------------------------------------------------------


def write_report(found: Inspection, out: str | Path) -> Path:
    """Write the page ``out`` and beside it a folder of the same name with pictures, tables and numbers.

    Args:
        found: of :func:`inspect_model`.
        out: path of the ``.html`` file.

    Returns:
        The path of the page.
    """
    jinja2 = require("jinja2", "compare")
    out = Path(out)
    folder = out.with_suffix("")
    shown = []
    for section in found.sections:
        pictures = []
        for picture in section.pictures:
            pixels = _png(picture.figure)
            name = f"{section.key}-{picture.name}.png"
            with atomic_write(folder / name) as temporary:
                temporary.write_bytes(pixels)
            wide = picture.figure.get_figwidth() > 1.6 * picture.figure.get_figheight()
            pictures.append({"picture": picture, "src": base64.b64encode(pixels).decode(), "wide": wide})
        for name, rows in section.tables.items():
            write_text(folder / f"{section.key}-{name.replace(' ', '-')}.csv", _csv(rows))
        tables = [{"name": n, "columns": list(rows[0]), "rows": rows} for n, rows in section.tables.items() if rows]
        shown.append({"section": section, "pictures": pictures, "tables": tables})
    write_json(folder / "inspection.json", plain(as_data(found)))
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["cell"] = _cell
    page = environment.from_string((Path(__file__).parent / "_inspection.html").read_text(encoding="utf-8"))
    write_text(out, page.render(found=found, shown=shown, folder=folder.name, version=__version__))
    return out


def as_data(found: Inspection) -> dict[str, Any]:
    """Everything but the pictures."""
    return {
        "schema": 1,
        "title": found.title,
        "facts": found.facts,
        "verdicts": found.verdicts,
        "left_out": found.left_out,
        "machine": found.machine,
        "sections": [
            {"key": s.key, "title": s.title, "verdict": s.verdict, "level": s.level, "tables": s.tables, "data": s.data}
            for s in found.sections
        ],
    }


def plain(value: Any) -> Any:
    """As JSON can say it: no tensors or arrays, None for what is not finite."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, Tensor) or hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _png(figure: Any) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _csv(rows: Any) -> str:
    buffer = io.StringIO()
    if rows:
        writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return buffer.getvalue()


def _cell(value: Any) -> str:
    """A number with a fitting count of digits, or text."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
