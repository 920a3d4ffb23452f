"""Any operator in the two places where a convolution stands: the spatial mixer of a block, or a k × k convolution.

``as_mixer`` builds the operator on C channels with its own default sizes; ``as_conv`` replaces a plain convolution and
adds what the operator cannot do itself (a stride, other output channels, mixing of channels) with a 1 × 1 convolution.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from torchconv._common import check, did_you_mean
from torchconv.catalog import Part, load, operator
from torchconv.ops._common import CONV, Size, ntuple

_GIVEN = {"in_channels", "out_channels", "stride", "padding", "device", "dtype"}


def options_of(announced: Part, ndim: int) -> dict[str, Any]:
    """Constructor options that a user may set for an operator, with their defaults."""
    signature = inspect.signature(load(announced, ndim).__init__)
    return {n: p.default for n, p in signature.parameters.items() if n != "self" and n not in _GIVEN}


def channel_multiple(name: str, ndim: int = 2) -> int:
    """Channel counts of an operator must be multiples of this number (1 for most)."""
    return int(getattr(load(operator(name), ndim), "channel_multiple", 1))


def _resolve(name: str, ndim: int, defaults: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[Part, Any, dict]:
    announced = operator(name)
    remedy = f"{name} works in {', '.join(map(str, announced.dims))} spatial dimensions"
    check(ndim in announced.dims, "ndim", ndim, remedy)
    known = options_of(announced, ndim)
    for option in options:
        if option not in known:
            raise ValueError(f"{name}:{option}: no such option; {did_you_mean(option, known)}")
    return announced, load(announced, ndim), {**defaults, **options}


def _with_groups(settings: dict[str, Any], channels: int) -> dict[str, Any]:
    return {**settings, "groups": channels} if settings.get("groups") == "channels" else settings


def as_mixer(name: str, channels: int, ndim: int = 2, **options: Any) -> nn.Module:
    """The operator as a spatial mixer: C channels in and out, stride 1, the size of the map kept.

    Args:
        name: operator of the catalogue.
        channels: C.
        ndim: spatial dimensions.
        options: constructor options; ``groups="channels"`` means depthwise. Defaults are the part's ``mixer`` entry.

    Raises:
        ValueError: unknown operator or option, or a size that the operator refuses.
    """
    _, build, settings = _resolve(name, ndim, operator(name).mixer, options)
    module: nn.Module = build(channels, channels, padding="same", **_with_groups(settings, channels))
    return module


def as_conv(
    name: str,
    in_channels: int,
    out_channels: int,
    kernel_size: Size = 3,
    /,
    stride: Size = 1,
    ndim: int = 2,
    bias: bool = True,
    **options: Any,
) -> nn.Module:
    """The operator in place of a plain convolution with "same" padding.

    What the operator cannot do is added after it: a 1 × 1 convolution mixes channels, changes their number and strides.
    The kernel size of the convolution gives way to the part's ``conv`` entry (operators whose size means something
    else), and either to ``options``, ``kernel_size`` among them.

    Returns:
        The operator alone where it can do everything, else a ``Sequential`` of it and a 1 × 1 convolution.
    """
    announced, build, settings = _resolve(name, ndim, {"kernel_size": kernel_size, **operator(name).conv}, options)
    strides = ntuple("stride", stride, ndim)
    mixes_channels = announced.mixes != "space" and settings.get("groups") != "channels"
    alone = (
        mixes_channels
        and (set(strides) == {1} or "stride" in announced.supports)
        and (in_channels == out_channels or "channels" in announced.supports)
    )
    if alone:
        module: nn.Module = build(
            in_channels, out_channels, stride=strides, padding="same", bias=bias, **_with_groups(settings, in_channels)
        )
        return module
    body = build(in_channels, in_channels, padding="same", **_with_groups(settings, in_channels))
    return nn.Sequential(body, CONV[ndim](in_channels, out_channels, 1, stride=strides, bias=bias))
