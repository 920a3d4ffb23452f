"""P3D: residual networks for video whose 3-D convolutions are split into one in space and one in time.

Qiu, Yao, Mei 2017, "Learning Spatio-Temporal Representation with Pseudo-3D Residual Networks", ICCV, arXiv 1711.10305.

The blocks of stages 2 to 4 take the forms A, B, C, A, … in turn, counted through all stages; stage 5 is a 2-D residual
network on the frames that are left (one of 16). Strides stand on the first 1 × 1 × 1 convolution of a block and are
spatial only; time is halved by max pooling before each stage and in the stem.

The authors' Caffe graph and the PyTorch port of it are different functions: blocks B and C differ (see
``ops.p3d.activated``), and so do the poolings, which the graph rounds up without padding and the port rounds down, the
first one padded by 1 in space. ``dialect`` says which one is meant. State-dict names are the port's.

| name     | blocks       | parameters, 400 classes | multiply-adds of 16 × 160 × 160 |
|----------|--------------|-------------------------|---------------------------------|
| p3d63    | 3, 4, 6, 3   | 25,745,232              | 8.4 G                           |
| p3d131   | 3, 4, 23, 3  | 48,088,400              | 12.9 G                          |
| p3d199   | 3, 8, 36, 3  | 66,492,240              | 18.4 G                          |
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive
from torchconv.catalog import part
from torchconv.models._backbone import Backbone
from torchconv.models._registry import register_model
from torchconv.ops._p3d_factors import apply_space, apply_time
from torchconv.ops.p3d import DIALECTS, FORMS, activated, fold_in


@part(
    "p3d-bottleneck",
    paper="p3d",
    kind="layer",
    dims=(3,),
    merges="self",
    probe={"build": {"in_channels": 8, "planes": 4, "stride": 2, "form": "C"}, "inputs": [[2, 8, 4, 7, 6]]},
    keywords="pseudo-3D residual block video bottleneck",
)
class P3DBottleneck(nn.Module):
    """Bottleneck block: 1 × 1 × 1, S and T in one of three forms, 1 × 1 × 1, and the shortcut.

    Args:
        in_channels: channels of the input.
        planes: channels inside; 4 · planes come out.
        stride: spatial, on the first convolution and the shortcut.
        form: "A", "B", "C", or "2d": a 2-D block on frames (N, C, H, W).
        dialect: "caffe" or "port", see :func:`torchconv.ops.p3d.activated`.
        downsample: a convolution in the shortcut; unset where stride or channels need one.

    Shape:
        (N, in_channels, T, H, W) → (N, 4 · planes, T, ⌈H/stride⌉, ⌈W/stride⌉); without T for "2d".

    Raises:
        ValueError: an argument is out of range, or the shortcut needs a convolution.

    Example:
        >>> import torch
        >>> P3DBottleneck(8, 2, form="B")(torch.zeros(1, 8, 4, 5, 5)).shape
        torch.Size([1, 8, 4, 5, 5])

    Reference: arXiv 1711.10305, figure 3.
    """

    def __init__(
        self,
        in_channels: int,
        planes: int,
        stride: int = 1,
        form: str = "A",
        dialect: str = "caffe",
        downsample: bool | None = None,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_positive("in_channels", in_channels)
        check_positive("planes", planes)
        check_positive("stride", stride)
        check_choice("form", form, (*FORMS, "2d"))
        check_choice("dialect", dialect, DIALECTS)
        out_channels = 4 * planes
        needed = stride != 1 or in_channels != out_channels
        shortcut = needed if downsample is None else downsample
        check(shortcut or not needed, "downsample", downsample, "the shapes differ: the shortcut needs a convolution")
        self.form, self.dialect = form, dialect
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        flat = form == "2d"
        conv: Any = nn.Conv2d if flat else nn.Conv3d
        norm: Any = nn.BatchNorm2d if flat else nn.BatchNorm3d
        steps = stride if flat else (1, stride, stride)
        self.conv1 = conv(in_channels, planes, 1, stride=steps, bias=False, **options)
        self.bn1 = norm(planes, **options)
        if flat:
            self.conv_normal = conv(planes, planes, 3, padding=1, bias=False, **options)
            self.bn_normal = norm(planes, **options)
        else:
            self.conv2 = conv(planes, planes, (1, 3, 3), padding=(0, 1, 1), bias=False, **options)
            self.bn2 = norm(planes, **options)
            self.conv3 = conv(planes, planes, (3, 1, 1), padding=(1, 0, 0), bias=False, **options)
            self.bn3 = norm(planes, **options)
        self.conv4 = conv(planes, out_channels, 1, bias=False, **options)
        self.bn4 = norm(out_channels, **options)
        self.downsample = (
            nn.Sequential(
                conv(in_channels, out_channels, 1, stride=steps, bias=False, **options), norm(out_channels, **options)
            )
            if shortcut
            else None
        )

    def sum(self, x: Tensor) -> Tensor:
        """The block before its last ReLU."""
        _check_rank(x, 4 if self.form == "2d" else 5)
        y = F.relu(self.bn1(self.conv1(x)))
        if self.form == "2d":
            y = F.relu(self.bn_normal(self.conv_normal(y)))
        else:
            y = activated(
                y,
                lambda z: self.bn2(apply_space(self.conv2, z)),
                lambda z: self.bn3(apply_time(self.conv3, z)),
                self.form,
                self.dialect,
            )
        y = self.bn4(self.conv4(y))
        return y + (x if self.downsample is None else self.downsample(x))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        return F.relu(self.sum(x))

    def merge(self) -> P3DBottleneck:
        """The same block with its batch norms folded into its convolutions, for inference."""
        twin = copy.deepcopy(self).eval()
        middle = [("conv_normal", "bn_normal")] if self.form == "2d" else [("conv2", "bn2"), ("conv3", "bn3")]
        for conv, norm in (("conv1", "bn1"), *middle, ("conv4", "bn4")):
            fold_in(twin, conv, norm)
        if twin.downsample is not None:
            fold_in(twin.downsample, "0", "1")
        return twin


@part(
    "p3d-net",
    paper="p3d",
    kind="model",
    dims=(3,),
    merges="self",
    keywords="P3D ResNet video action recognition Kinetics Sports-1M clip features backbone",
)
class P3D(Backbone):
    """P3D residual network, as a classifier of clips or as a backbone.

    Args:
        layers: blocks of stages 2 to 5, at least one each.
        num_classes: classes; 0 returns the pooled features.
        in_chans: channels of a frame: 3, or 2 for optical flow.
        width: channels of the stem; published: 64.
        forms: the forms that the blocks take in turn: "ABC" (mixed), "A", "B", "C" or any other word of these letters.
        dialect: "caffe" (the authors' graph, for new training) or "port" (for the port's checkpoints).
        drop_rate: dropout before the classifier; published: 0.5 (Kinetics), 0.7 (its flow), 0.1 (Sports-1M).

    Shape:
        (N, in_chans, T, H, W) → (N, num_classes). T ≥ 16 in the port's dialect, which rounds down.

    Raises:
        ValueError: an argument is out of range, or the clip is too short; the message names it.

    Example:
        >>> import torch
        >>> net = P3D((1, 1, 1, 1), num_classes=5, width=4)
        >>> net(torch.zeros(2, 3, 16, 32, 32)).shape
        torch.Size([2, 5])

    Reference: arXiv 1711.10305, section 3.3.
    """

    head_name = "fc"

    def __init__(
        self,
        layers: Sequence[int] = (3, 8, 36, 3),
        num_classes: int = 400,
        in_chans: int = 3,
        width: int = 64,
        forms: Sequence[str] = "ABC",
        dialect: str = "caffe",
        drop_rate: float = 0.5,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        layers = tuple(layers)
        ok = len(layers) == 4 and all(isinstance(n, int) and n >= 1 for n in layers)
        check(ok, "layers", layers, "must give the blocks of four stages, integers of 1 or more")
        check_positive("num_classes", num_classes, zero=True)
        check_positive("in_chans", in_chans)
        check_positive("width", width)
        check(bool(forms) and set(forms) <= set(FORMS), "forms", forms, "must be letters A, B, C, as in 'ABC' or 'A'")
        check_choice("dialect", dialect, DIALECTS)
        check(0 <= drop_rate < 1, "drop_rate", drop_rate, "must be at least 0 and below 1")
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_chans, self.num_classes, self.num_features = in_chans, num_classes, 32 * width
        self.dialect, self.drop_rate = dialect, drop_rate
        self.conv1_custom = nn.Conv3d(in_chans, width, (1, 7, 7), (1, 2, 2), (0, 3, 3), bias=False, **options)
        self.bn1 = nn.BatchNorm3d(width, **options)
        letters = [forms[i % len(forms)] for i in range(sum(layers[:3]))]
        channels, self.feature_info = width, []
        for stage, blocks in enumerate(layers):
            planes = width * 2**stage
            modules = []
            for block in range(blocks):
                form = letters.pop(0) if stage < 3 else "2d"
                stride = 2 if stage > 0 and block == 0 else 1
                downsample = True if block == 0 else None
                modules.append(P3DBottleneck(channels, planes, stride, form, dialect, downsample, **options))
                channels = 4 * planes
            name = f"layer{stage + 1}"
            self.add_module(name, nn.Sequential(*modules))
            self.feature_info.append({"num_chs": channels, "reduction": 4 * 2**stage, "module": name})
        self.fc = self.make_classifier(num_classes).to(device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Convolutions: normal, variance 2 / (output channels · taps)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def stem(self, x: Tensor) -> Tensor:
        """1 × 7 × 7 convolution and pooling: (N, in_chans, T, H, W) → (N, width, T/2, H/4, W/4)."""
        _check_rank(x, 5)
        if self.dialect == "caffe" and min(x.shape[3:]) < 3:
            raise ValueError(f"x of shape {tuple(x.shape)}: the first pooling needs frames of 3 × 3 or more")
        x = F.relu(self.bn1(self.conv1_custom(x)))
        if self.dialect == "port":
            _check_frames(x)
            return F.max_pool3d(x, (2, 3, 3), 2, (0, 1, 1))
        return F.max_pool3d(x, (2, 3, 3), 2, ceil_mode=True)

    def pool(self, x: Tensor) -> Tensor:
        """Halve time by the maximum of two frames."""
        if self.dialect == "port":
            _check_frames(x)
        return F.max_pool3d(x, (2, 1, 1), (2, 1, 1), ceil_mode=self.dialect == "caffe")

    def stage(self, index: int, x: Tensor) -> Tensor:
        """The blocks of stage ``index`` + 2 of the paper after the stem (0) or the pooling of time."""
        x = self.stem(x) if index == 0 else self.pool(x)
        blocks: Any = self.get_submodule(f"layer{index + 1}")
        if index < 3:
            return self.run(blocks, x)
        batch, frames = x.shape[0], x.shape[2]
        flat = x.transpose(1, 2).reshape(batch * frames, x.shape[1], *x.shape[3:])
        y = self.run(blocks, flat)
        return y.reshape(batch, frames, *y.shape[1:]).transpose(1, 2)

    def neck(self, x: Tensor) -> Tensor:
        """Dropout."""
        return F.dropout(x, self.drop_rate, self.training)

    def load_resnet(self, state: dict[str, Tensor]) -> list[str]:
        """Start from a 2-D bottleneck ResNet (torchvision's names), as the paper does.

        Its 3 × 3 kernels become S, all others keep their place; T and the classifier keep theirs. A P3D block strides
        in its first convolution, torchvision's in the 3 × 3 one, so that the features are a start and not equal.

        Args:
            state: state dict of a ResNet-50, -101 or -152 for :func:`p3d63`, :func:`p3d131`, :func:`p3d199`.

        Returns:
            The names of our parameters and statistics that it does not have.

        Raises:
            ValueError: a tensor of ``state`` has no place here or another shape.
        """
        ours = self.state_dict()
        found = {}
        for name, tensor in state.items():
            if name.startswith("fc."):
                continue
            target = _place_of(name)
            check(target in ours, "state", name, "no such block in this network; take the ResNet of its depth")
            if tensor.dim() == 4 and ours[target].dim() == 5:
                tensor = tensor.unsqueeze(2)
            same = tensor.shape == ours[target].shape
            check(same, "state", name, f"shape {tuple(tensor.shape)}, expected {tuple(ours[target].shape)}")
            found[target] = tensor
        self.load_state_dict({**ours, **found})
        return sorted(set(ours) - set(found))

    def merge(self) -> P3D:
        """The same network with its batch norms folded into its convolutions, for inference."""
        twin = copy.deepcopy(self).eval()
        fold_in(twin, "conv1_custom", "bn1")
        for name, module in self.named_modules():
            if isinstance(module, P3DBottleneck):
                outer, _, leaf = name.rpartition(".")
                setattr(twin.get_submodule(outer), leaf, module.merge())
        return twin


def read_official(state: dict[str, Tensor]) -> dict[str, Any]:
    """The published checkpoints with these names are the port's, and so is the function that they were trained as."""
    return {"dialect": "port"} if "conv1_custom.weight" in state else {}


def _check_rank(x: Tensor, rank: int) -> None:
    if x.dim() != rank:
        expected = "(N, C, T, H, W)" if rank == 5 else "frames (N, C, H, W)"
        raise ValueError(f"x of shape {tuple(x.shape)}: expected {expected}")


def _check_frames(x: Tensor) -> None:
    """The port's poolings round down and need two frames."""
    frames = x.shape[2]
    if frames < 2:
        raise ValueError(f"x: only {frames} frame left before a pooling; give the port's dialect 16 frames or more")


def _place_of(name: str) -> str:
    """Our name for a tensor of a 2-D ResNet."""
    block = re.fullmatch(r"(layer(\d)\.\d+)\.(conv|bn)(\d)\.(\w+)", name)
    if block is None:
        return name.replace("conv1.", "conv1_custom.") if name.startswith("conv1.") else name
    prefix, stage, kind, number, leaf = block.groups()
    place = {"1": "1", "2": "_normal" if stage == "4" else "2", "3": "4"}[number]
    return f"{prefix}.{kind}{place}.{leaf}"


@register_model("p3d")
def p3d63(**options: Any) -> P3D:
    """P3D-63, after ResNet-50: 25.7 M parameters, 8.4 G multiply-adds for 16 × 160 × 160 (the port's only)."""
    return P3D(**{"layers": (3, 4, 6, 3), **options})


@register_model("p3d")
def p3d131(**options: Any) -> P3D:
    """P3D-131, after ResNet-101: 48.1 M parameters, 12.9 G multiply-adds for 16 × 160 × 160 (the port's only)."""
    return P3D(**{"layers": (3, 4, 23, 3), **options})


@register_model("p3d")
def p3d199(**options: Any) -> P3D:
    """P3D-199, after ResNet-152: 66.5 M parameters, 18.4 G multiply-adds for 16 × 160 × 160; the published network."""
    return P3D(**{"layers": (3, 8, 36, 3), **options})
