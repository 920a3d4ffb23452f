"""Triton kernels under Triton's interpreter against ordinary operators: ``python -m tests.kernels._interpreted NAME``.

A process of its own, because the interpreter is chosen by an environment variable when the kernels are imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent


def check_in_interpreter(name: str) -> None:
    """Run one of the functions below in a process with ``TRITON_INTERPRET=1``."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.kernels._interpreted", name]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split()[-1:] == [name]


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def causal() -> None:
    from torchconv.kernels import _causal_triton as kernels
    from torchconv.kernels.causal import _composite

    cases = [
        (2, 3, 17, 4, True, True, torch.float32),
        (1, 5, 6, 8, False, True, torch.float32),
        (2, 3, 2, 3, True, False, torch.float32),
        (2, 4, 9, 2, True, True, torch.bfloat16),
        (1, 2, 70, 1, True, False, torch.float64),
    ]
    for batch, channels, length, k, silu, with_bias, dtype in cases:
        for last in (False, True):
            shape = (batch, length, channels) if last else (batch, channels, length)
            x, g = noise(*shape, dtype=dtype), noise(*shape, seed=1, dtype=dtype)
            weight = noise(channels, k, seed=2, dtype=dtype)
            bias = noise(channels, seed=3, dtype=dtype) if with_bias else None
            tensors = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
            expected = _composite(*tensors, *(() if with_bias else (None,)), silu, last)
            by = torch.autograd.grad(expected, tensors, g)
            options = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {}
            torch.testing.assert_close(kernels.output(x, weight, bias, silu, last), expected, **options)
            dx, dw, db = kernels.gradients(g, x, weight, bias, silu, last)
            torch.testing.assert_close(dx, by[0], **options)
            torch.testing.assert_close(dw.to(dtype), by[1], **options)
            if with_bias:
                torch.testing.assert_close(db.to(dtype), by[2], **options)


def adaptive() -> None:
    from torchconv.kernels import _adaptive_triton as kernels
    from torchconv.kernels.adaptive import _composite

    cases = [
        (2, 6, 2, (3, 3), (4, 5), torch.float32),
        (1, 5, 2, (5, 1), (3, 4), torch.float64),
        (2, 2, 3, (3,), (6,), torch.float32),
        (1, 3, 1, (1, 3, 3), (2, 3, 2), torch.float32),
        (1, 4, 2, (3, 3), (3, 3), torch.bfloat16),
    ]
    for batch, channels, groups, kernel, size, dtype in cases:
        x, g = noise(batch, channels, *size, dtype=dtype), noise(batch, channels, *size, seed=1, dtype=dtype)
        weight = noise(batch, groups, torch.Size(kernel).numel(), *size, seed=2, dtype=dtype)
        tensors = [x.requires_grad_(), weight.requires_grad_()]
        expected = _composite(*tensors, kernel)
        by_x, by_weight = torch.autograd.grad(expected, tensors, g)
        options = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {}
        formats = [torch.contiguous_format, *([torch.channels_last] if x.dim() == 4 else [])]
        for form in formats:
            a, b = (t.detach().contiguous(memory_format=form) for t in (x, g))
            out = kernels.aggregate(a, weight.detach(), kernel)
            assert out.stride() == a.stride()
            torch.testing.assert_close(out, expected, **options)
            torch.testing.assert_close(kernels.aggregate(b, weight.detach(), kernel, mirrored=True), by_x, **options)
            torch.testing.assert_close(kernels.weight_gradient(b, a, weight.detach(), kernel), by_weight, **options)


def scan() -> None:
    from torchconv.kernels import _scan_triton as kernels
    from torchconv.kernels.scan import _native, _native_backward

    cases = [
        (2, 6, 40, 3, 2, 2, torch.float32),
        (1, 4, 130, 1, 1, 4, torch.float32),
        (1, 8, 20, 5, 1, 1, torch.bfloat16),
    ]
    for batch, channels, length, states, groups_b, groups_c, dtype in cases:
        u, g = noise(batch, channels, length, dtype=dtype), noise(batch, channels, length, seed=1, dtype=dtype)
        delta, a = noise(batch, channels, length, seed=2).abs(), -noise(channels, states, seed=3).abs()
        b = noise(batch, groups_b, states, length, seed=4, dtype=dtype)
        c = noise(batch, groups_c, states, length, seed=5, dtype=dtype)
        options = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
        expected = _native(u, delta, a, b, c, None, False)
        torch.testing.assert_close(kernels.output(u, delta, a, b, c), expected, **options)
        by = _native_backward(g, u, delta, a, b, c, None, False)
        for got, want in zip(kernels.gradients(g, u, delta, a, b, c), by[:5], strict=True):
            torch.testing.assert_close(got, want, **options)


def resample() -> None:
    from torchconv.kernels import _resample_triton as kernels
    from torchconv.kernels.resample import LEAST_WEIGHT, NORMALISATIONS, _composite

    cases = [
        (2, 3, 1, (2, 2), (3, 3), (3, 2), torch.float32),
        (1, 5, 5, (3, 1), (2, 4), (2, 5), torch.float64),
        (1, 11, 1, (2,), (5,), (6,), torch.float32),
        (1, 2, 2, (1, 2, 2), (1, 2, 3), (2, 2, 2), torch.float32),
        (1, 3, 1, (2, 2), (2, 2), (3, 3), torch.bfloat16),
    ]
    for batch, channels, groups, scale, size, pixels, dtype in cases:
        extent = [s * (n - 1) + k for s, k, n in zip(scale, size, pixels, strict=True)]
        for normalisation in NORMALISATIONS if dtype == torch.float64 else ("softmax",):
            x = noise(batch, channels, *extent, dtype=dtype).requires_grad_()
            taps = noise(batch, groups, torch.Size(size).numel(), *pixels, seed=2, dtype=dtype).requires_grad_()
            options = (scale, size, normalisation)
            expected = _composite(x, taps, *options)
            g = noise(*expected.shape, seed=1, dtype=dtype)
            by = torch.autograd.grad(expected, (x, taps), g)
            close = {"rtol": 0.03, "atol": 0.03} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
            given = (x.detach(), taps.detach())
            torch.testing.assert_close(kernels.output(*given, *options, LEAST_WEIGHT), expected.detach(), **close)
            found = kernels.gradients(g, *given, *options, LEAST_WEIGHT, (True, True))
            torch.testing.assert_close(found, by, **close)
            assert kernels.gradients(g, *given, *options, LEAST_WEIGHT, (False, True))[0].numel() == 0


def probes() -> None:
    """What kernels are tried with on a device before they are believed."""
    from torchconv.kernels._triton_probe import _PROBES

    for name, (measure, limit, _) in _PROBES.items():
        with torch.no_grad():
            wrong = measure(torch.device("cpu"))
        assert 0 < wrong < limit, f"{name}: {wrong}"


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    print(sys.argv[1])
