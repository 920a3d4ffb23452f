"""Launches of every Triton kernel in the configurations that their dispatchers choose, on tensors without memory.

``python -m tests.kernels.triton_launches`` compiles all of them for compute capabilities 8.0 and 9.0, which takes some
minutes, and prints what the assembler says; ``test_triton_compiles.py`` compiles the ones named in ``SAMPLE``.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
Launch = tuple[str, Callable[[], object]]


def empty(*shape: int, dtype: torch.dtype = F32, last: bool = False) -> Tensor:
    t = torch.empty(shape, device="meta", dtype=dtype)
    return t.contiguous(memory_format=torch.channels_last if t.dim() == 4 else torch.channels_last_3d) if last else t


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def typed(cases: list[Any], more: tuple[torch.dtype, ...]) -> list[tuple[Any, torch.dtype]]:
    """Every case in bfloat16 and float32, the first one in ``more`` too."""
    return [(case, dtype) for n, case in enumerate(cases) for dtype in (BF16, F32, *(more if n == 0 else ()))]


def causal() -> Iterator[Launch]:
    from torchconv.kernels import _causal_triton as kernels

    def both(batch: int, channels: int, length: int, k: int, silu: bool, bias: bool, last: bool, dtype: Any) -> None:
        x = empty(*((batch, length, channels) if last else (batch, channels, length)), dtype=dtype)
        w = empty(channels, k, dtype=dtype)
        b = empty(channels, dtype=dtype) if bias else None
        kernels.output(x, w, b, silu, last)
        kernels.gradients(x, x, w, b, silu, last)

    odd = [(2, 3, 1), (2, 5, 37), (64, 256, 256), (1, 1, 1 << 20)]
    cases = [
        *itertools.product([(8, 2048, 4096)], (4,), (True,), (True,), (False, True), (BF16, F16, F32, F64)),
        *itertools.product([(8, 2048, 4096)], (1, 2, 3, 5, 8), (False, True), (True,), (False, True), (BF16, F32)),
        *itertools.product(odd, (4, 8), (True,), (False,), (False, True), (BF16,)),
    ]
    for sizes, k, silu, bias, last, dtype in cases:
        name = f"{sizes} k={k} silu={silu} bias={bias} {'BLC' if last else 'BCL'} {short(dtype)}"
        yield name, lambda a=(*sizes, k, silu, bias, last, dtype): both(*a)


def depthwise() -> Iterator[Launch]:
    from torchconv.kernels import _depthwise_triton as kernels
    from torchconv.kernels._depthwise_plan import geometry

    def all_three(shape: tuple[int, ...], kernel: tuple[int, ...], stride: int, padding: tuple[int, ...], dilation: int, dtype: Any) -> None:  # fmt: skip # noqa: E501
        x, w = empty(*shape, dtype=dtype), empty(shape[1], 1, *kernel, dtype=dtype)
        geo = geometry(shape, tuple(w.shape), stride, padding, dilation)
        y = kernels.output(x, w, empty(shape[1], dtype=dtype), geo)
        kernels.output(x, w, None, geo)
        kernels.gradient_x(y, w, geo)
        kernels.gradient_w(y, x, geo)

    cases = [
        ((32, 96, 56, 56), (7, 7), 1, 1),
        ((32, 96, 56, 56), (13, 13), 1, 1),
        ((32, 96, 56, 56), (31, 31), 1, 1),
        ((8, 64, 55, 53), (13, 13), 1, 1),
        ((64, 768, 7, 7), (13, 13), 1, 1),
        ((8, 128, 112, 112), (51, 51), 1, 1),
        ((8, 128, 112, 112), (51, 5), 1, 1),
        ((8, 64, 56, 56), (5, 51), 1, 1),
        ((4, 3, 20, 20), (3, 3), 1, 1),
        ((4, 64, 40, 40), (7, 7), 2, 1),
        ((4, 64, 63, 60), (7, 7), 1, 3),
        ((4, 64, 63, 61), (4, 6), 3, 2),
        ((8, 256, 4096), (31,), 1, 1),
        ((8, 256, 1000), (255,), 1, 1),
        ((2, 32, 16, 28, 28), (5, 7, 7), 1, 1),
        ((2, 32, 15, 27, 25), (3, 3, 3), 2, 1),
    ]
    for (shape, kernel, stride, dilation), dtype in typed(cases, (F16,)):
        padding = tuple((k - 1) * dilation // 2 for k in kernel)
        a = (shape, kernel, stride, padding, dilation, dtype)
        yield f"{shape} k={kernel} s={stride} d={dilation} {short(dtype)}", lambda a=a: all_three(*a)


def ieee() -> Iterator[Launch]:
    """float32 where TF32 is not allowed."""
    for name, launch in depthwise():
        if name.endswith("float32") and "(13, 13)" in name:

            def exact(launch: Callable[[], object] = launch) -> None:
                with torch.backends.cudnn.flags(allow_tf32=False):
                    launch()

            yield f"{name} ieee", exact


def inception() -> Iterator[Launch]:
    from torchconv.kernels import _inception_triton as kernels

    def layer(shape: tuple[int, ...], sizes: Any, dilation: tuple[int, ...], bias: bool, last: bool, dtype: Any) -> None:  # fmt: skip # noqa: E501
        x = empty(*shape, dtype=dtype, last=last)
        width = shape[1] // 8 or 1
        shapes = tuple((width, size) for size in sizes)
        taps = empty(sum(width * torch.Size(size).numel() for size in sizes), dtype=dtype)
        b = empty(width * len(sizes), dtype=dtype) if bias else None
        kernels.layer(x, taps, b, shapes, dilation)
        kernels.layer(x, taps, None, shapes, dilation, backward=True)
        kernels.gradient_taps(x, x, shapes, dilation)

    square = ((3, 3), (1, 11), (11, 1))
    cases = [
        ((64, 96, 56, 56), square, 1),
        ((64, 384, 7, 7), square, 1),
        ((2, 9, 5, 3), square, 2),
        ((8, 64, 1024), ((3,), (31,)), 1),
        ((2, 32, 8, 14, 14), ((3, 3, 3), (1, 1, 11)), 1),
    ]
    for ((shape, sizes, dilation), dtype), last in itertools.product(typed(cases, (F16,)), (False, True)):
        if last and len(shape) == 3:
            continue
        bias = dtype != F32
        a = (shape, sizes, (dilation,) * (len(shape) - 2), bias, last, dtype)
        name = f"{shape} {'last' if last else 'first'} {short(dtype)}"
        yield name, lambda a=a: layer(*a)


def adaptive() -> Iterator[Launch]:
    from torchconv.kernels import _adaptive_triton as kernels

    def all_three(shape: tuple[int, ...], groups: int, kernel: tuple[int, ...], last: bool, dtype: Any) -> None:
        x = empty(*shape, dtype=dtype, last=last)
        w = empty(shape[0], groups, torch.Size(kernel).numel(), *shape[2:], dtype=dtype)
        kernels.aggregate(x, w, kernel)
        kernels.aggregate(x, w, kernel, mirrored=True)
        kernels.weight_gradient(x, x, w, kernel)

    cases = [
        ((16, 128, 28, 28), 16, (3, 3)),
        ((16, 96, 14, 14), 96, (7, 7)),
        ((1, 3, 5, 7), 1, (3, 3)),
        ((4, 62, 33, 31), 5, (5, 5)),
        ((4, 64, 1024), 8, (7,)),
        ((2, 16, 8, 14, 14), 4, (3, 3, 3)),
        ((1, 1, 1, 1), 1, (1, 1)),
    ]
    for ((shape, groups, kernel), dtype), last in itertools.product(typed(cases, (F16, F64)), (False, True)):
        if not (last and len(shape) == 3):
            a = (shape, groups, kernel, last, dtype)
            name = f"{shape} G={groups} k={kernel} {'last' if last else 'first'} {short(dtype)}"
            yield name, lambda a=a: all_three(*a)


def long() -> Iterator[Launch]:
    from torchconv.kernels import _long_triton as kernels

    def output(length: int, taps: int, many: int, dtype: Any) -> None:
        kernels.output(empty(8, 64, length, dtype=dtype), empty(many, 64, taps), 0)

    for length, dtype in itertools.product((100, 300, 512, 1000, 2048), (BF16, F16, F32)):
        if kernels.samples(length, length, 0) <= kernels.LONGEST[dtype]:
            yield f"L={length} {short(dtype)}", lambda a=(length, length, 2, dtype): output(*a)


def resample() -> Iterator[Launch]:
    from torchconv.kernels import _resample_triton as kernels
    from torchconv.kernels.resample import LEAST_WEIGHT

    def all_three(channels: int, groups: int, scale: tuple[int, ...], size: tuple[int, ...], out: tuple[int, ...], mode: str, dtype: Any) -> None:  # fmt: skip # noqa: E501
        extent = (s * (n - 1) + k for s, n, k in zip(scale, out, size, strict=True))
        x, taps = (
            empty(4, channels, *extent, dtype=dtype),
            empty(4, groups, torch.Size(size).numel(), *out, dtype=dtype),
        )
        options = (scale, size, mode, LEAST_WEIGHT)
        y = kernels.output(x, taps, *options)
        kernels.gradients(y, x, taps, *options, (True, True))

    cases = [
        (3, 1, (4, 4), (13, 13), (64, 64)),
        (64, 1, (2, 2), (5, 5), (56, 56)),
        (7, 7, (2, 3), (3, 4), (5, 3)),
        (16, 1, (2,), (7,), (500,)),
        (8, 1, (1, 2, 2), (1, 3, 3), (8, 14, 14)),
    ]
    modes = [(case, mode) for case in cases for mode in ("softmax", "none", "sum")]
    for (case, mode), dtype in typed(modes, (F16, F64)):
        yield f"{' '.join(map(str, case))} {mode} {short(dtype)}", lambda a=(*case, mode, dtype): all_three(*a)


def scan() -> Iterator[Launch]:
    from torchconv.kernels import _scan_triton as kernels

    def both(batch: int, channels: int, length: int, states: int, groups: int, dtype: Any) -> None:
        u, delta, a = (
            empty(batch, channels, length, dtype=dtype),
            empty(batch, channels, length),
            empty(channels, states),
        )
        b = empty(batch, groups, states, length, dtype=dtype)
        kernels.output(u, delta, a, b, b)
        kernels.gradients(u, u, delta, a, b, b)

    sizes = [(8, 1536, 3136, n, 4) for n in (1, 2, 3, 4, 8, 16, 32, 64, 128, 256)]
    sizes += [(2, 24, 50, n, 1) for n in (1, 16)] + [(2, 7, 50, 16, 1)]
    for size, dtype in typed(sizes, (F16,)):
        yield f"{size} {short(dtype)}", lambda a=(*size, dtype): both(*a)


LAUNCHES = (causal, depthwise, ieee, inception, adaptive, long, resample, scan)


def main(names: list[str]) -> None:
    from tests.kernels._compiled import SHARED, compiled

    with tempfile.TemporaryDirectory() as cache:
        for family in LAUNCHES:
            if names and family.__name__ not in names:
                continue
            for (name, launch), capability in itertools.product(family(), SHARED):
                for k in compiled(launch, capability, Path(cache)):
                    print("|", family.__name__, k.kernel, "|", name, "|", k.capability, "|", k.warps, "|", k.shared, "|", k.registers, "|", k.spilled, "|", flush=True)  # fmt: skip # noqa: E501


if __name__ == "__main__":
    main(sys.argv[1:])
