"""LightWaveS, ROCKET and MiniROCKET; the state, or the outputs that are asked for, tell which a case is."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.parity.core import Adapted, Case
from torchconv.models.sequence.lightwaves import LightWaveS, candidate_features, channel_statistics
from torchconv.models.sequence.lightwaves_features import (
    DILATIONS,
    FEATURES,
    VARIANTS,
    LightWaveSFeatures,
    base_kernels,
)
from torchconv.models.sequence.lightwaves_rocket import MiniRocket, Rocket
from torchconv.models.sequence.lightwaves_selection import anova_select, mrmr_select


def adapt(case: Case) -> Adapted:
    """Choose by what is there."""
    if "num_features_per_dilation" in case.state:
        return _fixed(MiniRocket(case.state), case.dtype)
    if "weights" in case.state:
        return _rocket(case)
    if "ckd" in case.inputs:
        return Adapted(lambda inputs: {}, extra=lambda inputs: _transform(case, inputs))
    if {"anova_n", "mrmr_k"} & set(case.config) or case.inputs.get("X", torch.empty(0)).dim() == 2:
        return Adapted(lambda inputs: {}, extra=lambda inputs: _selection(case, inputs))
    if "X" in case.inputs:
        return Adapted(lambda inputs: {}, extra=lambda inputs: _pipeline(case, inputs))
    return Adapted(lambda inputs: {}, extra=lambda inputs: {"kernels": base_kernels(dtype=torch.float32)})


def _fixed(module: nn.Module, dtype: torch.dtype) -> Adapted:
    module.to(dtype)
    return Adapted(lambda inputs: {}, extra=lambda inputs: {"features": module(inputs["X"])})


def _rocket(case: Case) -> Adapted:
    """A config without ``normalise`` takes the input as it is."""
    module = Rocket(case.state, normalise=case.config.get("normalise", False)).to(case.dtype)
    asked = case.config.get("feature_order", "ppv,max per kernel")
    names = asked.split(" per ")[0].split(",") if isinstance(asked, str) else list(asked)
    order = [("ppv", "max").index(name.strip()) for name in names]

    def features(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        found = module(inputs["X"]).unflatten(1, (-1, 2))[..., order]
        if isinstance(asked, str) and "per kernel" not in asked:
            found = found.transpose(1, 2)
        return {"features": found.flatten(1)}

    return Adapted(lambda inputs: {}, extra=features)


def _dilations(config: dict[str, Any]) -> tuple[int, ...]:
    exponents = config.get("dilation_exponents")
    return DILATIONS if exponents is None else tuple(2**j for j in exponents)


def _order(config: dict[str, Any]) -> list[int]:
    names = config.get("feature_order") or FEATURES
    names = names.split(",") if isinstance(names, str) else names
    return [FEATURES.index(name.strip()) for name in names]


def _transform(case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    rows, dilations = inputs["ckd"], _dilations(case.config)
    steps = torch.tensor(dilations)[rows[:, 2].long()]
    found = {"dilations": steps, "paddings": 4 * steps}
    for variant, width in VARIANTS.items():
        if variant.lower() in case.outputs or ("features" in case.outputs and variant == case.config.get("variant")):
            features = LightWaveSFeatures(rows, variant=variant, dilations=dilations)(inputs["X"])
            shaped = features.view(len(features), len(rows), width // 4, 4)[..., _order(case.config)]
            found[variant.lower()] = found["features"] = shaped.flatten(2)
    return found


def _selection(case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    x, y = inputs["X"].numpy(), inputs["y"].numpy()
    found: dict[str, Any] = {}
    if "anova_idx" in case.outputs:
        number = case.config.get("anova_n", len(case.outputs["anova_idx"]))
        found["anova_idx"], found["anova_score"] = anova_select(x, y, number)
    if "mrmr_idx" in case.outputs:
        number = case.config.get("mrmr_k", len(case.outputs["mrmr_idx"]))
        found["mrmr_idx"], found["mrmr_score"], found["mrmr_relevance"] = mrmr_select(x, y, number)
    return {name: torch.from_numpy(np.asarray(value)) for name, value in found.items()}


def _pipeline(case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    config, x, y = case.config, inputs["X"].numpy(), inputs["y"].numpy()
    final = config.get("final", 500)
    variant, dilations = config.get("variant", "L1L2"), _dilations(config)
    model = LightWaveS(
        variant,
        final,
        config.get("pre_final", 3 * final),
        dilations,
        standardise=not config.get("normalised", config.get("normalized", False)),
    ).fit(x, y)
    mean, std = (
        channel_statistics(x) if model.standardise else (np.zeros(x.shape[1], x.dtype), np.ones_like(x[0, :, 0]))
    )
    scaled = (x - mean[:, None]) / std[:, None]
    first = np.stack([candidate_features(scaled[:1, c], variant, dilations)[0] for c in range(x.shape[1])])
    shape = first.shape
    found = {
        "X_scaled": scaled,
        "first_phase_features_sample0": first.reshape(-1, shape[-1]),
        "anova_idx": model.candidates_,
        "mrmr_pos": np.searchsorted(model.candidates_, model.selected_),
        "final_ckdf": np.stack(np.unravel_index(model.selected_, shape), 1),
        "kernel_matrix": model.rows_,
        "feature_mask": model.mask_,
        "features": model.transform(x),
    }
    return {name: torch.from_numpy(np.asarray(value)) for name, value in found.items()}
