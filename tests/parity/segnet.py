"""Pooling with the places of the maxima, and unpooling."""

from __future__ import annotations

from torch import Tensor

from tests.parity.core import Adapted, Case, ParityError
from torchconv.ops.segnet import index_pool, index_unpool, plane_indices


def pooling(case: Case) -> Adapted:
    kernel = case.config.get("kernel", 2)
    stride = case.config.get("stride", kernel)
    ceil = case.config.get("ceil", True)

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x = inputs["x"]
        pooled, offsets = index_pool(x, kernel, stride, ceil)
        unpooled = index_unpool(pooled, offsets, x.shape[2:], kernel, stride)
        indices = plane_indices(offsets, x.shape[2:], kernel, stride)
        # The cotangent belongs to the unpooled map, so that it stands first.
        return {"unpooled": unpooled, "pooled": pooled, "indices": indices}

    return Adapted(forward)


def adapt(case: Case) -> Adapted:
    """Files with the places of maxima; the networks are not covered yet."""
    if "indices" in case.outputs or "unpooled" in case.outputs:
        return pooling(case)
    raise ParityError("only pooling and unpooling are covered so far, not the networks and scores")
