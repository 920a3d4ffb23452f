"""Hierarchical kernels, spectra, one-layer kernels and kernel regression: what the config and the outputs ask for."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from tests.parity.core import Adapted, Case
from torchconv.theory.widecnn import (
    convolutional_kernel,
    degeneracy,
    funk_hecke,
    hierarchical_kernels,
    laplacian_kernel,
    local_kernel,
    ridge_regression,
    torus_spectrum,
)


def adapt(case: Case) -> Adapted:
    """By the config's keys."""
    config = case.config
    if "k_train" in case.inputs:
        return Adapted(lambda inputs: _regression(config, inputs))
    if "filtersize" in config:
        return Adapted(lambda inputs: _windows(config, inputs, set(case.outputs)))
    if "grid" in config:
        return Adapted(lambda inputs: {}, extra=lambda inputs: _torus(config))
    if "x" not in case.inputs:
        return Adapted(lambda inputs: {}, extra=lambda inputs: _spheres(config, set(case.outputs)))
    return Adapted(lambda inputs: _grams(config, inputs, set(case.outputs)))


def _regression(config: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    kernels = (inputs["k_train"], inputs["y_train"], inputs["k_test"])
    prediction = ridge_regression(*kernels, ridge=config.get("ridge", 0.0))
    found = {"prediction": prediction}
    if "y_test" in inputs:
        found["mse"] = (prediction - inputs["y_test"]).square().mean()
    return found


def _windows(config: dict[str, Any], inputs: dict[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    x, sigma = inputs["x"], config.get("sigma", 1.0)
    y = inputs.get("y", x)
    found = {"laplacian": laplacian_kernel(x, y, sigma)}
    for name in wanted - {"laplacian"}:
        kind, periodic = name.split("_pbc")
        kernel = local_kernel if kind == "local" else convolutional_kernel
        stride = config.get("stride", 1)
        found[name] = kernel(x, y, config["filtersize"], sigma, stride=stride, periodic=periodic == "1")
    return found


def _torus(config: dict[str, Any]) -> dict[str, Tensor]:
    spectra = torus_spectrum(config.get("filter_sizes", (2, 2)), config["grid"], config.get("keep", 9))
    return {name: torch.from_numpy(values.copy()) for name, values in spectra.items()}


def _spheres(config: dict[str, Any], wanted: set[str]) -> dict[str, Tensor]:
    found = {}
    for name in wanted:
        kind, size = re.fullmatch(r"(rfk|ntk|degeneracy)_s(\d+)", name).groups()  # type: ignore[union-attr]
        if kind == "degeneracy":
            found[name] = torch.tensor([degeneracy(int(size), k) for k in range(config["kmax"] + 1)])
        else:
            found[name] = torch.from_numpy(funk_hecke(kind, int(size), config["kmax"]))
    return found


def _grams(config: dict[str, Any], inputs: dict[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    options = {
        "normalise": config.get("normalise", "per_patch") not in ("none", False, None),
        "reduce": config.get("reduce", "mean") not in ("none", False, None),
    }
    found = {}
    for pair, second in (("xx", None), ("xy", inputs.get("y"))):
        if pair == "xy" and second is None:
            continue
        kernels = hierarchical_kernels(inputs["x"], second, config["filter_sizes"], **options)
        for name in ("rfk", "ntk"):
            found |= dict.fromkeys((f"{name}_{pair}", f"{name}_{pair}_closed"), getattr(kernels, name))
    if "ntk_yy" in wanted or "rfk_yy" in wanted:
        kernels = hierarchical_kernels(inputs["y"], None, config["filter_sizes"], **options)
        found |= {"rfk_yy": kernels.rfk, "ntk_yy": kernels.ntk}
    return found
