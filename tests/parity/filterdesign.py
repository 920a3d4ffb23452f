"""Laws, banks, learned filters, LSUV and receptive fields: what a case is follows from its tensors and config."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.parity.core import Adapted, Case
from torchconv.analysis import _filters_learned as learned
from torchconv.analysis import _filters_random as laws
from torchconv.analysis._filters_lsuv import lsuv
from torchconv.analysis._filters_pcanet import PCANet
from torchconv.analysis._filters_size import receptive_field

Compute = Callable[[dict[str, Any], dict[str, Tensor], dict[str, Tensor]], Mapping[str, Tensor]]


def adapt(case: Case) -> Adapted:
    """No case has a state."""
    compute = _which(case)
    return Adapted(lambda inputs: compute(case.config, inputs, case.outputs))


def _which(case: Case) -> Compute:
    config, inputs, outputs = case.config, set(case.inputs), set(case.outputs)
    if "table" in outputs:
        return _scales
    if inputs & {"A", "D"} and not inputs & {"X"}:
        return _orthogonal
    if "images" in inputs:
        return _pcanet if {"L1", "codes", "filters1"} & (set(config) | outputs) else _zca
    if "windows" in inputs:
        return _conv_kmeans
    if "D0" in inputs:
        return _spherical
    if "map" in inputs:
        return _som
    if {"D", "X"} <= inputs:
        return _sparse
    if "centroids" in inputs:
        return lambda _, i, __: {"code": learned.triangle_code(i["X"], i["centroids"])}
    if "W0" in inputs:
        return _lsuv
    if "wavelengths" in config or "bank" in outputs:
        return _gabor
    return _fields if config and set(config) >= outputs else _dct


def _scales(config: dict[str, Any], _: dict[str, Tensor], __: dict[str, Tensor]) -> dict[str, Tensor]:
    options = {k: config[k] for k in ("gain", "negative_slope", "groups", "fan_out_groups") if k in config}
    rows = [laws.scales(shape, **options) for shape in config["shapes"]]
    columns = config.get("columns", list(rows[0]))
    return {"table": torch.tensor([[row[c] for c in columns] for row in rows], dtype=torch.float64)}


def _orthogonal(config: dict[str, Any], inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    if "A" in inputs:
        matrix = inputs["A"].flatten(1)
        found["weight"] = (config.get("gain", 1.0) * laws.orthonormal(matrix)).reshape(outputs["weight"].shape)
    if "D" in inputs:
        found["delta"] = laws.delta_orthogonal_from(inputs["D"], outputs["delta"].shape[2:])
    return found


def _dct(_: dict[str, Any], __: dict[str, Tensor], outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name in outputs:
        sizes, _, axes = name.removeprefix("k").partition("_")
        kernel = [int(k) for k in sizes.split("x")]
        if len(kernel) == 1:
            kernel *= int(axes.removesuffix("d") or 2)
        found[name] = laws.dct_bank(kernel, dtype=torch.float64)
    return found


def _angle(text: float | str) -> float:
    """Numbers, or text such as "pi", "-pi/2", "3*pi/4", "0.5pi"."""
    if not isinstance(text, str):
        return float(text)
    match = re.fullmatch(r"\s*(-?)\s*([\d.]*)\s*\*?\s*(pi)?\s*(?:/\s*([\d.]+))?\s*", text)
    assert match, text
    value = float(match[2] or 1) * (math.pi if match[3] else 1) / float(match[4] or 1)
    return -value if match[1] else value


def _gabor(config: dict[str, Any], _: dict[str, Tensor], __: dict[str, Tensor]) -> dict[str, Tensor]:
    names = ("sigma_over_lambda", "gamma", "zero_mean", "unit_norm", "orientations")
    options = {k: config[k] for k in names if k in config}
    if "phases" in config:
        options["phases"] = [_angle(p) for p in config["phases"]]
    if "wavelengths" in config:
        options["wavelengths"] = config["wavelengths"]
    return {"bank": laws.gabor_bank(config["kernel_size"], dtype=torch.float64, **options)}


def _zca(config: dict[str, Any], inputs: dict[str, Tensor], __: dict[str, Tensor]) -> dict[str, Tensor]:
    x = learned.patches(inputs["images"], config["kernel_size"], config.get("stride", 1))
    found = learned.zca(x, config.get("eps", 0.1))
    return {"mean": found.mean, "covariance": found.covariance, "zca": found.matrix, "whitened": found(x)}


def _pcanet(config: dict[str, Any], inputs: dict[str, Tensor], __: dict[str, Tensor]) -> dict[str, Tensor]:
    net = PCANet(
        config.get("kernel_size", 7),
        config.get("L1", 8),
        config.get("L2", 8),
        block=config.get("block", 7),
        overlap=config.get("overlap", 0.0),
    ).fit(inputs["images"])
    return {
        "filters1": net.weight1,
        "filters2": net.weight2,
        "eigenvalues1": net.eigenvalues1,
        "eigenvalues2": net.eigenvalues2,
        "codes": net.codes(inputs["images"]),
        "features": net.transform(inputs["images"]),
    }


def _conv_kmeans(config: dict[str, Any], inputs: dict[str, Tensor], __: dict[str, Tensor]) -> dict[str, Tensor]:
    centroids = inputs["centroids"]
    for _ in range(config.get("iterations", 1)):
        step = learned.convolutional_kmeans_step(inputs["windows"], centroids)
        centroids = step.centroids
    names = ("row", "column") if len(step.corner) == 2 else ("position",)
    corner = dict(zip(names, step.corner, strict=True))
    return {"centroids": step.centroids, "assignment": step.assignment, **corner}


def _spherical(config: dict[str, Any], inputs: dict[str, Tensor], __: dict[str, Tensor]) -> dict[str, Tensor]:
    d, assignment = learned.spherical_kmeans(inputs["X"], inputs["D0"], config.get("iterations", 10))
    return {"D": d, "assignment": assignment}


def _sparse(config: dict[str, Any], inputs: dict[str, Tensor], __: dict[str, Tensor]) -> dict[str, Tensor]:
    x, d, penalty = inputs["X"], inputs["D"], config["lambda"]
    code = learned.sparse_code(x, d, penalty)
    objective = 0.5 * (x - code @ d).square().sum(1) + penalty * code.abs().sum(1)
    return {"code": code, "objective": objective}


def _som(config: dict[str, Any], inputs: dict[str, Tensor], __: dict[str, Tensor]) -> dict[str, Tensor]:
    units = inputs["map"]
    grid = config.get("grid", units.shape[:-1])
    found = learned.self_organising_map(
        inputs["X"],
        units.reshape(*grid, -1),
        config.get("lr0", 0.5),
        config.get("sigma0", 1.5),
        config.get("T"),
        config.get("epochs", 1),
    )
    return {"map": found.reshape(units.shape)}


_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "none": nn.Identity,
    "linear": nn.Identity,
    "identity": nn.Identity,
}


def _lsuv(config: dict[str, Any], inputs: dict[str, Tensor], __: dict[str, Tensor]) -> dict[str, Tensor]:
    weights = {n: inputs[n] for n in sorted(inputs, key=lambda n: int(n[1:]) if n[1:] else -1) if n[0] == "W"}
    activation = str(config.get("activation", "relu")).split()[0].lower()
    stages: list[nn.Module] = []
    for weight in weights.values():
        if weight.dim() == 2:
            layer: Any = nn.Linear(weight.shape[1], weight.shape[0])
        else:
            conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[weight.dim() - 3]
            groups, kernel = config.get("groups", 1), tuple(weight.shape[2:])
            settings = {k: config.get(k, d) for k, d in (("stride", 1), ("padding", 0), ("dilation", 1))}
            layer = conv(weight.shape[1] * groups, weight.shape[0], kernel, groups=groups, **settings)
        layer = layer.to(weight.dtype)
        layer.weight.data.copy_(weight)
        stages += [layer, _ACTIVATIONS[activation]()]
    model = nn.Sequential(*stages)
    lsuv(model, inputs["x"], tol=config.get("tol", 0.1), max_iter=config.get("max_iter", 10), orthonormal=False)
    layers = [m for m in model if hasattr(m, "weight")]
    found = {n: m.weight for n, m in zip(weights, layers, strict=True)}
    return {**found, "y": model(inputs["x"])}


def _fields(config: dict[str, Any], _: dict[str, Tensor], outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, expected in outputs.items():
        field, jump = receptive_field(config[name])
        # (receptive field, jump), stored as the file says
        found[name] = torch.tensor([field, jump], dtype=expected.dtype)
    return found
