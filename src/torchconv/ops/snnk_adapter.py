"""Adapters from scalable neural network kernels (Sehanobish et al. 2023, arXiv 2310.13225).

    y = x + Up(Ψ Φ(LN x))          Up linear from q to d           q·m + d·q + d trainable parameters
    y = x + v ⊙ (Ψ Φ(LN x))        modulated, without Up           d·m + d

A fresh adapter is the identity. In inference Up and Ψ are one matrix (d, m).
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from torchconv._common import check_choice, check_positive
from torchconv.catalog import part
from torchconv.ops.snnk import ReLUFeatures, SNNKLinear, URFeatures, _linear


@part(
    "snnk-adapter",
    paper="snnk",
    kind="layer",
    merges="self",
    probe={
        "build": {"input_size": 6, "features": 10, "down_sample": 3, "ln_before": True, "init_weights": "bert"},
        "inputs": [[2, 5, 6]],
    },
    keywords="adapter parameter-efficient fine-tuning PEFT transformer random features LoRA",
)
class SNNKAdapter(nn.Module):
    """Residual adapter whose hidden layer is an :class:`~torchconv.ops.snnk.SNNKLinear`.

    Args:
        input_size: d.
        features: m, or a feature map on d inputs.
        down_sample: q, the width of the hidden layer; None multiplies a hidden layer of width d by a vector.
        ln_before: layer norm before the features (the residual is the raw input).
        init_weights: "mam" starts as the identity, "bert" with normal weights of deviation 0.02. The modulated form
            always starts as the identity.

    Shape:
        (\\*, d) → the same.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> adapter, x = SNNKAdapter(6, 10, down_sample=3), torch.randn(2, 6)
        >>> torch.equal(adapter(x), x)
        True

    The authors' checkpoints load through :func:`~torchconv.ops.snnk.convert_official`.
    Reference: arXiv 2310.13225.
    """

    def __init__(
        self,
        input_size: int,
        features: int | ReLUFeatures | URFeatures = 16,
        down_sample: int | None = None,
        ln_before: bool = False,
        *,
        init_weights: str = "mam",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_positive("input_size", input_size)
        check_choice("init_weights", init_weights, ("mam", "bert"))
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.input_size, self.down_sample, self.init_weights = input_size, down_sample, init_weights
        self.adapter_norm_before = nn.LayerNorm(input_size, **options) if ln_before else None
        self.adapter_up: nn.Linear | None = None
        self.modulating_vector: nn.Parameter | None = None
        if down_sample is None:
            self.adapter_down = SNNKLinear(input_size, input_size, features, **options)
            self.modulating_vector = nn.Parameter(torch.zeros(input_size, **options))
        else:
            check_positive("down_sample", down_sample)
            self.adapter_down = SNNKLinear(input_size, down_sample, features, **options)
            self.adapter_up = nn.Linear(down_sample, input_size, **options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As ``init_weights`` says."""
        down = self.adapter_down
        weight = down.weights.new_empty(down.out_features, down.in_features)
        with torch.no_grad():
            if self.init_weights == "bert":
                weight.normal_(0, 0.02)
            else:
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
            down.weights.copy_(down.features.weight_features(weight))
        if self.adapter_up is not None:
            nn.init.normal_(self.adapter_up.weight, 0, 0.02 if self.init_weights == "bert" else 0)
            nn.init.zeros_(self.adapter_up.bias)
        if self.modulating_vector is not None:
            nn.init.zeros_(self.modulating_vector)

    def forward(self, x: Tensor) -> Tensor:
        """Add the adapter's branch to ``x``."""
        normed = x if self.adapter_norm_before is None else self.adapter_norm_before(x)
        hidden: Tensor = self.adapter_down(normed)
        if self.modulating_vector is not None:
            return x + hidden * self.modulating_vector
        assert self.adapter_up is not None
        y: Tensor = x + self.adapter_up(hidden)
        return y

    @torch.no_grad()
    def merge(self) -> BundledAdapter:
        """The inference form with one matrix after the features; cheaper where d·m < q·(m + d)."""
        weights = self.adapter_down.weights.double()
        if self.modulating_vector is not None:
            matrix, bias = self.modulating_vector.double()[:, None] * weights, None
        else:
            assert self.adapter_up is not None
            matrix, bias = self.adapter_up.weight.double() @ weights, self.adapter_up.bias
        linear = _linear(matrix, bias, self.adapter_down.weights)
        return BundledAdapter(self.adapter_norm_before, self.adapter_down.features, linear).eval()


class BundledAdapter(nn.Module):
    """x + linear(features(norm(x))), what :meth:`SNNKAdapter.merge` returns; it copies ``norm`` and ``features``."""

    def __init__(self, norm: nn.Module | None, features: nn.Module, linear: nn.Linear) -> None:
        super().__init__()
        self.norm, self.features, self.linear = copy.deepcopy(norm), copy.deepcopy(features), linear

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch to ``x``."""
        normed = x if self.norm is None else self.norm(x)
        y: Tensor = x + self.linear(self.features(normed))
        return y
