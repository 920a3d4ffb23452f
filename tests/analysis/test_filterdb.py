"""Filters of networks: definitions by loops in float64, invariances, streaming, extraction, files and the section."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torchconv.analysis import filterdb as db
from torchconv.analysis._filterdb_plots import density, weighted_quantiles
from torchconv.analysis._filterdb_stream import CHUNK
from torchconv.ops.inceptionnext import InceptionDWConv2d

RNG = np.random.default_rng


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def groups(n: int = 400) -> dict[str, np.ndarray]:
    """Noise, smooth filters and a mixture with zeros."""
    noise = RNG(0).normal(size=(n, 9))
    smooth = RNG(1).normal(size=(n + 50, 9)).cumsum(1)
    mixed = np.concatenate([noise[: n // 2] * 3, np.zeros((10, 9)), smooth[:77]])
    return {"noise": noise, "smooth": smooth, "mixed": mixed}


def by_loops(sets: list[np.ndarray], bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ratios, histograms and shift from the definitions: an SVD of all rows, numpy's histograms, sums in Python."""
    scaled = [np.array([r / max(abs(r)) if r.any() else r for r in s]) for s in sets]
    whole = np.concatenate(scaled)
    mean = whole.mean(0)
    _, sigma, v = np.linalg.svd(whole - mean, full_matrices=False)
    v *= np.array([np.sign(row[abs(row).argmax()]) for row in v])[:, None]
    ratio = sigma**2 / (sigma**2).sum()
    spans = [(s - mean) @ v.T for s in scaled]
    low, high = min(c.min() for c in spans), max(c.max() for c in spans)
    h = np.zeros((len(sets), v.shape[0], bins))
    for g, c in enumerate(spans):
        for k in range(v.shape[0]):
            p = np.histogram(c[:, k], bins, (low, high), density=True)[0]
            p[p == 0] = np.finfo(np.float32).eps
            h[g, k] = p / p.sum()
    d = np.zeros((len(sets),) * 2)
    for i, p in enumerate(h):
        for j, q in enumerate(h):
            for k in range(v.shape[0]):
                one = sum(a * math.log(a / b) + b * math.log(b / a) for a, b in zip(p[k], q[k], strict=True))
                d[i, j] += ratio[k] * one
    return ratio, h, d


@pytest.mark.parametrize("bins", [70, 13])
def test_study_is_its_definition(bins: int) -> None:
    sets = groups()
    found = db.study(sets, bins=bins, warn=False)
    ratio, h, d = by_loops(list(sets.values()), bins)
    np.testing.assert_allclose(found.basis.ratio, ratio, rtol=1e-9)
    np.testing.assert_allclose(found.histograms, h, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(found.matrix, d, rtol=1e-9, atol=1e-12)
    assert (found.rank == np.argsort(d.mean(0))).all()
    assert found.zeros == 10
    assert found.sizes == (400, 450, 287)


def test_basis_is_orthonormal_diagonalises_and_rebuilds() -> None:
    x = groups()["smooth"]
    moments = db.Moments()
    moments.update(x)
    basis = moments.basis()
    s, c = db.scale(x), basis.coefficients(x)
    np.testing.assert_allclose(c @ basis.components + basis.mean, s, atol=1e-12)
    total = np.trace(np.cov(s.T))
    np.testing.assert_allclose(c.T @ c / (len(c) - 1), np.diag(basis.ratio * total), atol=1e-12)
    assert basis.ratio.sum() == pytest.approx(1)
    assert (basis.components[np.arange(9), abs(basis.components).argmax(1)] > 0).all()


def test_shift_is_symmetric_zero_on_equals_additive_and_scale_free() -> None:
    sets = groups()
    found = db.study({**sets, "again": sets["noise"].copy()}, warn=False)
    assert (found.matrix == found.matrix.T).all()
    assert (np.diag(found.matrix) == 0).all()
    assert found.between("noise", "again") == 0
    assert (found.matrix >= 0).all()
    factors = RNG(5).uniform(0.01, 100, (400, 1))
    scaled = db.study({**sets, "noise": sets["noise"] * factors, "again": sets["noise"]}, warn=False)
    np.testing.assert_allclose(scaled.matrix, found.matrix, rtol=1e-6, atol=1e-12)
    alone = [db.shift(found.histograms[0, [k]], found.histograms[1, [k]], found.weights[[k]]) for k in range(9)]
    assert sum(alone) == pytest.approx(found.matrix[0, 1])


def test_negated_filters_have_the_same_shift_in_a_basis_of_their_own() -> None:
    # The range must be the same both ways, since bins are closed on one side.
    sets = groups()
    a = db.study(sets, warn=False, x_range=(-3, 3))
    b = db.study({n: -x for n, x in sets.items()}, warn=False, x_range=(-3, 3))
    np.testing.assert_allclose(b.basis.components, a.basis.components, atol=1e-9)
    np.testing.assert_allclose(b.basis.mean, -a.basis.mean, atol=1e-12)
    np.testing.assert_allclose(b.matrix, a.matrix, rtol=1e-6, atol=1e-9)


def test_merging_equal_groups_changes_nothing_for_a_third() -> None:
    sets = groups()
    first = db.study(sets, warn=False, x_range=(-3, 3))
    twice = {"twice": [sets["noise"], sets["noise"]], "smooth": sets["smooth"]}
    merged = db.study(twice, basis=first.basis, warn=False, x_range=(-3, 3))
    assert merged.between("twice", "smooth") == pytest.approx(first.between("noise", "smooth"), rel=1e-12)


def test_given_basis_range_and_weights_make_studies_comparable() -> None:
    sets = groups()
    first = db.study(sets, warn=False, x_range=(-3, 3), weights=[1 / 9] * 9)
    again = db.study(
        {"noise": sets["noise"], "smooth": sets["smooth"]},
        basis=first.basis,
        x_range=first.x_range,
        weights=[1 / 9] * 9,
        warn=False,
    )
    assert again.between("noise", "smooth") == first.between("noise", "smooth")


def test_zeros_can_be_left_out_and_small_groups_are_warned_about() -> None:
    sets = groups()
    with pytest.warns(UserWarning, match="noise, smooth, mixed"):
        found = db.study(sets, keep_zeros=False)
    assert found.sizes[2] == 277
    assert found.zeros == 10
    with pytest.raises(ValueError, match="'z' holds no filters"):
        db.study({"z": np.zeros((5, 9))}, keep_zeros=False)


@settings(max_examples=15, deadline=None)
@given(n=st.integers(2, 60), cut=st.integers(1, 59), taps=st.sampled_from([4, 9, 25]), seed=st.integers(0, 99))
def test_accumulators_do_not_care_about_pieces(n: int, cut: int, taps: int, seed: int) -> None:
    x = RNG(seed).normal(size=(n, taps)).astype(np.float32)
    whole, left, right = db.Moments(), db.Moments(), db.Moments()
    whole.update(x)
    left.update(x[: min(cut, n)])
    right.update(torch.from_numpy(x[min(cut, n) :]).reshape(-1, taps))
    left.merge(right)
    assert left.count == whole.count == n
    for a, b in zip(left.covariance(), whole.covariance(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)
    np.testing.assert_allclose(whole.covariance()[1], np.cov(db.scale(x).T), atol=1e-12)
    basis = whole.basis()
    one, two, three = (db.Histogram(basis, (-1.0, 1.5), 11) for _ in range(3))
    one.update(x)
    two.update(x[: min(cut, n)])
    three.update(x[min(cut, n) :])
    two.merge(three)
    assert (one.counts == two.counts).all()
    c = basis.coefficients(x)
    expected = np.stack([np.histogram(c[:, k], 11, (-1.0, 1.5))[0] for k in range(taps)])
    assert (one.counts == expected).all()


def test_chunks_of_a_long_array_and_the_closed_last_bin() -> None:
    basis = db.Basis(np.zeros(2), np.eye(2), np.array([0.5, 0.5]), 1)
    x = np.tile([1.0, -0.5], (2 * CHUNK + 3, 1))
    histogram = db.Histogram(basis, (-0.5, 1.0), 3)
    histogram.update(x)
    assert histogram.counts.tolist() == [[0, 0, len(x)], [len(x), 0, 0]]
    assert histogram.count == len(x)


def quality_by_loops(weight: Tensor, eps: float) -> dict[str, float]:
    w = weight.double().numpy()
    rows = w.reshape(w.shape[0] * w.shape[1], -1)
    sigma = np.linalg.svd(rows - rows.mean(0), compute_uv=False)
    v = sigma**2 / (sigma**2).sum()
    outputs = w.reshape(len(w), -1)
    outputs = outputs / np.linalg.norm(outputs, axis=1, keepdims=True)
    total = sum(abs(outputs[a] @ outputs[b] - (a == b)) for a in range(len(outputs)) for b in range(len(outputs)))
    return {
        "sparsity": float(np.mean([max(abs(r)) < eps * abs(w).max() for r in rows])),
        "variance_entropy": -sum(x * math.log10(x) for x in v if x > 0),
        "orthogonality": 1 - total / (len(outputs) * (len(outputs) - 1)),
        "norm_l1": float(abs(w).sum()),
        "norm_l2": float(np.sqrt((w**2).sum())),
        "norm_l2_norm": float(np.linalg.norm((w - w.mean()) / w.std(ddof=1))),
        "norm_l1_norm": float(abs((w - w.mean()) / w.std(ddof=1)).sum()),
    }


@pytest.mark.parametrize("shape", [(12, 5, 3, 3), (8, 6, 5, 5), (16, 1, 3, 3), (4, 3, 2, 7), (3, 2, 5, 5), (10, 4, 3)])
@pytest.mark.parametrize("eps", [0.01, 0.3])
def test_quality_is_its_definition(shape: tuple[int, ...], eps: float) -> None:
    weight = torch.randn(shape, dtype=torch.float64) * torch.rand(shape[0], shape[1], *[1] * (len(shape) - 2)) ** 3
    found = db.quality(weight, eps)
    for name, expected in quality_by_loops(weight, eps).items():
        assert getattr(found, name) == pytest.approx(expected, rel=1e-9), name
    mask = db.sparse_mask(weight, eps)
    clean = weight.reshape(-1, math.prod(shape[2:]))[~mask]
    assert found.variance_entropy_clean == pytest.approx(float(db.variance_entropy(clean)))


def test_entropy_identities() -> None:
    w = torch.randn(300, 9, dtype=torch.float64) @ torch.diag(torch.rand(9, dtype=torch.float64))
    h = float(db.variance_entropy(w))
    orthogonal = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64))[0]
    for same in (w * -3, w + torch.randn(9), w.flip(1), w @ orthogonal):
        assert float(db.variance_entropy(same)) == pytest.approx(h, abs=1e-12)
    assert float(db.variance_entropy(torch.randn(50000, 9))) == pytest.approx(math.log10(9), abs=1e-3)
    rank_one = torch.randn(40, 1, dtype=torch.float64) * torch.randn(9, dtype=torch.float64)
    assert float(db.variance_entropy(rank_one)) == pytest.approx(0, abs=1e-12)
    assert float(db.variance_entropy(torch.full((7, 9), 0.1))) == 0
    assert db.entropy_threshold(8192) == pytest.approx(0.9512, abs=1e-4)
    assert 1.0 <= db.quality(torch.randn(64, 64, 3, 3)).variance_entropy_norm <= 1.005
    assert db.random_entropy(1000, 9) == pytest.approx(db.entropy_threshold(1000), abs=0.01)


def test_gradients_are_checked_and_orthogonal_to_the_weights() -> None:
    w = torch.randn(12, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(db.variance_ratio, (w,))
    assert torch.autograd.gradcheck(db.variance_entropy, (w,))
    (grad,) = torch.autograd.grad((db.variance_ratio(w) * torch.randn(9)).sum(), w)
    assert float((grad * w.detach()).sum()) == pytest.approx(0, abs=1e-12)
    few = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(db.variance_entropy(few), few)
    assert db.variance_ratio(few).shape == (4,)
    assert torch.isfinite(grad).all()


def test_sparsity_identities_and_rules() -> None:
    ones = torch.ones(4, 2, 3, 3)
    half = ones.clone()
    half[:2] = 0
    assert [db.sparsity(w) for w in (torch.zeros_like(ones), ones, half, half * 1e-9)] == [1, 0, 0.5, 0.5]
    w = torch.randn(20, 10, 3, 3) * torch.rand(20, 10, 1, 1) ** 4
    shares = [db.sparsity(w, eps) for eps in (0, 0.01, 0.1, 0.5, 2)]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    edge = torch.tensor([1.0, 0.5]).reshape(2, 1, 1, 1)
    assert (db.sparsity(edge, 0.5), db.sparsity(edge, 0.5, inclusive=True)) == (0, 0.5)


def test_orthogonality_identities() -> None:
    q = torch.linalg.qr(torch.randn(18, 18, dtype=torch.float64))[0][:12].reshape(12, 2, 3, 3)
    assert db.orthogonality(q) == pytest.approx(1)
    assert db.orthogonality(q * torch.rand(12, 1, 1, 1)) == pytest.approx(1)
    assert db.orthogonality(torch.randn(1, 2, 3, 3).repeat(6, 1, 1, 1)) == pytest.approx(0, abs=1e-6)
    q[3] = 0
    assert db.orthogonality(q) == pytest.approx(1 - 1 / (12 * 11))
    assert math.isnan(db.orthogonality(q[:1]))
    wide = torch.randn(1100, 1, 3, 3)  # more than one block
    u = torch.nn.functional.normalize(wide.reshape(1100, 9).double(), dim=1)
    expected = 1 - float((u @ u.T - torch.eye(1100)).abs().sum()) / (1100 * 1099)
    assert db.orthogonality(wide) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (torch.randn(32, 16, 3, 3), "random"),
        (torch.randn(8, 64, 5, 5), "random"),
        (torch.randn(32, 16, 1, 1) * torch.randn(3, 3) + 0.05 * torch.randn(32, 16, 3, 3), "low diversity"),
        (torch.randn(32, 16, 3, 3) * (torch.rand(32, 16, 1, 1) < 0.3), "sparse"),
        (torch.zeros(4, 4, 3, 3), "sparse"),
        (torch.randn(32, 16, 3, 3) * torch.tensor([3.0, 2.0, 1.0]), "ok"),
        (torch.randn(2, 2, 3, 3), "too few filters"),
        (torch.randn(4, 6, 5, 5), "too few filters"),
    ],
)
def test_verdicts(weight: Tensor, expected: str) -> None:
    assert db.verdict(db.quality(weight)) == expected


def test_thresholds_are_parameters_and_tiny_layers_have_no_normalised_entropy() -> None:
    found = db.quality(torch.randn(32, 16, 3, 3) * torch.tensor([3.0, 2.0, 1.0]))
    assert db.verdict(found, db.Thresholds(low=0.999)) == "low diversity"
    assert db.verdict(found, db.Thresholds(random=0.5)) == "random"
    assert db.verdict(found, db.Thresholds(sparse=-1.0)) == "sparse"
    tiny = torch.randn(2, 3, 3, 3)
    assert math.isnan(db.quality(tiny).variance_entropy_norm)
    assert math.isfinite(db.quality(tiny, min_filters=1).variance_entropy_norm)
    empty = db.quality(torch.zeros(4, 4, 3, 3))
    assert (empty.sparsity, empty.variance_entropy) == (1, 0)
    assert math.isnan(empty.variance_entropy_clean)


class Branches(nn.Module):
    """A block with a projection: both convolutions that read the input are equally deep."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Conv2d(8, 4, 3)  # defined first, called last
        self.a, self.norm = nn.Conv2d(6, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.skip = nn.Conv2d(6, 8, 1)
        self.up = nn.ConvTranspose2d(4, 4, 3)
        self.unused = nn.Conv2d(4, 4, 3)
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.up(self.late(self.b(self.norm(self.a(x))) + self.skip(x)))[..., :3])


def test_extraction_and_depth() -> None:
    net = Branches()
    found = db.layers(net)
    assert {x.name: (x.depth, x.depth_norm, x.in_channels) for x in found} == {
        "late": (2, 1.0, 8),
        "a": (0, 0.0, 6),
        "b": (1, 0.5, 8),
    }
    assert [x.layer_id for x in found] == [0, 1, 2]
    by_name = {x.name: x for x in found}
    assert by_name["a"].filters.shape == (24, 9)
    assert (by_name["a"].filters[1] == net.a.weight[0, 1].flatten().detach().numpy()).all()
    assert sum(len(x.filters) for x in db.layers(net, depth="order")) == 32 + 24 + 64 + 16
    assert [x.name for x in db.layers(net, (1, 1))] == ["skip"]
    state = {n: t for n, t in net.state_dict().items() if not n.startswith(("up", "unused"))}
    assert [x.name for x in db.layers(state)] == ["late.weight", "a.weight", "b.weight"]
    assert db.layers(nn.Sequential(nn.Conv2d(1, 1, 3)))[0].depth_norm == 0


def test_folding_batch_norms() -> None:
    net = Branches().eval()
    nn.init.uniform_(net.norm.weight, 0.5, 2)
    net.norm.running_var.uniform_(0.5, 2)
    folded = {x.name: x.weight for x in db.layers(net, fold_bn=True)}
    expected = torch.nn.utils.fusion.fuse_conv_bn_eval(net.a, net.norm).weight
    torch.testing.assert_close(folded["a"], expected.detach())
    torch.testing.assert_close(folded["b"], net.b.weight.detach())


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if float(x.sum()) > 0 else x


def test_networks_that_cannot_be_traced_and_other_modules() -> None:
    assert len(db.layers(Untraceable())) == 1
    with pytest.raises(ValueError, match=r"depth='graph': the network cannot be traced"):
        db.layers(Untraceable(), depth="graph")
    with pytest.raises(ValueError, match="fold_bn=True: the network cannot be traced"):
        db.layers(Untraceable(), fold_bn=True)
    parametrised = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 3, 3))
    assert db.layers(parametrised)[0].filters.shape == (6, 9)
    assert len(db.layers(InceptionDWConv2d(32), None)) == 3
    owner = nn.Conv2d(2, 2, 3)
    owner.inner = nn.Conv2d(2, 2, 3)  # a module that is one node of the graph, with a convolution inside
    assert [(x.name, x.depth) for x in db.layers(nn.Sequential(owner, nn.Conv2d(2, 2, 3)))] == [
        ("0", 0),
        ("0.inner", 0),
        ("1", 1),
    ]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: db.layers(nn.Conv2d(1, 1, 3), depth="onnx"), "depth='onnx'"),
        (lambda: db.layers(nn.Conv2d(1, 1, 3), 0), "kernel_size=0"),
        (lambda: db.layers({}, fold_bn=True), "fold_bn=True: needs a module"),
        (lambda: db.layers(nn.LazyConv2d(1, 3)), "lazy"),
        (lambda: db.study({}), "groups={}"),
        (lambda: db.study({"a": iter([np.ones((3, 9))])}), "filters='list_iterator'"),
        (lambda: db.study({"a": np.ones((3, 9)), "b": np.ones((3, 4))}, warn=False), "taps"),
        (lambda: db.study({"a": np.ones((3, 9))}, warn=False), "x_range"),
        (lambda: db.study(groups(), weights=[1.0], warn=False), "weights=.*9 numbers"),
        (lambda: db.study(groups(), bins=0, warn=False), "bins=0"),
        (lambda: db.study(groups(), x_range=(50, 60), warn=False), "no coefficient"),
        (lambda: db.study({"a": np.full((5, 9), np.nan)}, warn=False), "not finite"),
        (lambda: db.quality(torch.full((2, 2, 3, 3), math.inf)), "not finite"),
        (lambda: db.quality(torch.ones(3, 3)), r"weight=\(3, 3\)"),
        (lambda: db.sparsity(torch.ones(1, 1, 3, 3), -1), "eps=-1"),
        (lambda: db.Moments().basis(), "at least 2"),
    ],
)
def test_bad_arguments(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def database() -> db.Database:
    nets = {"one": Branches(), "two": nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3))}
    tags: Any = {"one": {"Task": "Semantic Segmentation", "share": 0.5}, "two": {"Task": "Klassifikation für Ö"}}
    return db.Database.from_models(nets, tags)


@pytest.mark.parametrize("suffix", ["h5", "safetensors"])
def test_files_come_back(tmp_path: Path, suffix: str) -> None:
    written = database()
    written.save(tmp_path / f"x.{suffix}")
    read = db.Database.open(tmp_path / f"x.{suffix}")
    assert (read.filters[:] == written.filters).all()
    for a, b in zip(written.records, read.records, strict=True):
        assert {k: b[k] for k in a} == a
    sets = read.groups("Task")
    assert {n: len(r) for n, r in sets.items()} == {"Segmentation": 120, "Klassifikation für Ö": 20}
    a = db.study(sets, warn=False)
    b = db.study(written.groups("model"), warn=False)
    assert (a.matrix == b.matrix).all()


def test_published_layout(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    written = database()
    written.save(tmp_path / "x.h5")
    with h5py.File(tmp_path / "x.h5") as file:
        assert file["filters"].shape == written.filters.shape
        table = file["meta/table"]
        assert [table.attrs[f"{n}_kind"] for n in ("conv_depth", "values_block_0")]
        places = {
            bytes(v).split(b"V")[1].split(b"\n")[0]: k
            for k, v in table.attrs.items()
            if k.endswith("_kind") and b"V" in bytes(v)
        }
        ids = table[places[b"filter_ids"].removesuffix("_kind")][:, 0].tolist()
    first = written.records[0]
    assert ids[0] == f"{first['start']}:{first['stop'] - 1}".encode()
    with h5py.File(tmp_path / "other.h5", "w") as file:  # three-dimensional filters under the README's name
        file["filter"] = np.ones((3, 3, 3), np.float32)
        file.create_group("meta/x")
    with pytest.raises(ValueError, match="table format"):
        db.Database.open(tmp_path / "other.h5")


class Bomb:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_nothing_in_a_file_is_unpickled(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    database().save(tmp_path / "x.h5")
    with h5py.File(tmp_path / "x.h5", "a") as file:
        attributes = file["meta/table"].attrs
        attributes["conv_depth_kind"] = np.bytes_(pickle.dumps(["conv_depth", Bomb(tmp_path / "ran")], 0))
    with pytest.raises(ValueError, match="column block conv_depth names"):
        db.Database.open(tmp_path / "x.h5")
    assert not (tmp_path / "ran").exists()


def test_files_that_are_not_ours(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        db.Database.open(tmp_path / "none.h5")
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        database().save(tmp_path / "x.csv")


def test_groups_by_depth_and_function() -> None:
    whole = database()
    assert {n: len(r) for n, r in whole.groups("depth").items()} == {"0.0-0.1": 36, "0.4-0.5": 64, "0.9-1.0": 40}
    late = whole.groups(lambda r: "late" if r["conv_depth_norm"] > 0.4 else None)
    assert {n: len(r) for n, r in late.items()} == {"late": 104}
    with pytest.raises(ValueError, match="by='task'"):
        whole.groups("task")
    with pytest.raises(ValueError, match="taps; choose one"):
        db.Database.from_models({"a": nn.Sequential(nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 5))}, kernel_size=None)
    with pytest.raises(ValueError, match="none has kernels"):
        db.Database.from_models({"a": nn.Linear(2, 2)})


def test_section_says_how_many_are_degenerate() -> None:
    net = nn.Sequential(nn.Conv2d(3, 32, 7), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3))
    with torch.no_grad():
        net[2].weight.mul_((torch.rand(32, 32, 1, 1) < 0.2).float())
        net[4].weight.mul_(torch.tensor([3.0, 2.0, 1.0]))
    calls = []
    report = db.inspect_filters(net, progress=lambda k, n: calls.append((k, n)))
    assert report.sentence() == "1 of 2 layers is degenerate: 1 sparse."
    assert calls == [(1, 2), (2, 2)]
    found = db.section(net)
    assert found.verdict == "2 of 3 layers are degenerate: 1 sparse, 1 random."
    assert found.level == "bad"
    assert [r["verdict"] for r in found.tables["layers"]] == ["random", "sparse", "ok"]
    assert len(found.pictures) == 3
    assert found.data["degenerate"] == 2
    nothing = db.section(nn.Linear(2, 2))
    assert (nothing.level, nothing.pictures) == ("note", ())
    assert 0 < report.mean("sparsity") < 1


def test_pictures_show_what_they_say(tmp_path: Path) -> None:
    found = db.study(groups(), warn=False)
    plots = db.plots
    heat = plots.heatmap(found)
    np.testing.assert_array_equal(heat.axes[0].images[0].get_array(), found.matrix[np.ix_(found.rank, found.rank)])
    assert len(plots.ridge(found).axes) == 9
    assert len(plots.shift_boxes({"model": found}).axes[0].lines) > 4
    sun = plots.scatter(found.basis, groups()["noise"], (0, 2)).axes[0].images[0].get_array()
    assert float(sun.max()) == 1
    assert len(plots.basis_images(found.basis).axes) == 9
    assert plots.explained({"all": found.basis}).axes[0].lines[0].get_ydata()[-1] == pytest.approx(1)
    qualities = [db.quality(torch.randn(8, 4, 3, 3)) for _ in range(4)]
    boxes = plots.depth_boxes([0, 0.05, 0.5, 1], qualities).axes[0]
    assert [t.get_text() for t in boxes.get_xticklabels()] == ["first", "≤ 0.1", "≤ 0.5", "≤ 1.0"]
    weight = torch.randn(5, 3, 3, 3)
    sheet = plots.filter_sheet(weight).axes[0].images[0].get_array()
    np.testing.assert_allclose(sheet[4:7, 8:11], weight[2, 1].numpy() / float(weight.abs().max()), rtol=1e-6)
    colours = plots.filter_sheet(weight, rgb=True).axes[0].images[0].get_array()
    np.testing.assert_allclose(
        colours[:, 4:7], 0.5 + 0.5 * (weight[1] / weight.abs().max()).permute(1, 2, 0), rtol=1e-5
    )
    heat.savefig(tmp_path / "heat.png")
    assert (tmp_path / "heat.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="rgb=True"):
        plots.filter_sheet(torch.randn(2, 4, 3, 3), rgb=True)


def test_density_and_weighted_quantiles() -> None:
    values = RNG(0).normal(size=4000)
    places, height = density(np.histogram(values, 200, (-5, 5))[0], (-5.0, 5.0))
    np.testing.assert_allclose(height, np.exp(-(places**2) / 2) / math.sqrt(2 * math.pi), atol=0.03)
    assert weighted_quantiles(np.array([3.0, 1.0, 2.0]), np.array([1, 1, 8]), (0.0, 0.1, 0.5, 1.0)) == [1, 1, 2, 3]
