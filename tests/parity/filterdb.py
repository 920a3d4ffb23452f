"""Quality of layers, gradients of their variance ratios, and the shift between groups of filters."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.parity.core import Adapted, Case
from torchconv.analysis._filterdb_quality import LayerQuality, quality, rows, sparse_mask, sparsity, variance_ratio
from torchconv.analysis.filterdb import Basis, Study, scale, study

_METRICS = tuple(f.name for f in dataclasses.fields(LayerQuality))


def adapt(case: Case) -> Adapted:
    """Layers have a ``variance_ratio``; groups a ``kl_matrix``."""
    if any(n.startswith("group") for n in case.inputs):
        return Adapted(lambda inputs: {}, extra=lambda inputs: _shift(case, inputs))
    return Adapted(_ratios, extra=lambda inputs: _quality(case, inputs))


def _ratios(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {n: variance_ratio(rows(w)) for n, w in _layers(inputs).items()}
    # Every layer brings its own cotangent; the layers are independent, so that one sum gives all gradients.
    total = [(v * inputs[f"{n}.cotangent"]).sum() for n, v in found.items() if f"{n}.cotangent" in inputs]
    summed = {"total": torch.stack(total).sum()} if total else {}
    return {**{f"{n}.variance_ratio": v for n, v in found.items()}, **summed}


def _layers(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: w for n, w in inputs.items() if not n.endswith(".cotangent")}


def _quality(case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    eps = case.config.get("sparsity_eps", 0.01)
    outputs: dict[str, Tensor] = {}
    for name, weight in _layers(inputs).items():
        found = quality(weight, eps, min_filters=1)
        numbers: dict[str, Any] = {k: getattr(found, k) for k in _METRICS}
        # The notebooks: always 0.01, and an all-zero layer is not sparse.
        numbers["notebook_sparsity"] = sparsity(weight, 0.01) if weight.any() else 0.0
        numbers["notebook_variance_entropy"] = found.variance_entropy
        numbers["notebook_orthogonality"] = found.orthogonality
        outputs |= {f"{name}.{k}": torch.tensor(v, dtype=torch.float64) for k, v in numbers.items()}
        outputs[f"{name}.sparse_mask"] = sparse_mask(weight, eps)
    return outputs


def _shift(case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    config = case.config
    names = sorted((n for n in inputs if n.startswith("group")), key=lambda n: int(n[5:]))
    groups = {n: inputs[n] for n in names}
    x_range, weights = config.get("x_range"), config.get("weights")
    options: dict[str, Any] = {
        "bins": config.get("bins", 70),
        "x_range": None if x_range is None or isinstance(x_range, str) else tuple(x_range),
        "weights": None if weights is None or isinstance(weights, str) else weights,
        "warn": False,
    }
    found = study(groups, **options)
    basis = _signed(found.basis, case)
    found = study(groups, basis=basis, **options)
    everything = [inputs[n] for n in names]
    return {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in _outputs(found, basis, everything).items()}


def _signed(basis: Basis, case: Case) -> Basis:
    """The sign of a component is free: that of the file, where it says."""
    expected = case.outputs.get("pca_components")
    if expected is None:
        return basis
    signs = np.where((basis.components * expected.double().numpy()).sum(1) < 0, -1.0, 1.0)
    return dataclasses.replace(basis, components=basis.components * signs[:, None])


def _outputs(found: Study, basis: Basis, filters: list[Tensor]) -> dict[str, Any]:
    return {
        "scaled": scale(filters),
        "pca_mean": basis.mean,
        "pca_components": basis.components,
        "explained_variance_ratio": basis.ratio,
        "coefficients": basis.coefficients(filters),
        "range": np.array(found.x_range),
        "weights": found.weights,
        "histograms": found.histograms,
        "kl_matrix": found.matrix,
        "kl_rank": found.rank,
    }
