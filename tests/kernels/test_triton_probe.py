"""Triton kernels are tried on a device before they are believed."""

from __future__ import annotations

import pytest
import torch

from tests.kernels._interpreted import check_in_interpreter
from torchconv.kernels import _triton_probe as probe


def test_probes_agree_with_pytorch() -> None:
    check_in_interpreter("probes")


@pytest.mark.parametrize("problem", [0.5, float("nan"), RuntimeError("no such instruction")])
def test_kernels_that_are_wrong_are_not_used(problem: float | Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(device: torch.device) -> float:
        if isinstance(problem, Exception):
            raise problem
        return problem

    monkeypatch.setitem(probe._PROBES, "causal", (measure, 0.02, False))
    monkeypatch.setattr(probe, "interpreted", lambda: False)
    probe._tried.cache_clear()
    with pytest.warns(UserWarning, match="causal kernels are not used on cuda"):
        assert not probe.trustworthy("causal", torch.device("cuda", 99))
    probe._tried.cache_clear()


def test_kernels_that_are_right_are_used_and_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setitem(probe._PROBES, "causal", (lambda device: calls.append(device) or 1e-3, 0.02, False))
    monkeypatch.setattr(probe, "interpreted", lambda: False)
    probe._tried.cache_clear()
    assert all(probe.trustworthy("causal", torch.device("cuda", 99)) for _ in range(3))
    assert calls == [torch.device("cuda", 99)]
    probe._tried.cache_clear()


def test_a_processor_without_interpreter_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "interpreted", lambda: False)
    probe._tried.cache_clear()
    assert not probe.trustworthy("causal", torch.device("cpu"))
    probe._tried.cache_clear()
