"""The dilated re-parameterised convolution and GRN against loops over taps, closed forms and the paper's identities."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torchconv.ops.unireplknet import (
    BRANCHES,
    GRN,
    DilatedReparamConv1d,
    DilatedReparamConv2d,
    DilatedReparamConv3d,
    dilated_kernel_to_dense,
    global_response_norm,
    merge_branches,
)

CLASSES: tuple[Any, ...] = (None, DilatedReparamConv1d, DilatedReparamConv2d, DilatedReparamConv3d)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def randomised(module: nn.Module, seed: int = 0) -> Any:
    """Parameters and running statistics away from their initial values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                positive = "var" in name or ("bn" in name and name.endswith("weight"))
                tensor.copy_(noise + 0.5 if positive else 2 * noise - 1)
    return module


def depthwise_by_taps(x: np.ndarray, weight: np.ndarray, dilation: int) -> np.ndarray:
    """Depthwise cross-correlation with zero "same" padding as a sum of shifted copies."""
    size, ndim = weight.shape[2], x.ndim - 2
    reach = dilation * (size - 1) // 2
    padded = np.pad(x, [(0, 0), (0, 0), *[(reach, reach)] * ndim])
    y = np.zeros_like(x)
    for tap in itertools.product(range(size), repeat=ndim):
        window = tuple(slice(t * dilation, t * dilation + n) for t, n in zip(tap, x.shape[2:], strict=True))
        y += weight[(slice(None), 0, *tap)].reshape(1, -1, *[1] * ndim) * padded[(slice(None), slice(None), *window)]
    return y


def oracle(op: Any, x: Tensor, training: bool) -> np.ndarray:
    """The training form, branch by branch, in numpy."""
    state = {n: t.double().numpy() for n, t in op.state_dict().items()}
    branches = [("lk_origin", "origin_bn", 1)]
    branches += [(f"dil_conv_k{k}_{r}", f"dil_bn_k{k}_{r}", r) for k, r in BRANCHES[op.kernel_size[0]]]
    total = np.zeros(x.shape)
    shape = (1, -1, *[1] * op.ndim)
    for conv, bn, dilation in branches:
        y = depthwise_by_taps(x.double().numpy(), state[f"{conv}.weight"], dilation)
        axes = (0, *range(2, y.ndim))
        mean = y.mean(axes) if training else state[f"{bn}.running_mean"]
        var = y.var(axes) if training else state[f"{bn}.running_var"]
        scale = state[f"{bn}.weight"] / np.sqrt(var + 1e-5)
        total += y * scale.reshape(shape) + (state[f"{bn}.bias"] - mean * scale).reshape(shape)
    return total


@pytest.mark.parametrize("kernel_size", BRANCHES)
@pytest.mark.parametrize("training", [False, True])
def test_against_sums_of_shifted_copies(kernel_size: int, training: bool) -> None:
    op = randomised(DilatedReparamConv2d(3, kernel_size=kernel_size, dtype=torch.float64)).train(training)
    x = torch.randn(2, 3, 9, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = oracle(op, x, training)
    np.testing.assert_allclose(op(x).detach().numpy(), expected, atol=1e-10)


@settings(max_examples=20, deadline=None)
@given(
    ndim=st.sampled_from([1, 2, 3]),
    kernel_size=st.sampled_from([5, 7, 9]),
    length=st.integers(1, 9),
    channels=st.integers(1, 4),
    training=st.booleans(),
)
def test_every_dimension_and_maps_smaller_than_the_kernel(
    ndim: int, kernel_size: int, length: int, channels: int, training: bool
) -> None:
    op = randomised(CLASSES[ndim](channels, kernel_size=kernel_size, dtype=torch.float64)).train(training)
    x = torch.randn(2, channels, *range(length, length + ndim), dtype=torch.float64)
    np.testing.assert_allclose(op(x).detach().numpy(), oracle(op, x, training), atol=1e-9)


@pytest.mark.parametrize("kernel_size", BRANCHES)
def test_merge_is_exact_and_loads_into_the_deploy_form(kernel_size: int) -> None:
    op = randomised(DilatedReparamConv2d(6, kernel_size=kernel_size)).eval()
    x = torch.randn(2, 6, 15, 12)
    conv: Any = op.merge()
    assert type(conv) is nn.Conv2d
    assert conv.kernel_size == (kernel_size, kernel_size)
    branchwise = sum(bn(c(x)) for c, bn in op.pairs())
    torch.testing.assert_close(conv(x), branchwise, rtol=1e-5, atol=1e-5)
    deploy = DilatedReparamConv2d(6, kernel_size=kernel_size, deploy=True)
    deploy.load_state_dict({f"lk_origin.{n}": t for n, t in conv.state_dict().items()})
    torch.testing.assert_close(deploy(x), conv(x))
    assert torch.equal(deploy.merge()(x), conv(x))


def test_every_extent_is_odd_and_fits() -> None:
    for size, branches in BRANCHES.items():
        for k, r in branches:
            assert (r * (k - 1) + 1) % 2 == 1
            assert r * (k - 1) + 1 <= size


@pytest.mark.parametrize("dilation", [1, 2, 3, (1, 2)])
def test_a_dilated_kernel_is_a_dense_one_with_zeros(dilation: Any) -> None:
    weight, x = torch.randn(4, 2, 3, 5), torch.randn(1, 4, 20, 22)
    dense = F.conv2d(x, dilated_kernel_to_dense(weight, dilation), groups=2)
    torch.testing.assert_close(dense, F.conv2d(x, weight, dilation=dilation, groups=2))


def test_merge_branches_refuses_what_does_not_fit() -> None:
    large, side = torch.zeros(2, 1, 5, 5), torch.zeros(2, 1, 3, 3)
    for weights, dilations in (([large, side], [1, 3]), ([large, torch.zeros(2, 1, 2, 2)], [1, 1]), ([large], [2])):
        with pytest.raises(ValueError, match="dilations"):
            merge_branches(weights, dilations)
    with pytest.raises(ValueError, match="dilations"):
        merge_branches([large, side], [1])
    with pytest.raises(ValueError, match="biases"):
        merge_branches([large, side], [1, 1], [torch.zeros(2)])


def test_gradients_in_both_modes() -> None:
    for training in (False, True):
        op = randomised(DilatedReparamConv2d(2, kernel_size=5, dtype=torch.float64)).train(training)
        x = torch.randn(2, 2, 4, 3, dtype=torch.float64, requires_grad=True)
        names, values = zip(*op.named_parameters(), strict=True)

        def run(x: Tensor, *tensors: Tensor, op: Any = op, names: tuple[str, ...] = names) -> Tensor:
            return torch.func.functional_call(op, dict(zip(names, tensors, strict=True)), (x,))

        torch.autograd.gradcheck(run, (x, *values))


def test_gradients_of_the_frozen_form_are_those_of_the_branches() -> None:
    op = randomised(DilatedReparamConv2d(3, kernel_size=13, dtype=torch.float64)).eval()
    x = torch.randn(2, 3, 8, 9, dtype=torch.float64, requires_grad=True)
    leaves = [x, *op.parameters()]
    direction = torch.randn_like(x)
    merged = torch.autograd.grad((op(x) * direction).sum(), leaves)
    branchwise = torch.autograd.grad((sum(bn(c(x)) for c, bn in op.pairs()) * direction).sum(), leaves)
    for ours, expected in zip(merged, branchwise, strict=True):
        torch.testing.assert_close(ours, expected)


def test_one_learning_batch_norm_runs_the_branches() -> None:
    op = randomised(DilatedReparamConv2d(3, kernel_size=7)).eval()
    op.dil_bn_k3_2.train()
    before = [b.clone() for b in op.buffers()]
    y = op(torch.randn(4, 3, 8, 8))
    changed = [n for (n, b), a in zip(op.named_buffers(), before, strict=True) if not torch.equal(a, b)]
    assert y.shape == (4, 3, 8, 8)
    assert {n.split(".")[0] for n in changed} == {"dil_bn_k3_2"}


def test_interior_is_translation_equivariant() -> None:
    op = randomised(DilatedReparamConv2d(2, kernel_size=7)).eval()
    x = torch.randn(1, 2, 20, 20)
    shifted = torch.roll(x, (1, 1), (2, 3))
    inner = (slice(None), slice(None), slice(5, 16), slice(5, 16))
    torch.testing.assert_close(op(shifted)[inner], torch.roll(op(x), (1, 1), (2, 3))[inner])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_are_folded_in_single_precision(dtype: torch.dtype) -> None:
    op = randomised(DilatedReparamConv2d(4, kernel_size=13)).eval().to(dtype)
    exact = randomised(DilatedReparamConv2d(4, kernel_size=13)).eval()
    exact.load_state_dict({n: t.float() if t.is_floating_point() else t for n, t in op.state_dict().items()})
    conv: Any = op.merge()
    assert conv.weight.dtype == dtype
    assert torch.equal(conv.weight, exact.merge().weight.to(dtype))
    assert op(torch.randn(1, 4, 9, 9, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("training", [False, True])
def test_compiles_whole_and_exports(training: bool) -> None:
    op = randomised(DilatedReparamConv2d(4, kernel_size=7)).train(training)
    x = torch.randn(2, 4, 9, 8)
    torch.compiler.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), op(x))
    if not training:
        torch.testing.assert_close(torch.export.export(op, (x,)).module()(x), op(x))


@pytest.mark.parametrize("deploy", [False, True])
def test_autocast_empty_batches_and_memory_format(deploy: bool) -> None:
    op = DilatedReparamConv2d(4, kernel_size=7, deploy=deploy).eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert op(torch.randn(1, 4, 9, 8)).dtype == torch.bfloat16
    for training in (False, True):
        assert op.train(training)(torch.randn(0, 4, 9, 8)).shape == (0, 4, 9, 8)
    x = torch.randn(2, 4, 9, 8).to(memory_format=torch.channels_last)
    assert op.eval()(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("argument", "options", "remedy"),
    [
        ("kernel_size", {"kernel_size": 3}, "use 5"),
        ("kernel_size", {"kernel_size": 4}, "use 5"),
        ("kernel_size", {"kernel_size": 8}, "use 7 or 9"),
        ("kernel_size", {"kernel_size": 31}, "use 17"),
        ("kernel_size", {"kernel_size": (5, 7)}, "same size"),
        ("stride", {"stride": 2}, "strided"),
        ("dilation", {"dilation": 2}, "larger kernel_size"),
        ("padding", {"padding": 0}, "same"),
        ("padding", {"padding": "valid"}, "same"),
        ("groups", {"groups": 2}, "depthwise"),
        ("out_channels", {"out_channels": 8}, "1×1"),
    ],
)
def test_refusals_name_the_argument(argument: str, options: dict[str, Any], remedy: str) -> None:
    with pytest.raises(ValueError, match=f"^{argument}=.*{remedy}"):
        DilatedReparamConv2d(4, **options)


def test_padding_as_a_number_and_wrong_input() -> None:
    op = DilatedReparamConv2d(4, 4, (7, 7), padding=3, groups=4)
    with pytest.raises(ValueError, match=r"x of shape \(1, 3, 5, 5\)"):
        op(torch.zeros(1, 3, 5, 5))


def test_grn_is_the_formula() -> None:
    x, gamma, beta = torch.randn(2, 3, 4, 5), torch.randn(1, 1, 1, 5), torch.randn(1, 1, 1, 5)
    response = x.square().sum((1, 2), keepdim=True).sqrt()
    expected = (gamma * response / (response.mean(-1, keepdim=True) + 1e-6) + 1) * x + beta
    torch.testing.assert_close(global_response_norm(x, gamma, beta), expected)
    assert torch.equal(GRN(5)(x), x)
    assert GRN(5, use_bias=False).beta is None


def test_grn_without_bias_is_positively_homogeneous() -> None:
    grn = GRN(6, use_bias=False, ndim=1, dtype=torch.float64)
    nn.init.normal_(grn.gamma)
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(grn(3 * x), 3 * grn(x), rtol=1e-5, atol=1e-5)


def test_grn_gradients_also_for_an_image_of_zeros() -> None:
    x = torch.randn(2, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    gamma, beta = (torch.randn(1, 1, 1, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.autograd.gradcheck(global_response_norm, (x, gamma, beta))
    zeros = torch.zeros(1, 2, 2, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(global_response_norm(zeros, torch.ones(4)).sum(), zeros)
    assert gradient.isfinite().all()


def test_grn_refusals() -> None:
    with pytest.raises(ValueError, match="dim=0"):
        GRN(0)
    with pytest.raises(ValueError, match="ndim=4"):
        GRN(3, ndim=4)
    with pytest.raises(ValueError, match="x of shape"):
        GRN(3)(torch.zeros(1, 2, 3))
