"""Operations and bytes of every kernel, and the waterline between too few operations a byte and enough.

Lavin 2024, arXiv 2404.03617. A machine does R operations and moves B bytes a second; its waterline is R / B. Kernel j
does ops_j on bytes_j: it needs w_j = bytes_j / B for memory, has h_j = ops_j / bytes_j, and takes at least

    t_j = max(ops_j / R, bytes_j / B) = w_j · max(1, h_j / (R / B)).

Drawn as bars of width w_j and height h_j, those that stay under water wait for memory. Σ ops_j / R over Σ t_j is the
efficiency that a sequence of kernels can attain. One multiplication with its addition is two operations. Norms,
activations and biases are taken as part of the kernel before them, as inference engines make them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from torchconv._common import check, require
from torchconv.analysis._waterline_kernels import Kernel, Machine, block_kernels, conv2d_stats, fuse
from torchconv.analysis._waterline_trace import Trace, trace
from torchconv.catalog import part

__all__ = [
    "Kernel",
    "Machine",
    "Trace",
    "Waterline",
    "block_kernels",
    "conv2d_stats",
    "fuse",
    "trace",
    "waterline",
]


@dataclass(frozen=True)
class Waterline:
    """A sequence of kernels on a machine.

    Attributes:
        kernels: in order of execution.
        machine: where they run.
        measured: seconds that the sequence took there, if known.
    """

    kernels: tuple[Kernel, ...]
    machine: Machine
    measured: float | None = None

    @property
    def ideal(self) -> float:
        """Seconds at full use of the arithmetic."""
        return sum(k.ops for k in self.kernels) / self.machine.ops

    @property
    def serial(self) -> float:
        """Σ t_j: the least seconds of the kernels one after the other."""
        return sum(k.time(self.machine) for k in self.kernels)

    @property
    def overlapped(self) -> float:
        """The least seconds if kernels could share the machine: all water in one tank."""
        return max(self.ideal, sum(k.bytes for k in self.kernels) / self.machine.bandwidth)

    @property
    def attainable(self) -> float:
        """The greatest computational efficiency of the kernels one after the other."""
        return self.ideal / self.serial if self.serial else 1.0

    @property
    def efficiency(self) -> float | None:
        """Computational efficiency of the measured time."""
        return self.ideal / self.measured if self.measured else None

    @property
    def level(self) -> float:
        """Operations over bytes of the whole sequence."""
        moved = sum(k.bytes for k in self.kernels)
        return sum(k.ops for k in self.kernels) / moved if moved else math.inf

    @property
    def under_water(self) -> dict[str, float]:
        """Share of the operations and of the time in kernels that wait for memory."""
        wet = [k for k in self.kernels if k.intensity < self.machine.waterline]
        ops = sum(k.ops for k in self.kernels)
        return {
            "ops": sum(k.ops for k in wet) / ops if ops else 0.0,
            "time": sum(k.time(self.machine) for k in wet) / self.serial if self.serial else 0.0,
        }

    def rows(self) -> list[dict[str, Any]]:
        """A row a kernel: operations, bytes, intensity, and the times in microseconds."""
        return [
            {
                "kernel": k.name,
                "MMAC": k.macs / 1e6,
                "MB": k.bytes / 1e6,
                "op/byte": k.intensity,
                "arithmetic, µs": k.ops / self.machine.ops * 1e6,
                "memory, µs": k.bytes / self.machine.bandwidth * 1e6,
                "at least, µs": k.time(self.machine) * 1e6,
                "bound by": "memory" if k.intensity < self.machine.waterline else "arithmetic",
            }
            for k in self.kernels
        ]

    def figure(self) -> Any:
        """Bars of the kernels, memory time wide and op/byte high, and the waterline; a matplotlib ``Figure``."""
        require("matplotlib", "compare")
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7.5, 3.4), layout="constrained")
        axes: Any = figure.subplots()
        shown = [k for k in self.kernels if k.ops and k.bytes]
        left, water = 0.0, self.machine.waterline
        heights = [k.intensity for k in shown] or [water]
        floor, top = min(*heights, water) / 2, max(*heights, water) * 2
        for k in shown:
            width, wet = k.bytes / self.machine.bandwidth * 1e3, k.intensity < water
            color = "#1f77b4" if wet else "#d8a657"
            axes.bar(left, k.intensity - floor, width, floor, align="edge", color=color, edgecolor="white", lw=0.4)
            left += width
        axes.axhline(water, color="black", lw=1)
        axes.text(0, water, f" waterline: {water:.3g} op/byte", va="bottom", fontsize=8)
        axes.set(xlabel="time for memory, ms", ylabel="operations a byte", yscale="log", ylim=(floor, top))
        axes.set_xlim(0, left or 1)
        return figure


@part(
    "waterline",
    paper="convfirst",
    kind="analysis",
    dims=(1, 2, 3),
    keywords="roofline arithmetic intensity operational intensity memory bound bandwidth efficiency block fusion",
)
def waterline(
    what: nn.Module | Iterable[Kernel],
    *inputs: Any,
    machine: Machine | None = None,
    blocks: Sequence[str] = (),
    eager: bool = False,
    measured: float | None = None,
) -> Waterline:
    """Which kernels of a network wait for memory, and what efficiency the sequence can attain.

    Args:
        what: any module, or kernels.
        inputs: what the module is called with; on the meta device nothing is computed.
        machine: the one at hand by default, measured on the device and in the type of the inputs.
        blocks: names of modules that run as one kernel: bytes only for what enters and leaves, and weights.
        eager: also count norms, activations, additions and copies as kernels that read and write their tensors.
        measured: seconds that it took.

    Raises:
        ValueError: a block is not there or never ran.

    Example:
        >>> roof = Machine(ops=312e12, bandwidth=2.039e12)
        >>> found = waterline(block_kernels("convfirst", 64, 56, 56, 64), machine=roof)
        >>> round(found.attainable, 3)
        0.294
    """
    if isinstance(what, nn.Module):
        kernels = trace(what, *inputs, eager=eager).fused(blocks)
    else:
        check(not inputs and not blocks, "inputs", inputs, "kernels take no inputs and no blocks")
        kernels = list(what)
    return Waterline(tuple(kernels), machine or _at_hand(inputs), measured)


def _at_hand(inputs: tuple[Any, ...]) -> Machine:
    like = next((t for t in inputs if isinstance(t, Tensor) and t.is_floating_point() and not t.is_meta), None)
    return Machine.measured() if like is None else Machine.measured(str(like.device), like.dtype)
