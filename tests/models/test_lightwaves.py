"""LightWaveS: features against loops and convolutions, selection against scikit-learn and loops, the estimator."""

from __future__ import annotations

import math
import os
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.feature_selection import f_classif
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from torchconv.data import load
from torchconv.models.sequence.lightwaves import ALPHAS, LightWaveS, candidate_features, candidate_scores
from torchconv.models.sequence.lightwaves_features import (
    KERNELS,
    LightWaveSFeatures,
    base_kernels,
    counts,
    filtered,
    kernel_features,
)
from torchconv.models.sequence.lightwaves_selection import anova_scores, anova_select, best, mrmr_select


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def describe_by_loop(z: np.ndarray) -> list[float]:
    longest = run = 0
    for value in z:
        if value > 0:
            run += 1
        else:
            longest, run = max(longest, run), 0
    return [float(np.mean(z > 0)), float(np.abs(z).max()), longest / len(z), float(np.abs(z).min())]


def filter_by_loop(x: np.ndarray, w: np.ndarray, dilation: int) -> np.ndarray:
    z = np.zeros(len(x))
    for t in range(len(x)):
        for i in range(9):
            at = t + (i - 4) * dilation
            if 0 <= at < len(x):
                z[t] += w[i] * x[at]
    return z / dilation**1.5


def waves(count: int = 24, channels: int = 3, length: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Only channel 1 tells the classes apart."""
    rng = np.random.default_rng(seed)
    y = np.arange(count) % 3
    x = rng.normal(size=(count, channels, length))
    x[:, 1] += 2 * np.sin(np.arange(length) * (0.3 + 0.5 * y[:, None]) + rng.normal(size=(count, 1)))
    return x.astype(np.float32), y


def test_kernels_are_all_with_three_twos_in_order() -> None:
    rows = base_kernels().tolist()
    assert len(rows) == KERNELS == math.comb(9, 3)
    assert rows == sorted(rows)
    assert len({tuple(row) for row in rows}) == KERNELS
    assert all(sorted(row) == [-1] * 6 + [2] * 3 for row in rows)


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 60), st.sampled_from([1, 2, 3, 8, 32]), st.integers(0, 83), st.integers(0, 99))
def test_features_equal_loops(length: int, dilation: int, kernel: int, seed: int) -> None:
    x, w = noise(length, seed=seed), base_kernels(dtype=torch.float64)[kernel]
    z = filter_by_loop(x.numpy(), w.numpy(), dilation)
    second = filter_by_loop(np.abs(z)[::2][: length // 2], w.numpy(), dilation)
    expected = describe_by_loop(z) + describe_by_loop(second)
    np.testing.assert_allclose(kernel_features(x, w[None], dilation)[0], expected, atol=1e-12)


@pytest.mark.parametrize("dilation", [1, 4, 16])
def test_layers_are_dilated_convolutions(dilation: int) -> None:
    x, kernels = noise(3, 50), base_kernels(dtype=torch.float64)
    options = {"dilation": dilation, "padding": 4 * dilation}
    z = F.conv1d(x[:, None], kernels[:, None], **options)
    torch.testing.assert_close(filtered(x[:, None], kernels, dilation), z)
    s = (z.abs() / dilation**1.5)[..., ::2]
    second = F.conv1d(s, kernels[:, None], groups=KERNELS, **options) / dilation**1.5
    found = kernel_features(x, kernels, dilation)
    torch.testing.assert_close(found[..., 5], second.abs().amax(-1))
    torch.testing.assert_close(found[..., 7], second.abs().amin(-1))


def test_constant_series_vanish_away_from_the_ends() -> None:
    z = filtered(torch.full((1, 60), 0.7, dtype=torch.float64), base_kernels(dtype=torch.float64), 2)
    assert z[..., 8:-8].abs().max() < 1e-14
    assert z[..., :8].abs().max() > 0.1


def test_runs_that_reach_the_end_do_not_count() -> None:
    z = torch.tensor([[1.0, 1, -1, 1, 1, 1], [-1, 1, 1, 0, 1, -1], [1, 1, 1, 1, 1, 1], [-1, -1, -1, -1, -1, -1]])
    positive, longest = counts(z)
    assert positive.tolist() == [5, 3, 6, 0]
    assert longest.tolist() == [2, 2, 0, 0]


def test_scale_and_sign() -> None:
    x, kernels = noise(4, 41), base_kernels(dtype=torch.float64)
    plain, scaled, negated = (kernel_features(v, kernels, 2) for v in (x, 2.5 * x, -x))
    torch.testing.assert_close(scaled[..., 1::2], 2.5 * plain[..., 1::2])
    torch.testing.assert_close(scaled[..., 0::2], plain[..., 0::2])
    torch.testing.assert_close(negated[..., [1, 3, 4, 5, 6, 7]], plain[..., [1, 3, 4, 5, 6, 7]])
    torch.testing.assert_close(negated[..., 0], 1 - plain[..., 0])


def test_variants_are_halves_and_short_series_work() -> None:
    x, kernels = noise(2, 21), base_kernels()
    both = kernel_features(x, kernels, 4)
    assert torch.equal(both, torch.cat([kernel_features(x, kernels, 4, v) for v in ("L1", "L2")], -1))
    assert torch.isfinite(kernel_features(x[:, :2], kernels, 32)).all()
    assert kernel_features(x[:, :1], kernels, 1, "L1").shape == (2, 84, 4)
    with pytest.raises(ValueError, match="at least 2 steps"):
        kernel_features(x[:, :1], kernels, 1)
    with pytest.raises(ValueError, match="variant='L3'"):
        kernel_features(x, kernels, 1, "L3")
    with pytest.raises(ValueError, match="kernels="):
        kernel_features(x, kernels[:, :7], 1)


def test_layer_chooses_standardises_and_ignores_other_channels() -> None:
    x, mean, std = noise(3, 4, 30), noise(4, seed=1), noise(4, seed=2).abs() + 1
    rows = [[2, 5, 1], [0, 80, 0], [2, 6, 1], [2, 5, 0]]
    mask = torch.rand(4, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    layer = LightWaveSFeatures(rows, mask, mean=mean, std=std, dilations=(1, 3)).double()
    scaled = (x - mean[:, None]) / std[:, None]
    kernels = base_kernels(dtype=torch.float64)
    every = [kernel_features(scaled[:, c], kernels[[k]], (1, 3)[j])[:, 0] for c, k, j in rows]
    expected = torch.stack(every, 1)[:, mask]
    torch.testing.assert_close(layer(x), expected)
    series = x.clone().requires_grad_()
    layer(series).sum().backward()
    assert series.grad is not None
    assert set(series.grad.abs().sum((0, 2)).nonzero().flatten().tolist()) == {0, 2}
    x[:, [1, 3]] = torch.nan
    torch.testing.assert_close(layer(x), expected)
    with pytest.raises(ValueError, match="C >= 3"):
        layer(x[:, :2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": [[0, 84, 0]]}, "kernel below 84"),
        ({"rows": [[0, 0, 6]]}, "index below 6"),
        ({"rows": [[0, 0]]}, "rows="),
        ({"rows": [[0, 0, 0]], "mask": torch.ones(1, 4)}, r"must be \(1, 8\)"),
        ({"rows": [[0, 0, 0]], "mean": torch.zeros(1)}, "std="),
        ({"rows": [[0, 0, 0]], "dilations": (0,)}, "dilations="),
        ({"rows": [[0, 0, 0]], "variant": "l1"}, "variant="),
    ],
)
def test_layer_refuses(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LightWaveSFeatures(**options)


def test_scores_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 12)), np.arange(30) % 3
    x[:, 4] = 2.0
    scores = anova_scores(x, y)
    rest = [n for n in range(12) if n != 4]
    np.testing.assert_allclose(scores[rest], f_classif(x[:, rest], y)[0])
    assert scores[4] == -1
    chosen, values = anova_select(x, y, 12)
    assert chosen.tolist() == rest
    np.testing.assert_allclose(values, scores[rest], rtol=1e-4)
    assert best(np.array([1.0, 3, 3, -1, 3]), 2).tolist() == [1, 2]


@pytest.mark.filterwarnings("ignore:Features .* are constant")
def test_mrmr_equals_loops_and_leaves_copies() -> None:
    rng = np.random.default_rng(1)
    y = np.arange(60) % 2
    x = rng.normal(size=(60, 15)) + y[:, None] * rng.random(15)
    x[:, 3], x[:, 9] = 1.0, x[:, int(np.argmax(f_classif(x, y)[0]))]
    with np.errstate(all="ignore"):
        relevance = np.nan_to_num(f_classif(x, y)[0])
    chosen = [int(np.argmax(relevance))]
    values = [relevance[chosen[0]]]
    while len(chosen) < 6:
        quotient = np.full(15, -np.inf)
        for n in set(range(15)) - {*chosen, 3}:
            quotient[n] = relevance[n] / np.mean([abs(np.corrcoef(x[:, n], x[:, g])[0, 1]) for g in chosen])
        chosen.append(int(np.argmax(quotient)))
        values.append(quotient[chosen[-1]])
    found, criterion, scores = mrmr_select(x, y, 6)
    assert found.tolist() == sorted(chosen)
    np.testing.assert_allclose(criterion, np.array(values)[np.argsort(chosen)], rtol=1e-5)
    np.testing.assert_allclose(scores, relevance[found], rtol=1e-6)
    assert len({chosen[0], 9} & set(mrmr_select(x, y, 2)[0])) == 1
    assert len(mrmr_select(x, y, 99)[0]) == 14
    order = rng.permutation(60)
    assert np.array_equal(mrmr_select(x[order], y[order], 6)[0], found)


def test_selection_refuses() -> None:
    x = np.arange(12.0).reshape(6, 2)
    for arguments, message in [
        ((x, np.zeros(6), 1), "at least two classes"),
        ((x, np.arange(5), 1), "labels="),
        ((x[0], np.arange(6) % 2, 1), "features="),
        ((x, np.arange(6) % 2, 0), "number=0"),
        ((np.ones((6, 2)), np.arange(6) % 2, 1), "every feature is constant"),
    ]:
        with pytest.raises(ValueError, match=message):
            mrmr_select(*arguments)


def test_candidates_by_channel() -> None:
    x, y = waves(12)
    whole = candidate_scores(x, y)
    assert whole.shape == (3, 84, 6, 8)
    parts = np.concatenate([candidate_scores(x[:, :1], y), candidate_scores(x[:, 1:], y)])
    assert np.array_equal(whole, parts)
    assert np.array_equal(candidate_scores(x[:, [2, 0, 1]], y), whole[[2, 0, 1]])
    one = candidate_features(x[:, 2], "L2", (1, 5))
    torch.testing.assert_close(
        torch.from_numpy(one[:, :, 1]), kernel_features(torch.from_numpy(x[:, 2]), base_kernels(), 5, "L2")
    )


@pytest.mark.parametrize("variant", ["L1", "L2", "L1L2"])
def test_estimator_finds_the_channel(variant: str) -> None:
    x, y = waves()
    unseen, truth = waves(60, seed=1)
    model = LightWaveS(variant, 30).fit(x, y)
    assert model.score(unseen, truth) > 0.85
    assert set(model.rows_[:, 0]) == {1}
    assert model.transform(unseen).shape == (60, 30) == (60, model.mask_.sum())
    assert len(model.candidates_) == 90
    assert set(model.selected_) <= set(model.candidates_)
    unseen[:, [0, 2]] = 1e9
    assert model.score(unseen, truth) > 0.85
    layers = {name.split("_")[3] for name in model.get_feature_names_out()}
    assert layers <= {"layer1", "layer2"} - ({"layer1"} if variant == "L2" else set())
    assert len(set(model.get_feature_names_out())) == 30


def test_estimator_is_one_of_scikit_learn() -> None:
    x, y = waves(30)
    labels = np.array(["a", "b", "c"])[y]
    model = LightWaveS("L1", n_features=20, dilations=(1, 2))
    assert model.get_params()["n_features"] == 20
    assert clone(model).set_params(n_features=5).fit(x, labels).transform(x).shape == (30, 5)
    assert set(model.fit(x, labels).predict(x)) <= set(labels)
    assert np.array_equal(model.classes_, ["a", "b", "c"])
    assert cross_val_score(model, x, labels, cv=2).mean() > 0.7
    chain = make_pipeline(LightWaveS("L1", 20), StandardScaler(), LogisticRegression()).fit(x, labels)
    assert chain.score(x, labels) > 0.9
    twin = pickle.loads(pickle.dumps(model))
    assert np.array_equal(twin.transform(x), model.transform(x))
    assert np.array_equal(model.transform(torch.from_numpy(x)), model.transform(x.tolist()))
    assert model.fit_transform(x[:, 1], labels).shape == (30, 20)


def test_ridge_is_that_of_normalised_features() -> None:
    x, y = waves(30)
    x, y = x[y < 2], y[y < 2]
    model = LightWaveS(n_features=10, dtype="float64").fit(x, y)
    features = model.transform(x)
    centred = features - features.mean(0)
    centred /= np.linalg.norm(centred, axis=0)
    alpha = model.classifier_[-1].alpha_ / len(x)
    assert np.isclose(ALPHAS, alpha).any()
    target = 2.0 * y - 1
    weight = np.linalg.solve(centred.T @ centred + alpha * np.eye(10), centred.T @ (target - target.mean()))
    np.testing.assert_allclose(model.decision_function(x), centred @ weight + target.mean(), atol=1e-8)


def test_module_decides_as_the_estimator_and_exports() -> None:
    x, y = waves()
    model = LightWaveS(n_features=15).fit(x, y)
    module = model.to_torch()
    series = torch.from_numpy(x)
    with torch.no_grad():
        np.testing.assert_allclose(module(series), model.decision_function(x), atol=1e-4)
        shapes = ({0: torch.export.Dim("batch", min=1)},)
        program = torch.export.export(module, (series[:4],), dynamic_shapes=shapes)
        torch.testing.assert_close(program.module()(series), module(series))


def test_scores_from_elsewhere_subsets_and_data_taken_as_they_are() -> None:
    x, y = waves()
    scaled = (x - x.mean((0, 2), keepdims=True)) / x.std((0, 2), keepdims=True)
    scores = np.concatenate([candidate_scores(scaled[:, [c]], y) for c in range(3)])
    plain = LightWaveS(n_features=10, standardise=False)
    assert np.array_equal(plain.fit(scaled, y, scores=scores).selected_, plain.fit(scaled, y).selected_)
    with pytest.raises(ValueError, match="scores="):
        plain.fit(x, y, scores=scores[:2])
    few = LightWaveS(n_features=10, max_samples=12, random_state=3).fit(x, y)
    assert np.array_equal(few.selected_, clone(few).fit(x, y).selected_)
    assert few.score(x, y) > 0.6
    order = np.random.default_rng(0).permutation(len(x))
    wide = LightWaveS(n_features=10, dtype="float64")
    assert np.array_equal(wide.fit(x, y).selected_, wide.fit(x[order], y[order]).selected_)


def test_before_fitting() -> None:
    for call in ("predict", "transform", "decision_function"):
        with pytest.raises(NotFittedError, match=r"call fit\(X, y\) first"):
            getattr(LightWaveS(), call)(np.zeros((2, 1, 20)))
    with pytest.raises(NotFittedError):
        LightWaveS().to_torch()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"X": np.zeros((24, 3, 40))}, "no feature differs"),
        ({"X": np.full((24, 3, 40), np.nan)}, "NaN or infinite"),
        ({"X": [[1.0, 2.0], [1.0]]}, "equal length"),
        ({"X": np.zeros((24, 3, 1))}, "at least 2 steps"),
        ({"X": np.zeros((24, 3, 4, 4))}, r"must be \(samples, channels, steps\)"),
        ({"X": np.zeros((0, 3, 4))}, "no series"),
        ({"y": np.zeros(24)}, "two classes"),
        ({"y": np.arange(23)}, r"y=\(23,\)"),
        ({"n_features": 0}, "n_features=0"),
        ({"n_candidates": -1}, "n_candidates=-1"),
        ({"variant": "L3"}, "variant='L3'"),
        ({"dtype": "float16"}, "dtype='float16'"),
        ({"dilations": ()}, "dilations="),
    ],
)
def test_fit_refuses(change: dict, message: str) -> None:
    x, y = waves()
    data = {"X": x, "y": y} | {k: v for k, v in change.items() if k in ("X", "y")}
    with pytest.raises(ValueError, match=message):
        LightWaveS(**{k: v for k, v in change.items() if k not in data}).fit(**data)


def test_other_channels_are_refused() -> None:
    x, y = waves(12)
    with pytest.raises(ValueError, match="fitted on 3 channels"):
        LightWaveS(n_features=5, dilations=(1,)).fit(x, y).predict(x[:, :2])


def test_real_problem() -> None:
    """BasicMotions, where the authors report an accuracy of 1."""
    root = os.environ.get("TORCHCONV_DATA")
    if not root or not any(os.path.exists(os.path.join(root, p, "BasicMotions")) for p in ("ucr_uea", "")):
        pytest.skip("needs BasicMotions in $TORCHCONV_DATA")
    data = load("BasicMotions")
    model = LightWaveS().fit(data.train.x, data.train.y)
    assert model.score(data.test.x, data.test.y.numpy()) > 0.95


def test_empty_batches_and_halves() -> None:
    layer = LightWaveSFeatures([[0, 3, 0], [2, 17, 5]])
    assert layer(torch.zeros(0, 3, 40)).shape == (0, 16)
    x = noise(2, 3, 40).bfloat16()
    found = layer(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, layer(x.float()).bfloat16())
