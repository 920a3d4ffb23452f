"""Deep kernel machines: the Gram matrix of every layer is learned, tied to the kernel of the layer before.

Yang, Robeyns, Milsom, Anson, Schoots, Aitchison, "A theory of representation learning gives a deep generalisation of
kernel methods", 2021, arXiv 2108.13097. With G₀ = X Xᵀ/ν₀ positive-definite G₁ … G_L maximise

    log P(Y | G_L) − Σ_l ν_l KL(N(0, G_l) ‖ N(0, K(G_{l−1}))),   KL = ½ (tr K⁻¹G − log det K⁻¹G − P)

ν → ∞ leaves G_l = K(G_{l−1}), the kernel of an infinitely wide network; a small ν lets the labels shape the
representation. All P points at once cost O(L P³). With inducing points (:mod:`torchconv.ops.dkm`, convolutional ones
in :mod:`torchconv.ops.dkm_conv`, arXiv 2309.09814) a layer carries three blocks, a :class:`GramStructure`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchconv._common import check, check_choice
from torchconv.catalog import part

KERNELS = ("linear", "sqexp", "relu")


@dataclass(frozen=True)
class GramStructure:
    """What a layer knows of its kernel.

    Attributes:
        ii: (P, P), between inducing points.
        ti: (N, …, P), between data (with their pixels) and inducing points.
        t: (N, …), of every datum (pixel) with itself.
        terms: the sum of the layers' terms of the objective so far.
    """

    ii: Tensor
    ti: Tensor
    t: Tensor
    terms: Tensor

    def but(self, **changes: Tensor) -> GramStructure:
        """A copy with other blocks."""
        return replace(self, **changes)


def exact(matrix: Tensor) -> Tensor:
    """In float64, where the device has it: P × P matrices are few, and their factors need the digits."""
    return matrix.float() if matrix.device.type == "mps" else matrix.double()


def cholesky(matrix: Tensor, what: str = "the Gram matrix") -> Tensor:
    """The lower factor, in float64.

    Raises:
        ValueError: the matrix is not positive definite.
    """
    factor, info = torch.linalg.cholesky_ex(exact(matrix))
    if int(info.max()):
        remedy = "use fewer inducing points than the layer before has (times the taps), or more jitter"
        raise ValueError(f"{what} of size {matrix.shape[-1]} is not positive definite: {remedy}")
    return factor


def projected(factor: Tensor, ti: Tensor) -> Tensor:
    """K_ti K_ii⁻¹ from the Cholesky factor of K_ii, in the type of K_ti."""
    return ti @ torch.cholesky_inverse(factor).to(ti.dtype)


def divergence(g_root: Tensor, k_factor: Tensor) -> Tensor:
    """KL of N(0, R Rᵀ) from N(0, L Lᵀ), twice: tr K⁻¹G − log det K⁻¹G − P, for a square R and a Cholesky factor L."""
    white = torch.linalg.solve_triangular(k_factor, g_root.to(k_factor.dtype), upper=False)
    return white.square().sum() - 2 * torch.linalg.slogdet(white)[1] - len(white)


def gaussian_kl(g: Tensor, k: Tensor) -> Tensor:
    """KL(N(0, G) ‖ N(0, K)) of two covariances.

    Example:
        >>> float(gaussian_kl(torch.eye(3), torch.eye(3)))
        0.0
    """
    return (divergence(cholesky(g), cholesky(k)) / 2).to(g.dtype)


def arc_cosine(dot: Tensor, product: Tensor) -> Tensor:
    """The kernel of a ReLU with He's scale from inner products and the products of the two squared norms."""
    root = product.sqrt()
    angle = torch.acos((dot / root).clamp(-1, 1))
    return ((product - dot * dot).clamp(min=0).sqrt() + (math.pi - angle) * dot) / math.pi


def apply_kernel(gram: Tensor, kernel: str = "relu") -> Tensor:
    """K(G) of a whole Gram matrix.

    Args:
        gram: (P, P), positive definite.
        kernel: "linear": G itself; "sqexp": exp(−½ (G_ii + G_jj − 2 G_ij)); "relu": arc-cosine, which keeps the
            diagonal.

    Example:
        >>> apply_kernel(torch.tensor([[1.0, 0.0], [0.0, 4.0]]), "relu")
        tensor([[1.0000, 0.6366],
                [0.6366, 4.0000]])
    """
    check_choice("kernel", kernel, KERNELS)
    check(gram.dim() == 2 and gram.shape[0] == gram.shape[1], "gram", tuple(gram.shape), "give a square matrix")
    if kernel == "linear":
        return gram
    norms = gram.diagonal()
    if kernel == "sqexp":
        return (gram - (norms[:, None] + norms) / 2).exp()
    same = torch.eye(len(gram), dtype=torch.bool, device=gram.device)
    product = norms[:, None] * norms
    # At an angle of zero the slope of the arc cosine is infinite: the diagonal is known.
    off = arc_cosine(torch.where(same, 0.0, gram), torch.where(same, 1.0, product))
    return torch.where(same, gram, off)


def log_likelihood(y: Tensor, covariance: Tensor) -> Tensor:
    """Σ_j log N(y_j; 0, covariance) over the columns of y."""
    factor = cholesky(covariance, "the covariance")
    white = torch.linalg.solve_triangular(factor, y.to(factor.dtype), upper=False)
    constant = len(y) * math.log(2 * math.pi) / 2 + factor.diagonal().log().sum()
    return (-white.square().sum() / 2 - y.shape[1] * constant).to(y.dtype)


@dataclass(frozen=True)
class Objective:
    """The objective of a full deep kernel machine, the log likelihood, and the KL of every layer (without ν)."""

    value: Tensor
    log_likelihood: Tensor
    kl: Tensor


def full_objective(
    x: Tensor,
    y: Tensor,
    factors: Sequence[Tensor],
    nu: Sequence[float],
    *,
    kernel: str = "relu",
    noise_var: float = 0.1,
    jitter: float = 1e-6,
) -> Objective:
    """What a deep kernel machine on all points maximises, for regression with Gaussian noise.

    Args:
        x: (P, D) inputs; G₀ = x xᵀ/D.
        y: (P, outputs).
        factors: of G₁ … G_L, (P, P) each; their lower triangles are used.
        nu: ν₁ … ν_L.
        kernel: see :func:`apply_kernel`.
        noise_var: σ² of the labels.
        jitter: added to the diagonal of every K(G).
    """
    check(x.dim() == 2 and y.dim() == 2 and len(x) == len(y), "y", tuple(y.shape), f"give ({len(x)}, outputs)")
    check(len(factors) == len(nu) > 0, "nu", list(nu), f"give one for each of the {len(factors)} factors, at least one")
    gram, eye = x @ x.T / x.shape[1], torch.eye(len(x), dtype=x.dtype, device=x.device)
    terms = []
    for factor in factors:
        root = factor.tril()
        terms.append(divergence(root, cholesky(apply_kernel(gram, kernel) + jitter * eye)) / 2)
        gram = root @ root.T
    kl = torch.stack(terms).to(x.dtype)
    likelihood = log_likelihood(y, apply_kernel(gram, kernel) + (jitter + noise_var) * eye)
    return Objective(likelihood - (kl * torch.as_tensor(nu).to(kl)).sum(), likelihood, kl)


def symmetric_root(matrix: Tensor, power: float = 0.5) -> Tensor:
    """A power of a positive-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    check(float(values[0]) > 0, "matrix", float(values[0]), "its least eigenvalue: must be positive definite")
    return (vectors * values**power) @ vectors.T


def deep_linear_optimum(g0: Tensor, gy: Tensor, layers: int) -> list[Tensor]:
    """The optimal G₁ … G_L of a linear machine with equal ν and noise-free outputs, G_{L+1} = Y Yᵀ/ν.

    Equal steps on the geodesic: G_l = G₀^½ (G₀^−½ G_{L+1} G₀^−½)^{l/(L+1)} G₀^½.

    Example:
        >>> deep_linear_optimum(torch.eye(2), 16 * torch.eye(2), 1)[0]
        tensor([[4., 0.],
                [0., 4.]])
    """
    check(layers >= 1, "layers", layers, "must be at least 1")
    check(g0.shape == gy.shape, "gy", tuple(gy.shape), f"must be {tuple(g0.shape)}, as g0")
    root, inverse = symmetric_root(g0), symmetric_root(g0, -0.5)
    inner = inverse @ gy @ inverse
    inner = (inner + inner.T) / 2
    return [root @ symmetric_root(inner, i / (layers + 1)) @ root for i in range(1, layers + 1)]


@part(
    "full-dkm",
    paper="dkm",
    kind="theory",
    keywords="deep kernel machine representation learning Gram matrix Bayesian Gaussian process NNGP",
)
class FullDKM:
    """A deep kernel machine for regression on all of a small data set.

    Args:
        nu: ν of every layer: how many features its Gram matrix stands for; large is stiff.
        kernel: "relu", "sqexp" or "linear".
        noise_var: σ² of the labels.
        jitter: added to the diagonal of every kernel.

    Attributes:
        factors: Cholesky factors of the Gram matrices, after :meth:`fit`.

    Example:
        >>> x = torch.randn(20, 3, dtype=torch.float64)
        >>> machine = FullDKM([5.0], noise_var=0.1).fit(x, x[:, :1].sign(), steps=5)
        >>> machine.history[-1] >= machine.history[0]
        True
    """

    def __init__(
        self, nu: Sequence[float], *, kernel: str = "relu", noise_var: float = 0.1, jitter: float = 1e-6
    ) -> None:
        check(len(nu) > 0 and min(nu) > 0, "nu", list(nu), "give a positive number for each layer")
        check_choice("kernel", kernel, KERNELS)
        check(noise_var > 0, "noise_var", noise_var, "must be > 0")
        check(jitter >= 0, "jitter", jitter, "must be >= 0")
        self.nu, self.kernel, self.noise_var, self.jitter = list(nu), kernel, noise_var, jitter
        self.factors: list[Tensor] = []
        self.history: list[float] = []

    def start(self, x: Tensor) -> list[Tensor]:
        """Factors at which every KL is zero: G_l = K(G_{l−1}), as for ν → ∞."""
        gram = x @ x.T / x.shape[1]
        eye = torch.eye(len(x), dtype=x.dtype, device=x.device)
        factors = []
        for _ in self.nu:
            gram = apply_kernel(gram, self.kernel) + self.jitter * eye
            factors.append(cholesky(gram).to(x.dtype))
        return factors

    def objective(self, x: Tensor, y: Tensor, factors: Sequence[Tensor]) -> Objective:
        """:func:`full_objective` with the machine's options."""
        options = {"noise_var": self.noise_var, "jitter": self.jitter}
        return full_objective(x, y, factors, self.nu, kernel=self.kernel, **options)

    def fit(
        self, x: Tensor, y: Tensor, *, steps: int = 50, on_step: Callable[[int, float], None] | None = None
    ) -> FullDKM:
        """Maximise the objective by L-BFGS on the Cholesky factors, from the machine of infinite ν.

        Args:
            x: (P, D), floating point; float64 is advised.
            y: (P, outputs).
            steps: of L-BFGS, 20 evaluations each; stops early where the objective no longer rises.
            on_step: called with the step (from 1) and the objective.
        """
        check(x.is_floating_point() and x.dim() == 2, "x", tuple(x.shape), "give floating-point (P, D)")
        y = y.to(x)
        raw = [self._free(f).requires_grad_() for f in self.start(x)]
        optimizer = torch.optim.LBFGS(raw, max_iter=20, history_size=20, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value: Tensor = -self.objective(x, y, [self._bound(r) for r in raw]).value
            value.backward()
            return value

        self.history = []
        for step in range(1, steps + 1):
            self.history.append(-float(optimizer.step(loss).detach()))
            if on_step is not None:
                on_step(step, self.history[-1])
            if step > 1 and self.history[-1] - self.history[-2] <= 1e-10 * abs(self.history[-1]):
                break
        self.factors = [self._bound(r).detach() for r in raw]
        return self

    @staticmethod
    def _free(factor: Tensor) -> Tensor:
        return factor.tril(-1) + factor.diagonal().log().diag()

    @staticmethod
    def _bound(raw: Tensor) -> Tensor:
        return raw.tril(-1) + raw.diagonal().exp().diag()
