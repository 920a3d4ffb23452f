"""Time and memory of a forward pass, and what machine they were measured on.

A time means something only beside another one taken under the same conditions: :func:`paired_latency` measures
candidates in turn, one call each a round, so that what the machine does meanwhile hits them alike, and compares them
within rounds.
"""

from __future__ import annotations

import copy
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchconv._common import check, check_positive

__all__ = [
    "Latency",
    "PairedLatency",
    "Ratio",
    "latency",
    "machine",
    "model_peak_memory",
    "paired_latency",
    "peak_memory",
    "training_step",
]

_MOST_SAMPLES = 10_000


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call: median, 95th percentile, and every sample in the order taken."""

    median_ms: float
    p95_ms: float
    samples: tuple[float, ...] = field(repr=False)

    @classmethod
    def of(cls, samples: list[float] | tuple[float, ...]) -> Latency:
        """Summarise samples given in milliseconds."""
        return cls(float(np.median(samples)), float(np.percentile(samples, 95)), tuple(samples))

    def summary(self) -> dict[str, float]:
        """Median and 95th percentile, as result files hold them."""
        return {"median_ms": self.median_ms, "p95_ms": self.p95_ms}


@dataclass(frozen=True)
class Ratio:
    """A candidate's time over the baseline's in the same round: the median, and its interval over rounds."""

    median: float
    low: float
    high: float
    confidence: float

    @property
    def distinguishable(self) -> bool:
        """Whether the interval leaves out 1."""
        return not self.low <= 1.0 <= self.high


@dataclass(frozen=True)
class PairedLatency:
    """Times by candidate, and ratios to the baseline taken round by round."""

    baseline: str
    latencies: dict[str, Latency]
    ratios: dict[str, Ratio]


def latency(
    fn_or_model: Callable[..., Any],
    x: Any = None,
    *,
    warmup: int = 3,
    repeats: int = 20,
    min_seconds: float = 0.2,
    device: str | torch.device = "auto",
) -> Latency:
    """Time one call of a model or function, from issuing it to its result being there.

    A module runs in eval mode; nothing records gradients. On a GPU every call is timed by two events with the device
    idle before the first, so that launch overhead counts as it does for somebody who waits for one answer.

    Args:
        fn_or_model: called as ``fn(x)``, ``fn(*x)`` if ``x`` is a tuple, or ``fn()`` if it is None.
        x: the input, already on its device.
        warmup: calls before timing starts, ≥ 0.
        repeats: at least this many samples, ≥ 1 (at most 10,000 are taken).
        min_seconds: go on sampling until this much time was measured, ≥ 0.
        device: where the work happens; "auto" is where the input or the model lies.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> latency(nn.Linear(4, 4), torch.zeros(1, 4), repeats=5, min_seconds=0).median_ms > 0
        True
    """
    return _round_robin({"": fn_or_model}, x, warmup, repeats, min_seconds, device)[""]


def paired_latency(
    candidates: Mapping[str, Callable[..., Any]],
    x: Any = None,
    *,
    baseline: str | None = None,
    warmup: int = 3,
    repeats: int = 20,
    min_seconds: float = 0.2,
    device: str | torch.device = "auto",
    confidence: float = 0.95,
) -> PairedLatency:
    """Time several candidates in turn and compare each with the baseline round by round.

    Every round calls each candidate once, starting one further along each time; slow drift (clock, heat, another
    process) cancels in the ratio of two times of one round. The interval of the median ratio is the distribution-free
    one from order statistics; it takes rounds as independent.

    Args:
        candidates: name → model or function, all called with ``x`` as in :func:`latency`.
        x: the input.
        baseline: the name that ratios refer to; the first by default.
        warmup, repeats, min_seconds: per candidate, as in :func:`latency`.
        device: where the work happens.
        confidence: of the ratios' intervals, in (0, 1). Fewer than 6 rounds cannot give 0.95; the interval then spans
            all rounds.

    Returns:
        :class:`PairedLatency`; ratios below 1 are faster than the baseline.

    Raises:
        ValueError: no candidates, an unknown baseline, or a number out of range.
    """
    names = list(candidates)
    check(bool(names), "candidates", dict(candidates), "pass at least one name with its function")
    base = names[0] if baseline is None else baseline
    check(base in candidates, "baseline", base, f"choose one of {', '.join(names)}")
    check(0 < confidence < 1, "confidence", confidence, "must lie between 0 and 1")
    times = _round_robin(candidates, x, warmup, repeats, min_seconds, device)
    reference = np.asarray(times[base].samples)
    ratios = {
        name: _median_interval(np.asarray(times[name].samples) / reference, confidence)
        for name in names
        if name != base
    }
    return PairedLatency(base, times, ratios)


def peak_memory(fn: Callable[[], Any], device: str | torch.device = "cpu") -> int:
    """Bytes of tensors alive at once while ``fn()`` runs, beyond those alive when it starts.

    CUDA: ``max_memory_allocated`` less what was allocated before. CPU: the highest running sum of what PyTorch's own
    allocator hands out and takes back, from the profiler's memory events. That covers tensors, what autograd keeps, and
    the scratch space that kernels and custom operators take through PyTorch; it does not see what oneDNN, MKL or NumPy
    allocate themselves, nor memory that the process held before.

    Args:
        fn: called once, without arguments.
        device: "cpu" or a CUDA device.

    Raises:
        ValueError: memory cannot be measured on that kind of device.

    Example:
        >>> peak_memory(lambda: torch.empty(1000))
        4000
    """
    where = torch.device(device)
    if where.type == "cuda":
        torch.cuda.synchronize(where)
        torch.cuda.reset_peak_memory_stats(where)
        before = torch.cuda.memory_allocated(where)
        result = fn()
        torch.cuda.synchronize(where)
        peak = torch.cuda.max_memory_allocated(where) - before
        del result
        return peak
    check(where.type == "cpu", "device", str(device), "memory is measured on cpu and cuda")
    with _quiet_profiler(), torch.autograd.profiler.profile(use_kineto=True, profile_memory=True) as profile:
        result = fn()
    del result
    events = profile.kineto_results.events() if profile.kineto_results is not None else []
    changes = sorted(((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"), key=lambda c: c[0])
    running = np.cumsum([size for _, size in changes] or [0])
    return max(int(running.max()), 0)


def model_peak_memory(model: nn.Module, x: Any, *, backward: bool = False, device: str | torch.device = "auto") -> int:
    """Peak memory of one forward pass, or of a forward and backward pass, beyond the parameters and the input.

    Forward: eval mode without gradients. With ``backward``: a copy of the model in train mode, gradients of
    the parameters included, of the input not; the optimizer's state is not part of it.

    Args:
        model: left as it is.
        x: the input, or a tuple of inputs.
        backward: also run the backward pass of the sum of the first output.
        device: where the model lies.
    """
    where = _device(model, x, device)
    if not backward:
        with _ready(model), torch.no_grad():
            return peak_memory(lambda: _call(model, x), where)
    replica = copy.deepcopy(model).train()
    for parameter in replica.parameters():
        parameter.grad = None

    step = training_step(replica, x)
    with torch.random.fork_rng(devices=[where.index or 0] if where.type == "cuda" else []):
        return peak_memory(step, where)


def training_step(model: nn.Module, x: Any) -> Callable[[], None]:
    """A function that runs the forward and backward pass of the sum of the model's first output, in its present mode.

    Args:
        model: called as in :func:`latency`; each call starts with fresh gradients.
        x: the input, or a tuple of inputs.
    """

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.enable_grad():
            out = _call(model, x)
            while not isinstance(out, Tensor):
                out = next(iter(out.values() if isinstance(out, Mapping) else out))
            out.sum().backward()

    return step


def machine() -> dict[str, Any]:
    """What the numbers were measured on: processor, cores, threads, memory, system, versions, GPU.

    No names of hosts or users and no paths.
    """
    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": _memory_bytes(),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpu": None,
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["gpu_memory_bytes"] = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        facts["cuda"] = torch.version.cuda
    elif torch.backends.mps.is_available():
        facts["gpu"] = "Apple GPU (MPS)"
    return facts


# -- below: how it is done ---------------------------------------------------------------------------------------------


def _round_robin(
    candidates: Mapping[str, Callable[..., Any]],
    x: Any,
    warmup: int,
    repeats: int,
    min_seconds: float,
    device: str | torch.device,
) -> dict[str, Latency]:
    check_positive("warmup", warmup, zero=True)
    check_positive("repeats", repeats)
    check(math.isfinite(min_seconds) and min_seconds >= 0, "min_seconds", min_seconds, "must be a number >= 0")
    names = list(candidates)
    samples: dict[str, list[float]] = {name: [] for name in names}
    clocks = {name: _clock(_device(fn, x, device)) for name, fn in candidates.items()}
    with torch.no_grad(), _ready(*candidates.values()):
        for _ in range(warmup):
            for name in names:
                clocks[name](candidates[name], x)
        limit = min_seconds * len(names) * 1e3
        spent, rounds = 0.0, 0
        while rounds < repeats or (spent < limit and rounds < _MOST_SAMPLES):
            for step in range(len(names)):
                name = names[(step + rounds) % len(names)]
                taken = clocks[name](candidates[name], x)
                samples[name].append(taken)
                spent += taken
            rounds += 1
    return {name: Latency.of(times) for name, times in samples.items()}


def _call(fn: Callable[..., Any], x: Any) -> Any:
    if x is None:
        return fn()
    return fn(*x) if isinstance(x, tuple) else fn(x)


def _clock(device: torch.device) -> Callable[[Callable[..., Any], Any], float]:
    """A function that runs one call on ``device`` and returns its milliseconds."""

    def by_events(fn: Callable[..., Any], x: Any) -> float:
        with torch.cuda.device(device):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            _call(fn, x)
            stop.record()
            stop.synchronize()
        return start.elapsed_time(stop)

    wait = torch.mps.synchronize if device.type == "mps" else lambda: None

    def by_clock(fn: Callable[..., Any], x: Any) -> float:
        wait()
        start = time.perf_counter_ns()
        _call(fn, x)
        wait()
        return (time.perf_counter_ns() - start) / 1e6

    return by_events if device.type == "cuda" else by_clock


def _device(fn: Any, x: Any, device: str | torch.device) -> torch.device:
    if str(device) != "auto":
        return torch.device(device)
    inputs = x if isinstance(x, tuple) else (x,)
    placed: list[Tensor] = [t for t in inputs if isinstance(t, Tensor)]
    if not placed and isinstance(fn, nn.Module):
        placed.extend([*fn.parameters()][:1])
    return placed[0].device if placed else torch.device("cpu")


@contextmanager
def _ready(*functions: Any) -> Iterator[None]:
    """Modules among ``functions`` in eval mode; every flag as it was afterwards."""
    flags = [(m, m.training) for f in functions if isinstance(f, nn.Module) for m in f.modules()]
    try:
        for function in functions:
            if isinstance(function, nn.Module):
                function.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training


def _median_interval(values: np.ndarray, confidence: float) -> Ratio:
    """The median, and the pair of order statistics that holds the true one with at least ``confidence``."""
    ordered = np.sort(values)
    n, tail, rank = len(ordered), (1 - confidence) / 2, 0
    if n < 1000:
        below, term = 0.0, 0.5**n
        while below + term <= tail:  # below = P(Binomial(n, 1/2) < rank)
            below += term
            rank += 1
            term *= (n - rank + 1) / rank
    else:
        rank = math.floor((n + statistics.NormalDist().inv_cdf(tail) * math.sqrt(n)) / 2)
    low = max(rank - 1, 0)
    return Ratio(float(np.median(ordered)), float(ordered[low]), float(ordered[n - 1 - low]), confidence)


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Keep the profiler's start-up log off the terminal; it reads the level from the environment."""
    name = "KINETO_LOG_LEVEL"
    before = os.environ.get(name)
    os.environ.setdefault(name, "99")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.lower().startswith(("model name", "hardware", "cpu model")):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
