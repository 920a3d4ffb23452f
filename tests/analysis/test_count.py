"""Operation counts against closed forms written out here."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchconv.analysis import count as module
from torchconv.analysis.count import count, register_formula

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@pytest.fixture(autouse=True)
def formulas_restored():
    """No test leaves a formula behind."""
    before = dict(module._registered)
    yield
    module._registered.clear()
    module._registered.update(before)


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize(
    ("cin", "cout", "groups", "stride", "dilation", "padding"),
    [
        (4, 6, 1, 1, 1, 1),
        (4, 6, 2, 1, 1, 0),
        (6, 6, 6, 1, 1, 1),
        (4, 8, 1, 2, 1, 1),
        (4, 8, 4, 2, 2, 2),
        (2, 4, 1, 3, 2, 0),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_convolution(ndim, cin, cout, groups, stride, dilation, padding, bias):
    conv = CONV[ndim](cin, cout, 3, stride, padding, dilation, groups, bias)
    length, batch = 9, 2
    size = (length + 2 * padding - 2 * dilation - 1) // stride + 1
    outputs = batch * cout * size**ndim
    counts = count(conv, torch.zeros(batch, cin, *[length] * ndim))
    assert counts.macs == outputs * cin // groups * 3**ndim
    assert counts.convolution == 2 * counts.macs
    assert counts.elementwise == (outputs if bias else 0)
    assert counts.flops == counts.convolution + counts.elementwise
    assert counts.params == cout * cin // groups * 3**ndim + (cout if bias else 0)
    assert counts.not_counted == []


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize(("groups", "stride", "output_padding"), [(1, 1, 0), (2, 2, 1), (4, 3, 0)])
def test_transposed_convolution(ndim, groups, stride, output_padding):
    conv = TRANSPOSED[ndim](4, 8, 3, stride, 1, output_padding, groups, bias=False)
    counts = count(conv, torch.zeros(2, 4, *[5] * ndim))
    assert counts.macs == 2 * 5**ndim * 4 * 8 // groups * 3**ndim
    assert counts.flops == 2 * counts.macs


def test_rectangular_and_complex_convolution():
    counts = count(nn.Conv2d(3, 5, (1, 7), stride=(2, 1), bias=False), torch.zeros(1, 3, 8, 11))
    assert counts.macs == 4 * 5 * 5 * 3 * 7
    x = torch.zeros(1, 3, 6, 6, dtype=torch.complex64)
    # PyTorch runs a complex convolution as three real ones (Gauss); what ran is what is counted.
    weight = torch.zeros(2, 3, 3, 3, dtype=torch.complex64)
    assert count(lambda x: F.conv2d(x, weight), x).convolution == 3 * 2 * 16 * 2 * 3 * 9


def test_linear_and_products():
    assert count(nn.Linear(5, 7), torch.zeros(4, 3, 5)).macs == 4 * 3 * 5 * 7
    assert count(nn.Linear(5, 7), torch.zeros(4, 3, 5)).elementwise == 4 * 3 * 7
    a, b = torch.zeros(3, 4, 5), torch.zeros(3, 5, 6)
    assert count(torch.bmm, a, b).matmul == 2 * 3 * 4 * 5 * 6
    assert count(torch.matmul, torch.zeros(2, 3, 4, 5), torch.zeros(5, 6)).macs == 2 * 3 * 4 * 5 * 6
    assert count(lambda x, w: torch.einsum("bchw,oc->bohw", x, w), torch.zeros(2, 3, 4, 5), torch.zeros(6, 3)).macs == (
        2 * 3 * 4 * 5 * 6
    )
    assert count(torch.mv, torch.zeros(4, 5), torch.zeros(5)).macs == 20
    assert count(torch.dot, torch.zeros(5), torch.zeros(5)).macs == 5
    assert count(torch.addmv, torch.zeros(4), torch.zeros(4, 5), torch.zeros(5)).flops == 2 * 20 + 4
    assert count(torch.baddbmm, torch.zeros(3, 4, 6), a, b).flops == 2 * 3 * 4 * 5 * 6 + 3 * 4 * 6
    z = torch.zeros(4, 4, dtype=torch.complex64)
    assert count(torch.mm, z, z).matmul == 8 * 64


def test_attention_is_the_two_products_over_all_pairs():
    q, k, v = torch.zeros(2, 3, 7, 8), torch.zeros(2, 3, 9, 8), torch.zeros(2, 3, 9, 8)
    expected = 2 * (2 * 3) * 7 * 9 * (8 + 8)
    assert count(F.scaled_dot_product_attention, q, k, v).matmul == expected
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert count(F.scaled_dot_product_attention, q, k, v).matmul == expected


def test_multihead_attention_does_not_hide_behind_its_fast_path():
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.zeros(2, 5, 8)
    counts = count(layer, x, x, x, need_weights=False)
    assert counts.macs == 2 * 5 * 8 * 8 * 4 + 2 * 2 * 5 * 5 * 8
    assert counts.not_counted == []
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("layer", [nn.LSTM(8, 5), nn.GRU(8, 5)])
def test_recurrent(layer):
    gates = 4 if isinstance(layer, nn.LSTM) else 3
    counts = count(layer, torch.zeros(6, 2, 8))
    assert counts.macs == 6 * 2 * gates * 5 * (8 + 5)


@pytest.mark.parametrize("shape", [(16,), (12,), (8, 4), (4, 6, 2)])
def test_fft(shape):
    dims = tuple(range(1, len(shape) + 1))
    points, batch = math.prod(shape), 3
    work = batch * points * math.log2(points)
    x = torch.zeros(batch, *shape)
    spectrum = torch.fft.rfftn(x, dim=dims)
    assert count(lambda x: torch.fft.rfftn(x, dim=dims), x).fft == round(2.5 * work)
    assert count(lambda s: torch.fft.irfftn(s, s=shape, dim=dims), spectrum).fft == round(2.5 * work)
    counts = count(lambda x: torch.fft.fftn(x, dim=dims), x.to(torch.complex64))
    assert counts.fft == counts.flops == round(5 * work)
    assert counts.macs == 0


def test_element_wise():
    x, n = torch.ones(2, 3, 4), 24
    ones = (
        torch.exp,
        torch.relu,
        F.gelu,
        F.silu,
        torch.sigmoid,
        torch.sqrt,
        torch.neg,
        lambda x: x * 2,
        lambda x: x + x,
    )
    for function in ones:
        assert count(function, x).flops == n
    assert count(lambda x: x.add_(1), x.clone()).flops == n
    assert count(F.hardswish, x).flops == count(lambda x: F.hardswish(x, inplace=True), x.clone()).flops == n
    assert count(lambda x: torch.add(x, x, alpha=2), x).flops == 2 * n
    assert count(lambda x: torch.lerp(x, x, 0.5), x).flops == 3 * n
    assert count(lambda x: torch.addcmul(x, x, x), x).flops == 2 * n
    assert count(lambda x: x + torch.ones(5, 1, 1, 1), x).flops == 5 * n  # of the broadcast output
    z = torch.ones(4, dtype=torch.complex64)
    assert count(lambda z: z * z, z).flops == 24
    assert count(lambda z: z * torch.ones(4), z).flops == 8
    assert count(lambda z: z + z, z).flops == 8


def test_reductions_softmax_and_pooling():
    x, n = torch.rand(2, 4, 6, 6), 2 * 4 * 36
    assert count(lambda x: x.sum(), x).flops == n
    assert count(lambda x: x.mean((2, 3)), x).flops == n
    assert count(lambda x: x.amax(1), x).flops == n
    assert count(lambda x: x.max(1), x).flops == n
    assert count(lambda x: torch.max(x, x), x).flops == n
    assert count(lambda x: x.var(), x).flops == 4 * n
    assert count(lambda x: torch.linalg.vector_norm(x), x).flops == 2 * n
    assert count(nn.Softmax(1), x).flops == 5 * n
    assert count(nn.LogSoftmax(1), x).flops == 5 * n
    assert count(nn.AvgPool2d(2), x).flops == n
    assert count(nn.MaxPool2d(3, 2, 1), x).flops == 2 * 4 * 9 * 9
    assert count(nn.AdaptiveAvgPool2d(1), x).flops == n
    assert count(nn.Upsample(scale_factor=2, mode="bilinear"), x).flops == 4 * n * 7
    assert count(nn.Upsample(scale_factor=2, mode="nearest"), x).flops == 0


def test_normalisation():
    x, n = torch.rand(2, 4, 6, 6), 2 * 4 * 36
    batch = nn.BatchNorm2d(4)
    assert count(batch, x).flops == 2 * n
    assert count(nn.BatchNorm2d(4, affine=False), x).flops == 2 * n
    assert count(nn.BatchNorm2d(4, track_running_stats=False), x).flops == 7 * n
    assert count(nn.LayerNorm(6), x).flops == 7 * n
    assert count(nn.LayerNorm(6, elementwise_affine=False), x).flops == 5 * n
    assert count(nn.GroupNorm(2, 4), x).flops == 7 * n
    assert count(nn.InstanceNorm2d(4), x).flops == 5 * n


def test_moving_data_is_no_work():
    def shuffle(x):
        x = F.pad(x, (1, 1, 1, 1), mode="reflect")
        x = torch.cat([x, x.flip(2)], 1).permute(0, 2, 3, 1).contiguous().clone()
        x = torch.where(x > 0, x, torch.zeros_like(x))[:, ::2].to(torch.float64)
        return x.roll(1, 2).reshape(-1)[torch.randperm(10)].sort().values, x.argmax()

    counts = count(shuffle, torch.rand(1, 2, 6, 6))
    assert counts.flops == 0
    assert counts.not_counted == []
    assert count(lambda i: i * 2 + 1, torch.arange(5)).flops == 0  # integers


def test_what_has_no_formula_is_named():
    counts = count(lambda a: torch.linalg.inv(a @ a) + torch.linalg.qr(a).R, torch.eye(4) + 1)
    assert counts.not_counted == ["aten::linalg_inv_ex", "aten::linalg_qr"]
    assert counts.macs == 64
    assert counts.elementwise == 16
    assert counts.kinds()["not_counted"] == counts.not_counted


def test_custom_operator_with_and_without_a_formula():
    @torch.library.custom_op("torchconvtest::twice_product", mutates_args=())
    def twice_product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return 2 * (x @ w)

    x, w = torch.zeros(4, 5), torch.zeros(5, 6)
    counts = count(lambda x, w: twice_product(x, w).relu(), x, w)
    assert counts.not_counted == ["torchconvtest::twice_product"]
    assert counts.flops == 24
    register_formula(
        twice_product, lambda x, w, out: {"matmul": 2 * out.numel() * x.shape[1], "elementwise": out.numel()}
    )
    counts = count(lambda x, w: twice_product(x, w).relu(), x, w)
    assert counts.not_counted == []
    assert (counts.macs, counts.elementwise) == (4 * 5 * 6, 24 + 24)
    register_formula(torch.ops.torchconvtest.twice_product, lambda x, w, out: 10, kind="fft")
    assert count(twice_product, x, w).fft == 10


def test_torchvision_deformable_convolution():
    ops = pytest.importorskip("torchvision.ops", reason="torchvision is not installed")
    layer = ops.DeformConv2d(4, 6, 3, padding=1, groups=2)
    counts = count(lambda x: layer(x, torch.zeros(2, 18, 5, 5)), torch.zeros(2, 4, 5, 5))
    assert counts.macs == 2 * 6 * 25 * 2 * 9
    assert counts.elementwise == 7 * 2 * 4 * 9 * 25 + 2 * 6 * 25


def test_bad_arguments():
    with pytest.raises(ValueError, match="op='nonsense'"):
        register_formula("nonsense", lambda out: 1)
    with pytest.raises(ValueError, match="kind='convolutions'"):
        register_formula("a::b", lambda out: 1, kind="convolutions")
    with pytest.raises(ValueError, match="model="):
        count(3)
    with pytest.raises(ValueError, match="lazy"):
        count(nn.LazyConv2d(4, 3), torch.zeros(1, 3, 8, 8))


def test_modules_include_their_children():
    shared = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    net = nn.Sequential(nn.Sequential(shared, nn.ReLU()), shared, nn.Identity())
    counts = count(net, torch.zeros(1, 4, 5, 5))
    once = 25 * 4 * 4 * 9
    assert counts.params == 4 * 4 * 9
    assert counts.macs == 2 * once
    assert counts.by_module[""].flops == counts.flops
    assert counts.by_module[""].type == "Sequential"
    assert counts.by_module["0.0"].macs == 2 * once  # one module, two calls
    assert counts.by_module["0.0"].calls == 2
    assert counts.by_module["0"].elementwise == 100
    assert counts.by_module["2"].flops == 0
    assert counts.by_operator == {"aten::convolution": 4 * once, "aten::relu": 100}
    assert counts.param_bytes == 4 * counts.params


def test_batch_scales_and_written_bytes():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten())
    one, four = count(net, torch.zeros(1, 3, 8, 8)), count(net, torch.zeros(4, 3, 8, 8))
    assert four.flops == 4 * one.flops
    assert one.activations_bytes == 4 * 4 * 36
    assert count(net, torch.zeros(0, 3, 8, 8)).flops == 0


def test_the_meta_device_counts_without_computing():
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.GELU(), nn.Flatten())
    real = count(net, torch.zeros(2, 3, 20, 20))
    with torch.device("meta"):
        empty = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.GELU(), nn.Flatten())
        counts = count(empty, torch.zeros(2, 3, 20, 20))
    assert (counts.by_module, counts.by_operator, counts.params) == (real.by_module, real.by_operator, real.params)


class Careless(nn.Module):
    """Writes its buffers, draws random numbers and flips a child's mode on every forward pass."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("last", torch.zeros(3))
        self.norm.eval()

    def forward(self, x):
        self.seen += 1
        self.last = x.mean(0)
        self.norm.train()
        return self.norm(x) + torch.rand(3)


def test_the_model_and_the_generators_are_left_as_they_were():
    model = Careless().train()
    model.norm.eval()
    before, flags = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    random = torch.random.get_rng_state()
    counts = count(model, torch.rand(5, 3, generator=torch.Generator().manual_seed(0)))
    assert counts.flops > 0
    assert torch.equal(random, torch.random.get_rng_state())
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_hooks_go_when_the_forward_pass_fails():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(3, 4)).train()
    with pytest.raises(RuntimeError):
        count(net, torch.zeros(1, 3))
    assert net[0].training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
