"""MHAF-YOLO's depthwise convolution, blocks, attention and pooling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.parity.core import Adapted, Case, ParityError
from torchconv.models.detect.boxes import select, suppress
from torchconv.models.detect.mhafyolo import MHAFYOLO, convert_official, read_official
from torchconv.models.detect.mhafyolo_graph import scale_rows
from torchconv.models.detect.mhafyolo_head import BRANCHES, anchors
from torchconv.models.detect.mhafyolo_loss import GAINS, TOPK, DetectionLoss
from torchconv.ops.mhafyolo import ConvBN, MultiKernelReparamConv2d
from torchconv.ops.mhafyolo_blocks import RepHDW2d, RepHMS2d
from torchconv.ops.mhafyolo_parts import PSA, SPPF, SCDown, _Attention, shrink


def adapt(case: Case) -> Adapted:
    """Which part it is follows from the keys of the config and the names of the state."""
    config = case.config
    if {"backbone", "head"} <= set(config):
        return _detector(case)
    if any(n.startswith(BRANCHES) for n in case.inputs):
        return _loss(case)
    if not case.state:
        return Adapted(lambda inputs: {"y": shrink(inputs["x"], config.get("down_n", 2))})
    norms = {"eps": config.get("bn_eps", 1e-3), "momentum": config.get("bn_momentum", 0.03)}
    module = _module(case, norms)

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}

    def extra(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return _merged(case, module, inputs)

    merged = any(n == "y_deploy" or n.startswith("merged.") for n in case.outputs)
    return Adapted(forward, module, extra=extra if merged else None)


def _merged(case: Case, module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name in case.outputs:
        if name == "y_deploy":
            fold: Any = module.merge
            found[name] = fold()(inputs["x"])
        elif name.startswith("merged."):
            path, _, tensor = name.removeprefix("merged.").rpartition(".")
            part: Any = module.get_submodule(path)
            found[name] = getattr(part.merge(), tensor)
    return found


def _module(case: Case, norms: dict[str, float]) -> nn.Module:
    """What the config leaves out is read off the weights."""
    config, state = case.config, case.state
    kernels = [t.shape[-1] for n, t in state.items() if n.endswith("lk_origin.weight")]
    if "dwconv.lk_origin.weight" in state:
        return MultiKernelReparamConv2d(len(state["norm.weight"]), kernel_size=kernels[0], **norms)
    if any(n.startswith("attn.") for n in state):
        share = config.get("e", config.get("expansion", 0.5))
        return PSA(config.get("c1", config.get("in_channels")), share, **norms)
    if "qkv.conv.weight" in state:
        channels = state["qkv.conv.weight"].shape[1]
        return _Attention(channels, config.get("num_heads", max(1, channels // 64)), **norms)
    if "conv.weight" in state:
        return _convolution(config, state["conv.weight"], norms)
    ends = state.get("conv1.conv.weight", state.get("cv1.conv.weight"))
    last = state.get("conv2.conv.weight", state.get("cv2.conv.weight"))
    if ends is None or last is None:
        raise ParityError(f"weights of no known block: {', '.join(sorted(state)[:3])}")
    inputs, outputs = ends.shape[1], last.shape[0]
    if any(n.startswith("RepElanMSBlock.") for n in state):
        stacks = {tuple(map(int, n.split(".")[1:3])) for n in state if n.startswith("RepElanMSBlock.")}
        width, depth = (1 + max(s[k] for s in stacks) for k in (0, 1))
        expansion = _ratio(config, "depth_expansion", state["RepElanMSBlock.0.0.conv1.conv.weight"])
        options = {"width": width + 1, "depth": depth, "expansion": expansion}
        return RepHMS2d(inputs, outputs, kernels[0], **options, **norms)
    if any(n.startswith("m.0.") for n in state):
        depth = 1 + max(int(n.split(".")[1]) for n in state if n.startswith("m."))
        options = {
            "depth": depth,
            "expansion": config.get("expansion", 0.5),
            "depth_expansion": _ratio(config, "depth_expansion", state["m.0.conv1.conv.weight"]),
        }
        return RepHDW2d(inputs, outputs, kernels[0], **options, **norms)
    if last.shape[1] == 1:
        return SCDown(inputs, outputs, last.shape[-1], config.get("stride", config.get("s", 2)), **norms)
    return SPPF(inputs, outputs, config.get("kernel_size", config.get("k", 5)), **norms)


def _ratio(config: dict[str, Any], name: str, weight: Tensor) -> float:
    """``config[name]``, or what makes as many inner channels as the bottleneck's first convolution has."""
    value: float = config.get(name, (weight.shape[0] + 0.5) / weight.shape[1])
    return value


def _convolution(config: dict[str, Any], weight: Tensor, norms: dict[str, float]) -> nn.Module:
    outputs, within, *size = weight.shape
    inputs = config.get("in_channels", config.get("c1", within * config.get("groups", config.get("g", 1))))
    stride, act = config.get("stride", config.get("s", 1)), config.get("act", True)
    return ConvBN(inputs, outputs, size[0], stride, inputs // within, act, **norms)


def _detector(case: Case) -> Adapted:
    config = case.config
    scales = config.get("scales", {})
    scale = scales.get(config.get("scale", next(iter(scales), None)), (1, 1, float("inf")))
    rows = scale_rows([*config["backbone"], *config["head"]], *scale)
    norms = {"eps": config.get("bn_eps", 1e-3), "momentum": config.get("bn_momentum", 0.03)}
    module = MHAFYOLO(rows, in_chans=case.inputs["x"].shape[1], **read_official(case.state), **norms)

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        maps = module.head(module.forward_features(inputs["x"]))
        found = {branch: module.head.decode(maps[branch]) for branch in maps}
        raw = {f"{branch}.{level}": m for branch in maps for level, m in enumerate(maps[branch])}
        return {**found, **raw}

    def extra(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            decoded = forward(inputs)
            boxes, scores, labels = select(decoded["one2one"], config.get("post", {}).get("max_det", 300))
            found = {"post_boxes_xywh": boxes, "post_scores": scores, "post_labels": labels}
            if any(n.startswith("nms.") for n in case.outputs):
                rule = {
                    k: v for k, v in config.get("nms", {}).items() if k in ("conf", "iou", "max_det", "multi_label")
                }
                for number, kept in enumerate(suppress(decoded["one2many"], **rule)):
                    columns = [kept.boxes, kept.scores[:, None], kept.labels[:, None].to(kept.boxes)]
                    found[f"nms.{number}"] = torch.cat(columns, 1)
            return found | _merged(case, module, inputs)

    return Adapted(
        forward,
        module,
        state=convert_official,
        extra=extra if not case.training else None,
        ignore=lambda n: n.endswith(("num_batches_tracked", "dfl.conv.weight")),
    )


def _loss(case: Case) -> Adapted:
    config = case.config
    levels = sorted({int(n.split(".")[1]) for n in case.inputs if n.startswith("one2many.")})
    channels = case.inputs["one2many.0"].shape[1]
    classes = config.get("nc", channels - 4 * config.get("reg_max", 16))
    settings = {
        "strides": config.get("strides", [8 * 2**level for level in levels]),
        "reg_max": config.get("reg_max", (channels - classes) // 4),
        "gains": {**GAINS, **config.get("gains", {})},
        "topk": {**TOPK, **config.get("topk", {})},
        "alpha": config.get("alpha", 0.5),
        "beta": config.get("beta", 6.0),
    }
    module = DetectionLoss(classes, **settings)

    def read(inputs: dict[str, Tensor]) -> tuple[dict[str, list[Tensor]], Tensor]:
        columns = [inputs["batch_idx"].reshape(-1, 1), inputs["cls"].reshape(-1, 1), inputs["bboxes"].reshape(-1, 4)]
        branches = [b for b in BRANCHES if f"{b}.0" in inputs]
        return {b: [inputs[f"{b}.{level}"] for level in levels] for b in branches}, torch.cat(columns, 1)

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": module(*read(inputs)).loss}

    def extra(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        heads, targets = read(inputs)
        found = {"items": module(heads, targets).items}
        sizes = [(m.shape[2], m.shape[3]) for m in heads["one2many"]]
        found["anchor_points"], found["stride_tensor"] = anchors(sizes, module.strides, dtype=case.dtype)
        for branch, maps in heads.items():
            given = module.assignment(maps, targets, module.topk[branch])
            found[f"{branch}.fg_mask"], found[f"{branch}.gt_index"] = given.foreground, given.object_index
            found[f"{branch}.target_boxes"], found[f"{branch}.target_scores"] = given.boxes, given.scores
        return found

    return Adapted(forward, module, extra=extra)
