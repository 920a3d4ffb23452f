"""SegNet and SegNet-Basic: published counts, every decoder, statistics for inference, weights, a small real job."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from torchconv.analysis.count import count
from torchconv.models import create_model, list_models
from torchconv.models.segment.segnet import DECODERS, SegNet, SegNetBasic, convert_official, local_response_norm
from torchconv.surgery import merge
from torchconv.training import param_groups
from torchconv.training.segmentation import ConfusionMatrix, median_frequency_weights, weighted_cross_entropy
from torchconv.weights import load, load_official, save

SMALL = {SegNet: {"divisor": 24}, SegNetBasic: {"width": 6, "kernel_size": 5, "depth": 3}}
NETS = pytest.mark.parametrize("build", list(SMALL), ids=lambda b: b.__name__)


def make(build, decoder="unpool", classes=4, **options):
    torch.manual_seed(0)
    net = build(classes, decoder, **{**SMALL[build], **options})
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net.eval()


def images(*shape, scale=30.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "options", "parameters", "gigamacs"),
    [
        ("segnet", {}, 29_449_355, 106.7),
        ("segnet_basic", {}, 1_416_587, 59.2),
        # The paper gives 0.625 and 0.65 million.
        ("segnet_basic", {"decoder": "single-channel"}, 626_315, 13.8),
        ("segnet_basic", {"decoder": "fcn"}, 646_839, 13.6),
        ("segnet_basic", {"decoder": "unpool+add"}, 1_416_587, 59.2),
    ],
)
def test_published_counts(name, options, parameters, gigamacs):
    with torch.device("meta"):
        net = create_model(name, **options).eval()
    counts = count(net, torch.empty(1, 3, 360, 480, device="meta"))
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert counts.macs / 1e9 == pytest.approx(gigamacs, abs=0.05)
    assert net.torchconv_config == {"model": name, "options": options}
    assert {"segnet", "segnet_basic"} <= set(list_models(task="segment"))


def test_as_many_convolutions_up_as_down():
    with torch.device("meta"):
        nets = SegNet(), SegNetBasic()
    names = [[n for n, m in net.named_children() if isinstance(m, nn.Conv2d)] for net in nets]
    assert [sum(n.endswith("_D") for n in names[0]), len(names[0])] == [13, 26]
    assert names[1][4:] == ["conv_decode4", "conv_decode3", "conv_decode2", "conv_decode1", "conv_classifier"]
    assert not hasattr(nets[0], "conv1_1_D_bn")


@NETS
@pytest.mark.parametrize("decoder", DECODERS)
def test_decoders(build, decoder):
    net = make(build, decoder)
    x = images(2, 3, 23, 29)
    with torch.no_grad():
        y = net(x)
        assert y.shape == (2, 4, 23, 29)
        assert torch.allclose(net.merge()(x), y, rtol=1e-5, atol=1e-5 * float(y.abs().max()))
        assert not any(isinstance(m, nn.BatchNorm2d) for m in net.merge().modules())
        last = net.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
        assert torch.allclose(last, y, rtol=1e-4, atol=1e-5 * float(y.abs().max()))
        assert last.is_contiguous(memory_format=torch.channels_last)
        half = copy.deepcopy(net).bfloat16()(x.bfloat16())
        assert half.dtype == torch.bfloat16
        assert half.isfinite().all()
        assert net(x[:0]).shape == (0, 4, 23, 29)
        assert net(x[:, :, :1, :3]).shape == (2, 4, 1, 3)
        others = [make(build, other)(x) for other in DECODERS if other != decoder]
        assert all((other - y).abs().max() > 1e-3 for other in others)


@NETS
def test_unpooled_layers_as_pytorch_computes_them(build):
    """The same network with PyTorch's indices, from the parameters and the published layer list."""
    net = make(build)
    x = z = images(2, 3, 21, 26)

    def layer(name, z, relu):
        conv, bn = net.get_submodule(name), net.get_submodule(f"{name}_bn")
        z = F.conv2d(z, conv.weight, conv.bias, padding=conv.weight.shape[-1] // 2)
        z = F.batch_norm(z, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=1e-9)
        return F.relu(z) if relu else z

    if build is SegNet:
        counts = [2, 2, 3, 3, 3]
        down = [[f"conv{s}_{i}" for i in range(1, n + 1)] for s, n in enumerate(counts, 1)]
        up = [[f"conv{s}_{i}_D" for i in range(n, 0, -1)] for s, n in enumerate(counts, 1)]
    else:
        z = F.local_response_norm(z, 5, 1e-4, 0.75, 1.0)
        down, up = [[f"conv{s}"] for s in (1, 2, 3)], [[f"conv_decode{s}"] for s in (1, 2, 3)]
        up[0].append("conv_classifier")
    kept = []
    for names in down:
        for name in names:
            z = layer(name, z, True)
        size = z.shape
        z, index = F.max_pool2d(z, 2, ceil_mode=True, return_indices=True)
        kept.append((index, size))
    classifier = net.get_submodule(up[0].pop())
    for names, (index, size) in zip(reversed(up), reversed(kept), strict=True):
        z = F.max_unpool2d(z, index, 2, output_size=size)
        for name in names:
            z = layer(name, z, build is SegNet)
    z = classifier(z)
    with torch.no_grad():
        assert torch.allclose(net(x), z, rtol=1e-4, atol=1e-5 * float(z.abs().max()))


def test_transposed_convolutions_begin_bilinear():
    net = make(SegNetBasic, "fcn")
    y = torch.randn(1, 4, 9, 7)
    up = net.upscore2(y)
    wanted = F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=False)
    assert up.shape == wanted.shape
    assert torch.allclose(up[..., 2:-2, 2:-2], wanted[..., 2:-2, 2:-2], atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3, 9])
def test_local_response_norm_equals_pytorch(channels):
    x = images(2, channels, 5, 4, scale=100.0)
    assert torch.allclose(local_response_norm(x), F.local_response_norm(x, 5, 1e-4, 0.75, 1.0), rtol=1e-5)


def test_calibration():
    net, batches = make(SegNetBasic), [images(2, 3, 24, 32), 0.5 * images(2, 3, 24, 32) + 3]
    seen = []
    net.conv2_bn.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    net.calibrate_bn([(x, "labels") for x in batches])
    assert not net.training
    averages = [torch.stack([f(z) for z in seen]).mean(0) for f in (lambda z: z.mean((0, 2, 3)), variance)]
    assert torch.allclose(net.conv2_bn.running_mean, averages[0], rtol=1e-4, atol=1e-5)
    assert torch.allclose(net.conv2_bn.running_var, averages[1], rtol=1e-4)
    assert net.conv2_bn.momentum == 0.1
    with pytest.raises(ValueError, match="loader"):
        net.calibrate_bn([])


def variance(z):
    """With m/(m − 1)."""
    return z.var((0, 2, 3))


def test_calibrated_on_one_batch_it_gives_what_training_gives():
    net, x = make(SegNet), images(4, 3, 64, 64)  # 16 pixels a channel before the last pooling
    net.double().train()
    trained = net(x.double())
    net.calibrate_bn([x.double()])
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.training
    sizes = {n: m for n, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
    pixels = {}
    for name, norm in sizes.items():
        norm.register_forward_pre_hook(lambda _, given, name=name: pixels.update({name: given[0][:, 0].numel()}))
    net.eval()(x.double())
    for name, norm in sizes.items():
        norm.running_var *= (pixels[name] - 1) / pixels[name]
    assert torch.allclose(net(x.double()), trained, rtol=1e-6, atol=1e-8)


@NETS
def test_official_file(build, tmp_path):
    """Layers by their official names, norms as scale and shift of Caffe's shapes."""
    net = make(build, classes=6)
    folded = {}
    for name, module in net.named_children():
        if isinstance(module, nn.BatchNorm2d):
            scale = module.weight / torch.sqrt(module.running_var + 1e-9)
            shift = module.bias - scale * module.running_mean
            folded[f"{name}.scale"] = scale.detach().reshape(1, -1, 1, 1).clone()
            folded[f"{name}.shift"] = shift.detach().reshape(1, -1, 1, 1).clone()
        else:
            folded[f"{name}.weight"] = module.weight.detach().clone()
            folded[f"{name}.bias"] = module.bias.detach().reshape(1, 1, 1, -1).clone()
    save_file(folded, tmp_path / "official.safetensors")
    official = load_official("segnet" if build is SegNet else "segnet_basic", tmp_path / "official.safetensors")
    assert official.load_report.complete
    assert not official.training
    x = images(1, 3, 33, 40)
    with torch.no_grad():
        y = net(x)
        assert torch.allclose(official(x), y, rtol=1e-4, atol=1e-5 * float(y.abs().max()))
    own = net.state_dict()
    assert all(torch.equal(t, own[n]) for n, t in convert_official(own).items())


def test_files_that_do_not_fit(tmp_path):
    path = tmp_path / "net.safetensors"
    save_file({"features.0.weight": torch.ones(4, 3, 3, 3)}, path)
    with pytest.raises(ValueError, match="neither conv1_1"):
        load_official("segnet", path)
    save_file({"conv1.weight": torch.ones(4, 3, 7, 7)}, path)
    with pytest.raises(ValueError, match=r"conv1\.bias"):
        load_official("segnet_basic", path)


@pytest.mark.parametrize("decoder", ["single-channel", "fcn"])
@NETS
def test_own_file_says_which_decoder(build, decoder, tmp_path):
    net = make(build, decoder)
    torch.save({"state_dict": net.state_dict()}, tmp_path / "net.pth")
    again = load_official("segnet" if build is SegNet else "segnet_basic", tmp_path / "net.pth")
    assert again.decoder == decoder
    x = images(1, 3, 17, 20)
    assert torch.equal(again(x), net(x))


def test_saved_and_merged_by_surgery(tmp_path):
    net = create_model("segnet_basic", num_classes=4, width=5, kernel_size=3, depth=2).eval()
    x = images(2, 3, 18, 21)
    save(net, tmp_path / "net")
    again = load(tmp_path / "net").eval()
    assert torch.equal(again(x), net(x))
    merged = merge(net, x)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in merged.modules())
    assert torch.allclose(merged(x), net(x), rtol=1e-4, atol=1e-4)
    assert torch.equal(copy.deepcopy(net)(x), net(x))


def test_export_with_a_dynamic_batch():
    net, x = make(SegNetBasic), images(2, 3, 31, 40)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=1, max=8)},))
    assert torch.allclose(program.module()(x[:1]), net(x[:1]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norms", [False, True])
def test_encoder_from_vgg16(norms):
    from torchvision.models.vgg import make_layers

    widths = [2, 2, "M", 5, 5, "M", 10, 10, 10, "M", 21, 21, 21, "M", 21, 21, 21, "M"]
    features = make_layers(widths, batch_norm=norms)
    net = make(SegNet)
    net.load_vgg16({f"features.{n}": t for n, t in features.state_dict().items()})
    theirs = [m for m in features if isinstance(m, nn.Conv2d)]
    ours = [m for n, m in net.named_children() if isinstance(m, nn.Conv2d) and not n.endswith("_D")]
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(ours, theirs, strict=True))
    assert all(torch.equal(a.bias, b.bias) for a, b in zip(ours, theirs, strict=True))
    with pytest.raises(ValueError, match="13 convolutions"):
        net.load_vgg16(make_layers([2, 2, "M"]).state_dict())


def test_initialisation_and_rates():
    net = SegNetBasic(4, width=32)
    assert float(net.conv2.weight.detach().std()) == pytest.approx((2 / (32 * 49)) ** 0.5, rel=0.02)
    assert (net.conv2_bn.bias == 0.001).all()
    assert (net.conv2.bias == 0).all()
    groups = {g["lr_mult"]: g for g in param_groups(net, 0.1, 5e-4) if g["lr_mult"] != 1}
    assert len(groups[2.0]["params"]) == 9
    assert groups[2.0]["weight_decay"] == 0


def test_bad_arguments():
    for build, options, message in (
        (SegNet, {"decoder": "unpol"}, "decoder='unpol': did you mean unpool"),
        (SegNet, {"divisor": 0}, "divisor=0"),
        (SegNet, {"num_classes": 0}, "num_classes=0"),
        (SegNetBasic, {"width": -1}, "width=-1"),
        (SegNetBasic, {"kernel_size": 4}, "kernel_size=4: must be odd"),
        (SegNetBasic, {"depth": 0}, "depth=0"),
        (SegNetBasic, {"in_chans": 0}, "in_chans=0"),
    ):
        with pytest.raises(ValueError, match=message):
            build(**options)
    with pytest.raises(ValueError, match=r"expected \(N, 3, H, W\)"):
        make(SegNet)(torch.zeros(1, 1, 32, 32))
    with pytest.raises(ValueError, match="no pixels"):
        make(SegNet)(torch.zeros(1, 3, 0, 32))


def fit(net, x, y, weight, steps, lr, batch):
    """SGD on random pieces; the losses."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(param_groups(net.train(), lr, 5e-4), lr=lr, momentum=0.9)
    losses = []
    for _ in range(steps):
        chosen = torch.randperm(len(x), generator=generator)[:batch]
        loss = weighted_cross_entropy(net(x[chosen]), y[chosen], weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def mean_iou(net, x, y, classes):
    confusion = ConfusionMatrix(classes)
    with torch.no_grad():
        confusion.update(net.eval()(x).argmax(1), y)
    return confusion.scores().mean_iou


def shapes(number, seed):
    """Two squares and a disc of other colours on a background, 24 × 24, with noise."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.arange(24).reshape(1, -1, 1), torch.arange(24).reshape(1, 1, -1)
    y = torch.zeros(number, 24, 24, dtype=torch.long)
    for kind in (1, 2, 3):
        centre = torch.randint(5, 19, (2, number, 1, 1), generator=generator)
        down, right = (rows - centre[0]).abs(), (columns - centre[1]).abs()
        inside = down**2 + right**2 <= 20 if kind == 3 else torch.maximum(down, right) <= 3
        y[inside] = kind
    colours = torch.tensor([[0.2, 0.2, 0.2], [0.9, 0.4, 0.2], [0.2, 0.9, 0.4], [0.3, 0.3, 0.9]])
    x = colours[y].permute(0, 3, 1, 2) + 0.25 * torch.randn(number, 3, 24, 24, generator=generator)
    return x, y


def test_learns_shapes():
    (x, y), (xt, yt) = shapes(120, 0), shapes(40, 1)
    torch.manual_seed(0)
    net = SegNetBasic(4, width=8, kernel_size=5, depth=2, lrn=False)
    losses = fit(net, x, y, median_frequency_weights(y, 4), 50, 0.1, 16)
    assert losses[-1] < 0.5 * losses[0]
    net.calibrate_bn(x.split(16))
    assert mean_iou(net, xt, yt, 4) > 0.55


def test_learns_street_scenes():
    root = Path(os.environ.get("TORCHCONV_DATA", "")) / "camvid_small" / "camvid_240x180.npz"
    if not root.is_file():
        pytest.skip("put camvid_small below a folder and name it with TORCHCONV_DATA")
    data = np.load(root)
    step = slice(None, None, 3)  # 60 × 80 pixels

    def read(part, number):
        x = torch.from_numpy(data[f"x_{part}"][:: len(data[f"x_{part}"]) // number, step, step, ::-1].copy())
        y = torch.from_numpy(data[f"y_{part}"][:: len(data[f"y_{part}"]) // number, step, step].copy())
        return x.permute(0, 3, 1, 2).float(), y.long()

    (x, y), (xt, yt) = read("train", 20), read("test", 10)
    torch.manual_seed(0)
    net = SegNetBasic(11, width=8, depth=3)
    losses = fit(net, x, y, None, 40, 0.1, 4)
    assert losses[-1] < 0.6 * losses[0]
    net.calibrate_bn(x.split(4))
    most_frequent = torch.full_like(yt, int(torch.bincount(y[y < 11]).argmax()))
    baseline = ConfusionMatrix(11)
    baseline.update(most_frequent, yt)
    assert mean_iou(net, xt, yt, 11) > 1.5 * baseline.scores().mean_iou
