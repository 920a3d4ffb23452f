"""Unary energies of a conditional random field, from what a network or an annotator gives.

Logits and probabilities are told apart by name and looked at: to take one for the other is the commonest mistake with
such fields (arXiv 1210.5644), and it passes silently elsewhere.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from torchconv._common import check, check_positive


def energies_from_logits(logits: Tensor) -> Tensor:
    """−log softmax over the labels.

    Args:
        logits: (B, L, \\*spatial), a network's scores before any softmax.

    Raises:
        ValueError: scores that are probabilities already (none negative, sums of 1).

    Example:
        >>> energies_from_logits(torch.zeros(1, 2, 3)).exp()[0, 0]
        tensor([2., 2., 2.])
    """
    if checkable(logits) and logits.shape[1] > 1 and bool((logits >= 0).all()):
        sums = logits.sum(1, dtype=torch.promote_types(logits.dtype, torch.float32))
        already = bool(((sums - 1).abs() < 1e-3).all())
        check(
            not already, "logits", "sums of 1 over the labels", "these are probabilities: give them as probabilities="
        )
    return -F.log_softmax(logits, 1)


def energies_from_probabilities(probabilities: Tensor, floor: float = 1e-5) -> Tensor:
    """−log of probabilities, no smaller than ``floor``, so that no label is impossible.

    Args:
        probabilities: (B, L, \\*spatial), after the softmax.
        floor: in (0, 1).

    Raises:
        ValueError: values that are no probabilities: below 0, or sums over the labels other than 1.

    Example:
        >>> energies_from_probabilities(torch.tensor([[[1.0], [0.0]]])).flatten()
        tensor([-0.0000, 11.5129])
    """
    check(0 < floor < 1, "floor", floor, "must lie between 0 and 1")
    if checkable(probabilities):
        low = float(probabilities.min())
        check(
            low >= 0, "probabilities", f"values down to {low:.4g}", "these are no probabilities: give them as logits="
        )
        sums = probabilities.sum(1, dtype=torch.promote_types(probabilities.dtype, torch.float32))
        slack = 1e-3 if probabilities.dtype in (torch.float32, torch.float64) else 3e-2
        span = f"sums over the labels from {float(sums.min()):.4g} to {float(sums.max()):.4g}"
        remedy = "they must be 1; give scores before the softmax as logits="
        check(bool(((sums - 1).abs() < slack).all()), "probabilities", span, remedy)
    return -probabilities.clamp_min(floor).log()


def energies_from_labels(
    labels: Tensor, num_classes: int, confidence: float = 0.7, ignore_index: int | None = None
) -> Tensor:
    """Energies of annotations that are right with a given probability, such as pseudo-labels.

    Args:
        labels: (B, \\*spatial), integers below ``num_classes``.
        num_classes: ≥ 2.
        confidence: probability that a label is right; the others share the rest.
        ignore_index: a label that says nothing: all classes are equally likely there.

    Returns:
        (B, num_classes, \\*spatial), float32.

    Raises:
        ValueError: an argument out of range, or labels outside 0 … num_classes − 1.

    Example:
        >>> energies_from_labels(torch.tensor([[0, 9]]), 2, 0.75, ignore_index=9).neg().exp()[0]
        tensor([[0.7500, 0.5000],
                [0.2500, 0.5000]])
    """
    check_positive("num_classes", num_classes)
    check(num_classes >= 2, "num_classes", num_classes, "must be at least 2")
    check(0 < confidence < 1, "confidence", confidence, "must lie between 0 and 1, both excluded")
    check(not labels.is_floating_point(), "labels", labels.dtype, "give integers")
    unsure = torch.zeros_like(labels, dtype=torch.bool) if ignore_index is None else labels == ignore_index
    known = labels.long().masked_fill(unsure, 0)
    outside = known[(known < 0) | (known >= num_classes)]
    check(len(outside) == 0, "labels", outside[:1].tolist(), f"must be below {num_classes}, or be the ignore_index")
    right = F.one_hot(known, num_classes).movedim(-1, 1).bool()
    energies = torch.where(right, -math.log(confidence), -math.log((1 - confidence) / (num_classes - 1)))
    return torch.where(unsure.unsqueeze(1), math.log(num_classes), energies)


def checkable(x: Tensor) -> bool:
    """Values can be looked at: not while a graph is traced."""
    return not torch.compiler.is_compiling() and x.numel() > 0 and not x.is_meta
