"""A comparison from end to end: files, resuming, crashes, bad arguments."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from torchconv.compare import CompareConfig, Listener, compare, schedule
from torchconv.compare import trial as trial_module
from torchconv.compare.trial import read_metrics

TIMES = {"created", "seconds", "train_seconds", "latency", "throughput", "environment", "command", "verdict", "pareto"}


def config(out: Path, **options: Any) -> CompareConfig:
    settings = {"ops": ("conv", "depthwise:kernel_size=3"), "net": "mini:depth=1:base=8", "epochs": 2, "seeds": 2}
    return CompareConfig(**{**settings, "limit": 200, "jobs": 1, "out": str(out), **options})


def timeless(value: Any) -> Any:
    """Results without what depends on the clock."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in TIMES}
    return [timeless(v) for v in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("compare") / "run"
    return out, compare(config(out))


def test_files_and_schema(finished: tuple[Path, dict[str, Any]]) -> None:
    out, results = finished
    assert json.loads((out / "results.json").read_text())["schema"] == 1
    assert (out / "report.html").read_text().startswith("<!")
    assert len((out / "results.csv").read_text().splitlines()) == 3
    assert {p.name for p in out.iterdir()} >= {"plan.json", "measures.json", "trials"}
    assert not list(out.rglob("*.tmp"))
    for folder in (out / "trials").iterdir():
        names = {p.name for p in folder.iterdir()}
        assert names == {"config.json", "metrics.json", "model.safetensors", "predictions.safetensors"}
    assert [c["label"] for c in results["candidates"]] == ["conv", "depthwise:kernel_size=3"]
    for c in results["candidates"]:
        assert c["status"] == "ok"
        assert len(c["accuracy"]["per_seed"]) == 2
        assert c["accuracy"]["low"] <= c["accuracy"]["mean"] <= c["accuracy"]["high"]
        assert c["flops"] >= 2 * c["macs"] > 0
        assert c["latency"]["batch1"]["median_ms"] > 0
        assert c["peak_memory_bytes"] > 0
        assert len(c["curves"]) == 2
        assert c["erf"]["size"] == [8, 8]
        assert c["kernels"]
        assert c["robustness"]["noise"]["accuracy"]
    assert results["candidates"][0]["difference"] is None
    assert 0 <= results["candidates"][1]["difference"]["p_adjusted"] <= 1
    assert results["verdict"]["text"]


def test_model_on_disk_is_the_trained_one(finished: tuple[Path, dict[str, Any]]) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file

    from torchconv.compare.nets import Shape, make_candidate, make_net
    from torchconv.data import load
    from torchconv.training import predict

    out, results = finished
    folder = out / "trials" / "conv-0"
    with safe_open(folder / "model.safetensors", "pt") as file:
        described = json.loads(file.metadata()["config"])
    net = make_net(described["net"])
    model = net.build(make_candidate(described["op"]), Shape(1, (8, 8), 10), described["width"], described["fine"])
    model.load_state_dict(load_file(folder / "model.safetensors"))
    data = load("digits", limit=200, seed=0)
    accuracy = predict(model.eval(), data.test.x, data).argmax(1).eq(data.test.y).double().mean()
    assert float(accuracy) == results["candidates"][0]["accuracy"]["per_seed"][0]


def test_finished_run_is_read_not_rerun(finished: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    out, results = finished
    monkeypatch.setattr(trial_module, "_train_and_test", lambda *a: pytest.fail("ran again"))
    assert compare(config(out), resume=True)["candidates"] == results["candidates"]


def test_folder_in_use_is_not_overwritten(finished: tuple[Path, dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="--resume"):
        compare(config(finished[0]))
    with pytest.raises(ValueError, match="epochs was 2, is 3"):
        compare(config(finished[0], epochs=3), resume=True)


def test_interrupted_run_gives_the_same_numbers(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Killed by SIGKILL in the middle of a trial, then resumed."""
    out = tmp_path / "killed"
    code = (
        "import os, signal, sys\n"
        "from torchconv.compare import trial, run\n"
        "from tests.compare.test_run import config\n"
        "from pathlib import Path\n"
        "seen = []\n"
        "write = trial.write_json\n"
        "def killing(path, value):\n"
        "    write(path, value)\n"
        "    if path.name == 'progress.json':\n"
        "        seen.append(path)\n"
        "        if len(seen) == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "trial.write_json = killing\n"
        f"run.compare(config(Path({str(out)!r})))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    trials = out / "trials"
    assert (read_metrics(trials / "conv-0") or {})["status"] == "ok"
    assert read_metrics(trials / "depthwise-kernel_size=3-0") is None
    before = (trials / "conv-0" / "metrics.json").stat().st_mtime_ns
    results = compare(config(out), resume=True)
    assert (trials / "conv-0" / "metrics.json").stat().st_mtime_ns == before
    expected = timeless(finished[1])
    ours = timeless(results)
    ours["config"]["out"] = expected["config"]["out"]
    assert ours == expected


def test_parallel_trials_give_the_same_numbers(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    # One thread each, as in the plan of the other run on one core; sums do not depend on the process.
    results = compare(config(tmp_path / "two", jobs=2))
    ours = [c["accuracy"]["per_seed"] for c in results["candidates"]]
    if results["config"]["threads"] == finished[1]["config"]["threads"]:
        assert ours == [c["accuracy"]["per_seed"] for c in finished[1]["candidates"]]
    assert all(c["status"] == "ok" for c in results["candidates"])


def test_a_failing_trial_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = trial_module.build

    def failing(trial: Any, data: Any) -> torch.nn.Module:
        if trial.candidate.op == "depthwise" and trial.seed == 1 and trial.epochs == 1:
            raise MemoryError("no room")
        return build(trial, data)

    monkeypatch.setattr(trial_module, "build", failing)
    heard = []

    class Hearing(Listener):
        def ended(self, trial: Any, metrics: dict[str, Any]) -> None:
            heard.append(metrics["status"])

    results = compare(config(tmp_path / "run", epochs=1), listener=Hearing())
    row = results["candidates"][1]
    assert heard.count("failed") == 1
    assert row["status"] == "ok"
    assert len(row["accuracy"]["per_seed"]) == 1
    assert [t["error"] for t in row["trials"]] == [None, "MemoryError: no room"]
    assert any("seed 1 failed" in n for n in results["notes"])
    assert "MemoryError" in (tmp_path / "run" / "trials" / "depthwise-kernel_size=3-1" / "error.txt").read_text()
    monkeypatch.setattr(trial_module, "build", build)
    assert compare(config(tmp_path / "run", epochs=1), resume=True)["candidates"][1]["trials"][1]["status"] == "ok"


def test_a_dying_worker_costs_one_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "_named", dying)  # here alone; workers call the real one from it
    results = compare(config(tmp_path / "run", epochs=1, jobs=2))
    outcomes = [str(t["error"]) for c in results["candidates"] for t in c["trials"]]
    assert outcomes.count("None") == 3, outcomes
    assert sum("worker process died" in error for error in outcomes) == 1


def dying(trial: Any) -> tuple[str, dict[str, Any]]:
    """A trial whose process is killed from outside, as by the kernel when memory runs out."""
    if trial.candidate.op == "depthwise" and trial.seed == 0:
        Path(trial.folder).mkdir(parents=True, exist_ok=True)
        (Path(trial.folder) / "started").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return schedule._named(trial)


def test_operator_that_does_not_fit_is_left_out_and_volumes_work(tmp_path: Path) -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    y = np.arange(120) % 3
    x = rng.normal(size=(120, 2, 5, 6, 4)).astype("float32") + y[:, None, None, None, None]
    np.savez(tmp_path / "volumes.npz", x=x, y=y)
    settings = {"data": str(tmp_path / "volumes.npz"), "ops": ("conv", "unireplknet:kernel_size=4")}
    settings |= {"epochs": 1, "seeds": 1, "limit": None}
    results = compare(config(tmp_path / "run", **settings))
    assert [c["status"] for c in results["candidates"]] == ["ok", "skipped"]
    assert "kernel_size" in results["candidates"][1]["error"]
    assert "unireplknet" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(("bound", "expected"), [(None, (2, 4)), ("3", (2, 3)), ("16", (2, 4)), ("3,2", (2, 4))])
def test_threads_of_a_trial_are_bounded_by_the_environment(
    bound: str | None, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if bound is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", bound)
    assert schedule.choose_jobs(2, 9, "cpu") == expected


def test_time_budget_sets_the_epochs(tmp_path: Path) -> None:
    results = compare(config(tmp_path / "run", epochs=None, time_budget=0.001, seeds=1))
    assert results["config"]["epochs"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 0}, "seeds"),
        ({"match": "size"}, "match"),
        ({"ops": ()}, "ops"),
        ({"ops": ("conv", "conv")}, "twice"),
        ({"ops": ("convv",)}, "did you mean conv"),
        ({"time_budget": 5.0}, "either epochs"),
        ({"net": "huge"}, "net"),
        ({"lr": -1.0}, "lr"),
        ({"dask": "tcp://localhost:1"}, "either jobs"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        compare(config(tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_missing_data_leave_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match="nowhere"):
        compare(config(tmp_path / "run", data=str(tmp_path / "nowhere")))
    assert not (tmp_path / "run").exists()
