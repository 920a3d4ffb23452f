"""Linear SVMs without a bias on frozen features: one against one with votes, or one against all; C by validation."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchconv._common import check, check_choice, check_positive, require
from torchconv.analysis._offtheshelf_metrics import average_precision, mean_class_accuracy

SCHEMES = ("one-vs-one", "one-vs-all")
LOSSES = ("hinge", "squared_hinge")
TIES = ("lowest", "margin")
GRID = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)


@dataclass(frozen=True)
class LinearSVM:
    """Linear SVMs of a problem with K classes.

    Attributes:
        weight: (M, D) float64, one row for each machine.
        bias: (M,), zeros where none was asked for.
        pairs: (M, 2) classes (i, j), i < j, of each machine ("one-vs-one"); None for "one-vs-all", where M = K.
        classes: (K,) labels in rising order.
        objective: (M,) what was minimised: ½‖w‖² + C Σ loss.
        C: weight of the loss.
        exclusive: whether an image has exactly one label; else labels are columns of 0 and 1.
    """

    weight: Tensor
    bias: Tensor
    pairs: Tensor | None
    classes: Tensor
    objective: Tensor
    C: float
    exclusive: bool = True

    def decision(self, x: Tensor) -> Tensor:
        """wᵀx (+ b) of every machine: (…, D) → (…, M)."""
        weight, bias = self.weight.to(x.device), self.bias.to(x.device)
        return x.to(weight.dtype) @ weight.T + bias

    def votes(self, x: Tensor) -> Tensor:
        """One against one: how many machines choose each class, (…, D) → (…, K) int64; wᵀx ≥ 0 is for the first."""
        check(self.pairs is not None, "scheme", "one-vs-all", "has no votes; use decision")
        assert self.pairs is not None
        first = self.decision(x) >= 0
        pairs = self.pairs.to(x.device)
        winner = torch.where(first, pairs[:, 0], pairs[:, 1])
        total = torch.zeros(*first.shape[:-1], len(self.classes), dtype=torch.int64, device=x.device)
        return total.scatter_add_(-1, winner, torch.ones_like(winner))

    def responses(self, x: Tensor) -> Tensor:
        """Votes, or decisions where each class has its own machine: (…, D) → (…, K)."""
        return self.decision(x) if self.pairs is None else self.votes(x)

    def margins(self, x: Tensor) -> Tensor:
        """Sum of the decisions for each class: (…, D) → (…, K)."""
        decision = self.decision(x)
        if self.pairs is None:
            return decision
        pairs = self.pairs.to(x.device)
        total = decision.new_zeros(*decision.shape[:-1], len(self.classes))
        total.index_add_(-1, pairs[:, 0], decision)
        return total.index_add_(-1, pairs[:, 1], -decision)

    def predict(self, x: Tensor, ties: str = "lowest") -> Tensor:
        """Labels of (N, D), or of (N, V, D) with the responses of an image's V views summed.

        Args:
            x: features.
            ties: classes with equally many votes: the "lowest" one wins, or the one with the larger sum of decisions
                ("margin").
        """
        check_choice("ties", ties, TIES)
        check(self.exclusive, "labels", "columns", "do not exclude each other: rank by decision, there is no one label")
        total = _summed(self.responses(x))
        if ties == "margin" and self.pairs is not None:
            margins = _summed(self.margins(x))
            total = torch.where(total == total.amax(-1, keepdim=True), margins, -torch.inf)
        best = total == total.amax(-1, keepdim=True)
        return self.classes.to(x.device)[best.long().argmax(-1)]  # the first of equal ones


def _summed(responses: Tensor) -> Tensor:
    return responses.sum(1) if responses.dim() == 3 else responses


def fit_svm(
    x: Tensor,
    labels: Tensor,
    C: float = 1.0,
    *,
    scheme: str = "one-vs-one",
    loss: str = "hinge",
    bias: bool = False,
    tol: float = 1e-4,
    max_iter: int = 1000,
) -> LinearSVM:
    """min ½‖w‖² + C Σᵢ max(0, 1 − yᵢ wᵀxᵢ) for every machine of a scheme, by LIBLINEAR.

    Args:
        x: (N, D) features, or (N, V, D): all V views of an image are samples of its label.
        labels: (N,) integers, one class an image; or (N, K) of 0 and 1 for labels that do not exclude each other.
        C: weight of the loss.
        scheme: "one-vs-one": K (K − 1) / 2 machines that vote; "one-vs-all": K machines. Columns need the latter.
        loss: "hinge", or "squared_hinge".
        bias: add one, as a feature that is always 1 (so it is penalised like the others).
        tol: of the solver; 1e-10 (and a million passes) reproduce the optimum to about nine digits.
        max_iter: passes over the samples. LIBLINEAR warns when they did not suffice, as with a large C on features that
            are nearly alike; accuracy then hardly changes with more.

    Returns:
        The machines, on the CPU in float64.

    Raises:
        ValueError: fewer than two classes, shapes that do not fit, an unknown choice, C ≤ 0.
        ImportError: scikit-learn is missing; the extra ``compare`` brings it.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.8, 0.1], [0.0, 1.0], [0.1, 0.9]])
        >>> fit_svm(x, torch.tensor([3, 3, 7, 7])).predict(x).tolist()
        [3, 3, 7, 7]
    """
    check_choice("scheme", scheme, SCHEMES)
    check_choice("loss", loss, LOSSES)
    check(C > 0, "C", C, "must be positive")
    check(tol > 0, "tol", tol, "must be positive")
    check(x.dim() in (2, 3), "x", tuple(x.shape), "must be (N, D) or (N, views, D)")
    check(labels.dim() in (1, 2) and len(labels) == len(x), "labels", tuple(labels.shape), f"need {len(x)} rows")
    exclusive = labels.dim() == 1
    check(exclusive or scheme == "one-vs-all", "scheme", scheme, "columns of labels need 'one-vs-all'")
    labels = labels.cpu()
    if x.dim() == 3:
        labels = labels.repeat_interleave(x.shape[1], 0)
    rows = x.detach().flatten(0, -2).double().cpu()
    classes = labels.unique() if exclusive else torch.arange(labels.shape[1])
    check(not exclusive or len(classes) > 1, "labels", classes.tolist(), "need at least two classes")
    solve = _Solver(C, loss, bias, tol, max_iter)
    pairs: Tensor | None = None
    if scheme == "one-vs-all":
        targets = labels[:, None] == classes if exclusive else labels.bool()
        mixed = targets.any(0) & ~targets.all(0)
        check(bool(mixed.all()), "labels", "columns of one value", "each column needs both 0 and 1")
        found = [solve(rows, column) for column in targets.T]
    else:
        pairs = torch.tensor(list(itertools.combinations(range(len(classes)), 2)))
        found = []
        for i, j in pairs.tolist():
            taken = (labels == classes[i]) | (labels == classes[j])
            found.append(solve(rows[taken], labels[taken] == classes[i]))
    weight, offset, objective = (torch.stack(column) for column in zip(*found, strict=True))
    return LinearSVM(weight, offset, pairs, classes, objective, C, exclusive)


class _Solver:
    """LIBLINEAR's dual coordinate descent for one machine."""

    def __init__(self, C: float, loss: str, bias: bool, tol: float, max_iter: int) -> None:
        svm = require("sklearn.svm", "compare")
        self.C, self.loss = C, loss
        self.machine = svm.LinearSVC(
            C=C, loss=loss, fit_intercept=bias, dual=True, tol=tol, max_iter=max_iter, random_state=0
        )

    def __call__(self, x: Tensor, positive: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, bias and the objective of a machine that is positive for ``positive``."""
        self.machine.fit(x.numpy(), positive.numpy())
        weight = torch.from_numpy(self.machine.coef_[0])
        bias = torch.as_tensor(float(torch.as_tensor(self.machine.intercept_).sum()), dtype=torch.float64)
        sign = torch.where(positive, 1.0, -1.0).double()
        slack = (1 - sign * (x @ weight + bias)).clamp(min=0)
        losses = slack if self.loss == "hinge" else slack.square()
        objective = (weight.square().sum() + bias.square()) / 2 + self.C * losses.sum()
        return weight, bias, objective


def scaled_C(x: Tensor) -> float:
    """A C that suits features without validation: one over their variance, the mean of ‖f − mean f‖².

    The normalised features of some networks (of untrained ones above all) are nearly alike, and a machine with C = 1
    then gives one answer for all images; with this C features of different networks can be compared.

    Args:
        x: (N, D) or (N, V, D) normalised features of the training images.

    Raises:
        ValueError: features that are all alike.

    Example:
        >>> scaled_C(torch.tensor([[1.0, 0.25], [1.0, -0.25]]))
        16.0
    """
    rows = x.detach().flatten(0, -2).double()
    variance = float((rows - rows.mean(0)).square().sum(1).mean())
    check(variance > 0, "x", "all alike", "features without variance tell nothing apart")
    return round(1 / variance, 6)


def choose_C(
    x: Tensor,
    labels: Tensor,
    grid: Sequence[float] = GRID,
    *,
    folds: int = 5,
    scheme: str = "one-vs-one",
    loss: str = "hinge",
    bias: bool = False,
    seed: int = 0,
) -> float:
    """The C of a grid with the best cross-validated score; the smallest of equal ones.

    The score is the mean accuracy of the classes, or mean average precision for columns of labels. All views of an
    image are in the same fold.

    Args:
        x: (N, D) or (N, V, D) of the training images.
        labels: (N,) or (N, K), as in :func:`fit_svm`.
        grid: values to try.
        folds: stratified by class where an image has one; fewer when the smallest class has fewer images.
        scheme, loss, bias: as in :func:`fit_svm`.
        seed: of the folds.

    Raises:
        ValueError: an empty grid, or a class with a single image.
    """
    check(len(grid) > 0, "grid", grid, "give at least one value")
    check_positive("folds", folds)
    x, labels = x.detach().cpu(), labels.cpu()
    selection = require("sklearn.model_selection", "compare")
    exclusive = labels.dim() == 1
    smallest = int(labels.unique(return_counts=True)[1].min()) if exclusive else len(labels)
    count = min(folds, smallest)
    check(count > 1, "folds", count, "cross-validation needs two folds and two images of each class")
    kind = selection.StratifiedKFold if exclusive else selection.KFold
    splits = list(kind(count, shuffle=True, random_state=seed).split(x.numpy(), labels.numpy()))
    scores = []
    for value in sorted(grid):
        total = 0.0
        for train, test in splits:
            svm = fit_svm(x[train], labels[train], value, scheme=scheme, loss=loss, bias=bias)
            if exclusive:
                score = mean_class_accuracy(svm.predict(x[test]), labels[test])
            else:
                score = average_precision(_summed(svm.responses(x[test])), labels[test]).nanmean()
            total += float(score)
        scores.append(total / count)
    return sorted(grid)[max(range(len(scores)), key=scores.__getitem__)]
