"""Convolutions of integers."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from torchconv.bench.cases import Case, Place, case
from torchconv.compress.dfp import quantize
from torchconv.compress.dfp_training import DFPConv2d


@case("dfp")
def dfp(place: Place) -> Iterator[Case]:
    """Dynamic fixed point, exact, against rounded operands convolved as floats, and against plain floats."""
    layer = place.put(DFPConv2d(64, 64, 3, padding=1, bias=False))
    x = place.randn(8, 64, 28, 28)

    def eager(x: Tensor) -> Tensor:
        def rounded(t: Tensor) -> Tensor:
            return t + (quantize(t).dequantize(t.dtype) - t).detach()

        return F.conv2d(rounded(x), rounded(layer.weight), padding=1)

    def floats(x: Tensor) -> Tensor:
        return F.conv2d(x, layer.weight, padding=1)

    yield Case("8×64×28² k=3 P=16", layer, (x,), eager, {"floats": floats}, params=(layer.weight,))
