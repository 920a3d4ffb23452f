"""Forms of depthwise convolutions by measurement instead of by estimate, remembered on disk. Off by default.

The file is JSON: for every machine (processor, threads, version of torch) and problem the milliseconds of the forms
tried. It is only ever read as numbers by known names; what is not understood is measured again.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from torchconv._common import check, write_json
from torchconv.kernels import _depthwise_cost as cost
from torchconv.kernels import _depthwise_forms as forms
from torchconv.kernels._depthwise_forms import Geometry

_WORTH_TRYING = 3.0  # times the cheapest estimate
_SECONDS = 0.05  # of timing per form
_NATIVE_BONUS = 0.95  # another form than PyTorch's must be this much faster
_FORMS = tuple(cost.TABLE["float32"])
_Times = dict[str, dict[str, float]]  # by problem, by form

_lock = threading.RLock()
_on = os.environ.get("TORCHCONV_AUTOTUNE", "").lower() in ("1", "true", "yes", "on")
_path: Path | None = None
_known: _Times | None = None


def autotune(enabled: bool = True, path: str | os.PathLike[str] | None = None) -> None:
    """Choose the forms of depthwise convolutions on a CPU by timing them once, and remember the times on disk.

    The first call of every signature takes up to a second longer. The environment variable ``TORCHCONV_AUTOTUNE=1``
    does the same from the start. Which form is taken, and so the last digits of results, can then differ from one
    machine to the next and before and after a measurement.

    Args:
        enabled: False goes back to the estimates.
        path: the file; ``depthwise.json`` in the user's cache folder by default.

    Raises:
        ValueError: ``enabled`` is not a truth value.

    Example:
        >>> autotune(False)
    """
    from torchconv.kernels._depthwise_plan import plan

    global _on, _path, _known
    check(isinstance(enabled, bool), "enabled", enabled, "must be True or False")
    with _lock:
        _on, _path, _known = enabled, None if path is None else Path(path), None
        plan.cache_clear()


def enabled() -> bool:
    return _on


def _file() -> Path:
    from torchconv.data.download import cache_dir

    return _path if _path is not None else cache_dir() / "depthwise.json"


@lru_cache(maxsize=64)
def _machine(threads: int) -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{processor}, {capability}, {threads} threads, torch {torch.__version__}"


def _problem(geo: Geometry, kind: str, last: bool) -> str:
    sizes = " ".join(
        f"{name}={'x'.join(map(str, value))}" for name, value in zip(geo._fields[2:], geo[2:], strict=True)
    )
    return f"{kind}{' channels-last' if last else ''} {geo.batch}x{geo.channels} {sizes}"


def _numbers(value: Any) -> dict[str, _Times]:
    """What is readable of a file's content."""
    out: dict[str, _Times] = {}
    for machine, problems in value.items() if isinstance(value, dict) else ():
        for problem, times in problems.items() if isinstance(problems, dict) else ():
            pairs = times.items() if isinstance(times, dict) else ()
            kept = {f: float(t) for f, t in pairs if f in _FORMS and type(t) in (int, float) and 0 < t < 1e9}
            out.setdefault(machine, {})[problem] = kept
    return out


def _read() -> dict[str, _Times]:
    try:
        return _numbers(json.loads(_file().read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        warnings.warn(f"{_file()} is not readable and will be written anew: {error}", stacklevel=2)
        return {}


def _save(machine: str, problem: str, times: dict[str, float]) -> None:
    """Add to what other processes wrote since; a file that cannot be written costs a measurement next time."""
    content = _read()
    content.setdefault(machine, {}).setdefault(problem, {}).update(times)
    try:
        write_json(_file(), content)
    except OSError as error:
        warnings.warn(f"{_file()} cannot be written, forms are measured again next time: {error}", stacklevel=2)


def choose(geo: Geometry, kind: str, last: bool, needs: tuple[bool, bool], threads: int) -> tuple[str, str, str]:
    """The fastest form of the output and of each gradient that is needed."""
    global _known
    estimates = cost.estimate(geo, last, kind, threads)
    machine, problem = _machine(threads), _problem(geo, kind, last)
    best = dict.fromkeys("yxw", "native")
    with _lock:
        if _known is None:
            _known = _read().get(machine, {})
        times = _known.setdefault(problem, {})
        missing = []
        for part in ("y", *(p for p, need in zip("xw", needs, strict=True) if need)):
            prices = {form: price for form, price in estimates.items() if form[0] == part}
            limit = _WORTH_TRYING * min(prices.values())
            tried = [form for form, price in prices.items() if price <= limit]
            missing += [form for form in tried if form not in times]
        if missing:
            measured = _measure(missing, geo, kind, last)
            times.update(measured)
            _save(machine, problem, measured)
        for part in "yxw":
            found = {form[2:]: t for form, t in times.items() if form[0] == part}
            if "native" in found:
                found["native"] *= _NATIVE_BONUS
            best[part] = min(found, key=lambda name: found[name], default="native")
    return best["y"], best["x"], best["w"]


def _measure(names: list[str], geo: Geometry, kind: str, last: bool) -> dict[str, float]:
    """Milliseconds of the forms, the fastest of several runs each, on numbers of no meaning."""
    from torchconv.kernels._depthwise_run import gradients, output

    dtype = getattr(torch, kind)
    x = torch.full((geo.batch, geo.channels, *geo.size), 0.5, dtype=dtype)
    if last:
        x = x.contiguous(memory_format=forms.channels_last_format(geo.ndim))
    g = torch.full((geo.batch, geo.channels, *geo.out), 0.5, dtype=dtype)
    g = g.contiguous(memory_format=forms.channels_last_format(geo.ndim)) if last else g
    w = torch.full((geo.channels, 1, *geo.kernel), 0.5, dtype=dtype)

    def runner(name: str) -> Callable[[], object]:
        part, form = name.split(":")
        if part == "y":
            return lambda: output(x, w, None, form, geo)
        return lambda: gradients(g, x, w, form if part == "x" else "", form if part == "w" else "", geo)

    times = {}
    with torch.no_grad():
        for name in names:
            run, best, end = runner(name), float("inf"), time.perf_counter() + _SECONDS
            for number in range(20):
                begin = time.perf_counter()
                run()
                now = time.perf_counter()
                if number:  # the first run warms up
                    best = min(best, now - begin)
                    if now > end:
                        break
            times[name] = best * 1e3
    return times
