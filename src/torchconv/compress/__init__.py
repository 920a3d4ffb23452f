"""Make a trained network cheaper: decide what can go, train so that it is not missed.

:mod:`torchconv.surgery` takes it out.
"""

from torchconv.compress.dfp_networks import convert_to_dfp
from torchconv.compress.masksparsity import MaskSparsity, channel_masks

__all__ = ["MaskSparsity", "channel_masks", "convert_to_dfp"]
