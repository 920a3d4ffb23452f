"""The weighted convolution: worked numbers, the identities of the method, conversions, and the search for a density."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.parity.core import run_file
from torchconv.ops.weightedconv import (
    WeightedConv1d,
    WeightedConv2d,
    WeightedConv3d,
    density_kernel,
    density_profile,
    search_density,
    suggested_density,
    weighted_,
    weighted_conv,
)

LAYERS: dict[int, Any] = {1: WeightedConv1d, 2: WeightedConv2d, 3: WeightedConv3d}
CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CONVOLVE = (F.conv1d, F.conv2d, F.conv3d)


def tap_by_tap(weight: Tensor, densities: list[list[float]]) -> Tensor:
    """W ⊙ Φ with every factor looked up by its distance to the centre."""
    result = weight.clone()
    for tap in (
        torch.cartesian_prod(*[torch.arange(k) for k in weight.shape[2:]]).reshape(-1, weight.dim() - 2).tolist()
    ):
        factor = 1.0
        for i, k, density in zip(tap, weight.shape[2:], densities, strict=True):
            distance = abs(i - k // 2)
            if distance:
                factor *= density[k // 2 - distance]
        result[(slice(None), slice(None), *tap)] *= factor
    return result


def test_worked_numbers() -> None:
    phi = density_kernel(torch.tensor([0.5]), 2)
    assert phi.tolist() == [[0.25, 0.5, 0.25], [0.5, 1.0, 0.5], [0.25, 0.5, 0.25]]
    alpha = density_profile(torch.tensor([0.2, 0.8], dtype=torch.float64))
    assert alpha.tolist() == [0.2, 0.8, 1.0, 0.8, 0.2]
    phi = density_kernel(torch.tensor([0.2, 0.8], dtype=torch.float64), 2)
    assert float(phi.sum()) == pytest.approx(9.0)
    assert float(phi[0, 0]) == pytest.approx(0.04)
    assert torch.linalg.matrix_rank(phi) == 1
    assert density_kernel(torch.tensor([]), 3).tolist() == [[[1.0]]]
    assert suggested_density(7) == (0.25, 0.15, 0.55)
    assert suggested_density(5, 3) == (0.1, 0.7)
    assert len(suggested_density(11)) == 5
    assert suggested_density(13)[::2] == pytest.approx((0.25, 0.15, 0.55))


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([1, 3, 5, 7]), min_size=1, max_size=3).map(tuple),
    groups=st.sampled_from([1, 2]),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    bias=st.booleans(),
)
def test_against_tap_by_tap(sizes: tuple[int, ...], groups: int, stride: int, dilation: int, bias: bool) -> None:
    torch.manual_seed(0)
    n = len(sizes)
    densities = [(torch.rand(k // 2) + 0.3).tolist() for k in sizes]
    layer = LAYERS[n](4, 6, sizes, stride, "same", dilation, groups, bias, density=densities, dtype=torch.float64)
    x = torch.randn(2, 4, *(9, 8, 7)[:n], dtype=torch.float64)
    expected = CONVS[n](4, 6, sizes, 1, "same", dilation, groups, bias).double()
    with torch.no_grad():
        expected.weight.copy_(tap_by_tap(layer.weight, densities))
        if bias:
            expected.bias.copy_(layer.bias.normal_())
    dense = expected(x)[(slice(None), slice(None), *[slice(None, None, stride)] * n)]
    torch.testing.assert_close(layer(x), dense, rtol=1e-9, atol=1e-12)
    per_axis = [torch.tensor(d, dtype=torch.float64) for d in densities]
    y = weighted_conv(x, layer.weight, per_axis, layer.bias, stride, "same", dilation, groups)
    torch.testing.assert_close(y, layer(x))
    torch.testing.assert_close(layer.fold()(x), layer(x))


def test_ones_are_the_plain_convolution() -> None:
    torch.manual_seed(1)
    layer = WeightedConv2d(3, 4, 5, density=[1.0, 1.0])
    x = torch.randn(2, 3, 9, 9)
    assert torch.equal(layer(x), F.conv2d(x, layer.weight, layer.bias))
    assert sum(p.numel() for p in layer.parameters()) == 4 * 3 * 25 + 4


def test_contraction_axis_by_axis() -> None:
    """Unfolding, multiplying and contracting with α on each axis gives the same."""
    torch.manual_seed(2)
    layer = WeightedConv2d(4, 6, 3, 2, 1, 1, 2, False, density=[0.6], dtype=torch.float64)
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    alpha = torch.tensor([0.6, 1.0, 0.6], dtype=torch.float64)
    patches = F.unfold(x, 3, padding=1, stride=2).reshape(2, 2, 2, 3, 3, -1)
    weight = layer.weight.reshape(2, 3, 2, 3, 3)
    y = torch.einsum("ngchwl,gochw,h,w->ngol", patches, weight, alpha, alpha).reshape(2, 6, 5, 4)
    torch.testing.assert_close(layer(x), y)


def test_gradients_of_weight_and_density() -> None:
    torch.manual_seed(3)
    x = torch.randn(1, 2, 8, 7, dtype=torch.float64)
    weight = torch.randn(2, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    density = torch.tensor([0.2, 0.8], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w, d: weighted_conv(x, w, d), (weight, density))
    effective = (weight * density_kernel(density, 2)).detach().requires_grad_()
    (g,) = torch.autograd.grad(F.conv2d(x, effective).square().sum(), effective)
    phi = density_kernel(density, 2).detach()
    (dw,) = torch.autograd.grad(weighted_conv(x, weight, density).square().sum(), weight)
    torch.testing.assert_close(dw, phi * g)
    moved = (weight - 0.1 * dw) * phi - weight * phi
    torch.testing.assert_close(moved, -0.1 * phi**2 * g)


def test_flip_symmetry() -> None:
    torch.manual_seed(4)
    layer = WeightedConv2d(2, 3, 5, 1, 2, density=[0.3, 0.7], dtype=torch.float64)
    x = torch.randn(1, 2, 8, 7, dtype=torch.float64)
    y = layer(x)
    with torch.no_grad():
        layer.weight.copy_(layer.weight.flip(-2, -1))
    torch.testing.assert_close(layer(x.flip(-2, -1)), y.flip(-2, -1))


@pytest.mark.parametrize("kernel_size", [3, (3, 7)])
def test_learned_density(kernel_size: Any) -> None:
    torch.manual_seed(5)
    layer = WeightedConv2d(2, 2, kernel_size, padding="same", density="learned").double()
    assert layer.den is not None
    assert layer.den.numel() == (1 if kernel_size == 3 else 4)
    assert "Phi" not in layer.state_dict()
    x = torch.randn(1, 2, 8, 9, dtype=torch.float64)
    layer(x).square().sum().backward()
    assert (layer.den.grad != 0).all()
    torch.testing.assert_close(layer.merge()(x), layer(x))
    twin = WeightedConv2d(2, 2, kernel_size, padding="same", density=[d.tolist() for d in layer.density]).double()
    torch.testing.assert_close(twin.phi(), layer.phi().detach(), rtol=1e-6, atol=1e-7)
    started = WeightedConv2d(2, 2, 5, density="learned", density_init=[0.3, 0.9])
    torch.testing.assert_close(started.density[1], torch.tensor([0.3, 0.9]))


@pytest.mark.parametrize("groups", [1, 4])
def test_initial_scale(groups: int) -> None:
    torch.manual_seed(6)
    options: dict[str, Any] = {"density": [0.25, 0.15, 0.55], "groups": groups}
    official = WeightedConv2d(64, 64, 7, init="official", **options)
    effective = WeightedConv2d(64, 64, 7, init="effective", **options)
    expected = (2 / (64 * 49)) ** 0.5
    assert official.weight.detach().std() == pytest.approx(expected, rel=0.05)
    scale = effective.kernel().detach().square().mean().sqrt()
    assert scale == pytest.approx(expected * groups**0.5, rel=0.05)
    assert effective.bias is not None
    assert (effective.bias == 0).all()


@pytest.mark.parametrize("n", [1, 2, 3])
def test_from_conv_keeps_the_output(n: int) -> None:
    torch.manual_seed(7)
    conv = CONVS[n](4, 6, 5, 2, 2, groups=2, padding_mode="replicate").eval()
    x = torch.randn(2, 4, *(9, 8, 7)[:n])
    for density in (None, [0.2, 0.8], "learned"):
        weighted = LAYERS[n].from_conv(conv, density)
        torch.testing.assert_close(weighted(x), conv(x), rtol=1e-5, atol=1e-5)
        assert not weighted.training
    with pytest.warns(UserWarning, match="density"), pytest.raises(ValueError, match="density"):
        LAYERS[n].from_conv(conv, [0.0, 1.0])
    with pytest.raises(ValueError, match="conv"):
        LAYERS[n].from_conv(nn.Linear(2, 2))


def test_weighted_model() -> None:
    torch.manual_seed(8)
    shared = nn.Conv2d(4, 4, 3, padding=1)
    layers = [nn.Conv2d(3, 4, 3), shared, nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 5, padding=2, groups=4), shared]
    net = nn.Sequential(*layers, nn.Conv2d(4, 4, (3, 5)), nn.Conv2d(4, 4, 4))
    x = torch.randn(1, 3, 16, 16)
    before = net(x)
    assert weighted_(net, {1: [], 3: [0.7], 5: None, 4: [1.0]}, skip_depthwise=True) is net
    torch.testing.assert_close(net(x), before, rtol=1e-4, atol=1e-5)
    assert net[1] is net[4]
    assert [isinstance(m, WeightedConv2d) for m in net] == [True, True, False, False, True, False, False]
    fresh = weighted_(nn.Conv1d(2, 2, 3), {3: "learned"}, init="effective")
    assert isinstance(fresh, WeightedConv1d)
    assert fresh.init == "effective"


def test_official_defaults_and_loading() -> None:
    layer = WeightedConv2d.official(2, 3, 5, [0.2, 0.8])
    assert layer(torch.zeros(1, 2, 8, 8)).shape == (1, 3, 6, 6)
    assert set(layer.state_dict()) == {"weight", "alfa", "Phi"}
    other = WeightedConv2d.official(2, 3, 5, [0.4, 0.4])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.load_state_dict(other.state_dict())  # consistent: the stored density is taken over
    torch.testing.assert_close(layer.density[0], torch.tensor([0.4, 0.4]))
    with pytest.warns(UserWarning, match="Phi"):
        layer.load_state_dict({**other.state_dict(), "Phi": torch.ones(5, 5)})
    assert WeightedConv2d.official(2, 3, 7).den is not None


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"kernel_size": 4}, "kernel_size"),
        ({"density": [0.5, 0.5]}, "density"),
        ({"density": [[0.5]]}, "density"),
        ({"density": [float("nan")]}, "density"),
        ({"density": 0.7}, "density"),
        ({"density": ["0.7"]}, "density"),
        ({"density": [[0.7], 0.7]}, "density"),
        ({"density": torch.ones(1, 1, 1)}, "density"),
        ({"density": "trained"}, "density"),
        ({"density_init": [0.5]}, "density_init"),
        ({"kernel_size": (3, 5), "density": [0.5]}, "density"),
        ({"init": "kaiming"}, "init"),
        ({"padding_mode": "mirror"}, "padding_mode"),
    ],
)
def test_errors(options: dict[str, Any], argument: str) -> None:
    with pytest.raises(ValueError, match=f"^{argument}="):
        WeightedConv2d(2, 2, **{"kernel_size": 3, **options})


def test_functional_errors() -> None:
    with pytest.raises(ValueError, match="density"):
        weighted_conv(torch.zeros(1, 1, 5, 5), torch.zeros(1, 1, 3, 3), torch.ones(2))
    with pytest.raises(ValueError, match=r"^density="):
        weighted_conv(torch.zeros(1, 1, 5, 5), torch.zeros(1, 1, 3, 3), [0.5])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="ndim"):
        density_kernel(torch.ones(2))


def test_densities_as_tensors() -> None:
    """Values found elsewhere, such as ``other.density``, are taken as they are."""
    learned = WeightedConv2d(2, 2, (3, 5), density="learned")
    layer = WeightedConv2d(2, 2, (3, 5), density=[d.detach() for d in learned.density])  # type: ignore[arg-type]
    torch.testing.assert_close(layer.phi(), learned.phi())
    flat = WeightedConv2d(2, 2, 5, density=torch.tensor([0.25, 0.5]))  # type: ignore[arg-type]
    torch.testing.assert_close(flat.density[1], torch.tensor([0.25, 0.5]))


@pytest.mark.parametrize("method", ["direct", "probe"])
def test_search(method: str) -> None:
    if method == "direct":
        pytest.importorskip("scipy", reason="DIRECT comes from scipy")
    seen: list[tuple[float, ...]] = []

    def objective(density: tuple[float, ...]) -> float:
        seen.append(density)
        return (density[0] - 0.3) ** 2 + 2 * (density[1] - 0.9) ** 2

    found = search_density(objective, [(0.05, 1.0), (0.5, 1.5)], method, budget=40)
    assert len(seen) == len(found.evaluations) <= 40
    assert len(set(seen)) == len(seen)
    assert found.value == min(v for _, v in found.evaluations) < 0.01
    assert objective(found.density) == found.value
    short = search_density(objective, [(0.05, 1.0), (0.5, 1.5)], method, budget=1)
    assert len(short.evaluations) == 1


def test_search_errors() -> None:
    for options, argument in [
        ({"bounds": []}, "bounds"),
        ({"bounds": [(1.0, 0.5)]}, "bounds"),
        ({"method": "grid"}, "method"),
        ({"budget": 0}, "budget"),
        ({"method": "probe", "start": [2.0]}, "start"),
        ({"start": [0.7]}, "start"),
    ]:
        with pytest.raises(ValueError, match=f"^{argument}="):
            search_density(lambda d: 0.0, **{"bounds": [(0.5, 1.5)], **options})
    diverging = search_density(lambda d: float("nan") if d[0] > 0.8 else d[0], [(0.5, 1.5)], "probe", 20)
    assert diverging.value == float("inf")


CASES: list[dict[str, Any]] = [
    {"class": "wConv1d", "kernel_size": 3, "den": [0.4]},
    {"class": "wConv1d", "kernel_size": [7], "den": [0.2, -0.3, 1.4], "stride": [3], "padding": [2], "bias": True},
    {"class": "wConv2d", "kernel_size": 1, "den": []},
    {"class": "wConv2d", "kernel_size": [5, 5], "den": [0.2, 0.8], "stride": [2, 1], "padding": [0, 2], "groups": 2},
    {"class": "wConv2d", "trainable": True, "kernel_size": 3, "dilation": [1, 2], "bias": True},
    {"class": "wConv3d", "kernel_size": 5, "den": [0.1, 0.7], "padding": 2, "dilation": 1, "groups": 2},
    {"class": "wConv3d", "trainable": True, "kernel_size": 7, "padding": 3, "stride": 2},
]


@pytest.mark.parametrize("config", CASES, ids=lambda c: "-".join(map(str, c.values())))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.filterwarnings("ignore:density")
def test_other_configurations_pass_the_adapter(config: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(9)
    n, groups = int(config["class"][5]), config.get("groups", 1)
    k = config["kernel_size"] if isinstance(config["kernel_size"], int) else config["kernel_size"][0]
    weight = torch.randn(4, 2, *[k] * n, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 2 * groups, *(9, 10, 8)[:n], dtype=torch.float64, requires_grad=True)
    den = torch.tensor(config["den"], dtype=torch.float64) if "den" in config else torch.randn(k // 2).double()
    sources = {"x": x, "weight": weight}
    alpha = torch.cat([den, torch.ones(1, dtype=torch.float64), den.flip(0)])
    if config.get("trainable"):
        sources["den"] = den.requires_grad_()
        alpha = torch.cat([den, torch.ones(1, dtype=torch.float64), den.flip(0)])
    phi = {1: "a->a", 2: "a,b->ab", 3: "a,b,c->abc"}[n]
    phi_ = torch.einsum(phi, *[alpha] * n)
    if config.get("bias"):
        sources["bias"] = torch.randn(4, dtype=torch.float64, requires_grad=True)
    places = [
        tuple(v) if isinstance(v, list) else v for v in (config.get(a, 1) for a in ("stride", "padding", "dilation"))
    ]
    y = CONVOLVE[n - 1](x, weight * phi_, sources.get("bias"), *places, groups)
    cotangent = torch.randn_like(y)
    grads = torch.autograd.grad(y, list(sources.values()), cotangent)
    tensors = {f"state.{name}": t for name, t in sources.items() if name != "x"}
    if not config.get("trainable"):
        tensors |= {"state.alfa": alpha, "state.Phi": phi_}
    tensors |= {"input.x": x, "input.cotangent": cotangent, "output.y": y}
    tensors |= {f"grad.{name}": g for name, g in zip(sources, grads, strict=True)}
    path = tmp_path / "weightedconv" / "case.safetensors"
    path.parent.mkdir()
    full = {"in_channels": 2 * groups, "out_channels": 4, **config}
    save_file({name: t.detach().to(dtype).clone() for name, t in tensors.items()}, path, {"config": json.dumps(full)})
    report = run_file(path)
    assert report.passed, (report.error, [t for t in report.tensors if not t.passed])
