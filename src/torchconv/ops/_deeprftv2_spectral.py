"""What DeepRFT does to a spectrum: two matrices, real or complex, with an activation between them.

Mao et al., arXiv 2111.11745; see :mod:`torchconv.ops.deeprftv2` for the block that these are a branch of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive
from torchconv.kernels._custom import without_autocast
from torchconv.kernels.precision import widen
from torchconv.ops._common import check_input

NORMS = ("backward", "forward", "ortho")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "leaky_relu": F.leaky_relu,
    "identity": lambda x: x,
}


def _spatial(x: Tensor) -> list[int]:
    return list(range(2, x.dim()))


def hidden_width(channels: int, expansion: float) -> int:
    """⌊channels · expansion⌋; a quotient h / channels gives h, which the product misses by an ulp for some."""
    return math.floor(channels * expansion + 1e-6)


def _check_matrices(x: Tensor, w1: Tensor, w2: Tensor, axis: int, width: int) -> None:
    """``width`` numbers of a frequency enter ``w1`` on ``axis``, and ``w2`` leads back."""
    if x.dim() < 3 or not x.is_floating_point():
        raise ValueError(f"x of shape {tuple(x.shape)}, {x.dtype}: expected real (N, C, *spatial)")
    if w1.dim() != 2 or w1.shape[axis] != width or w2.shape != w1.shape[::-1]:
        expected = f"{width} on axis {axis} of w1 for {x.shape[1]} channels, and for w2 the shape of its transpose"
        raise ValueError(f"w1, w2 of shapes {tuple(w1.shape)}, {tuple(w2.shape)}: expected {expected}")


def spectral_mlp(x: Tensor, w1: Tensor, w2: Tensor, norm: str = "backward", activation: str = "relu") -> Tensor:
    """Two real matrices on the real and imaginary parts of the spectrum: F⁻¹( w2 · act(w1 · [Re F x; Im F x]) ).

    Args:
        x: the map; half precision is computed in float32.
        w1, w2: (hidden, 2C) and (2C, hidden).
        norm: of the transforms, as in ``torch.fft``.
        activation: "relu", "gelu", "silu", "leaky_relu" or "identity".

    Shape:
        (N, C, \\*spatial) → the same.

    Example:
        >>> x = torch.arange(6.0).reshape(1, 1, 6)
        >>> spectral_mlp(x, torch.eye(2), torch.eye(2), activation="identity").round().flatten().tolist()
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]

    Reference: arXiv 2111.11745, version 1, section 3.
    """
    check_choice("activation", activation, ACTIVATIONS)
    check_choice("norm", norm, NORMS)
    _check_matrices(x, w1, w2, 1, 2 * x.shape[1])
    if x.numel() == 0:  # which transforms refuse
        return x * 1
    axes, size = _spatial(x), list(x.shape[2:])
    with without_autocast(x.device.type):
        spectrum = torch.fft.rfftn(widen(x), dim=axes, norm=norm)
        parts = torch.cat([spectrum.real, spectrum.imag], 1)
        hidden = ACTIVATIONS[activation](torch.einsum("oc,nc...->no...", widen(w1), parts))
        real, imag = torch.einsum("oc,nc...->no...", widen(w2), hidden).chunk(2, 1)
        y = torch.fft.irfftn(torch.complex(real.contiguous(), imag.contiguous()), s=size, dim=axes, norm=norm)
    return y.to(x.dtype)


def complex_spectral_mlp(
    x: Tensor,
    w1: tuple[Tensor, Tensor],
    w2: tuple[Tensor, Tensor],
    b1: tuple[Tensor, Tensor] | None = None,
    b2: tuple[Tensor, Tensor] | None = None,
    window_size: int | None = None,
    norm: str = "backward",
    activation: str = "relu",
) -> Tensor:
    """Two complex matrices on the spectrum: F⁻¹( act(F x · w1 + b1) · w2 + b2 ), act on both parts by themselves.

    Args:
        x: the map; half precision is computed in float32.
        w1, w2: real and imaginary part of (C, hidden) and (hidden, C), applied from the right.
        b1, b2: real and imaginary parts that broadcast to (…, hidden) and (…, C), or None.
        window_size: side of windows that are transformed by themselves; where it does not divide the size, a last
            window lies at the end, of which only what the others leave is used. None transforms the whole map.
        norm, activation: see :func:`spectral_mlp`.

    Shape:
        (N, C, \\*spatial) → the same.

    Raises:
        ValueError: a window is larger than the map.

    Reference: arXiv 2111.11745, version 2, section 3.
    """
    check_choice("activation", activation, ACTIVATIONS)
    check_choice("norm", norm, NORMS)
    for first, second in zip(w1, w2, strict=True):
        _check_matrices(x, first, second, 0, x.shape[1])
    if window_size is not None:
        check_positive("window_size", window_size)
    act = ACTIVATIONS[activation]
    if x.numel() == 0:  # which transforms refuse
        return x * 1
    if window_size is not None and list(x.shape[2:]) != [window_size] * (x.dim() - 2):
        windows, put_back = _windows(x, window_size)
        return put_back(complex_spectral_mlp(windows, w1, w2, b1, b2, None, norm, activation))
    axes, size = _spatial(x), list(x.shape[2:])
    with without_autocast(x.device.type):
        spectrum = torch.fft.rfftn(widen(x), dim=axes, norm=norm)
        real, imag = spectrum.real.movedim(1, -1), spectrum.imag.movedim(1, -1)
        real, imag = _complex_linear(real, imag, w1, b1)
        real, imag = _complex_linear(act(real), act(imag), w2, b2)
        back = torch.complex(real, imag).movedim(-1, 1)
        y = torch.fft.irfftn(back, s=size, dim=axes, norm=norm)
    return y.to(x.dtype)


def _complex_linear(
    real: Tensor, imag: Tensor, weight: tuple[Tensor, Tensor], bias: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    a, b = (widen(t) for t in weight)
    out_real, out_imag = real @ a - imag @ b, real @ b + imag @ a
    if bias is not None:
        out_real, out_imag = out_real + widen(bias[0]).flatten(), out_imag + widen(bias[1]).flatten()
    return out_real, out_imag


def _windows(x: Tensor, window: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Windows as items of a batch, and the function that puts results back."""
    check(min(x.shape[2:]) >= window, "window_size", window, f"is larger than the map {tuple(x.shape[2:])}")
    ndim, counts, kept = x.dim() - 2, [], []
    for axis, length in enumerate(x.shape[2:], start=2):
        whole = length // window * window
        reads, keeps = list(range(whole)), list(range(whole))
        if whole < length:
            reads += range(length - window, length)
            keeps += range(2 * whole + window - length, whole + window)
        x = x.index_select(axis, torch.tensor(reads, device=x.device))
        counts.append(len(reads) // window)
        kept.append(torch.tensor(keeps, device=x.device))
    for axis, count in enumerate(counts):  # (N, C, count, window, count, window, …)
        x = x.unflatten(2 + 2 * axis, (count, window))
    order = [0, *range(2, 2 + 2 * ndim, 2), 1, *range(3, 3 + 2 * ndim, 2)]
    batch = x.shape[0]
    flat = x.permute(order).flatten(0, ndim)

    def put_back(y: Tensor) -> Tensor:
        y = y.unflatten(0, (batch, *counts))
        back = [0, ndim + 1]
        for axis in range(ndim):
            back += [1 + axis, ndim + 2 + axis]
        y = y.permute(back)
        for axis in range(ndim):
            y = y.flatten(2 + axis, 3 + axis)
        for axis, keeps in enumerate(kept, start=2):
            y = y.index_select(axis, keeps)
        return y

    return flat, put_back


class RealSpectral(nn.ModuleList):
    """The first form's branch: two 1 × 1 convolutions on real and imaginary parts (names of the checkpoints)."""

    def __init__(self, layers: Sequence[nn.Module], norm: str, activation: str) -> None:
        super().__init__(layers)
        self.norm, self.activation = norm, activation

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``x``."""
        first, second = (_weight(layer[0]).flatten(1) for layer in (self[0].main, self[1].main))  # type: ignore[index]
        return spectral_mlp(x, first, second, self.norm, self.activation)


class ComplexSpectral(nn.Module):
    """The second form's branch: two complex matrices on the spectrum.

    Args:
        channels: C ≥ 1.
        expansion: hidden width over C.
        window_size: see :func:`complex_spectral_mlp`.
        bias: complex offsets after both matrices.
        norm, activation: see :func:`spectral_mlp`.
        ndim: spatial axes.
    """

    def __init__(
        self,
        channels: int,
        expansion: float = 1,
        window_size: int | None = None,
        bias: bool = False,
        norm: str = "backward",
        activation: str = "relu",
        *,
        ndim: int = 2,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_positive("channels", channels)
        hidden = hidden_width(channels, expansion)
        check(hidden >= 1, "expansion", expansion, "leaves no hidden channel")
        if window_size is not None:
            check_positive("window_size", window_size)
        check_choice("norm", norm, NORMS)
        check_choice("activation", activation, ACTIVATIONS)
        self.channels, self.ndim = channels, ndim
        self.window_size, self.norm, self.activation = window_size, norm, activation
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        for i, shape in ((1, (channels, hidden)), (2, (hidden, channels))):
            for kind in ("real", "imag"):
                self.register_parameter(f"complex_weight{i}_{kind}", nn.Parameter(torch.empty(shape, **options)))
                offset = nn.Parameter(torch.empty(*[1] * (ndim + 1), shape[1], **options)) if bias else None
                self.register_parameter(f"b{i}_{kind}", offset)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming's uniform numbers in all four matrices, zero offsets."""
        for name, parameter in self.named_parameters():
            if name.startswith("b"):
                nn.init.zeros_(parameter)
            else:
                nn.init.kaiming_uniform_(parameter, a=16)

    def _pair(self, name: str) -> Any:
        pair = tuple(getattr(self, f"{name}_{kind}") for kind in ("real", "imag"))
        return None if pair[0] is None else pair

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``x`` (N, C, \\*spatial)."""
        check_input(x, self.channels, self.ndim)
        weights = (self._pair("complex_weight1"), self._pair("complex_weight2"))
        offsets = (self._pair("b1"), self._pair("b2"))
        return complex_spectral_mlp(x, *weights, *offsets, self.window_size, self.norm, self.activation)


def _weight(conv: Any) -> Tensor:
    weight: Tensor = conv.folded_weight() if hasattr(conv, "folded_weight") else conv.weight
    return weight
