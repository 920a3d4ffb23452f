"""DCLS: the separable kernel against a plain sum over the grid, the identities of the method, official layers."""

from __future__ import annotations

import json
import math
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
from torchconv.ops.dcls import (
    DCLSConv1d,
    DCLSConv2d,
    DCLSConv3d,
    dcls_kernel,
    repulsive_loss,
    share_positions,
)
from torchconv.ops.dcls_restricted import Dcls2_1d, Dcls2dK1d, Dcls3_1d

LAYERS = {1: DCLSConv1d, 2: DCLSConv2d, 3: DCLSConv3d}
# The spatial axis of each row of P in the authors' code.
OFFICIAL = {
    ("v0", 2): [0, 1],
    ("v0", 3): [0, 2, 1],
    ("wide", 2): [1, 0],
    ("wide", 3): [2, 1, 0],
}


def grid_kernel(
    weight: Tensor,
    positions: Tensor,
    sigma: Tensor | None,
    size: tuple[int, ...],
    version: str,
    official: bool,
    least: float | None = None,
) -> Tensor:
    """The kernel as its definition says: every weight times every cell of the grid, then a sum over the weights."""
    n = len(size)
    axes = list(range(n))
    if official and n > 1:
        axes = OFFICIAL["v0" if version == "v0" else "wide", n]
    cells = torch.meshgrid(*[torch.arange(s, dtype=weight.dtype) for s in size], indexing="ij")
    product = torch.ones((), dtype=weight.dtype)
    for row, axis in enumerate(axes):
        q = positions[row] + size[row] // 2
        away = cells[axis] - q[(..., *[None] * n)]
        if version == "v0":
            low = q.detach().floor()[(..., *[None] * n)]
            r = q[(..., *[None] * n)] - low
            window = (cells[axis] == low) * (1 - r) + (cells[axis] == low + 1) * r
        elif version == "v1":
            window = (1 - away.abs()).clamp(min=0)
        else:
            assert sigma is not None
            offset = least if least is not None else {"max": 1.0, "gauss": 0.27}[version]
            s = (sigma[row].abs() + offset)[(..., *[None] * n)]
            window = (s - away.abs()).clamp(min=0) if version == "max" else torch.exp(-0.5 * (away / s) ** 2)
        product = product * window
    if version != "v0":
        product = product / (product.sum(tuple(range(-n, 0)), keepdim=True) + 1e-7)
    return (weight[(..., *[None] * n)] * product).sum(-1 - n)


def draw(size: tuple[int, ...], version: str, pairs: tuple[int, ...] = (3, 2), m: int = 4, spread: float = 0.5) -> Any:
    weight = torch.randn(*pairs, m, dtype=torch.float64)
    limit = torch.tensor(size, dtype=torch.float64).reshape(-1, *[1] * (len(pairs) + 1)) * spread
    positions = (2 * torch.rand(len(size), *pairs, m, dtype=torch.float64) - 1) * limit
    sigma = torch.randn_like(positions) if version in ("max", "gauss") else None
    return weight, positions, sigma


@settings(max_examples=60, deadline=None)
@given(
    size=st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple),
    version=st.sampled_from(["v0", "v1", "max", "gauss"]),
    axis_order=st.sampled_from(["spatial", "official"]),
    spread=st.sampled_from([0.3, 0.9]),
)
def test_separable_equals_grid(size: tuple[int, ...], version: str, axis_order: str, spread: float) -> None:
    torch.manual_seed(0)
    weight, positions, sigma = draw(size, version, spread=spread)
    ours = dcls_kernel(weight, positions, sigma, size, version, axis_order=axis_order)
    expected = grid_kernel(weight, positions, sigma, size, version, axis_order == "official")
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("version", ["v0", "v1", "max", "gauss"])
@pytest.mark.parametrize("size", [(5,), (4, 5), (3, 2, 4)])
def test_gradients(version: str, size: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    given_ = [t.requires_grad_() for t in draw(size, version, (2, 1), 3) if t is not None]

    def kernel(weight: Tensor, positions: Tensor, sigma: Tensor | None = None) -> Tensor:
        return dcls_kernel(weight, positions, sigma, size, version)

    assert torch.autograd.gradcheck(kernel, given_)


@pytest.mark.parametrize("version", ["v0", "v1"])
@pytest.mark.parametrize(("k", "dilation"), [(3, 1), (3, 2), (5, 3), (2, 3)])
def test_regular_grid_is_a_dilated_convolution(version: str, k: int, dilation: int) -> None:
    """Weights on the grid of dilation d: the dilated convolution; with d = 1 the dense one."""
    size = dilation * (k - 1) + 1
    layer = DCLSConv2d(3, 4, size, kernel_count=k * k, version=version).double()
    place = torch.arange(k, dtype=torch.float64) * dilation - size // 2
    rows, columns = torch.meshgrid(place, place, indexing="ij")
    with torch.no_grad():
        layer.P.copy_(torch.stack([rows.flatten(), columns.flatten()])[:, None, None].expand_as(layer.P))
    x = torch.randn(2, 3, 16, 15, dtype=torch.float64)
    expected = F.conv2d(x, layer.weight.reshape(4, 3, k, k), layer.bias, dilation=dilation)
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)


def test_versions_agree_where_they_should() -> None:
    torch.manual_seed(2)
    weight, positions, _ = draw((7, 7), "v0", spread=0.4)
    v0 = dcls_kernel(weight, positions, None, (7, 7), "v0", axis_order="official")
    v1 = dcls_kernel(weight, positions.flip(0), None, (7, 7), "v1", axis_order="official")
    torch.testing.assert_close(v0, v1, rtol=1e-6, atol=1e-6)
    triangle = dcls_kernel(weight, positions, torch.zeros_like(positions), (7, 7), "max")
    torch.testing.assert_close(triangle, dcls_kernel(weight, positions, None, (7, 7), "v1"))
    near = positions.round() + 0.05
    narrow = dcls_kernel(weight, near, torch.zeros_like(positions), (7, 7), "gauss", least_width=0.05)
    nearest = dcls_kernel(weight, positions.round(), None, (7, 7), "v1")
    torch.testing.assert_close(narrow, nearest, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("version", ["v0", "v1", "max", "gauss"])
def test_mass_and_shift(version: str) -> None:
    torch.manual_seed(3)
    weight, positions, sigma = draw((9, 11), version, spread=0.2)
    kernel = dcls_kernel(weight, positions, sigma, (9, 11), version)
    torch.testing.assert_close(kernel.sum((-2, -1)), weight.sum(-1), rtol=1e-6, atol=1e-6)
    if sigma is not None:
        sigma = sigma * 0.01
        kernel = dcls_kernel(weight, positions, sigma, (9, 11), version)
    shift = torch.tensor([1.0, -2.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    moved = dcls_kernel(weight, positions + shift, sigma, (9, 11), version)
    torch.testing.assert_close(moved[..., 2:-1, 1:-3], kernel[..., 1:-2, 3:-1], rtol=1e-4, atol=1e-4)


def test_even_size_stays_on_the_grid() -> None:
    """The authors' limit lets a position of an even kernel leave the grid, where its window and gradient vanish."""
    layer = DCLSConv2d(2, 2, (4, 7), kernel_count=2, version="v1")
    assert layer.limits() == [(-2, 1), (-3, 3)]
    with torch.no_grad():
        layer.P.fill_(100.0)
    layer.after_step()
    torch.testing.assert_close(layer.kernel().sum((-2, -1)), layer.weight.sum(-1), rtol=1e-5, atol=1e-6)
    official = DCLSConv3d(1, 1, (3, 5, 8), version="gauss", axis_order="official")
    assert official.limits() == [(-1, 6), (-2, 2), (-4, -2)]


def test_training_needs() -> None:
    layers = [DCLSConv2d(4, 4, 7, 1, "same", groups=4, kernel_count=5) for _ in range(3)]
    assert layers[0].param_options() == {"P": {"lr_mult": 5.0, "weight_decay": 0.0}}
    assert DCLSConv2d.auxiliary_loss(layers, 19) is None
    loss = DCLSConv2d.auxiliary_loss(layers, 20)
    assert loss is not None
    torch.testing.assert_close(loss, repulsive_loss([m.P for m in layers]) ** 2)
    net = nn.Sequential(*layers)
    x = torch.randn(2, 4, 16, 16)
    net(x).square().sum().backward()
    share_positions(net)
    assert layers[1].P is layers[0].P
    assert layers[2].SIG is layers[0].SIG
    assert len(list(net.parameters())) == 2 * 3 + 2
    assert sum(name.endswith(".P") for name in net.state_dict()) == 3
    shared = DCLSConv2d.auxiliary_loss(layers, 30)
    assert shared is not None
    torch.testing.assert_close(shared, repulsive_loss([layers[0].P]) ** 2)


def test_shared_gradient_is_the_sum() -> None:
    torch.manual_seed(4)
    net = nn.Sequential(*[DCLSConv2d(3, 3, 5, padding="same", groups=3, kernel_count=4).double() for _ in range(2)])
    share_positions(net)
    apart = nn.Sequential(*[DCLSConv2d(3, 3, 5, padding="same", groups=3, kernel_count=4).double() for _ in range(2)])
    apart.load_state_dict(net.state_dict())
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    net(x).square().sum().backward()
    apart(x).square().sum().backward()
    total = apart[0].P.grad + apart[1].P.grad
    torch.testing.assert_close(net[0].P.grad, total)


def test_repulsive_loss_by_hand() -> None:
    """Two weights half a cell apart: 2 · 0.5 / (2 · 1) for one pair; far ones and single ones cost nothing."""
    near = torch.tensor([[[[0.0, 0.5]]], [[[1.0, 1.0]]]])
    torch.testing.assert_close(repulsive_loss([near]), torch.tensor(0.5))
    torch.testing.assert_close(
        repulsive_loss([near, near * 100, near[..., :1]]), torch.tensor((0.5 + 1 + 0) / 3 - 1 / 3)
    )
    together = torch.zeros(2, 1, 1, 3, requires_grad=True)
    repulsive_loss([together]).backward()
    assert together.grad is not None
    assert together.grad.isfinite().all()
    with pytest.raises(ValueError, match="positions"):
        repulsive_loss([])
    with pytest.raises(ValueError, match=r"positions of shape \(2, 1, 1, 3\)"):
        repulsive_loss(together)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [9, 34])
def test_repulsive_loss_as_published(count: int) -> None:
    """The published loss is a sum over the upper triangle of ``torch.cdist``; from 26 weights on it loses digits."""
    torch.manual_seed(11)
    positions = torch.randn(2, 8, 1, count, requires_grad=True)
    places = positions.flatten(1, -2).permute(1, 2, 0).contiguous()
    near = (1 - torch.cdist(places, places)).triu(1).clamp_min(0)
    published = 2 * near.sum() / (count * (count - 1) * 8)
    (expected,) = torch.autograd.grad(published, positions)
    loss = repulsive_loss([positions], official=True)
    torch.testing.assert_close(loss, published)
    torch.testing.assert_close(torch.autograd.grad(loss, positions)[0], expected, rtol=1e-5, atol=1e-8)
    double = positions.detach().double()
    torch.testing.assert_close(repulsive_loss([double], official=True), repulsive_loss([double]))


def test_default_count_spends_what_the_dense_kernel_would() -> None:
    assert DCLSConv2d(1, 1, 7).kernel_count == 10
    assert DCLSConv2d(1, 1, 7, version="v1").kernel_count == 16
    assert DCLSConv1d(1, 1, 1).kernel_count == 1
    assert DCLSConv1d(1, 1, 7).kernel_count == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_positions_are_evaluated_in_single(dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    layer = DCLSConv2d(2, 2, 17, kernel_count=6, position_init="uniform").to(dtype)
    double = DCLSConv2d(2, 2, 17, kernel_count=6).double()
    double.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer.kernel().double(), double.kernel(), rtol=torch.finfo(dtype).eps, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert double.float().kernel().dtype == torch.float32


def test_merge_and_restricted_layers() -> None:
    torch.manual_seed(6)
    cases: list[tuple[nn.Module, tuple[int, ...]]] = [
        (DCLSConv2d(4, 6, (4, 5), (2, 1), "same", groups=2, padding_mode="circular"), (4, 9, 8)),
        (Dcls2_1d(4, 6, 5, (1, 2), 2, groups=2, dense_kernel_size=3, padding_mode="reflect"), (4, 9, 8)),
        (Dcls3_1d(2, 4, 5, dense_kernel_size=(1, 3), padding="same", version="max"), (2, 4, 5, 6)),
        (Dcls2dK1d(4, 4, 7, padding=(3, 0), groups=4), (4, 9, 8)),
        (Dcls2dK1d(4, 4, 7, padding="same", flat_dim=1, version="v0", bias=False), (4, 9, 8)),
    ]
    for layer, shape in cases:
        x = torch.randn(2, *shape)
        merged = layer.to_conv()
        assert type(merged).__name__.startswith("Conv")
        torch.testing.assert_close(merged(x), layer(x), rtol=1e-5, atol=1e-6)
        assert tuple(layer.kernel().shape[2:]) == tuple(layer.kernel_size)


def test_restricted_official_state_and_width() -> None:
    layer = Dcls2_1d(2, 2, 5, dense_kernel_size=3, kernel_count=2, axis_order="official")
    state = {**layer.state_dict(), "DCK.IDX": torch.zeros(5), "DCK.lim": torch.zeros(1)}
    layer.load_state_dict(state)
    args = (layer.weight, layer.P, layer.SIG, (5,), "gauss")
    torch.testing.assert_close(layer.kernel(), grid_kernel(*args, True, 1.0), rtol=1e-5, atol=1e-6)
    plain = Dcls2_1d(2, 2, 5, dense_kernel_size=3, kernel_count=2)
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(plain.kernel(), grid_kernel(*args, True, 0.27), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"dilation": 2}, "dilation"),
        ({"kernel_count": 0}, "kernel_count"),
        ({"version": "v2"}, "version"),
        ({"axis_order": "xyz"}, "axis_order"),
        ({"padding_mode": "mirror"}, "padding_mode"),
        ({"position_init": -1.0}, "position_init"),
        ({"position_init": "grid"}, "position_init"),
        ({"groups": 3}, "groups"),
    ],
)
def test_errors(options: dict[str, Any], argument: str) -> None:
    with pytest.raises(ValueError, match=f"^{argument}="):
        DCLSConv2d(4, 4, 5, **options)


def test_functional_errors() -> None:
    weight, positions, sigma = draw((3, 3), "gauss")
    with pytest.raises(ValueError, match="positions"):
        dcls_kernel(weight, positions[:1], sigma, (3, 3))
    with pytest.raises(ValueError, match="sigma"):
        dcls_kernel(weight, positions, None, (3, 3))
    with pytest.raises(ValueError, match=r"^size=3"):
        dcls_kernel(weight, positions, sigma, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"weight of dtype torch\.int64"):
        dcls_kernel(weight.long(), positions, sigma, (3, 3))
    with pytest.raises(ValueError, match="flat_dim"):
        Dcls2dK1d(2, 2, 3, flat_dim=2)
    with pytest.raises(ValueError, match="version"):
        Dcls2_1d(2, 2, 3, version="v0")


CASES: list[dict[str, Any]] = [
    {"class": "Dcls1d", "dilated_kernel_size": [8], "stride": [2], "padding": 4, "version": "v1", "bias": False},
    {"class": "Dcls1d", "dilated_kernel_size": 7, "padding": 3, "version": "v0", "padding_mode": "replicate"},
    {"class": "Dcls2d", "dilated_kernel_size": [5, 9], "padding": [2, 4], "version": "v1", "groups": 2},
    {"class": "Dcls2d", "dilated_kernel_size": [6, 3], "padding": 2, "stride": [1, 2], "version": "v0"},
    {"class": "Dcls2d", "dilated_kernel_size": [3, 5], "padding_mode": "circular", "padding": 1},
    {"class": "Dcls3d", "dilated_kernel_size": [3, 4, 5], "padding": [1, 2, 2], "version": "v0", "groups": 2},
    {"class": "Dcls3d", "dilated_kernel_size": 3, "version": "max", "stride": 2, "padding": 1},
    {"class": "Dcls2_1d", "dilated_kernel_size": 7, "dense_kernel_size": [3], "padding": [1, 3]},
    {"class": "Dcls2_1d", "dilated_kernel_size": 5, "dense_kernel_size": 2, "version": "max", "stride": [2, 1]},
    {"class": "Dcls3_1d", "dilated_kernel_size": [5], "dense_kernel_size": [2, 3], "padding": 1, "groups": 2},
    {"class": "Dcls2dK1d", "dilated_kernel_size": 7, "padding": [3, 0]},
    {"class": "Dcls2dK1d", "dilated_kernel_size": 5, "flat_dim": 1, "version": "gauss", "padding": 2, "stride": [1, 2]},
]


def _make_case(config: dict[str, Any], path: Path, dtype: torch.dtype) -> None:
    name, version = config["class"], config.get("version", "v1" if config["class"] == "Dcls2dK1d" else "gauss")
    n = int(name[4])
    size = config["dilated_kernel_size"]
    free = 1 if "_1d" in name or name == "Dcls2dK1d" else n
    size = tuple(size) if isinstance(size, list) else (size,) * free
    dense = config.get("dense_kernel_size", 1)
    dense = () if "_1d" not in name else tuple(dense) if isinstance(dense, list) else (dense,) * (n - 1)
    groups, out = config.get("groups", 1), 4
    pairs = (out, 2, *dense)
    weight, positions, sigma = draw(size, version, pairs, 3)
    state = {"weight": weight, "P": positions}
    if sigma is not None:
        state["SIG"] = sigma
    if config.get("bias", True):
        state["bias"] = torch.randn(out, dtype=torch.float64)
    x = torch.randn(2, 2 * groups, *(9, 10, 7)[:n], dtype=torch.float64)
    sources = {"x": x, **state}
    for tensor in sources.values():
        tensor.requires_grad_()
    least = 1.0 if name == "Dcls2_1d" and version == "gauss" else None
    kernel = grid_kernel(weight, positions, sigma, size, version, True, least)
    dense_kernel = kernel if name != "Dcls2dK1d" else kernel.unsqueeze(-1 - config.get("flat_dim", 0))
    padding = config.get("padding", 0)
    padding = padding if isinstance(padding, list) else [padding] * n
    mode = config.get("padding_mode", "zeros")
    padded = F.pad(x, [p for q in reversed(padding) for p in (q, q)], mode="constant" if mode == "zeros" else mode)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[n - 1]
    stride = config.get("stride", 1)
    y = convolve(
        padded, dense_kernel, state.get("bias"), tuple(stride) if isinstance(stride, list) else stride, 0, 1, groups
    )
    cotangent = torch.randn_like(y)
    grads = torch.autograd.grad(y, list(sources.values()), cotangent)
    tensors = {f"state.{k}": v for k, v in state.items()}
    tensors |= {"input.x": x, "input.cotangent": cotangent, "output.y": y, "output.kernel": kernel}
    tensors |= {f"grad.{k}": g for k, g in zip(sources, grads, strict=True)}
    full = {"in_channels": 2 * groups, "out_channels": out, "kernel_count": 3, **config}
    save_file(
        {k: v.detach().to(dtype).contiguous() for k, v in tensors.items()},
        path,
        {"config": json.dumps(full), "mode": "train"},
    )


@pytest.mark.parametrize("config", CASES, ids=lambda c: "-".join(map(str, c.values())))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_configurations_pass_the_adapter(config: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(7)
    path = tmp_path / "dcls" / "case.safetensors"
    path.parent.mkdir()
    _make_case(config, path, dtype)
    report = run_file(path)
    assert report.passed, (report.error, [t for t in report.tensors if not t.passed])


def test_fan_in_of_the_initial_weights() -> None:
    torch.manual_seed(8)
    layer = DCLSConv2d(16, 32, 17, kernel_count=9)
    bound = 1 / math.sqrt(16 * 9)
    assert layer.weight.abs().max() <= bound
    assert layer.weight.abs().max() > 0.95 * bound
    assert abs(float(layer.P.detach().std()) - 0.5) < 0.02
    assert layer.SIG is not None
    assert (layer.SIG == 0.23).all()
