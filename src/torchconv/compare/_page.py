"""What the report's template shows: rows, figures and sentences, worked out from the results."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

from torchconv.compare import _format as fmt
from torchconv.compare import _pictures as pictures
from torchconv.compare import plots
from torchconv.compare._format import dig, number
from torchconv.compare._svg import Svg, padded
from torchconv.compare.plots import Series
from torchconv.compare.report import COSTS, find, front_of, label_of


def page(results: dict[str, Any]) -> dict[str, Any]:
    """The template's context."""
    series = _series(results)
    measured = [s for s in series if s.accuracy() is not None]
    test_size = number(dig(results, "dataset", "test")) or 0
    decimals = 2 if test_size >= 5000 else 1
    fronts = {key: front_of(results, key) for key in COSTS}
    baseline = next((s for s in series if s.baseline), None)
    learning = [
        ("Validation accuracy", plots.learning(series, "val_accuracy")),
        ("Validation accuracy, second half", plots.learning(series, "val_accuracy", last_half=True)),
        ("Training loss", plots.learning(series, "train_loss")),
    ]
    robust = [
        ("Gaussian noise", plots.robustness(series, "noise", "standard deviation of the noise")),
        ("Blur", plots.robustness(series, "blur", "standard deviation of the blur, pixels")),
    ]
    fields = [(s, svg, pictures.side_table(s)) for s in series if (svg := pictures.receptive_field(s)) is not None]
    columns = _columns(results, _batch(series))
    match = str(dig(results, "config", "match") or "")
    headline, lead = _headline(results, series)
    batch = _batch(series)
    return {
        "results": results,
        "title": f"torchconv compare: {dig(results, 'dataset', 'name') or dig(results, 'config', 'data') or 'results'}",
        "headline": headline,
        "lead": lead,
        "reasons": [str(r) for r in dig(results, "verdict", "reasons") or []],
        "badge": badge(results, series),
        "facts": _facts(results, series),
        "forest": plots.forest(series, baseline.label if baseline else "the baseline", decimals),
        "columns": columns,
        "rows": _rows(results, series, fronts, decimals, columns),
        "pareto": _pareto(series, fronts, decimals, batch),
        "matched": _MATCH.get(match, ""),
        "learning": [(t, f) for t, f in learning if f],
        "banded": any(len(s.data.get("curves") or []) > 1 for s in series),
        "galleries": [g for s in series if (g := pictures.gallery(s)) is not None],
        "fields": fields,
        "robust": [(t, f) for t, f in robust if f],
        "strongest": _strongest(measured, decimals),
        "counted": _counted(series),
        "counts_unit": _counts_unit(series),
        "match": match,
        "method": _method(results),
        "warnings": [str(w) for w in dig(results, "dataset", "warnings") or []],
        "environment": _flat(results.get("environment")),
        "configuration": _flat(results.get("config")),
        "dataset": _flat({k: v for k, v in (results.get("dataset") or {}).items() if k != "warnings"}),
        "notes": [str(note) for note in results.get("notes") or []],
        "created": _when(results.get("created")),
        "swatch": plots.swatch,
        "kinds": plots.KINDS,
        "fmt": fmt,
    }


def _headline(results: dict[str, Any], series: list[Series]) -> tuple[str, str]:
    """The answer in three words and what the run says about it; without a pick, the run's first sentence leads."""
    text = str(dig(results, "verdict", "text") or "").strip()
    pick = find(results, dig(results, "verdict", "pick"))
    if pick is not None:
        return f"{'Stay with' if series[pick].baseline else 'Use'} {series[pick].label}", text
    first, _, rest = re.sub(r"(?<=[.!?])\s+", "\n", text, count=1).partition("\n")
    return first or "This run ended without a verdict.", rest


def _series(results: dict[str, Any]) -> list[Series]:
    series, accent, baseline = [], 0, find(results, results.get("baseline"))
    for index, candidate in enumerate(results.get("candidates") or []):
        series.append(Series(index, label_of(candidate), candidate, index == baseline, accent))
        accent += index != baseline
    return series


def badge(results: dict[str, Any], series: list[Series]) -> dict[str, str]:
    """Whether the answer's difference is larger than the noise: ``kind`` yes, no or unknown, and the words."""
    tested = [s for s in series if isinstance(s.data.get("difference"), dict)]
    pick = find(results, dig(results, "verdict", "pick"))
    chosen = None if pick is None else series[pick]
    if not any(s.accuracy() is not None for s in series):
        return {"kind": "unknown", "text": "Nothing could be measured", "detail": ""}
    if chosen is not None and isinstance(chosen.data.get("difference"), dict):
        gap = chosen.data["difference"]
        decimals = 2 if (number(gap.get("n_items")) or 0) >= 5000 else 1
        interval = chosen.interval("difference")
        parts = [f"{fmt.points(gap.get('mean'), decimals)} points"]
        if interval:
            low, high = (fmt.points(v, decimals) for v in interval)
            parts.append(f"95{fmt.NARROW}% interval {low} to {high}")
        p_value = fmt.probability(gap.get("p_adjusted"))
        parts += [f"adjusted {p_value}"] if p_value else []
        if str(gap.get("basis") or "").startswith("items only"):
            parts.append("one seed: other items, not other runs")
        detail = ", ".join(parts)
        if gap.get("significant") is None:
            return {"kind": "unknown", "text": "Difference not tested", "detail": detail}
        if gap["significant"]:
            if (number(gap.get("mean")) or 0) < 0:
                return {"kind": "no", "text": "Worse than the baseline, beyond the noise", "detail": detail}
            return {"kind": "yes", "text": "Difference larger than the noise", "detail": detail}
        return {"kind": "no", "text": "Difference within the noise", "detail": detail}
    verdicts = [s.data["difference"].get("significant") for s in tested]
    if not verdicts or None in verdicts:
        return {"kind": "unknown", "text": "Noise not measured", "detail": "nothing was compared with a baseline"}
    gains = [(number(dig(s.data, "difference", "mean")) or 0) * bool(v) for v, s in zip(verdicts, tested, strict=True)]
    if chosen is not None and max(gains) < 0:
        return {"kind": "yes", "text": "Difference larger than the noise", "detail": "every other candidate is worse"}
    if max(gains) > 0:
        return {"kind": "yes", "text": "Some gains are larger than the noise", "detail": ""}
    return {"kind": "no", "text": "No gain larger than the noise", "detail": ""}


def _facts(results: dict[str, Any], series: list[Series]) -> list[tuple[str, str]]:
    data, config = results.get("dataset") or {}, results.get("config") or {}
    size = data.get("size")
    shape = " × ".join(map(str, size)) if isinstance(size, list | tuple) else ""
    channels = number(data.get("channels"))
    about = [str(data.get("name") or config.get("data") or "")]
    about += [f"{fmt.short(channels)} × {shape}" if channels else shape] if shape else []
    classes = data.get("classes")
    classes = len(classes) if isinstance(classes, list | tuple) else classes
    about += [f"{classes} classes"] if classes else []
    words = {"train": "train", "val": "validation", "test": "test"}
    split = [f"{_exact(data[key])} {word}" for key, word in words.items() if number(data.get(key))]
    match = config.get("match")
    target = next((t for s in series if (t := number(dig(s.data, "match", "target"))) is not None), None)
    budget = "" if not match else "not matched" if match == "none" else f"equal {_MATCH.get(str(match), str(match))}"
    budget += f", {fmt.count(target)}" if target and match in ("params", "macs") else ""
    seeds = config.get("seeds")
    seeds = len(seeds) if isinstance(seeds, list | tuple) else seeds
    epochs = number(config.get("epochs"))
    length = f"{epochs:.0f} epoch{'s' if epochs != 1 else ''}" if epochs else ""
    machine = results.get("environment") or {}
    where = ("device", "cpu") if str(config.get("device")).startswith("cpu") else ("device", "gpu", "cpu")
    device = next((machine[key] for key in where if machine.get(key)), None)
    facts = [
        ("Data", ", ".join(a for a in about if a)),
        ("Items", " · ".join(split)),
        ("Network", str(config.get("net") or "")),
        ("Budget", budget),
        ("Runs", ", ".join(t for t in (f"{seeds} seed{'s' if seeds != 1 else ''} each" if seeds else "", length) if t)),
        ("Device", "" if device is None else str(device)),
    ]
    return [(name, value) for name, value in facts if value]


_MATCH = {"params": "parameters", "macs": "MACs", "latency": "latency"}


def _batch(series: list[Series]) -> float | None:
    """The large batch that latency was measured with, where it was."""
    timed = (s for s in series if number(dig(s.data, "latency", "batchN", "median_ms")) is not None)
    return next((number(dig(s.data, "latency", "batchN", "batch")) for s in timed), None)


def _columns(results: dict[str, Any], batch: float | None) -> list[dict[str, str]]:
    many = f"Latency b{batch:.0f}" if batch else "Latency bN"
    unit = {"image": "Images", "series": "Series"}.get(str(dig(results, "dataset", "kind")), "Items")
    return [
        {"key": "label", "name": "Operator", "first": "ascending", "title": "operator and options"},
        {"key": "accuracy", "name": "Test accuracy", "first": "descending", "title": "mean over seeds, 95 % interval"},
        {"key": "difference", "name": "To baseline", "first": "descending", "title": "percentage points, adjusted p"},
        {"key": "params", "name": "Params", "first": "ascending", "title": "learned parameters"},
        {"key": "macs", "name": "MACs", "first": "ascending", "title": "multiply-adds for one input"},
        {"key": "flops", "name": "FLOPs", "first": "ascending", "title": "floating-point operations for one input"},
        {"key": "latency", "name": "Latency b1", "first": "ascending", "title": "median at batch 1"},
        {"key": "latencyn", "name": many, "first": "ascending", "title": "median for the whole batch"},
        {"key": "throughput", "name": f"{unit}/s", "first": "descending", "title": "throughput"},
        {"key": "memory", "name": "Memory", "first": "ascending", "title": "peak memory"},
        {"key": "train", "name": "Training", "first": "ascending", "title": "mean time of one seed"},
        {"key": "erf", "name": "ERF side", "first": "descending",
         "title": "side of the centred square with half of the effective receptive field, pixels"},
        {"key": "status", "name": "Seeds", "first": "descending", "title": "finished runs; open for details"},
    ]  # fmt: skip


def _rows(
    results: dict[str, Any],
    series: list[Series],
    fronts: dict[str, set[int]],
    decimals: int,
    columns: list[dict[str, str]],
) -> list[dict[str, Any]]:
    ends = [e for s in series for e in (s.accuracy(), *(s.interval() or ())) if e is not None]
    domain = padded(ends, 0.05, floor=0.004) if ends else None
    reference = next((s.accuracy() for s in series if s.baseline), None)
    pick = find(results, dig(results, "verdict", "pick"))
    marked = {"latencyn" if key == "latency" and _batch(series) else key: front for key, front in fronts.items()}
    rows = []
    for s in series:
        data = s.data
        trials = [t for t in data.get("trials") or [] if isinstance(t, dict)]
        finished = sum(t.get("status") == "ok" for t in trials)
        status = str(data.get("status") or "ok")
        low, high = s.interval() or (None, None)
        sides = dig(data, "erf", "sides") or {}
        side = number(sides.get("0.5"))
        side_text = (
            f"{fmt.short(side)}{fmt.NARROW}px" if side is not None else "> input" if "0.5" in sides else fmt.MISSING
        )
        p95 = [dig(data, "latency", b, "p95_ms") for b in ("batch1", "batchN")]
        one, many = (dig(data, "latency", b, "median_ms") for b in ("batch1", "batchN"))
        rate = dig(data, "latency", "throughput") or data.get("throughput")
        gap = data.get("difference")
        cells: dict[str, tuple[Any, str, str]] = {  # sorting value, text, hint
            "params": (data.get("params"), fmt.count(data.get("params")), _exact(data.get("params"))),
            "macs": (data.get("macs"), fmt.count(data.get("macs")), _exact(data.get("macs"))),
            "flops": (data.get("flops"), fmt.count(data.get("flops")), _exact(data.get("flops"))),
            "latency": (one, fmt.milliseconds(one), f"95th percentile {fmt.milliseconds(p95[0])}"),
            "latencyn": (many, fmt.milliseconds(many), f"95th percentile {fmt.milliseconds(p95[1])}"),
            "throughput": (rate, fmt.count(rate), _exact(rate)),
            "memory": (data.get("peak_memory_bytes"), fmt.memory(data.get("peak_memory_bytes")),
                       _exact(data.get("peak_memory_bytes"))),
            "train": (data.get("train_seconds"), fmt.seconds(data.get("train_seconds")), "mean over seeds"),
            "erf": (1e9 if side_text == "> input" else side, side_text, ""),
        }  # fmt: skip
        rows.append({
            "series": s,
            "options": fmt.options(data.get("options")),
            "picked": s.index == pick,
            "accuracy": fmt.percent(s.accuracy(), decimals),
            "accuracy_value": s.accuracy(),
            "interval": "" if low is None else f"{fmt.percent(low, decimals)} to {fmt.percent(high, decimals)}",
            "bar": plots.interval_bar(s, domain, reference),
            "difference": gap if isinstance(gap, dict) else None,
            "difference_text": fmt.points(dig(gap, "mean"), decimals),
            "p": fmt.probability(dig(gap, "p_adjusted")),
            "cells": [(*cells[c["key"]], s.index in marked.get(c["key"], ())) for c in columns if c["key"] in cells],
            "status": status,
            "finished": finished,
            "trials": trials,
            "seeds": f"{finished}/{len(trials)}" if trials and status == "ok" else status,
            "trouble": status != "ok" or finished < len(trials),
            "error": data.get("error"),
            "width": data.get("width"),
        })  # fmt: skip
    rank = {"ok": 0, "failed": 1}
    rows.sort(key=lambda r: (r["accuracy_value"] is None, -(r["accuracy_value"] or 0), rank.get(r["status"], 2)))
    return rows


def _exact(value: Any) -> str:
    known = number(value)
    if known is None:
        return ""
    return f"{known:,.0f}".replace(",", fmt.NARROW) if known >= 100 else fmt.short(known)


def _pareto(
    series: list[Series], fronts: dict[str, set[int]], decimals: int, batch: float | None
) -> list[tuple[str, Svg]]:
    found = []
    titles = {"params": "parameters", "macs": "multiply-adds (MACs)", "latency": f"latency, batch {batch or 1:.0f}"}
    for key, title in titles.items():
        costs = {s.index: COSTS[key](s.data) for s in series}
        svg = plots.pareto(series, key, title, costs, fronts[key], decimals)
        if svg:
            found.append((title, svg))
    return found


def _strongest(measured: list[Series], decimals: int) -> list[tuple[Series, str, list[str]]]:
    rows = []
    for s in measured:
        cells = []
        for kind in ("noise", "blur"):
            values = [v for v in dig(s.data, "robustness", kind, "accuracy") or [] if number(v) is not None]
            cells.append(fmt.percent(values[-1], decimals) if values else fmt.MISSING)
        if any(c != fmt.MISSING for c in cells):
            rows.append((s, fmt.percent(s.accuracy(), decimals), cells))
    return rows


def _counted(series: list[Series]) -> list[dict[str, Any]]:
    totals = [sum(number(dig(s.data, "counts", kind)) or 0 for kind in plots.KINDS) for s in series]
    rows = []
    for s, total in zip(series, totals, strict=True):
        if not total and not isinstance(s.data.get("match"), dict):
            continue
        missing = dig(s.data, "counts", "not_counted")
        error = number(dig(s.data, "match", "relative_error"))
        rows.append({
            "series": s,
            "width": fmt.count(s.data.get("width") or dig(s.data, "match", "width")),
            "target": _budget(dig(s.data, "match", "target")),
            "achieved": _budget(dig(s.data, "match", "achieved")),
            "error": fmt.MISSING if error is None else f"{error * 100:+.1f}{fmt.NARROW}%".replace("-", "−"),
            "bar": plots.count_bar(s, max(totals)),
            "kinds": [fmt.count(dig(s.data, "counts", kind)) if total else fmt.MISSING for kind in plots.KINDS],
            "not_counted": ", ".join(map(str, missing)) if isinstance(missing, list) else str(missing or ""),
        })  # fmt: skip
    return rows


def _budget(value: Any) -> str:
    """A count, or a latency as a multiple of the baseline's."""
    return f"{value:.2f} ×" if isinstance(value, float) and number(value) is not None else fmt.count(value)


def _counts_unit(series: list[Series]) -> str:
    """The counts by kind are FLOPs or MACs: whichever they add up to."""
    for s in series:
        total = sum(number(dig(s.data, "counts", kind)) or 0 for kind in plots.KINDS)
        for key, unit in (("flops", "FLOPs"), ("macs", "MACs")):
            whole = number(s.data.get(key))
            if total and whole and abs(total / whole - 1) < 0.02:
                return unit
    return "operations"


def _method(results: dict[str, Any]) -> list[str]:
    words = results.get("statistics") or dig(results, "config", "statistics")
    if isinstance(words, str):
        return [words]
    return [str(word) for word in words] if isinstance(words, list) else []


def _flat(tree: Any, prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in (tree if isinstance(tree, dict) else {}).items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, dict):
            rows += _flat(value, f"{name}: ")
        elif value is not None and value != []:
            rows.append(
                (name.removesuffix(" bytes"), fmt.memory(value)) if name.endswith(" bytes") else (name, _text(value))
            )
    return rows


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _when(value: Any) -> str:
    try:
        moment = datetime.fromisoformat(str(value))
    except ValueError:
        return str(value or "")
    return f"{moment.day} {moment:%B %Y, %H:%M %Z}".strip()
