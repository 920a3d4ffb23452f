"""CKA, RSA, two-sample tests: brute-force oracles, invariances, tables of real modules, the protocol on folders."""

from __future__ import annotations

import itertools
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from torchconv.analysis import cka as lib
from torchconv.analysis.inspection import inspect_model, write_report
from torchconv.analysis.rsa import compare_rdms, mantel, rdm, rsa, upper

pytestmark = pytest.mark.filterwarnings("ignore:biased CKA")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def related(n: int, p: int, q: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = drawn(n, p, seed=seed) + 2
    return x, x @ drawn(p, q, seed=seed + 1) + drawn(n, q, seed=seed + 2)


def rotation(p: int, seed: int = 5) -> Tensor:
    return torch.linalg.qr(drawn(p, p, seed=seed)).Q


# -- CKA ---------------------------------------------------------------------------------------------------------------


def test_unbiased_hsic_is_the_mean_over_four_different_stimuli() -> None:
    x, y = related(7, 3, 4)
    k, l = lib.gram(x), lib.gram(y, "rbf")  # noqa: E741
    terms = [float(k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q])) for i, j, q, r in itertools.permutations(range(7), 4)]
    assert float(lib.hsic(k, l)) == pytest.approx(sum(terms) / len(terms), rel=1e-10)
    centring = torch.eye(7, dtype=torch.float64) - 1 / 7
    expected = torch.trace(k @ centring @ l @ centring) / 36
    torch.testing.assert_close(lib.hsic(k, l, "biased"), expected)


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(5, 30), p=st.integers(1, 30), q=st.integers(1, 30), kernel=st.sampled_from(("linear", "rbf")),
    estimator=st.sampled_from(("biased", "unbiased")),
)  # fmt: skip
def test_cka_does_not_see_rotations_scales_and_order(n: int, p: int, q: int, kernel: str, estimator: str) -> None:
    x, y = related(n, p, q)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = lib.cka(x, y, kernel, estimator)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
        for other in (
            lib.cka(y, x, kernel, estimator),
            lib.cka(x @ rotation(p), 0.1 * y @ rotation(q), kernel, estimator),
            lib.cka(x[order], y[order], kernel, estimator),
            lib.cka(x + drawn(p, seed=9), y, kernel, estimator),
        ):
            torch.testing.assert_close(other, value, equal_nan=True, rtol=1e-6, atol=1e-8)
        k, l = (lib.gram(v, kernel) for v in (x, y))  # noqa: E741
        pairs = ((k, l), (k, k), (l, l))
        cross, first, second = (lib.hsic(a, b, estimator) for a, b in pairs)
        if first > 0 and second > 0:
            torch.testing.assert_close(value, cross / (first * second).sqrt(), rtol=1e-6, atol=1e-8)
    if estimator == "biased":
        assert -1e-9 <= float(value) <= 1 + 1e-9


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_gradient_and_self_similarity(kernel: str, estimator: str) -> None:
    x, y = related(9, 3, 2)
    torch.testing.assert_close(lib.cka(x, x, kernel, estimator), x.new_ones(()))
    assert torch.autograd.gradcheck(lambda a: lib.cka(a, y, kernel, estimator), x.requires_grad_())


def test_limits() -> None:
    x, y = related(30, 5, 6)
    wide = lib.cka(x, y, "rbf", sigma=1e4)
    torch.testing.assert_close(wide, lib.cka(x, y), rtol=1e-5, atol=1e-6)
    stretch = torch.diag(torch.logspace(0, 2, 5, dtype=torch.float64))
    assert abs(float(lib.cka(x @ stretch, y) - lib.cka(x, y))) > 0.05
    found = [(a, b) for a, b in ((drawn(20, 400, seed=2 * s), drawn(20, 400, seed=2 * s + 1)) for s in range(20))]
    assert min(float(lib.cka(a, b, estimator="biased")) for a, b in found) > 0.8
    assert abs(sum(float(lib.cka(a, b)) for a, b in found) / 20) < 0.05
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    assert float(lib.cka(x, y[order])) < 0.2 < 0.4 < float(lib.cka(x, y))


def test_bandwidth_leaves_identical_stimuli_out() -> None:
    x = torch.tensor([[0.0], [0.0], [1.0], [3.0]], dtype=torch.float64)
    assert float(lib.rbf_bandwidth(x)) ** 2 == pytest.approx(np.median([1, 9, 1, 9, 4]))
    assert float(lib.rbf_bandwidth(x, 0.5)) == pytest.approx(0.5 * np.median([1, 3, 1, 3, 2]))
    k = lib.gram(x, "rbf", sigma=2.0)
    assert float(k[0, 3]) == pytest.approx(math.exp(-9 / 8))
    far = x + 1e6  # the middle is taken away first
    torch.testing.assert_close(lib.rbf_bandwidth(far), lib.rbf_bandwidth(x))


def test_minibatches_average_before_the_ratio() -> None:
    x, y = related(48, 6, 4)
    one = lib.MinibatchCKA("rbf")
    one.update(x, y)
    torch.testing.assert_close(one.value(), lib.cka(x, y, "rbf"))
    many = lib.MinibatchCKA()
    for a, b in zip(x.split(12), y.split(12), strict=True):
        many.update(a, b)
    parts = [[lib.hsic(lib.gram(u), lib.gram(v)) for u, v in ((a, b), (a, a), (b, b))]
             for a, b in zip(x.split(12), y.split(12), strict=True)]  # fmt: skip
    cross, first, second = torch.tensor(parts).double().mean(0)
    assert float(many.value()) == pytest.approx(float(cross / (first * second).sqrt()), rel=1e-5)
    with pytest.raises(ValueError, match="update"):
        _ = lib.MinibatchCKA().hsic


def test_peers_that_align_features() -> None:
    x, y = related(40, 5, 7)
    turned = 3 * x @ rotation(5) + 1
    linear = x @ drawn(5, 5, seed=3)
    assert float(lib.procrustes_distance(x, turned)) == pytest.approx(0, abs=1e-9)
    assert float(lib.angular_distance(x, turned)) == pytest.approx(0, abs=1e-5)
    assert float(lib.procrustes_distance(x, linear)) > 0.01
    assert float(lib.svcca_distance(x, linear, share=1.0)) == pytest.approx(0, abs=1e-9)
    a, b = x - x.mean(0), y - y.mean(0)
    expected = 1 - np.linalg.svd((a.T @ b).numpy(), compute_uv=False).sum() / float(a.norm() * b.norm())
    assert float(lib.procrustes_distance(x, y)) == pytest.approx(expected)
    a, b = (v - v.mean(0) for v in (drawn(12, 50), drawn(12, 60, seed=3)))
    expected = 1 - float(torch.linalg.svdvals(a.T @ b).sum() / a.norm() / b.norm())
    assert float(lib.procrustes_distance(a + 1, 2 * b)) == pytest.approx(expected)
    for weights in ("canonical", "orthogonal"):
        assert float(lib.pwcca_distance(x, linear, weights)) == pytest.approx(0, abs=1e-9)
        assert 0 < float(lib.pwcca_distance(x, y, weights)) < 1


# -- RSA ---------------------------------------------------------------------------------------------------------------


def test_rsa_against_scipy() -> None:
    x, y = related(12, 6, 5)
    y = y.round(decimals=0)  # ties
    a, b = rdm(x), rdm(y, "euclidean")
    np.testing.assert_allclose(a.numpy(), 1 - np.corrcoef(x.numpy()), atol=1e-12)
    brute = (y[:, None] - y[None]).square().mean(-1)
    torch.testing.assert_close(b, brute)
    u, v = upper(a).numpy(), upper(b).numpy().round(9)
    assert len(set(v.tolist())) < len(v)
    b = b.round(decimals=9)
    assert float(compare_rdms(a, b, "corr")) == pytest.approx(stats.pearsonr(u, v).statistic)
    assert float(compare_rdms(a, b, "spearman")) == pytest.approx(stats.spearmanr(u, v).statistic)
    assert float(compare_rdms(a, b, "kendall")) == pytest.approx(stats.kendalltau(u, v).statistic)
    signs = [np.sign(u[i] - u[j]) * np.sign(v[i] - v[j]) for i, j in itertools.combinations(range(len(u)), 2)]
    assert float(compare_rdms(a, b, "tau-a")) == pytest.approx(np.mean(signs))
    breaker = np.random.default_rng(0)
    broken = [stats.spearmanr(u, v + 1e-9 * breaker.random(len(v))).statistic for _ in range(400)]
    assert float(compare_rdms(a, b, "rho-a")) == pytest.approx(np.mean(broken), abs=2e-3)


def test_rsa_does_not_see_what_it_should_not() -> None:
    x, y = related(15, 8, 8)
    assert float(rsa(x, 3 * x + 2)) == pytest.approx(1)
    for distance in ("euclidean", "cosine"):
        torch.testing.assert_close(rsa(x @ rotation(8), y, distance), rsa(x, y, distance))
    with pytest.raises(ValueError, match="distance='manhattan'"):
        rdm(x, "manhattan")


def test_mantel() -> None:
    x, y = related(14, 10, 9)
    a, b = rdm(x), rdm(y)
    orders = torch.stack([torch.randperm(14, generator=torch.Generator().manual_seed(s)) for s in range(19)])
    found = mantel(a, b, "corr", orders)
    for value, order in zip(found.null, orders, strict=True):
        torch.testing.assert_close(value, compare_rdms(a, b[order][:, order], "corr"))
    assert found.p == (1 + int((found.null >= found.observed).sum())) / 20
    assert mantel(a, b, permutations=torch.arange(14)[None]).p == 1  # the identity counts
    p = [mantel(rdm(drawn(9, 5, seed=s)), rdm(drawn(9, 5, seed=1000 + s)), permutations=19).p for s in range(60)]
    assert 0.35 < float(np.mean(p)) < 0.65  # uniform without dependence
    assert mantel(a, a, permutations=99).p == 0.01


# -- distributions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unbiased", [False, True])
def test_two_samples_by_brute_force(unbiased: bool) -> None:
    x, y = drawn(7, 3), drawn(9, 3, seed=1) + 0.5
    sigma2 = float(lib.pooled_bandwidth(x, y))
    pooled = torch.cat([x, y])
    squares = [float((a - b).square().sum()) for a, b in itertools.combinations(pooled, 2)]
    assert sigma2 == pytest.approx(np.median(squares))

    def gap(k: Callable[[Tensor, Tensor], float]) -> float:
        def within(v: Tensor) -> float:
            n = len(v)
            total = sum(k(v[i], v[j]) for i in range(n) for j in range(n) if i != j or not unbiased)
            return total / (n * (n - 1) if unbiased else n * n)

        return within(x) + within(y) - 2 * float(np.mean([k(a, b) for a in x for b in y]))

    def gauss(a: Tensor, b: Tensor) -> float:
        return math.exp(-float((a - b).square().sum()) / (2 * sigma2))

    assert float(lib.mmd2(x, y, unbiased=unbiased)) == pytest.approx(gap(gauss))
    assert float(lib.energy_distance(x, y, unbiased=unbiased)) == pytest.approx(
        gap(lambda a, b: -float((a - b).norm()))
    )
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    for statistic, direct in (("mmd", lib.mmd2), ("energy", lib.energy_distance)):
        test = lib.two_sample_test(x, y, statistic, order[None], unbiased=unbiased)
        shuffled = pooled[order]
        torch.testing.assert_close(test.null[0], direct(shuffled[:7], shuffled[7:], unbiased=unbiased))


def test_features_by_themselves_against_scipy() -> None:
    x, y = drawn(8, 4), drawn(13, 4, seed=1).round(decimals=1)
    for f in range(4):
        u, v = x[:, f].numpy(), y[:, f].numpy()
        assert float(lib.wasserstein1(x, y)[f]) == pytest.approx(stats.wasserstein_distance(u, v))
        assert float(lib.energy_per_feature(x, y)[f]) == pytest.approx(stats.energy_distance(u, v))
    torch.testing.assert_close(lib.wasserstein1(x, x - 2), torch.full((4,), 2.0, dtype=torch.float64))
    assert float(lib.mmd2(x, x.flip(0))) == pytest.approx(0, abs=1e-12)
    assert float(lib.energy_distance(x, x)) == pytest.approx(0, abs=1e-12)
    assert 0 < float(lib.sliced_wasserstein1(x, x + 1)) <= 2
    assert lib.two_sample_test(drawn(20, 2), drawn(20, 2, seed=1) + 3, "energy", 99).p == 0.01


# -- how far to trust it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["bootstrap", "subsample", "jackknife"])
@pytest.mark.parametrize("measure", ["linear", "rsa-pearson"])
def test_intervals_hold_the_value(how: str, measure: str) -> None:
    x, y = related(24, 6, 5)
    found = lib.interval(x, y, measure, how, draws=60)
    assert found.value == pytest.approx(float(lib.MEASURES[measure](x, y)))
    assert found.low < found.value < found.high
    wide, narrow = (lib.interval(*related(n, 6, 5), measure, how, draws=60) for n in (16, 150))
    assert narrow.high - narrow.low < wide.high - wide.low


def test_jackknife_spread_and_bootstrap_of_rsa() -> None:
    x, y = related(11, 4, 5)
    found = lib.interval(x, y, how="jackknife")
    loo = np.array([float(lib.cka(*(torch.cat([v[:i], v[i + 1 :]]) for v in (x, y)))) for i in range(11)])
    spread = math.sqrt(10 / 11 * ((loo - loo.mean()) ** 2).sum())
    assert found.high - found.value == pytest.approx(stats.norm.ppf(0.975) * spread, rel=1e-6)
    rows = torch.tensor([[0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 8]])
    a, b = rdm(x), rdm(y)
    pairs = [(rows[0, i], rows[0, j]) for i, j in itertools.combinations(range(11), 2) if rows[0, i] != rows[0, j]]
    u, v = ([float(m[i, j]) for i, j in pairs] for m in (a, b))
    assert float(lib.interval(x, y, "rsa-pearson", draws=rows).draws[0]) == pytest.approx(
        stats.pearsonr(u, v).statistic
    )


def test_stability_of_a_profile() -> None:
    x = {f"layer{i}": drawn(60, 5, seed=i) for i in range(4)}
    y = {n: v + 0.7 * i * drawn(60, 5, seed=50 + i) for i, (n, v) in enumerate(x.items())}
    few, half, most = lib.stability(x, y, draws=10)
    assert (few.size, half.size, most.size) == (15, 30, 45)
    assert most.rank_stability > 0.9
    assert few.high["layer2"] - few.low["layer2"] > most.high["layer2"] - most.low["layer2"]
    with pytest.raises(ValueError, match="sizes=61"):
        lib.stability(x, y, sizes=(61,))


# -- networks ----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Convolution, normalisation, activation in place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu_(self.norm(self.conv(x)))


def network(seed: int, channels: int = 8, depth: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    parts = [Block(channels) for _ in range(depth)]
    stem = [nn.Conv2d(3, channels, 3), nn.ReLU(inplace=True)]
    return nn.Sequential(*stem, nn.Sequential(*parts), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4))


def test_table_of_two_networks_equals_pairs() -> None:
    model, other = network(0), network(1, 12, 2)
    images = drawn(22, 3, 9, 9).float()
    assert lib.blocks(model) == ["0", "2.0", "2.1", "2.2", "5"]
    for kernel, estimator in itertools.product(("linear", "rbf"), ("biased", "unbiased")):
        table = lib.compare_layers(model, other, images, kernel=kernel, estimator=estimator, batch_size=64)
        x, y = (lib.features(m, images, batch_size=5) for m in (model, other))
        expected = lib.compare_features(x, y, kernel + ("" if estimator == "unbiased" else "-biased"))
        torch.testing.assert_close(table.values, expected, rtol=1e-4, atol=1e-5)
    assert (table.rows, table.columns) == (list(x), list(y))
    model.train()
    batched = lib.compare_layers(model, other, images, ["0"], ["5"], batch_size=8)
    assert model.training
    assert (batched.images, batched.left_over) == (16, 6)
    state = lib.MinibatchCKA()
    for start in (0, 8):
        state.update(x["0"][start : start + 8], y["5"][start : start + 8])
    assert float(batched.values) == pytest.approx(float(state.value()), rel=1e-4)
    same = lib.compare_layers(model, model, images)
    torch.testing.assert_close(same.values, same.values.T)
    assert [a for a, b, _ in same.best() if a == b] == same.rows


def test_features_are_those_before_changes_in_place() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1).double(), nn.ReLU(inplace=True))
    x = drawn(5, 3, 2, 2)
    with torch.no_grad():
        expected = model[0](x).flatten(1)
    found = lib.features(model, x, ["0"], reduction=lib.Reduction("flatten"))["0"]
    torch.testing.assert_close(found, expected)
    assert float(found.min()) < 0


def test_reductions() -> None:
    tokens, maps = drawn(4, 7, 5), drawn(4, 6, 3, 2)
    torch.testing.assert_close(lib.Reduction(prefix=2)(tokens), tokens[:, 2:].mean(1))
    torch.testing.assert_close(lib.Reduction("cls")(tokens), tokens[:, 0])
    torch.testing.assert_close(lib.Reduction(layout="first")(tokens), tokens.mean(2))
    torch.testing.assert_close(lib.Reduction()(maps), maps.mean((2, 3)))
    torch.testing.assert_close(lib.Reduction(layout="last")(maps), maps.mean((1, 2)))
    square = torch.randn(2, 5, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(lib.Reduction()(square), square.mean((1, 2)))
    torch.testing.assert_close(lib.Reduction()(square.movedim(-1, 1)), square.mean((1, 2)))
    torch.testing.assert_close(lib.Reduction("samples")(maps)[:6], maps[0].flatten(1).T)
    projected = lib.Reduction("random", size=4000)(maps)
    torch.testing.assert_close(projected @ projected.T, maps.flatten(1) @ maps.flatten(1).T, rtol=0.2, atol=3.0)
    torch.testing.assert_close(projected, lib.Reduction("random", size=4000)(maps))
    with pytest.raises(ValueError, match="how='cls'"):
        lib.Reduction("cls")(maps)


def test_bad_arguments_name_argument_value_and_remedy() -> None:
    x = drawn(6, 3)
    model = network(0)
    images = drawn(6, 3, 9, 9).float()
    for message, call in (
        ("kernel='poly'", lambda: lib.cka(x, x, "poly")),
        ("y=.*same stimuli", lambda: lib.cka(x, x[:5])),
        ("x=.*at least 4", lambda: lib.cka(x[:3], x[:3])),
        ("sigma=2.0.*no bandwidth", lambda: lib.cka(x, x, sigma=2.0)),
        ("scale=0.5.*not both", lambda: lib.gram(x, "rbf", 1.0, 0.5)),
        ("identical", lambda: lib.gram(torch.ones(4, 2), "rbf")),
        ("layers='fc'", lambda: lib.features(model, images, ["fc"])),
        ("batch_size=3", lambda: lib.compare_layers(model, model, images, batch_size=3)),
        ("reduction=", lambda: lib.compare_layers(model, model, images, reduction=lib.Reduction("samples"))),
        ("partners=", lambda: lib.compare_images(model, images, images[:4])),
        ("images=.*8 images", lambda: lib.section(model, model, images)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.warns(UserWarning, match="near 1 for anything"):
        lib.cka(x, drawn(6, 9), estimator="biased")
    with pytest.warns(UserWarning, match="not positive"):
        assert lib.cka(torch.ones(5, 2), drawn(5, 2).float()).isnan()


def test_protocol_on_folders_of_pairs(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 24, 3), dtype=np.uint8)
    for name, dim in (("human", 1.0), ("cat", 0.5)):
        (tmp_path / name).mkdir()
        for i, picture in enumerate(pixels):
            image.fromarray((picture * dim).astype(np.uint8)).save(tmp_path / name / f"{i:02}.png")
    model = network(0)
    options = {"image_size": 16, "permutations": 19, "draws": 20}
    report = lib.compare_folders(model, tmp_path / "human", tmp_path / "cat", **options)
    assert [r["layer"] for r in report.rows] == lib.blocks(model)
    assert report.images == 12
    assert report.mean["cka linear"] == pytest.approx(np.mean([r["cka linear"] for r in report.rows]))
    assert report.rows[0]["cka linear"] == pytest.approx(1, abs=1e-3)  # half the light: a scale, to the first layer
    assert report.rows[0]["mantel p"] == 0.05
    assert report.rows[0]["energy p"] == 0.05
    equal = lib.compare_folders(model, tmp_path / "cat", tmp_path / "cat", **options)
    assert all(r["mmd p"] == 1 and r["wasserstein"] == 0 for r in equal.rows)
    (tmp_path / "cat" / "00.png").unlink()
    with pytest.raises(ValueError, match="no partner"):
        lib.compare_folders(model, tmp_path / "human", tmp_path / "cat")


def test_perturbation_wears_similarity_down() -> None:
    rows = lib.perturbation(network(0), drawn(32, 3, 9, 9).float(), (0.0, 0.3, 3.0))
    assert rows[0]["mean"] == pytest.approx(1)
    assert rows[0]["mean"] > rows[1]["mean"] > rows[2]["mean"]


def test_section_of_the_report(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    images = drawn(16, 3, 12, 12).float()
    found = inspect_model(network(0), images, against=network(0), only=("similarity",))
    (section,) = found.sections
    assert "much alike" in section.verdict
    assert "16 images" in section.verdict
    assert all(r["layer"] == r["most similar layer of the other"] for r in section.tables["most-similar"])
    write_report(found, tmp_path / "page.html")
    assert (tmp_path / "page" / "similarity-layer-by-layer.png").read_bytes()[:4] == b"\x89PNG"


def test_trained_networks_agree_stage_by_stage() -> None:
    from torchconv.claims._support import cifar_resnet, trained_resnets
    from torchconv.claims.cka import cat_view

    files = trained_resnets()
    images = next(Path(os.environ.get("TORCHCONV_DATA", "nowhere")).glob("cifar10_lossless/*.npz"), None)
    if len(files) < 4 or images is None:
        pytest.skip("needs cifar10_resnet/ and cifar10_lossless/ in $TORCHCONV_DATA")
    with np.load(images) as arrays:
        pixels = torch.tensor(arrays["x_test"]).permute(0, 3, 1, 2).float() / 255
        labels = torch.tensor(arrays["y_test"].astype(np.int64))
    assert cat_view(pixels, 0.5).shape == pixels.shape
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = (pixels - mean) / deviation
    small, large = cifar_resnet(20, files[20]), cifar_resnet(56, files[56])
    with torch.no_grad():
        assert int((small(x).argmax(1) == labels).sum()) == 94
    section = lib.section(small, large, x)
    found = section.tables["most-similar"]
    best = [(str(r["layer"])[:6], str(r["most similar layer of the other"])[:6]) for r in found]
    assert sum(a == b for a, b in best) >= 8
    assert section.data["cka"][0, -1] < 0.5 < section.data["cka"][-1, -1]


def test_section_of_series_averages_over_time() -> None:
    torch.manual_seed(0)
    one, two = (nn.Sequential(nn.Conv1d(2, 6, 5), nn.ReLU(), nn.Conv1d(6, 4, 5)) for _ in range(2))
    series = torch.randn(40, 2, 30)
    found = lib.section(one, two, series).data["cka"]
    want = lib.compare_layers(one, two, series, reduction=lib.Reduction(layout="first")).values
    torch.testing.assert_close(found, want)
    assert not torch.allclose(want, lib.compare_layers(one, two, series).values)
