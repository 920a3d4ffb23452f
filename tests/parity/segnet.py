"""SegNet and SegNet-Basic in inference and in training with the loss, scores, pooling with places and unpooling."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from tests.parity.core import Adapted, Case
from torchconv.models.segment.segnet import SegNet, SegNetBasic, convert_official, read_official
from torchconv.ops.segnet import index_pool, index_unpool, plane_indices
from torchconv.training.segmentation import (
    ConfusionMatrix,
    boundary_f1,
    boundary_map,
    median_frequency_weights,
    weighted_cross_entropy,
)


def pooling(case: Case) -> Adapted:
    kernel = case.config.get("kernel", 2)
    stride = case.config.get("stride", kernel)
    ceil = case.config.get("ceil", True)

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x = inputs["x"]
        pooled, offsets = index_pool(x, kernel, stride, ceil)
        unpooled = index_unpool(pooled, offsets, x.shape[2:], kernel, stride)
        indices = plane_indices(offsets, x.shape[2:], kernel, stride)
        # The cotangent belongs to the unpooled map, so that it stands first.
        return {"unpooled": unpooled, "pooled": pooled, "indices": indices}

    return Adapted(forward)


def network(case: Case) -> Adapted:
    # All sizes are as the parameters have them.
    build = SegNet if "conv1_1.weight" in case.state else SegNetBasic
    module = build(**read_official(convert_official(case.state)))
    statistics: dict[str, Tensor] = {}

    def note(name: str, x: Tensor) -> None:
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        statistics.update({f"batch_mean.{name}": mean, f"batch_var.{name}": variance})

    for name, norm in module.named_children():
        if isinstance(norm, nn.BatchNorm2d):
            norm.register_forward_pre_hook(lambda _, given, name=name: note(name, given[0]))

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        logits = module(inputs["x"])
        # The cotangent belongs to the logits, so that they stand first.
        outputs = {"logits": logits, "prob": logits.softmax(1)}
        if "label" in inputs:
            ignored = case.config.get("ignore_label", case.config.get("ignore"))
            loss = weighted_cross_entropy(logits, inputs["label"], inputs.get("class_weight"), ignored)
            outputs["loss"] = loss
        return {**outputs, **statistics}

    return Adapted(
        forward,
        module,
        state=convert_official,
        names=lambda name: name.replace("_bn.scale", "_bn.weight").replace("_bn.shift", "_bn.bias"),
        fresh=lambda name: name.endswith("num_batches_tracked"),
    )


def scores(case: Case) -> Adapted:
    config = case.config
    ignored = config.get("ignore", config.get("ignore_label"))

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        predicted, label = inputs["pred"], inputs["label"]
        classes = config.get("n_classes") or len(case.outputs["confusion"])
        confusion = ConfusionMatrix(classes, ignored)
        confusion.update(predicted, label)
        found = confusion.scores(absent="zero")
        values = {
            "global_accuracy": found.global_accuracy,
            "class_average_accuracy": found.mean_accuracy,
            "mean_iou": found.mean_iou,
        }
        outputs = {name: torch.tensor([value], dtype=torch.float64) for name, value in values.items()}
        outputs["confusion"] = confusion.matrix.double()
        for name, counted in (("all_pixels", True), ("exclude_ignored", False)):
            weights = median_frequency_weights(label, classes, ignored, counted)
            outputs[f"median_freq_weight_{name}"] = weights.double()
        whole = inputs.get("label_bf", label)
        for name in case.outputs:
            if drawn := re.fullmatch(r"boundary_map_class(\d+)_image(\d+)", name):
                outputs[name] = boundary_map(whole[int(drawn[2])] == int(drawn[1])).byte()
            if matching := re.fullmatch(r"bf_per_image_(one_to_one|relaxed)", name):
                by_class = boundary_f1(predicted, whole, classes, config.get("max_dist", 0.0075), matching[1])
                outputs[name] = by_class.nanmean(1)
        return outputs

    return Adapted(forward)


def adapt(case: Case) -> Adapted:
    """Told apart by what the file holds."""
    if case.state:
        return network(case)
    if "pred" in case.inputs:
        return scores(case)
    return pooling(case)
