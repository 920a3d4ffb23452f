"""SGConv's layer in all its options, and the kernel it assembles."""

from __future__ import annotations

import inspect

from torch import Tensor

from tests.parity.core import Adapted, Case
from torchconv.ops.sgconv import SGConvLayer


def adapt(case: Case) -> Adapted:
    """The config holds the constructor's arguments, and perhaps others that do nothing in the authors' layer."""
    names = inspect.signature(SGConvLayer).parameters
    module = SGConvLayer(**{k: v for k, v in case.config.items() if k in names})

    def kernel(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        axis = -1 if module.transposed else -2
        return {"kernel": module.kernel(inputs["u"].shape[axis])}

    return Adapted(lambda inputs: {"y": module(inputs["u"])}, module, extra=kernel)
