"""Change a network that somebody already has: put operators in place of convolutions, take inference forms."""

from torchconv.surgery._channels import ChannelGroup
from torchconv.surgery.bundle import BundledStack, BundleReport, bundle
from torchconv.surgery.export import ExportError, ExportReport, export
from torchconv.surgery.factorise import FactorisedLayer, FactoriseReport, factorise
from torchconv.surgery.merging import FoldedNorm, MergedPart, MergeReport, Speed, merge
from torchconv.surgery.parallelise import ParallelBlocks, ParalleliseReport, ParallelStack, parallelise
from torchconv.surgery.prune import PruneReport, channel_groups, prune
from torchconv.surgery.redilate import RedilateReport, redilate
from torchconv.surgery.swap import SwappedLayer, SwapReport, swap

__all__ = [
    "BundleReport",
    "BundledStack",
    "ChannelGroup",
    "ExportError",
    "ExportReport",
    "FactoriseReport",
    "FactorisedLayer",
    "FoldedNorm",
    "MergeReport",
    "MergedPart",
    "ParallelBlocks",
    "ParallelStack",
    "ParalleliseReport",
    "PruneReport",
    "RedilateReport",
    "Speed",
    "SwapReport",
    "SwappedLayer",
    "bundle",
    "channel_groups",
    "export",
    "factorise",
    "merge",
    "parallelise",
    "prune",
    "redilate",
    "swap",
]
