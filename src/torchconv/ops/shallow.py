"""Parallel residual block: a stack of residual layers replaced by one wide layer.

Bermeitinger, Hrycej, Handschuh 2023, "Make Deep Networks Shallow Again", arXiv 2309.08414 (no code was published).

A stack x ← x + F_i(x), i = 1..K, expands like a Taylor series into products of at most K layers. Cutting the series
after the terms with one layer leaves K layers that all read the same input, which is one layer K times as wide:

    order 0      x
    order 1      x + Σ_i F_i(x)                                     parallel, "shallow"
    order 2      … + Σ_{i<j} J_j F_i(x)                             J_j: derivative of F_j at x
    order None   the stack itself, for linear layers equal to order K

with F_i(x) = act(W_i ∗ x + b_i), C → C, size kept. K·(k^n·C²/g + C) parameters in every order; K·k^n·C²/g
multiply-adds a position in the stack and at order 1, and K·(K−1)/2 more products at most for the higher orders.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive
from torchconv.catalog import part
from torchconv.ops._common import (
    CONV,
    Padding,
    Size,
    check_channels,
    check_input,
    check_same,
    check_unit,
    conv_nd,
    dilate_kernel,
    make_conv,
    ntuple,
)

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "linear": lambda z: z,
}
# Derivatives from the activation's value.
_SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda a: (a > 0).to(a.dtype),
    "sigmoid": lambda a: a * (1 - a),
    "tanh": lambda a: 1 - a * a,
    "linear": torch.ones_like,
}
ACTIVATIONS = tuple(_FUNCTIONS)


def check_order(order: int | None, layers: int, activation: str) -> None:
    """Refuse an order that has no exact terms: above K, or above 2 for curved layers."""
    if order is None:
        return
    highest = layers if activation == "linear" else min(2, layers)
    ok = isinstance(order, int) and not isinstance(order, bool) and 0 <= order <= highest
    check(ok, "order", order, f"{layers} {activation} layers have orders 0 to {highest}, and None for the whole stack")


def expansion_terms(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    order: int = 1,
    activation: str = "relu",
    dilation: Size = 1,
    groups: int = 1,
) -> list[Tensor]:
    """The terms of a residual stack's expansion at ``x``, by the number of layers in their products.

    T_0 = x and, layer by layer, T_1 += F_i(x), T_m += J_i T_{m−1} from the highest m down: at most K·order layer
    evaluations instead of one for each of the Σ_m C(K, m) products.

    Args:
        x: (N, C, \\*spatial).
        weights: kernels (C, C / groups, \\*kernel), first layer first; sizes may differ.
        biases: (C,) or None for each layer; None for none at all.
        order: highest number of layers in a product: up to K for "linear", up to 2 for the other activations.
        activation: "relu", "sigmoid", "tanh" or "linear".
        dilation, groups: of the convolutions.

    Shape:
        (N, C, \\*spatial) → ``order`` + 1 tensors of the same shape; their sum is the truncated stack.

    Raises:
        ValueError: an order or activation that is not available.

    Example:
        >>> weights = [torch.full((1, 1, 1), w) for w in (2.0, 3.0)]
        >>> [float(t) for t in expansion_terms(torch.ones(1, 1, 1), weights, None, 2, "linear")]
        [1.0, 5.0, 6.0]

    Reference: arXiv 2309.08414.
    """
    check_choice("activation", activation, ACTIVATIONS)
    check(order is not None, "order", order, "the whole stack has no list of terms; give its number of layers")
    check_order(order, len(weights), activation)
    act, slope = _FUNCTIONS[activation], _SLOPES[activation]
    terms: list[Tensor | None] = [x, *[None] * order]
    for weight, bias in zip(weights, _biases(biases, weights), strict=True):
        value = act(conv_nd(x, weight, bias, padding="same", dilation=dilation, groups=groups))
        for m in range(order, 1, -1):
            before = terms[m - 1]
            if before is not None:
                step = conv_nd(before, weight, padding="same", dilation=dilation, groups=groups)
                terms[m] = _plus(terms[m], step if activation == "linear" else slope(value) * step)
        if order:
            terms[1] = _plus(terms[1], value)
    return [torch.zeros_like(x) if t is None else t for t in terms]


def _plus(total: Tensor | None, term: Tensor) -> Tensor:
    return term if total is None else total + term


def _biases(biases: Sequence[Tensor | None] | None, weights: Sequence[Tensor]) -> Sequence[Tensor | None]:
    ok = biases is None or len(biases) == len(weights)
    check(ok, "biases", biases, f"give one (or None) for each of the {len(weights)} layers")
    return [None] * len(weights) if biases is None else biases


def residual_stack(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    order: int | None = 1,
    activation: str = "relu",
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """K residual layers: in a row (``order`` None), side by side (1), or with the products of up to ``order`` layers.

    Side by side, layers of one kernel size are computed as one convolution to K·C channels.

    Args:
        x, weights, biases, order, activation, dilation, groups: as in :func:`expansion_terms`; ``order`` may be None.

    Shape:
        (N, C, \\*spatial) → the same.

    Raises:
        ValueError: an order or activation that is not available.

    Example:
        >>> weights = [torch.full((1, 1, 1), w) for w in (2.0, 3.0)]
        >>> [float(residual_stack(torch.ones(1, 1, 1), weights, None, order)) for order in (0, 1, None)]
        [1.0, 6.0, 12.0]

    Reference: arXiv 2309.08414.
    """
    check_choice("activation", activation, ACTIVATIONS)
    check_order(order, len(weights), activation)
    act = _FUNCTIONS[activation]
    found = _biases(biases, weights)
    if order == 0:
        return x
    if order is None:
        for weight, bias in zip(weights, found, strict=True):
            x = x + act(conv_nd(x, weight, bias, padding="same", dilation=dilation, groups=groups))
        return x
    depthwise = groups > 1 and groups == x.shape[1]  # has a faster kernel of its own, layer by layer
    alike = len({w.shape for w in weights}) == 1 and len({b is None for b in found}) == 1
    if order == 1 and alike and not depthwise:
        weight, bias = widen(weights, found, groups)
        return x + _wide(x, weight, bias, len(weights), activation, dilation, groups)
    return torch.stack(expansion_terms(x, weights, found, order, activation, dilation, groups)).sum(0)


def widen(weights: Sequence[Tensor], biases: Sequence[Tensor | None], groups: int = 1) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the one convolution C → K·C that computes K parallel layers, a group's layers side by side."""
    weight = torch.stack(tuple(weights)).unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 2)
    given = [b for b in biases if b is not None]
    bias = torch.stack(given).unflatten(1, (groups, -1)).transpose(0, 1).flatten() if given else None
    return weight, bias


def _wide(
    x: Tensor, weight: Tensor, bias: Tensor | None, layers: int, activation: str, dilation: Size, groups: int
) -> Tensor:
    y = _FUNCTIONS[activation](conv_nd(x, weight, bias, padding="same", dilation=dilation, groups=groups))
    if groups == 1:
        return y.unflatten(1, (layers, -1)).sum(1)
    return y.unflatten(1, (groups, layers, -1)).sum(2).flatten(1, 2)


def _delta(like: Tensor) -> Tensor:
    """The kernel of ``like``'s shape that copies its input, with the centre where "same" padding has it."""
    weight = torch.zeros_like(like)
    channel = torch.arange(like.shape[0], device=like.device)
    index: tuple[Any, ...] = (channel, channel % like.shape[1], *((k - 1) // 2 for k in like.shape[2:]))
    weight[index] = 1
    return weight


class WideResidual(nn.Module):
    """y = x + Σ over K groups of act(conv(x)), ``conv`` from C to K·C channels: parallel residual layers merged.

    Built by :meth:`ParallelResidual.merge`.
    """

    def __init__(self, conv: nn.Module, layers: int, activation: str) -> None:
        super().__init__()
        self.conv: Any = conv
        self.layers, self.activation = layers, activation

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, \\*spatial) → the same."""
        conv = self.conv
        check_input(x, conv.in_channels, conv.weight.dim() - 2)
        return x + _wide(x, conv.weight, conv.bias, self.layers, self.activation, conv.dilation, conv.groups)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"layers={self.layers}, activation={self.activation!r}"


@part(
    "shallow",
    paper="shallow",
    kind="operator",
    dims=(1, 2, 3),
    mixes="space+channels",
    supports=("groups", "dilation", "even"),
    merges="self",
    mixer={"kernel_size": 3},
    keywords="parallel residual stack Taylor expansion depth to width ensemble of paths low latency",
)
class ParallelResidual(nn.Module):
    """K residual layers of equal width, side by side or in a row, with the same parameters.

    Args:
        in_channels: C ≥ 1; ``out_channels`` is None or C.
        kernel_size: ≥ 1, odd or even.
        stride: 1 only, the layers are added to their input.
        padding: "same" only.
        dilation: ≥ 1.
        groups: divides C.
        bias: learn an additive bias in every layer.
        n_layers: K ≥ 1.
        activation: "relu", "sigmoid", "tanh" or "linear", before the addition.
        order: 1, the layers side by side; None, the layers in a row; 0, 2 (or up to K if linear), the expansion cut
            after products of that many layers.

    Shape:
        (N, C, \\*spatial) → the same.

    Raises:
        ValueError: an argument is out of range or not supported; the message names it.

    Example:
        >>> deep = ParallelResidual2d(8, n_layers=16, order=None)
        >>> shallow = deep.with_order(1)
        >>> shallow.layers is deep.layers, shallow(torch.zeros(2, 8, 5, 5)).shape
        (True, torch.Size([2, 8, 5, 5]))

    Reference: arXiv 2309.08414.
    """

    ndim: ClassVar[int] = 0

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_size: Size = 3,
        stride: Size = 1,
        padding: Padding = "same",
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        n_layers: int = 4,
        activation: str = "relu",
        order: int | None = 1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        name = "the parallel residual block"
        check_channels(in_channels, in_channels, groups)
        remedy = f"{name} adds its layers to their input: as many channels as it gets ({in_channels})"
        check(out_channels in (None, in_channels), "out_channels", out_channels, remedy)
        check_unit("stride", stride, self.ndim, name, "subsample after it")
        check_positive("n_layers", n_layers)
        check_choice("activation", activation, ACTIVATIONS)
        check_order(order, n_layers, activation)
        self.in_channels = self.out_channels = in_channels
        self.kernel_size = ntuple("kernel_size", kernel_size, self.ndim)
        self.dilation = ntuple("dilation", dilation, self.ndim)
        check_same(padding, self.kernel_size, name, self.dilation)
        self.stride, self.padding, self.groups = (1,) * self.ndim, "same", groups
        self.n_layers, self.activation, self.order = n_layers, activation, order
        options: dict[str, Any] = {"dilation": self.dilation, "groups": groups, "bias": bias}
        options.update(padding="same", device=device, dtype=dtype)
        conv = CONV[self.ndim]
        self.layers = nn.ModuleList(
            conv(in_channels, in_channels, self.kernel_size, **options) for _ in range(n_layers)
        )

    def reset_parameters(self) -> None:
        """PyTorch's convolution defaults in every layer."""
        for layer in self._convs():
            layer.reset_parameters()

    def _convs(self) -> list[Any]:
        return list(self.layers)

    def _tensors(self) -> tuple[list[Tensor], list[Tensor | None]]:
        convs = self._convs()
        return [c.weight for c in convs], [c.bias for c in convs]

    def with_order(self, order: int | None) -> ParallelResidual:
        """Another block on the same layers (shared, not copied), evaluated at ``order``.

        A trained stack does not keep its accuracy side by side: train it again.
        """
        check_order(order, self.n_layers, self.activation)
        block = type(self).__new__(type(self))
        nn.Module.__init__(block)
        block.__dict__.update({k: v for k, v in self.__dict__.items() if not k.startswith("_")})
        block.layers, block.order, block.training = self.layers, order, self.training
        return block

    def terms(self, x: Tensor, order: int = 1) -> list[Tensor]:
        """The expansion's terms at ``x``, see :func:`expansion_terms`."""
        check_input(x, self.in_channels, self.ndim)
        weights, biases = self._tensors()
        return expansion_terms(x, weights, biases, order, self.activation, self.dilation, self.groups)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers to ``x`` in the block's order."""
        check_input(x, self.in_channels, self.ndim)
        weights, biases = self._tensors()
        return residual_stack(x, weights, biases, self.order, self.activation, self.dilation, self.groups)

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """One wide convolution with the sum of its groups; with linear layers one C → C convolution, δ + Σ W_i.

        Raises:
            ValueError: a block with products of layers (``order`` None or above 1) has no such form; with zero padding
                not even linear layers compose to one kernel at the border.
        """
        ok = self.order in (0, 1)
        check(ok, "order", self.order, "only the parallel form merges; take with_order(1), which is another function")
        weights, biases = self._tensors()
        if self.order == 0 or self.activation == "linear":
            dilation: Size = self.dilation
            if any(k % 2 == 0 for k in self.kernel_size):  # no tap at the centre unless the gaps are filled with zeros
                weights, dilation = [dilate_kernel(w, dilation) for w in weights], 1
            used = slice(0, None if self.order else 0)
            weight = torch.stack([_delta(weights[0]), *weights[used]]).sum(0)
            given = [b for b in biases[used] if b is not None]
            total = torch.stack(given).sum(0) if given else None
            return make_conv(weight, total, 1, "same", dilation, self.groups)
        wide, bias = widen(weights, biases, self.groups)
        conv = make_conv(wide, bias, 1, "same", self.dilation, self.groups)
        return WideResidual(conv, self.n_layers, self.activation).eval()

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"{self.in_channels}, n_layers={self.n_layers}, activation={self.activation!r}, order={self.order}"


class ParallelResidual1d(ParallelResidual):
    """Parallel residual layers over (N, C, L)."""

    ndim = 1


class ParallelResidual2d(ParallelResidual):
    """Parallel residual layers over (N, C, H, W)."""

    ndim = 2


class ParallelResidual3d(ParallelResidual):
    """Parallel residual layers over (N, C, D, H, W)."""

    ndim = 3
