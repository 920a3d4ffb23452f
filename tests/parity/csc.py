"""Sparse codes, learned dictionaries, log-Gabor kernels and the preparation of images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.parity.core import Adapted, Case, ParityError
from torchconv.theory import csc, csc_gabor, csc_images

Tensors = Mapping[str, Tensor]
OPTIONS = {"MaxMainIter": "max_iter", "RelStopTol": "tol", "RelaxParam": "relax", "rho": "rho"}
OPTIONS |= {"NonNegCoef": "non_negative", "AuxVarObj": "objective_at_codes"}
SILENT = ("Verbose", "FastSolve", "AutoRho", "HighMemSolve", "LinSolveCheck", "StatusHeader", "DataType")
ADAPTATION = {"Period": "period", "AutoScaling": "auto_scaling", "Scaling": "scaling"}
ADAPTATION |= {"RsdlRatio": "ratio", "RsdlTarget": "target"}


def adapt(case: Case) -> Adapted:
    """Choose by the inputs."""
    config = case.config
    if "D0" in case.inputs:
        return Adapted(lambda inputs: _online(inputs, config))
    if "D" in case.inputs:
        return Adapted(lambda inputs: _codes(inputs, config, case.outputs))
    if "image" in case.inputs:
        return Adapted(lambda inputs: _prepared(inputs["image"], config))
    return Adapted(lambda inputs: _kernels(config))


def _options(given: Mapping[str, Any], auto: csc.AutoRho) -> dict[str, Any]:
    unknown = set(given) - set(OPTIONS) - set(SILENT)
    if unknown:
        raise ParityError(f"unknown options {sorted(unknown)}")
    adaptation = dict(given.get("AutoRho", {}))
    found = {ours: given[name] for name, ours in OPTIONS.items() if given.get(name) is not None}
    if not adaptation.pop("Enabled", True):
        return {**found, "auto_rho": None}
    changes = {ADAPTATION[name]: value for name, value in adaptation.items() if name in ADAPTATION}
    values = {**vars(auto), **changes}
    return {**found, "auto_rho": csc.AutoRho(**values)}


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _codes(inputs: dict[str, Tensor], config: dict[str, Any], asked: Tensors) -> Tensors:
    d, s = inputs["D"].movedim(-1, 0), inputs["S"]
    many = s.dim() == 3
    s = s.movedim(-1, 0) if many else s
    weight: Any = inputs.get("l1_weight", 1.0)
    if isinstance(weight, Tensor) and weight.dim() == 5:  # (H, W, C = 1, K, M)
        weight = weight.squeeze(2).permute(2, 3, 0, 1)
        weight = weight if many else weight[0]
    elif isinstance(weight, Tensor) and weight.dim() == d.dim():
        weight = weight.movedim(-1, 0)
    found = csc.cbpdn(d, s, config.get("lmbda"), l1_weight=weight, **_options(config.get("options", {}), csc.AutoRho()))
    again = csc.reconstruct(d, found.maps)
    named: dict[str, Tensor] = {
        "X": found.maps.permute(2, 3, 0, 1) if many else found.maps.movedim(0, -1),
        "n_iter": torch.tensor(found.iterations),
        "reconstruction": again.movedim(0, -1) if many else again,
        "sparseness": _scalar(found.sparseness),
        **{name: torch.tensor(values, dtype=torch.float64) for name, values in vars(found.trace).items()},
    }
    if "psnr" in asked:
        named["psnr"] = _scalar(csc_images.psnr(again, s))
    if "ssim" in asked:
        named["ssim"] = _scalar(csc_images.ssim(again, s))
    return {name: value for name, value in named.items() if name in asked}


def _online(inputs: dict[str, Tensor], config: dict[str, Any]) -> Tensors:
    settings = {name: config[name] for name in ("eta_a", "eta_b", "zero_mean") if name in config}
    options = _options(config.get("cbpdn", {}), csc.OnlineDictionary.AUTO_RHO)
    learner = csc.OnlineDictionary(inputs["D0"].movedim(-1, 0), config.get("lmbda"), **settings, **options)
    found: dict[str, Tensor] = {"D_init": learner.dictionary.movedim(0, -1)}
    rows = []
    images = inputs["S"] if inputs["S"].dim() == 3 else inputs["S"].unsqueeze(-1)
    for number, image in enumerate(images.unbind(-1), start=1):
        done = learner.step(image)
        found[f"D_{number}"] = learner.dictionary.movedim(0, -1)
        found[f"Z_{number}"] = done.codes.maps.movedim(0, -1)
        rows.append((done.eta, done.codes.trace.objective[-1], done.moved, done.violation))
    table = torch.tensor(rows, dtype=torch.float64).T
    return {**found, **dict(zip(("eta", "objective", "delta_D", "constraint_violation"), table, strict=True))}


def _kernels(config: dict[str, Any]) -> Tensors:
    size = (config["size"][0], config["size"][1])
    shape = {"size": size, "sf_0": config.get("sf_0", 0.4), "b_sf": config.get("B_sf", 0.4)}
    counts = {"n_theta": config["N_theta"], "n_b_theta": config.get("N_Btheta", 1), "n_phase": config.get("N_phase", 2)}
    kernels, parameters = csc_gabor.log_gabor_dictionary(config["kind"], **shape, **counts)
    thetas = parameters[:, 0].unique()
    radius, angle = csc_gabor.frequencies(size)
    example = csc_gabor.envelope(float(thetas[min(1, len(thetas) - 1)]), float(parameters[0, 1]), **shape)
    return {
        "D": kernels.movedim(0, -1),
        "params": parameters,
        "freq_radius": radius,
        "freq_angle": angle,
        "mask": csc_gabor.mask(size),
        "retina": csc_gabor.retina(size),
        "envelope_example_real": example.real,
        "envelope_example_imag": example.imag,
    }


def _prepared(image: Tensor, config: dict[str, Any]) -> Tensors:
    normalised, mean, divisor = csc_images.local_contrast_normalise(image, config.get("lcn_n", 7))
    low, high = csc_images.tikhonov_split(image, config.get("tik_lambda", 10.0), config.get("tik_pad", 16))
    names = {"white_f_0": "f_0", "white_alpha": "alpha", "white_steepness": "steepness"}
    white = {ours: config[name] for name, ours in names.items() if name in config}
    return {
        "lcn": normalised,
        "lcn_mean": mean,
        "lcn_norm": divisor,
        "tikhonov_low": low,
        "tikhonov_high": high,
        "whitened": csc_images.whiten(image, **white),
        "whitening_filter": csc_images.whitening_filter((image.shape[-2], image.shape[-1]), **white),
    }
