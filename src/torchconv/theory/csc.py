"""Convolutional sparse coding: an image as a sum of convolutions of few kernels with maps that are mostly zero.

Ladret, Casanova, Perrinet, "Kernel Heterogeneity Improves Sparseness of Natural Images Representations", 2023, arXiv
2312.14685, whose codes are those of SPORCO's ADMM (Wohlberg 2016, IEEE TIP 25(1); its defaults and its stopping rule
are kept here):

    min over x of ½ ‖Σ_m d_m ∗ x_m − s‖² + λ Σ_m ‖w_m ⊙ x_m‖₁          (convolutions are circular)
    x-step   X̂ = (b − conj(D̂) ⟨D̂/(Σ|D̂|² + ρ), b⟩)/ρ,   b = conj(D̂) ŝ + ρ F(y − u)     (exact, per frequency)
    y-step   y = shrink(α x + (1 − α) y + u, λ w/ρ)
    u-step   u ← u + α x + (1 − α) y_before − y

An iteration costs two real FFTs of every map and some passes over them. Log-Gabor dictionaries are in
:mod:`torchconv.theory.csc_gabor`, the preparation of images and the scores in :mod:`torchconv.theory.csc_images`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchconv._common import check, check_positive
from torchconv.catalog import part


@dataclass(frozen=True)
class AutoRho:
    """How ρ follows the two residuals r (primal) and s (dual).

    Attributes:
        period: iterations from one adjustment to the next.
        auto_scaling: multiply by √(r/(ξ s)), at most ``scaling``; without it by ``scaling``.
        scaling: the cap, or the factor itself.
        ratio: μ ≥ 1, how far apart they may be.
        target: ξ = r/s to aim at; None takes 1 + 18.3^(log₁₀ λ + 1).
    """

    period: int = 1
    auto_scaling: bool = True
    scaling: float = 1000.0
    ratio: float = 1.2
    target: float | None = None


@dataclass(frozen=True)
class Trace:
    """One number an iteration: the objective and its parts, the normalised residuals, and ρ as it was used."""

    objective: list[float] = field(default_factory=list)
    data_fidelity: list[float] = field(default_factory=list)
    l1: list[float] = field(default_factory=list)
    primal_residual: list[float] = field(default_factory=list)
    dual_residual: list[float] = field(default_factory=list)
    rho: list[float] = field(default_factory=list)

    def note(self, data_fidelity: float, l1: float, lmbda: float) -> None:
        """Append the objective and its parts."""
        self.data_fidelity.append(data_fidelity)
        self.l1.append(l1)
        self.objective.append(data_fidelity + lmbda * l1)


@dataclass(frozen=True)
class Codes:
    """The result of :func:`cbpdn`.

    Attributes:
        maps: (M, H, W) or (K, M, H, W), with exact zeros.
        lmbda: λ, also where it was chosen.
        converged: whether the residuals fell below the tolerance.
        trace: of the iterations.
    """

    maps: Tensor
    lmbda: float
    converged: bool
    trace: Trace

    @property
    def iterations(self) -> int:
        """How many were made."""
        return len(self.trace.rho)

    @property
    def sparseness(self) -> float:
        """The share of zeros."""
        return 1 - float(torch.count_nonzero(self.maps)) / self.maps.numel()


def _checked(dictionary: Tensor, signal: Tensor) -> None:
    shape = tuple(dictionary.shape)
    check(dictionary.dim() == 3 and 0 not in shape, "dictionary", shape, "give kernels (M, h, w)")
    check(signal.dim() in (2, 3) and 0 not in signal.shape, "signal", tuple(signal.shape), "give (H, W) or (K, H, W)")
    fits = all(a <= b for a, b in zip(shape[1:], signal.shape[-2:], strict=True))
    check(fits, "dictionary", shape, f"larger than the image of {tuple(signal.shape[-2:])}: cut it")
    if dictionary.dtype != signal.dtype or not signal.is_floating_point():
        raise ValueError(f"dictionary of {dictionary.dtype}, signal of {signal.dtype}: give both in one float type")
    if dictionary.device != signal.device:
        raise ValueError(f"dictionary on {dictionary.device}, signal on {signal.device}: put both on one device")


def reconstruct(dictionary: Tensor, maps: Tensor) -> Tensor:
    """Σ_m d_m ∗ x_m, circular, with the kernels' first taps at the position itself.

    Shape:
        dictionary (M, h, w), maps (M, H, W) or (K, M, H, W) → (H, W) or (K, H, W).

    Example:
        >>> reconstruct(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[0.0, 1.0, 0.0]]]))
        tensor([[0., 1., 2.]])
    """
    size = tuple(maps.shape[-2:])
    fits = maps.dim() in (3, 4) and maps.shape[-3] == len(dictionary)
    check(fits, "maps", tuple(maps.shape), f"give (M, H, W) or (K, M, H, W) with M = {len(dictionary)}")
    spectra = torch.fft.rfft2(dictionary, s=size) * torch.fft.rfft2(maps)
    found: Tensor = torch.fft.irfft2(spectra.sum(-3), s=size)
    return found


def kkt_residual(dictionary: Tensor, signal: Tensor, codes: Codes, l1_weight: Tensor | float = 1.0) -> float:
    """How far codes are from the minimum: the largest violation of its conditions, divided by λ.

    At the minimum the gradient g = Dᵀ(s − D x) equals λ w sign(x) where x is not zero and is at most λ w elsewhere.
    It is a check that no stopping rule replaces. Signs are free, so codes of ``non_negative`` do not qualify.
    """
    size = tuple(signal.shape[-2:])
    missing = torch.fft.rfft2(signal - reconstruct(dictionary, codes.maps)).unsqueeze(-3)
    gradient = torch.fft.irfft2(torch.fft.rfft2(dictionary, s=size).conj() * missing, s=size)
    bound = codes.lmbda * torch.as_tensor(l1_weight).to(gradient)
    on = (gradient - bound * codes.maps.sign()).abs()
    off = (gradient.abs() - bound).clamp(min=0)
    return float(torch.where(codes.maps != 0, on, off).max()) / codes.lmbda


@part(
    "cbpdn",
    paper="csc",
    kind="theory",
    keywords="convolutional sparse coding basis pursuit ADMM dictionary log-Gabor sparse representation SPORCO",
)
@torch.no_grad()
def cbpdn(
    dictionary: Tensor,
    signal: Tensor,
    lmbda: float | None = None,
    *,
    l1_weight: Tensor | float = 1.0,
    non_negative: bool = False,
    max_iter: int = 1000,
    tol: float = 1e-3,
    relax: float = 1.8,
    rho: float | None = None,
    auto_rho: AutoRho | None = AutoRho(),
    objective_at_codes: bool = False,
    on_iteration: Callable[[int, Trace], Any] | None = None,
) -> Codes:
    """Convolutional basis pursuit denoising: sparse maps of images for a dictionary of kernels.

    Args:
        dictionary: (M, h, w), no larger than the image. Kernels of equal norm compete fairly.
        signal: (H, W), or (K, H, W): independent images that share ρ and the stopping rule. Take the mean or the low
            frequencies off before (:mod:`torchconv.theory.csc_images`): no sparse code is good at them.
        lmbda: λ; None takes a tenth of the largest |conj(D̂) ŝ|.
        l1_weight: w, a number or a tensor that broadcasts against the maps.
        non_negative: only maps ≥ 0.
        max_iter, tol: stop after so many iterations, or when both normalised residuals are below.
        relax: α in [1, 2).
        rho: ρ to start from; None takes 50 λ + 1.
        auto_rho: how ρ is adapted; None keeps it, which on hard problems is the one that reaches tight tolerances.
        objective_at_codes: trace the objective at the codes themselves, one more FFT an iteration, instead of at x.
        on_iteration: called with the iteration (from 1) and the trace so far; returning True stops.

    Raises:
        ValueError: shapes, types or devices that do not fit, options out of range.

    Example:
        >>> d = torch.randn(6, 5, 5, dtype=torch.float64)
        >>> s = torch.randn(16, 16, dtype=torch.float64)
        >>> found = cbpdn(d / d.flatten(1).norm(dim=1)[:, None, None], s, 0.5)
        >>> tuple(found.maps.shape), found.converged, found.sparseness > 0.5
        ((6, 16, 16), True, True)

    Reference: arXiv 2312.14685, Section 2; the algorithm is Wohlberg 2016, Section III.
    """
    _checked(dictionary, signal)
    check(lmbda is None or lmbda >= 0, "lmbda", lmbda, "must be >= 0")
    check_positive("max_iter", max_iter)
    weights = torch.as_tensor(l1_weight)
    check(bool((weights >= 0).all()), "l1_weight", float(weights.min()), "must be >= 0")
    check(0 < relax < 2, "relax", relax, "must lie between 0 and 2")
    check(rho is None or rho > 0, "rho", rho, "must be > 0")
    check(tol >= 0, "tol", tol, "must be >= 0")
    size = (signal.shape[-2], signal.shape[-1])
    images = signal.unsqueeze(-3)  # (…, 1, H, W)
    d = torch.fft.rfft2(dictionary, s=size)
    mirrored, energy = d.conj().resolve_conj(), d.abs().square().sum(0)
    target = mirrored * torch.fft.rfft2(images)
    if lmbda is None:
        lmbda = 0.1 * float(target.abs().max())
    weight = l1_weight.to(signal) if isinstance(l1_weight, Tensor) else float(l1_weight)
    rho = 50 * lmbda + 1 if rho is None else float(rho)
    if auto_rho is not None and auto_rho.target is None:
        auto_rho = replace(auto_rho, target=1 + 18.3 ** (math.log10(lmbda) + 1) if lmbda > 0 else 1.0)

    y = torch.zeros(*images.shape[:-3], len(dictionary), *size, dtype=signal.dtype, device=signal.device)
    u, spare, trace, converged = torch.zeros_like(y), torch.empty_like(y), Trace(), False
    for iteration in range(1, max_iter + 1):
        b = torch.fft.rfft2(torch.sub(y, u, out=spare)).add_(target, alpha=1 / rho)  # divided by ρ
        inside = (d * b).sum(-3, keepdim=True).div_(energy + rho)
        x = torch.fft.irfft2(b.addcmul_(mirrored, inside, value=-1), s=size)
        x_norm, x_l1 = float(x.norm()), _l1(x, weight)
        u.add_(x, alpha=relax).add_(y, alpha=1 - relax)
        spare = _shrunk(u, lmbda / rho, weight, non_negative)
        y, spare = spare, y
        u.sub_(y)
        spare.sub_(y)

        largest, u_norm = max(x_norm, float(y.norm())), float(u.norm())
        primal = float(x.sub_(y).norm()) / largest if largest else 1.0
        dual = float(spare.norm()) / u_norm if u_norm else 1.0
        spectrum = (d * torch.fft.rfft2(y)).sum(-3, keepdim=True) if objective_at_codes else inside.mul_(rho)
        missing = torch.fft.irfft2(spectrum, s=size) - images
        trace.note(float(missing.square().sum()) / 2, _l1(y, weight) if objective_at_codes else x_l1, lmbda)
        trace.primal_residual.append(primal)
        trace.dual_residual.append(dual)
        trace.rho.append(rho)
        if auto_rho is not None and iteration > 1 and iteration % auto_rho.period == 0:
            factor = _adapted(auto_rho, primal, dual)
            rho = rho * factor
            u.div_(factor)
        if primal < tol and dual < tol:
            converged = True
            break
        if on_iteration is not None and on_iteration(iteration, trace) is True:
            break
    return Codes(y, lmbda, converged, trace)


def _shrunk(t: Tensor, threshold: float, weight: Tensor | float, non_negative: bool) -> Tensor:
    """Soft thresholding."""
    if non_negative:
        return (t - threshold * weight).clamp_(min=0)
    if isinstance(weight, float):
        return F.softshrink(t, threshold * weight)
    bound = threshold * weight
    return t - torch.minimum(torch.maximum(t, -bound), bound)


def _l1(t: Tensor, weight: Tensor | float) -> float:
    if isinstance(weight, float):
        return weight * float(torch.linalg.vector_norm(t, 1))
    return float((weight * t).abs().sum())


def _adapted(auto: AutoRho, primal: float, dual: float) -> float:
    """The factor of ρ."""
    assert auto.target is not None
    aim, factor = dual * auto.target, auto.scaling
    if auto.auto_scaling and primal and dual:
        factor = min(factor, math.sqrt(max(primal / aim, aim / primal)))
    if primal > auto.target * auto.ratio * dual:
        return factor
    return 1 / factor if dual > auto.ratio / auto.target * primal else 1.0


def constrained(dictionary: Tensor, *, zero_mean: bool = False) -> Tensor:
    """Kernels divided by their norms, their means taken off before if asked for; zero kernels stay zero.

    Example:
        >>> constrained(torch.tensor([[[3.0, 4.0]], [[0.0, 0.0]]])).tolist()
        [[[0.6000000238418579, 0.800000011920929]], [[0.0, 0.0]]]
    """
    if zero_mean:
        dictionary = dictionary - dictionary.mean((-2, -1), keepdim=True)
    norms = dictionary.flatten(1).norm(dim=1)[:, None, None]
    return dictionary / torch.where(norms > 0, norms, 1.0)


@dataclass(frozen=True)
class Learned:
    """What one step of :class:`OnlineDictionary` did: the codes of its images, the rate η, how far the dictionary
    moved, and how far the gradient step had left the set of kernels of norm 1 and of their size."""

    codes: Codes
    eta: float
    moved: float
    violation: float


@part(
    "online-dictionary",
    paper="csc",
    kind="theory",
    keywords="convolutional dictionary learning online sparse coding kernels unsupervised",
)
class OnlineDictionary:
    """Learn kernels from images that come one after the other: code, one gradient step, back to norm 1.

    Args:
        dictionary: (M, h, w) to start from, for instance of :func:`torchconv.theory.csc_gabor.log_gabor_dictionary`.
        lmbda: λ of the codes; None chooses it for each image.
        eta_a, eta_b: the rate of step j = 0, 1, … is a/(j + b).
        zero_mean: keep kernels without mean.
        options: of :func:`cbpdn`. Unlike there, ρ is by default adapted every tenth iteration by a factor of 2.

    Attributes:
        dictionary: the kernels now.

    Example:
        >>> learner = OnlineDictionary(torch.randn(4, 3, 3), 0.1, max_iter=20)
        >>> for image in torch.randn(3, 12, 12):
        ...     done = learner.step(image)
        >>> learner.steps, bool(learner.dictionary.flatten(1).norm(dim=1).allclose(torch.ones(4)))
        (3, True)

    Reference: Liu et al. 2018, arXiv 1709.00106, Algorithm 1 (without the forgetting factor); arXiv 2312.14685 uses
    η = 100/(j + 1000), ρ = 10 fixed, 300 iterations and a tolerance of 0.01.
    """

    AUTO_RHO = AutoRho(period=10, auto_scaling=False, scaling=2.0, ratio=10.0, target=1.0)

    def __init__(
        self,
        dictionary: Tensor,
        lmbda: float | None = None,
        *,
        eta_a: float = 10.0,
        eta_b: float = 5.0,
        zero_mean: bool = False,
        **options: Any,
    ) -> None:
        check(dictionary.dim() == 3, "dictionary", tuple(dictionary.shape), "give kernels (M, h, w)")
        check(eta_a > 0, "eta_a", eta_a, "must be > 0")
        check(eta_b > 0, "eta_b", eta_b, "must be > 0")
        self.dictionary = constrained(dictionary.detach(), zero_mean=zero_mean)
        self.lmbda, self.eta_a, self.eta_b, self.zero_mean = lmbda, eta_a, eta_b, zero_mean
        self.options = {"auto_rho": self.AUTO_RHO, **options}
        self.steps = 0

    @torch.no_grad()
    def step(self, image: Tensor) -> Learned:
        """Learn from an image (H, W)."""
        check(image.dim() == 2, "image", tuple(image.shape), "give one image (H, W)")
        codes = cbpdn(self.dictionary, image, self.lmbda, **self.options)
        size = (image.shape[0], image.shape[1])
        d, x = torch.fft.rfft2(self.dictionary, s=size), torch.fft.rfft2(codes.maps)
        missing = (d * x).sum(0) - torch.fft.rfft2(image)
        eta = self.eta_a / (self.steps + self.eta_b)
        free = torch.fft.irfft2(d - eta * x.conj() * missing, s=size)
        h, w = self.dictionary.shape[1:]
        new = constrained(free[:, :h, :w], zero_mean=self.zero_mean)
        moved = float((new - self.dictionary).norm())
        free[:, :h, :w] -= new
        self.dictionary, self.steps = new, self.steps + 1
        return Learned(codes, eta, moved, float(free.norm()))
