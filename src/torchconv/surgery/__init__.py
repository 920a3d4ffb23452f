"""Change a network that somebody already has: put operators in place of convolutions, take inference forms."""

from torchconv.surgery.merging import merge
from torchconv.surgery.swap import SwappedLayer, SwapReport, swap

__all__ = ["SwapReport", "SwappedLayer", "merge", "swap"]
