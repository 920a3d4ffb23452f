"""Change a network that somebody already has: put operators in place of convolutions, take inference forms."""

from torchconv.surgery.merging import merge
from torchconv.surgery.redilate import RedilateReport, redilate
from torchconv.surgery.swap import SwappedLayer, SwapReport, swap

__all__ = ["RedilateReport", "SwapReport", "SwappedLayer", "merge", "redilate", "swap"]
