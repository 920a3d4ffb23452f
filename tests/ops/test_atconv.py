"""Attentive convolution against explicit loops, its identities, and AttNet's parts."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.parity.core import Case, run_case
from torchconv.models.classify.atconv import GLU, VARIANTS, AttNet, Block, DropPath
from torchconv.ops.atconv import ATConv1d, ATConv2d, ATConv3d, ATConvTokens, attentive_conv, band_means

KINDS = {1: ATConv1d, 2: ATConv2d, 3: ATConv3d}


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def randomise(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    return module.double()


def loops(layer, x):
    """The definition: project, average the bands, generate, subtract, correlate tap by tap, project."""

    def point(conv, x):
        y = torch.einsum("oc,nc...->no...", conv.weight.flatten(1), x)
        return y if conv.bias is None else y + conv.bias.view(-1, *[1] * (x.dim() - 2))

    s = point(layer.kernel_proj, x).flatten(2)
    taps, n = math.prod(layer.kernel_size), s.shape[2]
    bins = [s[:, :, i * n // taps : -(-(i + 1) * n // taps)].mean(2) for i in range(taps)]
    kernels = F.gelu(torch.stack(bins, 2)) @ layer.kernel_gen.weight.T
    if layer.kernel_gen.bias is not None:
        kernels = kernels + layer.kernel_gen.bias
    kernels = kernels - torch.sigmoid(layer.difference_control)[:, None] * kernels.mean(2, keepdim=True)
    v = point(layer.x_proj, x)
    pads, sizes = [], []
    for length, k, s_, d in zip(x.shape[2:], layer.kernel_size, layer.stride, layer.dilation, strict=True):
        total = d * (k - 1) if layer.padding == "same" else 2 * layer.padding
        pads.append(total // 2)
        sizes.append((length + total - d * (k - 1) - 1) // s_ + 1)
    out = torch.zeros(*v.shape[:2], *sizes, dtype=v.dtype)
    for place in itertools.product(*(range(i) for i in sizes)):
        for number, tap in enumerate(itertools.product(*(range(k) for k in layer.kernel_size))):
            source = [
                i * s_ + t * d - p
                for i, t, s_, d, p in zip(place, tap, layer.stride, layer.dilation, pads, strict=True)
            ]
            if all(0 <= i < length for i, length in zip(source, x.shape[2:], strict=True)):
                out[(..., *place)] += kernels[:, :, number] * v[(..., *source)]
    return point(layer.proj, out)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 2),
    st.integers(1, 2),
    st.sampled_from(["same", 0, 1]),
    st.booleans(),
    st.sampled_from(["grouped", "shift", "auto"]),
    st.integers(0, 99),
)
def test_equals_the_definition(ndim, kernel, stride, dilation, padding, bias, backend, seed):
    kernel = min(kernel, 2) if ndim == 3 else kernel
    size = {1: (11,), 2: (7, 9), 3: (3, 4, 3)}[ndim]
    layer = randomise(KINDS[ndim](3, 2, kernel, stride, padding, dilation, bias=bias, backend=backend), seed)
    x = noise(2, 3, *size, seed=seed)
    torch.testing.assert_close(layer(x), loops(layer, x))


@pytest.mark.parametrize(("kernel", "size"), [((3, 1), (4, 5)), ((5, 3), (2, 2)), ((2, 4), (5, 3))])
def test_gradients_and_kernel_forms(kernel, size):
    layer = randomise(ATConv2d(2, 3, kernel))
    x = noise(2, 2, *size).requires_grad_()
    torch.testing.assert_close(layer(x), loops(layer, x))
    parameters = list(layer.parameters())
    for backend in ("grouped", "shift"):
        layer.backend = backend
        assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *parameters), fast_mode=True)


@pytest.mark.parametrize(("n", "bins"), [(9, 9), (10, 9), (88, 9), (4, 9), (1, 4), (63, 25)])
def test_bins(n, bins):
    x = noise(2, 3, n)
    expected = torch.stack([x[..., i * n // bins : -(-(i + 1) * n // bins)].mean(-1) for i in range(bins)], -1)
    torch.testing.assert_close(band_means(x, bins), expected)
    layer = randomise(ATConv2d(3))
    wide = noise(1, 3, 6, 4)
    torch.testing.assert_close(layer.kernels(wide), layer.kernels(wide.reshape(1, 3, 1, 24)))


def test_exported_pooling_is_the_same():
    class Pool(torch.nn.Module):
        def forward(self, x):
            return band_means(x, 9)

    x = noise(2, 3, 5, 7)
    size = torch.export.Dim("width", min=2)
    program = torch.export.export(Pool(), (x,), dynamic_shapes=({3: size},))
    for width in (7, 11, 2):
        other = noise(2, 3, 5, width)
        torch.testing.assert_close(program.module()(other), band_means(other, 9))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["grouped", "shift"])
def test_half_precision(dtype, backend):
    x, kernels = noise(2, 4, 6, 6).to(dtype), noise(2, 4, 3, 3).to(dtype)
    y = attentive_conv(x, kernels, backend=backend)
    assert y.dtype == dtype
    expected = attentive_conv(x.double(), kernels.double())
    assert (y.double() - expected).abs().max() <= 9 * torch.finfo(dtype).eps * expected.abs().max()


def test_share_of_the_mean():
    layer = randomise(ATConv2d(4))
    x = noise(2, 4, 6, 6)
    raw, kernels = layer.kernels(x, difference=False), layer.kernels(x)
    left = 1 - torch.sigmoid(layer.difference_control)
    torch.testing.assert_close(kernels.sum((2, 3)), left * raw.sum((2, 3)))
    torch.nn.init.constant_(layer.difference_control, 60.0)
    flat = attentive_conv(torch.ones(2, 4, 6, 6, dtype=torch.float64), layer.kernels(x))
    assert flat[..., 1:-1, 1:-1].abs().max() < 1e-12
    torch.nn.init.constant_(layer.difference_control, -60.0)
    torch.testing.assert_close(layer.kernels(x), raw)


def test_centre_tap_leaves_the_two_projections():
    layer = randomise(ATConv2d(4))
    torch.nn.init.zeros_(layer.kernel_gen.weight)
    layer.kernel_gen.bias.data = F.one_hot(torch.tensor(4), 9).double()
    torch.nn.init.constant_(layer.difference_control, -60.0)
    x = noise(2, 4, 5, 6)
    torch.testing.assert_close(layer(x), layer.proj(layer.x_proj(x)))


def test_static_limit_and_items_of_a_batch():
    layer = randomise(ATConv2d(4))
    x = noise(3, 4, 5, 6)
    torch.testing.assert_close(layer(x)[[2, 0]], layer(x[[2, 0]]))
    torch.nn.init.zeros_(layer.kernel_proj.weight)
    kernels = layer.kernels(x)
    torch.testing.assert_close(kernels, kernels[:1].expand_as(kernels))
    static = F.conv2d(layer.x_proj(x), kernels[0].unsqueeze(1), padding=1, groups=4)
    torch.testing.assert_close(layer(x), layer.proj(static))


def test_constant_context_gives_kernels_in_a_plane():
    layer = randomise(ATConv2d(6))
    x = noise(3, 6, 1, 1).expand(3, 6, 7, 7)
    kernels = layer.kernels(x, difference=False).flatten(2).flatten(0, 1)
    assert torch.linalg.matrix_rank(kernels, rtol=1e-9) <= 2


@pytest.mark.parametrize(("channels", "k"), [(6, 3), (4, 5)])
def test_parameter_count(channels, k):
    count = 3 * channels**2 + 3 * channels + k**4 + k**2 + channels
    assert sum(p.numel() for p in ATConv2d(channels, kernel_size=k).parameters()) == count
    assert ATConv2d(4).param_options() == {"difference_control": {"weight_decay": 0.0}}


@pytest.mark.parametrize("grid", [None, 4, (2, 8)])
def test_tokens_are_the_map(grid):
    tokens, plane = ATConvTokens(5, grid=grid), ATConv2d(5, activation="gelu_tanh")
    state = {n: t[..., None, None] if n.endswith("proj.weight") else t for n, t in tokens.state_dict().items()}
    plane.load_state_dict(state)
    x = torch.randn(2, 16, 5)
    size = (2, 8) if grid == (2, 8) else (4, 4)
    expected = plane(x.transpose(1, 2).unflatten(2, size)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens(x), expected)
    with pytest.raises(ValueError, match="x of shape"):
        tokens(x[:, :15])
    with pytest.raises(ValueError, match="x of shape"):
        tokens(x[..., :4])


def test_refusals():
    with pytest.raises(ValueError, match="groups=3"):
        ATConv2d(6, groups=3)
    with pytest.raises(ValueError, match=r"activation='relu'"):
        ATConv2d(6, activation="relu")
    with pytest.raises(ValueError, match="backend='fast'"):
        ATConv2d(6, backend="fast")
    with pytest.raises(ValueError, match="kernels of shape"):
        attentive_conv(torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 3, 3))


def test_compiled_graph_serves_other_batches():
    layer = ATConv2d(4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3, 5):
        x = torch.randn(batch, 4, 6, 5)
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize(("conv", "norm"), [(True, True), (False, True), (True, False), (False, False)])
def test_glu_and_block(conv, norm):
    glu = randomise(GLU(3, 4, conv, norm))
    x = noise(2, 3, 5, 4)
    a, b = F.conv2d(x, glu.fc1.weight, glu.fc1.bias).split(4, 1)
    if conv:
        a = F.conv2d(a, glu.dwconv.weight, glu.dwconv.bias, padding=1, groups=4)
    u = F.gelu(a) * b
    if norm:
        u = u / (u.square().mean(1, keepdim=True) + 1e-6).sqrt() * glu.norm_layer.weight.view(-1, 1, 1)
    torch.testing.assert_close(glu(x), F.conv2d(u, glu.fc2.weight, glu.fc2.bias))
    block = randomise(Block(6, 3, conv=conv, norm=norm))
    for scale in (block.layer_scale_1, block.layer_scale_2):
        torch.nn.init.zeros_(scale.gamma)
    z = noise(2, 6, 4, 4)
    assert torch.equal(block(z), z)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("attnet_xxs", 2_853_556),
        ("attnet_xs", 5_554_902),
        ("attnet_s", 7_681_316),
        ("attnet_t1", 13_714_900),
        ("attnet_t2", 27_010_782),
        ("attnet_t3", 49_175_682),
        ("attnet_t4", 87_320_214),
    ],
)
def test_variants(name, count):
    with torch.device("meta"):
        net = VARIANTS[name]()
    assert sum(p.numel() for p in net.parameters()) == count


def test_network_with_any_number_of_stages():
    net = AttNet((4, 6), (1, 2), expansions=2, num_classes=3, drop_path_rate=0.3)
    assert net(torch.randn(2, 3, 16, 16)).shape == (2, 3)
    assert [round(b.drop_path.rate, 2) for s in net.stages for b in s] == [0.0, 0.15, 0.3]
    with pytest.raises(ValueError, match="kernel_sizes="):
        AttNet((4, 6), (1, 2), expansions=4, kernel_sizes=(3, 3, 3))


def test_drop_path_keeps_the_mean():
    torch.manual_seed(0)
    drop = DropPath(0.25)
    y = drop(torch.ones(4000, 1, 1, 1))
    torch.testing.assert_close(y.unique(), torch.tensor([0.0, 4 / 3]))
    assert abs(float(y.mean()) - 1) < 0.05
    assert torch.equal(drop.eval()(y), y)


def test_claim_task_shifts_as_the_code_says():
    from torchconv.claims.atconv import _batch

    x, y = _batch(8, torch.Generator().manual_seed(0))
    assert torch.equal(x[:, 1] + x[:, 2], torch.ones_like(x[:, 1]))
    for image, target in zip(x, y, strict=True):
        moved = image[0, :-1] if image[2, 0, 0] else image[0, :, :-1]
        assert torch.equal(target[0, 1:] if image[2, 0, 0] else target[0, :, 1:], moved)


def test_parity_of_tokens_between_convolutions():
    """The authors' second token form: 1 × 1 convolutions and SiLU, no options but those the state shows."""
    layer = randomise(ATConv2d(3, kernel_size=3, bias=False, activation="silu"))
    x = noise(2, 16, 3)
    y = layer(x.transpose(1, 2).unflatten(2, (4, 4))).flatten(2).transpose(1, 2).detach()
    state = {n: t.detach().clone() for n, t in layer.state_dict().items()}
    case = Case("atconv", "made", {"dim": 3}, "", "eval", "", None, None, state, {"x": x}, {"y": y}, {})
    assert all(t.passed for t in run_case(case))


def test_parity_takes_absent_options_of_a_block_from_the_state():
    block = randomise(Block(6, 3, 4, False, True, False, bias=False))
    x = noise(1, 6, 5, 4)
    state = {n: t.detach().clone() for n, t in block.state_dict().items()}
    case = Case("atconv", "made", {"dim": 6}, "", "eval", "", None, None, state, {"x": x}, {"y": block(x).detach()}, {})
    assert all(t.passed for t in run_case(case))


@pytest.mark.parametrize(("name", "value"), [("in_chans", 0), ("num_classes", -1), ("depths", (-1, 1)), ("dims", ())])
def test_network_names_the_argument_it_refuses(name, value):
    with pytest.raises(ValueError, match=f"^{name}="):
        AttNet(**{"dims": (8, 8), "depths": (1, 1), "expansions": 2, "num_classes": 3, name: value})


def test_empty_maps_and_token_lists_are_refused():
    for layer, x in ((ATConv2d(6), torch.zeros(2, 6, 0, 5)), (ATConvTokens(6), torch.zeros(2, 0, 6))):
        with pytest.raises(ValueError, match="every spatial axis needs a position"):
            layer(x)
