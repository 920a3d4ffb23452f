"""The report of a comparison: one HTML file that opens offline, and the table as CSV.

Everything is taken from the dictionary that ``results.json`` holds. What is missing there (a failed candidate, a single
seed, no receptive field) is left out of the page or said, never invented.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from torchconv._common import check, require, write_text
from torchconv.compare._format import dig, number

SCHEMA = 1


def latency_of(candidate: dict[str, Any]) -> Any:
    """Median time of the large batch, or of batch 1 where that is all there is: what the latency front is about."""
    many = dig(candidate, "latency", "batchN", "median_ms")
    return dig(candidate, "latency", "batch1", "median_ms") if number(many) is None else many


COSTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "params": lambda c: c.get("params"),
    "macs": lambda c: c.get("macs"),
    "latency": latency_of,
}


def _check(results: Any) -> list[dict[str, Any]]:
    check(isinstance(results, dict), "results", type(results).__name__, "must be the dictionary of results.json")
    schema = results.get("schema", SCHEMA)
    check(schema == SCHEMA, "results['schema']", schema, f"only {SCHEMA} can be read; use the torchconv that wrote it")
    candidates = results.get("candidates") or []
    check(
        isinstance(candidates, list) and all(isinstance(c, dict) for c in candidates),
        "results['candidates']", type(candidates).__name__, "must be a list of dictionaries",
    )  # fmt: skip
    return candidates


def label_of(candidate: dict[str, Any]) -> str:
    """The candidate's name for people."""
    return str(candidate.get("label") or candidate.get("op") or "?")


def find(results: dict[str, Any], name: Any) -> int | None:
    """Index of the candidate with this label, else of the first with this operator."""
    candidates = results.get("candidates") or []
    for key in ("label", "op"):
        for index, candidate in enumerate(candidates):
            if name is not None and candidate.get(key) == name:
                return index
    return None


def front_of(results: dict[str, Any], key: str) -> set[int]:
    """Indices of the candidates on the Pareto front: as the run recorded it, else worked out from the means."""
    candidates = results.get("candidates") or []
    names = dig(results, "pareto", key)
    if isinstance(names, list):
        return {index for name in names if (index := find(results, name)) is not None}
    known = [
        (i, v, a)
        for i, c in enumerate(candidates)
        if (v := number(COSTS[key](c))) is not None and (a := number(dig(c, "accuracy", "mean"))) is not None
    ]
    return {i for i, v, a in known if not any(w <= v and b >= a and (w, b) != (v, a) for _, w, b in known)}


def write_report(results: dict[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write the comparison as one self-contained HTML page.

    The page needs no network, no fonts and no other file; its content security policy forbids them. Everything that
    comes from ``results`` is escaped.

    Args:
        results: what ``results.json`` holds (schema 1).
        path: the file to write; its folder is made. The file is moved into place when it is complete.

    Returns:
        The path written.

    Raises:
        ValueError: ``results`` is not a dictionary of schema 1.
        ImportError: jinja2 is not installed (``pip install 'torchconv[compare]'``).
    """
    _check(results)
    jinja2 = require("jinja2", "compare")
    from torchconv.compare._page import page

    folder = resources.files("torchconv.compare")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    context = page(results)
    for name in ("css", "js"):
        context[name] = jinja2.utils.markupsafe.Markup((folder / f"report.{name}").read_text(encoding="utf-8"))
    html = environment.get_template("report.html.j2").render(context)
    target = Path(path)
    # A lone surrogate (a file name that is no UTF-8) must not keep the page from being written.
    write_text(target, html.encode("utf-8", "replace").decode("utf-8"))
    return target


_COLUMNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("label", ("label",)),
    ("op", ("op",)),
    ("status", ("status",)),
    ("error", ("error",)),
    ("width", ("width",)),
    ("params", ("params",)),
    ("macs", ("macs",)),
    ("flops", ("flops",)),
    ("flops_convolution", ("counts", "convolution")),
    ("flops_matmul", ("counts", "matmul")),
    ("flops_fft", ("counts", "fft")),
    ("flops_elementwise", ("counts", "elementwise")),
    ("match_target", ("match", "target")),
    ("match_achieved", ("match", "achieved")),
    ("match_relative_error", ("match", "relative_error")),
    ("accuracy_mean", ("accuracy", "mean")),
    ("accuracy_low", ("accuracy", "low")),
    ("accuracy_high", ("accuracy", "high")),
    ("difference_mean", ("difference", "mean")),
    ("difference_low", ("difference", "low")),
    ("difference_high", ("difference", "high")),
    ("p", ("difference", "p")),
    ("p_adjusted", ("difference", "p_adjusted")),
    ("significant", ("difference", "significant")),
    ("latency_b1_median_ms", ("latency", "batch1", "median_ms")),
    ("latency_b1_p95_ms", ("latency", "batch1", "p95_ms")),
    ("latency_bn_batch", ("latency", "batchN", "batch")),
    ("latency_bn_median_ms", ("latency", "batchN", "median_ms")),
    ("latency_bn_p95_ms", ("latency", "batchN", "p95_ms")),
    ("throughput_per_s", ("latency", "throughput")),
    ("peak_memory_bytes", ("peak_memory_bytes",)),
    ("train_seconds", ("train_seconds",)),
    ("erf_side_0.5", ("erf", "sides", "0.5")),
)


def write_csv(results: dict[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write one row per candidate, failed ones too; numbers in SI units without rounding, what is missing is empty.

    Args:
        results: what ``results.json`` holds (schema 1).
        path: the file to write; its folder is made.

    Returns:
        The path written.

    Raises:
        ValueError: ``results`` is not a dictionary of schema 1.
    """
    candidates = _check(results)
    fronts = {key: front_of(results, key) for key in COSTS}
    baseline = find(results, results.get("baseline"))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    extra = ["options", "seeds", "accuracy_per_seed", "baseline", *(f"pareto_{key}" for key in fronts)]
    writer.writerow([name for name, _ in _COLUMNS] + extra)
    for index, candidate in enumerate(candidates):
        row = ["" if (value := dig(candidate, *keys)) is None else value for _, keys in _COLUMNS]
        scores = dig(candidate, "accuracy", "per_seed") or []
        row += [json.dumps(candidate.get("options") or {}), len(scores), " ".join(map(str, scores))]
        row += [index == baseline, *(index in front for front in fronts.values())]
        writer.writerow(row)
    target = Path(path)
    write_text(target, buffer.getvalue().encode("utf-8", "replace").decode("utf-8"))
    return target


__all__ = ["write_csv", "write_report"]
