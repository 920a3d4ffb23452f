"""Fitting a kernel in tensor format to a dense one: by singular values where that is the best, CP by tensorly.

The forms are those of :mod:`torchconv.ops.apriori`.
"""

from __future__ import annotations

import bisect
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torchconv._common import check, check_choice, require
from torchconv.ops._common import check_channels
from torchconv.ops._factored import FORMS, PASSES, Rank, dense_kernel, factor_shapes

ROUNDING = 1e-12
"""Of shares of energy in float64."""
LARGE = 50_000
"""Numbers in a kernel from which on CP takes short cuts."""


@dataclass(frozen=True)
class Factorisation:
    """Factors of a kernel and how well they fit.

    Attributes:
        form, rank, groups: what they are.
        factors: tensors by name.
        error: ‖W − W'‖ / ‖W‖, Frobenius.
        parameters, dense_parameters: numbers stored in this form and in the dense one.
    """

    form: str
    rank: Rank
    groups: int
    factors: dict[str, Tensor]
    error: float
    parameters: int
    dense_parameters: int

    def kernel(self) -> Tensor:
        """The dense kernel they stand for."""
        return dense_kernel(self.factors, self.form, self.groups)


def factorise_kernel(
    weight: Tensor, rank: Rank | None = None, energy: float | None = None, form: str = "sequential", groups: int = 1
) -> Factorisation:
    """Fit a form to a dense kernel.

    Args:
        weight: (out, in/groups, \\*k).
        rank: R, for tucker also (outputs, inputs) of the core; or
        energy: in (0, 1]: the least rank is taken whose factors hold this share of the squares of the kernel,
            1 − error² ≥ energy (read off the singular values, or found by doubling and bisection). Exactly one of the
            two, except for depthwise_1d.
        form: see :mod:`torchconv.ops.apriori`; "cp" needs tensorly (extra ``surgery``), and seconds to minutes a large
            kernel.
        groups: as in ``nn.ConvNd``.

    Returns:
        the factors in the dtype and on the device of ``weight``, with their error; computed in float64 on the CPU.

    Raises:
        ValueError: both or none of rank and energy are given, one is out of range, the form cannot reach the energy, or
            the kernel is not finite.

    Example:
        >>> kernel = torch.randn(8, 4, 3, 3)
        >>> found = factorise_kernel(kernel, rank=3, form="per_pair")
        >>> found.error < 1e-6, found.parameters, found.dense_parameters
        (True, 576, 288)

    Reference: arXiv 2304.04964; the sequential form as in Jaderberg et al., arXiv 1405.3866, scheme 2.
    """
    check_choice("form", form, FORMS)
    exact = _exact(weight)
    check_channels(weight.shape[1] * groups, weight.shape[0], groups)
    if form == "depthwise_1d":
        rank = 1 if rank is None and energy is None else rank
    check((rank is None) != (energy is None), "rank", rank, f"give either rank or energy (energy={energy!r})")
    norm = float(exact.norm()) or 1.0

    def fit(rank: Rank) -> tuple[dict[str, Tensor], float]:
        factors = fit_factors(exact, form, rank, groups)
        return factors, float((dense_kernel(factors, form, groups) - exact).norm()) / norm

    if rank is None:
        assert energy is not None
        check(0 < energy <= 1, "energy", energy, "must be in (0, 1]")
        curve = _kept(exact, form, groups)
        if curve is not None:
            rank = _first(curve, energy) * (groups if form == "sequential" else 1)
        else:
            rank = _least_rank(lambda r: fit(r)[1], energy, full_rank(exact, form, groups), groups, form)
    factors, error = fit(rank)
    return Factorisation(
        form,
        rank,
        groups,
        {name: f.to(weight) for name, f in factors.items()},
        error,
        sum(f.numel() for f in factors.values()),
        weight.numel(),
    )


def choose_rank(
    weight: Tensor, *, energy: float | None = None, share: float | None = None, form: str = "tucker", groups: int = 1
) -> Rank:
    """The rank of a form for a kernel: the smallest of an energy, or the best of a size.

    Args:
        weight: (out, in/groups, \\*k).
        energy: in (0, 1]: as in :func:`factorise_kernel`; but ranks at which the factors hold as many numbers as the
            kernel are not tried. Tucker has a rank for the outputs and one for the inputs, so that it is the pair with
            the fewest numbers (of the projections on the leading singular vectors, which the fit then improves).
        share: in (0, 1]: the factors may hold this share of the kernel's numbers. Exactly one of the two.
        form, groups: as in :func:`factorise_kernel`; depthwise_1d has no rank to choose.

    Raises:
        ValueError: both or none are given, one is out of range, or no such rank exists.

    Example:
        >>> kernel = torch.ones(8, 8, 3, 3) + torch.eye(8).reshape(8, 8, 1, 1)
        >>> choose_rank(kernel, energy=0.9), choose_rank(kernel, share=0.5, form="sequential")
        ((1, 1), 6)

    Reference: Tucker with two ranks as in Kim et al., arXiv 1511.06530.
    """
    check_choice("form", form, tuple(f for f in FORMS if f != "depthwise_1d"))
    check((share is None) != (energy is None), "share", share, f"give either share or energy (energy={energy!r})")
    wanted = energy if energy is not None else share
    assert wanted is not None
    check(0 < wanted <= 1, "share" if energy is None else "energy", wanted, "must be in (0, 1]")
    exact = _exact(weight)

    def numbers(rank: Rank) -> int:
        shapes = factor_shapes(form, len(weight), weight.shape[1] * groups, weight.shape[2:], rank, groups)
        return sum(math.prod(shape) for shape in shapes.values())

    if form == "tucker":
        return _choose_pair(exact, energy, share)
    step = groups if form == "sequential" else 1
    most = -(-full_rank(exact, form, groups) // step)
    budget = weight.numel() * (1 if share is None else share)
    if energy is not None:
        curve = _kept(exact, form, groups)
        if curve is not None:
            return _first(curve, energy) * step
        budget -= 1  # the ranks that are worth it
    # Numbers grow evenly with the rank, but for the middle pass of sequential in volumes: bisect.
    largest = bisect.bisect_right(range(1, most + 1), budget, key=lambda r: numbers(r * step))
    remedy = f"the {form} form holds {numbers(step)} numbers at the least, of {weight.numel()}"
    check(largest > 0, "share" if energy is None else "energy", wanted, remedy)
    if energy is None:
        return largest * step
    norm = float(exact.norm()) or 1.0

    def error(rank: int) -> float:
        return float((dense_kernel(fit_factors(exact, form, rank, groups), form, groups) - exact).norm()) / norm

    return _least_rank(error, energy, largest * step, groups, form)


def _choose_pair(weight: Tensor, energy: float | None, share: float | None) -> tuple[int, int]:
    kept = _kept_by_pairs(weight)
    outer, inner = (torch.arange(1, n + 1, dtype=torch.float64) for n in kept.shape)
    core = weight[0, 0].numel() * outer.unsqueeze(1) * inner
    sizes = core + (len(weight) * outer).unsqueeze(1) + weight.shape[1] * inner
    if share is None:
        assert energy is not None
        place = int(torch.where(kept >= energy - ROUNDING, sizes, torch.inf).argmin())
    else:
        small = sizes <= share * weight.numel()
        remedy = f"the smallest tucker core and its factors hold {int(sizes[0, 0])} numbers of {weight.numel()}"
        check(bool(small.any()), "share", share, remedy)
        place = int(torch.where(small, kept, -1.0).argmax())
    return place // kept.shape[1] + 1, place % kept.shape[1] + 1


def _exact(weight: Tensor) -> Tensor:
    shape = tuple(weight.shape)
    check(len(shape) in (3, 4, 5) and 0 not in shape, "weight", shape, "expected (out, in/groups, *k), one to three k")
    exact = weight.detach().to("cpu", torch.float64)
    check(bool(exact.isfinite().all()), "weight", shape, "holds values that are not finite: nothing fits them")
    return exact


def _first(curve: Tensor, energy: float) -> int:
    """The least rank, in steps, that reaches an energy; all of it at the last."""
    return min(int((curve < energy - ROUNDING).sum()) + 1, len(curve))


def _kept(weight: Tensor, form: str, groups: int) -> Tensor | None:
    """Share of the energy that the best fits keep, by rank in steps; None where singular values do not tell."""
    ndim = weight.dim() - 2
    if form == "per_pair" and ndim <= 2:
        values = weight.new_ones(1) if ndim == 1 else torch.linalg.svdvals(weight).square().sum((0, 1))
    elif form == "sequential" and ndim <= 2:
        values = torch.linalg.svdvals(_by_groups(weight, groups).flatten(1, 2).flatten(2)).square().sum(0)
    else:
        return None
    total = values.cumsum(0)
    return total / total[-1] if total[-1] > 0 else torch.ones_like(total)


def _kept_by_pairs(weight: Tensor) -> Tensor:
    """Share of the energy in the leading singular vectors of outputs and inputs, (outputs, inputs)."""
    flat = weight.flatten(2)
    # As many as there can be: the rest has no energy.
    left = _leading(torch.einsum("oit,pit->op", flat, flat), flat[0].numel())
    right = _leading(torch.einsum("oit,ojt->ij", flat, flat), flat[:, 0].numel())
    core = torch.einsum("oit,op->pit", flat, left)
    share = torch.einsum("pit,ij->pjt", core, right).square().sum(2).cumsum(0).cumsum(1)
    return share / share[-1, -1] if share[-1, -1] > 0 else torch.ones_like(share)


def _least_rank(error: Callable[[int], float], energy: float, most: int, groups: int, form: str) -> int:
    """The least rank with 1 − error² ≥ energy; in steps of ``groups`` where the form asks for it."""
    step = groups if form == "sequential" else 1

    def enough(rank: int) -> bool:
        return bool(1 - error(rank * step) ** 2 >= energy - ROUNDING)

    most = -(-most // step)
    low, high = 0, 1
    while not enough(high):
        if high >= most:
            raise ValueError(f"energy={energy}: the {form} form reaches {1 - error(most * step) ** 2:.6f} at most")
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high * step


def _padded(t: Tensor, axis: int, size: int) -> Tensor:
    """Zeros behind ``axis`` up to ``size``: ranks above what the kernel has."""
    extra = list(t.shape)
    extra[axis] = size - t.shape[axis]
    return t if extra[axis] <= 0 else torch.cat([t, t.new_zeros(extra)], axis)


def _split(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-``rank`` product of (…, a, b), the singular values shared evenly; (…, a, rank), (…, rank, b)."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    root = s[..., :rank].sqrt()
    left, right = u[..., :rank] * root.unsqueeze(-2), vh[..., :rank, :] * root.unsqueeze(-1)
    return _padded(left, -1, rank), _padded(right, -2, rank)


def _fit_per_pair(weight: Tensor, rank: int) -> dict[str, Tensor]:
    ndim = weight.dim() - 2
    if ndim == 1:
        return {"axis0": _padded(weight.unsqueeze(2), 2, rank)}
    if ndim == 2:
        left, right = _split(weight, rank)
        return {"axis0": left.transpose(2, 3), "axis1": right}
    # Singular vectors of the first axis against the other two, each again taken apart: orthogonal terms, of which the
    # largest are kept. Not the best of that rank, but exact once all are kept, and one batched computation.
    u, s, vh = torch.linalg.svd(weight.flatten(3), full_matrices=False)
    planes = (s.unsqueeze(-1) * vh).reshape(*s.shape, *weight.shape[3:])
    p, q, rh = torch.linalg.svd(planes, full_matrices=False)
    strength = q.flatten(2)
    kept = strength.argsort(dim=2, descending=True)[:, :, :rank]
    inner = q.shape[3]

    def pick(vectors: Tensor) -> Tensor:  # (out, in, terms, k) → the kept terms
        return vectors.gather(2, kept.unsqueeze(3).expand(*kept.shape, vectors.shape[3]))

    root = strength.gather(2, kept).unsqueeze(3) ** (1 / 3)
    first = u.transpose(2, 3).repeat_interleave(inner, 2)
    axes = (first, p.transpose(3, 4).flatten(2, 3), rh.flatten(2, 3))
    return {f"axis{j}": _padded(pick(a) * root, 2, rank) for j, a in enumerate(axes)}


def _by_groups(weight: Tensor, groups: int) -> Tensor:
    """(groups, in, k_1, …, k_n, out): every pass takes the channels so far and its own axis from the front."""
    out, inner, *taps = weight.shape
    return weight.reshape(groups, out // groups, inner, *taps).permute(0, 2, *range(3, 3 + len(taps)), 1)


def _fit_sequential(weight: Tensor, rank: int, groups: int) -> dict[str, Tensor]:
    ndim = weight.dim() - 2
    out, _, *taps = weight.shape
    rest = _by_groups(weight, groups)
    names, factors, share = PASSES[ndim], {}, rank // groups
    for number, name in enumerate(names[:-1]):
        left, right = _split(rest.flatten(1, 2).flatten(2), share)
        shape = [taps[j] if j == number else 1 for j in range(ndim)]
        left = left.reshape(groups, rest.shape[1], taps[number], share).permute(0, 3, 1, 2)
        factors[name] = left.reshape(rank, rest.shape[1], *shape)
        rest = right.reshape(groups, share, *rest.shape[3:])
    last = rest.movedim(-1, 1)  # (groups, out, rank, k_n), without k_n in one dimension
    shape = [taps[j] if j == len(names) - 1 else 1 for j in range(ndim)]
    factors[names[-1]] = last.reshape(out, share, *shape)
    return factors


def _fit_depthwise(weight: Tensor, groups: int) -> dict[str, Tensor]:
    out, inner, *taps = weight.shape
    # One tensor for each input channel, (groups · in, out, k_1, …), and its best rank-one product.
    stack = weight.reshape(groups, out // groups, inner, *taps).transpose(1, 2).flatten(0, 1)
    vectors = []
    rest = stack
    for _ in range(rest.dim() - 2):
        left, right = _split(rest.flatten(2), 1)
        vectors.append(left.squeeze(-1))
        rest = right.reshape(-1, *rest.shape[2:])
    vectors.append(rest)
    for _ in range(30):  # alternating least squares, in turn for each vector
        for j in range(len(vectors)):
            product = stack
            for i in reversed(range(len(vectors))):
                if i != j:
                    shape = [1] * (product.dim() - 1)
                    shape[i] = -1
                    product = (product * vectors[i].reshape(len(stack), *shape)).sum(i + 1)
            norms = math.prod([v.square().sum(1) for i, v in enumerate(vectors) if i != j], start=stack.new_ones(1))
            vectors[j] = product / norms.clamp(min=torch.finfo(stack.dtype).tiny).unsqueeze(1)
    pointwise = vectors[0].reshape(groups, inner, out // groups).transpose(1, 2).reshape(out, inner)
    return {f"axis{j}": v for j, v in enumerate(vectors[1:])} | {"pointwise": pointwise}


def _leading(gram: Tensor, count: int) -> Tensor:
    """Eigenvectors of the largest eigenvalues, (n, count)."""
    return torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :count]


def _fit_tucker(weight: Tensor, rank: Rank, sweeps: int = 20) -> dict[str, Tensor]:
    """Leading singular vectors of either axis, then improved in turn while the other is fixed."""
    r, q = rank if isinstance(rank, tuple) else (rank, rank)
    out, inner, *taps = weight.shape
    rows = weight.flatten(2).transpose(0, 1).reshape(inner, -1)  # (in, out · taps)
    columns = weight.flatten(2).reshape(out, -1)  # (out, in · taps)
    inputs = outputs = _leading(rows @ rows.T, q)
    kept, total, count = -1.0, float(rows.square().sum()), math.prod(taps)
    for _ in range(sweeps):
        narrow = (inputs.T @ rows).reshape(-1, out, count).transpose(0, 1).reshape(out, -1)
        outputs = _leading(narrow @ narrow.T, r)
        narrow = (outputs.T @ columns).reshape(-1, inner, count).transpose(0, 1).reshape(inner, -1)
        inputs = _leading(narrow @ narrow.T, q)
        before, kept = kept, float((inputs.T @ narrow).square().sum())
        if kept - before <= 1e-5 * total:
            break
    core = torch.einsum("oit,op,ij->pjt", weight.flatten(2), outputs, inputs)
    return {"core": core.reshape(*core.shape[:2], *taps), "outputs": outputs, "inputs": inputs}


def _fit_cp(weight: Tensor, rank: int) -> dict[str, Tensor]:
    tensorly = require("tensorly", "surgery")
    decomposition = require("tensorly.decomposition", "surgery")
    large = weight.numel() > LARGE
    # The factors of a large kernel are looked for where twice as many singular vectors as terms reach.
    around = _fit_tucker(weight, 2 * rank, sweeps=1) if large else {"core": weight}
    with tensorly.backend_context("numpy", local_threadsafe=True), warnings.catch_warnings():
        # Ranks above an axis' length are meant: the start is filled up with seeded random vectors.
        warnings.filterwarnings("ignore", "Trying to compute SVD")
        weights, found = decomposition.parafac(
            around["core"].numpy(), rank, n_iter_max=100 if large else 300, init="svd", tol=1e-9, random_state=0
        )
    factors = {f"factor_{j}": torch.as_tensor(f, dtype=weight.dtype) for j, f in enumerate(found)}
    if large:
        factors["factor_0"] = around["outputs"] @ factors["factor_0"]
        factors["factor_1"] = around["inputs"] @ factors["factor_1"]
    return {"weights": torch.as_tensor(weights, dtype=weight.dtype), **factors}


def fit_factors(weight: Tensor, form: str, rank: Rank, groups: int) -> dict[str, Tensor]:
    """Factors of ``weight`` (float64, on the CPU) at one rank.

    per_pair in one and two dimensions, sequential in one and two: the best there is, by singular values. The others:
    good ones (orthogonal terms, successive singular values, alternating least squares).
    """
    factor_shapes(form, weight.shape[0], weight.shape[1] * groups, weight.shape[2:], rank, groups)
    if form == "tucker":
        return _fit_tucker(weight, rank)
    assert isinstance(rank, int)
    if form == "cp":
        return _fit_cp(weight, rank)
    if form == "per_pair":
        return _fit_per_pair(weight, rank)
    if form == "sequential":
        return _fit_sequential(weight, rank, groups)
    return _fit_depthwise(weight, groups)


def full_rank(weight: Tensor, form: str, groups: int) -> int:
    """A rank at which the form can represent every kernel of this shape (1 for depthwise_1d, which never can)."""
    out, inner, *taps = weight.shape
    if form == "per_pair":
        return math.prod(sorted(taps)[:-1])
    if form == "cp":
        sizes = sorted((out, inner, *taps))
        return math.prod(sizes[:-1])
    if form == "tucker":
        return max(out, inner)
    if form == "depthwise_1d":
        return 1
    within, needed = inner, 1
    for number in range(len(PASSES[len(taps)]) - 1):
        within = min(within * taps[number], math.prod(taps[number + 1 :]) * (out // groups))
        needed = max(needed, within)
    return needed * groups
