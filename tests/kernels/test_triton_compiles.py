"""The Triton kernels compile for GPUs that are not here, fit their memory and keep to their registers."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter takes the place of the compiler", allow_module_level=True)

from tests.kernels import triton_launches as launches
from tests.kernels._compiled import SHARED, compiled
from torchconv.kernels import _triton_probe

SPILLED = 128  # bytes of a thread that may go to memory and back

# Of each family a launch that compiles soon, and the GPU that it is compiled for; ``triton_launches.py`` compiles all.
SAMPLE = {
    "causal": ("(8, 2048, 4096) k=2 silu=True bias=True BLC bfloat16", 80),
    "depthwise": ("(32, 96, 56, 56) k=(13, 13) s=1 d=1 bfloat16", 90),
    "inception": ("(64, 96, 56, 56) last bfloat16", 80),
    "adaptive": ("(16, 128, 28, 28) G=16 k=(3, 3) last float32", 90),
    "long": ("L=100 bfloat16", 90),
    "resample": ("64 1 (2, 2) (5, 5) (56, 56) softmax bfloat16", 80),
    "scan": ("(2, 7, 50, 16, 1) bfloat16", 90),
}


def test_nothing_is_left_out():
    """A family here for every one that dispatchers probe."""
    assert set(SAMPLE) == set(_triton_probe._PROBES)
    assert {family.__name__ for family in launches.LAUNCHES} == {*SAMPLE, "ieee"}


@pytest.mark.parametrize("family", SAMPLE)
def test_compiles(family, tmp_path):
    name, capability = SAMPLE[family]
    found = compiled(dict(getattr(launches, family)())[name], capability, tmp_path)
    assert found
    for kernel in found:
        assert kernel.shared <= SHARED[capability], kernel
        assert kernel.spilled <= SPILLED, kernel
