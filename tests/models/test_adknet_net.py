"""ADK-Net as a network and the scores of restored images: start, wiring, tiles, counts, training, refusals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv.kernels import adaptive_downscale
from torchconv.models import create_model
from torchconv.models.restore.adknet import ADKNet, classic_kernel
from torchconv.models.restore.scores import luma, psnr, ssim
from torchconv.weights import load, save

TINY: dict[str, Any] = {"width": 6, "blocks": 1, "trunk": 1, "branch": 1}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def build(**options: Any) -> Any:
    """With kernels that depend on the content."""
    net = ADKNet(**{**TINY, **options}).double().eval()
    for generator in net.generators:
        nn.init.normal_(generator["last"].weight, std=0.1)
    return net


def image(*size: int) -> Tensor:
    return torch.rand(*size, dtype=torch.float64)


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_classic_kernels(scale: int) -> None:
    x = image(1, 3, 12 * scale, 16 * scale)
    k = 4 * scale
    taps = classic_kernel("bicubic", k, scale).double()
    kernels = taps[None, None, :, None, None].expand(1, 1, -1, 12, 16)
    expected = F.interpolate(x, (12, 16), mode="bicubic", antialias=True)
    y = adaptive_downscale(x, kernels, scale, normalisation="none")
    inside = (..., slice(3, -3), slice(3, -3))
    torch.testing.assert_close(y[inside], expected[inside], rtol=1e-5, atol=1e-5)
    for k in (scale, scale + 2, 3 * scale):
        net = ADKNet(**TINY, scale=scale, kernel_size=k, normalisation="none", start="area").double()
        torch.testing.assert_close(net(x), F.avg_pool2d(x, scale))
    assert classic_kernel("area", 3 * scale + 1, scale).sum().item() == pytest.approx(1)


@pytest.mark.parametrize("normalisation", ["softmax", "sum", "none"])
@pytest.mark.parametrize("start", ["bicubic", "area"])
def test_starts_as_a_classic_downscaler(normalisation: str, start: str) -> None:
    net = ADKNet(**TINY, scale=2, normalisation=normalisation, start=start).double()
    x = F.interpolate(image(1, 3, 8, 8), size=(32, 32), mode="bicubic")
    expected = F.avg_pool2d(x, 2) if start == "area" else F.interpolate(x, (16, 16), mode="bicubic", antialias=True)
    assert psnr(net(x), expected, crop=2).min() > {("area", "none"): 200}.get((start, normalisation), 31)
    kernels = net.kernels(x)
    torch.testing.assert_close(kernels.sum(2), torch.ones_like(kernels[:, :, 0]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(net(torch.ones_like(x)), torch.ones(1, 3, 16, 16).double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("scale", "size"), [(2, (9, 12)), (3, (7, 11)), (4, (4, 5)), (1, (3, 2))])
def test_written_out(scale: int, size: tuple[int, int]) -> None:
    net, x = build(scale=scale), image(2, 3, *size)

    def conv(layer: Any, t: Tensor) -> Tensor:
        if min(t.shape[2:]) > 1:
            return F.conv2d(F.pad(t, [1] * 4, mode="reflect"), layer.weight, layer.bias)
        t = torch.cat([t, t, t], 2) if t.shape[2] == 1 else F.pad(t, [0, 0, 1, 1], mode="reflect")
        t = torch.cat([t, t, t], 3) if t.shape[3] == 1 else F.pad(t, [1, 1, 0, 0], mode="reflect")
        return F.conv2d(t, layer.weight, layer.bias)

    def block(module: Any, t: Tensor) -> Tensor:
        return t + conv(module.conv2, conv(module.conv1, t).relu())

    h, w = (n // scale for n in size)
    f = block(net.features[1], conv(net.features[0], x))[:, :, : h * scale, : w * scale]
    f = conv(net.reduce[1], F.pixel_unshuffle(f, scale))
    for colour, generator in enumerate(net.generators):
        logits = conv(generator["last"], block(generator["branch"][0], block(generator["trunk"][0], f)))
        torch.testing.assert_close(net.kernels(x)[:, colour], logits.softmax(1))
    torch.testing.assert_close(net(x), adaptive_downscale(x, net.kernels(x), scale, normalisation="none"))
    assert net(x).shape == (2, 3, h, w)


def test_colours_have_generators_of_their_own() -> None:
    net, x = build(), image(1, 3, 8, 8)
    grads = torch.autograd.grad(net(x)[:, 0].sum(), list(net.generators.parameters()), allow_unused=True)
    one = len(grads) // 3
    assert all(g is not None for g in grads[:one])
    assert all(g is None or not g.any() for g in grads[one:])
    shared = build(shared=True)
    assert shared.kernels(x).shape == (1, 1, 36, 4, 4)
    assert shared(x).shape == (1, 3, 4, 4)
    assert build(in_chans=1)(x[:, :1]).shape == (1, 1, 4, 4)


@pytest.mark.parametrize(
    ("name", "settings"), [("tiny", (16, 1, 1, 1)), ("small", (32, 4, 2, 2)), ("base", (64, 8, 4, 4))]
)
@pytest.mark.parametrize("scale", [2, 4])
def test_counts(name: str, settings: tuple[int, ...], scale: int) -> None:
    with torch.device("meta"):
        net: Any = create_model(f"adknet_{name}", scale=scale)
    w, blocks, trunk, branch = settings
    block, taps = 2 * (9 * w * w + w), 9 * scale**2
    ours = 27 * w + w + blocks * block + 9 * w * w * scale**2 + w
    ours += 3 * ((trunk + branch) * block + 9 * w * taps + taps)
    assert sum(p.numel() for p in net.parameters()) == ours


@pytest.mark.parametrize(("scale", "size", "tile"), [(2, (71, 58), 8), (3, (64, 40), 5), (2, (6, 90), 64)])
def test_tiles_are_exact(scale: int, size: tuple[int, int], tile: int) -> None:
    net, x = build(scale=scale), image(1, 3, *size)
    torch.testing.assert_close(net.predict(x, tile), net(x).clamp(0, 1))
    assert torch.equal(net.predict(x, None), net(x).clamp(0, 1))
    inner = net.reach * scale * 2 + scale
    probe = image(1, 3, inner, inner).requires_grad_()  # one pixel sees no farther than the reach
    centre = inner // scale // 2
    seen = torch.autograd.grad(net(probe)[0, 0, centre, centre], probe)[0].abs().sum((0, 1, 2)).nonzero().flatten()
    assert (centre - net.reach) * scale <= seen.min()
    assert seen.max() < (centre + net.reach + 1) * scale


def test_learns_and_is_kept(tmp_path: Any) -> None:
    net = ADKNet(**TINY, scale=2)
    x = torch.rand(2, 3, 16, 16)
    target = F.avg_pool2d(x, 2)
    optimiser = torch.optim.Adam(net.parameters(), 1e-3)
    losses = []
    for _ in range(5):
        loss = F.l1_loss(net(x), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    net = create_model("adknet_tiny", width=4).eval()
    save(net, tmp_path / "net.safetensors")
    assert torch.equal(load(tmp_path / "net.safetensors")(x), net(x))
    assert torch.equal(copy.deepcopy(net)(x), net(x))
    torch.testing.assert_close(net(x.contiguous(memory_format=torch.channels_last)), net(x), rtol=1e-4, atol=1e-5)
    half = copy.deepcopy(net).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.float() - net(x)).abs().max() < 0.03
    exported = torch.export.export(net, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=1, max=64)}})
    many = torch.rand(5, 3, 16, 16)
    torch.testing.assert_close(exported.module()(many), net(many), rtol=1e-4, atol=1e-5)


def test_scores() -> None:
    y, t = image(2, 3, 20, 24), image(2, 3, 20, 24)
    torch.testing.assert_close(psnr(y, t, crop=3), -10 * (y - t)[..., 3:-3, 3:-3].square().mean((1, 2, 3)).log10())
    torch.testing.assert_close(psnr(255 * y, 255 * t, peak=255), psnr(y, t))
    assert torch.isinf(psnr(y, y)).all()
    assert (255 * luma(torch.zeros(1, 3, 1, 1))).item() == pytest.approx(16)
    torch.testing.assert_close(psnr(y, t, on_luma=True), psnr(luma(y), luma(t)))
    taps = torch.exp(-0.5 * ((torch.arange(11.0).double() - 5) / 1.5) ** 2)
    window = torch.outer(taps, taps) / taps.sum() ** 2
    for crop in (0, 2):
        a, b = (z[..., crop : 20 - crop, crop : 24 - crop].flatten(0, 1)[:, None] for z in (y, t))
        mean = lambda z: F.conv2d(z, window[None, None])  # noqa: E731
        ma, mb = mean(a), mean(b)
        covariance = mean(a * b) - ma * mb
        variances = mean(a * a) - ma**2 + mean(b * b) - mb**2
        one, two = 0.01**2, 0.03**2
        found = (2 * ma * mb + one) * (2 * covariance + two) / ((ma**2 + mb**2 + one) * (variances + two))
        torch.testing.assert_close(
            ssim(y, t, crop), found.unflatten(0, (2, 3)).mean((1, 2, 3, 4)), rtol=1e-5, atol=1e-6
        )
    assert ssim(y[:1], t[:1]).shape == (1,)
    torch.testing.assert_close(ssim(y, t, on_luma=True), ssim(luma(y), luma(t)))


def test_refusals() -> None:
    for options, match in (
        ({"scale": 0}, "scale=0"),
        ({"start": "lanczos"}, "start='lanczos'"),
        ({"normalisation": "l1"}, "normalisation='l1'"),
        ({"branch": -1}, "branch=-1"),
        ({"kernel_size": 0}, "kernel_size=0"),
    ):
        with pytest.raises(ValueError, match=match):
            ADKNet(**{**TINY, **options})
    net = build(scale=4)
    for call in (net, net.predict):
        with pytest.raises(ValueError, match="at least scale=4"):
            call(image(1, 3, 3, 8))
        with pytest.raises(ValueError, match="x of shape"):
            call(image(1, 4, 8, 8))
    with pytest.raises(ValueError, match="tile=0"):
        net.predict(image(1, 3, 8, 8), tile=0)
    y = image(1, 3, 12, 12)
    for call, match in (
        (lambda: psnr(y, y[..., :4]), r"target\.shape"),
        (lambda: psnr(y, y, crop=6), "crop=6"),
        (lambda: ssim(y, y, crop=1), r"crop=1.*11 × 11"),
        (lambda: psnr(y[:, :1], y[:, :1], on_luma=True), "expected RGB"),
        (lambda: psnr(y, y, peak=0), "peak=0"),
        (lambda: ssim(y, y, on_luma=True, peak=255), "peak=255"),
        (lambda: psnr(y[0], y[0]), r"y\.shape"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
