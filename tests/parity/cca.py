"""Compressed convolutional attention: whole passes, left padding, decoding in steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.parity.core import Adapted, Case
from torchconv.ops.cca import CCA, CCACache, Rotary


def adapt(case: Case) -> Adapted:
    """Sizes from the state, the rest from the config; with ``prefill`` the later tokens follow one at a time."""
    config = {n: v for n, v in case.config.items() if v is not None}
    layer = build(case.state, config)

    def rotary(inputs: dict[str, Tensor]) -> Rotary | None:
        return (inputs["cos"], inputs["sin"]) if "cos" in inputs else None

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if "prefill" in config or "cache_key" in case.outputs:
            return decode(layer, inputs, config.get("prefill", 1), rotary(inputs))
        return {"y": layer(inputs["x"], inputs.get("padding_mask"), rotary=rotary(inputs))}

    def extra(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        mask = inputs.get("padding_mask")
        q, k, v = layer.mixed(inputs["x"], mask)
        q_normed, k_normed = layer.qk_norm(q, k)
        weights = layer.attention_weights(inputs["x"], mask, rotary=rotary(inputs))
        found = {"q_mixed": q, "k_mixed": k, "value": v, "q_normed": q_normed, "k_normed": k_normed}
        return found | {"attn_weights": weights}

    return Adapted(forward, layer, extra=extra)


def build(state: dict[str, Tensor], config: dict[str, Any]) -> CCA:
    """The layer of a file."""
    kv_heads = state["qk_norm.temp"].shape[0]
    depthwise, grouped = (state[f"qkv_proj.conv_qk_{n}.weight"] for n in ("depthwise", "grouped"))
    embed_dim, e_q = state["o_proj.weight"].shape
    head_dim = grouped.shape[1]
    rope = config.get("rope_parameters", {})
    rope = {**rope.get("hybrid", rope), **config}
    return CCA(
        embed_dim,
        e_q // head_dim,
        kv_heads,
        head_dim,
        time0=depthwise.shape[2],
        time1=grouped.shape[2],
        rotary=rope.get("partial_rotary_factor", 0.5),
        theta=rope.get("rope_theta", 5e6),
        bias="o_proj.bias" in state,
    )


def decode(layer: CCA, inputs: dict[str, Tensor], prefill: int, rotary: Rotary | None) -> dict[str, Tensor]:
    """``prefill`` tokens at once, the others one by one; what the cache holds then."""
    x, mask, cache = inputs["x"], inputs.get("padding_mask"), CCACache()
    length = x.shape[1]
    outputs, begin = [], 0
    for end in (*range(min(max(prefill, 1), length), length), length):
        here = slice(begin, end)
        table = None if rotary is None else (rotary[0][:, here], rotary[1][:, here])
        real = None if mask is None else mask[:, here]
        outputs.append(layer(x[:, here], real, rotary=table, cache=cache))
        begin = end
    return {
        "y": torch.cat(outputs, 1),
        "final_conv_state": cache.conv.transpose(1, 2),
        "final_delayed_v_state": cache.delayed.squeeze(1),
        "cache_key": cache.key,
        "cache_value": cache.value,
    }
