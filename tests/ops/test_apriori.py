"""Convolutions in tensor format against their dense kernels, factorisation errors, and what a wave step needs."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchconv.data.waves import laplacian
from torchconv.ops.apriori import FORMS, APrioriConv1d, APrioriConv2d, APrioriConv3d, dense_kernel, factorise_kernel
from torchconv.ops.factorise import choose_rank

KINDS = {1: APrioriConv1d, 2: APrioriConv2d, 3: APrioriConv3d}
CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SPATIAL = {1: (9,), 2: (7, 6), 3: (5, 6, 4)}


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loop_kernel(layer):
    """W entry by entry from the definition of the form."""
    f, form = layer.factors(), layer.form
    out, inner = layer.out_channels, layer.in_channels // layer.groups
    share = out // layer.groups
    kernel = torch.zeros(out, inner, *layer.kernel_size, dtype=torch.float64)

    def product(axes):
        total = axes[0]
        for axis in axes[1:]:
            total = total.unsqueeze(-1) * axis
        return total

    for o in range(out):
        for i in range(inner):
            if form == "per_pair":
                for r in range(layer.rank):
                    kernel[o, i] += product([f[f"axis{j}"][o, i, r] for j in range(layer.ndim)])
            elif form == "cp":
                for r in range(layer.rank):
                    scale = f["weights"][r] * f["factor_0"][o, r] * f["factor_1"][i, r]
                    kernel[o, i] += scale * product([f[f"factor_{j + 2}"][:, r] for j in range(layer.ndim)])
            elif form == "tucker":
                for p in range(f["core"].shape[0]):
                    for q in range(f["core"].shape[1]):
                        kernel[o, i] += f["outputs"][o, p] * f["inputs"][i, q] * f["core"][p, q]
            elif form == "depthwise_1d":
                channel = o // share * inner + i
                axes = [f[f"axis{j}"][channel] for j in range(layer.ndim)]
                kernel[o, i] = f["pointwise"][o, i] * product(axes)
    return kernel


@settings(max_examples=40, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    ndim=st.sampled_from([1, 2, 3]),
    groups=st.sampled_from([1, 2]),
    rank=st.integers(1, 3),
    k=st.lists(st.integers(1, 4), min_size=3, max_size=3),
    stride=st.lists(st.integers(1, 2), min_size=3, max_size=3),
    dilation=st.lists(st.integers(1, 2), min_size=3, max_size=3),
    padding=st.one_of(st.just("same"), st.lists(st.integers(2, 4), min_size=3, max_size=3)),
    bias=st.booleans(),
)
def test_passes_equal_the_dense_kernel(form, ndim, groups, rank, k, stride, dilation, padding, bias):
    torch.manual_seed(0)
    if form == "depthwise_1d":
        rank = None
    elif form == "sequential":
        rank *= groups
    if padding != "same":
        padding = [p + 2 for p in padding[:ndim]]
    place = (stride[:ndim], padding, dilation[:ndim], groups, bias)
    dense = KINDS[ndim](4, 6, k[:ndim], *place, form=form, rank=rank, execute="dense", dtype=torch.float64)
    x, weight = noise(2, 4, *SPATIAL[ndim]), dense.kernel()
    if form != "sequential":
        torch.testing.assert_close(weight, loop_kernel(dense))
    y = dense(x)
    if padding != "same":
        expected = CONVOLVE[ndim](x, weight, dense.bias, stride[:ndim], padding, dilation[:ndim], groups)
        torch.testing.assert_close(y, expected)
    torch.testing.assert_close(dense.merge()(x), y)
    if form != "per_pair":
        passes = KINDS[ndim](4, 6, k[:ndim], *place, form=form, rank=rank, execute="factored", dtype=torch.float64)
        passes.load_state_dict(dense.state_dict())
        torch.testing.assert_close(passes(x), y)
        cotangent = noise(*y.shape, seed=1)
        for one, other in zip(
            torch.autograd.grad((passes(x) * cotangent).sum(), list(passes.parameters())),
            torch.autograd.grad((y * cotangent).sum(), list(dense.parameters())),
            strict=True,
        ):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("form", ["per_pair", "sequential", "tucker", "cp"])
def test_full_rank_reproduces_a_convolution(form, ndim, groups):
    torch.manual_seed(0)
    sizes = (2, 3, 2)[:ndim] if form == "cp" else (3, 2, 3)[:ndim]
    conv = CONV[ndim](4, 4, sizes, stride=2, padding=1, dilation=1, groups=groups).double()
    layer = KINDS[ndim].from_conv(conv, form, energy=1 - 1e-9 if form == "cp" else 1.0)
    x = noise(2, 4, *SPATIAL[ndim])
    tolerance = {"atol": 1e-3, "rtol": 1e-3} if form == "cp" else {}
    torch.testing.assert_close(layer(x), conv(x), **tolerance)
    assert layer.factorisation_error < (1e-4 if form == "cp" else 1e-7)
    assert layer.merge().stride == conv.stride


def test_error_is_the_tail_of_the_singular_values():
    weight = noise(6, 4, 3, 5)
    slices = torch.linalg.svdvals(weight)
    matrix = torch.linalg.svdvals(weight.permute(1, 2, 3, 0).reshape(12, 30))
    for rank in (1, 2, 5):
        sequential = factorise_kernel(weight, rank, form="sequential")
        assert math.isclose(sequential.error, float(matrix[rank:].norm() / weight.norm()), abs_tol=1e-9)
        pair = factorise_kernel(weight, rank, form="per_pair")
        assert math.isclose(pair.error, float(slices[..., rank:].norm() / weight.norm()), abs_tol=1e-9)
        torch.testing.assert_close(pair.kernel(), dense_kernel(pair.factors, "per_pair"))
        assert pair.parameters == 6 * 4 * rank * 8
        assert sequential.parameters == rank * (4 * 3 + 6 * 5)
        assert pair.dense_parameters == 360


@pytest.mark.parametrize("form", ["per_pair", "sequential", "tucker", "cp"])
def test_energy_takes_the_least_rank(form):
    weight = noise(6, 4, 3, 3)
    found = factorise_kernel(weight, energy=0.8, form=form, groups=1)
    assert 1 - found.error**2 >= 0.8
    assert factorise_kernel(weight, found.rank, form=form).error == found.error
    assert 1 - factorise_kernel(weight, found.rank - 1, form=form).error ** 2 < 0.8
    grouped = factorise_kernel(weight, energy=0.9, form="sequential", groups=2)
    assert grouped.rank % 2 == 0


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("form", ["cp", "tucker", "depthwise_1d", "sequential", "per_pair"])
def test_a_kernel_of_the_form_is_found_again(form, ndim):
    torch.manual_seed(1)
    rank = {"depthwise_1d": None, "cp": 2, "tucker": 2, "sequential": 3, "per_pair": 1}[form]
    layer = KINDS[ndim](4, 6, (3, 2, 3)[:ndim], form=form, rank=rank, dtype=torch.float64)
    found = factorise_kernel(layer.kernel(), rank, form=form)
    assert found.error < 1e-4
    assert {n: f.shape for n, f in found.factors.items()} == {n: f.shape for n, f in layer.factors().items()}


def test_depthwise_with_groups_and_errors_in_volumes():
    layer = APrioriConv2d(4, 6, 3, groups=2, form="depthwise_1d", dtype=torch.float64)
    assert factorise_kernel(layer.kernel(), form="depthwise_1d", groups=2).error < 1e-6
    weight = noise(3, 2, 3, 3, 3)
    errors = [factorise_kernel(weight, r, form="per_pair").error for r in range(1, 10)]
    assert all(a > b for a, b in itertools.pairwise(errors))
    assert errors[-1] < 1e-12


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_initial_variance_is_that_of_a_dense_kernel(form, ndim):
    torch.manual_seed(0)
    layers = [KINDS[ndim](8, 8, 3, form=form) for _ in range(60)]
    variance = torch.stack([layer.kernel().detach().square().mean() for layer in layers]).mean()
    assert 0.6 < float(variance * 3 * 8 * 3**ndim) < 1.6
    if form == "cp":
        assert torch.equal(layers[0].weight.weights, torch.ones(8))
        assert layers[0].weight.param_options() == {"weights": {"weight_decay": 0.0}}


@pytest.mark.parametrize(
    ("form", "rank", "count"),
    [("per_pair", 1, 24576), ("sequential", 32, 12288), ("cp", 32, 4320), ("depthwise_1d", None, 4480)],
)
def test_published_counts(form, rank, count):
    layer = APrioriConv2d(64, 64, 3, bias=False, form=form, rank=rank)
    assert sum(p.numel() for p in layer.parameters()) == count


def test_wave_step_is_a_pair_of_one_way_filters():
    """u^{n+1} = 2u^n + c²Δt² L u^n − u^{n−1}: the five-point stencil has matrix rank 2."""
    delta, stencil = torch.zeros(3, 3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
    delta[1, 1], stencil[1, 1] = 1, -4
    stencil[0, 1] = stencil[2, 1] = stencil[1, 0] = stencil[1, 2] = 1
    weight = torch.stack([-delta, 2 * delta + 0.3 * stencil]).unsqueeze(0)
    assert factorise_kernel(weight, 1, form="per_pair").error > 0.1
    found = factorise_kernel(weight, 2, form="per_pair")
    assert found.error < 1e-12
    layer = APrioriConv2d(2, 1, 3, bias=False, rank=2, dtype=torch.float64)
    layer.load_state_dict(found.factors)
    u = noise(1, 2, 8, 8)
    step = 2 * u[:, 1] - u[:, 0] + 0.3 / 81 * torch.from_numpy(laplacian(u[:, 1].numpy()))
    torch.testing.assert_close(layer(u)[:, 0], step)
    # Bilinear elements: mass m ⊗ m has rank 1, stiffness k ⊗ m + m ⊗ k rank 2.
    m, k = torch.tensor([1.0, 4.0, 1.0]) / 6, torch.tensor([-1.0, 2.0, -1.0])
    ranks = [int(torch.linalg.matrix_rank(a)) for a in (torch.outer(m, m), torch.outer(k, m) + torch.outer(m, k))]
    assert ranks == [1, 2]


def test_pairs_are_multiplied_out_without_holding_their_terms():
    class Largest(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.found = max(self.found, out.numel())
            return out

    layer = APrioriConv2d(8, 8, 5, form="per_pair", rank=3)
    with Largest() as largest:
        kernel = layer.kernel()
    assert largest.found == kernel.numel()


def test_factors_keep_dtype_and_leave_the_random_state():
    weight = torch.randn(4, 4, 3, 3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, second = (factorise_kernel(weight, 30, form="cp") for _ in range(2))
    assert all(torch.equal(first.factors[n], second.factors[n]) for n in first.factors)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    half = factorise_kernel(weight.bfloat16(), 3, form="cp")
    assert all(f.dtype == torch.bfloat16 for f in half.factors.values())
    assert factorise_kernel(torch.zeros(4, 4, 3, 3), 2, form="sequential").error == 0


def test_refusals():
    weight = torch.zeros(4, 4, 3, 3)
    for arguments, message in [
        ({}, "rank=None"),
        ({"rank": 1, "energy": 0.5}, "rank=1"),
        ({"energy": 1.5}, "energy=1.5"),
        ({"rank": 0}, "rank=0"),
        ({"rank": 1, "form": "tt"}, "form='tt'"),
        ({"rank": 3, "groups": 2}, "rank=3"),
        ({"rank": 2, "form": "depthwise_1d"}, "rank=2"),
    ]:
        with pytest.raises(ValueError, match=message):
            factorise_kernel(weight, **arguments)
    with pytest.raises(ValueError, match="reaches"):
        factorise_kernel(noise(4, 4, 3, 3), energy=0.99, form="depthwise_1d")
    with pytest.raises(ValueError, match="weight="):
        factorise_kernel(torch.zeros(4, 4), 1)
    for broken in (torch.full((4, 4, 3, 3), torch.inf), torch.zeros(4, 4, 0, 3)):
        with pytest.raises(ValueError, match=r"weight=\(4, 4"):
            factorise_kernel(broken, 1)
    with pytest.raises(ValueError, match=r"weight=\(4, 4\)"):
        choose_rank(torch.ones(4, 4), share=0.5)
    with pytest.raises(ValueError, match="execute='factored'"):
        APrioriConv2d(4, execute="factored")
    with pytest.raises(ValueError, match="execute='fast'"):
        APrioriConv2d(4, execute="fast")
    with pytest.raises(ValueError, match="form='svd'"):
        APrioriConv2d(4, form="svd")
    with pytest.raises(ValueError, match="conv=Linear"):
        APrioriConv2d.from_conv(nn.Linear(2, 2), rank=1)
    with pytest.raises(ValueError, match="padding_mode"):
        APrioriConv2d.from_conv(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), rank=1)
