"""The networks, Res-FFT-ReLU in its forms, the Fourier kernel estimator, and a reversible column of toy levels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.parity.core import Adapted, Case, ParityError
from torchconv.models.restore import deeprftv2, deeprftv2_first
from torchconv.ops.deeprftv2 import ComplexSpectral, ResFFTConv2d
from torchconv.ops.deeprftv2_kernel import FourierKernelEstimator
from torchconv.ops.deeprftv2_reversible import reversible_column


def adapt(case: Case) -> Adapted:
    """Which part it is follows from the keys of the config."""
    config = case.config
    if any("patch_embed_maxs." in n for n in case.state):
        return _network(case)
    if any(n.startswith("feat_extract.") for n in case.state):
        return _first_network(case)
    if "levels" in config:
        return _column(case)
    if "feature_channels" in config:
        return _estimator(case)
    module = _block(case)
    return Adapted(lambda inputs: {"y": module(inputs["x"])}, module)


def _only_output(case: Case, name: str) -> None:
    """The cotangent is that of ``name``, among outputs of the same shape."""
    if "cotangent" in case.inputs:
        case.inputs[f"cotangent.{name}"] = case.inputs.pop("cotangent")


def _network(case: Case) -> Adapted:
    options = deeprftv2.read_official(deeprftv2.convert_official(case.state))
    module = deeprftv2.DeepRFTv2(**options)
    _only_output(case, f"img_max.{2 * module.stages - 1}")

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        full, mid = module(inputs["x"], all_outputs=True)
        named = {f"img_max.{i}": y for i, y in enumerate(full)} | {f"img_mid.{i}": y for i, y in enumerate(mid)}
        return {**named, "pyramid_half": deeprftv2.half_size(inputs["x"]), "y": full[-1]}

    def names(name: str) -> str:
        return next(iter(deeprftv2.convert_official({name: torch.empty(0)})))

    return Adapted(forward, module, deeprftv2.convert_official, names)


def _first_network(case: Case) -> Adapted:
    state = deeprftv2_first.convert_official(case.state)
    norm, act = case.config.get("norm", "backward"), _activation(case.config.get("act", "relu"))
    window = case.config.get("window_size")
    options = {**deeprftv2_first.read_official(state), "norm": norm, "activation": act, "window_size": window}
    module = deeprftv2_first.DeepRFT(**options)
    _only_output(case, "y")

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        y, half, quarter = module(inputs["x"], all_outputs=True)
        return {"y": y, "y_scale1": half, "y_scale2": quarter}

    def names(name: str) -> str:
        folded = name.removeprefix("module.").removesuffix(".W") + ".weight"
        return folded if folded in state else name.removeprefix("module.")

    return Adapted(forward, module, deeprftv2_first.convert_official, names)


def _block(case: Case) -> nn.Module:
    config = case.config
    channels = config.get("n_feat", config.get("out_channel", config.get("dim")))
    norm = config.get("norm", "backward")
    act = _activation(config.get("act", "relu"))
    complex_names = [n for n in case.state if n.endswith("complex_weight1_real")]
    if not complex_names:
        conv = "doconv" if any(n.endswith(".W") for n in case.state) else "plain"
        first = next(n for n in ("main.0.main.0.D", "main.0.main.0.weight", "main.0.main.0.W") if n in case.state)
        size = config.get("kernel_size", _side(case.state[first]) if not first.endswith("W") else 1)
        hidden = case.state[f"main_fft.0.main.0.{'W' if conv == 'doconv' else 'weight'}"].shape[0]
        return ResFFTConv2d(
            channels,
            kernel_size=size,
            bias="main.0.main.0.bias" in case.state,
            conv=conv,
            norm=norm,
            activation=act,
            expansion=hidden / (2 * channels),
        )
    bias = any("b1_real" in n for n in case.state)
    expansion = case.state[complex_names[0]].shape[1] / channels
    window = config.get("window_size")
    if complex_names == ["complex_weight1_real"]:
        return ComplexSpectral(channels, expansion, window, bias, norm, act)
    return ResFFTConv2d(
        channels,
        kernel_size=config.get("kernel_size", _side(case.state["main.conv1.weight"])),
        bias="main.conv1.bias" in case.state,
        form="complex",
        expansion=expansion,
        window_size=window,
        spectral_bias=bias,
        norm=norm,
        activation=act,
    )


def _side(tensor: Tensor) -> int:
    return round(tensor.shape[1] ** 0.5) if tensor.dim() == 3 else int(tensor.shape[-1])


def _activation(word: Any) -> str:
    if word in (None, "", "none", "identity"):
        return "identity"
    return {"leakyrelu": "leaky_relu"}.get(str(word).lower(), str(word).lower())


def _estimator(case: Case) -> Adapted:
    config = case.config
    modes = {config.get(k, "feature") for k in ("inp_feature", "deconv_feature")}
    if modes != {"feature"}:
        raise ParityError(f"input modes {modes}: only 'feature', the published one, is there")
    if config.get("baseblock", "naf") != "naf":
        raise ParityError(f"baseblock {config['baseblock']!r}: only 'naf' is there")
    if "cotangent" in case.inputs:  # may have the shape of the feature map too
        case.inputs["cotangent.img_deblur"] = case.inputs.pop("cotangent")
    module = FourierKernelEstimator(
        config["feature_channels"],
        config.get("kernel_width", config["feature_channels"]),
        config.get("enc_ker_layers", [1, 1, 1, 1]),
        config.get("first_col", True),
        "end_ker1.norm.weight" in case.state,
        config.get("pad_size", 0),
    )

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        states = [inputs[f"ker_feature.{i}"] for i in range(4) if f"ker_feature.{i}" in inputs]
        feature, image, *new = module(inputs["feature"], inputs["blur_img"], *states)
        otf = torch.view_as_real(module.transfer(inputs["feature"], *states))
        named = {f"ker_feature.{i}": state for i, state in enumerate(new)}
        return {"feature_deblur": feature, "img_deblur": image, "otf": otf, **named}

    return Adapted(forward, module)


class _Toy(nn.Module):
    """tanh(conv3x3(down(x) + shuffle(1x1(second)))) with the names of the file."""

    def __init__(self, below: int, channels: int, above: int | None, down: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(below, channels, down, down)
        self.up = None if above is None else nn.Sequential(nn.Conv2d(above, 4 * channels, 1), nn.PixelShuffle(2))
        self.c = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, second: Tensor | None) -> Tensor:
        y = self.down(x)
        if self.up is not None and second is not None:
            y = y + self.up(second)
        return torch.tanh(F.conv2d(y, self.c.weight, self.c.bias, padding=1))


class _Column(nn.Module):
    def __init__(self, channels: list[int], inputs: int) -> None:
        super().__init__()
        count = len(channels)
        for i, c in enumerate(channels):
            self.register_parameter(f"alpha{i}", nn.Parameter(torch.full((1, c, 1, 1), 0.5)))
        self.level = nn.ModuleList(
            _Toy(channels[i - 1] if i else inputs, c, channels[i + 1] if i + 1 < count else None, 2 if i else 1)
            for i, c in enumerate(channels)
        )


def _column(case: Case) -> Adapted:
    channels = list(case.config["channels"])[: case.config["levels"]]
    module = _Column(channels, case.inputs["x"].shape[1])
    states = {n: t for n, t in case.inputs.items() if n.startswith("cotangent")}
    for name in states:  # cotangent0 → cotangent.state0, as in the other files
        case.inputs[f"cotangent.state{name.removeprefix('cotangent')}"] = case.inputs.pop(name)

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        alphas = [module.get_parameter(f"alpha{i}") for i in range(len(channels))]
        old = [inputs[f"state{i}"] for i in range(len(channels))]
        new = reversible_column(list(module.level), alphas, inputs["x"], old)
        return {f"state{i}": c for i, c in enumerate(new)}

    return Adapted(forward, module)
