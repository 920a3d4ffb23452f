"""LoCoCo: the compressor, heavy-hitter eviction, an attention layer over several chunks."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from tests.parity.core import Adapted, Case
from torchconv.ops.lococo import LoCoCo, evict_cache
from torchconv.ops.lococo_attention import LoCoCoAttention, LoCoCoCache

OPTIONS = ("hh_keep_rate", "local_len", "hidden_act", "normalizer_init")


def adapt(case: Case) -> Adapted:
    """Sizes from the state first, from the config second, from the paper's settings last."""
    config = {n: v for n, v in case.config.items() if v is not None}
    method, mem_size = config.get("method", "conv"), config.get("mem_size", 128)
    if any(re.fullmatch(r"chunk\d+", name) for name in case.inputs):
        return attention(case, config, method, mem_size)

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        cache = inputs["key"], inputs["value"], inputs["hh_scores"]
        if method == "hh":
            key, value = evict_cache(*cache, mem_size, config.get("local_len", 0))
        else:
            key, value = saver(*cache)
        return {"key": key, "value": value}

    if method == "hh":
        return Adapted(forward, ignore=lambda n: True)
    saver = LoCoCo(case.inputs["key"].shape[3], mem_size, **options(case.state, config))
    return Adapted(forward, saver)


def options(state: dict[str, Tensor], config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The compressor's options."""
    found = {n: config[n] for n in OPTIONS if n in config}
    weights = [t for n, t in state.items() if n.startswith(f"{prefix}layers.") and n.endswith(".weight")]
    if not weights:
        return found | {n: config[n] for n in ("n_convlayer", "kernel_size", "expand") if n in config}
    expand = max(w.shape[0] for w in weights) // min(w.shape[0] for w in weights)
    return found | {"n_convlayer": len(weights), "kernel_size": weights[0].shape[2], "expand": expand}


def attention(case: Case, config: dict[str, Any], method: str, mem_size: int) -> Adapted:
    """All chunks through one layer and one cache."""
    hidden = case.state["q_proj.weight"].shape[1]
    heads = config.get("heads", config.get("num_attention_heads"))
    kv_heads = case.outputs["hh_scores0"].shape[1] if "hh_scores0" in case.outputs else None
    scaling = config.get("rope_scaling", {})
    kind = scaling.get("rope_type", scaling.get("type", "linear"))
    assert kind == "linear", f"rope_scaling of type {kind!r}: only linear is defined"
    has_saver = any(n.startswith("memory_saver.") for n in case.state)
    local = config.get("local_len", 0)
    layer = LoCoCoAttention(
        hidden,
        heads or case.outputs["hh_scores0"].shape[1],
        config.get("num_key_value_heads", kv_heads),
        config.get("head_dim"),
        mem_size=mem_size,
        method="conv" if has_saver else "hh",
        chunk_size=None,
        theta=config.get("rope_theta", 1e4),
        rope_factor=scaling.get("factor", 1.0),
        **options(case.state, {**config, "local_len": local if method == "conv" else 0}, "memory_saver."),
    )
    layer.method, layer.local_len = method, local  # files of the eviction may hold a compressor that is not used

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        cache, outputs = LoCoCoCache(), {}
        losses = []
        for i in range(sum(bool(re.fullmatch(r"chunk\d+", name)) for name in inputs)):
            outputs[f"y{i}"] = layer(inputs[f"chunk{i}"], cache)
            if f"cotangent{i}" in inputs:
                losses.append((outputs[f"y{i}"] * inputs[f"cotangent{i}"]).sum())
            kept = {"cache_key": cache.key, "cache_value": cache.value, "hh_scores": cache.scores}
            outputs |= {f"{n}{i}": t for n, t in kept.items() if t is not None}
        return outputs | ({"loss": torch.stack(losses).sum()} if losses else {})

    return Adapted(forward, layer)
