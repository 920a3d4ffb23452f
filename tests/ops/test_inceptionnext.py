"""Inception depthwise convolution: identities, a loop as oracle, options, the network."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.parity.core import Case, run_case
from torchconv.models.classify.inceptionnext import VARIANTS, MetaNeXt, MetaNeXtBlock
from torchconv.ops.inceptionnext import (
    InceptionDWConv1d,
    InceptionDWConv2d,
    InceptionDWConv3d,
    PartialDepthwiseConv1d,
    PartialDepthwiseConv2d,
    inception_depthwise,
)

CLASSES = {1: InceptionDWConv1d, 2: InceptionDWConv2d, 3: InceptionDWConv3d}


def loop(x: Tensor, weight: Tensor, bias: Tensor, dilation: Sequence[int]) -> Tensor:
    """Depthwise cross-correlation one tap at a time, zero outside; the tap ⌊d(k−1)/2⌋ in front is the origin."""
    ndim, reach = x.dim() - 2, 20
    padded = F.pad(x, (reach, reach) * ndim)
    y = torch.zeros_like(x) + bias.reshape(1, -1, *[1] * ndim)
    for tap in itertools.product(*map(range, weight.shape[2:])):
        shift = [d * t - d * (k - 1) // 2 for d, t, k in zip(dilation, tap, weight.shape[2:], strict=True)]
        window = tuple(slice(reach + s, reach + s + n) for s, n in zip(shift, x.shape[2:], strict=True))
        y = y + padded[(..., *window)] * weight[(slice(None), 0, *tap)].reshape(1, -1, *[1] * ndim)
    return y


@settings(max_examples=25, deadline=None)
@given(
    ndim=st.sampled_from([1, 2, 2, 3]),
    band=st.integers(1, 5),
    square=st.integers(1, 3),
    dilation=st.integers(1, 3),
    channels=st.integers(5, 9),
    ratio=st.sampled_from([0.0, 0.1, 0.2]),
    seed=st.integers(0, 99),
)
def test_against_a_loop(
    ndim: int, band: int, square: int, dilation: int, channels: int, ratio: float, seed: int
) -> None:
    torch.manual_seed(seed)
    op = CLASSES[ndim](
        channels, None, band, dilation=dilation, square_kernel_size=square, branch_ratio=ratio, dtype=torch.float64
    )
    g = int(channels * ratio)
    x = torch.randn(2, channels, *(5, 4, 3)[3 - ndim :], dtype=torch.float64)
    y = op(x)
    start = channels - (ndim + 1) * g
    assert torch.equal(y[:, :start], x[:, :start])
    for conv in op._branches():
        expected = loop(x[:, start : start + g], conv.weight, conv.bias, (dilation,) * ndim)
        assert torch.allclose(y[:, start : start + g], expected, atol=1e-12)
        start += g
    assert start == channels
    assert torch.allclose(op.merge()(x), y, atol=1e-12)


def test_parameters_names_and_counts() -> None:
    op = InceptionDWConv2d(24)
    assert {n: tuple(p.shape) for n, p in op.named_parameters() if "weight" in n} == {
        "dwconv_hw.weight": (3, 1, 3, 3),
        "dwconv_w.weight": (3, 1, 1, 11),
        "dwconv_h.weight": (3, 1, 11, 1),
    }
    assert sum(p.numel() for p in op.parameters()) == 3 * (9 + 22 + 3)
    assert [n for n, _ in InceptionDWConv1d(8).named_children()] == ["dwconv_s", "dwconv_l"]
    assert [n for n, _ in InceptionDWConv3d(8).named_children()] == [
        "dwconv_dhw",
        "dwconv_w",
        "dwconv_h",
        "dwconv_d",
    ]
    assert InceptionDWConv2d(17, branch_ratio=0.2).dwconv_hw.out_channels == 3, "17 * 0.2 is truncated"


def test_exchanging_the_axes_exchanges_the_bands() -> None:
    torch.manual_seed(0)
    op, twin = InceptionDWConv2d(16), InceptionDWConv2d(16)
    state = op.state_dict()
    twin.load_state_dict(
        {
            "dwconv_hw.weight": state["dwconv_hw.weight"].mT,
            "dwconv_hw.bias": state["dwconv_hw.bias"],
            **{f"dwconv_w.{n}": state[f"dwconv_h.{n}"].mT if n == "weight" else state["dwconv_h.bias"] for n in PARTS},
            **{f"dwconv_h.{n}": state[f"dwconv_w.{n}"].mT if n == "weight" else state["dwconv_w.bias"] for n in PARTS},
        }
    )
    x = torch.randn(2, 16, 7, 9)
    order = [*range(12), 14, 15, 12, 13]
    assert torch.allclose(twin(x[:, order].mT), op(x).mT[:, order], atol=1e-6)


PARTS = ("weight", "bias")


def test_no_branch_is_the_identity_map() -> None:
    op = InceptionDWConv2d(7, branch_ratio=0.1)
    x = torch.randn(2, 7, 5, 5)
    assert torch.equal(op(x), x)
    assert op.state_dict() == {}
    assert torch.equal(op.merge()(x), x)


def test_all_channels_convolved() -> None:
    torch.manual_seed(0)
    op = InceptionDWConv2d(9, branch_ratio=1 / 3)
    x = torch.randn(1, 9, 6, 6)
    assert torch.allclose(op.merge()(x), op(x), atol=1e-6)


def test_inplace_overwrites_where_no_gradient_is_recorded() -> None:
    torch.manual_seed(0)
    op = InceptionDWConv2d(24, inplace=True)
    x = torch.randn(2, 24, 8, 8)
    expected = op(x.clone().requires_grad_())
    expected.sum().backward()
    with torch.no_grad():
        given_x = x.clone()
        y = op(given_x)
    assert y is given_x
    assert torch.equal(y, expected)


def test_sizes_and_dilations_per_axis() -> None:
    torch.manual_seed(0)
    op = InceptionDWConv2d(8, None, (5, 9), dilation=(2, 1), square_kernel_size=(1, 3)).double()
    assert op.dwconv_w.weight.shape[2:] == (1, 9)
    assert op.dwconv_h.weight.shape[2:] == (5, 1)
    x = torch.randn(2, 8, 9, 8, dtype=torch.float64)
    assert torch.allclose(op.merge()(x), op(x), atol=1e-12)


@pytest.mark.parametrize("options", [{"branch_ratio": 0.4}, {"branch_ratio": -0.1}, {"square_kernel_size": 0}])
def test_own_options_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        InceptionDWConv2d(16, **options)  # type: ignore[arg-type]


def test_functional_refuses_what_does_not_fit() -> None:
    x, w = torch.zeros(1, 2, 4), torch.zeros(3, 1, 3)
    with pytest.raises(ValueError, match="weights"):
        inception_depthwise(x, [w])
    with pytest.raises(ValueError, match="biases"):
        inception_depthwise(x, [w[:1]], [None, None])
    with pytest.raises(ValueError, match="ratio"):
        PartialDepthwiseConv1d(4, ratio=1.5)


def test_partial_depthwise_is_a_depthwise_convolution_of_the_last_channels() -> None:
    torch.manual_seed(0)
    op = PartialDepthwiseConv2d(16, ratio=3 / 8)
    x = torch.randn(2, 16, 6, 5)
    expected = F.conv2d(x[:, 10:], op.conv.weight, op.conv.bias, padding=1, groups=6)
    assert torch.allclose(op(x), torch.cat([x[:, :10], expected], 1), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("inception_next_atto", 4_156_520),
        ("inception_next_tiny", 28_055_680),
        ("inception_next_small", 49_374_016),
        ("inception_next_base", 86_672_136),
    ],
)
def test_published_parameter_counts(name: str, parameters: int) -> None:
    with torch.device("meta"):
        net = VARIANTS[name]()
    assert sum(p.numel() for p in net.parameters()) == parameters


@pytest.mark.parametrize(("name", "macs"), [("inception_next_atto", 0.503e9), ("inception_next_tiny", 4.189e9)])
def test_published_multiply_adds(name: str, macs: float) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        net, x = VARIANTS[name]().eval(), torch.empty(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x)
    assert counter.get_total_flops() / 2 == pytest.approx(macs, rel=2e-3)


def small(**options: object) -> MetaNeXt:
    torch.manual_seed(0)
    settings = {"depths": (1, 2, 1, 1), "dims": (8, 16, 16, 24), "num_classes": 5, "ls_init_value": 0.5, **options}
    net = MetaNeXt(**settings)  # type: ignore[arg-type]
    for tensor in (*net.parameters(), *net.buffers()):
        if tensor.is_floating_point():
            tensor.data.add_(0.2 * torch.rand(tensor.shape))
    return net


@pytest.mark.parametrize("output_stride", [32, 16, 8, 4])
def test_equals_timm(output_stride: int) -> None:
    timm = pytest.importorskip("timm.models.inception_next", reason="timm is the second implementation")
    net = small(output_stride=output_stride).eval()
    twin = timm.MetaNeXt(
        depths=(1, 2, 1, 1), dims=(8, 16, 16, 24), num_classes=5, ls_init_value=0.5, output_stride=output_stride
    ).eval()
    twin.load_state_dict(net.state_dict())
    x = torch.randn(2, 3, 64, 96)
    assert torch.allclose(net(x), twin(x), atol=1e-5)
    assert [i["reduction"] for i in net.feature_info] == [i["reduction"] for i in twin.feature_info]
    assert [m.shape for m in net.forward_intermediates(x)[1]] == [m.shape for m in twin.forward_intermediates(x)[1]]


@pytest.mark.parametrize("output_stride", [32, 8])
@pytest.mark.parametrize("ls_init_value", [0.5, None])
def test_folding_is_exact(output_stride: int, ls_init_value: float | None) -> None:
    net = small(output_stride=output_stride, ls_init_value=ls_init_value).double().eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    merged = net.merge()
    assert torch.allclose(merged(x), net(x), rtol=1e-10, atol=1e-12)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in merged.modules())
    assert norms == {32: 0, 8: 2}[output_stride]


def test_block_without_scale_is_the_identity() -> None:
    block = MetaNeXtBlock(16).train()
    torch.nn.init.zeros_(block.gamma)
    x = torch.randn(3, 16, 6, 6)
    assert torch.equal(block(x), x)


def test_drop_path_skips_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    block = MetaNeXtBlock(4, ls_init_value=1.0, drop_path=0.5).train()
    x = torch.randn(64, 4, 3, 3)
    residual = (block(x) - x).flatten(1).abs().sum(1)
    assert 0 < int((residual == 0).sum()) < 64
    block.eval()
    assert (block(x) - x).abs().sum() > 0
    with pytest.raises(ValueError, match="drop_path"):
        MetaNeXtBlock(4, drop_path=1.0)


def test_classifier_can_be_replaced() -> None:
    net, x = small().eval(), torch.randn(2, 3, 32, 32)
    net.reset_classifier(3)
    assert net(x).shape == (2, 3)
    net.reset_classifier(0)
    assert net(x).shape == (2, 72)
    net.reset_classifier(4, reset_other=True)
    assert net(x).shape == (2, 4)
    assert net.get_classifier().in_features == 24


@pytest.mark.parametrize("channels_last", [False, True])
def test_network_trains_under_autocast(channels_last: bool) -> None:
    net = small(drop_path_rate=0.2).train()
    x = torch.randn(2, 3, 64, 64)
    if channels_last:
        x, net = x.contiguous(memory_format=torch.channels_last), net.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
    y.float().square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


def test_network_without_graph_breaks() -> None:
    net, x = small().eval(), torch.randn(2, 3, 64, 64)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), net(x), atol=1e-5)


# Cases as in the golden files, of other shapes and options, with numbers from the loop above.


@pytest.mark.parametrize(
    ("config", "shape", "dtype"),
    [
        ({"in_chs": 17, "branch_ratio": 0.2, "band_kernel_size": 5}, (1, 17, 5, 4), torch.float32),
        ({"in_chs": 9, "branch_ratio": 1 / 3, "square_kernel_size": 5, "dilation": 2}, (2, 9, 4, 6), torch.float64),
        ({"in_channels": 8, "band_kernel_size": 13}, (1, 8, 3, 5), torch.float32),
    ],
)
def test_adapter_reads_the_whole_config(config: dict[str, float], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    x, c = normal(*shape), normal(*shape)
    g = int(shape[1] * config.get("branch_ratio", 0.125))
    s, b, d = (int(config.get(n, v)) for n, v in (("square_kernel_size", 3), ("band_kernel_size", 11), ("dilation", 1)))
    sizes = {"dwconv_hw": (s, s), "dwconv_w": (1, b), "dwconv_h": (b, 1)}
    state = {f"{n}.weight": normal(g, 1, *k).requires_grad_() for n, k in sizes.items()}
    state |= {f"{n}.bias": normal(g).requires_grad_() for n in sizes}
    x.requires_grad_()
    rest, *pieces = torch.split(x, [shape[1] - 3 * g, g, g, g], 1)
    convolved = [loop(p, state[f"{n}.weight"], state[f"{n}.bias"], (d, d)) for p, n in zip(pieces, sizes, strict=True)]
    y = torch.cat([rest, *convolved], 1)
    sources = {"x": x, **state}
    grads = dict(zip(sources, torch.autograd.grad((y * c).sum(), list(sources.values())), strict=True))

    def cast(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: t.detach().to(dtype) for n, t in tensors.items()}

    case = Case(
        key="inceptionnext",
        name="made",
        config=config,
        source="timm timm/models/inception_next.py:InceptionDWConv2d",
        mode="eval",
        note="",
        rtol=None,
        grad_rtol=None,
        state=cast(state),
        inputs=cast({"x": x, "cotangent": c}),
        outputs=cast({"y": y}),
        grads=cast(grads),
    )
    assert [t.name for t in run_case(case) if not t.passed] == []


@pytest.mark.parametrize("kind", ["mixer", "block", "net", "partial"])
def test_parity_tells_the_parts_apart_without_their_source(kind):
    config = {
        "mixer": {"in_chs": 8, "dilation": None},
        "block": {"dim": 8, "mlp_ratio": 2, "ls_init_value": None},
        "net": {"depths": [1], "dims": [8], "mlp_ratios": [2], "num_classes": 3, "in_chans": 8},
        "partial": {"in_channels": 8, "out_channels": 8, "kernel_size": 3, "conv_ratio": 0.5, "groups": 8},
    }[kind]
    module = {
        "mixer": lambda: InceptionDWConv2d(8),
        "block": lambda: MetaNeXtBlock(8, 2, None),
        "net": lambda: MetaNeXt(**config),
        "partial": lambda: PartialDepthwiseConv2d(8, ratio=0.5),
    }[kind]().eval()
    x = torch.randn(1, 8, 9, 8)
    state = {n: t.detach().clone() for n, t in module.state_dict().items()}
    case = Case(
        "inceptionnext", "made", config, "", "eval", "", None, None, state, {"x": x}, {"y": module(x).detach()}, {}
    )
    assert all(t.passed for t in run_case(case))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "a", -0.01])
def test_branch_ratio_that_is_no_share(value):
    with pytest.raises(ValueError, match=r"^branch_ratio="):
        InceptionDWConv2d(16, branch_ratio=value)


@pytest.mark.parametrize(("name", "value"), [("in_chans", 0), ("num_classes", -1), ("depths", (-1, 1)), ("dims", ())])
def test_network_names_the_argument_it_refuses(name, value):
    with pytest.raises(ValueError, match=f"^{name}="):
        MetaNeXt(**{"depths": (1, 1), "dims": (8, 8), "mlp_ratios": 2, "num_classes": 3, name: value})
