"""Kernels of several sizes, deformable sampling against convolutions and torchvision, scans of the plane, the block."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.ops.harness import randomise
from tests.parity.core import Case, run_case
from torchconv.kernels import selective_scan
from torchconv.models.classify.hrvmamba_block import DVSSBlock, HRModule
from torchconv.ops.hrvmamba import MultiKernelDWConv1d, MultiKernelDWConv2d, channel_shuffle
from torchconv.ops.hrvmamba_dcn import DCNv4Conv2d, dcnv4
from torchconv.ops.hrvmamba_scan import Pointwise, SelectiveScan2d, cross_merge, cross_scan


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2), ((1, 3), (2, 1))])
def test_groups_of_kernel_sizes(stride, dilation):
    layer = MultiKernelDWConv2d(10, stride=stride, dilation=dilation).double()
    x = noise(2, 10, 9, 11)
    pieces = []
    for piece, conv in zip(x.split([4, 2, 2, 2], 1), layer.children(), strict=True):
        dilations = (dilation, dilation) if isinstance(dilation, int) else dilation
        pads = [d * (conv.kernel_size[0] // 2) for d in dilations]
        pieces.append(F.conv2d(piece, conv.weight, conv.bias, stride, pads, dilation, piece.shape[1]))
    torch.testing.assert_close(layer(x), torch.cat(pieces, 1))
    torch.testing.assert_close(layer.merge()(x), layer(x))
    assert [c.kernel_size[0] for c in layer.children()] == [3, 5, 7, 9]


def test_centred_deltas_are_the_shuffle():
    layer = MultiKernelDWConv2d(8, bias=False).double()
    for conv in layer.children():
        nn.init.dirac_(conv.weight, groups=conv.weight.shape[0])
    x = noise(2, 8, 5, 4)
    torch.testing.assert_close(layer(x), x)
    assert channel_shuffle(x, 4)[0, :, 0, 0].tolist() == x[0, [0, 2, 4, 6, 1, 3, 5, 7], 0, 0].tolist()
    assert torch.equal(channel_shuffle(channel_shuffle(x, 4), 2), x)
    assert list(MultiKernelDWConv1d(3, kernel_size=1).state_dict()) == ["0.weight", "0.bias"]


def given(masks: torch.Tensor, offsets: torch.Tensor, groups: int) -> torch.Tensor:
    """(N, H, W, G, K) masks and (N, H, W, G, K, 2) displacements as one tensor with a tail that is not read."""
    both = torch.cat([offsets.flatten(4), masks], 4).flatten(3)
    return F.pad(both, (0, 5), value=float("nan"))


def test_constant_masks_are_a_depthwise_convolution():
    x, weights = noise(2, 6, 7, 8), noise(2, 9)
    masks = weights.expand(2, 6, 7, 2, 9)
    y = dcnv4(x, given(masks, torch.zeros(2, 6, 7, 2, 9, 2).double(), 2), groups=2)
    # taps have the horizontal index outermost
    kernel = weights.reshape(2, 3, 3).transpose(1, 2).repeat_interleave(4, 0)[:, None]
    expected = F.conv2d(x.permute(0, 3, 1, 2), kernel, padding=1, groups=8).permute(0, 2, 3, 1)
    torch.testing.assert_close(y, expected)
    assert dcnv4(x, torch.zeros(2, 6, 7, 54).double(), groups=2).abs().max() == 0


def test_whole_displacements_are_shifts():
    x = noise(1, 6, 7, 4)
    masks = F.one_hot(torch.tensor(4), 9).double().expand(1, 6, 7, 1, 9)
    offsets = torch.zeros(1, 6, 7, 1, 9, 2).double()
    offsets[..., 0] = 2.0  # two columns to the right
    y = dcnv4(x, given(masks, offsets, 1))
    torch.testing.assert_close(y[:, :, :5], x[:, :, 2:])
    assert y[:, :, 5:].abs().max() == 0


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "remove"),
    [(3, 1, 1, 1, False), (3, 2, 0, 2, False), ((3, 5), (1, 2), (2, 1), (2, 1), False), (3, 1, 1, 1, True)],
)
def test_against_torchvision(kernel, stride, padding, dilation, remove):
    ops = pytest.importorskip("torchvision.ops")
    x = noise(2, 9, 10, 4)
    kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel
    size = F.conv2d(torch.zeros(1, 1, 9, 10), torch.zeros(1, 1, kh, kw), None, stride, padding, dilation).shape[2:]
    taps = kh * kw - remove
    offsets, masks = noise(2, *size, 2, taps, 2), noise(2, *size, 2, taps)
    y = dcnv4(x, given(masks, offsets, 2), kernel, stride, padding, dilation, 2, remove_center=remove)
    if remove:
        offsets = torch.cat([offsets[..., :4, :], torch.zeros_like(offsets[..., :1, :]), offsets[..., 4:, :]], 4)
        masks = torch.cat([masks[..., :4], torch.zeros_like(masks[..., :1]), masks[..., 4:]], 4)
    # torchvision: rows outermost, displacements (dy, dx)
    order = torch.arange(kh * kw).reshape(kw, kh).T.flatten()
    swapped = offsets[..., order, :].flip(5).flatten(3).permute(0, 3, 1, 2)
    weights = masks[..., order].flatten(3).permute(0, 3, 1, 2)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "mask": weights}
    kernel_of_ones = torch.zeros(4, 4, kh, kw).double()
    kernel_of_ones[torch.arange(4), torch.arange(4)] = 1.0
    expected = ops.deform_conv2d(x.permute(0, 3, 1, 2), swapped, kernel_of_ones, **options)
    torch.testing.assert_close(y, expected.permute(0, 2, 3, 1))


def test_offset_scale_scales_the_grid_too():
    x = noise(1, 7, 7, 2)
    masks = noise(9).expand(1, 7, 7, 1, 9)
    zeros = torch.zeros(1, 7, 7, 1, 9, 2).double()
    twice = dcnv4(x, given(masks, zeros, 1), offset_scale=2.0)
    spread = dcnv4(F.pad(x, (0, 0, 1, 1, 1, 1)), given(masks, zeros, 1), dilation=2)
    torch.testing.assert_close(twice, spread)


def test_module_of_the_sampling():
    layer = randomise(DCNv4Conv2d(12, offset_groups=3, head_kernel=3, stride=2)).double()
    assert layer.offset_mask.out_features == 88
    x = noise(2, 12, 7, 6)
    head = layer.offset_mask_dw(x)[:, :, ::2, ::2].permute(0, 2, 3, 1)
    expected = dcnv4(x.permute(0, 2, 3, 1), layer.offset_mask(head), 3, 2, 1, 1, 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(layer(x), expected)
    assert list(layer.state_dict()) == [
        "offset_mask_dw.weight",
        "offset_mask_dw.bias",
        "offset_mask.weight",
        "offset_mask.bias",
    ]


@pytest.mark.parametrize("directions", ["cross", "bidirectional"])
def test_merge_is_the_transpose_of_the_scan(directions):
    x, ys = noise(2, 3, 4, 5), noise(2, 4, 3, 20)
    torch.testing.assert_close(cross_merge(cross_scan(x, directions), (4, 5), directions), 4 * x.flatten(2))
    inner = (cross_scan(x, directions) * ys).sum()
    torch.testing.assert_close(inner, (x.flatten(2) * cross_merge(ys, (4, 5), directions)).sum())


def test_transposed_image_with_swapped_directions():
    layer = randomise(SelectiveScan2d(6, states=2)).double()
    twin = SelectiveScan2d(6, states=2).double()
    twin.load_state_dict(layer.state_dict())
    order = [1, 0, 3, 2]
    for name in ("x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds"):
        tensor = getattr(layer, name).detach()
        tensor = tensor.unflatten(0, (4, -1)) if name in ("A_logs", "Ds") else tensor
        tensor = tensor[order].flatten(0, 1) if name in ("A_logs", "Ds") else tensor[order]
        getattr(twin, name).data.copy_(tensor)
    h = noise(2, 12, 5, 4)
    expected = layer.scan(h).unflatten(2, (5, 4)).transpose(2, 3).flatten(2)
    torch.testing.assert_close(twin.scan(h.transpose(2, 3)), expected)


def test_scan_by_loops():
    layer = randomise(SelectiveScan2d(4, states=2, rank=2)).double()
    h = noise(1, 8, 3, 2)
    total = torch.zeros(1, 8, 6, dtype=torch.float64)
    paths = ([0, 1, 2, 3, 4, 5], [0, 2, 4, 1, 3, 5])
    rates = -layer.A_logs.exp().unflatten(0, (4, 8))
    for k, path in enumerate((*paths, *(p[::-1] for p in paths))):
        state = torch.zeros(8, 2, dtype=torch.float64)
        for position in path:
            u = h.flatten(2)[0, :, position]
            dt, b, c = (layer.x_proj_weight[k] @ u).split([2, 2, 2])
            step = F.softplus(layer.dt_projs_weight[k] @ dt + layer.dt_projs_bias[k])
            state = torch.exp(step[:, None] * rates[k]) * state + (step * u)[:, None] * b
            total[0, :, position] += state @ c + layer.Ds.unflatten(0, (4, 8))[k] * u
    torch.testing.assert_close(layer.scan(h), total)


def test_parts_of_ss2d():
    layer = randomise(SelectiveScan2d(8, 6, gated=True, attention=True, states=2)).double()
    x = noise(2, 8, 5, 4)
    h, z = layer.in_proj(x.permute(0, 2, 3, 1)).chunk(2, 3)
    h = F.silu(layer.conv2d(h.permute(0, 3, 1, 2)))
    y = layer.out_norm(layer.scan(h).transpose(1, 2).reshape(2, 5, 4, 16)) * F.silu(z)
    first, _, second = layer.se.fc
    y = y * torch.sigmoid(second(F.relu(first(y.mean((1, 2)))))).reshape(2, 1, 1, 16)
    torch.testing.assert_close(layer(x), layer.out_proj(y).permute(0, 3, 1, 2))
    assert layer.param_options().keys() == {"A_logs", "Ds"}


def test_initial_steps_and_rates():
    torch.manual_seed(0)
    layer = SelectiveScan2d(32, states=4)
    steps = F.softplus(layer.dt_projs_bias)
    assert float(steps.min().detach()) * 1.001 >= 1e-3
    assert float(steps.max().detach()) <= 0.1001
    torch.testing.assert_close(layer.A_logs.exp()[7], torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert layer.rank == 2
    assert SelectiveScan2d(80).conv2d.offset_mask_dw is not None
    assert SelectiveScan2d(40).conv2d.offset_groups == 2  # the largest divisor of 80 up to the rank of 3


def test_weights_of_pointwise_convolutions_load():
    layer = Pointwise(3, 5)
    layer.load_state_dict({"weight": torch.ones(5, 3, 1, 1), "bias": torch.zeros(5)})
    assert layer(torch.ones(2, 3)).tolist() == [[3.0] * 5] * 2


@pytest.mark.parametrize("local", [False, True])
def test_block_is_the_identity_without_its_last_maps(local):
    block = randomise(DVSSBlock(8, local)).double().eval()
    zeroed = [block.op.out_proj, block.mlp.fc2, *block.conv2d.children(), *([block.cpe2] if local else [])]
    for layer in zeroed:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
    x = noise(2, 8, 5, 4)
    assert torch.equal(block(x), x)


def test_block_drops_whole_samples_in_training_only():
    block = DVSSBlock(8, drop_path=0.9)
    x = torch.randn(32, 8, 4, 4)
    torch.manual_seed(0)
    same = (block(x) == x).flatten(1).all(1)
    assert same.any()
    assert not (block.eval()(x) == x).flatten(1).all(1).any()


def test_module_of_resolutions():
    module = HRModule((8, 12, 16), blocks=1).eval()
    xs = [torch.randn(2, c, *size) for c, size in zip((8, 12, 16), ((9, 7), (5, 4), (3, 2)), strict=True)]
    ys = module(xs)
    assert [y.shape for y in ys] == [x.shape for x in xs]
    assert min(float(y.detach().min()) for y in ys) == 0
    alone = HRModule((8,), blocks=2).eval()
    assert torch.equal(alone([xs[0]])[0], alone.branches[0](xs[0]))
    for i, row in enumerate(module.fuse_layers):
        for j, layer in enumerate(row):
            if i != j:
                for norm in (m for m in layer.modules() if isinstance(m, nn.BatchNorm2d)):
                    nn.init.zeros_(norm.weight)
    for branch, x, y in zip(module.branches, xs, module(xs), strict=True):
        torch.testing.assert_close(y, F.relu(branch(x)))
    assert len(HRModule((8, 12), blocks=(1, 2), multiscale_output=False)(xs[:2])) == 1


def test_refusals():
    with pytest.raises(ValueError, match="in_channels=3"):
        MultiKernelDWConv2d(3, kernel_size=9)
    with pytest.raises(ValueError, match="groups=4"):
        channel_shuffle(torch.zeros(1, 6, 2), 4)
    with pytest.raises(ValueError, match="offset_mask of shape"):
        dcnv4(torch.zeros(1, 4, 4, 2), torch.zeros(1, 4, 4, 26))
    with pytest.raises(ValueError, match=r"kernel_size=\(9, 9\): reaches over"):
        dcnv4(torch.zeros(1, 4, 4, 2), torch.zeros(1, 1, 1, 300), 9)
    with pytest.raises(ValueError, match="groups=0"):
        channel_shuffle(torch.zeros(1, 6, 2), 0)
    with pytest.raises(ValueError, match="head_kernel=-3"):
        DCNv4Conv2d(8, head_kernel=-3)
    with pytest.raises(ValueError, match="backend='cuda'"):
        SelectiveScan2d(8, backend="cuda")
    with pytest.raises(ValueError, match="ratio=nan"):
        SelectiveScan2d(8, ratio=float("nan"))
    with pytest.raises(ValueError, match="x of shape"):
        cross_scan(torch.zeros(4, 4, 2))
    with pytest.raises(ValueError, match="remove_center=True"):
        dcnv4(torch.zeros(1, 4, 4, 2), torch.zeros(1, 4, 4, 26), 2, remove_center=True)
    with pytest.raises(ValueError, match="offset_groups=5"):
        DCNv4Conv2d(8, offset_groups=5)
    with pytest.raises(ValueError, match="without its middle"):
        DCNv4Conv2d(8, kernel_size=1, remove_center=True)
    with pytest.raises(ValueError, match="directions='diagonal'"):
        SelectiveScan2d(8, directions="diagonal")
    with pytest.raises(ValueError, match="ys of shape"):
        cross_merge(torch.zeros(1, 4, 2, 7), (2, 4))
    with pytest.raises(ValueError, match="channels=6"):
        DVSSBlock(6)
    with pytest.raises(ValueError, match="xs=1"):
        HRModule((8, 8))([torch.zeros(1, 8, 4, 4)])
    with pytest.raises(ValueError, match="blocks="):
        HRModule((8, 8), blocks=(1,))


def parity_case(config, inputs, outputs, state=None, grads=None) -> Case:
    state, grads = state or {}, grads or {}
    return Case("hrvmamba", "made", config, "", "eval", "", None, None, state, inputs, outputs, grads)


def test_parity_reads_scans_without_their_options():
    u, delta, b, c = noise(1, 4, 6), noise(1, 4, 6) / 2, noise(1, 2, 3, 6), noise(1, 2, 3, 6)
    y = selective_scan(u, delta, -noise(4, 3).abs(), b, c, delta_softplus=True)
    inputs = {"u": u, "delta": delta, "A": -noise(4, 3).abs(), "B": b, "C": c}
    assert all(t.passed for t in run_case(parity_case({}, inputs, {"y": y})))
    x, ys = noise(1, 2, 3, 2), noise(1, 4, 2, 6)
    outputs = {"cross_scan": cross_scan(x), "cross_merge_bidi": cross_merge(ys, (3, 2), "bidirectional")}
    assert all(t.passed for t in run_case(parity_case({"H": 3, "W": 2}, {"x": x, "ys": ys}, outputs)))


def test_parity_of_a_bidirectional_block_with_pointwise_convolutions():
    block = DVSSBlock(8).double()
    block.op.directions = "bidirectional"
    with torch.no_grad():
        randomise(block)
    x = noise(1, 8, 4, 3).requires_grad_()
    y = block(x)
    name = "mlp.fc1.weight"
    (grad,) = torch.autograd.grad(y.sum(), dict(block.named_parameters())[name])
    maps = ("proj.weight", "fc1.weight", "fc2.weight")
    state = {n: t[:, :, None, None] if n.endswith(maps) else t for n, t in block.state_dict().items()}
    inputs = {"x": x.detach(), "cotangent": torch.ones_like(y)}
    config = {"hidden_dim": 8, "forward_type": "v052d_noz"}
    found = run_case(parity_case(config, inputs, {"y": y.detach()}, state, {name: grad[:, :, None, None]}))
    assert all(t.passed for t in found)
