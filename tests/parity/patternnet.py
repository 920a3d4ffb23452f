"""Responses, gates, masks, votes, patterns and boxes; config: top_filters, min_votes, quantile and the geometry."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tests.parity.core import Adapted, Case
from torchconv.analysis import patternnet as lib


def adapt(case: Case) -> Adapted:
    """The head's parameters are the state; thresholds, masks and choices of filters have no gradient."""
    weight = case.state["fc.weight"]
    head = lib.PatternNetHead(weight.shape[1], weight.shape[0])

    def forward(inputs: dict[str, Tensor]) -> Mapping[str, Tensor]:
        maps = inputs["features"]
        response, _ = lib.respond(maps)
        score = _located(case, head, maps).score
        return {"max_response": response, "gate": head.gate(response), "logits": head(maps), "pattern_score": score}

    return Adapted(forward, head, extra=lambda inputs: _mined(case, head, inputs))


def _sets(case: Case, head: lib.PatternNetHead) -> list[tuple[int, ...]]:
    top, positive = case.config.get("top_filters", 5), case.config.get("positive_only", False)
    return lib.class_filters(head.fc.weight, top, positive_only=positive)


def _located(case: Case, head: lib.PatternNetHead, maps: Tensor) -> lib.Located:
    config = case.config
    numbers = (("stride", 1.0), ("receptive_field", 1.0), ("centre_offset", 0.0))
    thresholds = lib.binarise_thresholds(maps.detach(), config.get("quantile", 0.9))
    geometry = lib.Geometry(*(config.get(name, default) for name, default in numbers))
    return lib.locate(maps, thresholds, _sets(case, head), config.get("min_votes", 3), geometry)


def _mined(case: Case, head: lib.PatternNetHead, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    maps, sets = inputs["features"].detach(), _sets(case, head)
    thresholds = lib.binarise_thresholds(maps, case.config.get("quantile", 0.9))
    masks = lib.binarise(maps, thresholds)
    counted = lib.votes(masks, sets)
    found = _located(case, head, maps)
    widest = max(map(len, sets))
    outputs = {
        "max_position": lib.respond(maps)[1],
        "binarise_threshold": thresholds,
        "binary_mask": masks,
        "votes": counted,
        "pattern_mask": counted >= case.config.get("min_votes", 3),
        "pattern_filters": torch.tensor([[*s, *[-1] * (widest - len(s))] for s in sets]),
        "best_position": found.position,
        "box": found.box,
    }
    if "label" in inputs:
        outputs["support"] = lib.supports(found.present, inputs["label"], head.fc.out_features)
    return outputs
