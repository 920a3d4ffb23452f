"""Off-the-shelf features: post-processing, spatial search, SVMs, retrieval metrics; the tensors tell the kind."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tests.parity.core import Adapted, Case
from torchconv.analysis import offtheshelf as lib

Tensors = Mapping[str, Tensor]


def adapt(case: Case) -> Adapted:
    """Kinds are told by their inputs."""
    if "train" in case.inputs:
        return _svm(case)
    if "database" in case.inputs:
        return _postprocess(case)
    if "reference" in case.inputs or any(n.startswith(("boxes", "crops")) for n in case.outputs):
        return _spatial(case)
    return Adapted(_metrics)


def _postprocess(case: Case) -> Adapted:
    config = case.config
    post = lib.Postprocess(
        int(config.get("pca_dim", 500)),
        float(config.get("power", 2.0)),
        bool(config.get("whiten", True)),
        float(config.get("eps", 0.0)),
    )

    def forward(inputs: dict[str, Tensor]) -> Tensors:
        database, query = inputs["database"], inputs["query"]
        post.fit(database)
        final, queries = post(database), post(query)
        found = lib.spatial_search(queries.detach(), final.detach())
        return {
            "mean": post.mean,
            "components": post.components,
            "variances": post.variances,
            "database_unit": lib.unit(database),
            "database_final": final,
            "query_whitened": post.project(query),
            "query_final": queries,
            "distance": found.distance,
            "ranking": found.ranking,
        }

    # The cotangent belongs to query_final, whose shape query_whitened has as well.
    if "cotangent" in case.inputs:
        case.inputs["cotangent.query_final"] = case.inputs.pop("cotangent")
    return Adapted(forward)


def _spatial(case: Case) -> Adapted:
    config = case.config

    def forward(inputs: dict[str, Tensor]) -> Tensors:
        found: dict[str, Tensor] = {}
        if "reference" in inputs:
            search = lib.spatial_search(inputs["query"], inputs["reference"], nearest=True)
            found |= {"distance": search.distance, "ranking": search.ranking}
            assert search.nearest is not None
            found["nearest_patch"] = search.nearest
        for k, (width, height) in enumerate(config.get("image_sizes_wh", [])):
            found[f"boxes{k}"] = lib.patch_boxes(int(config.get("levels_reference", 4)), width, height)
            found[f"crops{k}"] = lib.crop_boxes(width, height)
        return found

    return Adapted(forward)


def _svm(case: Case) -> Adapted:
    config = case.config
    name = str(config.get("loss", "hinge")).lower()
    loss = "squared_hinge" if "squared" in name or "l2" in name else "hinge"
    ties = "margin" if "margin" in str(config.get("vote_ties", "lowest class")) else "lowest"
    C, bias = float(config.get("C", 1.0)), bool(config.get("bias", False))

    def forward(inputs: dict[str, Tensor]) -> Tensors:
        x, y, test, truth = (inputs[n] for n in ("train", "train_label", "test", "test_label"))
        fits = {
            scheme: lib.fit_svm(x, y, C, scheme=scheme, loss=loss, bias=bias, tol=1e-10, max_iter=10**7)
            for scheme in ("one-vs-all", "one-vs-one")
        }
        ova, ovo = fits["one-vs-all"], fits["one-vs-one"]
        assert ovo.pairs is not None
        decision, predicted = ova.decision(test), ova.predict(test)
        positive = truth[:, None] == ova.classes
        found = {
            "ova_weight": ova.weight,
            "ova_bias": ova.bias,
            "ova_objective": ova.objective,
            "ova_decision": decision,
            "ova_prediction": predicted,
            "ovo_pairs": ovo.pairs,
            "ovo_weight": ovo.weight,
            "ovo_bias": ovo.bias,
            "ovo_objective": ovo.objective,
            "ovo_decision": ovo.decision(test),
            "ovo_votes": ovo.votes(test),
            "ovo_prediction": ovo.predict(test, ties),
            "ap": lib.average_precision(decision, positive),
            "ap11": lib.average_precision(decision, positive, "11-point"),
            "mean_class_accuracy": lib.mean_class_accuracy(predicted, truth),
        }
        if "auc" in case.outputs:
            found["auc"] = lib.area_under_roc(decision, positive)
        return found

    return Adapted(forward)


def _metrics(inputs: dict[str, Tensor]) -> Tensors:
    found: dict[str, Tensor] = {}
    if "ranking" in inputs:
        ranking, positive, junk = inputs["ranking"], inputs["positive"], inputs.get("junk")
        found["ap_trapezoid"] = lib.ranking_precision(ranking, positive, junk)
        found["ap_rectangle"] = lib.ranking_precision(ranking, positive, junk, "rectangle")
    if "ukb_features" in inputs:
        x = inputs["ukb_features"]
        found["ukb_score"] = lib.group_score(lib.spatial_search(x, x).ranking)
    return found
