"""The fully connected conditional random field that sharpens label maps at the edges of an image.

Krähenbühl, Koltun 2011, arXiv 1210.5644, as DeepLab uses it (Chen et al. 2016, arXiv 1606.00915, section 3.3); with
learned compatibilities as part of a network: Zheng et al. 2015, arXiv 1502.03240. Every pixel is joined to every other:

    E(x) = Σ_i U_i(x_i) + Σ_{i<j} [x_i ≠ x_j] Σ_m w_m k_m(f_i, f_j)
    Q ← softmax(−U + Σ_m w_m K̃_m Q), T times                       mean field; K̃ the normalised kernel matrices

A Gaussian of positions smooths, one of positions and colours keeps labels together where colours are. Cost: see
:mod:`torchconv.models.segment.crf_filters`; with the lattice linear in pixels, labels and iterations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive
from torchconv.catalog import part
from torchconv.kernels._custom import without_autocast
from torchconv.models.segment.crf_energies import (
    checkable,
    energies_from_labels,
    energies_from_logits,
    energies_from_probabilities,
)
from torchconv.models.segment.crf_filters import PRESETS, GaussianKernel, make_filter, normalised

__all__ = [
    "PRESETS",
    "DenseCRF",
    "GaussianKernel",
    "PairwiseTerms",
    "dense_crf",
    "energies_from_labels",
    "energies_from_logits",
    "energies_from_probabilities",
]

NORMALIZATIONS = ("after", "before", "symmetric", "none")
METHODS = ("lattice", "exact")
COMPATIBILITIES = ("potts", "diagonal", "matrix")
MAX_PAIRS = 4096 * 4096
Compatibility = float | Tensor


class PairwiseTerms:
    """The pairwise kernels over a batch of images, ready to be applied.

    Args:
        image: (B, C, \\*spatial), one to three axes; integers or floats.
        kernels: of the energy, or the name of one of :data:`PRESETS`.
        normalization: of the kernel matrices by the sums n of their rows: "after" K/nᵢ as in DeepLab, "before" K/nⱼ,
            "symmetric" K/√(nᵢnⱼ) as pydensecrf does unless told otherwise, "none" K·N/Σn.
        include_self: keep a pixel's message to itself, as both libraries do; the sums n hold it in any case.
        method: "lattice", the filter of the authors' library, for images of any size; "exact", for small ones.
        max_pairs: largest number of entries of a kernel matrix held for an image, where exact kernels need one.
        image_max: the value of white; 255 for integers in any case.
        dtype: to compute in; unset, the image's, at least single precision.

    Raises:
        ValueError: an argument out of range, images of other axes or channels than the widths, or a float image within
            0 … 1 while ``image_max`` says 255.
    """

    def __init__(
        self,
        image: Tensor,
        kernels: str | Sequence[GaussianKernel] = "vgg",
        *,
        normalization: str = "after",
        include_self: bool = True,
        method: str = "lattice",
        max_pairs: int = MAX_PAIRS,
        image_max: float = 255.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.kernels = find_kernels(kernels)
        check_options(normalization, include_self, method, max_pairs, image_max)
        ok = 3 <= image.dim() <= 5 and image.numel() > 0
        check(ok, "image", tuple(image.shape), "expected (B, C, *spatial) with one to three axes, none of them empty")
        coloured = any(k.colour_std is not None for k in self.kernels)
        if coloured and image_max == 255 and image.is_floating_point() and checkable(image):
            low, high = float(image.detach().min()), float(image.detach().max())
            remedy = "colours are on the scale 0 ... 255 here; set image_max=1.0, or give integers"
            check(not (low >= 0 and 0 < high <= 1), "image", f"values from {low:.4g} to {high:.4g}", remedy)
        scale = 255 / image_max if image.is_floating_point() else 1.0
        self.image = image.to(dtype or torch.promote_types(image.dtype, torch.float32)) * scale
        self._filters = []
        for kernel in self.kernels:
            apply = make_filter(self.image, kernel, method, max_pairs)
            like = self.image.flatten(2).transpose(1, 2)
            self._filters.append(normalised(apply, like, normalization, include_self))

    def message(self, q: Tensor, compatibilities: Sequence[Compatibility] | None = None) -> Tensor:
        """What the other pixels say: the sum of the filtered maps, weighted by compatibility.

        Args:
            q: (B, L, \\*spatial).
            compatibilities: for each kernel a number w (Potts, + w·K̃Q), a vector v of L (− v·K̃Q) or a matrix μ of L × L
                (− μ·K̃Q with μ made symmetric); unset, the kernels' weights.

        Returns:
            As ``q``; to be added to −U.
        """
        rows = q.to(self.image.dtype).flatten(2).transpose(1, 2).contiguous()
        return (
            self._add_message(torch.zeros_like(rows), rows, compatibilities).transpose(1, 2).contiguous().view(q.shape)
        )

    def _add_message(self, start: Tensor, q: Tensor, compatibilities: Sequence[Compatibility] | None) -> Tensor:
        """``start`` plus the message of ``q``, both (B, N, L), in which labels are neighbours in memory."""
        given = [k.weight for k in self.kernels] if compatibilities is None else list(compatibilities)
        check(len(given) == len(self.kernels), "compatibilities", len(given), f"give {len(self.kernels)}, one a kernel")
        for apply, weight in zip(self._filters, given, strict=True):
            if isinstance(weight, Tensor):
                start = start + _weighted(apply(q), weight)
            else:
                start = torch.add(start, apply(q), alpha=weight)
        return start

    def mean_field(
        self,
        energies: Tensor,
        iterations: int,
        compatibilities: Sequence[Compatibility] | None = None,
        history: bool = False,
    ) -> list[Tensor]:
        """log Q after the last iteration, or before the first and after each; all pixels are updated at once.

        Args:
            energies: (B, L, \\*spatial), U.
            iterations: T ≥ 0.
            compatibilities: see :meth:`message`.
            history: return all T + 1 maps.
        """
        check_positive("iterations", iterations, zero=True)
        size = self.image.shape
        fits = energies.dim() == len(size) and energies.shape[0] == size[0] and energies.shape[2:] == size[2:]
        remedy = f"expected (B, L, *spatial) over the image of shape {tuple(size)}"
        check(fits, "shape of the scores", tuple(energies.shape), remedy)
        unary = -energies.to(self.image.dtype).flatten(2).transpose(1, 2).contiguous()
        maps = [unary]
        for _ in range(iterations):
            scores = self._add_message(unary, maps[-1].softmax(2), compatibilities)
            maps = [*maps, scores] if history else [scores]
        return [F.log_softmax(m, 2).transpose(1, 2).contiguous().view(energies.shape) for m in maps]

    def objective(self, q: Tensor, energies: Tensor, compatibilities: Sequence[Compatibility] | None = None) -> Tensor:
        """Σ Q log Q + Σ U·Q − Σ_m w_m Q·(K̃_m Q) of each image, (B,): what the authors' library prints as divergence."""
        q, energies = q.to(self.image.dtype), energies.to(self.image.dtype)
        terms = q * (q.clamp_min(1e-20).log() + energies - self.message(q, compatibilities))
        return terms.flatten(1).sum(1)


def _weighted(filtered: Tensor, weight: Tensor) -> Tensor:
    """(B, N, L) under a compatibility."""
    if weight.dim() == 0:
        return filtered * weight
    labels = filtered.shape[2]
    fits = weight.shape in ((labels,), (labels, labels))
    remedy = f"give a number, {labels} numbers or {labels} x {labels} for {labels} labels"
    check(fits, "shape of the compatibility", tuple(weight.shape), remedy)
    weight = weight.to(filtered)
    if weight.dim() == 1:
        return filtered * -weight
    return torch.bmm(filtered, ((weight + weight.T) * -0.5).expand(filtered.shape[0], -1, -1))


def find_kernels(kernels: str | Sequence[GaussianKernel]) -> tuple[GaussianKernel, ...]:
    """A preset by name, or the kernels themselves."""
    if isinstance(kernels, str):
        check_choice("kernels", kernels, PRESETS)
        return PRESETS[kernels]
    ok = isinstance(kernels, Sequence) and all(isinstance(k, GaussianKernel) for k in kernels)
    check(ok, "kernels", kernels, f"give GaussianKernels or one of {', '.join(PRESETS)}")
    return tuple(kernels)


def check_options(normalization: str, include_self: bool, method: str, max_pairs: int, image_max: float) -> None:
    """Refuse options out of range."""
    check_choice("normalization", normalization, NORMALIZATIONS)
    check_choice("method", method, METHODS)
    check_positive("max_pairs", max_pairs)
    check(0 < image_max < math.inf, "image_max", image_max, "give the value of white, above 0")
    remedy = "the lattice does not know its own diagonal; use method='exact'"
    check(include_self or method == "exact", "include_self", include_self, remedy)


def _energies(logits: Tensor | None, probabilities: Tensor | None, energies: Tensor | None) -> Tensor:
    """U from the one that was given."""
    given = {"logits": logits, "probabilities": probabilities, "energies": energies}
    names = [name for name, value in given.items() if value is not None]
    check(len(names) == 1, "scores", names, f"give exactly one of {', '.join(given)}")
    if logits is not None:
        return energies_from_logits(logits)
    if probabilities is not None:
        return energies_from_probabilities(probabilities)
    assert energies is not None
    return energies


def dense_crf(
    image: Tensor,
    *,
    logits: Tensor | None = None,
    probabilities: Tensor | None = None,
    energies: Tensor | None = None,
    kernels: str | Sequence[GaussianKernel] = "vgg",
    compatibilities: Sequence[Compatibility] | None = None,
    iterations: int = 10,
    log: bool = False,
    **options: Any,
) -> Tensor:
    """Probabilities of the labels under the fully connected field.

    Args:
        image: (B, C, \\*spatial), colours from 0 to 255.
        logits, probabilities, energies: exactly one of them, (B, L, \\*spatial): scores before the softmax, after it,
            or negative log-probabilities.
        kernels, compatibilities, iterations: see :class:`PairwiseTerms`.
        log: return the logarithms, for losses.
        options: ``normalization``, ``include_self``, ``method``, ``max_pairs``, ``image_max``, see there.

    Shape:
        (B, C, \\*spatial), (B, L, \\*spatial) → (B, L, \\*spatial).

    Raises:
        ValueError: logits that are probabilities or the reverse, shapes that do not fit, an option out of range.

    Example:
        >>> image = torch.zeros(1, 3, 1, 4, dtype=torch.uint8)
        >>> image[..., 2:] = 200
        >>> noisy = torch.tensor([0.9, 0.4, 0.2, 0.1]).view(1, 1, 1, 4)
        >>> q = dense_crf(image, probabilities=torch.cat([noisy, 1 - noisy], 1), kernels=PRESETS["vgg"][1:])
        >>> q.argmax(1).flatten().tolist()
        [0, 0, 1, 1]

    Reference: arXiv 1210.5644, algorithm 1; arXiv 1606.00915, section 3.3.
    """
    given = _energies(logits, probabilities, energies)
    precise = torch.promote_types(given.dtype, torch.float32)
    with without_autocast(image.device.type):
        terms = PairwiseTerms(image, kernels, dtype=precise, **options)
        found = terms.mean_field(given, iterations, compatibilities)[-1]
    return (found if log else found.exp()).to(given.dtype)


@part(
    "dense-crf",
    paper="deeplab",
    kind="layer",
    dims=(1, 2, 3),
    probe={
        "build": {"num_classes": 3, "iterations": 2, "method": "exact", "compatibility": "matrix"},
        "inputs": [[2, 3, 6, 5], [2, 3, 6, 5]],
    },
    keywords="fully connected conditional random field mean field bilateral permutohedral pydensecrf CRF-RNN labels",
)
class DenseCRF(nn.Module):
    """Fully connected conditional random field whose compatibilities are learned.

    As built it is the field of the preset; training moves the compatibilities, as in CRF-as-RNN.

    Args:
        num_classes: L.
        kernels: a preset ("vgg", "resnet101", "default") or :class:`GaussianKernel` objects.
        iterations: T ≥ 0.
        compatibility: what is learned for each kernel: "potts" one weight, "diagonal" one for each label, "matrix" one
            for each pair of labels.
        normalization, include_self, method, max_pairs, image_max: see :class:`PairwiseTerms`.
        log: return log-probabilities, for losses such as ``F.nll_loss``.

    Shape:
        (B, C, \\*spatial), (B, num_classes, \\*spatial) → (B, num_classes, \\*spatial).

    Raises:
        ValueError: an argument out of range; scores that are not what they are given as.

    Example:
        >>> crf = DenseCRF(4, "resnet101", iterations=5)
        >>> image = torch.randint(256, (1, 3, 12, 9), dtype=torch.uint8)
        >>> crf(image, torch.zeros(1, 4, 12, 9)).shape, len(list(crf.parameters()))
        (torch.Size([1, 4, 12, 9]), 2)

    Reference: arXiv 1606.00915, section 3.3; arXiv 1502.03240.
    """

    def __init__(
        self,
        num_classes: int,
        kernels: str | Sequence[GaussianKernel] = "vgg",
        iterations: int = 10,
        compatibility: str = "potts",
        normalization: str = "after",
        include_self: bool = True,
        method: str = "lattice",
        max_pairs: int = MAX_PAIRS,
        image_max: float = 255.0,
        log: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_positive("num_classes", num_classes)
        check_positive("iterations", iterations, zero=True)
        check_choice("compatibility", compatibility, COMPATIBILITIES)
        check_options(normalization, include_self, method, max_pairs, image_max)
        self.num_classes, self.iterations, self.compatibility = num_classes, iterations, compatibility
        self.kernels, self.normalization, self.include_self = find_kernels(kernels), normalization, include_self
        self.method, self.max_pairs, self.image_max, self.log = method, max_pairs, image_max, log
        shape = {"potts": (), "diagonal": (num_classes,), "matrix": (num_classes, num_classes)}[compatibility]
        like = torch.empty(shape, device=device, dtype=dtype)
        self.compatibilities = nn.ParameterList(torch.empty_like(like) for _ in self.kernels)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The field with the kernels' weights: equal labels attract, others do nothing."""
        for value, kernel in zip(self.compatibilities, self.kernels, strict=True):
            if self.compatibility == "matrix":
                value.zero_().fill_diagonal_(-kernel.weight)
            else:
                value.fill_(kernel.weight if self.compatibility == "potts" else -kernel.weight)

    def param_options(self) -> dict[str, dict[str, float]]:
        """Compatibilities are not decayed."""
        return {f"compatibilities.{m}": {"weight_decay": 0.0} for m in range(len(self.kernels))}

    def forward(
        self,
        image: Tensor,
        logits: Tensor | None = None,
        *,
        probabilities: Tensor | None = None,
        energies: Tensor | None = None,
    ) -> Tensor:
        """Probabilities, or their logarithms, from exactly one of the three kinds of scores."""
        scores = next((s for s in (logits, probabilities, energies) if s is not None), None)
        if scores is not None and (scores.dim() < 3 or scores.shape[1] != self.num_classes):
            raise ValueError(f"scores of shape {tuple(scores.shape)}: expected (B, {self.num_classes}, *spatial)")
        return dense_crf(
            image,
            logits=logits,
            probabilities=probabilities,
            energies=energies,
            kernels=self.kernels,
            compatibilities=list(self.compatibilities),
            iterations=self.iterations,
            log=self.log,
            normalization=self.normalization,
            include_self=self.include_self,
            method=self.method,
            max_pairs=self.max_pairs,
            image_max=self.image_max,
        )

    def extra_repr(self) -> str:
        """Arguments for ``repr``."""
        return f"{self.num_classes}, iterations={self.iterations}, {self.compatibility}, {self.method}"
