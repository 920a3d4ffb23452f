"""How recognition and retrieval are scored: average precision by four rules, mean accuracy of classes, top four."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchconv._common import check, check_choice, check_positive, require
from torchconv.analysis._cka_resample import Interval


def average_precision(scores: Tensor, positive: Tensor, rule: str = "all") -> Tensor:
    """Average precision of a ranking by score, for each column; equal scores keep their order.

    Args:
        scores: (N,) or (N, K), larger is better.
        positive: 0/1 or bool, of the same shape.
        rule: "all": mean of the precision at each positive. "11-point" (VOC 2007): mean over recall t = 0, 0.1, …, 1 of
            the best precision at recall ≥ t.

    Returns:
        A number, or (K,), float64; NaN for a column without positives.

    Raises:
        ValueError: shapes that differ, an unknown rule.

    Example:
        >>> scores, positive = torch.tensor([0.9, 0.8, 0.1]), torch.tensor([1, 0, 1])
        >>> round(float(average_precision(scores, positive)), 4)
        0.8333
    """
    check_choice("rule", rule, ("all", "11-point"))
    check(scores.shape == positive.shape, "positive", tuple(positive.shape), f"must be {tuple(scores.shape)}")
    order = scores.argsort(dim=0, descending=True, stable=True)
    hits = positive.bool().gather(0, order)
    found = hits.cumsum(0)
    counts = torch.arange(1, len(scores) + 1, device=scores.device)
    precision = found.double() / counts.view(-1, *[1] * (scores.dim() - 1))
    total = hits.sum(0)
    if rule == "all":
        return (precision * hits).sum(0) / total
    best = precision.flip(0).cummax(0).values.flip(0)  # precision at this recall or a higher one
    points = []
    for tenth in range(11):
        reached = (10 * found >= tenth * total).long().argmax(0, keepdim=True)  # in whole numbers, so exact
        points.append(best.gather(0, reached)[0])
    return torch.where(total > 0, torch.stack(points).mean(0), torch.nan)


def area_under_roc(scores: Tensor, positive: Tensor) -> Tensor:
    """Area under the ROC curve for each column of (N,) or (N, K); equal scores count half.

    Raises:
        ValueError: a column of one class only.
    """
    score = require("sklearn.metrics", "compare").roc_auc_score
    s, p = scores.detach().double().cpu(), positive.bool().cpu()
    check(bool((p.any(0) & ~p.all(0)).all()), "positive", "of one class", "each column needs positives and negatives")
    found = score(p.numpy(), s.numpy(), average=None)
    return torch.as_tensor(found, dtype=torch.float64)


def mean_class_accuracy(predicted: Tensor, labels: Tensor) -> Tensor:
    """Mean over the classes that occur of the share of their images that are right; float64.

    Example:
        >>> float(mean_class_accuracy(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 1])))
        0.75
    """
    check(predicted.shape == labels.shape, "predicted", tuple(predicted.shape), f"must be {tuple(labels.shape)}")
    _, which, counts = labels.unique(return_inverse=True, return_counts=True)
    right = torch.zeros(len(counts), dtype=torch.float64, device=labels.device)
    right.index_add_(0, which, (predicted == labels).double())
    return (right / counts).mean()


def ranking_precision(ranking: Tensor, positive: Tensor, junk: Tensor | None = None, rule: str = "trapezoid") -> Tensor:
    """Average precision of each query's ranking of a database.

    Args:
        ranking: (Q, R) database indices, best first; R may be less than the database.
        positive: (Q, M) 0/1 or bool by database index. Those that the ranking leaves out count as never found.
        junk: (Q, M) of the same kind: taken out of the ranking before it is scored. For queries that are in the
            database (Holidays), the query itself.
        rule: "trapezoid" (Oxford and Paris buildings): recall step times the mean of old and new precision, starting at
            precision 1. "rectangle": mean precision at the positives.

    Returns:
        (Q,) float64; NaN for a query without positives.

    Raises:
        ValueError: shapes that do not fit, an unknown rule.
    """
    check_choice("rule", rule, ("trapezoid", "rectangle"))
    fits = ranking.dim() == 2 and positive.dim() == 2 and len(ranking) == len(positive)
    check(fits, "positive", tuple(positive.shape), f"must be (queries, database) for a ranking {tuple(ranking.shape)}")
    kept = torch.ones_like(ranking, dtype=torch.bool)
    if junk is not None:
        check(junk.shape == positive.shape, "junk", tuple(junk.shape), f"must be {tuple(positive.shape)}")
        kept = ~junk.bool().gather(1, ranking)
    hits = positive.bool().gather(1, ranking) & kept
    place, found = kept.cumsum(1).double(), hits.cumsum(1).double()
    new = found / place.clamp(min=1)
    old = torch.where(place > 1, (found - 1) / (place - 1).clamp(min=1), 1.0)  # one place before a hit
    height = (old + new) / 2 if rule == "trapezoid" else new
    return (height * hits).sum(1) / positive.bool().sum(1)


def group_score(ranking: Tensor, group: int = 4) -> Tensor:
    """Mean number of a query's own group among the first ``group`` places, the query included (UKBench: 0 … 4).

    Args:
        ranking: (N, ≥ group) of a database by itself, in which ``group`` consecutive images are one object.
        group: images of an object.
    """
    check_positive("group", group)
    whole = ranking.dim() == 2 and len(ranking) % group == 0 and ranking.shape[1] >= group
    check(whole, "ranking", tuple(ranking.shape), f"must hold whole groups of {group} and at least {group} places")
    own = torch.arange(len(ranking), device=ranking.device)[:, None] // group
    return (ranking[:, :group] // group == own).sum(1).double().mean()


def bootstrap(
    score: Callable[[Tensor], Tensor | float], count: int, *, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> Interval:
    """A score and its percentile interval over images (or queries) drawn with replacement.

    Args:
        score: from indices (n,) to a number, for instance ``lambda rows: per_query[rows].mean()``.
        count: how many images there are.
        draws: resampled sets.
        level: of the interval.
        seed: of the draws.

    Example:
        >>> right = torch.tensor([1.0, 0.0, 1.0, 1.0])
        >>> found = bootstrap(lambda rows: right[rows].mean(), 4, draws=50)
        >>> found.value, found.low <= 0.75 <= found.high
        (0.75, True)
    """
    check_positive("count", count)
    check(draws > 1, "draws", draws, "must be at least 2")
    check(0 < level < 1, "level", level, "must lie between 0 and 1")
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor(
        [float(score(torch.randint(count, (count,), generator=generator))) for _ in range(draws)], dtype=torch.float64
    )
    tail = (1 - level) / 2
    low, high = (float(values.nanquantile(q)) for q in (tail, 1 - tail))
    return Interval(float(score(torch.arange(count))), low, high, values)
