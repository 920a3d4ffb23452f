"""Recognition with frozen features: linear SVMs on normalised rows, and what few training images are worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchconv._common import check, check_positive, require
from torchconv.analysis._cka_resample import Interval
from torchconv.analysis._offtheshelf_features import signed_power, unit
from torchconv.analysis._offtheshelf_metrics import average_precision, bootstrap, mean_class_accuracy
from torchconv.analysis._offtheshelf_svm import LinearSVM, choose_C, fit_svm
from torchconv.catalog.parts import part

SHOTS = (1, 2, 5, 10, 20, 50)


@dataclass(frozen=True)
class Recognition:
    """How well a linear SVM on frozen features recognises test images.

    Attributes:
        metric: "mean class accuracy", or "mean average precision" for labels that do not exclude each other.
        score: with its 95 % bootstrap interval over the test images.
        predictions: (N,) labels; None for labels that do not exclude each other.
        responses: (N, K) votes or decisions, summed over views.
        svm: the machines.
    """

    metric: str
    score: Interval
    predictions: Tensor | None
    responses: Tensor
    svm: LinearSVM


@part(
    "off-the-shelf",
    paper="offtheshelf",
    kind="analysis",
    dims=(1, 2, 3),
    keywords="linear probe frozen features transfer learning baseline SVM LIBLINEAR pretrained backbone recognition",
)
def recognise(
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    C: float | None = 1.0,
    scheme: str | None = None,
    loss: str = "hinge",
    bias: bool = False,
    power: float = 1.0,
    ties: str = "lowest",
    draws: int = 1000,
    seed: int = 0,
) -> Recognition:
    """Linear SVMs on normalised features, and their score on test images with its interval.

    Args:
        train: (N, D) of :func:`extract`, or (N, V, D): then every view is a training sample.
        labels: (N,) classes, or (N, K) of 0 and 1 for labels that do not exclude each other.
        test: (M, D), or (M, V, D): then the responses of an image's views are summed.
        test_labels: of the same kind.
        C: of the SVM; None chooses it by cross-validation on the training images.
        scheme: "one-vs-one" with votes or "one-vs-all"; the paper's by default: the former for classes, the latter for
            columns of labels.
        loss: "hinge" or "squared_hinge".
        bias: add a (penalised) bias; the paper's machines have none.
        power: signed power of the normalised components, which are normalised again.
        ties: of votes: "lowest" class or larger "margin".
        draws: of the bootstrap.
        seed: of folds and bootstrap.

    Returns:
        Score, predictions and machines.

    Raises:
        ValueError: features and labels that do not fit.

    Example:
        >>> x, y = torch.randn(40, 6), torch.arange(40) % 2
        >>> x[:, 0] += 4 * y - 2
        >>> found = recognise(x[:20], y[:20], x[20:], y[20:])
        >>> found.metric, found.score.value > 0.8
        ('mean class accuracy', True)

    Reference: A. Sharif Razavian et al. 2014, arXiv 1403.6382.
    """
    check(labels.dim() == test_labels.dim(), "test_labels", tuple(test_labels.shape), f"unlike labels {labels.dim()}-D")
    check(len(test) == len(test_labels), "test_labels", len(test_labels), f"must be one for each of {len(test)} images")
    exclusive = labels.dim() == 1
    scheme = scheme or ("one-vs-one" if exclusive else "one-vs-all")
    train, test = (_prepared(x, power) for x in (train, test))
    if C is None:
        C = choose_C(train, labels, scheme=scheme, loss=loss, bias=bias, seed=seed)
    svm = fit_svm(train, labels, C, scheme=scheme, loss=loss, bias=bias)
    responses = svm.responses(test)
    responses = responses.sum(1) if responses.dim() == 3 else responses
    if exclusive:
        predictions = svm.predict(test, ties).cpu()
        truth = test_labels.cpu()
        score = bootstrap(lambda i: mean_class_accuracy(predictions[i], truth[i]), len(truth), draws=draws, seed=seed)
        return Recognition("mean class accuracy", score, predictions, responses, svm)
    ranked, truth = responses.cpu(), test_labels.cpu()
    score = bootstrap(lambda i: average_precision(ranked[i], truth[i]).nanmean(), len(truth), draws=draws, seed=seed)
    return Recognition("mean average precision", score, None, responses, svm)


def _prepared(x: Tensor, power: float) -> Tensor:
    return unit(x) if power == 1 else unit(signed_power(unit(x), power))


@dataclass(frozen=True)
class Shots:
    """Accuracy with few training images.

    Attributes:
        shots: training images of each class.
        score: mean class accuracy, mean over draws of the training images with its 95 % interval (Student's).
    """

    shots: int
    score: Interval


@part(
    "few-shot-curve",
    paper="offtheshelf",
    kind="analysis",
    dims=(1, 2, 3),
    keywords="few-shot learning curve small training sets linear probe frozen features sample efficiency",
)
def few_shot(
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    shots: Sequence[int] | None = None,
    *,
    draws: int = 10,
    C: float = 1.0,
    scheme: str = "one-vs-one",
    power: float = 1.0,
    seed: int = 0,
) -> list[Shots]:
    """Accuracy of linear SVMs trained on so many images of each class, over several draws of these.

    Args:
        train: (N, D) or (N, V, D) features from which training images are drawn.
        labels: (N,) classes.
        test: features of the test images, always the same.
        test_labels: their classes.
        shots: images of each class; by default those of 1, 2, 5, 10, 20, 50 that the smallest class has.
        draws: training sets of each size; the same ones for features of another network with the same seed.
        C, scheme, power: as in :func:`recognise`.
        seed: of the draws.

    Returns:
        One entry for each size.

    Raises:
        ValueError: more shots than a class has images, fewer than two draws.

    Example:
        >>> x, y = torch.randn(60, 6), torch.arange(60) % 3
        >>> x[torch.arange(60), y] += 5
        >>> [s.shots for s in few_shot(x[:30], y[:30], x[30:], y[30:], draws=3)]
        [1, 2, 5, 10]
    """
    stats = require("scipy.stats", "compare")
    check(labels.dim() == 1, "labels", tuple(labels.shape), "must be (N,) classes")
    check(draws > 1, "draws", draws, "an interval needs at least 2")
    labels, truth = labels.cpu(), test_labels.cpu()
    members = [(labels == c).nonzero().flatten() for c in labels.unique()]
    smallest = min(map(len, members))
    if shots is None:
        shots = [s for s in SHOTS if s <= smallest]
    for count in shots:
        check_positive("shots", count)
        check(count <= smallest, "shots", count, f"the smallest class has {smallest} images")
    train, test = _prepared(train, power), _prepared(test, power)
    generator = torch.Generator().manual_seed(seed)
    orders = [[m[torch.randperm(len(m), generator=generator)] for m in members] for _ in range(draws)]
    found = []
    for count in shots:
        values = []
        for order in orders:
            rows = torch.cat([m[:count] for m in order])
            svm = fit_svm(train[rows.to(train.device)], labels[rows], C, scheme=scheme)
            values.append(float(mean_class_accuracy(svm.predict(test).cpu(), truth)))
        drawn = torch.tensor(values, dtype=torch.float64)
        mean, half = float(drawn.mean()), float(stats.t.ppf(0.975, draws - 1) * drawn.std() / draws**0.5)
        found.append(Shots(count, Interval(mean, mean - half, mean + half, drawn)))
    return found
