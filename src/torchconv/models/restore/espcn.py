"""ESPCN: super-resolution by two convolutions at low resolution and a sub-pixel convolution.

Shi et al. 2016, arXiv 1609.05158. z = conv3×3(act(conv3×3(act(conv5×5(x))))), shuffled into r × r blocks;
25·C_in·w + 9·w·w/2 + 9·(w/2)·C_out·r² multiply-adds a low-resolution pixel, 22,624 for r = 3 on luma (w = 64).

The authors published no code. The ports differ in what follows the shuffle (nothing, clamp, sigmoid, tanh) and in the
activation; both are arguments, and :func:`convert_state` reads all their parameter names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from torchconv._common import check, check_choice, check_positive
from torchconv.catalog import part
from torchconv.models._registry import register_model
from torchconv.ops.espcn import SubpixelConv2d, channels_from_depth_to_space
from torchconv.ops.plain import PlainConv2d

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
}
FINALS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "clip01": lambda y: y.clamp(0, 1),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


class _Activation(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.kind](x)

    def extra_repr(self) -> str:
        return self.kind


class _Last(SubpixelConv2d):
    """The last layer learns ten times slower."""

    def param_options(self) -> dict[str, dict[str, float]]:
        """Learning rate multipliers."""
        return {name: {"lr_mult": 0.1} for name, _ in self.named_parameters(recurse=False)}


@part(
    "espcn",
    paper="espcn",
    kind="model",
    dims=(2,),
    keywords="super resolution real-time upscaling luma video",
)
class ESPCN(nn.Module):
    """Efficient sub-pixel convolutional network.

    Args:
        in_channels, out_channels: of the images; ``out_channels`` unset is ``in_channels``. Published: 1, the luma.
        channels: width of the first layer, the second has half of it; ≥ 2.
        upscale_factor: r ≥ 1.
        activation: "tanh" as published, "relu" or "sigmoid".
        final: after the shuffle: "none" as published, "clip01" (no gradient outside [0, 1]), "tanh" or "sigmoid".
        icnr: start the last layer as nearest-neighbour upscaling.

    Shape:
        (N, in_channels, H, W) → (N, out_channels, r·H, r·W).

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> sum(p.numel() for p in ESPCN(upscale_factor=3).parameters())
        22729

    Reference: arXiv 1609.05158, section 2.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int | None = None,
        channels: int = 64,
        upscale_factor: int = 3,
        activation: str = "tanh",
        final: str = "none",
        icnr: bool = False,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        check_positive("in_channels", in_channels)
        check_positive("upscale_factor", upscale_factor)
        check(isinstance(channels, int) and channels >= 2, "channels", channels, "must be an integer >= 2")
        check_choice("activation", activation, ACTIVATIONS)
        check_choice("final", final, FINALS)
        self.upscale_factor, self.final = upscale_factor, final
        self.feature_maps = nn.Sequential(
            PlainConv2d(in_channels, channels, 5, padding=2),
            _Activation(activation),
            PlainConv2d(channels, channels // 2, 3, padding=1),
            _Activation(activation),
        )
        self.sub_pixel = nn.Sequential(_Last(channels // 2, out_channels, 3, upscale_factor, icnr=icnr))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights: variance 2 / fan-out, 10⁻⁶ in the last layer unless it starts by ICNR; zero biases."""
        for layer in self.modules():
            if isinstance(layer, PlainConv2d):
                nn.init.normal_(layer.weight, 0.0, (2 / (layer.out_channels * layer.weight[0, 0].numel())) ** 0.5)
            elif isinstance(layer, _Last) and not layer.icnr:
                nn.init.normal_(layer.weight, 0.0, 0.001)
            if isinstance(layer, PlainConv2d | _Last):
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Enlarge ``x``."""
        return FINALS[self.final](self.sub_pixel(self.feature_maps(x)))

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """The enlarged image, clamped to [0, 1]."""
        return self(x).clamp(0, 1)


_LAYERS = ("feature_maps.0", "feature_maps.2", "sub_pixel.0")
_SCHEMES = (
    _LAYERS,
    ("first_part.0", "first_part.2", "last_part.0"),
    ("conv_1", "conv_2", "conv_3"),
    ("conv1", "conv2", "conv3"),
)


def parameter_names(names: Iterable[str]) -> dict[str, str]:
    """This library's parameter name for each of a port's, by its last parts; empty where no known port has them."""
    listed = list(names)
    for scheme in _SCHEMES:
        pattern = re.compile(rf"^(?:.*\.)?({'|'.join(map(re.escape, scheme))})\.(weight|bias)$")
        found = {n: m for n in listed if (m := pattern.match(n))}
        if len(found) == len(listed) == 2 * len(_LAYERS):
            return {n: f"{_LAYERS[scheme.index(m[1])]}.{m[2]}" for n, m in found.items()}
    return {}


def convert_state(state: dict[str, Tensor], upscale_factor: int) -> dict[str, Tensor]:
    """Parameters of any of the known ports under this library's names.

    Args:
        state: of Lornatang (``feature_maps``, ``sub_pixel``), yjn870 (``first_part``, ``last_part``), Nhat-Thanh
            (``conv_1`` …), leftthomas (``conv1`` …), or constants of TensorFlow graphs (``f1`` … height × width × in ×
            out, ``b1`` …), whose last layer is reordered for the shuffle. A prefix (``module.``) is allowed.
        upscale_factor: r, needed for the reordering.

    Raises:
        ValueError: names of none of these.
    """
    names = parameter_names(state)
    if names:
        return {names[n]: t for n, t in state.items()}
    constants = {n.rpartition(".")[2].rpartition("/")[2]: t for n, t in state.items()}
    expected = {f"{kind}{i}" for kind in "fb" for i in (1, 2, 3)}
    check(set(constants) == expected, "state", sorted(state), "are parameters of no known port of ESPCN")
    converted: dict[str, Tensor] = {}
    for number, layer in enumerate(_LAYERS, 1):
        weight, bias = constants[f"f{number}"].permute(3, 2, 0, 1), constants[f"b{number}"]
        if number == 3:
            weight = channels_from_depth_to_space(weight, upscale_factor)
            bias = channels_from_depth_to_space(bias, (upscale_factor, upscale_factor))
        converted |= {f"{layer}.weight": weight.contiguous(), f"{layer}.bias": bias.contiguous()}
    return converted


@register_model("espcn")
def espcn_x2(**options: Any) -> ESPCN:
    """Twice the size; 21,284 parameters on luma."""
    return ESPCN(upscale_factor=2, **options)


@register_model("espcn")
def espcn_x3(**options: Any) -> ESPCN:
    """Three times the size; 22,729 parameters on luma."""
    return ESPCN(upscale_factor=3, **options)


@register_model("espcn")
def espcn_x4(**options: Any) -> ESPCN:
    """Four times the size; 24,752 parameters on luma."""
    return ESPCN(upscale_factor=4, **options)
