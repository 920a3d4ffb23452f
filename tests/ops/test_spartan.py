"""SpaRTAN's mixers, block and network against what the paper implies."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.ops.harness import randomise
from tests.parity.spartan import widths_used
from torchconv.models.classify.spartan import SpaRTAN, SpaRTANBlock, read_official, spartan_s
from torchconv.ops.spartan import CMixer, SMixer, rotate_pairs


def image(channels: int = 8) -> torch.Tensor:
    return torch.randn(2, channels, 7, 6, generator=torch.Generator().manual_seed(0)).double()


def test_published_size() -> None:
    with torch.device("meta"):
        model = spartan_s(dropout=0.1)
    assert sum(p.numel() for p in model.parameters()) == 3_820_296
    rates = [m.drop_path.rate for m in model.layers if isinstance(m, SpaRTANBlock)]
    assert rates == [0.1 * i / 20 for i in range(20)]


@pytest.mark.parametrize(("z", "angle"), [((1.0, 0.0), 0), ((0.0, 1.0), 1)])
def test_rotation_by_quarter_turns(z: tuple[float, float], angle: int) -> None:
    x = image()
    y = rotate_pairs(x, torch.tensor(z).double().expand(1, 1, 1, 4, 2))
    turned = torch.stack([-x[:, 1::2], x[:, 0::2]], 2).flatten(1, 2)
    assert torch.equal(y, turned if angle else x)


def test_rotation_is_the_complex_product() -> None:
    x, z = image(), torch.randn(4, 2, dtype=torch.float64)
    pairs = torch.complex(x[:, 0::2], x[:, 1::2]) * torch.view_as_complex(z).reshape(1, 4, 1, 1)
    expected = torch.view_as_real(pairs).movedim(-1, 2).flatten(1, 2)
    torch.testing.assert_close(rotate_pairs(x, z), expected)


def test_gamma_minus_one_leaves_the_mean() -> None:
    mixer = SMixer(8).double().eval()
    seen: list[torch.Tensor] = []
    mixer.h_conv.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        mixer.gamma.fill_(-1)
        mixer(image())
        mean = mixer.proj_in(image()).mean((2, 3), keepdim=True)
    torch.testing.assert_close(seen[0], mean.expand_as(seen[0]))


def test_receptive_fields() -> None:
    mixer = SMixer(8).double().eval()
    x = torch.zeros(1, 4, 15, 15, dtype=torch.float64)
    x[:, :, 7, 7] = 1
    with torch.no_grad():
        short, long = mixer.h_conv.conv(x), mixer.l_conv[1].conv(mixer.l_conv[0].conv(x))
    rows = [set(y.abs().sum((0, 1, 3)).nonzero().flatten().tolist()) for y in (short, long)]
    assert rows == [{6, 7, 8}, {3, 5, 7, 9, 11}]


@pytest.mark.parametrize(("groups", "weights"), [(1, 27 * 16), (4, 27 * 4)])
def test_spatial_weights(groups: int, weights: int) -> None:
    mixer = SMixer(8, groups)
    convs = (mixer.h_conv, *mixer.l_conv)
    assert sum(c.conv.weight.numel() for c in convs) == weights


@pytest.mark.parametrize("groups", [1, 8])
def test_channel_mixer_in_words(groups: int) -> None:
    mixer, x = CMixer(8, 2, groups).double().eval(), image().round()  # rounded: the first of equal values wins
    theta, w = torch.nn.functional.gelu(mixer.theta(x)), mixer.proj(x)
    f = w * theta
    for n in range(2):
        for i in range(7):
            for k in range(6):
                j = int(x[n, :, i, k].argmax())
                f[n, :, i, k] += (w * theta)[n, j, i, k].clone()
    expected = mixer.proj_out(mixer.attn(mixer.conv(rotate_pairs(f, mixer.complex))))
    torch.testing.assert_close(mixer(x), expected)
    assert mixer.conv.conv.groups == (8 if groups > 1 else 16)


@pytest.mark.parametrize("use_group", [True, False])
def test_block_without_scales_is_the_identity(use_group: bool) -> None:
    block = SpaRTANBlock(8, 2, use_group=use_group).double().eval()
    torch.nn.init.zeros_(block.scale_1)
    torch.nn.init.zeros_(block.scale_2)
    assert torch.equal(block(image()), image())
    axes = (1, 2, 3) if use_group else (1,)
    normed = block.norm_1(3 * image() + 2)
    torch.testing.assert_close(normed.mean(axes), torch.zeros_like(normed.mean(axes)))
    torch.testing.assert_close(normed.var(axes, correction=0), torch.ones_like(normed.mean(axes)), rtol=1e-5, atol=1e-5)


def test_stage_without_blocks_keeps_size() -> None:
    model = SpaRTAN(0, 1, (0, 1, 1), (2, 2, 2), 8, (8, 16)).eval()
    assert [f["reduction"] for f in model.feature_info] == [4, 4, 8]
    assert model(torch.randn(1, 1, 32, 24)).shape == (1, 16)


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: SMixer(12), "channels"),
        (lambda: SMixer(16, 3), "groups"),
        (lambda: CMixer(2), "channels"),
        (lambda: CMixer(8, 1), "expand_ratio"),
        (lambda: SpaRTAN(dims=(64,)), "dims"),
        (lambda: SpaRTAN(expand_ratios=()), "expand_ratios"),
        (lambda: SpaRTAN(layer_depths=(0, 1, 1, 1)), "dims"),
    ],
)
def test_bad_arguments(build: object, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        build()  # type: ignore[operator]


@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("ratio", [2, 3, 4])
def test_rotation_goes_into_the_inner_convolution_where_pairs_stay_together(groups: int, ratio: int) -> None:
    mixer = randomise(CMixer(8, ratio, groups)).double().eval()
    merged = mixer.merge()
    torch.testing.assert_close(merged(image()), mixer(image()))
    assert (merged.complex is None) == (groups > 1 and ratio % 2 == 0)
    assert merged.conv.conv.weight.shape == mixer.conv.conv.weight.shape


def test_network_merges_exactly() -> None:
    model = randomise(SpaRTAN(5, 3, (1, 1, 1, 1), (4, 3, 2, 3), 8, (16, 24, 32))).double().eval()
    x = torch.randn(2, 3, 48, 40, generator=torch.Generator().manual_seed(0)).double()
    merged = model.merge()
    torch.testing.assert_close(merged(x), model(x))
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(x.contiguous(memory_format=torch.channels_last)), model(x))
    left = {n.rsplit(".", 1)[-1] for n, _ in merged.named_parameters() if "scale" in n or "norm" in n}
    assert left == {"weight", "bias"}  # of the group norms
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in merged.modules())


@pytest.mark.parametrize(
    "layout",
    [
        ((1, 2, 3, 1), (4, 4, 2, 2), 8, (16, 24, 32)),
        ((2,), (3,), 16, ()),
        ((1, 2, 1), (2, 3, 4), 8, (16, 32)),
        ((0, 0, 1, 2, 1), (2, 2, 2, 4, 2), 8, (8, 8, 16, 24)),
        ((1, 1, 0, 0), (2, 3, 2, 2), 8, (16, 24, 24)),
    ],
)
def test_layout_is_read_off_the_tensors(layout: tuple[Any, ...]) -> None:
    model = SpaRTAN(5, 3, *layout)
    found = read_official(model.state_dict())
    twin = SpaRTAN(5, 3, **found)
    twin.load_state_dict(model.state_dict())
    assert tuple(map(tuple, (found["layer_depths"], found["dims"]))) == (layout[0], layout[3])
    assert twin.eval()(torch.ones(1, 3, 64, 64)).equal(model.eval()(torch.ones(1, 3, 64, 64)))


@pytest.mark.parametrize(
    ("depths", "widths"), [((1, 1, 1, 1), [16, 24, 32]), ((1, 0, 1, 1), [16, 16, 32]), ((0, 1, 1, 0), [8, 24, 32])]
)
def test_cases_with_an_empty_stage_keep_its_width(depths: tuple[int, ...], widths: list[int]) -> None:
    assert widths_used(8, (16, 24, 32), depths) == widths
    SpaRTAN(3, 3, depths, (2, 2, 2, 2), 8, widths)


@pytest.mark.parametrize("part", [SMixer(8), CMixer(8), SpaRTANBlock(8), SpaRTAN(2, 8, (1,), (2,), 8, ())])
@pytest.mark.parametrize("shape", [(8, 9, 9), (2, 3, 9, 9)])
def test_inputs_that_do_not_fit(part: torch.nn.Module, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x of shape .*expected \(N, 8, H, W\)"):
        part(torch.zeros(shape))


@pytest.mark.parametrize(("option", "value"), [("dropout", 1.5), ("layer_depths", (-1, 1))])
def test_network_names_the_wrong_argument(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=option):
        SpaRTAN(**{"layer_depths": (1, 1), "expand_ratios": (2, 2), "init_dim": 8, "dims": (8,), option: value})  # type: ignore[arg-type]
