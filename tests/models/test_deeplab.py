"""DeepLab's networks in use: official checkpoints, multipliers, losses, a start from VGG-16, labels of images."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from torchconv.models import create_model
from torchconv.models.segment.crf import DenseCRF
from torchconv.models.segment.deeplab import DeepLabResNet, DeepLabVGG, MultiScale
from torchconv.models.segment.deeplab_recipe import (
    label_probabilities,
    multi_scale_loss,
    score_loss,
)
from torchconv.training.optim import param_groups
from torchconv.weights import load_official


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def small(kind: str) -> Any:
    if kind == "vgg":
        return DeepLabVGG(3, (1, 2), divisor=32, dropout=0.0)
    return DeepLabResNet(3, (1, 1, 1, 1), (1, 2), base=4)


@pytest.mark.parametrize("prefix", ["", "base."])
def test_official_resnet(tmp_path: Path, prefix: str) -> None:
    net = DeepLabResNet(7, (1, 2, 1, 1), base=4, in_chans=4).eval()
    save_file({prefix + n: t for n, t in net.state_dict().items()}, tmp_path / "net.safetensors")
    loaded = load_official("deeplab_resnet101", tmp_path / "net.safetensors")
    x = torch.randn(1, 4, 41, 33)
    assert torch.equal(loaded(x), net(x))
    assert torch.equal(MultiScale(loaded)(x), MultiScale(net)(x))


@pytest.mark.parametrize(
    ("name", "rates", "layer"),
    [
        ("deeplab_vgg16_aspp", (6, 12, 18, 24), "fc8_pascal_context_{}"),
        ("deeplab_vgg16_aspp_s", (2, 4, 8, 12), "fc8_voc12_{}"),
        ("deeplab_vgg16_largefov", (12,), "fc8_voc12"),
    ],
)
def test_official_vgg(tmp_path: Path, name: str, rates: tuple[int, ...], layer: str) -> None:
    net = DeepLabVGG(5, rates, divisor=32).eval()
    state = {}
    for ours, tensor in net.state_dict().items():
        part, _, rest = ours.removeprefix("head.").partition(".")
        fc, _, branch = part.partition("_")
        plain = {"fc6": "fc6", "fc7": "fc7", "fc8": layer} if len(rates) == 1 else {"fc8": layer}
        state[f"{plain.get(fc, part).format(branch)}.{rest}"] = tensor
    save_file(state, tmp_path / "net.safetensors")
    loaded = load_official(name, tmp_path / "net.safetensors")
    x = torch.randn(1, 3, 33, 49)
    assert torch.equal(loaded(x), net(x))


def test_named_networks_have_the_published_sizes() -> None:
    counts = {
        "resnet101": 44_048_532,
        "vgg16_aspp": 37_877_652,
        "vgg16_aspp_s": 37_877_652,
        "vgg16_largefov": 20_505_429,
    }
    for name, count in counts.items():
        with torch.device("meta"):
            net = create_model(f"deeplab_{name}").eval()
            assert sum(p.numel() for p in net.parameters()) == count
            assert net(torch.zeros(1, 3, 321, 321)).shape == (1, 21, 41, 41)
    with torch.device("meta"):
        assert sum(p.numel() for p in create_model("deeplab_vgg16_largefov", num_classes=2).parameters()) < count


def test_multipliers_of_learning_rates() -> None:
    net = small("resnet")
    of = {id(p): g["lr_mult"] for g in param_groups(net, 1.0, 0.1) for p in g["params"]}
    assert of[id(net.aspp.c1.weight)] == 10
    assert of[id(net.aspp.c1.bias)] == 20
    assert of[id(net.layer1.conv1.bn.weight)] == 0
    assert of[id(net.layer1.conv1.conv.weight)] == 1
    vgg = small("vgg")
    of = {id(p): g["lr_mult"] for g in param_groups(MultiScale(vgg), 1.0, 0.1) for p in g["params"]}
    layers = (vgg.conv1_1, vgg.head.fc6_2, vgg.head.fc8_2)
    assert [(of[id(m.weight)], of[id(m.bias)]) for m in layers] == [(1, 2), (1, 2), (10, 20)]
    learning = DeepLabResNet(3, (1, 1, 1, 1), base=2, freeze_bn=False)
    assert not any(".bn." in name for name in learning.param_options())


@pytest.mark.parametrize("kind", ["vgg", "resnet"])
def test_networks_train_as_published(kind: str) -> None:
    net = MultiScale(small(kind)) if kind == "resnet" else small(kind)
    x = torch.randn(2, 3, 33, 41)
    labels = torch.randint(3, (2, 33, 41))
    labels[:, :9] = 255
    optimizer = torch.optim.SGD(param_groups(net, 2e-3 if kind == "vgg" else 1e-5, 5e-4), momentum=0.9)
    poly = torch.optim.lr_scheduler.PolynomialLR(optimizer, 6, power=0.9)
    first = optimizer.param_groups[0]["lr"]
    losses = []
    for step in range(6):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(first * (1 - step / 6) ** 0.9)
        loss = multi_scale_loss(net.logits(x), labels) if kind == "resnet" else score_loss(net(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        poly.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", ["vgg", "resnet"])
def test_networks_export_copy_and_keep_types(kind: str) -> None:
    net = small(kind).eval()
    x = torch.randn(2, 3, 33, 41)
    y = net(x)
    exported = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)).module()
    torch.testing.assert_close(exported(x.repeat(2, 1, 1, 1)), y.repeat(2, 1, 1, 1), rtol=1e-4, atol=1e-5)
    assert torch.equal(copy.deepcopy(net)(x), y)
    last = net.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, y, rtol=1e-4, atol=1e-5)
    half = net.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.float() - y).abs().max() < 0.1 * y.abs().max() + 0.05


def test_losses() -> None:
    logits, labels = torch.randn(2, 4, 5, 6), torch.randint(4, (2, 33, 41))
    labels[0, :20, :20] = 255
    expected = F.cross_entropy(logits, labels[:, ::8, ::8], ignore_index=255)
    torch.testing.assert_close(score_loss(logits, labels), expected)
    assert score_loss(logits, torch.full_like(labels, 255)) == 0
    # Blocks of equal labels survive a resize.
    blocks = torch.randint(4, (2, 5, 6))
    whole = blocks.repeat_interleave(8, 1).repeat_interleave(8, 2)
    maps = [logits, 2 * logits]
    wanted = sum(F.cross_entropy(m, blocks) for m in maps)
    torch.testing.assert_close(multi_scale_loss(maps, whole), wanted)
    with pytest.raises(ValueError, match=r"shape of the labels=\(2, 48, 48\).*8n \+ 1"):
        score_loss(logits, torch.zeros(2, 48, 48, dtype=torch.long))
    with pytest.raises(ValueError, match="maps"):
        multi_scale_loss([], labels)
    with pytest.raises(ValueError, match="shape of the labels"):
        multi_scale_loss(maps, labels[:1])
    with pytest.raises(ValueError, match="stride=0"):
        score_loss(logits, labels, 0)


def test_start_from_a_classifier() -> None:
    """Parameters that say where they come from."""
    from torchvision.models import vgg16

    with torch.device("meta"):
        state = dict(vgg16().state_dict())
    for n, t in state.items():
        if n.startswith("features."):
            state[n] = torch.full(t.shape, float(n.split(".")[1]))
    number = torch.arange(4096.0)
    taps = torch.arange(49.0) / 100
    state["classifier.0.weight"] = (number[:8, None, None] + taps).expand(8, 512, 49).flatten(1).repeat(512, 1)
    state["classifier.0.bias"], state["classifier.3.bias"] = number, -number
    state["classifier.3.weight"] = number[:, None].expand(4096, 4096)
    with torch.device("meta"):
        net = DeepLabVGG(2, (12,))
    net.to_empty(device="cpu")
    net.load_vgg16(state)
    assert [net.get_parameter(f"conv{n}.weight").detach().unique().tolist() for n in ("1_1", "3_2", "5_3")] == [
        [0],
        [12],
        [28],
    ]
    picked = net.head.fc6_1.bias.detach()
    assert (picked[0], picked[-1], len(picked.unique())) == (0, 4095, 1024)
    expected = (picked[:, None] % 8 + torch.tensor([0, 3, 6, 21, 24, 27, 42, 45, 48]) / 100).view(1024, 1, 3, 3)
    torch.testing.assert_close(net.head.fc6_1.weight.detach(), expected.expand(-1, 512, -1, -1))
    torch.testing.assert_close(net.head.fc7_1.weight.detach()[:, 5, 0, 0], picked)
    with pytest.raises(ValueError, match="divisor 1"):
        DeepLabVGG(2, divisor=32).load_vgg16(state)
    with pytest.raises(ValueError, match="vgg16"):
        net.load_vgg16({n: t for n, t in state.items() if "classifier.3" not in n})


def test_labels_of_images() -> None:
    net = small("vgg").eval()
    image = torch.randint(256, (2, 3, 33, 41), dtype=torch.uint8)
    x = image.float() / 128 - 1
    plain = label_probabilities(net, x)
    torch.testing.assert_close(plain[..., ::8, ::8], net(x).softmax(1))
    for log in (False, True):
        sharp = label_probabilities(net, x, DenseCRF(3, iterations=2, log=log), image)
        torch.testing.assert_close(sharp.sum(1), torch.ones(2, 33, 41))
    for options in ({"crf": DenseCRF(3)}, {"image": image}):
        with pytest.raises(ValueError, match="give both"):
            label_probabilities(net, x, **options)


@pytest.mark.parametrize("scales", [(), (0.5,), (0.75, 1.5, 0.5)])
def test_fusion_is_the_maximum(scales: tuple[float, ...]) -> None:
    class Mean(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.avg_pool2d(x, 4)

    x = torch.randn(1, 2, 37, 29)
    maps = MultiScale(Mean(), scales).logits(x)
    assert len(maps) == len(scales) + 2
    for scale, scored in zip(scales, maps[1:-1], strict=True):
        assert scored.shape[2:] == (int(37 * scale) // 4, int(29 * scale) // 4)
        assert (maps[-1] >= F.interpolate(scored, size=maps[0].shape[2:], mode="bilinear")).all()
