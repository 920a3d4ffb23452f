"""Large kernel attention, its block and network, the time encoding, a cascade's roll-out, scores of forecasts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.parity.core import Adapted, Case, ParityError
from torchconv.models.classify.van import VAN
from torchconv.models.forecast.puyun_rollout import STAGES, Cascade, rollout, time_encoding
from torchconv.models.forecast.van import VANBlock
from torchconv.ops.puyun import LKA1d, LKA2d, LKA3d, LKAttention1d, LKAttention2d, LKAttention3d
from torchconv.training import weather

GATES = {1: LKA1d, 2: LKA2d, 3: LKA3d}
ATTENTIONS = {1: LKAttention1d, 2: LKAttention2d, 3: LKAttention3d}


def parts(case: Case) -> Adapted:
    config, names = case.config, set(case.state)
    ndim = case.inputs["x"].dim() - 2
    # The kernels say K (a multiple of d with their number of taps) and d.
    local, spread = (
        next(t.shape for n, t in case.state.items() if n.endswith(f"{layer}.weight"))
        for layer in ("conv0", "conv_spatial")
    )
    apart = [(k + 1) // 2 for k in local[2:]]
    sizes: dict[str, Any] = {"kernel_size": [k * d for k, d in zip(spread[2:], apart, strict=True)]}
    sizes["decomposition"] = apart
    module: nn.Module
    if "norm1.weight" in names:
        module = VANBlock(config.get("dim", local[0]), config.get("mlp_ratio", 4.0), **sizes)
    elif "proj_1.weight" in names:
        module = ATTENTIONS[ndim](config.get("d_model", local[0]), bias="proj_1.bias" in names, **sizes)
    else:
        module = GATES[ndim](config.get("dim", local[0]), bias="conv0.bias" in names, **sizes)

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        y = module(inputs["x"])
        # Running statistics after the step.
        return {"y": y, **{f"after.{n}": t for n, t in module.named_buffers()}}

    return Adapted(forward, module)


def network(case: Case) -> Adapted:
    """The whole visual attention network, its sizes from the state."""
    state, config = case.state, case.config
    count = len({n.partition(".")[0] for n in state if n.startswith("patch_embed")})
    dims = [state[f"patch_embed{i}.norm.weight"].shape[0] for i in range(1, count + 1)]
    depths = [len({n.split(".")[1] for n in state if n.startswith(f"block{i}.")}) for i in range(1, count + 1)]
    hidden = [state[f"block{i}.0.mlp.fc1.weight"].shape[0] for i in range(1, count + 1)]
    module = VAN(
        state["patch_embed1.proj.weight"].shape[1],
        state["head.weight"].shape[0] if "head.weight" in state else 0,
        dims,
        depths,
        [h / d for h, d in zip(hidden, dims, strict=True)],
        config.get("drop_rate", 0.0),
        config.get("drop_path_rate", 0.0),
    )

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        y = module(inputs["x"])
        return {"y": y, "logits": y, **{f"after.{n}": t for n, t in module.named_buffers()}}

    return Adapted(forward, module)


def encoding(case: Case) -> Adapted:
    config = case.config
    moments = config.get("init_times", list(case.outputs))

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        steps = {m: config.get("steps", len(case.outputs[m])) for m in moments if m in case.outputs}
        return {m: time_encoding(m, n, config.get("freq_hours", 6)) for m, n in steps.items()}

    return Adapted(forward)


class Toy(nn.Module):
    """The next state is tanh(W · (previous, current) + mean(time))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, 2 * channels))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(N, 2, C, H, W) → (N, C, H, W)."""
        mixed = torch.einsum("oc,nchw->nohw", self.weight, x.flatten(1, 2))
        return torch.tanh(mixed + time.mean(1)[:, None, None, None])


def cascade(case: Case) -> Adapted:
    config, expected = case.config, case.outputs
    held = {n.rpartition(".")[0]: t for n, t in case.state.items()}
    stages = config.get("stages") or sorted(held, key=lambda n: (*STAGES, n).index(n))
    every = config.get("steps_per_stage", 20)
    module = Cascade({n: Toy(held[n].shape[0]) for n in stages}, every)

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x, times = inputs["x"], inputs.get("time_embeddings")
        steps = config.get("steps", len(next(iter(expected.values()))) if times is None else len(times))
        if times is None:
            times = time_encoding(config["init_time"], steps, config.get("hours_per_step", 6)).to(x)
        states = torch.stack(list(rollout(module, x, times[:steps])))
        # The authors' loop knows a single forecast.
        states = states.squeeze(1) if "states" in expected and expected["states"].dim() == 4 else states
        return {"states": states, "stage": torch.tensor([module.stage_index(s) for s in range(steps)])}

    def names(name: str) -> str:
        return name if name in case.inputs else f"stages.{name}"

    used = {n: t for n, t in case.state.items() if n.rpartition(".")[0] in stages}
    return Adapted(forward, module, lambda s: {names(n): t for n, t in s.items() if n in used}, names)


def scores(case: Case) -> Adapted:
    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        latitude = inputs["latitude"]
        found = {"latitude_weights": weather.latitude_weights(latitude)}
        found["weights_mean_one"] = weather.latitude_weights(latitude, "cosine")
        if not {"forecast", "truth"} <= set(inputs):
            return found
        cosine = case.config.get("weights") in ("cos", "cosine")
        weights = found["weights_mean_one" if cosine else "latitude_weights"]
        pair = inputs["forecast"], inputs["truth"]
        kinds: dict[str, Callable[..., Tensor]] = {"mse": weather.mse, "mae": weather.mae, "bias": weather.bias}
        found |= {f"{name}_per_time": score(*pair, weights) for name, score in kinds.items()}
        for root in ("after", "before"):
            found[f"rmse_sqrt_{root}_time_mean"] = weather.rmse(*pair, weights, root=root)
        if "climatology_at_valid_time" in inputs:
            found["acc_per_time"] = weather.acc(*pair, inputs["climatology_at_valid_time"], weights)
            found["acc_mean"] = found["acc_per_time"].mean(0)
        # Scalars are kept with one element.
        return {
            n: t.reshape(case.outputs[n].shape) if n in case.outputs and t.dim() == 0 else t for n, t in found.items()
        }

    return Adapted(forward)


def adapt(case: Case) -> Adapted:
    """Which piece it is follows from the parameters and the inputs."""
    if "patch_embed1.proj.weight" in case.state:
        return network(case)
    if any(name.endswith("conv_spatial.weight") for name in case.state):
        return parts(case)
    if "latitude" in case.inputs:
        return scores(case)
    if case.state and "x" in case.inputs:
        return cascade(case)
    if "init_times" in case.config or not (case.inputs or case.state):
        return encoding(case)
    raise ParityError("neither an operator, a cascade, an encoding of times nor scores on a grid of latitudes")
