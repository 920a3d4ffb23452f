"""The re-parameterised depthwise convolution against its branches, the blocks against written-out graphs, attention."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.ops.harness import randomise
from tests.parity.core import Case, run_case
from torchconv.ops.mhafyolo import (
    MULTI_KERNELS,
    ConvBN,
    MultiKernelReparamConv1d,
    MultiKernelReparamConv2d,
    MultiKernelReparamConv3d,
)
from torchconv.ops.mhafyolo_blocks import RepHDW1d, RepHDW2d, RepHMS2d, RepHMS3d
from torchconv.ops.mhafyolo_parts import PSA, SPPF, SCDown, shrink


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def branch_by_branch(op: MultiKernelReparamConv2d, x: torch.Tensor) -> torch.Tensor:
    rep = op.dwconv
    y = rep.origin_bn(F.conv2d(x, rep.lk_origin.weight, padding=op.kernel_size[0] // 2, groups=x.shape[1]))
    for k, r in MULTI_KERNELS[op.kernel_size[0]]:
        conv, bn = getattr(rep, f"dil_conv_k{k}_{r}"), getattr(rep, f"dil_bn_k{k}_{r}")
        y = y + bn(F.conv2d(x, conv.weight, padding=r * (k - 1) // 2, dilation=r, groups=x.shape[1]))
    return op.norm(y)


@pytest.mark.parametrize("kernel_size", MULTI_KERNELS)
def test_merge_of_every_size(kernel_size):
    op = randomise(MultiKernelReparamConv2d(4, kernel_size=kernel_size)).eval()
    x = noise(2, 4, 11, 9)
    expected = branch_by_branch(op, x)
    conv = op.merge()
    assert (type(conv), conv.kernel_size, conv.groups) == (nn.Conv2d, (kernel_size,) * 2, 4)
    for y in (op(x), conv(x)):
        assert (y - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("kernel_size", [3, 9])
def test_training_normalises_by_the_batch(kernel_size):
    op = randomise(MultiKernelReparamConv2d(4, kernel_size=kernel_size)).train()
    twin = copy.deepcopy(op)
    x = noise(3, 4, 7, 8)
    torch.testing.assert_close(op(x), branch_by_branch(twin, x))
    for name, buffer in op.named_buffers():
        torch.testing.assert_close(buffer, dict(twin.named_buffers())[name])
    assert {m.eps for m in op.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-3}
    assert {m.momentum for m in op.modules() if isinstance(m, nn.BatchNorm2d)} == {0.03}


def test_branches():
    assert {k: v for k, v in MULTI_KERNELS.items() if k <= 9} == {
        3: ((3, 1), (1, 1)),
        5: ((3, 1), (1, 1)),
        7: ((5, 1), (3, 1)),
        9: ((7, 1), (5, 1), (3, 1)),
    }
    assert list(MULTI_KERNELS) == [3, 5, 7, 9, 11, 13, 15, 17]


def test_pointwise_branch_touches_the_centre_only():
    op = randomise(MultiKernelReparamConv2d(3, kernel_size=5)).eval()
    before = op.merge().weight
    op.dwconv.dil_conv_k1_1.weight.data.add_(1.0)
    change = (op.merge().weight - before)[:, 0]
    assert (change[:, 2, 2].abs() > 0.1).all()
    change[:, 2, 2] = 0
    assert change.abs().max() < 1e-6


def test_other_dimensions_are_planes_of_one_row():
    flat = randomise(MultiKernelReparamConv1d(3, kernel_size=7)).eval()
    x = noise(2, 3, 12)
    y = nn.functional.conv1d(x, flat.merge().weight, flat.merge().bias, padding=3, groups=3)
    torch.testing.assert_close(flat(x), y)
    assert MultiKernelReparamConv3d(2, kernel_size=3)(noise(2, 2, 4, 3, 5)).shape == (2, 2, 4, 3, 5)
    assert RepHDW1d(4, 6, 3)(noise(2, 4, 9)).shape == (2, 6, 9)
    assert RepHMS3d(4, 6, 3)(noise(2, 4, 3, 4, 5)).shape == (2, 6, 3, 4, 5)


@pytest.mark.parametrize(("act", "groups", "stride", "kernel"), [(True, 1, 1, 1), (False, 4, 2, 3), (True, 2, 2, 5)])
def test_convolution_with_batch_norm(act, groups, stride, kernel):
    layer = randomise(ConvBN(4, 8, kernel, stride, groups, act)).eval()
    x = noise(2, 4, 9, 8)
    z = F.conv2d(x, layer.conv.weight, None, stride, kernel // 2, 1, groups)
    z = F.batch_norm(z, layer.bn.running_mean, layer.bn.running_var, layer.bn.weight, layer.bn.bias, eps=1e-3)
    expected = z * torch.sigmoid(z) if act else z
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.merge()(x), expected)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in layer.merge().modules())


def bottleneck(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = F.silu(block.conv2(block.conv1(x)))
    x = F.silu(block.conv3(block.one_conv(x)))
    return block.one_conv2(x)


def test_block_of_depth_one():
    op = randomise(RepHMS2d(6, 9, 3, width=4, expansion=2)).eval()
    assert op.conv2.conv.in_channels == 4 * (1 + 3)
    x = noise(2, 6, 7, 5)
    x0, x1, x2, x3 = op.conv1(x).chunk(4, 1)
    b = [stack[0] for stack in op.RepElanMSBlock]
    y1 = bottleneck(b[0], x1 + x0)
    y2 = bottleneck(b[1], x2 + y1)
    y3 = bottleneck(b[2], x3 + y2)
    torch.testing.assert_close(op(x), op.conv2(torch.cat([x0, y1, y2, y3], 1)))


def test_block_of_depth_two_keeps_a_stale_entry():
    op = randomise(RepHMS2d(6, 4, 3, width=4, depth=2, expansion=2)).eval()
    assert op.conv2.conv.in_channels == 2 * (1 + 3 * 2)
    x = noise(2, 6, 7, 5)
    x0, x1, x2, x3 = op.conv1(x).chunk(4, 1)
    (a, b), (c, d), (e, f) = op.RepElanMSBlock
    y1 = bottleneck(a, x1 + x0)
    y2 = bottleneck(b, y1)
    y3 = bottleneck(c, x2 + y1)
    y4 = bottleneck(d, y3 + y2)
    y5 = bottleneck(e, x3 + y3)  # the third chunk starts from the first output of the second
    y6 = bottleneck(f, y5 + y4)
    torch.testing.assert_close(op(x), op.conv2(torch.cat([x0, y1, y2, y3, y4, y5, y6], 1)))


def test_first_block():
    op = randomise(RepHDW2d(6, 8, 5, depth=2, expansion=0.75, depth_expansion=2)).eval()
    assert (op.conv1.conv.out_channels, op.conv2.conv.in_channels) == (12, 24)
    x = noise(2, 6, 7, 5)
    outputs = list(op.conv1(x).chunk(2, 1))
    for block in op.m:
        outputs.append(block.one_conv(F.silu(block.conv2(block.conv1(outputs[-1])))))
    torch.testing.assert_close(op(x), op.conv2(torch.cat(outputs, 1)))
    assert {n.rsplit(".", 1)[0] for n in op.state_dict() if n.startswith("m.0.one_conv.")} == {
        "m.0.one_conv.conv",
        "m.0.one_conv.bn",
    }


@pytest.mark.parametrize(
    "op", [RepHMS2d(6, 8, 7), RepHDW2d(6, 8, 5, depth=2), SPPF(6, 8, 3), SCDown(6, 8), PSA(6, 0.5, 3)]
)
def test_merged_blocks_have_no_batch_norm(op):
    op = randomise(op).eval()
    merged = op.merge()
    assert not any(isinstance(m, nn.BatchNorm2d | MultiKernelReparamConv2d) for m in merged.modules())
    x = noise(2, 6, 7, 5)
    torch.testing.assert_close(merged(x), op(x), atol=1e-5, rtol=1e-5)
    assert any(isinstance(m, nn.BatchNorm2d) for m in op.modules())


def test_pooling():
    x = noise(2, 3, 8, 6)
    torch.testing.assert_close(shrink(x), F.avg_pool2d(x, 2))
    odd = noise(1, 1, 5, 5)
    assert shrink(odd)[0, 0, 0, 1] == pytest.approx(float(odd[0, 0, :3, 2:].mean()))
    torch.testing.assert_close(shrink(noise(1, 2, 9, 6), 3), F.avg_pool2d(noise(1, 2, 9, 6), 3))
    op = randomise(SPPF(6, 8, 3)).eval()
    x = noise(2, 6, 9, 8)
    z = op.cv1(x)
    maps = [z, *(F.max_pool2d(z, k, 1, k // 2) for k in (3, 5, 7))]  # poolings in a row are larger poolings
    torch.testing.assert_close(op(x), op.cv2(torch.cat(maps, 1)))


def test_attention_by_loops():
    op = randomise(PSA(16, 0.5, 4)).double().eval()
    x = noise(2, 16, 3, 2).double()
    a, b = op.cv1(x).chunk(2, 1)
    qkv = op.attn.qkv(b).flatten(2)
    heads, values = [], []
    for h in range(2):
        q, k, v = qkv[:, h * 8 : h * 8 + 2], qkv[:, h * 8 + 2 : h * 8 + 4], qkv[:, h * 8 + 4 : h * 8 + 8]
        weights = torch.softmax(torch.einsum("ncp,ncq->npq", q, k) / 2**0.5, 2)
        heads.append(torch.einsum("npq,ncq->ncp", weights, v))
        values.append(v)
    y, v = (torch.cat(t, 1).unflatten(2, (3, 2)) for t in (heads, values))
    b = b + op.attn.proj(y + op.attn.pe(v))
    b = b + op.ffn(b)
    torch.testing.assert_close(op(x), op.cv2(torch.cat([a, b], 1)))
    assert op.attn.pe.conv.weight.shape == (8, 1, 3, 3)


def test_published_sizes_of_attention():
    op = PSA(256)
    assert (op.attn.heads, op.attn.key, op.attn.head) == (2, 32, 64)
    assert op.attn.qkv.conv.out_channels == 256


@pytest.mark.parametrize(
    ("module", "config"),
    [
        (MultiKernelReparamConv2d(4, kernel_size=9), {}),
        (RepHMS2d(4, 10, 7, width=4, depth=2, expansion=1.7), {"bn_eps": 1e-3}),
        (RepHDW2d(4, 9, 3, depth=2, depth_expansion=1.3), {}),
        (ConvBN(4, 6, 3, 2, 2), {"s": 2, "g": 2}),
        (SCDown(4, 6, 5), {}),
    ],
)
def test_golden_files_may_leave_to_the_weights_what_they_show(module, config):
    module, x = randomise(module).eval(), noise(2, 4, 7, 6)
    state = {n: t.clone() for n, t in module.state_dict().items()}
    y = module(x).detach()
    case = Case("mhafyolo", "", config, "", "eval", "", None, None, state, {"x": x}, {"y": y}, {})
    assert all(c.passed for c in run_case(case))


def test_refusals():
    with pytest.raises(ValueError, match=r"kernel_size=4.*use 3 or 5"):
        MultiKernelReparamConv2d(4, kernel_size=4)
    for build in (MultiKernelReparamConv2d, RepHMS2d, RepHDW2d):  # they speak of themselves, not of their parts
        for option in ({"kernel_size": 19}, {"kernel_size": (3, 5)}, {"stride": 2}, {"dilation": 2}, {"padding": 1}):
            with pytest.raises(ValueError, match=rf"{next(iter(option))}=.*{build.__name__}"):
                build(4, **option)
    for factor in (0, 8):
        with pytest.raises(ValueError, match=f"factor={factor}"):
            shrink(noise(2, 3, 7, 9), factor)
    with pytest.raises(ValueError, match="x of shape"):
        shrink(noise(3, 7, 9))
    with pytest.raises(ValueError, match="kernel_size=0"):
        ConvBN(3, 4, 0)
    with pytest.raises(ValueError, match="stride=0"):
        SCDown(4, 4, 3, 0)
    with pytest.raises(ValueError, match="kernel_size=-1"):
        SPPF(4, 4, -1)
    with pytest.raises(ValueError, match="head_channels=1"):
        PSA(8, 0.5, 1)
    with pytest.raises(ValueError, match="depth=3"):
        RepHMS2d(8, width=4, depth=3)
    with pytest.raises(ValueError, match="width=1"):
        RepHMS2d(8, width=1)
    with pytest.raises(ValueError, match="out_channels=1"):
        RepHMS2d(8, 1)
    with pytest.raises(ValueError, match=r"expansion=0\.01"):
        RepHDW2d(8, expansion=0.01)
    with pytest.raises(ValueError, match="channels=64"):
        PSA(64)
    with pytest.raises(ValueError, match="kernel_size=4"):
        SPPF(8, 8, 4)
    assert RepHMS2d(8, 4, 3, width=3, depth=3)(noise(2, 8, 4, 4)).shape == (2, 4, 4, 4)
