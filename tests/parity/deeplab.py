"""DeepLab v2 on ResNet, at several scales, and on VGG-16; the fully connected field and the scores."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.parity.core import Adapted, Case, ParityError
from torchconv.models.segment import crf_filters
from torchconv.models.segment.crf import GaussianKernel, PairwiseTerms
from torchconv.models.segment.deeplab import RATES, DeepLabResNet, DeepLabVGG, MultiScale, convert_vgg
from torchconv.training.segmentation import ConfusionMatrix


def resnet(case: Case) -> Adapted:
    config = case.config
    prefixed = any(n.startswith("base.") for n in case.state)
    # What the config leaves out is as the parameters have it.
    state = {n.removeprefix("base."): t for n, t in case.state.items()}
    blocks = [sum(n.startswith(f"layer{i}.") and n.endswith(".reduce.conv.weight") for n in state) for i in range(2, 6)]
    module: nn.Module = DeepLabResNet(
        config.get("n_classes", len(state["aspp.c0.bias"])),
        config.get("n_blocks", blocks),
        config.get("rates", RATES[: sum(n.startswith("aspp.") and n.endswith(".weight") for n in state)]),
        config.get("base", len(state["layer1.conv1.conv.weight"])),
        case.inputs["x"].shape[1],
    )
    scales = config.get("msc_scales", (0.5, 0.75) if prefixed else None)
    if scales is not None:
        module = MultiScale(module, scales)
    prefix = "" if scales is None else "base."

    def ours(name: str) -> str:
        return prefix + name.removeprefix("base.")

    return Adapted(
        lambda inputs: {"y": module(inputs["x"])},
        module,
        state=lambda state: {ours(n): t for n, t in state.items()},
        names=ours,
    )


def vgg(case: Case) -> Adapted:
    config = case.config
    stride = config.get("output_stride", 8)
    if stride != 8:
        raise ParityError(f"output_stride {stride}: VGG-16 is built for 8 only")
    # What the config leaves out is as the parameters have it.
    scores = [tensor for name, tensor in case.state.items() if name.startswith("fc8") and name.endswith(".bias")]
    rates = config.get("rates", RATES)[: config.get("branches", len(scores))]
    divisor = config.get("channel_divisor", 64 // len(case.state["conv1_1.weight"]))
    module = DeepLabVGG(config.get("n_classes", len(scores[0])), rates, divisor, case.inputs["x"].shape[1])

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        features = module.forward_features(inputs["x"])
        return {"y": module.head(features), "pool5": features}

    return Adapted(
        forward,
        module,
        state=lambda state: {convert_vgg(n): t for n, t in state.items()},
        names=convert_vgg,
    )


def padded_lattice(features: Tensor) -> crf_filters.Filter:
    """The library of the golden numbers works on four points at once and fills up with points at the origin.

    They carry no values, but their corners can join others.
    """
    count = features.shape[1]
    missing = -count % 4
    apply = lattice_filter(F.pad(features, (0, 0, 0, missing)))
    return lambda v: apply(F.pad(v, (0, 0, 0, missing)))[:, :count]


lattice_filter = crf_filters.lattice_filter


def compatibility(case: Case, weight: Any, labels: int) -> Any:
    """A number for Potts, or a vector or matrix, as the config or the inputs give it."""
    compat = case.inputs.get("compat", case.config.get("compat", "potts"))
    weight = weight if isinstance(weight, int | float) else torch.as_tensor(weight, dtype=torch.float64)
    if compat == "potts" if isinstance(compat, str) else compat is None:
        return weight
    if isinstance(compat, str):
        if isinstance(weight, Tensor):
            return weight
        if compat == "diagonal":
            return torch.full((labels,), -float(weight), dtype=torch.float64)
        if compat in ("matrix", "full"):
            return -float(weight) * torch.eye(labels, dtype=torch.float64)
        raise ParityError(f"compat {compat!r}: expected potts, diagonal, matrix or numbers")
    return weight * torch.as_tensor(compat, dtype=torch.float64)


def field(case: Case) -> Adapted:
    config = case.config
    normalization, iterations = config.get("normalization", "after"), config.get("iterations", 10)
    kernels = [
        GaussianKernel(1.0, config.get("pos_xy_std", 3.0)),
        GaussianKernel(1.0, config.get("bi_xy_std", 49.0), config.get("bi_rgb_std", 5.0)),
    ]

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        energies = inputs["unary"] if "unary" in inputs else -inputs["probmap"].log()
        weights = [config.get("pos_w", 3.0), config.get("bi_w", 4.0)]
        weights = [compatibility(case, w, len(energies)) for w in weights]
        image = inputs["image"].movedim(-1, 0)[None]
        given: dict[str, Any] = {"normalization": normalization, "dtype": energies.dtype}
        terms = PairwiseTerms(
            image, kernels, method="exact", include_self=config.get("include_self", True), max_pairs=4096, **given
        )
        found = [log_q[0].exp() for log_q in terms.mean_field(energies[None], iterations, weights, history=True)]
        outputs = {"Q": found[-1], "Q_per_iteration": torch.stack(found)}
        outputs["kl"] = terms.objective(found[-1][None], energies[None], weights)
        if "Q_permutohedral" in case.outputs:
            with patch.object(crf_filters, "lattice_filter", padded_lattice):
                given["dtype"] = torch.float32
                lattice = PairwiseTerms(image, kernels, method="lattice", **given)
                if normalization == "none":  # the library computes N / sum(n) but does not apply it
                    scales = [unscaled(lattice.image, kernel) for kernel in kernels]
                    weights = [w * s for w, s in zip(weights, scales, strict=True)]
            outputs["Q_permutohedral"] = lattice.mean_field(energies[None], iterations, weights)[-1][0].exp()
        return outputs

    return Adapted(forward)


def unscaled(image: Tensor, kernel: GaussianKernel) -> float:
    """Mean of the sums of the lattice's rows."""
    ones = torch.ones_like(image[:, :1]).flatten(2).transpose(1, 2)
    return float(crf_filters.make_filter(image, kernel, "lattice", 1)(ones).mean())


def scores(case: Case) -> Adapted:
    config = case.config
    classes = config.get("n_class", config.get("n_classes", len(case.outputs.get("class_iou", ()))))

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        confusion = ConfusionMatrix(classes, config.get("ignore", 255))
        confusion.update(inputs["pred"], inputs["label"])
        found = confusion.scores()
        values = {
            "pixel_accuracy": found.global_accuracy,
            "mean_accuracy": found.mean_accuracy,
            "mean_iou": found.mean_iou,
            "fw_iou": found.frequency_weighted_iou,
        }
        outputs = {name: torch.tensor([value], dtype=torch.float64) for name, value in values.items()}
        return {**outputs, "class_iou": found.class_iou, "confusion": confusion.matrix.double()}

    return Adapted(forward)


def adapt(case: Case) -> Adapted:
    """Told apart by what the file holds."""
    if any(".reduce.conv." in name for name in case.state):
        return resnet(case)
    if "conv1_1.weight" in case.state:
        return vgg(case)
    if "image" in case.inputs:
        return field(case)
    if "pred" in case.inputs:
        return scores(case)
    raise ParityError("neither a network of DeepLab's names, nor input.image of a field, nor input.pred of scores")
