"""Trials on a real Dask scheduler with two worker processes."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compare.test_run import config
from torchconv.compare import compare


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("dask")
    file = folder / "scheduler.json"
    common = ["--scheduler-file", str(file)]
    scheduler_options = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--no-show"]
    worker_options = ["--nworkers", "2", "--nthreads", "1", "--no-dashboard", "--host", "127.0.0.1"]
    dask = [sys.executable, "-m", "dask"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder}
    processes = [subprocess.Popen([*dask, "scheduler", *common, *scheduler_options], **quiet)]
    try:
        deadline = time.monotonic() + 60
        while not file.exists():
            assert time.monotonic() < deadline, "the scheduler did not start"
            time.sleep(0.1)
        processes.append(subprocess.Popen([*dask, "worker", *common, *worker_options], **quiet))
        from distributed import Client

        with Client(scheduler_file=str(file)) as client:
            client.wait_for_workers(2, timeout=60)
            address = client.scheduler.address
        yield address
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait(timeout=30)


def test_trials_run_on_the_cluster(scheduler: str, tmp_path: Path) -> None:
    results = compare(config(tmp_path / "run", jobs=None, dask=scheduler, epochs=1))
    assert [c["status"] for c in results["candidates"]] == ["ok", "ok"]
    local = compare(config(tmp_path / "local", epochs=1))
    if local["config"]["threads"] == results["config"]["threads"]:
        assert [c["accuracy"]["per_seed"] for c in local["candidates"]] == [
            c["accuracy"]["per_seed"] for c in results["candidates"]
        ]


def test_files_come_back_from_a_worker_without_the_folder(scheduler: str, tmp_path: Path) -> None:
    from distributed import Client

    from torchconv.compare.schedule import run_trials
    from torchconv.compare.trial import Trial, load_data

    settings = config(tmp_path / "far" / "away", epochs=1)
    folder = tmp_path / "far" / "away" / "trials" / "conv-0"
    trial = Trial(
        settings, settings.candidates()[0], 8, 16, 0, 1, "none", 1, load_data(settings).fingerprint, str(folder)
    )
    ended = []
    with Client(scheduler):
        run_trials([trial], 1, scheduler, lambda t, m: ended.append(m["status"]))
    assert ended == ["ok"]
    assert {p.name for p in folder.iterdir()} == {
        "config.json",
        "metrics.json",
        "model.safetensors",
        "predictions.safetensors",
    }


def test_nobody_at_the_address(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no scheduler answers"):
        compare(config(tmp_path / "run", jobs=None, dask="tcp://127.0.0.1:9", epochs=1))
