"""Trials on one machine (joblib processes) or many (a Dask cluster); a crash costs one trial, not the run."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import torch

from torchconv._common import require, write_json
from torchconv.compare.trial import Trial, failure, read_metrics, run_trial, run_trial_elsewhere

Done = Callable[[Trial, dict[str, Any]], None]
MAX_CRASHES = 2
_stopping = threading.Event()
_THREAD = "torchconv-training"


def unfinished(trials: Iterable[Trial]) -> list[Trial]:
    """Trials without a result; failed ones are tried again."""
    return [t for t in trials if (read_metrics(t.folder) or {}).get("status") != "ok"]


def choose_jobs(jobs: int | None, trials: int, device: str) -> tuple[int, int]:
    """Trials at a time, and threads of each: processes of few threads train small networks fastest.

    ``OMP_NUM_THREADS`` bounds the threads: on cores that others use too, threads mostly wait for each other.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if jobs is None:
        gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
        jobs = 1 if gpu else max(1, min(trials, cores, 8))
    bound = os.environ.get("OMP_NUM_THREADS", "")
    threads = min(cores // jobs, int(bound)) if bound.isdigit() else cores // jobs
    return jobs, max(1, threads)


def _crash_count(trial: Trial) -> int:
    with contextlib.suppress(FileNotFoundError, ValueError):
        return int(json.loads((Path(trial.folder) / "crashes.json").read_text())["count"])
    return 0


def _note_crash(trial: Trial) -> int:
    count = _crash_count(trial) + 1
    write_json(Path(trial.folder) / "crashes.json", {"count": count})
    return count


def _in_processes(trials: list[Trial], jobs: int, done: Done) -> None:
    """Run in worker processes. When one dies, those that were running are tried again, one at a time."""
    joblib = require("joblib", "compare")
    broken = require("joblib.externals.loky.process_executor", "compare").BrokenProcessPool
    reusable = require("joblib.externals.loky", "compare").get_reusable_executor
    finished: set[str] = set()
    at_once, waiting = jobs, list(trials)
    while waiting:
        batch = waiting if at_once > 1 else waiting[:1]
        try:
            with joblib.parallel_config(backend="loky", inner_max_num_threads=batch[0].threads):
                # "loky" with one job would run in this process; two workers and one task do not.
                run = joblib.Parallel(n_jobs=max(2, at_once), return_as="generator_unordered", pre_dispatch="n_jobs")
                for name, metrics in run(joblib.delayed(_named)(t) for t in batch):
                    trial = next(t for t in batch if t.folder == name)
                    finished.add(name)
                    done(trial, metrics)
        except broken:
            if _stopping.is_set():
                return
            reusable(max_workers=max(2, at_once)).shutdown(wait=True, kill_workers=True)
            for trial in batch:
                running = (Path(trial.folder) / "started").exists() and trial.folder not in finished
                if running and _note_crash(trial) >= (1 if at_once == 1 else MAX_CRASHES):
                    metrics = failure(trial, "the worker process died (killed, or out of memory)")
                    write_json(Path(trial.folder) / "metrics.json", metrics)
                    finished.add(trial.folder)
                    done(trial, metrics)
            at_once = 1
        waiting = [t for t in waiting if t.folder not in finished]


def stop(exit_code: int) -> NoReturn:
    """End this process and its workers, after Ctrl-C; what they have not written is run again on resume."""
    loky = sys.modules.get("joblib.externals.loky.reusable_executor")
    if loky is not None:
        _stopping.set()
        loky.get_reusable_executor(reuse=True).shutdown(wait=True, kill_workers=True)
    for thread in threading.enumerate():
        if thread.name == _THREAD:
            thread.join(timeout=2 if loky else 0)
            if thread.is_alive():  # training in this process; every file on disk is whole
                os._exit(exit_code)
    sys.exit(exit_code)


@cache
def _leave_with_parent() -> None:
    """End this worker within a second of its parent's end, however that came; every file on disk is whole anyway."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _named(trial: Trial) -> tuple[str, dict[str, Any]]:
    _leave_with_parent()
    folder = Path(trial.folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "started").touch()
    try:
        return trial.folder, run_trial(trial)
    finally:
        (folder / "started").unlink(missing_ok=True)


def _on_cluster(trials: list[Trial], address: str, done: Done) -> None:
    distributed = require("distributed", "dask")
    try:
        client = distributed.Client(address, timeout="10s")
    except OSError as error:
        raise ValueError(f"dask={address!r}: no scheduler answers there ({type(error).__name__})") from None
    with client:
        if not client.scheduler_info()["workers"]:
            raise ValueError(f"dask={address!r}: the scheduler has no workers; start one with: dask worker {address}")
        futures = {
            client.submit(run_trial_elsewhere, t, key=f"{t.name}-{t.fingerprint[:8]}", pure=False): t for t in trials
        }
        for future in distributed.as_completed(list(futures)):
            trial, folder = futures[future], Path(futures[future].folder)
            crash = future.exception()
            if crash is not None:
                metrics = failure(trial, f"{type(crash).__name__}: {crash}".split("\n")[0])
                write_json(folder / "metrics.json", metrics)
            else:
                metrics, files = future.result()
                folder.mkdir(parents=True, exist_ok=True)
                for name, content in files.items():
                    (folder / name).write_bytes(content)
            done(trial, metrics)


def run_trials(trials: list[Trial], jobs: int, dask: str | None, done: Done) -> None:
    """Run what is unfinished and call ``done`` with each trial and its metrics, in the order they end."""
    waiting = unfinished(trials)
    if not waiting:
        return
    if dask is not None:
        _on_cluster(waiting, dask, done)
    elif jobs > 1:
        _in_processes(waiting, jobs, done)
    else:
        for trial in waiting:
            done(trial, run_trial(trial))


@contextlib.contextmanager
def in_background(work: Callable[[], None]) -> Iterator[threading.Event]:
    """Run ``work`` in a daemon thread and yield the event of its end; its exception is raised on leaving."""
    ended, errors = threading.Event(), []

    def target() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)
        finally:
            ended.set()

    threading.Thread(target=target, name=_THREAD, daemon=True).start()
    yield ended
    if errors:
        raise errors[0]
