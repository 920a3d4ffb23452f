"""Random feature maps whose dot products are the kernels of scalable neural network kernels (arXiv 2310.13225).

Two families, both for Gaussian rows g₁ … g_m:

- ReLU features Φ(x)_i = m^{-1/2} max(g_iᵀx, 0)^n: E[Φ(x)·Φ(w)] = ‖x‖ⁿ‖w‖ⁿ J_n(θ) / 2π, half the arc-cosine kernel
  of order n (Cho & Saul 2009).
- Universal random features: with Λ_g(u) = (1+4A)^{d/4} exp(−A‖g‖² + √(1+4A) gᵀu − ‖u‖²/2), E[Λ_g(u)Λ_g(v)] = exp(uᵀv).
  A function f(z) = ∫ τ(ξ) e^{2πiξz} dξ then is f(wᵀx + b) = E[Φ(x)·Ψ(w, b)] with Φ(x)_i = m^{-1/2} Λ_{g_i}(x) and
  Ψ(w, b)_i = m^{-1/2} τ(ξ_i)/p(ξ_i) e^{2πiξ_i b} Λ_{g_i}(2πiξ_i w), ξ_i drawn from p. The frequency stands on the
  side of the parameters, so that the features of the input are real and positive and those of the parameters real
  after pairing ξ with −ξ.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive

FUNCTIONS = ("cos", "sin", "exp", "gaussian")


def gaussian_rows(rows: int, columns: int, orthogonal: bool = False, device: Any = None, dtype: Any = None) -> Tensor:
    """Standard normal rows (rows, columns), independent or orthogonal within blocks of ``columns`` rows.

    Orthogonal rows are directions from the QR factor of a Gaussian matrix, with the norms of fresh Gaussian rows: each
    row alone is distributed as before, and estimates vary less.
    """
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    if not orthogonal:
        return torch.randn(rows, columns, **options)
    # torch has no QR in half precision.
    wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
    blocks = [
        torch.linalg.qr(torch.randn(columns, columns, device=device, dtype=wide))[0].T
        for _ in range(-(-rows // columns))
    ]
    norms = torch.randn(rows, columns, device=device, dtype=wide).norm(dim=1, keepdim=True)
    return (torch.cat(blocks)[:rows] * norms).to(**options)


def relu_features(
    x: Tensor,
    projection: Tensor,
    offset: Tensor | None = None,
    order: int = 1,
    floor: float = 0.0,
    normalize: float | None = None,
) -> Tensor:
    """ReLU features m^{-1/2} max(Gx + offset, floor)^order.

    Args:
        x: vectors on the last axis.
        projection: G (m, d).
        offset: added before the maximum, broadcast to (\\*, m).
        order: 0 is the step function (Gx > 0), 1 the ReLU, 2 its square.
        floor: least value before the power; other than 0 with order 1 only.
        normalize: scale every vector to this length first.

    Shape:
        (\\*, d) → (\\*, m).

    Example:
        >>> relu_features(torch.tensor([3.0, -4.0]), torch.eye(4)[:, :2])
        tensor([1.5000, 0.0000, 0.0000, 0.0000])

    Reference: arXiv 2310.13225, section 3.
    """
    if normalize is not None:
        x = normalize * F.normalize(x, dim=-1)
    projection, offset, floor, rest = share_scale(projection, offset, order, floor, projection.shape[0])
    z = F.linear(x, projection, offset if offset is not None and offset.dim() == 1 else None)
    if offset is not None and offset.dim() > 1:
        z = z + offset
    return rectify(z, order, floor, rest)


def share_scale(
    projection: Tensor, offset: Tensor | None, order: int, floor: float, count: int
) -> tuple[Tensor, Tensor | None, float, float]:
    """count^{-1/2} moved into the few rows where order 1 allows it; and what is left of it for the features."""
    factor = count**-0.5
    if order != 1:
        return projection, offset, floor, factor
    return projection * factor, None if offset is None else offset * factor, floor * factor, 1.0


def rectify(z: Tensor, order: int = 1, floor: float = 0.0, factor: float = 1.0) -> Tensor:
    """factor · max(z, floor)^order; the step function for order 0."""
    if order == 0:
        return (z > 0).to(z.dtype) * factor
    # relu keeps its output for the gradient, which the next product keeps as well; clamp would keep z beside it.
    z = torch.relu(z) if floor == 0 else z.clamp(min=floor)
    return z if order == 1 else z**order * factor


def check_rectifier(order: int, floor: float) -> None:
    """Refuse what :func:`rectify` has no kernel for."""
    check_choice("order", order, (0, 1, 2))
    check(floor == 0 or order == 1, "floor", floor, f"must be 0 for order {order}; only order 1 takes a floor")


def exp_features(
    x: Tensor,
    projection: Tensor,
    scale: float | Tensor = 1.0,
    amplitude: float | Tensor = 1.0,
    variance: float = 0.0,
) -> Tensor:
    """Exponential features m^{-1/2} a_i Λ_{g_i}(s_i x), Λ_g(u) = (1+4A)^{d/4} exp(−A‖g‖² + √(1+4A)·gᵀu − ‖u‖²/2).

    With a = 1 on both sides the dot product of the features of u and v estimates exp(uᵀv). Values grow as
    exp(‖x‖·‖g‖): keep ‖x‖ below about 8.

    Args:
        x: vectors on the last axis.
        projection: G (m, d).
        scale, amplitude: s and a, a number or (m,), real or complex.
        variance: A > −1/4 (M in the authors' code); it trades variance between small and large norms.

    Shape:
        (\\*, d) → (\\*, m).

    Raises:
        ValueError: ``variance`` is too small.

    Reference: arXiv 2310.13225, section 3.1.
    """
    check(variance > -0.25, "variance", variance, "must be above -0.25, where the features have a mean")
    squares = x.square().sum(-1, keepdim=True)
    power = math.sqrt(1 + 4 * variance) * scale * F.linear(x, projection) - scale * scale * squares / 2
    if variance:
        power = power + _norm_power(projection, variance)
    return len(projection) ** -0.5 * amplitude * torch.exp(power)


def _norm_power(projection: Tensor, variance: float) -> Tensor:
    """log of (1+4A)^{d/4} exp(−A‖g‖²); with many inputs either factor alone leaves the range of a float."""
    return projection.shape[1] / 4 * math.log1p(4 * variance) - variance * projection.square().sum(1)


def wave_features(
    weight: Tensor,
    bias: Tensor | None,
    projection: Tensor,
    frequency: float | Tensor = 1.0,
    amplitude: float | Tensor = 1.0,
    phase: float | Tensor = 0.0,
    variance: float = 0.0,
) -> Tensor:
    """The real part of m^{-1/2} a_i e^{i(φ_i + t_i b)} Λ_{g_i}(i t_i w): the parameters' side of universal features.

    = m^{-1/2} (1+4A)^{d/4} a_i exp(t_i²‖w‖²/2 − A‖g_i‖²) cos(√(1+4A) t_i g_iᵀw + t_i b + φ_i), t = 2πξ.

    Args:
        weight: (l, d).
        bias: (l,) or None.
        projection: G (m, d).
        frequency, amplitude, phase: t, and modulus and argument of τ(ξ)/p(ξ); a number or (m,).
        variance: A > −1/4.

    Shape:
        (l, d) → (l, m).
    """
    check(variance > -0.25, "variance", variance, "must be above -0.25, where the features have a mean")
    angle = math.sqrt(1 + 4 * variance) * frequency * F.linear(weight, projection) + phase
    if bias is not None:
        angle = angle + frequency * bias[:, None]
    power = frequency * frequency * weight.square().sum(1, keepdim=True) / 2
    if variance:
        power = power + _norm_power(projection, variance)
    return len(projection) ** -0.5 * amplitude * torch.exp(power) * torch.cos(angle)


def arccos_kernel(x: Tensor, w: Tensor, order: int = 1) -> Tensor:
    """What ReLU features estimate: ‖x‖ⁿ‖w‖ⁿ J_n(θ) / 2π, half the arc-cosine kernel.

    J₀ = π − θ, J₁ = sin θ + (π − θ) cos θ, J₂ = 3 sin θ cos θ + (π − θ)(1 + 2 cos² θ), θ the angle between x and w.

    Args:
        x, w: vectors on the last axis.
        order: n = 0, 1 or 2.

    Shape:
        (\\*, d), (l, d) → (\\*, l).

    Example:
        >>> x = torch.tensor([[3.0, 4.0]])
        >>> arccos_kernel(x, x)
        tensor([[12.5000]])

    Reference: Cho & Saul 2009, "Kernel Methods for Deep Learning".
    """
    check_choice("order", order, (0, 1, 2))
    lengths = x.norm(dim=-1, keepdim=True) * w.norm(dim=-1)
    cosine = (F.linear(x, w) / lengths.clamp(min=torch.finfo(x.dtype).tiny)).clamp(-1, 1)
    sine, rest = (1 - cosine.square()).sqrt(), math.pi - torch.arccos(cosine)
    if order == 0:
        return rest / (2 * math.pi)
    if order == 1:
        return lengths * (sine + rest * cosine) / (2 * math.pi)
    return lengths.square() * (3 * sine * cosine + rest * (1 + 2 * cosine.square())) / (2 * math.pi)


def fit_closed_form(features: Tensor, targets: Tensor, ridge: float = 0.0) -> Tensor:
    """The matrix W (o, m) that minimises Σ_n ‖W φ_n − y_n‖² + ridge·‖W‖².

    = Yᵀφ (φᵀφ + ridge·I)⁻¹; without a ridge the solution of least norm. Computed in double precision.

    Args:
        features: φ (\\*, m).
        targets: Y (\\*, o).
        ridge: λ ≥ 0.

    Raises:
        ValueError: ``ridge`` is negative, a value is not finite, or there is not a target for each vector of features.

    Example:
        >>> fit_closed_form(torch.eye(2), torch.tensor([[1.0], [2.0]]))
        tensor([[1., 2.]])

    Reference: arXiv 2310.13225, the paragraph on fully bundled networks.
    """
    check(ridge >= 0, "ridge", ridge, "must not be negative")
    if targets.dim() < 2 or targets.shape[:-1] != features.shape[:-1]:
        expected = f"({', '.join(map(str, (*features.shape[:-1], 'o')))})"
        raise ValueError(f"targets of shape {tuple(targets.shape)}: expected {expected}, a row for each of features")
    phi, y = features.flatten(0, -2).double(), targets.flatten(0, -2).double()
    for name, t in (("features", phi), ("targets", y)):
        check(bool(t.isfinite().all()), name, tuple(t.shape), "hold values that are not finite")
    if ridge == 0:
        solution = torch.linalg.pinv(phi) @ y
    else:
        gram = phi.T @ phi + ridge * torch.eye(phi.shape[1], dtype=phi.dtype, device=phi.device)
        solution = torch.linalg.solve(gram, phi.T @ y)
    return solution.T.to(features.dtype)


def _check_vectors(x: Tensor, size: int) -> None:
    if x.dim() == 0 or x.shape[-1] != size:
        raise ValueError(f"x of shape {tuple(x.shape)}: expected (*, {size})")


class ReLUFeatures(nn.Module):
    """ReLU features of a vector with fixed Gaussian rows; the same map serves inputs and parameters.

    Args:
        in_features, num_features: d and m.
        bias: append a constant 1 to the input and the bias to the parameters.
        order, floor, normalize: see :func:`relu_features`.
        orthogonal: rows orthogonal in blocks.

    Shape:
        (\\*, d) → (\\*, m).

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> ReLUFeatures(3, 8)(torch.zeros(2, 3)).shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        in_features: int,
        num_features: int,
        bias: bool = False,
        *,
        order: int = 1,
        floor: float = 0.0,
        normalize: float | None = None,
        orthogonal: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_positive("in_features", in_features)
        check_positive("num_features", num_features)
        check_rectifier(order, floor)
        check(normalize is None or normalize > 0, "normalize", normalize, "must be a length above 0, or None")
        self.in_features, self.num_features = in_features, num_features
        self.order, self.floor, self.normalize, self.orthogonal = order, floor, normalize, orthogonal
        rows = gaussian_rows(num_features, in_features + bias, orthogonal, device, dtype)
        self.projection_matrix: Tensor
        self.projection_offset: Tensor | None
        self.register_buffer("projection_matrix", rows[:, :in_features].contiguous())
        self.register_buffer("projection_offset", rows[:, in_features].contiguous() if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """The features Φ of ``x``."""
        _check_vectors(x, self.in_features)
        offset = self.projection_offset
        return relu_features(x, self.projection_matrix, offset, self.order, self.floor, self.normalize)

    def weight_features(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The features Ψ (l, m) of a layer's weight (l, d) and bias (l,)."""
        offset = None
        if self.projection_offset is not None:
            column = weight.new_zeros(len(weight)) if bias is None else bias
            offset = column[:, None] * self.projection_offset
        return relu_features(weight, self.projection_matrix, offset, self.order, self.floor, self.normalize)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return (
            f"{self.in_features}, {self.num_features}, bias={self.projection_offset is not None}, order={self.order}, "
            f"floor={self.floor}, normalize={self.normalize}"
        )


class URFeatures(nn.Module):
    """Universal random features: Φ(x)·Ψ(w, b) estimates f(wᵀx + b) without bias.

    Args:
        in_features, num_features: d and m.
        f: "cos", "sin", "exp", or "gaussian", exp(−z²/2). Another function is given by ``frequency`` and
            ``coefficient``.
        frequency: t_i = 2πξ_i (m,), drawn from a density p.
        coefficient: τ(ξ_i)/p(ξ_i) (m,), complex or real, for a real function with Fourier transform τ.
        variance: A, see :func:`exp_features`.
        orthogonal: rows orthogonal in blocks.

    Shape:
        (\\*, d) → (\\*, m).

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> URFeatures(3, 8, "sin").weight_features(torch.zeros(5, 3)).abs().max() < 1e-6
        tensor(True)
    """

    def __init__(
        self,
        in_features: int,
        num_features: int,
        f: str = "cos",
        *,
        frequency: Tensor | None = None,
        coefficient: Tensor | None = None,
        variance: float = 0.0,
        orthogonal: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_positive("in_features", in_features)
        check_positive("num_features", num_features)
        check_choice("f", f, FUNCTIONS)
        check(variance > -0.25, "variance", variance, "must be above -0.25, where the features have a mean")
        paired = (frequency is None) == (coefficient is None)
        check(paired, "frequency", frequency, "give frequency and coefficient together")
        self.in_features, self.num_features, self.f, self.variance = in_features, num_features, f, variance
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        rows = gaussian_rows(num_features, in_features, orthogonal, **options)
        phase = torch.full((num_features,), -math.pi / 2 if f == "sin" else 0.0, **options)
        amplitude = torch.ones(num_features, **options)
        if frequency is None or coefficient is None:
            frequency = (torch.randn if f == "gaussian" else torch.ones)(num_features, **options)
        else:
            for name, tensor in (("frequency", frequency), ("coefficient", coefficient)):
                check(tensor.shape == (num_features,), name, tuple(tensor.shape), f"expected ({num_features},)")
            self.f = "given"
            amplitude, phase = coefficient.abs().to(rows), coefficient.angle().to(rows)
        for name, tensor in (
            ("projection_matrix", rows),
            ("frequency", frequency.to(rows)),
            ("amplitude", amplitude),
            ("phase", phase),
        ):
            self.register_buffer(name, tensor)

    projection_matrix: Tensor
    frequency: Tensor
    amplitude: Tensor
    phase: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """The features Φ of ``x``, real and positive."""
        _check_vectors(x, self.in_features)
        return exp_features(x, self.projection_matrix, variance=self.variance)

    def weight_features(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The features Ψ (l, m) of a layer's weight (l, d) and bias (l,)."""
        if self.f == "exp":
            scale: Any = 1.0 if bias is None else torch.exp(bias)[:, None]
            return exp_features(weight, self.projection_matrix, 1.0, scale, self.variance)
        waves = (self.frequency, self.amplitude, self.phase)
        return wave_features(weight, bias, self.projection_matrix, *waves, self.variance)

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"{self.in_features}, {self.num_features}, f={self.f!r}, variance={self.variance}"
