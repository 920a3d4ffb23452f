"""Features of time series: LightWaveS' kernels, plainly, and against aeon's MiniROCKET."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchconv.bench.cases import Case, Place, case, installed
from torchconv.models.sequence.lightwaves_features import DILATIONS, KERNELS, LightWaveSFeatures, base_kernels


@case("lightwaves-features")
def features(place: Place) -> Iterator[Case]:
    """Selected applications, and all candidates of one channel, against one convolution for each dilation."""
    for batch, channels, length, number in ((8, 3, 1000, 294), (16, 1, 128, KERNELS * len(DILATIONS))):
        x = place.randn(batch, channels, length)
        chosen = torch.randperm(channels * KERNELS * len(DILATIONS))[:number].sort().values
        parts = (chosen // (KERNELS * len(DILATIONS)), chosen // len(DILATIONS) % KERNELS, chosen % len(DILATIONS))
        rows = torch.stack(parts, 1)
        layer = place.put(LightWaveSFeatures(rows))
        peers: dict[str, Callable[..., Tensor]] = {}
        if installed("aeon") and place.device == "cpu" and place.dtype == torch.float32:
            peers["aeon MiniRocket, as many features"] = _minirocket(x, 8 * number)
        label = f"{batch}×{channels}×{length}, {number} applications"
        yield Case(label, layer, (x,), _plain(rows), peers, alike=not peers, backward=False, flops=0)


def _plain(rows: Tensor) -> Callable[[Tensor], Tensor]:
    """Depthwise dilated convolutions and running lengths."""

    def describe(z: Tensor) -> Tensor:
        positive = z > 0
        steps = torch.arange(z.shape[-1], device=z.device)
        last = torch.where(positive, -1, steps).cummax(-1).values
        before = F.pad(last[..., :-1], (1, 0), value=-1)
        longest = torch.where(positive, 0, steps - before - 1).amax(-1)
        parts = (positive.to(z.dtype).mean(-1), z.abs().amax(-1), longest / z.shape[-1], z.abs().amin(-1))
        return torch.stack(parts, -1)

    def eager(x: Tensor) -> Tensor:
        kernels = base_kernels(device=x.device, dtype=x.dtype)
        found = x.new_empty(len(x), len(rows), 8)
        for step, dilation in enumerate(DILATIONS):
            members = rows[:, 2] == step
            weight = kernels[rows[members, 1], None]
            options: Any = {"dilation": dilation, "padding": 4 * dilation, "groups": len(weight)}
            z = F.conv1d(x[:, rows[members, 0]], weight, **options) / dilation**1.5
            s = z.abs()[..., ::2][..., : x.shape[-1] // 2]
            second = F.conv1d(s, weight, **options) / dilation**1.5
            found[:, members] = torch.cat([describe(z), describe(second)], -1)
        return found.flatten(1)

    return eager


def _minirocket(x: Tensor, number: int) -> Callable[[Tensor], Tensor]:
    aeon: Any = importlib.import_module("aeon.transformations.collection.convolution_based")
    fitted = aeon.MiniRocket(n_kernels=number, random_state=0, n_jobs=1).fit(x.numpy())

    def transform(x: Tensor) -> Tensor:
        return torch.from_numpy(fitted.transform(x.numpy()))

    return transform
