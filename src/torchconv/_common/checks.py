"""Argument checks with one wording: the argument, the value got, the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def check(condition: bool, argument: str, value: Any, remedy: str) -> None:
    """Raise ``ValueError("argument=value: remedy")`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{argument}={value!r}: {remedy}")


def check_positive(argument: str, value: Any, *, zero: bool = False) -> None:
    """Refuse a number that is not an integer ≥ 1 (or ≥ 0 with ``zero``)."""
    low = 0 if zero else 1
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= low
    check(ok, argument, value, f"must be an integer >= {low}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A sentence with the nearest known names, or all of them when none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(names)}"


def check_choice(argument: str, value: Any, choices: Iterable[Any]) -> None:
    """Refuse a value outside ``choices`` and name the nearest one."""
    allowed = list(choices)
    if value not in allowed:
        raise ValueError(f"{argument}={value!r}: {did_you_mean(str(value), map(str, allowed))}")
