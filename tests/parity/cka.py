"""CKA and its relatives, RSA, minibatch sums and two-sample tests; the tensors of a case tell its kind."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from tests.parity.core import Adapted, Case
from torchconv.analysis import cka as lib
from torchconv.analysis.rsa import COMPARISONS, DISTANCES, compare_rdms, mantel, rdm

Tensors = Mapping[str, Tensor]


def adapt(case: Case) -> Adapted:
    """Tensors are named after what they are; only those that the case asks for are computed."""
    if "batches_x" in case.inputs:
        return Adapted(_minibatch)
    if "mmd2_biased" in case.outputs or "energy_v" in case.outputs:
        return Adapted(_samples)
    if "bootstrap_indices" in case.inputs or any(n.startswith("rdm_") for n in case.outputs):
        return Adapted(_rsa)
    return _estimators(case)


def _estimators(case: Case) -> Adapted:
    sigma = case.config.get("sigma")

    def forward(inputs: dict[str, Tensor]) -> Tensors:
        x, y = inputs["x"], inputs["y"]
        k, l = lib.gram(x), lib.gram(y)  # noqa: E741
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few stimuli, on purpose
            biased, unbiased = lib.cka(x, y, estimator="biased"), lib.cka(x, y)
            found = {
                "linear_cka": biased,
                "linear_cka_unbiased": unbiased,
                "anatome_distance": 1 - biased,
                "anatome_distance_debiased": 1 - unbiased,
                "angular_cka": lib.angular_distance(x, y),
                "hsic_biased": lib.hsic(k, l, "biased"),
                "hsic_unbiased": lib.hsic(k, l),
                "linear_hsic_sum": lib.hsic(k, l, "biased") * (len(x) - 1) ** 2,
                "procrustes_1_minus_nuc": lib.procrustes_distance(x, y),
                "rbf_cka_median": lib.cka(x, y, "rbf", "biased"),
                "rbf_cka_unbiased": lib.cka(x, y, "rbf"),
                "rbf_gram_x": lib.gram(x, "rbf"),
                "sigma_x": lib.rbf_bandwidth(x),
            }
            if sigma is not None:
                found["rbf_cka_sigma"] = lib.cka(x, y, "rbf", "biased", sigma=sigma)
        if "svcca_distance_099" in case.outputs:
            found["svcca_distance_099"] = lib.svcca_distance(x, y)
        if "pwcca_distance" in case.outputs:
            found["pwcca_distance"] = lib.pwcca_distance(x, y, "orthogonal")
        return found

    gradients = {n: t for n, t in case.grads.items() if n in ("x_linear", "x_rbf_sigma")}
    if not gradients:
        return Adapted(forward)
    # Gradients of two different scalars: each enters as an input of its own name.
    case.inputs.update({n: case.inputs["x"].clone() for n in gradients})
    for name in gradients:
        case.inputs[f"cotangent.from_{name}"] = torch.ones((), dtype=case.dtype)

    def with_gradients(inputs: dict[str, Tensor]) -> Tensors:
        found = dict(forward(inputs))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if "x_linear" in gradients:
                found["from_x_linear"] = lib.cka(inputs["x_linear"], inputs["y"], estimator="biased")
            if "x_rbf_sigma" in gradients:
                found["from_x_rbf_sigma"] = lib.cka(inputs["x_rbf_sigma"], inputs["y"], "rbf", "biased", sigma=sigma)
        return found

    return Adapted(with_gradients)


def _minibatch(inputs: dict[str, Tensor]) -> Tensors:
    state = lib.MinibatchCKA()
    for x, y in zip(inputs["batches_x"], inputs["batches_y"], strict=True):
        state.update(x, y)
    return {"hsic_mean": state.hsic, "minibatch_cka": state.value(), "official_float32": state.value()}


def _rsa(inputs: dict[str, Tensor]) -> Tensors:
    x, y = inputs["x"], inputs["y"]
    found: dict[str, Tensor] = {}
    for distance in DISTANCES:
        a, b = rdm(x, distance), rdm(y, distance)
        found |= {f"rdm_{distance}_x": a, f"rdm_{distance}_y": b}
        found |= {f"{distance}_{how}": compare_rdms(a, b, how) for how in COMPARISONS}
    if "permutations" in inputs:
        test = mantel(rdm(x), rdm(y), permutations=inputs["permutations"])
        found |= {"mantel_null": test.null, "mantel_observed": test.observed}
        found |= {"mantel_p_one_sided": x.new_tensor(test.p), "mantel_p_two_sided": x.new_tensor(test.p_two_sided)}
    if "bootstrap_indices" in inputs:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for measure, name, short in (("linear-biased", "linear_cka", "cka"), ("rsa-pearson", "rsa_pearson", "rsa")):
                got = lib.interval(x, y, measure, draws=inputs["bootstrap_indices"])
                found |= {f"bootstrap_{name}": got.draws}
                found |= {f"bootstrap_ci95_{short}": x.new_tensor([got.low, got.high])}
    return found


def _samples(inputs: dict[str, Tensor]) -> Tensors:
    x, y = inputs["x"], inputs["y"]
    found = {
        "sigma2": lib.pooled_bandwidth(x, y),
        "mmd2_biased": lib.mmd2(x, y),
        "mmd2_unbiased": lib.mmd2(x, y, unbiased=True),
        "energy_v": lib.energy_distance(x, y),
        "energy_u": lib.energy_distance(x, y, unbiased=True),
        "energy1d_per_feature": lib.energy_per_feature(x, y),
        "wasserstein1_per_feature": lib.wasserstein1(x, y),
        "wasserstein1_mean": lib.wasserstein1(x, y).mean(),
    }
    if "permutations" in inputs:
        test = lib.two_sample_test(x, y, permutations=inputs["permutations"])
        found |= {"mmd_null": test.null, "mmd_p": x.new_tensor(test.p)}
    return found
