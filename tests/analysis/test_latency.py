"""Timing and memory: what is measured, not how fast this machine is."""

from __future__ import annotations

import json
import math
import platform

import numpy as np
import pytest
import torch
from torch import nn

from torchconv.analysis import latency as module
from torchconv.analysis.latency import Latency, latency, machine, model_peak_memory, paired_latency, peak_memory

MIB = 1 << 20


def test_latency_counts_calls_and_keeps_modes():
    calls = []
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout()).train()
    model[1].eval()
    model.register_forward_hook(lambda m, *_: calls.append((m.training, torch.is_grad_enabled())))
    result = latency(model, torch.zeros(2, 4), warmup=2, repeats=7, min_seconds=0)
    assert len(result.samples) == 7
    assert calls == [(False, False)] * 9
    assert [m.training for m in model.modules()] == [True, True, False]
    assert 0 < result.median_ms <= result.p95_ms
    assert result.summary() == {"median_ms": result.median_ms, "p95_ms": result.p95_ms}


def test_min_seconds_asks_for_more_samples(monkeypatch):
    monkeypatch.setattr(module, "_clock", lambda device: lambda fn, x: 10.0)  # every call takes 10 ms
    assert len(latency(lambda: None, repeats=3, min_seconds=0.5).samples) == 50
    assert len(latency(lambda: None, repeats=60, min_seconds=0.5).samples) == 60


def test_percentiles():
    result = Latency.of([float(i) for i in range(1, 101)])
    assert (result.median_ms, result.p95_ms) == (50.5, pytest.approx(95.05))


def test_rounds_are_interleaved_and_start_in_turn():
    order = []
    functions = {name: lambda name=name: order.append(name) for name in "abc"}
    result = paired_latency(functions, warmup=0, repeats=3, min_seconds=0)
    assert "".join(order) == "abcbcacab"
    assert result.baseline == "a"
    assert set(result.ratios) == {"b", "c"}


def test_drift_cancels_in_paired_ratios(monkeypatch):
    now = [1.0]

    def clock(device):
        def call(fn, x):
            now[0] *= 1.001  # the machine gets slower all the time
            return now[0] * fn()

        return call

    monkeypatch.setattr(module, "_clock", clock)
    result = paired_latency({"conv": lambda: 4.0, "half": lambda: 2.0, "same": lambda: 4.0}, repeats=300, min_seconds=0)
    assert result.latencies["conv"].samples[-1] > 2 * result.latencies["conv"].samples[0]
    assert result.ratios["half"].median == pytest.approx(0.5, rel=0.005)
    assert result.ratios["half"].distinguishable
    assert result.ratios["same"].low <= 1.002
    assert result.ratios["same"].high >= 0.998


@pytest.mark.parametrize(("n", "rank"), [(5, 1), (6, 1), (20, 6), (100, 40), (2000, 956)])
def test_median_interval_is_the_binomial_one(n, rank):
    ratio = module._median_interval(np.random.default_rng(0).permutation(n) + 1.0, 0.95)
    assert (ratio.low, ratio.high) == (rank, n + 1 - rank)
    if 6 <= n < 1000:
        below = sum(math.comb(n, k) for k in range(rank)) / 2**n
        assert below <= 0.025 < below + math.comb(n, rank) / 2**n


def test_a_slower_function_is_seen_as_slower():
    small, large = torch.randn(8, 8), torch.randn(400, 400)
    result = paired_latency({"small": lambda: small @ small, "large": lambda: large @ large}, min_seconds=0, repeats=9)
    assert result.ratios["large"].median > 3


def test_bad_arguments():
    for name, value in {"warmup": -1, "repeats": 0, "min_seconds": -1.0}.items():
        with pytest.raises(ValueError, match=name):
            latency(lambda: None, **{name: value})
    with pytest.raises(ValueError, match="baseline='c'"):
        paired_latency({"a": lambda: None}, baseline="c")
    with pytest.raises(ValueError, match="candidates"):
        paired_latency({})
    with pytest.raises(ValueError, match="confidence"):
        paired_latency({"a": lambda: None}, confidence=95)
    with pytest.raises(ValueError, match="device='meta'"):
        peak_memory(lambda: None, "meta")


def test_peak_memory_of_a_chain():
    def chain():
        a = torch.empty(MIB)  # 4 MiB
        b = torch.exp(a)  # a and b: 8 MiB
        del a
        c = torch.exp(b)  # b and c: 8 MiB
        del b
        return c

    assert peak_memory(chain) == 8 * MIB
    kept = torch.empty(MIB)
    assert peak_memory(lambda: kept.exp_()) == 0
    assert peak_memory(lambda: [torch.empty(MIB) for _ in range(5)]) == 20 * MIB
    assert peak_memory(lambda: None) == 0


def test_peak_memory_sees_inside_custom_operators():
    @torch.library.custom_op("torchconvtest::roomy", mutates_args=())
    def roomy(x: torch.Tensor) -> torch.Tensor:
        return torch.empty(8 * MIB).sum().reshape(1).clone()

    assert peak_memory(lambda: roomy(torch.zeros(1))) >= 32 * MIB


class Wide(nn.Module):
    """Widens each of n numbers to three intermediate ones that the backward pass needs."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(MIB))
        self.norm = nn.BatchNorm1d(1)

    def forward(self, x):
        return (self.norm(x[:1, :1, :8]).sum() + x * self.scale).exp().exp().exp()


def test_model_memory_forward_and_backward():
    model, x = Wide(), torch.zeros(1, 1, MIB)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    forward = model_peak_memory(model, x)
    both = model_peak_memory(model, x, backward=True)
    assert 8 * MIB <= forward < 9 * MIB  # an operator's input and output
    assert both >= 12 * MIB + 4 * MIB  # three kept results and the gradient of the scale
    assert model.scale.grad is None
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_machine_tells_what_and_not_who():
    facts = machine()
    text = json.dumps(facts)
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert facts["cores"] >= 1
    assert platform.node() not in text or len(platform.node()) < 3
    assert "/" not in str(facts["os"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_timing_and_memory():
    x = torch.randn(1024, 1024, device="cuda")
    assert latency(lambda a: a @ a, x, repeats=3, min_seconds=0).median_ms > 0
    assert peak_memory(lambda: torch.empty(MIB, device="cuda"), "cuda") == 4 * MIB
