"""Initial filters: identities of the laws, banks and learners; whole models; receptive fields; advice."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import scipy.fft
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchconv
from torchconv import initializers as ti
from torchconv.ops.plain import DepthwiseConv2d, PlainConv2d


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, padding=2),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(12, 4, 1),
    )


# Laws


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("lecun_1998", "lecun1998_bound_2.4_over_fan_in"),
        ("lecun_uniform", "lecun_uniform_bound_unit_variance"),
        ("lecun_normal", "lecun_normal_std"),
        ("xavier_uniform", "xavier_uniform_bound"),
        ("xavier_normal", "xavier_normal_std"),
        ("he_uniform", "he_uniform_bound_fan_in"),
        ("he_normal", "he_normal_std_fan_in"),
    ],
)
def test_samples_follow_their_law(name: str, column: str) -> None:
    shape = (64, 16, 3, 3)
    weight = ti.law(name)(shape, generator=seeded(3))
    scale = ti.scales(shape)[column]
    uniform = "bound" in column
    if uniform:
        assert weight.abs().max() <= scale
    std = scale / math.sqrt(3) if uniform else scale
    assert abs(float(weight.std()) - std) < 3 * std / math.sqrt(2 * weight.numel())


def test_scales_agree_with_torch() -> None:
    for fan in ("fan_in", "fan_out"):
        weight = torch.empty(6000, 5, 3)
        nn.init.kaiming_uniform_(weight, a=0.3, mode=fan, generator=seeded())  # type: ignore[arg-type]
        bound = ti.scales(weight.shape, negative_slope=0.3)[f"he_uniform_bound_{fan}"]
        assert float(weight.abs().max()) == pytest.approx(bound, rel=1e-3)
    assert ti.scales((8, 1, 3, 3), groups=8, fan_out_groups=True)["fan_out"] == 9
    assert ti.scales((8, 1, 3, 3))["fan_out"] == 72


def test_orthogonal_rows_or_columns() -> None:
    wide = ti.orthogonal((6, 3, 3, 3), generator=seeded(), gain=2.0, dtype=torch.float64).flatten(1)
    tall = ti.orthogonal((30, 3, 2), generator=seeded(), gain=1.0, dtype=torch.float64).flatten(1)
    torch.testing.assert_close(wide @ wide.T, 4 * torch.eye(6, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(tall.T @ tall, torch.eye(6, dtype=torch.float64), atol=1e-5, rtol=0)


@pytest.mark.parametrize("groups", [1, 2])
def test_delta_orthogonal_is_an_isometry_at_any_depth(groups: int) -> None:
    convs = [
        nn.Conv2d(c, 8, 3, padding=1, padding_mode="circular", groups=groups, dtype=torch.float64) for c in (4, 8, 8, 8)
    ]
    model = ti.init(nn.Sequential(*convs), "delta_orthogonal")
    x = noise(2, 4, 7, 6)
    torch.testing.assert_close(model(x).flatten(1).norm(dim=1), x.flatten(1).norm(dim=1), rtol=1e-5, atol=0)


def test_he_keeps_and_xavier_loses_the_signal() -> None:
    def last(method: str) -> float:
        layers: list[nn.Module] = []
        for _ in range(20):
            layers += [nn.Linear(256, 256), nn.ReLU()]
        model = ti.init(nn.Sequential(*layers), method)
        x = torch.randn(64, 256, generator=seeded())
        return float(model(x).detach().square().mean())

    assert 0.2 < last("he_normal") < 2
    assert 2.0**-25 < last("xavier_normal") < 2.0**-17


# Banks


@pytest.mark.parametrize("kernel", [(5,), (4, 3), (2, 3, 4)])
def test_dct_is_the_inverse_transform_of_impulses(kernel: tuple[int, ...]) -> None:
    bank = ti.dct_bank(kernel, dtype=torch.float64)
    impulses = np.eye(math.prod(kernel)).reshape(-1, *kernel)
    expected = scipy.fft.idctn(impulses, axes=range(1, 1 + len(kernel)), norm="ortho")
    np.testing.assert_allclose(bank.numpy(), expected, atol=1e-14)


def test_dct_orders() -> None:
    full = ti.dct_bank((3, 3))
    assert torch.equal(ti.dct_bank((3, 3), 3, zigzag=True), full[[0, 1, 3]])
    assert torch.equal(ti.dct_bank((3, 3), drop_dc=True), full[1:])
    with pytest.raises(ValueError, match=r"count=9.*8 filters"):
        ti.dct_bank((3, 3), 9, drop_dc=True)


def test_gabor_options() -> None:
    bank = ti.gabor_bank((6, 9), 4, (3.0, 5.0), zero_mean=True, unit_norm=True, dtype=torch.float64)
    assert bank.shape == (16, 6, 9)
    assert bank.mean((1, 2)).abs().max() < 1e-15
    torch.testing.assert_close(bank.flatten(1).norm(dim=1), torch.ones(16, dtype=torch.float64))
    even, odd = ti.gabor_bank(7, 1, dtype=torch.float64)
    torch.testing.assert_close(even.rot90(2), even)
    torch.testing.assert_close(odd.rot90(2), -odd)


# Learned filters


def test_whitening_folds_into_a_convolution() -> None:
    images = noise(5, 2, 9, 8)
    x = ti.patches(images, 3)
    white = ti.zca(x, 0.1)
    assert torch.equal(x, F.unfold(images, 3).transpose(1, 2).reshape(-1, 18))
    values, vectors = torch.linalg.eigh(white.covariance)
    expected = vectors @ torch.diag(values / (values + 0.1)) @ vectors.T
    torch.testing.assert_close(torch.cov(white(x).T, correction=0), expected)
    torch.testing.assert_close(torch.cov(ti.zca(x, 0.0)(x).T, correction=0), torch.eye(18, dtype=torch.float64))
    filters = noise(4, 18, seed=1)
    weight, bias = white.fold(filters)
    y = F.conv2d(images, weight.reshape(4, 2, 3, 3), bias)
    torch.testing.assert_close(y.permute(0, 2, 3, 1).reshape(-1, 4), white(x) @ filters.T)


def test_pca_filters() -> None:
    filters, values = ti.pca_stage(noise(6, 2, 8, 8), (3, 5), 6)
    flat = filters.flatten(1)
    torch.testing.assert_close(flat @ flat.T, torch.eye(6, dtype=torch.float64))
    assert (values.diff() <= 0).all()
    assert filters.sum((2, 3)).abs().max() < 1e-12
    assert (flat.gather(1, flat.abs().argmax(1, keepdim=True)) > 0).all()


def test_pcanet_counts_every_code() -> None:
    images = noise(3, 1, 9, 10)
    net = ti.PCANet(3, 2, 3, block=(4, 5)).fit(images)
    codes, features = net.codes(images), net.transform(images).reshape(3, 2, 2, 2, 8)
    for i in range(2):
        for j in range(2):
            block = codes[1, 0, 4 * i : 4 * i + 4, 5 * j : 5 * j + 5]
            assert features[1, 0, i, j].tolist() == torch.bincount(block.flatten(), minlength=8).tolist()
    with pytest.raises(ValueError, match="overlap=1"):
        ti.PCANet(overlap=1)


def test_spherical_kmeans_does_not_lose() -> None:
    x, start = noise(300, 6), noise(9, 6, seed=1)
    scores = []
    for n in range(6):
        d, _ = ti.spherical_kmeans(x, start, n)
        torch.testing.assert_close(d.norm(dim=1), torch.ones(9, dtype=torch.float64))
        scores.append(float((x @ d.T).abs().amax(1).square().sum()))
    assert all(b >= a - 1e-9 for a, b in pairwise(scores))
    # An atom that wins nothing keeps its place, or takes a sample's when asked to.
    dead = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    data = torch.tensor([[3.0, 0.0], [2.0, 0.1]])
    assert torch.equal(ti.spherical_kmeans(data, dead, 1)[0][1], dead[1])
    assert ti.spherical_kmeans(data, dead, 1, reseed=seeded())[0][1, 0] > 0.9


def test_convolutional_kmeans_by_loops() -> None:
    windows, centroids = noise(10, 2, 7, seed=1), noise(3, 2, 3)
    step = ti.convolutional_kmeans_step(windows, centroids)
    update = centroids.clone()
    for n, window in enumerate(windows):
        scores = [[float((window[:, p : p + 3] * c).sum()) for p in range(5)] for c in centroids]
        k, p = divmod(int(np.argmax(scores)), 5)
        assert (int(step.assignment[n]), int(step.corner[0][n])) == (k, p)
        update[k] += window[:, p : p + 3]
    torch.testing.assert_close(step.centroids, update / update.flatten(1).norm(dim=1)[:, None, None])


def test_sparse_code_is_optimal() -> None:
    x, d = noise(12, 8), noise(20, 8, seed=1)
    penalty = 0.4
    code = ti.sparse_code(x, d, penalty)
    slope = (x - code @ d) @ d.T  # optimality: = penalty · sign where the code lives, smaller elsewhere
    alive = code != 0
    assert alive.any()
    torch.testing.assert_close(slope[alive], penalty * code[alive].sign(), atol=1e-8, rtol=0)
    assert slope.abs().max() <= penalty + 1e-8
    assert not ti.sparse_code(x, d, float((x @ d.T).abs().max())).any()


def test_dictionary_explains_more() -> None:
    x, start = noise(80, 6), noise(10, 6, seed=1)

    def objective(d: Tensor) -> float:
        code = ti.sparse_code(x, d, 0.5)
        return float(0.5 * (x - code @ d).square().sum() + 0.5 * code.abs().sum())

    found = ti.dictionary(x, start, 0.5, 8)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(10, dtype=torch.float64))
    assert objective(found) < 0.97 * objective(ti.dictionary(x, start, 0.5, 0))


def test_map_of_kohonen_keeps_neighbours_near() -> None:
    x = noise(600, 2)
    units = ti.self_organising_map(x, noise(5, 5, 2, seed=1) * 0.01, sigma=2.0)
    near = (units[1:] - units[:-1]).norm(dim=-1).mean()
    far = (units[0] - units[-1]).norm(dim=-1).mean()
    assert far > 2 * near


def test_triangle_code_is_sparse() -> None:
    code = ti.triangle_code(noise(50, 4), noise(8, 4, seed=1))
    assert 0.2 < float((code == 0).double().mean()) < 0.8


# LSUV and whole models


def test_lsuv() -> None:
    x = torch.randn(32, 1, 12, 12, generator=seeded()) * 5
    model = net()
    variances = ti.lsuv(model, x)
    assert list(variances) == ["0", "2", "4"]
    assert all(abs(v - 1) < 0.1 for v in variances.values())
    hidden = x
    for layer in model:
        hidden = layer(hidden).detach()
        if isinstance(layer, nn.Conv2d):
            assert abs(float(hidden.var(correction=0)) - 1) < 0.1
    again = net()
    for p in again.parameters():
        p.data *= 10
    ti.lsuv(again, x)
    torch.testing.assert_close(again.state_dict(), model.state_dict())
    with pytest.raises(ValueError, match=r"data=0.0.*variance after '0'"):
        ti.lsuv(net(), torch.zeros(4, 1, 8, 8))


@pytest.mark.parametrize("method", ti.METHODS)
def test_every_method_on_a_model(method: str) -> None:
    data = torch.rand(24, 1, 14, 14, generator=seeded())
    options: dict[str, Any] = {"samples": 600} if method in ti.LEARNED else {}
    before, state = net().train(), torch.random.get_rng_state()
    model = ti.init(copy.deepcopy(before), method, data=data, seed=5, **options)
    again = ti.init(copy.deepcopy(before), method, data=data, seed=5, **options)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.testing.assert_close(model.state_dict(), again.state_dict(), rtol=0, atol=0)
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for name, tensor in model.state_dict().items():
        assert tensor.isfinite().all()
        if name.endswith("bias"):
            assert not tensor.any()
        elif method != "constant":
            assert tensor.any()
    if method in ti.LEARNED:  # the layers of more than one tap give unit variance
        first = model[0](data).detach()
        assert float(first.std()) == pytest.approx(1, rel=1e-2)
        assert float(model[2](first.relu()).detach().std()) == pytest.approx(1, rel=1e-2)
        shape_sum = model[0].weight.sum((1, 2, 3)).abs().max() / model[0].weight.flatten(1).norm(dim=1).max()
        assert method == "conv_kmeans" or shape_sum < 1e-3  # no filter answers to constant images


@pytest.mark.parametrize("method", ["gabor", "dct"])
def test_banks_have_their_norm_and_shape(method: str) -> None:
    model = nn.Sequential(nn.Conv1d(2, 7, 5), nn.ConvTranspose1d(7, 3, 2))
    ti.init(model, method, gain=1.5)
    torch.testing.assert_close(model[0].weight.flatten(1).norm(dim=1), torch.full((7,), 1.5))  # type: ignore[union-attr,operator]
    with pytest.raises(ValueError, match="one or two axes"):
        ti.init(nn.Conv3d(1, 2, 3), "gabor")
    colour = ti.init(nn.Conv2d(3, 27, 3), "dct", gain=1.0).weight.flatten(1)  # type: ignore[union-attr,operator]
    torch.testing.assert_close(colour @ colour.T, torch.eye(27), atol=1e-5, rtol=0)


def test_transposed_layers_swap_their_fans() -> None:
    layer = ti.init(nn.ConvTranspose2d(64, 32, 3, groups=4), "lecun_normal", seed=1)
    assert layer.weight.shape == (64, 8, 3, 3)
    assert float(layer.weight.detach().std()) == pytest.approx((16 * 9) ** -0.5, rel=0.05)  # type: ignore[operator]
    dirac = nn.ConvTranspose2d(4, 4, 3, padding=1, groups=2)
    x = torch.rand(1, 4, 5, 5)
    torch.testing.assert_close(ti.init(dirac, "dirac")(x), x)


def test_which_layers() -> None:
    model = net()
    kept = copy.deepcopy(model.state_dict())
    ti.init(model, "he_uniform", layers=["2"], fan="out", negative_slope=0.1)
    assert [n for n in kept if not torch.equal(kept[n], model.state_dict()[n])] == ["2.weight", "2.bias"]
    ti.init(model, "orthogonal", layers=lambda name, m: m.kernel_size == (1, 1), gain=1.0)
    w = model[4].weight.flatten(1)
    torch.testing.assert_close(w @ w.T, torch.eye(4), atol=1e-5, rtol=0)
    ours = PlainConv2d(4, 4, 3, padding="same", bias=False)
    ti.init(ours, "dirac")
    x = torch.rand(1, 4, 6, 6)
    torch.testing.assert_close(ours(x), x)
    weighted = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 4, 3))
    ti.init(weighted, "dct", gain=1.0)
    torch.testing.assert_close(weighted.weight[:, 0], ti.dct_bank((3, 3), 4, zigzag=True))
    half = ti.init(nn.Conv2d(2, 4, 3, dtype=torch.bfloat16), "he_normal")
    assert half.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ti.init(net(), "gabbor"), "method='gabbor'.*did you mean gabor"),
        (lambda: ti.init(net(), "pca"), "data=None.*batch of inputs"),
        (lambda: ti.init(net(), layers=["9"]), r"layers=\['9'\].*no such layers"),
        (lambda: ti.init(nn.ReLU()), "model='ReLU'"),
        (lambda: ti.init(nn.LazyConv2d(3, 3)), "run it once"),
        (lambda: ti.law("he"), "name='he'"),
        (lambda: ti.law("xavier_normal")((2, 2), fan="out"), "fan='out'"),
        (lambda: ti.scales((3,)), r"shape=\(3,\)"),
        (lambda: ti.delta_orthogonal((2, 3, 3)), "output as input channels"),
        (lambda: ti.delta_orthogonal((3, 2, 4)), "must be odd"),
        (lambda: ti.patches(torch.rand(1, 1, 4), 5), "kernel_size=5"),
        (lambda: ti.advise(torch.ones(2, 1, 8, 8)), "must vary"),
        (lambda: ti.receptive_fields(net(), (1, 9, 9), ["x"]), r"layers=\['x'\]"),
    ],
)
def test_refusals(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_wide_layers_are_not_whitened() -> None:
    data = torch.rand(2, 130, 6, 6, generator=seeded())
    model = ti.init(nn.Conv2d(130, 4, 3), "pca", data=data)
    assert float(model(data).detach().std(correction=0)) == pytest.approx(1, rel=1e-3)


def test_layers_that_do_not_run_are_named() -> None:
    class Skips(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self[0](x)
            return out

    model = Skips(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3))
    with pytest.raises(ValueError, match=r"layers=\['1'\]: did not run"):
        ti.init(model, "pca", data=torch.rand(4, 1, 8, 8), layers=["0", "1"])
    ti.init(model, "pca", data=torch.rand(4, 1, 8, 8))
    assert not model[1].bias.any()  # He's law, as for other layers that cannot learn
    assert list(ti.lsuv(model, torch.rand(4, 1, 8, 8))) == ["0"]


# Size and number


def test_measured_fields_are_the_calculated_ones() -> None:
    layers = [(7, 2, 1), (3, 2, 1), (3, 1, 2), (2, 2, 1), (3, 1, 1)]
    stages: list[nn.Module] = [
        nn.Conv2d(1, 2, 7, 2, 3),
        nn.MaxPool2d(3, 2, 1),
        nn.Sequential(nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 3, 1, 2, 2)),
        nn.MaxPool2d(2, 2, ceil_mode=True),
        nn.Conv2d(2, 2, 3, 1, 1),
    ]
    found = ti.receptive_fields(nn.Sequential(*stages), (1, 131, 140))
    assert len(found) == 5
    for n, field in enumerate(found.values(), start=1):
        size, jump = ti.receptive_field(layers[:n])
        assert field == ti.Field((size, size), (jump, jump), False)


def test_fields_of_branches_and_other_axes() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.large, self.last = (
                nn.Conv1d(2, 2, 3, padding=1),
                nn.Conv1d(2, 2, 9, padding=4),
                nn.Conv1d(2, 1, 3),
            )

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(self.small(x) + self.large(x))
            return out

    model = Branches()
    kept = copy.deepcopy(model.state_dict())
    found = ti.receptive_fields(model, (2, 40))
    assert {n: f.size for n, f in found.items()} == {"small": (3,), "large": (9,), "last": (11,)}
    torch.testing.assert_close(model.state_dict(), kept, rtol=0, atol=0)
    ours = ti.receptive_fields(DepthwiseConv2d(4, kernel_size=5, padding="same"), (4, 21, 21), [""])[""]
    assert ours == ti.Field((5, 5), (1, 1), False)
    wide = ti.receptive_fields(nn.Conv3d(1, 1, (1, 3, 5)), (1, 6, 9, 12), [""])[""]
    assert wide == ti.Field((1, 3, 5), (1, 1, 1), False)
    assert ti.receptive_fields(nn.AdaptiveAvgPool2d(1), (1, 8, 8), [""])[""].clipped


def test_advice_follows_the_images() -> None:
    fine = noise(60, 1, 24, 24).float()
    coarse = F.avg_pool2d(noise(60, 1, 32, 32).float(), 9, 1)
    little, much = ti.advise(fine), ti.advise(coarse, object_size=40)
    assert little.kernel_size == 3
    assert much.kernel_size > 5
    assert little.filters == 8  # white noise: all components alike
    assert much.filters < ti.components(fine, much.kernel_size)[0]
    assert "see 40 at once" in str(much)
    assert len(much.table) == 5
    stripes = torch.arange(24.0).remainder(4).expand(8, 1, 24, 24)
    assert ti.components(stripes, 3)[0] <= 2


def test_filter_report() -> None:
    w = ti.orthogonal((4, 1, 3, 3), generator=seeded(), gain=3.0)
    report = ti.filter_report(w)
    assert report["orthogonality"] < 1e-5
    assert report["effective_rank"] == pytest.approx(4, rel=1e-5)
    assert report["duplicates"] == []
    shifted = torch.zeros(3, 1, 4, 4)
    shifted[0, 0, :2, :2] = torch.tensor([[1.0, 2.0], [-3.0, 1.0]])
    shifted[1, 0, 1:3, 2:] = -2 * shifted[0, 0, :2, :2]
    shifted[2, 0, 0] = 1
    assert ti.filter_report(shifted)["duplicates"] == [(0, 1)]
    bank = torch.randn(24, 2, 5, 4, generator=seeded())
    bank[3], bank[9, :, 1:], bank[9, :, 0] = 0.3 * bank[1] + 0.02 * bank[0], bank[1, :, :-1], 0
    pairs = ti.filter_report(bank, 0.8)["duplicates"]
    padded = F.pad(bank / bank.flatten(1).norm(dim=1)[:, None, None, None], (3, 3, 4, 4))
    likeness = F.conv2d(padded, bank / bank.flatten(1).norm(dim=1)[:, None, None, None]).abs().amax((2, 3))
    assert pairs == [tuple(p) for p in (likeness.triu(1) > 0.8).nonzero().tolist()]
    assert (1, 3) in pairs


def test_copies_are_found_in_banks_whose_correlations_would_not_fit_in_memory() -> None:
    bank = torch.randn(512, 3, 16, 16, generator=seeded())  # 2 GB at all shifts
    bank[500, :, 2:, 1:] = -bank[7, :, :-2, :-1]
    assert ti.filter_report(bank, 0.8)["duplicates"] == [(7, 500)]


def test_the_short_name() -> None:
    assert torchconv.initializers is ti
    assert ti.init.part.name == "initializers"
    assert set(ti.__all__) <= set(dir(ti))
