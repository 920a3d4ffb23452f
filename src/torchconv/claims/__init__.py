"""Claims: what a paper says, as an experiment that runs on a desk and ends in a verdict.

One file a method, ``claims/KEY.py``, with one function under ``@claim``. ``run_claim`` executes it, adds the machine
and the time, and returns plain data; the documentation's ledger is generated from the JSON files it writes.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from torchconv._common import check_choice, did_you_mean, write_json
from torchconv._version import __version__
from torchconv.catalog import paper

BUDGETS = ("quick", "full")
Verdict = Literal["supported", "not supported", "inconclusive"]
Progress = Callable[[str], None]
Experiment = Callable[[str, Progress], "Evidence"]


@dataclass(frozen=True)
class Evidence:
    """What an experiment measured: an effect whose positive direction is what the paper claims, with its interval.

    Without an explicit ``verdict`` it follows from the interval: above ``threshold`` supported, below it not
    supported, across it inconclusive.
    """

    effect: float
    low: float
    high: float
    unit: str
    meaning: str
    threshold: float = 0.0
    verdict: Verdict | None = None
    measurements: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def conclude(self) -> Verdict:
        """The verdict."""
        if self.verdict is not None:
            return self.verdict
        if self.low > self.threshold:
            return "supported"
        return "not supported" if self.high < self.threshold else "inconclusive"


@dataclass(frozen=True)
class Claim:
    """A paper's statement (in our words), where it stands, and the desk-scale experiment that tests it."""

    key: str
    says: str
    source: str
    experiment: str
    run: Experiment


_FOUND: dict[str, Claim] = {}


def claim(key: str, says: str, source: str, experiment: str) -> Callable[[Experiment], Experiment]:
    """Announce the experiment of a method."""

    def decorate(run: Experiment) -> Experiment:
        _FOUND[key] = Claim(key, says, source, experiment, run)
        return run

    return decorate


def claims() -> dict[str, Claim]:
    """All claims by method key."""
    for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        importlib.import_module(f"torchconv.claims.{path.stem}")
    return dict(sorted(_FOUND.items()))


def get_claim(key: str) -> Claim:
    """The claim of a method; a wrong key raises ``ValueError`` with the nearest ones."""
    known = claims()
    if key not in known:
        raise ValueError(f"key={key!r}: no claim of that name; {did_you_mean(key, known)}")
    return known[key]


def run_claim(key: str, budget: str = "quick", progress: Progress | None = None) -> dict[str, Any]:
    """Run one claim and return its record: the statement, the measured effect with interval, the verdict, the machine.

    Args:
        key: the method.
        budget: "quick" (about a minute) or "full" (about ten), on two cores.
        progress: called with a line of text now and then.
    """
    from torchconv.analysis.latency import machine

    check_choice("budget", budget, BUDGETS)
    wanted = get_claim(key)
    began = time.perf_counter()
    evidence = wanted.run(budget, progress or (lambda line: None))
    return {
        "schema": 1,
        "key": key,
        "title": paper(key).title,
        "says": wanted.says,
        "source": wanted.source,
        "experiment": wanted.experiment,
        "budget": budget,
        "verdict": evidence.conclude(),
        **{k: v for k, v in asdict(evidence).items() if k != "verdict"},
        "seconds": round(time.perf_counter() - began, 1),
        "torchconv": __version__,
        "machine": machine(),
    }


def write_record(record: dict[str, Any], folder: str | Path) -> Path:
    """Write a claim's record as ``folder/KEY.json``."""
    path = Path(folder) / f"{record['key']}.json"
    write_json(path, record)
    return path


def read_records(folder: str | Path) -> list[dict[str, Any]]:
    """All records of a folder, by key."""
    return [json.loads(p.read_text(encoding="utf-8")) for p in sorted(Path(folder).glob("*.json"))]
