"""Selection of features for LightWaveS: an ANOVA filter, then mRMR (arXiv 2204.01379).

The filter keeps the features with the largest one-way ANOVA F. mRMR starts from the largest F and adds, one at a time,
the feature with the largest F divided by its mean |Pearson correlation| with those already chosen (the F-test
correlation quotient, Zhao et al., arXiv 1908.05376).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchconv._common import check, check_positive, require

Array = NDArray[Any]
DECIMALS = 7


def anova_scores(features: Array, labels: Array, decimals: int | None = None) -> Array:
    """One-way ANOVA F of every feature, by scikit-learn; NaN and infinities become 0, as in the authors' code.

    Args:
        features: (samples, features); the type is that of the computation.
        labels: (samples,) of at least two classes.
        decimals: round features first, so that noise in the last digits of nearly constant ones gives no score.

    Returns:
        (features,) scores; features that are constant before rounding have −1, so that they come last.

    Raises:
        ValueError: shapes that do not fit, or a single class.

    Reference: Pantiskas et al., arXiv 2204.01379.
    """
    require("sklearn", "compare")
    from sklearn.feature_selection import f_classif

    _check(features, labels)
    scores = np.where(np.ptp(features, axis=0) > 0, 0.0, -1.0)
    rounded = features if decimals is None else np.round(features, decimals)
    varies = np.ptp(rounded, axis=0) > 0
    if varies.any():
        with np.errstate(all="ignore"):
            found = np.nan_to_num(f_classif(rounded[:, varies], labels)[0], nan=0.0, posinf=0.0, neginf=0.0)
        scores[varies] = np.maximum(found, 0.0)  # round-off can make it negative
    return scores


def best(scores: Array, number: int) -> Array:
    """Indices of the ``number`` largest scores ≥ 0, ascending; of equal scores the first ones are taken."""
    order = np.argsort(-scores, kind="stable")[:number]
    return np.sort(order[scores[order] >= 0])


def anova_select(features: Array | Tensor, labels: Array | Tensor, number: int) -> tuple[Array, Array]:
    """The ``number`` features of largest ANOVA F, constant ones never among them.

    Features are rounded to 7 decimals for the scores, as in the authors' code.

    Args:
        features: (samples, features).
        labels: (samples,).
        number: how many; fewer come back where there are not so many that vary.

    Returns:
        Ascending indices and their F.

    Raises:
        ValueError: shapes that do not fit, a single class, or ``number`` below 1.

    Example:
        >>> x = np.array([[0.0, 1.0, 5.0], [0.1, 0.0, 5.0], [1.0, 1.0, 5.0], [1.2, 0.0, 5.0]])
        >>> anova_select(x, np.array([0, 0, 1, 1]), 1)[0]
        array([0])

    Reference: Pantiskas et al., arXiv 2204.01379.
    """
    check_positive("number", number)
    scores = anova_scores(np.asarray(features), np.asarray(labels), DECIMALS)
    chosen = best(scores, number)
    return chosen, scores[chosen]


def mrmr_select(features: Array | Tensor, labels: Array | Tensor, number: int) -> tuple[Array, Array, Array]:
    """Choose relevant features that repeat each other little (minimum redundancy, maximum relevance).

    Args:
        features: (samples, features).
        labels: (samples,).
        number: how many; fewer come back when no remaining feature has a positive score.

    Returns:
        Ascending indices; the criterion's value when each was chosen (the first one's is its F); their F.

    Raises:
        ValueError: shapes that do not fit, a single class, no feature that varies, or ``number`` below 1.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(500, 3))
        >>> y = (x[:, 0] + 0.9 * x[:, 1] > 0).astype(int)
        >>> mrmr_select(np.hstack([x, x[:, :1]]), y, 2)[0]  # the copy of the best one is left
        array([0, 1])

    Reference: Pantiskas et al., arXiv 2204.01379; Zhao et al., arXiv 1908.05376.
    """
    check_positive("number", number)
    features, labels = np.asarray(features), np.asarray(labels)
    relevance = anova_scores(features, labels)
    varies = np.flatnonzero(relevance >= 0)
    check(len(varies) > 0, "features", features.shape, "every feature is constant; nothing can be chosen")
    relevance = relevance[varies].astype(np.float32).astype(np.float64)
    columns = torch.from_numpy(features[:, varies].astype(np.float64))
    columns = columns - columns.mean(0)
    columns = columns / columns.norm(dim=0)
    redundancy, free = np.zeros(len(varies)), np.ones(len(varies), dtype=bool)
    chosen: list[int] = []
    criterion: list[float] = []
    quotient = relevance
    for count in range(1, min(number, len(varies)) + 1):
        pick = int(np.argmax(np.where(free, quotient, -np.inf)))
        if count > 1 and quotient[pick] <= 0:
            break
        chosen.append(pick)
        criterion.append(float(quotient[pick]))
        free[pick] = False
        redundancy += (columns[:, pick] @ columns).abs().numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            quotient = np.where(relevance > 0, relevance / (redundancy / count), 0.0)
    order = np.argsort(chosen)
    picks = np.array(chosen)[order]
    return varies[picks], np.array(criterion)[order], relevance[picks]


def _check(features: Array, labels: Array) -> None:
    check(features.ndim == 2 and len(features) > 1, "features", features.shape, "must be (samples > 1, features)")
    check(labels.shape == (len(features),), "labels", labels.shape, f"must be ({len(features)},), one a sample")
    check(len(np.unique(labels)) > 1, "labels", np.unique(labels).tolist(), "at least two classes are needed")
