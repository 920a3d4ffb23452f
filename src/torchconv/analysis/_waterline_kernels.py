"""Operations and bytes of kernels, in closed form (Lavin 2024, arXiv 2404.03617)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from torchconv._common import Size, check, check_choice, check_positive, ntuple
from torchconv.analysis.ceiling import ceiling

PASSES = ("output", "grad_input", "grad_weight", "grad_bias")
KINDS = ("convfirst", "mbconv", "convnext", "fusedmbconv")


@dataclass(frozen=True)
class Machine:
    """What a machine can do: operations a second and bytes a second to and from its memory.

    Example:
        >>> round(Machine(ops=312e12, bandwidth=2.039e12).waterline)
        153
    """

    ops: float
    bandwidth: float

    def __post_init__(self) -> None:
        check(self.ops > 0, "ops", self.ops, "must be positive")
        check(self.bandwidth > 0, "bandwidth", self.bandwidth, "must be positive")

    @classmethod
    def measured(cls, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Machine:
        """The machine at hand: a large matrix product and a large copy."""
        found = ceiling(device, dtype)
        return cls(found["gflops"] * 1e9, found["gbs"] * 1e9)

    @property
    def waterline(self) -> float:
        """Operations a byte at which arithmetic takes as long as memory."""
        return self.ops / self.bandwidth


@dataclass(frozen=True)
class Kernel:
    """One kernel's work.

    Attributes:
        name: of the layer.
        ops: operations, two for a multiplication with its addition.
        read, written: bytes.
        weights: those of the bytes read that are parameters.
        depth: products summed into one output, where known.
    """

    name: str
    ops: float
    read: float
    written: float
    weights: float = 0.0
    depth: int = 0

    @property
    def macs(self) -> float:
        """Multiplications with addition."""
        return self.ops / 2

    @property
    def bytes(self) -> float:
        """Read and written."""
        return self.read + self.written

    @property
    def intensity(self) -> float:
        """Operations a byte; infinite without any."""
        return self.ops / self.bytes if self.bytes else math.inf

    def time(self, machine: Machine) -> float:
        """The least seconds that it takes: what arithmetic or memory needs, whichever is more."""
        return max(self.ops / machine.ops, self.bytes / machine.bandwidth)


def conv2d_stats(
    n: int,
    c: int,
    h: int,
    w: int,
    kernel_size: Size = 3,
    padding: Size = 1,
    group_width: int = 8,
    bias: bool = False,
    what: str = "output",
    unit: int = 2,
) -> Kernel:
    """Work of a grouped convolution at stride 1 with as many outputs as inputs, or of one of its gradients.

    As in the author's code, the gradients' operations are counted on positions of the input, whatever the padding, and
    an addition of a bias is half a multiplication.

    Args:
        n, c, h, w: the input.
        kernel_size, padding: one number or (height, width).
        group_width: channels of a group.
        bias: whether there is one.
        what: "output", or what is computed in the backward pass: "grad_input", "grad_weight", "grad_bias".
        unit: bytes of a number.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> conv2d_stats(16, 128, 32, 64).macs
        301989888.0
    """
    for name, value in (("n", n), ("c", c), ("h", h), ("w", w), ("group_width", group_width), ("unit", unit)):
        check_positive(name, value)
    check_choice("what", what, PASSES)
    check(c % group_width == 0, "group_width", group_width, f"must divide the {c} channels")
    kernel, pads = ntuple("kernel_size", kernel_size, 2), ntuple("padding", padding, 2, least=0)
    out = [size + 2 * p - k + 1 for size, p, k in zip((h, w), pads, kernel, strict=True)]
    check(min(out) > 0, "kernel_size", kernel_size, f"is larger than the padded input of {h} × {w}")
    x, y, weight = n * c * h * w, n * c * math.prod(out), c * group_width * math.prod(kernel)
    shift, depth, positions = (c if bias else 0), group_width * math.prod(kernel), n * h * w
    ops, read, written, weights, summed = {
        "output": (2 * y * depth + (y if bias else 0), x + weight + shift, y, weight + shift, depth),
        "grad_input": (2 * x * depth, y + weight, x, weight, depth),
        "grad_weight": (2 * x * depth, x + y, weight, 0, positions),
        "grad_bias": (y, y, shift, 0, positions),
    }[what]
    return Kernel(what, float(ops), float(read * unit), float(written * unit), float(weights * unit), summed)


def block_kernels(
    kind: str, n: int, h: int, w: int, c: int, e: int = 4, gw: int = 8, k: int | None = None, unit: int = 2
) -> list[Kernel]:
    """The kernels of a residual block that keeps its c channels, in closed form.

    Args:
        kind: "convfirst", "mbconv", "convnext" (depthwise k × k, expand, project) or "fusedmbconv" (dense k × k that
            expands, project).
        n, h, w, c: batch, map, channels.
        e: hidden over input channels.
        gw: group width of "convfirst" and "mbconv".
        k: kernel size; 7 for "convnext" and 3 for the others by default.
        unit: bytes of a number.

    Returns:
        One kernel a convolution. The residual is read by the last one.
    """
    check_choice("kind", kind, KINDS)
    for name, value in (("n", n), ("h", h), ("w", w), ("c", c), ("e", e), ("gw", gw), ("unit", unit)):
        check_positive(name, value)
    k = k if k is not None else (7 if kind == "convnext" else 3)
    check_positive("k", k)
    pixels, hidden = n * h * w, e * c
    expand, project = ("expand", c, hidden, c), ("project", hidden, c, hidden)
    layers = {
        "convfirst": [("conv", c, c, gw * k * k), expand, project],
        "mbconv": [expand, ("conv", hidden, hidden, gw * k * k), project],
        "convnext": [("conv", c, c, k * k), expand, project],
        "fusedmbconv": [("conv", c, hidden, c * k * k), project],
    }[kind]
    kernels = []
    for name, before, after, depth in layers:
        residual = pixels * c if name == "project" else 0
        weights, read = after * depth * unit, (pixels * before + residual) * unit
        kernels.append(
            Kernel(name, 2.0 * pixels * after * depth, read + weights, pixels * after * unit, weights, depth)
        )
    return kernels


def fuse(kernels: Sequence[Kernel], boundary: float, name: str = "fused") -> Kernel:
    """The kernels as one: their operations, their weights, and ``boundary`` bytes of maps that enter and leave."""
    weights = sum(k.weights for k in kernels)
    return Kernel(name, sum(k.ops for k in kernels), boundary + weights, 0.0, weights)
