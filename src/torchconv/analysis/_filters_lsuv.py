"""Layer-sequential unit variance (Mishkin and Matas 2016, arXiv 1511.06422): initial weights scaled by what they give.

for each layer in the order of running: while |var(output) − 1| ≥ tol: W ← W / √var(output)
"""

from __future__ import annotations

import math
from typing import Any

from torch import Generator, Tensor, nn

from torchconv._common import check
from torchconv.analysis import _filters_random as laws
from torchconv.analysis._filters_layers import (
    Layers,
    draw_dtype,
    evaluating,
    selected,
    set_weight,
    shape_of,
    stored,
    zero_bias,
)


def lsuv(
    model: nn.Module,
    data: Tensor,
    *,
    tol: float = 0.1,
    max_iter: int = 10,
    orthonormal: bool = True,
    seed: int = 0,
    layers: Layers = None,
) -> dict[str, float]:
    """Layer-sequential unit variance, in place: orthonormal weights, each layer divided by its output's deviation.

    One forward pass: a layer is corrected the first time that it runs, before the next one sees its output. A linear
    layer needs one division. Pointless where a normalisation follows.

    Args:
        model: changed in place, in evaluation mode meanwhile.
        data: one batch of inputs.
        tol: a layer is good when |variance − 1| is below.
        max_iter: divisions of a layer at most.
        orthonormal: start from orthogonal weights of ``seed`` (gain 1); else from the weights as they are.
        seed, layers: as for :func:`init`.

    Returns:
        Name → variance of the layer's output after the last division, of layers that ran.

    Raises:
        ValueError: a layer gives only one value, or values that are not finite, for all the data.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> sorted(lsuv(net, torch.randn(256, 8)))
        ['0', '2']

    Reference: arXiv 1511.06422.
    """
    chosen = selected(model, layers)
    generator = Generator().manual_seed(seed)
    for module in chosen.values():
        if orthonormal:
            weight = laws.orthogonal(shape_of(module), generator=generator, gain=1.0, dtype=draw_dtype(module))
            set_weight(module, stored(module, weight))
        zero_bias(module)
    names = {m: n for n, m in chosen.items()}
    variances: dict[str, float] = {}

    def correct(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if names[module] in variances:
            return None
        variance = output.var(correction=0)
        for _ in range(max_iter):
            if abs(float(variance) - 1) < tol:
                break
            usable = math.isfinite(float(variance)) and float(variance) > 0
            check(usable, "data", float(variance), f"is the variance after {names[module]!r}; give other data")
            set_weight(module, module.weight / variance.sqrt())
            output = module.forward(*args)
            variance = output.var(correction=0)
        variances[names[module]] = float(variance)
        return output

    handles = [m.register_forward_hook(correct) for m in chosen.values()]
    try:
        with evaluating(model):
            model(data)
    finally:
        for handle in handles:
            handle.remove()
    return variances
