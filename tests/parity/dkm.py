"""Kernels, Gram layers, sparse and convolutional machines, and the full objective; the config tells which."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tests.parity.core import Adapted, Case, ParityError
from torchconv.ops.dkm import F2G, DeepKernelMachine, GPOutput, GramLayer, Input, ReluKernel, SqExpKernel
from torchconv.ops.dkm_conv import BigFinalConv, ConvF2G, ConvMixup, GramBatchNorm, NystromGAP
from torchconv.theory.dkm import GramStructure, deep_linear_optimum, full_objective, gaussian_kl

Tensors = Mapping[str, Tensor]


def adapt(case: Case) -> Adapted:
    """Choose by the config and the inputs."""
    if "GY" in case.inputs:
        return Adapted(lambda inputs: _linear(inputs, case.config))
    if "nu" in case.config:
        case.inputs["cotangent.objective"] = torch.ones((), dtype=case.dtype)
        return Adapted(lambda inputs: _full(inputs, case.config))
    if "ii" in case.inputs:
        return _layer(case)
    return _network(case)


def _linear(inputs: dict[str, Tensor], config: dict[str, Any]) -> Tensors:
    found = deep_linear_optimum(inputs["G0"], inputs["GY"], config["layers"])
    chain = [inputs["G0"], *found, inputs["GY"]]
    kl = sum(gaussian_kl(after, before) for before, after in pairwise(chain))
    assert isinstance(kl, Tensor)
    return {**{f"G{i}": g for i, g in enumerate(found, start=1)}, "objective": -kl}


def _full(inputs: dict[str, Tensor], config: dict[str, Any]) -> Tensors:
    x, nu = inputs["x"], config["nu"]
    options = {name: config[name] for name in ("kernel", "noise_var", "jitter") if name in config}
    found = full_objective(x, inputs["y"], [inputs[f"chol{i}"] for i in range(len(nu))], nu, **options)
    return {
        "G0": x @ x.T / x.shape[1],
        "kl": found.kl,
        "loglik": found.log_likelihood,
        "objective": found.value,
    }


def _kernel(config: dict[str, Any]) -> nn.Module:
    jitter = {name: config[name] for name in ("mult_eps", "abs_eps") if name in config}
    kind = config.get("kernel", "relu")
    if kind == "sqexp":
        return SqExpKernel(**jitter)
    if kind != "relu":
        raise ParityError(f"unknown kernel {kind!r}")
    variances = {name: config[name] for name in ("bias_var", "weight_var") if name in config}
    return ReluKernel(**variances, **jitter)


def _layer(case: Case) -> Adapted:
    """The gradients are those of the sum over the outputs of their products with c_ii, c_ti, c_t (and the term)."""
    config, outputs = case.config, case.outputs
    gram = "V" in case.state or "P" in config
    module = GramLayer(config.get("P", len(case.inputs["ii"])), config.get("dof", 1.0)) if gram else _kernel(config)
    for name in ("ii", "ti", "t"):
        if f"c_{name}" in case.inputs:
            case.inputs[f"cotangent.{name}"] = case.inputs.pop(f"c_{name}")
    if gram:
        case.inputs["cotangent.obj"] = torch.ones((), dtype=case.dtype)

    def forward(inputs: dict[str, Tensor]) -> Tensors:
        ii = inputs["ii"]
        if gram:
            ii = (ii + ii.T) / 2  # the file's gradient is the symmetric one
        found = module(GramStructure(ii, inputs["ti"], inputs["t"], ii.new_zeros(())))
        named = {"ii": found.ii, "ti": found.ti, "t": found.t, "obj": found.terms}
        return {name: value for name, value in named.items() if name in outputs}

    return Adapted(forward, module)


def _network(case: Case) -> Adapted:
    config, state = case.config, case.state
    inducing = state["0.X"]
    last = max(int(name.partition(".")[0]) for name in state)
    outputs = state[f"{last}.mu"].shape[1]
    seen: dict[int, str] = {}
    output = GPOutput(len(state[f"{last}.mu"]), outputs, config.get("mc", 1))
    if inducing.dim() == 2:
        layers: list[nn.Module] = [Input(inducing), F2G()]
        for _ in range(config.get("depth", (last - 3) // 2)):
            layers += [_kernel(config), GramLayer(len(inducing), config.get("dof", 1.0))]
        machine = DeepKernelMachine(*layers, _kernel(config), output)
    else:
        machine = DeepKernelMachine(*_convolutional(config, state), output)
        seen = {1: "f2g", 3: "mixup", 5: "bn", 10: "final"}

    def forward(inputs: dict[str, Tensor]) -> Tensors:
        found: dict[str, Tensor] = {}
        noise = inputs["noise"]
        g: Any = inputs["x"]
        *layers, head = machine
        for number, layer in enumerate(layers):
            g = layer(g)
            if number in seen:
                found |= {f"{seen[number]}_{block}": getattr(g, block) for block in ("ii", "ti", "t")}
        samples, terms = head(g, noise)
        kind = config.get("likelihood", "categorical")
        settings = {"noise_var": config["noise_var"]} if "noise_var" in config else {}
        n = config.get("num_datapoints", len(inputs["x"]))
        parts = machine.objective(inputs["x"], inputs["y"], num_data=n, likelihood=kind, noise=noise, **settings)
        found |= {"samples": samples, "kl_reg": terms, "expected_loglik": parts.expected_log_likelihood}
        found |= {"objective": parts.objective}
        found |= {"prediction": machine.predict(inputs["x"], likelihood=kind, noise=noise)}
        return {name: value for name, value in found.items() if name in case.outputs}

    case.inputs["cotangent.objective"] = torch.ones((), dtype=case.dtype)
    return Adapted(forward, machine)


def _convolutional(config: dict[str, Any], state: Tensors) -> list[nn.Module]:
    first, second = state["3.latent_learned_weights"], state["7.latent_learned_weights"]
    p0, p1, p2 = len(state["0.X"]), len(first), len(second)
    dof = config.get("dof", 1.0)

    def norm(number: int, kinds: list[str], inducing: int) -> GramBatchNorm:
        i_norm, t_norm, i_scale, t_scale = ("location" if k == "local" and n == 3 else k for n, k in enumerate(kinds))
        size = state.get(f"{number}.t_scale.t_logscale", torch.zeros(1)).shape
        where = (size[1], size[2]) if len(size) == 4 else None
        return GramBatchNorm(i_norm, t_norm, i_scale, t_scale, inducing=inducing, size=where)

    kinds = config.get("bn", ["local", "local", "global", "global"])
    final = {"NystromGAP": NystromGAP, "BFC": BigFinalConv}
    if config["final"] not in final:
        raise ParityError(f"unknown final {config['final']!r}")
    return [
        Input(state["0.X"]),
        ConvF2G(),
        ReluKernel(),
        ConvMixup(p0, p1, first.shape[2], config.get("stride", 1)),
        GramLayer(p1, dof),
        norm(5, kinds, p1),
        ReluKernel(),
        ConvMixup(p1, p2, second.shape[2], 1),
        GramLayer(p2, dof),
        norm(9, kinds, p2),
        final[config["final"]](),
        norm(11, ["local", "local", "global", "global"], p2),
    ]
