"""From raw items to what a model takes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchconv.data import Dataset, normalise


def resident(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on ``device`` when it takes at most half of what is free there, otherwise where it is."""
    if device.type == "cuda" and x.device.type != "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if x.numel() * x.element_size() > free // 2:
            return x.pin_memory()
    return x.to(device)


class Inputs:
    """Normalises raw items on ``device``, with statistics that are already there, so that it never waits.

    Args:
        data: supplies mean and standard deviation.
        device: where the items are.
        channels_last: lay images out with the channels innermost.
    """

    def __init__(self, data: Dataset, device: torch.device, channels_last: bool = False) -> None:
        self.device, self.channels_last = device, channels_last
        self.mean = torch.tensor(data.mean, dtype=torch.float32, device=device)
        self.std = torch.tensor(data.std, dtype=torch.float32, device=device)

    def __call__(self, x: Tensor) -> Tensor:
        x = normalise(x, self.mean, self.std)
        # A clone, because ``contiguous`` keeps the strides of a single channel, which later layers then follow.
        return x.clone(memory_format=torch.channels_last) if self.channels_last else x


def inputs_for(model: nn.Module, data: Dataset, device: torch.device) -> Inputs:
    """The inputs of ``model``: images on a CPU are channels-last where the model takes that.

    PyTorch's CPU convolutions run 1.3 to 2 times as fast so. A model that calls ``view`` on its maps cannot: it is
    tried on two items.
    """
    inputs = Inputs(data, device, channels_last=device.type == "cpu" and data.ndim == 2)
    if inputs.channels_last:
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            with torch.no_grad():
                model(inputs(data.val.x[:2].to(device)))
        except RuntimeError:
            inputs.channels_last = False
        finally:
            for module in training:
                module.training = True
    return inputs
