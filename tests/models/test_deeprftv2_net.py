"""DeepRFTv2 and DeepRFT as networks: wiring, counts, inversion, merged form, files, tiles, loss, refusals."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.parity.core import Case, run_case
from torchconv.models import create_model
from torchconv.models.restore import deeprftv2
from torchconv.models.restore.deeprftv2 import DeepRFTv2, half_size
from torchconv.models.restore.deeprftv2_first import DeepRFT
from torchconv.models.restore.deeprftv2_loss import deblur_loss, spectral_loss
from torchconv.models.restore.tiles import restore
from torchconv.ops.deeprftv2_doconv import DOConv2d
from torchconv.surgery import merge
from torchconv.weights import load_official

SMALL: dict[str, Any] = {"widths": (4, 6), "kernel_widths": (3, 5), "encoder": (1, 1, 1), "decoder": (1, 0, 1)}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def randomised(module: nn.Module) -> Any:
    with torch.no_grad():
        for parameter in module.parameters():
            fan = math.sqrt(parameter[0].numel()) if parameter.dim() > 2 else 1.0
            parameter.copy_((2 * torch.rand(parameter.shape) - 1) / fan)
    return module


def small(**options: Any) -> Any:
    return randomised(DeepRFTv2(**{**SMALL, **options})).eval()


def first(**options: Any) -> Any:
    return randomised(DeepRFT(**{"num_blocks": 1, "width": 8, **options})).eval()


@pytest.mark.parametrize(
    ("name", "training", "merged"),
    [
        ("deeprft", 10_189_449, 9_551_088),  # published, from memory: 9.6 million
        ("deeprft_plus", 24_478_857, 22_969_584),  # published, from memory: 23.0 million
        ("deeprftv2_base", 21_181_752, None),
    ],
)
def test_counts(name: str, training: int, merged: int | None) -> None:
    with torch.device("meta"):
        net: Any = create_model(name)
    assert sum(p.numel() for p in net.parameters()) == training
    if merged is not None:
        assert sum(p.numel() for p in net.merge().parameters()) == merged


def test_count_in_closed_form() -> None:
    def naf(c: int) -> int:  # 1×1: 2 + 1 + 1 + 2 + 1 matrices; depthwise; biases 2+2+1+1+2+1, norms 4, β and γ 2
        return 7 * c * c + 18 * c + 15 * c

    d, blocks = 48, 1 + 1
    columns = 2 * (blocks * naf(d) + 2 * 4 * naf(2 * d) + 2 * 8 * naf(4 * d))
    alphas = 2 * (7 * d + 4 * d)
    halves = 2 * (4 * d * 2 * d + 4 * 2 * d * 4 * d)  # of both encoders
    doubles = 2 * (4 * d * 8 * d + 2 * d * 4 * d)
    joins = sum(2 * c * c + c for c in (d, 2 * d, 4 * d)) + sum(4 * c * c for c in (d, 2 * d, 4 * d))
    latent = 4 * d * 4 * d + 8 * d * 4 * d + 4 * d
    ends = 2 * (27 * d + 27 * d + 3)
    estimator = 2 * d * d + 2 * d * d + 4 * (naf(d) + d) + 2 * d + 2 * d * d + 2 * d + 2 * d * d + 27 * d + 3
    later = 2 * (2 * d * d + d) + 2 * 3 * (2 * d * d + d)  # what the second stage sees of the first
    stage = columns + alphas + halves + doubles + joins + latent + ends + 2 * estimator
    with torch.device("meta"):
        net = DeepRFTv2()
    assert sum(p.numel() for p in net.parameters()) == 2 * stage + later


def test_pyramid_is_blur_and_mean() -> None:
    x = torch.rand(2, 3, 8, 6, dtype=torch.float64)
    taps = torch.tensor([1.0, 4, 6, 4, 1], dtype=torch.float64) / 16
    kernel = torch.outer(taps, taps).expand(3, 1, 5, 5)
    blurred = F.conv2d(F.pad(x, [2] * 4, mode="reflect"), kernel, groups=3)
    expected = F.interpolate(blurred, scale_factor=0.5, mode="bilinear", align_corners=False)
    torch.testing.assert_close(half_size(x), expected)


def test_inversion_gives_the_gradients_of_autograd() -> None:
    plain = small().double()
    with torch.no_grad():  # dividing by small factors loses digits
        for name, parameter in plain.named_parameters():
            if ".alpha" in name:
                parameter.copy_(parameter.sign() * (parameter.abs() + 0.5))
    inverted = DeepRFTv2(**SMALL, memory="invert").double().eval()
    inverted.load_state_dict(plain.state_dict())
    x = torch.rand(1, 3, 8, 16, dtype=torch.float64, requires_grad=True)
    found = []
    for net in (plain, inverted):
        images, mid_images = net(x, all_outputs=True)
        total = torch.stack([(i + 1) * y.sin().sum() for i, y in enumerate(images)]).sum()
        total = total + torch.stack([(i + 2) * y.cos().sum() for i, y in enumerate(mid_images)]).sum()
        found.append((total, *torch.autograd.grad(total, [x, *net.parameters()])))
    largest = max(float(g.detach().abs().max()) for g in found[0])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9 * largest)


def test_inversion_keeps_nothing_of_more_blocks() -> None:
    x = torch.rand(1, 3, 16, 16)

    def kept(memory: str, blocks: int) -> int:
        net = small(stages=1, memory=memory, encoder=(blocks,) * 3, decoder=(blocks,) * 3, estimator=(blocks,) * 4)
        parameters, sizes = {p.untyped_storage().data_ptr() for p in net.parameters()}, {}

        def keep(t: Tensor) -> Tensor:
            if t.untyped_storage().data_ptr() not in parameters:
                sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = net(x)
        assert y.requires_grad
        return sum(sizes.values())

    assert kept("invert", 3) < 1.05 * kept("invert", 1)
    assert kept("store", 3) > 2 * kept("store", 1) > 2 * kept("invert", 1)


def test_one_stage_step_by_step() -> None:
    """States at zero: an ordinary pair of U-Nets, written out."""
    net = small(stages=1)
    of = net._stage(0)
    x = torch.rand(2, 3, 16, 8)
    y = half_size(x)
    level = lambda column, i, *a: of[column].get_submodule(f"level{i}")(*a)  # noqa: E731
    e1 = level("subnets_max", 0, of["patch_embed_maxs"](x))
    e2 = level("subnets_max", 1, e1)
    e3 = level("subnets_max", 2, e2)
    m1 = level("subnets_mid", 0, of["patch_embed_mids"](y), of["down_max1"](e1))
    m2 = level("subnets_mid", 1, m1, of["down_max2"](e2))
    m3 = level("subnets_mid", 2, m2, of["down_max3"](e3))

    def decode(column: str, states: list[Tensor]) -> Tensor:
        alpha = lambda i: of[column].get_parameter(f"alpha{i}")  # noqa: E731
        z = alpha(0) * states[1] + level(column, 0, states[2])
        z = alpha(1) * states[0] + level(column, 1, z)
        return level(column, 2, z)

    dm = decode("subdenets_mid", [m1, m2, m3])
    ky, mid_image, *_ = of["mid_kernel_estimator"](dm, y)
    e3 = of["fusd_max_2"](torch.cat([of["down_mid2max"](ky), e3], 1))
    d = decode("subdenets_max", [e1, e2, e3])
    image = of["kernel_estimator"](d, x)[1]
    images, mid_images = net(x, all_outputs=True)
    for ours, theirs in zip(images, (of["output_maxs"](d) + x, image), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(mid_images, (of["output_mids"](dm) + y, mid_image), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net(x), images[-1])


@pytest.mark.parametrize("options", [{}, {"stages": 1, "estimator_norm": False}, {"estimator": (2, 0, 0, -1)}])
def test_official_files(options: dict[str, Any], tmp_path: Any) -> None:
    net = small(**options, memory="store")
    save_file({f"module.global_model.{n}": t for n, t in net.state_dict().items()}, tmp_path / "net.safetensors")
    loaded = load_official("deeprftv2_base", tmp_path / "net.safetensors")
    x = torch.rand(1, 3, 8, 16)
    assert torch.equal(loaded(x), net(x))
    assert deeprftv2.read_official(net.state_dict())["stages"] == options.get("stages", 2)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"conv": "plain", "expansion": 0.5, "norm": "ortho"},
        {"form": "complex", "expansion": 0.25, "spectral_bias": True},
        {"num_blocks": 0},
    ],
)
def test_first_network_files_and_merged_form(options: dict[str, Any], tmp_path: Any) -> None:
    net = first(**options)
    x = torch.rand(2, 3, 12, 8)
    expected = net(x, all_outputs=True)
    for form in (net.merge(), merge(net, x)):
        assert not any(isinstance(m, DOConv2d) for m in form.modules())
        for ours, theirs in zip(form(x, all_outputs=True), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    save_file({f"module.{n}": t for n, t in net.state_dict().items()}, tmp_path / "training.safetensors")
    known = {n: options[n] for n in ("norm",) if n in options}
    loaded = load_official("deeprft", tmp_path / "training.safetensors", **known)
    torch.testing.assert_close(loaded(x), expected[0])
    folded = {n.replace(".weight", ".W"): t for n, t in net.merge().state_dict().items()}
    kept = [f"feat_extract.{i}.main.0" for i in (3, 4)]
    folded = {(f"{n[:-2]}.weight" if n[:-2] in kept else n): t for n, t in folded.items()}
    if options.get("conv") != "plain" and "form" not in options:
        save_file(folded, tmp_path / "folded.safetensors")
        torch.testing.assert_close(load_official("deeprft", tmp_path / "folded.safetensors")(x), expected[0])


def test_first_network_in_cases_with_folded_kernels() -> None:
    net = first(num_blocks=2).merge()
    x, cotangent = torch.rand(1, 3, 8, 12), torch.randn(1, 3, 8, 12)
    y = net(x, all_outputs=True)
    grad = torch.autograd.grad((y[0] * cotangent).sum(), net.get_parameter("Convs.0.main.0.weight"))[0]
    state = {}
    for name, tensor in net.state_dict().items():
        transposed = name.startswith(("feat_extract.3", "feat_extract.4"))
        state[name if transposed else name.replace(".weight", ".W")] = tensor if transposed else tensor.flatten(2)
    outputs = {n: t.detach() for n, t in zip(("y", "y_scale1", "y_scale2"), y, strict=True)}
    inputs, grads = {"x": x, "cotangent": cotangent}, {"Convs.0.main.0.W": grad}
    case = Case("deeprftv2", "folded", {"inference": True}, "", "eval", "", None, None, state, inputs, outputs, grads)
    assert all(t.passed for t in run_case(case))


@pytest.mark.parametrize(
    "build", [lambda: small(stages=1, encoder=(0, 0, 1), decoder=(0, 0, 1), estimator=(1, 0, 0, 0)), first]
)
def test_forms_and_copies(build: Any) -> None:
    net = build()
    x = torch.rand(2, 3, 8, 16)
    y = net(x)
    assert torch.equal(copy.deepcopy(net)(x), y)
    torch.testing.assert_close(net(x.contiguous(memory_format=torch.channels_last)), y, rtol=1e-4, atol=1e-4)
    half = copy.deepcopy(net).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.float() - y).abs().max() < 0.1 * (1 + y.abs().max())
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(net, (x,), dynamic_shapes={"x": {0: batch}})
    three = torch.rand(3, 3, 8, 16)
    torch.testing.assert_close(exported.module()(three), net(three))
    assert net(torch.rand(0, 3, 8, 16)).shape == (0, 3, 8, 16)


@pytest.mark.parametrize("build", [lambda: small(stages=1, memory="invert"), lambda: DeepRFT(num_blocks=1, width=8)])
def test_training_lowers_the_loss(build: Any) -> None:
    net = build().train()
    sharp = torch.rand(2, 3, 16, 16)
    blurred = F.avg_pool2d(sharp, 3, 1, 1)
    optimiser = torch.optim.AdamW(net.parameters(), 1e-3)
    losses = []
    for _ in range(5):
        loss = net.loss(blurred, sharp)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_loss_by_the_full_transform() -> None:
    y, t = torch.rand(2, 3, 4, 6, dtype=torch.float64), torch.rand(2, 3, 4, 6, dtype=torch.float64)
    magnitudes = torch.fft.fft2(y - t).abs()[..., :4]
    torch.testing.assert_close(spectral_loss(y, t), magnitudes.mean())
    expected = 2 * ((y - t).abs().mean() + 0.1 * magnitudes.mean())
    torch.testing.assert_close(deblur_loss([y, t], [t, y], 0.1), expected)
    assert spectral_loss(y.bfloat16(), t.bfloat16()).dtype == torch.float32
    net = first().double()
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    images = net(x, all_outputs=True)
    sharp = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    by_hand = deblur_loss(images, [sharp, sharp[:, :, ::2, ::2], sharp[:, :, ::4, ::4]])
    torch.testing.assert_close(net.loss(x, sharp), by_hand)


def test_tiles_fade_into_each_other() -> None:
    x = torch.rand(1, 3, 37, 50, dtype=torch.float64)
    for options in ({}, {"tile": 16, "overlap": 5}, {"tile": 12, "overlap": 0}, {"tile": 64}):
        torch.testing.assert_close(restore(lambda t: t, x, 4, **options), x)
    numbers = iter(range(2))
    y = restore(lambda t: torch.full_like(t, next(numbers)), torch.zeros(1, 1, 8, 12), 4, 8, 4)
    expected = torch.tensor([0.0, 0, 0, 0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1]).expand(1, 1, 8, 12)
    torch.testing.assert_close(y, expected)
    net = first()
    padded = F.pad(torch.rand(1, 3, 9, 10), [0, 2, 0, 3], mode="reflect")
    torch.testing.assert_close(net.predict(padded[:, :, :9, :10]), net(padded)[:, :, :9, :10].clamp(0, 1))
    assert small().predict(torch.rand(1, 3, 3, 21), tile=16, overlap=4).shape == (1, 3, 3, 21)


def test_refusals() -> None:
    for build, arguments, match in (
        (DeepRFTv2, {"widths": (4,)}, r"widths=\(4,\)"),
        (DeepRFTv2, {"encoder": (1, 1)}, r"encoder=\(1, 1\)"),
        (DeepRFTv2, {"stages": 3, "decoder": [(1, 1, 1)] * 2}, "decoder="),
        (DeepRFTv2, {"memory": "lose"}, "memory='lose'"),
        (DeepRFTv2, {"estimator": (1, 1)}, "blocks="),
        (DeepRFT, {"width": 6}, "width=6"),
        (DeepRFT, {"in_chans": 20, "width": 8}, "width=8"),
        (DeepRFT, {"conv": "dynamic"}, "conv='dynamic'"),
        (DeepRFT, {"form": "quaternion"}, "form='quaternion'"),
    ):
        with pytest.raises(ValueError, match=match):
            build(**arguments)
    for net, multiple in ((small(), 8), (first(), 4)):
        for size in ((multiple, 2 * multiple + 2), (0, multiple)):
            with pytest.raises(ValueError, match=rf"x of shape .* multiples of {multiple}"):
                net(torch.zeros(1, 3, *size))
        with pytest.raises(ValueError, match="x of shape"):
            net(torch.zeros(1, 2, 16, 16))
        with pytest.raises(ValueError, match="tile=10"):
            net.predict(torch.zeros(1, 3, 16, 16), tile=10)
        with pytest.raises(ValueError, match="overlap=16"):
            net.predict(torch.zeros(1, 3, 16, 16), tile=16, overlap=16)
    with pytest.raises(ValueError, match="targets=1"):
        deblur_loss([torch.zeros(1, 1, 2, 2)] * 2, [torch.zeros(1, 1, 2, 2)])
    with pytest.raises(ValueError, match=r"target\.shape"):
        spectral_loss(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 4))
