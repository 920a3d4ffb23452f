"""Numbers as people read them: units, powers of ten, percentages, and what is missing as a dash."""

from __future__ import annotations

import math
from typing import Any

NARROW = "\u202f"  # narrow no-break space between a number and its unit
MISSING = "–"


def number(value: Any) -> float | None:
    """``value`` as a finite float, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def dig(tree: Any, *keys: str) -> Any:
    """``tree[k1][k2]…``, or None as soon as a level is missing."""
    for key in keys:
        if not isinstance(tree, dict):
            return None
        tree = tree.get(key)
    return tree


def digits(value: float, count: int = 3) -> str:
    """``count`` significant digits without an exponent (integers in full)."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.{count - 1}e}")  # 0.9999 has the decimals of 1.00
    decimals = max(count - 1 - math.floor(math.log10(abs(rounded))), 0)
    return f"{value:.{decimals}f}"


def short(value: float) -> str:
    """A tick label: digits without trailing zeros."""
    text = digits(value, 4)
    return text.rstrip("0").rstrip(".") if "." in text else text


def count(value: Any) -> str:
    """12345 → 12.3 k."""
    known = number(value)
    if known is None:
        return MISSING
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(known) >= limit * 0.9995:
            return f"{digits(known / limit)}{NARROW}{unit}"
    return short(known)


def milliseconds(value: Any) -> str:
    """A latency, from µs to s."""
    known = number(value)
    if known is None:
        return MISSING
    if abs(known) < 0.9995:
        return f"{digits(known * 1e3)}{NARROW}µs"
    return f"{digits(known)}{NARROW}ms" if abs(known) < 999.5 else f"{digits(known / 1e3)}{NARROW}s"


def _trimmed(text: str) -> str:
    """The same without zeros at the end of the decimals, for ticks."""
    head, unit, tail = text.partition(NARROW)
    return (head.rstrip("0").rstrip(".") if "." in head else head) + unit + tail


def short_count(value: Any) -> str:
    """A count for a tick."""
    return _trimmed(count(value))


def short_milliseconds(value: Any) -> str:
    """A latency for a tick."""
    return _trimmed(milliseconds(value))


def seconds(value: Any) -> str:
    """A duration, from s to h."""
    known = number(value)
    if known is None:
        return MISSING
    if known < 99.5:
        return f"{digits(known, 2)}{NARROW}s"
    minutes, rest = divmod(round(known), 60)
    if minutes < 60:
        return f"{minutes}{NARROW}min {rest:02d}{NARROW}s"
    return f"{minutes // 60}{NARROW}h {minutes % 60:02d}{NARROW}min"


def memory(value: Any) -> str:
    """Bytes in powers of 1024."""
    known = number(value)
    if known is None:
        return MISSING
    for limit, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if known >= limit:
            return f"{digits(known / limit)}{NARROW}{unit}"
    return f"{known:.0f}{NARROW}B"


def percent(value: Any, decimals: int = 1) -> str:
    """A fraction as a percentage."""
    known = number(value)
    return MISSING if known is None else f"{known * 100:.{decimals}f}{NARROW}%"


def points(value: Any, decimals: int = 1) -> str:
    """A difference of fractions in percentage points, always signed."""
    known = number(value)
    if known is None:
        return MISSING
    text = f"{known * 100:+.{decimals}f}".replace("-", "−")
    return f"±{text[1:]}" if float(text[1:]) == 0 else text


def probability(value: Any) -> str:
    """A p-value: three decimals, or that it is below them."""
    known = number(value)
    if known is None:
        return ""
    text = "p < 0.001" if known < 0.001 else f"p = {known:.3f}" if known < 0.0995 else f"p = {known:.2f}"
    return text.replace(" ", NARROW)


def options(value: Any) -> str:
    """An operator's options on one line."""
    if not isinstance(value, dict):
        return "" if value is None else str(value)
    return ", ".join(f"{key}={item}" for key, item in value.items())
