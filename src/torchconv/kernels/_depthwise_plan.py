"""What a depthwise convolution's arguments come to: its sizes, checked, and the forms that compute it."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from torchconv._common import Size, check, ntuple
from torchconv.kernels import _depthwise_cost as cost
from torchconv.kernels import _depthwise_tune as tune
from torchconv.kernels._depthwise_forms import Geometry

BACKENDS = ("auto", "native", "channels_last", "fft", "matmul", "triton", "reference")
# The forms of the output, of the input's gradient and of the weight's gradient when the caller names one.
_FORCED = {
    "channels_last": ("channels_last", "channels_last", "correlate_last"),
    "fft": ("fft", "fft", "fft"),
    "matmul": ("matmul", "matmul", "matmul"),
    "triton": ("triton", "triton", "triton"),
}


class Plan(NamedTuple):
    """The sizes of a call and the forms chosen for it."""

    geo: Geometry
    forward: str
    grad_x: str
    grad_w: str

    @property
    def plain(self) -> bool:
        return self.forward == self.grad_x == self.grad_w == "native"


@lru_cache(maxsize=4096)
def plan(
    shape: tuple[int, ...],
    weight: tuple[int, ...],
    stride: Size,
    padding: Size,
    dilation: Size,
    kind: str,
    last: bool,
    needs: tuple[bool, bool],
    backend: str,
    threads: int,
    device: str = "cpu",
) -> Plan:
    """Check a call's sizes and choose its forms; remembered per signature, as this takes longer than a small call.

    ``kind`` is the type of the numbers, ``last`` says channels-last, ``needs`` which gradients will be asked for.
    """
    geo = geometry(shape, weight, stride, padding, dilation)
    if 0 in shape:
        return Plan(geo, "native", "native", "native")
    if backend in _FORCED:
        return Plan(geo, *_FORCED[backend])
    if device != "cpu":
        return Plan(geo, *_FORCED["triton"])  # whoever asks for less has been sent to PyTorch before
    if tune.enabled():
        return Plan(geo, *tune.choose(geo, kind, last, needs, threads))
    return Plan(geo, *cost.choose(geo, kind, last, needs, threads))


def geometry(shape: tuple[int, ...], weight: tuple[int, ...], stride: Size, padding: Size, dilation: Size) -> Geometry:
    """The sizes of a convolution, or ``ValueError`` naming what does not fit."""
    ndim = len(weight) - 2
    strides, dilations = ntuple("stride", stride, ndim), ntuple("dilation", dilation, ndim)
    pads = ntuple("padding", padding, ndim, least=0)
    check_weight(shape[1], weight)
    out = []
    for n, k, s, p, d in zip(shape[2:], weight[2:], strides, pads, dilations, strict=True):
        extent = (k - 1) * d + 1
        remedy = f"its extent {extent} must not exceed the padded input, {n} + 2·{p}: pad more or take a shorter kernel"
        check(n + 2 * p >= extent, "weight.shape", weight, remedy)
        check(n > 0, "x.shape", shape, "every spatial axis needs a position")
        out.append((n + 2 * p - extent) // s + 1)
    return Geometry(shape[0], shape[1], tuple(shape[2:]), tuple(weight[2:]), tuple(out), strides, pads, dilations)


def check_weight(channels: int, weight: tuple[int, ...]) -> None:
    """One kernel per channel, at least one tap."""
    check(channels >= 1, "channels", channels, "x needs at least one")
    ok = weight[0] == channels and weight[1] == 1 and min(weight[2:]) >= 1
    remedy = f"expected ({channels}, 1, *kernel_size), one kernel per channel of x; use F.convNd for other groups"
    check(ok, "weight.shape", weight, remedy)
