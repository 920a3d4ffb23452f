"""Training with convolutions in dynamic fixed point: the layers.

Das et al. 2018, "Mixed Precision Training of Convolutional Neural Networks using Integer Operations", arXiv 1802.00930.
Input, weight and the output's gradient become integers with one exponent each, anew at every step, and all three passes
are sums of integers:

    Y  = conv(X_int, W_int) · 2^(E_x + E_w) + b
    gX = convᵀ(G_int, W_int) · 2^(E_g + E_w)
    gW = X_int ⋆ G_int · 2^(E_x + E_g)

Weights, bias, optimizer, batch norm and loss stay in floating point. What is kept for the backward pass are the
integers: 2 bytes a number. Multiply-adds as of the layer; parameters are the layer's own.
:mod:`torchconv.compress.dfp_networks` converts networks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from torchconv._common import check, check_choice, resolve_padding
from torchconv.compress.dfp import (
    ROUNDING,
    Chain,
    DFPTensor,
    chained_conv,
    check_bits,
    integer_conv,
    quantize,
)
from torchconv.compress.dfp_gradients import (
    chained_conv_input,
    chained_conv_weight,
    integer_conv_input,
    integer_conv_weight,
)
from torchconv.kernels._layout import keep_layout

ChainArguments = Sequence[Any]
Reader = Callable[[str, Any, Any], None]


class _Convolution(torch.autograd.Function):
    """Three passes over integers; the last arguments are options."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        geometry: tuple[Any, ...],
        bits: int,
        rounding: str,
        chain: tuple[Any, ...] | None,
        reader: Reader | None,
    ) -> Tensor:
        qx, qw = quantize(x, bits, rounding), quantize(weight, bits, rounding)
        ctx.save_for_backward(qx.integers, qx.exponent, qw.integers, qw.exponent)
        ctx.options = geometry, bits, rounding, chain, reader
        ctx.types = x.dtype, weight.dtype
        dtype = torch.promote_types(x.dtype, weight.dtype)
        if reader is not None:
            reader("input", qx, x)
            reader("weight", qw, weight)
        if chain is None:
            return keep_layout(integer_conv(qx, qw, *geometry, as_summed=True).dequantize(dtype), x)
        y, overflows = chained_conv(qx, qw, *geometry, chain=Chain(*chain))
        if reader is not None:
            reader("output", overflows, None)
        return keep_layout(y.to(dtype), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, x_exponent, w, w_exponent = ctx.saved_tensors
        geometry, bits, rounding, chain, reader = ctx.options
        qx, qw = DFPTensor(x, x_exponent, bits), DFPTensor(w, w_exponent, bits)
        qg = quantize(grad, bits, rounding)
        if reader is not None:
            reader("gradient", qg, grad)
        grads: list[Tensor | None] = [None, None]
        if ctx.needs_input_grad[0]:
            operands: tuple[Any, ...] = (qg, qw, x.shape[2:], *geometry)
            grads[0] = _pass(integer_conv_input, chained_conv_input, operands, chain, reader, "input gradient")
        if ctx.needs_input_grad[1]:
            operands = (qx, qg, w.shape[2:], *geometry)
            grads[1] = _pass(integer_conv_weight, chained_conv_weight, operands, chain, reader, "weight gradient")
        return (*(g if g is None else g.to(t) for g, t in zip(grads, ctx.types, strict=True)), *[None] * 5)


def _pass(exact: Any, chained: Any, operands: tuple[Any, ...], chain: Any, reader: Reader | None, name: str) -> Tensor:
    if chain is None:
        return exact(*operands, as_summed=True).dequantize(torch.float64)
    result: Tensor
    result, overflows = chained(*operands, chain=Chain(*chain))
    if reader is not None:
        reader(name, overflows, None)
    return result


def dfp_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] | int = 1,
    padding: Sequence[int] | int | str = 0,
    dilation: Sequence[int] | int = 1,
    groups: int = 1,
    *,
    bits: int = 16,
    rounding: str = "nearest",
    chain: ChainArguments | None = None,
    reader: Reader | None = None,
) -> Tensor:
    """A convolution in dynamic fixed point with gradients in dynamic fixed point; 1 to 3 axes.

    Args:
        x: (N, C, \\*spatial).
        weight: (O, C/groups, \\*kernel); stays as it is.
        bias: (O,), added in floating point.
        stride, padding, dilation, groups: as of ``nn.ConvNd``.
        bits, rounding: of :func:`~torchconv.compress.dfp.quantize`.
        chain: (length, shift, policy) of :class:`~torchconv.compress.dfp.Chain`, to emulate 32-bit accumulators in all
            three passes, a step a product; None sums exactly.
        reader: called with "input", "weight", "gradient", the integers and the floats; and with "output",
            "input gradient", "weight gradient" and the number of overflows of a chained pass.

    Returns:
        (N, O, \\*spatial') in the wider of the two types.

    Example:
        >>> dfp_conv(torch.ones(1, 1, 4), torch.ones(1, 1, 3), torch.ones(1))
        tensor([[[4., 4.]]])

    Reference: arXiv 1802.00930, Sections 3 and 4.
    """
    ndim = weight.dim() - 2
    dilations = (dilation,) * ndim if isinstance(dilation, int) else tuple(dilation)
    pads = resolve_padding(padding, weight.shape[2:], dilations)
    if any(a != b for a, b in pads):
        x = F.pad(x, [p for pair in reversed(pads) for p in pair])
        pads = ((0, 0),) * ndim
    geometry = stride, tuple(a for a, _ in pads), dilations, groups
    settled = None if chain is None else tuple(chain)
    y: Tensor = _Convolution.apply(x, weight, geometry, bits, rounding, settled, reader)
    return y if bias is None else y + bias.reshape(-1, *[1] * ndim)


class DFPLayer(nn.Module):
    """What the layers share: ``bits``, ``rounding``, ``chain`` and ``reader``, see :func:`dfp_conv`."""

    def __init__(
        self,
        *args: Any,
        bits: int = 16,
        rounding: str = "nearest",
        chain: ChainArguments | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        check_bits(bits)
        check_choice("rounding", rounding, ROUNDING)
        if chain is not None:
            check(len(chain) in (1, 2, 3), "chain", chain, "give (length, shift, policy)")
            Chain(*chain)
        self.bits, self.rounding = bits, rounding
        self.chain = None if chain is None else tuple(chain)
        self.reader: Reader | None = None

    def _options(self) -> dict[str, Any]:
        # No random numbers at inference.
        rounding = self.rounding if self.training else "nearest"
        return {"bits": self.bits, "rounding": rounding, "chain": self.chain, "reader": self.reader}

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"{super().extra_repr()}, bits={self.bits}, rounding={self.rounding!r}, chain={self.chain}"


class _DFPConv(DFPLayer):
    """``nn.ConvNd`` with its convolution in dynamic fixed point.

    Args:
        bits, rounding, chain: of :func:`dfp_conv`; stochastic rounding in training mode only.
        others: as of ``nn.ConvNd``, whose parameters and names these layers have.

    Raises:
        ValueError: an argument out of range; the message names it.

    Example:
        >>> layer = DFPConv2d(3, 8, 3, stride=2, padding=1)
        >>> layer(torch.zeros(1, 3, 8, 8)).shape
        torch.Size([1, 8, 4, 4])

    Reference: arXiv 1802.00930.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        conv: Any = self
        ndim = weight.dim() - 2
        single = input.dim() == ndim + 1
        x = input.unsqueeze(0) if single else input
        ok = x.dim() == ndim + 2 and x.shape[1] == conv.in_channels
        check(ok, "x", tuple(input.shape), f"expected (N, {conv.in_channels}, …) with {ndim} more axes")
        padding = conv.padding
        if conv.padding_mode != "zeros":
            x = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
            padding = 0
        y = dfp_conv(x, weight, bias, conv.stride, padding, conv.dilation, conv.groups, **self._options())
        return y[0] if single else y


class DFPConv1d(_DFPConv, nn.Conv1d):
    """``nn.Conv1d`` in dynamic fixed point, over (N, C, L)."""


class DFPConv2d(_DFPConv, nn.Conv2d):
    """``nn.Conv2d`` in dynamic fixed point, over (N, C, H, W)."""


class DFPConv3d(_DFPConv, nn.Conv3d):
    """``nn.Conv3d`` in dynamic fixed point, over (N, C, D, H, W)."""


class DFPLinear(DFPLayer, nn.Linear):
    """``nn.Linear`` in dynamic fixed point: a convolution with a kernel of one tap over all rows.

    Args:
        bits, rounding, chain: of :func:`dfp_conv`.
        others: as of ``nn.Linear``.

    Example:
        >>> DFPLinear(8, 3)(torch.zeros(2, 5, 8)).shape
        torch.Size([2, 5, 3])
    """

    def forward(self, input: Tensor) -> Tensor:
        """x · Wᵀ + b."""
        size = self.in_features
        check(input.dim() >= 1 and input.shape[-1] == size, "x", tuple(input.shape), f"expected (…, {size})")
        if input.numel() == 0:
            return F.linear(input, self.weight, self.bias)
        rows = input.reshape(-1, self.in_features).t().unsqueeze(0)
        y = dfp_conv(rows, self.weight.unsqueeze(-1), self.bias, **self._options())
        return y[0].t().reshape(*input.shape[:-1], self.out_features)
