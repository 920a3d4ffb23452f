"""``torchconv bench ops``: each operator against the obvious expression and its peers, paired, with the roofline."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchconv._common import check, check_choice, did_you_mean
from torchconv.analysis.ceiling import ceiling
from torchconv.analysis.count import count
from torchconv.analysis.latency import machine, paired_latency, peak_memory
from torchconv.bench.cases import Case, Place, cases

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_AGREE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def bench_ops(
    ops: tuple[str, ...] = (),
    *,
    device: str = "cpu",
    dtype: str = "float32",
    backward: bool = True,
    min_seconds: float = 0.3,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Time operators against the obvious PyTorch expression and published peers.

    All forms of a case take turns call by call. Before timing, their outputs are compared: a row of forms that disagree
    says so. FLOPs are those of the direct form and bytes those of inputs, parameters and output read or written once,
    so that GFLOP/s and GB/s are useful ones; an FFT may exceed the ceiling that way.

    Args:
        ops: names of :func:`torchconv.bench.cases.cases`; all by default.
        device: "cpu", "cuda", ….
        dtype: "float32", "bfloat16" or "float16".
        backward: also time forward and backward together.
        min_seconds: time for each form of each case and pass.
        progress: called with a line for each case.

    Returns:
        {"schema", "machine", "device", "dtype", "ceiling", "rows": [{"op", "case", "pass", "form", "ms", "p95_ms",
        "speedup", "speedup_interval", "memory_bytes", "gflops", "gbs", "bound", "max_rel_diff"}], "skipped"}; speedup
        is the form's time over ours in the same round.

    Raises:
        ValueError: an unknown operator or type.
    """
    check_choice("dtype", dtype, DTYPES)
    known = cases()
    for op in ops:
        check(op in known, "ops", op, did_you_mean(op, known))
    say = progress or (lambda line: None)
    place = Place(device, DTYPES[dtype])
    roof = ceiling(device, place.dtype)
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    for op in ops or tuple(known):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for one in known[op](place):
                say(f"{op} {one.label}")
                try:
                    rows += _measure(op, one, place, roof, backward, min_seconds)
                except (RuntimeError, NotImplementedError) as error:  # a type or device that an expression lacks
                    skipped.append({"op": op, "case": one.label, "why": str(error).split("\n")[0]})
    return {
        "schema": 1,
        "machine": machine(),
        "device": device,
        "dtype": dtype,
        "ceiling": roof,
        "rows": rows,
        "skipped": skipped,
    }


def _forms(one: Case) -> dict[str, Callable[..., Tensor]]:
    forms = {"torchconv": one.ours}
    if one.eager is not None:
        forms["eager"] = one.eager
    return {**forms, **one.peers}


def _measure(
    op: str, one: Case, place: Place, roof: dict[str, float], backward: bool, min_seconds: float
) -> list[dict[str, Any]]:
    forms = _forms(one)
    with torch.no_grad():
        expected = one.ours(*one.inputs)
        differences = {name: _difference(fn(*one.inputs), expected) for name, fn in forms.items()}
    flops = one.flops if one.flops is not None else _direct_flops(one)
    tensors = (*one.inputs, *one.params)
    moved = sum(t.numel() * t.element_size() for t in (*tensors, expected))
    rows = []
    leaves = tuple(t.detach().requires_grad_() if t.is_floating_point() else t for t in one.inputs)
    passes: dict[str, tuple[dict[str, Callable[[], Any]], float]] = {
        "forward": ({n: _forward(fn, one.inputs) for n, fn in forms.items()}, 1.0)
    }
    if backward and one.backward:
        steps = {n: _training(fn, leaves, one.params, torch.ones_like(expected)) for n, fn in forms.items()}
        passes["training"] = (steps, 3.0)  # the forward pass and two gradients of its size
    for name, (calls, times) in passes.items():
        timed = paired_latency(calls, min_seconds=min_seconds, device=place.device)
        for form, single in timed.latencies.items():
            seconds = single.median_ms / 1e3
            ratio = timed.ratios.get(form)
            intensity = flops / moved
            bound = min(roof["gflops"], intensity * roof["gbs"])
            rows.append(
                {
                    "op": op,
                    "case": one.label,
                    "pass": name,
                    "form": form,
                    "ms": single.median_ms,
                    "p95_ms": single.p95_ms,
                    "speedup": ratio.median if ratio else 1.0,
                    "speedup_interval": [ratio.low, ratio.high] if ratio else [1.0, 1.0],
                    "memory_bytes": peak_memory(calls[form], place.device),
                    "gflops": times * flops / seconds / 1e9,
                    "gbs": times * moved / seconds / 1e9,
                    "intensity": intensity,
                    "bound": "compute" if bound == roof["gflops"] else "memory",
                    "of_bound": times * (flops / bound if flops else moved / roof["gbs"]) / seconds / 1e9,
                    "max_rel_diff": differences[form],
                    "agrees": not one.alike or differences[form] <= _AGREE[place.dtype],
                }
            )
    return rows


def _difference(ours: Tensor, expected: Tensor) -> float:
    if ours.shape != expected.shape:
        return math.inf
    scale = float(expected.float().abs().max()) or 1.0
    return float((ours.float() - expected.float()).abs().max()) / scale


def _direct_flops(one: Case) -> int:
    return count(one.eager or one.ours, *one.inputs).flops


def _forward(fn: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], Any]:
    def call() -> Tensor:
        with torch.no_grad():
            return fn(*inputs)

    return call


def _training(
    fn: Callable[..., Tensor], leaves: tuple[Tensor, ...], params: tuple[Tensor, ...], cotangent: Tensor
) -> Callable[[], Any]:
    own = tuple(fn.parameters()) if isinstance(fn, torch.nn.Module) else params  # a peer has parameters of its own
    sources = [t for t in (*leaves, *own) if t.requires_grad]

    def step() -> Any:
        with torch.enable_grad():
            y = fn(*leaves)
            return torch.autograd.grad(y, sources, cotangent.reshape(y.shape), allow_unused=True)

    return step
