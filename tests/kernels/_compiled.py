"""Compiles what launchers of Triton kernels launch, for GPUs that need not be there: Triton brings the assembler along.

Everything but the driver is Triton's: types, divisibility, constants and options of a launch are what it makes of the
arguments. They may be on the meta device, so that sizes cost nothing.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a program may have, by compute capability


class Compiled(NamedTuple):
    """What the assembler says of a kernel; ``spilled`` counts bytes stored and loaded again."""

    kernel: str
    capability: int
    warps: int
    shared: int
    registers: int
    spilled: int


class _Absent:
    """Stands in for the driver of a GPU; the number of the device is its compute capability."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@contextlib.contextmanager
def _compiling(capability: int, cache: Path, found: list[Compiled]) -> Iterator[None]:
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> CompiledKernel:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            kernel = run(self, *args, grid=grid, warmup=True, **options)
        if log := said.getvalue():
            registers = re.search(r"Used (\d+) registers", log)
            assert registers, log
            spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
            meta = kernel.metadata
            found.append(Compiled(meta.name, capability, meta.num_warps, meta.shared, int(registers[1]), spilled))
        return kernel

    before = driver._active
    with triton.knobs.cache.scope(), triton.knobs.nvidia.scope(), mock.patch.object(JITFunction, "run", compile_only):
        triton.knobs.cache.dir, triton.knobs.nvidia.dump_ptxas_log = str(cache), True
        driver.set_active(_Absent(capability))
        try:
            yield
        finally:
            driver._active = before


def compiled(launch: Callable[[], object], capability: int, cache: Path) -> list[Compiled]:
    """The kernels that ``launch`` would launch, each once as long as ``cache`` and the process last."""
    found: list[Compiled] = []
    with _compiling(capability, cache, found):
        launch()
    return found
