"""``torchconv compare``: plan, train, measure, compare, report.

The run directory holds ``plan.json`` (what was asked, the sizes chosen; written once), ``trials/``, ``measures.json``
and, at the end, ``results.json``, ``results.csv`` and ``report.html``. Every file is complete or absent, so that a run
may be killed at any moment and carried on with ``resume``.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from torchconv._common import write_json
from torchconv._version import __version__
from torchconv.analysis.latency import machine
from torchconv.compare.assemble import assemble
from torchconv.compare.config import DEFAULT_EPOCHS, CompareConfig
from torchconv.compare.match import solve
from torchconv.compare.measure import counts_of, latencies_of
from torchconv.compare.nets import Candidate, make_net
from torchconv.compare.report import write_csv, write_report
from torchconv.compare.schedule import choose_jobs, run_trials
from torchconv.compare.trial import Trial, build, load_data, shape_of
from torchconv.data import Dataset, Split
from torchconv.training import fit

PLAN_SCHEMA = 1


class Listener:
    """Hears what a run does; the command line shows it. Every method may be overridden, none has to."""

    def said(self, line: str) -> None:
        """A line about the run's progress."""

    def planned(self, trials: list[Trial]) -> None:
        """Sizes and epochs are fixed; these trials will run."""

    def ended(self, trial: Trial, metrics: dict[str, Any]) -> None:
        """A trial has ended, well or not."""

    def training(self, work: Callable[[], None]) -> None:
        """Call ``work``, which trains everything; a display may run beside it."""
        work()


@dataclass(frozen=True)
class Plan:
    """Everything that was decided before the first trial; read back on resume, never decided again."""

    epochs: int
    threads: int
    augment: str
    candidates: list[dict[str, Any]]
    config: dict[str, Any]
    dataset: dict[str, Any]
    created: str


def _augment(config: CompareConfig, data: Dataset) -> str:
    """Shifts for grey images, shifts and flips for colour ones, none for very small images and other data."""
    if config.augment != "auto":
        return config.augment
    if data.kind != "image" or min(data.train.x.shape[2:]) < 16:
        return "none"
    return "flip" if data.channels == 3 else "shift"


def _epochs_in(config: CompareConfig, data: Dataset, sized: list[tuple[Candidate, int, int]], jobs: int) -> int:
    """Epochs that fill the time budget, from a short measured run of every candidate."""
    assert config.time_budget is not None
    steps, seconds = 12, 0.0
    train = Split(data.train.x[: steps * config.batch_size], data.train.y[: steps * config.batch_size])
    few = replace(data, train=train, val=Split(data.val.x[:64], data.val.y[:64]))
    share = max(1.0, len(data.train) / len(few.train))
    for candidate, width, fine in sized:
        trial = Trial(config, candidate, width, fine, config.seed, 1, "none", 1, data.fingerprint, "")
        began = time.perf_counter()
        fit(build(trial, data), few, config.fit_config(config.seed, 1, _augment(config, data)))
        seconds += (time.perf_counter() - began) * share * config.seeds
    # Evaluation of the whole validation set comes on top of the measured epochs: about a tenth.
    return max(1, min(300, int(config.time_budget * jobs / (1.1 * seconds))))


def _make_plan(config: CompareConfig, data: Dataset, jobs: int, threads: int, listener: Listener) -> Plan:
    net, shape = make_net(config.net), shape_of(data)
    candidates = config.candidates()
    entries, sized = [], []
    for candidate in candidates:
        entry: dict[str, Any] = {"op": candidate.op, "options": dict(candidate.options), "label": candidate.label}
        try:
            chosen = solve(config.match, net, candidates[0], candidate, shape, batch=config.batch_size)
            entry |= {"status": "ok", "error": None, "match": chosen.describe()}
            sized.append((candidate, chosen.width, chosen.fine))
            listener.said(
                f"{candidate.label}: width {chosen.width}, inner width {chosen.fine}"
                + ("" if config.match == "none" else f", {config.match} {100 * chosen.relative_error:+.1f} %")
            )
        except ValueError as error:
            if candidate == candidates[0]:
                raise
            entry |= {"status": "skipped", "error": str(error), "match": None}
            listener.said(f"{candidate.label}: left out, {error}")
        entries.append(entry)
    epochs = config.epochs or DEFAULT_EPOCHS
    if config.time_budget is not None:
        epochs = _epochs_in(config, data, sized, jobs)
        listener.said(f"{epochs} epochs fit the time budget")
    return Plan(
        epochs=epochs,
        threads=threads,
        augment=_augment(config, data),
        candidates=entries,
        config=config.decisive(),
        dataset=data.describe(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _read_plan(path: Path, config: CompareConfig, data: Dataset) -> Plan:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        plan = Plan(**{k: found[k] for k in Plan.__dataclass_fields__})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"out={str(path.parent)!r}: plan.json cannot be read ({error}); use another --out") from None
    now = config.decisive()
    differing = [f"{k} was {plan.config.get(k)!r}, is {v!r}" for k, v in now.items() if plan.config.get(k) != v]
    if differing:
        raise ValueError(f"out={str(path.parent)!r}: holds another comparison: {'; '.join(differing)}")
    if plan.dataset["fingerprint"] != data.fingerprint:
        raise ValueError(f"data={config.data!r}: have changed since the run began; use another --out")
    return plan


def _absolute(path: str) -> str:
    return str(Path(path).resolve()) if Path(path).exists() else path


def _trials(config: CompareConfig, plan: Plan, data: Dataset, out: Path) -> list[Trial]:
    by_label = {c.label: c for c in config.candidates()}
    # Workers may stand in another folder.
    located = replace(config, data=_absolute(config.data), data_root=config.data_root and _absolute(config.data_root))
    # Seed by seed, so that a run cut short has something of every candidate.
    return [
        Trial(
            config=located,
            candidate=(candidate := by_label[entry["label"]]),
            width=entry["match"]["width"],
            fine=entry["match"]["fine"],
            seed=seed,
            epochs=plan.epochs,
            augment=plan.augment,
            threads=plan.threads,
            fingerprint=data.fingerprint,
            folder=str(out.resolve() / "trials" / f"{candidate.slug}-{seed}"),
        )
        for seed in range(config.seed, config.seed + config.seeds)
        for entry in plan.candidates
        if entry["status"] == "ok"
    ]


def _measure(config: CompareConfig, data: Dataset, trials: list[Trial], out: Path) -> dict[str, Any]:
    """Costs of every candidate; measured once, after training, when the machine is quiet."""
    path = out / "measures.json"
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    shape = shape_of(data)
    first = [t for t in trials if t.seed == config.seed]
    models = {t.candidate.label: build(t, data).eval() for t in first}
    costs: dict[str, dict[str, Any]] = {label: counts_of(model, shape) for label, model in models.items()}
    device = torch.device("cuda" if config.device in ("auto", "cuda") and torch.cuda.is_available() else "cpu")
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        for label, found in latencies_of(models, shape, config.batch_size, device).items():
            costs[label] |= found
    write_json(path, costs)
    return costs


def compare(
    config: CompareConfig, *, resume: bool = False, command: str = "", listener: Listener | None = None
) -> dict[str, Any]:
    """Compare operators on a data set at an equal budget and write the report.

    Args:
        config: what to do.
        resume: carry on a run in ``config.out``; without it the folder must be new or empty.
        command: the command line to print in the report.
        listener: hears of progress.

    Returns:
        The content of ``results.json``.

    Raises:
        ValueError, FileNotFoundError: bad arguments or data; nothing is written then.
        RuntimeError: no trial of any candidate succeeded.
    """
    listener = listener or Listener()
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={config.out!r}: is a file; name a folder")
    has_plan = (out / "plan.json").exists()
    if resume and not has_plan and out.exists() and any(out.iterdir()):
        raise ValueError(f"out={config.out!r}: holds no comparison to resume")
    if not resume and out.exists() and any(out.iterdir()):
        remedy = "add --resume to carry on, or name another folder" if has_plan else "name another folder"
        raise ValueError(f"out={config.out!r}: is not empty; {remedy}")
    data = load_data(config)
    for warning in data.warnings:
        listener.said(f"warning: {warning}")
    planned = len(config.ops) * config.seeds
    jobs, threads = choose_jobs(config.jobs, planned, config.device)
    if has_plan:
        plan = _read_plan(out / "plan.json", config, data)
    else:
        plan = _make_plan(config, data, jobs, threads, listener)
        write_json(out / "plan.json", {"schema": PLAN_SCHEMA, "torchconv": __version__, **vars(plan)})
    trials = _trials(config, plan, data, out)
    listener.planned(trials)
    heard = listener
    listener.training(lambda: run_trials(trials, jobs, config.dask, heard.ended))
    listener.said("measuring latency and memory")
    costs = _measure(config, data, trials, out)
    results = assemble(config, plan, trials, costs, machine(), command)
    write_json(out / "results.json", _finite(results))
    write_csv(results, out / "results.csv")
    write_report(results, out / "report.html")
    if all(c["status"] != "ok" for c in results["candidates"]):
        errors = sorted({c["error"] for c in results["candidates"] if c["error"]})
        raise RuntimeError(f"no trial succeeded: {'; '.join(errors)}")
    return results


def _finite(value: Any) -> Any:
    """NaN and infinity become null, which JSON can say."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value
