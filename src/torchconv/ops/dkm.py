"""Sparse deep kernel machines: layers that map Gram matrices with inducing points, and no features at all.

Milsom, Anson, Aitchison, "Convolutional Deep Kernel Machines", 2023, arXiv 2309.09814, whose library's numbers and
parameter names these are; the theory is arXiv 2108.13097. A layer takes and gives a
:class:`~torchconv.theory.dkm.GramStructure`: K_ii of P learned inducing points, K_ti of data and inducing points, and
the diagonal K_t of the data.

    kernel  K ← K(K), entry by entry
    Gram    G_ii = V Vᵀ/P · e^s,  G_ti = A G_ii,  G_t = K_t + diag(A G_ii Aᵀ − A K_it),  A = K_ti K_ii⁻¹
            and a term −½ ν (tr K_ii⁻¹G_ii − log det K_ii⁻¹G_ii − P) of the objective
    output  f ~ N(B μ, K_t − B K_it + B A Bᵀ),  B = K_ti K_ii⁻¹

One Cholesky factor a layer: O(P³ + N P²) for N data (times their pixels). Types are the caller's; factors are taken in
float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive
from torchconv.catalog import part
from torchconv.theory.dkm import GramStructure, arc_cosine, cholesky, divergence, exact, projected

LIKELIHOODS = ("categorical", "gaussian")


class Inputs(NamedTuple):
    """Inducing points and data, before any Gram matrix."""

    i: Tensor
    t: Tensor


class Input(nn.Module):
    """Learned inducing inputs beside the data.

    Args:
        inducing: (P, D), or patches (P, k, k, C) for images; rows of the training data are a good start.
    """

    def __init__(self, inducing: Tensor) -> None:
        super().__init__()
        check(inducing.dim() in (2, 4), "inducing", tuple(inducing.shape), "give (P, D) or (P, k, k, C)")
        self.X = nn.Parameter(inducing.detach().clone())

    def forward(self, x: Tensor) -> Inputs:
        """Pair (N, D) or (N, C, H, W) with the inducing points."""
        channels, got = self.X.shape[-1], x.shape[1] if x.dim() > 1 else None
        rank = 2 if self.X.dim() == 2 else 4
        remedy = f"give (N, {channels})" if rank == 2 else f"give (N, {channels}, H, W)"
        check(x.dim() == rank and got == channels, "x", tuple(x.shape), remedy)
        return Inputs(self.X, x)


class F2G(nn.Module):
    """Gram matrices of vectors: inner products divided by their length."""

    def forward(self, inputs: Inputs) -> GramStructure:
        """Of (P, D) and (N, D)."""
        (i, t), n = inputs, inputs.t.shape[1]
        return GramStructure(i @ i.T / n, t @ i.T / n, t.square().sum(1) / n, t.new_zeros(()))


class _Kernel(nn.Module):
    """Jitter on the diagonals of what a kernel gives."""

    def __init__(self, mult_eps: float, abs_eps: float) -> None:
        super().__init__()
        for name, value in (("mult_eps", mult_eps), ("abs_eps", abs_eps)):
            check(value >= 0, name, value, "must be >= 0")
        self.mult_eps, self.abs_eps = mult_eps, abs_eps

    def jittered(self, diagonal: Tensor) -> Tensor:
        """d (1 + ε_m) + ε_a."""
        return diagonal * (1 + self.mult_eps) + self.abs_eps

    def finished(self, g: GramStructure, ii: Tensor, ti: Tensor, t: Tensor) -> GramStructure:
        """The structure of a kernel's blocks, jittered."""
        more = ii.diagonal() * self.mult_eps + self.abs_eps
        return g.but(ii=ii + more.diag(), ti=ti, t=self.jittered(t))


@part(
    "relu-kernel",
    paper="dkm",
    kind="theory",
    keywords="arc-cosine kernel deep kernel machine inducing points",
)
class ReluKernel(_Kernel):
    """The arc-cosine kernel with learned variances of weights and biases.

    Args:
        bias_var, weight_var: where their logarithms start.
        mult_eps, abs_eps: jitter of the diagonals, before and after.

    Example:
        >>> g = F2G()(Inputs(torch.eye(3), torch.ones(2, 3)))
        >>> tuple(ReluKernel()(g).ti.shape)
        (2, 3)
    """

    def __init__(
        self, bias_var: float = 0.1, weight_var: float = 1.0, *, mult_eps: float = 1e-4, abs_eps: float = 1e-4
    ) -> None:
        super().__init__(mult_eps, abs_eps)
        for name, value in (("bias_var", bias_var), ("weight_var", weight_var)):
            check(value > 0, name, value, "must be > 0")
        self.log_bias_var = nn.Parameter(torch.tensor(math.log(bias_var)))
        self.log_weight_var = nn.Parameter(torch.tensor(math.log(weight_var)))

    def forward(self, g: GramStructure) -> GramStructure:
        """Apply the kernel to every entry."""
        norms, own = self.jittered(g.ii.diagonal()), self.jittered(g.t)
        same = torch.eye(len(g.ii), dtype=torch.bool, device=g.ii.device)
        ii = arc_cosine(torch.where(same, 0.0, g.ii), norms[:, None] * norms)
        ii = torch.where(same, norms, ii)
        ti = arc_cosine(g.ti, own.unsqueeze(-1) * norms)
        weight, bias = self.log_weight_var.exp(), self.log_bias_var.exp()
        return self.finished(g, ii * weight + bias, ti * weight + bias, g.t * weight + bias)


class SqExpKernel(_Kernel):
    """exp(−½ (G_ii + G_jj − 2 G_ij)), of the Gram matrix as it is.

    Args:
        mult_eps, abs_eps: jitter of the diagonals, after.
    """

    def __init__(self, *, mult_eps: float = 1e-4, abs_eps: float = 1e-4) -> None:
        super().__init__(mult_eps, abs_eps)

    def forward(self, g: GramStructure) -> GramStructure:
        """Apply the kernel to every entry."""
        norms = g.ii.diagonal()
        ii = (g.ii - (norms[:, None] + norms) / 2).exp()
        ti = (g.ti - (g.t.unsqueeze(-1) + norms) / 2).exp()
        return self.finished(g, ii, ti, torch.ones_like(g.t))


PARAMETERS = ("full", "cholesky")
TERMS = ("kl", "taylor")


@part(
    "gram-layer",
    paper="dkm",
    kind="theory",
    keywords="deep kernel machine learned Gram matrix inducing points KL representation",
)
class GramLayer(nn.Module):
    """The learned Gram matrix of the inducing points, and what follows for the data.

    The first forward sets G_ii = K_ii, where the term is zero, unless a state has been loaded: make one before an
    optimiser is built on data whose kernel is meant.

    Args:
        inducing: P.
        dof: ν ≥ 0, the weight of the term; more ties G to the kernel.
        parameters: "full": G = V Vᵀ/P · e^latent_Gscale; "cholesky" (of arXiv 2410.06171): the strictly lower triangle
            of V and its diagonal as logarithms.
        term: "kl", or "taylor" (arXiv 2410.06171): −¼ ν ‖G⁻¹K − I‖², its second order.

    Example:
        >>> layer = GramLayer(3, dof=1.0)
        >>> g = layer(ReluKernel()(F2G()(Inputs(torch.eye(3), torch.ones(2, 3)))))
        >>> tuple(g.ti.shape), round(float(g.terms.detach()), 4) == 0
        ((2, 3), True)
    """

    def __init__(self, inducing: int, dof: float, *, parameters: str = "full", term: str = "kl") -> None:
        super().__init__()
        check_positive("inducing", inducing)
        check(dof >= 0 and math.isfinite(dof), "dof", dof, "must be finite and >= 0 (without the layer it is infinite)")
        check_choice("parameters", parameters, PARAMETERS)
        check_choice("term", term, TERMS)
        self.dof, self.parameters_form, self.term = dof, parameters, term
        self.V = nn.Parameter(torch.eye(inducing) * (1 if parameters == "full" else 0))
        if parameters == "full":
            self.latent_Gscale = nn.Parameter(torch.tensor(0.0))
        self._waits = True

    def _load_from_state_dict(self, state: Any, prefix: str, *arguments: Any) -> None:
        self._waits = self._waits and f"{prefix}V" not in state
        super()._load_from_state_dict(state, prefix, *arguments)

    @torch.no_grad()
    def start_from(self, factor: Tensor) -> None:
        """Set G_ii to the matrix with this Cholesky factor."""
        v = factor * math.sqrt(len(factor))
        if self.parameters_form == "cholesky":
            v = v.tril(-1) + v.diagonal().log().diag()
        else:
            self.latent_Gscale.zero_()
        self.V.copy_(v)
        self._waits = False

    def root(self) -> Tensor:
        """R with G_ii = R Rᵀ."""
        size = math.sqrt(len(self.V))
        if self.parameters_form == "cholesky":
            return (self.V.tril(-1) + self.V.diagonal().exp().diag()) / size
        return self.V * (self.latent_Gscale / 2).exp() / size

    def forward(self, g: GramStructure) -> GramStructure:
        """From the kernel's blocks to the Gram matrix's."""
        check(len(g.ii) == len(self.V), "ii", tuple(g.ii.shape), f"this layer has {len(self.V)} inducing points")
        factor = cholesky(g.ii)
        if self._waits:
            self.start_from(factor)
        root = self.root()
        ii, a = root @ root.T, projected(factor, g.ti)
        ti = a @ ii
        t = (g.t + ((ti - g.ti) * a).sum(-1)).clamp(min=0)
        if self.term == "kl":
            distance = divergence(root, factor)
        else:
            wide = exact(root)
            ratio = torch.linalg.solve(wide.T, torch.linalg.solve(wide, exact(g.ii)))
            distance = (ratio - torch.eye(len(ratio)).to(ratio)).square().sum() / 2
        return GramStructure(ii, ti, t, g.terms - (self.dof / 2 * distance).to(g.terms.dtype))

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"{len(self.V)}, dof={self.dof}, parameters={self.parameters_form!r}, term={self.term!r}"


class SumKernel(nn.Module):
    """A weighted mean of the structures of several branches: the residual connection of kernels.

    Args:
        branches: modules on one structure. An ``nn.Identity`` is the shortcut.
        weights: their weights are softmax(weights), so that (0.5, 0.5) and (1, 1) are both the plain mean.
    """

    def __init__(self, branches: Iterable[nn.Module], weights: Iterable[float] | None = None) -> None:
        super().__init__()
        self.kernels = nn.ModuleList(_Branch(b) for b in branches)
        check(len(self.kernels) > 0, "branches", [], "give at least one")
        given = torch.tensor([1.0] * len(self.kernels) if weights is None else list(weights))
        check(len(given) == len(self.kernels), "weights", given.tolist(), f"give {len(self.kernels)}")
        check(bool((given > 0).all()), "weights", given.tolist(), "must be positive")
        self.weights = _LogWeights(given)

    def forward(self, g: GramStructure) -> GramStructure:
        """Sum what the branches give."""
        found = [branch(g) for branch in self.kernels]
        weights = self.weights.lw.exp().softmax(0).unbind()
        blocks = {
            name: sum(w * getattr(f, name) for w, f in zip(weights, found, strict=True)) for name in ("ii", "ti", "t")
        }
        terms: Any = g.terms + sum(f.terms - g.terms for f in found)
        return GramStructure(**blocks, terms=terms)


class _Branch(nn.Module):
    """A branch under the name ``i``, as in the authors' files."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.i = inner

    def forward(self, g: GramStructure) -> GramStructure:
        found: GramStructure = self.i(g)
        return found


class _LogWeights(nn.Module):
    lw: Tensor

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.register_buffer("lw", weights.log())


class GPOutput(nn.Module):
    """Function values at the data, from a Gaussian posterior over the inducing points.

    Args:
        inducing: P.
        outputs: classes, or outputs of a regression; they share their covariance.
        mc_samples: drawn of the values.
        tempered: divide the term by the number of outputs, as the authors do; False is the bound itself.
    """

    def __init__(self, inducing: int, outputs: int, mc_samples: int = 100, *, tempered: bool = True) -> None:
        super().__init__()
        for name, value in (("inducing", inducing), ("outputs", outputs), ("mc_samples", mc_samples)):
            check_positive(name, value)
        self.mc_samples, self.tempered = mc_samples, tempered
        self.mu = nn.Parameter(torch.randn(inducing, outputs))
        self.L = nn.Parameter(torch.randn(inducing, inducing))

    def forward(self, g: GramStructure, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(samples (mc, N, outputs), terms of the objective); ``noise`` replaces the normal numbers."""
        p, outputs = self.mu.shape
        check(len(g.ii) == p, "ii", tuple(g.ii.shape), f"this layer has {p} inducing points")
        check(g.t.dim() == 1, "t", tuple(g.t.shape), "pool over the pixels first (NystromGAP, BigFinalConv)")
        factor, root = cholesky(g.ii), self.L / math.sqrt(p)
        b = projected(factor, g.ti)
        variance = g.t + ((b @ root) ** 2).sum(1) - (b * g.ti).sum(1)
        if noise is None:
            noise = torch.randn(self.mc_samples, len(g.t), outputs, dtype=g.t.dtype, device=g.t.device)
        samples = b @ self.mu + variance.clamp(min=0).sqrt()[:, None] * noise
        means = torch.linalg.solve_triangular(factor, self.mu.to(factor.dtype), upper=False).square().sum()
        term = (-(outputs * divergence(root, factor) + means) / 2).to(g.terms.dtype)
        return samples, g.terms + (term / outputs if self.tempered else term)


class Parts(NamedTuple):
    """Expected log likelihood (a mean over data and samples), the sum of the layers' terms, and the objective."""

    expected_log_likelihood: Tensor
    terms: Tensor
    objective: Tensor


@part(
    "deep-kernel-machine",
    paper="dkm",
    kind="theory",
    keywords="deep kernel machine sparse inducing points classification regression Gaussian process convolutional",
)
class DeepKernelMachine(nn.Sequential):
    """Layers from :class:`Input` to :class:`GPOutput`, with the objective and the predictions.

    Example:
        >>> x = torch.randn(30, 4)
        >>> layers = [Input(x[:5]), F2G(), ReluKernel(), GramLayer(5, 1.0), ReluKernel(), GPOutput(5, 3)]
        >>> machine = DeepKernelMachine(*layers)
        >>> loss = -machine.objective(x, torch.randint(3, (30,)), num_data=30).objective
        >>> loss.backward(); tuple(machine.predict(x).shape)
        (30, 3)
    """

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(samples of the function values, terms of the objective)."""
        *layers, output = self
        for layer in layers:
            x = layer(x)
        samples, terms = output(x, noise)
        return samples, terms

    def objective(
        self,
        x: Tensor,
        y: Tensor,
        *,
        num_data: int,
        likelihood: str = "categorical",
        noise_var: float = 0.1,
        noise: Tensor | None = None,
    ) -> Parts:
        """What training maximises: the expected log likelihood plus the terms divided by the size of the data.

        Args:
            x: a batch.
            y: classes (N,), or (N, outputs) for "gaussian".
            num_data: in the whole training set.
            likelihood: "categorical" or "gaussian".
            noise_var: σ² of the labels of a regression.
            noise: normal numbers (mc, N, outputs) instead of random ones.
        """
        check_choice("likelihood", likelihood, LIKELIHOODS)
        check_positive("num_data", num_data)
        samples, terms = self(x, noise)
        if likelihood == "categorical":
            expected = -F.cross_entropy(samples.flatten(0, 1), y.repeat(len(samples)))
        else:
            squares = (y - samples).square() / noise_var + math.log(2 * math.pi * noise_var)
            expected = -squares.sum(2).mean() / 2
        return Parts(expected, terms, expected + terms / num_data)

    @torch.no_grad()
    def predict(self, x: Tensor, *, likelihood: str = "categorical", noise: Tensor | None = None) -> Tensor:
        """Probabilities of the classes, averaged over the samples, or the mean of a regression.

        Shape:
            (N, outputs).
        """
        check_choice("likelihood", likelihood, LIKELIHOODS)
        samples, _ = self(x, noise)
        return samples.softmax(2).mean(0) if likelihood == "categorical" else samples.mean(0)
