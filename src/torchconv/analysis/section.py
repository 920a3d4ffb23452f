"""One section of the report of ``torchconv inspect``: what was found, how to read it, the pictures and the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torchconv._common import check

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Picture:
    """A matplotlib figure with the sentence that says how to read it.

    Attributes:
        name: file name without suffix: lower case, words joined by hyphens.
        figure: ``matplotlib.figure.Figure``, drawn without pyplot.
        reading: what the axes are and what to look for.
        alt: what it shows, in a few words, for readers who cannot see it.
    """

    name: str
    figure: Any
    reading: str
    alt: str


@dataclass(frozen=True)
class Section:
    """One analysis of a network.

    Attributes:
        key: of the section, as in its file names.
        title: heading.
        verdict: one sentence with the numbers that matter ("3 of 53 layers are degenerate"), for the first screen too.
        reading: how to read the section: what is measured, what is good, what is not, and the paper it is from.
        level: "good", "note" or "bad", how alarming the verdict is.
        tables: name → rows; written as CSV. Values are text, numbers or None.
        pictures: written as PNG and shown in the page.
        data: everything as plain data, for JSON.
    """

    key: str
    title: str
    verdict: str
    reading: str
    level: str = "note"
    tables: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    pictures: Sequence[Picture] = ()
    data: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self.level in ("good", "note", "bad"), "level", self.level, "must be 'good', 'note' or 'bad'")
