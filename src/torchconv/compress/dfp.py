"""Dynamic fixed point: integers that share one power of two, and convolutions that are exact in them.

Das et al. 2018, "Mixed Precision Training of Convolutional Neural Networks using Integer Operations", arXiv 1802.00930.
A tensor is P-bit integers and one exponent, which follows the tensor's largest magnitude:

    f ≈ i · 2^E,   E = ⌊log2 max|f|⌋ − (P − 2),   i = round(f · 2^−E), |i| ≤ 2^(P−1) − 1
    products       i_a · i_b · 2^(E_a + E_b), exact
    convolution    Σ i_x · i_w · 2^(E_x + E_w): exact, or in chains of L products in a 32-bit accumulator, each chain's
                   sum rounded to float32 and added there
    down-convert   (i + 2^(R−1)) >> R with R = bits(max|i|) − (P − 1), E + R

Only conversion and down-conversion round; sums of integers do not depend on their order. 2 bytes a number at P = 16.

The exact convolution runs in float64, which adds integers below 2^53 without rounding: with 16 bits up to 2^23 products
a sum. Wider numbers are split in two and joined in 64-bit integers. The multiply-adds are those of the convolution.
:mod:`torchconv.compress.dfp_training` has the layers, :mod:`torchconv.compress.dfp_networks` converts networks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchconv._common import Padding, Size, check, check_choice, check_positive, ntuple, resolve_padding
from torchconv.ops._common import conv_nd

ROUNDING = ("nearest", "stochastic")
DOWN = ("round", "truncate")
POLICIES = ("wrap", "saturate", "check")
EXPONENTS = (-128, 127)
_INT32 = 2**31
_EXACT = 2**53  # integers of float64
_LOW = 12  # bits of the lower half of a split operand


@dataclass(frozen=True)
class DFPTensor:
    """``integers`` · 2^``exponent``.

    Attributes:
        integers: int16 up to 16 bits, int32 up to 24; sums and products int32 or int64 (float64 if left as summed).
        exponent: shared by all, a 0-dim int64 tensor.
        bits: P, the sign included; of sums and products that of the operands.
    """

    integers: Tensor
    exponent: Tensor
    bits: int = 16

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers as floats: exact for up to 24 bits in float32 while the exponent is in range."""
        wide = torch.float64 if torch.float64 in (self.integers.dtype, dtype) else torch.float32
        return scale_by_power(self.integers.to(wide), self.exponent).to(dtype)


@dataclass(frozen=True)
class Chain:
    """How a 32-bit accumulator is kept from overflowing.

    Args:
        length: products summed in int32 before the sum goes to the float32 accumulator.
        shift: the first operand is shifted right by so many bits beforehand (arithmetic shift).
        policy: what an overflow does: "wrap" (two's complement), "saturate" (after each addition), "check" (raise).

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> Chain(*Chain.safe(shift=1))
        Chain(length=4, shift=1, policy='wrap')
    """

    length: int
    shift: int = 0
    policy: str = "wrap"

    def __post_init__(self) -> None:
        check_positive("length", self.length)
        check_positive("shift", self.shift, zero=True)
        check(self.shift <= 15, "shift", self.shift, "leaves nothing of 16 bits; at most 15")
        check_choice("policy", self.policy, POLICIES)

    @staticmethod
    def safe(shift: int = 0) -> tuple[int, int]:
        """The longest chain (and its shift) that no 16-bit operands can overflow: 2^(shift + 1) products."""
        return 2 ** (shift + 1), shift


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in float32, made from its bits; ``exponent`` in [−126, 127]."""
    return ((exponent + 127) << 23).to(torch.int32).view(torch.float32)


def scale_by_power(x: Tensor, exponent: Tensor) -> Tensor:
    """x · 2^exponent, rounded once at most (where the result is subnormal)."""
    half = exponent >> 1  # 2^exponent alone may be out of range where the result is not
    first, second = (power_of_two(e.clamp(-126, 127)).to(x.dtype) for e in (half, exponent - half))
    return x * (first * second) if x.dtype == torch.float64 else (x * first).mul_(second)


def check_bits(bits: int) -> None:
    """Refuse a width other than 2 to 24 bits."""
    check(isinstance(bits, int) and 2 <= bits <= 24, "bits", bits, "must be an integer from 2 to 24")


def top(bits: int) -> int:
    """The largest integer of so many bits; its negative is the smallest that is used."""
    return int(2 ** (bits - 1) - 1)


def _store(integers: Tensor, bits: int) -> Tensor:
    return integers.to(torch.int16 if bits <= 16 else torch.int32)


def shared_exponent(x: Tensor, bits: int = 16) -> Tensor:
    """⌊log2 max|x|⌋ − (bits − 2) within 8 bits, from the exponent field and not from a logarithm; 0 for zeros.

    Raises:
        ValueError: a number that is not finite (not looked for while compiling).
    """
    if x.numel() == 0:
        return torch.zeros((), dtype=torch.int64, device=x.device)
    low, high = torch.aminmax(x.detach())
    largest = torch.maximum(-low, high)
    if not torch.compiler.is_compiling() and not bool(torch.isfinite(largest)):
        raise ValueError("x: holds infinities or NaN, which have no shared exponent; look for the step that made them")
    exponent = torch.frexp(largest).exponent.to(torch.int64) - 1 - (bits - 2)
    return torch.where(largest == 0, 0, exponent.clamp(*EXPONENTS))


def quantize(
    x: Tensor, bits: int = 16, rounding: str = "nearest", generator: torch.Generator | None = None
) -> DFPTensor:
    """To dynamic fixed point: one read for the exponent, one for the integers.

    Args:
        x: any floating type.
        bits: P, 2 to 24.
        rounding: "nearest" (ties to even) or "stochastic" (up with the probability of the remainder).
        generator: for stochastic rounding.

    Returns:
        Integers in ±(2^(P−1) − 1); a number next to a power of two that would round to 2^(P−1) saturates.

    Raises:
        ValueError: infinities or NaN, integers, other bits or rounding.

    Example:
        >>> t = quantize(torch.tensor([1.0, -0.5, 0.3]))
        >>> t.integers, int(t.exponent)
        (tensor([16384, -8192,  4915], dtype=torch.int16), -14)

    Reference: arXiv 1802.00930, Section 3.
    """
    check_bits(bits)
    check_choice("rounding", rounding, ROUNDING)
    check(x.is_floating_point(), "x", x.dtype, "takes floating-point numbers")
    x = x.detach()
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    exponent = shared_exponent(x, bits)
    scaled = scale_by_power(x, -exponent)
    if rounding == "nearest":
        scaled = scaled.round_()
    else:
        noise = torch.rand(scaled.shape, generator=generator, device=scaled.device, dtype=scaled.dtype)
        scaled = scaled.add_(noise).floor_()
    return DFPTensor(_store(scaled.clamp_(-top(bits), top(bits)), bits), exponent, bits)


def _wide(bits: int) -> torch.dtype:
    return torch.int32 if bits <= 16 else torch.int64


def add(a: DFPTensor, b: DFPTensor) -> DFPTensor:
    """a + b at the larger exponent: the other's integers are shifted right (towards −∞), at most by 31.

    A tensor of zeros has exponent 0, so that adding one can cost bits.

    Example:
        >>> t = add(quantize(torch.tensor([1.0])), quantize(torch.tensor([-0.25])))
        >>> t.integers, int(t.exponent)
        (tensor([12288], dtype=torch.int32), -14)
    """
    bits = max(a.bits, b.bits)
    exponent = torch.maximum(a.exponent, b.exponent)
    moved = [t.integers.to(_wide(bits)) >> (exponent - t.exponent).clamp(max=31).to(_wide(bits)) for t in (a, b)]
    return DFPTensor(moved[0] + moved[1], exponent, bits)


def multiply(a: DFPTensor, b: DFPTensor) -> DFPTensor:
    """a · b by element, exact: exponents add.

    Example:
        >>> t = multiply(quantize(torch.tensor([1.0])), quantize(torch.tensor([-0.25])))
        >>> t.integers, int(t.exponent)
        (tensor([-268435456], dtype=torch.int32), -30)
    """
    bits = max(a.bits, b.bits)
    return DFPTensor(a.integers.to(_wide(bits)) * b.integers.to(_wide(bits)), a.exponent + b.exponent, bits)


def down_convert(integers: Tensor, exponent: Tensor | int, bits: int = 16, mode: str = "round") -> DFPTensor:
    """Wide sums back to ``bits`` bits: shifted right until the largest magnitude fits.

    Args:
        integers: int32 or int64.
        exponent: theirs.
        bits: P of the result, 2 to 24.
        mode: "round" (half up) or "truncate" (towards −∞).

    Example:
        >>> t = down_convert(torch.tensor([70000, -3], dtype=torch.int32), -20)
        >>> t.integers, int(t.exponent)
        (tensor([17500,    -1], dtype=torch.int16), -18)
    """
    check_bits(bits)
    check_choice("mode", mode, DOWN)
    wide = integers.to(torch.int64)
    exponent = torch.as_tensor(exponent, dtype=torch.int64, device=wide.device)
    if wide.numel() == 0:
        return DFPTensor(_store(wide, bits), exponent, bits)
    low, high = torch.aminmax(wide)
    largest = torch.maximum(-low, high)
    length = (largest >> torch.arange(63, device=wide.device) > 0).sum()  # a float would round next to powers of two
    shift = (length - (bits - 1)).clamp(min=0)
    if mode == "round":
        wide = wide + ((1 << shift) >> 1)
    wide = (wide >> shift).clamp(-top(bits), top(bits))
    return DFPTensor(_store(wide, bits), exponent + shift, bits)


def exact_sum(linear: Callable[[Tensor], Tensor], integers: Tensor, terms: int, largest: int) -> Tensor:
    """A linear map of integers in float64 without rounding: as float64 integers, or int64 where those are too small.

    Args:
        linear: float64 tensor → float64 tensor, sums of ``terms`` products.
        integers: what it acts on, magnitudes up to 2^23.
        terms: products a sum.
        largest: bound of a product's magnitude.

    Raises:
        ValueError: sums that 64 bits might not hold.
    """
    if terms * largest <= _EXACT:
        return linear(integers.double()).round_()  # for convolutions that are computed by transforms
    fits = terms * largest < 2**63
    check(fits, "bits", largest.bit_length() // 2 + 1, f"sums of {terms:,} products may leave 64 bits; use 16 bits")
    wide = integers.to(torch.int64)
    high, low = wide >> _LOW, wide & (2**_LOW - 1)
    parts = [linear(part.double()).round_().to(torch.int64) for part in (high, low)]
    return (parts[0] << _LOW) + parts[1]


def integer_conv(
    x: DFPTensor,
    w: DFPTensor,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    as_summed: bool = False,
) -> DFPTensor:
    """The exact convolution of integers.

    Args:
        x: (N, C, \\*spatial), 1 to 3 axes.
        w: (O, C/groups, \\*kernel).
        stride, padding, dilation, groups: as of ``nn.ConvNd``; padding also "same" and "valid".
        as_summed: leave the sums, which are integers, in the type that they were computed in (float64, mostly).

    Returns:
        int64 sums of products, and the sum of the exponents.

    Raises:
        ValueError: operands wider than 16 bits whose sums 64 bits might not hold.

    Example:
        >>> x, w = (quantize(torch.ones(1, 2, 3, 3)), quantize(torch.full((1, 2, 3, 3), 0.5)))
        >>> integer_conv(x, w).dequantize()
        tensor([[[[9.]]]])
    """
    kernel = w.integers.double()
    terms = w.integers[0].numel() if len(w.integers) else 0
    largest = top(x.bits) * top(w.bits)

    def convolve(part: Tensor) -> Tensor:
        return conv_nd(part, kernel, None, stride, padding, dilation, groups)

    sums = exact_sum(convolve, x.integers, terms, largest)
    sums = sums if as_summed else sums.to(torch.int64)
    return DFPTensor(sums, x.exponent + w.exponent, max(x.bits, w.bits))


def chained_conv(
    x: DFPTensor,
    w: DFPTensor,
    stride: Size = 1,
    padding: Padding | tuple[tuple[int, int], ...] = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    chain: Chain,
) -> tuple[Tensor, Tensor]:
    """The convolution as 32-bit multiply-add units carry it out, one product after another.

    Products run over the kernel's taps (row-major), within a tap over the channels of the group. ``chain.length`` of
    them are summed in int32; that sum, rounded to float32 and scaled, is added to a float32 accumulator. This emulates
    the arithmetic and takes a step a product; :func:`integer_conv` is the fast form.

    Args:
        x, w, stride, padding, dilation, groups: as of :func:`integer_conv`; padding also pairs (before, after).
        chain: length, shift of ``x``, and what an overflow does.

    Returns:
        The sums in float32, and how many additions left 32 bits.

    Raises:
        OverflowError: an addition left 32 bits under the policy "check".
        ValueError: an input smaller than the kernel.

    Example:
        >>> x, w = (quantize(torch.full((1, 3, 1), 1.99)), quantize(torch.full((1, 3, 1), 1.99)))
        >>> y, overflows = chained_conv(x, w, chain=Chain(3))
        >>> bool(y < 0), int(overflows)
        (True, 1)
    """
    ndim = w.integers.dim() - 2
    strides, dilations = ntuple("stride", stride, ndim), ntuple("dilation", dilation, ndim)
    sizes = tuple(w.integers.shape[2:])
    pads: Any = padding
    if isinstance(padding, str | int) or isinstance(padding[0], int):
        pads = resolve_padding(pads, sizes, dilations)
    a = F.pad(x.integers.to(torch.int64) >> chain.shift, [p for pair in reversed(pads) for p in pair])
    out = [(n - d * (k - 1) - 1) // s + 1 for n, d, k, s in zip(a.shape[2:], dilations, sizes, strides, strict=True)]
    check(min(out) >= 1, "x", tuple(x.integers.shape), "is smaller than the kernel; pad it")
    per = w.integers.shape[1]
    a = a.unflatten(1, (groups, per))
    b = w.integers.to(torch.int64).unflatten(0, (groups, -1))
    exponent = x.exponent + w.exponent + chain.shift
    acc = a.new_zeros(a.shape[0], groups, b.shape[1], *out)
    total = acc.to(torch.float32)
    overflows = torch.zeros((), dtype=torch.int64, device=acc.device)
    taps = itertools.product(*(range(k) for k in sizes))
    steps = list(itertools.product(taps, range(per)))
    for index, (tap, channel) in enumerate(steps, 1):
        window: list[Any] = [
            slice(t * d, t * d + (o - 1) * s + 1, s) for t, d, o, s in zip(tap, dilations, out, strides, strict=True)
        ]
        patch = a[(slice(None), slice(None), channel, *window)].unsqueeze(2)
        weight = b[(slice(None), slice(None), channel, *tap)].reshape(1, groups, -1, *[1] * ndim)
        acc = torch.addcmul(acc, patch, weight)
        outside = ((acc < -_INT32) | (acc >= _INT32)).sum()
        if chain.policy == "check" and bool(outside):
            raise OverflowError(f"chain={chain}: product {index} of {len(steps)} leaves 32 bits; shorten or shift")
        overflows = overflows + outside
        acc = acc.clamp(-_INT32, _INT32 - 1) if chain.policy == "saturate" else _wrap(acc)
        if index % chain.length == 0 or index == len(steps):
            total = total + scale_by_power(acc.to(torch.float32), exponent)
            acc = torch.zeros_like(acc)
    return total.flatten(1, 2), overflows


def _wrap(integers: Tensor) -> Tensor:
    """Into 32 bits, two's complement."""
    return ((integers + _INT32) & (2 * _INT32 - 1)) - _INT32
