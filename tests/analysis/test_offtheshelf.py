"""Off-the-shelf features: views, extraction, SVMs, retrieval, metrics, and what the section says."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torchconv.analysis import offtheshelf as lib
from torchconv.analysis.inspection import inspect_model


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 16, 3, 2, 1)]
    head = [nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 5)]
    return nn.Sequential(*layers, *head).train()


# -- views -------------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 5), st.integers(8, 400), st.integers(8, 400))
def test_patches_cover_the_image(levels: int, width: int, height: int) -> None:
    boxes = lib.patch_boxes(levels, width, height)
    assert len(boxes) == levels * (levels + 1) * (2 * levels + 1) // 6
    assert bool((boxes[:, :2] >= 0).all())
    assert bool((boxes[:, 2:] <= torch.tensor([width, height]) + 1e-9).all())
    first = 0
    for i in range(1, levels + 1):
        level = boxes[first : first + i * i]
        first += i * i
        sides = level[:, 2:] - level[:, :2]
        assert torch.allclose(sides, 2 / (i + 1) * torch.tensor([width, height], dtype=torch.float64).expand_as(sides))
        seen = torch.zeros(height, width, dtype=torch.bool)
        for x0, y0, x1, y1 in level.tolist():
            seen[math.ceil(y0 - 0.5) : math.ceil(y1 - 0.5), math.ceil(x0 - 0.5) : math.ceil(x1 - 0.5)] = True
        assert bool(seen.all())


def test_crops_are_four_ninths_and_four_of_them_the_second_level() -> None:
    crops = lib.crop_boxes(300, 210)
    sides = crops[:, 2:] - crops[:, :2]
    assert torch.allclose(sides.prod(1), torch.full((5,), 4 / 9 * 300 * 210, dtype=torch.float64))
    assert torch.allclose(crops[:4], lib.patch_boxes(2, 300, 210)[1:])
    assert torch.allclose(crops[4], torch.tensor([50.0, 35, 250, 175], dtype=torch.float64))


def test_square_around_a_region() -> None:
    assert lib.square_box((90, 0, 100, 40), 100, 100) == (60, 0, 100, 40)
    x0, y0, x1, y1 = lib.square_box((20, 0, 40, 80), 50, 80)  # the image is narrower than the square
    assert (x0, y0, x1, y1) == (0, 0, 50, 80)
    with pytest.raises(ValueError, match="box"):
        lib.square_box((0, 0, 11, 5), 10, 10)


def test_sixteen_views_are_closed_under_mirroring() -> None:
    image = normal(1, 3, 30, 30)
    views = lib.sixteen_views()
    assert len(set(views)) == 16
    seen = [view(image, (30, 30)) for view in views]
    mirrored = [view(image, (30, 30)).flip(-1) for view in views]
    assert all(any(torch.equal(a, b) for b in seen) for a in mirrored)
    assert torch.equal(seen[0], image)
    assert [int((s - image).abs().max() > 0) for s in seen].count(0) == 1


def test_turning() -> None:
    image = normal(1, 1, 4, 6)
    assert torch.equal(lib.rotate(image, 90), image.rot90(1, (-2, -1)))
    assert lib.rotate(image, 0) is image
    square = normal(1, 1, 9, 9)
    assert torch.allclose(lib.rotate(square, 89.9999), square.rot90(1, (-2, -1)), atol=1e-3)  # counter-clockwise too
    smooth = torch.linspace(-1, 1, 40, dtype=torch.float64)[None, None, None].expand(1, 1, 30, 40)
    back = lib.rotate(lib.rotate(smooth, 20), -20)
    assert torch.allclose(back[..., 12:18, 15:25], smooth[..., 12:18, 15:25], atol=1e-6)  # aspect ratio is kept
    assert len(lib.patches(2, rotations=(0, 90, 180, 270), mirror=True)) == 40


# -- features ----------------------------------------------------------------------------------------------------------


def test_frozen_means_frozen() -> None:
    model, images = network(), normal(7, 3, 20, 20).float()
    before, state = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    x = lib.extract(model, images, batch_size=3)
    assert x.shape == (7, 16)
    assert x.dtype == torch.float32
    assert not x.requires_grad
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.allclose(x, lib.extract(model, images, batch_size=7), atol=1e-6)
    assert torch.allclose(x, model[:7].eval()(images), atol=1e-6)


def test_which_layer_and_how_it_becomes_a_row() -> None:
    model, images = network(), normal(4, 3, 20, 20).float()
    maps = model[:2].eval()(images)
    assert torch.allclose(lib.extract(model, images, "1"), maps.mean((2, 3)), atol=1e-6)  # before the in-place ReLU
    assert torch.allclose(lib.extract(model, images, "1", pool="max"), maps.amax((2, 3)), atol=1e-6)
    assert torch.allclose(lib.extract(model, images, "1", pool="flatten"), maps.flatten(1), atol=1e-6)
    gem = maps.clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3)
    assert torch.allclose(lib.extract(model, images, "1", pool="gem"), gem, atol=1e-5)
    assert torch.allclose(lib.extract(model, images, lambda x: x.mean((2, 3))), images.mean((2, 3)), atol=1e-6)
    tokens = nn.Sequential(nn.Flatten(2), nn.Linear(400, 6))
    assert lib.extract(tokens, images, "1").shape == (4, 6)
    assert torch.allclose(lib.extract(tokens, images, "1", pool="cls"), tokens(images)[:, 0], atol=1e-6)
    assert lib.extract(tokens, images, "1", layout="first").shape == (4, 3)
    assert lib.extract(model.double(), images.double()).dtype == torch.float64
    assert lib.extract(nn.Conv1d(2, 4, 3), normal(3, 2, 9).float(), "", layout="first").shape == (3, 4)
    with pytest.raises(ValueError, match=r"did you mean|choose one"):
        lib.extract(model, images, "layer9")
    with pytest.raises(ValueError, match="name a module"):
        lib.extract(nn.Identity(), images)
    with pytest.raises(ValueError, match="needs tokens"):
        lib.extract(model, images, "1", pool="cls")
    with pytest.raises(ValueError, match="normalised"):
        lib.extract(model, torch.zeros(2, 3, 20, 20, dtype=torch.uint8))
    with pytest.raises(ValueError, match="views"):
        lib.extract(model, images, views=[])


def test_networks_of_the_library_and_of_timm() -> None:
    timm = pytest.importorskip("timm")
    from torchconv.models import create_model

    images = normal(2, 3, 64, 64).float()
    own = create_model("convnext_dcls_mini").eval()
    assert torch.allclose(
        lib.extract(own, images), own.forward_head(own.forward_features(images), pre_logits=True), atol=1e-6
    )
    assert torch.allclose(lib.extract(own, images, pool="max"), own.forward_features(images).amax((2, 3)), atol=1e-6)
    other = timm.create_model("vit_tiny_patch16_224", img_size=64).eval()
    assert torch.allclose(lib.extract(other, images), other.forward_features(images)[:, 0], atol=1e-6)


def test_views_of_images_of_any_size() -> None:
    model = network()
    images = [normal(3, 24, 40, seed=1).float(), normal(3, 50, 31, seed=2).float()]
    views = lib.patches(2, rotations=(0, 90))
    x = lib.extract(model, images, views=views, size=20)
    assert x.shape == (2, 10, 16)
    box = images[0][:, :16, 13:40]  # the second patch of the second level, cut at whole pixels
    small = torch.nn.functional.interpolate(box[None], (20, 20), mode="bilinear", antialias=True)
    assert torch.allclose(x[0, 2], model[:7].eval()(small)[0], atol=1e-5)
    with pytest.raises(ValueError, match="need one size"):
        lib.extract(model, images, views=views)
    with pytest.raises(ValueError, match="pictures"):
        lib.extract(model, normal(2, 20).float(), size=4)


def test_one_pass_for_all_patches() -> None:
    model, images = network(), normal(3, 3, 48, 48).float()
    shared = lib.extract(model, images, "3", views=lib.patches(2), shared=True)
    maps = model[:4].eval()(images)  # 12 × 12
    assert torch.allclose(shared[:, 0], maps.mean((2, 3)), atol=1e-6)
    assert torch.allclose(shared[:, 2], maps[:, :, :8, 4:].mean((2, 3)), atol=1e-6)
    for wrong in (lib.patches(1, mirror=True), None):
        with pytest.raises(ValueError, match="shared"):
            lib.extract(model, images, "3", views=wrong, shared=True)
    with pytest.raises(ValueError, match="needs a map"):
        lib.extract(model, images, "8", views=lib.patches(2), shared=True)


def test_normalisation_and_power() -> None:
    x, y = normal(5, 9), normal(5, 9, seed=1)
    u, v = lib.unit(x), lib.unit(y)
    assert torch.allclose(u.norm(dim=1), torch.ones(5, dtype=torch.float64))
    assert torch.allclose(lib.unit(7 * x), u)
    assert torch.allclose((u - v).square().sum(1), 2 - 2 * (u * v).sum(1))
    assert torch.equal(lib.unit(torch.zeros(2, 3)), torch.zeros(2, 3))
    assert torch.equal(lib.signed_power(x, 1), x)
    assert torch.allclose(lib.signed_power(lib.signed_power(x, 2), 0.5), x)
    assert torch.allclose(lib.signed_power(-x, 2), -lib.signed_power(x, 2))
    with pytest.raises(ValueError, match="power"):
        lib.signed_power(x, 0)


# -- SVM ---------------------------------------------------------------------------------------------------------------


def blobs(classes: int = 3, each: int = 20, size: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    y = torch.arange(classes).repeat(each)
    return lib.unit(normal(classes, size, seed=seed + 1)[y] + 0.7 * normal(len(y), size, seed=seed)), y


def exact(x: Tensor, y: Tensor, C: float = 1.0, **options: object) -> lib.LinearSVM:
    return lib.fit_svm(x, y, C, tol=1e-10, max_iter=10**7, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("C", "loss", "bias"), [(0.3, "hinge", False), (20.0, "hinge", True), (5.0, "squared_hinge", False)]
)
def test_svm_has_no_duality_gap(C: float, loss: str, bias: bool) -> None:
    from scipy.optimize import lsq_linear

    x, y = blobs(2, 25)
    svm = exact(x, y, C, scheme="one-vs-all", loss=loss, bias=bias)
    rows = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1) if bias else x
    w = torch.cat([svm.weight[1], svm.bias[1:2]]) if bias else svm.weight[1]
    sign = torch.where(y == 1, 1.0, -1.0).double()
    slack = (1 - sign * (rows @ w)).clamp(min=0)
    primal = w.square().sum() / 2 + C * (slack if loss == "hinge" else slack.square()).sum()
    assert torch.allclose(svm.objective[1], primal)
    if loss == "hinge":  # some weights 0 ≤ α ≤ C with w = Σ α y x; those of samples that are right by far are zero
        margin = sign * (rows @ w)
        low = np.where(margin < 1 - 1e-6, C * (1 - 1e-9), 0.0)
        high = np.where(margin > 1 + 1e-6, 1e-9 * C, C)
        alpha = torch.from_numpy(lsq_linear((sign[:, None] * rows).T.numpy(), w.numpy(), (low, high), tol=1e-14).x)
        dual = alpha.sum() - (alpha * sign) @ rows @ rows.T @ (alpha * sign) / 2
    else:
        alpha = 2 * C * slack
        dual = alpha.sum() - w.square().sum() / 2 - alpha.square().sum() / (4 * C)
    assert float(primal - dual) < 1e-6 * float(primal)


def test_svm_identities() -> None:
    x, y = blobs(2)
    svm = exact(x, y, scheme="one-vs-all")
    assert torch.allclose(svm.weight[0], -svm.weight[1], atol=1e-7)  # labels the other way round
    twice = exact(torch.cat([x, x]), torch.cat([y, y]), scheme="one-vs-all")
    assert torch.allclose(twice.weight, exact(x, y, 2.0, scheme="one-vs-all").weight, atol=1e-7)
    small = 1e-3  # all margins stay below 1
    pulled = small * (torch.where(y == 0, 1.0, -1.0).double()[:, None] * x).sum(0)
    assert torch.allclose(exact(x, y, small, scheme="one-vs-all").weight[0], pulled, atol=1e-9)
    pair = exact(x, y)
    assert torch.allclose(pair.weight[0], svm.weight[0], atol=1e-7)
    assert torch.equal(pair.predict(x), torch.where(pair.decision(x)[:, 0] >= 0, 0, 1))


def test_votes() -> None:
    x, y = blobs(4)
    svm = lib.fit_svm(x, y + 10)
    votes, decision = svm.votes(x), svm.decision(x)
    assert svm.pairs is not None
    assert svm.pairs.tolist() == [list(p) for p in itertools.combinations(range(4), 2)]
    expected = torch.zeros_like(votes)
    for machine, (i, j) in enumerate(svm.pairs.tolist()):
        for n in range(len(x)):
            expected[n, i if decision[n, machine] >= 0 else j] += 1
    assert torch.equal(votes, expected)
    assert bool((votes.sum(1) == 6).all())
    margins = torch.stack([sum(  # type: ignore[arg-type]
        (1 if i == c else -1 if j == c else 0) * decision[:, m] for m, (i, j) in enumerate(svm.pairs.tolist())
    ) for c in range(4)], 1)  # fmt: skip
    assert torch.allclose(svm.margins(x), margins)
    nothing = torch.zeros(1, 8, dtype=torch.float64)
    assert svm.predict(nothing).tolist() == [10]  # wᵀx = 0 votes for the first of a pair
    circle = lib.LinearSVM(
        torch.tensor([[3.0], [-1.0], [2.0]]), torch.zeros(3), torch.tensor([[0, 1], [0, 2], [1, 2]]),
        torch.arange(3), torch.zeros(3), 1.0,
    )  # fmt: skip
    one = torch.ones(1, 1)
    assert circle.votes(one).tolist() == [[1, 1, 1]]
    assert circle.predict(one).tolist() == [0]
    assert circle.predict(-one, ties="margin").tolist() == [1]  # margins of -1 are -2, 1, 1; the first of the largest
    assert torch.equal(svm.predict(torch.stack([x, x], 1)), svm.predict(x))


def test_svm_against_scikit_learn() -> None:
    from sklearn.svm import SVC

    x, y = blobs(3)
    svm = exact(x, y, 2.0)
    kernel = torch.tensor(SVC(C=2.0, kernel="linear", tol=1e-9).fit(x.numpy(), y.numpy()).coef_)
    assert not torch.allclose(svm.weight, kernel, atol=1e-3)  # that one has a free bias
    from scipy.optimize import minimize

    rows = x[y != 2].numpy()
    sign = np.where(y[y != 2].numpy() == 0, 1.0, -1.0)

    def smooth(w: np.ndarray) -> float:
        return float(w @ w / 2 + 2.0 * (np.logaddexp(0, 4000 * (1 - sign * (rows @ w))) / 4000).sum())

    found = minimize(smooth, svm.weight[0].numpy() * 0.9, method="BFGS", options={"gtol": 1e-9})
    assert found.fun == pytest.approx(float(svm.objective[0]), rel=1e-3)
    assert found.fun >= float(svm.objective[0]) - 1e-9  # nothing is better


def test_svm_refuses() -> None:
    x, y = blobs(3)
    for options, word in (({"scheme": "one"}, "scheme"), ({"loss": "log"}, "loss"), ({"C": 0.0}, "C")):
        with pytest.raises(ValueError, match=word):
            lib.fit_svm(x, y, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="two classes"):
        lib.fit_svm(x, torch.zeros_like(y))
    with pytest.raises(ValueError, match="one-vs-all"):
        lib.fit_svm(x, torch.stack([y > 0, y > 1], 1))
    columns = lib.fit_svm(x, torch.stack([y > 0, y > 1], 1), scheme="one-vs-all")
    assert columns.decision(x).shape == (60, 2)
    with pytest.raises(ValueError, match="exclude"):
        columns.predict(x)
    with pytest.raises(ValueError, match="no votes"):
        columns.votes(x)
    with pytest.raises(ValueError, match="both 0 and 1"):
        lib.fit_svm(x, torch.ones(60, 2), scheme="one-vs-all")


@pytest.mark.filterwarnings("ignore:Liblinear")
def test_C_by_cross_validation() -> None:
    x, y = normal(60, 2), torch.arange(60) % 2
    x[:, 0] += 0.6 * y - 0.3  # large and noisy: what a small C uses
    x[:, 1] = 0.4 * y - 0.2  # small and certain: what a large C finds
    assert lib.choose_C(x, y, (0.001, 30.0)) == 30.0
    assert lib.choose_C(x[:, 1:], y, (100.0, 1000.0)) == 100.0  # the smallest of equally good ones
    assert lib.choose_C(torch.stack([x, x], 1), torch.stack([y, 1 - y], 1), (1.0, 10.0), scheme="one-vs-all") in (1, 10)
    few = (torch.arange(60) % 3 == 0).long()
    alike = lib.unit(torch.tensor([4.0, 0]) + 0.02 * normal(60, 2) + torch.stack([0 * few, 0.6 * few - 0.3], 1))
    answers = [lib.fit_svm(alike, few, C).predict(alike) for C in (1.0, lib.scaled_C(alike))]
    assert answers[0].unique().tolist() == [0]  # C = 1 cannot tell apart what is nearly alike
    assert float((answers[1] == few).double().mean()) > 0.9
    with pytest.raises(ValueError, match="all alike"):
        lib.scaled_C(torch.ones(3, 2))
    with pytest.raises(ValueError, match="two images of each class"):
        lib.choose_C(x[:3], y[:3])


# -- retrieval ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "width"), [(60, 12), (15, 40), (40, 40)])
def test_whitening_is_scikit_learns(count: int, width: int) -> None:
    from sklearn.decomposition import PCA

    x, other = normal(count, width), normal(6, width, seed=1)
    post = lib.Postprocess(7, power=1.0).fit(x)
    theirs = PCA(7, whiten=True, svd_solver="full").fit(lib.unit(x).numpy())
    ours, expected = post.project(other), torch.from_numpy(theirs.transform(lib.unit(other).numpy()))
    assert torch.allclose(ours.abs(), expected.abs(), atol=1e-9)
    z = post.project(x)
    assert torch.allclose(z.mean(0), torch.zeros(7, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(z.T @ z / (count - 1), torch.eye(7, dtype=torch.float64), atol=1e-8)
    assert bool((post.components.gather(1, post.components.abs().argmax(1, keepdim=True)) > 0).all())
    assert torch.allclose(
        lib.Postprocess(7, eps=0.1).fit(x).project(x), z * (post.variances / (post.variances + 0.1)).sqrt()
    )


def test_postprocess_keeps_what_there_is() -> None:
    x = normal(9, 30)
    full = lib.Postprocess(500, 1.0, whiten=False).fit(x)
    assert full.components.shape == (8, 30)  # nine points span eight dimensions
    assert torch.allclose(
        torch.cdist(full.project(x), full.project(x)), torch.cdist(lib.unit(x), lib.unit(x)), atol=1e-7
    )
    post = lib.Postprocess(5).fit(x.float().view(3, 3, 30))
    y = post(x.float())
    assert y.dtype == torch.float32
    assert torch.allclose(y.abs().sqrt().norm(dim=1), torch.ones(9), atol=1e-5)
    again = lib.Postprocess(5)
    again.load_state_dict(post.state_dict())
    assert torch.equal(again(x.float()), y)
    query = normal(2, 30, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(lib.Postprocess(5).fit(x), (query,))
    with pytest.raises(ValueError, match="fit"):
        lib.Postprocess()(x)
    with pytest.raises(ValueError, match="features"):
        post(x[:, :7].float())
    with pytest.raises(ValueError, match="alike"):
        lib.Postprocess().fit(torch.ones(4, 3))


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6), st.integers(1, 5), st.integers(1, 60))
def test_search_is_the_loop(n: int, p: int, m: int, r: int, block: int) -> None:
    query, reference = normal(n, p, 6, seed=n), normal(m, r, 6, seed=10 + m)
    found = lib.spatial_search(query, reference, nearest=True, block=block)
    assert found.nearest is not None
    distances = (query[:, None, :, None] - reference[None, :, None]).norm(dim=-1)
    assert torch.allclose(found.distance, distances.amin(-1).mean(-1))
    assert torch.equal(found.nearest, distances.argmin(-1))
    assert torch.equal(found.ranking, found.distance.argsort(dim=1, stable=True))
    without = lib.spatial_search(query, reference, block=block)
    assert without.nearest is None
    assert torch.equal(without.distance, found.distance)


def test_search_identities() -> None:
    query, reference = lib.unit(normal(4, 3, 16).float()), lib.unit(normal(9, 5, 16, seed=1).float())
    plain = lib.spatial_search(query[:, 0], reference[:, 0])
    assert torch.allclose(plain.distance, torch.cdist(query[:, 0], reference[:, 0]), atol=1e-5)
    few, many = lib.spatial_search(query, reference[:, :1]), lib.spatial_search(query, reference)
    assert bool((many.distance <= few.distance + 1e-6).all())
    inside = lib.spatial_search(reference[3:4, 2:3], reference)
    assert float(inside.distance[0, 3]) == 0  # exactly, in single precision too
    assert int(inside.ranking[0, 0]) == 3
    near = reference[3:4, 2:3] + 1e-5 * normal(1, 1, 16, seed=5).float()
    found, expected = lib.spatial_search(near, reference).distance[0, 3], (near - reference[3, 2]).norm()
    assert torch.allclose(found, expected, rtol=1e-3)
    with pytest.raises(ValueError, match="reference"):
        lib.spatial_search(query, reference[..., :5])


# -- metrics -----------------------------------------------------------------------------------------------------------


def test_average_precision_rules() -> None:
    from sklearn.metrics import average_precision_score, roc_auc_score

    scores, positive = normal(50, 3), normal(50, 3, seed=1) > 0.5
    ours = lib.average_precision(scores, positive)
    theirs = [average_precision_score(positive[:, k], scores[:, k]) for k in range(3)]
    assert ours.tolist() == pytest.approx(theirs)
    assert lib.area_under_roc(scores, positive).tolist() == pytest.approx(
        [roc_auc_score(positive[:, k], scores[:, k]) for k in range(3)]
    )
    for k in range(3):
        hits = positive[scores[:, k].argsort(descending=True), k].tolist()
        total, best = sum(hits), []
        for tenth in range(11):
            values = [sum(hits[:j]) / j for j in range(1, 51) if 10 * sum(hits[:j]) >= tenth * total]
            best.append(max(values))
        assert float(lib.average_precision(scores[:, k], positive[:, k], "11-point")) == pytest.approx(sum(best) / 11)
    for rule in ("all", "11-point"):
        assert float(lib.average_precision(-torch.arange(9.0), torch.arange(9) < 4, rule)) == 1
        assert math.isnan(float(lib.average_precision(torch.arange(4.0), torch.zeros(4), rule)))
    random = lib.average_precision(normal(4000), torch.arange(4000) % 5 == 0)
    assert float(random) == pytest.approx(0.2, abs=0.03)
    assert float(lib.area_under_roc(torch.zeros(4), torch.tensor([0, 1, 0, 1]))) == 0.5
    with pytest.raises(ValueError, match="positives and negatives"):
        lib.area_under_roc(torch.zeros(4), torch.ones(4))


def oxford(ranking: list[int], positive: set[int], junk: set[int]) -> float:
    """The evaluation program of the Oxford buildings, as a loop."""
    recall, precision, total, found, seen = 0.0, 1.0, 0.0, 0, 0
    for index in ranking:
        if index in junk:
            continue
        found += index in positive
        new_recall, new_precision = found / len(positive), found / (seen + 1)
        total += (new_recall - recall) * (precision + new_precision) / 2
        recall, precision, seen = new_recall, new_precision, seen + 1
    return total


@pytest.mark.parametrize("places", [30, 12])
def test_retrieval_precision_is_the_programs(places: int) -> None:
    ranking = normal(8, 30).argsort(dim=1)
    kind = normal(8, 30, seed=1)
    positive, junk = kind > 0.8, kind < -0.8
    ours = lib.ranking_precision(ranking[:, :places], positive, junk)
    for q in range(8):
        sets = (set(row[q].nonzero().flatten().tolist()) for row in (positive, junk))
        assert float(ours[q]) == pytest.approx(oxford(ranking[q, :places].tolist(), *sets))
    if places == 30:
        at_the_end = torch.stack([torch.cat([r[~j[r]], r[j[r]]]) for r, j in zip(ranking, junk, strict=True)])
        assert torch.allclose(lib.ranking_precision(at_the_end, positive, junk), ours)  # wherever the junk stands
    rectangle = lib.ranking_precision(ranking, positive, rule="rectangle")
    plain = lib.average_precision(-ranking.argsort(dim=1).T.double(), positive.T)
    assert torch.allclose(rectangle, plain)
    first = torch.arange(5).expand(2, 5)
    for rule in ("trapezoid", "rectangle"):
        assert lib.ranking_precision(first, first < 2, rule=rule).tolist() == [1, 1]
    with pytest.raises(ValueError, match="junk"):
        lib.ranking_precision(ranking, positive, junk[:2])


def test_groups_classes_and_bootstrap() -> None:
    x = normal(3, 6).repeat_interleave(4, 0) + 1e-3 * normal(12, 6, seed=1)
    assert float(lib.group_score(lib.spatial_search(x, x).ranking)) == 4
    assert float(lib.group_score(torch.arange(8).flip(0).expand(8, 8))) == 2
    with pytest.raises(ValueError, match="whole groups"):
        lib.group_score(torch.arange(6).expand(6, 6))
    predicted, labels = torch.tensor([5, 5, 7, 7, 5]), torch.tensor([5, 5, 5, 5, 7])
    assert float(lib.mean_class_accuracy(predicted, labels)) == 0.25
    right = (torch.arange(400) % 4 > 0).double()
    found = lib.bootstrap(lambda rows: right[rows].mean(), 400)
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)
    assert found.low < 0.75 < found.high


# -- the whole ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Liblinear")
def test_recognition_with_views_and_columns() -> None:
    x, y = blobs(3, 30)
    single = lib.recognise(x[:45], y[:45], x[45:], y[45:], draws=50)
    assert single.metric == "mean class accuracy"
    assert single.svm.pairs is not None
    assert single.score.low <= single.score.value <= single.score.high
    views = torch.stack([x, x], 1)  # equal views change nothing but C
    double = lib.recognise(views[:45], y[:45], views[45:], y[45:], C=0.5, draws=50)
    assert torch.equal(double.responses, 2 * single.responses)
    assert torch.equal(double.predictions, single.predictions)  # type: ignore[arg-type]
    columns = torch.nn.functional.one_hot(y)
    ranked = lib.recognise(x[:45], columns[:45], x[45:], columns[45:], C=None, power=2.0, draws=50)
    assert ranked.metric == "mean average precision"
    assert ranked.predictions is None
    assert ranked.score.value > 0.8
    assert ranked.svm.C in (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
    with pytest.raises(ValueError, match="test_labels"):
        lib.recognise(x, y, x, columns)


def test_few_shots() -> None:
    x, y = blobs(3, 40)
    curve = lib.few_shot(x[:60], y[:60], x[60:], y[60:], draws=6)
    assert [s.shots for s in curve] == [1, 2, 5, 10, 20]
    assert curve[-1].score.value > curve[0].score.value
    assert curve[0].score.high - curve[0].score.low > curve[-1].score.high - curve[-1].score.low
    again = lib.few_shot(x[:60], y[:60], x[60:], y[60:], (1,), draws=6)
    assert torch.equal(again[0].score.draws, curve[0].score.draws)
    with pytest.raises(ValueError, match="smallest class has 20"):
        lib.few_shot(x[:60], y[:60], x[60:], y[60:], (21,))


def test_random_weights_leave_the_network() -> None:
    model = network()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    state = torch.get_rng_state()
    fresh = lib.random_weights(model, 1)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert not torch.equal(fresh[0].weight, model[0].weight)  # type: ignore[index]
    assert torch.equal(fresh[0].weight, lib.random_weights(model, 1)[0].weight)  # type: ignore[index]
    assert fresh[3].weight.std().item() == pytest.approx(math.sqrt(2 / 72), rel=0.1)  # type: ignore[index]


def test_section_of_the_inspection() -> None:
    torch.manual_seed(0)
    y = torch.arange(3).repeat(16)
    images = 0.3 * torch.randn(48, 3, 16, 16)
    images[torch.arange(48), y] += 1.0  # a colour for each class, which even random weights see
    found = inspect_model(network(), images, labels=y, only=("transfer",))
    (section,) = found.sections
    rows = {row["features"]: row for row in section.tables["accuracy"]}
    assert rows["pixels"]["accuracy"] == 1
    assert rows["pixels"]["numbers"] == 3 * 16 * 16
    assert section.level in ("note", "bad")
    assert "3 classes" in section.verdict
    assert [p.name for p in section.pictures] == ["few-shot"]
    assert {row["images of a class"] for row in section.tables["few-shot"]} == {1, 2, 5}
    without = inspect_model(network(), images, only=("receptive-field", "transfer"))
    assert "--data" in without.left_out["transfer"]
    with pytest.raises(ValueError, match=r"nothing could be inspected.*four images"):
        inspect_model(network(), images[:3], labels=y[:3], only=("transfer",))


@pytest.mark.filterwarnings("ignore:Liblinear")
def test_a_trained_network_against_random_weights() -> None:
    from torchconv.claims.offtheshelf import WEIGHTS, _cifar, _find, caffe, squeezenet

    path, cifar = _find(WEIGHTS), _find("cifar10_lossless")
    if path is None or cifar is None:
        pytest.skip("needs a trained SqueezeNet and CIFAR-10 below $TORCHCONV_DATA")
    x, y = _cifar(cifar)
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:160]
    images, labels = caffe(x[rows]), y[rows]
    trained = squeezenet(path)
    scores = []
    for model in (trained, lib.random_weights(trained)):
        z = lib.extract(model, images, size=64)
        C = lib.scaled_C(lib.unit(z[:80]))
        scores.append(lib.recognise(z[:80], labels[:80], z[80:], labels[80:], C=C, draws=20).score.value)
    assert z.shape == (160, 512)
    assert scores[0] > scores[1] + 0.15
