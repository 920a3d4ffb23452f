"""DFYP's edge operators, router, gate, channel attention, convolution block, histograms and Gaussian process."""

from __future__ import annotations

import ast
import re
from typing import Any

from torch import Tensor, nn

from tests.parity.core import Adapted, Case, ParityError
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
    raise ParityError(f"{kind or case.name}: the networks and the vision transformer are still to come")


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
