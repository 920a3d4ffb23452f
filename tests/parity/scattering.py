"""Wavelet scattering as kymatio computes it, networks over given filters, and tight frames."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from tests.parity.core import COTANGENT, Adapted, Case
from torchconv.ops.scattering import Scattering1d, Scattering2d
from torchconv.theory.scattering import (
    FrameLayer,
    FrameNetwork,
    curvelet_wedges,
    directional_frame,
    energy,
    wavelet_frame,
    weyl_heisenberg_frame,
)


def adapt(case: Case) -> Adapted:
    """By what the config describes: layers, an image transform, a signal transform, or frames."""
    config = case.config
    if "layers" in config or "chi0" in case.inputs:
        return _network(case)
    if "gabor_K" in config or "wedges" in config or not case.inputs:
        return Adapted(lambda inputs: {}, extra=lambda inputs: _frames(config, set(case.outputs)))
    if "shape" in config or case.inputs["x"].dim() >= 3:
        return _images(case)
    return _signals(case)


def _frames(config: dict[str, Any], wanted: set[str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    if wanted & {"wavelet1d", "lowpass1"}:
        found["wavelet1d"], found["lowpass1"] = wavelet_frame(config["N1"], config["J"])
    if wanted & {"directional", "lowpass2"}:
        wedges = config.get("wedges", 8)
        wedges = curvelet_wedges(config["J"], wedges) if isinstance(wedges, int) else wedges[: config.get("J")]
        found["directional"], found["lowpass2"] = directional_frame(config["size"], wedges)
    if "weyl_heisenberg" in wanted:
        found["weyl_heisenberg"] = weyl_heisenberg_frame(config["N1"], config["gabor_K"])
    return found


def _network(case: Case) -> Adapted:
    count = max(int(name[3:]) for name in case.inputs if name[:3] == "chi")
    layers = case.config.get("layers") or [{}] * count
    norm = case.config.get("norm", "continuous")

    def build(inputs: dict[str, Tensor]) -> FrameNetwork:
        def layer(n: int, options: dict[str, Any]) -> FrameLayer:
            atoms = inputs[f"g{n}_re"] + 1j * inputs.get(f"g{n}_im", torch.zeros_like(inputs[f"g{n}_re"]))
            average = inputs[f"avg{n}"] if options.get("pool", "subsample") == "average" else None
            settings = {"nonlinearity": options.get("nl", "modulus"), "step": options.get("S", 1)}
            return FrameLayer.from_kernels(atoms, inputs[f"chi{n}"], average, **settings)

        last = inputs[f"chi{len(layers)}"]
        return FrameNetwork(tuple(layer(n, o) for n, o in enumerate(layers)), torch.fft.fftn(last))

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        features = build(inputs)(inputs["x"], norm)
        real = {f"layer{n}_re": f.real for n, f in enumerate(features)}
        return real | {f"layer{n}_im": f.imag for n, f in enumerate(features)}

    def extra(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        network = build(inputs)
        return {
            "frame_bounds": torch.tensor([layer.bounds() for layer in network.layers], dtype=torch.float64),
            "energy_per_layer": energy(network(inputs["x"], norm)),
            "input_energy": inputs["x"].abs().square().sum(),
        }

    return Adapted(forward, extra=extra)


def _objective(case: Case, module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The coefficients; where the cotangent is kept among the outputs, also what was differentiated."""
    found = {"S": module(inputs["x"])}
    if COTANGENT in case.outputs:
        found["objective"] = (found["S"] * case.outputs[COTANGENT]).sum()
    return found


def _with_kept(case: Case, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """An input that stands among the outputs is passed on."""
    return found | {n: t for n, t in case.outputs.items() if n == COTANGENT}


def _old(case: Case) -> bool:
    """Whether kymatio up to 0.3 made the numbers."""
    return re.search(r"\b0\.[0-3]\b", case.source) is not None


def _signals(case: Case) -> Adapted:
    config = case.config
    length, q, average = config.get("N", case.inputs["x"].shape[-1]), config.get("Q", 1), config.get("T")
    if average == "global":
        average = "mean" if _old(case) else "sum"
    stride = config.get("stride")
    if config.get("oversampling"):
        top = int(config.get("T") or 2 ** config["J"]).bit_length() - 1
        stride = 2 ** (top - config["oversampling"])
    module = Scattering1d(
        length if isinstance(length, int) else length[0],
        config["J"],
        q if isinstance(q, int) else tuple(q),
        average,
        config.get("max_order", 2),
        stride=stride,
        fold="mean" if _old(case) else "sum",
    )
    bank = module.bank

    def extra(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {
            "meta_order": torch.tensor([len(path) for path in module.paths]),
            "padding": torch.tensor([bank.left, bank.padded - bank.left - bank.length, bank.padded]),
        }
        for name in ("j", "xi", "sigma"):
            expected = case.outputs.get(f"meta_{name}")
            columns = module.max_order if expected is None else expected.shape[1]
            rows = [[float(getattr(w, name)) for w in _wavelets(bank, path)] for path in module.paths]
            padded = [row + [-1.0] * (columns - len(row)) for row in rows]
            found[f"meta_{name}"] = torch.tensor(padded, dtype=torch.float64)
        for order, wavelets in ((1, bank.first), (2, bank.second)):
            found[f"psi{order}_params"] = torch.tensor([[w.xi, w.sigma, w.j] for w in wavelets], dtype=torch.float64)
        for name in case.outputs:
            match = re.fullmatch(r"(phi|psi1|psi2)_level(\d+)", name)
            if match:
                level, response = int(match[2]), getattr(bank, match[1])
                top = max(w.j for w in bank.first)
                if level and match[1] == "psi2":
                    kept = [n for n, w in enumerate(bank.second) if level < min(top, w.j, 1 + bank.log2_stride)]
                    response = response[kept]
                found[name] = torch.from_numpy(bank.level(response, level))
        return _with_kept(case, found)

    return Adapted(lambda inputs: _objective(case, module, inputs), module, extra=extra, fresh=lambda n: True)


def _wavelets(bank: Any, path: tuple[int, ...]) -> list[Any]:
    return [family[n] for family, n in zip((bank.first, bank.second), path, strict=False)]


def _images(case: Case) -> Adapted:
    config = case.config
    size = config.get("shape", case.inputs["x"].shape[-2:])
    pre_pad = config.get("pre_pad", False)
    options = (config["J"], config.get("L", 8), config.get("max_order", 2))
    module = Scattering2d(tuple(size), *options, pre_pad=pre_pad)
    bank = module.bank

    def extra(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        rows = []
        for path in module.paths:
            scales, angles = ([step[i] for step in path] + [-1] * (2 - len(path)) for i in (0, 1))
            rows.append([*scales, *angles])
        found = {"meta": torch.tensor(rows)}
        found["psi_j_theta"] = torch.tensor([[j, a] for j in range(bank.scale) for a in range(bank.angles)])
        for name in case.outputs:
            match = re.fullmatch(r"(phi|psi)_level(\d+)", name)
            if match and match[1] == "phi":
                found[name] = torch.from_numpy(bank.phi_level(int(match[2])))
            elif match:
                found[name] = torch.from_numpy(bank.psi_level(int(match[2]))[int(match[2]) :]).flatten(0, 1)
        return _with_kept(case, found)

    return Adapted(lambda inputs: _objective(case, module, inputs), module, extra=extra, fresh=lambda n: True)
