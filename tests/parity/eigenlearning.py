"""Predicted errors and kernels of wide networks; the outputs of a case tell which it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.parity.core import Adapted, Case, ParityError
from torchconv.theory import eigenlearning as lib
from torchconv.theory import ntk

Tensors = Mapping[str, Tensor]
LAYERS = {"conv": ntk.Conv, "relu": ntk.ReLU, "erf": ntk.Erf, "avgpool": ntk.AvgPool, "gap": ntk.GlobalAvgPool}
LAYERS |= {"flatten": ntk.Flatten, "dense": ntk.Dense}


def adapt(case: Case) -> Adapted:
    """Choose by what is asked for."""
    config = case.config
    if "arch" in config:
        return Adapted(lambda inputs: _kernels(inputs, config, case.outputs))
    if "alpha_beta" in config:
        return Adapted(lambda inputs: _fitting(inputs["fitting_ratio"], config))
    if "nkd" in config:
        return Adapted(lambda inputs: _features(inputs, config))
    return Adapted(lambda inputs: _regression(inputs, config))


def _layer(entry: list[Any]) -> Any:
    name, *arguments = entry
    if name not in LAYERS:
        raise ParityError(f"unknown layer {entry!r}")
    arguments = [tuple(a) if isinstance(a, list) else a for a in arguments]
    if name == "avgpool":
        if arguments[2:] not in ([], ["VALID"]):
            raise ParityError(f"pooling {entry!r}: only VALID windows have a meaning here")
        arguments = arguments[:2]
    return LAYERS[name](*arguments)


def _kernels(inputs: dict[str, Tensor], config: dict[str, Any], asked: Tensors) -> Tensors:
    x1, x2 = inputs["x1"], inputs.get("x2")
    kind = config["arch"]
    if kind == "fc":
        layers: Any = ntk.fully_connected(config["depth"])
        x1, x2 = x1.flatten(1), None if x2 is None else x2.flatten(1)
    elif kind == "myrtle":
        layers = ntk.myrtle(config["depth"], config.get("input_size", x1.shape[2]))
    else:
        layers = [_layer(entry) for entry in config["layers"]]
    found = dict(zip(("nngp_11", "ntk_11"), ntk.nngp_ntk(x1, None, layers), strict=True))
    if any(name.endswith("_12") for name in asked):
        found |= zip(("nngp_12", "ntk_12"), ntk.nngp_ntk(x1, x2, layers), strict=True)
    return found


def _regression(inputs: dict[str, Tensor], config: dict[str, Any]) -> Tensors:
    found = lib.eigenframework(
        inputs["eigenvalues"],
        inputs["coefficients"],
        config["n"],
        ridge=config.get("ridge", 0.0),
        noise_std=config.get("noise_std", 0.0),
    )
    numbers = {
        "kappa": found.kappa,
        "overfitting_coeff": found.overfitting,
        "learnability": found.learnability,
        "test_mse": found.test_mse,
        "train_mse": found.train_mse,
    }
    as_tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
    return {**as_tensors, "eigenlearnabilities": found.learnabilities}


def _features(inputs: dict[str, Tensor], config: dict[str, Any]) -> Tensors:
    task = inputs["eigenvalues"], inputs["coefficients"]
    noise, rows = config.get("noise_std", 0.0), [[math.inf if v is None else v for v in row] for row in config["nkd"]]
    found = [lib.eigenframework(*task, n, k, ridge, noise) for n, k, ridge in rows]
    names = {"kappa": "kappa", "gamma": "gamma", "z": "z", "q": "q", "prefactor": "overfitting"}
    names |= {"test_mse": "test_mse", "train_mse": "train_mse"}
    tables = {a: torch.tensor([getattr(f, b) for f in found], dtype=torch.float64) for a, b in names.items()}
    best = lib.optimal_ridge(*task, *rows[0][:2], noise)
    tables["optimal_ridge"] = torch.tensor(best.ridge, dtype=torch.float64)
    tables["optimal_test_mse"] = torch.tensor(best.test_mse, dtype=torch.float64)
    return tables


def _fitting(ratio: Tensor, config: dict[str, Any]) -> Tensors:
    powers, noises, n = config["alpha_beta"], config["sigma2_rel"], config["n"]
    errors = [[lib.power_law_error(ratio, n, a, b, noise) for noise in noises] for a, b in powers]
    best = [[lib.optimal_fitting_ratio(a, b, noise) for noise in noises] for a, b in powers]
    return {
        "test_mse": torch.stack([torch.stack(row) for row in errors]),
        "optimal_ratio": torch.tensor(best, dtype=torch.float64),
    }
