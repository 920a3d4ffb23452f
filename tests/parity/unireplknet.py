"""UniRepLKNet: the re-parameterised convolution, block, network, GRN, ERF, and the embeddings of other signals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.parity.core import Adapted, Case, ParityError
from torchconv.analysis.erf import contribution_map, high_contribution, log_normalised
from torchconv.models.classify.unireplknet import UniRepLKNet, UniRepLKNetBlock
from torchconv.models.classify.unireplknet_points import PointProjection
from torchconv.models.classify.unireplknet_series import StationEmbedding, decompose_series, video_to_image
from torchconv.ops.unireplknet import GRN, DilatedReparamConv2d

# Options of the authors' constructors that choose an implementation, not a result.
WITHOUT_EFFECT = {"attempt_use_lk_impl", "disable_iGEMM", "with_cp", "use_sync_bn", "init_cfg", "thresholds"}
WITHOUT_EFFECT |= {"imgblock_dim"}


def options(case: Case, *left_out: str, **renamed: str) -> dict[str, Any]:
    kept = {k: v for k, v in case.config.items() if k not in WITHOUT_EFFECT and k not in left_out}
    return {renamed.get(k, k): v for k, v in kept.items()}


def merging(module: Any, state_name: str, merged_state: Any) -> Any:
    """Extra outputs: the merged module's state under ``state_name`` and its output on x."""

    def extra(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            y = module.merge()(inputs["x"])
            found = {f"{state_name}.{n}": t for n, t in merged_state().items()}
        deployed = {f"y_deploy.feat{i}": t for i, t in enumerate(y)} if isinstance(y, list) else {"y_deploy": y}
        return {**found, **deployed}

    return extra


def convolution(case: Case) -> Adapted:
    channels = case.config["channels"]
    module = DilatedReparamConv2d(channels, **options(case, "channels"))

    def state() -> dict[str, Tensor]:
        return {f"lk_origin.{n}": t for n, t in module.merge().state_dict().items()}

    return Adapted(lambda i: {"y": module(i["x"])}, module, extra=merging(module, "merged", state))


def block(case: Case) -> Adapted:
    module = UniRepLKNetBlock(**options(case))
    extra = merging(module, "deploy_state", lambda: module.merge().state_dict())
    return Adapted(lambda i: {"y": module(i["x"])}, module, extra=extra)


def network(case: Case) -> Adapted:
    features = case.config.get("init_cfg") is not None or case.config.get("num_classes", 1000) is None
    settings = options(case, "num_classes", "num_images")
    if not features:
        settings["num_classes"] = case.config.get("num_classes", 1000)
    module = UniRepLKNet(**settings, features_only=features)
    if "thresholds" in case.config:
        return Adapted(lambda i: receptive_field(module, i, case.config["thresholds"]), module)

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        y = module(inputs["x"])
        return {f"feat{i}": t for i, t in enumerate(y)} if features else {"y": y}

    extra = merging(module, "deploy_state", lambda: module.merge().state_dict())
    return Adapted(forward, module, extra=extra)


def receptive_field(module: nn.Module, inputs: dict[str, Tensor], thresholds: list[float]) -> dict[str, Tensor]:
    found = {n.removeprefix("image"): contribution_map(module, x).sum(0) for n, x in inputs.items()}
    mean = torch.stack(list(found.values())).mean(0)
    log_map = log_normalised(mean)
    sides, ratios = high_contribution(log_map, thresholds)
    return {
        **{f"score{n}": t for n, t in found.items()},
        "score_mean": mean,
        "score_log_normalised": log_map,
        "side_length": torch.tensor([-1 if (s := sides[t]) is None else s for t in thresholds]),
        "area_ratio": torch.tensor([-1 if (r := ratios[t]) is None else r for t in thresholds], dtype=torch.float64),
    }


def response_norm(case: Case) -> Adapted:
    module = GRN(**options(case))
    return Adapted(lambda i: {"y": module(i["x"])}, module)


def points(case: Case) -> Adapted:
    module = PointProjection(**options(case, "imagenet_default_mean", "imagenet_default_std"))
    mean, std = case.config.get("imagenet_default_mean"), case.config.get("imagenet_default_std")
    if mean is not None:
        module.mean = torch.tensor(mean)[:, None, None]
    if std is not None:
        module.std = torch.tensor(std)[:, None, None]

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"view_points": module.view_points(inputs["points"]), "y": module(inputs["points"])}

    return Adapted(forward, module)


def stations(case: Case) -> Adapted:
    module = StationEmbedding(stations=case.inputs["stations"], **options(case, "root_path"))

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        # The station table is in float64 and with it, here, the module.
        return {"y": module(inputs["x"].to(case.dtype), inputs["x_mark"])}

    return Adapted(forward, module)


def decomposition(case: Case) -> Adapted:
    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        seasonal, trend = decompose_series(inputs["x"], case.config.get("kernel_size", 25))
        return {"seasonal": seasonal, "trend": trend}

    return Adapted(forward)


def adapt(case: Case) -> Adapted:
    keys = set(case.config)
    if "channels" in keys:
        return convolution(case)
    if keys & {"depths", "dims", "kernel_sizes"}:
        return network(case)
    if "local_size" in keys or "points" in case.inputs:
        return points(case)
    if "d_model" in keys:
        return stations(case)
    if "dim" in keys:
        return block(case) if "kernel_size" in keys else response_norm(case)
    if "seasonal" in case.outputs:
        return decomposition(case)
    if case.inputs["x"].dim() == 5:
        return Adapted(lambda i: {"y": video_to_image(i["x"])})
    raise ParityError(f"config {case.config} names no part of this method")
