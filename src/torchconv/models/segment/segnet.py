"""SegNet and SegNet-Basic: an encoder, and a decoder that puts values back where the encoder's maxima were.

Badrinarayanan, Kendall, Cipolla 2015, arXiv 1511.00561. Every pooling of the encoder has its unpooling in the decoder,

    x ← relu(bn(conv(x))), (x, o_s) ← pool(x)        for stages s = 1 … S
    x ← conv(unpool(x, o_s)) with bn (SegNet: and relu)  for stages s = S … 1,

so that logits come out at the size of the image, odd sizes included. SegNet mirrors the 13 convolutions of VGG-16
(29,449,355 parameters for 11 classes, 106.7 GMAC at 360 × 480), SegNet-Basic has four of 7 × 7 and 64 channels on each
side (1,416,587, 59.2 GMAC). The original images are BGR from 0 to 255. Layers have their official names; the official
scale and shift are the batch norms' weight and bias, see :func:`convert_official`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive
from torchconv.catalog import part
from torchconv.kernels.precision import widen
from torchconv.models._registry import register_model
from torchconv.ops._common import check_input, fold_bn
from torchconv.ops.segnet import index_pool, index_unpool

DECODERS = ("unpool", "unpool+add", "single-channel", "bilinear", "fcn")


def local_response_norm(x: Tensor, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    """x / (k + α/size · Σ x²)^β, the sum over the ``size`` channels around each; in single precision at least.

    :func:`torch.nn.functional.local_response_norm` gives the same, but not in bfloat16 on a CPU.

    Example:
        >>> x = torch.tensor([[[[100.0]], [[200.0]]]])
        >>> torch.allclose(local_response_norm(x), F.local_response_norm(x, 5))
        True
    """
    wide = widen(x)
    squares = F.pad(wide.square(), (0, 0, 0, 0, size // 2, (size - 1) // 2))
    channels = x.shape[1]
    total = torch.stack([squares[:, i : i + channels] for i in range(size)]).sum(0)
    return (wide / (k + alpha / size * total) ** beta).to(x.dtype)


class EncoderDecoder(nn.Module):
    """What SegNet and SegNet-Basic share: layers by name, stages of the encoder, and the ways back up.

    Batch norms normalise by the batch in training; for inference :meth:`calibrate_bn` collects exact averages over
    the training set, as the authors do, in place of the running ones.
    """

    decoder_relu = False
    lrn = False

    def __init__(self, num_classes: int, in_chans: int, decoder: str) -> None:
        super().__init__()
        check_positive("num_classes", num_classes)
        check_positive("in_chans", in_chans)
        check_choice("decoder", decoder, DECODERS)
        self.num_classes, self.in_chans, self.decoder = num_classes, in_chans, decoder
        self._encoder: list[list[str]] = []
        self._decoder: list[list[str]] = []  # by stage; the last layer of the first is the classifier

    def _build(self, encoder: list[dict[str, int]], decoder: list[dict[str, int]], kernels: tuple[int, int]) -> None:
        """Layers of each stage by name, with their widths; kernels of all and of the classifier."""
        channels, widths = self.in_chans, []
        for stage in encoder:
            for name, width in stage.items():
                self._add(name, channels, width, kernels[0])
                channels = width
            self._encoder.append(list(stage))
            widths.append(channels)
        if self.decoder == "fcn":
            self._add_deconvolutions(widths)
            return
        classifier = list(decoder[0])[-1]
        for stage in reversed(decoder):
            for name, width in stage.items():
                last = name == classifier
                alone = self.decoder == "single-channel" and not last
                groups = math.gcd(channels, width) if alone else 1
                self._add(name, channels, width, kernels[last], groups, norm=not last)
                channels = width
            self._decoder.insert(0, list(stage))

    def _add(self, name: str, channels: int, width: int, kernel: int, groups: int = 1, norm: bool = True) -> None:
        """A convolution of He's initialisation and its batch norm."""
        conv = nn.Conv2d(channels, width, kernel, padding=kernel // 2, groups=groups)
        nn.init.kaiming_normal_(conv.weight)
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        self.add_module(name, conv)
        if norm:
            bn = nn.BatchNorm2d(width, eps=1e-9)
            nn.init.constant_(bn.bias, 0.001)
            self.add_module(f"{name}_bn", bn)

    def _add_deconvolutions(self, widths: list[int]) -> None:
        """Scores of every stage's map and of the last pooling's, and transposed convolutions that begin bilinear."""
        line = F.pad(torch.tensor([0.25, 0.75, 0.75, 0.25]), (2, 2))
        for stage, width in enumerate(widths, 1):
            self._add(f"score{stage}", width, self.num_classes, 1, norm=False)
            up = nn.ConvTranspose2d(self.num_classes, self.num_classes, 8, 2, 3, bias=False)
            with torch.no_grad():
                nn.init.zeros_(up.weight)
                up.weight[range(self.num_classes), range(self.num_classes)] = torch.outer(line, line).to(up.weight)
            self.add_module(f"upscore{stage}", up)
        self._add("score_pool", widths[-1], self.num_classes, 1, norm=False)

    def _layer(self, name: str, x: Tensor, relu: bool) -> Tensor:
        x = getattr(self, f"{name}_bn")(getattr(self, name)(x))
        return F.relu(x) if relu else x

    def forward(self, x: Tensor) -> Tensor:
        """Logits at the size of the image."""
        check_input(x, self.in_chans, 2)
        check(min(x.shape[2:]) > 0, "x.shape", tuple(x.shape), "has no pixels")
        if self.lrn:
            x = local_response_norm(x)
        places: list[Tensor] = []
        maps: list[Tensor] = []
        sizes: list[torch.Size] = []
        for names in self._encoder:
            for name in names:
                x = self._layer(name, x, relu=True)
            sizes.append(x.shape[2:])
            if self.decoder in ("unpool+add", "fcn"):
                maps.append(x)
            if self.decoder in ("bilinear", "fcn"):
                x = F.max_pool2d(x, 2, ceil_mode=True)
            else:
                x, offsets = index_pool(x)
                places.append(offsets)
        if self.decoder == "fcn":
            return self._deconvolve(x, maps)
        for stage in reversed(range(len(sizes))):
            if self.decoder == "bilinear":
                x = F.interpolate(x, size=sizes[stage], mode="bilinear", align_corners=False)
            else:
                x = index_unpool(x, places[stage], sizes[stage])
            if self.decoder == "unpool+add":
                x = x + maps[stage]
            names = self._decoder[stage]
            for name in names if stage else names[:-1]:
                x = self._layer(name, x, self.decoder_relu)
        y: Tensor = getattr(self, self._decoder[0][-1])(x)
        return y

    def _deconvolve(self, x: Tensor, maps: list[Tensor]) -> Tensor:
        """Scores doubled in size and added to those of the encoder's map, stage by stage."""
        y: Tensor = self.get_submodule("score_pool")(x)
        for stage in range(len(maps), 0, -1):
            skip = getattr(self, f"score{stage}")(maps[stage - 1])
            y = getattr(self, f"upscore{stage}")(y)[..., : skip.shape[2], : skip.shape[3]] + skip
        return y

    def calibrate_bn(self, loader: Iterable[Any]) -> None:
        """Set the statistics of the batch norms to their exact averages over ``loader``.

        Means, and variances times m/(m − 1) of batches of m pixels, are averaged over the batches, which should be as
        large as those of the training. Mode and gradients stay as they are.

        Args:
            loader: batches of images, or tuples or lists that begin with them.

        Raises:
            ValueError: no batch came.

        Reference: the authors' pass over the training set before inference.
        """
        device = next(self.parameters()).device
        torch.optim.swa_utils.update_bn(loader, self, device)
        norms = [m for m in self.modules() if isinstance(m, nn.BatchNorm2d)]
        seen = all(int(n.num_batches_tracked) > 0 for n in norms if n.num_batches_tracked is not None)
        check(seen, "loader", loader, "gave no batch; give one that can be gone through again")

    def param_options(self) -> dict[str, dict[str, float]]:
        """Biases of convolutions learn at twice the rate, undecayed, as published."""
        convs = [n for n, m in self.named_modules() if isinstance(m, nn.Conv2d)]
        return {f"{name}.bias": {"lr_mult": 2.0, "weight_decay": 0.0} for name in convs}

    @torch.no_grad()
    def merge(self) -> EncoderDecoder:
        """A copy for inference with the batch norms folded into the convolutions before them."""
        merged = copy.deepcopy(self).eval()
        for name, norm in list(merged.named_children()):
            if isinstance(norm, nn.BatchNorm2d):
                conv: Any = merged.get_submodule(name.removesuffix("_bn"))
                weight, bias = fold_bn(conv.weight, conv.bias, norm)
                conv.weight.copy_(weight)
                conv.bias.copy_(bias)
                setattr(merged, name, nn.Identity())
        return merged


@part(
    "segnet",
    paper="segnet",
    kind="model",
    dims=(2,),
    merges="self",
    keywords="semantic segmentation encoder decoder VGG-16 unpooling CamVid SUN RGB-D road scenes",
)
class SegNet(EncoderDecoder):
    """SegNet: the 13 convolutions of VGG-16 and their mirror image; the last one is the classifier.

    Args:
        num_classes: maps of logits.
        decoder: "unpool" as published, or what the paper compares it with: "unpool+add" adds the encoder's map after
            the unpooling, "single-channel" has depthwise filters in the decoder (grouped where the width changes),
            "bilinear" enlarges without the maxima, "fcn" reduces maps to classes, enlarges by learned transposed
            convolutions and adds (no further convolutions).
        in_chans: channels of the image.
        divisor: of all widths, rounded down to at least one channel.

    Shape:
        (N, in_chans, H, W) → (N, num_classes, H, W), any H and W.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> SegNet(5, divisor=32).eval()(torch.zeros(1, 3, 47, 62)).shape
        torch.Size([1, 5, 47, 62])

    Reference: arXiv 1511.00561, section 3.
    """

    decoder_relu = True
    _plan = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # width and convolutions of the stages

    def __init__(self, num_classes: int = 11, decoder: str = "unpool", in_chans: int = 3, divisor: int = 1) -> None:
        super().__init__(num_classes, in_chans, decoder)
        check_positive("divisor", divisor)
        self.divisor = divisor
        encoder, mirror = [], []
        below = num_classes
        for stage, (full, count) in enumerate(self._plan, 1):
            width = max(1, full // divisor)
            encoder.append({f"conv{stage}_{i}": width for i in range(1, count + 1)})
            mirror.append({f"conv{stage}_{i}_D": width if i > 1 else below for i in range(count, 0, -1)})
            below = width
        self._build(encoder, mirror, (3, 3))

    @torch.no_grad()
    def load_vgg16(self, state: Mapping[str, Tensor]) -> None:
        """Start the encoder from VGG-16, as published.

        Args:
            state: state dict of torchvision's ``vgg16`` or ``vgg16_bn`` (of the latter the convolutions), or of its
                ``features``. Give images as that network had them.

        Raises:
            ValueError: not 13 convolutions of the encoder's shapes.
        """
        numbers = {
            n.rpartition(".")[0].rpartition(".")[2]: n.rpartition(".")[0] for n, t in state.items() if t.dim() == 4
        }
        found = [numbers[k] for k in sorted(numbers, key=lambda k: int(k) if k.isdecimal() else -1)]
        names = [name for stage in self._encoder for name in stage]
        shapes = [tuple(state[f"{n}.weight"].shape) for n in found]
        wanted = [tuple(self.get_parameter(f"{n}.weight").shape) for n in names]
        if shapes != wanted:
            raise ValueError(f"state: expected the 13 convolutions of VGG-16, {wanted[:2]} …; got {shapes[:2]} …")
        for name, theirs in zip(names, found, strict=True):
            for kind in ("weight", "bias"):
                self.get_parameter(f"{name}.{kind}").copy_(state[f"{theirs}.{kind}"])


@part(
    "segnet-basic",
    paper="segnet",
    kind="model",
    dims=(2,),
    merges="self",
    keywords="semantic segmentation encoder decoder small unpooling CamVid",
)
class SegNetBasic(EncoderDecoder):
    """SegNet-Basic: local response norm, four 7 × 7 convolutions down, four up without ReLU, a 1 × 1 classifier.

    Args:
        num_classes, decoder, in_chans: as for :class:`SegNet`.
        width: channels of all layers.
        kernel_size: of all but the classifier, odd.
        depth: stages, four as published.
        lrn: normalise the image over neighbouring channels first, which is made for values up to 255.

    Shape:
        (N, in_chans, H, W) → (N, num_classes, H, W), any H and W.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> sum(p.numel() for p in SegNetBasic(11).parameters())
        1416587

    Reference: arXiv 1511.00561, section 3.3.
    """

    def __init__(
        self,
        num_classes: int = 11,
        decoder: str = "unpool",
        in_chans: int = 3,
        width: int = 64,
        kernel_size: int = 7,
        depth: int = 4,
        lrn: bool = True,
    ) -> None:
        super().__init__(num_classes, in_chans, decoder)
        check_positive("width", width)
        check_positive("depth", depth)
        check_positive("kernel_size", kernel_size)
        check(kernel_size % 2 == 1, "kernel_size", kernel_size, "must be odd")
        self.lrn = lrn
        encoder = [{f"conv{i}": width} for i in range(1, depth + 1)]
        mirror = [{f"conv_decode{i}": width} for i in range(1, depth + 1)]
        mirror[0]["conv_classifier"] = num_classes
        self._build(encoder, mirror, (kernel_size, 1))


def convert_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An official state with our names: a norm's ``scale`` and ``shift`` are ``weight`` and ``bias``.

    Official norms only multiply and add at inference, their statistics being part of the two: mean 0 and variance 1.
    Vectors come in shapes like (1, C, 1, 1).

    Example:
        >>> names = list(convert_official({"conv1_bn.scale": torch.ones(1, 4, 1, 1), "conv1.bias": torch.ones(4)}))
        >>> names
        ['conv1_bn.weight', 'conv1.bias', 'conv1_bn.running_mean', 'conv1_bn.running_var']
    """
    vectors = ("scale", "shift", "bias")
    renamed = {"scale": "weight", "shift": "bias"}
    ours = {}
    for name, tensor in state.items():
        layer, _, kind = name.rpartition(".")
        ours[f"{layer}.{renamed.get(kind, kind)}"] = tensor.flatten() if kind in vectors else tensor
    for name, tensor in list(ours.items()):
        layer, _, kind = name.rpartition(".")
        if layer.endswith("_bn") and kind == "weight":
            ours.setdefault(f"{layer}.running_mean", torch.zeros_like(tensor))
            ours.setdefault(f"{layer}.running_var", torch.ones_like(tensor))
    return ours


def read_official(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Options of the network that a converted state belongs to."""
    basic = "conv1_1.weight" not in state
    first = state.get("conv1.weight" if basic else "conv1_1.weight")
    if first is None or first.dim() != 4:
        raise ValueError(f"state: neither conv1_1 (SegNet) nor conv1 (SegNet-Basic) in {list(state)[:3]} …")
    last = "score1" if "score1.weight" in state else "conv_classifier" if basic else "conv1_1_D"
    options: dict[str, Any] = {"in_chans": first.shape[1]}
    if f"{last}.weight" in state:
        options["num_classes"] = len(state[f"{last}.weight"])
    decoding = state.get("conv_decode1.weight" if basic else "conv1_2_D.weight")
    if decoding is None:
        options["decoder"] = "fcn"
    elif decoding.shape[0] > decoding.shape[1]:
        options["decoder"] = "single-channel"
    if not basic:
        widths = [len(state.get(f"conv{stage}_1.weight", ())) for stage in range(1, 6)]
        plan = [[max(1, width // d) for width, _ in SegNet._plan] for d in range(1, 513)]
        return {**options, "divisor": plan.index(widths) + 1 if widths in plan else 1}
    depth = sum(name.startswith("conv") and name[4:-7].isdecimal() for name in state if name.endswith(".weight"))
    return {**options, "width": len(first), "kernel_size": first.shape[-1], "depth": depth}


@register_model("segnet")
def segnet(**options: Any) -> SegNet:
    """SegNet on VGG-16; 29,449,355 parameters for 11 classes."""
    return SegNet(**options)


@register_model("segnet")
def segnet_basic(**options: Any) -> SegNetBasic:
    """SegNet-Basic; 1,416,587 parameters for 11 classes."""
    return SegNetBasic(**options)
