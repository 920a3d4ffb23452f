"""What the conformance tests of operators and of layers share."""

from __future__ import annotations

import copy
import io
import pickle

import torch
from torch import nn


def randomise(module: nn.Module) -> nn.Module:
    """Away from the initial values, which hide mistakes (zero biases, unit scales)."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.mul_((0.75 + 0.5 * noise).to(tensor.dtype))
    return module


def copies(module: nn.Module, fresh: nn.Module) -> list[nn.Module]:
    """Twins of ``module`` in eval mode: a deep copy, a pickled one, and ``fresh`` with its state loaded."""
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    return [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), fresh.eval()]
