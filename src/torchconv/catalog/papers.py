"""The methods: one entry a paper family in ``papers.toml``; those still to come are named in ``planned.toml``."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from torchconv._common import did_you_mean

_HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Paper:
    """One method: the paper (or papers) that define it.

    ``code`` and ``licence`` are the authors' repository and its licence; ``evidence`` says how our numbers are checked.
    """

    key: str
    family: str
    title: str
    authors: str
    year: int
    arxiv: str
    idea: str
    code: str = ""
    licence: str = ""
    evidence: str = ""
    keywords: str = ""
    also: tuple[dict[str, str], ...] = ()

    @property
    def url(self) -> str:
        """Address of the abstract."""
        return f"https://arxiv.org/abs/{self.arxiv}"


@cache
def papers() -> dict[str, Paper]:
    """All methods by key, in the order of the file."""
    with (_HERE / "papers.toml").open("rb") as file:
        entries = tomllib.load(file)
    return {key: Paper(key=key, **{**e, "also": tuple(e.get("also", ()))}) for key, e in entries.items()}


@cache
def planned() -> tuple[str, ...]:
    """Keys of the methods that are not complete yet."""
    with (_HERE / "planned.toml").open("rb") as file:
        return tuple(tomllib.load(file)["methods"])


def paper(key: str) -> Paper:
    """The method called ``key``; a wrong key raises ``ValueError`` with the nearest ones."""
    known = papers()
    if key not in known:
        raise ValueError(f"key={key!r}: {did_you_mean(key, known)}")
    return known[key]
