"""Capsules: vectors whose length says how present something is, routed by agreement to one for each class.

Sabour, Frosst, Hinton 2017, "Dynamic Routing Between Capsules", arXiv 1710.09829; used for crop-stress series by Shi,
Han et al. 2023, "A Fast Fourier Convolutional Deep Neural Network For Accurate and Explainable Discrimination Of Wheat
Yellow Rust And Nitrogen Deficiency From Sentinel-2 Time-Series Data", arXiv 2306.17207.

    routing  û_ij = W_ij u_i;  b = 0;  r times:  c_i = softmax_j(b_ij), v_j = squash(Σ_i c_ij û_ij), b_ij += û_ij · v_j
    squash   |s|²/(1 + |s|²) · s/|s|

n_in·n_out·p·k parameters and multiply-adds for the votes, n_in·n_out·k of both kinds in an iteration.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_positive
from torchconv.catalog import part
from torchconv.kernels.precision import widen
from torchconv.ops._common import check_input


def squash(s: Tensor, eps: float = 1e-8) -> Tensor:
    """Shorten vectors to a length in [0, 1) and keep their direction: |s|²/(1 + |s|²) · s/|s|, over the last axis.

    Args:
        s: vectors.
        eps: added to |s|² in the root, for a gradient at zero.

    Shape:
        (…, k) → (…, k). Half precision is computed in float32.

    Example:
        >>> squash(torch.tensor([3.0, 4.0])).norm().round(decimals=4)
        tensor(0.9615)

    Reference: arXiv 1710.09829, equation 1.
    """
    wide = widen(s)
    squared = wide.square().sum(-1, keepdim=True)
    return (wide * (squared / (1 + squared) * torch.rsqrt(squared + eps))).to(s.dtype)


def dynamic_routing(u: Tensor, weight: Tensor, iterations: int = 3) -> tuple[Tensor, Tensor]:
    """Routing by agreement from input capsules to output capsules.

    The softmax is over the output capsules: each input shares itself out. Gradients flow through all iterations.

    Args:
        u: input capsules.
        weight: (n_in, n_out, p, k).
        iterations: r ≥ 1; at 1 every input is shared out evenly.

    Shape:
        u (N, n_in, p) → capsules (N, n_out, k) and the shares (N, n_in, n_out) that made them.

    Raises:
        ValueError: ``iterations`` below 1, or shapes that do not fit.

    Example:
        >>> v, shares = dynamic_routing(torch.ones(1, 4, 2), torch.ones(4, 3, 2, 5), iterations=1)
        >>> v.shape, shares[0, 0]
        (torch.Size([1, 3, 5]), tensor([0.3333, 0.3333, 0.3333]))

    Reference: arXiv 1710.09829, procedure 1.
    """
    check_positive("iterations", iterations)
    check(u.dim() == 3, "u", tuple(u.shape), "expected (N, n_in, p)")
    if weight.dim() != 4 or weight.shape[0] != u.shape[1] or weight.shape[2] != u.shape[2]:
        expected = f"({u.shape[1]}, n_out, {u.shape[2]}, k)"
        raise ValueError(f"weight of shape {tuple(weight.shape)}: expected {expected}")
    votes = torch.einsum("ijpk,nip->nijk", weight, u)
    logits = votes.new_zeros(votes.shape[:3])
    for step in range(iterations):
        shares = logits.softmax(2)
        v = squash(torch.einsum("nij,nijk->njk", shares, votes))
        if step + 1 < iterations:
            logits = logits + torch.einsum("nijk,njk->nij", votes, v)
    return v, shares


def margin_loss(lengths: Tensor, label: Tensor, upper: float = 0.9, lower: float = 0.1, absent: float = 0.5) -> Tensor:
    """Σ_k [k = label]·max(0, upper − |v_k|)² + absent·[k ≠ label]·max(0, |v_k| − lower)², averaged over the batch.

    Args:
        lengths: lengths of the class capsules.
        label: classes.
        upper, lower, absent: margins, and the weight of the other classes.

    Shape:
        (N, classes), (N,) → a number.

    Raises:
        ValueError: labels of another shape, or no integers.

    Example:
        >>> margin_loss(torch.tensor([[0.95, 0.05]]), torch.tensor([0]))
        tensor(0.)

    Reference: arXiv 1710.09829, equation 4.
    """
    fits = label.shape == lengths.shape[:1] and not label.is_floating_point()
    check(fits, "label", tuple(label.shape), f"expected {lengths.shape[0]} class numbers, one an item")
    right = F.one_hot(label.long(), lengths.shape[1]).to(lengths.dtype)
    loss = right * F.relu(upper - lengths).square() + absent * (1 - right) * F.relu(lengths - lower).square()
    return loss.sum(1).mean()


class MarginLoss(nn.Module):
    """:func:`margin_loss` as a module.

    Args:
        upper, lower, absent: margins in [0, 1], the lower one first, and the weight ≥ 0 of the other classes.

    Shape:
        (N, classes), (N,) → a number.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> MarginLoss()(torch.tensor([[0.5, 0.05]]), torch.tensor([0])).round(decimals=2)
        tensor(0.1600)

    Reference: arXiv 1710.09829, equation 4.
    """

    def __init__(self, upper: float = 0.9, lower: float = 0.1, absent: float = 0.5) -> None:
        super().__init__()
        check(0 <= lower < upper <= 1, "upper", upper, f"must lie above lower={lower}, both in 0 to 1")
        check(absent >= 0, "absent", absent, "must be 0 or more")
        self.upper, self.lower, self.absent = upper, lower, absent

    def forward(self, lengths: Tensor, label: Tensor) -> Tensor:
        """The loss."""
        return margin_loss(lengths, label, self.upper, self.lower, self.absent)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"upper={self.upper}, lower={self.lower}, absent={self.absent}"


@part(
    "dynamic-routing",
    paper="ffdnn",
    kind="layer",
    dims=(),
    probe={"build": {"inputs": 5, "outputs": 3, "primary": 4, "dim": 6}, "inputs": [[2, 5, 4]]},
    keywords="capsule network routing by agreement CapsNet",
)
class DynamicRouting(nn.Module):
    """Routing by agreement with learned votes: a vector of each input capsule for each output capsule.

    Args:
        inputs, outputs: capsules.
        primary, dim: numbers in an input and in an output capsule.
        iterations: r ≥ 1.

    Shape:
        (N, inputs, primary) → capsules (N, outputs, dim) and shares (N, inputs, outputs), which sum to 1 over outputs.

    Raises:
        ValueError: an argument is out of range, or capsules of another number or size.

    Example:
        >>> v, shares = DynamicRouting(24, 3)(torch.zeros(5, 24, 8))
        >>> v.shape, shares.shape
        (torch.Size([5, 3, 8]), torch.Size([5, 24, 3]))

    Reference: arXiv 1710.09829, procedure 1.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        primary: int = 8,
        dim: int = 8,
        iterations: int = 3,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        sizes = {"inputs": inputs, "outputs": outputs, "primary": primary, "dim": dim, "iterations": iterations}
        for name, value in sizes.items():
            check_positive(name, value)
        self.iterations = iterations
        self.weight = nn.Parameter(torch.empty(inputs, outputs, primary, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Votes as large as the capsules that cast them."""
        nn.init.normal_(self.weight, std=1 / math.sqrt(self.weight.shape[2]))

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Route ``u``."""
        return dynamic_routing(u, self.weight, self.iterations)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"{', '.join(str(n) for n in self.weight.shape)}, iterations={self.iterations}"


@part(
    "capsules",
    paper="ffdnn",
    kind="layer",
    dims=(1,),
    probe={"build": {"channels": 6, "length": 8, "classes": 3}, "inputs": [[2, 6, 8]]},
    keywords="capsule network dynamic routing encoder classifier time series explainable",
)
class CapsuleEncoder(nn.Module):
    """A capsule for each step of a series, routed to one for each class; their lengths are the scores.

    Args:
        channels: C.
        length: T, steps of a series.
        classes: class capsules.
        primary: p, numbers in the capsule of a step.
        dim: k, numbers in the capsule of a class.
        iterations: of the routing.

    Shape:
        (N, channels, length) → class capsules (N, classes, dim) and shares (N, length, classes): which steps voted for
        which class.

    Raises:
        ValueError: an argument is out of range, or series of another length.

    Example:
        >>> v, shares = CapsuleEncoder(32, 24, 3)(torch.zeros(5, 32, 24))
        >>> v.norm(dim=2).shape, shares.shape
        (torch.Size([5, 3]), torch.Size([5, 24, 3]))

    Reference: arXiv 2306.17207; arXiv 1710.09829.
    """

    def __init__(
        self,
        channels: int,
        length: int,
        classes: int,
        primary: int = 8,
        dim: int = 8,
        iterations: int = 3,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        sizes = {"channels": channels, "length": length, "classes": classes, "primary": primary}
        for name, value in sizes.items():
            check_positive(name, value)
        self.channels, self.length = channels, length
        self.primary = nn.Linear(channels, primary, device=device, dtype=dtype)
        self.routing = DynamicRouting(length, classes, primary, dim, iterations, device=device, dtype=dtype)

    def primary_capsules(self, x: Tensor) -> Tensor:
        """The capsules of the steps, (N, length, primary); their lengths say which steps matter."""
        check_input(x, self.channels, 1)
        if x.shape[-1] != self.length:
            raise ValueError(
                f"x of shape {tuple(x.shape)}: capsules are for series of {self.length} steps; resample it"
            )
        return squash(self.primary(x.transpose(1, 2)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Encode and route."""
        found: tuple[Tensor, Tensor] = self.routing(self.primary_capsules(x))
        return found
