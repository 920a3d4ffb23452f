"""What ``torchconv compare`` shows while it runs and when it has ended."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from torchconv.cli._network import wide
from torchconv.compare import Listener
from torchconv.compare.schedule import in_background
from torchconv.compare.trial import Trial, read_metrics

_POLL = 0.5


class LiveListener(Listener):
    """Shows every running trial with loss, accuracy and time left; one line a trial where the output is no terminal."""

    def __init__(self, out: Path) -> None:
        self.console = Console()
        self.out = out
        self.trials: list[Trial] = []
        self.live: Live | None = None
        self.lock = threading.Lock()
        self.done = 0
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )

    def said(self, line: str) -> None:
        """Print a line."""
        self.console.print(line, highlight=False, markup=False)

    def planned(self, trials: list[Trial]) -> None:
        """Set up the bar over all epochs."""
        self.trials = trials
        if not trials:
            return
        self.done = sum((read_metrics(t.folder) or {}).get("status") == "ok" for t in trials)
        again = f", {self.done} of them finished before" if self.done else ""
        self.said(f"{len(trials)} trials of {trials[0].epochs} epochs{again}; results in {self.out}")
        self.task = self.progress.add_task("epochs", total=len(trials) * trials[0].epochs)

    def ended(self, trial: Trial, metrics: dict[str, Any]) -> None:
        """Print a trial's outcome."""
        with self.lock:
            self.done += 1
            if metrics["status"] == "ok":
                outcome = f"{100 * metrics['accuracy']:.2f} % in {metrics['seconds']:.1f} s"
            else:
                outcome = f"failed: {metrics['error']}"
            self.said(f"[{self.done}/{len(self.trials)}] {trial.name}: {outcome}")

    def training(self, work: Callable[[], None]) -> None:
        """Train in the background and keep the display fresh."""
        with in_background(work) as ended:
            if not self.console.is_terminal:
                while not ended.wait(_POLL):
                    pass
                return
            with Live(self._render(), console=self.console, refresh_per_second=4, transient=True) as self.live:
                while not ended.wait(_POLL):
                    self.live.update(self._render())

    def close(self) -> None:
        """Give the terminal back."""
        if self.live is not None:
            self.live.stop()

    def _render(self) -> Group:
        table = Table("trial", "epoch", "loss", "validation", "left", box=None)
        height, finished = max(3, shutil.get_terminal_size().lines - 8), 0
        for trial in self.trials:
            folder = Path(trial.folder)
            if (folder / "metrics.json").exists():
                finished += trial.epochs
                continue
            try:
                now = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
            except (FileNotFoundError, ValueError):
                continue
            epoch = now["epoch"]
            finished += epoch
            left = (trial.epochs - epoch) * now["seconds"]
            if table.row_count < height:
                accuracy = f"{100 * now['val_accuracy']:.1f} %"
                table.add_row(trial.name, f"{epoch}/{trial.epochs}", f"{now['train_loss']:.3f}", accuracy, _clock(left))
        self.progress.update(self.task, completed=finished)
        return Group(table, self.progress)


def _clock(seconds: float) -> str:
    return time.strftime("%M:%S" if seconds < 3600 else "%H:%M:%S", time.gmtime(seconds))


def _count(value: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.0f}"


def print_results(results: dict[str, Any], out: Path) -> None:
    """The table, the verdict and where the report is."""
    console = wide()
    batch = next((c["latency"]["batchN"]["batch"] for c in results["candidates"] if c["status"] == "ok"), "N")
    table = Table(box=None)
    columns = (
        "operator",
        "accuracy",
        "95 % interval",
        "vs baseline",
        "p",
        "params",
        "MACs",
        "ms at 1",
        f"ms at {batch}",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "operator" else "right")
    for c in results["candidates"]:
        if c["status"] != "ok":
            table.add_row(c["label"], c["status"], c["error"] or "")
            continue
        accuracy, difference = c["accuracy"], c["difference"]
        table.add_row(
            c["label"],
            f"{100 * accuracy['mean']:.2f} %",
            f"{100 * accuracy['low']:.2f} … {100 * accuracy['high']:.2f}",
            f"{100 * difference['mean']:+.2f}" if difference else "baseline",
            f"{difference['p_adjusted']:.3g}" if difference and difference["p_adjusted"] is not None else "",
            _count(c["params"]),
            _count(c["macs"]),
            f"{c['latency']['batch1']['median_ms']:.2f}",
            f"{c['latency']['batchN']['median_ms']:.2f}",
        )
    console.print(table)
    console.print(f"\n{results['verdict']['text']}", highlight=False, markup=False)
    console.print(f"\nreport: {out / 'report.html'}", highlight=False, markup=False, soft_wrap=True)
