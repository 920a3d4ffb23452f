"""Efficient channel attention: identities, a matrix as oracle, options, the networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.parity.core import Case, run_case
from tests.parity.eca import adapt
from torchconv.models.classify.eca import (
    VARIANTS,
    ECABasicBlock,
    ECABottleneck,
    ECAInvertedResidual,
    ECAMobileNetV2,
    ECAResNet,
    eca_resnet18,
    kernel_sizes,
    shortcut,
)
from torchconv.ops.eca import (
    ECA,
    ChannelGate,
    ECAConv1d,
    ECAConv2d,
    adaptive_kernel_size,
    channel_means,
    eca_gate,
    eca_logits,
)


def matrix(weight: Tensor, channels: int, circular: bool) -> Tensor:
    """T with z = T y: banded Toeplitz, circulant for the circular form, row by row for the taps of each channel."""
    k = weight.shape[2]
    result = torch.zeros(channels, channels, dtype=weight.dtype)
    for c in range(channels):
        for j in range(k):
            source = c + j - (k - 1) // 2
            if circular or 0 <= source < channels:
                result[c, source % channels] += weight[c if weight.shape[0] > 1 else 0, 0, j]
    return result


@settings(max_examples=40, deadline=None)
@given(
    variant=st.sampled_from(["shared", "per_channel", "circular"]),
    channels=st.integers(1, 9),
    half=st.integers(0, 4),
    spatial=st.lists(st.integers(1, 4), max_size=4),
    batch=st.integers(0, 3),
)
def test_gate_is_a_matrix_on_the_means(variant: str, channels: int, half: int, spatial: list[int], batch: int) -> None:
    if variant == "circular":
        half = min(half, channels)
    torch.manual_seed(0)
    gate = ECA(channels, 2 * half + 1, variant=variant).double()
    x = torch.randn(batch, channels, *spatial, dtype=torch.float64)
    means = x.flatten(2).mean(2) if spatial else x
    expected = torch.sigmoid(means @ matrix(gate.conv.weight, channels, variant == "circular").T)
    assert torch.allclose(gate.gates(x), expected)
    y = gate(x)
    assert torch.allclose(y, x * expected.reshape(*expected.shape, *[1] * len(spatial)))
    assert (y.abs() <= x.abs()).all()
    assert torch.allclose(gate(x, x), y + x)


@pytest.mark.parametrize(
    ("channels", "size"),
    [
        *((c, 3) for c in (16, 32, 64, 96)),
        *((c, 5) for c in (128, 160, 192, 256, 320, 384, 512, 768, 1024, 1280)),
        (2048, 7),
    ],
)
def test_adaptive_kernel_size(channels: int, size: int) -> None:
    assert adaptive_kernel_size(channels) == ECA(channels).kernel_size == size
    assert ECAConv1d(4, channels).eca.kernel_size == size


def test_adaptive_kernel_size_equals_timm() -> None:
    timm = pytest.importorskip("timm.layers.eca", reason="timm is the second implementation")
    for channels in (*range(2, 300, 7), 128, 512, 2048):
        for gamma, beta in ((2, 1), (1, 1), (2, 3), (3, 0.5)):
            twin = timm.EcaModule(channels, gamma=gamma, beta=beta, device="meta")
            assert adaptive_kernel_size(channels, gamma, beta) == twin.conv.weight.shape[-1], channels
    assert [adaptive_kernel_size(c, minimum=1) for c in (1, 2, 4, 8)] == [1, 1, 1, 3]


@pytest.mark.parametrize("form", ["EcaModule", "CecaModule"])
def test_equals_timm(form: str) -> None:
    timm = pytest.importorskip("timm.layers.eca", reason="timm is the second implementation")
    for k in (1, 3, 5, 9):
        twin = getattr(timm, form)(kernel_size=k)
        gate = ECA(12, k, variant="circular" if form[0] == "C" else "shared")
        gate.load_state_dict(twin.state_dict())
        x = torch.randn(3, 12, 4, 5)
        assert torch.allclose(gate(x), twin(x), atol=1e-6)


def test_special_taps() -> None:
    torch.manual_seed(0)
    x, a = torch.randn(2, 6, 3, 4), torch.randn(6, 1, 1)
    assert torch.allclose(eca_gate(x, torch.zeros(1, 1, 3)), x / 2)
    means = x.mean((2, 3), keepdim=True)
    assert torch.allclose(eca_gate(x, a[:1]), x * torch.sigmoid(a[0] * means))
    tied = torch.randn(1, 1, 5)
    assert torch.allclose(eca_gate(x, tied), eca_gate(x, tied.expand(6, 1, 5)), atol=1e-6)
    diagonal = ChannelGate(6, "diagonal")
    diagonal.load_state_dict({"conv.weight": a})
    assert torch.allclose(eca_gate(x, a), diagonal(x), atol=1e-6)
    assert torch.allclose(ChannelGate(6, "none")(x), x * torch.sigmoid(means))


def test_symmetries() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(2, 8, 3, 4), torch.randn(1, 1, 3)
    circular = eca_gate(x, w, circular=True)
    assert torch.allclose(eca_gate(x.roll(3, 1), w, circular=True), circular.roll(3, 1), atol=1e-6)
    zeros, rolled = eca_gate(x, w), eca_gate(x.roll(1, 1), w).roll(-1, 1)
    assert torch.allclose(rolled[:, 1:6], zeros[:, 1:6], atol=1e-6)
    assert not torch.allclose(rolled, zeros, atol=1e-3)
    order = torch.randperm(12)
    shuffled = x.flatten(2)[..., order].reshape(x.shape)
    assert torch.allclose(eca_gate(shuffled, w), zeros.flatten(2)[..., order].reshape(x.shape), atol=1e-6)
    assert torch.allclose(eca_gate(x[1:], w), zeros[1:], atol=1e-6)


@pytest.mark.parametrize("variant", ["shared", "per_channel", "circular"])
def test_gradients(variant: str) -> None:
    torch.manual_seed(0)
    gate = ECA(5, 3, variant=variant).double()
    x = torch.randn(2, 5, 3, 2, dtype=torch.float64, requires_grad=True)
    r = torch.randn(2, 5, 3, 2, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, r: Tensor, *_: Tensor) -> Tensor:
        y: Tensor = gate(x, r)
        return y

    assert torch.autograd.gradcheck(run, (x, r, gate.conv.weight))
    assert torch.autograd.gradgradcheck(run, (x, r, gate.conv.weight))


def test_gradient_by_the_formula() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(2, 6, 3, 4, dtype=torch.float64, requires_grad=True), torch.randn(1, 1, 3, dtype=torch.float64)
    g = torch.randn_like(x)
    (found,) = torch.autograd.grad((eca_gate(x, w) * g).sum(), x)
    s = torch.sigmoid(eca_logits(channel_means(x), w))
    through = ((x * g).sum((2, 3)) * s * (1 - s)) @ matrix(w, 6, False)
    expected = g * s[..., None, None] + through[..., None, None] / 12
    assert torch.allclose(found, expected)


@pytest.mark.parametrize(
    ("build", "argument"),
    [
        (lambda: ECA(0), "channels"),
        (lambda: ECA(8, 4), "kernel_size"),
        (lambda: ECA(8, 0), "kernel_size"),
        (lambda: ECA(2, 7, variant="circular"), "kernel_size"),
        (lambda: ECA(8, variant="ring"), "variant"),
        (lambda: ECA(8, gamma=0), "gamma"),
        (lambda: ECA(8, minimum=2), "minimum"),
        (lambda: ECA(8)(torch.zeros(1, 7, 2)), "x of shape"),
        (lambda: ECA(8)(torch.zeros(1, 8, 2, dtype=torch.int32)), r"x of dtype torch\.int32"),
        (lambda: eca_logits(torch.zeros(1, 4), torch.zeros(3, 1, 3)), "weight"),
        (lambda: eca_logits(torch.zeros(1, 4), torch.zeros(3)), "weight"),
        (lambda: eca_logits(torch.zeros(1, 4), torch.zeros(1, 1, 2)), "kernel_size"),
        (lambda: eca_logits(torch.zeros(1, 2), torch.zeros(1, 1, 7), True), "kernel_size=7: .* at most 5"),
        (lambda: ChannelGate(6, "block", groups=4), "groups"),
        (lambda: ChannelGate(6, "band"), "form"),
        (lambda: ECAConv2d(3, 8, gate_kernel_size=2), "kernel_size"),
        (lambda: ECAInvertedResidual(8, 8, 3, 6), "stride"),
        (lambda: ECAResNet(ECABasicBlock, (1, 1), "357"), "k_size"),
        (lambda: ECAResNet(ECABasicBlock, (1, 1), "3a"), "k_size"),
        (lambda: ECAResNet(ECABasicBlock, (1, 1), 35), "k_size"),  # type: ignore[arg-type]
        (lambda: kernel_sizes({"conv1.weight": torch.zeros(1)}), "state"),
    ],
)
def test_wrong_arguments_are_named(build: Any, argument: str) -> None:
    with pytest.raises(ValueError, match=f"^{argument}"):
        build()


@pytest.mark.parametrize(("form", "parameters"), [("none", 0), ("diagonal", 8), ("block", 16), ("full", 64)])
def test_channel_gates(form: str, parameters: int) -> None:
    torch.manual_seed(0)
    gate = ChannelGate(8, form, groups=4).double()
    assert sum(p.numel() for p in gate.parameters()) == parameters
    x = torch.randn(2, 8, 3, dtype=torch.float64)
    dense = torch.eye(8, dtype=torch.float64)
    if gate.conv is not None:
        blocks = gate.conv.weight[..., 0].split(8 // gate.groups)
        dense = torch.block_diag(*blocks)
    assert torch.allclose(gate(x), x * torch.sigmoid(x.mean(2) @ dense.T)[..., None])


def test_operator_is_the_convolution_then_the_gate() -> None:
    torch.manual_seed(0)
    op = ECAConv2d(6, 8, 4, stride=2, padding="same", groups=2, gate_kernel_size=5, variant="per_channel")
    x = torch.randn(2, 6, 7, 8)
    assert torch.allclose(op(x), eca_gate(op.conv.merge()(x), op.eca.conv.weight), atol=1e-6)
    assert not hasattr(op, "merge")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("eca_resnet18", 11_689_512 + 44),
        ("eca_resnet34", 21_797_672 + 72),
        ("eca_resnet50", 25_557_032 + 80),
        ("eca_resnet101", 44_549_160 + 157),
        ("eca_resnet152", 60_192_808 + 234),
        ("eca_mobilenet_v2", 3_504_903),
    ],
)
def test_published_parameter_counts(name: str, parameters: int) -> None:
    with torch.device("meta"):
        net = VARIANTS[name]()
    assert sum(p.numel() for p in net.parameters()) == parameters


def test_names_are_torchvisions() -> None:
    models = pytest.importorskip("torchvision.models", reason="torchvision holds the plain networks")
    with torch.device("meta"):
        for name in ("resnet18", "resnet50"):
            ours, theirs = VARIANTS[f"eca_{name}"]().state_dict(), getattr(models, name)().state_dict()
            assert {n: t.shape for n, t in ours.items() if ".eca." not in n} == {n: t.shape for n, t in theirs.items()}


def test_kernel_sizes_are_read_from_the_state() -> None:
    with torch.device("meta"):
        state = eca_resnet18("3579").state_dict()
        assert kernel_sizes(state) == (3, 5, 7, 9)
        assert kernel_sizes(eca_resnet18(None).state_dict()) == (3, 5, 5, 5)
        eca_resnet18(kernel_sizes(state)).load_state_dict(state)


@pytest.mark.parametrize("build", [lambda: eca_resnet18(num_classes=3), lambda: ECAMobileNetV2(3, width_mult=0.25)])
def test_networks_run(build: Any) -> None:
    torch.manual_seed(0)
    net = build()
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
    assert y.shape == (2, 3)
    y.float().square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())
    net.eval()
    net.reset_classifier(7)
    assert net(x).shape == (2, 7)
    net.reset_classifier(0)
    assert net(x).shape == (2, net.num_features)


def test_block_without_graph_breaks() -> None:
    torch.manual_seed(0)
    block, x = ECABottleneck(16, 4).eval(), torch.randn(2, 16, 5, 5)
    assert torch.allclose(torch.compile(block, backend="aot_eager", fullgraph=True)(x), block(x), atol=1e-5)


def test_kernel_sizes_of_mobilenet() -> None:
    with torch.device("meta"):
        sizes = [m.kernel_size for m in ECAMobileNetV2(width_mult=0.5).modules() if isinstance(m, ECA)]
    assert sizes == [1] * 10 + [3] * 7


# Cases as in the golden files, with numbers from plain modules around a gate written out by means and a matrix.


class Plain(nn.Module):
    """The gate by its definition; padding by indices, so that nothing is shared with the code under test."""

    def __init__(self, rows: int, k: int, circular: bool) -> None:
        super().__init__()
        self.conv = nn.Conv1d(rows, rows, k, groups=rows, bias=False)
        self.circular = circular

    def forward(self, x: Tensor) -> Tensor:
        m, (_, _, k) = x.mean((2, 3)), self.conv.weight.shape
        terms = []
        for j in range(k):
            index = torch.arange(x.shape[1]) + j - (k - 1) // 2
            inside = torch.ones_like(index) if self.circular else ((index >= 0) & (index < x.shape[1])).long()
            terms.append(self.conv.weight[:, 0, j] * m[:, index % x.shape[1]] * inside)
        return x * torch.sigmoid(torch.stack(terms).sum(0))[:, :, None, None]


class PlainBlock(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        b: Any = self.block
        y = b.bn1(b.conv1(x)).relu()
        y = b.bn2(b.conv2(y))
        if hasattr(b, "conv3"):
            y = b.bn3(b.conv3(y.relu()))
        return (b.eca(y) + (x if b.downsample is None else b.downsample(x))).relu()


def gate_case(source: str, config: dict[str, Any], rows: int, k: int, channels: int) -> tuple[nn.Module, Tensor]:
    return Plain(rows, k, "Ceca" in source), torch.randn(2, channels, 3, 5, dtype=torch.float64)


@pytest.mark.parametrize(
    ("source", "config", "rows", "k", "channels"),
    [
        ("models/eca_module.py:eca_layer", {"channel": 4, "k_size": 9}, 1, 9, 4),
        ("models/eca_module.py:eca_layer", {"channel": 300}, 1, 3, 300),
        ("models/eca_ns.py:eca_layer", {"channel": 7, "k_size": 5}, 7, 5, 7),
        ("timm/layers/eca.py:EcaModule", {"kernel_size": 7}, 1, 7, 6),
        ("timm/layers/eca.py:EcaModule", {"channels": 256}, 1, 5, 256),
        ("timm/layers/eca.py:EcaModule", {"channels": 40, "gamma": 1, "beta": 2}, 1, 7, 40),
        ("timm/layers/eca.py:CecaModule", {"channels": 130, "gamma": 2, "beta": 1}, 1, 5, 130),
        ("timm/layers/eca.py:CecaModule", {"kernel_size": 3}, 1, 3, 5),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adapter_reads_the_whole_config(
    source: str, config: dict[str, Any], rows: int, k: int, channels: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    module, x = gate_case(source, config, rows, k, channels)
    check_case(source, config, module, x, dtype, training=False, prefix="")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        {"inplanes": 6, "planes": 6, "stride": 1, "downsample": False, "k_size": 5},
        {"inplanes": 4, "planes": 6, "stride": 2, "downsample": True, "k_size": 1},
    ],
)
def test_adapter_builds_blocks(config: dict[str, Any], training: bool) -> None:
    torch.manual_seed(0)
    inplanes, planes, stride = config["inplanes"], config["planes"], config["stride"]
    block = ECABasicBlock(
        inplanes, planes, stride, shortcut(inplanes, planes, stride) if config["downsample"] else None
    )
    block.eca = Plain(1, config["k_size"], False)  # type: ignore[assignment]
    x = torch.randn(2, inplanes, 6, 7, dtype=torch.float64)
    source = "models/eca_resnet.py:ECABasicBlock"
    check_case(source, config, PlainBlock(block), x, torch.float64, training=training, prefix="block.")


@pytest.mark.parametrize("name", ["ECA_MobileNetV2", "eca_mobilenet_v2"])
def test_adapter_builds_networks(name: str) -> None:
    torch.manual_seed(0)
    config = {"num_classes": 3, "width_mult": 0.1}
    x = torch.randn(2, 3, 33, 40, dtype=torch.float64)
    network = ECAMobileNetV2(**config)  # type: ignore[arg-type]
    check_case(f"models/eca_mobilenetv2.py:{name}", config, network, x, torch.float64, training=False, prefix="")


@pytest.mark.parametrize("k_size", [None, "3557", [3, 5, 7, 7]])
def test_adapter_builds_residual_networks_with_the_authors_default(k_size: Any) -> None:
    """Without sizes the authors' networks take 3 in every stage; ours take those of the published checkpoints."""
    config = {"num_classes": 2} if k_size is None else {"num_classes": 2, "k_size": k_size}
    source = "models/eca_resnet.py:eca_resnet18"
    with torch.device("meta"):
        network = adapt(Case("eca", "made", config, source, "eval", "", None, None, {}, {}, {}, {})).module
    assert isinstance(network, ECAResNet)
    assert kernel_sizes(network.state_dict()) == tuple(int(k) for k in k_size or "3333")


def check_case(
    source: str,
    config: dict[str, Any],
    module: nn.Module,
    x: Tensor,
    dtype: torch.dtype,
    *,
    training: bool,
    prefix: str,
) -> None:
    module = module.double().train(training)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.data.add_(torch.rand_like(tensor))

    def cast(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: t.detach().clone().to(dtype if t.is_floating_point() else t.dtype) for n, t in tensors.items()}

    state = cast({n.removeprefix(prefix): t for n, t in module.state_dict().items()})
    x.requires_grad_()
    y = module(x)
    c = torch.randn_like(y)
    sources = {"x": x, **{n.removeprefix(prefix): p for n, p in module.named_parameters()}}
    grads = dict(zip(sources, torch.autograd.grad((y * c).sum(), list(sources.values())), strict=True))
    buffers = {f"buffer.{n.removeprefix(prefix)}": b for n, b in module.named_buffers() if b.is_floating_point()}
    case = Case(
        key="eca",
        name="made",
        config=config,
        source=source,
        mode="train" if training else "eval",
        note="",
        rtol=None,
        grad_rtol=None,
        state=state,
        inputs=cast({"x": x, "cotangent": c}),
        outputs=cast({"y": y, **(buffers if training else {})}),
        grads=cast(grads),
    )
    assert [t.name for t in run_case(case) if not t.passed] == []
