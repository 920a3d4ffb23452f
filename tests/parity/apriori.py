"""Convolutions in tensor format of any form, and solutions of the wave equation."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.parity.core import Adapted, Case
from torchconv.data import waves
from torchconv.ops import apriori


def adapt(case: Case) -> Adapted:
    """A config with a "scheme" is a wave, one with a "format" a layer."""
    if "scheme" in case.config:
        return Adapted(lambda inputs: {}, extra=lambda inputs: _wave(case))
    config = case.config
    size = config["kernel_size"]
    ndim = len(size) if isinstance(size, list) else config.get("order", case.inputs["x"].dim() - 2)
    sizes = tuple(size) if isinstance(size, list) else (size,) * ndim

    def per_axis(name: str, absent: Any) -> Any:
        value = config.get(name, absent)
        return tuple(value) if isinstance(value, list) else value

    padding = per_axis("padding", "same")
    module = getattr(apriori, f"APrioriConv{ndim}d")(
        config["in_channels"],
        config["out_channels"],
        sizes,
        per_axis("stride", 1),
        tuple(k // 2 for k in sizes) if padding == "same" else padding,
        per_axis("dilation", 1),
        config.get("groups", 1),
        "bias" in case.state,
        form=config["format"],
        rank=per_axis("rank", None),
    )

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": module(inputs["x"])}

    return Adapted(forward, module, extra=lambda inputs: {"kernel": module.kernel()})


def _wave(case: Case) -> dict[str, Tensor]:
    config, scheme = case.config, case.config["scheme"]
    n, c = config["N"], config.get("c", 1.0)
    u0 = case.inputs["u0"].numpy() if "u0" in case.inputs else np.zeros((n, n))
    options: dict[str, Any] = {"dt": config["dt"], "steps": config["steps"], "c": c}
    if "v0" in case.inputs:
        options["v0"] = case.inputs["v0"].numpy()
    if "source" in scheme.lower():
        options["source"] = waves.ricker_source(n, *(config[k] for k in ("f0", "t0", "x0", "y0", "sigma")))
    found: dict[str, Any] = {}
    if "newmark" in scheme.lower():
        mass = "lumped" if "lumped" in scheme.lower() else "consistent"
        constants = dict(re.findall(r"(beta|gamma)\s*=\s*([\d./]+\d|\d)", scheme))
        constants |= {name: str(config[name]) for name in ("beta", "gamma") if name in config}
        options |= {name: float(Fraction(value)) for name, value in constants.items()}
        u, v = waves.newmark(u0, mass=mass, **options)
        found["energy"] = waves.wave_energy(u, v, c, mass)
    else:
        u = waves.leapfrog(u0, **options)
    norms = np.sqrt((u**2).sum((-2, -1)))
    found |= {"u": u, "u_last3": u[-3:], "norms": norms}
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in found.items()}
