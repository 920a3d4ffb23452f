"""LightWaveS: classification of multivariate time series by a few wavelet-scattering features (Pantiskas et al. 2022).

ROCKET describes a series by 10 000 random kernels and 20 000 numbers. LightWaveS (arXiv 2204.01379) tries 84 fixed
kernels at six dilations on every channel by itself, scatters twice, and keeps 500 numbers: by an ANOVA filter, which
can run channel by channel on different machines, then by mRMR. A ridge classifier follows. Channels without a chosen
feature need not be recorded any more.

    candidates = C · 84 · 6 · 8 features;   best 1500 by F;   500 by F / mean |correlation| with those chosen

Cost: fitting C · 84 · 6 · 9 · 1.5 · T multiply-adds a series; prediction 9 · 1.5 · T for each of at most 500 kernel
applications.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive, require
from torchconv.catalog import part
from torchconv.models.sequence.lightwaves_features import (
    DILATIONS,
    FEATURES,
    KERNELS,
    VARIANTS,
    LightWaveSFeatures,
    base_kernels,
    check_dilations,
    kernel_features,
)
from torchconv.models.sequence.lightwaves_selection import DECIMALS, anova_scores, best, mrmr_select

Array = NDArray[Any]
ALPHAS = np.logspace(-3, 3, 10)
BLOCK = 2**18  # numbers of a filtered block: stays in a core's cache
sklearn: Any = require("sklearn.base", "compare")


def as_series(X: Any, dtype: Any = np.float32, *, least: int = 2) -> Array:
    """Series as aeon takes them: (samples, channels, steps), or (samples, steps) of one channel; finite numbers.

    Raises:
        ValueError: another shape, unequal lengths, values that are not finite, or fewer than ``least`` steps.
    """
    if isinstance(X, Tensor):
        X = X.detach().cpu().numpy()
    try:
        series = np.asarray(X, dtype=dtype)
    except (TypeError, ValueError):
        raise ValueError("X: must be numbers, series of equal length; pad or cut them first") from None
    series = series[:, None] if series.ndim == 2 else series
    check(series.ndim == 3, "X", series.shape, "must be (samples, channels, steps) or (samples, steps)")
    check(0 not in series.shape[:2], "X", series.shape, "holds no series")
    check(series.shape[2] >= least, "X", series.shape, f"series need at least {least} steps")
    check(bool(np.isfinite(series).all()), "X", series.shape, "holds NaN or infinite values; fill them in first")
    return np.ascontiguousarray(series)


def channel_statistics(X: Array) -> tuple[Array, Array]:
    """Mean and spread (population standard deviation + 1e-8) of each channel over samples and steps."""
    channels = range(X.shape[1])
    means = np.array([X[:, c].mean() for c in channels], dtype=X.dtype)
    return means, np.array([np.std(X[:, c]) + X.dtype.type(1e-8) for c in channels], dtype=X.dtype)


def candidate_features(
    x: Array, variant: str = "L1L2", dilations: Sequence[int] = DILATIONS, *, device: Any = "cpu"
) -> Array:
    """All features of one channel, (samples, T) → (samples, 84, dilations, 4 or 8), in blocks of bounded memory."""
    check_choice("variant", variant, VARIANTS)
    dilations = check_dilations(dilations)
    found = np.empty((len(x), KERNELS, len(dilations), VARIANTS[variant]), dtype=x.dtype)
    kernels, series = base_kernels(device=device), torch.from_numpy(x)
    with torch.no_grad():
        for rows in _blocks(len(x), KERNELS * x.shape[1]):
            block = series[rows].to(device)
            for n, dilation in enumerate(dilations):
                found[rows, :, n] = kernel_features(block, kernels, dilation, variant).cpu().numpy()
    return found


def candidate_scores(
    X: Any, y: Any, variant: str = "L1L2", dilations: Sequence[int] = DILATIONS, *, device: Any = "cpu"
) -> Array:
    """ANOVA F of all candidates, channel by channel: the part of fitting that can be spread over machines.

    Scores of a subset of the channels are those rows of the whole; put them together along the first axis and give
    them to :meth:`LightWaveS.fit`.

    Args:
        X: (samples, channels, steps), already standardised if the estimator is to standardise.
        y: (samples,) labels.
        variant, dilations: as the estimator's.
        device: where features are computed.

    Returns:
        (channels, 84, dilations, 4 or 8); −1 for features that are constant.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(8, 2, 30))
        >>> candidate_scores(x, [0, 1] * 4).shape
        (2, 84, 6, 8)

    Reference: Pantiskas et al., arXiv 2204.01379.
    """
    series, labels = as_series(X, _precision(X)), np.asarray(y)
    scores = []
    for channel in range(series.shape[1]):
        features = candidate_features(np.ascontiguousarray(series[:, channel]), variant, dilations, device=device)
        scores.append(anova_scores(features.reshape(len(features), -1), labels, DECIMALS).reshape(features.shape[1:]))
    return np.stack(scores)


@part(
    "lightwaves",
    paper="lightwaves",
    kind="model",
    dims=(1,),
    keywords="time series classification LightWaveS ROCKET scikit-learn estimator feature selection ANOVA mRMR edge",
)
class LightWaveS(sklearn.ClassifierMixin, sklearn.TransformerMixin, sklearn.BaseEstimator):
    """Classifier, and transformer to the chosen features, with scikit-learn's interface.

    Args:
        variant: "L1" (features of the first scattering layer), "L2" (of the second) or "L1L2".
        n_features: to keep in the end.
        n_candidates: to keep after the ANOVA filter; three times ``n_features`` by default.
        dilations: of the kernels.
        standardise: remove each channel's mean and spread, as seen in training; False for data that are normalised.
        max_samples: features are selected on a random subset of so many training series, where there are more.
        dtype: "float32", as the authors, or "float64".
        device: where features are computed.
        random_state: seed of the subset, which is all that is random.

    Attributes:
        classes_: labels.
        rows_: (n, 3) kernel applications in use: channel, kernel, index into ``dilations``.
        mask_: (n, 4 or 8) which of their features.
        candidates_, selected_: indices among all C · 84 · dilations · features after each step of the selection.
        features_: the :class:`LightWaveSFeatures` that computes the features.
        classifier_: scikit-learn pipeline of a scaler and ``RidgeClassifierCV``.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> y = np.array(["slow", "fast"] * 10)
        >>> waves = np.where(y == "slow", 0.2, 0.6)[:, None] * np.arange(40)
        >>> x = np.sin(waves) + 0.3 * rng.normal(size=waves.shape)
        >>> model = LightWaveS(n_features=20).fit(x, y)
        >>> model.transform(x).shape, model.score(x, y)
        ((20, 20), 1.0)

    Reference: Pantiskas et al., arXiv 2204.01379.
    """

    def __init__(
        self,
        variant: str = "L1L2",
        n_features: int = 500,
        n_candidates: int | None = None,
        dilations: Sequence[int] = DILATIONS,
        standardise: bool = True,
        max_samples: int = 1500,
        dtype: str = "float32",
        device: Any = "cpu",
        random_state: int | None = None,
    ) -> None:
        self.variant = variant
        self.n_features = n_features
        self.n_candidates = n_candidates
        self.dilations = dilations
        self.standardise = standardise
        self.max_samples = max_samples
        self.dtype = dtype
        self.device = device
        self.random_state = random_state

    def fit(self, X: Any, y: Any, scores: Array | None = None) -> LightWaveS:
        """Select features and fit the classifier.

        Args:
            X: (samples, channels, steps) or (samples, steps).
            y: labels of any kind, at least two.
            scores: of :func:`candidate_scores`, where they were computed elsewhere.

        Raises:
            ValueError: an option out of range, series or labels that cannot be used, or nothing that varies.
        """
        self._check_options()
        series = as_series(X, self.dtype, least=1 if self.variant == "L1" else 2)
        labels = np.asarray(y)
        check(labels.shape == series.shape[:1], "y", labels.shape, f"must be ({len(series)},), one label a series")
        self.classes_ = np.unique(labels)
        check(len(self.classes_) > 1, "y", self.classes_.tolist(), "at least two classes are needed")
        mean, std = channel_statistics(series) if self.standardise else (None, None)
        sample = np.arange(len(series))
        if len(series) > self.max_samples:
            sample = np.random.RandomState(self.random_state).choice(len(series), self.max_samples, replace=False)
            check(len(np.unique(labels[sample])) > 1, "max_samples", self.max_samples, "the subset has one class only")
        shape = (series.shape[1], KERNELS, len(self.dilations), VARIANTS[self.variant])
        if scores is None:
            scaled = series[sample]
            if mean is not None and std is not None:
                scaled = (scaled - mean[:, None]) / std[:, None]
            scores = candidate_scores(scaled, labels[sample], self.variant, self.dilations, device=self.device)
        check(np.shape(scores) == shape, "scores", np.shape(scores), f"must be {shape}")
        self.candidates_ = best(np.ravel(scores), self.n_candidates or 3 * self.n_features)
        check(len(self.candidates_) > 0, "X", series.shape, "no feature differs between the series")
        self.n_channels_ = series.shape[1]
        self._keep(self.candidates_, shape, mean, std)
        picked, *_ = mrmr_select(self._compute(series[sample]), labels[sample], self.n_features)
        self.selected_ = self.candidates_[picked]
        self._keep(self.selected_, shape, mean, std)
        from sklearn.linear_model import RidgeClassifierCV
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        # The authors divide by the norm of a feature, not its spread: alphas grow by the number of series.
        ridge = RidgeClassifierCV(alphas=ALPHAS * len(series))
        self.classifier_ = make_pipeline(StandardScaler(), ridge).fit(self._compute(series), labels)
        return self

    def transform(self, X: Any) -> Array:
        """The chosen features, (samples, features), by kernel application, then by feature."""
        return self._compute(self._series(X))

    def decision_function(self, X: Any) -> Array:
        """Scores of the classes; of the second class where there are two."""
        features = self.transform(X)
        found: Array = self.classifier_.decision_function(features)
        return found

    def predict(self, X: Any) -> Array:
        """Labels."""
        features = self.transform(X)
        found: Array = self.classifier_.predict(features)
        return found

    def get_feature_names_out(self, input_features: Any = None) -> Array:
        """Names such as ``channel0_kernel3_dilation4_layer1_ppv``."""
        self._fitted()
        names = []
        for (channel, kernel, step), kept in zip(self.rows_, self.mask_, strict=True):
            for n in np.flatnonzero(kept):
                layer = 2 if self.variant == "L2" else 1 + n // len(FEATURES)
                place = f"channel{channel}_kernel{kernel}_dilation{self.dilations[step]}"
                names.append(f"{place}_layer{layer}_{FEATURES[n % len(FEATURES)]}")
        return np.array(names, dtype=object)

    def to_torch(self) -> nn.Module:
        """Features and classifier as one module, (B, C, T) → (B, classes) or, of two classes, (B, 1).

        The scaler is folded into the linear layer; it exports as any other module does.
        """
        self._fitted()
        scaler, ridge = (step for _, step in self.classifier_.steps)
        weight = np.atleast_2d(ridge.coef_) / scaler.scale_
        bias = np.atleast_1d(ridge.intercept_) - weight @ scaler.mean_
        kind = getattr(torch, self.dtype)
        linear = nn.Linear(weight.shape[1], weight.shape[0], dtype=kind)
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(weight))
            linear.bias.copy_(torch.from_numpy(bias))
        features = LightWaveSFeatures(self.rows_, self.mask_, *self._options())
        return nn.Sequential(OrderedDict(features=features, classifier=linear)).eval()

    def _check_options(self) -> None:
        check_choice("variant", self.variant, VARIANTS)
        check_choice("dtype", self.dtype, ("float32", "float64"))
        for name in ("n_features", "max_samples"):
            check_positive(name, getattr(self, name))
        if self.n_candidates is not None:
            check_positive("n_candidates", self.n_candidates)
        check_dilations(self.dilations)

    def _keep(self, indices: Array, shape: tuple[int, ...], mean: Array | None, std: Array | None) -> None:
        """Kernel applications and mask of candidates given by their indices."""
        *places, feature = np.unravel_index(indices, shape)
        self.rows_, inverse = np.unique(np.stack(places, 1), axis=0, return_inverse=True)
        self.mask_ = np.zeros((len(self.rows_), shape[3]), dtype=bool)
        self.mask_[inverse.ravel(), feature] = True
        self.mean_, self.std_ = mean, std
        self.features_ = LightWaveSFeatures(self.rows_, self.mask_, *self._options(), device=self.device)

    def _options(self) -> tuple[Any, ...]:
        return self.variant, self.mean_, self.std_, self.dilations

    def _compute(self, series: Array) -> Array:
        found = np.empty((len(series), len(self.features_.keep)), dtype=series.dtype)
        largest = max(len(members) for members in self.features_.groups.values())
        with torch.no_grad():
            for rows in _blocks(len(series), largest * series.shape[2]):
                block = torch.from_numpy(series[rows]).to(self.device)
                found[rows] = self.features_(block).cpu().numpy()
        return found

    def _fitted(self) -> None:
        if not hasattr(self, "classifier_"):
            from sklearn.exceptions import NotFittedError

            raise NotFittedError("this LightWaveS is not fitted; call fit(X, y) first")

    def _series(self, X: Any) -> Array:
        self._fitted()
        series = as_series(X, self.dtype, least=1 if self.variant == "L1" else 2)
        channels = series.shape[1]
        check(channels == self.n_channels_, "X", series.shape, f"fitted on {self.n_channels_} channels")
        return series


def _blocks(count: int, size: int) -> Iterator[slice]:
    """Slices of so many series that a block of ``size`` numbers a series stays small."""
    step = max(1, BLOCK // max(1, size))
    return (slice(start, start + step) for start in range(0, count, step))


def _precision(X: Any) -> Any:
    return np.float64 if getattr(X, "dtype", None) in (np.float64, torch.float64) else np.float32
