"""DFYP's parts and whole networks; the networks' weights and inputs are drawn by the formula in the files' notes."""

from __future__ import annotations

import ast
import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from tests.parity.core import Adapted, Case, ParityError
from torchconv._common import ntuple
from torchconv.models.forecast import dfyp, dfyp_sentinel
from torchconv.models.forecast.dfyp_vit import ViT
from torchconv.ops.dfyp import EdgeOperator, OperatorBlend, OperatorRouter, ResolutionAttention
from torchconv.ops.dfyp_yield import ConvBlock, gaussian_process, histogram_features

EDGES = {"SobelOperator": "sobel", "ScharrOperator": "scharr", "LearnableOperator": "learnable"}
POOLS = {"SEBlock": ("max", 16), "SentinelSEBlock": ("avg", 8)}


def adapt(case: Case) -> Adapted:
    """By the class of the config, or by the inputs."""
    if "image" in case.inputs:
        return Adapted(lambda inputs: {"histogram": _histogram(case.config, inputs["image"])})
    if "feat_train" in case.inputs:
        return Adapted(lambda inputs: {"pred": _process(case.config, inputs)})
    kind = case.config.get("cls")
    if kind == "YearOperatorRouter":
        return _router(case)
    if kind in ("DFYPNet", "SentinelDFYPNet"):
        return _network(case, kind == "DFYPNet")
    if kind == "ViT":
        return _vit(case)
    module = _module(case, kind)
    return Adapted(
        lambda inputs: {"y": module(inputs["x"])},
        module,
        state=lambda state: {n: t for n, t in state.items() if not _fixed(n)},
        fresh=lambda n: n.endswith("num_batches_tracked") or "operator_router." in n,
    )


def _fixed(name: str) -> bool:
    """The kernels of Sobel and Scharr are constants of ours."""
    return name.rsplit(".", 1)[-1] in ("sobel_x", "sobel_y", "scharr_x", "scharr_y", "kernel_x", "kernel_y")


def _module(case: Case, kind: str | None) -> nn.Module:
    config = case.config
    if kind in EDGES:
        return EdgeOperator(EDGES[kind])
    if kind in POOLS:
        pool, reduction = POOLS[kind]
        return ResolutionAttention(config["channels"], config.get("reduction", reduction), pool)
    if kind == "ConvBlock":
        size, stride = config.get("kernel_size", 3), config.get("stride", 1)
        return ConvBlock(config["in_channels"], config["out_channels"], size, stride, config.get("dropout", 0.0))
    if kind == "SentinelCropOperatorGate":
        return OperatorBlend(default=config.get("operator_type", "sobel"), grey=True)
    raise ParityError(f"{kind or case.name}: unknown class")


def _vit(case: Case) -> Adapted:
    """Sizes from the state, image, patch and heads from the config."""
    config = case.config
    heads = config.get("heads", 8)
    found = dfyp.read_vit(case.state, heads, prefix="")
    options = {k: config[k] for k in ("dim_head", "mlp_dim", "dropout", "emb_dropout") if k in config}
    project = "transformer.layers.0.0.to_out.0.weight" in case.state or not found["depth"]
    size, patch = config.get("image_size", 32), ntuple("patch_size", config.get("patch_size", 4), 2)
    channels = case.state["to_patch_embedding.2.weight"].shape[1] // math.prod(patch)
    module = ViT(size, patch, channels, heads=heads, project=project, **{**options, **found})
    return Adapted(lambda inputs: {"y": module(inputs["x"])}, module, state=dfyp.convert_official)


def drawn(case: Case) -> dict[str, Tensor]:
    """The state by the formula of the note: tensor k of the sorted names, entry i."""
    shapes = dict(case.config["names_shapes"])
    names = sorted(n for n in shapes if not (_fixed(n) or n.endswith("num_batches_tracked")))
    found = {}
    for k, name in enumerate(names):
        shape = shapes[name]
        r = 2 * _fraction(math.prod(shape), 78.233 * k) - 1
        if not shape:
            r = 0.5 + 0.2 * r
        elif name.endswith("running_var"):
            r = 1 + 0.3 * r
        elif len(shape) == 1:
            r = 0.2 * r + name.endswith("weight")
        else:
            r = r * math.sqrt(6 / math.prod(shape[1:]))
        found[name] = r.reshape(shape).float()
    return found


def _fraction(count: int, phase: float) -> Tensor:
    z = torch.sin(12.9898 * torch.arange(count, dtype=torch.float64) + phase) * 43758.5453
    return z - z.floor()


def _network(case: Case, modis: bool) -> Adapted:
    """Sizes from the state first, from the config second."""
    config = case.config
    state = dfyp.convert_official(case.state or drawn(case))
    given = {k: config[k] for k in ("dropout", "emb_dropout", "dim_head", "image_size", "patch_size") if k in config}
    net: Any
    if modis:
        found = dfyp.read_official(state, config.get("heads", 8), config.get("num_bins", 32))
        table, default = config.get("year_operator_map") or {}, config.get("default_operator", "learnable")
        given |= {k: config[k] for k in ("time", "num_periods", "reduction") if k in config}
        given.pop("image_size", None)
        net = dfyp.DFYPNet(**{**found, **given}, table=table, default=default)
    else:
        found = dfyp_sentinel.read_official(state, config.get("heads", 6), config.get("patch_size"))
        net = dfyp_sentinel.SentinelDFYPNet(**{**found, **given}, operator=config.get("operator_type", "sobel"))
    missing, unexpected = net.load_state_dict(state, strict=False)
    missing = [n for n in missing if not (n.endswith("num_batches_tracked") or "operator_router.logits" in n)]
    if missing or unexpected:
        raise ParityError(f"state does not fit: missing {missing}, unexpected {unexpected}")

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x = inputs.get("x")
        if x is None:
            shape = config["input_shape"]
            x = (4 * _fraction(math.prod(shape), 0.0) - 2).reshape(shape).float()
        years = inputs["years"] if "years" in inputs else config.get("years")
        cnn, vit = net.branches(x, years) if modis else net.branches(x)
        attention = net.se_block if modis else net.se
        s = attention(x.flatten(0, -4)).reshape(x.shape)
        return {"y": net.a1 * cnn + net.a2 * vit, "cnn": cnn, "vit": vit, "se": s.mean((-2, -1))}

    return Adapted(forward, net, state=dfyp.convert_official, fresh=lambda n: not case.state or n.endswith("tracked"))


def _histogram(config: dict[str, Any], image: Tensor) -> Tensor:
    return histogram_features(
        image, config.get("bands", 9), config.get("num_bins", 32), config.get("max_bin_val", 4999)
    )


def _process(config: dict[str, Any], inputs: dict[str, Tensor]) -> Tensor:
    train, test = (
        [inputs[f"{name}_{part}"] for name in names]
        for part, names in (("train", ("feat", "loc", "year", "yield")), ("test", ("feat", "loc", "year")))
    )
    options = {k: config[k] for k in ("sigma", "r_loc", "r_year", "sigma_e", "sigma_b") if k in config}
    weight, bias = inputs["last_weight"], inputs["last_bias"]
    return gaussian_process(
        (train[0], train[1], train[2], train[3]), (test[0], test[1], test[2]), weight, bias, **options
    )


def _router(case: Case) -> Adapted:
    """Years and map stand in the config, or in the note as Python-like literals."""
    config: dict[str, Any] = case.config
    years, table, default = config.get("years"), config.get("year_operator_map"), config.get("default_operator")
    if years is None and "years" in case.inputs:
        years = case.inputs["years"].tolist()
    if years is None:
        found = re.search(r"years (\[[^\]]*\])", case.note)
        if found is None:
            raise ParityError("neither config nor note says the years")
        years = ast.literal_eval(found[1])
    if table is None:
        found = re.search(r"map \{([^}]*)\}", case.note)
        pairs = re.findall(r"['\"]?(\w+)['\"]?\s*:\s*['\"]?(\w+)", found[1] if found else "")
        table = dict(pairs)
    if default is None:
        found = re.search(r"default (\w+)", case.note)
        default = found[1] if found else "learnable"
    module = OperatorRouter({int(year): kind for year, kind in table.items()}, default)
    return Adapted(
        lambda inputs: {"y": module(inputs["x"], [int(year) for year in years])},
        module,
        state=lambda state: {n: t for n, t in state.items() if not _fixed(n)},
    )
