"""From trials and costs to ``results.json``: statistics, Pareto fronts, verdict."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file

from torchconv._version import __version__
from torchconv.compare import stats
from torchconv.compare.config import CompareConfig
from torchconv.compare.match import TOLERANCE
from torchconv.compare.trial import Trial, read_metrics

if TYPE_CHECKING:
    from torchconv.compare.run import Plan

SCHEMA = 1


def _curves(ended: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "seed": m["seed"],
            "epochs": [r["epoch"] for r in m["history"]],
            "train_loss": [r["train_loss"] for r in m["history"]],
            "val_accuracy": [r["val_accuracy"] for r in m["history"]],
        }
        for m in ended
    ]


def _robustness(ended: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean accuracy over seeds at every level of every disturbance."""
    first = ended[0]["robustness"]
    return {
        kind: {
            "levels": first[kind]["levels"],
            "accuracy": np.mean([m["robustness"][kind]["accuracy"] for m in ended], axis=0).tolist(),
        }
        for kind in ("noise", "blur")
    }


def _trial_row(trial: Trial, metrics: dict[str, Any] | None) -> dict[str, Any]:
    found = metrics or {"status": "failed", "error": "did not run"}
    return {
        "seed": trial.seed,
        "status": found["status"],
        "accuracy": found.get("accuracy"),
        "error": found["error"],
        "epochs": found.get("epochs"),
        "seconds": found.get("seconds"),
    }


def _candidate(entry: dict[str, Any], trials: list[Trial], costs: dict[str, Any]) -> dict[str, Any]:
    mine = [(t, read_metrics(t.folder)) for t in trials if t.candidate.label == entry["label"]]
    ended = [m for _, m in mine if m and m["status"] == "ok"]
    row: dict[str, Any] = {
        "op": entry["op"],
        "options": entry["options"],
        "label": entry["label"],
        "status": entry["status"],
        "error": entry["error"],
        "trials": [_trial_row(t, m) for t, m in mine],
    }
    if entry["status"] == "ok":
        match = entry["match"]
        row |= {"width": match["width"], "fine": match["fine"]}
        row["match"] = {k: match[k] for k in ("target", "achieved", "relative_error")}
    if not ended:
        if entry["status"] == "ok":
            errors = sorted({t["error"] for t in row["trials"] if t["error"]})
            row |= {"status": "failed", "error": "; ".join(errors)}
        return row
    shown = next((m for m in ended if "erf" in m), {})
    return {
        **row,
        **costs[entry["label"]],
        "train_seconds": float(np.mean([m["train_seconds"] for m in ended])),
        "robustness": _robustness(ended),
        "curves": _curves(ended),
        "erf": shown.get("erf"),
        "kernels": shown.get("kernels", []),
    }


def _correct(label: str, trials: list[Trial]) -> np.ndarray:
    """(seeds, items) of the trials that ended well."""
    mine = (t for t in trials if t.candidate.label == label and (read_metrics(t.folder) or {}).get("status") == "ok")
    return np.stack([load_file(f"{t.folder}/predictions.safetensors")["correct"] for t in mine])


def _notes(
    config: CompareConfig, plan: Plan, candidates: list[dict[str, Any]], environment: dict[str, Any]
) -> list[str]:
    notes = []
    for c in candidates:
        error = (c.get("match") or {}).get("relative_error")
        if config.match != "none" and error is not None and abs(error) > TOLERANCE:
            notes.append(f"{c['label']} could not be matched within {TOLERANCE:.0%}: {config.match} {error:+.1%}.")
        failed = [t["seed"] for t in c["trials"] if t["status"] != "ok"]
        if failed and c["status"] == "ok":
            seeds = ", ".join(map(str, failed))
            notes.append(f"{c['label']}: seed {seeds} failed; its figures are those of the others.")
    if len(plan.dataset["size"]) == 2 and environment.get("gpu") is None:
        notes.append("Latency and memory are those of the channels-last layout.")
    if config.seeds == 1:
        notes.append("One seed: the intervals cover the choice of test items, not another training run.")
    return notes


def assemble(
    config: CompareConfig,
    plan: Plan,
    trials: list[Trial],
    costs: dict[str, Any],
    environment: dict[str, Any],
    command: str,
) -> dict[str, Any]:
    """The content of ``results.json``. Everything but times follows from the plan and the trials' files."""
    candidates = [_candidate(entry, trials, costs) for entry in plan.candidates]
    answer: dict[str, Any] = {"pick": None, "text": "No trial succeeded.", "reasons": []}
    ended = [c for c in candidates if c["status"] == "ok"]
    baseline = plan.candidates[0]["label"]
    reference = baseline if any(c["label"] == baseline for c in ended) else (ended[0]["label"] if ended else baseline)
    if ended:
        correct = {c["label"]: _correct(c["label"], trials) for c in ended}
        summary = stats.summarise(correct, reference, seed=config.seed)
        for c in ended:
            c |= summary[c["label"]]
        leader = max(correct, key=lambda label: float(correct[label].mean()))
        to_leader = {k: v["difference"] for k, v in stats.summarise(correct, leader, seed=config.seed).items()}
        answer = stats.verdict(ended, reference, against_best={k: d for k, d in to_leader.items() if d is not None})
    notes = _notes(config, plan, candidates, environment)
    if reference != baseline and ended:
        notes.insert(0, f"The baseline {baseline} did not run; differences are to {reference}.")
    return {
        "schema": SCHEMA,
        "torchconv": __version__,
        "command": command or _command(config),
        "created": plan.created,
        "environment": environment,
        "config": {**config.describe(), "epochs": plan.epochs, "augment": plan.augment, "threads": plan.threads},
        "dataset": plan.dataset,
        "baseline": reference,
        "candidates": candidates,
        "pareto": stats.pareto_fronts(ended) if ended else {},
        "verdict": answer,
        "notes": notes,
    }


def _command(config: CompareConfig) -> str:
    """A command line that repeats the run, from the options that differ from the defaults."""
    words, usual = ["torchconv", "compare"], CompareConfig()
    for name, value in config.describe().items():
        if value is not None and value != usual.describe()[name]:
            words += [f"--{name.replace('_', '-')}", ",".join(value) if name == "ops" else str(value)]
    return shlex.join(words)
